"""An answer's text as its tokens come: whole characters only, cut at a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""

LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, and so tokens, at most."""


class AnswerText:
    """Turns tokens into pieces of text, which joined are the answer: the decoded tokens, special ones left out, up to a stop string.

    A piece is held back while its last character is not whole, or while it may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._shown = self._read = (
            0  # tokens before `_shown` are context no more; those before `_read` have been decoded
        )
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this token makes certain. `stopped` is set when a stop string is complete."""
        self._ids.append(token)
        text = self._decode(self._ids[self._shown :])
        if not text.endswith(UNFINISHED):
            return self._let_go(self._new(text, len(self._ids)))
        if len(self._ids) - self._read > LONGEST_CHARACTER:  # bytes among them that are no character, whatever comes
            for end in range(len(self._ids) - 1, len(self._ids) - LONGEST_CHARACTER, -1):
                whole = self._decode(self._ids[self._shown : end])
                if text.startswith(whole) and text.count(UNFINISHED) == whole.count(UNFINISHED) + 1:
                    return self._let_go(self._new(whole, end))
        return ""

    def finish(self) -> str:
        """What was held back, as it is, when no token follows."""
        if self.stopped:
            return ""
        piece = self._let_go(self._new(self._decode(self._ids[self._shown :]), len(self._ids)))
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _new(self, text: str, end: int) -> str:
        """What `text`, of the tokens from `_shown` to `end`, has more than was decoded. Two windows: a token's text may depend on the one
        before it (a leading space that SentencePiece drops)."""
        before = self._decode(self._ids[self._shown : self._read])
        self._shown, self._read = self._read, end
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _let_go(self, text: str) -> str:
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            piece, self._held = self._held[: min(places)], ""
            return piece
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
