"""Files that were changed since they were saved: the adapter's weights, its config, the base's config, the base's weights with their time put back."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from command_line import tunesmith
from trained import copy_run, record_again, tiny_base, tiny_data, tiny_run
from tunesmith import api
from tunesmith.config import load_config
from tunesmith.errors import ModelError, RunError
from tunesmith.models.base_config import computed, config_differences
from tunesmith.models.load import ModelSource, weight_hash
from tunesmith.registry.records import read_json
from tunesmith.serving.templates import Templates
from tunesmith.workflows.adapters import verify_adapter
from tunesmith.workflows.load import load
from tunesmith.workflows.merge import merge
from tunesmith.workflows.serve_adapters import AdapterReader


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny_run(tmp_path_factory), tmp_path / "run")


@pytest.fixture
def base(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_base(tmp_path_factory), tmp_path / "base"))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((read_json(path) or {}) | values))


def without(path: Path, key: str) -> None:
    path.write_text(json.dumps({name: value for name, value in (read_json(path) or {}).items() if name != key}))


def messages(result: dict[str, Any], name: str) -> list[tuple[bool | None, str]]:
    return [(check["ok"], check["message"]) for check in result["checks"] if check["name"] == name]


# -- the adapter's config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["run", "adapter"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_alpha": 999}, "lora_alpha 999 (recorded: 32)"),
        ({"use_rslora": True, "r": 8}, "r 8 (recorded: 16), use_rslora True (recorded: False)"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern {'q_proj': 1} (recorded: {})"),
        ({"layers_to_transform": [0]}, "layers_to_transform [0] (recorded: None)"),
    ],
)
def test_another_value_in_the_adapters_config_is_named(
    run: Path, tmp_path: Path, part: str, change: dict[str, Any], said: str
) -> None:
    target, config = run if part == "run" else run / "adapter", run / "adapter" / "adapter_config.json"
    change_json(config, **change)
    result = verify_adapter(target, dtype="fp32")
    assert not result["ok"]
    assert messages(result, "config") == [(False, f"adapter_config.json was changed since it was saved: {said}")]
    for use in (lambda: load(target, dtype="fp32"), lambda: merge(target, tmp_path / "out")):
        with pytest.raises(
            ModelError, match=re.escape(f"{config}: was changed since it was saved: {said}; restore it")
        ):
            use()


def test_what_computes_nothing_and_the_order_of_names_may_differ(run: Path) -> None:
    config = run / "adapter" / "adapter_config.json"
    names = (read_json(config) or {})["target_modules"]
    change_json(
        config, target_modules=names[::-1], peft_version="9.9", base_model_name_or_path="elsewhere", lora_dropout=0.5,
        a_key_of_a_newer_peft=False,
    )  # fmt: skip
    assert verify_adapter(run, dtype="fp32")["ok"]
    load(run, dtype="fp32")


def test_a_record_without_config_is_compared_with_the_runs_settings(run: Path) -> None:
    adapter = run / "adapter"
    without(adapter / "tunesmith.json", "adapter_config")
    assert messages(verify_adapter(run, dtype="fp32"), "config")[0][0] is True
    assert messages(verify_adapter(adapter, dtype="fp32"), "config") == [
        (None, "adapter_config.json: its values were not recorded when it was saved")
    ]
    change_json(adapter / "adapter_config.json", lora_alpha=64)
    assert messages(verify_adapter(run, dtype="fp32"), "config")[0][0] is False
    with pytest.raises(ModelError, match=r"lora_alpha 64 \(recorded: 32\.?0?\)"):
        load(run, dtype="fp32")
    load(adapter, dtype="fp32")


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_a_converted_adapter_is_as_recorded(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, begun: str
) -> None:
    run = copy_run(tiny_run(tmp_path_factory, **{"adapter.init_lora_weights": begun, "adapter.r": 4}), tmp_path / "run")
    assert verify_adapter(run, dtype="fp32")["ok"]
    without(run / "adapter" / "tunesmith.json", "adapter_config")
    assert messages(verify_adapter(run, dtype="fp32"), "config")[0][0] is None, "twice the rank is what conversion does"


# -- the adapter's weights --------------------------------------------------------------------------------------------


def change_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))][0, 0] += 0.125
    save_file(tensors, path, metadata={"format": "pt"})


def test_changed_weights_are_used_by_nothing(
    run: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    adapter = run / "adapter"
    change_weights(adapter)
    said = re.escape(f"{adapter / 'adapter_model.safetensors'}: was changed since it was saved (sha256 ")
    for target in (run, adapter):
        with pytest.raises(ModelError, match=said):
            load(target, dtype="fp32")
        with pytest.raises(ModelError, match=said):
            merge(target, tmp_path / "out")
    notes: list[str] = []
    load(run, dtype="fp32", force=True, progress=lambda stage, *_: notes.append(stage))
    assert any("was changed since it was saved" in note and note.endswith("; forced") for note in notes)
    load(run, dtype="fp32", base=True)
    values = {
        "model.name": str(tiny_base(tmp_path_factory)), "data.path": str(tiny_data(tmp_path_factory)), "model.dtype": "fp32",
        "adapter.init_from": str(run), "training.max_steps": 1,
    }  # fmt: skip
    with pytest.raises(ModelError, match=said):
        api.train(load_config(values=values), tmp_path / "next")
    templates = Templates()
    reader = AdapterReader(load(tiny_base(tmp_path_factory), dtype="fp32"), templates)
    with pytest.raises(ModelError, match=said):
        reader.read(str(run))
    record_again(run)
    templates.release(reader.read(str(run)).chat)


def test_a_run_that_lost_its_record_is_unverifiable(run: Path) -> None:
    (run / "adapter" / "tunesmith.json").unlink()
    change_weights(run / "adapter")
    said = tunesmith("adapters", "verify", run, "--dtype", "fp32")
    assert said.code == 1
    assert said.out.splitlines()[0].startswith(
        f"unverifiable: {run / 'adapter' / 'tunesmith.json'} (nothing says which weights were saved) missing"
    )


# -- the base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["run", "adapter"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": 0.1}, "rms_norm_eps 0.1 (recorded: 1e-06)"),
        (
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
            "rope_parameters.rope_theta 500.0 (recorded: 10000.0)",
        ),
    ],
)
def test_another_config_of_the_same_weights_is_another_base(
    run: Path, base: Path, tmp_path: Path, part: str, change: dict[str, Any], said: str
) -> None:
    target = run if part == "run" else run / "adapter"
    change_json(base / "config.json", **change)
    line = f"{base}: its config.json is not the one that {target} was trained on: {said}"
    assert messages(verify_adapter(target, base, dtype="fp32"), "base") == [(False, line)]
    with pytest.raises(ModelError, match=re.escape(line)):
        load(target, base, "fp32")
    with pytest.raises(ModelError, match=re.escape(line)):
        merge(target, tmp_path / "out", model=base)


def test_a_base_that_was_saved_again_is_the_same(run: Path, base: Path) -> None:
    """By an older transformers, which wrote rope_theta, and fewer keys; with another type, and other names."""
    config = read_json(base / "config.json") or {}
    theta = config.pop("rope_parameters")["rope_theta"]
    for key in ("attention_bias", "mlp_bias", "hidden_act", "attention_dropout", "initializer_range"):
        del config[key]
    (base / "config.json").write_text(
        json.dumps(config | {"rope_theta": theta, "torch_dtype": "float32", "transformers_version": "4.40.0"})
    )
    assert verify_adapter(run, base, dtype="fp32")["ok"]
    load(run, base, "fp32")


def test_older_records_say_nothing_of_the_bases_config(run: Path, base: Path) -> None:
    metadata = read_json(run / "metadata.json") or {}
    del metadata["model"]["config"]
    (run / "metadata.json").write_text(json.dumps(metadata))
    change_json(base / "config.json", rms_norm_eps=0.1)
    result = verify_adapter(run, base, dtype="fp32")
    assert result["ok"]
    assert messages(result, "base")[0][1].endswith("weights, tokenizer, chat template as recorded")


def test_code_of_its_own_is_compared_as_the_file_has_it(tmp_path: Path) -> None:
    source = ModelSource("own", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "depth": 3, "wide": 5}))
    recorded = computed({"model_type": "own", "depth": 2, "transformers_version": "4"})
    assert config_differences(recorded, source) == ["depth 3 (recorded: 2)"]
    assert config_differences(None, source) == []


def test_a_resumed_run_wants_the_same_config(
    tmp_path: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = {
        "model.name": str(base), "data.path": str(tiny_data(tmp_path_factory)), "model.dtype": "fp32", "training.max_steps": 2,
        "training.batch_size": 4,
    }  # fmt: skip
    api.train(load_config(values=values), tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "run" / "adapter")
    change_json(base / "config.json", rms_norm_eps=0.1)
    with pytest.raises(
        RunError, match=r"config.json computes something else than .*: rms_norm_eps 0.1 \(recorded: 1e-06\)"
    ):
        api.resume(tmp_path / "run")


def test_verify_reads_the_bases_bytes(run: Path, base: Path) -> None:
    """Its remembered hash is by path, size and time; a file of the hub's cache is named by its hash."""
    weights = base / "model.safetensors"
    stat = weights.stat()
    assert verify_adapter(run, base, dtype="fp32")["ok"]
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "its weights (sha256 " in messages(verify_adapter(run, base, dtype="fp32"), "base")[0][1]
    named = base / weight_of(run)
    weights.rename(named)
    weights.symlink_to(named)
    assert "its weights (sha256 " in messages(verify_adapter(run, base, dtype="fp32"), "base")[0][1]


def weight_of(run: Path) -> str:
    """The hash of the base's only file, as the hub's cache would name it."""
    from tunesmith.files import sha256_file

    source = Path((read_json(run / "metadata.json") or {})["model"]["path"])
    assert (read_json(run / "metadata.json") or {})["model"]["weight_hash"] == weight_hash(ModelSource("", source))
    return sha256_file(source / "model.safetensors")
