"""Which task a file's rows are, what is right in it, and which settings it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import EvaluationConfig
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation.tasks import (
    TASK_METRICS,
    Task,
    find_task,
    find_training_task,
    generated_metrics,
    is_right,
    judged,
    score_answers,
)
from tunesmith.types import Example, Generation, Message

SENTENCES = [f"This is sentence {n}, which says something of its own." for n in range(8)]


def asked(answer: str, line: int = 1, **more: Any) -> Example:
    return Example((Message("user", "question"), Message("assistant", answer)), None, "rows.jsonl", line, **more)


def rows(*answers: str) -> list[Example]:
    return [asked(answer, line) for line, answer in enumerate(answers, 1)]


def texts(*texts: str) -> list[Example]:
    return [Example(None, text, "rows.jsonl", line) for line, text in enumerate(texts, 1)]


@pytest.mark.parametrize(
    ("examples", "kind", "reason"),
    [
        (texts("one text", "another"), "perplexity", "the rows are plain text"),
        ([asked("A", choices=("A", "B"))] * 3, "choice", "the rows have choices"),
        (rows('{"a": 1}', "[2]", '```json\n{"b": 1}\n```'), "json", "the expected answers are JSON"),
        (rows("3 + 4 = 7\n#### 7", "#### 8"), "number", "the expected answers end with #### and a number"),
        (rows(*["paper", "Paper.", "glass"] * 2), "label", "2 short answers, 6 rows"),
        (rows(*["0", "1"] * 3), "label", "2 short answers, 6 rows"),
        ([asked("once", label="once"), asked("twice", label="twice")], "label", "2 short answers, 2 rows"),
        (rows("3", "4.5", "$1,000", "-7"), "number", "the expected answers are numbers"),
        (rows(*SENTENCES), "text", "the expected answers are texts of their own"),
        (rows(*SENTENCES, *SENTENCES * 3), "label", "8 short answers, 32 rows"),
        (rows(*[sentence * 2 for sentence in SENTENCES] * 4), "text", "the expected answers are texts of their own"),
        (rows('{"a": 1}', *SENTENCES), "text", "the expected answers are texts of their own"),
    ],
)
def test_the_shape_of_the_rows_says_the_task(examples: list[Example], kind: str, reason: str) -> None:
    task = find_task(examples, EvaluationConfig())
    assert (task.kind, task.reason) == (kind, reason)


def test_a_name_comes_first() -> None:
    task = find_task(rows("paper", "paper"), EvaluationConfig(task="text"))
    assert (task.kind, task.reason, task.main_metric) == ("text", "named", "rougeL")


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        (
            {"task": "regex"},
            ["the task regex needs evaluation.pattern, a regular expression that right answers contain"],
        ),
        (
            {"pattern": "x", "json_schema": "schema.json"},
            [
                "evaluation.json_schema applies to the task json; this is label (1 short answers, 2 rows)",
                "evaluation.pattern applies to the task regex; this is label (1 short answers, 2 rows)",
            ],
        ),
        (
            {"task": "choice", "metrics": ["own.py:f"]},
            ["evaluation.metrics apply to generated answers; the task choice has none"],
        ),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        find_task(rows("paper", "paper"), EvaluationConfig(**settings))
    assert caught.value.problems == problems


def test_a_pattern_that_is_none_is_refused_by_the_settings() -> None:
    with pytest.raises(ValueError, match="not a regular expression: missing"):
        EvaluationConfig(pattern="(")


def test_rows_of_another_task_are_named() -> None:
    for kind, problems in (
        ("json", ["rows.jsonl:2: the expected answer is not JSON: 'no'; set another evaluation.task"]),
        ("number", ["rows.jsonl:2: the expected answer holds no number: 'no'; set another evaluation.task"]),
    ):
        with pytest.raises(DataError) as caught:
            find_task(rows("3", "no"), EvaluationConfig(task=kind))  # type: ignore[arg-type]
        assert caught.value.problems == problems


@pytest.mark.parametrize(
    ("kind", "settings", "expected", "right", "wrong"),
    [
        ("label", {}, "card_arrival", ' "Card_Arrival".', "card arrival"),
        ("json", {}, '{"a": 1, "b": [2]}', '```json\n{"b": [2], "a": 1.0}\n```', '{"a": 1}'),
        ("number", {}, "so #### 1,200", "It is 1200.00", "It is 1200 or 3"),
        ("regex", {"pattern": r"(?i)\bplease\b"}, "anything", "Yes, PLEASE!", "pleased"),
        ("text", {}, "A sentence.", "a sentence", "another sentence"),
    ],
)
def test_what_is_right(kind: str, settings: dict[str, Any], expected: str, right: str, wrong: str) -> None:
    found = find_task(rows("1"), EvaluationConfig(task="regex", **settings)) if settings else Task(kind, "named")  # type: ignore[arg-type]
    assert is_right(found, expected, right)
    assert not is_right(found, expected, wrong)


def scored(task: Task, *pairs: tuple[str, str]) -> dict[str, float]:
    given = [Generation("q", expected, answer, False, 1) for expected, answer in pairs]
    return {name: one.value for name, one in score_answers(task, judged(task, given)).items()}


def test_metrics_of_each_task(tmp_path: Path) -> None:
    assert scored(Task("label", ""), ("a", "A."), ("a", "b"), ("b", "b"), ("b", "what?")) == {
        "accuracy": 0.5,
        "exact_match": 0.25,
        "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 2),
        "micro_f1": pytest.approx(4 / 7),  # two hits, one answer that is no label
    }
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"required": ["a"]}))
    task = find_task(rows('{"a": 1}'), EvaluationConfig(json_schema=str(schema)))
    assert scored(task, ('{"a": 1}', '{"a": 1 }'), ('{"a": 1, "b": 2}', '{"b": 2}'), ('{"a": 3}', "none")) == {
        "accuracy": pytest.approx(1 / 3),
        "exact_match": 0.0,
        "json_valid": pytest.approx(2 / 3),
        "json_fields": pytest.approx((1 + 2 / 3) / 3),
        "json_schema": pytest.approx(1 / 3),
    }
    assert scored(Task("number", ""), ("#### 3", "3"), ("#### 3", "4")) == {"accuracy": 0.5, "exact_match": 0.0}
    assert "accuracy" not in scored(Task("text", ""), ("one text", "one text"))
    for kind in TASK_METRICS:
        if kind != "regex":
            found = set(scored(Task(kind, ""), ("1", "1")))  # type: ignore[arg-type]
            assert found == set(TASK_METRICS[kind]) - {"json_schema"}


def test_own_metrics_stand_beside_the_tasks(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def length(row):\n    return len(row['answer'])\n\ndef accuracy(row):\n    return 1\n")
    task = find_task(rows("a", "a"), EvaluationConfig(metrics=[f"{own}:length"]))
    assert scored(task, ("a", "bcd"))["length"] == 3.0
    task = find_task(rows("a", "a"), EvaluationConfig(metrics=[f"{own}:accuracy"]))
    with pytest.raises(
        ConfigError, match=r"the metric accuracy of evaluation.metrics has the name of a metric of the task"
    ):
        scored(task, ("a", "bcd"))


def test_in_training_the_letter_of_a_choice_is_generated() -> None:
    examples = [asked("A", choices=("A", "B"))] * 2
    assert find_training_task(examples, EvaluationConfig()).kind == "label"
    assert find_training_task(rows(*SENTENCES), EvaluationConfig()).kind == "text"
    assert generated_metrics("number") == ["accuracy", "exact_match"]
    assert {"macro_f1", "rougeL", "json_valid"} <= set(generated_metrics("auto"))
