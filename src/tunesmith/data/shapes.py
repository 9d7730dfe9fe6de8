"""Shapes: what conversations of the same roles render to, with their contents taken out.

A shape is rendered once, with placeholders for contents; rows of that shape are filled in. That is right as long as the
template treats contents as opaque. So the placeholder holds quotes, braces, line breaks and letters of both cases, which
a template that escapes, splits or changes contents would not leave as they are; and contents that hold a string which the
template looks for (`'</think>' in content`) are not filled in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.types import Message

# Unicode's noncharacters: they stand in no text, and no template treats them as white space.
SLOT_START, SLOT_END = "\ufdd0", "\ufdd1"
RESERVED = re.compile("[\ufdd0-\ufdd9]")

PROBE = 'aB1é한😀 "q"\'\\n\\ \n\n {{ x }} </a><b>&`*#|]['
"""In a placeholder: what a template that escapes, splits or changes the case of contents would not leave as it is."""

MOST_TEMPLATE_CHARACTERS = 1 << 20
"""Of a chat template: the longest that are known have 20,000, and parsing a million takes seconds."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A conversation as the model sees it, and the character ranges that are supervised, in order."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """A rendered text with contents taken out: fixed strings, and (message, stripped) where contents go.

    A span's bound is (piece, offset into it); pieces at whose start or end a bound lies are contents or fixed strings.
    """

    pieces: tuple[str | tuple[int, bool], ...]
    bounds: tuple[tuple[int, int], ...]
    num_messages: int
    last_turn: int
    added_end: bool

    @classmethod
    def read(
        cls,
        rendered: RenderedText,
        slots: Sequence[Slot],
        edges: Sequence[Any],
        num_messages: int,
        last_turn: int,
        added_end: bool,
    ) -> Shape | None:
        """The shape of a text that was rendered with `slots` as contents; None if a slot did not come through."""
        pieces: list[str | tuple[int, bool]] = []
        starts: list[int] = []
        position = 0
        by_slot = {slot.core: index for index, slot in enumerate(slots)}
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
        return cls(tuple(pieces), tuple(bounds), num_messages, last_turn, added_end)

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


@dataclass(frozen=True, slots=True)
class Slot:
    """A placeholder: what is put in for a content, and the part of it that is no white space."""

    text: str
    core: str


def slots_for(edges: Sequence[tuple[Any, bool, bool]]) -> list[Slot]:
    """A placeholder for each message, with white space at its edges where the rows have some."""
    cores = [f"{SLOT_START}{index}{PROBE}{SLOT_END}" for index in range(len(edges))]
    return [
        Slot(" \n" * leads + core + "\n " * trails, core) for (_, leads, trails), core in zip(edges, cores, strict=True)
    ]


def is_dropped(slot: Slot, text: str) -> bool:
    """Whether nothing at all of a placeholder is in a text, changed or not."""
    return slot.core[: slot.core.index(PROBE)] not in text


def edges_of(content: str) -> tuple[bool, bool]:
    """Whether white space stands before and after the text."""
    return content[:1].isspace(), content[-1:].isspace()


@dataclass(frozen=True)
class LookedFor:
    """Strings that a template looks for in values: `equal` to the whole, or `inside` it."""

    equal: frozenset[str]
    inside: frozenset[str]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.inside))) or "(?!)")

    def finds(self, content: str) -> bool:
        """Whether the template might treat this content in another way than others."""
        return content in self.equal or self._pattern.search(content) is not None


def strings_looked_for(name: str, text: str) -> LookedFor:
    """The string constants of a template that its tests, filters and methods are given. Raises ConfigError.

    The template is parsed and not compiled: Jinja computes what is constant while it compiles (`{{ 'a' * 10 ** 9 }}`), which nothing
    would bound here. That comes with the first rendering, which a server has another process do.
    """
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if len(text) > MOST_TEMPLATE_CHARACTERS:
        raise ConfigError(
            f"the chat template ({name}) has {len(text):,} characters; at most {MOST_TEMPLATE_CHARACTERS:,} are read"
        )
    environment = _compile_jinja_template("").environment  # transformers' own, with what it adds to Jinja's language
    try:
        tree = environment.parse(text)
        return _constants(tree)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template ({name}) is not valid Jinja: {error.message} (line {error.lineno})"
        ) from None
    except RecursionError:
        raise ConfigError(f"the chat template ({name}) is nested deeper than Jinja reads") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"the chat template ({name}) is not valid Jinja: {error}") from None


def _constants(tree: Any) -> LookedFor:
    from jinja2 import nodes

    equal: set[str] = set()
    inside: set[str] = set()

    def constants(node: nodes.Node) -> Iterator[str]:
        yield from (node.value,) if isinstance(node, nodes.Const) and isinstance(node.value, str) else ()
        for child in node.iter_child_nodes():
            yield from constants(child)

    def _is_key(node: nodes.Node) -> bool:
        return isinstance(node, nodes.Const) and isinstance(node.value, str)

    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)):
        if isinstance(node, nodes.Compare):
            sides = [node.expr, *(operand.expr for operand in node.ops)]
            plain = all(isinstance(side, (nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem)) for side in sides)
            sliced = any(isinstance(side, nodes.Getitem) and not _is_key(side.arg) for side in sides)
            contains = any(operand.op in ("in", "notin") for operand in node.ops)
            target = equal if plain and not sliced and not contains else inside
            for side in sides:
                if not (contains and isinstance(side, (nodes.List, nodes.Tuple))):
                    target.update(constants(side))
        elif not isinstance(node, nodes.Call) or isinstance(node.node, nodes.Getattr):  # a filter, a test, a method
            for argument in node.args or ():
                inside.update(constants(argument))
    return LookedFor(frozenset(equal), frozenset(string for string in inside if string.strip()))
