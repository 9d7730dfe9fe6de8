"""The memory of a run before it begins: which engine, which policy for each layer, and the cap that holds it there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from tunesmith.config import RunConfig
from tunesmith.data.batches import few_lengths, largest_micro_batch
from tunesmith.errors import ConfigError, MachineError
from tunesmith.hardware import Hardware, free_memory_gb, no_fused_engine
from tunesmith.memory.policy import plan_memory
from tunesmith.models.adapters import count_parameters, weights_gb
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import why_not_fused
from tunesmith.types import GB, MemoryPlan, TokenizedExample

STATE_BYTES = {"adamw": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Optimizer state in bytes a trainable parameter: two moments of 32 or 8 bits."""


def plan_run(
    config: RunConfig, forward: ModelForward, hardware: Hardware, examples: Sequence[TokenizedExample]
) -> MemoryPlan:
    """What each layer keeps, recomputes or offloads so that a run on `examples` fits: `memory.limit_gb`, or what is free."""
    shape = forward.base.config.get_text_config()
    training, packing = config.training, config.data.packing
    engine = _engine(config, forward, hardware)
    graphs = training.cuda_graphs and hardware.type == "cuda" and engine == "fused"  # training/graphs.py widens rows
    tokens = largest_micro_batch(
        [len(example) for example in examples], training, packing, few_lengths if graphs else None
    )
    supervised = largest_micro_batch([example.supervised for example in examples], training, packing=True)
    trainable, _ = count_parameters(forward.model)
    return plan_memory(
        shape,
        mode=config.memory.mode,
        tokens=tokens,
        supervised=supervised,
        bytes_per_value=4 if forward.dtype == "fp32" else 2,
        static_gb=weights_gb(forward.model) + trainable * (4 + STATE_BYTES[config.optimizer.name]) / GB,
        budget_gb=config.memory.limit_gb or free_memory_gb(hardware) + (weights_gb(forward.model)),
        num_layers=shape.num_hidden_layers,
        engine=engine,
        rank=config.adapter.r if config.method != "full" else 0,
        expanded=config.method != "lora",
    )


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


def limit_memory(config: RunConfig, hardware: Hardware) -> None:
    """Hold this process to `memory.limit_gb` on a GPU. Raises MachineError if the card has less."""
    if hardware.type != "cuda":
        return
    torch.cuda.reset_peak_memory_stats(hardware.device)
    if config.memory.limit_gb is not None:
        share = config.memory.limit_gb / hardware.memory_gb
        if share > 1:
            raise MachineError(
                f"memory.limit_gb {config.memory.limit_gb} is more than the card has: {hardware.memory_gb:.1f}"
            )
        torch.cuda.set_per_process_memory_fraction(share, hardware.device)
