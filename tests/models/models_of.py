"""A tiny random model of each family that the fused engine knows, with odd sizes and perturbed norms and biases."""

from __future__ import annotations

from typing import Any

import torch

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama with biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 4,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def family_model(family: str, **settings: Any) -> Any:
    """A random two-layer model in fp32. `settings` go into its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "attn_implementation": "sdpa",
    }
    config = AutoConfig.for_model(family.split()[0], **{**values, **FAMILIES.get(family, {}), **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()
