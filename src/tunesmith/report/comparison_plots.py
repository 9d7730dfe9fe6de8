"""Plots of several runs: their loss curves in one, and a metric against time and against size, each run a numbered point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from tunesmith.report.facts import events_of
from tunesmith.report.plots import COLOURS, FEW_POINTS, downsample, draw, smoothed
from tunesmith.report.text import as_number, plural
from tunesmith.types import Event

PALETTE = ("#3a77d6", "#c8721b", "#2c9a68", "#b0559b", "#8f7d24", "#3d9db5", "#c7514c", "#7c848f")
"""Mid-tones that can be told apart, on white and on near-black. Past the last one lines are dashed."""

WIDE_RANGE = 20
"""The largest value over the smallest from which an axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run: a metric with its standard error, and what it cost. None: not known."""

    name: str
    value: float | None
    error: float | None
    seconds: float | None
    size_mb: float | None
    best: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """A line of a legend."""

    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class ComparisonPlot:
    """A titled plot with its legend."""

    name: str
    title: str
    svg: str
    legend: tuple[Key, ...]
    caption: str = ""


def loss_curves(runs: Sequence[tuple[str, Sequence[Event]]]) -> list[ComparisonPlot]:
    """The training losses of all runs by step, smoothed where they are long; none if no run logged a step."""
    curves = []
    for name, events in runs:
        steps = [(as_number(step.get("step")), as_number(step.get("loss"))) for step in events_of(events, "step")]
        known = np.array([(step, loss) for step, loss in steps if step is not None and loss is not None])
        if len(known):
            x, y = known[:, 0], known[:, 1]
            curves.append((name, *downsample(x, y if len(x) <= FEW_POINTS else smoothed(y))))
    if not curves:
        return []
    keys = tuple(Key(name, *_look(number)) for number, (name, _, _) in enumerate(curves))

    def fill(axes: Axes) -> None:
        for key, (_, x, y) in zip(keys, curves, strict=True):
            few = len(x) <= FEW_POINTS
            line = (0, (5, 2)) if key.dashed else "-"
            axes.plot(x, y, color=key.colour, linewidth=1.7, linestyle=line, marker="o" if few else "", markersize=3)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))

    svg = draw("losses", "Line chart: training loss of each run by step", "step", fill)
    smooth = (
        "Smoothed where a run has more than 30 logged steps." if any(len(x) > FEW_POINTS for _, x, _ in curves) else ""
    )
    return [ComparisonPlot("losses", "Training loss", svg, keys, smooth)]


def scatter_plots(metric: str, points: Sequence[Point]) -> list[ComparisonPlot]:
    """The metric against time, and against the size of what is saved. A plot needs two runs with both values."""
    plots = []
    for name, title, x_label, cost in (
        ("time", "time", "seconds", [point.seconds for point in points]),
        ("size", "size", "MB saved", [point.size_mb for point in points]),
    ):
        known = [
            (number, x, point.value, point)
            for number, (x, point) in enumerate(zip(cost, points, strict=True), 1)
            if x is not None and point.value is not None
        ]
        if len(known) > 1:
            plots.append(_scatter(name, f"{metric} against {title}", x_label, known))
    return plots


def _scatter(name: str, title: str, x_label: str, known: Sequence[tuple[int, float, float, Point]]) -> ComparisonPlot:
    def fill(axes: Axes) -> None:
        for number, x, y, point in known:
            colour = COLOURS["second"] if point.best else COLOURS["main"]
            if point.error:
                axes.errorbar(x, y, yerr=point.error, color=colour, linewidth=1.2, capsize=3)
            axes.plot(x, y, "D" if point.best else "o", color=colour, markersize=8 if point.best else 6)
            axes.annotate(str(number), (x, y), (6, 5), textcoords="offset points", color=COLOURS["axis"], fontsize=10)
        if _is_wide([x for _, x, _, _ in known]):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.08, y=0.15)

    svg = draw(name, f"Scatter plot: {title}, {plural(len(known), 'run')}", x_label, fill)
    best = [f"{number} {point.name}" for number, _, _, point in known if point.best]
    caption = "; ".join(f"{number} {point.name}" for number, _, _, point in known)
    legend = tuple(Key(f"best: {text}", f"var(--plot-second, {COLOURS['second']})") for text in best)
    return ComparisonPlot(
        name,
        title,
        svg,
        legend,
        f"{caption}. Bars are one standard error." if any(point.error for _, _, _, point in known) else f"{caption}.",
    )


def _look(number: int) -> tuple[str, bool]:
    """Colour, and whether dashed, of the run with this number from 0."""
    return PALETTE[number % len(PALETTE)], number >= len(PALETTE)


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > WIDE_RANGE * min(values)
