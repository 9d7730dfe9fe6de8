"""Labels on the page: F1 of each before and after, and which are taken for which, by name.

A table of confusions of 77 labels cannot be read. It shows those of the most frequent pairs, up to MATRIX_LABELS, and counts the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.report.text import as_number, as_text, percent, shortened

MATRIX_LABELS = 12
PAIRS = 10
WORST = 10
"""Labels whose bars are open; the others unfold."""

MAX_PROMPT = 160
"""Characters of an example question."""


@dataclass(frozen=True, slots=True)
class LabelBars:
    """One label: F1 in percent before (None: not measured) and after, and its rows."""

    name: str
    n: str
    base: float | None
    tuned: float
    base_text: str
    tuned_text: str


@dataclass(frozen=True, slots=True)
class ConfusedPair:
    """A label that was answered with another one."""

    expected: str
    answered: str
    count: int
    before: int | None
    examples: tuple[tuple[str, str], ...]
    """(line, question)."""


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """The rows of one label: how many were answered with each of the matrix's labels, and with anything else."""

    name: str
    cells: tuple[tuple[int, float], ...]
    """(count, share of the label's rows)."""
    elsewhere: int


@dataclass(frozen=True, slots=True)
class Classes:
    """What the page shows of an evaluation of labels."""

    worst: tuple[LabelBars, ...]
    others: tuple[LabelBars, ...]
    pairs: tuple[ConfusedPair, ...]
    more_pairs: int
    matrix: tuple[MatrixRow, ...]
    matrix_names: tuple[str, ...]
    no_label: str
    has_base: bool


def read_classes(raw: Any) -> Classes | None:
    """`classes` of an evaluation's file; None where it has none, or not in that form."""
    tuned = raw.get("tuned") if isinstance(raw, dict) else None
    if not isinstance(tuned, dict) or not tuned.get("per_class"):
        return None
    base = raw.get("baseline") if isinstance(raw.get("baseline"), dict) else None
    try:
        bars = sorted(_bars(tuned, base), key=lambda one: (one.tuned, one.name))
        pairs = _pairs(tuned, base)
        names, matrix = _matrix(tuned)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # written by hand, or damaged: the rest of the evaluation is still worth showing
    other = as_number(tuned.get("other")) or 0
    was = as_number(base.get("other")) if base else None
    no_label = f"{other:,.0f}" + (f" (base: {was:,.0f})" if was is not None else "")
    return Classes(
        tuple(bars[:WORST]),
        tuple(bars[WORST:]),
        tuple(pairs[:PAIRS]),
        max(0, len(pairs) - PAIRS),
        matrix,
        names,
        no_label if other or was else "",
        base is not None,
    )


def _bars(tuned: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[LabelBars]:
    before = {one["label"]: one["f1"] for one in base["per_class"]} if base else {}
    return [
        LabelBars(
            as_text(one["label"]),
            f"{one['n']:,}",
            100 * before[one["label"]] if one["label"] in before else None,
            100 * one["f1"],
            percent(before[one["label"]]) if one["label"] in before else "",
            percent(one["f1"]),
        )
        for one in tuned["per_class"]
    ]


def _pairs(tuned: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[ConfusedPair]:
    before = {(one["expected"], one["answered"]): one["count"] for one in base["confusions"]} if base else {}
    return [
        ConfusedPair(
            as_text(one["expected"]),
            as_text(one["answered"]),
            int(one["count"]),
            before.get((one["expected"], one["answered"]), 0) if base else None,
            tuple(
                (as_text(row.get("line")), shortened(as_text(row.get("prompt")), MAX_PROMPT))
                for row in one.get("examples", [])
            ),
        )
        for one in tuned["confusions"]
    ]


def _matrix(tuned: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[MatrixRow, ...]]:
    """The labels of the most frequent pairs, and their rows."""
    names: list[str] = []
    for one in tuned["confusions"]:
        new = [name for name in (one["expected"], one["answered"]) if name not in names]
        if len(names) + len(new) > MATRIX_LABELS:
            break
        names += new
    counts: dict[tuple[str, str], int] = {
        (one["expected"], one["answered"]): one["count"] for one in tuned["confusions"]
    }
    of_class = {one["label"]: one for one in tuned["per_class"]}
    names.sort()
    return tuple(map(as_text, names)), tuple(_matrix_row(name, names, counts, of_class[name]) for name in names)


def _matrix_row(
    name: str, names: Sequence[str], counts: Mapping[tuple[str, str], int], of_class: Mapping[str, Any]
) -> MatrixRow:
    n = int(of_class["n"])
    right = round(float(of_class["recall"]) * n)
    cells = [right if other == name else counts.get((name, other), 0) for other in names]
    return MatrixRow(as_text(name), tuple((count, count / n if n else 0.0) for count in cells), n - sum(cells))
