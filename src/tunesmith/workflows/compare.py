"""Compare runs by what their folders hold: settings, data, metrics, evaluations, time, memory, size.

Only files are read, so runs may be dead, copied, still running or unfinished. Every value stands beside the others in a row;
the best of a row is named where it can be: among finished runs, and for losses only where they are over the same rows. Runs that
were evaluated on the same rows are compared with the first-named one that was, row by row (evaluation/statistics.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluation.statistics import Difference, mean
from tunesmith.evaluation.statistics import compare as compare_measured
from tunesmith.report.comparison import comparison_tables, write_page
from tunesmith.report.comparison_plots import Point, loss_curves, scatter_plots
from tunesmith.report.facts import Status, eval_metric, events_of, status, wall_seconds
from tunesmith.report.text import as_number, as_text
from tunesmith.runs import RunFolder
from tunesmith.types import Event
from tunesmith.yaml_files import read_yaml

LOWER_IS_BETTER = ("loss", "perplexity", "kl", "/rejected", "bits_per_byte")
"""How the names of metrics end that are better when smaller, as for `training.early_stopping`; evaluations say it of theirs."""

TRAINING_METRICS: dict[str, bool | None] = {
    "eval_loss": True,
    "train_loss": True,
    "wall_seconds": True,
    "tokens_per_second": False,
    "peak_memory_gb": True,
    "trainable_parameters": None,
    "artifact_mb": True,
}
"""What every run has: whether less is better (None: neither)."""

COSTS = ("wall_seconds", "tokens_per_second", "peak_memory_gb", "artifact_mb")
"""Metrics that no repetition gives again to the last digit: what is equal to three digits is equally good."""

NOT_SETTINGS = {
    "data.path", "data.eval_path", "data.general_path", "data.mix", "model.name", "model.revision", "data.cache",
    "data.num_proc", "training.trackers", "training.tracker_project", "training.log_every", "model.device",
}  # fmt: skip
"""Where things are, and what changes no result: hashes say whether data and base differ."""

HASHES = {
    "model.weight_hash": "base weights",
    "tokenizer.hash": "tokenizer",
    "chat_template.hash": "chat template",
    "data.sha256": "training data",
    "data.eval_sha256": "held-out data",
    "data.general_sha256": "general data",
    "data.tokens_sha256": "tokens",
}
"""Hashes in metadata.json, and what they are of."""

MB = 2**20


@dataclass(frozen=True, slots=True)
class ReadRun:
    """What one run folder holds. `evaluations` has the newest of each task and data file, `problems` those that are damaged."""

    path: Path
    name: str
    status: Status
    settings: Mapping[str, Any]
    hashes: Mapping[str, str | None]
    metrics: Mapping[str, float | None]
    evaluations: Sequence[Mapping[str, Any]]
    events: Sequence[Event]
    objective: str
    problems: Sequence[str] = ()

    @property
    def finished(self) -> bool:
        """Whether its metrics are final."""
        return self.status.label in ("finished", "stopped early")


def compare(runs: Sequence[str | Path], html: str | Path | None = None) -> dict[str, Any]:
    """What two or more runs have in common and what not (docs/compare.md); with `html` a page of it is written there too.

    Raises RunError for fewer than two runs, one that is named twice, and a folder that is no run.
    """
    paths = [Path(run) for run in runs]
    problems = [
        f"{path} is named twice" for number, path in enumerate(paths) if path.resolve() in _resolved(paths[:number])
    ]
    if problems:
        raise RunError(f"{'; '.join(problems)}: a run is compared with others")
    if len(paths) < 2:
        raise RunError("one run is no comparison: name two or more run folders")
    found = [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    result = compare_runs(found)
    if html is not None:
        result["html"] = str(_write_html(Path(html), found, result))
    return result


def read_run(path: Path, name: str | None = None) -> ReadRun:
    """Read a run folder. Raises RunError for one that is none, or is damaged, and ConfigError for a config that is no YAML."""
    run = RunFolder.open(path)
    metadata, metrics, events = run.metadata, run.metrics, run.events()
    now = time.time()
    evaluations, problems = _evaluations(path / "evaluations")
    return ReadRun(
        path=path,
        name=name or path.resolve().name,
        status=status(events, metrics, now),
        settings=dict(_flattened(read_yaml(run.config_path)[0])),
        hashes={key: _text_at(metadata, key) for key in HASHES},
        metrics=_metrics(run, events, metrics, now),
        evaluations=evaluations,
        events=events,
        objective=as_text(metadata.get("objective") or ""),
        problems=problems,
    )


def compare_runs(runs: Sequence[ReadRun]) -> dict[str, Any]:
    """The comparison as JSON."""
    settings = {key: [run.settings.get(key) for run in runs] for run in runs for key in run.settings}
    settings = {key: values for key, values in settings.items() if key not in NOT_SETTINGS and _differ(values)}
    hashes = {key: [run.hashes[key] for run in runs] for key in HASHES}
    hashes = {key: values for key, values in hashes.items() if _differ(values)}
    same_loss = _why_losses_differ(runs, settings, hashes) is None
    rows = [
        _row(
            runs,
            name,
            None,
            [run.metrics.get(name) for run in runs],
            None,
            less,
            same_loss or not name.endswith("loss"),
        )
        for name, less in TRAINING_METRICS.items()
    ]
    return {
        "runs": [
            {"name": run.name, "path": str(run.path), "status": run.status.label, "note": run.status.note}
            for run in runs
        ],
        "settings": settings,
        "hashes": hashes,
        "warnings": list(_warnings(runs, settings, hashes)),
        "metrics": [row for row in rows if any(value is not None for value in row["values"])] + _evaluated(runs),
        "comparisons": _comparisons(runs),
    }


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name is better when it is smaller."""
    return metric.endswith(LOWER_IS_BETTER) or bool(TRAINING_METRICS.get(metric))


def answers_compared(of: Mapping[str, Any], against: Mapping[str, Any]) -> Difference | None:
    """The accuracy of one evaluation minus that of another, paired; None where they are not over the same scored rows."""
    ours, theirs = _scored(of), _scored(against)
    if not ours or list(ours) != list(theirs) or of.get("data_sha256") != against.get("data_sha256"):
        return None
    return compare_measured(mean(list(ours.values())), mean(list(theirs.values())))


def evaluation_of(run: ReadRun, data_sha256: str, n: int) -> Mapping[str, Any] | None:
    """The run's evaluation on `n` rows of a data file; None if it has none."""
    return next((e for e in run.evaluations if e.get("data_sha256") == data_sha256 and e.get("n") == n), None)


def _resolved(paths: Sequence[Path]) -> list[Path]:
    return [path.resolve() for path in paths]


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flattened(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _text_at(metadata: Mapping[str, Any], dotted: str) -> str | None:
    section, _, key = dotted.partition(".")
    found = metadata.get(section)
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _metrics(
    run: RunFolder, events: Sequence[Event], metrics: Mapping[str, Any], now: float
) -> dict[str, float | None]:
    """metrics.json's; of an unfinished run what its events say so far."""
    values = {name: as_number(metrics.get(name)) for name in TRAINING_METRICS}
    folder = next((each for each in (run.adapter_path, run.model_path) if each.is_dir()), None)
    if folder is not None:
        values["artifact_mb"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / MB
    if metrics:
        return values
    steps = events_of(events, "step")
    start: Event = next(iter(events_of(events, "start")), {})
    known = [(tokens, seconds) for step in steps for tokens, seconds in [_pace(step)] if seconds]
    losses = eval_metric(events, "eval_loss")
    return values | {
        "eval_loss": losses[-1][1] if losses else None,
        "train_loss": as_number(steps[-1].get("loss")) if steps else None,
        "wall_seconds": wall_seconds(events, metrics),
        "tokens_per_second": sum(t for t, _ in known) / sum(s for _, s in known) if known else None,
        "peak_memory_gb": max(
            (m for step in steps if (m := as_number(step.get("memory_gb"))) is not None), default=None
        ),
        "trainable_parameters": as_number(start.get("trainable_parameters")),
    }


def _pace(step: Event) -> tuple[float, float]:
    return as_number(step.get("tokens")) or 0.0, as_number(step.get("seconds")) or 0.0


def _evaluations(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The newest evaluation of each task and content of the data, by task; and a line for each file that is damaged."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    problems = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict) or not isinstance(raw.get("metrics"), dict):
                raise ValueError("it has no `metrics`")
        except (ValueError, OSError) as error:
            problems.append(f"{path} cannot be read ({error}); it is left out")
            continue
        key = as_text(raw.get("task")), as_text(raw.get("data_sha256"))
        if key not in newest or as_text(newest[key].get("created")) <= as_text(raw.get("created")):
            newest[key] = raw
    return [newest[key] for key in sorted(newest)], problems


def _subjects(runs: Sequence[ReadRun]) -> list[tuple[str, str, Any]]:
    """(task, hash of the data, rows) of all evaluations."""
    return list(dict.fromkeys(_subject(each) for run in runs for each in run.evaluations))


def _subject(evaluation: Mapping[str, Any]) -> tuple[str, str, Any]:
    return as_text(evaluation.get("task")), as_text(evaluation.get("data_sha256")), evaluation.get("n")


def _of_subject(run: ReadRun, subject: tuple[str, str, Any]) -> Mapping[str, Any]:
    return next((each for each in run.evaluations if _subject(each) == subject), {})


def _evaluated(runs: Sequence[ReadRun]) -> list[dict[str, Any]]:
    """A row for each metric of each task, data file and number of rows."""
    rows = []
    for subject in _subjects(runs):
        found = [_of_subject(run, subject).get("metrics", {}) for run in runs]
        for name in dict.fromkeys(name for metrics in found for name in metrics):
            cells = [metrics.get(name) for metrics in found]
            cells = [cell if isinstance(cell, dict) else {} for cell in cells]
            better = next((cell["higher_is_better"] for cell in cells if "higher_is_better" in cell), None)
            less = lower_is_better(name) if better is None else not better
            values, errors = ([as_number(cell.get(key)) for cell in cells] for key in ("value", "stderr"))
            if any(value is not None for value in values):
                shares = [cell["share"] for cell in cells if isinstance(cell.get("share"), bool)]
                rows.append(_row(runs, name, subject, values, errors, less) | {"share": shares[0] if shares else None})
    return rows


def _row(
    runs: Sequence[ReadRun],
    metric: str,
    subject: tuple[str, str, Any] | None,
    values: Sequence[float | None],
    errors: Sequence[float | None] | None,
    less: bool | None,
    comparable: bool = True,
) -> dict[str, Any]:
    """One line of the table. An evaluation needs a result, so that a run which has one counts as finished there."""
    task, sha256, n = subject or (None, None, None)
    final = [_to_three_digits(v) if metric in COSTS else v for v in values]
    final = [v if subject or run.finished else None for run, v in zip(runs, final, strict=True)]
    known = [value for value in final if value is not None]
    best: list[int] = []
    if comparable and less is not None and len(known) > 1 and _differ(known):
        target = min(known) if less else max(known)
        best = [number for number, value in enumerate(final) if value == target]
    return {
        "metric": metric,
        "task": task,
        "data_sha256": sha256,
        "n": n,
        "values": list(values),
        "stderr": list(errors or [None] * len(values)),
        "lower_is_better": less,
        "share": False,
        "best": best,
    }


def _to_three_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _warnings(
    runs: Sequence[ReadRun], settings: Mapping[str, Any], hashes: Mapping[str, Sequence[str | None]]
) -> Iterator[str]:
    for key, what in (("model.weight_hash", "base"), ("data.sha256", "data")):
        if key in hashes:
            yield f"not the same {what} ({_listed(runs, hashes[key])}): metrics are not comparable"
    if (why := _why_losses_differ(runs, settings, hashes)) is not None:
        yield f"{why}: eval_loss is not comparable, and none is marked"
    for run in runs:
        if not run.finished:
            yield f"{run.name} is {run.status.label}: its values are those so far, and none is marked"
        yield from run.problems


def _listed(runs: Sequence[ReadRun], values: Sequence[str | None]) -> str:
    return ", ".join(f"{run.name}: {(value or 'unknown')[:12]}" for run, value in zip(runs, values, strict=True))


def _why_losses_differ(runs: Sequence[ReadRun], settings: Mapping[str, Any], hashes: Mapping[str, Any]) -> str | None:
    """Why evaluation losses are not of the same thing; None where they are."""
    if _differ([run.objective for run in runs]):
        return "not the same objective"
    if "data.eval_sha256" in hashes or "data.eval_fraction" in settings:
        return "not the same held-out rows"
    held_out_by_seed = any(run.settings.get("data.eval_fraction") for run in runs)
    if held_out_by_seed and ("training.seed" in settings or "data.sha256" in hashes or "data.max_rows" in settings):
        return "not the same held-out rows (data.eval_fraction draws them from the training data, by the seed)"
    for key in ("chat_template.hash", "tokenizer.hash"):
        if key in hashes:
            return f"not the same {HASHES[key]}"
    if "data.train_on" in settings:
        return "not the same tokens count (data.train_on)"
    return None


def _comparisons(runs: Sequence[ReadRun]) -> list[dict[str, Any]]:
    """Accuracy of each run against the first-named one that was asked the same rows."""
    found = []
    for subject in _subjects(runs):
        asked = [(run, each) for run in runs if (each := _of_subject(run, subject))]
        for run, evaluation in asked[1:]:
            difference = answers_compared(evaluation, asked[0][1])
            if difference is not None:
                found.append(
                    {
                        "task": subject[0],
                        "metric": "accuracy",
                        "data_sha256": subject[1],
                        "n": subject[2],
                        "run": run.name,
                        "against": asked[0][0].name,
                        **difference.as_json(),
                    }
                )
    return found


def _scored(evaluation: Mapping[str, Any]) -> dict[Any, float]:
    """Whether the answer of each line is right; nothing where one was not scored."""
    rows = evaluation.get("examples")
    rows = rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []
    if not all(isinstance(row.get("correct"), bool) for row in rows):
        return {}
    return {(number, row.get("line")): float(row["correct"]) for number, row in enumerate(rows)}


def _write_html(path: Path, runs: Sequence[ReadRun], result: Mapping[str, Any]) -> Path:
    metrics = {(row["metric"], row["task"]): row for row in result["metrics"]}
    evaluated = [row for row in result["metrics"] if row["task"] is not None]
    known = max(evaluated, key=lambda row: sum(v is not None for v in row["values"]), default=None)
    chosen = known or metrics.get(("eval_loss", None)) or metrics.get(("train_loss", None))
    plots = loss_curves([(run.name, run.events) for run in runs])
    if chosen is not None:
        label = chosen["metric"] if chosen["task"] is None else f"{chosen['task']}: {chosen['metric']}"
        points = [
            Point(
                run.name,
                chosen["values"][number],
                chosen["stderr"][number],
                run.metrics["wall_seconds"],
                run.metrics["artifact_mb"],
                number in chosen["best"],
            )
            for number, run in enumerate(runs)
        ]
        plots += scatter_plots(label, points)
    title = f"{len(runs)} runs compared"
    return write_page(
        path, title, ", ".join(run.name for run in runs), comparison_tables(result), result["warnings"], plots
    )
