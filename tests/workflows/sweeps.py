"""What the tests of sweeps share beside their fixtures: settings, and what a sweep's folder says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import chat_rows
from tunesmith.evaluation.labels import Labels
from tunesmith.evaluation.metrics import normalize
from tunesmith.evaluation.tasks import Task, score_answers
from tunesmith.runs import RunFolder
from tunesmith.types import Generation

SETTINGS = {
    "model.dtype": "fp32",
    "optimizer.lr": 1e-2,
    "optimizer.max_grad_norm": 10.0,
    "training.batch_size": 8,
    "training.epochs": 2,
    "training.trackers": [],
    "evaluation.max_new_tokens": 4,
}

QUESTIONS = chat_rows(12, seed=2)
"""What runs are asked."""


SHORT = ["training.max_steps=1"]
RANKS = ["adapter.r=4,3,2"]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in RunFolder.open(run).events() if event["event"] == "step"]


def state_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "sweep.json").read_text())
    assert isinstance(found, dict)
    return found


def change_json(path: Path, **changes: Any) -> None:
    """Write other values into a JSON file, under dotted keys with `__`."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        target = content
        *sections, last = key.split("__")
        for section in sections:
            target = target[section]
        target[last] = value
    path.write_text(json.dumps(content))


def copy_sweep(folder: Path, to: Path) -> Path:
    """A finished sweep that a test may write into."""
    shutil.copytree(folder, to)
    return to


def answer(run: Path, right: int, **changes: Any) -> Path:
    """Give a run's evaluation so many right answers to the first questions, and the metrics of these; returns its file."""
    (path,) = (run / "evaluations").glob("test.json")
    content = json.loads(path.read_text())
    rows = [
        Generation(row["prompt"], row["expected"], row["expected"] if n < right else "glue", n < right, row["line"])
        for n, row in enumerate(content["examples"])
    ]
    labels = [row["messages"][-1]["content"] for row in QUESTIONS]
    for row, made in zip(content["examples"], rows, strict=True):
        row |= {"answer": made.answer, "correct": made.correct}
    scores = score_answers(Task("label", "", tuple(labels)), rows)
    content["metrics"] = {name: one.measured().as_json() for name, one in scores.items()}
    content["classes"] = {"tuned": Labels(rows, labels, normalize).report(), "baseline": None}
    path.write_text(json.dumps(content | changes))
    return path


def dying_at(step: int, error: Callable[[], BaseException]) -> Callable[[Any], None]:
    """An EventSink that raises after a step of the second run."""
    starts = 0

    def sink(event: Any) -> None:
        nonlocal starts
        starts += event["event"] == "start"
        if starts == 2 and event["event"] == "step" and event["step"] == step:
            raise error()

    return sink
