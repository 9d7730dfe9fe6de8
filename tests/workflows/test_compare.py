"""Comparing runs: what differs, which value is best, what is not comparable, and what a paired test says. From files alone."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import METADATA, METRICS, make_run, page_text, step_event

from tunesmith.errors import RunError
from tunesmith.evaluation.labels import Labels
from tunesmith.evaluation.metrics import normalize
from tunesmith.evaluation.statistics import mcnemar
from tunesmith.evaluation.tasks import Task, score_answers
from tunesmith.report.comparison import comparison_tables
from tunesmith.report.comparison_plots import Point, scatter_plots
from tunesmith.runs import RunFolder
from tunesmith.types import Generation
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
    rows = [
        {"line": line, "prompt": "?", "expected": "glass", "answer": "Glass" if correct else "tin", "correct": correct}
        for line, correct in enumerate(right, 1)
    ]
    return {
        "task": "bins",
        "task_kind": "label",
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
        ({}, {"tokenizer": {"hash": "73" * 32}}, "not the same tokenizer"),
        (
            {},
            {"data": {**DATA, "eval_rows": 7}},
            "not the same held-out rows (data.max_seq_length and data.overlong say which are left)",
        ),
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


def test_memory_on_a_cpu_has_no_best_and_costs_are_shown_to_three_digits(tmp_path: Path) -> None:
    costs = (
        {"peak_memory_gb": 5.3125, "tokens_per_second": 12345.6},
        {"peak_memory_gb": 0.04, "tokens_per_second": 999.0},
    )
    hardware = {"device": "cpu", "name": "CPU"}
    for folder, facts in (("gpu", metadata()), ("cpu", metadata(hardware=hardware))):
        runs = [
            run(tmp_path / folder, name, metrics={**METRICS, **cost}, metadata=meta)
            for name, cost, meta in zip("ab", costs, (metadata(), facts), strict=True)
        ]
        result = compare(runs)
        assert row(result, "peak_memory_gb")["best"] == ([] if folder == "cpu" else [1])
        assert row(result, "tokens_per_second")["best"] == [0]
        table = {label: [cell.text for cell in cells] for label, cells in comparison_tables(result)[0].rows}
        assert table["peak GB"] == ["5.31", "0.0400"]
        assert table["tokens/s"] == ["12,300", "999"]


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


def of_texts(losses: list[float], sizes: bool = False, **changes: Any) -> dict[str, Any]:
    """An evaluation of texts of 10, 20, 30, ... tokens, with 0.8 bytes a token if their sizes are kept."""
    rows = [
        {"line": number, "text": f"text {number}", "tokens": 10 * number, "loss": loss}
        | ({"bytes": 8 * number} if sizes else {})
        for number, loss in enumerate(losses, 1)
    ]
    loss = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    bits = 1.25 * loss / math.log(2) if sizes else 1.25 * loss
    metrics = {
        name: {"value": value, "stderr": 0.5, "n": len(rows), "higher_is_better": False, "share": False}
        for name, value in (("loss", loss), ("perplexity", math.exp(loss)), ("bits_per_byte", bits))
    }
    return (
        evaluation([True], task="texts", task_kind="perplexity", n=len(rows), metrics=metrics, examples=rows) | changes
    )


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ({"max_new_tokens": 64}, {"settings": {"max_new_tokens": 4}}, "max_new_tokens 4, not 64"),
        (
            {},
            {"task_kind": "regex", "settings": {"pattern": "glass"}},
            "task_kind regex, not label; pattern glass, not null",
        ),
        ({}, {"n": 3, "sample_seed": 0}, "n 3, not 4; sample_seed 0, not null"),
        ({"json_schema": "a.json"}, {"settings": {"json_schema": "b.json"}}, "json_schema b.json, not a.json"),
        ({}, {"settings": {"metrics": ["m.py:size"]}}, 'metrics ["m.py:size"], not null'),
    ],
)
def test_evaluations_with_other_settings_are_not_compared(
    tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    first = run(tmp_path, "a", evaluations={"bins.json": evaluation([True] * 4, settings=settings)})
    second = run(tmp_path, "b", evaluations={"bins.json": evaluation([False] * 4, **changes)})
    result = compare([first, second])
    assert result["comparisons"] == []
    assert result["warnings"] == [
        f"b was evaluated on bins in another way than a ({said}): their answers are not compared"
    ]
    values = [each["values"] for each in result["metrics"] if each["metric"] == "accuracy"]
    assert sorted(values, key=str) == [[1.0, None], [None, 0.0]]
    names = [label for label, _ in comparison_tables(result)[0].rows if "accuracy" in label]
    assert len(set(names)) == 2  # each says how it was asked


def test_a_later_evaluation_in_another_way_hides_none(tmp_path: Path) -> None:
    """A full evaluation stays beside a later one on fewer rows, and one with another limit."""
    later = {"created": "2026-11-25T10:00:00+0000"}
    evaluations = {
        "bins.json": evaluation([True] * 4),
        "bins-2.json": evaluation([False] * 2, sample_seed=0, **later),
        "bins-3.json": evaluation([False] * 4, settings={"max_new_tokens": 1}, **later),
    }
    first = run(tmp_path, "a", evaluations=evaluations)
    second = run(tmp_path, "b", evaluations={"bins.json": evaluation([True] * 3 + [False])})
    result = compare([first, second])
    assert [(each["n"], each["values"]) for each in result["metrics"] if each["metric"] == "accuracy"] == [
        (4, [0.0, None]),
        (4, [1.0, 0.75]),
        (2, [0.0, None]),
    ]
    assert [(each["difference"], each["n"]) for each in result["comparisons"]] == [(-0.25, 4)]
    assert result["warnings"] == []
    named = [label for label, _ in comparison_tables(result)[0].rows if "accuracy" in label]
    assert named == [
        "bins: accuracy (4 rows) (max_new_tokens 1)",
        "bins: accuracy (4 rows) (max_new_tokens null)",
        "bins: accuracy (2 rows) (max_new_tokens null)",
    ]


def test_how_long_answers_may_be_changes_no_choice(tmp_path: Path) -> None:
    choices = [
        evaluation([right] * 6, task_kind="choice", settings={"max_new_tokens": limit})
        for right, limit in ((True, 4), (False, 64))
    ]
    runs = [run(tmp_path, name, evaluations={"bins.json": one}) for name, one in zip("ab", choices, strict=True)]
    (found,) = compare(runs)["comparisons"]
    assert (found["difference"], found["verdict"]) == (-1.0, "worse")


def test_the_losses_of_texts_are_compared_text_by_text(tmp_path: Path) -> None:
    """Texts differ far more than the runs do: errors of two measurements would hide what each text says."""
    before = [1.0, 2.0, 5.0, 3.0, 0.5, 4.0, 2.5, 1.5]
    first = run(tmp_path, "a", evaluations={"texts.json": of_texts(before)})
    second = run(tmp_path, "b", evaluations={"texts.json": of_texts([loss - 0.01 for loss in before])})
    found = {each["metric"]: each for each in compare([first, second])["comparisons"]}
    assert found["loss"]["difference"] == pytest.approx(-0.01)
    assert found["loss"]["stderr"] == pytest.approx(0, abs=1e-9)
    assert found["loss"]["p"] == pytest.approx(2 / 2**8)  # of all swaps, those of none and of all are as far apart
    assert [found[name]["verdict"] for name in ("loss", "perplexity")] == ["better", "better"]
    assert found["loss"]["share"] is False
    no_test = {key: found["bits_per_byte"][key] for key in ("stderr", "p", "test", "verdict")}
    assert no_test == {"stderr": None, "p": None, "test": None, "verdict": "unclear"}
    assert found["bits_per_byte"]["difference"] == pytest.approx(-0.0125)


def test_bits_per_byte_is_compared_where_the_sizes_were_kept(tmp_path: Path) -> None:
    before = [1.0, 2.0, 5.0, 3.0, 0.5, 4.0, 2.5, 1.5]
    runs = [
        run(tmp_path, name, evaluations={"texts.json": of_texts([loss - less for loss in before], sizes=True)})
        for name, less in (("a", 0.0), ("b", 0.01))
    ]
    found = {each["metric"]: each for each in compare(runs)["comparisons"]}["bits_per_byte"]
    assert found["difference"] == pytest.approx(-0.0125 / math.log(2))
    assert (found["p"], found["verdict"]) == (pytest.approx(2 / 2**8), "better")


def test_every_metric_that_the_rows_give_again_has_a_test(tmp_path: Path) -> None:
    """Of a sample, an answer may name a class of the file that is expected of no row: it counts as answered."""
    answers = {
        "a": ["tin", "tin", "tin", "glass", "paper", "tin"],
        "b": ["tin", "tin", "glass", "glass", "glass", "what"],
    }
    expected = ["tin", "tin", "glass", "glass", "glass", "tin"]
    runs = []
    for name, given in answers.items():
        rows = [
            Generation("?", right, answer, right == answer, line)
            for line, (right, answer) in enumerate(zip(expected, given, strict=True), 1)
        ]
        task = Task("label", "", ("tin", "glass", "paper"))
        metrics = {metric: one.measured().as_json() for metric, one in score_answers(task, rows).items()}
        metrics["retain"] = {"value": 0.5 if name == "a" else 0.75, "stderr": 0.01, "n": 80, "share": True}
        made = evaluation(
            [True] * 6,
            metrics=metrics,
            classes={"tuned": Labels(rows, task.answers, normalize).report(), "baseline": None},
            examples=[
                {"line": r.line, "prompt": "?", "expected": r.expected, "answer": r.answer, "correct": r.correct}
                for r in rows
            ],
        )
        runs.append(run(tmp_path, name, evaluations={"bins.json": made}))
    found = {each["metric"]: each for each in compare(runs)["comparisons"]}
    assert {metric: each["test"] for metric, each in found.items()} == {
        "accuracy": "McNemar",
        "exact_match": "McNemar",
        "macro_f1": "randomization",
        "micro_f1": "randomization",
        "retain": None,
    }
    # a: 4 right of 6 answers that are classes; b: 5 right of 5 and one that is none
    assert found["micro_f1"]["difference"] == pytest.approx(2 * 5 / (5 + 6) - 2 * 4 / (6 + 6))
    assert 0 < found["micro_f1"]["p"] < 1
    assert (found["retain"]["difference"], found["retain"]["n"], found["retain"]["share"]) == (0.25, 80, True)


def test_of_free_texts_what_is_kept_of_each_row_has_a_test(tmp_path: Path) -> None:
    runs = []
    for name, overlap in (("a", [0.25, 0.5, 0.0, 0.25, 0.5, 0.0]), ("b", [0.5, 0.75, 0.25, 0.5, 0.75, 0.25])):
        rows = [
            {
                "line": n,
                "prompt": "?",
                "expected": "to the glass bin",
                "answer": "a bin",
                "correct": False,
                "rougeL": value,
                "rouge2": value / 2,
                "chrf": 100 * value,
            }
            for n, value in enumerate(overlap, 1)
        ]
        metrics = {
            "exact_match": {"value": 0.0, "stderr": 0.0, "n": 6, "share": True},
            "rougeL": {"value": sum(overlap) / 6, "stderr": 0.1, "n": 6, "share": True},
            "rouge2": {"value": sum(overlap) / 12, "stderr": 0.1, "n": 6, "share": True},
            "chrf": {"value": 100 * sum(overlap) / 6, "stderr": 9.0, "n": 6, "share": False},
            "bleu": {"value": 4.0, "stderr": 1.0, "n": 6, "share": False},
        }
        made = evaluation([True] * 6, task_kind="text", metrics=metrics, examples=rows)
        runs.append(run(tmp_path, name, evaluations={"bins.json": made}))
    found = {each["metric"]: each for each in compare(runs)["comparisons"]}
    assert {name: each["test"] for name, each in found.items()} == {
        "exact_match": "McNemar",
        "rougeL": "sign flips",
        "rouge2": "sign flips",
        "chrf": "sign flips",
        "bleu": None,
    }
    assert (found["rougeL"]["difference"], found["rougeL"]["p"]) == (0.25, 2 / 2**6)
    assert (found["chrf"]["difference"], found["chrf"]["share"]) == (25.0, False)


def test_a_value_that_the_rows_do_not_give_has_no_test(tmp_path: Path) -> None:
    other = evaluation([True] * 8)
    other["metrics"]["accuracy"]["value"] = 0.9  # by another rule than the rows' `correct`
    runs = [
        run(tmp_path, name, evaluations={"b.json": one}) for name, one in (("a", evaluation([False] * 8)), ("b", other))
    ]
    (found,) = compare(runs)["comparisons"]
    assert (found["difference"], found["p"]) == (0.9, None)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n": [1]}, "its `n` is [1], which should be a whole number"),
        ({"task": {}}, "its `task` is {}, which should be a text"),
        ({"settings": []}, "its `settings` is [], which should be an object"),
        ({"sample_seed": True}, "its `sample_seed` is true, which should be a whole number"),
        ({"metrics": {"accuracy": 0.5}}, "its metric accuracy is 0.5, which should be an object"),
        ({"metrics": None}, "it has no `metrics`"),
    ],
)
def test_an_odd_evaluation_is_named_and_left_out(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    first = run(tmp_path, "a", evaluations={"bins.json": evaluation([True] * 4)})
    second = run(tmp_path, "b", evaluations={"bins.json": evaluation([True] * 4) | changes})
    result = compare([first, second])
    assert result["warnings"] == [f"{second / 'evaluations' / 'bins.json'} cannot be read ({problem}); it is left out"]
    assert row(result, "accuracy")["values"] == [1.0, None]


def test_odd_rows_give_no_test(tmp_path: Path) -> None:
    for examples in ([1, 2], [{"line": 1}, {"line": 2, "correct": "yes"}], [{"correct": True, "answer": 5}] * 2):
        odd = evaluation([True] * 2, examples=examples)
        folder = tmp_path / str(len(str(examples)))
        runs = [run(folder, name, evaluations={"bins.json": odd}) for name in "ab"]
        (found,) = compare(runs)["comparisons"]
        assert (found["difference"], found["p"]) == (0.0, None)


def test_a_metric_says_which_way_is_better_and_whether_it_is_a_share(tmp_path: Path) -> None:
    def over_refusal(value: float) -> dict[str, Any]:
        metrics = {
            "over_refusal": {"value": value, "stderr": 0.1, "n": 9, "higher_is_better": False, "share": True},
            "letters": {"value": value, "stderr": 0.1, "n": 9, "higher_is_better": True, "share": False},
        }
        return evaluation([True], metrics=metrics)

    runs = [run(tmp_path, n, evaluations={"bins.json": over_refusal(v)}) for n, v in (("a", 0.25), ("b", 0.5))]
    result = compare(runs)
    assert (row(result, "over_refusal")["best"], row(result, "letters")["best"]) == ([0], [1])
    assert (row(result, "over_refusal")["share"], row(result, "letters")["share"]) == (True, False)
    table = {label: [cell.text for cell in cells] for label, cells in comparison_tables(result)[0].rows}
    assert table["bins: over_refusal"] == ["25.0% ± 10.0", "50.0% ± 10.0"]
    assert table["bins: letters"] == ["0.2500 ± 0.10", "0.5000 ± 0.10"]


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
    second = run(tmp_path, "b")
    with pytest.raises(RunError) as caught:
        compare([first, second], tmp_path / "absent" / "x.html")
    assert str(caught.value) == (
        f"{tmp_path / 'absent' / 'x.html'}: there is no folder {tmp_path / 'absent'} for the page; make it, or choose another --html"
    )
    with pytest.raises(RunError, match="the page is a file, and this is a folder"):
        compare([first, second], tmp_path)


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


def test_points_have_error_bars_as_high_as_the_errors() -> None:
    def heights(first: float | None, second: float | None) -> list[float]:
        errors = zip((0.2, 0.4), (first, second), strict=True)
        points = [Point(str(n), value, error, 1.0 + n, None) for n, (value, error) in enumerate(errors)]
        (plot,) = scatter_plots("accuracy", points)
        assert ("Bars are one standard error" in plot.caption) == bool(first or second)
        bars = re.findall(r'id="[\w-]*LineCollection_\d+">\s*<path d="M [\d.]+ ([\d.]+)\s*L [\d.]+ ([\d.]+)', plot.svg)
        return [abs(float(top) - float(bottom)) for top, bottom in bars]

    assert heights(None, None) == []
    both = heights(0.05, 0.1)
    assert both[0] > 10
    assert both[1] == pytest.approx(2 * both[0], rel=0.01)
    assert len(heights(0.05, None)) == 1


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
