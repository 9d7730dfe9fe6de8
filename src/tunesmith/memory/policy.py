"""Keep or recompute activations: arithmetic on the model's shape against the memory there is.

The fused engine keeps by tensor (`fused_tensors`), so that its plan can fill the card: what costs the least time for its
memory goes first.

The reference engine keeps, for every token and decoder layer, what PyTorch's autograd saves of transformers' own
modules: about 2 bytes x (16 hidden + 6 kv + 5 intermediate) with 16-bit compute, and twice that in fp32 (norms save fp32
copies, SwiGLU its gate, up, activation and product). Recomputing keeps the layer's input, 2 bytes x hidden, and one
layer's activations at a time.
"""

from __future__ import annotations

from typing import Any, Literal

from tunesmith.types import GB, LAYER_TENSORS, LayerPolicy, LayerTensor, MemoryPlan

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
    engine: Literal["reference", "fused"] = "reference",
    rank: int = 0,
    expanded: bool = False,
) -> MemoryPlan:
    """Choose how many decoder layers recompute their activations.

    `tokens` is the largest micro-batch and `supervised` its supervised tokens, `static_gb` weights, gradients and optimizer state, `budget_gb` what may be used
    (None: no bound known). `auto` recomputes the fewest layers whose predicted peak fits 90% of the budget. For the fused
    engine `rank` is the adapter's, and `expanded` says that base weights are dequantized or cast for each product.
    """
    if engine == "fused":
        return _plan_fused(
            config, mode, tokens, supervised, bytes_per_value, static_gb, budget_gb, num_layers, rank, expanded
        )
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


DROP_ORDER: tuple[tuple[LayerTensor, ...], ...] = (
    ("gate_up", "mlp_output"),
    ("middle", "attention_output"),
    ("qkv",),
    ("attention",),
)
"""What is recomputed first. One product brings back each byte of the first three for as many operations (its inner width);
gate_up has the fewest elementwise passes besides. Attention costs more for a byte from about 1,000 tokens a sequence on."""

MLP_ROWS, MLP_PIECES = 4096, 4
"""Under `min` the MLP takes a quarter of the tokens at a time, but no fewer than 4,096: pieces share their dequantized
weights, which are as large as the activations of so many tokens."""

WORKSPACE_GB = 0.3
"""Workspaces of cuBLAS and cuDNN, rounding of blocks, batches: measured beside the arithmetic on an H100."""

TIGHT_LOSS_ROWS = 512
"""Rows of logits at once where memory is short: 131 MB for a vocabulary of 128,256 in 16 bits."""

GLU_BLOCK = 64
"""Columns of the GLU backward's programs (kernels/glu.py): each leaves its part of dS."""


def fused_tensors(config: Any, rank: int, bytes_per_value: int) -> dict[str, int]:
    """Bytes a token of what a fused layer can keep, and of its input (`hidden`), by name."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    slot = max(16, 1 << (rank - 1).bit_length()) if rank else 0
    wide = {
        "hidden": hidden,
        "qkv": (heads + 2 * groups) * head_dim + 3 * slot,
        "attention": heads * head_dim,
        "middle": hidden,
        "gate_up": 2 * getattr(config, "intermediate_size", 4 * hidden) + 2 * slot,
        "slots": 2 * slot,
    }
    if str(getattr(config, "model_type", "")).startswith(("gemma2", "gemma3")):
        wide |= {"attention_output": hidden + slot, "mlp_output": hidden + slot}  # with the S beside them
    found = {name: values * bytes_per_value for name, values in wide.items()}
    found["attention"] += 4 * heads  # the softmax's logsumexp
    return found


def _plan_fused(
    config: Any,
    mode: Literal["auto", "min", "fast"],
    tokens: int,
    supervised: int,
    bytes_per_value: int,
    static_gb: float,
    budget_gb: float | None,
    num_layers: int,
    rank: int,
    expanded: bool,
) -> MemoryPlan:
    sizes = fused_tensors(config, rank, bytes_per_value)
    always = tokens * (sizes["hidden"] + sizes["slots"])
    intermediate = getattr(config, "intermediate_size", 4 * config.hidden_size)
    operand = 3 * intermediate * config.hidden_size * bytes_per_value if expanded else 0

    def mlp_bytes(rows: int) -> int:
        """What an MLP's backward over `rows` at a time holds besides the layer's hidden states."""
        ds_parts = -(-intermediate // GLU_BLOCK) * sizes["slots"]
        piece = rows * (sizes["gate_up"] * 3 // 2 + 2 * sizes["hidden"] + ds_parts)
        return piece + (operand if rows < tokens else operand * 2 // 3)  # pieces hold both operands, else one by one

    # Few more tokens than a piece has: its second operand costs more than it saves.
    pieces = min(tokens, max(MLP_ROWS, -(-tokens // MLP_PIECES)), key=mlp_bytes)

    def transient(tight: bool) -> float:
        """One layer's backward, everything recomputed: its MLP, its attention, or the head's."""
        loss_rows = min(supervised, TIGHT_LOSS_ROWS if tight else LOSS_ROWS)
        head = (supervised * 2 + tokens * 2) * sizes["hidden"] + loss_rows * config.vocab_size * bytes_per_value
        mlp = tokens * (4 * sizes["hidden"] + sizes["qkv"] + sizes["attention"])
        mlp += mlp_bytes(pieces if tight else tokens)
        attention = tokens * (4 * sizes["hidden"] + 3 * sizes["qkv"] + 2 * sizes["attention"])
        return max(mlp, attention, head)

    def peak(dropped: dict[LayerTensor, int], tight: bool, offload: bool) -> float:
        kept = sum((num_layers - dropped.get(name, 0)) * tokens * sizes.get(name, 0) for name in LAYER_TENSORS)
        waiting = (min(2, num_layers) if offload else num_layers) * always
        return static_gb + WORKSPACE_GB + (kept + waiting + transient(tight)) / GB

    everything: dict[LayerTensor, int] = dict.fromkeys(LAYER_TENSORS, num_layers)
    dropped: dict[LayerTensor, int] = {}
    tight, offload = False, False
    if mode == "min":
        dropped, tight, offload = everything, True, True
    elif mode == "auto" and budget_gb is not None:
        room = HEADROOM * budget_gb
        for names in DROP_ORDER:
            while peak(dropped, tight, offload) > room and dropped.get(names[0], 0) < num_layers:
                dropped |= dict.fromkeys(names, dropped.get(names[0], 0) + 1)
        tight = peak(dropped, tight, offload) > room
        offload = peak(dropped, tight, offload) > room
    policies = tuple(
        LayerPolicy(
            keep=frozenset(name for name in LAYER_TENSORS if layer >= dropped.get(name, 0)),
            offload_input=offload,
            mlp_rows=pieces if tight and pieces < tokens else None,
        )
        for layer in range(num_layers)
    )
    predicted = peak(dropped, tight, offload)
    gone = ", ".join(f"{names[0]} of {dropped[names[0]]}" for names in DROP_ORDER if dropped.get(names[0]))
    what = f"recompute {gone} of {num_layers} layers" if gone else "keep all activations"
    budget = f" of {budget_gb:.1f} GB" if budget_gb is not None else ""
    reason = f"memory.mode {mode}: predicted peak {predicted:.1f} GB{budget}: {what}"
    if offload:
        reason += ", layer inputs in host memory"
    return MemoryPlan(
        mode,
        dropped.get("gate_up", 0),
        num_layers,
        budget_gb,
        predicted,
        reason,
        engine="fused",
        policies=policies,
        loss_rows=TIGHT_LOSS_ROWS if tight else None,
    )
