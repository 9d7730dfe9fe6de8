"""Packing documents into bins of a fixed token budget: best-fit decreasing.

Documents are taken longest first; each goes into the fullest bin that has room for it, and a new bin is opened when none
has. Best-fit decreasing never needs more than 11/9 of the fewest possible bins plus 4 (Johnson, Near-optimal bin packing
algorithms, 1973); on documents much shorter than the budget it leaves well under 1% of the slots empty.

Documents of one length are interchangeable, and so are bins with the same room, so all documents of a length are placed
together. Which room is the tightest that fits is one look into a bit set (a Python integer, bit r: some bin has r slots
left), budget / 64 machine words. With the sort that is O(n log n) for n documents and a given budget, and the look-ups
are at most one for each pair of a length and a room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random


def best_fit(lengths: Sequence[int], budget: int, tie_break: random.Random | None = None) -> list[list[int]]:
    """Pack documents of `lengths` tokens into bins of at most `budget`; returns indices into `lengths`, bin by bin.

    The lengths that meet in a bin depend on the lengths alone, not on their order nor on `tie_break`, which decides at
    random which documents of equal length take which place. Without it the earlier one is placed first. Raises
    ValueError for a document that is empty or longer than the budget.
    """
    import numpy as np

    all_lengths = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((all_lengths < 1) | (all_lengths > budget))
    if len(wrong):
        raise ValueError(f"document {wrong[0]} has {all_lengths[wrong[0]]} tokens; a bin holds 1 to {budget}")
    if not len(all_lengths):
        return []
    order = list(range(len(lengths)))
    if tie_break is not None:
        tie_break.shuffle(order)
    indices = np.array(order, dtype=np.int64)
    longest_first = indices[np.argsort(-all_lengths[indices], kind="stable")]
    values, starts = np.unique(-all_lengths[longest_first], return_index=True)
    runs = np.split(longest_first, starts[1:])

    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # bins by the number of slots left
    rooms = 0  # bit r is set: with_room[r] is not empty
    for length, run in zip((-values).tolist(), runs, strict=True):
        documents = run.tolist()
        placed = 0
        while placed < len(documents):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
            else:
                room = budget
                num_new = -(-(len(documents) - placed) // (budget // length))
                with_room[room] = list(range(len(bins), len(bins) + num_new))
                bins += [[] for _ in range(num_new)]
            candidates = with_room[room]
            while candidates and placed < len(documents):
                chosen = candidates.pop()
                taken = documents[placed : placed + room // length]
                bins[chosen] += taken
                placed += len(taken)
                left = room - len(taken) * length
                with_room.setdefault(left, []).append(chosen)
                rooms |= 1 << left
            if not candidates:
                rooms &= ~(1 << room)
    return bins


def fill(lengths: Sequence[int], bins: Sequence[Sequence[int]], budget: int) -> float:
    """Share of the slots of `bins` that hold a token, the emptiest bin left out; 1.0 if there is no other."""
    loads = sorted(sum(lengths[index] for index in part) for part in bins)[1:]
    return sum(loads) / (budget * len(loads)) if loads else 1.0
