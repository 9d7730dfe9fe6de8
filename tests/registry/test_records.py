"""Adapters found in folders: what their files say, and what hostile or damaged ones do not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_of import Kind, make_adapter
from tiny import make_tiny_model
from trained import copy_run, tiny_base, tiny_run
from tunesmith.errors import ModelError, RunError
from tunesmith.files import sha256_file
from tunesmith.registry.records import ANCESTORS, find_adapters, lineage, read_adapter, refuse_code
from tunesmith.runs import RunFolder


def evaluation(run: Path, name: str, created: str, accuracy: float) -> None:
    (run / "evaluations").mkdir(exist_ok=True)
    value = {"created": created, "task": "bins", "n": 8, "metrics": {"accuracy": {"value": accuracy, "stderr": 0.1}}}
    (run / "evaluations" / name).write_text(json.dumps(value))


def test_a_runs_adapter(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = copy_run(tiny_run(tmp_path_factory), tmp_path / "runs" / "first")
    evaluation(run, "a.json", "2026-01-02T00:00:00+0000", 0.75)
    evaluation(run, "b.json", "2026-01-01T00:00:00+0000", 0.25)
    (run / "evaluations" / "damaged.json").write_text("{")
    (record,) = find_adapters([tmp_path / "runs"])
    metadata = RunFolder.open(run).metadata
    assert (record.name, record.path, record.run, record.status) == ("first", str(run), str(run), "ok")
    assert (record.base, record.base_hash) == (str(tiny_base(tmp_path_factory)), metadata["model"]["weight_hash"])
    assert (record.kind, record.rank, record.alpha, record.dtype, record.quantization) == ("lora", 16, 32, "fp32", None)
    assert record.targets == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert record.created == metadata["created"]
    assert record.size_mb == (run / "adapter" / "adapter_model.safetensors").stat().st_size / 2**20
    assert (record.evaluation, record.metrics["accuracy"]["value"]) == ("a.json", 0.75)


def test_its_folder_alone_says_what_it_was_trained_on(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny_run(tmp_path_factory, "qlora")
    shutil.copytree(run / "adapter", tmp_path / "adapters" / "alone")
    (record,) = find_adapters([tmp_path / "adapters"])
    metadata = RunFolder.open(run).metadata
    assert (record.name, record.run, record.base) == ("alone", None, metadata["model"]["name"])
    assert (record.base_hash, record.dtype, record.quantization) == (metadata["model"]["weight_hash"], "fp32", "nf4")
    recorded = json.loads((run / "adapter" / "tunesmith.json").read_text())
    assert recorded["adapter_sha256"] == sha256_file(run / "adapter" / "adapter_model.safetensors")
    assert recorded["base"]["name"] == Path(metadata["model"]["name"]).name
    assert recorded["tokenizer"] == metadata["tokenizer"]
    assert recorded["chat_template"]["hash"] == metadata["chat_template"]["hash"]


def test_an_adapter_from_elsewhere_is_listed_with_what_is_known(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    make_adapter(base, tmp_path / "hub" / "org" / "plain", Kind({"target_modules": ["v_proj", "q_proj"]}))
    (record,) = find_adapters([tmp_path / "hub"])
    assert (record.name, record.kind, record.base, record.base_hash) == ("org/plain", "LORA", str(base), None)
    assert (record.rank, record.alpha, record.targets) == (4, 8, ("q_proj", "v_proj"))
    assert (record.dtype, record.parent, record.metrics, record.status) == (None, None, {}, "ok")


def test_what_is_found_once_and_what_is_no_adapter(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    runs = tmp_path / "runs"
    run = copy_run(tiny_run(tmp_path_factory), runs / "sweep" / "runs" / "r=8")
    copy_run(tiny_run(tmp_path_factory, "full"), runs / "full")
    copy_run(tiny_run(tmp_path_factory), runs / "half")
    shutil.rmtree(runs / "half" / "adapter")
    (runs / ".hidden").mkdir()
    shutil.copytree(run / "adapter", runs / ".hidden" / "adapter")
    outside = tmp_path / "outside"
    shutil.copytree(run / "adapter", outside / "adapter")
    (runs / "link").symlink_to(outside)
    found = {record.name: (record.kind, record.status) for record in find_adapters([runs, run, runs])}
    assert found == {"full": ("full", "ok"), "half": ("lora", "unfinished"), "sweep/runs/r=8": ("lora", "ok")}
    with pytest.raises(RunError, match=r"absent: no such folder; name one that holds runs or adapters$"):
        find_adapters([tmp_path / "absent"])


def test_lineage_is_followed_to_its_end(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    names = ("first", "second", "third")
    first, second, third = (copy_run(tiny_run(tmp_path_factory), tmp_path / name) for name in names)

    def begin_from(run: Path, parent: str) -> None:
        RunFolder(run).write_metadata(RunFolder(run).metadata | {"parent": parent})

    begin_from(third, str(second / "adapter"))
    begin_from(second, str(first))
    begin_from(first, "/gone/elsewhere")
    record = read_adapter(third)
    assert record.parent == str(second / "adapter")
    assert [(step["path"], step["found"]) for step in lineage(record)] == [
        (str(second), True), (str(first), True), ("/gone/elsewhere", False),
    ]  # fmt: skip
    begin_from(first, str(third))
    assert [step["path"] for step in lineage(record)] == [str(second), str(first)]
    assert len(lineage(record)) < ANCESTORS


# -- what others wrote ------------------------------------------------------------------------------------------------


def pickled(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapters" / "old", Kind({"target_modules": ["q_proj"]}))
    pickled(folder)
    (record,) = find_adapters([tmp_path / "adapters"])
    assert (record.status, record.rank) == ("refused", 4)
    assert record.problem == (
        f"{folder}: its weights are pickled (adapter_model.bin), which can run code when loaded; have its maker save safetensors"
    )


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("adapter_config.json", "[" * 100_000, "adapter_config.json: cannot be read"),
        ("adapter_config.json", "[]", "adapter_config.json: expected a JSON object"),
        ("tunesmith.json", "\x00", "tunesmith.json: cannot be read"),
        ("tunesmith.json", " " * (17 * 2**20) + "{}", "MB of JSON; it is not read (allowed: 16 MB)"),
    ],
    ids=["deep", "list", "binary", "huge"],
)
def test_a_damaged_one_does_not_hide_the_others(file: str, content: str, problem: str, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    bad = make_adapter(base, tmp_path / "adapters" / "bad", Kind({"target_modules": ["q_proj"]}))
    shutil.copytree(bad, tmp_path / "adapters" / "good")
    (bad / file).write_text(content)
    records = {record.name: record for record in find_adapters([tmp_path / "adapters"])}
    assert (records["bad"].status, records["good"].status) == ("refused", "ok")
    assert problem in (records["bad"].problem or "")


def test_fields_of_other_types_are_not_known(tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "odd"
    folder.mkdir(parents=True)
    odd = {"base_model_name_or_path": {"a": 1}, "r": "8", "lora_alpha": [1], "target_modules": 3, "peft_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(odd))
    (folder / "tunesmith.json").write_text(json.dumps({"base": [], "parent": 5, "quantization": "nf4"}))
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    (record,) = find_adapters([tmp_path / "adapters"])
    assert (record.base, record.rank, record.alpha, record.targets, record.parent) == (None, None, None, (), None)
    assert record.status == "ok"


def test_a_config_that_has_peft_import_a_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"megatron_config": {}, "megatron_core": "evil"}))
    with pytest.raises(ModelError, match=r"megatron_config has PEFT import the module 'evil'"):
        refuse_code(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"megatron_config": None, "megatron_core": "megatron.core"})
    )
    refuse_code(tmp_path)
