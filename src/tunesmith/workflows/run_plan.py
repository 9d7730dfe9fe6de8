"""The memory of a run before it begins: the engine, the micro-batch, what each layer keeps, and the cap that holds it there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tunesmith.cards import Card, card_of
from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, MachineError, ModelError
from tunesmith.hardware import ComputeDType, Hardware, free_memory_gb, no_fused_engine
from tunesmith.measurements import ARITHMETIC, Calibration, calibration, read_measured
from tunesmith.memory.choose import Candidate, Choice, best, step_seconds
from tunesmith.memory.estimate import Estimate, Setup
from tunesmith.memory.policy import Mode, gives_up_alike, plan_memory
from tunesmith.memory.shape import ModelShape
from tunesmith.models.adapters import count_parameters, weights_gb
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import why_not_fused
from tunesmith.types import GB, MemoryPlan, TokenizedExample
from tunesmith.workflows.diagnosis import diagnose
from tunesmith.workflows.host import host_factor
from tunesmith.workflows.setups import candidates_of, choices_of, engine_on_gpu, packings, set_micro_batch, setup_of

SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""Which transformers answers under these names for models that call them otherwise."""

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where users say how PyTorch's allocator works."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How a run uses memory and how long a step takes: what was chosen, and what it was chosen from.

    `shape` is None for an architecture that cannot be planned; `choice` has no prediction then. `correction_gb` is what was
    measured beyond the arithmetic, `host` how long launching takes (workflows/host.py), `calibration` what earlier runs on
    this card measured. The choice holds arithmetic; `tokens_per_second` is what to expect.
    """

    choice: Choice
    shape: ModelShape | None
    setup: Setup
    budget_gb: float
    card: Card | None
    weights_gb: float
    trainable: int
    correction_gb: float = 0.0
    host: float = 1.0
    calibration: Calibration = ARITHMETIC

    @property
    def tokens_per_second(self) -> float | None:
        """Expected tokens a second: the arithmetic times what earlier runs reached of it."""
        predicted = self.choice.tokens_per_second
        return None if predicted is None else predicted * self.calibration.speed

    @property
    def basis(self) -> dict[str, Any]:
        """What the figures are: `arithmetic`, or `calibrated` on this card, memory by a dry step, speed by so many `runs`."""
        memory = {"memory": "calibrated"} if self.correction_gb else {}
        return self.calibration.basis(self.tokens_per_second) | memory

    @property
    def memory(self) -> MemoryPlan:
        """The plan of memory."""
        return self.choice.plan

    def corrected(self, measured_gb: float) -> RunPlan:
        """The plan again, with the same micro-batch, for a peak that was measured where this one was predicted."""
        predicted = self.memory.predicted_peak_gb
        if self.shape is None or predicted is None:
            return self
        found = self._again(self.memory.mode, self.correction_gb + measured_gb - predicted)
        return replace(found, correction_gb=self.correction_gb + measured_gb - predicted)

    def least(self) -> RunPlan:
        """The plan that needs the least memory, with the same micro-batch; itself if there is no less."""
        if self.shape is None or self.memory.mode == "min":
            return self
        found = self._again("min", self.correction_gb)
        return self if gives_up_alike(found.memory, self.memory) else found

    def _again(self, mode: Mode, correction_gb: float) -> RunPlan:
        assert self.shape is not None
        candidate = self.choice.candidate
        estimate = Estimate(self.shape, self.setup, candidate.largest, self.weights_gb, self.trainable)
        found: list[Choice] = []
        for graphs in {self.choice.graphs, False}:
            plan = plan_memory(estimate, mode, self.budget_gb, correction_gb, graphs)
            seconds = None
            if self.card is not None:
                seconds = step_seconds(self.shape, self.setup, candidate, plan, self.card, graphs, self.host)
            found.append(Choice(candidate, plan, seconds, graphs))
        return replace(self, choice=best(found, mode))


def plan_run(
    config: RunConfig, forward: ModelForward, hardware: Hardware, examples: Sequence[TokenizedExample]
) -> RunPlan:
    """The micro-batch, and what each layer keeps, recomputes or offloads, so that a run on `examples` fits.

    Fits into `memory.limit_gb`, and what is free. Writes the micro-batch and packing into `config` where they were `auto`, and
    whether CUDA graphs replay it. Raises MachineError, with what could be changed, where a GPU cannot hold it whatever is
    given up.
    """
    shape = shape_of(forward.base.config.get_text_config())
    engine = _engine(config, forward, hardware)
    trainable, _ = count_parameters(forward.model)
    weights = weights_gb(forward.model)
    budget = budget_gb(config, hardware, weights)
    if config.method != "full":
        weights -= 4 * trainable / GB
    setup = setup_of(config, engine, forward.dtype, hardware.capability, getattr(forward.model, "peft_config", None))
    lengths, supervised = _lengths(examples)
    on_gpu = hardware.type == "cuda"
    card = card_of(hardware.name, hardware.memory_gb) if on_gpu else None
    host = host_factor(hardware.device) if on_gpu else 1.0
    if shape is None:
        (packing,) = packings(config, engine, None, lengths, hardware.type)
        candidates = candidates_of(config, lengths, supervised, False, hardware.type, packing)
        usual = [each for each in candidates if each.size <= config.training.micro_batch]
        plan = _without_prediction(config, engine, forward, budget)
        choice = Choice([candidates[0], *usual][-1], plan, None, graphs=config.training.cuda_graphs)
    else:
        if engine == "fused" and not shape.can_fuse and config.model.engine == "auto":
            (packing,) = packings(config, engine, shape, lengths, hardware.type)
            smallest = candidates_of(config, lengths, supervised, False, hardware.type, packing)[0]
            setup = _engine_of_half_fused(shape, setup, smallest, config.memory.mode, budget, weights, trainable)
        found = choices_of(
            config, shape, setup, lengths, supervised, budget, card, hardware.type,
            host=host, weights_gb=weights, trainable=trainable,
        )  # fmt: skip
        choice = best(found, config.memory.mode)
    known = ARITHMETIC
    if shape is not None:
        known = calibration(read_measured(), card, setup.engine, config.method, setup.scheme, shape.num_parameters)
    if on_gpu and not _may_fit(choice.plan):
        raise MachineError(diagnose(config, shape, choice.plan, budget, hardware.name, lengths))
    set_micro_batch(config, choice.candidate)
    if on_gpu:
        config.training.cuda_graphs = choice.graphs
    return RunPlan(choice, shape, setup, budget, card, weights, trainable, host=host, calibration=known)


def refuse_what_cannot_fit(
    config: RunConfig,
    model_config: Mapping[str, Any],
    hardware: Hardware,
    dtype: ComputeDType,
    examples: Sequence[TokenizedExample],
) -> None:
    """Raise MachineError, before weights are fetched or read, for a run that a GPU cannot hold whatever is given up.

    By arithmetic on config.json alone; what it cannot tell is left to `plan_run`.
    """
    try:
        shape = ModelShape.of(model_config)
    except ModelError:
        return
    if hardware.type != "cuda" or config.adapter.init_from:
        return
    engine = "reference" if no_fused_engine(hardware) else engine_on_gpu(config, shape)
    setup = setup_of(config, engine, dtype, hardware.capability)
    budget = budget_gb(config, hardware, 0.0)
    lengths, supervised = _lengths(examples)
    plans = [
        plan_memory(Estimate(shape, setup, smallest.largest), "min", budget)
        for packing in packings(config, engine, shape, lengths, hardware.type)
        for smallest in candidates_of(config, lengths, supervised, False, hardware.type, packing)[:1]
    ]
    least = min(plans, key=lambda plan: plan.predicted_peak_gb or 0.0)
    if not _may_fit(least):
        raise MachineError(diagnose(config, shape, least, budget, hardware.name, lengths))


def _lengths(examples: Sequence[TokenizedExample]) -> tuple[list[int], list[int]]:
    return [len(example) for example in examples], [example.supervised for example in examples]


def _may_fit(plan: MemoryPlan) -> bool:
    """A plan that would fill the whole budget is tried; one that asks for more, or keeps all where it must not, is not."""
    if plan.predicted_peak_gb is None or plan.budget_gb is None:
        return True
    return plan.predicted_peak_gb <= plan.budget_gb


def shape_of(config: Any) -> ModelShape | None:
    """The shape of a transformers text config; None if it lacks what a decoder has."""
    values: Mapping[str, Any] = config.to_dict()
    named = {key: getattr(config, key, None) for key in SHAPE_KEYS}
    try:
        return ModelShape.of({**values, **{key: value for key, value in named.items() if value is not None}})
    except ModelError:
        return None


def budget_gb(config: RunConfig, hardware: Hardware, weights: float) -> float:
    """GB that the run may take with its `weights` loaded: what is free or its own already, and no more than the cap."""
    own = torch.cuda.memory_reserved(hardware.device) / GB if hardware.type == "cuda" else weights
    free = free_memory_gb(hardware) + own
    return free if config.memory.limit_gb is None else min(config.memory.limit_gb, free)


def _engine(config: RunConfig, forward: ModelForward, hardware: Hardware) -> Literal["reference", "fused"]:
    """What `model.engine` means here. Raises ConfigError where `fused` was asked for and no layer fits."""
    if config.model.engine == "reference":
        return "reference"
    if config.model.engine == "auto" and no_fused_engine(hardware):
        return "reference"
    reasons = why_not_fused(forward.model)
    if all(reasons) and config.model.engine == "fused":
        raise ConfigError(f"model.engine is fused, but no layer of this model can be: {reasons[0]}; use auto")
    return "reference" if all(reasons) else "fused"


def _engine_of_half_fused(
    shape: ModelShape, setup: Setup, candidate: Candidate, mode: Mode, budget: float, weights: float, trainable: int
) -> Setup:
    """Layers of which only a half is ours recompute nothing: the reference engine, unless everything can be kept."""
    kept = plan_memory(Estimate(shape, setup, candidate.largest, weights, trainable), "auto", budget)
    return setup if mode != "min" and _may_fit(kept) else replace(setup, engine="reference")


def _without_prediction(
    config: RunConfig, engine: Literal["reference", "fused"], forward: ModelForward, budget: float
) -> MemoryPlan:
    """For an architecture whose memory cannot be told: `min` recomputes every layer, else everything is kept."""
    num_layers = len(forward.decoder.layers) if hasattr(forward.decoder, "layers") else 0
    layers = num_layers if config.memory.mode == "min" else 0
    what = f"recompute {layers} of {num_layers} layers" if layers else "keep all activations"
    reason = f"memory.mode {config.memory.mode}: {type(forward.base).__name__} cannot be predicted: {what}"
    return MemoryPlan(config.memory.mode, layers, num_layers, budget, None, reason, engine)


def limit_memory(config: RunConfig, hardware: Hardware) -> None:
    """Hold this process to `memory.limit_gb` on a GPU. Raises MachineError if the card has less.

    PyTorch's allocator gets segments that grow (unless its environment variable says how it should work): micro-batches of
    many sizes leave holes in others, which are reserved but of no use. Under a cap of 8 GB that cost 0.9 GB on an H100.
    """
    if hardware.type != "cuda":
        return
    if not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.cuda.reset_peak_memory_stats(hardware.device)
    if config.memory.limit_gb is not None:
        share = config.memory.limit_gb / hardware.memory_gb
        if share > 1:
            raise MachineError(
                f"memory.limit_gb {config.memory.limit_gb} is more than the card has: {hardware.memory_gb:.1f}"
            )
        torch.cuda.set_per_process_memory_fraction(share, hardware.device)
