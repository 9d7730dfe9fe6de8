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
from tunesmith.models.neftune import add_noise
from tunesmith.models.row_dropout import Draw, mask_source

if TYPE_CHECKING:
    import torch

    from tunesmith.types import Batch


PEFT_WRAPPERS = ("ModulesToSaveWrapper", "TrainableTokensWrapper")
"""What PEFT puts around a module that trains in full, or some of whose rows do; its `weight` is the one in use."""


def autocast(device: str, dtype: ComputeDType) -> AbstractContextManager[Any]:
    """The context in which a device computes in `dtype`."""
    import torch

    if dtype == "fp32":
        return nullcontext()
    return torch.autocast(device.split(":")[0], dtype=torch_dtype(dtype))


class ModelForward:
    """Runs a causal language model (transformers, with or without PEFT) in two halves: hidden states, then logits.

    `dtype` is the compute type: forwards run under autocast unless it is fp32. Whoever trains sets `dropout_seed` in every
    optimizer step (`row_dropout.step_seed`): then dropout is a function of it and of the tokens, if the batches have
    `dropout_rows`. Without (None) dropout draws from torch's generator. `neftune_alpha` is the noise on the embeddings in training,
    of batches with `dropout_rows` alone (models/neftune.py).
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
        self.dropout_seed: int | None = None
        self.neftune_alpha = 0.0

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision context of every forward, in training, evaluation and generation alike."""
        return autocast(self.device, self.dtype)

    @property
    def wants_dropout_rows(self) -> bool:
        """Whether batches need `dropout_rows`: there is a seed, and a model with dropout that draws by rows, or noise."""
        draws = mask_source(self.decoder) is not None or self.neftune_alpha > 0
        return self.dropout_seed is not None and draws

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm, (B, T, hidden). Documents of a packed batch do not see each other."""
        if (engine := engine_of(self.model)) is not None:
            engine.given_layout = batch.layout
        # A packed row has no mask and no cache: that is when transformers isolates documents by their positions.
        with self._drawing(batch):
            output = self.decoder(
                **self._inputs(batch),
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The token ids, or in training with noise their embeddings and it."""
        rows, lengths, seed = batch.dropout_rows, batch.document_lengths, self.dropout_seed
        if not self.neftune_alpha or not self.model.training or rows is None or lengths is None or seed is None:
            return {"input_ids": batch.input_ids}
        embeddings = self.base.get_input_embeddings()(batch.input_ids)
        return {"inputs_embeds": add_noise(embeddings, self.neftune_alpha, lengths, seed, rows)}

    def _drawing(self, batch: Batch) -> AbstractContextManager[None]:
        """The context in which dropout knows the rows of `batch`."""
        source = mask_source(self.decoder)
        if source is None or self.dropout_seed is None or batch.dropout_rows is None:
            return nullcontext()
        return source.during(Draw(batch.dropout_rows, self.dropout_seed))

    def head_matrix(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight (V, D) and bias (V) of a head that is a plain matrix; None for one that must be called.

        A head that trains in full beside an adapter, or some of whose rows do, is one in PEFT's wrapper: what the wrapper's
        forward multiplies by is taken, with its graph.
        """
        import torch

        head: Any = self.head
        kind = type(head).__name__
        inner = head.original_module if kind in PEFT_WRAPPERS else head
        if type(inner) is not torch.nn.Linear:  # subclasses do something else in their forward
            return None
        if kind == "TrainableTokensWrapper":
            return None if inner.bias is not None else (head.weight, None)
        return head.weight, head.bias

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32, (..., vocabulary), of hidden states (..., hidden)."""
        import torch

        logits = self.head(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits
