"""Evaluation during training: the losses, scored answers, a judge's score and samples, as the configuration asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tunesmith.config import EvaluationConfig, RunConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, MachineError, UserError, VerificationError
from tunesmith.evaluation.answers import generate_answers, sample_rows
from tunesmith.evaluation.tasks import Task, find_training_task, generated_metrics, judged, score_answers
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import pad_token
from tunesmith.out_of_memory import Halving
from tunesmith.runs import RunFolder
from tunesmith.training.loop import JUDGE_SCORE, evaluate_loss
from tunesmith.training.objectives import Objective, SupervisedFineTuning
from tunesmith.types import EventSink, Example, Generation, Progress, TokenizedExample, no_progress
from tunesmith.workflows.evaluation_parts import judge_part, make_judge
from tunesmith.workflows.rows import RunData


def measured_answers(settings: EvaluationConfig) -> list[str]:
    """The metrics of answers that an evaluation during training has."""
    if not settings.generate:
        return []
    own = [reference.rpartition(":")[2] for reference in settings.metrics]
    return [*generated_metrics(settings.task), *own, *([JUDGE_SCORE] if settings.judge.url else [])]


def judge_problems(settings: EvaluationConfig) -> list[str]:
    """What is wrong with the judge that training would ask, found out before weights are read: settings, rubric, key, mode.

    Raises MachineError without the package that an endpoint needs.
    """
    if not settings.generate or settings.judge.url is None:
        return []
    problems = []
    if settings.judge.mode == "pairwise":
        problems.append(
            "evaluation.judge.mode pairwise compares with the base, which training does not ask; set evaluation.judge.mode: score, "
            "or evaluation.generate: false"
        )
    try:
        make_judge(settings, None, "auto", no_progress)
    except UserError as error:
        problems += str(error).splitlines()
    return problems


def perplexity(loss: float) -> float:
    """exp of a loss in nats a token; infinite past what a float holds."""
    return math.inf if loss > 709 else math.exp(loss)


@dataclass(slots=True)
class TrainingEvaluation:
    """Called at each evaluation with the step, it returns the metrics by name (types.Evaluate).

    Where memory does not suffice, batches are halved, and then CUDA graphs dropped. A judge or a function of the user that fails
    costs its score of that evaluation, not the run.
    """

    config: RunConfig
    run: RunFolder
    data: RunData
    forward: ModelForward
    tokenizer: Any
    chat: ChatFormat
    objective: Objective
    log: EventSink
    progress: Progress
    device: str
    step: int = 0
    crowded: bool = False
    for_loss: Halving = field(init=False)
    for_answers: Halving = field(init=False)
    task: Task | None = field(init=False)
    questions: list[Example] = field(init=False)

    def __post_init__(self) -> None:
        settings = self.config.evaluation
        self.for_loss, self.for_answers = Halving(self._warn), Halving(self._warn)
        self.questions = sample_rows(self.data.eval_rows, settings.max_rows if settings.generate else settings.samples)
        self.task = find_training_task(self.data.eval_rows, settings) if settings.generate else None

    def __call__(self, step: int, drop_graphs: Callable[[], bool]) -> Mapping[str, float]:
        """The metrics of this evaluation, by name."""
        self.step = step
        if self.crowded:
            drop_graphs()

        def give_way() -> bool:
            if not drop_graphs():
                return False
            self.crowded = True
            self._warn("evaluation ran out of memory; CUDA graphs held some of it: they are dropped for it from now on")
            return True

        self.for_loss.give_way = self.for_answers.give_way = give_way
        return {**self._losses(), **self._answers()}

    def _warn(self, text: str) -> None:
        self.log({"event": "warning", "step": self.step, "message": text})

    def _losses(self) -> dict[str, float]:
        values: dict[str, float] = {}
        if self.data.eval:
            measured: dict[str, float] = {}
            values["eval_loss"] = self._loss_on(self.data.eval, self.objective, measured)
            values |= {f"eval_{name}": value for name, value in measured.items()}
            if self.config.objective.name == "cpt":
                values["perplexity"] = perplexity(values["eval_loss"])
        if self.data.general:
            values["general_loss"] = self._loss_on(self.data.general, SupervisedFineTuning())
            values["general_perplexity"] = perplexity(values["general_loss"])
        return values

    def _loss_on(
        self, examples: Sequence[TokenizedExample], objective: Objective, metrics: dict[str, float] | None = None
    ) -> float:
        pad_id = pad_token(self.tokenizer)
        return evaluate_loss(self.forward, objective, examples, self.config, pad_id, self.for_loss, metrics)

    def _answers(self) -> dict[str, float]:
        settings = self.config.evaluation
        if not self.questions or not (settings.generate or settings.samples):
            return {}
        rows = generate_answers(
            self.forward,
            self.tokenizer,
            self.chat,
            self.questions,
            settings,
            self.progress,
            f"evaluating step {self.step}",
            self.for_answers,
        )
        values: dict[str, float] = {}
        if self.task is not None:
            values |= self._scores(self.task, judged(self.task, rows))
            if settings.judge.url:
                values |= self._judge(rows)
        for row in rows[: settings.samples]:
            self.log({"event": "sample", "step": self.step, **asdict(row)})
        return values

    def _scores(self, task: Task, rows: Sequence[Generation]) -> dict[str, float]:
        """The task's metrics; those of the user's functions are left out, with a warning, where one failed."""
        try:
            scores = score_answers(task, rows)
        except ConfigError as error:
            self._warn(f"evaluation.metrics gave nothing at step {self.step}: {error}")
            scores = score_answers(replace(task, user_metrics=()), rows)
        return {name: one.value for name, one in scores.items()}

    def _judge(self, answers: Sequence[Generation]) -> dict[str, float]:
        """The judge's mean score; nothing, with a warning, where it failed."""
        try:
            part = judge_part(self.config.evaluation, self.questions, self.run, self.device, self.progress)
            found = part.score([row.answer for row in answers], None)
        except (UserError, VerificationError, MachineError) as error:
            self._warn(f"the judge gave no score at step {self.step}: {error}")
            return {}
        return {JUDGE_SCORE: found.metrics[JUDGE_SCORE].value}
