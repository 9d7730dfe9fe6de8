"""sdpa with repeated keys: where it is taken, and that it computes what transformers' own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from tiny import make_tiny_model
from tunesmith.config import ModelConfig
from tunesmith.hardware import Hardware, probe
from tunesmith.models import load
from tunesmith.models.attention import REPEATED, implementation

T4 = Hardware("cuda:0", "Tesla T4", 14.6, False, (7, 5))
H100 = Hardware("cuda:0", "NVIDIA H100 80GB HBM3", 79.2, True, (9, 0))


@pytest.mark.parametrize(
    ("asked", "hardware", "dtype", "expected"),
    [
        ("sdpa", T4, "fp16", REPEATED),
        ("sdpa", T4, "fp32", REPEATED),
        ("sdpa", H100, "fp32", REPEATED),
        ("sdpa", H100, "bf16", "sdpa"),
        ("sdpa", H100, "fp16", "sdpa"),
        ("sdpa", probe("cpu"), "fp32", "sdpa"),
        ("eager", T4, "fp16", "eager"),
    ],
)
def test_keys_are_repeated_where_no_kernel_takes_shared_ones(
    asked: str, hardware: Hardware, dtype: Any, expected: str
) -> None:
    assert implementation(asked, hardware, dtype) == expected


def test_models_are_loaded_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "model", heads=4, kv_heads=2)
    monkeypatch.setattr(load.attention, "takes_grouped_keys", lambda capability, dtype: False)
    config = ModelConfig(name=str(folder))
    on_cpu = Hardware("cpu", "CPU", 8.0, True)
    model = load.load_model(load.find_model(config), config, on_cpu, "fp32")
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(load.attention, "implementation", lambda *_: implementation("sdpa", T4, "fp16"))
    model = load.load_model(load.find_model(config), config, on_cpu, "fp32")
    assert model.config._attn_implementation == REPEATED
    model.save_pretrained(tmp_path / "saved")
    assert REPEATED not in (tmp_path / "saved" / "config.json").read_text()


def models(**settings: Any) -> list[Any]:
    """Two models with the same weights: transformers' sdpa, and repeated keys."""
    implementation("sdpa", T4, "fp16")
    usual = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    made = []
    for attention in ("sdpa", REPEATED):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**{**usual, "model_type": "llama", **settings}, attn_implementation=attention)
        made.append(AutoModelForCausalLM.from_config(config))
    return made


PADDED = torch.tensor([[1] * 21, [1] * 13 + [0] * 8, [1] * 20 + [0]])
PACKED = torch.cat([torch.arange(n) for n in (5, 9, 7)])[None].expand(3, -1)


@pytest.mark.parametrize(
    "batch", [{}, {"attention_mask": PADDED}, {"position_ids": PACKED}], ids=["dense", "padded", "packed"]
)
@pytest.mark.parametrize("window", [None, 4])
def test_logits_and_gradients_are_sdpas(
    batch: dict[str, torch.Tensor], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    grouped: list[bool] = []

    def watched(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        grouped.append(tensors[0].shape[1] != tensors[1].shape[1])
        return scaled_dot_product_attention(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    found = []
    for model in models(**settings):
        ids = torch.randint(1, 64, (3, 21), generator=torch.Generator().manual_seed(1))
        logits = model(ids, use_cache=False, **batch).logits
        (logits.float() ** 2)[:, :13].mean().backward()
        found.append((logits[:, :13], [parameter.grad for parameter in model.parameters()]))
    assert grouped[2:] == [False, False]
    assert grouped[:2] == [not batch and window is None] * 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_generation_with_a_cache_is_sdpas(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    one, other = (model.generate(ids, max_new_tokens=12, do_sample=False) for model in models())
    assert one.shape == (2, 21)
    torch.testing.assert_close(other, one, rtol=0, atol=0)
