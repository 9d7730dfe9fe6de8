"""A model forward that stops at the hidden states, so that the loss owns the head.

The head is the widest matrix product of a step and most of its rows are thrown away (prompts are not supervised): the
objective gathers the supervised rows first and applies the head to those. Architectures differ in what they do to the
logits; what this module knows is checked against the model itself before training (training/prepare.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from tunesmith.hardware import ComputeDType, torch_dtype
from tunesmith.models.fuse import engine_of

if TYPE_CHECKING:
    import torch

    from tunesmith.types import Batch


class ModelForward:
    """Runs a causal language model (transformers, with or without PEFT) in two halves: hidden states, then logits.

    `dtype` is the compute type: forwards run under autocast unless it is fp32.
    """

    def __init__(self, model: Any, device: str, dtype: ComputeDType):
        self.model = model
        self.device = device
        self.dtype = dtype
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.base = base
        self.decoder = base.get_decoder()
        self.head = base.get_output_embeddings()
        config = base.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        multiplier = getattr(config, "logit_scale", None)  # Cohere multiplies
        divisor = getattr(config, "logits_scaling", None)  # Granite divides
        self.loss_rows: int | None = None  # supervised rows whose logits exist at once; None: as fits speed
        self.scale: float = (1.0 if multiplier is None else multiplier) / (1.0 if divisor is None else divisor)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision context of every forward, in training, evaluation and generation alike."""
        import torch

        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=torch_dtype(self.dtype))

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm, (B, T, hidden). Documents of a packed batch do not see each other."""
        if (engine := engine_of(self.model)) is not None:
            engine.given_layout = batch.layout
        # A packed row has no mask and no cache: that is when transformers isolates documents by their positions.
        output = self.decoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32, (..., vocabulary), of hidden states (..., hidden)."""
        import torch

        logits = self.head(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits
