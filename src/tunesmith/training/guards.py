"""Guards of the loop: a stop asked for by a signal, and training that silently does not train."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from tunesmith.errors import VerificationError


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the loop looks at it between steps. A second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM for the length of the block. Outside the main thread signals cannot be caught: no-op."""
    request = StopRequest()
    try:
        previous = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class MovementCheck:
    """Finds trainable tensors that training has not changed: the field's worst silent bug.

    Two double-precision sums of each tensor stand for its content; a tensor whose two sums are both exactly what they
    were at the start has not moved.
    """

    def __init__(self, model: torch.nn.Module):
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._start = self._sums()

    def unmoved(self) -> list[str]:
        """Names of the trainable tensors that are what they were at the start."""
        now = self._sums()
        same = (now == self._start).all(dim=1).tolist()
        return [name for (name, _), unmoved in zip(self._parameters, same, strict=True) if unmoved]

    def refuse_unmoved(self) -> None:
        """Raise VerificationError if a trainable tensor has not moved."""
        names = self.unmoved()
        if names:
            raise VerificationError(
                f"{len(names)} of {len(self._parameters)} trainable tensors have not moved at all "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): no gradient reaches them; "
                "leave them out of adapter.target_modules"
            )

    def _sums(self) -> torch.Tensor:
        with torch.no_grad():
            doubles = (parameter.detach().double() for _, parameter in self._parameters)
            return torch.stack([torch.stack((tensor.sum(), tensor.square().sum())) for tensor in doubles])


def refuse_not_finite(loss: float, grad_norm: float, step: int, lines: tuple[int, ...], dtype: str) -> None:
    """Raise VerificationError if the loss or the gradient norm is NaN or infinite.

    With fp16 the gradient scaler skips overflowing steps by itself, so only the loss is looked at.
    """
    if math.isfinite(loss) and (math.isfinite(grad_norm) or dtype == "fp16"):
        return
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
    rows = ", ".join(map(str, sorted(lines)[:16])) + (", ..." if len(lines) > 16 else "")
    raise VerificationError(
        f"{what} at step {step} (data lines {rows}); the last checkpoint is from before it. "
        "Lower optimizer.lr, look at these rows" + (", or use bf16 or fp32 instead of fp16" if dtype == "fp16" else "")
    )
