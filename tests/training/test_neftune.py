"""NEFTune: the noise of the paper's size, in training only, and the same however a step is split, on both engines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import make_tiny_model
from training.test_row_dropout import SEED, assert_another_mask, difference, parts_of, step_of
from tunesmith.config import RunConfig
from tunesmith.data.batches import make_batch
from tunesmith.errors import ConfigError
from tunesmith.kernels.noise import uniform_ref
from tunesmith.models.fuse import Engine, engine_of
from tunesmith.models.neftune import STREAM, add_noise
from tunesmith.models.row_dropout import step_seed
from tunesmith.runs import RunFolder
from tunesmith.training import graphs as training_graphs
from tunesmith.workflows.train import TrainingSession, restart, start

Configure = Callable[..., RunConfig]
Session = Callable[..., TrainingSession]

NOISE = "training.neftune_alpha=10"
ENGINES = {
    "reference": ("model.engine=reference", "memory.mode=fast"),
    "reference, checkpointed": ("model.engine=reference", "memory.mode=min"),
    "fused": ("model.engine=fused", "memory.mode=fast"),
    "fused, recomputed": ("model.engine=fused", "memory.mode=min"),
}


def noise_of(run: TrainingSession, examples: Any, packing: bool) -> list[torch.Tensor]:
    """What is added to each example's embeddings, (L, D)."""
    batch = make_batch(examples, packing, 0, "cpu", dropout_rows=True)
    run.forward.dropout_seed = SEED
    run.forward.model.train()
    plain = run.forward.base.get_input_embeddings()(batch.input_ids)
    added = (run.forward._inputs(batch)["inputs_embeds"] - plain).detach()
    lengths = [len(example) for example in examples]
    if packing:
        return list(added[0].split(lengths))
    assert not any(added[row, length:].any() for row, length in enumerate(lengths)), "padding has none"
    return [added[row, :length] for row, length in enumerate(lengths)]


def test_noise_is_of_the_papers_size_by_the_length_of_each_document(session: Session) -> None:
    run = session(NOISE)
    examples = run.data.train[:6]
    lengths = {len(example) for example in examples}
    assert len(lengths) > 2
    packed, padded = noise_of(run, examples, True), noise_of(run, examples, False)
    alone = [noise_of(run, [example], False)[0] for example in examples]
    for example, found, other, third in zip(examples, packed, padded, alone, strict=True):
        bound = 10 / math.sqrt(len(example) * 32)
        assert 0.98 * bound < found.abs().max() <= 1.0001 * bound
        assert abs(found.std() / (bound / math.sqrt(3)) - 1) < 0.05
        for again in (other, third):
            torch.testing.assert_close(again, found, rtol=0, atol=1e-6)


def test_noise_is_that_of_the_row_the_position_and_the_step(session: Session) -> None:
    run = session(NOISE)
    batch = make_batch(run.data.train[:1], False, 0, "cpu", dropout_rows=True)
    assert batch.dropout_rows is not None
    (found,) = noise_of(run, run.data.train[:1], False)
    expected = uniform_ref(32, SEED, STREAM, batch.dropout_rows) * 10 / math.sqrt(len(found) * 32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_is_the_same_however_it_is_split(session: Session, engine: str) -> None:
    run = session(NOISE, "adapter.dropout=0.1", *ENGINES[engine])
    run.forward.model.train()
    examples = run.data.train[:8]
    whole = step_of(run, [examples])
    for packing, size in itertools.product((True, False), (8, 3, 1)):
        found = step_of(run, parts_of(examples, size, packing), packing)
        assert difference(found, whole) < 2e-6, f"micro-batches of {size}, packing {packing}"
    assert difference(step_of(run, parts_of(examples, 2), ranks=2), whole) < 2e-6
    assert_another_mask(step_of(run, [examples], seed=step_seed(3407, 6)), whole)


def test_both_engines_and_all_plans_have_the_same_noise(session: Session) -> None:
    runs = [session(NOISE, *settings) for settings in ENGINES.values()]
    steps = []
    for run in runs:
        run.forward.model.train()
        steps.append(step_of(run, [run.data.train[:8]]))
    assert [engine_of(run.forward.model) is not None for run in runs] == [False, False, True, True]
    for found in steps[1:]:
        assert difference(found, steps[0]) < 5e-6
    plain = session()
    plain.forward.model.train()
    assert_another_mask(step_of(plain, [plain.data.train[:8]]), steps[0])


def test_gradients_pass_through_to_embeddings_that_train(session: Session) -> None:
    """dx = dy: a row's gradient is the sum of those of its tokens."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    lengths, rows = torch.tensor([3, 3, 3, 2, 2, 0]), torch.arange(6)
    weight = torch.randn(2, 3, 8)
    (add_noise(x, 5.0, lengths, SEED, rows) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)
    run = session(NOISE, "method=full")
    run.forward.model.train()
    _, gradients = step_of(run, [run.data.train[:4]])
    assert gradients["model.embed_tokens.weight"].norm() > 0


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_has_none(session: Session, packing: bool) -> None:
    run, plain = session(NOISE), session()
    batch = make_batch(run.data.train[:4], packing, 0, "cpu", dropout_rows=True)
    run.forward.dropout_seed = SEED
    run.forward.model.eval()
    plain.forward.model.eval()
    with torch.no_grad():
        assert torch.equal(run.forward.hidden(batch), plain.forward.hidden(batch))
        run.forward.model.train()
        assert not torch.allclose(run.forward.hidden(batch), plain.forward.hidden(batch), atol=1e-3)


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["event"] == "step"]


def test_a_run_repeats_and_resumes_with_the_same_noise(configure: Configure, tmp_path: Path) -> None:
    config = configure(NOISE, "training.epochs=4", "training.save_every=4")
    run = start(config, tmp_path / "whole")
    run.train()
    assert losses(run.run)[-1] < losses(run.run)[0]

    class Crash(Exception):
        pass

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 6:
            raise Crash

    crashed = start(config, tmp_path / "crashed")
    with pytest.raises(Crash):
        crashed.train(crash)
    restart(tmp_path / "crashed").train()
    assert losses(crashed.run) == losses(run.run)
    other = start(
        configure(NOISE, "training.epochs=4", "training.micro_batch_size=2", "data.packing=true"), tmp_path / "other"
    )
    other.train()
    assert losses(other.run) == pytest.approx(losses(run.run), rel=1e-4)
    plain = start(configure("training.epochs=4"), tmp_path / "plain")
    plain.train()
    assert abs(losses(plain.run)[0] - losses(run.run)[0]) > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3", "phi3"])
def test_families_that_scale_their_embeddings_take_them_too(configure: Configure, tmp_path: Path, family: str) -> None:
    """Without noise a forward from embeddings is the same as from ids."""
    settings = {"attn_logit_softcapping": None} if family == "gemma2" else {}
    base = make_tiny_model(tmp_path / "base", family=family, **settings)
    run = start(configure("training.neftune_alpha=1e-12", model=base), tmp_path / "run")
    batch = make_batch(run.data.train[:4], True, 0, "cpu", dropout_rows=True)
    run.forward.model.train()
    plain = run.forward.hidden(batch)
    run.forward.dropout_seed = SEED
    assert "inputs_embeds" in run.forward._inputs(batch)
    torch.testing.assert_close(run.forward.hidden(batch), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "graphs"),
    [
        ("training.neftune_alpha=0", True),
        (NOISE, False),
        ("adapter.modules_to_save=[norm]", False),
        ("adapter.new_tokens=[kitchen]", False),
    ],
)
def test_no_graph_repeats_a_steps_noise(
    session: Session, monkeypatch: pytest.MonkeyPatch, setting: str, graphs: bool
) -> None:
    """Nor writes gradients that do not stay in place."""
    run = session(setting, "model.engine=fused")
    run.optimizer.connect(engine_of(run.forward.model))
    run.forward.device = "cuda"  # looked at, but not used
    monkeypatch.setattr(Engine, "capturable", True)  # its attention is, on a GPU
    monkeypatch.setattr(training_graphs, "GraphedMicroBatches", lambda *_: "graphs")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = training_graphs.micro_batch_graphs(run.config, run.forward, run.objective, run.optimizer, scaler, print)
    assert found == ("graphs" if graphs else None)


def test_a_negative_alpha_is_refused(configure: Configure) -> None:
    with pytest.raises(
        ConfigError, match=r"`training\.neftune_alpha` is -1: input should be greater than or equal to 0"
    ):
        configure("training.neftune_alpha=-1")
