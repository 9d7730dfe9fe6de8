"""The questions as a part: choices by their likelihood, texts by their loss, each question asked once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import chat_rows, write_jsonl
from tunesmith.config import EvaluationConfig, ModelConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.formats import read_examples
from tunesmith.errors import DataError
from tunesmith.evaluation import subject as subjects
from tunesmith.evaluation.journal import Journal
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.task_part import TaskPart
from tunesmith.evaluation.tasks import Task, find_task
from tunesmith.hardware import probe
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import find_model, load_model
from tunesmith.types import Example


@pytest.fixture
def subject(tiny_model: Path, tiny_tokenizer: Any) -> Subject:
    config = ModelConfig(name=str(tiny_model))
    forward = ModelForward(load_model(find_model(config), config, probe("cpu"), "fp32").eval(), "cpu", "fp32")
    return Subject("tuned", forward, tiny_tokenizer, ChatFormat(tiny_tokenizer), EvaluationConfig(max_new_tokens=3))


def examples(path: Path, rows: list[dict[str, Any]]) -> list[Example]:
    return [row for row in read_examples(write_jsonl(path, rows)).examples if isinstance(row, Example)]


def log_prob(subject: Subject, ids: list[int], start: int) -> float:
    """Of ids[start:], by a plain forward."""
    with torch.no_grad():
        logits = subject.forward.base(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_the_likeliest_choice_is_the_answer(subject: Subject, tmp_path: Path) -> None:
    rows = examples(
        tmp_path / "rows.jsonl",
        [
            {"question": f"question {n}", "choices": ["one", "two", "three"][: 2 + n % 2], "answer": n % 2}
            for n in range(6)
        ],
    )
    part = TaskPart(find_task(rows, EvaluationConfig()), rows)
    part.check(subject.chat)
    answers = part.ask(subject)
    for row, found in zip(rows, answers, strict=True):
        assert row.messages is not None
        prompt = subject.chat.encode_prompt(row.messages[:-1])
        totals = {}
        for letter in row.choices:
            (whole,) = subject.chat.encode(
                [Example((*row.messages[:-1], row.messages[-1].__class__("assistant", letter)), None, "f", 1)]
            )
            supervised = [index for index, target in enumerate(whole.loss_mask) if target]
            assert supervised[0] == len(prompt)
            totals[letter] = log_prob(subject, whole.input_ids.tolist()[: supervised[-1] + 1], supervised[0])
        assert found.answer == max(totals, key=lambda letter: totals[letter])
        assert found.correct == (found.answer == row.messages[-1].content)
    result = part.score(answers, None)
    assert list(result.metrics) == ["accuracy", "exact_match"]
    assert result.metrics["accuracy"].value == sum(row.correct for row in answers) / 6


def test_labels_can_be_chosen_too(subject: Subject, tmp_path: Path) -> None:
    rows = examples(tmp_path / "rows.jsonl", chat_rows(12))
    labels = {row.messages[-1].content for row in rows if row.messages}
    part = TaskPart(Task("choice", "named", tuple(labels)), rows[:3])
    assert {row.answer for row in part.ask(subject)} <= labels
    many = [Example(row.messages and (*row.messages[:-1], row.messages[-1].__class__("assistant", f"{n}")), None, "f", n)
            for n, row in enumerate(rows * 17)]  # fmt: skip
    with pytest.raises(DataError, match=r"the rows have no choices and 204 different answers: a choice is between 200"):
        TaskPart(find_task(many, EvaluationConfig(task="choice")), many).check(subject.chat)


@pytest.mark.parametrize("window", [2048, 7])
def test_the_loss_of_texts(subject: Subject, tmp_path: Path, window: int) -> None:
    rows = examples(tmp_path / "rows.jsonl", [{"text": "sort your waste " * n + "é"} for n in (1, 5, 3)])
    part = TaskPart(find_task(rows, EvaluationConfig()), rows, window)
    part.check(subject.chat)
    losses = part.ask(subject)
    nats, tokens, size = 0.0, 0, 0
    for encoded, loss in zip(subject.chat.encode(rows), losses, strict=True):
        ids = encoded.input_ids.tolist()
        for start in range(0, len(ids) - 1, window - 1):
            piece = ids[start : start + window]
            nats -= log_prob(subject, piece, 1)
            tokens += len(piece) - 1
        assert loss.tokens == len(ids) - 1
        size += len(subject.tokenizer.decode(ids[1:]).encode())
    metrics = part.score(losses, None).metrics
    assert metrics["loss"].value == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert metrics["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert not any(one.higher_is_better or one.share for one in metrics.values())


def test_a_question_is_asked_once(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = examples(tmp_path / "rows.jsonl", chat_rows(3)) * 2
    sizes: list[int] = []
    real = subjects.generate_greedy

    def counting(forward: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        return real(forward, tokenizer, prompts, *rest)

    monkeypatch.setattr(subjects, "generate_greedy", counting)
    part = TaskPart(Task("text", "named"), rows)
    first = part.ask(subject)
    assert [row.answer for row in first[:3]] == [row.answer for row in first[3:]]
    assert part.ask(subject) == first
    assert sizes == [3]


def test_an_interrupted_evaluation_goes_on(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that were answered are not asked again; the answers are those of an uninterrupted one."""
    rows = examples(tmp_path / "rows.jsonl", chat_rows(8))
    part = TaskPart(Task("text", "named"), rows)
    subject.settings = EvaluationConfig(max_new_tokens=3, batch_size=2)
    whole = part.ask(subject)
    path = tmp_path / "run" / "journal.jsonl"
    path.parent.mkdir()
    seen: list[tuple[int, int]] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    def stopped() -> None:
        with Journal(path, {"weights": "a"}) as subject.journal:
            part.ask(subject)

    subject.progress = stop
    with pytest.raises(KeyboardInterrupt):
        stopped()
    seen.clear()
    subject.progress = lambda stage, done, total: seen.append((done, total))
    with Journal(path, {"weights": "a"}) as subject.journal:
        assert part.ask(subject) == whole
    assert seen == [(4, 8), (6, 8), (8, 8)]
