"""The linear layers that read one input, as one matrix product: base weights and LoRA's A stacked in one operand.

For P projections W_p (N_p, K) with adapters A_p (r, K), B_p (N_p, r) the stacked operand is [W; A] of (N + R, K): the rows
of all W_p, then a slot of rows for each A_p. One product X [W; A]ᵀ gives [Y | S], and one product [dY | dS] [W; A] gives dX;
S Bᵀ and dS = dY B are left to the kernels that read Y and write dY anyway. LoRA: Hu et al. 2021, arXiv 2106.09685;
scale alpha / √r: Kalajdzievski 2023, arXiv 2312.03732.

Where the operand comes from: base weights stored in the compute type live in it (their parameters are views of its rows);
4-bit weights are dequantized, and weights of another type cast, straight into its rows whenever it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from tunesmith.kernels import nf4
from tunesmith.kernels.dropout import dropout, dropout_backward_add
from tunesmith.kernels.launch import MAX_SLOT, has_tensor_cores, wide_dtype
from tunesmith.kernels.pack import PackEntry

LORA_CLASSES = {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit"}
BASE_CLASSES = {"torch.nn.modules.linear.Linear", "bitsandbytes.nn.modules.Linear4bit"}


def base_layer(module: nn.Module) -> nn.Linear:
    """The base model's linear layer under PEFT's wrapper, or the layer itself."""
    return cast(nn.Linear, getattr(module, "base_layer", module))


def why_not(module: Any) -> str | None:
    """Why a projection cannot be part of a fused layer; None if it can."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name not in LORA_CLASSES:
        return None if name in BASE_CLASSES else f"a projection is a {name}"
    base = base_layer(module)
    below = f"{type(base).__module__}.{type(base).__qualname__}"
    if below not in BASE_CLASSES:
        return f"a projection is a {below}"
    variants = sorted({type(variant).__name__ for variant in module.lora_variant.values() if variant is not None})
    if variants:
        return f"its adapter is a {', '.join(variants)}, which runs in the model's own layer"
    if any(module.lora_bias.values()):
        return "its adapter has a bias on B (lora_bias)"
    names = _active_names(module)
    return f"the adapters {', '.join(names)} are active together: one at a time is fused" if len(names) > 1 else None


@dataclass(frozen=True, slots=True)
class Lora:
    """The active adapter of one projection: A (r, K) and B (N, r) as trained, y += scale · B A dropout(x)."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


def _active_names(module: Any) -> list[str]:
    """The adapters that PEFT would add to the base layer now: none while they are disabled or merged."""
    wrapped: Any = module._modules.get("lora_A")  # plain lookups: this runs for each projection in every forward
    if wrapped is None or module._disable_adapters or module.merged_adapters:
        return []
    return [name for name in module.active_adapters if name in wrapped._modules]


def active_lora(module: Any) -> Lora | None:
    """The active adapter, if there is one. Raises ValueError for two."""
    names = _active_names(module)
    if len(names) > 1:
        raise ValueError(f"the adapters {', '.join(names)} are active together; the fused engine runs one at a time")
    if not names:
        return None
    (name,) = names
    dropped = module.lora_dropout[name]
    probability = getattr(dropped, "p", 0.0) if dropped.training else 0.0
    return Lora(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], probability)


class LinearGroup:
    """P linear layers with one input, in one operand. `dtype` is the compute type.

    There is one adapter slot a module, so one for a fused weight, whose outputs share an adapter. With `adds_bias` the
    group's forward adds the biases; without, the kernel that reads Y does.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, adds_bias: bool = True):
        self.modules = list(modules)
        self.dtype = dtype
        self.adds_bias = adds_bias
        self.sizes = [base_layer(module).out_features for module in modules]
        self.num_out = sum(self.sizes)
        self.num_in = base_layer(modules[0]).in_features
        self.stack: torch.Tensor | None = None
        self.tail_taken = False
        self._states: dict[tuple[Any, ...], GroupState] = {}

    @property
    def bases(self) -> list[nn.Linear]:
        """The base layers."""
        return [base_layer(module) for module in self.modules]

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of the weights now (FSDP2 gathers them around a layer's forward and backward)."""
        return hasattr(self.bases[0].weight, "device_mesh")

    @torch.inference_mode(False)
    def stack_weights(self) -> None:
        """Move plain base weights of the compute type into one operand, with room for the present adapter's A.

        Their parameters become views of its rows; values and names stay.
        """
        weights = [base.weight for base in self.bases]
        if any(hasattr(w, "quant_state") or w.dtype != self.dtype or type(w) is not nn.Parameter for w in weights):
            return
        loras = [active_lora(module) for module in self.modules]
        rows = self.num_out + len(self.modules) * _slot(loras)
        stack = torch.zeros(rows, self.num_in, dtype=self.dtype, device=weights[0].device)
        for weight, part in zip(weights, stack[: self.num_out].split(self.sizes), strict=True):
            part.copy_(weight.data)
            weight.data = part
        self.stack, self.tail_taken = stack, False
        self._states.clear()

    def unstack_weights(self) -> None:
        """Give every base weight its own storage back."""
        if self.stack is not None:
            for base in self.bases:
                base.weight.data = base.weight.data.clone()
        self.stack = None
        self._states.clear()

    def state(self) -> GroupState:
        """The group as it is now: which adapter is active, and where its operands are."""
        loras = [active_lora(module) for module in self.modules]
        stacked = self._stacked()
        device = base_layer(self.modules[0]).weight.device  # `to` moves parameters without a change of identity
        adapters = ((id(lora.a), id(lora.b), lora.scale, lora.dropout) if lora else None for lora in loras)
        key = (stacked, device, *adapters)
        if key not in self._states:
            self._forget_deleted()
            with torch.inference_mode(False):  # its operands are written again in training
                self._states[key] = GroupState(self, loras, stacked)
        return self._states[key]

    def _forget_deleted(self) -> None:
        """Drop the states of adapters that the modules no longer have."""
        held = {id(parameter) for module in self.modules for parameter in module.parameters()}
        self._states = {
            key: state
            for key, state in self._states.items()
            if all(lora is None or id(lora.a) in held for lora in state.loras)
        }

    def holds(self, state: GroupState) -> bool:
        """Whether `state` may be asked for again."""
        return any(state is known for known in self._states.values())

    def _stacked(self) -> bool:
        """Whether the parameters are (still) the rows of the stack; `merge`, FSDP or a user may have moved them.

        A stack that none of them is in any more is let go of: under FSDP all stacks together would be the whole model.
        """
        if self.stack is None:
            return False
        address = self.stack.data_ptr()
        row = self.stack.stride(0) * self.stack.element_size()
        inside = []
        for base, size in zip(self.bases, self.sizes, strict=True):
            inside.append(base.weight.data_ptr() == address)
            address += size * row
        if not any(inside):
            self.stack = None
            self._states.clear()
        return all(inside)


def _slot(loras: Sequence[Lora | None]) -> int:
    """Columns of an adapter slot: the largest rank, rounded up to a power of two that `tl.dot` takes; 0 without."""
    rank = max((lora.rank for lora in loras if lora), default=0)
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


class GroupState:
    """A group with one choice of adapters. Immutable but for the values that `pack` writes.

    `a` (R, K) and `b` (N, slot) are the adapter's matrices in the compute type, B times its scale; None without adapter.
    `folded` says that kernels add the low-rank terms; otherwise this class does, with cuBLAS.
    """

    def __init__(self, group: LinearGroup, loras: list[Lora | None], stacked: bool):
        self.group = group
        self.loras = loras
        self.num_out, self.num_in = group.num_out, group.num_in
        self.slot = _slot(loras)
        self.num_slots = len(loras)
        self.rank = self.slot * self.num_slots
        device = group.bases[0].weight.device
        self.dropout = any(lora is not None and lora.dropout > 0 for lora in loras)
        self.folded = self.slot > 0 and self.slot <= MAX_SLOT and has_tensor_cores(device)
        self.stacked = stacked
        self.joined = False
        if stacked and group.stack is not None and len(group.stack) == self.num_out + self.rank:
            # The rows below W belong to the first adapter: a graph that is still to be differentiated may read them.
            self.joined = self.rank == 0 or not group.tail_taken
            group.tail_taken = group.tail_taken or self.rank > 0
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        self._held: torch.Tensor | None = None
        self.entries: list[PackEntry] = []
        if self.rank:
            if self.joined:
                assert group.stack is not None
                self.a = group.stack[self.num_out :]
            else:
                self.a = torch.zeros(self.rank, self.num_in, dtype=group.dtype, device=device)
            self.b = torch.zeros(self.num_out, self.slot, dtype=group.dtype, device=device)
            for index, (lora, b_rows) in enumerate(zip(loras, self.b.split(group.sizes), strict=True)):
                if lora is not None:
                    a_rows = self.a[index * self.slot : (index + 1) * self.slot]
                    self.entries += [PackEntry(lora.a, a_rows, 1.0), PackEntry(lora.b, b_rows, lora.scale)]

    def pack(self) -> None:
        """Cast this group's adapters into their operands. The engine does it for all layers at once where it can."""
        for entry in self.entries:
            rows, cols = entry.source.shape
            entry.destination[:rows, :cols].copy_(entry.source.detach() * entry.scale)

    def clear(self) -> None:
        """Zero the adapter rows: what `pack` does not write (ranks below the slot's width) must add nothing."""
        if self.a is not None and self.b is not None:
            self.a.zero_()
            self.b.zero_()

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that may need a gradient: of adapters, biases and base weights."""
        found: list[nn.Parameter] = []
        for base, lora in zip(self.group.bases, self.loras, strict=True):
            found += [cast(nn.Parameter, base.weight)] if base.weight.requires_grad else []
            found += [base.bias] if base.bias is not None and base.bias.requires_grad else []
            found += [p for p in (lora.a, lora.b) if p.requires_grad] if lora else []
        return found

    @property
    def trains_base(self) -> bool:
        """Whether a base weight needs a gradient."""
        return any(base.weight.requires_grad for base in self.group.bases)

    @property
    def bias(self) -> torch.Tensor | None:
        """The biases of all projections side by side (N,) in the compute type; None if there is none."""
        biases = [base.bias for base in self.group.bases]
        if all(bias is None for bias in biases):
            return None
        parts = [
            torch.zeros(size, dtype=self.group.dtype, device=self.group.bases[0].weight.device)
            if bias is None
            else bias.detach().to(self.group.dtype)
            for bias, size in zip(biases, self.group.sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def _apart(self) -> bool:
        """Whether W and A lie apart: W in the group's stack, whose tail belongs to another adapter."""
        return self.stacked and self.rank > 0 and not self.joined and not self.dropout

    def operand(self, with_a: bool = True) -> torch.Tensor:
        """[W; A] (N + R, K), or W alone. Frees itself: hold it no longer than a product needs."""
        if self._held is not None:
            return self._held if with_a else self._held[: self.num_out]
        if self.joined:
            assert self.group.stack is not None
            return self.group.stack if with_a else self.group.stack[: self.num_out]
        if self.stacked and not (with_a and self.rank):
            assert self.group.stack is not None
            return self.group.stack[: self.num_out]
        bases = self.group.bases
        if len(bases) == 1 and not (with_a and self.rank) and bases[0].weight.dtype == self.group.dtype:
            return bases[0].weight.detach()
        rows = self.num_out + (self.rank if with_a else 0)
        out = torch.empty(rows, self.num_in, dtype=self.group.dtype, device=bases[0].weight.device)
        start = 0
        for base, size in zip(bases, self.group.sizes, strict=True):
            write_weight(base, out[start : start + size])
            start += size
        if with_a and self.a is not None:
            out[self.num_out :].copy_(self.a)
        return out

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the operand once for all products inside, where it has to be made (dequantized, cast)."""
        self._held = None if self.stacked else self.operand()
        try:
            yield
        finally:
            self._held = None

    def forward(self, x: torch.Tensor, noise: Noise) -> torch.Tensor:
        """[Y | S] (T, N + R) for x (T, K), without the low-rank term if it is folded into the reader of Y."""
        buffer = x.new_empty(x.shape[0], self.num_out + self.rank)
        if self.dropout:
            self._dropped_forward(x, buffer, noise)
        elif self._apart:
            assert self.a is not None
            torch.mm(x, self.operand(with_a=False).T, out=buffer[:, : self.num_out])
            torch.mm(x, self.a.T, out=buffer[:, self.num_out :])
        else:
            torch.mm(x, self.operand().T, out=buffer)
        if self.rank and not self.folded:
            self._add_low_rank(buffer)
        if self.group.adds_bias and (bias := self.bias) is not None:
            buffer[:, : self.num_out] += bias
        return buffer

    def _dropped_forward(self, x: torch.Tensor, buffer: torch.Tensor, noise: Noise) -> None:
        torch.mm(x, self.operand(with_a=False).T, out=buffer[:, : self.num_out])
        for index, lora in enumerate(self.loras):
            into = self.slot_of(buffer, index)
            if lora is None:
                into.zero_()
            else:
                torch.mm(noise.drop(x, lora.dropout, index), self.slot_of_a(index).T, out=into)

    def _add_low_rank(self, buffer: torch.Tensor) -> None:
        """Y_p += S_p B_pᵀ in place."""
        assert self.b is not None
        for index, (y, b) in enumerate(zip(self.outputs(buffer), self.b.split(self.group.sizes), strict=True)):
            if self.loras[index] is not None:
                y.addmm_(self.slot_of(buffer, index), b.T)

    def outputs(self, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The columns of each projection in a (T, N + R) buffer."""
        return buffer[:, : self.num_out].split(self.group.sizes, 1)

    def slot_of(self, buffer: torch.Tensor, index: int) -> torch.Tensor:
        """The slot of projection `index` in a (T, N + R) buffer."""
        start = self.num_out + index * self.slot
        return buffer[:, start : start + self.slot]

    def slot_of_a(self, index: int) -> torch.Tensor:
        """The rows of A_p in the operand."""
        assert self.a is not None
        return self.a[index * self.slot : (index + 1) * self.slot]

    def write_ds(self, dy: torch.Tensor, ds: torch.Tensor) -> None:
        """dS_p = dY_p B_p, into `ds` (T, R)."""
        if self.b is None:
            return
        parts = zip(dy.split(self.group.sizes, 1), self.b.split(self.group.sizes), ds.split(self.slot, 1), strict=True)
        for dy_part, b, ds_part in parts:
            torch.mm(dy_part, b, out=ds_part)

    def backward_input(self, grad: torch.Tensor, noise: Noise) -> torch.Tensor:
        """dX (T, K) of [dY | dS] (T, N + R)."""
        if not self.dropout and not self._apart:
            return torch.mm(grad, self.operand())
        dx = torch.mm(grad[:, : self.num_out], self.operand(with_a=False))
        self.add_input_low_rank(dx, grad[:, self.num_out :], noise)
        return dx

    def add_input_low_rank(self, dx: torch.Tensor, ds: torch.Tensor, noise: Noise) -> None:
        """dX += dS A in place, through the dropout of the adapters' input."""
        if not self.rank:
            return
        assert self.a is not None
        if not self.dropout:
            dx.addmm_(ds, self.a)
            return
        for index, (lora, part) in enumerate(zip(self.loras, ds.split(self.slot, 1), strict=True)):
            if lora is not None:
                inner = torch.mm(part, self.slot_of_a(index))
                noise.add_kept(dx, inner, lora.dropout, index)

    def weight_gradients(
        self,
        grads: Gradients,
        dy: torch.Tensor,
        ds: torch.Tensor | None,
        x: torch.Tensor | None,
        s: torch.Tensor | None,
        noise: Noise,
        db: torch.Tensor | None = None,
        da: torch.Tensor | None = None,
    ) -> None:
        """Add the gradients of this group's parameters to `grads`.

        `dy` (T, N) and `ds` (T, R) are the gradients of [Y | S], `x` (T, K) the input, `s` (T, R) the forward's S. `db`
        (N, slot) and `da` (R, K), if given, are dY_pᵀ S_p and dSᵀ X from a kernel that had them at hand.
        """
        if self.rank:
            assert ds is not None
            self._adapter_gradients(grads, dy, ds, x, s, noise, db, da)
        for base, part in zip(self.group.bases, dy.split(self.group.sizes, 1), strict=True):
            if base.bias is not None and base.bias.requires_grad:
                grads.add(base.bias, part.sum(0, dtype=wide_dtype(part.dtype)))
            if base.weight.requires_grad:
                assert x is not None
                grads.add_product(base.weight, part.T, x)

    def _adapter_gradients(
        self,
        grads: Gradients,
        dy: torch.Tensor,
        ds: torch.Tensor,
        x: torch.Tensor | None,
        s: torch.Tensor | None,
        noise: Noise,
        db: torch.Tensor | None,
        da: torch.Tensor | None,
    ) -> None:
        wants_a = any(lora is not None and lora.a.requires_grad for lora in self.loras)
        if da is None and wants_a and not self.dropout:
            assert x is not None
            da = mm_wide(ds.T, x)
        start = 0
        for index, (lora, size) in enumerate(zip(self.loras, self.group.sizes, strict=True)):
            slot = slice(index * self.slot, (index + 1) * self.slot)
            if lora is not None and lora.b.requires_grad:
                if db is not None:
                    product = db[start : start + size]
                else:
                    assert s is not None
                    product = mm_wide(dy[:, start : start + size].T, s[:, slot])
                grads.add(lora.b, product[:, : lora.rank], lora.scale)
            if lora is not None and lora.a.requires_grad:
                if da is not None:
                    rows = da[slot]
                else:
                    assert x is not None
                    rows = mm_wide(ds[:, slot].T, noise.drop(x, lora.dropout, index))
                grads.add(lora.a, rows[: lora.rank])
            start += size


@dataclass(frozen=True, slots=True)
class Noise:
    """Where dropout draws its mask from: a seed, a stream for each projection from `stream` on, and rows in it.

    The rows of x are those from `row` on, or those that `rows` (T,) numbers.
    """

    seed: int = 0
    stream: int = 0
    row: int = 0
    rows: torch.Tensor | None = None

    def drop(self, x: torch.Tensor, probability: float, index: int) -> torch.Tensor:
        """`x` (T, K) without what projection `index` drops of it."""
        return dropout(x, probability, self.seed, self.stream + index, self.row, self.rows)

    def add_kept(self, dx: torch.Tensor, inner: torch.Tensor, probability: float, index: int) -> None:
        """dx += the gradient `inner` (T, K) of what `drop` returned, as it goes on to x."""
        dropout_backward_add(dx, inner, probability, self.seed, self.stream + index, self.row, self.rows)


def write_weight(base: nn.Linear, out: torch.Tensor) -> None:
    """The base weight (N, K) in the type of `out`: dequantized, cast or copied."""
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        out.copy_(weight.detach())
    elif nf4.supports(state):
        nf4.dequantize_4bit(weight.data, state, out)
    else:
        import bitsandbytes.functional

        out.copy_(bitsandbytes.functional.dequantize_4bit(weight.data, state))


def mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32 (fp64 stays): sums over tokens do not fit 16 bits."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


Sink = Callable[[torch.Tensor, torch.Tensor, float], bool]
"""Takes (parameter, value, scale) and adds scale · value to the parameter's gradient, or returns False."""


class Gradients:
    """Gradients by parameter, summed where a layer is done in pieces. `sinks` are asked first, and keep what they take.

    `in_pieces` says that what is added now is a part of a sum.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = sinks
        self.in_pieces = False
        self._found: dict[int, torch.Tensor] = {}

    def add(self, parameter: torch.Tensor, value: torch.Tensor, scale: float = 1.0) -> None:
        """Add scale · `value` to the gradient of `parameter`."""
        if any(sink(parameter, value, scale) for sink in self._sinks):
            return
        value = value if scale == 1.0 else value * scale
        found = self._found.get(id(parameter))
        self._found[id(parameter)] = value if found is None else found + value

    def add_product(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a @ b to the gradient of `weight`: in fp32, unless it is all of it and rounded to the weight's type in any case.

        In fp32 the gradients of an 8B model's layer would be 0.8 GB beside their rounded copies.
        """
        self.add(weight, a @ b if weight.dtype == a.dtype and not self.in_pieces else mm_wide(a, b))

    def of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """The gradient of `parameter` in its own type and shape; None if there is none."""
        found = self._found.get(id(parameter))
        return None if found is None else found.to(parameter.dtype).view(parameter.shape)
