"""Files of examples: JSON Lines in four forms, every row checked, every problem reported with its physical line.

| form | keys |
|---|---|
| messages | `messages`: a list of `{role, content}`, roles system, user, assistant |
| alpaca | `instruction`, `output`, optional `input`, `system` |
| prompt | `prompt`, `completion` |
| text | `text` |

The first readable row decides the form; a row of another form is a problem, never silently converted. Other keys are
allowed and ignored. Text is kept exactly as it is in the file: no normalisation, no stripping.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.types import ROLES, Example, Message

BLANK_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode's control, format (zero-width) and separator characters: a text of nothing else is blank."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """The examples of one file and the form they were in."""

    path: str
    form: str
    examples: list[Example]


class _RowProblem(Exception):
    """What is wrong with one row; becomes one line of a DataError."""


def read_examples(path: str | Path) -> DataFile:
    """Read and check a JSON Lines file.

    Raises DataError with every problem in the file.
    """
    path = Path(path)
    lines = _read_lines(path)
    problems: list[tuple[int, str]] = []
    examples: list[Example] = []
    form: str | None = None
    form_line = 0
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            row = _parse_line(raw)
            found = _form_of(row)
            if form is None:
                form, form_line = found, number
            elif found != form:
                raise _RowProblem(
                    f"this row is of form `{found}`, but line {form_line} is `{form}`; keep one form in a file"
                )
            messages, text = _READERS[found](row)
        except _RowProblem as problem:
            problems.append((number, str(problem)))
            continue
        examples.append(Example(messages, text, str(path), number))
    if problems:
        raise DataError([f"{path}:{line}: {text}" for line, text in problems])
    if not examples:
        raise DataError(f"{path}: the file holds no rows (only blank lines); expected one JSON object a line")
    assert form is not None
    return DataFile(str(path), form, examples)


def _read_lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; a JSON Lines file was expected") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not data.strip():
        raise DataError(f"{path}: the file is empty; expected one JSON object a line")
    if data.startswith(b"PAR1"):
        raise DataError(f"{path}: this is a Parquet file, not JSON Lines; convert it first")
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n")


def _parse_line(raw: bytes) -> dict[str, Any]:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RowProblem(
            f"not valid UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} of the line"
        ) from None
    if "\0" in line:
        raise _RowProblem(f"a NUL byte at offset {raw.index(0)} of the line; it is not legal in JSON")
    try:
        row = json.loads(line, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        message = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
        raise _RowProblem(f"not valid JSON: {message} at column {error.colno}") from None
    except RecursionError:
        raise _RowProblem("nested too deeply to be a row of training data") from None
    except ValueError as error:
        raise _RowProblem(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise _RowProblem(f"expected a JSON object, found {_kind(row)}")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RowProblem(f"the key `{_escaped(repeated)}` stands twice in one object")
    return row


def _form_of(row: dict[str, Any]) -> str:
    if "messages" in row:
        return "messages"
    if "instruction" in row or "output" in row:
        return "alpaca"
    if "prompt" in row or "completion" in row:
        return "prompt"
    if "text" in row:
        return "text"
    keys = ", ".join(f"`{_escaped(key)}`" for key in list(row)[:6]) or "none"
    raise _RowProblem(
        f"no known form: keys found: {keys}; expected `messages`, `instruction`+`output`, `prompt`+`completion` or `text`"
    )


def _text_field(row: dict[str, Any], key: str, where: str = "", optional: bool = False) -> str:
    name = f"{where}{key}"
    if key not in row:
        if optional:
            return ""
        raise _RowProblem(f"`{name}` is missing")
    value = row[key]
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise _RowProblem(f"`{name}` is {_kind(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _RowProblem(f"`{name}` holds a lone surrogate (\\ud800-\\udfff); it is not text") from None
    if not optional and all(unicodedata.category(character) in BLANK_CATEGORIES for character in value):
        raise _RowProblem(f"`{name}` is {'empty' if not value else 'blank'}")
    return value


def _escaped(key: str) -> str:
    """A key of the file with control characters and lone surrogates escaped: a problem is one printable line."""
    return repr(key)[1:-1]


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]


def _read_messages(row: dict[str, Any]) -> tuple[tuple[Message, ...], None]:
    raw = row["messages"]
    if not isinstance(raw, list):
        raise _RowProblem(f"`messages` is {_kind(raw)}; expected a list of {{role, content}}")
    messages: list[Message] = []
    for index, item in enumerate(raw):
        where = f"messages[{index}]."
        if not isinstance(item, dict):
            raise _RowProblem(f"`messages[{index}]` is {_kind(item)}; expected {{role, content}}")
        role = _text_field(item, "role", where)
        if role not in ROLES:
            raise _RowProblem(f"`{where}role` is {role!r}; allowed: {', '.join(ROLES)}")
        messages.append(Message(role, _text_field(item, "content", where)))
    _check_turns(messages)
    return tuple(messages), None


def _check_turns(messages: Sequence[Message]) -> None:
    """A conversation: at most one system message, at the start; then user and assistant in turn; at least one answer."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for index, message in enumerate(turns, len(messages) - len(turns)):
        if message.role == "system":
            raise _RowProblem(f"`messages[{index}]` is a system message; only one is allowed, at the start")
    for index, message in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if message.role != expected:
            position = index + len(messages) - len(turns)
            detail = f"two {message.role} turns in a row" if index else f"the conversation starts with {message.role}"
            raise _RowProblem(f"`messages[{position}]`: {detail}; expected {expected}")
    if not any(message.role == "assistant" for message in turns):
        raise _RowProblem("`messages` holds no assistant turn: there is nothing to learn from this row")


def _read_alpaca(row: dict[str, Any]) -> tuple[tuple[Message, ...], None]:
    instruction = _text_field(row, "instruction")
    extra = _text_field(row, "input", optional=True)
    user = f"{instruction}\n\n{extra}" if extra else instruction
    messages = [Message("user", user), Message("assistant", _text_field(row, "output"))]
    if system := _text_field(row, "system", optional=True):
        messages.insert(0, Message("system", system))
    return tuple(messages), None


def _read_prompt(row: dict[str, Any]) -> tuple[tuple[Message, ...], None]:
    return (Message("user", _text_field(row, "prompt")), Message("assistant", _text_field(row, "completion"))), None


def _read_text(row: dict[str, Any]) -> tuple[None, str]:
    return None, _text_field(row, "text")


_READERS: dict[str, Callable[[dict[str, Any]], tuple[tuple[Message, ...] | None, str | None]]] = {
    "messages": _read_messages,
    "alpaca": _read_alpaca,
    "prompt": _read_prompt,
    "text": _read_text,
}
