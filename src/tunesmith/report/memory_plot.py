"""The memory of several ways to train as stacked bars, against the card: `tunesmith plan --plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tunesmith.errors import ConfigError
from tunesmith.files import disk_errors
from tunesmith.memory.estimate import CONTEXT_GB
from tunesmith.memory.policy import HEADROOM

KINDS = {
    "weights_gb": ("weights", "#3b78d8"),
    "adapter_gb": ("adapter", "#1f9e89"),
    "gradients_gb": ("gradients", "#c9731a"),
    "optimizer_gb": ("optimizer", "#8e63c7"),
    "activations_gb": ("activations", "#6fb95a"),
    "logits_gb": ("logits", "#d2a106"),
    "workspace_gb": ("workspace", "#9aa1a9"),
    "graphs_gb": ("CUDA graphs", "#d65f8f"),
    "context_gb": ("CUDA context", "#c5cad0"),
}
"""Labels and colours of a breakdown's parts, and of what CUDA graphs hold beside them, in the order of the bars."""

WIDEST = 2.0
"""Bars are cut at this many times the card's memory if an option fits it; their number says how long they are."""

INCHES_PER_BAR = 0.42


def draw_memory(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Draw what `workflows.plan.plan` returned as .png or .svg; returns the path.

    Raises ConfigError for another ending, and what `disk_errors` says where it cannot be written.
    """
    file = Path(path)
    if file.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {path}: expected a name that ends in .png or .svg")
    options = [option for option in result["options"] if option["breakdown"]]
    figure = Figure(figsize=(9, 1.9 + INCHES_PER_BAR * len(options)), layout="constrained")
    canvas = FigureCanvasSVG(figure) if file.suffix == ".svg" else FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _bars(axes, options, float(result["memory_gb"]))
    recommended = result["recommended"]
    axes.set_yticks(
        range(len(options)),
        [_label(option) + (" *" if option == recommended else "") for option in options],
        fontsize=9,
    )
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    title = f"{result['model']} on {result['gpu']}: predicted memory, with CUDA's context"
    axes.set_title(title, fontsize=11, loc="left")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_figure(str(file), dpi=150)
    return file


def _bars(axes: Axes, options: Sequence[Mapping[str, Any]], memory_gb: float) -> None:
    starts = [0.0] * len(options)
    for key, (label, colour) in KINDS.items():
        widths = [parts_of(option).get(key, 0.0) for option in options]
        axes.barh(range(len(options)), widths, left=starts, height=0.66, color=colour, label=label)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    edge = 1.05 * max([*starts, memory_gb])
    if any(option["fits"] for option in options):  # else what is too long is all there is to see
        edge = min(edge, WIDEST * memory_gb)
    for place, (option, total) in enumerate(zip(options, starts, strict=True)):
        # Beside the axes, where neither bars nor lines are.
        axes.text(
            1.01, place, f"{total:,.1f}" + (" …" if total > edge else ""), transform=axes.get_yaxis_transform(),
            va="center", ha="left", fontsize=8, color="#1f2328" if option["fits"] else "#c8524d",
        )  # fmt: skip
    room = CONTEXT_GB + HEADROOM * (memory_gb - CONTEXT_GB)
    axes.axvline(room, color="#c8524d", linewidth=1.2, linestyle="--", label=f"what a plan may fill: {room:.1f} GB")
    axes.axvline(memory_gb, color="#c8524d", linewidth=1.4, label=f"the card: {memory_gb:.1f} GB")
    axes.set_xlim(0, edge)
    axes.grid(axis="x", color="#d8dce0", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def parts_of(option: Mapping[str, Any]) -> dict[str, float]:
    """The parts of an option's bar, by the keys of KINDS."""
    return {**option["breakdown"], "graphs_gb": option["graphs_gb"]}


def _label(option: Mapping[str, Any]) -> str:
    return (
        f"{option['label']}, {option['micro_batch_size']} x {option['max_seq_length']:,}, "
        f"{option['memory_mode']}, {option['optimizer']}"
    )
