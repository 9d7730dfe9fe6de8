"""CUDA graphs of micro-batches: what they copy, when they are made and dropped, and that a run does not notice them.

On the CPU a stand-in for CUDA's graphs runs the captured function at every replay; on a GPU the real ones do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.data.batches import make_batch
from tunesmith.data.widening import few_lengths
from tunesmith.memory.replays import OUSTS, PAYS_FROM, WARM_UPS
from tunesmith.models.fuse import engine_of
from tunesmith.training import graphs as module
from tunesmith.training import loop
from tunesmith.training.graphs import (
    GraphedMicroBatches,
    copy_batch,
    copy_of,
    micro_batch_graphs,
    shape_of,
)
from tunesmith.training.loop import accumulate_gradients
from tunesmith.training.objectives import Objective, SupervisedFineTuning
from tunesmith.types import Batch, Event, Term, TokenizedExample
from tunesmith.workflows.train import TrainingSession

Session = Callable[..., TrainingSession]

FUSED = "model.engine=fused"
SHORT = ("training.epochs=3", "optimizer.lr=1e-3", "training.log_every=1")
PADDED, PACKED = ("data.packing=false",), ("data.packing=true",)
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


@pytest.mark.parametrize("packing", [True, False])
def test_a_copy_is_its_own_and_takes_every_value(packing: bool) -> None:
    first, second = batch_of(30, 20, packing=packing), batch_of(21, 28, packing=packing, seed=7)
    assert shape_of(first) == shape_of(second)
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
    captures = 0  # that went well
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
        StandIn.captures += 1

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
    StandIn.captured, StandIn.captures, StandIn.fails = None, 0, False


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
    assert len(runs.captured) == StandIn.captures < 18 - WARM_UPS, "some were replayed"


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
        "no CUDA graph, a micro-batch goes launch by launch: operation not permitted when stream is capturing"
    }
    known = runs.made[0].known.values()
    assert len(warnings) == sum(each.failures for each in known)
    assert max(each.failures for each in known) == module.MAX_FAILURES, "it is not tried for ever"
    assert any(each.seen > module.MAX_FAILURES + WARM_UPS for each in known)
    assert runs.captured == []


def test_nothing_is_captured_or_widened_where_it_does_not_pay(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    monkeypatch.setattr(module, "PAYS_FROM", 2.0)
    monkeypatch.setattr(module, "WARM_UPS", 2)
    widths: list[int] = []
    own = loop.micro_batches

    def spy(*arguments: Any, **options: Any) -> Iterator[Batch]:
        for batch in own(*arguments, **options):
            widths.append(batch.input_ids.shape[1] - batch.num_tokens)
            yield batch

    monkeypatch.setattr(loop, "micro_batches", spy)
    plain = session(FUSED, *SHORT, *PACKED)
    runs = Runs(session(FUSED, *SHORT, *PACKED), monkeypatch)
    (graphs,) = runs.made
    (message,) = runs.captured
    assert message.startswith("no CUDA graphs: launching takes ")
    assert (StandIn.captures, graphs.pay) == (0, False)
    assert graphs.runs == 2, "one step of two micro-batches; then the run goes the way without graphs"
    assert any(widths[: graphs.runs])
    assert not any(widths[graphs.runs :])
    monkeypatch.setattr(loop, "micro_batch_graphs", lambda *_: None)
    plain.train()
    assert_same_run(runs.session, plain, 1e-6)


def test_a_shape_that_comes_far_more_often_takes_the_place_of_another(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    """Where there is no room a shape is captured, replayed once and let go of: nothing runs launch by launch beside graphs."""
    monkeypatch.setattr(module, "MAX_GRAPHS", 2)
    log: list[Event] = []
    graphs = warm(graphs_of(session(FUSED), log))

    def go(length: int, times: int) -> int:
        """Captures that it took."""
        before = StandIn.captures
        for _ in range(times):
            assert graphs.run(batch_of(length)).isfinite()
        return StandIn.captures - before

    def held() -> set[int]:
        return {shape.length for shape, known in graphs.known.items() if known.graph is not None}

    assert [go(16, 10), go(32, 6)] == [1, 1]
    assert held() == {16, 32}
    assert go(48, OUSTS * 6) == OUSTS * 6
    assert held() == {16, 32}, "no more than OUSTS times as often as 32"
    assert [go(48, 1), go(48, 5)] == [1, 0]
    assert held() == {16, 48}
    assert go(32, 1) == 1
    assert held() == {16, 48}, "its count is kept, and is less than that of the others"
    go(32, OUSTS * 10 - 6)
    assert held() == {32, 48}, "16 was seen 10 times"
    assert [event["message"].split()[-2] for event in log] == ["16", "32", "48", "32"]


def test_graphs_are_given_up_where_most_shapes_do_not_come_again(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    """Judged from the twentieth micro-batch on, by the last eight: more than half of them had to be captured."""
    monkeypatch.setattr(module, "JUDGED_FROM", 20)
    monkeypatch.setattr(module, "TOO_MANY", 0.5)
    log: list[Event] = []
    graphs = graphs_of(session(FUSED), log)
    graphs._captured = deque(maxlen=8)
    warm(graphs)

    def go(*lengths: int) -> int:
        before = StandIn.captures
        for length in lengths:
            graphs.run(batch_of(length, packing=False))
        return StandIn.captures - before

    new = iter([*range(8, 128, 8), *range(128, 256, 16), *range(256, 512, 32)])
    assert go(*[next(new) for _ in range(12)]) == 12, "all are new as a run begins"
    assert go(8, 16, 24, 32, next(new), next(new), next(new), next(new)) == 4
    assert (graphs.runs, graphs.pay) == (WARM_UPS + 20, True), "four of eight are no more than half"
    assert graphs.drop()
    assert go(8, 16, 24, 32, 8, 16, 24, 32) == 4
    assert graphs.pay, "they had graphs, and were dropped"
    assert go(8, next(new), 16, next(new), next(new), 24, next(new), next(new)) == 5
    assert log[-1]["message"] == "no more CUDA graphs: of the last 8 micro-batches 5 had to be captured"
    assert not graphs.pay
    assert all(known.graph is None for known in graphs.known.values())
    assert go(8, 16) == 0


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
    assert graphs.known[shape_of(batch)].graph is not None
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-6)


# -- when a shape is captured, and what that needs --------------------------------------------------------------------


def graphs_of(
    run: TrainingSession, log: list[Event], objective: Any = None, scaler: torch.amp.GradScaler | None = None
) -> GraphedMicroBatches:
    run.optimizer.connect(engine_of(run.forward.model))
    return GraphedMicroBatches(
        run.forward,
        objective or SupervisedFineTuning(),
        run.optimizer,
        scaler or torch.amp.GradScaler("cpu", enabled=False),
        log.append,
    )


def warm(graphs: GraphedMicroBatches) -> GraphedMicroBatches:
    """Past its warm-ups, with a shape that does not come again."""
    graphs.set_counts({"nll": 1})
    for _ in range(WARM_UPS):
        graphs.run(batch_of(8, 8, 8, packing=False))
    return graphs


@pytest.mark.parametrize(
    ("rope_type", "by_length"),
    [
        ("default", False),
        ("llama3", False),
        ("yarn", False),
        ("dynamic", True),
        ("longrope", True),
        ({"full_attention": "linear", "sliding_attention": "default"}, False),
        ({"full_attention": "longrope", "sliding_attention": "default"}, True),
        (None, False),
    ],
)
def test_rotations_that_depend_on_the_longest_position(rope_type: Any, by_length: bool) -> None:
    embedding = None if rope_type is None else SimpleNamespace(rope_type=rope_type)
    forward: Any = SimpleNamespace(decoder=SimpleNamespace(rotary_emb=embedding))
    assert module._rotates_by_length(forward) == by_length


def test_a_shape_is_captured_when_it_first_comes_after_the_warm_ups(session: Session, stand_in: type[StandIn]) -> None:
    graphs = graphs_of(session(FUSED), [])
    graphs.set_counts({"nll": 1})
    captures = []
    for length in (16, 32, 16, 16, 16, 48, 32, 32, 48):
        graphs.run(batch_of(length))
        captures.append(StandIn.captures)
    assert WARM_UPS == 3
    assert captures == [0, 0, 0, 1, 1, 2, 3, 3, 3]


def test_a_shape_that_failed_once_is_tried_again(session: Session, stand_in: type[StandIn]) -> None:
    """It has run launch by launch since: what a capture may not load or pin is there."""
    log: list[Event] = []
    graphs = warm(graphs_of(session(FUSED), log))
    stand_in.fails = True
    losses = [float(graphs.run(batch_of(16)))]
    stand_in.fails = False
    losses += [float(graphs.run(batch_of(16))) for _ in range(2)]
    assert StandIn.captures == 1
    assert graphs.known[shape_of(batch_of(16))].graph is not None
    assert [event["event"] for event in log] == ["warning", "decision"]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_dropped_graphs_are_captured_again(session: Session, stand_in: type[StandIn]) -> None:
    graphs = warm(graphs_of(session(FUSED), []))
    assert not graphs.drop()
    graphs.run(batch_of(16))
    assert graphs._pool == "pool"
    assert graphs.drop()
    assert graphs._pool is None, "its memory is given back"
    assert graphs.known[shape_of(batch_of(16))].batch is None
    assert graphs.pay
    graphs.run(batch_of(16))
    graphs.run(batch_of(16))
    assert StandIn.captures == 2
    graphs.give_up()
    assert not graphs.pay


class Clock:
    """Launching a micro-batch takes `share` of a second, and the GPU a second for each of its 64 tokens."""

    def __init__(self, graphs: GraphedMicroBatches, monkeypatch: pytest.MonkeyPatch, launching: float):
        self.now, self.done, self.launching, self.waits = 0.0, 7.0, launching, 0
        monkeypatch.setattr(graphs, "_forward_backward", self.launch)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(module, "PAYS_FROM", PAYS_FROM)

    def launch(self, batch: Batch) -> torch.Tensor:
        self.done = max(self.now, self.done) + batch.input_ids.numel() / 64
        self.now += self.launching
        return torch.zeros(())

    def synchronize(self, device: Any) -> None:
        self.now = max(self.now, self.done)
        self.waits += 1


@pytest.mark.parametrize(("share", "pays"), [(PAYS_FROM - 0.01, False), (PAYS_FROM + 0.01, True)])
def test_graphs_pay_from_a_share_of_launching(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn], share: float, pays: bool
) -> None:
    """All warm-ups but the first are timed: the GPU is idle before each, and is waited for. The least share counts."""
    log: list[Event] = []
    graphs = graphs_of(session(FUSED), log)
    clock = Clock(graphs, monkeypatch, 5.0)
    graphs.run(batch_of(64))
    for length, launching in ((64, share), (128, 5.0)):  # of a second; then a kernel is compiled
        assert graphs.pay
        clock.launching = launching
        graphs.run(batch_of(length))
    assert clock.waits == 2 * WARM_UPS
    assert graphs.pay == pays
    said = [f"no CUDA graphs: launching takes {share:.0%} of a micro-batch's time, and need not be saved"]
    assert [event["message"] for event in log] == ([] if pays else said)


def test_graphs_share_memory_and_begin_with_what_is_free(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    calls: list[Any] = []
    capture = torch.cuda.graph

    def noted(graph: StandIn, pool: Any, stream: Any) -> Any:
        calls.append((pool, stream))
        graph.pool = lambda number=len(calls): f"pool {number}"  # type: ignore[method-assign,misc]
        return capture(graph, pool, stream)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "graph", noted)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream on {device}")
    graphs = graphs_of(session(FUSED), [])
    graphs.set_counts({"nll": 1})
    for _ in range(WARM_UPS):
        graphs.run(batch_of(16))
    for owner, name in (
        (torch.cuda, "synchronize"),
        (torch._C, "_cuda_clearCublasWorkspaces"),
        (torch.cuda, "empty_cache"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name: calls.append(name), raising=False)
    emptied = ["synchronize", "_cuda_clearCublasWorkspaces", "empty_cache"]
    for length, pool in ((16, None), (32, "pool 4"), (48, "pool 4")):
        graphs.run(batch_of(length))
        assert calls == [*emptied, (pool, "stream on cpu")]
        calls.clear()
        graphs.run(batch_of(length))
        assert calls == []


class TwoTerms(Objective):
    """The usual loss, and a quarter of it again by a count of its own."""

    inner = SupervisedFineTuning()

    def counts(self, examples: Iterable[TokenizedExample]) -> dict[str, int]:
        examples = list(examples)
        return {**self.inner.counts(examples), "rows": len(examples)}

    def terms(self, forward: Any, batch: Batch) -> list[Term]:
        (term,) = self.inner.terms(forward, batch)
        return [term, Term("rows", 3 * term.sum, batch.num_examples, weight=0.25)]


def gradients_of(run: TrainingSession) -> torch.Tensor:
    """All gradients, those not collected yet too; and none afterwards."""
    run.optimizer.collect()
    (flat,) = run.optimizer.flats
    assert flat.value.grad is not None
    found = flat.value.grad.clone()
    run.optimizer.zero_grad()
    return found


STEPS = [[(16, 12), (30, 30)], [(14, 10), (31, 25)], [(15, 16), (28, 32)], [(16, 9), (32, 20)], [(12, 16), (29, 31)]]
"""Lengths of the examples of each micro-batch: two shapes of padded rows, with other values in each step."""


def two_ways(
    run: TrainingSession, graphs: GraphedMicroBatches, objective: Any, scaler: torch.amp.GradScaler, packing: bool
) -> None:
    """Losses and gradients of STEPS with `graphs` are those without."""
    for number, parts in enumerate(STEPS):
        examples = [[example(length, 10 * number + length) for length in part] for part in parts]
        arguments = (run.forward, objective, examples, packing, 0, scaler)
        expected_loss = float(accumulate_gradients(*arguments))
        expected = gradients_of(run)
        loss = float(accumulate_gradients(*arguments, graphs))
        found = gradients_of(run)
        assert loss == pytest.approx(expected_loss, rel=1e-6), number
        assert expected.norm() > 0
        assert (found - expected).norm() < 1e-6 * expected.norm(), number


def test_weights_counts_and_a_scaler_are_those_of_a_run_without(session: Session, stand_in: type[StandIn]) -> None:
    run, log, objective = session(FUSED), list[Event](), TwoTerms()
    with torch.no_grad():  # at its zero, A has no gradient
        for name, parameter in run.forward.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=256.0)
    two_ways(run, graphs_of(run, log, objective, scaler), objective, scaler, False)
    assert [event["message"] for event in log] == [
        "CUDA graph for micro-batches of 2 x 32 tokens",
        "CUDA graph for micro-batches of 2 x 16 tokens",
    ]


class Spying(Objective):
    """The usual loss, and the sum of one of the adapter's tensors, whose gradient comes from autograd itself."""

    inner = SupervisedFineTuning()

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.autocast: list[bool] = []

    def counts(self, examples: Iterable[TokenizedExample]) -> dict[str, int]:
        return self.inner.counts(examples)

    def terms(self, forward: Any, batch: Batch) -> list[Term]:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return [*self.inner.terms(forward, batch), Term("nll", self.tensor.float().sum(), 1)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_graph_holds_besides_the_layers(session: Session, stand_in: type[StandIn], dtype: str) -> None:
    """The run's precision, the counts where `set_counts` writes them, and what moves gradients to the optimizer."""
    run = session(FUSED, f"model.dtype={dtype}")
    tensor = next(p for name, p in run.forward.model.named_parameters() if "lora_A" in name)
    objective = Spying(tensor)
    graphs = graphs_of(run, [], objective)
    places = set()
    for count in (2, 4, 8, 8, 8):
        graphs.set_counts({"nll": count})
        places.add(graphs._inverse["nll"].data_ptr())
        graphs.run(batch_of(16))
        assert tensor.grad is None, "it is where the optimizer reads it"
    assert len(places) == 1
    assert objective.autocast == [dtype == "bf16"] * 5
    (flat,) = run.optimizer.flats
    # Its B is zero, so that the loss gives it no gradient.
    assert flat.gradient_views()[id(tensor)].unique().tolist() == [1 / 2 + 1 / 4 + 3 / 8]


def test_a_captured_batch_is_not_the_callers(session: Session, stand_in: type[StandIn]) -> None:
    """A replay must not write to a batch that somebody else holds."""
    graphs = graphs_of(session(FUSED), [])
    graphs.set_counts({"nll": 1})
    first = batch_of(16)
    before = {name: tensor.clone() for name, tensor in tensors(first).items()}
    for batch in (first, first, first, first, batch_of(16, seed=5)):
        graphs.run(batch)
    assert graphs.known[shape_of(first)].graph is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(first).items())


@pytest.mark.parametrize("reason", ["CUDA out of memory. Tried to allocate 2 GiB", "operation not permitted", ""])
def test_a_capture_that_breaks_off_in_its_backward(
    session: Session, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn], reason: str
) -> None:
    """What was captured never ran: the gradients it left behind are whatever was in that memory.

    Memory that ran out is for training/recovery.py to find; the end of the capture fails of it, too, and is what is raised.
    """
    run, log = session(FUSED), list[Event]()
    graphs = warm(graphs_of(run, log))
    run.optimizer.zero_grad()
    graphs.set_counts({"nll": 10})
    batch = batch_of(16)
    ran_out = "out of memory" in reason

    @contextmanager
    def breaks_off(graph: StandIn, pool: Any, stream: Any) -> Iterator[None]:
        StandIn.captured = graph
        yield
        StandIn.captured = None
        for flat in run.optimizer.flats:
            for tensor in flat.tensors:
                tensor.grad = torch.full_like(tensor, float("nan"))
        try:
            raise torch.OutOfMemoryError(f"{reason}\nmore") if ran_out else RuntimeError(f"{reason}\nmore")
        finally:
            raise RuntimeError(f"{reason}: capture failed\nmore" if reason else "")

    monkeypatch.setattr(torch.cuda, "graph", breaks_off)
    if ran_out:
        with pytest.raises(torch.OutOfMemoryError, match=reason):
            graphs.run(batch)
        known = graphs.known[shape_of(batch)]
        assert (known.batch, known.loss, known.graph) == (None, None, None), "what it held is given back"
        run.optimizer.abandon(graphs.scaler)
        graphs.give_up()
    losses, gradients = [], []
    for _ in range(4):
        losses.append(float(graphs.run(batch)))
        gradients.append(gradients_of(run))
    assert losses == [losses[0]] * 4
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert gradients[0].isfinite().all()
    said = f"no CUDA graph, a micro-batch goes launch by launch: {(reason and f'{reason}: capture failed') or 'RuntimeError'}"
    assert [event["message"] for event in log] == ([] if ran_out else [said] * module.MAX_FAILURES)
    if not ran_out:
        known = graphs.known[shape_of(batch)]
        assert (known.failures, known.batch, known.loss, known.graph) == (module.MAX_FAILURES, None, None, None)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("ways", [PADDED, PACKED], ids=["padded", "packed"])
def test_a_run_does_not_notice_real_graphs(session: Session, ways: tuple[str, ...], dtype: str) -> None:
    settings = (*SHORT, *ways, "model.device=cuda", f"model.dtype={dtype}", "training.epochs=12")
    found = []
    for graphs in (False, True):
        run = session(*settings, f"training.cuda_graphs={str(graphs).lower()}")
        assert run.plan.memory.engine == "fused"
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
@pytest.mark.parametrize("why", ["not permitted", "out of memory"])
def test_a_real_capture_that_fails_leaves_nothing_behind(
    session: Session, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """The stream is the one of before, memory can be given back, and the shape is captured when it comes again."""
    run = session(FUSED, "model.device=cuda", "model.dtype=fp32")
    graphs = warm_on_gpu(run)
    batch = make_batch([example(64)], True, 0, run.forward.device, few_lengths)
    own, before = GraphedMicroBatches._forward_backward, torch.cuda.current_stream()

    def fails(self: GraphedMicroBatches, batch: Batch) -> torch.Tensor:
        loss = own(self, batch)
        if torch.cuda.is_current_stream_capturing():
            if why == "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            loss.cpu()
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(GraphedMicroBatches, "_forward_backward", fails)
        if why == "out of memory":
            with pytest.raises(torch.OutOfMemoryError):
                graphs.run(batch)
            run.optimizer.abandon(graphs.scaler)
        else:
            graphs.run(batch)
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    losses = [float(graphs.run(batch)) for _ in range(3)]
    assert graphs.known[shape_of(batch)].graph is not None
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def warm_on_gpu(run: TrainingSession) -> GraphedMicroBatches:
    """Past its warm-ups, with real graphs."""
    graphs = graphs_of(run, [])
    graphs.set_counts({"nll": 1})
    for _ in range(WARM_UPS):
        graphs.run(make_batch([example(32)], True, 0, run.forward.device, few_lengths))
    graphs.pay = True
    return graphs


@needs_gpu
def test_real_graphs_with_layer_inputs_in_host_memory(session: Session) -> None:
    settings = (*SHORT, *PACKED, "model.device=cuda", "model.dtype=fp32", "training.epochs=6")
    kept, offloaded = (session(*settings, f"memory.mode={mode}") for mode in ("fast", "min"))
    for run in (kept, offloaded):
        run.train()
    assert offloaded.plan.memory.policies[0].offload_input
    assert outcome(offloaded)[0] == pytest.approx(outcome(kept)[0], rel=1e-4)


@needs_gpu
@pytest.mark.parametrize("ways", [PADDED, PACKED], ids=["padded", "packed"])
def test_real_graphs_change_nothing_that_widening_does_not(
    session: Session, monkeypatch: pytest.MonkeyPatch, ways: tuple[str, ...]
) -> None:
    """The same widened micro-batches, once with graphs and once launch by launch, so that the kernels are the same too."""
    settings = (
        *SHORT,
        *ways,
        "model.device=cuda",
        "model.dtype=fp32",
        "training.micro_batch_size=2",
        "training.max_steps=15",
        "training.epochs=6",
    )
    monkeypatch.setattr(module, "PAYS_FROM", 0.0)
    graphed, plain = session(*settings), session(*settings)
    graphed.train()
    own = GraphedMicroBatches._forward_backward
    monkeypatch.setattr(GraphedMicroBatches, "_capture", lambda self, batch, known: own(self, batch))
    plain.train()
    messages = [[event.get("message", "") for event in run.run.events()] for run in (graphed, plain)]
    captured = [[text for text in each if text.startswith("CUDA graph for micro-batches")] for each in messages]
    assert len(captured[0]) > 1
    assert captured[1] == []
    assert len(outcome(plain)[0]) == 15
    assert outcome(graphed)[0] == pytest.approx(outcome(plain)[0], rel=1e-6)
    for name, value in outcome(plain)[1].items():
        assert (outcome(graphed)[1][name] - value).norm() <= 1e-6 * value.norm(), name
