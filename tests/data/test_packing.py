"""Best-fit-decreasing packing: what a bin holds, how many there are, and how full they get."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.packing import best_fit, fill

BUDGET = 100
LENGTHS = st.lists(st.integers(1, BUDGET), max_size=80)


def loads(lengths: list[int], bins: list[list[int]]) -> list[int]:
    return [sum(lengths[index] for index in part) for part in bins]


def contents(lengths: list[int], bins: list[list[int]]) -> Counter[tuple[int, ...]]:
    """The bins as multisets of lengths."""
    return Counter(tuple(sorted(lengths[index] for index in part)) for part in bins)


def one_by_one(lengths: list[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing as the textbook has it: each document on its own, every bin looked at. O(n²)."""
    bins: list[list[int]] = []
    load: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number in range(len(bins)) if load[number] + length <= budget]
        if fitting:
            chosen = max(fitting, key=lambda number: load[number])
        else:
            chosen = len(bins)
            bins.append([])
            load.append(0)
        bins[chosen].append(length)
        load[chosen] += length
    return bins


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 10, []),
        ([10], 10, [[0]]),
        ([3, 7, 5, 5], 10, [[1, 0], [2, 3]]),
        ([6, 7, 4, 3], 10, [[1, 3], [0, 2]]),  # 3 goes to 7 and 4 to 6: first-fit would do the same
        ([5, 6, 4, 5], 10, [[1, 2], [0, 3]]),
        ([2] * 7, 5, [[0, 1], [2, 3], [4, 5], [6]]),
        ([7, 5, 4, 1], 10, [[0], [1, 2, 3]]),  # 1 goes where it leaves the least room; first-fit would put it to 7
    ],
)
def test_bins(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    assert sorted(map(sorted, best_fit(lengths, budget))) == sorted(map(sorted, expected))


@settings(max_examples=300)
@given(LENGTHS)
def test_it_is_best_fit_decreasing(lengths: list[int]) -> None:
    bins = best_fit(lengths, BUDGET)
    assert len(bins) == len(one_by_one(lengths, BUDGET))
    assert sorted(loads(lengths, bins)) == sorted(map(sum, one_by_one(lengths, BUDGET)))


@settings(max_examples=300)
@given(LENGTHS, st.randoms(use_true_random=False))
def test_every_document_once_and_no_bin_over_the_budget(lengths: list[int], rng: random.Random) -> None:
    for bins in (best_fit(lengths, BUDGET), best_fit(lengths, BUDGET, rng)):
        assert sorted(index for part in bins for index in part) == list(range(len(lengths)))
        assert all(0 < load <= BUDGET for load in loads(lengths, bins))
        # No two bins could be one: with it, fewer than twice the fewest bins, which is the bound of first-fit.
        two_emptiest = sorted(loads(lengths, bins))[:2]
        assert len(bins) < 2 or sum(two_emptiest) > BUDGET
        assert len(bins) <= max(1, -(-2 * sum(lengths) // BUDGET)) or not lengths


@given(st.lists(st.integers(1, 12), max_size=8))
def test_close_to_the_fewest_bins(lengths: list[int]) -> None:
    budget = 12

    def fewest(left: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not left:
            return len(rooms)
        first, rest = left[0], left[1:]
        tried = [fewest(rest, (*rooms, budget - first))]
        for number, room in enumerate(rooms):
            if room >= first:
                tried.append(fewest(rest, (*rooms[:number], room - first, *rooms[number + 1 :])))
        return min(tried)

    assert len(best_fit(lengths, budget)) <= 11 / 9 * fewest(tuple(sorted(lengths)), ()) + 6 / 9


@settings(max_examples=200)
@given(LENGTHS, st.randoms(use_true_random=False))
def test_the_order_of_the_documents_changes_no_bin(lengths: list[int], rng: random.Random) -> None:
    shuffled = rng.sample(lengths, len(lengths))
    expected = contents(lengths, best_fit(lengths, BUDGET))
    assert contents(shuffled, best_fit(shuffled, BUDGET)) == expected
    assert contents(shuffled, best_fit(shuffled, BUDGET, rng)) == expected


def test_ties_are_broken_at_random_when_asked() -> None:
    lengths = [30, 70] * 20
    assert best_fit(lengths, BUDGET) == best_fit(lengths, BUDGET)
    assert best_fit(lengths, BUDGET, random.Random(1)) == best_fit(lengths, BUDGET, random.Random(1))
    pairs = [
        frozenset(map(frozenset, bins))
        for bins in (best_fit(lengths, BUDGET), *(best_fit(lengths, BUDGET, random.Random(s)) for s in range(5)))
    ]
    assert len(set(pairs)) == 6, "each generator lets other documents meet"
    assert all(len(pack) == 2 for bins in pairs for pack in bins)


def test_ties_of_a_seed_never_change() -> None:
    # A resume under another version must go on with the same packs.
    assert best_fit([3, 7, 3, 7, 3], 10, random.Random("3407/1")) == [[1, 0], [3, 2], [4]]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 11, 4], "document 1 has 11 tokens; a bin holds 1 to 10"),
        ([5, 0], "document 1 has 0 tokens; a bin holds 1 to 10"),
    ],
)
def test_a_document_that_fits_no_bin_is_refused(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        best_fit(lengths, 10)


def test_fill() -> None:
    lengths = [10, 9, 8, 2]
    assert fill(lengths, [[0], [1], [2]], 10) == pytest.approx(0.95), "the emptiest of the three is left out"
    assert fill(lengths, [[2, 3], [1]], 10) == 1.0
    assert fill(lengths, [[3]], 10) == 1.0
    assert fill(lengths, [], 10) == 1.0


CHAT_FILES = (
    "chat/fastchat_identity_sharegpt.jsonl",
    "chat/openassistant_seed_messages.jsonl",
    "chat/sgd_train_messages.jsonl",
    "chat/sgd_dev_messages.jsonl",
    "banking77/train_10shot_chat.jsonl",
    "banking77/ten_class_train_chat.jsonl",
    "banking77/ten_class_test_chat.jsonl",
)


def chat_lengths(shared_data: Path) -> list[int]:
    """Bytes of the turns of each conversation, as a byte-level tokenizer would count, with ten for each turn's frame."""
    lengths = []
    for name in CHAT_FILES:
        for line in (shared_data / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            turns = [turn["value"] for turn in row["conversations"]] if "conversations" in row else None
            turns = turns or [turn["content"] for turn in row["messages"]]
            lengths.append(sum(10 + len(turn.encode()) for turn in turns))
    return lengths


def test_real_chats_fill_the_bins(shared_data: Path) -> None:
    budget = 8192
    lengths = chat_lengths(shared_data)
    assert len(lengths) == 3796
    bins = best_fit(lengths, budget)
    assert fill(lengths, bins, budget) >= 0.98
    assert len(bins) <= -(-sum(lengths) // budget) + 1
    shuffled = random.Random(0).sample(lengths, len(lengths))
    again = best_fit(shuffled, budget, random.Random(1))
    assert (len(again), fill(shuffled, again, budget)) == (len(bins), fill(lengths, bins, budget))


def test_speed() -> None:
    rng = random.Random(0)
    lengths = [min(8192, 8 + int(rng.lognormvariate(5.3, 0.9))) for _ in range(50_000)]
    began = time.process_time()
    bins = best_fit(lengths, 8192, rng)
    assert time.process_time() - began < 2, "0.05 s on an idle core"
    assert fill(lengths, bins, 8192) > 0.999
