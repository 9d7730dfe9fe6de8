"""The rows that `tunesmith plan --data` plans for: those that training would train on, and none that it would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny import chat_rows, write_jsonl
from tunesmith.config import RunConfig, load_config
from tunesmith.data.chat import ChatFormat
from tunesmith.data.lengths import estimate_row
from tunesmith.errors import ConfigError, DataError
from tunesmith.models.load import find_model, load_tokenizer
from tunesmith.workflows.plan_data import read_data
from tunesmith.workflows.rows import read_rows, tokenize_rows

QWEN = "Qwen/Qwen2.5-7B"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def config(model: str | Path = QWEN, **values: Any) -> RunConfig:
    given = {key.replace("__", "."): value for key, value in values.items()}
    return load_config(None, [], {"model.name": str(model), **given})


def pairs(path: Path, count: int, words: int) -> str:
    """A file of `count` rows, each longer than the one before, the first with about `words` words."""
    rows = [{"prompt": f"{path.name} {n}?", "completion": f"{n} " + "word " * (words + n)} for n in range(count)]
    return str(write_jsonl(path, rows))


@pytest.fixture
def mix(tmp_path: Path) -> list[dict[str, Any]]:
    """Three short rows for each long one."""
    return [
        {"path": pairs(tmp_path / "short.jsonl", 60, 10), "weight": 3},
        {"path": pairs(tmp_path / "long.jsonl", 50, 300), "weight": 1},
    ]


def of_training(settings: RunConfig) -> tuple[list[int], list[int]]:
    """Tokens and supervised tokens of the examples that training makes."""
    chat = ChatFormat(load_tokenizer(find_model(settings.model), settings.model))
    examples = tokenize_rows(settings, chat, read_rows(settings)).train
    return [len(each) for each in examples], [each.supervised for each in examples]


# -- which rows -------------------------------------------------------------------------------------------------------


def test_a_mix_is_read_as_training_reads_it(mix: list[dict[str, Any]]) -> None:
    settings = config(data__mix=mix)
    found, estimated = read_data(settings, None)
    assert list(found.lengths) == [estimate_row(row) for row in read_rows(settings).train]
    assert (sum(length < 200 for length in found.lengths), sum(length > 300 for length in found.lengths)) == (60, 20)
    assert estimated
    assert settings.model.name == QWEN


def test_rows_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    path = pairs(tmp_path / "rows.jsonl", 40, 10)
    settings = config(data__path=path, data__eval_fraction=0.25)
    found, _ = read_data(settings, None)
    rows = read_rows(settings)
    assert list(found.lengths) == [estimate_row(row) for row in rows.train]
    assert (len(found.lengths), len(rows.eval)) == (30, 10)
    few, _ = read_data(config(data__path=path, data__max_rows=7), None)
    assert len(few.lengths) == 7
    with pytest.raises(ConfigError, match=r"^data\.eval_fraction 0\.001 leaves no row of 40 for evaluation$"):
        read_data(config(data__path=path, data__eval_fraction=0.001), None)


def test_a_folders_rows_are_the_tokens_of_training(tiny_model: Path, tmp_path: Path) -> None:
    """Mixed, held out, cut and counted as there: also what is supervised."""
    other = str(write_jsonl(tmp_path / "chats.jsonl", chat_rows(40)))
    sources = [{"path": pairs(tmp_path / "short.jsonl", 60, 10), "weight": 3}, {"path": other, "weight": 1}]
    given = {"data__mix": sources, "data__eval_fraction": 0.2, "data__overlong": "truncate"}
    for limit in (100, "auto"):
        settings = config(tiny_model, **given, data__max_seq_length=limit)
        found, estimated = read_data(settings, None)
        again = config(tiny_model, **given, data__max_seq_length=limit)
        assert (list(found.lengths), list(found.supervised)) == of_training(again)
        assert settings.data.max_seq_length == again.data.max_seq_length
        assert not estimated
    assert settings.data.cache, "only the plan keeps no tokens"


def test_a_plan_keeps_no_tokens_on_disk(tiny_model: Path, tmp_path: Path) -> None:
    read_data(config(tiny_model, data__path=pairs(tmp_path / "rows.jsonl", 8, 10)), None)
    assert not list((tmp_path / "cache").rglob("*"))


# -- how much of them -------------------------------------------------------------------------------------------------


def test_what_is_supervised_is_the_answers_share(tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 300, "completion": "word " * 100}] * 8
    found, _ = read_data(config(data__path=str(write_jsonl(tmp_path / "rows.jsonl", rows))), None)
    assert sum(found.supervised) / sum(found.lengths) == pytest.approx(0.25, abs=0.01)
    every, _ = read_data(config(data__path=str(tmp_path / "rows.jsonl"), data__train_on="all"), None)
    assert sum(every.supervised) / sum(every.lengths) == pytest.approx(0.98, abs=0.02)


def test_a_text_is_split_beside_a_conversation_that_may_not_be(tmp_path: Path) -> None:
    """`auto` splits texts, and refuses conversations, in one mix."""
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "word " * 400}] * 4)
    sources = [{"path": str(text), "weight": 1}, {"path": pairs(tmp_path / "short.jsonl", 4, 10), "weight": 1}]
    found, _ = read_data(config(data__mix=sources), 256)
    assert max(found.lengths) == 256
    assert len(found.lengths) == 4 * 2 + 4
    sources[1]["path"] = pairs(tmp_path / "long.jsonl", 4, 300)
    with pytest.raises(DataError) as caught:
        read_data(config(data__mix=sources), 256)
    assert str(caught.value).startswith(
        f"{text}, {sources[1]['path']}: about 4 of 8 rows are longer than data.max_seq_length 256 (the longest has about "
    )


# -- what training would refuse ---------------------------------------------------------------------------------------


def test_a_held_out_row_that_is_too_long_is_refused_too(tmp_path: Path) -> None:
    path = pairs(tmp_path / "rows.jsonl", 4, 10)
    held = pairs(tmp_path / "held.jsonl", 1, 300)
    with pytest.raises(DataError, match=r"about 1 of 5 rows are longer than data\.max_seq_length 256"):
        read_data(config(data__path=path, data__eval_path=held), 256)
    found, _ = read_data(config(data__path=path, data__eval_path=held), 512)
    assert len(found.lengths) == 4


def test_rows_without_an_answer(tmp_path: Path) -> None:
    untrained = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]}
    path = str(write_jsonl(tmp_path / "rows.jsonl", [untrained, *chat_rows(3)]))
    with pytest.raises(DataError) as caught:
        read_data(config(data__path=path), None)
    assert str(caught.value) == (
        f"{path}:1: no turn of this row is trained on, and training would refuse it; set `train` or `weight` of an "
        "assistant's turn, or remove the row"
    )
    found, _ = read_data(config(data__path=path, data__skip_bad_rows=True), None)
    assert len(found.lengths) == 3
    write_jsonl(tmp_path / "rows.jsonl", [untrained])
    with pytest.raises(DataError, match=r"rows\.jsonl: no row is left to train on$"):
        read_data(config(data__path=path, data__skip_bad_rows=True), None)


def test_preferences_are_no_rows_to_train_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}] * 3)
    with pytest.raises(DataError, match=r"objective sft needs answers, not preferences"):
        read_data(config(data__path=str(path)), None)
