"""Residual sum with the low-rank term of the projection before it: out = base + y + s bᵀ.

Its backward has no kernel: d base = d y = d out, ds = d out · b and db = d outᵀ · s are products for cuBLAS. b (N, S) is the
LoRA matrix B times alpha / r (Hu et al. 2021, arXiv 2106.09685), s = x Aᵀ; y and s usually lie side by side in one buffer.

A program handles a BLOCK_M x BLOCK_N tile: one small product of depth S, fp32 sums, one rounding (a chain of `addmm` and
`add` rounds twice). It moves 3 T N values (read base and y, write out), and T S more that stay in the L2 cache.
"""

from __future__ import annotations

import torch

from tunesmith.kernels.launch import check_low_rank, use_triton, wide

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations
    triton = None


def add_low_rank_ref(
    base_TN: torch.Tensor | None, y_TN: torch.Tensor, s_TS: torch.Tensor | None, b_NS: torch.Tensor | None
) -> torch.Tensor:
    """base + y + s bᵀ in plain PyTorch, summed in fp32 (fp64 stays fp64). See `add_low_rank`."""
    total = wide(y_TN)
    if s_TS is not None and b_NS is not None:
        total = total + wide(s_TS) @ wide(b_NS).T
    if base_TN is not None:
        total = total + wide(base_TN)
    return total.to(y_TN.dtype)


if triton is not None:

    @triton.jit
    def _add_low_rank_kernel(
        base,
        y,
        s,
        b,
        out,
        tokens,
        features,
        base_stride,
        y_stride,
        s_stride,
        b_stride,
        out_stride,
        BASE: tl.constexpr,
        SLOT: tl.constexpr,
        BLOCK_S: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        """A BLOCK_M x BLOCK_N tile of out. Neighbouring programs take neighbouring columns: s stays in the cache."""
        num_blocks = tl.cdiv(features, BLOCK_N)
        rows = (tl.program_id(0) // num_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        row_ok, col_ok = rows < tokens, cols < features
        ok = row_ok[:, None] & col_ok[None, :]
        row, col = rows[:, None], cols[None, :]
        total = tl.load(y + row * y_stride + col, mask=ok, other=0.0).to(tl.float32)
        if BASE:
            total += tl.load(base + row * base_stride + col, mask=ok, other=0.0).to(tl.float32)
        if SLOT > 0:
            low_rank = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for first in tl.static_range(0, SLOT, BLOCK_S):
                k = first + tl.arange(0, BLOCK_S)
                left = tl.load(s + row * s_stride + k[None, :], mask=row_ok[:, None] & (k < SLOT)[None, :], other=0.0)
                right = tl.load(b + col * b_stride + k[:, None], mask=col_ok[None, :] & (k < SLOT)[:, None], other=0.0)
                low_rank = tl.dot(left, right, low_rank, input_precision="ieee")
            total += low_rank
        tl.store(out + row * out_stride + col, total.to(out.dtype.element_ty), mask=ok)


def add_low_rank(
    base_TN: torch.Tensor | None,
    y_TN: torch.Tensor,
    s_TS: torch.Tensor | None,
    b_NS: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """base + y + s bᵀ (T, N): written to `out` if given, else to a new contiguous tensor.

    All tensors have unit column stride, any row stride and one dtype. `base_TN` None leaves it out; `b_NS` None leaves the
    low-rank term out, and `s_TS` is not read then. `out` may be the very memory of `base_TN` or `y_TN`, but no part of
    `s_TS`. Raises ValueError where there is nothing to add, for S above `launch.MAX_SLOT`, or with `b_NS` on a card without
    tensor cores.
    """
    if base_TN is None and b_NS is None:
        raise ValueError("add_low_rank got neither base_TN nor b_NS: there is nothing to add")
    if b_NS is not None and s_TS is None:
        raise ValueError("add_low_rank got b_NS without s_TS: give both, or b_NS=None")
    if not use_triton(y_TN):
        total = add_low_rank_ref(base_TN, y_TN, s_TS, b_NS)
        return total if out is None else out.copy_(total)
    T, N = y_TN.shape
    slot = 0 if b_NS is None else b_NS.shape[1]
    check_low_rank("b_NS", b_NS, slot)
    if out is None:
        out = torch.empty((T, N), dtype=y_TN.dtype, device=y_TN.device)
    # 64 x 64 is what four warps multiply in one wgmma: 5 barriers and 63 registers on sm_90, 25 and 72 for 32 x 128. fp32
    # has no tensor cores to use, and more than 16 rows spill.
    block_m, block_n = 16 if y_TN.dtype == torch.float32 else 64, 64
    _add_low_rank_kernel[(triton.cdiv(T, block_m) * triton.cdiv(N, block_n),)](
        y_TN if base_TN is None else base_TN,
        y_TN,
        y_TN if s_TS is None else s_TS,
        y_TN if b_NS is None else b_NS,
        out,
        T,
        N,
        0 if base_TN is None else base_TN.stride(0),
        y_TN.stride(0),
        0 if s_TS is None else s_TS.stride(0),
        0 if b_NS is None else b_NS.stride(0),
        out.stride(0),
        BASE=base_TN is not None,
        SLOT=slot,
        # In pieces for fp32: Triton makes a single dot begin at `total`, whose larger values round 64 times then.
        BLOCK_S=16 if y_TN.dtype == torch.float32 else max(16, triton.next_power_of_2(slot)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out
