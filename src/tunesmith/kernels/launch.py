"""Where a kernel runs: Triton on a GPU (or, in tests, in Triton's interpreter), its reference everywhere else."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

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


@contextmanager
def interpreted() -> Iterator[None]:
    """Run Triton kernels on CPU tensors, in the interpreter (set TRITON_INTERPRET=1 before Triton is imported)."""
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before
