"""What the steps of a run are like: against whole epochs of StepOrder."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from tunesmith.config import TrainingConfig
from tunesmith.data.batches import StepOrder
from tunesmith.data.typical import QUANTILES, typical_step
from tunesmith.data.widening import MicroBatchShape, few_lengths

RANDOM = random.Random(3)
LENGTHS = [min(2048, int(RANDOM.lognormvariate(6.4, 0.8)) + 20) for _ in range(960)]
SUPERVISED = [RANDOM.randint(length // 2, length - 1) for length in LENGTHS]
"""As chats have them."""


@pytest.mark.parametrize(
    ("values", "packing"),
    [
        ({"micro_batch_size": 4}, False),
        ({"micro_batch_size": 16}, False),
        ({"micro_batch_size": 4}, True),
        ({"micro_batch_tokens": 4096}, True),
        ({"micro_batch_tokens": 4096, "batch_tokens": 8192}, True),
    ],
)
@pytest.mark.parametrize("widen", [None, few_lengths])
def test_a_sample_is_like_an_epoch(values: dict[str, Any], packing: bool, widen: Any) -> None:
    """Of 32 sampled steps against all 60: tokens with padding, positions with a label, how often shapes come again."""
    training = TrainingConfig(batch_size=16, **values)
    order = StepOrder(LENGTHS, training, packing)
    parts, slots, heads, pairs, shapes = 0, 0, 0, 0, Counter[MicroBatchShape]()
    for step in range(order.steps_per_epoch):
        for part in order.step(step):
            parts += 1
            rows, targets = [LENGTHS[i] for i in part], sum(SUPERVISED[i] for i in part)
            if widen is None:
                slots += sum(rows) if packing else len(rows) * max(rows)
                pairs += sum(row * row for row in rows) if packing else len(rows) * max(rows) ** 2
                heads += targets
            else:
                shape = MicroBatchShape.widened(rows, targets, packing, widen)
                shapes[shape] += 1
                slots += shape.rows * shape.length
                pairs += (
                    sum(row * row for row in rows) if packing else shape.rows * shape.length**2
                )  # padding: a little more
                heads += shape.supervised
    found = typical_step(LENGTHS, SUPERVISED, training, packing, widen)
    steps = order.steps_per_epoch if "batch_tokens" not in values else sum(LENGTHS) / 8192
    assert found.micro_batches == pytest.approx(parts / steps, rel=0.03)
    assert found.slots == pytest.approx(slots / steps, rel=0.01 if packing else 0.03)
    assert found.context == pytest.approx(pairs / slots, rel=0.06)
    assert found.supervised == pytest.approx(heads / steps, rel=0.05)
    if not packing:
        assert slots / steps > 1.05 * 16 * sum(LENGTHS) / len(LENGTHS), "padding is a good part of it"
    assert list(found.shapes) == sorted(found.shapes, reverse=True)
    if widen is None:
        assert found.shapes == ()
    else:
        share, expected = (sum(sorted(counts)[-8:]) / sum(counts) for counts in (found.shapes, shapes.values()))
        assert share == pytest.approx(expected, abs=0.1)


def test_examples_of_one_length_are_one_shape() -> None:
    training = TrainingConfig(batch_size=16, micro_batch_size=4)
    found = typical_step([100] * 40, [60] * 40, training, False, few_lengths)
    assert (found.micro_batches, found.slots, found.supervised, found.shapes) == (4, 16 * 104, 4 * 312, (4,))
    plain = typical_step([100] * 40, [60] * 40, training, False)
    assert (plain.slots, plain.supervised, plain.shapes) == (1600, 960, ())


def test_how_micro_batches_differ_in_size() -> None:
    """Of 100 and 300 tokens alternately, one a micro-batch: half are half the mean, half one and a half times."""
    training = TrainingConfig(batch_size=4, micro_batch_size=1)
    lengths = [100, 300] * 500
    spread = typical_step(lengths, lengths, training, False).spread
    assert len(spread) == QUANTILES
    assert sum(spread) == pytest.approx(len(spread), rel=0.02)
    assert spread[:3] == pytest.approx([0.5] * 3, rel=0.1)
    assert spread[-3:] == pytest.approx([1.5] * 3, rel=0.1)
    assert typical_step([100] * 50, [9] * 50, training, False).spread == (1.0,)
    by_tokens = TrainingConfig(micro_batch_tokens=300, batch_tokens=600)
    spread = typical_step([299, 299, 299, 60], [9] * 4, by_tokens, True).spread
    assert spread == pytest.approx([60 / 239.25, *[299 / 239.25] * 3]), "of packs, too"
    whole = TrainingConfig(batch_size=2, micro_batch_tokens=401)
    assert min(typical_step(lengths, lengths, whole, True).spread) == pytest.approx(200 / 320, rel=0.05), (
        "200, 400, or twice 300"
    )


def test_fewer_examples_than_a_step_takes() -> None:
    found = typical_step([100, 50], [10, 10], TrainingConfig(batch_size=16, micro_batch_size=4), False)
    assert (found.slots, found.supervised) == (200, 20)
