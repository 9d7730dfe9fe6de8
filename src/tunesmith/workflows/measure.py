"""What a run measured, kept for later plans on the same card (measurements.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from tunesmith.config import RunConfig
from tunesmith.measurements import Measurement, measured_path, record
from tunesmith.training.checkpoint import TrainState
from tunesmith.training.monitor import COMPILING
from tunesmith.types import Event, EventSink, MemoryPlan
from tunesmith.version import __version__
from tunesmith.workflows.run_plan import RunPlan

LEAST_STEPS = 20
"""Steps that a run must have timed for its speed to mean something."""


class StepTimes:
    """The speed of a process's training steps, from its `step` events, which hold no evaluation and no checkpoint.

    `ran_out` says whether one ran out of memory.

    Logged windows that begin within the first COMPILING steps are left out, and the speed is the median of the others':
    kernels are compiled in the first steps, but CUDA graphs whenever a new shape comes.
    """

    def __init__(self) -> None:
        self.steps = 0  # that were timed
        self.ran_out = False
        self._taken = self._at = 0
        self._seconds_per_token: list[float] = []

    def add(self, event: Event) -> None:
        """Take in an event of the run's log."""
        if event["event"] in ("resume", "rollback"):
            self._at = event["step"]
        elif event["event"] == "out_of_memory":
            self.ran_out = True
        elif event["event"] == "step":
            steps = event["step"] - self._at
            if self._taken >= COMPILING:
                self._seconds_per_token.append(event["seconds"] / event["tokens"])
                self.steps += steps
            self._taken += steps
            self._at = event["step"]

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, without padding; at least one window must have been timed."""
        return 1 / median(self._seconds_per_token)


def keep_measured(
    config: RunConfig,
    plan: RunPlan,
    state: TrainState,
    times: StepTimes,
    calibration: Sequence[Event],
    peak_gb: float,
    log: EventSink,
) -> None:
    """Record what a finished run measured, where it says something of its plan: one warning if that cannot be written.

    That is a run on a known card which timed LEAST_STEPS steps and never ran out of memory. `calibration` are the events of
    its dry steps, `peak_gb` is the allocator's maximum since the last one.
    """
    predicted, shape, memory = plan.choice.tokens_per_second, plan.shape, plan.memory
    if plan.card is None or predicted is None or shape is None or memory.predicted_peak_gb is None:
        return
    if times.steps < LEAST_STEPS or times.ran_out or state.halvings or state.least_memory:
        return
    found = Measurement(
        time=round(time.time(), 3),
        version=__version__,
        card=plan.card.name,
        engine=plan.setup.engine,
        method=config.method,
        scheme=plan.setup.scheme,
        model_type=shape.model_type,
        parameters=shape.num_parameters,
        host=plan.host,
        predicted_peak_gb=memory.predicted_peak_gb - plan.correction_gb,
        measured_peak_gb=_measured_peak(config, memory, calibration, peak_gb),
        predicted_tokens_per_second=predicted,
        tokens_per_second=times.tokens_per_second,
        steps=times.steps,
    )
    try:
        record(found)
    except OSError as error:
        message = (
            f"{measured_path()}: cannot be written ({error.strerror}); later plans will not know what this run measured"
        )
        log({"event": "warning", "message": message})


def _measured_peak(config: RunConfig, plan: MemoryPlan, calibration: Sequence[Event], peak_gb: float) -> float | None:
    """The larger one of the dry step's peak and the run's; the dry step's, where answers took their own memory.

    Only a dry step is sure to have the micro-batch that was predicted for, the largest that the data can give. None unless
    the last one was of this plan.
    """
    last = calibration[-1] if calibration else {"measured_gb": None}
    if last["measured_gb"] is None or last["predicted_gb"] != plan.predicted_peak_gb:
        return None
    alone = not (config.evaluation.generate or config.evaluation.samples)
    return float(max(last["measured_gb"], peak_gb) if alone else last["measured_gb"])
