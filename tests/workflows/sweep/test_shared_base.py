"""One base for all runs: what comes back is what was lent, and runs over it are what they are alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import losses

from tunesmith.config import load_config
from tunesmith.runs import RunFolder
from tunesmith.workflows.evaluate import evaluate
from tunesmith.workflows.shared_base import SharedBase
from tunesmith.workflows.sweep import sweep
from tunesmith.workflows.train import start


def test_runs_share_one_base_and_are_what_they_are_alone(
    config: Path, tmp_path: Path, loads: list[str], questions: Path
) -> None:
    result = sweep(
        config,
        ["lora.r=2,4", "adapter.dropout=0,0.2"],
        out=tmp_path / "sweep",
        data=questions,
        settings=["training.epochs=1"],
    )
    assert loads == ["fp32"]
    assert result["base_loads"] == 1
    assert [run["name"] for run in result["runs"]] == [
        "r=2_dropout=0", "r=2_dropout=0.2", "r=4_dropout=0", "r=4_dropout=0.2",
    ]  # fmt: skip
    different = set()
    for run in result["runs"]:
        overrides = ["training.epochs=1", *(f"{key}={value}" for key, value in run["values"].items())]
        alone = tmp_path / "alone" / run["name"]
        start(load_config(config, overrides), alone).train()
        assert losses(Path(run["path"])) == losses(alone)
        ours, theirs = (RunFolder.open(path).metrics for path in (run["path"], alone))
        assert ours["eval_loss"] == theirs["eval_loss"]
        asked = evaluate(alone, questions)
        (kept,) = (Path(run["path"]) / "evaluations").glob("*.json")
        evaluation = json.loads(kept.read_text())
        for key in ("metrics", "examples", "settings", "data_sha256", "n", "rows_in_file", "task_kind", "classes"):
            assert evaluation[key] == asked[key], key
        assert (Path(run["path"]) / "report.html").is_file()
        different.add(tuple(losses(alone)))
    assert len(different) == 4


@pytest.mark.parametrize(
    ("values", "engine"),
    [
        ({"adapter.dropout": 0.3}, "reference"),
        ({"model.engine": "fused", "data.packing": True}, "fused"),
        ({"method": "qlora"}, "reference"),
        ({"memory.mode": "min"}, "reference"),
        ({"adapter.dora": True}, "reference"),
    ],
)
def test_a_base_comes_back_bit_for_bit(
    config: Path, tmp_path: Path, values: dict[str, Any], engine: str, loads: list[str]
) -> None:
    shared = SharedBase()
    first = start(load_config(config, values=values), tmp_path / "first", load_base=shared.load)
    model = first.forward.model
    before = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): value.clone()
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if "lora_" not in name and ".layers.0.original" not in name
    }
    first.train()
    assert first.plan.memory.engine == engine
    assert (first.plan.memory.recompute_layers > 0) == (values.get("memory.mode") == "min")
    shared.take_back(model, first.config)
    quantization = first.config.quantization if first.config.method == "qlora" else None
    base = shared.load(first.source, first.config.model, first.hardware, "fp32", quantization)
    assert len(loads) == shared.loads == 1
    assert base is first.forward.base
    after = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    assert any("q_proj" in name for name in before)
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
    for module in base.modules():
        assert "lora" not in type(module).__name__.lower()
        assert "Fused" not in type(module).__name__
        assert not getattr(module, "gradient_checkpointing", False)
        assert not module.training
        assert not module._forward_hooks
    assert not hasattr(base.get_decoder(), "mask_source")
    assert all(p.requires_grad == p.is_floating_point() for p in base.parameters())


def test_what_changes_the_base_is_followed_by_a_fresh_one(
    config: Path, tmp_path: Path, no_reports: None, loads: list[str]
) -> None:
    said: list[str] = []
    sweep(
        config,
        ["adapter.init_lora_weights=default,pissa,olora", "adapter.r=2,3"],
        out=tmp_path / "sweep",
        settings=["training.max_steps=2"],
        announce=said.append,
    )
    assert len(loads) == 1 + 3  # both default ones and the first with pissa share, the others have their own
    assert [line for line in said if "loaded again" in line] == [
        "the base is loaded again: in the run before, adapter.init_lora_weights pissa takes its beginning out of the base's weights",
        "the base is loaded again: in the run before, adapter.init_lora_weights pissa takes its beginning out of the base's weights",
        "the base is loaded again: in the run before, adapter.init_lora_weights olora takes its beginning out of the base's weights",
    ]
    for name, override in (("pissa_r=3", "pissa"), ("olora_r=3", "olora")):
        alone = tmp_path / name
        overrides = ["training.max_steps=2", "adapter.r=3", f"adapter.init_lora_weights={override}"]
        start(load_config(config, overrides), alone).train()
        assert losses(tmp_path / "sweep" / "runs" / f"init_lora_weights={name}") == losses(alone)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("method=full,lora", "method full trains the base itself"),
        ("adapter.modules_to_save=[lm_head],[]", "adapter.modules_to_save trains modules of the base"),
        ("adapter.new_tokens=['Which'],[]", "adapter.new_tokens changes the embeddings"),
    ],
)
def test_a_run_after_one_that_trains_the_base_is_what_it_is_alone(
    config: Path, tmp_path: Path, no_reports: None, setting: str, why: str, loads: list[str]
) -> None:
    said: list[str] = []
    result = sweep(config, [setting], out=tmp_path / "sweep", settings=["training.max_steps=2"], announce=said.append)
    assert f"the base is loaded again: in the run before, {why}" in said
    assert len(loads) == 2
    start(load_config(config, ["training.max_steps=2"]), tmp_path / "alone").train()
    assert losses(Path(result["runs"][1]["path"])) == losses(tmp_path / "alone")


def test_full_training_can_follow_an_adapter_on_the_same_base(
    config: Path, tmp_path: Path, no_reports: None, loads: list[str]
) -> None:
    result = sweep(config, ["method=lora,full"], out=tmp_path / "sweep", settings=["training.max_steps=2"])
    assert len(loads) == 1
    start(load_config(config, ["training.max_steps=2", "method=full"]), tmp_path / "alone").train()
    assert losses(Path(result["runs"][1]["path"])) == losses(tmp_path / "alone")


def test_a_base_that_was_changed_is_not_used_again(config: Path, tmp_path: Path, loads: list[str]) -> None:
    said: list[str] = []
    shared = SharedBase(said.append)
    first = start(load_config(config), tmp_path / "first", load_base=shared.load)
    first.train()
    with torch.no_grad():
        first.forward.base.get_input_embeddings().weight[3, 5] += 1e-6
    shared.take_back(first.forward.model, first.config)
    start(load_config(config), tmp_path / "second", load_base=shared.load)
    assert len(loads) == 2
    assert said == ["the base is loaded again: the run before changed model.embed_tokens.weight"]
