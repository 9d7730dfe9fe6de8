"""Kinds of LoRA, each all the way: train until it learns, crash and resume, reload in PEFT, merge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.runs import RunFolder
from tunesmith.workflows.merge import merge
from tunesmith.workflows.train import restart, start

Configure = Callable[..., RunConfig]

KINDS: dict[str, tuple[str, ...]] = {
    "rslora": ("adapter.rslora=true",),
    "dora": ("adapter.dora=true",),
    "dora, dropout": ("adapter.dora=true", "adapter.dropout=0.1"),
    "dora, qlora": ("adapter.dora=true", "method=qlora"),
    "patterns": (
        "adapter.rank_pattern={down_proj: 4, layers.1.self_attn.q_proj: 2}",
        "adapter.alpha_pattern={v_proj: 8}",
    ),
    "patterns, fused": (
        "adapter.rank_pattern={down_proj: 4, layers.1.self_attn.q_proj: 2}",
        "adapter.alpha_pattern={v_proj: 8}",
        "model.engine=fused",
    ),
    "one layer": ("adapter.layers_to_transform=[1]",),
    "one layer, fused": ("adapter.layers_to_transform=[1]", "model.engine=fused"),
    "pissa": ("adapter.init_lora_weights=pissa",),
    "pissa, fused": ("adapter.init_lora_weights=pissa", "model.engine=fused"),
    "pissa, iterations": ("adapter.init_lora_weights=pissa_niter_4",),
    "pissa, rslora": ("adapter.init_lora_weights=pissa", "adapter.rslora=true"),
    "pissa, patterns": (
        "adapter.init_lora_weights=pissa",
        "adapter.rank_pattern={down_proj: 4}",
        "adapter.alpha_pattern={v_proj: 8}",
    ),
    "olora": ("adapter.init_lora_weights=olora",),
    "lora+": ("optimizer.loraplus_lr_ratio=4",),
}


class Crash(Exception):
    """Ends a run in the middle of a step's report."""


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["event"] == "step"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_resumes_and_reloads_and_merges(
    configure: Configure, tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    config = configure(*KINDS[kind], "adapter.r=8", "training.epochs=6", "training.save_every=4", "optimizer.lr=5e-3")
    session = start(config, tmp_path / "whole")
    session.train()
    run = session.run
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    assert session.plan.memory.engine == ("fused" if "fused" in kind else "reference")

    crashed = start(config, tmp_path / "crashed")

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 6:
            raise Crash

    with pytest.raises(Crash):
        crashed.train(crash)
    restart(tmp_path / "crashed").train()
    assert losses(crashed.run) == losses(run)
    saved, again = (load_file(each.adapter_path / "adapter_model.safetensors") for each in (run, crashed.run))
    assert saved.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in saved.items())

    if config.method == "lora":
        session.forward.model.eval()
        ids = torch.arange(3, 60)[None]
        with torch.no_grad():
            ours = session.forward.model(input_ids=ids).logits
        torch.testing.assert_close(
            reloaded(tiny_model, run.adapter_path)(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4
        )
    assert merge(run.path)["difference"] < 1e-4


def reloaded(base: Path, adapter: Path | None) -> Any:
    """Base and adapter in transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def test_dora_trains_a_magnitude_for_each_output(configure: Configure, tmp_path: Path) -> None:
    """Beside A and B, and they move: with plain LoRA the norm of a row of W + s·B·A would move by what B·A adds alone."""
    session = start(configure("adapter.dora=true", "adapter.r=4"), tmp_path / "run")
    layer = session.forward.base.model.layers[0].mlp.down_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    before = magnitude.detach().clone()
    torch.testing.assert_close(before, layer.base_layer.weight.norm(dim=1))
    assert (magnitude.requires_grad, magnitude.dtype) == (True, torch.float32)
    session.train()
    assert bool((magnitude != before).all())


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_what_begins_in_the_weights_is_written_as_a_plain_adapter(
    configure: Configure, tmp_path: Path, tiny_model: Path, how: str
) -> None:
    """Twice the rank over the base as it was; a checkpoint's is still over the changed weights, which PEFT makes again."""
    session = start(
        configure(f"adapter.init_lora_weights={how}", "adapter.r=4", "training.max_steps=4"), tmp_path / "run"
    )
    ids = torch.arange(3, 60)[None]
    base = reloaded(tiny_model, None)
    layer, own = (each.model.layers[0].mlp.up_proj for each in (session.forward.base, base))
    assert (layer.base_layer.weight - own.weight).norm() > 0.1 * own.weight.norm()
    session.forward.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            session.forward.model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-3, atol=1e-3
        )
    session.forward.model.train()
    session.train()
    session.forward.model.eval()
    with torch.no_grad():
        trained = session.forward.model(input_ids=ids).logits
        _, checkpoint = session.run.checkpoints()[-1]
        for adapter, r, init in ((session.run.adapter_path, 8, True), (checkpoint / "adapter", 4, how)):
            written = json.loads((adapter / "adapter_config.json").read_text())
            assert (written["r"], written["init_lora_weights"]) == (r, init)
            torch.testing.assert_close(
                reloaded(tiny_model, adapter)(input_ids=ids).logits, trained, rtol=1e-3, atol=1e-3
            )
    assert (trained - base(input_ids=ids).logits).norm() > 0.05 * trained.norm()
    with pytest.raises(ModelError, match=rf"an adapter that {how} began, as a checkpoint has it"):
        start(configure(f"adapter.init_from={checkpoint / 'adapter'}"), tmp_path / "further")
    start(configure(f"adapter.init_from={session.run.adapter_path}"), tmp_path / "further")


def test_patterns_are_the_ranks_and_scales_of_their_modules(configure: Configure, tmp_path: Path) -> None:
    session = start(configure(*KINDS["patterns"], "adapter.r=8", "adapter.alpha=16"), tmp_path / "run")
    layers = session.forward.base.model.layers

    def of(module: Any) -> tuple[int, float]:
        return module.r["default"], module.scaling["default"]

    for index, layer in enumerate(layers):
        assert of(layer.mlp.down_proj) == (4, 16 / 4)
        assert of(layer.mlp.up_proj) == (8, 16 / 8)
        assert of(layer.self_attn.v_proj) == (8, 8 / 8)
        assert of(layer.self_attn.q_proj) == ((2, 16 / 2) if index == 1 else (8, 16 / 8))


def test_only_the_layers_that_are_asked_for_have_adapters(configure: Configure, tmp_path: Path) -> None:
    session = start(configure("adapter.layers_to_transform=[1]"), tmp_path / "run")
    names = [name for name, parameter in session.forward.model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 7
    assert all(".layers.1." in name for name in names)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        (
            "adapter.layers_to_transform=[0, 2]",
            "adapter.layers_to_transform: 2 is no layer of this model, which has 0 to 1",
        ),
        (
            "adapter.rank_pattern={gate: 4}",
            "adapter.rank_pattern: 'gate' matches no module that has an adapter; those are down_proj, gate_proj, k_proj, "
            "o_proj, q_proj, up_proj, v_proj",
        ),
        (
            "adapter.alpha_pattern={layers.7.mlp.up_proj: 4}",
            "adapter.alpha_pattern: 'layers.7.mlp.up_proj' matches no module that has an adapter; those are down_proj, "
            "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
    ],
)
def test_what_matches_nothing_is_refused(configure: Configure, tmp_path: Path, setting: str, problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        start(configure(setting), tmp_path / "run")
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    "setting",
    [
        "adapter.layers_to_transform=[]",
        "adapter.layers_to_transform=[-1]",
        "adapter.rank_pattern={q_proj: 0}",
        "adapter.alpha_pattern={q_proj: -1}",
        "adapter.init_lora_weights=pisa",
    ],
)
def test_what_cannot_be_is_refused(configure: Configure, setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        configure(setting)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ("method=qlora",),
            "adapter.init_lora_weights pissa changes the frozen weights, which method: qlora holds quantized",
        ),
        (
            ("adapter.rslora=true", "adapter.rank_pattern={q_proj: 2}"),
            "adapter.rslora and patterns cannot be written as a plain",
        ),
        (("adapter.init_from=x",), "adapter.init_lora_weights has no effect with adapter.init_from"),
    ],
)
def test_what_does_not_go_with_a_beginning_in_the_weights(
    configure: Configure, settings: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        configure("adapter.init_lora_weights=pissa", *settings)
