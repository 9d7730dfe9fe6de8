"""When an answer is right: the tests that tasks share."""

from __future__ import annotations

import unicodedata

ROUND_IT = " \"'`.,;:!\u2018\u2019\u201c\u201d\u300c\u300d\u300e\u300f\u3002\uff0c\uff01"
"""Quotes and stops, Western and East Asian, that may stand around a label."""


def normalize(answer: str) -> str:
    """An answer reduced to its label: Unicode NFC, case folded, white space collapsed, quotes and stops around it removed, unless it
    consists of them.

    `' "Card_Arrival". '` becomes `card_arrival`.
    """
    text = " ".join(unicodedata.normalize("NFC", answer).split())
    return (text.strip(ROUND_IT) or text).casefold()


def is_exact(expected: str, answer: str) -> bool:
    """Exact match: equal but for white space at the ends, and for how Unicode writes a letter with its accents (NFC)."""
    return unicodedata.normalize("NFC", expected).strip() == unicodedata.normalize("NFC", answer).strip()


def is_correct(expected: str, answer: str) -> bool:
    """Accuracy's test: equal after `normalize`. An answer that says more than the label is wrong."""
    return normalize(expected) == normalize(answer)
