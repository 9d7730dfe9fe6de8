"""Forms: what each kind of row becomes, turn for turn, and what makes it unusable."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.data.columns import Columns, resolve
from tunesmith.data.conversations import Seen
from tunesmith.data.forms import READS, form_of, read_row
from tunesmith.data.problems import RowProblem
from tunesmith.types import Example, Message, PreferenceExample, ToolCall

Row = dict[str, Any]


def read(row: Row, form: str = "", columns: Columns | None = None) -> Example | PreferenceExample:
    columns = columns or Columns()
    return read_row(form or form_of(row, columns), row, "f", 3, columns, Seen())


def example(row: Row, form: str = "") -> Example:
    found = read(row, form)
    assert isinstance(found, Example)
    assert (found.file, found.line) == ("f", 3)
    return found


def problem(row: Row, form: str = "") -> str:
    with pytest.raises(RowProblem) as caught:
        read(row, form)
    return f"{caught.value.found}; {caught.value.fix}".removesuffix("; ")


def check(row: Row) -> str:
    with pytest.raises(RowProblem) as caught:
        read(row)
    return caught.value.check


def said(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)  # type: ignore[arg-type]


def chat(*turns: tuple[str, str]) -> list[Row]:
    return [{"role": role, "content": content} for role, content in turns]


def talk(*turns: tuple[str, str]) -> list[Row]:
    return [{"from": role, "value": content} for role, content in turns]


Q, A = ("user", "q"), ("assistant", "a")
S = ("system", "s")


# -- which form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": chat(Q, A)}, "messages"),
        ({"conversations": chat(Q, A)}, "messages"),
        ({"conversations": talk(("human", "q"))}, "sharegpt"),
        ({"messages": talk(("human", "q"))}, "sharegpt"),
        ({"conversations": []}, "sharegpt"),
        ({"messages": []}, "messages"),
        ({"messages": chat(Q, A), "label": True}, "kto"),
        ({"messages": chat(Q, A), "label": "greeting"}, "messages"),
        ({"messages": chat(Q, A), "chosen": None, "prompt": "x"}, "messages"),
        ({"instruction": "q", "output": "a", "label": 0}, "alpaca"),
        ({"output": None, "instruction": None}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "prompt"),
        ({"prompt": "q", "completion": "a", "label": False}, "kto"),
        ({"prompt": "q", "completion": "a", "label": "True"}, "kto"),
        ({"prompt": "q", "completion": "a", "label": 2}, "prompt"),
        ({"instruction": "q", "output": "a", "label": False}, "kto"),
        ({"instruction": "q", "output": "a", "label": "false"}, "kto"),
        ({"question": "q", "answer": "a", "label": True}, "kto"),
        ({"question": "q", "response": "a", "label": "True"}, "kto"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0, "label": True}, "multiple_choice"),
        ({"prompt": "q", "label": "safe"}, "prompt"),
        ({"question": "q", "response": "a"}, "qa"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0}, "multiple_choice"),
        ({"text": "t", "label": "l"}, "classification"),
        ({"text": "t", "label": 3}, "classification"),
        ({"text": "t", "label": None}, "text"),
        ({"text": "t", "label": ["a"]}, "classification"),
        ({"text": "t", "label": 1.0}, "classification"),
        ({"text": "t", "answer": "a"}, "text"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ({"instruction": "q", "output": "x", "chosen": "a"}, "preference"),
    ],
)
def test_form_of(row: Row, form: str) -> None:
    assert form_of(row, Columns()) == form
    assert form in READS


# -- conversations ----------------------------------------------------------------------------------------------------

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2, null]}'}}


def test_openai_tool_calls() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q "}, {"type": "input_text", "text": "more"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL, {"name": "now", "arguments": {}}]},
            {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "again", "tool_calls": [{"function": {"name": "now"}}]},
            {"role": "tool", "content": None},
            {"role": "assistant", "content": "done"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
            {"name": "now", "description": "the time"},
        ],
    }
    found = example(row)
    assert found.messages == (
        Message("system", "s"),
        Message("user", "q more"),
        Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1, "b": [2, None]}, "c1"), ToolCall("now", {}))),
        Message("tool", "3", name="add", call_id="c1"),
        Message("tool", ""),
        Message("assistant", "again", tool_calls=(ToolCall("now", {}),)),
        Message("tool", ""),
        Message("assistant", "done"),
    )
    assert found.tools == (
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "now", "description": "the time"}},
    )
    assert example({**row, "tools": json.dumps(row["tools"])}).tools == found.tools
    assert example({**row, "tools": ""}).tools == example({**row, "tools": None}).tools == ()


def test_the_older_function_call() -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}
    found = example({"messages": [*chat(Q), turn]})
    assert found.messages == (Message("user", "q"), Message("assistant", "", tool_calls=(ToolCall("f", {}),)))


def test_reasoning_and_which_turns_to_train_on() -> None:
    turns = [
        {"role": "user", "content": "q", "train": False},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "weight": 0},
        {"role": "user", "content": "q", "weight": None},
        {"role": "assistant", "content": "a", "thinking": "ah", "weight": 1.0},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "training": True, "reasoning_content": ""},
    ]
    messages = example({"messages": turns}).messages or ()
    assert [m.reasoning for m in messages] == [None, "hm", None, "ah", None, None]
    assert [m.train for m in messages] == [False, False, None, True, None, True]
    columns = resolve({"messages": "messages", "message_field_training": "learn"}, {})
    found = read({"messages": [*chat(Q), {"role": "assistant", "content": "a", "learn": False}]}, columns=columns)
    assert isinstance(found, Example)
    assert [m.train for m in found.messages or ()] == [None, False]


def test_sharegpt() -> None:
    calls = '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": "{}"}]'
    turns = talk(
        ("human", "q"), ("function_call", calls), ("observation", "1"), ("tool", "2"), ("gpt", "a"),
        ("user", "r"), ("function_call", '{"name": "f", "arguments": {}}'), ("function_response", "x"), ("chatgpt", "b"),
    )  # fmt: skip
    found = example({"conversations": turns, "system": "s", "tools": '[{"name": "f"}, {"name": "g"}]'})
    assert found.messages == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}), ToolCall("g", {}))),
        *said(("tool", "1"), ("tool", "2"), ("assistant", "a"), ("user", "r")),
        Message("assistant", "", tool_calls=(ToolCall("f", {}),)),
        *said(("tool", "x"), ("assistant", "b")),
    )
    assert found.tools == tuple({"type": "function", "function": {"name": name}} for name in "fg")


TOOL_TURN = {"role": "tool", "content": "x"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([*chat(Q), TOOL_TURN], "`messages[1]` is a tool's turn that answers no tool call; expected an assistant turn with tool calls"),
        ([*chat(Q, A), TOOL_TURN], "`messages[2]` is a tool's turn that answers no tool call; expected an assistant turn with tool calls"),
        ([*chat(Q), CALLING, TOOL_TURN, *chat(Q)], "`messages[3]`: a user turn after a tool's; expected assistant"),
        ([*chat(Q), CALLING, *chat(A)], "`messages[2]`: two assistant turns in a row; expected user"),
        ([*chat(Q), CALLING, TOOL_TURN, *chat(S)], "`messages[3]` is a system message; only one is allowed, at the start"),
        ([{**chat(Q)[0], "tool_calls": [CALL]}], "`messages[0]` has tool calls and the role 'user'; only an assistant's turn can call tools"),
        ([*chat(Q), {**CALLING, "tool_calls": "f"}], "`messages[1].tool_calls` is a string; expected a list of calls"),
        ([*chat(Q), {**CALLING, "tool_calls": ["f"]}], "`messages[1].tool_calls[0]` is a string; expected {name, arguments}"),
        ([*chat(Q), {**CALLING, "tool_calls": [{"function": {"arguments": {}}}]}], "`messages[1].tool_calls[0].name` is missing"),
        ([*chat(Q), {**CALLING, "tool_calls": [{"name": "f", "arguments": "{x"}]}], "`messages[1].tool_calls[0].arguments` is not valid JSON: expecting property name enclosed in double quotes at character 2 of it"),
        ([*chat(Q), {**CALLING, "tool_calls": [{"name": "f", "arguments": [1]}]}], "`messages[1].tool_calls[0].arguments` is a list; expected an object, or its JSON"),
        ([*chat(Q), {**CALLING, "tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}], "`messages[1].tool_calls[0].arguments` holds a lone surrogate (\\ud800-\\udfff); it is not text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "`messages[0].content[0]` is a part of type 'image_url'; only text can be trained on"),
        ([{"role": "user", "content": ["q"]}], '`messages[0].content[0]` is a string; expected {"type": "text", "text": ...}'),
        ([{"role": "user", "content": [{"type": "text"}]}], "`messages[0].content[0].text` is missing"),
        ([{"role": "user", "content": []}], "`messages[0].content` is empty"),
        ([{"role": "user", "content": {"a": 1}}], "`messages[0].content` is an object; expected a string"),
        ([*chat(Q), {"role": "assistant", "content": "", "tool_calls": []}], "`messages[1].content` is empty"),
        ([*chat(Q), {"role": "assistant", "content": "a", "weight": 0.5}], "`messages[1].weight` is 0.5; allowed: 0 (not trained on) and 1"),
        ([*chat(Q), {"role": "assistant", "content": "a", "weight": True}], "`messages[1].weight` is a boolean; allowed: 0 (not trained on) and 1"),
        ([*chat(Q), {"role": "assistant", "content": "a", "train": 1}], "`messages[1].train` is a number; expected true or false"),
        ([*chat(Q), {"role": "assistant", "content": "a", "thinking": 1}], "`messages[1].thinking` is a number; expected a string"),
        ([{"role": 1, "content": "a"}], "`messages[0].role` is a number; expected a string"),
        ([*chat(Q), {"role": "assistant", "content": "a", "train": True, "weight": 0}], "`messages[1]` has `train` true and `weight` 0, which contradict; keep one of them"),
        ([*chat(Q), {"role": "assistant", "content": "a", "train": False, "training": True}], "`messages[1]` has `train` false and `training` true, which contradict; keep one of them"),
        ([*chat(Q), {"role": "assistant", "content": "a", "tool_calls": 0}], "`messages[1].tool_calls` is a number; expected a list of calls"),
        ([*chat(Q), CALLING, {**TOOL_TURN, "tool_call_id": "c2"}], "`messages[2].tool_call_id` is 'c2', the id of no call before it; calls there: `c1`"),
        ([{"role": "user", "content": "a\0b"}], "`messages[0].content` holds a NUL character (\\u0000); remove it"),
    ],
)  # fmt: skip
def test_wrong_turns(turns: list[Row], expected: str) -> None:
    assert problem({"messages": turns}) == expected


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (talk(("gpt", "hi"), ("human", "q"), ("gpt", "a")), "`conversations[0]`: the conversation starts with assistant; expected user"),
        (talk(("human", "q"), ("GPT", "a")), "`conversations[1].from` is 'GPT'; allowed: system, human, user, gpt, assistant, model, chatgpt, bard, bing, bot, observation, tool, function_response, function_call; other names can be given a meaning with data.roles"),
        (talk(("human", "q"), ("function_call", "f(x)")), "`conversations[1].value` is not valid JSON: expecting value at character 1 of it"),
        (talk(("human", "q"), ("function_call", "5")), "`conversations[1].value` is a number; expected a list of calls"),
        (talk(("human", "q"), ("gpt", " ")), "`conversations[1].value` is blank"),
        *((talk(("human", "q"), ("function_call", value)), "`conversations[1].value` holds no call; expected {name, arguments}") for value in ("[]", "null", "{}", '""')),
        (talk(("human", "q"), ("function_call", "0")), "`conversations[1].value` is a number; expected a list of calls"),
        ([*talk(("human", "q")), {"role": "assistant", "content": "a"}], "`conversations[1].from` is missing"),
    ],
)  # fmt: skip
def test_wrong_sharegpt(turns: list[Row], expected: str) -> None:
    assert problem({"conversations": turns}) == expected


def test_only_the_tools_of_the_row_are_called() -> None:
    turns = [*chat(Q), CALLING, TOOL_TURN, *chat(A)]
    assert example({"messages": turns, "tools": [{"name": "add"}]}).messages == example({"messages": turns}).messages
    said_of_it = "calls `add`, which is not among the tools; tools of this row: `sub`"
    row = {"messages": turns, "tools": [{"name": "sub"}]}
    assert problem(row) == f"`messages[1]` {said_of_it}"
    assert problem({**row, "system": "s"}) == f"`messages[1]` {said_of_it}"
    pair = {"prompt": "q", "chosen": [CALLING], "rejected": "b", "tools": [{"name": "sub"}]}
    assert problem(pair) == f"`chosen[0]` {said_of_it}"


def test_calls_may_be_answered_in_any_order_or_not_at_all() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]}
    results = [{**TOOL_TURN, "tool_call_id": name} for name in ("c2", "c1")]
    messages = example({"messages": [*chat(Q), calls, *results, *chat(A)]}).messages or ()
    assert [m.call_id for m in messages[2:4]] == ["c2", "c1"]
    without = {**CALLING, "tool_calls": [{"name": "add"}]}
    assert example({"messages": [*chat(Q), without, results[0]]}).messages
    assert [m.role for m in example({"messages": [*chat(Q), calls, *chat(Q, A)]}).messages or ()] == [
        *("user", "assistant", "user", "assistant")
    ]


def test_keys_of_turns_that_nothing_reads_are_noted() -> None:
    seen = Seen()
    columns = resolve({"message_field_training": "learn"}, {"customer": "user"})
    turns = [
        {"role": "customer", "content": "q", "weigth": 0, "id": 3, "note": None, "learn": False},
        {"role": "assistant", "content": "a", "weigth": 1, "train": True, "refusal": "no", "thinking": "t"},
    ]
    for name in ("messages", "conversations"):
        read_row("messages", {name: turns}, "f", 1, columns, seen)
    assert seen.unread == {
        f"{name}[].{key}": 1 for name in ("messages", "conversations") for key in ("weigth", "train")
    }
    assert (seen.conversations, seen.roles) == (2, {"customer", "assistant"})


def test_system_columns() -> None:
    assert example({"messages": chat(Q, A), "system": "s"}).messages == said(S, Q, A)
    assert example({"messages": chat(S, Q, A), "system": ""}).messages == said(S, Q, A)
    assert problem({"messages": chat(S, Q, A), "system": "t"}) == (
        "a system message in the conversation and another in the column `system`; only one is allowed"
    )
    assert (
        problem({"messages": chat(Q, Q), "system": "t"}) == "`messages[1]`: two user turns in a row; expected assistant"
    )
    assert problem({"messages": chat(Q, A), "system": 1}) == "`system` is a number; expected a string"


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("{x", "`tools` is not valid JSON: expecting property name enclosed in double quotes at character 2 of it"),
        ({"name": "f"}, "`tools` is an object; expected a list of function descriptions, or its JSON"),
        (["f"], "`tools[0]` is a string; expected a function description"),
        ([{"description": "f"}], "`tools[0].name` is missing"),
        ([{"name": "f", "x": "\ud800"}], "`tools[0]` holds a lone surrogate (\\ud800-\\udfff); it is not text"),
    ],
)
def test_wrong_tools(tools: Any, expected: str) -> None:
    assert problem({"messages": chat(Q, A), "tools": tools}) == expected


# -- other forms ------------------------------------------------------------------------------------------------------


def test_alpaca() -> None:
    row = {"instruction": "q", "input": " i ", "output": "a", "system": "s", "history": [["q0", "a0"], ["q1", "a1"]]}
    expected = said(
        S, ("user", "q0"), ("assistant", "a0"), ("user", "q1"), ("assistant", "a1"), ("user", "q\n\n i "), A
    )
    assert example(row).messages == expected
    for empty in (None, [], ""):
        assert example({"instruction": "q", "output": "a", "history": empty}).messages == said(Q, A)
    assert example({"instruction": "q", "input": " \u200b", "output": "a"}).messages == said(Q, A)


@pytest.mark.parametrize(("label", "expected"), [(0, "0"), ("joy", "joy"), ("", None), (None, None)])
def test_alpaca_label(label: Any, expected: str | None) -> None:
    assert example({"instruction": "q", "output": "a", "label": label}).label == expected


@pytest.mark.parametrize(("label", "what"), [([1], "a list"), (True, "a boolean"), (1.0, "a number")])
def test_wrong_alpaca_label(label: Any, what: str) -> None:
    assert problem({"instruction": "q", "output": "a", "label": label}, "alpaca") == (
        f"`label` is {what}; expected a string or a whole number"
    )


@pytest.mark.parametrize("label", [0, 1, "0", "1", 1.0])
@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt"),
        ({"messages": chat(Q, A)}, "messages"),
        ({"conversations": talk(("human", "q"), ("gpt", "a"))}, "sharegpt"),
        ({"question": "q", "answer": "a"}, "qa"),
    ],
)
def test_a_label_of_0_or_1_that_nothing_would_read_is_refused(row: Row, form: str, label: Any) -> None:
    assert problem({**row, "label": label}) == (
        f"`label` is {label} beside an answer: KTO's label, or a class?; "
        f"write true or false for KTO; to train on every answer, set data.format to {form}"
    )
    assert example({**row, "label": label}, form).messages == said(Q, A)
    assert example({**row, "label": None}).messages == said(Q, A)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("x", "`history` is a string; expected a list of [user, assistant]"),
        ([["q"]], "`history[0]` is a list; expected [user, assistant]"),
        ([["q", "a"], "x"], "`history[1]` is a string; expected [user, assistant]"),
        ([["q", ""]], "`history[0][1]` is empty"),
        ([[1, "a"]], "`history[0][0]` is a number; expected a string"),
    ],
)
def test_wrong_history(history: Any, expected: str) -> None:
    assert problem({"instruction": "q", "output": "a", "history": history}) == expected


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    row = {"prompt": chat(S, Q, A, Q), "completion": chat(A)}
    assert example(row).messages == said(S, Q, A, Q, A)
    assert example({"prompt": chat(Q), "completion": "a"}).messages == said(Q, A)
    assert (
        problem({"prompt": chat(Q, A), "completion": "a"}) == "`prompt[2]`: two assistant turns in a row; expected user"
    )


@pytest.mark.parametrize(
    ("answer", "letter"),
    [(0, "A"), (2, "C"), ("B", "B"), ("b", "B"), ("1", "B"), ("cat", "A"), ("c", "C")],
)
def test_multiple_choice(answer: Any, letter: str) -> None:
    row = {"question": "Which?", "choices": ["cat", "A", "dog"], "answer": answer}
    assert example(row).messages == said(("user", "Which?\n\nA. cat\nB. A\nC. dog"), ("assistant", letter))
    read_first = example({**row, "passage": "Read."}).messages or ()
    assert read_first[0].content == "Read.\n\nWhich?\n\nA. cat\nB. A\nC. dog"


@pytest.mark.parametrize(
    ("choices", "answer", "choice"),
    [(["B", "A"], 1, "B"), (["A", "B"], "A", "A"), (["0", "1"], "1", "B"), (["x", "x", "y"], 1, "B"), (["x", "x", "y"], "c", "C")],
)  # fmt: skip
def test_choices_that_look_like_letters_or_repeat_may_be_named_clearly(choices: Any, answer: Any, choice: str) -> None:
    assert (example({"question": "?a", "choices": choices, "answer": answer}).messages or ())[1].content == choice


@pytest.mark.parametrize(
    ("choices", "answer", "choice"),
    [
        (["B", "A"], "A", "A, B"),
        (["4", "2", "1", "0"], "2", "B, C"),
        (["x", "y", "x"], "x", "A, C"),
        (["a", "c", "b"], "b", "B, C"),
    ],
)
def test_an_answer_that_could_be_two_choices_is_refused(choices: Any, answer: str, choice: str) -> None:
    assert problem({"question": "q", "choices": choices, "answer": answer}) == (
        f"`answer` is '{answer}', which could mean the choices {choice}; "
        "give the answer as its letter, or in JSON as a number, its index from 0"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"answer": 2}, "`answer` is 2; expected a choice's text, a letter from A to B, or an index from 0 to 1"),
        ({"answer": -1}, "`answer` is -1; expected a choice's text, a letter from A to B, or an index from 0 to 1"),
        ({"answer": "C"}, "`answer` is 'C'; expected a choice's text, a letter from A to B, or an index from 0 to 1"),
        ({"answer": True}, "`answer` is a boolean; expected a choice's text, a letter from A to B, or an index from 0 to 1"),
        ({"choices": ["x"]}, "`choices` holds 1 choices; expected 2 to 26"),
        ({"choices": ["x", ""]}, "`choices[1]` is empty"),
        ({"choices": ["x", 5]}, "`choices[1]` is a number; expected a string"),
        ({"choices": "x, y"}, "`choices` is a string; expected a list of texts"),
        ({"question": ""}, "`question` is empty"),
    ],
)  # fmt: skip
def test_wrong_multiple_choice(change: Row, expected: str) -> None:
    assert problem({"question": "Which?", "choices": ["x", "y"], "answer": 0} | change) == expected


def test_classification() -> None:
    found = example({"text": "q", "label": 4})
    assert (found.messages, found.label) == (said(Q, ("assistant", "4")), "4")
    assert problem({"text": "q", "label": ""}) == "`label` is empty"
    assert problem({"text": "q", "label": True}) == "`label` is a boolean; expected a string or a whole number"
    assert problem({"text": "q"}, "classification") == "`label` is missing"


def test_kto() -> None:
    found = example({"prompt": "q", "completion": "a", "label": "FALSE"})
    assert (found.messages, found.desirable, found.label) == (said(Q, A), False, None)
    assert example({"prompt": chat(S, Q), "completion": chat(A), "label": True}).messages == said(S, Q, A)
    assert example({"conversations": talk(("human", "q"), ("gpt", "a")), "label": True}).desirable is True
    for row in ({"instruction": "q", "output": "a"}, {"question": "q", "answer": "a"}):
        found = example({**row, "label": False})
        assert (found.messages, found.desirable, found.label) == (said(Q, A), False, None)
    assert problem({"messages": chat(Q, A)}, "kto") == "`label` is missing; expected true or false"
    assert problem({"messages": chat(Q, A), "label": 1}, "kto") == (
        "`label` is a number; expected true (a good answer) or false (a bad one)"
    )
    assert problem({"messages": chat(Q), "label": True}) == (
        "`messages` holds no assistant turn: there is nothing to learn from this row"
    )
    assert check({"completion": "a", "label": True}) == "missing_field"


# -- preferences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [Q], "a", "b"),
        ({"prompt": chat(S, Q), "chosen": chat(A), "rejected": chat(("assistant", "b"))}, [S, Q], "a", "b"),
        ({"prompt": "q", "chosen": chat(Q, A), "rejected": chat(Q, ("assistant", "b"))}, [Q], "a", "b"),
        ({"chosen": chat(S, Q, A, Q, A), "rejected": chat(S, Q, A, Q, ("assistant", "b"))}, [S, Q, A, Q], "a", "b"),
        ({"chosen": talk(("human", "q"), ("gpt", "a")), "rejected": talk(("human", "q"), ("gpt", "b"))}, [Q], "a", "b"),
        ({"conversations": talk(("human", "q")), "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}, [Q], "a", "b"),
        ({"conversations": talk(("human", "q")), "chosen": "a", "rejected": "b", "system": "s"}, [S, Q], "a", "b"),
        ({"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, [("user", "q\n\ni")], "a", "b"),
        ({"question": "q", "system": "s", "chosen": "a", "rejected": "b"}, [S, Q], "a", "b"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, [("user", "The sky is")], " blue.", " black."),
        ({"chosen": "User: hi\nBot: hello", "rejected": "User: hi\nBot: hell"}, [("user", "User: hi\nBot:")], " hello", " hell"),
        ({"chosen": "so it is", "rejected": "so it is not"}, [("user", "so it")], " is", " is not"),
        ({"chosen": "q:\nyes", "rejected": "q:\nno"}, [("user", "q:\n")], "yes", "no"),
    ],
)  # fmt: skip
def test_preference(row: Row, prompt: list[tuple[str, str]], chosen: str, rejected: str) -> None:
    answers = said(("assistant", chosen)), said(("assistant", rejected))
    assert read(row) == PreferenceExample(said(*prompt), *answers, "f", 3)


def test_answers_of_several_turns() -> None:
    row = {"chosen": chat(Q, A, Q, A), "rejected": chat(Q, A, ("user", "other"), A)}
    assert read(row) == PreferenceExample(said(Q), said(A, Q, A), said(A, ("user", "other"), A), "f", 3)


SAME = "there is nothing to prefer in this row"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, f"`chosen` and `rejected` are the same; {SAME}"),
        ({"prompt": "q", "chosen": "A  b", "rejected": " a B\n"}, f"`chosen` and `rejected` differ only in case and white space; {SAME}"),
        ({"chosen": chat(Q, A), "rejected": chat(Q, A)}, f"`chosen` and `rejected` are the same; {SAME}"),
        ({"prompt": "q", "chosen": "a"}, "`rejected` is missing"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "`chosen` is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "`rejected` is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": {}}, "`rejected` is empty"),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "`chosen` is a number; expected a string"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "`prompt` is empty"),
        ({"prompt": chat(Q, A), "chosen": "a", "rejected": "b"}, "`chosen[0]`: two assistant turns in a row; expected user"),
        ({"prompt": chat(Q, A), "chosen": "a", "rejected": "b", "system": "s"}, "`chosen[0]`: two assistant turns in a row; expected user"),
        ({"prompt": chat(Q, Q), "chosen": "a", "rejected": "b"}, "`prompt[1]`: two user turns in a row; expected assistant"),
        ({"prompt": chat(S), "chosen": "a", "rejected": "b"}, "`chosen[0]`: the conversation starts with assistant; expected user"),
        ({"prompt": "q", "chosen": chat(A), "rejected": chat(Q)}, "`rejected` starts with user behind the prompt; expected the assistant's answer"),
        ({"prompt": "x", "chosen": chat(Q, A), "rejected": chat(Q, ("assistant", "b"))}, "`chosen` starts with another conversation than the prompt beside it; expected the assistant's turn, or the same prompt"),
        ({"chosen": "Paris is it", "rejected": "Paris was it"}, "`chosen` and `rejected` have no common beginning to be the prompt; add a `prompt`, or name its column with data.columns"),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}, "`chosen` is a transcript: its turns are marked by `Human:` and `Assistant:` in the text; write the turns as a list of {role, content}"),
        ({"chosen": "yes", "rejected": "no"}, "`chosen` and `rejected` have no common beginning to be the prompt; add a `prompt`, or name its column with data.columns"),
        ({"chosen": chat(Q, A), "rejected": chat(("user", "r"), A)}, "`chosen` and `rejected` have no common beginning to be the prompt; add a `prompt`, or name its column with data.columns"),
        ({"chosen": chat(A), "rejected": chat(("assistant", "b"))}, "`chosen` and `rejected` have no common beginning to be the prompt; add a `prompt`, or name its column with data.columns"),
        ({"prompt": "?", "chosen": "!", "rejected": "."}, "the row holds no letter and no digit; remove it, or mend its text"),
    ],
)  # fmt: skip
def test_wrong_preference(row: Row, expected: str) -> None:
    assert problem(row) == expected


def test_answers_may_differ_in_their_reasoning_alone() -> None:
    thoughts = [[{"role": "assistant", "content": "a", "thinking": thought}] for thought in ("good", "bad", "Bad ")]
    found = read({"prompt": "q", "chosen": thoughts[0], "rejected": thoughts[1]})
    assert isinstance(found, PreferenceExample)
    assert [m.reasoning for m in (*found.chosen, *found.rejected)] == ["good", "bad"]
    assert problem({"prompt": "q", "chosen": thoughts[1], "rejected": thoughts[2]}) == (
        "`chosen` and `rejected` differ only in case and white space; there is nothing to prefer in this row"
    )


def test_one_word_on_a_line_of_its_own_may_be_a_prompt() -> None:
    found = read({"chosen": "Greet\nhello you", "rejected": "Greet\ngo away"})
    assert isinstance(found, PreferenceExample)
    assert found.prompt[0].content == "Greet\n"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"x": 1}, "unknown_form"),
        ({"text": ""}, "empty_text"),
        ({"text": 1}, "wrong_type"),
        ({"text": "\ud800"}, "lone_surrogate"),
        ({"text": "."}, "no_letter_or_digit"),
        ({"prompt": "q"}, "nothing_to_learn"),
        ({"instruction": "q"}, "nothing_to_learn"),
        ({"output": "a"}, "missing_field"),
        ({"prompt": "q", "completion": "a", "label": 1}, "unclear_label"),
        ({"text": "a\0b"}, "nul_byte"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "transcript"),
        ({"messages": chat(("bot", "q"))}, "unknown_role"),
        ({"messages": chat(Q, Q)}, "turn_order"),
        ({"messages": chat(Q)}, "no_assistant_turn"),
        ({"messages": chat(Q, S)}, "second_system"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen_equals_rejected"),
    ],
)
def test_stable_names_of_checks(row: Row, name: str) -> None:
    assert check(row) == name
