"""transformers' sdpa where no kernel takes grouped keys: each key and value is repeated for the queries that share it.

Without a mask transformers hands PyTorch fewer keys than queries (`enable_gqa`). Only FlashAttention and cuDNN take those,
in 16 bits and from compute capability 8.0 on; anything else (a T4, fp32) falls to PyTorch's math path without a word, which
keeps every score of every layer. Repeated keys go to the memory-efficient kernel, whose memory grows with the tokens alone.

A name is registered beside transformers' own, through the interface that it has for that; nothing of it is changed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tunesmith.hardware import ComputeDType, Hardware

if TYPE_CHECKING:
    import torch

REPEATED = "sdpa_repeated"
"""The name under which transformers knows `repeated_sdpa`."""


def takes_grouped_keys(capability: tuple[int, int], dtype: ComputeDType) -> bool:
    """Whether PyTorch has a kernel for keys shared by several queries, on an NVIDIA GPU of this compute capability."""
    return dtype != "fp32" and capability >= (8, 0)


def implementation(asked: str, hardware: Hardware, dtype: ComputeDType) -> str:
    """The name to give transformers where `asked` was asked for: sdpa means repeated keys where grouped ones are slow."""
    if asked != "sdpa" or hardware.type != "cuda" or takes_grouped_keys(hardware.capability or (0, 0), dtype):
        return asked
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(REPEATED, repeated_sdpa)
    AttentionMaskInterface.register(REPEATED, sdpa_mask)
    return REPEATED


def repeated_sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention function (its signature) on query (B, H, S, d) and key, value (B, G, S, d), G dividing H.

    A single query, as in generation, keeps its grouped keys: its scores are few, and a cache would be copied for each token.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    group = query.shape[1] // key.shape[1]
    if group > 1 and query.shape[2] > 1:
        key, value = repeat_kv(key, group), repeat_kv(value, group)
        # It groups what a module says is grouped.
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(module, query, key, value, mask, **options)
