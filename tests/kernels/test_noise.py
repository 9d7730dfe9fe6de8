"""Uniform noise by row: Philox's words, the same in the kernel, of the right distribution, a function of the row's number."""

from __future__ import annotations

import re

import pytest
import torch

from kernels.numerics import assert_close_to_fp64
from tunesmith.kernels import noise
from tunesmith.kernels.dropout import philox_ref
from tunesmith.kernels.noise import add_uniform, add_uniform_ref, uniform_ref

# One element, odd, wider than a tile, taller than one, a multiple of 4 and not.
SHAPES = [(1, 1), (5, 37), (3, 2500), (70, 64), (2, 4)]
SEED = 0xFEDCBA9876543210
STREAM = 2**31 - 1


def inputs(shape: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    rows = torch.randint(2**62, shape[:1], device=device)
    return torch.randn(shape, device=device), torch.rand(shape[:1], device=device), rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (SEED, STREAM), (SEED, 2**32 - 1)])
def test_the_kernel_makes_the_reference_s_noise(
    shape: tuple[int, int], seed: int, stream: int, device: torch.device
) -> None:
    _, _, rows = inputs(shape, device)
    zeros, ones = torch.zeros(shape, device=device), torch.ones(shape[:1], device=device)
    found = add_uniform(zeros, ones, seed, stream, rows)
    assert torch.equal(found.cpu(), uniform_ref(shape[1], seed, stream, rows.cpu()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_is_added_in_fp32_and_rounded_once(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, scales, rows = inputs(shape, device)
    x = x.to(dtype)
    u = uniform_ref(shape[1], SEED, STREAM, rows)
    y = add_uniform(x, scales, SEED, STREAM, rows)
    assert y.dtype == dtype
    plain = x + (scales[:, None] * u).to(dtype)
    assert_close_to_fp64("y", y, plain, x.double() + scales[:, None].double() * u.double())


def test_noise_is_philoxs_upper_bits() -> None:
    rows = torch.tensor([7, 2**40 + 1])
    group, row = torch.meshgrid(torch.arange(3), rows, indexing="xy")
    words = torch.stack(philox_ref((group, row & 0xFFFFFFFF, row >> 32, torch.full_like(group, 5)), SEED), 2).flatten(1)
    expected = (words // 256).double() / 2**23 - 1
    assert torch.equal(uniform_ref(12, SEED, 5, rows).double(), expected)


def test_noise_is_uniform_and_rows_streams_and_seeds_are_independent() -> None:
    rows = torch.arange(2000)
    u = uniform_ref(200, SEED, 1, rows).double()
    assert float(u.min()) >= -1.0
    assert float(u.max()) < 1.0
    share = torch.histc(u, 20, -1, 1) / u.numel()
    assert (share - 1 / 20).abs().max() < 5 * (0.05 * 0.95 / u.numel()) ** 0.5
    assert abs(float(u.mean())) < 5 * (1 / 3 / u.numel()) ** 0.5
    for other in (
        uniform_ref(200, SEED, 2, rows),
        uniform_ref(200, SEED + 1, 1, rows),
        uniform_ref(200, SEED, 1, rows + 1),
    ):
        assert abs(float((u * other).mean())) < 5 / 3 / u.numel() ** 0.5


def test_the_reference_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scales, rows = inputs((70, 64), torch.device("cpu"))
    whole = add_uniform_ref(x, scales, SEED, STREAM, rows)
    monkeypatch.setattr(noise, "CHUNK", 1000)
    assert torch.equal(add_uniform_ref(x, scales, SEED, STREAM, rows), whole)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"x_TK": torch.zeros(4, 3).T},
            "noise is added to contiguous matrices of floating-point numbers; got (3, 4) of torch.float32",
        ),
        ({"seed": -1}, "seed -1 and stream 0 must be non-negative and less than 2^64 and 2^32"),
        ({"stream": 2**32}, "seed 0 and stream 4294967296 must be non-negative"),
        (
            {"scales_T": torch.zeros(2)},
            "scales_T is (2,) of torch.float32 on cpu: expected one for each row, (3,) of torch.float32",
        ),
        (
            {"rows": torch.zeros(3)},
            "rows is (3,) of torch.float32 on cpu: expected one for each row, (3,) of torch.int64",
        ),
    ],
)
def test_what_is_refused(change: dict[str, object], problem: str) -> None:
    given = {
        "x_TK": torch.zeros(3, 4), "scales_T": torch.zeros(3), "seed": 0, "stream": 0,
        "rows": torch.zeros(3, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(problem)):
        add_uniform(**given | change)  # type: ignore[arg-type]
