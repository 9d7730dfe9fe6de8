"""What a model's config.json says of its size: matrices, norms, experts, parameters. Imports no PyTorch.

The names are those of transformers' modules, so that adapter targets mean the same here and in training. Only what is an
`nn.Linear` there can be adapted or quantized by bitsandbytes: the experts of a mixture are three-dimensional parameters in
transformers 5, and stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.models.catalogue import NO_LIMIT
from tunesmith.models.families import PRESETS, TAKEN_FOR_EXPERTS, taken_for_experts

FUSED = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"})
"""`model_type`s whose whole decoder layers the fused engine runs (models/families.py, by transformers' name)."""

HALF_FUSED = frozenset({"mixtral", "deepseek_v2"})
"""`model_type`s of which it runs a half: attention, or the dense MLP. The rest is planned as the model's own modules."""

KNOWN = FUSED | HALF_FUSED | {"gpt_oss", "qwen2_moe", "qwen3_moe", "smollm3"}
"""`model_type`s whose parameters are counted exactly. Others are taken for a plain decoder, and the plan says so."""

WITHOUT_BIAS = frozenset({"mistral", "mixtral", "phi3"})
"""Families whose attention has no biases, whatever their config's `attention_bias` says."""

QWEN2 = frozenset({"qwen2", "qwen2_moe"})
"""Families with biases of queries, keys and values alone, whatever `attention_bias` says."""

EAGER = frozenset({"gemma2", "gpt_oss"})
"""Families whose attention keeps its scores: soft-capped ones, or with a sink beside them, which PyTorch's kernels have not."""

POST_NORMS = frozenset({"gemma2", "gemma3_text"})
"""Families that norm the output of attention and of the MLP too."""

HEAD_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3_text"})
"""Families that norm the heads of queries and keys."""


PREFIX = re.compile(r"^(.*\.)?(model|language_model)\.")
"""What comes before the decoder in the path of a module."""


@dataclass(frozen=True, slots=True)
class Linear:
    """An `nn.Linear` of a decoder layer: its path in the layer, its input and output features."""

    path: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def name(self) -> str:
        """The last part of the path, e.g. `q_proj`."""
        return self.path.rpartition(".")[2]

    @property
    def values(self) -> int:
        """Values of the matrix, without the bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer. `expert_values` are those of all experts; one token meets `active_experts` of them, which have
    `active_expert_values`. `experts` are the matrices of one of `num_experts`, as if they were linear layers.

    `other_values` are norms and routers. `mlp_width` is how many intermediate features a token has, in all MLPs it meets.
    """

    linears: tuple[Linear, ...]
    mlp_width: int
    active_experts: int = 0
    expert_values: int = 0
    active_expert_values: int = 0
    other_values: int = 0
    num_experts: int = 0
    experts: tuple[Linear, ...] = ()

    @property
    def values(self) -> int:
        """Parameters of the layer."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return sum(linear.values for linear in self.linears) + biases + self.expert_values + self.other_values


@dataclass(frozen=True, slots=True)
class Saved:
    """What `adapter.modules_to_save` means: `values` that train in full, tied ones once; whether the embeddings and the head
    are among them; and in how many decoder layers a projection is.
    """

    values: int = 0
    embeddings: bool = False
    head: bool = False
    layers: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer. `layers` holds each kind of layer with its number of layers.

    `value_dim` is the width of a value head (`head_dim` but in latent attention). `window` is the sliding window of
    `windowed` of its layers, in tokens. `exact` says whether the family is known, so that parameters are counted exactly.
    `softcapped` says whether attention scores are (FlexAttention runs them), `capturable` whether CUDA graphs can replay layers.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    tied: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    context_length: int | None
    layers: tuple[tuple[int, Layer], ...]
    window: int | None = None
    windowed: int = 0
    exact: bool = True
    softcapped: bool = False
    capturable: bool = True

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return sum(count for count, _ in self.layers)

    @property
    def embedding_values(self) -> int:
        """Values of the input embedding; the head has as many, its own or the same."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        embeddings = self.embedding_values * (1 if self.tied else 2)
        return embeddings + sum(count * layer.values for count, layer in self.layers) + self.hidden_size

    @property
    def linear_values(self) -> int:
        """Values of all linear layers in the decoder: what bitsandbytes quantizes."""
        return sum(count * linear.values for count, layer in self.layers for linear in layer.linears)

    @property
    def query_size(self) -> int:
        """Features of all queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def attention_size(self) -> int:
        """Features of attention's result."""
        return self.num_heads * self.value_dim

    @property
    def kv_size(self) -> int:
        """Features of keys and values of a token together, as attention reads them."""
        return self.num_kv_heads * (self.head_dim + self.value_dim)

    @property
    def can_fuse(self) -> bool:
        """Whether the fused engine runs whole layers of this family."""
        return self.model_type in FUSED

    @property
    def post_norms(self) -> bool:
        """Whether a branch's output is normed before it is added."""
        return self.model_type in POST_NORMS

    @property
    def head_norms(self) -> bool:
        """Whether the heads of queries and keys are normed."""
        return self.model_type in HEAD_NORMS

    def targets(self, setting: str | list[str] | tuple[str, ...] = "all-linear") -> Iterator[tuple[int, Linear]]:
        """What `adapter.target_modules` means: linear layers with their number, and matrices of experts with theirs.

        Raises ModelError if it matches none, or what PEFT cannot adapt, as training would.
        """
        taken = TAKEN_FOR_EXPERTS.get(self.model_type, ())
        found = [
            (count, linear)
            for count, layer in self.layers
            for linear in layer.linears
            if _is_target(linear, setting, taken)
        ]
        experts = [
            (count * layer.num_experts, expert)
            for count, layer in self.layers
            for expert in self.adapted_experts(layer, setting)
        ]
        if not found and not experts:
            names = sorted({linear.name for _, layer in self.layers for linear in layer.linears})
            inside = sorted({expert.name for _, layer in self.layers for expert in layer.experts})
            also = f", and experts ({', '.join(inside)}), which no preset means: name them in a list" if inside else ""
            raise ModelError(
                f"adapter.target_modules: {setting} matches no linear layer of this model; it has {', '.join(names)}{also}"
            )
        if any(linear.name in taken for _, linear in found):
            every = (layer for count, layer in self.layers for _ in range(count))
            missing = [
                f"model.layers.{number}.{linear.path}"
                for number, layer in enumerate(every)
                for linear in layer.linears
                if linear.name in taken and _is_target(linear, setting, taken)
            ]
            raise ModelError(taken_for_experts(list(setting) if isinstance(setting, tuple) else setting, missing))
        yield from found
        yield from experts

    def adapted_experts(self, layer: Layer, setting: str | list[str] | tuple[str, ...]) -> list[Linear]:
        """The matrices of a layer's experts that `adapter.target_modules` names, as models/adapters.py chooses them."""
        if isinstance(setting, str):
            return []
        linears = [linear for _, each in self.layers for linear in each.linears]
        names = {name for name in setting if not any(f".{linear.path}".endswith(f".{name}") for linear in linears)}
        return [
            expert
            for expert in layer.experts
            if any(f".{expert.path}".endswith(f".{name}") for name in names)
            or any(f".{expert.path.rpartition('.')[0]}".endswith(f".{name}") for name in names)
        ]

    def adapter_values(
        self, r: int, setting: str | list[str] | tuple[str, ...] = "all-linear", dora: bool = False
    ) -> int:
        """Parameters of a LoRA adapter: r · (inputs + outputs) for each of its linear layers (Hu et al. 2021); with DoRA a
        magnitude for each output besides.
        """
        return sum(
            count * (r * (linear.inputs + linear.outputs) + (linear.outputs if dora else 0))
            for count, linear in self.targets(setting)
        )

    def saved(self, names: Sequence[str]) -> Saved:
        """What trains in full beside an adapter, by names as `adapter.modules_to_save` or PEFT has them.

        Raises ModelError, in a family that is known, for a name that matches nothing, as training would. Norms that the shape
        does not tell apart count nothing.
        """
        found: dict[str, int] = {}
        for name in names:
            short = PREFIX.sub("", name)
            meant = {path: size for path, size in self._modules() if f".{path}".endswith(f".{short}")}
            if not meant and self.exact and not short.endswith("norm"):
                endings = sorted({path.rpartition(".")[2] for path, _ in self._modules()})
                raise ModelError(
                    f"adapter.modules_to_save: {name} matches no module of this model that has weights itself; it has "
                    f"{', '.join(endings)}"
                )
            found |= meant
        ends = found.keys() & {"embed_tokens", "lm_head"}
        embeddings = bool(ends) if self.tied else "embed_tokens" in ends
        head = bool(ends) if self.tied else "lm_head" in ends
        values = sum(size for path, size in found.items() if path not in ends)
        values += self.embedding_values * (embeddings if self.tied else embeddings + head)
        return Saved(values, embeddings, head, len({path.split(".")[1] for path in found if path.endswith("_proj")}))

    def _modules(self) -> Iterator[tuple[str, int]]:
        """Path, from the decoder on, and parameters of each module that may train in full."""
        yield from (
            ("embed_tokens", self.embedding_values),
            ("lm_head", self.embedding_values),
            ("norm", self.hidden_size),
        )
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if self.post_norms else []
        kinds = (layer for count, layer in self.layers for _ in range(count))
        for number, layer in enumerate(kinds):
            yield from ((f"layers.{number}.{name}", self.hidden_size) for name in norms)
            if self.head_norms:
                yield from ((f"layers.{number}.self_attn.{name}", self.head_dim) for name in ("q_norm", "k_norm"))
            for linear in layer.linears:
                yield f"layers.{number}.{linear.path}", linear.values + linear.outputs * linear.bias

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape that a config.json describes; a multimodal model's language part. Raises ModelError."""
        if isinstance(config.get("text_config"), Mapping):
            text = dict(config["text_config"])
            text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings"))
            config = text
        reader = _Reader(config)
        kind = str(config.get("model_type", ""))
        hidden, heads = reader.number("hidden_size"), reader.number("num_attention_heads")
        head_dim = reader.number("head_dim", hidden // heads)
        value_dim = head_dim
        if kind.startswith("deepseek"):
            head_dim = reader.number("qk_nope_head_dim") + reader.number("qk_rope_head_dim")
            value_dim = reader.number("v_head_dim")
        num_layers = reader.number("num_hidden_layers")
        window = _window(reader, kind)
        softcapped = config.get("attn_logit_softcapping") is not None
        limit = reader.optional("max_position_embeddings")
        return cls(
            model_type=kind,
            hidden_size=hidden,
            vocab_size=reader.number("vocab_size"),
            tied=bool(_default(config, "tie_word_embeddings", kind in POST_NORMS)),
            num_heads=heads,
            num_kv_heads=heads if kind.startswith("deepseek") else reader.number("num_key_value_heads", heads),
            head_dim=head_dim,
            value_dim=value_dim,
            context_length=limit if limit and limit < NO_LIMIT else None,
            layers=tuple(_layers(reader, kind, hidden, heads, head_dim, num_layers)),
            window=window,
            windowed=_windowed(reader, kind, num_layers) if window else 0,
            exact=kind in KNOWN and not _mixes_dense_layers(reader),
            softcapped=softcapped,
            capturable=not softcapped and not _rotates_by_length(config),
        )


def _rotates_by_length(config: Mapping[str, Any]) -> bool:
    """Whether the rotation of queries and keys depends on the longest position, which transformers looks at on the CPU."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        raise ModelError(f"config.json: {name} is {rope!r}: expected an object or null")
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    names = [str(kind.get("rope_type", kind.get("type", ""))) for kind in kinds]
    return any("dynamic" in name or name == "longrope" for name in names)


def _mixes_dense_layers(reader: _Reader) -> bool:
    """Whether a mixture of Qwen's kind has dense layers here and there, which are not told apart."""
    return bool(reader.config.get("mlp_only_layers")) or (reader.optional("decoder_sparse_step") or 1) != 1


def _is_target(linear: Linear, setting: str | list[str] | tuple[str, ...], taken: Sequence[str] = ()) -> bool:
    """As models/adapters.py chooses them; `taken` are names that PEFT takes for experts' parameters."""
    if not isinstance(setting, str):
        presets = [name for name in setting if name in PRESETS]
        named = any(f".{linear.path}".endswith(f".{name}") for name in setting)
        return named or any(_is_target(linear, preset, taken) for preset in presets)
    in_attention = "attn" in linear.path
    return {
        "all-linear": linear.name not in taken,
        "attention": in_attention,
        "mlp": not in_attention,
        "qv": linear.name in ("q_proj", "v_proj", "qkv_proj"),
    }.get(setting, False)


class _Reader:
    """Reads numbers from a config. Raises ModelError for one that is missing or none."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def number(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(
                f"config.json: {key} is {value!r}: expected a positive number; this is no decoder-only language model that "
                "can be planned"
            )
        return value

    def optional(self, key: str) -> int | None:
        """A number that may be 0, or may be missing or null (None)."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ModelError(f"config.json: {key} is {value!r}: expected a whole number without quotes, or null")
        return value


def _default(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _layers(
    reader: _Reader, kind: str, hidden: int, heads: int, head_dim: int, num_layers: int
) -> Iterator[tuple[int, Layer]]:
    config = reader.config
    norms = (4 if kind in POST_NORMS else 2) * hidden + (2 * head_dim if kind in HEAD_NORMS else 0)
    if kind.startswith("deepseek"):
        yield from _deepseek(reader, hidden, heads, num_layers)
        return
    kv = reader.number("num_key_value_heads", heads) * head_dim
    bias = kind in QWEN2 or (kind not in WITHOUT_BIAS and bool(_default(config, "attention_bias", kind == "gpt_oss")))
    output_bias = kind not in QWEN2 and bias
    if kind == "phi3":
        attention = [Linear("self_attn.qkv_proj", hidden, heads * head_dim + 2 * kv)]
    else:
        attention = [
            Linear("self_attn.q_proj", hidden, heads * head_dim, bias),
            Linear("self_attn.k_proj", hidden, kv, bias),
            Linear("self_attn.v_proj", hidden, kv, bias),
        ]
    attention.append(Linear("self_attn.o_proj", heads * head_dim, hidden, output_bias))
    experts = None
    if "moe" in kind or kind in ("mixtral", "gpt_oss"):
        experts = reader.optional("num_local_experts") or reader.optional("num_experts")
    if experts:
        width = reader.number("moe_intermediate_size", reader.optional("intermediate_size"))
        active = reader.number("num_experts_per_tok", 2)
        shared = (reader.optional("shared_expert_intermediate_size") or 0) if kind == "qwen2_moe" else 0
        if shared:
            attention += _mlp("mlp.shared_expert", kind, hidden, shared)
            attention.append(Linear("mlp.shared_expert_gate", hidden, 1))
        one, other = 3 * hidden * width, norms + experts * hidden
        if kind == "gpt_oss":  # biases of experts and router, and a sink for each head
            one, other = one + 2 * width + hidden, other + experts + heads
        yield (
            num_layers,
            Layer(
                tuple(attention),
                mlp_width=active * width + shared,
                active_experts=active,
                expert_values=experts * one,
                active_expert_values=active * one,
                other_values=other,
                num_experts=experts,
                experts=_expert(hidden, width),
            ),
        )
        return
    width = reader.number("intermediate_size", 4 * hidden)
    mlp_bias = bool(config.get("mlp_bias"))
    yield num_layers, Layer((*attention, *_mlp("mlp", kind, hidden, width, mlp_bias)), width, other_values=norms)


def _mlp(path: str, kind: str, hidden: int, width: int, bias: bool = False) -> list[Linear]:
    if kind == "phi3":
        return [Linear(f"{path}.gate_up_proj", hidden, 2 * width), Linear(f"{path}.down_proj", width, hidden)]
    return [
        Linear(f"{path}.gate_proj", hidden, width, bias),
        Linear(f"{path}.up_proj", hidden, width, bias),
        Linear(f"{path}.down_proj", width, hidden, bias),
    ]


def _expert(hidden: int, width: int) -> tuple[Linear, ...]:
    """An expert's matrices, under the names of the parameters that hold those of all."""
    return Linear("mlp.experts.gate_up_proj", hidden, 2 * width), Linear("mlp.experts.down_proj", width, hidden)


def _deepseek(reader: _Reader, hidden: int, heads: int, num_layers: int) -> Iterator[tuple[int, Layer]]:
    """Multi-head latent attention, and experts beside shared ones from layer `first_k_dense_replace` on (arXiv 2405.04434)."""
    config = reader.config
    nope, rope, value = (reader.number(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    latent, query_latent = reader.number("kv_lora_rank"), reader.optional("q_lora_rank")
    bias = bool(config.get("attention_bias"))
    if query_latent:
        queries = [
            Linear("self_attn.q_a_proj", hidden, query_latent, bias),
            Linear("self_attn.q_b_proj", query_latent, heads * (nope + rope)),
        ]
    else:
        queries = [Linear("self_attn.q_proj", hidden, heads * (nope + rope))]
    attention = [
        *queries,
        Linear("self_attn.kv_a_proj_with_mqa", hidden, latent + rope, bias),
        Linear("self_attn.kv_b_proj", latent, heads * (nope + value)),
        Linear("self_attn.o_proj", heads * value, hidden, bias),
    ]
    norms = 2 * hidden + latent + (query_latent or 0)
    dense = min(reader.optional("first_k_dense_replace") or 0, num_layers)
    if dense:
        width = reader.number("intermediate_size")
        yield dense, Layer((*attention, *_mlp("mlp", "", hidden, width)), width, other_values=norms)
    if num_layers == dense:
        return
    width, experts = reader.number("moe_intermediate_size"), reader.number("n_routed_experts")
    active, shared = reader.number("num_experts_per_tok"), (reader.optional("n_shared_experts") or 0) * width
    yield (
        num_layers - dense,
        Layer(
            (*attention, *(_mlp("mlp.shared_experts", "", hidden, shared) if shared else ())),
            mlp_width=active * width + shared,
            active_experts=active,
            expert_values=experts * 3 * hidden * width,
            active_expert_values=active * 3 * hidden * width,
            other_values=norms + experts * hidden,
            num_experts=experts,
            experts=_expert(hidden, width),
        ),
    )


def _window(reader: _Reader, kind: str) -> int | None:
    """The sliding window in tokens, where one is on: Qwen says so apart."""
    if kind.startswith("qwen") and not reader.config.get("use_sliding_window"):
        return None
    return reader.optional("sliding_window") or None


def _windowed(reader: _Reader, kind: str, num_layers: int) -> int:
    """How many layers have the window: every second one in Gemma 2 and gpt-oss, five of six in Gemma 3, the last ones in Qwen, else all."""
    kinds = reader.config.get("layer_types")
    if isinstance(kinds, list):
        return sum(name == "sliding_attention" for name in kinds)
    if kind in ("gemma2", "gpt_oss"):
        return -(-num_layers // 2)
    if kind == "gemma3_text":
        return num_layers - num_layers // reader.number("sliding_window_pattern", 6)
    if kind.startswith("qwen"):
        whole = reader.optional("max_window_layers")
        return max(0, num_layers - (28 if whole is None else whole))
    return num_layers
