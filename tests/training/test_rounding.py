"""Weights in bf16: rounding is right on average, small updates arrive, and everything else is as with weights in fp32."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tiny import make_tiny_model
from tunesmith.config import OptimizerConfig, RunConfig, load_config
from tunesmith.errors import ConfigError, VerificationError
from tunesmith.hardware import Hardware
from tunesmith.models.fuse import set_policies
from tunesmith.models.row_dropout import step_seed
from tunesmith.training import rounding
from tunesmith.training.optimizers import Optimizer, make_optimizer
from tunesmith.training.rounding import RoundedWeights, slice_seed, stochastic_round_
from tunesmith.types import LayerPolicy
from tunesmith.workflows.setups import training_dtype
from tunesmith.workflows.train import TrainingSession, restart, start

Configure = Callable[..., RunConfig]
Session = Callable[..., TrainingSession]

OFF = torch.amp.GradScaler("cpu", enabled=False)
NAMES = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
FULL_BF16 = ("method=full", "model.dtype=bf16", "optimizer.weights_dtype=bf16")

pytestmark = pytest.mark.filterwarnings("ignore:.*aged.*")


def rounded(values: torch.Tensor, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """`values` (fp32) after stochastic rounding on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.empty(values.shape, dtype=torch.int32, device=device).random_(0, 2**16, generator=generator)
    found = values.to(device, copy=True)
    stochastic_round_(found, noise, torch.empty(values.shape, dtype=torch.bool, device=device))
    return found.cpu()


def ulp(value: float) -> float:
    """The distance of bf16's neighbours around `value`."""
    return 2.0 ** (math.floor(math.log2(abs(value))) - 7)


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [1.0 + 1e-4, -1.0 - 1e-4, 0.02, -3.3e-5, 255.9, 1 / 3, 1e30, 1.999, 1.5e-39])
def test_the_expectation_is_the_value(value: float, device: str) -> None:
    """The mean of n draws is within five standard errors; each is one of the two neighbours."""
    n = 200_000
    x = torch.full((n,), value)
    found = rounded(x, device=device).double()
    exact = float(x[0].double())
    below, above = sorted(set(found.tolist()))
    step = 2.0**-133 if abs(value) < 2**-126 else ulp(value)
    assert above - below == step
    assert below < exact < above
    up = (exact - below) / step
    assert abs(float(found.mean()) - exact) < 5 * step * math.sqrt(up * (1 - up) / n)


def test_the_probability_is_exact_for_every_distance() -> None:
    """Of the 2^16 values of the noise exactly f send a value up whose lower half is f."""
    noise = torch.arange(2**16, dtype=torch.int32)
    for fraction in (0, 1, 2, 777, 2**15, 2**16 - 1):
        values = torch.full((2**16,), 0x3F800000 + fraction, dtype=torch.int32).view(torch.float32)
        stochastic_round_(values, noise.clone(), torch.empty(2**16, dtype=torch.bool))
        assert int((values > 1.0).sum()) == fraction
        assert set(values.tolist()) <= {1.0, 1.0078125}


@pytest.mark.parametrize("device", DEVICES)
def test_what_bf16_has_is_never_changed(device: str) -> None:
    """Every finite bf16 number, both zeros and infinities, bit for bit; NaN stays NaN whatever its bits."""
    bits = torch.arange(2**16, dtype=torch.int32)
    everything = (bits << 16).view(torch.float32)
    finite = ~everything.isnan()
    for seed in range(3):
        found = rounded(everything, seed, device)
        assert torch.equal(found[finite].view(torch.int32), everything[finite].view(torch.int32))
        assert bool(found[~finite].isnan().all())
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert bool(nans.isnan().all())
    for seed in range(20):
        assert bool(rounded(nans, seed, device).isnan().all())


def test_the_result_is_a_bf16_number() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    found = rounded(x)
    assert torch.equal(found, found.bfloat16().float())
    assert bool(((found - x).abs() < 2.0**-7 * x.abs()).all())


def test_noise_is_a_function_of_seed_tensor_and_slice() -> None:
    seeds = {
        slice_seed(step_seed(seed, step), name, start)
        for seed in (0, 1)
        for step in (0, 1)
        for name in ("a", "b")
        for start in (0, 256)
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert slice_seed(5, "model.norm.weight", 0) == 0x700A78FEAF39C368


# -- the optimizer ----------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(96, 100), nn.LayerNorm(100), nn.Linear(100, 48, bias=False)).to(device, dtype)


def optimizer_of(model: nn.Module, name: str = "adamw", lr: float = 1e-3, **options: Any) -> Optimizer:
    return make_optimizer(model, OptimizerConfig(name=name, **options), lr)  # type: ignore[arg-type]


def bf16_optimizer(model: nn.Module, name: str = "adamw", lr: float = 1e-3, **options: Any) -> Optimizer:
    return optimizer_of(model, name, lr, weights_dtype="bf16", **options)


def set_gradients(model: nn.Module, step: int, scale: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        gradient = scale * torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.bfloat16().to(parameter)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def states(optimizer: Optimizer) -> list[torch.Tensor]:
    in_order = [optimizer.inner.state[p] for group in optimizer.param_groups for p in group["params"]]
    found = [state[key] for state in in_order for key in sorted(state)]
    return [value.clone() for value in found if isinstance(value, torch.Tensor)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stepped", [2**24, 4864, 256])
def test_a_step_is_that_of_fp32_weights_rounded_to_a_neighbour(
    name: str, stepped: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same weights and states the update is the usual one's; the weight that results is next to it.

    Slices and buckets of any size change nothing, if none has fewer than 4,096 values, whose states bitsandbytes keeps in fp32.
    """
    if stepped == 256 and "8bit" in name:
        pytest.skip("states in fp32 instead of 8 bits")
    monkeypatch.setattr(rounding, "STEPPED_VALUES", stepped)
    ours, theirs = network(device=device), network(torch.float32, device)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    options = {"weight_decay": 0.1, "betas": (0.9, 0.95)}
    optimizer, usual = bf16_optimizer(ours, name, **options), optimizer_of(theirs, name, **options)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        with torch.no_grad():
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                other.copy_(mine)  # states are the same; the weights that are stepped from too
        norm = optimizer.step(OFF, 0.1, rounding_seed=step)
        expected = usual.step(OFF, 0.1)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        assert norm.dtype == torch.float32
        moved = 0
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            exact = other.detach().double()
            distance = (mine.detach().double() - exact).abs()
            assert bool((distance <= 2.0**-7 * exact.abs() + 1e-9).all())
            moved += int((mine.detach().float() != other).sum())
        assert moved > 1000, "most results lie between two neighbours"
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_states_are_what_the_optimizers_name_says(name: str) -> None:
    model = network()
    optimizer = bf16_optimizer(model, name)
    optimizer.allocate()
    first = optimizer.inner.state[optimizer.inner.param_groups[0]["params"][0]]
    moments = [first[key] for key in ("exp_avg", "exp_avg_sq", "state1", "state2") if key in first]
    assert [(moment.dtype, moment.numel()) for moment in moments] == 2 * [
        (torch.uint8 if "8bit" in name else torch.float32, 9600)
    ]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups] == [9600 + 4800, 300]
    held = {p.untyped_storage().data_ptr() for group in optimizer.param_groups for p in group["params"]}
    assert len(held) == 1, "stand-ins have no memory"


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_small_updates_arrive_on_average(name: str) -> None:
    """Each step moves a weight of 1 by 1e-4; the next bf16 numbers are 78 and 39 times as far. Nearest rounding never moves."""
    weight = nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
    model = nn.Module()
    model.weight = weight
    optimizer = bf16_optimizer(model, name, lr=1e-4, weight_decay=0.0)
    steps = 50
    for step in range(steps):
        weight.grad = torch.full_like(weight, 1e-2)
        optimizer.step(OFF, 1e9, rounding_seed=step_seed(0, step))
    mean = float(weight.detach().double().mean())
    expected = 1 - steps * 1e-4
    # Below 1 the neighbours are 2^-8 apart: each step of each of n weights varies by at most 1e-4 · 2^-8.
    deviation = math.sqrt(steps * 1e-4 * 2.0**-8 / weight.numel())
    assert abs(mean - expected) < 5 * deviation + (2e-5 if "8bit" in name else 0)
    nearest = torch.ones(64, 256, dtype=torch.bfloat16)
    for _ in range(steps):
        nearest -= 1e-4
    assert float(nearest.double().mean()) == 1.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_steps_repeat_by_seed_and_draw_from_no_other_generator(name: str, device: str) -> None:
    def run(seed: int, noise: int, first_name: str = "0") -> list[torch.Tensor]:
        torch.manual_seed(noise)
        model = nn.ModuleDict({first_name: network(device=device)})
        before = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])
        optimizer = bf16_optimizer(model, name)
        for step in range(3):
            set_gradients(model, step)
            optimizer.step(OFF, 1.0, rounding_seed=step_seed(seed, step))
        after = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])
        assert equal([*after], [*before])
        return weights(model)

    first = run(1, 10)
    assert equal(first, run(1, 20))
    assert not equal(first, run(2, 10))
    assert not equal(first, run(1, 10, "other")), "the noise is the tensor's"


def test_the_noise_of_steps_and_tensors_differs() -> None:
    """Two tensors with the same values and gradients are rounded apart, and so is one in the next step."""
    model = nn.Module()
    for name in ("a", "b"):
        setattr(model, name, nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16)))
    optimizer = bf16_optimizer(model, lr=1e-3, weight_decay=0.0, betas=(0.0, 0.0))
    seen = []
    for step in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
                parameter.grad = torch.ones_like(parameter)
        optimizer.step(OFF, 1e9, rounding_seed=step_seed(0, step))
        seen += weights(model)
    for index, one in enumerate(seen):
        assert 0.15 < float((one != 1).double().mean()) < 0.37, "1e-3 of 2^-8"
        assert not any(torch.equal(one, other) for other in seen[:index])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_changes_nothing(name: str, value: float, device: str) -> None:
    model = network(device=device)
    optimizer = bf16_optimizer(model, name)
    set_gradients(model, 0)
    optimizer.step(OFF, 1.0, rounding_seed=0)
    before, moments = weights(model), states(optimizer)
    set_gradients(model, 1)
    next(model.parameters()).grad[0, 0] = value  # type: ignore[index]

    def judge(norm: torch.Tensor) -> torch.Tensor:
        return (~torch.isfinite(norm)).float()

    norm = optimizer.step(OFF, 1.0, judge, rounding_seed=1)
    assert not math.isfinite(norm)
    assert equal(weights(model), before)
    assert equal(states(optimizer), moments)
    assert all(parameter.grad is None for parameter in model.parameters())
    set_gradients(model, 2)
    optimizer.step(OFF, 1.0, judge, rounding_seed=2)
    assert not equal(weights(model), before)


def test_a_tensor_without_a_gradient_stays_with_its_states() -> None:
    model = network()
    optimizer = bf16_optimizer(model)
    set_gradients(model, 0)
    model[0].weight.grad = None
    before = weights(model)
    optimizer.step(OFF, 1.0, rounding_seed=0)
    after = weights(model)
    assert torch.equal(before[0], after[0])
    assert not any(torch.equal(one, other) for one, other in zip(before[4:], after[4:], strict=True))


def test_weights_that_are_in_fp32_stay_exact() -> None:
    """transformers keeps some parameters in fp32 whatever is asked for: they are stepped as they would be alone."""
    model, alone = network(), network(torch.float32)
    model[1].float()
    with torch.no_grad():
        for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
            other.copy_(mine)
    optimizer, usual = bf16_optimizer(model), optimizer_of(alone)
    for each in (model, alone):
        set_gradients(each, 0)
    optimizer.step(OFF, 1e9, rounding_seed=0)
    usual.step(OFF, 1e9)
    assert torch.equal(model[1].weight, alone[1].weight)
    assert model[1].weight.dtype == torch.float32


def test_a_step_needs_a_seed() -> None:
    model = network()
    set_gradients(model, 0)
    with pytest.raises(ValueError, match="pass rounding_seed, another one in every step"):
        bf16_optimizer(model).step(OFF, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_step_does_not_wait_for_the_gpu(name: str) -> None:
    """Nor for 8-bit states, once somebody has said that the step may be taken."""

    def judge(norm: torch.Tensor) -> torch.Tensor:
        return (~norm.isfinite()).float()

    model = network(device="cuda")
    optimizer = bf16_optimizer(model, name)
    optimizer.allocate()
    for step in range(2):
        set_gradients(model, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step(OFF, 1.0, judge if name == "adamw" else None, rounding_seed=step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_workspace_is_bounded_and_taken_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "STEPPED_VALUES", 1024)
    model = network()
    optimizer = bf16_optimizer(model)
    optimizer.allocate()
    taken: list[int] = []
    fails_at = [0]
    empty = torch.empty

    def count(size: int, *args: Any, **options: Any) -> torch.Tensor:
        taken.append(size * options.get("dtype", torch.float32).itemsize)
        if len(taken) == fails_at[0]:
            raise torch.OutOfMemoryError("none left")
        return empty(size, *args, **options)

    monkeypatch.setattr(torch, "empty", count)
    for fails_at[0] in (1, 2, 3):
        taken.clear()
        set_gradients(model, 0)
        before, moments = weights(model), states(optimizer)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(OFF, 1.0, lambda norm: pytest.fail("the norm was remembered"), rounding_seed=0)
        assert equal(weights(model), before)
        assert equal(states(optimizer), moments)
    fails_at[0] = 0
    taken.clear()
    optimizer.step(OFF, 1.0, rounding_seed=0)
    assert sum(taken) == 9 * 1024


@pytest.mark.parametrize(("count", "error"), [(2, 0.002), (16, 0.005), (64, 0.01), (256, 0.044)])
def test_what_adding_gradients_up_in_bf16_costs(count: int, error: float) -> None:
    """As the docstrings say: a share of the norm, of gradients that are alike (mean three times their spread)."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(50_000, dtype=torch.bfloat16))
    exact = torch.zeros(50_000, dtype=torch.float64)
    for _ in range(count):
        gradient = (3 + torch.randn(50_000, generator=generator)).bfloat16()
        (weight * gradient).sum().backward()
        exact += gradient.double()
    assert weight.grad is not None
    found = float((weight.grad.double() - exact).norm() / exact.norm())
    assert 0.75 * error < found < error


# -- runs -------------------------------------------------------------------------------------------------------------


def losses(session: TrainingSession) -> list[float]:
    return [event["loss"] for event in session.run.events() if event["event"] == "step"]


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_loss_falls_as_with_fp32_weights(session: Session, engine: str, name: str) -> None:
    """Three micro-batches a step, 24 steps: within 5% of fp32 weights' at the end."""
    found = {}
    for dtype in ("fp32", "bf16"):
        run = session(
            *FULL_BF16, f"optimizer.weights_dtype={dtype}", f"model.engine={engine}", f"optimizer.name={name}",
            "optimizer.lr=2e-3", "training.epochs=8", "training.micro_batch_size=3",
        )  # fmt: skip
        assert {parameter.dtype for parameter in run.forward.model.parameters()} == {
            torch.bfloat16 if dtype == "bf16" else torch.float32
        }
        run.train()
        found[dtype] = losses(run)
    assert len(found["bf16"]) == 24
    assert found["bf16"][-1] < 0.7 * found["bf16"][0]
    assert found["bf16"][-1] == pytest.approx(found["fp32"][-1], rel=0.05)


def test_nearest_rounding_stalls_where_stochastic_rounding_learns(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        *FULL_BF16, "optimizer.lr=1e-4", "training.epochs=30", "optimizer.schedule=constant", "optimizer.warmup_ratio=0",
    )  # fmt: skip
    falls = {}
    for how in ("fp32", "stochastic", "nearest"):
        if how == "nearest":
            monkeypatch.setattr(
                rounding, "stochastic_round_", lambda values, noise, is_nan: values.copy_(values.bfloat16().float())
            )
        run = session(*settings, f"optimizer.weights_dtype={'fp32' if how == 'fp32' else 'bf16'}")
        stuck = pytest.raises(VerificationError, match=r"5 of 21 trainable tensors have not moved at all .*layernorm")
        with stuck if how == "nearest" else nullcontext():
            run.train()
        found = losses(run)
        falls[how] = sum(found[:3]) / 3 - sum(found[-3:]) / 3
    assert falls["stochastic"] == pytest.approx(falls["fp32"], rel=0.1)
    assert falls["nearest"] < 0.5 * falls["fp32"]


@pytest.mark.parametrize("seed", [3407, 5])
def test_each_step_of_a_run_rounds_by_its_own_seed(
    session: Session, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    step = RoundedWeights.step

    def spy(self: RoundedWeights, inner: Any, work: Any, seed: int, *rest: Any) -> None:
        seen.append(seed)
        step(self, inner, work, seed, *rest)

    monkeypatch.setattr(RoundedWeights, "step", spy)
    session(*FULL_BF16, f"training.seed={seed}", "training.epochs=2").train()
    assert seen == [step_seed(seed, number) for number in range(6)]


class StopAt(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_identical(
    configure: Configure, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "STEPPED_VALUES", 4096)  # so that tensors are cut
    config = configure(*FULL_BF16, f"optimizer.name={name}", "training.save_every=2", "training.epochs=2")
    reference = start(config, tmp_path / "whole")
    reference.train()
    crashing = start(config, tmp_path / "crashed")

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise StopAt

    with pytest.raises(StopAt):
        crashing.train(crash)
    saved = load_file(crashing.run.checkpoints()[-1][1] / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    torch.manual_seed(999)
    again = restart(tmp_path / "crashed")
    again.train()
    assert losses(crashing) == losses(reference)
    mine, theirs = (load_file(each.run.model_path / "model.safetensors") for each in (crashing, reference))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert equal(states(again.optimizer), states(reference.optimizer))


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_saved_model_is_bf16_and_reloads_with_equal_logits(
    session: Session, tmp_path: Path, engine: str, tied: bool
) -> None:
    model = make_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    run = session(*FULL_BF16, f"model.engine={engine}", "training.epochs=1", model=model)
    run.train()
    folder = run.run.model_path
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    saved = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    trained = dict(run.forward.model.named_parameters())
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    assert next(again.parameters()).dtype == torch.bfloat16
    mine = copy.deepcopy(run.forward.base) if engine == "reference" else run.forward.base
    if engine == "fused":
        from tunesmith.models.fuse import unfuse

        unfuse(mine)
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        assert torch.equal(mine.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)


def test_gradients_of_both_engines_agree_with_fp32(session: Session) -> None:
    """Of bf16 weights, against fp32 products of the same weights: both engines are as far from them."""
    from tunesmith.data.batches import make_batch

    gradients: dict[str, torch.Tensor] = {}
    for way in ("fp32", "reference", "fused"):
        run = session(*FULL_BF16, f"model.engine={'reference' if way == 'fp32' else way}")
        model = run.forward.model
        if way == "fp32":
            model.float()
            run.forward.dtype = "fp32"
        batch = make_batch(run.data.train[:4], False, 0, "cpu")
        with run.forward.autocast():
            run.objective.terms(run.forward, batch)[0].sum.backward()
        found = [parameter.grad for _, parameter in sorted(model.named_parameters())]
        assert {gradient.dtype for gradient in found} == {torch.float32 if way == "fp32" else torch.bfloat16}
        gradients[way] = torch.cat([gradient.double().flatten() for gradient in found])
    exact = gradients["fp32"]
    errors = {way: float((gradients[way] - exact).norm() / exact.norm()) for way in ("reference", "fused")}
    assert errors["reference"] < 0.03
    assert errors["fused"] < 1.2 * errors["reference"]


def test_an_mlp_in_pieces_sums_its_gradients_in_fp32(session: Session) -> None:
    """Of one token each. Added up in bf16 they would be off by 2%; in fp32 they are rounded once, as those of the whole are."""
    from tunesmith.data.batches import make_batch

    run = session(*FULL_BF16, "model.engine=fused")
    batch = make_batch(run.data.train[:4], False, 0, "cpu")
    found = []
    for rows in (None, 1):
        set_policies(run.forward.model, [LayerPolicy(keep=frozenset(), mlp_rows=rows)] * 2)
        run.optimizer.reset()
        with run.forward.autocast():
            run.objective.terms(run.forward, batch)[0].sum.backward()
        matrices = [p for name, p in run.forward.model.named_parameters() if ".mlp." in name]
        assert len(matrices) == 6
        found.append(torch.cat([p.grad.double().flatten() for p in matrices if p.grad is not None]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.002


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_refuse_it(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"method={method}", "optimizer.weights_dtype=bf16"])
    assert (
        f"optimizer.weights_dtype bf16 has no effect with method: {method}, whose adapter trains in fp32; remove it, or set "
        "method: full"
    ) in str(caught.value)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_compute_types_refuse_it(dtype: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["method=full", f"model.dtype={dtype}", "optimizer.weights_dtype=bf16"])
    assert (
        f"optimizer.weights_dtype bf16 needs a model that computes in bf16, and model.dtype is {dtype}; set model.dtype: bf16 "
        "where the device has it, or remove optimizer.weights_dtype"
    ) in str(caught.value)


def test_a_device_without_bf16_refuses_it() -> None:
    config = load_config(None, ["method=full", "optimizer.weights_dtype=bf16"])
    t4 = Hardware("cuda:0", "Tesla T4", 15.0, False, (7, 5))
    with pytest.raises(ConfigError, match=r"model\.dtype is auto, which is fp16 on Tesla T4; set model\.dtype: bf16"):
        training_dtype(config, t4)
    assert training_dtype(config, Hardware("cuda:0", "H100", 80.0, True, (9, 0))) == "bf16"
    assert training_dtype(load_config(None, ["method=full"]), t4) == "fp16"
