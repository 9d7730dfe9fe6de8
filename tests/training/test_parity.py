"""The loop computes what a plain PyTorch loop computes, and what TRL's SFTTrainer computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tunesmith.config import TrainingConfig
from tunesmith.data.batches import StepOrder, split
from tunesmith.training import loop
from tunesmith.training.loop import accumulate_gradients
from tunesmith.training.optimizers import learning_rate
from tunesmith.types import TokenizedExample
from tunesmith.workflows.train import TrainingSession

STEPS = 5
BUDGET = ["data.packing=true", "data.max_seq_length=256", "training.micro_batch_tokens=256"]
WAYS = {
    "padded": [],
    "packed": ["data.packing=true"],
    "packed by tokens": BUDGET,
    "steps of tokens": [*BUDGET, "training.batch_tokens=768", "training.batch_size=16"],
}


def plain_loss(model: Any, examples: list[TokenizedExample]) -> torch.Tensor:
    """Mean cross-entropy over all supervised tokens of `examples`, one row at a time through the model's own logits."""
    total, count = torch.zeros(()), 0
    for example in examples:
        ids = torch.from_numpy(example.input_ids.astype("int64"))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        wanted, targets = torch.from_numpy(example.loss_mask[1:].copy()), ids[1:]
        total = total + F.cross_entropy(logits[wanted], targets[wanted], reduction="sum")
        count += int(wanted.sum())
    return total / count


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_equal_a_plain_loop(
    session: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch, method: str, way: str
) -> None:
    packing = way != "padded"
    settings = (f"method={method}", *WAYS[way], f"training.max_steps={STEPS}", "optimizer.lr=1e-3")
    ours = session(*settings)
    seen: list[dict[str, torch.Tensor]] = []

    def spy(*arguments: Any) -> torch.Tensor:
        loss = accumulate_gradients(*arguments)
        seen.append(gradients(ours.forward.model))
        return loss

    monkeypatch.setattr(loop, "accumulate_gradients", spy)
    ours.train()
    losses = [event["loss"] for event in ours.run.events() if event["event"] == "step"]

    plain = session(*settings)
    model, config = plain.forward.model, plain.config
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.01},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0},
        ]
        if len(decayed) < len(parameters)
        else decayed,
        lr=1e-3,
        weight_decay=0.01,
    )
    order = StepOrder([len(example) for example in plain.data.train], config.training, packing)
    for step in range(STEPS):
        loss = plain_loss(model, [plain.data.train[i] for part in order.step(step) for i in part])
        optimizer.zero_grad()
        loss.backward()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        for name, gradient in gradients(model).items():
            error = (seen[step][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < 1e-4, f"step {step}: gradient of {name} differs by {error:.1e}"
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, 1e-3, step, STEPS)
        optimizer.step()
    assert len(losses) == STEPS
    assert losses[0] != losses[-1]


def test_losses_equal_trl(session: Callable[..., TrainingSession], tmp_path: Path) -> None:
    """TRL 1.16's SFTTrainer on the same batches: LoRA from the same initial weights, constant rate, no clipping in reach."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    ours = session(
        f"training.max_steps={STEPS}",
        "optimizer.lr=1e-3",
        "optimizer.schedule=constant",
        "optimizer.warmup_ratio=0",
        "optimizer.max_grad_norm=1000",
        "optimizer.weight_decay=0",
    )
    theirs = session("optimizer.lr=1e-3")
    order = StepOrder([len(example) for example in ours.data.train], ours.config.training, packing=False)
    rows = [ours.data.train[i] for step in range(STEPS) for part in order.step(step) for i in part]
    dataset = Dataset.from_list(
        [
            {
                "input_ids": row.input_ids.tolist(),
                "labels": np.where(row.loss_mask, row.input_ids, -100).tolist(),
            }
            for row in rows
        ]
    )
    ours.train()
    losses = [event["loss"] for event in ours.run.events() if event["event"] == "step"]

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=theirs.forward.model,
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=8,
            max_steps=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=1000,
            weight_decay=0.0,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=theirs.tokenizer,
    )
    trainer.train()
    reference = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(reference) == len(losses) == STEPS
    assert losses == pytest.approx(reference, abs=1e-4)
    assert abs(losses[0] - losses[-1]) > 1e-2, "the run must move enough for the comparison to mean anything"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulation_does_not_change_the_gradient(
    session: Callable[..., TrainingSession], packing: bool, method: str
) -> None:
    """One micro-batch of 8 rows of unequal length equals eight of one, and three uneven ones."""
    run = session(f"method={method}", f"data.packing={packing}")
    if method == "lora":  # at the start B is zero and A has no gradient
        torch.manual_seed(0)
        for name, parameter in run.forward.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    examples = run.data.train[:8]
    assert len({len(example) for example in examples}) > 3
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def gradient_of(micro_batch_size: int) -> tuple[float, dict[str, torch.Tensor]]:
        run.forward.model.zero_grad()
        lengths = [len(example) for example in examples]
        parts = split(lengths, TrainingConfig(micro_batch_size=micro_batch_size), packing)
        step = [[examples[index] for index in part] for part in parts]
        loss = accumulate_gradients(run.forward, run.objective, step, packing, 0, scaler)
        return float(loss), gradients(run.forward.model)

    loss, whole = gradient_of(8)
    for size in (1, 3):
        other_loss, other = gradient_of(size)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        norm = torch.stack([g.norm() for g in whole.values()]).norm()
        error = torch.stack([(other[name] - g).norm() for name, g in whole.items()]).norm() / norm
        assert error < 1e-6, f"micro-batches of {size}: gradient differs by {error:.1e}"


@pytest.mark.parametrize("head", ["a matrix", "a module"])
def test_loss_of_many_rows_is_chunked_exactly(
    session: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    from tunesmith.kernels import chunks as chunking
    from tunesmith.kernels import linear_cross_entropy
    from tunesmith.training import objectives

    run = session("data.train_on=all")
    if head == "a module":
        run.forward.head.__class__ = type("CalledLinear", (torch.nn.Linear,), {})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    arguments = (run.forward, run.objective, [run.data.train[:8]], True, 0, scaler)
    whole_loss = accumulate_gradients(*arguments)
    whole = gradients(run.forward.model)
    run.forward.model.zero_grad()
    monkeypatch.setattr(objectives, "LOSS_ROWS", 7)
    monkeypatch.setattr(chunking, "CHUNK_MULTIPLE", 8)
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 1)
    chunks = []
    chunk_loss = linear_cross_entropy._cross_entropy
    monkeypatch.setattr(
        linear_cross_entropy, "_cross_entropy", lambda x, *a, **k: (chunks.append(len(x)), chunk_loss(x, *a, **k))
    )
    loss = accumulate_gradients(*arguments)
    assert set(chunks[:-1]) == ({8} if head == "a matrix" else set())
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)
    for name, gradient in gradients(run.forward.model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7)


def test_rows_teach_what_they_say(session: Callable[..., TrainingSession]) -> None:
    """The loss falls to almost nothing on a task that can be learned."""
    run = session("method=full", "training.epochs=30", "optimizer.lr=5e-3", "optimizer.max_grad_norm=1.0", rows=32)
    run.train()
    losses = [event["loss"] for event in run.run.events() if event["event"] == "step"]
    assert losses[0] > 5
    assert losses[-1] < 0.1
