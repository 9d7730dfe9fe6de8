"""A run's rows: several files in their shares, bad rows left out by name, the wrong kind refused, `auto` written down."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny import CHATML, make_tokenizer, write_jsonl
from tunesmith.config import RunConfig, load_config
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, DataError
from tunesmith.types import Finding
from tunesmith.workflows.rows import RunData, read_questions, read_rows, summary, tokenize_rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def pairs(count: int, name: str = "q") -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {n} asks", "completion": f"{name} {n} says"} for n in range(count)]


def config(**values: Any) -> RunConfig:
    return load_config(None, [], {key.replace("__", "."): value for key, value in values.items()})


def tokenized(settings: RunConfig, **more: Any) -> RunData:
    return tokenize_rows(settings, ChatFormat(make_tokenizer()), read_rows(settings), **more)


# -- several files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "weights", "taken"),
    [
        ((80, 100), (0.8, 0.2), (80, 20)),  # all of the task, and a fifth from elsewhere
        ((100, 10), (0.8, 0.2), (40, 10)),  # no row twice: the small file sets the size
        ((10, 10, 10), (1, 1, 2), (5, 5, 10)),
    ],
)
def test_shares(tmp_path: Path, sizes: tuple[int, ...], weights: tuple[float, ...], taken: tuple[int, ...]) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", pairs(size, f"file{i}")) for i, size in enumerate(sizes)]
    mix = [{"path": str(path), "weight": weight} for path, weight in zip(paths, weights, strict=True)]
    rows = read_rows(config(data__mix=mix))
    files = Counter(row.file for row in rows.train)
    assert tuple(files[str(path)] for path in paths) == taken
    assert len({(row.file, row.line) for row in rows.train}) == len(rows.train)
    shares = [weight / sum(weights) for weight in weights]
    said = ", ".join(
        f"{n} of {size} rows of {path} ({share:.0%})"
        for n, size, path, share in zip(taken, sizes, paths, shares, strict=True)
    )
    assert rows.notes == [f"mixed: {said}"]
    assert rows.facts["path"] == [str(path) for path in paths]
    assert rows.facts["rows"] == sum(sizes)


def test_a_mix_of_forms_and_columns_within_max_rows(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [{"frage": f"f{n} wer", "antwort": f"a{n} ich"} for n in range(50)])
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": f"text number {n}"} for n in range(50)])
    mix = [
        {"path": str(one), "weight": 3, "columns": {"question": "frage", "answer": "antwort"}},
        {"path": str(other), "weight": 1},
    ]
    settings = config(data__mix=mix, data__max_rows=20)
    rows = read_rows(settings)
    assert Counter(row.text is None for row in rows.train) == {True: 15, False: 5}
    assert rows.facts["form"] == "qa, text"
    data = tokenized(settings)
    assert len(data.train) == 20
    assert {example.file for example in data.train} == {str(one), str(other)}


def test_path_and_mix_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path has no effect beside data\.mix; set one of the two"):
        config(data__path="a.jsonl", data__mix=[{"path": "b.jsonl"}])


def test_rows_that_several_sources_have_are_said(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", pairs(5))
    other = write_jsonl(tmp_path / "b.jsonl", [*pairs(3, "new"), *pairs(2)])
    notes = read_rows(config(data__mix=[{"path": str(one)}, {"path": str(other)}])).notes
    assert notes[0] == (
        f"{other}: 2 rows with duplicate row (lines 4, 5); line 4: the same as {one}:1 (2 of 5 rows repeat one of another "
        "source); remove it from one of the two files, or keep it if it is to count more"
    )
    assert len(notes) == 2


# -- what is wrong ----------------------------------------------------------------------------------------------------


def test_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a1", "completion": 3}, *pairs(2)])
    held = write_jsonl(tmp_path / "held.jsonl", [*pairs(1), {"prompt": "b1", "completion": None}])
    with pytest.raises(DataError) as caught:
        read_rows(config(data__path=str(train), data__eval_path=str(held)))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{train}:1", f"{held}:2"]


def test_bad_rows_are_left_out_by_name_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in pairs(6)]
    lines[1], lines[4] = '{"prompt": "x1", "completion": 3}', lines[4][:-4]
    path.write_text("\n".join(lines) + "\n")
    rows = read_rows(config(data__path=str(path), data__skip_bad_rows=True))
    assert [row.line for row in rows.train] == [1, 3, 4, 6]
    left_out = [note for note in rows.notes if note.endswith("left out")]
    assert [note.split(": ")[0] for note in left_out] == [f"{path}:2", f"{path}:5"]


def test_rows_that_become_bad_as_tokens(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*pairs(2), {"prompt": "long " * 30, "completion": "yes"}])
    settings = config(data__path=str(path), data__max_seq_length=64)
    with pytest.raises(DataError, match=rf"{path}:3: \d+ tokens, data\.max_seq_length is 64"):
        tokenized(settings)
    settings.data.skip_bad_rows = True
    data = tokenized(settings)
    assert [example.line for example in data.train] == [1, 2]
    assert any(note.startswith(f"{path}:3: ") and note.endswith("left out") for note in data.notes)
    settings.data.max_seq_length = 8
    with pytest.raises(DataError):
        tokenized(settings)


@pytest.mark.parametrize(
    ("row", "form", "fix"),
    [
        (
            {"prompt": "ab", "chosen": "c1", "rejected": "d1"},
            "preference",
            "set objective.name: dpo to train on preferences, or pass a file of answers, or name the column that holds them (data.format: prompt, data.columns: {completion: "
            "chosen})",
        ),
        (
            {"prompt": "ab", "completion": "cd", "label": True},
            "kto",
            "set objective.name: kto to train on preferences, or pass a file of answers: only the rows whose label is true, without that label",
        ),
    ],
)
def test_preferences_are_no_answers(tmp_path: Path, row: dict[str, Any], form: str, fix: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError) as caught:
        read_rows(config(data__path=str(path)))
    assert str(caught.value) == (
        f"{path}: the rows are of form {form}; objective sft needs answers, not preferences; {fix}"
    )
    with pytest.raises(DataError, match=r"evaluation needs answers, not preferences"):
        read_questions(path)


# -- held out ---------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_no_repetitions_of_training_rows(tmp_path: Path) -> None:
    rows = pairs(40) + pairs(40)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    split = read_rows(config(data__path=str(path), data__eval_fraction=0.25))
    assert (len(split.train), len(split.eval)) == (60, 20)
    assert not {row.messages for row in split.train} & {row.messages for row in split.eval}


def test_a_leak_into_the_evaluation_file_is_said(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", pairs(5))
    held = write_jsonl(tmp_path / "held.jsonl", [pairs(3)[2], *pairs(2, "new")])
    notes = read_rows(config(data__path=str(train), data__eval_path=str(held))).notes
    assert len([note for note in notes if note.startswith(f"{held}:1: ") and str(train) in note]) == 1


def test_held_out_rows_from_another_split_of_the_same_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", pairs(6))
    write_jsonl(tmp_path / "test.jsonl", pairs(2, "new"))
    folder = str(tmp_path)
    rows = read_rows(config(data__path=folder, data__split="train", data__eval_path=folder, data__eval_split="test"))
    assert (len(rows.train), len(rows.eval)) == (6, 2)
    with pytest.raises(ConfigError, match=r"data\.eval_split has no effect without data\.eval_path"):
        config(data__path=folder, data__eval_split="test")


def test_held_out_rows_from_a_file_beside_a_split_or_a_text(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", pairs(6))
    held = write_jsonl(tmp_path / "held.jsonl", pairs(2, "new"))
    settings = config(data__path=str(tmp_path / "data"), data__split="train", data__eval_path=str(held))
    assert len(read_rows(settings).eval) == 2
    (tmp_path / "a.txt").write_text("one paragraph\n\nanother one\n")
    texts = write_jsonl(tmp_path / "b.jsonl", [{"text": "held out"}])
    rows = read_rows(
        config(data__path=str(tmp_path / "a.txt"), data__sample_by="paragraph", data__eval_path=str(texts))
    )
    assert (len(rows.train), len(rows.eval)) == (2, 1)


@pytest.mark.parametrize(("fraction", "side"), [(0.01, "evaluation"), (0.99, "training")])
def test_a_fraction_that_leaves_nothing(tmp_path: Path, fraction: float, side: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(ConfigError, match=rf"data\.eval_fraction {fraction} leaves no row of 3 for {side}"):
        read_rows(config(data__path=str(path), data__eval_fraction=fraction))


# -- what `auto` came to ----------------------------------------------------------------------------------------------


def test_auto_is_written_into_the_configuration(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x" * 99}] * 3)
    settings = config(data__path=str(path), data__max_seq_length="auto")
    data = tokenized(settings)
    assert settings.data.max_seq_length == data.max_seq_length == 128
    settings = config(data__path=str(path), data__max_seq_length="auto")
    settings.data.packing, settings.training.micro_batch_tokens = True, 110
    assert tokenized(settings, model_limit=120).max_seq_length == 110, "no example may be longer than a micro-batch"


def test_switched_off_thoughts_are_written_into_the_configuration(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(3))
    settings = config(data__path=str(path))
    tokenizer = make_tokenizer(
        chat_template=CHATML.replace(
            "assistant\n' }}{% endif %}",
            "assistant\n' }}{% if not enable_thinking | default(true) %}<think></think>{% endif %}{% endif %}",
        ).replace(
            "message.role + '\n' +",
            "message.role + '\n' + ('<think></think>' if message.role == 'assistant' else '') +",
        )
    )
    chat = ChatFormat(tokenizer)
    data = tokenize_rows(settings, chat, read_rows(settings))
    assert settings.data.chat_template_kwargs == {"enable_thinking": False}
    assert any("enable_thinking: false" in note for note in data.notes)
    again = ChatFormat(tokenizer, "auto", settings.data.chat_template_kwargs)
    assert again.hash == chat.hash


def test_examples_beyond_the_model_are_said(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x" * 99}])
    data = tokenized(config(data__path=str(path)), model_limit=64)
    assert data.notes[-1] == (
        "the longest example has 100 tokens; the model was made for 64 (max_position_embeddings): lower "
        "data.max_seq_length"
    )


# -- notes ------------------------------------------------------------------------------------------------------------


def test_many_findings_are_one_line() -> None:
    def finding(line: int, severity: Any = "warning") -> Finding:
        return Finding("duplicate_row", severity, "a.jsonl", line, f"row {line}", "fix it")

    assert summary([finding(3)]) == ["a.jsonl:3: row 3; fix it"]
    assert summary([finding(3, "error")]) == ["a.jsonl:3: row 3; fix it, left out"]
    assert summary([finding(line, "error") for line in range(1, 14)])[0].startswith(
        "a.jsonl: 13 rows with duplicate row, left out (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13); line 1: "
    )
    assert summary([finding(line) for line in range(1, 14)]) == [
        "a.jsonl: 13 rows with duplicate row (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...); line 1: row 1; fix it"
    ]


# -- continued pre-training -------------------------------------------------------------------------------------------


def test_continued_pre_training_takes_plain_text_only(tmp_path: Path) -> None:
    chats, text = write_jsonl(tmp_path / "chats.jsonl", pairs(4)), tmp_path / "text.txt"
    text.write_text("a first paragraph\n\nand a second one\n", encoding="utf-8")
    refused = (
        f"{chats}: the rows are of form prompt; objective cpt trains on plain text; set objective.name: sft, or pass a text "
        "file, or name the column that holds text (data.format: text, data.columns: {text: NAME})"
    )
    for values in ({"data__path": str(chats)}, {"data__path": str(text), "data__eval_path": str(chats)}):
        with pytest.raises(DataError) as caught:
            read_rows(config(objective__name="cpt", **values))
        assert str(caught.value) == refused
    data = tokenized(config(objective__name="cpt", data__path=str(text), data__train_on="all"))
    assert all(example.loss_mask.all() for example in data.train)
    assert read_rows(config(data__path=str(text))).general == []


def test_general_data_is_read_beside_the_run(tmp_path: Path) -> None:
    """Its rows may be chats, where the run's are text; preferences are no data to measure a loss on."""
    train, general = tmp_path / "train.txt", write_jsonl(tmp_path / "general.jsonl", pairs(3))
    train.write_text("ab\n", encoding="utf-8")
    values = {"objective__name": "cpt", "data__path": str(train), "data__general_path": str(general)}
    data = tokenized(config(**values))
    assert (len(data.general), len(data.eval)) == (3, 0)
    assert data.facts["general_rows"] == 3
    assert [file["path"] for file in data.facts["files"]] == [str(train), str(general)]
    general.write_text(general.read_text(encoding="utf-8").replace("says", "said"), encoding="utf-8")
    other = tokenized(config(**values)).facts
    assert {key for key, value in other.items() if value != data.facts[key]} == {"general_sha256", "tokens_sha256"}
    general.write_text("{}\n", encoding="utf-8")
    train.write_text("", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(config(**values))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [str(train), str(general)], "both at once"
    train.write_text("ab\n", encoding="utf-8")
    write_jsonl(general, pairs(3))
    preferences = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match=r"of form preference; data\.general_path needs answers"):
        read_rows(config(**(values | {"data__general_path": str(preferences)})))
    with pytest.raises(DataError, match="no general row is left; all are longer than 8 tokens"):
        tokenized(config(**values, data__max_seq_length=8, data__overlong="drop"))
