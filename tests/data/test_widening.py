"""Rounded sizes, and that the shape that is told beforehand is the one that is made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.batches import make_batch
from tunesmith.data.widening import FEWEST_SUPERVISED, MicroBatchShape, few_lengths, room_for
from tunesmith.training.graphs import shape_of
from tunesmith.types import TokenizedExample


@given(st.integers(1, 300_000), st.floats(0, 1))
def test_room_is_enough_and_seldom_more_than_twice_as_much(slots: int, share: float) -> None:
    supervised = int(share * slots)
    room = room_for(supervised, slots)
    assert supervised <= room <= slots
    assert room <= max(2 * supervised + 8, 2 * FEWEST_SUPERVISED)
    assert room_for(room, slots) == room, "rounding once is enough"


def test_rooms_are_few() -> None:
    rooms = {room_for(supervised, 8192) for supervised in range(8193)}
    assert sorted(rooms) == [64, 128, 256, 512, 1024, 2048, 4096, 6144, 8192]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 700), st.floats(0, 1)), min_size=1, max_size=30),
    st.booleans(),
)
def test_the_shape_that_is_told_is_the_one_that_is_made(rows: list[tuple[int, float]], packing: bool) -> None:
    examples = []
    for length, share in rows:
        mask = np.zeros(length, dtype=bool)
        mask[length - int(share * (length - 1)) :] = True
        examples.append(TokenizedExample(np.ones(length, dtype=np.int32), mask))
    lengths, supervised = [length for length, _ in rows], sum(example.supervised for example in examples)
    told = MicroBatchShape.widened(lengths, supervised, packing, few_lengths)
    assert told == shape_of(make_batch(examples, packing, 0, "cpu", few_lengths))


@pytest.mark.parametrize(
    ("lengths", "packing", "expected"),
    [
        ([30, 20], True, MicroBatchShape(rows=1, length=56, documents=16, longest=56, supervised=56)),
        ([30, 20], False, MicroBatchShape(2, 32, 0, 32, 64)),
        ([128, 128], True, MicroBatchShape(1, 256, 0, 128, 256)),  # of one length: no bounds
        ([900, 300], False, MicroBatchShape(2, 960, 0, 960, 1440)),
    ],
)
def test_shapes_by_hand(lengths: list[int], packing: bool, expected: MicroBatchShape) -> None:
    assert MicroBatchShape.widened(lengths, sum(lengths) - len(lengths), packing, few_lengths) == expected
