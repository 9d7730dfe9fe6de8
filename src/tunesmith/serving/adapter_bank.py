"""Several LoRA adapters over one base, each row of a batch with its own.

For a linear layer with weight W and adapters k = 1..K, row b of the batch, which asks for adapter k(b), gets

    y_b = W x_b + s_k B_k A_k x_b                                                    (LoRA, arXiv 2106.09685)

The A's of all adapters of a layer stand below each other, A (R, in) with R the sum of the ranks, and so do the transposed
s B's, (R, out). A mixed batch takes two products and one mask for any number of adapters:

    h = x A^T (B, T, R);   h is set to 0 in the columns of other rows' adapters;   y = W x + h (sB)

which adds exact zeros for the others. A batch whose rows all want one adapter takes that adapter's slice; one that wants the base
takes nothing. PEFT's own mixed batches (`adapter_names`) cost a gather, two products and a scatter for every adapter of every layer,
and copy index lists to the device for each: that is why they are not used. What this costs instead is R: the products grow with the
ranks of all adapters that are loaded, used or not, which is little beside W up to some hundreds.

The products hang on the layers as forward hooks of this instance; nothing else of the model changes, and `close` takes them off.

Left out, and refused: what is more than B A on a linear layer (DoRA, whole modules, rows of new tokens, experts, embeddings, biases).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tunesmith.errors import ModelError
from tunesmith.models.adapters import find_adapter

BASE = -1
"""The number of no adapter."""

ANY_VALUE = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "loftq_config",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
        "ensure_weight_tying",
    ]
)
"""Keys of an adapter's config that are read here, or that say nothing about its answers. Others must have PEFT's default."""

TAKEN_FROM_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Values of `init_lora_weights` whose adapters, as training has them, count over weights of the base that they changed."""

MAX_CONFIG_BYTES = 1 << 20
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A and sB^T of each linear layer, (r, in) and (r, out), on the model's device in its compute type."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def bytes(self) -> int:
        """What they take on the device."""
        return sum(part.numel() * part.element_size() for pair in self.layers.values() for part in pair)


def read_adapter(path: Path, base: torch.nn.Module, device: str, dtype: torch.dtype) -> AdapterWeights:
    """Read a PEFT folder (or a run's) for `base`. Only safetensors and JSON are read; nothing of the folder is executed.

    Raises ModelError for what is no plain LoRA on linear layers, for weights that are not finite, that are missing, or that do not
    fit the base.
    """
    from safetensors import SafetensorError, safe_open

    folder = find_adapter(path)
    config = _config(folder)
    linear = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt", device=device) as file:
            for key in file.keys():  # noqa: SIM118  # it is no dictionary
                match = KEY.fullmatch(key)
                if match is None or match[1] not in linear:
                    raise ModelError(
                        f"{folder}: {key} is no part of a LoRA adapter on a linear layer of this base; only those can share a "
                        "base: merge this one (`tunesmith merge`) and serve it alone, or check that it was made for this base"
                    )
                found.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: adapter_model.safetensors cannot be read: {error}") from None
    if not found:
        raise ModelError(f"{folder}: adapter_model.safetensors holds no weights")
    finite = []
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, parts in found.items():
        if len(parts) != 2:
            raise ModelError(f"{folder}: {name} has lora_{next(iter(parts))} alone; the file is damaged")
        a, b = parts["A"], parts["B"]
        module: Any = linear[name]
        shape = (module.in_features, module.out_features)
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or (a.shape[1], len(b)) != shape:
            raise ModelError(
                f"{folder}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, and the base's layer goes from {shape[0]} to "
                f"{shape[1]}; the adapter was made for another base"
            )
        b = b.float() * _scaling(config, name, len(a))
        finite += [torch.isfinite(a).all(), torch.isfinite(b).all()]
        layers[name] = (a.to(dtype), b.T.contiguous().to(dtype))
    if not torch.stack(finite).all():
        raise ModelError(f"{folder}: weights of this adapter are not finite (NaN or infinity); train it again")
    return AdapterWeights(layers)


def _config(folder: Path) -> dict[str, Any]:
    """The adapter's config, if it is one whose adapter can share a base."""
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{path}: {path.stat().st_size:,} bytes; an adapter's config has at most {MAX_CONFIG_BYTES:,}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ModelError(
            f"{path}: peft_type is {kind!r}: only LORA adapters can share a base; merge it and serve it alone"
        )
    numbers = (config.get("r"), config.get("lora_alpha"))
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(n, int | float) and n > 0 for n in numbers) or not all(isinstance(p, dict) for p in patterns):
        raise ModelError(f"{path}: r and lora_alpha must be positive numbers, rank_pattern and alpha_pattern objects")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(TAKEN_FROM_THE_BASE):
        raise ModelError(
            f"{path}: an adapter that {start} began counts over weights that it changed; take the finished run's own adapter"
        )
    defaults = vars(LoraConfig())
    odd = [
        key for key, value in config.items() if key not in ANY_VALUE and value and value != _plain(defaults.get(key))
    ]
    if odd:
        raise ModelError(
            f"{path}: {odd[0]} is {config[odd[0]]!r}, which is more than LoRA on linear layers; adapters like this cannot share a "
            "base: merge it (`tunesmith merge`) and serve it alone"
        )
    return config


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # an enumeration stands in JSON by its value


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732); a layer's own alpha comes first."""
    from peft.utils.other import get_pattern_key

    pattern = config.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), name), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass(slots=True)
class _Layer:
    """The stacked matrices of one linear layer. `owners` says which rows of them are whose: (adapter, start, stop)."""

    a: torch.Tensor
    b: torch.Tensor
    owners: tuple[tuple[int, int, int], ...]


class AdapterBank:
    """Holds adapters by number, and adds their products to the base's layers in every forward behind `select`."""

    def __init__(self, base: torch.nn.Module, device: str):
        self.device = device
        self._modules = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
        self._layers: dict[str, _Layer] = {}
        self._handles: dict[str, Any] = {}
        self._adapters: dict[int, AdapterWeights] = {}
        self._next = 0
        self._only: int | None = BASE
        self._rows = torch.empty(0)
        self._others: dict[tuple[tuple[int, int, int], ...], torch.Tensor] = {}
        self._columns: dict[tuple[tuple[int, int, int], ...], torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """What all adapters take on the device."""
        return sum(part.numel() * part.element_size() for layer in self._layers.values() for part in (layer.a, layer.b))

    @property
    def numbers(self) -> list[int]:
        """The adapters that are here."""
        return sorted(self._adapters)

    def add(self, weights: AdapterWeights) -> int:
        """Take an adapter in; returns its number, which no other ever has. The caller lets go of `weights`."""
        number, self._next = self._next, self._next + 1
        self._columns = {}
        for name, (a, b) in weights.layers.items():
            layer = self._layers.get(name)
            if layer is None:
                self._layers[name] = _Layer(a, b, ((number, 0, len(a)),))
                self._handles[name] = self._modules[name].register_forward_hook(self._hook(name))
            else:
                start = len(layer.a)
                layer.a, layer.b = torch.cat([layer.a, a]), torch.cat([layer.b, b])
                layer.owners = (*layer.owners, (number, start, start + len(a)))
        self._adapters[number] = AdapterWeights({name: (a[:0], b[:0]) for name, (a, b) in weights.layers.items()})
        return number

    def remove(self, number: int) -> None:
        """Let go of an adapter that no row of the next forwards wants."""
        self._columns = {}
        for name in self._adapters.pop(number).layers:
            layer = self._layers[name]
            kept = [owner for owner in layer.owners if owner[0] != number]
            if not kept:
                self._handles.pop(name).remove()
                del self._layers[name]
                continue
            layer.a = torch.cat([layer.a[start:stop] for _, start, stop in kept])
            layer.b = torch.cat([layer.b[start:stop] for _, start, stop in kept])
            owners, at = [], 0
            for owner, start, stop in kept:
                owners.append((owner, at, at + stop - start))
                at += stop - start
            layer.owners = tuple(owners)

    def select(self, rows: Sequence[int]) -> None:
        """Say whose each row of the next forwards is: the number of an adapter, or BASE. Raises ValueError for one not here."""
        kinds = set(rows)
        if unknown := kinds - self._adapters.keys() - {BASE}:
            raise ValueError(f"no adapter has the number {min(unknown)}")
        self._only = kinds.pop() if len(kinds) == 1 else None
        self._others = {}
        if self._only is None:
            self._rows = torch.tensor(rows, device=self.device)

    def close(self) -> None:
        """Take the hooks off: the model is as it was."""
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._layers, self._adapters = {}, {}, {}

    def _hook(self, name: str) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return self._added(name, inputs[0], output)

        return add

    def _added(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        layer = self._layers[name]
        if self._only is not None:
            for number, start, stop in layer.owners:
                if number == self._only:
                    return _plus(output, F.linear(x, layer.a[start:stop]), layer.b[start:stop])
            return output
        if x.ndim != 3 or len(x) != len(self._rows):
            raise ModelError(
                f"{name}: this layer sees {tuple(x.shape)} where (rows, tokens, width) was expected, so that rows with several "
                "adapters cannot be told apart; serve one adapter, merged into its base"
            )
        h = F.linear(x, layer.a)
        # Filled, not multiplied by 0: what overflows in another adapter must not become NaN here.
        return _plus(output, h.masked_fill_(self._of_others(layer.owners), 0.0), layer.b)

    def _of_others(self, owners: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
        """(B, 1, R), true where a column is not of the row's adapter. Made once a forward for each arrangement of columns."""
        if owners not in self._others:
            if owners not in self._columns:
                of_column = [number for number, start, stop in owners for _ in range(stop - start)]
                self._columns[owners] = torch.tensor(of_column, device=self.device)
            self._others[owners] = self._rows[:, None, None] != self._columns[owners]
        return self._others[owners]


def _plus(output: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """output + h B in one product, in place: nobody else has what a linear layer just returned."""
    if output.dtype != h.dtype:  # a 4-bit layer returns its input's type, whatever autocast computes in
        return output + (h @ b).to(output.dtype)
    output.view(-1, output.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b)
    return output
