"""Loading what answers: runs, adapters and models, and the bases that are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import make_tiny_model
from trained import copy_run, tiny_base, tiny_run
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.runs import RunFolder
from tunesmith.workflows.load import LoadedModel, load
from tunesmith.workflows.merge import merge

IDS = torch.arange(40)[None]


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return loaded.forward.model(input_ids=IDS).logits


def reference(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """The logits of transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# -- what loads -------------------------------------------------------------------------------------------------------


def test_a_run_is_its_adapter_over_its_base(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tiny_base(tmp_path_factory)
    loaded = load(str(lora_run))
    assert torch.equal(logits(loaded), reference(base, lora_run / "adapter"))
    assert not torch.allclose(logits(loaded), reference(base), atol=0.1)
    assert (loaded.adapted, loaded.dtype, loaded.source.name) == (True, "fp32", str(base))
    assert loaded.run is not None
    assert loaded.run.path == lora_run
    assert not loaded.forward.model.training
    with loaded.forward.model.disable_adapter():
        assert torch.equal(logits(loaded), reference(base))


def test_an_adapter_folder_names_its_base(lora_run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(lora_run / "adapter", adapter)
    loaded = load(str(adapter), dtype="fp32")
    assert torch.equal(logits(loaded), logits(load(str(lora_run))))
    assert (loaded.adapted, loaded.run) == (True, None)


def test_the_base_of_an_adapter_can_be_somewhere_else(
    lora_run: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = Path(shutil.copytree(tiny_base(tmp_path_factory), tmp_path / "moved"))
    adapter = Path(shutil.copytree(lora_run / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    with pytest.raises(ModelError, match=r"^/gone/base: no such model folder"):
        load(str(adapter))
    loaded = load(str(adapter), model=str(moved), dtype="fp32")
    assert torch.equal(logits(loaded), logits(load(str(lora_run))))
    assert torch.equal(logits(load(str(lora_run), model=str(moved))), logits(loaded))


def test_a_model_folder_is_itself(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tiny_base(tmp_path_factory)
    loaded = load(str(base), dtype="fp32")
    assert torch.equal(logits(loaded), reference(base))
    assert (loaded.adapted, loaded.run, loaded.chat.name) == (False, None, "the model's own")


def test_a_full_run_is_its_own_model(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    loaded = load(str(full_run))
    assert torch.equal(logits(loaded), reference(full_run / "model"))
    assert not torch.allclose(logits(loaded), reference(tiny_base(tmp_path_factory)), atol=0.1)
    assert not loaded.adapted
    assert loaded.run is not None
    base = load(str(full_run), base=True)
    assert torch.equal(logits(base), reference(tiny_base(tmp_path_factory)))
    assert not base.adapted


def test_the_base_of_a_run_has_its_settings(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = load(str(lora_run), base=True)
    assert torch.equal(logits(base), reference(tiny_base(tmp_path_factory)))
    assert (base.adapted, base.dtype) == (False, "fp32")


def test_a_qlora_run_is_quantized_as_in_training_or_not_at_all(
    qlora_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def weight(loaded: LoadedModel) -> torch.Tensor:
        return loaded.forward.base.model.layers[0].mlp.up_proj.base_layer.weight

    assert weight(load(str(qlora_run))).dtype == torch.uint8
    plain = load(str(qlora_run), quantized=False)
    assert weight(plain).dtype == torch.float32
    assert torch.equal(logits(plain), reference(tiny_base(tmp_path_factory, 64), qlora_run / "adapter"))


def test_the_compute_type_can_be_chosen(lora_run: Path) -> None:
    loaded = load(str(lora_run), dtype="bf16")
    assert loaded.dtype == "bf16"
    assert loaded.forward.base.lm_head.weight.dtype == torch.bfloat16
    trained = [p for name, p in loaded.forward.model.named_parameters() if "lora_" in name]
    assert len(trained) == 28


def test_the_runs_chat_template_is_used(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny_run(tmp_path_factory, "lora", **{"data.chat_template": "none"})
    assert load(str(run)).chat.name == "none"
    assert load(str(run), base=True).chat.name == "none"


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_with_other_weights_is_refused(
    method: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tiny_run(tmp_path_factory, method)
    other = make_tiny_model(tmp_path / "other", seed=1, hidden=64 if method == "qlora" else 32)
    trained_on = RunFolder.open(run).metadata["model"]["weight_hash"]
    with pytest.raises(ModelError) as caught:
        load(str(run), model=str(other))
    message = str(caught.value)
    assert message.startswith(f"{other}: its weights (sha256 ")
    assert message.endswith(
        f") are not those that {run} was trained on ({trained_on[:12]}); pass the right base with --model "
        "(`tunesmith eval --force` measures this one all the same)"
    )
    said: list[str] = []
    loaded = load(str(run), model=str(other), force=True, progress=lambda stage, *_: said.append(stage))
    assert loaded.source.path == other
    assert said[0] == message.partition("; pass")[0] + "; forced"


def test_the_base_of_a_full_run_is_checked_too(full_run: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match=r"are not those that .* was trained on"):
        load(str(full_run), model=str(other), base=True)


@pytest.mark.parametrize(("method", "result"), [("lora", "adapter"), ("full", "model")])
def test_an_unfinished_run_is_refused(
    method: str, result: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = copy_run(tiny_run(tmp_path_factory, method), tmp_path / "run")
    shutil.rmtree(run / result)
    with pytest.raises(RunError) as caught:
        load(str(run))
    assert str(caught.value) == (f"{run}: this run is not finished (no {result}/); `tunesmith resume {run}` goes on")


def test_a_base_beside_a_model_would_be_ignored_and_is_refused(
    tiny_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for target in (str(tiny_model), str(tmp_path / "absent")):
        with pytest.raises(ModelError) as caught:
            load(target, model=str(tiny_base(tmp_path_factory)))
        assert str(caught.value) == (
            f"{target}: --model names the base of a run or an adapter, and this is neither; leave it out"
        )


def test_an_unknown_compute_type_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^dtype is 'float8': expected auto, bf16, fp16 or fp32$"):
        load(str(tiny_model), dtype="float8")


def test_an_adapter_of_another_base_is_refused(lora_run: Path, tmp_path: Path) -> None:
    """By the hash in its record, where it has one; at least by its tensors."""
    other = make_tiny_model(tmp_path / "other", layers=3)
    with pytest.raises(ModelError, match=rf"are not those that {lora_run / 'adapter'} was trained on"):
        load(str(lora_run / "adapter"), model=str(other))
    for force in (True, False):
        if not force:
            shutil.copytree(lora_run / "adapter", tmp_path / "adapter")
            (tmp_path / "adapter" / "tunesmith.json").unlink()
            name_base(tmp_path / "adapter", None)
        adapter = lora_run / "adapter" if force else tmp_path / "adapter"
        with pytest.raises(ModelError, match="tensors of the adapter are missing from its file and would be random"):
            load(str(adapter), model=str(other), force=force)


def test_a_damaged_record_of_the_base_is_named(lora_run: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "tunesmith.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tunesmith.json: damaged: base is missing; restore it, or remove it"):
        load(str(tmp_path / "adapter"))


# -- adapters of which nothing was recorded ---------------------------------------------------------------------------


def name_base(adapter: Path, name: str | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


@pytest.fixture
def foreign(lora_run: Path, tmp_path: Path) -> Path:
    """An adapter as PEFT saves it."""
    adapter = Path(shutil.copytree(lora_run / "adapter", tmp_path / "foreign"))
    (adapter / "tunesmith.json").unlink()
    return adapter


def warnings(adapter: Path, model: Path | None, **settings: Any) -> list[str]:
    said: list[str] = []
    load(str(adapter), model, dtype="fp32", progress=lambda stage, *_: said.append(stage), **settings)
    return [line for line in said if line.startswith("warning: ")]


def test_a_base_other_than_the_named_one_is_refused(
    foreign: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base, other = tiny_base(tmp_path_factory), make_tiny_model(tmp_path / "other", seed=9)
    same = Path(shutil.copytree(base, tmp_path / "same"))
    assert warnings(foreign, base) == warnings(foreign, same) == warnings(foreign, None) == []
    with pytest.raises(ModelError) as caught:
        load(str(foreign), other)
    said = rf"^{other}: its weights \(sha256 \w{{12}}\) are not those of {base} \(\w{{12}}\), which {foreign}/adapter_config.json names"
    assert re.match(said, str(caught.value))
    told: list[str] = []
    load(str(foreign), other, dtype="fp32", progress=lambda stage, *_: told.append(stage), force=True)
    assert any(re.match(said + r".*; forced$", line) for line in told)
    name_base(foreign, str(other))
    with pytest.raises(ModelError, match=rf"^{base}: its weights .* are not those of {other} "):
        merge(foreign, tmp_path / "merged", model=base)


@pytest.mark.parametrize("name", ["/gone/base", "some/model", "x" * 5000, "~nobody/x", "nul\0"])
def test_a_base_that_cannot_be_compared_is_said(name: str, foreign: Path, tiny_model: Path, tmp_path: Path) -> None:
    name_base(foreign, name)
    (said,) = warnings(foreign, tiny_model)
    assert said == (
        f"warning: {foreign}: it was trained on {name[:200]}, which is not on this machine, and nothing was recorded of its weights: "
        f"whether {tiny_model} has the same ones was not checked"
    )
    assert said.removeprefix("warning: ") in merge(foreign, tmp_path / "merged", model=tiny_model)["notes"]


def test_an_adapter_that_names_no_base_says_so(foreign: Path, tiny_model: Path) -> None:
    name_base(foreign, None)
    (said,) = warnings(foreign, tiny_model)
    assert said.startswith(f"warning: {foreign}: nothing says which base it was trained on")


def test_a_named_base_in_the_hubs_cache_is_compared(
    foreign: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = make_tiny_model(tmp_path / "cached", seed=9)

    def snapshot(name: str, **given: Any) -> str:
        assert (name, given["local_files_only"]) == ("some/model", True), "nothing is fetched"
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    name_base(foreign, "some/model")
    with pytest.raises(ModelError, match="are not those of some/model"):
        load(str(foreign), tiny_model)
    assert warnings(foreign, cached) == []
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (cached / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is not on this machine" in warnings(foreign, tiny_model)[0], "half of it was fetched"


def test_a_named_base_that_is_stored_quantized_is_said_and_not_refused(
    foreign: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Adapters that others trained over a 4-bit copy are meant for the 16-bit weights too."""
    stored = make_tiny_model(tmp_path / "tiny-bnb-4bit", seed=9)
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (stored / "config.json").write_text(json.dumps(config))
    name_base(foreign, str(stored))
    (said,) = warnings(foreign, tiny_model)
    assert said == (
        f"warning: {foreign}: it was trained on {stored}, which is stored quantized: whether {tiny_model} has the same weights was not checked"
    )
