"""Atomic files and folders: what a failure or a kill in the middle leaves behind, and how disk errors are reported."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import MachineError, RunError, TunesmithError
from tunesmith.files import (
    atomic_folder,
    cache_folder,
    check_writable,
    disk_errors,
    finite,
    remove_folder,
    sha256_file,
    sha256_text,
    write_atomic,
    write_json,
)


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its text; folders end in a slash."""
    return {
        str(path.relative_to(folder)) + ("/" if path.is_dir() else ""): "" if path.is_dir() else path.read_text()
        for path in sorted(folder.rglob("*"))
    }


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# -- write_atomic -----------------------------------------------------------------------------------------------------


def test_write_atomic_writes_text_and_bytes_and_replaces(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "né\n")
    assert (tmp_path / "a").read_bytes() == b"n\xc3\xa9\n"
    write_atomic(tmp_path / "a", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_write_that_runs_out_of_space_keeps_the_old_file(tmp_path: Path, file_size_limit: Any) -> None:
    write_atomic(tmp_path / "a", "old")
    with file_size_limit(100), pytest.raises(MachineError) as caught:
        write_atomic(tmp_path / "a", "x" * 1000)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: no space left on the disk (")
    assert str(caught.value).endswith(" MB free); free some space and try again; nothing that was saved before is lost")
    assert tree(tmp_path) == {"a": "old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_fsync_that_runs_out_of_space_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(MachineError, match="no space left"):
        write_atomic(tmp_path / "a", "new")
    assert tree(tmp_path) == {"a": "old"}


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "Permission denied"),
        (errno.EROFS, "Read-only file system"),
        (errno.ENOENT, "No such file or directory"),
        (errno.EINVAL, "Invalid argument"),
        (errno.EBUSY, "Device or resource busy"),
    ],
)
def test_a_place_that_cannot_be_written_is_the_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(RunError) as caught:
        write_atomic(tmp_path / "a", "new")
    assert str(caught.value) == f"{tmp_path / 'a'}: cannot be written ({reason}); choose another folder"
    assert caught.value.exit_code == 2
    assert tree(tmp_path) == {"a": "old"}


def test_other_errors_pass_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EPROTO))
    with pytest.raises(OSError, match="Protocol error") as caught:
        write_atomic(tmp_path / "a", "new")
    assert not isinstance(caught.value, TunesmithError)
    assert tree(tmp_path) == {}


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"file/a: cannot be written \(Not a directory\); choose another folder"):
        write_atomic(tmp_path / "file" / "a", "new")


def test_safetensors_own_error_for_a_full_disk(tmp_path: Path, file_size_limit: Any) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    with file_size_limit(1000), pytest.raises(MachineError, match="no space left"), disk_errors(path):
        save_file({"weight": np.zeros(5000, dtype=np.float32)}, path)


def test_safetensors_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(SafetensorError, match="header"), disk_errors(tmp_path):
        load_file(tmp_path / "bad.safetensors")


def test_a_place_that_takes_no_new_folders() -> None:
    for path in (Path("/proc/x"), Path("/proc/x/y")):
        with pytest.raises(
            RunError, match=rf"^{path}: cannot be written \(No such file or directory\); choose another"
        ):
            check_writable(path)


MANY_WRITES = """
import sys
from pathlib import Path
from tunesmith.files import atomic_folder, write_json
place = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    write_json(place / "hashes.json", {"writer": sys.argv[2], "filler": "x" * 10000})
    with atomic_folder(place / "model") as folder:
        for name in "ab":
            (folder / name).write_text(sys.argv[2] * 1000)
"""


def test_processes_that_write_the_same_file_and_folder(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MANY_WRITES, str(tmp_path), writer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for writer in "12"
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, problems = process.communicate(timeout=120)
        assert (process.returncode, problems) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hashes.json", "model"]
    assert json.loads((tmp_path / "hashes.json").read_text())["writer"] in {"1", "2"}
    a, b = ((tmp_path / "model" / name).read_text() for name in "ab")
    assert a == b
    assert a in {"1" * 1000, "2" * 1000}


def test_threads_that_write_the_same_file_and_folder(tmp_path: Path) -> None:
    def write(number: int) -> None:
        write_atomic(tmp_path / "file", f"{number}" * 1000)
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "a").write_text(f"{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert sorted(tree(tmp_path)) == ["file", "model/", "model/a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_write_left_goes_with_the_next_one_to_the_same_place(tmp_path: Path, kind: str) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tunesmith.files import atomic_folder, write_atomic\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\nplace = Path(sys.argv[1])\n"
    )
    program += (
        "write_atomic(place, 'half')" if kind == "file" else "with atomic_folder(place) as f: (f / 'a').write_text('x')"
    )
    found = subprocess.run([sys.executable, "-c", program, str(tmp_path / "place")], check=False)
    assert found.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".tmp-place-")
    write_atomic(tmp_path / "elsewhere", "other")
    assert leftover.exists(), "it may be another's"
    write_atomic(tmp_path / "place", "new")
    assert tree(tmp_path) == {"elsewhere": "other", "place": "new"}


def test_a_file_that_is_being_written_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, depth = os.fsync, iter([True])

    def fsync(descriptor: int) -> None:
        if next(depth, False):
            write_atomic(tmp_path / "a", "second")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "a", "first")
    assert tree(tmp_path) == {"a": "first"}, "the one that ends last"


# -- permissions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "single", "x")
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "deep").mkdir()
            for place in (folder, folder / "deep"):
                save_file({"weight": np.zeros(3, dtype=np.float32)}, place / "model.safetensors")
            (folder / "closed").touch()
            (folder / "closed").chmod(0o600)
            (folder / "script").touch()
            (folder / "script").chmod(0o755)
    finally:
        os.umask(before)
    files = [tmp_path / "single", *(tmp_path / "model" / name for name in ("closed", "model.safetensors"))]
    files.append(tmp_path / "model" / "deep" / "model.safetensors")
    assert [oct(file.stat().st_mode & 0o777) for file in files] == [oct(0o666 & ~umask)] * 4
    assert (tmp_path / "model" / "script").stat().st_mode & 0o777 == 0o755


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_json_has_no_nan_and_keeps_unicode(tmp_path: Path) -> None:
    value = {"loss": math.nan, "rows": [math.inf, (1.5, -math.inf)], "name": "é", "n": 3, "ok": True, "none": None}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "é" in text
    assert text.endswith("}\n")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [None, [1.5, None]],
        "name": "é",
        "n": 3,
        "ok": True,
        "none": None,
    }
    assert math.isnan(value["loss"]), "the caller's object is left alone"


def test_finite_keeps_what_is_finite() -> None:
    assert finite([0.0, -1.5, 7, "nan", {"a": 1e308}]) == [0.0, -1.5, 7, "nan", {"a": 1e308}]


# -- atomic_folder ----------------------------------------------------------------------------------------------------


def test_the_folder_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "run") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "run").exists()
    assert tree(tmp_path) == {"deep/": "", "deep/run/": "", "deep/run/a": "1"}


def test_an_existing_folder_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
        assert tree(tmp_path / "run") == {"old": "old"}
    assert tree(tmp_path) == {"run/": "", "run/new": "new"}


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_new(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")

    def write() -> None:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "new").write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert tree(tmp_path) == {"run/": "", "run/old": "old"}


def test_a_full_disk_leaves_nothing_new(tmp_path: Path, file_size_limit: Any) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "small").write_text("fits")
            (folder / "big").write_text("x" * 1000)

    with file_size_limit(100), pytest.raises(MachineError, match=r"run: no space left on the disk \(\d+ MB free\)"):
        write()
    assert tree(tmp_path) == {}


def test_a_flush_that_fails_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(MachineError, match="no space left"), atomic_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("1")
    assert tree(tmp_path) == {}


def test_every_file_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        (folder / "b").write_text("2")
    assert {"a", "b", folder.name} <= set(flushed)
    assert flushed[-1] == tmp_path.name, "the rename itself is flushed last"


def test_a_folder_that_another_process_made_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, late = Path.rename, iter(["once"])

    def too_late(source: Path, target: Path) -> Path:
        if target == tmp_path / "run" and next(late, None):
            target.mkdir()
            (target / "theirs").write_text("theirs")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", too_late)
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "ours").write_text("ours")
    assert tree(tmp_path) == {"run/": "", "run/ours": "ours"}


def test_a_folder_that_others_may_read_is_kept(tmp_path: Path) -> None:
    """Made by another process meanwhile: the very same folder stays, at every moment, and ours is gone."""
    theirs = tmp_path / "model"
    with atomic_folder(theirs, keep=True) as folder:
        (folder / "a").write_text("ours")
        theirs.mkdir()
        (theirs / "a").write_text("theirs")
        inode = theirs.stat().st_ino
    assert tree(tmp_path) == {"model/": "", "model/a": "theirs"}
    assert theirs.stat().st_ino == inode
    with atomic_folder(tmp_path / "new", keep=True) as folder:
        (folder / "b").write_text("1")
    assert tree(tmp_path / "new") == {"b": "1"}


def test_a_kept_place_that_is_a_file_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with (
        pytest.raises(RunError, match="model: cannot be written"),
        atomic_folder(tmp_path / "model", keep=True) as folder,
    ):
        (folder / "a").write_text("ours")
    assert tree(tmp_path) == {"model": "a file"}


def test_a_temporary_folder_in_use_is_no_leftover(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "run") as first:
        (first / "a").write_text("1")
        with atomic_folder(tmp_path / "run") as second:
            (second / "b").write_text("2")
        assert tree(first) == {"a": "1"}
    assert tree(tmp_path) == {"run/": "", "run/a": "1"}


def test_a_mount_point_is_refused_at_once() -> None:
    with (
        pytest.raises(
            RunError, match=r"^/proc: a mount point cannot be replaced; choose a folder in it, e\.g\. /proc/new$"
        ),
        atomic_folder(Path("/proc")),
    ):
        pytest.fail("the block was entered")


def test_a_rename_that_fails_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()  # a bind mount, say: it looks like any folder, but cannot be renamed
    monkeypatch.setattr(Path, "rename", failing(errno.EBUSY))
    with (
        pytest.raises(RunError, match=r"run: cannot be written \(Device or resource busy\); choose another folder"),
        atomic_folder(tmp_path / "run") as folder,
    ):
        (folder / "a").write_text("1")
    assert tree(tmp_path) == {"run/": ""}


KILLED = """
import sys, time
from pathlib import Path
from tunesmith.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("1")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_sigkill_in_the_middle_leaves_no_half_folder(tmp_path: Path, existing: bool) -> None:
    run = tmp_path / "run"
    if existing:
        run.mkdir()
        (run / "old").write_text("old")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (tree(run) == {"old": "old"}) if existing else (not run.exists())
    with atomic_folder(run) as folder:  # the leftovers are in nobody's way
        (folder / "b").write_text("2")
    assert tree(tmp_path) == {"run/": "", "run/b": "2"}


def test_remove_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "sub").mkdir(parents=True)
    remove_folder(tmp_path / "run")
    remove_folder(tmp_path / "absent")
    assert tree(tmp_path) == {}


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "some" / "new" / "run")
    assert tree(tmp_path) == {}


def test_check_writable_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"file/run: cannot be written \(Not a directory\); choose another folder"):
        check_writable(tmp_path / "file" / "run")


def test_check_writable_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", failing(errno.EACCES))  # root may write anywhere, so the bits cannot be used
    with pytest.raises(RunError, match=r"run: cannot be written \(Permission denied\); choose another folder"):
        check_writable(tmp_path / "run")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_text(["é", "b"]) == hashlib.sha256("é\nb\n".encode()).hexdigest()
    assert sha256_text(["ab"]) != sha256_text(["a", "b"])


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", "/x/cache")
    assert cache_folder() == Path("/x/cache")
    monkeypatch.delenv("TUNESMITH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/xdg")
    assert cache_folder() == Path("/x/xdg/tunesmith")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "tunesmith"
