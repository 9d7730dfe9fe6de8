"""When an answer is right: the tests that tasks share."""

from __future__ import annotations


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
