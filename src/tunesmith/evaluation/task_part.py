"""The user's own questions as a part of an evaluation: asked or scored as their task needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.chat import ChatFormat
from tunesmith.errors import DataError
from tunesmith.evaluation.answers import check_questions, encode_questions, generations
from tunesmith.evaluation.labels import Labels
from tunesmith.evaluation.metrics import normalize
from tunesmith.evaluation.parts import PartResult
from tunesmith.evaluation.statistics import Difference, Measured, Scores
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import Task, judged, score_answers
from tunesmith.models.likelihood import Likelihood
from tunesmith.types import Example, Generation, Message

MAX_CHOICES = 200
"""Answers that a row may be scored with; a file of more different answers is no choice."""

WINDOW = 2048
"""Tokens of a text that are read at once: the same for every run, whose losses could not be compared otherwise. Less where the model's
positions end before."""

EXCERPT = 300
"""Characters of a text that stand beside its loss."""

SCORED_BY_ROW = ("rouge1", "rouge2", "rougeL", "chrf")
"""Metrics of free texts that are means over rows: kept with each, so that runs can be compared without scoring again."""


@dataclass(frozen=True, slots=True)
class TextLoss:
    """One text's loss: the sum over its tokens in nats, how many were predicted, their bytes in UTF-8, and how the text begins."""

    nats: float
    tokens: int
    bytes: int
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class TaskPart:
    """`examples` as the task `task`. Texts are cut into windows of `window` tokens at most."""

    task: Task
    examples: Sequence[Example]
    window: int = WINDOW
    name: str = "task"

    def check(self, chat: ChatFormat) -> None:
        """Every row can be asked. Raises DataError."""
        if self.task.kind == "perplexity":
            self._texts(chat)
            return
        check_questions(self.examples)
        encode_questions(chat, self.examples)
        if self.task.kind == "choice":
            self._choices()

    def ask(self, subject: Subject) -> list[Generation] | list[TextLoss]:
        """Rows with what the model made of them."""
        whose = f"answers of the {subject.name} model"
        if self.task.kind == "perplexity":
            return self._text_losses(subject)
        if self.task.kind == "choice":
            return self._chosen(subject)
        texts = subject.generate(encode_questions(subject.chat, self.examples), whose)
        return judged(self.task, generations(self.examples, texts))

    def score(self, tuned: Any, base: Any | None) -> PartResult:
        """The task's metrics. `details`: kind, reason, classes, examples."""
        of = text_loss_scores if self.task.kind == "perplexity" else self._scores
        after, before = of(tuned), of(base) if base is not None else None
        return PartResult(
            measured_of(after),
            measured_of(before) if before is not None else None,
            differences_of(after, before) if before is not None else {},
            {
                "kind": self.task.kind,
                "reason": self.task.reason,
                "classes": self._classes(tuned, base) if self.task.kind == "label" else None,
                "examples": _loss_rows(tuned, base)
                if self.task.kind == "perplexity"
                else _answer_rows(tuned, base, after, before),
            },
        )

    def _scores(self, rows: Sequence[Generation]) -> dict[str, Scores]:
        return score_answers(self.task, rows)

    def _classes(self, tuned: Sequence[Generation], base: Sequence[Generation] | None) -> dict[str, Any]:
        labels = self.task.answers
        before = Labels(base, labels, normalize).report() if base is not None else None
        return {"tuned": Labels(tuned, labels, normalize).report(), "baseline": before}

    # -- choices ------------------------------------------------------------------------------------------------------

    def _choices(self) -> list[tuple[str, ...]]:
        """What each row may be answered with: its own choices, or every answer that the file has."""
        texts = self.task.answers
        if not all(example.choices for example in self.examples) and len(texts) > MAX_CHOICES:
            raise DataError(
                f"the rows have no choices and {len(texts)} different answers: a choice is between {MAX_CHOICES} at most; "
                "name another task"
            )
        return [example.choices or texts for example in self.examples]

    def _chosen(self, subject: Subject) -> list[Generation]:
        """The likeliest choice of each row: the log-probability of its tokens, the end of the turn among them, as in training."""
        choices = self._choices()
        rows = [
            replace(example, messages=(*example.messages[:-1], Message("assistant", choice)))
            for example, of_row in zip(self.examples, choices, strict=True)
            if example.messages is not None
            for choice in of_row
        ]
        requests = []
        for encoded in subject.chat.encode(rows, train_on="last"):
            ids, targets = encoded.input_ids.tolist(), np.flatnonzero(encoded.loss_mask)
            requests.append((ids[: targets[0]], ids[targets[0] : targets[-1] + 1]))
        found = iter(subject.log_likelihoods(requests, f"choices of the {subject.name} model"))
        answers = []
        for of_row in choices:
            totals = [next(found).total for _ in of_row]
            answers.append(of_row[totals.index(max(totals))])
        return judged(self.task, generations(self.examples, answers))

    # -- texts --------------------------------------------------------------------------------------------------------

    def _texts(self, chat: ChatFormat) -> list[list[int]]:
        """The token ids of each row: a text, or a conversation as it is trained on. Raises DataError for rows of no or several."""
        texts, problems = [], []
        for example in self.examples:
            encoded = chat.encode([example])
            if len(encoded) == 1 and len(encoded[0]) > 1:
                texts.append(encoded[0].input_ids.tolist())
            elif len(encoded) > 1:
                problems.append(
                    f"{example.where}: the chat template rewrites its earlier turns, so that it is no one text"
                )
            else:
                problems.append(f"{example.where}: fewer than two tokens have no loss")
        if problems:
            raise DataError(problems)
        return texts

    def _text_losses(self, subject: Subject) -> list[TextLoss]:
        """Each window's first token is read and not predicted."""
        texts = self._texts(subject.chat)
        limit = getattr(subject.forward.base.config.get_text_config(), "max_position_embeddings", None)
        step = min(self.window, limit or self.window) - 1
        windows = [[ids[start : start + step + 1] for start in range(0, len(ids) - 1, step)] for ids in texts]
        requests = [(window[:1], window[1:]) for of_text in windows for window in of_text]
        found = iter(subject.log_likelihoods(requests, f"texts under the {subject.name} model"))
        losses = []
        for example, ids, of_text in zip(self.examples, texts, windows, strict=True):
            parts: list[Likelihood] = [next(found) for _ in of_text]
            predicted = subject.tokenizer.decode(ids[1:])
            losses.append(
                TextLoss(
                    -math.fsum(part.total for part in parts),
                    sum(part.tokens for part in parts),
                    len(predicted.encode()),
                    example.line,
                    (example.text or predicted)[:EXCERPT],
                )
            )
        return losses


def measured_of(scores: dict[str, Scores]) -> dict[str, Measured]:
    """Each metric with its error."""
    return {name: one.measured() for name, one in scores.items()}


def differences_of(tuned: dict[str, Scores], base: dict[str, Scores]) -> dict[str, Difference]:
    """Each metric that both have, tuned minus base."""
    return {name: one.minus(base[name]) for name, one in tuned.items() if name in base}


def text_loss_scores(rows: Sequence[TextLoss]) -> dict[str, Scores]:
    """`loss` (nats a token), `perplexity` (its exponential) and `bits_per_byte`, which compares models with other tokenizers."""
    items = np.array([(row.nats, row.tokens, max(1, row.bytes)) for row in rows])

    def loss(texts: NDArray[np.float64]) -> float:
        return float(texts[:, 0].sum() / texts[:, 1].sum())

    def bits(texts: NDArray[np.float64]) -> float:
        return float(texts[:, 0].sum() / math.log(2) / texts[:, 2].sum())

    def of(statistic: Callable[[NDArray[np.float64]], float]) -> Scores:
        return Scores(len(rows), of=statistic, items=items, higher_is_better=False, share=False)

    return {"loss": of(loss), "perplexity": of(lambda s: math.exp(min(loss(s), 700.0))), "bits_per_byte": of(bits)}


def _answer_rows(
    tuned: Sequence[Generation],
    base: Sequence[Generation] | None,
    after: dict[str, Scores],
    before: dict[str, Scores] | None,
) -> list[dict[str, Any]]:
    """Of free texts each with its scores, as hardly one is right to the letter."""
    scored = {name: after[name].rows for name in SCORED_BY_ROW if name in after}
    of_base = {name: before[name].rows for name in scored} if before is not None else {}

    def scores_of(index: int) -> dict[str, float | None]:
        """Of both models."""
        found: dict[str, float | None] = {}
        for name, rows in scored.items():
            other = of_base.get(name)
            found |= {name: rows[index] if rows else None, f"baseline_{name}": other[index] if other else None}
        return found

    return [
        {
            "line": row.line,
            "prompt": row.prompt,
            "expected": row.expected,
            "answer": row.answer,
            "correct": row.correct,
            "baseline_answer": base[index].answer if base is not None else None,
            "baseline_correct": base[index].correct if base is not None else None,
            **scores_of(index),
        }
        for index, row in enumerate(tuned)
    ]


def _loss_rows(tuned: Sequence[TextLoss], base: Sequence[TextLoss] | None) -> list[dict[str, Any]]:
    return [
        {
            "line": row.line,
            "text": row.text,
            "tokens": row.tokens,
            "bytes": row.bytes,
            "loss": row.nats / row.tokens,
            "baseline_loss": base[index].nats / base[index].tokens if base is not None else None,
        }
        for index, row in enumerate(tuned)
    ]
