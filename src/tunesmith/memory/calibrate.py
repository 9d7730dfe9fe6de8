"""One dry step against the prediction: what a plan really needs on this card, and the plan again if that is another figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tunesmith.memory.policy import HEADROOM, gives_up_alike
from tunesmith.types import MemoryPlan

CLOSE = 0.05
"""A peak within this share of its prediction changes nothing, if it fits: predictions are that good."""

MAX_STEPS = 6
"""Dry steps at most. One that runs out says only that it does: three of those are not enough where the arithmetic is 2x off."""

RAN_OUT = 0.1
"""What a plan that ran out of memory is taken to need beyond its prediction, and beyond what plans may fill, as a share of
the budget."""


class Planned(Protocol):
    """A plan of memory that can be made again for another peak."""

    @property
    def memory(self) -> MemoryPlan:
        """The plan."""

    def corrected(self, measured_gb: float) -> Planned:
        """The plan again, where `measured_gb` was found and another peak predicted."""


Plan = TypeVar("Plan", bound=Planned)


@dataclass(frozen=True, slots=True)
class Measured:
    """A dry step: the predicted and the measured peak in GB (None: it ran out of memory)."""

    predicted_gb: float
    measured_gb: float | None


def calibrate(
    plan: Plan, measure: Callable[[Plan], float | None], corrected: Callable[[Plan, float], Plan]
) -> tuple[Plan, list[Measured]]:
    """Take dry steps until the plan fits and uses what there is; returns it, and what was measured.

    `measure` runs one forward and backward as the plan says and returns its peak in GB, or None if it ran out of memory.
    `corrected` is the plan again for that peak. Where the last plan was not tried, the last one that was seen to fit is taken.
    """
    found: list[Measured] = []
    good: Plan | None = None
    for _ in range(MAX_STEPS):
        predicted, budget = plan.memory.predicted_peak_gb, plan.memory.budget_gb
        if predicted is None or budget is None:
            break
        peak = measure(plan)
        found.append(Measured(predicted, peak))
        if peak is not None and peak + plan.memory.pool_gb <= HEADROOM * budget:
            good = plan
            if abs(peak - predicted) <= CLOSE * predicted:
                break
        other = corrected(plan, max(predicted, HEADROOM * budget) + RAN_OUT * budget if peak is None else peak)
        if gives_up_alike(other.memory, plan.memory):
            if other.memory.pool_gb < plan.memory.pool_gb:
                plan = other
            break
        plan = other
    else:
        plan = good or plan
    return plan, found
