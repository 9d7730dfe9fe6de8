"""How many of a run's micro-batches CUDA graphs replay: what training/graphs.py does, counted beforehand.

Imports no PyTorch. The numbers that say "measured" are of benchmarks/graphs.py on an H100 (docs/LOG.md, 2026-11-26).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

WARM_UPS = 3
"""Micro-batches of a run that go launch by launch before the first graph is captured."""

PAYS_FROM = 0.4
"""Share of a micro-batch's time that launching takes from which on graphs are captured: after every wait (a log line, an
evaluation) the GPU stands still until launching has caught up."""

MAX_GRAPHS = 32
"""Graphs that are kept. They share one memory pool, but each has memory of the driver's."""

GRAPH_GB = 0.0055
"""That memory: 3.5 to 5.4 MB were measured."""

OUSTS = 2
"""Where there is no room, a shape takes the place of one that was seen less than an OUSTS-th as often."""

JUDGED_FROM, LOOKED_AT, TOO_MANY = 16 * MAX_GRAPHS, 256, 0.75
"""From so many micro-batches on, when what comes often has its graph, they are given up if this share of the last LOOKED_AT had to
be captured: what comes once is faster launch by launch."""


def replayed(shapes: Sequence[int], micro_batches: float) -> float:
    """Share of a run's `micro_batches` that graphs replay; the others are captured, which takes as long as launching and running
    them one after the other (measured: 124 ms, of 112 and 11). None where training would give graphs up.

    `shapes` says how often each shape came in a sample, the most frequent first. A sample of one shape stands for any
    number of micro-batches: all are replayed. A shape that is expected n times comes at all with probability 1 - exp(-n).
    """
    if len(shapes) <= 1:
        return float(len(shapes))
    left = max(0.0, micro_batches - WARM_UPS)
    if micro_batches >= JUDGED_FROM and sum(shapes[:MAX_GRAPHS]) < (1 - TOO_MANY) * sum(shapes):
        return 0.0
    expected = [count / sum(shapes) * left for count in shapes[:MAX_GRAPHS]]
    return sum(times + math.expm1(-times) for times in expected) / micro_batches
