"""`fuse(model)`: swap a model's decoder layers for fused ones, in place and reversibly.

Only the instance that is given changes: its layers are replaced by `FusedLayer`s that hold the same submodules under the
same names, so state-dict keys, PEFT, `save_pretrained` and `generate` go on as before, and its decoder gets one forward
hook. No class, no module and no other model is touched. `unfuse` puts everything back.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tunesmith.kernels.attention import SequenceLayout, describe_backend
from tunesmith.kernels.launch import use_triton
from tunesmith.kernels.pack import PackTable
from tunesmith.models.families import LayerSpec, layer_spec
from tunesmith.models.fused_layer import (
    ACTIVATIONS,
    AttentionHalf,
    FusedNorm,
    Inputs,
    LayerFunction,
    LayerRun,
    MlpHalf,
    Norm,
)
from tunesmith.models.linear_group import GroupState, LinearGroup, Sink, base_layer, why_not
from tunesmith.models.row_dropout import LAYER_STREAMS, mask_source
from tunesmith.types import LayerPolicy

RECOMPUTE_ALL = LayerPolicy(keep=frozenset())
"""What transformers' gradient checkpointing does: keep the layer's input alone."""


RECORDED = ("output_hidden_states", "output_attentions")
"""What transformers collects by hooks on layers of its own classes: a forward that asks for it runs those."""


@dataclass(frozen=True, slots=True)
class FusePlan:
    """What `fuse` did: `fused` and `partly` layers by number, and `reference` ones with the reason. Printed as text."""

    family: str
    num_layers: int
    fused: tuple[int, ...]
    partly: dict[int, str] = field(default_factory=dict)
    reference: dict[int, str] = field(default_factory=dict)
    dtype: str = ""
    weights: str = ""
    adapters: str = ""
    attention: str = ""
    kernels: str = ""
    policies: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        """`fused` if any layer is, else `reference`."""
        return "fused" if self.fused or self.partly else "reference"

    def __str__(self) -> str:
        lines = [f"fused engine: {len(self.fused) + len(self.partly)} of {self.num_layers} layers ({self.family})"]
        if self.fused or self.partly:
            for name in ("weights", "adapters", "attention", "kernels"):
                lines.append(f"  {name:<10} {getattr(self, name)}")
            lines += [f"  {'policy':<10} {text}" for text in self.policies]
        for what, layers in (("partly", self.partly), ("reference", self.reference)):
            for reason, numbers in _by_reason(layers).items():
                lines.append(f"  {what:<10} layers {_ranges(numbers)}: {reason}")
        return "\n".join(lines)


def fuse(
    model: nn.Module,
    policy: LayerPolicy | Sequence[LayerPolicy] | None = None,
    dtype: torch.dtype | None = None,
    report: Callable[[str], object] = print,
) -> FusePlan:
    """Make `model` (a transformers causal LM, with or without PEFT adapters) run fused decoder layers; returns the plan.

    Works on the instance, whatever trains it. `policy` says what layers keep for the backward: one for all, or one for
    each (default: everything, or the layer's input alone where gradient checkpointing is enabled). `dtype` is the type of the
    matrix products (default: that of the base weights; fp32 weights under autocast want autocast's). The plan is also given
    to `report` as text. A layer that does not fit runs as before, and the plan says why. Base weights must be bf16, fp16,
    fp32 or bitsandbytes 4-bit. What comes later is seen: other adapters, moved weights; while a module inside a layer has
    hooks or a forward of its own, forwards go to the model's own layers, with a warning. Raises ValueError for a model
    without decoder layers, one that is fused already, or a wrong number of policies; nothing has changed then.
    """
    decoder, layers = _decoder(model), _layers(model)
    if layers is None:
        raise ValueError(f"{why_not_fused(model)[0]}; fuse takes a transformers causal LM")
    if any(isinstance(layer, FusedLayer) for layer in layers):
        raise ValueError("this model is fused already; call unfuse(model) first")
    if policy is None:
        policies: Sequence[LayerPolicy] = [_present_policy(layer) for layer in layers]
    else:
        policies = [policy] * len(layers) if isinstance(policy, LayerPolicy) else policy
    if len(policies) != len(layers):
        raise ValueError(f"{len(policies)} policies for {len(layers)} layers: give one for each, or one for all")
    engine = Engine(decoder)
    partly: dict[int, str] = {}
    reference: dict[int, str] = {}
    fused: dict[int, FusedLayer] = {}
    for number, layer in enumerate(layers):
        spec = _fitting_spec(layer)
        if isinstance(spec, str):
            reference[number] = spec
            continue
        if len(spec.halves) == 1:
            partly[number] = spec.note
        compute = dtype or _weight_type(layer, spec)
        fused[number] = FusedLayer(layer, spec, engine, policies[number], number, compute)
    for number, layer in fused.items():
        layers[number] = layer
        layer.stack_weights()
    engine.install(layers)
    _fuse_last_norm(decoder)
    plan = _plan(engine, layers, partly, reference)
    report(str(plan))
    return plan


def unfuse(model: nn.Module) -> None:
    """Put the model's own layers back. Nothing happens to a model that is not fused."""
    decoder = _decoder(model)
    for number, layer in enumerate(list(_layers(model) or ())):
        if isinstance(layer, FusedLayer):
            for group in layer.groups:
                group.unstack_weights()
            decoder.layers[number] = layer.original
            layer.original.training = layer.training
            layer.engine.remove()
    if isinstance(getattr(decoder, "norm", None), FusedNorm):
        weight = decoder.norm.weight
        decoder.norm = decoder.norm.original
        decoder.norm.weight = weight


def _fuse_last_norm(decoder: Any) -> None:
    """The decoder's last norm, where it is of the kind that the layers have and holds its weight itself."""
    layer = next((layer for layer in decoder.layers if isinstance(layer, FusedLayer)), None)
    last = getattr(decoder, "norm", None)
    if layer is None or last is None or "weight" not in last._parameters:  # PEFT's modules_to_save wraps it
        return
    if type(last) is type(layer.halves[0].norm.module):
        norm = Norm.of(decoder, "norm", layer.spec.norm_offset)
        assert norm is not None
        decoder.norm = FusedNorm(last, norm)
        # Its own weight from now on: whoever shards or replaces it does so in the module that is in the tree.
        decoder.norm.norm = replace(norm, module=decoder.norm)


def _present_policy(layer: nn.Module) -> LayerPolicy:
    """What transformers' gradient checkpointing makes a layer keep now."""
    return RECOMPUTE_ALL if getattr(layer, "gradient_checkpointing", False) else LayerPolicy()


def set_policies(model: nn.Module, policies: Sequence[LayerPolicy]) -> None:
    """Give each fused layer of `model` its policy, by layer number."""
    for layer in _layers(model) or ():
        if isinstance(layer, FusedLayer):
            layer.policy = policies[layer.number]


def why_not_fused(model: nn.Module) -> list[str | None]:
    """For each decoder layer why it cannot be fused, None where it can; one reason for a model without such layers."""
    layers = _layers(model)
    if layers is None:
        return [f"{type(_base(model)).__name__} has no list of decoder layers"]
    specs = [_fitting_spec(layer) for layer in layers]
    return [spec if isinstance(spec, str) else None for spec in specs]


def engine_of(model: nn.Module) -> Engine | None:
    """The engine of a fused model; None for a model that is not fused."""
    return next((layer.engine for layer in _layers(model) or () if isinstance(layer, FusedLayer)), None)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _decoder(model: Any) -> Any:
    base = _base(model)
    return base.get_decoder() if hasattr(base, "get_decoder") else base


def _layers(model: Any) -> nn.ModuleList | None:
    """The decoder's layers; None for a model that keeps them in another way (GPT-2)."""
    layers = getattr(_decoder(model), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None


def _fitting_spec(layer: nn.Module) -> LayerSpec | str:
    """The layer's spec if all of its fused halves fit, else the reason why not."""
    spec = layer_spec(layer)
    if isinstance(spec, str):
        return spec
    for names in _projections(spec):
        for name in names:
            if reason := why_not(layer.get_submodule(name)):
                return reason
    if any(_has_own_call(module) for module in layer.modules()):
        return OWN_CALL
    if "attention" in spec.halves:
        attention = layer.get_submodule(spec.o.rpartition(".")[0])
        if attention.attention_dropout:
            return "it has dropout on attention weights"
        if not attention.is_causal:
            return "its attention is not causal"
    if getattr(getattr(layer, "config", None), "resid_pdrop", 0.0):
        return "it has dropout on the residual stream"
    if "mlp" in spec.halves:
        config: Any = layer.get_submodule(spec.down.rpartition(".")[0]).config
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        if name not in ACTIVATIONS:
            return f"its activation is {name}"
    return spec


def _projections(spec: LayerSpec) -> list[tuple[str, ...]]:
    """The names in each linear group, in the order of `FusedLayer.groups`."""
    attention = [spec.qkv, (spec.o,)] if "attention" in spec.halves else []
    return attention + ([spec.gate_up, (spec.down,)] if "mlp" in spec.halves else [])


OWN_CALL = "a module of it has hooks or a forward of its own, which a fused layer would not call"


def _has_own_call(module: nn.Module) -> bool:
    """Whether somebody's hook waits for its forward or backward, or its forward was replaced (Accelerate's device maps).

    transformers' own hooks, which record outputs, do not count.
    """
    recorder = "transformers.utils.output_capturing"
    hooks = (hook for found in _calls(module)[:-1] for hook in found.values())
    return "forward" in vars(module) or any(getattr(hook, "__module__", None) != recorder for hook in hooks)


def _calls(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """The dictionaries that hold a module's hooks, and last that of its attributes."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return before, after, module._backward_pre_hooks, module._backward_hooks, vars(module)


class Engine:
    """What the fused layers of one model share: the sequences of the running forward, and the packing of adapters."""

    def __init__(self, decoder: Any):
        self.decoder = decoder
        self.layout: SequenceLayout | None = None
        self.given_layout: SequenceLayout | None = None
        self.last_run: LayerRun | None = None
        self.all_fused = self.all_attend = False
        self.sinks: list[Sink] = []
        self._bypassed = self._warned = False
        self._away: dict[int, FusedLayer] = {}
        self._handles: list[Any] = []
        self._table: PackTable | None = None
        self._tables: dict[tuple[int, ...], tuple[list[GroupState], PackTable]] = {}

    def install(self, layers: nn.ModuleList) -> None:
        """Hook into the decoder's forward, now that these are its layers."""
        fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
        self.all_attend = len(fused) == len(layers) and all(layer.attention is not None for layer in fused)
        self.all_fused = self.all_attend and all(layer.mlp_half is not None for layer in fused)
        self._handles.append(self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles.append(self.decoder.register_forward_hook(self._after_forward, always_call=True))

    def remove(self) -> None:
        """Take the hook out again."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Run the model's own layers and last norm for a while."""
        norm = getattr(self.decoder, "norm", None)
        self._bypassed = True
        if isinstance(norm, FusedNorm):
            self.decoder.norm = norm.original
        try:
            yield
        finally:
            self._bypassed = False
            if isinstance(norm, FusedNorm):
                self.decoder.norm = norm

    def _before_forward(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find out how the tokens are divided into sequences; with a cache, leave the forward to the model's own layers."""
        given, self.given_layout, self.layout, self.last_run = self.given_layout, None, None, None
        if any(kwargs.get(name, getattr(decoder.config, name, False)) for name in RECORDED):
            for number, layer in enumerate(decoder.layers):
                if isinstance(layer, FusedLayer):
                    self._away[number] = layer
                    decoder.layers[number] = layer.original
                    layer.original.training = layer.training
            return args, kwargs
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = decoder.config.use_cache and not decoder.training
        if kwargs.get("past_key_values") is not None or use_cache or self._bypassed or self._has_own_calls():
            return args, kwargs
        ids = kwargs.get("input_ids", args[0] if args else None)
        shaped = ids if ids is not None else kwargs.get("inputs_embeds")
        if shaped is None:
            return args, kwargs
        self.layout = given or _foreign_layout(shaped.shape[0], shaped.shape[1], kwargs)
        kwargs = {**kwargs, "use_cache": False}
        if self.layout is not None:
            if self.all_attend:
                # A four-dimensional mask is passed on as it is: none is built, and fused layers look at none.
                kwargs["attention_mask"] = _NoMask.like(shaped, decoder.config)
            self._pack()
        return args, kwargs

    def _after_forward(self, decoder: Any, args: Any, output: Any) -> None:
        """Put the fused layers back, where the model's own stood in for them."""
        while self._away:
            number, layer = self._away.popitem()
            decoder.layers[number] = layer

    def _has_own_calls(self) -> bool:
        """Whether a module inside a fused layer has come to have hooks or a forward of its own. Warns once."""
        numbers = [layer.number for layer in self._layers() if layer.has_own_calls()]
        if numbers and not self._warned:
            self._warned = True
            warnings.warn(f"layers {_ranges(numbers)}: {OWN_CALL}; the model's own layers run", stacklevel=2)
        return bool(numbers)

    def _layers(self) -> list[FusedLayer]:
        return [layer for layer in self.decoder.layers if isinstance(layer, FusedLayer)]

    def _pack(self) -> None:
        """Cast the adapters of all layers into their operands, in one launch.

        There is a table for each choice of adapters, and it stays: a CUDA graph may read it.
        """
        layers = self._layers()
        self._table = None
        if any(group.sharded for layer in layers for group in layer.groups[:1]):
            return  # each layer packs its own when they are gathered
        states: list[GroupState] = [state for layer in layers for state in layer.refresh() if state.rank]
        if not states:
            return
        key = tuple(map(id, states))
        found = self._tables.get(key)
        if found is None or not found[1].valid():
            for state in states:
                state.clear()
            table = PackTable([entry for state in states for entry in state.entries])
            still = {k: v for k, v in self._tables.items() if all(state.group.holds(state) for state in v[0])}
            self._tables = {**still, key: (states, table)}
            found = states, table
        self._table = found[1]
        self._table.run()

    @property
    def capturable(self) -> bool:
        """Whether a forward and backward can be a CUDA graph: all layers are fused and draw no random numbers."""
        if not self.all_fused:
            return False
        return not any(state.dropout for layer in self._layers() for state in layer.states()) and all(
            half.attends_in_kernels for layer in self._layers() for half in layer.halves
        )

    @property
    def packs_all(self) -> bool:
        """Whether the adapters of all layers were packed at the start of this forward."""
        return self._table is not None


class _NoMask:
    """The mask that says: build none."""

    @staticmethod
    def like(tensor: torch.Tensor, config: Any) -> Any:
        """An empty 4-D tensor; for models with several kinds of layers a dictionary of it."""
        mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=tensor.device)
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds:
            return mask
        return dict.fromkeys(kinds, mask)


def _foreign_layout(rows: int, length: int, kwargs: dict[str, Any]) -> SequenceLayout | None:
    """The sequences of a forward that somebody else calls; None if they cannot be told, or need another mask.

    transformers' flash-attention arguments say it all. A mask of right-padded rows is no mask at all under causal
    attention. Positions that do not go on by one inside a row without a mask begin another document, as in transformers.
    Looking at a mask or at positions waits for the device.
    """
    bounds, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if bounds is not None and longest is not None:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        return SequenceLayout.packed(bounds.to(torch.int32), lengths, length)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        right_padded = bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool(mask[:, 0].all())
        return SequenceLayout.dense(rows, length) if right_padded else None
    if mask is not None:
        return None
    if positions is not None:
        begins = torch.ones(rows, length, dtype=torch.bool, device=positions.device)
        begins[:, 1:] = positions[:, 1:] - positions[:, :-1] != 1
        starts = begins.reshape(-1).nonzero().reshape(-1).to(torch.int32)
        if starts.numel() > rows:
            bounds = torch.cat((starts, starts.new_tensor([rows * length])))
            return SequenceLayout.packed(bounds, (bounds[1:] - bounds[:-1]).tolist(), rows * length)
    return SequenceLayout.dense(rows, length)


class FusedLayer(nn.Module):
    """A decoder layer that runs `LayerFunction`. Its submodules are the original's, under the original's names.

    What it has no code for (generation with a cache, masks that are not causal, other attributes) goes to the original.
    """

    def __init__(
        self,
        original: nn.Module,
        spec: LayerSpec,
        engine: Engine,
        policy: LayerPolicy,
        number: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        # The same dictionary: whoever wraps a module in either wraps it in both.
        object.__setattr__(self, "_modules", original._modules)
        self.__dict__["original"] = original  # not a submodule: its parameters are this module's already
        self.engine, self.policy, self.number, self.spec = engine, policy, number, spec
        self._policy_before = LayerPolicy()  # what `gradient_checkpointing_disable` goes back to
        self.training = original.training
        self.attention = AttentionHalf(original, spec, dtype) if "attention" in spec.halves else None
        self.mlp_half = MlpHalf(original, spec, dtype) if "mlp" in spec.halves else None
        places = [[name.rpartition(".") for name in names] for names in _projections(spec)]
        self._places = [[(original.get_submodule(parent)._modules, name) for parent, _, name in p] for p in places]
        norms = [name.rpartition(".") for half in self.halves for name in half.norm_names(spec)]
        siblings = [(original.get_submodule(parent)._modules, name) for parent, _, name in norms]
        self._norms = [(found, name, found[name]) for found, name in siblings]
        self._look_for_calls()

    def stack_weights(self) -> None:
        """Move base weights into the operands, where they may live there."""
        for group in self.groups:
            group.stack_weights()

    def _look_for_calls(self) -> None:
        """Remember where hooks of the modules inside would be; those of an adapter come and go."""
        found = [_calls(module) for name, module in self.named_modules() if name and ".lora_" not in name]
        self._hooks = [hooks for calls in found for hooks in calls[:-1]]
        self._attributes = [calls[-1] for calls in found]

    def has_own_calls(self) -> bool:
        """Whether a module inside has hooks or a forward of its own: asked in every forward, hence the plain lookups."""
        self._follow()
        if not any(self._hooks) and not any("forward" in attributes for attributes in self._attributes):
            return False
        return any(_has_own_call(module) for module in self.modules() if module is not self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.__dict__["original"], name)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether transformers' `gradient_checkpointing_enable` was called: the policy that keeps the input alone."""
        return self.policy.keep == RECOMPUTE_ALL.keep

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        if value and not self.gradient_checkpointing:
            self._policy_before, self.policy = self.policy, RECOMPUTE_ALL
        elif not value and self.gradient_checkpointing:
            self.policy = self._policy_before
        original = self.__dict__["original"]  # it takes over now and then
        if hasattr(original, "gradient_checkpointing"):
            original.gradient_checkpointing = value
            original._gradient_checkpointing_func = self.__dict__.get("_gradient_checkpointing_func")

    @property
    def halves(self) -> list[AttentionHalf | MlpHalf]:
        """The fused halves."""
        return [half for half in (self.attention, self.mlp_half) if half is not None]

    @property
    def groups(self) -> list[LinearGroup]:
        """The linear groups of its halves."""
        return [group for half in self.halves for group in half.groups]

    def states(self) -> list[GroupState]:
        """The groups with the adapters that are active now. Raises ValueError for what came later and does not fit."""
        self._follow()
        return [group.state() for group in self.groups]

    def _follow(self) -> None:
        """Take the modules that are in the model now, where PEFT has wrapped or unwrapped some."""
        for siblings, name, norm in self._norms:
            if siblings[name] is not norm:
                raise ValueError(
                    f"layer {self.number} is fused, but now {name} is a {type(siblings[name]).__name__}: unfuse the model, "
                    "and fuse it again"
                )
        for group, places in zip(self.groups, self._places, strict=True):
            modules = [siblings[name] for siblings, name in places]
            if modules != group.modules:
                self._exchange(group, modules)

    def _exchange(self, group: LinearGroup, modules: list[Any]) -> None:
        for module in modules:
            if reason := why_not(module):
                raise ValueError(f"layer {self.number} is fused, but now {reason}: unfuse the model, and fuse it again")
        group.modules = modules
        group.stack_weights()  # with room for the new adapter
        self._look_for_calls()

    def refresh(self) -> list[GroupState]:
        """`states` for the forward that begins, which `has_own_calls` has looked at, and remember them."""
        self.__dict__["_current"] = current = [group.state() for group in self.groups]
        return current

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, S, D) as the original; `position_embeddings` are its rotations."""
        layout = self.engine.layout
        if layout is None:
            return self._original(hidden_states, *args, **kwargs)
        if self.attention is None:
            return self._with_own_attention(hidden_states, layout, *args, **kwargs)
        position_embeddings = kwargs.get("position_embeddings")
        if position_embeddings is None:
            position_embeddings = args[0]
        cos, sin = position_embeddings
        out = self._run(hidden_states, layout, cos.flatten(0, 1), sin.flatten(0, 1))
        return out if self.mlp_half is not None else self._with_own_mlp(out)

    def _original(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        original = self.__dict__["original"]
        original.training = self.training
        return original(*args, **kwargs)

    def _run(self, hidden: torch.Tensor, layout: SequenceLayout, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        states = self.__dict__.pop("_current", None) or self.states()
        if not self.engine.packs_all:
            for state in states:
                state.pack()
        seed, rows = self._drawn() if any(state.dropout for state in states) else (0, None)
        inputs = Inputs(layout, cos, sin, seed, LAYER_STREAMS * self.number, rows)
        policy = self.policy if torch.is_grad_enabled() else replace(self.policy, keep=frozenset(), offload_input=False)
        run = LayerRun(self.attention, self.mlp_half, states, inputs, policy, self.engine.last_run, self.engine.sinks)
        self.engine.last_run = run
        out: torch.Tensor = LayerFunction.apply(hidden, run, *run.parameters)
        return out

    def _drawn(self) -> tuple[int, torch.Tensor | None]:
        """What dropout draws its masks from: the seed, and the numbers of the tokens' rows where the forward has them."""
        source = mask_source(self.engine.decoder)
        if source is not None and source.draw is not None:
            return source.draw.seed, source.draw.rows
        # Drawn on the CPU, where nothing waits for the GPU and a checkpoint holds the generator's state.
        return int(torch.randint(2**31, ())), None

    def _with_own_mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """The MLP half with the model's own modules (experts)."""
        out: torch.Tensor = hidden + self.get_submodule("mlp")(self.get_submodule(self.spec.mlp_norm)(hidden))
        return out

    def _with_own_attention(
        self, hidden: torch.Tensor, layout: SequenceLayout, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The attention half with the model's own modules, then the fused MLP."""
        normed = self.get_submodule(self.spec.attention_norm)(hidden)
        attended, _ = self.get_submodule("self_attn")(hidden_states=normed, **kwargs)
        none = hidden.new_empty(0, 0)
        return self._run(hidden + attended, layout, none, none)


def _weight_type(layer: nn.Module, spec: LayerSpec) -> torch.dtype:
    """The type that a layer's base weights are stored in; of 4-bit ones, that they are computed in."""
    base: Any = base_layer(layer.get_submodule(spec.o if "attention" in spec.halves else spec.down))
    state = getattr(base.weight, "quant_state", None)
    dtype: torch.dtype = base.weight.dtype if state is None else base.compute_dtype or state.dtype
    return dtype


def _plan(engine: Engine, layers: nn.ModuleList, partly: dict[int, str], reference: dict[int, str]) -> FusePlan:
    fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
    if not fused:
        names = sorted({type(layer).__name__ for layer in layers})
        return FusePlan(", ".join(names), len(layers), (), {}, reference)
    first = fused[0]
    group = first.groups[0]
    device = group.bases[0].weight.device
    sample = torch.empty(0, dtype=group.dtype, device=device)
    states = [state for layer in fused for state in layer.states()]
    kinds = Counter(
        "4-bit, dequantized into the operand" if hasattr(base.weight, "quant_state") else
        "in the operand" if state.stacked else f"{str(base.weight.dtype).removeprefix('torch.')}, cast into the operand"
        for state in states
        for base in state.group.bases
    )  # fmt: skip
    ranks = sorted({lora.rank for state in states for lora in state.loras if lora})
    adapted = sum(lora is not None for state in states for lora in state.loras)
    folded = "" if all(state.folded for state in states if state.rank) else ", some added by cuBLAS"
    attention = "the model's own"
    if first.attention is not None:
        half = first.attention
        attention = "; ".join(
            f"{kind}: {describe_backend(device, group.dtype, half.d, kind, half.spec)}" for kind in ("dense", "packed")
        )
    return FusePlan(
        first.spec.family,
        len(layers),
        tuple(layer.number for layer in fused if layer.number not in partly),
        partly,
        reference,
        dtype=str(group.dtype).removeprefix("torch."),
        weights=", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        adapters=f"{adapted} LoRA projections, rank {', '.join(map(str, ranks))}{folded}" if adapted else "none",
        attention=attention,
        kernels="Triton" if use_triton(sample) else f"PyTorch reference on {device.type}",
        policies=tuple(
            f"layers {_ranges(numbers)}: {text}"
            for text, numbers in _by_reason({layer.number: describe_policy(layer.policy) for layer in fused}).items()
        ),
    )


def describe_policy(policy: LayerPolicy) -> str:
    """A policy in words."""
    gone = [name for name in ("qkv", "attention", "middle", "gate_up") if name not in policy.keep]
    text = f"recompute {', '.join(gone)}" if gone else "keep all"
    if policy.offload_input:
        text += ", input in host memory"
    return text + (f", MLP {policy.mlp_rows} tokens at a time" if policy.mlp_rows and "gate_up" in gone else "")


def _by_reason(reasons: dict[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, reason in reasons.items():
        found.setdefault(reason, []).append(number)
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 0-2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
