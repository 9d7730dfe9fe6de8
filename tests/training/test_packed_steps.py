"""Packing is exact: documents in a pack do not touch each other, and a step's gradient does not depend on its packs.

fp32 on the CPU, with the families whose attention differs most.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import make_tiny_model
from tunesmith.config import ModelConfig, TrainingConfig
from tunesmith.data.batches import StepOrder, deal, make_batch
from tunesmith.data.packing import best_fit
from tunesmith.hardware import probe
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import find_model, load_model
from tunesmith.training import loop
from tunesmith.training.loop import accumulate_gradients
from tunesmith.training.objectives import SupervisedFineTuning
from tunesmith.types import TokenizedExample

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases
    "qwen3": {},  # query and key norms
    "phi3": {},  # fused projections
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 1.0},
}
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
SFT = SupervisedFineTuning()

Gradients = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_tiny_model(root / name, family=name, **settings) for name, settings in FAMILIES.items()}


def forward_of(folder: Path) -> ModelForward:
    config = ModelConfig(name=str(folder))
    return ModelForward(load_model(find_model(config), config, probe("cpu"), "fp32").eval(), "cpu", "fp32")


def document(length: int, seed: int) -> TokenizedExample:
    rng = np.random.default_rng(seed)
    mask = rng.random(length) < 0.4
    mask[-1] = True
    return TokenizedExample(rng.integers(0, 256, length, np.int32), mask, line=seed, file="a.jsonl")


DOCUMENTS = [document(length, seed) for seed, length in enumerate((31, 5, 17, 2, 23, 9, 12, 44, 3, 28))]
LENGTHS = [len(example) for example in DOCUMENTS]


def logits_of(forward: ModelForward, pack: list[TokenizedExample]) -> list[torch.Tensor]:
    """Logits of each document of a pack."""
    with torch.no_grad():
        logits = forward.logits(forward.hidden(make_batch(pack, True, 0, "cpu")))[0]
    return list(logits.split([len(example) for example in pack]))


def step_of(
    forward: ModelForward, parts: list[list[TokenizedExample]], packing: bool = True, pad_id: int = 0
) -> tuple[float, Gradients]:
    """Loss and gradients of a step with these micro-batches."""
    forward.model.zero_grad()
    loss = accumulate_gradients(forward, SFT, parts, packing, pad_id, NO_SCALER)
    return float(loss), {name: p.grad.clone() for name, p in forward.model.named_parameters() if p.grad is not None}


def difference(found: Gradients, expected: Gradients) -> float:
    """The norm of the difference of all gradients over the norm of the expected ones."""
    assert found.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    return float(torch.stack([(found[name] - g).norm() for name, g in expected.items()]).norm() / norm)


def parts_of(bins: list[list[int]]) -> list[list[TokenizedExample]]:
    return [[DOCUMENTS[index] for index in part] for part in bins]


# -- one pack ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_document_changes_no_bit_of_another(folders: dict[str, Path], family: str) -> None:
    forward = forward_of(folders[family])
    pack = DOCUMENTS[:5]
    before = logits_of(forward, pack)
    for changed in range(len(pack)):
        other = document(len(pack[changed]), seed=100 + changed)
        after = logits_of(forward, [*pack[:changed], other, *pack[changed + 1 :]])
        for index, (one, two) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(one, two) == (index != changed), f"document {changed} was changed, {index} compared"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_in_a_pack_changes_nothing(folders: dict[str, Path], family: str) -> None:
    forward = forward_of(folders[family])
    pack = DOCUMENTS[:6]
    loss, gradients = step_of(forward, [pack])
    logits = logits_of(forward, pack)
    for seed in range(3):
        order = random.Random(seed).sample(range(len(pack)), len(pack))
        shuffled = [pack[index] for index in order]
        other_loss, other = step_of(forward, [shuffled])
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert difference(other, gradients) < 1e-6
        for index, found in zip(order, logits_of(forward, shuffled), strict=True):
            # Not bit for bit: where a document begins decides how its sums are cut into vectors (a few ulp).
            assert (found - logits[index]).norm() < 1e-6 * logits[index].norm()


# -- a step's packs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [44, 100, 1000])
def test_packed_and_unpacked_gradients_agree(folders: dict[str, Path], family: str, budget: int) -> None:
    forward = forward_of(folders[family])
    loss, alone = step_of(forward, [[example] for example in DOCUMENTS], packing=False)
    bins = best_fit(LENGTHS, budget)
    packed_loss, packed = step_of(forward, parts_of(bins))
    assert len(bins) == {44: 4, 100: 2, 1000: 1}[budget]
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert difference(packed, alone) < 2e-6
    assert all(gradient.norm() > 0 for gradient in packed.values())


def test_the_pad_token_changes_no_bit(folders: dict[str, Path]) -> None:
    forward = forward_of(folders["llama"])
    end = int(DOCUMENTS[0].input_ids[-1])
    assert any(end in example.input_ids[1:][example.loss_mask[1:]] for example in DOCUMENTS), "it is also supervised"
    loss, gradients = step_of(forward, [DOCUMENTS], packing=False, pad_id=0)
    other_loss, other = step_of(forward, [DOCUMENTS], packing=False, pad_id=end)
    assert other_loss == loss
    assert all(torch.equal(other[name], gradient) for name, gradient in gradients.items())


# -- ranks ------------------------------------------------------------------------------------------------------------

BY_EXAMPLES = TrainingConfig(batch_size=8, micro_batch_tokens=64, seed=1)
BY_TOKENS = TrainingConfig(batch_tokens=256, micro_batch_tokens=64, seed=1)
MANY = [document(2 + (37 * seed) % 60, seed) for seed in range(42)]


def step_on(
    forward: ModelForward, parts: list[list[TokenizedExample]], world_size: int, patch: pytest.MonkeyPatch
) -> tuple[float, Gradients]:
    """What all ranks of a step have together: their losses and gradients are added up, as an all-reduce would."""
    counts = SFT.counts(example for part in parts for example in part)
    forward.model.zero_grad()
    shares = [deal(parts, rank, world_size) for rank in range(world_size)]
    with patch.context() as reduced:
        reduced.setattr(loop, "global_counts", lambda _: counts)
        losses = [float(accumulate_gradients(forward, SFT, share, True, 0, NO_SCALER)) for share in shares]
    seen = [example.line for share in shares for part in share for example in part]
    assert sorted(seen) == sorted(example.line for part in parts for example in part)
    return sum(losses), {name: p.grad.clone() for name, p in forward.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [BY_EXAMPLES, BY_TOKENS], ids=["by examples", "by tokens"])
def test_a_step_is_the_same_at_any_world_size(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, training: TrainingConfig
) -> None:
    forward = forward_of(folders["qwen3"])
    order = StepOrder([len(example) for example in MANY], training, packing=True)
    sizes = []
    for number in range(order.steps_per_epoch):
        parts = [[MANY[index] for index in part] for part in order.step(number)]
        sizes.append(len(parts))
        loss, gradients = step_of(forward, parts)
        for world_size in (1, 2, 4, 8):
            found, summed = step_on(forward, parts, world_size, monkeypatch)
            assert found == pytest.approx(loss, rel=1e-6)
            assert difference(summed, gradients) < 1e-6
    assert min(sizes) < 4 or training is BY_EXAMPLES, "the last step has fewer micro-batches than ranks"
    assert max(sizes) == 4 or training is BY_EXAMPLES


@pytest.mark.parametrize("training", [BY_EXAMPLES, BY_TOKENS], ids=["by examples", "by tokens"])
def test_a_run_goes_on_at_another_world_size(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, training: TrainingConfig
) -> None:
    """Interrupted at any step under one world size, it goes on under another at the next document: one loss curve."""
    steps = 8

    def train(world_sizes: list[int]) -> tuple[list[float], list[list[int]]]:
        forward = forward_of(folders["llama"])
        optimizer = torch.optim.SGD(forward.model.parameters(), lr=0.5)
        losses, seen = [], []
        order = None
        for number, world_size in enumerate(world_sizes):
            if number == 0 or world_size != world_sizes[number - 1]:  # a new process: all it knows is the step
                order = StepOrder([len(example) for example in MANY], training, packing=True)
            assert order is not None
            parts = [[MANY[index] for index in part] for part in order.step(number)]
            loss, _ = step_on(forward, parts, world_size, monkeypatch)
            optimizer.step()
            losses.append(loss)
            seen.append([example.line for part in parts for example in part])
        return losses, seen

    losses, seen = train([1] * steps)
    per_epoch = StepOrder([len(example) for example in MANY], training, packing=True).steps_per_epoch
    assert per_epoch < steps, "an epoch ends on the way"
    assert sorted(itertools.chain(*seen[:per_epoch])) == list(range(42))
    assert train([1] * steps) == (losses, seen), "bit for bit at the same world size"
    for stop in (1, 3, per_epoch):
        found, found_seen = train([2] * stop + [4] * (steps - stop))
        assert found_seen == seen
        assert found == pytest.approx(losses, rel=1e-5)
    assert max(abs(a - b) for a, b in itertools.pairwise(losses)) > 1e-2, "the curve must move to mean anything"


def test_a_rank_without_a_micro_batch_has_a_gradient_of_zero(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = forward_of(folders["llama"])
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(forward.model.parameters(), lr=0.5)
    monkeypatch.setattr(loop, "global_counts", lambda counts: {"nll": 7 + counts["nll"]})
    assert float(accumulate_gradients(forward, SFT, [], True, 0, scaler)) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in forward.model.parameters())
    before = [p.detach().clone() for p in forward.model.parameters()]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(old, p) for old, p in zip(before, forward.model.parameters(), strict=True))


def test_ranks_without_torch_distributed() -> None:
    assert loop.rank_and_world_size() == (0, 1)
    assert loop.global_counts({"nll": 3, "pairs": 2}) == {"nll": 3, "pairs": 2}


def test_ranks_of_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_initialized": True, "get_rank": 3, "get_world_size": 8}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(8))
    assert loop.rank_and_world_size() == (3, 8)
    assert loop.global_counts({"nll": 3, "pairs": 2}) == {"nll": 24, "pairs": 16}
