"""Several adapters as one, through PEFT's `add_weighted_adapter`.

- linear: A = Σ √(w·s)·A_i and B = Σ √(w·s)·B_i, of equal ranks: PEFT weighs the factors, so that B·A has products of different adapters in it
- svd: the best approximation of Σ w·s·B_i·A_i in the largest of their ranks: no such products, at the price of what the rank leaves out
- ties: the factors trimmed to their `density` largest values, signs elected (Yadav et al. 2023, arXiv:2306.01708)
- dare_linear, dare_ties: values dropped at random, the rest scaled by 1/density (Yu et al. 2023, arXiv:2311.03099), then linear or TIES
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tunesmith.errors import ConfigError, ModelError
from tunesmith.export.skeleton import has_own_start
from tunesmith.models.adapters import load_adapter

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "svd"]
METHODS: tuple[Method, ...] = get_args(Method)
DENSITY = ("ties", "dare_linear", "dare_ties")
"""Methods that keep a share of the values."""

SEED = 0
"""Of DARE's choice: the same adapters merge to the same weights."""


@dataclass(frozen=True, slots=True)
class Combination:
    """How several adapters become one."""

    method: Method
    weights: tuple[float, ...]
    density: float | None


def combination(
    count: int, method: str | None, weights: Sequence[float] | None, density: float | None
) -> Combination | None:
    """Check what was asked for `count` adapters; None for a single one. Raises ConfigError with every problem."""
    if count == 1:
        given = {"method": method, "weights": weights, "density": density}
        named = [f"--{name}" for name, value in given.items() if value is not None]
        if named:
            raise ConfigError(
                f"{', '.join(named)}: for several adapters, and one was named; name more, or leave it out"
            )
        return None
    problems = []
    if method is None:
        problems.append(f"--method is missing: several adapters merge by one of {', '.join(METHODS)}")
    elif method not in METHODS:
        problems.append(f"--method is {method}: several adapters merge by one of {', '.join(METHODS)}")
    if weights is not None and (len(weights) != count or not all(map(math.isfinite, weights)) or not any(weights)):
        problems.append(
            f"--weights are {', '.join(map(str, weights))}: expected {count} numbers, one for each adapter, not all 0"
        )
    if method in DENSITY and density is None:
        problems.append(f"--density: {method} keeps a share of each adapter's values; set it, e.g. 0.5")
    if density is not None and method in METHODS and method not in DENSITY:
        problems.append(f"--density: {method} keeps all values; leave it out, or use {', '.join(DENSITY)}")
    if density is not None and not 0 < density <= 1:
        problems.append(f"--density is {density}: expected a share above 0, at most 1")
    if problems:
        raise ConfigError(problems)
    return Combination(method, tuple(weights or [1 / count] * count), density)  # type: ignore[arg-type]  # it is one of METHODS


def refuse_unmergeable(folders: Sequence[Path]) -> None:
    """Raise ModelError for adapters of which no weights of the base's shapes compute the same."""
    kinds = {
        "alora_invocation_tokens": "acts only from its invocation tokens on (aLoRA), which merged weights cannot; use it unmerged, through PEFT",
        "layer_replication": "repeats layers of the base (layer_replication), and the merged model would be another architecture; use it unmerged, "
        "through PEFT",
    }
    problems = []
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        problems += [f"{folder} {what}" for key, what in kinds.items() if config.get(key)]
    if problems:
        raise ModelError("; ".join(problems))


def refuse_uncombined(folders: Sequence[Path]) -> None:
    """Raise ModelError for adapters with parts that PEFT leaves out, without a word, when it makes one of several.

    So it does with what a beginning (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) took out of the base's weights: they stay changed by it under an
    adapter of another, and the combination has the weights' share of B·A where the adapter alone adds B·A - B₀·A₀.
    """
    kinds = {
        "use_dora": "DoRA's magnitudes",
        "modules_to_save": "modules that were trained in full",
        "trainable_token_indices": "trained token rows",
        "target_parameters": "adapters of parameters",
        "lora_bias": "biases of the adapter",
    }
    problems = []
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        parts = [what for key, what in kinds.items() if config.get(key)]
        if parts:
            problems.append(f"{folder} has {', '.join(parts)}, which PEFT does not combine; merge it alone")
        if config.get("bias") not in (None, "none"):
            problems.append(
                f"{folder} has biases of the base (bias: {config['bias']}), of which a model has one set; merge it alone"
            )
        if has_own_start(config):
            problems.append(
                f"{folder} began with {config['init_lora_weights']}, which took its beginning out of the base's weights, and counts over these: convert it to a plain "
                "adapter (PEFT's save_pretrained with path_initial_model_for_weight_conversion; a finished run's adapter/ is one), or merge it alone"
            )
    if problems:
        raise ModelError("; ".join(problems))


def load_combined(model: Any, folders: Sequence[Path], how: Combination | None) -> Any:
    """A PeftModel with the adapters of `folders` as one, active. Raises ModelError for what PEFT cannot combine."""
    if how is not None:
        refuse_uncombined(folders)
    adapted = load_adapter(model, folders[0])
    if how is None:
        return adapted
    names = ["default", *(f"adapter_{number}" for number in range(2, len(folders) + 1))]
    options = {} if how.density is None else {"density": how.density}
    rng = torch.get_rng_state()
    try:
        for folder, name in zip(folders[1:], names[1:], strict=True):
            report = adapted.load_adapter(str(folder), name)
            unfit: list[str] = [*report.missing_keys, *report.unexpected_keys]
            if unfit:
                raise ModelError(
                    f"{folder}: its tensors do not fit the base ({unfit[0]}); it was made for another one, or is damaged"
                )
        torch.manual_seed(SEED)
        adapted.add_weighted_adapter(
            names, list(how.weights), "combined", combination_type=how.method, svd_full_matrices=False, **options
        )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"PEFT cannot combine {', '.join(map(str, folders))} by {how.method}: {' '.join(str(error).split())}"
        ) from error
    finally:
        torch.set_rng_state(rng)
    # PEFT puts each adapter's scale into the factors and alpha = r on top, which is 1 but for rsLoRA, where it is the root of r.
    adapted.peft_config["combined"].use_rslora = False
    for module in adapted.modules():
        scales = getattr(module, "scaling", None)  # attention has a number of that name
        if isinstance(scales, dict) and "combined" in scales:
            scales["combined"] = 1.0
    adapted.set_adapter("combined")
    return adapted
