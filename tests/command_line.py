"""The command line, run in this process (a fresh one takes seconds to import PyTorch).

result = tunesmith("train", "--model", model, "--data", data)
assert (result.code, result.problems) == (0, [])
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        """The lines that say what went wrong. Beside them, stderr has progress."""
        return [line for line in self.err.splitlines() if line.startswith("tunesmith: ")]


def tunesmith(*arguments: str | Path) -> Result:
    """Run `tunesmith ARGUMENTS`. An exception that the command line lets through fails the test."""
    from transformers.utils import logging

    from tunesmith.cli import main

    # The command line turns them off before transformers is imported; here it was imported long ago.
    logging.disable_progress_bar()
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["tunesmith", *map(str, arguments)]),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        else:
            raise AssertionError("main() returned instead of exiting")
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())
