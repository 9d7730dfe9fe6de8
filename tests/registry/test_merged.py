"""What a merged model says it was made of, and what is made of a record that says something else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from adapters_of import Kind, make_adapter
from tiny import make_tiny_model
from trained import copy_run, tiny_run
from tunesmith.errors import ModelError
from tunesmith.export.tensors import Unstreamable
from tunesmith.files import sha256_file, write_json
from tunesmith.models.load import ModelSource, weight_hash
from tunesmith.registry.records import (
    Merged,
    adapter_hash,
    merged_from,
    portable_name,
    read_adapter,
    write_merged_record,
)
from tunesmith.runs import RunFolder
from tunesmith.workflows import merge as workflow
from tunesmith.workflows.load import adapter_record
from tunesmith.workflows.merge import merge

MADE = Merged(("a" * 64, "b" * 64), ("one", "two"), "org/base", "c" * 64, "d" * 64, "e" * 64, "bf16", "16bit", "ties", (0.7, 0.3), 0.5)  # fmt: skip


@pytest.mark.parametrize("way", ["streamed", "in memory"])
def test_a_merged_run_names_the_adapter_that_it_has(
    way: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise Unstreamable("the test says so")

    if way == "in memory":
        monkeypatch.setattr(workflow, "refuse_unstreamable", refuse)
    run = copy_run(tiny_run(tmp_path_factory), tmp_path / "run")
    assert merge(run)["streamed"] == (way == "streamed")
    metadata, made = RunFolder.open(run).metadata, merged_from(run / "merged")
    assert made is not None
    assert made.adapters == (sha256_file(run / "adapter" / "adapter_model.safetensors"),)
    assert (made.names, made.base) == (("run",), Path(metadata["model"]["name"]).name)
    assert made.base_hash == metadata["model"]["weight_hash"]
    assert made.template_hash == metadata["chat_template"]["hash"]
    assert (made.dtype, made.onto, made.method, made.weights) == ("fp32", "16bit", None, None)
    # Its own adapter was trained again since:
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"another")
    assert adapter_hash(run / "adapter") not in made.adapters


def test_several_are_named_in_order_with_how_they_became_one(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", hidden=64)
    kind = Kind({"target_modules": ["q_proj"]})
    one, two = (make_adapter(base, tmp_path / name, kind, seed) for seed, name in enumerate(("one", "two")))
    merge([two, one], tmp_path / "out", dtype="bf16", method="ties", weights=[0.7, 0.3], density=0.5)
    made = merged_from(tmp_path / "out")
    assert made is not None
    assert made.adapters == (adapter_hash(two), adapter_hash(one))
    assert (made.names, made.method, made.weights, made.density) == (("two", "one"), "ties", (0.7, 0.3), 0.5)
    assert (made.dtype, made.base_hash) == ("bf16", weight_hash(ModelSource("base", base)))


def test_no_path_of_this_machine_is_written(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = copy_run(tiny_run(tmp_path_factory), tmp_path / "run")
    merge(run)
    for file in (run / "merged" / "tunesmith.json", run / "adapter" / "tunesmith.json"):
        assert "/" not in file.read_text(), file


def test_runs_that_move_together_find_their_parents(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = copy_run(tiny_run(tmp_path_factory), tmp_path / "here" / "first")
    second = copy_run(first, tmp_path / "here" / "second")
    for parent, written in ((first / "adapter", "../../first/adapter"), (second / "checkpoints", "../checkpoints")):
        RunFolder(second).write_metadata(RunFolder(second).metadata | {"parent": str(parent)})
        record = adapter_record(RunFolder.open(second), second / "adapter")
        assert record["parent"] == written
        write_json(second / "adapter" / "tunesmith.json", record)
        (tmp_path / "here").rename(tmp_path / "there")
        moved = tmp_path / "there" / parent.relative_to(tmp_path / "here")
        assert read_adapter(tmp_path / "there" / "second" / "adapter").parent == str(moved)
        (tmp_path / "there").rename(tmp_path / "here")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_merged_record(tmp_path, MADE)
    assert merged_from(tmp_path) == MADE


def test_a_folder_that_says_nothing_of_it(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert merged_from(tmp_path) is None
    assert merged_from(tiny_run(tmp_path_factory) / "adapter") is None, "an adapter's record"


def refused(folder: Path) -> bool:
    try:
        return merged_from(folder) is None
    except ModelError:
        return True


WRONG: list[Any] = [None, 5, "text", [], {}, [5], {"sha256": 5}, [{"sha256": "short"}], True]


@pytest.mark.parametrize("key", ["adapters", "base", "tokenizer", "chat_template", "weights", "density", "dtype"])
def test_a_damaged_record_is_one_line(key: str, tmp_path: Path) -> None:
    write_merged_record(tmp_path, MADE)
    path = tmp_path / "tunesmith.json"
    whole = json.loads(path.read_text())
    for value in WRONG:
        write_json(path, whole | {key: value})
        if key in ("weights", "density", "dtype") and not refused(tmp_path):
            continue
        with pytest.raises(ModelError) as caught:
            merged_from(tmp_path)
        assert re.fullmatch(rf"{re.escape(str(path))}: damaged \(.*\); merge again", str(caught.value)), value
    path.write_text("[")
    with pytest.raises(ModelError, match=r"tunesmith.json: cannot be read"):
        merged_from(tmp_path)


def test_names_that_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert portable_name("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert (
        portable_name("org/base") == portable_name(str(tmp_path / "org/base")) == portable_name("/gone/base") == "base"
    )
