"""`tunesmith eval`: measure, compare with the base, hold to gates, print."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Device, DTypeName, Json, Model, Target

if TYPE_CHECKING:
    from rich.table import Table

CONFUSIONS_SHOWN = 5
EXAMPLES_SHOWN = 3


def evaluate(
    target: Target,
    data: Annotated[str | None, typer.Option("--data", help="Questions with known answers.", metavar="FILE")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Ask the base model too, and compare.")] = False,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", help='"accuracy >= baseline + 5pt", else exit 1.', metavar="CONDITION"),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", help="A fixed sample of this many rows.", min=1, metavar="N")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest answer.", min=1, metavar="N")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting.", metavar="EVALUATION.KEY=VALUE")
    ] = None,
    retain: Annotated[bool, typer.Option("--retain", help="General ability too, before and after.")] = False,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="safety, memorization, lm-eval's tasks.", metavar="NAME,NAME"),
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="An LLM judges: endpoint or local:PATH.", metavar="URL")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also over a base that it was not trained on.")] = False,
    model: Model = None,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model, against its base and against gates."""
    from tunesmith import api
    from tunesmith.cli.console import Console, metrics_table

    changes = evaluation_changes(settings or [])
    if judge is not None:
        changes["judge"] = {**changes.get("judge", {}), "url": judge}
    given = {"max_rows": rows, "max_new_tokens": max_new_tokens}
    changes |= {key: value for key, value in given.items() if value is not None}
    with Console() as console:
        result = api.evaluate(
            target,
            data,
            baseline=baseline,
            gates=gate or [],
            retain=retain,
            tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
            model=model,
            device=device,
            dtype=dtype,
            force=force,
            changes=changes,
            progress=console.progress,
        )
    if as_json:
        console.result(result)
    else:
        if result["task_kind"]:
            print(f"task: {result['task_kind']} ({result['task_reason']})")
        console.table(metrics_table(result))
        for line in [*_findings(result), *_advice(result)]:
            print(line)
        if result["gate"]:
            console.table(gate_table(result["gate"]["conditions"]))
        if "path" in result:
            print(f"every answer: {result['path']}")
    if result["gate"] and not result["gate"]["passed"]:
        failed = [one["condition"] for one in result["gate"]["conditions"] if not one["passed"]]
        print(f"tunesmith: the gate failed: {'; '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def evaluation_changes(settings: Sequence[str]) -> dict[str, Any]:
    """`evaluation.KEY=VALUE` as {KEY: VALUE}. Raises ConfigError for other sections, and for what is no setting."""
    from tunesmith.config import load_config
    from tunesmith.errors import ConfigError

    others = [text for text in settings if not text.strip().startswith("evaluation.")]
    if others:
        raise ConfigError(
            [f"--set {text}: eval takes evaluation's settings only, e.g. evaluation.batch_size=64" for text in others]
        )
    return load_config(None, settings).evaluation.model_dump(exclude_unset=True)


def gate_table(conditions: Sequence[Mapping[str, Any]]) -> Table:
    """What each condition needed, and what was measured."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="gate")
    for heading in ("condition", "measured", "needed", ""):
        table.add_column(heading, justify="right" if heading in ("measured", "needed") else "left")
    for one in conditions:
        outcome = "[green]passed[/green]" if one["passed"] else "[red]failed[/red]"
        needed = f"{one['sign']} {one['needed']:.4g}"
        table.add_row(escape(one["condition"]), f"{one['value']:.4g}", needed, outcome)
    return table


def _findings(result: Mapping[str, Any]) -> list[str]:
    """The labels that are most often taken for others, and some wrong answers."""
    lines = []
    classes = result["classes"]
    confusions = classes["tuned"]["confusions"] if classes else []
    if confusions:
        lines.append("most often confused:")
        lines += [
            f"  {one['expected']} answered as {one['answered']}: {one['count']}, e.g. line "
            f"{one['examples'][0]['line']}: {one_line(one['examples'][0]['prompt'], 60)!r}"
            for one in confusions[:CONFUSIONS_SHOWN]
        ]
    if classes and classes["tuned"]["other"]:
        lines.append(f"answers that are no label: {classes['tuned']['other']} of {result['n']}")
    wrong = [row for row in result["examples"] if row.get("correct") is False]
    lines += [
        f"  line {row['line']}: expected {one_line(row['expected'])!r}, answered {one_line(row['answer'])!r}"
        for row in wrong[:EXAMPLES_SHOWN]
    ]
    return lines


def _advice(result: Mapping[str, Any]) -> list[str]:
    """What parts say beside their metrics: notes, and what to change."""
    lines = []
    for name, details in result["parts"].items():
        notes = [details["note"]] if "note" in details else details.get("notes", [])
        lines += [f"{name}: {text}" for text in (*notes, *details.get("advice", []))]
    return lines


def one_line(text: str, width: int = 90) -> str:
    """A text in one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
