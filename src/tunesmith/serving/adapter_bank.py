"""Several LoRA adapters over one base, each row of a batch with its own.

For a linear layer with weight W and adapters k = 1..K, row b of the batch, which asks for adapter k(b), gets

    y_b = W x_b + s_k B_k A_k x_b                                                    (LoRA, arXiv 2106.09685)

The A's of all adapters of a layer stand below each other, A (R, in) with R the sum of the ranks, and so do the transposed
s B's, (R, out). A mixed batch takes two products and one mask for any number of adapters:

    h = x A^T (B, T, R);   h is set to 0 in the columns of other rows' adapters;   y = W x + h (sB)

which adds exact zeros for the others. A batch whose rows all want one adapter takes that adapter's slice; one that wants the base
takes nothing. PEFT's own mixed batches (`adapter_names`) cost a gather, two products and a scatter for every adapter of every layer,
and copy index lists to the device for each: that is why they are not used. What this costs instead is R: the products grow with the
ranks of all adapters that are loaded, used or not, which is little beside W up to some hundreds.

The products hang on the layers as forward hooks of this instance; nothing else of the model changes, and `close` takes them off.

Left out, and refused: what is more than B A on a linear layer (DoRA, whole modules, rows of new tokens, experts, embeddings, biases).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from tunesmith.errors import ModelError
from tunesmith.models.forward import ModelForward
from tunesmith.out_of_memory import is_out_of_memory
from tunesmith.serving.adapter_files import AdapterWeights

BASE = -1
"""The number of no adapter."""


def layers_without_rows(forward: ModelForward) -> dict[str, tuple[int, ...]]:
    """Linear layers of the decoder that do not see (rows, tokens, width), as routers and experts do not, and what they see.

    Read off a forward of two rows of three tokens. A layer that took no part in it counts as its siblings do, other numbers in its
    name: some experts get no token.
    """
    seen: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Any:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = tuple(inputs[0].shape)

        return see

    linear = [(name, one) for name, one in forward.base.named_modules() if isinstance(one, torch.nn.Linear)]
    handles = [module.register_forward_pre_hook(record(name)) for name, module in linear]
    try:
        with torch.inference_mode(), forward.autocast():
            ids = torch.zeros(2, 3, dtype=torch.long, device=forward.device)
            forward.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    odd = {name: shape for name, shape in seen.items() if len(shape) != 3 or shape[0] != 2}
    of_kind = {_kind(name): shape for name, shape in odd.items()}
    unseen = [name for name, _ in linear if name not in seen and _kind(name) in of_kind]
    return {**odd, **{name: of_kind[_kind(name)] for name in unseen}}


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


@dataclass(slots=True)
class _Layer:
    """The stacked matrices of one linear layer. `owners` says which rows of them are whose: (place, start, stop)."""

    a: torch.Tensor
    b: torch.Tensor
    owners: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an adapter lies: `number` in the layers' `owners`, and the rank that it has room for in each layer."""

    number: int
    ranks: Mapping[str, int]


class AdapterBank:
    """Holds adapters by number, and adds their products to the base's layers in every forward behind `select`.

    `without_rows` are the layers that no adapter may have (layers_without_rows). `version` changes when the adapters lie elsewhere
    than they did: graphs that were captured read memory which is no longer theirs. An adapter that takes the place of another
    leaves it as it is.
    """

    def __init__(self, base: torch.nn.Module, device: str, without_rows: Mapping[str, tuple[int, ...]] | None = None):
        self.device = device
        self.version = 0
        self._without_rows = without_rows or {}
        self._modules = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
        self._layers: dict[str, _Layer] = {}
        self._handles: dict[str, Any] = {}
        self._places: dict[int, _Place] = {}
        self._spare: _Place | None = None
        self._left: set[int] = set()
        self._next = 0
        self._only: int | None = BASE
        self._rows = torch.empty(0)
        self._others: dict[tuple[tuple[int, int, int], ...], torch.Tensor] = {}
        self._columns: dict[tuple[tuple[int, int, int], ...], torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """What all adapters take on the device."""
        return sum(part.numel() * part.element_size() for layer in self._layers.values() for part in (layer.a, layer.b))

    @property
    def numbers(self) -> list[int]:
        """The adapters that are here."""
        return sorted(self._places)

    def add(self, weights: AdapterWeights) -> int:
        """Take an adapter in; returns its number, which no other ever has. The caller lets go of `weights`.

        Raises ModelError for one on a layer that cannot tell the rows of a batch apart.
        """
        for name in weights.layers.keys() & self._without_rows.keys():
            raise ModelError(
                f"{name}: this layer of the base sees {self._without_rows[name]} where 2 rows of 3 tokens were given, so that rows "
                "with several adapters cannot be told apart; merge this adapter (`tunesmith merge`) and serve it alone"
            )
        number, self._next = self._next, self._next + 1
        ranks = {name: len(a) for name, (a, _) in weights.layers.items()}
        if self._spare is not None and self._spare.ranks == ranks:
            place = self._spare
            for name, (a, b) in weights.layers.items():
                layer = self._layers[name]
                ((start, stop),) = [(start, stop) for owner, start, stop in layer.owners if owner == place.number]
                layer.a[start:stop], layer.b[start:stop] = a, b
            self._spare = None
        else:
            place = _Place(number, ranks)
            self._append(place, weights)
        self._places[number] = place
        return number

    def _append(self, place: _Place, weights: AdapterWeights) -> None:
        try:
            for name, (a, b) in weights.layers.items():
                layer = self._layers.get(name)
                if layer is None:
                    self._layers[name] = _Layer(a, b, ((place.number, 0, len(a)),))
                    self._handles[name] = self._modules[name].register_forward_hook(self._hook(name))
                else:
                    start = len(layer.a)
                    layer.a, layer.b = torch.cat([layer.a, a]), torch.cat([layer.b, b])
                    layer.owners = (*layer.owners, (place.number, start, start + len(a)))
        except (RuntimeError, MemoryError):  # out of memory: some layers have it, and others not
            self._free(place)
            raise
        self._moved()

    def remove(self, number: int, replaced: bool = False) -> None:
        """Let go of an adapter that no row of the next forwards wants, and of its memory.

        The place of one that was `replaced` stays for the next, until another is replaced or one is removed for good.
        """
        left, spare = self._places.pop(number), self._spare
        self._spare = left if replaced else None
        for place in (spare, None if replaced else left):
            if place is not None:
                self._free(place)

    def _free(self, place: _Place) -> None:
        """Take a place out of every layer, and what was left of others before. It takes memory to give some back: a layer for which there
        is none keeps the place's columns, which are nobody's, until the next time.
        """
        self._left.add(place.number)
        for name in list(self._layers):
            try:
                self._shrink(name)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        self._left &= {number for layer in self._layers.values() for number, _, _ in layer.owners}
        self._moved()

    def _shrink(self, name: str) -> None:
        layer = self._layers[name]
        kept = [owner for owner in layer.owners if owner[0] not in self._left]
        if len(kept) == len(layer.owners):
            return
        if not kept:
            self._handles.pop(name).remove()
            del self._layers[name]
            return
        a = torch.cat([layer.a[start:stop] for _, start, stop in kept])
        layer.a, layer.b = a, torch.cat([layer.b[start:stop] for _, start, stop in kept])
        owners, at = [], 0
        for owner, start, stop in kept:
            owners.append((owner, at, at + stop - start))
            at += stop - start
        layer.owners = tuple(owners)

    def _moved(self) -> None:
        """Adapters lie elsewhere: note whose each column is, for each arrangement of columns that layers have."""
        self.version += 1
        self._columns = {}
        for layer in self._layers.values():
            self._columns_of(layer.owners)

    def _columns_of(self, owners: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
        """(R,): the place that each column belongs to. Made before graphs are captured, which cannot copy it to the device."""
        if owners not in self._columns:
            of_column = [place for place, start, stop in owners for _ in range(stop - start)]
            self._columns[owners] = torch.tensor(of_column, device=self.device)
        return self._columns[owners]

    def place(self, number: int) -> int:
        """What `select_places` calls an adapter, or BASE. Raises ValueError for one that is not here."""
        if number == BASE:
            return BASE
        if number not in self._places:
            raise ValueError(f"no adapter has the number {number}")
        return self._places[number].number

    def select(self, rows: Sequence[int]) -> None:
        """Say whose each row of the next forwards is: the number of an adapter, or BASE. Raises ValueError for one not here."""
        places = [self.place(number) for number in rows]
        self._only = places[0] if len(set(places)) == 1 else None
        self._others = {}
        if self._only is None:
            self._rows = torch.tensor(places, device=self.device)

    def select_places(self, rows: torch.Tensor) -> None:
        """`select` by a tensor (B,) of places on the device, which a graph reads anew in every replay."""
        self._only, self._others, self._rows = None, {}, rows

    def close(self) -> None:
        """Take the hooks off: the model is as it was."""
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._layers, self._places, self._spare, self._left = {}, {}, {}, None, set()

    def _hook(self, name: str) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return self._added(name, inputs[0], output)

        return add

    def _added(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        layer = self._layers[name]
        if self._only is not None:
            for number, start, stop in layer.owners:
                if number == self._only:
                    return _plus(output, F.linear(x, layer.a[start:stop]), layer.b[start:stop])
            return output
        if x.ndim != 3 or len(x) != len(self._rows):
            raise ModelError(
                f"{name}: this layer sees {tuple(x.shape)} where (rows, tokens, width) was expected, so that rows with several "
                "adapters cannot be told apart; serve one adapter, merged into its base"
            )
        h = F.linear(x, layer.a)
        # Filled, not multiplied by 0: what overflows in another adapter must not become NaN here.
        return _plus(output, h.masked_fill_(self._of_others(layer.owners), 0.0), layer.b)

    def _of_others(self, owners: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
        """(B, 1, R), true where a column is not of the row's adapter. Made once a forward for each arrangement of columns."""
        if owners not in self._others:
            self._others[owners] = self._rows[:, None, None] != self._columns_of(owners)
        return self._others[owners]


def _plus(output: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """output + h B in one product, in place: nobody else has what a linear layer just returned."""
    if output.dtype != h.dtype:  # a 4-bit layer returns its input's type, whatever autocast computes in
        return output + (h @ b).to(output.dtype)
    output.view(-1, output.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b)
    return output
