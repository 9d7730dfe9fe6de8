"""The head's two ways through cross-entropy, as a matrix and as a module, agree for every family and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny import make_tiny_model
from tunesmith.config import ModelConfig
from tunesmith.hardware import ComputeDType, probe
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import find_model, load_model
from tunesmith.training import objectives
from tunesmith.training.objectives import cross_entropy_sum

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}
ROWS = 20

CalledLinear = type("CalledLinear", (torch.nn.Linear,), {})
"""Computes what nn.Linear does, but is not known to."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_tiny_model(root / name, family=name, **settings) for name, settings in FAMILIES.items()}


def forward_of(folder: Path, dtype: ComputeDType = "fp32") -> ModelForward:
    config = ModelConfig(name=str(folder))
    return ModelForward(load_model(find_model(config), config, probe("cpu"), "fp32"), "cpu", dtype)


def loss_and_gradients(forward: ModelForward) -> dict[str, torch.Tensor]:
    """Of rows with every kind of label, in the forward's autocast, times a factor."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, forward.head.in_features, generator=generator).requires_grad_()
    labels = torch.randint(forward.head.out_features, (ROWS,), generator=generator)
    labels[3::5] = -100
    forward.head.zero_grad()
    with forward.autocast():
        loss = cross_entropy_sum(forward, rows, labels)
    assert loss.dtype == torch.float32
    (loss / 16).backward()
    found = {"loss": loss.detach(), "rows": rows.grad, "weight": forward.head.weight.grad}
    if forward.head.bias is not None:
        found["bias"] = forward.head.bias.grad
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_agree(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, bias: bool, trainable: bool
) -> None:
    forward = forward_of(folders[family])
    if bias:
        forward.head.bias = torch.nn.Parameter(torch.linspace(-1, 1, forward.head.out_features))
    forward.head.requires_grad_(trainable)
    monkeypatch.setattr(objectives, "LOSS_ROWS", 7)
    as_matrix = loss_and_gradients(forward)
    forward.head.__class__ = CalledLinear
    as_module = loss_and_gradients(forward)
    assert as_matrix.keys() == as_module.keys()
    assert ("weight" in as_matrix) == trainable
    assert float(as_matrix["loss"]) == pytest.approx(float(as_module["loss"]), rel=1e-6)
    for name, expected in as_module.items():
        torch.testing.assert_close(as_matrix[name], expected, rtol=1e-4, atol=1e-7)
        assert expected.norm() > 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_both_ways_agree_in_16_bits(folders: dict[str, Path], family: str, dtype: ComputeDType) -> None:
    """Each is as far from fp32 as the other."""
    forward = forward_of(folders[family])
    exact = loss_and_gradients(forward)
    forward.dtype = dtype
    as_matrix = loss_and_gradients(forward)
    forward.head.__class__ = CalledLinear
    as_module = loss_and_gradients(forward)
    for name, expected in exact.items():
        assert as_matrix[name].dtype == as_module[name].dtype == torch.float32
        error, allowed = ((found[name] - expected).norm() for found in (as_matrix, as_module))
        assert error <= 2 * allowed, f"{name}: {error:.2e}, {allowed:.2e} as a module"


def test_only_a_plain_linear_is_taken_as_a_matrix(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    original = objectives.linear_cross_entropy
    monkeypatch.setattr(objectives, "linear_cross_entropy", lambda *a, **k: (taken.append(True), original(*a, **k))[1])
    forward = forward_of(folders["llama"])
    loss_and_gradients(forward)
    assert taken == [True]
    adapted: Any = get_peft_model(forward.model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    forward = ModelForward(adapted, "cpu", "fp32")
    rows, labels = torch.randn(ROWS, forward.head.in_features), torch.arange(ROWS)
    found = cross_entropy_sum(forward, rows, labels)
    assert taken == [True], "the adapter is part of the head"
    expected = torch.nn.functional.cross_entropy(forward.logits(rows), labels, reduction="sum")
    assert float(found.detach()) == pytest.approx(float(expected.detach()))
