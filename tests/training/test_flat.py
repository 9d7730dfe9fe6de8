"""Adapter tensors laid end to end train exactly as they do one by one, and nobody else notices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models_of import family_model
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from tunesmith.config import OptimizerConfig
from tunesmith.models.fuse import engine_of, fuse
from tunesmith.training.checkpoint import TrainState, load_checkpoint, load_weights, save_checkpoint
from tunesmith.training.flat import ALIGNMENT, FlatParameter, flatten
from tunesmith.training.optimizers import Optimizer, make_optimizer

OFF = torch.amp.GradScaler("cpu", enabled=False)
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


def tensors(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


class Owner(nn.Module):
    """Something with parameters; with `adapter` it passes for a PEFT model, whose tensors are laid end to end."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], adapter: bool):
        super().__init__()
        self.p = nn.ParameterList(tensors(shapes))
        if adapter:
            self.peft_config: dict[str, Any] = {}


def optimizer_of(owner: nn.Module, name: str = "adamw", decay: float = 0.1) -> Optimizer:
    return make_optimizer(owner, OptimizerConfig(name=name, weight_decay=decay), 1e-2)  # type: ignore[arg-type]


def steps(owner: nn.Module, optimizer: Optimizer, count: int, first: int = 0) -> None:
    """Steps with gradients and rates that depend on the step alone."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for parameter in owner.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.collect()
        optimizer.inner.step()
        optimizer.zero_grad()


def pair(shapes: Sequence[tuple[int, ...]], name: str) -> tuple[Owner, Owner]:
    """The same tensors after the same steps: one by one, and laid end to end."""
    apart, flat = Owner(shapes, adapter=False), Owner(shapes, adapter=True)
    for owner in (apart, flat):
        optimizer = optimizer_of(owner, name)
        assert len(optimizer.flats) == (0 if owner is apart else 1)
        steps(owner, optimizer, 12)
    return apart, flat


# -- the same training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit"])
@pytest.mark.filterwarnings("ignore:.*aged.*")
def test_a_flat_step_is_bit_identical_to_one_tensor_at_a_time(name: str) -> None:
    apart, flat = pair([(16, 64), (48, 16), (16, 1), (3, 32), (16, 257)], name)
    for one, other in zip(apart.p, flat.p, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(flat.p[0], tensors([(16, 64)])[0]), "nothing was trained"


def test_tensors_that_are_no_whole_vectors_differ_by_rounding_alone() -> None:
    """PyTorch's CPU kernel takes a tensor's last values one by one, where the flat parameter goes on with a vector."""
    apart, flat = pair([(1, 1), (3, 5), (7, 13), (1, 4101)], "adamw")
    for one, other in zip(apart.p, flat.p, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:.*aged.*")
def test_eight_bit_steps_are_bit_identical_from_4096_values_on(name: str) -> None:
    """bitsandbytes keeps the moments of fewer values in 32 bits; of more, in blocks that no two tensors share."""
    apart, flat = pair([(16, 256), (16, 260), (64, 75), (5, 1000)], name)
    for one, other in zip(apart.p, flat.p, strict=True):
        assert torch.equal(one, other)


def test_the_8_bit_blocks_are_as_long_as_the_alignment() -> None:
    owner = Owner([(16, 256), (16, 260)], adapter=True)
    optimizer = optimizer_of(owner, "adamw_8bit")
    steps(owner, optimizer, 1)
    (state,) = optimizer.inner.state.values()
    assert state["absmax1"].numel() * ALIGNMENT == optimizer.flats[0].value.numel() == 4096 + 17 * ALIGNMENT
    assert state["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit"])
@pytest.mark.filterwarnings("ignore:.*aged.*")
def test_padding_never_trains(name: str) -> None:
    """(bitsandbytes' 8-bit code on the CPU rounds a moment of zero to 2e-5 of its block's largest: there it drifts, unread.)"""
    owner = Owner([(3, 5), (16, 300), (1, 1)], adapter=True)
    optimizer = optimizer_of(owner, name)
    (flat,) = optimizer.flats
    held = torch.zeros(flat.value.numel(), dtype=torch.bool)
    for start, size in ((0, 15), (256, 4800), (256 + 19 * 256, 1)):
        held[start : start + size] = True
    assert flat.value.numel() == 256 + 19 * 256 + 256
    assert flat.value.detach()[held].count_nonzero() == held.sum()
    steps(owner, optimizer, 5)
    assert flat.value.detach()[~held].count_nonzero() == 0
    assert flat.value.detach()[held].count_nonzero() == held.sum()


def test_groups_keep_their_weight_decay() -> None:
    """Matrices decay; norms and biases do not, in a flat parameter of their own."""
    shapes = [(16, 32), (32,), (48, 16), (16,)]
    owner = Owner(shapes, adapter=True)
    optimizer = optimizer_of(owner, decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    matrices, vectors = optimizer.flats
    assert [tuple(t.shape) for t in matrices.tensors] == [(16, 32), (48, 16)]
    assert [tuple(t.shape) for t in vectors.tensors] == [(32,), (16,)]
    optimizer.collect()  # a gradient of zero: only decay moves anything
    optimizer.inner.step()
    for tensor, before in zip(owner.p, tensors(shapes), strict=True):
        expected = before * (1 - 1e-2 * 0.5) if tensor.ndim == 2 else before
        torch.testing.assert_close(tensor.data, expected.data, rtol=1e-6, atol=0)


def test_one_norm_alone_is_its_own_parameter() -> None:
    owner = Owner([(16, 32), (48, 16), (32,)], adapter=True)
    optimizer = optimizer_of(owner)
    (flat,) = optimizer.flats
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [[id(flat.value)], [id(owner.p[2])]]
    apart = Owner([(16, 32), (48, 16), (32,)], adapter=False)
    steps(apart, optimizer_of(apart), 4)
    steps(owner, optimizer, 4)
    assert all(torch.equal(one, other) for one, other in zip(apart.p, owner.p, strict=True))


def test_what_is_not_laid_end_to_end() -> None:
    assert flatten(tensors([(16, 32)])) is None, "one tensor"
    mixed = [*tensors([(16, 32)]), nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))]
    assert flatten(mixed) is None, "two types"
    large = [nn.Parameter(torch.empty(2**15, 2**15, device="meta")) for _ in range(2)]
    assert flatten(large) is None, "more than 2^30 values"
    assert optimizer_of(Owner([(16, 32), (48, 16)], adapter=False)).flats == [], "full fine-tuning"


# -- gradients --------------------------------------------------------------------------------------------------------


def test_sink_and_collect_add_up() -> None:
    a, b, c = tensors([(4, 6), (5, 3), (2, 2)])
    flat = FlatParameter([a, b, c])
    assert flat.value.grad is None
    assert flat.sink(a, torch.ones(4, 6), 0.5)
    b.grad = torch.full((5, 3), 2.0)
    flat.collect()
    assert b.grad is None
    a.grad = torch.full((4, 6), 3.0)
    wide = torch.full((5, 7), 4.0)
    assert flat.sink(b, wide[:, :3], 1.0), "a slice of a wider product"
    flat.collect()
    flat.collect()  # nothing is added twice
    gradient = flat.value.grad
    assert gradient is not None
    expected = torch.zeros(3 * ALIGNMENT)
    expected[:24], expected[ALIGNMENT : ALIGNMENT + 15] = 3.5, 6.0
    assert torch.equal(gradient, expected)
    assert [id(t) in flat.reached for t in (a, b, c)] == [True, True, False]


def test_a_stranger_is_not_taken() -> None:
    a, b, other = tensors([(4, 6), (5, 3), (4, 6)])
    flat = FlatParameter([a, b])
    assert flat.sink(other, torch.ones(4, 6), 1.0) is False
    assert flat.reached == set()
    assert flat.gradient_views()[id(a)].count_nonzero() == 0


def test_a_new_gradient_has_new_views() -> None:
    """Whoever drops or replaces the gradient gets what comes afterwards, not the views of the old one."""
    a, b = tensors([(4, 6), (5, 3)])
    flat = FlatParameter([a, b])
    flat.sink(a, torch.ones(4, 6), 1.0)
    old = flat.value.grad
    flat.value.grad = None
    flat.sink(a, torch.ones(4, 6), 2.0)
    assert flat.value.grad is not old
    assert flat.value.grad is not None
    assert flat.value.grad.sum() == 48


def test_zero_grad_keeps_what_a_graph_writes_to() -> None:
    owner = Owner([(16, 32), (48, 16)], adapter=True)
    optimizer = optimizer_of(owner)
    (flat,) = optimizer.flats
    optimizer.collect()
    optimizer.zero_grad()
    assert flat.value.grad is None
    optimizer.keeps_gradients = True
    flat.sink(owner.p[0], torch.ones(16, 32), 1.0)
    gradient = flat.value.grad
    optimizer.zero_grad()
    assert flat.value.grad is gradient
    assert gradient is not None
    assert gradient.count_nonzero() == 0
    flat.sink(owner.p[1], torch.ones(48, 16), 1.0)
    assert gradient.sum() == 48 * 16


# -- a PEFT model -----------------------------------------------------------------------------------------------------


def lora_model(family: str = "qwen2", **settings: Any) -> Any:
    torch.manual_seed(3)
    model = get_peft_model(family_model(family), LoraConfig(r=16, target_modules="all-linear", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def assert_views(model: Any, optimizer: Optimizer) -> None:
    """Every laid tensor still lies in its flat parameter, one after the other."""
    for flat in optimizer.flats:
        address = flat.value.data_ptr()
        for tensor in flat.tensors:
            assert tensor.data_ptr() == address
            address += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT * tensor.element_size()
        assert address == flat.value.data_ptr() + flat.value.numel() * flat.value.element_size()


def loss_of(model: Any) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) * 7 % 97
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def test_names_shapes_values_and_files_stay(tmp_path: Path) -> None:
    model = lora_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    optimizer = optimizer_of(model)
    assert_views(model, optimizer)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert not any("flat" in name for name in after)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_a_step_moves_the_model(tmp_path: Path) -> None:
    """What the optimizer changes in the flat parameter, the model computes with."""
    model = lora_model()
    optimizer = optimizer_of(model)
    first = loss_of(model)
    for _ in range(5):
        loss_of(model).backward()
        optimizer.collect()
        optimizer.inner.step()
        optimizer.zero_grad()
    assert loss_of(model) < first - 0.1


def test_loaded_weights_go_into_the_views(tmp_path: Path) -> None:
    model, other = lora_model(), lora_model()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    optimizer = optimizer_of(model)
    other.save_pretrained(tmp_path / "adapter")
    load_weights(model, tmp_path)
    assert_views(model, optimizer)
    expected = get_peft_model_state_dict(other)
    assert all(torch.equal(value, expected[name]) for name, value in get_peft_model_state_dict(model).items())
    (flat,) = optimizer.flats
    assert flat.value.detach().sum() == pytest.approx(sum(float(p.sum()) for p in expected.values()), rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*aged.*")
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = lora_model(bias="lora_only")
    optimizer = optimizer_of(model, name)
    assert len(optimizer.flats) == 2, "matrices, and the biases of q, k and v"
    steps(model, optimizer, 3)
    save_checkpoint(tmp_path / "at-3", model, optimizer.inner, TrainState(step=3), OFF)
    at_3 = {n: p.clone() for n, p in model.named_parameters()}
    steps(model, optimizer, 3, first=3)

    again = lora_model(bias="lora_only")
    fresh = optimizer_of(again, name)
    steps(again, fresh, 1, first=40)  # it begins elsewhere: all that counts is in the checkpoint
    assert load_checkpoint(tmp_path / "at-3", again, fresh.inner, OFF).step == 3
    assert_views(again, fresh)
    assert all(torch.equal(p, at_3[n]) for n, p in again.named_parameters())
    steps(again, fresh, 3, first=3)
    trained = dict(model.named_parameters())
    for n, parameter in again.named_parameters():
        assert torch.equal(parameter, trained[n]), n
        assert not parameter.requires_grad or not torch.equal(parameter, at_3[n]), n


def test_unreached_tensors_are_named() -> None:
    """Weight decay moves a tensor that no gradient reaches: only this finds it."""
    model = lora_model()
    optimizer = optimizer_of(model)
    adapters = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert optimizer.unreached(model) == [], "no step was taken yet"
    stuck = next(name for name in adapters if "layers.1.mlp.up_proj.lora_B" in name)
    loss_of(model).backward()
    dict(model.named_parameters())[stuck].grad = None
    optimizer.collect()
    assert optimizer.unreached(model) == [stuck]
    optimizer.zero_grad()
    assert optimizer.unreached(model) == [stuck], "what was reached once stays so"
    loss_of(model).backward()
    optimizer.collect()
    assert optimizer.unreached(model) == []


def test_fused_layers_add_where_the_optimizer_reads() -> None:
    """Through the sink: the gradient that autograd delivers without it, over two micro-batches, and nothing in between."""
    model = lora_model()
    fuse(model, report=str)
    optimizer = optimizer_of(model)
    (flat,) = optimizer.flats
    model.train()
    for _ in range(2):
        loss_of(model).backward()
    optimizer.collect()
    assert flat.value.grad is not None
    expected = flat.value.grad.clone()
    optimizer.zero_grad()
    assert flat.value.grad is None

    optimizer.connect(engine_of(model))
    assert optimizer.keeps_gradients
    for _ in range(2):
        loss_of(model).backward()
    assert all(parameter.grad is None for parameter in model.parameters() if parameter.requires_grad)
    found = flat.value.grad
    assert found is not None
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert expected.norm() > 0.01
    assert optimizer.unreached(model) == []


def test_without_fused_layers_or_flat_parameters_nothing_is_connected() -> None:
    model = lora_model()
    optimizer = optimizer_of(model)
    optimizer.connect(engine_of(model))
    assert not optimizer.keeps_gradients
    fuse(model, report=str)
    alone = Optimizer(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    alone.connect(engine_of(model))
    engine = engine_of(model)
    assert engine is not None
    assert (engine.sinks, alone.keeps_gradients) == ([], False)
