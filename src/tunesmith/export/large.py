"""Embeddings and heads without a whole copy of their matrix in fp32: 128,256 x 4,096 values would take 2 GB.

Of embeddings the rows that are asked for are taken, of a head's matrix some rows at a time are widened: y = concat_i(x · W_iᵀ) + b. Both compute
what the whole matrix does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LARGE = 2**25
"""Values of a matrix from which on it is worth it: 128 MB in fp32."""

ROWS_AT_ONCE = 2**24
"""Values that are widened at once: 64 MB in fp32."""


def in_rows(
    x_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`F.linear(x, weight, bias)` with the weight in `dtype`, some rows at a time, on the device of `x`."""
    rows = max(1, ROWS_AT_ONCE // weight_VD.shape[1])
    parts = [torch.nn.functional.linear(x_TD, part.to(x_TD.device, dtype)) for part in weight_VD.split(rows)]
    found = torch.cat(parts, -1)
    return found if bias_V is None else found + bias_V.to(x_TD.device, dtype)


def is_large_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a plain linear layer of a large matrix."""
    return type(module) is torch.nn.Linear and module.weight.numel() >= LARGE


def is_large_embedding(module: torch.nn.Module) -> bool:
    """Whether a module is embeddings of a large matrix (or a kind of them that only scales what it looks up)."""
    return isinstance(module, torch.nn.Embedding) and module.weight.numel() >= LARGE


class LookUp:
    """A forward pre-hook and a hook for embeddings: they hold only the rows that are asked for while they compute.

    `stored` gives the matrix as it is stored. Nothing else of the module is changed.
    """

    def __init__(self, module: Any, stored: Callable[[], torch.Tensor], device: torch.device, dtype: torch.dtype):
        self.module, self.stored, self.device, self.dtype = module, stored, device, dtype
        self.empty, self.padding = module.weight.data, module.padding_idx

    def before(self, _: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Take the rows; the ids become their places among them."""
        ids, *others = arguments
        asked, places = ids.unique(return_inverse=True)
        matrix = self.stored()
        self.module.weight.data = matrix[asked.to(matrix.device)].to(self.device, self.dtype)
        self.module.padding_idx = None  # a row's number in the whole matrix; it matters for gradients only
        return (places, *others)

    def after(self, *_: Any) -> None:
        """Let go of the rows."""
        self.module.weight.data, self.module.padding_idx = self.empty, self.padding
