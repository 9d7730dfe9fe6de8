"""Trackers: what TensorBoard holds is what events.jsonl has, and others are started, told and ended as they want to be."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest

from tunesmith.config import load_config
from tunesmith.errors import ConfigError, MachineError
from tunesmith.training import trackers as module
from tunesmith.training.trackers import SHOWN, trackers_of
from tunesmith.workflows.train import TrainingSession, restart

Session = Callable[..., TrainingSession]

SHORT = ("training.max_steps=4", "training.eval_every=2", "data.eval_path=HELD")


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar in TensorBoard's files, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def logged(run: TrainingSession) -> dict[str, list[tuple[int, float]]]:
    """The same of events.jsonl."""
    events = run.run.events()
    steps = [event for event in events if event["event"] == "step"]
    found = {f"train/{name}": [(event["step"], event[name]) for event in steps] for name in SHOWN}
    evaluations = [event for event in events if event["event"] == "eval"]
    return found | {"eval/eval_loss": [(event["step"], event["metrics"]["eval_loss"]) for event in evaluations]}


def assert_same(found: dict[str, list[tuple[int, float]]], expected: dict[str, list[tuple[int, float]]]) -> None:
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], rel=1e-6), tag


def test_tensorboard_holds_what_the_run_logged(session: Session) -> None:
    run = session(*SHORT)
    run.train()
    expected = logged(run)
    assert [step for step, _ in expected["train/loss"]] == [1, 2, 3, 4]
    assert_same(shown(run.run.path / "tensorboard"), expected)


def test_a_resumed_run_goes_on_in_the_same_files(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(*SHORT, "training.save_every=2")
    calls = itertools.count(1)
    step = run.optimizer.inner.step

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(run.optimizer.inner, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert [step for step, _ in shown(run.run.path / "tensorboard")["train/loss"]] == [1, 2], (
        "ended, so that all is there"
    )
    resumed = restart(run.run.path)
    resumed.train()
    assert_same(shown(run.run.path / "tensorboard"), logged(resumed))


def test_none_where_none_is_wanted_or_installed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(*SHORT, "training.trackers=[]")
    run.train()
    assert not (run.run.path / "tensorboard").exists()
    monkeypatch.setattr(module, "_installed", lambda name: False)
    assert trackers_of(load_config()) == []
    with pytest.raises(MachineError) as caught:
        session("training.trackers=[tensorboard, wandb]", "data.path=/nowhere.jsonl")  # before anything is read
    assert str(caught.value) == (
        "training.trackers: tensorboard, wandb cannot be imported; install with: pip install tensorboard wandb, or remove it "
        "from the list"
    )


class Recorder:
    """A tracker that notes what happens to it."""

    def __init__(self, name: str, calls: list[Any]):
        self.name, self.calls = name, calls

    def __call__(self, *arguments: Any, **options: Any) -> Recorder:
        self.calls.append((self.name, arguments, options))
        return self

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_others_are_told_the_configuration_the_steps_and_the_end(
    session: Session, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, Recorder(name, calls))
    monkeypatch.setattr(module, "_installed", lambda name: True)
    run = session(
        *SHORT, f"training.trackers=[{name}]", "training.tracker_project=banking", "adapter.rank_pattern={v_proj: 4}"
    )
    run.train()
    title = {"run_name" if name == "mlflow" else "name": run.run.path.name}
    made, started, settings, *told, ended = calls
    assert (made, started, ended) == ((name, ("banking",), title), "start", "finish")
    assert (settings["adapter.r"], settings["adapter.rank_pattern.v_proj"], settings["optimizer.betas"]) == (
        16,
        4,
        "[0.9, 0.999]",
    )
    assert settings["model.name"] == run.config.model.name
    assert all(value is None or isinstance(value, (str, int, float, bool)) for value in settings.values())
    found: dict[str, list[tuple[int, float]]] = {}
    for step, values in told:
        for tag, value in values.items():
            found.setdefault(tag, []).append((step, value))
    assert_same(found, logged(run))


def test_a_project_that_nobody_would_see() -> None:
    for trackers in ("auto", "[]", "[tensorboard]"):
        with pytest.raises(
            ConfigError, match=r"training\.tracker_project has no effect without wandb, trackio or mlflow"
        ):
            load_config(None, [f"training.trackers={trackers}", "training.tracker_project=mine"])
    load_config(None, ["training.trackers=[tensorboard, wandb]", "training.tracker_project=mine"])
