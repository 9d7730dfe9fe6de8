"""What runs measured on cards of this machine, beside what arithmetic predicted for them. Imports no PyTorch.

`train` appends a line for each run to measured.jsonl in the user's cache folder; plans for the same card read the newest
ones and say what they found. Two processes may append at once: a line is one write at the end of the file. A line that
cannot be parsed, of a process that was killed or a disk that was full, is ignored.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tunesmith.cards import Card
from tunesmith.files import cache_folder
from tunesmith.version import __version__

NEWEST_LINES = 500
"""Lines that are read, from the end of the file."""

LINE_BYTES = 1024
"""A line has about 400 bytes; of a longer file only the last NEWEST_LINES times this are read."""

NEWEST_RUNS = 5
"""Comparable runs that a figure is calibrated with, the newest ones: drivers and libraries change."""

SIMILAR = 4
"""How many times as many parameters a comparable run's model may have, or as few: a small model waits for Python's launches,
a large one for the card."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run: what was predicted for it by arithmetic alone, and what it measured.

    `card` is a name of cards.py, which knows a device (`NVIDIA H100 80GB HBM3`) and what a user calls it (`--gpu h100`) for
    the same card. `time` is in seconds since 1970, GB are 2^30 bytes, tokens are without padding. `host` is how many times
    longer launching took than on the H100's host (memory/speed.py), which is in the predicted tokens/s.
    `measured_peak_gb` is None where nothing like the prediction was measured.
    """

    time: float
    version: str
    card: str
    engine: str
    method: str
    scheme: str | None
    model_type: str
    parameters: int
    host: float
    predicted_peak_gb: float
    measured_peak_gb: float | None
    predicted_tokens_per_second: float
    tokens_per_second: float
    steps: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What comparable runs say of a plan's figures: `runs` of them, 0 where arithmetic stands alone.

    `speed` is the median of measured / predicted tokens/s, `host` of what launching took in both; `peaks` are the measured /
    predicted peaks of the runs that have one.
    """

    runs: int = 0
    speed: float = 1.0
    host: float = 1.0
    peaks: tuple[float, ...] = ()

    def basis(self, tokens_per_second: float | None) -> dict[str, Any]:
        """What figures of a plan are, as its JSON says: `memory`, `speed` (None where there is none), `runs`."""
        speed = "calibrated" if self.runs else "arithmetic"
        return {
            "memory": "arithmetic",
            "speed": None if tokens_per_second is None else speed,
            "runs": self.runs,
        }


ARITHMETIC = Calibration()
"""No run: arithmetic stands alone."""


def measured_path() -> Path:
    """The file of measurements."""
    return cache_folder() / "measured.jsonl"


def record(measurement: Measurement) -> None:
    """Append a measurement. Raises OSError where the file cannot be written."""
    path = measured_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(measurement)).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_measured() -> tuple[Measurement, ...]:
    """The newest measurements, oldest first; none where the file is missing or cannot be read.

    Those of another version of tunesmith are left out: its arithmetic may have predicted something else.
    """
    try:
        with measured_path().open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - NEWEST_LINES * LINE_BYTES))
            lines = file.read().splitlines()[-NEWEST_LINES:]
    except OSError:
        return ()
    found = [parsed for line in lines if (parsed := _parse(line)) is not None]
    return tuple(each for each in found if each.version == __version__)


def _parse(line: bytes) -> Measurement | None:
    try:
        found = Measurement(**json.loads(line))
        peak = found.predicted_peak_gb if found.measured_peak_gb is None else found.measured_peak_gb
        figures = (
            found.parameters,
            found.host,
            found.predicted_peak_gb,
            peak,
            found.predicted_tokens_per_second,
            found.tokens_per_second,
        )
        return found if all(0 < figure < math.inf for figure in figures) else None
    except (ValueError, TypeError):  # no JSON; other keys or types than ours
        return None


def calibration(
    measured: Sequence[Measurement], card: Card | None, engine: str, method: str, scheme: str | None, parameters: int
) -> Calibration:
    """What the newest runs on this card say, of the same engine, method and quantization, and a model of similar size."""
    if card is None:
        return ARITHMETIC
    found = [
        each
        for each in measured
        if (each.card, each.engine, each.method, each.scheme) == (card.name, engine, method, scheme)
        and parameters / SIMILAR <= each.parameters <= SIMILAR * parameters
    ][-NEWEST_RUNS:]
    if not found:
        return ARITHMETIC
    speed = median(each.tokens_per_second / each.predicted_tokens_per_second for each in found)
    peaks = [each.measured_peak_gb / each.predicted_peak_gb for each in found if each.measured_peak_gb is not None]
    return Calibration(len(found), speed, median(each.host for each in found), tuple(peaks))
