"""Files on disk: atomic writes, content hashes, the user's cache folder, and disk errors as our own.

A file or folder is written beside its place, flushed to disk and renamed into it, so that a killed process leaves no
half file that a reader could take for a whole one. The temporary name is new each time, `.tmp-NAME-xxxxxxxx`: processes
that write the same file do not meet, and the last one wins.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunesmith.errors import MachineError, RunError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ENOENT,  # /proc takes no new folders, nor does a folder that was removed meanwhile
    errno.EINVAL,  # a name that the file system does not take
    errno.EBUSY,  # a mount point cannot be replaced
)
BROKEN = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT)
"""Of a disk that fails, or a network file system that is gone."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's and safetensors' write errors into ours: no space or a broken disk (exit 3), not writable (exit 2)."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise MachineError(_disk_full(path)) from error
        if error.errno in NOT_WRITABLE:
            raise RunError(f"{path}: cannot be written ({os.strerror(error.errno)}); choose another folder") from error
        if error.errno in BROKEN:
            said = os.strerror(error.errno)
            raise MachineError(f"{path}: its disk fails ({said}); choose another one") from error
        raise
    except Exception as error:
        # safetensors' Rust writer raises its own type, with the errno in the text.
        if type(error).__name__ == "SafetensorError" and any(
            f"os error {number})" in str(error) for number in NO_SPACE
        ):
            raise MachineError(_disk_full(path)) from error
        raise


def _disk_full(path: Path) -> str:
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(folder).free / 2**20
    return f"{path}: no space left on the disk ({free:.0f} MB free); free some space and try again; nothing that was saved before is lost"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file, or leave what was there. Raises MachineError when the disk is full."""
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        _remove_leftovers(path)
        temporary, descriptor = _locked(path, _new_file)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)  # before it is closed: the lock ends with that
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Atomically write `value` as JSON, indented. NaN and infinities become null: JSON has neither."""
    write_atomic(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with NaN and infinite floats replaced by None, recursively."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


@contextmanager
def atomic_folder(path: Path, keep: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error, and is removed otherwise.

    An existing `path` is replaced, also one that another process made meanwhile; with `keep` it stays as it is, because
    others may read it, and what was written is removed. Files are flushed to disk before the rename. Raises RunError where
    `path` cannot be written, MachineError when the disk is full.
    """
    if os.path.ismount(path):  # Path.is_mount fails when another process removes the folder between its two looks
        raise RunError(f"{path}: a mount point cannot be replaced; choose a folder in it, e.g. {path / 'new'}")
    with disk_errors(path):
        _remove_leftovers(path)
        temporary, lock = _locked(path, _new_folder)
        try:
            yield temporary
            make_readable(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            _fsync(temporary)
            if keep:
                _rename_or_keep(temporary, path)
            else:
                _rename_over(temporary, path)
            _fsync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def _rename_over(temporary: Path, path: Path) -> None:
    while True:
        if path.is_dir():
            remove_folder(path)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue  # another process put its own there since
            raise
        return


def _rename_or_keep(temporary: Path, path: Path) -> None:
    """Rename into an empty place: the system itself refuses one that holds a folder with files."""
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to make it in. It goes when the block ends, and with it, where the block fails, the folders that were made for it;
    what a killed process left there goes when the next one begins.
    """
    missing = [one for one in path.parents if not one.exists()]
    place = path.with_name(f".{path.name}-export")
    try:
        with atomic_folder(place) as work:
            yield work
        remove_folder(place)
    except BaseException:  # Ctrl-C too
        for one in missing:
            with suppress(OSError):  # others have put something there
                one.rmdir()
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder; it vanishes from its place in one step, so that no reader sees half of it."""
    doomed = path
    if not path.name.startswith(".tmp-"):
        doomed = _beside(path)
        with suppress(FileNotFoundError):  # another process was faster, or there is none
            path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")


def make_readable(folder: Path) -> None:
    """Give every file below `folder` the permissions that the umask leaves a new one, 0666 & ~umask, in place.

    safetensors 0.8 makes its files 0600 whatever the umask, which nobody else can read: a server in a container, say. `folder` was made by
    `Path.mkdir`: its own mode is 0777 & ~umask, and tells the umask, which a process can ask for by changing it alone.
    """
    allowed = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            mode = file.stat().st_mode & 0o7777
            if mode | allowed != mode:
                file.chmod(mode | allowed)


def _new_folder(path: Path) -> int | None:
    path.mkdir(parents=True)
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # between these two lines, another process took it for a leftover
        return None


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _locked(path: Path, make: Callable[[Path], int | None]) -> tuple[Path, int]:
    """What `make` makes at a new place beside `path`, and the descriptor that it opens, whose lock says that it is in use until that is closed."""
    while True:
        temporary = _beside(path)
        descriptor = make(temporary)
        if descriptor is None:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not temporary.exists()  # for a leftover, before it was locked
        except OSError as error:  # on a file system without locks, nobody takes it for one either
            taken = isinstance(error, BlockingIOError)
        if not taken:
            return temporary, descriptor
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of `path`: the temporary files and folders that nobody holds a lock on."""
    pattern = re.compile(re.escape(f".tmp-{path.name}-") + "[0-9a-f]{8}")
    for leftover in path.parent.glob(".tmp-*"):
        if pattern.fullmatch(leftover.name) and not leftover.is_symlink():
            with suppress(OSError):
                descriptor = os.open(leftover, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if leftover.is_dir():
                        shutil.rmtree(leftover, ignore_errors=True)
                    else:
                        leftover.unlink()
                finally:
                    os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raise RunError unless a folder can be made at `path`. Leaves nothing behind."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    with disk_errors(path), tempfile.TemporaryDirectory(prefix=".tmp-", dir=parent):
        pass


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(parts: Iterable[str]) -> str:
    """SHA-256 of strings, each ended by a newline, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where converted models, hashes and measurements are kept: $TUNESMITH_CACHE, else tunesmith/ in the user's cache folder."""
    if custom := os.environ.get("TUNESMITH_CACHE"):
        return Path(custom)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
