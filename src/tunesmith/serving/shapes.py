"""OpenAI's responses: whole, and in chunks."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Makes the JSON of one response. Chat and text completions have the same facts in other places."""

    kind: Kind
    model: str
    include_usage: bool = False
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: list[str], reasons: list[str], usage: dict[str, Any]) -> dict[str, Any]:
        """A response that is not streamed."""
        choices = []
        for place, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            said: dict[str, Any] = {"text": text}
            if self.kind == "chat":
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": place, **said, "logprobs": None, "finish_reason": reason})
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head(name), "choices": choices, "usage": usage}

    def opening(self, place: int) -> dict[str, Any] | None:
        """The chunk that a chat's stream begins with."""
        return (
            self._chunk(place, {"delta": {"role": "assistant", "content": ""}}, None) if self.kind == "chat" else None
        )

    def piece(self, place: int, text: str) -> dict[str, Any]:
        """A chunk with text."""
        return self._chunk(place, {"delta": {"content": text}} if self.kind == "chat" else {"text": text}, None)

    def end(self, place: int, reason: str) -> dict[str, Any]:
        """A choice's last chunk."""
        return self._chunk(place, {"delta": {}} if self.kind == "chat" else {"text": ""}, reason)

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk behind the last, where it was asked for."""
        return {**self._head(self._chunk_name), "choices": [], "usage": usage}

    def _chunk(self, place: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": place, **said, "logprobs": None, "finish_reason": reason}
        none = {"usage": None} if self.include_usage else {}
        return {**self._head(self._chunk_name), "choices": [choice], **none}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, name: str) -> dict[str, Any]:
        number = f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{self.number}"
        return {"id": number, "object": name, "created": self.created, "model": self.model}
