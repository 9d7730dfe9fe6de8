"""Where a kernel runs: Triton on a GPU (or, in tests, in Triton's interpreter), its reference everywhere else.

And what kernels have in common: the type that they compute in, and the low-rank terms that they take.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

MAX_SLOT = 64
"""Largest depth of a low-rank term (the columns of a slot): beyond it the product is not small, cuBLAS does it better."""

_interpreted = False


@cache
def has_triton() -> bool:
    """Whether Triton is installed. It comes with PyTorch's CUDA builds."""
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` run their Triton kernel: it is on a GPU, or `interpreted` is active."""
    return (tensor.is_cuda or _interpreted) and has_triton() and tensor.dtype != torch.float64


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether `tl.dot` may be used on `device`: compute capability 8.0 and newer (a T4 leaves matrix work to cuBLAS)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are computed and summed in: fp32, or fp64 if `dtype` is that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in its `wide_dtype`: how a reference begins."""
    return x.to(wide_dtype(x.dtype))


def check_low_rank(name: str, matrix: torch.Tensor | None, depth: int) -> None:
    """Raise ValueError where a kernel cannot add a low-rank term of this depth on the device of its factor `matrix`.

    `name` is what the caller calls `matrix`; None, for no term, is always right.
    """
    if matrix is None:
        return
    instead = f"add it with addmm and pass {name}=None"
    if depth > MAX_SLOT:
        raise ValueError(f"the low-rank term of {name} has depth {depth}, above {MAX_SLOT}: {instead}")
    if not has_tensor_cores(matrix.device):
        raise ValueError(f"{matrix.device} has no tensor cores for the low-rank term of {name}: {instead}")


@contextmanager
def interpreted() -> Iterator[None]:
    """Run Triton kernels on CPU tensors, in the interpreter (set TRITON_INTERPRET=1 before Triton is imported)."""
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before
