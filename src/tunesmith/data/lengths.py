"""How long rows are, in tokens: estimates without a tokenizer, statistics, and what padding and packing would waste.

Percentiles interpolate linearly between the two nearest ranks (numpy's default, Hyndman and Fan's type 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.data.packing import best_fit
from tunesmith.types import Example, Message, PreferenceExample

if TYPE_CHECKING:
    import numpy as np

CHARS_PER_TOKEN = 4.0
"""What an ASCII character counts for in `estimate_text`: four of them make a token."""
TOKENS_PER_WIDE_CHAR = 0.8
"""What a Hangul syllable, a kana or a CJK ideograph (three bytes of UTF-8) counts for in `estimate_text`."""
TOKENS_PER_TURN = 5
"""What `estimate_row` adds for each turn: a chat template's role header and end of turn."""

SMALLEST_CANDIDATE = 256
"""The first of the `max_seq_length` candidates; each next one is twice as long."""


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Statistics of row lengths, in tokens."""

    rows: int
    mean: float
    median: float
    p95: float
    p99: float
    max: int
    total: int


@dataclass(frozen=True, slots=True)
class Padding:
    """Share of a batch's slots that hold no token (0 to 1), for three ways to lay out the same rows.

    `data_order`: `micro_batch_size` rows at a time as they stand in the file, padded to the longest of them. `sorted`:
    the same, but sorted by length within each step of `batch_size` rows. `packed`: best-fit into rows of `budget` tokens.
    """

    micro_batch_size: int
    batch_size: int
    budget: int
    data_order: float
    sorted: float
    packed: float


def estimate_text(text: str) -> float:
    """About how many tokens a text is, without a tokenizer.

    With b bytes of UTF-8 and c characters, (b - c) / 2 characters count as wide, 0.8 tokens each, and the others as
    ASCII, a quarter of a token each: exact counts for texts of one-byte and three-byte characters, a compromise for
    Cyrillic or Arabic (two bytes: half of them count as wide). On English and Korean chats, instructions and web text it
    gives 0.7 to 1.3 times the count of GPT-4o's vocabulary (bpe-openai 0.1.4, o200k_base) and of Qwen's (dashscope 2.0.2,
    qwen.tiktoken), on most files 0.8 to 1.2. Vocabularies with little Korean need half as much again for it, or more.
    """
    if text.isascii():
        return len(text) / CHARS_PER_TOKEN
    wide = (len(text.encode()) - len(text)) / 2
    return max(0.0, len(text) - wide) / CHARS_PER_TOKEN + wide * TOKENS_PER_WIDE_CHAR


def estimate_row(example: Example | PreferenceExample) -> int:
    """About how many tokens a row is, at least 1. Of a preference pair: the longer of its two sequences."""
    if isinstance(example, PreferenceExample):
        longer = max(_estimate_turns(example.chosen), _estimate_turns(example.rejected))
        tokens = _estimate_turns(example.prompt) + longer
    elif example.text is not None:
        tokens = estimate_text(example.text) + 1
    else:
        tokens = _estimate_turns(example.messages or ())
    return max(1, math.ceil(tokens + sum(estimate_text(str(tool)) for tool in example.tools)))


def _estimate_turns(messages: Sequence[Message]) -> float:
    return sum(estimate_turn(message) for message in messages)


def estimate_turn(message: Message) -> float:
    """About how many tokens one turn is, with what a chat template writes around it."""
    tokens = TOKENS_PER_TURN + estimate_text(message.content)
    if message.reasoning:
        tokens += estimate_text(message.reasoning)
    for call in message.tool_calls:
        tokens += estimate_text(call.name) + estimate_text(str(dict(call.arguments)))
    return tokens


def length_stats(lengths: Sequence[int]) -> LengthStats:
    """Statistics of at least one length."""
    import numpy as np

    values = np.asarray(lengths, dtype=np.int64)
    median, p95, p99 = np.percentile(values, [50, 95, 99])
    total = int(values.sum())
    return LengthStats(
        rows=len(values),
        mean=total / len(values),
        median=float(median),
        p95=float(p95),
        p99=float(p99),
        max=int(values.max()),
        total=total,
    )


def recommended_max_seq_length(lengths: Sequence[int], limit: int | None) -> int:
    """The 95th percentile times 1.2, rounded up to a multiple of 64, and never above `limit` (the model's context)."""
    import numpy as np

    roomy = 1.2 * float(np.percentile(np.asarray(lengths, dtype=np.int64), 95))
    recommended = max(64, 64 * math.ceil(roomy / 64))
    return recommended if limit is None else min(recommended, limit)


def rows_longer_than(lengths: Sequence[int], candidates: Sequence[int]) -> dict[int, int]:
    """For each candidate `max_seq_length`, how many rows are longer: `data.overlong` would cut, split or drop them."""
    import numpy as np

    values = np.sort(np.asarray(lengths, dtype=np.int64))
    longer = len(values) - np.searchsorted(values, np.asarray(candidates), side="right")
    return {candidate: int(count) for candidate, count in zip(candidates, longer, strict=True)}


def candidate_lengths(longest: int) -> list[int]:
    """256, 512, 1024, ... up to the first that no row is longer than."""
    found = [SMALLEST_CANDIDATE]
    while found[-1] < longest:
        found.append(2 * found[-1])
    return found


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, rows) of buckets that double every two (1-8, 9-12, 13-16, 17-24, 25-32, ...), from the first to the last
    that has rows. Bounds are inclusive.
    """
    import numpy as np

    edges = [0, 8]
    while edges[-1] < max(lengths):
        edges.append(edges[-1] * 3 // 2 if edges[-1] & (edges[-1] - 1) == 0 else edges[-1] * 4 // 3)
    counts = np.bincount(np.searchsorted(edges, np.asarray(lengths), side="left"), minlength=len(edges))
    buckets = [(low + 1, high, int(count)) for low, high, count in zip(edges, edges[1:], counts[1:], strict=False)]
    filled = [index for index, (_, _, count) in enumerate(buckets) if count]
    return buckets[filled[0] : filled[-1] + 1]


def padding(lengths: Sequence[int], micro_batch_size: int, batch_size: int, budget: int) -> Padding:
    """What share of the slots is padding. Rows longer than `budget` count as cut to it."""
    import numpy as np

    values = np.minimum(np.asarray(lengths, dtype=np.int64), budget)
    by_step = [np.sort(values[start : start + batch_size])[::-1] for start in range(0, len(values), batch_size)]
    sorted_slots = sum(_padded_slots(step, micro_batch_size) for step in by_step)
    total = int(values.sum())
    bins = best_fit(values.tolist(), budget)
    return Padding(
        micro_batch_size=micro_batch_size,
        batch_size=batch_size,
        budget=budget,
        data_order=1 - total / _padded_slots(values, micro_batch_size),
        sorted=1 - total / sorted_slots,
        packed=1 - total / (len(bins) * budget),
    )


def _padded_slots(values: np.ndarray, micro_batch_size: int) -> int:
    """Slots of padded batches of `micro_batch_size` neighbours: rows times the longest of them."""
    chunks = (values[start : start + micro_batch_size] for start in range(0, len(values), micro_batch_size))
    return sum(len(chunk) * int(chunk.max()) for chunk in chunks)
