"""Between the q/k/v projection and attention: bias, low-rank term, per-head RMS norm and rotary embedding, in one pass.

The projection leaves one buffer [q | k | v | S] of (T, N + R), N = (H + 2 G) d: H query heads and G key and value heads of
d features, and S = X Aᵀ, the adapters' inner activations, one slot of `slot` columns for each of q, k and v (or a single
one, where their weights are fused as in Phi-3). B (N, slot) is scaled by alpha / r already. For every token and head:

Forward:   y = y + bias + S_p B_pᵀ                                       (p: the slot of q, k or v)
           q, k: n = y · rstd · (offset + w),  rstd = 1 / sqrt(mean_d(y²) + eps)      (where the model has a qk-norm)
           q, k: z = n · cos + rotate_half(n) · sin over the first `rot` features, rotate_half(n₁, n₂) = (-n₂, n₁)
Backward:  dn = dz · cos + rotate_halfᵀ(dz · sin),  rotate_halfᵀ(u₁, u₂) = (u₂, -u₁)
           g = dn · (offset + w),  dy = rstd · (g - ŷ · mean_d(g · ŷ)),  ŷ = y · rstd,  dw = Σ dn · ŷ
           v: dy = dz. The layer does dS_p = dY_p B_p, dB_p = dY_pᵀ S_p and the bias's gradient with cuBLAS.

The halves of cos and sin need not be equal. RoFormer: Su et al. 2021, arXiv 2104.09864, in Llama's half rotation; RMS norm:
Zhang & Sennrich 2019, arXiv 1910.07467; LoRA: Hu et al. 2021, arXiv 2106.09685. Everything is fp32 and rounded once.

A program handles BLOCK_M tokens of a few heads. Forward and backward move 2 T N values (read and write each once); the
backward of a qk-norm reads the raw q and k too, (H + G) / (H + 2 G) T N more. cos, sin, S and B stay in the caches.
"""

from __future__ import annotations

import torch

from tunesmith.kernels.launch import check_low_rank, use_triton, wide

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations
    triton = None


def qkv_epilogue_ref(
    buf_TNR: torch.Tensor,
    b_NS: torch.Tensor | None,
    cos_PR: torch.Tensor,
    sin_PR: torch.Tensor,
    H: int,
    G: int,
    d: int,
    *,
    slot: int,
    num_slots: int = 3,
    bias_N: torch.Tensor | None = None,
    q_norm_d: torch.Tensor | None = None,
    k_norm_d: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
) -> torch.Tensor:
    """(T, N) in plain PyTorch, computed in fp32 (fp64 stays fp64). See `qkv_epilogue`."""
    q, k, v = _projections(buf_TNR, b_NS, H, G, d, slot, num_slots, bias_N)
    if q_norm_d is not None and k_norm_d is not None:
        q = q * _rstd(q, eps) * (norm_offset + wide(q_norm_d))
        k = k * _rstd(k, eps) * (norm_offset + wide(k_norm_d))
    q, k = _rotate(q, cos_PR, sin_PR), _rotate(k, cos_PR, sin_PR)
    return torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), 1).to(buf_TNR.dtype)


def qkv_epilogue_backward_ref(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    b_NS: torch.Tensor | None,
    cos_PR: torch.Tensor,
    sin_PR: torch.Tensor,
    H: int,
    G: int,
    d: int,
    *,
    slot: int,
    num_slots: int = 3,
    raw_TNR: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    q_norm_d: torch.Tensor | None = None,
    k_norm_d: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dY (T, N), dq_norm, dk_norm) in plain PyTorch, in fp32 (fp64 stays fp64). See `qkv_epilogue_backward`."""
    dq_THd, dk_TGd = _unrotate(dq.reshape(-1, H, d), cos_PR, sin_PR), _unrotate(dk.reshape(-1, G, d), cos_PR, sin_PR)
    dq_norm = dk_norm = None
    if raw_TNR is not None and q_norm_d is not None and k_norm_d is not None:
        q, k, _ = _projections(raw_TNR, b_NS, H, G, d, slot, num_slots, bias_N)
        dq_THd, dq_norm = _norm_backward(dq_THd, q, q_norm_d, eps, norm_offset)
        dk_TGd, dk_norm = _norm_backward(dk_TGd, k, k_norm_d, eps, norm_offset)
    dv_TGd = wide(dv.reshape(-1, G, d))
    dy_TN = torch.cat((dq_THd.flatten(1), dk_TGd.flatten(1), dv_TGd.flatten(1)), 1).to(dq.dtype)
    return dy_TN, dq_norm, dk_norm


def _projections(
    buf_TNR: torch.Tensor,
    b_NS: torch.Tensor | None,
    H: int,
    G: int,
    d: int,
    slot: int,
    num_slots: int,
    bias_N: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (T, H, d), k and v (T, G, d) with bias and low-rank term, before norm and rotation."""
    T, N = buf_TNR.shape[0], (H + 2 * G) * d
    parts = list(wide(buf_TNR[:, :N]).split((H * d, G * d, G * d), 1))
    if b_NS is not None:
        for p, b in enumerate(b_NS.split((H * d, G * d, G * d))):
            first = N + (p * slot if num_slots == 3 else 0)
            parts[p] = parts[p] + wide(buf_TNR[:, first : first + slot]) @ wide(b).T
    if bias_N is not None:
        parts = [y + bias for y, bias in zip(parts, wide(bias_N).split((H * d, G * d, G * d)), strict=True)]
    return parts[0].view(T, H, d), parts[1].view(T, G, d), parts[2].view(T, G, d)


def _rstd(x_THd: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x_THd.square().mean(2, keepdim=True) + eps)


def _norm_backward(
    dn_THd: torch.Tensor, x_THd: torch.Tensor, weight_d: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rstd = _rstd(x_THd, eps)
    normed = x_THd * rstd
    g = dn_THd * (offset + wide(weight_d))
    dx = rstd * (g - normed * (g * normed).mean(2, keepdim=True))
    return dx, (dn_THd * normed).sum((0, 1))


def _tables(x_THd: torch.Tensor, cos_PR: torch.Tensor, sin_PR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every row, (T, 1, rot): row t of the tables repeated is t % P."""
    repeats = x_THd.shape[0] // cos_PR.shape[0]
    return wide(cos_PR).repeat(repeats, 1)[:, None], wide(sin_PR).repeat(repeats, 1)[:, None]


def _rotate(x_THd: torch.Tensor, cos_PR: torch.Tensor, sin_PR: torch.Tensor) -> torch.Tensor:
    (cos, sin), rot = _tables(x_THd, cos_PR, sin_PR), cos_PR.shape[1]
    x1, x2 = x_THd[..., : rot // 2], x_THd[..., rot // 2 : rot]
    rotated = x_THd[..., :rot] * cos + torch.cat((-x2, x1), 2) * sin
    return torch.cat((rotated, x_THd[..., rot:]), 2)


def _unrotate(dy_THd: torch.Tensor, cos_PR: torch.Tensor, sin_PR: torch.Tensor) -> torch.Tensor:
    (cos, sin), rot = _tables(dy_THd, cos_PR, sin_PR), cos_PR.shape[1]
    dy = wide(dy_THd)
    u1, u2 = (dy[..., :rot] * sin).chunk(2, 2)
    return torch.cat((dy[..., :rot] * cos + torch.cat((u2, -u1), 2), dy[..., rot:]), 2)


if triton is not None:
    # A head is three tiles of columns: the two halves that rotate into each other, and what is not rotated (no columns,
    # and never stored, where ROT is D). `rows` below are offsets: row numbers times a row stride.

    @triton.jit
    def _load(at, rows, row_ok, cols, col_ok):
        """A tile in fp32, 0 where there is no row or column."""
        mask = row_ok[:, None] & col_ok[None, :]
        return tl.load(at + rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _store_head(at, rows, row_ok, half, rest, y_1, y_2, y_3, D: tl.constexpr, ROT: tl.constexpr):
        HALF: tl.constexpr = ROT // 2
        dtype = at.dtype.element_ty
        at += rows[:, None]
        half_ok = row_ok[:, None] & (half < HALF)[None, :]
        tl.store(at + half[None, :], y_1.to(dtype), mask=half_ok)
        tl.store(at + (HALF + half)[None, :], y_2.to(dtype), mask=half_ok)
        if ROT < D:
            tl.store(at + (ROT + rest)[None, :], y_3.to(dtype), mask=row_ok[:, None] & (rest < D - ROT)[None, :])

    @triton.jit
    def _load_head(at, rows, row_ok, half, rest, D: tl.constexpr, ROT: tl.constexpr):
        HALF: tl.constexpr = ROT // 2
        y_1 = _load(at, rows, row_ok, half, half < HALF)
        y_2 = _load(at + HALF, rows, row_ok, half, half < HALF)
        y_3 = y_1
        if ROT < D:
            y_3 = _load(at + ROT, rows, row_ok, rest, rest < D - ROT)
        return y_1, y_2, y_3

    @triton.jit
    def _load_vector(q, k, is_q, cols, col_ok):
        """q[cols] of a query head, k[cols] of a key head, in fp32."""
        value = tl.where(is_q, tl.load(q + cols, mask=col_ok, other=0.0), tl.load(k + cols, mask=col_ok, other=0.0))
        return value.to(tl.float32)

    @triton.jit
    def _add_terms(
        y, first, cols, col_ok, s, b, b_stride, bias, SLOT: tl.constexpr, BLOCK_S: tl.constexpr, BIAS: tl.constexpr
    ):
        """y + S_p B_pᵀ + bias in the columns first + cols."""
        if SLOT > 0:
            k = tl.arange(0, BLOCK_S)
            mask = col_ok[None, :] & (k < SLOT)[:, None]
            right = tl.load(b + (first + cols)[None, :] * b_stride + k[:, None], mask=mask, other=0.0)
            y += tl.dot(s, right, input_precision="ieee")
        if BIAS:
            y += tl.load(bias + first + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        return y

    @triton.jit
    def _load_projection(
        buf, rows, row_ok, head, half, rest, b, b_stride, bias, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
        ROT: tl.constexpr, SLOT: tl.constexpr, NUM_SLOTS: tl.constexpr, BLOCK_S: tl.constexpr, BIAS: tl.constexpr,
    ):  # fmt: skip
        """A head of the projections, with bias and low-rank term."""
        HALF: tl.constexpr = ROT // 2
        first = head * D
        y_1, y_2, y_3 = _load_head(buf + first, rows, row_ok, half, rest, D, ROT)
        s = y_1
        if SLOT > 0:
            at = buf + (H + 2 * G) * D
            if NUM_SLOTS == 3:
                at += ((head >= H).to(tl.int32) + (head >= H + G).to(tl.int32)) * SLOT
            k = tl.arange(0, BLOCK_S)
            s = tl.load(at + rows[:, None] + k[None, :], mask=row_ok[:, None] & (k < SLOT)[None, :], other=0.0)
        y_1 = _add_terms(y_1, first, half, half < HALF, s, b, b_stride, bias, SLOT, BLOCK_S, BIAS)
        y_2 = _add_terms(y_2, first + HALF, half, half < HALF, s, b, b_stride, bias, SLOT, BLOCK_S, BIAS)
        if ROT < D:
            y_3 = _add_terms(y_3, first + ROT, rest, rest < D - ROT, s, b, b_stride, bias, SLOT, BLOCK_S, BIAS)
        return y_1, y_2, y_3

    @triton.jit
    def _load_scale(q_norm, k_norm, is_q, offset, half, rest, D: tl.constexpr, ROT: tl.constexpr):
        """offset + weight of a head's three tiles, one row each."""
        HALF: tl.constexpr = ROT // 2
        w_1 = offset + _load_vector(q_norm, k_norm, is_q, half, half < HALF)
        w_2 = offset + _load_vector(q_norm + HALF, k_norm + HALF, is_q, half, half < HALF)
        w_3 = w_1
        if ROT < D:
            w_3 = offset + _load_vector(q_norm + ROT, k_norm + ROT, is_q, rest, rest < D - ROT)
        return w_1[None, :], w_2[None, :], w_3[None, :]

    @triton.jit
    def _mean(x_1, x_2, x_3, D: tl.constexpr, ROT: tl.constexpr):
        """Mean over a head's D features, as a column. Tiles are 0 outside the head."""
        total = tl.sum(x_1, 1) + tl.sum(x_2, 1)
        if ROT < D:
            total += tl.sum(x_3, 1)
        return (total / D)[:, None]

    @triton.jit
    def _qkv_kernel(
        buf, b, cos, sin, bias, q_norm, k_norm, out, tokens, positions, buf_stride, b_stride, cos_stride, sin_stride,
        out_stride, eps, norm_offset, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr,
        SLOT: tl.constexpr, NUM_SLOTS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_M tokens of HEADS heads, which share the rows of cos and sin."""
        GROUPS: tl.constexpr = (H + 2 * G) // HEADS
        token = tl.program_id(0) // GROUPS * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = token < tokens
        half, rest = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_R)
        position, token = (token % positions).to(tl.int64), token.to(tl.int64)
        cos_1, cos_2, _ = _load_head(cos, position * cos_stride, row_ok, half, rest, ROT, ROT)
        sin_1, sin_2, _ = _load_head(sin, position * sin_stride, row_ok, half, rest, ROT, ROT)
        for i in range(HEADS):
            head = tl.program_id(0) % GROUPS * HEADS + i
            y_1, y_2, y_3 = _load_projection(
                buf, token * buf_stride, row_ok, head, half, rest, b, b_stride, bias, H, G, D, ROT, SLOT, NUM_SLOTS,
                BLOCK_S, BIAS,
            )  # fmt: skip
            if head < H + G:
                if NORM:
                    w_1, w_2, w_3 = _load_scale(q_norm, k_norm, head < H, norm_offset, half, rest, D, ROT)
                    rstd = tl.rsqrt(_mean(y_1 * y_1, y_2 * y_2, y_3 * y_3, D, ROT) + eps)
                    y_1, y_2, y_3 = y_1 * rstd * w_1, y_2 * rstd * w_2, y_3 * rstd * w_3
                y_1, y_2 = y_1 * cos_1 - y_2 * sin_1, y_2 * cos_2 + y_1 * sin_2
            _store_head(out + head * D, token * out_stride, row_ok, half, rest, y_1, y_2, y_3, D, ROT)

    @triton.jit
    def _qkv_backward_kernel(
        dq, dk, dv, out, raw, b, cos, sin, bias, q_norm, k_norm, norm_parts, tokens, length, positions, dq_sequence,
        dq_row, dq_head, dk_sequence, dk_row, dk_head, dv_sequence, dv_row, dv_head, out_stride, raw_stride, b_stride,
        cos_stride, sin_stride, eps, norm_offset, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr,
        SLOT: tl.constexpr, NUM_SLOTS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, NORM_GRADS: tl.constexpr,
        HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_M tokens of HEADS heads; token t is row t % length of sequence t // length of dq, dk and dv."""
        GROUPS: tl.constexpr = (H + 2 * G) // HEADS
        HALF: tl.constexpr = ROT // 2
        block = tl.program_id(0) // GROUPS
        token = block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = token < tokens
        half, rest = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_R)
        sequence, row = (token // length).to(tl.int64), (token % length).to(tl.int64)
        position, token = (token % positions).to(tl.int64), token.to(tl.int64)
        cos_1, cos_2, _ = _load_head(cos, position * cos_stride, row_ok, half, rest, ROT, ROT)
        sin_1, sin_2, _ = _load_head(sin, position * sin_stride, row_ok, half, rest, ROT, ROT)
        for i in range(HEADS):
            head = tl.program_id(0) % GROUPS * HEADS + i
            # Each tensor is read in a branch of its own: a pointer chosen at run time has no known alignment, and its
            # loads would be two bytes wide.
            if head < H:
                rows = sequence * dq_sequence + row * dq_row
                at = dq + head.to(tl.int64) * dq_head
                g_1, g_2, g_3 = _load_head(at, rows, row_ok, half, rest, D, ROT)
            elif head < H + G:
                rows = sequence * dk_sequence + row * dk_row
                at = dk + (head - H).to(tl.int64) * dk_head
                g_1, g_2, g_3 = _load_head(at, rows, row_ok, half, rest, D, ROT)
            else:
                rows = sequence * dv_sequence + row * dv_row
                at = dv + (head - H - G).to(tl.int64) * dv_head
                g_1, g_2, g_3 = _load_head(at, rows, row_ok, half, rest, D, ROT)
            if head < H + G:
                g_1, g_2 = g_1 * cos_1 + g_2 * sin_2, g_2 * cos_2 - g_1 * sin_1
                if NORM:
                    y_1, y_2, y_3 = _load_projection(
                        raw, token * raw_stride, row_ok, head, half, rest, b, b_stride, bias, H, G, D, ROT, SLOT,
                        NUM_SLOTS, BLOCK_S, BIAS,
                    )  # fmt: skip
                    rstd = tl.rsqrt(_mean(y_1 * y_1, y_2 * y_2, y_3 * y_3, D, ROT) + eps)
                    rstd = tl.where(row_ok[:, None], rstd, 0.0)  # rows that do not exist must not reach the sums below
                    y_1, y_2, y_3 = y_1 * rstd, y_2 * rstd, y_3 * rstd
                    if NORM_GRADS:
                        part = norm_parts + (block.to(tl.int64) * (H + G) + head) * D
                        tl.store(part + half, tl.sum(g_1 * y_1, 0), mask=half < HALF)
                        tl.store(part + HALF + half, tl.sum(g_2 * y_2, 0), mask=half < HALF)
                        if ROT < D:
                            tl.store(part + ROT + rest, tl.sum(g_3 * y_3, 0), mask=rest < D - ROT)
                    w_1, w_2, w_3 = _load_scale(q_norm, k_norm, head < H, norm_offset, half, rest, D, ROT)
                    g_1, g_2, g_3 = g_1 * w_1, g_2 * w_2, g_3 * w_3
                    mean = _mean(g_1 * y_1, g_2 * y_2, g_3 * y_3, D, ROT)
                    g_1, g_2, g_3 = rstd * (g_1 - y_1 * mean), rstd * (g_2 - y_2 * mean), rstd * (g_3 - y_3 * mean)
            _store_head(out + head * D, token * out_stride, row_ok, half, rest, g_1, g_2, g_3, D, ROT)


def _blocks(buf: torch.Tensor, H: int, G: int, d: int, rot: int, slot: int, narrow_rows: int) -> dict[str, int]:
    """Tile sizes and warps for heads of d features; `narrow_rows` is the number of tokens where 16-bit heads are narrow.

    Chosen by what Triton 3.7 makes of them for sm_90 in bf16. Heads of 128: the forward takes 86 registers for 16 rows,
    136 for 32. Heads of 64: the forward needs 64 rows for wgmma (134 registers; 143 for 32 rows and half the bytes in
    flight), while the backward takes 64 registers for 32 rows and 128 for 64. fp32 spills with more than 16 rows.
    """
    heads = H + 2 * G
    return {
        "HEADS": next(n for n in (4, 3, 2, 1) if heads % n == 0),
        "BLOCK_M": narrow_rows if d <= 64 and buf.dtype != torch.float32 else 16,
        "BLOCK_H": max(16, triton.next_power_of_2(rot // 2)),
        "BLOCK_R": max(16, triton.next_power_of_2(d - rot)),
        "BLOCK_S": max(16, triton.next_power_of_2(slot)),
        "num_warps": 4 if d <= 128 else 8,
        "num_stages": 2,
    }


def qkv_epilogue(
    buf_TNR: torch.Tensor,
    b_NS: torch.Tensor | None,
    cos_PR: torch.Tensor,
    sin_PR: torch.Tensor,
    H: int,
    G: int,
    d: int,
    *,
    slot: int,
    num_slots: int = 3,
    bias_N: torch.Tensor | None = None,
    q_norm_d: torch.Tensor | None = None,
    k_norm_d: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn the projections [q | k | v | S] into what attention reads; returns (T, N).

    buf_TNR   (T, N + R), unit column stride, any row stride. q, k and v are overwritten in place without `out`, and left
              alone with it; the S columns are always left alone.
    b_NS      (N, slot), the stacked B times alpha / r in the buffer's dtype; None where there is nothing to add.
    cos_PR, sin_PR  (P, rot) of any floating dtype, P a divisor of T: token t uses row t % P, so that sequences of equal
              length share one table. rot is even and at most d; the features from rot on are not rotated.
    num_slots 3, or 1 where q, k and v share the slot.
    bias_N    (N,) or None. q_norm_d, k_norm_d (d,): weights of the norm over each head, both or neither, with `eps` and
              `norm_offset` as in `rms_norm`.
    out       (T, N), unit column stride, any row stride. Families with a qk-norm need it: the backward reads the raw
              projections.

    Raises ValueError for shapes that do not fit, a slot above `launch.MAX_SLOT`, or a low-rank term on a card without
    tensor cores.
    """
    _check(buf_TNR, b_NS, cos_PR, sin_PR, H, G, d, slot, num_slots, q_norm_d, k_norm_d)
    if out is None:
        out = buf_TNR[:, : (H + 2 * G) * d]
    if not use_triton(buf_TNR):
        result = qkv_epilogue_ref(
            buf_TNR, b_NS, cos_PR, sin_PR, H, G, d, slot=slot, num_slots=num_slots, bias_N=bias_N,
            q_norm_d=q_norm_d, k_norm_d=k_norm_d, eps=eps, norm_offset=norm_offset,
        )  # fmt: skip
        return out.copy_(result)
    check_low_rank("b_NS", b_NS, slot)
    T, (P, rot) = buf_TNR.shape[0], cos_PR.shape
    blocks = _blocks(buf_TNR, H, G, d, rot, slot, narrow_rows=64)
    _qkv_kernel[(triton.cdiv(T, blocks["BLOCK_M"]) * (H + 2 * G) // blocks["HEADS"],)](
        buf_TNR,
        buf_TNR if b_NS is None else b_NS,
        cos_PR,
        sin_PR,
        buf_TNR if bias_N is None else bias_N,
        buf_TNR if q_norm_d is None else q_norm_d,
        buf_TNR if k_norm_d is None else k_norm_d,
        out,
        T,
        P,
        buf_TNR.stride(0),
        0 if b_NS is None else b_NS.stride(0),
        cos_PR.stride(0),
        sin_PR.stride(0),
        out.stride(0),
        eps,
        norm_offset,
        H=H,
        G=G,
        D=d,
        ROT=rot,
        SLOT=0 if b_NS is None else slot,
        NUM_SLOTS=num_slots,
        BIAS=bias_N is not None,
        NORM=q_norm_d is not None,
        **blocks,
    )
    return out


def qkv_epilogue_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    out_TNR: torch.Tensor,
    b_NS: torch.Tensor | None,
    cos_PR: torch.Tensor,
    sin_PR: torch.Tensor,
    H: int,
    G: int,
    d: int,
    *,
    slot: int,
    num_slots: int = 3,
    raw_TNR: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    q_norm_d: torch.Tensor | None = None,
    k_norm_d: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    norm_grads: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write dY, the gradient of the raw projections, into out_TNR[:, :N]; returns (dq_norm, dk_norm), fp32 or None.

    dq (T, H, d), dk and dv (T, G, d) have unit last stride and any others; or they are (B, L, H, d) and (B, L, G, d) with
    B · L = T, which is cuDNN's (B, H, L, d) transposed, without a copy. out_TNR (T, >= N) has unit column stride; columns
    from N on are left alone. raw_TNR is the forward's buffer, untouched; it is wanted with a qk-norm only, as are b_NS
    and bias_N, which are added to it again so that the sum need not be kept. out_TNR may be the very memory of raw_TNR.
    The weights' gradients come with `norm_grads` and a qk-norm. Raises ValueError as `qkv_epilogue` does.
    """
    if (q_norm_d is None) != (raw_TNR is None):
        raise ValueError("qkv_epilogue_backward wants raw_TNR with q_norm_d and k_norm_d, and not without them")
    if raw_TNR is None:
        b_NS = bias_N = None
    _check(out_TNR if raw_TNR is None else raw_TNR, b_NS, cos_PR, sin_PR, H, G, d, slot, num_slots, q_norm_d, k_norm_d)
    if not use_triton(out_TNR):
        dy_TN, dq_norm, dk_norm = qkv_epilogue_backward_ref(
            dq, dk, dv, b_NS, cos_PR, sin_PR, H, G, d, slot=slot, num_slots=num_slots, raw_TNR=raw_TNR, bias_N=bias_N,
            q_norm_d=q_norm_d, k_norm_d=k_norm_d, eps=eps, norm_offset=norm_offset,
        )  # fmt: skip
        out_TNR[:, : (H + 2 * G) * d] = dy_TN
        return (dq_norm, dk_norm) if norm_grads else (None, None)
    check_low_rank("b_NS", b_NS, slot)
    T, (P, rot), norm = out_TNR.shape[0], cos_PR.shape, raw_TNR is not None
    blocks = _blocks(out_TNR, H, G, d, rot, slot, narrow_rows=32)
    num_blocks = triton.cdiv(T, blocks["BLOCK_M"])
    norm_grads = norm_grads and norm
    parts = torch.empty((num_blocks, H + G, d), dtype=torch.float32, device=dq.device) if norm_grads else out_TNR
    dq, dk, dv = (x if x.dim() == 4 else x[None] for x in (dq, dk, dv))
    _qkv_backward_kernel[(num_blocks * (H + 2 * G) // blocks["HEADS"],)](
        dq,
        dk,
        dv,
        out_TNR,
        out_TNR if raw_TNR is None else raw_TNR,
        out_TNR if b_NS is None else b_NS,
        cos_PR,
        sin_PR,
        out_TNR if bias_N is None else bias_N,
        out_TNR if q_norm_d is None else q_norm_d,
        out_TNR if k_norm_d is None else k_norm_d,
        parts,
        T,
        dq.shape[1],
        P,
        *dq.stride()[:3],
        *dk.stride()[:3],
        *dv.stride()[:3],
        out_TNR.stride(0),
        0 if raw_TNR is None else raw_TNR.stride(0),
        0 if b_NS is None else b_NS.stride(0),
        cos_PR.stride(0),
        sin_PR.stride(0),
        eps,
        norm_offset,
        H=H,
        G=G,
        D=d,
        ROT=rot,
        SLOT=0 if b_NS is None else slot,
        NUM_SLOTS=num_slots,
        BIAS=bias_N is not None,
        NORM=norm,
        NORM_GRADS=norm_grads,
        **blocks,
    )
    return (parts[:, :H].sum((0, 1)), parts[:, H:].sum((0, 1))) if norm_grads else (None, None)


def _check(
    buf_TNR: torch.Tensor,
    b_NS: torch.Tensor | None,
    cos_PR: torch.Tensor,
    sin_PR: torch.Tensor,
    H: int,
    G: int,
    d: int,
    slot: int,
    num_slots: int,
    q_norm_d: torch.Tensor | None,
    k_norm_d: torch.Tensor | None,
) -> None:
    """Raise ValueError for arguments that would make a kernel read past its tensors."""
    (T, width), N, (P, rot) = buf_TNR.shape, (H + 2 * G) * d, cos_PR.shape
    if sin_PR.shape != cos_PR.shape or rot > d or rot % 2 or T % P:
        raise ValueError(
            f"cos is {tuple(cos_PR.shape)} and sin {tuple(sin_PR.shape)}: expected (P, rot) for both, "
            f"P a divisor of {T} tokens and rot even, at most {d}"
        )
    if b_NS is not None and (b_NS.shape != (N, slot) or width < N + num_slots * slot or num_slots not in (1, 3)):
        raise ValueError(
            f"b is {tuple(b_NS.shape)} beside a buffer of {width} columns with {num_slots} slots: expected "
            f"({N}, {slot}), 1 or 3 slots and {N + num_slots * slot} columns"
        )
    if (q_norm_d is None) != (k_norm_d is None):
        raise ValueError("qkv_epilogue got one of q_norm_d and k_norm_d without the other: give both, or neither")
