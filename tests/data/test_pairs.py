"""Preference rows as sequences, and their tokens as pairs."""

from __future__ import annotations

from collections.abc import Sequence
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
    chosen, rejected = pair_sequences([preference(4)], "simpo")
    assert [message.content for message in chosen.messages or ()] == ["ask 4", "good 4"]
    assert [message.content for message in rejected.messages or ()] == ["ask 4", "bad 4"]
    assert [message.train for message in rejected.messages or ()] == [False, None]
    assert (rejected.file, rejected.line) == ("f", 4)


def test_of_a_labelled_row_the_last_answer_counts() -> None:
    (found,) = pair_sequences([rated(2, False)], "kto")
    assert [message.content for message in found.messages or ()] == ["first 2", "then 2", "ask 2", "say 2"]
    assert [message.train for message in found.messages or ()] == [False, False, False, None], (
        "earlier answers are prompt"
    )
    assert found.desirable is False


def test_for_kto_a_preference_row_is_two() -> None:
    found = pair_sequences([preference(1), preference(2)], "kto")
    assert [row.desirable for row in found] == [True, False, True, False]
    assert [row.messages and row.messages[1].content for row in found] == ["good 1", "bad 1", "good 2", "bad 2"]


def kto_rows(path: Path, *answers: str, prompts: Sequence[str] | None = None) -> Path:
    prompts = prompts or [f"q{n}" for n in range(len(answers))]
    rows = zip(prompts, answers, strict=True)
    return write_jsonl(path, [{"prompt": p, "completion": c, "label": n % 2 == 0} for n, (p, c) in enumerate(rows)])


def answered(pair: TokenizedPair, number: int) -> tuple[str, str]:
    """Question and answer of one of a pair's sequences, as text."""
    side, tokenizer = pair.sequence(number), make_tokenizer()
    text = tokenizer.decode(side.input_ids[~side.loss_mask])
    return text.split("user\n")[1].split("<|im_end|>")[0], tokenizer.decode(side.input_ids[side.loss_mask])


def test_ktos_other_answers_are_those_of_other_rows_each_once(tmp_path: Path) -> None:
    answers = [letter * (n + 2) for n, letter in enumerate("abcdef")]
    path = kto_rows(tmp_path / "rated.jsonl", *answers)
    store = tokenized(config(path, "objective.name=kto")).train
    assert [answered(pair, 0) for pair in store] == [
        (f"q{n}", f"{answer}<|im_end|>") for n, answer in enumerate(answers)
    ]
    seconds = [answered(pair, 1) for pair in store]
    assert [prompt for prompt, _ in seconds] == [f"q{n}" for n in range(6)]
    assert sorted(answer for _, answer in seconds) == sorted(f"{answer}<|im_end|>" for answer in answers)
    assert all(answer != f"{own}<|im_end|>" for own, (_, answer) in zip(answers, seconds, strict=True))
    assert [pair.desirable for pair in store] == [True, False] * 3
    assert list(store.lengths) == [len(pair) for pair in store]
    again = tokenized(config(path, "objective.name=kto")).train
    assert [pair.input_ids.tolist() for pair in again] == [pair.input_ids.tolist() for pair in store]
    other = tokenized(config(path, "objective.name=kto", "training.seed=5"))
    assert [pair.input_ids.tolist() for pair in other.train] != [pair.input_ids.tolist() for pair in store]


def test_ktos_other_answers_are_to_other_prompts(tmp_path: Path) -> None:
    """Two answers to one question: neither stands for an answer to something else, if there is one."""
    path = kto_rows(tmp_path / "rated.jsonl", "aa", "bb", "cc", "dd", prompts=["p", "p", "q", "q"])
    for seed in range(5):
        store = tokenized(config(path, "objective.name=kto", f"training.seed={seed}")).train
        given = {"p": {"cc", "dd"}, "q": {"aa", "bb"}}
        for pair in store:
            prompt, answer = answered(pair, 1)
            assert answer.removesuffix("<|im_end|>") in given[prompt]
    alone = write_jsonl(tmp_path / "alone.jsonl", [{"prompt": "p", "chosen": "yes", "rejected": "no"}])
    pairs = tokenized(config(alone, "objective.name=kto")).train
    assert [answered(pair, 1)[1] for pair in pairs] == ["no<|im_end|>", "yes<|im_end|>"]


def test_a_row_that_fits_is_not_refused_for_anothers_answer(tmp_path: Path) -> None:
    """A long question with a short answer, and the other way round: the other answer is cut, and no row is said to be too long."""
    path = kto_rows(tmp_path / "rated.jsonl", "a", "b" * 60, prompts=["p" * 60, "q"])
    data = tokenized(config(path, "objective.name=kto", "data.max_seq_length=100"))
    assert [pair.line for pair in data.train] == [1, 2]
    first = data.train[0].sequence(1)
    assert len(first) == 100
    assert answered(data.train[0], 1)[1] == "b" * first.supervised
    assert max(max(pair.lengths) for pair in data.train) == 100


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
    assert any(
        note.startswith(f"{path}:1: the answer has several turns") and note.endswith("left out") for note in data.notes
    )
    assert not any("conversations became" in note for note in data.notes)


def test_answers_that_a_cut_made_equal_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": "q", "chosen": "same " * 20 + "good", "rejected": "same " * 20 + "bad"},
            {"prompt": "q2", "chosen": "x", "rejected": "y"},
        ],
    )
    settings = config(path, "data.max_seq_length=70", "data.overlong=truncate")
    message = r"pairs.jsonl:1: chosen and rejected are the same tokens once cut to data.max_seq_length; there is nothing to prefer"
    with pytest.raises(DataError, match=message):
        tokenized(settings)
    settings = config(path, "data.max_seq_length=70", "data.overlong=truncate", "data.skip_bad_rows=true")
    assert [pair.line for pair in tokenized(settings).train] == [2]


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
    sequences = pair_sequences(read_examples(config(path).data).examples, "dpo")
    assert len(sequences) == 6
    assert guessed.lengths[1] > guessed.lengths[0] > 20
