"""Forgetting: general questions, before and after, that have nothing to do with what was trained.

A small fixed mix ships with the package (evaluation/sets/ATTRIBUTION.md), 885 questions:

    mmlu         285   MMLU's dev split, 5 on each of 57 subjects    letters         scored by acc
    openbookqa   500   OpenBookQA's test split                      continuation    scored by acc_norm
    copa         100   COPA                                         continuation    scored by acc

(forms and scores: evaluation/choices.py; which score is a set's usual one: the lm-evaluation-harness). Prompts are plain text without
a chat template, so that base models without one are measured too. `retain` is the share of all rows that are right,
`retain.SET` that of one set. A user's own file of {question, choices, answer} rows takes the mix's place; it is asked in the form
`continuation`, scored by acc_norm, and gives `retain` alone.

The mix is for a difference between two models, not for a leaderboard: the questions are few, zero-shot, and public, so that models have
seen some. Where the base is no better than chance on a set, nothing can be forgotten there, which `details` says.

Time: one row a question of MMLU (its letters are one token), five of OpenBookQA and three of COPA; 43,000 tokens in all. SmolLM2-135M
in bf16 took 55 s of processor time on one core of an AMD EPYC (`tunesmith eval MODEL --retain`, PyTorch 2.13); time goes with the parameters, so that 1B
on such a core takes seven minutes. `limit` asks fewer: every n-th question of each set, in proportion to the sets' sizes
(MMLU's rows are in order of subject, so that these too are spread).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import RunConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError
from tunesmith.evaluation.choices import ChoiceForm, ChoiceQuestion, Picked, picks, plain_requests, read_choices
from tunesmith.evaluation.parts import PartResult
from tunesmith.evaluation.statistics import Difference, Measured, compare, mean

if TYPE_CHECKING:
    from tunesmith.evaluation.subject import Subject

SETS: Mapping[str, tuple[str, ChoiceForm, str]] = {
    "mmlu": ("mmlu_dev.jsonl", "letters", "acc"),
    "openbookqa": ("openbookqa.jsonl", "continuation", "acc_norm"),
    "copa": ("copa.jsonl", "continuation", "acc"),
}
"""The shipped mix: file, prompt form and score of each set."""

OWN_FORM: tuple[ChoiceForm, str] = ("continuation", "acc_norm")
"""Of a user's own file."""

MAX_DROP = 0.02
"""A drop of `retain` by more than this, 2 points, is called one even where the paired test does not see it."""

SHOWN = 5
"""Questions in `details` that the base had right and the tuned model has not."""


def shipped(name: str) -> Path:
    """The path of a file of evaluation/sets."""
    with ExitStack() as stack:
        # Installed as plain files (the package is not zip-safe), so the path outlives the context.
        return stack.enter_context(resources.as_file(resources.files("tunesmith.evaluation").joinpath("sets", name)))


class RetainPart:
    """The part `retain`: general ability before and after.

    `limit` asks so many questions at most, `path` is a file to ask instead of the shipped mix, `max_drop` is the drop of
    `retain`, as a fraction of 1, from which on there is advice. `run` are the settings that trained the tuned model, which
    the advice names.
    """

    name = "retain"

    def __init__(
        self,
        limit: int | None = None,
        path: str | None = None,
        max_drop: float = MAX_DROP,
        run: RunConfig | None = None,
    ):
        if limit is not None and limit < 1:
            raise ConfigError(f"retain: limit is {limit}: expected 1 or more questions, or none given for all")
        if not 0 <= max_drop < 1:
            raise ConfigError(
                f"retain: max_drop is {max_drop}: expected a fraction from 0 to below 1, e.g. 0.02 for 2 points"
            )
        self.limit, self.path, self.max_drop, self.run = limit, path, max_drop, run

    @cached_property
    def questions(self) -> list[ChoiceQuestion]:
        """What is asked, set by set. Raises DataError for a file of one's own that has other rows."""
        if self.path is not None:
            groups = [read_choices(self.path)]
        else:
            groups = [read_choices(str(shipped(file)), name) for name, (file, _, _) in SETS.items()]
        counts = _in_proportion([len(group) for group in groups], self.limit)
        return [question for group, count in zip(groups, counts, strict=True) for question in _spread(group, count)]

    def check(self, chat: ChatFormat) -> None:
        """Read the questions. Raises DataError with every problem of a file of one's own."""
        assert self.questions

    def ask(self, subject: Subject) -> list[Picked]:
        """What the model picks for each question."""
        sets = [(_form(group), list(rows)) for group, rows in groupby(self.questions, lambda row: row.group)]
        requests = [request for form, rows in sets for request in plain_requests(subject.tokenizer, rows, form)]
        found = subject.log_likelihoods(requests, "general questions")
        picked: list[Picked] = []
        start = 0
        for form, rows in sets:
            end = start + sum(len(row.choices) for row in rows)
            picked += picks(rows, found[start:end], form)
            start = end
        return picked

    def score(self, tuned: Sequence[Picked], base: Sequence[Picked] | None) -> PartResult:
        """`retain` and `retain.SET`, and in `details` what dropped and what to change."""
        after = self._measure(tuned)
        before = self._measure(base) if base is not None else None
        differences = {name: compare(after[name], before[name]) for name in after} if before is not None else {}
        details: dict[str, Any] = {
            "prompts": "plain text, without a chat template",
            "file": self.path,
            "asked": len(self.questions),
            "max_drop": self.max_drop,
            "sets": {name: self._set_details(name, after, before, differences) for name in after if name != self.name},
            "notes": self._notes(before or after, differences),
        }
        if before is not None and base is not None:
            change = differences[self.name]
            dropped = change.verdict == "worse" or -change.value > self.max_drop + 1e-9  # 2 points are not more than 2
            details |= {
                "dropped": dropped,
                "what_dropped": [name for name, found in differences.items() if found.verdict == "worse"],
                "lost": self._lost(tuned, base) if dropped else [],
                "advice": advice(self.run) if dropped else [],
            }
        return PartResult(after, before, {}, details)

    def _measure(self, picked: Sequence[Picked]) -> dict[str, Measured]:
        pairs = list(zip(self.questions, picked, strict=True))
        right = [float(_pick(question, pick) == question.answer) for question, pick in pairs]
        groups = dict.fromkeys(question.group for question in self.questions if question.group)
        sets = {
            f"{self.name}.{group}": mean(
                [hit for hit, (row, _) in zip(right, pairs, strict=True) if row.group == group]
            )
            for group in groups
        }
        return {self.name: mean(right), **sets}

    def _set_details(
        self,
        name: str,
        after: Mapping[str, Measured],
        before: Mapping[str, Measured] | None,
        differences: Mapping[str, Difference],
    ) -> dict[str, Any]:
        _, form, score = SETS[name.removeprefix(f"{self.name}.")]
        found: dict[str, Any] = {"n": after[name].n, "form": form, "scored_by": score, "value": after[name].value}
        found["chance"] = self._chance(name)
        if before is not None:
            rows_after, rows_before = after[name].rows or (), before[name].rows or ()
            changes = [a - b for a, b in zip(rows_after, rows_before, strict=True)]
            found |= {"baseline": before[name].value, "difference": differences[name].value, "p": differences[name].p}
            found |= {"lost": changes.count(-1.0), "gained": changes.count(1.0)}
        return found

    def _chance(self, name: str) -> float:
        """What picking blindly gives."""
        rows = [row for row in self.questions if name in (self.name, f"{self.name}.{row.group}")]
        return math.fsum(1 / len(row.choices) for row in rows) / len(rows)

    def _notes(self, base: Mapping[str, Measured], differences: Mapping[str, Difference]) -> list[str]:
        """What the numbers cannot say."""
        notes = []
        names = [name for name in base if name != self.name] or [self.name]
        for name in names:
            value, chance = base[name], self._chance(name)
            if value.value <= chance + 2 * (value.stderr or 0.0):
                notes.append(
                    f"{name}: {value.value:.3f} is not clearly above chance ({chance:.3f}): this model knows too little of it for a "
                    "drop to show"
                )
        if (whole := differences.get(self.name)) and whole.verdict == "unclear" and -whole.value > self.max_drop + 1e-9:
            notes.append(
                f"{self.name} dropped by {-whole.value:.3f}, more than {self.max_drop:.3f}, but {base[self.name].n} questions are too "
                f"few to be sure (p {whole.p:.2f})"
            )
        return notes

    def _lost(self, tuned: Sequence[Picked], base: Sequence[Picked]) -> list[dict[str, Any]]:
        """The first questions that the base had right and the tuned model has not."""
        lost = [
            {
                "set": row.group,
                "id": row.id,
                "question": row.question,
                "right": row.choices[row.answer],
                "picked": row.choices[_pick(row, after)],
            }
            for row, after, before in zip(self.questions, tuned, base, strict=True)
            if _pick(row, before) == row.answer != _pick(row, after)
        ]
        return lost[:SHOWN]


def advice(run: RunConfig | None) -> list[str]:
    """What to change where general ability dropped, the most likely cause first; with a run's settings, by how much.

    Sources: a rate above the usual one and many epochs move the weights further than the task asks; LoRA forgets less than full
    fine-tuning, and less at a lower rank (Biderman et al. 2024, arXiv:2405.09673); a few percent of general data in the mix
    keep most of what was known (Scialom et al. 2022, arXiv:2205.12393; Ibrahim et al. 2024, arXiv:2403.08763).
    """
    if run is None:
        return [
            "lower optimizer.lr: try half of it",
            "train for fewer epochs (training.epochs)",
            "with LoRA a lower adapter.r; instead of method full, lora",
            _mix_advice(False),
        ]
    found = []
    if run.lr > run.usual_lr:
        found.append(
            f"optimizer.lr is {run.lr:g}, above the default for {run.method} ({run.usual_lr:g}): go back to that"
        )
    if run.training.epochs > 1:
        found.append(
            f"training.epochs is {run.training.epochs:g}: try fewer; data.general_path shows at each evaluation when "
            "forgetting begins"
        )
    if run.lr <= run.usual_lr:
        found.append(f"optimizer.lr is {run.lr:g}: try {run.lr / 2:g}")
    if run.method == "full":
        found.append("method is full: lora changes less of the model (method: lora)")
    elif run.adapter.r > 4:
        found.append(f"adapter.r is {run.adapter.r}: try {run.adapter.r // 2}")
    return [*found, _mix_advice(bool(run.data.mix))]


def _mix_advice(mixed: bool) -> str:
    if mixed:
        return "data.mix: give the source with general examples a larger weight"
    return "mix general examples with yours: data.mix: [{path: TASK.jsonl, weight: 0.9}, {path: GENERAL.jsonl, weight: 0.1}]"


def _form(group: str) -> ChoiceForm:
    return SETS[group][1] if group else OWN_FORM[0]


def _pick(question: ChoiceQuestion, picked: Picked) -> int:
    """The choice that counts: by the set's score."""
    score = SETS[question.group][2] if question.group else OWN_FORM[1]
    return picked.by_total if score == "acc" else picked.by_length


def _in_proportion(sizes: Sequence[int], limit: int | None) -> list[int]:
    """`limit` divided in proportion to `sizes`; what is left after rounding down goes to the largest fractions."""
    total = sum(sizes)
    if limit is None or limit >= total:
        return list(sizes)
    counts = [size * limit // total for size in sizes]
    by_fraction = sorted(range(len(sizes)), key=lambda number: -(sizes[number] * limit % total))
    for number in by_fraction[: limit - sum(counts)]:
        counts[number] += 1
    return counts


def _spread(questions: Sequence[ChoiceQuestion], count: int) -> list[ChoiceQuestion]:
    """`count` of them at equal distances."""
    return [questions[(2 * number + 1) * len(questions) // (2 * count)] for number in range(count)]
