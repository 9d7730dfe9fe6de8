"""Read a LoRA adapter's folder for the adapter bank (adapter_bank.py): what is more than B A on linear layers is refused."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ModelError
from tunesmith.models.adapters import find_adapter

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

ALIGNED = 128
"""Elements to whose multiples matrices are placed in the one tensor that goes to the device: 256 bytes in 16 bits, as the allocator's."""
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A and sB^T of each linear layer, (r, in) and (r, out), on the model's device in its compute type; parts of one tensor."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def bytes(self) -> int:
        """What they take on the device."""
        return sum(part.numel() * part.element_size() for pair in self.layers.values() for part in pair)


_ALONE = threading.Lock()


@contextmanager
def _one_thread() -> Iterator[None]:
    """This thread computes without others. OpenMP's wait for each other behind every small operation, and one that shares its core with
    a busy engine comes late each time: 5 s instead of 0.4 s for 252 layers beside a full batch on a GPU.

    PyTorch gives the number to threads that begin meanwhile too, and they keep it: another reading may not take it for the usual one, and
    an engine's thread sets its own.
    """
    with _ALONE:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@_one_thread()
def read_adapter(path: Path, base: torch.nn.Module, device: str, dtype: torch.dtype) -> AdapterWeights:
    """Read a PEFT folder (or a run's) for `base`. Only safetensors and JSON are read; nothing of the folder is executed.

    Raises ModelError for what is no plain LoRA on linear layers of the decoder, for weights that are not finite, and for those that
    do not fit the base or are not what the config says: layers that lack, other ranks.
    """
    from safetensors import SafetensorError, safe_open

    folder = find_adapter(path)
    config = _config(folder)
    linear = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt", device="cpu") as file:
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
    model: Any = base
    head = model.get_output_embeddings()
    for name in found:
        if linear[name] is head:
            raise ModelError(
                f"{folder}: {name} gives the logits, and only layers below it can share a base; merge this adapter "
                "(`tunesmith merge`) and serve it alone"
            )
    if lacking := sorted(
        _targets(config, folder, [name for name in linear if linear[name] is not head]) - found.keys()
    ):
        raise ModelError(
            f"{folder}: adapter_model.safetensors has no weights for {lacking[0]}"
            + (f" and {len(lacking) - 1} more layers" if lacking[1:] else "")
            + ", which adapter_config.json names; the file is damaged, or the config is another adapter's"
        )
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
        if len(a) != (rank := _of_layer(config, "rank_pattern", name, config["r"])):
            raise ModelError(
                f"{folder}: {name} has rank {len(a)}, and adapter_config.json says {rank}; its weights would be scaled wrongly: "
                "the file or the config is another adapter's"
            )
        b = b.float() * _scaling(config, name, len(a))
        layers[name] = (a.to(dtype), b.T.contiguous().to(dtype))
        finite += [
            torch.isfinite(part).all() for part in layers[name]
        ]  # infinity in one row's B is NaN in the others: 0 x inf
    if not torch.stack(finite).all():
        raise ModelError(
            f"{folder}: weights of this adapter, with its scale, are not finite (NaN or infinity) in {str(dtype).removeprefix('torch.')}; "
            "train it again, or serve in another type"
        )
    return AdapterWeights(_on_device(layers, device))


def _on_device(
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]], device: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """All matrices in one copy, on a stream of its own: each copy of its own would wait for the step that the GPU is at, 500 times for an
    adapter of 36 layers.
    """
    sizes = [-(-part.numel() // ALIGNED) * ALIGNED for pair in layers.values() for part in pair]
    packed = torch.zeros(sum(sizes), dtype=next(iter(layers.values()))[0].dtype, pin_memory=device.startswith("cuda"))
    places = iter(packed.split(sizes))
    for pair in layers.values():
        for part in pair:
            next(places)[: part.numel()] = part.reshape(-1)
    if device.startswith("cuda"):
        # Of another priority than captures': PyTorch gives the same 32 streams of one priority again and again, and who waits for a
        # stream that is being captured ends the capture.
        stream = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.stream(stream):
            packed = packed.to(device, non_blocking=True)
        stream.synchronize()
        packed.record_stream(torch.cuda.default_stream(device))  # which reads it from now on, also when it is let go of
    there = iter(packed.split(sizes))
    return {
        name: (next(there)[: a.numel()].view(a.shape), next(there)[: b.numel()].view(b.shape))
        for name, (a, b) in layers.items()
    }


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
    alpha = float(_of_layer(config, "alpha_pattern", name, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """A layer's own number in a pattern of the config, or the one for all."""
    from peft.utils.other import get_pattern_key

    pattern = config.get(key) or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _targets(config: Mapping[str, Any], folder: Path, linear: Sequence[str]) -> set[str]:
    """The linear layers that a config names, by PEFT's own rules. Without `target_modules` it names none."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    wanted = config.get("target_modules")
    if wanted is None or wanted == "all-linear":
        return set() if wanted is None else set(linear)
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    try:
        settings = LoraConfig(**{name: config[name] for name in names if config.get(name) is not None})
        return {name for name in linear if check_target_module_exists(settings, name)}
    except (ValueError, TypeError, re.error) as error:
        raise ModelError(f"{folder}: adapter_config.json: PEFT cannot read which layers it names: {error}") from None
