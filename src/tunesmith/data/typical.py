"""What the steps of a run are like, before it: how much of them is padding, and which shapes come again.

A sample of steps is divided as training divides them. Imports no PyTorch.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.config import TrainingConfig
from tunesmith.data.batches import split
from tunesmith.data.packing import best_fit
from tunesmith.data.widening import MicroBatchShape, Widen, documents_of

SAMPLED_STEPS = 32
"""Steps that `typical_step` looks at."""

SAMPLED_PACKS = 256
"""Packs that it looks at, where a step is measured in tokens: that many budgets' worth of examples."""


@dataclass(frozen=True, slots=True)
class TypicalStep:
    """The mean optimizer step: its `micro_batches`, its tokens (`slots`) and positions with a label (`supervised`), both with
    padding; `context` is the mean over the tokens of how long their sequence is, which attention's time goes with; `shapes` says how often each shape of a widened micro-batch came in the steps that were looked at, the most frequent first
    (none without widening).
    """

    micro_batches: float
    slots: float
    supervised: float
    context: float
    shapes: tuple[int, ...] = ()


def typical_step(
    lengths: Sequence[int],
    supervised: Sequence[int],
    training: TrainingConfig,
    packing: bool,
    widen: Widen | None = None,
) -> TypicalStep:
    """The mean step of training on examples of `lengths` tokens, of which `supervised` are.

    The share of padding is that of a sample of steps; the tokens are those of all examples, which a sample misses by 4%.
    """
    parts, slots, heads, tokens, pairs = 0, 0, 0, 0, 0
    shapes: Counter[MicroBatchShape] = Counter()
    for part in _sampled_parts(lengths, supervised, training, packing):
        rows = [lengths[index] for index in part]
        targets = sum(supervised[index] for index in part)
        tokens += sum(rows)
        parts += 1
        if widen is None:
            sequences = rows if packing else [max(rows)] * len(rows)
        else:
            shape = MicroBatchShape.widened(rows, targets, packing, widen)
            shapes[shape] += 1
            sequences = documents_of(rows, shape.length)[0] if packing else [shape.length] * shape.rows
        slots += sum(sequences)
        pairs += sum(length * length for length in sequences)
        heads += targets if widen is None else shape.supervised
    mean = training.batch_tokens or min(training.batch_size, len(lengths)) * sum(lengths) / len(lengths)
    scale = mean / tokens
    number = parts * scale if training.micro_batch_tokens is not None else parts / _sampled_steps(lengths, supervised)
    come_again = tuple(count for _, count in shapes.most_common())
    return TypicalStep(number, slots * scale, heads * scale, pairs / slots, come_again)


def _sampled_steps(lengths: Sequence[int], supervised: Sequence[int]) -> int:
    """Steps of a sample, where a step is measured in examples: one, if they are all alike."""
    return 1 if len(set(lengths)) == len(set(supervised)) == 1 else SAMPLED_STEPS


def _sampled_parts(
    lengths: Sequence[int], supervised: Sequence[int], training: TrainingConfig, packing: bool
) -> Iterator[list[int]]:
    """The micro-batches of a sample of steps, as indices."""
    batch = min(training.batch_size, len(lengths))
    if _sampled_steps(lengths, supervised) == 1 and training.batch_tokens is None:  # whichever: they are alike
        yield from split(lengths[:batch], training, packing)
        return
    rng = random.Random(0)
    if training.batch_tokens is not None:
        assert training.micro_batch_tokens is not None  # contradictions.py
        mean = sum(lengths) / len(lengths)
        number = min(len(lengths), math.ceil(SAMPLED_PACKS * training.micro_batch_tokens / mean))
        drawn = rng.sample(range(len(lengths)), number)
        for pack in best_fit([lengths[index] for index in drawn], training.micro_batch_tokens):
            yield [drawn[position] for position in pack]
        return
    for _ in range(_sampled_steps(lengths, supervised)):
        drawn = rng.sample(range(len(lengths)), batch)
        for part in split([lengths[index] for index in drawn], training, packing):
            yield [drawn[position] for position in part]
