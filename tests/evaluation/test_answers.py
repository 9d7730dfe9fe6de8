"""Asking a model the held-out questions: which rows, which prompts, what is made of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from out_of_memory import REASON, fail_at
from tiny import chat_rows, write_jsonl
from tunesmith.config import EvaluationConfig, ModelConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.formats import read_examples
from tunesmith.errors import DataError
from tunesmith.evaluation import answers
from tunesmith.evaluation.answers import check_questions, encode_questions, generate_answers, sample_rows
from tunesmith.hardware import probe
from tunesmith.models import generate
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import find_model, load_model
from tunesmith.types import Example, Generation, Message


def conversation(line: int, *turns: tuple[str, str]) -> Example:
    return Example(tuple(Message(role, content) for role, content in turns), None, "rows.jsonl", line)  # type: ignore[arg-type]


def questions(count: int) -> list[Example]:
    return [conversation(n, ("user", f"question {n}"), ("assistant", f"answer {n}")) for n in range(1, count + 1)]


@pytest.fixture(scope="module")
def forward(tiny_model: Path) -> ModelForward:
    config = ModelConfig(name=str(tiny_model))
    return ModelForward(load_model(find_model(config), config, probe("cpu"), "fp32").eval(), "cpu", "fp32")


class Spy:
    """Stands for `generate_greedy`: notes what it was given and answers from a list."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.tokenizer = tokenizer
        self.texts = texts
        self.prompts: list[list[int]] = []

    def __call__(
        self,
        forward: Any,
        tokenizer: Any,
        prompts: Any,
        max_new_tokens: int,
        batch_size: int,
        on_progress: Any,
        halving: Any,
    ) -> list[list[int]]:
        self.prompts = [list(prompt) for prompt in prompts]
        self.settings = (max_new_tokens, batch_size)
        on_progress(len(prompts))
        return [self.tokenizer(text)["input_ids"] for text in self.texts]


# -- which rows -------------------------------------------------------------------------------------------------------


def test_a_sample_is_fixed_and_in_file_order() -> None:
    rows = questions(100)
    sample = sample_rows(rows, 10)
    assert [row.line for row in sample] == [6, 34, 39, 50, 52, 54, 62, 63, 66, 98]
    assert sample_rows(rows, 10) == sample
    assert sample_rows(questions(100), 10) == sample


@pytest.mark.parametrize("limit", [None, 5, 6, 1000])
def test_without_a_limit_below_their_number_all_rows_are_taken(limit: int | None) -> None:
    rows = questions(5)
    assert sample_rows(rows, limit) == rows


def test_questions_need_an_expected_answer() -> None:
    check_questions(questions(3))
    with pytest.raises(DataError) as caught:
        check_questions([*questions(1), conversation(7, ("user", "a"), ("assistant", "b"), ("user", "c"))])
    assert caught.value.problems == [
        "rows.jsonl:7: the conversation does not end with the assistant: no expected answer"
    ]


def test_plain_text_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('\n\n{"text": "some prose"}\n{"text": "more"}\n')
    with pytest.raises(DataError) as caught:
        check_questions(read_examples(path).examples)
    assert caught.value.problems == [
        f"{path}:{line}: plain text has no question to answer; evaluation needs conversations" for line in (3, 4)
    ]


# -- what is asked and what comes of it -------------------------------------------------------------------------------


def test_a_prompt_is_everything_before_the_last_answer(
    forward: ModelForward, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        conversation(4, ("user", "one?"), ("assistant", "first"), ("user", "two?"), ("assistant", "Second")),
        conversation(9, ("system", "be brief"), ("user", "three?"), ("assistant", "third")),
    ]
    spy = Spy(tiny_tokenizer, ["second.", "3rd<|im_end|>"])
    monkeypatch.setattr(answers, "generate_greedy", spy)
    settings = EvaluationConfig(max_new_tokens=5, batch_size=3)
    found = generate_answers(forward, tiny_tokenizer, ChatFormat(tiny_tokenizer), rows, settings)
    assert [tiny_tokenizer.decode(prompt) for prompt in spy.prompts] == [
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthree?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert spy.settings == (5, 3)
    assert found == [
        Generation("two?", "Second", "second.", True, 4),
        Generation("three?", "third", "3rd", False, 9),  # control tokens are no part of an answer's text
    ]


def test_answers_come_in_the_order_of_the_rows(forward: ModelForward, tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = read_examples(write_jsonl(tmp_path / "rows.jsonl", chat_rows(7))).examples
    chat = ChatFormat(tiny_tokenizer)
    settings = EvaluationConfig(max_new_tokens=6, batch_size=3)
    together = generate_answers(forward, tiny_tokenizer, chat, rows, settings)
    alone = [generate_answers(forward, tiny_tokenizer, chat, [row], settings)[0] for row in rows]
    assert together == alone
    assert [row.line for row in together] == [1, 2, 3, 4, 5, 6, 7]
    assert [row.expected for row in together] == [row["messages"][1]["content"] for row in chat_rows(7)]


def test_progress_counts_rows(forward: ModelForward, tiny_tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    settings = EvaluationConfig(max_new_tokens=1, batch_size=2)
    generate_answers(
        forward,
        tiny_tokenizer,
        ChatFormat(tiny_tokenizer),
        questions(5),
        settings,
        lambda stage, done, total: seen.append((stage, done, total)),
        "asking",
    )
    assert seen == [("asking", done, 5) for done in (0, 2, 4, 5)]


def test_answers_that_run_out_of_memory_are_the_same_and_progress_is_told(
    forward: ModelForward, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    settings = EvaluationConfig(max_new_tokens=3, batch_size=4)
    chat = ChatFormat(tiny_tokenizer)
    plain = generate_answers(forward, tiny_tokenizer, chat, questions(5), settings)
    fail_at(monkeypatch, generate, "_generate_batch", {1})
    found = generate_answers(
        forward, tiny_tokenizer, chat, questions(5), settings, lambda *told: seen.append(told), "asking"
    )
    assert found == plain
    line = f"answering 4 prompts at once ran out of memory and is done again; from now on half as many: {REASON}"
    assert seen == [("asking", 0, 5), (line, 0, 1), ("asking", 2, 5), ("asking", 4, 5), ("asking", 5, 5)]


def test_every_question_that_cannot_be_encoded_is_named(tiny_tokenizer: Any) -> None:
    rows = [conversation(line, ("user", f"hi\ufdd0{line}"), ("assistant", "yes")) for line in (4, 7)]
    with pytest.raises(DataError) as caught:
        encode_questions(ChatFormat(tiny_tokenizer), [*questions(3), *rows])
    assert caught.value.problems == [
        f"rows.jsonl:{line}: the user text holds a Unicode noncharacter (U+FDD0 to U+FDD9); remove it"
        for line in (4, 7)
    ]


def test_a_row_without_an_answer_is_refused_before_anything_is_generated(
    forward: ModelForward, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "generate_greedy", lambda *_: pytest.fail("generated"))
    rows = [*questions(2), Example(None, "prose", "rows.jsonl", 3)]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: plain text"):
        generate_answers(forward, tiny_tokenizer, ChatFormat(tiny_tokenizer), rows, EvaluationConfig())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_after_an_interruption(forward: ModelForward, tiny_tokenizer: Any, training: bool) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    forward.model.train(training)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate_answers(
                forward,
                tiny_tokenizer,
                ChatFormat(tiny_tokenizer),
                questions(2),
                EvaluationConfig(max_new_tokens=1),
                interrupt,
            )
        assert forward.model.training is training
    finally:
        forward.model.eval()
