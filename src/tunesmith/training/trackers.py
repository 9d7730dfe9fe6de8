"""Trackers: a run's numbers as it goes, in TensorBoard or another tool. A sink of events over Accelerate's trackers.

Training scalars are called `train/NAME`, evaluation metrics `eval/NAME`, with events.jsonl's names. TensorBoard's files lie in
the run folder (`tensorboard --logdir RUN/tensorboard`), beside the configuration; the others are told the configuration, too.
Left out: texts, histograms and images. events.jsonl has everything, whatever a tracker does.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tunesmith.config import RunConfig, TrackerName
from tunesmith.errors import MachineError
from tunesmith.runs import RunFolder
from tunesmith.types import Event, EventSink

SHOWN = ("loss", "lr", "grad_norm", "epoch", "tokens_per_second", "examples_per_second", "memory_gb")
"""Of a step event."""


def trackers_of(config: RunConfig) -> Sequence[TrackerName]:
    """The trackers of a run; `auto` is TensorBoard where it is installed. Raises MachineError for one that is not."""
    chosen = config.training.trackers
    if chosen == "auto":
        return ["tensorboard"] if _installed("tensorboard") else []
    missing = [name for name in chosen if not _installed(name)]
    if missing:
        raise MachineError(
            f"training.trackers: {', '.join(missing)} cannot be imported; install with: pip install {' '.join(missing)}, or "
            "remove it from the list"
        )
    return chosen


def _installed(name: TrackerName) -> bool:
    return importlib.util.find_spec(name) is not None


@contextmanager
def tracking(config: RunConfig, run: RunFolder) -> Iterator[EventSink]:
    """The run's trackers as one EventSink, for as long as the context lasts."""
    started = []
    try:
        for name in trackers_of(config):
            started.append(_start(name, config, run))

        def sink(event: Event) -> None:
            values = _values(event)
            for tracker in started if values else ():
                tracker.log(values, step=event["step"])

        yield sink
    finally:
        for tracker in started:
            tracker.finish()


def _start(name: TrackerName, config: RunConfig, run: RunFolder) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # imports torch

    project, title = config.training.tracker_project, run.path.absolute().name
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = kind("tensorboard", run.path)
    elif name == "mlflow":
        tracker = kind(project, run_name=title)
    else:
        tracker = kind(project, name=title)
    tracker.start()
    if name != "tensorboard":
        tracker.store_init_configuration(_flat(config.model_dump(mode="json")))
    return tracker


def _values(event: Event) -> dict[str, float]:
    """What an event has to show."""
    if event["event"] == "step":
        return {f"train/{name}": event[name] for name in SHOWN if event.get(name) is not None}
    if event["event"] == "eval":
        return {f"eval/{name}": value for name, value in event["metrics"].items()}
    return {}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys; lists and tables as JSON."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.dumps(value) if isinstance(value, (dict, list)) else value
    return found
