"""A step that runs out of memory is repeated, not lost: without CUDA graphs, in smaller micro-batches, recomputing more.

A step changes nothing before its optimizer does, and the optimizer's states exist before the first step
(`Optimizer.allocate`), so what failed can be forgotten and done again. The gradient is that of the whole step whatever its
micro-batches are (loop.py), dropout follows the rows (models/row_dropout.py), and the data's order does not depend on
how a step is divided: the losses are those of a run with room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from tunesmith.errors import MachineError
from tunesmith.out_of_memory import OutOfMemory, halve_in_order, release_memory, within_memory
from tunesmith.training.checkpoint import TrainState
from tunesmith.training.graphs import GraphedMicroBatches
from tunesmith.training.optimizers import Optimizer
from tunesmith.types import EventSink, TokenizedExample

Parts = list[list[TokenizedExample]]
"""The examples of each micro-batch of a step."""

Result = TypeVar("Result")


def halve(part: Sequence[TokenizedExample], packing: bool) -> Parts:
    """A micro-batch as two of about the same number of tokens; one example stays one.

    Padded rows stay beside those of their length. Packed documents go to the emptier half, the longest first.
    """
    if len(part) == 1:
        return [list(part)]
    if not packing:
        return halve_in_order(part)
    halves: Parts = [[], []]
    for example in sorted(part, key=len, reverse=True):
        min(halves, key=lambda half: sum(len(other) for other in half)).append(example)
    return halves


def allocate_states(optimizer: Optimizer, diagnose: Callable[[str, int], str]) -> None:
    """Make the optimizer's states. Raises MachineError with `diagnose(what happened, 0)`: nothing can be given up for them."""
    made = within_memory(lambda optimizer: optimizer.allocate(), optimizer)
    if isinstance(made, OutOfMemory):
        raise MachineError(diagnose(f"the optimizer's states found no memory: {made.reason}", 0))


class MemoryRecovery:
    """Repeats steps that run out of memory. What it gave up but for CUDA graphs is kept in `state`: a resumed run begins with it.

    `least_memory` makes the model compute everything again that it can, and says whether that was new. `diagnose` is given
    what happened and the number of halvings, and explains it with the run's numbers.
    """

    def __init__(
        self,
        state: TrainState,
        packing: bool,
        world_size: int,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        graphs: GraphedMicroBatches | None,
        log: EventSink,
        least_memory: Callable[[], bool],
        diagnose: Callable[[str, int], str],
    ):
        self.state, self.packing, self.world_size = state, packing, world_size
        self.optimizer, self.scaler, self.graphs, self.log = optimizer, scaler, graphs, log
        self.least_memory, self.diagnose = least_memory, diagnose
        if state.least_memory:
            least_memory()

    def divided(self, parts: Parts) -> Parts:
        """The micro-batches of a step, each halved as often as memory asked for."""
        for _ in range(self.state.halvings):
            parts = [half for part in parts for half in halve(part, self.packing)]
        return parts

    def run(self, parts: Parts, attempt: Callable[[Parts], Result]) -> Result:
        """`attempt` on the micro-batches of a step, again and again with less memory if it runs out of it.

        Raises MachineError with a diagnosis when nothing is left to give up.
        """
        while True:
            divided = self.divided(parts)
            if self.world_size > 1:  # other ranks wait in their collectives
                return attempt(divided)
            result = within_memory(attempt, divided)
            if not isinstance(result, OutOfMemory):
                return result
            self._give_way(max(len(part) for part in divided), result.reason)

    def drop_graphs(self) -> bool:
        """Let go of CUDA graphs, whose memory is their own, until they are captured again; whether there were any."""
        return self.graphs is not None and self.graphs.drop()

    def _give_way(self, largest: int, reason: str) -> None:
        step = self.state.step + 1
        self.optimizer.abandon(self.scaler)
        graphs = self.graphs is not None and self.graphs.running
        if self.graphs is not None:
            self.graphs.give_up()
        release_memory()
        if graphs:
            what = "without CUDA graphs"
        elif largest > 1:
            self.state.halvings += 1
            what = f"micro-batches of half the size, {2**self.state.halvings} times as many as planned"
        elif self.least_memory():
            self.state.least_memory = True
            what = "everything that can be is computed again"
        else:
            happened = f"step {step} ran out of memory with one example a micro-batch: {reason}"
            raise MachineError(self.diagnose(happened, self.state.halvings))
        message = (
            f"step {step} ran out of memory and is repeated; from now on {what}; the effective batch stays: {reason}"
        )
        self.log(
            {"event": "out_of_memory", "step": self.state.step, "halvings": self.state.halvings, "message": message}
        )
