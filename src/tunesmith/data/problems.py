"""What can be wrong with a row or with a whole file of examples, while it is read.

These exceptions stay inside `tunesmith.data`: `formats` turns each into a Finding, and escapes what is not printable.
"""

from __future__ import annotations

from typing import Any

KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Problem(Exception):
    """`check` is the check's stable name, `found` what is there, `fix` what to change, `field` the key it is about."""

    def __init__(self, check: str, found: str, fix: str = "", field: str | None = None):
        super().__init__(found)
        self.check = check
        self.found = found
        self.fix = fix
        self.field = field


class RowProblem(Problem):
    """One row cannot be used."""


class FileProblem(Problem):
    """The file as a whole cannot be read."""


def kind(value: Any) -> str:
    """A value's type in JSON's words; other types (a table can hold dates, bytes, ...) by their own name."""
    return KINDS.get(type(value), f"a value of type {type(value).__name__}")


def printable(text: str) -> str:
    """The text with line ends, control characters and lone surrogates escaped, so that a problem is one line."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def listed(keys: Any, limit: int = 8) -> str:
    """Keys in backticks, for a message; `none` if there are none."""
    names = [f"`{key}`" for key in keys]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
