"""Guards of the loop: a stop asked for by a signal, and training that silently does not train."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
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
    """Finds trainable tensors that training has never changed: the field's worst silent bug.

    Two double-precision sums of each tensor stand for its content; a tensor whose two sums are both exactly what they
    were at the start has not moved. `among` are the names that an earlier process of the same run had not seen move;
    a tensor that has moved once is never looked at again (late steps may be too small to change it).
    """

    def __init__(self, model: torch.nn.Module, among: list[str] | None = None):
        self._all = [name for name, p in model.named_parameters() if p.requires_grad]
        wanted = set(self._all if among is None else among)
        self._parameters = [(name, p) for name, p in model.named_parameters() if name in wanted]
        self._start = self._sums()

    def unmoved(self) -> list[str]:
        """Names of the trainable tensors that have not changed since the run began."""
        if not self._parameters:
            return []
        same = (self._sums() == self._start).all(dim=1)
        keep = same.nonzero().flatten().tolist()
        self._parameters = [self._parameters[index] for index in keep]
        self._start = self._start[same]
        return [name for name, _ in self._parameters]

    def refuse_unmoved(self, unreached: Sequence[str] = ()) -> None:
        """Raise VerificationError if a trainable tensor has not moved, or is among those that no gradient reached."""
        names = list(dict.fromkeys([*self.unmoved(), *unreached]))
        if names:
            raise VerificationError(
                f"{len(names)} of {len(self._all)} trainable tensors have not moved at all "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): no gradient reaches them; "
                "the model does not use them (with an adapter, leave them out of adapter.target_modules), or optimizer.lr is so "
                "small that their updates round to nothing"
            )

    def _sums(self) -> torch.Tensor:
        with torch.no_grad():
            tensors = (parameter.detach() for _, parameter in self._parameters)
            sums = [
                torch.stack((t.sum(dtype=torch.float64), torch.linalg.vector_norm(t, dtype=torch.float64)))
                for t in tensors
            ]
            return torch.stack(sums) if sums else torch.empty(0, 2)
