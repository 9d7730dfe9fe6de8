"""What the tests of this folder share: a tiny base with two adapters, and an engine with both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer
from serving_models import add, base_forward, make_adapter

from trained import tiny_run
from tunesmith.serving.engine import Engine
from tunesmith.serving.limits import Limits


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of unequal rank over the tiny base. Do not write into them."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "cs": make_adapter(tiny_model, folder / "cs", seed=1),
        "hr": make_adapter(tiny_model, folder / "hr", seed=2, r=6, lora_alpha=12),
    }


@pytest.fixture(params=["a growing cache", "fixed places"])
def engine(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A running engine without adapters, with either kind of batch."""
    fixed = request.param == "fixed places"
    tokens = 8 * 2048 if fixed else None
    engine = Engine(base_forward(tiny_model), max_batch=8, max_queue=64, cache_tokens=tokens, fixed=fixed)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def numbers(engine: Engine, adapters: dict[str, Path]) -> dict[str, int]:
    """The numbers of both adapters in the engine."""
    return {name: add(engine, path) for name, path in adapters.items()}


@pytest.fixture(scope="session")
def tiny_run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run. Do not write into it."""
    return tiny_run(tmp_path_factory, "lora")


@pytest.fixture(scope="module")
def live(tiny_model: Path, adapters: dict[str, Path]) -> Iterator[LiveServer]:
    with LiveServer(tiny_model, adapters, Limits(answer_tokens=1000, body_bytes=20_000)) as live:
        yield live


@pytest.fixture(scope="module")
def endless(tiny_model: Path) -> Iterator[LiveServer]:
    """Two at once, one more waiting; the base's answers do not end."""
    limits = Limits(answer_tokens=3000, batch=2, queue=1, answer_seconds=60, arrival_seconds=1)
    with LiveServer(tiny_model, {}, limits, never_ends=True) as live:
        yield live
