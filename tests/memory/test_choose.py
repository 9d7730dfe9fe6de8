"""Which micro-batch is taken: by hand for choices made up, and for real shapes as memory shrinks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.cards import Card, find_card
from tunesmith.memory.choose import (
    WORTH,
    Candidate,
    Choice,
    best,
    even_sizes,
    graphs_may_gain,
    options,
    step_seconds,
)
from tunesmith.memory.estimate import Estimate, Load, Setup
from tunesmith.memory.policy import HEADROOM, Mode, plan_memory
from tunesmith.memory.replays import PAYS_FROM
from tunesmith.memory.shape import ModelShape
from tunesmith.memory.speed import launching_seconds, micro_batch_seconds, optimizer_seconds
from tunesmith.types import LayerPolicy, MemoryPlan
from tunesmith.workflows.bench import SHAPES

# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(1, [1]), (2, [1, 2]), (7, [1, 2, 3, 4, 7]), (16, [1, 2, 3, 4, 6, 8, 16]), (12, [1, 2, 3, 4, 6, 12])],
)
def test_even_sizes(batch: int, sizes: list[int]) -> None:
    assert even_sizes(batch) == sizes


@given(st.integers(1, 500))
def test_no_other_size_divides_a_step_more_evenly(batch: int) -> None:
    """Each is the smallest of those that make as many micro-batches: no padding is bought with it."""
    sizes = even_sizes(batch)
    assert sizes[0] == 1
    assert sizes[-1] == batch
    counts = {math.ceil(batch / size) for size in range(1, batch + 1)}
    assert [math.ceil(batch / size) for size in sizes] == sorted(counts, reverse=True)
    assert all(size == 1 or math.ceil(batch / (size - 1)) > math.ceil(batch / size) for size in sizes)


# -- the best of some -------------------------------------------------------------------------------------------------


def choice(
    size: int, peak: float, seconds: float | None = None, recompute: int = 0, pool: float | None = None
) -> Choice:
    """With a pool CUDA graphs replay it."""
    plan = MemoryPlan("auto", recompute, 24, 10.0, peak, "made up", pool_gb=pool or 0.0)
    return Choice(
        Candidate(size, 16 // size, Load(size, size, 1), Load(size, size, 1), 16), plan, seconds, pool is not None
    )


@pytest.mark.parametrize(
    ("found", "size"),
    [
        ([choice(1, 3.0, 1.0), choice(2, 5.0, 0.9), choice(4, 8.0, 0.8)], 4),
        ([choice(1, 3.0, 1.0), choice(2, 5.0, 0.7), choice(4, 8.0, 0.8)], 2),
        ([choice(1, 3.0, 1.0), choice(2, 5.0, 0.9), choice(4, 9.5, 0.1)], 2),  # 9.5 of 10 is more than 90%
        ([choice(1, 3.0, 1.0), choice(2, 9.0, 0.9)], 2),  # 90% itself fits
        ([choice(1, 3.0, 1.0), choice(2, 5.0, 0.996)], 1),  # 0.4% is not worth 2 GB
        ([choice(1, 3.0, 1.0), choice(2, 5.0, 0.994)], 2),
        # Of many small steps the sum counts: each is compared with the one that would be taken.
        ([choice(1, 3.0, 1.0), choice(2, 4.0, 0.996), choice(4, 5.0, 0.993)], 4),
        ([choice(1, 3.0, 1.0), choice(2, 5.0, 0.9, pool=4.0), choice(4, 5.0, 0.1, pool=4.1)], 2),  # the pool counts
        ([choice(1, 9.5, 0.1), choice(2, 5.0, 2.0), choice(4, 8.0, 1.0)], 4),  # the smallest need not fit
    ],
)
@pytest.mark.parametrize("mode", ["auto", "fast"])
def test_the_least_time_of_those_that_fit(found: list[Choice], size: int, mode: Mode) -> None:
    assert best(found, mode).candidate.size == size


def test_what_a_larger_micro_batch_must_be_worth() -> None:
    assert WORTH == 0.995
    at = [choice(1, 3.0, 1.0), choice(2, 5.0, WORTH)]
    assert best(at, "auto").candidate.size == 1


@pytest.mark.parametrize(
    ("found", "size"),
    [
        ([choice(1, 3.0), choice(2, 5.0), choice(4, 8.0)], 4),
        ([choice(1, 3.0), choice(2, 5.0), choice(4, 8.0, recompute=1)], 2),  # it keeps less
        ([choice(1, 3.0, recompute=9), choice(2, 5.0, recompute=9), choice(4, 8.0, recompute=12)], 2),
        ([choice(1, 3.0), choice(2, 9.5), choice(4, 8.0)], 4),
        ([choice(1, 3.0, 1.0), choice(2, 5.0, None)], 2),  # one time alone says nothing
    ],
)
def test_without_times_the_largest_that_keeps_as_much_as_any(found: list[Choice], size: int) -> None:
    assert best(found, "auto").candidate.size == size


@pytest.mark.parametrize("mode", ["auto", "min", "fast"])
def test_where_none_fits_the_one_that_needs_least(mode: Mode) -> None:
    found = [choice(1, 12.0, 2.0), choice(2, 11.0, 3.0), choice(4, 13.0, 1.0)]
    assert not any(one.fits for one in found)
    assert best(found, mode).candidate.size == 2


def test_min_is_the_least_memory_whatever_the_time() -> None:
    assert best([choice(1, 3.0, 9.0), choice(2, 2.5, 99.0), choice(4, 8.0, 1.0)], "min").candidate.size == 2
    assert best([choice(1, 3.0), choice(2, 3.0)], "min").candidate.size == 2, "of equals the fewest micro-batches"
    assert best([choice(1, 3.0, 2.0), choice(2, 3.0, 1.0)], "min").candidate.size == 2, "or the fastest"


def test_min_takes_graphs_where_they_fit() -> None:
    plain, graphed = choice(1, 3.0), choice(1, 3.0, pool=2.0)
    assert best([plain, graphed], "min") is graphed
    larger = choice(2, 4.0, pool=5.0)
    assert best([plain, choice(2, 2.5), larger], "min") is larger, "9 of 10 fit; without graphs 2.5 would do"
    assert best([plain, choice(1, 3.0, pool=6.1)], "min") is plain
    assert best([choice(1, 12.0), choice(1, 11.0, pool=9.0)], "min").graphs is False, "none fits"
    slow, equal = choice(1, 3.0, 1.1, pool=2.0), choice(1, 3.0, 1.0, pool=2.0)
    assert best([choice(1, 3.0, 1.0), slow], "min").graphs is False, "widening costs more than they save"
    assert best([choice(1, 3.0, 1.0), equal], "min") is equal


def test_without_a_prediction_everything_fits() -> None:
    plan = MemoryPlan("auto", 0, 24, 10.0, None, "made up")
    one = Choice(Candidate(1, 1, Load(1, 1, 1), Load(1, 1, 1), 1), plan, None)
    assert one.fits
    assert best([one], "min") is one


def test_tokens_per_second() -> None:
    load = Load(1000, 1000, 100)
    plan = MemoryPlan("auto", 0, 24, 10.0, 5.0, "made up")
    found = Choice(Candidate(4, 3, Load(9999, 1, 1), load, 2400), plan, 1.5)
    assert found.tokens_per_second == 1600.0, "2400 / 1.5: of the 3 · 1000 some are padding"
    assert Choice(Candidate(4, 3, load, load, 2400), plan, None).tokens_per_second is None


# -- real shapes ------------------------------------------------------------------------------------------------------

BUDGETS = (120, 80, 60, 40, 30, 24, 20, 16, 14, 12, 10, 9, 8, 7, 6, 5, 4, 3.5, 3, 2.5)
H100 = find_card("H100")
CANDIDATES = [
    Candidate(
        size,
        math.ceil(16 / size),
        Load(size * 1024, size * 1024, 1024, size < 16),
        Load(size * 900, size * 300, 900, size < 16),
        math.ceil(16 / size) * size * 900,
    )
    for size in even_sizes(16)
]


def made(
    name: str,
    engine: Any,
    budget: float | None,
    mode: Mode = "auto",
    card: Card | None = H100,
    graphs: bool = False,
    host: float = 1.0,
) -> list[Choice]:
    setup = Setup("qlora", engine, optimizer="adamw_8bit", scheme="nf4")
    return list(options(ModelShape.of(SHAPES[name]), setup, CANDIDATES, mode, budget, card, graphs=graphs, host=host))


@pytest.mark.parametrize(("graphs", "host"), [(True, 1.0), (False, 1.0), (False, 3.0)])
def test_each_option_is_planned_for_its_largest_and_timed_for_its_typical_micro_batch(
    graphs: bool, host: float
) -> None:
    shape, setup = ModelShape.of(SHAPES["qwen2.5-3b"]), Setup("qlora", "fused", optimizer="adamw_8bit", scheme="nf4")
    found = made("qwen2.5-3b", "fused", 12.0, graphs=graphs, host=host)
    assert [one.candidate for one in found] == CANDIDATES
    for one in found:
        assert one.graphs == graphs
        assert one.plan == plan_memory(Estimate(shape, setup, one.candidate.largest), "auto", 12.0, graphs=graphs)
        once = micro_batch_seconds(
            shape, setup, one.candidate.typical, H100, one.plan.policies, graphs=graphs, host=host
        )
        expected = one.candidate.count * once + optimizer_seconds(shape, setup, H100, host)
        assert one.step_seconds == expected == step_seconds(shape, setup, one.candidate, one.plan, H100, graphs, host)
        assert one.tokens_per_second == one.candidate.count * one.candidate.size * 900 / expected
    assert all(one.step_seconds is None for one in made("qwen2.5-3b", "fused", 12.0, card=None, graphs=graphs))


def test_what_graphs_do_not_replay_is_launched_and_then_run() -> None:
    """A quarter replayed, three quarters captured; without graphs the share does not matter."""
    shape, setup = ModelShape.of(SHAPES["smollm2-135m"]), Setup("lora", "fused")
    candidate = Candidate(1, 4, Load(64, 64, 64), Load(64, 64, 64), 256)
    (plan,) = (one.plan for one in options(shape, setup, [candidate], "auto", None, H100, graphs=True))

    def seconds(replayed: float, graphs: bool) -> float:
        return step_seconds(shape, setup, replace(candidate, replayed=replayed), plan, H100, graphs, host=2.0)

    launched, graphed = seconds(1.0, False), seconds(1.0, True)
    assert graphed < launched / 3
    launching = launching_seconds(shape, setup, plan.policies, host=2.0)
    assert launched == pytest.approx(4 * launching + optimizer_seconds(shape, setup, H100, 2.0)), "it takes longer"
    assert seconds(0.25, True) == pytest.approx(graphed + 0.75 * 4 * launching)
    assert seconds(0.0, True) == pytest.approx(graphed + 4 * launching)
    assert seconds(0.25, False) == launched


def test_small_micro_batches_wait_for_python_though_the_mean_does_not() -> None:
    """Half of a step's four micro-batches are a tenth as long as the other half. Steps differ: 4.5 micro-batches are the mean."""
    shape, setup = ModelShape.of(SHAPES["qwen2.5-3b"]), Setup("lora", "fused")
    load = Load(8192, 8192, 1024)
    spread = (0.2, 1.8)
    even = Candidate(1, 4, load, load, 4 * 8192)
    uneven = replace(even, runs=4.5, spread=spread)
    (plan,) = (one.plan for one in options(shape, setup, [even], "fast", None, H100, graphs=False))
    optimizer = optimizer_seconds(shape, setup, H100, 2.0)

    def running(tokens: int) -> float:
        supervised = tokens if tokens == 1 else 8192
        return micro_batch_seconds(
            shape, setup, replace(load, tokens=tokens, supervised=supervised), H100, plan.policies, graphs=True
        )

    few, mean = running(1), running(8192)
    launching = launching_seconds(shape, setup, plan.policies, host=2.0)
    assert few + 0.2 * (mean - few) < launching < mean
    assert step_seconds(shape, setup, even, plan, H100, False, 2.0) == pytest.approx(4 * mean + optimizer)
    once = (launching + few + 1.8 * (mean - few)) / 2
    assert step_seconds(shape, setup, uneven, plan, H100, False, 2.0) == pytest.approx(4.5 * once + optimizer)
    assert step_seconds(shape, setup, uneven, plan, H100, True, 2.0) == pytest.approx(4.5 * mean + optimizer)
    once = launching_seconds(shape, setup, plan.policies)
    for runs, gains in ((1.0, False), (9.0, True)):  # the same time of a step, of so many micro-batches
        seconds = 4 * once / PAYS_FROM + optimizer_seconds(shape, setup, H100)
        choice = Choice(replace(uneven, runs=runs), plan, seconds)
        assert graphs_may_gain(choice, shape, setup, H100) == gains


def test_graphs_are_looked_at_where_training_would_capture_them() -> None:
    """From 40% of launching on, where there is room at all."""
    shape, setup = ModelShape.of(SHAPES["qwen2.5-3b"]), Setup("qlora", "fused", scheme="nf4")

    def gains(tokens: int, host: float = 1.0, budget: float | None = None, card: Card | None = H100) -> bool:
        load = Load(tokens, tokens, 1024)
        (plain,) = options(
            shape, setup, [Candidate(1, 4, load, load, 4 * tokens)], "fast", budget, card, graphs=False, host=host
        )
        return graphs_may_gain(plain, shape, setup, card, host)

    launching = launching_seconds(shape, setup, [LayerPolicy()] * 36)
    computing = micro_batch_seconds(shape, setup, Load(8192, 8192, 1024), H100, graphs=True)
    assert launching < computing
    edge = PAYS_FROM * computing / launching
    assert [gains(8192, 0.99 * edge), gains(8192, 1.01 * edge), gains(64)] == [False, True, True]
    assert [gains(64, budget=1.0), gains(64, card=None), gains(64, budget=1.0, card=None)] == [False, True, False]


def test_options_take_a_loaded_models_numbers_and_what_graphs_save() -> None:
    shape, setup = ModelShape.of(SHAPES["smollm2-135m"]), Setup("lora", "fused")
    candidate = Candidate(1, 1, Load(64, 64, 64, False), Load(64, 64, 64, False), 64)
    (plain,) = options(shape, setup, [candidate], "auto", 10.0, H100, graphs=True)
    (loaded,) = options(shape, setup, [candidate], "auto", 10.0, H100, graphs=False, weights_gb=3.0, trainable=10**6)
    assert loaded.plan.breakdown["weights_gb"] == 3.0
    assert loaded.plan.breakdown["optimizer_gb"] == 8e6 / 2**30
    assert plain.step_seconds is not None
    assert loaded.step_seconds is not None
    assert loaded.step_seconds > 3 * plain.step_seconds, "few tokens: launching decides"


@pytest.mark.parametrize("card", [H100, None])
@pytest.mark.parametrize(("engine", "graphs"), [("fused", True), ("fused", False), ("reference", False)])
@pytest.mark.parametrize("name", ["qwen2.5-3b", "llama-3.1-8b"])
def test_a_choice_is_within_its_share_of_the_budget_unless_nothing_is(
    name: str, engine: str, graphs: bool, card: Card | None
) -> None:
    for budget in BUDGETS:
        found = made(name, engine, budget, card=card)
        if graphs:
            found += made(name, engine, budget, card=card, graphs=True)
        chosen = best(found, "auto")
        peak = chosen.plan.predicted_peak_gb
        assert peak is not None
        if peak + chosen.plan.pool_gb > HEADROOM * budget:
            least = [one.plan.predicted_peak_gb or 0.0 for one in found]
            assert peak == min(least) > HEADROOM * budget


@pytest.mark.parametrize(("engine", "graphs"), [("fused", True), ("fused", False), ("reference", False)])
@pytest.mark.parametrize("name", ["qwen2.5-3b", "llama-3.1-8b"])
def test_as_memory_shrinks_each_micro_batch_keeps_less(name: str, engine: str, graphs: bool) -> None:
    plans = [[one.plan.recompute_layers for one in made(name, engine, budget, graphs=graphs)] for budget in BUDGETS]
    for column in zip(*plans, strict=True):
        assert list(column) == sorted(column)
    for row in plans:
        assert row == sorted(row), "a larger micro-batch keeps no more"
    assert plans[0] == [0] * len(CANDIDATES)
    num_layers = ModelShape.of(SHAPES[name]).num_layers
    assert plans[-1] == [num_layers] * len(CANDIDATES)


@pytest.mark.parametrize("engine", ["fused", "reference"])
@pytest.mark.parametrize("name", ["qwen2.5-3b", "llama-3.1-8b"])
def test_as_memory_shrinks_a_step_takes_longer(name: str, engine: str) -> None:
    """The micro-batch shrinks first, until everything may have to be recomputed: then a large one is the faster one again.

    What a choice is worth is told to 0.5%, so that a step may be that much shorter than with more memory.
    """
    host = 0.0 if engine == "fused" else 1.0  # as fast as graphs, but without their pool
    chosen = [best(made(name, engine, budget, host=host), "auto") for budget in BUDGETS]
    fitting = [one for one in chosen if one.fits]
    assert len(fitting) >= 12
    slowest = 0.0
    for one in fitting:
        assert one.step_seconds is not None
        assert one.step_seconds > WORTH * slowest
        slowest = max(slowest, one.step_seconds)
    first = fitting[0].step_seconds
    assert first is not None
    assert slowest > 1.5 * first


def test_a_smaller_micro_batch_is_preferred_to_computing_again() -> None:
    """Qwen2.5-3B, fused: sizes and recomputed layers as memory shrinks, until little can be kept of four examples.

    Launching takes no time here: where it does, large micro-batches are worth more.
    """
    budgets = [budget for budget in BUDGETS if budget >= 9]
    chosen = [best(made("qwen2.5-3b", "fused", budget, host=0.0), "auto") for budget in budgets]
    sizes = [one.candidate.size for one in chosen]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 16
    assert sizes[-1] == 4
    for size in set(sizes):
        recomputed = [one.plan.recompute_layers for one in chosen if one.candidate.size == size]
        assert recomputed == sorted(recomputed)
    tight = best(made("qwen2.5-3b", "fused", 8.0, host=0.0), "auto")
    assert (tight.candidate.size, tight.plan.recompute_layers) == (16, 36), "then all of it is recomputed at once"


def test_no_choice_is_much_slower_than_another_that_fits() -> None:
    for budget in BUDGETS:
        found = made("llama-3.1-8b", "fused", budget) + made("llama-3.1-8b", "fused", budget, graphs=True)
        chosen = best(found, "auto")
        if chosen.fits:
            assert chosen.step_seconds is not None
            assert all(
                one.step_seconds >= WORTH * chosen.step_seconds for one in found if one.fits and one.step_seconds
            )


def test_min_takes_the_smallest_micro_batch() -> None:
    for engine in ("fused", "reference"):
        assert best(made("qwen2.5-3b", engine, 80.0, "min"), "min").candidate.size == 1


def test_fast_keeps_everything_of_as_much_as_fits() -> None:
    chosen = best(made("qwen2.5-3b", "fused", 16.0, "fast", graphs=False), "fast")
    assert (chosen.candidate.size, chosen.plan.recompute_layers, chosen.fits) == (4, 0, True)
