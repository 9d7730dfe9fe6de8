"""How many micro-batches graphs replay: by hand, and against what training/graphs.py does."""

from __future__ import annotations

import pytest

from tunesmith.memory.replays import CAPTURING, MAX_GRAPHS, WARM_UPS, replayed

LOST = WARM_UPS + CAPTURING


def test_one_shape_is_always_replayed() -> None:
    assert replayed([5], 1) == replayed([1], 1e6) == 1.0
    assert replayed([], 100) == 0.0


def test_each_shape_costs_its_warm_up_and_its_capture() -> None:
    assert replayed([3, 1], 100) == pytest.approx((75 - LOST + 25 - LOST) / 100)
    assert replayed([99, 1], 100) == pytest.approx((99 - LOST) / 100), "what comes once is never captured"
    assert replayed([3, 1], 4) == 0.0
    assert replayed([3, 1], 1e9) == pytest.approx(1.0)


def test_only_so_many_graphs_are_kept() -> None:
    shapes = [1] * (4 * MAX_GRAPHS)
    assert replayed(shapes, 1e9) == pytest.approx(0.25)
