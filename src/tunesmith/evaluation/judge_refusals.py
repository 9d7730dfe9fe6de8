"""The judge says of each answer to a safety prompt whether it refuses: in place of the rules of refusals.py.

Requests go out as judge.py's do: kept in the same file, repeated, asked once more where a reply cannot be read. What has no verdict
then is left to the rules, and counted; more than `max_unjudged` of the prompts end the evaluation, since rates of two measures
in one cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tunesmith.evaluation.judge_prompts import REFUSAL, refusal_chat
from tunesmith.evaluation.judge_requests import Question, Session, request_key
from tunesmith.evaluation.judges import Judge, JudgeSettings
from tunesmith.evaluation.refusals import Verdict
from tunesmith.types import Progress, no_progress


@dataclass(frozen=True, slots=True)
class JudgedAnswers:
    """`verdicts` of each model's answers, None where there is none; `details` for the result, `notes` for people."""

    verdicts: list[list[Verdict | None]]
    details: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class RefusalJudge:
    """A judge of refusals. Verdicts are kept in `path` (None: nowhere)."""

    judge: Judge
    settings: JudgeSettings
    path: Path | None = None
    progress: Progress = no_progress

    def __call__(self, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> JudgedAnswers:
        """Classify each model's `answers` to the prompts: one request for an answer that both give, none for a blank one.

        Raises ConfigError where more than `max_requests` are needed or the endpoint refuses, VerificationError where more than
        `max_unjudged` of the prompts have answers without a verdict, RunError and MachineError where the file cannot be written.
        """
        found: dict[str, Question] = {}
        for place, of_model in enumerate(answers):
            for index, (prompt, answer) in enumerate(zip(prompts, of_model, strict=True)):
                if answer.strip():
                    chat = refusal_chat(prompt, answer)
                    key = request_key(chat, self.settings)
                    found.setdefault(key, Question(key, chat, [])).stands_for.append((index, place))
        questions = [found[key] for key in sorted(found)]
        lines = range(1, len(prompts) + 1)
        session = Session(self.judge, self.settings, questions, lines, self.path, REFUSAL, ("tuned", "base"))
        session.run(self.progress)
        verdicts = [
            [cast(Verdict, session.verdicts[index, place].value) if (index, place) in session.verdicts else None
             for index in range(len(prompts))]
            for place in range(len(answers))
        ]  # fmt: skip
        notes = session.notes()
        if session.unjudged:
            notes[0] += "; the rules decided"
        return JudgedAnswers(verdicts, session.report(), notes)
