"""A decoder layer with a hand-written forward and backward.

    h' = h + [norm](attention(norm(h)) W_o)        the attention half
    h" = h' + [norm](glu(norm(h') W_gu) W_down)    the MLP half

([norm] only in families that norm a branch's output.) Each half's forward and backward are written out below in the order
in which they run; products go through `LinearGroup`, everything between them through one kernel each. What the forward
keeps is the layer's policy; the backward computes the rest again with the same code, so the gradient does not depend on it.

Legend: T tokens (rows of all sequences, flattened), D hidden, F intermediate, H heads of queries, G of keys and values,
d head dimension, N out features of a group, R its adapters' slots together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tunesmith.kernels.attention import (
    AttentionSpec,
    SequenceLayout,
    attention_backward,
    attention_forward,
    choose_backend,
)
from tunesmith.kernels.attention_backends import Kind
from tunesmith.kernels.glu import Activation, glu, glu_backward
from tunesmith.kernels.qkv import qkv_epilogue, qkv_epilogue_backward
from tunesmith.kernels.residual import add_low_rank
from tunesmith.kernels.rms_norm import rms_norm, rms_norm_backward
from tunesmith.models.families import LayerSpec
from tunesmith.models.linear_group import Gradients, GroupState, LinearGroup, Noise, Sink
from tunesmith.models.offload import HostCopy
from tunesmith.models.row_dropout import DOWN_STREAM, GATE_UP_STREAM, O_STREAM, QKV_STREAM
from tunesmith.types import LayerPolicy

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""transformers' names (`hidden_act`, `hidden_activation`) of the activations that the GLU kernel has."""


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm module of the model: y = x / rms(x) · (offset + weight)."""

    module: nn.Module
    eps: float
    offset: float

    @classmethod
    def of(cls, layer: nn.Module, name: str | None, offset: float) -> Norm | None:
        """The norm called `name` in `layer`; None for None."""
        if name is None:
            return None
        module = layer.get_submodule(name)
        eps = getattr(module, "variance_epsilon", None)
        return cls(module, float(module.eps if eps is None else eps), offset)  # type: ignore[arg-type]

    @property
    def weight(self) -> nn.Parameter:
        """(D,)."""
        return cast(nn.Parameter, self.module.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """y and 1 / rms(x)."""
        return rms_norm(x, self.weight.detach(), self.eps, self.offset)

    def backward(
        self,
        grads: Gradients,
        dy: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor,
        residual: torch.Tensor | None,
        out: torch.Tensor | None = None,
        normed_out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """dx (+ residual), into `out` if given; y again into `normed_out` if given. Adds the weight's gradient."""
        trained = self.weight.requires_grad
        dx, dweight = rms_norm_backward(
            dy,
            x,
            rstd,
            self.weight.detach(),
            self.offset,
            residual_TD=residual,
            out=out,
            normed_out=normed_out,
            weight_grad=trained,
        )
        if dweight is not None and trained:
            grads.add(self.weight, dweight)
        return dx


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a forward of the whole model gives to each of its layers.

    `cos` and `sin` (P, rotary) hold the rotation of row t at t % P. Dropout draws from `seed`, in streams from `stream` on,
    and numbers the tokens by their place in the batch, or as `rows` (T,) does.
    """

    layout: SequenceLayout
    cos: torch.Tensor
    sin: torch.Tensor
    seed: int
    stream: int = 0
    rows: torch.Tensor | None = None

    def noise(self, stream: int, piece: slice) -> Noise:
        """Dropout of a group's input, its projections' streams from `stream` of the layer on, for a piece of the tokens."""
        if self.rows is None:
            return Noise(self.seed, self.stream + stream, piece.start)
        return Noise(self.seed, self.stream + stream, rows=self.rows[piece])


Kept = dict[str, Any]
"""A forward's tensors by name, for the backward; those of the policy, and small ones always."""


class AttentionHalf:
    """h + [norm](attention(norm(h)) W_o), of one layer of a model."""

    def __init__(self, layer: nn.Module, spec: LayerSpec, dtype: torch.dtype):
        attention: Any = layer.get_submodule(spec.o.rpartition(".")[0])
        config = attention.config
        self.qkv = LinearGroup([layer.get_submodule(name) for name in spec.qkv], dtype, adds_bias=False)
        self.o = LinearGroup([layer.get_submodule(spec.o)], dtype)
        self.d: int = attention.head_dim
        self.H: int = self.o.num_in // self.d
        self.G: int = (self.qkv.num_out // self.d - self.H) // 2
        norm = Norm.of(layer, spec.attention_norm, spec.norm_offset)
        assert norm is not None
        self.norm = norm
        self.post_norm = Norm.of(layer, spec.attention_post_norm, spec.norm_offset)
        self.q_norm = Norm.of(layer, spec.q_norm, spec.norm_offset)
        self.k_norm = Norm.of(layer, spec.k_norm, spec.norm_offset)
        # Phi-3 and Mistral take the window from their config, the others from the layer.
        window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        self.spec = AttentionSpec(
            scale=attention.scaling,
            window=window,
            softcap=getattr(attention, "attn_logit_softcapping", None),
        )

    @property
    def groups(self) -> tuple[LinearGroup, LinearGroup]:
        """Its linear groups."""
        return self.qkv, self.o

    @property
    def attends_in_kernels(self) -> bool:
        """Whether attention is a library's kernel, with packed rows too, and not PyTorch code that builds a mask."""
        device = self.qkv.bases[0].weight.device
        kinds: tuple[Kind, ...] = ("dense", "packed")
        backends = {choose_backend(device, self.qkv.dtype, self.d, kind, self.spec) for kind in kinds}
        return backends.isdisjoint({"flex", "math"})

    @property
    def norms(self) -> list[Norm]:
        """Its norms."""
        return [norm for norm in (self.norm, self.post_norm, self.q_norm, self.k_norm) if norm is not None]

    @staticmethod
    def norm_names(spec: LayerSpec) -> list[str]:
        """Where they are in the layer."""
        names = (spec.attention_norm, spec.attention_post_norm, spec.q_norm, spec.k_norm)
        return [name for name in names if name is not None]


class MlpHalf:
    """h + [norm](act(x W_gate) · (x W_up) W_down), x = norm(h), of one layer of a model."""

    def __init__(self, layer: nn.Module, spec: LayerSpec, dtype: torch.dtype):
        config: Any = layer.get_submodule(spec.down.rpartition(".")[0]).config
        self.gate_up = LinearGroup([layer.get_submodule(name) for name in spec.gate_up], dtype)
        self.down = LinearGroup([layer.get_submodule(spec.down)], dtype)
        self.F = self.down.num_in
        norm = Norm.of(layer, spec.mlp_norm, spec.norm_offset)
        assert norm is not None
        self.norm = norm
        self.post_norm = Norm.of(layer, spec.mlp_post_norm, spec.norm_offset)
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        self.activation: Activation = ACTIVATIONS[name]

    @property
    def groups(self) -> tuple[LinearGroup, LinearGroup]:
        """Its linear groups."""
        return self.gate_up, self.down

    @property
    def attends_in_kernels(self) -> bool:
        """It does not attend."""
        return True

    @property
    def norms(self) -> list[Norm]:
        """Its norms."""
        return [norm for norm in (self.norm, self.post_norm) if norm is not None]

    @staticmethod
    def norm_names(spec: LayerSpec) -> list[str]:
        """Where they are in the layer."""
        return [name for name in (spec.mlp_norm, spec.mlp_post_norm) if name is not None]


class AttentionRun:
    """One forward and backward of an attention half."""

    def __init__(self, half: AttentionHalf, states: Sequence[GroupState], inputs: Inputs, policy: LayerPolicy):
        self.half, self.inputs, self.policy = half, inputs, policy
        self.qkv, self.o = states
        whole = slice(0, None)
        self.qkv_noise, self.o_noise = inputs.noise(QKV_STREAM, whole), inputs.noise(O_STREAM, whole)

    def forward(self, h: torch.Tensor, kept: Kept) -> torch.Tensor:
        """h' (T, D)."""
        projected = self.project(h, kept)
        attended, saved = self.attend(projected)
        self._keep(kept, "qkv", projected)
        self._keep(kept, "attention", (attended, saved))
        del projected, saved
        return self.merge(h, attended, kept)

    def _keep(self, kept: Kept, name: Literal["qkv", "attention", "attention_output"], value: Any) -> None:
        if name in self.policy.keep:
            kept[name] = value

    def project(self, h: torch.Tensor, kept: Kept) -> torch.Tensor:
        """[q | k | v | S] (T, N + R): rotated already, or raw where queries and keys are normed."""
        x, kept["attention_rstd"] = self.half.norm.forward(h)
        buffer = self.qkv.forward(x.to(self.half.qkv.dtype), self.qkv_noise)
        if self.half.q_norm is None:
            self._epilogue(buffer, None)
        return buffer

    def _epilogue(self, buffer: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        half = self.half
        return qkv_epilogue(
            buffer,
            self.qkv.b if self.qkv.folded else None,
            self.inputs.cos,
            self.inputs.sin,
            half.H,
            half.G,
            half.d,
            slot=self.qkv.slot,
            out=out,
            **self._projection_options(),
        )

    def _projection_options(self) -> dict[str, Any]:
        half = self.half
        if half.q_norm is None or half.k_norm is None:
            return {"num_slots": self.qkv.num_slots, "bias_N": self.qkv.bias}
        return {
            "num_slots": self.qkv.num_slots,
            "bias_N": self.qkv.bias,
            "q_norm_d": half.q_norm.weight.detach(),
            "k_norm_d": half.k_norm.weight.detach(),
            "eps": half.q_norm.eps,
            "norm_offset": half.q_norm.offset,
        }

    def _heads(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (T, H, d), k and v (T, G, d) as attention reads them: views, or new ones with a qk-norm."""
        half = self.half
        if half.q_norm is not None:
            projected = self._epilogue(projected, projected.new_empty(len(projected), self.qkv.num_out))
        sizes = (half.H * half.d, half.G * half.d, half.G * half.d)
        q, k, v = projected[:, : self.qkv.num_out].split(sizes, 1)
        return q.unflatten(1, (half.H, half.d)), k.unflatten(1, (half.G, half.d)), v.unflatten(1, (half.G, half.d))

    def attend(self, projected: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Attention's result (T, H d) and what its backward wants."""
        o, saved = attention_forward(*self._heads(projected), self.inputs.layout, self.half.spec)
        return o.flatten(1), saved

    def merge(self, h: torch.Tensor, attended: torch.Tensor, kept: Kept) -> torch.Tensor:
        """h' = h + [norm](attended W_o)."""
        buffer = self.o.forward(attended, self.o_noise)
        return _add_branch(h, buffer, self.o, self.half.post_norm, kept, "attention_output", "o_s", self.policy)

    def room(self, g: torch.Tensor) -> torch.Tensor:
        """A buffer (T, D + R_o) for [dY | dS] of the output projection."""
        return torch.empty(len(g), self.o.num_out + self.o.rank, dtype=self.half.o.dtype, device=g.device)

    def backward(
        self,
        g: torch.Tensor,
        h: torch.Tensor,
        kept: Kept,
        grads: Gradients,
        needs_input: bool,
        room: torch.Tensor,
    ) -> torch.Tensor | None:
        """dh of g = dh' (T, D), which may lie in the left part of `room` already. Empties `kept`."""
        half = self.half
        if "qkv" not in kept:
            kept["qkv"] = self.project(h, kept)
        projected = kept.pop("qkv")
        attended, saved = kept.pop("attention") if "attention" in kept else self.attend(projected)

        output_again = partial(self.o.forward, attended, self.o_noise)
        dy, ds = _branch_gradient(g, self.o, half.post_norm, kept, "attention_output", grads, output_again, room)
        del output_again
        d_attended = self.o.backward_input(room, self.o_noise)
        self.o.weight_gradients(grads, dy, ds, attended, kept.pop("o_s", None), self.o_noise)
        del dy, ds, room

        q, k, v = self._heads(projected)
        dq, dk, dv = attention_backward(
            d_attended.unflatten(1, (half.H, half.d)),
            q,
            k,
            v,
            attended.unflatten(1, (half.H, half.d)),
            saved,
            self.inputs.layout,
            half.spec,
        )
        del q, k, v, d_attended, attended, saved
        width = self.qkv.num_out
        d_projected = torch.empty_like(projected)
        dq_norm, dk_norm = qkv_epilogue_backward(
            dq,
            dk,
            dv,
            d_projected,
            self.qkv.b if self.qkv.folded else None,
            self.inputs.cos,
            self.inputs.sin,
            half.H,
            half.G,
            half.d,
            slot=self.qkv.slot,
            raw_TNR=None if half.q_norm is None else projected,
            norm_grads=half.q_norm is not None and half.q_norm.weight.requires_grad,
            **self._projection_options(),
        )
        del dq, dk, dv
        for norm, gradient in ((half.q_norm, dq_norm), (half.k_norm, dk_norm)):
            if norm is not None and gradient is not None:
                grads.add(norm.weight, gradient)
        self.qkv.write_ds(d_projected[:, :width], d_projected[:, width:])
        s = projected[:, width:]
        rstd = kept.pop("attention_rstd")
        x = _input_room(self.qkv, h)
        dh = None
        if needs_input or half.norm.weight.requires_grad:
            dx = self.qkv.backward_input(d_projected, self.qkv_noise)
            dh = half.norm.backward(grads, dx, h, rstd, g, normed_out=x)
        elif x is not None:
            x = half.norm.forward(h)[0]
        self.qkv.weight_gradients(
            grads, d_projected[:, :width], d_projected[:, width:], _cast(x, half.qkv.dtype), s, self.qkv_noise
        )
        return dh


class MlpRun:
    """One forward and backward of an MLP half, over some rows at a time if the policy says so."""

    def __init__(self, half: MlpHalf, states: Sequence[GroupState], inputs: Inputs, policy: LayerPolicy):
        self.half, self.inputs, self.policy = half, inputs, policy
        self.gate_up, self.down = states

    def _pieces(self, tokens: int) -> list[slice]:
        rows = self.policy.mlp_rows
        if rows is None or rows >= tokens or "gate_up" in self.policy.keep:
            return [slice(0, tokens)]
        return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]

    def _noise(self, piece: slice) -> tuple[Noise, Noise]:
        return self.inputs.noise(GATE_UP_STREAM, piece), self.inputs.noise(DOWN_STREAM, piece)

    def forward(self, h: torch.Tensor, kept: Kept) -> torch.Tensor:
        """h" (T, D)."""
        pieces = self._pieces(len(h))
        if len(pieces) == 1:
            return self._forward_piece(h, self._noise(pieces[0]), kept)
        out = torch.empty_like(h)
        with self.gate_up.held(), self.down.held():
            for piece, found in self._with_kept(pieces, kept):
                out[piece] = self._forward_piece(h[piece], self._noise(piece), found)
        return out

    @staticmethod
    def _with_kept(pieces: list[slice], kept: Kept) -> list[tuple[slice, Kept]]:
        """Each piece with what it keeps."""
        return [(piece, kept.setdefault(f"mlp {number}", {})) for number, piece in enumerate(pieces)]

    def _forward_piece(self, h: torch.Tensor, noise: tuple[Noise, Noise], kept: Kept) -> torch.Tensor:
        buffer = self.project(h, noise[0], kept)
        act = self._act(buffer)
        if "gate_up" in self.policy.keep:
            kept["gate_up"] = buffer
        del buffer
        y = self.down.forward(act, noise[1])
        del act
        return _add_branch(h, y, self.down, self.half.post_norm, kept, "mlp_output", "down_s", self.policy)

    def project(self, h: torch.Tensor, noise: Noise, kept: Kept) -> torch.Tensor:
        """[gate | up | S] (T, 2F + R)."""
        x, kept["mlp_rstd"] = self.half.norm.forward(h)
        return self.gate_up.forward(x.to(self.half.gate_up.dtype), noise)

    def _act(self, buffer: torch.Tensor) -> torch.Tensor:
        b = self.gate_up.b if self.gate_up.folded else None
        return glu(buffer, b, self.half.F, self.gate_up.slot, self.gate_up.num_slots, self.half.activation)

    def backward(self, g: torch.Tensor, h: torch.Tensor, kept: Kept, grads: Gradients, out: torch.Tensor) -> None:
        """Write dh' of g = dh" (T, D) into `out` (T, D), any row stride. Empties `kept`."""
        pieces = self._pieces(len(h))
        if len(pieces) == 1:
            self._backward_piece(g, h, self._noise(pieces[0]), kept, grads, out)
            return
        grads.in_pieces = True
        with self.gate_up.held(), self.down.held():
            for piece, found in self._with_kept(pieces, kept):
                self._backward_piece(g[piece], h[piece], self._noise(piece), found, grads, out[piece])
                found.clear()
        grads.in_pieces = False

    def _backward_piece(
        self,
        g: torch.Tensor,
        h: torch.Tensor,
        noise: tuple[Noise, Noise],
        kept: Kept,
        grads: Gradients,
        out: torch.Tensor,
    ) -> None:
        half, gate_up, down = self.half, self.gate_up, self.down
        features, dtype = half.F, half.gate_up.dtype
        buffer = kept.pop("gate_up") if "gate_up" in kept else self.project(h, noise[0], kept)

        def output_again() -> torch.Tensor:
            return down.forward(self._act(buffer), noise[1])

        dy, ds_down = _branch_gradient(g, down, half.post_norm, kept, "mlp_output", grads, output_again)
        d_act = torch.mm(dy, down.operand(with_a=False))
        in_kernel = down.folded and not down.dropout
        if ds_down is not None and not in_kernel:
            down.add_input_low_rank(d_act, ds_down, noise[1])
        act = torch.empty_like(d_act) if down.trains_base or (down.rank and not in_kernel) else None
        s = buffer[:, 2 * features :].clone() if gate_up.rank and not gate_up.folded else None
        db, da_down = glu_backward(
            d_act,
            buffer,
            gate_up.b if gate_up.folded else None,
            features,
            gate_up.slot,
            gate_up.num_slots,
            half.activation,
            a_down=down.a if in_kernel else None,
            ds_down=ds_down if in_kernel else None,
            act_out=act,
        )
        del d_act
        d_gate_up, ds = buffer[:, : 2 * features], buffer[:, 2 * features :]
        if s is not None:
            gate_up.write_ds(d_gate_up, ds)
        down.weight_gradients(grads, dy, ds_down, act, kept.pop("down_s", None), noise[1], da=da_down)
        del dy, act
        dx = gate_up.backward_input(buffer, noise[0])
        x = _input_room(gate_up, h)
        half.norm.backward(grads, dx, h, kept.pop("mlp_rstd"), g, out=out, normed_out=x)
        del dx
        gate_up.weight_gradients(grads, d_gate_up, ds, _cast(x, dtype), s, noise[0], db=db)


def _add_branch(
    h: torch.Tensor,
    buffer: torch.Tensor,
    state: GroupState,
    post_norm: Norm | None,
    kept: Kept,
    output: Literal["attention_output", "mlp_output"],
    inner: str,
    policy: LayerPolicy,
) -> torch.Tensor:
    """h + [norm](Y + S Bᵀ) of a group's [Y | S], as a new tensor; keeps S, and the normed sum where there is a norm."""
    y, b = buffer[:, : state.num_out], state.b if state.folded else None
    s = buffer[:, state.num_out :] if state.rank else None
    if s is not None:
        kept[inner] = s.clone()
    if post_norm is None and h.dtype == y.dtype:
        return add_low_rank(h, y, s if state.folded else None, b)
    if b is not None:
        add_low_rank(None, y, s, b, out=y)
    if post_norm is not None:
        if output in policy.keep:
            kept[output] = y
        y, kept[f"{output}_rstd"] = post_norm.forward(y)
    return h + y


def _branch_gradient(
    g: torch.Tensor,
    state: GroupState,
    post_norm: Norm | None,
    kept: Kept,
    output: Literal["attention_output", "mlp_output"],
    grads: Gradients,
    again: Callable[[], torch.Tensor],
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dY (T, N) and dS (T, R) of a branch's last group, from g (T, N): through the branch's norm, if it has one.

    With `room` (T, N + R) they are its columns. `again` makes the group's [Y | S] once more, where a norm needs Y and it was
    not kept.
    """
    width, dtype = state.num_out, state.group.dtype
    dy = None if room is None else room[:, :width]
    if post_norm is not None:
        y, rstd = kept.pop(output, None), kept.pop(f"{output}_rstd", None)
        if y is None or rstd is None:
            buffer = again()
            y = buffer[:, :width]
            if state.folded:
                add_low_rank(None, y, buffer[:, width:], state.b, out=y)
            rstd = post_norm.forward(y)[1]
        dy = post_norm.backward(grads, g.to(dtype), y, rstd, None, out=dy)
    elif dy is None:
        dy = g.to(dtype)
    elif dy.data_ptr() != g.data_ptr():
        dy.copy_(g)
    if not state.rank:
        return dy, None
    ds = torch.empty(len(g), state.rank, dtype=dtype, device=g.device) if room is None else room[:, width:]
    state.write_ds(dy, ds)
    return dy, ds


def _input_room(state: GroupState, h: torch.Tensor) -> torch.Tensor | None:
    """Room for the group's normed input, if one of its gradients needs it."""
    needed = state.trains_base or any(lora is not None and lora.a.requires_grad for lora in state.loras)
    return torch.empty(h.shape, dtype=h.dtype, device=h.device) if needed else None


def _cast(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if x is None else x.to(dtype)


class LayerRun:
    """One forward of a layer, and its backward."""

    def __init__(
        self,
        attention: AttentionHalf | None,
        mlp: MlpHalf | None,
        states: Sequence[GroupState],
        inputs: Inputs,
        policy: LayerPolicy,
        previous: LayerRun | None,
        sinks: Sequence[Sink] = (),
    ):
        self.attention = AttentionRun(attention, states[:2], inputs, policy) if attention else None
        self.mlp = MlpRun(mlp, states[-2:], inputs, policy) if mlp else None
        self.policy = policy
        self.previous = previous
        self.sinks = sinks
        self.host: HostCopy | None = None
        norms = [norm.weight for half in (attention, mlp) if half for norm in half.norms if norm.weight.requires_grad]
        found = [*norms, *(parameter for state in states for parameter in state.trainable())]
        self.parameters: list[nn.Parameter] = list({id(parameter): parameter for parameter in found}.values())

    def forward(self, h: torch.Tensor, kept: Kept) -> torch.Tensor:
        """The layer's output (T, D) for h (T, D)."""
        if self.attention is None:
            assert self.mlp is not None
            return self.mlp.forward(h, kept)
        middle = self.attention.forward(h, kept)
        if self.mlp is None:
            return middle
        if "middle" in self.policy.keep:
            kept["middle"] = middle
        return self.mlp.forward(middle, kept)

    def backward(
        self, g: torch.Tensor, h: torch.Tensor, kept: Kept, needs_input: bool
    ) -> tuple[torch.Tensor | None, Gradients]:
        """dh and the gradients of `parameters`, of g = d(output). Empties `kept`."""
        grads = Gradients(self.sinks)
        if self.attention is None:
            assert self.mlp is not None
            dh = torch.empty_like(h)
            self.mlp.backward(g, h, kept, grads, dh)
            return dh, grads
        attention = self.attention
        room = attention.room(g)
        if self.mlp is not None:
            middle = kept.pop("middle") if "middle" in kept else self._middle_again(h, kept)
            # dh' goes beside the room for dS of the output projection, so that one product takes both. A norm of the
            # branch comes between them, and hidden states of another type than the products' have their own tensor.
            apart = attention.half.post_norm is not None or g.dtype != room.dtype
            middle_grad = torch.empty_like(h) if apart else room[:, : attention.o.num_out]
            self.mlp.backward(g, middle, kept, grads, middle_grad)
            del middle
            g = middle_grad
        return attention.backward(g, h, kept, grads, needs_input, room), grads

    def _middle_again(self, h: torch.Tensor, kept: Kept) -> torch.Tensor:
        """h' once more, from the first thing that was kept; what is computed on the way stays for attention's backward."""
        assert self.attention is not None
        if "qkv" not in kept:
            kept["qkv"] = self.attention.project(h, kept)
        if "attention" not in kept:
            kept["attention"] = self.attention.attend(kept["qkv"])
        return self.attention.merge(h, kept["attention"][0], kept)


class NormFunction(torch.autograd.Function):
    """An RMSNorm in the autograd graph: it keeps its input, and no copy of it in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, norm: Norm) -> torch.Tensor:
        """y as x, (..., D)."""
        rows = x.detach().flatten(0, -2)
        y, rstd = norm.forward(rows)
        ctx.norm, ctx.wants_weight = norm, weight.requires_grad
        ctx.save_for_backward(rows, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the weight."""
        rows, rstd = ctx.saved_tensors
        grads = Gradients()
        dx = ctx.norm.backward(grads, grad.reshape(rows.shape), rows, rstd, None)
        return dx.view(grad.shape), grads.of(ctx.norm.weight) if ctx.wants_weight else None, None


class FusedNorm(nn.Module):
    """A norm of the model that runs `NormFunction`; its weight is the original's, under its name."""

    def __init__(self, original: nn.Module, norm: Norm):
        super().__init__()
        self.weight = norm.weight
        self.norm = norm
        self.__dict__["original"] = original

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y as x, (..., D)."""
        y: torch.Tensor = NormFunction.apply(x, self.weight, self.norm)
        return y


class LayerFunction(torch.autograd.Function):
    """A layer in the autograd graph: hidden states and trainable parameters in, hidden states out."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, run: LayerRun, *parameters: nn.Parameter) -> torch.Tensor:
        """(B, S, D) for hidden (B, S, D)."""
        h = hidden.detach().flatten(0, 1)
        kept: Kept = {}
        with torch.autocast(hidden.device.type, enabled=False):
            out = run.forward(h, kept)
        if run.previous is not None and run.previous.host is not None:
            run.previous.host.release()  # its copy had this layer's time
        if run.policy.offload_input:
            run.host = HostCopy(h)
        else:
            kept["hidden"] = h
        ctx.run, ctx.kept, ctx.shape = run, kept, hidden.shape
        return out.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden and of the parameters. Raises RuntimeError the second time: the first consumes its inputs."""
        run, kept = ctx.run, ctx.kept
        if kept is None:
            raise RuntimeError(
                "a fused layer's backward ran a second time through the same forward (retain_graph=True); its buffers "
                "are reused and gone: run the forward again, or unfuse the model"
            )
        ctx.kept = None
        if run.previous is not None and run.previous.host is not None:
            run.previous.host.prefetch()
        h = kept.pop("hidden") if run.host is None else run.host.fetch()
        run.host = None
        needs_input = ctx.needs_input_grad[0]
        with torch.autocast(grad.device.type, enabled=False):
            dh, grads = run.backward(grad.reshape(h.shape), h, kept, needs_input)
        found = (grads.of(parameter) for parameter in run.parameters)
        return (dh.view(ctx.shape) if needs_input and dh is not None else None, None, *found)
