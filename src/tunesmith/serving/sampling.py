"""The next token of each row: the likeliest, or drawn, with a generator of the request's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are drawn. Temperature 0 takes the likeliest token."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()
"""The likeliest token, always."""

COLDEST = 1e-4
"""Temperatures below it take the likeliest token too: far smaller ones are 0 in fp32, and 0 / 0 is no number."""


def choose(logits_BV: torch.Tensor, settings: Sequence[Sampling], draws: Sequence[random.Random]) -> list[int | None]:
    """A token for each row of logits (B, V); None for a row whose largest logit is NaN or infinite.

    A drawn one is the inverse of the cumulative distribution of softmax(logits / temperature) at a uniform number, over the fewest
    likeliest tokens whose probabilities reach `top_p` (nucleus sampling, arXiv 1904.09751). The number comes from the row's own
    generator: what a seed draws does not depend on the other rows.
    """
    tokens = logits_BV.argmax(-1)
    finite = torch.isfinite(logits_BV.amax(-1)).tolist()  # single -inf are tokens that a model rules out
    drawn = [row for row, setting in enumerate(settings) if finite[row] and setting.temperature >= COLDEST]
    if drawn:
        device = logits_BV.device

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device, dtype=torch.float32)[:, None]

        heat = column([settings[row].temperature for row in drawn])
        top_p = column([settings[row].top_p for row in drawn])
        uniform = column([draws[row].random() for row in drawn])
        places = torch.tensor(drawn, device=device)
        scaled = logits_BV[places].float() - logits_BV[places].amax(
            -1, keepdim=True
        )  # else a small temperature overflows
        likely, order = torch.softmax(scaled / heat, dim=-1).sort(dim=-1, descending=True)
        before = likely.cumsum(-1) - likely
        nucleus = likely.masked_fill((before >= top_p) & (before > 0), 0.0)
        reached = nucleus.cumsum(-1)
        place = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
        last = (nucleus > 0).sum(-1, keepdim=True) - 1  # rounding may reach past the nucleus
        tokens[places] = order.gather(-1, torch.minimum(place, last))[:, 0]
    return [int(token) if good else None for token, good in zip(tokens.tolist(), finite, strict=True)]
