"""Every family of docs/families.md, all the way: train until it learns, everything moves, reload in PEFT, merge.

What distinguishes a family is in its tiny model: rotary scaling, tied embeddings, shared or own keys, biases, windows that are
shorter than the rows, soft-caps, experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import GEMMA3_LAYERS, make_tiny_gemma3, make_tiny_model, store_as_mxfp4
from tunesmith.config import AdapterConfig, ModelConfig, QuantizationConfig, RunConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.hardware import probe
from tunesmith.memory.estimate import Estimate, Load, Setup, expert_copies, weight_bytes
from tunesmith.memory.shape import ModelShape
from tunesmith.models.adapters import add_adapter, target_modules, weights_gb
from tunesmith.models.catalogue import find_model_config
from tunesmith.models.families import SPECS, LayerSpec, layer_spec
from tunesmith.models.load import TEXT_TOWERS, find_model, load_model
from tunesmith.runs import RunFolder
from tunesmith.training.prepare import check_forward
from tunesmith.types import GB
from tunesmith.workflows.load import load
from tunesmith.workflows.merge import merge
from tunesmith.workflows.train import TrainingSession, start

Configure = Callable[..., RunConfig]
DOCS = Path(__file__).parents[2] / "docs" / "families.md"


@dataclass(frozen=True)
class Family:
    """A tiny model of a row of docs/families.md. `fused` is what the page says of the fused engine."""

    row: str
    model_type: str
    fused: str
    settings: dict[str, Any] = field(default_factory=dict)
    make: Callable[[Path], Path] | None = None

    @property
    def engine(self) -> str:
        return "reference" if self.fused.startswith("no") else "fused"


WHOLE, NO = "whole layers", "no"
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1] * 4, "long_factor": [2.0, 3.5] * 4,
    "original_max_position_embeddings": 64, "factor": 64.0,
}  # fmt: skip
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "kv_heads": 4, "kv_lora_rank": 64, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama 2": Family("Llama 2", "llama", WHOLE, {"kv_heads": 4}),
    "llama 3": Family("Llama 3", "llama", WHOLE, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama 3.1": Family("Llama 3.1, 3.2, 3.3", "llama", WHOLE, {"rope_parameters": LLAMA3_ROPE}),
    "llama 3.2": Family(
        "Llama 3.1, 3.2, 3.3", "llama", WHOLE, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}
    ),
    "llama with biases": Family("Llama 3", "llama", WHOLE, {"attention_bias": True, "mlp_bias": True}),
    "yi": Family("Yi, Yi-1.5", "llama", WHOLE, {"kv_heads": 1, "rope_parameters": {"rope_theta": 5e6}}),
    "smollm2": Family(
        "SmolLM2", "llama", WHOLE, {"heads": 3, "kv_heads": 1, "hidden": 192, "tie_word_embeddings": True}
    ),
    "smollm3": Family("SmolLM3", "smollm3", NO, {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "mistral": Family("Mistral", "mistral", WHOLE, {"sliding_window": 16}),
    "mixtral": Family("Mixtral", "mixtral", "attention", SPARSE),
    "phi-3": Family("Phi-3, Phi-3.5, Phi-4", "phi3", WHOLE, {"sliding_window": 16}),
    "phi-3.5": Family("Phi-3, Phi-3.5, Phi-4", "phi3", WHOLE, {"rope_parameters": LONGROPE}),
    "qwen2": Family("Qwen2, Qwen2.5", "qwen2", WHOLE, {}),
    "qwen2.5, tied": Family("Qwen2, Qwen2.5", "qwen2", WHOLE, {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3", "qwen3", WHOLE, {"head_dim": 32}),
    "qwen3-moe": Family(
        "Qwen3-MoE", "qwen3_moe", NO, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    ),
    "gemma 2": Family(
        "Gemma 2",
        "gemma2",
        WHOLE,
        {
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma 3": Family(
        "Gemma 3",
        "gemma3_text",
        WHOLE,
        {"sliding_window": 16, "layer_types": GEMMA3_LAYERS, "rope_parameters": TWO_ROPES},
    ),
    "gemma 3, multimodal": Family("Gemma 3, multimodal", "gemma3", WHOLE, make=make_tiny_gemma3),
    "deepseek-v2-lite": Family("DeepSeek-V2", "deepseek_v2", "dense MLPs", {**LATENT, "q_lora_rank": None}),
    "deepseek-v2": Family("DeepSeek-V2", "deepseek_v2", "dense MLPs", {**LATENT, "q_lora_rank": 64}),
    "gpt-oss": Family("gpt-oss", "gpt_oss", NO, {**SPARSE, "sliding_window": 16}),
    "olmo 2": Family("any other", "olmo2", NO),
    "gpt-neox": Family("any other", "gpt_neox", NO),
}
MIXTURES = ("mixtral", "qwen3-moe", "deepseek-v2", "gpt-oss")
CASES = [
    (name, method, engine)
    for name, family in FAMILIES.items()
    for method in ("lora", "qlora")
    for engine in dict.fromkeys(("reference", family.engine))
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder_of("qwen3")`: the folder of its tiny model. Widths are multiples of 64, of which bitsandbytes is right on a CPU."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            family, place = FAMILIES[name], tmp_path_factory.mktemp("family") / "model"
            if family.make is not None:
                made[name] = family.make(place)
            else:
                made[name] = make_tiny_model(place, family=family.model_type, **{"hidden": 64, **family.settings})
        return made[name]

    return of


def plain(folder: Path) -> Any:
    """The model as transformers alone loads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, options = AutoConfig.from_pretrained(folder), {}
    if config.model_type in TEXT_TOWERS:  # as docs/families.md says
        options = {"config": config.get_text_config(), "key_mapping": TEXT_TOWERS[config.model_type]}
    if config.model_type == "gemma2":
        options = {"attn_implementation": "eager"}  # its sdpa leaves the soft-cap out
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


IDS = torch.arange(3, 99)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["event"] == "step"]


def notes(run: RunFolder) -> list[str]:
    return [event["message"] for event in run.events() if event["event"] in ("warning", "decision")]


def train_and_check(config: RunConfig, out: Path, folder: Path) -> TrainingSession:
    """The loss falls, every trainable tensor moves, adapter and merged model compute elsewhere what was trained."""
    from peft import PeftModel

    session = start(config, out)
    before = {name: p.detach().clone() for name, p in session.forward.model.named_parameters() if p.requires_grad}
    assert before
    session.train()
    run = session.run
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    after = dict(session.forward.model.named_parameters())
    assert not [name for name, value in before.items() if torch.equal(after[name], value)]

    ours = logits(session.forward.model)
    torch.testing.assert_close(logits(load(run.path).forward.model), ours, rtol=1e-4, atol=1e-4)
    base = plain(folder)
    own = logits(base)
    assert (ours - own).norm() > 0.05 * own.norm(), "the adapter does something"
    if config.method == "lora":
        theirs = logits(PeftModel.from_pretrained(base, run.adapter_path))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert merge(run.path)["difference"] < 1e-4
    if config.method == "lora":
        torch.testing.assert_close(logits(plain(run.path / "merged")), ours, rtol=1e-3, atol=1e-3)
    return session


@pytest.mark.parametrize(("name", "method", "engine"), CASES)
def test_it_trains_and_reloads_and_merges(
    configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path], name: str, method: str, engine: str
) -> None:
    settings = (f"method={method}", f"model.engine={engine}", "adapter.r=8", "training.epochs=5", "optimizer.lr=1e-2")
    config = configure(*settings, model=folder_of(name))
    session = train_and_check(config, tmp_path / "run", folder_of(name))
    assert session.plan.memory.engine == engine
    trained = [path for path, p in session.forward.model.named_parameters() if p.requires_grad]
    assert not [path for path in trained if re.search(r"\.(experts|router|gate)\.", path)], (
        "the default names no experts"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_full_fine_tuning(configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path], name: str) -> None:
    """Of every weight: a run stops if one has not moved."""
    config = configure("method=full", "training.epochs=2", "optimizer.lr=5e-3", model=folder_of(name))
    session = start(config, tmp_path / "run")
    session.train()
    assert losses(session.run)[-1] < 0.8 * losses(session.run)[0]
    torch.testing.assert_close(
        logits(plain(session.run.model_path)), logits(session.forward.model), rtol=1e-4, atol=1e-4
    )


# -- docs/families.md -------------------------------------------------------------------------------------------------


def table() -> dict[str, dict[str, str]]:
    """The table's cells by family and column."""
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, _, *rows = cells
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    assert set(table()) == {family.row for family in FAMILIES.values()}
    for row, values in table().items():
        types = {family.model_type for family in FAMILIES.values() if family.row == row}
        named = set(re.findall(r"`(\w+)`", values["`model_type`"]))
        assert types == named or (row == "any other" and not named), row
        assert {values[method] for method in ("LoRA", "QLoRA", "full")} <= {
            "yes",
            "yes; experts in 16 bits",
            "see below",
        }
    specs = {spec.family for spec in SPECS.values()}
    assert {spec for spec in specs if not any(row.startswith(spec) for row in table())} == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_says_what_is_fused(
    configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path], name: str
) -> None:
    family = FAMILIES[name]
    said = table()[family.row]["fused"]
    assert said.startswith(family.fused)
    model = load(folder_of(name)).forward.base
    specs = [layer_spec(layer) for layer in getattr(model.get_decoder(), "layers", ())]
    halves = {spec.halves for spec in specs if isinstance(spec, LayerSpec)}
    names = {("attention", "mlp"): WHOLE, ("attention",): "attention", ("mlp",): "dense MLPs"}
    assert [names[each] for each in halves] == ([] if family.engine == "reference" else [family.fused])
    if family.engine == "reference":
        with pytest.raises(
            ConfigError, match=r"model\.engine is fused, but no layer of this model can be: .*; use auto"
        ):
            start(configure("model.engine=fused", model=folder_of(name)), tmp_path / "run")


def test_the_page_says_which_families_have_experts(folder_of: Callable[[str], Path]) -> None:
    for name, family in FAMILIES.items():
        has = any(
            p.ndim == 3 and ".experts." in path for path, p in load(folder_of(name)).forward.base.named_parameters()
        )
        values = table()[family.row]
        assert has == (name.startswith(MIXTURES))
        assert (values["experts' adapters"] == "by name") == has, name
        assert (values["QLoRA"] == "yes; experts in 16 bits") == (has and name != "gpt-oss"), name


# -- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_are_named_have_adapters(
    configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path], name: str, method: str
) -> None:
    engine = FAMILIES[name].engine if name == "mixtral" else "auto"
    settings = (f"method={method}", f"model.engine={engine}", "adapter.r=4", "training.epochs=5", "optimizer.lr=1e-2")
    config = configure("adapter.target_modules=[attention, experts]", *settings, model=folder_of(name))
    session = train_and_check(config, tmp_path / "run", folder_of(name))
    model, num_experts = session.forward.model, 4
    found = {path: p for path, p in model.named_parameters() if p.requires_grad and ".experts." in path}
    layers = 1 if name == "deepseek-v2" else 2
    assert len(found) == layers * 2 * 2, "A and B of gate_up_proj and down_proj"
    for path, value in found.items():
        if ".lora_B." in path:  # its columns are (r, E); B begins at zero
            each = value.detach().reshape(len(value), 4, num_experts).abs().amax((0, 1))
            assert bool((each > 0).all()), "every expert has learned"
    assert not [
        path for path, p in model.named_parameters() if p.requires_grad and re.search(r"\.(gate|router)\.", path)
    ]


def test_experts_of_one_layer_and_of_one_matrix(
    configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    """PEFT would leave `layers_to_transform` aside for experts, and warns of patterns that do match them."""
    settings = (
        "adapter.target_modules=[experts.down_proj, q_proj]",
        "adapter.layers_to_transform=[1]",
        "adapter.rank_pattern={experts.down_proj: 2}",
        "adapter.r=4",
    )
    model = start(configure(*settings, model=folder_of("mixtral")), tmp_path / "run").forward.model
    found = {path: p.shape for path, p in model.named_parameters() if p.requires_grad}
    prefix = "base_model.model.model.layers.1"
    assert found == {
        f"{prefix}.mlp.experts.lora_A.default.weight": (4 * 2, 128),
        f"{prefix}.mlp.experts.lora_B.default.weight": (64, 4 * 2),
        f"{prefix}.self_attn.q_proj.lora_A.default.weight": (4, 64),
        f"{prefix}.self_attn.q_proj.lora_B.default.weight": (64, 4),
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_presets_leave_experts_and_routers_alone(folder_of: Callable[[str], Path], name: str) -> None:
    model = load(folder_of(name)).forward.base
    for preset in ("all-linear", "attention"):
        assert not {"gate", "router", "gate_up_proj", "experts"}.intersection(target_modules(model, preset))
    with pytest.raises(ModelError) as caught:
        target_modules(model, ["expert"])
    assert str(caught.value).endswith(
        ", and experts (down_proj, gate_up_proj), which no preset means: name them in a list"
    )


@pytest.mark.parametrize(("kind", "router"), [("afmoe", "mlp.router.gate"), ("phimoe", "mlp.router")])
def test_a_router_that_is_a_linear_layer_is_no_target(kind: str, router: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **sizes, num_hidden_layers=3, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model.get_submodule(f"model.layers.2.{router}"), torch.nn.Linear)
    assert not {"gate", "router"}.intersection(target_modules(model, "all-linear"))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("adapter.dropout=0.1", "adapter.dropout 0.1"),
        ("adapter.dora=true", "adapter.dora"),
        ("adapter.init_lora_weights=pissa", "adapter.init_lora_weights pissa"),
    ],
)
def test_what_does_not_go_with_experts(
    configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path], setting: str, said: str
) -> None:
    experts = "adapter.target_modules=[experts]"
    with pytest.raises(ModelError) as caught:
        start(configure(setting, experts, model=folder_of("mixtral")), tmp_path / "run")
    text = str(caught.value)
    assert text.startswith(
        f"{said}: PEFT cannot do it on experts, whose parameters are no linear layers (model.layers.0.mlp.experts.down_proj); set "
    )
    assert text.endswith(", or take the experts out of adapter.target_modules")


@pytest.mark.parametrize("name", MIXTURES)
def test_qlora_leaves_experts_and_says_so_and_the_plan_counts_them(
    configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path], name: str
) -> None:
    config = configure("method=qlora", "training.max_steps=1", "optimizer.lr=1e-2", model=folder_of(name))
    session = start(config, tmp_path / "run")
    base = session.forward.base
    experts = [p for path, p in base.named_parameters() if ".experts." in path and p.ndim == 3]
    assert {p.dtype for p in experts} == {torch.float32}
    session.train()
    (said,) = [note for note in notes(session.run) if "not quantized" in note]
    assert said.startswith(
        "the experts are not quantized: they stay in 32 bits and take 0.00 GB, which the memory plan counts"
    )
    shape = ModelShape.of(base.config.to_dict())
    setup = Setup("qlora", value_bytes=4, scheme="nf4", double_quant=True)
    experts_gb = sum(p.numel() * 4 for p in experts) / GB
    trainable = sum(p.numel() * 4 for p in session.forward.model.parameters() if p.requires_grad) / GB
    measured = weights_gb(session.forward.model) - trainable
    assert weight_bytes(shape, setup) / GB == pytest.approx(measured, rel=0.02)
    assert experts_gb > 0.1 * measured


def kept_bytes(model: Any, tokens: int) -> int:
    """What autograd keeps of a forward, each storage once, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=IDS[:, :tokens], use_cache=False).logits
    del logits
    return sum(found.values())


@pytest.mark.parametrize("named", ["experts", "experts.down_proj"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_plan_counts_the_copies_of_adapted_experts(folder_of: Callable[[str], Path], name: str, named: str) -> None:
    """W + s·B·A of all experts of each layer: what does not grow with the tokens."""
    kept, setups = [], []
    for targets in (["attention"], ["attention", named]):
        base = load(folder_of(name), dtype="fp32", device="cpu").forward.base
        model = add_adapter(base, AdapterConfig(r=4, target_modules=targets), "base").train()
        kept.append(2 * kept_bytes(model, 48) - kept_bytes(model, 96))
        setups.append(Setup("lora", value_bytes=4, r=4, targets=tuple(targets)))
    shape = ModelShape.of(base.config.to_dict())
    layers = [layer for count, layer in shape.layers for _ in range(count)]
    planned = [sum(expert_copies(shape, layer, setup) for layer in layers) for setup in setups]
    assert planned[0] == 0
    assert kept[1] - kept[0] == pytest.approx(planned[1], rel=0.1)


def test_planned_experts_make_the_peak_higher() -> None:
    """Mixtral 8x7B: 84 GB of copies where they are kept, one layer's and its gradient where layers are recomputed."""
    found = find_model_config("mixtral-8x7b")
    assert found is not None
    shape, load_of = ModelShape.of(found[1]), Load(2048, 2048, 2048)
    ((count, layer),) = shape.layers

    def activations_gb(targets: str | tuple[str, ...], recomputed: int) -> float:
        return Estimate(shape, Setup("lora", targets=targets), load_of).reference(recomputed).activations_gb

    of_a_layer = expert_copies(shape, layer, Setup("lora", targets=("experts",))) / GB
    assert count * of_a_layer == pytest.approx(84.0)
    for recomputed, copies in ((0, count + 1), (count, 2)):
        more = activations_gb(("attention", "experts"), recomputed) - activations_gb("attention", recomputed)
        assert more == pytest.approx(copies * of_a_layer, rel=0.01)


def test_all_linear_says_what_peft_cannot_adapt(
    configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    session = start(configure("training.max_steps=1", model=folder_of("deepseek-v2")), tmp_path / "run")
    session.train()
    assert (
        "adapter.target_modules all-linear leaves down_proj, gate_proj, up_proj of deepseek_v2 out: PEFT takes these names for its "
        "experts' parameters; the linear layers of attention have adapters"
    ) in notes(session.run)


def test_packed_documents_touch_each_other_by_rounding_alone(tmp_path: Path) -> None:
    """An expert's product has as many rows as tokens were sent to it. A model that does not isolate them is refused all the same."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "hidden": 256}
    forward = load(make_tiny_model(tmp_path / "model", family="qwen3_moe", **sizes), dtype="fp32").forward
    forward.base.set_experts_implementation("eager")
    check_forward(forward, packing=True)
    own = forward.base.model.forward
    forward.base.model.forward = lambda **given: own(**{**given, "position_ids": None})
    with pytest.raises(
        ModelError, match=r"Qwen3MoeForCausalLM lets packed documents see each other; set data\.packing: false"
    ):
        check_forward(forward, packing=True)


def test_gpt_oss_is_not_packed(configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    """transformers 5.17 makes its masks without a look at the positions."""
    with pytest.raises(
        ModelError, match=r"GptOssForCausalLM lets packed documents see each other; set data\.packing: false"
    ):
        start(configure("data.packing=true", model=folder_of("gpt-oss")), tmp_path / "run")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_a_mixture_in_bf16_is_merged(
    configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path], name: str
) -> None:
    """Rounding the weights sends a token to another expert here and there."""
    settings = ("method=qlora", "adapter.target_modules=[attention, experts]", "training.epochs=5", "memory.mode=min")
    session = start(configure(*settings, "model.dtype=bf16", model=folder_of(name)), tmp_path / "run")
    assert session.plan.memory.recompute_layers == 2
    session.train()
    assert {p.dtype for p in session.forward.model.parameters() if p.requires_grad} == {torch.float32}
    merged = merge(session.run.path)
    assert merged["top1"] > 0.95
    assert merged["effect"] > 0.5


# -- checkpoints that are stored in another way --------------------------------------------------------------------------


def test_gpt_oss_in_mxfp4_is_read_as_floats_and_written_so(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its makers store it. transformers would write it back under names that nothing reads."""
    folder = make_tiny_model(tmp_path / "model", family="gpt_oss", hidden=64, **SPARSE, sliding_window=16)
    store_as_mxfp4(folder)
    settings = ("adapter.r=8", "training.epochs=5", "optimizer.lr=1e-2")
    session = start(configure(*settings, model=folder), tmp_path / "run")
    experts = [p for path, p in session.forward.base.named_parameters() if path.endswith("experts.down_proj")]
    assert [p.dtype for p in experts] == [torch.float32] * 2
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 2**5  # fp4's magnitudes at the scale 2^(122 - 127)
    assert set(experts[0].detach().abs().unique().tolist()) == set(steps.tolist())
    session.train()
    ours = logits(session.forward.model)
    assert merge(session.run.path)["difference"] < 1e-4
    torch.testing.assert_close(logits(plain(session.run.path / "merged")), ours, rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match="its weights are stored in MXFP4, which bitsandbytes cannot quantize again"):
        start(configure("method=qlora", model=folder), tmp_path / "quantized")
    with pytest.raises(ModelError, match="its weights are stored in MXFP4"):
        load_model(find_model(ModelConfig(name=str(folder))), ModelConfig(), probe("cpu"), "fp32", QuantizationConfig())
    monkeypatch.setattr(
        "tunesmith.workflows.train.fetch_weights", lambda *given: pytest.fail("40 GB were fetched first")
    )
    with pytest.raises(ModelError, match="its weights are stored in MXFP4"):
        start(configure("method=qlora", model=folder), tmp_path / "before it is read")


def test_the_text_tower_of_a_multimodal_gemma_is_the_text_model(
    folder_of: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its weights, nothing of the vision tower, no report of that, and one text model when it is merged."""
    folder = folder_of("gemma 3, multimodal")
    capfd.readouterr()
    tower = load(folder, dtype="fp32", device="cpu").forward.base
    assert "UNEXPECTED" not in capfd.readouterr().err
    assert (type(tower).__name__, tower.config.model_type) == ("Gemma3ForCausalLM", "gemma3_text")
    text = plain(folder.parent / "text")
    assert logits(tower).equal(logits(text))
    assert [name for name, _ in tower.named_parameters()] == [name for name, _ in text.named_parameters()]


def test_loftq_does_not_find_the_weights_of_a_text_tower(
    configure: Configure, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    config = configure("method=qlora", "adapter.init_lora_weights=loftq", model=folder_of("gemma 3, multimodal"))
    with pytest.raises(
        ModelError, match=r"has no tensor model\.layers\.0\..*, whose quantization error LoftQ begins with"
    ):
        start(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("hidden", "method", "warned"), [(32, "qlora", True), (64, "qlora", False), (32, "lora", False)]
)
def test_4_bit_rows_that_bitsandbytes_misreads_on_a_cpu_are_named(
    configure: Configure, tmp_path: Path, hidden: int, method: str, warned: bool
) -> None:
    """Its own dequantization is off by half on some processors where a block of scales holds two rows; once it is nowhere, the warning can go."""
    import bitsandbytes.functional as bnb

    folder = make_tiny_model(tmp_path / "model", hidden=hidden)
    on_cpu = configure(f"method={method}", "training.max_steps=1", "model.device=cpu", model=folder)
    session = start(on_cpu, tmp_path / "run")
    session.train()
    said = [note for note in notes(session.run) if note.startswith("4-bit weights of this model are wrong on a CPU")]
    assert bool(said) == warned
    if warned:
        assert said[0].endswith("(gate_proj: 32); train it on a GPU, or set method: lora")
    weight = torch.randn(32, hidden, generator=torch.Generator().manual_seed(0))
    again = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
    wrong = bool((again - weight).norm() > 0.2 * weight.norm())
    assert not (wrong and hidden == 64), "a block of scales holds one row"
