"""Dry steps against the prediction, with plans and measurements made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from tunesmith.memory import calibrate as module
from tunesmith.memory.calibrate import MAX_STEPS, RAN_OUT, Measured, calibrate
from tunesmith.memory.estimate import Estimate, Load, Setup
from tunesmith.memory.policy import HEADROOM, fits, plan_memory
from tunesmith.memory.shape import ModelShape
from tunesmith.types import MemoryPlan

SHAPE = ModelShape.of(
    {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32768,
    }
)


@dataclass(frozen=True)
class Plan:
    """A real plan of memory; a layer that is given up saves 0.18 GB."""

    memory: MemoryPlan
    estimate: Estimate
    correction_gb: float = 0.0

    def corrected(self, measured_gb: float) -> Plan:
        """As RunPlan does."""
        assert self.memory.predicted_peak_gb is not None
        correction = self.correction_gb + measured_gb - self.memory.predicted_peak_gb
        return made(self.estimate, self.memory.budget_gb, correction)


def made(estimate: Estimate, budget: float | None, correction: float = 0.0) -> Plan:
    return Plan(plan_memory(estimate, "auto", budget, correction), estimate, correction)


def start(budget: float | None = 4.0, engine: str = "reference") -> Plan:
    setup = Setup("lora", "fused" if engine == "fused" else "reference")
    return made(Estimate(SHAPE, setup, Load(4096, 4096, 4096), weights_gb=1.0), budget)


def predicted(plan: Plan) -> float:
    assert plan.memory.predicted_peak_gb is not None
    return plan.memory.predicted_peak_gb


class Card:
    """Measures what is really needed, if that is there: `factor` times the arithmetic and `more_gb`. Remembers the plans."""

    def __init__(self, factor: float = 1.0, more_gb: float = 0.0, memory_gb: float = 1e9):
        self.factor, self.more_gb, self.memory_gb = factor, more_gb, memory_gb
        self.plans: list[Plan] = []

    def measure(self, plan: Plan) -> float | None:
        self.plans.append(plan)
        needed = self.factor * (predicted(plan) - plan.correction_gb) + self.more_gb
        return needed if needed <= self.memory_gb else None


def run(plan: Plan, card: Card) -> tuple[Plan, list[Measured]]:
    return calibrate(plan, card.measure, Plan.corrected)


def layers(plans: Sequence[Plan]) -> list[int]:
    return [plan.memory.recompute_layers for plan in plans]


@pytest.mark.parametrize("factor", [1.0, 0.951, 1.0001])
def test_a_prediction_that_is_close_takes_one_step(factor: float) -> None:
    plan, card = start(5.0), Card(factor)
    room = HEADROOM * 5.0
    assert 0.95 * room < predicted(plan) < room / 1.0001
    found, measured = run(plan, card)
    assert found is plan
    assert measured == [Measured(predicted(plan), pytest.approx(factor * predicted(plan)))]
    assert len(card.plans) == 1


def test_a_peak_that_is_close_but_does_not_fit_is_planned_again() -> None:
    """4% above a prediction that fills the room: what there is must do."""
    plan, card = start(), Card(1.04)
    found, measured = run(plan, card)
    assert len(measured) == 2
    assert layers([plan]) < layers([found])
    last = measured[-1].measured_gb
    assert last is not None
    assert last <= HEADROOM * 4.0
    assert fits(found.memory)


def test_a_step_that_needs_more_than_was_said_gives_up_more() -> None:
    plan, card = start(), Card(more_gb=0.6)
    found, measured = run(plan, card)
    assert [one.measured_gb for one in measured] == [
        pytest.approx(predicted(plan) + 0.6),
        pytest.approx(predicted(found)),  # with what was learned the prediction is exact
    ]
    assert found.correction_gb == pytest.approx(0.6)
    assert found.memory.recompute_layers == made(plan.estimate, 4.0, 0.6).memory.recompute_layers
    assert found.memory.recompute_layers > plan.memory.recompute_layers


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_step_that_needs_much_less_keeps_more(engine: str) -> None:
    plan, card = start(engine=engine), Card(more_gb=-0.8)
    found, measured = run(plan, card)
    assert len(measured) == 2
    assert found.correction_gb == pytest.approx(-0.8)
    assert found.memory.recompute_layers < plan.memory.recompute_layers
    assert found.memory.reason.startswith("memory.mode auto: predicted peak")
    assert measured[1].measured_gb == pytest.approx(measured[1].predicted_gb)


def test_one_that_runs_out_is_planned_again_as_if_it_needed_the_whole_budget() -> None:
    plan, card = start(), Card(more_gb=0.5, memory_gb=4.0)
    found, measured = run(plan, card)
    assert measured[0] == Measured(predicted(plan), None)
    assert card.plans[1].correction_gb == pytest.approx(4.0 - predicted(plan)), "90% that it may fill, and 10%"
    assert layers(card.plans) == sorted(layers(card.plans))
    last = measured[-1].measured_gb
    assert last is not None
    assert last <= 4.0
    assert found.memory.recompute_layers > plan.memory.recompute_layers


def test_so_is_one_that_runs_out_far_below_its_budget() -> None:
    """6 GB were predicted of 9 that there are: a tenth more would change nothing, and the same plan would run out again."""
    plan, card = start(9.0), Card(1.8, memory_gb=9.0)
    assert plan.memory.recompute_layers == 0
    assert predicted(plan) + RAN_OUT * 9.0 < HEADROOM * 9.0
    found, measured = run(plan, card)
    assert card.plans[1].correction_gb == pytest.approx(9.0 - predicted(plan))
    assert measured[0].measured_gb is None
    assert measured[-1].measured_gb is not None
    assert found.memory.recompute_layers > 0


def test_one_that_always_runs_out_ends_after_as_many_steps_as_are_taken() -> None:
    plan, card = start(5.0), Card(memory_gb=0.1)
    found, measured = run(plan, card)
    assert [one.measured_gb for one in measured] == [None] * MAX_STEPS == [None] * 6
    assert len(card.plans) == MAX_STEPS
    assert layers(card.plans) == sorted(set(layers(card.plans))), "each gives up more"
    assert layers([found]) == [24], "until there is nothing more"
    assert found.correction_gb > (MAX_STEPS - 1) * RAN_OUT * 5.0, "planned once more than was measured"


def test_where_steps_end_the_last_plan_that_fitted_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that was not tried is no better than one that was."""
    monkeypatch.setattr(module, "MAX_STEPS", 3)
    plan = start()
    peaks = iter([1.1, 0.8, 1.2])
    tried: list[Plan] = []

    def measure(plan: Plan) -> float | None:
        tried.append(plan)
        return next(peaks) * HEADROOM * 4.0

    found, measured = calibrate(plan, measure, Plan.corrected)
    assert len(measured) == len(tried) == 3
    assert found is tried[1]
    assert tried[2].memory.recompute_layers < found.memory.recompute_layers


@dataclass(frozen=True)
class Graphed(Plan):
    """Made again it has no graphs, and keeps what it kept."""

    def corrected(self, measured_gb: float) -> Graphed:
        return Graphed(replace(self.memory, pool_gb=0.0), self.estimate)


def test_a_plan_that_only_lets_graphs_go_is_another() -> None:
    plan = start(9.0)
    plan = Graphed(replace(plan.memory, pool_gb=8.0), plan.estimate)
    found, measured = calibrate(plan, lambda plan: predicted(plan), Graphed.corrected)
    assert len(measured) == 1
    assert (plan.memory.pool_gb, found.memory.pool_gb) == (8.0, 0.0)


def test_a_plan_that_cannot_become_another_is_not_measured_twice() -> None:
    """Everything is given up, and still it runs out; everything is kept, and much less is needed."""
    for budget, card in ((0.5, Card(memory_gb=0.1)), (100.0, Card(0.5))):
        plan = start(budget)
        found, measured = run(plan, card)
        assert len(measured) == len(card.plans) == 1
        assert found is plan


def test_fused_plans_with_as_many_recomputed_layers_are_not_the_same() -> None:
    """Every layer drops gate and up; what else it drops is another plan."""
    plan, card = start(2.6, "fused"), Card(more_gb=0.3)
    found, measured = run(plan, card)
    assert layers([plan, found]) == [24, 24]
    assert len(measured) == 2
    kept = [sum(len(policy.keep) for policy in one.memory.policies) for one in (plan, found)]
    assert kept[1] < kept[0]
    assert found.correction_gb == pytest.approx(0.3)


@pytest.mark.parametrize("missing", ["budget_gb", "predicted_peak_gb"])
def test_without_a_prediction_or_a_budget_there_is_nothing_to_check(missing: str) -> None:
    plan = start()
    plan = replace(plan, memory=replace(plan.memory, **{missing: None}))
    card = Card()
    assert run(plan, card) == (plan, [])
    assert card.plans == []
