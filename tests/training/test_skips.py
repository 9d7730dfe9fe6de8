"""Bad steps: not taken, said with their rows, and when they come again and again the run goes back, then stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.data.batches import StepOrder
from tunesmith.errors import VerificationError
from tunesmith.training import loop
from tunesmith.training.optimizers import Optimizer
from tunesmith.training.skips import RECENT, SPIKE, SkippedStep, Skips, StepJudge
from tunesmith.workflows.train import TrainingSession, restart

Session = Callable[..., TrainingSession]


def events(run: TrainingSession, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.run.events() if event["event"] == kind]


def poison(
    run: TrainingSession,
    monkeypatch: pytest.MonkeyPatch,
    when: Callable[[int, set[str]], bool],
    factor: float = math.nan,
) -> list[int]:
    """Multiply loss and gradients of some steps by `factor`: `when` is told the attempt's number and its rows."""
    original, attempts = loop.accumulate_gradients, []

    def accumulate(forward: Any, objective: Any, parts: Any, *rest: Any) -> torch.Tensor:
        loss = original(forward, objective, parts, *rest)
        attempts.append(len(attempts) + 1)
        if when(attempts[-1], {example.where for part in parts for example in part}):
            for parameter in run.forward.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
            return loss * factor
        return loss

    monkeypatch.setattr(loop, "accumulate_gradients", accumulate)
    return attempts


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_that_is_not_finite_changes_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch, method: str, optimizer: str, device: str
) -> None:
    run = session(
        "training.max_steps=6", "training.save_every=1", "training.save_total_limit=9", f"method={method}",
        f"optimizer.name={optimizer}", "optimizer.schedule=constant", f"model.device={device}",
    )  # fmt: skip
    poison(run, monkeypatch, lambda attempt, rows: attempt == 4)
    assert run.train().status == "finished"
    (skipped,) = events(run, "skipped")
    fourth = StepOrder([len(e) for e in run.data.train], run.config.training, False).step(3)
    rows = [run.data.train[index].where for part in fourth for index in part]
    assert skipped["step"] == 4
    assert skipped["rows"] == rows
    assert skipped["message"] == f"step 4 was skipped: loss is nan (rows {', '.join(rows)})"
    name = "adapter/adapter_model.safetensors" if method == "lora" else "model.safetensors"

    def tensors(step: int, file: str) -> dict[str, torch.Tensor]:
        return load_file(run.run.checkpoint_path(step) / file)

    for file in (name, "optimizer.safetensors"):
        before, after, later = (tensors(step, file) for step in (3, 4, 5))
        assert all(torch.equal(before[key], after[key]) for key in before), "moments and step counts too"
        assert any(not torch.equal(after[key], later[key]) for key in later)
    steps = events(run, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert math.isfinite(run.run.metrics["train_loss"])
    assert not events(run, "rollback")


def test_a_window_says_the_loss_of_the_steps_that_were_taken(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["training.max_steps=4", "training.save_every=4", "optimizer.lr=1e-6"]
    each, pairs = session(*options), session(*options, "training.log_every=2")
    each.train()
    poison(pairs, monkeypatch, lambda attempt, rows: attempt == 2)
    pairs.train()
    expected = [step["loss"] for step in events(each, "step")]
    assert events(pairs, "step")[0]["loss"] == pytest.approx(expected[0], rel=1e-6), "the second is not in the mean"
    assert [event["step"] for event in events(pairs, "skipped")] == [2]


def test_a_spike_is_skipped_and_clipping_does_with_the_rest(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    for factor, expected in ((1e4, [50]), (5.0, [])):
        run = session(
            "training.epochs=30", "training.max_steps=52", "training.save_every=100", "optimizer.max_grad_norm=0.001"
        )
        with monkeypatch.context() as patch:
            poison(run, patch, lambda attempt, rows: attempt == 50, factor)
            run.train()
        found = events(run, "skipped")
        assert [event["step"] for event in found] == expected
        if found:
            assert "is more than 10 times the recent ones (rows " in found[0]["message"]
    run = session("training.epochs=30", "training.max_steps=52", "training.save_every=100", "optimizer.max_grad_norm=0.001",
                  "optimizer.skip_spikes=false")  # fmt: skip
    poison(run, monkeypatch, lambda attempt, rows: attempt == 50, 1e4)
    run.train()
    assert not events(run, "skipped")


def test_repeated_ones_go_back_to_the_checkpoint_with_half_the_rate(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "training.max_steps=8",
        "training.save_every=3",
        "optimizer.schedule=constant",
        "optimizer.warmup_ratio=0",
    ]
    run = session(*options)
    attempts = poison(run, monkeypatch, lambda attempt, rows: attempt in (4, 5, 6))
    run.train()
    assert len(attempts) == 6 + 5, "from step 3 again"
    (event,) = events(run, "rollback")
    assert (event["step"], event["from_step"], event["lr_scale"]) == (3, 6, 0.5)
    assert event["message"] == (
        "steps were skipped again and again up to step 6: back to the checkpoint of step 3; the rate is 0.5 of what it was"
    )
    steps = events(run, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6, 7, 8], "what was undone is gone"
    assert [step["lr"] for step in steps] == pytest.approx([1e-2] * 3 + [5e-3] * 5)
    assert [event["step"] for event in events(run, "skipped")] == [4, 5, 6], "but not what was said of it"
    assert run.run.metrics["steps"] == 8


def test_the_rate_stays_low_when_a_run_is_resumed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session("training.max_steps=9", "training.save_every=3", "optimizer.schedule=constant")
    poison(run, monkeypatch, lambda attempt, rows: attempt in (4, 5, 6))

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(stop)
    monkeypatch.undo()
    again = restart(run.run.path)
    again.train()
    assert [step["lr"] for step in events(again, "step")][-3:] == pytest.approx([5e-3] * 3)


def test_the_third_time_the_run_stops_and_names_the_rows(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session("training.epochs=30", "training.save_every=2", "training.batch_size=4", rows=12)
    bad = run.data.train[5].where
    poison(run, monkeypatch, lambda attempt, rows: (attempt > 4 and bad in rows) or (attempt % 3 == 0 and attempt > 4))
    with pytest.raises(VerificationError) as caught:
        run.train()
    assert len(events(run, "rollback")) == 2
    assert "after 2 returns to a checkpoint with half the rate each; " in str(caught.value)
    assert caught.value.exit_code == 1


def test_the_cause_that_is_named() -> None:
    def skips(rows: list[list[str]]) -> Skips:
        found = Skips()
        for index, window in enumerate(rows):
            for step, row in enumerate(window):
                found.add(SkippedStep(3 * index + step, math.nan, 1.0, (row, f"other:{index}{step}")))
            assert found.repeated
            if index < len(rows) - 1:
                found.went_back()
        return found

    with pytest.raises(VerificationError, match=r"the same rows came each time \(rows a:1\): look at them"):
        skips([["a:1", "b:2", "c:3"], ["a:1", "d:4", "e:5"], ["a:1", "f:6", "g:7"]]).refuse(1e-3, fp16=False)
    with pytest.raises(VerificationError, match=r"the rate is too high: lower optimizer.lr \(0.001 at this step\)"):
        skips([["a:1", "b:2", "c:3"], ["d:4", "e:5", "f:6"]]).refuse(1e-3, fp16=False)
    with pytest.raises(VerificationError, match=r"fp16's range is too small for this model: use bf16 or fp32"):
        skips([["a:1", "b:2", "c:3"]]).refuse(1e-3, fp16=True)


def test_skips_far_apart_are_not_repeated() -> None:
    found = Skips()
    for step in (1, 6, 11):
        found.add(SkippedStep(step, math.nan, 1.0, ()))
        assert not found.repeated
    found.add(SkippedStep(15, math.nan, 1.0, ()))
    assert found.repeated, "6, 11 and 15 are within ten steps"


def test_without_a_checkpoint_the_run_goes_on_from_where_it_is(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session("training.max_steps=9", "training.save_every=100", "optimizer.schedule=constant")
    attempts = poison(run, monkeypatch, lambda attempt, rows: attempt in (2, 3, 4))
    run.train()
    assert len(attempts) == 9
    assert events(run, "rollback")[0]["message"].endswith(
        "there is no checkpoint yet to go back to; the rate is 0.5 of what it was"
    )


# -- the judge --------------------------------------------------------------------------------------------------------


def verdicts(judge: StepJudge, norms: list[float], loss: float = 1.0) -> list[float]:
    return [judge.bad(torch.tensor(loss), torch.tensor(norm)).item() for norm in norms]


def test_the_judge_knows_a_spike_once_it_knows_enough() -> None:
    judge = StepJudge("cpu", 0.3, True)
    assert verdicts(judge, [1.0] * (RECENT // 2 - 1) + [1e9]) == [0.0] * (RECENT // 2), "nothing to compare with"
    judge = StepJudge("cpu", 0.3, True)
    assert verdicts(judge, [1.0] * RECENT) == [0.0] * RECENT
    assert verdicts(judge, [SPIKE * 0.99, SPIKE * 1.01, 1.0, 1e9]) == [0.0, 1.0, 0.0, 1.0]
    quiet = StepJudge("cpu", 0.3, True)
    verdicts(quiet, [1e-4] * RECENT)
    assert verdicts(quiet, [2.9, 3.1]) == [0.0, 1.0], "under ten times the clipping norm clipping is enough"


def test_the_judge_never_lets_what_is_not_finite_pass() -> None:
    for spikes in (True, False):
        judge = StepJudge("cpu", 0.3, spikes)
        assert verdicts(judge, [math.nan, math.inf, 1.0]) == [1.0, 1.0, 0.0]
        assert verdicts(judge, [1.0], loss=math.nan) == [1.0]
        assert judge.recent() == [1.0]


def test_the_judge_remembers_over_a_restart() -> None:
    judge = StepJudge("cpu", 0.3, True)
    verdicts(judge, [float(norm) for norm in range(1, 81)])
    assert judge.recent() == [float(norm) for norm in range(17, 81)]
    again = StepJudge("cpu", 0.3, True, judge.recent())
    assert again.recent() == judge.recent()
    assert verdicts(again, [490.0, 479.0]) == verdicts(judge, [490.0, 479.0]) == [1.0, 0.0]


# -- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_states_made_beforehand_change_no_step(session: Session, name: str) -> None:
    early, late = (session("training.max_steps=3", f"optimizer.name={name}") for _ in range(2))
    early.optimizer.allocate()
    made = {key: value for entry in early.optimizer.inner.state.values() for key, value in entry.items()}
    assert made.keys() & {"exp_avg", "state1"}
    late.optimizer.allocate = lambda: None  # type: ignore[method-assign]
    early.train()
    late.train()
    assert [e["loss"] for e in events(early, "step")] == [e["loss"] for e in events(late, "step")]
    assert isinstance(early.optimizer, Optimizer)
