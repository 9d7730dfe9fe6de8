"""Conversations as text: the chat template, and which characters of the text the loss covers.

The loss mask comes from rendering, not from searching for marker strings: for the assistant's turn i, what the model is
given at inference (`prompt`: the conversation before it, with the generation prompt) has to be what the conversation up to
it begins with; what follows is what the model has to write, its end-of-turn token included. White space after that token is
left out. Three kinds of templates need more:

- One that rewrites earlier turns (a thinking model's, which drops old thoughts): the conversation becomes one text for
  each supervised turn, cut after it, because no single text shows every turn as the model will have to write it.
- One that writes no end token after an answer: the tokenizer's end-of-sequence token is added, one text a turn.
- One whose generation prompt is no prefix of its answers (DeepSeek's, which asks for a thought), but which marks them with
  `{% generation %}`: its prompt is what stands before the mark.

What cannot be masked exactly is refused.

Rendering every prefix of every conversation takes time that grows with the square of its turns. So it is done once for
each shape (shapes.py); the rows of a shape are filled in, and each is compared with what the template itself renders: its
text, and the prompt of its last supervised turn. Rows that a shape cannot speak for (tools, thoughts, contents with a
string that the template looks for) take the long way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from tunesmith.data.shapes import RenderedText, Shape, Span, edges_of, is_dropped, slots_for, strings_looked_for
from tunesmith.errors import ConfigError, DataError
from tunesmith.types import Message

BROKEN_TEMPLATE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError)
"""What Jinja lets through when a template does something that its values, or Python (`break` outside of a loop), cannot."""

NOT_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "conversations")
"""Names that a template is given anyway."""

KEPT_SHAPES = 1000
"""Shapes in memory at most: where every row is a shape of its own, none comes again."""

PROMPT_TAIL = 64
"""So many characters of a prompt's end may belong to the answer's text: an opened thought."""


class MaskError(DataError):
    """A template that cannot be masked exactly, or that refuses a conversation."""


class ChatTemplate:
    """A Jinja chat template with its variables. Renders as `tokenizer.apply_chat_template` does (transformers' sandbox).

    `special_tokens` are the tokenizer's (`bos_token`, `eos_token`, ...), `control_tokens` the strings that end a turn or
    start one: an answer that ends with none of them gets `eos_token`. `now` is the time that a template sees which prints
    the date. Raises ConfigError for a template that is no Jinja, and for variables that it cannot have.
    """

    def __init__(
        self,
        name: str,
        text: str,
        variables: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        control_tokens: Sequence[str],
        now: datetime,
    ):
        if taken := sorted({*variables} & {*NOT_VARIABLES, *special_tokens}):
            raise ConfigError(f"data.chat_template_kwargs sets {', '.join(taken)}: the template is given that anyway")
        self.name = name
        self.text = text
        self.variables = dict(variables)
        self.special_tokens = dict(special_tokens)
        self.now = now
        self.prints_date = "strftime_now" in text
        self._ends = tuple(control_tokens)
        self._control = re.compile("|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) or "(?!)")
        self._shapes: dict[Any, list[Shape] | None] = {}
        self._inspected = strings_looked_for(name, text)
        self.added_ends = False

    def with_variables(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """The same template with other variables."""
        return ChatTemplate(self.name, self.text, variables, self.special_tokens, self._ends, self.now)

    @property
    def text_to_save(self) -> str:
        """The template with its variables as defaults: saved with a tokenizer, it renders the same without being told."""
        # Each ends with a line break, which goes with its tag (trim_blocks), so that the text begins on a line of its own.
        return (
            "".join(
                f"{{% if {name} is not defined %}}{{% set {name} = {_jinja_literal(value)} %}}{{% endif %}}\n"
                for name, value in self.variables.items()
            )
            + self.text
        )

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the model sees it. Raises MaskError if the template refuses it."""
        return self._render(messages, tools, add_generation_prompt)[0]

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        given: dict[str, Any] = self.special_tokens | self.variables
        if self.prints_date:
            given["strftime_now"] = self.now.strftime
        try:
            texts, indices = render_jinja_template(
                conversations=[[self._as_dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marks,
                **given,
            )
        except (jinja2.exceptions.TemplateError, *BROKEN_TEMPLATE) as error:
            said = " ".join(str(error).split())
            raise MaskError(f"the chat template refuses this conversation: {said}") from None
        return str(texts[0]), [(start, end) for start, end in indices[0]] if marks else []

    def _as_dict(self, message: Message) -> dict[str, Any]:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            row["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                | ({"id": call.id} if call.id else {})
                for call in message.tool_calls
            ]
        if message.reasoning is not None:
            row |= {key: message.reasoning for key in ("reasoning_content", "thinking") if key in self.text}
        if message.name:
            row["name"] = message.name
        if message.call_id:
            row["tool_call_id"] = message.call_id
        return row

    # -- what an answer begins with ------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """What the model is given so that it writes the next turn; an answer in training begins behind the same text."""
        if not self.asks_otherwise:
            return self.render(messages, tools, add_generation_prompt=True)
        answered = [*messages, Message("assistant", "b")]
        full, marked = self._render(answered, tools, marks=True)
        if len(marked) != sum(message.role == "assistant" for message in answered):
            raise MaskError("the chat template does not mark where an answer to this conversation would begin")
        start = marked[-1][0]
        common = _length_in_common(full, self.render(messages, tools, add_generation_prompt=True))
        while (header := self._control.match(full, start, max(common, start))) and header.end() > start:
            start = header.end()  # some marks hold the turn's header
        return full[:start]

    @cached_property
    def asks_otherwise(self) -> bool:
        """Whether the generation prompt is no prefix of an answer, and the template's own marks say where that begins."""
        question, answer = Message("user", "a"), Message("assistant", "b")
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.text):
            return False
        try:
            prompt = self.render([question], (), True)
            full, marked = self._render([question, answer], (), marks=True)
        except MaskError:
            return False  # it needs more than a question: what it refuses is said where it is used
        return not full.startswith(prompt) and len(marked) == 1

    # -- what is supervised --------------------------------------------------------------------------------------------

    def supervised(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), train_on: str = "assistant"
    ) -> list[RenderedText]:
        """The conversation as one text, or as one for each supervised turn, with what is supervised in it.

        `train_on` is `assistant`, `last` or `all`; an assistant's own `train` comes first. Raises MaskError.
        """
        for index, message in enumerate(messages):
            if message.role != "assistant" and (message.train or (message.train is False and train_on == "all")):
                raise MaskError(
                    f"message {index + 1} is the {message.role}'s and has a `train` of its own; only the assistant's turns "
                    "can be chosen"
                )
        if train_on == "all":
            return [self._whole(messages, tools)]
        turns = _supervised_turns(messages, train_on)
        if not turns:
            raise MaskError("no turn is supervised: there is nothing to learn from this row")
        plain = not tools and all(not m.tool_calls and m.reasoning is None for m in messages)
        if plain and not any(self._inspected.finds(message.content) for message in messages):
            edges = tuple((message.role, *edges_of(message.content)) for message in messages)
            key = (edges, tuple(turns))
            if key not in self._shapes:
                if len(self._shapes) >= KEPT_SHAPES:
                    self._shapes.clear()
                self._shapes[key] = self._shape(edges, turns)
            shapes = self._shapes[key]
            if shapes is not None:
                filled = [shape.fill(messages) for shape in shapes]
                if all(self._is_rendered(text, shape, messages) for text, shape in zip(filled, shapes, strict=True)):
                    return filled
        return [piece.rendered for piece in self._exactly(messages, tools, turns)]

    def _is_rendered(self, filled: RenderedText, shape: Shape, messages: Sequence[Message]) -> bool:
        """Whether the template renders this very text, and this prompt of the last supervised turn."""
        text = self.render(messages[: shape.num_messages])
        if filled.text != (self._closed(text) if shape.added_end else text):
            return False
        return self.prompt(messages[: shape.last_turn]) == filled.text[: filled.spans[-1][0]]

    def _whole(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> RenderedText:
        """Every character, but for the assistant's turns that are not to be trained."""
        text = self.render(messages, tools)
        self._check_complete(text, messages, tools)
        left_out = [index for index, message in enumerate(messages) if message.train is False]
        holes: tuple[Span, ...] = ()
        if left_out:
            pieces = self._exactly(messages, tools, left_out)
            if [piece.rendered.text for piece in pieces] != [text]:
                raise MaskError("the chat template cannot be masked exactly: set data.train_on: assistant for this row")
            holes = pieces[0].rendered.spans
        if not text.rstrip().endswith(self._ends):
            self.added_ends = True
            text = self._closed(text)
        bounds = [0, *(bound for hole in holes for bound in hole), len(text)]
        spans = zip(bounds[::2], bounds[1::2], strict=True)
        return RenderedText(text, tuple((start, end) for start, end in spans if start < end))

    def _exactly(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], turns: Sequence[int]
    ) -> list[_Piece]:
        """The long way: every prompt and every prefix is rendered."""
        full = self.render(messages, tools)
        self._check_complete(full, messages, tools)
        found: list[_Turn] = []
        for index in turns:
            prompt = self.prompt(messages[:index], tools)
            through = full if index == len(messages) - 1 else self.render(messages[: index + 1], tools)
            if not through.startswith(prompt):
                raise MaskError(
                    f"the chat template cannot be masked exactly: turn {index + 1} does not begin with the generation "
                    f"prompt (ends in {prompt[-30:]!r}); choose another data.chat_template, set "
                    "data.chat_template_kwargs if it has a variable for this, or data.train_on: all"
                )
            answer = through[len(prompt) :].rstrip()
            self._check_answer(prompt[-PROMPT_TAIL:], answer, messages[index], index)
            inside = self._as_in(full, through, prompt, answer)
            found.append(_Turn(len(prompt), through, answer, inside, answer.endswith(self._ends)))
        if all(turn.inside and turn.closed for turn in found):
            spans = tuple((turn.begin, turn.begin + len(turn.inside)) for turn in found)
            return [_Piece(RenderedText(full, spans), len(messages), turns[-1], False)]
        pieces = []
        for index, turn in zip(turns, found, strict=True):
            text, end = turn.through, turn.begin + len(turn.answer)
            if not turn.closed:
                self.added_ends = True
                text = self._closed(text)
                end = len(text)
            pieces.append(_Piece(RenderedText(text, ((turn.begin, end),)), index + 1, index, not turn.closed))
        return pieces

    def _as_in(self, full: str, through: str, prompt: str, answer: str) -> str:
        """As much of the answer as the whole conversation shows too; empty if it does not show a finished one.

        What follows a finished answer only at the very end of a conversation (Phi-3's last token) may be missing.
        """
        if not full.startswith(prompt):
            return ""
        together = _length_in_common(through, full) - len(prompt)
        if together >= len(answer):
            return answer
        end = max((match.end() for match in self._control.finditer(answer, 0, max(together, 0))), default=0)
        return answer[:end] if end and self._is_control(answer[end:]) else ""

    def _is_control(self, text: str) -> bool:
        return not self._control.sub("", text).strip()

    def _closed(self, text: str) -> str:
        return text.rstrip() + self.special_tokens["eos_token"]

    # -- what a template leaves out ------------------------------------------------------------------------------------

    def _check_complete(self, full: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        """Whatever a template drops, the model would never see: a system message, a tool, a call, a tool's result.

        An assistant's earlier thoughts may be dropped: thinking models' templates do.
        """
        seen = _without_space(full)
        for index, message in enumerate(messages):
            content = message.content.rpartition("</think>")[2] if message.role == "assistant" else message.content
            if not _is_shown(content, seen):
                raise _left_out(f"{message.role} text of message {index + 1}")
            for call in message.tool_calls:
                if call.name not in full:
                    raise _left_out(f"call of `{call.name}` of turn {index + 1}")
        for tool in tools:
            name = str(tool.get("function", tool).get("name", ""))
            if name not in full:
                raise _left_out(f"tools (`{name}` is not in the text it renders)")

    def _check_answer(self, tail: str, answer: str, message: Message, index: int) -> None:
        """An answer has to hold its text, thought and calls; the prompt's `tail` may have opened the thought."""
        seen = _without_space(tail + answer)
        content = message.content.rpartition("</think>")[2] if "</think>" not in answer else message.content
        shown = f"of turn {index + 1} (it renders {answer[:30]!r})"
        if _without_space(content) not in seen:
            raise _left_out(f"text {shown}")
        if content != message.content or _without_space(message.reasoning or "") not in seen:
            raise _left_out(f"thought {shown}")
        for call in message.tool_calls:
            values = [value for value in call.arguments.values() if isinstance(value, str)]
            if call.name not in answer or not all(_is_shown(value, seen) for value in values):
                raise _left_out(f"call of `{call.name}` {shown}")

    def _shape(self, edges: Sequence[tuple[Any, ...]], turns: Sequence[int]) -> list[Shape] | None:
        """How rows of one shape render, or None if their contents are not opaque to the template."""
        slots = slots_for(edges)
        messages = [Message(role, slot.text) for (role, _, _), slot in zip(edges, slots, strict=True)]
        dropped = None
        try:
            full = self.render(messages)
            # A short text could be found elsewhere in the conversation: a slot cannot.
            dropped = next((index for index, slot in enumerate(slots) if is_dropped(slot, full)), None)
            pieces = self._exactly(messages, (), turns)
        except MaskError:
            if dropped is not None:
                raise _left_out(f"{messages[dropped].role} text of message {dropped + 1}") from None
            return None
        shapes = [
            Shape.read(piece.rendered, slots, edges, piece.num_messages, piece.last_turn, piece.added_end)
            for piece in pieces
        ]
        return None if None in shapes else [shape for shape in shapes if shape is not None]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A text of the first `num_messages` messages; `last_turn` is the last one that is supervised in it."""

    rendered: RenderedText
    num_messages: int
    last_turn: int
    added_end: bool


@dataclass(frozen=True, slots=True)
class _Turn:
    """A supervised turn: its answer begins at `begin` of `through`; `inside` is as much of it as the whole text has."""

    begin: int
    through: str
    answer: str
    inside: str
    closed: bool


def _left_out(what: str) -> MaskError:
    return MaskError(f"the chat template leaves out the {what}; choose another data.chat_template")


def _supervised_turns(messages: Sequence[Message], train_on: str) -> list[int]:
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    default = {*answers} if train_on != "last" else {*answers[-1:]}
    return [
        index for index in answers if (messages[index].train if messages[index].train is not None else index in default)
    ]


def _length_in_common(left: str, right: str) -> int:
    """How many characters two texts begin with alike."""
    shorter = min(len(left), len(right))
    return next((place for place in range(shorter) if left[place] != right[place]), shorter)


def _without_space(text: str) -> str:
    return "".join(text.split())


def _is_shown(content: str, seen: str) -> bool:
    """Whether a text is in what was rendered, as it is or as a JSON string (tools' results often are)."""
    text = _without_space(content)
    return text in seen or _without_space(json.dumps(content, ensure_ascii=False)[1:-1]) in seen


def _jinja_literal(value: Any) -> str:
    """A value of YAML as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_jinja_literal(key)}: {_jinja_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_jinja_literal, value)) + "]"
    if value is None:
        return "none"
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"data.chat_template_kwargs holds {value}: a template cannot be saved with it")
    return json.dumps(value, ensure_ascii=False)
