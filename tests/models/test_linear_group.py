"""Linear layers in one operand, against each of them alone: products, gradients, storage, and which adapter counts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from tunesmith.kernels.dropout import dropout
from tunesmith.models.linear_group import (
    Gradients,
    GroupState,
    LinearGroup,
    Noise,
    active_lora,
    mm_wide,
    why_not,
    write_weight,
)

K, T = 10, 7
SIZES = {"q": 12, "k": 5, "v": 3}


class Three(nn.Module):
    """Three projections of one input."""

    def __init__(self, bias: tuple[str, ...] = ()):
        super().__init__()
        torch.manual_seed(0)
        for name, size in SIZES.items():
            setattr(self, name, nn.Linear(K, size, bias=name in bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs side by side."""
        return torch.cat([getattr(self, name)(x) for name in SIZES], 1)


def adapted(targets: str = "qkv", bias: tuple[str, ...] = (), **settings: Any) -> Any:
    """PEFT's model of `Three` in fp64 with an adapter on `targets`, B not zero."""
    model = get_peft_model(
        Three(bias),
        LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **settings}),
        autocast_adapter_dtype=False,
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.double()


def group_of(model: Any, adds_bias: bool = True, stack: bool = True) -> LinearGroup:
    base = model.base_model.model if hasattr(model, "base_model") else model
    group = LinearGroup([getattr(base, name) for name in SIZES], torch.float64, adds_bias)
    if stack:
        group.stack_weights()
    return group


def state_of(group: LinearGroup, training: bool = False) -> GroupState:
    """The group's state with its adapters packed, as the engine does before a forward."""
    for module in group.modules:
        module.train(training)
    state = group.state()
    state.clear()
    state.pack()
    return state


def inputs() -> torch.Tensor:
    return torch.randn(T, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def output(state: GroupState, x: torch.Tensor, noise: Noise | None = None) -> torch.Tensor:
    """Y + S Bᵀ (T, N), whoever is to add the second."""
    with torch.no_grad():
        buffer = state.forward(x.detach(), noise or Noise())
        y = buffer[:, : state.num_out]
        if not state.folded or state.b is None:
            return y
        parts = [state.slot_of(buffer, index) @ b.T for index, b in enumerate(state.b.split(state.group.sizes))]
        return y + torch.cat(parts, 1)


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora": {"use_rslora": True, "r": 9},
    "ranks": {"rank_pattern": {"q": 17, "v": 1}, "alpha_pattern": {"k": 40}},
    "rank 80, added by products": {"r": 80},
    "only k": {"targets": "k"},
    "biases": {"bias": ("q", "v")},
}


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients_are_those_of_the_modules(case: str, stack: bool) -> None:
    settings = dict(CASES[case])
    biases = settings.pop("bias", ())
    model = adapted(bias=biases, **settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "bias" in name or ".k." in name)
    x, dy = inputs(), torch.randn(T, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    theirs = model(x)
    theirs.backward(dy)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    group = group_of(model, stack=stack)
    state = state_of(group)
    assert state.stacked == state.joined == stack
    with torch.no_grad():
        assert torch.allclose(output(state, x), theirs, rtol=1e-12, atol=1e-12)
        buffer = state.forward(x, Noise())
        grads, room = Gradients(), torch.empty_like(buffer)
        room[:, :20] = dy
        state.write_ds(dy, room[:, 20:])
        assert torch.allclose(state.backward_input(room, Noise()), x.grad, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]
        state.weight_gradients(grads, room[:, :20], room[:, 20:], x.detach(), buffer[:, 20:], Noise())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in state.trainable()} == expected.keys()
    for parameter in state.trainable():
        found = grads.of(parameter)
        assert found is not None
        assert torch.allclose(found, expected[names[id(parameter)]], rtol=1e-12, atol=1e-12), names[id(parameter)]


def test_biases_are_left_to_the_kernel_that_is_to_add_them() -> None:
    model = adapted(bias=("q", "v"))
    group = group_of(model, adds_bias=False)
    state = state_of(group)
    bias = torch.cat([model.base_model.model.q.bias, torch.zeros(5), model.base_model.model.v.bias])
    assert torch.equal(state.bias, bias)  # type: ignore[arg-type]
    x = inputs()
    assert torch.allclose(output(state, x) + bias, model(x))
    assert state_of(group_of(adapted())).bias is None


def test_weights_are_views_of_one_operand_and_get_their_storage_back() -> None:
    model = adapted()
    base = model.base_model.model
    before = [getattr(base, name).base_layer.weight.clone() for name in SIZES]
    group = group_of(model)
    assert group.stack is not None
    assert group.stack.shape == (20 + 3 * 16, K)
    row = group.stack.data_ptr()
    for name, value in zip(SIZES, before, strict=True):
        weight = getattr(base, name).base_layer.weight
        assert weight.data_ptr() == row
        assert torch.equal(weight, value)
        row += value.numel() * value.element_size()
    with torch.no_grad():
        base.k.base_layer.weight.fill_(3.0)  # an optimizer's step
    assert (state_of(group).operand(with_a=False)[12:17] == 3.0).all()
    assert state_of(group).operand().data_ptr() == group.stack.data_ptr()
    group.unstack_weights()
    for name in SIZES:
        weight = getattr(base, name).base_layer.weight
        assert weight.untyped_storage().nbytes() == weight.nbytes
    assert (base.k.base_layer.weight == 3.0).all()
    assert torch.equal(base.q.base_layer.weight, before[0])


def test_the_operand_is_the_weights_then_each_projections_slot_of_a() -> None:
    model = adapted("qv", rank_pattern={"v": 2}, r=17)
    state = state_of(group_of(model))
    assert (state.slot, state.num_slots, state.rank) == (32, 3, 96)
    base = model.base_model.model
    operand = state.operand()
    expected = torch.zeros(20 + 96, K, dtype=torch.float64)
    expected[:20] = torch.cat([base.q.base_layer.weight, base.k.weight, base.v.base_layer.weight])
    expected[20:37] = base.q.lora_A["default"].weight
    expected[20 + 64 : 20 + 66] = base.v.lora_A["default"].weight
    assert torch.equal(operand, expected)
    b = torch.zeros(20, 32, dtype=torch.float64)
    b[:12, :17] = base.q.lora_B["default"].weight * (6 / 17)
    b[17:, :2] = base.v.lora_B["default"].weight * (6 / 2)
    assert torch.allclose(state.b, b, rtol=1e-15)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rank", "slot"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128)])
def test_slots_and_who_adds_the_low_rank_term(rank: int, slot: int) -> None:
    state = state_of(group_of(adapted(r=rank)))
    assert state.slot == slot
    assert state.folded == (slot <= 64)


def test_types_that_do_not_lie_in_the_operand_are_written_into_it() -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    plain = nn.Linear(64, 6, bias=False).bfloat16()
    out = torch.empty(6, 64)
    write_weight(plain, out)
    assert torch.equal(out, plain.weight.float())
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            layer = Linear4bit(64, 6, bias=False, compress_statistics=double, quant_type=kind)
            layer.load_state_dict({"weight": torch.randn(6, 64, generator=torch.Generator().manual_seed(3))})
            layer = layer.to("cpu")
            assert layer.weight.dtype == torch.uint8
            write_weight(layer, out)
            assert torch.equal(out, dequantize_4bit(layer.weight.data, layer.weight.quant_state))
            group = LinearGroup([layer], torch.float32)
            group.stack_weights()
            assert group.stack is None
            state = group.state()
            with state.held():
                assert torch.equal(state.operand(), out)
                assert state.operand() is state.operand(), "made once"
            assert state._held is None


def test_a_weight_of_the_compute_type_alone_is_its_own_operand() -> None:
    layer = nn.Linear(K, 4)
    state = LinearGroup([layer], torch.float32).state()
    assert state.operand().data_ptr() == layer.weight.data_ptr()


def test_a_second_adapter_does_not_write_over_what_the_first_ones_backward_reads() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules=list("qkv")))
    model.double()
    group = group_of(model)
    first = state_of(group)
    operand = first.operand().clone()
    model.base_model.set_adapter("other")
    second = state_of(group)
    assert second is not first
    assert (first.joined, second.joined) == (True, False)
    assert torch.equal(first.operand(), operand)
    x = inputs()
    assert torch.allclose(output(second, x), model(x))
    room = torch.randn(T, 68, dtype=torch.float64)
    assert torch.allclose(second.backward_input(room, Noise()), room @ second.operand())
    model.base_model.set_adapter("default")
    assert group.state() is first


def test_without_adapters_there_is_only_the_weight() -> None:
    model = adapted()
    group = group_of(model)
    joined = state_of(group)
    model.base_model.disable_adapter_layers()
    state = group.state()
    assert (state.rank, state.a, state.entries) == (0, None, [])
    assert torch.equal(state.operand(), joined.operand(with_a=False))
    x = inputs()
    assert torch.allclose(output(state, x), model(x))
    assert state.trainable() == []


def test_a_stack_that_no_weight_is_in_any_more_is_let_go_of() -> None:
    model = adapted()
    group = group_of(model)
    state = state_of(group)
    bases = group.bases
    bases[0].weight.data = bases[0].weight.data.clone()
    other = state_of(group)
    assert not other.stacked
    assert group.stack is not None, "two are in it"
    x = inputs()
    assert torch.allclose(output(other, x), model(x))
    for base in bases:
        base.weight.data = base.weight.data.clone()
    last = state_of(group)
    assert group.stack is None
    assert last is not state
    assert torch.allclose(output(last, x), model(x))
    assert list(group._states.values()) == [last]


def test_operands_that_inference_makes_may_be_written_in_training() -> None:
    model = adapted()
    with torch.inference_mode():
        state = state_of(group_of(model))
    state.pack()
    assert not state.operand().is_inference()
    assert not model.base_model.model.q.base_layer.weight.is_inference()


def test_dropout_is_drawn_for_each_projection_by_seed_and_stream() -> None:
    model = adapted(lora_dropout=0.5)
    group = group_of(model)
    plain, state = state_of(group), state_of(group, training=True)
    assert (plain.dropout, state.dropout) == (False, True)
    x, noise = inputs(), Noise(seed=7, stream=3)
    out = output(state, x, noise)
    base, loras = model.base_model.model, state.loras
    for index, (name, part) in enumerate(zip(SIZES, out.split(group.sizes, 1), strict=True)):
        lora = loras[index]
        assert lora is not None
        dropped = dropout(x.detach(), 0.5, 7, 3 + index)
        y = F.linear(x, getattr(base, name).base_layer.weight)
        assert torch.allclose(part, y + 1.5 * dropped @ lora.a.T @ lora.b.T)
    assert not torch.allclose(out, output(state, x, Noise(seed=8, stream=3)))
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    assert torch.equal(output(state, x, Noise(seed=7, stream=3, rows=torch.arange(T))), out)
    assert torch.allclose(output(state, x[order], Noise(seed=7, stream=3, rows=order)), out[order])
    # dX and the gradients of A and B are those of the masks that the forward drew.
    dy = torch.randn(T, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    masks = [dropout(torch.ones_like(x.detach()), 0.5, 7, 3 + index) for index in range(3)]
    expected = torch.cat(
        [
            F.linear(x, getattr(base, name).base_layer.weight) + 1.5 * (x * mask) @ lora.a.T @ lora.b.T  # type: ignore[union-attr]
            for name, mask, lora in zip(SIZES, masks, loras, strict=True)
        ],
        1,
    )
    expected.backward(dy)
    with torch.no_grad():
        buffer = state.forward(x, noise)
        room = torch.cat((dy, torch.empty(T, state.rank, dtype=torch.float64)), 1)
        state.write_ds(dy, room[:, 20:])
        assert torch.allclose(state.backward_input(room, noise), x.grad)  # type: ignore[arg-type]
        grads = Gradients()
        state.weight_gradients(grads, dy, room[:, 20:], x.detach(), buffer[:, 20:], noise)
    for parameter in state.trainable():
        assert torch.allclose(grads.of(parameter), parameter.grad)  # type: ignore[arg-type]


def test_which_adapter_counts() -> None:
    model = adapted()
    q = model.base_model.model.q
    lora = active_lora(q)
    assert lora is not None
    assert (lora.rank, lora.scale, lora.dropout) == (4, 1.5, 0.0)
    assert lora.a is q.lora_A["default"].weight
    assert lora.b is q.lora_B["default"].weight
    assert active_lora(nn.Linear(2, 2)) is None
    model.merge_adapter()
    assert active_lora(q) is None
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k"]))
    model.base_model.set_adapter("other")
    assert active_lora(q) is None
    assert active_lora(model.base_model.model.k).rank == 2  # type: ignore[union-attr]
    model.base_model.set_adapter(["default", "other"])
    assert active_lora(q) is not None, "it has one of the two"
    with pytest.raises(
        ValueError, match=r"^the adapters default, other are active together; the fused engine runs one"
    ):
        active_lora(model.base_model.model.k)


def test_operands_follow_the_weights_to_another_device() -> None:
    """`to` moves a parameter without a change of identity."""
    model = adapted()
    group = group_of(model, stack=False)
    before = group.state()
    model.to("meta")
    after = group.state()
    assert before.a is not None
    assert after.a is not None
    assert (before.a.device.type, after.a.device.type) == ("cpu", "meta")
    assert {entry.destination.device.type for entry in after.entries} == {"meta"}


def test_what_cannot_be_part_of_a_group() -> None:
    assert why_not(nn.Linear(2, 2)) is None
    assert why_not(adapted().base_model.model.q) is None
    assert why_not(nn.Bilinear(2, 2, 2)) == "a projection is a torch.nn.modules.linear.Bilinear"

    class Own(nn.Linear):
        pass

    model = Three()
    model.q = Own(K, 12)
    with_lora = get_peft_model(model, LoraConfig(target_modules=["q"])).base_model.model.q
    assert re.fullmatch(r"a projection is a .*\.Own", why_not(with_lora) or "")
    assert why_not(adapted(use_dora=True).base_model.model.q) == (
        "its adapter is a DoraLinearVariant, which runs in the model's own layer"
    )
    assert why_not(adapted(bias=("q", "k", "v"), lora_bias=True).base_model.model.q) == (
        "its adapter has a bias on B (lora_bias)"
    )


def test_gradients_are_summed_or_kept_by_whoever_takes_them() -> None:
    one, two = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    taken: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def sink(parameter: torch.Tensor, value: torch.Tensor, scale: float) -> bool:
        if parameter is one:
            taken.append((parameter, value, scale))
        return parameter is one

    value = torch.arange(6.0)
    grads = Gradients([sink])
    grads.add(one, value, 2.0)
    grads.add(two, torch.ones(3), 0.5)
    grads.add(two, torch.ones(3))
    assert grads.of(one) is None
    assert taken == [(one, value, 2.0)]
    found = grads.of(two)
    assert found is not None
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [1.5] * 3
    alone = Gradients()
    alone.add(one, value, 2.0)
    assert torch.equal(alone.of(one), (2 * value).view(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_over_tokens_are_wide(dtype: torch.dtype) -> None:
    """4,096 ones and a small number: in 16 bits the sum would stop growing."""
    ones = torch.ones(1, 4097, dtype=dtype)
    product = mm_wide(ones, ones.T)
    assert product.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert product.item() == 4097


def test_the_gradient_of_a_16_bit_weight_is_rounded_once() -> None:
    """Whole, in its own type from the product on; of 300 pieces, after their sum in fp32: in bf16 that would stay at 256."""
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    grads = Gradients()
    grads.add_product(weight, ones, ones)
    one, same = grads.of(weight), grads.of(weight)
    assert one is not None
    assert same is not None
    assert one.data_ptr() == same.data_ptr(), "nothing is cast"
    pieces = Gradients()
    pieces.in_pieces = True
    for _ in range(300):
        pieces.add_product(weight, ones, ones)
    found = pieces.of(weight)
    assert found is not None
    assert (found.dtype, found.item()) == (torch.bfloat16, 300)
    other = nn.Parameter(torch.zeros(1, 1))
    grads.add_product(other, ones, ones)
    wide = grads.of(other)
    assert wide is not None
    assert wide.dtype == torch.float32
