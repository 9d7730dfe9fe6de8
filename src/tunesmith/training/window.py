"""What happened since the last log line. Losses stay on the device until the line is written."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tunesmith.hardware import memory_in_use_gb
from tunesmith.training.checkpoint import TrainState
from tunesmith.training.objectives import Metrics, means
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
    scalars: torch.Tensor  # (3 + metrics,): loss, gradient norm, bad, and the sums that the objective measured
    counts: dict[str, int]  # of those, by name


@dataclass
class Window:
    """The steps since the last log line, of all ranks together. Losses are means `by_tokens`, or by examples."""

    device: str
    by_tokens: bool = True
    started: float = 0.0
    steps: list[Taken] = field(default_factory=list)

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
        metrics: Metrics | None = None,
    ) -> None:
        """Count one step in, given as the examples of its micro-batches."""
        metrics = metrics or {}
        sums = [torch.as_tensor(total, device=loss.device).float() for total, _ in metrics.values()]
        examples = [example for part in parts for example in part]
        self.steps.append(
            Taken(
                step,
                len(examples),
                sum(len(example) for example in examples),
                sum(example.supervised for example in examples),
                tuple(example.where for example in examples),
                torch.stack((loss.float(), grad_norm.float(), bad.float(), *sums)),
                {name: count for name, (_, count) in metrics.items()},
            )
        )

    def close(self, state: TrainState, lr: float, steps_per_epoch: int) -> tuple[StepMetrics, list[SkippedStep]]:
        """Wait for the device, report the window, add it to `state` and begin the next one.

        The loss is the mean over the supervised tokens (or the examples) of the steps that were taken, NaN if none was; a metric
        that over what it counts.
        """
        scalars = torch.cat([taken.scalars for taken in self.steps]).tolist()
        seconds = time.perf_counter() - self.started
        loss_sum, units, supervised, skipped, last_loss, last_norm = 0.0, 0, 0, [], math.nan, math.nan
        measured: dict[str, tuple[float, int]] = {}
        for taken in self.steps:
            values, scalars = scalars[: len(taken.scalars)], scalars[len(taken.scalars) :]
            last_loss, last_norm, bad = values[:3]
            if bad:
                skipped.append(SkippedStep(taken.step, last_loss, last_norm, taken.rows))
                continue
            weight = taken.supervised if self.by_tokens else taken.examples
            loss_sum += weight * last_loss
            units += weight
            supervised += taken.supervised
            for (name, count), value in zip(taken.counts.items(), values[3:], strict=True):
                total, before = measured.get(name, (0.0, 0))
                measured[name] = total + value, before + count
        metrics = StepMetrics(
            step=state.step,
            epoch=state.step / steps_per_epoch,
            loss=loss_sum / units if units else last_loss,
            lr=lr,
            grad_norm=last_norm,
            examples=sum(taken.examples for taken in self.steps),
            tokens=sum(taken.tokens for taken in self.steps),
            supervised_tokens=sum(taken.supervised for taken in self.steps),
            seconds=seconds,
            memory_gb=memory_in_use_gb(self.device),
            metrics=means(measured),
        )
        state.examples += metrics.examples
        state.tokens += metrics.tokens
        state.supervised_tokens += supervised
        state.seconds += seconds
        state.loss_sum += loss_sum
        state.loss_units += units
        state.skipped += len(skipped)
        self.steps = []
        self.restart()
        return metrics, skipped
