"""Residual sum with a low-rank term: every combination of operands, strided buffers, in place."""

from __future__ import annotations

import pytest
import torch

from kernels.numerics import assert_close_to_fp64, poisoned
from tunesmith.kernels.residual import add_low_rank, add_low_rank_ref


def inputs(
    T: int, N: int, S: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """base, y and s (slices of one buffer, s not at its end) and b."""
    torch.manual_seed(T + N + S)
    base = torch.randn(T, N + 8, device=device).to(dtype)[:, :N]
    buffer = torch.randn(T, N + S + 16, device=device).to(dtype)
    buffer[:, N + S :] = float("nan")  # not to be read
    b = (torch.randn(N, S + 8, device=device) / S).to(dtype)[:, :S]
    return base, buffer[:, :N], buffer[:, N : N + S], b


def double(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()


@pytest.mark.parametrize("operands", ["base and b", "base", "b"])
@pytest.mark.parametrize(("T", "N", "S"), [(1, 60, 16), (63, 200, 16), (33, 129, 32), (32, 128, 48), (5, 576, 64)])
def test_values(T: int, N: int, S: int, operands: str, dtype: torch.dtype, device: torch.device) -> None:
    base, y, s, b = inputs(T, N, S, dtype, device)
    given = (base if "base" in operands else None, y, s, b if "b" in operands.split() else None)
    out = poisoned(T, N + 16, dtype=dtype, device=device)
    result = add_low_rank(*given, out=out[:, 8 : N + 8])
    exact = add_low_rank_ref(*(double(x) for x in given))  # type: ignore[arg-type]
    assert_close_to_fp64("out", result, add_low_rank_ref(*given), exact)
    assert result.data_ptr() == out[:, 8:].data_ptr()
    assert out[:, :8].isnan().all()
    assert out[:, N + 8 :].isnan().all()
    fresh = add_low_rank(*given)
    assert fresh.is_contiguous()
    torch.testing.assert_close(fresh, result)


@pytest.mark.parametrize("alias", ["base", "y"])
def test_out_may_be_an_input(alias: str, dtype: torch.dtype, device: torch.device) -> None:
    base, y, s, b = inputs(63, 200, 16, dtype, device)
    expected, s_before = add_low_rank(base, y, s, b), s.clone()
    target = {"base": base, "y": y}[alias]
    add_low_rank(base, y, s, b, out=target)
    torch.testing.assert_close(target, expected)
    assert torch.equal(s, s_before)


def test_only_the_low_rank_term_in_place(dtype: torch.dtype, device: torch.device) -> None:
    _, y, s, b = inputs(33, 129, 16, dtype, device)
    exact = add_low_rank_ref(None, y.double(), s.double(), b.double())
    plain = add_low_rank_ref(None, y, s, b)
    add_low_rank(None, y, s, b, out=y)
    assert_close_to_fp64("y", y, plain, exact)


def test_the_reference_is_addmm_in_fp64() -> None:
    base, y, s, b = inputs(7, 30, 16, torch.float64, torch.device("cpu"))
    expected = torch.addmm(base + y, s, b.T)
    torch.testing.assert_close(add_low_rank(base, y, s, b), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(add_low_rank(base, y, s, b, out=y), expected, rtol=0, atol=1e-12)


def test_what_cannot_be_added_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    base, y, s, b = inputs(3, 60, 80, torch.float32, device)
    with pytest.raises(ValueError, match="neither base_TN nor b_NS: there is nothing to add"):
        add_low_rank(None, y, s, None)
    with pytest.raises(ValueError, match="got b_NS without s_TS"):
        add_low_rank(base, y, None, b)
    with pytest.raises(ValueError, match="of b_NS has depth 80, above 64: add it with addmm and pass b_NS=None"):
        add_low_rank(base, y, s, b)
    monkeypatch.setattr("tunesmith.kernels.launch.has_tensor_cores", lambda device: False)
    with pytest.raises(
        ValueError, match="no tensor cores for the low-rank term of b_NS: add it with addmm and pass b_NS=None"
    ):
        add_low_rank(base, y, s[:, :16], b[:, :16])
    assert torch.equal(add_low_rank(base, y, s, None), base + y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="4 GiB tensors")
def test_past_2_to_the_31_elements(device: torch.device) -> None:
    T, N = 2**31 // 4096 + 3, 4096
    buffer = torch.zeros(T, N + 16, dtype=torch.bfloat16, device=device)
    buffer[-1] = torch.randn(N + 16, device=device)
    y, s = buffer[:, :N], buffer[:, N:]
    b = torch.randn(N, 16, dtype=torch.bfloat16, device=device)
    expected = add_low_rank(y[-1:], y[-1:], s[-1:], b)
    add_low_rank(y, y, s, b, out=y)
    torch.testing.assert_close(y[-1:], expected)
    assert not y[:-1].any()
