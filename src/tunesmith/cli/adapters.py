"""`tunesmith adapters list|show|verify`: parse, call workflows/adapters.py, print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tunesmith.cli.options import Device, Json

app = typer.Typer(
    name="adapters",
    help="The adapters that there are: what each was trained on and with, and whether it still is what was saved.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Path_ = Annotated[str, typer.Argument(help="A run or an adapter folder.", metavar="PATH")]


@app.command(name="list")
def list_(
    folders: Annotated[
        list[str] | None,
        typer.Argument(help="Runs, adapters, or folders of them (default: runs/).", metavar="[FOLDER]..."),
    ] = None,
    as_json: Json = False,
) -> None:
    """All adapters under some folders, with base, size and metrics."""
    from rich.table import Table

    from tunesmith.cli.console import Console
    from tunesmith.workflows.adapters import list_adapters, metric_of

    records = list_adapters(folders or [])
    console = Console()
    if as_json:
        console.result({"adapters": records})
        return
    table = Table(box=None)
    for name in (
        "adapter",
        "base",
        "weights",
        "data",
        "settings",
        "targets",
        "MB",
        "date",
        "metric",
        "trained on from",
    ):
        table.add_column(name, overflow="fold", justify="right" if name == "MB" else "left")
    for record in records:
        said = metric_of(record) if record["status"] == "ok" else record["status"]
        table.add_row(
            *map(
                shown,
                (
                    record["name"],
                    _short(record["base"]),
                    (record["base_hash"] or "")[:8],
                    (record["data_hash"] or "")[:8],
                    _settings(record),
                    ", ".join(record["targets"]),
                    "" if record["size_mb"] is None else f"{record['size_mb']:.1f}",
                    (record["created"] or "")[:10],
                    said,
                    _short(record["parent"]),
                ),
            )
        )
    console.table(table)
    for record in records:
        if record["problem"]:
            console.event({"event": "warning", "message": printable(record["problem"])})


@app.command()
def show(path: Path_, as_json: Json = False) -> None:
    """Everything that is known of one adapter."""
    from tunesmith.cli.console import Console
    from tunesmith.workflows.adapters import show_adapter

    found = show_adapter(path)
    if as_json:
        Console().result(found)
        return
    for key, value in found.items():
        if value in (None, {}, [], ()):
            continue
        names = isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
        if isinstance(value, (dict, list, tuple)) and not names:
            print(f"{key}")
            for line in json.dumps(value, indent=2, ensure_ascii=False).splitlines():
                print(f"  {printable(line)}")
        else:
            text = ", ".join(value) if names else str(value)
            print(f"{key:<14}{printable(text)}")


@app.command()
def verify(
    path: Path_,
    model: Annotated[
        str | None, typer.Option("--model", help="Its base, if it is elsewhere now.", metavar="NAME")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Measure inference in this type against training's.", metavar="TYPE"),
    ] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Recompute its hashes and load it on its base; exit code 1 if anything differs."""
    from tunesmith.cli.console import Console
    from tunesmith.workflows.adapters import verify_adapter

    with Console() as console:
        result = verify_adapter(path, model, dtype, device, console.progress)
    if as_json:
        console.result(result)
    else:
        _print_checks(result)
    if not result["ok"]:
        raise typer.Exit(1)


def _print_checks(result: Mapping[str, Any]) -> None:
    marks = {True: "ok", False: "DIFFERS", None: "unknown"}
    if result["unverifiable"]:
        print(f"unverifiable: {', '.join(result['unverifiable'])} missing; that it loads is all that can be said")
    for check in result["checks"]:
        print(f"{marks[check['ok']]:<9}{check['name']:<9}{printable(check['message'])}")
    for effect in result["effects"]:
        over = (
            f" over a base in {effect['quantization']}"
            if effect["quantization"]
            else " over a base that is not quantized"
        )
        print(
            f"in {effect['dtype']}{over} instead of as trained: KL {effect['kl']:.2e} nats a token, top-1 agreement {effect['top1']:.1%}"
        )


def _settings(record: Mapping[str, Any]) -> str:
    """What decides most, in few words: `lora r 16 alpha 32, sft, lr 0.0002, 3 epochs`."""
    known = record["settings"]
    rank = f" r {record['rank']}" if record["rank"] is not None else ""
    alpha = f" alpha {record['alpha']:g}" if record["alpha"] is not None else ""
    steps = known.get("training.max_steps")
    length = (
        f"{steps} steps"
        if steps is not None
        else f"{known['training.epochs']} epochs"
        if "training.epochs" in known
        else None
    )
    rate = f"lr {known['optimizer.lr']}" if "optimizer.lr" in known else None
    parts = (f"{record['kind'] or ''}{rank}{alpha}".strip(), known.get("objective.name"), rate, length)
    return ", ".join(str(part) for part in parts if part)


def _short(name: str | None) -> str:
    """A hub id as it is, a path by its last two parts."""
    return "/".join((name or "").rstrip("/").split("/")[-2:])


def printable(text: str) -> str:
    """`text` without control characters: files that others wrote must not steer the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def shown(value: object) -> str:
    """A cell of a table: no markup, no control characters."""
    from rich.markup import escape

    return "" if value is None else escape(printable(str(value)))
