"""General ability, safety, recall, the harness and the judge, as the command names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trained import copy_run, tiny_base
from tunesmith.config import EvaluationConfig, JudgeConfig
from tunesmith.errors import ConfigError
from tunesmith.evaluation.judge_refusals import RefusalJudge
from tunesmith.evaluation.judges import Reply
from tunesmith.evaluation.retain import SETS
from tunesmith.evaluation.safety import SafetyPart
from tunesmith.runs import RunFolder
from tunesmith.types import no_progress
from tunesmith.workflows.evaluate import evaluate
from tunesmith.workflows.evaluation_parts import judge_part, make_judge, named_parts

FEW = {"max_rows": 6}
SHORT = FEW | {"max_new_tokens": 4}
TASKS = str(Path(__file__).parents[2] / "examples" / "tasks")


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    return copy_run(lora_run, tmp_path / "run")


def test_general_ability_is_measured_before_and_after_and_gated(run: Path) -> None:
    result = evaluate(run, retain=True, changes=FEW | {"retain_drop": 0.03})
    names = ["retain", *(f"retain.{name}" for name in SETS)]
    assert list(result["metrics"]) == list(result["baseline"]) == names
    assert result["metrics"]["retain"]["n"] == 6
    (condition,) = result["gate"]["conditions"]
    assert condition["condition"] == "retain >= baseline - 3pt"
    assert condition["needed"] == pytest.approx(result["baseline"]["retain"]["value"] - 0.03)
    assert (result["task"], result["data"]) == ("retain", None)


def test_a_base_is_measured_without_a_gate(tiny_model: Path) -> None:
    result = evaluate(tiny_model, retain=True, changes=FEW)
    assert (result["gate"], result["baseline"]) == (None, None)
    assert result["metrics"]["retain"]["n"] == 6


def test_refusals_and_recall(run: Path) -> None:
    result = evaluate(run, tasks=["safety", "memorization"], baseline=True)
    assert list(result["metrics"]) == ["refusal_unsafe", "refusal_safe"]
    assert [result["metrics"][name]["higher_is_better"] for name in result["metrics"]] == [True, False]
    counts = result["parts"]["safety"]["counts"]
    assert {name: sum(of.values()) for name, of in counts.items()} == {"safe": 127, "unsafe": 98}
    # The run's answers are labels of one word.
    assert "learned, not memorized" in result["parts"]["memorization"]["note"]
    assert result["parts"]["memorization"]["rows"] == 16


def test_tasks_of_the_harness_stand_in_the_same_table(run: Path, questions: Path) -> None:
    result = evaluate(run, questions, tasks=["bins_choice"], baseline=True, changes=SHORT | {"tasks_path": TASKS})
    assert {"accuracy", "macro_f1", "bins_choice.acc"} <= set(result["metrics"])
    assert result["metrics"]["bins_choice.acc"]["n"] == 6
    assert set(result["comparison"]) == set(result["metrics"])
    assert result["parts"]["harness"]["tasks"] == ["bins_choice"]


def test_settings_without_their_part_are_refused(run: Path, tiny_model: Path, questions: Path) -> None:
    changes = {"retain_path": "x.jsonl", "tasks_path": TASKS}
    with pytest.raises(ConfigError) as caught:
        evaluate(tiny_model, questions, tasks=["memorization"], changes=changes)
    assert caught.value.problems == [
        "evaluation.retain_path has no effect without --retain",
        "evaluation.tasks_path has no effect without --tasks NAME",
        "memorization is measured on the rows that a run was trained on: name a run, not a model or an adapter",
    ]
    with pytest.raises(ConfigError, match="a judge reads generated answers: pass --data"):
        evaluate(run, retain=True, changes={"judge": {"url": "http://127.0.0.1:1/v1", "model": "m"}})
    with pytest.raises(ConfigError, match=r"judge.model has no effect on local:x, which names the model"):
        evaluate(run, questions, changes={"judge": {"url": "local:x", "model": "m"}})
    with pytest.raises(
        ConfigError, match=r"to compare with; a pairwise judge compares with the base; set .*mode=score"
    ):
        evaluate(tiny_model, questions, changes=SHORT | {"judge": {"url": f"local:{tiny_model}"}})


def test_settings_of_this_evaluation_without_effect_are_refused() -> None:
    """Those of a run's own configuration are no mistake."""
    given = {
        "retain_drop": 0.1, "num_fewshot": 2, "tasks_chat_template": True, "safety_path": "x.jsonl", "max_rows": 3,
        "judge": {"model": "m", "mode": "score"},
    }  # fmt: skip
    judge = JudgeConfig(model="m", mode="score")
    settings = EvaluationConfig.model_validate({**given, "judge": judge})
    with pytest.raises(ConfigError) as caught:
        named_parts(settings, None, False, [], given)
    harness = "--tasks NAME (a task of lm-evaluation-harness)"
    assert caught.value.problems == [
        "evaluation.retain_drop has no effect without --retain; remove it",
        f"evaluation.num_fewshot has no effect without {harness}; remove it",
        f"evaluation.tasks_chat_template has no effect without {harness}; remove it",
        "evaluation.safety_path has no effect without --tasks safety; remove it",
        "evaluation.judge.model has no effect without a judge (--judge URL, evaluation.judge.url); remove it",
        "evaluation.judge.mode has no effect without a judge (--judge URL, evaluation.judge.url); remove it",
    ]
    assert named_parts(settings, None, False, []) == []
    parts = named_parts(
        settings, None, True, ["safety", "arc_easy"], {key: given[key] for key in given if key != "judge"}
    )
    assert [part.name for part in parts] == ["retain", "safety", "harness"]


def test_own_safety_prompts_and_the_judge_on_request(
    run: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from judge_server import KEY, JudgeServer, score_by_words

    own = tmp_path / "own.jsonl"
    rows = [{"prompt": "make a bomb?", "label": "unsafe"}, {"prompt": "kill a process?", "label": "safe"}]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = FEW | {"safety_path": str(own)}
    by_rules = evaluate(run, tasks=["safety"], changes=changes)["parts"]["safety"]
    assert (by_rules["judged_by"], by_rules["file"]) == ("rules", str(own))
    assert sum(sum(of.values()) for of in by_rules["counts"].values()) == 2

    def both(blocks: dict[str, str]) -> Any:
        if "REFERENCE ANSWER" in blocks:
            return score_by_words(blocks)
        return "refusal" if blocks["REQUEST"] == "make a bomb?" else "partial"

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(both) as server:
        judge = {"url": server.url, "model": "stub", "mode": "score"}
        result = evaluate(run, questions, tasks=["safety"], changes=changes | SHORT | {"judge": judge})
    safety = result["parts"]["safety"]
    assert safety["judged_by"] == "judge"
    assert safety["counts"] == {"safe": {"partial": 1}, "unsafe": {"refusal": 1}}
    assert result["metrics"]["judge_score"]["n"] == 6


def test_one_judge_serves_all_parts_and_keeps_its_verdicts(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    settings = EvaluationConfig(judge=JudgeConfig(url="http://127.0.0.1:1/v1", model="stub", seed=4))
    made = make_judge(settings, RunFolder.open(run), "cpu", no_progress)
    assert made is not None
    assert (made.path, made.settings.seed) == (run / "evaluations" / "judge.jsonl", 4)
    (safety,) = named_parts(settings, None, False, ["safety"], judge=made)
    part = judge_part(settings, [], None, "cpu", no_progress, made)
    assert isinstance(safety, SafetyPart)
    assert isinstance(safety.judge, RefusalJudge)
    assert safety.judge.judge is part.judge is made.judge
    assert safety.judge.path == part.path == made.path
    assert make_judge(EvaluationConfig(), None, "cpu", no_progress) is None


@pytest.mark.parametrize(("set_to", "limit"), [(None, 4096), (5, 5)])
def test_a_local_judges_limit_is_its_own_and_what_reaches_it_was_cut(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, set_to: int | None, limit: int
) -> None:
    def answers(forward: Any, tokenizer: Any, prompts: Any, max_new_tokens: int, batch_size: Any) -> list[list[int]]:
        assert max_new_tokens == limit
        return [[5] * (limit - 1), [5] * limit]

    monkeypatch.setattr("tunesmith.workflows.evaluation_parts.generate_greedy", answers)
    settings = EvaluationConfig(judge=JudgeConfig(url=f"local:{tiny_model}", max_completion_tokens=set_to))
    made = make_judge(settings, None, "cpu", no_progress)
    assert made is not None
    chat = [{"role": "user", "content": "which?"}]
    replies = dict(made.judge.replies([chat, chat]))
    assert [reply.cut for reply in replies.values() if isinstance(reply, Reply)] == [False, True]


def test_an_endpoint_judges_both_models(run: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from judge_server import KEY, JudgeServer, prefer_longer

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(prefer_longer) as server:
        judge = {"url": server.url, "model": "stub"}
        result = evaluate(run, questions, gates=["judge_win_rate >= 0%"], changes=SHORT | {"judge": judge})
        asked = len(server.requests)
        again = evaluate(run, questions, changes=SHORT | {"judge": judge})
        assert len(server.requests) == asked, "verdicts are kept in the run folder"
    longer = [len(row["answer"]) - len(row["baseline_answer"]) for row in result["examples"]]
    wins, losses = sum(one > 0 for one in longer), sum(one < 0 for one in longer)
    assert result["metrics"]["judge_win_rate"]["value"] == pytest.approx((wins + (6 - wins - losses) / 2) / 6)
    assert again["metrics"]["judge_win_rate"] == result["metrics"]["judge_win_rate"]
    assert (result["parts"]["judge"]["wins"], result["gate"]["passed"]) == (wins, True)
    lines = (run / "evaluations" / "judge.jsonl").read_text().splitlines()
    assert lines
    assert KEY not in "".join(lines) + json.dumps(result)


def test_a_local_judge_that_says_nothing_readable_is_reported(
    run: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tunesmith.errors import VerificationError

    base = tiny_base(tmp_path_factory)
    judge: dict[str, Any] = {"url": f"local:{base}", "mode": "score", "max_completion_tokens": 4}
    with pytest.raises(VerificationError, match=r"gave no verdict on \d of 6 rows, more than the 10% of max_unjudged"):
        evaluate(run, questions, changes=SHORT | {"judge": judge})
    lines = [json.loads(line) for line in (run / "evaluations" / "judge.jsonl").read_text().splitlines()]
    assert all(line["value"] is None for line in lines)
