"""A micro-batch's forward and backward as one CUDA graph, where launching its kernels takes longer than running them.

A small model or a short micro-batch keeps the GPU waiting for Python: thousands of launches of some microseconds each. A
graph replays them without. It needs shapes that come again, so micro-batches are widened to a few of them
(data/widening.py), as long as that pays for one of them. A shape is captured after it was seen WARM_UPS times, if Python was
the slower one; until then, and for shapes that find no room, it runs launch by launch. Capturing takes as long as some
micro-batches, so the graphs that are kept are those of the shapes that come most (memory/replays.py). Graphs write gradients
to where the optimizer reads them, which therefore stay in place.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.config import RunConfig
from tunesmith.data.widening import MicroBatchShape
from tunesmith.memory.replays import MAX_GRAPHS, OUSTS, PAYS_FROM, WARM_UPS
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import engine_of
from tunesmith.training.objectives import Objective
from tunesmith.training.optimizers import Optimizer
from tunesmith.types import Batch, EventSink

WORTH_WIDENING = 0.1
"""Share of the micro-batches whose shapes must pay, or be not known yet: all are widened for them."""


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


def shape_of(batch: Batch) -> MicroBatchShape:
    """The shape of a batch that was made."""
    rows, length = batch.input_ids.shape
    bounds = batch.layout.cu_seqlens
    documents = 0 if bounds is None or batch.layout.equal_length else len(bounds) - 1
    return MicroBatchShape(rows, length, documents, batch.layout.max_length, len(batch.supervised))


@dataclass(slots=True)
class Known:
    """A shape that was seen: how often, whether a graph pays (None: not known), and the graph with its inputs and its loss."""

    seen: int = 0
    pays: bool | None = None
    batch: Batch | None = None
    graph: Any = None
    loss: torch.Tensor | None = None

    def forget_graph(self) -> None:
        """Let go of the graph and of what it holds."""
        self.batch = self.graph = self.loss = None


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
        self.known: dict[MicroBatchShape, Known] = {}
        self.given_up = False
        self._pool: Any = None
        self._stream = torch.cuda.Stream(forward.device)
        self._inverse: dict[str, torch.Tensor] = {}

    @property
    def pay(self) -> bool:
        """Whether graphs may be worth widening all micro-batches."""
        if self.given_up:
            return False
        return sum(known.seen for known in self.known.values() if known.pays is not False) >= WORTH_WIDENING * self.runs

    @property
    def captured(self) -> bool:
        """Whether there are graphs, which hold memory."""
        return any(known.graph is not None for known in self.known.values())

    def give_up(self) -> None:
        """Forget all graphs for good, with their memory: micro-batches go launch by launch."""
        self.given_up = True
        self.known.clear()
        self._pool = None

    def set_counts(self, counts: dict[str, int]) -> None:
        """The counts of the step that begins: what its terms are divided by."""
        for name, count in counts.items():
            if name not in self._inverse:
                self._inverse[name] = torch.zeros((), device=self.forward.device)
            self._inverse[name].fill_(1 / count)

    def run(self, batch: Batch) -> torch.Tensor:
        """Forward and backward of a widened batch; returns its part of the loss. Good until the next run."""
        shape = shape_of(batch)
        known = self.known.setdefault(shape, Known())
        known.seen += 1
        self.runs += 1
        if known.graph is not None:
            assert known.batch is not None
            assert known.loss is not None
            copy_batch(batch, known.batch)
            known.graph.replay()
            return known.loss
        if known.pays is None:
            known.pays = self._expected_to_pay(shape)
        if known.pays is None and known.seen == WARM_UPS:
            return self._timed(batch, known)
        if known.pays and known.seen > WARM_UPS and self._make_room(known):
            return self._capture(batch, known)
        return self._forward_backward(batch)

    def _expected_to_pay(self, shape: MicroBatchShape) -> bool | None:
        """What other shapes say: launching takes the same for each, and the GPU longer for more tokens. None: unclear."""
        slots = shape.rows * shape.length
        sizes = [(other.rows * other.length, known.pays) for other, known in self.known.items()]
        if any(pays and slots <= size for size, pays in sizes):
            return True
        return False if any(pays is False and slots >= size for size, pays in sizes) else None

    def _make_room(self, newcomer: Known) -> bool:
        """Whether there is room for one more graph: that of a shape that comes far less often gives way."""
        graphed = [known for known in self.known.values() if known.graph is not None]
        if len(graphed) < MAX_GRAPHS:
            return True
        least = min(graphed, key=lambda known: known.seen)
        if OUSTS * least.seen >= newcomer.seen:
            return False
        least.forget_graph()
        return True

    def _forward_backward(self, batch: Batch) -> torch.Tensor:
        with self.forward.autocast():
            terms = self.objective.terms(self.forward, batch)
            part = torch.stack([term.weight * term.sum * self._inverse[term.name] for term in terms]).sum()
        self.scaler.scale(part).backward()
        self.optimizer.collect()
        return part.detach()

    def _timed(self, batch: Batch, known: Known) -> torch.Tensor:
        """Run it, and see whether Python was slower than the GPU. Waits for the GPU."""
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
            known.pays = False
            known.forget_graph()
            reason = str(error).partition("\n")[0]
            self.log({"event": "warning", "message": f"no CUDA graph, micro-batches go launch by launch: {reason}"})
            self.optimizer.forget()
            return self._forward_backward(batch)
        self._pool = self._pool or graph.pool()
        known.graph = graph
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
