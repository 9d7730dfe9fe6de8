"""Checkpoints: everything a run needs to go on exactly where it was.

A checkpoint folder holds the weights (`adapter/` in PEFT's format, or `model.safetensors`), `optimizer.safetensors`,
`rng.safetensors` and `state.json`. It is written beside its place and renamed, so it is whole or not there. Nothing in
it is pickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tunesmith.errors import RunError
from tunesmith.files import atomic_folder, write_json


@dataclass
class TrainState:
    """Where the loop is. `step` optimizer steps are done; the position in the data follows from it."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # in steps
    wall_seconds: float = 0.0  # with evaluations and checkpoints, over all processes that worked on the run
    loss_sum: float = 0.0  # of the steps' losses, each times its units
    loss_units: int = 0  # supervised tokens, or examples
    best_value: float | None = None
    best_step: int = 0
    best_eval_loss: float | None = None
    evaluations_without_improvement: int = 0
    eval_loss: float | None = None
    stopped_early: bool = False
    unmoved: list[str] | None = None  # trainable tensors that have not changed yet; None: nobody has looked
    halvings: int = 0  # of the micro-batches, because memory ran out
    least_memory: bool = False  # whether everything is computed again, for the same reason
    skipped: int = 0  # steps that were not taken (skips.py)
    rollbacks: int = 0
    lr_scale: float = 1.0  # what the rate is multiplied by since the run went back
    norms: list[float] = field(default_factory=list)  # recent gradient norms, to know a spike by


def save_checkpoint(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, state: TrainState, scaler: torch.amp.GradScaler
) -> None:
    """Write a whole checkpoint at `folder`, or nothing. Raises MachineError when the disk is full."""
    tensors, values = _flatten(optimizer.state_dict()["state"])
    with atomic_folder(folder) as temporary:
        save_weights(model, temporary)
        save_file(tensors, temporary / "optimizer.safetensors")
        save_file(_rng_state(), temporary / "rng.safetensors")
        write_json(
            temporary / "state.json", {"state": asdict(state), "optimizer": values, "scaler": scaler.state_dict()}
        )


def load_checkpoint(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> TrainState:
    """Restore weights, optimizer, scaler and random generators; returns the state.

    Raises RunError if it is damaged, or was written by an optimizer over other parameters.
    """
    try:
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        load_weights(model, folder)
        tensors = load_file(folder / "optimizer.safetensors")
        rng = load_file(folder / "rng.safetensors")
        whole = optimizer.state_dict()
        whole["state"] = _unflatten(tensors, saved["optimizer"])
        _refuse_other_parameters(folder, whole["state"], optimizer)
        optimizer.load_state_dict(whole)
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        state = TrainState(**saved["state"])
        torch.set_rng_state(rng["cpu"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{folder}: this checkpoint cannot be read ({' '.join(str(error).split())}); "
            "delete this folder to go on from the one before"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([rng[f"cuda.{i}"] for i in range(torch.cuda.device_count()) if f"cuda.{i}" in rng])
    return state


MOMENTS = {"exp_avg", "exp_avg_sq", "state1", "state2"}
"""What PyTorch's and bitsandbytes' AdamW call a parameter's two moments; each has as many values as the parameter."""


def _refuse_other_parameters(folder: Path, state: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Raise RunError unless each saved moment fits its parameter: PyTorch's kernels would read past its end."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in state.items():
        size = parameters[index].numel() if index < len(parameters) else 0
        for moments in (entry, *(inner for inner in entry.values() if isinstance(inner, dict))):  # bitsandbytes nests
            for name in moments.keys() & MOMENTS:
                if moments[name].numel() != size:
                    raise RunError(
                        f"{folder}: its optimizer trained other tensors ({name} of parameter {index} has "
                        f"{moments[name].numel():,} values where {size:,} are trained now): it is from another version of "
                        f"tunesmith. Start a run from its weights instead: adapter.init_from={folder / 'adapter'}"
                    )


def save_weights(model: Any, folder: Path) -> None:
    """The trained weights: the adapter in PEFT's format under `adapter/`, or every weight in `model.safetensors`."""
    if hasattr(model, "peft_config"):
        # The embedding is never trained here; PEFT would look its size up on the hub to find that out.
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in _own_weights(model).items()}, folder / "model.safetensors"
        )


def load_weights(model: Any, folder: Path) -> None:
    """Load what `save_weights` wrote into the same model. Raises KeyError when a tensor is missing."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        different = get_peft_model_state_dict(model, save_embedding_layers=False).keys() ^ weights.keys()
        if different:
            raise KeyError(f"{len(different)} adapter weights are missing or unknown, e.g. {min(different)}")
        set_peft_model_state_dict(model, weights)
        return
    saved = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, tensor in _own_weights(model).items():
            tensor.copy_(saved[name])


def _own_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, tied ones once."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _flatten(state: dict[Any, Any], path: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Nested optimizer state as tensors by `parameter/key/...` and, in the same way, plain values.

    bitsandbytes shares its quantization maps among parameters; safetensors stores no shared memory, hence the copies.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{path}{key}"
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        elif isinstance(value, dict):
            inner_tensors, inner_values = _flatten(value, f"{name}/")
            tensors |= inner_tensors
            values |= inner_values
        else:
            values[name] = value
    return tensors, values


def _unflatten(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *values.items()]:
        index, *inner, key = name.split("/")
        entry = state.setdefault(int(index), {})
        for part in inner:
            entry = entry.setdefault(part, {})
        entry[key] = value
    return state


def _rng_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states
