"""A model that is evaluated: it answers and scores, and what it said is kept (evaluation/journal.py).

Base and tuned model are two subjects over the same prompts, limits and decoding; with an adapter they share their weights, and the base
is asked with the adapter switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, field
from typing import Any, Literal

from tunesmith.config import EvaluationConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.evaluation.journal import Journal, key_of
from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import generate_greedy
from tunesmith.models.likelihood import Likelihood, log_likelihoods
from tunesmith.out_of_memory import Halving
from tunesmith.types import Progress, no_progress

REQUESTS_AT_ONCE = 512
"""Scored texts between two lines of the journal."""


@dataclass(slots=True)
class Subject:
    """One of the two models that are compared. `base_below` switches the adapter off while it is asked."""

    name: Literal["tuned", "base"]
    forward: ModelForward
    tokenizer: Any
    chat: ChatFormat
    settings: EvaluationConfig
    journal: Journal = field(default_factory=Journal)
    progress: Progress = no_progress
    base_below: bool = False
    halving: Halving = field(default_factory=Halving)
    weights: str = ""
    """Tells answers of one base from those of another in the journal."""

    def generate(self, prompts: Sequence[Sequence[int]], stage: str, max_new_tokens: int | None = None) -> list[str]:
        """The greedy answer to each prompt (token ids), as text without special tokens. `stage` names the progress bar."""
        limit = max_new_tokens or self.settings.max_new_tokens
        keys = [key_of(self.name, self.weights, list(prompt), limit) for prompt in prompts]
        waiting = self._waiting(keys)
        self.progress(stage, len(prompts) - len(waiting), len(prompts))

        def keep(places: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
            self.journal.add({keys[waiting[place]]: text for place, text in zip(places, texts, strict=True)})

        if waiting:
            with self._switched():
                generate_greedy(
                    self.forward,
                    self.tokenizer,
                    [prompts[index] for index in waiting],
                    limit,
                    self.settings.batch_size,
                    self._counter(stage, len(prompts), len(waiting)),
                    self.halving,
                    keep,
                )
        return [self.journal.known[key] for key in keys]

    def log_likelihoods(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], stage: str) -> list[Likelihood]:
        """The log-likelihood of each continuation (token ids) behind its context (token ids)."""
        keys = [
            key_of(self.name, self.weights, list(context), list(continuation)) for context, continuation in requests
        ]
        waiting = self._waiting(keys)
        counter = self._counter(stage, len(requests), len(waiting))
        self.progress(stage, len(requests) - len(waiting), len(requests))
        for start in range(0, len(waiting), REQUESTS_AT_ONCE):
            part = waiting[start : start + REQUESTS_AT_ONCE]
            with self._switched():
                found = log_likelihoods(
                    self.forward,
                    [requests[index] for index in part],
                    self.settings.batch_size,
                    lambda done, before=start: counter(before + done),  # type: ignore[misc]
                    self.halving,
                )
            self.journal.add({keys[index]: astuple(one) for index, one in zip(part, found, strict=True)})
        return [Likelihood(*self.journal.known[key]) for key in keys]

    def _waiting(self, keys: Sequence[str]) -> list[int]:
        """Which of the questions have no answer yet, each question once."""
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        return sorted(index for key, index in first.items() if key not in self.journal.known)

    def _counter(self, stage: str, total: int, waiting: int) -> Callable[[int], None]:
        return lambda done: self.progress(stage, total - waiting + done, total)

    def _switched(self) -> AbstractContextManager[Any]:
        return self.forward.model.disable_adapter() if self.base_below else nullcontext()
