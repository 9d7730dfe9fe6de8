"""The planner's other questions, each a list: the ranks of an adapter, the known models on a card, the known cards of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunesmith.cards import CARDS
from tunesmith.config import Method, RunConfig
from tunesmith.errors import ConfigError, ModelError, UserError
from tunesmith.measurements import ARITHMETIC, read_measured
from tunesmith.memory.policy import HEADROOM
from tunesmith.memory.shape import ModelShape
from tunesmith.models.catalogue import CATALOGUE
from tunesmith.types import GB
from tunesmith.workflows.plan import asked_length, find_shape, longest_example
from tunesmith.workflows.plan_options import (
    Data,
    Option,
    Target,
    budget_gb,
    least_needed,
    micro_batch_of,
    plan_option,
    with_settings,
)


def plan_ranks(config: RunConfig, target: Target, ranks: Sequence[int], sequence: int | None) -> list[dict[str, Any]]:
    """For each rank: adapter parameters, the adapter's file in GB (fp32), the predicted peak, and whether it fits.

    The micro-batch is the one that the highest rank takes, so that ranks differ in nothing else.
    """
    _, shape = find_shape(config.model.name)
    if config.method == "full":
        raise ConfigError("--rank has no effect with method: full, which has no adapter; use --method lora or qlora")
    length = longest_example(config, shape, sequence, None)
    examples = Data.of_length(length, config.training.batch_size)
    for rank in ranks:
        if not 1 <= rank <= 4096:
            raise ConfigError(f"--rank {rank}: expected 1 to 4096")

    def look(settings: RunConfig, rank: int) -> Option:
        changed = with_settings(settings, adapter__r=rank)
        return plan_option(changed, shape, target, examples.lengths, examples.supervised)

    fixed = with_settings(config, **micro_batch_of(look(config, max(ranks))))
    rows = []
    for rank in ranks:
        option = look(fixed, rank)
        parameters = option.adapter_parameters or 0
        rows.append(
            {
                "rank": rank,
                "parameters": parameters,
                "share": parameters / shape.num_parameters,
                "adapter_gb": 4 * parameters / GB,
                "micro_batch_size": option.micro_batch_size,
                "micro_batch_unit": option.micro_batch_unit,
                "recompute": option.recompute,
                "peak_gb": option.peak_gb,
                "graphs_gb": option.pool_gb,
                "fits": option.fits,
                "tokens_per_second": option.tokens_per_second,
                "basis": option.basis,
            }
        )
    return rows


def plan_models(
    config: RunConfig, target: Target, sequence: int | None, methods: Sequence[Method] = ()
) -> list[dict[str, Any]]:
    """For each known model: the option of each method on this card, smallest model first.

    `max_seq_length` is what is planned for: less than what was asked for where the model's context is. Models that these
    settings cannot train, as they have none of `adapter.target_modules`, are left out; if that leaves none, their error is
    raised.
    """
    shapes = {name: ModelShape.of(values) for name, values in CATALOGUE.items()}
    known: dict[tuple[ModelShape, int], dict[str, Any]] = {}  # releases that differ in nothing but their context
    rows: list[dict[str, Any]] = []
    refused: UserError | None = None
    for name, shape in sorted(shapes.items(), key=lambda item: item[1].num_parameters):
        length = _length(config, shape, sequence)
        key = (replace(shape, context_length=None), length)
        if key not in known:
            try:
                known[key] = _by_method(config, shape, target, length, methods)
            except (ConfigError, ModelError) as error:
                refused = error
                continue
        rows.append(
            {
                "model": name,
                "parameters": shape.num_parameters,
                "max_seq_length": length,
                "methods": known[key],
            }
        )
    if refused is not None and not rows:
        raise refused
    return rows


def plan_cards(
    config: RunConfig, sequence: int | None, methods: Sequence[Method] = ()
) -> tuple[str, list[dict[str, Any]]]:
    """The model's name, and for each known card the option of each method, smallest card first.

    Cards without bf16 are left out where `model.dtype` or `optimizer.weights_dtype` asks for it.
    """
    name, shape = find_shape(config.model.name)
    length = _length(config, shape, sequence)
    measured = read_measured()
    rows = []
    for card in sorted(CARDS, key=lambda card: (card.memory_gb, card.flops)):
        if config.needs_bf16 and not card.bf16:
            continue
        target = Target(card.name, card.memory_gb, card, measured=measured)
        rows.append(
            {
                "gpu": card.name,
                "memory_gb": card.memory_gb,
                "max_seq_length": length,
                "methods": _by_method(config, shape, target, length, methods),
            }
        )
    return name, rows


def _length(config: RunConfig, shape: ModelShape, sequence: int | None) -> int:
    """Tokens of an example, as many as the model takes."""
    length = asked_length(config, sequence)
    return min(length, shape.context_length or length)


def _by_method(
    config: RunConfig, shape: ModelShape, target: Target, length: int, methods: Sequence[Method]
) -> dict[str, Any]:
    """The option of each method. Of one that does not fit, `peak_gb` is the least that these settings need, and `least_gb`
    what is left of it with optimizer states in 8 bits.
    """
    found: dict[str, dict[str, Any]] = {}
    examples = Data.of_length(length, config.training.batch_size)
    everything: tuple[Method, ...] = ("full", "lora", "qlora")
    for method in methods or everything:
        settings = with_settings(config, method=method)
        least = least_needed(settings, shape, target, examples)
        if least > HEADROOM * budget_gb(settings, target) + 1e-9:
            saving = with_settings(settings, optimizer__name="adamw_8bit")
            found[method] = {
                "fits": False,
                "peak_gb": least,
                "least_gb": min(least, least_needed(saving, shape, target, examples)),
                "graphs_gb": 0.0,
                "tokens_per_second": None,
                "basis": ARITHMETIC.basis(None),
            }
            continue
        option = plan_option(settings, shape, target, examples.lengths, examples.supervised)
        found[method] = {
            "fits": option.fits,
            "peak_gb": option.peak_gb,
            "graphs_gb": option.pool_gb,
            "tokens_per_second": option.tokens_per_second,
            "micro_batch_size": option.micro_batch_size,
            "recompute": option.recompute,
            "basis": option.basis,
        }
    return found
