"""Keep or recompute activations: arithmetic on the model's shape against the memory there is.

The reference engine keeps, for every token and decoder layer, what PyTorch's autograd saves of transformers' own
modules: about 2 bytes x (16 hidden + 6 kv + 5 intermediate) with 16-bit compute, and twice that in fp32 (norms save fp32
copies, SwiGLU its gate, up, activation and product). Recomputing keeps the layer's input, 2 bytes x hidden, and one
layer's activations at a time.
"""

from __future__ import annotations

from typing import Any, Literal

from tunesmith.types import GB, MemoryPlan

HEADROOM = 0.9
"""Share of the budget that a plan may fill: fragmentation and workspaces take the rest."""

LOSS_ROWS = 2048
"""Supervised rows whose logits exist at once (training/objectives.py)."""


def activation_gb(config: Any, tokens: int, bytes_per_value: int) -> tuple[float, float]:
    """Activations of one decoder layer for `tokens` tokens in GB: (kept, recomputed).

    `config` is a transformers text config (hidden_size, intermediate_size, num_attention_heads, ...).
    """
    hidden = config.hidden_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    intermediate = getattr(config, "intermediate_size", 4 * hidden)
    kept = tokens * bytes_per_value * (16 * hidden + 6 * kv + 5 * intermediate)
    return kept / GB, tokens * bytes_per_value * hidden / GB


def plan_memory(
    config: Any,
    *,
    mode: Literal["auto", "min", "fast"],
    tokens: int,
    supervised: int,
    bytes_per_value: int,
    static_gb: float,
    budget_gb: float | None,
    num_layers: int,
) -> MemoryPlan:
    """Choose how many decoder layers recompute their activations.

    `tokens` is the largest micro-batch and `supervised` its supervised tokens, `static_gb` weights, gradients and optimizer state, `budget_gb` what may be used
    (None: no bound known). `auto` recomputes the fewest layers whose predicted peak fits 90% of the budget.
    """
    kept, recomputed = activation_gb(config, tokens, bytes_per_value)
    logits = min(supervised, LOSS_ROWS) * config.vocab_size * 4 * 3 / GB  # fp32 logits, their gradient, the softmax

    def peak(recompute_layers: int) -> float:
        stored = (num_layers - recompute_layers) * kept + recompute_layers * recomputed
        return static_gb + stored + max(logits, kept if recompute_layers else 0.0)

    if mode == "fast":
        layers, reason = 0, "memory.mode fast: keep all activations"
    elif mode == "min":
        layers, reason = num_layers, "memory.mode min: recompute every layer"
    elif budget_gb is None:
        layers, reason = 0, "no memory bound known: keep all activations"
    else:
        room = HEADROOM * budget_gb
        layers = next((count for count in range(num_layers + 1) if peak(count) <= room), num_layers)
        reason = (
            f"predicted peak {peak(layers):.1f} GB of {budget_gb:.1f} GB: recompute {layers} of {num_layers} layers"
        )
    return MemoryPlan(mode, layers, num_layers, budget_gb, peak(layers), reason)
