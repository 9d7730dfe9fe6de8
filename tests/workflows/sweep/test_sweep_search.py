"""Searching with Optuna instead of trying a grid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sweeps import SHORT, copy_sweep, dying_at, state_of

from tunesmith.errors import MachineError, VerificationError
from tunesmith.workflows import sweep_runs
from tunesmith.workflows.sweep import sweep
from tunesmith.workflows.sweep_points import parse_axes
from tunesmith.workflows.sweep_search import Search

OVER = ["optimizer.lr=1e-4..1e-1", "adapter.r=2..8", "adapter.alpha=4,8"]


@pytest.fixture(scope="module")
def searched(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trials."""
    folder = tmp_path_factory.mktemp("searched") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_runs, "write_report", lambda run: run.path / "report.html")
        sweep(config, OVER, out=folder, settings=SHORT, trials=4)
    return folder


def test_a_search_proposes_within_its_ranges(searched: Path) -> None:
    result = state_of(searched)
    values = [run["values"] for run in result["runs"]]
    assert len({json.dumps(each) for each in values}) == 4
    assert all(1e-4 <= each["optimizer.lr"] <= 1e-1 for each in values)
    assert all(each["adapter.r"] in range(2, 9) and each["adapter.alpha"] in (4, 8) for each in values)
    assert [run["name"][:4] for run in result["runs"]] == ["001_", "002_", "003_", "004_"]
    best = min(result["runs"], key=lambda run: run["metric"])
    assert result["best"] == best["name"]


def test_a_killed_search_goes_on_with_what_it_would_have_proposed(
    searched: Path, config: Path, tmp_path: Path, no_reports: None, sessions: list[str]
) -> None:
    out = tmp_path / "a"
    whole = state_of(searched)["runs"]
    with pytest.raises(KeyboardInterrupt):
        sweep(config, OVER, out=out, settings=SHORT, trials=3, sink=dying_at(1, KeyboardInterrupt))
    result = sweep(config, OVER, out=out, settings=SHORT, trials=3)
    names = [run["name"] for run in whole]
    assert sessions == [names[0], names[1], names[1], names[2]]
    assert [(run["name"], run["metric"]) for run in result["runs"]] == [
        (run["name"], run["metric"]) for run in whole[:3]
    ]
    more = sweep(config, OVER, out=out, settings=SHORT, trials=4)  # a search can be made longer
    assert [run["name"] for run in more["runs"]] == names
    assert more["runs"][3]["metric"] == whole[3]["metric"]


def test_what_the_machine_could_not_is_tried_again_and_told(
    searched: Path, config: Path, tmp_path: Path, no_reports: None, failing: dict[str, Exception], sessions: list[str]
) -> None:
    """Neither is the failure a result for the search, nor is the run left out when the disk has room again."""
    out = tmp_path / "a"
    whole = state_of(searched)["runs"]
    failing[whole[1]["name"]] = MachineError("the disk is full")
    first = sweep(config, OVER, out=out, settings=SHORT, trials=2)
    assert [run["status"] for run in first["runs"]] == ["finished", "failed"]
    assert [number for number, _ in search_of(out).done()] == [0]
    failing.clear()
    sessions.clear()
    again = sweep(config, OVER, out=out, settings=SHORT, trials=2)
    assert sessions == [whole[1]["name"]]
    assert [(run["status"], run["metric"]) for run in again["runs"]] == [
        ("finished", run["metric"]) for run in whole[:2]
    ]
    assert [trial.value for trial in search_of(out).study.trials] == [run["metric"] for run in whole[:2]]


def test_a_trial_whose_folder_was_deleted_is_trained_again(
    searched: Path, config: Path, tmp_path: Path, no_reports: None, sessions: list[str]
) -> None:
    out = copy_sweep(searched, tmp_path / "a")
    whole = state_of(searched)["runs"]
    shutil.rmtree(out / "runs" / whole[2]["name"])
    result = sweep(config, OVER, out=out, settings=SHORT, trials=4)
    assert sessions == [whole[2]["name"]]
    assert [run["metric"] for run in result["runs"]] == [run["metric"] for run in whole]


def search_of(folder: Path) -> Search:
    """The study of a sweep over OVER."""
    return Search(folder, parse_axes(OVER, search=True), True)


def test_a_search_learns_from_what_it_is_told(tmp_path: Path) -> None:
    axes = parse_axes(["optimizer.lr=1e-5..1e-1"], search=True)
    found: dict[bool, list[float]] = {}
    for lower in (True, False):
        (tmp_path / str(lower)).mkdir()
        search = Search(tmp_path / str(lower), axes, lower)
        for _ in range(40):
            number, values = search.next()
            search.tell(number, values["optimizer.lr"])  # the rate itself is the metric
        found[lower] = [values["optimizer.lr"] for _, values in search.done()][20:]
    assert sorted(found[True])[10] < 1e-4
    assert sorted(found[False])[10] > 1e-2


def test_a_point_that_is_proposed_again_is_not_trained_again(
    config: Path, tmp_path: Path, no_reports: None, sessions: list[str]
) -> None:
    result = sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", settings=SHORT, trials=6)
    assert len(sessions) == len(result["runs"]) == 2


def test_a_failed_trial_is_told_as_one(config: Path, tmp_path: Path, failing: dict[str, Exception]) -> None:
    import optuna

    failing["001_r=3"] = failing["001_r=2"] = VerificationError("the loss is NaN")
    sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", settings=SHORT, trials=1)
    (trial,) = Search(tmp_path / "a", parse_axes(["adapter.r=2,3"]), True).study.trials
    assert trial.state == optuna.trial.TrialState.FAIL


def test_a_search_without_optuna_says_what_to_install(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else real(name, *rest)
    )
    with pytest.raises(MachineError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", trials=2)
    assert str(caught.value) == "a search (--trials) needs Optuna; install it with: pip install 'tunesmith[search]'"
