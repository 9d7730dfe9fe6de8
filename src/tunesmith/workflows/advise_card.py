"""What `tunesmith advise` asks of the planner: whether its settings fit the card, and if not, what would. No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.config import RunConfig
from tunesmith.memory.shape import ModelShape
from tunesmith.workflows.advise_settings import FitResult, Plan, run_config, with_advice
from tunesmith.workflows.plan import basis
from tunesmith.workflows.plan_advice import largest_model, longest_that_trains, smallest_card
from tunesmith.workflows.plan_options import METHOD_NAMES, Data, Target, plan_option


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
        settings.data.max_seq_length = "auto"  # the lengths say it
        data = Data.of_length(max(plan.lengths), settings.training.batch_size)
        way = (settings.method, settings.quantization.scheme)
        method = METHOD_NAMES[settings.method]
        found = []
        if length := longest_that_trains(settings, self.shape, self.target):
            found.append(f"shorter examples: {method} trains here with up to {length:,} tokens (data.max_seq_length)")
        if larger := smallest_card(settings, self.shape, self.target, data, [way]):
            card = larger[0]
            found.append(f"a larger card: {method} of {self.model} fits from {card.name} on ({card.memory_gb:.1f} GB)")
        if smaller := largest_model(settings, self.target, data, [way], below=self.shape.num_parameters):
            found.append(f"a smaller model: {smaller[0]} is the largest known one that trains here with {method}")
        return found
