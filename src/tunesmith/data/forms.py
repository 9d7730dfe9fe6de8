"""From a row to an Example: the forms in which people keep training data.

| form | fields |
|---|---|
| messages | `messages`: OpenAI's `{role, content}`, with tool calls, tool results, `reasoning_content`, `weight` or `train` |
| sharegpt | `conversations`: `{from, value}`, with `function_call` and `observation` turns |
| alpaca | `instruction`, `output`, optional `input`, `history`, `label` |
| prompt | `prompt`, `completion`: texts, or lists of messages |
| qa | `question`, `answer` (or `response`) |
| multiple_choice | `question`, `choices`, `answer` (the choice's text, its letter, or its index from 0), optional `passage` |
| classification | `text`, `label` |
| text | `text` |
| preference | `chosen`, `rejected`; the prompt in `prompt`, `conversations`, `instruction` or `question`, or as their common beginning |
| kto | `messages`, or a prompt and an answer as above, and a `label` that is true or false |

All but `text` may have `system` and `tools` beside them. An Alpaca row's `input` follows its instruction after a blank
line. A multiple-choice question is asked as `passage`, blank line, `question`, blank line, `A. ...`, `B. ...`; the
answer is the letter. An answer that could be read as two of the choices is refused.

A label of 0 or 1 beside an answer is refused where nothing would read it: TRL takes it for KTO's label, and training on the
answers that it calls bad would be a silent mistake. KTO's label is written true or false here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tunesmith.data.columns import Columns
from tunesmith.data.conversations import (
    Row,
    Seen,
    check_calls,
    check_letters,
    check_turns,
    checked_text,
    is_blank,
    parse_json,
    read_conversation,
    read_tools,
    role_key_of,
    spoken,
    text_of,
)
from tunesmith.data.problems import RowProblem, kind, listed
from tunesmith.types import Example, Message, PreferenceExample, Role

BESIDE = ("system", "tools")
READS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", *BESIDE),
    "sharegpt": ("messages", *BESIDE),
    "alpaca": ("instruction", "input", "output", "history", "label", *BESIDE),
    "prompt": ("prompt", "completion", *BESIDE),
    "qa": ("question", "answer", *BESIDE),
    "multiple_choice": ("question", "choices", "answer", "passage", *BESIDE),
    "classification": ("text", "label", *BESIDE),
    "text": ("text",),
    "preference": ("prompt", "messages", "instruction", "input", "question", "chosen", "rejected", *BESIDE),
    "kto": (
        "messages",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "question",
        "answer",
        "label",
        *BESIDE,
    ),
}
"""The fields that each form reads."""

KNOWN_FORMS = (
    "expected `messages`, `conversations`, `instruction`+`output`, `prompt`+`completion`, `question`+`answer`, "
    "`text`, `text`+`label` or `chosen`+`rejected`; name other columns with data.columns"
)
NO_LABEL = ("messages", "sharegpt", "prompt", "qa")
"""Forms with an answer that read no label."""

TRANSCRIPT = re.compile(r"\A\s*(?:Human|User):.*\n\s*Assistant:", re.DOTALL)
"""Turns written into one text, as in Anthropic's HH data."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# -- which form -------------------------------------------------------------------------------------------------------


def form_of(row: Row, columns: Columns) -> str:
    """The form of a row by its keys. Raises RowProblem where there is none, and for a label that may be KTO's or a class."""
    there = {name: column for name in columns.columns if (column := columns.find(row, name)) is not None}
    filled = {name: column for name, column in there.items() if row[column] is not None}
    form = ""
    if columns.decisive:
        form = _form_of(row, {name: filled[name] for name in columns.decisive & filled.keys()}, columns)
    form = form or _form_of(row, filled, columns) or _form_of(row, there, columns)
    if not form:
        raise RowProblem("unknown_form", f"no known form: keys found: {listed(row)}", KNOWN_FORMS)
    if form in NO_LABEL and "label" in filled and row[filled["label"]] in (0, 1, "0", "1"):
        found = f"`{filled['label']}` is {row[filled['label']]} beside an answer: KTO's label, or a class?"
        fix = f"write true or false for KTO; to train on every answer, set data.format to {form}"
        raise RowProblem("unclear_label", found, fix, filled["label"])
    return form


def _form_of(row: Row, has: dict[str, str], columns: Columns) -> str:
    """The form of a row that has these fields (in these columns); empty if it has none."""
    if has.keys() & {"chosen", "rejected"}:
        return "preference"
    answered = has.keys() & {"messages", "completion", "output"} or ("question" in has and "answer" in has)
    if answered and "choices" not in has and (columns.kto or _is_truth(row, has.get("label"))):
        return "kto"
    if "messages" in has:
        column = has["messages"]
        role_key = columns.role_key or role_key_of(row[column], "from" if column == "conversations" else "role")
        return "sharegpt" if role_key == "from" else "messages"
    if has.keys() & {"instruction", "output"}:
        return "alpaca"
    if columns.prompt_alone and "prompt" in has and "completion" not in has:
        return "text"
    if has.keys() & {"prompt", "completion"}:
        return "prompt"
    if "choices" in has:
        return "multiple_choice"
    if "question" in has:
        return "qa"
    if "text" in has:
        return "classification" if "label" in has and row[has["label"]] is not None else "text"
    return ""


def _is_truth(row: Row, column: str | None) -> bool:
    return column is not None and _truth(row[column]) is not None


def _truth(value: Any) -> bool | None:
    """True or false as JSON has them or as a table's text has them; None for anything else."""
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else None


def read_row(form: str, row: Row, file: str, line: int, columns: Columns, seen: Seen) -> Example | PreferenceExample:
    """The example that a row of the given form holds; what its turns have is noted in `seen`.

    Raises RowProblem with the first thing that is wrong.
    """
    return _READERS[form](_Fields(row, columns, seen), file, line)


class _Fields:
    """A row, its values looked up by field."""

    def __init__(self, row: Row, columns: Columns, seen: Seen):
        self.row = row
        self.columns = columns
        self.seen = seen

    def has(self, name: str) -> bool:
        """Whether there is such a column, with or without a value."""
        return self.columns.find(self.row, name) is not None

    def get(self, name: str) -> Any:
        """The value; None where there is no such column."""
        column = self.columns.find(self.row, name)
        return None if column is None else self.row[column]

    def column(self, name: str) -> str:
        """The column of the field; where there is none, the one it was looked for in first."""
        return self.columns.find(self.row, name) or next(iter(self.columns.columns[name]), name)

    def text(self, name: str) -> str:
        """A text that is there and not blank."""
        return text_of(self.row, self.column(name))

    def optional(self, name: str) -> str:
        """The field's text; empty if it is missing, null or blank."""
        value = self.get(name)
        if value is None or value == "":
            return ""
        text = checked_text(value, self.column(name))
        return "" if is_blank(text) else text

    def elements(self, name: str, expected: str) -> list[Any]:
        """A list, or (from a table's cell) its JSON."""
        column = self.column(name)
        if not self.has(name):
            raise RowProblem("missing_field", f"`{column}` is missing", field=column)
        value = self.row[column]
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = parse_json(value, column)
        if not isinstance(value, list):
            raise RowProblem("wrong_type", f"`{column}` is {kind(value)}", f"expected {expected}", column)
        return value

    def conversation(self, name: str) -> list[Message]:
        """The messages of a list of turns."""
        turns = self.elements(name, "a list of {role, content}")
        return read_conversation(turns, self.column(name), self.columns, self.seen)

    def turns(self, name: str, role: Role) -> list[Message]:
        """A text (one turn of `role`), one message, or a list of messages."""
        value = self.get(name)
        if isinstance(value, dict) and value:
            return read_conversation([value], self.column(name), self.columns, self.seen)
        return self.conversation(name) if isinstance(value, list) else [Message(role, self.text(name))]

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages behind the system message of the row's own column, if it has one."""
        system = self.optional("system")
        if system and messages and messages[0].role == "system":
            found = f"a system message in the conversation and another in the column `{self.column('system')}`"
            raise RowProblem("second_system", found, "only one is allowed", self.column("system"))
        return [Message("system", system), *messages] if system else messages

    def needs_answer(self, asked: str, answer: str) -> None:
        """Raise for a row that only asks."""
        if not self.has(answer):
            raise RowProblem(
                "nothing_to_learn",
                f"`{self.column(asked)}` has no answer beside it, so there is nothing to learn (keys found: "
                f"{listed(self.row)})",
                f"if a column holds the answer, name it with data.columns, e.g. {{{answer}: reply}}",
                answer,
            )


# -- conversations ----------------------------------------------------------------------------------------------------


def _example(
    fields: _Fields,
    messages: list[Message],
    name: str,
    file: str,
    line: int,
    *,
    label: str | None = None,
    desirable: bool | None = None,
) -> Example:
    """The example of a conversation that stands in the column of the field `name`."""
    turns = fields.with_system(messages)
    check_turns(turns, fields.column(name), len(turns) - len(messages))
    if not any(message.role == "assistant" for message in turns):
        column = fields.column(name)
        found = f"`{column}` holds no assistant turn: there is nothing to learn from this row"
        raise RowProblem("no_assistant_turn", found, field=column)
    check_letters(spoken(turns))
    tools = read_tools(fields.get("tools"), fields.column("tools"))
    check_calls(turns, tools, fields.column(name), len(turns) - len(messages))
    return Example(tuple(turns), None, file, line, tools, label, desirable)


def _read_messages(fields: _Fields, file: str, line: int) -> Example:
    return _example(fields, fields.conversation("messages"), "messages", file, line)


def _read_alpaca(fields: _Fields, file: str, line: int) -> Example:
    if not fields.has("instruction"):
        column = fields.column("instruction")
        found = f"`{column}` is missing (keys found: {listed(fields.row)})"
        fix = "if a column holds it, name it with data.columns, e.g. {instruction: ask}"
        raise RowProblem("missing_field", found, fix, column)
    fields.needs_answer("instruction", "output")
    messages: list[Message] = []
    column = fields.column("history")
    for index, pair in enumerate(
        fields.elements("history", "a list of [user, assistant]") if fields.get("history") else []
    ):
        where = f"{column}[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem("wrong_type", f"`{where}` is {kind(pair)}", "expected [user, assistant]", where)
        turn = {f"[{number}]": text for number, text in enumerate(pair)}
        messages += [Message("user", text_of(turn, "[0]", where)), Message("assistant", text_of(turn, "[1]", where))]
    messages += [Message("user", _instruction(fields)), Message("assistant", fields.text("output"))]
    label = fields.get("label")
    if label is not None and type(label) not in (str, int):
        column = fields.column("label")
        raise RowProblem("wrong_type", f"`{column}` is {kind(label)}", "expected a string or a whole number", column)
    return _example(fields, messages, "instruction", file, line, label=None if label in (None, "") else str(label))


def _instruction(fields: _Fields) -> str:
    instruction = fields.text("instruction")
    extra = fields.optional("input")
    return f"{instruction}\n\n{extra}" if extra else instruction


def _read_prompt(fields: _Fields, file: str, line: int) -> Example:
    fields.needs_answer("prompt", "completion")
    messages = [*fields.turns("prompt", "user"), *fields.turns("completion", "assistant")]
    return _example(fields, messages, "prompt", file, line)


def _read_qa(fields: _Fields, file: str, line: int) -> Example:
    fields.needs_answer("question", "answer")
    messages = [Message("user", fields.text("question")), Message("assistant", fields.text("answer"))]
    return _example(fields, messages, "question", file, line)


def _read_multiple_choice(fields: _Fields, file: str, line: int) -> Example:
    fields.needs_answer("question", "answer")
    column = fields.column("choices")
    choices = fields.elements("choices", "a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise RowProblem("choices", f"`{column}` holds {len(choices)} choices", f"expected 2 to {len(LETTERS)}", column)
    texts = [text_of({f"[{index}]": choice}, f"[{index}]", column) for index, choice in enumerate(choices)]
    passage = fields.optional("passage")
    question = f"{passage}\n\n{fields.text('question')}" if passage else fields.text("question")
    listing = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    answer = LETTERS[_right_choice(fields, texts)]
    messages = [Message("user", f"{question}\n\n{listing}"), Message("assistant", answer)]
    example = _example(fields, messages, "question", file, line)
    return replace(example, choices=tuple(LETTERS[: len(texts)]))


def _right_choice(fields: _Fields, texts: list[str]) -> int:
    """The index of the right choice: given as the choice's text, its letter, or its index from 0."""
    answer = fields.get("answer")
    column = fields.column("answer")
    letters = LETTERS[: len(texts)]
    if isinstance(answer, str):
        names = [*texts, *letters, *letters.lower(), *map(str, range(len(texts)))]
        meant = sorted({index % len(texts) for index, name in enumerate(names) if name == answer})
        if len(meant) == 1:
            return meant[0]
        if meant:
            found = (
                f"`{column}` is {answer[:40]!r}, which could mean the choices {', '.join(letters[i] for i in meant)}"
            )
            fix = "give the answer as its letter, or in JSON as a number, its index from 0"
            raise RowProblem("wrong_choice", found, fix, column)
    elif type(answer) is int and 0 <= answer < len(texts):
        return answer
    shown = repr(answer[:40]) if isinstance(answer, str) else str(answer) if type(answer) is int else kind(answer)
    allowed = f"expected a choice's text, a letter from A to {letters[-1]}, or an index from 0 to {len(texts) - 1}"
    raise RowProblem("wrong_choice", f"`{column}` is {shown}", allowed, column)


def _read_classification(fields: _Fields, file: str, line: int) -> Example:
    column = fields.column("label")
    label = fields.get("label")
    if type(label) is int:
        label = str(label)
    elif fields.has("label") and not isinstance(label, str):
        raise RowProblem("wrong_type", f"`{column}` is {kind(label)}", "expected a string or a whole number", column)
    else:
        label = fields.text("label")
    messages = [Message("user", fields.text("text")), Message("assistant", label)]
    return _example(fields, messages, "text", file, line, label=label)


def _read_text(fields: _Fields, file: str, line: int) -> Example:
    text = fields.text("text")
    check_letters([text])
    return Example(None, text, file, line)


def _asked(fields: _Fields) -> tuple[str, list[Message]] | None:
    """The prompt of a preference or KTO row and the field it is in; None if the row has no prompt."""
    if fields.get("prompt") is not None:
        return "prompt", fields.turns("prompt", "user")
    if fields.get("messages") is not None:
        return "messages", fields.conversation("messages")
    if fields.get("instruction") is not None:
        return "instruction", [Message("user", _instruction(fields))]
    return ("question", fields.turns("question", "user")) if fields.get("question") is not None else None


def _read_kto(fields: _Fields, file: str, line: int) -> Example:
    column = fields.column("label")
    if not fields.has("label"):
        raise RowProblem("missing_field", f"`{column}` is missing", "expected true or false", column)
    label = _truth(fields.get("label"))
    if label is None:
        found = f"`{column}` is {kind(fields.get('label'))}"
        raise RowProblem("wrong_type", found, "expected true (a good answer) or false (a bad one)", column)
    if fields.has("messages"):
        return _example(fields, fields.conversation("messages"), "messages", file, line, desirable=label)
    answer = next((name for name in ("output", "completion", "answer") if fields.has(name)), "completion")
    name, prompt = _asked(fields) or ("prompt", fields.turns("prompt", "user"))
    fields.needs_answer(name, answer)
    messages = [*prompt, *fields.turns(answer, "assistant")]
    return _example(fields, messages, name, file, line, desirable=label)


# -- preferences ------------------------------------------------------------------------------------------------------


def _read_preference(fields: _Fields, file: str, line: int) -> PreferenceExample:
    for name in ("chosen", "rejected"):
        if fields.get(name) in ([], {}):
            raise RowProblem("empty_text", f"`{fields.column(name)}` is empty", field=fields.column(name))
    name, asked = _asked(fields) or ("prompt", None)
    chosen, rejected = fields.turns("chosen", "assistant"), fields.turns("rejected", "assistant")
    _check_different(fields, chosen, rejected)
    before = len(asked or ())
    if asked is None and isinstance(fields.get("chosen"), str) and isinstance(fields.get("rejected"), str):
        asked, chosen, rejected = _cut_texts(fields)
    elif asked is None or chosen[0].role != "assistant":
        asked, chosen, rejected = _cut_conversations(fields, asked, chosen, rejected)
        before = 0
    prompt = fields.with_system(asked)
    before += len(prompt) - len(asked)
    check_turns(prompt, fields.column(name), len(prompt) - len(asked))
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        column = fields.column(side)
        if not answer or answer[0].role != "assistant":
            found = f"`{column}` starts with {answer[0].role if answer else 'nothing'} behind the prompt"
            raise RowProblem("turn_order", found, "expected the assistant's answer", column)
        check_turns([*prompt, *answer], column, before)
    check_letters(spoken([*prompt, *chosen, *rejected]))
    tools = read_tools(fields.get("tools"), fields.column("tools"))
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        check_calls([*prompt, *answer], tools, fields.column(side), before)
    return PreferenceExample(tuple(prompt), tuple(chosen), tuple(rejected), file, line, tools)


def _check_different(fields: _Fields, chosen: list[Message], rejected: list[Message]) -> None:
    """Refuse two answers that are the same, or the same up to case and white space."""
    plain = [
        [
            (m.role, *(" ".join(text.split()).casefold() for text in (m.content, m.reasoning or "")), m.tool_calls)
            for m in side
        ]
        for side in (chosen, rejected)
    ]
    if plain[0] == plain[1]:
        how = "are the same" if chosen == rejected else "differ only in case and white space"
        found = f"`{fields.column('chosen')}` and `{fields.column('rejected')}` {how}"
        raise RowProblem("chosen_equals_rejected", found, "there is nothing to prefer in this row", "chosen")


Cut = tuple[list[Message], list[Message], list[Message]]


def _no_prompt(fields: _Fields) -> RowProblem:
    found = f"`{fields.column('chosen')}` and `{fields.column('rejected')}` have no common beginning to be the prompt"
    return RowProblem("missing_field", found, "add a `prompt`, or name its column with data.columns", "prompt")


def _cut_texts(fields: _Fields) -> Cut:
    """The prompt is what two texts share, up to the border of a word; the space before it belongs to the answers."""
    chosen, rejected = fields.text("chosen"), fields.text("rejected")
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    while count and not chosen[count - 1].isspace():
        count -= 1
    count -= count > 0 and chosen[count - 1] == " "
    shared = chosen[:count]
    if TRANSCRIPT.search(shared):
        found = f"`{fields.column('chosen')}` is a transcript: its turns are marked by `Human:` and `Assistant:` in the text"
        fix = "write the turns as a list of {role, content}"
        raise RowProblem("transcript", found, fix, fields.column("chosen"))
    # One word that both answers happen to begin with is no question; a line of its own may be.
    if is_blank(shared) or (len(shared.split()) == 1 and not shared.endswith("\n")):
        raise _no_prompt(fields)
    answers = [
        [Message("assistant", text_of({fields.column(name): text[count:]}, fields.column(name)))]
        for name, text in (("chosen", chosen), ("rejected", rejected))
    ]
    return [Message("user", shared)], answers[0], answers[1]


def _cut_conversations(
    fields: _Fields, asked: list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> Cut:
    """The prompt is what two conversations share, before the assistant's turn in which they part."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    while count and not all(len(side) > count and side[count].role == "assistant" for side in (chosen, rejected)):
        count -= 1
    shared = chosen[:count]
    if asked is not None and (not asked or shared[-len(asked) :] != asked):
        found = f"`{fields.column('chosen')}` starts with another conversation than the prompt beside it"
        raise RowProblem("prompt_differs", found, "expected the assistant's turn, or the same prompt", "chosen")
    if not any(message.role == "user" for message in shared):
        raise _no_prompt(fields)
    return shared, chosen[count:], rejected[count:]


_READERS: dict[str, Callable[[_Fields, str, int], Example | PreferenceExample]] = {
    "messages": _read_messages,
    "sharegpt": _read_messages,
    "alpaca": _read_alpaca,
    "prompt": _read_prompt,
    "qa": _read_qa,
    "multiple_choice": _read_multiple_choice,
    "classification": _read_classification,
    "text": _read_text,
    "preference": _read_preference,
    "kto": _read_kto,
}
