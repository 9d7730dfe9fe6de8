"""Proof of concept: train on a few hundred rows first, and on all of them only if that made the model better.

The sample is drawn with the run's seed (`data.max_rows`), every other setting is the full run's. Its run stands beside the full one, in
FOLDER-poc, and stays there whatever comes of it.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, VerificationError
from tunesmith.evaluation.gates import parse_gates, refuse_unmeasured
from tunesmith.evaluation.tasks import may_measure
from tunesmith.out_of_memory import release_memory
from tunesmith.report import write_report
from tunesmith.runs import RunFolder, default_run_path
from tunesmith.types import EventSink, Progress
from tunesmith.workflows.evaluate import Questions, evaluate, folder_of
from tunesmith.workflows.rows import read_rows
from tunesmith.workflows.train import start

DEFAULT_STEP = "5pt"
"""How many points better than the base the sample must make the task's main metric."""

DEFAULT_FACTOR = 0.95
"""Of the loss of plain text, which has no points."""


def prove(
    config: RunConfig,
    rows: int,
    gates: Sequence[str],
    out: Path | None,
    sink: EventSink,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """Train on `rows` rows and evaluate that on `data.eval_path` against the base. `sink` is told what came of it.

    Returns the full run's folder to be, and the evaluation. Raises ConfigError without held-out data, for gates on what is not measured,
    and where the rows would be all there are; VerificationError, with what was measured, if a gate fails (default: the task's main
    metric 5 points above the base's).
    """
    if not config.data.eval_path:
        raise ConfigError(
            "a proof of concept needs held-out data that it is measured on: pass --eval-data, or set data.eval_path"
        )
    conditions = parse_gates(gates)
    held_out = str(config.data.eval_path)
    task = Questions.read(held_out, config, config.evaluation).task
    refuse_unmeasured(conditions, lambda metric: may_measure(task, metric), f"the task {task.kind}")
    for condition in conditions:
        if condition.run:
            folder_of(condition.run, None)
    folder = (out or default_run_path(config)).absolute()
    beside = folder.with_name(f"{folder.name or 'run'}-poc")
    for path in (folder, beside):
        RunFolder.refuse_existing(path)
    there = len(read_rows(config).train)
    if rows >= there:
        raise ConfigError(
            f"a proof of concept on {rows} rows would be the whole run: there are {there} training rows; name fewer"
        )
    small = config.model_copy(deep=True)
    small.data.max_rows = rows
    result = start(small, beside, progress).train(sink, progress)
    gc.collect()  # the session's model and optimizer: another one is loaded to be evaluated
    release_memory()
    default = (
        f"loss <= baseline * {DEFAULT_FACTOR}"
        if task.main_metric == "loss"
        else f"{task.main_metric} >= baseline + {DEFAULT_STEP}"
    )
    found = evaluate(result.run, held_out, gates=list(gates) or [default], progress=progress)
    report = write_report(RunFolder.open(result.run))
    if not found["gate"]["passed"]:
        raise VerificationError(
            f"the proof of concept on {small.data.max_rows} rows failed ({_outcomes(found, False)}); the full run was not started. "
            f"{report} shows its answers"
        )
    sink({"event": "decision", "message": f"the proof of concept on {rows} rows passed: {_outcomes(found, True)}"})
    return folder, found


def _outcomes(found: Mapping[str, Any], passed: bool) -> str:
    return "; ".join(
        f"{one['condition']}: {one['value']:.4g}, needed {one['sign']} {one['needed']:.4g}"
        for one in found["gate"]["conditions"]
        if one["passed"] is passed
    )
