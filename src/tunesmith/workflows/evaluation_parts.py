"""The parts of an evaluation beside its questions: what `--retain`, `--tasks` and `--judge` name, made from the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tunesmith.config import EvaluationConfig, ModelConfig, RunConfig
from tunesmith.errors import ConfigError
from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.evaluation.harness import HarnessPart
from tunesmith.evaluation.judge_part import JudgePart
from tunesmith.evaluation.judge_prompts import Chat, rubric_text
from tunesmith.evaluation.judge_refusals import RefusalJudge
from tunesmith.evaluation.judges import LOCAL_MAX_COMPLETION_TOKENS, Judge, JudgeSettings, LocalJudge, Reply
from tunesmith.evaluation.memorization import MemorizationPart
from tunesmith.evaluation.parts import Part
from tunesmith.evaluation.retain import RetainPart
from tunesmith.evaluation.safety import SafetyPart
from tunesmith.models.generate import generate_greedy
from tunesmith.models.load import fetch_weights, find_model, weight_hash
from tunesmith.runs import RunFolder
from tunesmith.types import Example, Message, Progress, no_progress
from tunesmith.workflows.load import LoadedModel, load
from tunesmith.workflows.rows import question_of, read_rows

OWN_TASKS = ("safety", "memorization")
"""What `--tasks` takes beside the names of lm-evaluation-harness."""

VERDICTS = "judge.jsonl"


@dataclass(frozen=True, slots=True)
class MadeJudge:
    """The judge that the settings name, with what `judge_rows` and `RefusalJudge` need of it."""

    settings: JudgeSettings
    judge: Judge
    path: Path | None
    progress: Progress


def named_parts(
    settings: EvaluationConfig,
    config: RunConfig | None,
    retain: bool,
    tasks: Sequence[str],
    given: Mapping[str, Any] = MappingProxyType({}),
    judge: MadeJudge | None = None,
) -> list[Part]:
    """The parts that `--retain` and `--tasks` ask for.

    `given` are the settings that were changed for this evaluation, as {key: value, "judge": {key: value}}: one without its part
    would be ignored. What a run's configuration says of parts that are not asked for is no mistake. Where the settings name
    a judge, `judge` (or one made here, whose verdicts are kept nowhere) says what a refusal is, in place of the rules. Raises
    ConfigError for settings without their part, and what `make_judge` raises.
    """
    parts: list[Part] = []
    of_harness = [name for name in tasks if name not in OWN_TASKS]
    problems = []
    if settings.retain_path and not retain:
        problems.append("evaluation.retain_path has no effect without --retain")
    if settings.tasks_path and not of_harness:
        problems.append("evaluation.tasks_path has no effect without --tasks NAME")
    needs = (
        ("retain_drop", retain, "--retain"),
        ("num_fewshot", of_harness, "--tasks NAME (a task of lm-evaluation-harness)"),
        ("tasks_chat_template", of_harness, "--tasks NAME (a task of lm-evaluation-harness)"),
        ("safety_path", "safety" in tasks, "--tasks safety"),
    )
    problems += [
        f"evaluation.{key} has no effect without {needed}; remove it"
        for key, fulfilled, needed in needs
        if key in given and not fulfilled
    ]
    if settings.judge.url is None:
        problems += [
            f"evaluation.judge.{key} has no effect without a judge (--judge URL, evaluation.judge.url); remove it"
            for key in given.get("judge") or {}
            if key != "url"
        ]
    if "memorization" in tasks and config is None:
        problems.append(
            "memorization is measured on the rows that a run was trained on: name a run, not a model or an adapter"
        )
    if problems:
        raise ConfigError(problems)
    if retain:
        parts.append(RetainPart(settings.max_rows, settings.retain_path, settings.retain_drop, config))
    if "safety" in tasks:
        judge = judge or make_judge(settings, None, "auto", no_progress)
        refusals = RefusalJudge(judge.judge, judge.settings, judge.path, judge.progress) if judge else None
        parts.append(SafetyPart(settings.safety_path, refusals))
    if "memorization" in tasks and config is not None:
        parts.append(MemorizationPart([question_of(row) for row in read_rows(config).train]))
    if of_harness:
        folder = Path(settings.tasks_path) if settings.tasks_path else None
        parts.append(
            HarnessPart(of_harness, folder, settings.max_rows, settings.num_fewshot, settings.tasks_chat_template)
        )
    return parts


def make_judge(settings: EvaluationConfig, run: RunFolder | None, device: str, progress: Progress) -> MadeJudge | None:
    """The judge that the settings name, or None. One for all parts of an evaluation: a local model is loaded once.

    Raises ConfigError with every setting that is wrong, without a key, and where a rubric or a local model cannot be read;
    MachineError without the `openai` package.
    """
    judge = settings.judge
    if judge.url is None:
        return None
    path = run.path / "evaluations" / VERDICTS if run else None
    if not judge.url.startswith("local:"):
        of_endpoint = JudgeSettings.of(judge, judge.model)
        rubric_text(judge.rubric)
        return MadeJudge(of_endpoint, Endpoint(of_endpoint), path, progress)
    if judge.model:
        raise ConfigError(f"evaluation.judge.model has no effect on {judge.url}, which names the model; remove it")
    JudgeSettings.of(judge, judge.url)  # before weights are read to be hashed
    rubric_text(judge.rubric)
    name = judge.url.removeprefix("local:")
    of_local = JudgeSettings.of(judge, _identity(name))
    return MadeJudge(of_local, _local_judge(name, of_local, settings, device, progress), path, progress)


def judge_part(
    settings: EvaluationConfig,
    rows: Sequence[Example],
    run: RunFolder | None,
    device: str,
    progress: Progress,
    made: MadeJudge | None = None,
) -> JudgePart:
    """The judge that the settings name (or `made` of them) over the answers to `rows`. Raises what `make_judge` raises."""
    judge = made or make_judge(settings, run, device, progress)
    assert judge is not None
    return JudgePart(rows, judge.settings, judge.judge, judge.path, judge.progress)


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

    limit = judge.max_completion_tokens or LOCAL_MAX_COMPLETION_TOKENS

    def answer(chats: Sequence[Chat]) -> list[Reply]:
        if not loaded:
            loaded.append(load(name, device=device, progress=progress))
        model = loaded[0]
        prompts = [
            model.chat.encode_prompt([Message(turn["role"], turn["content"]) for turn in chat])  # type: ignore[arg-type]
            for chat in chats
        ]
        found = generate_greedy(model.forward, model.tokenizer, prompts, limit, settings.batch_size)
        return [Reply(model.tokenizer.decode(ids, skip_special_tokens=True), cut=len(ids) >= limit) for ids in found]

    return LocalJudge(answer)
