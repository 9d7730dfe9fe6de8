"""How long a step takes: by hand with round rates, and what must hold for all shapes. The fit itself: test_measured.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.cards import Card, find_card
from tunesmith.memory import speed
from tunesmith.memory.estimate import Load, Setup
from tunesmith.memory.shape import ModelShape
from tunesmith.memory.speed import Rates, micro_batch_seconds, optimizer_seconds
from tunesmith.types import LAYER_TENSORS, LayerPolicy

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
}
SHAPE = ModelShape.of(CONFIG)
DEEP = ModelShape.of({**CONFIG, "num_hidden_layers": 24})
CARD = Card("round numbers", 80.0, (9, 0), bandwidth=1e12, flops=1e14)
LOAD = Load(tokens=4096, supervised=1024, sequence=2048, accumulates=False)
LORA, QLORA, FULL = Setup("lora", "fused"), Setup("qlora", "fused", scheme="nf4"), Setup("full", "fused", r=0)
REFERENCE = Setup("lora", "reference")

QKV, OUTPUT, GATE_UP, DOWN = 1024 * 1536, 1024 * 1024, 2 * 1024 * 4096, 4096 * 1024
MATRICES = QKV + OUTPUT + GATE_UP + DOWN
FEATURES = 2048 + 2 * 1280 + 2048 + 3 * 5120
"""Into and out of the layer's linear layers."""


@pytest.fixture
def round_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that are easy to multiply by: the real ones are fitted, and may be fitted again."""
    for engine in ("fused", "reference"):
        monkeypatch.setitem(speed.RATES, engine, Rates(0.5, 0.25, passes=8.0, makes=2.0, layer_ms=0.1))
        monkeypatch.setitem(speed.FULL_PASSES, engine, 1.5)
        for method in ("lora", "qlora", "full"):
            monkeypatch.setitem(speed.LAUNCH_MS, (engine, method), (1.0, 3.0))
    for name, value in (("8bit", 5.0), ("paged", 3.0)):
        monkeypatch.setitem(speed.TENSOR_MS, name, value)
    for name, value in (("BANDWIDTH", 0.5), ("RANK", 16), ("RANK_PASSES", 2.0), ("HOST_LINK", 1e9)):
        monkeypatch.setattr(speed, name, value)


def products(values: float, tokens: int = 4096) -> float:
    """Two operations a token and value, at half of 1e14 a second."""
    return 2 * values * tokens / 5e13


HEAD = 2 * products(32768 * 1024, 1024) + 3 * 2 * 1024 * 32768 / 5e11
"""Two products with the head for supervised rows, and three passes over their logits."""

SCORES = 4096 * 2048 * (1024 + 1024)
"""Operations of attention's forward: half of all pairs, two products of 2 · 1024 each."""


@pytest.mark.usefixtures("round_rates")
def test_a_layer_and_the_head_by_hand() -> None:
    expected = (
        products(2 * MATRICES)  # forward, and the gradient of the input: the base's weights have none
        + 3.5 * SCORES / 2.5e13  # two products forward, five backward
        + 8 * 2 * 4096 * FEATURES / 1e12
        + 0.1e-3
    )
    assert micro_batch_seconds(SHAPE, LORA, LOAD, CARD) == pytest.approx(expected + HEAD)
    assert micro_batch_seconds(DEEP, LORA, LOAD, CARD) == pytest.approx(24 * expected + HEAD)


@pytest.mark.usefixtures("round_rates")
def test_what_other_setups_add() -> None:
    lora = micro_batch_seconds(SHAPE, LORA, LOAD, CARD)

    def more(setup: Setup, load: Load = LOAD) -> float:
        return micro_batch_seconds(SHAPE, setup, load, CARD) - lora

    # Weights made for the forward and the backward: half a byte (one, four) read, two written.
    assert more(QLORA) == pytest.approx(2 * 2 * MATRICES * 2.5 / 1e12)
    assert more(replace(QLORA, scheme="int8")) == pytest.approx(2 * 2 * MATRICES * 3 / 1e12)
    # A third product, of the head too; half the passes again; gradients of four bytes, three passes over them, or five.
    full = products(MATRICES) + products(32768 * 1024, 1024) + 4 * 2 * 4096 * FEATURES / 1e12
    full += 2 * 2 * MATRICES * 6 / 1e12
    assert more(FULL) == pytest.approx(full + 2 * 3 * 4 * MATRICES / 1e12)
    assert more(FULL, replace(LOAD, accumulates=True)) == pytest.approx(full + 2 * 5 * 4 * MATRICES / 1e12)
    # In bf16: no weights to cast, hidden states of two bytes, gradients of two bytes.
    bf16 = products(MATRICES) + products(32768 * 1024, 1024) + 2 * 3 * 2 * MATRICES / 1e12
    assert more(replace(FULL, weights_dtype="bf16")) == pytest.approx(bf16)
    # Rank 64: three times 2 passes more.
    assert more(replace(LORA, r=64)) == pytest.approx(6 * 2 * 4096 * FEATURES / 1e12)
    # fp32: products at half the rate, twice the bytes.
    doubled = products(2 * MATRICES) + 8 * 2 * 4096 * FEATURES / 1e12 + HEAD
    assert more(replace(LORA, value_bytes=4)) == pytest.approx(doubled)


@pytest.mark.usefixtures("round_rates")
@pytest.mark.parametrize(
    ("gone", "values", "attention"),
    [
        (("gate_up", "mlp_output"), GATE_UP, 0),
        (("gate_up", "mlp_output", "middle", "attention_output"), GATE_UP + OUTPUT, 0),
        (("gate_up", "mlp_output", "middle", "attention_output", "qkv"), GATE_UP + OUTPUT + QKV, 0),
        (LAYER_TENSORS, GATE_UP + OUTPUT + QKV, 1),
    ],
)
def test_what_a_fused_layer_computes_again(gone: Any, values: int, attention: int) -> None:
    """Its products, a quarter of the passes for all of them, dequantization once more; attention's forward last."""
    policy = LayerPolicy(frozenset(LAYER_TENSORS) - frozenset(gone))
    more = micro_batch_seconds(SHAPE, QLORA, LOAD, CARD, [policy]) - micro_batch_seconds(SHAPE, QLORA, LOAD, CARD)
    share = values / MATRICES
    passes = 8 * 0.25 * share * 2 * 4096 * FEATURES / 1e12
    made = 2 * share * MATRICES * 2.5 / 1e12
    assert more == pytest.approx(products(values) + passes + made + attention * SCORES / 2.5e13)


@pytest.mark.usefixtures("round_rates")
def test_what_checkpointing_computes_again() -> None:
    more = [micro_batch_seconds(DEEP, REFERENCE, LOAD, CARD, (), count) for count in (0, 1, 24, 99)]
    again = products(MATRICES) + 8 * 0.5 * 2 * 4096 * FEATURES / 1e12 + SCORES / 2.5e13
    assert more[1] - more[0] == pytest.approx(again)
    assert more[2] - more[0] == pytest.approx(24 * again)
    assert more[3] == more[2]


@pytest.mark.usefixtures("round_rates")
def test_few_tokens_take_as_long_as_reading_the_weights() -> None:
    """Up to 100 here: a value's 2 bytes at 5e11 a second take as long as 2 · 100 operations at 5e13."""
    few = [micro_batch_seconds(SHAPE, LORA, Load(tokens, tokens, 1), CARD, graphs=True) for tokens in (1, 2)]
    assert few[0] == pytest.approx(2 * 2 * (MATRICES + 32768 * 1024) / 5e11 + 0.1e-3, rel=5e-3)
    assert few[1] == pytest.approx(few[0], rel=5e-3), "what is left is of activations"


@pytest.mark.usefixtures("round_rates")
def test_launching_from_python_is_a_lower_bound() -> None:
    few = Load(16, 16, 16)
    assert micro_batch_seconds(DEEP, LORA, few, CARD, graphs=False) == pytest.approx(24 * 1.0e-3)
    assert micro_batch_seconds(DEEP, LORA, few, CARD, graphs=True) < 6e-3
    assert micro_batch_seconds(DEEP, REFERENCE, few, CARD, recompute_layers=4) == pytest.approx((20 + 4 * 3) * 1e-3)
    policies = [LayerPolicy(frozenset())] * 4 + [LayerPolicy()] * 20
    assert micro_batch_seconds(DEEP, FULL, few, CARD, policies) == pytest.approx((20 + 4 * 3) * 1e-3)
    many = Load(65536, 1, 4096)
    plain, graphed = (micro_batch_seconds(DEEP, LORA, many, CARD, graphs=graphs) for graphs in (False, True))
    assert plain == graphed


@pytest.mark.usefixtures("round_rates")
@pytest.mark.parametrize(
    ("gone", "share"),
    [
        (("mlp_output", "attention_output"), 0),  # no group of its own: nothing is launched for it
        (("gate_up", "mlp_output"), 1),
        (("gate_up", "mlp_output", "middle", "attention_output"), 2),
        (("gate_up", "mlp_output", "middle", "attention_output", "qkv"), 3),
        (LAYER_TENSORS, 4),
    ],
)
def test_launching_grows_with_each_group_that_a_layer_computes_again(gone: Any, share: int) -> None:
    policy = LayerPolicy(frozenset(LAYER_TENSORS) - frozenset(gone))
    found = micro_batch_seconds(DEEP, LORA, Load(16, 16, 16), CARD, [policy] * 24)
    assert found == pytest.approx(24 * (1.0 + share / 4 * 2.0) * 1e-3)


@pytest.mark.usefixtures("round_rates")
def test_a_slower_host_takes_longer_to_launch_but_not_to_replay() -> None:
    few = Load(16, 16, 16)
    assert micro_batch_seconds(DEEP, LORA, few, CARD, host=2.5) == pytest.approx(24 * 2.5e-3)
    assert micro_batch_seconds(DEEP, REFERENCE, few, CARD, (), 24, host=2.5) == pytest.approx(24 * 3 * 2.5e-3)
    once, slow = (micro_batch_seconds(DEEP, LORA, few, CARD, graphs=True, host=host) for host in (1.0, 2.5))
    assert once == slow < 6e-3
    once, slow = (micro_batch_seconds(DEEP, LORA, LOAD, CARD, host=host) for host in (1.0, 2.5))
    assert once == slow, "the card is what is waited for"


@pytest.mark.usefixtures("round_rates")
def test_norms_and_soft_caps_take_longer_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "NORM_LAUNCHES", 1.5)
    monkeypatch.setattr(speed, "FLEX_LAUNCH_MS", (4.0, 6.0))
    few = Load(16, 16, 16)
    for family, times in (("qwen3", 1.5), ("gemma2", 2.25), ("gemma3_text", 3.375)):
        shape = ModelShape.of({**CONFIG, "model_type": family, "num_hidden_layers": 24})
        assert micro_batch_seconds(shape, REFERENCE, few, CARD) == pytest.approx(24 * times * 1e-3)
        assert micro_batch_seconds(shape, LORA, few, CARD) == pytest.approx(24 * 1e-3)
    capped = replace(DEEP, softcapped=True)
    assert micro_batch_seconds(capped, LORA, few, CARD) == pytest.approx(24 * 4e-3)
    assert micro_batch_seconds(capped, LORA, few, CARD, [LayerPolicy(frozenset())] * 24) == pytest.approx(24 * 6e-3)
    assert micro_batch_seconds(capped, REFERENCE, few, CARD) == pytest.approx(24 * 1e-3)


@pytest.mark.usefixtures("round_rates")
def test_inputs_that_wait_in_host_memory_may_be_what_is_waited_for() -> None:
    """There and back at 1e9 bytes a second here, beside everything else."""
    kept, moved = LayerPolicy(frozenset()), LayerPolicy(frozenset(), offload_input=True)
    for graphs in (False, True):
        every, one, none = (
            micro_batch_seconds(DEEP, LORA, LOAD, CARD, [moved] * count + [kept] * (24 - count), graphs=graphs)
            for count in (24, 1, 0)
        )
        assert every == pytest.approx(2 * 24 * 4096 * 1024 * 2 / 1e9)
        assert one == none


@pytest.mark.usefixtures("round_rates")
@pytest.mark.parametrize(
    ("setup", "values", "bytes_a_value", "waited_ms"),
    [
        # The gradient's norm (4), clipping (4 + 4), the gradient (4), the weight (4 + 4), two moments (8 + 8)
        (LORA, 16 * 22016, 40, 0),
        (FULL, SHAPE.num_parameters, 40, 0),
        # bitsandbytes waits for each of 11 tensors: embeddings and last norm, seven linear layers, two norms of the layer
        (replace(FULL, optimizer="paged_adamw_32bit"), SHAPE.num_parameters, 40, 11 * 3),
        # 8-bit moments are looked up, which takes as long as 30 bytes
        (replace(FULL, optimizer="adamw_8bit"), SHAPE.num_parameters, 54, 11 * 5),
        (replace(LORA, optimizer="paged_adamw_8bit", r=8), 8 * 22016, 54, 5 + 3),  # an adapter is one tensor
        # In bf16: the norm (2), weight and gradient to fp32 (6 + 6), clipping (8), the update (12), noise (4), NaN (9), rounding
        # (20), NaN again (9), the copy back (6), the moments (16, or as if 30); no tensor is waited for.
        (replace(FULL, weights_dtype="bf16"), SHAPE.num_parameters, 82 + 16, 0),
        (replace(FULL, weights_dtype="bf16", optimizer="adamw_8bit"), SHAPE.num_parameters, 82 + 30, 0),
    ],
)
def test_the_optimizers_step_by_hand(setup: Setup, values: int, bytes_a_value: int, waited_ms: int) -> None:
    for host in (1.0, 2.5):
        expected = bytes_a_value * values / 5e11 + host * waited_ms / 1e3
        assert optimizer_seconds(SHAPE, setup, CARD, host) == pytest.approx(expected)


# -- windows and experts ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("round_rates")
@pytest.mark.parametrize(("window", "context"), [(256, 512), (1024, 2048), (4096, 2048)])
def test_a_window_shortens_attention(window: int, context: int) -> None:
    """A query sees its whole window where half of the sequence is seen without one: as if that were twice the window."""
    windowed = ModelShape.of({**CONFIG, "model_type": "mistral", "sliding_window": window})
    less = micro_batch_seconds(SHAPE, LORA, LOAD, CARD) - micro_batch_seconds(windowed, LORA, LOAD, CARD)
    assert less == pytest.approx(3.5 * 4096 * (2048 - context) * 2048 / 2.5e13)


@pytest.mark.usefixtures("round_rates")
def test_only_layers_with_a_window_are_shorter() -> None:
    gemma = ModelShape.of({**CONFIG, "model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 256})
    plain = replace(gemma, window=None, windowed=0)
    less = micro_batch_seconds(plain, LORA, LOAD, CARD) - micro_batch_seconds(gemma, LORA, LOAD, CARD)
    assert less == pytest.approx(2 * 3.5 * 4096 * (2048 - 512) * 2048 / 2.5e13), "two of four"


def mixture(experts: int, active: int) -> ModelShape:
    settings = {"num_local_experts": experts, "num_experts_per_tok": active}
    return ModelShape.of({**CONFIG, "model_type": "mixtral", **settings})


def test_experts_that_a_token_does_not_meet_take_no_time() -> None:
    eight, sixteen = (micro_batch_seconds(mixture(count, 2), REFERENCE, LOAD, CARD) for count in (8, 16))
    assert eight == sixteen


@pytest.mark.usefixtures("round_rates")
def test_each_expert_that_a_token_meets_takes_its_products_and_passes() -> None:
    two, three = (micro_batch_seconds(mixture(8, count), REFERENCE, LOAD, CARD) for count in (2, 3))
    assert three - two == pytest.approx(products(2 * 3 * 1024 * 4096) + 8 * 2 * 4096 * 3 * 4096 / 1e12)


# -- what holds for all, with the fitted rates ------------------------------------------------------------------------

SHAPES = st.builds(
    lambda **settings: ModelShape.of(settings),
    model_type=st.sampled_from(["llama", "gemma2"]),
    hidden_size=st.sampled_from([512, 4096]),
    intermediate_size=st.sampled_from([1024, 14336]),
    num_hidden_layers=st.integers(1, 24),
    num_attention_heads=st.just(8),
    num_key_value_heads=st.sampled_from([1, 8]),
    vocab_size=st.sampled_from([1000, 128256]),
)
SETUPS = st.sampled_from(
    [LORA, QLORA, FULL, REFERENCE, replace(QLORA, engine="reference"), replace(FULL, engine="reference")]
)
LOADS = st.builds(
    Load, tokens=st.integers(1, 50_000), supervised=st.integers(1, 50_000), sequence=st.integers(1, 8192),
    accumulates=st.booleans(),
)  # fmt: skip
H100, A100 = find_card("H100"), find_card("A100 80GB")


@given(SHAPES, SETUPS, LOADS, st.integers(2, 20), st.booleans())
def test_more_tokens_take_longer_but_never_out_of_proportion(
    shape: ModelShape, setup: Setup, load: Load, times: int, graphs: bool
) -> None:
    """Weights are read, dequantized and launched once, whatever the tokens."""
    many = replace(load, tokens=times * load.tokens, supervised=times * load.supervised)
    one, more = (micro_batch_seconds(shape, setup, size, H100, graphs=graphs) for size in (load, many))
    assert one <= more <= times * one * (1 + 1e-9)


@pytest.mark.parametrize(
    ("setup", "graphs"), [(LORA, True), (QLORA, True), (LORA, False), (QLORA, False), (FULL, False), (REFERENCE, False)]
)
def test_at_small_sizes_twice_the_tokens_take_much_less_than_twice_the_time(setup: Setup, graphs: bool) -> None:
    few, twice = (micro_batch_seconds(DEEP, setup, Load(size, size, size), H100, graphs=graphs) for size in (128, 256))
    assert few <= twice < 1.3 * few
    many, double = (
        micro_batch_seconds(DEEP, setup, Load(size, size, 1024), H100, graphs=graphs) for size in (65536, 131072)
    )
    assert 1.8 * many < double <= 2 * many


@given(SHAPES, SETUPS, LOADS, st.booleans())
def test_computing_again_takes_longer(shape: ModelShape, setup: Setup, load: Load, graphs: bool) -> None:
    layers = shape.num_layers

    def seconds(given_up: int) -> float:
        policies = [LayerPolicy(frozenset())] * given_up + [LayerPolicy()] * (layers - given_up)
        return micro_batch_seconds(shape, setup, load, H100, policies, given_up, graphs)

    times = [seconds(count) for count in range(layers + 1)]
    assert times == sorted(times)
    if load.tokens > 10_000:  # launching does not hide it
        assert times[-1] > times[0]


@given(SHAPES, SETUPS, LOADS, st.booleans())
def test_a_faster_card_is_faster(shape: ModelShape, setup: Setup, load: Load, graphs: bool) -> None:
    fast, slow = (
        micro_batch_seconds(shape, setup, load, card, graphs=graphs) + optimizer_seconds(shape, setup, card)
        for card in (H100, A100)
    )
    assert fast < slow
    assert slow <= fast * max(H100.flops / A100.flops, H100.bandwidth / A100.bandwidth) * (1 + 1e-9)


@given(SHAPES, LOADS, st.sampled_from(["fused", "reference"]))
def test_training_all_weights_takes_longer_than_an_adapter(shape: ModelShape, load: Load, engine: Any) -> None:
    adapter, full = replace(LORA, engine=engine), replace(FULL, engine=engine)
    assert optimizer_seconds(shape, adapter, H100) < optimizer_seconds(shape, full, H100)
    if load.tokens > 10_000:  # the reference engine launches fewer kernels without adapters
        times = [micro_batch_seconds(shape, setup, load, H100, graphs=False) for setup in (adapter, full)]
        assert times[0] < times[1]
