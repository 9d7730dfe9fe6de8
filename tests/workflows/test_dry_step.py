"""The dry step: it leaves nothing behind, takes the largest micro-batch there is, and corrects the plan. The GPU is pretended."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config import RunConfig, load_config
from tunesmith.data.batches import StepOrder, largest_micro_batch, make_batch
from tunesmith.data.widening import few_lengths
from tunesmith.hardware import Hardware, probe
from tunesmith.memory.policy import HEADROOM, TIGHT_LOSS_ROWS
from tunesmith.models.adapters import add_adapter, keep_trainable_in_fp32
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import FusedLayer
from tunesmith.models.load import find_model, load_model
from tunesmith.training.objectives import SupervisedFineTuning
from tunesmith.training.optimizers import make_optimizer
from tunesmith.training.preferences import objective_of
from tunesmith.training.prepare import prepare
from tunesmith.types import GB, Batch, LayerPolicy, Term, TokenizedExample, TokenizedPair
from tunesmith.workflows import dry_step, run_plan
from tunesmith.workflows.dry_step import DryStep, _largest, calibrated
from tunesmith.workflows.run_plan import RunPlan, plan_run

CPU = Hardware("cpu", "a CPU", 64.0, False)
H100 = Hardware("cuda:0", "NVIDIA H100 80GB HBM3", 79.18, True, (9, 0))
PAD = 258


@dataclass
class Cuda:
    """What PyTorch says of a card that is not here. `peaks` are the peaks that it measures, one after the other, in GB."""

    peaks: list[float] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()

    def note(name: str, answer: Callable[[], Any] = lambda: None) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found.calls.append(name)
            if name == "set_rng_state_all":
                found.states += arguments
            return answer()

        return call

    answers: dict[str, Callable[[], Any]] = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "synchronize": lambda: None,
        "get_rng_state_all": lambda: ["the card's generators"],
        "set_rng_state_all": lambda: None,
        "max_memory_allocated": lambda: int(found.peaks.pop(0) * GB),
        "mem_get_info": lambda: (79 * GB, 80 * GB),
        "memory_reserved": lambda: 0,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, note(name, answer))
    monkeypatch.setattr(dry_step, "release_memory", note("release_memory"))
    monkeypatch.setattr(run_plan, "no_fused_engine", lambda hardware: None)
    monkeypatch.setattr(run_plan, "host_factor", lambda device: 1.0)
    return found


class Watched(SupervisedFineTuning):
    """The objective, with the batches it sees. `fails` is what it raises instead of an answer to the n-th batch."""

    def __init__(self, calls: list[str], fails: dict[int, Exception] | None = None):
        self.calls, self.fails = calls, fails or {}
        self.batches: list[Batch] = []
        self.training: list[bool] = []

    def terms(self, forward: ModelForward, batch: Batch) -> list[Term]:
        self.calls.append("forward")
        self.batches.append(batch)
        self.training.append(forward.model.training)
        if (error := self.fails.pop(len(self.batches), None)) is not None:
            raise error
        return super().terms(forward, batch)


def examples_of(*lengths: int) -> list[TokenizedExample]:
    rng = np.random.default_rng(0)
    return [
        TokenizedExample(rng.integers(0, 256, length, dtype=np.int32), np.arange(length) >= length // 2, line=line)
        for line, length in enumerate(lengths)
    ]


EXAMPLES = examples_of(40, 12, 30, 9, 25, 40, 31, 8)


@dataclass
class Made:
    config: RunConfig
    plan: RunPlan
    step: DryStep
    objective: Watched

    @property
    def model(self) -> Any:
        return self.step.forward.model

    @property
    def layers(self) -> Any:
        return self.step.forward.decoder.layers


@pytest.fixture
def make(tiny_model: Path, cuda: Cuda) -> Callable[..., Made]:
    """`make("adapter.r=4")`: a run that is ready for its dry step, as workflows/train.py builds it."""

    def build(
        *settings: str,
        examples: Sequence[TokenizedExample] = EXAMPLES,
        hardware: Hardware = H100,
        fails: dict[int, Exception] | None = None,
    ) -> Made:
        config = load_config(None, settings, {"model.name": str(tiny_model), "model.dtype": "fp32"})
        torch.manual_seed(0)
        model = load_model(find_model(config.model), config.model, probe("cpu"), "fp32")
        if config.method == "full":
            keep_trainable_in_fp32(model)
        else:
            model = add_adapter(model, config.adapter, "base")
        forward = ModelForward(model, "cpu", "fp32")
        plan = plan_run(config, forward, hardware, examples)
        forward.loss_rows = plan.memory.loss_rows
        prepare(model, plan.memory, torch.float32)
        optimizer = make_optimizer(model, config.optimizer, 1e-2)
        objective = Watched(cuda.calls, fails)
        step = DryStep(config, forward, objective, optimizer, hardware, examples, PAD)
        cuda.calls.clear()
        return Made(config, plan, step, objective)

    return build


# -- a step is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"), [((), 1), (("training.micro_batch_size=4",), 2), (("training.micro_batch_size=1",), 2)]
)
def test_the_peak_is_of_a_forward_and_backward(
    make: Callable[..., Made], cuda: Cuda, settings: tuple[str, ...], steps: int
) -> None:
    """Of two, where a step has several micro-batches: the gradients of the first wait while the second one runs."""
    made = make(*settings)
    cuda.peaks = [3.25]
    assert made.step.measure(made.plan) == 3.25
    assert cuda.calls == [
        "release_memory",
        "reset_peak_memory_stats",
        "get_rng_state_all",
        *["forward"] * steps,
        "synchronize",
        "max_memory_allocated",
        "set_rng_state_all",
        "empty_cache",
    ]
    assert made.objective.training == [True] * steps


def test_the_optimizers_states_are_there_while_it_is_measured(make: Callable[..., Made], cuda: Cuda) -> None:
    made = make()
    assert made.step.optimizer.state_dict()["state"] == {}
    cuda.peaks = [1.0]
    made.step.measure(made.plan)
    (state,) = made.step.optimizer.state_dict()["state"].values()
    assert state["step"] == 0
    assert (state["exp_avg"].count_nonzero(), state["exp_avg_sq"].count_nonzero()) == (0, 0)


def test_paged_states_count_as_if_they_lay_on_the_gpu(
    make: Callable[..., Made], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    monkeypatch.setattr(type(made.step.optimizer), "paged_bytes", GB // 2)
    cuda.peaks = [1.0]
    assert made.step.measure(made.plan) == 1.5


# -- nothing stays ----------------------------------------------------------------------------------------------------

WAYS = [
    ("adapter.dropout=0.5",),
    ("adapter.dropout=0.5", "model.engine=reference"),
    ("method=full",),
    ("method=full", "model.engine=reference"),
    ("data.packing=true", "data.max_seq_length=auto", "adapter.dropout=0.5"),
]


@pytest.mark.parametrize("settings", WAYS)
@pytest.mark.parametrize("fails", [None, {2: torch.OutOfMemoryError("CUDA out of memory")}])
def test_nothing_of_it_stays(
    make: Callable[..., Made], cuda: Cuda, settings: tuple[str, ...], fails: dict[int, Exception] | None
) -> None:
    made = make(
        *settings,
        "training.micro_batch_size=2" if "data.packing=true" not in settings else "training.epochs=1",
        fails=dict(fails or {}),
    )
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    generator = torch.get_rng_state()
    made.model.eval()
    cuda.peaks = [1.0]
    found = made.step.measure(made.plan)
    assert found == (1.0 if len(made.objective.batches) < 2 or not fails else None)
    assert torch.equal(torch.get_rng_state(), generator)
    assert cuda.states == [["the card's generators"]]
    assert not made.model.training
    assert set(made.objective.training) == {True}
    after = made.model.state_dict()
    assert list(after) == list(before)
    assert [name for name, tensor in after.items() if not torch.equal(tensor, before[name])] == []
    assert [name for name, each in made.model.named_parameters() if each.grad is not None] == []
    optimizer = made.step.optimizer
    assert [each.grad for each in optimizer.parameters] == [None] * len(optimizer.parameters)
    assert len(optimizer.flats) == (0 if "method=full" in settings else 1)
    assert [flat.reached for flat in optimizer.flats] == [set()] * len(optimizer.flats)


def test_the_generator_is_used_and_put_back(make: Callable[..., Made], cuda: Cuda) -> None:
    """Otherwise the test above would see nothing: dropout draws from it."""
    made = make("adapter.dropout=0.5", "model.engine=reference")
    generator = torch.get_rng_state()
    made.step._forward_backward(False)
    assert not torch.equal(torch.get_rng_state(), generator)
    assert made.step.optimizer.flats[0].reached


@pytest.mark.parametrize("settings", WAYS)
def test_training_goes_on_as_if_it_had_not_been(
    make: Callable[..., Made], cuda: Cuda, settings: tuple[str, ...]
) -> None:
    """A real step after it moves the weights to the same bits."""

    def after_a_step(dry: bool) -> dict[str, torch.Tensor]:
        made = make(*settings)
        if dry:
            cuda.peaks = [1.0]
            made.step.measure(made.plan)
        torch.manual_seed(1)
        made.model.train()
        made.step._forward_backward(False)
        made.step.optimizer.step(torch.amp.GradScaler("cpu", enabled=False), 1.0)
        found: dict[str, torch.Tensor] = made.model.state_dict()
        return found

    without, with_one = after_a_step(False), after_a_step(True)
    assert [name for name, tensor in without.items() if not torch.equal(tensor, with_one[name])] == []


def test_running_out_of_memory_is_an_answer(make: Callable[..., Made], cuda: Cuda) -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 7 bytes")):
        made = make(fails={1: error})
        assert made.step.measure(made.plan) is None
        assert cuda.calls[-2:] == ["set_rng_state_all", "empty_cache"]
        cuda.peaks = [2.0]
        assert made.step.measure(made.plan) == 2.0  # and the next one is measured as ever


def test_another_error_is_none(make: Callable[..., Made], cuda: Cuda) -> None:
    made = make(fails={1: RuntimeError("an index is out of bounds")})
    generator = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"^an index is out of bounds$"):
        made.step.measure(made.plan)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [flat.reached for flat in made.step.optimizer.flats] == [set()]


# -- on the largest micro-batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shape", "lengths"),
    [
        # The rows of a micro-batch, each as long as the longest: 40, which graphs see again as it is.
        (("training.micro_batch_size=3", "data.packing=false"), (3, 40), [40, 40, 31]),
        (("training.micro_batch_size=3", "data.packing=false", "training.cuda_graphs=false"), (3, 40), [40, 40, 31]),
        (("training.micro_batch_size=1", "data.packing=true"), (1, 40), [40]),
        (("training.micro_batch_size=2", "data.packing=true"), (1, 80), [40, 40]),
        # In a run that is long enough for graphs.
        (("training.micro_batch_size=3", "data.packing=true", "training.epochs=1000"), (1, 112), [40, 40, 31]),
        (("training.micro_batch_size=3", "data.packing=true", "model.engine=reference"), (1, 111), [40, 40, 31]),
    ],
)
def test_the_largest_micro_batch_by_examples(
    make: Callable[..., Made], cuda: Cuda, settings: tuple[str, ...], shape: tuple[int, int], lengths: list[int]
) -> None:
    made = make(*settings)
    cuda.peaks = [1.0]
    made.step.measure(made.plan)
    for batch in made.objective.batches:
        assert tuple(batch.input_ids.shape) == shape
        assert batch.cu_seqlens.diff().tolist() == lengths
    assert made.plan.choice.candidate.largest.tokens == shape[0] * shape[1]


TOKENS = ("data.packing=true", "data.max_seq_length=64", "training.micro_batch_tokens=100")


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        # A part of an example fills what whole ones leave.
        (TOKENS, [40, 40, 20]),
        ((*TOKENS, "training.batch_size=2"), [40, 40]),
        ((*TOKENS, "training.batch_tokens=200"), [40, 40, 20]),
        (("data.packing=true", "data.max_seq_length=64", "training.micro_batch_tokens=80"), [40, 40]),
        (
            ("data.packing=true", "data.max_seq_length=64", "training.micro_batch_tokens=4096"),
            [40, 40, 31, 30, 25, 12, 9, 8],
        ),
    ],
)
def test_the_largest_micro_batch_by_tokens(
    make: Callable[..., Made], cuda: Cuda, settings: tuple[str, ...], lengths: list[int]
) -> None:
    made = make(*settings)
    cuda.peaks = [1.0]
    made.step.measure(made.plan)
    (batch, *_) = made.objective.batches
    assert batch.cu_seqlens.diff().tolist() == lengths
    assert batch.input_ids.shape == (1, few_lengths(sum(lengths)))
    assert made.plan.choice.candidate.largest.tokens == few_lengths(sum(lengths))


def test_a_part_of_an_example_is_its_answer(make: Callable[..., Made]) -> None:
    examples = examples_of(40, 40, 31)
    *_, part = _largest(examples, make(*TOKENS, examples=examples).config)
    assert part.input_ids.tolist() == examples[2].input_ids[-20:].tolist()
    assert part.loss_mask.tolist() == examples[2].loss_mask[-20:].tolist()


def slots_of(examples: Sequence[TokenizedExample], packing: bool) -> int:
    return make_batch(examples, packing, PAD, "cpu").input_ids.numel()


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=40),
    batch=st.integers(1, 12),
    micro=st.integers(1, 12),
    way=st.sampled_from(["padded", "packed", "tokens", "steps of tokens"]),
    budget=st.integers(64, 200),
    seed=st.integers(0, 3),
)
def test_no_micro_batch_of_a_whole_run_has_more_slots(
    lengths: list[int], batch: int, micro: int, way: str, budget: int, seed: int
) -> None:
    settings = [f"data.packing={str(way != 'padded').lower()}", f"training.seed={seed}", "data.max_seq_length=64"]
    if way in ("padded", "packed"):
        settings += [f"training.batch_size={batch}", f"training.micro_batch_size={min(micro, batch)}"]
    else:
        settings += [f"training.micro_batch_tokens={budget}"]
        settings += [f"training.batch_size={batch}" if way == "tokens" else f"training.batch_tokens={3 * budget}"]
    config = load_config(None, settings)
    examples = examples_of(*lengths)
    found = slots_of(_largest(examples, config), config.data.packing)
    assert found == largest_micro_batch(lengths, config.training, config.data.packing)
    order = StepOrder(lengths, config.training, config.data.packing)
    for step in range(3 * order.steps_per_epoch):
        for part in order.step(step):
            assert slots_of([examples[index] for index in part], config.data.packing) <= found


def test_a_budget_that_only_two_smaller_ones_fill() -> None:
    """Six fits into ten and leaves no room for a five; two fives fill it, and some epoch may pack them together."""
    settings = ["data.packing=true", "data.max_seq_length=8", "training.micro_batch_tokens=10"]
    assert [len(part) for part in _largest(examples_of(5, 6, 5), load_config(None, settings))] == [6, 4]


# -- the plan is corrected --------------------------------------------------------------------------------------------

LONG = examples_of(*[300] * 8)


@contextmanager
def a_tight_budget(make: Callable[..., Made], *settings: str) -> Iterator[tuple[Made, float]]:
    """A run whose plan keeps everything and fills what it may; and the peak that it predicts."""
    one = ("training.micro_batch_size=4", "training.cuda_graphs=false", *settings)
    free = make(*one, examples=LONG)
    predicted = free.plan.memory.predicted_peak_gb or 0.0
    made = make(*one, f"memory.limit_gb={1.0001 * predicted / HEADROOM}", examples=LONG)
    assert made.plan.memory.recompute_layers == 0
    assert made.plan.choice.fits
    yield made, predicted


def message(measured: str, predicted: float, now: RunPlan | None = None) -> str:
    text = f"a dry step on the largest micro-batch {measured}; predicted were {predicted:.2f} GB"
    return text if now is None else f"{text}; the plan now: {now.memory.reason}"


@pytest.mark.parametrize("share", [0.96, 1.0])
def test_a_prediction_that_was_right_stands(make: Callable[..., Made], cuda: Cuda, share: float) -> None:
    with a_tight_budget(make) as (made, predicted):
        cuda.peaks = [share * predicted]
        found, events = calibrated(made.plan, made.step)
        assert found is made.plan
        (event,) = events
        assert event == {
            "event": "calibration",
            "predicted_gb": predicted,
            "measured_gb": pytest.approx(share * predicted),
            "message": message(f"took {share * predicted:.2f} GB", predicted),
        }
        assert {layer.policy for layer in made.layers} == {LayerPolicy()}


def test_a_peak_above_the_prediction_gives_something_up(make: Callable[..., Made], cuda: Cuda) -> None:
    """A few percent are enough where the plan filled what it may. The fused layers follow, tensor by tensor."""
    with a_tight_budget(make) as (made, predicted):
        cuda.peaks = [1.02 * predicted, 0.99 * predicted]
        found, events = calibrated(made.plan, made.step)
        assert cuda.peaks == []
        assert found.correction_gb == pytest.approx(0.02 * predicted, abs=2e-9)
        assert (found.memory.predicted_peak_gb or 0) <= HEADROOM * found.budget_gb
        assert found.memory.policies != made.plan.memory.policies
        assert tuple(layer.policy for layer in made.layers) == found.memory.policies
        assert isinstance(made.layers[0], FusedLayer)
        first, second = events
        assert first["message"] == message(f"took {1.02 * predicted:.2f} GB", predicted)
        again = found.memory.predicted_peak_gb or 0.0
        assert (second["predicted_gb"], second["measured_gb"]) == (again, pytest.approx(0.99 * predicted))
        assert second["message"] == message(f"took {0.99 * predicted:.2f} GB", again, found)
        assert found.choice.candidate == made.plan.choice.candidate


def checkpointed(made: Made) -> list[bool]:
    return [layer.gradient_checkpointing for layer in made.layers]


def test_the_reference_engines_layers_are_checkpointed(make: Callable[..., Made], cuda: Cuda) -> None:
    with a_tight_budget(make, "model.engine=reference") as (made, predicted):
        assert checkpointed(made) == [False, False]
        cuda.peaks = [1.03 * predicted, predicted]
        found, _ = calibrated(made.plan, made.step)
        count = found.memory.recompute_layers
        assert count in (1, 2)
        assert checkpointed(made) == [True] * count + [False] * (2 - count)


def test_a_step_that_ran_out_of_memory(make: Callable[..., Made], cuda: Cuda) -> None:
    with a_tight_budget(make) as (made, predicted):
        made.objective.fails = {1: torch.OutOfMemoryError("CUDA out of memory")}
        # It is taken to need a tenth of the budget more than it may fill.
        needed = HEADROOM * made.plan.budget_gb + 0.1 * made.plan.budget_gb
        second = made.plan.corrected(needed)
        cuda.peaks = [second.memory.predicted_peak_gb or 0.0]
        found, events = calibrated(made.plan, made.step)
        assert (cuda.peaks, len(events)) == ([], 2)
        assert found.memory.policies == second.memory.policies
        assert found.memory.recompute_layers > 0
        assert tuple(layer.policy for layer in made.layers) == found.memory.policies
        assert (events[0]["measured_gb"], events[0]["message"]) == (None, message("ran out of memory", predicted))
        # The last sentence is about the plan that was found, and the forward holds what it says of logits.
        assert events[-1]["message"].endswith(f"; the plan now: {found.memory.reason}")
        assert made.step.forward.loss_rows == found.memory.loss_rows


def test_a_peak_below_the_prediction_keeps_more(make: Callable[..., Made], cuda: Cuda) -> None:
    with a_tight_budget(make) as (free, predicted):
        pass
    one = ("training.micro_batch_size=4", "training.cuda_graphs=false")
    made = make(*one, f"memory.limit_gb={0.97 * predicted / HEADROOM}", examples=LONG)
    planned = made.plan.memory.predicted_peak_gb or 0.0
    assert made.plan.memory.recompute_layers > 0
    cuda.peaks = [0.9 * planned, 0.9 * predicted]
    found, events = calibrated(made.plan, made.step)
    assert found.memory.policies == free.plan.memory.policies
    assert {layer.policy for layer in made.layers} == {LayerPolicy()}
    assert found.correction_gb == pytest.approx(-0.1 * planned, abs=2e-9)
    assert len(events) == 2


def test_a_plan_is_tried_until_one_is_seen_to_fit(make: Callable[..., Made], cuda: Cuda) -> None:
    with a_tight_budget(make) as (made, predicted):
        second = made.plan.corrected(1.02 * predicted)
        low = (second.memory.predicted_peak_gb or 0.0) - 0.06 * predicted
        third = second.corrected(low)
        assert third.memory.policies == made.plan.memory.policies
        high = (third.memory.predicted_peak_gb or 0.0) + 0.06 * predicted
        fourth = third.corrected(high)
        assert fourth.memory.policies != third.memory.policies
        cuda.peaks = [1.02 * predicted, low, high, fourth.memory.predicted_peak_gb or 0.0]
        found, events = calibrated(made.plan, made.step)
        assert (cuda.peaks, len(events)) == ([], 4)
        assert found.memory.policies == fourth.memory.policies
        assert tuple(layer.policy for layer in made.layers) == found.memory.policies
        assert [event["message"].endswith(f"; the plan now: {found.memory.reason}") for event in events] == [
            *(False, False, False, True)
        ]


def test_each_plan_is_measured_as_it_says(make: Callable[..., Made], cuda: Cuda) -> None:
    """The model follows the plan before it is measured, its rows of logits too."""
    made = make("memory.mode=min", examples=LONG)
    kept = make("training.micro_batch_size=4", examples=LONG)
    cuda.peaks = [1.0, 1.0]
    kept.step.measure(made.plan)
    assert tuple(layer.policy for layer in kept.layers) == made.plan.memory.policies
    assert kept.step.forward.loss_rows == made.plan.memory.loss_rows == TIGHT_LOSS_ROWS
    kept.step.measure(kept.plan)
    assert tuple(layer.policy for layer in kept.layers) == (LayerPolicy(), LayerPolicy())
    assert kept.step.forward.loss_rows is None


# -- where nothing is measured ----------------------------------------------------------------------------------------


def test_on_the_cpu_nothing_happens(make: Callable[..., Made], cuda: Cuda) -> None:
    made = make(hardware=CPU)
    assert calibrated(made.plan, made.step) == (made.plan, [])
    assert cuda.calls == []


def test_without_memory_calibrate_nothing_happens(make: Callable[..., Made], cuda: Cuda) -> None:
    made = make("memory.calibrate=false")
    found, events = calibrated(made.plan, made.step)
    assert (found is made.plan, events, cuda.calls) == (True, [], [])


def test_what_cannot_be_predicted_is_not_measured(
    make: Callable[..., Made], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_plan, "shape_of", lambda config: None)
    made = make()
    found, events = calibrated(made.plan, made.step)
    assert (found is made.plan, events, cuda.calls) == (True, [], [])


def test_the_examples_of_a_store_are_not_all_read() -> None:
    """Data sets may be larger than memory: lengths are asked for, and the few examples that are needed."""

    class Store(Sequence[TokenizedExample]):
        def __init__(self, examples: list[TokenizedExample]):
            self.examples, self.read = examples, set[int]()

        def __len__(self) -> int:
            return len(self.examples)

        def __getitem__(self, index: Any) -> Any:
            self.read.add(index)
            return self.examples[index]

        def __iter__(self) -> Iterator[TokenizedExample]:
            return iter(self.examples)

    lengths = [random.Random(0).randrange(1, 50) for _ in range(200)]
    for settings in ([], ["data.packing=true", "data.max_seq_length=64", "training.micro_batch_tokens=100"]):
        store = Store(examples_of(*lengths))
        found = _largest(store, load_config(None, settings))
        assert len(store.read) == len(found) < 10


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "kto"])
@pytest.mark.parametrize("budget", [None, 50, 67])
def test_pairs_are_measured_before_their_reference_is_known(
    make: Callable[..., Made], cuda: Cuda, name: str, budget: int | None
) -> None:
    """Whole ones, and ones of which a budget takes a part: as large as training's, and nothing stays."""
    pairs = [
        TokenizedPair(each.input_ids, each.loss_mask, each.line, desirable=True, first=len(each) // 3)
        for each in EXAMPLES
    ]
    settings = [f"objective.name={name}"]
    settings += ["data.max_seq_length=auto", f"training.micro_batch_tokens={budget}"] if budget else []
    made = make(*settings, examples=pairs)
    made.step.objective = objective_of(made.config)
    seen: list[Batch] = []
    real = made.step.objective.terms
    made.step.objective.terms = lambda forward, batch: (seen.append(batch), real(forward, batch))[1]  # type: ignore[method-assign]
    cuda.peaks = [1.0]
    assert made.step.measure(made.plan) == 1.0
    given = made.step.examples
    assert all(isinstance(pair, TokenizedPair) and min(pair.lengths) >= 1 for pair in given)
    if budget:
        assert budget - 1 <= sum(map(len, given)) <= budget
    firsts = sum(pair.lengths[0] for pair in given)
    assert {batch.num_tokens for batch in seen} == {firsts if name == "kto" else sum(map(len, given))}
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in made.model.parameters())
