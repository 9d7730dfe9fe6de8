"""Weights in bf16 without a copy in fp32: each update is computed in fp32 and rounded to bf16 up or down at random.

bf16 has 8 bits of precision. An Adam update is about the rate, 1e-5, and a weight of 0.02 has neighbours 1.2e-4 away: rounding to
the nearest gives the weight back, step after step. Stochastic rounding takes the neighbour above with the probability

    P(up) = (x - below) / (above - below),   so that   E[round(x)] = x

(Gupta et al. 2015, arXiv:1502.02551; for bf16 weights Zamirai et al. 2020, arXiv:2010.06192): small updates arrive on average.
bf16 is the upper half of fp32's bits, hence round(x) = (bits(x) + U) with its lower half cleared, U uniform on 0 .. 2^16 - 1.

PyTorch's and bitsandbytes' optimizers know nothing of that. They are given stand-ins: fp32 parameters, each for a slice of a
weight, that have memory only while they are stepped. Their states are keyed by them, and are fp32 or 8 bits as always.
A few slices at a time are copied with their gradients into a workspace of bounded size, stepped there, rounded, and written back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from tunesmith.kernels.chunks import STEPPED_VALUES
from tunesmith.training.flat import ALIGNMENT

UPPER_HALF = -(2**16)
"""An int32 whose upper 16 bits are set: those that bf16 has."""


def stochastic_round_(values: torch.Tensor, noise: torch.Tensor, is_nan: torch.Tensor) -> None:
    """Round `values` (N,) fp32 in place to values that bf16 has, each up or down so that its expectation is what it was.

    `noise` (N,) int32 is uniform on 0 .. 2^16 - 1; `is_nan` (N,) bool is room, overwritten. What bf16 has already, the infinities
    and NaN stay; beyond the largest bf16 the neighbour above is infinity, as in rounding to the nearest.
    """
    torch.ne(values, values, out=is_nan)  # a NaN whose mantissa is full would be carried into a zero
    values.view(torch.int32).add_(noise).bitwise_and_(UPPER_HALF)
    values.masked_fill_(is_nan, float("nan"))


def slice_seed(seed: int, name: str, start: int) -> int:
    """64 bits that seed the noise of the slice of tensor `name` that begins at value `start`, in the step of `seed`."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}/{start}".encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Slice:
    """Values `start` to `stop` of a weight laid flat, and the fp32 parameter that the optimizer knows instead."""

    name: str
    weight: torch.nn.Parameter
    start: int
    stop: int
    stand_in: torch.nn.Parameter

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice's part of a tensor like the weight."""
        return tensor.detach().reshape(-1)[self.start : self.stop]

    @property
    def gradient(self) -> torch.Tensor:
        """The weight's gradient, of which there must be one."""
        assert self.weight.grad is not None
        return self.of(self.weight.grad)

    def rest(self, nothing: torch.Tensor) -> None:
        """Let the stand-in have its size, for whoever looks at it, but no memory: all of it is the scalar `nothing`."""
        self.stand_in.data = nothing.expand(self.stop - self.start)
        self.stand_in.grad = None


Placed = tuple[int, Slice, slice]
"""A slice, its number in its group, and its place in the workspace."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """What a step needs: the slices that are stepped together, by group, and room for as many of their values."""

    buckets: Sequence[tuple[int, Sequence[Placed]]]
    values: torch.Tensor
    gradients: torch.Tensor
    is_nan: torch.Tensor


class RoundedWeights:
    """The weights that an optimizer steps by way of stand-ins, in the groups it has.

    `groups` are the weights by name. A weight of another type than bf16 (transformers keeps some in fp32) is stepped in the
    same way, and written back as it is.
    """

    def __init__(self, groups: Sequence[Mapping[str, torch.nn.Parameter]]):
        self.weights = [weight for group in groups for weight in group.values()]
        device = self.weights[0].device
        self._nothing, self._generator = torch.zeros((), device=device), torch.Generator(device)
        self.groups = [[part for item in group.items() for part in self._slices(*item)] for group in groups]

    def stand_ins(self, group: int) -> list[torch.nn.Parameter]:
        """What the optimizer is given as the parameters of a group."""
        return [part.stand_in for part in self.groups[group]]

    def gradient_norm(self) -> torch.Tensor:
        """The norm of all gradients together: a scalar in fp32 on the device. That of a bf16 tensor alone would be in bf16."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.weights[0].device)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))

    def workspace(self) -> Workspace:
        """The memory of a step, all of it: one that finds none has changed nothing, and can be taken again."""
        buckets = [(number, bucket) for number, group in enumerate(self.groups) for bucket in _buckets(group)]
        size, device = max((bucket[-1][2].stop for _, bucket in buckets), default=0), self.weights[0].device
        return Workspace(
            buckets,
            torch.empty(size, device=device),
            torch.empty(size, device=device),
            torch.empty(size, dtype=torch.bool, device=device),
        )

    @torch.no_grad()
    def step(
        self,
        inner: torch.optim.Optimizer,
        work: Workspace,
        seed: int,
        scale: torch.Tensor,
        bad: torch.Tensor | None = None,
    ) -> None:
        """One step of `inner`, whose states exist, over the gradients times `scale` (a scalar on the device).

        `seed` is the step's: with the tensor's name it makes the noise, and no other generator is drawn from. With PyTorch's AdamW
        nothing changes where `bad` is 1. Waits for the device only where states are paged.
        """
        values, gradients, is_nan = work.values, work.gradients, work.is_nan
        for group, bucket in work.buckets:
            used = slice(0, bucket[-1][2].stop)  # with the gaps, which nobody reads
            weights = [part.of(part.weight) for _, part, _ in bucket]
            stepped = [values[place] for _, _, place in bucket]
            torch._foreach_copy_(stepped, weights)
            torch._foreach_copy_([gradients[place] for _, _, place in bucket], [part.gradient for _, part, _ in bucket])
            gradients[used].mul_(scale)
            if isinstance(inner, torch.optim.AdamW):
                _step_adamw(inner, inner.param_groups[group], bucket, values, gradients, bad)
            else:
                self._step_bitsandbytes(inner, group, bucket, values, gradients)
            if weights[0].dtype == torch.bfloat16:
                noise = gradients.view(torch.int32)  # the gradients have served
                for _, part, place in bucket:
                    self._generator.manual_seed(slice_seed(seed, part.name, part.start))
                    noise[place].random_(0, 2**16, generator=self._generator)
                stochastic_round_(values[used], noise[used], is_nan[used])
            torch._foreach_copy_(weights, stepped)
        if getattr(inner, "is_paged", False) and values.is_cuda:
            torch.cuda.current_stream(values.device).synchronize()  # the host may read paged states after a step

    def _slices(self, name: str, weight: torch.nn.Parameter) -> Iterator[Slice]:
        for start in range(0, weight.numel(), STEPPED_VALUES):
            stop = min(start + STEPPED_VALUES, weight.numel())
            found = Slice(name, weight, start, stop, torch.nn.Parameter(torch.empty(0, device=weight.device)))
            found.rest(self._nothing)
            yield found

    def _step_bitsandbytes(
        self, inner: Any, group: int, bucket: Sequence[Placed], values: torch.Tensor, gradients: torch.Tensor
    ) -> None:
        """bitsandbytes' update of each slice: what its `step` does, but for waiting for the device after each of them."""
        settings = inner.param_groups[group]
        for number, part, place in bucket:
            part.stand_in.data, part.stand_in.grad = values[place], gradients[place]
            inner.prefetch_state(part.stand_in)
            inner.update_step(settings, part.stand_in, group, number)
            part.rest(self._nothing)


def _buckets(group: Sequence[Slice]) -> Iterator[list[Placed]]:
    """The slices whose weights have gradients, as many of one type at a time as STEPPED_VALUES has room for, with their places.

    None shares a block of 8-bit states, or an aligned read, with its neighbour.
    """
    bucket: list[Placed] = []
    end = 0
    for number, part in enumerate(group):
        if part.weight.grad is None:
            continue
        count = part.stop - part.start
        if bucket and (end + count > STEPPED_VALUES or part.weight.dtype != bucket[0][1].weight.dtype):
            yield bucket
            bucket, end = [], 0
        bucket.append((number, part, slice(end, end + count)))
        end += -(-count // ALIGNMENT) * ALIGNMENT
    if bucket:
        yield bucket


def _step_adamw(
    inner: torch.optim.AdamW,
    group: dict[str, Any],
    bucket: Sequence[Placed],
    values: torch.Tensor,
    gradients: torch.Tensor,
    bad: torch.Tensor | None,
) -> None:
    """PyTorch's fused AdamW on the slices of a bucket: what `inner.step` calls for all of its parameters."""
    states = [inner.state[part.stand_in] for _, part, _ in bucket]
    beta1, beta2 = group["betas"]
    adamw(
        [values[place] for _, _, place in bucket],
        [gradients[place] for _, _, place in bucket],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=bad,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
