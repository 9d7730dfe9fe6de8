"""A trainable tiny run: configuration, folder, and a session that is loaded but has not trained yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import chat_rows, write_jsonl
from tunesmith.config import RunConfig, load_config
from tunesmith.workflows.train import TrainingSession, start

Configure = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def configure(tiny_model: Path, tmp_path: Path) -> Configure:
    """`configure("adapter.r=4", rows=24)`: a configuration over the tiny model and `rows` chat rows, in fp32."""

    def make(*overrides: str, rows: int = 24, model: Path = tiny_model) -> RunConfig:
        data = write_jsonl(tmp_path / f"train-{rows}.jsonl", chat_rows(rows, seed=1))
        held = write_jsonl(tmp_path / "held.jsonl", chat_rows(8, seed=2))
        overrides = tuple(o.replace("HELD", str(held)) for o in overrides)
        values: dict[str, Any] = {
            "model.name": str(model),
            "model.dtype": "fp32",
            "model.device": "cpu",
            "data.path": str(data),
            "training.batch_size": 8,
            "optimizer.lr": 1e-2,
        }
        return load_config(None, overrides, values)

    return make


@pytest.fixture
def session(configure: Configure, tmp_path: Path) -> Callable[..., TrainingSession]:
    """`session("training.epochs=1")`: a session ready to train in a new folder."""
    made: list[Path] = []

    def make(*overrides: str, **options: Any) -> TrainingSession:
        made.append(tmp_path / f"run-{len(made)}")
        return start(configure(*overrides, **options), made[-1])

    return make
