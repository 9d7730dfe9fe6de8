"""Values as a reader wants them: numbers, shares, durations and dates as short text.

Everything here takes what a JSON file may hold; a value that is missing or of another type becomes None or a word,
never an exception, because a report must be made from a damaged run too.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

NOT_RECORDED = "not recorded"


def as_number(value: Any) -> float | None:
    """A JSON number as a float; None for anything else, NaN and infinities included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        converted = float(value)
    except OverflowError:  # JSON sets no bound to a whole number
        return None
    return converted if math.isfinite(converted) else None


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits, whole from 1,000 on: 12,345 · 12.3 · 0.412 · 2e-4."""
    if value is None:
        return NOT_RECORDED
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"


def count(value: float | None) -> str:
    """A large count to three digits: 4.88 M, 135 M, 1.24 B."""
    if value is None:
        return NOT_RECORDED
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{value:.0f}"


def percent(value: float) -> str:
    """A fraction of 1 as a percentage with one decimal."""
    return f"{100 * value:.1f}%"


def plural(amount: int, noun: str) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units that say something: 42 s, 3 min 12 s, 2 h 5 min, 1 d 3 h."""
    if seconds is None:
        return NOT_RECORDED
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next(index for index, (amount, _) in enumerate(parts) if amount)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[first : first + 2] if amount)


def moment(value: Any) -> str | None:
    """A time as `2026-11-22 08:14 UTC`. Takes seconds since the epoch or ISO 8601; other text is returned as it is."""
    if (seconds := as_number(value)) is not None:
        try:
            parsed = datetime.fromtimestamp(seconds, UTC)
        except (OverflowError, ValueError, OSError):  # beyond the calendar or the platform's time_t
            return None
    elif isinstance(value, str):
        try:
            parsed = datetime.fromisoformat(value)
        except ValueError:
            return value
    else:
        return None
    zone = "" if parsed.tzinfo is None else " UTC"
    return f"{parsed.astimezone(UTC) if zone else parsed:%Y-%m-%d %H:%M}{zone}"


def as_text(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shortened(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters with a note of how many were left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({plural(len(text) - limit, 'more character')})"
