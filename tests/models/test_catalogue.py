"""The catalogue's shapes against the makers' published parameter totals, and the names under which they are found."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.models.catalogue import ALSO_KNOWN_AS, CATALOGUE, find_model_config, nearest_models, unknown_model

GEMMA3_VISION = 416_866_032
"""SigLIP's tower in Gemma 3 from 4B on. A norm and a projection of its 1,152 features to the hidden size come on top."""

PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "01-ai/Yi-6B": 6_061_035_520,
    "01-ai/Yi-9B": 8_829_407_232,
    "01-ai/Yi-34B": 34_388_917_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/Phi-3-medium-128k-instruct": 13_960_238_080,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "Qwen/Qwen2-0.5B": 494_032_768,
    "Qwen/Qwen2-1.5B": 1_543_714_304,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2-72B": 72_706_203_648,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    # The hub counts the tied output matrix of these two a second time: 751,632,384 and 2,031,739,904.
    "Qwen/Qwen3-0.6B": 751_632_384 - 151936 * 1024,
    "Qwen/Qwen3-1.7B": 2_031_739_904 - 151936 * 2048,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": 235_093_634_560,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-pt": 4_300_079_472 - GEMMA3_VISION - 1152 * (1 + 2560),
    "google/gemma-3-12b-pt": 12_187_325_040 - GEMMA3_VISION - 1152 * (1 + 3840),
    "google/gemma-3-27b-pt": 27_432_406_640 - GEMMA3_VISION - 1152 * (1 + 5376),
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "deepseek-ai/DeepSeek-V2": 235_741_434_880,
}
"""Parameters as the hub counts them in the published safetensors."""


@pytest.mark.parametrize("name", CATALOGUE)
def test_parameters_are_those_published(name: str) -> None:
    shape = dict(CATALOGUE[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())  # a tied matrix comes once
    if name in PARAMETERS:
        assert count == PARAMETERS[name]
    else:
        billions = re.search(r"(\d+(?:\.\d+)?)B", name)
        assert billions is not None
        assert count == pytest.approx(float(billions[1]) * 1e9, rel=0.05)


@pytest.mark.parametrize("name", CATALOGUE)
def test_transformers_knows_every_key(name: str) -> None:
    """A misspelt key would be stored and ignored, and the default would take its place."""
    shape = dict(CATALOGUE[name])
    model_type = shape.pop("model_type")
    known = set(AutoConfig.for_model(model_type).to_dict())
    config = AutoConfig.for_model(model_type, **shape)
    theta = shape.pop("rope_theta")
    assert f"'rope_theta': {theta}" in str(config.rope_parameters)
    # Taken in by other means: RoPE's into rope_parameters, the pattern into layer_types, experts under other names.
    # Qwen3's mixture reads head_dim without declaring it: the parameter count would be off without.
    other = {"rope_local_base_freq", "partial_rotary_factor", "sliding_window_pattern", "head_dim"}
    assert set(shape) - known - other <= {"num_experts", "n_routed_experts", "num_local_experts"}
    for key in set(shape) - other:
        assert getattr(config, key) == shape[key], key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", {"num_key_value_heads": 8, "max_position_embeddings": 131072}),
        ("meta-llama/Meta-Llama-3-8B", {"max_position_embeddings": 8192, "rope_theta": 500000.0}),
        ("mistralai/Mistral-7B-v0.1", {"sliding_window": 4096, "vocab_size": 32000, "rope_theta": 10000.0}),
        ("mistralai/Mistral-7B-v0.3", {"sliding_window": None, "vocab_size": 32768, "rope_theta": 1000000.0}),
        ("google/gemma-2-27b", {"query_pre_attn_scalar": 144, "attn_logit_softcapping": 50.0, "sliding_window": 4096}),
        ("google/gemma-3-27b-pt", {"query_pre_attn_scalar": 168, "head_dim": 128, "sliding_window": 1024}),
        ("google/gemma-3-1b-pt", {"head_dim": 256, "sliding_window": 512, "vocab_size": 262144}),
        ("mistralai/Mixtral-8x7B-v0.1", {"num_local_experts": 8, "num_experts_per_tok": 2}),
        ("Qwen/Qwen3-30B-A3B", {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}),
        ("deepseek-ai/DeepSeek-V2-Lite", {"q_lora_rank": None, "n_routed_experts": 64, "num_experts_per_tok": 6}),
        ("deepseek-ai/DeepSeek-V2", {"q_lora_rank": 1536, "n_routed_experts": 160, "topk_group": 3}),
        ("microsoft/Phi-3-mini-4k-instruct", {"sliding_window": 2047, "max_position_embeddings": 4096}),
    ],
)
def test_what_the_parameter_count_does_not_show(name: str, expected: dict[str, object]) -> None:
    assert {key: CATALOGUE[name][key] for key in expected} == expected


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_is_found_by_its_id(name: str) -> None:
    found = find_model_config(name)
    assert found == (name, CATALOGUE[name])
    assert find_model_config(name.partition("/")[2].upper()) == found


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B"),
        ("llama 3 8b", "meta-llama/Meta-Llama-3-8B"),
        ("NousResearch/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("Qwen/Qwen2.5-Coder-32B-Instruct", "Qwen/Qwen2.5-32B"),
        ("qwen2.5_coder_1.5b", "Qwen/Qwen2.5-1.5B"),
        ("qwen2-57b-a14b-instruct", "Qwen/Qwen2-57B-A14B"),
        ("Qwen3-4B-Base", "Qwen/Qwen3-4B"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
        ("Qwen/Qwen3-4B-Thinking-2507", "Qwen/Qwen3-4B-Instruct-2507"),
        ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B"),
        ("phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct"),
        ("phi-3-mini-4k", "microsoft/Phi-3-mini-4k-instruct"),
        ("phi4", "microsoft/phi-4"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
        ("SmolLM3-3B-Base", "HuggingFaceTB/SmolLM3-3B"),
        ("google/gemma-2-2b-it", "google/gemma-2-2b"),
        ("gemma3:4b", "google/gemma-3-4b-pt"),
        ("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("mistral-nemo-instruct-2407", "mistralai/Mistral-Nemo-Base-2407"),
        ("mistral-nemo", "mistralai/Mistral-Nemo-Base-2407"),
        ("mistral-nemo-12b", "mistralai/Mistral-Nemo-Base-2407"),
        ("mixtral-8x7b-instruct", "mistralai/Mixtral-8x7B-v0.1"),
        ("mixtral-8x22b-instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
        ("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("TinyLlama-1.1B-intermediate-step-1431k-3T", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("yi-34b-chat", "01-ai/Yi-34B"),
        ("deepseek-v2-lite-chat", "deepseek-ai/DeepSeek-V2-Lite"),
    ],
)
def test_what_users_say(said: str, name: str) -> None:
    assert find_model_config(said) == (name, CATALOGUE[name])


@pytest.mark.parametrize(
    "said",
    [
        "llama-8b",
        "llama-3.1",
        "llama",
        "mistral-7b",  # v0.1 and v0.3 differ
        "mixtral-8x22b",  # the base has 32,000 tokens, the instruct model 32,768
        "phi-3-mini",  # 4k and 128k differ
        "gemma-2b",  # the first Gemma, not gemma-2-2b
        "Qwen2.5-7B-Instruct-1M",
        "Qwen2.5-VL-7B-Instruct",
        "deepseek",
        "DeepSeek-V2.5",
        "NousResearch/Hermes-3-Llama-3.1-8B",
        "Yi-34B-200K",
        "instruct",
        "",
    ],
)
def test_nothing_is_guessed(said: str) -> None:
    assert find_model_config(said) is None


def test_a_changed_answer_leaves_the_catalogue_alone() -> None:
    found = find_model_config("phi-4")
    assert found is not None
    found[1]["num_hidden_layers"] = 1
    assert CATALOGUE["microsoft/phi-4"]["num_hidden_layers"] == 40


def test_other_names_lead_to_entries() -> None:
    assert set(ALSO_KNOWN_AS.values()) <= set(CATALOGUE)
    assert not set(ALSO_KNOWN_AS) & set(CATALOGUE)


@pytest.mark.parametrize(
    ("said", "near"),
    [
        ("llama-8b", ["meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-7b-hf"]),
        (
            "mixtral-8x22b",
            [
                "mistralai/Mixtral-8x22B-v0.1",
                "mistralai/Mixtral-8x22B-Instruct-v0.1",
                "mistralai/Mixtral-8x7B-v0.1",
            ],
        ),
        ("org/smolm2-135m-instruct", ["HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M"]),
        ("banana", []),
    ],
)
def test_nearest_models(said: str, near: list[str]) -> None:
    assert nearest_models(said)[: len(near) or None] == near


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        (
            "Mistral-7B",
            "several known models have such names: name one of mistralai/Mistral-7B-v0.1, "
            "mistralai/Mistral-7B-Instruct-v0.2, mistralai/Mistral-7B-v0.3",
        ),
        (
            "phi-3-mini",
            "several known models have such names: name one of microsoft/Phi-3-mini-4k-instruct, "
            "microsoft/Phi-3-mini-128k-instruct",
        ),
        (
            "llama3",
            "several known models have such names: name one of meta-llama/Meta-Llama-3-8B, meta-llama/Meta-Llama-3-70B",
        ),
        ("smolm2-135m", "known models like it: HuggingFaceTB/SmolLM2-135M, HuggingFaceTB/SmolLM2-360M"),
    ],
)
def test_a_name_that_is_not_known_is_told_which_are(said: str, hint: str) -> None:
    first = f"{said}: no such model folder and no known model (a hub id looks like org/model)"
    assert unknown_model(said).startswith(f"{first}; {hint}")


def test_of_many_names_a_few_are_told() -> None:
    told = unknown_model("llama").rpartition("name one of ")[2]
    assert told.count("/") == 6
    assert told.endswith("meta-llama/Llama-3.1-8B or 5 more")
    assert unknown_model("banana").endswith("(a hub id looks like org/model)")


def test_importing_cards_and_catalogue_is_quick_and_loads_no_torch() -> None:
    """Less of this process's CPU than what it takes from the standard library, on whatever processor: best of five."""
    script = (
        "import sys, time; start = time.process_time()\n"
        "import dataclasses, difflib, functools, re, typing; standard = time.process_time() - start\n"
        "import tunesmith.cards, tunesmith.models.catalogue\n"
        "own = time.process_time() - start - standard\n"
        "print(own / standard, *{'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    )
    shares = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        share, *loaded = done.stdout.split()
        assert loaded == []
        shares.append(float(share))
    assert min(shares) < 1.5, "0.4 measured"
