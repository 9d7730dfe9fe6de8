"""One run of a sweep, and how it stands by what its folder and sweep.json hold; the questions that all runs are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import RunConfig
from tunesmith.errors import MachineError
from tunesmith.evaluation.answers import SAMPLE_SEED
from tunesmith.evaluation.tasks import generated_metrics
from tunesmith.runs import RunFolder
from tunesmith.workflows.compare import ReadRun, lower_is_better, read_run
from tunesmith.workflows.compare_evaluations import Setup
from tunesmith.workflows.evaluate import Questions


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """The questions that every run is asked: all rows of a file, or (`max_rows`) a fixed sample of them."""

    of: Questions
    sha256: str
    max_rows: int | None

    def metrics(self) -> list[str]:
        """What is measured of them; a user's own metric may give several, which begin with its name."""
        task = self.of.task
        if task.kind == "perplexity":
            return ["loss", "perplexity", "bits_per_byte"]
        known = [name for name in generated_metrics(task.kind) if name != "json_schema" or task.schema is not None]
        return (known if task.generates else ["accuracy"]) + [name for name, _ in task.user_metrics]

    def lower_is_better(self, metric: str) -> bool:
        """Whether the best run has the lowest `metric`."""
        for name, function in self.of.task.user_metrics:
            if metric == name or metric.startswith(f"{name}."):
                return not getattr(function, "higher_is_better", True)
        return lower_is_better(metric)

    def setup(self, config: RunConfig) -> Setup:
        """How a run of these settings is asked."""
        sampled = len(self.of.rows) < self.of.rows_in_file
        asked = {
            "task": Path(self.of.path).stem,
            "task_kind": self.of.task.kind,
            "data_sha256": self.sha256,
            "n": len(self.of.rows),
            "sample_seed": SAMPLE_SEED if sampled else None,
            "settings": config.evaluation.model_dump(mode="json"),
        }
        return Setup.of(asked)


@dataclass(slots=True)
class Attempt:
    """One run of a sweep. `number` is its place in the grid, or that of its proposal in a search, from 0."""

    number: int
    name: str
    values: dict[str, Any]
    config: RunConfig
    path: Path
    status: str = "pending"
    error: str | None = None
    exit_code: int | None = None
    kept: ReadRun | None = None

    def read(self) -> ReadRun:
        """What its folder holds; of a finished run read once."""
        if self.kept is None or self.status != "finished":
            self.kept = read_run(self.path, self.name)
        return self.kept

    def recall(self, record: Mapping[str, Any], questions: QuestionFile | None) -> None:
        """How it stands after an earlier sweep, by its folder and its `record` there.

        A run that failed is not tried again, as it would fail again; but what the machine could not (exit code 3) is, and one whose
        folder was deleted.
        """
        failed = record.get("status") == "failed" and record.get("exit_code") != MachineError.exit_code
        if self.trained and (questions is None or self.evaluation(questions) is not None):
            self.status = "finished"
        elif failed and record.get("has_folder", True) == RunFolder.is_run(self.path):
            self.status, self.error, self.exit_code = "failed", record.get("error"), record.get("exit_code")

    @property
    def trained(self) -> bool:
        """Whether its training is finished."""
        return RunFolder.is_run(self.path) and bool(RunFolder.open(self.path).metrics)

    @property
    def machine_failed(self) -> bool:
        """Whether it failed for what the machine could not do, and may be tried again."""
        return self.status == "failed" and self.exit_code == MachineError.exit_code

    def evaluation(self, questions: QuestionFile) -> Mapping[str, Any] | None:
        """Its newest evaluation on these questions, asked as the sweep asks them; None if it has none."""
        return self.read().evaluations.get(questions.setup(self.config))
