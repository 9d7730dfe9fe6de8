"""Several adapters merged at once, and the base that a QLoRA adapter was trained over."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters_of import Kind, logits, make_adapter, plain
from tiny import make_tiny_model
from trained import copy_run, tiny_base, tiny_run
from tunesmith.config import QuantizationConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.export.combine import METHODS, combination
from tunesmith.export.quantized import QuantizedWeights
from tunesmith.export.skeleton import Skeleton
from tunesmith.models.adapters import load_adapter
from tunesmith.workflows.merge import merge

KIND = Kind({"target_modules": ["q_proj", "up_proj"]})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = make_tiny_model(tmp_path / "base", hidden=64)
    return base, make_adapter(base, tmp_path / "one", KIND, seed=1), make_adapter(base, tmp_path / "two", KIND, seed=2)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_pefts_weighted_adapter_merged(
    pair: tuple[Path, Path, Path], method: str, tmp_path: Path
) -> None:
    base, one, two = pair
    density = None if method in ("linear", "svd") else 0.5
    result = merge([one, two], tmp_path / "out", dtype="fp32", method=method, weights=[0.7, -0.3], density=density)
    assert (result["streamed"], result["dtype"]) == (True, "fp32")
    assert result["difference"] < 1e-5
    adapted = load_adapter(plain(base), one)
    adapted.load_adapter(str(two), "two")
    torch.manual_seed(0)
    options = {"density": density} if density else {}
    adapted.add_weighted_adapter(["default", "two"], [0.7, -0.3], "both", combination_type=method, **options)
    adapted.set_adapter("both")
    expected = adapted.merge_and_unload()
    for name, tensor in plain(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert (logits(expected) - logits(plain(base))).norm() > 0.01 * logits(expected).norm()


def test_svd_of_a_large_enough_rank_is_the_weighted_sum(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """With one weight 0 nothing of that adapter is left, and rank 4 holds the other whole."""
    base, one, two = pair
    merge([one, two], tmp_path / "out", dtype="fp32", method="svd", weights=[1.0, 0.0])
    merge(one, tmp_path / "alone", dtype="fp32")
    both, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone"))
    before = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(both[name], alone[name], rtol=1e-4, atol=1e-4)
    assert (both[name] - before[name]).norm() > 0.1


@pytest.mark.parametrize(("method", "times"), [("linear", 2), ("svd", 1)])
def test_rank_stabilized_adapters_keep_their_scale(tmp_path: Path, method: str, times: int) -> None:
    """Of one adapter twice, by half each, what it adds alone (linear weighs the factors: twice that). PEFT's own is the root of the rank
    too strong."""
    base = make_tiny_model(tmp_path / "base", hidden=64)
    one = make_adapter(base, tmp_path / "one", replace(KIND, lora={**KIND.lora, "use_rslora": True}), seed=1)
    same = Path(shutil.copytree(one, tmp_path / "same"))
    merge([one, same], tmp_path / "out", dtype="fp32", method=method, weights=[0.5, 0.5])
    merge(one, tmp_path / "alone", dtype="fp32")
    name = "model.layers.0.mlp.up_proj.weight"
    both, alone, before = (
        load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("out", "alone", "base")
    )
    torch.testing.assert_close(both - before, times * (alone - before), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "what"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "modules that were trained in full"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trained token rows"),
    ],
)
def test_what_peft_would_leave_out_is_refused(
    pair: tuple[Path, Path, Path], tmp_path: Path, lora: dict[str, Any], what: str
) -> None:
    base, one, _ = pair
    other = make_adapter(base, tmp_path / "other", replace(KIND, lora={**KIND.lora, **lora}), seed=3)
    with pytest.raises(ModelError, match=f"{other} has {what}, which PEFT does not combine; merge it alone"):
        merge([one, other], tmp_path / "out", dtype="fp32", method="svd")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_beginning_that_is_out_of_the_base_is_refused(
    pair: tuple[Path, Path, Path], tmp_path: Path, begun: str, place: int
) -> None:
    """With weights 1 and 0 the model would have been the first adapter's over the second one's base."""
    _, one, two = pair
    config = two / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": begun}))
    both, weights = ([two, one], [0.0, 1.0]) if place == 0 else ([one, two], [1.0, 0.0])
    with pytest.raises(ModelError, match=f"{two} began with {begun}, .* path_initial_model_for_weight_conversion"):
        merge(both, tmp_path / "out", dtype="fp32", method="svd", weights=weights)
    assert not (tmp_path / "out").exists()


def test_a_converted_beginning_combines(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny_run(tmp_path_factory, **{"adapter.init_lora_weights": "pissa", "adapter.r": 4})
    plain_one = tiny_run(tmp_path_factory)
    merge([plain_one, run], tmp_path / "out", dtype="fp32", method="svd", weights=[0.0, 1.0])
    merge(run, tmp_path / "alone", dtype="fp32")
    both, alone = (logits(plain(tmp_path / name)) for name in ("out", "alone"))
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)


def test_several_go_beside_the_first_by_default(pair: tuple[Path, Path, Path]) -> None:
    _, one, two = pair
    assert merge([one, two], method="linear", dtype="fp32")["path"] == str(one.with_name("one-merged-linear"))


@pytest.mark.parametrize(
    ("count", "given", "problems"),
    [
        (1, ("ties", None, 0.5), ["--method, --density: for several adapters, and one was named; name more, or leave it out"]),
        (2, (None, None, None), ["--method is missing: several adapters merge by one of linear, ties, dare_linear, dare_ties, svd"]),
        (2, ("linear", [1.0], None), ["--weights are 1.0: expected 2 numbers, one for each adapter, not all 0"]),
        (2, ("linear", [0.0, 0.0], None), ["--weights are 0.0, 0.0: expected 2 numbers, one for each adapter, not all 0"]),
        (2, ("ties", None, None), ["--density: ties keeps a share of each adapter's values; set it, e.g. 0.5"]),
        (2, ("ties", None, 1.5), ["--density is 1.5: expected a share above 0, at most 1"]),
        (2, ("svd", None, 0.5), ["--density: svd keeps all values; leave it out, or use ties, dare_linear, dare_ties"]),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(count: int, given: Any, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        combination(count, *given)
    assert caught.value.problems == problems


def test_adapters_of_different_ranks_are_refused_by_pefts_own_reason(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, _ = pair
    other = make_adapter(base, tmp_path / "other", Kind({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(ModelError, match=r"^PEFT cannot combine .* by linear: "):
        merge([one, other], tmp_path / "out", method="linear")
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_bases_are_refused(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, one, _ = pair
    elsewhere = make_tiny_model(tmp_path / "elsewhere", hidden=64, seed=5)
    other = make_adapter(elsewhere, tmp_path / "other", KIND)
    with pytest.raises(ModelError, match=r"whose weights differ; adapters merge over one base$"):
        merge([one, other], tmp_path / "out", method="linear")


# -- the base of a QLoRA run ------------------------------------------------------------------------------------------


def quantized_weights(base: Path, scheme: str) -> dict[str, torch.Tensor]:
    """What transformers and bitsandbytes hold after loading, dequantized."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: Any = {"load_in_8bit": True} if scheme == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": scheme, "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    found = {}
    for name, parameter in model.named_parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found[name] = dequantize_4bit(parameter.data, state).float()
        elif parameter.dtype == torch.int8:
            found[name] = parameter.data.float() * parameter.SCB.float()[:, None] / 127
    return found


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_the_quantized_base_is_bitsandbytes_own(scheme: Any, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", hidden=64)
    skeleton = Skeleton(base)
    weights = QuantizedWeights(skeleton, QuantizationConfig(scheme=scheme), torch.float32)
    expected = quantized_weights(base, scheme)
    assert weights.names == set(expected)
    assert len(expected) == 14
    for name, tensor in expected.items():
        torch.testing.assert_close(weights.read(name), tensor, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(weights.read(name), skeleton.stored(name), atol=1e-4)
    assert torch.equal(weights.read("lm_head.weight"), skeleton.stored("lm_head.weight"))


def test_a_qlora_run_merges_onto_either_base_and_says_how_far_each_is_from_what_was_trained(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = copy_run(tiny_run(tmp_path_factory, "qlora"), tmp_path / "run")
    onto16, onto4 = merge(run), merge(run, run / "four", onto="quantized")
    assert (onto16["onto"], onto4["onto"], onto4["streamed"]) == ("16bit", "quantized", True)
    # The same two distances, whichever of them was written. In fp32 the quantized base's merge is the trained model.
    assert onto16["kl_of_trained"]["16bit"] > 1e-4
    assert abs(onto16["kl_of_trained"]["quantized"]) < 1e-6
    for name in ("16bit", "quantized"):
        assert onto16["kl_of_trained"][name] == pytest.approx(onto4["kl_of_trained"][name], rel=1e-3, abs=1e-6)
    before = quantized_weights(tiny_base(tmp_path_factory, 64), "nf4")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    after = load_file(run / "four" / "model.safetensors")
    for name, tensor in before.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        change = 32 / 16 * adapter[f"{path}.lora_B.weight"] @ adapter[f"{path}.lora_A.weight"]
        torch.testing.assert_close(after[name], tensor + change, rtol=1e-4, atol=1e-5)


def test_onto_quantized_is_refused_where_nothing_was(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = copy_run(tiny_run(tmp_path_factory), tmp_path / "run")
    with pytest.raises(ModelError, match=r"was not trained over a quantized base, as far as is known; leave it out$"):
        merge(run, onto="quantized")
    with pytest.raises(ConfigError, match=r"^onto is '8bit': expected 16bit or quantized$"):
        merge(run, onto="8bit")
