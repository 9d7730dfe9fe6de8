"""Runs with the fused engine beside the same runs with the reference engine, on the CPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import make_tiny_model
from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, VerificationError
from tunesmith.hardware import Hardware
from tunesmith.models import linear_group
from tunesmith.models.fuse import FusedLayer, engine_of
from tunesmith.runs import RunFolder
from tunesmith.training.prepare import check_fused
from tunesmith.types import LAYER_TENSORS, LayerPolicy
from tunesmith.workflows import run_plan as planning
from tunesmith.workflows.train import TrainingSession, restart, start

Session = Callable[..., TrainingSession]
Configure = Callable[..., RunConfig]

FUSED = "model.engine=fused"
SHORT = ("optimizer.lr=1e-3", "training.max_steps=5")
BUDGET = ("data.packing=true", "data.max_seq_length=256", "training.micro_batch_tokens=256")
WAYS = {
    "padded": (),
    "packed": ("data.packing=true",),
    "steps of tokens": (*BUDGET, "training.batch_tokens=768", "training.batch_size=16"),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose rows fill NF4's blocks of 64."""
    return make_tiny_model(tmp_path_factory.mktemp("wide") / "qwen2", family="qwen2", hidden=64)


def events(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


def curve(session: TrainingSession, key: str = "loss") -> list[float]:
    return [event[key] for event in events(session.run, "step")]


def trained(session: TrainingSession) -> TrainingSession:
    session.train()
    return session


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    folder = run.adapter_path if run.adapter_path.is_dir() else run.model_path
    return load_file(next(folder.glob("*model.safetensors")))


def assert_alike(fused: TrainingSession, reference: TrainingSession, rel: float = 1e-5) -> None:
    """Same losses and gradient norms, and saved weights that have moved the same way."""
    assert (fused.plan.memory.engine, reference.plan.memory.engine) == ("fused", "reference")
    assert curve(fused) == pytest.approx(curve(reference), rel=rel)
    assert curve(fused, "grad_norm") == pytest.approx(curve(reference, "grad_norm"), rel=10 * rel)
    assert len(set(curve(fused))) == len(curve(fused)) == 5
    ours, theirs = weights(fused.run), weights(reference.run)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # Adam's first steps are signs: an element whose gradient is a rounding error may go either way.
        assert (ours[name] - value).norm() < 2e-3 * value.norm() + 1e-6, name


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_losses_are_the_reference_engines(session: Session, wide: Path, method: str, way: str) -> None:
    settings = (f"method={method}", *WAYS[way], *SHORT)
    reference = trained(session(*settings, "model.engine=reference", model=wide))
    fused = trained(session(*settings, FUSED, model=wide))
    assert_alike(fused, reference)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("phi3", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 8}),
        ("gemma2", {"sliding_window": 8, "final_logit_softcapping": 1.0, "attn_logit_softcapping": None}),
    ],
)
def test_losses_of_other_families(session: Session, tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    model = make_tiny_model(tmp_path / family, family=family, **settings)
    ways = (*SHORT, *WAYS["packed"])
    reference = trained(session(*ways, "model.engine=reference", model=model))
    assert_alike(trained(session(*ways, FUSED, model=model)), reference)


def test_evaluations_and_generated_answers_are_the_reference_engines(session: Session) -> None:
    settings = (
        *SHORT, "data.eval_path=HELD", "training.eval_every=2", "evaluation.generate=true", "evaluation.max_new_tokens=8"
    )  # fmt: skip
    reference, fused = trained(session(*settings)), trained(session(*settings, FUSED))
    found = [[event["metrics"] for event in events(run.run, "eval")] for run in (fused, reference)]
    assert len(found[0]) == len(found[1]) == 3
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert_alike(fused, reference)


def test_sixteen_bits(session: Session) -> None:
    settings = (*SHORT, *WAYS["packed"], "model.dtype=bf16")
    exact = trained(session(*SHORT, *WAYS["packed"]))
    reference, fused = trained(session(*settings)), trained(session(*settings, FUSED))
    assert curve(fused) == pytest.approx(curve(exact), rel=0.01)
    assert curve(fused, "grad_norm") == pytest.approx(curve(reference, "grad_norm"), rel=0.03)
    engine = engine_of(fused.forward.model)
    assert engine is not None
    assert {group.dtype for layer in engine.decoder.layers for group in layer.groups} == {torch.bfloat16}


def test_it_learns(session: Session) -> None:
    run = trained(session(FUSED, "training.epochs=30", "data.packing=true", "adapter.dropout=0.1"))
    losses = curve(run)
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


# -- memory plans -----------------------------------------------------------------------------------------------------


FOUR = "training.micro_batch_size=4"
"""Given, so that modes differ in what they keep alone: `min` would take one example at a time."""


def policies(session: TrainingSession) -> list[LayerPolicy]:
    engine = engine_of(session.forward.model)
    assert engine is not None
    assert all(isinstance(layer, FusedLayer) for layer in engine.decoder.layers)
    return [layer.policy for layer in engine.decoder.layers]


def test_memory_modes_change_the_plan_and_no_bit_of_a_loss(session: Session) -> None:
    fast = trained(session(*SHORT, FUSED, FOUR, "memory.mode=fast"))
    assert policies(fast) == [LayerPolicy()] * 2
    assert fast.plan.memory.predicted_peak_gb is not None

    least = trained(session(*SHORT, FUSED, FOUR, "memory.mode=min"))
    assert policies(least) == [LayerPolicy(keep=frozenset(), offload_input=True)] * 2
    assert least.plan.memory.predicted_peak_gb is not None
    assert least.plan.memory.predicted_peak_gb < fast.plan.memory.predicted_peak_gb
    assert curve(least) == curve(fast)

    # A cap between the two: something goes, not everything.
    cap = (0.7 * fast.plan.memory.predicted_peak_gb + 0.3 * least.plan.memory.predicted_peak_gb) / 0.9
    capped = trained(session(*SHORT, FUSED, FOUR, "memory.mode=auto", f"memory.limit_gb={cap}"))
    kept = [len(policy.keep) for policy in policies(capped)]
    assert policies(capped) == list(capped.plan.memory.policies)
    assert 0 < sum(kept) < 2 * len(LAYER_TENSORS)
    assert capped.plan.memory.predicted_peak_gb is not None
    assert capped.plan.memory.predicted_peak_gb <= 0.9 * cap
    assert curve(capped) == curve(fast)
    assert curve(capped, "grad_norm") == curve(fast, "grad_norm")
    ours, theirs = weights(capped.run), weights(fast.run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (beginning,) = events(capped.run, "start")
    assert "recompute gate_up of " in beginning["memory"]


def test_an_mlp_in_pieces(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(session(*SHORT, FUSED, *WAYS["packed"]))
    monkeypatch.setattr("tunesmith.memory.estimate.MLP_ROWS", 16)
    pieces = trained(session(*SHORT, FUSED, FOUR, *WAYS["packed"], "memory.mode=min"))
    rows = policies(pieces)[0].mlp_rows
    assert rows is not None
    assert rows >= 16
    assert curve(pieces) == pytest.approx(curve(whole), rel=1e-6)


# -- resume -----------------------------------------------------------------------------------------------------------


class StopAt(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("way", ["padded", "steps of tokens"])
def test_resume_is_bit_identical(configure: Configure, tmp_path: Path, optimizer: str, way: str) -> None:
    config = configure(
        FUSED, *WAYS[way], f"optimizer.name={optimizer}", "adapter.dropout=0.1", "training.epochs=2",
        "training.max_steps=6", "training.save_every=2", "data.eval_path=HELD", "training.eval_every=3",
    )  # fmt: skip
    reference = start(config, tmp_path / "whole")
    reference.train()
    total = len(curve(reference))
    crashing = start(config, tmp_path / "crashed")

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == total - 1:
            raise StopAt

    with pytest.raises(StopAt):
        crashing.train(crash)
    torch.manual_seed(999)  # whatever the new process's generator is, the checkpoint's takes over
    resumed = restart(tmp_path / "crashed")
    assert resumed.plan.memory.engine == "fused"
    resumed.train()
    for key in ("loss", "grad_norm"):
        assert curve(resumed, key) == curve(reference, key)
    ours, theirs = weights(resumed.run), weights(reference.run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    evaluated = [[event["metrics"] for event in events(run.run, "eval")] for run in (resumed, reference)]
    assert evaluated[0] == evaluated[1]


def test_dropout_is_seeded(session: Session) -> None:
    settings = (*SHORT, FUSED, "adapter.dropout=0.3")
    one, two = trained(session(*settings)), trained(session(*settings))
    other = trained(session(*settings, "training.seed=5"))
    plain = trained(session(*SHORT, FUSED))
    assert curve(one) == curve(two)
    assert curve(one)[0] == pytest.approx(curve(plain)[0], rel=1e-6), "B is zero before the first step"
    assert curve(one)[1:] != pytest.approx(curve(plain)[1:], rel=1e-6)
    assert curve(one) != curve(other)


# -- what is said, and what is refused --------------------------------------------------------------------------------


def test_the_engines_plan_is_in_the_events(session: Session) -> None:
    run = trained(session(*SHORT, FUSED, FOUR, "memory.mode=min"))
    (beginning,) = events(run.run, "start")
    assert beginning["engine"] == "fused"
    assert beginning["recompute_layers"] == 2
    plans = [e["message"] for e in events(run.run, "decision") if e["message"].startswith("fused engine")]
    assert [plan.splitlines() for plan in plans] == [
        [
            "fused engine: 2 of 2 layers (Llama)",
            "  weights    14 in the operand",
            "  adapters   14 LoRA projections, rank 16",
            "  attention  dense: math (no NVIDIA GPU); packed: math (no NVIDIA GPU)",
            "  kernels    PyTorch reference on cpu",
            "  policy     layers 0-1: recompute qkv, attention, middle, gate_up, input in host memory",
        ]
    ]


def test_auto_is_the_reference_engine_on_the_cpu(session: Session) -> None:
    run = trained(session("training.max_steps=1"))
    assert run.config.model.engine == "auto"
    assert events(run.run, "start")[0]["engine"] == "reference"
    assert engine_of(run.forward.model) is None


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("triton", [True, False])
def test_auto_is_the_fused_engine_on_a_gpu_with_triton(
    session: Session, monkeypatch: pytest.MonkeyPatch, method: str, triton: bool
) -> None:
    run = session(f"method={method}")
    card = Hardware("cuda:0", "a card", 80.0, True, (9, 0))
    if not triton:
        monkeypatch.setitem(sys.modules, "triton", None)
    assert planning._engine(run.config, run.forward, card) == ("fused" if triton else "reference")


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("olmo2", {}, "Olmo2DecoderLayer is not a known family"),
        ("llama", {"attention_dropout": 0.1}, "it has dropout on attention weights"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    configure: Configure, tmp_path: Path, family: str, settings: dict[str, Any], reason: str
) -> None:
    model = make_tiny_model(tmp_path / "model", family=family, **settings)
    with pytest.raises(ConfigError) as caught:
        start(configure(FUSED, model=model), tmp_path / "run")
    assert str(caught.value) == (f"model.engine is fused, but no layer of this model can be: {reason}; use auto")
    assert not (tmp_path / "run").exists()
    session = start(configure("training.max_steps=1", model=model), tmp_path / "run")
    session.train()
    assert math.isfinite(curve(session)[0])


def test_a_layer_that_computes_something_else_is_found_before_training(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.errors import ModelError
    from tunesmith.models import fused_layer

    check_fused(session(FUSED).forward)
    check_fused(session().forward)
    monkeypatch.setitem(fused_layer.ACTIVATIONS, "silu", "gelu_tanh")  # as if the family had changed under its name
    with pytest.raises(
        ModelError,
        match=r"^the fused layers of LlamaForCausalLM do not compute what the model's own do \(they differ by \d+\.\d%\); "
        r"set model.engine: reference, and report it$",
    ):
        session(FUSED)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_tensor_that_no_gradient_reaches_stops_the_run(
    session: Session, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Weight decay moves A all the same, so that a look at the weights would not find it."""
    run = session(FUSED, "training.epochs=1", "optimizer.weight_decay=0.1")
    name, stuck = next(
        (name, p) for name, p in run.forward.model.named_parameters() if f"layers.1.mlp.up_proj.{part}" in name
    )
    before, original = stuck.detach().clone(), linear_group.Gradients.add

    def add(self: Any, parameter: torch.Tensor, value: torch.Tensor, scale: float = 1.0) -> None:
        if parameter is not stuck:
            original(self, parameter, value, scale)

    monkeypatch.setattr(linear_group.Gradients, "add", add)
    with pytest.raises(VerificationError) as caught:
        run.train()
    if part == "lora_A":
        assert not torch.equal(stuck, before)
        assert str(caught.value).startswith(f"1 of 28 trainable tensors have not moved at all ({name})")
    else:  # and without B no gradient reaches its A, which is seen as zeros
        assert name in str(caught.value)


def test_gradients_go_straight_to_where_the_optimizer_reads_them(session: Session) -> None:
    run = trained(session(*SHORT, FUSED))
    engine = engine_of(run.forward.model)
    assert engine is not None
    (flat,) = run.optimizer.flats
    assert engine.sinks == [flat.sink]
    assert flat.reached == {id(p) for p in run.forward.model.parameters() if p.requires_grad}
    assert all(p.grad is None for p in run.forward.model.parameters())
