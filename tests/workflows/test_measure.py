"""What a run records of itself at its end: its speed without compiling and evaluation, its peak, beside the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tiny import chat_rows, write_jsonl
from tunesmith.cards import find_card
from tunesmith.config import load_config
from tunesmith.measurements import Calibration, measured_path, read_measured
from tunesmith.training import loop
from tunesmith.types import Event
from tunesmith.version import __version__
from tunesmith.workflows import train
from tunesmith.workflows.measure import LEAST_STEPS, StepTimes
from tunesmith.workflows.run_plan import RunPlan
from tunesmith.workflows.train import TrainingSession


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- the speed of steps -----------------------------------------------------------------------------------------------


def step(number: int, seconds: float, tokens: int = 100) -> Event:
    return {"event": "step", "step": number, "seconds": seconds, "tokens": tokens}


def timed(*events: Event) -> StepTimes:
    times = StepTimes()
    for event in events:
        times.add(event)
    return times


def test_the_first_steps_are_not_timed_and_a_slow_one_does_not_count() -> None:
    compiling = [step(number, 50.0) for number in range(1, 6)]
    times = timed(
        *compiling, step(6, 1.0), step(7, 30.0), step(8, 2.0, 400), {"event": "eval", "step": 8}, step(9, 1.0)
    )
    assert (times.steps, times.tokens_per_second) == (4, 100.0)


def test_windows_of_several_steps() -> None:
    """The first one begins at step 0; the one that begins at step 5 is the first that counts."""
    times = timed(step(4, 50.0), step(8, 50.0), step(12, 2.0, 400), step(16, 1.0, 400), step(17, 0.5, 100))
    assert (times.steps, times.tokens_per_second) == (9, 200.0)


@pytest.mark.parametrize("kind", ["resume", "rollback"])
def test_a_process_that_goes_on_compiles_too(kind: str) -> None:
    resumed = timed({"event": "resume", "step": 40}, *(step(40 + number, 1.0) for number in range(1, 9)))
    assert resumed.steps == 3
    # Steps that are done again are steps, not a jump back.
    again = timed(
        *(step(number, 1.0) for number in range(1, 11)), {"event": kind, "step": 6}, step(7, 1.0), step(8, 1.0)
    )
    assert again.steps == 7


# -- what a run records -----------------------------------------------------------------------------------------------


@pytest.fixture
def ready(tiny_model: Path, tmp_path: Path) -> Callable[..., TrainingSession]:
    """A run on the CPU, of 30 steps, whose plan says that it is on an H100; its dry step took 3.3 GB of 3.0 predicted."""

    def make(*settings: str, card: str | None = "H100", **plan: Any) -> TrainingSession:
        data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(24, seed=1))
        fixed = ["model.dtype=fp32", "model.device=cpu", "training.batch_size=8", "training.epochs=10"]
        config = load_config(None, [*fixed, *settings], {"model.name": str(tiny_model), "data.path": str(data)})
        session = train.start(config, tmp_path / "run")
        memory = replace(session.plan.memory, predicted_peak_gb=3.0)
        choice = replace(session.plan.choice, plan=memory, step_seconds=0.125)
        changed = {"card": card and find_card(card), "choice": choice} | plan
        session.plan = replace(session.plan, **changed)
        session.calibration = [{"event": "calibration", "predicted_gb": 3.0, "measured_gb": 3.3, "message": "-"}]
        return session

    return make


def warnings(session: TrainingSession) -> list[str]:
    return [event["message"] for event in session.run.events() if event["event"] == "warning"]


def test_a_run_records_what_it_measured(ready: Callable[..., TrainingSession]) -> None:
    session = ready("data.eval_fraction=0.2", "training.eval_every=3", host=1.25)
    plan = session.plan
    result = session.train()
    (found,) = read_measured()
    events = session.run.events()
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) > LEAST_STEPS + 5
    rate = median(event["seconds"] / event["tokens"] for event in steps[5:])
    assert (found.tokens_per_second, found.steps) == (pytest.approx(1 / rate), len(steps) - 5)
    assert found.predicted_tokens_per_second == plan.choice.candidate.tokens / 0.125
    assert (found.card, found.engine, found.method, found.scheme) == ("H100", "reference", "lora", None)
    assert plan.shape is not None
    assert (found.version, found.model_type, found.parameters) == (__version__, "llama", plan.shape.num_parameters)
    assert (found.predicted_peak_gb, found.host) == (3.0, 1.25)
    assert found.measured_peak_gb == max(3.3, result.metrics["peak_memory_gb"])
    assert abs(found.time - events[-1]["time"]) < 60
    assert events[-1]["event"] == "end"


def test_the_prediction_that_is_recorded_is_arithmetic(ready: Callable[..., TrainingSession]) -> None:
    """Not what earlier runs or the dry step made of it. Both are what the run expects, and says."""
    session = ready(calibration=Calibration(2, 0.5), correction_gb=0.4)
    arithmetic = session.plan.choice.tokens_per_second
    assert arithmetic is not None
    session.train()
    (found,) = read_measured()
    assert (found.predicted_tokens_per_second, found.predicted_peak_gb) == (arithmetic, pytest.approx(2.6))
    start = session.run.events()[0]
    assert start["predicted_tokens_per_second"] == 0.5 * arithmetic
    assert start["basis"] == {"memory": "calibrated", "speed": "calibrated", "runs": 2}


def test_the_monitor_expects_what_earlier_runs_reached(
    ready: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = []

    class Monitor(loop.Monitor):
        def __init__(self, *arguments: Any, **options: Any):
            expected.append(options["predicted_tokens_per_second"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(loop, "Monitor", Monitor)
    session = ready("training.max_steps=1", calibration=Calibration(1, 0.25))
    session.train()
    assert expected == [0.25 * (session.plan.choice.tokens_per_second or 0)]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"card": None}, 30),
        ({"shape": None}, 30),
        ({}, LEAST_STEPS + 4),  # of which five are not timed
    ],
)
def test_what_is_no_measurement(ready: Callable[..., TrainingSession], changes: dict[str, Any], steps: int) -> None:
    ready(f"training.max_steps={steps}", **changes).train()
    assert not measured_path().exists()


def test_a_run_of_enough_steps(ready: Callable[..., TrainingSession]) -> None:
    ready(f"training.max_steps={LEAST_STEPS + 5}").train()
    assert [run.steps for run in read_measured()] == [LEAST_STEPS]


@pytest.mark.parametrize("given_up", [{"halvings": 1}, {"least_memory": True}])
def test_a_run_that_ran_out_of_memory_is_no_measurement(
    ready: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch, given_up: dict[str, Any]
) -> None:
    def gave_way(**arguments: Any) -> Any:
        state = loop.train_loop(**arguments)
        vars(state).update(given_up)
        return state

    monkeypatch.setattr(train, "train_loop", gave_way)
    session = ready()
    session.train()
    assert (read_measured(), session.run.metrics["steps"]) == ((), 30)


def test_nor_is_one_that_gave_up_its_graphs(
    ready: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which neither halves nor computes again."""

    def gave_way(**arguments: Any) -> Any:
        arguments["log"]({"event": "out_of_memory", "step": 3, "halvings": 0, "message": "without CUDA graphs"})
        return loop.train_loop(**arguments)

    monkeypatch.setattr(train, "train_loop", gave_way)
    ready().train()
    assert not measured_path().exists()


def peak_of(session: TrainingSession) -> float | None:
    session.train()
    (found,) = read_measured()
    return found.measured_peak_gb


def test_the_run_may_take_more_than_its_dry_step(
    ready: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "memory_in_use_gb", lambda device: 3.9)
    assert peak_of(ready()) == 3.9


def test_generated_answers_are_not_trainings_memory(
    ready: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "memory_in_use_gb", lambda device: 3.9)
    generate = ("data.eval_fraction=0.2", "evaluation.generate=true", "evaluation.max_new_tokens=1")
    assert peak_of(ready(*generate, "training.eval_every=100")) == 3.3


def test_the_drivers_memory_of_graphs_is_in_no_peak_of_pytorchs(
    ready: Callable[..., TrainingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "memory_in_use_gb", lambda device: 3.9)
    session = ready()
    memory = replace(session.plan.memory, pool_gb=1.0)
    session.plan = replace(session.plan, choice=replace(session.plan.choice, plan=memory))
    assert peak_of(session) == 3.9


@pytest.mark.parametrize(
    "dry", [None, {"predicted_gb": 3.0, "measured_gb": None}, {"predicted_gb": 2.9, "measured_gb": 3.3}]
)
def test_without_a_dry_step_of_this_plan_there_is_no_peak(
    ready: Callable[..., TrainingSession], dry: dict[str, Any] | None
) -> None:
    session = ready()
    session.calibration = [] if dry is None else [{"event": "calibration", "message": "-", **dry}]
    assert peak_of(session) is None


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_run(
    ready: Callable[..., TrainingSession], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ready()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file" / "cache"))
    result = session.train()
    assert (result.status, session.run.metrics["steps"]) == ("finished", 30)
    assert session.run.events()[-1]["event"] == "end"
    assert (session.run.adapter_path / "adapter_model.safetensors").is_file()
    message = (
        f"{tmp_path}/file/cache/measured.jsonl: cannot be written (Not a directory); later plans will not know what this "
        "run measured"
    )
    assert [each for each in warnings(session) if "measured" in each] == [message]


def test_the_plan_on_a_cpu_is_no_measurement(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(24, seed=1))
    settings = ["model.dtype=fp32", "model.device=cpu", "training.batch_size=8", "training.epochs=10"]
    session = train.start(
        load_config(None, settings, {"model.name": str(tiny_model), "data.path": str(data)}), tmp_path / "run"
    )
    assert isinstance(session.plan, RunPlan)
    session.train()
    assert not measured_path().exists()
    assert session.run.events()[0]["basis"] == {"memory": "arithmetic", "speed": None, "runs": 0}
