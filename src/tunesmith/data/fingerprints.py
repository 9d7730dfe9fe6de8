"""What rows have in common: digests of their content, and of each answer with what comes before it.

Rows are compared by 128-bit digests, so that the tables stay small. Digests of a conversation's turns are chained, so that
all of its exchanges cost no more than one pass over it.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunesmith.types import Example, Message, PreferenceExample

Row = Example | PreferenceExample


@dataclass(frozen=True, slots=True)
class Exchange:
    """An answer and what it answers, without system messages: who saw it under another one has still seen it.

    `turn` is the answer's position in its row, from 1. `prompt` is all before it, with the row's tools (None where nothing
    is: plain text, a greeting), `whole` the same with the answer (of a pair, the chosen one). Both ignore case, white space
    and composition.
    """

    turn: int
    prompt: bytes | None
    whole: bytes


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests of a row's content.

    Rows with equal `exact` are the same to training; all other digests ignore case, white space and composition (`near`:
    the whole row). `exchanges` are the answers that are trained on, and the last one in any case, in their order. Two rows
    contradict each other if their `question` is the same and their `answer` is not: all before the last answer, and that
    answer; for KTO, both of these, and whether it is desirable; for preference pairs, prompt with both completions, and
    which one was chosen.
    """

    exact: bytes
    near: bytes
    exchanges: tuple[Exchange, ...]
    question: bytes | None
    answer: bytes


def fingerprint(row: Row, train_on: str = "assistant") -> Fingerprint:
    """The digests of one row. `train_on` (`data.train_on`) decides which answers of a conversation are trained on."""
    if isinstance(row, Example) and row.messages is None:
        near = _digest(normalized(row.text or ""))
        return Fingerprint(_digest(row.text or ""), near, (Exchange(1, None, near),), question=None, answer=near)
    turns: Sequence[Message]
    if isinstance(row, PreferenceExample):
        turns, last, rejected, about = (*row.prompt, *row.chosen), len(row.prompt), row.rejected, ""
        answers = {last}
    else:
        turns, last, rejected = row.messages or (), last_answer(row.messages or ()), ()
        supervised = supervised_turns(turns, train_on)
        answers = {last}
        if row.desirable is None:
            answers.update(i for i, counts in enumerate(supervised) if counts and turns[i].role == "assistant")
        about = f"{row.label} {row.desirable} {supervised}"
    tools = _tools(row)
    texts = [_content(message) for message in turns]
    plain = [normalized(text) for text in texts]  # once a turn: it is most of the work
    asked, said = _joined(plain[:last]) + normalized(tools), _joined(plain[last:])
    turned_down = _joined(_content(message) for message in rejected)
    refused = normalized(turned_down)
    asks, replies = [asked], said
    if isinstance(row, PreferenceExample):
        asks = [asked, *sorted((said, refused))]
    elif row.desirable is not None:
        asks, replies = [asked, said], str(row.desirable)
    return Fingerprint(
        exact=_digest(_joined(texts[:last]) + tools, _joined(texts[last:]), turned_down, about),
        near=_digest(asked, said, refused, about),
        exchanges=_exchanges(turns, plain, answers, normalized(tools)),
        question=_digest(*asks),
        answer=_digest(replies),
    )


def _exchanges(turns: Sequence[Message], plain: Sequence[str], answers: set[int], tools: str) -> tuple[Exchange, ...]:
    """The exchanges that end with the turns at `answers`; the last one with all turns that follow it."""
    digest = hashlib.blake2b(tools.encode(), digest_size=16)
    last = max(answers)
    asked = False
    exchanges: list[Exchange] = []
    for position in range(last):
        if turns[position].role == "system":
            continue
        prompt = digest.digest() if asked and position in answers else None
        digest.update(f" \0\0 {plain[position]}".encode())
        if prompt is not None:
            exchanges.append(Exchange(position + 1, prompt, digest.digest()))
        asked = True
    prompt = digest.digest() if asked else None
    for text in plain[last:]:
        digest.update(f" \0\0 {text}".encode())
    return (*exchanges, Exchange(last + 1, prompt, digest.digest()))


def normalized(text: str) -> str:
    """`text` in Unicode NFC, case-folded, each run of white space one space, none around it."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())


def last_answer(messages: Sequence[Message]) -> int:
    """Position of the last assistant's turn; the number of messages if there is none."""
    for position in range(len(messages) - 1, -1, -1):
        if messages[position].role == "assistant":
            return position
    return len(messages)


def supervised_turns(messages: Sequence[Message], train_on: str) -> list[bool]:
    """Which turns the loss covers: all of them, or the assistant's, where a message's own `train` comes first."""
    if train_on == "all" and all(message.train is not False for message in messages):
        return [True] * len(messages)
    last = last_answer(messages)
    return [
        message.role == "assistant"
        and (message.train if message.train is not None else train_on != "last" or i == last)
        for i, message in enumerate(messages)
    ]


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b(_joined(parts).encode(), digest_size=16).digest()


def _joined(parts: Iterable[str]) -> str:
    """Parts in one string. The separators are words of their own, so that `normalized` keeps them apart."""
    return " \0 ".join(parts)


def _content(message: Message) -> str:
    """All that a turn says, in one string."""
    parts = [message.role, message.content]
    if message.reasoning:
        parts.append(message.reasoning)
    for call in message.tool_calls:
        parts += (call.name, json.dumps(dict(call.arguments), sort_keys=True, ensure_ascii=False, default=str))
    return _joined(parts)


def _tools(row: Row) -> str:
    if not row.tools:
        return ""
    return " \0 " + json.dumps([dict(tool) for tool in row.tools], sort_keys=True, ensure_ascii=False, default=str)
