"""What several files of tests of the export share: tiny models of the families that GGUF knows, a run on one, and a run to push."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gguf_models import family
from stub_hub import StubHub, stub_hub
from tiny import chat_rows, make_tiny_model, write_jsonl
from trained import copy_run, tiny_run
from tunesmith import api


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A hub on localhost that this process pushes to."""
    with stub_hub(monkeypatch) as running:
        yield running


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, evaluated beside its base. Do not write into it."""
    run = copy_run(tiny_run(tmp_path_factory), tmp_path_factory.mktemp("hub") / "run")
    api.evaluate(run, write_jsonl(run.parent / "test.jsonl", chat_rows(8, seed=1)), baseline=True)
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may write into."""
    return copy_run(evaluated, tmp_path / "run")


@pytest.fixture(params=["streamed", "in memory"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of merging; nothing is streamed in the second."""
    from tunesmith.export.tensors import Unstreamable
    from tunesmith.workflows import merge as workflow

    def refuse(_: Any) -> None:
        raise Unstreamable("the test says so")

    if request.param == "in memory":
        monkeypatch.setattr(workflow, "refuse_unstreamable", refuse)
    found: str = request.param
    return found
