"""What a training step needs, by arithmetic on the model's shape: how much memory, and of which kind. Imports no PyTorch.

The peak of a step is the largest of a few moments: the head's, when everything that layers keep is there and logits
besides; the backward of a layer, when what it computes again is there; in full fine-tuning the end of the backward, when all
gradients are. Every term below was read off the code, and measured moment by moment on an H100 (benchmarks/planner.py,
docs/planner.md). Memory is what PyTorch has allocated; what it has reserved, and the CUDA context, come on top.

Legend: T tokens of a micro-batch, D hidden, F intermediate features of a token, b bytes of a value in the compute type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from tunesmith.kernels.chunks import STEPPED_BYTES, STEPPED_VALUES, chunk_rows, padded
from tunesmith.memory.shape import EAGER, Layer, ModelShape
from tunesmith.types import GB, LAYER_TENSORS, LayerPolicy

STATE_BYTES = {"adamw": 8.0, "paged_adamw_32bit": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}
"""Optimizer state in bytes a trainable parameter: two moments of 32 bits, or of 8 and an fp32 scale for each 256 of them.
Paged states are managed memory, and count: a plan that fits needs no paging."""

CONTEXT_GB = 0.85
"""CUDA's context with PyTorch's libraries: 0.82 to 0.85 GB on an H100, beside what PyTorch reserves."""

WORKSPACE_GB = 0.065
"""cuBLAS's two workspaces of 32 MB on an H100, and small tensors."""

MLP_ROWS, MLP_PIECES = 4096, 4
"""Under `min` the MLP takes a quarter of the tokens at a time, but no fewer than 4,096: pieces share their dequantized
weights, which are as large as the activations of so many tokens."""

MULTIPROCESSORS = 132
"""Of an H100: the GLU backward leaves sums for each of its programs, a few for each of these."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is trained, as far as memory depends on it.

    `value_bytes` is the compute type's size. `r` is 0 without an adapter, `targets` is `adapter.target_modules`. `scheme` is
    the quantization of the base (None: none). `grouped` says whether the card's attention takes keys that several queries
    share (models/attention.py); where not, the reference engine repeats them. `dora` is the reference engine's alone.
    `weights_dtype` is that of weights and gradients in full fine-tuning.
    `modules_to_save` train in full beside an adapter, and so many rows of `new_tokens`.
    """

    method: Literal["lora", "qlora", "full"] = "lora"
    engine: Literal["reference", "fused"] = "reference"
    value_bytes: int = 2
    r: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    optimizer: str = "adamw"
    scheme: Literal["nf4", "fp4", "int8"] | None = None
    double_quant: bool = True
    grouped: bool = True
    dora: bool = False
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    modules_to_save: tuple[str, ...] = ()
    new_tokens: int = 0

    @property
    def rounds(self) -> bool:
        """Whether weights are kept in bf16, and rounded by each step (training/rounding.py)."""
        return self.method == "full" and self.weights_dtype == "bf16"

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trainable value, and of its gradient."""
        return 2 if self.rounds else 4

    @property
    def casts(self) -> bool:
        """Whether weights are trained in another type than products are computed in."""
        return self.method == "full" and self.trained_bytes != self.value_bytes

    def hidden_bytes(self, shape: ModelShape) -> int:
        """Bytes of a value of the hidden states, which are in the embedding's type: fp32 where that is trained in fp32."""
        if self.method == "full":
            return self.trained_bytes
        return 4 if shape.saved(self.modules_to_save).embeddings else self.value_bytes

    def trains_head(self, shape: ModelShape) -> bool:
        """Whether the loss makes a gradient of the head: of all of it, or of a copy with the rows of new tokens."""
        return self.method == "full" or self.new_tokens > 0 or shape.saved(self.modules_to_save).head

    @property
    def slot(self) -> int:
        """Columns of an adapter in the fused engine's operands."""
        return max(16, 1 << (self.r - 1).bit_length()) if self.r else 0


@dataclass(frozen=True, slots=True)
class Load:
    """What the data makes of a step: tokens of the largest micro-batch (with padding), how many of them are supervised,
    the longest sequence, and whether a step has several micro-batches (gradients then wait while activations are there).
    `masked` is the length of the rows where they need an attention mask, being packed or padded; 0 if none does.
    """

    tokens: int
    supervised: int
    sequence: int
    accumulates: bool = True
    masked: int = 0


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Memory at the peak in GB, by kind. `context_gb` is the driver's, and no part of the peak."""

    weights_gb: float = 0.0
    adapter_gb: float = 0.0
    gradients_gb: float = 0.0
    optimizer_gb: float = 0.0
    activations_gb: float = 0.0
    logits_gb: float = 0.0
    workspace_gb: float = 0.0
    context_gb: float = 0.0

    @property
    def peak_gb(self) -> float:
        """The peak of what PyTorch allocates."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.context_gb


def weight_bytes(shape: ModelShape, setup: Setup) -> float:
    """Bytes of the base model as it is stored for training.

    Trainable weights are fp32, or bf16. bitsandbytes quantizes the decoder's linear layers: 4 bits a value with a scale for each 64
    (8 bits with double quantization, and fp32 for each 256 of those), or 8 bits with an fp32 scale a row.
    """
    if setup.method == "full":
        return float(setup.trained_bytes * shape.num_parameters)
    if setup.scheme is None:
        return float(setup.value_bytes * shape.num_parameters)
    linear = shape.linear_values
    if setup.scheme == "int8":
        rows = sum(count * item.outputs for count, layer in shape.layers for item in layer.linears)
        quantized = linear + 4.0 * rows
    else:
        blocks = linear / 64
        quantized = linear / 2 + (blocks * (1 + 4 / 256) if setup.double_quant else blocks * 4)
    return quantized + setup.value_bytes * (shape.num_parameters - linear)


def trainable_values(shape: ModelShape, setup: Setup) -> int:
    """Trainable parameters: the adapter's with what trains beside it, or all."""
    if setup.method == "full":
        return shape.num_parameters
    saved = shape.saved(setup.modules_to_save)
    ends = (not saved.embeddings) + (not saved.head and not shape.tied)
    rows = setup.new_tokens * shape.hidden_size * ends
    return shape.adapter_values(setup.r, setup.targets, setup.dora) + saved.values + rows


def fused_tensors(shape: ModelShape, layer: Layer, setup: Setup) -> dict[str, int]:
    """Bytes a token of what a fused layer can keep, of its input (`hidden`) and of what it always keeps (`slots`), by name."""
    b, slot = setup.value_bytes, setup.slot if setup.method != "full" else 0
    hidden = shape.hidden_size * setup.hidden_bytes(shape)
    found = {
        "hidden": hidden,
        "slots": b * 2 * slot,
        "qkv": b * (shape.query_size + shape.kv_size + 3 * slot),
        "attention": b * shape.attention_size + 4 * shape.num_heads,  # with the softmax's logsumexp
        "middle": hidden,
        "gate_up": b * (2 * layer.mlp_width + 2 * slot),
    }
    if shape.post_norms:  # with the S beside them
        found |= dict.fromkeys(("attention_output", "mlp_output"), b * (shape.hidden_size + slot))
    return found


def reference_bytes(shape: ModelShape, layer: Layer, setup: Setup, sequence: int, masked: int = 0) -> int:
    """Bytes a token that autograd saves of one of transformers' decoder layers with PEFT's adapters, under autocast.

    Each norm keeps its input in fp32, and for its readers its output; attention keeps q, k, v and its
    result; the MLP keeps gate, act(gate), up and their product. With trainable weights norms keep the normed
    input too, in the weight's type (Gemma: in fp32); in fp32 autocast casts it once for each matrix that reads it. Norms of heads
    keep their input in fp32.
    Eager attention (soft-capped scores) keeps rows of scores. With a mask, over rows of `masked` tokens, sdpa has each layer
    make one of its own in the compute type, and keys and values are repeated for each query head.
    """
    b, hidden = setup.value_bytes, shape.hidden_size
    norms = 4 if shape.post_norms else 2
    full = setup.method == "full"
    readers = 2 if shape.model_type == "phi3" else 5
    copies = readers if setup.casts else 2
    normed = 0 if not full else 4 if shape.post_norms else setup.trained_bytes
    found = norms * hidden * (4 + normed) + copies * hidden * b
    keys = shape.num_kv_heads * shape.head_dim
    if shape.head_norms:
        weighted = 4 if shape.post_norms else b  # Gemma multiplies by the weight in fp32
        found += (shape.query_size + keys) * (4 + (weighted if full else 0))
    found += b * (shape.query_size + shape.kv_size + shape.attention_size)
    eager = shape.model_type in EAGER
    # One head for all is repeated without a copy.
    repeated = 1 < shape.num_kv_heads < shape.num_heads and (eager or bool(masked) or not setup.grouped)
    if shape.model_type == "phi3":  # values are a view of the joint projection, which stays whole; the result is copied
        found += b * (shape.attention_size + (0 if repeated else shape.query_size + keys))
    if repeated:  # once for each query head
        found += b * (shape.query_size + shape.attention_size - shape.kv_size)
    if eager:  # scores with their cap, their softmax
        found += 8 * shape.num_heads * sequence
    elif masked:
        found += b * masked
    found += b * 4 * layer.mlp_width
    found += 2 * b * hidden * layer.active_experts  # each one's input and output
    if not full and setup.r:
        found += b * setup.r * len(layer.linears)
    if setup.dora:  # each layer's own output and the adapter's, which the magnitudes multiply
        found += 2 * b * sum(linear.outputs for linear in layer.linears)
    return found


def expert_copies(shape: ModelShape, layer: Layer, setup: Setup) -> float:
    """Bytes of W + s·B·A of all adapted experts of a layer: PEFT makes them whole, whichever experts the tokens meet, and autograd
    keeps them for the inputs' gradients.
    """
    if setup.method == "full" or not setup.r:
        return 0.0
    values = sum(expert.values for expert in shape.adapted_experts(layer, setup.targets))
    return float(setup.value_bytes * layer.num_experts * values)


class Estimate:
    """Memory of one setup under one load: the peak of any plan.

    `weights_gb` (of the base) and `trainable` (how many parameters train) may be given as they are in a loaded model.
    """

    def __init__(
        self,
        shape: ModelShape,
        setup: Setup,
        load: Load,
        weights_gb: float | None = None,
        trainable: int | None = None,
    ):
        self.shape, self.setup, self.load = shape, setup, load
        self.layers = [layer for count, layer in shape.layers for _ in range(count)]
        self.sizes = {id(layer): fused_tensors(shape, layer, setup) for _, layer in shape.layers}
        values = trainable_values(shape, setup) if trainable is None else trainable
        self.whole = values if setup.method == "full" else shape.saved(setup.modules_to_save).values
        lora = values - self.whole
        adapter = 0.0 if setup.method == "full" else 4.0 * values
        if setup.method != "full" and setup.engine == "fused":  # once more in the operands, as wide as their slots
            adapter += setup.value_bytes * lora * setup.slot / setup.r
        waiting = lora
        if setup.method != "full" and setup.engine == "reference":
            adapter += setup.value_bytes % 4 * lora  # autocast's copies, as long as the forward or its graph lives
            waiting *= 2 if load.accumulates else 1  # each tensor's gradient, and the flat one that the optimizer reads
        waiting += self.whole if load.accumulates else 0
        self.static = Breakdown(
            weights_gb=weight_bytes(shape, setup) / GB if weights_gb is None else weights_gb,
            adapter_gb=adapter / GB,
            gradients_gb=setup.trained_bytes * waiting / GB,
            optimizer_gb=STATE_BYTES[setup.optimizer] * values / GB,
            workspace_gb=WORKSPACE_GB,
            context_gb=CONTEXT_GB,
        )

    def _with(self, activations: float, logits: float = 0.0, gradients: float = 0.0) -> Breakdown:
        return replace(
            self.static,
            activations_gb=activations / GB,
            logits_gb=logits / GB,
            gradients_gb=self.static.gradients_gb + gradients / GB,
        )

    def _moments(self, stored: float, backward: float, loss_rows: int | None) -> Breakdown:
        """The largest of: the head, a layer's backward (bytes of activations then), and the end of the backward."""
        shape, setup, load = self.shape, self.setup, self.load
        wide = shape.hidden_size * setup.hidden_bytes(shape)
        rows = chunk_rows(load.supervised, shape.vocab_size, setup.value_bytes) if loss_rows is None else loss_rows
        logits = min(rows, load.supervised) * padded(shape.vocab_size) * setup.value_bytes
        ends = 2 * load.tokens * wide  # the last layer's output, and that normed
        at_head = stored + ends + 2 * load.supervised * wide
        if not self.whole and not setup.new_tokens:
            return max(self._with(at_head, logits), self._with(backward), key=lambda moment: moment.peak_gb)
        trained, embedding = setup.trained_bytes, shape.embedding_values
        head_sum = head_copy = head_gradient = 0.0
        if setup.trains_head(shape):
            # Made in the forward, in fp32 whatever the weight is (kernels/linear_cross_entropy.py).
            head_sum, head_gradient = 4.0 * embedding, float(trained * embedding)
            head_copy = embedding * setup.value_bytes if setup.value_bytes != trained else 0.0
        if setup.new_tokens:  # PEFT copies the head to put the rows of new tokens in
            head_copy = embedding * setup.value_bytes
        saved = shape.saved(setup.modules_to_save)
        new = 0.0 if load.accumulates else float(trained * self.whole)
        again = 0.0
        if (setup.method == "full" or saved.embeddings) and (shape.tied or load.accumulates):
            again = float(trained * embedding)  # before it is added
        elif setup.new_tokens and not saved.embeddings:
            again = float(setup.value_bytes * embedding)  # of the copy, of which rows are taken
        layer_gradient = 0.0
        if setup.rounds and setup.engine == "fused":  # of all its matrices, before they are added
            layer_gradient = trained * max(layer.values for layer in self.layers)
        moments = [
            self._with(at_head, logits + head_copy, head_sum),
            self._with(backward, gradients=head_gradient + layer_gradient),
            self._with(2.0 * load.tokens * wide, gradients=new + again),
        ]
        if setup.rounds:
            moments.append(self._with(at_head, gradients=head_sum + head_gradient))  # the sum, rounded
            stepping = self._with(0.0, gradients=new)
            workspace = STEPPED_BYTES * min(self.whole, STEPPED_VALUES) / GB
            moments.append(replace(stepping, workspace_gb=stepping.workspace_gb + workspace))
        return max(moments, key=lambda moment: moment.peak_gb)

    # -- the reference engine -------------------------------------------------------------------------------------------

    def reference(self, recompute_layers: int = 0) -> Breakdown:
        """The peak with the model's own modules; the first `recompute_layers` layers run under checkpointing."""
        shape, setup, load = self.shape, self.setup, self.load
        wide = shape.hidden_size * setup.hidden_bytes(shape)
        copies = 0.0
        if setup.casts:  # autocast's copies of the weights that layers read
            copies = float(setup.value_bytes * (shape.num_parameters - shape.embedding_values))
        stored, backward = copies, 0.0
        for index, layer in enumerate(self.layers):
            kept: float = load.tokens * reference_bytes(shape, layer, setup, load.sequence, load.masked)
            inner = load.tokens * (layer.mlp_width * setup.value_bytes + wide)
            operand = self._largest_operand(layer)
            copied = expert_copies(shape, layer, setup)
            kept += copied
            operand += copied  # their gradient, before it is B's and A's
            if index < recompute_layers:
                stored += load.tokens * wide
                backward = max(backward, stored - copies + kept + inner + operand)
            else:
                stored += kept
                backward = max(backward, stored + 2 * inner + operand)
        return self._moments(stored, backward, None)

    def _largest_operand(self, layer: Layer) -> float:
        """Bytes of the largest matrix of a layer, dequantized or cast for its product.

        With DoRA PEFT makes B·A by sending an identity matrix through the adapter (in fp32, and cast), beside the weights, B·A and
        their sum.
        """
        b = self.setup.value_bytes
        if self.setup.dora:
            identity = 4 if b == 4 else 4 + b
            return float(max(identity * linear.inputs**2 + 3 * b * linear.values for linear in layer.linears))
        if self.setup.method == "lora":
            return 0.0
        return float(b * max(linear.values for linear in layer.linears))

    # -- the fused engine -----------------------------------------------------------------------------------------------

    def fused(self, policies: Sequence[LayerPolicy], loss_rows: int | None) -> Breakdown:
        """The peak with fused layers, each with its policy."""
        tokens = self.load.tokens
        stored = backward = 0.0
        known: dict[tuple[int, int], tuple[float, float, float]] = {}  # layers that are alike share objects
        if any(policy.offload_input for policy in policies):  # one is on its way while the next layer runs
            stored = tokens * self.sizes[id(self.layers[0])]["hidden"]
        for layer, policy in zip(self.layers, policies, strict=True):
            key = (id(layer), id(policy))
            if key not in known:
                sizes = self.sizes[id(layer)]
                kept = sum(sizes.get(name, 0) for name in policy.keep) + sizes["slots"]
                copied = expert_copies(self.shape, layer, self.setup)  # and their gradient, before it is B's and A's
                needed = self._backward_bytes(layer, policy) + copied
                known[key] = (tokens * kept + copied, tokens * sizes["hidden"], needed)
            kept_bytes, hidden, needed = known[key]
            stored += kept_bytes
            if not policy.offload_input:
                stored += hidden
            backward = max(backward, stored + needed)
        return self._moments(stored, backward, loss_rows)

    def _backward_bytes(self, layer: Layer, policy: LayerPolicy) -> float:
        """Bytes that a layer's backward has at its peak, beside what layers keep."""
        sizes, tokens, b = self.sizes[id(layer)], self.load.tokens, self.setup.value_bytes
        hidden = self.shape.hidden_size
        slot = sizes["slots"] // (2 * b)
        around = 2 * sizes["hidden"] + b * slot  # the gradients of its output and of its middle
        missing = {name: 0 if name in policy.keep else sizes.get(name, 0) for name in LAYER_TENSORS}
        missing["middle"] += sizes["hidden"] if policy.offload_input else 0  # its input, back from the host
        attention = around + missing["qkv"] + missing["attention"] + b * self.shape.attention_size
        attention += b * (self.shape.query_size + self.shape.kv_size) + sizes["qkv"]
        mlp = around + sum(size for name, size in missing.items() if name != "gate_up")
        return max(
            tokens * attention, tokens * mlp + self._mlp_bytes(layer, policy.mlp_rows, missing["gate_up"], slot, hidden)
        )

    def _mlp_bytes(self, layer: Layer, mlp_rows: int | None, gate_up: int, slot: int, hidden: int) -> float:
        """Bytes of an MLP's backward: gate and up if they are computed again, and the largest of its three stages."""
        b, width, tokens = self.setup.value_bytes, layer.mlp_width, self.load.tokens
        rows = tokens if mlp_rows is None or not gate_up else min(mlp_rows, tokens)
        matrix = width * hidden * b if self.setup.method != "lora" and not self.setup.rounds else 0
        parts = self._partial_sums(width, rows, slot)
        if rows < tokens:  # pieces hold both operands
            return rows * (gate_up + b * width) + parts + 3 * matrix
        product = rows * b * width + matrix
        elementwise = rows * b * width + parts
        inputs = 2 * rows * b * hidden + 2 * matrix
        return rows * gate_up + max(product, elementwise, inputs)

    @staticmethod
    def _partial_sums(width: int, rows: int, slot: int) -> float:
        """Bytes of the parts of dS, dB and dA that programs of the GLU backward leave (kernels/glu.py)."""
        if not slot:
            return 0.0
        block = 64 if slot <= 16 else 32
        blocks = -(-width // block)
        parts = max(1, min(-(-4 * MULTIPROCESSORS // blocks), rows // (8 * block)))
        return 2 * blocks * rows * 2 * slot + 4.0 * parts * 3 * width * slot

    def mlp_rows(self) -> int:
        """Tokens that an MLP takes at a time where memory is short; all of them, if pieces would need more."""
        tokens = self.load.tokens
        layer = max(self.layers, key=lambda layer: layer.mlp_width)
        sizes = self.sizes[id(layer)]
        slot = sizes["slots"] // (2 * self.setup.value_bytes)
        rows = max(MLP_ROWS, -(-tokens // MLP_PIECES))
        if rows >= tokens:
            return tokens

        def needed(rows: int) -> float:
            return self._mlp_bytes(layer, rows, sizes["gate_up"], slot, self.shape.hidden_size)

        return min(tokens, rows, key=needed)
