"""What kind of task a file of questions is, and what is measured of its answers.

| task | the data | metrics |
|---|---|---|
| `perplexity` | plain text | loss, perplexity, bits_per_byte |
| `choice` | questions with `choices` | accuracy: the right choice is the likeliest |
| `json` | all expected answers are JSON objects or lists | accuracy: equal values; json_valid, json_fields, json_schema |
| `number` | all end with `#### N`, or are numbers that hardly repeat | accuracy: the same last number |
| `label` | few short answers that repeat | accuracy: equal without case, quotes and stops; macro_f1, micro_f1; per class; confusions |
| `text` | anything else | rouge1, rouge2, rougeL, bleu, chrf |
| `regex` | only by name, with `evaluation.pattern` | accuracy: the pattern is found in the answer |

All whose answers are generated have `exact_match` too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.config import EvaluationConfig, TaskName
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation.custom import UserMetric, custom_scores, load_metric
from tunesmith.evaluation.labels import Labels
from tunesmith.evaluation.metrics import is_correct, is_exact, normalize
from tunesmith.evaluation.statistics import Scores
from tunesmith.evaluation.structured import (
    ANSWER_MARK,
    NOT_JSON,
    is_structure,
    json_equal,
    json_fields,
    last_number,
    number_match,
    obeys,
    read_json,
    read_schema,
)
from tunesmith.evaluation.texts import ROUGE, text_scores
from tunesmith.types import Example, Generation

MAX_LABELS = 200
MAX_LABEL_LENGTH = 60
"""Characters. Longer answers are texts, however often they repeat."""

ROWS_PER_LABEL = 2
"""At least so many rows to a label, on average."""


TASK_METRICS: dict[str, tuple[str, ...]] = {
    "label": ("accuracy", "exact_match", "macro_f1", "micro_f1"),
    "json": ("accuracy", "exact_match", "json_valid", "json_fields", "json_schema"),
    "number": ("accuracy", "exact_match"),
    "regex": ("accuracy", "exact_match"),
    "text": ("exact_match", *ROUGE, "bleu", "chrf"),
}
"""Metrics of the tasks whose answers are generated."""


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of task, why it was taken for it, and what its metrics need. `answers` are the different answers of the whole file, where it is
    one of labels or of choices between them."""

    kind: TaskName
    reason: str
    answers: tuple[str, ...] = ()
    schema: Any = None
    pattern: re.Pattern[str] | None = None
    user_metrics: tuple[tuple[str, UserMetric], ...] = field(default=())

    @property
    def main_metric(self) -> str:
        """The metric that a run is judged by where none is named."""
        return {"perplexity": "loss", "text": "rougeL"}.get(self.kind, "accuracy")

    @property
    def generates(self) -> bool:
        """Whether answers are generated, rather than given texts scored."""
        return self.kind not in ("choice", "perplexity")


def find_task(examples: Sequence[Example], settings: EvaluationConfig) -> Task:
    """The task that `settings` name, or that the rows' shape says. Raises ConfigError for settings that it would not use, and DataError
    for rows that have no such task."""
    kind, reason = (settings.task, "named") if settings.task != "auto" else _kind_of(examples)
    problems = []
    if settings.json_schema and kind != "json":
        problems.append(f"evaluation.json_schema applies to the task json; this is {kind} ({reason})")
    if settings.pattern and kind != "regex":
        problems.append(f"evaluation.pattern applies to the task regex; this is {kind} ({reason})")
    if kind == "regex" and not settings.pattern:
        problems.append("the task regex needs evaluation.pattern, a regular expression that right answers contain")
    if settings.metrics and kind in ("choice", "perplexity"):
        problems.append(f"evaluation.metrics apply to generated answers; the task {kind} has none")
    if problems:
        raise ConfigError(problems)
    _refuse_other_rows(kind, examples)
    expected = (example.messages[-1].content for example in examples if example.messages)
    return Task(
        kind,
        reason,
        tuple(dict.fromkeys(expected)) if kind in ("label", "choice") else (),
        read_schema(settings.json_schema) if settings.json_schema else None,
        re.compile(settings.pattern) if settings.pattern else None,
        tuple(map(load_metric, settings.metrics)),
    )


def find_training_task(examples: Sequence[Example], settings: EvaluationConfig) -> Task:
    """The task of answers that are generated during training, where the letter of a choice is generated too."""
    task = find_task(examples, settings)
    if task.kind == "perplexity":
        raise ConfigError(
            "evaluation.task perplexity generates nothing, and the loss is always computed; set evaluation.generate: false"
        )
    return replace(task, kind="label") if task.kind == "choice" else task


def generated_metrics(kind: str) -> list[str]:
    """The metrics of generated answers of a task (`auto`: of any) that are known before they are asked for."""
    kinds = TASK_METRICS if kind == "auto" else (kind,)
    return list(dict.fromkeys(name for one in kinds for name in TASK_METRICS.get(one, TASK_METRICS["label"])))


def may_measure(task: Task, metric: str) -> bool:
    """Whether a task measures a metric, as far as that is known before: a user's function may give several, `FUNCTION.NAME`."""
    known = ("loss", "perplexity", "bits_per_byte") if task.kind == "perplexity" else ("accuracy", "exact_match")
    own = [name for name, _ in task.user_metrics]
    return metric in (*known, *TASK_METRICS.get(task.kind, ()), *own) or metric.partition(".")[0] in own


def _kind_of(examples: Sequence[Example]) -> tuple[TaskName, str]:
    if all(example.messages is None for example in examples):
        return "perplexity", "the rows are plain text"
    if all(example.choices for example in examples):
        return "choice", "the rows have choices"
    answers = [example.messages[-1].content for example in examples if example.messages]
    n = len(answers)
    if all(map(is_structure, answers)):
        return "json", "the expected answers are JSON"
    if all(ANSWER_MARK in text and last_number(text) is not None for text in answers):
        return "number", f"the expected answers end with {ANSWER_MARK} and a number"
    labels = {normalize(text) for text in answers}
    classified = all(example.label is not None for example in examples)
    short = all(len(text) <= MAX_LABEL_LENGTH and "\n" not in text.strip() for text in answers)
    if short and len(labels) <= MAX_LABELS and (classified or ROWS_PER_LABEL * len(labels) <= n):
        return "label", f"{len(labels)} short answers, {n} rows"
    if all(re.fullmatch(r"[^\w]*[\d.,]+[^\w]*", text.strip()) and last_number(text) is not None for text in answers):
        return "number", "the expected answers are numbers"
    return "text", "the expected answers are texts of their own"


def _refuse_other_rows(kind: TaskName, examples: Sequence[Example]) -> None:
    """Rows that the task cannot use, all at once."""
    problems = []
    for example in examples:
        expected = example.messages[-1].content if example.messages else ""
        if example.messages is None and kind != "perplexity":
            problems.append(f"{example.where}: plain text has no question to answer; only the task perplexity takes it")
        elif kind == "json" and read_json(expected) is NOT_JSON:
            problems.append(
                f"{example.where}: the expected answer is not JSON: {expected[:60]!r}; set another evaluation.task"
            )
        elif kind == "number" and last_number(expected) is None:
            problems.append(
                f"{example.where}: the expected answer holds no number: {expected[:60]!r}; set another evaluation.task"
            )
    if problems:
        raise DataError(problems)


# -- generated answers ------------------------------------------------------------------------------------------------


def is_right(task: Task, expected: str, answer: str) -> bool:
    """Whether an answer is right by the task's own test."""
    if task.kind == "json":
        found = read_json(answer)
        return found is not NOT_JSON and json_equal(read_json(expected), found)
    if task.kind == "number":
        return number_match(expected, answer)
    if task.kind == "regex":
        assert task.pattern is not None
        return task.pattern.search(answer) is not None
    return is_correct(expected, answer)


def judged(task: Task, rows: Sequence[Generation]) -> list[Generation]:
    """The rows with `correct` by the task's test."""
    return [
        Generation(row.prompt, row.expected, row.answer, is_right(task, row.expected, row.answer), row.line)
        for row in rows
    ]


def score_answers(task: Task, rows: Sequence[Generation]) -> dict[str, Scores]:
    """Every metric of the task, from rows that `judged` saw. At least one row is needed."""
    n = len(rows)
    right = Scores(n, tuple(float(row.correct) for row in rows))
    scores = {} if task.kind == "text" else {"accuracy": right}
    scores["exact_match"] = Scores(n, tuple(float(is_exact(row.expected, row.answer)) for row in rows))
    if task.kind == "label":
        scores |= Labels(rows, task.answers, normalize).scores()
    elif task.kind == "json":
        answers = [read_json(row.answer) for row in rows]
        expected = [read_json(row.expected) for row in rows]
        scores["json_valid"] = Scores(n, tuple(float(answer is not NOT_JSON) for answer in answers))
        scores["json_fields"] = Scores(n, tuple(map(json_fields, expected, answers)))
        if task.schema is not None:
            scores["json_schema"] = Scores(n, tuple(float(obeys(task.schema, answer)) for answer in answers))
    elif task.kind == "text":
        scores |= text_scores(rows)
    for name, function in task.user_metrics:
        added = custom_scores(name, function, rows)
        if taken := sorted(added.keys() & scores.keys()):
            raise ConfigError(
                f"the metric {taken[0]} of evaluation.metrics has the name of a metric of the task {task.kind}"
            )
        scores |= added
    return scores
