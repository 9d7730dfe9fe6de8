"""One way to train on one card: its micro-batch, the least it needs, what limits it, several cards, measured speeds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from plans import PACKED, QWEN, config_of, measured, now, planned, target_of

from tunesmith.cards import CARDS, find_card
from tunesmith.errors import ConfigError
from tunesmith.memory.choose import WORTH
from tunesmith.memory.policy import HEADROOM
from tunesmith.memory.replays import GRAPH_GB, MAX_GRAPHS
from tunesmith.memory.shape import ModelShape
from tunesmith.models.catalogue import CATALOGUE
from tunesmith.workflows.plan import find_shape, plan
from tunesmith.workflows.plan_lists import plan_cards, plan_models
from tunesmith.workflows.plan_options import (
    PARALLEL,
    Data,
    Target,
    least_needed,
    plan_option,
    trains,
    with_settings,
)

pytestmark = pytest.mark.usefixtures("nothing_measured")


# -- what fits --------------------------------------------------------------------------------------------------------


def test_the_micro_batch_is_the_fastest_that_fits() -> None:
    """Or a smaller one that is within 2% of it."""
    for gpu, method in (("T4", "qlora"), ("H100", "lora"), ("A10", "lora")):
        config = config_of(QWEN, f"method={method}")
        target, shape = target_of(gpu), find_shape(QWEN)[1]
        lengths = [700] * 16
        chosen = plan_option(config, shape, target, lengths, lengths)
        others = [
            plan_option(with_settings(config, training__micro_batch_size=size), shape, target, lengths, lengths)
            for size in (1, 2, 3, 4, 6, 8, 16)
        ]
        assert chosen in others
        fastest = max(other.tokens_per_second or 0 for other in others if other.fits)
        assert chosen.tokens_per_second is not None
        assert chosen.tokens_per_second >= WORTH * fastest


def test_a_larger_card_is_never_slower() -> None:
    card = find_card("A10")
    config, shape = config_of(QWEN, "method=lora"), find_shape(QWEN)[1]
    lengths = [3000] * 16
    found = [plan_option(config, shape, Target("A10", gb, card), lengths, lengths) for gb in range(17, 60, 3)]
    assert [each.fits for each in found] == sorted(each.fits for each in found)
    fitting = [each.tokens_per_second or 0 for each in found if each.fits]
    assert len(fitting) > 10
    assert all(more >= WORTH * less for less, more in pairwise(fitting))
    assert fitting[-1] > 1.2 * fitting[0]


def test_what_a_list_denies_is_what_a_plan_denies() -> None:
    """The least is asked of two micro-batches, a plan of all."""
    for gpu, settings in (("T4", ()), ("H100", ("training.batch_size=5",)), ("A10", ("memory.mode=fast",))):
        target = target_of(gpu)
        for name in list(CATALOGUE)[::3]:
            shape = ModelShape.of(CATALOGUE[name])
            for method in ("full", "lora", "qlora"):
                config = config_of(name, f"method={method}", *settings)
                data = Data.of_length(1000, 16)
                found = plan_option(config, shape, target, data.lengths, data.supervised)
                assert trains(config, shape, target, data) == found.fits, (name, method)
                if not found.fits:
                    assert least_needed(config, shape, target, data) == found.peak_gb, (name, method)


def test_the_shapes_of_the_catalogue_are_all_planned() -> None:
    """Each known model trains with QLoRA on the largest card, or its weights alone are too large."""
    target = target_of("B300")
    for name, values in CATALOGUE.items():
        shape = ModelShape.of(values)
        lengths = [512] * 16
        found = plan_option(config_of(name, "method=qlora"), shape, target, lengths, lengths)
        assert found.fits == (found.breakdown["weights_gb"] <= HEADROOM * target.budget_gb), name


# -- what the card or the settings allow ------------------------------------------------------------------------------


def test_memory_that_a_run_may_not_take_is_not_planned() -> None:
    limited = planned("llama-3.1-8b", "H100", None, ("memory.limit_gb=10",))
    found = limited["recommended"]
    assert found["fits"]
    assert 0.9 * 9 < found["peak_gb"] + found["graphs_gb"] <= 9
    assert " of 10.0 GB by memory.limit_gb, about " in limited["answer"]
    denied = planned("llama-3.1-8b", "H100", None, ("memory.limit_gb=5",))
    assert denied["answer"].startswith(
        "Llama-3.1-8B does not train on an H100 (5.0 GB by memory.limit_gb): full needs "
    )
    large = planned("llama-3.1-8b", "H100", None, ("memory.limit_gb=79.18",))
    assert large["recommended"] == planned("llama-3.1-8b", "H100")["recommended"]
    by_list = {
        row["gpu"]: row["methods"]["qlora"]
        for row in plan_cards(config_of("llama-3.1-8b", "memory.limit_gb=10"), None)[1]
    }
    assert (by_list["H100"]["peak_gb"], by_list["H100"]["fits"]) == (found["peak_gb"], True)


def test_a_card_without_bf16_is_not_planned_for_it() -> None:
    with pytest.raises(ConfigError) as caught:
        planned(QWEN, "T4", None, ("model.dtype=bf16",))
    assert str(caught.value) == (
        "model.dtype is bf16, but T4 (compute capability (7, 5)) has no bf16; use fp16 or auto"
    )
    assert planned(QWEN, "T4", None, ("model.dtype=fp16",))["recommended"] == planned()["recommended"]
    cards = {row["gpu"] for row in plan_cards(config_of(QWEN, "model.dtype=bf16"), None, ("lora",))[1]}
    assert cards == {card.name for card in CARDS if card.bf16}


def test_what_cuda_graphs_hold_counts() -> None:
    small = "qwen2.5-0.5b"  # launching takes more than 40% of its time
    found = planned(small, "H100", None, (), ("lora",), 512)["recommended"]
    assert found["graphs_gb"] == pytest.approx(GRAPH_GB * MAX_GRAPHS)
    held = found["peak_gb"] + found["graphs_gb"]
    assert f", {held:.1f} of 79.2 GB, " in planned(small, "H100", None, (), ("lora",), 512)["answer"]
    plain = planned(small, "H100", None, ("training.cuda_graphs=false",), ("lora",), 512)["recommended"]
    assert plain["graphs_gb"] == 0.0
    by_list = {
        row["model"]: row["methods"]["lora"] for row in plan_models(config_of(""), target_of("H100"), 512, ("lora",))
    }
    assert by_list["Qwen/Qwen2.5-0.5B"]["graphs_gb"] == found["graphs_gb"]
    assert by_list["Qwen/Qwen2.5-7B"]["graphs_gb"] == 0.0, "it computes for longer"


def test_the_least_is_that_of_padded_and_packed_rows() -> None:
    """Full fine-tuning adds no gradients up where a step is one micro-batch, which packed rows of many lengths make smaller."""
    lengths = [64] * 15 + [1024]
    config, shape = config_of(QWEN, "method=full", "data.max_seq_length=auto"), find_shape(QWEN)[1]
    target, data = target_of("H100"), Data(lengths, lengths, True)
    either, padded, packed = (
        least_needed(with_settings(config, data__packing=packing), shape, target, data)
        for packing in ("auto", False, True)
    )
    assert either == min(padded, packed) == packed < padded


def test_dora_runs_in_the_reference_engine() -> None:
    """With a magnitude for each output, 28 layers of 2 · 3584 + 2 · 512 + 3584 + 2 · 18944 of them, and more to keep."""
    plain, dora = (
        planned(QWEN, "H100", None, (setting,), ("lora",), 512)["recommended"]
        for setting in ("adapter.dora=false", "adapter.dora=true")
    )
    assert dora["adapter_parameters"] - plain["adapter_parameters"] == 28 * (2 * 3584 + 2 * 512 + 3584 + 2 * 18944)
    reference = planned(QWEN, "H100", None, ("model.engine=reference",), ("lora",), 512)["recommended"]
    assert dora["peak_gb"] > reference["peak_gb"] or dora["recompute_layers"] > reference["recompute_layers"]
    with pytest.raises(ConfigError, match=r"model\.engine is fused, which does not run DoRA"):
        planned(QWEN, "H100", None, ("adapter.dora=true", "model.engine=fused"), ("lora",), 512)


def test_inputs_in_host_memory_are_counted() -> None:
    config, shape = config_of(QWEN, "method=qlora"), find_shape(QWEN)[1]
    found = plan_option(config, shape, target_of("T4"), [32768] * 16, [32768] * 16)
    number = found.recompute.removeprefix("all 28 layers, inputs of ").removesuffix(" in host memory")
    assert 0 < int(number) < 28
    assert f"recompute {found.recompute}, " in planned(QWEN, "T4", None, (), (), 32768)["answer"]


# -- several cards ----------------------------------------------------------------------------------------------------


def test_several_cards_share_a_step() -> None:
    four = planned(QWEN, "4xH100", None, (), ("lora",))["options"][0]
    one = planned(QWEN, "H100", None, ("training.batch_size=4",), ("lora",))["options"][0]
    assert four["tokens_per_second"] == pytest.approx(4 * PARALLEL * one["tokens_per_second"])
    same = ("peak_gb", "micro_batch_size", "gradient_accumulation_steps", "recompute", "fits")
    assert [four[key] for key in same] == [one[key] for key in same]


def test_cards_without_an_example_compute_nothing() -> None:
    """A step's 16 examples go to 16 of 32 cards, or 2 of 8 to each of three and 1 to two."""
    one = planned(QWEN, "H100", None, ("training.batch_size=1",), ("lora",))["options"][0]["tokens_per_second"]
    for count, most in ((16, 1), (32, 1)):
        found = planned(QWEN, f"{count}xH100", None, (), ("lora",))["options"][0]
        assert found["micro_batch_size"] * found["gradient_accumulation_steps"] == most
        assert found["tokens_per_second"] == pytest.approx(16 * PARALLEL * one)
    two = planned(QWEN, "H100", None, ("training.batch_size=2",), ("lora",))["options"][0]["tokens_per_second"]
    five = planned(QWEN, "5xH100", None, ("training.batch_size=8",), ("lora",))["options"][0]["tokens_per_second"]
    assert five == pytest.approx(4 * PARALLEL * two)


def test_several_cards_share_a_step_in_tokens() -> None:
    settings = (*PACKED, "training.micro_batch_tokens=4096", "training.batch_tokens=32768")
    assert planned(QWEN, "4xH100", None, settings, ("lora",))["options"][0]["gradient_accumulation_steps"] == 2
    assert planned(QWEN, "H100", None, settings, ("lora",))["options"][0]["gradient_accumulation_steps"] == 8


# -- what was measured ------------------------------------------------------------------------------------------------


def test_launching_takes_what_it_took_in_the_runs() -> None:
    """The reference engine waits for Python, here with twice the time of the H100's host; the runs' own plans knew that."""
    reference: dict[str, Any] = {"settings": ("model.engine=reference", "training.batch_size=1"), "sequence": 128}
    before = planned("qwen2.5-0.5b", "H100", methods=("lora",), **reference)["options"][0]
    measured(1000.0, engine="reference", parameters=5 * 10**8, host=2.0)
    config = config_of("qwen2.5-0.5b", *reference["settings"])
    after = plan(config, target_of("H100"), methods=("lora",), sequence=128)["options"][0]
    assert after["tokens_per_second"] == pytest.approx(0.5 * before["tokens_per_second"], rel=0.01)


@pytest.mark.parametrize(
    "other",
    [
        {"card": "H100 PCIe"},
        {"card": "A100 80GB"},
        {"engine": "reference"},
        {"method": "full"},
        {"parameters": 135_000_000},
        {"version": "0.0.9"},
    ],
)
def test_what_does_not_compare_calibrates_nothing(other: dict[str, Any]) -> None:
    measured(**other)
    assert now(methods=("lora",)) == planned(QWEN, "H100", methods=("lora",))


def test_only_the_card_that_was_measured_is_calibrated() -> None:
    measured()
    lora: dict[str, Any] = {"methods": ("lora",)}
    for gpu, memory in (("A100-80", None), (None, 79.18)):
        assert now(gpu, memory=memory, **lora) == planned(QWEN, gpu, memory, methods=("lora",))
    speed = planned(QWEN, "H100", methods=("lora",))["recommended"]["tokens_per_second"]
    for name in ("h100 sxm", "NVIDIA H100 80GB HBM3"):
        assert now(name, **lora)["recommended"]["tokens_per_second"] == 0.8 * speed
    several = planned(QWEN, "4xH100", methods=("lora",))["recommended"]["tokens_per_second"]
    assert now("4xH100", **lora)["recommended"]["tokens_per_second"] == pytest.approx(0.8 * several)


def test_quantization_is_measured_by_itself() -> None:
    measured(method="qlora", scheme="nf4")
    measured(600.0, method="qlora", scheme="int8", engine="reference")
    found = {option["label"]: option for option in now(methods=("qlora",))["options"]}
    before = {option["label"]: option for option in planned(QWEN, "H100", methods=("qlora",))["options"]}
    ratios = {label: found[label]["tokens_per_second"] / before[label]["tokens_per_second"] for label in before}
    assert ratios == {"QLoRA": pytest.approx(0.8), "QLoRA (int8)": pytest.approx(0.6)}
