"""What a step needs: weights as they are loaded, what autograd really saves of a layer, and the peak by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models_of import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from tiny import make_tiny_model
from tunesmith.config import AdapterConfig, ModelConfig, QuantizationConfig
from tunesmith.hardware import ComputeDType, Hardware, probe, torch_dtype
from tunesmith.memory import estimate as module
from tunesmith.memory.estimate import (
    STATE_BYTES,
    WORKSPACE_GB,
    Breakdown,
    Estimate,
    Load,
    Setup,
    fused_tensors,
    reference_bytes,
    trainable_values,
    weight_bytes,
)
from tunesmith.memory.shape import ModelShape
from tunesmith.models.adapters import add_adapter, weights_gb
from tunesmith.models.attention import REPEATED, implementation
from tunesmith.models.load import find_model, load_model
from tunesmith.training.prepare import prepare
from tunesmith.types import GB, LayerPolicy, MemoryPlan

# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each matrix has whole blocks of 64 values, and whole blocks of 256 of their scales: nothing is rounded up."""
    return make_tiny_model(
        tmp_path_factory.mktemp("estimate") / "model", hidden=128, kv_heads=4, tie_word_embeddings=request.param
    )


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("bf16", None),
        ("fp32", None),
        ("bf16", QuantizationConfig(scheme="nf4", double_quant=True)),
        ("bf16", QuantizationConfig(scheme="nf4", double_quant=False)),
        ("bf16", QuantizationConfig(scheme="fp4")),
        ("fp32", QuantizationConfig(scheme="nf4")),
        ("bf16", QuantizationConfig(scheme="int8")),
    ],
)
def test_weights_take_what_a_loaded_model_takes(
    folder: Path, dtype: ComputeDType, quantization: QuantizationConfig | None
) -> None:
    config = ModelConfig(name=str(folder))
    model = load_model(find_model(config), config, probe("cpu"), dtype, quantization)
    shape = ModelShape.of(model.config.to_dict())
    setup = Setup("lora", value_bytes=4 if dtype == "fp32" else 2)
    if quantization is not None:
        setup = replace(setup, method="qlora", scheme=quantization.scheme, double_quant=quantization.double_quant)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())  # RoPE's frequencies
    found = weights_gb(model) * GB - buffers
    assert weight_bytes(shape, setup) == found


def test_trainable_weights_are_in_fp32_or_bf16() -> None:
    for value_bytes in (2, 4):
        assert weight_bytes(SHAPE, Setup("full", value_bytes=value_bytes)) == 4 * 432_047_104
    assert weight_bytes(SHAPE, BF16) == 2 * 432_047_104
    assert weight_bytes(SHAPE, Setup("lora", value_bytes=4, weights_dtype="bf16")) == 4 * 432_047_104, "full's alone"


# -- what autograd saves ----------------------------------------------------------------------------------------------

BF16 = Setup("full", "reference", 2, 0, optimizer="adamw_8bit", weights_dtype="bf16")

T4 = Hardware("cuda:0", "Tesla T4", 14.6, False, (7, 5))

TOKENS = 97
"""A prime: a tensor is an activation if its size is a multiple of it, as no size of the models is."""


def saved_bytes(
    family: str,
    method: str,
    dtype: ComputeDType,
    attention: str = "sdpa",
    masked: bool = False,
    dora: bool = False,
    weights: ComputeDType = "fp32",
) -> tuple[ModelShape, float, float]:
    """The shape of a model, and bytes that a forward of its only layer saves: activations a token, and everything else.

    As training runs it: prepared, the base in the compute type with an adapter of rank 4, or in `weights` for full fine-tuning;
    scores that are soft-capped with eager attention. Parameters are not counted, and tensors that share memory once.
    """
    settings = {
        **FAMILIES[family],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 208,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "attn_implementation": "eager" if family == "gemma2" else attention,
    }
    if "head_dim" in settings:
        settings["head_dim"] = 24
    settings.pop("layer_types", None)
    config = AutoConfig.for_model(family, **settings)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(weights if method == "full" else dtype))
    if method != "full":
        model = add_adapter(model, AdapterConfig(r=4, dora=dora), "base")
    model.train()
    prepare(model, MemoryPlan("fast", 0, 1, None, None, ""))
    decoder = (model.get_base_model() if method != "full" else model).get_decoder()
    layer = decoder.layers[0]
    hidden = torch.randn(2, TOKENS, 64, dtype=next(layer.parameters()).dtype, requires_grad=True)
    positions = torch.arange(TOKENS)[None]
    kinds = ("sliding_attention",) if family == "gemma3_text" else ()
    rotary = decoder.rotary_emb(hidden, positions, *kinds)
    mask = None
    if family == "gemma2":
        mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1).to(hidden.dtype)[None, None]
    elif masked:
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *rotary)}
    storages: dict[int, torch.UntypedStorage] = {}

    def look(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
    ):
        layer(hidden, position_embeddings=rotary, attention_mask=mask, position_ids=positions)
    sizes = [storage.nbytes() for storage in storages.values()]
    activations = sum(size for size in sizes if size % TOKENS == 0)
    return ModelShape.of(config.to_dict()), activations / (2 * TOKENS), sum(sizes) - activations


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"])
def test_a_layer_saves_what_the_arithmetic_says(family: str, method: Any, dtype: ComputeDType) -> None:
    """To the byte, but for what the arithmetic leaves out: an fp32 number a head or a norm, under 1% of real layers.

    On the CPU, where only attention has a kernel of its own; it saves q, k, v, its result and a logsumexp, as flash attention
    does on a GPU. Llama's and Qwen2's peaks on an H100 agree with the same arithmetic (test_measured.py).
    """
    shape, activations, _ = saved_bytes(family, method, dtype)
    setup = Setup(method, "reference", 4 if dtype == "fp32" else 2, 4 if method == "lora" else 0)
    expected = reference_bytes(shape, shape.layers[0][1], setup, TOKENS)
    norms = 4 if shape.post_norms else 2
    if family in ("qwen3", "gemma3_text"):
        norms += shape.num_heads + shape.num_kv_heads
    small = 4 * norms + (0 if family == "gemma2" else 4 * shape.num_heads)  # 1 / rms, and the softmax's logsumexp
    assert activations == expected + small


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"])
def test_a_layer_with_weights_in_bf16_saves_what_the_arithmetic_says(family: str) -> None:
    """To the byte, as above; and no weight is cast (Gemma's norms make 1 + weight in fp32)."""
    shape, activations, copies = saved_bytes(family, "full", "bf16", weights="bf16")
    expected = reference_bytes(shape, shape.layers[0][1], BF16, TOKENS)
    norms = 4 if shape.post_norms else 2
    if family in ("qwen3", "gemma3_text"):
        norms += shape.num_heads + shape.num_kv_heads
    assert activations == expected + 4 * norms + (0 if family == "gemma2" else 4 * shape.num_heads)
    assert copies == (4 * 4 * 64 + (4 * 2 * shape.head_dim if shape.head_norms else 0) if shape.post_norms else 0)
    assert expected < reference_bytes(shape, shape.layers[0][1], replace(BF16, weights_dtype="fp32"), TOKENS)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
@pytest.mark.parametrize("why", ["no kernel for shared keys", "a mask"])
def test_repeated_keys_and_masks_are_saved_as_the_arithmetic_says(family: str, dtype: ComputeDType, why: str) -> None:
    """Each query head has keys and values of its own; of a mask a layer saves T values a row in the compute type."""
    masked = why == "a mask"
    assert implementation("sdpa", T4, dtype) == REPEATED
    shape, activations, _ = saved_bytes(family, "lora", dtype, "sdpa" if masked else REPEATED, masked)
    plain = Setup("lora", "reference", 4 if dtype == "fp32" else 2, 4)
    usual = reference_bytes(shape, shape.layers[0][1], plain, TOKENS)
    setup = plain if masked else replace(plain, grouped=False)
    expected = reference_bytes(shape, shape.layers[0][1], setup, TOKENS, TOKENS if masked else 0)
    assert (expected != usual) == (masked or family != "gemma3_text"), "whose only head is repeated as a view"
    norms = 2 if not shape.post_norms else 4
    norms += shape.num_heads + shape.num_kv_heads if shape.head_norms else 0
    assert activations == expected + 4 * (norms + shape.num_heads)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_dora_saves_what_the_arithmetic_says(family: str, dtype: ComputeDType) -> None:
    shape, activations, _ = saved_bytes(family, "lora", dtype, dora=True)
    setup = Setup("lora", "reference", 4 if dtype == "fp32" else 2, 4, dora=True)
    expected = reference_bytes(shape, shape.layers[0][1], setup, TOKENS)
    assert expected > reference_bytes(shape, shape.layers[0][1], replace(setup, dora=False), TOKENS)
    assert activations == expected + 4 * (2 + shape.num_heads)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_autocast_copies_weights_as_the_arithmetic_says(family: str) -> None:
    """All matrices of a layer in full fine-tuning, the adapter's under LoRA; none in fp32."""
    shape, _, copies = saved_bytes(family, "full", "bf16")
    norms = 4 * 4 * 64 if shape.post_norms else 0  # 1 + weight, in fp32
    assert copies == 2 * shape.linear_values + norms
    shape, _, copies = saved_bytes(family, "lora", "bf16")
    assert copies == 2 * shape.adapter_values(4) + norms
    assert saved_bytes(family, "lora", "fp32")[2] == norms


# -- one shape, by hand -----------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32760,
}
SHAPE = ModelShape.of(CONFIG)
TIED = ModelShape.of({**CONFIG, "tie_word_embeddings": True})
LAYER = SHAPE.layers[0][1]
MATRICES = 2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096
EMBEDDING = 32760 * 1024
ADAPTER = 24 * 16 * (2 * 2048 + 2 * 1280 + 3 * 5120)
"""Parameters at rank 16."""


def in_gb(**parts: float) -> Breakdown:
    """A Breakdown of bytes."""
    found = {f"{name}_gb": size / GB for name, size in parts.items()}
    return Breakdown(**{"workspace_gb": WORKSPACE_GB, "context_gb": module.CONTEXT_GB, **found})


def near(found: Breakdown) -> dict[str, Any]:
    return {field.name: pytest.approx(getattr(found, field.name)) for field in fields(found)}


def values_of(found: Breakdown) -> dict[str, float]:
    return {field.name: getattr(found, field.name) for field in fields(found)}


def test_parameters_of_the_shape() -> None:
    assert SHAPE.num_parameters == 24 * (MATRICES + 2 * 1024) + 2 * EMBEDDING + 1024 == 432_047_104
    assert TIED.num_parameters == SHAPE.num_parameters - EMBEDDING
    assert trainable_values(SHAPE, Setup()) == ADAPTER == 8_454_144
    assert trainable_values(SHAPE, Setup(targets="qv")) == 24 * 16 * (2048 + 1280)
    assert trainable_values(SHAPE, Setup("full")) == SHAPE.num_parameters


@pytest.mark.parametrize(("r", "slot"), [(0, 0), (1, 16), (16, 16), (17, 32), (33, 64), (80, 128)])
def test_ranks_take_the_width_of_their_slot(r: int, slot: int) -> None:
    assert Setup(r=r).slot == slot
    assert fused_tensors(SHAPE, LAYER, Setup(r=r))["slots"] == 2 * 2 * slot


@pytest.mark.parametrize(
    ("scheme", "double_quant", "bytes_a_value"),
    [
        ("nf4", True, 0.5 + 1 / 64 + 4 / (64 * 256)),
        ("fp4", True, 0.5 + 1 / 64 + 4 / (64 * 256)),
        ("nf4", False, 0.5 + 4 / 64),
    ],
)
def test_quantized_weights_by_hand(scheme: Any, double_quant: bool, bytes_a_value: float) -> None:
    rest = SHAPE.num_parameters - 24 * MATRICES
    setup = Setup("qlora", scheme=scheme, double_quant=double_quant)
    assert weight_bytes(SHAPE, setup) == 24 * MATRICES * bytes_a_value + 2 * rest
    assert weight_bytes(SHAPE, replace(setup, value_bytes=4)) == 24 * MATRICES * bytes_a_value + 4 * rest


def test_int8_weights_have_a_scale_a_row() -> None:
    rows = 24 * (2 * 1024 + 2 * 256 + 2 * 4096 + 1024)
    rest = SHAPE.num_parameters - 24 * MATRICES
    assert weight_bytes(SHAPE, Setup("qlora", scheme="int8")) == 24 * MATRICES + 4 * rows + 2 * rest


# -- what is there all the time ---------------------------------------------------------------------------------------

FEW = Load(1, 1, 1, accumulates=False)


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_value"),
    [
        ("adamw", 8),  # two moments in fp32
        ("paged_adamw_32bit", 8),
        ("adamw_8bit", 2 + 2 * 4 / 256),  # two in a byte, each with an fp32 scale for 256 of them
        ("paged_adamw_8bit", 2 + 2 * 4 / 256),
    ],
)
def test_the_optimizers_moments(optimizer: str, bytes_a_value: float) -> None:
    for method, values in (("lora", ADAPTER), ("full", SHAPE.num_parameters)):
        found = Estimate(SHAPE, Setup(method, optimizer=optimizer), FEW).static
        assert found.optimizer_gb == values * bytes_a_value / GB


def test_every_optimizer_has_its_size() -> None:
    from typing import get_args

    from tunesmith.config import OptimizerConfig

    assert set(STATE_BYTES) == set(get_args(OptimizerConfig.model_fields["name"].annotation))


@pytest.mark.parametrize(
    ("r", "value_bytes", "operands"),
    [(16, 2, 2 * 1.0), (16, 4, 4 * 1.0), (8, 2, 2 * 2.0), (20, 2, 2 * 32 / 20)],
)
def test_fused_adapters_are_there_again_as_operands(r: int, value_bytes: int, operands: float) -> None:
    """In fp32 for the optimizer, and in the compute type, as wide as their slots, for the products."""
    found = Estimate(SHAPE, Setup("lora", "fused", value_bytes, r), FEW).static
    values = ADAPTER * r / 16
    assert found.adapter_gb == pytest.approx((4 + operands) * values / GB)
    assert found.gradients_gb == pytest.approx(4 * values / GB)


@pytest.mark.parametrize(("value_bytes", "copies"), [(2, 2), (4, 0)])
def test_the_reference_engines_adapters_are_cast_by_autocast(value_bytes: int, copies: int) -> None:
    found = Estimate(SHAPE, Setup("lora", "reference", value_bytes), FEW).static
    assert found.adapter_gb == (4 + copies) * ADAPTER / GB


@pytest.mark.parametrize(
    ("setup", "accumulates", "waiting"),
    [
        (Setup("lora", "reference"), False, 4 * ADAPTER),
        (Setup("lora", "reference"), True, 2 * 4 * ADAPTER),  # each tensor's own, and the flat one it is added to
        (Setup("qlora", "reference", scheme="nf4"), True, 2 * 4 * ADAPTER),
        (Setup("lora", "fused"), False, 4 * ADAPTER),
        (Setup("lora", "fused"), True, 4 * ADAPTER),  # written where the optimizer reads them
        (Setup("full", "reference"), False, 0),  # not there before the backward
        (Setup("full", "fused"), False, 0),
        (Setup("full", "reference"), True, 4 * SHAPE.num_parameters),
        (Setup("full", "fused"), True, 4 * SHAPE.num_parameters),
    ],
)
def test_gradients_that_wait_between_micro_batches(setup: Setup, accumulates: bool, waiting: int) -> None:
    found = Estimate(SHAPE, setup, replace(FEW, accumulates=accumulates)).static
    assert found.gradients_gb == waiting / GB


BOTH = ("lm_head", "embed_tokens")


@pytest.mark.parametrize(
    ("engine", "accumulates", "lora", "whole"),
    [("fused", False, 1, 0), ("fused", True, 1, 1), ("reference", False, 1, 0), ("reference", True, 2, 1)],
)
def test_modules_beside_an_adapter_are_there_in_fp32_and_their_gradients_come_late(
    engine: Any, accumulates: bool, lora: int, whole: int
) -> None:
    """Weights, moments and, where they wait, gradients of each value; LoRA's alone are there again as operands or casts."""
    setup = Setup("lora", engine, modules_to_save=BOTH)
    found = Estimate(SHAPE, setup, replace(FEW, accumulates=accumulates)).static
    beside = 2 * EMBEDDING
    assert trainable_values(SHAPE, setup) == ADAPTER + beside
    assert found.weights_gb == 2 * SHAPE.num_parameters / GB, "the frozen ones stay"
    assert found.adapter_gb == pytest.approx((4 * beside + 6 * ADAPTER) / GB)
    assert found.optimizer_gb == 8 * (ADAPTER + beside) / GB
    assert found.gradients_gb == (4 * lora * ADAPTER + 4 * whole * beside) / GB


@pytest.mark.parametrize(
    ("shape", "setup", "rows"),
    [
        (SHAPE, Setup(new_tokens=3), 2 * 3 * 1024),
        (TIED, Setup(new_tokens=3), 3 * 1024),
        (SHAPE, Setup(new_tokens=3, modules_to_save=("lm_head",)), 3 * 1024 + EMBEDDING),
        (TIED, Setup(new_tokens=3, modules_to_save=("lm_head",)), EMBEDDING),
    ],
)
def test_rows_of_new_tokens_train_where_nothing_else_does(shape: ModelShape, setup: Setup, rows: int) -> None:
    assert trainable_values(shape, setup) == ADAPTER + rows


def test_a_loaded_models_own_numbers_count() -> None:
    found = Estimate(SHAPE, Setup("lora", "fused"), FEW, weights_gb=7.5, trainable=1_000_000).static
    assert values_of(found) == near(
        replace(in_gb(adapter=6e6, gradients=4e6, optimizer=8e6), weights_gb=7.5),
    )


def test_the_peak_is_all_but_the_drivers_part() -> None:
    parts = Breakdown(1, 2, 4, 8, 16, 32, 64, 128)
    assert parts.peak_gb == 127


# -- the head, and the end of the backward ----------------------------------------------------------------------------

KEEP_ALL = (LayerPolicy(),) * 24


def test_the_heads_moment() -> None:
    """Few tokens, all supervised: logits outweigh a layer. They are padded to 32,768 values a row."""
    load = Load(64, 64, 64, accumulates=False)
    found = Estimate(SHAPE, Setup("lora", "fused"), load).fused(KEEP_ALL, None)
    kept = 2048 + 64 + 2 * (1536 + 48) + 2 * 1024 + 64 + 2048 + 2 * (8192 + 32)
    ends = 2 * 64 * 2048 + 2 * 64 * 2048  # the last layer's output and that normed; supervised rows and their gradient
    assert values_of(found) == near(
        in_gb(
            weights=2 * SHAPE.num_parameters,
            adapter=(4 + 2) * ADAPTER,
            gradients=4 * ADAPTER,
            optimizer=8 * ADAPTER,
            activations=24 * 64 * kept + ends,
            logits=64 * 32768 * 2,
        )
    )


@pytest.mark.parametrize(
    ("supervised", "loss_rows", "rows"),
    [
        (100, None, 100),
        (8192, None, 8192),  # 2^29 bytes of 32,768 values in 16 bits
        (10_000, None, 5120),  # two chunks, of whole 128 rows
        (10_000, 512, 512),
        (100, 512, 100),
    ],
)
def test_only_a_chunk_of_logits_exists(supervised: int, loss_rows: int | None, rows: int) -> None:
    estimate = Estimate(SHAPE, Setup("lora", "fused"), Load(10_000, supervised, 10_000, False))
    found = estimate._moments(1e12, 0.0, loss_rows)
    assert found.logits_gb == rows * 32768 * 2 / GB
    assert found.activations_gb == pytest.approx((1e12 + 2 * 10_000 * 2048 + 2 * supervised * 2048) / GB)


@pytest.mark.parametrize(("value_bytes", "copy"), [(2, 2 * EMBEDDING), (4, 0)])
def test_a_head_that_trains_has_its_gradient_and_its_cast_with_the_logits(value_bytes: int, copy: int) -> None:
    load = Load(64, 64, 64, accumulates=False)
    found = Estimate(SHAPE, Setup("full", "fused", value_bytes, 0), load)._moments(1e12, 0.0, None)
    assert found.logits_gb == pytest.approx((64 * 32768 * value_bytes + copy) / GB)
    assert found.gradients_gb == 4 * EMBEDDING / GB
    assert found.activations_gb == pytest.approx((1e12 + 4 * 64 * 4096) / GB), "hidden states are in fp32"


def test_the_heads_gradient_waits_while_layers_run_backwards() -> None:
    load = Load(64, 64, 64, accumulates=False)
    full = Estimate(SHAPE, Setup("full", "fused", 2, 0), load)._moments(0.0, 1e12, None)
    assert (full.activations_gb, full.logits_gb, full.gradients_gb) == (1e12 / GB, 0, 4 * EMBEDDING / GB)
    lora = Estimate(SHAPE, Setup("lora", "fused"), load)._moments(0.0, 1e12, None)
    assert (lora.activations_gb, lora.gradients_gb) == (1e12 / GB, 4 * ADAPTER / GB)


@pytest.mark.parametrize(
    ("shape", "head_again"),
    [(SHAPE, 0), (TIED, 4 * EMBEDDING)],  # tied: the head's gradient is there before the embedding's is added to it
)
def test_the_end_of_the_backward_has_all_gradients(shape: ModelShape, head_again: int) -> None:
    """Few tokens: the peak is where every gradient is there, and no activation but the embedding's output and gradient."""
    found = Estimate(shape, Setup("full", "fused", 2, 0), Load(16, 16, 16, False)).fused(KEEP_ALL, None)
    assert values_of(found) == near(
        in_gb(
            weights=4 * shape.num_parameters,
            gradients=4 * shape.num_parameters + head_again,
            optimizer=8 * shape.num_parameters,
            activations=2 * 16 * 4096,
        )
    )


@pytest.mark.parametrize("shape", [SHAPE, TIED])
def test_where_gradients_wait_the_largest_is_there_twice(shape: ModelShape) -> None:
    """The head's new one, before it is added to the one that waits: with the logits, which decides."""
    found = Estimate(shape, Setup("full", "fused", 2, 0), Load(16, 16, 16, True))._moments(0.0, 0.0, None)
    assert found.gradients_gb == pytest.approx((4 * shape.num_parameters + 4 * EMBEDDING) / GB)
    assert found.logits_gb == pytest.approx((16 * 32768 * 2 + 2 * EMBEDDING) / GB)


# -- weights in bf16, by hand -----------------------------------------------------------------------------------------

STATES_8BIT = 2 + 2 * 4 / 256
"""Bytes a parameter: two moments of 8 bits, and a scale in fp32 for each 256 values of each."""

STEPPED = 9 * 2**24
"""The workspace of a step: weight and gradient in fp32 of 2^24 values at once, and a byte each for NaN."""


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("accumulates", [True, False])
def test_a_step_of_bf16_weights_by_hand(engine: Any, accumulates: bool) -> None:
    """Few tokens, and a vocabulary without weight: the peak is the optimizer's step, which has a workspace and no activations."""
    shape = ModelShape.of({**CONFIG, "vocab_size": 64})
    values = shape.num_parameters
    found = Estimate(shape, replace(BF16, engine=engine), Load(1, 1, 1, accumulates))._moments(0.0, 0.0, None)
    assert values_of(found) == near(
        in_gb(
            weights=2 * values,
            gradients=2 * values,
            optimizer=STATES_8BIT * values,
            workspace=WORKSPACE_GB * GB + STEPPED,
        )
    )


def test_the_workspace_of_a_small_model_is_as_small() -> None:
    shape = ModelShape.of({**CONFIG, "vocab_size": 64, "num_hidden_layers": 1})
    assert shape.num_parameters < 2**24
    found = Estimate(shape, BF16, Load(1, 1, 1, True))._moments(0.0, 0.0, None)
    assert found.workspace_gb == pytest.approx(WORKSPACE_GB + 9 * shape.num_parameters / GB)


def test_a_head_in_bf16_sums_its_gradient_in_fp32_and_rounds_it() -> None:
    load = Load(64, 64, 64, accumulates=False)
    found = Estimate(SHAPE, BF16, load)._moments(1e12, 0.0, None)
    assert found.gradients_gb == pytest.approx((4 + 2) * EMBEDDING / GB)
    assert found.logits_gb == 0, "they are gone when the sum is rounded"
    assert found.activations_gb == pytest.approx((1e12 + 4 * 64 * 2048) / GB, rel=1e-9), "hidden states are in bf16"
    many = Estimate(SHAPE, BF16, Load(8192, 8192, 8192, False))._moments(1e12, 0.0, 8192)
    assert many.gradients_gb == pytest.approx(4 * EMBEDDING / GB)
    assert many.logits_gb == pytest.approx(8192 * 32768 * 2 / GB), "these logits outweigh it, and nothing is cast"


@pytest.mark.parametrize(("engine", "new"), [("reference", 0), ("fused", 2 * (MATRICES + 2 * 1024))])
def test_gradients_of_a_layer_exist_before_they_are_added(engine: Any, new: int) -> None:
    found = Estimate(SHAPE, replace(BF16, engine=engine), Load(64, 64, 64, True))._moments(0.0, 1e12, None)
    assert found.gradients_gb == pytest.approx((2 * SHAPE.num_parameters + 2 * EMBEDDING + new) / GB)


def test_products_with_bf16_weights_make_no_operand() -> None:
    few = Load(512, 512, 512, True)
    setup = replace(BF16, engine="fused")
    assert Estimate(SHAPE, setup, few)._mlp_bytes(LAYER, None, 0, 0, 1024) == 2 * 512 * 4096
    none_kept = Estimate(SHAPE, BF16, few).reference(24)
    cast = Estimate(SHAPE, replace(BF16, weights_dtype="fp32"), few).reference(24)
    assert none_kept.peak_gb < cast.peak_gb - 2 * SHAPE.num_parameters / GB


LLAMA_8B = ModelShape.of(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)


def test_an_8b_model_trains_in_80_gb() -> None:
    """6 bytes a parameter are 45 GB; in fp32 with the same states 10 bytes are 75 GB, and nothing else would fit."""
    values = LLAMA_8B.num_parameters
    assert values == 8_030_261_248
    load = Load(16_384, 16_384, 4096, True)
    setup = replace(BF16, engine="fused")
    estimate = Estimate(LLAMA_8B, setup, load)
    assert estimate.static.weights_gb == pytest.approx(14.958, abs=1e-3)
    assert estimate.static.gradients_gb == pytest.approx(14.958, abs=1e-3)
    assert estimate.static.optimizer_gb == pytest.approx(15.191, abs=1e-3)
    nothing_kept = [LayerPolicy(keep=frozenset())] * 32
    assert 45.1 < estimate.fused(nothing_kept, None).peak_gb < 65 < 80 - module.CONTEXT_GB
    in_fp32 = Estimate(LLAMA_8B, replace(setup, weights_dtype="fp32"), load)
    assert in_fp32.fused(nothing_kept, None).peak_gb > 80


@pytest.mark.parametrize("saved", [BOTH, ("lm_head",), ("embed_tokens",)])
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_head_beside_an_adapter_has_its_gradient_with_the_logits(saved: tuple[str, ...], accumulates: bool) -> None:
    """As in full fine-tuning; embeddings that train keep hidden states in fp32."""
    setup = Setup("lora", "fused", modules_to_save=saved)
    found = Estimate(SHAPE, setup, Load(64, 64, 64, accumulates))._moments(1e12, 0.0, None)
    head, wide = "lm_head" in saved, 4 if "embed_tokens" in saved else 2
    assert found.logits_gb == pytest.approx((64 * 32768 * 2 + 2 * EMBEDDING * head) / GB)
    waiting = 4 * ADAPTER + 4 * EMBEDDING * len(saved) * accumulates
    assert found.gradients_gb == pytest.approx((waiting + 4 * EMBEDDING * head) / GB)
    assert found.activations_gb == pytest.approx((1e12 + 4 * 64 * 1024 * wide) / GB)


@pytest.mark.parametrize(("accumulates", "gradients"), [(False, 2), (True, 3)])
def test_embeddings_beside_an_adapter_end_the_backward(accumulates: bool, gradients: int) -> None:
    """Each gradient once, and with accumulation the embeddings' new one before it is added."""
    setup = Setup("lora", "fused", modules_to_save=BOTH)
    estimate = Estimate(SHAPE, setup, Load(1, 1, 1, accumulates))
    found = estimate._moments(0.0, 0.0, 1)
    assert found.gradients_gb == pytest.approx((4 * ADAPTER + 4 * gradients * EMBEDDING) / GB)


def test_new_tokens_copy_the_head_with_their_rows() -> None:
    found = Estimate(SHAPE, Setup("lora", "fused", new_tokens=2), Load(64, 64, 64, False))._moments(0.0, 0.0, None)
    assert found.logits_gb == pytest.approx((64 * 32768 * 2 + 2 * EMBEDDING) / GB)
    assert found.gradients_gb == pytest.approx((4 * (ADAPTER + 4 * 1024) + 4 * EMBEDDING) / GB)


def test_adapters_have_no_such_end() -> None:
    found = Estimate(SHAPE, Setup("lora", "fused"), Load(16, 16, 16, False))._moments(0.0, 0.0, None)
    assert found.gradients_gb == 4 * ADAPTER / GB
    assert found.logits_gb > 0, "the head, then"


# -- a layer's backward -----------------------------------------------------------------------------------------------

MATRIX = 4096 * 1024 * 2
"""Bytes of an MLP's matrix in 16 bits."""

GATE_UP = 2 * (2 * 4096 + 2 * 16)
"""Bytes a token of gate and up with their S."""


def parts(rows: int, slot: int) -> float:
    """The GLU backward's parts: dS for each block of 4,096 columns, in fp32 dA and dB for each program's rows."""
    block = 64 if slot == 16 else 32
    blocks = 4096 // block
    programs = min(-(-4 * 132 // blocks), rows // (8 * block)) or 1
    return 2 * blocks * rows * 2 * slot + 4 * programs * 3 * 4096 * slot


@pytest.mark.parametrize(("slot", "rows"), [(16, 100), (16, 1024), (16, 100_000), (32, 511), (32, 100_000), (64, 4096)])
def test_parts_of_the_glu_backward(slot: int, rows: int) -> None:
    assert Estimate._partial_sums(4096, rows, slot) == parts(rows, slot)
    assert Estimate._partial_sums(4096, rows, 0) == 0


def mlp_bytes(tokens: int, setup: Setup, mlp_rows: int | None = None, gate_up: int = 0) -> float:
    estimate = Estimate(SHAPE, setup, Load(tokens, tokens, tokens))
    slot = 0 if setup.method == "full" else setup.slot
    return estimate._mlp_bytes(LAYER, mlp_rows, gate_up, slot, 1024)


@pytest.mark.parametrize(
    ("tokens", "setup", "expected"),
    [
        # elementwise: the gradient of the activation's result, and the parts beside it
        (8192, Setup("lora", "fused"), 8192 * 8192 + parts(8192, 16)),
        (8192, Setup("lora", "fused", value_bytes=4), 2 * 8192 * 8192 + parts(8192, 16)),
        (8192, Setup("qlora", "fused", scheme="nf4"), 8192 * 8192 + parts(8192, 16)),
        # the product with the down projection, cast: no adapter, no parts
        (8192, Setup("full", "fused", r=0), 8192 * 8192 + MATRIX),
        # few tokens: both inputs' gradients and both matrices, dequantized or cast
        (512, Setup("qlora", "fused", scheme="nf4"), 2 * 512 * 2048 + 2 * MATRIX),
        (512, Setup("full", "fused", r=0), 2 * 512 * 2048 + 2 * MATRIX),
    ],
)
def test_stages_of_an_mlps_backward(tokens: int, setup: Setup, expected: float) -> None:
    assert mlp_bytes(tokens, setup) == expected
    assert mlp_bytes(tokens, setup, None, GATE_UP) == tokens * GATE_UP + expected, "gate and up, computed again"


@pytest.mark.parametrize(("setup", "matrices"), [(Setup("lora", "fused"), 0), (Setup("qlora", "fused"), 3)])
def test_an_mlp_in_pieces_holds_all_its_operands(setup: Setup, matrices: int) -> None:
    expected = 2048 * (GATE_UP + 8192) + parts(2048, 16) + matrices * MATRIX
    assert mlp_bytes(8192, setup, 2048, GATE_UP) == expected
    assert mlp_bytes(8192, setup, 2048, 0) == mlp_bytes(8192, setup), "pieces are for what is computed again"
    assert mlp_bytes(8192, setup, 9000, GATE_UP) == mlp_bytes(8192, setup, None, GATE_UP), "one piece"


@pytest.mark.parametrize(
    ("tokens", "setup", "rows"),
    [
        (4096, Setup("lora", "fused"), 4096),
        (5000, Setup("lora", "fused"), 4096),
        (16384, Setup("lora", "fused"), 4096),
        (20000, Setup("lora", "fused"), 5000),  # a quarter
        # Pieces hold one matrix more than the whole does: as much as 310 tokens more of 27,000 bytes each.
        (4200, Setup("qlora", "fused", scheme="nf4"), 4200),
        (4500, Setup("qlora", "fused", scheme="nf4"), 4500),
        (5000, Setup("qlora", "fused", scheme="nf4"), 4096),
    ],
)
def test_rows_of_an_mlp_where_memory_is_short(tokens: int, setup: Setup, rows: int) -> None:
    estimate = Estimate(SHAPE, setup, Load(tokens, tokens, tokens))
    assert estimate.mlp_rows() == rows
    assert mlp_bytes(tokens, setup, rows, GATE_UP) == min(
        mlp_bytes(tokens, setup, count, GATE_UP) for count in (tokens, max(4096, -(-tokens // 4)))
    )


# -- the reference engine ---------------------------------------------------------------------------------------------


def test_checkpointed_layers_are_computed_again_one_at_a_time() -> None:
    """By hand, QLoRA: a layer's input stays of each, all that one keeps comes back, and its largest matrix dequantized."""
    tokens = 8192
    estimate = Estimate(SHAPE, Setup("qlora", "reference", scheme="nf4"), Load(tokens, 1, tokens, False))
    kept = 2 * 1024 * 4 + 2 * 1024 * 2 + 2 * (1024 + 512 + 1024) + 2 * 4 * 4096 + 2 * 16 * 7
    inner = 2 * 4096 + 2048
    found = estimate.reference(24)
    assert found.activations_gb == pytest.approx((24 * tokens * 2048 + tokens * (kept + inner) + MATRIX) / GB)
    found = estimate.reference(23)
    assert found.activations_gb == pytest.approx((tokens * (23 * 2048 + kept + 2 * inner) + MATRIX) / GB)
    found = estimate.reference(0)
    assert found.activations_gb == pytest.approx((tokens * (24 * kept + 2 * inner) + MATRIX) / GB)
    assert Estimate(SHAPE, Setup("lora", "reference"), estimate.load).reference(24).activations_gb == pytest.approx(
        (24 * tokens * 2048 + tokens * (kept + inner)) / GB
    ), "weights in 16 bits are multiplied as they are"


@pytest.mark.parametrize(("value_bytes", "copies"), [(2, 2 * (432_047_104 - EMBEDDING)), (4, 0)])
def test_full_fine_tuning_keeps_autocasts_copies(value_bytes: int, copies: int) -> None:
    """Of every weight that is multiplied by, for as long as the forward lasts; a checkpointed layer lets go of its own."""
    setup = Setup("full", "reference", value_bytes, 0)
    estimate = Estimate(SHAPE, setup, Load(8192, 1, 8192, False))
    kept = 8192 * reference_bytes(SHAPE, LAYER, setup, 8192)
    inner, matrix = 8192 * (value_bytes * 4096 + 4096), value_bytes * 4096 * 1024
    assert estimate.reference(0).activations_gb == pytest.approx((copies + 24 * kept + 2 * inner + matrix) / GB)
    stored = 24 * 8192 * 4096
    head = copies + stored + 2 * 8192 * 4096 + 2 * 4096
    backward = stored + kept + inner + matrix
    assert estimate.reference(24).activations_gb == pytest.approx(max(head, backward) / GB)
    assert (head > backward) == (value_bytes == 2)
