"""Talk to a model: one reply at a time, streamed; a conversation that goes on, with settings that can be changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

from tunesmith.errors import ConfigError, DataError
from tunesmith.types import Message
from tunesmith.workflows.chat_adapters import Adapters
from tunesmith.workflows.load import LoadedModel


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is drawn. Temperature 0 is greedy; `top_p` keeps the likeliest tokens that make up that probability (Holtzman et al.
    2020, arXiv:1904.09751); `repetition_penalty` divides the logits of tokens that were said (Keskar et al. 2019, arXiv:1909.05858), 1: not."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256

    def changed(self, key: str, value: str) -> Sampling:
        """A copy with one setting from text. Raises ConfigError."""
        allowed = {
            "temperature": (float, lambda number: number >= 0, "a number from 0"),
            "top_p": (float, lambda number: 0 < number <= 1, "a number above 0, up to 1"),
            "repetition_penalty": (float, lambda number: number > 0, "a number above 0"),
            "max_new_tokens": (int, lambda number: number >= 1, "a whole number from 1"),
        }
        if key not in allowed:
            raise ConfigError(f"there is no setting {key!r}: {', '.join(allowed)}")
        kind, fits, expected = allowed[key]
        try:
            number = kind(value)
        except ValueError:
            number = math.nan
        if not fits(number) or not math.isfinite(number):
            raise ConfigError(f"{key} is {value!r}: expected {expected}")
        return replace(self, **{key: number})

    def __str__(self) -> str:
        return ", ".join(f"{key} {value:g}" for key, value in asdict(self).items())


PRESETS = {
    "factual": Sampling(),
    "balanced": Sampling(temperature=0.7, top_p=0.9),
    "creative": Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.1),
}
"""Named samplings. `factual` is greedy, as evaluation is."""


class Conversation:
    """A conversation with one model, or with the adapters of one base in turn. What was said stays when another takes over.

    `system` is the system message for all of them; with None each has the one that its training rows shared. An empty one is none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        system: str | None = None,
        sampling: Sampling = PRESETS["factual"],
        adapters: Adapters | None = None,
    ):
        self.loaded, self.sampling = loaded, sampling
        self.adapters = adapters
        self.history: list[Message] = []
        self._system = system
        self._last: tuple[str, LoadedModel, list[Message]] | None = None  # who answered last, and what was asked

    @property
    def opening(self) -> tuple[Message, ...]:
        """The messages that stay when the conversation begins anew: the system message."""
        system = trained_system(self.loaded) if self._system is None else self._system
        return (Message("system", system),) if system else ()

    def use(self, adapter: str) -> None:
        """Go on with another adapter, or with the base (`none`). Raises ConfigError for a name that is not here."""
        self.loaded = self._some_adapters().use(adapter)

    def ask(self, text: str, on_text: Callable[[str], None] = lambda text: None) -> str:
        """The model's answer, which becomes part of the conversation. Raises DataError if the text cannot be rendered, or does not fit.

        Of an answer that a KeyboardInterrupt stops, what was given to `on_text` until then becomes part of it; nothing where there was nothing.
        """
        asked = [*self.opening, *self.history, Message("user", text)]
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        try:
            with self.adapters.at_work() if self.adapters else nullcontext():
                said = self._reply(self.loaded, asked, take)
        except KeyboardInterrupt:
            if said := "".join(pieces):
                self._keep(asked, said)
            raise
        self._keep(asked, said)
        return said

    def _keep(self, asked: list[Message], said: str) -> None:
        self.history += [asked[-1], Message("assistant", said)]
        if self.adapters:
            self._last = (self.adapters.current, self.loaded, asked)

    def base_answer(self, on_text: Callable[[str], None] = lambda text: None) -> tuple[str, str, str]:
        """(the adapter that answered the last question, its answer, the base's answer to what that adapter was asked, in its template).

        Raises ConfigError without a question, or without a base.
        """
        adapters = self._some_adapters()
        if self._last is None:
            raise ConfigError("there is no question yet")
        name, loaded, asked = self._last
        said = self.history[-1].content
        with adapters.off():
            return name, said, self._reply(loaded, asked, on_text)

    def begin_anew(self) -> None:
        """Forget the conversation."""
        self.history.clear()
        self._last = None

    def _some_adapters(self) -> Adapters:
        if self.adapters is None:
            raise ConfigError(
                "this model has no adapter that could be switched: there is no base to ask; --adapter NAME=PATH adds some"
            )
        return self.adapters

    def _reply(self, loaded: LoadedModel, asked: Sequence[Message], on_text: Callable[[str], None]) -> str:
        drawn = self.sampling
        return reply(
            loaded,
            asked,
            drawn.max_new_tokens,
            drawn.temperature,
            on_text,
            drawn.top_p,
            drawn.repetition_penalty,
        )


def trained_system(loaded: LoadedModel) -> str | None:
    """The system message that a run's training rows shared: the tuned model expects it. None where there was none."""
    system = loaded.run.metadata["data"].get("system") if loaded.run else None
    return str(system) if system else None


def reply(
    loaded: LoadedModel,
    history: Sequence[Message],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    on_text: Callable[[str], None] = lambda text: None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> str:
    """The model's answer to `history` (which ends with a user message). Greedy at temperature 0, else sampled (see Sampling).

    `on_text` gets the answer piece by piece as it is generated. Raises DataError if the history cannot be rendered, or does not fit into
    the model's context with an answer of `max_new_tokens`.
    """
    import torch
    from transformers import TextStreamer

    from tunesmith.models.generate import end_tokens

    pieces: list[str] = []

    class Stream(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            if self.next_tokens_are_prompt or int(value[-1]) not in ends:  # the end token need not be a special one
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            on_text(text)

    forward, tokenizer = loaded.forward, loaded.tokenizer
    prompt = loaded.chat.encode_prompt(history)
    _check_fits(loaded, len(prompt), max_new_tokens)
    ids = torch.tensor([prompt], device=forward.device)
    ends = end_tokens(forward.base, tokenizer)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None}
    )
    with torch.no_grad(), forward.autocast():
        forward.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            top_k=None,
            repetition_penalty=repetition_penalty,  # the model's own (Qwen2 has 1.05) would make it answer otherwise than in evaluation
            pad_token_id=ends[0],
            eos_token_id=ends,
            streamer=Stream(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    return "".join(pieces)


def _check_fits(loaded: LoadedModel, prompt: int, max_new_tokens: int) -> None:
    """Raise DataError where the model would go on past the positions that it was made for: with a table of them there are no more."""
    context = getattr(loaded.forward.base.config.get_text_config(), "max_position_embeddings", None)
    if not context or prompt + max_new_tokens <= context:
        return
    room = context - prompt
    mend = (
        f"/set max_new_tokens {room} (--max-new-tokens) leaves room, /new begins anew"
        if room > 0
        else "/new begins anew"
    )
    raise DataError(
        f"the conversation has {prompt:,} tokens and the answer up to {max_new_tokens:,}, together more than the "
        f"{context:,} of the model's context; {mend}"
    )
