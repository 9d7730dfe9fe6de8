"""Answers to the same held-out questions at each evaluation of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import write_jsonl
from tunesmith.cli.console import Console
from tunesmith.config import RunConfig, load_config
from tunesmith.errors import ConfigError, DataError, MachineError, UserError
from tunesmith.evaluation.answers import generate_answers, sample_rows
from tunesmith.report.facts import samples
from tunesmith.report.page import write_report
from tunesmith.runs import RunFolder
from tunesmith.training.checkpoint import TrainState
from tunesmith.training.loop import _is_best
from tunesmith.workflows.train import TrainingSession, start

Session = Callable[..., TrainingSession]
Configure = Callable[..., RunConfig]


def logged(run: RunFolder) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == "sample"]


def test_the_same_questions_are_asked_at_each_evaluation(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    run = session("data.eval_path=HELD", "evaluation.samples=2", "evaluation.max_new_tokens=6", "training.epochs=2")
    with Console() as console:
        run.train(console.event)
    found = logged(run.run)
    rows = sample_rows(run.data.eval_rows, 2)
    assert [(event["step"], event["line"]) for event in found] == [(step, row.line) for step in (3, 6) for row in rows]
    last = generate_answers(run.forward, run.tokenizer, run.chat, rows, run.config.evaluation)
    assert [event["answer"] for event in found[2:]] == [each.answer for each in last]
    assert [(event["prompt"], event["expected"]) for event in found[:2]] == [
        (row.messages[-2].content, row.messages[-1].content) for row in rows if row.messages
    ]
    assert "accuracy" not in next(event for event in run.run.events() if event["event"] == "eval")["metrics"]
    assert f"step 3, line {rows[0].line}: " in capsys.readouterr().err.replace("\n", " ")

    table = samples(run.run.events())
    assert [(line, step) for line, step, *_ in table] == [(str(row.line), str(step)) for row in rows for step in (3, 6)]
    page = Path(write_report(run.run)).read_text(encoding="utf-8")
    assert "Samples during training (4)" in page


def test_scored_answers_are_shown_and_not_made_twice(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def count(forward: Any, tokenizer: Any, chat: Any, rows: Any, *rest: Any) -> Any:
        asked.append(len(rows))
        return generate_answers(forward, tokenizer, chat, rows, *rest)

    monkeypatch.setattr("tunesmith.workflows.training_evaluation.generate_answers", count)
    run = session("data.eval_path=HELD", "evaluation.samples=3", "evaluation.generate=true", "training.epochs=1")
    run.train()
    assert asked == [8]
    assert len(logged(run.run)) == 3


def test_of_preferences_the_prompts_are_answered(tiny_model: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(8)]
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    values = {
        "model.name": str(tiny_model), "model.device": "cpu", "data.path": str(path), "data.eval_fraction": 0.25,
        "evaluation.samples": 2, "evaluation.max_new_tokens": 4,
    }  # fmt: skip
    for name in ("dpo", "kto"):
        run = start(load_config(None, [f"objective.name={name}"], values), tmp_path / name)
        run.train()
        found = logged(run.run)
        assert len(found) == 2
        for event in found:
            number = event["line"] - 1
            assert (event["prompt"], event["expected"]) == (f"q{number}", f"good {number}")


def test_samples_need_questions(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation\.samples needs evaluation data; set data\.eval_path or data\.eval_fraction"
    ):
        load_config(None, ["evaluation.samples=2"])
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"line {n} of a text"} for n in range(20)])
    values = {"model.name": str(tiny_model), "data.path": str(text), "data.eval_fraction": 0.2, "evaluation.samples": 2}
    with pytest.raises(DataError, match="plain text has no question to answer"):
        start(load_config(None, [], values), tmp_path / "run")


JUDGED = (
    "data.eval_path=HELD", "evaluation.generate=true", "evaluation.max_new_tokens=2", "evaluation.judge.model=stub",
    "evaluation.judge.mode=score",
)  # fmt: skip


# -- a metric of one's own --------------------------------------------------------------------------------------------


def test_a_function_that_fails_in_one_evaluation_does_not_end_the_run(configure: Configure, tmp_path: Path) -> None:
    """It decides which checkpoint is best, too: the evaluation that lacks it is not the best."""
    path = tmp_path / "own.py"
    path.write_text(
        "calls = []\n\ndef size(row):\n    calls.append(row)\n    if len(calls) == 1:\n        raise KeyError('what')\n    return 1.0\n"
    )
    config = configure(
        "data.eval_path=HELD", "evaluation.generate=true", "evaluation.max_new_tokens=2", f"evaluation.metrics=[{path}:size]",
        "training.max_steps=3", "training.eval_every=1", "training.early_stopping.metric=size",
        "training.early_stopping.mode=max",
    )  # fmt: skip
    run = start(config, tmp_path / "run")
    run.train()
    events = run.run.events()
    evaluations = [event["metrics"] for event in events if event["event"] == "eval"]
    assert [values.get("size") for values in evaluations] == [None, 1.0, 1.0]
    assert all("accuracy" in values for values in evaluations)
    (said,) = [event["message"] for event in events if "evaluation.metrics" in str(event.get("message"))]
    assert said.startswith("evaluation.metrics gave nothing at step 1: metric size: line ")
    assert "KeyError: 'what'" in said
    assert [event["step"] for event in events if event["event"] == "best"] == [2]


# -- a judge ----------------------------------------------------------------------------------------------------------


def test_a_judge_scores_the_answers_of_each_evaluation(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that refuses the key costs its score of that evaluation, not the run."""
    from judge_server import KEY, JudgeServer, score_by_words

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(score_by_words) as server:
        config = configure(
            *JUDGED, "training.max_steps=2", "training.eval_every=1", f"evaluation.judge.url={server.url}"
        )
        run = start(config, tmp_path / "run")
        run.train()
        evaluations = [event["metrics"] for event in run.run.events() if event["event"] == "eval"]
        assert len(evaluations) == 2
        assert all(1 <= values["judge_score"] <= 10 for values in evaluations)
        server.mode = "unauthorized"
        config.evaluation.max_new_tokens = 3  # other answers, which no verdict is kept for
        refused = start(config, tmp_path / "refused")
        refused.train()
    events = refused.run.events()
    assert all("judge_score" not in event["metrics"] for event in events if event["event"] == "eval")
    said = [event["message"] for event in events if event["event"] == "warning"]
    assert any(text.startswith("the judge gave no score at step 1: ") for text in said)


def test_a_judge_cannot_compare_during_training(configure: Configure, tmp_path: Path) -> None:
    config = configure(*JUDGED, "evaluation.judge.url=http://127.0.0.1:1/v1", "evaluation.judge.mode=pairwise")
    with pytest.raises(ConfigError, match=r"mode pairwise compares with the base, which training does not ask"):
        start(config, tmp_path / "run")


def test_what_keeps_a_judge_from_judging_is_refused_before_weights_are_read(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("tunesmith.workflows.train.find_model", never)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    url = "evaluation.judge.url=http://127.0.0.1:1/v1"
    keyless = "the environment variable JUDGE_KEY is not set"
    for overrides, problem in (
        ([url, "evaluation.judge.api_key_env=JUDGE_KEY"], keyless),
        ([url, "evaluation.judge.api_key_env=null", "evaluation.judge.model=''"], r"judge\.model is not set"),
        (
            [url, "evaluation.judge.api_key_env=null", "evaluation.judge.rubric=none.md"],
            "rubric none.md: there is no such file",
        ),
        (
            ["evaluation.judge.url=local:none", "evaluation.judge.model=''", "evaluation.judge.seed=1"],
            "seed is 1, which has no effect",
        ),
        ([f"evaluation.judge.url=local:{tmp_path}/none", "evaluation.judge.model=''"], "none"),
    ):
        config = configure(*JUDGED, *overrides, "training.early_stopping.metric=judge_score")
        with pytest.raises(UserError, match=problem):
            start(config, tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"`evaluation\.judge\.workers` is 0: input should be greater than or equal to 1"
    ):
        configure(*JUDGED, url, "evaluation.judge.workers=0")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MachineError, match=r"pip install 'tunesmith\[judge\]'"):
        start(configure(*JUDGED, url, "evaluation.judge.api_key_env=null"), tmp_path / "run")


def test_an_outage_costs_scores_and_no_patience(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four evaluations, of which the judge answers the second alone: that is the best, and nothing stops the run."""
    from judge_server import KEY, JudgeServer, score_by_words

    from tunesmith.training.loop import evaluate_loss

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(score_by_words) as server:
        evaluations: list[int] = []

        def evaluated(*arguments: Any) -> float:
            evaluations.append(1)
            server.mode = "good" if len(evaluations) == 2 else "too_long"
            return evaluate_loss(*arguments)

        monkeypatch.setattr("tunesmith.workflows.training_evaluation.evaluate_loss", evaluated)
        monkeypatch.setattr("tunesmith.workflows.evaluation_parts.VERDICTS", "nothing/is-kept.jsonl")
        config = configure(
            *JUDGED, f"evaluation.judge.url={server.url}", "evaluation.judge.max_retries=0",
            "training.early_stopping.metric=judge_score", "training.early_stopping.patience=1",
            "training.max_steps=4", "training.eval_every=1",
        )  # fmt: skip
        run = start(config, tmp_path / "run")
        run.train()
    events = run.run.events()
    metrics = [event["metrics"] for event in events if event["event"] == "eval"]
    assert ["judge_score" in values for values in metrics] == [False, True, False, False]
    assert [event["step"] for event in events if event["event"] == "best"] == [2]
    assert "kept the weights of step 2, the best judge_score" in [event.get("message") for event in events]


def test_an_evaluation_without_the_judges_score_is_neither_better_nor_worse(configure: Configure) -> None:
    config = configure(
        *JUDGED, "evaluation.judge.url=http://127.0.0.1:1/v1", "training.early_stopping.metric=judge_score"
    ).resolved()
    state = TrainState(best_value=5.0, best_step=1, evaluations_without_improvement=1, eval_loss=3.0)
    assert not _is_best(state, {"eval_loss": 2.0}, config)
    assert (state.best_value, state.best_step, state.evaluations_without_improvement) == (5.0, 1, 1)
    assert state.eval_loss == 2.0
    assert not _is_best(state, {"eval_loss": 2.0, "judge_score": 5.0}, config)
    assert state.evaluations_without_improvement == 2
    assert _is_best(state, {"eval_loss": 2.0, "judge_score": 6.0}, config)
    config.training.early_stopping.metric = "accuracy"
    with pytest.raises(ConfigError, match=r"early_stopping\.metric is 'accuracy'; this run evaluates eval_loss"):
        _is_best(state, {"eval_loss": 2.0}, config)
