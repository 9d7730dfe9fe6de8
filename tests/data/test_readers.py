"""Containers: what a file is, by its content; its rows and their physical lines; what is said of a damaged one."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiny import chat_rows, write_jsonl
from tunesmith.config import SourceConfig
from tunesmith.data.formats import DataFile, inspect_file, read_examples
from tunesmith.data.readers import open_source
from tunesmith.data.tables import hub_rows
from tunesmith.data.text_files import WINDOW
from tunesmith.errors import DataError
from tunesmith.files import sha256_file
from tunesmith.types import Example

Rows = list[dict[str, Any]]


def written(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def said(found: DataFile) -> list[str]:
    """The findings without the name of the file's folder."""
    return [str(finding).removeprefix(str(Path(found.path).parent) + "/") for finding in found.findings]


def texts(found: DataFile) -> list[tuple[int, str | None]]:
    return [(e.line, e.text) for e in found.examples if isinstance(e, Example)]


# -- round trips ------------------------------------------------------------------------------------------------------


def cells(rows: Rows, delimiter: str) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet(rows: Rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def arrow(rows: Rows, stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


WRITERS: dict[str, tuple[str, Callable[[Rows], str | bytes]]] = {
    "a.jsonl": ("JSON Lines", lambda rows: "".join(json.dumps(row) + "\n" for row in rows)),
    "a.json": ("JSON", lambda rows: json.dumps(rows)),
    "b.json": ("JSON", lambda rows: json.dumps(rows, indent=2, ensure_ascii=False)),
    "c.json": ("JSON", lambda rows: json.dumps({"version": 1, "data": rows}, indent=1)),
    "d.json": ("JSON", lambda rows: json.dumps({"rows": rows, "n": 3})),
    "e.json": ("JSON", lambda rows: "\n".join(json.dumps(row, indent=4) for row in rows)),
    "a.csv": ("CSV", lambda rows: cells(rows, ",")),
    "b.csv": ("CSV", lambda rows: cells(rows, ";")),
    "a.tsv": ("TSV", lambda rows: cells(rows, "\t")),
    "a.parquet": ("Parquet", parquet),
    "a.arrow": ("Arrow", lambda rows: arrow(rows, stream=False)),
    "b.arrow": ("Arrow", lambda rows: arrow(rows, stream=True)),
}

ALPACA: Rows = [
    {"instruction": 'say "hi", please; or\tnot', "input": "", "output": "hi\n\n  there "},
    {"instruction": "두 번째 é 👨\u200d👩\u200d👧", "input": "a,b;c\td", "output": "{'x': [1]}"},
    {"instruction": "third", "input": "\u2028 x \x0b", "output": "0"},
]
CHATS = chat_rows(5)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_every_container_gives_the_same_examples(tmp_path: Path, name: str, named: bool, zipped: bool) -> None:
    container, write = WRITERS[name]
    for rows in (ALPACA, CHATS) if "sv" not in name else (ALPACA,):
        expected = read_examples(write_jsonl(tmp_path / "expected.jsonl", rows))
        content = write(rows)
        content = content.encode() if isinstance(content, str) else content
        path = written(
            tmp_path, (name if named else "data") + ".gz" * zipped, gzip.compress(content) if zipped else content
        )
        found = read_examples(path)
        assert (found.container, found.form, found.rows) == (container, expected.form, len(rows))
        assert [e.messages for e in found.examples if isinstance(e, Example)] == [
            e.messages for e in expected.examples if isinstance(e, Example)
        ]
        assert found.sha256 == sha256_file(path)
        assert (found.findings, found.ignored) == ([], {})


@pytest.mark.parametrize("wrong", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.txt", "a.md", "a"])
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "e.json"])
def test_the_content_is_believed_and_not_the_name(tmp_path: Path, name: str, wrong: str) -> None:
    container, write = WRITERS[name]
    content = write(ALPACA)
    found = read_examples(written(tmp_path, wrong, content))
    assert (found.container, found.form, len(found.examples)) == (container, "alpaca", 3)


def test_a_null_in_a_table_is_a_missing_key(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "f", "arguments": {"a": 1}}}]}], "system": None},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "system": "s"},
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}], "system": "s"},
    ]  # fmt: skip
    found = inspect_file(written(tmp_path, "a.parquet", parquet(rows)))
    first, second = (e.messages for e in found.examples if isinstance(e, Example))
    assert first is not None
    assert second is not None
    assert [m.role for m in first] == ["user", "assistant"]
    assert (first[1].tool_calls[0].arguments, second[2].tool_calls) == ({"a": 1}, ())
    assert said(found) == ["a.parquet:3: `messages[0].content` is missing"]


def test_max_rows_stops_reading(tmp_path: Path) -> None:
    for name, (_, write) in WRITERS.items():
        found = inspect_file(written(tmp_path, name, write(ALPACA)), max_rows=2)
        assert (found.rows, len(found.examples)) == (2, 2)


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_the_line_of_a_json_element_is_the_one_on_which_it_starts(tmp_path: Path) -> None:
    path = written(
        tmp_path, "a.json", '\n[ {"text": "one"},\n\n  {"text":\n "two"}, {"text": "three"}\n,{"text": "four"}]\n'
    )
    assert texts(read_examples(path)) == [(2, "one"), (4, "two"), (5, "three"), (6, "four")]


def test_every_broken_element_of_a_pretty_printed_list_is_reported(tmp_path: Path) -> None:
    content = json.dumps([{"text": f"t{n}", "m": [{"a": 1}, {"b": 2}]} for n in range(6)], indent=2).split("\n")
    content[content.index('    "text": "t1",')] = '    "text": t1,'
    content[content.index('    "text": "t4",')] = '    "text": "t4"'
    found = inspect_file(written(tmp_path, "a.json", "\n".join(content)))
    assert said(found) == [
        "a.json:13: not valid JSON: expecting value at line 14, column 13",
        "a.json:46: not valid JSON: expecting ',' delimiter at line 48, column 5",
    ]
    assert [text for _, text in texts(found)] == ["t0", "t2", "t3", "t5"]
    assert found.rows == 6


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ('[{"text": "a"}, 5, "x", null]', [":1: row 2: expected a JSON object, found a number", ":1: row 3: expected a JSON object, found a string", ":1: row 4: expected a JSON object, found null"]),
        ('[{"text": "a"}, {"text": ""},\n{"text": ""},\n{"text": "b"}, {"text": 1}]', [":1: row 2: `text` is empty", ":2: `text` is empty", ":3: row 5: `text` is a number; expected a string"]),
        ('[{"text": "a"},\n {"m": {"b": 1, "b": 2}, oops},\n {"text": "c"}]', [":2: not valid JSON: expecting property name enclosed in double quotes at line 2, column 26"]),
        ('[{"text": "a"},\n {"text": "b", "text": "c"},\n {"text": "d"}]', [":2: the key `text` stands twice in one object"]),
        ('[{"text": "a"},\n {"text": "b"}', [":2: not valid JSON: no comma and no `]` after this row", ": line 2: a row that is not valid JSON; nothing behind it can be read; mend it first"]),
        ('[{"text": "a"},\n {"te', [":2: not valid JSON: unterminated string starting at line 2, column 3", ": line 2: a row that is not valid JSON; nothing behind it can be read; mend it first"]),
        ('[{"text": "a"},\n]', [": line 2: a comma that no row follows; nothing behind it can be read; mend it first"]),
        ('[{"text": "a"}]\n[1]', [": line 2: text after the end of the list; nothing behind it can be read; mend it first"]),
        ('{"data": [{"text": "a"}], "meta":', ["1: no valid JSON behind the list of rows"]),
        ('{"data": [{"text": "a"}],\n"meta": {"x": 1}', ["2: no `}` and no comma behind the list of rows"]),
        ('{"data": [{"text": "a"}] "meta": 1}', ["1: no `}` and no comma behind the list of rows"]),
        ('{"data": [{"text": "a"}],\n', ["2: no valid JSON behind the list of rows"]),
        ('{"data": [{"text":\n"a"}]} trailing garbage {', ["2: text after the end of the object"]),
        ('{"data": [{"text": "a"}],\n"rows": [{"text": "b"}]}', ["2: `rows`, a list of objects beside the list of rows"]),
        ('{"test": [{"text": "a"}],\n"data": [{"text": "b"}]}', ["1: a list of objects beside the list of rows"]),
        ('{\n"data": [{"text": "a"}],\n"instruction": "b"}', ["3: `instruction`, a row's key beside the list of rows"]),
        ('[{"text": "a"}\n {"text": "b"}]', [":1: not valid JSON: no comma and no `]` after this row"]),
        ('[{"text": "a\x00"}]', [":1: not valid JSON: invalid control character at line 1, column 13", ": line 1: a row that is not valid JSON; nothing behind it can be read; mend it first"]),
        ("[]", [": the file holds no rows; expected rows to train on"]),
        ('{"data": []}', [": the file holds no rows; expected rows to train on"]),
        ('{\n"text": [\n"a", "b"]}', [":1: `text` is a list; expected a string"]),
        ('{\n"data": [{"text": "a"}', [":2: not valid JSON: no comma and no `]` after this row", ": line 2: a row that is not valid JSON; nothing behind it can be read; mend it first"]),
    ],
)  # fmt: skip
def test_broken_json(tmp_path: Path, content: str, problems: list[str]) -> None:
    if problems and problems[0][0].isdigit():
        problems = [f": line {problem}; nothing behind it can be read; mend it first" for problem in problems]
    assert said(inspect_file(written(tmp_path, "a.json", content))) == [f"a.json{problem}" for problem in problems]


def test_a_wrapped_list_may_have_other_things_beside_it(tmp_path: Path) -> None:
    content = '{"v": [1, {}], "n": {"a": [{}]}, "rows": [{"text": "a"}], "x": [], "license": "MIT"}\n '
    found = inspect_file(written(tmp_path, "a.json", content.replace("[1, {}]", "[1]")))
    assert (found.findings, texts(found)) == ([], [(1, "a")])


def test_a_damaged_row_of_a_wrapped_list_does_not_end_it_in_silence(tmp_path: Path) -> None:
    content = json.dumps({"data": CHATS}, indent=0)
    broken = content.replace('"content"', '"content', 3).replace('"content', '"content"', 2)
    assert broken != content
    path = written(tmp_path, "a.json", broken)
    with pytest.raises(DataError, match="nothing behind it can be read"):
        read_examples(path, skip_bad_rows=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_row_with_a_list_of_its_own_under_data_is_a_row(tmp_path: Path, name: str, indent: int | None) -> None:
    for more in ({"data": [1, 2]}, {"data": [{"x": 1}]}):
        row = {"instruction": "q", "output": "a", **more}
        found = read_examples(written(tmp_path, name, json.dumps(row, indent=indent)))
        assert (found.form, found.rows, found.ignored) == ("alpaca", 1, {"data": 1})


def test_json_rows_longer_than_what_is_parsed_at_first(tmp_path: Path) -> None:
    for length in [*range(WINDOW - 40, WINDOW + 10), 5 * WINDOW]:
        rows = [{"text": "x" * length, "n": [-12345, True]}, {"text": "a" + "\U0001f600" * (length // 12)}]
        found = read_examples(written(tmp_path, "a.json", json.dumps(rows, indent=1)))
        assert [text for _, text in texts(found)] == [row["text"] for row in rows]


def test_a_broken_row_has_its_line_and_column_wherever_it_stands(tmp_path: Path) -> None:
    rows = [f'{{"text": "{"x" * length}", "n": 1 2}}' for length in (3, WINDOW - 12, 3 * WINDOW)]
    found = inspect_file(written(tmp_path, "a.json", "[" + ",\n ".join(rows) + "]"))
    for number, finding in enumerate(found.findings[:3], 1):
        column = rows[number - 1].index("2") + 2
        assert finding.message.startswith("not valid JSON: expecting ',' delimiter")
        assert finding.message.endswith(f" at line {number}, column {column}")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("a.json", b' {"instruction": "q", "output""x"},\n'),
        ("b.json", b' {"instruction": "q", "output": "\xe9"},\n'),
        ("c.json", b' {"instruction": "q", "output": "\xe9"},'),
        ("a.csv", b"caf\xe9,x\n"),
        ("b.csv", b'"a"b,x\n'),
        ("a.jsonl", b'{"instruction": "q", "output""x"}\n'),
    ],
)
def test_a_fault_in_every_row_costs_no_more_than_the_rows(tmp_path: Path, name: str, row: bytes) -> None:
    number = 60_000 if name.endswith(".csv") else 20_000
    content = b"instruction,output\n" + row * number if "csv" in name else row * number
    if name.endswith(".json"):
        content = b"[" + content[: content.rindex(b",")] + b"]"
    path = written(tmp_path, name, content)
    start = time.process_time()  # others may use the cores meanwhile
    found = inspect_file(path)
    assert time.process_time() - start < 4, "0.5 s, where the time grows with the file and not with its square"
    assert (found.rows, sum(finding.line is not None for finding in found.findings)) == (number, number)


def test_bytes_that_are_not_utf8_have_their_offset_in_the_line(tmp_path: Path) -> None:
    one_line = '[{"text": "é'.encode() + b'\xff"}, {"text": "a", "b": "\xfe"}, {"text":\n "\xfd"}]'
    found = inspect_file(written(tmp_path, "a.json", one_line))
    assert [finding.found for finding in found.findings] == [
        f"row {row}: not valid UTF-8: byte 0x{byte:02x} at offset {offset} of the line"
        for row, byte, offset in ((1, 0xFF, 13), (2, 0xFE, 38), (3, 0xFD, 2))
    ]


def test_bytes_that_are_not_utf8_spoil_only_their_element(tmp_path: Path) -> None:
    found = inspect_file(
        written(tmp_path, "a.json", '[\n{"text": "é"},\n{"text": "ü'.encode() + b'\xff"},\n{"text": "c"}]')
    )
    assert said(found) == ["a.json:3: not valid UTF-8: byte 0xff at offset 12 of the line"]
    assert [text for _, text in texts(found)] == ["é", "c"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a"])
def test_json_lines_with_a_broken_first_line_are_still_json_lines(tmp_path: Path, name: str) -> None:
    found = inspect_file(written(tmp_path, name, '{"text": "a"\n{"text": "b"}\n'))
    assert (found.container, said(found)) == (
        "JSON Lines",
        [f"{name}:1: not valid JSON: expecting ',' delimiter at column 13; the row looks cut off"],
    )


def test_a_cut_off_last_line_is_called_that(tmp_path: Path) -> None:
    found = inspect_file(written(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b'))
    assert said(found) == [
        "a.jsonl:2: not valid JSON: unterminated string starting at column 10; the row looks cut off"
    ]


def test_lists_in_json_lines_are_not_rows(tmp_path: Path) -> None:
    found = inspect_file(written(tmp_path, "a.jsonl", '[{"role": "user"}]\n[{"role": "user"}]\n'))
    assert (found.container, said(found)) == (
        "JSON Lines",
        [f"a.jsonl:{line}: expected a JSON object, found a list" for line in (1, 2)],
    )


# -- CSV --------------------------------------------------------------------------------------------------------------


def test_the_line_of_a_record_is_the_one_on_which_it_starts(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", '\ninstruction,output\r\n"a\nb","c ""d"""\r\n\r\ne,"f, g"\r\n')
    found = read_examples(path)
    assert [(e.line, [m.content for m in e.messages or ()]) for e in found.examples if isinstance(e, Example)] == [
        (3, ["a\nb", 'c "d"']),
        (6, ["e", "f, g"]),
    ]


@pytest.mark.parametrize(
    ("rows", "problems", "good"),
    [
        ('a,"b\nc,d\n', [":2: the quotation mark opened on line 2 is never closed"], ["c"]),
        ('a,b\nc,"d ""x"" y\ne,f\n', [":3: the quotation mark opened on line 3 is never closed"], ["a", "e"]),
        ('"a\nx","b\n\nc,d\n', [":2: the quotation mark opened on line 3 is never closed", ":3: the quotation mark opened on line 3 is never closed"], ["c"]),
        ('"a ""x""\nb","c\n', [":2: the quotation mark opened on line 3 is never closed", ":3: the quotation mark opened on line 3 is never closed"], []),
        ('a,"b\n"c","d"\ne,f\n', [":2: text behind the end of the quoted cell that opens on line 2 and closes on line 3"], ["c", "e"]),
        ('5" pipe,it"s\nc,d\n', [], ['5" pipe', "c"]),
        ("a,b,c\nd\ne,f\n", [":2: a row of 3 cells; the header has 2", ":3: a row of 1 cells; the header has 2"], ["e"]),
        ("a,b\rc,d\ne,f\n", [":2: not valid CSV: new-line character seen in unquoted field"], ["e"]),
        ("a,b\x00\ne,f\n", [":2: a NUL byte in a cell; remove it"], ["e"]),
        (b"a,b\xe9\ne,f\n", [":2: not valid UTF-8: byte 0xe9 at offset 3 of the line"], ["e"]),
        (b'"a\n\xc3\xa9\xff",b\ne,f\n', [":2: not valid UTF-8: byte 0xff at offset 2 of the line"], ["e"]),
        (",b\na,\ne,f\n", [":2: `question` is empty", ":3: `answer` is empty"], ["e"]),
    ],
)  # fmt: skip
def test_broken_csv(tmp_path: Path, rows: str | bytes, problems: list[str], good: list[str]) -> None:
    rows = rows.encode() if isinstance(rows, str) else rows
    found = inspect_file(written(tmp_path, "a.csv", b"question,answer\n" + rows))
    assert len(said(found)) == len(problems), said(found)
    for text, problem in zip(said(found), problems, strict=True):
        assert text.startswith(f"a.csv{problem}")
    assert [e.messages[0].content for e in found.examples if isinstance(e, Example) and e.messages] == good


def test_a_cell_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    found = read_examples(written(tmp_path, "a.csv", f"text,other\n{long},\nb,c\n"))
    assert texts(found) == [(2, long), (3, "b")]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("text,label,text", "the header has `text` twice; rename one"),
        ('text,"label', "line 1, the header: the quotation mark opened on line 1 is never closed; close it"),
    ],
)
def test_broken_header(tmp_path: Path, header: str, problem: str) -> None:
    (finding,) = inspect_file(written(tmp_path, "a.csv", f"{header}\na,b,c\n")).findings
    assert finding.line is None
    assert finding.message.startswith(problem)


def test_the_csv_modules_limit_is_put_back_between_rows(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (contents,) = open_source(SourceConfig(path=str(written(tmp_path, "a.csv", "text,n\na,1\nb,2\n"))), None)
    rows = iter(contents.rows)
    assert next(rows) == (2, {"text": "a", "n": "1"})
    assert csv.field_size_limit() == limit


def test_excels_hint_of_the_delimiter(tmp_path: Path) -> None:
    for name in ("a.csv", "a", "a.txt"):
        assert said(inspect_file(written(tmp_path, name, "sep=;\r\ntext;label\r\na;b\r\n"))) == [
            f"{name}: line 1 is `sep=;`, which is meant for Excel; "
            "remove that line; the delimiter is recognised without it"
        ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"text": "a"}\r{"text": "b"}\r'), ("a.csv", "text,label\ra,b\rc,d\r"), ("a.csv", "text\ra\r")],
)
def test_the_line_ends_of_a_classic_mac(tmp_path: Path, name: str, content: str) -> None:
    assert said(inspect_file(written(tmp_path, name, content))) == [
        f"{name}: the lines end in a carriage return alone, as on a classic Mac; "
        "save it with line feeds, e.g. tr '\\r' '\\n' < OLD > NEW"
    ]
    assert texts(read_examples(written(tmp_path, "a.txt", "a\rb\r"))) == [(1, "a\rb\r")]
    (finding,) = inspect_file(SourceConfig(path=str(tmp_path / "a.txt"), sample_by="line")).findings
    assert finding.check == "line_ends"


def test_a_header_alone_is_no_data(tmp_path: Path) -> None:
    assert said(inspect_file(written(tmp_path, "a.csv", "text,label\n"))) == [
        "a.csv: the file holds no rows; expected rows to train on"
    ]


def test_conversations_may_stand_in_cells_as_json(tmp_path: Path) -> None:
    row = CHATS[0]["messages"]
    found = read_examples(written(tmp_path, "a.csv", cells([{"id": 1, "messages": json.dumps(row)}], ",")))
    (example,) = found.examples
    assert isinstance(example, Example)
    assert example.messages is not None
    assert [(m.role, m.content) for m in example.messages] == [(m["role"], m["content"]) for m in row]


# -- plain text -------------------------------------------------------------------------------------------------------

PLAIN = "One,\r\ntwo.\r\n\r\n \r\nThree: [x]\r\n"


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("document", [(1, "One,\ntwo.\n\n \nThree: [x]\n")]),
        ("paragraph", [(1, "One,\ntwo."), (5, "Three: [x]")]),
        ("line", [(1, "One,"), (2, "two."), (5, "Three: [x]")]),
    ],
)
def test_plain_text(tmp_path: Path, sample_by: Any, expected: list[tuple[int, str]]) -> None:
    path = written(tmp_path, "a.txt", b"\xef\xbb\xbf" + PLAIN.encode())
    found = read_examples(SourceConfig(path=str(path), sample_by=sample_by))
    assert (found.container, found.form, texts(found)) == ("plain text", "text", expected)


@pytest.mark.parametrize("text", ["[Enter HAMLET]\nWords", "{curly} text\nmore", "# Title\n\ntext", "a, b; c\nd", "{"])
def test_text_that_begins_like_something_else(tmp_path: Path, text: str) -> None:
    found = inspect_file(written(tmp_path, "a.md", text))
    assert found.container == "plain text"
    assert [e.text for e in found.examples if isinstance(e, Example)] == ([text] if text != "{" else [])


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a"])
@pytest.mark.parametrize("content", ['{"text": "a', '{"text": "a", "b": [', '{"text": \n"a'])
def test_a_cut_off_row_is_no_plain_text(tmp_path: Path, name: str, content: str) -> None:
    found = inspect_file(written(tmp_path, name, content))
    assert (found.container, found.examples) == ("JSON Lines", [])
    assert "not valid JSON" in found.findings[0].message


def test_a_bad_byte_in_plain_text_has_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", b"one\ntwo \xff\n\nthree\n")
    assert said(inspect_file(path)) == ["a.txt:2: not valid UTF-8: byte 0xff at offset 4 of the line"]
    found = inspect_file(SourceConfig(path=str(path), sample_by="paragraph"))
    assert said(found) == ["a.txt:2: not valid UTF-8: byte 0xff at offset 4 of the line"]
    assert texts(found) == [(4, "three")]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert said(inspect_file(tmp_path / "pipe")) == [
        "pipe: a pipe or device, not a file; data is read more than once: save it as a file"
    ]


# -- what is not read -------------------------------------------------------------------------------------------------


def arrow_with_a_wild_offset() -> bytes:
    """A stream that is well formed but for a text that ends behind its buffer."""
    offsets = pa.array([0, 5, 2], pa.int32()).buffers()[1]
    column = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"ab"))
    sink, table = pa.BufferOutputStream(), pa.Table.from_arrays([column], ["text"])
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def zip_of(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("text".encode("utf-16"), "this is UTF-16 text, not a file of rows; save it as UTF-8"),
        (zip_of("a.jsonl"), "this is a zip archive, not a file of rows; unpack it first"),
        (zip_of("xl/workbook.xml"), "this is an Excel workbook, not a file of rows; save its sheet as CSV"),
        (b"%PDF-1.7 ...", "this is a PDF file, not a file of rows; extract its text first"),
        (gzip.compress(zip_of("a")), "this is a zip archive, not a file of rows; unpack it first"),
        (b"PAR1\x15\x04\x15PAR1", "a damaged Parquet file: "),
        (b"ARROW1\0\0 and no more", "a damaged Arrow file: "),
        (parquet(ALPACA)[:-30], "a damaged Parquet file: "),
        (arrow(ALPACA, stream=True)[:300], "a damaged Arrow file: "),
        (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "a damaged gzip file: "),
        (b"\x1f\x8b\x08nonsense", "a damaged gzip file: "),
        (arrow_with_a_wild_offset(), "a damaged Arrow file: "),
        (b"some\0bytes", "a file of bytes, not of text: a NUL byte at offset 4; expected JSON Lines"),
        (gzip.compress(b""), "the file is empty; expected rows to train on"),
    ],
    ids=[  # archives hold the time they were made: their bytes are no name for a test
        "utf-16",
        "zip",
        "excel",
        "pdf",
        "zip-in-gzip",
        "parquet-without-footer",
        "arrow-without-schema",
        "parquet-cut",
        "arrow-cut",
        "gzip-cut",
        "gzip-header-only",
        "arrow-wild-offset",
        "nul-byte",
        "gzip-of-nothing",
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, problem: str) -> None:
    (finding,) = inspect_file(written(tmp_path, "a.dat", content)).findings
    assert (finding.line, finding.severity) == (None, "error")
    assert finding.message.startswith(problem)
    assert "\n" not in finding.message


def test_nulls_of_a_table_are_said_to_be_missing(tmp_path: Path) -> None:
    rows: Rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}, {"text": None, "n": None}]
    found = inspect_file(written(tmp_path, "a.parquet", parquet(rows)))
    assert said(found) == ["a.parquet:2: `text` is missing", "a.parquet:3: `text` is missing"]
    found = inspect_file(written(tmp_path, "a.parquet", parquet(rows[::-1])))
    assert [finding.found for finding in found.findings] == [
        "no known form: keys found: none (a null in a table is a missing key)",
        "no known form: keys found: `n` (a null in a table is a missing key)",
    ]


def test_labels_behind_a_null_are_not_lost(tmp_path: Path) -> None:
    rows: Rows = [{"text": text, "label": label} for text, label in (("a", None), ("b", "x"), ("c", "y"))]
    found = inspect_file(written(tmp_path, "a.parquet", parquet(rows)))
    assert [(finding.check, finding.line) for finding in found.findings] == [
        ("mixed_forms", None),
        ("form_mismatch", 2),
        ("form_mismatch", 3),
    ]
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}]
    found = inspect_file(written(tmp_path, "a.parquet", parquet(rows)))
    assert said(found) == [
        f"a.parquet:{line}: `label` is a number; expected a string or a whole number" for line in (1, 2)
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.parquet.gz"])
def test_sample_by_has_no_effect_on_tables(tmp_path: Path, name: str) -> None:
    content = arrow(ALPACA, stream=True) if "arrow" in name else parquet(ALPACA)
    path = written(tmp_path, name, gzip.compress(content) if "gz" in name else content)
    (finding,) = inspect_file(SourceConfig(path=str(path), sample_by="line")).findings
    what = "Arrow" if "arrow" in name else "Parquet"
    assert finding.message == f"data.sample_by has no effect on {what}; it is for plain text; remove it"
    (finding,) = inspect_file(SourceConfig(path="org/name", sample_by="line")).findings
    assert finding.message == "data.sample_by has no effect on a hub data set; it is for plain text; remove it"


def test_a_name_that_promises_a_table(tmp_path: Path) -> None:
    assert said(inspect_file(written(tmp_path, "a.parquet", "hello"))) == [
        "a.parquet: the name ends in .parquet, but the content does not begin as such a file does; write it again"
    ]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"split": "test"}, "data.split has no effect on a file; remove it, or name a hub data set"),
        ({"subset": "en"}, "data.subset has no effect on a file; remove it, or name a hub data set"),
        ({"streaming": True}, "data.streaming has no effect on a file; remove it, or name a hub data set"),
        ({"sample_by": "line"}, "data.sample_by has no effect on JSON Lines; it is for plain text; remove it"),
    ],
)
def test_settings_that_a_file_does_not_have(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ALPACA)
    (finding,) = inspect_file(SourceConfig(path=str(path), **settings)).findings
    assert finding.message == problem


# -- folders ----------------------------------------------------------------------------------------------------------


def text_rows(*found: str) -> Rows:
    return [{"text": text} for text in found]


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", text_rows("b1", "b2"))
    (tmp_path / "deep").mkdir()
    written(tmp_path / "deep", "a.parquet.gz", gzip.compress(parquet(text_rows("a1"))))
    written(tmp_path, "c.csv", "text,x\nc1,y\n")
    for other in ("README.txt", ".hidden.jsonl", "notes.md", "state.json"):
        written(tmp_path, other, "not data")
    found = read_examples(tmp_path)
    assert [(Path(e.file).name, e.line, e.text) for e in found.examples if isinstance(e, Example)] == [
        ("b.jsonl", 1, "b1"),
        ("b.jsonl", 2, "b2"),
        ("c.csv", 2, "c1"),
        ("a.parquet.gz", 1, "a1"),
    ]
    assert (found.container, found.rows, found.ignored) == ("JSON Lines, CSV, Parquet", 4, {"x": 1})
    assert (found.files, found.split) == (["b.jsonl", "c.csv", "deep/a.parquet.gz"], "")
    changed = found.sha256
    write_jsonl(tmp_path / "b.jsonl", text_rows("b1", "b3"))
    assert read_examples(tmp_path).sha256 != changed


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("x-training-00000-of-00001.jsonl", "x_eval.jsonl"),
        ("train/0.jsonl", "test/0.jsonl"),
        ("a/train/data.jsonl", "a/test/data.jsonl"),
    ],
)
def test_the_splits_of_a_folder(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, text in zip(names, ("train", "test"), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, text_rows(text))
    for split, text in ((None, "train"), ("train", "train"), ("test", "test")):
        found = read_examples(SourceConfig(path=str(tmp_path), split=split))
        assert (texts(found), found.split) == ([(1, text)], split or "train")
        assert found.files == [dict(zip(("train", "test"), names, strict=True))[text]]
    (finding,) = inspect_file(SourceConfig(path=str(tmp_path), split="validation")).findings
    assert finding.message == "no split `validation` in this folder; data.split can be `test`, `train`"


def test_files_of_a_folder_that_no_split_takes_are_not_left_out_in_silence(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        write_jsonl(tmp_path / name, text_rows("a"))
    (finding,) = inspect_file(tmp_path).findings
    assert finding.message == (
        "`more.jsonl`: no split in the name, unlike the other files; "
        "put train or validation or test into it, or move the file elsewhere"
    )


def test_files_that_are_no_data_are_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", text_rows("a"))
    (tmp_path / "sub").mkdir()
    for name in ("c.md", "part-00000", "_x.jsonl", "sub/d", "README.md", "LICENSE", ".gitattributes", "_SUCCESS"):
        write_jsonl(tmp_path / name, text_rows("b"))
    found = read_examples(tmp_path)
    assert texts(found) == [(1, "a")]
    assert [(finding.severity, finding.check, finding.found) for finding in found.findings] == [
        (
            "warning",
            "skipped_files",
            "files of this folder that are not read: `_x.jsonl`, `c.md`, `part-00000`, `sub/d`",
        )
    ]
    assert found.findings[0].fix == (
        "a file is read if its name ends in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .txt, also with .gz, "
        "and does not begin with _"
    )


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("d.jsonl.bz2", bz2.compress(b"x"), "a bzip2 archive"),
        ("d.zip", zip_of("a.jsonl"), "a zip archive"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd", "a zstd archive"),
    ],
)
def test_an_archive_in_a_folder_is_an_error(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", text_rows("a"))
    written(tmp_path, name, content)
    found = inspect_file(tmp_path)
    assert [(finding.severity, str(finding)) for finding in found.findings] == [
        ("error", f"{tmp_path}/{name}: this is {what}, not a file of rows; unpack it first")
    ]


def test_a_folder_without_train(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", text_rows("a"))
    assert texts(read_examples(tmp_path)) == [(1, "a")]
    write_jsonl(tmp_path / "dev.jsonl", text_rows("b"))
    (finding,) = inspect_file(tmp_path).findings
    assert finding.message == "no split `train` in this folder; data.split can be `test`, `validation`"


def test_folders_without_data_and_problems_in_several_files(tmp_path: Path) -> None:
    (finding,) = inspect_file(tmp_path).findings
    assert finding.message.startswith("no data files in this folder; expected .jsonl, ")
    write_jsonl(tmp_path / "a.jsonl", text_rows("ok", ""))
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a"}])
    found = inspect_file(tmp_path)
    assert [str(finding) for finding in found.findings] == [
        f"{tmp_path}: several forms: `text` (first on {tmp_path}/a.jsonl:1), `prompt` (first on {tmp_path}/b.jsonl:1); "
        "keep one form in a file, or name the one to read with data.format",
        f"{tmp_path}/a.jsonl:2: `text` is empty",
        f"{tmp_path}/b.jsonl:1: this row is of form `prompt`, but {tmp_path}/a.jsonl:1 is `text`; keep one form in a file",
    ]


def test_a_file_of_a_folder_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    for name, content in {
        "a.json": zip_of("x"),
        "b.csv": b"",
        "c.jsonl": b'{"text": ""}',
        "d.jsonl": b'{"text": "d"}',
    }.items():
        written(tmp_path, name, content)
    found = inspect_file(tmp_path)
    assert [str(finding) for finding in found.findings] == [
        f"{tmp_path}/a.json: this is a zip archive, not a file of rows; unpack it first",
        f"{tmp_path}/b.csv: the file is empty; expected rows to train on",
        f"{tmp_path}/c.jsonl:1: `text` is empty",
    ]
    assert (found.container, texts(found)) == ("JSON Lines", [(1, "d")])


def test_what_datasets_saved_to_disk_is_read(tmp_path: Path) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list(CHATS), "test": datasets.Dataset.from_list(CHATS[:2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    expected = read_examples(write_jsonl(tmp_path / "a.jsonl", CHATS))
    found = read_examples(tmp_path / "saved")
    assert found.container == "Arrow"
    assert [e.messages for e in found.examples if isinstance(e, Example)] == [
        e.messages for e in expected.examples if isinstance(e, Example)
    ]
    assert read_examples(SourceConfig(path=str(tmp_path / "saved"), split="test")).rows == 2


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` loads as it loads a data set of the hub, with its own cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", CHATS)
    write_jsonl(folder / "test.jsonl", CHATS[:2])
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_through_datasets(hub_folder: Path, streaming: bool) -> None:
    source = SourceConfig(path=str(hub_folder), streaming=streaming)
    assert list(hub_rows(source, 5)) == list(enumerate(CHATS, 1))
    assert len(list(hub_rows(source.model_copy(update={"split": "test"}), 5))) == 2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"split": "nope"}, "`datasets` cannot load it: Unknown split \"nope\". Should be one of ['train', 'test']"),
        ({"subset": "nope"}, "`datasets` cannot load it: BuilderConfig 'nope' not found. Available: ['default']"),
        ({"streaming": True}, "data.streaming reads a data set as far as data.max_rows, which is not set"),
    ],
)
def test_what_datasets_refuses_is_one_line(hub_folder: Path, settings: dict[str, Any], problem: str) -> None:
    from tunesmith.data.problems import FileProblem

    with pytest.raises(FileProblem) as caught:
        list(hub_rows(SourceConfig(path=str(hub_folder), **settings), None))
    assert caught.value.found == problem


def test_the_hub_is_asked_for_what_looks_like_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    unreachable = "no such file here, and the hub cannot be reached; check the path or the network"
    for path, problem in {
        "org/data-set": unreachable,
        "data/train": "no such file",
        "./org/name": "no such file",
        "train.jsonl": "no such file",
        "a/b/c": "no such file",
        "nul\0byte": "no such file",
        "dat/train.jsonl": "no such file",
        "dat/train.csv.gz": "no such file",
        "": "the path is empty; name a file, a folder or a hub data set",
    }.items():
        (finding,) = inspect_file(path if path else SourceConfig(path="")).findings
        assert (finding.line, finding.message) == (None, problem), path


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import httpx
    import huggingface_hub

    asked: list[str] = []

    def fail(self: Any, repo_id: str, **_: Any) -> None:
        asked.append(repo_id)
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets, "get_dataset_split_names", None)
    (finding,) = inspect_file("org/name").findings
    assert finding.message == "no such file here, and the hub cannot be reached; check the path or the network"
    assert asked == ["org/name"]


def test_a_hub_data_set_is_read_row_by_row(hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The local folder stands for `org/chats`: nothing but the lookup at the hub is replaced."""
    import datasets

    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, subset: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *rest, **more: load(str(hub_folder), *rest, **more))
    found = read_examples(SourceConfig(path="org/chats", streaming=True), max_rows=3)
    expected = read_examples(hub_folder / "train.jsonl", max_rows=3)
    assert (found.container, found.form, found.rows) == ("hub data set", "messages", 3)
    assert [(e.file, e.line, e.messages) for e in found.examples if isinstance(e, Example)] == [
        ("org/chats", e.line, e.messages) for e in expected.examples if isinstance(e, Example)
    ]
    assert found.sha256 == read_examples("org/chats", max_rows=3).sha256
    assert found.sha256 != read_examples("org/chats").sha256


def test_what_the_hub_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    answers = {
        "Dataset 'org/x' doesn't exist on the Hub or cannot be accessed.": (
            "no such file here, and no such data set at the hub; check the name; private data sets need `hf auth login`"
        ),
        "Dataset 'org/x' is a gated dataset on the Hub.": (
            "a gated data set of the hub; accept its terms on its page at the hub, then log in with `hf auth login`"
        ),
    }
    for answer, problem in answers.items():

        def refuse(*_: Any, answer: str = answer) -> None:
            raise datasets.exceptions.DatasetNotFoundError(answer)

        monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
        found = inspect_file("org/x")
        assert (found.container, [finding.message for finding in found.findings]) == ("hub data set", [problem])
