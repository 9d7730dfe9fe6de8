"""Kinds of LoRA, each all the way: train until it learns, crash and resume, reload in PEFT, merge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.runs import RunFolder
from tunesmith.workflows.load import load
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
    "loftq": ("adapter.init_lora_weights=loftq", "method=qlora"),
    "loftq, iterations, fused": ("adapter.init_lora_weights=loftq_niter_3", "method=qlora", "model.engine=fused"),
    "loftq, rslora": ("adapter.init_lora_weights=loftq_niter_2", "method=qlora", "adapter.rslora=true"),
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

    session.forward.model.eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        ours = session.forward.model(input_ids=ids).logits
        torch.testing.assert_close(load(run.path).forward.model(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    if config.method == "lora":
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


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_loftq_begins_with_what_quantization_lost(
    configure: Configure, tmp_path: Path, tiny_model: Path, scheme: str
) -> None:
    """By Eckart and Young the rest is the smaller singular values, here with a scale of alpha / r = 4; more iterations lose less."""
    lost = {}
    for how in ("default", "loftq", "loftq_niter_5"):
        settings = (
            f"adapter.init_lora_weights={how}",
            "adapter.alpha=32",
            "adapter.r=8",
            f"quantization.scheme={scheme}",
        )
        session = start(configure("method=qlora", *settings), tmp_path / how)
        base = load_file(tiny_model / "model.safetensors")
        lost[how] = {}
        for name, layer in session.forward.base.named_modules():
            if hasattr(layer, "lora_A"):
                stored = layer.base_layer.weight
                if how == "loftq_niter_5":  # what bitsandbytes goes back to where a weight has lost its own
                    assert layer.base_layer.quant_state is stored.quant_state
                q = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
                with torch.no_grad():
                    product = 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                lost[how][name] = (base[f"{name}.weight"] - q - product, base[f"{name}.weight"] - q)
    assert len(lost["loftq"]) == 14
    for name, (rest, whole) in lost["loftq"].items():
        assert torch.equal(whole, lost["default"][name][1]), "one iteration leaves the base as it is quantized"
        sigma = torch.linalg.svdvals(whole)
        torch.testing.assert_close(rest.norm(), sigma[8:].norm(), rtol=1e-3, atol=0)
        again = lost["loftq_niter_5"][name]
        assert not torch.equal(again[1], whole)
        torch.testing.assert_close(again[0].norm(), torch.linalg.svdvals(again[1])[8:].norm(), rtol=1e-3, atol=0)
    total = {how: sum(float(rest.square().sum()) for rest, _ in found.values()) for how, found in lost.items()}
    assert total["loftq_niter_5"] < 0.95 * total["loftq"] < 0.95 * 0.7 * total["default"]


@pytest.mark.parametrize("how", ["loftq", "loftq_niter_3"])
def test_loftq_is_written_as_a_plain_adapter_for_the_base_as_it_was(
    configure: Configure, tmp_path: Path, tiny_model: Path, how: str
) -> None:
    """Over the unquantized base it is what was trained, but for what LoftQ left of the quantization's loss."""
    session = start(
        configure(f"adapter.init_lora_weights={how}", "adapter.r=24", "training.max_steps=9", "method=qlora"),
        tmp_path / "run",
    )
    ids = torch.arange(3, 60)[None]

    def logits() -> torch.Tensor:
        session.forward.model.eval()
        with torch.no_grad():
            found: torch.Tensor = session.forward.model(input_ids=ids).logits
        session.forward.model.train()
        return found

    base = reloaded(tiny_model, None)(input_ids=ids).logits
    left = (logits() - base).norm()
    session.train()
    trained = logits()
    written = json.loads((session.run.adapter_path / "adapter_config.json").read_text())
    assert (written["r"], written["init_lora_weights"], written["loftq_config"]) == (48, True, {})
    plain = reloaded(tiny_model, session.run.adapter_path)(input_ids=ids).logits
    assert (plain - trained).norm() < 1.5 * left
    assert (trained - base).norm() > 3 * left, "training moved it by more than that"
    raw = load_file(session.run.checkpoints()[-1][1] / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    saved = load_file(session.run.adapter_path / "adapter_model.safetensors")
    a, b = saved[name.format("A")], saved[name.format("B")]
    assert torch.equal(a[:24], raw[name.format("A")])
    assert torch.equal(b[:, :24], raw[name.format("B")])
    assert (b[:, 24:] @ a[24:]).norm() > 0
    checkpoint = session.run.checkpoints()[-1][1] / "adapter"
    with pytest.raises(ModelError, match=r"an adapter that loftq began, as a checkpoint has it"):
        start(configure(f"adapter.init_from={checkpoint}", "method=qlora"), tmp_path / "further")
    start(configure(f"adapter.init_from={session.run.adapter_path}", "method=qlora"), tmp_path / "further")


def test_loftq_needs_the_weights_before_quantization(configure: Configure, tmp_path: Path, tiny_model: Path) -> None:
    from tunesmith.models import loftq

    session = start(configure("adapter.init_lora_weights=loftq", "method=qlora"), tmp_path / "run")
    tensors = load_file(tiny_model / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    packed = {**tensors, key: torch.zeros(512, 1, dtype=torch.uint8)}
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=rf"{re.escape(key)} in .* is torch.uint8 \(512, 1\): LoftQ needs the weights before"
    ):
        loftq.begin(session.forward.model, tmp_path, 1)
    del packed[key]
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=rf"has no tensor {re.escape(key)}, whose quantization error LoftQ begins with"
    ):
        loftq.begin(session.forward.model, tmp_path, 1)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ((), "adapter.init_lora_weights loftq begins with what quantization lost, and method: lora quantizes nothing"),
        (("method=qlora", "quantization.scheme=int8"), "adapter.init_lora_weights loftq is for 4-bit weights; set"),
        (
            ("method=qlora", "adapter.dora=true"),
            "adapter.dora cannot be written as a plain adapter with init_lora_weights loftq",
        ),
        (("method=full",), "adapter.init_lora_weights has no effect with method: full"),
    ],
)
def test_what_does_not_go_with_loftq(configure: Configure, settings: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        configure("adapter.init_lora_weights=loftq", *settings)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_rank_above_the_matrixs_is_refused_where_the_weights_begin_it(
    configure: Configure, tmp_path: Path, how: str
) -> None:
    """PEFT would fail when the run is over and its adapter is converted."""
    with pytest.raises(ModelError) as caught:
        start(configure(f"adapter.init_lora_weights={how}", "adapter.r=24"), tmp_path / "run")
    assert str(caught.value) == (
        f"adapter.r: model.layers.0.self_attn.k_proj has 16 singular values, and adapter.init_lora_weights {how} takes 24 of them; "
        "lower adapter.r, or set adapter.rank_pattern: {k_proj: 16}"
    )


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
