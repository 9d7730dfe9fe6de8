"""One launch writes every adapter matrix, scaled and rounded once, where it belongs and nowhere else."""

from __future__ import annotations

import pytest
import torch

from kernels.numerics import poisoned
from tunesmith.kernels import launch, pack
from tunesmith.kernels.pack import PackEntry, PackTable, pack_ref

# One value; A and B of a rank that fits its slot and of one that does not; wider than a tile; taller; odd everything.
SIZES = [
    ((1, 1), (1, 1)),
    ((16, 64), (16, 64)),
    ((64, 8), (64, 16)),
    ((5, 37), (16, 37)),
    ((3, pack.TILE + 24), (3, pack.TILE + 24)),
    ((300, 16), (301, 16)),
    ((7, 3), (9, 5)),
]


def entries(
    sizes: list[tuple[tuple[int, int], tuple[int, int]]],
    source: torch.dtype,
    destination: torch.dtype,
    device: torch.device,
) -> list[PackEntry]:
    torch.manual_seed(0)
    return [
        PackEntry(
            torch.randn(small, device=device).to(source),
            poisoned(*large, dtype=destination, device=device),
            0.3 + index,
        )
        for index, (small, large) in enumerate(sizes)
    ]


def assert_packed(entry: PackEntry) -> None:
    """The bits of round(scale · source), and NaN around them."""
    rows, cols = entry.source.shape
    expected = (entry.source.detach().float() * entry.scale).to(entry.destination.dtype)
    assert torch.equal(entry.destination[:rows, :cols], expected)
    entry.destination[:rows, :cols] = float("nan")
    assert entry.destination.isnan().all()


@pytest.mark.parametrize("source", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[1:3], SIZES], ids=["one", "multiples of 8", "mixed"])
def test_packs_every_entry(
    sizes: list[tuple[tuple[int, int], tuple[int, int]]], source: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    made = entries(sizes, source, dtype, device)
    PackTable(made).run()
    for entry in made:
        assert_packed(entry)


def test_without_a_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "use_triton", lambda _: False)
    made = entries(SIZES, torch.float16, torch.float32, device)
    PackTable(made).run()
    for entry in made:
        assert_packed(entry)


def test_rounds_once(device: torch.device) -> None:
    # 2051 / 3 = 683.67 is 683.5 in fp16, whose neighbours lie 0.5 apart; 2051 in fp16 is 2052, and a third of it 684.
    entry = PackEntry(
        torch.tensor([[2051.0]], device=device), torch.zeros(1, 1, dtype=torch.float16, device=device), 1 / 3
    )
    PackTable([entry]).run()
    assert entry.destination.item() == 683.5


def test_destinations_with_strides_in_one_buffer(dtype: torch.dtype, device: torch.device) -> None:
    """[W; A]: rows below W's, in a slot of 16 for rank 5, and a B in a corner of another buffer."""
    operand = poisoned(24, 40, dtype=dtype, device=device)
    corner = poisoned(12, 40, dtype=dtype, device=device)
    source = torch.randn(40, 48, device=device)
    made = [
        PackEntry(source[:5, 8:48], operand[8:24], 1.0),
        PackEntry(source[:10, :8], corner[2:, 16:32], -2.0),
    ]
    PackTable(made).run()
    assert torch.equal(operand[8:13], source[:5, 8:48].to(dtype))
    assert torch.equal(corner[2:, 16:24], (source[:10, :8] * -2).to(dtype))
    operand[8:13] = corner[2:, 16:24] = float("nan")
    assert operand.isnan().all()
    assert corner.isnan().all()


def test_one_launch_for_each_pair_of_types(device: torch.device) -> None:
    made = [
        *entries(SIZES[:3], torch.float32, torch.float16, device),
        *entries(SIZES[:3], torch.float16, torch.float32, device),
        *entries(SIZES[3:], torch.float32, torch.float16, device),
        *entries(SIZES[3:], torch.float32, torch.float32, device),
        *entries([((0, 4), (4, 4)), ((4, 0), (4, 4))], torch.float32, torch.float16, device),
        *entries(SIZES[:2], torch.float64, torch.float64, device),
    ]
    table = PackTable(made)
    assert [type(group).__name__ for group in table._groups] == ["_Launch", "_Launch", "_Launch", "_Loop"]
    table.run()
    for entry in made[:-2]:
        assert_packed(entry)
    for entry in made[-2:]:
        assert torch.equal(entry.destination, entry.source * entry.scale)


def test_moves_as_many_at_once_as_addresses_and_sizes_allow(device: torch.device) -> None:
    def vector(*made: PackEntry) -> int:
        (group,) = PackTable(list(made))._groups
        assert isinstance(group, pack._Launch)
        return group.vector

    eight, four = entries([((16, 64), (16, 64)), ((64, 4), (64, 16))], torch.float32, torch.float16, device)
    shifted = PackEntry(torch.randn(65, device=device)[1:].view(1, 64), eight.destination, 1.0)
    assert [vector(eight), vector(eight, four), vector(shifted)] == [8, 4, 1]


def test_runs_again_with_new_values_and_without_gradient(device: torch.device) -> None:
    parameter = torch.nn.Parameter(torch.randn(16, 24, device=device))
    destination = torch.zeros(16, 24, dtype=torch.float16, device=device)
    table = PackTable([PackEntry(parameter, destination, 2.0)])
    for _ in range(2):
        with torch.no_grad():
            parameter.add_(1)
        table.run()
        assert torch.equal(destination, (parameter.detach() * 2).half())
    assert not destination.requires_grad
    pack_ref(PackEntry(parameter, destination, 2.0))
    assert not destination.requires_grad


@pytest.mark.parametrize("change", ["moved", "cast", "cut", "destination"])
def test_valid_sees_a_tensor_that_moved(change: str, device: torch.device) -> None:
    parameter = torch.nn.Parameter(torch.randn(16, 24, device=device))
    destination = torch.zeros(16, 24, dtype=torch.float16, device=device)
    table = PackTable([PackEntry(parameter, destination, 1.0)])
    parameter.data.mul_(2)
    assert table.valid()
    if change == "moved":
        parameter.data = parameter.data.clone()
    elif change == "cast":
        parameter.data = parameter.data.half()
    elif change == "cut":
        parameter.data = parameter.data[:8]
    else:
        destination.data = destination.data.clone()
    assert not table.valid()


def test_refuses_entries_that_do_not_fit() -> None:
    def refuse(source: torch.Tensor, destination: torch.Tensor, message: str) -> None:
        fine = PackEntry(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
        with launch.interpreted(), pytest.raises(ValueError, match=message):
            PackTable([fine, PackEntry(source, destination, 1.0)])

    refuse(torch.zeros(4, 8), torch.zeros(4, 7), r"entry 1 of \(4, 8\) into \(4, 7\): .* no larger in either direction")
    refuse(
        torch.zeros(4), torch.zeros(4, 7), r"entry 1 of \(4,\) into \(4, 7\): source and destination must be matrices"
    )
    refuse(
        torch.zeros(4, 4), torch.zeros(4, 4, device="meta"), "source is on cpu, destination on meta; move them together"
    )
    refuse(torch.zeros(4, 8).T, torch.zeros(8, 4), r"source must hold .* in a row; got torch.float32, strides \(1, 8\)")
    refuse(torch.zeros(4, 4), torch.zeros(4, 4).int(), r"destination must hold floating-point .* got torch.int32")
