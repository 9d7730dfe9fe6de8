"""Greedy tokens of a mixed batch against `model.generate`, each prompt alone under PEFT: equal in fp32, in bf16 up to near-ties."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_models import Asked, base_forward, make_adapter
from transformers import AutoTokenizer

from tunesmith.config import ModelConfig
from tunesmith.hardware import ComputeDType
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import find_model
from tunesmith.serving.adapter_bank import BASE
from tunesmith.serving.adapter_files import read_adapter
from tunesmith.serving.engine import Engine
from tunesmith.workflows.quickstart import embedded_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FIRST = 0x10000
"""Tokens as characters beyond the surrogates: the engine answers in text, and here tokens are compared."""


class TokensAsText:
    """A tokenizer whose text says which tokens it was."""

    eos_token_id = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(chr(FIRST + token) for token in ids)


@dataclass
class Model:
    """A base, its adapters, prompts, and how many tokens answer each."""

    folder: Path
    adapters: dict[str, Path]
    tokens: int
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, adapters: dict[str, Path]) -> Model:
    rng = random.Random(7)
    return Model(
        tiny_model, adapters, 32, [[rng.randrange(256) for _ in range(rng.randrange(3, 40))] for _ in range(8)]
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = find_model(ModelConfig(name=str(embedded_model()))).path
    place = tmp_path_factory.mktemp("smollm2")
    adapters = {name: make_adapter(folder, place / name, seed, scale=0.08) for seed, name in enumerate(("cs", "hr"))}
    texts = [
        "The capital of France is",
        "Once upon a time, in a small village by the sea, there lived",
        "def fibonacci(n):\n",
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Model(folder, adapters, 16, [tokenizer(text)["input_ids"] for text in texts])


def mixed(model: Model, dtype: ComputeDType, fixed: bool) -> dict[str, list[list[int]]]:
    """The answers by adapter, of one batch: the third that is asked, which on a GPU is graphs."""
    forward = base_forward(model.folder, dtype=dtype, device=DEVICE)
    rows = [(name, place) for place in range(len(model.prompts)) for name in ("base", *model.adapters)]
    engine = Engine(forward, len(rows), 3 * len(rows), 512 * len(rows) if fixed else None, fixed)
    engine.start()
    try:
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        numbers = {"base": BASE}
        for name, path in model.adapters.items():
            weights = read_adapter(path, forward.base, forward.device, kind)
            numbers[name] = engine.between_steps(lambda weights=weights: engine.bank.add(weights)).result(60)
        settings: dict[str, Any] = {"max_tokens": model.tokens, "ends": frozenset()}
        for _ in range(3 if DEVICE == "cuda" else 1):
            asked = [
                Asked(engine, TokensAsText(), model.prompts[place], numbers[name], **settings) for name, place in rows
            ]
            ends = [one.answer() for one in asked]
        found: dict[str, list[list[int]]] = {name: [] for name in numbers}
        for (name, _), (text, _) in zip(rows, ends, strict=True):
            found[name].append([ord(character) - FIRST for character in text])
    finally:
        engine.stop()
    return found


def generated(forward: ModelForward, prompt: list[int], tokens: int) -> list[int]:
    """transformers' own greedy decoding, of so many tokens whatever they are."""
    ids = torch.tensor([prompt], device=forward.device)
    with torch.no_grad(), forward.autocast():
        out = forward.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            min_new_tokens=None,
            eos_token_id=[],
            pad_token_id=0,
        )
    return [int(token) for token in out[0, len(prompt) :]]


def next_logits(forward: ModelForward, ids: list[int]) -> torch.Tensor:
    with torch.no_grad(), forward.autocast():
        logits: torch.Tensor = forward.model(input_ids=torch.tensor([ids], device=forward.device)).logits[0, -1].float()
    return logits


def no_near_tie(
    prompt: list[int], found: list[int], expected: list[int], rounded: ModelForward, exact: ModelForward
) -> str | None:
    """Where two answers part for another reason than rounding; None where they do not.

    Rounding explains it where the two tokens' logits in fp32 are no further apart than 2.5 times what bf16 changes of this very
    position's logits: both tokens may move, and another order of sums may round by a quarter more than PEFT does.
    """
    if found == expected:
        return None
    place = next(place for place in range(len(expected)) if found[place] != expected[place])
    ids = prompt + expected[:place]
    true = next_logits(exact, ids)
    noise = float((next_logits(rounded, ids) - true).abs().max())
    gap = float((true[found[place]] - true[expected[place]]).abs())
    return None if gap <= 2.5 * noise else f"token {place}: {gap:.4f} apart, bf16 moves logits by {noise:.4f} at most"


@pytest.mark.parametrize("fixed", [False, True], ids=["a growing cache", "fixed places"])
@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_in_bf16_a_mixed_batch_is_generate_up_to_near_ties(
    name: str, fixed: bool, request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(name)
    found = mixed(model, "bf16", fixed)
    equal, mistaken = 0, []
    for adapter, path in {"base": None, **model.adapters}.items():
        rounded, exact = (base_forward(model.folder, path, dtype, DEVICE) for dtype in ("bf16", "fp32"))
        others = [answers for one, answers in found.items() if one != adapter]
        for place, prompt in enumerate(model.prompts):
            expected = generated(rounded, prompt, model.tokens)
            assert len(found[adapter][place]) == model.tokens
            said = no_near_tie(prompt, found[adapter][place], expected, rounded, exact)
            assert said is None, f"{adapter}, prompt {place}, {said}"
            equal += found[adapter][place] == expected
            mistaken += [no_near_tie(prompt, answers[place], expected, rounded, exact) is None for answers in others]
    assert equal >= len(model.prompts) * len(found) / 2
    assert sum(mistaken) <= len(mistaken) / 4, "another adapter's answer would pass for a near-tie"


@pytest.mark.parametrize("fixed", [False, True], ids=["a growing cache", "fixed places"])
def test_in_fp32_a_mixed_batch_is_generate(fixed: bool, tiny: Model) -> None:
    found = mixed(tiny, "fp32", fixed)
    for adapter, path in {"base": None, **tiny.adapters}.items():
        forward = base_forward(tiny.folder, path, device=DEVICE)
        assert found[adapter] == [generated(forward, prompt, tiny.tokens) for prompt in tiny.prompts]
