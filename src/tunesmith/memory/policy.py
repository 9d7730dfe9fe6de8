"""What each layer keeps of its forward, computes again, or sends to host memory: the least that fits a budget.

The reference engine recomputes whole layers (activation checkpointing), the first ones first. The fused engine gives up tensor
by tensor, so that its plan can fill the card: what costs the least time for its memory goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from typing import Literal

from tunesmith.memory.estimate import Breakdown, Estimate
from tunesmith.memory.replays import GRAPH_GB, MAX_GRAPHS
from tunesmith.types import LAYER_TENSORS, LayerPolicy, LayerTensor, MemoryPlan

Mode = Literal["auto", "min", "fast"]

HEADROOM = 0.9
"""Share of the budget that a plan may fill: a cap bounds what PyTorch reserves, which is 1% to 20% more than it allocates."""

LOSS_ROWS = 2048
"""Supervised rows whose logits exist at once, where the head is not a plain matrix (training/objectives.py)."""

DROP_ORDER: tuple[tuple[LayerTensor, ...], ...] = (
    ("gate_up", "mlp_output"),
    ("middle", "attention_output"),
    ("qkv",),
    ("attention",),
)
"""What is recomputed first. One product brings back each byte of the first three for as many operations (its inner width);
gate_up has the fewest elementwise passes besides. Attention costs more for a byte from about 1,000 tokens a sequence on."""

TIGHT_LOSS_ROWS = 512
"""Rows of logits at once where memory is short: 131 MB for a vocabulary of 128,256 in 16 bits."""


def plan_memory(
    estimate: Estimate, mode: Mode, budget_gb: float | None, correction_gb: float = 0.0, graphs: bool = False
) -> MemoryPlan:
    """The plan for a setup under a load: `auto` gives up the least whose predicted peak fits 90% of `budget_gb`.

    Without a budget, and in mode `fast`, everything is kept; in mode `min` everything is given up. `correction_gb` is added to
    every prediction: what a measurement found above (or below) the arithmetic. With `graphs` CUDA graphs have
    memory of the driver's beside it (the fused engine).
    """
    room = None if budget_gb is None else HEADROOM * budget_gb
    if estimate.setup.engine == "fused" and estimate.shape.can_fuse:
        return _plan_fused(estimate, mode, budget_gb, room, correction_gb, graphs)
    return _plan_reference(estimate, mode, budget_gb, room, correction_gb)


def fits(plan: MemoryPlan) -> bool:
    """Whether the predicted peak is within the plan's share of its budget, or there is no budget."""
    if plan.budget_gb is None or plan.predicted_peak_gb is None:
        return True
    return plan.predicted_peak_gb + plan.pool_gb <= HEADROOM * plan.budget_gb + 1e-9


def gives_up_alike(one: MemoryPlan, other: MemoryPlan) -> bool:
    """Whether two plans for one model do the same to it."""
    return one.policies == other.policies and one.recompute_layers == other.recompute_layers


def _first_that_fits(count: int, peak: Callable[[int], float], room: float) -> int:
    """The smallest number in 0 ... count - 1 whose peak is within `room`, else the last; peaks fall with the number."""
    if peak(0) <= room:
        return 0
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if peak(middle) <= room:
            high = middle
        else:
            low = middle + 1
    return low


def _plan_reference(
    estimate: Estimate, mode: Mode, budget_gb: float | None, room: float | None, correction_gb: float
) -> MemoryPlan:
    fused = estimate.setup.engine == "fused"  # half-fused layers recompute nothing
    num_layers = estimate.shape.num_layers
    layers = num_layers if mode == "min" and not fused else 0
    if mode == "auto" and room is not None and not fused:
        layers = _first_that_fits(num_layers + 1, lambda count: estimate.reference(count).peak_gb + correction_gb, room)
    found = estimate.reference(layers)
    what = f"recompute {layers} of {num_layers} layers" if layers else "keep all activations"
    policies = (LayerPolicy(),) * num_layers if fused else ()
    return _plan(estimate, mode, budget_gb, correction_gb, found, what, layers, policies)


def _plan_fused(
    estimate: Estimate, mode: Mode, budget_gb: float | None, room: float | None, correction_gb: float, graphs: bool
) -> MemoryPlan:
    num_layers, tokens = estimate.shape.num_layers, estimate.load.tokens
    pieces = estimate.mlp_rows()
    # What is given up, from nothing to everything: tensors layer by layer, then short pieces, then inputs layer by layer.
    tight = len(DROP_ORDER) * num_layers + 1
    last = tight + num_layers

    @cache
    def policies(given_up: int) -> tuple[LayerPolicy, ...]:
        drops = min(given_up, tight - 1)
        counts = [min(num_layers, max(0, drops - index * num_layers)) for index in range(len(DROP_ORDER))]
        gone = {name: count for names, count in zip(DROP_ORDER, counts, strict=True) for name in names}
        offloaded = max(0, given_up - tight)
        rows = pieces if given_up >= tight and pieces < tokens else None
        found: list[LayerPolicy] = []
        # Layers that are alike share an object.
        for first, end in pairwise(sorted({0, num_layers, offloaded, *counts})):
            keep = frozenset(name for name in LAYER_TENSORS if first >= gone[name])
            found += [LayerPolicy(keep, first < offloaded, rows)] * (end - first)
        return tuple(found)

    def loss_rows(given_up: int) -> int | None:
        return TIGHT_LOSS_ROWS if given_up >= tight else None

    pool = GRAPH_GB * MAX_GRAPHS if graphs else 0.0

    @cache
    def parts(given_up: int) -> Breakdown:
        return estimate.fused(policies(given_up), loss_rows(given_up))

    def needed(given_up: int) -> float:
        found = parts(given_up)
        return found.peak_gb + correction_gb + pool

    given_up = last if mode == "min" else 0
    if mode == "auto" and room is not None:
        given_up = _first_that_fits(last + 1, needed, room)
    chosen = policies(given_up)
    found = parts(given_up)
    counts = {names[0]: sum(names[0] not in policy.keep for policy in chosen) for names in DROP_ORDER}
    gone = ", ".join(f"{name} of {count}" for name, count in counts.items() if count)
    what = f"recompute {gone} of {num_layers} layers" if gone else "keep all activations"
    if given_up > tight:
        what += f", the inputs of {given_up - tight} in host memory"
    plan = _plan(estimate, mode, budget_gb, correction_gb, found, what, counts["gate_up"], chosen, loss_rows(given_up))
    return replace(plan, pool_gb=pool)


def _plan(
    estimate: Estimate,
    mode: Mode,
    budget_gb: float | None,
    correction_gb: float,
    found: Breakdown,
    what: str,
    recompute_layers: int,
    policies: Sequence[LayerPolicy],
    loss_rows: int | None = None,
) -> MemoryPlan:
    predicted = found.peak_gb + correction_gb
    budget = f" of {budget_gb:.1f} GB" if budget_gb is not None else ""
    return MemoryPlan(
        mode=mode,
        recompute_layers=recompute_layers,
        num_layers=estimate.shape.num_layers,
        budget_gb=budget_gb,
        predicted_peak_gb=predicted,
        reason=f"memory.mode {mode}: predicted peak {predicted:.1f} GB{budget}: {what}",
        engine=estimate.setup.engine,
        policies=tuple(policies),
        loss_rows=loss_rows,
        breakdown=asdict(found),
    )
