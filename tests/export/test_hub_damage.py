"""Damaged records of a run: one line that names the file, whatever is wrong with which key."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tiny import chat_rows, write_jsonl
from trained import copy_run, tiny_run
from tunesmith import api
from tunesmith.errors import ModelError, RunError, TunesmithError, VerificationError
from tunesmith.export.hub import Pushed
from tunesmith.export.package import package_folder
from tunesmith.workflows import push as workflow

WRONG: list[Any] = [None, True, 5, "x", [[1]], {"x": 1}, float("nan"), 10**400]
MISSING = object()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = copy_run(tiny_run(tmp_path_factory), tmp_path_factory.mktemp("damage") / "run")
    api.evaluate(
        run, write_jsonl(run.parent / "test.jsonl", chat_rows(4, seed=1)), baseline=True, gates=["accuracy >= 0"]
    )
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(workflow, "push_package", lambda *given, **more: Pushed("", True, "0" * 40, [], []))
    return copy_run(evaluated, tmp_path / "run")


def places(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of nested objects, two levels of metrics and all of the rest, as its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*at, key)
            yield from places(item, (*at, key))


def damaged(value: Any, at: tuple[str, ...], wrong: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if wrong is MISSING:
        del inner[at[-1]]
    else:
        inner[at[-1]] = wrong
    return value


NOT_SHOWN = {"classes", "parts", "settings", "answers", "examples", "rows", "format_version"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("metadata.json", 150), ("metrics.json", 50), ("evaluations/test.json", 150), ("adapter/tunesmith.json", 5)],
)
def test_a_wrong_key_is_one_line_that_names_the_file(run: Path, name: str, expected: int) -> None:
    path = run / name
    value = json.loads(path.read_text())
    refused = 0
    for at in places({key: item for key, item in value.items() if key not in NOT_SHOWN}):
        for wrong in (MISSING, *WRONG):
            path.write_text(json.dumps(damaged(value, at, wrong)))
            try:
                workflow.push(run, "me/bins")
            except TunesmithError as error:
                refused += 1
                line = str(error)
                assert "\n" not in line
                assert path.name in line or str(path.parent) in line, (at, wrong, line)
                assert len(line) < 1000
    assert refused > expected


@pytest.mark.parametrize(
    ("name", "at", "wrong", "message"),
    [
        (
            "metadata.json",
            ("hardware", "name"),
            MISSING,
            r"metadata.json: damaged: hardware.name: missing; the run folder is",
        ),
        (
            "metadata.json",
            ("model",),
            "x",
            r"metadata.json: damaged: model: input should be .* found 'x'; the run folder is",
        ),
        (
            "metrics.json",
            ("steps",),
            "84",
            r"metrics.json: damaged: steps: input should be a valid integer, found '84'; ",
        ),
        (
            "evaluations/test.json",
            ("metrics", "accuracy", "value"),
            "high",
            r"test.json: damaged: metrics.accuracy.value: input should be a valid number, found 'high'; evaluate again",
        ),
    ],
)
def test_the_line_names_the_key(run: Path, name: str, at: tuple[str, ...], wrong: Any, message: str) -> None:
    path = run / name
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), at, wrong)))
    with pytest.raises(RunError, match=message):
        workflow.push(run, "me/bins")


INDEXES = [
    *("", "[]", "5", "{}", '{"weight_map": 5}', '{"weight_map": {}}', '{"weight_map": {"w": 5}}', '{"weight_map": []}'),
    "[" * 100_000,
    "\ufffe",
]


@pytest.mark.parametrize("text", INDEXES)
def test_a_damaged_index_is_one_line(tmp_path: Path, text: str) -> None:
    save_file({"w": np.zeros(2, dtype=np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        VerificationError, match=r"model.safetensors.index.json: (not JSON|damaged) .*nothing was uploaded"
    ):
        package_folder(tmp_path, "merged", "base")


def test_shards_of_another_index_are_refused(tmp_path: Path) -> None:
    for name in ("model-00001-of-00001.safetensors", "model-00003-of-00003.safetensors"):
        save_file({"w": np.zeros(2, dtype=np.float32)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"model-00003-of-00003.safetensors belongs to no model.safetensors.index.json"
    ):
        package_folder(tmp_path, "merged", "base")
    index = {"weight_map": {"w": "../../etc/passwd"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"belongs to no|incomplete: ../../etc/passwd missing"):
        package_folder(tmp_path, "merged", "base")
