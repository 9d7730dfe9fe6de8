"""Adapters of rarer kinds merge to what PEFT computes, or are refused in one line; what combining cannot say, notes do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapters_of import Kind, logits, make_adapter, plain
from command_line import tunesmith
from tiny import make_tiny_model
from trained import copy_run, tiny_run
from tunesmith.errors import ModelError
from tunesmith.export.safetensors import mean_kl
from tunesmith.workflows.merge import merge

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "base", hidden=64)


# -- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_base_are_merged(tmp_path: Path, bias: str) -> None:
    base = make_tiny_model(tmp_path / "base", family="qwen2", hidden=64)
    adapter = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": TARGETS, "bias": bias}))
    result = merge(adapter, tmp_path / "out", dtype="fp32")
    assert not result["streamed"]
    assert "the adapter has biases of the base, which PEFT loads into the base itself" in result["notes"][0]
    expected = logits(PeftModel.from_pretrained(plain(base), adapter).eval())
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)
    before = plain(base).state_dict()["model.layers.0.self_attn.q_proj.bias"]
    after = plain(tmp_path / "out").state_dict()["model.layers.0.self_attn.q_proj.bias"]
    assert (after - before).abs().max() > 0.1
    with pytest.raises(ModelError, match=re.escape(f"{adapter} has biases of the base (bias: {bias})")):
        merge([adapter, adapter], tmp_path / "two", method="svd")


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"lora_bias": True}, "the adapter has a bias (lora_bias) and the base's layer has none that it could go into"),
        ({"alora_invocation_tokens": [10, 11]}, "acts only from its invocation tokens on (aLoRA), which merged weights cannot"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "repeats layers of the base (layer_replication)"),
    ],
)  # fmt: skip
def test_what_no_weights_can_compute_is_one_line(base: Path, tmp_path: Path, lora: dict[str, Any], said: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": TARGETS, **lora}))
    result = tunesmith("merge", adapter, "--dtype", "fp32", "--out", tmp_path / "out")
    assert (result.code, len(result.problems)) == (2, 1)
    assert said in result.problems[0]
    assert not (tmp_path / "out").exists()


def test_a_bias_of_the_adapter_without_one_in_the_base_in_memory(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(
        base, tmp_path / "adapter", Kind({"target_modules": TARGETS, "lora_bias": True, "bias": "lora_only"})
    )
    with pytest.raises(ModelError, match=r"has a bias \(lora_bias\)"):
        merge(adapter, tmp_path / "out", dtype="fp32")


# -- names and places -------------------------------------------------------------------------------------------------


def test_an_empty_name_and_a_link_to_nothing(base: Path, tmp_path: Path) -> None:
    result = tunesmith("merge", "")
    assert (result.code, result.problems) == (2, ["tunesmith: nothing to merge: name a run or an adapter"])
    adapter = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": TARGETS}))
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "gone")
    result = tunesmith("merge", adapter, "--out", out)
    assert (result.code, result.problems) == (
        2,
        [f"tunesmith: {out}: a link to {tmp_path / 'gone'}, which is not there; remove it, or choose another --out"],
    )
    assert "reading the base" not in result.err, "before any work"


def test_the_folder_that_one_is_in(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": TARGETS}))
    monkeypatch.chdir(adapter)
    assert merge(".", dtype="fp32")["path"] == str(tmp_path / "adapter-merged")


def test_a_lone_adapter_is_written_in_the_type_of_its_record(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = copy_run(tiny_run(tmp_path_factory), tmp_path / "run")
    assert merge(run / "adapter", tmp_path / "out")["dtype"] == "fp32"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert merge(run / "adapter", tmp_path / "asked", dtype="bf16")["dtype"] == "bf16"


# -- notes ------------------------------------------------------------------------------------------------------------


def test_a_combination_that_is_nothing_is_said(base: Path, tmp_path: Path) -> None:
    kind = Kind({"target_modules": TARGETS})
    one = make_adapter(base, tmp_path / "one", kind)
    same = Path(shutil.copytree(one, tmp_path / "same"))
    result = merge([one, same], tmp_path / "out", dtype="fp32", method="linear", weights=[1.0, -1.0])
    (note,) = [note for note in result["notes"] if "nothing" in note]
    assert note.startswith("the adapters, combined like this, change nothing (logits by ")
    assert note.endswith("the merged model computes what the base does; look at --weights")
    result = merge([one, same], tmp_path / "thin", dtype="fp32", method="ties", density=1e-9)
    assert any(note.endswith("look at --weights and --density") for note in result["notes"])
    result = merge([one, same], tmp_path / "sum", dtype="fp32", method="linear", weights=[1.0, 1.0])
    assert not any("nothing" in note for note in result["notes"])


def test_an_adapter_that_does_nothing_is_said(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    fresh = get_peft_model(plain(base), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS))
    fresh.save_pretrained(tmp_path / "fresh")
    result = merge(tmp_path / "fresh", tmp_path / "out", dtype="fp32")
    assert result["notes"] == [
        "the adapter changes nothing (logits by 0.0e+00): the merged model computes what the base does"
    ]


def test_no_kl_is_below_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        some = 30 * torch.randn(40, 320, generator=generator)
        assert mean_kl(some, some + 1e-7 * torch.randn(some.shape, generator=generator)) >= 0


# -- quantized and not ------------------------------------------------------------------------------------------------


def test_a_16_bit_adapter_among_qlora_ones(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    quantized = copy_run(tiny_run(tmp_path_factory, "qlora"), tmp_path / "quantized")
    base = json.loads((quantized / "metadata.json").read_text())["model"]["name"]
    whole = copy_run(tiny_run(tmp_path_factory, "lora", **{"model.name": base}), tmp_path / "whole")
    for both in ([quantized, whole], [whole, quantized]):
        with pytest.raises(ModelError, match=re.escape(f"{whole / 'adapter'} was not trained over a quantized base")):
            merge(both, tmp_path / "out", method="svd", onto="quantized")
        result = merge(both, tmp_path / f"{both[0].name}-out", method="svd")
        assert "kl_of_trained" not in result
        assert [note for note in result["notes"] if "quantized base is not measured: not all" in note]
    result = merge([quantized, quantized], tmp_path / "both", method="svd")
    assert result["kl_of_trained"].keys() == {"16bit", "quantized"}


def test_adapters_over_other_quantizations(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    one = copy_run(tiny_run(tmp_path_factory, "qlora"), tmp_path / "one")
    other = copy_run(tiny_run(tmp_path_factory, "qlora", **{"quantization.double_quant": False}), tmp_path / "other")
    with pytest.raises(ModelError, match=r"was trained over a base in nf4 \(double_quant False\), .* over another one"):
        merge([one, other], tmp_path / "out", method="svd", onto="quantized")


def test_bases_of_one_weight_and_two_configs(base: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", hidden=64, rms_norm_eps=0.1)
    kind = Kind({"target_modules": TARGETS})
    both = [make_adapter(base, tmp_path / "one", kind), make_adapter(other, tmp_path / "two", kind)]
    with pytest.raises(
        ModelError, match=r"the same weights and another config.json: rms_norm_eps 0.1 \(recorded: 1e-06\)"
    ):
        merge(both, tmp_path / "out", method="svd")
