"""The rule that kernels are held to: at most twice PyTorch's own error in the same dtype, plus one ulp."""

from __future__ import annotations

import torch


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of NaN: what a kernel does not write is found out."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def assert_close_to_fp64(name: str, ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Fail unless max |ours - exact| <= 2 max |plain - exact| + one ulp of the largest exact value.

    `plain` is PyTorch's result in the dtype of `ours`, `exact` the same computed in fp64 from the same inputs.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(ours).all(), f"{name}: {int((~torch.isfinite(ours)).sum())} values are not finite"
    ours64, plain64 = ours.double(), plain.double()
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    error = (ours64 - exact).abs().max().item()
    allowed = 2 * (plain64 - exact).abs().max().item() + ulp
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
