"""Preference objectives: against TRL, against their papers' formulas, and all the way through a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiny import write_jsonl
from tunesmith.config import RunConfig, load_config
from tunesmith.data.batches import make_batch
from tunesmith.errors import ConfigError, DataError, MachineError, RunError
from tunesmith.runs import RunFolder
from tunesmith.training.graphs import micro_batch_graphs
from tunesmith.training.loop import accumulate_gradients, evaluate_loss, step_tools
from tunesmith.training.objectives import Metrics, Objective, StepTools, means
from tunesmith.training.preferences import (
    DirectPreference,
    KahnemanTversky,
    OddsRatioPreference,
    SimplePreference,
    log_odds,
    reference_log_probabilities,
    sequence_log_probabilities,
)
from tunesmith.types import Term, TokenizedPair
from tunesmith.workflows.merge import merge
from tunesmith.workflows.train import TrainingSession, restart, start

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
PROMPTS = ((5, 9, 4), (3, 12, 2), (7, 3, 8), (2, 6, 6), (9, 1, 15))
"""(tokens of the prompt, of the chosen answer, of the rejected one): all unequal."""

Configure = Callable[..., RunConfig]


def preference_rows(number: int) -> list[dict[str, Any]]:
    """Pairs in which politeness is chosen."""
    return [
        {
            "prompt": [{"role": "user", "content": f"question {index} about {'the weather ' * (index % 3 + 1)}"}],
            "chosen": [{"role": "assistant", "content": f"yes please {index % 7} " + "thank you " * (index % 4 + 1)}],
            "rejected": [{"role": "assistant", "content": f"no {index % 5} " + "go away " * (index % 3 + 1)}],
        }
        for index in range(number)
    ]


@pytest.fixture
def configure(tiny_model: Path, tmp_path: Path) -> Configure:
    """`configure("objective.name=dpo")`: a run over 24 pairs, in fp32 on the CPU."""

    def make(*overrides: str, rows: list[dict[str, Any]] | None = None) -> RunConfig:
        data = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(24) if rows is None else rows)
        held = write_jsonl(tmp_path / "held.jsonl", preference_rows(29)[24:])
        values = {
            "model.name": str(tiny_model),
            "model.dtype": "fp32",
            "model.device": "cpu",
            "data.path": str(data),
            "training.batch_size": 8,
            "optimizer.lr": 5e-3,
        }
        return load_config(None, [override.replace("HELD", str(held)) for override in overrides], values)

    return make


@pytest.fixture
def run(configure: Configure, tmp_path: Path) -> TrainingSession:
    """A loaded DPO run whose adapter is not what it was at the start, which is the reference."""
    session = start(configure("objective.name=dpo"), tmp_path / "run")
    move(session)
    return session


def move(session: TrainingSession, seed: int = 0) -> None:
    """Give B of the adapter values: the policy is another one than the reference, and A has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in session.forward.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)


def pairs_of(session: TrainingSession, desirable: Sequence[bool] = (True,) * 5) -> list[TokenizedPair]:
    """Pairs of random tokens, with the reference of the model without its adapter."""
    rng = np.random.default_rng(0)
    pairs = []
    for line, ((prompt, chosen, rejected), label) in enumerate(zip(PROMPTS, desirable, strict=True), 1):
        asked = rng.integers(5, 200, prompt)
        sides = [np.concatenate([asked, rng.integers(5, 200, length)]) for length in (chosen, rejected)]
        mask = np.concatenate([np.arange(len(side)) >= prompt for side in sides])
        ids = np.concatenate(sides).astype(np.int32)
        pairs.append(TokenizedPair(ids, mask, line, "random", label, None, prompt + chosen))
    with session.forward.model.disable_adapter():
        reference = reference_log_probabilities(session.forward, pairs, session.config, 0)
    return [replace(pair, reference=tuple(values)) for pair, values in zip(pairs, reference.tolist(), strict=True)]


def ours(
    session: TrainingSession, objective: Objective, parts: Sequence[Sequence[TokenizedPair]]
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients and metrics of a step that is divided into `parts`."""
    model = session.forward.model
    model.zero_grad(set_to_none=True)
    metrics: Metrics = {}
    loss = accumulate_gradients(session.forward, objective, parts, True, 0, NO_SCALER, None, metrics)
    return (
        float(loss),
        gradients(model),
        means({name: (float(value), count) for name, (value, count) in metrics.items()}),
    )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    assert scale > 1e-3, "gradients of nothing would equal anything"
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm())
        assert error <= within * max(float(gradient.norm()), 1e-3 * scale), (
            f"{name}: {error:.1e} of {gradient.norm():.1e}"
        )


def padded(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Sequences (ids, mask of the answer) padded on the right, as TRL's collators make them."""
    width = max(len(ids) for ids, _ in sequences)
    rows = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for ids, mask in sequences:
        rest = width - len(ids)
        rows["input_ids"].append([*ids.tolist(), *[0] * rest])
        rows["attention_mask"].append([1] * len(ids) + [0] * rest)
        rows["completion_mask"].append([*mask.astype(int).tolist(), *[0] * rest])
    return {name: torch.tensor(values) for name, values in rows.items()}


def sides(pairs: Sequence[TokenizedPair], number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [pair.sequence(number) for pair in pairs]
    return [(side.input_ids, side.loss_mask) for side in found]


def trl_arguments(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "trl"),
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "disable_tqdm": True,
    }


def theirs(trainer: Any, session: TrainingSession, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """TRL's loss and gradients of the same model."""
    model = session.forward.model
    model.train()
    model.zero_grad(set_to_none=True)
    loss = trainer._compute_loss(model, inputs, False)
    loss.backward()
    return float(loss), {name: gradient for name, gradient in gradients(model).items() if ".ref." not in name}


DPO = {
    "sigmoid": (DirectPreference(0.3), ["sigmoid"], [1.0]),
    "hinge": (DirectPreference(0.3, "hinge"), ["hinge"], [1.0]),
    "ipo": (DirectPreference(0.3, "ipo"), ["ipo"], [1.0]),
    "sigmoid and cross-entropy": (DirectPreference(0.3, nll_weight=0.7), ["sigmoid", "sft"], [1.0, 0.7]),
}


TRL_ON_CPU = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="beside a GPU TRL's kernels take no tensors of the CPU; it is compared where there is none",
)


@TRL_ON_CPU
@pytest.mark.parametrize("kind", DPO)
def test_dpo_equals_trl(run: TrainingSession, tmp_path: Path, kind: str) -> None:
    """TRL 1.16's DPOTrainer, padded, the adapter switched off as its reference, on the same tokens and weights."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    objective, loss_type, weights = DPO[kind]
    pairs = pairs_of(run)
    loss, gradient, metrics = ours(run, objective, [pairs])
    model = run.forward.model
    moved = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # TRL copies the adapter it is given: that copy is the reference
            parameter.data.zero_()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(loss_type=loss_type, loss_weights=weights, beta=0.3, **trl_arguments(tmp_path)),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2),
        processing_class=run.tokenizer,
    )
    for name, parameter in model.named_parameters():
        if name in moved:
            parameter.data.copy_(moved[name])
    inputs = padded([*sides(pairs, 0), *sides(pairs, 1)])
    expected, expected_gradient = theirs(trainer, run, inputs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(gradient, expected_gradient)
    for name, value in metrics.items():
        assert value == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-4), name
    assert 0 < metrics["rewards/accuracies"] < 1
    assert abs(metrics["rewards/margins"]) > 0.01


def test_label_smoothing_is_cdpos(run: TrainingSession) -> None:
    pairs = pairs_of(run)
    loss, gradient, _ = ours(run, DirectPreference(0.3, label_smoothing=0.2), [pairs])
    run.forward.model.zero_grad(set_to_none=True)
    batch = make_batch(pairs, True, 0, "cpu")
    ratios = sequence_log_probabilities(run.forward, batch) - torch.tensor([pair.reference for pair in pairs]).view(-1)
    delta = 0.3 * (ratios[0::2] - ratios[1::2])
    expected = -(0.8 * torch.log(torch.sigmoid(delta)) + 0.2 * torch.log(torch.sigmoid(-delta))).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert_close(gradient, gradients(run.forward.model))
    assert loss != pytest.approx(ours(run, DirectPreference(0.3), [pairs])[0], rel=1e-2)


def labelled(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.where(batch["completion_mask"] == 1, batch["input_ids"], -100)


def test_orpo_equals_trl(run: TrainingSession) -> None:
    """TRL 1.16's forward and odds ratio, which use of their trainer what stands here beside them."""
    from trl.experimental.orpo import ORPOTrainer

    pairs = pairs_of(run)
    loss, gradient, metrics = ours(run, OddsRatioPreference(0.4), [pairs])
    trainer = SimpleNamespace(
        is_encoder_decoder=False, aux_loss_enabled=False, padding_value=0, beta=0.4,
        accelerator=SimpleNamespace(device="cpu"), concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps,
    )  # fmt: skip
    batch = {}
    for number, side in enumerate(("chosen", "rejected")):
        made = padded(sides(pairs, number))
        batch |= {
            f"{side}_input_ids": made["input_ids"],
            f"{side}_attention_mask": made["attention_mask"],
            f"{side}_labels": labelled(made),
        }
    model = run.forward.model
    model.zero_grad(set_to_none=True)
    chosen, rejected, _, _, nll = ORPOTrainer.concatenated_forward(trainer, model, batch)
    losses, chosen_rewards, _, _, log_odds = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    expected = nll - losses.mean()
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert_close(gradient, gradients(model))
    assert metrics["log_odds_ratio"] == pytest.approx(float(log_odds), rel=1e-4)
    assert metrics["rewards/chosen"] == pytest.approx(float(chosen_rewards.mean()), rel=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_equals_trl(run: TrainingSession, label_smoothing: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    pairs = pairs_of(run)
    loss, gradient, _ = ours(run, SimplePreference(2.5, 1.4, label_smoothing), [pairs])
    model = run.forward.model
    model.zero_grad(set_to_none=True)
    means = []
    for number in (0, 1):
        made = padded(sides(pairs, number))
        logits = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits
        means.append(CPOTrainer.get_batch_logps(logits, labelled(made), average_log_prob=True))
    trainer = SimpleNamespace(
        loss_type="simpo", alpha=0.0, beta=2.5, simpo_gamma=1.4, label_smoothing=label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    expected = CPOTrainer.cpo_loss(trainer, *means)[0].mean()
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert_close(gradient, gradients(model))


@pytest.mark.parametrize("desirable", [(True, False, True, True, False), (False,) * 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_kto_equals_its_formula(run: TrainingSession, desirable: tuple[bool, ...], seed: int) -> None:
    """Equations 7 and 8 of the paper, sequence by sequence, with TRL's estimate of KL."""
    move(run, seed)
    pairs = pairs_of(run, desirable)
    loss, gradient, metrics = ours(run, KahnemanTversky(0.2, 1.3, 0.8), [pairs])
    model = run.forward.model
    model.zero_grad(set_to_none=True)

    def ratio(pair: TokenizedPair, number: int) -> torch.Tensor:
        side = pair.sequence(number)
        ids = torch.from_numpy(side.input_ids).long()[None]
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        mask = torch.from_numpy(side.loss_mask[1:])
        assert side.reference is not None
        return logps[torch.arange(len(mask))[mask], ids[0, 1:][mask]].sum() - side.reference[0]

    with torch.no_grad():
        kl = torch.stack([ratio(pair, 1) for pair in pairs]).mean().clamp(min=0)
    values = []
    for pair, good in zip(pairs, desirable, strict=True):
        reward = 0.2 * (ratio(pair, 0) - kl)
        values.append(1.3 * (1 - torch.sigmoid(reward)) if good else 0.8 * (1 - torch.sigmoid(-reward)))
    expected = torch.stack(values).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert_close(gradient, gradients(model))
    assert metrics["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert run.forward.model.training


@TRL_ON_CPU
def test_kto_equals_trl(run: TrainingSession, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    pairs = pairs_of(run, (True, False, True, True, False))
    loss, gradient, metrics = ours(run, KahnemanTversky(0.2, 1.3, 0.8), [pairs])
    model = run.forward.model
    moved = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    trainer = KTOTrainer(
        model=model,
        args=KTOConfig(beta=0.2, desirable_weight=1.3, undesirable_weight=0.8, **trl_arguments(tmp_path)),
        train_dataset=Dataset.from_list(
            [{"prompt": "a", "completion": " b", "label": True}, {"prompt": "c", "completion": " d", "label": False}]
        ),
        processing_class=run.tokenizer,
    )
    for name, parameter in model.named_parameters():
        if name in moved:
            parameter.data.copy_(moved[name])
    inputs: dict[str, Any] = padded(sides(pairs, 0))
    inputs |= {f"KL_{name}": value for name, value in padded(sides(pairs, 1)).items()}
    inputs["label"] = torch.tensor([pair.desirable for pair in pairs])
    expected, expected_gradient = theirs(trainer, run, inputs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(gradient, expected_gradient)
    assert metrics["kl"] == pytest.approx(trainer._metrics["train"]["kl"][-1], rel=1e-4)


OBJECTIVES: dict[str, Objective] = {
    "dpo": DirectPreference(0.3, nll_weight=0.5),
    "ipo": DirectPreference(0.3, "ipo"),
    "orpo": OddsRatioPreference(0.4),
    "simpo": SimplePreference(2.5, 1.0),
    "kto": KahnemanTversky(0.2, 1.3, 0.8),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dividing_a_step_changes_nothing(run: TrainingSession, name: str) -> None:
    """All pairs packed together equal them one by one and in uneven parts: loss, gradient and metrics."""
    pairs = pairs_of(run, (True, False, True, True, False))
    whole = ours(run, OBJECTIVES[name], [pairs])
    for parts in ([[pair] for pair in pairs], [pairs[:1], pairs[1:4], pairs[4:]]):
        loss, gradient, metrics = ours(run, OBJECTIVES[name], parts)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert_close(gradient, whole[1], 5e-5)
        assert metrics == pytest.approx(whole[2], rel=1e-4)
    evaluated: dict[str, float] = {}
    value = evaluate_loss(run.forward, OBJECTIVES[name], pairs, run.config, 0, None, evaluated)
    assert value == pytest.approx(whole[0], rel=1e-5)
    assert evaluated == pytest.approx(whole[2], rel=1e-4)


def test_an_adapted_head_gives_the_same_gradient(run: TrainingSession) -> None:
    """A head that is more than a matrix is called, in chunks."""
    pairs = pairs_of(run)
    expected = ours(run, OBJECTIVES["dpo"], [pairs])
    head = run.forward.head

    class Wrapped(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return head(rows)  # type: ignore[no-any-return]

    run.forward.head = Wrapped()
    loss, gradient, _ = ours(run, OBJECTIVES["dpo"], [pairs])
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert_close(gradient, expected[1], 5e-5)


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "kto"])
def test_the_fused_engine_agrees(configure: Configure, tmp_path: Path, name: str) -> None:
    found = []
    for engine in ("reference", "fused"):
        session = start(configure(f"objective.name={name}", f"model.engine={engine}"), tmp_path / engine)
        move(session)
        assert session.plan.memory.engine == engine
        session.forward.model.train()
        found.append(ours(session, session.objective, [pairs_of(session, (True, False, True, True, False))]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_close(found[1][1], found[0][1], 1e-4)


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["event"] == "step"]


class Crash(Exception):
    """Ends a run in the middle of a step's report."""


RUNS = {
    "dpo": ("objective.name=dpo",),
    "dpo, full": ("objective.name=dpo", "method=full", "optimizer.lr=1e-3"),
    "dpo, fused": ("objective.name=dpo", "model.engine=fused"),
    "dpo, dropout": ("objective.name=dpo", "adapter.dropout=0.1"),
    "ipo": ("objective.name=dpo", "objective.loss=ipo"),
    "orpo": ("objective.name=orpo", "objective.beta=0.5"),
    "simpo": ("objective.name=simpo",),
    "kto": ("objective.name=kto",),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_learns_to_prefer_and_resumes_and_merges(configure: Configure, tmp_path: Path, kind: str) -> None:
    config = configure(*RUNS[kind], "training.epochs=4", "training.save_every=4", "data.eval_path=HELD")
    session = start(config, tmp_path / "whole")
    session.train()
    run = session.run
    steps = [event for event in run.events() if event["event"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["rewards/chosen"] - steps[-1]["rewards/rejected"] > 0.05
    if "kto" not in kind:
        assert steps[-1]["rewards/accuracies"] > 0.95
        (evaluation, *_) = [event["metrics"] for event in run.events() if event["event"] == "eval"]
        assert 0 <= evaluation["eval_rewards/accuracies"] <= 1
    if session.objective.needs_reference:
        assert steps[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4), "the policy begins as the reference"

    whole = losses(run)
    crashed = start(config.model_copy(deep=True), tmp_path / "crashed")

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 6:
            raise Crash

    with pytest.raises(Crash):
        crashed.train(crash)
    restart(tmp_path / "crashed").train()
    assert losses(RunFolder(tmp_path / "crashed")) == whole
    if "full" not in kind:
        assert merge(run.path)["difference"] < 1e-4


def test_the_reference_is_kept_and_read_again(configure: Configure, tmp_path: Path) -> None:
    session = start(configure("objective.name=dpo", "training.max_steps=2", "data.eval_path=HELD"), tmp_path / "run")
    session.train()
    kept = session.run.read_reference()
    assert kept is not None
    assert kept["train"].shape == (24, 2)
    assert kept["eval"].shape == (5, 2)
    with session.forward.model.disable_adapter():
        again = reference_log_probabilities(session.forward, session.data.train, session.config, 0)
    np.testing.assert_allclose(kept["train"], again, rtol=1e-5)
    (session.run.path / "reference.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match=r"reference.safetensors: cannot be read .*; delete it"):
        session.run.read_reference()


def test_a_resumed_run_reads_its_reference(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed again it could differ in the last digits, by another division into micro-batches."""
    session = start(configure("objective.name=dpo", "training.save_every=1"), tmp_path / "run")

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            raise Crash

    with pytest.raises(Crash):
        session.train(crash)
    monkeypatch.setattr("tunesmith.workflows.train.reference_log_probabilities", lambda *_: pytest.fail("computed"))
    restart(tmp_path / "run").train()
    assert len(losses(session.run)) == 3


def test_a_pissa_adapter_is_its_own_reference(configure: Configure, tmp_path: Path) -> None:
    """Switched off it leaves the base without its largest singular values; the reference is the model as it begins."""
    session = start(
        configure("objective.name=dpo", "adapter.init_lora_weights=pissa", "training.max_steps=2"), tmp_path / "run"
    )
    session.train()
    first = next(event for event in session.run.events() if event["event"] == "step")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective.beta=0.2"],
            "objective.beta has no effect with objective.name: sft; remove it, or set the name to dpo or orpo",
        ),
        (["objective.name=orpo", "objective.loss=ipo"], "objective.loss has no effect with objective.name: orpo"),
        (
            ["objective.name=dpo", "objective.gamma=2"],
            "objective.gamma has no effect with objective.name: dpo; .* to simpo",
        ),
        (
            ["objective.name=dpo", "objective.loss=hinge", "objective.label_smoothing=0.1"],
            "objective.label_smoothing has no effect with objective.loss: hinge",
        ),
        (["objective.name=dpo", "data.packing=false"], "data.packing: false cannot be with objective.name: dpo"),
        (["objective.name=orpo", "data.packing=auto"], "data.packing: auto cannot be with objective.name: orpo"),
        (["objective.name=dpo", "data.train_on=all"], "data.train_on has no effect with objective.name: dpo"),
        (["objective.name=kto", "data.overlong=split"], "data.overlong: split cannot be with objective.name: kto"),
        (["objective.name=dpo", "evaluation.generate=true", "data.eval_fraction=0.2"], "evaluation.generate cannot be"),
        (
            ["objective.name=dpo", "training.micro_batch_tokens=512", "training.batch_tokens=1024"],
            "training.batch_tokens cannot be with objective.name: dpo",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(configure: Configure, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(*overrides)


@pytest.mark.parametrize(
    ("rows", "objective", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}],
            "dpo",
            "objective dpo needs a `chosen` and a `rejected` answer a row; set",
        ),
        (
            [{"prompt": "a", "completion": "b", "label": True}],
            "dpo",
            "of form kto; objective dpo needs a .*; set objective.name: kto",
        ),
        ([{"prompt": "a", "completion": "b"}], "kto", r"objective kto needs a `label` \(true: desirable\)"),
        (
            [{"prompt": "a", "completion": "b", "label": True}] * 3,
            "kto",
            "jsonl: all 3 rows are desirable; objective kto needs .*: add some of the other",
        ),
        (preference_rows(4), "sft", "of form preference; objective sft needs answers, not preferences"),
    ],
)
def test_data_of_another_kind_is_refused_before_the_model_is_loaded(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], objective: str, message: str
) -> None:
    monkeypatch.setattr("tunesmith.workflows.train.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(DataError, match=message):
        start(configure(f"objective.name={objective}", rows=rows), tmp_path / "run")


def test_defaults_are_the_objectives_own(configure: Configure) -> None:
    for name, beta, adapter_rate, full_rate in (
        ("dpo", 0.1, 5e-6, 5e-7), ("orpo", 0.1, 8e-5, 8e-6), ("simpo", 2.0, 6e-6, 6e-7), ("kto", 0.1, 5e-6, 5e-7),
    ):  # fmt: skip
        config = load_config(None, [f"objective.name={name}"]).resolved()
        assert (config.objective.beta, config.lr, config.usual_lr) == (beta, adapter_rate, adapter_rate)
        assert (config.data.packing, config.training.epochs, config.optimizer.warmup_ratio) == (True, 1, 0.1)
        assert load_config(None, [f"objective.name={name}", "method=full"]).lr == full_rate
    assert load_config(None, []).resolved().objective.beta is None


def test_ktos_kinds_have_means_of_their_own(configure: Configure, tmp_path: Path) -> None:
    """One row a step: each has one kind only. Lines of one step leave the other kind out, and a line of all is of each kind's rows."""
    rows = [{"prompt": f"q{n}", "completion": f"answer {n}", "label": n % 3 > 0} for n in range(6)]
    settings = ("objective.name=kto", "training.batch_size=1", "training.epochs=1", "optimizer.lr=0.05")
    every = start(configure(*settings, rows=rows), tmp_path / "every")
    every.train()
    once = start(configure(*settings, "training.log_every=6", rows=rows), tmp_path / "once")
    once.train()
    steps = [event for event in every.run.events() if event["event"] == "step"]
    (line,) = [event for event in once.run.events() if event["event"] == "step"]
    found = {name: [step[name] for step in steps if name in step] for name in ("rewards/chosen", "rewards/rejected")}
    assert {name: len(values) for name, values in found.items()} == {"rewards/chosen": 4, "rewards/rejected": 2}
    assert not any("rewards/margins" in step for step in steps)
    for name, values in found.items():
        assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert abs(line[name]) > 1e-3
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])
    for text in (every.run.path / "events.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_log_odds_of_certain_answers_are_finite() -> None:
    mean = torch.tensor([-1e-9, -1e-6, -2.0], dtype=torch.float32, requires_grad=True)
    value = log_odds(mean)
    expected = mean.detach().double() - torch.log(-torch.expm1(mean.detach().double()))
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    F.logsigmoid(value).sum().backward()
    assert mean.grad is not None
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(log_odds(torch.zeros(1)))


def test_ktos_estimate_is_of_all_ranks(run: TrainingSession) -> None:
    """Two ranks of unequal shares: each knows the mean over all rows, not that of its own."""
    objective = KahnemanTversky(0.2)
    pairs = pairs_of(run, (True, False, True, True, False))
    shares, sums = (pairs[:1], pairs[1:]), []

    def tools(total: Callable[[torch.Tensor], torch.Tensor]) -> StepTools:
        return replace(step_tools(run.forward, True, 0), total=total)

    for share in shares:
        objective.begin_step(run.forward, [share], tools(lambda values: (sums.append(values.clone()), values)[1]))
    together = sums[0] + sums[1]
    assert together[1] == 5
    found = []
    for share in shares:
        objective.begin_step(run.forward, [share], tools(lambda values: together.clone()))
        (kl,) = [
            term
            for term in objective.terms(run.forward, make_batch([share[0].sequence(0)], True, 0, "cpu"))
            if term.name == "kl"
        ]
        found.append(float(kl.sum))
    assert found[0] == found[1] == pytest.approx(max(0.0, float(together[0] / 5)))
    assert sums[0][0] != pytest.approx(float(together[0] / 5), rel=1e-3)


def test_the_log_has_means_over_pairs(configure: Configure, tmp_path: Path) -> None:
    """A log line of several steps: each counts by its pairs, not by its tokens; so does train_loss."""
    settings = ("objective.name=dpo", "training.batch_size=10", "training.epochs=1")
    every = start(configure(*settings, "training.log_every=1"), tmp_path / "every")
    every.train()
    once = start(configure(*settings, "training.log_every=9"), tmp_path / "once")
    once.train()
    steps = [event for event in every.run.events() if event["event"] == "step"]
    (line,) = [event for event in once.run.events() if event["event"] == "step"]
    assert [step["examples"] for step in steps] == [10, 10, 4]
    for name in ("loss", "rewards/margins", "logps/chosen"):
        expected = sum(step[name] * step["examples"] for step in steps) / 24
        assert line[name] == pytest.approx(expected, rel=1e-6)
        by_tokens = sum(step[name] * step["supervised_tokens"] for step in steps) / line["supervised_tokens"]
        assert line[name] != pytest.approx(by_tokens, rel=1e-6)
    assert once.run.metrics["train_loss"] == pytest.approx(line["loss"], rel=1e-6)


def kl_of(
    session: TrainingSession, pairs: Sequence[TokenizedPair], total: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    objective = KahnemanTversky(0.2)
    objective.begin_step(session.forward, [pairs], replace(step_tools(session.forward, True, 0), total=total))
    batch = make_batch([pairs[0].sequence(0)], True, 0, "cpu")
    (kl,) = [float(term.sum) for term in objective.terms(session.forward, batch) if term.name == "kl"]
    return kl


def test_ktos_estimate_is_never_negative(run: TrainingSession) -> None:
    assert kl_of(run, pairs_of(run), lambda values: torch.tensor([-3.0, 5.0])) == 0
    assert kl_of(run, pairs_of(run), lambda values: torch.tensor([3.0, 5.0])) == pytest.approx(0.6)


def test_ktos_estimate_draws_no_dropout(configure: Configure, tmp_path: Path) -> None:
    session = start(configure("objective.name=kto", "adapter.dropout=0.5"), tmp_path / "run")
    move(session)
    pairs = pairs_of(session)
    model = session.forward.model.train()
    session.forward.dropout_seed = 7
    found = kl_of(session, pairs, lambda values: values)
    model.eval()
    session.forward.dropout_seed = None
    with torch.no_grad():
        batch = make_batch([pair.sequence(1) for pair in pairs], True, 0, "cpu")
        ratios = sequence_log_probabilities(session.forward, batch) - torch.tensor(
            [pair.reference[1] for pair in pairs if pair.reference]
        )
    assert found == pytest.approx(max(0.0, float(ratios.mean())), rel=1e-5)
    assert found > 0


def test_a_step_that_is_done_again_measures_once(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the second micro-batch: what the first one added to the metrics is forgotten."""
    settings = ("objective.name=dpo", "training.micro_batch_size=4", "training.batch_size=24", "training.epochs=2")
    found = []
    for failures in ([], [torch.OutOfMemoryError("CUDA out of memory")]):
        session = start(configure(*settings), tmp_path / f"run-{len(found)}")
        terms, seen = session.objective.terms, list[int]()

        def failing(
            forward: Any, batch: Any, terms: Any = terms, seen: Any = seen, failures: Any = failures
        ) -> list[Term]:
            seen.append(batch.num_examples)
            if len(seen) == 2 and failures:
                raise failures.pop()
            return terms(forward, batch)  # type: ignore[no-any-return]

        monkeypatch.setattr(session.objective, "terms", failing)
        session.train()
        found.append([event for event in session.run.events() if event["event"] == "step"])
        assert [event["event"] for event in session.run.events()].count("out_of_memory") == len(found) - 1
    for step, (clean, repeated) in enumerate(zip(*found, strict=True)):
        names = ["loss", "rewards/margins", "logps/chosen"]
        if step:  # before the first update every margin is 0 but for rounding, and rounding has no sign to count
            names.append("rewards/accuracies")
        for name in names:
            assert repeated[name] == pytest.approx(clean[name], rel=1e-4, abs=1e-6)


def test_ktos_estimate_in_evaluation_is_halved_like_the_rest(
    run: TrainingSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs_of(run, (True, False, True, True, False))
    expected = evaluate_loss(run.forward, OBJECTIVES["kto"], pairs, run.config, 0)
    hidden, sizes = run.forward.hidden, list[int]()

    def small(batch: Any) -> torch.Tensor:
        sizes.append(batch.num_examples)
        if batch.num_examples > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(batch)

    monkeypatch.setattr(run.forward, "hidden", small)
    assert evaluate_loss(run.forward, OBJECTIVES["kto"], pairs, run.config, 0) == pytest.approx(expected, rel=1e-5)
    assert max(sizes) > 2


def test_a_reference_without_room_says_what_to_do(run: TrainingSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    pairs = pairs_of(run)
    monkeypatch.setattr(run.forward, "hidden", full)
    message = (
        r"the reference ran out of memory with one example of \d+ tokens \(random:\d\): .*; set data.max_seq_length"
    )
    with pytest.raises(MachineError, match=message):
        reference_log_probabilities(run.forward, pairs, run.config, 0)


def test_a_step_waits_for_no_device(run: TrainingSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the model itself (transformers looks at its mask) reads a value back between the micro-batches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    in_model = [False]

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reads = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            assert in_model[0] or not reads, func
            return func(*args, **(kwargs or {}))

    def hidden(batch: Any, hidden: Any = run.forward.hidden) -> torch.Tensor:
        in_model[0] = True
        found: torch.Tensor = hidden(batch)
        in_model[0] = False
        return found

    pairs = pairs_of(run, (True, False, True, True, False))
    monkeypatch.setattr(run.forward, "hidden", hidden)
    for objective in OBJECTIVES.values():
        with NoReads():
            accumulate_gradients(run.forward, objective, [pairs[:2], pairs[2:]], True, 0, NO_SCALER, None, {})


def test_graphs_are_not_for_pairs(run: TrainingSession) -> None:
    run.config.training.cuda_graphs = True
    run.forward.device = "cuda"
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for objective in OBJECTIVES.values():
        assert micro_batch_graphs(run.config, run.forward, objective, run.optimizer, scaler, print) is None
