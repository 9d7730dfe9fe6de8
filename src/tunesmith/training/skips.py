"""Steps that are not taken: a loss or gradient that is not finite, or a gradient far above the others.

One bad step can ruin a week: NaN spreads to every weight, and Adam remembers a spike for a thousand steps. Whether a step is
bad is decided on the device, before the optimizer moves anything and without waiting for it; the loop learns of it when it
reads its losses. Steps that are skipped again and again mean that the run itself has gone wrong: it goes back to its last
checkpoint with half the rate, and stops when that does not help.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.errors import VerificationError

SPIKE = 10.0
"""A gradient norm this many times the median of the recent ones is a spike, if it is this many times the clipping norm too:
below that, clipping has made it harmless."""

RECENT = 64
"""Steps whose norms are remembered. Until half of them are known nothing is a spike."""

REPEATED, WITHIN = 3, 10
"""So many skipped steps among so many in a row, and the run goes back."""

MAX_ROLLBACKS = 2
"""How often a run goes back before it stops."""

ROLLBACK_FACTOR = 0.5
"""What the rate is multiplied by each time."""


class StepJudge:
    """Says of each step, on the device, whether it is bad. `norms` are the recent ones of an earlier process."""

    def __init__(self, device: torch.device | str, max_grad_norm: float, spikes: bool, norms: Sequence[float] = ()):
        self.floor = SPIKE * max_grad_norm
        self.spikes = spikes
        self._norms = torch.full((RECENT,), math.inf, device=device)
        self._count = 0
        for norm in norms:
            self._norms[self._count % RECENT] = norm
            self._count += 1

    def bad(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1.0 for a step that must not be taken, else 0.0: a scalar in fp32. Remembers the norms of the others.

        `loss` is this rank's part: the ranks must agree, and then do by their common gradient.
        """
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        good = finite
        if self.spikes:
            # The lower median; infinite while fewer than half of the places are filled.
            good = finite & (grad_norm <= (SPIKE * self._norms.median()).clamp(min=self.floor))
        place = self._norms[self._count % RECENT]
        place.copy_(torch.where(good, grad_norm.float(), place))
        self._count += 1
        return (~good).float()

    def recent(self) -> list[float]:
        """The norms that are known, the oldest first, for the checkpoint. Waits for the device."""
        start = self._count % RECENT
        values = torch.cat((self._norms[start:], self._norms[:start])).tolist()
        return [value for value in values if math.isfinite(value)]


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """A step that was not taken; `rows` (`file:line`) are its examples."""

    step: int
    loss: float
    grad_norm: float
    rows: tuple[str, ...]

    @property
    def what(self) -> str:
        """What was wrong with it."""
        if not math.isfinite(self.loss):
            return f"loss is {self.loss}"
        if not math.isfinite(self.grad_norm):
            return f"gradient norm is {self.grad_norm}"
        return f"gradient norm {self.grad_norm:.3g} is more than {SPIKE:g} times the recent ones"

    @property
    def message(self) -> str:
        """For the log."""
        return f"step {self.step} was skipped: {self.what} ({named(self.rows)})"


def named(rows: Sequence[str], most: int = 8) -> str:
    """Rows as text, each once (a long row may give several examples)."""
    seen = list(dict.fromkeys(rows))
    return "rows " + ", ".join(seen[:most]) + (f", and {len(seen) - most} more" if len(seen) > most else "")


class Skips:
    """The skipped steps of a run: when they are too many, and what is likely to be the cause."""

    def __init__(self) -> None:
        self._recent: deque[SkippedStep] = deque(maxlen=REPEATED)
        self._rows: list[set[str]] = []

    def add(self, skipped: SkippedStep) -> None:
        """Count a skipped step in."""
        self._recent.append(skipped)

    @property
    def repeated(self) -> bool:
        """Whether steps are skipped again and again."""
        recent = self._recent
        return len(recent) == REPEATED and recent[-1].step - recent[0].step < WITHIN

    def went_back(self) -> None:
        """Forget the steps; their rows are kept, to see whether the same ones come again."""
        self._rows.append({row for skipped in self._recent for row in skipped.rows})
        self._recent.clear()

    def refuse(self, lr: float, fp16: bool) -> None:
        """Raise VerificationError for a run that going back did not help, with the likely cause."""
        last = self._recent[-1]
        rows = {row for skipped in self._recent for row in skipped.rows}
        same = set.intersection(rows, *self._rows) if self._rows else set()
        if fp16:
            cause = "fp16's range is too small for this model: use bf16 or fp32 (model.dtype)"
        elif same and len(same) < len(rows) / 2:
            cause = f"the same rows came each time ({named(sorted(same))}): look at them"
        else:
            cause = f"the rate is too high: lower optimizer.lr ({lr:g} at this step)"
        raise VerificationError(
            f"{last.what} at step {last.step} ({named(last.rows)}), after {len(self._rows)} returns to a checkpoint with half "
            f"the rate each; {cause}"
        )
