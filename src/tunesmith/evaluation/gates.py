"""Gates: conditions on an evaluation's metrics, which fail a run that is not good enough.

    METRIC >= 0.9                 METRIC <= 5%
    METRIC >= baseline + 5pt      METRIC >= baseline * 0.95
    METRIC >= run:NAME            METRIC >= run:NAME - 1pt

`pt` is a percentage point, of metrics that are shares of 1; other metrics are written as plain numbers. `>`, `<`, `<=` work alike. `f1` is
`macro_f1`. Values are compared as they are, without regard to their errors: who wants to be sure asks for a larger step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.errors import ConfigError

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
CONDITION = re.compile(
    rf"""\s*(?P<metric>[\w.,@/-]+?)\s*(?P<sign>>=|<=|>|<)\s*
    (?:(?P<value>{NUMBER})\s*(?P<unit>%|pt)?
    |(?P<other>baseline|run:(?P<run>\S+))(?:\s*(?P<step>[-+*])\s*(?P<amount>\d+\.?\d*|\.\d+)\s*(?P<step_unit>%|pt)?)?)\s*""",
    re.VERBOSE,
)
ALIASES = {"f1": "macro_f1"}
FORM = 'expected e.g. "accuracy >= 0.9", "accuracy >= baseline + 5pt" or "macro_f1 >= run:NAME - 1pt"'
ROUNDING = 1e-9
"""Values that differ by less are equal: 0.7 + 0.05 is not 0.75 in binary."""

Metrics = Mapping[str, Mapping[str, Any]]
"""`{name: {value, stderr}}`, as evaluations have them."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition, as it was written and in its parts. `other` is None, `baseline`, or the name of a run."""

    text: str
    metric: str
    sign: str
    value: float
    other: str | None
    step: str
    unit: str

    @property
    def run(self) -> str | None:
        """The run whose metric it is held to."""
        return self.other if self.other not in (None, "baseline") else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a condition needed and what was measured."""

    condition: Condition
    value: float
    needed: float
    passed: bool

    def as_json(self) -> dict[str, Any]:
        """As evaluations write it."""
        sign = self.condition.sign
        found = {"condition": self.condition.text, "metric": self.condition.metric, "sign": sign}
        return found | {"value": self.value, "needed": self.needed, "passed": self.passed}


def parse_gates(texts: Sequence[str]) -> list[Condition]:
    """The conditions. Raises ConfigError with a line for each that is none."""
    found, problems = [], []
    for text in texts:
        match = CONDITION.fullmatch(text)
        if match is None:
            problems.append(f"gate {text!r}: {FORM}")
            continue
        metric = match["metric"]
        if match["value"] is not None:
            unit = match["unit"] or ""
            value = float(match["value"]) / (100 if unit else 1)
            found.append(Condition(text.strip(), metric, match["sign"], value, None, "", unit))
            continue
        step, unit = match["step"] or "+", match["step_unit"] or ""
        if unit == "%" or (step == "*" and unit):
            problems.append(
                f"gate {text!r}: {match['amount']}{unit} of what? Write `+ {match['amount']}pt` for percentage points, or "
                "`* 1.05` for a factor"
            )
            continue
        amount = float(match["amount"] or 0) / (100 if unit == "pt" else 1)
        found.append(Condition(text.strip(), metric, match["sign"], amount, match["run"] or "baseline", step, unit))
    if problems:
        raise ConfigError(problems)
    return found


def refuse_unmeasured(conditions: Sequence[Condition], measures: Callable[[str], bool], what: str) -> None:
    """Raise ConfigError for conditions on metrics that `what` will not measure, before it is asked."""
    problems = [
        f"gate {condition.text!r}: {what} has no metric {condition.metric}"
        for condition in conditions
        if not measures(condition.metric) and not measures(ALIASES.get(condition.metric, condition.metric))
    ]
    if problems:
        raise ConfigError(problems)


def check_gates(
    conditions: Sequence[Condition],
    metrics: Metrics,
    baseline: Metrics | None,
    metrics_of_run: Callable[[str, str], Metrics],
) -> list[Outcome]:
    """Each condition's outcome. `metrics_of_run(run, metric)` gives the metrics of another run, of which that one is looked at.

    Raises ConfigError for metrics that were not measured, and what `metrics_of_run` raises.
    """
    outcomes, problems = [], []
    for written in conditions:
        name = written.metric if written.metric in metrics else ALIASES.get(written.metric, written.metric)
        condition = replace(written, metric=name)
        sources = [("this evaluation", metrics)]
        if condition.run:
            sources.append((f"run {condition.run}", metrics_of_run(condition.run, name)))
        elif condition.other:
            sources.append(("the baseline", baseline or {}))
        missing = [
            f"gate {condition.text!r}: {where} has no metric {condition.metric}; it has {', '.join(there) or 'none'}"
            for where, there in sources
            if condition.metric not in there
        ]
        missing += [
            f"gate {condition.text!r}: {condition.metric} of {where} is not a finite number"
            for where, there in sources
            if condition.metric in there and there[condition.metric].get("value") is None
        ]
        share = metrics.get(condition.metric, {}).get("share", True)
        if not missing and share and not condition.unit and condition.step != "*" and condition.value > 1:
            number = f"{condition.value:g}"
            points = f"{number}pt" if condition.other else f"{number}%"
            missing.append(
                f"gate {condition.text!r}: {condition.metric} is a share of 1, {number} is beyond it; write {points}"
            )
        if condition.unit and not share:
            missing.append(
                f"gate {condition.text!r}: {condition.metric} is no share of 1; write a number without %, pt"
            )
        if missing:
            problems += missing
            continue
        value, needed = metrics[condition.metric]["value"], condition.value
        if condition.other:
            of_other = sources[1][1][condition.metric]["value"]
            step = condition.step
            needed = of_other * needed if step == "*" else of_other + needed if step == "+" else of_other - needed
        passed = {
            ">=": value >= needed - ROUNDING,
            "<=": value <= needed + ROUNDING,
            ">": value > needed + ROUNDING,
            "<": value < needed - ROUNDING,
        }[condition.sign]
        outcomes.append(Outcome(condition, value, needed, passed))
    if problems:
        raise ConfigError(problems)
    return outcomes
