"""What models said during an evaluation that is not finished, so that an interrupted one goes on where it stopped.

A JSON Lines file. Its first line says of what (weights, settings, versions): a file of anything else is begun anew. Each further line is one
answer under its key, the SHA-256 of who was asked what with which limit. Lines are flushed as they come; a cut last line is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tunesmith.files import disk_errors


def key_of(*asked: Any) -> str:
    """The key of a question: any JSON values."""
    return hashlib.sha256(json.dumps(asked, separators=(",", ":")).encode()).hexdigest()


class Journal:
    """Answers by key, kept in the file `path` (None: in memory alone). A context: left without an error, the file is removed."""

    def __init__(self, path: Path | None = None, identity: Mapping[str, Any] | None = None):
        self.path = path
        self.known: dict[str, Any] = {}
        self._file: IO[str] | None = None
        self._header = json.dumps({"journal": dict(identity or {})}, sort_keys=True)
        if path is None or not path.exists():
            return
        with disk_errors(path):
            whole = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # a cut line has no end
        for line in whole[1:] if whole[:1] == [self._header] else []:
            with suppress(ValueError):  # what a crash of the machine left of a line is asked again
                key, value = json.loads(line)
                self.known[key] = value

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep answers by key."""
        self.known.update(answers)
        if self.path is None:
            return
        if self._file is None:
            with disk_errors(self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            answers = self.known
        with disk_errors(self.path):
            if self._file is None:
                self._file = self.path.open("w", encoding="utf-8")
                self._file.write(f"{self._header}\n")
            self._file.write("".join(f"{json.dumps([key, value])}\n" for key, value in answers.items()))
            self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close the file; remove it when the evaluation is written, keep it when it was interrupted or failed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if kind is None and self.path is not None:
            self.path.unlink(missing_ok=True)
