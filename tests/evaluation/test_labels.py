"""F1 and confusions against scikit-learn's, and by name."""

from __future__ import annotations

import random

import pytest

from tunesmith.evaluation.labels import Labels
from tunesmith.evaluation.metrics import is_correct, normalize
from tunesmith.types import Generation

CLASSES = ("card_arrival", "card_delivery_estimate", "top_up_failed", "rare")


def rows_of(pairs: list[tuple[str, str]]) -> list[Generation]:
    return [
        Generation(f"question {line}", expected, answer, is_correct(expected, answer), line)
        for line, (expected, answer) in enumerate(pairs, 1)
    ]


def drawn(count: int = 300, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    answers = (*CLASSES, "no label at all", "")
    return [
        (expected, expected if draw.random() < 0.6 else draw.choice(answers))
        for expected in draw.choices(CLASSES, weights=(40, 30, 28, 2), k=count)
    ]


def test_f1_is_scikit_learns() -> None:
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    pairs = drawn()
    expected, answered = zip(*pairs, strict=True)
    labels = Labels(rows_of(pairs), (), normalize)
    classes = sorted(set(expected))
    every = labels.pairs
    for average, found in (("macro", labels.macro_f1(every)), ("micro", labels.micro_f1(every))):
        assert found == pytest.approx(f1_score(expected, answered, labels=classes, average=average, zero_division=0))
    precision, recall, f1, n = precision_recall_fscore_support(
        expected, answered, labels=classes, average=None, zero_division=0
    )
    for index, one in enumerate(labels.report()["per_class"]):
        assert (one["label"], one["n"]) == (classes[index], n[index])
        assert (one["precision"] or 0, one["recall"], one["f1"]) == pytest.approx(
            (precision[index], recall[index], f1[index])
        )


def test_answers_are_labels_without_case_quotes_and_stops() -> None:
    labels = Labels(rows_of([("Card_Arrival", " 'card_arrival'. "), ("card_arrival", "other")]), (), normalize)
    report = labels.report()
    assert labels.names == ("Card_Arrival",)
    assert (report["per_class"][0]["recall"], report["per_class"][0]["precision"], report["other"]) == (0.5, 1.0, 1)


def test_confusions_are_named_with_examples_the_most_frequent_first() -> None:
    pairs = [
        *[("card_arrival", "card_delivery_estimate")] * 5,
        *[("card_delivery_estimate", "card_arrival")] * 2,
        ("top_up_failed", "gibberish"),
        ("top_up_failed", "top_up_failed"),
    ]
    report = Labels(rows_of(pairs), (), normalize).report()
    first, second = report["confusions"]
    assert (first["expected"], first["answered"], first["count"]) == ("card_arrival", "card_delivery_estimate", 5)
    assert [example["line"] for example in first["examples"]] == [1, 2, 3]
    assert first["examples"][0]["prompt"] == "question 1"
    assert (second["expected"], second["answered"], second["count"]) == ("card_delivery_estimate", "card_arrival", 2)
    assert report["other"] == 1


def test_macro_f1_has_an_error_and_a_paired_test() -> None:
    pairs = drawn()
    better = [(expected, expected if index % 3 else answer) for index, (expected, answer) in enumerate(pairs)]
    tuned, base = (Labels(rows_of(of), (), normalize).scores()["macro_f1"] for of in (better, pairs))
    assert 0.005 < (tuned.measured().stderr or 0) < 0.2
    found = tuned.minus(base)
    assert found.value == pytest.approx(tuned.value - base.value)
    assert (found.test, found.verdict) == ("randomization", "better")
    assert (found.p or 1) < 0.01
    assert tuned.minus(tuned).verdict == "unclear"
