"""What the decoder layer of each model family is: the table that the fused layer is driven by.

A family is one `LayerSpec`: where a layer keeps its norms and projections, and the few facts that its modules do not say.
Everything else (head counts, widths, epsilon, biases, attention scale, windows, soft-caps) is read off the layer itself.
Adding a family: docs/adding-a-family.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Half = Literal["attention", "mlp"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The module names of a decoder layer, relative to it, and its conventions.

    `qkv` and `gate_up` have one name where the family keeps one matrix for all (Phi-3). A norm that the family has not is
    None: `attention_post_norm` and `mlp_post_norm` act on a branch's output before it is added (Gemma 2 and 3), `q_norm`
    and `k_norm` on the heads of queries and keys (Qwen3, Gemma 3). A norm multiplies by `norm_offset` + weight.
    `halves` are the parts that fit; the rest stays the model's own.
    """

    family: str
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    norm_offset: float = 0.0
    halves: tuple[Half, ...] = ("attention", "mlp")
    note: str = ""


LLAMA = LayerSpec("Llama")
GEMMA2 = LayerSpec(
    "Gemma 2",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    norm_offset=1.0,
)

SPECS: dict[str, LayerSpec] = {
    "LlamaDecoderLayer": LLAMA,  # Llama 2, 3, 3.1, 3.2, Yi, SmolLM2
    "MistralDecoderLayer": replace(LLAMA, family="Mistral"),
    "Qwen2DecoderLayer": replace(LLAMA, family="Qwen2"),  # and Qwen2.5
    "Qwen3DecoderLayer": replace(LLAMA, family="Qwen3", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    "Phi3DecoderLayer": replace(LLAMA, family="Phi-3", qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    "Gemma2DecoderLayer": GEMMA2,
    "Gemma3DecoderLayer": replace(GEMMA2, family="Gemma 3", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    "MixtralDecoderLayer": replace(
        LLAMA, family="Mixtral", halves=("attention",), note="the experts are the model's own"
    ),
    "DeepseekV2DecoderLayer": replace(
        LLAMA, family="DeepSeek-V2", halves=("mlp",), note="latent attention is the model's own"
    ),
}
"""Specs by the class name of transformers' decoder layer."""

DENSE_MLP = {"DeepseekV2DecoderLayer": "DeepseekV2MLP"}
"""Families that mix dense and expert layers: the class of the dense MLP, which is what fits."""

PRESETS = ("all-linear", "attention", "mlp", "qv")
"""What `adapter.target_modules` may be beside a list of names."""

TAKEN_FOR_EXPERTS = {"deepseek_v2": ("gate_proj", "up_proj", "down_proj")}
"""By `model_type`, names of linear layers that PEFT takes for experts' parameters, as they were linear layers in transformers 4."""


def taken_for_experts(setting: object, missing: Iterable[str]) -> str:
    """Why `adapter.target_modules` is refused where PEFT leaves the linear layers `missing` as they are."""
    paths = sorted(missing)
    names = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
    return (
        f"adapter.target_modules {setting}: PEFT takes {names} of this family for its experts' parameters, so "
        f"that {len(paths)} linear layers would have no adapter ({paths[0]}), and all experts one; set "
        "adapter.target_modules: attention"
    )


def layer_spec(layer: torch.nn.Module) -> LayerSpec | str:
    """The spec of a decoder layer, or why there is none."""
    name = type(layer).__name__
    spec = SPECS.get(name)
    if spec is None or not type(layer).__module__.startswith("transformers.models."):
        return f"{name} is not a known family"
    dense = DENSE_MLP.get(name)
    if dense is not None and type(layer.get_submodule("mlp")).__name__ != dense:
        return f"{spec.family}: attention and experts of this layer are the model's own"
    return spec
