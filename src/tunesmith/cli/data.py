"""`tunesmith data check|stats|preview|split`: parse, call workflows/data.py, print with data_views.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Json

if TYPE_CHECKING:
    from tunesmith.config import RunConfig

app = typer.Typer(
    name="data",
    help="Look at data before training on it: problems by line, lengths, tokens with their loss mask, splits.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

File = Annotated[
    str, typer.Argument(help="JSON Lines, JSON, CSV, TSV, Parquet, Arrow, text, a folder, or a hub id.", metavar="FILE")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Use this model's tokenizer and chat template (no weights are read).", metavar="NAME"),
]
Length = Annotated[
    str | None, typer.Option("--max-seq-length", help="Longest example in tokens, or auto.", metavar="N|auto")
]
Format = Annotated[
    str | None, typer.Option("--format", help="What the rows hold (default: recognised by their keys).", metavar="NAME")
]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", help="Which of your columns holds what, e.g. output=reply.", metavar="FIELD=COLUMN"),
]
Template = Annotated[
    str | None, typer.Option("--template", help="Chat template: a name, none, or a .jinja file.", metavar="NAME")
]
Skip = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows with errors, and say which, instead of stopping.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, e.g. data.overlong=truncate.", metavar="SECTION.KEY=VALUE"),
]


@app.command()
def check(
    file: File,
    model: Model = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Held-out examples: checked too, and for leaks.", metavar="FILE")
    ] = None,
    max_seq_length: Length = None,
    format_name: Format = None,
    columns: Column = None,
    template: Template = None,
    skip_bad_rows: Skip = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Find every problem, each with its line.

    Errors (exit code 2) would stop training, unless --skip-bad-rows leaves those rows out; warnings would not."""
    from tunesmith.cli.console import Console
    from tunesmith.cli.data_views import print_check
    from tunesmith.workflows.data import check_data

    given = {
        "data.eval_path": eval_data,
        "data.max_seq_length": max_seq_length,
        "data.skip_bad_rows": skip_bad_rows or None,
    }
    values = _values(file, model, format_name, columns, template, given)
    config = _config(values, settings)
    with Console() as console:
        result = check_data(config, console.progress)
    if as_json:
        console.result(result)
    else:
        print_check(result, _train_command(values, settings or [], result["objectives"]))
    if not result["ok"]:
        raise typer.Exit(2)


@app.command()
def stats(
    file: File,
    model: Model = None,
    max_seq_length: Length = None,
    format_name: Format = None,
    columns: Column = None,
    template: Template = None,
    skip_bad_rows: Skip = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Lengths in tokens, and which max_seq_length to set.

    Without --model they are estimates."""
    from tunesmith.cli.console import Console
    from tunesmith.cli.data_views import print_stats
    from tunesmith.workflows.data import data_stats

    given = {"data.max_seq_length": max_seq_length, "data.skip_bad_rows": skip_bad_rows or None}
    config = _config(_values(file, model, format_name, columns, template, given), settings)
    with Console() as console:
        result = data_stats(config, console.progress)
    if as_json:
        console.result(result)
    else:
        print_stats(result, console)


@app.command()
def preview(
    file: File,
    model: Model = None,
    rows: Annotated[int, typer.Option("--rows", help="How many rows.", min=1, metavar="N")] = 3,
    line: Annotated[int | None, typer.Option("--line", help="Only the row on this line.", min=1, metavar="N")] = None,
    max_seq_length: Length = None,
    format_name: Format = None,
    columns: Column = None,
    template: Template = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Show rows as the model will see them, supervised tokens marked.

    Without --model: the turns, before a chat template and uncut."""
    from tunesmith.cli.console import Console
    from tunesmith.cli.data_views import print_preview
    from tunesmith.workflows.data import preview_data

    given = {"data.max_seq_length": max_seq_length}
    result = preview_data(_config(_values(file, model, format_name, columns, template, given), settings), rows, line)
    if as_json:
        Console().result(result)
    else:
        print_preview(result)


@app.command()
def split(
    file: File,
    out: Annotated[str, typer.Option("--out", help="Folder to make for the files.", metavar="DIR")],
    train: Annotated[float, typer.Option("--train", help="Share of train.jsonl.", metavar="SHARE")] = 0.8,
    validation: Annotated[
        float, typer.Option("--validation", help="Share of validation.jsonl.", metavar="SHARE")
    ] = 0.1,
    test: Annotated[float, typer.Option("--test", help="Share of test.jsonl.", metavar="SHARE")] = 0.1,
    seed: Annotated[int | None, typer.Option("--seed", help="Another seed, another split.", min=0, metavar="N")] = None,
    format_name: Format = None,
    columns: Column = None,
    skip_bad_rows: Skip = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Divide a file into train, validation and test files.

    Every label gets its share of each; rows that are alike, or begin alike, stay together."""
    from pathlib import Path

    from tunesmith.cli.console import Console
    from tunesmith.cli.data_views import print_split
    from tunesmith.workflows.data import split_data

    given = {"training.seed": seed, "data.skip_bad_rows": skip_bad_rows or None}
    config = _config(_values(file, None, format_name, columns, None, given), settings)
    result = split_data(config, Path(out), {"train": train, "validation": validation, "test": test})
    console = Console()
    if as_json:
        console.result(result)
    else:
        print_split(result, console)


def _values(
    file: str,
    model: str | None,
    format_name: str | None,
    columns: list[str] | None,
    template: str | None,
    given: dict[str, Any],
) -> dict[str, Any]:
    """The settings, by dotted key, that the options of a `data` command stand for."""
    from tunesmith.errors import ConfigError

    mapping: dict[str, str] = {}
    for column in columns or []:
        field, equals, name = column.partition("=")
        if not equals or not field or not name:
            raise ConfigError(f"--column {column}: expected FIELD=COLUMN, e.g. --column output=reply")
        if field in mapping:
            raise ConfigError(f"--column {column}: `{field}` was named before (--column {field}={mapping[field]})")
        mapping[field] = name
    values = {
        "data.path": file,
        "model.name": model,
        "data.format": format_name,
        "data.columns": mapping or None,
        "data.chat_template": template,
        **given,
    }
    length = values.get("data.max_seq_length")
    if length is not None and length != "auto":
        if not length.isdecimal():
            raise ConfigError(f"--max-seq-length {length}: expected a number of tokens, or auto")
        values["data.max_seq_length"] = int(length)
    return {key: value for key, value in values.items() if value is not None}


def _config(values: dict[str, Any], settings: list[str] | None) -> RunConfig:
    from tunesmith.config import load_config

    return load_config(None, settings or [], values)


def _train_command(values: dict[str, Any], settings: list[str], objectives: list[str]) -> str:
    """The `tunesmith train` that reads data as a command with these settings did, for the usual objective of these rows."""
    import json
    import shlex

    options = {"model.name": "--model", "data.path": "--data", "data.eval_path": "--eval-data"}
    words = ["tunesmith", "train", *([] if "model.name" in values else ["--model", "NAME"])]
    for key, value in sorted(values.items(), key=lambda item: (item[0] not in options, item[0] != "model.name")):
        if key in options:
            words += [options[key], value]
        elif key == "data.skip_bad_rows":
            words.append("--skip-bad-rows")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            words += ["--set", f"{key}={text}"]
    for setting in settings:
        words += ["--set", setting]
    if objectives and objectives[0] != "sft":
        words += ["--objective", objectives[0]]
    return shlex.join(words)
