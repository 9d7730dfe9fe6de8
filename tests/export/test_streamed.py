"""Merging tensor by tensor: for every kind of adapter the weights that PEFT's own merge gives, in memory that does not grow with the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiny import make_tiny_model
from tunesmith.errors import ModelError, VerificationError
from tunesmith.export.skeleton import Skeleton, refuse_unstreamable
from tunesmith.export.streamed import write_merged
from tunesmith.export.tensors import Checkpoint, Entry, TensorFiles, Unstreamable, write_tensors
from tunesmith.models.adapters import load_adapter

IDS = torch.arange(40)[None]
SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Kind:
    """A base and a PEFT configuration of an adapter on it. `rows` more rows of embeddings than the base has."""

    lora: dict[str, Any]
    family: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 0


TIED = {"tie_word_embeddings": True}
KINDS = {
    "lora": Kind({"target_modules": "all-linear"}),
    "rslora, patterns": Kind(
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 5},
         "alpha_pattern": {"q_proj": 3}}
    ),
    "dora": Kind({"target_modules": "all-linear", "use_dora": True}),
    "biases": Kind({"target_modules": "all-linear", "bias": "none", "lora_bias": True}, "llama",
                   {"attention_bias": True, "mlp_bias": True}),
    "embeddings and head": Kind({"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "modules to save": Kind({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "embeddings saved, tied": Kind(
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "llama", TIED
    ),
    "token rows": Kind({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 300]}}),
    "token rows, tied": Kind({"target_modules": ["q_proj"], "trainable_token_indices": [3, 300]}, "llama", TIED),
    "new tokens": Kind(
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [320, 321], "lm_head": [320, 321]}},
        rows=2,
    ),
    "new tokens, tied": Kind({"target_modules": ["q_proj"], "trainable_token_indices": [320, 321]}, "llama", TIED, 2),
    "tied": Kind({"target_modules": "all-linear"}, "gemma2", {"head_dim": 16}),
    "gpt-2": Kind({"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, "gpt2"),
    "fused projections": Kind({"target_modules": "all-linear"}, "phi3"),
    "experts": Kind(
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "mixtral", SPARSE,
    ),
    "experts of gpt-oss": Kind(
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, "gpt_oss", {**SPARSE, "sliding_window": 16}
    ),
    "beside experts": Kind({"target_modules": ["q_proj"]}, "qwen3_moe",
                           {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
}  # fmt: skip


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def make_adapter(base: Path, folder: Path, kind: Kind, seed: int = 0) -> Path:
    """A saved adapter whose every tensor is random."""
    from peft import LoraConfig, get_peft_model

    model = plain(base)
    if kind.rows:
        model.resize_token_embeddings(320 + kind.rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **kind.lora))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if "magnitude" in name else 0.2
            parameter.data = scale * parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator).abs()
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_merge(base: Path, adapter: Path) -> Any:
    """What PEFT alone makes of it."""
    return load_adapter(plain(base), adapter).merge_and_unload()


def stream(base: Path, adapter: Path, out: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    skeleton = Skeleton(base)
    skeleton.put_on(load_adapter(skeleton.model, adapter))
    out.mkdir()
    write_merged(skeleton, out, dtype)
    return skeleton


@pytest.fixture(params=KINDS, ids=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    kind = KINDS[request.param]
    base = make_tiny_model(tmp_path / "base", family=kind.family, hidden=64, **kind.settings)
    return base, make_adapter(base, tmp_path / "adapter", kind)


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_pefts_merge(case: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = case
    stream(base, adapter, tmp_path / "out")
    theirs, ours, before = peft_merge(base, adapter), plain(tmp_path / "out"), plain(base)
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert (logits(before)[..., :320] - logits(ours)[..., :320]).norm() > 0.1 * logits(before).norm()


def test_the_streamed_logits_are_those_of_base_and_adapter(case: tuple[Path, Path]) -> None:
    base, adapter = case
    skeleton = Skeleton(base)
    skeleton.put_on(load_adapter(skeleton.model, adapter))
    prompts = [list(range(30)), list(range(7, 20))]
    tuned, bare = skeleton.logits(prompts), skeleton.logits(prompts, adapter=False)
    whole = load_adapter(plain(base), adapter).eval()
    with torch.no_grad():
        for rows, prompt in zip((slice(0, 30), slice(30, 43)), prompts, strict=True):
            torch.testing.assert_close(
                tuned[rows], whole(input_ids=torch.tensor([prompt])).logits[0], rtol=1e-4, atol=1e-4
            )
        expected = plain(base)(input_ids=torch.tensor(prompts[:1])).logits[0]
    torch.testing.assert_close(bare[:30, :320], expected, rtol=1e-4, atol=1e-4)
