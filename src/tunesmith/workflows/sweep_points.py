"""What a sweep goes over: `adapter.r=8,16,32` and `optimizer.lr=1e-5..1e-3` as axes, their grid, and the name of each point."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tunesmith.config import RunConfig, load_config
from tunesmith.errors import ConfigError
from tunesmith.yaml_files import Loader, string_keys

SECTION_NAMES = {"lora": "adapter"}
"""Other names of sections."""

NOT_SWEPT = {"training.trackers", "training.tracker_project"}

RANGE = re.compile(r"([^,\[\]{}]+?)\.\.([^,\[\]{}]+)")
LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting and its values in order; or, of a search, the `low` and `high` end of its range."""

    key: str
    values: tuple[Any, ...]
    low: int | float | None = None
    high: int | float | None = None

    @property
    def is_range(self) -> bool:
        """Whether values are drawn from between two ends."""
        return self.low is not None

    def as_json(self) -> Any:
        """Its values, or its two ends."""
        return {"low": self.low, "high": self.high} if self.is_range else list(self.values)


def parse_axes(over: Sequence[str], settings: Sequence[str] = (), search: bool = False) -> list[Axis]:
    """The axes that `--over` options say, of which `--set` options may set none. Raises ConfigError with every problem."""
    axes: list[Axis] = []
    problems: list[str] = []
    set_keys = {_canonical(setting.partition("=")[0]) for setting in settings}
    for text in over:
        key, equals, values = text.partition("=")
        key = _canonical(key)
        if not equals or not values.strip() or ("." not in key and key != "method"):
            problems.append(f"--over {text}: expected section.key=value,value,..., e.g. --over adapter.r=8,16,32")
            continue
        if any(axis.key == key for axis in axes):
            problems.append(f"--over {text}: {key} has an --over of its own already; give all values in one")
        if key in set_keys:
            problems.append(f"--over {text}: --set gives {key} one value; leave one of the two out")
        if key in NOT_SWEPT:
            problems.append(f"--over {text}: {key} changes no result")
        if key.startswith("evaluation."):
            problems.append(f"--over {text}: {key} is how runs are measured, which must be the same for all; use --set")
        try:
            axes.append(_axis(key, values.strip(), search))
        except ConfigError as error:
            problems += [f"--over {text}: {problem}" for problem in error.problems]
    if not over:
        problems.append("nothing to sweep over: pass --over, e.g. --over adapter.r=8,16,32")
    if problems:
        raise ConfigError(problems)
    return axes


def grid(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, the last axis fastest; of a range its two ends."""
    choices = [(axis.low, axis.high) if axis.is_range else axis.values for axis in axes]
    return [dict(zip((axis.key for axis in axes), point, strict=True)) for point in itertools.product(*choices)]


def point_name(axes: Sequence[Axis], point: Mapping[str, Any]) -> str:
    """A short name for a point's folder: `r=8_lr=1e-4`. A long one ends in a hash of all of it."""
    last = [axis.key.rpartition(".")[2] for axis in axes]
    names = last if len(set(last)) == len(last) else [axis.key for axis in axes]
    text = "_".join(f"{name}={_told_apart(axis, point[axis.key])}" for name, axis in zip(names, axes, strict=True))
    clean = re.sub(r"[^\w.+=-]+", "-", text)
    if clean == text and len(text) <= LONGEST_NAME:
        return text
    return f"{clean[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def configs(
    path: str | None, settings: Sequence[str], axes: Sequence[Axis], points: Sequence[Mapping[str, Any]]
) -> list[RunConfig]:
    """The configuration of each point. Raises ConfigError with every problem of any of them, each once."""
    found: list[RunConfig] = []
    problems: dict[str, list[str]] = {}
    renamed = ["=".join((_canonical(key), value)) if equals else key for key, equals, value in _parted(settings)]
    for point in points:
        try:
            found.append(load_config(path, renamed, point))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(point_name(axes, point))
    if problems:
        raise ConfigError(list(located(problems, len(points))))
    for number, config in enumerate(found):
        if config in found[:number]:
            same = point_name(axes, points[found.index(config)])
            raise ConfigError(
                f"{point_name(axes, points[number])} is {same} once more: leave one of the two values out"
            )
    return found


def located(problems: Mapping[str, Sequence[str]], points: int) -> Iterator[str]:
    """Each problem with the first point that has it, those of all `points` first and without."""
    for problem, names in sorted(problems.items(), key=lambda item: len(item[1]) != points):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield problem if len(names) == points else f"{names[0]}{more}: {problem}"


def _parted(settings: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    return (setting.partition("=") for setting in settings)


def _canonical(key: str) -> str:
    section, dot, rest = key.strip().partition(".")
    return f"{SECTION_NAMES.get(section, section)}{dot}{rest}"


def _axis(key: str, text: str, search: bool) -> Axis:
    if match := RANGE.fullmatch(text):
        low, high = (_number(end) for end in match.groups())
        if low is None or high is None or not 0 < low < high:
            raise ConfigError(f"expected a range LOW..HIGH of numbers above 0, the lower first, found {text}")
        if not search:
            raise ConfigError("a range is searched, not tried out whole: pass --trials N, or list values")
        if not (isinstance(low, int) and isinstance(high, int)):
            low, high = float(low), float(high)
        return Axis(key, (), low, high)
    try:
        values = string_keys(yaml.load(f"[{text}]", Loader))
    except yaml.YAMLError:
        values = [part.strip() for part in text.split(",")]
    repeated = [value for number, value in enumerate(values) if value in values[:number]]
    if repeated:
        raise ConfigError(f"{_short(repeated[0])} is there twice")
    return Axis(key, tuple(values))


def _number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None


def _told_apart(axis: Axis, value: Any) -> str:
    """A value in a name, longer where another value of the axis has the same short name."""
    short = _short(value)
    if axis.is_range or sum(_short(other) == short for other in axis.values) < 2:
        return short
    if isinstance(value, float):
        return repr(value)
    return f"{short}-{hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]}"


def _short(value: Any) -> str:
    """A value in a name: 8, 1e-4, true, q_proj+v_proj."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "+".join(map(_short, value))
    return str(value)
