"""JSON, numbers, and what is none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import ConfigError
from tunesmith.evaluation.structured import (
    NOT_JSON,
    json_equal,
    json_fields,
    last_number,
    number_match,
    read_json,
    read_schema,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2]}', {"a": [1, 2]}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ("```\n[1]\n```\n", [1]),
        (' {"a": 1} \n', {"a": 1}),
        ('Here it is: {"a": 1}', NOT_JSON),
        ('{"a": 1', NOT_JSON),
        ('{"a": NaN}', NOT_JSON),
        ("", NOT_JSON),
        ("[" * 100_000, NOT_JSON),
        ("3", 3),
    ],
)
def test_read_json(text: str, value: Any) -> None:
    assert read_json(text) is value if value is NOT_JSON else read_json(text) == value


@given(JSON)
def test_a_value_equals_itself_in_any_order_of_keys(value: Any) -> None:
    again = json.loads(json.dumps(value, sort_keys=True))
    assert json_equal(value, again)
    assert json_fields(value, again) == 1.0


@pytest.mark.parametrize(
    ("one", "other"), [(True, 1), (False, 0), ([1], [1, 1]), ({"a": None}, {}), ("1", 1), ({"a": True}, {"a": 1})]
)
def test_what_is_not_equal(one: Any, other: Any) -> None:
    assert not json_equal(one, other)
    assert not json_equal(other, one)


def test_one_is_one_point_zero() -> None:
    assert json_equal({"a": [1]}, {"a": [1.0]})


@pytest.mark.parametrize(
    ("expected", "answer", "value"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, 0.5),  # one of two leaves on both sides
        ({"a": 1, "b": 2}, {"a": 1}, 2 / 3),
        ({"a": {"b": 1, "c": [1, 2]}}, {"a": {"b": 1, "c": [1, 3]}}, 2 / 3),
        ({"a": 1}, NOT_JSON, 0.0),
        ({"a/b": 1}, {"a": {"b": 1}}, 0.0),
        ({}, {}, 1.0),
        ({"a": []}, {"a": {}}, 0.0),
    ],
)
def test_json_fields(expected: Any, answer: Any, value: float) -> None:
    assert json_fields(expected, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", 7),
        ("#### 1,234 dollars, not 5", 1234),
        ("the answer is -3.5", -3.5),
        ("costs $1,000,000.50!", 1_000_000.5),
        ("\N{MINUS SIGN}12 degrees", -12),
        ("about 6e3 of 7", 7),
        ("room B12", None),
        ("no number", None),
        ("v1.2.3", None),
        ("10 - 3 = 7.", 7),
        ("3/4", 4),
        ("100%", 100),
        ("답은42", 42),
        ("총42원", 42),
        ("#### 답42", 42),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numbers_are_equal_within_rounding() -> None:
    assert number_match("#### 0.3", "so 0.1 + 0.2 = 0.30000000001")
    assert not number_match("#### 3", "3 or 4")
    assert not number_match("#### 3", "three")


def test_a_schema_is_read_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "required": ["slot"]}')
    schema = read_schema(str(path))
    assert [schema.is_valid(value) for value in ({"slot": 1}, {}, [])] == [True, False, False]
    for text, message in (
        ("{", "schema.json is not JSON"),
        ('{"type": "thing"}', "schema.json is not a JSON Schema"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_schema(str(path))
    with pytest.raises(ConfigError, match=r"evaluation.json_schema: cannot read .*absent.json \(No such file"):
        read_schema(str(tmp_path / "absent.json"))
