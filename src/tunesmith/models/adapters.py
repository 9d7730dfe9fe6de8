"""LoRA adapters through PEFT: which modules they go on, adding, loading and saving them.

Everything that PEFT does is PEFT's: the layers, the file format, the key names. This module chooses target modules,
keeps trainable weights in fp32 whatever the base is stored in, and refuses what would be silently ignored.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import AdapterConfig
from tunesmith.errors import ModelError
from tunesmith.types import GB

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

PRESETS = ("all-linear", "attention", "mlp", "qv")
QUERY_VALUE = {"q_proj", "v_proj", "query", "value"}
FUSED_QKV = {"qkv_proj", "query_key_value", "c_attn", "Wqkv"}


def target_modules(model: PreTrainedModel, setting: str | list[str]) -> list[str]:
    """The module-name endings that `adapter.target_modules` means for this model, e.g. ['down_proj', 'q_proj', ...].

    Presets are read off the model's own linear layers, so they fit any architecture: `all-linear` is every linear layer
    but the head, `attention` and `mlp` its two parts, `qv` the query and value projections (the fused one where query,
    key and value are one matrix). Raises ModelError if a preset or a name matches nothing.
    """
    linear = dict(_linear_layers(model))
    names = {path.rsplit(".", 1)[-1] for path in linear}
    if isinstance(setting, list):
        unknown = [name for name in setting if not any(_ends_in(path, name) for path in linear)]
        if unknown or not setting:
            raise ModelError(
                f"adapter.target_modules: {', '.join(unknown) or 'the empty list'} matches no linear layer of this "
                f"model; it has {', '.join(sorted(names))}"
            )
        return sorted(setting)
    attention = {path.rsplit(".", 1)[-1] for path in linear if "attn" in path or "attention" in path}
    chosen = {
        "all-linear": names,
        "attention": attention,
        "mlp": names - attention,
        "qv": (names & QUERY_VALUE) or (names & FUSED_QKV),
    }.get(setting)
    if chosen is None:
        raise ModelError(
            f"adapter.target_modules is {setting!r}: expected one of {', '.join(PRESETS)}, or a list of module names"
        )
    if not chosen:
        raise ModelError(
            f"adapter.target_modules: {setting} matches no linear layer of this model; "
            f"it has {', '.join(sorted(names)) or 'none (its layers are of another type)'}"
        )
    return sorted(chosen)


def _ends_in(path: str, name: str) -> bool:
    """Whether `adapter.target_modules` means the module at `path` by `name`."""
    return path == name or path.endswith(f".{name}")


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """Linear layers (plain, 4-bit and 8-bit ones derive from nn.Linear) inside the decoder's layers."""
    import torch

    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield path, module


def add_adapter(model: PreTrainedModel, config: AdapterConfig, base_name: str) -> PeftModel:
    """Put a fresh LoRA adapter on `model`, drawn from torch's global generator, or the one at `adapter.init_from`.

    Only the adapter is trainable afterwards, in fp32. Raises ModelError.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.init_from:
        adapted = load_adapter(model, Path(config.init_from), trainable=True)
        how = adapted.peft_config["default"].init_lora_weights
        if isinstance(how, str) and how.startswith(("pissa", "olora")):
            raise ModelError(
                f"adapter.init_from {config.init_from}: an adapter that {how} began, as a checkpoint has it, counts over weights "
                "that it changed; take the finished run's own adapter, which was converted"
            )
    else:
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=target_modules(model, config.target_modules),
            use_rslora=config.rslora,
            init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,
            use_dora=config.dora,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            layers_to_transform=_known_layers(model, config.layers_to_transform),
            task_type="CAUSAL_LM",
        )
        wanted = _wanted(model, lora)
        try:
            adapted = get_peft_model(model, lora)
        except ValueError as error:
            said = " ".join(str(error).split())
            raise ModelError(
                f"adapter.target_modules {config.target_modules}: PEFT cannot put this adapter on the model: {said}"
            ) from error
        _refuse_redirected(adapted, wanted, config)
        _refuse_unmatched(adapted, config)
        if config.init_lora_weights != "default":
            adapted.beginning = {
                name: value.cpu().clone() for name, value in get_peft_model_state_dict(adapted).items()
            }
        adapted.peft_config["default"].base_model_name_or_path = base_name
    keep_trainable_in_fp32(adapted)
    return adapted


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write an adapter in PEFT's format, to be loaded on the base as it was.

    One whose beginning was taken out of the base's weights (`adapter.init_lora_weights`) is written as its difference from that
    beginning, B·A - B₀·A₀: a plain adapter of twice the rank.
    """
    beginning = getattr(adapted, "beginning", None)
    if beginning is None:  # the embedding is never trained here: PEFT would ask the hub for its size
        adapted.save_pretrained(folder, save_embedding_layers=False)
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as place:
        save_file(beginning, Path(place) / "adapter_model.safetensors")
        plain = copy.deepcopy(adapted.peft_config["default"])
        plain.init_lora_weights = True  # so that PEFT takes the values as they are
        plain.save_pretrained(place)
        adapted.save_pretrained(folder, save_embedding_layers=False, path_initial_model_for_weight_conversion=place)


def _known_layers(model: PreTrainedModel, layers: list[int] | None) -> list[int] | None:
    """`adapter.layers_to_transform`, once each. Raises ModelError for a layer that the model does not have."""
    if layers is None:
        return None
    count = model.config.get_text_config().num_hidden_layers
    if max(layers) >= count:
        raise ModelError(
            f"adapter.layers_to_transform: {max(layers)} is no layer of this model, which has 0 to {count - 1}"
        )
    return sorted(set(layers))


def _wanted(model: PreTrainedModel, lora: LoraConfig) -> set[str]:
    """The linear layers that a configuration means."""
    names, layers = set(lora.target_modules or ()), lora.layers_to_transform
    found = {path for path, _ in _linear_layers(model) if any(_ends_in(path, name) for name in names)}
    if layers is None:
        return found
    numbers = {path: re.search(r"\.layers\.(\d+)\.", path) for path in found}
    return {path for path, number in numbers.items() if number and int(number[1]) in layers}


def _refuse_redirected(adapted: PeftModel, wanted: set[str], config: AdapterConfig) -> None:
    """Raise ModelError where PEFT took names of linear layers for parameters of experts, and left those layers as they are."""
    from peft.tuners.lora import LoraLayer

    have = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    missing = sorted(wanted - have)
    if missing:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in missing}))
        raise ModelError(
            f"adapter.target_modules {config.target_modules}: PEFT takes {names} of this family for its experts' parameters, so "
            f"that {len(missing)} linear layers would have no adapter ({missing[0]}), and all experts one; set "
            "adapter.target_modules: attention"
        )


def _refuse_unmatched(adapted: PeftModel, config: AdapterConfig) -> None:
    """Raise ModelError for patterns that no adapted module matches: PEFT would ignore them."""
    from peft.tuners.lora import LoraLayer

    names = [name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                endings = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                raise ModelError(
                    f"adapter.{setting}: {pattern!r} matches no module that has an adapter; those are {endings}"
                )


def load_adapter(model: PreTrainedModel, path: Path, trainable: bool = False) -> PeftModel:
    """Put a saved adapter (a PEFT folder, or a run that has one) on `model`. Raises ModelError."""
    from peft import PeftModel
    from safetensors import SafetensorError

    folder = find_adapter(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
            # Once more, for its report: `from_pretrained` returns none.
            report = adapted.load_adapter(str(folder), "default", is_trainable=trainable)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else f"{text[:297]}..."
        raise ModelError(f"{folder}: this adapter cannot be loaded on the model: {text}") from error
    for keys, what in (
        (report.missing_keys, "tensors of the adapter are missing from its file and would be random"),
        (report.unexpected_keys, "tensors in the adapter's file have no place in this model"),
    ):
        if keys:
            raise ModelError(f"{folder}: {len(keys)} {what} ({keys[0]}); it was made for another base, or is damaged")
    keep_trainable_in_fp32(adapted)
    return adapted


def find_adapter(path: Path) -> Path:
    """The PEFT folder at `path`: itself, or its `adapter/` if it is a run. Raises ModelError."""
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise ModelError(f"{folder}: no adapter_model.safetensors (pickled adapters are not read)")
            return folder
    raise ModelError(f"{path}: not an adapter (no adapter_config.json there)")


def base_of_adapter(path: Path) -> str:
    """The base model's name as the adapter's config records it. Raises ModelError."""
    config = find_adapter(path) / "adapter_config.json"
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config}: not valid JSON: {error}") from None
    name = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not name:
        raise ModelError(f"{config}: names no base model; pass it with --model")
    return str(name)


def keep_trainable_in_fp32(model: torch.nn.Module) -> None:
    """Make every trainable parameter fp32: Adam's updates vanish in bf16, and fp16 gradients cannot be unscaled."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters. Four-bit weights are counted unpacked: two to a stored byte."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            count = state.shape.numel()
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total


def weights_gb(model: torch.nn.Module) -> float:
    """Memory of all parameters and buffers as stored, in GB, with the scales of quantized ones."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        while state is not None:  # with double quantization the scales have scales
            tensors.append(state.absmax)
            state = state.state2
        if (scales := getattr(parameter, "SCB", None)) is not None:  # of int8 rows
            tensors.append(scales)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GB
