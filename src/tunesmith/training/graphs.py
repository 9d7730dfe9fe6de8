"""A micro-batch's forward and backward as one CUDA graph, where launching its kernels takes longer than running them.

A small model or a short micro-batch keeps the GPU waiting for Python: thousands of launches of some microseconds each. A
graph replays them without. It needs shapes that come again, so micro-batches are widened to a few of them
(data/widening.py). The first micro-batches go launch by launch: kernels are compiled, libraries choose, and some are timed;
where the GPU takes far longer than Python, the run goes on so. Then each shape is captured when it first comes, which takes
as long as launching and running it, one after the other, and is replayed when it comes again. Nothing runs launch by launch
beside the graphs, but for a shape that cannot be captured, and they share one memory pool: a run with graphs needs no more
memory than one without. Graphs write
gradients to where the optimizer reads them, which therefore stay in place.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.config import RunConfig
from tunesmith.data.widening import MicroBatchShape
from tunesmith.memory.replays import JUDGED_FROM, LOOKED_AT, MAX_GRAPHS, OUSTS, PAYS_FROM, TOO_MANY, WARM_UPS
from tunesmith.models.adapters import trains_beside_lora
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import engine_of
from tunesmith.out_of_memory import is_out_of_memory
from tunesmith.training.objectives import Objective
from tunesmith.training.optimizers import Optimizer
from tunesmith.types import Batch, EventSink

MAX_FAILURES = 2
"""Captures of a shape that may fail. After the first it has run launch by launch, which may be what the capture lacked: memory on
the host is not pinned, and some libraries are not loaded, while a graph is captured."""


def micro_batch_graphs(
    config: RunConfig,
    forward: ModelForward,
    objective: Objective,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    log: EventSink,
) -> GraphedMicroBatches | None:
    """Graphs for this run; None where they cannot be: they need a GPU, fused layers and embeddings that draw no random numbers, rotations
    that do not depend on the longest position (transformers looks at it on the CPU), and an optimizer whose gradients stay
    in place (`Optimizer.connect`), which those of modules beside LoRA's do not.
    """
    engine = engine_of(forward.model)
    if not objective.by_tokens:  # which sequence a token is in changes with every batch
        return None
    if forward.neftune_alpha:  # the seed is an argument of its kernel, which a graph would repeat
        return None
    if trains_beside_lora(forward.model):  # gradients of whole modules come and go; PEFT copies token ids to the device
        return None
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
    """A shape that was seen: how often, how many captures of it failed, and the graph with its inputs and its loss.

    `dropped` says that it had a graph until memory was needed: capturing it again says nothing of the data.
    """

    seen: int = 0
    failures: int = 0
    dropped: bool = False
    batch: Batch | None = None
    graph: Any = None
    loss: torch.Tensor | None = None

    def forget_graph(self) -> None:
        """Let go of the graph and of what it holds."""
        self.batch = self.graph = self.loss = None


class GraphedMicroBatches:
    """Runs micro-batches: the first ones launch by launch, then as graphs if that pays."""

    def __init__(
        self,
        forward: ModelForward,
        objective: Objective,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        log: EventSink,
    ):
        self.runs = 0
        self._captured: deque[bool] = deque(maxlen=LOOKED_AT)  # of the last micro-batches, whether they had to be
        self.forward, self.objective, self.optimizer, self.scaler = forward, objective, optimizer, scaler
        self.log = log
        self.known: dict[MicroBatchShape, Known] = {}
        self.pay = True
        self._share = 1.0  # of a micro-batch's time that launching took, the least that was seen
        self._pool: Any = None
        self._stream = torch.cuda.Stream(forward.device)
        self._inverse: dict[str, torch.Tensor] = {}

    def drop(self) -> bool:
        """Let go of the graphs and of their memory, until their shapes come again; whether there were any."""
        graphed = [known for known in self.known.values() if known.graph is not None]
        if graphed:  # a replay may still read and write what is given back
            torch.cuda.synchronize(self.forward.device)
        for known in graphed:
            known.forget_graph()
            known.dropped = True
        self._pool = None
        return bool(graphed)

    @property
    def running(self) -> bool:
        """Whether micro-batches go as graphs, or are captured, from the next one on."""
        return self.pay and self.runs >= WARM_UPS

    def give_up(self) -> None:
        """Forget all graphs for good: micro-batches go launch by launch, and need not be widened."""
        self.drop()
        self.pay = False

    def set_counts(self, counts: dict[str, int]) -> None:
        """The counts of the step that begins: what its terms are divided by."""
        for name, count in counts.items():
            if name not in self._inverse:
                self._inverse[name] = torch.zeros((), device=self.forward.device)
            self._inverse[name].fill_(1 / count)

    def run(self, batch: Batch) -> torch.Tensor:
        """Forward and backward of a widened batch; returns its part of the loss. Good until the next run.

        Raises torch.OutOfMemoryError, also where a graph found no memory.
        """
        known = self.known.setdefault(shape_of(batch), Known())
        known.seen += 1
        self.runs += 1
        if known.graph is not None:
            assert known.batch is not None
            assert known.loss is not None
            copy_batch(batch, known.batch)
            known.graph.replay()
            self._captured.append(False)
            return known.loss
        if self.runs <= WARM_UPS:
            return self._warm_up(batch)
        if not self.pay or known.failures == MAX_FAILURES:
            return self._forward_backward(batch)
        return self._capture(batch, known)

    def _warm_up(self, batch: Batch) -> torch.Tensor:
        """Run it; all but the first say whether Python is slower than the GPU, which is waited for."""
        torch.cuda.synchronize(self.forward.device)
        began = time.perf_counter()
        loss = self._forward_backward(batch)
        launched = time.perf_counter() - began
        torch.cuda.synchronize(self.forward.device)
        if self.runs > 1:  # the least: a kernel that is compiled takes its time of the processor, too
            self._share = min(self._share, launched / (time.perf_counter() - began))
        if self.runs == WARM_UPS and self._share <= PAYS_FROM:
            share = f"{self._share:.0%}"
            self._decide(f"no CUDA graphs: launching takes {share} of a micro-batch's time, and need not be saved")
            self.give_up()
        return loss

    def _decide(self, message: str) -> None:
        self.log({"event": "decision", "message": message})

    def _has_room(self, newcomer: Known) -> bool:
        """Whether a graph of this shape may stay: it takes the place of one whose shape comes far less often."""
        others = [known for known in self.known.values() if known.graph is not None and known is not newcomer]
        if len(others) < MAX_GRAPHS:
            return True
        least = min(others, key=lambda known: known.seen)
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

    def _capture(self, batch: Batch, known: Known) -> torch.Tensor:
        """Capture a graph, and replay it; it stays if there is room for it."""
        known.batch = copy_of(batch)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.forward.device)
        # What the launches before held would lie beside the graph's own memory; so would cuBLAS's workspaces for the
        # stream that they ran on (0.1 GB on an H100). Both come back when they are needed.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        failure: str | None = None
        try:
            # Around the graph's own: a capture whose end fails leaves its stream the current one.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
            ):
                known.loss = self._forward_backward(known.batch)
        except RuntimeError as error:
            failure, ran_out = str(error).partition("\n")[0] or type(error).__name__, _ran_out(error)
        if failure is not None:
            known.forget_graph()
            if ran_out:
                raise torch.OutOfMemoryError(failure)
            # An operation that cannot be captured: nothing has run yet.
            known.failures += 1
            self.log({"event": "warning", "message": f"no CUDA graph, a micro-batch goes launch by launch: {failure}"})
            self.optimizer.forget()
            return self._forward_backward(batch)
        self._pool = self._pool or graph.pool()
        known.graph, loss = graph, known.loss
        assert loss is not None
        graph.replay()
        if self._has_room(known):
            rows, length = batch.input_ids.shape
            self._decide(f"CUDA graph for micro-batches of {rows} x {length} tokens")
        else:
            known.forget_graph()
        self._captured.append(not known.dropped)
        known.dropped = False
        captures, looked_at = sum(self._captured), len(self._captured)
        if self.runs >= JUDGED_FROM and captures > TOO_MANY * looked_at:
            self._decide(f"no more CUDA graphs: of the last {looked_at} micro-batches {captures} had to be captured")
            self.give_up()
        return loss


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out while a graph was captured: the end of the capture then fails too, and is what is raised."""
    return error is not None and (is_out_of_memory(error) or _ran_out(error.__context__))


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
