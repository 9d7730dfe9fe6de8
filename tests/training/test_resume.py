"""A run that is killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.config import OptimizerConfig, RunConfig
from tunesmith.errors import Interrupted, MachineError, RunError, VerificationError
from tunesmith.runs import RunFolder
from tunesmith.training import checkpoint
from tunesmith.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from tunesmith.training.guards import StopRequest
from tunesmith.training.optimizers import make_optimizer
from tunesmith.training.window import Window
from tunesmith.workflows.train import TrainingSession, restart, start

Configure = Callable[..., RunConfig]
SETTINGS = (
    "training.epochs=2",
    "training.save_every=2",
    "adapter.dropout=0.1",
    "data.eval_path=HELD",
    "training.eval_every=3",
)


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["event"] == "step"]


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter_path / "adapter_model.safetensors")


def assert_same_run(run: RunFolder, reference: RunFolder) -> None:
    """Same losses to the last digit, same rates and norms, same weights bit for bit, same metrics."""
    assert losses(run) == losses(reference)
    for key in ("grad_norm", "lr", "supervised_tokens", "epoch"):
        of = [[event[key] for event in r.events() if event["event"] == "step"] for r in (run, reference)]
        assert of[0] == of[1], key
    evaluated = [[e["metrics"] for e in r.events() if e["event"] == "eval"] for r in (run, reference)]
    assert evaluated[0] == evaluated[1]
    mine, theirs = weights(run), weights(reference)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for key in ("train_loss", "eval_loss", "supervised_tokens", "steps", "best_step"):
        assert run.metrics[key] == reference.metrics[key], key


class StopAt(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.filterwarnings("ignore:.*aged.*")
def test_resume_is_bit_identical_for_every_optimizer(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    config = configure(*SETTINGS, f"optimizer.name={optimizer}")
    reference = start(config, tmp_path / "whole")
    reference.train()
    crashing = start(config, tmp_path / "crashed")

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise StopAt

    with pytest.raises(StopAt):
        crashing.train(crash)
    assert losses(crashing.run) == losses(reference.run)[:5]
    torch.manual_seed(999)  # whatever the new process's generator is, the checkpoint's takes over
    restart(tmp_path / "crashed").train()
    assert_same_run(crashing.run, reference.run)
    assert "resume" in [event["event"] for event in crashing.run.events()]


@pytest.mark.parametrize("way", ["by examples", "by tokens"])
def test_a_packed_run_goes_on_at_the_exact_document(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    by_tokens = ["training.batch_tokens=768", "training.batch_size=16"] if way == "by tokens" else []
    config = configure(
        *SETTINGS, "data.packing=true", "data.max_seq_length=256", "training.micro_batch_tokens=256", *by_tokens
    )
    seen: list[list[str]] = []
    original = Window.add

    def add(self: Window, step: int, parts: Any, *scalars: torch.Tensor) -> None:
        seen.append([example.where for part in parts for example in part])
        original(self, step, parts, *scalars)

    monkeypatch.setattr(Window, "add", add)
    reference = start(config, tmp_path / "whole")
    reference.train()
    expected = seen.copy()
    per_epoch = len(expected) // 2
    assert sorted(row for step in expected[:per_epoch] for row in step) == sorted(e.where for e in reference.data.train)
    assert expected[:per_epoch] != expected[per_epoch:]
    for crash_at in range(1, len(expected)):
        seen.clear()
        crashing = start(config, tmp_path / f"crashed-{crash_at}")

        def crash(event: dict[str, Any], at: int = crash_at) -> None:
            if event["event"] == "step" and event["step"] == at:
                raise StopAt

        with pytest.raises(StopAt):
            crashing.train(crash)
        saved = crashing.run.checkpoints()[-1][0] if crashing.run.checkpoints() else 0
        del seen[saved:]  # what the crash lost is done again
        torch.manual_seed(999)
        restart(tmp_path / f"crashed-{crash_at}").train()
        assert seen == expected
        assert_same_run(crashing.run, reference.run)


@pytest.mark.slow
def test_resume_after_sigkill_at_any_moment(configure: Configure, tmp_path: Path) -> None:
    """Kill -9 at random moments, again and again, until the run gets through."""
    config = configure(*SETTINGS, "training.save_every=1", "training.epochs=10")
    reference = start(config, tmp_path / "whole")
    reference.train()
    path = tmp_path / "killed"
    start(config, path)  # makes the folder; nothing trained
    rng = random.Random(7)
    kills = 0
    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", "resume", str(path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        run = RunFolder.open(path)
        before = len(run.events())
        while process.poll() is None and len(run.events()) <= before + 1:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))  # somewhere within a step, an evaluation or a checkpoint
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        if process.returncode == 0:
            break
        if kills == 4:
            restart(path).train()
            break
    assert kills >= 2, "the run was never caught in the middle"
    assert_same_run(run, reference.run)


@pytest.mark.parametrize("stage", ["adapter", "optimizer.safetensors", "rng.safetensors", "state.json", "rename"])
def test_a_crash_inside_a_checkpoint_leaves_the_previous_one(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    config = configure(*SETTINGS)
    reference = start(config, tmp_path / "whole")
    reference.train()
    crashing = start(config, tmp_path / "crashed")
    with monkeypatch.context() as patch:
        _crash_in_second_checkpoint(patch, stage)
        with pytest.raises(StopAt):
            crashing.train()
    assert [step for step, _ in crashing.run.checkpoints()] == [2]
    restart(tmp_path / "crashed").train()
    assert_same_run(crashing.run, reference.run)
    assert not list(crashing.run.checkpoints_path.glob(".tmp-*"))


def _crash_in_second_checkpoint(patch: pytest.MonkeyPatch, stage: str) -> None:
    calls = {"n": 0}
    target = {"adapter": "save_weights", "state.json": "write_json"}.get(stage, "save_file")
    original = getattr(checkpoint, target)

    def crash(*arguments: Any, **options: Any) -> Any:
        path = arguments[-1] if target != "write_json" else arguments[0]
        if stage in ("adapter", "rename") or Path(path).name == stage:
            calls["n"] += 1
            if calls["n"] == 2:
                raise StopAt
        return original(*arguments, **options)

    if stage == "rename":
        rename = Path.rename

        def crash_rename(self: Path, to: Path) -> Path:
            if Path(to).name.startswith("step-"):
                calls["n"] += 1
                if calls["n"] == 2:
                    raise StopAt
            return rename(self, to)

        patch.setattr(Path, "rename", crash_rename)
    else:
        patch.setattr(checkpoint, target, crash)


def test_full_fine_tuning_resumes_bit_identically(configure: Configure, tmp_path: Path) -> None:
    config = configure("method=full", "training.save_every=2", "training.epochs=2", "optimizer.lr=1e-3")
    reference = start(config, tmp_path / "whole")
    reference.train()
    stopped = start(config, tmp_path / "stopped")

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            raise StopAt

    with pytest.raises(StopAt):
        stopped.train(crash)
    restart(tmp_path / "stopped").train()
    assert losses(stopped.run) == losses(reference.run)
    mine, theirs = (load_file(run.model_path / "model.safetensors") for run in (stopped.run, reference.run))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_130(configure: Configure, tmp_path: Path, number: signal.Signals) -> None:
    config = configure("training.epochs=200", "training.save_every=1000")
    path = tmp_path / "run"
    start(config, path)
    process = subprocess.Popen([sys.executable, "-m", "tunesmith", "resume", str(path)], stderr=subprocess.PIPE)
    run = RunFolder.open(path)
    while process.poll() is None and not losses(run):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    done = len(losses(run))
    assert [step for step, _ in run.checkpoints()] == [done]
    assert f"stopped by {number.name} at step {done} of 600; state saved" in errors.decode()
    assert "Traceback" not in errors.decode()


def test_an_interrupted_run_goes_on_identically(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(*SETTINGS)
    reference = start(config, tmp_path / "whole")
    reference.train()
    stopped = start(config, tmp_path / "stopped")

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"stopped by SIGTERM at step [34] of 6; state saved: `tunesmith resume "):
        stopped.train(interrupt)
    restart(tmp_path / "stopped").train()
    assert_same_run(stopped.run, reference.run)


def test_second_sigint_ends_at_once() -> None:
    request = StopRequest()
    request.handle(signal.SIGINT, None)
    assert request.signal == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        request.handle(signal.SIGINT, None)


def test_what_cannot_be_resumed_is_refused(configure: Configure, tmp_path: Path) -> None:
    config = configure("training.epochs=1")
    session = start(config, tmp_path / "run")
    rows = Path(config.data.path)
    original = rows.read_text(encoding="utf-8")
    rows.write_text(original.replace("paper", "glass"), encoding="utf-8")
    with pytest.raises(RunError, match=r"train-24.jsonl has changed since this run started"):
        restart(tmp_path / "run")
    rows.write_text(original, encoding="utf-8")
    session.train()
    with pytest.raises(RunError, match=r"this run is finished \(3 steps\); there is nothing to resume"):
        restart(tmp_path / "run")
    with pytest.raises(RunError, match="not a run folder"):
        restart(tmp_path)


def test_a_base_that_changed_is_refused(configure: Configure, tmp_path: Path) -> None:
    from tiny import make_tiny_model

    model = make_tiny_model(tmp_path / "model", seed=0)
    start(configure(model=model), tmp_path / "run")
    make_tiny_model(tmp_path / "model", seed=1)
    with pytest.raises(RunError, match="the base model's weights have changed since this run started"):
        restart(tmp_path / "run")


@pytest.mark.parametrize(("kind", "step"), [("step", 2), ("step", 3), ("eval", 3), ("eval", 6)])
def test_a_signal_at_any_point_of_a_step_saves(configure: Configure, tmp_path: Path, kind: str, step: int) -> None:
    """The message says that the state is saved: whenever the signal came, there is a checkpoint of that very step."""
    config = configure("training.epochs=4", "training.save_every=1000", "data.eval_path=HELD", "training.eval_every=3")
    session = start(config, tmp_path / "run")

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == kind and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        session.train(interrupt)
    assert f"stopped by SIGTERM at step {step} of 12; state saved" in str(caught.value)
    assert session.run.checkpoints()[-1][0] == step == len(losses(session.run))


def test_a_kill_between_a_checkpoint_and_its_mark_as_best(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [3.0, 1.0, 2.0, 2.5]
    calls: list[float] = []

    def scripted(*_: Any) -> float:
        calls.append(script[len(calls)])
        return calls[-1]

    monkeypatch.setattr("tunesmith.workflows.training_evaluation.evaluate_loss", scripted)
    config = configure(
        "training.epochs=10", "data.eval_path=HELD", "training.eval_every=2", "training.save_every=2",
        "training.early_stopping.metric=eval_loss", "training.early_stopping.patience=2", "training.save_total_limit=1",
    )  # fmt: skip
    session = start(config, tmp_path / "run")
    mark = RunFolder.mark_best

    def crash(self: RunFolder, step: int, metric: str, value: float) -> None:
        if step == 4:
            raise StopAt
        mark(self, step, metric, value)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "mark_best", crash)
        with pytest.raises(StopAt):
            session.train()
    assert session.run.best() == {"step": 2, "metric": "eval_loss", "value": 3.0}
    result = restart(tmp_path / "run").train()
    assert result.status == "stopped_early"
    assert session.run.best() == {"step": 4, "metric": "eval_loss", "value": 1.0}
    assert result.metrics["best_step"] == 4


def test_a_stuck_tensor_is_not_forgotten_by_a_resume(configure: Configure, tmp_path: Path) -> None:
    config = configure("training.epochs=1", "training.save_every=1", "optimizer.weight_decay=0")

    def stick(session: TrainingSession) -> TrainingSession:
        for name, parameter in session.forward.model.named_parameters():
            if "layers.1.mlp.up_proj.lora_B" in name:
                parameter.register_hook(torch.zeros_like)
        return session

    with pytest.raises(VerificationError, match="2 of 28 trainable tensors have not moved"):
        stick(start(config, tmp_path / "run")).train()
    with pytest.raises(VerificationError, match="2 of 28 trainable tensors have not moved"):
        stick(restart(tmp_path / "run")).train()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_late_steps_too_small_to_move_a_tensor_are_fine(configure: Configure, tmp_path: Path) -> None:
    """At the end of a cosine the rate is below what fp32 can add to a norm weight near 1."""
    config = configure("method=full", "training.epochs=2", "training.save_every=4", "optimizer.lr=1e-3")
    session = start(config, tmp_path / "run")

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise StopAt

    with pytest.raises(StopAt):
        session.train(crash)
    again = restart(tmp_path / "run")
    for group in again.optimizer.param_groups:
        group["weight_decay"] = 0.0
    again.config.optimizer.lr = 1e-12
    assert again.train().status == "finished"


def test_a_template_that_changed_is_not_used(configure: Configure, tmp_path: Path) -> None:
    from tiny import CHATML

    template = tmp_path / "chat.jinja"
    template.write_text(CHATML, encoding="utf-8")
    before = start(configure(f"data.chat_template={template}"), tmp_path / "run")
    template.write_text("Today is Monday.\n" + CHATML, encoding="utf-8")
    assert restart(tmp_path / "run").data.train.digest() == before.data.train.digest()


def test_a_tokenizer_that_changed_is_refused(configure: Configure, tiny_model: Path, tmp_path: Path) -> None:
    from tiny import make_tokenizer

    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    start(configure(model=model), tmp_path / "run")
    make_tokenizer(merges=[("b", "i")]).save_pretrained(model)
    with pytest.raises(RunError, match="the same rows give other tokens than when this run started"):
        restart(tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncated", "missing tensor"])
def test_damaged_weights_are_never_trained_on(configure: Configure, tmp_path: Path, damage: str) -> None:
    session = start(configure("training.epochs=1", "training.save_every=1"), tmp_path / "run")
    session.train()
    (tmp_path / "run" / "metrics.json").unlink()
    folder = session.run.checkpoints()[-1][1]
    if damage == "truncated":
        file = folder / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors.pop(min(tensors))
        save_file(tensors, file)
    message = r"this checkpoint cannot be read .* delete this folder to go on from the one before"
    with pytest.raises(RunError, match=message):
        restart(tmp_path / "run").train()


def test_two_processes_cannot_train_one_run(session: Callable[..., TrainingSession]) -> None:
    run = session("training.epochs=1")

    def second(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            with pytest.raises(RunError, match="another process is training this run"):
                run.train()

    run.train(second)


def test_a_damaged_checkpoint_is_refused(configure: Configure, tmp_path: Path) -> None:
    session = start(configure("training.epochs=1", "training.save_every=1"), tmp_path / "run")
    session.train()
    (tmp_path / "run" / "metrics.json").unlink()
    folder = session.run.checkpoints()[-1][1]
    (folder / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="this checkpoint cannot be read"):
        restart(tmp_path / "run").train()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_moments_of_other_tensors_are_refused(name: Any, tmp_path: Path) -> None:
    """As of a checkpoint from before an adapter's tensors were laid end to end: one state for each of them."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False), torch.nn.Linear(128, 64, bias=False))
    options = OptimizerConfig(name=name)

    def stepped(optimizer: Any) -> Any:
        for parameter in optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.inner.step()
        return optimizer.inner

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = stepped(make_optimizer(model, options, 1e-3))
    save_checkpoint(tmp_path / "one", model, before, TrainState(), scaler)
    load_checkpoint(tmp_path / "one", model, make_optimizer(model, options, 1e-3).inner, scaler)
    model.peft_config = {}  # what makes its tensors one parameter
    flat = make_optimizer(model, options, 1e-3)
    assert len(flat.parameters) == 1
    del model.peft_config
    message = r"one: its optimizer trained other tensors \((exp_avg\w*|state\d) of parameter 0 has 8,192 values where 16,384 are"
    with pytest.raises(RunError, match=message):
        load_checkpoint(tmp_path / "one", model, flat.inner, scaler)


def test_a_full_disk_stops_with_the_last_checkpoint_intact(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(*SETTINGS)
    reference = start(config, tmp_path / "whole")
    reference.train()
    session = start(config, tmp_path / "run")
    original, calls = checkpoint.save_file, {"n": 0}

    def no_space(tensors: Any, path: Path) -> None:
        calls["n"] += 1
        if calls["n"] > 2:
            raise OSError(28, "No space left on device", str(path))
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", no_space)
        with pytest.raises(MachineError, match=r"no space left on the disk .* nothing that was saved before is lost"):
            session.train()
    assert [step for step, _ in session.run.checkpoints()] == [2]
    restart(tmp_path / "run").train()
    assert_same_run(session.run, reference.run)
