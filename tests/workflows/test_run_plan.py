"""The memory of a run before it begins: micro-batch, budget, engine, refusals; on the CPU and for a GPU that is pretended."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import GPT2Config

from measured import RUN
from tiny import chat_rows, make_tiny_model, write_jsonl
from tunesmith.cards import find_card
from tunesmith.config import RunConfig, config_from_dict, load_config
from tunesmith.data.batches import StepOrder
from tunesmith.errors import MachineError
from tunesmith.hardware import Hardware, probe
from tunesmith.measurements import record
from tunesmith.memory.choose import WORTH, Candidate, best, step_seconds
from tunesmith.memory.estimate import Estimate, Load, Setup
from tunesmith.memory.policy import HEADROOM, plan_memory
from tunesmith.memory.replays import WARM_UPS
from tunesmith.memory.shape import ModelShape
from tunesmith.models.adapters import add_adapter, count_parameters, keep_trainable_in_fp32, weights_gb
from tunesmith.models.catalogue import CATALOGUE
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import find_model, load_model
from tunesmith.types import GB, LayerPolicy, TokenizedExample
from tunesmith.workflows import run_plan as module
from tunesmith.workflows import train
from tunesmith.workflows.bench import SHAPES
from tunesmith.workflows.diagnosis import diagnose
from tunesmith.workflows.run_plan import RunPlan, budget_gb, plan_run, refuse_what_cannot_fit, shape_of
from tunesmith.workflows.setups import candidates_of, choices_of, packings, set_micro_batch, uses_graphs

CPU = Hardware("cpu", "a CPU", 64.0, False)
H100 = Hardware("cuda:0", "NVIDIA H100 80GB HBM3", 79.18, True, (9, 0))
T4 = Hardware("cuda:0", "Tesla T4", 14.58, False, (7, 5))
UNKNOWN = Hardware("cuda:0", "NVIDIA Something New", 40.0, True, (9, 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`gpu(free=3.0)`: PyTorch says so of a card that is not here; Triton is installed."""

    def pretend(free: float, reserved: float = 0.0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GB), 10**12))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved * GB))

    monkeypatch.setattr(module, "no_fused_engine", lambda hardware: None if hardware.type == "cuda" else "no GPU")
    monkeypatch.setattr(module, "host_factor", lambda device: 1.0)
    pretend(free=79.0)
    return pretend


def forward_of(folder: Path, method: str = "lora") -> ModelForward:
    config = config_of(folder, f"method={method}")
    model = load_model(find_model(config.model), config.model, probe("cpu"), "fp32")
    if method == "full":
        keep_trainable_in_fp32(model)
    else:
        model = add_adapter(model, config.adapter, "base")
    return ModelForward(model, "cpu", "fp32")


@pytest.fixture(scope="module")
def forward(tiny_model: Path) -> ModelForward:
    """A tiny Llama with a LoRA adapter. Nothing here changes it."""
    return forward_of(tiny_model)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ModelForward:
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    return forward_of(make_tiny_model(folder, family="mixtral", num_local_experts=4, num_experts_per_tok=2, hidden=64))


def config_of(model: Path | str, *settings: str) -> RunConfig:
    return load_config(None, settings, {"model.name": str(model), "model.dtype": "fp32"})


def examples_of(*lengths: int, supervised: float = 0.5) -> list[TokenizedExample]:
    """Examples of these lengths, the last part of each supervised."""
    found = []
    for length in lengths:
        mask = np.arange(length) >= length * (1 - supervised)
        found.append(TokenizedExample(np.ones(length, dtype=np.int32), mask))
    return found


LONG = examples_of(*[1000 + 50 * number for number in range(20)])
"""Up to 1,950 tokens: activations of a tiny model that a budget of 0.1 GB notices."""


def planned(
    forward: ModelForward,
    *settings: str,
    hardware: Hardware = H100,
    examples: Sequence[TokenizedExample] = LONG,
) -> tuple[RunConfig, RunPlan]:
    config = config_of("tiny", *settings)
    return config, plan_run(config, forward, hardware, examples)


PADDED = "data.packing=false"


# -- the micro-batches there are --------------------------------------------------------------------------------------


def loads(
    lengths: Sequence[int],
    supervised: Sequence[int],
    *settings: str,
    graphs: bool = False,
    device: str = "cuda",
) -> list[tuple[int, str, int, Load, Load]]:
    config = config_of("tiny", *settings)
    found = candidates_of(config, lengths, supervised, graphs, device, config.data.packed)
    return [(each.size, each.unit, each.count, each.largest, each.typical) for each in found]


LENGTHS, SUPERVISED = [10, 20, 30, 60], [1, 2, 30, 7]


def test_padded_micro_batches_by_hand() -> None:
    """The largest has the longest rows; the typical one is the mean of 60 and 30, 20 and 10, padded, as training pairs them.

    A token's sequence has 50 tokens in the mean over them all: 120 of 60, and 40 of 20. One by one 42, from 60, 30, 20 and 10.
    """
    assert loads(LENGTHS, SUPERVISED) == [
        (1, "examples", 4, Load(60, 30, 60, True), Load(30, 10, 42, True)),
        (2, "examples", 2, Load(120, 37, 60, True, 60), Load(80, 20, 50, True)),
        (4, "examples", 1, Load(240, 40, 60, False, 60), Load(240, 40, 60, False)),
    ]
    # Rows of one length need no mask.
    assert [each[3].masked for each in loads([60] * 4, SUPERVISED)] == [0, 0, 0]
    assert loads(LENGTHS, SUPERVISED, device="cpu") == loads(LENGTHS, SUPERVISED)
    assert loads(LENGTHS, SUPERVISED, "training.batch_size=4") == loads(LENGTHS, SUPERVISED)
    # Graphs want few sizes: 60 becomes 64. Supervised tokens are no more than tokens.
    widened = loads(LENGTHS, [60] * 4, graphs=True)
    assert [each[3].tokens for each in widened] == [64, 128, 256]
    assert [each[3].supervised for each in loads(LENGTHS, [60] * 4)] == [60, 120, 240]


def test_sizes_divide_the_batch_evenly() -> None:
    many = loads([100] * 50, [100] * 50)
    assert [(each[0], each[2]) for each in many] == [(1, 16), (2, 8), (3, 6), (4, 4), (6, 3), (8, 2), (16, 1)]
    # Six micro-batches of sixteen examples have 2.7 of them each, whatever the largest has.
    assert [each[4].tokens for each in many] == [100, 200, 267, 400, 533, 800, 1600]
    # A CPU gains nothing from more at once than the plain four.
    assert [each[0] for each in loads([100] * 50, [100] * 50, device="cpu")] == [1, 2, 3, 4]


def test_packed_micro_batches_by_hand() -> None:
    assert loads(LENGTHS, SUPERVISED, "data.packing=true", "data.max_seq_length=auto") == [
        (60, "tokens", 2, Load(60, 40, 60, True, 60), Load(60, 20, 42, True)),
        *((size, "tokens", 2, Load(size, 40, 60, True, size), Load(60, 20, 42, True)) for size in (75, 90, 105)),
        (120, "tokens", 1, Load(120, 40, 60, False, 120), Load(120, 40, 42, False)),
    ]
    # A budget below `data.max_seq_length` would be refused; above what a step has it is the step.
    assert loads(LENGTHS, SUPERVISED, "data.packing=true", "data.max_seq_length=2048") == [
        (2048, "tokens", 1, Load(120, 40, 60, False, 120), Load(120, 40, 42, False)),
    ]
    # By examples on a CPU.
    assert [each[:4] for each in loads(LENGTHS, SUPERVISED, "data.packing=true", device="cpu")] == [
        (1, "examples", 4, Load(60, 30, 60, True, 60)),
        (2, "examples", 2, Load(90, 37, 60, True, 90)),
        (4, "examples", 1, Load(120, 40, 60, False, 120)),
    ]


def test_micro_batches_that_are_set_by_hand() -> None:
    assert loads(LENGTHS, SUPERVISED, "training.micro_batch_size=3") == [
        (3, "examples", 2, Load(180, 39, 60, True, 60), Load(95, 20, 57, True))
    ]
    packed = ("data.packing=true", "data.max_seq_length=64", "training.micro_batch_tokens=64")
    assert loads(LENGTHS, SUPERVISED, *packed) == [
        (64, "tokens", 2, Load(64, 40, 60, True, 64), Load(60, 20, 42, True))
    ]
    assert loads(LENGTHS, SUPERVISED, *packed, "training.batch_tokens=256") == [
        (64, "tokens", 4, Load(64, 40, 60, True, 64), Load(60, 20, 42, True))
    ]


def test_what_graphs_would_replay_is_counted() -> None:
    """4 x 30 examples of three lengths a step: how often their shapes come in the run decides."""

    def shares(*settings: str, lengths: Sequence[int] = (100, 200, 300) * 40, graphs: bool = True) -> list[float]:
        config = config_of("tiny", "training.batch_size=12", "training.micro_batch_size=1", *settings)
        return [each.replayed for each in candidates_of(config, lengths, lengths, graphs, "cuda", False)]

    def expected(steps: int) -> float:  # 12 micro-batches a step, of three shapes, each of which is captured once
        return 1 - (WARM_UPS + 3) / (12 * steps)

    assert shares("training.epochs=3") == pytest.approx([expected(30)], abs=1e-3)
    assert shares("training.epochs=3", "training.max_steps=10") == pytest.approx([expected(10)], abs=1e-3)
    assert shares("training.max_steps=1") == pytest.approx([expected(1)], abs=0.02)
    assert shares(graphs=False) == shares("training.max_steps=1", lengths=[100] * 40) == [1.0]


def test_a_token_budget_that_most_steps_fit_into() -> None:
    """Two of 100 and 300 tokens a step, in 401: every fourth step (300 and 300) is two micro-batches."""
    settings = ("data.packing=true", "data.max_seq_length=300")

    def one(budget: int, step: str = "training.batch_size=2") -> Candidate:
        config = config_of("tiny", *settings, f"training.micro_batch_tokens={budget}", step)
        (found,) = candidates_of(config, [100, 300] * 500, [10, 30] * 500, False, "cuda", True)
        return found

    found = one(401)
    assert found.runs == pytest.approx(1.25, rel=0.05)
    assert (found.count, found.tokens) == (1, 400)
    assert found.typical.tokens == pytest.approx(400 / 1.25, rel=0.05)
    assert found.typical.supervised == pytest.approx(40 / 1.25, rel=0.05)
    assert found.typical.accumulates
    assert found.largest.accumulates, "gradients wait while the second one's activations are there"
    assert min(found.spread) == pytest.approx(200 / 320, rel=0.05)
    assert max(found.spread) == pytest.approx(400 / 320, rel=0.05)
    for budget, accumulates in ((599, True), (600, False)):
        assert one(budget).largest.accumulates == accumulates
    assert one(600).runs == 1.0
    by_tokens = one(401, "training.batch_tokens=1604")
    assert (by_tokens.runs, by_tokens.count, by_tokens.largest.accumulates) == (4.0, 4, True)
    assert not one(401, "training.batch_tokens=401").largest.accumulates


def test_budgets_end_where_a_step_is_one_micro_batch() -> None:
    """At one and a half mean steps, or the largest step there is: the sum of a batch of the longest, not of all."""

    def budgets(lengths: list[int], batch: int) -> list[int]:
        config = config_of("tiny", "data.packing=true", "data.max_seq_length=auto", f"training.batch_size={batch}")
        return [each.size for each in candidates_of(config, lengths, lengths, False, "cuda", True)]

    assert budgets([100] * 200, 4) == [100, 125, 150, 175, 200, 250, 300, 350, 400]
    assert budgets([100, 10] * 200, 4)[-2:] == [300, 350], "330, one and a half times 220"


def test_widened_micro_batches_have_room_for_more_labels() -> None:
    """Of 64 · 2 positions 30 have a label, which are 64 with room; the largest has 37 of 128."""
    found = loads([60] * 4, [1, 2, 30, 7], "training.micro_batch_size=2", graphs=True)
    assert found == [(2, "examples", 2, Load(128, 64, 60, True), Load(128, 64, 64, True))]


def test_one_example() -> None:
    assert loads([7], [3]) == [(1, "examples", 1, Load(7, 3, 7, False), Load(7, 3, 7, False))]
    assert loads([7], [3], "data.packing=true", "data.max_seq_length=auto", "training.batch_size=1") == [
        (7, "tokens", 1, Load(7, 3, 7, False, 7), Load(7, 3, 7, False))
    ]


def test_a_choice_is_written_where_the_configuration_says_auto() -> None:
    load = Load(8, 8, 8)
    for unit, settings, expected in (
        ("examples", (), (3, None)),
        ("tokens", ("data.packing=true", "data.max_seq_length=8"), ("auto", 512)),
        ("examples", ("training.micro_batch_size=2",), (2, None)),
        ("tokens", ("data.packing=true", "data.max_seq_length=64", "training.micro_batch_tokens=64"), ("auto", 64)),
    ):
        config, packed = config_of("tiny", *settings), unit == "tokens"
        set_micro_batch(config, Candidate(512 if packed else 3, 1, load, load, 8, unit, packed=packed))  # type: ignore[arg-type]
        assert (config.training.micro_batch_size, config.training.micro_batch_tokens) == expected
        assert config.data.packing is packed


# -- on the CPU -------------------------------------------------------------------------------------------------------


def start(tiny_model: Path, tmp_path: Path, *settings: str, model: Path | None = None) -> train.TrainingSession:
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(24, seed=1))
    config = load_config(
        None,
        ["model.dtype=fp32", "model.device=cpu", "training.batch_size=8", *settings],
        {"model.name": str(model or tiny_model), "data.path": str(data)},
    )
    return train.start(config, tmp_path / "run")


def test_a_session_on_the_cpu_has_a_plan(tiny_model: Path, tmp_path: Path) -> None:
    session = start(tiny_model, tmp_path)
    plan = session.plan
    assert session.config.training.micro_batch_size == plan.choice.candidate.size == 4
    assert (session.config.training.batch_size, session.config.training.micro_batch_tokens) == (8, None)
    assert (plan.memory.engine, plan.memory.recompute_layers, plan.card) == ("reference", 0, None)
    assert (plan.choice.tokens_per_second, session.calibration) == (None, [])
    assert plan.memory.predicted_peak_gb == pytest.approx(0.0655, rel=0.05)
    lengths = [len(example) for example in session.data.train]
    assert plan.choice.candidate.largest.tokens == 4 * max(lengths)
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "micro_batch_size: 4\n" in saved


def test_what_is_loaded_is_counted(forward: ModelForward) -> None:
    _, plan = planned(forward, hardware=CPU)
    trainable, _ = count_parameters(forward.model)
    assert plan.trainable == trainable
    assert plan.weights_gb == pytest.approx(weights_gb(forward.model) - 4 * trainable / GB)
    assert plan.memory.breakdown["weights_gb"] == plan.weights_gb
    assert plan.memory.breakdown["optimizer_gb"] == 8 * trainable / GB
    assert plan.setup.r == 16
    assert plan.shape is not None
    assert plan.shape.adapter_values(16) == trainable


def test_the_rank_is_the_loaded_adapters(tiny_model: Path) -> None:
    """As with adapter.init_from, whose own rank applies."""
    config = config_of(tiny_model)
    model = load_model(find_model(config.model), config.model, probe("cpu"), "fp32")
    small = ModelForward(add_adapter(model, config_of("tiny", "adapter.r=4").adapter, "base"), "cpu", "fp32")
    assert plan_run(config, small, CPU, LONG).setup.r == 4


def test_full_fine_tuning_trains_all_that_is_loaded(tiny_model: Path) -> None:
    whole = forward_of(tiny_model, "full")
    _, plan = planned(whole, "method=full", hardware=CPU)
    _, total = count_parameters(whole.model)
    assert (plan.trainable, plan.setup.r) == (total, 0)
    assert plan.weights_gb == pytest.approx(weights_gb(whole.model))


def test_a_small_cap_on_the_cpu_is_kept_by_computing_again(forward: ModelForward) -> None:
    """And is no reason to refuse: the machine swaps."""
    _, wide = planned(forward, "training.micro_batch_size=4", hardware=CPU)
    peak = wide.memory.predicted_peak_gb
    assert peak is not None
    settings = ("training.micro_batch_size=4", f"memory.limit_gb={0.95 * peak / HEADROOM}")
    _, tight = planned(forward, *settings, hardware=CPU)
    assert (wide.memory.recompute_layers, tight.memory.recompute_layers) == (0, 1)
    assert tight.choice.fits
    config, least = planned(forward, "memory.limit_gb=0.001", hardware=CPU)
    assert (least.choice.fits, least.memory.recompute_layers) == (False, 2)
    assert config.training.micro_batch_size == 1


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def test_with_room_the_largest_micro_batch_is_the_fastest(gpu: Callable[..., None], forward: ModelForward) -> None:
    config, plan = planned(forward, PADDED, "training.epochs=100")
    assert plan.card is not None
    assert plan.card.name == "H100"
    assert (plan.memory.engine, plan.memory.recompute_layers, plan.choice.graphs) == ("fused", 0, True)
    assert set(plan.memory.policies) == {LayerPolicy()}
    assert plan.choice.candidate.size == config.training.micro_batch_size == 16
    assert plan.choice.tokens_per_second is not None
    assert config.training.batch_size == 16


def test_runs_on_this_card_say_what_to_expect(
    gpu: Callable[..., None], forward: ModelForward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    _, before = planned(forward)
    assert before.shape is not None
    assert before.tokens_per_second == before.choice.tokens_per_second
    assert before.basis == {"memory": "arithmetic", "speed": "arithmetic", "runs": 0}
    known = replace(
        RUN, parameters=before.shape.num_parameters, predicted_tokens_per_second=100.0, tokens_per_second=75.0
    )
    record(known)
    record(replace(known, engine="reference", tokens_per_second=10.0))
    _, after = planned(forward)
    assert after.choice == before.choice  # the arithmetic
    assert after.tokens_per_second == 0.75 * (before.choice.tokens_per_second or 0)
    assert after.basis == {"memory": "arithmetic", "speed": "calibrated", "runs": 1}
    for again in (after.least(), after.corrected(2.0)):  # what is planned again is calibrated too
        assert again.tokens_per_second == 0.75 * (again.choice.tokens_per_second or 0)
    assert after.corrected(2.0).basis == {"memory": "calibrated", "speed": "calibrated", "runs": 1}
    for hardware in (T4, UNKNOWN, CPU):
        assert planned(forward, hardware=hardware)[1].basis["speed"] == ("arithmetic" if hardware is T4 else None)


def test_the_micro_batch_takes_the_least_time_within_the_budget(
    gpu: Callable[..., None], forward: ModelForward
) -> None:
    peaks = {}
    for size in (1, 2, 3, 4, 6, 8, 16):
        _, plan = planned(forward, PADDED, f"training.micro_batch_size={size}")
        peaks[size] = plan.memory.predicted_peak_gb or 0
    found = []
    for size in (1, 3, 8, 16):
        budget = 1.001 * peaks[size] / HEADROOM
        config, chosen = planned(forward, PADDED, f"memory.limit_gb={budget}")
        by_hand = [
            planned(forward, PADDED, f"memory.limit_gb={budget}", f"training.micro_batch_size={each}")[1]
            for each in peaks
            if peaks[each] <= HEADROOM * budget
        ]
        fastest = min(plan.choice.step_seconds or math.inf for plan in by_hand)
        assert chosen.choice.fits
        assert chosen.choice.step_seconds is not None
        assert chosen.choice.step_seconds <= fastest / WORTH
        found.append(config.training.micro_batch_size)
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_without_a_known_card_it_is_the_largest_that_keeps_as_much(
    gpu: Callable[..., None], forward: ModelForward
) -> None:
    config, plan = planned(forward, PADDED, hardware=UNKNOWN)
    assert (plan.card, plan.choice.tokens_per_second) == (None, None)
    assert (config.training.micro_batch_size, plan.memory.recompute_layers) == (16, 0)
    _, one = planned(forward, PADDED, "training.micro_batch_size=4", hardware=UNKNOWN)
    budget = 1.001 * (one.memory.predicted_peak_gb or 0) / HEADROOM
    config, plan = planned(forward, PADDED, f"memory.limit_gb={budget}", hardware=UNKNOWN)
    assert (config.training.micro_batch_size, plan.memory.recompute_layers) == (4, 0)


def test_a_packed_run_gets_a_token_budget(gpu: Callable[..., None], forward: ModelForward) -> None:
    config, plan = planned(forward, "data.packing=true", "data.max_seq_length=auto", "training.batch_size=12")
    training = config.training
    assert (training.micro_batch_size, training.batch_size, training.batch_tokens) == ("auto", 12, None)
    assert training.micro_batch_tokens == plan.choice.candidate.size
    assert training.micro_batch_tokens in [
        1950 * quarters * 2**octave // 4 for quarters in (4, 5, 6, 7) for octave in range(4)
    ]
    # It is one that steps can be made with, and that a run's config.yaml may hold.
    again = RunConfig.model_validate(config.model_dump())
    steps = StepOrder([len(example) for example in LONG], again.training, True)
    assert sorted(index for part in steps.step(0) + steps.step(1) for index in part) == list(range(20))
    largest = max(sum(len(LONG[index]) for index in part) for step in (0, 1) for part in steps.step(step))
    assert largest <= plan.choice.candidate.largest.tokens


def test_auto_packs_where_that_is_faster() -> None:
    lengths = [200 + 90 * number for number in range(20)]
    shape, speeds = ModelShape.of(SHAPES["qwen2.5-3b"]), {}
    for setting in ("auto", "true", "false"):
        config = config_of("tiny", "method=qlora", f"data.packing={setting}")
        setup = Setup("qlora", "fused", scheme="nf4")
        choice = best(choices_of(config, shape, setup, lengths, lengths, 24.0, find_card("H100")), "auto")
        speeds[setting] = choice.tokens_per_second or 0
        assert choice.candidate.packed is (setting != "false")
        set_micro_batch(config, choice.candidate)
        assert config.data.packing is choice.candidate.packed
    assert speeds["auto"] == speeds["true"] > 1.1 * speeds["false"], "padding is a tenth at least"


@pytest.mark.parametrize(
    ("settings", "hardware", "lengths"),
    [
        ((), CPU, (400, 100)),  # its attention covers the whole packed row
        (("model.engine=reference",), H100, (400, 100)),
        ((), H100, (400, 400)),  # there is no padding to save
        ((), H100, (400,)),
    ],
)
def test_auto_pads_where_packing_gains_nothing(
    gpu: Callable[..., None], forward: ModelForward, settings: tuple[str, ...], hardware: Hardware, lengths: Any
) -> None:
    examples = [LONG[number % len(LONG)] for number in range(len(lengths))]
    cut = [
        replace(example, input_ids=example.input_ids[:length], loss_mask=example.loss_mask[:length])
        for example, length in zip(examples, lengths, strict=True)
    ]
    config, plan = planned(forward, *settings, hardware=hardware, examples=cut)
    assert config.data.packing is plan.choice.candidate.packed is False
    assert config.training.micro_batch_tokens is None


@pytest.mark.parametrize(
    ("settings", "engine", "shape", "lengths", "device", "expected"),
    [
        ((), "fused", "qwen2.5-3b", [9, 5], "cuda", (False, True)),
        ((), "reference", "qwen2.5-3b", [9, 5], "cuda", (False,)),  # its attention covers the whole packed row
        ((), "fused", "mixtral", [9, 5], "cuda", (False,)),  # half of its layers are transformers' own
        ((), "fused", "qwen2.5-3b", [9, 9], "cuda", (False,)),  # there is no padding to save
        ((), "fused", "qwen2.5-3b", [9, 5], "cpu", (False,)),
        (("training.micro_batch_tokens=4096",), "reference", "qwen2.5-3b", [9, 9], "cpu", (True,)),
        (("data.packing=true",), "reference", "qwen2.5-3b", [9, 9], "cpu", (True,)),
        (("data.packing=false",), "fused", "qwen2.5-3b", [9, 5], "cuda", (False,)),
    ],
)
def test_what_auto_is_decided_between(
    settings: tuple[str, ...], engine: Any, shape: str, lengths: list[int], device: str, expected: tuple[bool, ...]
) -> None:
    known = CATALOGUE["mistralai/Mixtral-8x7B-v0.1"] if shape == "mixtral" else SHAPES[shape]
    assert packings(config_of("tiny", *settings), engine, ModelShape.of(known), lengths, device) == expected


def test_a_step_has_as_many_packs_as_its_examples_make() -> None:
    """Four of 60 tokens are 240, which would be three budgets of 100: but no two fit into one."""
    packed = ("data.packing=true", "data.max_seq_length=64", "training.micro_batch_tokens=100", "training.batch_size=4")
    ((size, _, count, _, _),) = loads([60] * 8, [30] * 8, *packed)
    assert (size, count) == (100, 4)


def test_a_step_in_tokens_has_as_many_packs_as_it_says() -> None:
    """However full they are: of 600 tokens only one fits into 1,024, and a step of eight packs has 4,800 tokens."""
    settings = (
        "data.packing=true",
        "data.max_seq_length=1024",
        "training.micro_batch_tokens=1024",
        "training.batch_tokens=8192",
    )
    (found,) = candidates_of(config_of("tiny", *settings), [600] * 500, [300] * 500, False, "cuda", True)
    assert (found.count, found.tokens) == (8, 4800)
    assert (found.typical.tokens, found.typical.supervised) == (600, 300)


def test_a_shape_that_is_not_known_keeps_its_token_budget(
    gpu: Callable[..., None], forward: ModelForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "shape_of", lambda config: None)
    config, _ = planned(forward, "training.micro_batch_tokens=4096")
    assert (config.data.packing, config.training.micro_batch_tokens) == (True, 4096)
    assert RunConfig.model_validate(config.model_dump()).data.packing is True
    config, _ = planned(forward)
    assert config.data.packing is False


def test_what_fits_packed_is_not_refused(gpu: Callable[..., None]) -> None:
    """Sixteen rows as long as the longest do not fit; the longest and fifteen short ones do."""
    lengths = [8192] + [200] * 99
    llama = CATALOGUE["meta-llama/Llama-3.1-8B"]

    def refused(packing: str) -> bool:
        settings = (
            "method=qlora",
            "model.dtype=bf16",
            "training.micro_batch_size=16",
            f"data.packing={packing}",
            "memory.limit_gb=14.9",
        )
        config = load_config(None, settings, {"model.name": "tiny"})
        try:
            refuse_what_cannot_fit(config, llama, H100, "bf16", examples_of(*lengths))
        except MachineError:
            return True
        return False

    assert [refused(packing) for packing in ("auto", "true", "false")] == [False, False, True]


def test_a_token_budget_is_packed(gpu: Callable[..., None], forward: ModelForward) -> None:
    for hardware in (CPU, H100):
        config, plan = planned(forward, "training.micro_batch_tokens=4096", hardware=hardware)
        assert config.data.packing is plan.choice.candidate.packed is True
        assert plan.choice.candidate.size == 4096


@pytest.mark.parametrize(
    ("settings", "size", "tokens"),
    [
        (("training.micro_batch_size=3",), 3, None),
        (("training.batch_size=1",), 1, None),
        (("data.packing=true", "training.micro_batch_size=2"), 2, None),
        (("data.packing=true", "training.micro_batch_tokens=4096"), "auto", 4096),
        (
            ("data.packing=true", "training.micro_batch_tokens=4096", "training.batch_tokens=8192"),
            "auto",
            4096,
        ),
    ],
)
def test_what_is_set_by_hand_is_kept(
    gpu: Callable[..., None], forward: ModelForward, settings: tuple[str, ...], size: Any, tokens: int | None
) -> None:
    before = config_of("tiny", *settings)
    config, plan = planned(forward, *settings)
    assert (config.training.micro_batch_size, config.training.micro_batch_tokens) == (size, tokens)
    assert (config.training.batch_size, config.training.batch_tokens) == (
        before.training.batch_size,
        before.training.batch_tokens,
    )
    assert plan.choice.candidate.size == (size if tokens is None else tokens)


def test_min_takes_the_least_memory(gpu: Callable[..., None], forward: ModelForward) -> None:
    config, least = planned(forward, PADDED, "memory.mode=min")
    assert config.training.micro_batch_size == 1
    assert {policy.keep for policy in least.memory.policies} == {frozenset()}
    others = [planned(forward, f"training.micro_batch_size={size}")[1] for size in (1, 4, 16)]
    assert (least.memory.predicted_peak_gb or 0) < min(other.memory.predicted_peak_gb or 0 for other in others)
    assert least.least() is least


def test_fast_keeps_everything_or_refuses(gpu: Callable[..., None], forward: ModelForward) -> None:
    _, plan = planned(forward, "memory.mode=fast")
    assert set(plan.memory.policies) == {LayerPolicy()}
    _, one = planned(forward, "memory.mode=fast", "training.micro_batch_size=1")
    needed = one.memory.predicted_peak_gb or 0
    config, plan = planned(forward, "memory.mode=fast", f"memory.limit_gb={1.001 * needed / HEADROOM}")
    assert config.training.micro_batch_size == 1
    config = config_of("tiny", "memory.mode=fast", f"memory.limit_gb={0.99 * needed}")
    with pytest.raises(MachineError) as caught:
        plan_run(config, forward, H100, LONG)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(
        f"this run needs {needed:.1f} GB, and NVIDIA H100 80GB HBM3 has {0.99 * needed:.1f} GB for it (activations "
    )
    assert [line[:3] for line in lines[1:]] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    assert lines[1].startswith("1. activations: memory.mode fast keeps them all")
    refused = replace(one.memory, budget_gb=0.99 * needed)
    lengths = [len(example) for example in LONG]
    assert str(caught.value) == diagnose(config, one.shape, refused, 0.99 * needed, H100.name, lengths)
    # Nothing was decided, and `auto` finds a way.
    assert config.training.micro_batch_size == "auto"
    _, plan = planned(forward, f"memory.limit_gb={0.99 * needed / HEADROOM}")
    assert plan.choice.fits
    assert plan.memory.policies[0] != LayerPolicy()


def test_a_plan_that_fills_the_budget_is_tried(gpu: Callable[..., None], forward: ModelForward) -> None:
    """Plans leave a tenth; one that needs it is taken if there is no other."""
    _, least = planned(forward, "memory.mode=min", "training.micro_batch_size=1")
    needed = least.memory.predicted_peak_gb or 0
    _, plan = planned(forward, f"memory.limit_gb={1.05 * needed}", "training.micro_batch_size=1")
    assert not plan.choice.fits
    with pytest.raises(MachineError, match=r"^this run needs "):
        planned(forward, f"memory.limit_gb={0.99 * needed}", "training.micro_batch_size=1")


@pytest.mark.parametrize(
    ("limit", "free", "reserved", "budget"),
    [(None, 10.0, 2.0, 12.0), (5.0, 10.0, 2.0, 5.0), (20.0, 10.0, 2.0, 12.0), (11.0, 10.0, 2.0, 11.0)],
)
def test_the_budget_is_the_smaller_of_the_cap_and_what_is_free(
    gpu: Callable[..., None],
    forward: ModelForward,
    limit: float | None,
    free: float,
    reserved: float,
    budget: float,
) -> None:
    gpu(free, reserved)
    settings = () if limit is None else (f"memory.limit_gb={limit}",)
    _, plan = planned(forward, *settings)
    assert plan.budget_gb == plan.memory.budget_gb == pytest.approx(budget)


def test_on_the_cpu_the_weights_are_no_longer_free(forward: ModelForward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory_gb", lambda hardware: 10.0)
    assert budget_gb(config_of("tiny"), CPU, 3.0) == 13.0
    assert budget_gb(config_of("tiny", "memory.limit_gb=4"), CPU, 3.0) == 4.0
    assert planned(forward, hardware=CPU)[1].budget_gb == 10.0 + weights_gb(forward.model)


@pytest.mark.parametrize(
    ("settings", "reason", "engine", "graphs"),
    [
        ((), None, "fused", True),
        (("training.cuda_graphs=false",), None, "fused", False),
        (("model.engine=reference",), None, "reference", False),
        (("adapter.dropout=0.1",), None, "fused", False),  # it draws numbers
        ((), "Triton is not installed", "reference", False),
        (("model.engine=fused",), "Triton is not installed", "fused", True),
    ],
)
def test_the_engine_and_the_graphs(
    gpu: Callable[..., None],
    forward: ModelForward,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    reason: str | None,
    engine: str,
    graphs: bool,
) -> None:
    monkeypatch.setattr(module, "no_fused_engine", lambda hardware: reason)
    examples = examples_of(*[450] * 16)
    _, plan = planned(forward, *settings, "training.micro_batch_size=1", examples=examples)
    assert (plan.memory.engine, plan.setup.engine, plan.choice.graphs) == (engine, engine, graphs)
    assert plan.choice.candidate.largest.tokens == (480 if graphs else 450)  # rows are widened for graphs


def test_graphs_run_where_their_memory_fits_beside_a_step(gpu: Callable[..., None], forward: ModelForward) -> None:
    """They have memory of the driver's. Where that does not fit, all activations are kept without them."""
    config, plan = planned(forward, "training.micro_batch_size=4")
    peak = plan.memory.predicted_peak_gb or 0
    assert (plan.choice.graphs, config.training.cuda_graphs, plan.memory.pool_gb > 0) == (True, True, True)
    for needed, graphs in ((peak + plan.memory.pool_gb, True), (peak, False)):
        limit = f"memory.limit_gb={1.001 * needed / HEADROOM}"
        config, tight = planned(forward, "training.micro_batch_size=4", "memory.mode=fast", limit)
        assert tight.choice.fits
        assert (tight.choice.graphs, config.training.cuda_graphs, tight.memory.pool_gb > 0) == (graphs, graphs, graphs)
        assert set(tight.memory.policies) == {LayerPolicy()}
    # A run on the CPU has none, and its configuration stays as it is.
    config, plan = planned(forward, hardware=CPU)
    assert (plan.choice.graphs, config.training.cuda_graphs) == (False, True)


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    for each in module.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(each, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "backend:native")
    found: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    module.limit_memory(config_of("tiny"), CPU)
    assert found == []
    module.limit_memory(config_of("tiny"), H100)
    assert found == (["expandable_segments:True"] if name is None else [])


def test_graphs_want_gradients_that_stay_in_place() -> None:
    """An adapter's do; in full fine-tuning each tensor has its own, and rows are not widened."""
    shape = ModelShape.of(CATALOGUE["Qwen/Qwen2.5-0.5B"])
    configs = [config_of("tiny", f"method={method}") for method in ("lora", "qlora", "full")]
    assert [uses_graphs(config, "fused", shape) for config in configs] == [True, True, False]
    for beside in ("adapter.modules_to_save=[norm]", "adapter.new_tokens=[x]", "training.neftune_alpha=5"):
        assert not uses_graphs(config_of("tiny", beside), "fused", shape)
    # And layers that a graph can replay.
    assert not any(uses_graphs(config, "fused", replace(shape, capturable=False)) for config in configs)


# -- families of which half a layer is fused --------------------------------------------------------------------------


def test_half_fused_layers_where_everything_fits(gpu: Callable[..., None], mixtral: ModelForward) -> None:
    _, plan = planned(mixtral)
    assert plan.shape is not None
    assert not plan.shape.can_fuse
    assert (plan.memory.engine, plan.memory.recompute_layers) == ("fused", 0)
    assert plan.memory.policies == (LayerPolicy(),) * 2
    assert plan.least() is plan  # they compute nothing again


def test_half_fused_families_use_the_models_own_layers_where_memory_is_short(
    gpu: Callable[..., None], mixtral: ModelForward
) -> None:
    one = "training.micro_batch_size=1"
    _, whole = planned(mixtral, one, "training.cuda_graphs=false")  # whose rows are not widened
    needed = whole.memory.predicted_peak_gb or 0
    _, plan = planned(mixtral, one, f"memory.limit_gb={0.99 * needed}")
    assert (plan.memory.engine, plan.memory.recompute_layers > 0, plan.memory.policies) == ("reference", True, ())
    _, plan = planned(mixtral, one, "memory.mode=min")
    assert (plan.memory.engine, plan.memory.recompute_layers) == ("reference", 2)
    assert (plan.memory.predicted_peak_gb or 0) < needed
    # Asked for by name, the engine stays, and what does not fit is refused.
    _, plan = planned(mixtral, one, "memory.mode=min", "model.engine=fused")
    assert plan.memory.engine == "fused"
    with pytest.raises(MachineError, match=r"^this run needs "):
        planned(mixtral, one, f"memory.limit_gb={0.99 * needed}", "model.engine=fused")


# -- what cannot be predicted -----------------------------------------------------------------------------------------


def test_shapes_of_transformers_configs(forward: ModelForward) -> None:
    found = shape_of(GPT2Config())  # n_embd, n_layer, n_head
    assert found is not None
    assert (found.hidden_size, found.num_layers, found.num_heads, found.vocab_size) == (768, 12, 12, 50257)
    assert not found.exact
    assert shape_of(SimpleNamespace(to_dict=lambda: {"model_type": "strange"})) is None
    own = shape_of(forward.base.config)
    assert own is not None
    trainable, total = count_parameters(forward.model)
    assert own.num_parameters == total - trainable


@pytest.mark.parametrize(
    ("mode", "layers", "reason"),
    [
        ("auto", 0, "memory.mode auto: LlamaForCausalLM cannot be predicted: keep all activations"),
        ("fast", 0, "memory.mode fast: LlamaForCausalLM cannot be predicted: keep all activations"),
        ("min", 2, "memory.mode min: LlamaForCausalLM cannot be predicted: recompute 2 of 2 layers"),
    ],
)
def test_without_a_shape_nothing_is_predicted_or_refused(
    gpu: Callable[..., None],
    forward: ModelForward,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    layers: int,
    reason: str,
) -> None:
    monkeypatch.setattr(module, "shape_of", lambda config: None)
    for hardware in (CPU, H100):
        config, plan = planned(forward, f"memory.mode={mode}", "memory.limit_gb=0.0001", hardware=hardware)
        assert (plan.memory.predicted_peak_gb, plan.memory.breakdown) == (None, {})
        assert (plan.memory.recompute_layers, plan.memory.num_layers, plan.memory.reason) == (layers, 2, reason)
        assert (plan.choice.tokens_per_second, plan.choice.fits) == (None, True)
        assert config.training.micro_batch_size == 4  # the plain one
        assert plan.corrected(1.0) is plan
        assert plan.least() is plan
    config, _ = planned(forward, "data.packing=true", hardware=H100)
    assert config.training.micro_batch_tokens == 2048


# -- planning again ---------------------------------------------------------------------------------------------------


def test_a_measured_peak_corrects_the_plan(gpu: Callable[..., None], forward: ModelForward) -> None:
    _, one = planned(forward, "training.micro_batch_size=4", "training.cuda_graphs=false")
    predicted = one.memory.predicted_peak_gb or 0
    plan = replace(one, budget_gb=1.05 * predicted / HEADROOM)
    plan = plan.corrected(predicted)
    assert plan.memory.policies == one.memory.policies
    assert plan.correction_gb == pytest.approx(0.0, abs=1e-12)
    # A tenth more than predicted does not fit: something is given up, and the prediction holds the tenth.
    found = plan.corrected(1.1 * predicted)
    assert found.correction_gb == pytest.approx(0.1 * predicted)
    assert found.memory.policies != plan.memory.policies
    assert (found.memory.predicted_peak_gb or 0) <= HEADROOM * plan.budget_gb
    parts = sum(gb for name, gb in found.memory.breakdown.items() if name != "context_gb")
    assert found.memory.predicted_peak_gb == pytest.approx(parts + 0.1 * predicted)
    assert (found.choice.candidate, found.budget_gb) == (plan.choice.candidate, plan.budget_gb)
    # Then it took less than the corrected plan says: what was measured is against that.
    again = found.corrected((found.memory.predicted_peak_gb or 0) - 0.1 * predicted)
    assert again.correction_gb == pytest.approx(0.0, abs=1e-12)
    assert again.memory.policies == plan.memory.policies
    assert again.memory.predicted_peak_gb == pytest.approx(predicted)


def test_a_plan_again_takes_its_own_time(gpu: Callable[..., None], forward: ModelForward) -> None:
    _, plan = planned(forward, "training.micro_batch_size=16", "training.epochs=100")
    assert plan.choice.graphs
    least = plan.least()
    assert least.choice.step_seconds is not None
    assert least.choice.step_seconds > (plan.choice.step_seconds or math.inf)
    assert plan.shape is not None
    assert plan.card is not None
    for each in (plan, least):
        expected = step_seconds(plan.shape, plan.setup, plan.choice.candidate, each.memory, plan.card, True)
        assert each.choice.step_seconds == expected
    _, unknown = planned(forward, "training.micro_batch_size=16", hardware=UNKNOWN)
    assert unknown.least().choice.step_seconds is None


def test_the_least_keeps_the_micro_batch_and_the_correction(gpu: Callable[..., None], forward: ModelForward) -> None:
    for engine in ("fused", "reference"):
        _, plan = planned(forward, "training.micro_batch_size=4", f"model.engine={engine}")
        plan = plan.corrected((plan.memory.predicted_peak_gb or 0) + 0.5)
        least = plan.least()
        assert (least.memory.mode, least.memory.recompute_layers, least.correction_gb) == ("min", 2, pytest.approx(0.5))
        assert least.choice.candidate == plan.choice.candidate
        parts = sum(gb for name, gb in least.memory.breakdown.items() if name != "context_gb")
        assert least.memory.predicted_peak_gb == pytest.approx(parts + 0.5)
        assert least.least() is least


def test_what_gave_up_everything_has_no_less(gpu: Callable[..., None], forward: ModelForward) -> None:
    one = ("training.micro_batch_size=1", "model.engine=reference")
    _, least = planned(forward, *one, "memory.mode=min")
    budget = 1.001 * (least.memory.predicted_peak_gb or 0) / HEADROOM
    _, plan = planned(forward, *one, f"memory.limit_gb={budget}")
    assert (plan.memory.mode, plan.memory.recompute_layers) == ("auto", 2)
    assert plan.least() is plan


# -- before weights are loaded ----------------------------------------------------------------------------------------

LLAMA_70B = CATALOGUE["meta-llama/Llama-3.1-70B"]
SHORT = examples_of(*[100] * 8)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_run_that_no_setting_could_save_is_refused(gpu: Callable[..., None], method: str) -> None:
    gpu(free=14.0)
    config = config_of("llama", f"method={method}")
    with pytest.raises(MachineError) as caught:
        refuse_what_cannot_fit(config, LLAMA_70B, T4, "fp16", SHORT)
    lines = str(caught.value).splitlines()
    assert " GB, and Tesla T4 has 14.0 GB for it (weights " in lines[0]
    assert len(lines) == 6
    assert lines[5].startswith("5. model: 70.6B parameters are too many for this card: method: qlora needs ")


def test_the_refusal_knows_free_memory_and_the_cap(gpu: Callable[..., None]) -> None:
    small = CATALOGUE["Qwen/Qwen2.5-0.5B"]
    config = config_of("qwen")
    refuse_what_cannot_fit(config, small, T4, "fp16", SHORT)
    gpu(free=1.0)
    with pytest.raises(MachineError, match=r"^this run needs 1\.\d GB, and Tesla T4 has 1\.0 GB"):
        refuse_what_cannot_fit(config, small, T4, "fp16", SHORT)
    gpu(free=14.0)
    capped = config_of("qwen", "memory.limit_gb=0.9")
    with pytest.raises(MachineError, match=r"^this run needs 1\.\d GB, and Tesla T4 has 0\.9 GB"):
        refuse_what_cannot_fit(capped, small, T4, "fp16", SHORT)


def test_only_what_nothing_could_save_is_refused(gpu: Callable[..., None]) -> None:
    """With the smallest micro-batch, and everything computed again, whatever memory.mode says."""
    small, examples = CATALOGUE["Qwen/Qwen2.5-0.5B"], examples_of(*[4000] * 8)
    with pytest.raises(MachineError) as caught:
        refuse_what_cannot_fit(config_of("qwen", "memory.limit_gb=0.9"), small, T4, "fp16", examples)
    least = float(str(caught.value).split()[3])
    estimate = Estimate(ModelShape.of(small), Setup("lora", "fused"), Load(4000, 2000, 4000))
    assert least == pytest.approx(plan_memory(estimate, "min", None).predicted_peak_gb, abs=0.05)
    assert least < 0.6 * (plan_memory(estimate, "fast", None).predicted_peak_gb or 0)
    settings = ("memory.mode=fast", "training.batch_size=8")
    refuse_what_cannot_fit(config_of("qwen", *settings, f"memory.limit_gb={least + 0.1}"), small, T4, "fp16", examples)
    with pytest.raises(MachineError):
        refuse_what_cannot_fit(
            config_of("qwen", *settings, f"memory.limit_gb={least - 0.1}"), small, T4, "fp16", examples
        )
    four = config_of("qwen", "training.micro_batch_size=4", f"memory.limit_gb={least + 0.1}")
    with pytest.raises(MachineError):  # four at once were asked for
        refuse_what_cannot_fit(four, small, T4, "fp16", examples)


def test_who_is_not_asked(gpu: Callable[..., None]) -> None:
    gpu(free=1.0)
    config = config_of("llama")
    refuse_what_cannot_fit(config, LLAMA_70B, CPU, "fp32", SHORT)
    refuse_what_cannot_fit(config, {"model_type": "strange"}, T4, "fp16", SHORT)
    adapter = config_of("llama", "adapter.init_from=somewhere")  # its rank is not known yet
    refuse_what_cannot_fit(adapter, LLAMA_70B, T4, "fp16", SHORT)


def test_a_half_fused_engine_that_is_asked_for_is_no_error_here(gpu: Callable[..., None]) -> None:
    config = config_of("mixtral", "model.engine=fused", "method=qlora")
    gpu(free=200.0)
    refuse_what_cannot_fit(config, CATALOGUE["mistralai/Mixtral-8x7B-v0.1"], H100, "bf16", SHORT)


def test_weights_are_not_even_looked_for(
    gpu: Callable[..., None], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer and a large model's config.json are enough to know: the file of weights is an empty one."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    (folder / "model.safetensors").write_bytes(b"")
    gpu(free=14.0)
    monkeypatch.setattr(train, "probe", lambda device: T4)

    def never(*arguments: Any) -> Any:
        raise AssertionError("weights were looked for")

    monkeypatch.setattr(train, "fetch_weights", never)
    with pytest.raises(MachineError, match=r"^this run needs 13\d\.\d GB, and Tesla T4 has 14\.0 GB for it"):
        start(tiny_model, tmp_path, "model.dtype=fp16", model=folder)
    assert not (tmp_path / "run").exists()
    # On the CPU the question is not asked: it goes on to the weights.
    monkeypatch.setattr(train, "probe", lambda device: CPU)
    with pytest.raises(AssertionError, match="weights were looked for"):
        start(tiny_model, tmp_path, model=folder)


def test_more_memory_never_takes_longer(gpu: Callable[..., None], forward: ModelForward) -> None:
    seconds = []
    for budget in np.linspace(0.085, 0.4, 12):
        _, plan = planned(forward, f"memory.limit_gb={budget}")
        seconds.append(plan.choice.step_seconds or math.inf)
    assert all(later <= earlier / WORTH for earlier, later in pairwise(seconds))
    assert seconds[-1] < seconds[0]


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "kto"])
def test_pairs_have_no_graphs(name: str) -> None:
    """Which sequence a token is in changes with every batch: a graph would add it to that of the batch it was captured with."""
    shape = ModelShape.of(CATALOGUE["Qwen/Qwen2.5-0.5B"])
    assert uses_graphs(config_of("tiny", "objective.name=cpt"), "fused", shape)
    assert not uses_graphs(config_of("tiny", f"objective.name={name}"), "fused", shape)


@pytest.mark.parametrize("name", ["sft", "cpt", "dpo", "kto"])
def test_a_planned_budget_is_one_that_the_runs_own_settings_allow(name: str) -> None:
    """config.yaml is read again by resume, eval and report: a budget must hold two sequences of a pair of data.max_seq_length."""
    for length in ("auto", "512"):
        config = config_of("tiny", f"objective.name={name}", f"data.max_seq_length={length}", "data.packing=true")
        found = candidates_of(config, [90, 120, 200, 40] * 100, [9] * 400, False, "cuda", True)
        assert len(found) > 3
        for each in found:
            planned = config.model_copy(deep=True)
            set_micro_batch(planned, each)
            assert config_from_dict(yaml.safe_load(planned.to_yaml())) == planned
