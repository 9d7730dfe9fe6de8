"""Many small trainable tensors as one: an optimizer step, a norm and a zero cost one launch instead of hundreds.

An adapter has hundreds of tensors of a few thousand values. bitsandbytes launches, and waits for the GPU, once for each
(50 ms a step for the 448 of an 8B model on an H100, beside 3 ms of work). The tensors are made views of one parameter, and the
optimizer sees that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIGNMENT = 256
"""Values: the block that bitsandbytes' 8-bit states are quantized in. No block holds values of two tensors."""


class FlatParameter:
    """Parameters of one type laid end to end in `value`, one trainable parameter, of which each becomes a view.

    Names, shapes and autograd are untouched: gradients still arrive at each tensor, and `collect` moves them; whoever has
    them at hand gives them to `sink` at once. `reached` are the tensors that ever had a gradient, by identity:
    weight decay moves the others too, so that a look at the weights would not find them.
    """

    def __init__(self, tensors: Sequence[torch.nn.Parameter]):
        self.tensors = list(tensors)
        starts, total = [], 0
        for tensor in self.tensors:
            starts.append(total)
            total += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
        first = self.tensors[0]
        self.value = torch.nn.Parameter(torch.zeros(total, dtype=first.dtype, device=first.device))
        self._starts = starts
        with torch.no_grad():
            for tensor, view in zip(self.tensors, self._views(self.value.data), strict=True):
                view.copy_(tensor)
                tensor.data = view
        self.reached: set[int] = set()
        self._grad: torch.Tensor | None = None
        self._grad_views: dict[int, torch.Tensor] = {}

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(self.tensors, self._starts, strict=True)
        return [flat[start : start + tensor.numel()].view(tensor.shape) for tensor, start in pairs]

    def gradient_views(self) -> dict[int, torch.Tensor]:
        """For each tensor, by identity, its part of the gradient of `value`, which is zero if there was none."""
        gradient = self.value.grad
        if gradient is None:
            gradient = self.value.grad = torch.zeros_like(self.value)
        if gradient is not self._grad:
            self._grad = gradient
            self._grad_views = dict(zip(map(id, self.tensors), self._views(gradient), strict=True))
        return self._grad_views

    def sink(self, tensor: torch.Tensor, value: torch.Tensor, scale: float) -> bool:
        """Add scale · `value` to the gradient of `tensor`; False if it is none of these."""
        view = self.gradient_views().get(id(tensor))
        if view is None:
            return False
        view.add_(value.view(view.shape), alpha=scale)
        self.reached.add(id(tensor))
        return True

    def collect(self) -> None:
        """Add the tensors' gradients to that of `value`, and forget them."""
        views = self.gradient_views()
        found = [(tensor, tensor.grad) for tensor in self.tensors if tensor.grad is not None]
        if found:
            torch._foreach_add_([views[id(tensor)] for tensor, _ in found], [gradient for _, gradient in found])
        for tensor, _ in found:
            self.reached.add(id(tensor))
            tensor.grad = None


def flatten(parameters: Sequence[torch.nn.Parameter]) -> FlatParameter | None:
    """The parameters as one, where that pays and fits: several small ones of one type on one device, as adapters are."""
    if not parameters:
        return None
    small = sum(p.numel() for p in parameters) <= 2**30
    alike = len({(p.dtype, p.device, type(p)) for p in parameters}) == 1
    return FlatParameter(parameters) if len(parameters) > 1 and small and alike else None
