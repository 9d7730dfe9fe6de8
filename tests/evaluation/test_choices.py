"""Multiple choice: prompts token by token, what is picked, and the harness's own likelihoods of the same texts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tiny import make_tokenizer, supervised, write_jsonl
from tunesmith.config import ModelConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.formats import read_examples
from tunesmith.errors import DataError
from tunesmith.evaluation.choices import (
    ChoiceQuestion,
    Picked,
    answer_requests,
    chat_requests,
    listing,
    measure_choices,
    picks,
    plain_requests,
    read_choices,
)
from tunesmith.hardware import probe
from tunesmith.models.forward import ModelForward
from tunesmith.models.likelihood import Likelihood, log_likelihoods
from tunesmith.models.load import find_model, load_model, load_tokenizer
from tunesmith.types import Message

FOG = ChoiceQuestion(
    "There is most likely going to be fog around:", ("a marsh", "a tundra", "the plains"), 0, "7", "obqa"
)
SKY = ChoiceQuestion(" Is the sky é?\n", ("yes", "no, it is not"), 1, "8", "obqa")


def texts(tokenizer: Any, requests: Any) -> list[tuple[str, str]]:
    return [(tokenizer.decode(context), tokenizer.decode(continuation)) for context, continuation in requests]


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_the_plain_prompt_of_a_continuation() -> None:
    tokenizer = make_tokenizer()
    assert texts(tokenizer, plain_requests(tokenizer, [FOG], "continuation")) == [
        ("There is most likely going to be fog around:", " a marsh"),
        ("There is most likely going to be fog around:", " a tundra"),
        ("There is most likely going to be fog around:", " the plains"),
    ]


def test_the_plain_prompt_with_letters() -> None:
    tokenizer = make_tokenizer()
    prompt = "Is the sky é?\nA. yes\nB. no, it is not\nAnswer:"
    assert texts(tokenizer, plain_requests(tokenizer, [SKY], "letters")) == [(prompt, " A"), (prompt, " B")]


def test_white_space_at_the_end_of_a_prompt_goes_with_the_choice() -> None:
    tokenizer = make_tokenizer()
    assert texts(tokenizer, plain_requests(tokenizer, [SKY], "continuation")) == [
        (" Is the sky é?", "\n yes"),
        (" Is the sky é?", "\n no, it is not"),
    ]


def test_a_tokenizer_that_begins_texts_does_so_once() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    for context, continuation in plain_requests(tokenizer, [FOG], "continuation"):
        assert [*context].count(tokenizer.bos_token_id) == 1
        assert context[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in continuation


def test_tokens_are_those_of_the_whole_text() -> None:
    tokenizer = make_tokenizer(merges=[("Ġ", "a"), ("r", "s"), ("Ġa", "Ġ")])
    ((context, continuation), *_) = plain_requests(tokenizer, [FOG], "continuation")
    assert [*context, *continuation] == tokenizer("There is most likely going to be fog around: a marsh")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(list(continuation)) == ["ĠaĠ", "m", "a", "rs", "h"]


def test_a_chat_prompt_is_what_training_saw(tmp_path: Path) -> None:
    """Context, choice and end-of-turn token are those of a training row with that answer."""
    tokenizer = make_tokenizer()
    chat = ChatFormat(tokenizer)
    row = {"question": FOG.question, "choices": list(FOG.choices), "answer": 0}
    (example,) = read_examples(str(write_jsonl(tmp_path / "rows.jsonl", [row]))).examples
    (trained,) = chat.encode([example])  # type: ignore[list-item]
    requests = chat_requests(chat, [FOG], "letters")
    context, continuation = requests[0]
    assert [*context, *continuation] == trained.input_ids[: len(context) + len(continuation)].tolist()
    assert [tokenizer.decode(continuation)] == supervised(tokenizer, trained) == ["A<|im_end|>"]
    question = Message("user", f"{FOG.question}\n\nA. a marsh\nB. a tundra\nC. the plains")
    assert list(context) == chat.encode_prompt([question])
    assert [tokenizer.decode(found) for _, found in requests] == ["A<|im_end|>", "B<|im_end|>", "C<|im_end|>"]
    assert texts(tokenizer, chat_requests(chat, [FOG], "continuation"))[1] == (
        f"<|im_start|>user\n{FOG.question}<|im_end|>\n<|im_start|>assistant\n",
        "a tundra<|im_end|>",
    )


def test_answers_behind_a_conversation() -> None:
    """A label that begins another one ends with its turn, so that neither is part of the other."""
    tokenizer = make_tokenizer()
    chat = ChatFormat(tokenizer)
    turns = (Message("system", "Sort."), Message("user", "x"), Message("assistant", "glass"), Message("user", "y"))
    requests = answer_requests(chat, turns, ["card", "card_arrival"])
    assert {tuple(context) for context, _ in requests} == {tuple(chat.encode_prompt(turns))}
    assert [tokenizer.decode(found) for _, found in requests] == ["card<|im_end|>", "card_arrival<|im_end|>"]


def test_a_conversation_that_the_template_refuses() -> None:
    template = "{{ raise_exception('no system message here') if messages[0].role == 'system' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = ChatFormat(make_tokenizer(chat_template=template))
    with pytest.raises(DataError, match=r"^row 4: .*no system message here"):
        answer_requests(chat, (Message("system", "s"), Message("user", "u")), ["a"], where="row 4")


# -- what is picked ---------------------------------------------------------------------------------------------------


def likelihoods(*totals: float) -> list[Likelihood]:
    return [Likelihood(total, 1, False, 0) for total in totals]


def test_total_and_length_pick_differently() -> None:
    """-3 / len("yes") is -1.0 a character; -6.5 / len("no, it is not") is -0.5."""
    found = likelihoods(-3.0, -6.5)
    assert picks([SKY], found, "continuation") == [Picked(by_total=0, by_length=1)]
    assert picks([SKY], found, "letters") == [Picked(by_total=0, by_length=0)], "letters are of one length"


def test_characters_count_not_bytes() -> None:
    """As in the harness's acc_norm. "ééé" has 3 characters and 6 bytes."""
    question = ChoiceQuestion("?", ("ééé", "abcd"), 0, "0")
    assert picks([question], likelihoods(-3.0, -3.2), "continuation") == [Picked(0, 1)]


def test_questions_with_unequal_numbers_of_choices_and_ties() -> None:
    picked = picks([FOG, SKY, FOG], likelihoods(-9, -1, -5, -2, -2, -4, -4, -3), "letters")
    assert [pick.by_total for pick in picked] == [1, 0, 2]


def test_shares_are_over_questions() -> None:
    measured = measure_choices([FOG, SKY, FOG, SKY], [Picked(0, 1), Picked(1, 1), Picked(2, 0), Picked(1, 0)])
    assert measured["acc"].rows == (1.0, 1.0, 0.0, 1.0)
    assert measured["acc_norm"].rows == (0.0, 1.0, 1.0, 0.0)
    assert (measured["acc"].value, measured["acc_norm"].value) == (0.75, 0.5)
    assert measured["acc"].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_questions(tmp_path: Path) -> None:
    rows = [
        {"question": "one?", "choices": ["x", "y\nB. z"], "answer": "A", "id": "first"},
        {"question": "two?", "choices": ["x", "y"], "answer": 1},
        {"passage": "Read.", "question": "three?", "choices": ["x", "y", "z"], "answer": "z"},
    ]
    assert read_choices(str(write_jsonl(tmp_path / "own.jsonl", rows)), "own") == [
        ChoiceQuestion("one?", ("x", "y\nB. z"), 0, "first", "own"),
        ChoiceQuestion("two?", ("x", "y"), 1, "2", "own"),
        ChoiceQuestion("Read.\n\nthree?", ("x", "y", "z"), 2, "3", "own"),
    ]


def test_a_table_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text('question,choices,answer\none?,"[""x"", ""y""]",B\n', encoding="utf-8")
    assert read_choices(str(path)) == [ChoiceQuestion("one?", ("x", "y"), 1, "2")]


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    good = {"question": "one?", "choices": ["x", "y"], "answer": "A"}
    rows = [good, {**good, "answer": 2}, {**good, "choices": ["x"]}, {"question": "q", "answer": "A"}]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_choices(str(path))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [f"{path}:{n}" for n in (2, 3, 4)]
    assert "holds 1 choices; expected 2 to 26" in caught.value.problems[1]


def test_the_listing() -> None:
    assert listing(("one", "two")) == "A. one\nB. two"


# -- the harness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
def test_likelihoods_are_the_harnesses(tmp_path: Path, adds_bos: bool) -> None:
    """lm-evaluation-harness, on the same model with the same texts: its prompts, its tokens, its sums."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tiny import make_tiny_model

    folder = make_tiny_model(tmp_path / "model", tokenizer=make_tokenizer(adds_bos=adds_bos))
    config = ModelConfig(name=str(folder))
    source = find_model(config)
    model: Any = load_model(source, config, probe("cpu"), "fp32").eval()
    tokenizer = load_tokenizer(source, config)
    forward = ModelForward(model, "cpu", "fp32")
    ours = [
        log_likelihoods(forward, plain_requests(tokenizer, [FOG, SKY], form), 2)
        for form in ("continuation", "letters")  # type: ignore[arg-type]
    ]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    pairs = [(row.question, f" {choice}") for row in (FOG, SKY) for choice in row.choices]
    lettered = [
        (f"{row.question.strip()}\n{listing(row.choices)}\nAnswer:", f" {letter}")
        for row in (FOG, SKY)
        for letter in row.texts("letters")
    ]
    for found, asked in zip(ours, (pairs, lettered), strict=True):
        instances = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
        expected = theirs.loglikelihood(instances, disable_tqdm=True)
        assert [row.total for row in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
        assert [row.greedy for row in found] == [greedy for _, greedy in expected]
