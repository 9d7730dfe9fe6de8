"""`tunesmith compare` and `tunesmith sweep` from end to end: tables, exit codes, one JSON object with --json."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from command_line import Result, tunesmith
from tiny import chat_rows, write_jsonl
from trained import copy_run, tiny_run
from tunesmith.runs import RunFolder
from tunesmith.workflows import sweep_runs

NUMBER = {"type": ["number", "null"]}
TEXT = {"type": ["string", "null"]}
DIFFERENCE = {
    "type": ["object", "null"],
    "required": ["difference", "stderr", "p", "test", "verdict"],
    "properties": {"difference": NUMBER, "p": NUMBER, "verdict": {"enum": ["better", "worse", "unclear"]}},
}

COMPARISON = {
    "type": "object",
    "required": ["runs", "settings", "hashes", "warnings", "metrics", "comparisons"],
    "properties": {
        "runs": {"type": "array", "items": {"required": ["name", "path", "status", "note"]}},
        "settings": {"additionalProperties": {"type": "array"}},
        "hashes": {"additionalProperties": {"type": "array", "items": TEXT}},
        "warnings": {"type": "array", "items": {"type": "string"}},
        "metrics": {
            "type": "array",
            "items": {
                "required": [
                    "metric",
                    "task",
                    "data_sha256",
                    "n",
                    "setup",
                    "values",
                    "stderr",
                    "lower_is_better",
                    "best",
                ],
                "properties": {
                    "values": {"type": "array", "items": NUMBER},
                    "best": {"type": "array", "items": {"type": "integer"}},
                },
            },
        },
        "comparisons": {
            "type": "array",
            "items": {"allOf": [DIFFERENCE, {"required": ["run", "against", "n", "share"]}]},
        },
    },
}

SWEEP = {
    "type": "object",
    "required": [
        "sweep", "metric", "over", "runs", "best", "within_error", "cheapest", "conclusions", "warnings", "html",
        "base_loads", "tied", "no_best",
    ],
    "properties": {
        "runs": {
            "type": "array",
            "items": {
                "required": [
                    "name", "path", "values", "status", "error", "metric", "stderr", "wall_seconds", "peak_memory_gb",
                    "trainable_parameters", "artifact_mb", "against_best",
                ],
                "properties": {
                    "status": {"enum": ["finished", "failed"]}, "metric": NUMBER, "stderr": NUMBER,
                    "against_best": DIFFERENCE, "error": TEXT,
                },
            },
        },
        "metric": {"required": ["name", "lower_is_better", "source"]},
        "best": TEXT,
        "cheapest": TEXT,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs, evaluated on the same rows."""
    folder = tmp_path_factory.mktemp("runs")
    questions = write_jsonl(folder / "bins.jsonl", chat_rows(12, seed=3))
    made = []
    for rank in (16, 2):
        run = copy_run(tiny_run(tmp_path_factory, "lora", **{"adapter.r": rank}), folder / f"rank-{rank}")
        assert tunesmith("eval", run, "--data", questions, "--set", "evaluation.max_new_tokens=2").code == 0
        made.append(run)
    return made[0], made[1]


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Path:
    write_jsonl(tmp_path / "train.jsonl", chat_rows(8))
    write_jsonl(tmp_path / "eval.jsonl", chat_rows(4, seed=1))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model:\n  name: {tiny_model}\n  dtype: fp32\ndata:\n  path: {tmp_path}/train.jsonl\n"
        f"  eval_path: {tmp_path}/eval.jsonl\ntraining:\n  max_steps: 2\n  trackers: []\noptimizer:\n  lr: 0.01\n"
    )
    return path


def json_of(result: Result, schema: dict[str, Any]) -> Any:
    value, end = json.JSONDecoder().raw_decode(result.out)
    assert result.out[end:] == "\n"
    jsonschema.validate(value, schema)
    return value


def cells(line: str) -> list[str]:
    """What a row of a terminal table holds."""
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def rows(result: Result) -> dict[str, list[str]]:
    """The rows of all tables by their label."""
    return {cells(line)[0]: cells(line)[1:] for line in result.out.splitlines() if "│" in line}


def test_compare_prints_what_differs_and_marks_the_best(runs: tuple[Path, Path]) -> None:
    result = tunesmith("compare", *runs)
    assert (result.code, result.problems) == (0, [])
    table = rows(result)
    assert table["status"] == ["finished", "finished"]
    assert table["adapter.r"] == ["16", "2"]
    first, second = (RunFolder.open(run).metrics for run in runs)
    losses = [f"{run['train_loss']:.3f}" for run in (first, second)]
    best = 0 if first["train_loss"] < second["train_loss"] else 1
    losses[best] += " ★"
    assert table["train_loss"] == losses
    assert table["adapter or model MB"][1].endswith("★")
    for metric, test in (("accuracy", "McNemar"), ("macro_f1", "randomization")):
        line = (
            rf"bins: {metric} of rank-2 against rank-16: [+-]\d+\.\d points on the same 12 rows \(p .*, {test}\): \w+\n"
        )
        assert re.search(line, result.out)
    assert "★" not in "".join(table["peak GB"])  # a CPU has the peak of the process
    assert "Data and base that differ" not in result.out


def test_compare_of_many_runs_has_them_as_rows(runs: tuple[Path, Path], tmp_path: Path) -> None:
    copies = [copy_run(runs[number % 2], tmp_path / f"copy{number}") for number in range(6)]
    table = rows(tunesmith("compare", *copies))
    assert {name: table[name] for name in ("copy0", "copy1")} == {"copy0": ["16"], "copy1": ["2"]}  # the last table's


def test_compare_prints_one_object(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    value = json_of(tunesmith("compare", *runs, "--json", "--html", page), COMPARISON)
    assert value["settings"] == {"adapter.r": [16, 2]}
    assert value["html"] == str(page)
    assert page.is_file()
    found = [(each["metric"], each["run"], each["against"], each["n"]) for each in value["comparisons"]]
    assert found == [(name, "rank-2", "rank-16", 12) for name in ("accuracy", "exact_match", "macro_f1", "micro_f1")]


def test_compare_says_what_has_no_test_and_what_is_no_share(runs: tuple[Path, Path], tmp_path: Path) -> None:
    copies = [copy_run(run, tmp_path / run.name) for run in runs]
    for number, copy in enumerate(copies):
        (path,) = (copy / "evaluations").glob("*.json")
        content = json.loads(path.read_text())
        content["metrics"] = {
            "retain": {"value": 0.5 + number / 4, "stderr": 0.01, "n": 80, "higher_is_better": True, "share": True},
            "letters": {"value": 5.0 - number, "stderr": 0.5, "n": 12, "higher_is_better": False, "share": False},
        }
        path.write_text(json.dumps(content))
    out = tunesmith("compare", *copies).out
    no_test = "(no test: its rows are not kept): unclear\n"
    assert f"bins: retain of rank-2 against rank-16: +25.0 points on the same 80 rows {no_test}" in out
    assert f"bins: letters of rank-2 against rank-16: -1 on the same 12 rows {no_test}" in out


def test_compare_warns_of_evaluations_in_another_way(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = copy_run(runs[1], tmp_path / "other")
    (path,) = (other / "evaluations").glob("*.json")
    content = json.loads(path.read_text())
    content["settings"]["max_new_tokens"] = 64
    path.write_text(json.dumps(content))
    result = tunesmith("compare", runs[0], other)
    assert (
        "warning: other was evaluated on bins in another way than rank-16 (max_new_tokens 64, not 2): their answers are not compared"
    ) in result.err
    assert "points" not in result.out
    assert {"bins: accuracy (max_new_tokens 2)", "bins: accuracy (max_new_tokens 64)"} <= rows(result).keys()


def test_compare_warns_on_stderr(runs: tuple[Path, Path], tmp_path: Path) -> None:
    unfinished = copy_run(runs[1], tmp_path / "unfinished")
    (unfinished / "metrics.json").unlink()
    events = (unfinished / "events.jsonl").read_text().splitlines()[:-1]
    (unfinished / "events.jsonl").write_text("\n".join(events) + "\n")
    result = tunesmith("compare", runs[0], unfinished)
    assert result.code == 0
    assert "warning: unfinished is running: its values are those so far, and none is marked" in result.err
    table = rows(result)
    assert table["status"] == ["finished", "running"]
    assert "★" not in "".join(table["train_loss"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["{run}", "{run}", "--html", "/nowhere/x.html"],
            "/nowhere/x.html: there is no folder /nowhere for the page; make it, or choose another --html",
        ),
        (["{run}"], "one run is no comparison: name two or more run folders"),
        (["{run}", "/nowhere"], "/nowhere: not a run folder (it has no config.yaml)"),
        ([], "Missing argument 'RUN'. (see --help)"),
    ],
)
def test_compare_refuses(runs: tuple[Path, Path], arguments: list[str], problem: str) -> None:
    result = tunesmith("compare", *(each.format(run=runs[0]) for each in arguments))
    assert (result.code, result.problems) == (2, [f"tunesmith: {problem}"])


def test_sweep_prints_a_row_for_each_run_and_the_best(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = ("sweep", config, "--over", "lora.r=2,4", "--over", "optimizer.lr=1e-2,1e-6", "--out", out)
    result = tunesmith(*command)
    assert (result.code, result.problems) == (0, [])
    table = rows(result)
    assert [table[number][:2] for number in "1234"] == [["2", "1e-2"], ["2", "1e-6"], ["4", "1e-2"], ["4", "1e-6"]]
    names = [f"r={rank}_lr={rate}" for rank in (2, 4) for rate in ("1e-2", "1e-6")]
    losses = [RunFolder.open(out / "runs" / name).metrics["eval_loss"] for name in names]
    best = losses.index(min(losses))
    assert [table[number][2] for number in "1234"] == [
        f"{loss:.3f}{' ★' if number == best else ''}" for number, loss in enumerate(losses)
    ]
    assert f"best: run {best + 1} ({names[best]}), eval_loss {losses[best]:.3f}\n" in result.out
    assert f"page: {out / 'sweep.html'}\n" in result.out
    again = tunesmith(*command)
    assert again.out == result.out
    assert again.err.count("is finished already") == 4
    assert "training" not in again.err


def test_sweep_prints_one_object(config: Path, tmp_path: Path) -> None:
    questions = write_jsonl(tmp_path / "bins.jsonl", chat_rows(12, seed=3))
    page = tmp_path / "page.html"
    arguments = ("--over", "adapter.r=2,4", "--data", questions, "--rows", "5", "--set", "evaluation.max_new_tokens=2")
    result = tunesmith("sweep", config, *arguments, "--out", tmp_path / "sweep", "--html", page, "--json")
    assert result.code == 0
    value = json_of(result, SWEEP)
    assert value["metric"] == {
        "name": "accuracy",
        "lower_is_better": False,
        "source": "evaluation",
        "share": True,
    }
    assert [run["stderr"] is not None for run in value["runs"]] == [True, True]
    assert value["html"] == str(page)
    assert "accuracy against size" in page.read_text()
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == value


def test_sweep_looks_at_where_its_page_goes_first(config: Path, tmp_path: Path) -> None:
    arguments = ("--over", "adapter.r=2,4", "--out", tmp_path / "sweep", "--html", "/nowhere/x.html")
    result = tunesmith("sweep", config, *arguments)
    problem = "tunesmith: /nowhere/x.html: there is no folder /nowhere for the page; make it, or choose another --html"
    assert (result.code, result.problems) == (2, [problem])
    assert not (tmp_path / "sweep").exists()


def test_sweep_with_a_failed_run_exits_1_after_the_table(config: Path, tmp_path: Path) -> None:
    over = "adapter.target_modules=[q_proj],[q_projection]"
    result = tunesmith("sweep", config, "--over", over, "--out", tmp_path / "sweep")
    assert result.code == 1
    assert result.problems == ["tunesmith: 1 of 2 runs failed: target_modules=q_projection"]
    assert rows(result)["2"][1] == "failed"
    assert (
        "run 2 (target_modules=q_projection) failed: adapter.target_modules: q_projection matches no linear layer"
        in result.out
    )


def test_sweep_refuses_with_every_problem(config: Path, tmp_path: Path) -> None:
    result = tunesmith("sweep", config, "--over", "lora.r=0,2", "--set", "training.epochs=-1", "--out", tmp_path / "s")
    assert (result.code, result.problems) == (
        2,
        [
            "tunesmith: --set training.epochs=-1: `training.epochs` is -1: input should be greater than 0",
            "tunesmith: r=0: `adapter.r` is 0: input should be greater than or equal to 1",
        ],
    )
    assert not (tmp_path / "s").exists()


def test_sweep_needs_something_to_go_over(config: Path) -> None:
    result = tunesmith("sweep", config)
    assert (result.code, result.problems) == (
        2,
        ["tunesmith: nothing to sweep over: pass --over, e.g. --over adapter.r=8,16,32"],
    )


def test_sweep_writes_beside_other_runs_by_default(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tunesmith("sweep", config, "--over", "adapter.r=2", "--trials", "1").code == 0
    assert [path.name for path in (tmp_path / "runs" / "run-sweep" / "runs").iterdir()] == ["001_r=2"]


def test_the_commands_of_the_page_run(
    runs: tuple[Path, Path], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "test.jsonl", chat_rows(12, seed=3))
    for run, name in zip(runs, ("first", "second"), strict=True):
        copy_run(run, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sweep_runs, "write_report", lambda run: run.path / "report.html"
    )  # takes longer than the training
    page = (Path(__file__).parents[1] / "docs" / "compare.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^\$ tunesmith (.+)$", page, re.M)]
    assert [command[0] for command in commands] == ["compare", "compare", "sweep", "sweep"]
    for number, command in enumerate(commands):
        short = ["--set", "training.max_steps=1", "--out", f"sweep-{number}"] if command[0] == "sweep" else []
        result = tunesmith(*[{"12": "2"}.get(word, word) for word in command], *short)
        assert (result.code, result.problems) == (0, []), command
    assert Path("compared.html").is_file()
    assert len(json.loads(Path("sweep-2/sweep.json").read_text())["runs"]) == 6
    assert len(json.loads(Path("sweep-3/sweep.json").read_text())["runs"]) == 2
