"""Evaluate a model, against its base if asked, hold it to gates, and write the result down.

An evaluation is a list of parts (evaluation/parts.py): the questions of a file, general ability, safety, and so on. Each asks the tuned
model, then the base the same, and is scored; all metrics stand in one table. Answers are kept as they come, so that an interrupted
evaluation goes on (evaluation/journal.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config import EvaluationConfig, RunConfig, config_from_dict
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, DataError, RunError
from tunesmith.evaluation.answers import SAMPLE_SEED, sample_rows
from tunesmith.evaluation.gates import Condition, Metrics, check_gates, parse_gates, refuse_unmeasured
from tunesmith.evaluation.journal import Journal, key_of
from tunesmith.evaluation.parts import Part, PartResult
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.task_part import TaskPart
from tunesmith.evaluation.tasks import Task, find_task, may_measure
from tunesmith.files import cache_folder, disk_errors, sha256_file, write_json
from tunesmith.models.load import weight_hash
from tunesmith.out_of_memory import Halving
from tunesmith.runs import RunFolder
from tunesmith.types import Example, Progress, no_progress
from tunesmith.version import __version__
from tunesmith.workflows.evaluation_parts import judge_part, make_judge, named_parts
from tunesmith.workflows.load import LoadedModel, load
from tunesmith.workflows.rows import read_questions

FOLDER = "evaluations"

COMPARED_SETTINGS = (
    "max_new_tokens", "task", "pattern", "json_schema", "metrics", "retain_path", "tasks_path", "num_fewshot",
    "tasks_chat_template",
)  # fmt: skip
"""Settings that change what is measured: gates compare evaluations that agree in them."""

ALONE = ("task", "pattern", "json_schema", "metrics", "max_new_tokens")
"""Settings of the questions, which an evaluation without --data has no use for."""


@dataclass(frozen=True, slots=True)
class Questions:
    """The rows of a file that are asked, the task that the whole file is, and what the result says of them."""

    path: str
    rows: tuple[Example, ...]
    rows_in_file: int
    task: Task

    @classmethod
    def read(cls, path: str, config: RunConfig | None, settings: EvaluationConfig) -> Questions:
        """The file's rows, or the fixed sample of them. Raises DataError with every problem."""
        rows = read_questions(path, config.data if config else None)
        if not rows:
            raise DataError(f"{path}: no rows to evaluate on")
        return cls(path, tuple(sample_rows(rows, settings.max_rows)), len(rows), find_task(rows, settings))

    def part(self) -> TaskPart:
        """The rows as a part of an evaluation."""
        return TaskPart(self.task, self.rows)

    def facts(self) -> dict[str, Any]:
        """What stands in the result, to repeat it."""
        return {
            "data": self.path,
            "data_sha256": sha256_file(Path(self.path)),
            "rows_in_file": self.rows_in_file,
            "sample_seed": SAMPLE_SEED if len(self.rows) < self.rows_in_file else None,
        }


@dataclass(slots=True)
class Asked:
    """What the two models said, by part."""

    tuned: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] | None = None


def evaluate(
    target: str | Path,
    data: str | Path | None = None,
    *,
    baseline: bool = False,
    gates: Sequence[str] = (),
    retain: bool = False,
    tasks: Sequence[str] = (),
    parts: Sequence[Part] = (),
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    changes: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure `target` (run, adapter or model): on the questions in `data`, in general (`retain`), by `tasks` and in `parts`.

    `changes` are evaluation settings that differ from the run's (or the defaults), e.g. {"max_rows": 200}. `tasks` are `safety`,
    `memorization`, and names of lm-evaluation-harness. With `baseline`, or a gate that names it, the base model gets the same prompts.
    `gates` are conditions on the metrics (evaluation/gates.py), to which `retain` adds that it may fall by `evaluation.retain_drop` at
    most; the result says which failed. An adapter over another base than it was trained on is refused, unless
    `force`. The result (see docs/run-folder.md) is returned, and written to RUN/evaluations/ when `target` is a run. Raises ConfigError
    for wrong `changes` or gates, and DataError with every row that cannot be asked, before the model is loaded.
    """
    conditions = parse_gates(gates)
    changed = _changed_settings(changes or {})
    run = RunFolder.open(target) if RunFolder.is_run(target) else None
    config = run.config if run else None
    settings = _with_changes(config.evaluation if config else EvaluationConfig(), changed)
    can_compare = run is not None or (Path(target) / "adapter_config.json").is_file()
    if retain and can_compare:
        conditions += parse_gates([f"retain >= baseline - {100 * settings.retain_drop:g}pt"])
    for condition in conditions:
        if condition.run:
            folder_of(condition.run, run)
    without_use = [f"evaluation.{key} has no effect without --data" for key in ALONE if data is None and key in changed]
    if without_use:
        raise ConfigError(without_use)
    questions = Questions.read(str(data), config, settings) if data is not None else None
    if questions is not None and not questions.task.generates and "max_new_tokens" in changed:
        raise ConfigError(f"evaluation.max_new_tokens has no effect: the task {questions.task.kind} generates nothing")
    judges_answers = settings.judge.url is not None and not (questions is None and "safety" in tasks)
    if judges_answers and (questions is None or not questions.task.generates):
        raise ConfigError(
            "a judge reads generated answers: pass --data with questions that are answered by text, or --tasks safety"
        )
    judge = make_judge(settings, run, device, progress)
    everything: list[Part] = [*named_parts(settings, config, retain, tasks, changed, judge), *parts]
    if questions is not None:
        everything.insert(0, questions.part())
        if judges_answers:
            everything.append(judge_part(settings, questions.rows, run, device, progress, judge))
    if not everything:
        raise ConfigError("nothing to evaluate: pass --data FILE, --retain, or --tasks NAME,NAME")
    if questions is not None and len(everything) == 1:
        task = questions.task
        refuse_unmeasured(conditions, lambda metric: may_measure(task, metric), f"the task {task.kind}")
    pairwise = judges_answers and settings.judge.mode == "pairwise"
    baseline = baseline or pairwise or any(condition.other == "baseline" for condition in conditions)

    def check(chat: ChatFormat) -> None:
        for part in everything:
            part.check(chat)

    full = config is not None and config.method == "full"
    loaded = load(
        target,
        None if full and baseline else model,  # the base's, which is loaded below
        dtype,
        device,
        progress=progress,
        check=check,
        force=force,
    )
    if baseline and not (loaded.adapted or full):
        why = (
            "a pairwise judge compares with the base; set evaluation.judge.mode=score"
            if pairwise
            else "leave --baseline out"
        )
        raise ConfigError(f"{target} is itself a base model: there is no other to compare with; {why}")
    identity = identity_of(loaded, force)
    journal = Journal(journal_path(loaded.run, everything, questions, settings, identity), identity)
    subject = subject_of(loaded, settings, journal, progress)
    asked = Asked()
    with journal:
        asked.tuned = {part.name: part.ask(subject) for part in everything}
        if baseline:
            if full:
                del loaded, subject  # two models may not fit
                base = load(target, model, dtype, device, base=True, progress=progress, force=force)
            else:
                base = loaded
            identity["base_weights"] = weight_hash(base.source)
            subject = subject_of(base, settings, journal, progress, base=identity["base_weights"])
            asked.base = {part.name: part.ask(subject) for part in everything}
        result = summarize(questions, everything, asked, settings, identity)
        check_result(result, conditions, run)
        if run:
            result["path"] = str(write_evaluation(run, result))
    return result


def identity_of(loaded: LoadedModel, forced: bool) -> dict[str, Any]:
    """What answers depend on beside the questions and the settings: it stands in the journal and in the result."""
    return {
        "name": loaded.source.name,
        "weights": weight_hash(loaded.source),
        "tuned": tuned_hash(loaded.run),
        "adapted": loaded.adapted,
        "forced": forced,
        "dtype": loaded.dtype,
        "device": loaded.hardware.name,
        "chat_template": loaded.chat.hash,
        "template_variables": loaded.chat.variables,
        "tunesmith": __version__,
    }


def journal_path(
    run: RunFolder | None,
    parts: Sequence[Part],
    questions: Questions | None,
    settings: EvaluationConfig,
    identity: Mapping[str, Any],
) -> Path:
    """In the run's folder; of a model or an adapter among the cached files, by what it is."""
    asked = [
        questions.path if questions else None,
        sorted(part.name for part in parts),
        settings.model_dump(mode="json"),
    ]
    if run is not None:
        return run.path / FOLDER / f".unfinished-{key_of(asked)[:12]}.jsonl"
    return cache_folder() / FOLDER / f"{key_of(asked, identity)[:24]}.jsonl"


def subject_of(
    loaded: LoadedModel, settings: EvaluationConfig, journal: Journal, progress: Progress, base: str = ""
) -> Subject:
    """The tuned model, or (`base`: the hash of its weights) the base, which an adapter is switched off for."""
    return Subject(
        "base" if base else "tuned",
        loaded.forward,
        loaded.tokenizer,
        loaded.chat,
        settings,
        journal,
        progress,
        bool(base) and loaded.adapted,
        Halving(lambda text: progress(text, 0, 1)),
        base,
    )


def tuned_hash(run: RunFolder | None) -> str | None:
    """Of the weights that a run trained."""
    if run is None:
        return None
    folder = run.adapter_path if run.adapter_path.is_dir() else run.model_path
    return key_of(*([file.name, sha256_file(file)] for file in sorted(folder.glob("*.safetensors"))))


def summarize(
    questions: Questions | None,
    parts: Sequence[Part],
    asked: Asked,
    settings: EvaluationConfig,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """The evaluation as JSON: metrics with standard errors, the baseline's, their paired comparison, the settings to repeat it, every answer."""
    results: dict[str, PartResult] = {
        part.name: part.score(asked.tuned[part.name], asked.base[part.name] if asked.base is not None else None)
        for part in parts
    }
    _refuse_two_of_a_name(results)
    task = results["task"].details if "task" in results else {}
    return {
        "task": Path(questions.path).stem if questions else "-".join(results),
        "task_kind": task.get("kind"),
        "task_reason": task.get("reason"),
        "n": len(questions.rows) if questions else max(m.n for one in results.values() for m in one.metrics.values()),
        "metrics": {name: m.as_json() for one in results.values() for name, m in one.metrics.items()},
        "baseline": {name: m.as_json() for one in results.values() for name, m in (one.baseline or {}).items()}
        if asked.base is not None
        else None,
        "comparison": {name: d.as_json() for one in results.values() for name, d in one.comparison().items()}
        if asked.base is not None
        else None,
        "gate": None,
        **(
            questions.facts()
            if questions
            else {"data": None, "data_sha256": None, "rows_in_file": None, "sample_seed": None}
        ),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": dict(model),
        "settings": {"decoding": "greedy", **settings.model_dump(mode="json", exclude={"generate", "samples"})},
        "classes": task.get("classes"),
        "parts": {name: dict(one.details) for name, one in results.items() if name != "task"},
        "examples": task.get("examples", []),
    }


def _refuse_two_of_a_name(results: Mapping[str, PartResult]) -> None:
    seen: dict[str, str] = {}
    for part, result in results.items():
        for name in result.metrics:
            if name in seen:
                raise ConfigError(f"the metric {name} is measured by {seen[name]} and by {part}; rename your own")
            seen[name] = part


def check_result(result: dict[str, Any], conditions: Sequence[Condition], run: RunFolder | None) -> None:
    """Put `gate` into the result: whether all conditions hold, and what each needed. Raises ConfigError, RunError."""
    if not conditions:
        return
    outcomes = check_gates(
        conditions,
        result["metrics"],
        result["baseline"],
        lambda name, metric: _metrics_of(folder_of(name, run), metric, result),
    )
    result["gate"] = {
        "passed": all(outcome.passed for outcome in outcomes),
        "conditions": [outcome.as_json() for outcome in outcomes],
    }


def folder_of(name: str, run: RunFolder | None) -> RunFolder:
    """The run that a gate names: a path, or the name of a folder beside the run. Raises RunError."""
    places = list(dict.fromkeys([Path(name), *([run.path.parent / name] if run else []), Path("runs") / name]))
    for place in places:
        if RunFolder.is_run(place):
            return RunFolder.open(place)
    raise RunError(f"gate: there is no run {name!r}; looked at {', '.join(map(str, places))}")


def _metrics_of(run: RunFolder, metric: str, result: Mapping[str, Any]) -> Metrics:
    """The metrics of a run's newest evaluation of the same rows with the same settings. Raises RunError if there is none."""
    same = ("data_sha256", "n", "sample_seed", "task_kind")
    found = [
        one
        for one in read_results(run)
        if all(one.get(key) == result[key] for key in same)
        and all(one.get("settings", {}).get(key) == result["settings"][key] for key in COMPARED_SETTINGS)
        and metric in one.get("metrics", {})
    ]
    if not found:
        raise RunError(
            f"gate: {run.path} has no evaluation with {metric} of these rows ({result['data']}, {result['n']} of them) with these settings; "
            f"evaluate it first: tunesmith eval {run.path} --data {result['data']}"
        )
    newest: Metrics = max(found, key=lambda one: str(one.get("created")))["metrics"]
    return newest


def read_results(run: RunFolder) -> list[dict[str, Any]]:
    """Every evaluation in a run's folder, in the order of file names. Raises RunError for a damaged file."""
    return [run.read_json(f"{FOLDER}/{path.name}") for path in sorted((run.path / FOLDER).glob("*.json"))]


def write_evaluation(run: RunFolder, result: dict[str, Any]) -> Path:
    """Write to RUN/evaluations/<task>.json, or <task>-2.json and so on: an earlier result is never overwritten."""
    folder = run.path / FOLDER
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", result["task"]).lstrip(".") or "evaluation"
    names = (f"{stem}.json" if number == 1 else f"{stem}-{number}.json" for number in range(1, 1_000_000))
    path = next(folder / name for name in names if not (folder / name).exists())
    write_json(path, result)
    return path


def _with_changes(settings: EvaluationConfig, changes: Mapping[str, Any]) -> EvaluationConfig:
    """`settings` with the changed keys, of the judge's section too."""
    judge = changes.get("judge")
    found = settings.model_copy(update={key: value for key, value in changes.items() if key != "judge"})
    return found if judge is None else found.model_copy(update={"judge": settings.judge.model_copy(update=judge)})


def _changed_settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes`, validated. Raises ConfigError with a line for each that is wrong."""
    if "generate" in changes:
        raise ConfigError("evaluation.generate has no effect here: answers are always generated; remove it")
    if "samples" in changes:
        raise ConfigError("evaluation.samples has no effect here: every answer is written; remove it")
    return config_from_dict({"evaluation": dict(changes)}).evaluation.model_dump(exclude_unset=True)
