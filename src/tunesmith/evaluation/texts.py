"""Overlap of free texts with their references: ROUGE (rouge-score), BLEU and chrF (sacrebleu).

    rouge1, rouge2, rougeL   F-measure of n-grams and of the longest common subsequence (Lin 2004), mean over rows, fractions of 1
    bleu                     of the corpus (Papineni et al. 2002), sacrebleu's defaults (13a, exponential smoothing), 0 to 100
    chrf                     character n-grams (Popović 2015), sacrebleu's defaults, mean over rows, 0 to 100

rouge-score's own tokenizer keeps a-z and 0-9 alone, which leaves nothing of Korean; here a word is what Unicode calls one, which is the
same for English, and each character of scripts that put no spaces between words (Han, kana, Thai, Lao, Khmer, Burmese). chrF is the mean of the rows' chrF, not the corpus's, so that it has an error and a paired test of rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluation.statistics import Scores
from tunesmith.types import Generation

ROUGE = ("rouge1", "rouge2", "rougeL")


UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


class _Words:
    """A tokenizer in rouge-score's form."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(unicodedata.normalize("NFC", text).lower())


def text_scores(rows: Sequence[Generation]) -> dict[str, Scores]:
    """The metrics above."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    n = len(rows)
    scorer = RougeScorer(list(ROUGE), tokenizer=_Words())
    found = [scorer.score(row.expected, row.answer) for row in rows]
    scores = {name: Scores(n, tuple(float(of_row[name].fmeasure) for of_row in found)) for name in ROUGE}
    bleu = _bleu(BLEU(effective_order=True), rows)  # only the counts are read; without it each sentence is warned of
    chrf: Any = CHRF()
    of_rows = tuple(float(chrf.sentence_score(row.answer, [row.expected]).score) for row in rows)
    return scores | {"bleu": bleu, "chrf": Scores(n, of_rows, share=False)}


def _bleu(bleu: Any, rows: Sequence[Generation]) -> Scores:
    """BLEU of any sample of rows, from the n-gram counts of each."""
    of_rows = [bleu.sentence_score(row.answer, [row.expected]) for row in rows]
    counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in of_rows], dtype=np.int64)
    order = (counts.shape[1] - 2) // 2

    def of(sample: NDArray[np.int64]) -> float:
        summed = sample.sum(0).tolist()
        score = bleu.compute_bleu(summed[:order], summed[order : 2 * order], summed[-2], summed[-1], "exp")
        return float(score.score)

    return Scores(len(rows), of=of, items=counts, share=False)
