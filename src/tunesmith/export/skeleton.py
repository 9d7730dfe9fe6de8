"""A model without its weights: every parameter is one NaN, spread over its shape, and real only while a module computes.

PEFT puts an adapter on it as on any other model, and the adapter's own matrices are real. What is done with weights is then done for
one module at a time: `merged` gives a parameter with the adapter in it, by PEFT's own `merge`, and `logits` runs the model with each
module's weights read as its turn comes. The NaN makes what was read past this visible: nothing can come out right without its weights.

All is computed in fp32 unless asked otherwise, whatever the weights are stored in, on any device; a GPU holds one module's weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ModelError, VerificationError
from tunesmith.export.large import LookUp, in_rows, is_large_embedding, is_large_linear
from tunesmith.export.tensors import Checkpoint, Unstreamable, check_whole
from tunesmith.models.load import TEXT_TOWERS

PEFT_PARTS = re.compile(r"(\.token_adapter)?(\.(base_layer|original_module))+\.")
"""What PEFT puts into the name of a base weight, for experts once for each parameter that it adapts."""

Read = Callable[[str], torch.Tensor]
"""A parameter of the base by the model's own name, as stored or changed."""

LORA_STARTS = ("gaussian", "orthogonal", "eva")
"""Of `init_lora_weights`: those that leave the base's weights as they are. PiSSA, OLoRA, CorDA and LoftQ take their beginning out."""


class Skeleton:
    """A causal language model of a folder whose weights stay in its files. `model` may get an adapter; then `adapted` is it.

    Raises Unstreamable for what cannot be taken apart like this: code of its own, weights stored quantized.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu"):
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise Unstreamable("its weights are stored quantized")
        if hasattr(config, "auto_map"):
            raise Unstreamable("it runs code of its own")
        mapping = TEXT_TOWERS.get(config.model_type)
        self.renamed = mapping is not None
        """Whether it is the text model out of another one, whose files have other names."""
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(
                config.get_text_config() if mapping else config, dtype=torch.float32, attn_implementation="eager"
            )
        self.device = torch.device(device)
        self.model.eval().requires_grad_(False)
        self.checkpoint = Checkpoint(folder, self.model, mapping)
        self.tied = _both_ways(getattr(self.model, "all_tied_weights_keys", None) or {})
        check_whole(self.checkpoint, self.tied)
        self.names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._empty()
        persistent = self.checkpoint.shapes.keys() - self.names
        for name, buffer in self.model.named_buffers():
            value = self.checkpoint.read(name) if name in persistent else buffer
            owner, _, own = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[own] = value.to(self.device, buffer.dtype, copy=True)
        self.adapted: Any = self.model
        self.places = self._find_places()

    def _empty(self) -> None:
        """Give every parameter its NaN; modules that share one go on sharing it."""
        nan = torch.full((), torch.nan, device=self.device)
        made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.nn.Parameter(nan.expand(parameter.shape), requires_grad=False)
                    module._parameters[name] = made.setdefault(parameter, empty)

    def put_on(self, adapted: Any) -> None:
        """Take `adapted`, a PeftModel over `model`, as what computes from now on. Embeddings that grew for it are emptied again."""
        self.adapted = adapted.eval()
        self.places = self._find_places()
        nan = torch.full((), torch.nan, device=self.device)
        for full in self.places.values():
            parameter = self.model.get_parameter(full)
            parameter.data = nan.expand(parameter.shape)

    def _find_places(self) -> dict[str, str]:
        """The base's parameters by their own names: what they are called now, inside PEFT's wrappers."""
        found = (full for full, _ in self.model.named_parameters(remove_duplicate=False))
        return {name: full for full in found if (name := PEFT_PARTS.sub(".", full)) in self.names}

    def stored(self, name: str) -> torch.Tensor:
        """A parameter as the files have it; a tied one may be there under its partner's name."""
        return self.checkpoint.read(name if name in self.checkpoint.targets else self.tied[name])

    def changed(self) -> set[str]:
        """Names of the parameters that the adapter changes."""
        return {name for name, full in self.places.items() if self._wrapper(full) is not None}

    def _wrapper(self, full: str) -> Any:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        module = self.model
        for part in full.split(".")[:-1]:
            module = getattr(module, part)
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                return module
        return None

    def shape(self, name: str) -> torch.Size:
        """What a parameter's shape is with the adapter on: embeddings may have grown."""
        return self.model.get_parameter(self.places[name]).shape

    def _fit(self, name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """`tensor` in fp32 on the device, with rows of zeros where the adapter's new tokens are."""
        tensor = tensor.to(self.device, torch.float32)
        if tensor.shape == shape:
            return tensor
        if tensor.ndim != len(shape) or tensor.shape[1:] != shape[1:] or len(tensor) > shape[0]:
            raise Unstreamable(f"{name} is {tuple(tensor.shape)} in the files and {tuple(shape)} in the model")
        grown = torch.zeros(shape, device=self.device)
        grown[: len(tensor)] = tensor
        return grown

    def merged(self, name: str, read: Read | None = None) -> torch.Tensor:
        """A parameter with the adapter in it, in fp32: what PEFT's `merge` makes of it. Raises VerificationError where that is no number."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        read = read or self.stored
        full = self.places[name]
        wrapper, parameter = self._wrapper(full), self.model.get_parameter(full)
        if isinstance(wrapper, ModulesToSaveWrapper):
            inner = full.partition(".original_module.")[2]
            saved = wrapper.modules_to_save[wrapper.active_adapters[0]]
            return saved.get_parameter(inner).detach().to(torch.float32)
        ending = name.rpartition(".")[2]
        layers = [
            each
            for each in (wrapper.modules() if wrapper is not None else ())
            if isinstance(each, BaseTunerLayer) and getattr(each, "parameter_name", ending) == ending
        ]
        needed = {name: parameter}
        if layers and not any(hasattr(each, "parameter_name") for each in layers):
            # PEFT has one `merge` for a layer's weight and bias.
            beside = {
                own: other for own, other in self.places.items() if other.startswith(full.rpartition(".")[0] + ".")
            }
            needed = {own: self.model.get_parameter(other) for own, other in beside.items()}
        empty = [(place, place.data) for place in needed.values()]
        try:
            for own, place in needed.items():
                place.data = self._fit(own, read(own), place.shape)
            for layer in layers:
                try:
                    layer.merge(safe_merge=True)  # in a copy: what was read may lie in the file
                except ValueError as error:
                    raise VerificationError(f"{name}: {error}; nothing was kept") from error
                except RuntimeError as error:
                    refuse_without_bias(error, name)
                    raise
                layer.merged_adapters.clear()
            return parameter.data
        finally:
            for place, nothing in empty:
                place.data = nothing

    @contextmanager
    def _filled(self, read: Read, dtype: torch.dtype) -> Iterator[None]:
        """For the length of the block each module reads its weights, in `dtype`, when it is called, and lets go of them afterwards."""
        by_module: dict[torch.nn.Module, list[tuple[str, str]]] = {}
        for name, full in self.places.items():
            module = self._wrapper(full) or self.model.get_submodule(full.rpartition(".")[0])
            by_module.setdefault(module, []).append((full, name))
        handles: list[Any] = []
        chunked: list[Any] = []
        for module, parameters in by_module.items():
            if self._in_parts(module, parameters, read, dtype, handles, chunked):
                continue
            places = [(self.model.get_parameter(full), name) for full, name in parameters]
            empty = [place.data for place, _ in places]

            def fill(*_: Any, places: Any = places) -> None:
                for place, name in places:
                    place.data = self._fit(name, read(name), place.shape).to(self.kept_in(name, dtype))

            def drop(*_: Any, places: Any = places, empty: Any = empty) -> None:
                for (place, _), nothing in zip(places, empty, strict=True):
                    place.data = nothing

            handles += [module.register_forward_pre_hook(fill), module.register_forward_hook(drop, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in chunked:
                del module.forward

    def _in_parts(
        self,
        module: Any,
        parameters: list[tuple[str, str]],
        read: Read,
        dtype: torch.dtype,
        handles: list[Any],
        chunked: list[Any],
    ) -> bool:
        """Whether a module is one of large.py's, which is then prepared for `_filled`: its matrix never is in memory whole in fp32."""
        names = {full.rpartition(".")[2]: name for full, name in parameters}
        if "weight" not in names or self.checkpoint_shape(names["weight"]) != module.weight.shape:
            return False
        stored = partial(read, names["weight"])
        kept = self.kept_in(names["weight"], dtype)
        if is_large_embedding(module):
            look_up = LookUp(module, stored, self.device, kept)
            handles += [
                module.register_forward_pre_hook(look_up.before),
                module.register_forward_hook(look_up.after, always_call=True),
            ]
            return True
        if is_large_linear(module):

            def forward(x: torch.Tensor) -> torch.Tensor:
                bias = read(names["bias"]) if "bias" in names else None
                return in_rows(x, stored(), bias, kept)

            module.forward = forward
            chunked.append(module)
            return True
        return False

    def checkpoint_shape(self, name: str) -> torch.Size | None:
        """A parameter's shape as the base has it, without what an adapter added; None for one that it has not."""
        return self.checkpoint.shapes.get(name)

    def kept_in(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type of a parameter in a model of `dtype`: transformers keeps some in fp32 whatever that is."""
        kept = {*(self.model._keep_in_fp32_modules or ()), *(self.model._keep_in_fp32_modules_strict or ())}
        return torch.float32 if any(part in kept for part in name.split(".")) else dtype

    def logits(
        self,
        prompts: Sequence[Sequence[int]],
        read: Read | None = None,
        adapter: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Logits (tokens, vocabulary) of all prompts, with the adapter or without it, in fp32; computed in it too, unless weights are to be
        in another `dtype`.

        The prompts are rows of one batch, filled up on the right, so that weights are read once; what fills a row is behind its tokens, which do not
        see it. Raises Unstreamable where a module uses weights that are not its own.
        """
        longest = max(map(len, prompts))
        ids = torch.tensor(
            [[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts], device=self.device
        )
        off: AbstractContextManager[Any] = (
            nullcontext() if adapter or self.adapted is self.model else self.adapted.disable_adapter()
        )
        with self._filled(read or self.stored, dtype), off, torch.no_grad():
            found = self.adapted(input_ids=ids, use_cache=False).logits.float().cpu()
        return torch.cat([row[: len(prompt)] for row, prompt in zip(found, prompts, strict=True)])

    def close(self) -> None:
        """Let go of files."""
        self.checkpoint.close()


def _both_ways(tied: Mapping[str, str]) -> dict[str, str]:
    return {partner: name for name, partner in tied.items()} | dict(tied)


def refuse_without_bias(error: RuntimeError, what: str) -> None:
    """Raise ModelError if `error` is PEFT's of an adapter with `lora_bias` on a layer without a bias."""
    if "lora_bias" in str(error):
        raise ModelError(
            f"{what}: the adapter has a bias (lora_bias) and the base's layer has none that it could go into; use it unmerged, through PEFT"
        ) from error


def has_own_start(config: Mapping[str, Any]) -> bool:
    """Whether an adapter (its adapter_config.json) is for a base that its beginning was taken out of."""
    begun = config.get("init_lora_weights")
    return isinstance(begun, str) and begun not in LORA_STARTS


def refuse_unstreamable(configs: Sequence[Mapping[str, Any]]) -> None:
    """Raise Unstreamable for adapters (their adapter_config.json) that need more of the base than one module's weights."""
    for config in configs:
        kind = config.get("peft_type")
        if kind != "LORA":
            raise Unstreamable(f"the adapter is {kind}, not LORA")
        if has_own_start(config):
            raise Unstreamable(
                f"the adapter's beginning, {config['init_lora_weights']}, is made from the base's weights"
            )
        if config.get("bias") not in (None, "none"):
            raise Unstreamable("the adapter has biases of the base, which PEFT loads into the base itself")
        if any(config.get(key) for key in ("arrow_config", "layer_replication", "kasa_config")):
            raise Unstreamable("PEFT does not keep the base's layers as they are for this adapter")
