"""What the tests of sweeps share: a base, a run.yaml, finished sweeps (sweeps.copy_sweep before writing into one), counters."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeps import QUESTIONS, RANKS, SETTINGS, SHORT

from tiny import chat_rows, make_tiny_model, write_jsonl
from tunesmith.config import load_config
from tunesmith.workflows import shared_base, sweep_runs
from tunesmith.workflows.sweep import sweep
from tunesmith.workflows.train import TrainingSession


@pytest.fixture(scope="package", autouse=True)
def what_is_there_is_no_garbage() -> Iterator[None]:
    """A sweep collects garbage after each run; what a test process has loaded by now would take half a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NF4 blocks hold 64 weights of a row."""
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny", hidden=64)


@pytest.fixture(scope="package")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml, with held-out rows, the data, and the questions test.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "train.jsonl", chat_rows(16))
    write_jsonl(folder / "eval.jsonl", chat_rows(8, seed=1))
    write_jsonl(folder / "test.jsonl", QUESTIONS)
    values = SETTINGS | {
        "model.name": str(base),
        "data.path": str(folder / "train.jsonl"),
        "data.eval_path": str(folder / "eval.jsonl"),
    }
    (folder / "run.yaml").write_text(load_config(values=values).to_yaml())
    return folder


@pytest.fixture(scope="package")
def config(files: Path) -> Path:
    return files / "run.yaml"


@pytest.fixture(scope="package")
def questions(files: Path) -> Path:
    return files / "test.jsonl"


@pytest.fixture
def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pages of the runs, whose plots take longer than their training."""
    monkeypatch.setattr(sweep_runs, "write_report", lambda run: run.path / "report.html")


@pytest.fixture(scope="package")
def asked_sweep(config: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep over RANKS whose runs answered the questions."""
    folder = tmp_path_factory.mktemp("asked") / "sweep"
    sweep(config, RANKS, out=folder, data=questions, settings=SHORT)
    return folder


@pytest.fixture(scope="package")
def loss_sweep(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep over a good and a useless rate, by eval_loss."""
    folder = tmp_path_factory.mktemp("losses") / "sweep"
    sweep(config, ["optimizer.lr=1e-2,1e-6"], out=folder, settings=SHORT)
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The quantization of each base that was read from disk, by training and evaluation alike."""
    from tunesmith.workflows import load, train

    found: list[str] = []
    real = shared_base.load_model

    def counted(source: Any, settings: Any, hardware: Any, dtype: Any, quantization: Any = None) -> Any:
        found.append(f"{dtype}{' quantized' if quantization else ''}")
        return real(source, settings, hardware, dtype, quantization)

    for module in (shared_base, load, train):
        monkeypatch.setattr(module, "load_model", counted)
    return found


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Errors that runs end in, by their names."""
    errors: dict[str, Exception] = {}
    real = TrainingSession.train

    def train(self: TrainingSession, *rest: Any) -> Any:
        if (error := errors.get(self.run.path.name)) is not None:
            raise error
        return real(self, *rest)

    monkeypatch.setattr(TrainingSession, "train", train)
    return errors


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch, failing: dict[str, Exception]) -> list[str]:
    """The names of the runs that trained, in order."""
    found: list[str] = []
    real = TrainingSession.train

    def train(self: TrainingSession, *rest: Any) -> Any:
        found.append(self.run.path.name)
        return real(self, *rest)

    monkeypatch.setattr(TrainingSession, "train", train)
    return found
