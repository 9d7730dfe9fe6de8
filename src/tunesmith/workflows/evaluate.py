"""Evaluate a model on a file of questions with known answers, against its base if asked, and write the result down."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tunesmith.config import EvaluationConfig, config_from_dict
from tunesmith.errors import ConfigError
from tunesmith.evaluation.answers import (
    SAMPLE_SEED,
    check_questions,
    encode_questions,
    generate_answers,
    sample_rows,
)
from tunesmith.evaluation.metrics import differences, score
from tunesmith.files import disk_errors, sha256_file, write_json
from tunesmith.runs import RunFolder
from tunesmith.types import EvalResult, Example, Generation, Progress, no_progress
from tunesmith.workflows.load import LoadedModel, load
from tunesmith.workflows.rows import read_questions


def evaluate(
    target: str | Path,
    data: str | Path,
    *,
    baseline: bool = False,
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    changes: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Score the greedy answers of `target` (run, adapter or model) to the questions in `data`.

    `changes` are evaluation settings that differ from the run's (or the defaults), e.g. {"max_rows": 200}.
    With `baseline` the base model answers the same prompts. The result (see docs/run-folder.md) is returned, and written
    to RUN/evaluations/ when `target` is a run. Raises ConfigError for wrong `changes`, and DataError with every row that
    cannot be asked, before the model is loaded.
    """
    data = str(data)
    changed = _changed_settings(changes or {})
    config = RunFolder.open(target).config if RunFolder.is_run(target) else None
    rows = read_questions(data, config.data if config else None)
    check_questions(rows)
    settings = (config.evaluation if config else EvaluationConfig()).model_copy(update=changed)
    full = config is not None and config.method == "full"
    rows_used = sample_rows(rows, settings.max_rows)
    loaded = load(
        target,
        None if full and baseline else model,  # the base's, which is loaded below
        dtype,
        device,
        progress=progress,
        check=lambda chat: encode_questions(chat, rows_used),
    )
    if baseline and not (loaded.adapted or full):
        raise ConfigError(f"{target} is itself a base model: there is no other to compare with; leave --baseline out")
    tuned = answer(loaded, rows_used, settings, progress, "answers of the tuned model" if baseline else "answers")
    before = None
    if baseline and full:
        base = load(target, model, dtype, device, base=True, progress=progress)
        before = answer(base, rows_used, settings, progress, "answers of the base model")
    elif baseline:
        before = answer(loaded, rows_used, settings, progress, "answers of the base model", base=True)
    result = summarize(data, rows, tuned, before, settings)
    if loaded.run:
        result["path"] = str(write_evaluation(loaded.run, result))
    return result


def answer(
    loaded: LoadedModel,
    rows: Sequence[Example],
    settings: EvaluationConfig,
    progress: Progress,
    stage: str,
    base: bool = False,
) -> list[Generation]:
    """Answers of a loaded model, or (`base`) of the base below its adapter."""
    with loaded.forward.model.disable_adapter() if base else nullcontext():
        return generate_answers(loaded.forward, loaded.tokenizer, loaded.chat, rows, settings, progress, stage)


def summarize(
    data: str,
    rows: Sequence[Example],
    tuned: Sequence[Generation],
    base: Sequence[Generation] | None,
    settings: EvaluationConfig,
) -> dict[str, Any]:
    """The evaluation as JSON: metrics with standard errors, the baseline's, the paired comparison of both, the settings to repeat it, every answer."""
    return {
        "task": Path(data).stem,
        "n": len(tuned),
        "metrics": _metrics(score(Path(data).stem, tuned)),
        "baseline": _metrics(score(Path(data).stem, base)) if base is not None else None,
        "comparison": {
            name: {
                "difference": found.value,
                "stderr": found.stderr,
                "p": found.p,
                "test": found.test,
                "verdict": found.verdict,
            }
            for name, found in differences(tuned, base).items()
        }
        if base is not None
        else None,
        "gate": None,
        "data": data,
        "data_sha256": sha256_file(Path(data)),
        "rows_in_file": len(rows),
        "sample_seed": SAMPLE_SEED if len(tuned) < len(rows) else None,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": {"decoding": "greedy", **settings.model_dump(exclude={"generate", "samples"})},
        "examples": [
            {
                "line": row.line,
                "prompt": row.prompt,
                "expected": row.expected,
                "answer": row.answer,
                "correct": row.correct,
                "baseline_answer": base[index].answer if base is not None else None,
                "baseline_correct": base[index].correct if base is not None else None,
            }
            for index, row in enumerate(tuned)
        ],
    }


def write_evaluation(run: RunFolder, result: dict[str, Any]) -> Path:
    """Write to RUN/evaluations/<task>.json, or <task>-2.json and so on: an earlier result is never overwritten."""
    folder = run.path / "evaluations"
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", result["task"]) or "evaluation"
    names = (f"{stem}.json" if number == 1 else f"{stem}-{number}.json" for number in range(1, 1_000_000))
    path = next(folder / name for name in names if not (folder / name).exists())
    write_json(path, result)
    return path


def _changed_settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes`, validated. Raises ConfigError with a line for each that is wrong."""
    if "generate" in changes:
        raise ConfigError("evaluation.generate has no effect here: answers are always generated; remove it")
    return config_from_dict({"evaluation": dict(changes)}).evaluation.model_dump(exclude_unset=True)


def _metrics(results: dict[str, EvalResult]) -> dict[str, dict[str, float]]:
    return {name: {"value": result.value, "stderr": result.stderr} for name, result in results.items()}
