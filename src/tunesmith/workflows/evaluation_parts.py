"""The parts of an evaluation beside its questions: what `--retain`, `--tasks` and `--judge` name, made from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.config import EvaluationConfig, ModelConfig, RunConfig
from tunesmith.errors import ConfigError
from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.evaluation.harness import HarnessPart
from tunesmith.evaluation.judge_part import JudgePart
from tunesmith.evaluation.judge_prompts import Chat
from tunesmith.evaluation.judges import Judge, JudgeSettings, LocalJudge
from tunesmith.evaluation.memorization import MemorizationPart
from tunesmith.evaluation.parts import Part
from tunesmith.evaluation.retain import RetainPart
from tunesmith.evaluation.safety import SafetyPart
from tunesmith.models.generate import generate_greedy
from tunesmith.models.load import fetch_weights, find_model, weight_hash
from tunesmith.runs import RunFolder
from tunesmith.types import Example, Message, Progress
from tunesmith.workflows.load import LoadedModel, load
from tunesmith.workflows.rows import question_of, read_rows

OWN_TASKS = ("safety", "memorization")
"""What `--tasks` takes beside the names of lm-evaluation-harness."""

VERDICTS = "judge.jsonl"


def named_parts(settings: EvaluationConfig, config: RunConfig | None, retain: bool, tasks: Sequence[str]) -> list[Part]:
    """The parts that `--retain` and `--tasks` ask for. Raises ConfigError for settings without their part."""
    parts: list[Part] = []
    of_harness = [name for name in tasks if name not in OWN_TASKS]
    problems = []
    if settings.retain_path and not retain:
        problems.append("evaluation.retain_path has no effect without --retain")
    if settings.tasks_path and not of_harness:
        problems.append("evaluation.tasks_path has no effect without --tasks NAME")
    if "memorization" in tasks and config is None:
        problems.append(
            "memorization is measured on the rows that a run was trained on: name a run, not a model or an adapter"
        )
    if problems:
        raise ConfigError(problems)
    if retain:
        parts.append(RetainPart(settings.max_rows, settings.retain_path, settings.retain_drop, config))
    if "safety" in tasks:
        parts.append(SafetyPart())
    if "memorization" in tasks and config is not None:
        parts.append(MemorizationPart([question_of(row) for row in read_rows(config).train]))
    if of_harness:
        folder = Path(settings.tasks_path) if settings.tasks_path else None
        parts.append(
            HarnessPart(of_harness, folder, settings.max_rows, settings.num_fewshot, settings.tasks_chat_template)
        )
    return parts


def judge_part(
    settings: EvaluationConfig, rows: Sequence[Example], run: RunFolder | None, device: str, progress: Progress
) -> JudgePart:
    """The judge that the settings name, over the answers to `rows`. Raises ConfigError, MachineError."""
    judge = settings.judge
    assert judge.url is not None
    given = judge.model_dump(exclude={"url", "model"})
    path = run.path / "evaluations" / VERDICTS if run else None
    if not judge.url.startswith("local:"):
        of_endpoint = JudgeSettings(url=judge.url, model=judge.model, **given)
        return JudgePart(rows, of_endpoint, Endpoint(of_endpoint), path, progress)
    if judge.model:
        raise ConfigError(f"evaluation.judge.model has no effect on {judge.url}, which names the model; remove it")
    name = judge.url.removeprefix("local:")
    of_local = JudgeSettings(url=judge.url, model=_identity(name), **given)
    return JudgePart(rows, of_local, _local_judge(name, of_local, settings, device, progress), path, progress)


def _identity(name: str) -> str:
    """The hash of a local judge's weights, which kept verdicts are known by."""
    if RunFolder.is_run(name):
        run = RunFolder.open(name)
        return f"{run.path.name}@{run.metadata['model']['weight_hash'][:16]}"
    settings = ModelConfig(name=name)
    return f"{Path(name).name}@{weight_hash(fetch_weights(find_model(settings), settings))[:16]}"


def _local_judge(name: str, judge: JudgeSettings, settings: EvaluationConfig, device: str, progress: Progress) -> Judge:
    """A model on this machine, loaded when it is first asked: after the others have answered."""
    loaded: list[LoadedModel] = []

    def answer(chats: Sequence[Chat]) -> list[str]:
        if not loaded:
            loaded.append(load(name, device=device, progress=progress))
        model = loaded[0]
        prompts = [
            model.chat.encode_prompt([Message(turn["role"], turn["content"]) for turn in chat])  # type: ignore[arg-type]
            for chat in chats
        ]
        limit = judge.max_completion_tokens or settings.max_new_tokens
        found = generate_greedy(model.forward, model.tokenizer, prompts, limit, settings.batch_size)
        return [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]

    return LocalJudge(answer)
