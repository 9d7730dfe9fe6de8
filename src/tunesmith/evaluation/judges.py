"""Who judges and how (JudgeSettings), and what a judge is: anything that replies to chats."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, Protocol

from tunesmith.config import JudgeConfig, config_from_dict
from tunesmith.errors import ConfigError
from tunesmith.evaluation.judge_prompts import PAIRWISE, SCORE, Chat, Form

LOCAL_MAX_COMPLETION_TOKENS = 4096
"""Longest reply of a local model where `max_completion_tokens` is None: it has no limit of its own."""

_OF_ENDPOINTS = ("api_key_env", "temperature", "seed", "timeout", "max_retries", "workers", "price_per_million")
"""Settings without effect on a local model, whose replies are greedy and free."""


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Who judges, and how: the settings of config.JudgeConfig. Raises ConfigError with every setting that is wrong.

    `url` is an OpenAI-compatible endpoint's base (`https://api.openai.com/v1`), or `local:PATH`; `model` the name that it knows.
    For a local model let `model` hold the hash of its weights: both stand in the key of a kept verdict. `api_key_env` names the
    environment variable with the key; None for a server that needs none. `temperature` and `max_completion_tokens` are not
    sent where they are None (some models refuse them); a local model then replies in at most 4,096 tokens. `timeout` is in
    seconds without a byte. `max_retries` bounds the repetitions of one request after a rate limit, a server's error, a timeout
    or a lost connection. `price_per_million` is the price of a million prompt and completion tokens, in any currency.
    `max_requests` bounds the requests of a run without such repetitions; `max_unjudged` is the share of rows that may stay
    without a verdict.
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
        given = asdict(self)
        config_from_dict({"evaluation": {"judge": given}})  # what each setting allows is said in one place
        if self.is_local:
            wrong = [
                f"evaluation.judge.{field.name} is {given[field.name]!r}, which has no effect on a local model; remove it (the "
                f"default is {'null' if field.default is None else field.default})"
                for field in fields(self)
                if field.name in _OF_ENDPOINTS and given[field.name] not in (field.default, None)
            ]
        else:
            wrong = [] if self.model else ["evaluation.judge.model is not set; name the model as the endpoint does"]
        if wrong:
            raise ConfigError(wrong)

    @classmethod
    def of(cls, judge: JudgeConfig, model: str) -> JudgeSettings:
        """The settings of a configuration whose `url` is set. Raises ConfigError with every setting that is wrong."""
        assert judge.url is not None
        return cls(**judge.model_dump() | {"model": model})

    @property
    def is_local(self) -> bool:
        """Whether the judge is a model on this machine."""
        return self.url.startswith("local:")

    @property
    def form(self) -> Form:
        """What the judge's replies must hold."""
        return PAIRWISE if self.mode == "pairwise" else SCORE


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
    """A model on this machine: `answer` replies to each chat, greedily. Verdicts are kept after every `batch_size` chats."""

    answer: Callable[[Sequence[Chat]], Sequence[Reply]]
    batch_size: int = 32

    def replies(self, chats: Sequence[Chat]) -> Generator[tuple[int, Reply | Failure]]:
        """Replies in order; tokens are not counted, since nobody charges for them."""
        for start in range(0, len(chats), self.batch_size):
            batch = chats[start : start + self.batch_size]
            yield from enumerate(self.answer(batch), start)
