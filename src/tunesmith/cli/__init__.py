"""The command line: parse, call the API, print. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from tunesmith.cli.adapters import app as adapters_app
from tunesmith.cli.advise import advise
from tunesmith.cli.bench import bench
from tunesmith.cli.chat import chat
from tunesmith.cli.compare import compare, sweep
from tunesmith.cli.data import app as data_app
from tunesmith.cli.evaluate import evaluate, one_line
from tunesmith.cli.export import export
from tunesmith.cli.merge import merge
from tunesmith.cli.options import Json, Model, Set
from tunesmith.cli.plan import plan
from tunesmith.cli.push import push
from tunesmith.cli.serve import serve
from tunesmith.errors import TunesmithError
from tunesmith.version import __version__

if TYPE_CHECKING:
    from tunesmith.cli.console import Console
    from tunesmith.types import TrainResult


class _Root(TyperGroup):
    """Group whose --help defaults to False: for None typer would import pydantic, half the time of a command's help."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option


app = typer.Typer(
    name="tunesmith",
    cls=_Root,
    help="Fine-tune a language model on the machine you have, and prove that it got better.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

app.add_typer(data_app)
app.add_typer(adapters_app)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Set up what all commands share."""
    if version:
        print(f"tunesmith {__version__}")
        raise typer.Exit


@app.command()
def quickstart(
    out: Annotated[str | None, typer.Option("--out", help="Run folder (default: a new one under runs/).")] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", help="Train on fewer rows, for a trial.", min=8, metavar="N")
    ] = None,
    test_rows: Annotated[
        int | None, typer.Option("--test-rows", help="Evaluate on fewer rows.", min=1, metavar="N")
    ] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Try it: a real model on real data, in minutes, without a GPU."""
    from pathlib import Path

    from tunesmith import api
    from tunesmith.cli.console import Console, metrics_table

    with Console() as console:
        result = api.quickstart(
            Path(out) if out else None, rows, test_rows, settings, console.event, console.progress, console.announce
        )
    if as_json:
        console.result(result)
        return
    console.table(metrics_table(result["evaluation"]))
    for row in result["examples"]:
        print(f"\n  question  {row['prompt']}\n  expected  {row['expected']}")
        print(f"  base      {one_line(row['baseline_answer'])}\n  tuned     {one_line(row['answer'])}")
    _print_training(result["metrics"])
    run, test = result["run"], result["test_data"]
    print(f"run folder    {run}\nreport        {result['report']}\n\nNext:")
    print(f"  tunesmith chat {run}\n  tunesmith eval {run} --data {test} --baseline\n  tunesmith merge {run}")


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(help="Settings (YAML).", metavar="[RUN.yaml]")] = None,
    model: Model = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Training examples (docs/data.md).", metavar="FILE")
    ] = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Held-out examples.", metavar="FILE")] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="lora (default), qlora or full.", metavar="NAME")
    ] = None,
    objective: Annotated[
        str | None, typer.Option("--objective", help="sft (default), cpt, dpo, orpo, simpo or kto.", metavar="NAME")
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows with errors; say which.")
    ] = False,
    poc: Annotated[
        int | None,
        typer.Option("--poc", help="First on N rows; on all if that passes.", min=1, metavar="N"),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Of --poc (default: 5 points better than the base).", metavar="CONDITION"),
    ] = None,
    settings: Set = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Run folder (default: a new one in runs/).", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train on a file of examples.

    All settings, with defaults and meanings: docs/configuration.md, or the JSON schema run.schema.json in the package.
    """
    from tunesmith import api
    from tunesmith.cli.console import Console
    from tunesmith.config import load_config

    given = {
        "model.name": model,
        "data.path": data,
        "data.eval_path": eval_data,
        "method": method,
        "objective.name": objective,
        "data.skip_bad_rows": skip_bad_rows or None,
    }
    run_config = load_config(config, settings or [], {key: value for key, value in given.items() if value is not None})
    with Console() as console:
        result = api.train(run_config, out, poc=poc, gates=gate or [], sink=console.event, progress=console.progress)
    _print_run(console, result, as_json)


@app.command()
def resume(
    run: Annotated[str, typer.Argument(help="The run folder to go on with.", metavar="RUN")],
    as_json: Json = False,
) -> None:
    """Go on with an interrupted or killed run."""
    from tunesmith import api
    from tunesmith.cli.console import Console

    with Console() as console:
        result = api.resume(run, sink=console.event, progress=console.progress)
    _print_run(console, result, as_json)


app.command("eval")(evaluate)


app.command()(chat)


app.command()(merge)


@app.command()
def report(run: Annotated[str, typer.Argument(help="The run folder.", metavar="RUN")], as_json: Json = False) -> None:
    """Write RUN/report.html: one page with plots and examples."""
    from tunesmith import api
    from tunesmith.cli.console import Console

    path = api.write_report(run)
    if as_json:
        Console().result({"path": str(path)})
    else:
        print(path)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look at this machine: device, memory, packages, engine."""
    from rich.markup import escape
    from rich.table import Table

    from tunesmith.cli.console import Console
    from tunesmith.workflows.doctor import examine  # not from api, which needs every package that this looks for

    console = Console()
    facts, result = examine()
    if as_json:
        console.result(result)
    else:
        table = Table(show_header=False, box=None)
        marks = {"ok": "[green]ok[/green]", "missing": "[red]missing[/red]", "info": "[dim]-[/dim]"}
        for fact in facts:
            table.add_row(marks[fact.status], *map(escape, (fact.name, fact.value, fact.note)))
        console.table(table)
    if not result["ok"]:
        raise typer.Exit(3)


app.command()(compare)
app.command()(sweep)
app.command()(advise)
app.command()(plan)
app.command()(bench)
app.command()(serve)
app.command()(export)
app.command()(push)


def main() -> None:
    """The entry point: run a command, turn our errors into one line and an exit code."""
    _set_up_libraries()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == 128 + signal.SIGINT:  # what typer makes of a KeyboardInterrupt, without a word
            _fail("interrupted", code)
    except BrokenPipeError:
        _stop_printing()
    except SystemExit as error:  # what typer and rich make of a closed output
        if isinstance(error.__context__, BrokenPipeError):
            _stop_printing()
        raise
    except TunesmithError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        _fail("interrupted", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"no space left on the disk ({error.filename or 'unknown file'})", 3)
        raise
    except ModuleNotFoundError as error:
        if (error.name or "tunesmith").startswith("tunesmith"):
            raise
        _fail(f"the package {error.name} is not installed; `tunesmith doctor` lists what is needed", 3)
    except MemoryError:
        _fail(
            "not enough memory; use a smaller batch size or a smaller model; "
            "when training, lower training.micro_batch_size (or micro_batch_tokens), or set memory.mode=min",
            3,
        )
    except Exception as error:
        _handle_usage(error)
        _handle_out_of_memory(error)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _stop_printing() -> NoReturn:
    """Whoever read our output has gone (`| head`): end as a program does that the signal for it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in the buffer
    sys.exit(128 + signal.SIGPIPE)


def _handle_usage(error: Exception) -> None:
    """A wrong option or argument: click's own message in one line."""
    message = getattr(error, "format_message", None)
    if type(error).__name__ == "NoArgsIsHelpError" and message is not None:
        print(message())
        sys.exit(2)
    if message is not None:
        _fail(f"{message()} (see --help)", getattr(error, "exit_code", 2))


def _handle_out_of_memory(error: Exception) -> None:
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        _fail(
            "the GPU ran out of memory; use a smaller batch size or a smaller model; when training, lower "
            "training.micro_batch_size (or micro_batch_tokens) or data.max_seq_length, set memory.mode=min, or use "
            "method: qlora",
            3,
        )


def _fail(message: str, code: int) -> None:
    for line in message.splitlines() or [""]:
        print(f"tunesmith: {line}", file=sys.stderr)
    sys.exit(code)


def _set_up_libraries() -> None:
    """Settings of other libraries, made before they are imported. Ours to decide here: the process is ours alone."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # their bars would tear ours apart
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _print_training(metrics: Any) -> None:
    print(
        f"\nspeed         {metrics['examples_per_second']:.1f} examples/s, {metrics['tokens_per_second']:.0f} tokens/s "
        f"({metrics['supervised_tokens_per_second']:.0f} supervised)\n"
        f"peak memory   {metrics['peak_memory_gb']:.2f} GB\n"
        f"training      {metrics['steps']} steps in {metrics['train_seconds']:.0f} s, loss {metrics['train_loss']:.4f}"
    )


def _print_run(console: Console, result: TrainResult, as_json: bool) -> None:
    if as_json:
        console.result({"run": result.run, "status": result.status, **result.metrics})
        return
    _print_training(result.metrics)
    if result.metrics["eval_loss"] is not None:
        print(f"eval loss     {result.metrics['eval_loss']:.4f}")
    print(f"run folder    {result.run}\nreport        {result.run}/report.html")
