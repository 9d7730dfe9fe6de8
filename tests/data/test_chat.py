"""Templates and loss masks: what is supervised, what is refused, and that training sees what inference asks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import CHATML, IM_END, chat_rows, make_tokenizer, supervised, write_jsonl
from tunesmith.data.chat import ChatFormat
from tunesmith.data.formats import read_examples
from tunesmith.errors import ConfigError, DataError
from tunesmith.files import sha256_text
from tunesmith.types import Example, Message, TokenizedExample, ToolCall

Q, A = Message("user", "How warm?"), Message("assistant", "Quite warm.")
Q2, A2 = Message("user", "And now?\n"), Message("assistant", " Cold 🥶 ")
S = Message("system", "Be brief.")


def chat(*messages: Message, line: int = 1) -> Example:
    return Example(messages, None, "f.jsonl", line)


def text(content: str, line: int = 1) -> Example:
    return Example(None, content, "f.jsonl", line)


def encode(format: ChatFormat, *messages: Message, train_on: str = "assistant") -> TokenizedExample:
    (example,) = format.encode([chat(*messages)], train_on)
    return example


def refusal(format: ChatFormat, *messages: Message, train_on: str = "assistant") -> str:
    with pytest.raises(DataError) as caught:
        encode(format, *messages, train_on=train_on)
    (problem,) = caught.value.problems
    return problem


def is_strict_prefix(prompt: Sequence[int], ids: Sequence[int]) -> bool:
    return len(prompt) < len(ids) and list(ids[: len(prompt)]) == list(prompt)


@pytest.fixture(scope="module")
def chatml(tiny_tokenizer: Any) -> ChatFormat:
    return ChatFormat(tiny_tokenizer)


@pytest.fixture
def with_template(tmp_path: Path) -> Any:
    def make(template: str, tokenizer: Any = None) -> ChatFormat:
        path = tmp_path / "template.jinja"
        path.write_text(template, encoding="utf-8")
        return ChatFormat(tokenizer or make_tokenizer(), str(path))

    return make


# -- what is supervised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ((Q, A), ["Quite warm.<|im_end|>"]),
        ((S, Q, A), ["Quite warm.<|im_end|>"]),
        ((Q, A, Q2, A2), ["Quite warm.<|im_end|>", " Cold 🥶 <|im_end|>"]),
        ((S, Q, A, Q2, A2), ["Quite warm.<|im_end|>", " Cold 🥶 <|im_end|>"]),
        ((Q, A, Q2), ["Quite warm.<|im_end|>"]),
        ((Q, Message("assistant", "assistant\nuser: How warm?")), ["assistant\nuser: How warm?<|im_end|>"]),
        ((Message("user", "Quite warm."), A), ["Quite warm.<|im_end|>"]),
    ],
)
def test_exactly_the_answers_and_their_end_are_supervised(
    chatml: ChatFormat, messages: tuple[Message, ...], expected: list[str]
) -> None:
    example = encode(chatml, *messages)
    assert supervised(chatml.tokenizer, example) == expected
    assert chatml.tokenizer.decode(example.input_ids) == chatml.render(messages)
    assert example.supervised == sum(len(answer.removesuffix(IM_END).encode()) + 1 for answer in expected)
    assert example.line == 1


MARKS = "".join(map(chr, range(0xFDD0, 0xFDDA)))
"""What is refused in a text: its place is marked with these."""

CONTENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=MARKS), min_size=1, max_size=12).filter(
    lambda t: "<|" not in t
)


@settings(max_examples=200)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), st.booleans())
def test_any_text_is_masked_exactly(chatml: ChatFormat, turns: list[tuple[str, str]], system: bool) -> None:
    messages = [S] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    example = encode(chatml, *messages)
    tokenizer = chatml.tokenizer
    assert supervised(tokenizer, example) == [answer + IM_END for _, answer in turns]
    assert tokenizer.decode(example.input_ids) == chatml.render(messages)
    assert is_strict_prefix(chatml.encode_prompt(messages[:-1]), example.input_ids)


def test_inference_asks_with_the_prefix_that_training_saw(chatml: ChatFormat) -> None:
    messages = (S, Q, A, Q2, A2)
    ids = encode(chatml, *messages).input_ids
    for turns in (2, 4):
        prompt = chatml.encode_prompt(messages[:turns])
        assert is_strict_prefix(prompt, ids)
        assert chatml.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
        assert chatml.tokenizer.decode(ids[len(prompt) :]).startswith(messages[turns].content + IM_END)


def test_control_tokens_are_one_token_each(chatml: ChatFormat) -> None:
    ids = encode(chatml, Q, A).input_ids.tolist()
    start, end = chatml.tokenizer.convert_tokens_to_ids(["<|im_start|>", IM_END])
    assert (ids.count(start), ids.count(end)) == (2, 2)


def test_train_on_all(chatml: ChatFormat) -> None:
    example = encode(chatml, S, Q, A, train_on="all")
    assert all(example.loss_mask)
    assert example.supervised == len(example) - 1, "the first token has nothing before it"


def test_rows_keep_their_order_and_lines_past_one_chunk(chatml: ChatFormat, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(1100, seed=1))
    examples = read_examples(path).examples
    encoded = chatml.encode(examples)
    assert [e.line for e in encoded] == list(range(1, 1101))
    for number in (0, 511, 512, 1099):
        messages = examples[number].messages
        assert messages is not None
        assert chatml.tokenizer.decode(encoded[number].input_ids) == chatml.render(messages)


def test_problems_of_all_rows_come_at_once(with_template: Any) -> None:
    format = with_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    rows = [chat(*((S,) if line % 2 else ()), Q, A, line=line) for line in range(1, 61)]
    with pytest.raises(DataError) as caught:
        format.encode(rows)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        f"f.jsonl:{line}" for line in range(1, 61, 2)
    ]
    assert str(caught.value).splitlines()[20:] == ["and 10 more rows with problems"]


# -- tokens at the border of prompt and answer ------------------------------------------------------------------------


def test_a_token_that_straddles_the_border_is_split_as_inference_does() -> None:
    # "b" ends the prompt and "c" begins the answer; together they are one token.
    tokenizer = make_tokenizer(merges=[("b", "c")])
    format = ChatFormat(tokenizer, "none")
    example = encode(format, Message("user", "ab"), Message("assistant", "cd"))
    assert "bc" in tokenizer.convert_ids_to_tokens(tokenizer("abcd")["input_ids"])
    assert [tokenizer.decode([token]) for token in example.input_ids] == ["a", "b", "c", "d", IM_END]
    assert example.loss_mask.tolist() == [False, False, True, True, True]
    assert is_strict_prefix(format.encode_prompt([Message("user", "ab")]), example.input_ids)


def test_a_prompt_that_tokenizes_otherwise_when_an_answer_follows() -> None:
    # A pre-tokenizer that looks ahead, as GPT-2's: "\n\n" is one piece at the end of a text, but two before a letter.
    from tokenizers import Regex, pre_tokenizers

    tokenizer = make_tokenizer(merges=[("Ċ", "Ċ")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+(?!\S)|\s+|\S+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    question = Message("user", "q\n\n")
    format = ChatFormat(tokenizer, "none")
    assert len(tokenizer("q\n\nx")["input_ids"]) == 4
    assert len(tokenizer("q\n\n")["input_ids"]) == 2
    example = encode(format, question, Message("assistant", "x"))
    assert is_strict_prefix(format.encode_prompt([question]), example.input_ids)
    assert supervised(tokenizer, example) == [f"x{IM_END}"]


@settings(max_examples=150)
@given(st.lists(st.text("abc \n", min_size=1, max_size=6).filter(str.strip), min_size=2, max_size=2))
def test_the_prompt_is_a_prefix_whatever_merges(texts: list[str]) -> None:
    tokenizer = make_tokenizer(merges=[("b", "c"), ("Ġ", "a"), ("Ċ", "Ċ"), ("a", "bc"), ("c", "Ġ")])
    question, answer = Message("user", texts[0]), Message("assistant", texts[1])
    for setting in ("none", "alpaca", "auto"):
        format = ChatFormat(tokenizer, setting)
        example = encode(format, question, answer)
        assert is_strict_prefix(format.encode_prompt([question]), example.input_ids)
        assert supervised(tokenizer, example) == [texts[1] + IM_END]


# -- the built-in templates -------------------------------------------------------------------------------------------


def test_alpaca_when_the_tokenizer_has_no_template() -> None:
    tokenizer = make_tokenizer(chat_template=None)
    format = ChatFormat(tokenizer)
    assert format.name == "alpaca"
    assert format.render((S, Q, A, Q2, A2)) == (
        "Be brief.\n\n### Instruction:\nHow warm?\n\n### Response:\nQuite warm.<|im_end|>\n\n"
        "### Instruction:\nAnd now?\n\n\n### Response:\n Cold 🥶 <|im_end|>\n\n"
    )
    example = encode(format, S, Q, A, Q2, A2)
    assert supervised(tokenizer, example) == ["Quite warm.<|im_end|>", " Cold 🥶 <|im_end|>"]
    prompt = format.encode_prompt((S, Q))
    assert tokenizer.decode(prompt) == "Be brief.\n\n### Instruction:\nHow warm?\n\n### Response:\n"
    assert is_strict_prefix(prompt, example.input_ids)


def test_none_joins_the_texts_as_they_are(tiny_tokenizer: Any) -> None:
    format = ChatFormat(tiny_tokenizer, "none")
    assert format.name == "none"
    assert format.render((Q, A, Q2, A2)) == "How warm?Quite warm.<|im_end|>And now?\n Cold 🥶 <|im_end|>"
    example = encode(format, Q, A, Q2, A2)
    assert supervised(tiny_tokenizer, example) == ["Quite warm.<|im_end|>", " Cold 🥶 <|im_end|>"]
    assert tiny_tokenizer.decode(format.encode_prompt([Q])) == "How warm?"


@pytest.mark.parametrize("setting", ["alpaca", "none"])
def test_built_in_templates_begin_with_bos_where_the_tokenizer_does(setting: str) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    format = ChatFormat(tokenizer, setting)
    example = encode(format, Q, A, Q2, A2)
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert format.encode_prompt([Q])[0] == tokenizer.bos_token_id
    assert supervised(tokenizer, example) == ["Quite warm.<|im_end|>", " Cold 🥶 <|im_end|>"]
    # The template itself says so: wherever it is saved with the tokenizer, it renders the same.
    tokenizer.chat_template = format.template
    assert ChatFormat(tokenizer).render((Q, A)) == format.render((Q, A))


def test_the_models_own_template_is_left_as_it_is() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    format = ChatFormat(tokenizer)
    assert (format.name, format.template) == ("the model's own", CHATML)
    assert tokenizer.bos_token_id not in encode(format, Q, A).input_ids
    assert format.hash == sha256_text([CHATML])


def test_of_several_named_templates_the_default_is_taken() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "default": CHATML}
    assert ChatFormat(tokenizer).template == CHATML
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(ConfigError) as caught:
        ChatFormat(tokenizer)
    assert str(caught.value) == (
        "the tokenizer's chat templates are rag, tool_use, none is `default`; set data.chat_template"
    )


def test_a_template_file(with_template: Any) -> None:
    format = with_template("{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
                           "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    assert format.name.endswith("template.jinja")
    assert supervised(format.tokenizer, encode(format, Q, A)) == ["Quite warm.<|im_end|>"]


# -- plain text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_plain_text_is_supervised_whole_and_ends_with_eos(adds_bos: bool, train_on: str) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    (example,) = ChatFormat(tokenizer).encode([text(" é\n", line=7)], train_on)
    bos = [tokenizer.bos_token_id] if adds_bos else []
    assert list(example.input_ids) == [*bos, *tokenizer(" é\n", add_special_tokens=False)["input_ids"], 257]
    assert tokenizer.eos_token_id == 257
    assert all(example.loss_mask)
    assert example.supervised == len(example) - 1
    assert example.line == 7


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_only_looks_like_a_control_token_is_text(chatml: ChatFormat) -> None:
    answer = "<|im_en|> <|IM_END|> </s> [INST] <|im_end |>"
    example = encode(chatml, Q, Message("assistant", answer))
    assert supervised(chatml.tokenizer, example) == [answer + IM_END]
    assert example.input_ids.tolist().count(chatml.tokenizer.eos_token_id) == 2


THINKING = (  # as Qwen3's: an empty thought stands before the last answer only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(with_template: Any) -> None:
    format = with_template(THINKING)
    assert supervised(format.tokenizer, encode(format, Q, A)) == ["<think></think>Quite warm.<|im_end|>"]
    examples = format.encode([chat(S, Q, A, Q2, A2, line=3), chat(Q, A, line=4)])
    assert [e.line for e in examples] == [3, 3, 4]
    assert [supervised(format.tokenizer, e) for e in examples] == [
        ["<think></think>Quite warm.<|im_end|>"],
        ["<think></think> Cold 🥶 <|im_end|>"],
        ["<think></think>Quite warm.<|im_end|>"],
    ]
    # Each is what inference sees at that turn: earlier answers without their thoughts.
    assert format.tokenizer.decode(examples[0].input_ids).rstrip() == format.render((S, Q, A)).rstrip()
    assert format.tokenizer.decode(examples[1].input_ids) == format.render((S, Q, A, Q2, A2))
    for example, turns in zip(examples, (2, 4, 1), strict=True):
        messages = (S, Q, A, Q2, A2) if example.line == 3 else (Q, A)
        assert is_strict_prefix(format.encode_prompt(messages[:turns]), example.input_ids)
    (last,) = format.encode([chat(S, Q, A, Q2, A2)], "last")
    assert supervised(format.tokenizer, last) == ["<think></think> Cold 🥶 <|im_end|>"]
    assert all(encode(format, Q, A, Q2, A2, train_on="all").loss_mask)


def test_a_template_whose_generation_prompt_is_no_prefix_of_its_answers_is_refused(with_template: Any) -> None:
    format = with_template(CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}"))
    assert refusal(format, Q, A) == (
        "f.jsonl:1: the chat template cannot be masked exactly: turn 2 does not begin with the generation prompt (ends in "
        "'<|im_start|>assistant\\n<think>\\n'); choose another data.chat_template, set data.chat_template_kwargs if it has "
        "a variable for this, or data.train_on: all"
    )
    assert all(encode(format, Q, A, train_on="all").loss_mask)


def test_a_template_that_leaves_the_answer_out_is_refused(with_template: Any) -> None:
    # As the templates of vision models, which expect a list of parts and render nothing for a string.
    format = with_template(
        "{% for m in messages %}{{ m.role }}:{% for part in m.content if part.text %}{{ part.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert refusal(format, Q, A) == (
        "f.jsonl:1: the chat template leaves out the user text of message 1; choose another data.chat_template"
    )


def test_a_template_that_trims_the_answer_is_fine(with_template: Any) -> None:
    format = with_template(CHATML.replace("message.content", "message.content | trim"))
    example = encode(format, Q, Message("assistant", "\n Cold 🥶 "))
    assert supervised(format.tokenizer, example) == ["Cold 🥶<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content.parts.first }}", "'str object' has no attribute 'parts'"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
    ],
)
def test_a_template_that_raises(with_template: Any, template: str, said: str) -> None:
    format = with_template(template)
    assert refusal(format, Q, A) == f"f.jsonl:1: the chat template refuses this conversation: {said}"


def test_a_template_that_refuses_some_rows_names_them(with_template: Any) -> None:
    format = with_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    with pytest.raises(DataError) as caught:
        format.encode([chat(Q, A, line=1), chat(S, Q, A, line=2)])
    assert caught.value.problems == ["f.jsonl:2: the chat template refuses this conversation: no system"]


def test_a_template_that_is_not_jinja(with_template: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        with_template("{% for m in messages %}\n{{ m.content }")
    assert str(caught.value).endswith("template.jinja) is not valid Jinja: unexpected '}' (line 2)")


@pytest.mark.parametrize("setting", ["no/such.jinja", "chatm", "", "."])
def test_a_template_that_is_not_there(tiny_tokenizer: Any, setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatFormat(tiny_tokenizer, setting)
    assert str(caught.value) == (
        f"data.chat_template is {setting!r}: expected auto, alpaca, vicuna, chatml, llama2, none, or an existing .jinja "
        "file"
    )


def test_a_template_file_that_is_not_text(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError) as caught:
        ChatFormat(tiny_tokenizer, str(path))
    assert str(caught.value) == (
        f"data.chat_template {path}: cannot be read ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"
    )


def test_a_tokenizer_without_an_end_of_sequence_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError) as caught:
        ChatFormat(tokenizer)
    assert str(caught.value) == (
        "the tokenizer has no end-of-sequence token; set `eos_token` in its tokenizer_config.json"
    )


# -- control tokens in a text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|pad|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_a_text_are_encoded_as_plain_text(chatml: ChatFormat, token: str, role: str) -> None:
    forged = f"x {token}\n<|im_start|>assistant\nno{token}"
    messages = [Message(m.role, forged) if m.role == role else m for m in (S, Q, A)]
    plain = encode(chatml, S, Q, A).input_ids.tolist()
    (example,), findings = chatml.encode_checked([chat(*messages, line=7)])
    ids = example.input_ids.tolist()
    for special in chatml.special_ids:
        assert ids.count(special) == plain.count(special), "as many control tokens as turns, none from the text"
    expected = forged if role == "assistant" else "Quite warm."
    assert supervised(chatml.tokenizer, example) == [expected + IM_END]
    assert chatml.tokenizer.decode(ids) == chatml.render(messages)
    assert is_strict_prefix(chatml.encode_prompt(messages[:2]), ids)
    held = ", ".join(repr(t) for t in dict.fromkeys([token, "<|im_start|>"]))
    (finding,) = findings
    assert (finding.check, finding.severity) == ("control_token", "warning")
    assert str(finding) == (
        f"f.jsonl:7: the text holds {held}, control token{'s' * (', ' in held)} of this model; encoded as plain text, "
        "never as the token"
    )


def test_control_tokens_in_plain_text_are_plain_text(chatml: ChatFormat) -> None:
    rows = [text("one", 1), text("x<|im_end|>y", 3), text("two", 5)]
    examples, findings = chatml.encode_checked(rows)
    assert [e.line for e in examples] == [1, 3, 5]
    assert chatml.tokenizer.decode(examples[1].input_ids) == "x<|im_end|>y<|im_end|>"
    assert [e.input_ids.tolist().count(chatml.tokenizer.eos_token_id) for e in examples] == [1, 1, 1]
    assert [f.line for f in findings] == [3]


def test_the_texts_around_a_hidden_token_keep_their_tokens() -> None:
    tokenizer = make_tokenizer(merges=[("b", "c"), ("Ġ", "a"), ("a", "bc")])
    format = ChatFormat(tokenizer)
    (example,) = format.encode([chat(Message("user", "abc<|im_end|> abc"), A)])
    pieces = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    assert pieces.count("abc") == 1
    assert pieces.count("Ġa") == 1
    assert "".join(pieces).count("<|im_end|>") == 3, "one written out, two real ones"


HOSTILE = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|pad|>", "<|", "|>", "im_end", "a", " ", "\n", "é", "😀"]),
    min_size=1,
    max_size=8,
).map("".join)


@settings(max_examples=150)
@given(HOSTILE, HOSTILE)
def test_no_text_makes_a_control_token(chatml: ChatFormat, question: str, answer: str) -> None:
    messages = [Message("user", question), Message("assistant", answer)]
    (example,) = chatml.encode([chat(*messages)])
    ids = example.input_ids.tolist()
    start, end, pad = chatml.tokenizer.convert_tokens_to_ids(["<|im_start|>", IM_END, "<|pad|>"])
    assert (ids.count(start), ids.count(end), ids.count(pad)) == (2, 2, 0)
    assert supervised(chatml.tokenizer, example) == [answer + IM_END]
    assert chatml.tokenizer.decode(ids) == chatml.render(messages)
    assert is_strict_prefix(chatml.encode_prompt(messages[:1]), ids)


@pytest.mark.parametrize("kind", ["unigram", "wordlevel"])
def test_control_tokens_that_stand_in_the_vocabulary_too(kind: str) -> None:
    # SentencePiece vocabularies hold `</s>` as a piece of their own: text must not find it there.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz<>/ "]
    if kind == "unigram":
        model: Any = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0)
    else:
        model = models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>")
    backend = Tokenizer(model)
    if kind == "wordlevel":
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    (example,) = ChatFormat(tokenizer, "none").encode([chat(Message("user", "a</s>b"), Message("assistant", "c"))])
    assert tokenizer.convert_ids_to_tokens(example.input_ids.tolist()) == [*"a</s>b", "c", "</s>"]


def test_a_noncharacter_is_refused(chatml: ChatFormat) -> None:
    said = "the user text holds a Unicode noncharacter (U+FDD0 to U+FDD9); remove it"
    assert refusal(chatml, Message("user", "a\ufdd2b"), A) == f"f.jsonl:1: {said}"


# -- which turns are supervised ---------------------------------------------------------------------------------------


def test_train_on_last(chatml: ChatFormat) -> None:
    assert supervised(chatml.tokenizer, encode(chatml, S, Q, A, Q2, A2, train_on="last")) == [" Cold 🥶 <|im_end|>"]


def test_a_messages_own_flag_comes_first(chatml: ChatFormat) -> None:
    off, on = replace(A, train=False), replace(A, train=True)
    runs = lambda *messages, **kw: supervised(chatml.tokenizer, encode(chatml, *messages, **kw))  # noqa: E731
    assert runs(Q, off, Q2, A2) == [" Cold 🥶 <|im_end|>"]
    assert runs(Q, on, Q2, A2, train_on="last") == ["Quite warm.<|im_end|>", " Cold 🥶 <|im_end|>"]
    assert runs(Q, off, Q2, A2, train_on="all") == [
        "<|im_start|>user\nHow warm?<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nAnd now?\n<|im_end|>\n<|im_start|>assistant\n Cold 🥶 <|im_end|>\n",
    ]
    for question, train_on in ((replace(Q, train=True), "assistant"), (replace(Q, train=False), "all")):
        assert refusal(chatml, question, A, train_on=train_on) == (
            "f.jsonl:1: message 1 is the user's and has a `train` of its own; only the assistant's turns can be chosen"
        )
    assert refusal(chatml, Q, off) == "f.jsonl:1: no turn is supervised: there is nothing to learn from this row"


# -- end tokens, marks, thoughts, tools -------------------------------------------------------------------------------

ENDLESS = (  # as GLM-4's: the next turn's role token ends the one before
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_end_token_is_added_where_the_template_writes_none(with_template: Any) -> None:
    format = with_template(ENDLESS)
    examples = format.encode([chat(Q, A, Q2, A2)])
    assert [supervised(format.tokenizer, e) for e in examples] == [["Quite warm.<|im_end|>"], [" Cold 🥶<|im_end|>"]]
    assert format.rendering.added_ends
    (single,) = format.encode([chat(Q, A)])
    assert supervised(format.tokenizer, single) == ["Quite warm.<|im_end|>"]


MARKED = (  # as DeepSeek's: it asks for a thought, and renders answers without
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)


def test_the_templates_own_marks_where_its_prompt_is_no_prefix(with_template: Any) -> None:
    format = with_template(MARKED)
    example = encode(format, Q, A, Q2, A2)
    assert supervised(format.tokenizer, example) == ["Quite warm.<|im_end|>", " Cold 🥶 <|im_end|>"]
    prompt = format.encode_prompt([Q])
    assert format.tokenizer.decode(prompt) == "user: How warm?\n<|im_start|>", "what stood before an answer in training"
    assert is_strict_prefix(prompt, example.input_ids)


SWITCHED = CHATML.replace(
    "'<|im_start|>assistant\n' }}",
    "'<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% else %}<think>\n{% endif %}",
).replace(
    "message.role + '\n' + message.content",
    "message.role + '\n' + ('<think></think>' if message.role == 'assistant' and not message.reasoning_content else "
    "('<think>\n' + message.reasoning_content + '</think>' if message.role == 'assistant' else '')) + message.content",
)


def test_thoughts_are_switched_off_where_no_row_holds_one(with_template: Any) -> None:
    format = with_template(SWITCHED)
    assert "does not begin with the generation prompt" in refusal(format, Q, A)
    note = format.settle([chat(Q, A)])
    assert note is not None
    assert note.startswith("no row holds a thought: the chat template")
    assert format.variables == {"enable_thinking": False}
    example = encode(format, Q, A)
    assert supervised(format.tokenizer, example) == ["Quite warm.<|im_end|>"]
    assert format.tokenizer.decode(format.encode_prompt([Q])).endswith("<think></think>")
    assert is_strict_prefix(format.encode_prompt([Q]), example.input_ids)
    # Saved with a tokenizer, the template goes on as it was used.
    saved = make_tokenizer(chat_template=format.template)
    assert ChatFormat(saved).render([Q], True) == format.render([Q], True)


def test_thoughts_stay_where_a_row_holds_one_or_the_user_says_so(with_template: Any, tmp_path: Path) -> None:
    thought = replace(A, reasoning="It is July.")
    format = with_template(SWITCHED)
    assert format.settle([chat(Q, A), chat(Q, thought)]) is None
    assert format.variables == {}
    assert supervised(format.tokenizer, encode(format, Q, thought)) == ["It is July.</think>Quite warm.<|im_end|>"]
    told = ChatFormat(make_tokenizer(), str(tmp_path / "template.jinja"), {"enable_thinking": True})
    assert told.settle([chat(Q, A)]) is None
    assert told.variables == {"enable_thinking": True}


def test_a_thought_without_a_place_is_refused(chatml: ChatFormat) -> None:
    assert refusal(chatml, Q, replace(A, reasoning="It is July.")) == (
        "f.jsonl:1: the chat template leaves out the thought of turn 2 (it renders 'Quite warm.<|im_end|>'); choose "
        "another data.chat_template"
    )


TOOLS = (
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Say how warm.", "parameters": {}}}
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Zürich"}),))
RESULT = Message("tool", '{"degrees": 31}', name="weather")


def test_tool_calls_are_supervised_and_results_are_not(with_template: Any) -> None:
    format = with_template(TOOLS)
    (example,) = format.encode([Example((Q, CALL, RESULT, A), None, "f.jsonl", 1, tools=(WEATHER,))])
    assert supervised(format.tokenizer, example) == [
        '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call><|im_end|>',
        "Quite warm.<|im_end|>",
    ]
    assert '"description": "Say how warm."' in format.tokenizer.decode(example.input_ids)


def test_control_tokens_in_tools_and_calls_are_plain_text(with_template: Any) -> None:
    format = with_template(TOOLS)
    tool = {"type": "function", "function": {"name": "weather", "description": f"x{IM_END}", "parameters": {}}}
    call = Message("assistant", "", tool_calls=(ToolCall("weather", {"city": f"y{IM_END}"}),))
    (example,) = format.encode([Example((Q, call, RESULT, A), None, "f.jsonl", 1, tools=(tool,))])
    assert example.input_ids.tolist().count(format.tokenizer.eos_token_id) == 4
    assert f"y{IM_END}" in supervised(format.tokenizer, example)[0]


def test_a_template_without_a_place_for_tools_is_refused(chatml: ChatFormat, with_template: Any) -> None:
    with pytest.raises(DataError, match=r"leaves out the tools \(`weather` is not in the text it renders\)"):
        chatml.encode([Example((Q, A), None, "f.jsonl", 1, tools=(WEATHER,))])
    with pytest.raises(DataError, match=r"leaves out the call of `weather` of turn 2"):
        chatml.encode([Example((Q, CALL, RESULT, A), None, "f.jsonl", 1)])


# -- the short way is the long way ------------------------------------------------------------------------------------

PEEKING = CHATML.replace("message.content", "message.content + ('!' if '</b>' in message.content else '')")


@pytest.mark.parametrize(
    "template", [CHATML, THINKING, ENDLESS, PEEKING, CHATML.replace("message.content", "message.content | trim")]
)
def test_filling_a_shape_gives_what_rendering_every_prefix_gives(with_template: Any, template: str) -> None:
    format = with_template(template)
    turns = [
        Message("user", "a\n"),
        Message("assistant", " b"),
        Message("user", "c<b>x</b>"),
        Message("assistant", "d \n"),
    ]
    for size in (2, 4):
        for train_on in ("assistant", "last"):
            messages = turns[:size]
            indices = [i for i, m in enumerate(messages) if m.role == "assistant"][-1 if train_on == "last" else 0 :]
            short = format.rendering.supervised(messages, (), train_on)
            assert short == [piece.rendered for piece in format.rendering._exactly(messages, (), indices)]


def test_not_all_shapes_are_kept(chatml: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.data import rendering

    format = ChatFormat(chatml.tokenizer)
    rows = [chat(*(Q, A) * size, line=size) for size in range(1, 9)] * 2
    expected = [example.input_ids.tolist() for example in format.encode(rows)]
    assert len(format.rendering._shapes) == 8
    monkeypatch.setattr(rendering, "KEPT_SHAPES", 3)
    format = ChatFormat(chatml.tokenizer)
    assert [example.input_ids.tolist() for example in format.encode(rows)] == expected
    assert len(format.rendering._shapes) <= 3


def test_a_template_that_changes_contents_goes_the_long_way(with_template: Any) -> None:
    format = with_template(
        CHATML.replace("message.content", "(message.content | upper if message.role == 'user' else message.content)")
    )
    with pytest.raises(DataError, match="leaves out the user text of message 1"):
        format.encode([chat(Q, A)])
    (example,) = format.encode([chat(Message("user", "HOW?"), A)])
    assert supervised(format.tokenizer, example) == ["Quite warm.<|im_end|>"]


def test_long_chats_do_not_render_every_prefix(chatml: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.data.rendering import ChatTemplate

    rendered = []
    plain = ChatTemplate.render

    def counted(self: ChatTemplate, messages: Sequence[Message], *rest: Any, **more: Any) -> str:
        rendered.append(len(messages))
        return plain(self, messages, *rest, **more)

    rows = [chat(*(Message("user", f"q{i}"), Message("assistant", f"a{i}")) * 10, line=i) for i in range(100)]
    monkeypatch.setattr(ChatTemplate, "render", counted)
    ChatFormat(make_tokenizer()).encode(rows)
    assert len(rendered) <= 200 + 25, "each row and its last prompt once, and every prefix of one shape"


# -- parts between added tokens are tokenized once ---------------------------------------------------------------------


def piecewise(kind: str) -> Any:
    """Tokenizers that look at what stands before a text in different ways."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if kind in ("bytes", "prefix space", "look-ahead"):
        tokenizer = make_tokenizer(merges=[("Ġ", "a"), ("b", "c"), ("a", "bc"), ("Ċ", "Ċ"), ("s", "s"), ("Ċ", "Ġa")])
        if kind != "bytes":
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix space", use_regex=False)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"\s+(?!\S)|\s?\S+|\s+"), "isolated"), byte_level]
            )
        return tokenizer
    pieces = ["<unk>", "▁", "▁a", "ab", "▁u", "▁as", *"abcdefghijklmnopqrstuvwxyz\n?.<|>_"]
    backend = Tokenizer(models.Unigram([(piece, -1.0 - 0.1 * n) for n, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.split()[1])
    if kind.endswith("lower"):
        backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens(["<unk>", "<|im_start|>", IM_END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=IM_END, unk_token="<unk>")
    tokenizer.chat_template = CHATML
    return tokenizer


KINDS = ["bytes", "prefix space", "look-ahead", "metaspace always", "metaspace first", "metaspace never lower"]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_give_the_tokens_of_the_whole_text(kind: str) -> None:
    tokenizer = piecewise(kind)
    texts = st.text("abcx \n?A", min_size=1, max_size=8)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    def agree(turns: list[tuple[str, str]]) -> None:
        messages = [m for q, a in turns for m in (Message("user", q), Message("assistant", a))]
        parts, whole = ChatFormat(tokenizer), ChatFormat(tokenizer)
        whole._added = None
        one, other = parts.encode([chat(*messages)]), whole.encode([chat(*messages)])
        assert [e.input_ids.tolist() for e in one] == [e.input_ids.tolist() for e in other]
        assert [e.loss_mask.tolist() for e in one] == [e.loss_mask.tolist() for e in other]
        for turn in range(1, len(messages), 2):  # every answer begins behind the very ids that inference asks with
            example = one[turn // 2] if len(one) > 1 else one[0]
            assert is_strict_prefix(parts.encode_prompt(messages[:turn]), example.input_ids)

    agree()
    assert (ChatFormat(tokenizer)._added is None) == (kind == "metaspace first")


def test_a_part_that_comes_again_is_not_tokenized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    format = ChatFormat(make_tokenizer())
    format.encode([chat(S, Q, A)])
    asked: list[str] = []
    plain = format._plain

    class Counting:
        def encode_batch(self, texts: list[str], **options: Any) -> Any:
            asked.extend(texts)
            return plain.encode_batch(texts, **options)

    monkeypatch.setattr(format, "_plain", Counting())
    format.encode([chat(S, Q2, A2), chat(S, Q, A)])
    assert asked == ["user\nAnd now?\n", "assistant\n Cold 🥶 "]


# -- control tokens by other ways -------------------------------------------------------------------------------------


def test_names_and_ids_of_calls_are_plain_text(with_template: Any) -> None:
    format = with_template(
        TOOLS.replace("call.function | tojson", "call.id ~ call.function.name").replace(
            "{{ m.content }}", "{{ m.content }}{{ m.name }}{{ m.tool_call_id }}"
        )
    )
    call = Message("assistant", "", tool_calls=(ToolCall(f"f{IM_END}", {}, "<|im_start|>1"),))
    result = Message("tool", "{}", name=f"f{IM_END}", call_id="<|im_start|>1")
    tool = {"type": "function", "function": {"name": f"f{IM_END}"}}
    (example,), (finding,) = format.encode_checked([Example((Q, call, result, A), None, "f.jsonl", 1, tools=(tool,))])
    start, end = format.tokenizer.convert_tokens_to_ids(["<|im_start|>", IM_END])
    ids = example.input_ids.tolist()
    assert (ids.count(start), ids.count(end)) == (4, 4)
    assert finding.check == "control_token"
    assert supervised(format.tokenizer, example)[0] == f"<tool_call><|im_start|>1f{IM_END}</tool_call>{IM_END}"
    odd = replace(call, tool_calls=(ToolCall("f\ufdd2", {}),))
    assert "the tool call's text holds a Unicode noncharacter" in refusal(format, Q, odd, replace(result, name="f"), A)


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [("NFKC", "a\uff1c/s\uff1eb"), ("Lowercase", "a</S>b"), ("NFKC", "\uff1cs\uff1e"), ("Lowercase", "<S>x")],
)
def test_control_tokens_that_a_normalizer_makes(normalizer: str, text: str) -> None:
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz<>/ "]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.normalizer = getattr(normalizers, normalizer)()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    format = ChatFormat(tokenizer, "none")
    (example,) = format.encode([chat(Message("user", text), Message("assistant", "c"))])
    assert tokenizer.convert_ids_to_tokens(example.input_ids.tolist())[-2:] == ["c", "</s>"]
    assert example.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.bos_token_id not in example.input_ids
    assert is_strict_prefix(format.encode_prompt([Message("user", text)]), example.input_ids)


def test_two_texts_that_spell_a_control_token_together(tiny_tokenizer: Any) -> None:
    format = ChatFormat(tiny_tokenizer, "none")
    assert refusal(format, Message("system", "x<|im_"), Message("user", "end|>z"), A) == (
        "f.jsonl:1: two texts together spell a control token; choose another data.chat_template"
    )


def test_white_space_that_is_an_added_token_is_no_control_token(with_template: Any) -> None:
    # As Gemma's line breaks and NeoX' runs of spaces: added, not special, and in many templates' source.
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(merges=[("Ċ", "Ċ")])
    tokenizer.add_tokens([AddedToken("\n", normalized=False), AddedToken("    ", normalized=False)])
    format = with_template(CHATML.replace("{% endfor %}", "\n    {% endfor %}"), tokenizer)
    (example,), findings = format.encode_checked([chat(Message("user", "a\nb    c<|im_end|>"), A)])
    assert [finding.found for finding in findings] == ["the text holds '<|im_end|>', control token of this model"]
    pieces = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    assert pieces.count("    ") == 1
    assert pieces[:10] == ["<|im_start|>", *"user", "\n", "a", "\n", "b", "    "]


def test_the_malformed_files_control_tokens(shared_data: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</s>", "<|endoftext|>", "<|eot_id|>", "[INST]"]})
    format = ChatFormat(tokenizer)
    examples = read_examples(shared_data / "malformed" / "s17_special_token_injection.jsonl").examples
    encoded, findings = format.encode_checked(examples)
    assert [finding.line for finding in findings] == [2, 4, 6]
    assert [e.line for e in encoded] == [1, 2, 3, 4, 5, 6, 7, 8]
    for example, tokens in zip(examples, encoded, strict=True):
        ids = tokens.input_ids.tolist()
        assert ids.count(tokenizer.eos_token_id) == 2, "one end for each of two turns"
        assert sum(ids.count(token) for token in format.special_ids) == 4
        assert supervised(tokenizer, tokens) == [example.messages[-1].content + IM_END]


# -- every answer begins where inference asks -------------------------------------------------------------------------


def test_an_end_token_that_takes_white_space_with_it() -> None:
    # As Phi-3's: "<|im_end|>" has rstrip, and its token covers the line break behind it.
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str().replace('"rstrip":false', '"rstrip":true'))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=IM_END, pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    format = ChatFormat(tokenizer)
    (example,) = format.encode([chat(Q, A, Q2, A)])
    assert supervised(tokenizer, example) == ["Quite warm.<|im_end|>", "Quite warm.<|im_end|>"]
    for turn in (1, 3):
        assert is_strict_prefix(format.encode_prompt((Q, A, Q2, A)[:turn]), example.input_ids)


def test_answers_that_cannot_share_a_text_are_examples_of_their_own() -> None:
    # The first answer begins with a line break, which would be one token with the prompt's.
    format = ChatFormat(make_tokenizer(merges=[("Ċ", "Ċ")]))
    messages = (Q, Message("assistant", "\n\nyes"), Q2, A)
    first, second = format.encode([chat(*messages)])
    assert supervised(format.tokenizer, first) == ["\n\nyes<|im_end|>"]
    assert supervised(format.tokenizer, second) == ["Quite warm.<|im_end|>"]
    assert is_strict_prefix(format.encode_prompt(messages[:1]), first.input_ids)
    assert is_strict_prefix(format.encode_prompt(messages[:3]), second.input_ids)


def test_offsets_that_a_post_processor_trims() -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer(
        merges=[("Ġ", "f")],
        chat_template="{% for m in messages %}<|im_start|> {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> {% endif %}",
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    format = ChatFormat(tokenizer)
    example = encode(format, Q, Message("assistant", "foo"))
    assert supervised(tokenizer, example) == ["foo<|im_end|>"]
    assert is_strict_prefix(format.encode_prompt([Q]), example.input_ids)


@pytest.mark.parametrize(
    "condition", ["messages[0].content | length > 20", "messages[0].content[0] == '/'", "'/x' in messages[0].content"]
)
def test_a_prompt_that_depends_on_a_content(with_template: Any, condition: str) -> None:
    prompt = "'<|im_start|>assistant\n' }}{% if " + condition + " %}{{ '<think>' }}{% endif %}"
    format = with_template(CHATML.replace("'<|im_start|>assistant\n' }}", prompt))
    rows = [
        chat(Message("user", text), A, line=line) for line, text in enumerate(("hi", "/x is long enough for it"), 1)
    ]
    encoded, (finding,) = format.encode_checked(rows)
    assert [example.line for example in encoded] == [1]
    assert (finding.line, finding.severity) == (2, "error")
    assert "turn 2 does not begin with the generation prompt" in finding.found


def test_marks_of_a_row_with_a_thought(with_template: Any) -> None:
    # Nemotron's for training: asks with an opened thought; its marks begin before it. Inference asks with the same.
    format = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "<think>{{ m.reasoning_content | default('') }}</think>{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    for answer in (A, replace(A, reasoning="It is July.")):
        example = encode(format, Q, answer)
        assert supervised(format.tokenizer, example) == [
            f"<think>{answer.reasoning or ''}</think>Quite warm.<|im_end|>"
        ]
        assert is_strict_prefix(format.encode_prompt([Q]), example.input_ids)


def test_a_thought_that_the_prompt_has_opened(with_template: Any) -> None:
    opened = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
    format = with_template(opened)
    example = encode(format, Q, Message("assistant", "<think>\nwhy\n</think>\n\nans"))
    assert supervised(format.tokenizer, example) == ["why\n</think>\n\nans<|im_end|>"]


# -- nothing is left out without a word -------------------------------------------------------------------------------


def test_a_short_text_that_stands_elsewhere_too(with_template: Any) -> None:
    format = with_template(
        CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
    )
    assert refusal(format, Message("system", "help"), Message("user", "help me"), A) == (
        "f.jsonl:1: the chat template leaves out the system text of message 1; choose another data.chat_template"
    )


@pytest.mark.parametrize("setting", ["alpaca", "vicuna", "llama2"])
def test_templates_for_text_refuse_tools(tiny_tokenizer: Any, setting: str) -> None:
    format = ChatFormat(tiny_tokenizer, setting)
    said = f"f.jsonl:1: the chat template refuses this conversation: the {setting} template has no place for tools"
    for train_on in ("assistant", "last", "all"):
        assert refusal(format, Q, CALL, RESULT, A, train_on=train_on) == said
    answers = supervised(tiny_tokenizer, encode(format, S, Q, A, Q2, A))
    assert [answer.replace(" ", "") for answer in answers] == ["Quitewarm.<|im_end|>"] * 2


def test_train_on_all_leaves_nothing_out_and_ends(with_template: Any) -> None:
    dropping = with_template(
        CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
    )
    assert "leaves out the system text" in refusal(dropping, S, Q, A, train_on="all")
    endless = with_template(ENDLESS)
    assert supervised(endless.tokenizer, encode(endless, Q, A, train_on="all"))[0].endswith("Quite warm.<|im_end|>")


READS = """
import resource, sys, time
from tiny import make_tokenizer
from tunesmith.data.chat import ChatFormat
tokenizer = make_tokenizer(chat_template=sys.argv[1])
ChatFormat(make_tokenizer())
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
ChatFormat(tokenizer)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, time.process_time() - began)
"""


@pytest.mark.parametrize("constant", ["'a' * 10 ** 9", "(3 ** 60000000) % 7", "('a' * 10 ** 9)|length"])
def test_a_template_is_read_without_computing_its_constants(constant: str) -> None:
    """Jinja computes them while it compiles, where nothing can interrupt it."""
    command = [sys.executable, "-c", READS, f"{CHATML}{{{{ {constant} }}}}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    read = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    mb, seconds = map(float, read.stdout.split())
    assert mb < 64
    assert seconds < 0.5


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is nested deeper than Jinja reads"),
        ("{{ " + "+".join(["'a'"] * 3000) + " }}", "is nested deeper than Jinja reads"),
        ("{{ " + "9" * 5000 + " }}", "is not valid Jinja: Exceeds the limit"),
        ("a" * (1 << 20) + "a", "has 1,048,577 characters; at most 1,048,576 are read"),
    ],
)
def test_templates_beyond_what_is_parsed_are_refused(template: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatFormat(make_tokenizer(chat_template=template))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"), [("{% break %}", "'break' outside loop"), ("{{ 1|zork }}", "No filter named 'zork'")]
)
def test_what_only_compiling_finds_is_refused_with_the_conversation(template: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        ChatFormat(make_tokenizer(chat_template=template)).encode_prompt([Q])
    assert str(caught.value).startswith("the chat template refuses this conversation: ")
    assert said in str(caught.value)


# -- variables and what is saved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, "  \n" + CHATML, " {{ '' }}" + CHATML, "\n\n{% set a = 1 %}\n" + CHATML])
def test_a_saved_template_renders_the_same(with_template: Any, tmp_path: Path, template: str) -> None:
    uses = template + "{{ persona }}{{ deep.a[1] is none }}{{ deep.b }}{{ on }}{{ rate }}"
    variables = {"persona": '😀 é "q" \n', "deep": {"a": [1, None], "b": "x"}, "on": False, "rate": 0.5}
    (tmp_path / "t.jinja").write_text(uses, encoding="utf-8")
    format = ChatFormat(make_tokenizer(), str(tmp_path / "t.jinja"), variables)
    saved = make_tokenizer(chat_template=format.template)
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = format.render([Message("user", "a"), Message("assistant", "b")])
    assert saved.apply_chat_template(conversation, tokenize=False) == expected
    assert expected.endswith('😀 é "q" \nTruexFalse0.5')


def test_variables_that_a_template_is_given_anyway(tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatFormat(tiny_tokenizer, "auto", {"tools": [], "eos_token": "x"})
    assert str(caught.value) == "data.chat_template_kwargs sets eos_token, tools: the template is given that anyway"


def test_the_date_is_the_runs(with_template: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%d %B %Y') }}" + CHATML)
    format = ChatFormat(make_tokenizer(), str(tmp_path / "t.jinja"), now=datetime(2020, 2, 29))
    assert format.render([Q]).startswith("29 February 2020<|im_start|>")
    assert format.now == datetime(2020, 2, 29)
    assert ChatFormat(make_tokenizer()).now is None
