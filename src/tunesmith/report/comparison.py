"""Tables and a page of several runs: the same tables for the terminal and for HTML, from the JSON of `compare` and `sweep`.

Up to COLUMNS runs are columns, so that a row is one value of all of them; more are rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.files import write_atomic
from tunesmith.report.page import render
from tunesmith.report.text import as_text, count, duration, moment, number, percent
from tunesmith.version import __version__

COLUMNS = 5
"""Runs that stand side by side as columns; more are rows."""

LABELS = {
    "model.weight_hash": "base weights (sha256)",
    "tokenizer.hash": "tokenizer (sha256)",
    "chat_template.hash": "chat template (sha256)",
    "data.sha256": "training data (sha256)",
    "data.eval_sha256": "held-out data (sha256)",
    "data.general_sha256": "general data (sha256)",
    "data.tokens_sha256": "tokens (sha256)",
    "wall_seconds": "time",
    "tokens_per_second": "tokens/s",
    "peak_memory_gb": "peak GB",
    "trainable_parameters": "trained parameters",
    "artifact_mb": "adapter or model MB",
}
"""What rows are called whose key is not a name for people."""

UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class Cell:
    """A value as text; `best` if it is the best of its row."""

    text: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells below a header, which has a name for the first column, that of the rows' labels, too."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def comparison_tables(result: Mapping[str, Any]) -> list[Table]:
    """Of a comparison: metrics, settings that differ, hashes that differ; parts without a row are left out."""
    names = [run["name"] for run in result["runs"]]
    metrics = [("status", tuple(Cell(run["status"]) for run in result["runs"]))]
    metrics += [(_label(row, result["metrics"]), _cells(row)) for row in result["metrics"]]
    settings = [(key, tuple(map(_plain, values))) for key, values in result["settings"].items()]
    hashes = [
        (LABELS[key], tuple(Cell(value[:12] if value else UNKNOWN) for value in values))
        for key, values in result["hashes"].items()
    ]
    parts = (("Metrics", metrics), ("Settings that differ", settings), ("Data and base that differ", hashes))
    return [_table(title, names, rows) for title, rows in parts if rows]


def sweep_table(result: Mapping[str, Any]) -> Table:
    """Of a sweep: a row for each run, with its values, its metric, and what it cost."""
    runs, metric = result["runs"], result["metric"]["name"]
    share = result["metric"]["share"]
    costs = ("wall_seconds", "peak_memory_gb", "trainable_parameters", "artifact_mb")
    rows = []
    for place, run in enumerate(runs, 1):
        value = shown(metric, run["metric"], run["stderr"], share) if run["status"] == "finished" else run["status"]
        cells = [_plain(each) for each in run["values"].values()]
        cells += [Cell(value, run["name"] == result["best"]), *(Cell(shown(name, run[name])) for name in costs)]
        rows.append((str(place), tuple(cells)))
    header = ("run", *result["over"], metric, "time", "peak GB", "trained", "MB")
    return Table(f"{Path(result['sweep']).name}: {len(runs)} runs", header, tuple(rows))


def shown(metric: str, value: float | None, error: float | None = None, share: bool = False) -> str:
    """A metric's value as text, with its standard error where there is one."""
    if value is None:
        return UNKNOWN
    if metric == "wall_seconds":
        return duration(value)
    if metric == "trainable_parameters":
        return count(value)
    if metric in ("peak_memory_gb", "artifact_mb", "tokens_per_second"):
        return number(to_three_digits(value))
    text = percent(value) if share else number(value, 4)
    if error is None:
        return text
    return f"{text} ± {100 * error:.1f}" if share else f"{text} ± {number(error, 2)}"


def to_three_digits(value: float | None) -> float | None:
    """A cost as far as it can be told from another: no repetition gives it again to the last digit."""
    return None if value is None else float(f"{value:.3g}")


def is_share(metric: str, values: Sequence[float | None], said: bool | None = None) -> bool:
    """Whether a metric of an evaluation is a fraction of 1, to be shown in percent: what it says itself, else by its values."""
    if said is not None:
        return said
    known = [value for value in values if value is not None]
    return not metric.endswith(("loss", "perplexity")) and all(0 <= value <= 1 for value in known)


def write_page(
    path: Path, title: str, subtitle: str, tables: Sequence[Table], notes: Sequence[str], plots: Sequence[Any]
) -> Path:
    """Write one self-contained HTML page; returns its path. Raises RunError or MachineError where it cannot be written."""
    page = render(
        "comparison.html.jinja",
        {
            "title": title,
            "subtitle": subtitle,
            "tables": tables,
            "notes": notes,
            "plots": plots,
            "version": __version__,
            "made": moment(time.time()),
        },
    )
    write_atomic(path, page.encode("utf-8", errors="replace"))
    return path


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, tuple[Cell, ...]]]) -> Table:
    """Runs as columns, or as rows where they are many."""
    if len(names) <= COLUMNS:
        return Table(title, ("", *names), tuple(rows))
    turned = [(name, tuple(cells[index] for _, cells in rows)) for index, name in enumerate(names)]
    return Table(title, ("run", *(label for label, _ in rows)), tuple(turned))


def _label(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The metric's name, with its task, and what tells it from others of the same name."""
    metric = row["metric"]
    if row["task"] is None:
        return LABELS.get(metric, metric)
    same = [other for other in rows if (other["task"], other["metric"]) == (row["task"], metric)]
    text = f"{row['task']}: {metric}"
    if any(other["data_sha256"] != row["data_sha256"] for other in same):
        text += f" (data {(row['data_sha256'] or 'unknown')[:8]})"
    if any(other["n"] != row["n"] for other in same):
        text += f" ({row['n']} rows)"
    told = [
        f"{key} {as_text(value)}"
        for key, value in row["setup"].items()
        if key not in ("n", "sample_seed") and any(other["setup"].get(key) != value for other in same)
    ]
    return f"{text} ({', '.join(told)})" if told else text


def _cells(row: Mapping[str, Any]) -> tuple[Cell, ...]:
    share = row["task"] is not None and is_share(row["metric"], row["values"], row["share"])
    return tuple(
        Cell(shown(row["metric"], value, error, share), index in row["best"])
        for index, (value, error) in enumerate(zip(row["values"], row["stderr"], strict=True))
    )


def _plain(value: Any) -> Cell:
    return Cell(UNKNOWN if value is None else f"{value:.4g}" if isinstance(value, float) else as_text(value))
