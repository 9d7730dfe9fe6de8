"""Whether a benchmark row's fused gradients are right: three comparisons with the reference engine on the same batch.

1. In fp32, where rounding is nothing, every adapter tensor's gradient is the reference engine's.
2. In the row's own type, the norm of all of them together is.
3. In the row's own type each tensor carries rounding noise, in either engine: in bf16, through the layers of random weights,
   7% (Qwen2.5-3B) to 15% (Llama-3.1-8B). So both are measured against the fp32 gradients, and ours may be a tenth farther
   from them than the other at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import RECOMPUTE_ALL, fuse, unfuse

Gradients = dict[str, torch.Tensor]
"""The gradient of each trainable tensor by its name."""


@dataclass(frozen=True, slots=True)
class References:
    """Gradients to compare with: the reference engine's in the row's type and in fp32, and the fused engine's in fp32."""

    low: Gradients
    exact: Gradients
    fused_exact: Gradients

    @classmethod
    def of(cls, forward: ModelForward, gradients: Callable[[ModelForward], Gradients]) -> References:
        """Measured by `gradients` on a model that is not fused and is left as it was."""
        low = gradients(forward)
        with in_fp32(forward.model):
            precise = ModelForward(forward.model, forward.device, "fp32")
            exact = low if forward.dtype == "fp32" else gradients(precise)
            fuse(forward.model, RECOMPUTE_ALL, torch.float32, report=str)
            try:
                fused_exact = gradients(precise)
            finally:
                unfuse(forward.model)
        return cls(low, exact, fused_exact)

    def check(self, ours: Gradients) -> dict[str, Any]:
        """`ours`, the fused engine's in the row's type, held to them.

        `compare`'s entries for the row's type; `fp32`, the same for fp32; `error` and `reference_error`, the mean over
        the tensors of ‖gradient - exact‖ / ‖exact‖ in the row's type.
        """
        return compare(self.low, ours) | {
            "fp32": compare(self.exact, self.fused_exact),
            "error": _mean_error(self.exact, ours),
            "reference_error": _mean_error(self.exact, self.low),
        }


@contextmanager
def in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """Weights and products in fp32 for a while, 4-bit weights as what they stand for before it is rounded to 16 bits."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    dtypes = [parameter.dtype for parameter in parameters]
    # bitsandbytes' Linear4bit
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "compute_type_is_set")]
    settings = [(layer.compute_dtype, layer.compute_type_is_set, layer.weight.quant_state.dtype) for layer in layers]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float()
        for layer in layers:
            layer.compute_dtype, layer.compute_type_is_set = torch.float32, True
            layer.weight.quant_state.dtype = torch.float32
        yield
    finally:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
        for layer, (compute, is_set, stored) in zip(layers, settings, strict=True):
            layer.compute_dtype, layer.compute_type_is_set = compute, is_set
            layer.weight.quant_state.dtype = stored


def compare(reference: Gradients, ours: Gradients) -> dict[str, Any]:
    """How far `ours` is from `reference`, tensor by tensor and all together.

    `norm_difference` is the largest | ‖ours‖ / ‖reference‖ - 1 | of a tensor and `total_norm_difference` that of all
    tensors laid end to end, as is `cosine`; `difference` is the largest ‖ours - reference‖ / ‖reference‖.
    """
    if reference.keys() != ours.keys():
        raise RuntimeError(f"gradients of different tensors: {sorted(reference.keys() ^ ours.keys())[:3]}")
    norms: dict[str, float] = {}
    differences: dict[str, float] = {}
    dot = square = reference_square = 0.0
    for name, expected in reference.items():
        a, b = ours[name].double(), expected.double()
        norms[name] = abs(float(a.norm() / b.norm()) - 1)
        differences[name] = float((a - b).norm() / b.norm())
        if math.isnan(norms[name]):
            norms[name] = differences[name] = math.inf  # so that it is the largest
        dot += float((a * b).sum())
        square += float((a * a).sum())
        reference_square += float((b * b).sum())
    worst_norm = max(norms, key=lambda name: norms[name])
    worst = max(differences, key=lambda name: differences[name])
    return {
        "norm_difference": norms[worst_norm],
        "norm_tensor": worst_norm,
        "total_norm_difference": abs((square / reference_square) ** 0.5 - 1),
        "difference": differences[worst],
        "tensor": worst,
        "cosine": dot / (square * reference_square) ** 0.5,
        "tensors": len(reference),
    }


def _mean_error(exact: Gradients, gradients: Gradients) -> float:
    errors = [float((gradients[name].double() - b.double()).norm() / b.double().norm()) for name, b in exact.items()]
    return sum(errors) / len(errors)
