"""A model that answers, by our generation and by transformers' own, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import ModelConfig
from tunesmith.hardware import ComputeDType, probe
from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import end_tokens, generate_greedy
from tunesmith.models.load import find_model, load_model, load_tokenizer

CPU = probe("cpu")
SHARED = "You sort waste into bins. Answer with the bin.\n"
QUESTIONS = (
    "can?",
    "Which bin takes the newspaper on the table?",
    "jar",
    "Which bin takes the leaf that I found behind the shed in the garden?",
    "And the peel?",
)


class Subject:
    """A model with what generation needs."""

    def __init__(self, folder: Path, dtype: ComputeDType = "fp32"):
        config = ModelConfig(name=str(folder))
        source = find_model(config)
        self.model: Any = load_model(source, config, CPU, dtype).eval()
        self.tokenizer = load_tokenizer(source, config)
        self.forward = ModelForward(self.model, "cpu", dtype)

    def encode(self, *texts: str) -> list[list[int]]:
        return [list(self.tokenizer(text)["input_ids"]) for text in texts]

    def ours(
        self, prompts: Sequence[Sequence[int]], new: int = 24, batch_size: int = 16, **more: Any
    ) -> list[list[int]]:
        return generate_greedy(self.forward, self.tokenizer, prompts, new, batch_size, **more)

    def theirs(self, prompts: Sequence[Sequence[int]], new: int = 24) -> list[list[int]]:
        """What `generate` of transformers answers to each prompt alone."""
        answers = []
        ends = end_tokens(self.model, self.tokenizer)
        for prompt in prompts:
            ids = torch.tensor([prompt])
            whole = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
            )[0].tolist()
            answer = whole[len(prompt) :]
            answers.append(answer[:-1] if answer and answer[-1] in ends else answer)
        return answers
