"""Data order, splitting a step, packing and padding."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.batches import StepOrder, make_batch, shifted_labels, split
from tunesmith.types import IGNORE_INDEX, Batch, TokenizedExample

# -- data order -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_each_epoch_takes_each_example_once(num_examples: int, batch_size: int, seed: int, epoch: int) -> None:
    order = StepOrder(num_examples, batch_size, seed)
    steps = [order.step(epoch * order.steps_per_epoch + number) for number in range(order.steps_per_epoch)]
    assert sorted(index for step in steps for index in step) == list(range(num_examples))
    assert all(len(step) == batch_size for step in steps[:-1])
    assert len(steps[-1]) == num_examples - batch_size * (order.steps_per_epoch - 1) > 0


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    straight = StepOrder(10, 4, seed=3)
    expected = [straight.step(number) for number in range(9)]
    jumping = StepOrder(10, 4, seed=3)
    random.seed(0)  # neither the global generator nor what was asked before matters
    for number in (8, 0, 4, 4, 7, 1, 8):
        assert jumping.step(number) == expected[number]
    assert random.random() == pytest.approx(0.8444218515250481), "the global generator was not used"
    by_size = StepOrder(10, 10, seed=3)
    assert by_size.step(1) == [index for step in expected[3:6] for index in step], "the batch size only cuts the order"


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = {tuple(StepOrder(20, 20, seed).step(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_of_a_seed_never_changes() -> None:
    # A resume under another version must continue the same epoch.
    assert [StepOrder(6, 4, 3407).step(number) for number in range(4)] == [
        [5, 4, 2, 0],
        [3, 1],
        [3, 5, 2, 0],
        [1, 4],
    ]


# -- split ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 12), st.booleans())
def test_split_takes_each_example_once_in_the_fewest_micro_batches(
    lengths: list[int], micro_batch_size: int, packing: bool
) -> None:
    parts = split(lengths, micro_batch_size, packing)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert len(parts) == -(-len(lengths) // micro_batch_size)
    assert all(1 <= len(part) <= micro_batch_size for part in parts)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 12))
def test_packed_micro_batches_are_balanced(lengths: list[int], micro_batch_size: int) -> None:
    parts = split(lengths, micro_batch_size)
    loads = [sum(lengths[index] for index in part) for part in parts]
    for part, load in zip(parts, loads, strict=True):
        # An example went to the lightest micro-batch with room: whichever still has room at the end is no lighter
        # than this one was before its last (shortest) example came.
        before = load - min(lengths[index] for index in part)
        assert all(other >= before for p, other in zip(parts, loads, strict=True) if len(p) < micro_batch_size)


@pytest.mark.parametrize(
    ("lengths", "micro_batch_size", "packed", "padded"),
    [
        ([10, 1, 9, 2], 2, [[0, 1], [2, 3]], [[0, 2], [3, 1]]),
        ([1, 1, 1, 1, 1, 9], 3, [[5, 4, 3], [0, 1, 2]], [[5, 0, 1], [2, 3, 4]]),
        ([5, 5, 5], 4, [[0, 1, 2]], [[0, 1, 2]]),
        ([3, 2, 1], 1, [[0], [1], [2]], [[0], [1], [2]]),
    ],
)
def test_split_examples(
    lengths: list[int], micro_batch_size: int, packed: list[list[int]], padded: list[list[int]]
) -> None:
    assert [sorted(part) for part in split(lengths, micro_batch_size)] == [sorted(part) for part in packed]
    assert split(lengths, micro_batch_size, packing=False) == padded


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 12))
def test_padded_micro_batches_hold_neighbours_by_length(lengths: list[int], micro_batch_size: int) -> None:
    parts = split(lengths, micro_batch_size, packing=False)
    in_turn = [lengths[index] for part in parts for index in part]
    assert in_turn == sorted(lengths, reverse=True)


# -- batches ----------------------------------------------------------------------------------------------------------

PAD = 99
ONE = TokenizedExample((10, 11, 12, 13), (False, False, True, True), line=3)
TWO = TokenizedExample((20, 21), (True, True), line=8)
THREE = TokenizedExample((30, 31, 32), (False, True, False), line=5)


def lists(batch: Batch) -> dict[str, Any]:
    mask = batch.attention_mask
    return {
        "input_ids": batch.input_ids.tolist(),
        "labels": batch.labels.tolist(),
        "position_ids": batch.position_ids.tolist(),
        "cu_seqlens": batch.cu_seqlens.tolist(),
        "supervised": batch.supervised.tolist(),
        "attention_mask": None if mask is None else mask.tolist(),
    }


def test_labels_are_shifted_within_the_example() -> None:
    assert shifted_labels(ONE) == [-100, 12, 13, -100]
    assert shifted_labels(TWO) == [21, -100], "the first token has no prediction, the last position no target"
    assert shifted_labels(THREE) == [31, -100, -100]
    assert IGNORE_INDEX == -100


def test_packed() -> None:
    batch = make_batch([ONE, TWO, THREE], packing=True, pad_id=PAD, device="cpu")
    assert lists(batch) == {
        "input_ids": [[10, 11, 12, 13, 20, 21, 30, 31, 32]],
        "labels": [[-100, 12, 13, -100, 21, -100, 31, -100, -100]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 0, 1, 2]],
        "cu_seqlens": [0, 4, 6, 9],
        "supervised": [1, 2, 4, 6],
        "attention_mask": None,
    }
    assert (batch.num_examples, batch.num_tokens, batch.num_supervised) == (3, 9, 4)
    assert batch.lines == (3, 8, 5)


def test_padded() -> None:
    batch = make_batch([ONE, TWO, THREE], packing=False, pad_id=PAD, device="cpu")
    assert lists(batch) == {
        "input_ids": [[10, 11, 12, 13], [20, 21, PAD, PAD], [30, 31, 32, PAD]],
        "labels": [[-100, 12, 13, -100], [21, -100, -100, -100], [31, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 3]] * 3,
        "cu_seqlens": [0, 4, 6, 9],
        "supervised": [1, 2, 4, 8],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]],
    }
    assert (batch.num_examples, batch.num_tokens, batch.num_supervised) == (3, 9, 4)


@pytest.mark.parametrize("packing", [True, False])
def test_types(packing: bool) -> None:
    unsupervised = TokenizedExample((1, 2), (False, False))
    for examples in ([ONE, TWO], [unsupervised]):
        batch = make_batch(examples, packing, PAD, "cpu")
        assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
        assert batch.supervised.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        if batch.attention_mask is not None:
            assert batch.attention_mask.dtype == torch.int64


@st.composite
def examples(draw: Any) -> list[TokenizedExample]:
    made = []
    for line in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 8))
        ids = draw(st.lists(st.integers(0, 50), min_size=length, max_size=length))
        mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        made.append(TokenizedExample(tuple(ids), tuple(mask), line))
    return made


@settings(max_examples=200)
@given(examples(), st.booleans())
def test_every_supervised_token_is_the_label_of_the_position_before_it(
    rows: list[TokenizedExample], packing: bool
) -> None:
    batch = make_batch(rows, packing, PAD, "cpu")
    labels, ids = batch.labels.flatten(), batch.input_ids.flatten()
    at = (labels != IGNORE_INDEX).nonzero().flatten()
    assert batch.supervised.tolist() == at.tolist()
    assert torch.equal(labels[at], ids[at + 1]), "a label is the next token of its own row"
    wanted = Counter(t for e in rows for t, on in zip(e.input_ids[1:], e.loss_mask[1:], strict=True) if on)
    assert Counter(labels[at].tolist()) == wanted
    assert batch.num_supervised == len(at) == sum(e.supervised for e in rows)
    assert batch.num_tokens == sum(map(len, rows)) == batch.cu_seqlens[-1]
    lengths = batch.cu_seqlens.diff().tolist()
    assert lengths == [len(e) for e in rows]
    if packing:
        starts = batch.cu_seqlens[:-1].tolist()
        assert (batch.position_ids[0] == 0).nonzero().flatten().tolist() == starts
        last = [end - 1 for end in batch.cu_seqlens[1:].tolist()]
        assert labels[last].tolist() == [IGNORE_INDEX] * len(rows)
    else:
        assert batch.attention_mask is not None
        assert batch.attention_mask.sum(dim=1).tolist() == lengths
        assert batch.labels[batch.attention_mask == 0].eq(IGNORE_INDEX).all()


def documents(batch: Batch) -> list[tuple[Any, ...]]:
    """Each document of a packed batch: its line, tokens, labels and positions."""
    bounds = batch.cu_seqlens.tolist()
    tensors = (batch.input_ids, batch.labels, batch.position_ids)
    return [
        (line, *(row[0, start:end].tolist() for row in tensors))
        for start, end, line in zip(bounds[:-1], bounds[1:], batch.lines, strict=True)
    ]


@given(examples(), st.randoms(use_true_random=False))
def test_a_permutation_of_the_examples_permutes_the_documents_and_nothing_else(
    rows: list[TokenizedExample], rng: random.Random
) -> None:
    order = rng.sample(range(len(rows)), len(rows))
    before = documents(make_batch(rows, True, PAD, "cpu"))
    after = documents(make_batch([rows[index] for index in order], True, PAD, "cpu"))
    assert after == [before[index] for index in order]
    assert len(before) == len(rows)
