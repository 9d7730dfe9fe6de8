"""The malformed files beside the repository: their manifest says what a reader must do, and that is the test.

Duplicates, overlong rows and control tokens (M15-M17) are read here without complaint; later checks speak of them.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.formats import DataFile, inspect_file, read_examples
from tunesmith.errors import DataError
from tunesmith.types import Example

REASONS: dict[str, dict[int | None, str]] = {
    "M01": {12: "not valid JSON: expecting value at column 65; the row looks cut off"},
    "M02": {4: "not valid JSON: expecting property name enclosed in double quotes at column 2"},
    "M03": {None: "the file is empty; expected one JSON object a line"},
    "M06": {5: "not valid UTF-8: byte 0xe9 at offset 20 of the line"},
    "M07": {6: "a NUL byte at offset 30 of the line; it is not legal in JSON"},
    "M08": {
        3: "`instruction` has no answer beside it, so there is nothing to learn (keys found: `instruction`, `input`); "
        "if a column holds the answer, name it with data.columns, e.g. {output: reply}",
        7: "`instruction` is missing (keys found: `input`, `output`); "
        "if a column holds it, name it with data.columns, e.g. {instruction: ask}",
    },
    "M09": {
        2: "`output` is a number; expected a string",
        4: "`instruction` is a number; expected a string",
        8: "`output` is a boolean; expected a string",
        9: "`input` is a list; expected a string",
    },
    "M10": {
        None: "several forms: `alpaca` (first on line 1), `messages` (first on line 3), `prompt` (first on line 4), "
        "`text` (first on line 6); keep one form in a file, or name the one to read with data.format",
        3: "this row is of form `messages`, but line 1 is `alpaca`; keep one form in a file",
        4: "this row is of form `prompt`, but line 1 is `alpaca`; keep one form in a file",
        6: "this row is of form `text`, but line 1 is `alpaca`; keep one form in a file",
        7: "this row is of form `messages`, but line 1 is `alpaca`; keep one form in a file",
    },
    "M11": {
        4: "`messages[1].role` is 'humna'; allowed: system, user, assistant, tool, developer; "
        "other names can be given a meaning with data.roles",
        9: "`messages[2].role` is 'bot'; allowed: system, user, assistant, tool, developer; "
        "other names can be given a meaning with data.roles",
    },
    "M12": {
        2: "`messages[1]` is a system message; only one is allowed, at the start",
        5: "`messages[3]` is a system message; only one is allowed, at the start",
    },
    "M13": {
        3: "`messages[1]`: two user turns in a row; expected assistant",
        6: "`messages[2]`: two assistant turns in a row; expected user",
    },
    "M14": {2: "`output` is empty", 5: "`output` is blank", 7: "`instruction` is empty", 9: "`output` is blank"},
    "M19": {
        5: "the quotation mark opened on line 5 is never closed; close it; "
        'a quotation mark inside a cell is written ""',
    },
}
"""Every problem of the files that are refused: its line and what is said."""

ACCEPTED = ("M04", "M05", "M15", "M16", "M17", "M18", "M20")


@pytest.fixture(scope="module")
def manifest(shared_data: Path) -> dict[str, dict[str, Any]]:
    lines = (shared_data / "malformed" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["id"]: entry for entry in map(json.loads, lines)}


@pytest.fixture
def path(manifest: dict[str, dict[str, Any]], shared_data: Path, entry: str) -> Path:
    return shared_data / "malformed" / str(manifest[entry]["file"])


def texts(found: DataFile) -> list[str]:
    return [message.content for e in found.examples if isinstance(e, Example) for message in e.messages or ()]


def test_every_entry_of_the_manifest_is_here(manifest: dict[str, dict[str, Any]]) -> None:
    assert manifest.keys() == {*REASONS, *ACCEPTED}
    for name, entry in manifest.items():
        assert entry["expect"] == "reject" or name in ACCEPTED
        assert entry["expect"].startswith("accept") or name in REASONS or "accept: recognise" in entry["also_ok"][0]


@pytest.mark.parametrize("entry", REASONS)
def test_refused_with_every_line_and_reason(manifest: dict[str, dict[str, Any]], path: Path, entry: str) -> None:
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert caught.value.exit_code == 2
    assert caught.value.problems == [
        f"{path}: {said}" if line is None else f"{path}:{line}: {said}" for line, said in REASONS[entry].items()
    ]
    assert [line for line in REASONS[entry] if line is not None] == manifest[entry]["lines"]
    found = inspect_file(path)
    bad = {finding.line for finding in found.findings if finding.line is not None}
    assert (found.rows, len(bad)) == (manifest[entry]["rows"], manifest[entry]["bad_rows"])


@pytest.mark.parametrize("entry", [name for name in REASONS if name != "M03"])
def test_skipping_leaves_out_exactly_the_bad_rows(manifest: dict[str, dict[str, Any]], path: Path, entry: str) -> None:
    found = read_examples(path, skip_bad_rows=True)
    bad = manifest[entry]["lines"]
    assert [finding.line for finding in found.findings if finding.line is not None] == bad
    assert len(found.examples) == manifest[entry]["rows"] - len(bad)
    assert not {e.line for e in found.examples} & set(bad)


@pytest.mark.parametrize("entry", ["M03"])
def test_skipping_does_not_help_an_empty_file(path: Path, entry: str) -> None:
    with pytest.raises(DataError) as caught:
        read_examples(path, skip_bad_rows=True)
    assert str(caught.value) == f"{path}: the file is empty; expected one JSON object a line"


@pytest.mark.parametrize("entry", ACCEPTED)
def test_accepted_whole(manifest: dict[str, dict[str, Any]], path: Path, entry: str) -> None:
    found = read_examples(path)
    assert (found.form, found.rows, len(found.examples)) == ("alpaca", manifest[entry]["rows"], manifest[entry]["rows"])
    assert [e.line for e in found.examples] == list(range(1, found.rows + 1))
    assert (found.findings, found.ignored) == ([], {}), "the first key has no byte-order mark"
    assert not any("\r" in text or "\ufeff" in text for text in texts(found))
    assert found.container == ("Parquet" if entry == "M20" else "JSON Lines")


@pytest.mark.parametrize("entry", ["M16"])
def test_the_huge_row_is_there_whole(path: Path, entry: str) -> None:
    found = read_examples(path)
    rows = rows_of(path)
    assert [texts_of(e)[-1] for e in found.examples if isinstance(e, Example)] == [row["output"] for row in rows]
    assert [e.line for e in found.examples if isinstance(e, Example) and sum(map(len, texts_of(e))) > 900_000] == [5]


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def texts_of(example: Example) -> list[str]:
    return [message.content for message in example.messages or ()]


@pytest.mark.parametrize("entry", ["M18"])
def test_emoji_and_decomposed_text_are_unchanged(path: Path, entry: str) -> None:
    answers = [texts_of(e)[-1] for e in read_examples(path).examples if isinstance(e, Example)]
    assert [answer.encode() for answer in answers] == [row["output"].encode() for row in rows_of(path)]
    assert any(unicodedata.normalize("NFC", answer) != answer for answer in answers), "the file does hold NFD text"
    assert any("\u200d" in answer for answer in answers)
