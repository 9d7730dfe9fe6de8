"""How many tokens' keys and values a server may hold."""

from __future__ import annotations

from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import cache_bytes_per_token

SHARE_OF_FREE_MEMORY = 0.7
"""What keys and values may take of the GPU memory that is free when the base is loaded: the rest is for the steps and adapters."""


def fitting_tokens(forward: ModelForward) -> int | None:
    """Tokens whose keys and values fit 0.7 of what is free on the GPU now; None on the CPU."""
    import torch

    if not forward.device.startswith("cuda"):
        return None
    free, _ = torch.cuda.mem_get_info(forward.device)
    free += torch.cuda.memory_reserved(forward.device) - torch.cuda.memory_allocated(forward.device)
    width = 2 if forward.dtype == "fp32" else 1
    return int(SHARE_OF_FREE_MEMORY * free / (cache_bytes_per_token(forward.base.config) * width))
