"""LoftQ: adapters that begin as what 4-bit quantization lost (Li et al. 2023, arXiv:2310.08659, algorithm 1).

    Q_1 = q(W);   s·B_t·A_t = the best approximation of rank r of W - Q_t;   Q_{t+1} = q(W - s·B_t·A_t)

so that Q_T + s·B_T·A_T is nearer to W than q(W) is, and training begins nearer to the base as it was. q is bitsandbytes' quantizer,
s PEFT's scale alpha / r (PEFT's own code leaves it out, and rounds on a GPU alone). With T = 1 the base is the plainly quantized
one. W is read from the model's files, in the type that it was quantized from.

What a run saves is its difference from that beginning, s·(B·A - B_T·A_T), an adapter of twice the rank for the base as it was:
over W it is what was trained but for W - Q_T - s·B_T·A_T, which LoftQ makes small. Over q(W) it misses all of W - q(W), as any adapter
that was made for W does; `restore` makes Q_T + s·B·A of it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ModelError


def iterations_of(init_lora_weights: str) -> int:
    """T of `loftq` (1, as in PEFT) or `loftq_niter_5`; 0 of any other beginning."""
    if not init_lora_weights.startswith("loftq"):
        return 0
    return int(init_lora_weights.rpartition("_")[2]) if "niter" in init_lora_weights else 1


def begin(adapted: Any, folder: Path, iterations: int) -> None:
    """Give the adapter on a 4-bit base its beginning, and for more than one iteration the base its Q_T, in place.

    `folder` has the model's safetensors. Raises ModelError where a weight is not there as it was before quantization.
    """
    with torch.no_grad():
        for layer, weight in _layers(adapted, folder):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            b_new, a_new = _alternate(layer, weight, len(a), iterations)
            found = len(a_new)  # a rank above the matrix's: the other columns begin as without LoftQ
            a[:found] = a_new
            b[:, :found] = b_new


def restore(adapted: Any, folder: Path, iterations: int) -> None:
    """Make what was trained, Q_T + s·B·A, of the plainly quantized base and the adapter that the run saved, in place.

    Raises ModelError as `begin` does.
    """
    with torch.no_grad():
        for layer, weight in _layers(adapted, folder):
            b = layer.lora_B["default"].weight
            rank = b.shape[1] // 2
            if iterations > 1:
                _alternate(layer, weight, rank, iterations)
            b[:, rank:] = 0  # what was taken off: the beginning


def _alternate(layer: Any, weight: torch.Tensor, rank: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B_T (N, r) and A_T (r, K); the layer holds Q_T afterwards, and q(W) before."""
    base, scale = layer.get_base_layer(), layer.scaling["default"]
    exact = weight.float()
    b, a = _factors(exact - _dequantized(base.weight), rank, scale)
    for _ in range(iterations - 1):
        _quantize_into(base, exact - scale * b @ a)
        b, a = _factors(exact - _dequantized(base.weight), rank, scale)
    return b, a


def _factors(lost: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A, equally large, with s·B·A the best approximation of rank r (Eckart & Young 1936)."""
    u, sigma, v = torch.linalg.svd(lost, full_matrices=False)
    root = (sigma[:rank] / scale).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _dequantized(weight: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    values: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return values.float()


def _quantize_into(base: Any, values: torch.Tensor) -> None:
    """Make the 4-bit layer `base` hold other values, quantized as its own are."""
    from bitsandbytes.functional import quantize_4bit

    state = base.weight.quant_state
    base.weight.data, base.weight.quant_state = quantize_4bit(
        values.to(state.dtype),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
    )
    base.quant_state = base.weight.quant_state


def _layers(adapted: Any, folder: Path) -> Iterator[tuple[Any, torch.Tensor]]:
    """The adapter's layers over 4-bit weights, each with the weight as it was before, on its device."""
    from peft.tuners.lora import LoraLayer
    from safetensors import safe_open

    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            files.update(dict.fromkeys(opened.keys(), file))
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        stored: Any = layer.get_base_layer().weight
        state = getattr(stored, "quant_state", None)
        if state is None:
            continue
        key = f"{name}.weight"
        if key not in files:
            raise ModelError(
                f"adapter.init_lora_weights loftq: {folder} has no tensor {key}, whose quantization error LoftQ begins with; set it to "
                "default"
            )
        with safe_open(files[key], "pt") as opened:
            weight = opened.get_tensor(key)
        if not weight.is_floating_point() or weight.shape != state.shape:
            raise ModelError(
                f"adapter.init_lora_weights loftq: {key} in {folder} is {weight.dtype} {tuple(weight.shape)}: LoftQ needs the weights "
                f"before quantization, {tuple(state.shape)}; take the model that was not quantized, or set it to default"
            )
        yield layer, weight.to(stored.device, state.dtype)
