"""What config.json says of a model's size, against the model that transformers makes of it on the meta device."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.config import AdapterConfig
from tunesmith.errors import ModelError
from tunesmith.memory.shape import HALF_FUSED, KNOWN, Layer, Linear, ModelShape
from tunesmith.models.adapters import add_adapter, target_modules
from tunesmith.models.catalogue import CATALOGUE
from tunesmith.models.families import LayerSpec, layer_spec

BASE = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 9, "head_dim": 12}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 9,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 1, "head_dim": 10},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "qwen3 with biases": {"head_dim": 12, "attention_bias": True},
    "phi3": {},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "num_key_value_heads": 1},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
    "deepseek_v2 with latent queries": {**LATENT, "q_lora_rank": 8},
    "deepseek_v2 with biases": {**LATENT, "q_lora_rank": 8, "attention_bias": True},
    "deepseek_v2, all dense": {**LATENT, "q_lora_rank": 8, "first_k_dense_replace": 3},
    "qwen2_moe": {**EXPERTS, "head_dim": 6, "shared_expert_intermediate_size": 22},
    "qwen3_moe": EXPERTS,
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 12},
    "smollm3": {},
}


@cache
def config_of(family: str) -> Any:
    return AutoConfig.for_model(family.replace(",", "").split()[0], **{**BASE, **FAMILIES[family]})


@cache
def shape_of(family: str) -> ModelShape:
    return ModelShape.of(config_of(family).to_dict())


def model_of(family: str) -> Any:
    """A new one: an adapter stays on the model that it was put on."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(family))


def layers_of(shape: ModelShape) -> list[Layer]:
    return [layer for count, layer in shape.layers for _ in range(count)]


def test_every_known_family_is_compared() -> None:
    assert {family.replace(",", "").split()[0] for family in FAMILIES} == KNOWN


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    shape, model = shape_of(family), model_of(family)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.exact
    assert shape.num_layers == len(model.model.layers) == 3
    for layer, module in zip(layers_of(shape), model.model.layers, strict=True):
        assert layer.values == sum(parameter.numel() for parameter in module.parameters())
    assert shape.embedding_values == model.get_input_embeddings().weight.numel()
    assert shape.tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_engine_runs_what_the_shape_says(family: str) -> None:
    """FUSED and HALF_FUSED go by `model_type`, the engine by its table of layers (models/families.py)."""
    whole = [layer_spec(layer) for layer in model_of(family).model.layers]
    halves = [spec.halves for spec in whole if isinstance(spec, LayerSpec)]
    assert shape_of(family).can_fuse == (halves == [("attention", "mlp")] * 3)
    assert (shape_of(family).model_type in HALF_FUSED) == any(len(each) == 1 for each in halves)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_are_those_of_the_model(family: str) -> None:
    shape, model = shape_of(family), model_of(family)
    for number, (layer, module) in enumerate(zip(layers_of(shape), model.model.layers, strict=True)):
        theirs = {
            (path, linear.in_features, linear.out_features, linear.bias is not None)
            for path, linear in module.named_modules()
            if isinstance(linear, torch.nn.Linear)
        }
        ours = [(linear.path, linear.inputs, linear.outputs, linear.bias) for linear in layer.linears]
        assert set(ours) == theirs, f"layer {number}"
        assert len(ours) == len(theirs)
    assert shape.linear_values == sum(
        linear.weight.numel() for linear in model.model.layers.modules() if isinstance(linear, torch.nn.Linear)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_has_the_models_sizes(family: str) -> None:
    """Queries and keys as scores read them, values as they are summed; DeepSeek's latent heads have keys of their own."""
    shape, attention = shape_of(family), model_of(family).model.layers[0].self_attn
    if family.startswith("deepseek"):
        assert (shape.query_size, shape.kv_size, shape.attention_size) == (4 * 9, 4 * 9 + 4 * 7, 4 * 7)
        return
    head = attention.head_dim
    keys = head * config_of(family).num_key_value_heads
    assert (shape.head_dim, shape.value_dim) == (head, head)
    assert (shape.query_size, shape.kv_size, shape.attention_size) == (4 * head, 2 * keys, 4 * head)
    assert attention.o_proj.in_features == shape.attention_size


PRESETS: list[Any] = ["all-linear", "attention", "mlp", "qv", ["o_proj"], ["self_attn.o_proj", "k_proj"]]
MIXTURES: list[Any] = [["experts"], ["attention", "mlp.experts"], ["o_proj", "experts.down_proj"]]

REFUSED = [
    ("mixtral", "mlp"),
    ("qwen3_moe", "mlp"),
    ("gpt_oss", "mlp"),
    *((f"deepseek_v2{which}", "qv") for which in (" with latent queries", " with biases", ", all dense")),
]
"""Experts are no linear layers, and latent queries have no q_proj."""


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        (family, setting)
        for family in FAMILIES
        for setting in PRESETS
        if (family, setting) not in REFUSED
        and not ("k_proj" in setting and family.startswith(("phi3", "deepseek")))
        and not ("deepseek" in family and setting == "mlp")
    ],
)
def test_adapters_are_as_large_as_pefts(family: str, setting: str | list[str]) -> None:
    model, r = model_of(family), 3
    adapted = add_adapter(model, AdapterConfig(r=r, target_modules=setting), "base")
    theirs = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    given = setting if isinstance(setting, str) else tuple(setting)
    assert shape_of(family).adapter_values(r, given) == theirs
    assert shape_of(family).adapter_values(4 * r, given) == 4 * theirs


@pytest.mark.parametrize("setting", MIXTURES)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_are_as_large_as_pefts(family: str, setting: list[str]) -> None:
    """Each expert has an A and a B of its own."""
    adapted = add_adapter(model_of(family), AdapterConfig(r=3, target_modules=setting), "base")
    theirs = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape_of(family).adapter_values(3, setting) == theirs
    assert any("experts" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("setting", ["mlp", ["down_proj", "o_proj"], ["all-linear", "up_proj", "gate_proj"]])
@pytest.mark.parametrize("family", [family for family in FAMILIES if "deepseek" in family])
def test_layers_whose_names_peft_takes_for_experts_are_refused(family: str, setting: str | list[str]) -> None:
    """PEFT 0.21 adapts all of DeepSeek's routed experts for them, and neither the shared ones nor a dense MLP."""
    with pytest.raises(ModelError) as caught:
        add_adapter(model_of(family), AdapterConfig(r=3, target_modules=setting), "base")
    text = str(caught.value)
    if (family, setting) == ("deepseek_v2, all dense", "mlp"):
        assert text.startswith(
            "adapter.target_modules mlp: PEFT cannot put this adapter on the model: No `target_modules`"
        )
        return
    assert " of this family for its experts' parameters, so that " in text
    assert text.endswith("and all experts one; set adapter.target_modules: attention")
    with pytest.raises(ModelError) as planned:
        shape_of(family).adapter_values(3, setting)
    assert str(planned.value) == text


@pytest.mark.parametrize(("family", "preset"), REFUSED)
def test_presets_are_refused_in_trainings_words(family: str, preset: str) -> None:
    with pytest.raises(ModelError) as theirs:
        target_modules(model_of(family), preset)
    with pytest.raises(ModelError) as ours:
        shape_of(family).adapter_values(8, preset)
    assert str(ours.value) == str(theirs.value)


def test_what_an_adapter_is_by_hand() -> None:
    # q and v of Llama: 24 -> 24 and 24 -> 12, in three layers
    assert shape_of("llama").adapter_values(5, "qv") == 3 * 5 * (24 + 24 + 24 + 12)
    assert [(count, linear.name) for count, linear in shape_of("deepseek_v2").targets("qv")] == [
        (1, "q_proj"),
        (2, "q_proj"),
    ], "a dense layer, then two with experts"


@pytest.mark.parametrize("setting", ["lm_head", ["lm_head"], ("lm_head", "embed_tokens"), [], ["proj"]])
def test_targets_that_match_nothing_are_refused(setting: Any) -> None:
    names = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ModelError) as found:
        shape_of("llama").adapter_values(8, setting)
    assert str(found.value) == (
        f"adapter.target_modules: {setting} matches no linear layer of this model; it has {names}"
    )


# -- experts and windows ----------------------------------------------------------------------------------------------


def test_what_a_token_meets_of_the_experts() -> None:
    mixtral = layers_of(shape_of("mixtral"))[0]
    assert (mixtral.expert_values, mixtral.active_expert_values) == (5 * 3 * 24 * 40, 2 * 3 * 24 * 40)
    assert (mixtral.mlp_width, mixtral.other_values) == (2 * 40, 2 * 24 + 5 * 24), "norms, and the router"
    dense, *sparse = layers_of(shape_of("deepseek_v2"))
    assert (dense.expert_values, dense.active_expert_values, dense.mlp_width) == (0, 0, 40)
    for layer in sparse:
        assert (layer.expert_values, layer.active_expert_values) == (4 * 3 * 24 * 9, 2 * 3 * 24 * 9)
        assert layer.mlp_width == 2 * 9 + 2 * 9, "two routed experts and two shared ones"
        assert Linear("mlp.shared_experts.gate_proj", 24, 18) in layer.linears
    families = ("llama", "mixtral", "deepseek_v2", "deepseek_v2, all dense")
    assert [[layer.active_experts for layer in layers_of(shape_of(family))] for family in families] == [
        [0, 0, 0], [2, 2, 2], [0, 2, 2], [0, 0, 0]
    ]  # fmt: skip


def raw(model_type: str, **settings: Any) -> dict[str, Any]:
    """A config.json as makers write them: without what transformers works out."""
    return {"model_type": model_type, **BASE, **settings}


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6, 7, 12, 26])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gemma2", {"sliding_window": 16}),
        ("gemma3_text", {"sliding_window": 16}),
        ("gemma3_text", {"sliding_window": 16, "sliding_window_pattern": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 4}),
    ],
)
def test_as_many_layers_have_a_window_as_in_transformers(
    model_type: str, settings: dict[str, Any], num_layers: int
) -> None:
    """Whether config.json lists the kinds of layers, as newer ones do, or leaves them to be worked out."""
    values = raw(model_type, **settings, num_hidden_layers=num_layers)
    theirs = AutoConfig.for_model(**values)
    expected = theirs.layer_types.count("sliding_attention")
    for config in (values, theirs.to_dict()):
        shape = ModelShape.of(config)
        assert shape.windowed == expected
        assert shape.window == (16 if settings.get("use_sliding_window", True) else None)


@pytest.mark.parametrize(
    ("config", "window", "windowed"),
    [
        (raw("mistral", sliding_window=64), 64, 3),
        (raw("mistral", sliding_window=None), None, 0),
        (raw("mistral"), None, 0),
        (raw("phi3", sliding_window=2047), 2047, 3),
        (raw("llama"), None, 0),
        (raw("qwen2", sliding_window=64), None, 0),  # Qwen's counts only where it is switched on
        (
            raw("gemma2", sliding_window=64, layer_types=["full_attention", "sliding_attention", "full_attention"]),
            64,
            1,
        ),
    ],
)
def test_windows(config: dict[str, Any], window: int | None, windowed: int) -> None:
    shape = ModelShape.of(config)
    assert (shape.window, shape.windowed) == (window, windowed)


# -- other configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_says_the_same(family: str) -> None:
    """config.json leaves out what is transformers' default."""
    assert ModelShape.of(json.loads(config_of(family).to_json_string())) == shape_of(family)


def test_the_language_part_of_a_multimodal_model() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=config_of("gemma3_text").to_dict(), vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    shape = ModelShape.of(config.to_dict())
    assert shape == shape_of("gemma3_text")
    language = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    assert shape.num_parameters == language, "its embeddings are tied: the head has none of its own"


@pytest.mark.parametrize("tied", [True, False])
def test_a_multimodal_config_may_say_outside_that_embeddings_are_tied(tied: bool) -> None:
    shape = ModelShape.of({"model_type": "llava", "tie_word_embeddings": tied, "text_config": raw("llama")})
    assert (shape.model_type, shape.tied) == ("llama", tied)
    assert shape == ModelShape.of(raw("llama", tie_word_embeddings=tied))


def test_gemmas_embeddings_are_tied_unless_they_are_said_not_to_be() -> None:
    assert [ModelShape.of(raw(kind)).tied for kind in ("gemma2", "gemma3_text", "llama")] == [True, True, False]
    assert not ModelShape.of(raw("gemma2", tie_word_embeddings=False)).tied


def test_an_unknown_family_is_taken_for_a_plain_decoder() -> None:
    unknown, llama = ModelShape.of(raw("granite")), ModelShape.of(raw("llama"))
    assert not unknown.exact
    assert not unknown.can_fuse
    assert unknown.num_parameters == llama.num_parameters
    assert unknown.layers == llama.layers


def test_what_a_config_does_not_say_follows_from_the_rest() -> None:
    sparse = {
        key: value for key, value in raw("llama").items() if key not in ("intermediate_size", "num_key_value_heads")
    }
    shape = ModelShape.of(sparse)
    assert (shape.head_dim, shape.num_kv_heads, shape.layers[0][1].mlp_width) == (6, 4, 96)
    assert shape.context_length == 128


REQUIRED = ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
LATENT_NUMBERS = ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts"]


@pytest.mark.parametrize("value", [None, -1, 0, "24", True, 2.5])
@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        *(("llama", key) for key in REQUIRED),
        *(("deepseek_v2", key) for key in [*LATENT_NUMBERS, "intermediate_size", "num_experts_per_tok"]),
    ],
)
def test_numbers_that_are_missing_or_none_are_refused(model_type: str, key: str, value: Any) -> None:
    settings = LATENT if model_type == "deepseek_v2" else {}
    with pytest.raises(ModelError) as found:
        ModelShape.of(raw(model_type, **{**settings, key: value}))
    assert str(found.value) == (
        f"config.json: {key} is {value!r}: expected a positive number; this is no decoder-only language model that "
        "can be planned"
    )


@pytest.mark.parametrize("value", [-2, "2"])
@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "intermediate_size"])
def test_numbers_with_a_default_may_be_missing_but_not_wrong(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {key} is {value!r}: expected a positive number"):
        ModelShape.of(raw("llama", **{key: value}))
    assert ModelShape.of(raw("llama", **{key: None})).num_layers == 3


@pytest.mark.parametrize("value", ["2048", 2048.5, -1, True, [1]])
@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("llama", "max_position_embeddings"),
        ("mistral", "sliding_window"),
        ("qwen2", "max_window_layers"),
        ("mixtral", "num_local_experts"),
        ("qwen3_moe", "decoder_sparse_step"),
        ("deepseek_v2", "q_lora_rank"),
        ("deepseek_v2", "first_k_dense_replace"),
        ("deepseek_v2", "n_shared_experts"),
    ],
)
def test_numbers_that_may_be_left_out_may_not_be_wrong_either(model_type: str, key: str, value: Any) -> None:
    settings = {"deepseek_v2": LATENT, "qwen2": {"use_sliding_window": True, "sliding_window": 64}}.get(model_type, {})
    with pytest.raises(ModelError) as found:
        ModelShape.of(raw(model_type, **{**settings, key: value}))
    assert str(found.value) == f"config.json: {key} is {value!r}: expected a whole number without quotes, or null"


def test_a_missing_context_is_unknown() -> None:
    assert ModelShape.of(raw("llama", max_position_embeddings=None)).context_length is None


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_in_other_words_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"config\\.json: {name} is 'linear': expected an object or null"):
        ModelShape.of(raw("llama", **{name: "linear"}))


@pytest.mark.parametrize("config", [{}, {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2}])
def test_a_config_in_other_words_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config\.json: hidden_size is None: expected a positive number"):
        ModelShape.of(config)


# -- real models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # What the hub says of their safetensors; Gemma 2 and SmolLM2 tie their embeddings.
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("google/gemma-2-2b", 2_614_341_888),
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
        ("deepseek-ai/DeepSeek-V2-Lite", 15_706_484_224),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_models_of_the_catalogue_have_the_parameters_that_they_are_known_for(name: str, parameters: int) -> None:
    assert ModelShape.of(CATALOGUE[name]).num_parameters == parameters


@pytest.mark.parametrize(
    ("config", "softcapped", "capturable"),
    [
        ({}, False, True),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, True, False),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, False, True),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, False, False),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, False, False),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, False, False),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, False, True),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, False, True),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "longrope"}}, False, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, False, True),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}}}, False, False),
    ],
)
def test_what_cuda_graphs_can_replay(config: dict[str, Any], softcapped: bool, capturable: bool) -> None:
    shape = ModelShape.of({**BASE, "model_type": "llama", **config})
    assert (shape.softcapped, shape.capturable) == (softcapped, capturable)


def test_gemma2_caps_its_scores_as_transformers_has_it() -> None:
    assert (shape_of("gemma2").softcapped, shape_of("gemma2").capturable) == (True, False)
    for family in ("llama", "phi3", "gemma3_text"):
        assert (shape_of(family).softcapped, shape_of(family).capturable) == (False, True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "names",
    [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "norm"], ["input_layernorm", "self_attn.o_proj"]],
)
def test_modules_beside_an_adapter_are_as_large_as_pefts(family: str, names: list[str]) -> None:
    targets = {"phi3": ["qkv_proj"], "deepseek_v2": ["kv_b_proj"]}.get(family.replace(",", "").split()[0], ["k_proj"])
    config = AdapterConfig(r=3, target_modules=targets, modules_to_save=names)
    model = model_of(family)
    adapted = add_adapter(model, config, "base")
    shape, theirs = shape_of(family), adapted.peft_config["default"].modules_to_save
    trained = sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad and ".modules_to_save." in n)
    assert shape.saved(names).values == shape.saved(theirs).values == trained
    assert (shape.saved(names).embeddings, shape.saved(names).head) == (
        adapted.get_base_model().get_input_embeddings().weight.requires_grad,
        adapted.get_base_model().get_output_embeddings().weight.requires_grad,
    )


def test_a_module_that_is_not_there_is_refused() -> None:
    shape = shape_of("llama")
    assert shape.saved(["layers.1.mlp.down_proj"]).layers == 1
    assert shape.saved(["down_proj"]).layers == shape.num_layers
    with pytest.raises(
        ModelError, match=r"adapter\.modules_to_save: head matches no module of this model .*; it has down_proj, "
    ):
        shape.saved(["head"])
