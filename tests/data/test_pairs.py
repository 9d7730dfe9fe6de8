"""Preference rows as sequences, and their tokens as pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tiny import make_tokenizer, write_jsonl
from tunesmith.config import RunConfig, load_config
from tunesmith.data.batches import make_batch
from tunesmith.data.chat import ChatFormat
from tunesmith.data.formats import read_examples
from tunesmith.data.pairs import pair_sequences
from tunesmith.errors import ConfigError, DataError
from tunesmith.types import Example, Message, PreferenceExample, TokenizedPair
from tunesmith.workflows.plan_data import read_data
from tunesmith.workflows.rows import RunData, read_rows, tokenize_rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def said(role: str, content: str) -> Message:
    return Message(role, content)  # type: ignore[arg-type]


def preference(line: int) -> PreferenceExample:
    return PreferenceExample(
        (said("user", f"ask {line}"),),
        (said("assistant", f"good {line}"),),
        (said("assistant", f"bad {line}"),),
        "f",
        line,
    )


def rated(line: int, desirable: bool) -> Example:
    turns = (
        said("user", f"first {line}"),
        said("assistant", f"then {line}"),
        said("user", f"ask {line}"),
        said("assistant", f"say {line}"),
    )
    return Example(turns, None, "f", line, desirable=desirable)


def config(path: Path, *overrides: str, model: str = "") -> RunConfig:
    return load_config(None, overrides, {"data.path": str(path), "model.name": model, "objective.name": "dpo"})


def tokenized(settings: RunConfig) -> RunData:
    return tokenize_rows(settings, ChatFormat(make_tokenizer()), read_rows(settings))


def test_of_a_preference_row_only_the_two_answers_count() -> None:
    chosen, rejected = pair_sequences([preference(4)], "simpo", 0)
    assert [message.content for message in chosen.messages or ()] == ["ask 4", "good 4"]
    assert [message.content for message in rejected.messages or ()] == ["ask 4", "bad 4"]
    assert [message.train for message in rejected.messages or ()] == [False, None]
    assert (rejected.file, rejected.line) == ("f", 4)


def test_ktos_other_answers_are_those_of_other_rows_each_once() -> None:
    rows = [rated(line, line % 2 == 0) for line in range(6)]
    found = pair_sequences(rows, "kto", 3)
    firsts, seconds = found[0::2], found[1::2]
    assert [row.messages and row.messages[-1].content for row in firsts] == [f"say {line}" for line in range(6)]
    for first, second in zip(firsts, seconds, strict=True):
        assert first.messages is not None
        assert second.messages is not None
        assert [message.content for message in first.messages[:3]] == [
            message.content for message in second.messages[:3]
        ]
        assert [message.train for message in first.messages] == [False, False, False, None], (
            "earlier answers are prompt"
        )
        assert first.messages[3].content != second.messages[3].content
        assert first.desirable is second.desirable is (first.line % 2 == 0)
    assert sorted(row.messages[-1].content for row in seconds if row.messages) == [f"say {line}" for line in range(6)]
    assert found == pair_sequences(rows, "kto", 3)
    assert found != pair_sequences(rows, "kto", 4)


def test_for_kto_a_preference_row_is_two() -> None:
    found = pair_sequences([preference(1), preference(2)], "kto", 0)
    assert [row.desirable for row in found[0::2]] == [True, False, True, False]
    assert [row.messages and row.messages[1].content for row in found[0::2]] == ["good 1", "bad 1", "good 2", "bad 2"]
    (alone,) = {row.messages for row in pair_sequences([rated(1, True)], "kto", 0)}
    assert alone is not None
    assert alone[-1].content == "say 1"


def rows_of(path: Path, *lengths: tuple[int, int]) -> Path:
    return write_jsonl(
        path,
        [{"prompt": f"q{n}", "chosen": "c" * one, "rejected": "r" * other} for n, (one, other) in enumerate(lengths)],
    )


def test_tokens_are_the_pairs_both_of_whose_sequences_are_there(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "pairs.jsonl", (4, 6), (90, 5), (3, 3), (8, 90))
    data = tokenized(config(path, "data.max_seq_length=80", "data.overlong=drop"))
    store = data.train
    assert [store[index].line for index in range(len(store))] == [1, 3]
    assert list(store.rows) == [0, 2]
    pair = store[0]
    assert isinstance(pair, TokenizedPair)
    tokenizer = make_tokenizer()
    sides = [pair.sequence(number) for number in (0, 1)]
    texts = [tokenizer.decode(side.input_ids[side.loss_mask]) for side in sides]
    assert texts == ["cccc<|im_end|>", "rrrrrr<|im_end|>"]
    assert all(tokenizer.decode(side.input_ids).startswith("<|im_start|>user\nq0<|im_end|>") for side in sides)
    assert list(store.lengths) == [len(store[0]), len(store[1])]
    assert (pair.lengths, sum(pair.lengths)) == ((len(sides[0]), len(sides[1])), len(pair))
    assert store[-1].line == 3
    assert [each.line for each in store[:2]] == [1, 3]
    assert (data.facts["train_rows"], data.facts["train_tokens"]) == (2, int(store.lengths.sum()))
    other = tokenized(config(rows_of(tmp_path / "other.jsonl", (4, 6), (3, 4)), "data.max_seq_length=80"))
    assert other.facts["tokens_sha256"] != data.facts["tokens_sha256"]


def test_a_pair_fits_the_token_budget(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "pairs.jsonl", (4, 6), (90, 5))
    settings = config(path, "training.micro_batch_tokens=150", "data.max_seq_length=auto", "data.overlong=truncate")
    data = tokenized(settings)
    assert settings.data.max_seq_length == 75
    assert max(data.train.lengths) <= 150
    message = "data.max_seq_length 76 is more than half of training.micro_batch_tokens 150: the longest pair would fit"
    with pytest.raises(ConfigError, match=message):
        config(path, "training.micro_batch_tokens=150", "data.max_seq_length=76")


def test_an_answer_that_became_several_examples_is_refused(tmp_path: Path) -> None:
    """A template that shows thoughts of the last turn only has no single text for an answer of two turns."""
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
        "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think></think>' }}{% endif %}"
    )
    turns = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": turns, "rejected": turns[:1]}
    good = {"prompt": "q2", "chosen": "x", "rejected": "y"}
    path = write_jsonl(tmp_path / "pairs.jsonl", [row, good])
    chat = ChatFormat(make_tokenizer(chat_template=template))
    settings = config(path)
    with pytest.raises(
        DataError, match=r"pairs.jsonl:1: the answer has several turns, .*; an answer in parts cannot be compared"
    ):
        tokenize_rows(settings, chat, read_rows(settings))
    settings = config(path, "data.skip_bad_rows=true")
    data = tokenize_rows(settings, chat, read_rows(settings))
    assert [pair.line for pair in data.train] == [2]


def test_a_batch_of_pairs_has_two_documents_each(tmp_path: Path) -> None:
    data = tokenized(config(rows_of(tmp_path / "pairs.jsonl", (4, 6), (30, 5))))
    pairs = list(data.train)
    batch = make_batch(pairs, True, 0, "cpu", dropout_rows=True)
    lengths = [length for pair in pairs for length in pair.lengths]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert (batch.num_examples, batch.num_tokens) == (2, sum(lengths))
    assert batch.compared is not None
    assert batch.compared.num_supervised.tolist() == [5, 7, 31, 6]
    assert batch.compared.of_supervised.bincount().tolist() == [5, 7, 31, 6]
    assert batch.compared.first_supervised == 36
    assert batch.compared.reference is None
    assert batch.dropout_rows is not None
    prompt = int(np.argmax(pairs[0].loss_mask))
    first, second = batch.dropout_rows[:prompt], batch.dropout_rows[lengths[0] : lengths[0] + prompt]
    assert first.tolist() == second.tolist(), "the prompt that both share has the same masks"


def test_a_plan_counts_pairs_as_training_does(tmp_path: Path, tiny_model: Path) -> None:
    path = rows_of(tmp_path / "pairs.jsonl", (4, 6), (90, 5), (3, 3))
    exact, estimated = read_data(config(path, model=str(tiny_model)), None)
    assert list(exact.lengths) == list(tokenized(config(path)).train.lengths)
    assert not estimated
    guessed, estimated = read_data(config(path, model="qwen2.5-0.5b"), None)
    assert (len(guessed.lengths), estimated) == (3, True)
    sequences = pair_sequences(read_examples(config(path).data).examples, "dpo", 0)
    assert len(sequences) == 6
    assert guessed.lengths[1] > guessed.lengths[0] > 20
