"""A forward and backward on the largest micro-batch that the data can produce, before training: the plan against the card.

Nothing of it stays: gradients are forgotten, random generators are put back, no weight moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.config import RunConfig
from tunesmith.data.batches import make_batch
from tunesmith.data.widening import few_lengths
from tunesmith.hardware import Hardware
from tunesmith.memory.calibrate import Measured, calibrate
from tunesmith.models.forward import ModelForward
from tunesmith.out_of_memory import is_out_of_memory, release_memory
from tunesmith.training.loop import step_tools
from tunesmith.training.objectives import Objective
from tunesmith.training.optimizers import Optimizer
from tunesmith.training.prepare import apply_plan
from tunesmith.types import GB, Event, TokenizedExample
from tunesmith.workflows.run_plan import RunPlan


class DryStep:
    """The step and what it needs; `measure` runs it."""

    def __init__(
        self,
        config: RunConfig,
        forward: ModelForward,
        objective: Objective,
        optimizer: Optimizer,
        hardware: Hardware,
        examples: Sequence[TokenizedExample],
        pad_id: int,
    ):
        self.config, self.forward, self.objective, self.optimizer = config, forward, objective, optimizer
        self.hardware, self.pad_id = hardware, pad_id
        self.examples = _largest(examples, config)

    def measure(self, plan: RunPlan) -> float | None:
        """The peak of a step under `plan` in GB, which is applied to the model; None if it runs out of memory.

        Paged states count as if they lay on the GPU: that is where a step wants them.
        """
        device = self.hardware.device
        apply_plan(self.forward, plan.memory)
        release_memory()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        was_training = self.forward.model.training
        self.forward.model.train()
        try:
            self.optimizer.allocate()
            # Where steps have several micro-batches, gradients wait while the second one's activations are there.
            for _ in range(2 if plan.choice.candidate.largest.accumulates else 1):
                self._forward_backward(plan.choice.graphs)
            torch.cuda.synchronize(device)
            return (torch.cuda.max_memory_allocated(device) + self.optimizer.paged_bytes) / GB
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self.forward.model.train(was_training)
            self.optimizer.reset()
            torch.set_rng_state(before[0])
            torch.cuda.set_rng_state_all(before[1])
            torch.cuda.empty_cache()
        return None

    def _forward_backward(self, widen: bool) -> None:
        packing = self.config.data.packed
        tools = step_tools(self.forward, packing, self.pad_id)
        (examples,) = self.objective.begin_step(self.forward, [self.examples], tools)
        batch = make_batch(examples, packing, self.pad_id, self.forward.device, few_lengths if widen else None)
        with self.forward.autocast():
            terms = self.objective.terms(self.forward, batch)
            loss = torch.stack([term.weight * term.sum / max(1, term.count) for term in terms]).sum()
        loss.backward()
        self.optimizer.collect()


def _largest(examples: Sequence[TokenizedExample], config: RunConfig) -> list[TokenizedExample]:
    """The largest micro-batch that training can give. One that fills a token budget ends with a part of an example.

    Which whole examples fill a budget best is a hard question, and the packing of some epoch may find them.
    """
    training = config.training
    lengths = [len(example) for example in examples]
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if training.micro_batch_tokens is None:
        longest = [examples[index] for index in longest_first[: training.micro_batch]]
        return [example.tail(len(example)) for example in longest]
    found: list[TokenizedExample] = []
    room = training.micro_batch_tokens
    for index in longest_first[: None if training.batch_tokens is not None else training.batch_size]:
        if room == 0:
            break
        example = examples[index]
        if room < len(example.lengths):  # a pair has at least two tokens
            break
        found.append(example.tail(room))  # answers are at the end
        room -= len(found[-1])
    return found


def calibrated(plan: RunPlan, step: DryStep) -> tuple[RunPlan, list[Event]]:
    """The plan that holds on this card, applied to the model, and what to log. On the CPU the plan stays as it is."""
    if step.hardware.type != "cuda" or not step.config.memory.calibrate:
        return plan, []
    found, measured = calibrate(plan, step.measure, RunPlan.corrected)
    apply_plan(step.forward, found.memory)
    step.config.training.cuda_graphs = found.choice.graphs
    return found, [_event(entry, found if entry is measured[-1] and found is not plan else None) for entry in measured]


def _event(entry: Measured, changed: RunPlan | None) -> Event:
    peak = "ran out of memory" if entry.measured_gb is None else f"took {entry.measured_gb:.2f} GB"
    message = f"a dry step on the largest micro-batch {peak}; predicted were {entry.predicted_gb:.2f} GB"
    if changed is not None:
        message += f"; the plan now: {changed.memory.reason}"
    return {
        "event": "calibration",
        "predicted_gb": entry.predicted_gb,
        "measured_gb": entry.measured_gb,
        "message": message,
    }
