"""From tokenized examples to micro-batches: data order, splitting a step, packing, padding.

The data order is a pure function of (seed, epoch), so a run's position in its data is its step number. A step's
examples are split into micro-batches as late as possible, so that a step can be repeated with smaller ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tunesmith.types import IGNORE_INDEX, Batch, TokenizedExample

if TYPE_CHECKING:
    import torch


class StepOrder:
    """Which examples each optimizer step takes: every epoch a fresh permutation, `batch_size` examples a step.

    The last step of an epoch takes what is left; no example is dropped or seen twice in an epoch.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-num_examples // batch_size)
        self._cached: tuple[int, list[int]] = (-1, [])

    def step(self, step: int) -> list[int]:
        """Indices of the examples of optimizer step `step`, from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            order = list(range(self.num_examples))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._cached = (epoch, order)
        start = position * self.batch_size
        return self._cached[1][start : start + self.batch_size]


def split(lengths: Sequence[int], micro_batch_size: int, packing: bool = True) -> list[list[int]]:
    """Split a step's examples into micro-batches of at most `micro_batch_size`. Returns positions into `lengths`.

    Packed: longest first, each into the lightest micro-batch with room (Graham's LPT rule), so that the largest one,
    which sets the peak memory, is small. Padded: neighbours by length together, so that little is padding.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if not packing:
        return [longest_first[start : start + micro_batch_size] for start in range(0, len(lengths), micro_batch_size)]
    bins: list[list[int]] = [[] for _ in range(-(-len(lengths) // micro_batch_size))]
    load = [0] * len(bins)
    for index in longest_first:
        lightest = min((b for b in range(len(bins)) if len(bins[b]) < micro_batch_size), key=lambda b: (load[b], b))
        bins[lightest].append(index)
        load[lightest] += lengths[index]
    return bins


def make_batch(examples: Sequence[TokenizedExample], packing: bool, pad_id: int, device: torch.device | str) -> Batch:
    """One micro-batch on `device`: packed end to end, or padded on the right."""
    import torch

    labels = [shifted_labels(example) for example in examples]
    lengths = [len(example) for example in examples]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    if packing:
        ids = [[token for example in examples for token in example.input_ids]]
        targets = [[label for row in labels for label in row]]
        positions = [[position for length in lengths for position in range(length)]]
        mask = None
    else:
        width = max(lengths)
        ids = [[*example.input_ids, *[pad_id] * (width - len(example))] for example in examples]
        targets = [row + [IGNORE_INDEX] * (width - len(row)) for row in labels]
        positions = [list(range(width)) for _ in examples]
        mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths]).to(device, non_blocking=True)
    # Found here, on the CPU: finding them on the GPU would wait for it in every micro-batch.
    supervised = [i for i, label in enumerate(label for row in targets for label in row) if label != IGNORE_INDEX]
    return Batch(
        input_ids=torch.tensor(ids).to(device, non_blocking=True),
        labels=torch.tensor(targets).to(device, non_blocking=True),
        position_ids=torch.tensor(positions).to(device, non_blocking=True),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        supervised=torch.tensor(supervised, dtype=torch.int64).to(device, non_blocking=True),
        attention_mask=mask,
        num_examples=len(examples),
        num_tokens=sum(lengths),
        num_supervised=sum(example.supervised for example in examples),
        lines=tuple(example.line for example in examples),
    )


def micro_batches(
    examples: Sequence[TokenizedExample], micro_batch_size: int, packing: bool, pad_id: int, device: torch.device | str
) -> Iterator[Batch]:
    """The micro-batches of one step, or of an evaluation, one after the other."""
    for positions in split([len(example) for example in examples], micro_batch_size, packing):
        yield make_batch([examples[position] for position in positions], packing, pad_id, device)


def shifted_labels(example: TokenizedExample) -> list[int]:
    """labels[t] is the token after t if it is supervised, else IGNORE_INDEX; the last position has none."""
    following = zip(example.input_ids[1:], example.loss_mask[1:], strict=True)
    return [token if supervised else IGNORE_INDEX for token, supervised in following] + [IGNORE_INDEX]
