"""One way to train on one card: what it needs and gives, and the least it can need. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.cards import Card
from tunesmith.config import Method, RunConfig
from tunesmith.hardware import Hardware
from tunesmith.measurements import ARITHMETIC, Calibration, Measurement, calibration
from tunesmith.memory.choose import Candidate, Choice, best
from tunesmith.memory.estimate import CONTEXT_GB, Estimate, Setup, trainable_values, weight_bytes
from tunesmith.memory.policy import HEADROOM, Mode, plan_memory
from tunesmith.memory.shape import ModelShape
from tunesmith.types import GB
from tunesmith.workflows.setups import candidates_of, choices_of, engine_on_gpu, packings, setup_of, training_dtype

PARALLEL = 0.95
"""What each card of several reaches of one alone: the ranks wait for each other's gradients."""

FASTER = 1.1
"""A leaner method is recommended all the same if it is this many times as fast: what has to compute much again is slow."""

METHOD_NAMES: dict[str, str] = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
"""How people write the methods."""

WAYS: tuple[tuple[Method, str], ...] = (("full", "nf4"), ("lora", "nf4"), ("qlora", "nf4"), ("qlora", "int8"))
"""Methods, with the scheme of their quantization. Of those that fit the first one is recommended: quantization costs time and
a little of the result, and is there for what does not fit otherwise. Full fine-tuning is for those who ask for it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is planned for: `count` cards alike, or so many GB of memory with a card that is not known.

    `measured` is what runs measured, on this card and others.
    """

    name: str
    memory_gb: float
    card: Card | None = None
    count: int = 1
    measured: tuple[Measurement, ...] = ()

    @property
    def budget_gb(self) -> float:
        """What PyTorch may take of one card."""
        return self.memory_gb - CONTEXT_GB

    @property
    def label(self) -> str:
        """How a sentence calls it: `a T4`, `4 H100`, `2 x 24 GB of GPU memory`."""
        if self.count > 1:
            return f"{self.count} {'' if self.card else 'x '}{self.name}"
        article = "an" if self.name[0] in "AHLR" else "a"  # as the letters are said
        return f"{article} {self.name}" if self.card else self.name


@dataclass(frozen=True, slots=True)
class Option:
    """One way to train: the setting, and what it needs and gives. `recompute` is in words; speed is of all cards together.

    `pool_gb` is what CUDA graphs hold beside the peak. `calibration` is in the speed already.
    """

    method: Method
    scheme: str | None
    optimizer: str
    memory_mode: Mode
    micro_batch_size: int
    micro_batch_unit: Literal["examples", "tokens"]
    packing: bool
    gradient_accumulation_steps: int
    max_seq_length: int
    recompute: str
    recompute_layers: int
    peak_gb: float
    fits: bool
    tokens_per_second: float | None
    adapter_parameters: int | None
    breakdown: Mapping[str, float]
    calibration: Calibration = ARITHMETIC
    pool_gb: float = 0.0

    @property
    def held_gb(self) -> float:
        """The peak with what CUDA graphs hold: what must fit."""
        return self.peak_gb + self.pool_gb

    @property
    def basis(self) -> dict[str, Any]:
        """Whether `memory` and `speed` are arithmetic or calibrated on this card, and by how many `runs`."""
        return self.calibration.basis(self.tokens_per_second)

    @property
    def label(self) -> str:
        """How people call the method."""
        return METHOD_NAMES[self.method] + (f" ({self.scheme})" if self.scheme not in (None, "nf4") else "")

    @property
    def micro_batches(self) -> str:
        """Micro-batches of a step: `2 x 8`, `2 packed x 8`, or `4,096 tokens x 8`, which are packed."""
        size = f"{self.micro_batch_size} packed" if self.packing else str(self.micro_batch_size)
        if self.micro_batch_unit == "tokens":
            size = f"{self.micro_batch_size:,} tokens"
        return f"{size} x {self.gradient_accumulation_steps}"


@dataclass(frozen=True, slots=True)
class Data:
    """The examples that are planned for: their tokens, and how many of them are supervised."""

    lengths: Sequence[int]
    supervised: Sequence[int]
    real: bool

    @classmethod
    def of_length(cls, length: int, rows: int) -> Data:
        """Examples of one length, every token supervised: the most memory that such data can need."""
        return cls([length] * rows, [length] * rows, False)


def plan_option(
    config: RunConfig, shape: ModelShape, target: Target, lengths: Sequence[int], supervised: Sequence[int]
) -> Option:
    """The best micro-batch and memory policy of one setting on one card, as `train` would choose them."""
    setup = _setup(config, shape, target.card)
    known = calibration(target.measured, target.card, setup.engine, config.method, setup.scheme, shape.num_parameters)
    found = choices_of(
        _share(config, target, lengths), shape, setup, lengths, supervised, budget_gb(config, target), target.card,
        host=known.host,
    )  # fmt: skip
    choice = best(found, config.memory.mode)
    return _option(config, shape, setup, max(lengths), choice, _speed(config, target, lengths, choice, known), known)


def budget_gb(config: RunConfig, target: Target) -> float:
    """What a run may take of one card: `memory.limit_gb`, or what PyTorch gets of it where that is less."""
    limit = config.memory.limit_gb
    return target.budget_gb if limit is None else min(limit, target.budget_gb)


def least_needed(config: RunConfig, shape: ModelShape, target: Target, data: Data) -> float:
    """GB that a setting needs on one card at the least: what `memory.mode` may give up is given up.

    The smallest micro-batch needs the least activations; one that is the whole step needs none of its gradients twice.
    """
    setup = _setup(config, shape, target.card)
    share = _share(config, target, data.lengths)
    extremes: list[Candidate] = []
    for packing in packings(share, setup.engine, shape, data.lengths, "cuda"):
        candidates = candidates_of(share, data.lengths, data.supervised, False, "cuda", packing)
        extremes += [candidates[0], candidates[-1]]
    mode: Mode = "fast" if config.memory.mode == "fast" else "min"
    plans = [
        plan_memory(Estimate(shape, setup, candidate.largest), mode, None) for candidate in dict.fromkeys(extremes)
    ]
    return min(plan.predicted_peak_gb or 0.0 for plan in plans)


def trains(config: RunConfig, shape: ModelShape, target: Target, data: Data) -> bool:
    """Whether `plan_option` finds something that fits, in a tenth of its time."""
    room = HEADROOM * budget_gb(config, target) + 1e-9
    if weight_bytes(shape, _setup(config, shape, target.card)) / GB > room:
        return False
    return least_needed(config, shape, target, data) <= room


def _share(config: RunConfig, target: Target, lengths: Sequence[int]) -> RunConfig:
    """The settings of the card with the most to do: examples are dealt, and none is cut in two."""
    if target.count == 1:
        return config
    share = config.model_copy(deep=True)
    training = share.training
    training.batch_size = -(-min(training.batch_size, len(lengths)) // target.count)
    if training.batch_tokens is not None:
        training.batch_tokens = max(training.micro_batch_tokens or 0, -(-training.batch_tokens // target.count))
    return share


def _speed(
    config: RunConfig, target: Target, lengths: Sequence[int], choice: Choice, known: Calibration
) -> float | None:
    """Tokens/s of all cards: those of the whole step, by the time of the card with the most to do."""
    if choice.tokens_per_second is None or choice.step_seconds is None:
        return None
    if target.count == 1:
        return known.speed * choice.tokens_per_second
    training = config.training
    tokens = training.batch_tokens or min(training.batch_size, len(lengths)) * sum(lengths) / len(lengths)
    return known.speed * PARALLEL * tokens / choice.step_seconds


def _setup(config: RunConfig, shape: ModelShape, card: Card | None) -> Setup:
    """The compute type and the engine that `train` takes on this card. Raises ConfigError for what it does not have."""
    newest = Card("", 0.0, (9, 0), 0.0, 0.0)  # memory alone, of a card that is not known
    of = card or newest
    dtype = training_dtype(config, Hardware("cuda:0", of.name, of.memory_gb, of.bf16, of.capability))
    return setup_of(config, engine_on_gpu(config, shape), dtype, of.capability)


def _option(
    config: RunConfig,
    shape: ModelShape,
    setup: Setup,
    sequence: int,
    choice: Choice,
    speed: float | None,
    known: Calibration,
) -> Option:
    plan, candidate = choice.plan, choice.candidate
    count = plan.recompute_layers
    words = "none" if not count else f"{count} of {plan.num_layers} layers"
    if away := sum(policy.offload_input for policy in plan.policies):
        some = "" if away == plan.num_layers else f" of {away}"
        words = f"all {plan.num_layers} layers, inputs{some} in host memory"
    return Option(
        method=config.method,
        scheme=setup.scheme,
        optimizer=config.optimizer.name,
        memory_mode=plan.mode,
        micro_batch_size=candidate.size,
        micro_batch_unit=candidate.unit,
        packing=candidate.packed,
        gradient_accumulation_steps=candidate.count,
        max_seq_length=sequence,
        recompute=words,
        recompute_layers=count,
        peak_gb=plan.predicted_peak_gb or 0.0,
        fits=choice.fits,
        tokens_per_second=speed,
        adapter_parameters=None if config.method == "full" else trainable_values(shape, setup),
        breakdown=plan.breakdown,
        calibration=known,
        pool_gb=plan.pool_gb,
    )


def with_settings(config: RunConfig, **changes: Any) -> RunConfig:
    """A copy with other settings, by dotted keys written with `__`."""
    values = config.model_dump()
    for key, value in changes.items():
        *path, last = key.split("__")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return RunConfig.model_validate(values)


def micro_batch_of(option: Option) -> dict[str, Any]:
    """The micro-batch of an option, and whether it is packed, as `with_settings` takes them."""
    unit = "tokens" if option.micro_batch_unit == "tokens" else "size"
    return {f"training__micro_batch_{unit}": option.micro_batch_size, "data__packing": option.packing}


def by_way(config: RunConfig, way: tuple[Method, str]) -> RunConfig:
    """A copy that trains in one of WAYS. Methods without quantization leave the scheme as it is: nothing reads it."""
    method, scheme = way
    scheme = config.quantization.scheme if method != "qlora" else scheme
    return with_settings(config, method=method, quantization__scheme=scheme)
