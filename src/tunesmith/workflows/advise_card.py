"""What `tunesmith advise` asks of the planner: whether its settings fit the card, and if not, what would. No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.cards import CARDS
from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError
from tunesmith.memory.shape import ModelShape
from tunesmith.models.catalogue import CATALOGUE
from tunesmith.workflows.advise_settings import FitResult, Plan, run_config, with_advice
from tunesmith.workflows.plan import basis
from tunesmith.workflows.plan_options import METHOD_NAMES, Data, Target, plan_option, trains

SHORTEST = 128
"""Tokens. Shorter examples than this are not offered as a way out."""


@dataclass(frozen=True, slots=True)
class CardFit:
    """A `Fit`: plans settings for one model on one card. `config` is what the user set."""

    config: RunConfig
    model: str
    shape: ModelShape
    target: Target

    def __call__(self, settings: Mapping[str, Any], lengths: Sequence[int], supervised: Sequence[int]) -> FitResult:
        """What these settings need and give. Raises ConfigError for what the card cannot do (bf16 on an old one)."""
        limit = self.shape.context_length or max(lengths)
        cut = [min(limit, length) for length in lengths]
        option = plan_option(with_advice(self.config, settings), self.shape, self.target, cut, supervised)
        return FitResult(
            option.peak_gb,
            self.target.memory_gb,
            option.fits,
            option.tokens_per_second,
            option.micro_batch_size,
            option.micro_batch_unit,
            option.pool_gb,
            self.target.count,
            basis(self.target, self.shape, [option]),
        )

    def instead(self, plan: Plan) -> list[str]:
        """What would train with a plan's settings, each planned: shorter examples, the smallest card, the largest model."""
        settings = run_config(self.config, plan)
        settings.data.max_seq_length = "auto"  # the lengths below say it
        longest, method = max(plan.lengths), METHOD_NAMES[settings.method]
        found = []
        length = 1 << (longest - 1).bit_length() >> 1  # the next lower power of two
        while length >= SHORTEST and not _trains(settings, self.shape, self.target, length):
            length //= 2
        if length >= SHORTEST:
            found.append(f"shorter examples: {method} trains here with up to {length:,} tokens (data.max_seq_length)")
        for card in sorted(CARDS, key=lambda card: card.memory_gb):
            if _trains(settings, self.shape, Target(card.name, card.memory_gb, card, self.target.count), longest):
                found.append(
                    f"a larger card: {method} of {self.model} fits from {card.name} on ({card.memory_gb:.1f} GB)"
                )
                break
        models = {name: ModelShape.of(values) for name, values in CATALOGUE.items()}
        for name in sorted(models, key=lambda name: models[name].num_parameters, reverse=True):
            shape = models[name]
            smaller = shape.num_parameters < self.shape.num_parameters
            if (
                smaller
                and longest <= (shape.context_length or longest)
                and _trains(settings, shape, self.target, longest)
            ):
                found.append(f"a smaller model: {name} is the largest known one that trains here with {method}")
                break
        return found


def _trains(settings: RunConfig, shape: ModelShape, target: Target, length: int) -> bool:
    """Whether examples of this length fit."""
    examples = Data.of_length(length, settings.training.batch_size)
    try:
        return trains(settings, shape, target, examples)
    except ConfigError:  # an engine or a dtype that was asked for, and that this model or card does not have
        return False
