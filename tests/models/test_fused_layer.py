"""The hand-written backward against autograd through plain PyTorch in fp64: every family, adapter, policy and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_of import FAMILIES, family_model
from peft import LoraConfig, get_peft_model
from plain_layer import plain_layer
from torch import nn

from tunesmith.kernels.attention import SequenceLayout
from tunesmith.models.fuse import FusedLayer, fuse
from tunesmith.types import LAYER_TENSORS, LayerPolicy

LENGTHS = [5, 1, 9, 8]
TOKENS = sum(LENGTHS)

ADAPTERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "all-linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora, patterns": {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 17, "o_proj": 1},
        "alpha_pattern": {"down_proj": 2, "v_proj": 40},
    },
    "rank 80": {"r": 80, "lora_alpha": 80, "target_modules": "all-linear"},
    "down and o": {"r": 8, "target_modules": ["down_proj", "o_proj"]},
}


def adapted(model: Any, adapter: str) -> Any:
    """`model` with the adapter, B not zero; all in fp64."""
    settings = ADAPTERS[adapter]
    if settings is None:
        return model.double()
    torch.manual_seed(5)
    with_lora = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM")).double()
    for name, parameter in with_lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return with_lora


def decoder_of(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()


def inputs_of(decoder: Any, layer: Any, packed: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (T, D) and the rotations (T, rotary) of packed documents."""
    torch.manual_seed(1)
    h = torch.randn(TOKENS, decoder.config.hidden_size, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None] if packed else torch.arange(TOKENS)[None]
    kind = getattr(layer, "attention_type", None) or getattr(layer.self_attn, "layer_type", None)
    rope = decoder.rotary_emb
    cos, sin = (
        rope(h[None], positions, kind) if kind and "gemma3" in decoder.config.model_type else rope(h[None], positions)
    )
    return h, cos[0].double(), sin[0].double()


def layout_of(packed: bool = True) -> SequenceLayout:
    if not packed:
        return SequenceLayout.dense(1, TOKENS)
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return SequenceLayout.packed(bounds, LENGTHS, TOKENS)


def run(layer: FusedLayer, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, packed: bool = True) -> torch.Tensor:
    layer.engine.layout = layout_of(packed)
    return layer(h[None], position_embeddings=(cos[None], sin[None]))[0]


def gradients(layer: nn.Module, out: torch.Tensor, h: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a fixed weighting of `out`, of the input and of every trainable parameter."""
    torch.manual_seed(2)
    (out * torch.randn_like(out)).sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    assert h.grad is not None
    found["input"] = h.grad.clone()
    layer.zero_grad()
    h.grad = None
    return found


def assert_equal_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = (ours[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert difference < tolerance, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_every_gradient_equal_autograd_in_fp64(family: str, adapter: str) -> None:
    model = adapted(family_model(family), adapter)
    decoder = decoder_of(model)
    plan = fuse(model, report=str)
    assert len(plan.fused) == len(decoder.layers), str(plan)
    for layer in decoder.layers:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora" in name or "norm" in name or "bias" in name)
        h, cos, sin = inputs_of(decoder, layer)
        h.requires_grad_()
        theirs = plain_layer(layer, layer.spec, h, cos, sin, LENGTHS)
        ours = run(layer, h, cos, sin)
        assert (ours - theirs).norm() / theirs.norm() < 1e-10
        assert_equal_gradients(gradients(layer, ours, h), gradients(layer, theirs, h), 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_full_fine_tuning_equal_autograd_in_fp64(family: str) -> None:
    model = family_model(family).double()
    decoder = decoder_of(model)
    fuse(model, report=str)
    layer = decoder.layers[0]
    h, cos, sin = inputs_of(decoder, layer)
    h.requires_grad_()
    theirs = gradients(layer, plain_layer(layer, layer.spec, h, cos, sin, LENGTHS), h)
    assert_equal_gradients(gradients(layer, run(layer, h, cos, sin), h), theirs, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_layer_is_the_models_own_layer_in_fp32(family: str) -> None:
    model = family_model(family)
    decoder = decoder_of(model)
    for layer in decoder.layers:
        h, cos, sin = (t.float() for t in inputs_of(decoder, layer, packed=False))
        # Eager: transformers' sdpa leaves the soft-cap out.
        model.config._attn_implementation = decoder.config._attn_implementation = "eager"
        causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        window = getattr(layer.self_attn, "sliding_window", getattr(decoder.config, "sliding_window", None))
        if window is not None:
            causal &= torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1 - window)
        mask = torch.zeros(TOKENS, TOKENS).masked_fill(~causal, float("-inf"))[None, None]
        own = layer(h[None], attention_mask=mask, position_embeddings=(cos[None], sin[None]))[0]
        from tunesmith.models.families import layer_spec

        spec = layer_spec(layer)
        assert not isinstance(spec, str)
        plain = plain_layer(layer, spec, h, cos, sin, [TOKENS])
        assert (plain - own).norm() / own.norm() < 1e-6


POLICIES = {
    "keep all": LayerPolicy(),
    **{f"recompute {name}": LayerPolicy(keep=frozenset(LAYER_TENSORS) - {name}) for name in LAYER_TENSORS},
    "recompute all": LayerPolicy(keep=frozenset()),
    "keep gate_up": LayerPolicy(keep=frozenset({"gate_up"})),
    "host": LayerPolicy(keep=frozenset(), offload_input=True),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_policies_do_not_change_a_bit(family: str) -> None:
    model = adapted(family_model(family), "all-linear")
    decoder = decoder_of(model)
    fuse(model, report=str)
    layer = decoder.layers[0]
    h, cos, sin = inputs_of(decoder, layer)
    h.requires_grad_()
    found = {}
    for name, policy in POLICIES.items():
        layer.policy = policy
        found[name] = gradients(layer, run(layer, h, cos, sin), h)
    for name, values in found.items():
        for key, value in found["keep all"].items():
            assert torch.equal(values[key], value), f"{name}: {key}"


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_an_mlp_in_pieces_has_the_same_gradient(family: str) -> None:
    model = adapted(family_model(family), "all-linear")
    decoder = decoder_of(model)
    fuse(model, report=str)
    layer = decoder.layers[0]
    h, cos, sin = inputs_of(decoder, layer)
    h.requires_grad_()
    whole = gradients(layer, run(layer, h, cos, sin), h)
    layer.policy = LayerPolicy(keep=frozenset(), mlp_rows=7)
    assert_equal_gradients(gradients(layer, run(layer, h, cos, sin), h), whole, 1e-12)


def test_dropout_does_not_depend_on_the_policy() -> None:
    model = adapted(family_model("llama"), "all-linear")
    decoder = decoder_of(model)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.4)
    fuse(model, report=str)
    layer = decoder.layers[0].train()
    h, cos, sin = inputs_of(decoder, layer)
    h.requires_grad_()
    found = {}
    for rows in (None, 7, 2):
        layer.policy = LayerPolicy(keep=frozenset(), mlp_rows=rows)
        torch.manual_seed(3)
        found[rows] = gradients(layer, run(layer, h, cos, sin), h)
    for rows in (7, 2):
        assert_equal_gradients(found[rows], found[None], 1e-12)


@pytest.mark.parametrize("rows", [None, 7])
def test_dropout_draws_the_same_mask_in_forward_and_backward(rows: int | None) -> None:
    """The output is linear in each B along the true gradient: a finite difference at the same seed finds it."""
    model = adapted(family_model("llama"), "all-linear")
    decoder = decoder_of(model)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.4)
    fuse(model, LayerPolicy(keep=frozenset(), mlp_rows=rows), report=str)
    layer = decoder.layers[0].train()
    h, cos, sin = inputs_of(decoder, layer)
    h.requires_grad_()

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        out = run(layer, h, cos, sin)
        torch.manual_seed(2)
        return (out * torch.randn_like(out)).sum()

    assert loss(3) == loss(3)
    assert loss(3) != loss(4)
    found = dict(zip(("h",), torch.autograd.grad(loss(3), [h]), strict=True))
    parameters = {name: p for name, p in layer.named_parameters() if "lora" in name}
    found |= dict(zip(parameters, torch.autograd.grad(loss(3), list(parameters.values())), strict=True))
    for name, tensor in {"h": h, **parameters}.items():
        direction = torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        step = 1e-5
        with torch.no_grad():
            tensor.add_(step * direction)
            more = loss(3)
            tensor.sub_(2 * step * direction)
            less = loss(3)
            tensor.add_(step * direction)
        expected = (more - less) / (2 * step)
        assert torch.isclose((found[name] * direction).sum(), expected, rtol=1e-5), name


def test_a_second_backward_is_refused() -> None:
    model = adapted(family_model("llama"), "all-linear")
    fuse(model, report=str)
    layer = decoder_of(model).layers[0]
    h, cos, sin = inputs_of(decoder_of(model), layer)
    out = run(layer, h.requires_grad_(), cos, sin).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        out.backward()


def test_documents_do_not_touch_each_other() -> None:
    model = adapted(family_model("mistral"), "all-linear")
    fuse(model, report=str)
    layer = decoder_of(model).layers[0]
    h, cos, sin = inputs_of(decoder_of(model), layer)
    before = run(layer, h, cos, sin)
    h[6:15] += 1.0  # the third document
    after = run(layer, h, cos, sin)
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[15:], after[15:])
    assert not torch.equal(before[6:15], after[6:15])


def test_families_are_on_disk_too(tmp_path: Path) -> None:
    """What the tests build in memory is what `from_pretrained` loads."""
    from transformers import AutoModelForCausalLM

    model = family_model("qwen2")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
