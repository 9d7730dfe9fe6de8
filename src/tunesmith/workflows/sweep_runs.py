"""The runs of a sweep: train each over the shared base, evaluate it, keep how it stands, and judge them all at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, Interrupted, MachineError, TunesmithError
from tunesmith.evaluation.statistics import Difference, Measured
from tunesmith.evaluation.statistics import compare as compare_measured
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import generated_metrics, score_answers
from tunesmith.files import write_json
from tunesmith.models.fuse import unfuse
from tunesmith.report import write_report
from tunesmith.report.comparison import shown, sweep_table, write_page
from tunesmith.report.comparison_plots import Point, loss_curves, scatter_plots
from tunesmith.report.text import count, duration
from tunesmith.runs import RunFolder
from tunesmith.types import EventSink, Generation, Progress
from tunesmith.workflows.compare import (
    ReadRun,
    answers_compared,
    compare_runs,
    evaluation_of,
    lower_is_better,
    read_run,
)
from tunesmith.workflows.evaluate import Asked, Questions, evaluate, summarize, write_evaluation
from tunesmith.workflows.shared_base import SharedBase, changes_base
from tunesmith.workflows.sweep_points import Axis
from tunesmith.workflows.train import TrainingSession, restart, start

STATE_FILE = "sweep.json"
PAGE_FILE = "sweep.html"
COSTS = ("wall_seconds", "peak_memory_gb", "trainable_parameters", "artifact_mb")


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

        A run that failed is not tried again, as it would fail again; but what the machine could not (exit code 3) is.
        """
        if not RunFolder.is_run(self.path):
            return
        if self.trained and (questions is None or self.evaluation(questions) is not None):
            self.status = "finished"
        elif record.get("status") == "failed" and record.get("exit_code") != MachineError.exit_code:
            self.status, self.error, self.exit_code = "failed", record.get("error"), record.get("exit_code")

    @property
    def trained(self) -> bool:
        """Whether its training is finished."""
        return RunFolder.is_run(self.path) and bool(RunFolder.open(self.path).metrics)

    def evaluation(self, questions: QuestionFile) -> Mapping[str, Any] | None:
        """Its evaluation on these questions; None if it has none."""
        return evaluation_of(self.read(), questions.sha256, len(questions.of.rows))


class Sweep:
    """A sweep at work: its folder, its runs, and the base that they share."""

    def __init__(
        self,
        folder: Path,
        axes: Sequence[Axis],
        asked: Mapping[str, Any],
        metric: str,
        questions: QuestionFile | None,
        shared: SharedBase,
        sink: EventSink,
        progress: Progress,
        announce: Callable[[str], None],
    ):
        self.folder, self.axes, self.asked, self.metric, self.questions = folder, axes, asked, metric, questions
        self.shared, self.sink, self.progress, self.announce = shared, sink, progress, announce
        self.attempts: list[Attempt] = []

    @property
    def lower_is_better(self) -> bool:
        """Whether the best run has the lowest metric."""
        return self.questions.lower_is_better(self.metric) if self.questions else lower_is_better(self.metric)

    def run(self, attempt: Attempt, place: str) -> None:
        """Train and evaluate one run, unless that was done; keep its error if it fails. Raises Interrupted after saving."""
        if attempt.status != "pending":
            done = "is finished already" if attempt.status == "finished" else f"failed before: {attempt.error}"
            self.announce(f"{place}, {attempt.name}: {done}")
            return
        self.announce(f"{place}: {attempt.name}")
        attempt.status = "running"
        self._save()
        try:
            self._train_and_evaluate(attempt)
            attempt.status, attempt.kept = "finished", None
        except Interrupted as error:
            attempt.status = "interrupted"
            self._save()
            raise Interrupted(
                f"{attempt.name} was stopped ({place}), its state saved in {attempt.path}; the same `tunesmith sweep` command goes on"
            ) from error
        except (TunesmithError, torch.OutOfMemoryError) as error:
            attempt.status, attempt.error = "failed", str(error)
            attempt.exit_code = error.exit_code if isinstance(error, TunesmithError) else MachineError.exit_code
            self.announce(f"{attempt.name} failed: {error}")
        self.shared.release_memory()
        self._save()

    def value(self, attempt: Attempt) -> float | None:
        """The metric of a finished run; None for another."""
        return self._measured(attempt)[0] if attempt.status == "finished" else None

    def finish(self, html: Path | None) -> dict[str, Any]:
        """Judge the runs, and write sweep.json and the page; returns what sweep.json holds."""
        result = self._result()
        reads = [each.read() for each in self.attempts if each.status == "finished"]
        result["warnings"] = compare_runs(reads)["warnings"] if len(reads) > 1 else []
        points = [
            Point(
                run["name"],
                run["metric"],
                run["stderr"],
                run["wall_seconds"],
                run["artifact_mb"],
                run["name"] == result["best"],
            )
            for run in result["runs"]
        ]
        plots = [*scatter_plots(self.metric, points), *loss_curves([(read.name, read.events) for read in reads])]
        notes = [*result["conclusions"], *result["warnings"]]
        for path in (self.folder / PAGE_FILE, *([html] if html else [])):
            write_page(
                path, f"Sweep over {', '.join(result['over'])}", self.folder.name, [sweep_table(result)], notes, plots
            )
        result["html"] = str(html or self.folder / PAGE_FILE)
        write_json(self.folder / STATE_FILE, result)
        return result

    def _train_and_evaluate(self, attempt: Attempt) -> None:
        if attempt.trained:
            assert self.questions is not None  # else it were finished
            self.shared.drop("another run was evaluated in between")
            evaluate(attempt.path, self.questions.of.path, changes=self._changes(), progress=self.progress)
            self._known_metric(attempt)
            return
        load = self.shared.load
        if RunFolder.is_run(attempt.path):
            session = restart(attempt.path, self.progress, load)
        else:
            session = start(attempt.config, attempt.path, self.progress, load)
        model, keeps = session.forward.model, changes_base(session.config) is None
        try:
            session.train(self.sink, self.progress)
            if self.questions is not None and keeps:
                self._evaluate(session, self.questions.of)
        finally:
            self.shared.take_back(model, session.config)
        del session, model  # a base that was not taken back goes now, before another is loaded
        self.shared.release_memory()
        if self.questions is not None and not keeps:
            evaluate(attempt.path, self.questions.of.path, changes=self._changes(), progress=self.progress)
        self._known_metric(attempt)
        write_report(RunFolder.open(attempt.path))

    def _evaluate(self, session: TrainingSession, questions: Questions) -> None:
        """What `tunesmith eval` would do with the run's adapter on its base, which are both loaded."""
        unfuse(session.forward.model)
        session.forward.model.eval()
        settings = session.config.evaluation.model_copy(update=self._changes())
        part = questions.part()
        part.check(session.chat)
        subject = Subject("tuned", session.forward, session.tokenizer, session.chat, settings, progress=self.progress)
        said = Asked({part.name: part.ask(subject)})
        write_evaluation(session.run, summarize(questions, [part], said, settings, {"name": session.source.name}))

    def _changes(self) -> dict[str, Any]:
        return {"max_rows": self.questions.max_rows} if self.questions and self.questions.max_rows else {}

    def _known_metric(self, attempt: Attempt) -> None:
        """Raise ConfigError where the run was evaluated, and `--metric` is not among what came of it."""
        if self._measured(attempt)[0] is None and self.questions is not None:
            found = self._evaluation(attempt).get("metrics", {})
            raise ConfigError(f"--metric {self.metric}: the evaluation has {', '.join(found)}; take one of these")

    def _evaluation(self, attempt: Attempt) -> Mapping[str, Any]:
        return (attempt.evaluation(self.questions) if self.questions else None) or {}

    def _measured(self, attempt: Attempt) -> tuple[float | None, float | None]:
        """The metric with its standard error."""
        found = self._evaluation(attempt).get("metrics", {}).get(self.metric)
        if found is not None:
            return found["value"], found["stderr"]
        return attempt.read().metrics.get(self.metric), None

    def _save(self) -> None:
        write_json(self.folder / STATE_FILE, self._result(judged=False))

    def _result(self, judged: bool = True) -> dict[str, Any]:
        runs = [self._row(attempt) for attempt in self.attempts]
        known = [run for run in runs if run["metric"] is not None]
        best = None
        if judged and known:
            best = (min if self.lower_is_better else max)(known, key=lambda run: run["metric"])
            self._compare_with(best, known)
        within = [run["name"] for run in known if run["against_best"] and run["against_best"]["verdict"] != "worse"]
        candidates = [run for run in known if best and (run is best or run["name"] in within)]
        cheapest = min(candidates, key=lambda run: (run["trainable_parameters"], run["wall_seconds"]), default=None)
        result = {
            "format_version": 1,
            "sweep": str(self.folder),
            "metric": {
                "name": self.metric,
                "lower_is_better": self.lower_is_better,
                "source": "evaluation" if self._from_evaluation() else "training",
                "share": self._from_evaluation() and self._is_share(),
            },
            "over": dict(self.asked["over"]),
            "runs": runs,
            "best": best["name"] if best else None,
            "within_error": within,
            "cheapest": cheapest["name"] if within and cheapest else None,
            "base_loads": self.shared.loads,
            "asked": dict(self.asked),
        }
        return result | {"conclusions": self._conclusions(result, runs)}

    def _from_evaluation(self) -> bool:
        return self.questions is not None and self.metric not in ("eval_loss", "train_loss")

    def _is_share(self) -> bool:
        """Whether the evaluations say that the metric is a fraction of 1."""
        found = (self._evaluation(each).get("metrics", {}) for each in self.attempts if each.status == "finished")
        return any(metrics.get(self.metric, {}).get("share") for metrics in found)

    def _row(self, attempt: Attempt) -> dict[str, Any]:
        finished = attempt.status == "finished"
        value, error = self._measured(attempt) if finished else (None, None)
        costs = attempt.read().metrics if finished else {}
        return {
            "name": attempt.name,
            "path": str(attempt.path),
            "values": attempt.values,
            "status": attempt.status,
            "error": attempt.error,
            "exit_code": attempt.exit_code,
            "metric": value,
            "stderr": error,
            **{name: costs.get(name) for name in COSTS},
            "against_best": None,
        }

    def _compare_with(self, best: dict[str, Any], known: Sequence[dict[str, Any]]) -> None:
        """Fill `against_best` of every other run, where the metric comes from an evaluation."""
        if not self._from_evaluation():
            return
        by_name = {attempt.name: self._evaluation(attempt) for attempt in self.attempts if attempt.status == "finished"}
        for run in known:
            if run is not best:
                difference = self._difference(by_name[run["name"]], by_name[best["name"]])
                run["against_best"] = difference.as_json() if difference else None

    def _difference(self, of: Mapping[str, Any], best: Mapping[str, Any]) -> Difference | None:
        """Paired, row by row, where answers were scored; else as independent measurements; None without errors."""
        assert self.questions is not None
        if self.metric == "accuracy" and (paired := answers_compared(of, best)) is not None:
            return paired
        task = self.questions.of.task
        if task.generates:
            after, before = (score_answers(task, _generations(each))[self.metric] for each in (of, best))
            return after.minus(before)
        ours, theirs = (
            Measured(
                each["metrics"][self.metric]["value"],
                each["metrics"][self.metric]["stderr"],
                each["n"],
                higher_is_better=not self.lower_is_better,
            )
            for each in (of, best)
        )
        return None if ours.stderr is None or theirs.stderr is None else compare_measured(ours, theirs)

    def _conclusions(self, result: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the table says, in sentences."""
        by_name = {run["name"]: run for run in runs}
        numbers = {run["name"]: number for number, run in enumerate(runs, 1)}
        lines = []
        if best := by_name.get(result["best"]):
            share = result["metric"]["share"]
            lines.append(
                f"best: run {numbers[best['name']]} ({best['name']}), {self.metric} {shown(self.metric, best['metric'], best['stderr'], share)}"
            )
            if result["within_error"]:
                others = ", ".join(str(numbers[name]) for name in result["within_error"])
                lines.append(f"not clearly worse (p of a test against the best is 0.05 or more): run {others}")
                least = by_name[result["cheapest"]]
                lines.append(
                    f"the cheapest of these and the best: run {numbers[least['name']]} ({least['name']}), "
                    f"{count(least['trainable_parameters'])} trained parameters, {duration(least['wall_seconds'])}"
                )
            elif not self._from_evaluation() and len(runs) > 1:
                lines.append(
                    f"{self.metric} has no standard error here: --data FILE measures the runs on rows that can be compared"
                )
        lines += [
            f"run {numbers[run['name']]} ({run['name']}) failed: {run['error']}"
            for run in runs
            if run["status"] == "failed"
        ]
        return lines


def window_of(config: RunConfig) -> int:
    """Tokens of a window of text, as `evaluate` takes them."""
    return config.data.max_seq_length if isinstance(config.data.max_seq_length, int) else 2048


def _generations(evaluation: Mapping[str, Any]) -> list[Generation]:
    """The rows of an evaluation, as they were scored."""
    keys = ("prompt", "expected", "answer", "correct", "line")
    return [Generation(*(row[key] for key in keys)) for row in evaluation["examples"]]
