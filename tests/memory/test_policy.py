"""Which layers recompute under the reference engine: exact arithmetic on one shape, and what must hold for all of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.memory.estimate import WORKSPACE_GB, Estimate, Load, Setup
from tunesmith.memory.policy import HEADROOM, Mode, fits, plan_memory
from tunesmith.memory.shape import ModelShape
from tunesmith.types import GB, LayerPolicy, MemoryPlan

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
}
SHAPE = ModelShape.of(CONFIG)
TOKENS, LAYERS = 4096, 24
ADAPTER = 8_454_144
"""Parameters at rank 16: 16 · 22,016 a layer."""

KEPT = TOKENS * (2 * 1024 * 4 + 2 * 2 * 1024 + 2 * (1024 + 512 + 1024) + 2 * 4 * 4096 + 2 * 16 * 7)
"""Norms' inputs in fp32 and their outputs; q, k, v and attention's result; four of the MLP's width; the adapters' A x."""

RECOMPUTED = TOKENS * 2 * 1024
INNER = TOKENS * (2 * 4096 + 2 * 1024)
"""Gradients within a layer's backward."""

LOGITS = TOKENS * 32768 * 2
"""All rows fit into a chunk of 2^29 bytes."""


def plan(mode: Mode = "auto", budget: float | None = 16.0, correction: float = 0.0, **changes: Any) -> MemoryPlan:
    load = Load(**{"tokens": TOKENS, "supervised": TOKENS, "sequence": TOKENS, "accumulates": False, **changes})
    return plan_memory(Estimate(SHAPE, Setup("lora", "reference"), load, weights_gb=3.0), mode, budget, correction)


def peak(layers: int, logits: int = LOGITS, supervised: int = TOKENS) -> float:
    """The predicted peak in GB, written out: weights, the adapter with its cast, gradients and moments; and the larger of two."""
    stored = (LAYERS - layers) * KEPT + layers * RECOMPUTED
    head = stored + 2 * RECOMPUTED + 2 * supervised * 2 * 1024 + logits
    backward = stored + (KEPT + INNER if layers == LAYERS else 2 * INNER)
    return 3.0 + WORKSPACE_GB + (18 * ADAPTER + max(head, backward)) / GB


def test_fast_keeps_and_min_recomputes_whatever_the_budget() -> None:
    for budget in (0.1, 1000.0, None):
        fast, least = plan("fast", budget), plan("min", budget)
        assert (fast.recompute_layers, least.recompute_layers) == (0, LAYERS)
        assert fast.predicted_peak_gb == pytest.approx(peak(0))
        assert least.predicted_peak_gb == pytest.approx(peak(LAYERS))
        said = "" if budget is None else f" of {budget:.1f} GB"
        assert fast.reason == f"memory.mode fast: predicted peak {peak(0):.1f} GB{said}: keep all activations"
        assert least.reason == (
            f"memory.mode min: predicted peak {peak(LAYERS):.1f} GB{said}: recompute 24 of 24 layers"
        )


def test_auto_keeps_everything_where_it_fits_and_where_nothing_is_known() -> None:
    assert plan(budget=1000.0).recompute_layers == 0
    unknown = plan(budget=None)
    assert (unknown.recompute_layers, unknown.budget_gb) == (0, None)
    assert unknown.reason == f"memory.mode auto: predicted peak {peak(0):.1f} GB: keep all activations"


@pytest.mark.parametrize("layers", [0, 1, 2, 11, LAYERS - 1, LAYERS])
def test_auto_recomputes_the_fewest_layers_that_fit(layers: int) -> None:
    budget = (peak(layers) + 1e-9) / HEADROOM
    found = plan(budget=budget)
    assert found.recompute_layers == layers
    assert found.predicted_peak_gb == pytest.approx(peak(layers))
    what = f"recompute {layers} of 24 layers" if layers else "keep all activations"
    assert found.reason == f"memory.mode auto: predicted peak {peak(layers):.1f} GB of {budget:.1f} GB: {what}"
    assert fits(found)


def test_when_nothing_fits_every_layer_recomputes() -> None:
    found = plan(budget=1.0)
    assert found.recompute_layers == LAYERS
    assert found.predicted_peak_gb == pytest.approx(peak(LAYERS))
    assert not fits(found)


def test_the_share_of_the_budget_that_fits() -> None:
    exact = plan("fast", peak(0) / HEADROOM)
    short = plan("fast", 0.999 * peak(0) / HEADROOM)
    assert (fits(exact), fits(short), fits(plan("fast", None))) == (True, False, True)


def test_few_supervised_tokens_need_few_logits() -> None:
    found = plan("min", supervised=10)
    assert found.predicted_peak_gb == pytest.approx(peak(LAYERS, 10 * 32768 * 2, 10))
    assert found.predicted_peak_gb < plan("min").predicted_peak_gb


def test_a_plan_says_what_its_peak_is_made_of() -> None:
    found = plan()
    assert found.breakdown["weights_gb"] == 3.0
    assert found.breakdown["adapter_gb"] == 6 * ADAPTER / GB
    assert found.breakdown["gradients_gb"] == 4 * ADAPTER / GB
    assert found.breakdown["optimizer_gb"] == 8 * ADAPTER / GB
    assert sum(found.breakdown.values()) - found.breakdown["context_gb"] == pytest.approx(found.predicted_peak_gb)


@pytest.mark.parametrize("correction", [-0.5, 0.25, 2.0])
def test_what_a_measurement_found_is_added_to_every_prediction(correction: float) -> None:
    assert plan("fast", correction=correction).predicted_peak_gb == pytest.approx(peak(0) + correction)
    budget = (peak(5) + correction + 1e-9) / HEADROOM
    corrected = plan(budget=budget, correction=correction)
    assert corrected.recompute_layers == 5
    assert f"predicted peak {peak(5) + correction:.1f} GB" in corrected.reason


def test_half_fused_layers_recompute_nothing() -> None:
    shape = ModelShape.of({**CONFIG, "model_type": "mixtral", "num_local_experts": 4})
    estimate = Estimate(shape, Setup("lora", "fused"), Load(TOKENS, TOKENS, TOKENS))
    for mode in ("auto", "min", "fast"):
        found = plan_memory(estimate, mode, 0.1)
        assert (found.engine, found.recompute_layers) == ("fused", 0)
        assert found.policies == (LayerPolicy(),) * LAYERS
        assert found.reason.endswith(": keep all activations")
        assert not fits(found)
    reference = Estimate(shape, Setup("lora", "reference"), estimate.load)
    assert plan_memory(reference, "min", 0.1).recompute_layers == LAYERS


# -- what holds for all ----------------------------------------------------------------------------------------------

SHAPES = st.builds(
    lambda **settings: ModelShape.of({"num_attention_heads": 16, **settings}),
    model_type=st.sampled_from(["llama", "gemma2", "phi3", "qwen3"]),
    hidden_size=st.sampled_from([64, 1024, 4096]),
    intermediate_size=st.sampled_from([128, 4096, 14336]),
    num_hidden_layers=st.integers(1, 40),
    num_key_value_heads=st.sampled_from([1, 8]),
    vocab_size=st.sampled_from([1000, 128256]),
)
SETUPS = st.builds(
    Setup,
    method=st.sampled_from(["lora", "qlora", "full"]),
    value_bytes=st.sampled_from([2, 4]),
    r=st.sampled_from([4, 64]),
    optimizer=st.sampled_from(["adamw", "adamw_8bit"]),
)
LOADS = st.builds(
    Load, tokens=st.integers(1, 50_000), supervised=st.integers(1, 50_000), sequence=st.integers(1, 8192),
    accumulates=st.booleans(),
)  # fmt: skip
ESTIMATES = st.builds(Estimate, SHAPES, SETUPS, LOADS)
MODES: st.SearchStrategy[Mode] = st.sampled_from(["auto", "min", "fast"])
BUDGETS = st.floats(0.1, 400)


@given(ESTIMATES, BUDGETS, st.floats(1, 10))
def test_more_memory_never_means_more_recomputation(estimate: Estimate, budget: float, factor: float) -> None:
    small, large = (plan_memory(estimate, "auto", size) for size in (budget, factor * budget))
    assert large.recompute_layers <= small.recompute_layers


@given(ESTIMATES, BUDGETS)
def test_a_plan_fits_unless_none_does(estimate: Estimate, budget: float) -> None:
    found = plan_memory(estimate, "auto", budget)
    assert 0 <= found.recompute_layers <= estimate.shape.num_layers
    if not fits(found):
        assert found.recompute_layers == estimate.shape.num_layers
        peaks = [estimate.reference(count).peak_gb for count in range(estimate.shape.num_layers + 1)]
        assert min(peaks) > HEADROOM * budget


@given(ESTIMATES, BUDGETS)
def test_no_layer_recomputes_that_there_is_room_for(estimate: Estimate, budget: float) -> None:
    found = plan_memory(estimate, "auto", budget)
    if found.recompute_layers:
        assert estimate.reference(found.recompute_layers - 1).peak_gb > HEADROOM * budget


@given(ESTIMATES, MODES, st.none() | BUDGETS, st.floats(-5, 5))
def test_a_plan_reports_what_it_was_given(
    estimate: Estimate, mode: Mode, budget: float | None, correction: float
) -> None:
    found = plan_memory(estimate, mode, budget, correction)
    assert (found.mode, found.num_layers, found.budget_gb) == (mode, estimate.shape.num_layers, budget)
    assert (found.engine, found.policies, found.loss_rows) == ("reference", (), None)
    expected = estimate.reference(found.recompute_layers).peak_gb + correction
    assert found.predicted_peak_gb == expected
    assert f"predicted peak {expected:.1f} GB" in found.reason


@given(ESTIMATES, BUDGETS)
def test_min_is_least_and_fast_is_most(estimate: Estimate, budget: float) -> None:
    least, auto, most = (plan_memory(estimate, mode, budget).predicted_peak_gb for mode in ("min", "auto", "fast"))
    assert least is not None
    assert auto is not None
    assert most is not None
    assert estimate.static.peak_gb - estimate.static.gradients_gb < least <= auto <= most
