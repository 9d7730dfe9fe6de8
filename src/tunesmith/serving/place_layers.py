"""What a forward sees of rows in fixed places (fixed_batch.py): cache layers that write where they are told, and attention over prompts.

Legend: B rows, T tokens of a prompt, C columns, G groups of heads that share keys, d a head's size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import AttentionInterface

from tunesmith.models.attention import REPEATED, repeated_sdpa
from tunesmith.models.decode_graphs import FixedLayer, attention
from tunesmith.models.forward import ModelForward

CAUSAL, CAUSAL_REPEATED = "sdpa_causal", "sdpa_causal_repeated"
"""The names under which transformers knows attention over prompts padded on the right: causal, and without any mask."""


class PromptLayer(FixedLayer):
    """Prompts are written into the places `at` (B,), from column 0; attention sees them alone."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, G, T, d); returns it."""
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room[:, :, : states.shape[2]].index_copy_(0, self.at, states.to(room.dtype))
        return key_states, value_states


class StepLayer(FixedLayer):
    """One token for each row, written into its column `at` (B, 1)."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, G, 1, d); returns all columns."""
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room.scatter_(2, self.at[:, :, None, None].expand_as(states), states.to(room.dtype))
        return self.keys, self.values


def causal_attention(forward: ModelForward) -> AbstractContextManager[None]:
    """While prompts are read. transformers makes no mask for a name that has no function for it: not in a capture either."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    AttentionInterface.register(CAUSAL_REPEATED, repeated_sdpa)
    repeated = forward.decoder.config._attn_implementation == REPEATED
    return attention(forward, CAUSAL_REPEATED if repeated else CAUSAL)
