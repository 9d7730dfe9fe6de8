"""RMS norm: forward, backward, residual, recomputed output and weight gradient."""

from __future__ import annotations

import pytest
import torch

from kernels.numerics import assert_close_to_fp64, poisoned
from tunesmith.kernels.rms_norm import (
    MAX_FEATURES,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_ref,
    rms_norm_ref,
)

EPS = 1e-5
# One row a program and several, whole and partial blocks of rows and columns; 200 x 60 and 5 x 1030 have more blocks
# than the weight gradient has programs.
SIZES = [(1, 60), (63, 96), (200, 60), (5, 576), (3, 1000), (2, 1024), (5, 1030), (1, 4100)]


def strided(*shape: int, dtype: torch.dtype, device: torch.device, margin: int = 8) -> torch.Tensor:
    """Normal values with a row stride above the row length."""
    wide = torch.randn(shape[0], shape[1] + margin, dtype=torch.float64, device=device).to(dtype)
    return wide[:, : shape[1]]


def inputs(T: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """dy, x, residual (strided) and weight; rows of x have different scales."""
    torch.manual_seed(T * 31 + D)
    dy, x, residual = (strided(T, D, dtype=dtype, device=device, margin=8 * n) for n in (1, 2, 3))
    x *= torch.linspace(0.05, 4, T, device=device)[:, None].to(dtype)
    weight = torch.randn(D, device=device).to(dtype)
    return dy, x, residual, weight


def test_reference_backward_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(7, 30, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(30, dtype=torch.float64)
    for leaf in (x, weight):
        leaf.requires_grad_()
    y, rstd = rms_norm_ref(x, weight, EPS, 1.0)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    ours_dx, ours_y, ours_dweight = rms_norm_backward_ref(dy, x.detach(), rstd.detach(), weight.detach(), 1.0, residual)
    torch.testing.assert_close(ours_dx, dx + residual, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours_y, y.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(ours_dweight, dweight, rtol=0, atol=1e-10)


def test_fp64_passes_through_the_public_functions() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    weight = torch.randn(10, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    y, rstd = rms_norm(x, weight, EPS)
    assert rstd.dtype == torch.float64
    expected = torch.nn.functional.rms_norm(x, (10,), weight, EPS)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    dx, dweight = rms_norm_backward(dy, x.detach(), rstd.detach(), weight.detach(), weight_grad=True)
    for ours, theirs in zip((dx, dweight), torch.autograd.grad(expected, (x, weight), dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("T", "D"), SIZES)
def test_forward(T: int, D: int, offset: float, dtype: torch.dtype, device: torch.device) -> None:
    _, x, _, weight = inputs(T, D, dtype, device)
    y, rstd = rms_norm(x, weight, EPS, offset)
    plain, plain_rstd = rms_norm_ref(x, weight, EPS, offset)
    exact, exact_rstd = rms_norm_ref(x.double(), weight.double(), EPS, offset)
    assert y.is_contiguous()
    assert rstd.dtype == torch.float32
    assert_close_to_fp64("y", y, plain, exact)
    assert_close_to_fp64("rstd", rstd, plain_rstd, exact_rstd)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("T", "D"), SIZES)
def test_backward(T: int, D: int, with_residual: bool, dtype: torch.dtype, device: torch.device) -> None:
    dy, x, residual, weight = inputs(T, D, dtype, device)
    y, rstd = rms_norm(x, weight, EPS, 1.0)
    added = residual if with_residual else None
    out, normed = (poisoned(T, D + n, dtype=dtype, device=device) for n in (16, 24))
    dx, dweight = rms_norm_backward(
        dy, x, rstd, weight, 1.0, residual_TD=added, out=out[:, :D], normed_out=normed[:, 8 : D + 8], weight_grad=True
    )
    plain_dx, _, plain_dweight = rms_norm_backward_ref(dy, x, rstd, weight, 1.0, added)
    exact_dx, _, exact_dweight = rms_norm_backward_ref(
        dy.double(),
        x.double(),
        rms_norm_ref(x.double(), weight.double(), EPS)[1],
        weight.double(),
        1.0,
        None if added is None else added.double(),
    )
    assert dx.data_ptr() == out.data_ptr()
    assert dweight is not None
    assert dweight.dtype == torch.float32
    assert_close_to_fp64("dx", dx, plain_dx, exact_dx)
    assert_close_to_fp64("dweight", dweight, plain_dweight, exact_dweight)
    torch.testing.assert_close(normed[:, 8 : D + 8], y, rtol=0, atol=0)  # the forward's bits
    # Nothing outside the views was written.
    assert out[:, D:].isnan().all()
    assert normed[:, :8].isnan().all()
    assert normed[:, D + 8 :].isnan().all()


@pytest.mark.parametrize(("T", "D"), [(5, 60), (3, 1030)])
@pytest.mark.parametrize("alias", ["dy", "x", "residual"])
def test_out_may_be_an_input(T: int, D: int, alias: str, dtype: torch.dtype, device: torch.device) -> None:
    dy, x, residual, weight = inputs(T, D, dtype, device)
    _, rstd = rms_norm(x, weight, EPS)
    expected, no_dweight = rms_norm_backward(dy, x, rstd, weight, residual_TD=residual)
    assert no_dweight is None
    target = {"dy": dy, "x": x, "residual": residual}[alias]
    dx, _ = rms_norm_backward(dy, x, rstd, weight, residual_TD=residual, out=target)
    assert dx.data_ptr() == target.data_ptr()
    torch.testing.assert_close(target, expected)  # sums may be ordered by the alignment of `out`


def test_weight_gradient_has_the_same_bits_every_time(device: torch.device) -> None:
    dy, x, _, weight = inputs(63, 60, torch.float32, device)
    _, rstd = rms_norm(x, weight, EPS)
    first, again = (rms_norm_backward(dy, x, rstd, weight, weight_grad=True)[1] for _ in range(2))
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)


def test_the_weight_may_have_another_dtype(device: torch.device) -> None:
    _, x, _, weight = inputs(3, 60, torch.float16, device)
    expected, _ = rms_norm(x, weight, EPS)
    y, _ = rms_norm(x, weight.float(), EPS)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, expected)


def test_a_row_that_is_too_long_is_refused(device: torch.device) -> None:
    x = torch.zeros(1, MAX_FEATURES + 1, device=device)
    with pytest.raises(ValueError, match=r"a row of 16385 features: rms_norm takes at most 16384"):
        rms_norm(x, x[0], EPS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="4 GiB tensors")
def test_past_2_to_the_31_elements(device: torch.device) -> None:
    T, D = 2**31 // 4096 + 3, 4096
    x = torch.ones(T, D, dtype=torch.bfloat16, device=device)
    x[-1] = torch.randn(D, device=device)
    weight = torch.ones(D, dtype=torch.bfloat16, device=device)
    y, rstd = rms_norm(x, weight, EPS)
    torch.testing.assert_close(y[-1:], rms_norm(x[-1:], weight, EPS)[0])
    expected, _ = rms_norm_backward(y[-1:], x[-1:], rstd[-1:], weight)
    rms_norm_backward(y, x, rstd, weight, out=y)
    torch.testing.assert_close(y[-1:], expected)
