"""Which layers recompute: exact arithmetic on one shape, and what must hold for all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.memory.policy import HEADROOM, LOSS_ROWS, activation_gb, plan_memory
from tunesmith.types import GB, MemoryPlan

SHAPE = SimpleNamespace(
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=32768,
)
TOKENS, LAYERS = 4096, 24
KEPT = TOKENS * 2 * (16 * 1024 + 6 * 4 * 64 + 5 * 4096) / GB
RECOMPUTED = TOKENS * 2 * 1024 / GB
LOGITS = LOSS_ROWS * 32768 * 12 / GB


def plan(config: Any = SHAPE, **changes: Any) -> MemoryPlan:
    settings: dict[str, Any] = {
        "mode": "auto",
        "tokens": TOKENS,
        "supervised": TOKENS,
        "bytes_per_value": 2,
        "static_gb": 3.0,
        "budget_gb": 16.0,
        "num_layers": LAYERS,
    }
    return plan_memory(config, **(settings | changes))


def peak(layers: int, static: float = 3.0) -> float:
    stored = (LAYERS - layers) * KEPT + layers * RECOMPUTED
    return static + stored + max(LOGITS, KEPT if layers else 0.0)


def test_activations_of_a_layer() -> None:
    assert activation_gb(SHAPE, TOKENS, 2) == pytest.approx((KEPT, RECOMPUTED))
    assert activation_gb(SHAPE, TOKENS, 4) == pytest.approx((2 * KEPT, 2 * RECOMPUTED))
    assert activation_gb(SHAPE, TOKENS // 2, 2) == pytest.approx((KEPT / 2, RECOMPUTED / 2))


def test_what_a_config_does_not_say_follows_from_the_rest() -> None:
    sparse = SimpleNamespace(hidden_size=1024, num_attention_heads=16, vocab_size=32768)
    kept = TOKENS * 2 * (16 * 1024 + 6 * 1024 + 5 * 4 * 1024) / GB  # full heads, four times as wide
    assert activation_gb(sparse, TOKENS, 2)[0] == pytest.approx(kept)


def test_fast_keeps_and_min_recomputes_whatever_the_budget() -> None:
    for budget in (0.1, 1000.0, None):
        fast, least = plan(mode="fast", budget_gb=budget), plan(mode="min", budget_gb=budget)
        assert (fast.recompute_layers, least.recompute_layers) == (0, LAYERS)
        assert fast.predicted_peak_gb == pytest.approx(peak(0))
        assert least.predicted_peak_gb == pytest.approx(peak(LAYERS))
    assert fast.reason == "memory.mode fast: keep all activations"
    assert least.reason == "memory.mode min: recompute every layer"


def test_auto_keeps_everything_where_it_fits_and_where_nothing_is_known() -> None:
    assert plan(budget_gb=1000.0).recompute_layers == 0
    unknown = plan(budget_gb=None)
    assert (unknown.recompute_layers, unknown.reason) == (0, "no memory bound known: keep all activations")


@pytest.mark.parametrize("layers", [0, 1, 2, 11, LAYERS])
def test_auto_recomputes_the_fewest_layers_that_fit(layers: int) -> None:
    budget = (peak(layers) + 1e-9) / HEADROOM
    found = plan(budget_gb=budget)
    # Recomputing one layer saves little here: what it recomputes takes the place of the logits.
    fewest = next(count for count in range(LAYERS + 1) if peak(count) <= HEADROOM * budget)
    assert found.recompute_layers == fewest
    assert found.predicted_peak_gb == pytest.approx(peak(fewest))
    assert found.reason == (
        f"predicted peak {peak(fewest):.1f} GB of {budget:.1f} GB: recompute {fewest} of {LAYERS} layers"
    )


def test_when_nothing_fits_every_layer_recomputes() -> None:
    found = plan(budget_gb=1.0)
    assert found.recompute_layers == LAYERS
    assert found.predicted_peak_gb is not None
    assert found.predicted_peak_gb > 1.0


def test_few_supervised_tokens_need_few_logits() -> None:
    few = plan(mode="fast", supervised=10)
    many = plan(mode="fast", supervised=10 * LOSS_ROWS)
    assert few.predicted_peak_gb == pytest.approx(peak(0) - LOGITS + 10 * 32768 * 12 / GB)
    assert many.predicted_peak_gb == pytest.approx(peak(0))  # never more than LOSS_ROWS rows at once


SIZES = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 100_000),
        "supervised": st.integers(1, 100_000),
        "bytes_per_value": st.sampled_from([2, 4]),
        "static_gb": st.floats(0.01, 100),
        "num_layers": st.integers(1, 80),
    }
)
MODES: st.SearchStrategy[Literal["auto", "min", "fast"]] = st.sampled_from(["auto", "min", "fast"])


@given(SIZES, st.floats(0.1, 200), st.floats(1, 10))
def test_more_memory_never_means_more_recomputation(sizes: dict[str, Any], budget: float, factor: float) -> None:
    small, large = plan(budget_gb=budget, **sizes), plan(budget_gb=factor * budget, **sizes)
    assert large.recompute_layers <= small.recompute_layers


@given(SIZES, st.floats(0.1, 200))
def test_a_plan_fits_unless_none_does(sizes: dict[str, Any], budget: float) -> None:
    found = plan(budget_gb=budget, **sizes)
    assert 0 <= found.recompute_layers <= sizes["num_layers"]
    assert found.predicted_peak_gb is not None
    assert found.predicted_peak_gb <= HEADROOM * budget or found.recompute_layers == sizes["num_layers"]


@given(SIZES, MODES, st.floats(0.1, 200))
def test_a_plan_reports_what_it_was_given(sizes: dict[str, Any], mode: Any, budget: float) -> None:
    found = plan(mode=mode, budget_gb=budget, **sizes)
    assert (found.mode, found.num_layers, found.budget_gb) == (mode, sizes["num_layers"], budget)
    assert found.predicted_peak_gb is not None
    assert found.predicted_peak_gb > sizes["static_gb"]
