"""Conversations as people write them down: OpenAI's messages and ShareGPT's turns, tool calls, tools, and their rules.

A conversation has at most one system message, at the start; then user and assistant take turns; tool results follow an
assistant's turn with tool calls. Text is kept exactly as it is: no normalisation, no stripping. Nothing is guessed,
merged or dropped: what breaks a rule is a RowProblem.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from tunesmith.data.columns import FUNCTION_CALL, Columns
from tunesmith.data.problems import RowProblem, kind, listed
from tunesmith.types import Message, Role, ToolCall

Row = Mapping[str, Any]

BLANK_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode's control, format (zero-width) and separator characters: a text of nothing else is blank."""

LETTER_OR_DIGIT = re.compile(r"[^\W_]")

OPENAI_ROLES: dict[str, str] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",
}
SHAREGPT_ROLES: dict[str, str] = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "bing", "bot"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    FUNCTION_CALL: FUNCTION_CALL,
}

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
READ_KEYS = frozenset({"training", "weight", "tool_calls", "function_call", "name", "tool_call_id", *REASONING_KEYS})
"""Keys of a turn that are read, beside those of its role, its text and its `train` flag."""

HARMLESS_KEYS = frozenset(
    {"annotations", "audio", "created_at", "id", "idx", "index", "lang", "language"}
    | {"meta", "metadata", "model", "parsed", "refusal", "source", "timestamp", "uuid"}
)
"""Keys of a turn that say nothing about how to train on it: nothing reads them, and no word is lost over that."""


@dataclass(slots=True)
class Seen:
    """What the turns of all rows had. `roles` are role names, noted where `data.roles` is set.

    `unread` has the keys that nothing reads, as `messages[].weigth`, with the number of conversations that have them.
    """

    conversations: int = 0
    roles: set[str] = field(default_factory=set)
    unread: Counter[str] = field(default_factory=Counter)


# -- texts ------------------------------------------------------------------------------------------------------------


def text_of(row: Row, key: str, where: str = "") -> str:
    """The text under a key: there, a string, not blank. `where` stands before the key in messages."""
    name = where + key
    if key not in row:
        raise RowProblem("missing_field", f"`{name}` is missing", field=name)
    value = checked_text(row[key], name)
    if is_blank(value):
        raise RowProblem("empty_text", f"`{name}` is {'blank' if value else 'empty'}", field=name)
    return value


def checked_text(value: Any, name: str) -> str:
    """A value that has to be a string that UTF-8 can hold; it may be blank."""
    if not isinstance(value, str):
        raise RowProblem("wrong_type", f"`{name}` is {kind(value)}", "expected a string", name)
    if "\0" in value:
        raise RowProblem("nul_byte", f"`{name}` holds a NUL character (\\u0000)", "remove it", name)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _surrogate(name) from None
    return value


def is_blank(value: str) -> bool:
    """Whether a text is empty or holds nothing but white space, control and zero-width characters."""
    return all(unicodedata.category(character) in BLANK_CATEGORIES for character in value)


def parse_json(text: str, name: str) -> Any:
    """The value of a text that has to be JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = f"`{name}` is not valid JSON: {error.msg[0].lower()}{error.msg[1:]} at character {error.pos + 1} of it"
        raise RowProblem("invalid_json", found, field=name) from None
    except (ValueError, RecursionError):  # a number too long for Python, brackets too deep
        raise RowProblem("invalid_json", f"`{name}` holds JSON that is too large to read", field=name) from None


def check_letters(texts: Iterable[str]) -> None:
    """Refuse a row in which no text has a letter or a digit."""
    if not any(LETTER_OR_DIGIT.search(text) for text in texts):
        raise RowProblem("no_letter_or_digit", "the row holds no letter and no digit", "remove it, or mend its text")


def spoken(messages: Iterable[Message]) -> Iterator[str]:
    """The texts of a conversation, names of called tools included."""
    for message in messages:
        yield message.content
        yield from (call.name for call in message.tool_calls)


def _surrogate(name: str) -> RowProblem:
    found = f"`{name}` holds a lone surrogate (\\ud800-\\udfff)"
    return RowProblem("lone_surrogate", found, "it is not text", name)


# -- messages ---------------------------------------------------------------------------------------------------------


def role_key_of(conversation: Any, default: str) -> str:
    """Whether the turns of a conversation name their role in `from` or in `role`."""
    first = conversation[0] if isinstance(conversation, list) and conversation else None
    keys = [key for key in ("from", "role") if isinstance(first, dict) and key in first]
    return keys[0] if keys else default


def read_conversation(items: Sequence[Any], column: str, columns: Columns, seen: Seen) -> list[Message]:
    """The messages of a list of turns, in OpenAI's or ShareGPT's style. Their order is not checked.

    Notes in `seen` what the turns have.
    """
    role_key = columns.role_key or role_key_of(items, "role")
    content_key = columns.content_key or ("value" if role_key == "from" else "content")
    roles: Mapping[str, str] = SHAREGPT_ROLES if role_key == "from" else OPENAI_ROLES
    if columns.roles:
        roles = {**roles, **columns.roles}
    messages = [
        _message(item, f"{column}[{index}]", role_key, content_key, roles, columns.train_key)
        for index, item in enumerate(items)
    ]
    seen.conversations += 1
    if columns.roles:
        seen.roles.update(item[role_key] for item in items)
    known = _known_keys(role_key, content_key, columns.train_key)
    unread = {key for item in items if not item.keys() <= known for key in item.keys() - known if item[key] is not None}
    if unread:
        seen.unread.update(f"{column}[].{key}" for key in sorted(unread))
    return messages


@lru_cache
def _known_keys(*own: str) -> frozenset[str]:
    """The keys of a turn of which no word is said."""
    return READ_KEYS | HARMLESS_KEYS | set(own)


def _message(
    item: Any, where: str, role_key: str, content_key: str, roles: Mapping[str, str], train_key: str
) -> Message:
    if not isinstance(item, dict):
        expected = f"expected {{{role_key}, {content_key}}}"
        raise RowProblem("wrong_type", f"`{where}` is {kind(item)}", expected, where)
    name = text_of(item, role_key, f"{where}.")
    role = roles.get(name)
    if role is None:
        allowed = f"allowed: {', '.join(roles)}; other names can be given a meaning with data.roles"
        raise RowProblem("unknown_role", f"`{where}.{role_key}` is {name!r}", allowed, f"{where}.{role_key}")
    train = _train(item, where, train_key)
    if role == FUNCTION_CALL:
        place = f"{where}.{content_key}"
        called = _tool_calls(parse_json(text_of(item, content_key, f"{where}."), place), place)
        if not called:
            raise RowProblem("tool_call", f"`{place}` holds no call", "expected {name, arguments}", place)
        return Message("assistant", "", tool_calls=called, train=train)
    calls_key = "tool_calls" if item.get("tool_calls") or "function_call" not in item else "function_call"
    tool_calls = _tool_calls(item.get(calls_key), f"{where}.{calls_key}")
    if tool_calls and role != "assistant":
        fix = "only an assistant's turn can call tools"
        raise RowProblem("tool_call", f"`{where}` has tool calls and the role {name!r}", fix, f"{where}.tool_calls")
    return Message(
        cast(Role, role),
        _content(item, content_key, where, may_be_blank=bool(tool_calls) or role == "tool"),
        _reasoning(item, where),
        tool_calls,
        _optional(item, "name", where),
        _optional(item, "tool_call_id", where),
        train,
    )


def _content(item: Row, key: str, where: str, may_be_blank: bool) -> str:
    """A turn's text: a string, or a list of text parts. Beside tool calls it may be null, and so may a tool's."""
    value = item.get(key)
    if isinstance(value, list):
        value = "".join(_part(part, f"{where}.{key}[{index}]") for index, part in enumerate(value))
    if may_be_blank:
        return "" if value is None else checked_text(value, f"{where}.{key}")
    return text_of({key: value} if key in item else {}, key, f"{where}.")


def _part(part: Any, where: str) -> str:
    """The text of one part of a message's content."""
    if not isinstance(part, dict):
        expected = 'expected {"type": "text", "text": ...}'
        raise RowProblem("wrong_type", f"`{where}` is {kind(part)}", expected, where)
    style = part.get("type", "text")
    if style not in ("text", "input_text", "output_text"):
        shown = repr(style[:40]) if isinstance(style, str) else kind(style)
        raise RowProblem("media_part", f"`{where}` is a part of type {shown}", "only text can be trained on", where)
    if "text" not in part:
        raise RowProblem("missing_field", f"`{where}.text` is missing", field=where)
    return checked_text(part["text"], f"{where}.text")


def _optional(item: Row, key: str, where: str) -> str | None:
    value = item.get(key)
    return None if value is None else checked_text(value, f"{where}.{key}")


def _reasoning(item: Row, where: str) -> str | None:
    for key in REASONING_KEYS:
        if item.get(key) is not None:
            return checked_text(item[key], f"{where}.{key}") or None
    return None


def _train(item: Row, where: str, train_key: str) -> bool | None:
    """Whether the turn is supervised: `train` or `training` (true, false), or OpenAI's `weight` (0, 1)."""
    keys = [key for key in (train_key, "training", "weight") if item.get(key) is not None]
    for key in keys:
        value = item[key]
        if key == "weight" and (type(value) not in (int, float) or value not in (0, 1)):
            shown = str(value) if type(value) in (int, float) else kind(value)
            allowed = "allowed: 0 (not trained on) and 1"
            raise RowProblem("wrong_weight", f"`{where}.weight` is {shown}", allowed, f"{where}.weight")
        if key != "weight" and not isinstance(value, bool):
            found = f"`{where}.{key}` is {kind(value)}"
            raise RowProblem("wrong_type", found, "expected true or false", f"{where}.{key}")
    if len({bool(item[key]) for key in keys}) > 1:
        found = f"`{where}` has {' and '.join(f'`{key}` {json.dumps(item[key])}' for key in keys)}, which contradict"
        raise RowProblem("wrong_weight", found, "keep one of them", where)
    return bool(item[keys[0]]) if keys else None


# -- tools ------------------------------------------------------------------------------------------------------------


def _tool_calls(calls: Any, where: str) -> tuple[ToolCall, ...]:
    """A list of calls, or a single one; none for null and for what is empty."""
    if calls is None or calls in ([], {}, ""):
        return ()
    if isinstance(calls, dict):
        return (_tool_call(calls, where),)
    if not isinstance(calls, list):
        raise RowProblem("wrong_type", f"`{where}` is {kind(calls)}", "expected a list of calls", where)
    return tuple(_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls))


def _tool_call(call: Any, where: str) -> ToolCall:
    """OpenAI's `{id, function: {name, arguments}}`, or the bare `{name, arguments}`."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise RowProblem("tool_call", f"`{where}` is {kind(function)}", "expected {name, arguments}", where)
    name = text_of(function, "name", f"{where}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        found = f"`{where}.arguments` is {kind(arguments)}"
        raise RowProblem("tool_call", found, "expected an object, or its JSON", f"{where}.arguments")
    _check_json(arguments, f"{where}.arguments")
    return ToolCall(name, arguments, _optional(call, "id", where))


def read_tools(value: Any, column: str) -> tuple[Mapping[str, Any], ...]:
    """Function descriptions in OpenAI's form: from a list or its JSON, bare `{name, parameters}` wrapped."""
    if isinstance(value, str):
        value = parse_json(value, column) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        expected = "expected a list of function descriptions, or its JSON"
        raise RowProblem("wrong_type", f"`{column}` is {kind(value)}", expected, column)
    return tuple(_tool(tool, f"{column}[{index}]") for index, tool in enumerate(value))


def _tool(tool: Any, where: str) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(function, dict):
        raise RowProblem("wrong_type", f"`{where}` is {kind(function)}", "expected a function description", where)
    text_of(function, "name", f"{where}.")
    _check_json(tool, where)
    return cast("Mapping[str, Any]", tool) if function is not tool else {"type": "function", "function": tool}


def _check_json(value: Any, where: str) -> None:
    """Refuse what could not be written out as JSON, as a chat template does with tools and arguments."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _surrogate(where) from None
    except (TypeError, ValueError, RecursionError):
        raise RowProblem("wrong_type", f"`{where}` cannot be written as JSON", field=where) from None


# -- the order of turns -----------------------------------------------------------------------------------------------


def check_turns(messages: Sequence[Message], name: str, before: int = 0) -> None:
    """Refuse turns in an order that is not a conversation. The first `before` messages are not in the column `name`."""
    previous: Message | None = None
    for index, message in enumerate(messages):
        problem = _turn_problem(message, previous, index)
        if problem:
            check, found, fix = problem
            place = f"{name}[{index - before}]"
            raise RowProblem(check, f"`{place}`{found}", fix, place)
        previous = message if message.role != "system" else previous


def check_calls(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], name: str, before: int = 0) -> None:
    """Refuse a call of a function that is not among the row's tools (if it has any), and a result of no call.

    A result is one of no call if it has an id and the calls before it have others. Calls that no result follows are
    fine: the results may not be there yet. The first `before` messages are not in the column `name`.
    """
    known = [tool.get("function", tool)["name"] for tool in tools]
    ids: set[str | None] = set()
    for index, message in enumerate(messages):
        place = f"{name}[{index - before}]"
        if message.role == "assistant":
            ids = {call.id for call in message.tool_calls}
        elif message.role == "tool" and message.call_id is not None and None not in ids and message.call_id not in ids:
            found = f"`{place}.tool_call_id` is {message.call_id!r}, the id of no call before it"
            raise RowProblem("tool_call", found, f"calls there: {listed(sorted(map(str, ids)))}", place)
        for call in message.tool_calls if known else ():
            if call.name not in known:
                found = f"`{place}` calls `{call.name}`, which is not among the tools"
                raise RowProblem("tool_call", found, f"tools of this row: {listed(known)}", place)


def _turn_problem(message: Message, previous: Message | None, index: int) -> tuple[str, str, str] | None:
    """(check, what was found, what is allowed) for a turn that must not stand behind `previous`."""
    role, last = message.role, previous.role if previous else None
    if role == "system":
        return ("second_system", " is a system message", "only one is allowed, at the start") if index else None
    if role == "tool":
        if last == "tool" or (previous and previous.tool_calls):
            return None
        return "turn_order", " is a tool's turn that answers no tool call", "expected an assistant turn with tool calls"
    if role == last:
        return "turn_order", f": two {role} turns in a row", f"expected {'assistant' if role == 'user' else 'user'}"
    if role == "assistant" and last is None:
        return "turn_order", ": the conversation starts with assistant", "expected user"
    if role == "user" and last == "tool":
        return "turn_order", ": a user turn after a tool's", "expected assistant"
    return None
