"""Running out of memory where a test wants it.

fail_at(monkeypatch, run.forward, "hidden", {2, 3})   # the second and third calls of run.forward.hidden
"""

from __future__ import annotations

import itertools
from collections.abc import Container
from typing import Any

import pytest
import torch

REASON = "CUDA out of memory. Tried to allocate 2.00 GiB"
"""What is said of it."""

ALWAYS = range(1, 1_000_000)


def fail_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: Container[int], error: BaseException | None = None
) -> list[int]:
    """Make `owner.name` run out of memory at those of its calls; returns the numbers of the calls, as they come."""
    original, numbers, seen = getattr(owner, name), itertools.count(1), []

    def run_out(*arguments: Any, **options: Any) -> Any:
        seen.append(next(numbers))
        if seen[-1] in calls:
            raise error or torch.OutOfMemoryError(f"{REASON}. GPU 0 has a total capacity")
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, run_out)
    return seen
