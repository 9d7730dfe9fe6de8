"""Advice: what to change to go longer, larger or faster where a plan fits, and to fit where it does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from plans import PACKED, QWEN, config_of, lines_of, model_folder, planned, target_of

from tunesmith.cards import CARDS
from tunesmith.config import Method, RunConfig
from tunesmith.workflows.plan import find_shape, plan
from tunesmith.workflows.plan_advice import WORTHWHILE, longest_that_trains
from tunesmith.workflows.plan_lists import plan_models
from tunesmith.workflows.plan_options import Data, Target, plan_option, with_settings

pytestmark = pytest.mark.usefixtures("nothing_measured")


def leanest(config: RunConfig, **more: Any) -> RunConfig:
    return with_settings(config, memory__mode="min", training__micro_batch_size=1, **more)


def trains(config: RunConfig, method: Method, target: Target, length: int) -> bool:
    """Whether a step of `training.batch_size` such examples fits if everything is given up for it."""
    settings = leanest(config, method=method)
    lengths = [length] * config.training.batch_size
    return plan_option(settings, find_shape(config.model.name)[1], target, lengths, lengths).fits


ADVISED: list[tuple[Any, ...]] = [
    # The same card again, a smaller one, and models that the next plan denied: once each of them was advised.
    ("llama-3.1-8b", "RTX 3070"),
    ("qwen2-7b", "RTX 4060"),
    ("llama-2-13b-hf", "RTX 3080"),
    ("phi-4", "RTX 3060"),
    ("llama-3.1-8b", "RTX 3060"),
    (QWEN, "T4", None, (), (), 32768),
    ("llama-3.1-8b", "H100 NVL", None, (), ("full",)),
    ("llama-3.1-8b", "H100", None, (), ("full",)),
    ("llama-3.1-70b", "H100", None, (), ("full",)),
    ("llama-3.1-70b", "T4"),
    ("llama-3.1-70b", "T4", None, (), ("lora",)),
    (QWEN, "T4", None, ("training.micro_batch_size=16",), (), 131072),
    (QWEN, "T4", None, ("memory.mode=fast",), (), 32768),
    ("llama-3.1-8b", "H100", None, ("memory.limit_gb=5",)),
    ("llama-3.1-8b", "H100", None, ("memory.limit_gb=10",)),
    ("gemma-2-9b", "2xL4", None, PACKED, (), 8192),
    ("smollm3-3b", "RTX 3060", None, ("optimizer.name=adamw_8bit",), ("lora",)),
    (QWEN, None, 6.0),
]


@pytest.mark.parametrize("case", ADVISED)
def test_a_plan_confirms_what_is_advised(case: tuple[Any, ...]) -> None:
    """Each card, model, length and setting that advice names is planned: it trains, and a larger model or smaller card not."""
    model, gpu, memory, settings, methods, sequence = (*case, *(None, None, (), (), None)[len(case) - 1 :])
    result = planned(*case)
    length = result["options"][0]["max_seq_length"]
    own, several = result["parameters"], f"{result['num_gpus']}x"

    def again(**changes: Any) -> dict[str, Any]:
        given = {"model": model, "gpu": gpu, "memory": memory, "settings": settings, "methods": methods}
        return planned(**{**given, "sequence": sequence, **changes})

    for kind, said in lines_of(result).items():
        if kind in ("settings", "method", "shorter"):
            label, flags = said.split(" trains here with ")
            words = flags.split()
            options = list(zip(words[::2], words[1::2], strict=True))
            way = tuple(value for flag, value in options if flag == "--method") or methods
            more = tuple(value for flag, value in options if flag == "--set")
            shorter = next((int(value) for flag, value in options if flag == "--max-seq-length"), sequence)
            found = again(methods=way, settings=(*settings, *more), sequence=shorter)
            assert label in [option["label"] for option in found["options"] if option["fits"]], said
        elif kind == "card":
            card = next(card for card in CARDS if f": {card.name} ({card.memory_gb:.0f} GB) or more" in said)
            assert again(gpu=several + card.name, memory=None)["recommended"], said
            for other in CARDS:
                if result["memory_gb"] < other.memory_gb < card.memory_gb:
                    assert again(gpu=several + other.name, memory=None)["recommended"] is None, other.name
        elif kind in ("model", "larger"):
            named = next(word for word in said.split() if "/" in word)
            assert again(model=named)["recommended"], said
            size = find_shape(named)[1].num_parameters
            assert (size < own) == (kind == "model")
            for row in plan_models(
                config_of("", *settings), target_of(gpu, memory), length, methods or ("lora", "qlora")
            ):
                if size < row["parameters"] < (own if kind == "model" else 10**15) and row["max_seq_length"] == length:
                    assert not any(found["fits"] for found in row["methods"].values()), row["model"]
        elif kind == "longer":
            longest = int(said.split()[2].replace(",", ""))
            one = ("memory.mode=min", "training.micro_batch_size=1")
            assert again(sequence=longest, settings=(*settings, *one))["recommended"], said
        elif " keeps all activations" in said:
            card = next(card for card in CARDS if said.startswith(f"{card.name} ({card.memory_gb:.0f} GB)"))
            kept = again(gpu=several + card.name, memory=None, methods=(result["recommended"]["method"],))["options"][0]
            assert kept["recompute"] == "none"
            times = kept["tokens_per_second"] / result["recommended"]["tokens_per_second"]
            assert times > WORTHWHILE
            assert f", {times:.2f} times as fast" in said


# -- where nothing fits -----------------------------------------------------------------------------------------------


def test_an_impossible_budget() -> None:
    result = planned(QWEN, None, 0.5)
    assert result["recommended"] is None
    assert [line.partition(":")[0] for line in result["advice"]] == ["card"]  # no known model is that small


def test_no_card_holds_it(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "huge", hidden_size=32768, intermediate_size=131072, num_hidden_layers=200)
    result = planned(str(folder), "B300")
    assert result["recommended"] is None
    assert [line.partition(":")[0] for line in result["advice"]] == ["model"]


@pytest.mark.parametrize(
    ("model", "gpu", "settings", "methods", "sequence", "advice"),
    [
        (QWEN, "T4", (), ("full",), None, ["method: QLoRA trains here with --method qlora"]),
        (QWEN, "T4", (), ("lora",), None, ["method: QLoRA trains here with --method qlora"]),
        (QWEN, "T4", ("memory.mode=fast",), (), 32768, ["settings: QLoRA trains here with --set memory.mode=auto"]),
        (
            "llama-3.1-8b",
            "H100 NVL",
            (),
            ("full",),
            None,
            [
                "settings: full trains here with --set optimizer.name=adamw_8bit",
                "method: LoRA trains here with --method lora",
            ],
        ),
        (
            "llama-3.1-8b",
            "H100",
            (),
            ("full",),
            None,
            [
                "settings: full trains here with --set optimizer.name=adamw_8bit --set optimizer.weights_dtype=bf16",
                "method: LoRA trains here with --method lora",
            ],
        ),
        (
            "llama-3.1-8b",
            "L4",
            ("memory.mode=fast", "training.micro_batch_size=8"),
            ("full",),
            32768,
            [
                "method: LoRA trains here with --method lora --set memory.mode=auto --set training.micro_batch_size=auto "
                "--set optimizer.name=adamw_8bit"
            ],
        ),
        (
            "llama-3.1-8b",
            "H100",
            ("model.dtype=fp16", "optimizer.name=adamw_8bit"),
            ("full",),
            None,
            ["method: LoRA trains here with --method lora"],  # its weights are not kept in bf16
        ),
        (
            "llama-3.1-8b",
            "H100",
            ("memory.limit_gb=5",),
            (),
            None,
            ["settings: LoRA trains here with --set memory.limit_gb=null"],
        ),
    ],
)
def test_what_does_not_fit_is_answered_with_what_would(
    model: str,
    gpu: str,
    settings: tuple[str, ...],
    methods: tuple[Method, ...],
    sequence: int | None,
    advice: list[str],
) -> None:
    """The model is not too large for this card, and another card is not what is needed first."""
    result = planned(model, gpu, None, settings, methods, sequence)
    assert result["recommended"] is None
    assert result["advice"] == advice


def test_a_length_that_nothing_takes_is_answered_with_one_that_fits() -> None:
    said = lines_of(planned(QWEN, "T4", None, ("training.micro_batch_size=16",), (), 131072))
    longest = int(said["shorter"].split()[-1])
    assert said["shorter"] == f"QLoRA trains here with --max-seq-length {longest}"
    assert said["card"].endswith("GB at least: B300 (268 GB) or more")
    config = config_of(QWEN, "method=qlora", "memory.mode=min", "training.micro_batch_size=16")
    for length, fits in ((longest, True), (longest + 512, False)):
        assert plan_option(config, find_shape(QWEN)[1], target_of("T4"), [length] * 16, [length] * 16).fits is fits


# -- longer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "gpu", "method"),
    [
        (QWEN, "T4", "qlora"),
        ("llama-3.1-8b", "A10", "lora"),
        ("llama-3.1-70b", "RTX A6000", "qlora"),
        (QWEN, "H200", "full"),
        ("smollm3-3b", "T4", "lora"),
    ],
)
def test_the_longest_really_is_the_longest(model: str, gpu: str, method: Method) -> None:
    result = planned(model, gpu, None, (), (method,), 512)
    assert result["recommended"]["method"] == method
    said = lines_of(result)["longer"]
    longest = int(said.split()[2].replace(",", ""))
    assert said == f"up to {longest:,} tokens with micro-batch 1 (memory.mode: min)"
    config, target = config_of(model), target_of(gpu)
    assert longest % 512 == 0
    assert trains(config, method, target, longest)
    assert not trains(config, method, target, longest + 512)


def test_the_longest_for_many_budgets() -> None:
    config = config_of(QWEN, "method=qlora")
    shape = find_shape(QWEN)[1]
    found = []
    for memory in (8.0, 8.2, 8.35, 8.8, 9.4, 10.1, 11.0, 12.0):
        target = target_of(None, memory)
        longest = longest_that_trains(leanest(config), shape, target)
        assert longest is not None
        assert trains(config, "qlora", target, longest)
        assert not trains(config, "qlora", target, longest + 512)
        found.append(longest)
    assert found == sorted(set(found))
    assert longest_that_trains(leanest(config), shape, target_of(None, 7.0)) is None


def test_qlora_is_advised_to_those_who_want_to_go_longer() -> None:
    config, target = config_of("yi-6b"), target_of("T4")
    longest = max(length for length in range(512, 4097, 512) if trains(config, "lora", target, length))
    said = lines_of(planned("yi-6b", "T4", None, (), ("lora",), longest + 100))
    assert trains(config, "lora", target, longest + 100)
    further = int(said["longer"].split()[2].replace(",", ""))
    assert said["longer"] == f"up to {further:,} tokens with method: qlora"
    assert further > longest
    assert trains(config, "qlora", target, further)


# -- larger -----------------------------------------------------------------------------------------------------------


def test_larger_models_are_named_only_if_there_are_any() -> None:
    said = lines_of(planned())["larger"]
    assert said == "up to Qwen/Qwen2.5-14B trains here with QLoRA"
    assert "larger" not in lines_of(planned("qwen2.5-14b", "T4"))


def test_models_without_the_modules_that_were_named_are_not_advised() -> None:
    named = ("adapter.target_modules=[q_proj]",)
    said = lines_of(planned("smollm3-3b", "RTX 3060", None, named))["larger"]
    assert said == "up to meta-llama/Llama-2-13b-hf trains here with QLoRA"  # not Phi-3-medium, of 14B
    assert planned(said.split()[2], "RTX 3060", None, named)["recommended"]


# -- faster -----------------------------------------------------------------------------------------------------------


def test_a_faster_card_is_a_real_one_with_the_same_data() -> None:
    """Few long rows among short ones: every figure is of these rows, and no card has the memory that they would need."""
    lengths = [200] * 60 + [16_000] * 4
    data = Data(lengths, lengths, True)
    result = plan(config_of(QWEN), target_of("T4"), data=data)
    assert result["recommended"]["recompute_layers"] > 0
    said = lines_of(result)["faster"]
    card = next(card for card in CARDS if said.startswith(f"{card.name} ({card.memory_gb:.0f} GB) keeps all"))
    (same,) = [
        option
        for option in plan(config_of(QWEN), target_of(card.name), methods=("qlora",), data=data)["options"]
        if option["label"] == "QLoRA" and (option["memory_mode"], option["optimizer"]) == ("auto", "adamw")
    ]
    times = same["tokens_per_second"] / result["recommended"]["tokens_per_second"]
    assert said == (
        f"{card.name} ({card.memory_gb:.0f} GB) keeps all activations, {times:.2f} times as fast; shorter examples keep more "
        "too"
    )
    assert "faster" not in lines_of(planned(QWEN, "B300", None, (), (), 131072))  # no card has more


def test_the_memory_mode_comes_before_another_card() -> None:
    result = planned("llama-3.1-8b", "H100", None, ("memory.mode=min",))
    auto = next(option for option in result["options"] if option["memory_mode"] == "auto")
    times = auto["tokens_per_second"] / result["recommended"]["tokens_per_second"]
    held = auto["peak_gb"] + auto["graphs_gb"]
    assert auto == planned("llama-3.1-8b", "H100", None, (), ("lora",))["recommended"]
    assert lines_of(result)["faster"] == f"memory.mode: auto, {times:.2f} times as fast ({held:.1f} GB)"


def test_a_packed_micro_batch_stays_one_of_tokens() -> None:
    settings = (*PACKED, "training.batch_size=4")
    packed = planned(QWEN, "T4", None, settings, ("qlora",), 4096)
    padded = planned(QWEN, "T4", None, ("training.batch_size=4",), ("qlora",), 4096)
    assert packed["recommended"]["micro_batch_size"] == 4096 * padded["recommended"]["micro_batch_size"]
    assert lines_of(packed)["faster"] == lines_of(padded)["faster"]


def test_what_is_faster_where_everything_is_kept_already() -> None:
    kept = "everything is kept already; a faster card (A10G), or several"
    assert lines_of(planned())["faster"] == kept
    padded = config_of(QWEN, "data.packing=false", "method=qlora")
    for lengths, times in (([300, 2000] * 40, True), ([300] * 80, False)):
        data = Data(lengths, lengths, True)
        found = lines_of(plan(padded, target_of("A100-80"), methods=("qlora",), data=data))["faster"]
        assert found.startswith("everything is kept already; a faster card (RTX PRO 6000), or several")
        more = re.search(r", or data\.packing: auto, (1\.\d\d) times as fast$", found)
        assert (more is not None) == times, "rows of one length have no padding"
        if more:
            option = plan(config_of(QWEN, "method=qlora"), target_of("A100-80"), methods=("qlora",), data=data)
            plain = plan(padded, target_of("A100-80"), methods=("qlora",), data=data)
            ratio = option["recommended"]["tokens_per_second"] / plain["recommended"]["tokens_per_second"]
            assert float(more[1]) == pytest.approx(ratio, abs=0.006)
    assert lines_of(planned("qwen3-0.6b", "H100", None, PACKED))["faster"] == (
        "everything is kept already; a faster card (B200), or several"
    )
    assert "faster" not in lines_of(planned(QWEN, "B300"))
    assert "faster" not in lines_of(planned(QWEN, None, 24.0))
