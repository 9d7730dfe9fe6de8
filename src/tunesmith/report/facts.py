"""What the files of a run folder say, except its evaluations: status, key numbers, what happened, settings, origin.

Every function takes what was read and returns plain text for the page. Values may be missing or of a wrong type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from tunesmith.config import RunConfig
from tunesmith.report.text import NOT_RECORDED, as_number, as_text, count, duration, number, percent
from tunesmith.types import Event

SILENCE_SECONDS = 600
"""A run without an end that logged nothing for so long is taken for dead: steps and evaluations are shorter."""

MAX_NOTICES = 100
MAX_EVALUATION_ROWS = 100


@dataclass(frozen=True, slots=True)
class Status:
    """How the run stands: a word or two, and a sentence where that needs one."""

    label: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened: its kind in a word, the step if it has one, and the message."""

    kind: str
    step: str
    message: str


@dataclass(frozen=True, slots=True)
class SettingLine:
    """One line of the configuration as YAML; `default` is what the value would be otherwise, None if it is that."""

    text: str
    changed: bool = False
    default: str | None = None


@dataclass(frozen=True, slots=True)
class EvaluationTable:
    """The evaluations during training: metric names, then a row of (step, values, is the best) for each."""

    metrics: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...], bool], ...]
    left_out: int


def events_of(events: Sequence[Event], kind: str) -> list[Event]:
    """The events of one kind, in order."""
    return [event for event in events if event.get("event") == kind]


def status(events: Sequence[Event], metrics: Mapping[str, Any], now: float) -> Status:
    """Finished, stopped early, interrupted, running or not started. `now` is in seconds since the epoch.

    A run with metrics is finished, as for `tunesmith resume`, also if it was killed before it could log its end.
    """
    turns = ("start", "resume", "interrupted", "end")
    last: Event = next((event for event in reversed(events) if event.get("event") in turns), {})
    kind = last.get("event")
    if kind == "end":
        return Status(as_text(last.get("status") or "finished").replace("_", " "))
    if metrics:
        return Status("finished")
    if kind == "interrupted":
        return Status("interrupted", "It was stopped and its state saved; `tunesmith resume` continues it.")
    if not events:
        return Status("not started", "Nothing was logged yet.")
    times = [time for event in events if (time := as_number(event.get("time"))) is not None]
    silence = now - times[-1] if times else 0.0
    if silence > SILENCE_SECONDS:
        return Status(
            "interrupted",
            f"No end was recorded and the last event is {duration(silence)} old: the process was probably killed. "
            "`tunesmith resume` continues it from its last checkpoint.",
        )
    return Status("running", "This page shows the run as it was when the page was made.")


def wall_seconds(events: Sequence[Event], metrics: Mapping[str, Any]) -> float | None:
    """metrics.json's wall time, else the time between events, the pause before a resume left out."""
    if (recorded := as_number(metrics.get("wall_seconds"))) is not None:
        return recorded
    timed = [(time, event) for event in events if (time := as_number(event.get("time"))) is not None]
    if len(timed) < 2:
        return None
    return sum(
        max(0.0, after - before) for (before, _), (after, event) in pairwise(timed) if event.get("event") != "resume"
    )


def key_numbers(events: Sequence[Event], metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (name, value) pairs below the headline: from metrics.json, else from the steps so far."""
    steps = events_of(events, "step")
    start: Event = next(iter(events_of(events, "start")), {})
    seconds = _total(steps, "seconds")

    def rate(key: str) -> str:
        value = as_number(metrics.get(f"{key}_per_second"))
        if value is None and seconds:
            total = _total(steps, key)
            value = None if total is None else total / seconds
        return number(value)

    def known(key: str) -> float | None:
        value = as_number(metrics.get(key))
        return as_number(start.get(key)) if value is None else value

    memory = as_number(metrics.get("peak_memory_gb"))
    if memory is None:
        memory = max((used for step in steps if (used := as_number(step.get("memory_gb"))) is not None), default=None)
    done = as_number(metrics.get("steps"))
    if done is None and steps:
        done = as_number(steps[-1].get("step"))
    train_loss, train_label = as_number(metrics.get("train_loss")), "Training loss"
    if train_loss is None and steps:
        train_loss, train_label = as_number(steps[-1].get("loss")), "Training loss (last step)"
    eval_loss = as_number(metrics.get("eval_loss"))
    if eval_loss is None:
        eval_loss = next((loss for _, loss in reversed(eval_metric(events, "eval_loss"))), None)
    return [
        ("Examples per second", rate("examples")),
        ("Tokens per second", rate("tokens")),
        ("Supervised tokens per second", rate("supervised_tokens")),
        ("Peak memory", NOT_RECORDED if memory is None else f"{memory:.2f} GB{_planned(start)}"),
        ("Trained parameters", _parameters(known("trainable_parameters"), known("total_parameters"))),
        (train_label, number(train_loss)),
        ("Evaluation loss", "not measured" if eval_loss is None else number(eval_loss)),
        ("Steps", "0" if done is None else f"{done:,.0f}"),
        ("Wall time", duration(wall_seconds(events, metrics))),
    ]


def _planned(start: Event) -> str:
    """The peak that was predicted, beside the one that was measured, where it is the same kind of memory: on a GPU."""
    predicted = as_number(start.get("predicted_peak_gb"))
    return f" ({predicted:.2f} GB planned)" if predicted is not None and start.get("on_gpu") else ""


def _total(steps: Sequence[Event], key: str) -> float | None:
    values = [value for step in steps if (value := as_number(step.get(key))) is not None]
    return sum(values) if values else None


def _parameters(trainable: float | None, total: float | None) -> str:
    if trainable is None or not total:
        return count(trainable)
    return f"{count(trainable)} of {count(total)} ({percent(trainable / total)})"


def eval_metric(events: Sequence[Event], name: str) -> list[tuple[float, float]]:
    """(step, value) of a metric of the evaluations during training."""
    points = []
    for event in events_of(events, "eval"):
        step, value = as_number(event.get("step")), as_number(_metrics(event).get(name))
        if step is not None and value is not None:
            points.append((step, value))
    return points


def _metrics(event: Event) -> dict[str, Any]:
    metrics = event.get("metrics")
    return metrics if isinstance(metrics, dict) else {}


def samples(events: Sequence[Event]) -> list[tuple[str, ...]]:
    """(line, step, prompt, expected, answer) of the answers that were logged in training: each question's, step by step."""
    found = events_of(events, "sample")[-MAX_EVALUATION_ROWS:]
    order = sorted(found, key=lambda event: (as_number(event.get("line")) or 0, as_number(event.get("step")) or 0))
    return [
        tuple(as_text(event.get(key)) for key in ("line", "step", "prompt", "expected", "answer")) for event in order
    ]


def evaluation_table(events: Sequence[Event]) -> EvaluationTable | None:
    """The evaluations during training, the last ones if there are very many; None if there were none."""
    evaluations = [event for event in events_of(events, "eval") if _metrics(event)]
    if not evaluations:
        return None
    names = tuple(dict.fromkeys(name for event in evaluations for name in _metrics(event)))
    marked = events_of(events, "best")
    best = marked[-1].get("step") if marked else None
    shown = evaluations[-MAX_EVALUATION_ROWS:]
    rows = tuple(
        (
            as_text(event.get("step")),
            tuple(number(as_number(_metrics(event).get(name)), 4) for name in names),
            best is not None and event.get("step") == best,
        )
        for event in shown
    )
    return EvaluationTable(names, rows, len(evaluations) - len(shown))


def notices(events: Sequence[Event]) -> tuple[list[Notice], int]:
    """Warnings, decisions, interruptions and resumptions in order, each message once, and how many were left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for event in events:
        step = "" if event.get("step") is None else as_text(event["step"])
        match event.get("event"):
            case "warning" | "decision" as kind:
                message = as_text(event.get("message", ""))
            case "skipped" | "rollback" | "out_of_memory":
                kind, message = "warning", as_text(event.get("message", ""))
            case "calibration":
                kind, message = "decision", as_text(event.get("message", ""))
            case "resume" as kind:
                message = f"Continued from the checkpoint of step {step}." if step else "Continued from a checkpoint."
            case "interrupted" as kind:
                message = f"Stopped by {as_text(event.get('signal') or 'a signal')}; the state was saved."
            case _:
                continue
        found.setdefault((kind, message), []).append(step)
    lines = [
        Notice(kind, steps[0], message if len(steps) == 1 else f"{message} ({len(steps)} times, last at {steps[-1]})")
        for (kind, message), steps in found.items()
    ]
    return lines[:MAX_NOTICES], max(0, len(lines) - MAX_NOTICES)


def setting_lines(config: RunConfig) -> list[SettingLine]:
    """The configuration as YAML, line by line; what differs from the method's defaults is marked.

    The marks are to be shown as YAML comments, so that text copied from the page is still a valid configuration.
    """
    # The default rate depends on the method, so the comparison is with the defaults of this run's method.
    defaults = RunConfig(method=config.method).resolved().model_dump(mode="json")
    defaults["method"] = RunConfig().method
    return list(_compare(config.model_dump(mode="json"), defaults, ""))


def _compare(values: Mapping[str, Any], defaults: Mapping[str, Any], indent: str) -> Iterator[SettingLine]:
    for key, value in values.items():
        default = defaults[key]
        if isinstance(value, dict) and default:  # a section; a setting that is a mapping is empty by default
            yield SettingLine(f"{indent}{key}:")
            yield from _compare(value, default, indent + "  ")
            continue
        changed = value != default
        dumped = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=math.inf)
        first, *rest = dumped.rstrip("\n").split("\n")
        yield SettingLine(indent + first, changed, json.dumps(default, ensure_ascii=False) if changed else None)
        for line in rest:
            yield SettingLine(indent + line, changed)


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested dictionaries and lists as (dotted key, text) pairs; a list of plain values is one pair."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flattened(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for index, item in enumerate(value):
            yield from flattened(item, f"{prefix}.{index}")
    elif isinstance(value, list) and value:
        yield prefix, ", ".join(map(as_text, value))
    elif prefix:
        yield prefix, "none" if value in (None, {}, []) else as_text(value)
