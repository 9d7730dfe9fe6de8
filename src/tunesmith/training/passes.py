"""A pass over examples without gradients: evaluation, and what an objective wants to know before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from tunesmith.config import RunConfig
from tunesmith.data.batches import make_batch, split
from tunesmith.models.forward import ModelForward
from tunesmith.out_of_memory import Halving
from tunesmith.training.recovery import halve
from tunesmith.types import Batch, TokenizedExample

Result = TypeVar("Result")


def parts_of(examples: Sequence[TokenizedExample], config: RunConfig) -> list[list[TokenizedExample]]:
    """`examples` in micro-batches as training makes them."""
    positions = split([len(example) for example in examples], config.training, config.data.packed)
    return [[examples[position] for position in part] for part in positions]


def without_gradients(
    forward: ModelForward,
    parts: Sequence[Sequence[TokenizedExample]],
    config: RunConfig,
    pad_id: int,
    halving: Halving | None,
    work: Callable[[Batch], Result],
) -> Iterator[tuple[list[TokenizedExample], Result]]:
    """`work` on the batch of each part, in evaluation mode; parts that run out of memory are halved."""
    packing, limit = config.data.packed, config.data.max_seq_length

    def on_batch(part: list[TokenizedExample]) -> Result:
        batch = make_batch(part, packing, pad_id, forward.device)
        with torch.no_grad(), forward.autocast():
            return work(batch)

    def refusal(example: TokenizedExample, reason: str) -> str:
        return (
            f"evaluation ran out of memory with one example of {len(example):,} tokens ({example.where}): {reason}; leave "
            f"rows that long out of the evaluation data, or set data.max_seq_length (now {limit}) below that, with "
            "data.overlong: truncate"
        )

    was_training = forward.model.training
    forward.model.eval()
    try:
        yield from (halving or Halving()).run(
            [list(part) for part in parts],
            on_batch,
            "evaluating {} examples",
            refusal,
            lambda part: halve(part, packing),
        )
    finally:
        forward.model.train(was_training)
