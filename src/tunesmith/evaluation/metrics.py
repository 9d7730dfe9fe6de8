"""Scores of generated answers, each with its standard error, and what two models differ by on the same questions."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.evaluation.statistics import Difference, Measured, compare, mean
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
    return {
        name: EvalResult(task, name, measured.value, measured.stderr or 0.0, measured.n)
        for name, measured in measure(generations).items()
    }


def measure(generations: Sequence[Generation]) -> dict[str, Measured]:
    """The metrics of `score`, with each row's value."""
    return {
        "accuracy": mean([float(row.correct) for row in generations]),
        "exact_match": mean([float(is_exact(row.expected, row.answer)) for row in generations]),
    }


def differences(tuned: Sequence[Generation], base: Sequence[Generation]) -> dict[str, Difference]:
    """Each metric of the tuned model's answers minus that of the base's to the same questions, with a paired test."""
    before = measure(base)
    return {name: compare(after, before[name]) for name, after in measure(tuned).items()}
