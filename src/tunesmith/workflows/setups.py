"""What a configuration and its data mean for memory and time: the terms of memory/. Imports no PyTorch."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import compress
from typing import Any, Literal

from tunesmith.cards import Card
from tunesmith.config import RunConfig, TrainingConfig
from tunesmith.contradictions import bf16_weights_need_bf16
from tunesmith.data.batches import largest_micro_batch, num_steps
from tunesmith.data.typical import typical_step
from tunesmith.data.widening import few_lengths, room_for
from tunesmith.errors import ConfigError
from tunesmith.hardware import ComputeDType, Hardware, compute_dtype
from tunesmith.memory.choose import Candidate, Choice, even_sizes, graphs_may_gain, options
from tunesmith.memory.estimate import Load, Setup
from tunesmith.memory.replays import replayed
from tunesmith.memory.shape import HALF_FUSED, ModelShape
from tunesmith.models.attention import takes_grouped_keys

MOST_OF_A_STEP = 1.5
"""Tokens of the largest micro-batch that is looked at, beside a mean step's: nearly every step is one micro-batch then."""


def engine_on_gpu(config: RunConfig, shape: ModelShape) -> Literal["reference", "fused"]:
    """The engine that `train` takes on an NVIDIA GPU. Raises ConfigError where `fused` is asked for and there is none."""
    what = None
    if config.method == "qlora" and config.quantization.scheme == "int8":
        what = "an 8-bit base"
    elif config.method != "full" and config.adapter.dora:
        what = "DoRA"
    elif config.method != "full" and shape.saved(config.adapter.modules_to_save).layers == shape.num_layers:
        what = "projections that train in full (adapter.modules_to_save)"
    elif not shape.can_fuse and not (config.model.engine == "fused" and shape.model_type in HALF_FUSED):
        what = f"{shape.model_type or 'this family'}, of which it knows no layer"
    if config.model.engine == "fused" and what:
        raise ConfigError(f"model.engine is fused, which does not run {what}; use auto")
    return "reference" if what or config.model.engine == "reference" else "fused"


def training_dtype(config: RunConfig, hardware: Hardware) -> ComputeDType:
    """The type that training computes in on this device. Raises ConfigError where the device or the weights' type cannot have it."""
    dtype = compute_dtype(config.model.dtype, hardware)
    if config.method == "full" and config.optimizer.weights_dtype == "bf16" and dtype != "bf16":
        raise ConfigError(bf16_weights_need_bf16(f"{config.model.dtype}, which is {dtype} on {hardware.name}"))
    return dtype


def setup_of(
    config: RunConfig,
    engine: Literal["reference", "fused"],
    dtype: ComputeDType,
    capability: tuple[int, int] | None,
    adapters: Any = None,
) -> Setup:
    """The configuration as far as memory depends on it. `capability` is the card's (None: not known, as any newer one).

    `adapters` is a loaded model's `peft_config`, which says the rank and what trains beside LoRA.
    """
    adapter = config.adapter
    r, targets = adapter.r, adapter.target_modules
    saved, new_tokens = tuple(adapter.modules_to_save), len(adapter.new_tokens)
    if adapters is not None:
        loaded = next(iter(adapters.values()))
        r, saved = loaded.r, tuple(loaded.modules_to_save or ())
        rows = loaded.trainable_token_indices or []
        new_tokens = max(map(len, rows.values())) if isinstance(rows, dict) else len(rows)
    return Setup(
        method=config.method,
        engine=engine,
        value_bytes=4 if dtype == "fp32" else 2,
        r=0 if config.method == "full" else r,
        targets=targets if isinstance(targets, str) else tuple(targets),
        optimizer=config.optimizer.name,
        weights_dtype=config.optimizer.weights_dtype,
        scheme=config.quantization.scheme if config.method == "qlora" else None,
        double_quant=config.quantization.double_quant,
        dora=config.method != "full" and adapter.dora,
        modules_to_save=saved if config.method != "full" else (),
        new_tokens=new_tokens if config.method != "full" else 0,
        grouped=takes_grouped_keys(capability or (8, 0), dtype),
    )


def choices_of(
    config: RunConfig,
    shape: ModelShape,
    setup: Setup,
    lengths: Sequence[int],
    supervised: Sequence[int],
    budget_gb: float | None,
    card: Card | None,
    device: str = "cuda",
    *,
    host: float = 1.0,
    weights_gb: float | None = None,
    trainable: int | None = None,
) -> list[Choice]:
    """Every micro-batch with its plan, the smallest first: padded and packed, with CUDA graphs and without, where they may be.

    Graphs save launching, and cost it for each shape once: a large micro-batch, or a short run, is better off without.
    """

    def planned(candidates: Sequence[Candidate], graphs: bool) -> list[Choice]:
        found = options(
            shape, setup, candidates, config.memory.mode, budget_gb, card,
            graphs=graphs, host=host, weights_gb=weights_gb, trainable=trainable,
        )  # fmt: skip
        return list(found)

    found: list[Choice] = []
    beside = setup.modules_to_save or setup.new_tokens  # an adapter that is continued has its own
    with_graphs = device == "cuda" and not beside and uses_graphs(config, setup.engine, shape)
    for packing in packings(config, setup.engine, shape, lengths, device):
        plain = planned(candidates_of(config, lengths, supervised, False, device, packing), False)
        found += plain
        gaining = [graphs_may_gain(choice, shape, setup, card, host) for choice in plain]
        if with_graphs and any(gaining):
            widened = candidates_of(config, lengths, supervised, True, device, packing)
            coming_again = [candidate for candidate in compress(widened, gaining) if candidate.replayed]
            found = [*planned(coming_again, True), *found]
    return sorted(found, key=lambda choice: choice.candidate.size)


def uses_graphs(config: RunConfig, engine: Literal["reference", "fused"], shape: ModelShape) -> bool:
    """Whether CUDA graphs can replay micro-batches on a GPU, whose rows are widened for that (training/graphs.py).

    They need gradients that stay in place, as those of LoRA's tensors do and no others, layers that draw no random numbers, and an
    objective that looks at tokens: which sequence each is in changes with every batch.
    """
    adapter = config.adapter
    fixed = config.method != "full" and adapter.dropout == 0 and not adapter.modules_to_save and not adapter.new_tokens
    fixed = fixed and not config.training.neftune_alpha and not config.pairs
    return config.training.cuda_graphs and engine == "fused" and shape.can_fuse and shape.capturable and fixed


def packings(
    config: RunConfig,
    engine: Literal["reference", "fused"],
    shape: ModelShape | None,
    lengths: Sequence[int],
    device: str,
) -> tuple[bool, ...]:
    """Whether rows are packed, or what `data.packing: auto` is decided between, padded first.

    Packing saves padding, where there is any. In the reference engine attention would cover the whole packed row.
    """
    if config.data.packing != "auto":
        return (config.data.packing,)
    if config.training.micro_batch_tokens is not None:
        return (True,)
    isolates = device == "cuda" and engine == "fused" and shape is not None and shape.can_fuse
    return (False, True) if isolates and len(set(lengths)) > 1 else (False,)


def candidates_of(
    config: RunConfig,
    lengths: Sequence[int],
    supervised: Sequence[int],
    graphs: bool,
    device: str,
    packing: bool,
) -> list[Candidate]:
    """The micro-batches there are to choose from, the smallest first; one, where the configuration says which.

    `lengths` and `supervised` are the examples' tokens and supervised tokens. A CPU gains nothing from more examples at once
    than the plain few.
    """
    lengths, supervised = tuple(lengths), tuple(supervised)  # one object, which all that is remembered of it shares
    training = config.training
    batch, whole = min(training.batch_size, len(lengths)), sum(lengths)
    largest_step = sum(heapq.nlargest(batch, lengths))
    widen = few_lengths if graphs else None

    def candidate(settings: TrainingConfig) -> Candidate:
        typical = typical_step(lengths, supervised, settings, packing, widen)
        steps = num_steps(training, math.ceil(whole / typical.tokens - 1e-9))
        tokens = largest_micro_batch(lengths, settings, packing, widen)
        targets = largest_micro_batch(supervised, settings, packing=True)
        if widen:
            targets = room_for(targets, tokens)
        if settings.micro_batch_tokens is not None:
            size, unit = settings.micro_batch_tokens, "tokens"
            runs = max(1.0, typical.micro_batches)
            accumulates = runs > 1 if training.batch_tokens is not None else size < largest_step
        else:
            size, unit = settings.micro_batch, "examples"
            runs = math.ceil(batch / size)
            accumulates = runs > 1
        sequence = max(lengths)
        masked = 0
        if packing:
            masked = tokens
        elif size > 1 and min(lengths) < sequence:
            masked = sequence
        # Of a micro-batch; not of `size`: sixteen examples are five micro-batches of three, and one.
        slots = typical.slots / runs
        return Candidate(
            size,
            max(1, round(runs)),
            Load(tokens, min(targets, tokens), sequence, accumulates, masked),
            Load(
                max(1, round(slots)),
                max(1, round(typical.supervised / runs)),
                max(1, round(typical.context)),
                accumulates,
            ),
            typical.tokens,
            unit,  # type: ignore[arg-type]  # one of the two
            replayed(typical.shapes, steps * runs) if graphs else 1.0,
            packing,
            runs,
            typical.spread,
        )

    if training.micro_batch_tokens is not None or training.micro_batch_size != "auto":
        return [candidate(training)]
    if not packing or device != "cuda":
        sizes = [size for size in even_sizes(batch) if device == "cuda" or size <= training.micro_batch]
        return [candidate(training.model_copy(update={"micro_batch_size": size})) for size in sizes]
    longest = max(lengths)
    if config.data.max_seq_length != "auto":
        # A budget that could not hold the longest example that is allowed would be refused (contradictions.py).
        longest = max(longest, config.data.max_seq_length * (2 if config.pairs else 1))
    budgets = [longest]
    most = min(MOST_OF_A_STEP * batch * whole / len(lengths), largest_step, max(64 * longest, 2**17))
    while budgets[-1] < most:  # longest times 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5 ...
        octave, quarter = divmod(len(budgets), 4)
        budgets.append(longest * (4 + quarter) * 2**octave // 4)
    return [candidate(training.model_copy(update={"micro_batch_tokens": size})) for size in budgets]


def set_micro_batch(config: RunConfig, candidate: Candidate) -> None:
    """Write a chosen micro-batch, and whether it is packed, where the configuration says `auto`."""
    training = config.training
    config.data.packing = candidate.packed
    if training.micro_batch_tokens is not None or training.micro_batch_size != "auto":
        return
    if candidate.unit == "tokens":
        training.micro_batch_tokens = candidate.size
    else:
        training.micro_batch_size = candidate.size
