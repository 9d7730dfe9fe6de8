"""A fused model beside the same model with its own layers: logits, gradients, files, adapters, generation, training code."""

from __future__ import annotations

import copy
import gc
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models_of import FAMILIES, family_model
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from tunesmith.kernels.attention import SequenceLayout
from tunesmith.models import fused_layer
from tunesmith.models.fuse import (
    OWN_CALL,
    FusedLayer,
    FusePlan,
    engine_of,
    fuse,
    set_policies,
    unfuse,
    why_not_fused,
)
from tunesmith.types import LayerPolicy

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

TOLERANCE = 1e-5
"""Of relative errors in fp32 through two layers: sums in another order, and gradients that partly cancel."""

Result = tuple[torch.Tensor, dict[str, torch.Tensor]]
Inputs = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def adapted(model: Any, **settings: Any) -> Any:
    """`model` in training mode with a LoRA adapter, B not zero."""
    torch.manual_seed(5)
    values = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    return awake(get_peft_model(model, LoraConfig(**values))).train()


def awake(model: Any, adapter: str = "default") -> Any:
    """`model` with an adapter that does something: B as random as A."""
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def quietly(model: Any, *arguments: Any, **options: Any) -> FusePlan:
    return fuse(model, *arguments, report=str, **options)


IDS = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([11, 7, 3])
RIGHT = (torch.arange(11)[None] < ROWS[:, None]).long()
LENGTHS = (5, 1, 9)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BOUNDS = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
FLASH = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 9, "max_length_k": 9}


def square_mask(length: int) -> torch.Tensor:
    """A custom 4-D mask: causal, and the third token is seen by nobody else."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[3:, 2] = False
    return torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)


# What is given to the model, and how the fused engine divides it into sequences: None is for the model's own layers.
GIVEN: dict[str, tuple[Inputs, str | None]] = {
    "dense": ({"input_ids": IDS}, "3 rows"),
    "full mask": ({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, "3 rows"),
    "right padding": ({"input_ids": IDS, "attention_mask": RIGHT}, "3 rows"),
    "left padding": ({"input_ids": IDS, "attention_mask": RIGHT.flip(1)}, None),
    "a 4-D mask": ({"input_ids": IDS, "attention_mask": square_mask(11)}, None),
    "positions that restart": ({"input_ids": IDS.reshape(1, -1)[:, :15], "position_ids": POSITIONS}, "5, 1, 9"),
    "flash attention's bounds": (
        {"input_ids": IDS.reshape(1, -1)[:, :15], "position_ids": POSITIONS, **FLASH},
        "5, 1, 9",
    ),
    "positions that restart in two rows": (
        {"input_ids": IDS[:2], "position_ids": torch.tensor([[*range(4), *range(7)], [*range(11)]])},
        "4, 7, 11",
    ),
    "one document, begun before": (
        {"input_ids": IDS[:1], "position_ids": torch.arange(3, 14)[None]},
        "1 rows",
    ),
    "a document begun before, then another": (
        {"input_ids": IDS[:1], "position_ids": torch.tensor([[*range(3, 8), *range(6)]])},
        "5, 6",
    ),
}


def step(model: Any, given: Inputs | None = None, **more: Any) -> Result:
    """Logits, and the gradients of a fixed weighting of those that count."""
    given = {"input_ids": IDS, **more} if given is None else {**given, **more}
    model.zero_grad()
    logits = model(**given).logits
    mask = given.get("attention_mask")
    counts = mask[..., None] if mask is not None and mask.ndim == 2 else torch.ones(())
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)) * counts
    if logits.requires_grad:
        (logits * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return (logits.detach() * counts).float(), found


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def assert_same(ours: Result, theirs: Result, tolerance: float = TOLERANCE) -> None:
    assert error(ours[0], theirs[0]) < tolerance, f"logits: {error(ours[0], theirs[0]):.1e}"
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        assert error(ours[1][name], value) < tolerance, f"{name}: {error(ours[1][name], value):.1e}"


def layout_text(model: Any) -> str | None:
    engine = engine_of(model)
    assert engine is not None
    if engine.layout is None:
        return None
    return (
        f"{engine.layout.batch} rows"
        if engine.layout.cu_seqlens is None
        else ", ".join(map(str, engine.layout.lengths))
    )


def generated(model: Any) -> list[int]:
    was_training = model.training
    model.eval()
    tokens = model.generate(input_ids=IDS[:1], max_new_tokens=12, do_sample=False)[0].tolist()
    model.train(was_training)
    return tokens


# -- the same numbers -------------------------------------------------------------------------------------------------


def eager(family: str) -> dict[str, str]:
    return {"attn_implementation": "eager"} if family == "gemma2" else {}  # transformers' sdpa leaves the soft-cap out


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_adapter_gradients_equal_the_models_own(family: str) -> None:
    model = adapted(family_model(family, **eager(family)))
    for name, (given, expected) in GIVEN.items():
        given = {**given, "use_cache": False}  # with a cache transformers takes packed documents for one
        theirs = step(model, given)
        assert quietly(model).fused == (0, 1)
        ours = step(model, given)
        assert layout_text(model) == expected, name
        unfuse(model)
        assert_same(ours, theirs)
        assert len(ours[1]) == (16 if family == "phi3" else 28)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma2"])
def test_every_gradient_of_full_fine_tuning_equals_the_models_own(family: str) -> None:
    model = family_model(family, **eager(family)).train()
    theirs = step(model)
    quietly(model)
    assert_same(step(model), theirs)
    assert theirs[1].keys() == dict(model.named_parameters()).keys()


def test_embeddings_as_input() -> None:
    model = adapted(family_model("llama"))
    embeddings = model.get_input_embeddings()(IDS).detach()
    theirs = step(model, {"inputs_embeds": embeddings})
    quietly(model)
    assert_same(step(model, {"inputs_embeds": embeddings}), theirs)
    assert layout_text(model) == "3 rows"


def test_a_packed_document_does_not_see_another_and_starts_at_nought() -> None:
    model = adapted(family_model("llama")).eval()
    quietly(model)
    given = GIVEN["positions that restart"][0]
    packed = model(**given, use_cache=False).logits[0].split(LENGTHS)
    alone = [model(input_ids=ids, use_cache=False).logits[0] for ids in given["input_ids"].split(LENGTHS, 1)]
    assert all(error(one, two) < TOLERANCE for one, two in zip(packed, alone, strict=True))


def mixtral() -> Any:
    torch.manual_seed(0)
    return family_model("mixtral", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)


def deepseek_v2() -> Any:
    return family_model(
        "deepseek_v2",
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=6,
        head_dim=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        n_shared_experts=1,
        first_k_dense_replace=1,
    )


@pytest.mark.parametrize(
    ("make", "targets", "halves", "reference"),
    [
        (mixtral, r".*self_attn\.[qkvo]_proj", {0: ("attention",), 1: ("attention",)}, {}),
        (
            deepseek_v2,
            r".*layers\.\d\.(self_attn\.(q_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))",
            {0: ("mlp",)},
            {1: "DeepSeek-V2: attention and experts of this layer are the model's own"},
        ),
    ],
    ids=["mixtral", "deepseek_v2"],
)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_families_of_which_one_half_fits(
    make: Callable[[], Any], targets: str, halves: dict[int, Any], reference: dict[int, str], full: bool
) -> None:
    model = make().train() if full else adapted(make(), target_modules=targets)
    for name in ("dense", "right padding", "left padding", "positions that restart"):
        given = {**GIVEN[name][0], "use_cache": False}
        theirs = step(model, given)
        plan = quietly(model)
        assert (plan.fused, plan.reference, plan.engine) == ((), reference, "fused")
        assert list(plan.partly) == list(halves)
        for number, kinds in halves.items():
            layer = engine_of(model).decoder.layers[number]  # type: ignore[union-attr]
            assert layer.spec.halves == kinds
        assert_same(step(model, given), theirs)
        unfuse(model)


def test_mixtrals_router_logits_are_recorded() -> None:
    model = mixtral().train()
    given = {"input_ids": IDS, "labels": IDS, "output_router_logits": True, "use_cache": False}
    theirs = model(**given)
    quietly(model)
    ours = model(**given)
    assert layout_text(model) == "3 rows"
    assert error(ours.loss, theirs.loss) < TOLERANCE
    assert error(ours.aux_loss, theirs.aux_loss) < TOLERANCE
    assert ours.aux_loss > 0


@pytest.mark.parametrize("double", [False, True])
def test_gradients_over_an_nf4_base_equal_the_models_own(tmp_path: Path, double: bool) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    family_model("qwen2", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    model = adapted(loaded)
    theirs, before = step(model), {name: value.clone() for name, value in model.state_dict().items()}
    plan = quietly(model)
    assert plan.weights == "14 4-bit, dequantized into the operand"
    assert_same(step(model), theirs)
    set_policies(model, [LayerPolicy(keep=frozenset(), mlp_rows=7)] * 2)
    assert_same(step(model), theirs)
    assert same_state(model.state_dict(), before)


def test_two_forwards_before_their_backwards() -> None:
    def both(model: Any) -> Result:
        model.zero_grad()
        first, second = model(input_ids=IDS).logits, model(input_ids=IDS.flip(1)).logits
        (first.sum() + second.square().mean()).backward()
        return first.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = adapted(family_model("llama"))
    theirs = both(model)
    quietly(model)
    assert_same(both(model), theirs)
    set_policies(model, [LayerPolicy(keep=frozenset(), offload_input=True)] * 2)
    assert_same(both(model), theirs)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_on_the_cpu(dtype: torch.dtype | None) -> None:
    """Products in bf16 are as far from the exact ones as transformers' own are."""
    model = adapted(family_model("llama"))
    exact = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model)
    quietly(model, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(model)
    assert error(ours[0], exact[0]) < 1.5 * error(theirs[0], exact[0])
    for name, value in exact[1].items():
        assert error(ours[1][name], value) < 1.5 * error(theirs[1][name], value) + 5e-3, name


# -- only this instance, and reversibly -------------------------------------------------------------------------------


def same_state(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_state_dict_keys_and_values_stay(family: str, with_adapter: bool) -> None:
    model = adapted(family_model(family)) if with_adapter else family_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    quietly(model)
    assert same_state(model.state_dict(), before)
    assert [name for name, _ in model.named_parameters()] == names
    step(model)
    unfuse(model)
    assert same_state(model.state_dict(), before)
    assert [name for name, _ in model.named_parameters()] == names


def test_unfuse_puts_back_the_very_layers_and_each_weights_own_storage() -> None:
    model = adapted(family_model("llama"))
    decoder = model.get_base_model().model
    layers, norm, hooks = list(decoder.layers), decoder.norm, len(decoder._forward_pre_hooks)
    parameters = dict(model.named_parameters())
    theirs = step(model)
    quietly(model)
    q = layers[0].self_attn.q_proj.base_layer.weight
    assert q.untyped_storage().nbytes() > q.nbytes, "while fused it is a part of the operand"
    assert len(decoder._forward_pre_hooks) == hooks + 1
    model.eval()
    unfuse(model)
    assert all(one is two for one, two in zip(decoder.layers, layers, strict=True))
    assert decoder.norm is norm
    assert len(decoder._forward_pre_hooks) == hooks
    assert not decoder._forward_hooks
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert not any(layer.training for layer in layers), "the mode it had last"
    model.train()
    assert_same(step(model), theirs, 1e-12)
    unfuse(model)  # nothing happens


def test_no_other_model_is_touched() -> None:
    other = adapted(family_model("llama"))
    theirs = step(other)
    model = adapted(family_model("llama"))
    quietly(model)
    assert engine_of(other) is None
    assert_same(step(other), theirs, 1e-12)


def test_a_copy_of_a_fused_model_is_another_model() -> None:
    model = adapted(family_model("llama"))
    quietly(model)
    theirs = step(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert_same(step(twin), theirs)
    assert engine_of(twin) is not engine_of(model)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_into_a_fused_model_are_used(assign: bool) -> None:
    reference, model = family_model("qwen2").train(), family_model("qwen2").train()
    state = {name: 0.9 * value + 0.01 for name, value in reference.state_dict().items()}
    reference.load_state_dict(state)
    quietly(model)
    model.load_state_dict(state, assign=assign)
    assert_same(step(model), step(reference))


def test_it_works_after_a_change_of_type() -> None:
    model = adapted(family_model("llama"))
    theirs = step(model)
    quietly(model)
    model.double()
    ours = step(model)
    assert all(value.dtype == torch.float64 for value in ours[1].values())
    assert_same(ours, theirs)


def test_saving_and_loading(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(family_model("qwen3"))
    theirs = step(model)
    quietly(model)
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().save_pretrained(tmp_path / "with adapter")
    loaded = PeftModel.from_pretrained(family_model("qwen3"), tmp_path / "adapter", is_trainable=True).train()
    assert same_state(loaded.state_dict(), model.state_dict())
    assert_same(step(loaded), theirs)

    base = family_model("qwen3")
    quietly(base)
    base.save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base").train()
    assert same_state(whole.state_dict(), family_model("qwen3").state_dict())
    resumed = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).train()
    assert_same(step(resumed), theirs)


# -- generation and caches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_generation_is_the_models_own_also_after_training(family: str) -> None:
    models = [adapted(family_model(family, **eager(family))) for _ in range(2)]
    quietly(models[1])
    tokens = [generated(model) for model in models]
    assert tokens[0] == tokens[1]
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    after = [generated(model) for model in models]
    assert after[0] == after[1]
    assert after[0] != tokens[0]


def test_a_forward_with_a_cache_runs_the_models_own_layers() -> None:
    model = adapted(family_model("llama")).eval()
    theirs = model(input_ids=IDS)
    quietly(model)
    ours = model(input_ids=IDS)
    assert layout_text(model) is None
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.past_key_values.get_seq_length() == 11
    more = model(input_ids=IDS[:, :1], past_key_values=ours.past_key_values).logits
    assert torch.equal(more, theirs_after(theirs, model))


def theirs_after(output: Any, model: Any) -> torch.Tensor:
    """Logits of one more token, from the cache of an unfused forward."""
    unfuse(model)
    logits: torch.Tensor = model(input_ids=IDS[:, :1], past_key_values=output.past_key_values).logits
    return logits


def test_a_cache_in_the_config_does_not_keep_training_from_the_fused_layers() -> None:
    model = adapted(family_model("llama"))
    assert model.config.use_cache
    theirs = step(model)
    quietly(model)
    output = model(input_ids=IDS)
    assert layout_text(model) == "3 rows"
    assert output.past_key_values is None
    assert_same(step(model), theirs)
    assert_same(step(model, use_cache=True), theirs)
    assert layout_text(model) is None, "a cache that is asked for is given"


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("way", ["argument", "config"])
def test_hidden_states_and_attentions_are_recorded(train: bool, fused_first: bool, way: str) -> None:
    """transformers collects them by hooks on its own layers, so such a forward runs those."""
    model = adapted(family_model("llama", attn_implementation="eager")).train(train)
    asked = {"output_hidden_states": True, "output_attentions": True}
    reference = adapted(family_model("llama", attn_implementation="eager")).train(train)
    theirs = reference(input_ids=IDS, **asked)
    if not fused_first:
        model(input_ids=IDS, **asked)
    quietly(model)
    if way == "config":
        for name, value in asked.items():
            setattr(model.get_base_model().config, name, value)
        asked = {}
    for _ in range(2):
        ours = model.get_base_model()(input_ids=IDS, **asked)
        for name in ("hidden_states", "attentions"):
            assert len(ours[name]) == len(theirs[name])
            assert all(error(one, two) < TOLERANCE for one, two in zip(ours[name], theirs[name], strict=True))
    decoder = model.get_base_model().model
    assert all(isinstance(layer, FusedLayer) for layer in decoder.layers)
    model.get_base_model().config.output_hidden_states = model.get_base_model().config.output_attentions = False
    model.train()
    assert_same(step(model), step(reference.train()))
    assert layout_text(model) == "3 rows"


def test_the_fused_layers_come_back_after_a_forward_that_failed() -> None:
    model = family_model("llama").train()
    quietly(model)
    with pytest.raises(IndexError):
        model(input_ids=IDS + 97, output_hidden_states=True)
    assert all(isinstance(layer, FusedLayer) for layer in model.model.layers)


def test_inference_mode_before_training() -> None:
    """What is made in it may not be written in training."""
    model = adapted(family_model("llama"), lora_dropout=0.5).eval()
    theirs = step(model, use_cache=False)
    model.train()
    quietly(model)
    model.eval()
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=False)
    assert_same(step(model, use_cache=False), theirs)
    assert layout_text(model) == "3 rows"


# -- adapters ---------------------------------------------------------------------------------------------------------


def with_second(model: Any) -> Any:
    model.add_adapter("second", LoraConfig(r=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    return awake(model, "second")


@pytest.mark.parametrize("fused_first", [True, False])
def test_two_adapters_and_switching(fused_first: bool) -> None:
    reference = with_second(adapted(family_model("llama")))
    model = adapted(family_model("llama"))
    if fused_first:
        quietly(model)
    with_second(model)
    if not fused_first:
        quietly(model)
    for name in ("default", "second", "default", "second"):
        reference.set_adapter(name)
        model.set_adapter(name)
        theirs = step(reference)
        assert len(theirs[1]) == (28 if name == "default" else 8)
        assert_same(step(model), theirs)
    model.set_adapter("default")
    reference.set_adapter("default")
    pending = model(input_ids=IDS).logits  # still to be differentiated when the other adapter runs
    model.set_adapter("second")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)  # PEFT freezes the adapter that is not active
    model.zero_grad()
    model(input_ids=IDS)
    (pending * torch.randn(pending.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = step(reference)[1]
    assert all(error(grads[name], expected[name]) < TOLERANCE for name in expected)


def test_two_adapters_at_once_are_refused() -> None:
    model = with_second(adapted(family_model("llama")))
    quietly(model)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(
        ValueError, match=r"^the adapters default, second are active together; the fused engine runs one"
    ):
        model(input_ids=IDS)


def test_disabled_adapters() -> None:
    model = adapted(family_model("llama"))
    with model.disable_adapter():
        off = step(model)[0]
    on = step(model)
    quietly(model)
    with model.disable_adapter():
        assert error(step(model)[0], off) < TOLERANCE
    assert error(on[0], off) > 0.1
    assert_same(step(model), on)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unmerging(safe: bool) -> None:
    model = adapted(family_model("qwen2"))
    plain = step(model)
    quietly(model)
    model.merge_adapter(safe_merge=safe)
    assert error(step(model)[0], plain[0]) < TOLERANCE
    assert not step(model)[1]
    model.unmerge_adapter()
    assert_same(step(model), plain, 2 * TOLERANCE)


def test_merge_and_unload() -> None:
    expected = adapted(family_model("qwen2")).merge_and_unload()
    model = adapted(family_model("qwen2"))
    quietly(model)
    step(model)
    merged = model.merge_and_unload().train()
    assert same_state(merged.state_dict(), expected.state_dict())
    assert generated(merged) == generated(expected)
    merged.requires_grad_(True)
    expected.train().requires_grad_(True)
    assert_same(step(merged), step(expected))
    assert layout_text(merged) == "3 rows"
    unfuse(merged)
    assert same_state(merged.state_dict(), expected.state_dict())


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_adapter_that_comes_after_fuse(family: str) -> None:
    base = family_model(family)
    quietly(base)
    model = adapted(base)
    assert_same(step(model), step(adapted(family_model(family))))
    assert layout_text(model) == "3 rows"
    engine = engine_of(model)
    assert engine is not None
    states = [state for layer in engine.decoder.layers for state in layer.states()]
    assert all(state.joined for state in states), "its A has its place in the operand"
    plain = model.unload().train()
    plain.requires_grad_(True)
    assert_same(step(plain), step(family_model(family).train()))


def test_an_adapter_that_comes_after_fuse_and_does_not_fit_is_refused() -> None:
    base = family_model("llama")
    quietly(base)
    model = adapted(base, use_dora=True)
    with pytest.raises(
        ValueError,
        match=r"^layer 0 is fused, but now its adapter is a DoraLinearVariant, which runs in the model's own layer: "
        r"unfuse the model, and fuse it again$",
    ):
        model(input_ids=IDS)
    unfuse(model)
    assert "DoraLinearVariant" in quietly(model).reference[0]
    assert_same(step(model), step(adapted(family_model("llama"), use_dora=True)))


def test_a_deleted_adapter_is_let_go_of() -> None:
    model = with_second(adapted(family_model("llama")))
    quietly(model)
    step(model)
    layer = engine_of(model).decoder.layers[0]  # type: ignore[union-attr]
    deleted = weakref.ref(layer.self_attn.q_proj.lora_A["default"].weight)
    model.set_adapter("second")
    model.delete_adapter("default")
    step(model)
    model.zero_grad()
    gc.collect()
    assert deleted() is None


def test_a_pass_without_the_adapter_leaves_its_operands_where_they_are() -> None:
    """A captured graph reads the table that packs them."""
    model = adapted(family_model("llama"))
    quietly(model)
    ours, engine = step(model), engine_of(model)
    assert engine is not None
    table = engine._table
    assert table is not None
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=IDS)
    assert engine._table is None
    assert_bits(step(model), ours)
    assert engine._table is table


def test_dropout_follows_its_own_module() -> None:
    model = adapted(family_model("llama"), lora_dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    theirs = step(model)
    quietly(model)
    assert_same(step(model), theirs)
    model.train()
    assert error(step(model)[0], theirs[0]) > 0.01


def test_deleting_an_adapter() -> None:
    model = with_second(adapted(family_model("llama")))
    reference = with_second(adapted(family_model("llama")))
    quietly(model)
    step(model)
    for each in (model, reference):
        each.set_adapter("second")
        each.delete_adapter("default")
    assert_same(step(model), step(reference))


def test_norms_and_head_that_peft_trains_beside_the_adapter(tmp_path: Path) -> None:
    """`modules_to_save` puts a wrapper around a module: the copy in it is what is used, trained and saved."""
    settings: dict[str, Any] = {"modules_to_save": ["input_layernorm", "norm", "lm_head"]}
    reference, model = (adapted(family_model("qwen3"), **settings) for _ in range(2))
    with torch.no_grad():
        for each in (reference, model):
            for name, parameter in each.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1.3)
    quietly(model)
    assert_same(step(model), step(reference))
    with model.disable_adapter(), reference.disable_adapter():
        assert error(step(model)[0], step(reference)[0]) < TOLERANCE
    assert same_state(model.state_dict(), reference.state_dict())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family_model("qwen3"), tmp_path)
    assert same_state(loaded.state_dict(), reference.state_dict())


# -- what stays the model's own, and why ------------------------------------------------------------------------------


def hooked(model: Any, name: str) -> Any:
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    return model


def with_accelerate_hooks(model: Any) -> Any:
    """As `device_map` leaves it: inputs are moved by a hook that has replaced each forward."""
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, AlignDevicesHook(execution_device="cpu"))
    return model


def with_scaled_mlp(model: Any) -> Any:
    for layer in model.model.layers:
        own = layer.mlp.forward
        layer.mlp.forward = lambda x, own=own: 2 * own(x)
    return model


def with_both_active(model: Any) -> Any:
    model = with_second(model)
    model.base_model.set_adapter(["default", "second"])
    return model


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (
        lambda: adapted(family_model("llama"), use_dora=True),
        "its adapter is a DoraLinearVariant, which runs in the model's own layer",
    ),
    "lora_bias": (
        lambda: adapted(family_model("llama", attention_bias=True, mlp_bias=True), lora_bias=True),
        "its adapter has a bias on B (lora_bias)",
    ),
    "IA3": (
        lambda: get_peft_model(family_model("llama"), IA3Config(task_type="CAUSAL_LM")).train(),
        "a projection is a peft.tuners.ia3.layer.Linear",
    ),
    "AdaLoRA": (
        lambda: get_peft_model(family_model("llama"), AdaLoraConfig(task_type="CAUSAL_LM", total_step=9)).train(),
        "a projection is a peft.tuners.adalora.layer.SVDLinear",
    ),
    "attention dropout": (
        lambda: family_model("llama", attention_dropout=0.1).train(),
        "it has dropout on attention weights",
    ),
    "residual dropout": (
        lambda: family_model("phi3", resid_pdrop=0.1).train(),
        "it has dropout on the residual stream",
    ),
    "activation": (lambda: family_model("llama", hidden_act="relu").train(), "its activation is relu"),
    "hooks on a projection": (
        lambda: hooked(
            hooked(family_model("llama"), "model.layers.0.mlp.down_proj"), "model.layers.1.self_attn.v_proj"
        ),
        OWN_CALL,
    ),
    "hooks on a layer": (
        lambda: hooked(hooked(family_model("llama"), "model.layers.0"), "model.layers.1.input_layernorm"),
        OWN_CALL,
    ),
    "Accelerate's hooks": (lambda: with_accelerate_hooks(family_model("llama")).train(), OWN_CALL),
    "a replaced forward": (lambda: with_scaled_mlp(family_model("llama")).train(), OWN_CALL),
    "two adapters together": (
        lambda: with_both_active(adapted(family_model("llama"))),
        "the adapters default, second are active together: one at a time is fused",
    ),
    "an unknown family": (
        lambda: family_model("olmo2", pad_token_id=0).train(),
        "Olmo2DecoderLayer is not a known family",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_stays_the_models_own_with_the_reason(case: str) -> None:
    make, reason = UNFIT[case]
    model = make()
    layers = list((model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder().layers)
    torch.manual_seed(8)
    theirs = step(model)
    plan = quietly(model)
    assert (plan.engine, plan.fused, plan.partly) == ("reference", (), {})
    assert plan.reference == {0: reason, 1: reason}
    assert why_not_fused(model) == [reason, reason]
    assert str(plan).splitlines() == [
        f"fused engine: 0 of 2 layers ({type(layers[0]).__name__})",
        f"  reference  layers 0-1: {reason}",
    ]
    assert engine_of(model) is None
    torch.manual_seed(8)
    assert_same(step(model), theirs, 1e-12)


def test_one_layer_that_does_not_fit() -> None:
    model = hooked(adapted(family_model("llama", num_hidden_layers=4)), "base_model.model.model.layers.1.mlp")
    theirs = {name: step(model, {**given, "use_cache": False}) for name, (given, _) in GIVEN.items()}
    plan = quietly(model)
    assert plan.fused == (0, 2, 3)
    assert plan.engine == "fused"
    for name, (given, expected) in GIVEN.items():
        assert_same(step(model, {**given, "use_cache": False}), theirs[name])
        assert layout_text(model) == expected


def test_hooks_and_forwards_that_come_after_fuse_are_called() -> None:
    """The model's own layers run meanwhile, and a warning says so once."""
    model = adapted(family_model("llama"))
    quietly(model)
    ours, seen = step(model), []
    mlp = engine_of(model).decoder.layers[1].mlp  # type: ignore[union-attr]
    handle = mlp.gate_proj.register_forward_hook(lambda *_: seen.append("hook"))
    with pytest.warns(UserWarning, match=f"^layers 1: {OWN_CALL}; the model's own layers run$"):
        assert_same(step(model), ours)
    assert seen == ["hook"]
    assert layout_text(model) is None
    handle.remove()
    own = mlp.forward
    mlp.forward = lambda x: 2 * own(x)
    doubled = step(model)
    assert error(doubled[0], ours[0]) > 0.1
    unfuse(model)
    assert_same(step(model), doubled)
    del mlp.forward
    quietly(model)
    assert_bits(step(model), ours)


def test_an_adapter_for_each_row() -> None:
    """PEFT's `adapter_names` are hooks that last for one forward."""
    model = with_second(adapted(family_model("llama"))).eval()
    given = {"input_ids": IDS, "use_cache": False, "adapter_names": ["default", "second", "__base__"]}
    theirs = model(**given).logits
    quietly(model)
    with pytest.warns(UserWarning, match="the model's own layers run"):
        assert error(model(**given).logits, theirs) < TOLERANCE
    model(input_ids=IDS, use_cache=False)
    assert layout_text(model) == "3 rows"


def test_a_norm_that_is_wrapped_after_fuse_is_refused() -> None:
    base = family_model("llama").train()
    quietly(base)
    model = adapted(base, modules_to_save=["input_layernorm"])
    with pytest.raises(
        ValueError,
        match=r"^layer 0 is fused, but now input_layernorm is a ModulesToSaveWrapper: unfuse the model, and fuse it again$",
    ):
        model(input_ids=IDS)
    unfuse(model)
    theirs = step(model)
    quietly(model)
    assert_same(step(model), theirs)
    assert any("input_layernorm" in name for name in theirs[1])


def test_fuse_changes_all_layers_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(family_model("llama"))
    decoder = model.get_base_model().model
    before, addresses = list(decoder.layers), [p.data_ptr() for p in model.parameters()]
    make = FusedLayer.__init__

    def failing(self: Any, original: Any, spec: Any, engine: Any, policy: Any, number: int, dtype: Any) -> None:
        if number == 1:
            raise RuntimeError("no room")
        make(self, original, spec, engine, policy, number, dtype)

    monkeypatch.setattr(FusedLayer, "__init__", failing)
    with pytest.raises(RuntimeError, match="no room"):
        quietly(model)
    assert list(decoder.layers) == before
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert not decoder._forward_hooks
    monkeypatch.undo()
    assert quietly(model).fused == (0, 1)


def test_the_hooks_that_record_outputs_are_nobodys_own() -> None:
    model = family_model("llama")
    model(input_ids=IDS, output_hidden_states=True)
    assert quietly(model).fused == (0, 1)


def test_a_class_of_another_package_is_no_known_family() -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = family_model("llama")
    other = type("LlamaDecoderLayer", (LlamaDecoderLayer,), {"__module__": "somebody.elses"})
    for layer in model.model.layers:
        layer.__class__ = other
    assert why_not_fused(model) == ["LlamaDecoderLayer is not a known family"] * 2


def test_models_without_decoder_layers() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=97))
    with pytest.raises(
        ValueError, match=r"^GPT2LMHeadModel has no list of decoder layers; fuse takes a transformers causal LM$"
    ):
        fuse(model)
    with pytest.raises(
        ValueError, match=r"^Linear has no list of decoder layers; fuse takes a transformers causal LM$"
    ):
        fuse(nn.Linear(2, 2))
    assert why_not_fused(model) == ["GPT2LMHeadModel has no list of decoder layers"]
    assert engine_of(model) is None
    unfuse(model)


def test_a_fused_model_and_wrong_policies_are_refused() -> None:
    model = family_model("llama")
    with pytest.raises(ValueError, match=r"^3 policies for 2 layers: give one for each, or one for all$"):
        quietly(model, [LayerPolicy()] * 3)
    assert engine_of(model) is None
    quietly(model)
    with pytest.raises(ValueError, match=r"^this model is fused already; call unfuse\(model\) first$"):
        quietly(model)


# -- plan and policies ------------------------------------------------------------------------------------------------


def test_the_printed_plan(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(family_model("mistral", num_hidden_layers=5), rank_pattern={"down_proj": 16})
    half = LayerPolicy(keep=frozenset({"qkv", "attention", "middle"}), mlp_rows=64)
    least = LayerPolicy(keep=frozenset(), offload_input=True)
    hooked(model, "base_model.model.model.layers.3")
    plan = fuse(model, [half, half, LayerPolicy(), LayerPolicy(), least])
    printed = capsys.readouterr().out
    assert printed == f"{plan}\n"
    assert printed.splitlines() == [
        "fused engine: 4 of 5 layers (Mistral)",
        "  weights    28 in the operand",
        "  adapters   28 LoRA projections, rank 4, 16",
        "  attention  dense: math (no NVIDIA GPU); packed: math (no NVIDIA GPU)",
        "  kernels    PyTorch reference on cpu",
        "  policy     layers 0-1: recompute gate_up, MLP 64 tokens at a time",
        "  policy     layers 2: keep all",
        "  policy     layers 4: recompute qkv, attention, middle, gate_up, input in host memory",
        f"  reference  layers 3: {OWN_CALL}",
    ]
    assert plan.dtype == "float32"


def test_the_plan_of_other_models() -> None:
    plan = quietly(adapted(family_model("llama"), r=80), dtype=torch.bfloat16)
    assert plan.adapters == "14 LoRA projections, rank 80, some added by cuBLAS"
    assert (plan.weights, plan.dtype) == ("14 float32, cast into the operand", "bfloat16")
    plan = quietly(family_model("phi3").bfloat16())
    assert (plan.weights, plan.adapters, plan.dtype) == ("8 in the operand", "none", "bfloat16")


def test_every_layer_has_its_policy_and_none_changes_a_bit() -> None:
    model = adapted(family_model("qwen3", num_hidden_layers=3))
    quietly(model)
    plain = step(model)
    policies = [
        LayerPolicy(keep=frozenset({"gate_up"})),
        LayerPolicy(keep=frozenset(), offload_input=True),
        LayerPolicy(keep=frozenset({"qkv", "attention"})),
    ]
    set_policies(model, policies)
    engine = engine_of(model)
    assert engine is not None
    assert [layer.policy for layer in engine.decoder.layers] == policies
    assert_bits(step(model), plain)
    unfuse(model)
    quietly(model, policies)
    assert_bits(step(model), plain)


def assert_bits(ours: Result, theirs: Result) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert same_state(ours[1], theirs[1])


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_transformers_gradient_checkpointing_is_a_policy(options: dict[str, Any] | None) -> None:
    model = adapted(family_model("llama"))
    first = LayerPolicy(keep=frozenset({"qkv"}))
    quietly(model, [first, LayerPolicy()])
    plain = step(model)
    layers = engine_of(model).decoder.layers  # type: ignore[union-attr]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    assert all(layer.policy == LayerPolicy(keep=frozenset()) for layer in layers)
    assert_bits(step(model), plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert [layer.policy for layer in layers] == [first, LayerPolicy()]
    assert_bits(step(model), plain)


def test_checkpointing_that_is_enabled_already_is_the_policy() -> None:
    model = adapted(family_model("llama"))
    model.gradient_checkpointing_enable()
    plan = quietly(model)
    assert plan.policies == ("layers 0-1: recompute qkv, attention, middle, gate_up",)
    model.gradient_checkpointing_disable()
    layers = engine_of(model).decoder.layers  # type: ignore[union-attr]
    assert [layer.policy for layer in layers] == [LayerPolicy()] * 2
    for enabled in (True, False):  # the model's own layers do as they are told, too: they take over now and then
        (model.gradient_checkpointing_enable if enabled else model.gradient_checkpointing_disable)()
        assert [layer.original.gradient_checkpointing for layer in layers] == [enabled] * 2
        step(model, GIVEN["left padding"][0])
    unfuse(model)
    assert not model.is_gradient_checkpointing


def test_a_forward_without_gradient_copies_nothing_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(family_model("llama"))
    quietly(model, LayerPolicy(keep=frozenset(), offload_input=True))
    copies = []
    own = fused_layer.HostCopy
    monkeypatch.setattr(fused_layer, "HostCopy", lambda tensor: copies.append(tensor.shape) or own(tensor))
    with torch.no_grad():
        model(input_ids=IDS)
    assert copies == []
    step(model)
    assert copies == [(33, 24)] * 2


def test_mixtrals_packed_rows_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    own = FusedLayer.forward

    def spy(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        masks.append(kwargs["attention_mask"].shape)
        return own(self, hidden, *args, **kwargs)

    monkeypatch.setattr(FusedLayer, "forward", spy)
    model = mixtral().train()
    quietly(model)
    model(**GIVEN["positions that restart"][0], use_cache=False)
    assert masks == [(1, 1, 0, 0)] * 2


def test_a_second_derivative_is_refused() -> None:
    model = family_model("llama").train().requires_grad_(False)
    quietly(model)
    embeddings = model.get_input_embeddings()(IDS).requires_grad_()
    loss = model(inputs_embeds=embeddings).logits.square().sum()
    (first,) = torch.autograd.grad(loss, [embeddings], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice a function that was marked with @once_differentiable"):
        first.square().sum().backward()


def test_a_frozen_model_needs_no_backward() -> None:
    model = family_model("llama").train().requires_grad_(False)
    quietly(model)
    assert not model(input_ids=IDS).logits.requires_grad
    embeddings = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    ours, embeddings.grad = embeddings.grad, None
    unfuse(model)
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert ours is not None
    assert embeddings.grad is not None
    assert error(ours, embeddings.grad) < TOLERANCE


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def on_gpu(family: str, policy: LayerPolicy) -> tuple[Any, Callable[[], dict[str, torch.Tensor]]]:
    """A fused bf16 model, and a step on two rows that gives its adapter's gradients."""
    base = family_model(family, hidden_size=64, intermediate_size=128, head_dim=16).to("cuda", torch.bfloat16)
    model = adapted(base)
    quietly(model, policy)
    engine, ids = engine_of(model), IDS[:2].cuda()
    assert engine is not None
    engine.decoder.config.use_cache = False
    layout = SequenceLayout.dense(*ids.shape)

    def step_() -> dict[str, torch.Tensor]:
        model.zero_grad()
        engine.given_layout = layout
        model(input_ids=ids).logits.float().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    return model, step_


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_deterministic_mode_policies_do_not_change_a_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep = frozenset({"qkv", "attention"})
    policies = [LayerPolicy(), LayerPolicy(keep=keep), LayerPolicy(keep=frozenset(), offload_input=True)]
    torch.use_deterministic_algorithms(True)
    try:
        found = [on_gpu(family, policy)[1]() for policy in policies]
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(found[0]) == 28
    assert all(same_state(gradients, found[0]) for gradients in found[1:])


@needs_gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    _, step_ = on_gpu("llama", LayerPolicy())
    step_()  # libraries choose, kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- several processes ------------------------------------------------------------------------------------------------


def test_ddp_and_fsdp2_have_the_gradient_of_one_process() -> None:
    """Two processes over gloo; parallel_steps.py says what they do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("parallel_steps.py")
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
    assert done[0][0].split() == ["ddp-lora", "ddp-full", "fsdp-lora", "fsdp-full"]
