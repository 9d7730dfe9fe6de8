"""How long a step takes, by arithmetic on the model's shape and the card's data sheet. Imports no PyTorch.

A micro-batch is matrix products (bound by arithmetic, or by reading weights once where tokens are few), attention, passes
over activations, weights made for their products (dequantized, cast), and a fixed time a layer for its many small kernels;
where no CUDA graph replays them, launching them from Python is a lower bound. The shares of the data sheet that are reached
(`RATES`) were fitted to 82 steps on two H100s (benchmarks/planner.py, docs/planner.md): on that card predictions are within
15% where the GPU does not wait for Python; launching on a shared processor changes by a third within minutes. On another card they are arithmetic with these shares, and no better than its data sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.cards import Card
from tunesmith.memory.estimate import Load, Setup, trainable_values
from tunesmith.memory.shape import Layer, ModelShape
from tunesmith.types import LayerPolicy

LAUNCHED = frozenset({"gate_up", "middle", "qkv", "attention"})
"""What a fused layer may compute again: each takes about as many launches."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What an engine reaches. `products` and `attention` are shares of the card's FLOP/s.

    `passes` is how often each feature that goes into or out of a linear layer is read or written besides the products, at
    the card's bandwidth; `makes` is the same for weights that are dequantized or cast. `layer_ms` is the fixed time a layer.
    """

    products: float
    attention: float
    passes: float
    makes: float
    layer_ms: float


RATES = {
    "fused": Rates(products=0.81, attention=0.51, passes=7.7, makes=1.67, layer_ms=0.22),
    "reference": Rates(products=0.78, attention=0.46, passes=27.0, makes=2.75, layer_ms=0.0),
}

LAUNCH_MS = {
    ("reference", "lora"): (4.1, 7.8),
    ("reference", "qlora"): (5.95, 10.9),
    ("reference", "full"): (2.3, 4.4),
    ("fused", "lora"): (1.9, 2.7),
    ("fused", "qlora"): (3.8, 4.9),
    ("fused", "full"): (2.6, 4.9),
}
"""Milliseconds that Python takes to launch a layer's forward and backward, activations kept and computed again, on the
H100's host. `host` below is how many times longer another one takes. The fused engine's with adapters were measured at Qwen2.5-3B
and 440 tokens, on hosts of 2 to 3.3 (docs/LOG.md, 2026-11-26)."""

FLEX_LAUNCH_MS = (5.7, 8.1)
"""The same for layers of the fused engine whose attention is FlexAttention (soft caps): it goes through autograd."""

NORM_LAUNCHES = 1.12
"""How much longer the reference engine launches for families with norms of heads, and once more for norms of branches."""

TENSOR_MS = {"8bit": 0.09, "paged": 0.04}
"""Milliseconds that bitsandbytes' optimizers take for each tensor, which they wait for; more for each with paged states. An
adapter's tensors are one (training/flat.py)."""

BANDWIDTH = 0.8
"""Share of the data sheet's bandwidth that plain reads and writes reach (2.7 of 3.35 TB/s)."""

RANK = 16
"""At which `passes` was fitted; a higher rank adds RANK_PASSES / RANK of them for each column more."""

RANK_PASSES = 1.7

FULL_PASSES = {"fused": 1.25, "reference": 0.9}
"""`passes` in full fine-tuning, as a share: hidden states in fp32, but no adapters beside the products."""

ROUNDED_BYTES = 82
"""Read and written for a bf16 weight in an optimizer step, beside its moments (training/rounding.py): the norm 2, weight and
gradient to fp32 12, clipping 8, the update 12, noise 4, looking for NaN 9, rounding 20, keeping NaN 9, the copy back 6. What Python
takes to launch the step is not in the prediction: docs/planner.md has steps that wait for it."""

HOST_LINK = 20e9
"""Bytes a second to host memory and back, for layer inputs that wait there: PCIe 4 x16. They travel beside the work."""


def micro_batch_seconds(
    shape: ModelShape,
    setup: Setup,
    load: Load,
    card: Card,
    policies: Sequence[LayerPolicy] = (),
    recompute_layers: int = 0,
    graphs: bool = False,
    host: float = 1.0,
) -> float:
    """Seconds of one forward and backward over `load.tokens` tokens.

    `policies` are the fused engine's, one a layer (none: keep all); `recompute_layers` the reference engine's. `graphs` says
    whether CUDA graphs may replay it, `host` how many times longer than the H100's host this one takes to launch kernels.
    """
    rates = RATES[setup.engine]
    b, tokens = setup.value_bytes, load.tokens
    layers = [layer for count, layer in shape.layers for _ in range(count)]
    keep_all = LayerPolicy()
    seconds = 0.0
    known: dict[tuple[int, int, bool, bool], float] = {}  # layers that are alike share objects
    for index, layer in enumerate(layers):
        if setup.engine == "fused" and policies:
            policy, again = policies[index], False
        else:
            policy, again = keep_all, setup.engine == "reference" and index < recompute_layers
        windowed = index < shape.windowed
        key = (id(layer), id(policy), again, windowed)
        if key not in known:
            known[key] = _layer_seconds(shape, layer, setup, load, card, policy, again, windowed)
        seconds += known[key]
    head_products = 3 if setup.trains_head(shape) else 2
    seconds += head_products * _product_seconds(shape.embedding_values, load.supervised, b, card, rates.products)
    seconds += 3 * b * load.supervised * shape.vocab_size / (card.bandwidth * BANDWIDTH)
    offloaded = sum(policy.offload_input for policy in policies)
    seconds = max(seconds, 2 * offloaded * tokens * shape.hidden_size * b / HOST_LINK)
    return seconds if graphs else max(seconds, launching_seconds(shape, setup, policies, recompute_layers, host))


def launching_seconds(
    shape: ModelShape, setup: Setup, policies: Sequence[LayerPolicy] = (), recompute_layers: int = 0, host: float = 1.0
) -> float:
    """Seconds that Python takes to launch a micro-batch's kernels, however few tokens it has. As `micro_batch_seconds`."""
    recomputed = float(min(recompute_layers, shape.num_layers))
    if setup.engine == "fused":
        recomputed = sum(1 - len(policy.keep & LAUNCHED) / len(LAUNCHED) for policy in policies)
    kept_ms, again_ms = LAUNCH_MS[setup.engine, setup.method]
    if setup.engine == "fused" and shape.softcapped:
        kept_ms, again_ms = FLEX_LAUNCH_MS
    launching = host * ((shape.num_layers - recomputed) * kept_ms + recomputed * again_ms)
    if setup.engine == "reference":
        launching *= NORM_LAUNCHES ** (shape.head_norms + 2 * shape.post_norms)
    return launching / 1e3


def _layer_seconds(
    shape: ModelShape,
    layer: Layer,
    setup: Setup,
    load: Load,
    card: Card,
    policy: LayerPolicy,
    again: bool,
    windowed: bool,
) -> float:
    rates, b, tokens = RATES[setup.engine], setup.value_bytes, load.tokens
    full = setup.method == "full"
    values = {linear.path: linear.values for linear in layer.linears}
    total = sum(values.values()) + layer.active_expert_values
    missing = _recomputed_values(layer, policy) if not again else total
    passes = (3 if full else 2) * total + missing
    seconds = _product_seconds(passes, tokens, b, card, rates.products)
    context = load.sequence
    if shape.window is not None and windowed:
        context = min(context, 2 * shape.window)  # a window is seen whole by all but the first tokens
    # Causal: half of the scores, for q k and for p v. The backward has five products where the forward has two.
    scores = tokens * context * (shape.query_size + shape.attention_size)
    forwards = 1 + (again or "attention" not in policy.keep)
    seconds += scores * (forwards + 2.5) / (card.flops * rates.attention)
    features = sum(linear.inputs + linear.outputs for linear in layer.linears) + 3 * layer.mlp_width * bool(
        layer.expert_values
    )
    share = missing / total if total else 0.0
    reads = rates.passes * (1 + (0.5 if again else 0.25) * share)
    if setup.r and not full:
        reads += RANK_PASSES * (setup.r / RANK - 1)
    if full and not setup.rounds:
        reads *= FULL_PASSES[setup.engine]
    seconds += reads * b * tokens * features / card.bandwidth
    if setup.method != "lora":
        stored = 0.5 if setup.scheme in ("nf4", "fp4") else 1.0 if setup.scheme == "int8" else 4.0
        made = 0.0 if setup.rounds else (2 + share) * sum(values.values()) * (stored + b)
        if full:  # gradients: written, read, added
            made += (5 if load.accumulates else 3) * setup.trained_bytes * sum(values.values())
        seconds += rates.makes * made / card.bandwidth
    return seconds + rates.layer_ms / 1e3


def _recomputed_values(layer: Layer, policy: LayerPolicy) -> float:
    """Values of the matrices that a fused layer's backward multiplies by once more."""
    found = 0.0
    for linear in layer.linears:
        name = linear.name
        if name in ("gate_proj", "up_proj", "gate_up_proj"):
            found += linear.values if "gate_up" not in policy.keep else 0
        elif name == "o_proj":
            found += linear.values if "middle" not in policy.keep else 0
        elif name != "down_proj":
            found += linear.values if "qkv" not in policy.keep else 0
    return found


def _product_seconds(values: float, tokens: int, value_bytes: int, card: Card, share: float) -> float:
    """Products of `tokens` rows with `values` weights: arithmetic, or reading the weights."""
    flops = card.flops if value_bytes == 2 else card.flops / 2  # fp32 weights go through TF32 at half the rate
    return max(2 * values * tokens / (flops * share), values * value_bytes / (card.bandwidth * BANDWIDTH))


def optimizer_seconds(shape: ModelShape, setup: Setup, card: Card, host: float = 1.0) -> float:
    """Seconds of clipping and of the optimizer's step: each trainable value is read and written with its moments."""
    # bitsandbytes' 8-bit kernel looks its codes up: it takes as long as if its 4 bytes of moments were 30.
    state = 30 if "8bit" in setup.optimizer else 16
    a_value = 4 + 8 + 4 + 8 + state  # the norm, the clipping, the gradient, the weight, its two moments
    if setup.rounds:
        return (ROUNDED_BYTES + state) * trainable_values(shape, setup) / (card.bandwidth * BANDWIDTH)
    tensors = 1
    if setup.method == "full":
        tensors = 2 + sum(count * (len(layer.linears) + 2) for count, layer in shape.layers)
    waited = sum(ms for name, ms in TENSOR_MS.items() if name in setup.optimizer)
    return a_value * trainable_values(shape, setup) / (card.bandwidth * BANDWIDTH) + host * tensors * waited / 1e3
