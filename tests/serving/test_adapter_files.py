"""What is read of an adapter's folder: every form of plain LoRA as PEFT reads it, and nothing else."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_models import Asked, add, base_forward, make_adapter, one_by_one, prompts

from tiny import make_tiny_model
from tunesmith.errors import ModelError
from tunesmith.serving import adapter_files
from tunesmith.serving.adapter_files import read_adapter
from tunesmith.serving.engine import Engine

LIMIT = 24


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 20}},
        {"layers_to_transform": [1]},
        {"target_modules": ["q_proj"]},
    ],
)
def test_every_form_of_plain_lora_is_read_as_peft_reads_it(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path, tiny_tokenizer: Any, engine: Engine, numbers: Any
) -> None:
    path = make_adapter(tiny_model, tmp_path / "adapter", 5, **settings)
    number = add(engine, path)
    asked = prompts(4, seed=6)
    running = [Asked(engine, tiny_tokenizer, prompt, number, max_tokens=LIMIT) for prompt in asked]
    running += [Asked(engine, tiny_tokenizer, prompt, numbers["cs"], max_tokens=LIMIT) for prompt in asked]
    found = [one.answer()[0] for one in running]
    assert found[:4] == one_by_one(tiny_model, path, tiny_tokenizer, asked, LIMIT)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"target_modules": ["embed_tokens"]}, "no part of a LoRA adapter on a linear layer"),
        ({"lora_bias": True}, "lora_bias is True"),
    ],
)
def test_what_cannot_share_a_base_is_refused(
    settings: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    path = make_adapter(tiny_model, tmp_path / "adapter", 5, **settings)
    with pytest.raises(ModelError, match=said):
        read_adapter(path, base_forward(tiny_model).base, "cpu", torch.float32)


def test_an_adapter_of_another_base_or_with_nan_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = make_adapter(make_tiny_model(tmp_path / "wide", hidden=64), tmp_path / "other", 1)
    base = base_forward(tiny_model).base
    with pytest.raises(ModelError, match="goes from 64 to 32; the adapter was made for another base"):
        read_adapter(other, base, "cpu", torch.float32)
    path = make_adapter(tiny_model, tmp_path / "nan", 1)
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        read_adapter(path, base, "cpu", torch.float32)


def test_an_adapter_that_is_not_what_its_config_says_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = base_forward(tiny_model).base
    path = make_adapter(tiny_model, tmp_path / "adapter", 1)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(ModelError, match=r"_proj has rank 4, and adapter_config.json says 8"):
        read_adapter(path, base, "cpu", torch.float32)
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(path / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"no weights for model\.layers\.1\.mlp\.down_proj and 6 more layers"):
        read_adapter(path, base, "cpu", torch.float32)
    (path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "("}))
    with pytest.raises(ModelError, match="PEFT cannot read which layers"):
        read_adapter(path, base, "cpu", torch.float32)


def test_an_adapter_on_the_head_or_on_a_layer_that_sees_no_rows_is_refused(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = base_forward(tiny_model)
    path = make_adapter(tiny_model, tmp_path / "head", 1, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match="lm_head gives the logits"):
        read_adapter(path, forward.base, "cpu", torch.float32)
    mlp = forward.decoder.layers[1].mlp
    inner = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: inner(x.flatten(0, 1)).view(x.shape))
    engine = Engine(forward)
    assert set(engine.bank._without_rows) == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    weights = read_adapter(adapters["cs"], forward.base, "cpu", torch.float32)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.\w+_proj: this layer of the base sees \(6, \d+\)"):
        engine.bank.add(weights)
    assert (engine.bank.numbers, engine.bank.bytes) == ([], 0)


def test_reading_takes_one_thread_and_leaves_the_others_their_number(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own number: OpenMP's threads would wait for each other behind a busy engine."""
    base, before = base_forward(tiny_model).base, torch.get_num_threads()
    inner, seen = adapter_files._on_device, []

    def see(layers: Any, device: str) -> Any:
        seen.append(torch.get_num_threads())
        return inner(layers, device)

    monkeypatch.setattr(adapter_files, "_on_device", see)
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(
                lambda _: (
                    read_adapter(adapters["cs"], base, "cpu", torch.float32),
                    seen.append(torch.get_num_threads()),
                ),
                range(12),
            ):
                pass
            assert sorted(seen) == [1] * 12 + [3] * 12
        with pytest.raises(ModelError):
            read_adapter(tmp_path, base, "cpu", torch.float32)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
