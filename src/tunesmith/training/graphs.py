"""A micro-batch's forward and backward as one CUDA graph, where launching its kernels takes longer than running them.

A small model or a short micro-batch keeps the GPU waiting for Python: thousands of launches of some microseconds each. A
graph replays them without. It needs shapes that come again, so micro-batches are widened to a few of them (data/batches.py),
as long as that pays for one of them. A shape is captured after it was seen WARM_UPS times, if Python was the slower one; until then, and for other shapes, it runs
launch by launch. Graphs write gradients to where the optimizer reads them, which therefore stay in place.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.config import RunConfig
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import engine_of
from tunesmith.training.objectives import Objective
from tunesmith.training.optimizers import Optimizer
from tunesmith.types import Batch, EventSink

WARM_UPS, FIRST_WARM_UPS = 1, 3
"""Times that a shape, and the first one, run launch by launch: libraries choose and kernels are compiled."""

PAYS_FROM = 0.4
"""Share of a micro-batch's time that launching takes from which on it is captured: after every wait (a log line, an
evaluation) the GPU stands still until launching has caught up."""

MAX_GRAPHS = 24
"""Graphs that are kept; the one that was used longest ago goes first. They share one memory pool."""


def micro_batch_graphs(
    config: RunConfig,
    forward: ModelForward,
    objective: Objective,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    log: EventSink,
) -> GraphedMicroBatches | None:
    """Graphs for this run; None where they cannot be: they need a GPU, fused layers that draw no random numbers, rotations
    that do not depend on the longest position (transformers looks at it on the CPU), and an optimizer whose gradients stay
    in place (`Optimizer.connect`).
    """
    engine = engine_of(forward.model)
    capturable = engine is not None and engine.capturable and bool(engine.sinks) and not _rotates_by_length(forward)
    if not config.training.cuda_graphs or not forward.device.startswith("cuda") or not capturable:
        return None
    return GraphedMicroBatches(forward, objective, optimizer, scaler, log)


def _rotates_by_length(forward: ModelForward) -> bool:
    kinds = getattr(getattr(forward.decoder, "rotary_emb", None), "rope_type", "default")
    found = kinds.values() if isinstance(kinds, dict) else [kinds]  # a dictionary by kind of layer (Gemma 3)
    return any("dynamic" in kind or kind == "longrope" for kind in found)


@dataclass(frozen=True, slots=True)
class Shape:
    """What two micro-batches must share to share a graph. `longest` is the longest document of a packed row."""

    rows: int
    length: int
    documents: int
    longest: int
    supervised: int

    @classmethod
    def of(cls, batch: Batch) -> Shape:
        """The shape of a batch."""
        rows, length = batch.input_ids.shape
        bounds = batch.layout.cu_seqlens
        documents = 0 if bounds is None or batch.layout.equal_length else len(bounds) - 1
        return cls(rows, length, documents, batch.layout.max_length, len(batch.supervised))


@dataclass(slots=True)
class Known:
    """A shape that was seen: how often, whether a graph pays, and the graph with its inputs and its loss."""

    seen: int = 0
    pays: bool = True
    batch: Batch | None = None
    graph: Any = None
    loss: torch.Tensor | None = None


class GraphedMicroBatches:
    """Runs micro-batches: launch by launch at first, as graphs where that pays."""

    def __init__(
        self,
        forward: ModelForward,
        objective: Objective,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        log: EventSink,
    ):
        self.runs = 0
        self.forward, self.objective, self.optimizer, self.scaler = forward, objective, optimizer, scaler
        self.log = log
        self.known: OrderedDict[Shape, Known] = OrderedDict()
        self.given_up = False
        self._pool: Any = None
        self._stream = torch.cuda.Stream(forward.device)
        self._inverse: dict[str, torch.Tensor] = {}

    @property
    def pay(self) -> bool:
        """Whether a graph may still be worth its shape: before anything is known, or of a shape that was seen."""
        if self.given_up:
            return False
        return self.runs <= FIRST_WARM_UPS or any(known.pays for known in self.known.values())

    @property
    def captured(self) -> bool:
        """Whether there are graphs, which hold memory."""
        return any(known.graph is not None for known in self.known.values())

    def clear(self) -> None:
        """Forget all graphs, with their memory: shapes are looked at anew."""
        self.known.clear()
        self._pool = None

    def give_up(self) -> None:
        """Forget all graphs for good: micro-batches go launch by launch."""
        self.given_up = True
        self.clear()

    def set_counts(self, counts: dict[str, int]) -> None:
        """The counts of the step that begins: what its terms are divided by."""
        for name, count in counts.items():
            if name not in self._inverse:
                self._inverse[name] = torch.zeros((), device=self.forward.device)
            self._inverse[name].fill_(1 / count)

    def run(self, batch: Batch) -> torch.Tensor:
        """Forward and backward of a widened batch; returns its part of the loss. Good until the next run."""
        known = self.known.setdefault(Shape.of(batch), Known())
        self.known.move_to_end(Shape.of(batch))
        known.seen += 1
        self.runs += 1
        if known.graph is not None:
            assert known.batch is not None
            assert known.loss is not None
            copy_batch(batch, known.batch)
            known.graph.replay()
            return known.loss
        if known.seen <= WARM_UPS or self.runs <= FIRST_WARM_UPS:
            return self._timed(batch, known)
        return self._capture(batch, known) if known.pays else self._forward_backward(batch)

    def _forward_backward(self, batch: Batch) -> torch.Tensor:
        with self.forward.autocast():
            terms = self.objective.terms(self.forward, batch)
            part = torch.stack([term.weight * term.sum * self._inverse[term.name] for term in terms]).sum()
        self.scaler.scale(part).backward()
        self.optimizer.collect()
        return part.detach()

    def _timed(self, batch: Batch, known: Known) -> torch.Tensor:
        """Run it, and see whether Python was slower than the GPU. Waits for the GPU: a few times in a shape's life."""
        torch.cuda.synchronize(self.forward.device)
        began = time.perf_counter()
        loss = self._forward_backward(batch)
        launched = time.perf_counter() - began
        torch.cuda.synchronize(self.forward.device)
        known.pays = launched > PAYS_FROM * (time.perf_counter() - began)
        return loss

    def _capture(self, batch: Batch, known: Known) -> torch.Tensor:
        known.batch = copy_of(batch)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.forward.device)
        # What the launches before held would lie beside the graph's own memory; so would cuBLAS's workspaces for the
        # stream that they ran on (0.1 GB on an H100). Both come back when they are needed.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                known.loss = self._forward_backward(known.batch)
        except RuntimeError as error:  # out of memory, or an operation that cannot be captured: nothing has run yet
            known.pays, known.batch, known.loss = False, None, None
            reason = str(error).partition("\n")[0]
            self.log({"event": "warning", "message": f"no CUDA graph, micro-batches go launch by launch: {reason}"})
            self.optimizer.forget()
            return self._forward_backward(batch)
        self._pool = self._pool or graph.pool()
        known.graph = graph
        captured = [shape for shape, entry in self.known.items() if entry.graph is not None]
        for shape in captured[: max(0, len(captured) - MAX_GRAPHS)]:
            del self.known[shape]
        rows, length = batch.input_ids.shape
        self.log({"event": "decision", "message": f"CUDA graph for micro-batches of {rows} x {length} tokens"})
        graph.replay()
        return known.loss


def copy_of(batch: Batch) -> Batch:
    """The batch in tensors of its own."""
    bounds = batch.layout.cu_seqlens
    return replace(
        batch,
        input_ids=batch.input_ids.clone(),
        labels=batch.labels.clone(),
        position_ids=batch.position_ids.clone(),
        supervised=batch.supervised.clone(),
        supervised_labels=batch.supervised_labels.clone(),
        attention_mask=None if batch.attention_mask is None else batch.attention_mask.clone(),
        layout=replace(batch.layout, cu_seqlens=None if bounds is None else bounds.clone()),
    )


def copy_batch(source: Batch, target: Batch) -> None:
    """Overwrite the tensors of `target`, a batch of the same shape."""
    pairs = (
        (source.input_ids, target.input_ids),
        (source.labels, target.labels),
        (source.position_ids, target.position_ids),
        (source.supervised, target.supervised),
        (source.supervised_labels, target.supervised_labels),
        (source.attention_mask, target.attention_mask),
        (source.layout.cu_seqlens, target.layout.cu_seqlens),
    )
    for value, place in pairs:
        if value is not None and place is not None:
            place.copy_(value, non_blocking=True)
