"""Before and after: the files of `RUN/evaluations/`, compared with the base model and judged by their error bars.

Where the file has a paired test of both models' answers to the same rows (`comparison`), the verdict is its. In older files a difference
counts when it is more than two standard errors, √(σ_tuned² + σ_base²): that treats the two measurements as independent, and errs
towards "no clear difference". A share of 0 or 1 has a standard error of 0, which would make any difference clear even on one
row: the verdict then uses √(p(1 - p) / n) with Laplace's p = (n · share + 1) / (n + 2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.figures import as_p
from tunesmith.report.classes import Classes, read_classes
from tunesmith.report.facts import flattened
from tunesmith.report.text import as_number, as_text, moment, number, percent, plural, shortened

LOWER_IS_BETTER = ("loss", "perplexity")
"""How the names of metrics end that are better when smaller (as in `training.early_stopping`)."""

CLEAR = 2.0
"""Standard errors from which a difference counts."""

ROWS_PER_GROUP = 15
PART_DETAILS = 60
"""Lines of a part's details; the file has all."""

MAX_TEXT = 1500
"""Characters of one cell. With ROWS_PER_GROUP it keeps the examples of a page below about half a megabyte."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One measurement: as text, and as a bar in percent of the track's width (None where a bar would mislead)."""

    label: str
    value: str
    error: str
    width: float | None
    error_left: float = 0.0
    error_width: float = 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric, tuned against base."""

    metric: str
    base: Bar | None
    tuned: Bar
    change: str
    verdict: str
    """`better`, `worse` or `unclear`; empty without a base."""
    reason: str


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """One evaluated row, as text. `correct` and `base_correct` are None where nothing was scored."""

    line: str
    prompt: str
    expected: str
    base_answer: str | None
    base_correct: bool | None
    answer: str
    correct: bool | None


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """Rows that came out alike; `total` counts those that are not shown too."""

    title: str
    rows: tuple[ExampleRow, ...]
    total: int


@dataclass(frozen=True, slots=True)
class GateRow:
    """One condition of a gate, as text."""

    condition: str
    measured: str
    needed: str
    passed: bool


@dataclass(frozen=True, slots=True)
class PartNotes:
    """What a part of the evaluation says beside its metrics: what to change, and its details by key."""

    name: str
    advice: tuple[str, ...]
    details: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One file of `RUN/evaluations/`."""

    file: str
    task: str
    data: str
    created: str
    n: str
    gate: str
    comparisons: tuple[Comparison, ...]
    groups: tuple[ExampleGroup, ...]
    has_baseline: bool
    examples_have_base: bool
    kind: str
    conditions: tuple[GateRow, ...]
    classes: Classes | None
    parts: tuple[PartNotes, ...]


def read_evaluations(folder: Path) -> tuple[list[Evaluation], list[Evaluation], list[str]]:
    """The newest evaluation of each task and data file, one with a base before others, the older ones, and a line for each file that is
    damaged."""
    found: list[tuple[str, dict[str, Any], tuple[Comparison, ...]]] = []
    problems = []
    for path in sorted(folder.glob("*.json")):
        name = f"evaluations/{path.name}"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict):
                raise ValueError("expected a JSON object")
            found.append((name, raw, _comparisons(raw)))
        except (ValueError, OSError) as error:  # not JSON and not UTF-8 are ValueErrors too
            problems.append(f"{name} cannot be read ({error}); it is left out.")
    found.sort(key=lambda item: as_text(item[1].get("created")), reverse=True)
    by_worth = sorted(found, key=lambda item: any(comparison.base for comparison in item[2]), reverse=True)
    newest = {_subject(raw): name for name, raw, _ in reversed(by_worth)}
    current = [item for item in found if newest[_subject(item[1])] == item[0]]
    rows = max(3, ROWS_PER_GROUP // max(1, sum(bool(raw.get("examples")) for _, raw, _ in current)))
    return (
        [_evaluation(*item, rows) for item in current],
        [_evaluation(*item, 0) for item in found if item not in current],
        problems,
    )


def _subject(raw: Mapping[str, Any]) -> tuple[str, str]:
    return as_text(raw.get("task")), as_text(raw.get("data"))


def _evaluation(name: str, raw: Mapping[str, Any], comparisons: tuple[Comparison, ...], rows: int) -> Evaluation:
    gate = raw.get("gate")
    n, rows_in_file = as_number(raw.get("n")), as_number(raw.get("rows_in_file"))
    sampled = n is not None and rows_in_file is not None and n < rows_in_file
    kept = raw.get("examples")
    examples = [row for row in kept if isinstance(row, dict)] if isinstance(kept, list) else []
    return Evaluation(
        file=name,
        task=as_text(raw.get("task") or "evaluation"),
        data=as_text(raw.get("data") or ""),
        created=moment(raw.get("created")) or "",
        n="" if n is None else f"{n:,.0f} of {rows_in_file:,.0f} rows" if sampled else plural(int(n), "row"),
        gate=("passed" if gate.get("passed") else "failed") if isinstance(gate, dict) else "",
        comparisons=comparisons,
        groups=_groups(examples, rows),
        has_baseline=any(comparison.base for comparison in comparisons),
        examples_have_base=any(
            row.get("baseline_answer") is not None or row.get("baseline_loss") is not None for row in examples
        ),
        kind=as_text(raw.get("task_kind") or ""),
        conditions=_conditions(gate),
        classes=read_classes(raw.get("classes")),
        parts=_parts(raw.get("parts")),
    )


def _conditions(gate: Any) -> tuple[GateRow, ...]:
    rows = gate.get("conditions") if isinstance(gate, dict) else None
    return tuple(
        GateRow(
            as_text(row.get("condition")),
            number(row.get("value"), 4),
            f"{as_text(row.get('sign'))} {number(row.get('needed'), 4)}",
            row.get("passed") is True,
        )
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
        and as_number(row.get("value")) is not None
        and as_number(row.get("needed")) is not None
    )


def _parts(raw: Any) -> tuple[PartNotes, ...]:
    """The parts beside the task: lists of rows stay in the file."""
    found = []
    for name, details in raw.items() if isinstance(raw, dict) else ():
        if not isinstance(details, dict):
            continue
        said = [details.get("note"), *_list(details.get("notes")), *_list(details.get("advice"))]
        shown = {key: value for key, value in details.items() if key not in ("note", "notes", "advice")}
        pairs = [(key, value) for key, value in flattened(shown) if len(value) <= MAX_TEXT]
        notes = tuple(as_text(line) for line in said if line)
        found.append(PartNotes(as_text(name), notes, tuple(pairs[:PART_DETAILS])))
    return tuple(found)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _comparisons(raw: Mapping[str, Any]) -> tuple[Comparison, ...]:
    """Every metric of a file, those with a base first. Raises ValueError if the file has none."""
    tuned, base = _measurements(raw.get("metrics")), _measurements(raw.get("baseline"))
    if not tuned:
        raise ValueError("it has no `metrics` with a value")
    n = as_number(raw.get("n"))
    paired = raw.get("comparison")
    tests = paired if isinstance(paired, dict) else {}
    compared = [
        _by_paired_test(compare(name, measured, base.get(name), n, *_form(raw["metrics"][name])), tests.get(name))
        for name, measured in tuned.items()
    ]
    return tuple(sorted(compared, key=lambda comparison: comparison.base is None))


def _form(raw: Mapping[str, Any]) -> tuple[bool | None, bool | None]:
    """(whether smaller is better, whether it is a share) of a metric, where the file says."""
    larger, share = _flag(raw.get("higher_is_better")), _flag(raw.get("share"))
    return None if larger is None else not larger, share


def _by_paired_test(comparison: Comparison, test: Any) -> Comparison:
    """The comparison with the verdict of the paired test in the file, if it has one."""
    p = as_number(test.get("p")) if isinstance(test, dict) else None
    if comparison.base is None or p is None or test.get("verdict") not in ("better", "worse", "unclear"):
        return comparison
    words = {"unclear": "no clear difference"}.get(test["verdict"], test["verdict"])
    return replace(comparison, verdict=test["verdict"], reason=f"{words} ({as_p(p)}, {as_text(test.get('test'))})")


def _measurements(raw: Any) -> dict[str, tuple[float, float | None]]:
    """(value, stderr or None) by metric."""
    found = {}
    for name, item in raw.items() if isinstance(raw, dict) else ():
        if isinstance(item, dict) and (value := as_number(item.get("value"))) is not None:
            found[name] = (value, as_number(item.get("stderr")))
    return found


def compare(
    metric: str,
    tuned: tuple[float, float | None],
    base: tuple[float, float | None] | None = None,
    n: float | None = None,
    smaller: bool | None = None,
    share: bool | None = None,
) -> Comparison:
    """Judge one metric, measured on `n` rows: `tuned` and `base` are (value, standard error or None).

    `smaller` says whether less is better and `share` whether it is a fraction of 1; None: by its name and its values.
    """
    measured = [tuned] if base is None else [base, tuned]
    smaller = metric.endswith(LOWER_IS_BETTER) if smaller is None else smaller
    share = not smaller and all(0 <= value <= 1 for value, _ in measured) if share is None else share
    scale = 1.0 if share else max(value + (error or 0.0) for value, error in measured)
    # A bar compares: with the base, or with 100%.
    drawable = (share or base is not None) and scale > 0 and all(value >= 0 for value, _ in measured)

    def bar(label: str, value: float, error: float | None) -> Bar:
        text = percent(value) if share else number(value, 4)
        shown = "" if error is None else f"± {100 * error:.1f}" if share else f"± {number(error, 2)}"
        if not drawable:
            return Bar(label, text, shown, None)
        low, high = max(0.0, value - (error or 0.0)), min(scale, value + (error or 0.0))
        left, right = 100 * low / scale, 100 * high / scale
        return Bar(label, text, shown, 100 * value / scale, left, right - left)

    after = bar("tuned", *tuned)
    if base is None:
        return Comparison(metric, None, after, "", "", "")
    difference = tuned[0] - base[0]
    change = f"{100 * difference:+.1f} points" if share else f"{'+' if difference > 0 else ''}{number(difference, 3)}"
    errors = [_laplace(value, n) if error == 0 and share and n else error for value, error in (tuned, base)]
    verdict, reason = _verdict(-difference if smaller else difference, *errors)
    return Comparison(metric, bar("base", *base), after, change.replace("-", "\N{MINUS SIGN}", 1), verdict, reason)


def _laplace(share: float, n: float) -> float:
    p = (n * share + 1) / (n + 2)
    return math.sqrt(p * (1 - p) / n)


def _verdict(gain: float, tuned_error: float | None, base_error: float | None) -> tuple[str, str]:
    if gain == 0:
        return "unclear", "no difference"
    direction = "better" if gain > 0 else "worse"
    error = math.hypot(tuned_error or 0.0, base_error or 0.0)
    if tuned_error is None or base_error is None or error == 0:
        return "unclear", f"{direction}, but no error bars were recorded"
    errors = f"({abs(gain) / error:.1f} standard errors)"
    if abs(gain) < CLEAR * error:
        return "unclear", f"no clear difference {errors}"
    return direction, f"{direction} {errors}"


def _groups(examples: Sequence[Mapping[str, Any]], limit: int) -> tuple[ExampleGroup, ...]:
    """The examples sorted by outcome, what tuning changed first; at most `limit` rows of each outcome."""
    for key, sign in (("loss", -1.0), ("rougeL", 1.0)):
        if examples and all(as_number(row.get(key)) is not None for row in examples):
            return _graded(examples, key, sign, limit)
    with_base = any(row.get("baseline_correct") is not None for row in examples)
    outcomes: dict[tuple[Any, Any], str] = {
        (True, False): "Fixed by tuning",
        (False, True): "Broken by tuning",
        (False, False): "Wrong both times",
        (True, True): "Right both times",
        (False, None): "Wrong, base not scored" if with_base else "Wrong",
        (True, None): "Right, base not scored" if with_base else "Right",
    }
    by_title: dict[str, list[Mapping[str, Any]]] = {title: [] for title in outcomes.values()}
    for row in examples:
        outcome = _flag(row.get("correct")), _flag(row.get("baseline_correct"))
        by_title.setdefault(outcomes.get(outcome, "Not scored"), []).append(row)
    return tuple(
        ExampleGroup(title, tuple(_row(row) for row in rows[:limit]), len(rows))
        for title, rows in by_title.items()
        if rows
    )


def _graded(examples: Sequence[Mapping[str, Any]], key: str, sign: float, limit: int) -> tuple[ExampleGroup, ...]:
    """Rows with a value each instead of right or wrong: by how much they got better, or from the worst on where there is no base."""

    def gain(row: Mapping[str, Any]) -> float:
        return sign * ((as_number(row[key]) or 0.0) - (as_number(row.get(f"baseline_{key}")) or 0.0))

    if all(as_number(row.get(f"baseline_{key}")) is None for row in examples):
        parts = {"From the worst": sorted(examples, key=gain)}
    else:
        best_first = sorted(examples, key=gain, reverse=True)
        parts = {
            "Better than the base": [row for row in best_first if gain(row) > 0],
            "Worse than the base": [row for row in reversed(best_first) if gain(row) < 0],
            "As the base": [row for row in best_first if gain(row) == 0],
        }
    return tuple(
        ExampleGroup(title, tuple(_row(_with_value(row, key)) for row in rows[:limit]), len(rows))
        for title, rows in parts.items()
        if rows
    )


def _with_value(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The row with its value before each answer; of a text that was only scored the value alone."""

    def cell(prefix: str) -> str | None:
        value = as_number(row.get(f"{prefix}{key}"))
        answer = row.get(f"{prefix}answer", "")
        return None if value is None else f"{key} {number(value)}\n{as_text(answer)}".strip()

    found = {"prompt": row.get("prompt", row.get("text")), "answer": cell(""), "baseline_answer": cell("baseline_")}
    return {**row, **found, "correct": None, "baseline_correct": None}


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _row(raw: Mapping[str, Any]) -> ExampleRow:
    def cell(key: str) -> str:
        value = raw.get(key)
        return "" if value is None else shortened(as_text(value), MAX_TEXT)

    return ExampleRow(
        line=cell("line"),
        prompt=cell("prompt"),
        expected=cell("expected"),
        base_answer=None if raw.get("baseline_answer") is None else cell("baseline_answer"),
        base_correct=_flag(raw.get("baseline_correct")),
        answer=cell("answer"),
        correct=_flag(raw.get("correct")),
    )
