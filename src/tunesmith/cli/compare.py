"""`tunesmith compare` and `tunesmith sweep`: several runs side by side, and training them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Json, Set

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from tunesmith.report.comparison import Table

Html = Annotated[str | None, typer.Option("--html", help="Write a page with plots here.", metavar="FILE")]


def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more run folders.", metavar="RUN")],
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show runs side by side: metrics, settings, data, cost."""
    from tunesmith import api
    from tunesmith.cli.console import Console
    from tunesmith.figures import as_p
    from tunesmith.report.comparison import comparison_tables

    result = api.compare(runs, html)
    console = Console()
    if as_json:
        console.result(result)
        return
    for part in comparison_tables(result):
        console.table(rich_table(part))
    for found in result["comparisons"]:
        test = "no test: its rows are not kept" if found["p"] is None else f"{as_p(found['p'])}, {found['test']}"
        change = f"{100 * found['difference']:+.1f} points" if found["share"] else f"{found['difference']:+.4g}"
        print(
            f"{found['task']}: {found['metric']} of {found['run']} against {found['against']}: "
            f"{change} on the same {found['n']} rows ({test}): {found['verdict']}"
        )
    for warning in result["warnings"]:
        console.event({"event": "warning", "message": warning})
    if html:
        print(f"page: {result['html']}")


def sweep(
    config: Annotated[str | None, typer.Argument(help="Settings (YAML).", metavar="[RUN.yaml]")] = None,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", help="Values to try; with --trials also LOW..HIGH.", metavar="SECTION.KEY=VALUE,VALUE"),
    ] = None,
    settings: Set = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder (default: runs/NAME-sweep).", metavar="DIR")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Questions that each run answers.", metavar="FILE")] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", help="A fixed sample of this many rows.", min=1, metavar="N")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="What is best (default: accuracy with --data, else eval_loss).", metavar="NAME"),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Search with so many runs, by Optuna.", min=1, metavar="N")
    ] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Train over values of settings, and say which is best.

    The same command goes on after a crash: finished runs are not repeated.
    """
    from tunesmith import api
    from tunesmith.cli.console import Console
    from tunesmith.report.comparison import sweep_table

    with Console() as console:

        def announce(text: str) -> None:
            console.tasks.clear()  # the next run has bars of its own
            console.announce(text)

        result = api.sweep(
            config,
            over or [],
            settings=settings or [],
            out=out,
            data=data,
            rows=rows,
            metric=metric,
            trials=trials,
            html=html,
            sink=console.event,
            progress=console.progress,
            announce=announce,
        )
    if as_json:
        console.result(result)
    else:
        console.table(rich_table(sweep_table(result)))
        print("\n".join(result["conclusions"]))
        for warning in result["warnings"]:
            console.event({"event": "warning", "message": warning})
        print(f"page: {result['html']}")
    refuse_failed(result)


def refuse_failed(result: Mapping[str, Any]) -> None:
    """Raise VerificationError where a run of a sweep failed."""
    from tunesmith.errors import VerificationError

    failed = [run["name"] for run in result["runs"] if run["status"] == "failed"]
    if failed:
        raise VerificationError(f"{len(failed)} of {len(result['runs'])} runs failed: {', '.join(failed)}")


def rich_table(table: Table) -> RichTable:
    """A table for the terminal; the best value of a row is bold and has a star."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    made = RichTable(title=escape(table.title))
    for number, name in enumerate(table.header):
        made.add_column(escape(name), justify="right" if number else "left", overflow="fold")
    for label, cells in table.rows:
        texts = [f"[bold green]{escape(cell.text)} ★[/]" if cell.best else escape(cell.text) for cell in cells]
        made.add_row(escape(label), *texts)
    return made
