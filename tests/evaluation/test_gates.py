"""Conditions: what they need, what passes, what is no condition."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tunesmith.errors import ConfigError
from tunesmith.evaluation.gates import check_gates, parse_gates

METRICS: dict[str, dict[str, Any]] = {
    "accuracy": {"value": 0.75, "share": True},
    "macro_f1": {"value": 0.70, "share": True},
    "loss": {"value": 2.0, "share": False},
    "arc_easy.acc": {"value": 0.4, "share": True},
    "refusal_safe": {"value": 0.1, "share": True},
}
BASE: dict[str, dict[str, Any]] = {"accuracy": {"value": 0.70}, "loss": {"value": 2.5}, "refusal_safe": {"value": 0.05}}
OTHER: dict[str, dict[str, Any]] = {"accuracy": {"value": 0.80}, "macro_f1": {"value": 0.65}}


@pytest.mark.parametrize(
    ("text", "needed", "passed"),
    [
        ("accuracy >= 0.75", 0.75, True),
        ("accuracy>=75%", 0.75, True),
        ("accuracy > 75%", 0.75, False),
        ("accuracy >= 76 %", 0.76, False),
        ("accuracy >= baseline + 5pt", 0.75, True),  # 0.7 + 0.05 in binary is above 0.75
        ("accuracy >= baseline + 5.1pt", 0.751, False),
        ("accuracy >= baseline", 0.70, True),
        ("accuracy >= baseline - 2 pt", 0.68, True),
        ("accuracy >= baseline * 1.1", 0.77, False),
        ("accuracy >= baseline + 0.05", 0.75, True),
        ("loss <= baseline", 2.5, True),
        ("loss <= baseline * 0.8", 2.0, True),
        ("loss < 2", 2.0, False),
        ("loss <= baseline - 0.6", 1.9, False),
        ("f1 >= run:other", 0.65, True),
        ("macro_f1 >= run:runs/other + 5pt", 0.70, True),
        ("accuracy >= run:other - 5pt", 0.75, True),
        ("arc_easy.acc > .39", 0.39, True),
        ("refusal_safe <= baseline + 4pt", 0.09, False),
    ],
)
def test_conditions(text: str, needed: float, passed: bool) -> None:
    asked: list[str] = []

    def of_run(name: str, metric: str) -> dict[str, dict[str, Any]]:
        asked.append(name)
        return OTHER

    (outcome,) = check_gates(parse_gates([text]), METRICS, BASE, of_run)
    assert outcome.needed == pytest.approx(needed)
    assert outcome.passed is passed
    assert outcome.as_json()["condition"] == text
    assert asked == ([text.split("run:")[1].split(" ")[0]] if "run:" in text else [])


def test_every_wrong_condition_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_gates(
            ["accuracy", "accuracy = 3", "accuracy >= baseline + 5%", "loss <= baseline * 2pt", "accuracy >= 1"]
        )
    form = 'expected e.g. "accuracy >= 0.9", "accuracy >= baseline + 5pt" or "macro_f1 >= run:NAME - 1pt"'
    assert caught.value.problems == [
        f"gate 'accuracy': {form}",
        f"gate 'accuracy = 3': {form}",
        "gate 'accuracy >= baseline + 5%': 5% of what? Write `+ 5pt` for percentage points, or `* 1.05` for a factor",
        "gate 'loss <= baseline * 2pt': 2pt of what? Write `+ 2pt` for percentage points, or `* 1.05` for a factor",
    ]


def test_what_was_not_measured_is_named() -> None:
    conditions = parse_gates(["bleu >= 3", "macro_f1 >= baseline", "loss <= 5%", "arc_easy.acc >= run:other"])
    with pytest.raises(ConfigError) as caught:
        check_gates(conditions, METRICS, BASE, lambda name, metric: OTHER)
    assert caught.value.problems == [
        "gate 'bleu >= 3': this evaluation has no metric bleu; it has accuracy, macro_f1, loss, arc_easy.acc, refusal_safe",
        "gate 'macro_f1 >= baseline': the baseline has no metric macro_f1; it has accuracy, loss, refusal_safe",
        "gate 'loss <= 5%': loss is no share of 1; write a number without %, pt",
        "gate 'arc_easy.acc >= run:other': run other has no metric arc_easy.acc; it has accuracy, macro_f1",
    ]


@pytest.mark.parametrize(
    ("text", "written"),
    [("accuracy >= 90", "90 is beyond it; write 90%"), ("accuracy >= baseline - 5", "5 is beyond it; write 5pt"),
     ("refusal_safe <= baseline + 2", "2 is beyond it; write 2pt")],
)  # fmt: skip
def test_a_forgotten_unit_is_refused(text: str, written: str) -> None:
    """`accuracy >= baseline - 5` would pass whatever happened."""
    with pytest.raises(ConfigError, match=rf"gate '{re.escape(text)}': \w+ is a share of 1, {written}"):
        check_gates(parse_gates([text]), METRICS, BASE, lambda name, metric: OTHER)


def test_a_value_that_is_not_finite_is_no_bar() -> None:
    nothing: dict[str, dict[str, Any]] = {"loss": {"value": None}}
    with pytest.raises(ConfigError, match="loss of run other is not a finite number"):
        check_gates(parse_gates(["loss <= run:other"]), METRICS, None, lambda name, metric: nothing)


def test_a_metric_of_ones_own_that_is_called_f1_is_meant() -> None:
    own: dict[str, dict[str, Any]] = METRICS | {"f1": {"value": 1.0, "share": True}}
    (outcome,) = check_gates(parse_gates(["f1 >= 99%"]), own, None, lambda name, metric: OTHER)
    assert (outcome.passed, outcome.value) == (True, 1.0)
