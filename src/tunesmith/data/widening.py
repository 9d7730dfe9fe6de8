"""Sizes of micro-batches rounded up, so that they come again: a CUDA graph replays one shape (training/graphs.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Widen = Callable[[int], int]
"""Rounds the length of a row up."""

DOCUMENT_STEP = 16
"""A widened packed row has a multiple of it in documents."""

SHORTEST = 128
"""Tokens that the longest document of a widened row is taken for at least."""

FEWEST_SUPERVISED = 64
"""Supervised positions that a widened micro-batch has room for at least."""


def few_lengths(length: int) -> int:
    """`length` rounded up to one of eight between a power of two and the next: an eighth longer at most, above 64 tokens.

    Multiples of 8 at least: matrix products want them.
    """
    return round_up(length, max(8, (1 << (length - 1).bit_length()) // 16))


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step


def room_for(supervised: int, slots: int) -> int:
    """`supervised` positions rounded up: to all of a micro-batch's `slots`, three quarters, a half, a quarter, an eighth and so
    on, FEWEST_SUPERVISED at least. Few steps, for each is a shape of its own; an eighth more of them gains 1% of a step.
    """
    if slots <= FEWEST_SUPERVISED:
        return slots
    needed, room = max(supervised, FEWEST_SUPERVISED), slots
    while round_up(room // 2, 8) >= needed:
        room = round_up(room // 2, 8)
    three_quarters = round_up(3 * slots // 4, 8)
    return three_quarters if room == slots and three_quarters >= needed else room


def documents_of(lengths: Sequence[int], width: int) -> tuple[list[int], int]:
    """The documents of a widened packed row of `width` tokens, and the longest that attention is told of.

    Padding is cut into documents no longer than that.
    """
    longest = max(lengths)
    longest = min(max(SHORTEST, 1 << (longest - 1).bit_length()), width)
    spare = width - sum(lengths)
    return [*lengths, *[longest] * (spare // longest), *([spare % longest] if spare % longest else [])], longest


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """What two micro-batches must share to share a graph. `longest` is the longest document of a packed row."""

    rows: int
    length: int
    documents: int
    longest: int
    supervised: int

    @classmethod
    def widened(cls, lengths: Sequence[int], supervised: int, packing: bool, widen: Widen) -> MicroBatchShape:
        """The shape that `make_batch` gives examples of these lengths, with so many supervised tokens in all."""
        if not packing:
            rows, width = len(lengths), widen(max(lengths))
            return cls(rows, width, 0, width, room_for(supervised, rows * width))
        width = widen(sum(lengths))
        documents, longest = documents_of(lengths, width)
        room = room_for(supervised, width)
        if len(set(documents)) == 1:  # of one length: attention needs no bounds
            return cls(1, width, 0, documents[0], room)
        return cls(1, width, round_up(len(documents), DOCUMENT_STEP), longest, room)
