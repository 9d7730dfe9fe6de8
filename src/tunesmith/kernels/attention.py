"""Causal self-attention with an explicit forward and backward, through the fastest implementation that applies.

For every sequence of a layout, query head h and its key and value head g = h // (H / G) (grouped heads, arXiv:2305.13245):

    S = scale q k^T,  C = softcap tanh(S / softcap) (or S),  P = softmax(C where visible, else -inf),  o = P v
    dv = P^T do,  dP = do v^T,  dC = P * (dP - rowsum(do * o)),  dS = dC * (1 - (C / softcap)^2) (or dC)
    dq = scale dS k,  dk = scale dS^T q,  with dk and dv summed over the query heads of g

(FlashAttention, arXiv:2205.14135, Algorithm 4; FlashAttention-2, arXiv:2307.08691.) Query i of a sequence sees its keys
j <= i, and with a window only those with i - window < j. Softmax is in fp32, in fp64 for fp64 inputs.

Shapes: q (T, H, d), k and v (T, G, d) with T the flattened tokens of the layout; they may be strided views into one
buffer (T, N + R), with the last stride 1 and, for the kernels, every other stride a multiple of 16 bytes. Of the (T, T)
scores nothing is kept: the backward recomputes P from the row-wise log-sum-exp.

Work: 4 H d n^2 / 2 FLOPs a sequence of n tokens forward and 2.5 times that backward. Backends, the preferred first:

- cudnn: cuDNN through PyTorch. Rows of equal length, compute capability 9 and 10, d <= 128, fp16 and bf16.
- flash4: the package flash-attn-4. Packed rows, windows and soft caps, compute capability 9 and 10, d <= 128.
- flash2: FlashAttention-2 in PyTorch. Packed rows and windows, compute capability 8.0 and newer, d <= 256.
- efficient: xFormers' kernels in PyTorch. Packed rows and windows, compute capability 7.0 and newer, d <= 256, fp32 too;
  it copies k and v for every query head.
- flex: FlexAttention, compiled on first use. Soft caps, compute capability 8.0 and newer; it keeps an autograd graph of
  its own between forward and backward, and its backward runs once.
- math: the reference, in plain PyTorch. Everything, everywhere, at a few (H, L, L) arrays for the longest sequence.

Left out: dropout, attention sinks, masks other than these, and cuDNN's own packed layout (it is off by default in
PyTorch, where it rebuilds its plan in every call).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from tunesmith.kernels import launch
from tunesmith.kernels.attention_backends import (
    BACKENDS,
    AttentionSpec,
    Gradients,
    Kind,
    Saved,
    SequenceLayout,
    attention_backward_ref,
    attention_ref,
    flash4_interface,
    must_be_deterministic,
)

__all__ = [
    "AttentionSpec",
    "Card",
    "SequenceLayout",
    "attention_backward",
    "attention_backward_ref",
    "attention_forward",
    "attention_ref",
    "card_of",
    "choose_backend",
    "describe_backend",
    "refusal",
]

HALF = (torch.float16, torch.bfloat16)
ALL = (*HALF, torch.float32)


@dataclass(frozen=True, slots=True)
class Card:
    """What the choice of a backend depends on besides the problem.

    capability: CUDA's compute capability; None without an NVIDIA GPU.
    cudnn: cuDNN's version as PyTorch counts it, 91501 for 9.15.1; 0 for none.
    flash4, triton: whether flash-attn-4 and Triton can be imported.
    deterministic: whether every backward must give the same bits every time.
    """

    capability: tuple[int, int] | None = None
    cudnn: int = 0
    flash4: bool = False
    triton: bool = False
    deterministic: bool = False


@cache
def _probe(device: torch.device) -> Card:
    if device.type != "cuda" or torch.version.cuda is None:  # ROCm calls itself cuda, too
        return Card()
    capability = torch.cuda.get_device_capability(device)
    return Card(
        capability,
        cudnn=torch.backends.cudnn.version() or 0,
        flash4=capability[0] in (9, 10) and flash4_interface() is not None,
        triton=launch.has_triton(),
    )


def card_of(device: torch.device | str) -> Card:
    """The card behind `device`, under PyTorch's current setting of determinism."""
    card = _probe(torch.device(device))
    return replace(card, deterministic=True) if must_be_deterministic() else card


@dataclass(frozen=True, slots=True)
class _Case:
    """One question to the table: can this backend do that?"""

    card: Card
    dtype: torch.dtype
    head_dim: int
    kind: Kind
    single: bool  # sequences of one token
    spec: AttentionSpec

    @property
    def capability(self) -> tuple[int, int]:
        return self.card.capability or (0, 0)


def _needs(case: _Case, lowest: int, highest: int | None = None) -> str | None:
    major, minor = case.capability
    if case.card.capability is None:
        return "needs an NVIDIA GPU"
    if lowest <= major <= (highest or major):
        return None
    allowed = f"{lowest}.0 and newer" if highest is None else f"{lowest}.x to {highest}.x"
    return f"for compute capability {allowed}, this is {major}.{minor}"


def _cudnn_refuses(case: _Case) -> str | None:
    # PyTorch lets cuDNN run from 8.0 on, and prefers it on these.
    if reason := _needs(case, 9, 10):
        return reason
    # PyTorch's own threshold: before 9.15.1 lengths that are no multiple of 128 went wrong (pytorch#169849).
    if case.card.cudnn < 91501:
        return f"cuDNN {case.card.cudnn} is older than 91501 (9.15.1)"
    if case.card.deterministic:
        return "its backward is not deterministic"
    if case.kind == "packed":
        return "for sequences of equal length"
    if case.single:
        return "for more than one key"
    return _unlike(case, HALF, 128) or _extras(case, window=False, softcap=False)


def _flash4_refuses(case: _Case) -> str | None:
    if reason := _needs(case, 9, 10):
        return reason
    if not case.card.flash4:
        return "flash-attn-4 is not installed"
    # Its kernels for 9.0 take d up to 256; its tests of the backward end at 128.
    return _unlike(case, HALF, 128)


def _flash2_refuses(case: _Case) -> str | None:
    if reason := _needs(case, 8):
        return reason
    # Its backward for these head dims does not fit the shared memory of the smaller chips (8.6 to 8.9, 12.x).
    if 192 < case.head_dim <= 224 and ((8, 6) <= case.capability <= (8, 9) or case.capability[0] == 12):
        return f"head dim {case.head_dim} does not fit this card"
    return _unlike(case, HALF, 256) or _extras(case, window=True, softcap=False)


def _efficient_refuses(case: _Case) -> str | None:
    lowest = 8 if case.dtype == torch.bfloat16 else 7
    return _needs(case, lowest) or _unlike(case, ALL, 256) or _extras(case, window=True, softcap=False)


def _flex_refuses(case: _Case) -> str | None:
    if reason := _needs(case, 8):
        return reason
    if not case.card.triton:
        return "Triton is not installed"
    if case.head_dim < 16:
        return f"for head dims of at least 16, this is {case.head_dim}"
    return _unlike(case, ALL, 256)


def _unlike(case: _Case, dtypes: tuple[torch.dtype, ...], largest: int) -> str | None:
    if case.dtype not in dtypes:
        return f"not for {str(case.dtype).removeprefix('torch.')}"
    if case.head_dim > largest or case.head_dim % 8:
        return f"for head dims that are multiples of 8 up to {largest}, this is {case.head_dim}"
    return None


def _extras(case: _Case, *, window: bool, softcap: bool) -> str | None:
    if case.spec.window is not None and not window:
        return "it has no window"
    if case.spec.softcap is not None and not softcap:
        return "it has no softcap"
    return None


REFUSALS: dict[str, Callable[[_Case], str | None]] = {
    "cudnn": _cudnn_refuses,
    "flash4": _flash4_refuses,
    "flash2": _flash2_refuses,
    "efficient": _efficient_refuses,
    "flex": _flex_refuses,
    "math": lambda case: None,
}
"""Why a backend cannot do a case, or None. The first in this order that can is chosen."""


@cache
def _decide(case: _Case) -> tuple[str, dict[str, str]]:
    """The chosen backend, and why each preferred one was passed over."""
    passed: dict[str, str] = {}
    for name, refuses in REFUSALS.items():
        reason = refuses(case)
        if reason is None:
            return name, passed
        passed[name] = reason
    raise AssertionError("math refuses nothing")


def _case(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    layout: SequenceLayout | Kind,
    spec: AttentionSpec,
    card: Card | None,
) -> _Case:
    card = card_of(device) if card is None else card
    if isinstance(layout, SequenceLayout):
        return _Case(card, dtype, head_dim, layout.kind, layout.max_length == 1, spec.within(layout.max_length))
    return _Case(card, dtype, head_dim, layout, False, spec)


def choose_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    layout: SequenceLayout | Kind,
    spec: AttentionSpec,
    card: Card | None = None,
) -> str:
    """The backend for tensors of `dtype` on `device`, a function of its arguments alone if `card` is given.

    A layout tells more than its kind: a window that is no shorter than the longest sequence does not count.
    """
    return _decide(_case(device, dtype, head_dim, layout, spec, card))[0]


def describe_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    layout: SequenceLayout | Kind,
    spec: AttentionSpec,
    card: Card | None = None,
) -> str:
    """`choose_backend`'s choice with why the preferred ones were passed over, for a printed plan."""
    case = _case(device, dtype, head_dim, layout, spec, card)
    name, passed = _decide(case)
    if case.card.capability is None:
        return f"{name} (no NVIDIA GPU)"
    reasons = "; ".join(f"{other}: {reason}" for other, reason in passed.items())
    return f"{name} (not {reasons})" if reasons else name


def refusal(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    layout: SequenceLayout | Kind,
    spec: AttentionSpec,
    card: Card | None = None,
) -> str | None:
    """Why `backend` cannot do this, or None if it can."""
    return REFUSALS[backend](_case(device, dtype, head_dim, layout, spec, card))


def _backend_for(q: torch.Tensor, layout: SequenceLayout, spec: AttentionSpec, backend: str | None) -> str:
    case = _case(q.device, q.dtype, q.shape[-1], layout, spec, None)
    if backend is None:
        return _decide(case)[0]
    if backend not in REFUSALS:
        raise ValueError(f"attention backend {backend!r}: expected one of {', '.join(REFUSALS)}")
    reason = REFUSALS[backend](case)
    if reason is not None:
        raise ValueError(f"attention backend {backend!r} cannot do this: {reason}; {_decide(case)[0]} can")
    return backend


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout) -> None:
    total = layout.batch * layout.length
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != total or k.shape[0] != total:
        raise ValueError(
            f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: "
            f"expected ({total}, heads, d) for a layout of {total} tokens, k and v alike"
        )
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads of {q.shape[2]} do not divide into {k.shape[1]} of {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}: mixed")
    if layout.cu_seqlens is not None and layout.cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {layout.cu_seqlens.device}, q on {q.device}: expected one device")
    if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
        raise ValueError(f"the last strides of q, k, v are {q.stride(2)}, {k.stride(2)}, {v.stride(2)}: expected 1")


@torch.no_grad()
def attention_forward(
    q_THd: torch.Tensor,
    k_TGd: torch.Tensor,
    v_TGd: torch.Tensor,
    layout: SequenceLayout,
    spec: AttentionSpec,
    backend: str | None = None,
) -> tuple[torch.Tensor, Saved]:
    """o (T, H, d), contiguous, and what `attention_backward` wants back beside q, k, v and o.

    `backend` is one of the module's, or None for `choose_backend`'s. Raises ValueError for shapes that do not match the
    layout, for mixed dtypes or devices, and for a backend that cannot do it.
    """
    _check(q_THd, k_TGd, v_TGd, layout)
    spec = spec.within(layout.max_length)
    name = _backend_for(q_THd, layout, spec, backend)
    o, saved = BACKENDS[name].forward(q_THd, k_TGd, v_TGd, layout, spec)
    return o.contiguous(), saved


@torch.no_grad()
def attention_backward(
    do_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_TGd: torch.Tensor,
    v_TGd: torch.Tensor,
    o_THd: torch.Tensor,
    saved: Saved,
    layout: SequenceLayout,
    spec: AttentionSpec,
    backend: str | None = None,
) -> Gradients:
    """(dq, dk, dv) in the shapes of q, k and v, with any strides but the last, which is 1.

    q, k, v, the layout, the spec, the backend and PyTorch's setting of determinism are those of the forward, `o_THd` and
    `saved` its results. A strided `do_THd` is copied.
    """
    if do_THd.shape != q_THd.shape or o_THd.shape != q_THd.shape or do_THd.dtype != q_THd.dtype:
        raise ValueError(
            f"do is {tuple(do_THd.shape)} {do_THd.dtype} and o {tuple(o_THd.shape)}: "
            f"expected q's {tuple(q_THd.shape)} {q_THd.dtype}"
        )
    spec = spec.within(layout.max_length)
    name = _backend_for(q_THd, layout, spec, backend)
    do_THd, o_THd = do_THd.contiguous(), o_THd.contiguous()
    return BACKENDS[name].backward(do_THd, q_THd, k_TGd, v_TGd, o_THd, saved, layout, spec)
