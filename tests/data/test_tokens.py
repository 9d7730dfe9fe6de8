"""Tokens: fitted to the longest length, kept by content, made in processes, and never anybody else's."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny import CHATML, IM_END, make_tokenizer
from tunesmith.config import DataConfig
from tunesmith.data import tokens
from tunesmith.data.chat import ChatFormat
from tunesmith.data.tokens import Tokenized, changed_since_kept, tokenize
from tunesmith.types import Example, Message

LENGTHS = {1: 20, 2: 100, 3: 30, 4: 200}
"""Tokens of the plain texts of `rows`, by line."""


def text(content: str, line: int) -> Example:
    return Example(None, content, "f.jsonl", line)


def chat(question: str, answer: str, line: int) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), None, "f.jsonl", line)


def chats(count: int) -> list[Example]:
    return [chat(f"question {line} {'x' * (line % 50)}", f"answer {line}", line) for line in range(1, count + 1)]


@pytest.fixture
def rows() -> list[Example]:
    return [text("x" * (length - 1), line) for line, length in LENGTHS.items()]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture(scope="module")
def chatml(tiny_tokenizer: Any) -> ChatFormat:
    return ChatFormat(tiny_tokenizer)


def run(format: ChatFormat, examples: list[Example], **settings: Any) -> Tokenized:
    return tokenize(format, examples, DataConfig(path="f.jsonl", **settings))


def said(result: Tokenized) -> list[str]:
    return [f"{finding.severity} {finding.check} {finding}" for finding in result.findings]


def content(result: Tokenized) -> list[tuple[list[int], list[bool], int]]:
    return [(e.input_ids.tolist(), e.loss_mask.tolist(), e.line) for e in result.examples]


# -- too long ---------------------------------------------------------------------------------------------------------


def test_a_long_conversation_is_an_error_by_default(chatml: ChatFormat) -> None:
    result = run(chatml, [chat("x" * 80, "y", 1), chat("x", "y", 2)], max_seq_length=64)
    assert [e.line for e in result.examples] == [2]
    assert said(result) == [
        "error too_long f.jsonl:1: 102 tokens, data.max_seq_length is 64; raise it, or set data.overlong to truncate, "
        "split or drop"
    ]


def test_a_long_text_is_split_by_default_and_every_token_is_predicted_once(chatml: ChatFormat) -> None:
    letters = "".join(chr(97 + i % 26) for i in range(199))
    result = run(chatml, [text(letters, 1)], max_seq_length=64)
    assert said(result) == ["warning split f.jsonl:1: 200 tokens, data.max_seq_length is 64; split into 4 examples"]
    assert [len(e) for e in result.examples] == [64, 64, 64, 11]
    predicted = [token for e in result.examples for token in e.input_ids.tolist()[1:]]
    assert chatml.tokenizer.decode(predicted) == letters[1:] + IM_END
    assert sum(e.supervised for e in result.examples) == 199
    assert {e.line for e in result.examples} == {1}


def test_an_example_of_just_the_longest_length_is_kept(chatml: ChatFormat, rows: list[Example]) -> None:
    result = run(chatml, rows, max_seq_length=200)
    assert [len(example) for example in result.examples] == [20, 100, 30, 200]
    assert result.findings == []


@pytest.mark.parametrize(
    ("overlong", "kept", "messages"),
    [
        ("error", {1: 20, 3: 30}, ["error too_long f.jsonl:{}: {} tokens, data.max_seq_length is 64; raise it, or set "
                                   "data.overlong to truncate, split or drop"]),
        ("drop", {1: 20, 3: 30}, ["warning dropped f.jsonl:{}: {} tokens, data.max_seq_length is 64; left out"]),
        ("truncate", {1: 20, 2: 64, 3: 30, 4: 64},
         ["warning truncated f.jsonl:{}: {} tokens, data.max_seq_length is 64; cut to its first 64 tokens"]),
    ],
)  # fmt: skip
def test_what_is_done_to_long_rows(
    chatml: ChatFormat, rows: list[Example], overlong: str, kept: dict[int, int], messages: list[str]
) -> None:
    result = run(chatml, rows, max_seq_length=64, overlong=overlong)
    assert {example.line: len(example) for example in result.examples} == kept
    assert all(len(example.loss_mask) == len(example.input_ids) for example in result.examples)
    assert said(result) == [messages[0].format(line, LENGTHS[line]) for line in (2, 4)]


def test_a_row_whose_answer_is_cut_away_is_an_error(chatml: ChatFormat) -> None:
    result = run(chatml, [chat("x" * 80, "y", 1), chat("x", "y", 2)], max_seq_length=64, overlong="truncate")
    assert [e.line for e in result.examples] == [2]
    assert said(result)[1] == (
        "error nothing_supervised f.jsonl:1: no supervised token is left once cut to data.max_seq_length; there is nothing "
        "to learn from this row; raise data.max_seq_length, or set data.overlong: drop"
    )


def test_a_split_conversation_keeps_the_pieces_that_teach(chatml: ChatFormat) -> None:
    result = run(chatml, [chat("x" * 200, "the answer", 1)], max_seq_length=64, overlong="split")
    (example,) = result.examples
    assert example.supervised == len(b"the answer") + 1
    assert said(result) == ["warning split f.jsonl:1: 231 tokens, data.max_seq_length is 64; split into 4 examples"]


def test_auto_is_p95_with_room_and_never_beyond_the_model(chatml: ChatFormat) -> None:
    examples = [text("x" * 99, line) for line in range(1, 100)] + [text("x" * 999, 100)]
    settings = DataConfig(path="f", max_seq_length="auto", overlong="drop")
    assert tokenize(chatml, examples, settings).max_seq_length == 128
    limited = tokenize(chatml, examples, settings, model_limit=110)
    assert limited.max_seq_length == 110
    assert len(limited.examples) == 99


# -- notes ------------------------------------------------------------------------------------------------------------


def test_added_end_tokens_and_unrolled_turns_are_said(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    format = ChatFormat(make_tokenizer(), str(path))
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    result = run(format, [Example(turns, None, "f.jsonl", 1), chat("e", "f", 2)])
    assert [format.tokenizer.decode(e.input_ids[e.loss_mask]) for e in result.examples] == [
        f"b{IM_END}", f"d{IM_END}", f"f{IM_END}",
    ]  # fmt: skip
    assert said(result) == [
        f"warning no_end_token f.jsonl: the chat template ({path}) writes no end token after an answer; '<|im_end|>' is "
        "added to each and trained, so that the model learns to stop",
        "warning unrolled f.jsonl: no single text shows every answer of these conversations as the model has to write it "
        f"(the chat template, {path}, writes no end token); 2 conversations became 3 examples, each cut after the answer "
        "that it teaches",
    ]


def test_rows_that_the_template_refuses_are_named_and_the_rest_is_there(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{% if 'no' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + CHATML)
    result = run(
        ChatFormat(make_tokenizer(), str(path)), [chat("yes", "b", 1), chat("no", "b", 2), chat("yes", "c", 3)]
    )
    assert [e.line for e in result.examples] == [1, 3]
    assert said(result) == ["error template f.jsonl:2: the chat template refuses this conversation: no"]


# -- processes and the cache ------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_ROWS", 16)


def count_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    plain = tokens._tokenize_shard

    def counted(chat: ChatFormat, examples: Any, train_on: str) -> Any:
        made.append(len(examples))
        return plain(chat, examples, train_on)

    monkeypatch.setattr(tokens, "_tokenize_shard", counted)
    return made


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_processes_give_what_one_process_gives(chatml: ChatFormat, small_shards: None) -> None:
    examples = [*chats(70), chat(f"a {IM_END}", "b", 71)]
    seen: list[tuple[str, int, int]] = []
    one = run(chatml, examples, cache=False, num_proc=1)
    settings = DataConfig(path="f", cache=False, num_proc=2)
    two = tokenize(chatml, examples, settings, progress=lambda *step: seen.append(step))
    assert content(two) == content(one)
    assert said(two) == said(one)
    assert [done for _, done, _ in seen] == [0, 16, 32, 48, 64, 71]
    assert {(stage, total) for stage, _, total in seen} == {("tokenizing", 71)}


def test_what_was_tokenized_is_not_tokenized_again(
    chatml: ChatFormat, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_made(monkeypatch)
    examples = [*chats(40), chat(f"a {IM_END}", "b", 41)]
    first = run(chatml, examples)
    assert made == [16, 16, 9]
    again = run(chatml, examples)
    assert made == [16, 16, 9]
    assert content(again) == content(first)
    assert said(again) == said(first)
    assert again.examples.digest() == first.examples.digest()
    # Elsewhere in the same file, and in another: the tokens are the same, the places are not.
    moved = [replace(example, file="g.jsonl", line=example.line + 5) for example in examples]
    assert [e.where for e in run(chatml, moved).examples][:2] == ["g.jsonl:6", "g.jsonl:7"]
    assert len(made) == 3
    # Rows appended: only the last, unfinished shard is new. A changed row: only its shard.
    run(chatml, [*examples, chat("new", "row", 42)])
    run(chatml, [chat("changed", "row", 1), *examples[1:]])
    assert made == [16, 16, 9, 10, 16]


@pytest.mark.parametrize("what", ["template", "variables", "tokenizer", "train_on", "off"])
def test_tokens_of_other_settings_are_never_used(
    chatml: ChatFormat, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    examples = chats(5)
    run(chatml, examples)
    made = count_made(monkeypatch)
    other, settings = chatml, {}
    if what == "template":
        other = ChatFormat(chatml.tokenizer, "alpaca")
    elif what == "variables":
        other = ChatFormat(chatml.tokenizer, "auto", {"tone": "dry"})
    elif what == "tokenizer":
        other = ChatFormat(make_tokenizer(merges=[("q", "u")]))
    elif what == "train_on":
        settings = {"train_on": "all"}
    else:
        settings = {"cache": False}
    fresh = run(other, examples, **settings)
    assert made == [5]
    assert content(fresh) == content(
        run(other, examples, cache=False, **{k: v for k, v in settings.items() if k != "cache"})
    )


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other"])
def test_a_damaged_cache_is_not_used(
    chatml: ChatFormat, cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = chats(5)
    whole = content(run(chatml, examples))
    (file,) = cache.glob("*.tokens")
    data = bytearray(file.read_bytes())
    if damage == "bit":
        data[-3] ^= 1
    file.write_bytes({"cut": data[:-7], "bit": data, "empty": b"", "other": b"\0" * len(data)}[damage])
    made = count_made(monkeypatch)
    assert content(run(chatml, examples)) == whole
    assert made == [5]
    assert content(run(chatml, examples)) == whole
    assert made == [5], "the damaged shard was replaced"


def test_an_interrupted_run_keeps_the_shards_that_were_done(
    chatml: ChatFormat, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = chats(64)

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(chatml, examples, DataConfig(path="f", num_proc=1), progress=interrupt)
    made = count_made(monkeypatch)
    result = run(chatml, examples)
    assert len(result.examples) == 64
    assert made == [16, 16], "two of four were kept; the third was made, but not yet kept"


def test_a_template_that_prints_the_date_is_cached_for_that_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    first, same_day, later = (
        ChatFormat(make_tokenizer(), str(path), now=datetime(2001, 1, day, hour))
        for day, hour in ((1, 2), (1, 9), (2, 2))
    )
    found = run(first, chats(3))
    assert first.tokenizer.decode(found.examples[0].input_ids).startswith("2001-01-01<|im_start|>")
    made = count_made(monkeypatch)
    run(same_day, chats(3))
    assert made == []
    again = run(later, chats(3))
    assert made == [3]
    assert first.tokenizer.decode(again.examples[0].input_ids).startswith("2001-01-02<|im_start|>")


def test_a_cache_that_cannot_be_written_is_gone_without(
    chatml: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    assert len(run(chatml, chats(5)).examples) == 5


def test_shards_that_nobody_uses_are_removed(chatml: ChatFormat, cache: Path) -> None:
    run(chatml, chats(5))
    run(chatml, chats(4))
    old, used = sorted(cache.glob("*.tokens"), key=lambda path: path.stat().st_mtime)
    for path in (old, used):
        os.utime(path, (0, time.time() - 31 * 86400))
    run(chatml, chats(4))
    assert list(cache.glob("*.tokens")) == [used]


def test_a_changed_file_is_said_once() -> None:
    assert changed_since_kept("a.jsonl", "1" * 64) is None
    assert changed_since_kept("a.jsonl", "1" * 64) is None
    finding = changed_since_kept("a.jsonl", "2" * 64)
    assert finding is not None
    assert (finding.check, finding.severity) == ("changed_file", "warning")
    assert str(finding) == "a.jsonl: the file has changed since its tokens were kept; new rows are tokenized anew"
    assert changed_since_kept("a.jsonl", "2" * 64) is None
    assert changed_since_kept("b.jsonl", "2" * 64) is None


# -- the store --------------------------------------------------------------------------------------------------------


def test_the_store_is_a_sequence_of_views(chatml: ChatFormat) -> None:
    store = run(chatml, chats(5)).examples
    assert len(store) == 5
    assert [e.line for e in store] == [1, 2, 3, 4, 5]
    assert store[-1].where == "f.jsonl:5"
    assert [e.line for e in store[1:3]] == [2, 3]
    with pytest.raises(IndexError):
        store[5]
    assert store[0].input_ids.base is not None, "a view, not a copy"
    assert (store[0].input_ids.dtype, store[0].loss_mask.dtype) == (np.int32, np.bool_)


def test_the_digest_sees_every_token_mask_and_border(chatml: ChatFormat) -> None:
    def digest(*examples: Example, **settings: Any) -> str:
        return run(chatml, list(examples), **settings).examples.digest()

    first = digest(chat("ab", "c", 1), chat("d", "e", 2))
    assert first == digest(chat("ab", "c", 8), chat("d", "e", 9))
    assert len({first, digest(chat("ab", "x", 1), chat("d", "e", 2)), digest(chat("d", "e", 1), chat("ab", "c", 2)),
                digest(chat("ab", "c", 1), chat("d", "e", 2), train_on="all")}) == 4  # fmt: skip


def test_no_examples(chatml: ChatFormat) -> None:
    result = run(chatml, [])
    assert (len(result.examples), result.findings) == (0, [])
