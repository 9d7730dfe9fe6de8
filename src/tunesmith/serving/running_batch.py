"""The rows that are being answered: one KV cache, padded on the left, that rows join and leave between two steps.

The cache keeps every key, also of layers with a sliding window (their masks cut it): left padding of unequal rows that come and go
leaves each row's own tokens next to each other, so that a window counts what it should.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch.nn import functional as F

from tunesmith.errors import ModelError
from tunesmith.models.forward import ModelForward

if TYPE_CHECKING:
    from tunesmith.serving.adapter_bank import AdapterBank

KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class Row(Protocol):
    """What a batch has to know of a row."""

    length: int
    """Tokens of it in the cache."""
    adapter: int
    """The number of its adapter, or BASE."""

    @property
    def whole(self) -> int:
        """Tokens that it may come to have there."""


R = TypeVar("R", bound=Row)


def refuse_recurrent(config: Any) -> None:
    """Raise ModelError for a model whose state is not keys and values of single tokens: rows could not be padded."""
    text = config.get_text_config()
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYERS)
    if odd or getattr(text, "attention_chunk_size", None):
        raise ModelError(
            f"model_type {text.model_type}: layers of type {', '.join(odd) or 'chunked attention'} cannot be served in a batch that "
            f"requests join and leave; those with {' and '.join(sorted(KNOWN_LAYERS))} can"
        )


def longest_row(config: Any) -> int | None:
    """Tokens that a row can have; None where the model does not say.

    Rotations that depend on how long the longest row of a batch is (LongRoPE, dynamic NTK) would make a row's answer depend on the
    others: such models answer within the length from which on they change, Phi-3's `original_max_position_embeddings`.
    """
    text = config.get_text_config()
    longest: int | None = getattr(text, "max_position_embeddings", None)
    given = getattr(text, "rope_parameters", None) or {}
    for rope in [given, *(value for value in given.values() if isinstance(value, dict))]:  # by kind of layer, in some
        if rope.get("rope_type") in ("longrope", "dynamic"):
            first = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            longest = min(one for one in (longest, first) if one is not None) if longest or first else None
    return longest


class Batch(Protocol[R]):
    """What the engine asks of the rows that it answers: RunningBatch, whose cache grows, or FixedBatch (fixed_batch.py)."""

    rows: list[R]

    def fits(self, rows: int, longest: int) -> bool:
        """Whether there is room for so many rows of up to `longest` tokens."""

    def beside(self) -> Any:
        """An empty batch of the same kind, for prompts that `join` will take in."""

    def read(self, rows: Sequence[R], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Start an empty batch: read the prompts. Returns the last hidden states (B, hidden)."""

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read one more token of each row. Returns the hidden states (B, hidden). If it fails the batch is as before."""

    def join(self, other: Any) -> None:
        """Take in the rows of another batch, which is of no use afterwards. If it fails this batch is as before."""

    def keep(self, places: Sequence[int]) -> None:
        """Leave out all rows but these. If it fails `rows` are those that were to stay, and only `clear` may follow."""

    def clear(self) -> None:
        """Leave out all rows."""


class RunningBatch(Generic[R]):
    """Rows with their cache. `rows[i]` is row i of every tensor. `tokens` bounds rows x the longest of them."""

    def __init__(self, forward: ModelForward, bank: AdapterBank | None = None, tokens: int | None = None):
        self.forward, self.bank, self.tokens = forward, bank, tokens
        self.rows: list[R] = []
        self._cache: Any = None
        self._mask = torch.empty(0)

    @property
    def width(self) -> int:
        """Places of the cache, padding included."""
        return 0 if self._cache is None else int(self._mask.shape[1])

    def fits(self, rows: int, longest: int) -> bool:
        """Whether there is room for so many rows of up to `longest` tokens."""
        return self.tokens is None or rows * longest <= self.tokens

    def beside(self) -> RunningBatch[R]:
        """An empty batch for prompts that `join` will take in."""
        return RunningBatch(self.forward, self.bank, self.tokens)

    def clear(self) -> None:
        """Leave out all rows."""
        self.rows, self._cache, self._mask = [], None, torch.empty(0)

    def read(self, rows: Sequence[R], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Start an empty batch: read the prompts. Returns the last hidden states (B, hidden)."""
        self._select(rows)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self._run(ids, mask.to(self.forward.device), positions, None)
        self.rows = list(rows)
        for row, prompt in zip(rows, prompts, strict=True):
            row.length = len(prompt)
        return hidden

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read one more token of each row. Returns the hidden states (B, hidden). If it fails the batch is as before."""
        self._select(self.rows)
        width = self.width
        positions = torch.tensor([[row.length] for row in self.rows])
        mask = F.pad(self._mask, (0, 1), value=1)
        try:
            hidden = self._run(torch.tensor(tokens)[:, None], mask, positions, self._cache)
        except (RuntimeError, MemoryError):  # out of memory: some layers have the new token, and others not
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[..., :width, :], layer.values[..., :width, :]
            raise
        for row in self.rows:
            row.length += 1
        return hidden

    def join(self, other: RunningBatch[R]) -> None:
        """Take in the rows of another batch, which is of no use afterwards. If it fails this batch is as before."""
        if self._cache is None:
            self.rows, self._cache, self._mask = other.rows, other._cache, other._mask
            return
        own, count = self.width, len(self.rows)
        width = max(own, other.width)
        try:
            for mine, its in zip(self._cache.layers, other._cache.layers, strict=True):
                mine.keys = torch.cat([_widen(mine.keys, width), _widen(its.keys, width)])
                mine.values = torch.cat([_widen(mine.values, width), _widen(its.values, width)])
            masks = [F.pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask, other._mask)]
            self._mask = torch.cat(masks)
        except (RuntimeError, MemoryError):  # out of memory: some layers have the new rows, and others not
            for mine in self._cache.layers:
                mine.keys = mine.keys[:count, :, mine.keys.shape[2] - own :]
                mine.values = mine.values[:count, :, mine.values.shape[2] - own :]
            raise
        self.rows += other.rows

    def keep(self, places: Sequence[int]) -> None:
        """Leave out all rows but these, and the padding that no row needs any more."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        if not self.rows:
            self.clear()
            return
        start = self.width - max(row.length for row in self.rows)
        first = list(places) == list(range(len(places)))  # then it takes no memory: whoever ran out leaves so
        index = slice(len(places)) if first else torch.tensor(places, device=self.forward.device)
        self._mask = self._mask[index, start:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[index, :, start:], layer.values[index, :, start:]

    def _select(self, rows: Sequence[R]) -> None:
        if self.bank is not None:
            self.bank.select([row.adapter for row in rows])

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        from transformers import DynamicCache

        output = self.forward.decoder(
            input_ids=ids.to(self.forward.device),
            attention_mask=mask,
            position_ids=positions.to(self.forward.device),
            past_key_values=DynamicCache() if cache is None else cache,
            use_cache=True,
        )
        self._cache, self._mask = output.past_key_values, mask
        hidden: torch.Tensor = output.last_hidden_state[:, -1]
        return hidden


def _widen(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values (B, heads, T, size) with zeros before them, `width` places in all."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))
