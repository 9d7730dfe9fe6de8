"""Answers of a form: JSON and numbers.

JSON      json_valid    the answer is JSON, alone or in one Markdown code fence
          accuracy      it equals the expected value (objects in any order of keys, 1 equals 1.0)
          json_fields   F1 of its leaves, (path, value) pairs, against the expected ones'; of lists the index is part of the path
          json_schema   it obeys the JSON Schema that was given
number    accuracy      its last number equals the expected one's last (behind `####`, if there is one, as GSM8K writes it)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError

FENCE = re.compile(r"\A\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-+\N{MINUS SIGN}]?[$€£₩]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<![A-Za-z0-9_])[-+]?\.\d+"
)
ANSWER_MARK = "####"

NOT_JSON = object()
"""What `read_json` gives for a text that is no JSON."""


def read_json(text: str) -> Any:
    """The JSON value of a text, or `NOT_JSON`. NaN and Infinity are none."""
    fenced = FENCE.match(text)

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        return json.loads(fenced.group(1) if fenced else text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return NOT_JSON


def is_structure(text: str) -> bool:
    """Whether a text is a JSON object or list."""
    return isinstance(read_json(text), (dict, list))


def json_equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, 1 is 1.0."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(json_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(json_equal, one, other))
    return bool(one == other)


def json_fields(expected: Any, answer: Any) -> float:
    """F1 of the leaves of two JSON values; 1 where both have none and are equal."""
    if answer is NOT_JSON:
        return 0.0
    wanted, got = dict(_leaves(expected)), dict(_leaves(answer))
    shared = sum(path in got and json_equal(value, got[path]) for path, value in wanted.items())
    return 2 * shared / (len(wanted) + len(got)) if wanted or got else 1.0


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of what is no object or list, and of empty ones."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, (dict, list)) or not value:
        yield path, value
    for key, item in inner:
        yield from _leaves(item, f"{path}/{json.dumps(key)}")


def read_schema(path: str) -> Any:
    """A validator of the JSON Schema in a file. Raises ConfigError if it is none."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = validator_for(schema)
        kind.check_schema(schema)
    except OSError as error:
        raise ConfigError(f"evaluation.json_schema: cannot read {path} ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"evaluation.json_schema: {path} is not JSON ({error})") from None
    except SchemaError as error:
        raise ConfigError(f"evaluation.json_schema: {path} is not a JSON Schema ({error.message})") from None
    return kind(schema)


def obeys(schema: Any, answer: Any) -> bool:
    """Whether a JSON value is valid by a schema. Raises ConfigError for a schema that refers to what is not there."""
    from referencing.exceptions import Unresolvable

    if answer is NOT_JSON:
        return False
    try:
        return bool(schema.is_valid(answer))
    except Unresolvable as error:
        raise ConfigError(f"evaluation.json_schema: its reference {error.ref!r} leads nowhere") from None


def last_number(text: str) -> float | None:
    """The last number of a text, of what follows `####` the first; None if it has none. Thousands' commas and currency signs are read over."""
    _, mark, behind = text.rpartition(ANSWER_MARK)
    found = NUMBER.findall(behind if mark else text)
    if not found:
        return None
    number = found[0] if mark else found[-1]
    return float(re.sub(r"[,$€£₩]", "", number).replace("\N{MINUS SIGN}", "-"))


def number_match(expected: str, answer: str) -> bool:
    """Whether both end with the same number, within one part in a million."""
    wanted, got = last_number(expected), last_number(answer)
    return wanted is not None and got is not None and math.isclose(wanted, got, rel_tol=1e-6, abs_tol=1e-9)
