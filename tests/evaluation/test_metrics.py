"""When an answer is right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.evaluation.metrics import is_correct, is_exact, normalize


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
        (" .,;:!'\"` ", ".,;:!'\"`"),  # a label of stops is one
        ("\u201c배송\u201d", "배송"),
        ("배송。", "배송"),
        ("\u1107\u1162송", "배송"),  # decomposed
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
        ("?", "", False, False),
        (".", "!", False, False),
        ("배송", "\u1107\u1162송 ", True, True),
    ],
)
def test_accuracy_folds_and_exact_match_does_not(expected: str, answer: str, correct: bool, exact: bool) -> None:
    assert is_correct(expected, answer) is correct
    assert is_exact(expected, answer) is exact
