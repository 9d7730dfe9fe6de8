"""Evaluations of several runs: which are of the same questions asked in the same way, and what a paired test of their rows says.

What a file in RUN/evaluations holds is all that is known of an evaluation. Its rows give the task's metrics again, so that two evaluations
are compared row by row (evaluation/statistics.py). A metric whose rows are not kept (general ability, a user's own function, a judge) has no
test: its standard error alone would treat the same questions as two samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tunesmith.config import TaskName
from tunesmith.evaluation.metrics import is_exact
from tunesmith.evaluation.statistics import Difference, Scores
from tunesmith.evaluation.task_part import SCORED_BY_ROW, TextLoss, text_loss_scores
from tunesmith.evaluation.tasks import Task, score_answers
from tunesmith.report.text import as_number, as_text, shortened
from tunesmith.types import Generation
from tunesmith.workflows.evaluate import COMPARED_SETTINGS

SCORED = ("choice", "perplexity")
"""Kinds of task that generate nothing."""

TYPES: dict[str, tuple[type, str]] = {
    "task": (str, "a text"),
    "task_kind": (str, "a text"),
    "data_sha256": (str, "a text"),
    "created": (str, "a text"),
    "n": (int, "a whole number"),
    "sample_seed": (int, "a whole number"),
    "settings": (dict, "an object"),
    "examples": (list, "a list"),
    "classes": (dict, "an object"),
}
"""What an evaluation's values are, where they are not null."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What was asked and how. Evaluations of one setup are of the same thing; `settings` hold JSON."""

    task: str
    kind: str | None
    data_sha256: str | None
    n: int | None
    sample_seed: int | None
    settings: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, evaluation: Mapping[str, Any]) -> Setup:
        """The setup of an evaluation, whose `task_kind` says what the setting `task` came to."""
        kind, settings = evaluation.get("task_kind"), evaluation.get("settings") or {}
        without = ("task", "max_new_tokens") if kind in SCORED else ("task",)
        keys = [key for key in COMPARED_SETTINGS if key not in without]
        return cls(
            evaluation.get("task") or "",
            kind,
            evaluation.get("data_sha256"),
            evaluation.get("n"),
            evaluation.get("sample_seed"),
            tuple((key, json.dumps(settings.get(key), sort_keys=True)) for key in keys),
        )

    def facts(self) -> dict[str, Any]:
        """How it was asked, by name."""
        found = {"task_kind": self.kind, "n": self.n, "sample_seed": self.sample_seed}
        return found | {key: json.loads(value) for key, value in self.settings}


def read_evaluations(folder: Path) -> tuple[dict[Setup, Mapping[str, Any]], list[str]]:
    """The newest evaluation of each setup, those of most rows and then the newest first; and a line for each file that is damaged."""
    newest: dict[Setup, Mapping[str, Any]] = {}
    problems = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            _refuse_odd(raw)
        except (ValueError, OSError) as error:
            problems.append(f"{path} cannot be read ({error}); it is left out")
            continue
        setup = Setup.of(raw)
        if setup not in newest or _created(newest[setup]) <= _created(raw):
            newest[setup] = raw
    order = sorted(newest, key=lambda one: _created(newest[one]), reverse=True)
    order.sort(key=lambda one: (one.task, one.data_sha256 or "", -(one.n or 0)))
    return {setup: newest[setup] for setup in order}, problems


def differences(
    of: Mapping[str, Any], against: Mapping[str, Any], metrics: Sequence[str], task: Task | None = None
) -> dict[str, Difference | None]:
    """Each metric of one evaluation minus that of another of the same setup, paired by rows.

    None where the rows are not kept, or do not give the value that the evaluation has; nothing at all where they are other rows. `task`
    knows what the files do not: a user's own metrics, a schema.
    """
    if _asked(of) != _asked(against):
        return {}
    labels = tuple(dict.fromkeys(_answered_labels(of) + _answered_labels(against)))
    ours, theirs = (_scores(each, labels, metrics, task) for each in (of, against))
    return {name: ours[name].minus(theirs[name]) if name in ours and name in theirs else None for name in metrics}


def other_setups(names: Sequence[str], evaluations: Sequence[Mapping[Setup, Any]]) -> Iterator[str]:
    """A line for each run that was asked the same file as an earlier-named one, but not in the same way."""
    subjects = dict.fromkeys((setup.task, setup.data_sha256) for each in evaluations for setup in each)
    for subject in subjects:
        asked = [
            (name, [setup for setup in each if (setup.task, setup.data_sha256) == subject])
            for name, each in zip(names, evaluations, strict=True)
        ]
        asked = [(name, setups) for name, setups in asked if setups]
        first, known = asked[0]
        for name, setups in asked[1:]:
            if not set(setups) & set(known):
                ours, theirs = setups[0].facts(), known[0].facts()
                changed = "; ".join(
                    f"{key} {as_text(ours.get(key))}, not {as_text(theirs.get(key))}"
                    for key in {**theirs, **ours}
                    if ours.get(key) != theirs.get(key)
                )
                yield f"{name} was evaluated on {subject[0]} in another way than {first} ({changed}): their answers are not compared"


def _refuse_odd(raw: Any) -> None:
    """Raise ValueError for what no evaluation holds."""
    if not isinstance(raw, dict) or not isinstance(raw.get("metrics"), dict):
        raise ValueError("it has no `metrics`")
    for key, (kind, name) in TYPES.items():
        value = raw.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"its `{key}` is {shortened(as_text(value), 60)}, which should be {name}")
    odd = [name for name, value in raw["metrics"].items() if not isinstance(value, dict)]
    if odd:
        raise ValueError(
            f"its metric {odd[0]} is {shortened(as_text(raw['metrics'][odd[0]]), 60)}, which should be an object"
        )


def _created(evaluation: Mapping[str, Any]) -> str:
    return evaluation.get("created") or ""


def _rows(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = evaluation.get("examples") or []
    return rows if all(isinstance(row, dict) for row in rows) else []


def _asked(evaluation: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What stands on each side of a comparison of rows: the same lines with the same questions."""
    return [
        tuple(row.get(key) for key in ("line", "prompt", "expected", "text", "tokens")) for row in _rows(evaluation)
    ]


def _scores(
    evaluation: Mapping[str, Any], labels: tuple[str, ...], metrics: Sequence[str], task: Task | None
) -> dict[str, Scores]:
    """The metrics that the rows give again, to the value that the evaluation has."""
    rows, kind = _rows(evaluation), evaluation.get("task_kind") or "label"
    found: dict[str, Scores] = {}
    if kind == "perplexity":
        if rows and all(as_number(row.get("loss")) is not None and as_number(row.get("tokens")) for row in rows):
            sizes = [as_number(row.get("bytes")) for row in rows]
            found = text_loss_scores(
                [
                    TextLoss(row["loss"] * row["tokens"], row["tokens"], int(size or 0), row.get("line", 0), "")
                    for row, size in zip(rows, sizes, strict=True)
                ]
            )
            if not all(sizes):  # evaluations of before 2026-11-27 did not keep them
                del found["bits_per_byte"]
    elif rows and all(_is_scored(row) for row in rows):
        answered = [
            Generation(row["prompt"], row["expected"], row["answer"], row["correct"], row.get("line", 0))
            for row in rows
        ]
        if kind == "text":
            found = _text_scores(rows)
        if kind != "text" or (task is not None and not found.keys() >= set(metrics)):
            found = score_answers(task or Task(cast(TaskName, kind), "", labels), answered)
    return {name: one for name, one in found.items() if _is_value(evaluation, name, one.value)}


def _text_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Scores]:
    """What is known of free texts without scoring each again, which takes 15 s for 3,080 texts of 30 words."""
    exact = tuple(float(is_exact(row["expected"], row["answer"])) for row in rows)
    found = {"exact_match": Scores(len(rows), exact)}
    for name in SCORED_BY_ROW:
        of_rows = [value for row in rows if (value := as_number(row.get(name))) is not None]
        if len(of_rows) == len(rows):
            found[name] = Scores(len(rows), tuple(of_rows), share=name != "chrf")
    return found


def _is_scored(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("correct"), bool) and all(
        isinstance(row.get(key), str) for key in ("prompt", "expected", "answer")
    )


def _is_value(evaluation: Mapping[str, Any], metric: str, value: float) -> bool:
    recorded = as_number((evaluation["metrics"].get(metric) or {}).get("value"))
    return recorded is not None and math.isclose(recorded, value, rel_tol=1e-6, abs_tol=1e-9)


def _answered_labels(evaluation: Mapping[str, Any]) -> list[str]:
    """The classes that answers named: of a sample of rows some are expected of none of them."""
    tuned = (evaluation.get("classes") or {}).get("tuned")
    pairs = tuned.get("confusions") if isinstance(tuned, dict) else None
    pairs = pairs if isinstance(pairs, list) else []
    return [pair["answered"] for pair in pairs if isinstance(pair, dict) and isinstance(pair.get("answered"), str)]
