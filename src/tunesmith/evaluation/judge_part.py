"""The judge as a part of an evaluation: both models answer a file's questions, and the judge reads the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.chat import ChatFormat
from tunesmith.evaluation.answers import encode_questions
from tunesmith.evaluation.judge import JudgedRow, judge_rows
from tunesmith.evaluation.judge_prompts import question_text, rubric_text
from tunesmith.evaluation.judges import Judge, JudgeSettings
from tunesmith.evaluation.parts import PartResult
from tunesmith.evaluation.subject import Subject
from tunesmith.types import Example, Progress, no_progress


@dataclass(frozen=True, slots=True)
class JudgePart:
    """The answers to `examples`, judged. Verdicts are kept in `path` (None: nowhere). Pairwise needs the base to be asked too.

    The prompts are those of the questions' own part: what was answered there is not generated again.
    """

    examples: Sequence[Example]
    settings: JudgeSettings
    judge: Judge
    path: Path | None = None
    progress: Progress = no_progress
    name: str = "judge"

    def check(self, chat: ChatFormat) -> None:
        """Every row can be asked, and the rubric can be read. Raises DataError, ConfigError."""
        rubric_text(self.settings.rubric)
        encode_questions(chat, self.examples)

    def ask(self, subject: Subject) -> list[str]:
        """The model's answers."""
        return subject.generate(encode_questions(subject.chat, self.examples), f"answers of the {subject.name} model")

    def score(self, tuned: Sequence[str], base: Sequence[str] | None) -> PartResult:
        """What the judge made of them (judge_rows)."""
        rows = []
        of_base = [None] * len(tuned) if base is None else base
        for example, answer, before in zip(self.examples, tuned, of_base, strict=True):
            assert example.messages is not None
            *asked, expected = example.messages
            rows.append(JudgedRow(example.line, question_text(asked), expected.content, answer, before))
        return judge_rows(rows, self.judge, self.settings, self.path, self.progress)
