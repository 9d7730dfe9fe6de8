"""A merge that is stopped: by a disk that is full or fails, by an interrupt, by kill -9. Nothing that could be taken for a model is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from command_line import tunesmith
from trained import copy_run, tiny_run
from tunesmith import files
from tunesmith.export import streamed
from tunesmith.registry import records
from tunesmith.workflows import merge as workflow
from tunesmith.workflows.merge import merge


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny_run(tmp_path_factory), tmp_path / "run")


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_disk_that_is_full(run: Path, way: str, file_size_limit: Any) -> None:
    before = left(run)
    with file_size_limit(40_000):
        result = tunesmith("merge", run)
    assert (result.code, len(result.problems)) == (3, 1), result.err
    assert "no space left on the disk" in result.problems[0]
    assert left(run) == before
    assert tunesmith("merge", run).code == 0


@pytest.mark.parametrize("place", ["weights", "record", "fsync", "config"])
@pytest.mark.parametrize(("number", "code", "said"), [(errno.ENOSPC, 3, "no space left"), (errno.EIO, 3, "its disk fails (Input/output error)"), (errno.EACCES, 2, "cannot be written (Permission denied)")])  # fmt: skip
def test_a_disk_that_fails_in_any_place(
    place: str, number: int, code: int, said: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    before = left(run)
    target, name = {
        "weights": (streamed, "write_tensors"), "record": (records, "write_json"), "fsync": (files, "_fsync"),
        "config": (streamed, "_write_configs"),
    }[place]  # fmt: skip
    monkeypatch.setattr(target, name, fail)
    result = tunesmith("merge", run)
    assert (result.code, len(result.problems)) == (code, 1), result.err
    assert said in result.problems[0]
    assert left(run) == before


def test_an_interrupt(run: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = left(run)
    monkeypatch.setattr(workflow, "refuse_unlike", interrupt)
    assert tunesmith("merge", run).code == 130
    assert left(run) == before


STOPPED = """
import sys, time
from tunesmith.workflows import merge as workflow

def wait(*_):
    print("written", flush=True)
    time.sleep(600)

workflow.refuse_unlike = wait
workflow.merge(sys.argv[1])
"""


@contextmanager
def merging(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has written a merged model, and waits before it compares."""
    with subprocess.Popen([sys.executable, "-c", STOPPED, str(run)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
            yield process
        finally:
            process.kill()


def test_what_a_killed_merge_left_is_cleared_and_a_live_ones_is_not(run: Path) -> None:
    with merging(run) as killed:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    (remains,) = run.glob(".tmp-merged-*")
    assert (remains / "model.safetensors").is_file(), "a whole model, that was never compared"
    assert not (run / "merged").exists()
    with merging(run):
        assert not remains.exists()
        (alive,) = run.glob(".tmp-merged-*")
        merge(run)
        assert (alive / "model.safetensors").is_file()
        assert (run / "merged" / "model.safetensors").is_file()
    merge(run, run / "other")
    assert alive.exists(), "another place's remains are not looked at"
    with pytest.raises(Exception, match="exists already"):
        merge(run)
