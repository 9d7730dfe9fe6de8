"""What an evaluation is held to, goes on from, and consists of besides the questions."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from tiny import chat_rows, make_tiny_model, write_jsonl
from trained import ROWS, copy_run, record_again
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, DataError, ModelError, RunError
from tunesmith.evaluation import subject as subjects
from tunesmith.evaluation.parts import PartResult
from tunesmith.evaluation.statistics import mean
from tunesmith.evaluation.subject import Subject
from tunesmith.workflows import evaluate as workflow
from tunesmith.workflows.evaluate import evaluate

FEW = {"max_rows": 4, "max_new_tokens": 2}


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    return copy_run(lora_run, tmp_path / "run")


# -- gates ------------------------------------------------------------------------------------------------------------


def test_a_gate_that_names_the_baseline_asks_it(run: Path, questions: Path) -> None:
    result = evaluate(run, questions, gates=["accuracy >= baseline - 100pt", "accuracy > 100%"], changes=FEW)
    assert result["baseline"] is not None
    assert result["gate"]["passed"] is False
    first, second = result["gate"]["conditions"]
    assert first == {
        "condition": "accuracy >= baseline - 100pt",
        "metric": "accuracy",
        "sign": ">=",
        "value": result["metrics"]["accuracy"]["value"],
        "needed": result["baseline"]["accuracy"]["value"] - 1,
        "passed": True,
    }
    assert (second["needed"], second["passed"]) == (1.0, False)
    assert json.loads(Path(result["path"]).read_text())["gate"] == result["gate"]


def test_a_gate_on_another_run_compares_the_same_rows(run: Path, questions: Path, tmp_path: Path) -> None:
    other = copy_run(run, tmp_path / "other")
    with pytest.raises(RunError) as caught:
        evaluate(run, questions, gates=["accuracy >= run:other"], changes=FEW)
    assert str(caught.value) == (
        f"gate: {other} has no evaluation with accuracy of these rows ({questions}, 4 of them) with these settings; "
        f"evaluate it first: tunesmith eval {other} --data {questions}"
    )
    evaluate(other, questions, changes=FEW | {"max_rows": 5})
    evaluate(other, questions, changes=FEW | {"task": "regex", "pattern": "."})
    with pytest.raises(RunError, match="has no evaluation with accuracy of these rows"):
        evaluate(run, questions, gates=["accuracy >= run:other"], changes=FEW)
    value = evaluate(other, questions, changes=FEW)["metrics"]["accuracy"]["value"]
    result = evaluate(run, questions, gates=["accuracy >= run:other", f"accuracy >= run:{other} + 1pt"], changes=FEW)
    assert [one["needed"] for one in result["gate"]["conditions"]] == pytest.approx([value, value + 0.01])
    assert [one["passed"] for one in result["gate"]["conditions"]] == [True, False]


def test_wrong_gates_are_named_before_the_model(run: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=r"gate 'accuracy': expected e\.g\."):
        evaluate(run, questions, gates=["accuracy"])
    with pytest.raises(RunError, match=r"gate: there is no run 'absent'; looked at absent, .*/absent, runs/absent"):
        evaluate(run, questions, gates=["accuracy >= run:absent"])
    with pytest.raises(ConfigError, match=r"nothing to evaluate: pass --data FILE"):
        evaluate(run)


# -- going on ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_of_a_run_goes_on(
    run: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the base's answers: the tuned model is not asked again, and the result is that of an uninterrupted one."""
    changes = {"max_new_tokens": 4, "batch_size": 4}
    whole = evaluate(run, questions, baseline=True, changes=changes)
    asked: list[tuple[str, int]] = []
    real = subjects.generate_greedy

    def counting(forward: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        asked.append(("tuned", len(prompts)) if not asked else ("base", len(prompts)))
        return real(forward, tokenizer, prompts, *rest)

    answered = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal answered
        if "base" in stage:
            answered = done - (ROWS - asked[0][1])
        if "base" in stage and 8 <= done < total:
            raise KeyboardInterrupt

    monkeypatch.setattr(subjects, "generate_greedy", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, questions, baseline=True, changes=changes, progress=stop)
    (_, questions_asked), (_, of_the_base) = asked
    assert questions_asked == of_the_base
    assert len(list((run / "evaluations").glob(".unfinished-*.jsonl"))) == 1
    asked.clear()
    again = evaluate(run, questions, baseline=True, changes=changes)
    assert [size for _, size in asked] == [questions_asked - answered]
    assert again["examples"] == whole["examples"]
    assert again["metrics"] == whole["metrics"]
    assert not list((run / "evaluations").glob(".unfinished-*"))


def test_another_adapter_in_the_folder_is_asked_anew(run: Path, questions: Path) -> None:
    """The journal is of these weights: after more training the old answers would be another model's."""

    def stop(stage: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(run, questions, changes=FEW | {"batch_size": 2}, progress=stop)
    from safetensors.torch import load_file, save_file

    weights = run / "adapter" / "adapter_model.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(weights).items()}, weights)
    record_again(run)
    result = evaluate(run, questions, baseline=True, changes=FEW | {"batch_size": 2})
    assert [row["answer"] for row in result["examples"]] == [row["baseline_answer"] for row in result["examples"]]


@pytest.mark.parametrize("what", ["weights", "dtype", "chat_template", "tuned"])
def test_answers_of_other_weights_types_and_templates_are_not_taken(
    run: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    few = FEW | {"batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, questions, changes=few, progress=stop)
    real = workflow.identity_of
    monkeypatch.setattr(workflow, "identity_of", lambda *given: real(*given) | {what: "another"})
    steps: list[int] = []
    evaluate(run, questions, changes=few, progress=lambda stage, done, total: steps.append(done))
    assert steps.count(0) >= 2, "loading, and answers from none on"


def test_answers_of_a_base_are_not_those_of_another(full_run: Path, questions: Path, tmp_path: Path) -> None:
    run = copy_run(full_run, tmp_path / "full")
    other = make_tiny_model(tmp_path / "other", seed=1)

    def stop(stage: str, done: int, total: int) -> None:
        if "base" in stage and done == 4:
            raise KeyboardInterrupt

    few = FEW | {"batch_size": 2}
    right = [row["baseline_answer"] for row in evaluate(run, questions, baseline=True, changes=few)["examples"]]
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, questions, baseline=True, model=other, force=True, changes=few, progress=stop)
    again = evaluate(run, questions, baseline=True, changes=few)
    assert [row["baseline_answer"] for row in again["examples"]] == right


def test_two_models_of_a_full_run_are_never_in_memory_together(
    full_run: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    real = workflow.load

    def loading(*given: Any, **more: Any) -> Any:
        gc.collect()
        assert all(model() is None for model in models)
        loaded = real(*given, **more)
        models.append(weakref.ref(loaded.forward.model))
        return loaded

    monkeypatch.setattr(workflow, "load", loading)
    evaluate(copy_run(full_run, tmp_path / "full"), questions, baseline=True, changes=FEW)
    assert len(models) == 2


def test_an_evaluation_of_a_model_goes_on_too(
    tiny_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))

    def stop(stage: str, done: int, total: int) -> None:
        if 3 <= done < total:
            raise KeyboardInterrupt

    few = FEW | {"batch_size": 2, "max_rows": 10}
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, questions, changes=few, progress=stop)
    steps: list[int] = []
    evaluate(tiny_model, questions, changes=few, progress=lambda stage, done, total: steps.append(done))
    assert min(step for step in steps if step > 1) >= 3
    assert not list((tmp_path / "cache" / "evaluations").iterdir())


def test_the_result_says_what_was_asked(run: Path, questions: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    model = evaluate(run, questions, model=other, force=True, changes=FEW)["model"]
    assert (model["name"], model["forced"], model["adapted"], model["dtype"]) == (str(other), True, True, "fp32")
    assert len(model["weights"]) == len(model["tuned"]) == 64


def test_settings_without_use_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(run, retain=True, changes={"task": "json", "pattern": "x"})
    assert caught.value.problems == [
        "evaluation.task has no effect without --data",
        "evaluation.pattern has no effect without --data",
    ]
    quiz = write_jsonl(tmp_path / "quiz.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 0}] * 2)
    with pytest.raises(ConfigError, match="max_new_tokens has no effect: the task choice generates nothing"):
        evaluate(run, quiz, changes={"max_new_tokens": 3})
    with pytest.raises(ConfigError, match="gate 'bleu > 3': the task choice has no metric bleu"):
        evaluate(run, quiz, gates=["bleu > 3"])


# -- other tasks ------------------------------------------------------------------------------------------------------


def test_questions_with_choices_are_scored_by_likelihood(run: Path, tmp_path: Path) -> None:
    rows = [{"question": f"number {n}?", "choices": ["one", "two", "three"], "answer": n % 3} for n in range(9)]
    result = evaluate(run, write_jsonl(tmp_path / "quiz.jsonl", rows), baseline=True)
    assert (result["task_kind"], result["task_reason"]) == ("choice", "the rows have choices")
    assert {row["answer"] for row in result["examples"]} <= {"A", "B", "C"}
    assert result["metrics"]["accuracy"]["value"] == sum(row["correct"] for row in result["examples"]) / 9
    assert result["comparison"]["accuracy"]["test"] == "McNemar"


def test_plain_text_has_a_loss(run: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(row["messages"][0]["content"] for row in chat_rows(n))} for n in (2, 4, 6)]
    result = evaluate(run, write_jsonl(tmp_path / "prose.jsonl", rows), gates=["loss <= baseline * 2"])
    assert result["task_kind"] == "perplexity"
    assert list(result["metrics"]) == ["loss", "perplexity", "bits_per_byte"]
    assert result["comparison"]["loss"]["test"] == "randomization"
    tokens = sum(row["tokens"] for row in result["examples"])
    weighted = sum(row["tokens"] * row["loss"] for row in result["examples"]) / tokens
    assert result["metrics"]["loss"]["value"] == pytest.approx(weighted)
    assert result["gate"]["passed"] is True


def test_a_file_without_rows_is_refused(run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="empty"):
        evaluate(run, empty)


# -- parts ------------------------------------------------------------------------------------------------------------


class Lengths:
    """A part that measures prompts' answers by their length."""

    name = "lengths"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.checked = False

    def check(self, chat: ChatFormat) -> None:
        self.checked = True

    def ask(self, subject: Subject) -> list[int]:
        assert self.checked
        self.asked.append(subject.name)
        return [len(text) for text in subject.generate([[5, 6, 7], [8, 9]], "lengths", 3)]

    def score(self, tuned: list[int], base: list[int] | None) -> PartResult:
        of = {"length": mean(tuned, share=False)}
        return PartResult(of, {"length": mean(base, share=False)} if base else None, details={"advice": ["longer"]})


def test_a_part_stands_in_the_same_table(run: Path, questions: Path) -> None:
    part = Lengths()
    result = evaluate(run, questions, parts=[part], gates=["length >= baseline * 0"], changes=FEW)
    assert part.asked == ["tuned", "base"]
    assert list(result["metrics"])[-1] == "length"
    assert set(result["baseline"]) == set(result["metrics"]) == set(result["comparison"])
    assert result["parts"] == {"lengths": {"advice": ["longer"]}}
    assert result["gate"]["passed"]


def test_two_metrics_of_one_name_are_refused(run: Path, questions: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def length(row):\n    return 1\n")
    with pytest.raises(ConfigError, match="the metric length is measured by task and by lengths; rename your own"):
        evaluate(run, questions, parts=[Lengths()], changes=FEW | {"metrics": [f"{own}:length"]})


def test_a_part_needs_no_questions(run: Path) -> None:
    result = evaluate(run, parts=[Lengths()])
    assert (result["task"], result["n"], result["data"], result["task_kind"]) == ("lengths", 2, None, None)
    assert Path(result["path"]).name == "lengths.json"


def test_another_base_is_measured_when_forced(run: Path, questions: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match=r"are not those that .* was trained on .*`tunesmith eval --force` measures"):
        evaluate(run, questions, model=other, changes=FEW)
    own = evaluate(run, questions, changes=FEW)
    forced = evaluate(run, questions, model=other, force=True, changes=FEW)
    assert [row["answer"] for row in forced["examples"]] != [row["answer"] for row in own["examples"]]
