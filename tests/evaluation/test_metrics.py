"""Scores and their standard errors, to the last digit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.evaluation.metrics import is_correct, is_exact, normalize, score
from tunesmith.types import EvalResult, Generation


def row(expected: str, answer: str) -> Generation:
    return Generation("question", expected, answer, is_correct(expected, answer), 1)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("card_arrival", "card_arrival"),
        (' "Card_Arrival". ', "card_arrival"),
        ("  two \n\t words  ", "two words"),
        ("`code`", "code"),
        ("'Yes!'", "yes"),
        ("Label: ;", "label"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),  # folded, not only lowered
        ("don't", "don't"),  # inside, punctuation stays
        ("3.5", "3.5"),
        (" .,;:!'\"` ", ""),
        ("", ""),
        ("(a)", "(a)"),
        ("종이", "종이"),
        ("what?", "what?"),
    ],
)
def test_normalize(answer: str, label: str) -> None:
    assert normalize(answer) == label


@given(st.text())
def test_normalizing_ignores_case_and_the_white_space_around(text: str) -> None:
    assert normalize(f" \n{text}\t") == normalize(text)
    assert is_correct(text, text)
    assert is_exact(text, f" {text}\n")


@pytest.mark.parametrize(
    ("expected", "answer", "correct", "exact"),
    [
        ("paper", "paper", True, True),
        ("paper", " paper\n", True, True),
        ("paper", "Paper.", True, False),
        ("paper", "The paper bin", False, False),  # an answer that says more than the label is wrong
        ("paper", "pape", False, False),
        ("paper", "", False, False),
        ("two words", "two  words", True, False),
    ],
)
def test_accuracy_folds_and_exact_match_does_not(expected: str, answer: str, correct: bool, exact: bool) -> None:
    assert is_correct(expected, answer) is correct
    assert is_exact(expected, answer) is exact


def test_score_gives_both_metrics_with_binomial_standard_errors() -> None:
    rows = [row("paper", "paper"), row("paper", "Paper."), row("glass", "glass"), row("metal", "tin"), row("a", "a b")]
    assert score("bins", rows) == {
        "accuracy": EvalResult("bins", "accuracy", 0.6, math.sqrt(0.6 * 0.4 / 5), 5),
        "exact_match": EvalResult("bins", "exact_match", 0.4, math.sqrt(0.4 * 0.6 / 5), 5),
    }
    assert score("bins", rows)["accuracy"].stderr == pytest.approx(0.21908902300206645, abs=1e-15)


@pytest.mark.parametrize(("answer", "value"), [("paper", 1.0), ("glass", 0.0)])
def test_a_standard_error_of_nothing_but_hits_or_misses_is_zero(answer: str, value: float) -> None:
    result = score("bins", [row("paper", answer)] * 7)["accuracy"]
    assert (result.value, result.stderr, result.n) == (value, 0.0, 7)


def test_accuracy_is_what_the_rows_say() -> None:
    """`correct` was decided when the answer came; scoring does not decide again."""
    assert score("bins", [Generation("q", "paper", "glass", True, 1)])["accuracy"].value == 1.0
