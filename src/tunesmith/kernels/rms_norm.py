"""Root-mean-square normalization of T rows of D features, with its hand-written backward.

Forward:   rstd = 1 / sqrt(mean(x²) + eps),  x̂ = x · rstd,  y = x̂ · (offset + weight)
Backward:  g = dy · (offset + weight),  dx = rstd · (g - x̂ · mean(g · x̂)) + residual,  dweight = Σ_t dy · x̂

Zhang & Sennrich 2019, arXiv 1910.07467; `offset` is 1 in Gemma, whose weights are stored less one. Everything is computed
in fp32 and rounded once: Llama's code rounds x̂ to the model's dtype before it multiplies by the weight, which differs in
the last bit of 16-bit values.

A program holds one row (several where D is at most 1,024) in registers. Forward moves 2 T D values (read x, write y);
backward 3 T D (read dy and x, write dx), one more with `residual` and one more with `normed_out`. The weight's gradient
adds nothing but a (programs, D) buffer of partial sums, added up in a fixed order: no atomics.
"""

from __future__ import annotations

import torch

from tunesmith.kernels.launch import num_multiprocessors, use_triton, wide

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations
    triton = None

MAX_FEATURES = 16_384
"""Longest row: a program keeps all of it in registers."""


def rms_norm_ref(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd) in plain PyTorch, computed in fp32 (fp64 stays fp64). See `rms_norm`."""
    x = wide(x_TD)
    rstd = torch.rsqrt(x.square().mean(1) + eps)
    return (x * rstd[:, None] * (offset + wide(weight_D))).to(x_TD.dtype), rstd


def rms_norm_backward_ref(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    rstd_T: torch.Tensor,
    weight_D: torch.Tensor,
    offset: float = 0.0,
    residual_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, y, dweight) in plain PyTorch, computed in fp32 (fp64 stays fp64). See `rms_norm_backward`."""
    dy, rstd, weight = wide(dy_TD), rstd_T[:, None], offset + wide(weight_D)
    normed = wide(x_TD) * rstd
    g = dy * weight
    dx = rstd * (g - normed * (g * normed).mean(1, keepdim=True))
    if residual_TD is not None:
        dx = dx + wide(residual_TD)
    return dx.to(x_TD.dtype), (normed * weight).to(x_TD.dtype), (dy * normed).sum(0)


if triton is not None:

    @triton.jit
    def _rms_norm_kernel(
        x,
        weight,
        y,
        rstd,
        tokens,
        features,
        x_stride,
        eps,
        offset,
        BLOCK_T: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """BLOCK_T rows of y and rstd."""
        rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        cols = tl.arange(0, BLOCK_D)
        row_ok, col_ok = rows < tokens, cols < features
        ok = row_ok[:, None] & col_ok[None, :]
        values = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        scale = offset + tl.load(weight + cols, mask=col_ok, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(values * values, 1) / features + eps)
        normed = values * inverse[:, None] * scale[None, :]
        tl.store(y + rows[:, None] * features + cols[None, :], normed.to(y.dtype.element_ty), mask=ok)
        tl.store(rstd + rows, inverse, mask=row_ok)

    @triton.jit
    def _rms_norm_backward_kernel(
        dy,
        x,
        rstd,
        weight,
        residual,
        dx,
        normed_out,
        dweight_parts,
        tokens,
        features,
        dy_stride,
        x_stride,
        residual_stride,
        dx_stride,
        normed_stride,
        offset,
        blocks_per_program,
        RESIDUAL: tl.constexpr,
        NORMED_OUT: tl.constexpr,
        WEIGHT_GRAD: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """`blocks_per_program` blocks of BLOCK_T rows of dx, one after the other; a block is read before it is written."""
        program = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_D)
        col_ok = cols < features
        scale = offset + tl.load(weight + cols, mask=col_ok, other=0.0).to(tl.float32)
        if WEIGHT_GRAD:
            dweight = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for block in range(blocks_per_program):
            rows = (program * blocks_per_program + block) * BLOCK_T + tl.arange(0, BLOCK_T)
            row_ok = rows < tokens
            ok = row_ok[:, None] & col_ok[None, :]
            row, col = rows[:, None], cols[None, :]
            inverse = tl.load(rstd + rows, mask=row_ok, other=0.0)[:, None]
            grad = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
            values = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
            normed = values * inverse
            g = grad * scale[None, :]
            result = inverse * (g - normed * (tl.sum(g * normed, 1) / features)[:, None])
            if RESIDUAL:
                result += tl.load(residual + row * residual_stride + col, mask=ok, other=0.0).to(tl.float32)
            if WEIGHT_GRAD:
                dweight += grad * normed
            if NORMED_OUT:
                y = (normed * scale[None, :]).to(normed_out.dtype.element_ty)
                tl.store(normed_out + row * normed_stride + col, y, mask=ok)
            tl.store(dx + row * dx_stride + col, result.to(dx.dtype.element_ty), mask=ok)
        if WEIGHT_GRAD:
            tl.store(dweight_parts + program * features + cols, tl.sum(dweight, 0), mask=col_ok)


def _blocks(features: int) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_D, warps): about 16 values a thread."""
    if features > MAX_FEATURES:
        raise ValueError(f"a row of {features} features: rms_norm takes at most {MAX_FEATURES}")
    block_d = triton.next_power_of_2(features)
    block_t = max(1, 2048 // block_d)
    return block_t, block_d, min(32, max(4, block_d // 512))


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (T, D) contiguous and rstd (T,): y = x · rstd · (offset + weight), rstd = 1 / sqrt(mean(x²) + eps).

    x has unit column stride and any row stride; the weight any floating dtype. rstd is fp32 (fp64 for fp64 x); the
    backward wants it. Raises ValueError for D above 16,384.
    """
    if not use_triton(x_TD):
        return rms_norm_ref(x_TD, weight_D, eps, offset)
    T, D = x_TD.shape
    block_t, block_d, warps = _blocks(D)
    y_TD = torch.empty((T, D), dtype=x_TD.dtype, device=x_TD.device)
    rstd_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    _rms_norm_kernel[(triton.cdiv(T, block_t),)](
        x_TD,
        weight_D,
        y_TD,
        rstd_T,
        T,
        D,
        x_TD.stride(0),
        eps,
        offset,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return y_TD, rstd_T


def rms_norm_backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    rstd_T: torch.Tensor,
    weight_D: torch.Tensor,
    offset: float = 0.0,
    *,
    residual_TD: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    normed_out: torch.Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx (T, D), plus `residual_TD` if given, and dweight (D,) in fp32 (None without `weight_grad`).

    All (T, D) tensors have unit column stride and any row stride. dx is written to `out` if given (and returned); it may
    be the very memory of `dy_TD`, `x_TD` or `residual_TD`. `normed_out`, if given, receives y again, the bits of the
    forward. Raises ValueError for D above 16,384.
    """
    if not use_triton(x_TD):
        dx, normed, dweight = rms_norm_backward_ref(dy_TD, x_TD, rstd_T, weight_D, offset, residual_TD)
        if normed_out is not None:
            normed_out.copy_(normed)
        return dx if out is None else out.copy_(dx), dweight if weight_grad else None
    T, D = x_TD.shape
    block_t, block_d, warps = _blocks(D)
    if out is None:
        out = torch.empty((T, D), dtype=x_TD.dtype, device=x_TD.device)
    # For the weight's gradient four programs a multiprocessor walk down the rows, each with a partial sum of its own.
    num_blocks = triton.cdiv(T, block_t)
    blocks_per_program = triton.cdiv(num_blocks, 4 * num_multiprocessors(x_TD.device)) if weight_grad else 1
    programs = triton.cdiv(num_blocks, blocks_per_program)
    parts_PD = torch.empty((programs, D), dtype=torch.float32, device=x_TD.device) if weight_grad else rstd_T
    _rms_norm_backward_kernel[(programs,)](
        dy_TD,
        x_TD,
        rstd_T,
        weight_D,
        dy_TD if residual_TD is None else residual_TD,
        out,
        out if normed_out is None else normed_out,
        parts_PD,
        T,
        D,
        dy_TD.stride(0),
        x_TD.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        out.stride(0),
        0 if normed_out is None else normed_out.stride(0),
        offset,
        blocks_per_program,
        RESIDUAL=residual_TD is not None,
        NORMED_OUT=normed_out is not None,
        WEIGHT_GRAD=weight_grad,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return out, parts_PD.sum(0) if weight_grad else None
