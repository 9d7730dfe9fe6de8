"""Going on: after a crash, a signal, a failure; what was done is not repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sweeps import QUESTIONS, RANKS, SHORT, copy_sweep, dying_at, losses, state_of

from tunesmith.errors import Interrupted, MachineError, RunError, VerificationError
from tunesmith.evaluation import subject as subjects
from tunesmith.runs import RunFolder
from tunesmith.workflows import sweep as workflow
from tunesmith.workflows.sweep import sweep


def test_a_killed_sweep_goes_on_where_it_was(
    config: Path, tmp_path: Path, no_reports: None, loads: list[str], sessions: list[str]
) -> None:
    over, out = ["adapter.r=2,3,4"], tmp_path / "sweep"
    settings = ["training.save_every=1", "training.max_steps=3"]
    with pytest.raises(KeyboardInterrupt):  # as SIGKILL leaves it: nothing of our own runs afterwards
        sweep(config, over, out=out, settings=settings, sink=dying_at(2, KeyboardInterrupt))
    assert sessions == ["r=2", "r=3"]
    assert [run["status"] for run in state_of(out)["runs"]] == ["finished", "running", "pending"]
    sessions.clear()
    said: list[str] = []
    result = sweep(config, over, out=out, settings=settings, announce=said.append)
    assert sessions == ["r=3", "r=4"]
    assert said[0] == "run 1 of 3, r=2: is finished already"
    assert [run["status"] for run in result["runs"]] == ["finished"] * 3
    resumed = RunFolder.open(out / "runs" / "r=3")
    assert [event["step"] for event in resumed.events() if event["event"] == "resume"] == [1]
    whole = sweep(config, over, out=tmp_path / "whole", settings=settings)
    for run in whole["runs"]:
        assert losses(out / "runs" / run["name"]) == losses(Path(run["path"]))
    assert [run["metric"] for run in result["runs"]] == [run["metric"] for run in whole["runs"]]
    assert len(loads) == 3


def test_a_finished_sweep_trains_and_loads_nothing(
    asked_sweep: Path, config: Path, questions: Path, tmp_path: Path, loads: list[str], sessions: list[str]
) -> None:
    out = copy_sweep(asked_sweep, tmp_path / "sweep")
    first, second = (sweep(config, RANKS, out=out, data=questions, settings=SHORT) for _ in range(2))
    assert (loads, sessions) == ([], [])
    assert second == first
    assert state_of(out) == second
    before = state_of(asked_sweep)
    assert before["base_loads"] == 1
    for key in ("metric", "stderr", "against_best", "wall_seconds", "values"):
        assert [run[key] for run in second["runs"]] == [run[key] for run in before["runs"]]


def test_a_run_that_lacks_only_its_evaluation_is_only_evaluated(
    asked_sweep: Path, config: Path, questions: Path, tmp_path: Path, sessions: list[str]
) -> None:
    out = copy_sweep(asked_sweep, tmp_path / "sweep")
    path = out / "runs" / "r=3" / "evaluations" / "test.json"
    kept = json.loads(path.read_text())
    path.unlink()
    result = sweep(config, RANKS, out=out, data=questions, settings=SHORT)
    assert sessions == []
    assert json.loads(path.read_text())["examples"] == kept["examples"]
    assert [run["metric"] for run in result["runs"]] == [run["metric"] for run in state_of(asked_sweep)["runs"]]


def test_an_interrupted_evaluation_goes_on(
    config: Path,
    questions: Path,
    tmp_path: Path,
    no_reports: None,
    monkeypatch: pytest.MonkeyPatch,
    sessions: list[str],
) -> None:
    """Stopped after the first four answers: the other eight are asked, and the result is that of an uninterrupted sweep."""
    asked: list[int] = []
    real = subjects.generate_greedy

    def counting(forward: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        asked.append(len(prompts))
        return real(forward, tokenizer, prompts, *rest)

    def stop(stage: str, done: int, total: int) -> None:
        if "answers" in stage and 4 <= done < total:
            raise KeyboardInterrupt

    monkeypatch.setattr(subjects, "generate_greedy", counting)
    settings = [*SHORT, "evaluation.batch_size=4"]
    arguments: dict[str, Any] = {"data": questions, "settings": settings}
    whole = sweep(config, ["adapter.r=2"], out=tmp_path / "whole", **arguments)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, ["adapter.r=2"], out=tmp_path / "a", progress=stop, **arguments)
    folder = tmp_path / "a" / "runs" / "r=2" / "evaluations"
    assert len(list(folder.glob(".unfinished-*.jsonl"))) == 1
    result = sweep(config, ["adapter.r=2"], out=tmp_path / "a", **arguments)
    different = len({row["messages"][0]["content"] for row in QUESTIONS})  # the same question is asked once
    assert asked == [different, different, different - 4]
    assert sessions == ["r=2", "r=2"]
    assert result["runs"][0]["metric"] == whole["runs"][0]["metric"]
    texts = [
        json.loads((out / "runs" / "r=2" / "evaluations" / "test.json").read_text())["examples"]
        for out in (tmp_path / "whole", tmp_path / "a")
    ]
    assert texts[0] == texts[1]
    assert not list(folder.glob(".unfinished-*"))


def test_what_another_process_finished_meanwhile_is_not_done_again(
    loss_sweep: Path, config: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one held the lock when this one looked, and was done when this one got it."""
    out = tmp_path / "sweep"
    real = workflow.locked

    def late(folder: Path, otherwise: str) -> Any:
        shutil.rmtree(folder)
        copy_sweep(loss_sweep, folder)
        return real(folder, otherwise)

    monkeypatch.setattr(workflow, "locked", late)
    said: list[str] = []
    result = sweep(config, ["optimizer.lr=1e-2,1e-6"], out=out, settings=SHORT, announce=said.append)
    assert loads == []
    assert said == [f"run {number} of 2, lr={rate}: is finished already" for number, rate in ((1, "1e-2"), (2, "1e-6"))]
    assert [(run["status"], run["error"]) for run in result["runs"]] == [("finished", None)] * 2


def test_a_signal_saves_the_run_and_says_how_to_go_on(
    config: Path, tmp_path: Path, no_reports: None, sessions: list[str]
) -> None:
    import os
    import signal

    starts = 0

    def sink(event: Any) -> None:
        nonlocal starts
        starts += event["event"] == "start"
        if starts == 2 and event["event"] == "step" and event["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "sweep"
    with pytest.raises(Interrupted) as caught:
        sweep(config, ["adapter.r=2,3,4"], out=out, sink=sink)
    assert str(caught.value) == (
        f"r=3 was stopped (run 2 of 3), its state saved in {out / 'runs' / 'r=3'}; the same `tunesmith sweep` command goes on"
    )
    assert [run["status"] for run in state_of(out)["runs"]] == ["finished", "interrupted", "pending"]
    sweep(config, ["adapter.r=2,3,4"], out=out)
    assert sessions == ["r=2", "r=3", "r=3", "r=4"]


def test_a_sweep_with_other_settings_is_refused_with_what_changed(
    loss_sweep: Path, config: Path, questions: Path, sessions: list[str]
) -> None:
    with pytest.raises(RunError) as caught:
        sweep(config, ["optimizer.lr=1e-2,1e-5"], out=loss_sweep, data=questions, rows=3)
    assert str(caught.value).startswith(
        f"{loss_sweep}: this sweep was begun with other settings: training.max_steps was 1, is null; "
        'over.optimizer.lr was ["1e-2", "1e-6"], is ["1e-2", "1e-5"]; data was null, is '
    )
    assert str(caught.value).endswith(
        '; metric was "eval_loss", is "accuracy". Give them as they were, or choose another --out'
    )
    assert sessions == []


def test_a_folder_of_something_else_is_refused(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(RunError) as caught:
        sweep(config, ["adapter.r=2,3"], out=out)
    assert str(caught.value) == f"{out} exists already and is no sweep (it has no sweep.json); choose another --out"
    assert [each.name for each in out.iterdir()] == ["thesis.tex"]


def test_a_failed_run_is_recorded_and_the_others_go_on(
    config: Path, tmp_path: Path, no_reports: None, failing: dict[str, Exception], loads: list[str]
) -> None:
    failing["r=3"] = VerificationError("the loss is NaN")
    out = tmp_path / "sweep"
    result = sweep(config, ["adapter.r=2,3,4"], out=out, settings=SHORT)
    assert [(run["status"], run["error"], run["exit_code"]) for run in result["runs"]] == [
        ("finished", None, None),
        ("failed", "the loss is NaN", 1),
        ("finished", None, None),
    ]
    assert result["runs"][1]["metric"] is None
    assert result["conclusions"][-1] == "run 2 (r=3) failed: the loss is NaN"
    assert len(loads) == 1
    failing.clear()
    again = sweep(config, ["adapter.r=2,3,4"], out=out, settings=SHORT)  # it would fail again
    assert [run["status"] for run in again["runs"]] == ["finished", "failed", "finished"]


def test_what_the_machine_could_not_is_tried_again(
    config: Path, tmp_path: Path, no_reports: None, failing: dict[str, Exception]
) -> None:
    failing["r=2"] = MachineError("the disk is full")
    out = tmp_path / "sweep"
    assert sweep(config, ["adapter.r=2,3"], out=out, settings=SHORT)["runs"][0]["error"] == "the disk is full"
    failing.clear()
    result = sweep(config, ["adapter.r=2,3"], out=out, settings=SHORT)
    assert [run["status"] for run in result["runs"]] == ["finished"] * 2
    assert losses(out / "runs" / "r=2")


def test_a_run_that_cannot_begin_is_a_failure_too_and_stays_one(
    config: Path, tmp_path: Path, no_reports: None, loads: list[str]
) -> None:
    over = ["adapter.target_modules=[q_projection],[q_proj]"]
    first, second = sweep(config, over, out=tmp_path / "sweep", settings=SHORT)["runs"]
    assert (first["status"], first["exit_code"], second["status"]) == ("failed", 2, "finished")
    assert first["error"].startswith("adapter.target_modules: q_projection matches no linear layer of this model")
    assert len(loads) == 2  # what a run that never began left of its base is not known
    said: list[str] = []
    again = sweep(config, over, out=tmp_path / "sweep", settings=SHORT, announce=said.append)
    assert len(loads) == 2
    assert said[0] == f"run 1 of 2, target_modules=q_projection: failed before: {first['error']}"
    assert again["runs"] == [first, second]


def test_a_failed_run_whose_folder_was_deleted_is_repeated(
    config: Path, tmp_path: Path, no_reports: None, failing: dict[str, Exception], sessions: list[str]
) -> None:
    failing["r=2"] = VerificationError("the loss is NaN")
    out = tmp_path / "sweep"
    assert sweep(config, ["adapter.r=2"], out=out, settings=SHORT)["runs"][0]["status"] == "failed"
    failing.clear()
    shutil.rmtree(out / "runs" / "r=2")
    assert sweep(config, ["adapter.r=2"], out=out, settings=SHORT)["runs"][0]["status"] == "finished"
    assert sessions == ["r=2", "r=2"]
