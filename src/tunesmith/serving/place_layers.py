"""What a forward sees of rows in fixed places (fixed_batch.py): cache layers that write where they are told, and attention over prompts.

Legend: B rows, T tokens of a prompt, C columns, G groups of heads that share keys, d a head's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin

from tunesmith.models.attention import REPEATED, repeated_sdpa
from tunesmith.models.forward import ModelForward

CAUSAL = "sdpa_causal"
"""The name under which transformers knows attention over prompts padded on the right: causal, and without any mask."""


class PlaceLayer(CacheLayerMixin):
    """What the places of one layer show of themselves to a forward: keys and values (B, G, C, d)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.at = keys, values, at
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the tensors came with the layer."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns, and the first of them."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """What the forward would count positions from; they are given."""
        return 0

    def get_max_length(self) -> int:
        """Columns."""
        return self.keys.shape[2]


class PromptLayer(PlaceLayer):
    """Prompts are written into the places `at` (B,), from column 0; attention sees them alone."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, G, T, d); returns it."""
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room[:, :, : states.shape[2]].index_copy_(0, self.at, states.to(room.dtype))
        return key_states, value_states


class StepLayer(PlaceLayer):
    """One token for each row, written into its column `at` (B, 1)."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, G, 1, d); returns all columns."""
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room.scatter_(2, self.at[:, :, None, None].expand_as(states), states.to(room.dtype))
        return self.keys, self.values


def _causal(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, None]:
    return repeated_sdpa(module, query, key, value, None, **options)


@contextmanager
def causal_attention(forward: ModelForward) -> Iterator[None]:
    """While prompts are read. transformers makes no mask for a name that has no function for it: not in a capture either."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    config = forward.decoder.config
    before = config._attn_implementation
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    AttentionInterface.register(f"{CAUSAL}_{REPEATED}", _causal)
    config._attn_implementation = f"{CAUSAL}_{REPEATED}" if before == REPEATED else CAUSAL
    try:
        yield
    finally:
        config._attn_implementation = before
