"""What the steps of a run are like, before it: how much of them is padding, and which shapes come again.

A sample of steps is divided as training divides them. Imports no PyTorch.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from tunesmith.config import TrainingConfig
from tunesmith.data.batches import split
from tunesmith.data.packing import best_fit
from tunesmith.data.widening import MicroBatchShape, Widen, documents_of

SAMPLED = 512
"""Micro-batches that `typical_step` looks at, or packs where a step is measured in tokens: of fewer, the shapes that come most
would seem to come more often than they do."""

SAMPLED_EXAMPLES = 2048
"""Examples that it looks at where that is less: most of the padding is seen in them."""

FEWEST_STEPS = 4
"""Steps that it looks at in any case."""

QUANTILES = 8
"""Groups of micro-batches of about one size."""


@dataclass(frozen=True, slots=True)
class TypicalStep:
    """The mean optimizer step: its `micro_batches` and its `tokens`; with padding, its tokens (`slots`) and positions with a
    label (`supervised`).

    `context` is the mean over the tokens of how long their sequence is, which attention's time goes with. `shapes` says how
    often each shape of a widened micro-batch came in the steps that were looked at, the most frequent first (none without
    widening). `spread` says how the micro-batches differ in size: the mean of each QUANTILES-th of them, the smallest first, as
    a share of the mean of all.
    """

    micro_batches: float
    tokens: float
    slots: float
    supervised: float
    context: float
    shapes: tuple[int, ...] = ()
    spread: tuple[float, ...] = (1.0,)


def typical_step(
    lengths: Sequence[int],
    supervised: Sequence[int],
    training: TrainingConfig,
    packing: bool,
    widen: Widen | None = None,
) -> TypicalStep:
    """The mean step of training on examples of `lengths` tokens, of which `supervised` are.

    The share of padding is that of a sample of steps; by examples, the tokens are those of all, which a sample misses by 4%.
    """
    way = Division(
        training.batch_size, training.micro_batch, training.micro_batch_tokens, training.batch_tokens, packing
    )
    return _typical(tuple(lengths), tuple(supervised), way, widen)


class Division(NamedTuple):
    """What `split` looks at of `training`, and whether rows are packed."""

    batch_size: int
    micro_batch: int
    micro_batch_tokens: int | None
    batch_tokens: int | None
    packing: bool


@lru_cache(maxsize=512)
def _typical(
    lengths: tuple[int, ...], supervised: tuple[int, ...], training: Division, widen: Widen | None
) -> TypicalStep:
    """`typical_step`, once for all methods and cards that are planned for the same data."""
    packing = training.packing
    heads, tokens, pairs = 0, 0, 0
    sizes: list[int] = []  # of the micro-batches, with padding
    shapes: Counter[MicroBatchShape] = Counter()
    steps = _sample(lengths, supervised, training)
    for part in (part for step in steps for part in step):
        rows = [lengths[index] for index in part]
        targets = sum(supervised[index] for index in part)
        tokens += sum(rows)
        if widen is None:
            sequences = rows if packing else [max(rows)] * len(rows)
        else:
            shape = MicroBatchShape.widened(rows, targets, packing, widen)
            shapes[shape] += 1
            sequences = documents_of(rows, shape.length)[0] if packing else [shape.length] * shape.rows
        sizes.append(sum(sequences))
        pairs += sum(length * length for length in sequences)
        heads += targets if widen is None else shape.supervised
    come_again = tuple(count for _, count in shapes.most_common())
    parts, slots, spread = len(sizes), sum(sizes), _spread(sizes)
    if training.batch_tokens is not None:
        assert training.micro_batch_tokens is not None  # contradictions.py
        packs = training.batch_tokens // training.micro_batch_tokens
        each = packs / parts
        return TypicalStep(packs, tokens * each, slots * each, heads * each, pairs / slots, come_again, spread)
    mean = min(training.batch_size, len(lengths)) * sum(lengths) / len(lengths)
    scale = mean / tokens
    number = parts * scale if training.micro_batch_tokens is not None else parts / len(steps)
    return TypicalStep(number, mean, slots * scale, heads * scale, pairs / slots, come_again, spread)


def _spread(sizes: Sequence[int]) -> tuple[float, ...]:
    mean, groups = sum(sizes) / len(sizes), min(QUANTILES, len(sizes))
    if min(sizes) == max(sizes):
        return (1.0,)
    bounds = [round(group * len(sizes) / groups) for group in range(groups + 1)]
    ordered = sorted(sizes)
    return tuple(sum(ordered[first:end]) / (end - first) / mean for first, end in pairwise(bounds))


@lru_cache(maxsize=64)
def _sample(lengths: tuple[int, ...], supervised: tuple[int, ...], training: Division) -> list[list[list[int]]]:
    """Steps as micro-batches of indices; of a step that is measured in tokens all packs of a sample, as one."""
    rng = random.Random(0)
    if training.batch_tokens is not None:
        assert training.micro_batch_tokens is not None
        mean = sum(lengths) / len(lengths)
        number = min(len(lengths), math.ceil(SAMPLED * training.micro_batch_tokens / mean))
        drawn = rng.sample(range(len(lengths)), number)
        packs = best_fit([lengths[index] for index in drawn], training.micro_batch_tokens)
        return [[[drawn[position] for position in pack] for pack in packs]]
    batch = min(training.batch_size, len(lengths))

    def step(examples: Sequence[int]) -> list[list[int]]:
        divided = split([lengths[index] for index in examples], training, training.packing)
        return [[examples[position] for position in part] for part in divided]

    first = step(rng.sample(range(len(lengths)), batch))
    if min(lengths) == max(lengths) and min(supervised) == max(supervised):
        return [first]
    number = min(SAMPLED // len(first), SAMPLED_EXAMPLES // batch)
    return [first, *(step(rng.sample(range(len(lengths)), batch)) for _ in range(1, max(FEWEST_STEPS, number)))]
