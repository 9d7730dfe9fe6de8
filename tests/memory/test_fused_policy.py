"""What the fused engine keeps: exact arithmetic on one shape, what a layer really keeps, and what must hold for all plans."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_of import family_model
from peft import LoraConfig, get_peft_model

from tunesmith.kernels.attention import SequenceLayout
from tunesmith.memory.estimate import MLP_ROWS, WORKSPACE_GB, Estimate, Load, Setup, fused_tensors
from tunesmith.memory.policy import DROP_ORDER, HEADROOM, TIGHT_LOSS_ROWS, Mode, fits, plan_memory
from tunesmith.memory.replays import GRAPH_GB, MAX_GRAPHS
from tunesmith.memory.shape import ModelShape
from tunesmith.models.fuse import fuse
from tunesmith.types import GB, LAYER_TENSORS, LayerPolicy, LayerTensor, MemoryPlan

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
}
SHAPE = ModelShape.of(CONFIG)
LAYER = SHAPE.layers[0][1]
TOKENS, LAYERS = 8192, 24
LORA, QLORA = Setup("lora", "fused"), Setup("qlora", "fused", scheme="nf4")


def plan(
    mode: Mode = "auto",
    budget: float | None = None,
    tokens: int = TOKENS,
    supervised: int | None = None,
    setup: Setup = LORA,
    shape: ModelShape = SHAPE,
    correction: float = 0.0,
    graphs: bool = False,
) -> MemoryPlan:
    load = Load(tokens, tokens if supervised is None else supervised, tokens)
    return plan_memory(Estimate(shape, setup, load, weights_gb=3.0), mode, budget, correction, graphs)


# -- one shape, by hand -----------------------------------------------------------------------------------------------

KEPT = {"qkv": 2 * (24 * 64 + 3 * 16), "attention": 2 * 1024 + 4 * 16, "middle": 2048, "gate_up": 2 * (8192 + 2 * 16)}
"""Bytes a token that a layer keeps, in 16 bits at rank 16."""

ALWAYS = 2 * (1024 + 2 * 16)
"""Its input, and S of the output and down projections."""

STATIC = 3.0 + WORKSPACE_GB + (6 + 4 + 8) * 8_454_144 / GB
"""Weights as they were given; the adapter in fp32 and as operands, its gradients, two moments."""

MATRIX = 4096 * 1024 * 2


def ds_parts(rows: int) -> int:
    """The GLU backward's parts: dS for each 64 of the 4,096 columns, and dA and dB in fp32 for up to 9 programs of 512 rows."""
    return 2 * 64 * rows * 2 * 16 + 4 * max(1, min(9, rows // 512)) * 3 * 4096 * 16


def peak(
    dropped: dict[str, int], tokens: int = TOKENS, pieces: int | None = None, offload: int = 0, operand: int = 0
) -> float:
    """The predicted peak in GB, written out. `pieces`: where memory is short, the MLP's rows at a time.

    The last layer's backward is the largest: everything that others keep is there. One input that goes to host memory is on
    its way; if the last layer's goes too, it stays, and is there once more in its backward.
    """
    rows = pieces or tokens
    missing = {name: KEPT[name] if dropped.get(name, 0) == LAYERS else 0 for name in KEPT}
    around = 2 * 2048 + 2 * 16
    back = 2048 if offload == LAYERS else 0
    if rows < tokens:
        mlp = rows * (missing["gate_up"] + 8192) + ds_parts(rows) + 3 * operand
    else:
        stages = (rows * 8192 + operand, rows * 8192 + ds_parts(rows), 2 * rows * 2048 + 2 * operand)
        mlp = rows * missing["gate_up"] + max(stages)
    mlp += tokens * (around + back + missing["qkv"] + missing["attention"] + missing["middle"])
    attention = tokens * (around + missing["qkv"] + missing["attention"] + 2048 + 2 * 1536 + KEPT["qkv"])
    head = 2 * 2 * tokens * 2048 + min(tokens, 512 if pieces else 8192) * 32768 * 2
    stored = sum((LAYERS - dropped.get(name, 0)) * tokens * size for name, size in KEPT.items())
    stored += tokens * (LAYERS * 64 + (LAYERS - offload + (offload > 0)) * 2048)
    return STATIC + (stored + max(mlp, attention, head)) / GB


def test_bytes_of_a_layers_tensors() -> None:
    assert fused_tensors(SHAPE, LAYER, LORA) == {"hidden": 2048, "slots": 64, **KEPT}
    assert fused_tensors(SHAPE, LAYER, Setup("lora", "fused", r=0)) == {
        "hidden": 2048, "slots": 0, "qkv": 3072, "attention": 2112, "middle": 2048, "gate_up": 16384
    }  # fmt: skip
    single, double = fused_tensors(SHAPE, LAYER, LORA), fused_tensors(SHAPE, LAYER, Setup("lora", "fused", 4))
    assert all(double[name] == 2 * size for name, size in single.items() if name != "attention")
    assert double["attention"] == 2 * single["attention"] - 4 * 16, "the softmax's sums are in fp32 anyway"


def test_full_fine_tuning_has_hidden_states_in_fp32_and_no_slots() -> None:
    assert fused_tensors(SHAPE, LAYER, Setup("full", "fused", r=0)) == {
        "hidden": 4096, "slots": 0, "qkv": 3072, "attention": 2112, "middle": 4096, "gate_up": 16384
    }  # fmt: skip


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_branches_with_a_norm_keep_their_output(family: str) -> None:
    shape = ModelShape.of({**CONFIG, "model_type": family})
    assert fused_tensors(shape, LAYER, LORA) == {
        **fused_tensors(SHAPE, LAYER, LORA), "attention_output": 2048 + 32, "mlp_output": 2048 + 32
    }  # fmt: skip


def test_everything_is_kept_where_it_fits() -> None:
    for found in (plan(), plan(budget=1000.0), plan("fast", 0.1)):
        assert found.predicted_peak_gb == pytest.approx(peak({}))
        assert found.policies == (LayerPolicy(),) * LAYERS
        assert (found.engine, found.recompute_layers, found.loss_rows) == ("fused", 0, None)
    assert plan().reason == f"memory.mode auto: predicted peak {peak({}):.1f} GB: keep all activations"
    assert plan(budget=1000.0).reason == (
        f"memory.mode auto: predicted peak {peak({}):.1f} GB of 1000.0 GB: keep all activations"
    )


def room_for(gb: float) -> float:
    """The budget of which a plan of `gb` is just within."""
    return (gb + 1e-9) / HEADROOM


@pytest.mark.parametrize("number", [1, 2, 13, LAYERS])
def test_gate_up_goes_first_one_layer_at_a_time(number: int) -> None:
    budget = room_for(peak({"gate_up": number}))
    found = plan(budget=budget)
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
    for names in DROP_ORDER:
        name = names[0]
        for number in (5, LAYERS):
            dropped[name] = number
            found = plan(budget=room_for(peak(dropped)))
            assert found.predicted_peak_gb == pytest.approx(peak(dropped))
            gone = {other for group in DROP_ORDER if group[0] in dropped for other in group}
            assert found.policies[0].keep == frozenset(LAYER_TENSORS) - gone
            assert (name in found.policies[-1].keep) == (number < LAYERS)
            assert (found.loss_rows, found.policies[0].mlp_rows, found.policies[0].offload_input) == (None, None, False)
    assert found.reason.endswith(": recompute gate_up of 24, middle of 24, qkv of 24, attention of 24 of 24 layers"), (
        "nothing about host memory"
    )


ALL = dict.fromkeys(KEPT, LAYERS)


def test_then_the_mlp_in_pieces_and_short_chunks_of_the_loss() -> None:
    found = plan(budget=room_for(peak(ALL, pieces=4096)))
    assert found.predicted_peak_gb == pytest.approx(peak(ALL, pieces=4096))
    assert found.policies == (LayerPolicy(frozenset(), False, 4096),) * LAYERS
    assert found.loss_rows == TIGHT_LOSS_ROWS == 512


def test_and_last_the_inputs_go_to_host_memory() -> None:
    """All of them only where nothing fits: with the last layer's input the peak does not fall."""
    found = plan(budget=0.1)
    assert found.predicted_peak_gb == pytest.approx(peak(ALL, pieces=4096, offload=LAYERS))
    assert found.policies == (LayerPolicy(frozenset(), True, 4096),) * LAYERS
    assert found.reason.endswith("attention of 24 of 24 layers, the inputs of 24 in host memory")
    assert (found.recompute_layers, found.loss_rows) == (LAYERS, TIGHT_LOSS_ROWS)
    assert not fits(found)


@pytest.mark.parametrize("number", [2, 7, LAYERS - 1])
def test_inputs_go_to_host_memory_layer_by_layer(number: int) -> None:
    needed = peak(ALL, pieces=4096, offload=number)
    assert needed == pytest.approx(peak(ALL, pieces=4096) - (number - 1) * TOKENS * 2048 / GB), "one is on its way"
    found = plan(budget=room_for(needed))
    assert found.predicted_peak_gb == pytest.approx(needed)
    moved, kept = LayerPolicy(frozenset(), True, 4096), LayerPolicy(frozenset(), False, 4096)
    assert found.policies == (moved,) * number + (kept,) * (LAYERS - number)
    assert found.reason.endswith(f"attention of 24 of 24 layers, the inputs of {number} in host memory")
    assert (found.recompute_layers, found.loss_rows) == (LAYERS, TIGHT_LOSS_ROWS)
    assert fits(found)


def test_graphs_take_memory_of_the_drivers_beside_the_peak() -> None:
    pool = GRAPH_GB * MAX_GRAPHS
    plain, found = plan(), plan(graphs=True)
    assert (plain.pool_gb, found.pool_gb) == (0.0, pool)
    assert (found.predicted_peak_gb, found.policies) == (plain.predicted_peak_gb, plain.policies)
    both = peak({"gate_up": 7}) + pool
    found = plan(budget=room_for(both), graphs=True)
    assert found.recompute_layers == 7
    assert found.predicted_peak_gb == pytest.approx(peak({"gate_up": 7}))
    assert fits(found)
    assert plan(budget=room_for(both)).recompute_layers < 7
    assert plan(budget=room_for(both - 1e-6), graphs=True).recompute_layers == 8
    for room, fit in ((peak({}) + pool, True), (peak({}) + pool - 1e-6, False)):
        assert fits(plan("fast", room_for(room), graphs=True)) == fit
        assert fits(plan("fast", room_for(room)))


def test_min_gives_up_everything_whatever_the_budget() -> None:
    for budget in (None, 1000.0, 0.1):
        found = plan("min", budget)
        assert found.policies == (LayerPolicy(frozenset(), True, 4096),) * LAYERS
        assert found.predicted_peak_gb == pytest.approx(peak(ALL, pieces=4096, offload=LAYERS))
        assert (found.recompute_layers, found.loss_rows) == (LAYERS, TIGHT_LOSS_ROWS)


@pytest.mark.parametrize(("tokens", "rows"), [(100, None), (4096, None), (5000, 4096), (16384, 4096), (20000, 5000)])
def test_the_pieces_of_the_mlp(tokens: int, rows: int | None) -> None:
    """A quarter of the tokens, at least 4,096; a micro-batch of fewer is one piece, with short chunks of the loss."""
    found = plan("min", tokens=tokens)
    assert found.policies[0].mlp_rows == rows
    assert found.loss_rows == TIGHT_LOSS_ROWS
    assert found.predicted_peak_gb == pytest.approx(peak(ALL, tokens, pieces=rows or tokens, offload=LAYERS))


@pytest.mark.parametrize(("tokens", "rows"), [(TOKENS, 4096), (4200, None), (5000, 4096)])
def test_pieces_hold_all_dequantized_operands(tokens: int, rows: int | None) -> None:
    """So a few tokens more than a piece has are not worth a second one."""
    assert plan(setup=QLORA).predicted_peak_gb == pytest.approx(peak({}, operand=MATRIX))
    found = plan("min", tokens=tokens, setup=QLORA)
    assert found.policies[0].mlp_rows == rows
    assert found.predicted_peak_gb == pytest.approx(
        peak(ALL, tokens, pieces=rows or tokens, offload=LAYERS, operand=MATRIX)
    )


def test_few_supervised_rows_make_few_logits() -> None:
    """A vocabulary of 1,000,000: 2^29 bytes are 256 rows of it, and 128 are taken at least."""
    wide = ModelShape.of({**CONFIG, "vocab_size": 1_000_000})
    kept = 100 * LAYERS * (sum(KEPT.values()) + ALWAYS)
    least = 100 * (LAYERS * 64 + 2048)
    for supervised, mode, rows in ((10, "fast", 10), (5000, "fast", 256), (5000, "min", TIGHT_LOSS_ROWS)):
        head = (2 * supervised + 2 * 100) * 2048 + rows * 1_000_000 * 2
        found = plan(mode, tokens=100, supervised=supervised, shape=wide)
        held = kept if mode == "fast" else least
        assert found.predicted_peak_gb == pytest.approx(STATIC + (held + head) / GB)


@pytest.mark.parametrize("correction", [-0.5, 0.25, 2.0])
def test_what_a_measurement_found_is_added_to_every_prediction(correction: float) -> None:
    assert plan("fast", correction=correction).predicted_peak_gb == pytest.approx(peak({}) + correction)
    found = plan(budget=room_for(peak({"gate_up": 7}) + correction), correction=correction)
    assert found.recompute_layers == 7
    assert found.predicted_peak_gb == pytest.approx(peak({"gate_up": 7}) + correction)


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
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "gemma3_text"])
def test_the_arithmetic_is_what_a_layer_keeps(family: str, rank: int) -> None:
    model: Any = family_model(family)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    fuse(model, report=str)
    decoder = (model.get_base_model() if rank else model).get_decoder()
    layer, tokens = decoder.layers[0].train(), 10
    shape = ModelShape.of(decoder.config.to_dict())
    sizes = fused_tensors(shape, shape.layers[0][1], Setup("lora", "fused", 4, rank))
    heads = decoder.config.num_attention_heads
    one_matrix = family == "phi3"  # which is one adapter too: S of q, k and v is one slot wide, of gate and up as well
    slot = sizes["slots"] // 2
    everything = kept_bytes(layer, LayerPolicy(), tokens)
    kept: LayerTensor
    for kept in LAYER_TENSORS:
        less = kept_bytes(layer, LayerPolicy(frozenset(LAYER_TENSORS) - {kept}), tokens)
        # The reference attention on the CPU keeps no sums of the softmax.
        expected = tokens * (sizes.get(kept, 0) - (4 * heads if kept == "attention" else 0))
        if one_matrix:
            expected -= tokens * slot * {"qkv": 2, "gate_up": 1}.get(kept, 0)
        found = everything - less
        norms = 4 * tokens  # 1 / rms of a branch's norm
        assert 0 <= found - expected <= norms, kept
    nothing = kept_bytes(layer, LayerPolicy(frozenset()), tokens)
    assert 0 <= nothing - tokens * (sizes["hidden"] + sizes["slots"]) <= 4 * 4 * tokens


# -- what holds for all ----------------------------------------------------------------------------------------------

SHAPES = st.builds(
    lambda **settings: ModelShape.of(settings),
    model_type=st.sampled_from(["llama", "gemma2"]),
    hidden_size=st.sampled_from([64, 1024, 4096]),
    intermediate_size=st.sampled_from([128, 4096, 14336]),
    num_hidden_layers=st.integers(3, 40),  # the inputs of two are on the card anyway: offloading then saves nothing
    num_attention_heads=st.sampled_from([8, 16]),
    num_key_value_heads=st.sampled_from([1, 8]),
    vocab_size=st.sampled_from([1000, 128256]),
)
SETUPS = st.one_of(
    st.builds(
        Setup,
        method=st.sampled_from(["lora", "qlora"]),
        engine=st.just("fused"),
        value_bytes=st.sampled_from([2, 4]),
        r=st.sampled_from([4, 16, 64]),
    ),
    st.just(Setup("full", "fused", 2, 0)),
)
LOADS = st.builds(
    Load,
    tokens=st.integers(1, 100_000),
    supervised=st.integers(1, 100_000),
    sequence=st.just(1024),
    accumulates=st.booleans(),
)
ESTIMATES = st.builds(Estimate, SHAPES, SETUPS, LOADS)
MODES: st.SearchStrategy[Mode] = st.sampled_from(["auto", "min", "fast"])
BUDGETS = st.floats(0.1, 400)


def given_up(found: MemoryPlan) -> tuple[int, ...]:
    """How many layers drop each group of DROP_ORDER, then whether the MLP is done tightly, then how many inputs."""
    counts = [sum(not policy.keep & set(names) for policy in found.policies) for names in DROP_ORDER]
    return (*counts, found.loss_rows is not None, sum(policy.offload_input for policy in found.policies))


def predicted(found: MemoryPlan) -> float:
    assert found.predicted_peak_gb is not None
    return found.predicted_peak_gb


@given(ESTIMATES, BUDGETS, st.floats(1, 10))
def test_more_memory_never_gives_up_more(estimate: Estimate, budget: float, factor: float) -> None:
    small, large = (plan_memory(estimate, "auto", size) for size in (budget, factor * budget))
    assert all(more <= less for more, less in zip(given_up(large), given_up(small), strict=True))
    assert large.recompute_layers <= small.recompute_layers


@given(ESTIMATES, BUDGETS)
def test_a_plan_fits_unless_everything_was_given_up(estimate: Estimate, budget: float) -> None:
    found = plan_memory(estimate, "auto", budget)
    if not fits(found):
        assert given_up(found) == (estimate.shape.num_layers,) * 4 + (True, estimate.shape.num_layers)


@given(ESTIMATES, BUDGETS)
def test_nothing_is_given_up_that_there_is_room_for(estimate: Estimate, budget: float) -> None:
    """The last step of the plan was needed: with what it gave up put back, the plan does not fit."""
    found = plan_memory(estimate, "auto", budget)
    counts = given_up(found)
    if not any(counts):
        return
    policies, rows = list(found.policies), found.loss_rows
    if counts[5]:
        layer = counts[5] - 1
        policies[layer] = LayerPolicy(policies[layer].keep, False, policies[layer].mlp_rows)
    elif counts[4]:
        policies, rows = [LayerPolicy(policy.keep) for policy in policies], None
    else:
        last = max(number for number, count in enumerate(counts[:4]) if count)
        layer = counts[last] - 1
        policies[layer] = LayerPolicy(policies[layer].keep | frozenset(DROP_ORDER[last]))
    assert estimate.fused(policies, rows).peak_gb > HEADROOM * budget


@given(ESTIMATES, MODES, st.none() | BUDGETS)
def test_keep_sets_are_nested_in_the_order_of_dropping(estimate: Estimate, mode: Mode, budget: float | None) -> None:
    found = plan_memory(estimate, mode, budget)
    assert len(found.policies) == found.num_layers == estimate.shape.num_layers
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
    assert all(later == 0 or earlier == found.num_layers for earlier, later in itertools.pairwise(counts))


@given(ESTIMATES, BUDGETS)
def test_min_is_least_and_fast_is_most(estimate: Estimate, budget: float) -> None:
    least, auto, most = (plan_memory(estimate, mode, budget) for mode in ("min", "auto", "fast"))
    assert (
        estimate.static.peak_gb - estimate.static.gradients_gb < predicted(least) <= predicted(auto) <= predicted(most)
    )
    assert given_up(least) == (estimate.shape.num_layers,) * 4 + (True, estimate.shape.num_layers)
    assert given_up(most) == (0,) * 6


@given(SHAPES, SETUPS, LOADS, st.integers(0, 50_000), MODES, st.none() | BUDGETS)
def test_more_tokens_never_need_less(
    shape: ModelShape, setup: Setup, load: Load, more: int, mode: Mode, budget: float | None
) -> None:
    larger = Load(load.tokens + more, load.supervised, load.sequence, load.accumulates)
    few, many = (plan_memory(Estimate(shape, setup, size), mode, budget) for size in (load, larger))
    assert all(a <= b for a, b in zip(given_up(few), given_up(many), strict=True))
    assert predicted(few) <= predicted(many) or given_up(few) != given_up(many)


@given(ESTIMATES, MODES, st.none() | BUDGETS, st.floats(-5, 5))
def test_pieces_and_chunks_are_smaller_than_the_whole(
    estimate: Estimate, mode: Mode, budget: float | None, correction: float
) -> None:
    found, tokens = plan_memory(estimate, mode, budget, correction), estimate.load.tokens
    for policy in found.policies:
        assert policy.mlp_rows is None or MLP_ROWS <= policy.mlp_rows < tokens <= 4 * policy.mlp_rows
        assert policy.mlp_rows is None or not policy.keep, "only what is recomputed is done in pieces"
    assert found.loss_rows in (None, TIGHT_LOSS_ROWS)
    assert predicted(found) == estimate.fused(found.policies, found.loss_rows).peak_gb + correction
    assert f"predicted peak {found.predicted_peak_gb:.1f} GB" in found.reason
