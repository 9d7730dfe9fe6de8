"""The implementations behind `tunesmith.kernels.attention`: one forward and one backward each, and what they are given.

`forward(q, k, v, layout, spec) -> (o, saved)` and `backward(do, q, k, v, o, saved, layout, spec) -> (dq, dk, dv)`, all
(T, heads, d) with T the flattened tokens. q, k and v are views with any token stride; o and the gradients of o are
contiguous, which `attention` sees to. A backend is only given what `attention.choose_backend` says it can do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.kernels.launch import wide

aten = torch.ops.aten
_CAUSAL_FROM_TOP_LEFT = 1  # PyTorch's name for the efficient kernels' mask type

Kind = Literal["dense", "packed"]
Saved = tuple[Tensor, ...]
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is computed, always causal. Raises ValueError for a window or a softcap that is not positive.

    scale: multiplies q k^T, as a rule 1 / sqrt(d).
    window: query i sees the keys j with i - window < j <= i (transformers' `sliding_window`); None sees all j <= i.
    softcap: scores s become softcap * tanh(s / softcap) before the mask (Gemma 2, arXiv:2408.00118, section 2).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention window is {self.window}: expected at least 1, or None for none")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"attention softcap is {self.softcap}: expected more than 0, or None for none")

    def within(self, length: int) -> AttentionSpec:
        """The same without the window, if no sequence of up to `length` tokens reaches its edge."""
        return replace(self, window=None) if self.window is not None and self.window >= length else self


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLayout:
    """How T = batch * length flattened tokens are divided into sequences, which do not see each other.

    Make one with `dense` or `packed`, one for a micro-batch: layers that share it share what is derived from it. The
    lengths are Python integers, so that nothing waits for the GPU.

    batch, length: rows and tokens a row; a packed row is one row of T tokens.
    lengths: tokens of each sequence, in order.
    max_length: the longest.
    equal_length: whether all are equally long: then T = len(lengths) * max_length, and kernels for dense rows apply.
    cu_seqlens: packed, (len(lengths) + 1,) int32 on the device: where each sequence begins, and T.

    For launches of a fixed shape a packed layout of unequal lengths may be made directly, with a `max_length` above the
    longest and with empty sequences (entries that repeat T) at the end of `cu_seqlens`; `lengths` has none of them.
    """

    batch: int
    length: int
    lengths: tuple[int, ...]
    max_length: int
    equal_length: bool
    cu_seqlens: Tensor | None = None
    block_masks: dict[int | None, Any] = field(default_factory=dict, repr=False)  # FlexAttention's, by window

    @classmethod
    def dense(cls, batch: int, length: int) -> SequenceLayout:
        """`batch` rows of `length` tokens. Padding on the right is harmless: no token before it sees it."""
        if batch < 1 or length < 1:
            raise ValueError(f"layout of {batch} rows of {length} tokens: expected at least one of each")
        return cls(batch, length, (length,) * batch, length, True)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, lengths: Sequence[int], total: int) -> SequenceLayout:
        """One row of `total` tokens: sequences of `lengths` tokens end to end, `cu_seqlens` their bounds on the device.

        Raises ValueError unless the lengths are positive and sum to `total`, and `cu_seqlens` is int32 with one entry
        more than there are lengths. That its values agree with the lengths is not read: that would wait for the GPU.
        """
        lengths = tuple(lengths)
        if not lengths or min(lengths) < 1 or sum(lengths) != total:
            raise ValueError(
                f"{len(lengths)} lengths sum to {sum(lengths)}: expected positive ones that sum to {total}"
            )
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.shape != (len(lengths) + 1,):
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: "
                f"expected int32 of shape ({len(lengths) + 1},) for {len(lengths)} sequences"
            )
        return cls(1, total, lengths, max(lengths), min(lengths) == max(lengths), cu_seqlens.contiguous())

    @property
    def kind(self) -> Kind:
        """Which kernels apply: those for equally long rows, or those that read `cu_seqlens`."""
        return "dense" if self.equal_length else "packed"


def _rows(tensor: Tensor, layout: SequenceLayout) -> Tensor:
    """(T, heads, d) as a view of sequences of equal length, (B, S, heads, d)."""
    return tensor.unflatten(0, (len(layout.lengths), layout.max_length))


def _tokens(tensor: Tensor) -> Tensor:
    """(B, S, heads, d) as (T, heads, d)."""
    return tensor.flatten(0, 1)


def _for_flash(layout: SequenceLayout, *tensors: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """`cu_seqlens` and (T, heads, d) tensors, or None and (B, S, heads, d) ones."""
    if layout.kind == "dense":
        return None, [_rows(tensor, layout) for tensor in tensors]
    return layout.cu_seqlens, list(tensors)


def _flash_window(spec: AttentionSpec) -> dict[str, int | None]:
    """Keys to the left and right of a query's own that it sees, as FlashAttention counts them."""
    if spec.window is None:
        return {}
    return {"window_size_left": spec.window - 1, "window_size_right": 0}


def _scores(q_LHd: Tensor, k_LGd: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """P (G, H/G, L, L) of one sequence, and the soft-capped scores before the mask."""
    length, num_kv_heads = k_LGd.shape[:2]
    scores = torch.einsum("igrd,jgd->grij", q_LHd.unflatten(1, (num_kv_heads, -1)), k_LGd) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    position = torch.arange(length, device=q_LHd.device)
    behind = position[:, None] - position
    visible = (behind >= 0) if spec.window is None else (behind >= 0) & (behind < spec.window)
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1), scores


def attention_ref(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, spec: AttentionSpec) -> Tensor:
    """o (T, H, d) in plain PyTorch, sequence by sequence, computed in fp32 (fp64 for fp64) and rounded once.

    Needs memory for a few (H, L, L) arrays of the longest sequence.
    """
    o, start = torch.empty(q.shape, dtype=q.dtype, device=q.device), 0
    # Inside a caller's autocast the products would be rounded to its dtype.
    with torch.autocast(q.device.type, enabled=False):
        for length in layout.lengths:
            tokens = slice(start, start := start + length)
            p, _ = _scores(wide(q[tokens]), wide(k[tokens]), spec)
            o[tokens] = torch.einsum("grij,jgd->igrd", p, wide(v[tokens])).flatten(1, 2)
    return o


def attention_backward_ref(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, spec: AttentionSpec
) -> Gradients:
    """Gradients of `attention_ref` by the formulas of `attention`'s docstring, in its precision; P is recomputed.

    rowsum(do * o) is taken as rowsum(P * dP), which equals it, without the rounding of o.
    """
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    start, num_kv_heads = 0, k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        for length in layout.lengths:
            tokens = slice(start, start := start + length)
            q_LHd, k_LGd, v_LGd, do_LHd = (wide(t[tokens]) for t in (q, k, v, do))
            q_igrd, do_igrd = (t.unflatten(1, (num_kv_heads, -1)) for t in (q_LHd, do_LHd))
            p, capped = _scores(q_LHd, k_LGd, spec)
            dv[tokens] = torch.einsum("grij,igrd->jgd", p, do_igrd)
            dp = torch.einsum("igrd,jgd->grij", do_igrd, v_LGd)
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            if spec.softcap is not None:
                ds = ds * (1 - (capped / spec.softcap) ** 2)
            dq[tokens] = spec.scale * torch.einsum("grij,jgd->igrd", ds, k_LGd).flatten(1, 2)
            dk[tokens] = spec.scale * torch.einsum("grij,igrd->jgd", ds, q_igrd)
    return dq, dk, dv


def _math_forward(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, spec: AttentionSpec) -> tuple[Tensor, Saved]:
    return attention_ref(q, k, v, layout, spec), ()


def _math_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: Saved, layout: SequenceLayout, spec: AttentionSpec
) -> Gradients:
    return attention_backward_ref(do, q, k, v, layout, spec)


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, spec: AttentionSpec
) -> tuple[Tensor, Saved]:
    """cuDNN through PyTorch. Saves the log-sum-exp (B, H, S, 1) and the seed of a dropout that is off."""
    q, k, v = (_rows(t, layout).transpose(1, 2) for t in (q, k, v))
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=spec.scale
    )
    return _tokens(out.transpose(1, 2)), (lse, seed, offset)


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: Saved, layout: SequenceLayout, spec: AttentionSpec
) -> Gradients:
    # PyTorch caches cuDNN's plans under the strides of q, k and v alone: o and do must be strided alike in every call.
    do, q, k, v, o = (_rows(t, layout).transpose(1, 2) for t in (do, q, k, v, o))
    length = layout.max_length
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, *saved, None, None, None, length, length, 0.0, True, scale=spec.scale
    )
    dq, dk, dv = (_tokens(t.transpose(1, 2)) for t in gradients)
    return dq, dk, dv


def _flash2_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, spec: AttentionSpec
) -> tuple[Tensor, Saved]:
    """FlashAttention-2 in PyTorch. Saves the log-sum-exp, and the seed of a dropout that is off."""
    bounds, (q, k, v) = _for_flash(layout, q, k, v)
    length = layout.max_length
    out, lse, rng_state, unused, _ = aten._flash_attention_forward(
        q, k, v, bounds, bounds, length, length, 0.0, True, False, scale=spec.scale, **_flash_window(spec)
    )
    return out if bounds is not None else _tokens(out), (lse, rng_state, unused)


def _flash2_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: Saved, layout: SequenceLayout, spec: AttentionSpec
) -> Gradients:
    bounds, (do, q, k, v, o) = _for_flash(layout, do, q, k, v, o)
    lse, *seeds = saved
    length = layout.max_length
    settings = {"scale": spec.scale, **_flash_window(spec)}
    gradients = aten._flash_attention_backward(
        do, q, k, v, o, lse, bounds, bounds, length, length, 0.0, True, *seeds, **settings
    )
    dq, dk, dv = (t if bounds is not None else _tokens(t) for t in gradients)
    return dq, dk, dv


@cache
def flash4_interface() -> ModuleType | None:
    """`flash_attn.cute.interface`, or None where it is not installed. Importing it takes seconds."""
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError:
        return None


def _flash4_lengths(layout: SequenceLayout, bounds: Tensor | None) -> dict[str, Any]:
    if bounds is None:
        return {}
    length = layout.max_length
    return {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": length, "max_seqlen_k": length}


def _flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, spec: AttentionSpec
) -> tuple[Tensor, Saved]:
    """The package flash-attn-4. Saves the log-sum-exp, (B, H, S) or (H, T)."""
    flash4 = flash4_interface()
    assert flash4 is not None
    bounds, (q, k, v) = _for_flash(layout, q, k, v)
    settings = {**_flash_window(spec), **_flash4_lengths(layout, bounds)}
    out, lse, *_ = flash4._flash_attn_fwd(
        q, k, v, softmax_scale=spec.scale, causal=True, softcap=spec.softcap, return_lse=True, **settings
    )
    return out if bounds is not None else _tokens(out), (lse,)


def _flash4_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: Saved, layout: SequenceLayout, spec: AttentionSpec
) -> Gradients:
    flash4 = flash4_interface()
    assert flash4 is not None
    bounds, (do, q, k, v, o) = _for_flash(layout, do, q, k, v, o)
    settings = {**_flash_window(spec), **_flash4_lengths(layout, bounds), "deterministic": must_be_deterministic()}
    gradients = flash4._flash_attn_bwd(
        q, k, v, o, do, *saved, softmax_scale=spec.scale, causal=True, softcap=spec.softcap or 0.0, **settings
    )
    dq, dk, dv = (t if bounds is not None else _tokens(t) for t in gradients)
    return dq, dk, dv


def must_be_deterministic() -> bool:
    """Whether `torch.use_deterministic_algorithms(True)` holds, and not just as a warning."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _per_query_head(tensor: Tensor, group: int) -> Tensor:
    """(T, G, d) with every head `group` times in a row: these kernels know no grouped heads."""
    return tensor if group == 1 else tensor.unsqueeze(2).expand(-1, -1, group, -1).flatten(1, 2)


def _for_efficient(layout: SequenceLayout, *tensors: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """`cu_seqlens` and (1, T, heads, d) tensors, or None and (B, S, heads, d) ones."""
    if layout.kind == "dense":
        return None, [_rows(tensor, layout) for tensor in tensors]
    return layout.cu_seqlens, [tensor.unsqueeze(0) for tensor in tensors]


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, spec: AttentionSpec
) -> tuple[Tensor, Saved]:
    """xFormers' kernels in PyTorch. Saves the log-sum-exp, and the seed of a dropout that is off."""
    group = q.shape[1] // k.shape[1]
    bounds, (q, k, v) = _for_efficient(layout, q, _per_query_head(k, group), _per_query_head(v, group))
    length, settings = layout.max_length, {"scale": spec.scale, "window_size": spec.window}
    out, lse, seed, offset, _, _ = aten._efficient_attention_forward(
        q, k, v, None, bounds, bounds, length, length, 0.0, _CAUSAL_FROM_TOP_LEFT, True, **settings
    )
    return _tokens(out), (lse, seed, offset)


def _efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: Saved, layout: SequenceLayout, spec: AttentionSpec
) -> Gradients:
    lse, *seeds = saved
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k, v = _per_query_head(k, group), _per_query_head(v, group)
    bounds, (do, q, k, v, o) = _for_efficient(layout, do, q, k, v, o)
    length, settings = layout.max_length, {"scale": spec.scale, "window_size": spec.window}
    dq, dk, dv, _ = aten._efficient_attention_backward(
        do, q, k, v, None, o, bounds, bounds, length, length, lse, 0.0, *seeds, _CAUSAL_FROM_TOP_LEFT, False, **settings
    )
    dk, dv = (_tokens(t).unflatten(1, (num_kv_heads, group)).sum(2) for t in (dk, dv))
    return _tokens(dq), dk, dv


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: past the recompilation limit it raises; falling back to eager would make the whole score matrix.
    compiled = torch.compile(flex_attention, fullgraph=True)
    # Graphs are counted over all models of a process, and PyTorch's limit is 8: one model can need as many (rows of one
    # block or more, one row or more, lengths that never change or do).
    limit: Any = torch._dynamo.config.patch(recompile_limit=64)
    return limit(compiled)


@cache
def softcap_mod(softcap: float) -> Callable[..., Tensor]:
    """FlexAttention's `score_mod` of a softcap: one function object a value, so that nothing is compiled twice."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Any:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(layout: SequenceLayout, window: int | None, device: torch.device, block: int = 128) -> Any:
    """FlexAttention's BlockMask, from O(T + (T / block)^2) device operations: no (T, T) mask, no host synchronisation.

    Query i sees the keys first(i) <= j <= i, first(i) = max(start of its sequence, i - window + 1), which never falls.
    So the block of the queries a..b meets exactly the key blocks from first(a)'s to its own, and sees all of those
    between first(b) and a. Sequences of equal length are one mask over max_length tokens, the same for each.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = layout.max_length if layout.kind == "dense" else layout.length
    position = torch.arange(length, device=device, dtype=torch.int32)
    first = torch.zeros_like(position)
    if layout.kind == "packed":
        assert layout.cu_seqlens is not None
        first = layout.cu_seqlens[torch.searchsorted(layout.cu_seqlens, position, right=True) - 1]
    if window is not None:
        first = torch.maximum(first, position - (window - 1))

    num_blocks = -(-length // block)
    own = torch.arange(num_blocks, device=device, dtype=torch.int32)
    key_block = own[None, :]
    earliest = first[::block][:, None]
    latest = first[torch.clamp((own + 1) * block, max=length) - 1][:, None]
    met = (key_block >= earliest // block) & (key_block <= own[:, None])
    full = (key_block * block >= latest) & (key_block < own[:, None])
    full &= ((own + 1) * block <= length)[:, None]  # FlexAttention counts an incomplete block of queries as partial

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= first[q])

    return BlockMask.from_kv_blocks(
        *ordered(met & ~full), *ordered(full), BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def _flex_view(tensor: Tensor, layout: SequenceLayout) -> Tensor:
    """(T, heads, d) as (B, heads, S, d)."""
    return (_rows(tensor, layout) if layout.kind == "dense" else tensor.unsqueeze(0)).transpose(1, 2)


def _flex_forward(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, spec: AttentionSpec) -> tuple[Tensor, Saved]:
    """FlexAttention. Saves its output with the autograd graph, and the graph's leaves: views of q, k and v."""
    if spec.window not in layout.block_masks:
        layout.block_masks[spec.window] = block_mask(layout, spec.window, q.device)
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        leaves = [_flex_view(t, layout).detach().requires_grad_() for t in (q, k, v)]
        out = _compiled_flex()(
            *leaves,
            score_mod=None if spec.softcap is None else softcap_mod(spec.softcap),
            block_mask=layout.block_masks[spec.window],
            scale=spec.scale,
            enable_gqa=True,
        )
    return _tokens(out.detach().transpose(1, 2)), (out, *leaves)


def _flex_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: Saved, layout: SequenceLayout, spec: AttentionSpec
) -> Gradients:
    out, *leaves = saved
    gradients = torch.autograd.grad(out, leaves, _flex_view(do, layout))
    dq, dk, dv = (_tokens(t.transpose(1, 2)) for t in gradients)
    return dq, dk, dv


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation; the signatures are in the module's docstring."""

    forward: Callable[..., tuple[Tensor, Saved]]
    backward: Callable[..., Gradients]


BACKENDS = {
    "cudnn": Backend(_cudnn_forward, _cudnn_backward),
    "flash4": Backend(_flash4_forward, _flash4_backward),
    "flash2": Backend(_flash2_forward, _flash2_backward),
    "efficient": Backend(_efficient_forward, _efficient_backward),
    "flex": Backend(_flex_forward, _flex_backward),
    "math": Backend(_math_forward, _math_backward),
}
"""By name, the preferred first."""
