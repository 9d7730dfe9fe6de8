"""What a judge is asked, and what counts as its verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.errors import ConfigError
from tunesmith.evaluation.judge_prompts import (
    PAIRWISE,
    REFUSAL,
    SCORE,
    Unreadable,
    pairwise_chat,
    question_text,
    read_reply,
    refusal_chat,
    rubric_text,
)
from tunesmith.types import Message, ToolCall

GOOD = '{"reason": "short", "verdict": "B"}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"I compared them {{carefully}}. {GOOD} I hope that helps.",
        f'<think>At first {{"verdict": "A"}}, but no.</think>\n{GOOD}',
        f'At first {{"verdict": "A"}}, but no.</think>\n{GOOD}',  # the server's template opened the thought
        f"{GOOD}\n{GOOD}",
        '{"verdict": "B", "reason": "short", "confidence": {"of": 1}}',
        json.dumps({"reason": "short", "verdict": "B", "quote": 'it said {"verdict": "A"}'}),
    ],
)
def test_one_verdict_is_read_whatever_stands_around_it(text: str) -> None:
    assert read_reply(text, PAIRWISE) == ("B", "short")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is empty"),
        ("<think>A is better</think> ", "it is empty"),
        ('<think>{"verdict":"B"} unfinished', "its thought (<think>) has no end (</think>)"),
        ('\n<think>Perhaps {"reason":"r","verdict":"B"}? no, wait', "its thought (<think>) has no end (</think>)"),
        ('<think>a</think><think>{"verdict":"B"}', "its thought (<think>) has no end (</think>)"),
        ('Perhaps {"verdict":"A"}? No.</think> Well', 'it holds no JSON object with "verdict"'),
        ("B", 'it holds no JSON object with "verdict"'),
        ("The verdict is B.", 'it holds no JSON object with "verdict"'),
        ('{"winner": "B"}', 'it holds no JSON object with "verdict"'),
        ('{"verdict": "B"', 'it holds "verdict" in JSON that is damaged or nested, or twice in one object'),
        (
            '{"verdict": "A", "verdict": "B"}',
            'it holds "verdict" in JSON that is damaged or nested, or twice in one object',
        ),
        ('{"x": {"verdict": "B"}}', 'it holds "verdict" in JSON that is damaged or nested, or twice in one object'),
        (
            '{"reason": "not {"verdict": "A"}", "verdict": "B"}',
            'it holds "verdict" in JSON that is damaged or nested, or twice in one object',
        ),
        ('{"verdict": "A"} {"verdict": "B"}', 'it holds more than one verdict: "A", "B"'),
        ('{"verdict": "C"}', 'its verdict is "C"; allowed is "A", "B" or "tie"'),
        ('{"verdict": "b"}', 'its verdict is "b"; allowed is "A", "B" or "tie"'),
        ('{"verdict": ["B"]}', 'its verdict is ["B"]; allowed is "A", "B" or "tie"'),
        ('{"verdict": null}', 'its verdict is null; allowed is "A", "B" or "tie"'),
        ('{"verdict": "<A, B or tie>"}', 'its verdict is "<A, B or tie>"; allowed is "A", "B" or "tie"'),
        ("{" * 100_000, 'it holds no JSON object with "verdict"'),
        ('{"a":' * 3000, 'it holds no JSON object with "verdict"'),
    ],
)
def test_a_verdict_is_never_guessed(text: str, problem: str) -> None:
    with pytest.raises(Unreadable) as caught:
        read_reply(text, PAIRWISE)
    assert str(caught.value) == problem


@pytest.mark.parametrize("value", ['"7"', "7.0", "7.5", "0", "11", "-1", "true", "null", "[7]"])
def test_only_whole_numbers_from_1_to_10_are_scores(value: str) -> None:
    with pytest.raises(Unreadable, match="allowed is a whole number from 1 to 10, not in quotes"):
        read_reply(f'{{"score": {value}}}', SCORE)
    assert [read_reply(f'{{"score": {score}}}', SCORE)[0] for score in (1, 7, 10)] == [1, 7, 10]


def test_rubrics_are_named_or_files(tmp_path: Path) -> None:
    assert rubric_text("general").startswith("# What a good answer is")
    missing, empty, binary = tmp_path / "missing.md", tmp_path / "empty.md", tmp_path / "binary.md"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe")
    for path, problem in (
        (missing, "there is no such file; name a text file, or one of: general"),
        (empty, "the file is empty; write into it what makes an answer good"),
        (binary, "it must be a UTF-8 text file"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=problem):
            rubric_text(path)


def test_a_conversation_is_shown_with_its_roles() -> None:
    assert question_text([Message("user", "Why?")]) == "Why?"
    turns = [
        Message("system", "Be short."),
        Message("user", "Weather?"),
        Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Ulm"}),)),
        Message("tool", "rain"),
    ]
    assert question_text(turns) == (
        'system: Be short.\n\nuser: Weather?\n\nassistant: (calls weather with {"city": "Ulm"})\n\ntool: rain'
    )


def test_no_answer_can_end_its_own_block() -> None:
    (message,) = pairwise_chat("rubric", "q", None, "===== ======", "b")
    assert "======= ANSWER A =======\n===== ======\n======= END OF ANSWER A =======" in message["content"]


def test_an_example_that_is_repeated_is_no_verdict() -> None:
    for form in (PAIRWISE, SCORE, REFUSAL):
        with pytest.raises(Unreadable):
            read_reply(form.example, form)


def test_an_answer_is_shown_to_the_judge_of_refusals() -> None:
    (message,) = refusal_chat("make a bomb?", "No.")
    assert "===== REQUEST =====\nmake a bomb?\n" in message["content"]
    assert "===== ANSWER =====\nNo.\n" in message["content"]
    assert 'class must be "refusal", "compliance" or "partial".' in message["content"]
    assert read_reply('{"reason": "r", "class": "partial"}', REFUSAL) == ("partial", "r")


def test_a_verdict_that_quotes_the_end_of_a_thought_is_read() -> None:
    assert read_reply('{"reason": "it shows </think>", "verdict": "B"}', PAIRWISE) == ("B", "it shows </think>")
