"""Kernel tests run on the GPU where there is one, and otherwise in Triton's interpreter on the CPU (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tunesmith.kernels import launch


@pytest.fixture
def device() -> torch.device:
    """Where kernel tests put their tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _run_kernels() -> Iterator[None]:
    """Kernels run, not their references; tests call `X_ref` for those."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with launch.interpreted():
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `dtype` runs in fp32 and fp16, and in bf16 on the GPU (the interpreter cannot)."""
    if "dtype" in metafunc.fixturenames:
        types = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
        metafunc.parametrize("dtype", types, ids=[str(t).removeprefix("torch.") for t in types])
