"""How a written model's probabilities agree with its source's, on rows that it was not made with.

Both read the same rows, in their compute type. The source's logits are kept on the host in that type (tokens x vocabulary x 2 bytes: 0.4 GB for 4,096
tokens of a vocabulary of 49,152), so that only one model is in memory at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.types import Progress, no_progress

SPEED_TOKENS, SPEED_PROMPT = 32, 128
"""Tokens generated to measure the speed, and at most read before them."""

ROWS_AT_ONCE = 256
"""Positions whose probabilities exist at once, in fp32: 150 MB for a vocabulary of 150,000."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Rows of token ids (two or more each), the source's logits after each token, (T, vocabulary) on the CPU, and its perplexity on them."""

    rows: Sequence[Sequence[int]]
    logits: list[torch.Tensor]
    perplexity: float

    @property
    def tokens(self) -> int:
        """Positions that are compared: every token of every row."""
        return sum(map(len, self.rows))


@dataclass(frozen=True, slots=True)
class Agreement:
    """`kl` is the mean KL(source ‖ written) in nats a token, `top1` the share of positions with the same likeliest next token, `perplexity`
    exp of the written model's mean loss, in nats, over all tokens of the rows but the first of each.
    """

    kl: float
    top1: float
    perplexity: float
    tokens: int


def reference(model: Any, rows: Sequence[Sequence[int]], progress: Progress = no_progress) -> Reference:
    """What `model` says after each token of `rows`."""
    kept, loss = [], 0.0
    for number, row in enumerate(rows):
        progress("the source's probabilities", number, len(rows))
        logits = _logits(model, row)
        loss += _loss(logits, row)
        kept.append(logits.cpu())
    progress("the source's probabilities", len(rows), len(rows))
    return Reference(rows, kept, _perplexity(loss, rows))


def compare(model: Any, expected: Reference, progress: Progress = no_progress) -> Agreement:
    """How `model` agrees with the reference."""
    kl = same = loss = 0.0
    for number, (row, kept) in enumerate(zip(expected.rows, expected.logits, strict=True)):
        progress("comparing", number, len(expected.rows))
        logits = _logits(model, row)
        loss += _loss(logits, row)
        for here, there in zip(logits.split(ROWS_AT_ONCE), kept.split(ROWS_AT_ONCE), strict=True):
            log_p, log_q = there.to(here.device).float().log_softmax(-1), here.float().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    progress("comparing", len(expected.rows), len(expected.rows))
    tokens = expected.tokens
    return Agreement(kl / tokens, same / tokens, _perplexity(loss, expected.rows), tokens)


def tokens_per_second(model: Any, prompt: Sequence[int]) -> float:
    """Of greedy generation behind the beginning of `prompt`, one answer at a time, where the model is."""
    ids = torch.tensor([list(prompt[:SPEED_PROMPT])], device=model.device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(ids, max_new_tokens=1, **options)  # whatever is made at the first call
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=SPEED_TOKENS, min_new_tokens=SPEED_TOKENS, **options)
    return SPEED_TOKENS / (time.perf_counter() - started)


def _logits(model: Any, row: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False).logits[
            0
        ]
    return logits


def _loss(logits: torch.Tensor, row: Sequence[int]) -> float:
    targets = torch.tensor(list(row[1:]), device=logits.device)
    parts = zip(logits[:-1].split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    return sum(float(torch.nn.functional.cross_entropy(one.float(), aimed, reduction="sum")) for one, aimed in parts)


def _perplexity(loss: float, rows: Sequence[Sequence[int]]) -> float:
    mean = loss / sum(len(row) - 1 for row in rows)
    return math.exp(mean) if mean < 709 else math.inf
