"""Many small matrices scaled, cast and copied to their places in one launch: an adapter's fp32 masters to its operands.

    destination[:rows, :cols] = round(scale · source)        for every entry; the rest of a destination is not written

An 8B model with LoRA on all linear layers has 448 such matrices (A and B of 7 projections in 32 layers); one copy each would
take longer to launch than to run. The table lies on the device, an int64 row an entry: the addresses, the sizes, the row
strides, the first tile. A program handles one tile of TILE elements of one entry, as many whole rows as fit; it learns which
from a second table, so that the grid holds no empty tiles. Moves 4 + 2 bytes an element (read fp32, write 16 bits) and one
entry a tile. Computed in fp32, rounded once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.kernels.launch import use_triton, wide

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations
    triton = None

TILE = 4096
"""Elements that a program handles; a power of two."""
MAX_VECTOR = 8
"""Elements that a thread moves at once: 16 bytes of a 16-bit destination."""
FIELDS = 8
"""int64 values of an entry: source, destination, rows, cols, their row strides, log2 of the tile's width, first tile."""


@dataclass(frozen=True)
class PackEntry:
    """destination[:rows, :cols] = round(scale · source).

    `source` (rows, cols) and `destination` (at least as large) are floating-point matrices on one device, each with unit
    column stride and any row stride. Pass a parameter itself, not its `.data`: `PackTable.valid` asks it where it lies now.
    """

    source: torch.Tensor
    destination: torch.Tensor
    scale: float


class PackTable:
    """The entries and, on a GPU, their device-side tables; keeps the tensors alive.

    Raises ValueError for an entry whose matrices do not fit each other, lie on two devices, or are not laid out in rows.
    """

    def __init__(self, entries: Sequence[PackEntry]):
        self.entries = list(entries)
        groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[PackEntry]] = defaultdict(list)
        for index, entry in enumerate(self.entries):
            _check(entry, index)
            if entry.source.numel():
                groups[entry.source.device, entry.source.dtype, entry.destination.dtype].append(entry)
        self._groups = [
            _Launch(group) if all(use_triton(x) for e in group for x in (e.source, e.destination)) else _Loop(group)
            for group in groups.values()
        ]
        self._tensors = [x for entry in self.entries for x in (entry.source, entry.destination)]
        self._places = self._now()

    def run(self) -> None:
        """Write all destinations, in one launch for each pair of source and destination types. No gradient flows.

        Reads and writes where the tensors lay when the table was made: check `valid` first.
        """
        for group in self._groups:
            group.run()

    def valid(self) -> bool:
        """Whether every tensor lies where it lay, of the type and size it had; if not, make a new table.

        0.5 ms for 448 entries (`Tensor.shape`, which it does not ask, would make it 3).
        """
        return self._now() == self._places

    def _now(self) -> list[object]:
        return [(x.data_ptr(), x.dtype, x.device, x.numel()) for x in self._tensors]


def pack_ref(entry: PackEntry) -> None:
    """One entry in plain PyTorch, computed in fp32 (fp64 stays fp64)."""
    rows, cols = entry.source.shape
    entry.destination[:rows, :cols].copy_(wide(entry.source.detach()) * entry.scale)


class _Loop:
    """Entries without a kernel: one copy each."""

    def __init__(self, entries: list[PackEntry]):
        self.entries = entries

    def run(self) -> None:
        for entry in self.entries:
            pack_ref(entry)


class _Launch:
    """Entries of one device and one pair of types: one launch."""

    def __init__(self, entries: list[PackEntry]):
        source, destination = entries[0].source, entries[0].destination
        self.source_type, self.destination_type = _TRITON_TYPES[source.dtype], _TRITON_TYPES[destination.dtype]
        table: list[list[int]] = []
        of_tile: list[int] = []
        self.vector = MAX_VECTOR
        for index, entry in enumerate(entries):
            rows, cols = entry.source.shape
            width = min(TILE, triton.next_power_of_2(cols))
            height = TILE // width
            row_strides = [_row_stride(entry.source), _row_stride(entry.destination)]
            addresses = [entry.source.data_ptr(), entry.destination.data_ptr()]
            table.append([*addresses, rows, cols, *row_strides, width.bit_length() - 1, len(of_tile)])
            of_tile += [index] * (-(-rows // height) * -(-cols // width))
            # How many neighbours may be moved as one: addresses, strides and sizes must all be multiples.
            elements = [
                a // x.element_size() for a, x in zip(addresses, (entry.source, entry.destination), strict=True)
            ]
            self.vector = math.gcd(self.vector, cols, *row_strides, *elements)
        self.num_tiles = len(of_tile)
        self.table = torch.tensor(table, dtype=torch.int64, device=source.device)
        self.scales = torch.tensor([e.scale for e in entries], dtype=torch.float32, device=source.device)
        self.of_tile = torch.tensor(of_tile, dtype=torch.int32, device=source.device)

    def run(self) -> None:
        _pack_kernel[(self.num_tiles,)](
            self.table,
            self.scales,
            self.of_tile,
            SOURCE=self.source_type,
            DESTINATION=self.destination_type,
            VECTOR=self.vector,
            FIELDS=FIELDS,
            TILE=TILE,
            num_warps=4,
        )


def _check(entry: PackEntry, index: int) -> None:
    source, destination = entry.source, entry.destination
    where = f"entry {index} of {tuple(source.shape)} into {tuple(destination.shape)}"
    if (
        source.dim() != 2
        or destination.dim() != 2
        or any(a > b for a, b in zip(source.shape, destination.shape, strict=True))
    ):
        raise ValueError(f"{where}: source and destination must be matrices, the source no larger in either direction")
    if source.device != destination.device:
        raise ValueError(
            f"{where}: source is on {source.device}, destination on {destination.device}; move them together"
        )
    for name, x in (("source", source), ("destination", destination)):
        if not x.is_floating_point() or (x.shape[1] > 1 and x.stride(1) != 1):
            raise ValueError(
                f"{where}: {name} must hold floating-point numbers side by side in a row; got {x.dtype}, strides {x.stride()}"
            )


def _row_stride(x: torch.Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


if triton is not None:
    _TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

    @triton.jit
    def _pack_kernel(
        table,
        scales,
        of_tile,
        SOURCE: tl.constexpr,
        DESTINATION: tl.constexpr,
        VECTOR: tl.constexpr,
        FIELDS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        entry = tl.load(of_tile + tl.program_id(0))
        scale = tl.load(scales + entry)
        field = table + entry.to(tl.int64) * FIELDS
        source = tl.load(field).to(tl.pointer_type(SOURCE))
        destination = tl.load(field + 1).to(tl.pointer_type(DESTINATION))
        rows = tl.load(field + 2)
        cols = tl.load(field + 3)
        source_stride = tl.load(field + 4)
        destination_stride = tl.load(field + 5)
        log_width = tl.load(field + 6).to(tl.int32)
        tile = tl.program_id(0) - tl.load(field + 7)

        width = 1 << log_width
        tiles_across = (cols + width - 1) >> log_width
        element = tl.arange(0, TILE)
        row = (tile // tiles_across) * (TILE >> log_width) + (element >> log_width)
        col = (tile % tiles_across) * width + (element & (width - 1))
        # Sizes read from memory tell the compiler nothing: say what `VECTOR` neighbours have in common.
        mask = tl.max_constancy((row < rows) & (col < cols), VECTOR)
        read = source + row * source_stride + col
        write = destination + row * destination_stride + col
        read = tl.max_contiguous(tl.multiple_of(read, VECTOR * SOURCE.primitive_bitwidth // 8), VECTOR)
        write = tl.max_contiguous(tl.multiple_of(write, VECTOR * DESTINATION.primitive_bitwidth // 8), VECTOR)
        value = tl.load(read, mask=mask).to(tl.float32) * scale
        tl.store(write, value.to(DESTINATION), mask=mask)
