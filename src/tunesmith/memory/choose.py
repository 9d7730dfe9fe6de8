"""Which micro-batch, with which plan: the least time for a step within the memory there is. Imports no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tunesmith.cards import Card
from tunesmith.memory.estimate import Estimate, Load, Setup
from tunesmith.memory.policy import Mode, fits, plan_memory
from tunesmith.memory.replays import PAYS_FROM
from tunesmith.memory.shape import ModelShape
from tunesmith.memory.speed import launching_seconds, micro_batch_seconds, optimizer_seconds
from tunesmith.types import MemoryPlan

WORTH = 0.995
"""A larger micro-batch must take less than this share of a smaller one's time: memory is not spent on nothing."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to divide a step. `size` is in examples or in tokens (`unit`), `count` the micro-batches of a step.

    `largest` is the load that memory is planned for, `typical` the mean one, for time: both with the padding that is computed.
    `tokens` are those of a step without it. `replayed` is the share of a run's micro-batches that CUDA graphs replay, if there
    are any (replays.py). `packed` says whether its examples lie end to end. `runs` is the mean number of micro-batches, where
    steps differ (None: `count`), and `spread` how these differ in size (typical.py).
    """

    size: int
    count: int
    largest: Load
    typical: Load
    tokens: float
    unit: Literal["examples", "tokens"] = "examples"
    replayed: float = 1.0
    packed: bool = False
    runs: float | None = None
    spread: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate with its plan. `step_seconds` is predicted, None without a known card. `graphs` says whether CUDA graphs
    may replay its micro-batches.
    """

    candidate: Candidate
    plan: MemoryPlan
    step_seconds: float | None
    graphs: bool = False

    @property
    def fits(self) -> bool:
        """Whether the plan is within its budget."""
        return fits(self.plan)

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted tokens a second, padding not counted."""
        return None if self.step_seconds is None else self.candidate.tokens / self.step_seconds


def even_sizes(batch_size: int) -> list[int]:
    """Micro-batch sizes that divide a step most evenly: ⌈batch / k⌉ examples for each number k of micro-batches."""
    return sorted({math.ceil(batch_size / count) for count in range(1, batch_size + 1)})


def options(
    shape: ModelShape,
    setup: Setup,
    candidates: Sequence[Candidate],
    mode: Mode,
    budget_gb: float | None,
    card: Card | None,
    *,
    graphs: bool,
    host: float = 1.0,
    weights_gb: float | None = None,
    trainable: int | None = None,
) -> Iterator[Choice]:
    """Each candidate with its plan and, on a known card, its time. `host` is speed.py's."""
    for candidate in candidates:
        estimate = Estimate(shape, setup, candidate.largest, weights_gb, trainable)
        plan = plan_memory(estimate, mode, budget_gb, graphs=graphs)
        seconds = None if card is None else step_seconds(shape, setup, candidate, plan, card, graphs, host)
        yield Choice(candidate, plan, seconds, graphs)


def step_seconds(
    shape: ModelShape,
    setup: Setup,
    candidate: Candidate,
    plan: MemoryPlan,
    card: Card,
    graphs: bool,
    host: float = 1.0,
) -> float:
    """Predicted seconds of an optimizer step."""

    layers = plan.recompute_layers

    def running(load: Load) -> float:
        return micro_batch_seconds(shape, setup, load, card, plan.policies, layers, True, host)

    launching = launching_seconds(shape, setup, plan.policies, layers, host)
    one = running(candidate.typical)
    if graphs:
        one += (1 - candidate.replayed) * launching  # captured: launched, and run after that
    elif launching > min(candidate.spread) * one:
        # The smaller ones wait for Python, though the mean may not. Their time grows with their tokens from that of few.
        few = running(replace(candidate.typical, tokens=1, supervised=1))
        times = [max(launching, few + share * (one - few)) for share in candidate.spread]
        one = sum(times) / len(times)
    return (candidate.runs or candidate.count) * one + optimizer_seconds(shape, setup, card, host)


def graphs_may_gain(plain: Choice, shape: ModelShape, setup: Setup, card: Card | None, host: float = 1.0) -> bool:
    """Whether replaying the micro-batches of a choice without CUDA graphs may be worth it: there is room at all, and launching
    takes so long that training captures them.
    """
    if not plain.fits or card is None or plain.step_seconds is None:
        return plain.fits
    runs = plain.candidate.runs or plain.candidate.count
    whole = (plain.step_seconds - optimizer_seconds(shape, setup, card, host)) / runs
    launching = launching_seconds(shape, setup, plain.plan.policies, plain.plan.recompute_layers, host)
    return launching > PAYS_FROM * whole


def best(found: Sequence[Choice], mode: Mode) -> Choice:
    """The best of at least one choice, the smallest first in `found`.

    `min`: the least memory, with CUDA graphs where they fit beside it and cost no time. Else, of those that fit, the least time;
    without a known card, the largest that keeps as much as any. If none fits, the one that needs the least.
    """
    fitting = [choice for choice in found if choice.fits]
    if mode == "min" or not fitting:
        return _least(
            [choice for choice in fitting if choice.graphs], [choice for choice in found if not choice.graphs]
        )
    chosen = fitting[0]
    for choice in fitting[1:]:
        if choice.step_seconds is None or chosen.step_seconds is None:
            better = choice.plan.recompute_layers <= chosen.plan.recompute_layers
        else:
            better = choice.step_seconds < WORTH * chosen.step_seconds
        if better:
            chosen = choice
    return chosen


def _least(graphed: Sequence[Choice], plain: Sequence[Choice]) -> Choice:
    """The choice that needs the least memory, the fastest of equals, or that with the fewest micro-batches: with graphs, if there are any and they are not known to
    cost time.
    """

    def least(choices: Sequence[Choice]) -> Choice:
        def rank(choice: Choice) -> tuple[float, float, int]:
            return choice.plan.predicted_peak_gb or 0.0, choice.step_seconds or 0.0, choice.candidate.count

        return min(choices, key=rank)

    if not graphed or not plain:
        return least(graphed or plain)
    one, other = least(graphed), least(plain)
    if one.step_seconds is None or other.step_seconds is None:
        return one
    return one if one.step_seconds <= other.step_seconds / WORTH else other
