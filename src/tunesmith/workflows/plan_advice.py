"""What to change: to go longer, larger or faster where a plan fits, to fit where it does not.

Each line is asked at this very plan's examples, optimizer and batch, so that a plan with what it names says the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.cards import CARDS, Card
from tunesmith.config import Method, RunConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.memory.policy import HEADROOM
from tunesmith.memory.shape import ModelShape
from tunesmith.models.catalogue import CATALOGUE
from tunesmith.workflows.plan_options import (
    METHOD_NAMES,
    Data,
    Option,
    Target,
    budget_gb,
    by_way,
    least_needed,
    plan_option,
    trains,
    with_settings,
)

WORTHWHILE = 1.05
"""A change is said to be faster from this many times the speed on."""

WEIGHTS = "optimizer__weights_dtype"
"""Saves memory in full fine-tuning alone, and is refused for adapters."""

Way = tuple[Method, str]
"""A method with its scheme, as in plan_options.WAYS."""


def advice(
    config: RunConfig,
    name: str,
    shape: ModelShape,
    target: Target,
    data: Data,
    ways: Sequence[Way],
    main: Mapping[Way, Option],
    chosen: Option | None,
    found: Sequence[Option],
) -> Iterator[str]:
    """What to change, one line each. `ways` are those that may be recommended, `main` all that were looked at first."""
    if chosen is None:
        yield from _to_fit(config, name, shape, target, data, ways)
        return
    way = next(way for way, option in main.items() if option is chosen)
    settings, length = by_way(config, way), max(data.lengths)
    if longest := longest_that_trains(leanest(settings), shape, target):
        if longest > length:
            limit = " (the model's limit)" if longest == shape.context_length else ""
            yield f"longer: up to {longest:,} tokens{limit} with micro-batch 1 (memory.mode: min)"
        elif way[0] == "lora":
            qlora = by_way(config, ("qlora", config.quantization.scheme))
            further = longest_that_trains(leanest(qlora), shape, target)
            if further and further > longest:
                yield f"longer: up to {further:,} tokens with method: qlora"
    if larger := largest_model(config, target, data, ways, above=shape.num_parameters):
        yield f"larger: up to {larger[0]} trains here with {larger[1]}"
    yield from _faster(settings, shape, target, data, chosen, found)


def label_of(way: Way) -> str:
    """How people call a way."""
    return METHOD_NAMES[way[0]] + (" (int8)" if way == ("qlora", "int8") else "")


# -- where nothing fits -----------------------------------------------------------------------------------------------


def _to_fit(
    config: RunConfig, name: str, shape: ModelShape, target: Target, data: Data, ways: Sequence[Way]
) -> Iterator[str]:
    """The least change of settings that fits, and the first other method; else fewer tokens, a card and a model."""
    savings = _savings(config, target, ways)
    adapters = {key: value for key, value in savings.items() if key != WEIGHTS}  # theirs are in fp32
    steps: list[dict[str, Any]] = [{key: value} for key, value in savings.items()]
    steps += [savings] if len(savings) > 1 else []
    others: list[Way] = [way for way in (("lora", "nf4"), ("qlora", "nf4")) if way[0] not in dict(ways)]

    def first(ways: Sequence[Way], steps: Sequence[dict[str, Any]]) -> tuple[Way, dict[str, Any]] | None:
        return next(
            (
                (way, step)
                for step in steps
                for way in ways
                if trains(by_way(with_settings(config, **step), way), shape, target, data)
            ),
            None,
        )

    same, other = first(ways, steps), first(others, [{}, *({key: value} for key, value in adapters.items()), adapters])
    if same:
        yield f"settings: {label_of(same[0])} trains here with {_flags(same[1])}"
    if other:
        yield f"method: {label_of(other[0])} trains here with {_flags(other[1], other[0])}"
    if same or other:
        return
    for step in ({}, savings):
        changed = with_settings(config, **step)
        lengths = {way: longest_that_trains(by_way(changed, way), shape, target) or 0 for way in (*ways, *others)}
        way = max(lengths, key=lambda way: lengths[way])
        if lengths[way]:
            step = step if way in ways else {key: value for key, value in step.items() if key in adapters}
            flags = _flags(step, None if way in ways else way, lengths[way])
            yield f"shorter: {label_of(way)} trains here with {flags}"
            break
    if enough := smallest_card(config, shape, target, data, ways):
        card, way, least = enough
        yield f"card: {label_of(way)} of {name} needs {least:.1f} GB at least: {card.name} ({card.memory_gb:.0f} GB) or more"
    if smaller := largest_model(config, target, data, ways, below=shape.num_parameters):
        yield f"model: the largest known one that trains here is {smaller[0]} ({smaller[1]})"


def _savings(config: RunConfig, target: Target, ways: Sequence[Way]) -> dict[str, Any]:
    """Settings that would need less, as `with_settings` takes them; without those that save already."""
    found: dict[str, Any] = {}
    if config.memory.limit_gb is not None:
        found["memory__limit_gb"] = None
    if config.memory.mode == "fast":
        found["memory__mode"] = "auto"
    if config.training.micro_batch_size != "auto" and config.training.micro_batch_tokens is None:
        found["training__micro_batch_size"] = "auto"
    if "8bit" not in config.optimizer.name:
        found["optimizer__name"] = "adamw_8bit"
    computes_in_bf16 = config.model.dtype in ("auto", "bf16") and (target.card is None or target.card.bf16)
    if computes_in_bf16 and config.optimizer.weights_dtype == "fp32" and all(way[0] == "full" for way in ways):
        found[WEIGHTS] = "bf16"
    return found


def _flags(changes: Mapping[str, Any], way: Way | None = None, length: int | None = None) -> str:
    """Changes as `tunesmith plan` takes them."""
    words = [] if way is None else [f"--method {way[0]}"]
    words += [] if length is None else [f"--max-seq-length {length}"]
    for key, value in changes.items():
        words.append(f"--set {key.replace('__', '.')}={'null' if value is None else value}")
    return " ".join(words)


def smallest_card(
    config: RunConfig, shape: ModelShape, target: Target, data: Data, ways: Sequence[Way]
) -> tuple[Card, Way, float] | None:
    """The known card with the least memory, more than this one's, on which one of `ways` fits; with what that needs."""
    for card in _larger_cards(config, target):
        other = replace(target, name=card.name, memory_gb=card.memory_gb, card=card)
        room = HEADROOM * budget_gb(config, other)
        needs = {way: least_needed(by_way(config, way), shape, other, data) for way in ways}
        way = min(needs, key=lambda way: needs[way])
        if needs[way] <= room:
            return card, way, needs[way]
    return None


def _larger_cards(config: RunConfig, target: Target) -> list[Card]:
    """Known cards with more memory, the least first. Cards without bf16 do not train in it."""
    found = [card for card in CARDS if card.memory_gb > target.memory_gb and (card.bf16 or not config.needs_bf16)]
    return sorted(found, key=lambda card: (card.memory_gb, card.flops))


def largest_model(
    config: RunConfig, target: Target, data: Data, ways: Sequence[Way], above: int = 0, below: int = 10**15
) -> tuple[str, str] | None:
    """The known model with the most parameters, between the two, that trains here; with the way, in words."""
    settings = {way: by_way(config, way) for way in ways}
    shapes = {name: ModelShape.of(values) for name, values in CATALOGUE.items()}
    for name, shape in sorted(shapes.items(), key=lambda item: -item[1].num_parameters):
        if not above < shape.num_parameters < below or (shape.context_length or 0) < max(data.lengths):
            continue
        for way in ways:
            try:
                if trains(settings[way], shape, target, data):
                    return name, label_of(way)
            except (ConfigError, ModelError):  # of another family: it has no fused layers, or no such target_modules
                continue
    return None


# -- where something fits ---------------------------------------------------------------------------------------------


def _faster(
    settings: RunConfig, shape: ModelShape, target: Target, data: Data, chosen: Option, found: Sequence[Option]
) -> Iterator[str]:
    """A memory mode, a card, or what else there is. Speeds are of the same data, each with its best micro-batch."""
    speed = chosen.tokens_per_second
    if target.card is None or speed is None:
        return
    for option in found:
        alike = (option.method, option.scheme, option.max_seq_length) == (
            chosen.method, chosen.scheme, chosen.max_seq_length,
        )  # fmt: skip
        if alike and option.memory_mode == "auto" != chosen.memory_mode and option.fits:
            times = (option.tokens_per_second or 0) / speed
            if times > WORTHWHILE:
                yield f"faster: memory.mode: auto, {times:.2f} times as fast ({option.held_gb:.1f} GB)"
                return
    if chosen.recompute_layers:
        kept = least_needed(with_settings(settings, memory__mode="fast"), shape, target, data)
        for card in _larger_cards(settings, target):
            other = replace(target, name=card.name, memory_gb=card.memory_gb, card=card)
            if kept > HEADROOM * budget_gb(settings, other):
                continue
            option = plan_option(settings, shape, other, data.lengths, data.supervised)
            times = (option.tokens_per_second or 0) / speed
            if not option.recompute_layers and times > WORTHWHILE:
                yield (
                    f"faster: {card.name} ({card.memory_gb:.0f} GB) keeps all activations, {times:.2f} times as fast; "
                    "shorter examples keep more too"
                )
                return
        return
    better = [card for card in CARDS if card.flops > target.card.flops and card.memory_gb >= target.memory_gb]
    if better:
        card = min(better, key=lambda card: card.flops)
        packing = _packed(settings, shape, target, data, speed)
        yield f"faster: everything is kept already; a faster card ({card.name}), or several{packing}"


def _packed(settings: RunConfig, shape: ModelShape, target: Target, data: Data, speed: float) -> str:
    """That packing would be faster, where it is off."""
    if settings.data.packing is not False:
        return ""
    option = plan_option(with_settings(settings, data__packing="auto"), shape, target, data.lengths, data.supervised)
    times = (option.tokens_per_second or 0) / speed
    return f", or data.packing: auto, {times:.2f} times as fast" if times > WORTHWHILE else ""


def leanest(config: RunConfig) -> RunConfig:
    """Micro-batch 1, and everything computed again."""
    one = {"training__micro_batch_size": 1, "training__micro_batch_tokens": None, "training__batch_tokens": None}
    return with_settings(config, memory__mode="min", **one)


def longest_that_trains(config: RunConfig, shape: ModelShape, target: Target) -> int | None:
    """The longest example, in steps of 512 tokens, that trains with these settings."""
    limit = shape.context_length or 131_072
    limit = min(limit, config.training.micro_batch_tokens or limit)
    low, high = 0, max(1, limit // 512)

    def fits(length: int) -> bool:
        return trains(config, shape, target, Data.of_length(length, config.training.batch_size))

    if fits(limit):
        return limit
    while low < high:  # the largest number of steps that fits
        middle = (low + high + 1) // 2
        if fits(512 * middle):
            low = middle
        else:
            high = middle - 1
    return 512 * low or None
