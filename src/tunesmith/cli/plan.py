"""`tunesmith plan`: what fits, printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tunesmith.workflows.plan import Data

TIGHT = 0.8
"""Share of a card from which on a fitting plan is shown as tight."""


def plan(
    config: Annotated[str | None, typer.Argument(help="Settings (YAML).", metavar="[RUN.yaml]")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A known model, folder or hub id; without: all known.", metavar="NAME")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Card (T4, 4xH100, ...); without: this one, or all.", metavar="NAME")
    ] = None,
    memory: Annotated[float | None, typer.Option("--memory", help="Its memory, or any.", metavar="GB")] = None,
    num_gpus: Annotated[int, typer.Option("--num-gpus", help="How many of them.", metavar="N")] = 1,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Only lora, qlora or full.", metavar="NAME")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Examples: their lengths, and hours.", metavar="FILE")
    ] = None,
    sequence: Annotated[
        int | None, typer.Option("--max-seq-length", help="Tokens of an example.", min=8, metavar="N")
    ] = None,
    rank: Annotated[str | None, typer.Option("--rank", help="Ranks, e.g. 8,16,64.", metavar="N,N,...")] = None,
    price: Annotated[float | None, typer.Option("--price-per-hour", help="Of one card.", min=0, metavar="X")] = None,
    plot: Annotated[str | None, typer.Option("--plot", help="Draw the memory (.png, .svg).", metavar="FILE")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting.", metavar="SECTION.KEY=VALUE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """What fits on a card: memory, speed, cost. No GPU needed."""
    from tunesmith.cli.console import Console
    from tunesmith.config import load_config
    from tunesmith.errors import ConfigError
    from tunesmith.workflows import plan as planner  # not from api: this needs no PyTorch
    from tunesmith.workflows import plan_lists

    methods = _methods(method or [])
    # Settings of the quantization are there for QLoRA, be it one of several methods.
    main = None if not methods else "qlora" if "qlora" in methods else methods[0]
    given = {"model.name": model, "data.path": data, "method": main}
    run = load_config(config, settings or [], {key: value for key, value in given.items() if value is not None})
    if not methods and (config or "method" in run.model_fields_set):
        methods = [run.method]
    target = planner.find_target(gpu, memory, num_gpus)
    console = Console()
    if not run.model.name:
        if target is None:
            raise ConfigError("no model and no card: pass --model, --gpu or --memory")
        _refuse_unused({"--data": data, "--rank": rank, "--price-per-hour": price, "--plot": plot}, "without --model")
        rows = plan_lists.plan_models(run, target, sequence, methods)
        if as_json:
            console.result({"gpu": target.name, "memory_gb": target.memory_gb, "models": rows})
            return
        length = planner.asked_length(run, sequence)
        title = f"What trains on {target.label} ({target.memory_gb:.1f} GB), {length:,} tokens"
        console.table(methods_table(title, "model", "model", rows, target.memory_gb))
        return
    if target is None:
        unused = {"--data": data, "--rank": rank, "--price-per-hour": price, "--plot": plot}
        _refuse_unused(unused | {"--num-gpus": num_gpus if num_gpus > 1 else None}, "without --gpu or --memory")
        name, rows = plan_lists.plan_cards(run, sequence, methods)
        if as_json:
            console.result({"model": name, "gpus": rows})
            return
        title = f"Where {name} trains, {planner.asked_length(run, sequence):,} tokens an example"
        console.table(methods_table(title, "card", "gpu", rows, None))
        return
    if rank is not None:
        _refuse_unused({"--data": data, "--price-per-hour": price, "--plot": plot}, "with --rank")
        if len(methods) > 1:
            raise ConfigError("--rank is for one method: pass --method lora or qlora, not both")
        chosen = planner.with_settings(run, method=methods[0]) if methods else run
        ranks = plan_lists.plan_ranks(chosen, target, _ranks(rank), sequence)
        if as_json:
            console.result({"model": run.model.name, "gpu": target.name, "method": chosen.method, "ranks": ranks})
            return
        console.table(ranks_table(f"{run.model.name}, {planner.METHOD_NAMES[chosen.method]}, on {target.label}", ranks))
        return
    if not run.data.path or target.card is None:
        _refuse_unused({"--price-per-hour": price}, "without --data and --gpu, which say for how many hours")
    result = planner.plan(
        run,
        target,
        methods=methods,
        data=_examples(run, sequence) if run.data.path else None,
        sequence=sequence,
        price_per_hour=None if price is None else price * target.count,
    )
    if plot is not None:
        result["plot"] = draw(plot, result)
    if as_json:
        console.result(result)
    else:
        print_plan(console, result)
    planner.refuse_unless_fits(result if as_json else {**result, "advice": []})


def _methods(names: Sequence[str]) -> list[Any]:
    from tunesmith.errors import ConfigError
    from tunesmith.workflows.plan import METHOD_NAMES

    for name in names:
        if name not in METHOD_NAMES:
            raise ConfigError(f"--method is {name!r}: expected lora, qlora or full")
    return list(names)


def _ranks(text: str) -> list[int]:
    from tunesmith.errors import ConfigError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--rank is {text!r}: expected numbers, e.g. 8,16,64") from None


def _refuse_unused(options: Mapping[str, object], when: str) -> None:
    from tunesmith.errors import ConfigError

    used = [name for name, value in options.items() if value is not None]
    if used:
        raise ConfigError(f"{', '.join(used)} {'has' if len(used) == 1 else 'have'} no effect {when}")


def _examples(config: Any, sequence: int | None) -> Data:
    """The lengths of the rows, cut at `sequence` or `data.max_seq_length` as training would."""
    from tunesmith.cli.console import Console
    from tunesmith.workflows.advise_data import read_facts
    from tunesmith.workflows.plan import Data, full_name

    config.model.name = full_name(config.model.name)
    with Console() as console:
        facts = read_facts(config, console.progress)
    limit = sequence or (None if config.data.max_seq_length == "auto" else config.data.max_seq_length)
    lengths = list(facts.lengths)
    if limit is not None:
        splits = config.data.overlong == "split" or (config.data.overlong == "auto" and facts.plain_text)
        rests = [length % limit for length in lengths if length % limit and splits]
        whole = [limit] * sum(length // limit for length in lengths)
        lengths = [*whole, *rests] if splits else [min(length, limit) for length in lengths]
    share = facts.supervised_tokens / max(1, facts.total_tokens)
    return Data(lengths, [max(1, round(share * length)) for length in lengths], True)


# -- for people -------------------------------------------------------------------------------------------------------


def print_plan(console: Any, result: Mapping[str, Any]) -> None:
    """The answer first, then what to change, the options, where the memory goes, and what the figures rest on."""
    chosen = result["recommended"]
    print(result["answer"])
    if chosen and chosen["hours"] is not None:
        cost = "" if chosen["cost"] is None else f", {chosen['cost']:,.2f} at the price given"
        data = result["data"]
        print(f"{data['rows']:,} rows, {data['tokens']:,} tokens: about {_hours(chosen['hours'])}{cost}")
    for line in result["advice"]:
        print(f"  {line}")
    print()
    console.table(options_table(result))
    if result["breakdown"]:
        parts = {name.removesuffix("_gb"): gb for name, gb in result["breakdown"].items() if gb >= 0.005}
        print(
            "\npeak: " + ", ".join(f"{name} {gb:.2f}" for name, gb in parts.items()) + " GB (context is the driver's)"
        )
    print(f"memory: {result['basis']['memory']}\nspeed: {result['basis']['speed']}")
    if "plot" in result:
        print(f"plot: {result['plot']}")


def _hours(hours: float) -> str:
    return f"{60 * hours:.0f} minutes" if hours < 1 else f"{hours:.1f} hours"


def options_table(result: Mapping[str, Any]) -> Table:
    """All options that were looked at, coloured by whether they fit."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{escape(result['model'])} on {escape(result['gpu'])}, {result['memory_gb']:.1f} GB")
    for column in (
        "method",
        "tokens",
        "micro x acc.",
        "memory",
        "optimizer",
        "recompute",
        "peak GB",
        "tokens/s",
        "fits",
    ):
        table.add_column(
            column, justify="left" if column in ("method", "memory", "optimizer", "recompute") else "right"
        )
    for option in result["options"]:
        word, colour = _verdict(option["peak_gb"], option["fits"], result["memory_gb"])
        best = option == result["recommended"]
        table.add_row(
            f"{option['label']} *" if best else option["label"],
            f"{option['max_seq_length']:,}",
            option["micro_batches"],
            option["memory_mode"],
            option["optimizer"],
            option["recompute"].removesuffix(" layers"),
            f"{option['peak_gb']:.1f}",
            _speed(option["tokens_per_second"]),
            f"[{colour}]{word}[/{colour}]",
            style="bold" if best else None,
        )
    return table


def methods_table(
    title: str, heading: str, key: str, rows: Sequence[Mapping[str, Any]], memory_gb: float | None
) -> Table:
    """One row a model or card, one column a method: the peak and the speed of what would be chosen."""
    from rich.markup import escape
    from rich.table import Table

    from tunesmith.workflows.plan import METHOD_NAMES

    table = Table(title=escape(title))
    table.add_column(heading)
    table.add_column("GB" if key == "gpu" else "parameters", justify="right")
    methods = [name for name in METHOD_NAMES if name in rows[0]["methods"]]
    for name in methods:
        table.add_column(METHOD_NAMES[name])
    for row in rows:
        size = f"{row['memory_gb']:.1f}" if key == "gpu" else f"{row['parameters'] / 1e9:.1f}B"
        cells = [_cell(row["methods"][name], memory_gb or row["memory_gb"]) for name in methods]
        table.add_row(escape(row[key]), size, *cells)
    return table


def _cell(found: Mapping[str, Any], memory_gb: float) -> str:
    word, colour = _verdict(found["peak_gb"], found["fits"], memory_gb)
    if not found["fits"]:
        return f"[{colour}]no: {found['peak_gb']:.0f} GB at least[/{colour}]"
    speed = "" if found["tokens_per_second"] is None else f", {_speed(found['tokens_per_second'])}/s{_note(found)}"
    return f"[{colour}]{word}: {found['peak_gb']:.1f} GB{speed}[/{colour}]"


def _verdict(peak_gb: float, fits: bool, memory_gb: float) -> tuple[str, str]:
    """A word and a colour: yes, tight or no."""
    if not fits:
        return "no", "red"
    return ("tight", "yellow") if peak_gb > TIGHT * memory_gb else ("yes", "green")


def _speed(value: float | None) -> str:
    from tunesmith.workflows.plan import rounded

    return "-" if value is None else rounded(value)


def _note(found: Mapping[str, Any]) -> str:
    """What a speed is where no line below the table says it."""
    return " (calibrated)" if found["basis"]["speed"] == "calibrated" else ""


def ranks_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Adapter size and memory by rank."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title))
    for column in ("rank", "parameters", "share", "file MB", "recompute", "peak GB", "tokens/s", "fits"):
        table.add_column(column, justify="right")
    for row in rows:
        word, colour = ("yes", "green") if row["fits"] else ("no", "red")
        table.add_row(
            str(row["rank"]),
            f"{row['parameters']:,}",
            f"{row['share']:.2%}",
            f"{1024 * row['adapter_gb']:.1f}",
            row["recompute"].removesuffix(" layers"),
            f"{row['peak_gb']:.2f}",
            _speed(row["tokens_per_second"]) + _note(row),
            f"[{colour}]{word}[/{colour}]",
        )
    return table


def draw(path: str, result: Mapping[str, Any]) -> str:
    """Write the plot; returns its path. Raises ConfigError for another ending than .png or .svg."""
    from tunesmith.report.memory_plot import draw_memory

    return str(draw_memory(path, result))
