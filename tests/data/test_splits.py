"""Splits: every label gets its share, groups stay together, the seed decides, rows arrive as they were."""

from __future__ import annotations

import datetime
import gzip
import json
import random
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tiny import write_jsonl
from tunesmith.config import SourceConfig
from tunesmith.data.checks import check_rows, labels_of
from tunesmith.data.fingerprints import fingerprint
from tunesmith.data.formats import inspect_file, read_examples
from tunesmith.data.splits import groups_of, split_rows, write_split
from tunesmith.errors import DataError, RunError
from tunesmith.types import Example, Message

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def ask(question: str, answer: str, label: str | None = None) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), None, "x.jsonl", 1, label=label)


def sizes(parts: dict[str, list[int]]) -> dict[str, int]:
    return {name: len(positions) for name, positions in parts.items()}


def by_label(rows: Sequence[Any], positions: Sequence[int]) -> Counter[str | None]:
    labels = labels_of(rows)
    return Counter(labels[position] for position in positions)


def test_shares_of_rows_without_labels() -> None:
    rows = [ask(f"question {i}", f"answer {i}") for i in range(103)]
    parts = split_rows(rows, SHARES, 0)
    assert sizes(parts) == {"train": 83, "validation": 10, "test": 10}  # 82.4, 10.3, 10.3: the largest remainder
    assert sorted(position for positions in parts.values() for position in positions) == list(range(103))
    assert all(positions == sorted(positions) for positions in parts.values())


def test_every_label_gets_its_share() -> None:
    counts = {"a": 100, "b": 30, "c": 10}
    rows = [ask(f"{label} {i}", label, label) for label, count in counts.items() for i in range(count)]
    parts = split_rows(rows, SHARES, 1)
    assert by_label(rows, parts["train"]) == {"a": 80, "b": 24, "c": 8}
    assert by_label(rows, parts["validation"]) == {"a": 10, "b": 3, "c": 1}
    assert by_label(rows, parts["test"]) == {"a": 10, "b": 3, "c": 1}


def test_rare_labels_do_not_all_end_in_the_largest_file() -> None:
    rows = [ask(f"{label} {i}", f"l{label}", f"l{label}") for label in range(40) for i in range(3)]
    assert sizes(split_rows(rows, SHARES, 2)) == {"train": 96, "validation": 12, "test": 12}


def test_a_seed_decides() -> None:
    rows = [ask(f"question {i}", f"answer {i}") for i in range(50)]
    assert split_rows(rows, SHARES, 3) == split_rows(rows, SHARES, 3)
    assert split_rows(rows, SHARES, 3) != split_rows(rows, SHARES, 4)


def test_rows_that_are_alike_or_share_a_prompt_stay_together() -> None:
    rows = [ask("a?", "one"), ask("b?", "two"), ask("A? ", "three"), ask("a?", "ONE"), ask("c?", "one")]
    assert groups_of(rows) == [[0, 2, 3], [1], [4]]


@pytest.mark.parametrize("seed", range(4))
def test_large_groups_are_dealt_out_first(seed: int) -> None:
    rows = [ask("again?", f"answer {i}") for i in range(40)] + [ask(f"question {i}", "x" * i) for i in range(40)]
    assert sizes(split_rows(rows, {"train": 0.5, "test": 0.5}, seed)) == {"train": 40, "test": 40}


def test_texts_are_grouped_too() -> None:
    rows = [Example(None, text, "x", 1) for text in ("One text", "another", "one  text")]
    assert groups_of(rows) == [[0, 2], [1]]


def talk(*texts: str, train: bool | None = None) -> Example:
    turns = (
        Message(("user", "assistant")[i % 2], text, train=train if i == 1 else None) for i, text in enumerate(texts)
    )
    return Example(tuple(turns), None, "x.jsonl", 1)


def test_conversations_that_begin_alike_stay_together() -> None:
    rows = [talk("a?", "one"), talk("b?", "two"), talk("a?", "one", "c?", "three"), talk("A?", "else", "d?", "four")]
    assert groups_of(rows) == [[0, 2, 3], [1]]
    pairs = [row for i in range(20) for row in (talk(f"q{i}", f"a{i}"), talk(f"q{i}", f"a{i}", "more?", f"more {i}"))]
    parts = split_rows(pairs, {"train": 0.8, "test": 0.2}, 0)
    openings = [{pairs[place].messages[:2] for place in places} for places in parts.values()]  # type: ignore[index]
    assert sizes(parts) == {"train": 32, "test": 8}
    assert not openings[0] & openings[1]


def test_rows_that_share_only_what_is_not_trained_on_are_divided() -> None:
    shots = [talk("shot?", "yes", f"q{i}", f"a{i}", train=False) for i in range(3)]
    assert groups_of(shots) == [[0], [1], [2]]
    plain = [talk("shot?", "yes", f"q{i}", f"a{i}") for i in range(3)]
    assert groups_of(plain) == [[0, 1, 2]]
    assert groups_of(plain, "last") == [[0], [1], [2]]


@pytest.mark.parametrize("name", ["openassistant_seed_messages.jsonl"])
def test_real_conversations_without_leaks(shared_data: Path, tmp_path: Path, name: str) -> None:
    source = SourceConfig(path=str(shared_data / "chat" / name))
    data = read_examples(source)
    for seed in range(5):
        paths = write_split(tmp_path / f"{seed}", source, data, split_rows(data.examples, SHARES, seed))
        files = {part: inspect_file(path) for part, path in paths.items()}
        for part in ("validation", "test"):
            findings = check_rows(files["train"], source_settings(paths["train"]), files[part])
            assert not [finding for finding in findings if finding.check.startswith("leaked")]


@pytest.mark.parametrize("seed", range(5))
def test_groups_never_straddle(seed: int) -> None:
    rng = random.Random(seed)
    rows = [ask(f"question {rng.randrange(60)}", f"answer {rng.randrange(5)}") for _ in range(300)]
    parts = split_rows(rows, SHARES, seed)
    prompts = [
        {exchange.prompt for position in positions for exchange in fingerprint(rows[position]).exchanges}
        for positions in parts.values()
    ]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    assert sum(map(len, parts.values())) == 300
    for name, share in SHARES.items():
        assert len(parts[name]) == pytest.approx(300 * share, abs=8)  # groups have about five rows


def test_a_real_file_without_leaks(shared_data: Path, tmp_path: Path) -> None:
    source = SourceConfig(path=str(shared_data / "banking77" / "train.jsonl"))
    data = read_examples(source)
    parts = split_rows(data.examples, SHARES, 3407)
    paths = write_split(tmp_path / "split", source, data, parts)
    assert sizes(parts) == {"train": 8003, "validation": 1000, "test": 1000}
    train, test = inspect_file(paths["train"]), inspect_file(paths["test"])
    assert not [f for f in check_rows(train, source_settings(paths["train"]), test) if f.check.startswith("leaked")]
    labels = Counter(row.label for row in data.examples if isinstance(row, Example))
    for name, share in SHARES.items():
        found = by_label(data.examples, parts[name])
        assert all(abs(found[label] - share * count) <= 2 for label, count in labels.items()), name
    lines = [line for path in paths.values() for line in path.read_bytes().splitlines(keepends=True)]
    assert sorted(lines) == sorted(Path(source.path).read_bytes().splitlines(keepends=True))


def source_settings(path: Path) -> Any:
    from tunesmith.config import DataConfig

    return DataConfig(path=str(path))


def test_json_lines_are_copied_byte_for_byte(tmp_path: Path) -> None:
    rows = [f'{{"prompt": "q{i}",  "completion":"\\u00e9 {i}", "extra": [1, 2.50]}}' for i in range(10)]
    text = "\ufeff" + "\r\n".join(rows[:5]) + "\r\n\r\n" + "\n".join(rows[5:])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode())
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    for name in (path, packed):
        source = SourceConfig(path=str(name))
        data = read_examples(source)
        paths = write_split(tmp_path / f"{name.name}-split", source, data, split_rows(data.examples, SHARES, 0))
        lines = [line for part in paths.values() for line in part.read_bytes().splitlines()]
        assert sorted(lines) == sorted(row.encode() for row in rows)
        assert [len(part.read_bytes().splitlines()) for part in paths.values()] == [8, 1, 1]


def test_rows_of_other_files_are_written_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,id\n" + "".join(f'q{i},"é, {i}",{i}\n' for i in range(10)), encoding="utf-8")
    source = SourceConfig(path=str(path))
    data = read_examples(source)
    paths = write_split(tmp_path / "split", source, data, split_rows(data.examples, {"train": 0.9, "test": 0.1}, 0))
    rows = [json.loads(line) for part in paths.values() for line in part.read_text(encoding="utf-8").splitlines()]
    expected = [{"prompt": f"q{i}", "completion": f"é, {i}", "id": str(i)} for i in range(10)]
    assert sorted(rows, key=lambda row: row["id"]) == expected
    assert list(paths) == ["train", "test"]


def test_values_of_a_table_that_json_does_not_have(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = {
        "text": ["one text", "two texts"],
        "score": [float("nan"), 0.5],
        "day": [datetime.date(2024, 2, 29), datetime.date(2025, 1, 1)],
        "price": [Decimal("1.10"), Decimal("2.00")],
    }
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(values), path)
    source = SourceConfig(path=str(path))
    data = read_examples(source)
    (written,) = write_split(tmp_path / "split", source, data, {"all": [0, 1]}).values()
    assert written.read_text().splitlines() == [
        '{"text": "one text", "score": null, "day": "2024-02-29", "price": "1.10"}',
        '{"text": "two texts", "score": 0.5, "day": "2025-01-01", "price": "2.00"}',
    ]
    pq.write_table(pa.table(values | {"raw": [b"\x00", b"\xff"]}), path)
    with pytest.raises(DataError) as raised:
        write_split(tmp_path / "other", source, read_examples(source), {"all": [0, 1]})
    assert str(raised.value) == (
        f"{path}:1: the row holds bytes (b'\\x00'), which JSON Lines cannot hold; write the file without such columns first"
    )
    assert not (tmp_path / "other").exists()


def test_several_rows_on_one_line_are_told_apart(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(10)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    source = SourceConfig(path=str(path))
    data = read_examples(source)
    paths = write_split(tmp_path / "split", source, data, split_rows(data.examples, {"train": 0.8, "test": 0.2}, 0))
    found = [json.loads(line) for part in paths.values() for line in part.read_text().splitlines()]
    assert sorted(found, key=lambda row: row["prompt"]) == rows
    path.write_text(json.dumps([{"prompt": "x1", "completion": 3}, *rows]))
    data = read_examples(source, skip_bad_rows=True)
    with pytest.raises(DataError, match=rf"{path}:1: several rows on one line, some with errors; write one row a line"):
        write_split(tmp_path / "other", source, data, {"train": list(range(10))})


def test_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for part in "ab":
        write_jsonl(folder / f"{part}.jsonl", [{"prompt": f"{part}{i}", "completion": "yes"} for i in range(5)])
    source = SourceConfig(path=str(folder))
    data = read_examples(source)
    paths = write_split(tmp_path / "split", source, data, split_rows(data.examples, {"train": 0.5, "test": 0.5}, 0))
    lines = [json.loads(line)["prompt"] for path in paths.values() for line in path.read_text().splitlines()]
    assert sorted(lines) == [f"{part}{i}" for part in "ab" for i in range(5)]


def test_bad_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\nnot json\n{"prompt": "c", "completion": "d"}\n')
    source = SourceConfig(path=str(path))
    data = read_examples(source, skip_bad_rows=True)
    paths = write_split(tmp_path / "split", source, data, {"train": [0], "test": [1]})
    assert paths["train"].read_text() == '{"prompt": "a", "completion": "b"}\n'
    assert paths["test"].read_text() == '{"prompt": "c", "completion": "d"}\n'


def test_existing_files_are_never_overwritten(tmp_path: Path) -> None:
    source = SourceConfig(path=str(write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])))
    data = read_examples(source)
    out = tmp_path / "split"
    out.mkdir()
    write_split(out, source, data, {"train": [0]})  # an empty folder is free
    with pytest.raises(RunError, match=r"split: already exists; choose another --out, or remove it"):
        write_split(out, source, data, {"train": [1]})
    assert (out / "train.jsonl").read_text() == '{"text": "a"}\n'
    with pytest.raises(RunError, match=r"rows.jsonl: already exists"):
        write_split(Path(source.path), source, data, {"train": [1]})


def test_a_file_without_rows_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = SourceConfig(path=str(write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "A"}, {"text": "b"}])))
    data = read_examples(source)
    out = tmp_path / "split"
    with pytest.raises(DataError) as raised:
        write_split(out, source, data, split_rows(data.examples, SHARES, 0))
    assert str(raised.value) == (
        f"{source.path}: validation would get no row (3 rows in 2 groups that stay together); "
        "give it a larger share, or leave it out (share 0)"
    )
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    rows = [["shot?", "yes", f"q{i}", f"a{i}"] for i in range(3)]
    turns = [[{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(row)] for row in rows]
    source = SourceConfig(path=str(write_jsonl(tmp_path / "chats.jsonl", [{"messages": row} for row in turns])))
    data = read_examples(source)
    for train_on, groups in (("assistant", 1), ("last", 3)):
        with pytest.raises(DataError, match=rf"test would get no row \(3 rows in {groups} groups"):
            write_split(out, source, data, {"train": [0, 1, 2], "test": []}, train_on=train_on)
