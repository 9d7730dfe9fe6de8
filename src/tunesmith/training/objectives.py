"""What is minimised. An objective turns a micro-batch into terms; the loop sums and normalises them.

An objective knows, from the examples alone, how many units each of its terms will count in a whole step, so that the
loop divides by the step's count before the first backward. Accumulation, packing and ranks then give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tunesmith.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probabilities
from tunesmith.memory.policy import LOSS_ROWS
from tunesmith.models.forward import ModelForward
from tunesmith.types import IGNORE_INDEX, Batch, Term, TokenizedExample

Parts = Sequence[Sequence[TokenizedExample]]
"""The examples of each micro-batch of a step."""

Metrics = dict[str, tuple[torch.Tensor | float, int]]
"""What a step measured beside its loss: (sum on the device, count) by name."""


@dataclass(frozen=True, slots=True)
class StepTools:
    """What a look at a whole step needs before its first backward: `passes(parts, work)` gives what `work` makes of the batch of
    each part, without gradients and dropout; `total` sums a tensor over all ranks.
    """

    passes: Callable[[Parts, Callable[[Batch], torch.Tensor]], Iterator[torch.Tensor]]
    total: Callable[[torch.Tensor], torch.Tensor]


def means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """The mean of each metric, of those that something was counted for. Where chosen and rejected answers are other rows (KTO),
    their margin is that of their means.
    """
    found = {name: total / count for name, (total, count) in sums.items() if count}
    if "rewards/margins" not in found and {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


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

    `linear_cross_entropy` computes its gradient in the forward: it can be differentiated once.
    """

    def of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    return torch.stack(_through_head(forward, rows_ND, labels_N, linear_cross_entropy, of_logits)).sum()


def log_probabilities(forward: ModelForward, rows_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """log p(label) of each row, (N,) in fp32; 0 where the label is IGNORE_INDEX."""

    def of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")

    return torch.cat(_through_head(forward, rows_ND, labels_N, linear_log_probabilities, of_logits))


def _through_head(
    forward: ModelForward,
    rows_ND: torch.Tensor,
    labels_N: torch.Tensor,
    of_matrix: Callable[..., torch.Tensor],
    of_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """What the head makes of rows and labels, in one part or several.

    A head that is a plain matrix (`ModelForward.head_matrix`) goes through `of_matrix`, a function of
    kernels/linear_cross_entropy.py. Any other head (quantized, with an adapter) is a module to be called: more than LOSS_ROWS
    rows are done in chunks under activation checkpointing, so that at most LOSS_ROWS x vocabulary logits exist at a time, for
    one more product with the head in the backward.
    """
    if (matrix := forward.head_matrix()) is not None:
        weight_VD, bias_V = matrix
        found = of_matrix(
            rows_ND,
            weight_VD,
            labels_N,
            bias_V=bias_V,
            scale=forward.scale,
            softcap=forward.softcap,
            ignore_index=IGNORE_INDEX,
            chunk_rows=forward.loss_rows,
        )
        return [found]

    def chunk(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return of_logits(forward.logits(rows), labels)

    if len(rows_ND) <= LOSS_ROWS:
        return [chunk(rows_ND, labels_N)]
    return [
        checkpoint(chunk, rows, labels, use_reentrant=False)
        for rows, labels in zip(rows_ND.split(LOSS_ROWS), labels_N.split(LOSS_ROWS), strict=True)
    ]
