"""A judge behind an OpenAI-compatible chat endpoint, asked by the `openai` package: several requests at once.

The package repeats requests after 408, 409, 429, a server's error, a timeout or a lost connection, at most `max_retries` times: it
waits as long as `Retry-After` says (up to two minutes), else 0.5, 1, 2, 4, 8, 8, ... seconds less up to a quarter. What still has no
reply is a Failure of that request alone. What no repetition mends and every request would meet (a wrong key, an unknown model or
address) is a ConfigError and stops the evaluation.

The key is read from an environment variable when the judge is made, and cut out of everything that servers say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ConfigError, MachineError
from tunesmith.evaluation.judge_prompts import Chat
from tunesmith.evaluation.judges import Failure, JudgeSettings, Reply

if TYPE_CHECKING:
    import openai

SAID = 300
"""Characters of a server's answer in a message."""


class Endpoint:
    """A judge behind `settings.url`. Raises ConfigError without its key, MachineError without the `openai` package."""

    def __init__(self, settings: JudgeSettings):
        try:
            import openai
        except ImportError as error:
            raise MachineError(
                "a judge behind a URL needs the openai package; install it with: pip install 'tunesmith[judge]'"
            ) from error
        self._settings = settings
        self._key = _key(settings)
        self._client = openai.OpenAI(
            base_url=settings.url,
            api_key=self._key or "none",  # the package sends some key always
            timeout=settings.timeout,
            max_retries=settings.max_retries,
        )

    def replies(self, chats: Sequence[Chat]) -> Generator[tuple[int, Reply | Failure]]:
        """Replies as they come, from `workers` threads. They are daemons: an interrupted evaluation waits for none of them."""
        with ThreadPool(min(self._settings.workers, max(1, len(chats)))) as pool:
            yield from pool.imap_unordered(self._numbered, enumerate(chats))

    def _numbered(self, numbered: tuple[int, Chat]) -> tuple[int, Reply | Failure]:
        number, chat = numbered
        return number, self._ask(chat)

    def _ask(self, chat: Chat) -> Reply | Failure:
        import openai

        settings = self._settings
        options = {
            "temperature": settings.temperature,
            "seed": settings.seed,
            "max_completion_tokens": settings.max_completion_tokens,
        }
        request: Any = {name: value for name, value in options.items() if value is not None}
        request |= {"model": settings.model, "messages": chat}
        hopeless = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
        try:
            raw = self._client.chat.completions.with_raw_response.create(**request)
        except hopeless as error:
            # Without the package's error behind it, whose text and request may hold the key.
            raise ConfigError(self._refusal(error.status_code, error.message)) from None
        except openai.APIStatusError as error:
            return Failure(self._clean(error.message), _retries(error))
        except openai.APITimeoutError as error:
            return Failure(f"no reply within {settings.timeout:g} s", _retries(error))
        except openai.APIConnectionError as error:
            return Failure(self._clean(f"the connection failed: {error.__cause__}"), _retries(error))
        found = _reply(raw.http_response.text, raw.retries_taken)
        return replace(found, message=self._clean(found.message)) if isinstance(found, Failure) else found

    def _refusal(self, status: int, message: str) -> str:
        variable = self._settings.api_key_env
        if status == 404:
            mend = f"check the model's name ({self._settings.model}) and the address, which mostly ends with /v1"
        elif variable is None:
            mend = "it asks for a key: name the environment variable that holds one (api_key_env)"
        else:
            mend = f"check the key in the environment variable {variable}"
        return f"the judge at {self._settings.url} refused ({self._clean(message)}); {mend}"

    def _clean(self, said: str) -> str:
        """A server's words on one line, without the key."""
        if self._key:
            said = said.replace(self._key, "[key]")
        return " ".join(said.split())[:SAID]


def _key(settings: JudgeSettings) -> str | None:
    variable = settings.api_key_env
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(
            f"the judge at {settings.url} needs a key: the environment variable {variable} is not set; set it, or name "
            "another variable (api_key_env; none for a server without keys)"
        )
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"the key in the environment variable {variable} holds a line break or another odd character; set it again"
        )
    return key


def _retries(error: openai.APIError) -> int:
    """Repetitions before the request that failed at last: the package numbers them in a header."""
    return int(error.request.headers.get("x-stainless-retry-count", 0))


def _reply(body: str, retries: int) -> Reply | Failure:
    """The first choice's text and the tokens counted, of a response whose status was fine; servers lie about the rest."""
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return Failure(f"the endpoint's answer is no chat completion: {body[:SAID]!r}", retries)
    if text is not None and not isinstance(text, str):
        return Failure(f"the endpoint's answer holds no text: {body[:SAID]!r}", retries)
    usage = completion.get("usage")
    prompt, answer = (usage.get(f"{of}_tokens") if isinstance(usage, dict) else None for of in ("prompt", "completion"))
    counted = isinstance(prompt, int) and isinstance(answer, int)
    return Reply(
        text or "",
        prompt if counted else None,
        answer if counted else None,
        retries,
        choice.get("finish_reason") == "length",
    )
