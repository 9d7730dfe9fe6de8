"""CUDA graphs of micro-batches: what they copy, when they are made and dropped, and that a run does not notice them.

On the CPU a stand-in for CUDA's graphs runs the captured function at every replay; on a GPU the real ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.data.batches import few_lengths, make_batch
from tunesmith.models.fuse import engine_of
from tunesmith.training import graphs as module
from tunesmith.training import loop
from tunesmith.training.graphs import (
    FIRST_WARM_UPS,
    GraphedMicroBatches,
    Shape,
    copy_batch,
    copy_of,
    micro_batch_graphs,
)
from tunesmith.training.objectives import SupervisedFineTuning
from tunesmith.types import Batch, Event, TokenizedExample
from tunesmith.workflows.train import TrainingSession

Session = Callable[..., TrainingSession]

FUSED = "model.engine=fused"
SHORT = ("training.epochs=3", "optimizer.lr=1e-3", "training.log_every=1")
PACKED = ("data.packing=true",)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def example(length: int, seed: int = 0) -> TokenizedExample:
    rng = np.random.default_rng(seed)
    return TokenizedExample(rng.integers(3, 90, length, dtype=np.int32), np.ones(length, dtype=bool))


def batch_of(*lengths: int, packing: bool = True, seed: int = 0) -> Batch:
    examples = [example(length, seed + number) for number, length in enumerate(lengths)]
    return make_batch(examples, packing, 0, "cpu", few_lengths)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch and of its layout, whatever fields there are."""
    found = {}
    for owner in (batch, batch.layout):
        for each in fields(owner):
            value = getattr(owner, each.name)
            if isinstance(value, torch.Tensor) and (
                owner is not batch or each.name != "cu_seqlens"
            ):  # on the CPU, uncut
                found[each.name if owner is batch else f"layout.{each.name}"] = value
    return found


# -- shapes and copies ------------------------------------------------------------------------------------------------


def test_what_a_shape_is() -> None:
    assert Shape.of(batch_of(30, 20)) == Shape(rows=1, length=56, documents=16, longest=56, supervised=56)
    assert Shape.of(batch_of(20, 30, seed=5)) == Shape.of(batch_of(30, 20))
    assert Shape.of(batch_of(30, 20, packing=False)) == Shape(2, 32, 0, 32, 64)
    assert Shape.of(batch_of(128, 128)) == Shape(1, 256, 0, 128, 256), "documents of one length need no bounds"
    assert Shape.of(batch_of(30, 20)) != Shape.of(batch_of(30, 200))


@pytest.mark.parametrize("packing", [True, False])
def test_a_copy_is_its_own_and_takes_every_value(packing: bool) -> None:
    first, second = batch_of(30, 20, packing=packing), batch_of(21, 28, packing=packing, seed=7)
    assert Shape.of(first) == Shape.of(second)
    place = copy_of(first)
    before = {name: tensor.data_ptr() for name, tensor in tensors(place).items()}
    assert before.keys() == tensors(first).keys()
    assert before.keys() >= {"input_ids", "labels", "position_ids", "supervised", "supervised_labels"}
    assert ("layout.cu_seqlens" if packing else "attention_mask") in before
    assert set(before.values()).isdisjoint(tensor.data_ptr() for tensor in tensors(first).values())
    copy_batch(second, place)
    for name, tensor in tensors(place).items():
        assert torch.equal(tensor, tensors(second)[name]), name
        assert tensor.data_ptr() == before[name], name
    different = [name for name, tensor in tensors(second).items() if not torch.equal(tensor, tensors(first)[name])]
    assert "input_ids" in different
    assert ("layout.cu_seqlens" if packing else "attention_mask") in different


# -- where there are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "change", "expected"),
    [
        ((FUSED,), None, True),
        ((FUSED, "training.cuda_graphs=false"), None, False),
        ((FUSED, "adapter.dropout=0.1"), None, False),  # a mask is drawn on the CPU in every forward
        (("model.engine=reference",), None, False),
        ((FUSED,), "cpu", False),
        ((FUSED,), "no sinks", False),
        ((FUSED,), "dynamic", False),
        ((FUSED,), "longrope", False),
    ],
)
def test_where_a_run_has_graphs(
    session: Session, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], change: str | None, expected: bool
) -> None:
    run = session(*overrides)
    engine, optimizer = engine_of(run.forward.model), run.optimizer
    if change != "no sinks":
        optimizer.connect(engine)
    if engine is not None:  # on the CPU attention is PyTorch code, which a graph could not hold
        for layer in engine.decoder.layers:
            monkeypatch.setattr(type(layer.attention), "attends_in_kernels", True)
    if change in ("dynamic", "longrope"):
        run.forward.decoder.rotary_emb.rope_type = change
    run.forward.device = "cpu" if change == "cpu" else "cuda:0"
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = micro_batch_graphs(run.config, run.forward, SupervisedFineTuning(), optimizer, scaler, list)  # type: ignore[arg-type]
    assert isinstance(found, GraphedMicroBatches) == expected
    assert (found is None) != expected


# -- with a stand-in for CUDA's graphs --------------------------------------------------------------------------------


class StandIn:
    """A graph that runs what was captured again, and writes the loss to where it was."""

    captured: StandIn | None = None
    fails = False

    def replay(self) -> None:
        loss = self.run(self.batch)
        self.loss.copy_(loss)

    def pool(self) -> str:
        return "pool"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    own = GraphedMicroBatches._forward_backward

    @contextmanager
    def capture(graph: StandIn, pool: Any, stream: Any) -> Iterator[None]:
        if StandIn.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        StandIn.captured = graph
        yield
        StandIn.captured = None

    def forward_backward(self: GraphedMicroBatches, batch: Batch) -> torch.Tensor:
        graph = StandIn.captured
        if graph is None:
            return own(self, batch)
        graph.batch, graph.run, graph.loss = batch, lambda batch: own(self, batch), torch.full((), float("nan"))
        return graph.loss

    monkeypatch.setattr(GraphedMicroBatches, "_forward_backward", forward_backward)
    for name, value in {"CUDAGraph": StandIn, "graph": capture, "Stream": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(module, "PAYS_FROM", 0.0)
    yield StandIn
    StandIn.captured, StandIn.fails = None, False


class Runs:
    """A fused session whose micro-batches go through graphs; `log` and `graphs` are those of the run."""

    def __init__(self, session: TrainingSession, monkeypatch: pytest.MonkeyPatch):
        self.session, self.log, self.made = session, list[Event](), list[GraphedMicroBatches]()

        def graphs(config: Any, forward: Any, objective: Any, optimizer: Any, scaler: Any, log: Any) -> Any:
            self.made.append(GraphedMicroBatches(forward, objective, optimizer, scaler, self.log.append))
            return self.made[-1]

        monkeypatch.setattr(loop, "micro_batch_graphs", graphs)
        session.train()

    @property
    def captured(self) -> list[str]:
        return [event["message"] for event in self.log if event["event"] == "decision"]


def outcome(session: TrainingSession) -> tuple[list[float], dict[str, torch.Tensor]]:
    steps = [event for event in session.run.events() if event["event"] == "step"]
    model = session.forward.model
    return [event["loss"] for event in steps], {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_run(one: TrainingSession, other: TrainingSession, tolerance: float) -> None:
    losses, weights = outcome(one)
    expected_losses, expected = outcome(other)
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    assert len(losses) == 9
    for name, value in expected.items():
        assert (weights[name] - value).norm() <= 1e3 * tolerance * value.norm() + 1e-7, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_does_not_notice(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn], dtype: str
) -> None:
    """Two micro-batches a step, so gradients add up; several shapes; each captured once and replayed after.

    Padded rows: for packed ones PyTorch's attention on the CPU reads the lengths as Python numbers.
    """
    settings = (FUSED, *SHORT, f"model.dtype={dtype}")
    plain = session(*settings)
    plain.train()
    runs = Runs(session(*settings), monkeypatch)
    assert_same_run(runs.session, plain, 1e-6 if dtype == "fp32" else 1e-2)
    (graphs,) = runs.made
    assert graphs.runs == 18
    assert len(runs.captured) == len(set(runs.captured)) > 1
    assert all(message.startswith("CUDA graph for micro-batches of ") for message in runs.captured)
    assert sum(known.seen for known in graphs.known.values()) == 18
    assert [known.seen for known in graphs.known.values() if known.graph is None and known.seen > 3] == []


def test_what_cannot_be_captured_goes_launch_by_launch(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    stand_in.fails = True
    plain = session(FUSED, *SHORT)
    plain.train()
    runs = Runs(session(FUSED, *SHORT), monkeypatch)
    assert_same_run(runs.session, plain, 1e-6)
    warnings = [event["message"] for event in runs.log if event["event"] == "warning"]
    assert set(warnings) == {
        "no CUDA graph, micro-batches go launch by launch: operation not permitted when stream is capturing"
    }
    assert len(warnings) == len(
        {shape for shape, known in runs.made[0].known.items() if known.seen > 1 and not known.pays}
    )
    assert runs.captured == []


def test_nothing_is_captured_or_widened_where_it_does_not_pay(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    monkeypatch.setattr(module, "PAYS_FROM", 2.0)
    widths: list[int] = []
    own = loop.micro_batches

    def spy(*arguments: Any) -> Iterator[Batch]:
        for batch in own(*arguments):
            widths.append(batch.input_ids.shape[1] - batch.num_tokens)
            yield batch

    monkeypatch.setattr(loop, "micro_batches", spy)
    plain = session(FUSED, *SHORT, *PACKED)
    runs = Runs(session(FUSED, *SHORT, *PACKED), monkeypatch)
    (graphs,) = runs.made
    assert (runs.captured, graphs.pay) == ([], False)
    assert FIRST_WARM_UPS <= graphs.runs <= FIRST_WARM_UPS + 2, "then the run goes the way without graphs"
    assert any(widths[: graphs.runs])
    assert not any(widths[graphs.runs :])
    monkeypatch.setattr(loop, "micro_batch_graphs", lambda *_: None)
    plain.train()
    assert_same_run(runs.session, plain, 1e-6)


def test_the_graph_that_was_used_longest_ago_makes_room(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    monkeypatch.setattr(module, "MAX_GRAPHS", 2)
    run = session(FUSED)
    run.optimizer.connect(engine_of(run.forward.model))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    log: list[Event] = []
    graphs = GraphedMicroBatches(run.forward, SupervisedFineTuning(), run.optimizer, scaler, log.append)
    graphs.set_counts({"nll": 1})

    def go(length: int) -> None:
        graphs.run(batch_of(length))

    for length in (16, 16, 16, 16, 32, 32, 16, 48, 48):  # 16 is used again before 48 wants room
        go(length)
    held = {shape.length for shape, known in graphs.known.items() if known.graph is not None}
    assert held == {16, 48}
    assert [event["message"].split()[-2] for event in log] == ["16", "32", "48"]


def test_the_counts_of_a_step_reach_a_graph(session: Session, stand_in: type[StandIn]) -> None:
    run = session(FUSED)
    run.optimizer.connect(engine_of(run.forward.model))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    graphs = GraphedMicroBatches(run.forward, SupervisedFineTuning(), run.optimizer, scaler, list)  # type: ignore[arg-type]
    batch = batch_of(16)
    losses = []
    for count in (10, 10, 10, 10, 20, 5):
        graphs.set_counts({"nll": count})
        losses.append(graphs.run(batch).item() * count)
    assert graphs.known[Shape.of(batch)].graph is not None
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-6)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("ways", [(), PACKED], ids=["padded", "packed"])
def test_a_run_does_not_notice_real_graphs(session: Session, ways: tuple[str, ...], dtype: str) -> None:
    settings = (*SHORT, *ways, "model.device=cuda", f"model.dtype={dtype}", "training.epochs=6")
    found = []
    for graphs in (False, True):
        run = session(*settings, f"training.cuda_graphs={str(graphs).lower()}")
        assert run.plan.engine == "fused"
        run.train()
        found.append(run)
    plain, graphed = found
    messages = [event.get("message", "") for event in graphed.run.events()]
    captured = [message for message in messages if message.startswith("CUDA graph for micro-batches")]
    assert len(captured) == len(set(captured)) > 1
    tolerance = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}[dtype]
    assert outcome(graphed)[0] == pytest.approx(outcome(plain)[0], rel=tolerance)
    for name, value in outcome(plain)[1].items():
        assert (outcome(graphed)[1][name] - value).norm() < 0.1 * value.norm() + 1e-4, name


@needs_gpu
def test_real_graphs_with_layer_inputs_in_host_memory(session: Session) -> None:
    settings = (*SHORT, *PACKED, "model.device=cuda", "model.dtype=fp32", "training.epochs=6")
    kept, offloaded = (session(*settings, f"memory.mode={mode}") for mode in ("fast", "min"))
    for run in (kept, offloaded):
        run.train()
    assert offloaded.plan.policies[0].offload_input
    assert outcome(offloaded)[0] == pytest.approx(outcome(kept)[0], rel=1e-4)
