"""From tokenized examples to micro-batches: data order, splitting a step, packing, padding.

Which examples a step takes, and in which micro-batches, is a pure function of (seed, epoch, step), so a run's position in
its data is its step number. It does not know of ranks: every rank computes the whole step and takes its share of the
micro-batches, so that a step is the same at any world size.
"""

from __future__ import annotations

import heapq
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from tunesmith.config import TrainingConfig
from tunesmith.data.packing import best_fit
from tunesmith.data.widening import DOCUMENT_STEP, Widen, documents_of, room_for, round_up
from tunesmith.types import IGNORE_INDEX, Batch, BatchSequences, TokenizedExample, TokenizedPair

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tunesmith.kernels.attention import SequenceLayout

Part = TypeVar("Part")
"""The examples of one micro-batch, or their indices."""


class StepOrder:
    """Which examples each optimizer step takes, as micro-batches of indices into `lengths`.

    By examples: every epoch is a fresh permutation, `training.batch_size` examples a step, which `split` divides. By
    tokens (`training.batch_tokens`): every epoch is packed afresh into bins of `micro_batch_tokens`, the bins are
    shuffled, and each step takes batch_tokens / micro_batch_tokens of them. The number of bins is the same in every epoch.

    The last step of an epoch takes what is left; no example is dropped or seen twice in an epoch. Raises ValueError for
    an example that is longer than `micro_batch_tokens`.
    """

    def __init__(self, lengths: Sequence[int], training: TrainingConfig, packing: bool):
        self.lengths = list(lengths)
        self.training = training
        self.packing = packing
        self._cached = (0, self._steps(0))
        self.steps_per_epoch = len(self._cached[1])

    def step(self, step: int) -> list[list[int]]:
        """The micro-batches of optimizer step `step`, from 0, of all ranks together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._steps(epoch))
        parts = self._cached[1][position]
        if self.training.batch_tokens is not None:
            return parts
        (examples,) = parts
        divided = split([self.lengths[index] for index in examples], self.training, self.packing)
        return [[examples[position] for position in part] for part in divided]

    def _steps(self, epoch: int) -> list[list[list[int]]]:
        """The steps of an epoch: their packs, or all examples of each as one part."""
        training, rng = self.training, random.Random(f"{self.training.seed}/{epoch}")
        if training.batch_tokens is not None:
            assert training.micro_batch_tokens is not None  # contradictions.py
            packs = best_fit(self.lengths, training.micro_batch_tokens, rng)
            rng.shuffle(packs)
            size = training.batch_tokens // training.micro_batch_tokens
            return [packs[start : start + size] for start in range(0, len(packs), size)]
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        size = training.batch_size
        return [[order[start : start + size]] for start in range(0, len(order), size)]


def num_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: ⌈epochs · steps_per_epoch⌉, at most `max_steps`."""
    total = max(1, math.ceil(training.epochs * steps_per_epoch - 1e-9))  # 0.07 · 100 is 7.000000000000001
    return min(total, training.max_steps or total)


class MicroBatches(Protocol):
    """What `split` looks at: `training`'s size of a micro-batch, in examples or in tokens."""

    @property
    def micro_batch(self) -> int:
        """Examples."""

    @property
    def micro_batch_tokens(self) -> int | None:
        """Tokens, which come before examples."""


def split(lengths: Sequence[int], training: MicroBatches, packing: bool) -> list[list[int]]:
    """Split examples into micro-batches. Returns positions into `lengths`.

    With `training.micro_batch_tokens`: packed best-fit into micro-batches of at most that many tokens. Else at most
    `training.micro_batch_size` examples. Packed: longest first, each into the lightest micro-batch with room (Graham's LPT
    rule), so that the largest one, which sets the peak memory, is small. Padded: neighbours by length together, so that
    little is padding.
    """
    if training.micro_batch_tokens is not None:
        return best_fit(lengths, training.micro_batch_tokens)
    size = training.micro_batch
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if not packing:
        return [longest_first[start : start + size] for start in range(0, len(lengths), size)]
    bins: list[list[int]] = [[] for _ in range(-(-len(lengths) // size))]
    with_room = [(0, number) for number in range(len(bins))]  # a heap: the lightest first
    for index in longest_first:
        load, number = heapq.heappop(with_room)
        bins[number].append(index)
        if len(bins[number]) < size:
            heapq.heappush(with_room, (load + lengths[index], number))
    return bins


def deal(parts: Sequence[Part], rank: int, world_size: int) -> Sequence[Part]:
    """Rank `rank`'s share of a step's micro-batches: every `world_size`-th. All ranks together have each of them once.

    A rank has none when there are fewer micro-batches than ranks, as in the last step of an epoch.
    """
    return parts[rank::world_size]


def largest_micro_batch(
    lengths: Sequence[int], training: TrainingConfig, packing: bool, widen: Widen | None = None
) -> int:
    """Slots (tokens, with padding) of the largest micro-batch that training on `lengths` can give."""
    if training.micro_batch_tokens is not None:
        most = len(lengths) if training.batch_tokens is not None else training.batch_size
        rows, width = 1, min(training.micro_batch_tokens, sum(heapq.nlargest(most, lengths)))
    else:
        longest = heapq.nlargest(training.micro_batch, lengths)
        rows, width = (1, sum(longest)) if packing else (len(longest), longest[0])
    return rows * (widen(width) if widen else width)


def make_batch(
    examples: Sequence[TokenizedExample],
    packing: bool,
    pad_id: int,
    device: torch.device | str,
    widen: Widen | None = None,
    dropout_rows: bool = False,
) -> Batch:
    """One micro-batch on `device`: packed end to end, or padded on the right.

    With `widen` its sizes are rounded up, so that they come again: rows to `widen(length)` tokens, documents of
    a packed row to a multiple of DOCUMENT_STEP (by some of padding and empty ones), the longest document to a power of
    two, supervised positions to `room_for` them (by ones without a label). Nothing that counts sees what is added.

    With `dropout_rows` each token has the number of its row in dropout masks, `_mask_key` · 2^32 + position, which does
    not depend on the batch that it is in, and the length of its document. Padding has 0 for both. Of pairs every sequence is
    a row (packed: a document) of its own; the two of a pair have the same dropout masks, so that their prompts do.
    """
    import numpy as np
    import torch

    lengths = np.array([length for example in examples for length in example.lengths])
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.concatenate([example.input_ids for example in examples])
    is_target = np.concatenate([example.loss_mask for example in examples])
    is_target[bounds[:-1]] = False  # nothing predicts a document's first token, least of all the document before it
    targets = np.flatnonzero(is_target)
    positions = np.arange(len(ids)) - np.repeat(bounds[:-1], lengths)
    height, width = (1, len(ids)) if packing else (len(lengths), int(lengths.max()))
    if widen:
        width = widen(width)
    mask: np.ndarray | None = None
    if packing:
        slots = np.arange(len(ids))
        position_ids = np.concatenate((positions, np.arange(width - len(ids))))
    else:
        slots = np.repeat(np.arange(height) * width, lengths) + positions
        position_ids = np.tile(np.arange(width), height)
        mask = np.zeros(height * width, dtype=np.int64)
        mask[slots] = 1
    input_ids = np.full(height * width, pad_id, dtype=np.int64)
    input_ids[slots] = ids
    # Found here, on the CPU: finding them on the GPU would wait for it in every micro-batch.
    supervised = slots[targets] - 1
    labels = np.full(height * width, IGNORE_INDEX, dtype=np.int64)
    labels[supervised] = ids[targets]
    spare = room_for(len(supervised), height * width) - len(supervised) if widen else 0

    numbers: np.ndarray | None = None
    own_lengths: np.ndarray | None = None
    if dropout_rows:
        keys = np.array([_mask_key(example) for example in examples for _ in example.lengths], dtype=np.int64)
        numbers = np.zeros(height * width, dtype=np.int64)
        numbers[slots] = np.repeat(keys << 32, lengths) | positions
        own_lengths = np.zeros(height * width, dtype=np.int64)
        own_lengths[slots] = np.repeat(lengths, lengths)

    def on_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    return Batch(
        input_ids=on_device(input_ids).view(height, width),
        labels=on_device(labels).view(height, width),
        position_ids=on_device(position_ids).view(height, width),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        supervised=on_device(np.pad(supervised, (0, spare))),
        attention_mask=None if mask is None else on_device(mask).view(height, width),
        num_examples=len(examples),
        num_tokens=len(ids),
        num_supervised=len(supervised),
        supervised_labels=on_device(np.pad(ids[targets].astype(np.int64), (0, spare), constant_values=IGNORE_INDEX)),
        layout=_packed_layout(lengths.tolist(), width, device, bool(widen))
        if packing
        else _dense_layout(height, width),
        rows=tuple(example.where for example in examples),
        dropout_rows=None if numbers is None else on_device(numbers),
        document_lengths=None if own_lengths is None else on_device(own_lengths),
        compared=_sequences(examples, np.searchsorted(bounds, targets, side="right") - 1, spare, on_device),
    )


def _sequences(
    examples: Sequence[TokenizedExample],
    of_supervised: np.ndarray,
    spare: int,
    on_device: Callable[[np.ndarray], torch.Tensor],
) -> BatchSequences | None:
    """The sequences of a batch, given that of each supervised position; None for examples that nothing compares."""
    import numpy as np

    if not isinstance(examples[0], TokenizedPair) and examples[0].desirable is None:
        return None
    count = sum(len(example.lengths) for example in examples)
    supervised = np.bincount(of_supervised, minlength=count)
    reference = [value for example in examples for value in example.reference or ()]
    desirable = [example.desirable is not False for example in examples]
    return BatchSequences(
        on_device(np.pad(of_supervised.astype(np.int64), (0, spare))),
        on_device(supervised.astype(np.float32)),
        int(supervised[0::2].sum()),
        on_device(np.array(reference, dtype=np.float32)) if len(reference) == count else None,
        on_device(np.array(desirable, dtype=np.float32)),
    )


def _mask_key(example: TokenizedExample) -> int:
    """31 bits that stand for an example: of its line and token ids, so that rows of equal text have masks of their own.

    Not of its file's path: a run is the same wherever its data lie.
    """
    return zlib.crc32(example.input_ids.tobytes(), zlib.crc32(str(example.line).encode())) & 0x7FFFFFFF


def _dense_layout(rows: int, length: int) -> SequenceLayout:
    from tunesmith.kernels.attention import SequenceLayout

    return SequenceLayout.dense(rows, length)


def _packed_layout(lengths: list[int], width: int, device: torch.device | str, widen: bool) -> SequenceLayout:
    """The documents of a packed row of `width` tokens; the tokens behind the last one are documents of padding."""
    import numpy as np
    import torch

    from tunesmith.kernels.attention import SequenceLayout

    longest = max(lengths)
    if widen:
        lengths, longest = documents_of(lengths, width)
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    if not widen or len(set(lengths)) == 1:
        return SequenceLayout.packed(torch.from_numpy(bounds).to(device, non_blocking=True), lengths, width)
    bounds = np.pad(bounds, (0, round_up(len(lengths), DOCUMENT_STEP) - len(lengths)), constant_values=width)
    return SequenceLayout(
        1, width, tuple(lengths), longest, False, torch.from_numpy(bounds).to(device, non_blocking=True)
    )


def micro_batches(
    parts: Iterable[Sequence[TokenizedExample]],
    packing: bool,
    pad_id: int,
    device: torch.device | str,
    widen: Widen | None = None,
    dropout_rows: bool = False,
) -> Iterator[Batch]:
    """The batch of each part of a step, or of an evaluation, one after the other: one is on the device at a time."""
    for examples in parts:
        yield make_batch(examples, packing, pad_id, device, widen, dropout_rows)
