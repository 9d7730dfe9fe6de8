"""A request that the engine answers, and the events of its answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.serving.adapter_bank import BASE
from tunesmith.serving.answer_text import AnswerText
from tunesmith.serving.sampling import GREEDY, Sampling


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that the answer goes on with. `first` is set with the first token, whose text may be empty."""

    text: str
    first: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is whole: ended by an end token or a stop string (`stop`), or by its length. `tokens` counts the end token too."""

    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer, or no more of it."""

    reason: Literal["timeout", "memory", "error", "stopped"]
    message: str


Event = Piece | Finished | Failed


@dataclass(eq=False)
class Generation:
    """One request: a prompt, how to answer it, and `on_event`, which the engine's thread calls. It must not block."""

    prompt: Sequence[int]
    tokenizer: Any
    ends: frozenset[int]
    on_event: Callable[[Event], None]
    max_tokens: int
    adapter: int = BASE
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    seconds: float = float("inf")
    length: int = 0
    produced: int = 0
    last: int = 0
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.text = AnswerText(self.tokenizer, self.stop)
        self.random = random.Random(self.sampling.seed)

    @property
    def late(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() - self.submitted > self.seconds

    @property
    def whole(self) -> int:
        """Tokens that it may have in the cache."""
        return len(self.prompt) + self.max_tokens
