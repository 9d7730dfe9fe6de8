"""The run folder: what is written, what readers make of cut, superseded and damaged files, which checkpoints stay."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.config import RunConfig, load_config
from tunesmith.errors import MachineError, RunError
from tunesmith.runs import FORMAT_VERSION, RunFolder, default_run_path

CONFIG = load_config(overrides=["model.name=org/model", "adapter.r=8"]).resolved()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG, {"seed": 3407})


def log_all(run: RunFolder, *events: dict[str, Any]) -> None:
    with run.event_log() as log:
        for event in events:
            log(event)


def seen(run: RunFolder) -> list[tuple[str, int | None]]:
    return [(event["event"], event.get("step")) for event in run.events()]


def step(number: int) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1.0 / number}


# -- create and open --------------------------------------------------------------------------------------------------


def test_a_new_run_holds_its_resolved_config_and_metadata(run: RunFolder) -> None:
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.yaml", "metadata.json"]
    assert yaml.safe_load(run.config_path.read_text())["optimizer"]["lr"] == 2e-4
    assert json.loads((run.path / "metadata.json").read_text()) == {"format_version": FORMAT_VERSION, "seed": 3407}
    again = RunFolder.open(run.path)
    assert again.config == CONFIG
    assert again.metadata == {"format_version": FORMAT_VERSION, "seed": 3407}
    assert again.metrics == {}
    assert again.events() == []
    assert again.checkpoints() == []
    assert again.best() is None
    assert RunFolder.is_run(run.path)
    assert not RunFolder.is_run(run.path.parent)


def test_an_existing_run_is_never_overwritten(run: RunFolder) -> None:
    with pytest.raises(RunError) as caught:
        RunFolder.create(run.path, RunConfig(), {})
    assert str(caught.value) == (
        f"{run.path} exists already; choose another --out, or continue it with `tunesmith resume {run.path}`"
    )
    assert run.config == CONFIG


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError) as caught:
        RunFolder.create(tmp_path, CONFIG, {})
    assert str(caught.value) == f"{tmp_path} exists already; choose another --out"
    with pytest.raises(RunError, match=r"notes\.txt exists already; choose another --out$"):
        RunFolder.create(tmp_path / "notes.txt", CONFIG, {})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run", CONFIG, {}).config == CONFIG


@pytest.mark.parametrize("path", [".", ".."])
def test_the_current_folder_cannot_be_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RunError) as caught:
        RunFolder.create(Path(path), CONFIG, {})
    assert str(caught.value) == f"{path}: a run needs a folder of its own; choose another --out, e.g. runs/first"
    assert (tmp_path / "here").is_dir()


@pytest.mark.parametrize(
    ("tail", "reason"), [("file/run", "Not a directory"), ("x" * 300, "File name too long")], ids=["below-file", "long"]
)
def test_a_place_where_no_folder_can_be_made_is_refused_first(tmp_path: Path, tail: str, reason: str) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / tail
    for refuse in (RunFolder.refuse_existing, lambda p: RunFolder.create(p, CONFIG, {})):
        with pytest.raises(RunError) as caught:
            refuse(path)
        assert str(caught.value) == f"{path}: cannot be written ({reason}); choose another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_parent_without_permission_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(RunError, match=r"run: cannot be written \(Permission denied\); choose another folder"):
        RunFolder.refuse_existing(tmp_path / "run")


def test_refuse_existing_leaves_nothing_behind(tmp_path: Path) -> None:
    RunFolder.refuse_existing(tmp_path / "runs" / "a")
    assert list(tmp_path.iterdir()) == []


def test_opening_something_that_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunError) as caught:
            RunFolder.open(path)
        assert str(caught.value) == f"{path}: not a run folder (it has no config.yaml)"


def test_a_newer_format_is_refused(run: RunFolder) -> None:
    (run.path / "metadata.json").write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(RunError) as caught:
        RunFolder.open(run.path)
    assert str(caught.value) == (
        f"{run.path}: run format {FORMAT_VERSION + 1} is newer than this tunesmith reads ({FORMAT_VERSION}); upgrade"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "missing; the run folder is damaged"),
        (b"[1]", "expected a JSON object; the run folder is damaged"),
        (b"{", "cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
               "the run folder is damaged"),
        (b"\xff", "cannot be read ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); "
                  "the run folder is damaged"),
    ],
)  # fmt: skip
def test_damaged_metadata(run: RunFolder, content: bytes | None, problem: str) -> None:
    path = run.path / "metadata.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        RunFolder.open(run.path)
    assert str(caught.value) == f"{path}: {problem}"


def test_metrics_have_null_for_nan(run: RunFolder) -> None:
    run.write_metrics({"train_loss": math.nan, "steps": 3})
    assert run.metrics == {"train_loss": None, "steps": 3}
    assert "NaN" not in (run.path / "metrics.json").read_text()


# -- events -----------------------------------------------------------------------------------------------------------


def test_events_come_back_in_order_with_their_time(run: RunFolder) -> None:
    log_all(run, {"event": "start"}, step(1), {"event": "warning", "message": "é\nü"})
    log_all(run, step(2))
    assert seen(run) == [("start", None), ("step", 1), ("warning", None), ("step", 2)]
    events = run.events()
    assert events[1]["loss"] == 1.0
    assert events[2]["message"] == "é\nü"
    assert events[0]["time"] <= events[3]["time"]
    assert len(run.events_path.read_text(encoding="utf-8").splitlines()) == 4


def test_each_event_is_on_disk_as_soon_as_it_is_logged(run: RunFolder) -> None:
    with run.event_log() as log:
        log(step(1))
        assert seen(run) == [("step", 1)]


def test_nan_in_an_event_is_null(run: RunFolder) -> None:
    log_all(run, {"event": "step", "step": 1, "loss": math.nan, "grad_norm": math.inf})
    (event,) = run.events()
    assert (event["loss"], event["grad_norm"]) == (None, None)
    assert "NaN" not in run.events_path.read_text()


def test_a_cut_last_line_is_ignored_by_readers_and_removed_by_the_next_writer(run: RunFolder) -> None:
    log_all(run, step(1))
    whole = run.events_path.read_bytes()
    run.events_path.write_bytes(whole + b'{"event": "step", "st')
    assert seen(run) == [("step", 1)]
    log_all(run, step(2))
    assert seen(run) == [("step", 1), ("step", 2)]
    assert run.events_path.read_bytes().startswith(whole + b'{"event": "step", "step": 2')


def test_a_log_that_is_one_cut_line(run: RunFolder) -> None:
    run.events_path.write_bytes(b'{"event"')
    assert run.events() == []
    log_all(run, step(1))
    assert seen(run) == [("step", 1)]


@pytest.mark.parametrize("version", ["2", None, [1], 1.5])
def test_a_format_that_is_no_number(run: RunFolder, version: Any) -> None:
    run.write_metadata({"format_version": version})
    with pytest.raises(RunError) as caught:
        RunFolder.open(run.path)
    assert str(caught.value) == (
        f"{run.path / 'metadata.json'}: format_version is {version!r}: expected a whole number; the run folder is damaged"
    )


@pytest.mark.parametrize("name", ["metadata.json", "metrics.json", "checkpoints/best.json"])
def test_json_that_is_nested_too_deeply(run: RunFolder, name: str) -> None:
    path = run.path / name
    path.write_text("[" * 100_000)
    with pytest.raises(
        RunError, match=r"json: cannot be read \(maximum recursion depth .*\); the run folder is damaged$"
    ):
        {"metadata.json": lambda: run.metadata, "metrics.json": lambda: run.metrics}.get(name, run.best)()


@pytest.mark.parametrize("line", ["[" * 100_000, "[1]", "3"])
def test_an_event_that_is_no_object(run: RunFolder, line: str) -> None:
    log_all(run, step(1))
    with run.events_path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError) as caught:
        run.events()
    assert str(caught.value) == f"{run.events_path}:2: not a JSON event; the run folder is damaged"


def test_a_damaged_line_in_the_middle_is_named(run: RunFolder) -> None:
    log_all(run, step(1))
    with run.events_path.open("ab") as file:
        file.write(b"\x00\x00\n")
    log_all(run, step(2))
    with pytest.raises(RunError) as caught:
        run.events()
    assert str(caught.value) == f"{run.events_path}:2: not a JSON event; the run folder is damaged"


def test_a_resume_supersedes_the_steps_after_its_checkpoint(run: RunFolder) -> None:
    log_all(run, {"event": "start"}, step(1), step(2), {"event": "checkpoint", "step": 2}, step(3), step(4))
    log_all(run, {"event": "warning"}, {"event": "resume", "step": 2}, step(3))
    assert seen(run) == [
        ("start", None),
        ("step", 1),
        ("step", 2),
        ("checkpoint", 2),
        ("warning", None),
        ("resume", 2),
        ("step", 3),
    ]
    log_all(run, {"event": "resume", "step": 0}, step(1))
    assert seen(run) == [("start", None), ("warning", None), ("resume", 0), ("step", 1)]


def test_a_full_disk_while_logging_keeps_what_was_logged(run: RunFolder, file_size_limit: Any) -> None:
    log_all(run, step(1))
    size = run.events_path.stat().st_size
    with file_size_limit(size + 20), pytest.raises(MachineError, match=r"events\.jsonl: no space left"):
        log_all(run, {"event": "warning", "message": "x" * 200})
    assert run.events_path.stat().st_size == size + 20, "a cut line"
    assert seen(run) == [("step", 1)]
    log_all(run, step(2))
    assert seen(run) == [("step", 1), ("step", 2)]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def make_checkpoints(run: RunFolder, *steps: int) -> None:
    for number in steps:
        run.checkpoint_path(number).mkdir()
        (run.checkpoint_path(number) / "state").write_text(str(number))


def test_checkpoints_are_in_order_of_steps_and_half_written_ones_do_not_count(run: RunFolder) -> None:
    make_checkpoints(run, 200, 30, 1_000_000)
    (run.checkpoints_path / ".tmp-step-000400").mkdir()
    (run.checkpoints_path / "step-7").mkdir()
    (run.checkpoints_path / "step-000500.bak").mkdir()
    assert run.checkpoints() == [
        (30, run.checkpoints_path / "step-000030"),
        (200, run.checkpoints_path / "step-000200"),
        (1_000_000, run.checkpoints_path / "step-1000000"),
    ]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [30, 40]),
        (2, 10, [10, 30, 40]),
        (2, 40, [30, 40]),
        (1, 20, [20, 40]),
        (9, None, [10, 20, 30, 40]),
        (None, None, [10, 20, 30, 40]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(
    run: RunFolder, keep: int | None, best: int | None, left: list[int]
) -> None:
    make_checkpoints(run, 10, 20, 30, 40)
    (run.checkpoints_path / ".tmp-step-000050").mkdir()
    run.mark_best(10, "eval_loss", 0.5)  # the mark may be older than the state that the caller goes by
    assert run.best() == {"step": 10, "metric": "eval_loss", "value": 0.5}
    run.prune_checkpoints(keep, best or 0)
    assert [number for number, _ in run.checkpoints()] == left
    names = {path.name for path in run.checkpoints_path.iterdir()} - {"best.json"}
    assert names == {f"step-{number:06d}" for number in left}, "nothing half written or half removed stays"


def test_prune_without_checkpoints(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "absent")
    run.prune_checkpoints(1)
    assert run.checkpoints() == []


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("org/My Model-1.5B", "My-Model-1.5B-lora-"),
        ("/models/smol.gguf", "smol.gguf-lora-"),
        ("", "model-lora-"),
        ("模型", "--lora-"),
    ],
)
def test_default_run_path(name: str, start: str) -> None:
    path = default_run_path(load_config(values={"model.name": name}))
    assert path.parent == Path("runs")
    assert path.name.startswith(start)
    assert len(path.name) == len(start) + len("20260101-120000")
