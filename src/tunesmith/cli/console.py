"""What people see while a command works: progress bars in a terminal, a line now and then elsewhere. All on stderr.

Results go to stdout: text for people, or one JSON object with --json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tunesmith.figures import as_difference, as_measured
from tunesmith.files import finite
from tunesmith.types import Event

SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal, a running stage says where it is this often."""

SAMPLE_WIDTH = 90
"""Characters of a sample's question, and of its answer; events.jsonl has all of them."""


class Console:
    """Shows stages and events; a context manager, so that the bars end before the result is printed."""

    def __init__(self) -> None:
        self.err = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self.err,
        )
        self.tasks: dict[str, TaskID] = {}
        self.total_steps = 0
        self._last_line = 0.0
        self._started: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Console:
        if self.err.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.err.is_terminal:
            self.bars.stop()

    def announce(self, text: str) -> None:
        """One line about what comes next."""
        self.err.print(text, markup=False)

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """A stage went on: a `Progress` for the parts below."""
        if total <= 1:  # loading and the like: nothing to count
            if done == 0:
                self.announce(f"{stage} ...")
            return
        if self.err.is_terminal:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage, total=total, note=note)
            self.bars.update(self.tasks[stage], completed=done, note=note)
            return
        now = time.monotonic()
        started, first = self._started.setdefault(stage, (now, done))
        if done == total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = f", {(now - started) / (done - first) * (total - done):.0f} s left" if first < done < total else ""
            self.announce(f"{stage}: {done}/{total}{left}{'  ' + note if note else ''}")

    def event(self, event: Event) -> None:
        """An `EventSink`: what the run logs, for people."""
        kind = event["event"]
        if kind == "start":
            self.total_steps = event["steps"]
            share = event["trainable_parameters"] / event["total_parameters"]
            self.announce(
                f"{event['method']} on {event['device']} in {event['dtype']}: {event['trainable_parameters']:,} of "
                f"{event['total_parameters']:,} parameters train ({share:.2%}); {event['examples']} examples, "
                f"{event['steps']} steps; {event['memory']}"
            )
        elif kind == "step":
            note = f"loss {event['loss']:.4f}  {event['examples_per_second']:.1f} examples/s  {event['tokens_per_second']:.0f} tokens/s"
            self.progress("training", event["step"], self.total_steps, note)
        elif kind == "eval":
            values = "  ".join(f"{name} {value:.4f}" for name, value in event["metrics"].items())
            self.announce(f"step {event['step']}: {values}")
        elif kind == "sample":
            asked, said = (
                shorten(" ".join(event[key].split()), SAMPLE_WIDTH, placeholder=" ...") for key in ("prompt", "answer")
            )
            self.announce(f"step {event['step']}, line {event['line']}: {asked} -> {said}")
        elif kind in ("warning", "skipped", "rollback", "out_of_memory"):
            self.err.print(f"warning: {event['message']}", style="yellow", markup=False)
        elif kind in ("decision", "calibration", "resume"):
            self.announce(event.get("message") or f"going on from step {event['step']}")

    def result(self, value: Mapping[str, Any]) -> None:
        """Print one JSON object on stdout. NaN and infinities become null: JSON has neither."""
        print(json.dumps(finite(value), ensure_ascii=False, indent=2))

    def table(self, table: Table) -> None:
        """Print a table on stdout, as wide as the terminal, or as wide as it needs where there is none."""
        out = RichConsole(highlight=False, width=None if sys.stdout.isatty() else 140)
        out.print(table)


def metrics_table(result: Mapping[str, Any]) -> Table:
    """The metrics of one evaluation, before and after where there is a baseline."""
    baseline = result["baseline"]
    rows = f": {result['n']} of {result['rows_in_file']} rows, greedy decoding" if result["rows_in_file"] else ""
    table = Table(title=f"{escape(result['task'])}{rows}")
    table.add_column("metric")
    if baseline:
        table.add_column("base", justify="right")
    table.add_column("tuned" if baseline else "value", justify="right")
    if baseline:
        table.add_column("difference", justify="right")
    for name, metric in result["metrics"].items():
        if not baseline:
            table.add_row(escape(name), as_measured(metric))
        elif name in baseline:
            table.add_row(
                escape(name),
                as_measured(baseline[name]),
                as_measured(metric),
                _difference(result["comparison"][name], metric),
            )
        else:
            table.add_row(escape(name), "", as_measured(metric), "")
    return table


def _difference(found: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """`+12.5 points, p < 0.001: better`."""
    said = as_difference(found, metric)
    return said if found["p"] is None else f"{said}: {found['verdict']}"
