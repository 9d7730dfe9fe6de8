"""Compare runs by what their folders hold: settings, data, metrics, evaluations, time, memory, size.

Only files are read, so runs may be dead, copied, still running or unfinished. Every value stands beside the others in a row;
the best of a row is named where it can be: among finished runs, and for losses only where they are over the same rows. Runs that
were asked the same rows in the same way are compared with the first-named one that was, row by row (compare_evaluations.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.files import check_writable
from tunesmith.report.comparison import comparison_tables, is_share, to_three_digits, write_page
from tunesmith.report.comparison_plots import Point, loss_curves, scatter_plots
from tunesmith.report.facts import Status, eval_metric, events_of, status, wall_seconds
from tunesmith.report.text import as_number, as_text
from tunesmith.runs import RunFolder
from tunesmith.types import Event
from tunesmith.workflows.compare_evaluations import Setup, differences, other_setups, read_evaluations
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
    """What one run folder holds. `evaluations` has the newest of each setup, `problems` those that are damaged; `device` is what it
    trained on."""

    path: Path
    name: str
    status: Status
    settings: Mapping[str, Any]
    hashes: Mapping[str, str | None]
    metrics: Mapping[str, float | None]
    evaluations: Mapping[Setup, Mapping[str, Any]]
    events: Sequence[Event]
    objective: str
    device: str | None = None
    eval_rows: float | None = None
    problems: Sequence[str] = ()

    @property
    def finished(self) -> bool:
        """Whether its metrics are final."""
        return self.status.label in ("finished", "stopped early")


def compare(runs: Sequence[str | Path], html: str | Path | None = None) -> dict[str, Any]:
    """What two or more runs have in common and what not (docs/compare.md); with `html` a page of it is written there too.

    Raises RunError for fewer than two runs, one that is named twice, a folder that is no run, and a page that cannot be written.
    """
    if html is not None:
        check_page(Path(html))
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
    settings = dict(flattened(read_yaml(run.config_path)[0]))
    evaluations, problems = read_evaluations(path / "evaluations")
    return ReadRun(
        path=path,
        name=name or path.resolve().name,
        status=status(events, metrics, now),
        settings=settings,
        hashes={key: _text_at(metadata, key) for key in HASHES},
        metrics=_metrics(run, events, metrics, now),
        evaluations=evaluations,
        events=events,
        objective=as_text(metadata.get("objective") or ""),
        device=_text_at(metadata, "hardware.device"),
        eval_rows=as_number(_value_at(metadata, "data.eval_rows")),
        problems=problems,
    )


def compare_runs(runs: Sequence[ReadRun]) -> dict[str, Any]:
    """The comparison as JSON."""
    settings = {
        key: values for key, values in differing([run.settings for run in runs]).items() if key not in NOT_SETTINGS
    }
    hashes = differing([run.hashes for run in runs])
    same_loss = why_losses_differ(runs) is None
    incomparable = {name for name in TRAINING_METRICS if name.endswith("loss") and not same_loss}
    if any(run.device == "cpu" for run in runs):
        incomparable.add("peak_memory_gb")  # the peak of the process, whatever it did before
    rows = [
        _row(runs, name, None, [run.metrics.get(name) for run in runs], None, less, name not in incomparable)
        for name, less in TRAINING_METRICS.items()
    ]
    return {
        "runs": [
            {"name": run.name, "path": str(run.path), "status": run.status.label, "note": run.status.note}
            for run in runs
        ],
        "settings": settings,
        "hashes": hashes,
        "warnings": warnings_of(runs),
        "metrics": [row for row in rows if any(value is not None for value in row["values"])] + _evaluated(runs),
        "comparisons": _comparisons(runs),
    }


def warnings_of(runs: Sequence[ReadRun]) -> list[str]:
    """What is not comparable, not finished, or damaged."""
    return list(_warnings(runs))


def why_losses_differ(runs: Sequence[ReadRun]) -> str | None:
    """Why the runs' evaluation losses are not of the same thing; None where they are."""
    return why_other_losses(
        [run.objective for run in runs],
        [run.settings.get("data.eval_fraction") for run in runs],
        [run.eval_rows for run in runs],
        differing([run.settings for run in runs]),
        differing([run.hashes for run in runs]),
    )


def why_other_losses(
    objectives: Sequence[str],
    fractions: Sequence[Any],
    eval_rows: Sequence[Any],
    settings: Mapping[str, Any],
    hashes: Mapping[str, Any],
) -> str | None:
    """Why losses are not of the same thing: by each run's objective, `data.eval_fraction` and number of held-out rows, and by the settings
    and the hashes that differ."""
    if _differ(objectives):
        return "not the same objective"
    if "data.eval_sha256" in hashes or "data.eval_fraction" in settings:
        return "not the same held-out rows"
    if any(fractions) and ("training.seed" in settings or "data.sha256" in hashes or "data.max_rows" in settings):
        return "not the same held-out rows (data.eval_fraction draws them from the training data, by the seed)"
    if _differ(eval_rows):
        return "not the same held-out rows (data.max_seq_length and data.overlong say which are left)"
    for key in ("chat_template.hash", "tokenizer.hash"):
        if key in hashes:
            return f"not the same {HASHES[key]}"
    if "data.train_on" in settings:
        return "not the same tokens count (data.train_on)"
    return None


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name is better when it is smaller."""
    return metric.endswith(LOWER_IS_BETTER) or bool(TRAINING_METRICS.get(metric))


def differing(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values differ, with the value of each."""
    values = {key: [each.get(key) for each in found] for one in found for key in one}
    return {key: each for key, each in values.items() if _differ(each)}


def check_page(path: Path) -> None:
    """Raise RunError unless a page can be written at `path`."""
    if path.is_dir():
        raise RunError(f"{path}: the page is a file, and this is a folder; name a file, e.g. {path / 'page.html'}")
    if not path.absolute().parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent} for the page; make it, or choose another --html")
    check_writable(path)


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


def flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted key."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from flattened(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _text_at(metadata: Mapping[str, Any], dotted: str) -> str | None:
    value = _value_at(metadata, dotted)
    return value if isinstance(value, str) else None


def _value_at(metadata: Mapping[str, Any], dotted: str) -> Any:
    section, _, key = dotted.partition(".")
    found = metadata.get(section)
    return found.get(key) if isinstance(found, dict) else None


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


def _evaluated(runs: Sequence[ReadRun]) -> list[dict[str, Any]]:
    """A row for each metric of each setup."""
    rows = []
    for setup in dict.fromkeys(setup for run in runs for setup in run.evaluations):
        found = [run.evaluations[setup]["metrics"] if setup in run.evaluations else {} for run in runs]
        for name in dict.fromkeys(name for metrics in found for name in metrics):
            cells = [metrics.get(name, {}) for metrics in found]
            better = next((cell["higher_is_better"] for cell in cells if "higher_is_better" in cell), None)
            less = lower_is_better(name) if better is None else not better
            values, errors = ([as_number(cell.get(key)) for cell in cells] for key in ("value", "stderr"))
            if any(value is not None for value in values):
                shares = [cell["share"] for cell in cells if isinstance(cell.get("share"), bool)]
                rows.append(_row(runs, name, setup, values, errors, less) | {"share": shares[0] if shares else None})
    return rows


def _row(
    runs: Sequence[ReadRun],
    metric: str,
    setup: Setup | None,
    values: Sequence[float | None],
    errors: Sequence[float | None] | None,
    less: bool | None,
    comparable: bool = True,
) -> dict[str, Any]:
    """One line of the table. An evaluation needs a result, so that a run which has one counts as finished there."""
    final = [to_three_digits(v) if metric in COSTS else v for v in values]
    final = [v if setup or run.finished else None for run, v in zip(runs, final, strict=True)]
    known = [value for value in final if value is not None]
    best: list[int] = []
    if comparable and less is not None and len(known) > 1 and _differ(known):
        target = min(known) if less else max(known)
        best = [number for number, value in enumerate(final) if value == target]
    return {
        "metric": metric,
        "task": setup.task if setup else None,
        "data_sha256": setup.data_sha256 if setup else None,
        "n": setup.n if setup else None,
        "setup": setup.facts() if setup else None,
        "values": list(values),
        "stderr": list(errors or [None] * len(values)),
        "lower_is_better": less,
        "share": False,
        "best": best,
    }


def _warnings(runs: Sequence[ReadRun]) -> Iterator[str]:
    hashes = differing([run.hashes for run in runs])
    for key, what in (("model.weight_hash", "base"), ("data.sha256", "data")):
        if key in hashes:
            yield f"not the same {what} ({_listed(runs, hashes[key])}): metrics are not comparable"
    if (why := why_losses_differ(runs)) is not None:
        yield f"{why}: eval_loss is not comparable, and none is marked"
    yield from other_setups([run.name for run in runs], [run.evaluations for run in runs])
    for run in runs:
        if not run.finished:
            yield f"{run.name} is {run.status.label}: its values are those so far, and none is marked"
        yield from run.problems


def _listed(runs: Sequence[ReadRun], values: Sequence[str | None]) -> str:
    return ", ".join(f"{run.name}: {(value or 'unknown')[:12]}" for run, value in zip(runs, values, strict=True))


def _comparisons(runs: Sequence[ReadRun]) -> list[dict[str, Any]]:
    """Each metric of each run against the first-named one that was asked the same rows in the same way."""
    found = []
    for setup in dict.fromkeys(setup for run in runs for setup in run.evaluations):
        first, *others = [run for run in runs if setup in run.evaluations]
        theirs = first.evaluations[setup]
        for run in others:
            ours = run.evaluations[setup]
            both = [name for name in ours["metrics"] if name in theirs["metrics"]]
            for name, difference in differences(ours, theirs, both).items():
                values = [as_number(each["metrics"][name].get("value")) for each in (ours, theirs)]
                if values[0] is None or values[1] is None:
                    continue
                no_test = {"difference": values[0] - values[1], "stderr": None, "p": None, "test": None}
                found.append(
                    {
                        "task": setup.task,
                        "metric": name,
                        "data_sha256": setup.data_sha256,
                        "n": ours["metrics"][name].get("n", setup.n),
                        "share": is_share(name, values, ours["metrics"][name].get("share")),
                        "run": run.name,
                        "against": first.name,
                        **(difference.as_json() if difference else {**no_test, "verdict": "unclear"}),
                    }
                )
    return found


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
