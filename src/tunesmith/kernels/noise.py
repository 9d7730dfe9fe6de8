"""Uniform noise that is a function of a seed and of the element's place, added to rows of a matrix.

    y_tk = x_tk + s_t · u_tk,    u_tk = (w_{k mod 4} >> 8) / 2^23 - 1,    w_0 ... w_3 = Philox4x32-7(key = seed, counter = (k // 4, t, stream))

u is uniform on the 2^24 multiples of 2^-23 in [-1, 1): exact in fp32, and so the same on every device. Counters, rows and streams
are those of kernels/dropout.py, which cites Philox. Neither seed nor noise depends on x: the backward is the identity.

A program handles a tile of whole rows, or part of one row; it moves 2 T K values.
"""

from __future__ import annotations

import torch

from tunesmith.kernels.dropout import NUM_ROUNDS, TILE, WORD, _signed, philox_ref
from tunesmith.kernels.launch import use_triton, wide

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations
    triton = None

CHUNK = 2**22
"""Elements whose words the reference makes at once: it holds some twenty 64-bit integers for each four of them."""


def uniform_ref(num_columns: int, seed: int, stream: int, rows: torch.Tensor) -> torch.Tensor:
    """u (T, K) in fp32, in plain PyTorch, for the rows that `rows` (T,) numbers."""
    group = torch.arange(-(-num_columns // 4), device=rows.device).expand(len(rows), -1)
    row = rows[:, None].expand_as(group)
    words = philox_ref((group, row & WORD, row >> 32 & WORD, torch.full_like(group, stream)), seed)
    return (torch.stack(words, 2).flatten(1)[:, :num_columns] >> 8).float() * 2**-23 - 1


def add_uniform_ref(
    x_TK: torch.Tensor, scales_T: torch.Tensor, seed: int, stream: int, rows: torch.Tensor
) -> torch.Tensor:
    """See `add_uniform`; computed in fp32 (fp64 stays fp64), rounded once."""
    out = torch.empty_like(x_TK)
    size = max(1, CHUNK // max(1, x_TK.shape[1]))
    for start in range(0, len(x_TK), size):
        part = slice(start, start + size)
        noise = uniform_ref(x_TK.shape[1], seed, stream, rows[part])
        out[part] = wide(x_TK[part]) + scales_T[part, None] * noise
    return out


def add_uniform(x_TK: torch.Tensor, scales_T: torch.Tensor, seed: int, stream: int, rows: torch.Tensor) -> torch.Tensor:
    """x + s · u, contiguous, in x's dtype, summed in fp32 and rounded once. Has no gradient: dx = dy.

    `scales_T` (T,) fp32; `rows` (T,) int64 numbers the rows, with all of its 64 bits. u depends on 0 <= seed < 2^64,
    0 <= stream < 2^32, a row's number and an element's column, and on nothing else. Raises ValueError for other values.
    """
    if x_TK.dim() != 2 or not x_TK.is_floating_point() or not x_TK.is_contiguous():
        raise ValueError(
            f"noise is added to contiguous matrices of floating-point numbers; got {tuple(x_TK.shape)} of {x_TK.dtype}, strides "
            f"{x_TK.stride()}"
        )
    if not 0 <= seed < 2**64 or not 0 <= stream < 2**32:
        raise ValueError(f"seed {seed} and stream {stream} must be non-negative and less than 2^64 and 2^32")
    for name, found, dtype in (("scales_T", scales_T, torch.float32), ("rows", rows, torch.int64)):
        if found.shape != x_TK.shape[:1] or found.dtype != dtype or found.device != x_TK.device:
            raise ValueError(
                f"{name} is {tuple(found.shape)} of {found.dtype} on {found.device}: expected one for each row, "
                f"({x_TK.shape[0]},) of {dtype} on {x_TK.device}"
            )
    if not use_triton(x_TK):
        return add_uniform_ref(x_TK.detach(), scales_T, seed, stream, rows)
    out = torch.empty_like(x_TK)
    num_rows, num_columns = x_TK.shape
    if x_TK.numel() == 0:
        return out
    width = min(TILE, max(4, triton.next_power_of_2(num_columns)))
    height = TILE // width
    across = triton.cdiv(num_columns, width)
    _noise_kernel[(triton.cdiv(num_rows, height) * across,)](
        x_TK,
        scales_T.contiguous(),
        out,
        rows.contiguous(),
        num_rows,
        num_columns,
        across,
        _signed(seed & WORD),
        _signed(seed >> 32),
        _signed(stream),
        NUM_ROUNDS=NUM_ROUNDS,
        HEIGHT=height,
        WIDTH=width,
        num_warps=4,
    )
    return out


if triton is not None:

    @triton.jit(do_not_specialize=["seed_low", "seed_high", "stream"])
    def _noise_kernel(
        x,
        scales,
        out,
        rows,
        num_rows,
        num_columns,
        across,
        seed_low,
        seed_high,
        stream,
        NUM_ROUNDS: tl.constexpr,
        HEIGHT: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        row = (tl.program_id(0) // across).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
        first = (tl.program_id(0) % across) * WIDTH
        column = first + tl.arange(0, WIDTH)[None, :]
        mask = (row < num_rows) & (column < num_columns)

        group = first // 4 + tl.arange(0, WIDTH // 4)[None, :]
        c0 = (group + tl.zeros([HEIGHT, 1], tl.int32)).to(tl.uint32)
        place = tl.load(rows + row, mask=row < num_rows, other=0)
        c1 = (place & 0xFFFFFFFF).to(tl.uint32)
        c2 = (place >> 32).to(tl.uint32)
        c3 = stream.to(tl.uint32)
        seed = seed_high.to(tl.uint32).to(tl.uint64) << 32 | seed_low.to(tl.uint32).to(tl.uint64)
        w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3, NUM_ROUNDS)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        # Of 24 bits a signed integer is as good, and every device turns it into fp32 without rounding.
        noise = (words >> 8).to(tl.int32).to(tl.float32) * (1.0 / 8388608) - 1.0

        scale = tl.load(scales + row, mask=row < num_rows, other=0.0)
        value = tl.load(x + row * num_columns + column, mask=mask, other=0.0).to(tl.float32) + scale * noise
        tl.store(out + row * num_columns + column, value.to(out.dtype.element_ty), mask=mask)
