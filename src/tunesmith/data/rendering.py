"""Conversations as text: the chat template, and which characters of the text the loss covers.

The loss mask comes from rendering, not from searching for marker strings: for the assistant's turn i, the conversation
before it is rendered with the generation prompt (what the model is given at inference) and the conversation up to it
without; what the second adds to the first is what the model has to write, its end-of-turn token included. White space
after that token is left out. Three kinds of templates need more:

- One that rewrites earlier turns (a thinking model's, which drops old thoughts): the conversation becomes one text for
  each supervised turn, cut after it, because no single text shows every turn as the model will have to write it.
- One that writes no end token after an answer: the tokenizer's end-of-sequence token is added, one text a turn.
- One whose generation prompt is no prefix of its answers (DeepSeek's, which asks for a thought): its own
  `{% generation %}` marks, where it has them; inference then asks with what stands before them.

What cannot be masked exactly is refused.

Rendering every prefix of every conversation takes time that grows with the square of its turns. So it is done once for
each *shape* (roles, and where white space stands), with placeholders for contents; rows of that shape are filled in, and
each is compared with what the template itself renders. A template that looks into contents (`'</think>' in content`)
is found by the strings it looks for, and rows that hold one take the long way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunesmith.errors import ConfigError, DataError
from tunesmith.types import Message

# Unicode's noncharacters: they stand in no text, and no template treats them as white space.
SLOT_START, SLOT_END = "\ufdd0", "\ufdd1"
RESERVED = re.compile("[\ufdd0-\ufdd9]")

PROBE = 'aB1é한😀 "q"\'\\n\\ \n\n {{ x }} </a><b>&`*#|]['
"""In a placeholder: what a template that escapes, splits or changes the case of contents would not leave as it is."""

BROKEN_TEMPLATE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What Jinja lets through when a template does something that its values cannot."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A conversation as the model sees it, and the character ranges that are supervised, in order."""

    text: str
    spans: tuple[Span, ...]


class MaskError(DataError):
    """A template that cannot be masked exactly, or that refuses a conversation."""


class ChatTemplate:
    """A Jinja chat template with its variables. Renders as `tokenizer.apply_chat_template` does (transformers' sandbox).

    `special_tokens` are the tokenizer's (`bos_token`, `eos_token`, ...), `control_tokens` the strings that end a turn or
    start one: an answer that ends with none of them gets `eos_token`. Raises ConfigError for a template that is no Jinja.
    """

    def __init__(
        self,
        name: str,
        text: str,
        variables: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        control_tokens: Sequence[str],
    ):
        self.name = name
        self.text = text
        self.variables = dict(variables)
        self.special_tokens = dict(special_tokens)
        self._ends = tuple(control_tokens)
        self._control = re.compile("|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) or "(?!)")
        self._shapes: dict[Any, list[_Shape] | None] = {}
        self._inspected = _strings_looked_for(name, text)
        self.added_ends = False

    def with_variables(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """The same template with other variables."""
        return ChatTemplate(self.name, self.text, variables, self.special_tokens, self._ends)

    @property
    def text_to_save(self) -> str:
        """The template with its variables as defaults: saved with a tokenizer, it renders the same without being told."""
        settings = "".join(
            f"{{%- if {name} is not defined %}}{{% set {name} = {_jinja_literal(value)} %}}{{% endif -%}}"
            for name, value in self.variables.items()
        )
        return settings + self.text

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

        try:
            texts, indices = render_jinja_template(
                conversations=[[self._as_dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marks,
                **(self.special_tokens | self.variables),
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

    def supervised(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), train_on: str = "assistant"
    ) -> list[RenderedText]:
        """The conversation as one text, or as one for each supervised turn, with what is supervised in it.

        `train_on` is `assistant`, `last` or `all`; a message's own `train` comes first. Raises MaskError.
        """
        turns = _supervised_turns(messages, train_on)
        if train_on == "all" and all(message.train is not False for message in messages):
            full = self.render(messages, tools)
            return [RenderedText(full, ((0, len(full)),))]
        if not turns:
            raise MaskError("no turn is supervised: there is nothing to learn from this row")
        plain = not tools and all(not m.tool_calls and m.reasoning is None for m in messages)
        if plain and not any(self._looks_into(message.content) for message in messages):
            edges = tuple((message.role, *_edges(message.content)) for message in messages)
            key = (edges, tuple(turns))
            if key not in self._shapes:
                self._shapes[key] = self._shape(edges, turns)
            shapes = self._shapes[key]
            if shapes is not None:
                filled = [shape.fill(messages) for shape in shapes]
                if all(self._is_rendered(text, shape, messages) for text, shape in zip(filled, shapes, strict=True)):
                    return filled
        return self._supervised_exactly(messages, tools, turns)

    def _looks_into(self, content: str) -> bool:
        return content in self._inspected.equal or self._inspected.inside.search(content) is not None

    def _is_rendered(self, filled: RenderedText, shape: _Shape, messages: Sequence[Message]) -> bool:
        text = self.render(messages[: shape.num_messages])
        return filled.text == (text if not shape.added_end else _closed(text, self.special_tokens["eos_token"]))

    def _supervised_exactly(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], turns: Sequence[int]
    ) -> list[RenderedText]:
        """The long way: every prompt and every prefix is rendered."""
        full = self.render(messages, tools)
        self._check_complete(full, messages, tools)
        found: list[_Turn] = []
        for index in turns:
            prompt = self.render(messages[:index], tools, add_generation_prompt=True)
            through = full if index == len(messages) - 1 else self.render(messages[: index + 1], tools)
            if not through.startswith(prompt):
                return [self._by_marks(messages, tools, turns, index, prompt)]
            answer = through[len(prompt) :].rstrip()
            self._check_answer(answer, messages[index], index)
            closed = answer.endswith(self._ends)
            inside = self._as_in(full, through, prompt, answer)
            found.append(_Turn(len(prompt), through, answer, inside, closed))
        last = turns[-1] == len(messages) - 1
        if all(turn.inside and turn.closed for turn in found):
            return [RenderedText(full, tuple((turn.begin, turn.begin + len(turn.inside)) for turn in found))]
        if len(found) == 1 and last and not found[0].closed:
            return [self._closed_turn(found[0])]
        return [
            self._closed_turn(turn)
            if not turn.closed
            else RenderedText(turn.through, ((turn.begin, turn.begin + len(turn.answer)),))
            for turn in found
        ]

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

    def _closed_turn(self, turn: _Turn) -> RenderedText:
        self.added_ends = True
        text = _closed(turn.through, self.special_tokens["eos_token"])
        return RenderedText(text, ((turn.begin, len(text)),))

    def _is_control(self, text: str) -> bool:
        return not self._control.sub("", text).strip()

    def _by_marks(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        turns: Sequence[int],
        index: int,
        prompt: str,
    ) -> RenderedText:
        """The spans that the template itself marks with {% generation %}, without the turn's header."""
        full, spans = self._marked(messages, tools)
        if spans is None:
            raise MaskError(
                f"the chat template cannot be masked exactly: turn {index + 1} does not begin with the generation prompt "
                f"(ends in {prompt[-30:]!r}); choose another data.chat_template, set data.chat_template_kwargs if it has "
                "a variable for this, or data.train_on: all"
            )
        for turn in turns:
            self._check_answer(full[slice(*spans[turn])], messages[turn], turn)
        return RenderedText(full, tuple(spans[turn] for turn in turns))

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[str, dict[int, Span] | None]:
        """The text, and the marked span of each of the assistant's turns; None where marks are missing or end too early."""
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.text):
            return "", None
        full, marked = self._render(messages, tools, marks=True)
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        if len(marked) != len(answers):
            return full, None
        spans = {}
        for place, (start, end) in zip(answers, marked, strict=True):
            common = _length_in_common(full, self.render(messages[:place], tools, add_generation_prompt=True))
            while (header := self._control.match(full, start, max(common, start))) and header.end() > start:
                start = header.end()
            end = start + len(full[start:end].rstrip())
            if not full[start:end].endswith(self._ends):
                return full, None
            spans[place] = (start, end)
        return full, spans

    @cached_property
    def asks_otherwise(self) -> bool:
        """Whether the generation prompt is no prefix of an answer, and the template's own marks say where that begins."""
        question, answer = Message("user", "a"), Message("assistant", "b")
        try:
            prompt, full = self.render([question], (), True), self.render([question, answer])
        except MaskError:
            return False  # it needs more than a question: what it refuses is said where it is used
        return not full.startswith(prompt) and self._marked([question, answer], ())[1] is not None

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """What the model is given so that it writes the next turn: what stood before an answer in training."""
        if not self.asks_otherwise:
            return self.render(messages, tools, add_generation_prompt=True)
        full, spans = self._marked([*messages, Message("assistant", "b")], tools)
        if spans is None:
            raise MaskError("the chat template does not mark where an answer to this conversation would begin")
        return full[: spans[len(messages)][0]]

    def _check_complete(self, full: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        """Whatever a template drops, the model would never see: a system message, a tool, a tool's result."""
        seen = _without_space(full)
        for index, message in enumerate(messages):
            if message.role != "assistant" and not _is_shown(message.content, seen):
                raise MaskError(
                    f"the chat template leaves out the {message.role} text of message {index + 1}; choose another "
                    "data.chat_template"
                )
        for tool in tools:
            name = str(tool.get("function", tool).get("name", ""))
            if name not in full:
                raise MaskError(
                    f"the chat template leaves out the tools (`{name}` is not in the text it renders); choose another "
                    "data.chat_template"
                )

    def _check_answer(self, answer: str, message: Message, index: int) -> None:
        seen = _without_space(answer)
        content = message.content.rpartition("</think>")[2] if "</think>" not in answer else message.content
        missing = None
        if _without_space(content) not in seen:
            missing = "text"
        elif content != message.content or _without_space(message.reasoning or "") not in seen:
            missing = "thought"
        for call in message.tool_calls:
            values = [value for value in call.arguments.values() if isinstance(value, str)]
            if call.name not in answer or not all(_is_shown(value, seen) for value in values):
                missing = f"call of `{call.name}`"
        if missing:
            raise MaskError(
                f"the chat template leaves out the {missing} of turn {index + 1} (it renders {answer[:30]!r}); choose "
                "another data.chat_template"
            )

    def _shape(self, edges: Sequence[tuple[Any, ...]], turns: Sequence[int]) -> list[_Shape] | None:
        """How rows of one shape render, or None if their contents are not opaque to the template."""
        slots = [f"{SLOT_START}{index}{PROBE}{SLOT_END}" for index in range(len(edges))]
        messages = [
            Message(role, " \n" * leads + slot + "\n " * trails)
            for (role, leads, trails), slot in zip(edges, slots, strict=True)
        ]
        try:
            rendered = self._supervised_exactly(messages, (), turns)
        except MaskError:
            return None
        shapes = []
        for number, text in enumerate(rendered):
            through = len(messages) if len(rendered) == 1 else turns[number] + 1
            shape = _Shape.read(text, slots, edges, through, text.text != self.render(messages[:through]))
            if shape is None:
                return None
            shapes.append(shape)
        return shapes


@dataclass(frozen=True, slots=True)
class _Turn:
    """A supervised turn: its answer begins at `begin` of `through`; `inside` is as much of it as the whole text has."""

    begin: int
    through: str
    answer: str
    inside: str
    closed: bool


@dataclass(frozen=True, slots=True)
class _Shape:
    """A rendered text with contents taken out: fixed strings, and (message, stripped) where contents go.

    A span's bound is (piece, offset into it); pieces at whose start or end a bound lies are contents or fixed strings.
    """

    pieces: tuple[str | tuple[int, bool], ...]
    bounds: tuple[tuple[int, int], ...]
    num_messages: int
    added_end: bool

    @classmethod
    def read(
        cls, rendered: RenderedText, slots: Sequence[str], edges: Sequence[Any], num_messages: int, added_end: bool
    ) -> _Shape | None:
        """The shape of a text that was rendered with `slots` as contents; None if a slot did not come through."""
        pieces: list[str | tuple[int, bool]] = []
        starts: list[int] = []
        position = 0
        by_slot = {slot: index for index, slot in enumerate(slots)}
        for match in re.finditer(f"{SLOT_START}\\d+{re.escape(PROBE)}{SLOT_END}", rendered.text):
            index = by_slot[match.group()]
            _, leads, trails = edges[index]
            before, after = rendered.text[position : match.start()], rendered.text[match.end() :]
            start, end = match.span()
            stripped = False
            if leads or trails:
                kept = (leads and before.endswith(" \n"), trails and after.startswith("\n "))
                if kept != (leads, trails) and any(kept):
                    return None
                stripped = kept != (leads, trails)
                if not stripped:
                    start, end = start - 2 * leads, end + 2 * trails
            pieces += [rendered.text[position:start], (index, stripped)]
            starts += [position, start]
            position = end
        pieces.append(rendered.text[position:])
        starts.append(position)
        fixed = "".join(piece for piece in pieces if isinstance(piece, str))
        if (
            SLOT_START in fixed
            or SLOT_END in fixed
            or {p[0] for p in pieces if not isinstance(p, str)} != set(range(num_messages))
        ):
            return None
        bounds = []
        for bound in (bound for span in rendered.spans for bound in span):
            # The last piece that starts at or before the bound; at the start of contents it is those.
            piece = max(place for place, start in enumerate(starts) if start <= bound)
            offset = bound - starts[piece]
            if not isinstance(pieces[piece], str) and offset:
                return None
            bounds.append((piece, offset))
        return cls(tuple(pieces), tuple(bounds), num_messages, added_end)

    def fill(self, messages: Sequence[Message]) -> RenderedText:
        """The text of a conversation of this shape."""
        texts = [
            piece
            if isinstance(piece, str)
            else (messages[piece[0]].content.strip() if piece[1] else messages[piece[0]].content)
            for piece in self.pieces
        ]
        starts = [0]
        for text in texts:
            starts.append(starts[-1] + len(text))
        places = [starts[piece] + offset for piece, offset in self.bounds]
        return RenderedText("".join(texts), tuple(zip(places[::2], places[1::2], strict=True)))


def _supervised_turns(messages: Sequence[Message], train_on: str) -> list[int]:
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    default = {*answers} if train_on != "last" else {*answers[-1:]}
    return [
        index for index in answers if (messages[index].train if messages[index].train is not None else index in default)
    ]


def _edges(content: str) -> tuple[bool, bool]:
    """Whether white space stands before and after the text."""
    return content[:1].isspace(), content[-1:].isspace()


def _closed(text: str, end: str) -> str:
    return text.rstrip() + end


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
    return "none" if value is None else json.dumps(value)


@dataclass(frozen=True)
class _LookedFor:
    """Strings that a template looks for in values: `equal` to the whole, or `inside` it."""

    equal: frozenset[str]
    strings: frozenset[str]

    @cached_property
    def inside(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.strings))) or "(?!)")


def _strings_looked_for(name: str, text: str) -> _LookedFor:
    """The string constants of a template that its tests, filters and methods are given. Raises ConfigError."""
    import jinja2
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(text).environment.parse(text)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template ({name}) is not valid Jinja: {error.message} (line {error.lineno})"
        ) from None
    equal: set[str] = set()
    inside: set[str] = set()

    def constants(node: nodes.Node) -> Iterator[str]:
        yield from (node.value,) if isinstance(node, nodes.Const) and isinstance(node.value, str) else ()
        for child in node.iter_child_nodes():
            yield from constants(child)

    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)):
        if isinstance(node, nodes.Compare):
            sides = [node.expr, *(operand.expr for operand in node.ops)]
            plain = all(isinstance(side, (nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem)) for side in sides)
            sliced = any(isinstance(side, nodes.Getitem) and isinstance(side.arg, nodes.Slice) for side in sides)
            contains = any(operand.op in ("in", "notin") for operand in node.ops)
            target = equal if plain and not sliced and not contains else inside
            for side in sides:
                if not (contains and isinstance(side, (nodes.List, nodes.Tuple))):
                    target.update(constants(side))
        elif not isinstance(node, nodes.Call) or isinstance(node.node, nodes.Getattr):  # a filter, a test, a method
            for argument in node.args or ():
                inside.update(constants(argument))
    return _LookedFor(frozenset(equal), frozenset(string for string in inside if string.strip()))
