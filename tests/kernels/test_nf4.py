"""4-bit weights are dequantized to the bits of bitsandbytes' CUDA kernels."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.numerics import poisoned
from tunesmith.kernels.nf4 import dequantize_4bit, dequantize_4bit_ref, supports

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

# Rows of one block and of several, rows that blocks straddle (also with an odd number of weights), a tail of a block.
SHAPES = [(1, 64), (9, 576), (3, 100), (7, 65), (5, 1)]


def quantize(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    quant_type: str = "nf4",
    nested: bool = True,
    blocksize: int = 64,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """A weight whose absmax varies, so that a block that takes its neighbour's is seen. Tiny values give FP4's -0."""
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape) * torch.linspace(0.01, 1, shape[0] * shape[1]).view(shape)
    weight.view(-1)[::17] = -1e-6
    return functional.quantize_4bit(
        weight.to(dtype).to(device),
        quant_type=quant_type,
        compress_statistics=nested,
        blocksize=blocksize,
        **options,
    )


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16).cpu()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_writes_the_reference_s_bits(
    shape: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype, device: torch.device
) -> None:
    packed, state = quantize(shape, dtype, device, quant_type, nested)
    out = poisoned(*shape, dtype=dtype, device=device)
    dequantize_4bit(packed, state, out)
    assert torch.equal(bits(out), bits(dequantize_4bit_ref(packed, state)))


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_block_sizes(blocksize: int, dtype: torch.dtype, device: torch.device) -> None:
    packed, state = quantize((3, 1500), dtype, device, blocksize=blocksize)
    out = poisoned(3, 1500, dtype=dtype, device=device)
    dequantize_4bit(packed, state, out)
    assert torch.equal(bits(out), bits(dequantize_4bit_ref(packed, state)))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reference_gives_bitsandbytes_values(
    kind: torch.dtype, quant_type: str, nested: bool, device: torch.device
) -> None:
    packed, state = quantize((6, 576), kind, device, quant_type, nested)
    theirs = functional.dequantize_4bit(packed, state)
    assert theirs.count_nonzero() > 2500
    assert torch.equal(dequantize_4bit_ref(packed, state), theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the signs of FP4's zeros are those of bitsandbytes on CUDA")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_writes_bitsandbytes_bits(shape: tuple[int, int], quant_type: str, dtype: torch.dtype) -> None:
    packed, state = quantize(shape, dtype, torch.device("cuda"), quant_type)
    out = poisoned(*shape, dtype=dtype, device=packed.device)
    dequantize_4bit(packed, state, out)
    assert torch.equal(bits(out), bits(functional.dequantize_4bit(packed, state)))


def test_absmax_is_rounded_before_the_offset_is_added(device: torch.device) -> None:
    # code2 · absmax2 = (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24: the last bit is lost in fp32, a fused multiply-add keeps it.
    packed, state = quantize((1, 64), torch.float32, device)
    state.absmax.fill_(3)
    state.state2.code[3] = 1 + 2**-12
    state.state2.absmax.fill_(1 + 2**-12)
    state.offset.fill_(-(1 + 2**-11) + 2**-20)
    packed.fill_(0xFF)
    out = poisoned(1, 64, dtype=torch.float32, device=device)
    dequantize_4bit(packed, state, out)
    assert out.unique().tolist() == [2**-20]
    assert dequantize_4bit_ref(packed, state).unique().tolist() == [2**-20]


def test_rounds_to_the_quantized_type_first(device: torch.device) -> None:
    packed, state = quantize((4, 64), torch.float16, device)
    out = poisoned(4, 64, dtype=torch.float32, device=device)
    dequantize_4bit(packed, state, out)
    assert torch.equal(out, dequantize_4bit_ref(packed, state).float())
    state.dtype = torch.float32
    assert not torch.equal(out, dequantize_4bit_ref(packed, state))


@pytest.mark.parametrize("columns", [64, 65])
def test_writes_its_rows_and_nothing_else(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    packed, state = quantize((3, columns), dtype, device)
    buffer = poisoned(6, columns + 7, dtype=dtype, device=device)
    dequantize_4bit(packed, state, buffer[2:5, :columns])
    assert torch.equal(buffer[2:5, :columns], dequantize_4bit_ref(packed, state))
    buffer[2:5, :columns] = float("nan")
    assert buffer.isnan().all()


def test_reads_other_storage_types(device: torch.device) -> None:
    packed, state = quantize((6, 64), torch.float16, device, quant_storage=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    out = poisoned(6, 64, dtype=torch.float16, device=device)
    dequantize_4bit(packed, state, out)
    assert torch.equal(out, functional.dequantize_4bit(packed, state))


def test_fp64_buffer_runs_the_reference(device: torch.device) -> None:
    packed, state = quantize((2, 64), torch.float32, device)
    out = poisoned(2, 64, dtype=torch.float64, device=device)
    dequantize_4bit(packed, state, out)
    assert torch.equal(out, dequantize_4bit_ref(packed, state).double())


def test_supports_what_bitsandbytes_quantizes(device: torch.device) -> None:
    for nested in (False, True):
        assert supports(quantize((4, 64), torch.float16, device, nested=nested)[1])


@pytest.mark.parametrize(
    "change",
    [
        {"quant_type": "int4"},
        {"blocksize": 48},
        {"dtype": torch.float64},
        {"shape": (4, 4, 16)},
        {"shape": (8, 64)},  # more blocks than absmax holds
        {"absmax": torch.zeros(4, dtype=torch.bfloat16)},
        {"code": torch.zeros(8)},
        {"offset": None},
        {"offset": torch.zeros((), dtype=torch.float64)},
        {"state2": None},
        {"state2.dtype": torch.float16},
        {"state2.nested": True},
        {"state2.absmax": torch.zeros(1, dtype=torch.float16)},
        {"state2.code": torch.zeros(16)},
    ],
    ids=str,
)
def test_denies_what_it_does_not_know(change: dict[str, Any]) -> None:
    packed, state = quantize((4, 64), torch.float32, torch.device("cpu"))
    ((name, value),) = change.items()
    setattr(state.state2 if name.startswith("state2.") else state, name.removeprefix("state2."), value)
    assert not supports(state)
    with pytest.raises(ValueError, match=r"unknown kind .* use bitsandbytes.functional.dequantize_4bit"):
        dequantize_4bit(packed, state, torch.empty(4, 64))


def test_denies_a_weight_repacked_for_avx512() -> None:
    packed, state = quantize((32, 64), torch.float32, torch.device("cpu"))
    functional._convert_weight_packed_for_cpu(packed, state)
    assert not supports(state)


def test_denies_a_state_of_another_make() -> None:
    assert not supports(None)
    assert not supports(SimpleNamespace(quant_type="nf4"))


def test_refuses_what_does_not_fit() -> None:
    packed, state = quantize((4, 64), torch.float32, torch.device("cpu"))
    for shape in ((3, 64), (5, 64), (4, 65), (256,)):
        with pytest.raises(ValueError, match=re.escape(f"4 x 64 does not fit a buffer of {shape}")):
            dequantize_4bit(packed, state, torch.empty(shape))
    with pytest.raises(ValueError, match=r"side by side in a row; got torch.float32, strides \(1, 4\)"):
        dequantize_4bit(packed, state, torch.empty(64, 4).T)
    with pytest.raises(ValueError, match=r"got torch.int32"):
        dequantize_4bit(packed, state, torch.empty(4, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"256 weights need 128 bytes; packed has 100 torch.uint8"):
        dequantize_4bit(packed[:100], state, torch.empty(4, 64))
    with pytest.raises(ValueError, match="out_NK on meta: move them together"):
        dequantize_4bit(packed, state, torch.empty(4, 64, device="meta"))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 8 * 2**30, reason="needs 6 GB of GPU memory"
)
def test_more_than_2_to_the_31_weights() -> None:
    rows, columns = 2**19 + 3, 4096
    packed, state = quantize((2, columns), torch.bfloat16, torch.device("cuda"), nested=False)
    state.shape = (rows, columns)
    torch.manual_seed(0)
    state.absmax = torch.rand(rows * columns // 64, device="cuda")
    packed = torch.randint(256, (rows * columns // 2, 1), dtype=torch.uint8, device="cuda")
    out = poisoned(rows, columns, dtype=torch.bfloat16, device=packed.device)
    dequantize_4bit(packed, state, out)
    for start in (0, 2**19 - 1):  # the last rows lie beyond 2^31 weights
        stop = start + 4
        part = SimpleNamespace(**vars(state))
        part.shape = (4, columns)
        part.absmax = state.absmax[start * columns // 64 : stop * columns // 64]
        expected = dequantize_4bit_ref(packed[start * columns // 2 : stop * columns // 2], part)
        assert torch.equal(out[start:stop], expected)
