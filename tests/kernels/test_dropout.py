"""Dropout's mask: Philox's published words, the same in the kernel, of the right rate, independent, reproducible."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.numerics import assert_close_to_fp64, poisoned
from tunesmith.kernels.dropout import dropout, dropout_backward_add, dropout_ref, keep_mask_ref, philox_ref

# One element, odd, wider than a tile, taller than one, a multiple of 4 and not.
SHAPES = [(1, 1), (5, 37), (3, 2500), (70, 64), (2, 4)]
SEED = 0xFEDCBA9876543210
CPU = torch.device("cpu")


def mask_of_words(rows: range | list[int], num_columns: int, stream: int) -> torch.Tensor:
    """The mask of SEED and p = 0.5 in these rows, from Philox's words; a multiple of four columns."""
    group, row = torch.meshgrid(torch.arange(num_columns // 4), torch.tensor(rows), indexing="xy")
    words = philox_ref((group, row & 0xFFFFFFFF, row >> 32, torch.full_like(group, stream)), SEED)
    return torch.stack(words, 2).flatten(1) >= 2**31


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        # Known answers of Random123 (tests/kat_vectors).
        (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_published_words(rounds: int, counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    found = philox_ref((c0, c1, c2, c3), high << 32 | low, rounds)
    assert [f"{word.item():08x}" for word in found] == words.split()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 2), (SEED, 2**32 - 1)])
def test_kernel_makes_the_reference_s_mask(
    shape: tuple[int, int], seed: int, stream: int, device: torch.device
) -> None:
    kept = dropout(torch.ones(shape, device=device), 0.4, seed, stream) != 0
    assert torch.equal(kept.cpu(), keep_mask_ref(*shape, 0.4, seed, stream, CPU))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout(shape: tuple[int, int], p: float, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    buffer = torch.randn(shape[0], shape[1] + 3, device=device).to(dtype)
    x = buffer[:, : shape[1]]
    y = dropout(x, p, SEED, 3)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(y, dropout_ref(x, p, SEED, 3))
    keep = keep_mask_ref(*shape, p, SEED, 3, device)
    assert_close_to_fp64("y", y, x * keep / (1 - p), x.double() * keep / (1 - p))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_adds_the_gradient(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    columns = shape[1]
    dx_buffer = poisoned(shape[0], columns + 5, dtype=dtype, device=device)
    dx = dx_buffer[:, :columns]
    dx.copy_(torch.randn(shape, device=device))
    g = torch.randn(shape[0], columns + 2, device=device).to(dtype)[:, :columns]
    before = dx.clone()

    x = torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(dropout_ref(x, 0.3, SEED, 1), x, g.double())
    plain = before + g * keep_mask_ref(*shape, 0.3, SEED, 1, device) / (1 - 0.3)

    dropout_backward_add(dx, g, 0.3, SEED, 1)
    assert_close_to_fp64("dx", dx, plain, before.double() + gradient)
    assert dx_buffer[:, columns:].isnan().all()


def test_fp64_passes_through(device: torch.device) -> None:
    x = torch.randn(4, 9, dtype=torch.float64, device=device)
    keep = keep_mask_ref(4, 9, 0.3, 5, 0, device)
    torch.testing.assert_close(dropout(x, 0.3, 5, 0), x * keep / 0.7, rtol=1e-15, atol=0)
    dx = torch.ones_like(x)
    dropout_backward_add(dx, x, 0.3, 5, 0)
    torch.testing.assert_close(dx, 1 + x * keep / 0.7, rtol=1e-15, atol=0)


def test_gradient_of_another_dtype(device: torch.device) -> None:
    dx = torch.ones(4, 9, dtype=torch.float16, device=device)
    g = torch.full((4, 9), 1 / 3, device=device)
    dropout_backward_add(dx, g, 0.5, 5, 0)
    assert torch.equal(dx, (1 + g * keep_mask_ref(4, 9, 0.5, 5, 0, device) * 2).half())


def test_without_dropout_nothing_is_copied(device: torch.device) -> None:
    x = torch.randn(3, 5, device=device)
    assert dropout(x, 0.0, 1, 1) is x
    dx = torch.ones_like(x)
    dropout_backward_add(dx, x, 0.0, 1, 1)
    assert torch.equal(dx, 1 + x)


def test_no_gradient_flows_through_dropout(device: torch.device) -> None:
    assert not dropout(torch.ones(2, 4, device=device, requires_grad=True), 0.5, 1, 1).requires_grad
    assert not dropout(torch.ones(2, 4, device=device, requires_grad=True).double(), 0.5, 1, 1).requires_grad


def test_mask_does_not_depend_on_the_shape() -> None:
    large = keep_mask_ref(40, 103, 0.5, 11, 2, CPU)
    assert torch.equal(large[:7, :66], keep_mask_ref(7, 66, 0.5, 11, 2, CPU))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keeps_one_minus_p(p: float) -> None:
    rows, columns = 512, 1024
    n = rows * columns
    keep = keep_mask_ref(rows, columns, p, 7, 0, CPU).double()
    assert abs(keep.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)
    # Each row, column and place within a group of four alone, at a bound for the largest of 1,540.
    for rates, count in ((keep.mean(0), rows), (keep.mean(1), columns), (keep.view(-1, 4).mean(0), n / 4)):
        assert (rates - (1 - p)).abs().max() < 5.5 * math.sqrt(p * (1 - p) / count)


def test_masks_and_their_neighbours_are_uncorrelated() -> None:
    """Correlation of independent bits is normal with deviation 1 / sqrt(n): four of them, and 5 for the largest of many."""
    rows, columns = 256, 512
    n = rows * columns
    cases = [(7, 0), (8, 0), (7, 1), (7 + 2**32, 0), (7, 2**31), (0, 0), (0, 1)]
    masks = torch.stack([keep_mask_ref(rows, columns, 0.5, *case, CPU).double() * 2 - 1 for case in cases])
    correlation = masks.flatten(1) @ masks.flatten(1).T / n
    assert correlation.fill_diagonal_(0).abs().max() < 4 / math.sqrt(n)
    mask = masks[0]
    for lag in (1, 2, 3, 4, 5, 8, 16, 64):
        assert abs((mask[:, lag:] * mask[:, :-lag]).mean()) < 5 / math.sqrt(n * (1 - lag / columns)), (
            f"columns {lag} apart"
        )
        assert abs((mask[lag:] * mask[:-lag]).mean()) < 5 / math.sqrt(n * (1 - lag / rows)), f"rows {lag} apart"


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_pieces_of_the_rows_have_the_mask_of_the_whole(
    implementation: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "reference":
        monkeypatch.setattr("tunesmith.kernels.dropout.use_triton", lambda _: False)
    x, dx = (torch.randn(70, 37, device=device).to(dtype) for _ in range(2))
    whole, pieces = dx.clone(), dx.clone()
    dropout_backward_add(whole, x, 0.4, SEED, 1)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 70)):
        dropout_backward_add(pieces[rows], x[rows], 0.4, SEED, 1, first_row=rows.start)
    assert torch.equal(pieces, whole)
    forward = [dropout(x[rows], 0.4, SEED, 1, first_row=rows.start) for rows in (slice(0, 33), slice(33, 70))]
    assert torch.equal(torch.cat(forward), dropout(x, 0.4, SEED, 1))
    assert not torch.equal(dropout(x[33:], 0.4, SEED, 1), forward[1])


@pytest.mark.parametrize("first", [2**31 - 2, 2**32 - 2, 2**61], ids=["2^31", "2^32", "2^61"])
def test_rows_past_a_word(first: int, device: torch.device) -> None:
    ones, dx = torch.ones(5, 8, device=device), torch.zeros(5, 8, device=device)
    kept = dropout(ones, 0.5, SEED, 1, first_row=first) != 0
    dropout_backward_add(dx, ones, 0.5, SEED, 1, first_row=first)
    assert torch.equal(kept.cpu(), mask_of_words(range(first, first + 5), 8, 1))
    assert torch.equal(dx != 0, kept)
    assert torch.equal(keep_mask_ref(5, 8, 0.5, SEED, 1, device, first), kept)
    assert not torch.equal(kept[2:].cpu(), keep_mask_ref(3, 8, 0.5, SEED, 1, CPU)), "the upper word counts"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_a_numbered_row_has_its_mask_wherever_it_lies(
    implementation: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if implementation == "reference":
        monkeypatch.setattr("tunesmith.kernels.dropout.use_triton", lambda _: False)
    generator = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(shape[0], shape[1] + 3, generator=generator).to(device, dtype)[:, :-3] for _ in range(2))
    numbers = torch.randint(2**62, shape[:1], generator=generator).to(device)
    y, added = dropout(x, 0.4, SEED, 1, rows=numbers), dx.clone()
    dropout_backward_add(added, x, 0.4, SEED, 1, rows=numbers)
    order = torch.randperm(shape[0], generator=generator).to(device)
    for chosen in (order, order[: shape[0] // 2], order[shape[0] // 2 :]):  # shuffled, and in two batches
        assert torch.equal(dropout(x[chosen], 0.4, SEED, 1, rows=numbers[chosen]), y[chosen])
        part = dx[chosen]
        dropout_backward_add(part, x[chosen], 0.4, SEED, 1, rows=numbers[chosen])
        assert torch.equal(part, added[chosen])
    # A row alone, counted from its number on, is the same row.
    for place, number in enumerate(numbers[:4].tolist()):
        assert torch.equal(dropout(x[place : place + 1], 0.4, SEED, 1, first_row=number)[0], y[place])
    assert torch.equal(dropout(x, 0.4, SEED, 1, rows=torch.arange(shape[0], device=device)), dropout(x, 0.4, SEED, 1))


def test_numbers_count_with_all_their_bits(device: torch.device) -> None:
    numbers = [5, 6, 5 + 2**31, 5 + 2**32, 5 + 2**62, 6 + 2**32, 2**63 - 1, 5]
    ones, dx = torch.ones(len(numbers), 64, device=device), torch.zeros(len(numbers), 64, device=device)
    rows = torch.tensor(numbers, device=device)
    kept = dropout(ones, 0.5, SEED, 1, rows=rows) != 0
    dropout_backward_add(dx, ones, 0.5, SEED, 1, rows=rows)
    assert torch.equal(kept.cpu(), mask_of_words(numbers, 64, 1))
    assert torch.equal(keep_mask_ref(len(numbers), 64, 0.5, SEED, 1, device, rows=rows), kept)
    assert torch.equal(dx != 0, kept)
    assert torch.equal(kept[0], kept[-1])
    assert len(kept[:-1].unique(dim=0)) == len(numbers) - 1
    lowest = torch.full((1,), -(2**63), device=device)
    found = dropout(ones[:1], 0.5, SEED, 1, rows=lowest) != 0
    assert torch.equal(found, keep_mask_ref(1, 64, 0.5, SEED, 1, device, rows=lowest))
    assert not torch.equal(found, dropout(ones[:1], 0.5, SEED, 1, first_row=0) != 0), "the sign is a bit, too"


def test_same_seed_same_bits_other_seed_others(device: torch.device) -> None:
    x = torch.randn(9, 50, device=device)
    first = dropout(x, 0.5, 3, 4)
    assert torch.equal(first, dropout(x, 0.5, 3, 4))
    for other in ((4, 4), (3, 5), (3 + 2**32, 4), (3, 4 + 2**31)):
        assert not torch.equal(first, dropout(x, 0.5, *other))


def test_refuses_what_it_cannot_do() -> None:
    x = torch.zeros(2, 3)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="must be at least 0 and less than 1"):
            dropout(x, p, 0, 0)
    for seed, stream in ((-1, 0), (2**64, 0), (0, -1), (0, 2**32)):
        with pytest.raises(ValueError, match=f"seed {seed} and stream {stream} must be non-negative"):
            dropout(x, 0.1, seed, stream)
    with pytest.raises(ValueError, match="first_row is -1: expected the number of a row, from 0"):
        dropout(x, 0.1, 0, 0, first_row=-1)
    with pytest.raises(ValueError, match="first_row is 2, and there are numbers for all rows: pass one of the two"):
        dropout(x, 0.1, 0, 0, first_row=2, rows=torch.arange(2))
    for rows in (torch.arange(3), torch.arange(2)[:, None], torch.arange(2).int(), torch.arange(4)[::2]):
        with pytest.raises(
            ValueError, match=r"expected a number for each row, \(2,\) of torch.int64 on cpu, contiguous"
        ):
            dropout_backward_add(x, x, 0.1, 0, 0, rows=rows)
    with pytest.raises(ValueError, match=r"side by side in a row; got \(3, 2\) of torch.float32, strides \(1, 3\)"):
        dropout(x.T, 0.1, 0, 0)
    with pytest.raises(ValueError, match=r"got \(6,\)"):
        dropout_backward_add(x.view(-1), x.view(-1), 0.1, 0, 0)
    with pytest.raises(ValueError, match=r"dx_TK is \(2, 3\) on cpu, g_TK \(2, 4\) on cpu: they must match"):
        dropout_backward_add(x, torch.zeros(2, 4), 0.1, 0, 0)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 10 * 2**30, reason="needs 9 GB of GPU memory"
)
def test_more_than_2_to_the_31_elements() -> None:
    rows, columns = 2**19 + 3, 4096
    x = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    y = dropout(x, 0.5, SEED, 0)
    ends = [range(2), range(rows - 5, rows)]  # the last three lie beyond 2^31 elements
    for end in ends:
        part = slice(end.start, end.stop)
        assert torch.equal(y[part].cpu() == 2, mask_of_words(end, columns, 0))
        assert torch.equal(dropout(x[part], 0.5, SEED, 0, first_row=end.start), y[part])
    dropout_backward_add(x, y, 0.5, SEED, 0)
    for end in ends:
        part = slice(end.start, end.stop)
        assert torch.equal(x[part], 1 + 2 * y[part])
