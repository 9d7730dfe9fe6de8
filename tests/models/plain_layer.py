"""A decoder layer in plain PyTorch, in any type: what the fused layer's hand-written backward is held to.

It reads its weights off the model's own modules, and runs every family from its LayerSpec; autograd differentiates it. The
families' own norms cast to fp32, so in fp64 they cannot be the reference; test_fused_layer.py holds this one to them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.models.families import LayerSpec
from tunesmith.models.linear_group import active_lora, base_layer


def linear(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """x Wᵀ + bias + scale · x Aᵀ Bᵀ of the projection `name`."""
    module = layer.get_submodule(name)
    base, lora = base_layer(module), active_lora(module)
    weight = base.weight
    if hasattr(weight, "quant_state"):
        import bitsandbytes.functional

        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).to(x.dtype)
    y = F.linear(x, weight, base.bias)
    return y if lora is None else y + lora.scale * F.linear(F.linear(x, lora.a.to(x.dtype)), lora.b.to(x.dtype))


def norm(layer: Any, name: str, x: torch.Tensor, offset: float) -> torch.Tensor:
    """x / rms(x) · (offset + weight)."""
    module = layer.get_submodule(name)
    eps = getattr(module, "variance_epsilon", None)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + (module.eps if eps is None else eps))
    return x * scale * (offset + module.weight)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Causal attention of one sequence: q (S, H, d), k and v (S, G, d)."""
    length, repeats = q.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = (j <= i) if window is None else (j <= i) & (i - j < window)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the first cos.shape[1] dimensions of x (T, H, d)."""
    rotary = cos.shape[-1]
    a, b = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
    turned = x[..., :rotary] * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]
    return torch.cat((turned, x[..., rotary:]), -1)


def plain_layer(
    layer: Any, spec: LayerSpec, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """The layer's output (T, D) for hidden states h (T, D) of sequences of `lengths`."""
    module = layer.get_submodule(spec.o.rpartition(".")[0])
    d, offset = module.head_dim, spec.norm_offset
    x = norm(layer, spec.attention_norm, h, offset)
    qkv = torch.cat([linear(layer, name, x) for name in spec.qkv], -1)
    heads = base_layer(layer.get_submodule(spec.o)).in_features // d
    groups = (qkv.shape[1] // d - heads) // 2
    q, k, v = (part.unflatten(1, (-1, d)) for part in qkv.split((heads * d, groups * d, groups * d), 1))
    if spec.q_norm is not None and spec.k_norm is not None:
        q, k = norm(layer, spec.q_norm, q, offset), norm(layer, spec.k_norm, k, offset)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    softcap = getattr(module, "attn_logit_softcapping", None)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    attended = torch.cat([attention(*part, module.scaling, window, softcap) for part in parts]).flatten(1)
    y = linear(layer, spec.o, attended)
    if spec.attention_post_norm is not None:
        y = norm(layer, spec.attention_post_norm, y, offset)
    h = h + y
    x = norm(layer, spec.mlp_norm, h, offset)
    gate, up = torch.cat([linear(layer, name, x) for name in spec.gate_up], -1).chunk(2, -1)
    config = layer.get_submodule("mlp").config
    gelu = "gelu" in (getattr(config, "hidden_activation", None) or config.hidden_act)
    y = linear(layer, spec.down, (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up)
    if spec.mlp_post_norm is not None:
        y = norm(layer, spec.mlp_post_norm, y, offset)
    return h + y
