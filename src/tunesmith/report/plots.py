"""Training curves as inline SVG.

matplotlib draws with its object API (Figure and FigureCanvasSVG: no pyplot, no global state); the result is cut down to
what a page can hold inline. Colours become CSS variables (with the drawn colour as fallback), so that one drawing is
legible on a light and on a dark page; text stays text, in the page's font; element ids get the plot's name as prefix.

A line has at most MAX_POINTS points: `downsample` keeps the lowest and the highest of every stretch, so a spike of one
step in 10,000 is still there. The smoothed loss is a centred Gaussian mean, which does not lag as a running mean does.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from tunesmith.report.facts import eval_metric
from tunesmith.report.text import as_number, number, percent, plural
from tunesmith.types import Event

MAX_POINTS = 1500
FEW_POINTS = 30
"""Up to so many points each gets a marker: a line through one point would be invisible."""

WIDTH, HEIGHT = 480, 260
"""Of the drawing in its own units; the page scales it."""

# Mid-tones that can be read on white and on near-black; the page's CSS variables refine them for each.
COLOURS = {
    "axis": "#7d8590",
    "grid": "#808891",
    "main": "#3b78d8",
    "raw": "#6f9fe6",
    "second": "#c9731a",
    "limit": "#c8524d",
}

LineStyle = Literal["line", "raw", "dashed", "points", "limit"]
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot (its style says colour, width and dashes), or a horizontal limit with a single y."""

    label: str
    style: LineStyle
    x: Values
    y: Values


@dataclass(frozen=True, slots=True)
class Plot:
    """A titled plot: `svg` is empty and `caption` says why if there is nothing to draw."""

    name: str
    title: str
    svg: str
    legend: tuple[tuple[LineStyle, str], ...]
    caption: str


def training_plots(events: Sequence[Event], clip: float | None = None, limit_gb: float | None = None) -> list[Plot]:
    """Loss, of preferences their rewards, learning rate, gradient norm, throughput and memory by step. Empty if no step was
    logged.

    `clip` is the gradient norm that steps are clipped to, `limit_gb` the memory cap in GB.
    """
    steps = [event for event in events if event.get("event") == "step" and as_number(event.get("step")) is not None]
    if not steps:
        return []
    x = _column(steps, "step")
    norm, memory = _column(steps, "grad_norm"), _column(steps, "memory_gb")
    return [
        _loss_plot(x, _column(steps, "loss"), eval_metric(events, "eval_loss")),
        *_reward_plots(x, steps, events),
        _rate_plot(x, _column(steps, "lr")),
        _plot("grad-norm", "Gradient norm", _curve(x, norm), _clip_caption(norm, clip), clip),
        _tokens_plot(x, _column(steps, "tokens_per_second"), _column(steps, "supervised_tokens_per_second")),
        _plot("examples", "Examples per second", _curve(x, _column(steps, "examples_per_second"))),
        _plot("memory", "Memory, GB", [Series("in use", "line", x, memory)], "", limit_gb, "memory limit"),
    ]


def downsample(x: Values, y: Values, limit: int = MAX_POINTS) -> tuple[Values, Values]:
    """At most `limit` of the points (x, y): the first, the last, and of every stretch between the lowest and highest."""
    if len(x) <= limit:
        return x, y
    edges = np.linspace(1, len(x) - 1, (limit - 2) // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, end in pairwise(edges.tolist()):
        stretch = y[start:end]
        if np.isnan(stretch).all():
            kept.add(start)
        else:
            kept.update((start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))))
    index = np.array(sorted(kept))
    return x[index], y[index]


def smoothed(y: Values) -> Values:
    """A Gaussian mean of `y` with σ a sixtieth of its length, at least 2 steps; missing values are left out."""
    sigma = max(2.0, len(y) / 60)
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    present = np.isfinite(y)
    weight = np.convolve(present, kernel, "same")
    total = np.convolve(np.where(present, y, 0.0), kernel, "same")
    mean: Values = np.where(weight > 1e-12, total / np.maximum(weight, 1e-12), np.nan)
    return mean


def _column(steps: Sequence[Event], key: str) -> Values:
    return np.array([math.nan if (value := as_number(step.get(key))) is None else value for step in steps])


def _curve(x: Values, y: Values, label: str = "each step") -> list[Series]:
    """A noisy value: thin as it was, and smoothed; a short one is a line as it was."""
    if len(x) <= FEW_POINTS:
        return [Series(label, "line", x, y)]
    return [Series(label, "raw", x, y), Series("smoothed", "line", x, smoothed(y))]


def _loss_plot(x: Values, loss: Values, evaluated: Sequence[tuple[float, float]]) -> Plot:
    series = _curve(x, loss)
    caption = ""
    if evaluated:
        points = np.array(evaluated)
        series.append(Series("evaluation", "points", points[:, 0], points[:, 1]))
        caption = f"Evaluation loss {number(points[0, 1])}"
        caption += f" at first, {number(points[:, 1].min())} at best." if len(points) > 1 else "."
    return _plot("loss", "Training loss", series, caption)


def _reward_plots(x: Values, steps: Sequence[Event], events: Sequence[Event]) -> list[Plot]:
    """What an objective that compares answers gives them, and how often it is right; nothing for other objectives."""
    plots = []
    chosen, rejected = _column(steps, "rewards/chosen"), _column(steps, "rewards/rejected")
    if np.isfinite(chosen).any():
        series = _curve(x, chosen, "chosen")
        series.append(Series("rejected", "dashed", x, rejected if len(x) <= FEW_POINTS else smoothed(rejected)))
        plots.append(_plot("rewards", "Rewards", series))
    accuracy = _column(steps, "rewards/accuracies")
    if np.isfinite(accuracy).any():
        series, caption = _curve(x, accuracy), ""
        if evaluated := eval_metric(events, "eval_rewards/accuracies"):
            points = np.array(evaluated)
            series.append(Series("evaluation", "points", points[:, 0], points[:, 1]))
            caption = f"Evaluation pairs: {percent(float(points[-1, 1]))} at last."
        plots.append(_plot("reward-accuracy", "Share of pairs that are right", series, caption))
    return plots


def _rate_plot(x: Values, rate: Values) -> Plot:
    # The ticks are in a power of ten that the title names: 0.00005 is hard to read.
    peak = np.nanmax(rate, initial=0.0)
    exponent = math.floor(math.log10(peak)) if peak > 0 else 0
    digits = str(abs(exponent)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    unit = f", \N{MULTIPLICATION SIGN} 10{'⁻' if exponent < 0 else ''}{digits}" if exponent else ""
    series = [Series("learning rate", "line", x, rate)]
    return _plot("learning-rate", f"Learning rate{unit}", series, tick_unit=10.0**exponent)


def _tokens_plot(x: Values, tokens: Values, supervised: Values) -> Plot:
    series = _curve(x, tokens, "all tokens")
    shown = supervised if len(x) <= FEW_POINTS else smoothed(supervised)
    series.append(Series("supervised tokens", "dashed", x, shown))
    caption = f"Median {number(float(np.nanmedian(tokens)))}." if np.isfinite(tokens).any() else ""
    return _plot("tokens", "Tokens per second", series, caption)


def _clip_caption(norm: Values, clip: float | None) -> str:
    present = norm[np.isfinite(norm)]
    if not len(present):
        return ""
    median = f"Median {number(float(np.median(present)))}."
    return (
        median
        if clip is None
        else f"{median} Clipped to {clip:g} in {percent(float(np.mean(present > clip)))} of steps."
    )


def _plot(
    name: str,
    title: str,
    series: list[Series],
    caption: str = "",
    limit: float | None = None,
    limit_label: str = "clip threshold",
    tick_unit: float = 1.0,
) -> Plot:
    """Draw `series` of which the first is described in the caption; `limit` becomes a horizontal line if it is near."""
    first = series[0]
    present = np.isfinite(first.y)
    if not present.any():
        return Plot(name, title, "", (), "Not a single finite value was recorded.")
    shown = [item for item in series if np.isfinite(item.y).any()]
    if limit is not None:
        if limit <= 3 * float(np.nanmax(first.y)):
            shown.append(Series(f"{limit_label} {limit:g}", "limit", first.x, np.array([limit])))
        else:  # a far limit would squeeze the curve to the bottom
            caption += f" The {limit_label}, {limit:g}, is far above."
    if _has_outlier(first.y):
        caption += " Logarithmic scale."
    svg = _draw(name, f"Line chart: {title} by step", shown, tick_unit)
    legend = tuple((item.style, item.label) for item in shown) if len(shown) > 1 else ()
    return Plot(name, title, svg, legend, f"{_described(first.x, first.y)} {caption}".strip())


def _described(x: Values, y: Values) -> str:
    """The curve in words: first, last, lowest, highest, and what is missing."""
    present = np.flatnonzero(np.isfinite(y))
    missing = np.flatnonzero(~np.isfinite(y))

    def at(index: int) -> str:
        return f"{number(float(y[index]))} (step {x[index]:,.0f})"

    if len(present) == 1:
        words = f"{at(present[0])}."
    else:
        lowest, highest = present[np.argmin(y[present])], present[np.argmax(y[present])]
        words = f"From {at(present[0])} to {at(present[-1])}; lowest {at(lowest)}, highest {at(highest)}."
    if len(missing):
        words += f" Not a finite number at {plural(len(missing), 'step')}, first at step {x[missing[0]]:,.0f}."
    return words


def _draw(name: str, label: str, series: Sequence[Series], tick_unit: float) -> str:
    def fill(axes: Axes) -> None:
        for item in series:
            _draw_series(axes, item)
        _set_scale(axes, series[0].y, min(float(np.nanmin(item.y)) for item in series))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value / tick_unit)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))

    return draw(name, label, "step", fill)


def draw(name: str, label: str, x_label: str, fill: Callable[[Axes], None]) -> str:
    """The SVG of what `fill` draws in axes of this report's look. `name` is the prefix of its element ids, `label` says what it is."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # the same run gives the same bytes
        "font.size": 11,
        "xtick.color": COLOURS["axis"],
        "ytick.color": COLOURS["axis"],
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))  # an SVG has 72 units to the inch
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0.115, 0.18, 0.865, 0.775))
        axes.patch.set_alpha(0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(COLOURS["axis"])
        axes.grid(axis="y", color=COLOURS["grid"], alpha=0.25, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", pad=5)
        axes.margins(x=0.02, y=0.08)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        fill(axes)
        axes.set_xlabel(x_label, color=COLOURS["axis"], labelpad=4)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer)
    return _inline(buffer.getvalue(), name, label)


def _draw_series(axes: Axes, series: Series) -> None:
    if series.style == "limit":
        axes.axhline(float(series.y[0]), color=COLOURS["limit"], linewidth=1.3, linestyle=(0, (2, 2)))
        return
    x, y = downsample(series.x, series.y)
    few = len(x) <= FEW_POINTS
    marker = "o" if few else ""
    match series.style:
        case "raw":
            axes.plot(x, y, color=COLOURS["raw"], linewidth=0.8, alpha=0.55)
        case "line":
            axes.plot(x, y, color=COLOURS["main"], linewidth=1.7, marker=marker, markersize=4, clip_on=not few)
        case "dashed":
            axes.plot(
                x,
                y,
                color=COLOURS["second"],
                linewidth=1.4,
                linestyle=(0, (5, 2)),
                marker=marker,
                markersize=4,
                clip_on=not few,
            )
        case "points":
            axes.plot(x, y, color=COLOURS["second"], linewidth=1, linestyle=(0, (5, 2)), marker="D", markersize=5)


def _set_scale(axes: Axes, y: Values, least: float) -> None:
    """By the first series, `y`; `least` is the lowest value of all."""
    if _has_outlier(y):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if least >= 0:
            axes.set_ylim(0, None if np.nanmax(y) > 0 else 1)


def _has_outlier(y: Values) -> bool:
    """Whether the highest value would flatten the rest of the curve on a linear scale."""
    return bool(np.nanmin(y) > 0 and np.nanmax(y) > 50 * np.nanmedian(y))


def _tick(value: float) -> str:
    """8,000, but 12.5k and 8.5M: a label has room for five characters."""
    size = abs(value)
    text = f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k" if size >= 1e4 else f"{value:,g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _inline(svg: bytes, name: str, label: str) -> str:
    """An SVG file as an element for an HTML page."""
    root = ElementTree.fromstring(svg)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):  # the style would apply to the whole page
                parent.remove(child)
    colours = {colour: f"var(--plot-{key}, {colour})" for key, colour in COLOURS.items()}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id":
                value = f"{name}-{value}"
            elif key == "d":  # a hundredth of a unit is far below a pixel
                value = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", value)
            elif key == "style":
                value = re.sub("|".join(colours), lambda match: colours[match[0]], value)
            else:
                value = re.sub(r"^#|(?<=url\(#)", lambda match: f"{match[0]}{name}-", value)
            element.attrib[key.rpartition("}")[2]] = value  # xlink:href became href long ago
    return ElementTree.tostring(root, encoding="unicode")
