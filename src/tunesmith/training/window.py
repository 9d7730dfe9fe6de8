"""What happened since the last log line. Losses stay on the device until the line is written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tunesmith.hardware import memory_in_use_gb
from tunesmith.training.checkpoint import TrainState
from tunesmith.training.skips import SkippedStep
from tunesmith.types import StepMetrics, TokenizedExample


@dataclass(frozen=True, slots=True)
class Taken:
    """One optimizer step, with its scalars on the device. `bad` is 1 for a step that changed nothing."""

    step: int
    examples: int
    tokens: int
    supervised: int
    rows: tuple[str, ...]
    scalars: torch.Tensor  # (3 + metrics,): loss, gradient norm, bad, and what the objective measured


@dataclass
class Window:
    """The steps since the last log line, of all ranks together. Losses are means `by_tokens`, or by examples."""

    device: str
    by_tokens: bool = True
    started: float = 0.0
    steps: list[Taken] = field(default_factory=list)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start the clock again, after time that was not training."""
        self.started = time.perf_counter()

    def add(
        self,
        step: int,
        parts: Sequence[Sequence[TokenizedExample]],
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        bad: torch.Tensor,
        metrics: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Count one step in, given as the examples of its micro-batches."""
        metrics = metrics or {}
        self.names = tuple(metrics)
        examples = [example for part in parts for example in part]
        self.steps.append(
            Taken(
                step,
                len(examples),
                sum(len(example) for example in examples),
                sum(example.supervised for example in examples),
                tuple(example.where for example in examples),
                torch.stack(
                    (loss.float(), grad_norm.float(), bad.float(), *(value.float() for value in metrics.values()))
                ),
            )
        )

    def close(self, state: TrainState, lr: float, steps_per_epoch: int) -> tuple[StepMetrics, list[SkippedStep]]:
        """Wait for the device, report the window, add it to `state` and begin the next one.

        The loss is the mean over the supervised tokens (or the examples) of the steps that were taken, and so are the
        objective's metrics; NaN if none was.
        """
        scalars = torch.stack([taken.scalars for taken in self.steps]).tolist()
        seconds = time.perf_counter() - self.started
        sums, units, supervised, skipped = [0.0] * (1 + len(self.names)), 0, 0, []
        for taken, (loss, norm, bad, *values) in zip(self.steps, scalars, strict=True):
            if bad:
                skipped.append(SkippedStep(taken.step, loss, norm, taken.rows))
            else:
                weight = taken.supervised if self.by_tokens else taken.examples
                sums = [total + weight * value for total, value in zip(sums, (loss, *values), strict=True)]
                units += weight
                supervised += taken.supervised
        last_loss, last_norm = scalars[-1][:2]
        metrics = StepMetrics(
            step=state.step,
            epoch=state.step / steps_per_epoch,
            loss=sums[0] / units if units else last_loss,
            lr=lr,
            grad_norm=last_norm,
            examples=sum(taken.examples for taken in self.steps),
            tokens=sum(taken.tokens for taken in self.steps),
            supervised_tokens=sum(taken.supervised for taken in self.steps),
            seconds=seconds,
            memory_gb=memory_in_use_gb(self.device),
            metrics=dict(zip(self.names, (total / units for total in sums[1:]), strict=True)) if units else {},
        )
        state.examples += metrics.examples
        state.tokens += metrics.tokens
        state.supervised_tokens += supervised
        state.seconds += seconds
        state.loss_sum += sums[0]
        state.loss_units += units
        state.skipped += len(skipped)
        self.steps = []
        self.restart()
        return metrics, skipped
