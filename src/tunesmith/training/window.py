"""What happened since the last log line. Losses stay on the device until the line is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    scalars: torch.Tensor  # (3,): loss, gradient norm, bad


@dataclass
class Window:
    """The steps since the last log line, of all ranks together."""

    device: str
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
    ) -> None:
        """Count one step in, given as the examples of its micro-batches."""
        examples = [example for part in parts for example in part]
        self.steps.append(
            Taken(
                step,
                len(examples),
                sum(len(example) for example in examples),
                sum(example.supervised for example in examples),
                tuple(example.where for example in examples),
                torch.stack((loss.float(), grad_norm.float(), bad.float())),
            )
        )

    def close(self, state: TrainState, lr: float, steps_per_epoch: int) -> tuple[StepMetrics, list[SkippedStep]]:
        """Wait for the device, report the window, add it to `state` and begin the next one.

        The loss is the mean over the supervised tokens of the steps that were taken; NaN if none was.
        """
        scalars = torch.stack([taken.scalars for taken in self.steps]).tolist()
        seconds = time.perf_counter() - self.started
        loss_sum, supervised, skipped = 0.0, 0, []
        for taken, (loss, norm, bad) in zip(self.steps, scalars, strict=True):
            if bad:
                skipped.append(SkippedStep(taken.step, loss, norm, taken.rows))
            else:
                loss_sum += loss * taken.supervised
                supervised += taken.supervised
        last_loss, last_norm, _ = scalars[-1]
        metrics = StepMetrics(
            step=state.step,
            epoch=state.step / steps_per_epoch,
            loss=loss_sum / supervised if supervised else last_loss,
            lr=lr,
            grad_norm=last_norm,
            examples=sum(taken.examples for taken in self.steps),
            tokens=sum(taken.tokens for taken in self.steps),
            supervised_tokens=sum(taken.supervised for taken in self.steps),
            seconds=seconds,
            memory_gb=memory_in_use_gb(self.device),
        )
        state.examples += metrics.examples
        state.tokens += metrics.tokens
        state.supervised_tokens += supervised
        state.seconds += seconds
        state.loss_sum += loss_sum
        state.skipped += len(skipped)
        self.steps = []
        self.restart()
        return metrics, skipped
