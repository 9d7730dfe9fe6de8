"""`tunesmith advise`: ask, decide, print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tunesmith.config import RunConfig
    from tunesmith.workflows.advise import Question
    from tunesmith.workflows.advise_card import CardFit

WAYS = {
    "prompt": "prompt",
    "few_shot": "few-shot",
    "retrieval": "retrieval",
    "fine_tune": "fine-tuning",
    "retrieval_and_fine_tune": "retrieval and fine-tuning",
}


def advise(
    data: Annotated[str, typer.Option("--data", help="Examples, as for train.", metavar="FILE")],
    model: Annotated[str, typer.Option("--model", help="Folder, .gguf file or hub id.", metavar="NAME")],
    gpu: Annotated[str | None, typer.Option("--gpu", help="Card to plan for.", metavar="NAME")] = None,
    memory: Annotated[float | None, typer.Option("--memory", help="Its memory instead.", min=0.1, metavar="GB")] = None,
    answers: Annotated[
        list[str] | None, typer.Option("--answers", help="Answer a question.", metavar="KEY=VALUE")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="How data is read.", metavar="data.KEY=VALUE")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Write the settings here.", metavar="RUN.yaml")] = None,
    per_hour: Annotated[float | None, typer.Option("--price-per-hour", help="Of one card.", min=0, metavar="X")] = None,
    labelling: Annotated[
        float | None, typer.Option("--labelling-cost-per-example", help="Of one row.", min=0, metavar="X")
    ] = None,
    requests: Annotated[float | None, typer.Option("--requests-per-day", help="To serve.", min=0, metavar="N")] = None,
    input_price: Annotated[
        float | None, typer.Option("--price-per-million-input-tokens", help="Hosted.", min=0, metavar="X")
    ] = None,
    output_price: Annotated[
        float | None, typer.Option("--price-per-million-output-tokens", help="Hosted.", min=0, metavar="X")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Prompt, retrieval or fine-tuning? And if so, how?"""
    import sys
    from pathlib import Path

    from tunesmith.cli.console import Console
    from tunesmith.config import load_config
    from tunesmith.workflows.advise import advise as run
    from tunesmith.workflows.advise import parse_answers
    from tunesmith.workflows.advise_costs import Prices
    from tunesmith.workflows.plan import full_name

    config = load_config(None, settings or [], {"data.path": data, "model.name": full_name(model)})
    prices = Prices(per_hour, labelling, requests, input_price, output_price)
    with Console() as console:

        def ask(question: Question, suggested: str) -> str:
            if console.err.is_terminal:
                console.bars.stop()  # they would be drawn over the question
            return ask_in_terminal(question, suggested)

        result = run(
            config,
            parse_answers(answers or []),
            fit=card_fit(config, gpu, memory),
            prices=prices,
            out=Path(out) if out else None,
            ask=ask if sys.stdin.isatty() else None,
            progress=console.progress,
        )
        if result["assumed"]:
            console.announce(f"not answered, so assumed: {_pairs(result['assumed'])} (--answers KEY=VALUE)")
    if as_json:
        console.result(result)
        return
    print_advice(result)
    if result["costs"]:
        print()
        console.table(costs_table(result["costs"]))
        for note in costs_notes(result["costs"]):
            say(note)


def card_fit(config: RunConfig, gpu: str | None, memory: float | None) -> CardFit | None:
    """Predictions for the card that was named, or for this machine's; None without one. Raises ConfigError."""
    from tunesmith.errors import ModelError
    from tunesmith.workflows import plan as planner
    from tunesmith.workflows.advise_card import CardFit

    target = planner.find_target(gpu, memory)
    if target is None:
        return None
    try:
        name, shape = planner.find_shape(config.model.name)
    except ModelError:
        if gpu is not None or memory is not None:
            raise
        return None
    return CardFit(config, name, shape, target)


def ask_in_terminal(question: Question, suggested: str) -> str:
    """Ask on stderr until the answer is one of those allowed; Enter takes what is suggested. Raises Abort at the end of input."""
    import sys

    allowed = (*question.allowed, "unknown")
    while True:
        # typer.prompt would write a part of it to stdout, which is for the result alone.
        print(f"{question.text} ({', '.join(allowed)}) [{suggested}]: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            raise typer.Abort
        answer = line.strip() or suggested
        if answer in allowed:
            return answer
        print(f"expected one of {', '.join(allowed)}", file=sys.stderr)


def print_advice(result: Mapping[str, Any]) -> None:
    """The decision, its reasons, the other ways, and the settings."""
    say(result["headline"])
    _bullets(result["reasons"])
    if result["instead"]:
        say("\nwhat would train:")
        _bullets(result["instead"])
    say("\nother ways:")
    _bullets(f"{WAYS[other['way']]}: {other['when']}" for other in result["alternatives"])
    tuned = result["decision"] in ("fine_tune", "retrieval_and_fine_tune")
    about, rows = "about " if result["data"]["estimated"] else "", result["data"]["rows"]
    facts = f"{rows:,} {'row' if rows == 1 else 'rows'}, {about}{result['data']['tokens']:,} tokens"
    say(f"\nsettings for {facts}{'' if tuned else ', if you fine-tune all the same'}:")
    for key, value in result["settings"].items():
        shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
        say(result["settings_reasons"][key], f"  {key:<32} {shown:<10} ")
    say("LWR: LoRA Without Regret (Schulman et al., Thinking Machines, 2025)")
    fits = result["fits"]
    if fits is not None:
        say(f"usable GB: 90% of what the driver leaves of the card's {fits['memory_gb']:.1f} GB")
        say(f"memory: {fits['basis']['memory']}")
        if fits["tokens_per_second"] is not None:
            say(f"speed: {fits['basis']['speed']}")
    if not result["run_yaml"]:
        say("\n--out RUN.yaml writes them to a file that `tunesmith train` takes")
    elif fits is not None and not fits["fits"]:
        say(f"\nwritten to {result['run_yaml']}, which does not train on this card: see above what would")
    else:
        say(f"\nwritten to {result['run_yaml']}; train with: tunesmith train {result['run_yaml']}")


def say(text: str, indent: str = "") -> None:
    """Print a line; in a terminal, broken at words, and indented as far as it began."""
    import shutil
    import sys
    import textwrap

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if not width:
        print(indent + text)
        return
    for line in text.split("\n"):
        hang = " " * len(indent)
        print(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=hang, break_on_hyphens=False))


def _bullets(lines: Iterable[str]) -> None:
    for line in lines:
        say(line, "  - ")


def costs_table(costs: Mapping[str, Any]) -> Table:
    """Each way's costs over a year."""
    from rich.table import Table

    table = Table(title="costs of a year", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("tokens in + out", "labelling", "training", "serving", "first year"):
        table.add_column(heading, justify="right", no_wrap=True)
    for way in costs["ways"]:
        table.add_row(
            WAYS[way["way"]],
            f"{way['input_tokens']:,} + {way['output_tokens']:,}",
            *(money(way[part]) for part in ("labelling", "training", "serving", "first_year")),
        )
    return table


def costs_notes(costs: Mapping[str, Any]) -> list[str]:
    """How the figures came about, with what went in."""
    run, formulas, assumptions = costs["run"], costs["formulas"], costs["assumptions"]
    hours = f"unknown: {run['unknown']}"
    if run["hours"] is not None:
        low, high = run["search_hours"]
        hours = (
            f"{run['hours']:,.2f} = {run['tokens']:,} x {run['epochs']:g} / {run['tokens_per_second']:,.0f} / 3600; "
            f"{low:,.1f} to {high:,.1f} for 5 to 10 runs"
        )
    return [
        f"hours of one run: {hours}{'; ' + cards if (cards := _cards(run)) else ''}",
        *(f"{name}: {formulas[name]}" for name in ("training", "labelling", "serving")),
        f"assumed tokens of a request: question {assumptions['question_tokens']}, answer {assumptions['answer_tokens']}, "
        f"instructions {assumptions['instruction_tokens']}, {assumptions['few_shot_examples']} examples (few-shot), "
        f"{assumptions['retrieved_tokens']} retrieved; -: not known without a price or the speed",
    ]


def _cards(run: Mapping[str, Any]) -> str:
    """What several cards mean for the price."""
    return f"on {run['num_gpus']} cards, each at the price per hour" if run["num_gpus"] > 1 else ""


def money(value: Any) -> str:
    """An amount, or the least and the most; `-` where it is not known."""
    if value is None:
        return "-"
    amounts = value if isinstance(value, list) else [value]
    shown = list(dict.fromkeys(f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}" for amount in amounts))
    return " to ".join(shown)


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
