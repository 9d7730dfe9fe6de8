"""The rows that quantization is calibrated on, and those that it is then measured on: never the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tunesmith.data.chat import ChatFormat
from tunesmith.data.fingerprints import Row
from tunesmith.data.splits import split_rows
from tunesmith.errors import DataError
from tunesmith.types import Example

MAX_TOKENS = 2048
"""The longest row; what is beyond is cut off."""

MEASURED_ROWS, MEASURED_TOKENS = 64, 4096
"""At most so many rows, and tokens in all, are measured on: the source's logits on them are kept (export/agreement.py)."""

LEFT_OUT = 0.2
"""Of rows of which none is held out, the share that is left out of calibration."""

SEED = 0

Ids = tuple[int, ...]


def drawn(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, at random, the same every time."""
    places = random.Random(SEED).sample(range(len(rows)), min(count, len(rows)))
    return [rows[place] for place in sorted(places)]


def leave_out(rows: Sequence[Row], where: str) -> tuple[list[Row], list[Row]]:
    """Rows to calibrate on, and rows left out; those that share a question stay together. Raises DataError where there is one group."""
    parts = split_rows(rows, {"calibration": 1 - LEFT_OUT, "measured": LEFT_OUT}, SEED)
    if not parts["measured"] or not parts["calibration"]:
        raise DataError(
            f"{where}: {len(rows)} rows, which cannot be parted into some to calibrate on and others to measure on; pass a file of more rows "
            "with --data"
        )
    return [rows[place] for place in parts["calibration"]], [rows[place] for place in parts["measured"]]


def encode(chat: ChatFormat, examples: Sequence[Example], max_tokens: int) -> list[Ids]:
    """The token ids of whole conversations and texts, as they were trained on, at most `max_tokens` of each.

    Rows that the template refuses are left out. Raises DataError with every problem where none is left.
    """
    tokens, findings = chat.encode_checked(examples)
    found = [tuple(int(token) for token in each.input_ids[:max_tokens]) for each in tokens if len(each) > 1]
    if not found:
        problems = [str(finding) for finding in findings if finding.severity == "error"]
        raise DataError(problems or ["no row has two tokens or more"])
    return list(dict.fromkeys(found))


def measurable(rows: Sequence[Ids], calibration: Sequence[Ids]) -> list[Ids]:
    """The first rows, MEASURED_TOKENS of tokens in all, that are not among those of the calibration."""
    seen, chosen, total = set(calibration), list[Ids](), 0
    for row in rows:
        cut = row[: MEASURED_TOKENS - total]
        if row in seen or len(cut) < 2:
            continue
        chosen.append(cut)
        total += len(cut)
    return chosen
