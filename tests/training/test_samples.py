"""Answers to the same held-out questions at each evaluation of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import write_jsonl
from tunesmith.cli.console import Console
from tunesmith.config import RunConfig, load_config
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation.answers import generate_answers, sample_rows
from tunesmith.report.facts import samples
from tunesmith.report.page import write_report
from tunesmith.runs import RunFolder
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


# -- a judge ----------------------------------------------------------------------------------------------------------


def test_a_judge_scores_the_answers_of_each_evaluation(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that refuses the key costs its score of that evaluation, not the run."""
    from judge_server import KEY, JudgeServer, score_by_words

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(score_by_words) as server:
        config = configure(
            "data.eval_path=HELD",
            "training.max_steps=2",
            "training.eval_every=1",
            "evaluation.generate=true",
            "evaluation.max_new_tokens=2",
            f"evaluation.judge.url={server.url}",
            "evaluation.judge.model=stub",
            "evaluation.judge.mode=score",
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
    config = configure(
        "data.eval_path=HELD", "evaluation.generate=true", "evaluation.judge.url=http://127.0.0.1:1/v1",
        "evaluation.judge.model=stub",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"mode pairwise compares with the base, which training does not ask"):
        start(config, tmp_path / "run")
