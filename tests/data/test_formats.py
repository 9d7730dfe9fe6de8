"""Files of examples: detection, what a row or a file can be, skipping bad rows, column mapping, the shared data."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tiny import write_jsonl
from tunesmith.config import SourceConfig
from tunesmith.data.formats import DataFile, inspect_file, read_examples
from tunesmith.errors import DataError
from tunesmith.files import sha256_file
from tunesmith.types import Example, Finding, Message, PreferenceExample

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def problems_of(source: Path | SourceConfig, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_examples(source, **options)
    assert caught.value.exit_code == 2
    return caught.value.problems


def read_rows(tmp_path: Path, *rows: Any) -> DataFile:
    return read_examples(write_jsonl(tmp_path / "a.jsonl", rows))


def conversations(found: DataFile) -> list[tuple[Message, ...] | None]:
    return [e.messages for e in found.examples if isinstance(e, Example)]


# -- the forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "form", "messages"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "messages", [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"messages": [USER, ASSISTANT, USER], "id": 7}, "messages", [("user", "q"), ("assistant", "a"), ("user", "q")]),
        ({"instruction": "q", "output": "a"}, "alpaca", [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": None, "output": "a"}, "alpaca", [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "x", "output": "a"}, "alpaca", [("user", "q\n\nx"), ("assistant", "a")]),
        (
            {"instruction": "q", "output": "a", "system": "s"},
            "alpaca",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        ({"prompt": "q ", "completion": " a"}, "prompt", [("user", "q "), ("assistant", " a")]),
        ({"text": " x\n", "meta": {"a": [1]}}, "text", None),
    ],
)  # fmt: skip
def test_form(tmp_path: Path, row: dict[str, Any], form: str, messages: list[tuple[str, str]] | None) -> None:
    found = read_rows(tmp_path, row, row)
    path = str(tmp_path / "a.jsonl")
    expected = tuple(Message(role, content) for role, content in messages) if messages else None  # type: ignore[arg-type]
    examples = [Example(expected, row.get("text"), path, line) for line in (1, 2)]
    ignored = {key: 2 for key in ("id", "meta") if key in row}
    assert found == DataFile(path, "JSON Lines", form, examples, 2, [], ignored, sha256_file(Path(path)))
    assert found.examples[1].where == f"{path}:2"


def test_lines_are_physical_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n\n \t\r\n{"text": "two"}')
    assert [(e.text, e.line) for e in read_examples(path).examples if isinstance(e, Example)] == [
        ("one", 2),
        ("two", 5),
    ]


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [e.text for e in read_examples(path).examples if isinstance(e, Example)] == [text]


def test_a_carriage_return_alone_is_white_space_not_the_end_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":\r"one"}\r\n{"text": "two"}\r\n')
    assert [(e.text, e.line) for e in read_examples(path).examples if isinstance(e, Example)] == [
        ("one", 1),
        ("two", 2),
    ]


@pytest.mark.parametrize(
    "text",
    ["👨\u200d👩\u200d👧\u200d👦 0", unicodedata.normalize("NFD", "한국어 é"), "ﬁ №", "  indented\n\ttab \r\n", "\u200b!x", "\\n"],
)  # fmt: skip
def test_text_is_kept_to_the_byte(tmp_path: Path, text: str) -> None:
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    (messages,) = conversations(read_rows(tmp_path, row))
    assert [message.content.encode() for message in messages or ()] == [text.encode()] * 2


@pytest.mark.parametrize("answer", ["🫨", "\ue000", "̈", "0", "."])
def test_a_short_answer_is_not_blank(tmp_path: Path, answer: str) -> None:
    # 🫨 came with Unicode 15: to an older Python it is an unassigned character, but it is an answer all the same.
    (messages,) = conversations(read_rows(tmp_path, {"prompt": "q", "completion": answer}))
    assert messages is not None
    assert messages[1].content == answer


# -- what is wrong with a row -----------------------------------------------------------------------------------------

FORMS = (
    "expected `messages`, `conversations`, `instruction`+`output`, `prompt`+`completion`, `question`+`answer`, "
    "`text`, `text`+`label` or `chosen`+`rejected`; name other columns with data.columns"
)
ROLES = "allowed: system, user, assistant, tool, developer; other names can be given a meaning with data.roles"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([1], "expected a JSON object, found a list"),
        ("text", "expected a JSON object, found a string"),
        (None, "expected a JSON object, found null"),
        (3, "expected a JSON object, found a number"),
        (True, "expected a JSON object, found a boolean"),
        ({}, f"no known form: keys found: none; {FORMS}"),
        ({"a": "q", "b": "a"}, f"no known form: keys found: `a`, `b`; {FORMS}"),
        ({"a\nb\ud800": 1}, f"no known form: keys found: `a\\nb\\ud800`; {FORMS}"),
        ({"instruction": "q"}, "`instruction` has no answer beside it, so there is nothing to learn (keys found: `instruction`); if a column holds the answer, name it with data.columns, e.g. {output: reply}"),
        ({"instruction": "q", "context": "", "response": "a"}, "`instruction` has no answer beside it, so there is nothing to learn (keys found: `instruction`, `context`, `response`); if a column holds the answer, name it with data.columns, e.g. {output: reply}"),
        ({"input": "q", "output": "a"}, "`instruction` is missing (keys found: `input`, `output`); if a column holds it, name it with data.columns, e.g. {instruction: ask}"),
        ({"text": "a\0b"}, "`text` holds a NUL character (\\u0000); remove it"),
        ({"instruction": "q", "output": 5}, "`output` is a number; expected a string"),
        ({"instruction": "q", "output": None}, "`output` is null; expected a string"),
        ({"instruction": "q", "output": "a", "input": ["x"]}, "`input` is a list; expected a string"),
        ({"instruction": "q", "output": ""}, "`output` is empty"),
        ({"instruction": "q", "output": " \n"}, "`output` is blank"),
        ({"instruction": "q", "output": "\u200b\ufeff\u200d"}, "`output` is blank"),
        ({"completion": "a"}, "`prompt` is missing"),
        ({"prompt": "q", "id": 1}, "`prompt` has no answer beside it, so there is nothing to learn (keys found: `prompt`, `id`); if a column holds the answer, name it with data.columns, e.g. {completion: reply}"),
        ({"question": "q"}, "`question` has no answer beside it, so there is nothing to learn (keys found: `question`); if a column holds the answer, name it with data.columns, e.g. {answer: reply}"),
        ({"prompt": "?", "completion": "!"}, "the row holds no letter and no digit; remove it, or mend its text"),
        ({"text": "... \u3002 👍"}, "the row holds no letter and no digit; remove it, or mend its text"),
        ({"prompt": {}, "completion": "a"}, "`prompt` is an object; expected a string"),
        ({"text": True}, "`text` is a boolean; expected a string"),
        ({"text": "a\ud800"}, "`text` holds a lone surrogate (\\ud800-\\udfff); it is not text"),
        ({"messages": "hi"}, "`messages` is a string; expected a list of {role, content}"),
        ({"messages": []}, "`messages` holds no assistant turn: there is nothing to learn from this row"),
        ({"messages": ["hi"]}, "`messages[0]` is a string; expected {role, content}"),
        ({"messages": [{"content": "x"}]}, "`messages[0].role` is missing"),
        ({"messages": [USER, {"role": "assistant"}]}, "`messages[1].content` is missing"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "`messages[1].content` is null; expected a string"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, f"`messages[1].role` is 'bot'; {ROLES}"),
        ({"messages": [USER, {"role": "Assistant", "content": "x"}]}, f"`messages[1].role` is 'Assistant'; {ROLES}"),
        ({"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "`messages[1]` is a system message; only one is allowed, at the start"),
        ({"messages": [USER, ASSISTANT, SYSTEM, USER]}, "`messages[2]` is a system message; only one is allowed, at the start"),
        ({"messages": [USER, USER, ASSISTANT]}, "`messages[1]`: two user turns in a row; expected assistant"),
        ({"messages": [SYSTEM, USER, ASSISTANT, ASSISTANT]}, "`messages[3]`: two assistant turns in a row; expected user"),
        ({"messages": [ASSISTANT, USER]}, "`messages[0]`: the conversation starts with assistant; expected user"),
        ({"messages": [SYSTEM, ASSISTANT]}, "`messages[1]`: the conversation starts with assistant; expected user"),
        ({"messages": [SYSTEM, USER]}, "`messages` holds no assistant turn: there is nothing to learn from this row"),
    ],
)  # fmt: skip
def test_wrong_row(tmp_path: Path, row: Any, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert problems_of(path) == [f"{path}:1: {problem}"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "x"', "not valid JSON: expecting ',' delimiter at column 13; the row looks cut off"),
        (b"{'text': 'x'}", "not valid JSON: expecting property name enclosed in double quotes at column 2"),
        (b'{"text": "x"} {"text": "y"}', "not valid JSON: extra data at column 15"),
        (b'{"text": "a\tb"}', "not valid JSON: invalid control character at column 12"),
        (b'{"text": "x", "text": "y"}', "the key `text` stands twice in one object"),
        (b'{"text": "x", "m": {"\\n": 1, "\\n": 2}}', "the key `\\n` stands twice in one object"),
        (b'{"text": "caf\xe9"}', "not valid UTF-8: byte 0xe9 at offset 13 of the line"),
        (b'{"text": "\xed\xa0\x80"}', "not valid UTF-8: byte 0xed at offset 10 of the line"),
        (b'{"text": "a\x00"}', "a NUL byte at offset 11 of the line; it is not legal in JSON"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply to be a row of training data"),
    ],
)  # fmt: skip
def test_wrong_line(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    assert problems_of(path) == [f"{path}:2: {problem}"]


def test_a_number_too_long_for_python(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x", "n": ' + b"1" * 5000 + b"}\n")
    problem = "a whole number of more than 4300 digits; write it as a string, or remove it"
    assert problems_of(path) == [f"{path}:1: {problem}"]
    path.write_bytes(b'[{"text": "x", "n": ' + b"1" * 5000 + b"}\n]")
    assert problems_of(path)[0] == f"{path}:1: {problem}"


ONE_FORM = "keep one form in a file, or name the one to read with data.format"


def test_all_problems_come_at_once_and_no_row_is_lost_in_silence(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"text": "ok"}, {"text": ""}, {"text": "ok"}, {"prompt": "q", "completion": "a"}, {"text": 1}],
    )
    assert problems_of(path) == [
        f"{path}: several forms: `text` (first on line 1), `prompt` (first on line 4); {ONE_FORM}",
        f"{path}:2: `text` is empty",
        f"{path}:4: this row is of form `prompt`, but line 1 is `text`; keep one form in a file",
        f"{path}:5: `text` is a number; expected a string",
    ]


def test_a_wrong_first_row_still_decides_the_form(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"prompt": "q", "completion": "a"}])
    assert problems_of(path) == [
        f"{path}: several forms: `text` (first on line 1), `prompt` (first on line 2); {ONE_FORM}",
        f"{path}:1: `text` is empty",
        f"{path}:2: this row is of form `prompt`, but line 1 is `text`; keep one form in a file",
    ]


def test_many_problems_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 45)
    assert problems_of(path) == [f"{path}:{line}: `text` is empty" for line in range(1, 46)]
    with pytest.raises(DataError) as caught:
        read_examples(path)
    shown = str(caught.value).splitlines()
    assert shown[:20] == [f"{path}:{line}: `text` is empty" for line in range(1, 21)]
    assert shown[20:] == ["and 25 more rows with problems"]


# -- what is wrong with a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty; expected one JSON object a line"),
        (b"\n \n\t\r\n", "the file is empty; expected one JSON object a line"),
        (b"\xef\xbb\xbf", "the file is empty; expected one JSON object a line"),
        (b"\xef\xbb\xbf\n\n", "the file is empty; expected one JSON object a line"),
    ],
)
def test_wrong_file(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert problems_of(path) == [f"{path}: {problem}"]


def test_missing_file_and_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    long = tmp_path / ("x" * 300)
    assert problems_of(tmp_path / "no.jsonl") == [f"{tmp_path}/no.jsonl: no such file"]
    assert problems_of(tmp_path / "file" / "a") == [f"{tmp_path}/file/a: cannot be read (Not a directory)"]
    assert problems_of(long) == [f"{long}: cannot be read (File name too long)"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert [e.text for e in read_examples(path).examples if isinstance(e, Example)] == ["x"]


# -- inspecting and skipping ------------------------------------------------------------------------------------------


def test_inspecting_raises_nothing_and_keeps_what_is_good(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ok"}, {"text": 5}, {"text": "fine"}, [1]])
    found = inspect_file(path)
    assert [(e.line, e.text) for e in found.examples if isinstance(e, Example)] == [(1, "ok"), (3, "fine")]
    assert found.rows == 4
    assert found.findings == [
        Finding("wrong_type", "error", str(path), 2, "`text` is a number", "expected a string", "text"),
        Finding("not_an_object", "error", str(path), 4, "expected a JSON object, found a list"),
    ]
    assert inspect_file(tmp_path / "none").findings == [
        Finding("no_such_file", "error", f"{tmp_path}/none", None, "no such file")
    ]


def test_bad_rows_are_skipped_when_asked(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "ok"}, {"text": 5}, {"prompt": "q", "completion": "a"}, {"text": "fine"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert len(problems_of(path)) == 3
    found = read_examples(path, skip_bad_rows=True)
    assert [(e.line, e.text) for e in found.examples if isinstance(e, Example)] == [(1, "ok"), (4, "fine")]
    assert [(finding.check, finding.line) for finding in found.findings] == [
        ("mixed_forms", None),
        ("wrong_type", 2),
        ("form_mismatch", 3),
    ]


def test_skipping_needs_a_good_row_and_a_whole_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": 5}, {"text": ""}])
    assert problems_of(path, skip_bad_rows=True) == [
        f"{path}:1: `text` is a number; expected a string",
        f"{path}:2: `text` is empty",
    ]
    assert problems_of(tmp_path / "none", skip_bad_rows=True) == [f"{tmp_path}/none: no such file"]
    source = SourceConfig(path=str(write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}])), columns={"system": "sys"})
    assert problems_of(source, skip_bad_rows=True) == [
        f"{tmp_path}/b.jsonl: data.columns maps `system` to `sys`, but no row has that column; columns found: `text`"
    ]


def test_a_named_format_reads_its_rows_and_no_others(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x", "prompt": "p"}, {"text": "b", "messages": [USER, ASSISTANT]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = read_examples(SourceConfig(path=str(path), format="text"))
    assert (found.form, [e.text for e in found.examples if isinstance(e, Example)]) == ("text", ["a", "b"])
    assert found.ignored == {"label": 1, "prompt": 1, "messages": 1}
    found = inspect_file(SourceConfig(path=str(path), format="alpaca"))
    assert [finding.found for finding in found.findings] == [
        f"`instruction` is missing (keys found: {keys})" for keys in ("`text`, `label`, `prompt`", "`text`, `messages`")
    ]


KTO_ROWS = [
    {"messages": [USER, ASSISTANT]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "completion": "a"},
    {"instruction": "q", "output": "a"},
    {"question": "q", "answer": "a"},
]


@pytest.mark.parametrize(
    ("with_it", "without", "lacks"),
    [
        ({"text": "b", "label": "x"}, {"text": "a"}, "`label` is missing"),
        ({"text": "b", "label": "x"}, {"text": "a", "label": None}, "`label` is null; expected a string or a whole number"),
        ({"question": "q", "choices": ["x", "y"], "answer": 0}, {"question": "q", "answer": "x"}, "`choices` is missing"),
        *(({**row, "label": False}, row, "`label` is missing; expected true or false") for row in KTO_ROWS),
    ],
)  # fmt: skip
def test_a_column_that_only_some_rows_have(
    tmp_path: Path, with_it: dict[str, Any], without: dict[str, Any], lacks: str
) -> None:
    """Whichever row comes first: the label (or the choices) must not be lost."""
    path = write_jsonl(tmp_path / "a.jsonl", [with_it, without])
    assert problems_of(path) == [f"{path}:2: {lacks}"]
    path = write_jsonl(tmp_path / "b.jsonl", [without, with_it])
    forms = [inspect_file(write_jsonl(tmp_path / "c.jsonl", [row])).form for row in (without, with_it)]
    assert problems_of(path)[1:] == [
        f"{path}:2: this row is of form `{forms[1]}`, but line 1 is `{forms[0]}`; keep one form in a file"
    ]


def test_bad_answers_of_kto_rows_are_never_learnt_as_good_ones(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "a", "label": True}, {"instruction": "q", "output": "b", "label": False}]
    found = read_rows(tmp_path, *rows)
    assert (found.form, [e.desirable for e in found.examples if isinstance(e, Example)]) == ("kto", [True, False])
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    named = problems_of(SourceConfig(path=str(path), format="alpaca"))
    assert named[0] == f"{path}:1: `label` is a boolean; expected a string or a whole number"


def test_unread_keys_of_turns_are_ignored_with_a_count(tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": "bad answer", "weigth": 0, "id": "x"}
    found = read_rows(tmp_path, {"messages": [USER, turn, USER, turn]}, {"messages": [USER, ASSISTANT], "x": 1})
    assert found.ignored == {"x": 1, "messages[].weigth": 1}


# -- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "row", "form", "messages"),
    [
        ({"instruction": "ask", "output": "reply"}, {"ask": "q", "reply": "a", "prompt": "x"}, "alpaca", ["q", "a"]),
        ({"instruction": "output", "output": "instruction"}, {"output": "q", "instruction": "a"}, "alpaca", ["q", "a"]),
        ({"prompt": "p", "completion": "c"}, {"p": "q", "c": "a", "messages": "no"}, "prompt", ["q", "a"]),
        ({"completion": "c"}, {"prompt": "q", "c": "a"}, "prompt", ["q", "a"]),
        ({"answer": "best"}, {"question": "q", "best": "a", "answer": 5}, "qa", ["q", "a"]),
        ({"prompt": "instruction", "query": "input", "response": "output"}, {"instruction": "q", "input": "i", "output": "a"}, "alpaca", ["q\n\ni", "a"]),
        ({"prompt": "input", "response": "output", "system": "sys"}, {"input": "q", "output": "a", "sys": "s"}, "alpaca", ["s", "q", "a"]),
        ({"prompt": "prompt", "response": "text"}, {"prompt": "q", "text": "a"}, "alpaca", ["q", "a"]),
        ({"question": "q", "response": "r"}, {"q": "q", "r": "a"}, "qa", ["q", "a"]),
        ({"prompt": "prompt", "response": "completion", "kto_tag": "label"}, {"prompt": "q", "completion": "a", "label": False}, "kto", ["q", "a"]),
        ({"messages": "completion", "kto_tag": "ok"}, {"completion": [USER, ASSISTANT], "ok": True}, "kto", ["q", "a"]),
        ({"field_instruction": "a", "field_input": "b", "field_output": "c", "field_system": "d"}, {"a": "q", "b": "i", "c": "a", "d": "s"}, "alpaca", ["s", "q\n\ni", "a"]),
        ({"field_messages": "talk", "message_field_role": "who", "message_field_content": "what"}, {"talk": [{"who": "user", "what": "q"}, {"who": "assistant", "what": "a"}]}, "messages", ["q", "a"]),
        ({"messages": "talk", "role_tag": "speaker", "content_tag": "words", "user_tag": "customer", "assistant_tag": "agent", "system_tag": "boss"}, {"talk": [{"speaker": "boss", "words": "s"}, {"speaker": "customer", "words": "q"}, {"speaker": "agent", "words": "a"}]}, "messages", ["s", "q", "a"]),
        ({"text": "premise", "label": "relation"}, {"premise": "q", "relation": "a", "text": 1}, "classification", ["q", "a"]),
    ],
)  # fmt: skip
def test_mapped_columns(
    tmp_path: Path, columns: dict[str, str], row: dict[str, Any], form: str, messages: list[str]
) -> None:
    found = read_examples(SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl", [row])), columns=columns))
    (example,) = found.examples
    assert isinstance(example, Example)
    assert (found.form, [m.content for m in example.messages or ()]) == (form, messages)


@pytest.mark.parametrize("columns", [{"prompt": "content"}, {"field": "content"}, {"text": "content"}])
def test_mapped_plain_text(tmp_path: Path, columns: dict[str, str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "words", "text": 5, "url": "u"}])
    found = read_examples(SourceConfig(path=str(path), columns=columns))
    assert found.examples == [Example(None, "words", str(path), 1)]
    assert found.ignored == {"text": 1, "url": 1}


@pytest.mark.parametrize("row", [{"messages": [USER, ASSISTANT]}, {"prompt": "q", "completion": "a"}])
def test_a_mapped_kto_label_has_to_be_one(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row | {"rating": "good"}])
    assert problems_of(SourceConfig(path=str(path), columns={"kto_tag": "rating"})) == [
        f"{path}:1: `rating` is a string; expected true (a good answer) or false (a bad one)"
    ]


def test_a_prompt_mapped_to_itself_is_no_plain_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "label": "safe"}])
    (problem,) = problems_of(SourceConfig(path=str(path), columns={"prompt": "prompt"}))
    assert "`prompt` has no answer beside it" in problem


def test_mapped_preference(tmp_path: Path) -> None:
    row = {"question": "q", "instruction": "other", "good": "a", "bad": "b", "system": "s"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "system": "system"}
    found = read_examples(SourceConfig(path=str(path), columns=columns))
    prompt = (Message("system", "s"), Message("user", "q"))
    answers = (Message("assistant", "a"),), (Message("assistant", "b"),)
    assert found.examples == [PreferenceExample(prompt, *answers, str(path), 1)]


def test_named_roles(tmp_path: Path) -> None:
    turns = [{"role": "customer", "content": "q"}, {"role": "agent", "content": "a"}]
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]))
    source = SourceConfig(path=path, roles={"customer": "user", "agent": "assistant"})
    assert conversations(read_examples(source)) == [(Message("user", "q"), Message("assistant", "a"))]
    wrong = SourceConfig(path=path, roles={"customer": "human"})
    assert problems_of(wrong) == [
        f"{path}: data.roles maps `customer` to `human`; allowed: system, user, assistant, tool"
    ]


def test_roles_that_no_turn_has_are_a_warning(tmp_path: Path) -> None:
    turns = [{"role": "customer", "content": "q"}, ASSISTANT]
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]))
    found = read_examples(SourceConfig(path=path, roles={"customer": "user", "agnet": "assistant"}))
    assert [(finding.severity, str(finding)) for finding in found.findings] == [
        ("warning", f"{path}: data.roles names `agnet`, which no turn has; role names found: `assistant`, `customer`")
    ]
    cut = read_examples(SourceConfig(path=path, roles={"customer": "user", "agnet": "assistant"}), max_rows=1)
    assert cut.findings == [], "the rows behind may have it"


@pytest.mark.parametrize(
    "row", [{"instruction": "q", "output": "a"}, {"text": "x"}, {"prompt": "q", "completion": "a"}]
)
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"roles": {"x": "user"}}, "`data.roles`"),
        ({"columns": {"role_tag": "x"}}, "`data.columns.role_tag`"),
        ({"roles": {"x": "user"}, "columns": {"user_tag": "y", "content_tag": "z"}}, "`data.roles`, `data.columns.user_tag`, `data.columns.content_tag`"),
    ],
)  # fmt: skip
def test_settings_of_turns_where_no_row_has_turns(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], names: str
) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [row]))
    form = inspect_file(path).form
    assert problems_of(SourceConfig(path=path, **settings)) == [
        f"{path}: no effect of {names}: no row holds a list of turns (their form is `{form}`); remove it"
    ]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"columns": {"instruction": "ask", "field_instruction": "reply"}}, "data.columns names `instruction` twice: `instruction` is `ask`, `field_instruction` is `reply`; keep one of them"),
        ({"columns": {"query": "a", "input": "b"}}, "data.columns names `input` twice: `query` is `a`, `input` is `b`; keep one of them"),
        ({"columns": {"role_tag": "a", "message_field_role": "b"}}, "data.columns names `role` twice: `role_tag` is `a`, `message_field_role` is `b`; keep one of them"),
        ({"columns": {"instruction": "ask", "output": "ask"}}, "data.columns gives the column `ask` to `instruction`, `output`; a column holds one field"),
        ({"columns": {"role_tag": "x", "content_tag": "x"}}, "data.columns gives the column `x` to `role`, `content`; a column holds one field"),
        ({"columns": {"user_tag": "x", "assistant_tag": "x"}}, "the role name `x` is given two meanings: user and assistant; keep one in data.roles and data.columns"),
        ({"columns": {"user_tag": "x"}, "roles": {"x": "assistant"}}, "the role name `x` is given two meanings: user and assistant; keep one in data.roles and data.columns"),
    ],
)  # fmt: skip
def test_mappings_that_contradict(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"ask": "q", "reply": "a"}]))
    assert problems_of(SourceConfig(path=path, **settings)) == [f"{path}: {problem}"]


def test_a_mapping_said_twice_alike_is_one(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"ask": "q", "output": "a"}]))
    columns = {"instruction": "ask", "field_instruction": "ask"}
    assert read_examples(SourceConfig(path=path, columns=columns)).form == "alpaca"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"instrucion": "x"}, "data.columns has no field `instrucion`; did you mean `instruction`?"),
        ({"field_message": "x"}, "data.columns has no field `field_message`; did you mean `field_messages`?"),
        ({"images": "images"}, "data.columns names `images`; only text can be trained on"),
        ({"output": "reply"}, "data.columns maps `output` to `reply`, but no row has that column; columns found: `instruction`, `output`, `id`"),
        ({"history": "id", "answer": "output"}, "data.columns names `answer`, which is not read from rows of form `alpaca`; remove it, or set another data.format; this form has `instruction`, `input`, `output`, `history`, `label`, `system`, `tools`"),
    ],
)  # fmt: skip
def test_wrong_mapping(tmp_path: Path, columns: dict[str, str], problem: str) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a", "id": [["q", "a"]]}] * 3))
    found = inspect_file(SourceConfig(path=path, columns=columns, format="alpaca"))
    whole = [finding for finding in found.findings if finding.line is None]
    assert [finding.message for finding in whole] == [problem]


def test_a_mapped_column_that_is_missing_is_said_once(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": "r", "id": 1}]))
    assert problems_of(SourceConfig(path=path, columns={"completion": "reply"})) == [
        f"{path}: data.columns maps `completion` to `reply`, but no row has that column; columns found: `prompt`, `id`"
    ]


# -- the shared data --------------------------------------------------------------------------------------------------

SHARED = {
    "banking77/ten_class_test_chat.jsonl": ("messages", 400),
    "banking77/ten_class_train_chat.jsonl": ("messages", 1342),
    "banking77/test.jsonl": ("classification", 3080),
    "banking77/train.jsonl": ("classification", 10003),
    "banking77/train_10shot_chat.jsonl": ("messages", 770),
    "banking77/train_longtail.jsonl": ("classification", 1794),
    "chat/fastchat_identity_sharegpt.jsonl": ("sharegpt", 500),
    "chat/openassistant_seed_messages.jsonl": ("messages", 154),
    "chat/sgd_dev_messages.jsonl": ("messages", 150),
    "chat/sgd_train_messages.jsonl": ("messages", 480),
    "domain_text/hf_course_en.jsonl": ("text", 89),
    "domain_text/hf_course_ko.jsonl": ("text", 25),
    "domain_text/tinyshakespeare.txt": ("text", 1),
    "domain_text/wiki_demo_300k.txt": ("text", 1),
    "gsm8k/train.jsonl": ("qa", 2500),
    "instruct/dolly_hhrlhf_1k.jsonl": ("alpaca", 1000),
    "instruct/gpteacher_roleplay.jsonl": ("alpaca", 1200),
    "instruct/gpteacher_toolformer.jsonl": ("alpaca", 1000),
    "instruct/self_instruct_seed.jsonl": ("alpaca", 175),
    "instruct_ko/hrc_counsel_source.jsonl": ("alpaca", 149),
    "instruct_ko/hrc_sft.jsonl": ("alpaca", 1242),
    "instruct_ko/songys_chatbot.jsonl": ("alpaca", 4000),
    "knowledge/arc_easy_a.jsonl": ("multiple_choice", 1200),
    "knowledge/commonsense_qa_val.jsonl": ("multiple_choice", 1221),
    "knowledge/copa.jsonl": ("multiple_choice", 100),
    "knowledge/mmlu_dev.jsonl": ("multiple_choice", 285),
    "knowledge/mmlu_test_a.jsonl": ("multiple_choice", 855),
    "knowledge/openbookqa.jsonl": ("multiple_choice", 500),
    "knowledge/svamp.jsonl": ("qa", 300),
    "knowledge_ko/belebele_ko_a.jsonl": ("multiple_choice", 440),
    "llamafactory/c4_demo.jsonl": ("text", 300),
    "llamafactory/dpo_en_demo.jsonl": ("preference", 300),
    "llamafactory/glaive_toolcall_en_demo.jsonl": ("sharegpt", 300),
    "llamafactory/identity.jsonl": ("alpaca", 91),
    "llamafactory/kto_en_demo.jsonl": ("kto", 300),
    "nlupp/banking.jsonl": ("text", 2071),
    "preference/hh_harmless_test_a.jsonl": ("preference", 1150),
    "preference/hrc_ko_dpo.jsonl": ("preference", 621),
}
"""Files that load as they are: their form and rows."""

NEED_COLUMNS: dict[str, tuple[str, dict[str, str], str, int]] = {
    "knowledge/truthfulqa_a.jsonl": ("`question` has no answer beside it", {"answer": "best_answer"}, "qa", 409),
    "knowledge_ko/klue_nli_dev_a.jsonl": ("no known form: keys found: `id`, `premise`", {"instruction": "premise", "input": "hypothesis", "output": "label"}, "alpaca", 1539),
    "safety/advbench_a.jsonl": ("`prompt` has no answer beside it", {"text": "prompt"}, "text", 260),
    "safety/square_ko_sensitive_questions.jsonl": ("`prompt` has no answer beside it", {"completion": "category"}, "prompt", 147),
    "safety/xstest_a.jsonl": ("`prompt` has no answer beside it", {"text": "prompt", "label": "label"}, "classification", 225),
    "knowledge/ifeval_a.jsonl": ("`prompt` has no answer beside it", {"text": "prompt"}, "text", 271),
    "banking77/labels.jsonl": ("no known form: keys found: `label`, `n_train`", {"text": "label"}, "text", 77),
}  # fmt: skip
"""Files that are prompts or tables: what is said of them, and columns with which they load."""


def test_every_shared_file_is_in_the_tables(shared_data: Path) -> None:
    files = {
        str(path.relative_to(shared_data)) for path in shared_data.glob("*/*") if path.suffix in (".jsonl", ".txt")
    }
    files = {name for name in files if not name.startswith(("LICENSES/", "malformed/"))}
    assert files == {*SHARED, *NEED_COLUMNS}


@pytest.mark.parametrize("name", SHARED)
def test_shared_file_loads(shared_data: Path, name: str) -> None:
    path = shared_data / name
    found = read_examples(path)
    container = "plain text" if name.endswith(".txt") else "JSON Lines"
    assert (found.container, found.form, found.rows) == (container, *SHARED[name])
    assert found.findings == []
    assert len(found.examples) == found.rows
    kind = PreferenceExample if found.form == "preference" else Example
    assert all(type(e) is kind and e.file == str(path) for e in found.examples)


@pytest.mark.parametrize("name", NEED_COLUMNS)
def test_shared_file_needs_columns(shared_data: Path, name: str) -> None:
    said, columns, form, rows = NEED_COLUMNS[name]
    problems = problems_of(shared_data / name)
    assert len(problems) == rows
    assert all(f": {said}" in problem for problem in problems)
    found = read_examples(SourceConfig(path=str(shared_data / name), columns=columns))
    assert (found.form, found.rows, len(found.examples)) == (form, rows, rows)


def test_shared_rows_say_what_the_file_says(shared_data: Path) -> None:
    """One row of each form, against the row as JSON has it."""

    def row(name: str, number: int) -> tuple[Any, Any]:
        lines = (shared_data / name).read_text(encoding="utf-8").split("\n")
        return json.loads(lines[number]), read_examples(shared_data / name, max_rows=number + 1).examples[number]

    raw, e = row("llamafactory/glaive_toolcall_en_demo.jsonl", 0)
    assert [m.role for m in e.messages] == [
        {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}[turn["from"]]
        for turn in raw["conversations"]
    ]
    call = next(m for m in e.messages if m.tool_calls).tool_calls[0]
    assert (call.name, call.arguments) == ("search_recipes", {"ingredients": ["chicken", "bell peppers", "rice"]})
    assert [tool["function"] for tool in e.tools] == json.loads(raw["tools"])
    raw, e = row("knowledge_ko/belebele_ko_a.jsonl", 3)
    assert e.messages[0].content.startswith(f"{raw['passage']}\n\n{raw['question']}\n\nA. {raw['choices'][0]}\nB. ")
    assert e.messages[1].content == "ABCD"[raw["answer"]]
    raw, e = row("banking77/train.jsonl", 5)
    assert (e.messages[0].content, e.messages[1].content, e.label) == (raw["text"], raw["label"], raw["label"])
    raw, e = row("instruct_ko/songys_chatbot.jsonl", 7)
    assert (e.messages[1].content, e.label) == (raw["output"], str(raw["label"]))
    raw, e = row("llamafactory/kto_en_demo.jsonl", 9)
    assert (e.messages[1].content, e.desirable) == (raw["messages"][1]["content"], raw["label"])
    raw, e = row("preference/hh_harmless_test_a.jsonl", 2)
    assert [m.content for m in e.prompt] == [m["content"] for m in raw["prompt"]]
    assert [m.content for m in (*e.chosen, *e.rejected)] == [raw["chosen"][0]["content"], raw["rejected"][0]["content"]]


# -- LLaMA-Factory's registry -----------------------------------------------------------------------------------------


def rows_for(entry: dict[str, Any]) -> dict[str, Any]:
    """A row as LLaMA-Factory would expect it of a data set with this entry."""
    alpaca = entry.get("formatting", "alpaca") == "alpaca"
    default = {"prompt": "instruction", "response": "output"} if alpaca else {"messages": "conversations"}
    columns: dict[str, str] = entry.get("columns", default)
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"} | entry.get(
        "tags", {}
    )

    def turn(who: str, text: str) -> dict[str, str]:
        return {tags["role_tag"]: tags[f"{who}_tag"], tags["content_tag"]: text}

    if entry.get("ranking"):
        chosen, rejected = ("a", "b") if alpaca else (turn("assistant", "a"), turn("assistant", "b"))
        columns = {"chosen": "chosen", "rejected": "rejected", **columns}
    else:
        chosen = rejected = None
    talk = [turn("user", "q"), *([] if chosen else [turn("assistant", "a")])]
    values = {"prompt": "q", "response": "a", "messages": talk, "tools": "[]", "system": "s", "chosen": chosen,
              "rejected": rejected, "kto_tag": True}  # fmt: skip
    return {
        column: values.get(key) for key, column in columns.items() if not (entry.get("ranking") and key == "response")
    }


def test_every_text_entry_of_llama_factorys_registry_is_understood(shared_data: Path, tmp_path: Path) -> None:
    registry = json.loads((shared_data / "llamafactory" / "dataset_info.json").read_text())
    seen: dict[str, int] = {}
    for name, entry in registry.items():
        columns = {**entry.get("columns", {}), **entry.get("tags", {})}
        path = str(write_jsonl(tmp_path / "a.jsonl", [rows_for(entry) | {"id": 1}]))
        if {"images", "videos", "audios"} & columns.keys():
            assert "only text can be trained on" in problems_of(SourceConfig(path=path, columns=columns))[0]
            continue
        found = read_examples(SourceConfig(path=path, columns=columns))
        (example,) = found.examples
        system = (Message("system", "s"),) if "system" in columns else ()
        question, good, bad = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")
        if entry.get("ranking"):
            assert example == PreferenceExample((*system, question), (good,), (bad,), path, 1), name
        elif set(columns) == {"prompt"}:
            assert example == Example(None, "q", path, 1), name
        else:
            desirable = True if "kto_tag" in columns else None
            assert example == Example((*system, question, good), None, path, 1, desirable=desirable), name
        seen[found.form] = seen.get(found.form, 0) + 1
    assert seen.keys() == {"alpaca", "sharegpt", "messages", "text", "preference", "kto"}
    assert sum(seen.values()) > 80
