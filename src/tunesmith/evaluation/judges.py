"""Who judges and how (JudgeSettings), and what a judge is: anything that replies to chats."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit

from tunesmith.errors import ConfigError
from tunesmith.evaluation.judge_prompts import PAIRWISE, SCORE, Chat, Form


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Who judges, and how. Raises ConfigError with every setting that is wrong.

    `url` is an OpenAI-compatible endpoint's base (`https://api.openai.com/v1`), or `local:PATH`; `model` the name that it knows.
    For a local model let `model` hold the hash of its weights: both stand in the key of a kept verdict. `api_key_env` names the
    environment variable with the key; None for a server that needs none. `temperature` and `max_completion_tokens` are not
    sent where they are None (some models refuse them). `timeout` is in seconds without a byte. `max_retries` bounds the
    repetitions of one request after a rate limit, a server's error, a timeout or a lost connection. `price_per_million` is
    the price of a million prompt and completion tokens, in any currency. `max_requests` bounds the requests of a run
    without such repetitions; `max_unjudged` is the share of rows that may stay without a verdict.
    """

    url: str
    model: str
    mode: Literal["pairwise", "score"] = "pairwise"
    rubric: str = "general"
    api_key_env: str | None = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    seed: int | None = None
    max_completion_tokens: int | None = 4096
    timeout: float = 60.0
    max_retries: int = 6
    workers: int = 8
    price_per_million: tuple[float, float] | None = None
    max_requests: int | None = None
    max_unjudged: float = 0.1

    def __post_init__(self) -> None:
        prices = self.price_per_million or (0.0, 0.0)
        wrong = [
            f"judge {name}: {found!r} found; {allowed}"
            for name, found, fine, allowed in (
                ("model", self.model, bool(self.model), "name the model as the endpoint does"),
                ("mode", self.mode, self.mode in ("pairwise", "score"), "allowed are pairwise and score"),
                ("temperature", self.temperature, 0 <= (self.temperature or 0) <= 2, "allowed is 0 to 2"),
                ("timeout", self.timeout, 0 < self.timeout < math.inf, "it must be a number of seconds above 0"),
                ("max_retries", self.max_retries, self.max_retries >= 0, "it must be 0 or more"),
                ("workers", self.workers, self.workers >= 1, "it must be 1 or more"),
                ("price_per_million", self.price_per_million, min(prices) >= 0, "prices cannot be negative"),
                ("max_requests", self.max_requests, (self.max_requests or 1) >= 1, "it must be 1 or more"),
                ("max_unjudged", self.max_unjudged, 0 <= self.max_unjudged < 1, "it must be a share from 0 to below 1"),
            )
            if not fine
        ]
        wrong += self._wrong_local() if self.is_local else self._wrong_url()
        if wrong:
            raise ConfigError(wrong)

    @property
    def is_local(self) -> bool:
        """Whether the judge is a model on this machine."""
        return self.url.startswith("local:")

    @property
    def form(self) -> Form:
        """What the judge's replies must hold."""
        return PAIRWISE if self.mode == "pairwise" else SCORE

    def _wrong_url(self) -> list[str]:
        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query:  # and the message must not repeat it
            return [
                "judge url: it holds a password or a query, and would be written to files; "
                "pass the key in an environment variable (api_key_env)"
            ]
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return [f"judge url: {self.url!r} found; allowed are http://HOST/v1, https://HOST/v1 and local:PATH"]
        return []

    def _wrong_local(self) -> list[str]:
        unused = {
            "temperature": self.temperature not in (0, None),  # answers are greedy
            "seed": self.seed is not None,
            "price_per_million": self.price_per_million is not None,
        }
        return [
            f"judge {name}: it has no effect on a local model; remove it" for name, is_set in unused.items() if is_set
        ]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge said, and the tokens it counted (None: it did not say). `retries` came before; `cut`: its limit was reached."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    retries: int = 0
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that got no reply, after `retries` repetitions. `message` holds no secrets."""

    message: str
    retries: int = 0


class Judge(Protocol):
    """Anything that replies to chats: an endpoint (endpoint.py) or a model on this machine."""

    def replies(self, chats: Sequence[Chat]) -> Generator[tuple[int, Reply | Failure]]:
        """Each chat's number in `chats` with its reply, in whatever order they come. Closing it stops what is not begun."""
        ...


@dataclass(frozen=True, slots=True)
class LocalJudge:
    """A model on this machine: `answer` gives the text to each chat, greedily. Verdicts are kept after every `batch_size` chats."""

    answer: Callable[[Sequence[Chat]], Sequence[str]]
    batch_size: int = 32

    def replies(self, chats: Sequence[Chat]) -> Generator[tuple[int, Reply | Failure]]:
        """Replies in order; tokens are not counted, since nobody charges for them."""
        for start in range(0, len(chats), self.batch_size):
            batch = chats[start : start + self.batch_size]
            for number, text in enumerate(self.answer(batch), start):
                yield number, Reply(text)
