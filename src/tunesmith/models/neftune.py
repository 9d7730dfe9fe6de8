"""NEFTune: noise on the input embeddings in training (Jain et al. 2023, arXiv:2310.05914).

    e_tk + α / √(L_t · D) · u_tk,    u uniform on [-1, 1)

L_t is the length of token t's own document, packed or padded, where the paper's code has that of the padded batch. u is a
function of the step's seed, the token's row number and the feature, as dropout's masks are (row_dropout.py): dividing a step
in another way, packing it or repeating it gives the same noise.
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.kernels.noise import add_uniform
from tunesmith.models.row_dropout import OTHER_STREAMS

STREAM = OTHER_STREAMS - 1
"""Of no projection: the last one before those of adapters in unknown places."""


def add_noise(
    embeddings_BTD: torch.Tensor, alpha: float, lengths: torch.Tensor, seed: int, rows: torch.Tensor
) -> torch.Tensor:
    """The embeddings with their noise, as (B, T, D). `lengths` (B T,) are each slot's document's, 0 for padding; `rows` (B T,)
    number the slots.
    """
    hidden = embeddings_BTD.shape[-1]
    scales_T = torch.where(lengths > 0, alpha * (lengths.clamp(min=1) * hidden).float().rsqrt(), 0.0)
    out: torch.Tensor = _NoiseFunction.apply(embeddings_BTD, scales_T, seed, rows)
    return out


class _NoiseFunction(torch.autograd.Function):
    """y = x + noise; dx = dy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales_T: torch.Tensor, seed: int, rows: torch.Tensor) -> torch.Tensor:
        """y as x, (..., D)."""
        return add_uniform(x.detach().reshape(-1, x.shape[-1]).contiguous(), scales_T, seed, STREAM, rows).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x."""
        return grad, None, None, None
