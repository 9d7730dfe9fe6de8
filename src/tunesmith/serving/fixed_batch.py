"""The rows that are being answered, in fixed places: what one step launches is then the same every time, and CUDA graphs replay it.

A step of a 36-layer model with adapters is some 2,500 launches, and Python needs longer for them than the GPU: 98 ms where the weights
are read in 2. Keys and values lie in one tensor that is made once (layers, keys and values, P, G, C, d): P places for rows, C columns for
their tokens, token t of a row in column t. A prompt is read padded on the right, straight into the places of its rows; a row that leaves
frees its place, and where fewer steps' rows would do, the last rows move into the gaps. A step takes the first of 1, 2, 4, ... P places
that hold all rows, and the first of a few lengths that holds all columns: there is one graph for each such pair, one more where
adapters take part, and one for each size of prompts. Of each the first run goes launch by launch (libraries choose), the second is
captured. Places between rows that are not taken run along.

P x C is bounded by the memory there is. Rows that need more columns than C make the places fewer and longer, until all have gone.

Left out: pages (a place has room for the longest row), layers with sliding windows (running_batch.py has them).

Legend: P places, C columns, B rows of a step, T tokens of a prompt, G groups of heads that share keys, d a head's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from transformers import Cache, DynamicCache

from tunesmith.hardware import torch_dtype
from tunesmith.models.decode_graphs import (
    FixedLayer,
    one_query_attention,
    ran_out_in_capture,
    rounded_up,
    why_not_static,
)
from tunesmith.models.forward import ModelForward
from tunesmith.out_of_memory import release_memory
from tunesmith.serving.adapter_bank import BASE, AdapterBank
from tunesmith.serving.place_layers import PromptLayer, StepLayer, causal_attention
from tunesmith.serving.running_batch import R

GRAPHED_PROMPTS = 2048
"""Tokens of prompts, padding included, up to which a graph reads them: beyond, the GPU is busy for longer than Python."""

MAX_GRAPHS = 256
"""Graphs that are kept; the one that was used longest ago goes."""


def why_not_fixed(forward: ModelForward) -> str | None:
    """Why a model's rows cannot have fixed places, or None where they can."""
    if (reason := why_not_static(forward)) is not None:
        return reason
    if forward.decoder.config._attn_implementation == "eager":
        return "eager attention needs a mask over prompts"
    shapes = {tuple(states.shape) for layer in _probe(forward).layers for states in (layer.keys, layer.values)}
    return None if len(shapes) == 1 else "its layers have keys and values of several shapes"


def _probe(forward: ModelForward) -> Any:
    """The cache of one token: what keys and values look like."""
    with torch.inference_mode(), forward.autocast():
        ids = torch.zeros(1, 1, dtype=torch.long, device=forward.device)
        return forward.decoder(input_ids=ids, use_cache=True, past_key_values=DynamicCache()).past_key_values


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor
    version: int


class Places:
    """The memory of all rows, and the graphs over it. `max_rows` places at most; `tokens` bounds places x columns.

    `longest` is what a row can have at all. `captures` says whether graphs are made (on a GPU). `warn` is told why there are none.
    """

    def __init__(
        self,
        forward: ModelForward,
        bank: AdapterBank,
        max_rows: int,
        tokens: int,
        longest: int | None = None,
        captures: bool = False,
        warn: Callable[[str], None] = lambda text: None,
    ):
        self.forward, self.bank, self.max_rows = forward, bank, max_rows
        self.captures, self.warn = captures, warn
        self.most = rounded_up(longest) if longest else tokens
        self.tokens = min(tokens, max_rows * self.most)
        self.captured = self.replayed = self.launched = 0
        cache = _probe(forward)
        _, self._groups, _, self._size = cache.layers[0].keys.shape
        kept = torch_dtype(forward.dtype) if forward.dtype != "fp32" else cache.layers[0].keys.dtype
        device = forward.device
        with torch.inference_mode():
            whole = (len(cache.layers), 2, self.tokens * self._groups * self._size)
            self._memory = torch.zeros(whole, dtype=kept, device=device)
            self._staged = torch.zeros(3, max_rows, dtype=torch.long, pin_memory=device.startswith("cuda"))
            self._steps = torch.zeros(3, max_rows, dtype=torch.long, device=device)  # tokens, positions, adapters
            self._prompts: dict[tuple[int, int], torch.Tensor] = {}
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._ran: set[tuple[Any, ...]] = set()
        self._pool: Any = None
        self._stream: Any = None
        self.taken: dict[int, int] = {}
        """Places that rows have, and the columns of them that were written."""
        self._shape(*self._first())

    def _first(self) -> tuple[int, int]:
        return self.max_rows, min(self.tokens // self.max_rows, self.most)

    def shape_for(self, rows: int, longest: int) -> tuple[int, int] | None:
        """Places and columns for so many rows of up to `longest` tokens; None where there is no room for them."""
        places, columns = self._first()
        while columns < longest and places > rows:
            places = max(rows, places // 2)
            columns = min(self.tokens // places, self.most)
        return (places, columns) if columns >= longest and places >= rows else None

    def _shape(self, places: int, columns: int) -> None:
        """See the memory as so many places. What lies in it is in none."""
        self.places, self.columns = places, columns
        used = places * columns * self._groups * self._size
        self.states = self._memory[:, :, :used].view(len(self._memory), 2, places, self._groups, columns, self._size)

    def make_room(self, rows: int, longest: int) -> dict[int, int]:
        """Have places for `rows` rows of up to `longest` tokens. Returns where each place that was taken is now.

        Raises torch.OutOfMemoryError where there is no room, or none to move the rows: then all is as before.
        """
        shape = self.shape_for(rows, longest)
        if shape is None:
            raise torch.OutOfMemoryError(
                f"{rows} x {longest} tokens of keys and values are needed, and there is room for {self.tokens}"
            )
        enough = self.places >= rows and self.columns >= longest
        before, old = list(self.taken), self.states
        if (self.places, self.columns) == shape or (enough and before):
            return {place: place for place in before}
        width = max(self.taken.values(), default=0)
        # Layer by layer, as all would need the memory twice, by way of a copy, as old and new places overlap. Nothing is asked of the
        # allocator once rows have begun to move: it might refuse.
        aside = old.new_empty(2, len(before), self._groups, width, self._size)
        self._shape(*shape)
        if before:
            for was, now in zip(old, self.states, strict=True):
                for row, place in enumerate(before):
                    aside[:, row].copy_(was[:, place, :, :width])
                was.zero_()  # what is not finite may not stay where others come to lie (`clear`)
                now[:, : len(before), :, :width] = aside
        else:
            old[:, :, :, :, :1] = 0  # where steps wrote for nobody
        moved = dict(zip(before, range(len(before)), strict=True))
        self.taken = {moved[place]: columns for place, columns in self.taken.items()}
        return moved

    def free(self, count: int) -> list[int]:
        """The first places that nobody has."""
        return [place for place in range(self.places) if place not in self.taken][:count]

    def clear(self, place: int) -> None:
        """Nobody has it any more. Zeros: what is not finite would count in another row behind any mask (0 x NaN is NaN)."""
        self.states[:, :, place, :, : self.taken.pop(place)] = 0

    def move(self, source: int, target: int) -> None:
        """A row's keys and values go to another place."""
        written = self.taken[target] = self.taken[source]
        self.states[:, :, target, :, :written] = self.states[:, :, source, :, :written]
        self.clear(source)

    # -- forwards -----------------------------------------------------------------------------------------------------

    def step(self, rows: dict[int, tuple[int, int, int]]) -> torch.Tensor:
        """One token in each taken place: {place: (token, its position, adapter)}. Hidden states (B, hidden) by place."""
        count = self.step_size(max(rows) + 1, self.places)
        length = min(rounded_up(max(position for _, position, _ in rows.values()) + 1), self.columns)
        adapted = any(adapter != BASE for _, _, adapter in rows.values())
        nobody = (0, 0, BASE)
        given = [
            (token, position, self.bank.place(adapter))
            for token, position, adapter in (rows.get(place, nobody) for place in range(count))
        ]
        self._staged[:, :count] = torch.tensor(given).T
        self._steps.copy_(self._staged, non_blocking=True)
        for place, (_, position, _) in rows.items():
            self.taken[place] = max(self.taken[place], position + 1)
        key = ("step", self.places, self.columns, count, length, adapted)
        with one_query_attention(self.forward):
            return self._run(key, True, lambda: self._step(count, length, adapted))

    def read(self, prompts: Sequence[Sequence[int]], places: Sequence[int], adapters: Sequence[int]) -> torch.Tensor:
        """Read prompts into their places. Hidden states (B, hidden) of their last tokens."""
        count, width = self.step_size(len(prompts), self.max_rows), max(map(len, prompts))
        adapted = any(adapter != BASE for adapter in adapters)
        rounded = min(rounded_up(width), self.columns)
        graphed = self.captures and count * rounded <= GRAPHED_PROMPTS
        if graphed:
            width = rounded
        else:
            count = len(prompts)
        # Rows that fill up the number repeat the first: they write what it writes, into its place.
        rows = [0 if row >= len(prompts) else row for row in range(count)]
        given = []
        for row in rows:
            padding = [0] * (width - len(prompts[row]))
            given.append([*prompts[row], *padding, len(prompts[row]) - 1, places[row], self.bank.place(adapters[row])])
        ids = torch.tensor(given).to(self.forward.device)
        if graphed:
            if (count, width) not in self._prompts:
                self._prompts[count, width] = torch.zeros_like(ids)
            ids = self._prompts[count, width].copy_(ids)
        self.taken |= dict.fromkeys(places, width)
        key = ("prompts", self.places, self.columns, count, width, adapted)
        with causal_attention(self.forward):
            return self._run(key, graphed, lambda: self._read(ids, adapted))[: len(prompts)]

    @staticmethod
    def step_size(rows: int, most: int) -> int:
        """The number of rows that a forward is made for: powers of two, or `most`."""
        return min(1 << (rows - 1).bit_length(), most)

    def _select(self, adapted: bool, rows: torch.Tensor) -> None:
        if adapted:
            self.bank.select_places(rows)
        else:
            self.bank.select([BASE])

    def _step(self, count: int, length: int, adapted: bool) -> torch.Tensor:
        tokens, positions, adapters = (one[:count, None] for one in self._steps)
        self._select(adapted, adapters[:, 0])
        columns = torch.arange(length, device=positions.device)
        mask = torch.zeros(count, length, dtype=self._memory.dtype, device=positions.device)
        mask = mask.masked_fill_(columns > positions, -torch.inf)[:, None, None]
        layers = [
            StepLayer(keys[:count, :, :length], values[:count, :, :length], positions) for keys, values in self.states
        ]
        return self._decode(tokens, positions, layers, mask)[:, -1]

    def _read(self, given: torch.Tensor, adapted: bool) -> torch.Tensor:
        ids, (last, places, adapters) = given[:, :-3], given[:, -3:].unbind(1)
        self._select(adapted, adapters)
        positions = torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
        layers = [PromptLayer(keys, values, places) for keys, values in self.states]
        hidden = self._decode(ids, positions, layers, None)
        return hidden[torch.arange(len(ids), device=ids.device), last]

    def _decode(
        self, ids: torch.Tensor, positions: torch.Tensor, layers: Sequence[FixedLayer], mask: torch.Tensor | None
    ) -> torch.Tensor:
        output = self.forward.decoder(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=Cache(layers=list(layers)),
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    # -- graphs -------------------------------------------------------------------------------------------------------

    def _run(self, key: tuple[Any, ...], graphed: bool, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`work()`, replayed where its graph is there, captured when it comes the second time."""
        found = self._graphs.get(key)
        if found is not None and key[-1] and found.version != self.bank.version:
            del self._graphs[key]  # the adapters that it reads lie elsewhere now
            found = None
        if found is None and graphed and self.captures and key in self._ran:
            found = self._capture(key, work)
        if found is None:
            self.launched += 1
            output = work()
            if graphed and self.captures:
                self._ran.add(key)
            return output
        self._graphs[key] = self._graphs.pop(key)  # the last that was used, of MAX_GRAPHS
        self.replayed += 1
        found.graph.replay()
        return found.output

    def _capture(self, key: tuple[Any, ...], work: Callable[[], torch.Tensor]) -> _Graph | None:
        """Make a graph of `work`; None, and never again, where it cannot be captured."""
        self._stream = self._stream or torch.cuda.Stream(self.forward.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Around the graph's own: a capture whose end fails leaves its stream the current one. Other threads read adapters.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                output = work()
        except RuntimeError as error:
            failure = str(error).partition("\n")[0] or type(error).__name__
            ran_out = ran_out_in_capture(error)
        else:
            self._pool = self._pool or graph.pool()
            if len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = _Graph(graph, output, self.bank.version)
            self.captured += 1
            return self._graphs[key]
        self.captures = False
        if ran_out:
            release_memory()
        self.warn(f"no CUDA graph any more, steps go launch by launch: {failure}")
        return None


class FixedBatch(Generic[R]):
    """Rows in `places`. `rows[i]` is row i; its place is anywhere. It does what RunningBatch does (running_batch.py).

    With `whole` it reads prompts into places that `whole` has not taken, for `whole.join`.
    """

    def __init__(self, places: Places, whole: FixedBatch[R] | None = None):
        self.places = places
        self.rows: list[R] = []
        self._at: list[int] = []
        self._whole = whole

    def fits(self, rows: int, longest: int) -> bool:
        """Whether there is room for so many rows of up to `longest` tokens."""
        return self.places.shape_for(rows, longest) is not None

    def beside(self) -> FixedBatch[R]:
        """An empty batch for prompts that `join` will take in."""
        return FixedBatch(self.places, self)

    def read(self, rows: Sequence[R], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Start an empty batch: read the prompts. Returns the last hidden states (B, hidden)."""
        others: list[R] = self._whole.rows if self._whole else []
        moved = self.places.make_room(len(others) + len(rows), max(row.whole for row in [*others, *rows]))
        if self._whole:
            self._whole._at = [moved[place] for place in self._whole._at]
        at = self.places.free(len(rows))
        try:
            hidden = self.places.read(prompts, at, [row.adapter for row in rows])
            self.rows, self._at = list(rows), at
        finally:
            if not self.rows:
                for place in self.places.taken.keys() & set(at):
                    self.places.clear(place)
        for row, prompt in zip(rows, prompts, strict=True):
            row.length = len(prompt)
        return hidden

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read one more token of each row. Returns the hidden states (B, hidden). If it fails the batch is as before."""
        self._close_gaps()
        given = zip(self._at, tokens, self.rows, strict=True)
        hidden = self.places.step({place: (token, row.length, row.adapter) for place, token, row in given})
        for row in self.rows:
            row.length += 1
        if self._at == list(range(len(self._at))):
            return hidden[: len(self._at)]
        return hidden[torch.tensor(self._at, device=hidden.device)]

    def join(self, other: FixedBatch[R]) -> None:
        """Take in the rows of a batch that read `beside` this one, which is of no use afterwards."""
        self.rows += other.rows
        self._at += other._at

    def keep(self, places: Sequence[int]) -> None:
        """Leave out all rows but these."""
        kept = set(places)
        for number, place in enumerate(self._at):
            if number not in kept:
                self.places.clear(place)
        self.rows = [self.rows[number] for number in places]
        self._at = [self._at[number] for number in places]

    def clear(self) -> None:
        """Leave out all rows."""
        self.keep([])

    def _close_gaps(self) -> None:
        """Move the last rows into gaps where a step of fewer places would then do."""
        size, most = self.places.step_size, self.places.places
        while size(max(self._at) + 1, most) > size(len(self._at), most):
            row = self._at.index(max(self._at))
            (gap,) = self.places.free(1)
            self.places.move(self._at[row], gap)
            self._at[row] = gap
