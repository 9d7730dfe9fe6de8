"""What the `data` commands print for people, from the same results that `--json` prints."""

from __future__ import annotations

import itertools
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from tunesmith.cli.console import Console

SHOWN_ERRORS = 20
SHOWN_WARNINGS = 5
"""How many rows of one check are printed; the others are counted."""
SHOWN_LABELS = 20
NEW_LINE = "↵"
BAR = 40
"""Width of the histogram's longest bar, in characters."""


def print_check(result: Mapping[str, Any], train: str) -> None:
    """Problems by check, errors first, and what to do; `train` is the command that would train on this data."""
    print(_title(result))
    if result["files"]:
        split = f"split {result['split']}: " if result["split"] else ""
        print(f"{split}{', '.join(result['files'])}")
    if result["eval_file"]:
        print(f"held out: {result['eval_file']}, {_rows(result['eval_rows'])}")
    for note in result["notes"]:
        print(f"note: {note}")
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for problem in result["problems"]:
        groups[problem["severity"], problem["code"]].append(problem)
    for severity, code in sorted(groups, key=lambda key: key[0] != "error"):  # stable: else in the order of the files
        problems = groups[severity, code]
        print(f"\n{severity}: {code}, {len(problems)} found")
        shown = SHOWN_ERRORS if severity == "error" else SHOWN_WARNINGS
        same_fix = len({problem["fix"] for problem in problems}) == 1
        for problem in problems[:shown]:
            print(f"  {_where(problem, result)}{visible(problem['found' if same_fix else 'message'])}")
        if len(problems) > shown:
            hidden = _ranges(problem["line"] for problem in problems[shown:] if problem["line"])
            print(f"  and {len(problems) - shown} more" + (f" (lines {hidden})" if hidden else ""))
        if same_fix and problems[0]["fix"]:
            print(f"  -> {visible(problems[0]['fix'])}")
    print(f"\n{_verdict(result, train)}")


def print_stats(result: Mapping[str, Any], console: Console) -> None:
    """A table of the statistics, a histogram, what each `max_seq_length` costs, and the recommendation."""
    print(_title(result))
    if result["skipped_rows"]:
        print(_left_out(result))
    tokens = result["tokens"]
    if result["estimated"]:
        print("tokens are estimated from characters; --model NAME counts them exactly")
    else:
        share = result["supervised_tokens"] / tokens["total"]
        print(f"chat template: {result['chat_template']}; {share:.1%} of the tokens are supervised")
        if result["sequences"] != result["rows"]:
            print(f"{result['rows']} rows give {result['sequences']} sequences")
    about = "about " if result["estimated"] else ""
    table = Table("mean", "median", "p95", "p99", "longest", "total", title="tokens in a row", title_justify="left")
    for column in table.columns:
        column.justify = "right"
    values = [tokens["mean"], tokens["median"], tokens["p95"], tokens["p99"], tokens["max"], tokens["total"]]
    table.add_row(*(f"{value:,.0f}" for value in values))
    console.table(table)
    print()
    largest = max(bucket["sequences"] for bucket in result["histogram"])
    for bucket in result["histogram"]:
        bar = "#" * round(BAR * bucket["sequences"] / largest)
        print(f"{bucket['from']:>9,} - {bucket['to']:<9,} {bucket['sequences']:>9,} {bar}".rstrip())
    print()
    table = Table("max_seq_length", "longer rows", "share", title="what a limit would cut", title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for length, count in result["longer_than"].items():
        table.add_row(f"{int(length):,}", f"{count:,}", f"{count / result['sequences']:.1%}")
    console.table(table)
    padding = result["padding"]
    print(
        f"\nempty slots: {padding['data_order']:6.1%} padded, {padding['micro_batch_size']} rows at a time as they stand"
    )
    print(f"{'':13}{padding['sorted']:6.1%} padded, sorted by length within a step of {padding['batch_size']} rows")
    packed = f"packed into {padding['budget']:,} tokens (data.packing, training.micro_batch_tokens)"
    print(f"{'':13}{padding['packed']:6.1%} {packed}")
    limit = f" (the model's limit is {result['model_limit']:,})" if result["model_limit"] else ""
    print(f"\nrecommended: data.max_seq_length={result['recommended_max_seq_length']}, {about}p95 x 1.2{limit}")


def print_preview(result: Mapping[str, Any]) -> None:
    """Every piece of every row: what is supervised in green and special tokens in bold, or in marks without colour."""
    out = RichConsole(highlight=False, soft_wrap=True, markup=False)
    colour = out.is_terminal and not out.no_color
    print(_title(result))
    template = result["chat_template"]
    print(f"chat template: {template}" if template else "before the chat template (--model NAME applies it)")
    supervised, special = ("green", "bold") if colour else ("⟦...⟧", "«...»")
    legend = f"supervised ({result['train_on']}): {supervised}; a new line: {NEW_LINE}"
    print(legend + (f"; a special token: {special}" if template else ""))
    for example in result["examples"]:
        about = "about " if example["estimated"] else ""
        counted = f", {example['num_supervised']} supervised" if "num_supervised" in example else ""
        side = f", {example['side']}" if example["side"] else ""
        out.print(Text(f"\nline {example['line']}{side}: {about}{example['num_tokens']} tokens{counted}", style="dim"))
        for problem in example["problems"]:
            out.print(Text(f"({visible(problem)})", style="dim"))
        if template:
            out.print(_pieces(example["pieces"], colour))
            continue
        for piece in example["pieces"]:
            out.print(Text(f"[{piece['role']}] ", style="bold").append_text(_pieces([piece], colour)))


def print_split(result: Mapping[str, Any], console: Console) -> None:
    """How many rows each file got, by label where there are labels."""
    if result["skipped_rows"]:
        print(_left_out(result))
    counts = result["counts"]
    table = Table("label", *counts)
    for column in table.columns[1:]:
        column.justify = "right"
    names = sorted({label for labels in result["labels"].values() for label in labels})
    for label in names[:SHOWN_LABELS]:
        table.add_row(visible(label), *(str(result["labels"][name].get(label, 0)) for name in counts))
    if len(names) > SHOWN_LABELS:
        table.add_row(f"... {len(names) - SHOWN_LABELS} more (--json)")
    table.add_row("all rows", *map(str, counts.values()))
    console.table(table)
    for path in result["files"].values():
        print(path)


def visible(text: str) -> str:
    """`text` with control characters escaped: data must not steer the terminal."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


def _pieces(pieces: Iterable[Mapping[str, Any]], colour: bool) -> Text:
    """Pieces end to end, new lines shown."""
    shown = Text()
    for supervised, run in itertools.groupby(pieces, key=lambda piece: piece["supervised"]):
        marked = supervised and not colour
        shown.append("⟦" if marked else "")
        for piece in run:
            text = "\n".join(visible(line) for line in piece["text"].split("\n")).replace("\n", f"{NEW_LINE}\n")
            if piece.get("special", False):
                shown.append(text if colour else f"«{text}»", style="bold green" if supervised else "bold")
            else:
                shown.append(text, style="green" if supervised else "")
        shown.append("⟧" if marked else "")
    shown.rstrip()
    return shown


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['file']}: {result['container'] or 'unreadable'}, form {result['form'] or 'unknown'}, {_rows(result['rows'])}"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _where(problem: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """`line 3: `, with the file's name where it is not the one that the title names."""
    file = "" if problem["file"] == result["file"] else problem["file"]
    line = "" if problem["line"] is None else f"line {problem['line']}"
    place = " ".join(part for part in (file, line) if part)
    return f"{place}: " if place else ""


def _verdict(result: Mapping[str, Any], train: str) -> str:
    errors, warnings = result["errors"], result["warnings"]
    said = f"{warnings} warning{'s' * (warnings != 1)}"
    if not result["ok"]:
        skip = ", or leave those rows out with --skip-bad-rows" if result["skippable"] else ""
        return f"{errors} error{'s' * (errors != 1)}, {said}: mend what is listed above{skip}"
    then = f"go on with: {train}"
    if not result["trainable"]:
        then = "but no objective of `tunesmith train` takes rows of both these kinds: the evaluation data is of another form"
    if result["skipped_rows"]:
        return f"{_left_out(result)}; {said}\n{then}"
    return f"no errors, {said}{': look at them, then' if warnings and result['trainable'] else ';'} {then}"


def _left_out(result: Mapping[str, Any]) -> str:
    parts = [f"{len(lines)} of {file} (lines {_ranges(lines)})" for file, lines in result["skipped_rows"].items()]
    return f"rows left out: {'; '.join(parts)}"


def _ranges(lines: Iterable[int], most: int = 20) -> str:
    """Line numbers in short: `3, 17-21`."""
    runs: list[list[int]] = []
    for line in sorted(set(lines)):
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:most]]
    return ", ".join(shown) + (", ..." if len(runs) > most else "")
