"""Dropout whose mask belongs to a token: the same however a step is split, padded, packed or shared among ranks.

An element of an adapter's input is dropped by (seed of the step, token, projection, feature): one Philox key, the token's row
number (`Batch.dropout_rows`) and the projection's stream in its counter (kernels/dropout.py). Nothing is drawn from a
generator, so a step can be repeated in smaller micro-batches after it ran out of memory, with the same loss and gradient.

Both engines drop the same elements. In the model's own layers `draw_by_row` puts `RowDropout` where PEFT has its
`nn.Dropout`; fused layers ask for the same seed, rows and streams.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tunesmith.kernels.dropout import dropout
from tunesmith.models.families import LayerSpec, layer_spec

LAYER_STREAMS = 32
"""Streams of a layer: layer l has those from 32 l on."""

QKV_STREAM, O_STREAM, GATE_UP_STREAM, DOWN_STREAM = 0, 8, 16, 20
"""Where the streams of a group of projections begin in those of their layer: one for each, in order."""

OTHER_STREAMS = 2**31
"""Streams from here on are those of adapters in places that no family knows, in the order of the model's modules."""


def step_seed(seed: int, step: int) -> int:
    """The seed of dropout in optimizer step `step` of a run: 64 bits, mix(mix(seed) + step).

    `mix` is the output function of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), a
    bijection of 64 bits: the steps of a run have different seeds, and runs whose seeds are neighbours share no sequence.
    """
    return _mix(_mix(seed) + step)


def _mix(z: int) -> int:
    word = 2**64 - 1
    z = z + 0x9E3779B97F4A7C15 & word
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & word
    z = (z ^ z >> 27) * 0x94D049BB133111EB & word
    return z ^ z >> 31


class Draw(NamedTuple):
    """What the masks of one forward are drawn from: the number of each token's row (T,) and the step's seed."""

    rows: torch.Tensor
    seed: int


class MaskSource:
    """What all dropout of a model looks at: `draw`, that of the running forward; None where nothing is known of its rows."""

    def __init__(self) -> None:
        self.draw: Draw | None = None

    def during(self, draw: Draw | None) -> AbstractContextManager[None]:
        """Set `draw` for a while."""
        return _During(self, draw)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of activation checkpointing: the backward computes again with the draw of its own forward.

        By then the forward is over, and another one may have come between.
        """
        return nullcontext(), self.during(self.draw)


class _During(AbstractContextManager[None]):
    """Can be entered again, one time after the other: a backward with `retain_graph` recomputes in each pass."""

    def __init__(self, source: MaskSource, draw: Draw | None):
        self.source, self.draw = source, draw
        self.before: Draw | None = None

    def __enter__(self) -> None:
        self.before, self.source.draw = self.source.draw, self.draw

    def __exit__(self, *_: object) -> None:
        self.source.draw = self.before


class RowDropout(nn.Dropout):
    """y = x · m / (1 - p) for x (..., K), with the mask m of stream `stream` in the rows of the running forward.

    The identity in evaluation. Where nothing is known of the rows it is `nn.Dropout`: in a forward that is not ours, and
    for modules that see other rows than the model's tokens (an expert's share of them).
    """

    def __init__(self, p: float, stream: int, source: MaskSource):
        super().__init__(p)
        self.stream, self.source = stream, source

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y as x."""
        draw = self.source.draw
        if not self.training or draw is None or x.shape[:-1].numel() != len(draw.rows):
            return super().forward(x)
        y: torch.Tensor = _DropoutFunction.apply(x, self.p, self.stream, draw)
        return y

    def extra_repr(self) -> str:
        """As nn.Dropout's, with the stream."""
        return f"{super().extra_repr()}, stream={self.stream}"


class _DropoutFunction(torch.autograd.Function):
    """Dropout in the autograd graph: dx = dy · m / (1 - p). It keeps the row numbers, and no mask."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, stream: int, draw: Draw) -> torch.Tensor:
        """y as x, (..., K)."""
        ctx.save_for_backward(draw.rows)
        ctx.p, ctx.stream, ctx.seed = p, stream, draw.seed
        return _drop(x, p, draw.seed, stream, draw.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x."""
        (rows,) = ctx.saved_tensors
        return _drop(grad, ctx.p, ctx.seed, ctx.stream, rows), None, None, None


def _drop(x: torch.Tensor, p: float, seed: int, stream: int, rows: torch.Tensor) -> torch.Tensor:
    return dropout(x.detach().reshape(-1, x.shape[-1]).contiguous(), p, seed, stream, rows=rows).view(x.shape)


def mask_source(decoder: nn.Module) -> MaskSource | None:
    """What dropout in a decoder looks at; None for one that `draw_by_row` did nothing to."""
    return vars(decoder).get("mask_source")


def draw_by_row(model: Any) -> MaskSource | None:
    """Put `RowDropout` in the place of the dropout of LoRA adapters (p > 0) in `model`, in place.

    Returns what they look at, which is also an attribute of the decoder (`mask_source`); None for a model without such
    dropout, which stays as it is. Dropout has no parameters: what is saved and loaded is the same. For the streams of its
    layers the model must not be fused yet.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder: nn.Module = base.get_decoder()
    source = mask_source(decoder) or MaskSource()
    streams = _streams(decoder)
    for number, module in enumerate(model.modules()):
        dropouts = module._modules.get("lora_dropout")
        if not isinstance(dropouts, nn.ModuleDict):
            continue
        for name, child in dropouts.items():
            if type(child) is nn.Dropout and child.p > 0:
                stream = streams.get(id(module), OTHER_STREAMS + number)
                dropouts[name] = RowDropout(child.p, stream, source).train(child.training)
                decoder.mask_source = source  # type: ignore[assignment]  # a plain attribute: it is no module
    return mask_source(decoder)


def _streams(decoder: nn.Module) -> dict[int, int]:
    """The stream of each projection that a family's spec names, by the module's id."""
    found = {}
    for number, layer in enumerate(getattr(decoder, "layers", ())):
        spec = layer_spec(layer)
        if isinstance(spec, LayerSpec):
            modules = dict(layer.named_modules())
            for name, stream in _projection_streams(spec).items():
                if name in modules:  # a part that is not of the family's form has other ones
                    found[id(modules[name])] = LAYER_STREAMS * number + stream
    return found


def _projection_streams(spec: LayerSpec) -> dict[str, int]:
    """Streams within a layer by the projection's name."""
    groups = (
        (QKV_STREAM, spec.qkv),
        (O_STREAM, (spec.o,)),
        (GATE_UP_STREAM, spec.gate_up),
        (DOWN_STREAM, (spec.down,)),
    )
    return {name: first + index for first, names in groups for index, name in enumerate(names)}
