"""What the fused engine keeps: exact arithmetic on one shape, what a layer really keeps, and what must hold for all plans."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_of import family_model
from peft import LoraConfig, get_peft_model

from tunesmith.kernels.attention import SequenceLayout
from tunesmith.memory.policy import (
    DROP_ORDER,
    HEADROOM,
    LOSS_ROWS,
    MLP_ROWS,
    TIGHT_LOSS_ROWS,
    WORKSPACE_GB,
    fused_tensors,
    plan_memory,
)
from tunesmith.models.fuse import fuse
from tunesmith.types import GB, LAYER_TENSORS, LayerPolicy, LayerTensor, MemoryPlan

SHAPE = SimpleNamespace(
    model_type="llama",
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=32768,
)
TOKENS, LAYERS = 8192, 24


def plan(config: Any = SHAPE, **changes: Any) -> MemoryPlan:
    settings: dict[str, Any] = {
        "mode": "auto",
        "tokens": TOKENS,
        "supervised": TOKENS,
        "bytes_per_value": 2,
        "static_gb": 3.0,
        "budget_gb": None,
        "num_layers": LAYERS,
        "engine": "fused",
        "rank": 16,
    }
    return plan_memory(config, **(settings | changes))


# -- one shape, by hand -----------------------------------------------------------------------------------------------

KEPT = {"qkv": 2 * (24 * 64 + 3 * 16), "attention": 2 * 1024 + 4 * 16, "middle": 2048, "gate_up": 2 * (8192 + 2 * 16)}
"""Bytes a token that a layer keeps, in 16 bits at rank 16."""

ALWAYS = 2 * (1024 + 2 * 16)
"""Its input, and S of the output and down projections."""

DS_PARTS = 64 * 2 * 2 * 16
"""The GLU backward's parts of dS: one for each 64 of the 4,096 columns."""


def peak(
    dropped: dict[str, int], tokens: int = TOKENS, pieces: int | None = None, offload: bool = False, operand: int = 0
) -> float:
    """The predicted peak in GB, written out. `pieces`: where memory is short, the MLP's rows at a time."""
    rows = pieces or tokens
    mlp = tokens * (4 * 2048 + KEPT["qkv"] + KEPT["attention"])
    mlp += rows * (3 * KEPT["gate_up"] // 2 + 2 * 2048 + DS_PARTS)
    mlp += operand if rows < tokens else operand * 2 // 3
    attention = tokens * (4 * 2048 + 3 * KEPT["qkv"] + 2 * KEPT["attention"])
    head = 2 * 2 * tokens * 2048 + min(tokens, 512 if pieces else 2048) * 32768 * 2
    stored = sum((LAYERS - dropped.get(name, 0)) * tokens * size for name, size in KEPT.items())
    stored += (2 if offload else LAYERS) * tokens * ALWAYS
    return 3.0 + WORKSPACE_GB + (stored + max(mlp, attention, head)) / GB


def test_bytes_of_a_layers_tensors() -> None:
    assert fused_tensors(SHAPE, 16, 2) == {"hidden": 2048, "slots": 64, **KEPT}
    assert fused_tensors(SHAPE, 0, 2) == {
        "hidden": 2048, "slots": 0, "qkv": 3072, "attention": 2112, "middle": 2048, "gate_up": 16384
    }  # fmt: skip
    single, double = fused_tensors(SHAPE, 16, 2), fused_tensors(SHAPE, 16, 4)
    assert all(double[name] == 2 * size for name, size in single.items() if name != "attention")
    assert double["attention"] == 2 * single["attention"] - 4 * 16, "the softmax's sums are in fp32 anyway"


@pytest.mark.parametrize(("rank", "slot"), [(1, 16), (16, 16), (17, 32), (33, 64), (80, 128)])
def test_ranks_take_the_width_of_their_slot(rank: int, slot: int) -> None:
    assert fused_tensors(SHAPE, rank, 2)["slots"] == 2 * 2 * slot


def test_what_a_config_does_not_say_follows_from_the_rest() -> None:
    sparse = SimpleNamespace(hidden_size=1024, num_attention_heads=16, vocab_size=32768)
    assert fused_tensors(sparse, 0, 2) == {
        "hidden": 2048, "slots": 0, "qkv": 3 * 2048, "attention": 2112, "middle": 2048, "gate_up": 16384
    }  # fmt: skip


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_branches_with_a_norm_keep_their_output(family: str) -> None:
    shape = SimpleNamespace(**{**vars(SHAPE), "model_type": family})
    assert fused_tensors(shape, 16, 2) == {
        **fused_tensors(SHAPE, 16, 2), "attention_output": 2048 + 32, "mlp_output": 2048 + 32
    }  # fmt: skip


def test_everything_is_kept_where_it_fits() -> None:
    for found in (plan(), plan(budget_gb=1000.0), plan(mode="fast", budget_gb=0.1)):
        assert found.predicted_peak_gb == pytest.approx(peak({}))
        assert found.policies == (LayerPolicy(),) * LAYERS
        assert (found.engine, found.recompute_layers, found.loss_rows) == ("fused", 0, None)
    assert plan().reason == f"memory.mode auto: predicted peak {peak({}):.1f} GB: keep all activations"
    assert plan(budget_gb=1000.0).reason == (
        f"memory.mode auto: predicted peak {peak({}):.1f} GB of 1000.0 GB: keep all activations"
    )


def room_for(gb: float) -> float:
    """The budget of which a plan of `gb` is just within."""
    return (gb + 1e-9) / HEADROOM


@pytest.mark.parametrize("number", [1, 2, 13, 24])
def test_gate_up_goes_first_one_layer_at_a_time(number: int) -> None:
    budget = room_for(peak({"gate_up": number}))
    found = plan(budget_gb=budget)
    assert found.predicted_peak_gb == pytest.approx(peak({"gate_up": number}))
    assert [policy.keep == frozenset(LAYER_TENSORS) for policy in found.policies] == [False] * number + [True] * (
        LAYERS - number
    )
    assert found.policies[0].keep == {"qkv", "attention", "attention_output", "middle"}
    assert found.reason == (
        f"memory.mode auto: predicted peak {peak({'gate_up': number}):.1f} GB of {budget:.1f} GB: "
        f"recompute gate_up of {number} of 24 layers"
    )
    assert found.recompute_layers == number


def test_then_the_next_tensors_in_their_order() -> None:
    dropped: dict[str, int] = {}
    for name, others in (("gate_up", "mlp_output"), ("middle", "attention_output"), ("qkv", ""), ("attention", "")):
        for number in (5, LAYERS):
            dropped[name] = number
            found = plan(budget_gb=room_for(peak(dropped)))
            assert found.predicted_peak_gb == pytest.approx(peak(dropped))
            gone = set(dropped) | {other for other in (others, *(["mlp_output"] if name != "gate_up" else [])) if other}
            assert not found.policies[0].keep & gone
            assert (name in found.policies[-1].keep) == (number < LAYERS)
            assert (found.loss_rows, found.policies[0].mlp_rows, found.policies[0].offload_input) == (None, None, False)
    assert found.reason.endswith(": recompute gate_up of 24, middle of 24, qkv of 24, attention of 24 of 24 layers"), (
        "nothing about host memory"
    )


ALL = dict.fromkeys(KEPT, LAYERS)


def test_then_the_mlp_in_pieces_and_short_chunks_of_the_loss() -> None:
    found = plan(budget_gb=room_for(peak(ALL, pieces=4096)))
    assert found.predicted_peak_gb == pytest.approx(peak(ALL, pieces=4096))
    assert found.policies == (LayerPolicy(frozenset(), False, 4096),) * LAYERS
    assert found.loss_rows == TIGHT_LOSS_ROWS


def test_and_last_the_inputs_go_to_host_memory() -> None:
    for budget in (room_for(peak(ALL, pieces=4096, offload=True)), 0.1):  # whether that fits or not
        found = plan(budget_gb=budget)
        assert found.predicted_peak_gb == pytest.approx(peak(ALL, pieces=4096, offload=True))
        assert found.policies == (LayerPolicy(frozenset(), True, 4096),) * LAYERS
        assert found.reason.endswith("attention of 24 of 24 layers, layer inputs in host memory")
        assert (found.recompute_layers, found.loss_rows) == (LAYERS, TIGHT_LOSS_ROWS)


def test_min_gives_up_everything_whatever_the_budget() -> None:
    for budget in (None, 1000.0, 0.1):
        found = plan(mode="min", budget_gb=budget)
        assert found.policies == (LayerPolicy(frozenset(), True, 4096),) * LAYERS
        assert found.predicted_peak_gb == pytest.approx(peak(ALL, pieces=4096, offload=True))
        assert (found.recompute_layers, found.loss_rows) == (LAYERS, TIGHT_LOSS_ROWS)


@pytest.mark.parametrize(("tokens", "rows"), [(100, None), (4096, None), (5000, 4096), (16384, 4096), (20000, 5000)])
def test_the_pieces_of_the_mlp(tokens: int, rows: int | None) -> None:
    """A quarter of the tokens, at least 4,096; a micro-batch of fewer is one piece, with short chunks of the loss."""
    found = plan(mode="min", tokens=tokens, supervised=tokens)
    assert found.policies[0].mlp_rows == rows
    assert found.loss_rows == TIGHT_LOSS_ROWS
    assert found.predicted_peak_gb == pytest.approx(peak(ALL, tokens, pieces=rows or tokens, offload=True))


def test_pieces_hold_both_dequantized_operands() -> None:
    """So a few tokens more than a piece has are not worth a second one."""
    operand = 3 * 4096 * 1024 * 2
    assert plan(expanded=True).predicted_peak_gb == pytest.approx(peak({}, operand=operand))
    pieced = plan(mode="min", expanded=True)
    assert pieced.predicted_peak_gb == pytest.approx(peak(ALL, pieces=4096, offload=True, operand=operand))
    for tokens, rows in ((4200, None), (4500, 4096)):  # a third of the operand is as large as 234 tokens
        found = plan(mode="min", expanded=True, tokens=tokens, supervised=tokens)
        assert found.policies[0].mlp_rows == rows
        assert found.predicted_peak_gb == pytest.approx(
            peak(ALL, tokens, pieces=rows or tokens, offload=True, operand=operand)
        )


def test_few_supervised_rows_make_few_logits() -> None:
    wide = SimpleNamespace(**{**vars(SHAPE), "vocab_size": 1_000_000})
    stored = 100 * LAYERS * (sum(KEPT.values()) + ALWAYS)
    for supervised, mode, rows in ((10, "fast", 10), (5000, "fast", LOSS_ROWS), (5000, "min", TIGHT_LOSS_ROWS)):
        head = (2 * supervised + 2 * 100) * 2048 + rows * 1_000_000 * 2
        found = plan(wide, mode=mode, tokens=100, supervised=supervised)
        held = stored if mode == "fast" else 2 * 100 * ALWAYS
        assert found.predicted_peak_gb == pytest.approx(3.0 + WORKSPACE_GB + (held + head) / GB)


# -- what a layer really keeps ----------------------------------------------------------------------------------------


def kept_bytes(layer: Any, policy: LayerPolicy, tokens: int) -> int:
    """Bytes that a forward of `layer` leaves for its backward."""
    layer.policy = policy
    layer.engine.layout = SequenceLayout.dense(1, tokens)
    h = torch.randn(1, tokens, layer.attention.qkv.num_in, requires_grad=True)
    cos, sin = torch.ones(1, tokens, layer.attention.d), torch.zeros(1, tokens, layer.attention.d)
    storages: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
            look(part)

    look(layer(h, position_embeddings=(cos, sin)).grad_fn.kept)
    return sum(storages.values())


@pytest.mark.parametrize("rank", [0, 4, 20])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_arithmetic_is_what_a_layer_keeps(family: str, rank: int) -> None:
    model: Any = family_model(family)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    fuse(model, report=str)
    decoder = (model.get_base_model() if rank else model).get_decoder()
    layer, tokens = decoder.layers[0].train(), 10
    sizes = fused_tensors(decoder.config, rank, 4)
    heads = decoder.config.num_attention_heads
    everything = kept_bytes(layer, LayerPolicy(), tokens)
    kept: LayerTensor
    for kept in LAYER_TENSORS:
        less = kept_bytes(layer, LayerPolicy(frozenset(LAYER_TENSORS) - {kept}), tokens)
        # The reference attention on the CPU keeps no sums of the softmax.
        expected = tokens * (sizes.get(kept, 0) - (4 * heads if kept == "attention" else 0))
        found = everything - less
        norms = 4 * tokens  # 1 / rms of a branch's norm
        assert 0 <= found - expected <= norms, kept
    nothing = kept_bytes(layer, LayerPolicy(frozenset()), tokens)
    assert 0 <= nothing - tokens * (sizes["hidden"] + sizes["slots"]) <= 4 * 4 * tokens


# -- what holds for all ----------------------------------------------------------------------------------------------

SHAPES = st.builds(
    SimpleNamespace,
    model_type=st.sampled_from(["llama", "gemma2"]),
    hidden_size=st.sampled_from([64, 1024, 4096]),
    intermediate_size=st.sampled_from([128, 4096, 14336]),
    num_attention_heads=st.sampled_from([8, 16]),
    num_key_value_heads=st.sampled_from([1, 8]),
    vocab_size=st.sampled_from([1000, 128256]),
)
SIZES = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 100_000),
        "supervised": st.integers(1, 100_000),
        "bytes_per_value": st.sampled_from([2, 4]),
        "static_gb": st.floats(0.01, 100),
        "num_layers": st.integers(1, 80),
        "rank": st.sampled_from([0, 16, 64]),
        "expanded": st.booleans(),
    }
)
BUDGETS = st.floats(0.1, 400)


def given_up(found: MemoryPlan) -> tuple[int, ...]:
    """How many layers drop each group of DROP_ORDER, then whether the MLP is done tightly, then the inputs."""
    counts = [sum(not policy.keep & set(names) for policy in found.policies) for names in DROP_ORDER]
    return (*counts, found.loss_rows is not None, found.policies[0].offload_input)


@given(SHAPES, SIZES, BUDGETS, st.floats(1, 10))
def test_more_memory_never_gives_up_more(shape: Any, sizes: dict[str, Any], budget: float, factor: float) -> None:
    small, large = plan(shape, budget_gb=budget, **sizes), plan(shape, budget_gb=factor * budget, **sizes)
    assert all(more <= less for more, less in zip(given_up(large), given_up(small), strict=True))
    assert large.recompute_layers <= small.recompute_layers


@given(SHAPES, SIZES, BUDGETS)
def test_a_plan_fits_unless_everything_was_given_up(shape: Any, sizes: dict[str, Any], budget: float) -> None:
    found = plan(shape, budget_gb=budget, **sizes)
    assert found.predicted_peak_gb is not None
    if found.predicted_peak_gb > HEADROOM * budget:
        assert given_up(found) == (sizes["num_layers"],) * 4 + (True, True)


@given(SHAPES, SIZES, BUDGETS)
def test_nothing_is_given_up_that_there_is_room_for(shape: Any, sizes: dict[str, Any], budget: float) -> None:
    """The last step of the plan was needed: with 1% of a layer's smallest tensor less, it would not have been taken."""
    found = plan(shape, budget_gb=budget, **sizes)
    counts = given_up(found)
    if not any(counts):
        return
    assert found.predicted_peak_gb is not None
    relaxed = plan(shape, budget_gb=None, **sizes)
    assert relaxed.predicted_peak_gb is not None
    assert relaxed.predicted_peak_gb > HEADROOM * budget, "all of it would have fitted"
    if counts[4:] == (False, False):
        # One layer of the last group, put back, is too much.
        last = max(number for number, count in enumerate(counts[:4]) if count)
        bytes_a_token = fused_tensors(shape, sizes["rank"], sizes["bytes_per_value"])
        back = sum(bytes_a_token.get(name, 0) for name in DROP_ORDER[last]) * sizes["tokens"] / GB
        assert found.predicted_peak_gb + back > HEADROOM * budget * (1 - 1e-12)


@given(SHAPES, SIZES, st.sampled_from(["auto", "min", "fast"]), st.none() | BUDGETS)
def test_keep_sets_are_nested_in_the_order_of_dropping(
    shape: Any, sizes: dict[str, Any], mode: str, budget: float | None
) -> None:
    found = plan(shape, mode=mode, budget_gb=budget, **sizes)
    assert len(found.policies) == found.num_layers == sizes["num_layers"]
    before: frozenset[LayerTensor] = frozenset()
    for policy in found.policies:
        assert before <= policy.keep, "a later layer keeps no less"
        before = policy.keep
        kept = [names for names in DROP_ORDER if policy.keep & set(names)]
        assert kept == list(DROP_ORDER[len(DROP_ORDER) - len(kept) :]), (
            "what goes first is not kept beside what goes later"
        )
        assert all(set(names) <= policy.keep for names in kept), "tensors that go together stay together"
    counts = given_up(found)[:4]
    assert all(later == 0 or earlier == sizes["num_layers"] for earlier, later in itertools.pairwise(counts))


@given(SHAPES, SIZES, BUDGETS)
def test_min_is_least_and_fast_is_most(shape: Any, sizes: dict[str, Any], budget: float) -> None:
    least, auto, most = (plan(shape, mode=mode, budget_gb=budget, **sizes) for mode in ("min", "auto", "fast"))
    peaks = [found.predicted_peak_gb for found in (least, auto, most)]
    assert peaks == sorted(peaks, key=float)  # type: ignore[arg-type]
    assert peaks[0] is not None
    assert peaks[0] > sizes["static_gb"]
    assert given_up(least) == (sizes["num_layers"],) * 4 + (True, True)
    assert given_up(most) == (0,) * 6


@given(SHAPES, SIZES, st.integers(0, 50_000), st.sampled_from(["auto", "min", "fast"]), st.none() | BUDGETS)
def test_more_tokens_never_need_less(
    shape: Any, sizes: dict[str, Any], more: int, mode: str, budget: float | None
) -> None:
    few = plan(shape, mode=mode, budget_gb=budget, **sizes)
    many = plan(shape, mode=mode, budget_gb=budget, **{**sizes, "tokens": sizes["tokens"] + more})
    assert all(a <= b for a, b in zip(given_up(few), given_up(many), strict=True))
    assert few.predicted_peak_gb is not None
    assert many.predicted_peak_gb is not None
    assert few.predicted_peak_gb <= many.predicted_peak_gb or given_up(few) != given_up(many)


@given(SHAPES, SIZES, st.sampled_from(["auto", "min", "fast"]), st.none() | BUDGETS)
def test_pieces_and_chunks_are_smaller_than_the_whole(
    shape: Any, sizes: dict[str, Any], mode: str, budget: float | None
) -> None:
    found = plan(shape, mode=mode, budget_gb=budget, **sizes)
    for policy in found.policies:
        assert (
            policy.mlp_rows is None
            or MLP_ROWS <= policy.mlp_rows < sizes["tokens"] <= 4 * policy.mlp_rows
            or (policy.mlp_rows == MLP_ROWS)
        )
        assert policy.mlp_rows is None or not policy.keep, "only what is recomputed is done in pieces"
    assert found.loss_rows in (None, TIGHT_LOSS_ROWS)
    assert f"predicted peak {found.predicted_peak_gb:.1f} GB" in found.reason
