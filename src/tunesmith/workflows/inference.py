"""An adapter in another type, or over another quantization, than it was trained in: what that changes, measured once and remembered.

Both settings answer the fixed prompts of a merge; their effect is the mean KL(as trained ‖ as used) in nats a token, and the share of tokens whose
most likely next token stays. One side is the model that is loaded already, the other is read from the base's files one module at a time
(export/skeleton.py), in the type and with the quantization that it is to have, so that a measurement takes a pass over the files and no second model
in memory. It is kept in the cache folder by the hashes of adapter and base: the next load says it at once.

Left out: LLM.int8 as training's setting, and LoftQ, which files alone do not show; `adapters verify` loads both models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from tunesmith.config import QuantizationConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import MachineError, ModelError, RunError
from tunesmith.export.quantized import QuantizedWeights
from tunesmith.export.safetensors import fixed_prompts, mean_kl, plain_logits
from tunesmith.export.skeleton import Read, Skeleton, refuse_unstreamable
from tunesmith.export.tensors import Unstreamable
from tunesmith.files import cache_folder, sha256_text, write_json
from tunesmith.hardware import ComputeDType, torch_dtype
from tunesmith.models.adapters import load_adapter
from tunesmith.models.forward import autocast
from tunesmith.models.load import ModelSource, weight_hash
from tunesmith.registry.records import CONFIG, adapter_hash, read_json

if TYPE_CHECKING:
    from tunesmith.workflows.load import Found


class Unmeasured(Exception):  # no error of the user's: what is loaded works all the same
    """Why what another setting changes is not measured here; the message says it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The type that a model computes in, and how its base is quantized."""

    dtype: ComputeDType
    quantization: QuantizationConfig | None = None

    def __str__(self) -> str:
        return f"{self.dtype}{f' over a base in {self.quantization.scheme}' if self.quantization else ''}"

    @property
    def key(self) -> str:
        """The setting in a measurement's name."""
        return f"{self.dtype} {self.quantization.model_dump_json() if self.quantization else None}"


@dataclass(frozen=True, slots=True)
class Effect:
    """What another setting than training's changes on the fixed prompts: mean KL(trained ‖ used) in nats a token, the share of tokens with the same most
    likely next token, and how many tokens.
    """

    kl: float
    top1: float
    tokens: int

    @classmethod
    def between(cls, trained: torch.Tensor, used: torch.Tensor) -> Effect:
        """Of logits (tokens, vocabulary) in fp32."""
        agreement = float((trained.argmax(-1) == used.argmax(-1)).float().mean())
        return cls(mean_kl(trained, used), agreement, len(trained))


@dataclass(frozen=True, slots=True)
class Inference:
    """An adapter that is used in another setting than it was trained in."""

    adapter: Path
    source: ModelSource
    chat: ChatFormat
    device: str
    trained: Setting
    used: Setting
    loftq: int = 0

    @classmethod
    def unlike_training(cls, found: Found, used: Setting) -> Inference | None:
        """Of what is to be loaded; None where it is as it was trained, has no adapter, or nothing says how it was trained."""
        if found.adapter is None or found.trained_dtype not in get_args(ComputeDType):
            return None
        trained = Setting(found.trained_dtype, found.quantization)  # type: ignore[arg-type]  # one of them
        if trained == used:
            return None
        return cls(found.adapter, found.source, found.chat, found.hardware.device, trained, used, found.loftq)

    def said(self, effect: Effect | None, why: str = "") -> str:
        """One line for people, with the effect or why there is none."""
        begin = f"trained in {self.trained}, used here in {self.used}: "
        if effect is None:
            return f"{begin}what that changes is not measured: {why}"
        return (
            f"{begin}KL {effect.kl:.2e} nats a token from what was trained, top-1 agreement {effect.top1:.1%} ({effect.tokens} tokens of "
            "fixed prompts)"
        )

    def known(self) -> Effect | None:
        """What was measured before."""
        try:
            value = json.loads(self._place().read_text(encoding="utf-8"))
            return Effect(float(value["kl"]), float(value["top1"]), int(value["tokens"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, effect: Effect) -> None:
        """Remember a measurement."""
        place = self._place()
        with suppress(OSError, RunError, MachineError):  # a cache that cannot be written costs time
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, asdict(effect) | {"trained": str(self.trained), "used": str(self.used)})

    def _place(self) -> Path:
        parts = [adapter_hash(self.adapter), weight_hash(self.source), self.trained.key, self.used.key]
        return cache_folder() / "effects" / f"{sha256_text(parts)}.json"

    def measure(self, loaded: Any = None) -> Effect:
        """Measure it, and remember it; `loaded` is the model with the adapter as it is used, in memory already. Raises Unmeasured."""
        prompts = fixed_prompts(self.chat)
        try:
            with self._streamed(prompts, loaded is None) as logits:
                trained = logits(self.trained)
                if loaded is None:
                    used = logits(self.used)
                else:
                    with autocast(self.device, self.used.dtype):
                        used = plain_logits(loaded, prompts)
        except (Unstreamable, ModelError, MachineError) as error:
            raise Unmeasured(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise Unmeasured(
                f"no memory is left on {self.device} for one module of the base beside the model"
            ) from error
        effect = Effect.between(trained, used)
        self.keep(effect)
        return effect

    @contextmanager
    def _streamed(self, prompts: list[list[int]], both: bool) -> Iterator[Callable[[Setting], torch.Tensor]]:
        """Logits of base and adapter in the trained setting (and with `both` in the used one), from the files. Raises Unstreamable, Unmeasured,
        MachineError.
        """
        refuse_unstreamable([read_json(self.adapter / CONFIG) or {}])
        skeleton = Skeleton(self.source.path, self.device)
        # Before the adapter is on: which weights are quantized is read off the plain model.
        reads = {one.key: self._read(skeleton, one) for one in ((self.trained, self.used) if both else (self.trained,))}
        skeleton.put_on(load_adapter(skeleton.model, self.adapter))

        def logits(setting: Setting) -> torch.Tensor:
            with autocast(self.device, setting.dtype):
                found = skeleton.logits(prompts, reads[setting.key], dtype=torch_dtype(setting.dtype))
            if not bool(found.isfinite().all()):
                raise Unstreamable("its modules use weights of each other, or compute no finite numbers")
            return found

        try:
            yield logits
        finally:
            skeleton.close()

    def _read(self, skeleton: Skeleton, setting: Setting) -> Read:
        if setting.quantization is None:
            return skeleton.stored
        if self.loftq:
            raise Unmeasured("LoftQ's quantized base is not what its files quantized again give")
        if setting.quantization.scheme == "int8":
            raise Unmeasured("LLM.int8 rounds activations too, which the base's files do not show")
        weights = QuantizedWeights(skeleton, setting.quantization, torch_dtype(setting.dtype))
        if said := weights.misread():
            raise Unmeasured(said)
        return weights.read
