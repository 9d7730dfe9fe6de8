"""What is minimised. An objective turns a micro-batch into terms; the loop sums and normalises them.

An objective knows, from the examples alone, how many units each of its terms will count in a whole step, so that the
loop divides by the step's count before the first backward. Accumulation, packing and ranks then give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tunesmith.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probabilities
from tunesmith.memory.policy import LOSS_ROWS
from tunesmith.models.forward import ModelForward
from tunesmith.types import IGNORE_INDEX, Batch, Term, TokenizedExample


@dataclass(frozen=True, slots=True)
class StepTools:
    """What a look at a whole step needs before its first backward: how a part becomes a batch, and sums over all ranks."""

    batch: Callable[[Sequence[TokenizedExample]], Batch]
    total: Callable[[torch.Tensor], torch.Tensor]


Parts = Sequence[Sequence[TokenizedExample]]
"""The examples of each micro-batch of a step."""


class Objective(Protocol):
    """What the loop needs of an objective."""

    needs_reference: bool = False
    """Whether examples must know their log-probabilities before training (`TokenizedExample.reference`)."""
    by_tokens: bool = True
    """Whether a step's loss is a mean over supervised tokens; else over examples."""

    def counts(self, examples: Iterable[TokenizedExample]) -> dict[str, int]:
        """Units of each term over all examples of a step, e.g. supervised tokens."""

    def begin_step(self, forward: ModelForward, parts: Parts, tools: StepTools) -> Parts:
        """Look at a whole step before its first backward; returns what is trained on, micro-batch by micro-batch."""
        return parts

    def terms(self, forward: ModelForward, batch: Batch) -> list[Term]:
        """The terms of one micro-batch, each a sum (with its graph) over its own units."""


class SupervisedFineTuning(Objective):
    """Cross-entropy of the supervised tokens: -Σ log p(label | what came before), counted in supervised tokens."""

    def counts(self, examples: Iterable[TokenizedExample]) -> dict[str, int]:
        """Supervised tokens."""
        return {"nll": sum(example.supervised for example in examples)}

    def terms(self, forward: ModelForward, batch: Batch) -> list[Term]:
        """One term, `nll`. The head runs on the N supervised rows only, in chunks: not all logits exist at once."""
        rows_ND = rows_at(forward.hidden(batch), batch.supervised)
        return [Term("nll", cross_entropy_sum(forward, rows_ND, batch.supervised_labels), batch.num_supervised)]


def rows_at(hidden_BTD: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """The hidden states (N, D) at `positions_N` of the flattened batch."""
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, positions_N)


def cross_entropy_sum(forward: ModelForward, rows_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Σ cross-entropy of head(rows) against labels, a scalar in fp32.

    A head that is a plain matrix (`ModelForward.head_matrix`) goes through `linear_cross_entropy`, which computes its gradient
    in the forward: it can be differentiated once. Any other head (quantized, with an adapter) is a module to be called: more than LOSS_ROWS rows
    are done in chunks under activation checkpointing, so that at most LOSS_ROWS x vocabulary logits exist at a time, for
    one more product with the head in the backward.
    """
    matrix = forward.head_matrix()
    if matrix is not None:
        weight_VD, bias_V = matrix
        return linear_cross_entropy(
            rows_ND,
            weight_VD,
            labels_N,
            bias_V=bias_V,
            scale=forward.scale,
            softcap=forward.softcap,
            ignore_index=IGNORE_INDEX,
            chunk_rows=forward.loss_rows,
        )

    def chunk_sum(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(forward.logits(rows), labels, ignore_index=IGNORE_INDEX, reduction="sum")

    if len(rows_ND) <= LOSS_ROWS:
        return chunk_sum(rows_ND, labels_N)
    sums = [
        checkpoint(chunk_sum, rows, labels, use_reentrant=False)
        for rows, labels in zip(rows_ND.split(LOSS_ROWS), labels_N.split(LOSS_ROWS), strict=True)
    ]
    return torch.stack(sums).sum()


def log_probabilities(forward: ModelForward, rows_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """log p(label) of each row, (N,) in fp32; 0 where the label is IGNORE_INDEX. Memory as in `cross_entropy_sum`."""
    matrix = forward.head_matrix()
    if matrix is not None:
        weight_VD, bias_V = matrix
        return linear_log_probabilities(
            rows_ND,
            weight_VD,
            labels_N,
            bias_V=bias_V,
            scale=forward.scale,
            softcap=forward.softcap,
            ignore_index=IGNORE_INDEX,
            chunk_rows=forward.loss_rows,
        )

    def chunk(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(forward.logits(rows), labels, ignore_index=IGNORE_INDEX, reduction="none")

    if len(rows_ND) <= LOSS_ROWS:
        return chunk(rows_ND, labels_N)
    parts = [
        checkpoint(chunk, rows, labels, use_reentrant=False)
        for rows, labels in zip(rows_ND.split(LOSS_ROWS), labels_N.split(LOSS_ROWS), strict=True)
    ]
    return torch.cat(parts)
