"""`tunesmith bench`: the table of speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import DTypeName

if TYPE_CHECKING:
    from rich.table import Table


def bench(
    model: Annotated[str | None, typer.Option("--model", help="Shape of the model.", metavar="NAME")] = None,
    method: Annotated[str | None, typer.Option("--method", help="lora or qlora.", metavar="NAME")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows of a step.", min=1, metavar="N")] = None,
    seq: Annotated[int | None, typer.Option("--seq", help="Tokens of a row.", min=16, metavar="N")] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Pack documents of these lengths, one a line.", metavar="FILE")
    ] = None,
    documents: Annotated[
        str | None, typer.Option("--documents", help="Pack documents of drawn lengths: lognormal.", metavar="NAME")
    ] = None,
    memory: Annotated[
        list[str] | None, typer.Option("--memory", help="auto, fast, min, or a cap in GB.", metavar="MODE")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="tunesmith, reference, or a peer.", metavar="NAME")
    ] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="A named set of rows: h100.", metavar="NAME")] = None,
    row: Annotated[
        list[str] | None, typer.Option("--row", help="Only rows (GROUP, or a pattern of names).", metavar="NAME")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Of the adapter.", min=1, metavar="N")] = 16,
    steps: Annotated[int, typer.Option("--steps", help="Timed steps.", min=1, metavar="N")] = 6,
    check: Annotated[bool, typer.Option("--check", help="Compare gradients with the reference.")] = False,
    models: Annotated[str | None, typer.Option("--models", help="Keep the peers' models here.", metavar="DIR")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.", metavar="NAME")] = "auto",
    dtype: DTypeName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure a training step: ours, and peers installed here."""
    from tunesmith.cli.console import Console
    from tunesmith.errors import VerificationError
    from tunesmith.workflows.bench import bench as run
    from tunesmith.workflows.bench import plan_rows  # not from api: this process needs no PyTorch

    rows = plan_rows(
        suite=suite,
        select=row or (),
        model=model,
        method=method,
        batch=batch,
        seq=seq,
        lengths=lengths,
        documents=documents,
        memory=memory or (),
        only=only or (),
        rank=rank,
        steps=steps,
        check=check,
        device=device,
        dtype=dtype,
    )
    with Console() as console:
        result = run(rows, models, lambda done: console.announce(summary(done)), console.progress)
    if as_json:
        console.result(result)
    else:
        for _, group in groupby(result["rows"], lambda done: (done["group"], done["workload"])):
            group_rows = list(group)
            console.table(table(group_rows))
            print("\n".join([*notes(group_rows), ""]))
    if result["problems"]:
        raise VerificationError("\n".join(result["problems"]))


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of one workload. Fits 80 columns."""
    from rich.markup import escape
    from rich.table import Table

    names = [row["hardware"]["name"] for row in rows if not row["error"]]
    table = Table(title=escape(", ".join([rows[0]["workload"], *names[:1]])), box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("tokens/s", "spread", "peak GB", "reserved", "1st s", "loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row["error"]:
            table.add_row(escape(row["label"]), "failed")
            continue
        first, last = row["losses"][0], row["losses"][-1]
        table.add_row(
            escape(row["label"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['spread'] - 1:.0%}",
            f"{row['peak_gb']:.2f}",
            "-" if row["reserved_gb"] is None else f"{row['reserved_gb']:.2f}",
            f"{row['first_step_s']:.1f}",
            f"{first:.2f} → {last:.2f}",
        )
    return table


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table has no room for: errors, checks, and where the fused engine did not run."""
    lines = []
    for row in rows:
        if row["error"]:
            lines.append(f"{row['label']}: {row['error']}")
            continue
        if row["runner"] == "tunesmith" and row["engine_used"] == "reference":
            lines.append(f"{row['label']}: ran the reference engine ({row['plan']})")
        if check := row.get("check_result"):
            line = (
                f"{row['label']}: gradients of {check['tensors']} adapter tensors: in fp32 every norm within "
                f"{check['fp32']['norm_difference']:.3%} of the reference engine's"
            )
            if row["compute_dtype"] != "fp32":
                line += (
                    f"; in {row['compute_dtype']} the whole norm within {check['total_norm_difference']:.2%}, and "
                    f"{check['error']:.2%} from fp32 where the reference engine's are {check['reference_error']:.2%}"
                )
            lines.append(line)
    return lines


def summary(row: Mapping[str, Any]) -> str:
    """One line about a row that is done."""
    if row["error"]:
        return f"{row['name']}: {row['error']}"
    return f"{row['name']}: {row['tokens_per_second']:,.0f} tokens/s, {row['peak_gb']:.2f} GB"
