"""Whatever bytes and whatever JSON a file holds: examples and findings come out of it, or a DataError, and nothing else."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tiny import chat_rows
from tunesmith.config import FormatName, SourceConfig
from tunesmith.data.columns import FIELDS
from tunesmith.data.formats import inspect_file, read_examples
from tunesmith.data.forms import READS
from tunesmith.errors import DataError
from tunesmith.types import ROLES, Example, PreferenceExample


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rows"


def check(path: Path, content: bytes, **source: Any) -> None:
    """Read the content; whatever comes out holds together."""
    path.write_bytes(content)
    config = SourceConfig(path=str(path), **source)
    found = inspect_file(config)
    bad = {finding.line for finding in found.findings if finding.line is not None}
    for finding in found.findings:
        assert str(finding).startswith(f"{path}:")
        assert str(finding).isprintable(), "one line, nothing that a terminal would act on"
    assert found.findings or len(found.examples) == found.rows > 0
    assert found.container or (found.findings and not found.rows)
    assert sum(finding.line is not None for finding in found.findings) + len(found.examples) <= found.rows
    for e in found.examples:
        check_example(e)
        assert e.line >= 1
        assert e.line not in bad or found.container in ("JSON", "plain text"), "several rows can stand on one line"
    problems: list[str] = []
    try:
        again = read_examples(config).examples
    except DataError as error:
        problems, again = error.problems, found.examples
    assert problems == [str(finding) for finding in found.findings if finding.severity == "error"]
    assert again == found.examples


def check_example(e: Example | PreferenceExample) -> None:
    json.dumps([dict(tool) for tool in e.tools], ensure_ascii=False).encode()
    if isinstance(e, PreferenceExample):
        assert e.prompt[-1].role != "assistant"
        assert {e.chosen[0].role, e.rejected[0].role} == {"assistant"}
        assert e.chosen != e.rejected
        turns = [*e.prompt, *e.chosen, *e.rejected]
    else:
        assert (e.messages is None) != (e.text is None)
        turns = [*(e.messages or ())]
        assert not turns or any(m.role == "assistant" for m in turns)
        assert any(character.isalnum() for character in e.text or "x")
    for m in turns:
        assert m.role in ROLES
        assert m.content.strip() or m.tool_calls or m.role == "tool"
        m.content.encode()
        for call in m.tool_calls:
            json.dumps(dict(call.arguments), ensure_ascii=False).encode()


# -- bytes ------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"instruction": "say, \"hi\"", "input": "", "output": "hi\n\nthere é"},
    {"instruction": "2", "input": "x;y\tz", "output": "👍 3"},
    {"instruction": "third", "input": None, "output": "x"},
]  # fmt: skip


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([*chat_rows(3), {"label": "x"}]), sink)
    return sink.getvalue()


def arrow(new: Callable[..., Any]) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*ROWS, *chat_rows(1)]).encode()
CELLS = b'instruction,input,output\n"a ""b""\nc",,d\r\ne,f,"g, h"\n'
SEEDS = [
    LINES,
    json.dumps(ROWS, indent=1).encode(),
    json.dumps({"v": [1], "data": ROWS}).encode(),
    CELLS,
    CELLS.replace(b",", b"\t"),
    b"Some text.\n\nMore of it.\n",
    parquet(),
    arrow(pa.ipc.new_file),
    arrow(pa.ipc.new_stream),
    gzip.compress(LINES, mtime=0),
]
PIECES = st.sampled_from(
    [
        *[b"\n", b"\r\n", b"\r", b'"', b'""', b",", b"\t", b"{", b"}", b"[", b"]", b"\0", b"\xff", b"\\", b"\\ud800", b"NaN"],
        *[b"\xef\xbb\xbf", b"PAR1", b"\x1f\x8b", b"null", b'"text":', b"[" * 2000, b"9" * 5000, b"\xed\xa0\x80", b"\xe2\x80\xa8"],
    ]
) | st.binary(max_size=4)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with a few places overwritten, cut out or added to."""
    content = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 0, 1, 1, 2, 8, 200]))
        content = content[:start] + draw(PIECES) + content[start + length :]
    return content


@settings(max_examples=1500)
@given(mutated(), st.sampled_from(["document", "paragraph", "line"]))
def test_damaged_files(path: Path, content: bytes, sample_by: str) -> None:
    check(path, content, sample_by=sample_by)


@settings(max_examples=600)
@given(st.lists(PIECES | st.sampled_from([b'{"text": "x"}', b"a,b", b'["', b": 1"]), max_size=12).map(b"".join))
@example(b"\xef\xbb\xbf")
@example(b"\xff\xfe{\x00}\x00")
@example(b'{"text": "a", "label": ' + b"[" * 100_000)
@example(b"[" * 100_000)
@example(b'[{"a":' * 30_000)
@example(b'"' * 1001)
def test_any_bytes(path: Path, content: bytes) -> None:
    check(path, content)


@settings(max_examples=300)
@given(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz"]), mutated())
@example(".csv", "\u2028".encode())
def test_names_that_may_lie(path: Path, suffix: str, content: bytes) -> None:
    check(path.with_suffix(suffix), content)


WRITTEN: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    ".jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    ".json": lambda rows: json.dumps(rows, indent=1),
    "-flat.json": lambda rows: json.dumps(rows, indent=0),
    "-one-line.json": json.dumps,
    "-wrapped.json": lambda rows: json.dumps({"v": 1, "data": rows}, indent=2),
    "-wrapped-flat.json": lambda rows: json.dumps({"data": rows, "n": 1}, indent=0),
    "-wrapped-one-line.json": lambda rows: json.dumps({"rows": rows, "n": {"a": 1}}),
    ".csv": lambda rows: "messages\n" + "".join(f"{cell(row['messages'])}\n" for row in rows),
}


def cell(value: Any) -> str:
    return '"' + json.dumps(value).replace('"', '""') + '"'


@settings(max_examples=500)
@given(
    st.sampled_from(sorted(WRITTEN)),
    st.integers(0),
    st.sampled_from(["", "x", "}", "]", "{", "[", ",", "\\", "\n", "\0"]),
)
def test_damage_to_one_character_loses_no_row_in_silence(path: Path, name: str, place: int, put: str) -> None:
    """Rows in = good + bad, unless the file as a whole is refused, or nothing in it is good any more."""
    rows = chat_rows(6)
    content = WRITTEN[name](rows)
    start, end = content.index("[") + 1, content.rindex("}")
    place = start + place % (end - start)
    damaged = path.with_name(f"rows{name}")
    damaged.write_text(content[:place] + put + content[place + 1 :])
    found = inspect_file(damaged)
    bad = sum(finding.line is not None for finding in found.findings)
    assert found.rows == len(found.examples) + bad
    if not any(finding.line is None for finding in found.findings):
        assert len(found.examples) in (0, 4, 5, 6), "without its line end a line of JSON Lines spoils the next"
        assert bad or len(found.examples) == 6


# -- JSON structures --------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        *ROLES,
        "human",
        "gpt",
        "function_call",
        "observation",
        "hello",
        "A",
        "0",
        "true",
        "",
        " ",
        "\u200b",
        "\ud800",
        '{"name": "f", "arguments": {}}',
        "[[1]]",
        "[{}]",
        "x\ny\x1b[31m",
        "text",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | WORDS | st.text(st.characters(), max_size=4)
MESSAGE_KEYS = ["role", "content", "from", "value", "tool_calls", "weight", "train", "thinking", "name", "arguments"]
KEYS = st.sampled_from([*MESSAGE_KEYS, "function", "type", "tool_call_id"]) | st.text(max_size=2)
VALUES = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(KEYS, children, max_size=4),
    max_leaves=12,
)
CALL = st.fixed_dictionaries({"name": WORDS}, optional={"arguments": VALUES, "id": SCALARS, "function": VALUES})
TURN = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | WORDS, "content": WORDS | VALUES},
        optional={"tool_calls": st.lists(CALL, max_size=2) | VALUES, "weight": SCALARS, "thinking": SCALARS},
    ),
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "observation"]) | WORDS, "value": WORDS | SCALARS}),
)
TALK = st.lists(TURN, max_size=5)
GOOD_TALK = st.sampled_from([row["messages"] for row in chat_rows(3)])
FIELD = st.sampled_from(sorted({column for columns in FIELDS.values() for column in columns}))
ROW = st.one_of(
    st.dictionaries(FIELD, WORDS | TALK | GOOD_TALK | VALUES, max_size=5),
    *(st.fixed_dictionaries(dict.fromkeys(fields, WORDS | TALK | GOOD_TALK | SCALARS)) for fields in (
        ("messages", "tools"), ("chosen", "rejected"), ("prompt", "chosen", "rejected"), ("prompt", "completion", "label"),
        ("instruction", "input", "output", "history"), ("messages", "label"), ("text", "label"))),
    st.fixed_dictionaries({"question": WORDS, "choices": st.lists(WORDS, max_size=4), "answer": SCALARS}),
)  # fmt: skip


@settings(max_examples=1500)
@given(st.lists(ROW | VALUES, min_size=1, max_size=3), st.booleans(), st.sampled_from(["auto", *READS]))
def test_any_rows(path: Path, rows: list[Any], escaped: bool, form: FormatName) -> None:
    lines = [json.dumps(row, ensure_ascii=escaped).encode("utf-8", "surrogatepass") for row in rows]
    check(path.with_suffix(".jsonl"), b"\n".join(lines), format=form)


@settings(max_examples=300)
@given(
    st.lists(ROW, min_size=1, max_size=2),
    st.dictionaries(st.sampled_from([*FIELDS, "query", "response", "kto_tag", "field", "role_tag", "wrong"]), FIELD, max_size=3),
    st.dictionaries(WORDS, st.sampled_from([*ROLES, "human"]), max_size=1),
)  # fmt: skip
def test_any_mapping(path: Path, rows: list[Any], columns: dict[str, str], roles: dict[str, str]) -> None:
    check(path.with_suffix(".json"), json.dumps(rows, indent=1).encode(), columns=columns, roles=roles)


@settings(max_examples=200)
@given(
    st.lists(
        st.dictionaries(FIELD | st.just("messages"), WORDS.filter(str.isascii) | GOOD_TALK | st.integers(-9, 9)),
        max_size=3,
    )
)
def test_any_table(path: Path, rows: list[Any]) -> None:
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, UnicodeEncodeError):
        return  # such a column cannot be in a table
    sink = io.BytesIO()
    pq.write_table(table, sink)
    check(path, sink.getvalue())
