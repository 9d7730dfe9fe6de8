"""What several files of tests of the export share: tiny models of the families that GGUF knows, and a run on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gguf_models import family
from tiny import chat_rows, make_tiny_model, write_jsonl


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model folder of a family, made once."""
    folder = tmp_path_factory.mktemp("gguf-models")

    def make(name: str) -> Path:
        return folder / name if (folder / name).is_dir() else make_tiny_model(folder / name, **family(name))

    return make


@pytest.fixture(scope="session")
def gguf_run(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tunesmith import api
    from tunesmith.config import load_config

    folder = tmp_path_factory.mktemp("gguf-run")
    settings = {
        "model.name": str(models("llama")),
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.path": str(write_jsonl(folder / "rows.jsonl", chat_rows(16))),
        "optimizer.lr": 1e-2,
        "optimizer.max_grad_norm": 10.0,
        "training.batch_size": 8,
        "training.epochs": 2,
        "adapter.rslora": True,
    }
    api.train(load_config(values=settings), folder / "run")
    return folder / "run"
