"""Rows of text files: JSON Lines, JSON, CSV and TSV, plain text. Each row comes with its physical line, from 1.

A row that cannot be read is a RowProblem at its line, and the rows after it are still read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NoReturn

from tunesmith.data.columns import FIELDS
from tunesmith.data.problems import FileProblem, RowProblem, kind, listed

Rows = Iterable[tuple[int, dict[str, Any] | RowProblem]]
"""(physical line, or number in a table; the row, or what is wrong with it). Iterating may raise FileProblem."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CELL_SUFFIXES = (".csv", ".tsv")
WRAPPERS = ("data", "rows")
"""Keys under which a JSON object may hold the list of rows."""

DELIMITERS = {",": "CSV", ";": "CSV", "\t": "TSV"}
COLUMNS = frozenset(column for columns in FIELDS.values() for column in columns)

SPACE = re.compile(r"[ \t\n\r]*")
BAD_BYTE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is not UTF-8
LONG_CELL = 2**31 - 1

ROW_BEGINS = re.compile(rb'\{\s*"[^"\n]*"\s*:')
"""How a JSON row begins, whole or cut off, and no prose does."""

EXCEL_HINT = re.compile(rb'"?sep=."?\r?')
"""A first line that tells Excel the delimiter."""

WINDOW = 2**12
"""Characters of a JSON document that are parsed at first; four times as many, again and again, where a row is longer."""

CUT = 20
"""An error this close to the end of what is parsed may come from the cut: `\\ud83d\\ude00` and `-Infinity` are shorter."""


def text_container(data: bytes, suffix: str) -> str:
    """JSON Lines, JSON, CSV, TSV or plain text, by how the content begins; by the name where that leaves it open.

    Raises FileProblem for content that is no text.
    """
    start = data.lstrip(b" \t\r\n")
    first, _, rest = start.partition(b"\n")
    container = _json_container(start, first, rest.lstrip(), suffix) if start[:1] in (b"{", b"[") else ""
    if container:
        return container
    if EXCEL_HINT.fullmatch(first):
        found = f"line 1 is `{first.decode(errors='replace').strip()}`, which is meant for Excel"
        raise FileProblem("unsupported_file", found, "remove that line; the delimiter is recognised without it")
    delimiter = _delimiter(first, suffix)
    if suffix in CELL_SUFFIXES or len(COLUMNS & set(_cells(first, delimiter))) > 1:
        return DELIMITERS[delimiter]
    if suffix in JSON_SUFFIXES:
        return "JSON Lines"
    if suffix in (".parquet", ".arrow"):
        found = f"the name ends in {suffix}, but the content does not begin as such a file does"
        raise FileProblem("unsupported_file", found, "write it again")
    if b"\0" in data:
        found = f"a file of bytes, not of text: a NUL byte at offset {data.index(0)}"
        raise FileProblem(
            "unsupported_file", found, "expected JSON Lines, JSON, CSV, TSV, Parquet, Arrow or plain text"
        )
    return "plain text"


def _json_container(start: bytes, first: bytes, rest: bytes, suffix: str) -> str:
    """JSON or JSON Lines for what begins with a bracket; empty where it only looks like it."""
    inside = start[1:1000].lstrip()[:1]
    if start[:1] == b"[":
        if inside in (b"{", b"]") and not (rest and isinstance(_loads(first), list)):
            return "JSON"
        return "" if suffix not in JSON_SUFFIXES else "JSON" if suffix == ".json" else "JSON Lines"
    value = _loads(first)
    if isinstance(value, dict):
        return "JSON" if not rest and _is_wrapper(value) else "JSON Lines"
    is_row = suffix in JSON_SUFFIXES or ROW_BEGINS.match(start) is not None
    if inside not in (b'"', b"}") or rest[:1] == b"{":
        return "JSON Lines" if is_row or isinstance(_loads(rest.partition(b"\n")[0]), dict) else ""
    if suffix == ".json" or first.strip() == b"{" or _loads(start) is not None:
        return "JSON"
    return "JSON Lines" if is_row else ""


def _is_wrapper(value: dict[str, Any]) -> bool:
    """Whether an object holds the list of rows, and is no row itself."""
    lists = [value[key] for key in WRAPPERS if isinstance(value.get(key), list)]
    return not COLUMNS & value.keys() and any(not rows or _has_objects(rows) for rows in lists)


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(element, dict) for element in value)


def text_rows(data: bytes, container: str, sample_by: str) -> Rows:
    """The rows of a text file without its byte-order mark; `sample_by` cuts plain text."""
    if container == "JSON Lines":
        return _json_lines(data)
    text = data.decode(errors="surrogateescape")
    if container == "JSON":
        return _Json(text).rows()
    if container == "plain text":
        return _samples(text, sample_by)
    return _table(text, container)


# -- JSON -------------------------------------------------------------------------------------------------------------


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _skip(text: str, position: int) -> int:
    """The position behind JSON's white space."""
    match = SPACE.match(text, position)
    assert match is not None
    return match.end()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RowProblem("duplicate_key", f"the key `{repeated}` stands twice in one object")
    return row


PLAIN = json.JSONDecoder()
STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _json_lines(data: bytes) -> Rows:
    for number, raw in enumerate(data.split(b"\n"), 1):
        if raw.strip():
            try:
                yield number, _parse_line(raw)
            except RowProblem as problem:
                yield number, problem


def _parse_line(raw: bytes) -> dict[str, Any]:
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(raw[error.start], error.start) from None
    if "\0" in line:
        found = f"a NUL byte at offset {raw.index(0)} of the line"
        raise RowProblem("nul_byte", found, "it is not legal in JSON")
    try:
        row, end = STRICT.raw_decode(line, _skip(line, 0))
    except (ValueError, RecursionError) as error:
        raise _not_json(error, line) from None
    end = _skip(line, end)
    if end != len(line):
        raise _not_json(json.JSONDecodeError("Extra data", line, end), line)
    if not isinstance(row, dict):
        raise RowProblem("not_an_object", f"expected a JSON object, found {kind(row)}")
    return row


def _not_utf8(byte: int, offset: int) -> RowProblem:
    return RowProblem("invalid_utf8", f"not valid UTF-8: byte 0x{byte:02x} at offset {offset} of the line")


def _not_json(error: Exception, line: str) -> RowProblem:
    if isinstance(error, RecursionError):
        return RowProblem("nested_too_deeply", "nested too deeply to be a row of training data")
    if not isinstance(error, json.JSONDecodeError):  # Python refuses to convert so many digits
        return RowProblem(
            "invalid_json", "a whole number of more than 4300 digits", "write it as a string, or remove it"
        )
    cut = error.pos >= len(line.rstrip()) or error.msg.startswith("Unterminated string")
    found = f"not valid JSON: {_message(error)} at column {error.colno}"
    return RowProblem("invalid_json", found, "the row looks cut off" if cut else "")


def _message(error: json.JSONDecodeError) -> str:
    return error.msg[0].lower() + error.msg[1:].removesuffix(" at")


class _Json:
    """Reads a JSON document value by value, so that every row has its line and one broken row does not hide the rest."""

    def __init__(self, text: str):
        self.text = text
        self.has_bad_bytes = BAD_BYTE.search(text) is not None
        self.line = 1
        self.line_start = 0
        self.counted = 0
        self.offset = 0  # of `counted` in its line, in bytes; kept only where there are bytes that are not UTF-8

    def rows(self) -> Rows:
        """The elements of the list, the list in an object's `data` or `rows`, or objects one after the other."""
        position = self.skip(0)
        if self.text[position] == "[":
            position = self.skip((yield from self.elements(position + 1)))
            if position < len(self.text):
                self.stop(position, "text after the end of the list")
        elif (inside := self.wrapped_list(position)) is not None:
            self.rest_of_object((yield from self.elements(inside)))
        else:
            while position < len(self.text):
                line = self.line_of(position)
                row, end = self.value(position)
                yield line, row
                if end is None:
                    self.stop(position, "a row that is not valid JSON")
                position = self.skip(end)

    def elements(self, position: int) -> Generator[tuple[int, dict[str, Any] | RowProblem], None, int]:
        """The rows of a list from behind its bracket. Returns the position behind its end."""
        position = self.skip(position)
        while self.text[position : position + 1] != "]":
            line = self.line_of(position)
            row, end = self.value(position)
            after = self.skip(end) if end is not None else None
            if after is not None and self.text[after : after + 1] not in (",", "]"):
                row = RowProblem("invalid_json", "not valid JSON: no comma and no `]` after this row")
                after = None
            yield line, row
            if after is None:
                after = self.next_element(position)
            elif self.text[after] == ",":
                after = self.skip(after + 1)
                if self.text[after : after + 1] in ("]", ""):
                    self.stop(after, "a comma that no row follows")
            position = after
        return position + 1

    def value(self, position: int) -> tuple[dict[str, Any] | RowProblem, int | None]:
        """The row at a position, or what is wrong with it, and where it ends if that is known."""
        row: Any
        try:
            try:
                row, end = self.decode(STRICT, position)
            except RowProblem as problem:
                row, end = problem, self.decode(PLAIN, position)[1]
        except json.JSONDecodeError as error:
            column = error.colno + (position - self.line_start if error.lineno == 1 else 0)
            place = f"line {self.line + error.lineno - 1}, column {column}"
            return RowProblem("invalid_json", f"not valid JSON: {_message(error)} at {place}"), None
        except (ValueError, RecursionError) as error:
            return _not_json(error, ""), None
        if isinstance(row, RowProblem):
            return row, end
        if self.has_bad_bytes and (bad := BAD_BYTE.search(self.text, position, end)):
            return self.bad_byte(position, bad.start()), end
        if not isinstance(row, dict):
            return RowProblem("not_an_object", f"expected a JSON object, found {kind(row)}"), end
        return row, end

    def decode(self, decoder: json.JSONDecoder, position: int) -> tuple[Any, int]:
        """The value at a position and where it ends. An error's place is counted from the position.

        Only as much of the text is parsed as the value needs: an error costs as much as what was parsed, because
        JSONDecodeError counts its lines, and a document may have one in each row.
        """
        length = WINDOW
        while True:
            part = self.text[position : position + length]
            is_rest = position + length >= len(self.text)
            try:
                value, end = decoder.raw_decode(part)
                if is_rest or end <= len(part) - CUT:
                    return value, position + end
            except json.JSONDecodeError as error:
                if is_rest or (error.pos <= len(part) - CUT and not error.msg.startswith("Unterminated string")):
                    raise
            length *= 4

    def next_element(self, position: int) -> int:
        """Where the list goes on behind a broken element: at the next `{` that begins its line as this one does."""
        indent = self.text[self.line_start : position]
        found = re.compile("\n" + (re.escape(indent) if not indent.strip() else r"[ \t]*") + r"\{").search(
            self.text, position
        )
        if found is None:
            self.stop(position, "a row that is not valid JSON")
        return found.end() - 1

    def wrapped_list(self, position: int) -> int | None:
        """The position behind the bracket of the list of rows in an object, or None if the object is a row itself."""
        position = self.skip(position + 1)
        other = 0  # another list of objects before that of the rows
        while self.text[position : position + 1] == '"':
            start = position
            try:
                key, position = self.key(position)
                if key in COLUMNS:
                    return None
                inside = self.skip(position + 1)
                if (
                    key in WRAPPERS
                    and self.text[position : position + 1] == "["
                    and self.text[inside : inside + 1] in ("{", "]")
                ):
                    if other:
                        self.stop(other, "a list of objects beside the list of rows")
                    return position + 1
                value, end = self.decode(PLAIN, position)
            except (ValueError, RecursionError):
                return None
            other = other or (start if _has_objects(value) else 0)
            position = self.skip(end)
            if self.text[position : position + 1] != ",":
                return None
            position = self.skip(position + 1)
        return None

    def key(self, position: int) -> tuple[str, int]:
        """An object's key, and the position of its value. Raises ValueError where no key and colon stand."""
        key, end = self.decode(PLAIN, position)
        colon = self.skip(end)
        if not isinstance(key, str) or self.text[colon : colon + 1] != ":":
            raise ValueError
        return key, self.skip(colon + 1)

    def rest_of_object(self, position: int) -> None:
        """Refuse what may follow the list of rows in its object if it could hold rows, and a file that is cut off."""
        position = self.skip(position)
        while self.text[position : position + 1] == ",":
            start = self.skip(position + 1)
            try:
                key, position = self.key(start)
                value, end = self.decode(PLAIN, position)
            except (ValueError, RecursionError):
                self.stop(start, "no valid JSON behind the list of rows")
            if _has_objects(value):
                self.stop(start, f"`{key}`, a list of objects beside the list of rows")
            if key in COLUMNS:
                self.stop(start, f"`{key}`, a row's key beside the list of rows")
            position = self.skip(end)
        if self.text[position : position + 1] != "}":
            self.stop(position, "no `}` and no comma behind the list of rows")
        position = self.skip(position + 1)
        if position < len(self.text):
            self.stop(position, "text after the end of the object")

    def stop(self, position: int, found: str) -> NoReturn:
        """Raise: what stands behind `position` cannot be told apart into rows."""
        place = f"line {self.text.count(chr(10), 0, position) + 1}: {found}"
        raise FileProblem("unreadable_rest", f"{place}; nothing behind it can be read", "mend it first")

    def skip(self, position: int) -> int:
        return _skip(self.text, position)

    def line_of(self, position: int) -> int:
        self.line += self.text.count("\n", self.counted, position)
        newline = self.text.rfind("\n", self.counted, position)
        if newline >= 0:
            self.line_start, self.offset = newline + 1, 0
        if self.has_bad_bytes:
            self.offset += _num_bytes(self.text[max(self.counted, self.line_start) : position])
        self.counted = position
        return self.line

    def bad_byte(self, start: int, position: int) -> RowProblem:
        """A byte that is not UTF-8 in the row that starts at `start`, which is the last place `line_of` was asked for."""
        newline = self.text.rfind("\n", start, position)
        before = self.offset if newline < 0 else 0
        offset = before + _num_bytes(self.text[max(start, newline + 1) : position])
        return _not_utf8(ord(self.text[position]) - 0xDC00, offset)


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))


def _bad_byte(text: str, position: int) -> RowProblem:
    start = text.rfind("\n", 0, position) + 1
    offset = _num_bytes(text[start:position])
    return _not_utf8(ord(text[position]) - 0xDC00, offset)


# -- CSV --------------------------------------------------------------------------------------------------------------


def _cells(header: bytes, delimiter: str) -> list[str]:
    line = header.decode(errors="replace").strip("\r\n")
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _delimiter(header: bytes, suffix: str) -> str:
    """The delimiter that cuts the header into the most cells."""
    preferred = "\t" if suffix == ".tsv" else ","
    return max(DELIMITERS, key=lambda mark: (len(_cells(header, mark)), mark == preferred))


def _table(text: str, container: str) -> Rows:
    lines = list(io.StringIO(text, newline="\n"))
    first = next(index for index, line in enumerate(lines) if line.strip(" \t\r\n\v\f"))
    delimiter = "\t" if container == "TSV" else _delimiter(lines[first].encode(errors="replace"), ".csv")
    records = _records(lines, first, delimiter)
    line, header = next(records)
    if isinstance(header, RowProblem):
        raise FileProblem(header.check, f"line {line}, the header: {header.found}", header.fix)
    names = [name.strip() or f"column {index}" for index, name in enumerate(header, 1)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise FileProblem("duplicate_column", f"the header has {listed(repeated)} twice", "rename one")
    has_bad_bytes = BAD_BYTE.search(text) is not None
    for line, cells in records:
        if isinstance(cells, RowProblem):
            yield line, cells
        elif len(cells) != len(names):
            found = f"a row of {len(cells)} cells; the header has {len(names)}"
            yield line, RowProblem("cell_count", found, "check the quotation marks and delimiters of this row")
        elif any("\0" in cell for cell in cells):
            yield line, RowProblem("nul_byte", "a NUL byte in a cell", "remove it")
        elif has_bad_bytes and (problem := _bad_cell(lines, line, cells)):
            yield line, problem
        else:
            yield line, dict(zip(names, cells, strict=True))


def _bad_cell(lines: list[str], line: int, cells: list[str]) -> RowProblem | None:
    if not any(BAD_BYTE.search(cell) for cell in cells):
        return None
    while not (match := BAD_BYTE.search(lines[line - 1])):
        line += 1
    return _bad_byte(lines[line - 1], match.start())


def _records(lines: list[str], first: int, delimiter: str) -> Iterator[tuple[int, list[str] | RowProblem]]:
    """Records with the line on which each starts. After a broken one, reading goes on with the next line."""
    while first < len(lines):
        reader = csv.reader((lines[index] for index in range(first, len(lines))), delimiter=delimiter, strict=True)
        start = first
        try:
            while (cells := _next_record(reader)) is not None:
                if cells:
                    yield start + 1, cells
                start = first + reader.line_num
            return
        except csv.Error as error:
            yield start + 1, _not_csv(str(error), lines, start, first + reader.line_num, delimiter)
            first = start + 1


def _next_record(reader: Iterator[list[str]]) -> list[str] | None:
    """The next record, its cells as long as they are; None at the end. The limit is the process's, so it is put back."""
    limit = csv.field_size_limit(LONG_CELL)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _not_csv(error: str, lines: list[str], start: int, end: int, delimiter: str) -> RowProblem:
    opened = _opened(lines, start, end, delimiter)
    if "unexpected end of data" in error:
        found = f"the quotation mark opened on line {opened} is never closed"
        return RowProblem("unclosed_quote", found, 'close it; a quotation mark inside a cell is written ""')
    if "expected after" in error:
        found = f"text behind the end of the quoted cell that opens on line {opened} and closes on line {end}"
        return RowProblem("unclosed_quote", found, 'a quotation mark inside a cell is written ""')
    return RowProblem("invalid_csv", f"not valid CSV: {error.partition(' - ')[0]}")


def _opened(lines: list[str], start: int, end: int, delimiter: str) -> int:
    """The line on which the quoted cell opens at which the record in the lines from `start` to `end` breaks."""
    text = "".join(lines[start:end])
    # Possessive, so that the pair in `"a ""b` is not taken for the end of an unclosed cell.
    quoted = re.compile('"[^"]*+(?:""[^"]*+)*+"?')
    plain = re.compile(f"[^{re.escape(delimiter)}\n]*+")
    position = 0
    while position < len(text):
        is_quoted = text[position] == '"'
        match = (quoted if is_quoted else plain).match(text, position)
        assert match is not None
        if is_quoted and text[match.end() : match.end() + 1] not in (delimiter, "\r", "\n"):
            break
        position = match.end() + 1
    return start + 1 + text.count("\n", 0, position)


# -- plain text -------------------------------------------------------------------------------------------------------


def _samples(text: str, sample_by: str) -> Rows:
    """Plain text as one row, or a row for each paragraph (blank lines between) or line that is not blank."""
    lines = text.replace("\r\n", "\n").split("\n")
    blocks: list[tuple[int, list[str]]] = []
    if sample_by == "document":
        blocks = [(1, lines)]
    elif sample_by == "line":
        blocks = [(number, [line]) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if number > 1 and lines[number - 2].strip():
                blocks[-1][1].append(line)
            else:
                blocks.append((number, [line]))
    for number, block in blocks:
        sample = "\n".join(block)
        bad = BAD_BYTE.search(sample)
        if bad:
            yield number + sample.count("\n", 0, bad.start()), _bad_byte(sample, bad.start())
        else:
            yield number, {"text": sample}
