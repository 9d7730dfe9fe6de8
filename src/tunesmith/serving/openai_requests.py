"""OpenAI's requests, checked: what this server can do, what it would ignore (refused), and what is no field of theirs (refused).

Fields are those of https://platform.openai.com/docs/api-reference (chat/create, completions/create). A field that asks for what this
server has not is accepted only with the value that asks for nothing (`n: 1`, `logprobs: false`, `tools: []`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
)

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


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > MAX_STOPS or not all(isinstance(one, str) and one for one in found):
        raise ValueError(f"expected at most {MAX_STOPS} strings, none of them empty")
    return tuple(map(_well_formed, found))


def _prompt(value: Any) -> str | list[Any]:
    if isinstance(value, str):
        return _well_formed(value)
    if isinstance(value, list):
        if all(isinstance(one, str) for one in value):
            return [_well_formed(one) for one in value]
        if _are_ids(value) or all(isinstance(one, list) and _are_ids(one) for one in value):
            return value
    raise ValueError("expected a text, a list of texts, a list of token ids, or a list of such lists")


def _content(value: Any) -> str:
    if isinstance(value, str):
        return _well_formed(value)
    if not isinstance(value, list):
        raise ValueError('expected a text, or a list of parts {"type": "text", "text": "..."}')
    for place, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) and part.keys() == {"type", "text"} else None
        if not isinstance(text, str) or part["type"] != "text":
            raise ValueError(f'part {place}: expected {{"type": "text", "text": "..."}}; this server takes text alone')
    return _well_formed("".join(part["text"] for part in value))


def _are_ids(value: list[Any]) -> bool:
    return all(type(one) is int for one in value)


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
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_p, self.seed)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class _ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content)]

    def message(self) -> Message:
        """The turn as templates see it; `developer` is OpenAI's newer word for `system`."""
        return Message("system" if self.role == "developer" else self.role, self.content)


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    # FailFast: half a million errors of one body would take seconds, in which nobody is answered.
    messages: Annotated[list[_ChatMessage], FailFast()] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer; None for as long as may be."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def fields(self) -> tuple[str, str]:
        """What an error calls the prompt and the answer's length."""
        return "messages", "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: Annotated[str | list[Any], PlainValidator(_prompt)]
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

    @property
    def fields(self) -> tuple[str, str]:
        """What an error calls the prompt and the answer's length."""
        return "prompt", "max_tokens"


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
        param = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        raise ApiError(400, f"{param[:200]}: {said}", code, param[:200]) from None


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
