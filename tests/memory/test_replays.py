"""How many micro-batches graphs replay: by hand, and against what training/graphs.py does."""

from __future__ import annotations

import math
import random
from collections import deque

import pytest

from tunesmith.config import TrainingConfig
from tunesmith.data.batches import StepOrder
from tunesmith.data.typical import typical_step
from tunesmith.data.widening import MicroBatchShape, few_lengths
from tunesmith.memory.replays import JUDGED_FROM, LOOKED_AT, MAX_GRAPHS, OUSTS, TOO_MANY, WARM_UPS, replayed


def test_one_shape_is_always_replayed() -> None:
    assert replayed([5], 1) == replayed([1], 1e6) == 1.0
    assert replayed([], 100) == 0.0


def test_each_shape_is_captured_once() -> None:
    """Of 97 micro-batches after the warm-ups three quarters and one quarter: both shapes come, and are captured once."""
    assert replayed([3, 1], 100) == pytest.approx((100 - WARM_UPS - 2) / 100)
    assert replayed([3, 1], WARM_UPS) == 0.0
    assert replayed([3, 1], 1e9) == pytest.approx(1.0)


def test_what_comes_once_at_most_is_not_replayed() -> None:
    """A shape that is expected n times comes k times with probability n^k exp(-n) / k!: all but the first are replays."""
    n = 0.5
    shapes, total = [1] * 20, 20 * n + WARM_UPS
    again = sum((k - 1) * n**k * math.exp(-n) / math.factorial(k) for k in range(2, 30))
    assert replayed(shapes, total) == pytest.approx(20 * again / total)
    assert replayed(shapes, total) < 0.2


def test_only_so_many_graphs_are_kept() -> None:
    assert replayed([3] * MAX_GRAPHS + [1] * MAX_GRAPHS, 1e9) == pytest.approx(0.75)


def test_none_where_training_would_give_graphs_up() -> None:
    """No more than TOO_MANY of the micro-batches may find no graph, from JUDGED_FROM on."""
    kept = [1] * MAX_GRAPHS
    enough, less = (kept + [1] * others for others in (round(MAX_GRAPHS / (1 - TOO_MANY)) - MAX_GRAPHS, 4 * MAX_GRAPHS))
    assert replayed(enough, JUDGED_FROM) > 0
    assert replayed(less, JUDGED_FROM) == 0.0
    assert replayed(less, JUDGED_FROM - 1) > 0


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (16, 2), (16, 4), (16, 16)])
def test_the_share_is_that_of_a_run(batch: int, size: int, packing: bool) -> None:
    """Of 4,000 chats in 2,000 micro-batches: what training/graphs.py would do, shape by shape, against the prediction.

    It may be a little too high: the sample's most frequent shapes are so by luck, too.
    """
    rng = random.Random(5)
    lengths = [min(2048, int(rng.lognormvariate(5.8, 0.8)) + 30) for _ in range(4000)]
    supervised = [int(length * rng.uniform(0.2, 0.6)) for length in lengths]
    training = TrainingConfig(batch_size=batch, micro_batch_size=size, epochs=1)
    order, total = StepOrder(lengths, training, packing), 2000
    parts = (part for step in range(10**9) for part in order.step(step))
    seen: dict[MicroBatchShape, int] = {}
    graphs: set[MicroBatchShape] = set()
    replays, recent = 0, deque[bool](maxlen=LOOKED_AT)
    for number, part in zip(range(total), parts, strict=False):
        shape = MicroBatchShape.widened(
            [lengths[i] for i in part], sum(supervised[i] for i in part), packing, few_lengths
        )
        seen[shape] = seen.get(shape, 0) + 1
        if number < WARM_UPS:
            continue
        recent.append(shape not in graphs)
        if shape in graphs:
            replays += 1
            continue
        graphs.add(shape)
        if len(graphs) > MAX_GRAPHS:
            least = min(graphs - {shape}, key=lambda known: seen[known])
            graphs.remove(least if OUSTS * seen[least] < seen[shape] else shape)
        if number + 1 >= JUDGED_FROM and sum(recent) > TOO_MANY * len(recent):
            replays = 0  # given up
            break
    predicted = replayed(typical_step(lengths, supervised, training, packing, few_lengths).shapes, total)
    assert -0.05 < predicted - replays / total < 0.15
