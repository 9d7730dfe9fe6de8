"""LLM-as-judge: a language model compares the tuned model's answers with the base's, or scores them.

After Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685):

    pairwise   every row is asked in both orders; the same answer preferred twice is a win or a loss of the tuned model, all
               else a tie. judge_win_rate = (wins + ties / 2) / judged rows; the p of wins against losses is the sign test's
    score      every answer is rated from 1 to 10. judge_score = mean over the judged rows

Judges prefer the answer that they read first, or second: asking in both orders turns that into ties, which are counted as
`inconsistent`. `first_position_share` is the share of the first among all verdicts that name an answer, 0.5 where the order
does not matter. Requests are sent in the order of their hashes, so that nothing about them depends on which model is which:
were tuned and base exchanged, the same requests would go out in the same order.

A reply without a readable verdict is asked for once more, with what was wrong; after that the row is reported with the raw text
and left out of every rate. Where more than `max_unjudged` of the rows have no verdict, those left are no fair sample: judging
stops there with a VerificationError and gives no rate at all. Verdicts that came are kept, so that a repeated run asks for
the others only.

What was left out: `response_format` (many servers do not know it), log-probabilities of the verdict's token, several judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.evaluation.judge_prompts import Chat, pairwise_chat, rubric_text, score_chat
from tunesmith.evaluation.judge_requests import Question, Session, request_key
from tunesmith.evaluation.judges import Judge, JudgeSettings
from tunesmith.evaluation.parts import PartResult
from tunesmith.evaluation.statistics import CLEAR_P, Difference, Measured, Verdict, mcnemar, mean
from tunesmith.files import sha256_text
from tunesmith.types import Progress, no_progress


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """A row to judge: what was asked, the reference answer if there is one, what the tuned and the base model said."""

    line: int
    prompt: str
    expected: str | None
    answer: str
    baseline_answer: str | None = None


def judge_rows(
    rows: Sequence[JudgedRow],
    judge: Judge,
    settings: JudgeSettings,
    cache_path: Path | None,
    progress: Progress = no_progress,
) -> PartResult:
    """Have every row judged, and measure. Verdicts that `cache_path` has are not asked for again; new ones are added to it.

    Pairwise gives `judge_win_rate`, with 0.5 as the base's value: the rate of a model against itself, to which the difference
    and its test refer. Score gives `judge_score` of both models. Without a `cache_path` nothing is kept. Raises ConfigError
    where rows do not fit the mode or more requests are needed than `max_requests`, before the first one; VerificationError
    where too many rows have no verdict; RunError and MachineError where the file cannot be written.
    """
    names = ("tuned first", "base first") if settings.mode == "pairwise" else ("tuned", "base")
    lines = [row.line for row in rows]
    session = Session(judge, settings, _questions(rows, settings), lines, cache_path, settings.form, names)
    session.run(progress)
    measure = _measure_pairs if settings.mode == "pairwise" else _measure_scores
    return measure(rows, session)


def _check_rows(rows: Sequence[JudgedRow], settings: JudgeSettings) -> None:
    if not rows:
        raise ConfigError("judging: there is no row to judge")
    without = [row.line for row in rows if row.baseline_answer is None]
    if settings.mode == "pairwise" and without:
        raise ConfigError(
            f"pairwise judging compares with the base model's answers, which are missing ({len(without)} of {len(rows)} rows, "
            f"first in line {without[0]}); evaluate with --baseline, or judge with mode score"
        )
    if 0 < len(without) < len(rows):
        raise ConfigError(
            f"judging: {len(without)} of {len(rows)} rows have no base answer; give all of them one, or none"
        )


def _questions(rows: Sequence[JudgedRow], settings: JudgeSettings) -> list[Question]:
    """The requests that judging takes, each once, in an order that tells nothing. Raises ConfigError."""
    _check_rows(rows, settings)
    rubric = rubric_text(settings.rubric)
    found: dict[str, Question] = {}
    for index, row in enumerate(rows):
        for place, chat in enumerate(_chats(rubric, row, settings)):
            key = request_key(chat, settings)
            found.setdefault(key, Question(key, chat, [])).stands_for.append((index, place))
    return [found[key] for key in sorted(found)]


def _chats(rubric: str, row: JudgedRow, settings: JudgeSettings) -> list[Chat]:
    """What has to be asked about a row: both orders, or a score for each answer."""
    answers = [row.answer] if row.baseline_answer is None else [row.answer, row.baseline_answer]
    if settings.mode == "score":
        return [score_chat(rubric, row.prompt, row.expected, answer) for answer in answers]
    if answers[0] == answers[1]:
        return []  # the same text is as good as itself: a tie, and nobody has to be asked
    return [
        pairwise_chat(rubric, row.prompt, row.expected, first, second) for first, second in (answers, reversed(answers))
    ]


_PREFERRED = ({"A": "tuned", "B": "base", "tie": "tie"}, {"A": "base", "B": "tuned", "tie": "tie"})
"""Whom a verdict prefers: of the request with the tuned model's answer first, and with the base's."""


def _measure_pairs(rows: Sequence[JudgedRow], session: Session) -> PartResult:
    """Wins, ties and losses of the tuned model over the rows that have both verdicts."""
    outcomes: list[float] = []
    verdicts: list[dict[str, Any]] = []
    named: list[str] = []
    for index, row in enumerate(rows):
        pair = [session.verdicts[index, place] for place in (0, 1) if (index, place) in session.verdicts]
        identical = row.answer == row.baseline_answer
        if len(pair) < 2 and not identical:
            continue
        letters = [str(verdict.value) for verdict in pair]
        preferred = [of[letter] for of, letter in zip(_PREFERRED, letters, strict=False)]
        named += letters
        won = preferred[0] if preferred and preferred[0] == preferred[1] else "tie"
        outcomes.append({"tuned": 1.0, "base": 0.0, "tie": 0.5}[won])
        verdict = {"tuned": "win", "base": "loss", "tie": "tie"}[won]
        reasons = [given.reason for given in pair]
        verdicts.append({"line": row.line, "verdict": verdict, "preferred": preferred, "reasons": reasons})
    rate = mean(outcomes)
    wins, losses = outcomes.count(1.0), outcomes.count(0.0)
    asked = [entry["preferred"] for entry in verdicts if entry["preferred"]]
    inconsistent = sum(first != second for first, second in asked)
    first, second = named.count("A"), named.count("B")
    p = mcnemar(wins, losses)
    counts = {
        "wins": wins,
        "ties": len(outcomes) - wins - losses,
        "losses": losses,
        "identical": len(outcomes) - len(asked),
        "inconsistent": inconsistent,
        "inconsistent_rate": inconsistent / len(asked) if asked else None,
        "first_position_share": first / (first + second) if first + second else None,
        "p": p,
    }
    verdict_on_models: Verdict = "unclear" if p >= CLEAR_P else "better" if wins > losses else "worse"
    difference = Difference(rate.value - 0.5, rate.stderr, p, "sign test", verdict_on_models)
    note = (
        f"tuned against base: {wins} wins, {counts['ties']} ties, {losses} losses; {inconsistent} of the ties because the two "
        f"orders disagree, {counts['identical']} because the answers are the same"
    )
    details = _details(session, len(outcomes), [note]) | counts | {"verdicts": verdicts}
    itself = Measured(0.5, 0.0, len(outcomes))  # the base against itself: only ties, by definition
    return PartResult({"judge_win_rate": rate}, {"judge_win_rate": itself}, {"judge_win_rate": difference}, details)


def _measure_scores(rows: Sequence[JudgedRow], session: Session) -> PartResult:
    """Mean scores over the rows whose answers all have one, so that both models are measured on the same rows."""
    answers = 1 if rows[0].baseline_answer is None else 2
    scores: list[list[float]] = []
    verdicts: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        given = [session.verdicts[index, place] for place in range(answers) if (index, place) in session.verdicts]
        if len(given) < answers:
            continue
        scores.append([float(verdict.value) for verdict in given])
        values = {"score": given[0].value, "baseline_score": given[1].value if answers == 2 else None}
        verdicts.append({"line": row.line, **values, "reasons": [verdict.reason for verdict in given]})
    measured = [mean(column, share=False) for column in zip(*scores, strict=True)]
    baseline = {"judge_score": measured[1]} if answers == 2 else None
    details = _details(session, len(scores), []) | {"verdicts": verdicts}
    return PartResult({"judge_score": measured[0]}, baseline, {}, details)


def _details(session: Session, judged: int, notes: list[str]) -> dict[str, Any]:
    """What both modes report."""
    settings = session.settings
    return {
        "mode": settings.mode,
        "rubric": {"name": settings.rubric, "sha256": sha256_text([rubric_text(settings.rubric)])},
        "rows": len(session.lines),
        "judged": judged,
        **session.report(),
        "notes": notes + session.notes(),
    }
