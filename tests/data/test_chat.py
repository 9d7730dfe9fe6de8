"""Templates and loss masks: what is supervised, what is refused, and that training sees what inference asks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import CHATML, IM_END, chat_rows, make_tokenizer, write_jsonl
from tunesmith.data.chat import ChatFormat, tokenize
from tunesmith.data.formats import read_examples
from tunesmith.errors import ConfigError, DataError
from tunesmith.files import sha256_text
from tunesmith.types import Example, Message, TokenizedExample

Q, A = Message("user", "How warm?"), Message("assistant", "Quite warm.")
Q2, A2 = Message("user", "And now?\n"), Message("assistant", " Cold 🥶 ")
S = Message("system", "Be brief.")


def chat(*messages: Message, line: int = 1) -> Example:
    return Example(messages, None, "f.jsonl", line)


def text(content: str, line: int = 1) -> Example:
    return Example(None, content, "f.jsonl", line)


def supervised(tokenizer: Any, example: TokenizedExample) -> list[str]:
    """The runs of supervised tokens, decoded."""
    runs: list[list[int]] = [[]]
    for token, mask in zip(example.input_ids, example.loss_mask, strict=True):
        if mask:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


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


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda t: "<|" not in t)


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
    ids = encode(chatml, Q, A).input_ids
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


def test_problems_of_all_rows_come_at_once(chatml: ChatFormat) -> None:
    bad = Message("user", f"x{IM_END}")
    rows = [chat(bad if line % 2 else Q, A, line=line) for line in range(1, 61)]
    with pytest.raises(DataError) as caught:
        chatml.encode(rows)
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
    assert example.loss_mask == (False, False, True, True, True)
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
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
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


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|pad|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_a_text_are_refused(chatml: ChatFormat, token: str, role: str) -> None:
    messages = [Message(m.role, f"x {token}y") if m.role == role else m for m in (S, Q, A)]
    said = (
        f"the {role} text holds {token!r}, a control token of this model: it would end or forge a turn; remove it, or "
        "write it differently"
    )
    assert refusal(chatml, *messages) == refusal(chatml, *messages, train_on="all") == f"f.jsonl:1: {said}"
    with pytest.raises(DataError) as caught:
        chatml.encode_prompt(messages)
    assert str(caught.value) == said


def test_control_tokens_in_plain_text_are_refused(chatml: ChatFormat) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:3: the user text holds '<\|im_end\|>', a control token"):
        chatml.encode([text("one", 1), text("x<|im_end|>", 3)])


def test_what_only_looks_like_a_control_token_is_text(chatml: ChatFormat) -> None:
    answer = "<|im_en|> <|IM_END|> </s> [INST] <|im_end |>"
    example = encode(chatml, Q, Message("assistant", answer))
    assert supervised(chatml.tokenizer, example) == [answer + IM_END]
    assert example.input_ids.count(chatml.tokenizer.eos_token_id) == 2


THINKING = (  # as Qwen3's: an empty thought stands before the last answer only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused(with_template: Any) -> None:
    format = with_template(THINKING)
    assert supervised(format.tokenizer, encode(format, Q, A)) == ["<think></think>Quite warm.<|im_end|>"]
    assert refusal(format, Q, A, Q2, A2) == (
        "f.jsonl:1: the chat template cannot be masked exactly: it rewrites turn 2 when later turns follow; choose "
        "another data.chat_template, or data.train_on: all"
    )
    assert all(encode(format, Q, A, Q2, A2, train_on="all").loss_mask)


def test_a_template_whose_generation_prompt_is_no_prefix_of_its_answers_is_refused(with_template: Any) -> None:
    format = with_template(CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}"))
    assert refusal(format, Q, A) == (
        "f.jsonl:1: the chat template cannot be masked exactly: turn 2 does not begin with the generation prompt (ends in "
        "'<|im_start|>assistant\\n<think>\\n'); choose another data.chat_template, or data.train_on: all"
    )
    assert all(encode(format, Q, A, train_on="all").loss_mask)


def test_a_template_that_leaves_the_answer_out_is_refused(with_template: Any) -> None:
    # As the templates of vision models, which expect a list of parts and render nothing for a string.
    format = with_template(
        "{% for m in messages %}{{ m.role }}:{% for part in m.content if part.text %}{{ part.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert refusal(format, Q, A) == (
        "f.jsonl:1: the chat template leaves out the text of turn 2 (it renders '<|im_end|>'); choose another "
        "data.chat_template"
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
    format = with_template("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(ConfigError) as caught:
        encode(format, Q, A)
    assert str(caught.value) == f"the chat template ({format.name}) is not valid Jinja: unexpected '}}' (line 2)"


@pytest.mark.parametrize("setting", ["no/such.jinja", "chatml", "", "."])
def test_a_template_that_is_not_there(tiny_tokenizer: Any, setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatFormat(tiny_tokenizer, setting)
    assert str(caught.value) == (
        f"data.chat_template is {setting!r}: expected auto, alpaca, none, or an existing .jinja file"
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


# -- too long ---------------------------------------------------------------------------------------------------------

LENGTHS = {1: 20, 2: 100, 3: 30, 4: 200}
"""Tokens of the plain texts below, by line."""


@pytest.fixture
def rows() -> list[Example]:
    return [text("x" * (length - 1), line) for line, length in LENGTHS.items()]


def test_overlong_is_an_error_by_default(chatml: ChatFormat, rows: list[Example]) -> None:
    with pytest.raises(DataError) as caught:
        tokenize(chatml, rows, 64)
    assert caught.value.problems == [
        f"f.jsonl:{line}: {length} tokens, data.max_seq_length is 64; raise it, or set data.overlong to truncate or drop"
        for line, length in ((2, 100), (4, 200))
    ]


def test_an_example_of_just_the_longest_length_is_kept(chatml: ChatFormat, rows: list[Example]) -> None:
    kept, notes = tokenize(chatml, rows, 200)
    assert [len(example) for example in kept] == [20, 100, 30, 200]
    assert notes == []


def test_drop(chatml: ChatFormat, rows: list[Example]) -> None:
    kept, notes = tokenize(chatml, rows, 64, overlong="drop")
    assert [example.line for example in kept] == [1, 3]
    assert notes == ["2 of 4 rows dropped: longer than 64 tokens (lines 2, 4)"]


def test_truncate(chatml: ChatFormat, rows: list[Example]) -> None:
    kept, notes = tokenize(chatml, rows, 64, overlong="truncate")
    assert [(example.line, len(example)) for example in kept] == [(1, 20), (2, 64), (3, 30), (4, 64)]
    assert all(len(example.loss_mask) == len(example.input_ids) for example in kept)
    assert notes == ["2 of 4 rows cut to 64 tokens (lines 2, 4)"]


def test_many_long_rows_are_listed_in_short(chatml: ChatFormat) -> None:
    _, notes = tokenize(chatml, [text("x" * 20, line) for line in range(1, 13)], 8, overlong="truncate")
    assert notes == ["12 of 12 rows cut to 8 tokens (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)"]


ENDLESS = CHATML.replace("<|im_end|>", "")
UNENDED = (
    "1 of 1 rows have answers without an end token (line 1: the last supervised token is '.'): the model does not learn "
    "to stop; the chat template ({name}) writes none, choose another data.chat_template"
)


def test_answers_without_an_end_token_are_noted(with_template: Any) -> None:
    format = with_template(ENDLESS)
    kept, notes = tokenize(format, [chat(Q, A)], 200)
    assert supervised(format.tokenizer, kept[0]) == ["Quite warm."]
    assert notes == [UNENDED.format(name=format.name)]


@pytest.mark.parametrize("template", [CHATML, "{{ messages[0].content }}{% if not add_generation_prompt %}"
                                      "{{ messages[1].content }}{{ eos_token }}{% endif %}"])  # fmt: skip
def test_answers_with_an_end_token_are_not(with_template: Any, template: str) -> None:
    assert tokenize(with_template(template), [chat(Q, A)], 200)[1] == []


def test_a_cut_answer_or_a_text_is_not_one_without_an_end(with_template: Any) -> None:
    format = with_template(ENDLESS)
    _, notes = tokenize(format, [chat(Q, Message("assistant", "x" * 300)), text("a text", 2)], 100, "truncate")
    assert notes == ["1 of 2 rows cut to 100 tokens (lines 1)"]


def test_nothing_left_after_dropping(chatml: ChatFormat, rows: list[Example]) -> None:
    with pytest.raises(DataError) as caught:
        tokenize(chatml, rows, 10, overlong="drop")
    assert str(caught.value) == "no rows are left: all 4 are longer than data.max_seq_length 10"


def test_a_row_whose_answer_is_cut_away_is_an_error(chatml: ChatFormat) -> None:
    rows = [chat(Q, A, line=1), chat(Message("user", "x" * 200), A, line=2)]
    with pytest.raises(DataError) as caught:
        tokenize(chatml, rows, 64, overlong="truncate")
    assert caught.value.problems == [
        "f.jsonl:2: no supervised token is left once cut to data.max_seq_length; there is nothing to learn from this row"
    ]


def test_a_row_without_a_supervised_token_is_an_error(with_template: Any) -> None:
    # An answer of nothing but white space, in a template without an end-of-turn token, leaves an empty span.
    format = with_template("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
                           "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    with pytest.raises(DataError) as caught:
        tokenize(format, [chat(Q, Message("assistant", " "), line=4)], 64)
    assert str(caught.value) == ("f.jsonl:4: no supervised token is left; there is nothing to learn from this row")


# -- templates in the wild --------------------------------------------------------------------------------------------


def packaged_templates() -> list[Path]:
    """The chat templates that TRL packages, one of each model family that people train."""
    spec = importlib.util.find_spec("trl")  # found without importing it
    assert spec is not None
    assert spec.origin is not None
    return sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))


EXACT = ("cohere", "gemma3", "lfm2", "llama3", "llama3_1", "qwen2_5", "qwen3_instruct_2507", "qwen3_training")
"""Templates that must be masked, in conversations of several turns too."""


def test_every_packaged_template_is_masked_exactly_or_refused() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    paths = packaged_templates()
    assert len(paths) > 50
    for path in paths:
        format = ChatFormat(tokenizer, str(path))
        for messages in ((Q, A), (Q, A, Q2, A2), (S, Q, A, Q2, A2)):
            answers = [message.content.strip() for message in messages if message.role == "assistant"]
            try:
                example = encode(format, *messages)
            except DataError:
                assert path.stem not in EXACT, path.stem
                continue
            found = supervised(tokenizer, example)
            assert len(found) == len(answers), path.stem
            for answer, piece in zip(answers, found, strict=True):
                assert answer in piece, path.stem
                assert "How warm?" not in piece, path.stem
                assert "And now?" not in piece, path.stem
            assert tokenizer.decode(example.input_ids) == format.render(messages), path.stem
            assert is_strict_prefix(format.encode_prompt(messages[:-1]), example.input_ids), path.stem
