"""`tunesmith plan`: what fits, printed."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Set

if TYPE_CHECKING:
    from rich.table import Table

    from tunesmith.workflows.plan_options import Data, Target

TIGHT = 0.8
"""Share of a card from which on a fitting plan is shown as tight."""

NO_TERMINAL = 140
"""Columns of a table that goes into a file or pipe, as in Console.table."""


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
    settings: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """What fits on a card: memory, speed, cost. No GPU needed."""
    from tunesmith.cli.console import Console
    from tunesmith.config import load_config
    from tunesmith.errors import ConfigError, MachineError
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
        title = f"What trains on {_place(target)}, {length:,} tokens"
        console.table(methods_table(title, "model", "model", rows, target.memory_gb))
        print(*_methods_notes(rows, "each model's", length), sep="\n")
        return
    if target is None:
        unused = {"--data": data, "--rank": rank, "--price-per-hour": price, "--plot": plot}
        _refuse_unused(unused | {"--num-gpus": num_gpus if num_gpus > 1 else None}, "without --gpu or --memory")
        name, rows = plan_lists.plan_cards(run, sequence, methods)
        if as_json:
            console.result({"model": name, "gpus": rows})
            return
        title = f"Where {name} trains, {rows[0]['max_seq_length']:,} tokens an example"
        console.table(methods_table(title, "card", "gpu", rows, None))
        print(*_methods_notes(rows, "the model's", rows[0]["max_seq_length"]), sep="\n")
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
        length = planner.longest_example(run, planner.find_shape(run.model.name)[1], sequence, None)
        size, by_tokens = ranks[0]["micro_batch_size"], ranks[0]["micro_batch_unit"] == "tokens"
        unit = "tokens" if by_tokens else f"x {length:,} tokens"
        title = (
            f"{run.model.name}, {planner.METHOD_NAMES[chosen.method]}, on {_place(target)}, micro-batch {size:,} {unit}"
        )
        console.table(ranks_table(title, ranks, target.memory_gb))
        print(basis_line(ranks, "the model's"))
        return
    has_data = bool(run.data.path or run.data.mix)
    if not has_data or target.card is None:
        _refuse_unused({"--price-per-hour": price}, "without --data and --gpu, which say for how many hours")
    data_read, estimated = _examples(run, sequence) if has_data else (None, False)
    result = planner.plan(
        run,
        target,
        methods=methods,
        data=data_read,
        sequence=sequence,
        price_per_hour=None if price is None else price * target.count,
    )
    if result["data"]:
        result["data"]["estimated"] = estimated
    if plot is not None:
        result["plot"] = draw(plot, result)
    if as_json:
        console.result(result)
    else:
        print_plan(console, result)
        if result["recommended"] is None and sys.stdout.isatty():
            raise typer.Exit(MachineError.exit_code)  # the first line has said it, on the same screen
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


def _place(target: Target) -> str:
    """`a T4 (14.6 GB)`; memory without a card has its size in its name."""
    named = target.card is not None or not target.name.endswith("GB of GPU memory")
    return f"{target.label} ({target.memory_gb:.1f} GB)" if named else target.label


def _examples(config: Any, sequence: int | None) -> tuple[Data, bool]:
    """The lengths of the rows as training would have them, and whether they are estimates."""
    from tunesmith.cli.console import Console
    from tunesmith.workflows.plan_data import read_data

    with Console() as console:
        return read_data(config, sequence, console.progress)


# -- for people -------------------------------------------------------------------------------------------------------


def print_plan(console: Any, result: Mapping[str, Any]) -> None:
    """The answer first, then what to change, the options, where the memory goes, and what the figures rest on."""
    chosen = result["recommended"]
    print(result["answer"])
    if chosen and chosen["hours"] is not None:
        cost = "" if chosen["cost"] is None else f", {chosen['cost']:,.2f} at the price given"
        data = result["data"]
        about = "about " if data["estimated"] else ""
        epochs = f"{data['epochs']:.3g} epoch{'s' * (data['epochs'] != 1)}"
        print(f"{data['rows']:,} rows, {about}{data['tokens']:,} tokens: {_hours(chosen['hours'])} for {epochs}{cost}")
    for line in result["advice"]:
        print(f"  {line}")
    print()
    console.table(options_table(result))
    if result["breakdown"]:
        parts = {name.removesuffix("_gb"): gb for name, gb in result["breakdown"].items()}
        parts["CUDA graphs"] = chosen["graphs_gb"]
        parts = {name: gb for name, gb in parts.items() if gb >= 0.005}
        drivers = "context is" if "CUDA graphs" not in parts else "context and graphs are"
        said = ", ".join(f"{name} {gb:.2f}" for name, gb in parts.items())
        print(f"\npeak: {said} GB ({drivers} the driver's)")
    print(f"memory: {result['basis']['memory']}\nspeed: {result['basis']['speed']}")
    if "plot" in result:
        print(f"plot: {result['plot']}")


def _hours(hours: float) -> str:
    """`about 15 minutes`; what is predicted is not known to the second."""
    if (minutes := round(60 * hours)) >= 60:
        return f"about {hours:.1f} hours"
    if not minutes:
        return "less than a minute"
    return f"about {minutes} minute{'s' * (minutes > 1)}"


def _fitting(layouts: Iterable[Table], width: int | None = None) -> Table:
    """The first layout that is no wider than `width` (the terminal's, and without one what Console.table takes), or the last."""
    from rich.console import Console as RichConsole

    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else NO_TERMINAL
    measure = RichConsole(width=1000).measure
    for table in layouts:
        if measure(table).maximum <= width:
            break
    return table


def _layout(
    title: str, narrow: bool, columns: Mapping[str, str], rows: Iterable[tuple[Sequence[str], str | None]]
) -> Table:
    """A table of `columns` (heading: left or right) and rows with their style; narrow ones have no frame.

    Where not even the last layout fits, cells go on in the next line: no number and no name is cut.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title)
    if narrow:
        table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, side in columns.items():
        table.add_column(heading, justify="left" if side == "left" else "right", overflow="fold")
    for cells, style in rows:
        table.add_row(*cells, style=style)
        if any(cell.startswith(HOST) for cell in cells):
            table.caption = f"{HOST}N: all layers recomputed, the inputs of N of them wait in host memory"
    return table


def options_table(result: Mapping[str, Any], width: int | None = None) -> Table:
    """All options that were looked at, coloured by whether they fit."""
    return _fitting(_options_layouts(result), width)


def _options_layouts(result: Mapping[str, Any]) -> Iterator[Table]:
    from rich.markup import escape

    size = "" if result["gpu"].endswith("GB of GPU memory") else f", {result['memory_gb']:.1f} GB"
    title = f"{escape(result['model'])} on {escape(result['gpu'])}{size}"
    columns = {
        "method": "left",
        "tokens": "right",
        "micro x acc.": "right",
        "memory": "left",
        "optimizer": "left",
        "recompute": "left",
        "peak GB": "right",
        "tokens/s": "right",
        "fits": "right",
    }
    rows = []
    for option in result["options"]:
        word, colour = _verdict(held_gb(option), option["fits"], result["memory_gb"])
        best = option == result["recommended"]
        cells = {
            "method": f"{option['label']} *" if best else option["label"],
            "tokens": f"{option['max_seq_length']:,}",
            "micro x acc.": option["micro_batches"],
            "memory": option["memory_mode"],
            "optimizer": option["optimizer"],
            "recompute": _recompute(option["recompute"]),
            "peak GB": f"{held_gb(option):.1f}",
            "tokens/s": _speed(option["tokens_per_second"]),
            "fits": f"[{colour}]{word}[/{colour}]",
        }
        rows.append((cells, "bold" if best else None))
    for narrow, left_out in ((False, ()), (True, ()), (True, ("memory",)), (True, ("memory", "optimizer"))):
        kept = {name: side for name, side in columns.items() if name not in left_out}
        shown = [([_short(cells[name]) if narrow else cells[name] for name in kept], style) for cells, style in rows]
        yield _layout(title, narrow, {SHORT[name] if narrow else name: side for name, side in kept.items()}, shown)


SHORT = {
    "method": "method",
    "tokens": "tokens",
    "micro x acc.": "micro",
    "memory": "mode",
    "optimizer": "optimizer",
    "recompute": "recompute",
    "peak GB": "GB",
    "tokens/s": "tok/s",
    "fits": "fits",
}
"""Headings where there is little room."""

HOST = "host "
"""Begins what `_recompute` says of layer inputs in host memory."""

ABBREVIATIONS = {
    "paged_adamw_8bit": "paged 8-bit",
    "adamw_8bit": "8-bit",
    "(int8)": "int8",
    "(calibrated)": "cal.",
    " tokens x ": "t x ",
}
"""Of cells where there is little room."""


def _short(cell: str) -> str:
    for name, abbreviation in ABBREVIATIONS.items():
        cell = cell.replace(name, abbreviation)
    return cell


def _recompute(words: str) -> str:
    """`19 of 28`, or `host 15` of `all 28 layers, inputs of 15 in host memory`: the table's caption says what that is."""
    found = re.fullmatch(r"all (\d+) layers, inputs(?: of (\d+))? in host memory", words)
    return f"{HOST}{found[2] or found[1]}" if found else words.removesuffix(" layers")


def held_gb(found: Mapping[str, Any]) -> float:
    """What an option takes of the card: its peak, and what CUDA graphs hold beside it."""
    return float(found["peak_gb"] + found["graphs_gb"])


def methods_table(
    title: str,
    heading: str,
    key: str,
    rows: Sequence[Mapping[str, Any]],
    memory_gb: float | None,
    width: int | None = None,
) -> Table:
    """One row a model or card, one column a method: the peak and the speed of what would be chosen."""
    return _fitting(_methods_layouts(title, heading, key, rows, memory_gb), width)


def _methods_layouts(
    title: str, heading: str, key: str, rows: Sequence[Mapping[str, Any]], memory_gb: float | None
) -> Iterator[Table]:
    from rich.markup import escape

    from tunesmith.workflows.plan import METHOD_NAMES

    methods = [name for name in METHOD_NAMES if name in rows[0]["methods"]]
    length = max(row["max_seq_length"] for row in rows)
    for narrow, stacked, sized in ((False, False, True), (True, False, True), (True, True, True), (True, True, False)):
        columns = {heading: "left"}
        if sized:
            columns["GB" if key == "gpu" else "size" if narrow else "parameters"] = "right"
        shown = []
        for row in rows:
            # A model's organisation is what can be left out: no two have a model of one name.
            called = row[key].rpartition("/")[2] if narrow else row[key]
            if row["max_seq_length"] < length:
                called += f" ({row['max_seq_length']:,})"
            size = f"{row['memory_gb']:.1f}" if key == "gpu" else f"{row['parameters'] / 1e9:.1f}B"
            cells = [_cell(row["methods"][name], memory_gb or row["memory_gb"], stacked) for name in methods]
            first = [escape(called), size] if sized else [escape(called)]
            shown.append(([*first, *(map(_short, cells) if narrow else cells)], None))
        yield _layout(escape(title), narrow, columns | {METHOD_NAMES[name]: "left" for name in methods}, shown)


def _cell(found: Mapping[str, Any], memory_gb: float, stacked: bool) -> str:
    """`yes: 9.1 GB, 23,000/s`, or in two lines."""
    word, colour = _verdict(held_gb(found), found["fits"], memory_gb)
    colon, comma = (" ", "\n") if stacked else (": ", ", ")
    if not found["fits"]:
        eight = _least(found)
        less = "" if eight is None else f"{comma}8-bit {_needed(eight)} GB"
        return f"[{colour}]{word}{colon}{_needed(held_gb(found))} GB{less}[/{colour}]"
    speed = found["tokens_per_second"]
    said = "" if speed is None else f"{comma}{_speed(speed)}/s{_note(found)}"
    return f"[{colour}]{word}{colon}{held_gb(found):.1f} GB{said}[/{colour}]"


def _needed(gb: float) -> str:
    """Exact enough to set beside a small card's memory."""
    return f"{gb:.1f}" if gb < 100 else f"{gb:,.0f}"


def _least(found: Mapping[str, Any]) -> float | None:
    """What a method that does not fit needs with optimizer states in 8 bits, if that is less by a tenth or more."""
    least = found.get("least_gb")  # of what was planned in full there is none
    return least if least is not None and least <= 0.9 * found["peak_gb"] else None


def _verdict(peak_gb: float, fits: bool, memory_gb: float) -> tuple[str, str]:
    """A word and a colour: yes, tight or no."""
    if not fits:
        return "no", "red"
    return ("tight", "yellow") if peak_gb > TIGHT * memory_gb else ("yes", "green")


def _speed(value: float | None) -> str:
    from tunesmith.workflows.plan import rounded

    return "-" if value is None else rounded(value)


def _note(found: Mapping[str, Any]) -> str:
    """Which of the speeds are calibrated where not all of them are."""
    return " (calibrated)" if found["basis"]["speed"] == "calibrated" else ""


def basis_line(found: Sequence[Mapping[str, Any]], what: str) -> str:
    """What the figures of a list are, as the lines below the options say it of theirs; `what` has a config.json."""
    speeds = {each["basis"]["speed"] for each in found if each["fits"]}
    speed = "unknown: no card was named" if speeds == {None} else "arithmetic on the card's data sheet"
    if "calibrated" in speeds:
        speed += ", calibrated by runs on this card where it says so"
    return f"memory: arithmetic on {what} config.json; speed: {speed}"


def _methods_notes(rows: Sequence[Mapping[str, Any]], what: str, length: int) -> Iterator[str]:
    """What the cells of `methods_table` mean, a line each; examples of `length` tokens were asked for."""
    found = [each for row in rows for each in row["methods"].values()]
    if not all(each["fits"] for each in found):
        eight = "; 8-bit: with optimizer.name adamw_8bit" if any(_least(each) is not None for each in found) else ""
        yield f"no: the least that these settings need{eight}"
    if any(row["max_seq_length"] < length for row in rows):
        yield f"tokens beside a model's name: all that it takes, less than {length:,}"
    yield basis_line(found, what)


def ranks_table(title: str, rows: Sequence[Mapping[str, Any]], memory_gb: float, width: int | None = None) -> Table:
    """Adapter size and memory by rank."""
    return _fitting(_ranks_layouts(title, rows, memory_gb), width)


def _ranks_layouts(title: str, rows: Sequence[Mapping[str, Any]], memory_gb: float) -> Iterator[Table]:
    from rich.markup import escape

    names = ("rank", "parameters", "share", "file MB", "recompute", "peak GB", "tokens/s", "fits")
    shown = []
    for row in rows:
        word, colour = _verdict(held_gb(row), row["fits"], memory_gb)
        cells = (
            str(row["rank"]),
            f"{row['parameters']:,}",
            f"{row['share']:.2%}",
            f"{1024 * row['adapter_gb']:,.1f}",
            _recompute(row["recompute"]),
            f"{held_gb(row):.2f}",
            _speed(row["tokens_per_second"]) + _note(row),
            f"[{colour}]{word}[/{colour}]",
        )
        shown.append(dict(zip(names, cells, strict=True)))
    for narrow, left_out in ((False, ""), (True, ""), (True, "share")):
        kept = [name for name in names if name != left_out]
        cells_of = [([_short(cells[name]) if narrow else cells[name] for name in kept], None) for cells in shown]
        headings = [SHORT.get(name, name) if narrow else name for name in kept]
        yield _layout(escape(title), narrow, dict.fromkeys(headings, "right"), cells_of)


def draw(path: str, result: Mapping[str, Any]) -> str:
    """Write the plot; returns its path. Raises ConfigError for another ending than .png or .svg."""
    from tunesmith.report.memory_plot import draw_memory

    return str(draw_memory(path, result))
