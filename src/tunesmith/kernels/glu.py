"""Gated linear unit of a LoRA layer: act(gate) · up, with the low-rank terms of gate, up and down folded in.

A gate/up projection of F features leaves one buffer [gate | up | S] of (T, 2F + R): the frozen base's part of both, and
S = X Aᵀ, the adapters' inner activations, one slot of `slot` columns for each projection (one for both if the weights are
fused, as in Phi-3). B (2F, slot) is scaled by alpha / r already.

Forward:   g = gate + S_g B_gᵀ,  u = up + S_u B_uᵀ,  y = act(g) · u
Backward:  da = dY W_down + dS_down A_down  (the first summand comes in, the second is added here)
           dg = da · u · act'(g),  du = da · act(g)
           dS_g = dg B_g,  dS_u = du B_u,  dB_g = dgᵀ S_g,  dB_u = duᵀ S_u,  dA_down = dS_downᵀ y

The backward works in place, [gate | up | S] becomes [dgate | dup | dS], and needs neither y nor dg a second time: a
program handles `BLOCK_N` columns and walks down the rows, so that dB and dA_down add up in its registers, and leaves its
part of dS for a small sum. It moves 5 T F values (read da, gate, up; write dgate, dup); separate products for dS, dB and
dA_down would move 6 T F more. Sums run in a fixed order: no atomics, same bits every time.

SwiGLU and GeGLU: Shazeer 2020, arXiv 2002.05202. GELU's tanh form: Hendrycks & Gimpel 2016, arXiv 1606.08415.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from tunesmith.kernels.launch import MAX_SLOT, check_low_rank, num_multiprocessors, use_triton, wide

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations
    triton = None

Activation = Literal["silu", "gelu_tanh"]

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def glu_ref(
    buffer: torch.Tensor, b: torch.Tensor | None, features: int, slot: int, num_slots: int, activation: Activation
) -> torch.Tensor:
    """y (T, F) in plain PyTorch, in fp32 at least. See `glu`."""
    g, u = _gate_up(buffer, b, features, slot, num_slots)
    return (_activation(g, activation)[0] * u).to(buffer.dtype)


def glu_backward_ref(
    dact: torch.Tensor,
    buffer: torch.Tensor,
    b: torch.Tensor | None,
    features: int,
    slot: int,
    num_slots: int,
    activation: Activation,
    a_down: torch.Tensor | None = None,
    ds_down: torch.Tensor | None = None,
    act_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dB, dA_down) in plain PyTorch, `buffer` in place. See `glu_backward`."""
    g, u = _gate_up(buffer, b, features, slot, num_slots)
    da = wide(dact)
    if a_down is not None and ds_down is not None:
        da = da + wide(ds_down) @ wide(a_down)
    act, slope = _activation(g, activation)
    y = act * u
    if act_out is not None:
        act_out.copy_(y)
    s = wide(buffer[:, 2 * features :]).clone()
    # Rounded as they are stored: what the products below read.
    buffer[:, :features] = da * u * slope
    buffer[:, features : 2 * features] = da * act
    db = da_down = None
    if b is not None:
        dgate, dup = wide(buffer[:, :features]), wide(buffer[:, features : 2 * features])
        up_slot = slice(slot, 2 * slot) if num_slots == 2 else slice(0, slot)
        db = torch.cat((dgate.T @ s[:, :slot], dup.T @ s[:, up_slot]))
        ds_gate, ds_up = dgate @ wide(b[:features]), dup @ wide(b[features:])
        ds = torch.cat((ds_gate, ds_up), 1) if num_slots == 2 else ds_gate + ds_up
        buffer[:, 2 * features : 2 * features + num_slots * slot] = ds
    if ds_down is not None and a_down is not None:
        da_down = wide(ds_down).T @ wide(y.to(buffer.dtype))
    return db, da_down


def _gate_up(
    buffer: torch.Tensor, b: torch.Tensor | None, features: int, slot: int, num_slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    g, u = wide(buffer[:, :features]), wide(buffer[:, features : 2 * features])
    if b is not None:
        s = wide(buffer[:, 2 * features :])
        s_up = s[:, slot : 2 * slot] if num_slots == 2 else s[:, :slot]
        g = g + s[:, :slot] @ wide(b[:features]).T
        u = u + s_up @ wide(b[features:]).T
    return g, u


def _activation(g: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """act(g) and its derivative."""
    if activation == "silu":
        sigmoid = torch.sigmoid(g)
        return g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    inner = SQRT_2_OVER_PI * (g + GELU_CUBIC * g**3)
    tanh = torch.tanh(inner)
    slope = 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh**2) * SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * g**2)
    return 0.5 * g * (1 + tanh), slope


if triton is not None:

    @triton.jit
    def _activate(g, GELU: tl.constexpr):
        """act(g) and its derivative, in fp32."""
        if GELU:
            # (1 + tanh x) / 2 = sigmoid(2x): no tanh, and no difference of near numbers.
            inner = 1.5957691216057308 * (g + 0.044715 * g * g * g)
            half = tl.sigmoid(inner)
            act = g * half
            slope = half + act * tl.sigmoid(-inner) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * g * g)
        else:
            sigmoid = tl.sigmoid(g)
            act = g * sigmoid
            slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
        return act, slope

    @triton.jit
    def _glu_kernel(
        buffer,
        b,
        out,
        tokens,
        features,
        buffer_stride,
        b_stride,
        out_stride,
        SLOT: tl.constexpr,
        UP_SLOT: tl.constexpr,
        GELU: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """A BLOCK_M x BLOCK_N tile of y."""
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_ok, col_ok = rows < tokens, cols < features
        ok = row_ok[:, None] & col_ok[None, :]
        row = rows.to(tl.int64)[:, None] * buffer_stride
        g = tl.load(buffer + row + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        u = tl.load(buffer + row + features + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        if SLOT > 0:
            k = tl.arange(0, SLOT)
            s_base = buffer + row + 2 * features + k[None, :]
            b_base = b + cols[None, :] * b_stride + k[:, None]
            s_gate = tl.load(s_base, mask=row_ok[:, None], other=0.0)
            b_gate = tl.load(b_base, mask=col_ok[None, :], other=0.0)
            g += tl.dot(s_gate, b_gate, input_precision=PRECISION)
            s_up = tl.load(s_base + UP_SLOT, mask=row_ok[:, None], other=0.0)
            b_up = tl.load(b_base + features * b_stride, mask=col_ok[None, :], other=0.0)
            u += tl.dot(s_up, b_up, input_precision=PRECISION)
        act, _ = _activate(g, GELU)
        at = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
        tl.store(at, (act * u).to(out.dtype.element_ty), mask=ok)

    @triton.jit
    def _glu_backward_kernel(
        dact,
        buffer,
        b,
        a_down,
        ds_down,
        act_out,
        ds_parts,
        db_parts,
        da_parts,
        tokens,
        features,
        rows_per_program,
        dact_stride,
        buffer_stride,
        b_stride,
        a_stride,
        ds_stride,
        act_stride,
        SLOT: tl.constexpr,
        UP_SLOT: tl.constexpr,
        NUM_SLOTS: tl.constexpr,
        DOWN_SLOT: tl.constexpr,
        ACT_OUT: tl.constexpr,
        GELU: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        STAGES: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """BLOCK_N columns of gate and up, `rows_per_program` rows in steps of BLOCK_M."""
        block, part = tl.program_id(0), tl.program_id(1)
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
        col_ok = cols < features
        R: tl.constexpr = SLOT * NUM_SLOTS
        if SLOT > 0:
            k = tl.arange(0, SLOT)
            b_at = b + cols[:, None] * b_stride + k[None, :]
            b_gate = tl.load(b_at, mask=col_ok[:, None], other=0.0)  # [BLOCK_N, SLOT]
            b_up = tl.load(b_at + features * b_stride, mask=col_ok[:, None], other=0.0)
            db_gate = tl.zeros([BLOCK_N, SLOT], tl.float32)
            db_up = tl.zeros([BLOCK_N, SLOT], tl.float32)
        if DOWN_SLOT > 0:
            j = tl.arange(0, DOWN_SLOT)
            a = tl.load(a_down + j[:, None] * a_stride + cols[None, :], mask=col_ok[None, :], other=0.0)
            da_sum = tl.zeros([DOWN_SLOT, BLOCK_N], tl.float32)

        first = part * rows_per_program
        last = tl.minimum(first + rows_per_program, tokens)
        for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_M)
            row_ok = rows < last
            ok = row_ok[:, None] & col_ok[None, :]
            row = rows.to(tl.int64)[:, None]
            at = buffer + row * buffer_stride + cols[None, :]
            da = tl.load(dact + row * dact_stride + cols[None, :], mask=ok, other=0.0).to(tl.float32)
            g = tl.load(at, mask=ok, other=0.0).to(tl.float32)
            u = tl.load(at + features, mask=ok, other=0.0).to(tl.float32)
            if SLOT > 0:
                s_at = buffer + row * buffer_stride + 2 * features + k[None, :]
                s_gate = tl.load(s_at, mask=row_ok[:, None], other=0.0)
                s_up = tl.load(s_at + UP_SLOT, mask=row_ok[:, None], other=0.0)
                g += tl.dot(s_gate, tl.trans(b_gate), input_precision=PRECISION)
                u += tl.dot(s_up, tl.trans(b_up), input_precision=PRECISION)
            if DOWN_SLOT > 0:
                ds = tl.load(ds_down + row * ds_stride + j[None, :], mask=row_ok[:, None], other=0.0)
                da += tl.dot(ds, a, input_precision=PRECISION)
            act, slope = _activate(g, GELU)
            y = (act * u).to(buffer.dtype.element_ty)
            dg = (da * u * slope).to(buffer.dtype.element_ty)
            du = (da * act).to(buffer.dtype.element_ty)
            tl.store(at, dg, mask=ok)
            tl.store(at + features, du, mask=ok)
            if ACT_OUT:
                tl.store(act_out + row * act_stride + cols[None, :], y, mask=ok)
            if DOWN_SLOT > 0:
                da_sum += tl.dot(tl.trans(ds), y, input_precision=PRECISION)
            if SLOT > 0:
                db_gate += tl.dot(tl.trans(dg), s_gate, input_precision=PRECISION)
                db_up += tl.dot(tl.trans(du), s_up, input_precision=PRECISION)
                ds_at = ds_parts + (block.to(tl.int64) * tokens + row) * R + k[None, :]
                ds_gate = tl.dot(dg, b_gate, input_precision=PRECISION)
                ds_up = tl.dot(du, b_up, input_precision=PRECISION)
                part_type = ds_parts.dtype.element_ty
                if NUM_SLOTS == 2:
                    tl.store(ds_at, ds_gate.to(part_type), mask=row_ok[:, None])
                    tl.store(ds_at + SLOT, ds_up.to(part_type), mask=row_ok[:, None])
                else:
                    tl.store(ds_at, (ds_gate + ds_up).to(part_type), mask=row_ok[:, None])

        if SLOT > 0:
            db_at = db_parts + (part.to(tl.int64) * 2 * features + cols[:, None]) * SLOT + k[None, :]
            tl.store(db_at, db_gate, mask=col_ok[:, None])
            tl.store(db_at + features * SLOT, db_up, mask=col_ok[:, None])
        if DOWN_SLOT > 0:
            da_at = da_parts + (part.to(tl.int64) * DOWN_SLOT + j[:, None]) * features + cols[None, :]
            tl.store(da_at, da_sum, mask=col_ok[None, :])

    @triton.jit
    def _sum_parts_kernel(
        parts, out, tokens, num_parts, out_stride, R: tl.constexpr, R_POW2: tl.constexpr, BLOCK_M: tl.constexpr
    ):
        """out[t, r] = Σ_block parts[block, t, r] for BLOCK_M rows, in order."""
        rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        r = tl.arange(0, R_POW2)[None, :]
        ok = (rows < tokens) & (r < R)
        total = tl.zeros([BLOCK_M, R_POW2], tl.float32)
        at = parts + rows * R + r
        for _ in range(num_parts):
            total += tl.load(at, mask=ok, other=0.0).to(tl.float32)
            at += tokens * R
        tl.store(out + rows * out_stride + r, total.to(out.dtype.element_ty), mask=ok)


def glu(
    buffer: torch.Tensor, b: torch.Tensor | None, features: int, slot: int, num_slots: int, activation: Activation
) -> torch.Tensor:
    """y = act(gate + S_g B_gᵀ) · (up + S_u B_uᵀ), (T, F) contiguous.

    `buffer` (T, 2F + R) with unit column stride holds [gate | up | S]. `b` (2F, slot) is None where there is nothing to
    add. `num_slots` is 2, or 1 where gate and up share their slot. Raises ValueError for a slot that is no power of two
    from 16 to MAX_SLOT, or with `b` on a card without tensor cores.
    """
    tokens = buffer.shape[0]
    if not use_triton(buffer):
        return glu_ref(buffer, b, features, slot, num_slots, activation)
    _check_slot("b", b, slot)
    out = torch.empty((tokens, features), dtype=buffer.dtype, device=buffer.device)
    block_m, block_n = 32, 128
    grid = (triton.cdiv(tokens, block_m), triton.cdiv(features, block_n))
    _glu_kernel[grid](
        buffer,
        buffer if b is None else b,
        out,
        tokens,
        features,
        buffer.stride(0),
        0 if b is None else b.stride(0),
        out.stride(0),
        SLOT=0 if b is None else slot,
        UP_SLOT=slot if num_slots == 2 else 0,
        GELU=activation == "gelu_tanh",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION=_precision(buffer),
        num_warps=4,
    )
    return out


def glu_backward(
    dact: torch.Tensor,
    buffer: torch.Tensor,
    b: torch.Tensor | None,
    features: int,
    slot: int,
    num_slots: int,
    activation: Activation,
    a_down: torch.Tensor | None = None,
    ds_down: torch.Tensor | None = None,
    act_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """[gate | up | S] becomes [dgate | dup | dS] in place; returns dB (2F, slot) and dA_down (slot', F), both fp32.

    `dact` (T, F) is the part of y's gradient that came through the down projection's base weight; with `ds_down`
    (T, slot') and `a_down` (slot', F) its adapter's part is added. dB is not multiplied by the adapter's scale. With
    `b` None the S columns are left as they are and dB is None; without `a_down` dA_down is None. `act_out` (T, F), if
    given, receives y. Raises ValueError as `glu` does, for slot' too.
    """
    if not use_triton(buffer):
        return glu_backward_ref(
            dact, buffer, b, features, slot, num_slots, activation, a_down, ds_down, act_out=act_out
        )
    _check_slot("b", b, slot)
    tokens, device = buffer.shape[0], buffer.device
    down_slot = 0 if a_down is None or ds_down is None else a_down.shape[0]
    _check_slot("a_down", a_down, down_slot)
    block_m, block_n, stages = _blocks(buffer, max(slot, down_slot))
    num_blocks = triton.cdiv(features, block_n)
    # Four programs a multiprocessor, but no fewer than eight steps each: their sums are written once a program.
    parts = min(triton.cdiv(4 * num_multiprocessors(device), num_blocks), max(1, tokens // (8 * block_m)))
    rows_per_program = triton.cdiv(triton.cdiv(tokens, parts), block_m) * block_m
    parts = triton.cdiv(tokens, rows_per_program)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    r = num_slots * slot
    # In the type of dS itself: the sum of many rounded parts is as good as one that is rounded once.
    ds_parts = buffer if b is None else buffer.new_empty(num_blocks, tokens, r)
    db_parts = buffer if b is None else empty(parts, 2 * features, slot)
    da_parts = buffer if not down_slot else empty(parts, down_slot, features)
    _glu_backward_kernel[(num_blocks, parts)](
        dact,
        buffer,
        buffer if b is None else b,
        buffer if a_down is None else a_down,
        buffer if ds_down is None else ds_down,
        buffer if act_out is None else act_out,
        ds_parts,
        db_parts,
        da_parts,
        tokens,
        features,
        rows_per_program,
        dact.stride(0),
        buffer.stride(0),
        0 if b is None else b.stride(0),
        0 if a_down is None else a_down.stride(0),
        0 if ds_down is None else ds_down.stride(0),
        0 if act_out is None else act_out.stride(0),
        SLOT=0 if b is None else slot,
        UP_SLOT=slot if num_slots == 2 else 0,
        NUM_SLOTS=num_slots,
        DOWN_SLOT=down_slot,
        ACT_OUT=act_out is not None,
        GELU=activation == "gelu_tanh",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages,
        PRECISION=_precision(buffer),
        num_warps=4,
    )
    db = da_down = None
    if b is not None:
        block_rows = 16
        _sum_parts_kernel[(triton.cdiv(tokens, block_rows),)](
            ds_parts,
            buffer[:, 2 * features :],
            tokens,
            num_blocks,
            buffer.stride(0),
            R=r,
            R_POW2=triton.next_power_of_2(r),
            BLOCK_M=block_rows,
        )
        db = db_parts[0] if parts == 1 else db_parts.sum(0)
    if down_slot:
        da_down = da_parts[0] if parts == 1 else da_parts.sum(0)
    return db, da_down


def _blocks(buffer: torch.Tensor, slot: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, stages) of the backward: what leaves the sums in registers.

    Measured on an H100 at F = 14,336, slot 16, bf16: 64 x 64 in 3 stages 680 us for 8,192 tokens, 128 x 64 727, 64 x 128 1,248,
    32 x 128 2,200 to 3,400 (they spill).
    """
    if buffer.dtype == torch.float32:
        return 32, 32, 2
    return (64, 64, 3) if slot <= 16 else (64, 32, 3) if slot == 32 else (32, 32, 2)


def _check_slot(name: str, matrix: torch.Tensor | None, slot: int) -> None:
    """As `check_low_rank`; besides, these kernels read slots without masks, in the sizes of `tl.dot`."""
    check_low_rank(name, matrix, slot)
    if matrix is not None and (slot < 16 or slot & (slot - 1)):
        expected = f"a power of two from 16 to {MAX_SLOT}"
        raise ValueError(f"the low-rank term of {name} has depth {slot}: expected {expected}; pad it with zeros")


def _precision(tensor: torch.Tensor) -> str:
    """fp32 products stay fp32; 16-bit ones have no choice."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"
