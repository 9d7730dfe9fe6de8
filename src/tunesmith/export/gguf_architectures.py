"""What a GGUF file says of a model, and the names and layout of its tensors, for each family.

Facts of the format: the `gguf` package's constants (keys, tensor names), and llama.cpp's loaders (src/models/*.cpp) for what they take
as given. Where the file cannot say what a model does, the model is refused; where llama.cpp does something else beyond some length, a
note says so.

- Llama and Mistral: rows of q and k are reordered within each head, because llama.cpp rotates neighbouring pairs (x₀, x₁) and
  transformers the halves (x₀, x_{d/2}): row 2i of the file is row i of the model, row 2i + 1 is row i + d/2.
- Gemma: a norm multiplies by 1 + weight; the file holds 1 + weight.
- Phi-3: q, k, v and gate, up are one matrix each, in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tunesmith.errors import ModelError

ARCHITECTURES = {
    "llama": "LLAMA",  # Llama 2 to 3.3, SmolLM2, Yi
    "mistral": "LLAMA",
    "qwen2": "QWEN2",  # and Qwen2.5
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
}
"""transformers' `model_type` to the name of the architecture in `gguf.MODEL_ARCH`."""

PERIOD = {"gemma2": 2, "gemma3_text": 6}
"""Every how many layers one looks at everything, as llama.cpp takes it where the file says nothing."""

SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
"""The number of layers by which llama.cpp knows the 27B, whose scores are scaled by 1/√(width / heads), not 1/√(head size)."""


@dataclass(slots=True)
class Description:
    """The metadata of one model: its architecture, keys (without the architecture's prefix), extra tensors, and notes for the user."""

    architecture: str
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    tied: bool = False

    @property
    def queries_per_key(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads


def describe(config: Any) -> Description:
    """What the file says of a model with this transformers config. Raises ModelError for what GGUF or llama.cpp cannot do."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"model_type {kind!r} cannot be exported to GGUF; expected one of {', '.join(sorted(ARCHITECTURES))} "
            "(export safetensors with `tunesmith merge`, and use llama.cpp's own converter)"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    found = Description(
        ARCHITECTURES[kind],
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        tied=bool(config.tie_word_embeddings),
    )
    found.keys |= {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    _describe_activation(config)
    _describe_rope(config, found, head_dim)
    _describe_windows(config, found)
    if kind.startswith("gemma"):
        _describe_gemma(config, found, head_dim)
    return found


def _describe_activation(config: Any) -> None:
    """llama.cpp has one activation for each family: SiLU, and the tanh form of GELU in Gemma."""
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    expected = ("gelu_pytorch_tanh",) if config.model_type.startswith("gemma") else ("silu", "swish")
    if name not in expected:
        raise ModelError(f"hidden_act is {name!r}: llama.cpp computes {expected[0]} for {config.model_type}")


def _describe_rope(config: Any, found: Description, head_dim: int) -> None:
    parameters = config.rope_parameters
    whole: dict[str, Any] = parameters.get("full_attention", parameters)
    local: dict[str, Any] | None = parameters.get("sliding_attention")
    rotated = int(head_dim * (whole.get("partial_rotary_factor") or 1.0))
    found.keys |= {"rope.dimension_count": rotated, "rope.freq_base": float(whole["rope_theta"])}
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise ModelError(f"RoPE of sliding layers is scaled ({local['rope_type']}): llama.cpp does not do that")
        if config.model_type == "gemma3_text":
            found.keys["rope.freq_base_swa"] = float(local["rope_theta"])
        elif local["rope_theta"] != whole["rope_theta"]:
            raise ModelError(f"{config.model_type}: sliding and full layers have different rope_theta; GGUF has one")
    kind = whole.get("rope_type", "default")
    if kind == "default":
        return
    if kind == "linear":
        found.keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(whole["factor"])}
    elif kind == "llama3" and found.architecture == "LLAMA":
        found.tensors["rope_freqs.weight"] = _llama3_factors(config, rotated, float(whole["rope_theta"]))
    elif kind == "yarn" and not whole.get("mscale") and not whole.get("mscale_all_dim"):
        _describe_yarn(config, found, whole)
    elif kind == "longrope" and found.architecture == "PHI3":
        _describe_longrope(config, found, whole, rotated)
    else:
        raise ModelError(
            f"rope_type {kind!r} of {config.model_type} cannot be written to GGUF; expected default, linear, yarn, llama3 "
            "(Llama) or longrope (Phi-3)"
        )


def _llama3_factors(config: Any, rotated: int, theta: float) -> np.ndarray:
    """θ^(-2i/d) over transformers' frequencies: what llama.cpp divides each frequency by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / theta ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    return np.asarray((plain / scaled.double()).numpy(), dtype=np.float32)


def _describe_yarn(config: Any, found: Description, rope: dict[str, Any]) -> None:
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    found.keys |= {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(original),
    }
    usual = 0.1 * math.log(rope["factor"]) + 1.0  # YaRN's (arXiv 2309.00071), which llama.cpp computes itself
    if (scale := rope.get("attention_factor")) is not None and abs(scale - usual) > 1e-6:
        raise ModelError(
            f"attention_factor of YaRN is {scale}: llama.cpp computes {usual:.4f} for factor {rope['factor']}"
        )
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            found.keys[f"rope.scaling.yarn_{key}"] = float(rope[key])


def _describe_longrope(config: Any, found: Description, rope: dict[str, Any], rotated: int) -> None:
    original = int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    factor = rope.get("factor") or config.max_position_embeddings / original
    scale = rope.get("attention_factor")
    if scale is None:  # LongRoPE, arXiv 2402.13753
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    found.keys |= {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(scale)}
    found.notes.append(
        f"llama.cpp takes the short or the long RoPE factors by the context that it is given (-c; num_ctx in Ollama), for all prompts: those of "
        f"prompts up to {original} tokens with a context of up to {original}, those of longer ones with more"
    )
    for length in ("long", "short"):
        factors = rope[f"{length}_factor"]
        if len(factors) != rotated // 2:
            raise ModelError(
                f"{length}_factor has {len(factors)} values, expected {rotated // 2}: half of what is rotated"
            )
        found.tensors[f"rope_factors_{length}.weight"] = np.asarray(factors, dtype=np.float32)


def _describe_windows(config: Any, found: Description) -> None:
    """Sliding windows. Where llama.cpp knows none for a family, every layer looks at everything: the same up to the window's length."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or []
    slides = bool(window) and ("sliding_attention" in layers or not layers)
    if config.model_type in PERIOD:
        if not window or not slides:
            raise ModelError(f"{config.model_type} without sliding layers cannot be written to GGUF")
        found.keys["attention.sliding_window"] = int(window)
        period = _period(layers) if layers else PERIOD[config.model_type]
        if period != PERIOD[config.model_type]:
            found.keys["attention.sliding_window_pattern"] = period
        return
    if config.model_type == "phi3":
        found.keys["attention.sliding_window"] = int(window or 0)
    if slides and window < config.max_position_embeddings:
        found.notes.append(
            f"the model looks back {window} tokens, llama.cpp at everything: the same up to {window} tokens of context, "
            "not beyond"
        )


def _period(layers: list[str]) -> int:
    """Every how many layers one is full, counted from the first. Raises ModelError where there is no such period."""
    period = layers.index("full_attention") + 1 if "full_attention" in layers else len(layers) + 1
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(layers))]
    if layers != expected:
        raise ModelError(
            f"layer_types follow no period that GGUF can say (full layers: every {period}th expected): {layers}"
        )
    return period


def _describe_gemma(config: Any, found: Description, head_dim: int) -> None:
    by_width = config.num_hidden_layers == SCALED_BY_WIDTH[config.model_type]
    expected = config.hidden_size // config.num_attention_heads if by_width else head_dim
    if config.query_pre_attn_scalar != expected:
        raise ModelError(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}: llama.cpp scales by {expected} for a {config.model_type} of "
            f"{config.num_hidden_layers} layers, and the file cannot say otherwise"
        )
    if config.model_type == "gemma2" and not found.tied:
        raise ModelError("gemma2 with an output matrix of its own (tie_word_embeddings: false): llama.cpp reads none")
    attention, final = config.attn_logit_softcapping, config.final_logit_softcapping
    if config.model_type == "gemma2":
        if not attention or not final:
            raise ModelError(
                "gemma2 without soft-caps: llama.cpp always caps; expected attn_ and final_logit_softcapping"
            )
        found.keys["attn_logit_softcapping"] = float(attention)
    elif attention:
        raise ModelError("gemma3 with attn_logit_softcapping: llama.cpp has none for it")
    if final:
        found.keys["final_logit_softcapping"] = float(final)


def tensors(state: Mapping[str, torch.Tensor], found: Description) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF's names with the tensors of `state` (transformers' names) as the file holds them. Raises ModelError for an unknown name."""
    names = tensor_names(found)
    for name, tensor in state.items():
        if name == "lm_head.weight" and found.tied:
            continue
        yield translate(name, names, found), as_stored(name, tensor, found)


def tensor_names(found: Description) -> Any:
    """The gguf package's map of tensor names for this model."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[found.architecture], found.num_layers)


def translate(name: str, names: Any, found: Description) -> str:
    """GGUF's name of a tensor. Raises ModelError for one that its architecture does not have."""
    translated = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if translated is None:
        raise ModelError(f"the tensor {name} has no place in a GGUF file of architecture {found.architecture.lower()}")
    return str(translated)


def as_stored(name: str, tensor: torch.Tensor, found: Description) -> torch.Tensor:
    """A weight or bias with its rows in the file's order, or a Gemma norm with its 1 added (in fp32)."""
    module, _, part = name.rpartition(".")
    if found.architecture.startswith("GEMMA") and module.endswith("norm") and part == "weight":
        return tensor.float() + 1.0
    if found.architecture == "LLAMA" and module.endswith((".q_proj", ".k_proj")):
        return pair_rows(tensor, found.num_heads if module.endswith(".q_proj") else found.num_kv_heads)
    return tensor


def as_read(name: str, tensor: torch.Tensor, found: Description) -> torch.Tensor:
    """A tensor of the file as transformers has it: the inverse of `as_stored`."""
    module, _, part = name.rpartition(".")
    if found.architecture.startswith("GEMMA") and module.endswith("norm") and part == "weight":
        return tensor - 1.0
    if found.architecture == "LLAMA" and module.endswith((".q_proj", ".k_proj")):
        heads = found.num_heads if module.endswith(".q_proj") else found.num_kv_heads
        pairs = tensor.unflatten(0, (heads, tensor.shape[0] // heads // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)
    return tensor


def pair_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads · d, ...) with the halves of each head interleaved: row 2i is row i, row 2i + 1 is row i + d/2."""
    halves = tensor.unflatten(0, (heads, 2, tensor.shape[0] // heads // 2))
    return halves.transpose(1, 2).flatten(0, 2)
