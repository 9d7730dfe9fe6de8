"""Adapters over the tiny base, and requests to an engine, for the tests of this folder."""

from __future__ import annotations

import queue
import random
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import ModelConfig
from tunesmith.hardware import ComputeDType, probe
from tunesmith.models.adapters import load_adapter
from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import end_tokens, generate_greedy
from tunesmith.models.load import find_model, load_model
from tunesmith.serving.adapter_bank import BASE
from tunesmith.serving.adapter_files import read_adapter
from tunesmith.serving.engine import Engine
from tunesmith.serving.generation import Event, Failed, Finished, Generation, Piece


def make_adapter(base: Path, folder: Path, seed: int, scale: float = 0.15, **settings: Any) -> Path:
    """A random adapter that moves the answers, its tensors of deviation `scale`, written by PEFT. `settings` go into its LoraConfig."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    values = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(model, LoraConfig(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def prompts(count: int, seed: int = 0, least: int = 1, most: int = 60) -> list[list[int]]:
    """Random prompts of unequal length."""
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randrange(least, most))] for _ in range(count)]


def base_forward(
    folder: Path, adapter: Path | None = None, dtype: ComputeDType = "fp32", device: str = "cpu"
) -> ModelForward:
    """The base, with an adapter by PEFT."""
    config = ModelConfig(name=str(folder))
    hardware = probe(device)
    model: Any = load_model(find_model(config), config, hardware, dtype)
    if adapter:
        model = load_adapter(model, adapter)
    model.eval()
    return ModelForward(model, hardware.device, dtype)


def one_by_one(
    folder: Path, adapter: Path | None, tokenizer: Any, prompts: list[list[int]], limit: int, device: str = "cpu"
) -> list[str]:
    """The greedy answers, each prompt alone, the adapter on by PEFT."""
    forward = base_forward(folder, adapter, device=device)
    found = [generate_greedy(forward, tokenizer, [prompt], limit, 1, decoding="growing")[0] for prompt in prompts]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def add(engine: Engine, path: Path) -> int:
    """Load an adapter into a running engine."""
    weights = read_adapter(path, engine.forward.base, engine.forward.device, torch.float32)
    return engine.between_steps(lambda: engine.bank.add(weights)).result(20)


class Asked:
    """A request, and the events that came back."""

    def __init__(self, engine: Engine, tokenizer: Any, prompt: list[int], adapter: int = BASE, **settings: Any):
        self.events: queue.Queue[Event] = queue.Queue()
        values = {"max_tokens": 16, "ends": frozenset(end_tokens(engine.forward.base, tokenizer)), **settings}
        self.generation = Generation(prompt, tokenizer, on_event=self.events.put, adapter=adapter, **values)
        engine.submit([self.generation])

    def answer(self) -> tuple[str, Finished | Failed]:
        """Wait for the end: the pieces joined, and how it ended."""
        text = ""
        while True:
            event = self.events.get(timeout=30)
            if not isinstance(event, Piece):
                return text, event
            text += event.text
