"""OpenAI's requests, checked: what this server can do, what it would ignore (refused), and what is no field of theirs (refused).

Fields are those of https://platform.openai.com/docs/api-reference (chat/create, completions/create). A field that asks for what this
server has not is accepted only with the value that asks for nothing (`n: 1`, `logprobs: false`, `tools: []`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from tunesmith.serving.api_errors import ApiError
from tunesmith.serving.sampling import Sampling
from tunesmith.types import Message

LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"})
"""Fields that say who asks or how it is billed, and change no answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that are not done here, with the values that ask for nothing."""

MAX_PROMPTS = 16
"""Prompts of one completion request."""

MAX_STOPS = 4
"""Stop strings of one request, as with OpenAI."""


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_well_formed)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(_Strict):
    model: Text
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = None
    stop: Text | list[Text] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _few_and_not_empty(cls, value: str | list[str]) -> str | list[str]:
        found = [value] if isinstance(value, str) else value
        if len(found) > MAX_STOPS or "" in found:
            raise ValueError(f"expected at most {MAX_STOPS} strings, none of them empty")
        return value

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_p, self.seed)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none to four."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class _TextPart(_Strict):
    type: Literal["text"]
    text: Text


class _ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[_TextPart]

    def message(self) -> Message:
        """The turn as templates see it; `developer` is OpenAI's newer word for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[_ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer; None for as long as may be."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: Text | list[int] | list[Text] | list[list[int]]
    max_tokens: int = Field(16, ge=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several: texts or token ids. Raises ApiError for none, or too many."""
        prompt: Any = self.prompt
        single = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        prompts: list[str | list[int]] = [prompt] if single else list(prompt)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise ApiError(
                400, f"prompt: {len(prompts)} prompts; expected 1 to {MAX_PROMPTS}", "invalid_value", "prompt"
            )
        return prompts

    @property
    def answer_tokens(self) -> int:
        """The longest answer: OpenAI's default is 16."""
        return self.max_tokens


class AdapterRequest(_Strict):
    """POST /v1/adapters."""

    name: Text
    path: Text


Request = TypeVar("Request", bound=BaseModel)


def checked(kind: type[Request], body: Any) -> Request:
    """The request that a body holds. Raises ApiError 400 in OpenAI's words, with the field at fault."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {type(body).__name__}: expected a JSON object", "invalid_type")
    values: dict[str, Any] = {}
    for key, value in body.items():
        if key in kind.model_fields:
            if value is not None:
                values[key] = value
        elif key in NEUTRAL:
            _refuse_ignored(key, value)
        elif key not in LABELS:
            raise ApiError(400, f"Unknown parameter: {key[:100]!r}.", "unknown_parameter", key[:100])
    if isinstance(values.get("messages"), list):
        values["messages"] = [_without_empty(message) for message in values["messages"]]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        raise ApiError(400, f"{param[:200]}: {first['msg']}", code, param[:200]) from None


def _refuse_ignored(key: str, value: Any) -> None:
    allowed = NEUTRAL[key]
    if value is None or any(type(value) is type(one) and value == one for one in allowed):
        return
    may = f"; it may be {' or '.join(map(repr, allowed))}" if allowed else ""
    raise ApiError(400, f"{key} is not supported by this server: leave it out{may}", "unsupported_parameter", key)


def _without_empty(message: Any) -> Any:
    """A message without the fields that clients send back empty from an earlier answer (`tool_calls: null`, `annotations: []`)."""
    if not isinstance(message, Mapping):
        return message
    return {key: value for key, value in message.items() if key in ("role", "content") or value not in (None, [], {})}
