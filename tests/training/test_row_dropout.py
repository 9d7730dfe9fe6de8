"""Dropout by row: a step's loss and gradient do not depend on how it is split, and both engines drop the same elements.

fp32 on the CPU unless it says otherwise. LoRA's B is drawn at random: at zero, where it begins, no mask has an effect.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny import make_tiny_model
from tunesmith.config import TrainingConfig
from tunesmith.data.batches import deal, make_batch, split
from tunesmith.kernels.dropout import keep_mask_ref
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import engine_of, set_policies
from tunesmith.models.row_dropout import Draw, MaskSource, RowDropout, _mix, draw_by_row, mask_source, step_seed
from tunesmith.training import loop
from tunesmith.training.loop import accumulate_gradients
from tunesmith.types import LayerPolicy, TokenizedExample
from tunesmith.workflows.train import TrainingSession

Session = Callable[..., TrainingSession]
Step = tuple[float, dict[str, torch.Tensor]]
Examples = Sequence[TokenizedExample]

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
DROPOUT = "adapter.dropout=0.1"
ENGINES = {
    "reference": ("model.engine=reference", "memory.mode=fast"),
    "reference, checkpointed": ("model.engine=reference", "memory.mode=min"),
    "fused": ("model.engine=fused", "memory.mode=fast"),
    "fused, MLP in pieces": ("model.engine=fused", "memory.mode=min"),
}
SEED = step_seed(3407, 5)


IN_PIECES = LayerPolicy(keep=frozenset(), mlp_rows=16)


def ready(run: TrainingSession) -> TrainingSession:
    """In training mode, every B at random, and the MLP in small pieces where memory is short."""
    if engine_of(run.forward.model) is not None and run.config.memory.mode == "min":
        set_policies(run.forward.model, [IN_PIECES] * len(run.forward.decoder.layers))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in run.forward.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    run.forward.model.train()
    return run


def step_of(
    run: TrainingSession, parts: Sequence[Examples], packing: bool = True, seed: int | None = SEED, ranks: int = 1
) -> Step:
    """Loss and gradients of a step with these micro-batches, added up over the ranks that share them."""
    run.forward.model.zero_grad()
    run.forward.dropout_seed = seed
    counts = run.objective.counts(example for part in parts for example in part)
    loss = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "global_counts", lambda _: counts)  # as an all-reduce would make them
        for rank in range(ranks):
            share = deal(parts, rank, ranks)
            loss += float(accumulate_gradients(run.forward, run.objective, share, packing, 0, NO_SCALER))
    parameters = run.forward.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def parts_of(examples: Examples, size: int, packing: bool = True) -> list[list[TokenizedExample]]:
    divided = split([len(example) for example in examples], TrainingConfig(micro_batch_size=size), packing)
    return [[examples[index] for index in part] for part in divided]


def difference(found: Step, expected: Step) -> float:
    """The larger of the relative differences of the losses, and of all gradients together."""
    assert found[1].keys() == expected[1].keys()
    norm = torch.stack([g.norm() for g in expected[1].values()]).norm()
    gradient = torch.stack([(found[1][name] - g).norm() for name, g in expected[1].items()]).norm() / norm
    return max(abs(found[0] / expected[0] - 1), float(gradient))


def assert_another_mask(found: Step, expected: Step) -> None:
    assert found[0] != pytest.approx(expected[0], rel=1e-4)
    assert difference(found, expected) > 0.01


def row_dropouts(model: nn.Module) -> list[RowDropout]:
    return [module for module in model.modules() if isinstance(module, RowDropout)]


# -- how a step is split ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_is_the_same_however_it_is_split(session: Session, engine: str) -> None:
    run = ready(session(DROPOUT, *ENGINES[engine]))
    examples = run.data.train[:8]
    assert len({len(example) for example in examples}) > 3
    whole = step_of(run, [examples])
    for packing, size in itertools.product((True, False), (8, 4, 2, 1)):
        found = step_of(run, parts_of(examples, size, packing), packing)
        assert difference(found, whole) < 1e-6, f"micro-batches of {size}, packing {packing}"
    for ranks in (2, 3):
        assert difference(step_of(run, parts_of(examples, 2), ranks=ranks), whole) < 1e-6, f"{ranks} ranks"
    assert difference(step_of(run, [examples[::-1]]), whole) < 1e-6
    assert_another_mask(step_of(run, [examples], seed=step_seed(3407, 6)), whole)
    assert_another_mask(step_of(run, [examples], seed=SEED ^ 2**63), whole)


def test_memory_plans_do_not_change_the_masks(session: Session) -> None:
    first, *others = (ready(session(DROPOUT, *settings)) for settings in ENGINES.values())
    parts = parts_of(first.data.train[:8], 4)
    expected = step_of(first, parts)
    for run in others:
        assert difference(step_of(run, parts), expected) < 2e-6
    models = [run.forward.model for run in (first, *others)]
    assert [engine_of(model) is not None for model in models] == [False, False, True, True]
    layers = [run.forward.decoder.layers for run in (first, *others)]
    assert [all(layer.gradient_checkpointing for layer in found) for found in layers] == [False, True, False, True]
    assert sum(len(example) for example in parts[0]) > 16, "several pieces"


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "phi3": {},  # fused projections
    "gemma2": {"attn_logit_softcapping": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {  # the MLP of one layer is fused, attention is the model's own
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 24,
        "n_shared_experts": 1, "kv_heads": 4,
    },
}  # fmt: skip
ATTENTION = 'adapter.target_modules=["q_proj", "kv_a_proj_with_mqa", "o_proj"]'


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_drop_the_same_elements(session: Session, tmp_path: Path, family: str) -> None:
    model = make_tiny_model(tmp_path / family, family=family, **FAMILIES[family])
    settings = (DROPOUT, *([ATTENTION] if family == "deepseek_v2" else []))
    reference, fused = (ready(session(*settings, *ENGINES[name], model=model)) for name in ("reference", "fused"))
    assert [engine_of(run.forward.model) is not None for run in (reference, fused)] == [False, True]
    examples = reference.data.train[:6]
    expected, found = step_of(reference, [examples]), step_of(fused, [examples])
    assert difference(found, expected) < 1e-5
    for packing in (True, False):
        assert difference(step_of(fused, parts_of(examples, 2, packing), packing), found) < 2e-6
    assert_another_mask(step_of(fused, [examples], seed=1), found)


def test_a_step_that_ran_out_of_memory_is_repeated_in_halves(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn before the failure, and in the generator, leaves no trace."""
    run = ready(session(DROPOUT, *ENGINES["reference"]))
    examples = run.data.train[:8]
    expected = step_of(run, parts_of(examples, 4))
    own, calls = run.objective.terms, itertools.count()

    def once(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*arguments)

    monkeypatch.setattr(run.objective, "terms", once)
    with pytest.raises(torch.OutOfMemoryError):
        step_of(run, parts_of(examples, 4))
    torch.rand(3)
    assert difference(step_of(run, parts_of(examples, 2)), expected) < 1e-6


# -- what a mask depends on -------------------------------------------------------------------------------------------


def masks_of(modules: Sequence[RowDropout], rows: torch.Tensor, seed: int, features: int = 512) -> torch.Tensor:
    """What each module keeps of these rows, (modules, T, K) bool."""
    ones = torch.ones(len(rows), features)
    with modules[0].source.during(Draw(rows, seed)):
        return torch.stack([module(ones) for module in modules]) != 0


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_seeds_examples_layers_and_projections_are_others(session: Session, p: float) -> None:
    run = ready(session(f"adapter.dropout={p}", *ENGINES["reference"]))
    modules = row_dropouts(run.forward.model)
    assert [module.stream for module in modules] == [
        32 * layer + s for layer in (0, 1) for s in (0, 1, 2, 8, 16, 17, 20)
    ]
    assert {module.source for module in modules} == {mask_source(run.forward.decoder)}
    examples = run.data.train[:2]
    length = min(len(example) for example in examples)
    rows = make_batch(examples, True, 0, "cpu", dropout_rows=True).dropout_rows
    assert rows is not None
    one, two = (part[:length] for part in rows.split([len(example) for example in examples]))
    masks = torch.cat([masks_of(modules, rows, seed) for seed in (SEED, SEED + 1) for rows in (one, two)])
    assert len(masks) == 2 * 2 * 14
    n = masks[0].numel()
    deviation = math.sqrt(p * (1 - p) / n)
    assert (masks.flatten(1).float().mean(1) - (1 - p)).abs().max() < 5 * deviation
    kept = (masks.flatten(1).double() - (1 - p)) / math.sqrt(p * (1 - p))
    correlation = (kept @ kept.T / n).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(n), "1,540 pairs"
    tokens = masks[0].double() - (1 - p)
    between = (tokens @ tokens.T).fill_diagonal_(0) / (p * (1 - p) * tokens.shape[1])
    assert between.abs().max() < 6 / math.sqrt(tokens.shape[1]), "tokens of an example"


def test_what_is_kept_is_scaled(session: Session) -> None:
    (first, *_) = row_dropouts(ready(session("adapter.dropout=0.25", *ENGINES["reference"])).forward.model)
    with first.source.during(Draw(torch.arange(40), SEED)):
        y = first(torch.full((40, 512), 3.0))
    assert y.unique().tolist() == [0.0, 4.0]


def test_seeds_of_steps() -> None:
    # SplitMix64's outputs are mix(s), mix(s + γ), mix(s + 2 γ), ...: its published ones for s = 1234567, and s = 0.
    state, gamma = 1234567, 0x9E3779B97F4A7C15
    assert [_mix(state + number * gamma & 2**64 - 1) for number in range(3)] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip
    assert _mix(0) == 0xE220A8397B1DCDAF
    assert step_seed(7, 3) == _mix(_mix(7) + 3)
    seeds = [step_seed(seed, step) for seed in (0, 1, 2, 3407, 2**32 - 1) for step in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    bits = torch.tensor([[seed >> bit & 1 for bit in range(64)] for seed in seeds]).float().mean(0)
    assert (bits - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(seeds)), "every bit is one half of the time"


# -- the gradient -----------------------------------------------------------------------------------------------------


def lora_layer() -> tuple[Any, Any]:
    """A PEFT linear layer in fp64 in a model without decoder layers, with a random B."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Module()
    model.proj = nn.Linear(23, 11).double()
    model.get_decoder = lambda: model
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, lora_dropout=0.3, target_modules=["proj"]))
    layer = adapted.base_model.model.proj
    layer.lora_A["default"].double()
    nn.init.normal_(layer.lora_B["default"].double().weight)
    return adapted.train(), layer


def test_gradient_is_that_of_the_same_mask_by_hand() -> None:
    model, layer = lora_layer()
    source = draw_by_row(model)
    assert source is not None
    rows = torch.randint(2**62, (6,))
    x = torch.randn(2, 3, 23, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, 11, dtype=torch.float64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with source.during(Draw(rows, SEED)):
        y = layer(x)
    found = torch.autograd.grad(y, (x, a, b), dy)  # after the forward, when nothing is known of the rows any more
    mask = keep_mask_ref(6, 23, 0.3, SEED, layer.lora_dropout["default"].stream, x.device, rows=rows).view(2, 3, 23)
    assert 0 < mask.double().mean() < 1
    by_hand = layer.base_layer(x) + 1.5 * F.linear(F.linear(x * mask / 0.7, a), b)
    torch.testing.assert_close(y, by_hand, rtol=1e-13, atol=1e-13)
    for one, two in zip(found, torch.autograd.grad(by_hand, (x, a, b), dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


def test_inputs_of_any_strides() -> None:
    dropped = RowDropout(0.5, 3, MaskSource()).double()
    base = torch.randn(7, 5, 4, dtype=torch.float64)
    with dropped.source.during(Draw(torch.arange(20), SEED)):
        expected = dropped(base.permute(2, 1, 0).contiguous())
        assert torch.equal(dropped(base.permute(2, 1, 0)), expected)
        x = base.permute(2, 1, 0).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(dropped(x).sum(), x)  # of an expanded tensor
    assert torch.equal(gradient, (expected != 0) * 2.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_forwards_before_one_backward(session: Session, engine: str) -> None:
    """What is computed again in the backward has the rows of its own forward, not those of the last."""
    run = ready(session(DROPOUT, *ENGINES[engine]))
    model, forward = run.forward.model, run.forward
    forward.dropout_seed = SEED
    batches = [make_batch([example], True, 0, "cpu", dropout_rows=True) for example in run.data.train[:2]]

    def gradients(batches: Sequence[Any]) -> list[torch.Tensor]:
        loss = torch.stack([forward.hidden(batch).square().sum() for batch in batches]).sum()
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    apart = [gradients([batch]) for batch in batches]
    for together, one, two in zip(gradients(batches), *apart, strict=True):
        torch.testing.assert_close(together, one + two, rtol=1e-4, atol=1e-5 * float(together.norm()))


# -- where nothing is known of the rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_other_forwards_draw_from_the_generator(session: Session, engine: str) -> None:
    run = ready(session(DROPOUT, *ENGINES[engine]))
    model, forward = run.forward.model, run.forward
    forward.dropout_seed = SEED
    examples = run.data.train[:2]
    numbered, plain = (make_batch(examples, True, 0, "cpu", dropout_rows=rows) for rows in (True, False))

    def foreign() -> torch.Tensor:
        return model(input_ids=plain.input_ids, position_ids=plain.position_ids, use_cache=False).logits

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "numbered": lambda: forward.hidden(numbered),
        "plain": lambda: forward.hidden(plain),
        "foreign": foreign,
    }

    def seeded(name: str, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return calls[name]()

    for name in calls:
        assert torch.equal(seeded(name, 1), seeded(name, 1)), name
        assert torch.equal(seeded(name, 1), seeded(name, 2)) == (name == "numbered"), name
    forward.dropout_seed = None
    assert not torch.equal(seeded("numbered", 1), seeded("numbered", 2)), "without a seed"
    model.eval()
    forward.dropout_seed = SEED
    assert torch.equal(seeded("numbered", 1), seeded("plain", 2)), "evaluation drops nothing"


def test_modules_that_see_other_rows_draw_from_the_generator() -> None:
    dropped = RowDropout(0.5, 3, MaskSource())
    x = torch.ones(5, 64)
    with dropped.source.during(Draw(torch.arange(6), SEED)):
        torch.manual_seed(1)
        found = dropped(x)
        assert torch.equal(dropped.eval()(x), x)
    torch.manual_seed(1)
    assert torch.equal(found, F.dropout(x, 0.5))


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_run_without_dropout_numbers_no_rows(session: Session, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    asked: list[bool] = []
    own = loop.micro_batches

    def spy(*arguments: Any, **options: Any) -> Any:
        for batch in own(*arguments, **options):
            asked.append(batch.dropout_rows is not None)
            yield batch

    monkeypatch.setattr(loop, "micro_batches", spy)
    for dropout, seed, expected in (("0", SEED, False), ("0.1", None, False), ("0.1", SEED, True)):
        run = ready(session(f"adapter.dropout={dropout}", *ENGINES[engine]))
        asked.clear()
        step_of(run, parts_of(run.data.train[:4], 2), seed=seed)
        assert asked == [expected] * 2
        assert (mask_source(run.forward.decoder) is None) == (dropout == "0") == (not row_dropouts(run.forward.model))


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_what_is_saved_and_loaded_is_the_same(session: Session, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    run = ready(session(DROPOUT, *ENGINES["reference"]))
    plain = session(DROPOUT, *ENGINES["reference"])
    for module in plain.forward.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.1)
    assert not row_dropouts(plain.forward.model)
    assert get_peft_model_state_dict(run.forward.model).keys() == get_peft_model_state_dict(plain.forward.model).keys()
    run.forward.model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(run.config.model.name)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    batch = make_batch(run.data.train[:1], True, 0, "cpu")
    with torch.no_grad():
        theirs = ModelForward(loaded.eval(), "cpu", "fp32").hidden(batch)
        run.forward.model.eval()
        assert torch.equal(run.forward.hidden(batch), theirs)
    assert loaded.peft_config["default"].lora_dropout == 0.1


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_second_time_changes_nothing(session: Session, engine: str) -> None:
    run = ready(session(DROPOUT, *ENGINES[engine]))
    model, source, before = run.forward.model, mask_source(run.forward.decoder), row_dropouts(run.forward.model)
    expected = step_of(run, [run.data.train[:3]])
    assert draw_by_row(model) is source
    assert row_dropouts(model) == before
    assert step_of(run, [run.data.train[:3]])[0] == expected[0]


def test_a_model_that_is_fused_by_itself_draws_as_before(session: Session) -> None:
    """`fuse` alone, for somebody else's trainer: a seed that is drawn in every layer."""
    run = session(DROPOUT, *ENGINES["fused"])
    engine = engine_of(run.forward.model)
    assert engine is not None
    del run.forward.decoder.mask_source
    ready(run)
    run.forward.dropout_seed = SEED
    assert not run.forward.wants_dropout_rows
    parts = [run.data.train[:2]]
    torch.manual_seed(1)
    first = step_of(run, parts)
    torch.manual_seed(1)
    assert step_of(run, parts)[0] == first[0]
    assert_another_mask(step_of(run, parts), first)
