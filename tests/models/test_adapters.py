"""LoRA through PEFT: target modules, fp32 adapters over any base, and files that PEFT and tunesmith both read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import make_tiny_model
from tunesmith.config import AdapterConfig, ModelConfig, QuantizationConfig
from tunesmith.errors import ModelError
from tunesmith.hardware import ComputeDType, probe
from tunesmith.models.adapters import (
    add_adapter,
    base_of_adapter,
    count_parameters,
    find_adapter,
    load_adapter,
    target_modules,
    weights_gb,
)
from tunesmith.models.load import find_model, load_model
from tunesmith.training.checkpoint import save_weights
from tunesmith.types import GB

CPU = probe("cpu")
IDS = torch.arange(30)[None]

SEPARATE = {
    "all-linear": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "attention": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "mlp": ["down_proj", "gate_proj", "up_proj"],
    "qv": ["q_proj", "v_proj"],
}
FUSED = {
    "all-linear": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "attention": ["o_proj", "qkv_proj"],
    "mlp": ["down_proj", "gate_up_proj"],
    "qv": ["qkv_proj"],
}
PRESETS = {"llama": SEPARATE, "qwen2": SEPARATE, "phi3": FUSED}


def base_model(folder: Path, dtype: ComputeDType = "fp32", quantization: QuantizationConfig | None = None) -> Any:
    config = ModelConfig(name=str(folder))
    return load_model(find_model(config), config, CPU, dtype, quantization).eval()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that NF4 can hold: its blocks are 64 weights of a row."""
    return make_tiny_model(tmp_path_factory.mktemp("wide") / "model", hidden=64)


def randomize(model: torch.nn.Module) -> None:
    """Trainable weights as after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """The folder of an adapter that tunesmith wrote over the tiny model."""
    model = add_adapter(base_model(tiny_model), AdapterConfig(r=4, alpha=8), str(tiny_model))
    randomize(model)
    save_weights(model, tmp_path)
    return tmp_path / "adapter"


# -- target modules ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    return {name: base_model(make_tiny_model(folder / name, family=name)) for name in PRESETS}


@pytest.mark.parametrize("family", PRESETS)
def test_presets_are_read_off_the_model(families: dict[str, Any], family: str) -> None:
    assert {preset: target_modules(families[family], preset) for preset in PRESETS[family]} == PRESETS[family]


@pytest.mark.parametrize("family", PRESETS)
@pytest.mark.parametrize("preset", ["all-linear", "mlp", "qv"])
def test_the_adapter_sits_on_the_preset_in_every_layer(
    tmp_path: Path, tiny_model: Path, family: str, preset: str
) -> None:
    folder = tiny_model if family == "llama" else make_tiny_model(tmp_path / "base", family=family)
    model = add_adapter(base_model(folder), AdapterConfig(r=2, target_modules=preset), "base")
    found = {name.split(".layers.")[1].split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert {name.split(".")[0] for name in found} == {"0", "1"}
    assert {name.rsplit(".", 1)[1] for name in found} == set(PRESETS[family][preset])
    assert not any("lm_head" in name for name, _ in model.named_parameters() if "lora" in name)


def test_a_list_of_names_is_taken_as_it_is(families: dict[str, Any]) -> None:
    assert target_modules(families["llama"], ["v_proj", "q_proj"]) == ["q_proj", "v_proj"]
    assert target_modules(families["llama"], ["layers.1.mlp.up_proj"]) == ["layers.1.mlp.up_proj"]


HAS = "of this model; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["zork"], f"adapter.target_modules: zork matches no linear layer {HAS}"),
        (["q_proj", "qkv_proj", "c_attn"], f"adapter.target_modules: qkv_proj, c_attn matches no linear layer {HAS}"),
        (["proj"], f"adapter.target_modules: proj matches no linear layer {HAS}"),  # part of a name is not a name
        ([], f"adapter.target_modules: the empty list matches no linear layer {HAS}"),
        (
            "all",
            "adapter.target_modules is 'all': expected one of all-linear, attention, mlp, qv, or a list of module names",
        ),
    ],
)
def test_what_matches_nothing_is_refused_with_the_names_there_are(
    families: dict[str, Any], setting: Any, message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        target_modules(families["llama"], setting)
    assert str(caught.value) == message


def test_a_preset_that_an_architecture_does_not_have(tmp_path: Path) -> None:
    gpt2 = base_model(make_tiny_model(tmp_path / "gpt2", family="gpt2", n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ModelError) as caught:
        target_modules(gpt2, "all-linear")
    assert str(caught.value) == (
        "adapter.target_modules: all-linear matches no linear layer of this model; "
        "it has none (its layers are of another type)"
    )


# -- what trains, and in which type -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("fp32", None),
        ("bf16", None),
        ("fp32", QuantizationConfig()),
        ("bf16", QuantizationConfig()),
        ("bf16", QuantizationConfig(scheme="fp4", double_quant=False)),
    ],
)
def test_only_the_adapter_trains_and_it_is_fp32(
    wide: Path, dtype: ComputeDType, quantization: QuantizationConfig | None
) -> None:
    model = add_adapter(base_model(wide, dtype, quantization), AdapterConfig(r=4), "base")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
    stored = torch.uint8 if quantization else {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.dtype == stored


def test_an_adapter_that_was_saved_in_bf16_trains_in_fp32(adapter: Path, tiny_model: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    model = load_adapter(base_model(tiny_model, "bf16"), adapter, trainable=True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 7 * 2
    assert {parameter.dtype for parameter in trainable} == {torch.float32}


def test_a_fresh_adapter_changes_nothing_and_follows_the_seed(tiny_model: Path) -> None:
    before = logits(base_model(tiny_model))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = add_adapter(base_model(tiny_model), AdapterConfig(), "base")
        assert torch.equal(logits(model), before)
        drawn.append(model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 4), (True, 32 / 4**0.5)])
def test_the_update_is_scale_times_b_times_a(tiny_model: Path, rslora: bool, scale: float) -> None:
    model = add_adapter(base_model(tiny_model), AdapterConfig(r=4, alpha=32, rslora=rslora), "base")
    randomize(model)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ (layer.base_layer.weight + scale * b @ a).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradients_through_a_quantized_base_are_those_of_its_dequantized_weights(wide: Path) -> None:
    """Also after an evaluation: bitsandbytes would repack the weights then, for a product that has no backward."""
    from bitsandbytes.functional import dequantize_4bit

    quantized = add_adapter(base_model(wide, "fp32", QuantizationConfig()), AdapterConfig(r=4), "base")
    plain = add_adapter(base_model(wide), AdapterConfig(r=4), "base")
    randomize(quantized)
    randomize(plain)
    for name, module in quantized.get_base_model().named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            values = dequantize_4bit(weight.data, weight.quant_state)
            plain.get_base_model().get_submodule(name).weight.data.copy_(values)
    logits(quantized)  # in eval mode
    found, expected = gradients(quantized), gradients(plain)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


# -- counting ---------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_unpacked(wide: Path) -> None:
    plain, quantized = base_model(wide), base_model(wide, "fp32", QuantizationConfig())
    head_and_embedding, norms = 2 * 320 * 64, 5 * 64
    attention = 64 * 64 + 2 * 32 * 64 + 64 * 64  # q, k and v of half the width, o
    total = head_and_embedding + norms + 2 * (attention + 3 * 64 * 128)
    assert count_parameters(plain) == (total, total)
    assert count_parameters(quantized)[1] == total
    model = add_adapter(quantized, AdapterConfig(r=4, target_modules="qv"), "base")
    lora = 2 * (4 * (64 + 64) + 4 * (64 + 32))
    assert count_parameters(model) == (lora, total + lora)


def test_memory_of_the_weights_is_what_is_stored(wide: Path) -> None:
    plain, half = base_model(wide), base_model(wide, "bf16")
    parameters, buffers = count_parameters(plain)[1], sum(b.numel() * b.element_size() for b in plain.buffers())
    assert weights_gb(plain) == pytest.approx((4 * parameters + buffers) / GB)
    assert weights_gb(half) == pytest.approx((2 * parameters + buffers) / GB)
    quantized = base_model(wide, "fp32", QuantizationConfig())
    in_four_bits = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    stored = 4 * (parameters - in_four_bits) + in_four_bits / 2 + buffers
    scales = in_four_bits / 64  # one byte for each block of 64; theirs are in fp32, one for each 256 or less
    of_scales = 4 * 2 * 7
    assert weights_gb(quantized) == pytest.approx((stored + scales + of_scales) / GB)


# -- files ------------------------------------------------------------------------------------------------------------


def test_peft_loads_what_we_save_with_equal_logits(adapter: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours = add_adapter(base_model(tiny_model), AdapterConfig(r=4, alpha=8), str(tiny_model))
    randomize(ours)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = logits(base)
    theirs = PeftModel.from_pretrained(base, adapter)
    assert torch.equal(logits(theirs), logits(ours))
    assert not torch.allclose(logits(theirs), plain, atol=0.1)
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tiny_model)
    assert (written["r"], written["lora_alpha"], written["task_type"]) == (4, 8, "CAUSAL_LM")
    assert sorted(written["target_modules"]) == SEPARATE["all-linear"]


def test_the_base_is_recorded_under_the_name_it_was_given(tiny_model: Path, tmp_path: Path) -> None:
    """A hub id stays one, although the weights came from a folder."""
    save_weights(add_adapter(base_model(tiny_model), AdapterConfig(r=2), "org/base"), tmp_path)
    assert base_of_adapter(tmp_path) == "org/base"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "use_dora": True},
    ],
)
def test_we_load_what_peft_saved_with_equal_logits(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(base_model(tiny_model), tmp_path / "theirs")
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.allclose(logits(ours), logits(base_model(tiny_model)), atol=0.1)
    assert base_of_adapter(tmp_path / "theirs") == str(tiny_model)


def test_training_goes_on_from_another_adapter_with_its_own_rank(adapter: Path, tiny_model: Path) -> None:
    model = add_adapter(base_model(tiny_model), AdapterConfig(r=16, init_from=str(adapter.parent)), "base")
    saved = load_file(adapter / "adapter_model.safetensors")
    trainable = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert set(trainable) == set(saved)
    assert all(torch.equal(trainable[name], tensor) for name, tensor in saved.items())
    assert model.peft_config["default"].r == 4


def test_an_adapter_is_found_in_its_folder_and_in_a_run(adapter: Path, tmp_path: Path) -> None:
    assert find_adapter(adapter) == adapter
    assert find_adapter(adapter.parent) == adapter
    with pytest.raises(ModelError) as caught:
        find_adapter(tmp_path / "absent")
    assert str(caught.value) == f"{tmp_path / 'absent'}: not an adapter (no adapter_config.json there)"
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError) as caught:
        find_adapter(adapter)
    assert str(caught.value) == f"{adapter}: no adapter_model.safetensors (pickled adapters are not read)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("{}", "names no base model; pass it with --model"),
        ("[]", "names no base model; pass it with --model"),
        (
            "[" * 100_000,
            "not valid JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
        ),
    ],
)
def test_a_config_that_names_no_base(adapter: Path, text: str, message: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        base_of_adapter(adapter)
    assert str(caught.value) == f"{adapter / 'adapter_config.json'}: {message}"


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(f"{FIRST}.weight")),
            f"1 tensors of the adapter are missing from its file and would be random ({FIRST}.default.weight); "
            "it was made for another base, or is damaged",
        ),
        (
            lambda folder: edit_tensors(folder, lambda tensors: tensors.update({"zork.lora_A.weight": torch.ones(2)})),
            "1 tensors in the adapter's file have no place in this model (zork.lora_A.weight); "
            "it was made for another base, or is damaged",
        ),
        (
            lambda folder: edit_config(folder, target_modules=["zork"]),
            "this adapter cannot be loaded on the model: Target modules {'zork'} not found in the base model. "
            "Please check the target modules and try again.",
        ),
        (lambda folder: edit_config(folder, peft_type="ZORK"), "this adapter cannot be loaded on the model: 'ZORK'"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
            "this adapter cannot be loaded on the model: Error while deserializing header: header too small",
        ),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(
    adapter: Path, tiny_model: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(adapter)
    with pytest.raises(ModelError) as caught:
        load_adapter(base_model(tiny_model), adapter)
    assert str(caught.value) == f"{adapter}: {reason}"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"r": "x"}, "'<=' not supported between instances of 'str' and 'int'"),
        ({"rank_pattern": "x"}, "'str' object has no attribute 'keys'"),
        ({"bias": -1}, "'int' object has no attribute 'endswith'"),
        ({"monteclora_config": [None]}, "'list' object has no attribute 'num_samples'"),
        ({"target_modules": "["}, "unterminated character set at position 0"),
    ],
)
def test_an_adapters_config_that_peft_trips_over(
    adapter: Path, tiny_model: Path, values: dict[str, Any], reason: str
) -> None:
    edit_config(adapter, **values)
    with pytest.raises(ModelError) as caught:
        load_adapter(base_model(tiny_model), adapter)
    assert str(caught.value) == (
        f"{adapter / 'adapter_config.json'}: PEFT makes no adapter of it ({reason}); it is not as PEFT saves one, or is damaged"
    )


def test_an_adapters_config_that_is_nested_too_deeply(adapter: Path, tiny_model: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ModelError, match=r"adapter_config.json: PEFT makes no adapter of it \(maximum recursion depth"):
        load_adapter(base_model(tiny_model), adapter)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layers": 3}, "14 tensors of the adapter are missing from its file and would be random"),
        ({"layers": 1}, "14 tensors in the adapter's file have no place in this model"),
        ({"family": "phi3"}, "20 tensors in the adapter's file have no place in this model"),
        ({"hidden": 64}, "size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    adapter: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    other = make_tiny_model(tmp_path / "other", **settings)
    with pytest.raises(ModelError) as caught:
        load_adapter(base_model(other), adapter)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_base_is_untouched_by_a_saved_adapter(adapter: Path, tiny_model: Path) -> None:
    before = shutil.copy(tiny_model / "model.safetensors", adapter.parent / "before.safetensors")
    model = load_adapter(base_model(tiny_model), adapter)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model(tiny_model)))
    assert (tiny_model / "model.safetensors").read_bytes() == Path(before).read_bytes()
