"""Files of examples: the four forms, and every way in which a row or a file can be wrong."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tiny import chat_rows, write_jsonl
from tunesmith.data.formats import DataFile, read_examples
from tunesmith.errors import DataError
from tunesmith.types import Example, Message

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def problems_of(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert caught.value.exit_code == 2
    return caught.value.problems


def problem_of_row(tmp_path: Path, row: Any) -> str:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:1: ")
    return problem.removeprefix(f"{path}:1: ")


def read_rows(tmp_path: Path, *rows: Any) -> DataFile:
    return read_examples(write_jsonl(tmp_path / "a.jsonl", rows))


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
    assert found == DataFile(path, form, [Example(expected, row.get("text"), path, line) for line in (1, 2)])
    assert found.examples[1].where == f"{path}:2"


def test_lines_are_physical_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n\n \t\r\n{"text": "two"}')
    assert [(e.text, e.line) for e in read_examples(path).examples] == [("one", 2), ("two", 5)]


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_examples(path).examples[0].text == text


def test_a_carriage_return_alone_is_white_space_not_the_end_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":\r"one"}\r\n{"text": "two"}\r\n')
    assert [(e.text, e.line) for e in read_examples(path).examples] == [("one", 1), ("two", 2)]


@pytest.mark.parametrize(
    "text",
    ["👨\u200d👩\u200d👧\u200d👦", unicodedata.normalize("NFD", "한국어 é"), "ﬁ №", "  indented\n\ttab \r\n", "\u200b!", "\\n"],
)  # fmt: skip
def test_text_is_kept_to_the_byte(tmp_path: Path, text: str) -> None:
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    (found,) = read_rows(tmp_path, row).examples
    assert [message.content.encode() for message in found.messages or ()] == [text.encode()] * 2


@pytest.mark.parametrize("answer", ["🫨", "\ue000", "̈", "0", "."])
def test_a_short_answer_is_not_blank(tmp_path: Path, answer: str) -> None:
    # 🫨 came with Unicode 15: to an older Python it is an unassigned character, but it is an answer all the same.
    (found,) = read_rows(tmp_path, {"prompt": "q", "completion": answer}).examples
    assert found.messages is not None
    assert found.messages[1].content == answer


# -- what is wrong with a row -----------------------------------------------------------------------------------------

FORMS = "expected `messages`, `instruction`+`output`, `prompt`+`completion` or `text`"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([1], "expected a JSON object, found a list"),
        ("text", "expected a JSON object, found a string"),
        (None, "expected a JSON object, found null"),
        (3, "expected a JSON object, found a number"),
        (True, "expected a JSON object, found a boolean"),
        ({}, f"no known form: keys found: none; {FORMS}"),
        ({"question": "q", "answer": "a"}, f"no known form: keys found: `question`, `answer`; {FORMS}"),
        ({"a\nb\ud800": 1}, f"no known form: keys found: `a\\nb\\ud800`; {FORMS}"),
        ({"instruction": "q"}, "`output` is missing"),
        ({"output": "a"}, "`instruction` is missing"),
        ({"instruction": "q", "output": 5}, "`output` is a number; expected a string"),
        ({"instruction": "q", "output": None}, "`output` is null; expected a string"),
        ({"instruction": "q", "output": "a", "input": ["x"]}, "`input` is a list; expected a string"),
        ({"instruction": "q", "output": ""}, "`output` is empty"),
        ({"instruction": "q", "output": " \n"}, "`output` is blank"),
        ({"instruction": "q", "output": "\u200b\ufeff\u200d"}, "`output` is blank"),
        ({"prompt": "q"}, "`completion` is missing"),
        ({"prompt": {}, "completion": "a"}, "`prompt` is an object; expected a string"),
        ({"text": True}, "`text` is a boolean; expected a string"),
        ({"text": "a\ud800"}, "`text` holds a lone surrogate (\\ud800-\\udfff); it is not text"),
        ({"messages": "hi"}, "`messages` is a string; expected a list of {role, content}"),
        ({"messages": []}, "`messages` holds no assistant turn: there is nothing to learn from this row"),
        ({"messages": ["hi"]}, "`messages[0]` is a string; expected {role, content}"),
        ({"messages": [{"content": "x"}]}, "`messages[0].role` is missing"),
        ({"messages": [USER, {"role": "assistant"}]}, "`messages[1].content` is missing"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "`messages[1].content` is null; expected a string"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "`messages[1].role` is 'bot'; allowed: system, user, assistant"),
        ({"messages": [USER, {"role": "Assistant", "content": "x"}]}, "`messages[1].role` is 'Assistant'; allowed: system, user, assistant"),
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
        (b'{"text": "x"', "not valid JSON: expecting ',' delimiter at column 13"),
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
    (problem,) = problems_of(path)
    assert problem.startswith(
        f"{path}:1: not valid JSON: Exceeds the limit (4300 digits) for integer string conversion"
    )


def test_all_problems_come_at_once_and_no_row_is_lost_in_silence(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"text": "ok"}, {"text": ""}, {"text": "ok"}, {"prompt": "q", "completion": "a"}, {"text": 1}],
    )
    assert problems_of(path) == [
        f"{path}:2: `text` is empty",
        f"{path}:4: this row is of form `prompt`, but line 1 is `text`; keep one form in a file",
        f"{path}:5: `text` is a number; expected a string",
    ]


def test_a_wrong_first_row_still_decides_the_form(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"prompt": "q", "completion": "a"}])
    assert problems_of(path) == [
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
        (b"\xef\xbb\xbf", "the file holds no rows (only blank lines); expected one JSON object a line"),
        (b"\xef\xbb\xbf\n\n", "the file holds no rows (only blank lines); expected one JSON object a line"),
        (b"PAR1\x15\x04\x15", "this is a Parquet file, not JSON Lines; convert it first"),
    ],
)
def test_wrong_file(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert problems_of(path) == [f"{path}: {problem}"]


def test_missing_file_folder_and_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    long = tmp_path / ("x" * 300)
    assert problems_of(tmp_path / "no.jsonl") == [f"{tmp_path}/no.jsonl: no such file"]
    assert problems_of(tmp_path) == [f"{tmp_path}: is a folder; a JSON Lines file was expected"]
    assert problems_of(tmp_path / "file" / "a") == [f"{tmp_path}/file/a: cannot be read (Not a directory)"]
    assert problems_of(long) == [f"{long}: cannot be read (File name too long)"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert [e.text for e in read_examples(path).examples] == ["x"]


# -- the malformed files beside the repository ------------------------------------------------------------------------

# What the manifest leaves to the reader: where each rejected file's problems are, and what they say.
REASONS = {
    "s01_truncated_last_line.jsonl": {12: "not valid JSON"},
    "s02_python_dict_line.jsonl": {4: "expecting property name enclosed in double quotes"},
    "s03_empty_file.jsonl": {},
    "s06_invalid_utf8.jsonl": {5: "not valid UTF-8: byte 0xe9 at offset 20"},
    "s07_raw_nul_byte.jsonl": {6: "a NUL byte at offset"},
    "s08_missing_field.jsonl": {3: "`output` is missing", 7: "`instruction` is missing"},
    "s09_numbers_for_strings.jsonl": {
        2: "`output` is a number",
        4: "`instruction` is a number",
        8: "`output` is a boolean",
        9: "`input` is a list",
    },
    "s10_mixed_schemas.jsonl": {3: "`messages`", 4: "`prompt`", 6: "`text`", 7: "`messages`"},
    "s11_wrong_role.jsonl": {4: "'humna'; allowed: system, user, assistant", 9: "'bot'; allowed"},
    "s12_two_system_messages.jsonl": {2: "`messages[1]` is a system message", 5: "is a system message"},
    "s13_non_alternating.jsonl": {3: "two user turns in a row", 6: "two assistant turns in a row"},
    "s14_empty_strings.jsonl": {
        2: "`output` is empty",
        5: "`output` is blank",
        7: "`instruction` is empty",
        9: "`output` is blank",
    },
}
ACCEPTED = {
    "s04_utf8_bom.jsonl": 12,
    "s05_crlf.jsonl": 12,
    "s15_duplicated_rows.jsonl": 22,  # duplicates, huge rows and control tokens are found by later stages
    "s16_huge_row.jsonl": 8,
    "s17_special_token_injection.jsonl": 8,
    "s18_emoji_zwj_nfd.jsonl": 8,
}


@pytest.fixture(scope="module")
def manifest(shared_data: Path) -> dict[str, dict[str, Any]]:
    lines = (shared_data / "malformed" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["file"]: entry for entry in map(json.loads, lines)}


def test_every_jsonl_file_of_the_manifest_is_covered(manifest: dict[str, dict[str, Any]]) -> None:
    assert {name for name in manifest if name.endswith(".jsonl")} == {*REASONS, *ACCEPTED}


@pytest.mark.parametrize("name", REASONS)
def test_malformed_file_is_rejected(manifest: dict[str, dict[str, Any]], shared_data: Path, name: str) -> None:
    path = shared_data / "malformed" / name
    problems = problems_of(path)
    assert manifest[name]["expect"] == "reject"
    assert list(REASONS[name]) == manifest[name]["lines"]
    if not REASONS[name]:
        assert problems == [f"{path}: the file is empty; expected one JSON object a line"]
        return
    assert len(problems) == len(REASONS[name])
    for problem, (line, reason) in zip(problems, REASONS[name].items(), strict=True):
        assert problem.startswith(f"{path}:{line}: ")
        assert reason in problem


@pytest.mark.parametrize("name", ACCEPTED)
def test_malformed_file_is_accepted(manifest: dict[str, dict[str, Any]], shared_data: Path, name: str) -> None:
    found = read_examples(shared_data / "malformed" / name)
    assert manifest[name]["expect"].startswith("accept")
    assert len(found.examples) == manifest[name]["rows"] == ACCEPTED[name]
    assert found.form == "alpaca"
    assert [e.line for e in found.examples] == list(range(1, ACCEPTED[name] + 1))
    text = "".join(message.content for e in found.examples for message in e.messages or ())
    assert "\ufeff" not in text
    assert "\r" not in text


def test_emoji_and_decomposed_text_are_unchanged(shared_data: Path) -> None:
    path = shared_data / "malformed" / "s18_emoji_zwj_nfd.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    answers = [e.messages[-1].content for e in read_examples(path).examples if e.messages]
    assert answers == [row["output"] for row in rows]
    assert any(unicodedata.normalize("NFC", answer) != answer for answer in answers), "the file does hold NFD text"
    assert any("\u200d" in answer for answer in answers)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("s19_csv_unclosed_quote.csv", ":5: not valid JSON: extra data at column 35"),
        ("s20_parquet_named_json.json", ": this is a Parquet file, not JSON Lines; convert it first"),
    ],
)
def test_other_kinds_of_files_are_refused(shared_data: Path, name: str, said: str) -> None:
    path = shared_data / "malformed" / name
    assert f"{path}{said}" in problems_of(path)


# -- fuzz -------------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["messages", "role", "content", "instruction", "input", "output", "system", "prompt", "completion", "text"]
) | st.text(max_size=4)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=6)
    | st.sampled_from(["system", "user", "assistant", "hello", "\ud800"]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(KEYS, children, max_size=4),
    max_leaves=16,
)
GOOD = st.sampled_from([json.dumps(row).encode() for row in chat_rows(3)])


def only_data_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found: DataFile | None = None
    problems: list[str] = []
    try:
        found = read_examples(path)
    except DataError as error:
        problems = error.problems
    if found is None:
        assert problems
        for problem in problems:
            assert problem.startswith(f"{path}:")
            assert "\n" not in problem
            problem.encode()
    else:
        rows = [
            number for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1) if line.strip()
        ]
        assert [e.line for e in found.examples] == rows, "each row of an accepted file is there, once"
        for e in found.examples:
            assert (e.messages is None) != (e.text is None)


@settings(max_examples=300)
@given(st.lists(GOOD | st.binary(max_size=30), max_size=4).map(b"\n".join))
@example(b"\xef\xbb\xbf")
@example(b"\xff\xfe{\x00}\x00")
def test_any_bytes_give_examples_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    only_data_error(tmp_path_factory.getbasetemp() / "fuzz.jsonl", content)


@settings(max_examples=250)
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=4) | VALUES, min_size=1, max_size=3), st.booleans())
def test_any_json_gives_examples_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], escaped: bool
) -> None:
    lines = [json.dumps(row, ensure_ascii=escaped).encode("utf-8", "surrogatepass") for row in rows]
    only_data_error(tmp_path_factory.getbasetemp() / "fuzz.jsonl", b"\n".join(lines))
