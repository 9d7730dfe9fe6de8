"""Overlap metrics are the packages' own, and their errors are those of samples of the rows."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from tunesmith.evaluation.texts import text_scores
from tunesmith.types import Generation

PAIRS = [
    ("the cat sat on the mat", "the cat sat on a mat today"),
    ("hello there good friend of mine", "hello there my good friend"),
    ("a completely different sentence here", "nothing alike"),
    ("The quick brown fox jumps over the lazy dog.", "The quick brown fox jumps over the lazy dog."),
]


def rows(pairs: list[tuple[str, str]]) -> list[Generation]:
    return [Generation("q", expected, answer, False, line) for line, (expected, answer) in enumerate(pairs, 1)]


def test_they_are_what_the_packages_give() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    scores = text_scores(rows(PAIRS))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        by_row = [scorer.score(expected, answer)[name].fmeasure for expected, answer in PAIRS]
        assert scores[name].rows == pytest.approx(by_row)
    expected, answers = zip(*PAIRS, strict=True)
    assert scores["bleu"].value == pytest.approx(BLEU().corpus_score(list(answers), [list(expected)]).score)
    chrf = CHRF()
    assert scores["chrf"].rows == pytest.approx([chrf.sentence_score(a, [e]).score for e, a in PAIRS])
    assert [scores[name].share for name in ("rougeL", "bleu", "chrf")] == [True, False, False]


def test_bleu_of_a_sample_is_that_of_the_sampled_corpus() -> None:
    from sacrebleu.metrics import BLEU

    sample = np.array([0, 0, 3, 1])
    chosen = [PAIRS[index] for index in sample]
    alone = BLEU().corpus_score([answer for _, answer in chosen], [[expected for expected, _ in chosen]]).score
    bleu = text_scores(rows(PAIRS))["bleu"]
    assert bleu.of is not None
    assert bleu.of(np.asarray(bleu.items)[sample]) == pytest.approx(alone)


def test_words_of_other_scripts_count() -> None:
    scores = text_scores(rows([("오늘 날씨가 좋아요", "오늘 날씨가 나빠요")]))
    assert scores["rouge1"].value == pytest.approx(2 / 3)
    assert scores["rougeL"].value == pytest.approx(2 / 3)


def test_equal_texts_are_better_than_others() -> None:
    same = text_scores(rows([(expected, expected) for expected, _ in PAIRS]))
    assert [same[name].value for name in ("rouge2", "rougeL", "bleu", "chrf")] == pytest.approx([1, 1, 100, 100])
    found = same["bleu"].minus(text_scores(rows(PAIRS))["bleu"])
    assert found.value > 20
    assert (found.test, found.p) == ("randomization", 2 / 2**3), "three rows differ"


def test_characters_of_unspaced_scripts_and_composed_letters_count() -> None:
    scores = text_scores(rows([("今天天气很好", "今天天气很好啊")]))
    assert scores["rougeL"].value == pytest.approx(12 / 13)
    decomposed = unicodedata.normalize("NFD", "배송 조회")
    assert text_scores(rows([("배송 조회", decomposed)]))["rouge1"].value == 1.0
