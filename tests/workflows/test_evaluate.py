"""Evaluating: what is asked of whom, what is written, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny import chat_rows, make_tiny_model, write_jsonl
from trained import ROWS, copy_run, tiny_run
from tunesmith.config import EvaluationConfig
from tunesmith.data.formats import read_examples
from tunesmith.errors import ConfigError, DataError, ModelError, RunError
from tunesmith.evaluation import answers, subject
from tunesmith.evaluation.metrics import is_correct, is_exact
from tunesmith.evaluation.statistics import mcnemar
from tunesmith.files import sha256_file
from tunesmith.workflows import evaluate as workflow
from tunesmith.workflows.evaluate import evaluate


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    return copy_run(lora_run, tmp_path / "run")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[list[int]], int]]:
    """Every call of the generator: which weights answered, the prompts, the limit."""
    calls: list[tuple[str, list[list[int]], int]] = []
    real = subject.generate_greedy

    def spy(forward: Any, tokenizer: Any, prompts: Any, max_new_tokens: int, *rest: Any) -> Any:
        layers = [module for module in forward.model.modules() if hasattr(module, "lora_A")]
        who = "tuned" if layers and not layers[0].disable_adapters else "plain"
        calls.append((who, [list(prompt) for prompt in prompts], max_new_tokens))
        return real(forward, tokenizer, prompts, max_new_tokens, *rest)

    monkeypatch.setattr(subject, "generate_greedy", spy)
    return calls


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_result_of_a_run_is_written_with_all_it_takes_to_repeat_it(run: Path, questions: Path) -> None:
    result = evaluate(str(run), str(questions), baseline=True)
    path = run / "evaluations" / "bins.json"
    assert result.pop("path") == str(path)
    assert json.loads(path.read_text()) == result
    assert list(result) == [
        "task",
        "task_kind",
        "task_reason",
        "n",
        "metrics",
        "baseline",
        "comparison",
        "gate",
        "data",
        "data_sha256",
        "rows_in_file",
        "sample_seed",
        "created",
        "model",
        "settings",
        "classes",
        "parts",
        "examples",
    ]
    assert (result["task"], result["n"], result["gate"]) == ("bins", ROWS, None)
    assert (result["data"], result["data_sha256"]) == (str(questions), sha256_file(questions))
    assert (result["rows_in_file"], result["sample_seed"]) == (ROWS, None)
    assert (result["task_kind"], result["task_reason"], result["parts"]) == ("label", "4 short answers, 16 rows", {})
    asked = EvaluationConfig(max_new_tokens=8).model_dump(mode="json", exclude={"generate", "samples"})
    assert result["settings"] == {"decoding": "greedy", **asked}
    rows = result["examples"]
    assert [row["line"] for row in rows] == list(range(1, ROWS + 1))
    for side, answer, correct in (
        ("metrics", "answer", "correct"),
        ("baseline", "baseline_answer", "baseline_correct"),
    ):
        accuracy = sum(row[correct] for row in rows) / ROWS
        exact = sum(is_exact(row["expected"], row[answer]) for row in rows) / ROWS
        assert all(row[correct] == is_correct(row["expected"], row[answer]) for row in rows)
        about = {"n": ROWS, "higher_is_better": True, "share": True}
        assert {name: result[side][name] for name in ("accuracy", "exact_match")} == {
            "accuracy": about | {"value": accuracy, "stderr": pytest.approx((accuracy * (1 - accuracy) / ROWS) ** 0.5)},
            "exact_match": about | {"value": exact, "stderr": pytest.approx((exact * (1 - exact) / ROWS) ** 0.5)},
        }
    better = sum(row["correct"] and not row["baseline_correct"] for row in rows)
    worse = sum(row["baseline_correct"] and not row["correct"] for row in rows)
    found = result["comparison"]["accuracy"]
    assert found["difference"] == pytest.approx((better - worse) / ROWS)
    assert (found["test"], found["p"]) == ("McNemar", mcnemar(better, worse))
    assert list(result["comparison"]) == ["accuracy", "exact_match", "macro_f1", "micro_f1"]
    assert [row["answer"] for row in rows] != [row["baseline_answer"] for row in rows]


def test_an_earlier_result_is_never_overwritten(run: Path, questions: Path) -> None:
    paths = [
        evaluate(str(run), str(questions), changes={"max_rows": count, "max_new_tokens": 2})["path"]
        for count in (3, 2, 1)
    ]
    folder = run / "evaluations"
    assert paths == [str(folder / name) for name in ("bins.json", "bins-2.json", "bins-3.json")]
    assert [json.loads(Path(path).read_text())["n"] for path in paths] == [3, 2, 1]


def test_a_task_name_makes_a_file_name(run: Path, questions: Path, tmp_path: Path) -> None:
    odd = tmp_path / "my bins (v2) 테스트.jsonl"
    odd.write_bytes(questions.read_bytes())
    result = evaluate(str(run), str(odd), changes={"max_rows": 1, "max_new_tokens": 1})
    assert Path(result["path"]).name == "my-bins-v2-테스트.json"
    assert result["task"] == "my bins (v2) 테스트"


def test_a_model_has_no_folder_to_write_to(tiny_model: Path, questions: Path) -> None:
    before = sorted(tiny_model.iterdir())
    result = evaluate(str(tiny_model), str(questions), changes={"max_new_tokens": 2}, dtype="fp32")
    assert "path" not in result
    assert (result["baseline"], result["comparison"]) == (None, None)
    assert result["examples"][0]["baseline_answer"] is None
    assert sorted(tiny_model.iterdir()) == before


def test_a_place_that_cannot_be_written(run: Path, questions: Path) -> None:
    (run / "evaluations").write_text("a file")
    with pytest.raises(RunError) as caught:
        evaluate(str(run), str(questions), changes={"max_rows": 1, "max_new_tokens": 1})
    assert str(caught.value) == (f"{run / 'evaluations'}: cannot be written (File exists); choose another folder")


# -- who is asked what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["auto", "none", "alpaca"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_base_and_tuned_get_the_same_prompts(
    method: str,
    template: str,
    questions: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    asked: list[Any],
) -> None:
    values = {} if template == "auto" else {"data.chat_template": template}
    run = copy_run(tiny_run(tmp_path_factory, method, **values), tmp_path / "run")
    evaluate(str(run), str(questions), baseline=True, changes={"max_rows": 4, "max_new_tokens": 3})
    (first, tuned_prompts, tuned_limit), (second, base_prompts, base_limit) = asked
    assert tuned_prompts == base_prompts
    assert (tuned_limit, base_limit, len(base_prompts)) == (3, 3, 4)
    assert (first, second) == (("tuned", "plain") if method == "lora" else ("plain", "plain"))
    begins = {"auto": b"<|im_start|>user", "none": b"Which bin", "alpaca": b"### Instruction:"}[template]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "model" if method == "full" else run_base(run))
    assert tokenizer.decode(base_prompts[0]).encode().startswith(begins)


def run_base(run: Path) -> str:
    from tunesmith.runs import RunFolder

    return RunFolder.open(run).config.model.name


def test_the_baseline_is_what_the_base_alone_answers(
    run: Path, full_run: Path, questions: Path, tmp_path: Path
) -> None:
    changes = {"max_rows": 4, "max_new_tokens": 6}
    base = evaluate(run_base(run), str(questions), changes=changes, dtype="fp32")
    alone = [row["answer"] for row in base["examples"]]
    for folder in (run, copy_run(full_run, tmp_path / "full")):
        result = evaluate(str(folder), str(questions), baseline=True, changes=changes)
        assert [row["baseline_answer"] for row in result["examples"]] == alone
        assert [row["answer"] for row in result["examples"]] != alone
        assert result["baseline"] == base["metrics"]


def test_the_baseline_of_a_full_run_computes_in_the_runs_type(
    full_run: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    real = subject.generate_greedy
    monkeypatch.setattr(
        subject, "generate_greedy", lambda forward, *rest: used.append(forward.dtype) or real(forward, *rest)
    )
    run = copy_run(full_run, tmp_path / "run")
    evaluate(str(run), str(questions), baseline=True, changes={"max_rows": 1, "max_new_tokens": 1})
    assert used == ["fp32", "fp32"]


def test_a_sample_is_the_same_at_every_evaluation(run: Path, questions: Path, asked: list[Any]) -> None:
    first = evaluate(str(run), str(questions), changes={"max_rows": 5, "max_new_tokens": 1})
    second = evaluate(str(run), str(questions), changes={"max_rows": 5, "max_new_tokens": 1, "batch_size": 2})
    assert asked[0] == asked[1]
    lines = [row["line"] for row in first["examples"]]
    assert lines == [row["line"] for row in second["examples"]]
    assert lines == [row.line for row in answers.sample_rows(read_examples(questions).examples, 5)]
    assert (first["n"], first["rows_in_file"], first["sample_seed"]) == (5, ROWS, 0)


def test_answers_depend_on_the_batch_size_by_rounding_only(run: Path, questions: Path) -> None:
    first = evaluate(str(run), str(questions), changes={"batch_size": 1})
    second = evaluate(str(run), str(questions), changes={"batch_size": 16})
    assert first["examples"] == second["examples"]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_base_model_has_no_baseline(tiny_model: Path, questions: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(str(tiny_model), str(questions), baseline=True)
    assert str(caught.value) == (
        f"{tiny_model} is itself a base model: there is no other to compare with; leave --baseline out"
    )


def test_data_is_looked_at_before_the_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "prose"}\n')
    for path, problem in (
        (tmp_path / "absent.jsonl", "no such file"),
        (text, "1: plain text has no question to answer; only the task perplexity takes it"),
    ):
        with pytest.raises(DataError) as caught:
            evaluate(str(run), str(path), changes={"task": "label"})
        assert caught.value.problems == [f"{path}:{' ' if 'absent' in path.name else ''}{problem}"]


def test_a_question_that_cannot_be_asked_is_found_before_the_weights_are_read(
    run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.workflows import load as loading

    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    rows = chat_rows(5)
    for line in (2, 4):
        rows[line - 1]["messages"][0]["content"] += "\ufdd0"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for target in (run, tiny_model):
        with pytest.raises(DataError) as caught:
            evaluate(target, path)
        assert caught.value.problems == [
            f"{path}:{line}: the user text holds a Unicode noncharacter (U+FDD0 to U+FDD9); remove it"
            for line in (2, 4)
        ]


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        (
            {"max_row": 3, "batch_size": 0, "max_new_tokens": None},
            [
                "`evaluation.max_new_tokens` is null: input should be a valid integer",
                "`evaluation.batch_size` is 0: input should be greater than or equal to 1 or 'auto'",
                "unknown key `evaluation.max_row`; did you mean `evaluation.max_rows`?",
            ],
        ),
        ({"generate": True}, ["evaluation.generate has no effect here: answers are always generated; remove it"]),
    ],
)
def test_wrong_changes_are_named(
    run: Path, questions: Path, changes: dict[str, Any], problems: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError) as caught:
        evaluate(run, questions, changes=changes)
    assert caught.value.problems == problems


def test_paths_and_strings_are_the_same(run: Path, tiny_model: Path, questions: Path) -> None:
    changes = {"max_rows": 1, "max_new_tokens": 1}
    for target, model in ((run, Path(run_base(run))), (tiny_model, None)):
        given = evaluate(target, questions, model=model, changes=changes)
        result = evaluate(str(target), str(questions), model=str(model) if model else None, changes=changes)
        assert given["data"] == result["data"] == str(questions)
        assert given["examples"] == result["examples"]


def test_a_full_run_has_no_use_for_another_base(full_run: Path, questions: Path, tmp_path: Path) -> None:
    run = copy_run(full_run, tmp_path / "run")
    with pytest.raises(ModelError) as caught:
        evaluate(run, questions, model=run_base(run))
    assert str(caught.value) == (
        f"{run}: a full fine-tuning has its own model; --model names its base, which only a comparison with the base "
        "(eval --baseline) needs; leave it out"
    )
    result = evaluate(run, questions, model=run_base(run), baseline=True, changes={"max_rows": 1, "max_new_tokens": 1})
    assert result["baseline"]


def test_the_base_of_a_full_run_must_be_the_one_it_started_from(
    full_run: Path, questions: Path, tmp_path: Path
) -> None:
    run = copy_run(full_run, tmp_path / "run")
    other = make_tiny_model(tmp_path / "other", seed=1)
    config = (run / "config.yaml").read_text().replace(run_base(run), str(other))
    (run / "config.yaml").write_text(config)
    evaluate(str(run), str(questions), changes={"max_rows": 1, "max_new_tokens": 1})
    with pytest.raises(ModelError, match=r"are not those that .* was trained on"):
        evaluate(str(run), str(questions), baseline=True, changes={"max_rows": 1, "max_new_tokens": 1})
