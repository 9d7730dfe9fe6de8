"""Scores of generated answers, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunesmith.types import EvalResult, Generation


def normalize(answer: str) -> str:
    """An answer reduced to its label: case folded, white space collapsed, surrounding quotes and stops removed.

    `' "Card_Arrival". '` becomes `card_arrival`.
    """
    return " ".join(answer.split()).strip(" \"'`.,;:!").casefold()


def is_exact(expected: str, answer: str) -> bool:
    """Exact match: equal but for white space at the ends."""
    return expected.strip() == answer.strip()


def is_correct(expected: str, answer: str) -> bool:
    """Accuracy's test: equal after `normalize`. An answer that says more than the label is wrong."""
    return normalize(expected) == normalize(answer)


def score(task: str, generations: Sequence[Generation]) -> dict[str, EvalResult]:
    """`accuracy` and `exact_match` over the rows, with the binomial standard error √(p (1 - p) / n).

    At least one row is needed.
    """
    n = len(generations)
    exact = sum(is_exact(row.expected, row.answer) for row in generations) / n
    accuracy = sum(row.correct for row in generations) / n
    return {
        name: EvalResult(task, name, value, math.sqrt(value * (1 - value) / n), n)
        for name, value in (("accuracy", accuracy), ("exact_match", exact))
    }
