"""Length estimates, statistics and what padding wastes: against numbers worked out by hand or by the standard library."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from tunesmith.data.lengths import (
    candidate_lengths,
    estimate_row,
    estimate_text,
    histogram,
    length_stats,
    padding,
    recommended_max_seq_length,
    rows_longer_than,
)
from tunesmith.types import Example, Message, PreferenceExample, ToolCall


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("a" * 40, 10),
        ("안녕하세요", 4),  # five syllables, 0.8 each
        ("日本語 abcd", 3 * 0.8 + 5 / 4),
        ("привет", 3 * 0.8 + 3 / 4),  # two bytes a letter: half of them count as wide
        ("👍", 1.5 * 0.8),  # four bytes: as one and a half wide characters
    ],
)
def test_estimate_of_a_text(text: str, tokens: float) -> None:
    assert estimate_text(text) == pytest.approx(tokens)


def test_estimate_of_a_row() -> None:
    chat = (Message("user", "a" * 40), Message("assistant", "b" * 20))
    assert estimate_row(Example(chat, None, "x", 1)) == 10 + 5 + 2 * 5
    assert estimate_row(Example(None, "a" * 40, "x", 1)) == 10 + 1
    assert estimate_row(Example(None, "a", "x", 1)) == 2
    tools = ({"name": "x" * 87},)  # {'name': '...'} is 100 characters
    assert estimate_row(Example(chat, None, "x", 1, tools)) == 25 + 25
    call = Message("assistant", "", reasoning="c" * 8, tool_calls=(ToolCall("look", {"at": "it"}),))
    assert estimate_row(Example((call,), None, "x", 1)) == math.ceil(5 + 2 + 1 + len("{'at': 'it'}") / 4)


def test_estimate_of_a_pair_is_its_longer_side() -> None:
    prompt, short, long = (Message("user", "a" * 40),), (Message("assistant", "b"),), (Message("assistant", "b" * 80),)
    assert estimate_row(PreferenceExample(prompt, short, long, "x", 1)) == 10 + 20 + 10
    assert estimate_row(PreferenceExample(prompt, long, short, "x", 1)) == 10 + 20 + 10


def test_statistics_interpolate_between_ranks() -> None:
    stats = length_stats([10, 20, 30, 40])
    assert (stats.rows, stats.mean, stats.median, stats.max, stats.total) == (4, 25.0, 25.0, 40, 100)
    assert stats.p95 == pytest.approx(38.5)  # rank 0.95 * 3 = 2.85: 30 + 0.85 * 10
    assert stats.p99 == pytest.approx(39.7)
    one = length_stats([7])
    assert (one.mean, one.median, one.p95, one.p99, one.max) == (7, 7, 7, 7, 7)


def test_statistics_of_many_lengths_agree_with_the_standard_library() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 5000) for _ in range(1001)]
    stats = length_stats(lengths)
    cuts = statistics.quantiles(lengths, n=100, method="inclusive")
    assert stats.mean == pytest.approx(statistics.fmean(lengths))
    assert (stats.median, stats.p95, stats.p99) == pytest.approx((cuts[49], cuts[94], cuts[98]))


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([100] * 10, None, 128),  # 120, rounded up
        ([160] * 10, None, 192),  # exactly a multiple of 64 stays
        ([161] * 10, None, 256),
        ([1], None, 64),
        ([100] * 95 + [1000] * 5, None, 192),  # the percentile is 145
        ([1000] * 10, 1024, 1024),
        ([1000] * 10, 500, 500),  # the limit need be no multiple of 64
        ([100] * 10, 4096, 128),
    ],
)
def test_recommendation(lengths: list[int], limit: int | None, expected: int) -> None:
    assert recommended_max_seq_length(lengths, limit) == expected


def test_rows_longer_than() -> None:
    assert rows_longer_than([1, 5, 5, 9], [1, 4, 5, 9]) == {1: 3, 4: 3, 5: 1, 9: 0}
    assert candidate_lengths(100) == [256]
    assert candidate_lengths(256) == [256]
    assert candidate_lengths(1025) == [256, 512, 1024, 2048]


def test_histogram_counts_every_row_once() -> None:
    assert histogram([1, 8, 9, 12, 13, 33]) == [
        (1, 8, 2),
        (9, 12, 2),
        (13, 16, 1),
        (17, 24, 0),
        (25, 32, 0),
        (33, 48, 1),
    ]
    assert histogram([100, 120]) == [(97, 128, 2)]
    rng = random.Random(1)
    lengths = [rng.randint(1, 100_000) for _ in range(2000)]
    buckets = histogram(lengths)
    assert sum(count for _, _, count in buckets) == 2000
    for low, high, count in buckets:
        assert count == sum(low <= length <= high for length in lengths)


def test_padding_by_hand() -> None:
    # In order: (10, 2), (4, 8), (6): 2*10 + 2*8 + 6 = 42 slots for 30 tokens. Sorted within steps of three, longest first:
    # (10, 4), (2), then (8, 6): 20 + 2 + 16 = 38. Packed into 12: 10+2, 8+4, 6: three bins, 36 slots.
    waste = padding([10, 2, 4, 8, 6], micro_batch_size=2, batch_size=3, budget=12)
    assert waste.data_order == pytest.approx(12 / 42)
    assert waste.sorted == pytest.approx(8 / 38)
    assert waste.packed == pytest.approx(6 / 36)
    assert (waste.micro_batch_size, waste.batch_size, waste.budget) == (2, 3, 12)


def test_rows_over_the_budget_count_as_cut_to_it() -> None:
    assert padding([20, 10], micro_batch_size=2, batch_size=2, budget=10).packed == 0
