"""One loaded base for several runs: lent to a run, taken back when it is over, as it was.

A run with an adapter leaves its base's weights alone, so the next run can have the same object: the fused layers are put back
(`unfuse`), the adapter comes off (PEFT's `unload`), and what training left on modules is removed. Some settings change the base
itself; after a run with one of them it is dropped and the next run loads its own (`changes_base`). What is taken back must have
every bit of every weight that it had when it was loaded, by a checksum of each; a base that has not is dropped too.

Left out: giving weights that were changed their old values back, from a copy, which would need the memory for two.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from tunesmith.config import ModelConfig, QuantizationConfig, RunConfig
from tunesmith.hardware import ComputeDType, Hardware
from tunesmith.models.fuse import unfuse
from tunesmith.models.load import ModelSource, load_model, weight_hash

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by the bytes of an element, to look at its bits."""


def changes_base(config: RunConfig) -> str | None:
    """The setting with which a run changes more of its base than it can put back, as text; None for a run that does not."""
    adapter = config.adapter
    if config.method == "full":
        return "method full trains the base itself"
    if adapter.init_lora_weights != "default":
        return f"adapter.init_lora_weights {adapter.init_lora_weights} takes its beginning out of the base's weights"
    if adapter.new_tokens:
        return "adapter.new_tokens changes the embeddings"
    if adapter.modules_to_save:
        return "adapter.modules_to_save trains modules of the base"  # PEFT's unload leaves the trained ones in place
    if adapter.init_from:
        return "adapter.init_from may bring modules of its own"
    return None


class SharedBase:
    """Loads what a run needs, or lends what an earlier run gave back. `say` is told when a base is loaded once more, and why.

    `loads` counts how often weights were read. One run at a time.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None):
        self.loads = 0
        self._say = say
        self._model: Any = None
        self._key: tuple[Any, ...] = ()
        self._bits: dict[str, tuple[Any, ...]] = {}
        self._trainable: set[str] = set()
        self._why = ""

    def load(
        self,
        source: ModelSource,
        settings: ModelConfig,
        hardware: Hardware,
        dtype: ComputeDType,
        quantization: QuantizationConfig | None = None,
    ) -> Any:
        """The base: as `load_model` loads it, or the one at hand if it was loaded from the same weights in the same way."""
        key = (
            str(source.path.resolve()),
            weight_hash(source),
            settings.attention,
            settings.trust_remote_code,
            hardware.device,
            dtype,
            quantization.model_dump_json() if quantization else None,
        )
        if self._model is not None and key == self._key:
            model, self._model = self._model, None
            return model
        if self._model is not None:
            self.drop("this run loads it in another way")
        if self.loads:
            self._say(f"the base is loaded again: {self._why or 'the run before this one failed'}")
        model = load_model(source, settings, hardware, dtype, quantization)
        self.loads += 1
        self._key, self._bits, self._why = key, weight_bits(model), ""
        self._trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        return model

    def take_back(self, model: Any, config: RunConfig) -> None:
        """Take the model of a run that is over, without its adapter, for the next run; drop it where the run changed it."""
        if why := changes_base(config):
            self._why = f"in the run before, {why}"
            return
        unfuse(model)
        base = model.unload()
        _forget_training(base)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        bits = weight_bits(base)
        changed = [name for name in bits if self._bits.get(name) != bits[name]]
        if changed or len(self._bits) != len(bits):
            self._why = f"the run before changed {', '.join(changed[:3]) or 'which weights it has'}"
            return
        self._model = base

    def drop(self, why: str) -> None:
        """Let go of the base."""
        self._model, self._why = None, why
        self.release_memory()

    @staticmethod
    def release_memory() -> None:
        """Give back what no live object holds: the next run plans with what is free."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)  # the cap of a run with `memory.limit_gb`


def weight_bits(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Of every parameter and buffer its shape, type and the sum of its bits, read as whole numbers. Reads each once."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        bits = tensor.detach().contiguous().view(BITS[tensor.element_size()])
        found[name] = (tuple(tensor.shape), tensor.dtype, int(bits.sum(dtype=torch.int64)))
    return found


def _forget_training(base: Any) -> None:
    """Undo what training sets on a model beside its adapter: checkpointing, the rows of dropout, the mode."""
    base.gradient_checkpointing_disable()
    vars(base.get_decoder()).pop("mask_source", None)
    base.eval()
