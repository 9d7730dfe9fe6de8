"""The planner's lists: the ranks of an adapter, the known models on a card, the known cards of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from plans import ARITHMETIC, QWEN, QWEN_PARAMETERS, config_of, measured, planned, target_of

from tunesmith.cards import CARDS
from tunesmith.config import Method, RunConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.memory.shape import ModelShape
from tunesmith.models.catalogue import CATALOGUE
from tunesmith.types import GB
from tunesmith.workflows import plan_lists
from tunesmith.workflows.plan_lists import plan_cards, plan_models, plan_ranks
from tunesmith.workflows.plan_options import Target

pytestmark = pytest.mark.usefixtures("nothing_measured")


def test_ranks_add_parameters_and_memory() -> None:
    rows = plan_ranks(config_of(), target_of("H100"), [8, 16, 32, 64, 128], None)
    # Qwen2.5-7B: q and o 3584 x 3584, k and v 3584 x 512, gate, up and down 3584 x 18944, in 28 layers.
    a_rank = 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert [row["rank"] for row in rows] == [8, 16, 32, 64, 128]
    for row in rows:
        assert row["parameters"] == row["rank"] * a_rank
        assert row["share"] == row["parameters"] / QWEN_PARAMETERS
        assert row["adapter_gb"] == 4 * row["parameters"] / GB
    assert [row["peak_gb"] for row in rows] == sorted(row["peak_gb"] for row in rows)
    # Ranks differ in nothing else: all have the micro-batch of the highest.
    same = planned(QWEN, "H100", None, ("adapter.r=128",))["options"][1]
    assert {row["micro_batch_size"] for row in rows} == {same["micro_batch_size"]}
    keys = ("peak_gb", "tokens_per_second", "recompute", "fits", "basis")
    assert [rows[4][key] for key in keys] == [same[key] for key in keys]
    assert same["adapter_parameters"] == rows[4]["parameters"]
    assert [row["fits"] for row in plan_ranks(config_of(), target_of(None, 19.0), [8, 128], None)] == [True, False]


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        (
            ("method=full",),
            [8],
            "--rank has no effect with method: full, which has no adapter; use --method lora or qlora",
        ),
        ((), [8, 0], "--rank 0: expected 1 to 4096"),
        ((), [5000], "--rank 5000: expected 1 to 4096"),
    ],
)
def test_ranks_that_are_none(settings: tuple[str, ...], ranks: list[int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_ranks(config_of(QWEN, *settings), target_of("T4"), ranks, None)
    assert str(caught.value) == message


def test_what_trains_on_a_card() -> None:
    target = target_of("T4")
    rows = plan_models(config_of(""), target, None)
    assert {row["model"] for row in rows} == set(CATALOGUE)
    sizes = [row["parameters"] for row in rows]
    assert sizes == sorted(sizes)
    found = {row["model"]: row["methods"] for row in rows}
    same = planned()["recommended"]
    assert found["Qwen/Qwen2.5-7B"]["qlora"] == {
        key: same[key]
        for key in ("fits", "peak_gb", "graphs_gb", "tokens_per_second", "micro_batch_size", "recompute", "basis")
    }
    assert {row["max_seq_length"] for row in rows} == {2048}
    for method in ("full", "lora"):
        nothing = {"memory": "arithmetic", "speed": None, "runs": 0}
        saving = planned(QWEN, "T4", None, ("optimizer.name=adamw_8bit",), (method,))["options"][0]
        assert found["Qwen/Qwen2.5-7B"][method] == {
            "fits": False,
            "peak_gb": planned(QWEN, "T4", None, (), (method,))["options"][0]["peak_gb"],
            "least_gb": saving["peak_gb"],
            "graphs_gb": 0.0,
            "tokens_per_second": None,
            "basis": nothing,
        }
    assert sum(methods["qlora"]["fits"] for methods in found.values()) > 25
    assert sum(methods["full"]["fits"] for methods in found.values()) == 6


def test_models_of_one_shape_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[ModelShape, int]] = []
    by_method = plan_lists._by_method

    def count(config: RunConfig, shape: ModelShape, target: Target, length: int, methods: Sequence[Method]) -> Any:
        asked.append((replace(shape, context_length=None), length))
        return by_method(config, shape, target, length, methods)

    monkeypatch.setattr(plan_lists, "_by_method", count)
    rows = {row["model"]: row for row in plan_models(config_of(""), target_of("T4"), 8192, ("qlora",))}
    assert len(asked) == len(set(asked)) < len(CATALOGUE) - 10
    same = "microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3.5-mini-instruct"
    assert rows[same[0]]["methods"] == rows[same[1]]["methods"]


def test_what_trains_by_one_method_with_examples_of_some_length() -> None:
    target, config = target_of("T4"), config_of("", "data.max_seq_length=512")
    rows = {row["model"]: row["methods"] for row in plan_models(config, target, None, ("qlora",))}
    assert {tuple(methods) for methods in rows.values()} == {("qlora",)}
    expected = planned(QWEN, "T4", None, (), ("qlora",), 512)["options"][0]
    assert rows["Qwen/Qwen2.5-7B"]["qlora"]["peak_gb"] == expected["peak_gb"]
    short = plan_models(config_of(""), target, 512, ("qlora",))
    assert {row["model"]: row["methods"] for row in short} == rows


def test_where_a_model_trains() -> None:
    name, rows = plan_cards(config_of(), None)
    assert name == "Qwen2.5-7B"
    assert {row["gpu"] for row in rows} == {card.name for card in CARDS}
    assert [row["memory_gb"] for row in rows] == sorted(card.memory_gb for card in CARDS)
    found = {row["gpu"]: row["methods"] for row in rows}
    assert found["T4"]["qlora"]["peak_gb"] == planned()["recommended"]["peak_gb"]
    assert found["H100"]["lora"]["tokens_per_second"] == planned(QWEN, "H100")["recommended"]["tokens_per_second"]
    assert [found["B300"][method]["fits"] for method in ("full", "lora", "qlora")] == [True, True, True]
    assert tuple(plan_cards(config_of(), None, ("lora",))[1][0]["methods"]) == ("lora",)


def test_a_longer_example_than_a_model_takes_is_cut_for_that_model() -> None:
    rows = {row["model"]: row["methods"] for row in plan_models(config_of(""), target_of("H100"), 8192, ("lora",))}
    whole = planned("tinyllama-1.1b-chat", "H100", None, (), ("lora",), 2048)["options"][0]
    assert rows["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]["lora"]["peak_gb"] == whole["peak_gb"]
    lengths = {
        row["model"]: row["max_seq_length"] for row in plan_models(config_of(""), target_of("T4"), 8192, ("qlora",))
    }
    assert (lengths["TinyLlama/TinyLlama-1.1B-Chat-v1.0"], lengths["Qwen/Qwen2.5-7B"]) == (2048, 8192)
    cards = plan_cards(config_of("tinyllama-1.1b-chat"), 8192, ("lora",))[1]
    assert {row["max_seq_length"] for row in cards} == {2048}


def test_at_least_means_the_same_on_every_card() -> None:
    """What the settings of the table need at the least, also where 8-bit states would fit."""
    rows = plan_cards(config_of("llama-3.1-8b"), None, ("full",))[1]
    denied = [row["methods"]["full"] for row in rows if not row["methods"]["full"]["fits"]]
    newer = [row["methods"]["full"] for row in rows if row["gpu"] in ("H100", "H100 NVL")]
    assert len({found["peak_gb"] for found in newer}) == len({found["least_gb"] for found in newer}) == 1
    for key, settings in (("peak_gb", ()), ("least_gb", ("optimizer.name=adamw_8bit",))):
        option = planned("llama-3.1-8b", "H100", None, settings, ("full",))["options"][0]
        assert newer[0][key] == option["peak_gb"]
    assert newer[0]["least_gb"] < 0.7 * newer[0]["peak_gb"]
    assert len(denied) > 30


def test_cards_without_bf16_are_left_out_where_weights_are_in_it() -> None:
    settings = ("method=full", "optimizer.weights_dtype=bf16", "optimizer.name=adamw_8bit")
    rows = plan_cards(config_of("llama-3.1-8b", *settings), None, ("full",))[1]
    assert {row["gpu"] for row in rows} == {card.name for card in CARDS if card.bf16}
    fits = [row["gpu"] for row in rows if row["methods"]["full"]["fits"]]
    before = plan_cards(config_of("llama-3.1-8b", "method=full", "optimizer.name=adamw_8bit"), None, ("full",))[1]
    assert "H100" in fits
    assert "H100" not in [row["gpu"] for row in before if row["methods"]["full"]["fits"]]


def test_lists_are_calibrated_too() -> None:
    before = plan_cards(config_of(), None, ("lora",))[1]
    measured()
    for old, new in zip(before, plan_cards(config_of(), None, ("lora",))[1], strict=True):
        if new["gpu"] == "H100":
            found = new["methods"]["lora"]
            assert found["tokens_per_second"] == 0.8 * old["methods"]["lora"]["tokens_per_second"]
            assert found["basis"] == ARITHMETIC | {"speed": "calibrated", "runs": 1}
        else:
            assert new == old
    models = {row["model"]: row["methods"]["lora"] for row in plan_models(config_of(""), target_of("H100"), None)}
    assert models["Qwen/Qwen2.5-7B"] == found
    assert models["HuggingFaceTB/SmolLM2-135M"]["basis"] == ARITHMETIC
    (rank,) = plan_ranks(config_of(), target_of("H100"), [16], None)
    assert (rank["tokens_per_second"], rank["basis"]) == (found["tokens_per_second"], found["basis"])


def test_models_that_the_settings_cannot_train_are_left_out() -> None:
    """Only Phi-3 and its kin have q, k and v in one matrix."""
    rows = plan_models(config_of(QWEN, "adapter.target_modules=[qkv_proj]"), target_of("H100"), 512, ("lora",))
    assert {row["model"] for row in rows} == {name for name in CATALOGUE if "/phi-" in name.lower()}
    with pytest.raises(ModelError, match=r"\('nope',\) matches no linear layer"):
        plan_models(config_of(QWEN, "adapter.target_modules=[nope]"), target_of("H100"), 512)
    with pytest.raises(ConfigError, match=r"model\.dtype is bf16, but T4"):
        plan_models(config_of(QWEN, "model.dtype=bf16"), target_of("T4"), 512)
