"""Comparing runs: what differs, which value is best, what is not comparable, and what a paired test says. From files alone."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import METADATA, METRICS, make_run, page_text, step_event

from tunesmith.errors import RunError
from tunesmith.evaluation.statistics import mcnemar
from tunesmith.runs import RunFolder
from tunesmith.workflows.compare import compare, lower_is_better

SHA = "5a" * 32
DATA = {"path": "train.jsonl", "rows": 1200, "sha256": "aa" * 32, "tokens_sha256": "bb" * 32}


def metadata(**changes: Any) -> dict[str, Any]:
    """A run's metadata.json with the keys that a comparison looks at."""
    return {
        **METADATA,
        "objective": "sft",
        "tokenizer": {"hash": "70" * 32},
        "chat_template": {"hash": "71" * 32},
        "data": DATA,
        **changes,
    }


def evaluation(right: list[bool], **changes: Any) -> dict[str, Any]:
    share = sum(right) / len(right)
    metrics = {"accuracy": {"value": share, "stderr": (share * (1 - share) / len(right)) ** 0.5}}
    rows = [{"line": line, "correct": correct, "answer": "", "expected": ""} for line, correct in enumerate(right, 1)]
    return {
        "task": "bins",
        "n": len(right),
        "metrics": metrics,
        "data_sha256": SHA,
        "created": "2026-11-20T10:00:00+0000",
        "examples": rows,
        **changes,
    }


def run(tmp_path: Path, name: str, **values: Any) -> Path:
    """A finished run, or (metrics=None) one that has not finished."""
    values = {"metrics": METRICS, "events": 5, "metadata": metadata(), **values}
    return make_run(tmp_path / name, **values).path


def row(result: dict[str, Any], metric: str, n: int | None = None) -> dict[str, Any]:
    (found,) = [each for each in result["metrics"] if each["metric"] == metric and n in (None, each["n"])]
    return found


# -- what differs -----------------------------------------------------------------------------------------------------


def test_only_settings_that_differ_and_change_something_are_named(tmp_path: Path) -> None:
    first = run(tmp_path, "a", settings={"adapter": {"r": 8}, "data": {"path": "/here/x.jsonl", "num_proc": 2}})
    second = run(
        tmp_path,
        "b",
        settings={
            "adapter": {"r": 16, "rank_pattern": {"q_proj": 4}},
            "data": {"path": "/there/x.jsonl", "num_proc": 4},
            "training": {"trackers": []},
        },
    )
    result = compare([first, second])
    assert result["settings"] == {
        "adapter.r": [8, 16],
        "adapter.rank_pattern": [{}, None],
        "adapter.rank_pattern.q_proj": [None, 4],
    }
    assert result["hashes"] == {}
    assert result["warnings"] == []


def test_other_data_and_another_base_are_said_plainly(tmp_path: Path) -> None:
    first = run(tmp_path, "a")
    other = metadata(data={**DATA, "sha256": "ab" * 32}, model={**METADATA["model"], "weight_hash": "9e" * 32})
    second = run(tmp_path, "b", metadata=other)
    result = compare([first, second])
    assert result["hashes"] == {
        "model.weight_hash": ["9f2c" * 16, "9e" * 32],
        "data.sha256": ["aa" * 32, "ab" * 32],
    }
    assert result["warnings"] == [
        "not the same base (a: 9f2c9f2c9f2c, b: 9e9e9e9e9e9e): metrics are not comparable",
        "not the same data (a: aaaaaaaaaaaa, b: abababababab): metrics are not comparable",
    ]


@pytest.mark.parametrize(
    ("settings", "changes", "why"),
    [
        ({}, {"objective": "dpo"}, "not the same objective"),
        ({}, {"data": {**DATA, "eval_sha256": "cc" * 32}}, "not the same held-out rows"),
        (
            {"data": {"eval_fraction": 0.1}, "training": {"seed": 2}},
            {},
            "not the same held-out rows (data.eval_fraction draws them from the training data, by the seed)",
        ),
        ({}, {"chat_template": {"hash": "72" * 32}}, "not the same chat template"),
        ({"data": {"train_on": "all"}}, {}, "not the same tokens count (data.train_on)"),
    ],
)
def test_losses_over_other_rows_or_tokens_have_no_best(
    tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    fraction = {"data": {"eval_fraction": 0.1}} if "eval_fraction" in str(settings) else {}
    first = run(tmp_path, "a", settings=fraction)
    better = {**METRICS, "eval_loss": 0.1, "wall_seconds": 10.0}
    second = run(tmp_path, "b", settings=settings, metadata=metadata(**changes), metrics=better)
    result = compare([first, second])
    assert f"{why}: eval_loss is not comparable, and none is marked" in result["warnings"]
    assert row(result, "eval_loss")["best"] == []
    assert row(result, "wall_seconds")["best"] == [1]


# -- values and the best of them --------------------------------------------------------------------------------------


def test_the_best_of_each_row(tmp_path: Path) -> None:
    first = run(tmp_path, "a")
    second = run(
        tmp_path,
        "b",
        metrics={
            **METRICS,
            "eval_loss": 0.5679,
            "train_loss": 0.4,
            "wall_seconds": 192.41,  # the same to three digits
            "tokens_per_second": 20000.0,
            "peak_memory_gb": 4.0,
            "trainable_parameters": 1000,
        },
    )
    for path, size in ((first, 3 * 2**20), (second, 2**20)):
        (path / "adapter").mkdir()
        (path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(size))
    result = compare([first, second])
    assert {each["metric"]: each["best"] for each in result["metrics"]} == {
        "eval_loss": [0],
        "train_loss": [1],
        "wall_seconds": [],
        "tokens_per_second": [1],
        "peak_memory_gb": [1],
        "trainable_parameters": [],
        "artifact_mb": [1],
    }
    assert row(result, "artifact_mb")["values"] == [3.0, 1.0]
    assert row(result, "tokens_per_second")["values"] == [12345.6, 20000.0]


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("eval_loss", True), ("perplexity", True), ("accuracy", False), ("f1", False), ("wall_seconds", True)],
)
def test_which_way_is_better(metric: str, lower: bool) -> None:
    assert lower_is_better(metric) is lower


def test_an_unfinished_run_shows_what_it_has_so_far_and_is_never_best(tmp_path: Path) -> None:
    finished = run(tmp_path, "a")
    now = 1_800_000_000.0
    steps = [step_event(step, 4, now, loss=0.01 * step, memory_gb=1.5) for step in range(1, 5)]
    events = [
        {"event": "start", "time": now - 2, "trainable_parameters": 77},
        *steps,
        {"event": "eval", "step": 4, "metrics": {"eval_loss": 0.001}, "time": now},
        {"event": "interrupted", "step": 4, "time": now},
    ]
    dead = run(tmp_path, "b", metrics=None, events=events)
    result = compare([finished, dead])
    assert [each["status"] for each in result["runs"]] == ["finished", "interrupted"]
    assert {each["metric"]: each["values"][1] for each in result["metrics"]} == {
        "eval_loss": 0.001,
        "train_loss": 0.04,
        "wall_seconds": 2.0,
        "tokens_per_second": 8192.0,
        "peak_memory_gb": 1.5,
        "trainable_parameters": 77,
    }
    assert all(each["best"] == [] for each in result["metrics"])
    assert result["warnings"] == ["b is interrupted: its values are those so far, and none is marked"]


def test_a_copied_run_with_a_cut_last_line_is_read(tmp_path: Path) -> None:
    first, second = run(tmp_path, "a", metrics=None), run(tmp_path, "b")
    shutil.copytree(first, tmp_path / "copy")
    with (tmp_path / "copy" / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert (
        compare([tmp_path / "copy", second])["metrics"][1]["values"] == compare([first, second])["metrics"][1]["values"]
    )


# -- evaluations ------------------------------------------------------------------------------------------------------


def test_the_newest_evaluation_of_each_task_and_data_counts(tmp_path: Path) -> None:
    old = evaluation([True] * 4, created="2026-11-19T10:00:00+0000")
    new = evaluation([True, False, False, False])
    first = run(tmp_path, "a", evaluations={"bins-2.json": old, "bins.json": new})
    second = run(tmp_path, "b", evaluations={"bins.json": evaluation([True, True, False, False])})
    result = compare([first, second])
    found = row(result, "accuracy")
    assert (found["task"], found["n"], found["values"], found["best"]) == ("bins", 4, [0.25, 0.5], [1])
    assert found["stderr"] == [pytest.approx((0.25 * 0.75 / 4) ** 0.5), 0.25]


def test_other_rows_are_another_line_of_the_table(tmp_path: Path) -> None:
    first = run(tmp_path, "a", evaluations={"bins.json": evaluation([True] * 4)})
    second = run(tmp_path, "b", evaluations={"bins.json": evaluation([True, False])})
    third = run(tmp_path, "c", evaluations={"bins.json": evaluation([False] * 4, data_sha256="5b" * 32)})
    result = compare([first, second, third])
    assert [each["values"] for each in result["metrics"] if each["metric"] == "accuracy"] == [
        [1.0, None, None],
        [None, 0.5, None],
        [None, None, 0.0],
    ]
    assert result["comparisons"] == []


def test_answers_to_the_same_rows_are_compared_pairwise_with_the_first_run_that_has_them(tmp_path: Path) -> None:
    bare = run(tmp_path, "bare")
    first = run(tmp_path, "a", evaluations={"bins.json": evaluation([False] * 9 + [True] * 11)})
    second = run(tmp_path, "b", evaluations={"bins.json": evaluation([True] * 18 + [False] * 2)})
    (found,) = compare([bare, first, second])["comparisons"]
    assert (found["run"], found["against"], found["n"], found["test"]) == ("b", "a", 20, "McNemar")
    assert found["difference"] == pytest.approx(7 / 20)
    assert found["p"] == pytest.approx(mcnemar(9, 2))
    assert found["verdict"] == "unclear"
    clear = run(tmp_path, "c", evaluations={"bins.json": evaluation([True] * 20)})
    assert compare([first, clear])["comparisons"][0]["verdict"] == "better"
    assert compare([clear, first])["comparisons"][0]["verdict"] == "worse"


def test_other_lines_are_not_the_same_rows(tmp_path: Path) -> None:
    moved = evaluation([True] * 4)
    for each in moved["examples"]:
        each["line"] += 1
    first = run(tmp_path, "a", evaluations={"bins.json": evaluation([False] * 4)})
    second = run(tmp_path, "b", evaluations={"bins.json": moved})
    assert compare([first, second])["comparisons"] == []


def test_a_damaged_evaluation_is_named_and_left_out(tmp_path: Path) -> None:
    first = run(tmp_path, "a", evaluations={"bins.json": evaluation([True] * 4)})
    second = run(tmp_path, "b", evaluations={"bins.json": evaluation([True] * 4)})
    (second / "evaluations" / "broken.json").write_text("{")
    (warning,) = compare([first, second])["warnings"]
    assert warning.startswith(f"{second / 'evaluations' / 'broken.json'} cannot be read (Expecting property name")
    assert warning.endswith("it is left out")


# -- names and refusals -----------------------------------------------------------------------------------------------


def test_names_have_as_many_parents_as_tell_them_apart(tmp_path: Path) -> None:
    paths = [run(tmp_path / parent, "first") for parent in ("one", "two")]
    assert [each["name"] for each in compare(paths)["runs"]] == ["one/first", "two/first"]


def test_what_is_no_comparison_is_refused(tmp_path: Path) -> None:
    first = run(tmp_path, "a")
    (tmp_path / "none").mkdir()
    for runs, problem in (
        ([first], "one run is no comparison: name two or more run folders"),
        ([first, tmp_path / "none"], f"{tmp_path / 'none'}: not a run folder (it has no config.yaml)"),
        ([first, first.parent / "." / "a"], f"{first} is named twice: a run is compared with others"),
    ):
        with pytest.raises(RunError) as caught:
            compare(runs)
        assert str(caught.value) == problem


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_has_tables_curves_and_scatter_plots(tmp_path: Path) -> None:
    first = run(
        tmp_path, "a", settings={"adapter": {"r": 8}}, evaluations={"bins.json": evaluation([True] * 3 + [False])}
    )
    quick = {**METRICS, "wall_seconds": 60.0}
    second = run(
        tmp_path,
        "b<i>",
        metrics=quick,
        settings={"adapter": {"r": 4}},
        evaluations={"bins.json": evaluation([False] * 4)},
    )
    for path, size in ((first, 3 * 2**20), (second, 2**20)):
        (path / "adapter").mkdir()
        (path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(size))
    target = tmp_path / "page.html"
    result = compare([first, second], target)
    assert result["html"] == str(target)
    page = target.read_text()
    text = page_text(page)
    assert "bins: accuracy 75.0% ± 21.7 ★ 0.0% ± 0.0" in text
    assert "time 3 min 12 s 1 min 0 s ★" in text or "time 3 min 12 s 1 min ★" in text
    assert "adapter.r 8 4" in text
    assert "b<i>" in text
    assert "<i>, " not in page
    titles = re.findall(r'<h3 id="[\w-]+-title">(.*?)</h3>', page)
    assert titles == ["Training loss", "bins: accuracy against time", "bins: accuracy against size"]
    assert page.count("<svg") == 3
    assert "<script" not in page
    legend = [html.unescape(each) for each in re.findall(r"</i>(.*?)</span>", page)]
    assert legend == ["a", "b<i>", "best: 1 a", "best: 1 a"]


def test_the_curves_are_the_runs_losses(tmp_path: Path) -> None:
    from tunesmith.report.comparison_plots import loss_curves

    low = [{"event": "step", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    high = [{"event": "step", "step": step, "loss": 3.0} for step in (1, 2, 3)]
    (both,) = loss_curves([("low", low), ("high", high), ("empty", [])])
    assert [key.label for key in both.legend] == ["low", "high"]
    levels = []
    for key in both.legend:  # a flat line at 3 is drawn above one at 1: an SVG's y grows downwards
        path = re.search(rf'<path d="M [\d.]+ ([\d.]+) [^"]*"[^>]*stroke: {key.colour}', both.svg)
        assert path is not None
        levels.append(float(path[1]))
    assert levels[0] > levels[1] + 100
    assert loss_curves([("empty", [])]) == []


def test_a_real_run_has_all_of_it(lora_run: Path, full_run: Path) -> None:
    result = compare([lora_run, full_run])
    assert result["settings"]["method"] == ["lora", "full"]
    lora, full = (RunFolder.open(path) for path in (lora_run, full_run))
    assert row(result, "trainable_parameters")["values"] == [
        lora.metrics["trainable_parameters"],
        full.metrics["trainable_parameters"],
    ]
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) / 2**20 for folder in (lora.adapter_path, full.model_path)]
    assert row(result, "artifact_mb")["values"] == sizes
    assert row(result, "artifact_mb")["best"] == [0]
    assert json.loads(json.dumps(result)) == result
