"""What an evaluation consists of: parts that ask a model and score what it said (the task itself, general ability, safety, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunesmith.data.chat import ChatFormat
from tunesmith.evaluation.statistics import Difference, Measured, compare
from tunesmith.evaluation.subject import Subject


@dataclass(frozen=True, slots=True)
class PartResult:
    """What one part measured. Names of metrics are unique over the whole evaluation, so that gates can name them.

    `differences` has those that `compare(tuned, base)` would not get right (statistics of all rows); `details` is JSON.
    """

    metrics: Mapping[str, Measured]
    baseline: Mapping[str, Measured] | None = None
    differences: Mapping[str, Difference] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def comparison(self) -> dict[str, Difference]:
        """Tuned minus base, of each metric that both have."""
        base = self.baseline or {}
        return {
            name: self.differences.get(name) or compare(measured, base[name])
            for name, measured in self.metrics.items()
            if name in base
        }


class Part(Protocol):
    """A part of an evaluation. `check` comes before weights are read, `ask` once for each model, `score` at the end."""

    @property
    def name(self) -> str:
        """The part's name in the result."""

    def check(self, chat: ChatFormat) -> None:
        """Raise DataError or ConfigError with everything that cannot be asked."""

    def ask(self, subject: Subject) -> Any:
        """What the model says."""

    def score(self, tuned: Any, base: Any | None) -> PartResult:
        """What that comes to, from what the tuned model said and the base, if it was asked."""
