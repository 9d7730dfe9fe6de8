"""Ask a model held-out questions: every conversation is cut before its last answer, which the model must give.

Base and tuned model get the same token ids, the same greedy decoding and the same limit, so their answers differ by the
weights alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tunesmith.config import EvaluationConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import DataError
from tunesmith.evaluation.metrics import is_correct
from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import generate_greedy
from tunesmith.out_of_memory import Halving
from tunesmith.types import Example, Generation, PreferenceExample, Progress, no_progress

SAMPLE_SEED = 0
"""Draws the fixed sample of `evaluation.max_rows`: the same rows at every evaluation, whatever the run's seed."""


def sample_rows(examples: Sequence[Example], max_rows: int | None) -> list[Example]:
    """All examples, or a fixed random sample of `max_rows` of them in file order."""
    if max_rows is None or len(examples) <= max_rows:
        return list(examples)
    chosen = sorted(random.Random(SAMPLE_SEED).sample(range(len(examples)), max_rows))
    return [examples[index] for index in chosen]


def check_questions(examples: Sequence[Example | PreferenceExample]) -> None:
    """Raise DataError with a line for each example that is not a conversation which ends with an answer."""
    problems = []
    for example in examples:
        if isinstance(example, PreferenceExample):
            problems.append(
                f"{example.where}: a preference pair has no expected answer; evaluation needs conversations"
            )
        elif example.messages is None:
            problems.append(f"{example.where}: plain text has no question to answer; evaluation needs conversations")
        elif example.messages[-1].tool_calls:
            problems.append(f"{example.where}: the last turn calls tools; only a text can be compared with an answer")
        elif example.messages[-1].role != "assistant":
            problems.append(f"{example.where}: the conversation does not end with the assistant: no expected answer")
    if problems:
        raise DataError(problems)


def encode_questions(chat: ChatFormat, examples: Sequence[Example]) -> list[list[int]]:
    """The prompt of each example: all before its last answer. Raises DataError with a line for each that has none."""
    check_questions(examples)
    prompts: list[list[int]] = []
    problems: list[str] = []
    for example in examples:
        assert example.messages is not None
        try:
            prompts.append(chat.encode_prompt(example.messages[:-1], example.tools))
        except DataError as error:
            problems.append(f"{example.where}: {error}")
    if problems:
        raise DataError(problems)
    return prompts


def generate_answers(
    forward: ModelForward,
    tokenizer: Any,
    chat: ChatFormat,
    examples: Sequence[Example],
    settings: EvaluationConfig,
    progress: Progress = no_progress,
    stage: str = "generating answers",
    halving: Halving | None = None,
) -> list[Generation]:
    """The model's greedy answer to each example's last question, in the examples' order.

    Batches that run out of memory are halved: by `halving`, or else for these answers alone, which `progress` is told.
    """
    prompts = encode_questions(chat, examples)
    progress(stage, 0, len(prompts))
    answers = generate_greedy(
        forward,
        tokenizer,
        prompts,
        settings.max_new_tokens,
        settings.batch_size,
        lambda done: progress(stage, done, len(prompts)),
        halving or Halving(lambda text: progress(text, 0, 1)),
    )
    return generations(examples, [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers])


def generations(examples: Sequence[Example], answers: Sequence[str]) -> list[Generation]:
    """Questions, expected answers and answers as rows; right is what equals the expected one but for case, quotes and stops."""
    rows = []
    for example, answer in zip(examples, answers, strict=True):
        assert example.messages is not None
        question, expected = example.messages[-2].content, example.messages[-1].content
        rows.append(Generation(question, expected, answer, is_correct(expected, answer), example.line))
    return rows
