"""PEFT adapters of any kind whose every tensor is random, and what transformers and PEFT alone compute with them.

adapter = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": ["q_proj"]}))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

IDS = torch.arange(40)[None]


@dataclass(frozen=True)
class Kind:
    """A base and a PEFT configuration of an adapter on it. `rows` more rows of embeddings than the base has."""

    lora: dict[str, Any]
    family: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 0


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
