"""Dropout whose mask is a function of a seed and of the element's place, so that the backward makes it again.

Forward:   y_tk = x_tk · m_tk / (1 - p)
Backward:  dx_tk += g_tk · m_tk / (1 - p)

    m_tk = 0 where w_{k mod 4} < p · 2^32, else 1,    w_0 ... w_3 = Philox4x32-7(key = seed, counter = (k // 4, t, stream))

Srivastava et al. 2014, JMLR 15. Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC11), a keyed
bijection of 128-bit counters; 7 rounds are the fewest that pass all of BigCrush (10, the usual margin, cost 40% more). t is
64 bits (two words of the counter), `stream` the fourth word: one seed serves as many masks as there are streams. p is kept
to 2^-32. Only 32-bit integers in wrap-around arithmetic: the mask is the same on every device, whatever T and K are.

t is a row's number: its place in x, or what the caller calls it (`rows`), so that a row keeps its mask wherever it lies.

A program handles a tile of whole rows, or part of one row; it moves 2 T K values forward and 3 T K backward.
"""

from __future__ import annotations

import torch

from tunesmith.kernels.launch import use_triton, wide

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations
    triton = None

NUM_ROUNDS = 7
# The multipliers of a round, and the Weyl sequence of its keys (Salmon et al. 2011, section 4 and Random123's philox.h).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
TILE = 2048
"""Elements that a program handles; a power of two."""


def philox_ref(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], seed: int, num_rounds: int = NUM_ROUNDS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32's four words of each counter: int64 tensors of 32-bit values, in and out; the key is 64 bits."""
    c0, c1, c2, c3 = counter
    key = [seed & WORD, seed >> 32 & WORD]
    for _ in range(num_rounds):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(k + weyl) & WORD for k, weyl in zip(key, WEYL, strict=True)]
    return c0, c1, c2, c3


def keep_mask_ref(
    num_rows: int,
    num_columns: int,
    p: float,
    seed: int,
    stream: int,
    device: torch.device,
    first_row: int = 0,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """m (T, K) as bool, in plain PyTorch, for the T rows from `first_row` on, or those that `rows` (T,) numbers."""
    group = torch.arange(-(-num_columns // 4), device=device).expand(num_rows, -1)
    if rows is None:
        rows = torch.arange(first_row, first_row + num_rows, device=device)
    row = rows[:, None].expand_as(group)
    words = philox_ref((group, row & WORD, row >> 32 & WORD, torch.full_like(group, stream)), seed)
    return torch.stack(words, 2).flatten(1)[:, :num_columns] >= _threshold(p)


def dropout_ref(
    x_TK: torch.Tensor, p: float, seed: int, stream: int, first_row: int = 0, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """See `dropout`; computed in fp32 (fp64 stays fp64), rounded once. Differentiable."""
    num_rows, num_columns = x_TK.shape
    keep = keep_mask_ref(num_rows, num_columns, p, seed, stream, x_TK.device, first_row, rows)
    return (wide(x_TK) * keep * (1 / (1 - p))).to(x_TK.dtype)


def dropout(
    x_TK: torch.Tensor, p: float, seed: int, stream: int, first_row: int = 0, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """x · m / (1 - p), contiguous, in x's dtype; x itself if p is 0. Has no gradient: see `dropout_backward_add`.

    `x_TK` has unit column stride and any row stride. The mask m depends on 0 <= seed < 2^64, 0 <= stream < 2^32, p and the
    row and column of an element, and on nothing else. `first_row` numbers x's first row: x[a:b] with first_row=a gets rows
    a to b of the mask of x. `rows` (T,) int64 instead numbers each row, with all of its 64 bits. Raises ValueError for
    values outside of these, or of 0 <= p < 1, and for both kinds of numbers.
    """
    _check(x_TK, p, seed, stream, first_row, rows)
    if p == 0:
        return x_TK
    if not use_triton(x_TK):
        return dropout_ref(x_TK.detach(), p, seed, stream, first_row, rows)
    out = torch.empty(x_TK.shape, dtype=x_TK.dtype, device=x_TK.device)
    _launch(x_TK, None, out, p, seed, stream, first_row, rows)
    return out


def dropout_backward_add(
    dx_TK: torch.Tensor,
    g_TK: torch.Tensor,
    p: float,
    seed: int,
    stream: int,
    first_row: int = 0,
    rows: torch.Tensor | None = None,
) -> None:
    """dx += g · m / (1 - p) in place, with the mask of `dropout`; summed in fp32 (fp64 stays fp64), rounded once.

    Both have unit column stride, any row stride and any floating dtype; `first_row` is their first row's number, `rows`
    are those of all. Raises ValueError as `dropout` does.
    """
    _check(dx_TK, p, seed, stream, first_row, rows)
    _check(g_TK, p, seed, stream, first_row, rows)
    if dx_TK.shape != g_TK.shape or dx_TK.device != g_TK.device:
        raise ValueError(
            f"dx_TK is {tuple(dx_TK.shape)} on {dx_TK.device}, g_TK {tuple(g_TK.shape)} on {g_TK.device}: they must match"
        )
    if p == 0:
        dx_TK.add_(g_TK)
    elif use_triton(dx_TK) and use_triton(g_TK):
        _launch(g_TK, dx_TK, dx_TK, p, seed, stream, first_row, rows)
    else:
        dx_TK.copy_(wide(dx_TK) + dropout_ref(wide(g_TK), p, seed, stream, first_row, rows))


def _launch(
    x: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor,
    p: float,
    seed: int,
    stream: int,
    first_row: int,
    rows: torch.Tensor | None,
) -> None:
    num_rows, num_columns = x.shape
    if x.numel() == 0:
        return
    width = min(TILE, max(4, triton.next_power_of_2(num_columns)))
    height = TILE // width
    across = triton.cdiv(num_columns, width)
    _dropout_kernel[(triton.cdiv(num_rows, height) * across,)](
        x,
        x if base is None else base,
        out,
        rows,
        num_rows,
        num_columns,
        across,
        first_row,
        x.stride(0),
        x.stride(0) if base is None else base.stride(0),
        out.stride(0),
        _signed(seed & WORD),
        _signed(seed >> 32),
        _signed(stream),
        _signed(_threshold(p)),
        1 / (1 - p),
        ADD=base is not None,
        NUMBERED=rows is not None,
        NUM_ROUNDS=NUM_ROUNDS,
        HEIGHT=height,
        WIDTH=width,
        num_warps=4,
    )


def _check(x: torch.Tensor, p: float, seed: int, stream: int, first_row: int, rows: torch.Tensor | None) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability is {p}; it must be at least 0 and less than 1")
    if not 0 <= seed < 2**64 or not 0 <= stream < 2**32:
        raise ValueError(f"seed {seed} and stream {stream} must be non-negative and less than 2^64 and 2^32")
    if first_row < 0:
        raise ValueError(f"first_row is {first_row}: expected the number of a row, from 0")
    if x.dim() != 2 or not x.is_floating_point() or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"dropout takes matrices of floating-point numbers side by side in a row; got {tuple(x.shape)} of {x.dtype}, "
            f"strides {x.stride()}"
        )
    if rows is None:
        return
    if first_row:
        raise ValueError(f"first_row is {first_row}, and there are numbers for all rows: pass one of the two")
    if rows.shape != x.shape[:1] or rows.dtype != torch.int64 or rows.device != x.device or not rows.is_contiguous():
        raise ValueError(
            f"rows is {tuple(rows.shape)} of {rows.dtype} on {rows.device}, strides {rows.stride()}: expected a number for "
            f"each row, ({x.shape[0]},) of torch.int64 on {x.device}, contiguous"
        )


def _threshold(p: float) -> int:
    return min(round(p * 2**32), WORD)


def _signed(word: int) -> int:
    """The 32 bits as the int32 that a kernel's argument is: one compilation for all values."""
    return word - 2**32 if word >= 2**31 else word


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of 32-bit products. The full 64 bits would overflow int64: the high word is added up in halves."""
    low = a * b & WORD
    high = ((a >> 16) * b + ((a & 0xFFFF) * b >> 16)) >> 16
    return high, low


if triton is not None:

    @triton.jit(do_not_specialize=["first_row", "seed_low", "seed_high", "stream", "threshold"])
    def _dropout_kernel(
        x,
        base,
        out,
        rows,
        num_rows,
        num_columns,
        across,
        first_row,
        x_stride,
        base_stride,
        out_stride,
        seed_low,
        seed_high,
        stream,
        threshold,
        factor,
        ADD: tl.constexpr,
        NUMBERED: tl.constexpr,
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
        place = tl.load(rows + row, mask=row < num_rows, other=0) if NUMBERED else row + first_row
        c1 = (place & 0xFFFFFFFF).to(tl.uint32)
        c2 = (place >> 32).to(tl.uint32)
        c3 = stream.to(tl.uint32)
        seed = seed_high.to(tl.uint32).to(tl.uint64) << 32 | seed_low.to(tl.uint32).to(tl.uint64)
        w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3, NUM_ROUNDS)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        keep = tl.where(words >= threshold.to(tl.uint32), factor, 0.0)

        value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32) * keep
        if ADD:
            value += tl.load(base + row * base_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=mask)
