"""Train the same run with several values of some settings, over one loaded base, and say which is best.

A sweep is a folder: `sweep.json` (what was asked for, and how every run stands), `sweep.html`, and `runs/<values>/`, each a run folder
like any other. What a sweep knows it reads from these, so that the same command goes on after a crash: finished runs are not
repeated, an interrupted one goes on from its checkpoint. This module plans and checks; sweep_runs.py trains and judges.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, DataError, RunError, TunesmithError
from tunesmith.files import check_writable, disk_errors, sha256_file
from tunesmith.types import EventSink, Progress, no_progress
from tunesmith.workflows.evaluate import Questions
from tunesmith.workflows.shared_base import SharedBase
from tunesmith.workflows.sweep_points import Axis, configs, grid, located, parse_axes, point_name
from tunesmith.workflows.sweep_runs import STATE_FILE, Attempt, QuestionFile, Sweep
from tunesmith.workflows.sweep_search import Search, refuse_without_optuna
from tunesmith.workflows.train import check, locked, no_event, with_absolute_paths

FORMAT_VERSION = 1
LOSSES = ("eval_loss", "train_loss")
"""Metrics that training itself measures."""


def sweep(
    config: str | Path | None,
    over: Sequence[str],
    *,
    settings: Sequence[str] = (),
    out: str | Path | None = None,
    data: str | Path | None = None,
    rows: int | None = None,
    metric: str | None = None,
    trials: int | None = None,
    html: str | Path | None = None,
    sink: EventSink = no_event,
    progress: Progress = no_progress,
    announce: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train the grid of `over` (["adapter.r=8,16", "optimizer.lr=1e-4,2e-4"]), or search it with `trials` runs (docs/compare.md).

    `settings` differ from those in the file `config`, as --set has them. With `data` each run answers the questions there, `rows` of
    them at most. `metric` says which run is best (default: accuracy with `data`, else eval_loss). A run that fails is in the
    result with its error, and the others go on. Raises ConfigError and DataError with every problem of every run before the
    first one trains; RunError for a folder that is no sweep, or was begun with other settings; Interrupted after saving.
    """
    axes = parse_axes(over, settings, search=trials is not None)
    if trials is not None:
        refuse_without_optuna()
    path = str(config) if config is not None else None

    def config_of(values: Mapping[str, Any]) -> RunConfig:
        return with_absolute_paths(configs(path, settings, axes, [values])[0].resolved())

    points = grid(axes)
    planned = [with_absolute_paths(each.resolved()) for each in configs(path, settings, axes, points)]
    questions = _questions(data, rows, planned[0])
    chosen = _metric(planned, questions, metric)
    folder = Path(out) if out is not None else Path("runs") / f"{Path(path).stem if path else 'run'}-sweep"
    asked = _asked(planned[0], axes, questions, chosen, trials is not None)
    before = _begun(folder, asked)

    def attempt(number: int, values: Mapping[str, Any], run_config: RunConfig) -> Attempt:
        name = point_name(axes, values) if trials is None else f"{number + 1:03d}_{point_name(axes, values)}"
        made = Attempt(number, name, dict(values), run_config, folder / "runs" / name)
        made.recall(before.get(name, {}), questions)
        return made

    attempts = [attempt(number, *each) for number, each in enumerate(zip(points, planned, strict=True))]
    _check_all([each for each in attempts if each.status == "pending"], questions, progress)
    with disk_errors(folder):
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    with locked(folder, "another process works on this sweep"):
        state = Sweep(folder, axes, asked, chosen, questions, SharedBase(announce), sink, progress, announce)
        if trials is None:
            state.attempts = attempts
            for made in attempts:
                state.run(made, f"run {made.number + 1} of {len(attempts)}")
        else:
            _search(state, trials, lambda number, values: attempt(number, values, config_of(values)))
        return state.finish(Path(html) if html is not None else None)


def _search(state: Sweep, trials: int, attempt: Callable[[int, Mapping[str, Any]], Attempt]) -> None:
    """Runs that the search proposes, until `trials` of them are done."""
    search = Search(state.folder, state.axes, state.lower_is_better)
    done = search.done()
    for number, values in done:
        if all(each.values != values for each in state.attempts):
            state.attempts.append(attempt(number, values))
    for _ in range(len(done), trials):
        number, values = search.next()
        made = next((each for each in state.attempts if each.values == values), None)
        if made is None:  # what was proposed before has a metric already
            made = attempt(number, values)
            state.attempts.append(made)
            state.run(made, f"trial {number + 1} of {trials}")
        search.tell(number, state.value(made))


def _questions(data: str | Path | None, rows: int | None, config: RunConfig) -> QuestionFile | None:
    """The questions that every run is asked. Raises DataError with every row that cannot be asked."""
    if data is None:
        if rows is not None:
            raise ConfigError(
                "--rows is how many of --data are asked, and there is no --data; add it, or leave --rows out"
            )
        return None
    settings = config.evaluation.model_copy(update={"max_rows": rows} if rows else {})
    of = Questions.read(str(data), config, settings)
    return QuestionFile(replace(of, path=str(Path(data).absolute())), sha256_file(Path(data)), rows)


def _metric(planned: Sequence[RunConfig], questions: QuestionFile | None, metric: str | None) -> str:
    """What says which run is best. Raises ConfigError where no run measures it."""
    held_out = all(config.data.eval_path or config.data.eval_fraction for config in planned)
    known = [*([questions.of.task.main_metric] if questions else []), *(["eval_loss"] if held_out else [])]
    if metric is None:
        if not known:
            raise ConfigError(
                "nothing measures these runs: pass --data FILE, or set data.eval_path or data.eval_fraction; the training loss, "
                "which says how well a run learnt its rows by heart, is taken with --metric train_loss"
            )
        return known[0]
    if metric == "eval_loss" and not held_out:
        raise ConfigError("--metric eval_loss: no run has held-out rows; set data.eval_path or data.eval_fraction")
    if metric not in LOSSES and questions is None:
        raise ConfigError(
            f"--metric {metric}: only an evaluation measures it; pass --data FILE, or take one of {', '.join(LOSSES)}"
        )
    if metric not in LOSSES and questions is not None:
        measured = questions.metrics()
        if not any(metric == name or metric.startswith(f"{name}.") for name in measured):
            raise ConfigError(
                f"--metric {metric}: {questions.of.path} is of the task {questions.of.task.kind}, which has "
                f"{', '.join(measured)}; take one of these or {', '.join(LOSSES)}"
            )
    return metric


def _asked(
    config: RunConfig, axes: Sequence[Axis], questions: QuestionFile | None, metric: str, search: bool
) -> dict[str, Any]:
    """What makes a sweep this one: all settings that it does not go over, what it goes over, what it measures."""
    settings = config.model_dump(mode="json")
    for axis in axes:
        *sections, key = axis.key.split(".")
        target = settings
        for section in sections:
            target = target[section]
        target.pop(key, None)
    data = {"path": questions.of.path, "sha256": questions.sha256, "rows": questions.max_rows} if questions else None
    over = {axis.key: axis.as_json() for axis in axes}
    return json.loads(
        json.dumps({"settings": settings, "over": over, "data": data, "metric": metric, "search": search})
    )


def _begun(folder: Path, asked: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What sweep.json says of each run, by name; nothing for a new sweep. Raises RunError for a folder that is another's."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        path = folder / STATE_FILE
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            recorded, runs = kept["asked"], {run["name"]: run for run in kept["runs"]}
        except FileNotFoundError:
            if {each.name for each in folder.iterdir()} <= {"runs", ".lock", "study.journal"} and (
                folder / ".lock"
            ).exists():
                return {}  # it was stopped before its first run
            raise RunError(
                f"{folder} exists already and is no sweep (it has no {STATE_FILE}); choose another --out"
            ) from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunError(f"{path}: cannot be read ({error}); restore it, or choose another --out") from error
        if changes := list(_changes(recorded, asked)):
            raise RunError(
                f"{folder}: this sweep was begun with other settings: {'; '.join(changes)}. Give them as they were, or choose another --out"
            )
        return runs
    check_writable(folder)
    return {}


def _changes(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for each in keys for line in _changes(before.get(each), now.get(each), f"{key}.{each}".strip("."))]
    if before == now:
        return []
    return [f"{key.removeprefix('settings.')} was {json.dumps(before)}, is {json.dumps(now)}"]


def _check_all(attempts: Sequence[Attempt], questions: QuestionFile | None, progress: Progress) -> None:
    """Everything about every run that can be found before weights are read. Raises ConfigError or DataError with all of it."""
    problems: dict[str, list[str]] = {}
    of_data = False
    for number, attempt in enumerate(attempts):
        progress("checking the runs", number, len(attempts))
        try:
            known = check(copy.deepcopy(attempt.config))
            if questions:
                questions.of.part().check(known.chat)
        except TunesmithError as error:
            of_data = of_data or isinstance(error, DataError)
            for problem in getattr(error, "problems", [str(error)]):
                problems.setdefault(problem, []).append(attempt.name)
    if problems:
        lines = list(located(problems, len(attempts)))
        raise DataError(lines) if of_data else ConfigError(lines)
