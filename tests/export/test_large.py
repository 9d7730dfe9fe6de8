"""Embeddings and heads in parts compute what they do whole, and are never whole in fp32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_of import Kind, make_adapter
from tiny import make_tiny_model
from tunesmith.export import large
from tunesmith.export.beside import logits_of_whole
from tunesmith.export.safetensors import compare_logits, mean_kl
from tunesmith.export.skeleton import Skeleton
from tunesmith.export.tensors import Entry, rounded, write_tensors
from tunesmith.models.adapters import load_adapter

PROMPTS = [list(range(30)), [7, 7, 300, 258, 0]]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "tied": {"tie_word_embeddings": True}, "gemma2": {"head_dim": 16}, "gpt2": {}, "phi3": {},
}  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the weights that are multiplied by, with every matrix a large one."""
    monkeypatch.setattr(large, "LARGE", 1)
    monkeypatch.setattr(large, "ROWS_AT_ONCE", 32 * 7)
    sizes: list[int] = []
    linear = torch.nn.functional.linear

    def record(input: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        sizes.append(weight.numel())
        return linear(input, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    return sizes


@pytest.mark.parametrize("name", MODELS)
def test_parts_compute_what_the_whole_does(
    name: str, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model(tmp_path / "base", family=name if name != "tied" else "llama", hidden=32, **MODELS[name])
    skeleton = Skeleton(base)
    found = skeleton.logits(PROMPTS)
    assert max(seen) <= 32 * 7
    whole = logits_of_whole(base, PROMPTS, "cpu")
    monkeypatch.setattr(large, "LARGE", math.inf)
    torch.testing.assert_close(found, skeleton.logits(PROMPTS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, logits_of_whole(base, PROMPTS, "cpu"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert all(bool(parameter.isnan().all()) for parameter in skeleton.model.parameters()), "emptied again"
    assert not [module for module in skeleton.model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (Kind({"target_modules": "all-linear"}), 0),
        (Kind({"target_modules": ["embed_tokens", "lm_head", "q_proj"]}), 0),
        (Kind({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [320], "lm_head": [320]}}, rows=1), 1),
    ],
    ids=["linear", "embeddings and head", "new tokens"],
)  # fmt: skip
def test_under_an_adapter(
    kind: Kind, rows: int, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", kind)
    skeleton = Skeleton(base)
    skeleton.put_on(load_adapter(skeleton.model, adapter))
    prompts = [[*PROMPTS[0], *([320] if rows else [])], PROMPTS[1]]
    found = [skeleton.logits(prompts, adapter=on) for on in (True, False)]
    monkeypatch.setattr(large, "LARGE", math.inf)
    for one, on in zip(found, (True, False), strict=True):
        torch.testing.assert_close(one, skeleton.logits(prompts, adapter=on), rtol=1e-5, atol=1e-5)


def test_a_heads_bias_is_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "ROWS_AT_ONCE", 16)
    x, weight, bias = torch.randn(3, 8), torch.randn(21, 8).bfloat16(), torch.randn(21)
    expected = torch.nn.functional.linear(x, weight.float(), bias)
    torch.testing.assert_close(large.in_rows(x, weight, bias, torch.float32), expected)


def test_tensors_are_rounded_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    from tunesmith.export import tensors

    monkeypatch.setattr(tensors, "PART", 10)
    value = torch.randn(7, 13)
    entries = [
        Entry("a", (7, 13), torch.bfloat16),
        Entry("b", (13, 7), torch.float16),
        Entry("c", (0, 2), torch.float32),
    ]
    write_tensors(tmp_path / "x.safetensors", entries, iter([("a", value), ("b", value.T), ("c", torch.zeros(0, 2))]))
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], value.bfloat16())
    assert torch.equal(found["b"], value.T.half())
    assert found["c"].shape == (0, 2)
    assert torch.equal(rounded("a", value, torch.float32), value)


def test_comparisons_in_parts_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two, three = (torch.randn(75, 11, generator=generator) for _ in range(3))
    log_p, log_q = one.log_softmax(-1), two.log_softmax(-1)
    assert mean_kl(one, two) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    check = compare_logits(two, one, three)
    assert check.difference == pytest.approx(float((two - one).norm() / one.norm()))
    assert check.effect == pytest.approx(float((one - three).norm() / one.norm()))
