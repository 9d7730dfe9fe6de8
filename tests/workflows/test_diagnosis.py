"""The diagnosis: what needs the memory, and five lines on what could change, with the run's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tunesmith.cards import find_card
from tunesmith.config import Method, RunConfig, load_config
from tunesmith.memory.estimate import CONTEXT_GB, Estimate, Load, Setup
from tunesmith.memory.policy import HEADROOM, Mode, plan_memory
from tunesmith.memory.shape import ModelShape
from tunesmith.models.catalogue import CATALOGUE
from tunesmith.types import MemoryPlan
from tunesmith.workflows.diagnosis import SMALLEST, diagnose, least_settings
from tunesmith.workflows.plan_advice import largest_model, smallest_card
from tunesmith.workflows.plan_options import Data, Target, least_needed

NAME = "Qwen/Qwen2.5-7B"
SHAPE = ModelShape.of(CATALOGUE[NAME])
FLAT = [900, 950, 1000, 1000]
BREAKDOWN = {
    "weights_gb": 14.2,
    "adapter_gb": 0.0,
    "gradients_gb": 0.004,
    "optimizer_gb": 0.3,
    "activations_gb": 6.0,
    "context_gb": 0.85,
}
PLAN = MemoryPlan("auto", 21, 28, 14.0, 20.5, "", "fused", breakdown=BREAKDOWN)


def config_of(*settings: str, name: str = NAME) -> RunConfig:
    return load_config(None, settings, {"model.name": name})


def lines_of(
    *settings: str,
    plan: MemoryPlan = PLAN,
    shape: ModelShape | None = SHAPE,
    budget: float = 14.0,
    lengths: Sequence[int] = FLAT,
    **more: Any,
) -> list[str]:
    """The first line, and what the five say without their numbers."""
    first, *rest = diagnose(config_of(*settings), shape, plan, budget, "Tesla T4", lengths, **more).splitlines()
    assert [line[:3] for line in rest] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    topics = [line[3:].partition(": ")[0] for line in rest]
    assert topics == ["activations", "optimizer", "sequence length", "micro-batch", "model"]
    return [first, *(line[3:].partition(": ")[2] for line in rest)]


# -- the first line ---------------------------------------------------------------------------------------------------


def test_what_is_needed_and_what_for() -> None:
    """Parts of under 5 MB are not named, nor the driver's context, which is no part of the budget."""
    assert lines_of()[0] == (
        "this run needs 20.5 GB, and Tesla T4 has 14.0 GB for it (weights 14.2, optimizer 0.3, activations 6.0)"
    )


def test_what_happened_is_said_instead() -> None:
    assert lines_of(happened="step 7 ran out of memory")[0] == (
        "step 7 ran out of memory (weights 14.2, optimizer 0.3, activations 6.0)"
    )


def test_what_cannot_be_predicted() -> None:
    plan = replace(PLAN, predicted_peak_gb=None, breakdown={})
    first, *_, model = lines_of(plan=plan, shape=None)
    assert first == "this run needs an unknown amount, and Tesla T4 has 14.0 GB for it"
    assert model == f"{NAME} is not known to the planner; try method: qlora, or a smaller model"
    assert lines_of("method=qlora", plan=plan, shape=None)[5] == (
        f"{NAME} is not known to the planner; try a smaller model"
    )


# -- activations, optimizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "layers", "line"),
    [
        ("fast", 0, "memory.mode fast keeps them all; set memory.mode: auto, which computes again what does not fit"),
        ("auto", 0, "0 of 28 layers compute them again; set memory.mode: min for all of them"),
        ("auto", 21, "21 of 28 layers compute them again; set memory.mode: min for all of them"),
        ("auto", 28, "all 28 layers compute them again already"),
        ("min", 28, "all 28 layers compute them again already"),
    ],
)
def test_activations(mode: Mode, layers: int, line: str) -> None:
    assert lines_of(plan=replace(PLAN, mode=mode, recompute_layers=layers))[1] == line


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"])
def test_the_optimizer(method: str, name: str) -> None:
    said = lines_of(f"method={method}", f"optimizer.name={name}")[2]
    if "8bit" in name:
        assert said == f"{name} has its states in 8 bits already (0.3 GB)"
    else:
        assert said == (
            f"the states of {name} take 0.3 GB; optimizer.name: paged_adamw_8bit takes a quarter of that, and waits in host "
            "memory where the card is full"
        )


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_weights_in_bf16_are_named_where_they_would_help(name: str) -> None:
    hint = "; optimizer.weights_dtype: bf16 halves weights and gradients"
    settings = ("method=full", "model.dtype=bf16", f"optimizer.name={name}")
    assert lines_of(*settings)[2].endswith(hint)
    assert not lines_of(*settings, "optimizer.weights_dtype=bf16")[2].endswith(hint)
    assert not lines_of("method=full", "model.dtype=fp16", f"optimizer.name={name}")[2].endswith(hint)
    assert not lines_of("model.dtype=bf16", f"optimizer.name={name}")[2].endswith(hint)


def test_the_optimizers_states_are_those_of_the_plan() -> None:
    """By the arithmetic: 8 bytes a parameter of full fine-tuning."""
    plan = plan_memory(Estimate(SHAPE, Setup("full", "fused"), Load(512, 512, 512)), "min", 14.0)
    states = 8 * SHAPE.num_parameters / 2**30
    assert lines_of("method=full", plan=plan)[2].startswith(f"the states of adamw take {states:.1f} GB; ")


# -- lengths, micro-batch ---------------------------------------------------------------------------------------------

TAIL = [100] * 97 + [200, 3000, 4000]


@pytest.mark.parametrize(
    ("lengths", "settings", "line"),
    [
        (FLAT, (), "examples have up to 1,000 tokens, 95% of them at most 1,000; data.max_seq_length is 2048"),
        (
            TAIL,
            (),
            "examples have up to 4,000 tokens, 95% of them at most 100; data.max_seq_length is 2048: 128 with "
            "data.overlong: truncate helps",
        ),
        (
            [64] * 99 + [512],
            ("data.max_seq_length=auto",),
            "examples have up to 512 tokens, 95% of them at most 64; data.max_seq_length is auto: 64 with "
            "data.overlong: truncate helps",
        ),
        # Less than a fifth would be won.
        (
            [100] * 99 + [120],
            (),
            "examples have up to 120 tokens, 95% of them at most 100; data.max_seq_length is 2048",
        ),
        ([50], (), "examples have up to 50 tokens, 95% of them at most 50; data.max_seq_length is 2048"),
    ],
)
def test_lengths(lengths: list[int], settings: tuple[str, ...], line: str) -> None:
    assert lines_of(*settings, lengths=lengths)[3] == line


TOKENS = ("data.packing=true", "training.micro_batch_tokens=4096")


@pytest.mark.parametrize(
    ("settings", "halvings", "line"),
    [
        ((), 0, "one example already, the least there is"),  # nothing was chosen: the least was looked at
        (("training.micro_batch_size=1",), 0, "one example already, the least there is"),
        (
            ("training.micro_batch_size=8",),
            0,
            "8 examples; set training.micro_batch_size: 1 (the effective batch stays)",
        ),
        (TOKENS, 0, "4096 tokens (training.micro_batch_tokens); the longest example has 1,000"),
        (("training.micro_batch_size=8",), 3, "8 examples, halved 3 times: one example already"),
        (("training.micro_batch_size=2",), 1, "2 examples, halved once: one example already"),
        (TOKENS, 2, "4096 tokens, halved 2 times: one example already"),
    ],
)
def test_the_micro_batch(settings: tuple[str, ...], halvings: int, line: str) -> None:
    assert lines_of(*settings, halvings=halvings)[4] == line


# -- the model --------------------------------------------------------------------------------------------------------


def target_of(budget: float) -> Target:
    return Target("this card", budget + CONTEXT_GB)


def least(method: Method, *settings: str, shape: ModelShape = SHAPE) -> float:
    config = config_of(*settings)
    data = Data.of_length(SMALLEST, config.training.batch_size)
    return least_needed(least_settings(config, method), shape, target_of(14.0), data)


@pytest.mark.parametrize(
    ("method", "budget", "leaner"),
    [("full", 24.0, "lora"), ("full", 14.0, "qlora"), ("lora", 14.0, "qlora"), ("lora", 24.0, "qlora")],
)
def test_the_first_leaner_method_that_fits(method: str, budget: float, leaner: Method) -> None:
    needed = least(leaner)
    assert needed <= HEADROOM * budget
    if method == "full" and leaner == "qlora":
        assert least("lora") > HEADROOM * budget
    assert lines_of(f"method={method}", budget=budget)[5] == f"method: {leaner} would need {needed:.1f} GB at least"


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_model_that_is_too_large_for_the_card(method: str) -> None:
    needed = least("qlora")
    assert lines_of(f"method={method}", budget=4.0)[5] == (
        f"7.6B parameters are too many for this card: method: qlora needs {needed:.1f} GB at least; the smallest card with "
        "that is RTX 4060; here the largest known model that trains with qlora is Qwen/Qwen3-4B"
    )
    assert HEADROOM * (find_card("RTX 3070").memory_gb - CONTEXT_GB) >= needed > HEADROOM * 4.0


def test_card_and_model_are_those_that_a_plan_names() -> None:
    """Asked of plan's own advice, with the settings that need the least."""
    settings, data, way = least_settings(config_of(), "qlora"), Data.of_length(SMALLEST, 16), ("qlora", "nf4")
    for budget in (2.0, 3.0, 4.0):
        card = smallest_card(settings, SHAPE, target_of(budget), data, [way])
        model = largest_model(settings, target_of(budget), data, [way], below=SHAPE.num_parameters)
        assert card is not None
        assert model is not None
        assert lines_of(budget=budget)[5].endswith(
            f"; the smallest card with that is {card[0].name}; here the largest known model that trains with qlora is {model[0]}"
        )


def test_a_limit_on_memory_is_no_limit_of_the_card() -> None:
    """The budget holds `memory.limit_gb` already. Where it is the limit, a card is no help, and may be smaller than this one."""
    plain, limited = (lines_of(*settings, budget=4.0)[5] for settings in ((), ("memory.limit_gb=4",)))
    before, _, rest = plain.partition("this card")
    needs, _, smaller = rest.partition("; the smallest card with that is ")
    smaller = smaller.partition("; ")[2]
    assert limited == f"{before}memory.limit_gb 4{needs}; raise it if the card has more; {smaller}"
    assert lines_of("memory.limit_gb=9", budget=4.0)[5] == plain, "less is free than that"


@pytest.mark.parametrize(("dtype", "card"), [("fp16", "T4"), ("bf16", "RTX 5060 Ti 16GB")])
def test_the_smallest_card_is_one_that_has_the_dtype(dtype: str, card: str) -> None:
    shape = ModelShape.of(CATALOGUE["Qwen/Qwen2.5-14B"])
    needed = least("qlora", f"model.dtype={dtype}", shape=shape)
    assert HEADROOM * (find_card("RTX 4070 Ti").memory_gb - CONTEXT_GB) < needed
    said = lines_of(f"model.dtype={dtype}", shape=shape, budget=8.0)[5]
    assert f"needs {needed:.1f} GB at least; the smallest card with that is {card}; " in said


def test_where_no_card_and_no_model_is_known() -> None:
    huge = ModelShape.of({**CATALOGUE[NAME], "num_hidden_layers": 5000})
    said = lines_of("method=qlora", shape=huge, budget=0.05)[5]
    assert said == (
        f"{huge.num_parameters / 1e9:.1f}B parameters are too many for this card: method: qlora needs "
        f"{least('qlora', shape=huge):.1f} GB at least"
    )


def test_a_model_that_is_not_too_large() -> None:
    """QLoRA would fit with shorter examples: neither another card nor another model is what is needed."""
    needed = least("qlora")
    assert lines_of("method=qlora")[5] == (
        f"small enough: method: qlora needs {needed:.1f} GB at least, with one example of 512 tokens"
    )


# -- the least --------------------------------------------------------------------------------------------------------


def test_the_least_by_the_arithmetic() -> None:
    """One short example, everything computed again, states in 8 bits, on the engine that runs there."""

    def peak(setup: Setup, load: Load = Load(SMALLEST, SMALLEST, SMALLEST)) -> float | None:
        return plan_memory(Estimate(SHAPE, setup, load), "min", None).predicted_peak_gb

    eight = {"optimizer": "paged_adamw_8bit"}
    assert least("full") == peak(Setup("full", "fused", r=0, **eight))
    assert least("lora") == peak(Setup("lora", "fused", **eight))
    assert least("qlora") == peak(Setup("qlora", "fused", scheme="nf4", **eight))
    assert least("lora", "adapter.r=64") == peak(Setup("lora", "fused", r=64, **eight))
    assert least("lora", "adapter.target_modules=qv") == peak(Setup("lora", "fused", targets="qv", **eight))
    assert least("lora", "adapter.target_modules=[q_proj]") == peak(
        Setup("lora", "fused", targets=("q_proj",), **eight)
    )
    assert least("lora", "model.engine=reference") == peak(Setup("lora", "reference", **eight))
    assert least("lora", "model.dtype=fp32") == peak(Setup("lora", "fused", value_bytes=4, **eight))
    int8 = ("method=qlora", "quantization.scheme=int8")
    assert least("qlora", *int8) == peak(Setup("qlora", "reference", scheme="int8", **eight))
    whole = Load(SMALLEST, SMALLEST, SMALLEST, accumulates=False)
    assert least("lora", "training.batch_size=1") == peak(Setup("lora", "fused", **eight), whole)
    assert least("qlora") < least("lora") < least("full")


def test_the_least_of_a_family_without_fused_layers() -> None:
    shape = ModelShape.of(CATALOGUE["HuggingFaceTB/SmolLM3-3B"])
    setup = Setup("lora", "reference", optimizer="paged_adamw_8bit")
    expected = plan_memory(Estimate(shape, setup, Load(512, 512, 512)), "min", None).predicted_peak_gb
    assert least("lora", shape=shape) == expected


def test_what_is_set_for_more_memory_does_not_count() -> None:
    int8 = ("method=qlora", "quantization.scheme=int8")  # on the reference engine, where a packed row has a mask
    for more in (
        ("memory.mode=fast", "training.micro_batch_size=8", "optimizer.name=adamw"),
        ("data.packing=true", "training.micro_batch_tokens=4096", "training.batch_tokens=8192"),
    ):
        assert least("qlora", *int8, *more) == least("qlora", *int8)
