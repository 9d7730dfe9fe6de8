"""How many of a run's micro-batches CUDA graphs replay: what training/graphs.py does, counted beforehand.

Imports no PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

WARM_UPS = 3
"""Times that a shape runs launch by launch before it is captured: libraries choose, kernels are compiled, and a shape that
comes no more often is not worth a graph."""

CAPTURING = 3
"""Micro-batches launch by launch that take as long as capturing one. Not measured: Python launches the kernels once more,
the graph is made, and what the allocator gave back for it is fetched again."""

PAYS_FROM = 0.4
"""Share of a micro-batch's time that launching takes from which on it is captured: after every wait (a log line, an
evaluation) the GPU stands still until launching has caught up."""

MAX_GRAPHS = 24
"""Graphs that are kept, for each costs memory of the driver's. They share one memory pool."""

OUSTS = 2
"""Where there is no room, a shape takes the place of one that was seen less than an OUSTS-th as often."""


def replayed(shapes: Sequence[int], micro_batches: float) -> float:
    """Share of a run's `micro_batches` that graphs replay, with what capturing costs taken off.

    `shapes` says how often each shape came in a sample, the most frequent first. A sample of one shape stands for any
    number of micro-batches: all are replayed.
    """
    if len(shapes) <= 1:
        return float(len(shapes))
    expected = [count / sum(shapes) * micro_batches for count in shapes[:MAX_GRAPHS]]
    replays = sum(max(0.0, times - WARM_UPS - CAPTURING) for times in expected)
    return replays / micro_batches
