"""Continued pre-training: every token of plain text, and what is forgotten of other text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import ConfigError, RunError
from tunesmith.workflows.train import TrainingSession, restart
from tunesmith.workflows.training_evaluation import perplexity

Session = Callable[..., TrainingSession]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Twenty-four paragraphs that repeat themselves, four more of their kind, and four of another."""
    words = {
        "train": "the smith heats the iron and ",
        "held": "the smith heats the iron and ",
        "general": "zq xv kj wp ",
    }
    found = {}
    for name, text in words.items():
        found[name] = tmp_path / f"{name}.txt"
        paragraphs = [f"{number} {text * 4}" for number in range(24 if name == "train" else 4)]
        found[name].write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return found


@pytest.fixture
def settings(texts: dict[str, Path]) -> list[str]:
    return [
        "objective.name=cpt", f"data.path={texts['train']}", f"data.eval_path={texts['held']}",
        f"data.general_path={texts['general']}", "data.sample_by=paragraph", "training.epochs=4", "training.eval_every=4",
        "training.save_every=100",
    ]  # fmt: skip


def metrics(run: TrainingSession) -> list[dict[str, Any]]:
    return [event["metrics"] for event in run.run.events() if event["event"] == "eval"]


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_the_text_and_says_what_became_of_other_text(
    session: Session, settings: list[str], method: str, engine: str
) -> None:
    run = session(*settings, f"method={method}", f"model.engine={engine}")
    assert run.config.data.packed
    run.train()
    first, *_, last = metrics(run)
    assert last["perplexity"] < 0.8 * first["perplexity"]
    for found in (first, last):
        assert found["perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
        assert found["general_perplexity"] == pytest.approx(math.exp(found["general_loss"]))
        assert found["general_loss"] > found["eval_loss"]
    supervised = sum(event["supervised_tokens"] for event in run.run.events() if event["event"] == "step")
    tokens = sum(event["tokens"] for event in run.run.events() if event["event"] == "step")
    assert supervised == tokens - 4 * len(run.data.train), "all but the first token of each, which nothing predicts"


def test_general_text_beside_other_objectives_and_alone(session: Session, texts: dict[str, Path]) -> None:
    run = session(f"data.general_path={texts['general']}", "training.max_steps=4", "training.eval_every=2")
    run.train()
    assert [sorted(found) for found in metrics(run)] == [["general_loss", "general_perplexity"]] * 2
    for metric, known in (("eval_loss", "general_loss, general_perplexity"), ("perplexity", "general_loss, general_p")):
        with pytest.raises(ConfigError, match=f"metric is '{metric}'.* this run evaluates {known}"):
            session(f"data.general_path={texts['general']}", f"training.early_stopping.metric={metric}")


def test_a_run_stops_when_it_forgets(session: Session, settings: list[str]) -> None:
    """General text costs more from the first evaluation on: the step with the least of it is kept."""
    stopping = ["training.early_stopping.metric=general_perplexity", "training.early_stopping.patience=2"]
    run = session(*settings, "training.epochs=40", "training.eval_every=3", "optimizer.lr=3e-2", *stopping)
    assert run.train().status == "stopped_early"
    values = [found["general_perplexity"] for found in metrics(run)]
    assert values.index(min(values)) == len(values) - 3


def test_a_resumed_run_must_see_the_same_general_text(
    session: Session, settings: list[str], texts: dict[str, Path]
) -> None:
    run = session(*settings)
    texts["general"].write_text("something else\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"general\.txt has changed since this run started"):
        restart(run.run.path)


def test_perplexity_of_losses_that_are_no_numbers_to_print() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
