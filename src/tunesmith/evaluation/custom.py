"""A user's own metric: a Python function in a file, `metrics.py:politeness`, called once for each row.

    def politeness(row):
        # row: {"prompt", "expected", "answer", "line"}
        return "please" in row["answer"].lower()

It returns a bool, a number, or a dict of them by name (`politeness.NAME`). The metric is their mean. Higher is better, unless the function
has an attribute `higher_is_better = False`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import ConfigError
from tunesmith.evaluation.statistics import Scores
from tunesmith.types import Generation

MAX_VALUE = 1e300
"""A value beyond this is no measurement."""

UserMetric = Callable[[dict[str, Any]], Any]


def load_metric(reference: str) -> tuple[str, UserMetric]:
    """(name, function) of `FILE.py:FUNCTION`. Raises ConfigError if there is none, or the file raises."""
    file, colon, name = reference.rpartition(":")
    path = Path(file)
    if not colon or not name.isidentifier() or path.suffix != ".py":
        raise ConfigError(f"metric {reference!r}: expected FILE.py:FUNCTION, e.g. metrics.py:politeness")
    if not path.is_file():
        raise ConfigError(f"metric {reference!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"tunesmith_metric_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"metric {reference!r}: {path}:{error.lineno}: {error.msg}") from None
    except Exception as error:  # it is the user's code: whatever it raises is theirs to mend
        raise ConfigError(f"metric {reference!r}: {path} cannot be read: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_"))
        raise ConfigError(f"metric {reference!r}: {path} has no function {name}; it has {there or 'none'}")
    return name, function


def custom_scores(name: str, function: UserMetric, rows: Sequence[Generation]) -> dict[str, Scores]:
    """The function's metrics over the rows. Raises ConfigError, with the row, for what is neither bool, number nor a dict of them."""
    higher_is_better = bool(getattr(function, "higher_is_better", True))
    by_metric: dict[str, list[float]] = {}
    for index, row in enumerate(rows):
        given = {"prompt": row.prompt, "expected": row.expected, "answer": row.answer, "line": row.line}
        try:
            found = function(given)
        except Exception as error:  # the user's code
            raise ConfigError(f"metric {name}: line {row.line}: {type(error).__name__}: {error}") from error
        values = {f"{name}.{key}": value for key, value in found.items()} if isinstance(found, dict) else {name: found}
        if index and values.keys() != by_metric.keys():
            raise ConfigError(f"metric {name}: line {row.line} gave {list(values)}, the rows before {list(by_metric)}")
        for key, value in values.items():
            if not isinstance(value, (bool, int, float, np.bool_, np.number)) or not abs(value) < MAX_VALUE:  # type: ignore[operator]
                raise ConfigError(
                    f"metric {name}: line {row.line} gave {value!r}; expected a bool, a finite number, or a dict of them"
                )
            by_metric.setdefault(key, []).append(float(value))
    return {
        key: Scores(
            len(values),
            tuple(values),
            higher_is_better=higher_is_better,
            share=all(0 <= value <= 1 for value in values),
        )
        for key, values in by_metric.items()
    }
