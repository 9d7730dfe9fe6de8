"""LoRA+: the B matrices of an adapter have a rate of their own, in the optimizer and through a whole run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models_of import family_model
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from tunesmith.config import OptimizerConfig
from tunesmith.errors import ConfigError
from tunesmith.training.optimizers import make_optimizer
from tunesmith.workflows.train import TrainingSession

Session = Callable[..., TrainingSession]


def adapted() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(family_model("llama"), config)  # type: ignore[arg-type]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, collect: Callable[[], None] = lambda: None) -> None:
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        collect()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_steps_are_those_of_pefts_optimizer(ratio: float) -> None:
    ours, theirs = adapted(), adapted()
    optimizer = make_optimizer(ours, OptimizerConfig(loraplus_lr_ratio=ratio, weight_decay=0.1), 1e-3)
    train(ours, optimizer.inner, optimizer.collect)
    reference = create_loraplus_optimizer(
        theirs,  # type: ignore[arg-type]
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=0.1,
        eps=1e-8,
    )
    train(theirs, reference)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=name)


def test_only_b_has_another_rate() -> None:
    model = adapted()
    optimizer = make_optimizer(model, OptimizerConfig(loraplus_lr_ratio=16), 1e-3)
    assert [(group["lr_ratio"], group["lr"]) for group in optimizer.param_groups] == [(1.0, 1e-3), (16.0, 16e-3)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ways = [{names[id(tensor)].rsplit(".", 3)[-3] for tensor in flat.tensors} for flat in optimizer.flats]
    assert ways == [{"lora_A"}, {"lora_B"}]
    assert len(make_optimizer(adapted(), OptimizerConfig(), 1e-3).param_groups) == 1


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_run_moves_b_by_its_ratio(session: Session, engine: str) -> None:
    """Adam's first step moves each value by its rate, whatever its gradient; A has none while B is zero."""
    moved = {}
    for ratio in (1, 8):
        settings = (
            "training.max_steps=1",
            "optimizer.schedule=constant",
            "optimizer.warmup_ratio=0",
            "optimizer.lr=1e-4",
        )
        run = session(
            f"model.engine={engine}", *settings, "optimizer.weight_decay=0", f"optimizer.loraplus_lr_ratio={ratio}"
        )
        run.train()
        weights = {name: p.detach() for name, p in run.forward.model.named_parameters() if "lora_B" in name}
        moved[ratio] = max(float(value.abs().max()) for value in weights.values())
        (step,) = [event for event in run.run.events() if event["event"] == "step"]
        assert step["lr"] == pytest.approx(1e-4), "lr is A's"
    assert moved[1] == pytest.approx(1e-4, rel=1e-2)
    assert moved[8] == pytest.approx(8 * moved[1], rel=1e-3)


def test_full_fine_tuning_has_no_b(session: Session) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.loraplus_lr_ratio has no effect with method: full"):
        session("method=full", "optimizer.loraplus_lr_ratio=16")
