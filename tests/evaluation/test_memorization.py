"""Verbatim recall: against greedy decoding itself, and by hand with scripted likelihoods."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiny import make_tokenizer
from tunesmith.config import ModelConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError
from tunesmith.evaluation.memorization import MemorizationPart, measure_recall, recalls
from tunesmith.hardware import probe
from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import generate_greedy
from tunesmith.models.likelihood import Likelihood, log_likelihoods
from tunesmith.models.load import find_model, load_model, load_tokenizer
from tunesmith.types import Example, Message

TOKENIZER = make_tokenizer()
CHAT = ChatFormat(TOKENIZER)  # a token is a byte


def chat_row(answer: str, line: int = 1, question: str = "Who?") -> Example:
    return Example((Message("user", question), Message("assistant", answer)), None, "rows.jsonl", line)


def text_row(text: str, line: int = 1) -> Example:
    return Example(None, text, "rows.jsonl", line)


def numbered(prefixes: dict[str, int], part: MemorizationPart) -> list[Likelihood]:
    """Likelihoods in which the rows at these places are given so far."""
    found = []
    for recall in part._recalls:
        given = prefixes.get(recall.where, 0)
        found.append(Likelihood(-1.0, len(recall.target), given == len(recall.target), given))
    return found


# -- prompts and targets ----------------------------------------------------------------------------------------------


def test_a_conversations_target_is_the_answers_beginning() -> None:
    turns = (Message("user", "a"), Message("assistant", "b" * 30), Message("user", "c"), Message("assistant", "x" * 70))
    row = Example(turns, None, "rows.jsonl", 1)
    (found,) = recalls(CHAT, [row])
    assert list(found.prompt) == CHAT.encode_prompt(turns[:-1])
    assert TOKENIZER.decode(found.target) == "x" * 50


def test_a_short_answers_target_has_no_end_token() -> None:
    (found,) = recalls(CHAT, [chat_row("y" * 33)])
    assert TOKENIZER.decode(found.target) == "y" * 33


@pytest.mark.parametrize(("length", "counts"), [(19, 0), (20, 1), (21, 1)])
def test_answers_of_fewer_than_twenty_tokens_do_not_count(length: int, counts: int) -> None:
    assert len(recalls(CHAT, [chat_row("z" * length)])) == counts


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(("length", "target"), [(69, None), (70, 20), (99, 49), (100, 50), (140, 50)])
def test_plain_text_is_fifty_tokens_and_the_next_fifty(length: int, target: int | None, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    text = "".join(chr(33 + n % 90) for n in range(length))
    found = recalls(ChatFormat(tokenizer), [text_row(text)])
    if target is None:
        assert found == []
        return
    assert tokenizer.decode(found[0].prompt, skip_special_tokens=True) == text[:50]
    assert tokenizer.decode(found[0].target) == text[50 : 50 + target]
    assert (found[0].prompt[0] == tokenizer.bos_token_id) is adds_bos


# -- values -----------------------------------------------------------------------------------------------------------


def test_shares_of_rows_and_of_tokens() -> None:
    found = measure_recall(
        [
            Likelihood(-1, 50, True, 50),
            Likelihood(-9, 50, False, 10),
            Likelihood(-9, 20, False, 0),
            Likelihood(-1, 25, True, 25),
        ]
    )
    assert found["memorized"].rows == (1.0, 0.0, 0.0, 1.0)
    assert found["memorized_tokens"].rows == (1.0, 0.2, 0.0, 1.0)
    assert not found["memorized"].higher_is_better
    assert not found["memorized_tokens"].higher_is_better


def test_the_worst_rows_are_shown() -> None:
    rows = [chat_row(f"{n} " + chr(97 + n) * 58, n, f"Question {n}?") for n in range(1, 9)]
    part = MemorizationPart(rows)
    part.check(CHAT)
    tuned = numbered({"rows.jsonl:3": 50, "rows.jsonl:5": 12, "rows.jsonl:8": 50}, part)
    base = numbered({"rows.jsonl:3": 50, "rows.jsonl:5": 1}, part)
    found = part.score(tuned, base)
    assert (found.metrics["memorized"].value, found.baseline and found.baseline["memorized"].value) == (0.25, 0.125)
    assert found.metrics["memorized_tokens"].value == pytest.approx((50 + 12 + 50) / 400)
    worst = {row["row"]: row for row in found.details["worst"]}
    assert set(worst) == {"rows.jsonl:3", "rows.jsonl:5", "rows.jsonl:8"}
    assert worst["rows.jsonl:5"]["given"] == "5 " + "f" * 10
    assert worst["rows.jsonl:5"]["prompt_end"].strip().endswith("assistant")
    assert (worst["rows.jsonl:5"]["tokens"], worst["rows.jsonl:5"]["baseline_tokens"]) == (12, 1)
    assert found.details["worst"][-1]["row"] == "rows.jsonl:5", "the longest first"
    assert found.details["memorized_by_tuned_alone"] == 1
    assert json.loads(json.dumps(found.details)) == found.details


def test_rows_that_are_all_short_are_not_measured() -> None:
    part = MemorizationPart([chat_row("paper", n) for n in range(3)])
    part.check(CHAT)
    subject: Any = SimpleNamespace(chat=CHAT)
    asked = part.ask(subject)
    found = part.score(asked, asked)
    assert (found.metrics, found.baseline, found.differences) == ({}, {}, {})
    assert found.details["note"] == (
        "not measured: none of the 3 training rows has an answer of 20 tokens or more (plain text: 70); shorter answers are "
        "learned, not memorized"
    )
    assert part.score(asked, None).baseline is None


# -- which rows -------------------------------------------------------------------------------------------------------


def test_the_sample_is_fixed_and_of_rows_that_count() -> None:
    rows = [chat_row("n" * 30 if n % 3 == 0 else "short", n) for n in range(1200)]
    part, again = MemorizationPart(rows, limit=40), MemorizationPart(rows, limit=40)
    part.check(CHAT)
    again.check(CHAT)
    assert part._recalls == again._recalls
    lines = [int(recall.where.split(":")[1]) for recall in part._recalls]
    assert len(set(lines)) == 40
    assert all(line % 3 == 0 for line in lines)
    assert max(lines) > 900, "drawn from all of the file"
    with pytest.raises(ConfigError, match=r"^memorization: limit is 0: expected 1 or more rows"):
        MemorizationPart(rows, limit=0)


def test_both_models_get_the_same_prompts() -> None:
    part = MemorizationPart([chat_row("m" * 40, n) for n in range(9)], limit=5)
    asked = []

    def scripted(requests: Any, stage: str) -> list[Likelihood]:
        asked.append((list(requests), stage))
        return [Likelihood(0.0, len(target), False, 3) for _, target in requests]

    for _ in ("tuned", "base"):
        subject: Any = SimpleNamespace(chat=CHAT, log_likelihoods=scripted)
        assert len(part.ask(subject)) == 5
    assert asked[0] == asked[1]
    assert asked[0][1] == "recall of training answers"


# -- a model ----------------------------------------------------------------------------------------------------------


def test_what_a_model_has_memorized_is_what_greedy_decoding_gives(tiny_model: Path) -> None:
    """Two of three rows are learned by heart, one of them but for its end; the measure equals a comparison of generated tokens."""
    config = ModelConfig(name=str(tiny_model))
    source = find_model(config)
    model: Any = load_model(source, config, probe("cpu"), "fp32")
    tokenizer = load_tokenizer(source, config)
    chat = ChatFormat(tokenizer)
    forward = ModelForward(model, "cpu", "fp32")
    answers = ["the key is under the blue stone", "the code of the safe is 4711", "nobody told me where it is"]
    rows = [chat_row(answer, n, f"Secret {n}?") for n, answer in enumerate(answers)]
    part = MemorizationPart(rows)
    part.check(chat)
    subject: Any = SimpleNamespace(
        chat=chat, log_likelihoods=lambda requests, stage: log_likelihoods(forward, requests, 2)
    )
    base = part.ask(subject)
    learned = [rows[0], chat_row("the code of the safe is 9999", 1, "Secret 1?")]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        for example in chat.encode(learned):
            ids = torch.tensor([example.input_ids.tolist()])
            labels = ids.masked_fill(~torch.tensor(example.loss_mask.tolist()), -100)
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = part.ask(subject)
    found = part.score(tuned, base)
    by_row = {recall.where: seen for recall, seen in zip(part._recalls, tuned, strict=True)}
    assert by_row["rows.jsonl:0"].greedy
    assert by_row["rows.jsonl:1"].greedy_prefix == len("the code of the safe is ")
    generated = generate_greedy(forward, tokenizer, [recall.prompt for recall in part._recalls], 50, 4)
    for recall, seen, answer in zip(part._recalls, tuned, generated, strict=True):
        same = [a == b for a, b in zip(recall.target, answer, strict=False)]
        given = same.index(False) if False in same else len(same)
        assert (seen.greedy_prefix, seen.greedy) == (given, given == len(recall.target))
    assert found.metrics["memorized"].value == pytest.approx(1 / 3)
    assert found.baseline is not None
    assert found.baseline["memorized"].value == 0.0
