"""Forgetting: what is asked, what dropped, and what the report says to change."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiny import make_tokenizer, write_jsonl
from tunesmith.config import RunConfig, load_config
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation.choices import Picked, plain_requests
from tunesmith.evaluation.retain import RetainPart, _in_proportion, advice
from tunesmith.hardware import probe
from tunesmith.models.forward import ModelForward
from tunesmith.models.likelihood import Likelihood, log_likelihoods

TOKENIZER = make_tokenizer()
CHAT = ChatFormat(TOKENIZER)


class Scripted:
    """A subject that finds the right choice the most likely, but for the questions whose numbers are given."""

    tokenizer, chat = TOKENIZER, CHAT

    def __init__(self, part: RetainPart, wrong: Sequence[int] = ()):
        self.part, self.wrong = part, set(wrong)
        self.asked: list[Any] = []
        self.stages: list[str] = []

    def log_likelihoods(self, requests: Any, stage: str) -> list[Likelihood]:
        self.asked.append([(tuple(context), tuple(continuation)) for context, continuation in requests])
        self.stages.append(stage)
        found = []
        for number, question in enumerate(self.part.questions):
            picked = (question.answer + (number in self.wrong)) % len(question.choices)
            found += [
                Likelihood(-1.0 if place == picked else -500.0, 1, False, 0) for place in range(len(question.choices))
            ]
        assert len(found) == len(requests)
        return found


def result_of(part: RetainPart, tuned: Sequence[int], base: Sequence[int] | None = ()) -> Any:
    part.check(CHAT)
    before = part.ask(Scripted(part, base)) if base is not None else None  # type: ignore[arg-type]
    return part.score(part.ask(Scripted(part, tuned)), before)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def part() -> RetainPart:
    return RetainPart()


# -- the mix ----------------------------------------------------------------------------------------------------------


def test_the_shipped_mix(part: RetainPart) -> None:
    assert Counter(question.group for question in part.questions) == {"mmlu": 285, "openbookqa": 500, "copa": 100}
    first = part.questions[0]
    assert first.question == "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field."
    assert (first.choices, first.answer, first.id) == (("0", "1", "2", "3"), 1, "abstract_algebra/dev/0")
    copa = next(question for question in part.questions if question.group == "copa")
    assert (copa.question, copa.choices[copa.answer]) == (
        "The man turned on the faucet, therefore",
        "water flowed from the spout.",
    )


def test_the_shipped_files_are_as_published_and_have_their_licences() -> None:
    """The first 16 digits of each file's SHA-256, its licence in the attribution, and that licence's text beside it."""
    sets = Path(str(resources.files("tunesmith.evaluation").joinpath("sets")))
    attribution, licences = (sets / "ATTRIBUTION.md").read_text("utf-8"), (sets / "LICENSES.md").read_text("utf-8")
    published = {
        "mmlu_dev.jsonl": ("a00978103eba4ab4", "MIT", "Copyright (c) 2020 Dan Hendrycks"),
        "openbookqa.jsonl": ("00b89a2904a8518a", "Apache-2.0", "APACHE-2.0.md"),
        "copa.jsonl": ("73a4fa26933c4bf7", "BSD-2-Clause", "Copyright (c) 2010, University of Southern California"),
        "xstest.jsonl": ("cc01a631d1803f35", "CC-BY-4.0", "https://creativecommons.org/licenses/by/4.0/"),
    }
    assert {path.name for path in sets.glob("*.jsonl")} == set(published)
    for name, (digest, licence, text) in published.items():
        content = (sets / name).read_bytes()
        assert hashlib.sha256(content).hexdigest()[:16] == digest, name
        (line,) = [line for line in attribution.splitlines() if line.startswith(f"| `{name}`")]
        assert f"| {len(content.splitlines())} |" in line
        assert licence in line
        assert text in licences
    assert "Apache License" in (sets / "APACHE-2.0.md").read_text("utf-8")


# -- values -----------------------------------------------------------------------------------------------------------


def test_retain_is_the_share_of_all_rows(part: RetainPart) -> None:
    wrong = [0, 1, 2, 284, 285, 286, 785]  # four of MMLU's 285, two of OpenBookQA's 500, one of COPA's 100
    found = result_of(part, wrong)
    assert {name: value.value for name, value in found.metrics.items()} == {
        "retain": pytest.approx(878 / 885),
        "retain.mmlu": pytest.approx(281 / 285),
        "retain.openbookqa": pytest.approx(498 / 500),
        "retain.copa": pytest.approx(99 / 100),
    }
    assert {name: value.value for name, value in found.baseline.items()} == dict.fromkeys(found.metrics, 1.0)
    assert found.differences == {}
    mmlu = found.details["sets"]["retain.mmlu"]
    assert (mmlu["n"], mmlu["form"], mmlu["scored_by"], mmlu["lost"], mmlu["gained"]) == (285, "letters", "acc", 4, 0)
    assert (mmlu["chance"], found.details["sets"]["retain.copa"]["chance"]) == (pytest.approx(0.25), pytest.approx(0.5))
    assert json.loads(json.dumps(found.details)) == found.details


def test_each_set_has_its_own_score(part: RetainPart) -> None:
    """By length is OpenBookQA's, by total the others'."""
    picked = [
        Picked(row.answer, (row.answer + 1) % len(row.choices)) for row in part.questions
    ]  # right by total, wrong by length
    values = {name: found.value for name, found in part.score(picked, None).metrics.items()}
    assert values == {
        "retain": pytest.approx(385 / 885),
        "retain.mmlu": 1.0,
        "retain.openbookqa": 0.0,
        "retain.copa": 1.0,
    }


def test_without_a_base_nothing_is_compared(part: RetainPart) -> None:
    found = result_of(part, [3], base=None)
    assert found.baseline is None
    assert "dropped" not in found.details
    assert "advice" not in found.details


def test_both_models_get_the_same_prompts(part: RetainPart) -> None:
    tuned, base = Scripted(part, [1]), Scripted(part)
    part.ask(tuned)  # type: ignore[arg-type]
    part.ask(base)  # type: ignore[arg-type]
    assert tuned.asked == base.asked
    assert tuned.stages == ["general questions"]
    assert len(tuned.asked[0]) == 285 * 4 + 500 * 4 + 100 * 2
    expected = plain_requests(TOKENIZER, part.questions[:1], "letters")
    assert tuned.asked[0][:4] == [(tuple(context), tuple(continuation)) for context, continuation in expected]
    again = Scripted(RetainPart(), [1])
    again.part.ask(again)  # type: ignore[arg-type]
    assert again.asked == tuned.asked, "another evaluation asks the same"


# -- what dropped -----------------------------------------------------------------------------------------------------


def test_a_clear_drop_has_advice_and_examples(part: RetainPart) -> None:
    found = result_of(part, range(285, 297)).details  # 12 of 885: 1.4 points, but p = 2 / 2^12
    assert found["dropped"] is True
    assert found["what_dropped"] == ["retain", "retain.openbookqa"]
    assert found["advice"] == advice(None)
    assert len(found["lost"]) == 5
    row = part.questions[285]
    assert found["lost"][0] == {
        "set": "openbookqa",
        "id": row.id,
        "question": row.question,
        "right": row.choices[row.answer],
        "picked": row.choices[(row.answer + 1) % 4],
    }


def test_few_lost_rows_are_no_drop(part: RetainPart) -> None:
    found = result_of(part, [0, 300, 800], [1, 301]).details
    assert (found["dropped"], found["what_dropped"], found["advice"], found["lost"]) == (False, [], [], [])


def test_a_drop_of_more_than_the_stated_one_counts_where_the_test_is_not_sure() -> None:
    """Of 100 rows 4 are lost and 1 is won: p is 0.375, but 3 points are more than 2."""
    part = RetainPart(limit=100)
    found = result_of(part, [1, 2, 3, 4], [0])
    assert found.details["dropped"] is True
    assert found.details["what_dropped"] == []
    (note,) = [note for note in found.details["notes"] if note.startswith("retain dropped")]
    assert note == ("retain dropped by 0.030, more than 0.020, but 100 questions are too few to be sure (p 0.38)")
    assert result_of(part, [1, 2, 3], [0]).details["dropped"] is False, "2 points are not more than 2"
    assert result_of(RetainPart(limit=100, max_drop=0.03), [1, 2, 3, 4], [0]).details["dropped"] is False


def test_a_set_that_the_base_only_guesses_says_so(part: RetainPart) -> None:
    guessed = [number for number in range(285) if number % 4]  # a quarter is right
    notes = result_of(part, guessed, guessed).details["notes"]
    assert len(notes) == 1
    assert notes[0].startswith("retain.mmlu: 0.253 is not clearly above chance (0.250)")


# -- advice -----------------------------------------------------------------------------------------------------------


def run_of(**values: Any) -> RunConfig:
    return load_config(values={"model.name": "m", "data.path": "d.jsonl", **values})


def test_advice_names_the_runs_settings() -> None:
    high = advice(run_of(**{"optimizer.lr": 1e-3, "training.epochs": 5, "adapter.r": 64}))
    usual = run_of().usual_lr
    assert high == [
        f"optimizer.lr is 0.001, above the default for lora ({usual:g}): go back to that",
        "training.epochs is 5: try fewer; data.general_path shows at each evaluation when forgetting begins",
        "adapter.r is 64: try 32",
        "mix general examples with yours: data.mix: [{path: TASK.jsonl, weight: 0.9}, {path: GENERAL.jsonl, weight: 0.1}]",
    ]
    low = advice(run_of(**{"method": "full", "training.epochs": 1, "optimizer.lr": 1e-6}))
    assert low[:2] == [
        "optimizer.lr is 1e-06: try 5e-07",
        "method is full: lora changes less of the model (method: lora)",
    ]
    assert len(low) == 3


def test_advice_for_a_run_that_mixes_already() -> None:
    mix = [{"path": "task.jsonl", "weight": 0.9}, {"path": "general.jsonl", "weight": 0.1}]
    run = load_config(values={"model.name": "m", "data.mix": mix})
    assert advice(run)[-1] == "data.mix: give the source with general examples a larger weight"


def test_the_part_gives_the_runs_advice() -> None:
    part = RetainPart(limit=50, run=run_of(**{"adapter.r": 32}))
    assert "adapter.r is 32: try 16" in result_of(part, range(20)).details["advice"]


# -- fewer questions, other questions ---------------------------------------------------------------------------------


def test_a_limit_takes_of_each_set_in_proportion_and_spreads() -> None:
    part = RetainPart(limit=177)  # a fifth
    assert Counter(row.group for row in part.questions) == {"mmlu": 57, "openbookqa": 100, "copa": 20}
    subjects = {row.id.split("/")[0] for row in part.questions if row.group == "mmlu"}
    assert len(subjects) == 57, "one of each subject"
    assert part.questions == RetainPart(limit=177).questions
    assert RetainPart(limit=10_000).questions == RetainPart().questions


@pytest.mark.parametrize(
    ("limit", "counts"),
    [(None, [285, 500, 100]), (1, [0, 1, 0]), (2, [1, 1, 0]), (9, [3, 5, 1]), (884, [285, 499, 100])],
)
def test_proportions(limit: int | None, counts: list[int]) -> None:
    assert _in_proportion([285, 500, 100], limit) == counts


def test_a_limit_that_leaves_a_set_out() -> None:
    found = result_of(RetainPart(limit=2), [])
    assert set(found.metrics) == {"retain", "retain.mmlu", "retain.openbookqa"}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "choices": ["x", "y"], "answer": "A"} for n in range(4)]
    part = RetainPart(path=str(write_jsonl(tmp_path / "own.jsonl", rows)))
    found = result_of(part, [0])
    assert {name: value.value for name, value in found.metrics.items()} == {"retain": 0.75}
    assert (found.details["asked"], found.details["sets"], found.details["file"]) == (
        4,
        {},
        str(tmp_path / "own.jsonl"),
    )
    right_by_length = [Picked(1, 0)] * 4
    assert part.score(right_by_length, None).metrics["retain"].value == 1.0


def test_wrong_settings_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^retain: limit is 0: expected 1 or more questions"):
        RetainPart(limit=0)
    with pytest.raises(ConfigError, match=r"^retain: max_drop is 2: expected a fraction from 0 to below 1"):
        RetainPart(max_drop=2)
    with pytest.raises(DataError, match="no such file"):
        RetainPart(path=str(tmp_path / "none.jsonl")).check(CHAT)
    path = write_jsonl(tmp_path / "own.jsonl", [{"question": "q", "choices": ["x", "y"], "answer": "C"}])
    with pytest.raises(DataError, match=r"own\.jsonl:1: .*answer"):
        RetainPart(path=str(path)).check(CHAT)


# -- a model ----------------------------------------------------------------------------------------------------------


def test_a_model_that_learned_the_answers(tmp_path: Path, tiny_model: Path) -> None:
    """Trained on the right choices it retains them all; a random one does not."""
    import torch

    from tunesmith.config import ModelConfig
    from tunesmith.models.load import find_model, load_model, load_tokenizer

    things = ["red", "green", "blue", "black"]
    rows = [{"question": f"Colour number {n} is", "choices": things, "answer": (n * 7 + n // 3) % 4} for n in range(12)]
    part = RetainPart(path=str(write_jsonl(tmp_path / "own.jsonl", rows)))
    config = ModelConfig(name=str(tiny_model))
    source = find_model(config)
    model: Any = load_model(source, config, probe("cpu"), "fp32")
    tokenizer = load_tokenizer(source, config)
    forward = ModelForward(model, "cpu", "fp32")
    subject: Any = SimpleNamespace(
        tokenizer=tokenizer,
        chat=ChatFormat(tokenizer),
        log_likelihoods=lambda requests, stage: log_likelihoods(forward, requests, 8),
    )
    base = part.ask(subject)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    texts = [tokenizer(f"{row['question']} {things[row['answer']]}")["input_ids"] for row in rows]  # type: ignore[index]
    for _ in range(150):
        for length in {len(ids) for ids in texts}:
            ids = torch.tensor([found for found in texts if len(found) == length])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = part.score(part.ask(subject), base)
    assert found.metrics["retain"].value == 1.0
    assert found.baseline is not None
    assert found.baseline["retain"].value < 0.7
