"""Files on disk: atomic writes, content hashes, the user's cache folder, and disk errors as our own.

A file or folder is written beside its place, flushed to disk and renamed into it, so that a killed process leaves no
half file that a reader could take for a whole one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's and safetensors' write errors into ours: no space (exit 3), not writable (exit 2)."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise MachineError(_disk_full(path)) from error
        if error.errno in NOT_WRITABLE:
            raise RunError(f"{path}: cannot be written ({os.strerror(error.errno)}); choose another folder") from error
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
    return f"{path}: no space left on the disk ({free:.0f} MB free); nothing that was saved before is lost: free some space, then `tunesmith resume`"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file, or leave what was there. Raises MachineError when the disk is full."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".tmp-{path.name}")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
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
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error, and is removed otherwise.

    An existing `path` is replaced. Files are flushed to disk before the rename.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    with disk_errors(path):
        remove_folder(temporary)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            _fsync(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if path.exists():
            remove_folder(path)
        temporary.rename(path)
        _fsync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; it vanishes from its place in one step, so that no reader sees half of it."""
    if path.exists():
        doomed = path if path.name.startswith(".tmp-") else path.with_name(f".tmp-removed-{path.name}")
        if doomed != path:
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


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
    """Where converted models and hashes are kept: $TUNESMITH_CACHE, else tunesmith/ in the user's cache folder."""
    if custom := os.environ.get("TUNESMITH_CACHE"):
        return Path(custom)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
