"""Bias, low-rank term, qk-norm and rotary embedding of q, k and v, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kernels.numerics import assert_close_to_fp64, poisoned
from tunesmith.kernels.qkv import (
    qkv_epilogue,
    qkv_epilogue_backward,
    qkv_epilogue_backward_ref,
    qkv_epilogue_ref,
)

# Padding rows have an infinite rstd where eps is 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@dataclass(frozen=True)
class Case:
    """A family's attention at a small size."""

    T: int
    H: int
    G: int
    d: int
    rot: int | None = None
    slot: int = 16
    num_slots: int = 3
    positions: int | None = None
    low_rank: bool = True
    bias: bool = False
    norm: bool = False
    norm_offset: float = 0.0
    eps: float = 1e-6

    @property
    def N(self) -> int:
        return (self.H + 2 * self.G) * self.d


CASES = {
    "llama": Case(T=17, H=4, G=2, d=128),
    "one token": Case(T=1, H=2, G=1, d=64),
    "qwen2": Case(T=63, H=3, G=1, d=64, bias=True),
    "qwen3": Case(T=18, H=4, G=1, d=128, norm=True),
    "gemma3": Case(T=17, H=2, G=1, d=256, norm=True, norm_offset=1.0),
    "phi3": Case(T=17, H=2, G=2, d=96, num_slots=1, slot=48),
    "phi4-mini": Case(T=18, H=3, G=1, d=128, rot=96, num_slots=1, positions=9),
    "partial rotary, norm and bias": Case(T=20, H=2, G=1, d=80, rot=20, bias=True, norm=True, slot=32, positions=10),
    # Without eps, the padding rows of the last block have an infinite rstd, which must not reach a sum.
    "tiny heads, no eps": Case(T=33, H=2, G=1, d=16, norm=True, eps=0.0),
    "no adapter": Case(T=66, H=2, G=1, d=64, low_rank=False, positions=22),
    "norm without adapter": Case(T=33, H=2, G=1, d=64, low_rank=False, norm=True, bias=True),
    "wide slots": Case(T=5, H=5, G=1, d=64, slot=64, positions=1),
}
GPU_CASES = {"llama 8b": Case(T=300, H=32, G=8, d=128), "qwen2 0.5b": Case(T=300, H=14, G=2, d=64, bias=True)}
if torch.cuda.is_available():
    CASES |= GPU_CASES


@dataclass
class Tensors:
    """Inputs of a case; `options` are the keyword arguments that forward and backward share."""

    buf: torch.Tensor
    b: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    options: dict[str, Any]

    def double(self) -> Tensors:
        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, torch.Tensor) else x

        options = {key: wide(value) for key, value in self.options.items()}
        grads = self.grads[0].double(), self.grads[1].double(), self.grads[2].double()
        return Tensors(wide(self.buf), wide(self.b), wide(self.cos), wide(self.sin), grads, options)


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Everything strided; every column of cos and sin is its own; gradients as attention returns them, (H, T, d) transposed."""
    torch.manual_seed(case.T * case.d)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    columns = case.N + case.num_slots * case.slot
    positions = case.positions or case.T
    angles = torch.rand(2, positions, case.rot or case.d, device=device) * 6
    options: dict[str, Any] = {"slot": case.slot, "num_slots": case.num_slots, "norm_offset": case.norm_offset}
    if case.bias:
        options["bias_N"] = normal(case.N)
    if case.norm:
        options |= {"q_norm_d": normal(case.d), "k_norm_d": normal(case.d), "eps": case.eps}
    return Tensors(
        buf=normal(case.T, columns + 8)[:, :columns],
        b=normal(case.N, case.slot + 8, scale=0.2)[:, : case.slot] if case.low_rank else None,
        cos=angles[0].cos().to(dtype),
        sin=angles[1].sin().to(dtype),
        grads=(
            normal(case.H, case.T, case.d).transpose(0, 1),
            normal(case.G, case.T, case.d + 8)[..., : case.d].transpose(0, 1),
            normal(case.T, case.G, case.d),
        ),
        options=options,
    )


def backward_options(case: Case, tensors: Tensors) -> dict[str, Any]:
    return tensors.options | ({"raw_TNR": tensors.buf} if case.norm else {})


@pytest.mark.parametrize("name", CASES)
def test_reference_backward_is_that_of_autograd(name: str) -> None:
    case = CASES[name]
    t = make(case, torch.float64, torch.device("cpu"))
    leaves = [t.buf.requires_grad_()]
    if case.norm:
        leaves += [t.options["q_norm_d"].requires_grad_(), t.options["k_norm_d"].requires_grad_()]
    shape = case.H, case.G, case.d
    y = qkv_epilogue_ref(t.buf, t.b, t.cos, t.sin, *shape, **t.options)
    grad = torch.cat([g.flatten(1) for g in t.grads], 1)
    expected = torch.autograd.grad(y, leaves, grad)
    with torch.no_grad():
        ours = qkv_epilogue_backward_ref(*t.grads, t.b, t.cos, t.sin, *shape, **backward_options(case, t))
    torch.testing.assert_close(ours[0], expected[0][:, : case.N], rtol=0, atol=1e-10)
    for weight_grad, theirs in zip(ours[1:], expected[1:] or (None, None), strict=True):
        torch.testing.assert_close(weight_grad, theirs, rtol=0, atol=1e-10)


def test_the_reference_is_transformers_phi3() -> None:
    """Partial rotary embedding of a fused projection, against the library's own function."""
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    case = replace(CASES["phi4-mini"], low_rank=False)
    t = make(case, torch.float64, torch.device("cpu"))
    q, k, v = t.buf[:, : case.N].view(2, 9, -1, case.d).transpose(1, 2).split((case.H, case.G, case.G), 1)
    q, k = apply_rotary_pos_emb(q, k, t.cos[None], t.sin[None])
    expected = torch.cat((q, k, v), 1).transpose(1, 2).reshape(case.T, case.N)
    out = qkv_epilogue(t.buf, None, t.cos, t.sin, case.H, case.G, case.d, **t.options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[name]
    t = make(case, dtype, device)
    shape, wide, before = (case.H, case.G, case.d), t.double(), t.buf.clone()
    out = poisoned(case.T, case.N + 24, dtype=dtype, device=device)
    result = qkv_epilogue(t.buf, t.b, t.cos, t.sin, *shape, **t.options, out=out[:, 8 : case.N + 8])
    plain = qkv_epilogue_ref(t.buf, t.b, t.cos, t.sin, *shape, **t.options)
    exact = qkv_epilogue_ref(wide.buf, wide.b, wide.cos, wide.sin, *shape, **wide.options)
    assert result.data_ptr() == out[:, 8:].data_ptr()
    heads = [case.H * case.d, case.G * case.d, case.G * case.d]
    for part, ours, theirs, true in zip("qkv", *(x.split(heads, 1) for x in (result, plain, exact)), strict=True):
        assert_close_to_fp64(part, ours, theirs, true)
    assert torch.equal(t.buf, before)
    assert out[:, :8].isnan().all()
    assert out[:, case.N + 8 :].isnan().all()
    # In place: the same values (sums may be ordered by the alignment of `out`), and S untouched.
    in_place = qkv_epilogue(t.buf, t.b, t.cos, t.sin, *shape, **t.options)
    assert in_place.data_ptr() == t.buf.data_ptr()
    torch.testing.assert_close(t.buf[:, : case.N], result)
    assert torch.equal(t.buf[:, case.N :], before[:, case.N :])


@pytest.mark.parametrize("name", CASES)
def test_backward(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[name]
    t = make(case, dtype, device)
    shape, wide = (case.H, case.G, case.d), t.double()
    options = backward_options(case, t)
    before, out = t.buf.clone(), poisoned(case.T, case.N + 24, dtype=dtype, device=device)
    dq_norm, dk_norm = qkv_epilogue_backward(*t.grads, out, t.b, t.cos, t.sin, *shape, **options, norm_grads=case.norm)
    plain = qkv_epilogue_backward_ref(*t.grads, t.b, t.cos, t.sin, *shape, **options)
    exact = qkv_epilogue_backward_ref(*wide.grads, wide.b, wide.cos, wide.sin, *shape, **backward_options(case, wide))
    heads = [case.H * case.d, case.G * case.d, case.G * case.d]
    dy = out[:, : case.N]
    for part, ours, theirs, true in zip("qkv", *(x.split(heads, 1) for x in (dy, plain[0], exact[0])), strict=True):
        assert_close_to_fp64(f"d{part}", ours, theirs, true)
    assert out[:, case.N :].isnan().all()
    assert torch.equal(t.buf, before)
    if case.norm:
        assert_close_to_fp64("dq_norm", dq_norm, plain[1], exact[1])  # type: ignore[arg-type]
        assert_close_to_fp64("dk_norm", dk_norm, plain[2], exact[2])  # type: ignore[arg-type]
        assert dq_norm is not None
        assert dq_norm.dtype == torch.float32
        # Over the raw projections themselves.
        qkv_epilogue_backward(*t.grads, t.buf, t.b, t.cos, t.sin, *shape, **options)
        torch.testing.assert_close(t.buf[:, : case.N], dy)
        assert torch.equal(t.buf[:, case.N :], before[:, case.N :])
    else:
        assert dq_norm is None
        assert dk_norm is None


def test_gradients_of_several_sequences_need_no_copy(dtype: torch.dtype, device: torch.device) -> None:
    """cuDNN's layout: (B, H, L, d), seen as (B, L, H, d)."""
    case = replace(CASES["qwen3"], T=34, positions=17)
    t = make(case, dtype, device)
    grads = [g.reshape(2, 17, -1, case.d).transpose(1, 2).contiguous().transpose(1, 2) for g in t.grads]
    results = []
    for dq, dk, dv in (t.grads, grads):
        out = poisoned(case.T, case.N, dtype=dtype, device=device)
        options = backward_options(case, t)
        qkv_epilogue_backward(dq, dk, dv, out, t.b, t.cos, t.sin, case.H, case.G, case.d, **options)
        results.append(out)
    torch.testing.assert_close(*results)


def test_a_layer_without_rotation_has_cos_one_and_sin_zero(dtype: torch.dtype, device: torch.device) -> None:
    """(1, rot) tables serve every token."""
    case = replace(CASES["no adapter"], bias=True)
    t = make(case, dtype, device)
    cos, sin = torch.ones(1, case.d, device=device), torch.zeros(1, case.d, device=device)
    out = torch.empty_like(t.buf[:, : case.N])
    qkv_epilogue(t.buf, None, cos, sin, case.H, case.G, case.d, **t.options, out=out)
    assert torch.equal(out, t.buf[:, : case.N] + t.options["bias_N"])


def test_norm_gradients_have_the_same_bits_every_time(device: torch.device) -> None:
    case = CASES["tiny heads, no eps"]
    t = make(case, torch.float32, device)
    out = torch.empty(case.T, case.N, device=device)
    runs = [
        qkv_epilogue_backward(
            *t.grads, out, t.b, t.cos, t.sin, case.H, case.G, case.d, **backward_options(case, t), norm_grads=True
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])  # type: ignore[arg-type]
    assert torch.equal(runs[0][1], runs[1][1])  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["qwen2"]
    t = make(case, torch.float32, device)
    shape = case.H, case.G, case.d
    norm = torch.ones(case.d, device=device)
    out = torch.empty_like(t.buf)
    with pytest.raises(ValueError, match=r"cos is \(62, 64\) and sin \(62, 64\): .* P a divisor of 63 tokens"):
        qkv_epilogue(t.buf, t.b, t.cos[1:], t.sin[1:], *shape, **t.options)
    with pytest.raises(ValueError, match=r"cos is \(63, 63\) and sin \(63, 63\): .* rot even, at most 64"):
        qkv_epilogue(t.buf, t.b, t.cos[:, 1:], t.sin[:, 1:], *shape, **t.options)
    with pytest.raises(
        ValueError, match=r"b is \(320, 8\) beside a buffer of 368 columns with 3 slots: expected \(320, 16\)"
    ):
        qkv_epilogue(t.buf, t.b[:, :8], t.cos, t.sin, *shape, **t.options)  # type: ignore[index]
    with pytest.raises(ValueError, match="one of q_norm_d and k_norm_d without the other"):
        qkv_epilogue(t.buf, t.b, t.cos, t.sin, *shape, **t.options, q_norm_d=norm)
    with pytest.raises(ValueError, match="wants raw_TNR with q_norm_d and k_norm_d, and not without them"):
        qkv_epilogue_backward(*t.grads, out, t.b, t.cos, t.sin, *shape, **t.options, raw_TNR=t.buf)
    wide = make(replace(case, slot=80), torch.float32, device)
    with pytest.raises(ValueError, match="of b_NS has depth 80, above 64: add it with addmm and pass b_NS=None"):
        qkv_epilogue(wide.buf, wide.b, wide.cos, wide.sin, *shape, **wide.options)
    monkeypatch.setattr("tunesmith.kernels.launch.has_tensor_cores", lambda device: False)
    with pytest.raises(
        ValueError, match="no tensor cores for the low-rank term of b_NS: add it with addmm and pass b_NS=None"
    ):
        qkv_epilogue(t.buf, t.b, t.cos, t.sin, *shape, **t.options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="4 GiB tensors")
def test_past_2_to_the_31_elements(device: torch.device) -> None:
    case = Case(T=1, H=4, G=2, d=128, norm=True)
    t = make(case, torch.bfloat16, device)
    shape = case.H, case.G, case.d
    T = 2**31 // t.buf.shape[1] + 3
    buf = torch.ones(T, t.buf.shape[1], dtype=torch.bfloat16, device=device)
    buf[-1] = t.buf
    expected = torch.empty_like(t.buf)
    qkv_epilogue_backward(*t.grads, expected, t.b, t.cos, t.sin, *shape, **t.options, raw_TNR=t.buf)
    grads = [g.expand(T, -1, -1) for g in t.grads]
    qkv_epilogue_backward(*grads, buf, t.b, t.cos, t.sin, *shape, **t.options, raw_TNR=buf)
    torch.testing.assert_close(buf[-1:, : case.N], expected[:, : case.N])
    buf[-1] = t.buf
    qkv_epilogue(buf, t.b, t.cos, t.sin, *shape, **t.options)
    qkv_epilogue(t.buf, t.b, t.cos, t.sin, *shape, **t.options)
    torch.testing.assert_close(buf[-1:], t.buf)
