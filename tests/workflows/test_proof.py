"""A proof of concept: a small run first, the full one only if the gate holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny import chat_rows, write_jsonl
from trained import tiny_base
from tunesmith import api
from tunesmith.config import RunConfig, load_config
from tunesmith.errors import ConfigError, RunError, VerificationError
from tunesmith.runs import RunFolder
from tunesmith.workflows import proof


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    data = write_jsonl(tmp_path / "bins.jsonl", chat_rows(24))
    return load_config(
        values={
            "model.name": str(tiny_base(tmp_path_factory)),
            "model.dtype": "fp32",
            "data.path": str(data),
            "data.eval_path": str(data),
            "optimizer.lr": 1e-2,
            "training.batch_size": 8,
            "training.epochs": 1,
            "evaluation.max_new_tokens": 2,
        }
    )


def measured(monkeypatch: pytest.MonkeyPatch, value: float) -> list[tuple[str, Sequence[str]]]:
    """The evaluation says that the sample reached `value`; returns what was asked of it."""
    asked: list[tuple[str, Sequence[str]]] = []

    def evaluate(run: str, data: str, *, gates: Sequence[str], progress: Any) -> dict[str, Any]:
        asked.append((run, gates))
        condition = {"condition": gates[0], "value": value, "sign": ">=", "needed": 0.55, "passed": value >= 0.55}
        return {"gate": {"passed": value >= 0.55, "conditions": [condition]}}

    monkeypatch.setattr(proof, "evaluate", evaluate)
    return asked


def test_the_full_run_follows_a_sample_that_holds(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch, 0.6)
    result = api.train(config, tmp_path / "run", poc=8)
    assert asked == [(str(tmp_path / "run-poc"), ["accuracy >= baseline + 5pt"])]
    small, full = RunFolder.open(tmp_path / "run-poc"), RunFolder.open(result.run)
    assert (small.config.data.max_rows, small.metrics["steps"]) == (8, 1)
    assert (full.config.data.max_rows, full.metrics["steps"]) == (None, 3)
    assert (tmp_path / "run-poc" / "report.html").is_file()


def test_what_came_of_it_is_said_and_plain_text_is_held_to_its_loss(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch, 0.6)
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"a text of its own, number {n}"} for n in range(12)])
    config.data.path = config.data.eval_path = str(texts)
    said: list[str] = []
    api.train(config, tmp_path / "run", poc=4, sink=lambda event: said.append(str(event.get("message"))))
    assert asked[0][1] == ["loss <= baseline * 0.95"]
    assert "the proof of concept on 4 rows passed: loss <= baseline * 0.95: 0.6, needed >= 0.55" in said


def test_the_samples_model_is_gone_before_another_is_loaded(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    real, evaluate = proof.start, proof.evaluate

    def started(*given: Any) -> Any:
        session = real(*given)
        models.append(weakref.ref(session.forward.model))
        return session

    def evaluated(*given: Any, **more: Any) -> Any:
        assert models[0]() is None
        return evaluate(*given, **more)

    monkeypatch.setattr(proof, "start", started)
    monkeypatch.setattr(proof, "evaluate", evaluated)
    api.train(config, tmp_path / "run", poc=8, gates=["accuracy >= 0"])


def test_a_sample_that_fails_stops_before_the_full_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch, 0.5)
    with pytest.raises(VerificationError) as caught:
        api.train(config, tmp_path / "run", poc=8, gates=["macro_f1 >= 55%"])
    assert asked[0][1] == ["macro_f1 >= 55%"]
    assert str(caught.value) == (
        "the proof of concept on 8 rows failed (macro_f1 >= 55%: 0.5, needed >= 0.55); the full run was not started. "
        f"{tmp_path / 'run-poc' / 'report.html'} shows its answers"
    )
    assert not (tmp_path / "run").exists()


def test_it_is_measured_for_real(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"accuracy > 100%: [0-9.]+, needed > 1"):
        api.train(config, tmp_path / "run", poc=8, gates=["accuracy >= baseline - 100pt", "accuracy > 100%"])
    (path,) = (tmp_path / "run-poc" / "evaluations").glob("*.json")
    assert path.name == "bins.json"


def test_what_it_needs(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gates are what a proof of concept is held to: pass poc \(--poc N\)"):
        api.train(config, tmp_path / "run", gates=["accuracy >= 0.5"])
    for gates, poc, out, message in (
        (["accuracy"], 8, "run", "gate 'accuracy': expected"),
        (["acuracy >= 0.5"], 8, "run", "gate 'acuracy >= 0.5': the task label has no metric acuracy"),
        (["accuracy >= run:nowhere"], 8, "run", "gate: there is no run 'nowhere'"),
        ([], 24, "run", "a proof of concept on 24 rows would be the whole run: there are 24 training rows"),
        ([], 8, "there", "there exists already"),
    ):
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / "file").touch()
        with pytest.raises((ConfigError, RunError), match=message):
            api.train(config, tmp_path / out, poc=poc, gates=gates)
    config.data.eval_path = None
    with pytest.raises(ConfigError, match=r"a proof of concept needs held-out data .* pass --eval-data"):
        api.train(config, tmp_path / "run", poc=8)
    assert not list(tmp_path.glob("*-poc"))
