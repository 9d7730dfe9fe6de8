"""Shapes of well-known models, so that a run can be planned for a model that has not been downloaded.

Each entry holds the parts of the maker's config.json that fix the model's family and the size of every tensor. Left
out: token ids, norm epsilons, RoPE scaling, and what has transformers' default. Of Gemma 3 from 4B on it is the text
model (`text_config`); the vision tower is not counted.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Any

NO_LIMIT = 10**9
"""Tokens from which on `max_position_embeddings` is no limit of a model: some are written with 10^12 or 10^30."""


def _config(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    positions: int,
    tied: bool,
    theta: float,
    **more: Any,
) -> dict[str, Any]:
    """One row of the tables below under the names of config.json."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        **more,
    }


def _gemma2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, query_pre_attn_scalar: int
) -> dict[str, Any]:
    """Gemma 2: every second layer looks back 4,096 tokens; scores and logits are capped."""
    return _config(
        *("gemma2", hidden, intermediate, layers, heads, kv_heads, 256000, 8192, True, 1e4),
        head_dim=head_dim,
        query_pre_attn_scalar=query_pre_attn_scalar,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )


def _gemma3(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    positions: int,
    window: int,
    head_dim: int = 256,
    query_pre_attn_scalar: int = 256,
) -> dict[str, Any]:
    """Gemma 3: five of six layers look back `window` tokens."""
    return _config(
        *("gemma3_text", hidden, intermediate, layers, heads, kv_heads, vocab, positions, True, 1e6),
        rope_local_base_freq=1e4,
        head_dim=head_dim,
        query_pre_attn_scalar=query_pre_attn_scalar,
        sliding_window=window,
        sliding_window_pattern=6,
    )


def _deepseek2(hidden: int, intermediate: int, layers: int, heads: int, **experts: Any) -> dict[str, Any]:
    """DeepSeek V2: attention through a latent of 512, one dense layer, then two shared and six routed experts a token."""
    return _config(
        *("deepseek_v2", hidden, intermediate, layers, heads, heads, 102400, 163840, False, 1e4),
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        norm_topk_prob=False,
        attention_bias=False,
        **experts,
    )


_QWEN3_30B = {
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
}

_QWEN3_235B: dict[str, Any] = {**_QWEN3_30B, "moe_intermediate_size": 1536}

CATALOGUE: dict[str, dict[str, Any]] = {
    # type, hidden, intermediate, layers, heads, key-value heads, vocabulary, positions, tied, RoPE's theta
    "meta-llama/Llama-2-7b-hf": _config("llama", 4096, 11008, 32, 32, 32, 32000, 4096, False, 1e4),
    "meta-llama/Llama-2-13b-hf": _config("llama", 5120, 13824, 40, 40, 40, 32000, 4096, False, 1e4),
    "meta-llama/Llama-2-70b-hf": _config("llama", 8192, 28672, 80, 64, 8, 32000, 4096, False, 1e4),
    "meta-llama/Meta-Llama-3-8B": _config("llama", 4096, 14336, 32, 32, 8, 128256, 8192, False, 5e5),
    "meta-llama/Meta-Llama-3-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256, 8192, False, 5e5),
    "meta-llama/Llama-3.1-8B": _config("llama", 4096, 14336, 32, 32, 8, 128256, 131072, False, 5e5),
    "meta-llama/Llama-3.1-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256, 131072, False, 5e5),
    "meta-llama/Llama-3.1-405B": _config("llama", 16384, 53248, 126, 128, 8, 128256, 131072, False, 5e5),
    "meta-llama/Llama-3.2-1B": _config("llama", 2048, 8192, 16, 32, 8, 128256, 131072, True, 5e5, head_dim=64),
    "meta-llama/Llama-3.2-3B": _config("llama", 3072, 8192, 28, 24, 8, 128256, 131072, True, 5e5, head_dim=128),
    "meta-llama/Llama-3.3-70B-Instruct": _config("llama", 8192, 28672, 80, 64, 8, 128256, 131072, False, 5e5),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _config("llama", 2048, 5632, 22, 32, 4, 32000, 2048, False, 1e4),
    "HuggingFaceTB/SmolLM2-135M": _config("llama", 576, 1536, 30, 9, 3, 49152, 8192, True, 1e5),
    "HuggingFaceTB/SmolLM2-360M": _config("llama", 960, 2560, 32, 15, 5, 49152, 8192, True, 1e5),
    "HuggingFaceTB/SmolLM2-1.7B": _config("llama", 2048, 8192, 24, 32, 32, 49152, 8192, True, 1.3e5),
    "HuggingFaceTB/SmolLM3-3B": _config(
        "smollm3", 2048, 11008, 36, 16, 4, 128256, 65536, True, 5e6, no_rope_layer_interval=4
    ),
    "01-ai/Yi-6B": _config("llama", 4096, 11008, 32, 32, 4, 64000, 4096, False, 5e6),
    "01-ai/Yi-9B": _config("llama", 4096, 11008, 48, 32, 4, 64000, 4096, False, 1e4),
    "01-ai/Yi-34B": _config("llama", 7168, 20480, 60, 56, 8, 64000, 4096, False, 5e6),
    "01-ai/Yi-1.5-6B": _config("llama", 4096, 11008, 32, 32, 4, 64000, 4096, False, 5e6),
    "01-ai/Yi-1.5-9B": _config("llama", 4096, 11008, 48, 32, 4, 64000, 4096, False, 5e6),
    "01-ai/Yi-1.5-34B": _config("llama", 7168, 20480, 60, 56, 8, 64000, 4096, False, 5e6),
    "mistralai/Mistral-7B-v0.1": _config(
        "mistral", 4096, 14336, 32, 32, 8, 32000, 32768, False, 1e4, sliding_window=4096
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": _config(
        "mistral", 4096, 14336, 32, 32, 8, 32000, 32768, False, 1e6, sliding_window=None
    ),
    "mistralai/Mistral-7B-v0.3": _config(
        "mistral", 4096, 14336, 32, 32, 8, 32768, 32768, False, 1e6, sliding_window=None
    ),
    "mistralai/Mistral-Nemo-Base-2407": _config(
        "mistral", 5120, 14336, 40, 32, 8, 131072, 131072, False, 1e6, head_dim=128, sliding_window=None
    ),
    "mistralai/Mistral-Small-24B-Base-2501": _config(
        "mistral", 5120, 32768, 40, 32, 8, 131072, 32768, False, 1e8, head_dim=128, sliding_window=None
    ),
    "mistralai/Mixtral-8x7B-v0.1": _config(
        "mixtral", 4096, 14336, 32, 32, 8, 32000, 32768, False, 1e6, num_local_experts=8, num_experts_per_tok=2
    ),
    "mistralai/Mixtral-8x22B-v0.1": _config(
        "mixtral", 6144, 16384, 56, 48, 8, 32000, 65536, False, 1e6, num_local_experts=8, num_experts_per_tok=2
    ),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": _config(
        "mixtral", 6144, 16384, 56, 48, 8, 32768, 65536, False, 1e6, num_local_experts=8, num_experts_per_tok=2
    ),
    "microsoft/Phi-3-mini-4k-instruct": _config(
        "phi3", 3072, 8192, 32, 32, 32, 32064, 4096, False, 1e4, sliding_window=2047
    ),
    "microsoft/Phi-3-mini-128k-instruct": _config(
        "phi3", 3072, 8192, 32, 32, 32, 32064, 131072, False, 1e4, sliding_window=262144
    ),
    "microsoft/Phi-3-medium-4k-instruct": _config(
        "phi3", 5120, 17920, 40, 40, 10, 32064, 4096, False, 1e4, sliding_window=2047
    ),
    "microsoft/Phi-3-medium-128k-instruct": _config(
        "phi3", 5120, 17920, 40, 40, 10, 32064, 131072, False, 1e4, sliding_window=131072
    ),
    "microsoft/Phi-3.5-mini-instruct": _config(
        "phi3", 3072, 8192, 32, 32, 32, 32064, 131072, False, 1e4, sliding_window=262144
    ),
    "microsoft/phi-4": _config("phi3", 5120, 17920, 40, 40, 10, 100352, 16384, False, 2.5e5, sliding_window=None),
    "microsoft/Phi-4-mini-instruct": _config(
        *("phi3", 3072, 8192, 32, 24, 8, 200064, 131072, True, 1e4), sliding_window=262144, partial_rotary_factor=0.75
    ),
    "Qwen/Qwen2-0.5B": _config("qwen2", 896, 4864, 24, 14, 2, 151936, 131072, True, 1e6),
    "Qwen/Qwen2-1.5B": _config("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, True, 1e6),
    "Qwen/Qwen2-7B": _config("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, False, 1e6),
    "Qwen/Qwen2-72B": _config("qwen2", 8192, 29568, 80, 64, 8, 152064, 131072, False, 1e6),
    "Qwen/Qwen2-57B-A14B": _config(
        *("qwen2_moe", 3584, 18944, 28, 28, 4, 151936, 131072, False, 1e6),
        moe_intermediate_size=2560,
        shared_expert_intermediate_size=20480,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        decoder_sparse_step=1,
    ),
    "Qwen/Qwen2.5-0.5B": _config("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, True, 1e6),
    "Qwen/Qwen2.5-1.5B": _config("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, True, 1e6),
    "Qwen/Qwen2.5-3B": _config("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, True, 1e6),
    "Qwen/Qwen2.5-7B": _config("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, False, 1e6),
    "Qwen/Qwen2.5-14B": _config("qwen2", 5120, 13824, 48, 40, 8, 152064, 131072, False, 1e6),
    "Qwen/Qwen2.5-32B": _config("qwen2", 5120, 27648, 64, 40, 8, 152064, 131072, False, 1e6),
    "Qwen/Qwen2.5-72B": _config("qwen2", 8192, 29568, 80, 64, 8, 152064, 131072, False, 1e6),
    "Qwen/Qwen3-0.6B": _config("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, True, 1e6, head_dim=128),
    "Qwen/Qwen3-1.7B": _config("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, True, 1e6, head_dim=128),
    "Qwen/Qwen3-4B": _config("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, True, 1e6, head_dim=128),
    "Qwen/Qwen3-4B-Instruct-2507": _config("qwen3", 2560, 9728, 36, 32, 8, 151936, 262144, True, 5e6, head_dim=128),
    "Qwen/Qwen3-8B": _config("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, False, 1e6, head_dim=128),
    "Qwen/Qwen3-14B": _config("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960, False, 1e6, head_dim=128),
    "Qwen/Qwen3-32B": _config("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, False, 1e6, head_dim=128),
    "Qwen/Qwen3-30B-A3B": _config("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, 40960, False, 1e6, **_QWEN3_30B),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _config(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, 262144, False, 1e7, **_QWEN3_30B
    ),
    "Qwen/Qwen3-235B-A22B": _config(
        *("qwen3_moe", 4096, 12288, 94, 64, 4, 151936, 40960, False, 1e6),
        **_QWEN3_235B,
    ),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _config(
        *("qwen3_moe", 4096, 12288, 94, 64, 4, 151936, 262144, False, 5e6),
        **_QWEN3_235B,
    ),
    "google/gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4, head_dim=256, query_pre_attn_scalar=256),
    "google/gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8, head_dim=256, query_pre_attn_scalar=256),
    "google/gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
    "google/gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, 262144, 32768, window=512),
    "google/gemma-3-1b-pt": _gemma3(1152, 6912, 26, 4, 1, 262144, 32768, window=512),
    "google/gemma-3-4b-pt": _gemma3(2560, 10240, 34, 8, 4, 262208, 131072, window=1024),
    "google/gemma-3-12b-pt": _gemma3(3840, 15360, 48, 16, 8, 262208, 131072, window=1024),
    "google/gemma-3-27b-pt": _gemma3(
        5376, 21504, 62, 32, 16, 262208, 131072, window=1024, head_dim=128, query_pre_attn_scalar=168
    ),
    "deepseek-ai/DeepSeek-V2-Lite": _deepseek2(
        *(2048, 10944, 27, 16),
        q_lora_rank=None,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
    "deepseek-ai/DeepSeek-V2": _deepseek2(
        *(5120, 12288, 60, 128),
        q_lora_rank=1536,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        routed_scaling_factor=16.0,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
    ),
}
"""Hub id of the base model (of the released one where there is no base) to its shape, in config.json's words."""

ALSO_KNOWN_AS: dict[str, str] = {
    "mistralai/Mistral-Nemo-12B": "mistralai/Mistral-Nemo-Base-2407",
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    **{f"Qwen/Qwen2.5-Coder-{size}": f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")},
}
"""Names of models that have an entry's shape. Qwen2.5-Coder takes 32,768 tokens, whatever its entry says."""

MANY = 6
"""Ids that a message names."""

SAME_SHAPE = frozenset({"instruct", "it", "chat", "base", "pt", "hf", "meta", "thinking"})
"""Words that tell how a model was trained or saved, and leave its shape alone."""


def find_model_config(name: str) -> tuple[str, dict[str, Any]] | None:
    """The catalogue's id and shape for a model's name, or None.

    Case, separators and the organisation do not matter, so that mirrors are found too. A name may leave out how the
    model was trained (`-Instruct`, `-it`, `-hf`) and its version (`-v0.1`, `-2407`), but only where every model that it
    could then mean has the same shape: `mistral-7b` is None, because v0.1 and v0.3 differ. The shape is of the id
    returned; what is shared by all that it stands for are the tensors' sizes, not always `max_position_embeddings`
    (131,072 of Qwen2.5-7B, 32,768 of Qwen2.5-7B-Instruct).
    """
    words = words_of(name)
    exact, trained, versioned = _indexes()
    for index, key in ((exact, words), (trained, _untrained(words)), (versioned, _untrained(words))):
        found = index.get(key, [])
        if found:
            shape = CATALOGUE[found[0]]
            return (found[0], dict(shape)) if all(CATALOGUE[other] == shape for other in found) else None
    return None


def nearest_models(name: str) -> list[str]:
    """Up to three ids of the catalogue whose names are close to `name`, the closest first."""
    ids: dict[str, list[str]] = {}
    for known in CATALOGUE:
        ids.setdefault(" ".join(_untrained(words_of(known))), []).append(known)
    close = difflib.get_close_matches(" ".join(_untrained(words_of(name))), ids, n=3)
    return [known for text in close for known in ids[text]][:3]


def models_meant(name: str) -> str:
    """What an error adds to the name of a model that is not known: those that it could mean, else those like it."""
    if len(several := _completions(name)) > 1:
        more = "" if len(several) <= MANY else f" or {len(several) - MANY} more"
        return f"; several known models have such names: name one of {', '.join(several[:MANY])}{more}"
    near = nearest_models(name)
    return f"; known models like it: {', '.join(near)}" if near else ""


def unknown_model(name: str) -> str:
    """The error of a name that is neither a folder's nor one known model's nor a hub id."""
    return f"{name}: no such model folder and no known model (a hub id looks like org/model){models_meant(name)}"


def _completions(name: str) -> list[str]:
    """Ids whose names begin with the words of `name`: Mistral-7B's are v0.1, v0.2 and v0.3."""
    words = _untrained(words_of(name))
    return [known for known in CATALOGUE if words and _untrained(words_of(known))[: len(words)] == words]


def words_of(name: str) -> tuple[str, ...]:
    """Words and numbers of a name without its organisation: `org/Llama3.1-8B` becomes llama, 3.1, 8, b."""
    text = name.lower().rstrip("/").rpartition("/")[2].removesuffix("-bnb-4bit").removesuffix("-unsloth")
    return tuple(re.findall(r"\d+(?:[x.]\d+)?|[a-z]+", text))


def _untrained(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if word not in SAME_SHAPE)


def _unversioned(words: tuple[str, ...]) -> tuple[str, ...]:
    """Without a trailing `v0.1` or a date like 2407. DeepSeek's V2 stays: it names another model."""
    if len(words) > 2 and words[-2] == "v" and "." in words[-1]:
        return words[:-2]
    return words[:-1] if re.fullmatch(r"\d{4}", words[-1]) else words


@cache
def _indexes() -> tuple[dict[tuple[str, ...], list[str]], ...]:
    """Ids by all words of their names, by those less SAME_SHAPE, and by those less the version too."""
    exact: dict[tuple[str, ...], list[str]] = {}
    trained: dict[tuple[str, ...], list[str]] = {}
    versioned: dict[tuple[str, ...], list[str]] = {}
    for name, known in {**{name: name for name in CATALOGUE}, **ALSO_KNOWN_AS}.items():
        words = words_of(name)
        exact.setdefault(words, []).append(known)
        trained.setdefault(_untrained(words), []).append(known)
        versioned.setdefault(_unversioned(_untrained(words)), []).append(known)
    return exact, trained, versioned
