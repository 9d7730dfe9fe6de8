"""Sweeps: what is checked before the first run, and what the table concludes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweeps import RANKS, SHORT, answer, change_json, copy_sweep, state_of

from tiny import chat_rows, write_jsonl
from tunesmith.errors import ConfigError, DataError, RunError
from tunesmith.evaluation import task_part
from tunesmith.evaluation.subject import Subject
from tunesmith.workflows.compare import compare
from tunesmith.workflows.sweep import sweep


def test_every_run_is_checked_before_the_first(config: Path, files: Path, tmp_path: Path, loads: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(config, ["adapter.r=0,2", "optimizer.lr=1e-3,7"], out=tmp_path / "sweep")
    assert caught.value.problems == [
        "r=0_lr=1e-3 and 1 more: `adapter.r` is 0: input should be greater than or equal to 1",
        "r=0_lr=7 and 1 more: `optimizer.lr` is 7: input should be less than or equal to 1",
    ]
    with pytest.raises(DataError) as caught_data:
        sweep(
            config,
            ["adapter.r=2,3", f"data.path={files / 'train.jsonl'},absent.jsonl", "model.name=nowhere/at all"],
            out=tmp_path / "sweep",
        )
    assert [problem.partition(": ")[2] for problem in caught_data.value.problems] == [
        "nowhere/at all: no such model folder or .gguf file (a hub id looks like org/model)",
        "absent.jsonl: no such file",
    ]
    with pytest.raises(ConfigError) as caught:
        sweep(config, ["optimizer.lr=1e-3,0.001"], out=tmp_path / "sweep")
    assert caught.value.problems == ["lr=0.001 is lr=1e-3 once more: leave one of the two values out"]
    assert not (tmp_path / "sweep").exists()
    assert loads == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            {"settings": ["data.eval_path=null"]},
            "nothing measures these runs: pass --data FILE, or set data.eval_path or data.eval_fraction; the training loss, "
            "which says how well a run learnt its rows by heart, is taken with --metric train_loss",
        ),
        (
            {"settings": ["data.eval_path=null"], "metric": "eval_loss"},
            "--metric eval_loss: no run has held-out rows; set data.eval_path or data.eval_fraction",
        ),
        (
            {"metric": "accuracy"},
            "--metric accuracy: only an evaluation measures it; pass --data FILE, or take one of eval_loss, train_loss",
        ),
        ({"rows": 3}, "--rows is how many of --data are asked, and there is no --data; add it, or leave --rows out"),
    ],
)
def test_what_nothing_measures_is_refused(
    config: Path, tmp_path: Path, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "sweep", **arguments)
    assert caught.value.problems == [problem]


def test_questions_and_their_metrics_are_known_before_the_first_run(
    config: Path, tmp_path: Path, loads: list[str], questions: Path
) -> None:
    with pytest.raises(DataError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "sweep", data=tmp_path / "absent.jsonl")
    assert caught.value.problems == [f"{tmp_path / 'absent.jsonl'}: no such file"]
    rows = chat_rows(12)
    rows[4]["messages"][0]["content"] += "\ufdd0"
    odd = write_jsonl(tmp_path / "odd.jsonl", rows)
    with pytest.raises(DataError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "sweep", data=odd)
    assert caught.value.problems == [
        f"{odd}:5: the user text holds a Unicode noncharacter (U+FDD0 to U+FDD9); remove it"
    ]
    with pytest.raises(ConfigError) as caught_metric:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "sweep", data=questions, metric="bleu")
    assert caught_metric.value.problems == [
        f"--metric bleu: {questions} is of the task label, which has accuracy, exact_match, macro_f1, micro_f1; "
        "take one of these or eval_loss, train_loss"
    ]
    assert loads == []


def judged(
    asked_sweep: Path, config: Path, questions: Path, to: Path, right: list[int], metric: str = "accuracy"
) -> Any:
    """The sweep over the ranks 4, 3 and 2, as if its runs had answered so many of the first questions rightly."""
    out = copy_sweep(asked_sweep, to)
    change_json(out / "sweep.json", asked__metric=metric)
    for rank, count in zip((4, 3, 2), right, strict=True):
        answer(out / "runs" / f"r={rank}", count)
    return sweep(config, RANKS, out=out, data=questions, settings=SHORT, metric=metric)


def test_the_cheapest_run_that_is_not_clearly_worse_is_named(
    asked_sweep: Path, config: Path, questions: Path, tmp_path: Path, sessions: list[str]
) -> None:
    result = judged(asked_sweep, config, questions, tmp_path / "a", [12, 9, 2])
    assert (result["best"], result["tied"], result["within_error"], result["cheapest"]) == ("r=4", [], ["r=3"], "r=3")
    against = [run["against_best"] for run in result["runs"]]
    assert against[0] is None
    assert (against[1]["verdict"], against[1]["p"], against[1]["test"]) == ("unclear", 0.25, "McNemar")
    assert against[2]["verdict"] == "worse"
    assert against[2]["p"] == pytest.approx(2 / 2**10)
    seconds = result["runs"][1]["wall_seconds"]
    assert result["conclusions"] == [
        "best: run 1 (r=4), accuracy 100.0% ± 0.0",
        "not clearly worse (p of a test against the best is 0.05 or more): run 2",
        f"the cheapest of these and the best: run 2 (r=3), 6.14 k trained parameters, {seconds:.1f} s",
    ]
    alone = judged(asked_sweep, config, questions, tmp_path / "b", [1, 12, 0])
    assert (alone["best"], alone["within_error"], alone["cheapest"]) == ("r=3", [], None)
    assert alone["conclusions"] == ["best: run 2 (r=3), accuracy 100.0% ± 0.0"]
    assert sessions == []


def test_of_equals_the_cheapest_is_best_and_the_tie_is_said(
    asked_sweep: Path, config: Path, questions: Path, tmp_path: Path
) -> None:
    result = judged(asked_sweep, config, questions, tmp_path / "a", [0, 0, 0])
    assert (result["best"], result["tied"], result["cheapest"]) == ("r=2", ["r=4", "r=3"], "r=2")
    assert result["conclusions"][0] == (
        "best: run 3 (r=2), accuracy 0.0% ± 0.0, tied with run 1, 2: of equals the cheapest is named"
    )
    assert [run["against_best"] and run["against_best"]["p"] for run in result["runs"]] == [1.0, 1.0, None]


def test_seconds_that_cannot_be_told_apart_make_no_run_cheaper(
    asked_sweep: Path, config: Path, questions: Path, tmp_path: Path
) -> None:
    out = copy_sweep(asked_sweep, tmp_path / "a")
    for rank, seconds in ((4, 100.4), (3, 100.1), (2, 101.0)):
        answer(out / "runs" / f"r={rank}", 6)
        change_json(out / "runs" / f"r={rank}" / "metrics.json", trainable_parameters=5000, wall_seconds=seconds)
    result = sweep(config, RANKS, out=out, data=questions, settings=SHORT)
    assert (result["best"], result["tied"], result["cheapest"]) == ("r=4", ["r=3", "r=2"], "r=4")


@pytest.mark.parametrize(("metric", "test"), [("exact_match", "McNemar"), ("macro_f1", "randomization")])
def test_other_metrics_of_answers_are_compared_on_the_same_rows(
    asked_sweep: Path, config: Path, questions: Path, tmp_path: Path, metric: str, test: str
) -> None:
    result = judged(asked_sweep, config, questions, tmp_path / "a", [12, 11, 1], metric)
    assert (result["best"], result["within_error"], result["metric"]["share"]) == ("r=4", ["r=3"], True)
    assert result["runs"][2]["against_best"]["test"] == test
    assert result["runs"][2]["against_best"]["verdict"] == "worse"


@pytest.mark.parametrize(
    "changes",
    [
        {"task_kind": "regex", "settings": {"max_new_tokens": 4, "pattern": "."}},
        {"settings": {"max_new_tokens": 64, "metrics": []}},
        {"n": 5, "sample_seed": 0},
    ],
)
def test_an_evaluation_in_another_way_is_not_the_sweeps(
    asked_sweep: Path, config: Path, questions: Path, tmp_path: Path, sessions: list[str], changes: dict[str, Any]
) -> None:
    """`tunesmith eval` of one run with another task, limit or sample, afterwards: all its answers are right."""
    out = copy_sweep(asked_sweep, tmp_path / "a")
    for rank, right in ((4, 8), (3, 7), (2, 0)):
        answer(out / "runs" / f"r={rank}", right)
    first = sweep(config, RANKS, out=out, data=questions, settings=SHORT)
    kept = out / "runs" / "r=2" / "evaluations" / "test.json"
    before = kept.read_text()
    later = answer(out / "runs" / "r=2", 12, created="2099-01-01T00:00:00+0000", **changes).read_text()
    kept.write_text(before)
    kept.with_name("test-2.json").write_text(later)
    again = sweep(config, RANKS, out=out, data=questions, settings=SHORT)
    assert [run["metric"] for run in again["runs"]] == [8 / 12, 7 / 12, 0.0]
    assert (again["best"], again["runs"]) == ("r=4", first["runs"])
    assert sessions == []


def test_the_loss_of_texts_is_compared_text_by_text(config: Path, tmp_path: Path, no_reports: None) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": row["messages"][0]["content"]} for row in chat_rows(20)])
    settings = ["data.train_on=all", "training.max_steps=2"]
    result = sweep(config, ["optimizer.lr=2e-2,1e-6"], out=tmp_path / "a", data=texts, settings=settings)
    assert result["metric"] == {"name": "loss", "lower_is_better": True, "source": "evaluation", "share": False}
    first, second = result["runs"]
    assert first["metric"] < second["metric"]
    assert (result["best"], result["within_error"]) == ("lr=2e-2", [])
    assert (second["against_best"]["test"], second["against_best"]["verdict"]) == ("randomization", "worse")
    # Two losses measured apart would have the error of what the texts themselves differ by.
    assert second["against_best"]["stderr"] < 0.7 * (first["stderr"] ** 2 + second["stderr"] ** 2) ** 0.5


def test_a_metric_whose_rows_are_not_kept_has_no_test(
    config: Path, tmp_path: Path, no_reports: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in evaluations that did not keep the sizes of texts; with them there is one."""
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "glass and paper"}, {"text": "a tin"}])
    asked: dict[str, Any] = {"data": texts, "metric": "bits_per_byte", "settings": SHORT}
    tested = sweep(config, ["adapter.r=2,3"], out=tmp_path / "tested", **asked)
    assert sum(run["against_best"] is not None for run in tested["runs"]) == 1
    rows = task_part._loss_rows

    def without_sizes(*given: Any) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "bytes"} for row in rows(*given)]

    monkeypatch.setattr(task_part, "_loss_rows", without_sizes)
    result = sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", **asked)
    assert [run["against_best"] for run in result["runs"]] == [None, None]
    assert result["within_error"] == []
    assert result["conclusions"][1:] == [
        "bits_per_byte has no test: the evaluations do not keep what it is made of, row by row"
    ]


def test_the_users_own_metric_decides(
    config: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "metrics.py"
    code.write_text("def size(row):\n    return {'letters': len(row['answer'])}\nsize.higher_is_better = False\n")
    settings = [f"evaluation.metrics=[{code}:size]", "training.max_steps=1"]
    arguments: dict[str, Any] = {"data": questions, "settings": settings}

    def generate(self: Subject, prompts: Any, *rest: Any) -> list[str]:
        return ["a" * self.forward.model.peft_config["default"].r] * 12

    monkeypatch.setattr(Subject, "generate", generate)
    result = sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", metric="size.letters", **arguments)
    assert [run["metric"] for run in result["runs"]] == [2.0, 3.0]
    assert (result["best"], result["metric"]["lower_is_better"]) == ("r=2", True)
    wrong = sweep(config, ["adapter.r=2"], out=tmp_path / "b", metric="size.words", **arguments)
    assert wrong["runs"][0]["error"] == (
        "--metric size.words: the evaluation has accuracy, exact_match, macro_f1, micro_f1, size.letters; take one of these"
    )


def test_the_lowest_loss_is_best_and_nothing_is_claimed_of_its_error(config: Path, loss_sweep: Path) -> None:
    result = state_of(loss_sweep)
    first, second = (run["metric"] for run in result["runs"])
    assert first < second
    assert (result["best"], result["within_error"], result["cheapest"]) == ("lr=1e-2", [], None)
    assert result["conclusions"] == [
        f"best: run 1 (lr=1e-2), eval_loss {first:.3f}",
        "eval_loss has no standard error here: --data FILE measures the runs on rows that can be compared",
    ]
    page = (loss_sweep / "sweep.html").read_text()
    assert result["html"] == str(loss_sweep / "sweep.html")
    assert "eval_loss against time" in page
    assert "eval_loss against size" in page
    names = [run["name"] for run in compare([run["path"] for run in result["runs"]])["runs"]]
    assert names == ["lr=1e-2", "lr=1e-6"]


def test_losses_that_cannot_be_compared_have_no_best(config: Path, loss_sweep: Path, tmp_path: Path) -> None:
    out = copy_sweep(loss_sweep, tmp_path / "a")
    change_json(out / "runs" / "lr=1e-6" / "metadata.json", chat_template__hash="77" * 32)
    result = sweep(config, ["optimizer.lr=1e-2,1e-6"], out=out, settings=SHORT)
    assert (result["best"], result["cheapest"], result["no_best"]) == (None, None, "not the same chat template")
    assert result["conclusions"] == [
        "no run is named best: not the same chat template, so that eval_loss is not comparable"
    ]
    assert "★ " not in (out / "sweep.html").read_text().replace("★ marks", "")


@pytest.mark.parametrize(
    ("over", "settings", "problem"),
    [
        (
            "training.seed=1,2",
            ["data.eval_path=null", "data.eval_fraction=0.25"],
            "eval_loss cannot be compared between these runs: not the same held-out rows (data.eval_fraction draws them from the "
            "training data, by the seed); leave that out, or pass --data FILE, whose questions every run answers",
        ),
        (
            "data.train_on=all,assistant",
            [],
            "eval_loss cannot be compared between these runs: not the same tokens count (data.train_on); leave that out, or pass "
            "--data FILE, whose questions every run answers",
        ),
    ],
)
def test_losses_that_cannot_be_compared_are_refused_first(
    config: Path, tmp_path: Path, loads: list[str], over: str, settings: list[str], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(config, [over], out=tmp_path / "a", settings=settings)
    assert caught.value.problems == [problem]
    assert loads == []
    assert not (tmp_path / "a").exists()


def test_texts_in_another_template_are_refused_first(
    config: Path, questions: Path, tmp_path: Path, loads: list[str]
) -> None:
    """Conversations as texts: the template's own words are part of them."""
    over = ["data.chat_template=alpaca,vicuna"]
    with pytest.raises(ConfigError) as caught:
        sweep(config, over, out=tmp_path / "a", data=questions, settings=["evaluation.task=perplexity"])
    assert caught.value.problems == [
        "loss cannot be compared between these runs: not the same chat template; leave that out, or take another --metric"
    ]
    assert loads == []


def test_other_training_rows_have_other_training_losses(
    config: Path, files: Path, tmp_path: Path, loads: list[str]
) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", chat_rows(20, seed=5))
    with pytest.raises(
        ConfigError, match=r"^train_loss cannot be compared between these runs: not the same training rows;"
    ):
        sweep(config, [f"data.path={files / 'train.jsonl'},{more}"], out=tmp_path / "a", metric="train_loss")
    assert loads == []


def test_a_judge_is_refused_as_no_run_would_be_judged(
    config: Path, questions: Path, tmp_path: Path, loads: list[str]
) -> None:
    settings = ["evaluation.judge.url=http://127.0.0.1:9/v1"]
    with pytest.raises(ConfigError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", data=questions, settings=settings)
    assert caught.value.problems == [
        "evaluation.judge.url: a sweep asks no judge, whose verdicts would not say which run is best; add --set "
        "evaluation.judge.url=null, and have the chosen run judged: tunesmith eval RUN --data FILE --set evaluation.judge.url=URL"
    ]
    assert loads == []


def test_a_page_that_cannot_be_written_is_refused_first(config: Path, tmp_path: Path, loads: list[str]) -> None:
    page = tmp_path / "absent" / "x.html"
    with pytest.raises(RunError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", html=page)
    assert (
        str(caught.value) == f"{page}: there is no folder {page.parent} for the page; make it, or choose another --html"
    )
    assert loads == []
    assert not (tmp_path / "a").exists()
