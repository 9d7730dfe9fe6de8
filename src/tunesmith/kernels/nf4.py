"""Dequantization of bitsandbytes' 4-bit weights (NF4 and FP4) into rows of an operand buffer, bit for bit.

    absmax_b = code2[q_b] · absmax2_{b // blocksize2} + offset      double quantization; else absmax_b as stored
    w_i      = round(code[nibble_i] · absmax_{i // blocksize})      i over the N · K weights in row-major order

Dettmers et al. 2023, QLoRA, arXiv 2305.14314. The nibble of an even i is the high half of byte i // 2. The roundings are
those of bitsandbytes' CUDA kernels (csrc/kernels.cu `kDequantizeBlockwise`, 0.50): code2 · absmax2 is rounded to fp32
before the offset is added (no fused multiply-add), the product with `code` to fp32 and then to the type of the weight when
it was quantized, and last to the type of the buffer. FP4's nibble 8 is -0. Left out: those kernels flush fp32 results
below 2^-126 to zero. bitsandbytes on a CPU gives the same values (its +0 for FP4's nibble 8 aside) where K is a multiple
of the block size, which its AVX-512 code takes for granted.

A program handles TILE weights as one flat stretch, whichever rows they lie in. A thread takes runs of as many weights as
16 bytes of the output hold: one load of nibbles, one absmax, one store, nothing through shared memory (whole quantization
blocks as the unit made Triton load absmax 16 times a thread and store 2 bytes at a time). It moves 1/2 + 2 bytes a weight
(read the nibble, write 16 bits) and 1/64 for absmax: 2.5 against the 4 of a copy.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from tunesmith.kernels.launch import use_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations
    triton = None

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SUPPORTED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""States that `supports` has said yes to, with the identities of their tables then."""

TILE = 4096
"""Weights that a program handles."""
NUM_WARPS = 4


class QuantState(Protocol):
    """What is read of `bitsandbytes.functional.QuantState`."""

    absmax: torch.Tensor
    shape: Any
    code: torch.Tensor
    dtype: Any
    blocksize: Any
    quant_type: Any
    offset: Any
    state2: Any


def supports(state: Any) -> bool:
    """Whether `dequantize_4bit` reads this quantization state as bitsandbytes does; if not, let bitsandbytes do it.

    False for a weight that is no matrix, one repacked for AVX-512 CPUs (its absmax is bf16), and any field of a type or
    size that bitsandbytes' `quantize_4bit` does not produce.
    """
    absmax, code, shape = (getattr(state, name, None) for name in ("absmax", "code", "shape"))
    if absmax is None:
        return False
    tables = (id(absmax), id(code), id(getattr(state, "state2", None)))
    if _SUPPORTED.get(state) == tables:  # asked in every forward and backward, 11 us each time
        return True
    if not _has_known_layout(state, absmax, code, shape):
        return False
    _SUPPORTED[state] = tables
    return True


def _has_known_layout(state: Any, absmax: Any, code: Any, shape: Any) -> bool:
    if not (
        getattr(state, "quant_type", None) in ("nf4", "fp4")
        and getattr(state, "blocksize", None) in BLOCKSIZES
        and getattr(state, "dtype", None) in (torch.float32, torch.float16, torch.bfloat16)
        and isinstance(absmax, torch.Tensor)
        and shape is not None
        and len(shape) == 2
        and _is_table(code, 16, absmax.device)
    ):
        return False
    num_blocks = -(-shape[0] * shape[1] // state.blocksize)
    if not getattr(state, "nested", False):
        return _is_table(absmax, num_blocks, absmax.device)
    nested = state.state2
    size = getattr(nested, "blocksize", None)
    return (
        _is_table(absmax, num_blocks, absmax.device, torch.uint8)
        and not getattr(nested, "nested", True)
        and getattr(nested, "dtype", None) == torch.float32
        and isinstance(size, int)
        and size > 0
        and _is_table(nested.code, 256, absmax.device)
        and _is_table(nested.absmax, -(-num_blocks // size), absmax.device)
        and _is_table(state.offset, 1, absmax.device)
    )


def dequantize_4bit_ref(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight (N, K) in the type it was quantized from (`state.dtype`), in plain PyTorch. See `dequantize_4bit`."""
    num_rows, num_columns = state.shape
    absmax = state.absmax
    if state.state2 is not None:
        nested = state.state2
        absmax2 = nested.absmax.repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = nested.code[absmax.int()] * absmax2 + state.offset
    code = state.code if state.quant_type == "nf4" else torch.cat([state.code[:8], -state.code[:8]])
    values = _bytes(packed).int()
    values = torch.stack([code[values >> 4], code[values & 15]], 1).view(-1)[: num_rows * num_columns]
    values = values * absmax.repeat_interleave(state.blocksize)[: values.numel()]
    return values.to(state.dtype).view(num_rows, num_columns)


def dequantize_4bit(packed: torch.Tensor, state: QuantState, out_NK: torch.Tensor) -> None:
    """Write the weight (N, K) = `state.shape` into `out_NK`.

    `packed` and `state` are a `Params4bit`'s `data` and `quant_state`; never transposed. `out_NK` is (N, K), of unit
    column stride and any row stride; what lies between its rows keeps its values. The bits are those of
    `bitsandbytes.functional.dequantize_4bit(packed, state).to(out_NK.dtype)` on a GPU.

    Raises ValueError for a state that `supports` denies, and for sizes, types or devices that do not fit.
    """
    if not supports(state):
        raise ValueError(
            f"4-bit weight of an unknown kind ({getattr(state, 'quant_type', None)}, block size "
            f"{getattr(state, 'blocksize', None)}): use bitsandbytes.functional.dequantize_4bit"
        )
    num_rows, num_columns = state.shape
    numel = num_rows * num_columns
    if out_NK.shape != (num_rows, num_columns):
        raise ValueError(f"a weight of {num_rows} x {num_columns} does not fit a buffer of {tuple(out_NK.shape)}")
    if out_NK.stride(1) != 1 or not out_NK.is_floating_point():
        raise ValueError(
            f"out_NK must hold floating-point numbers side by side in a row; got {out_NK.dtype}, strides {out_NK.stride()}"
        )
    if packed.numel() * packed.element_size() < (numel + 1) // 2:
        raise ValueError(f"{numel} weights need {(numel + 1) // 2} bytes; packed has {packed.numel()} {packed.dtype}")
    if not packed.device == state.absmax.device == out_NK.device:
        raise ValueError(
            f"packed is on {packed.device}, its state on {state.absmax.device}, out_NK on {out_NK.device}: move them together"
        )
    if not use_triton(out_NK):
        out_NK.copy_(dequantize_4bit_ref(packed, state))
        return
    if numel == 0:
        return
    run = 16 // out_NK.element_size()
    nested = state.state2
    _dequantize_kernel[(triton.cdiv(numel, TILE),)](
        _bytes(packed),
        state.absmax,
        state.code,
        state.absmax if nested is None else nested.absmax,
        state.code if nested is None else nested.code,
        state.code if nested is None else state.offset,
        out_NK,
        numel,
        num_columns,
        out_NK.stride(0),
        BLOCKSIZE=state.blocksize,
        BLOCKSIZE2=0 if nested is None else nested.blocksize,
        FP4=state.quant_type == "fp4",
        WHOLE_RUNS=numel % run == 0,
        DTYPE=_TRITON_TYPES[state.dtype],
        RUNS=TILE // run,
        RUN=run,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # absmax is rounded twice
    )


def _is_table(table: Any, size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    return (
        isinstance(table, torch.Tensor)
        and table.dtype == dtype
        and table.device == device
        and table.numel() == size
        and table.is_contiguous()
    )


def _bytes(packed: torch.Tensor) -> torch.Tensor:
    """The packed nibbles as they lie in memory, whatever type they are stored as (`bnb_4bit_quant_storage`)."""
    return packed.contiguous().view(-1).view(torch.uint8)


if triton is not None:
    _TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

    @triton.jit
    def _dequantize_kernel(
        packed,
        absmax,
        code,
        absmax2,
        code2,
        offset,
        out,
        numel,
        num_columns,
        row_stride,
        BLOCKSIZE: tl.constexpr,
        BLOCKSIZE2: tl.constexpr,
        FP4: tl.constexpr,
        WHOLE_RUNS: tl.constexpr,
        DTYPE: tl.constexpr,
        RUNS: tl.constexpr,
        RUN: tl.constexpr,
    ):
        # A run: RUN weights of one quantization block, the share of one thread.
        first_run = tl.program_id(0).to(tl.int64) * RUNS
        of_program = tl.arange(0, RUNS)[:, None]
        of_run = tl.arange(0, RUN)[None, :]
        run = first_run + of_program
        byte = run * (RUN // 2) + tl.arange(0, RUN // 2)[None, :]
        run_mask = run * RUN < numel
        if WHOLE_RUNS:
            byte_mask = run_mask
            mask = run_mask
        else:
            byte_mask = byte * 2 < numel
            mask = run * RUN + of_run < numel

        pair = tl.load(packed + byte, mask=byte_mask, other=0).to(tl.int32)
        block = run // (BLOCKSIZE // RUN)
        if BLOCKSIZE2 > 0:
            level = tl.load(absmax + block, mask=run_mask, other=0).to(tl.int32)
            scale = tl.load(code2 + level) * tl.load(absmax2 + block // BLOCKSIZE2, mask=run_mask, other=0.0)
            scale += tl.load(offset)
        else:
            scale = tl.load(absmax + block, mask=run_mask, other=0.0)
        high = pair >> 4
        low = pair & 15
        if FP4:  # the table has +0 at 8
            high_value = tl.load(code + (high & 7)) * tl.where(high < 8, 1.0, -1.0)
            low_value = tl.load(code + (low & 7)) * tl.where(low < 8, 1.0, -1.0)
        else:
            high_value = tl.load(code + high)
            low_value = tl.load(code + low)
        value = tl.interleave(high_value * scale, low_value * scale)

        # One 64-bit division a program; the rest fits 32 bits.
        first = first_run * RUN
        first_row = first // num_columns
        place = (first - first_row * num_columns).to(tl.int32) + of_program * RUN + of_run
        row = first_row + place // num_columns
        tl.store(out + row * row_stride + place % num_columns, value.to(DTYPE).to(out.dtype.element_ty), mask=mask)
