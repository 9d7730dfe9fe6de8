"""A user's own metrics: read from a file, called for each row, refused with the row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import ConfigError
from tunesmith.evaluation.custom import custom_scores, load_metric
from tunesmith.types import Generation

ROWS = [Generation("q1", "yes", "yes please", False, 4), Generation("q2", "no", "no", True, 9)]

CODE = """
def polite(row):
    return "please" in row["answer"]

def sizes(row):
    return {"characters": len(row["answer"]), "line": row["line"] / 10}
sizes.higher_is_better = False

def wrong(row):
    return "high" if row["line"] == 9 else 1

def changing(row):
    return {row["prompt"]: 1}

def broken(row):
    return row["nope"]

def numpy_bool(row):
    import numpy
    return numpy.bool_(row["line"] == 4)

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(CODE)
    return path


def test_a_bool_is_a_share(file: Path) -> None:
    scores = custom_scores(*load_metric(f"{file}:polite"), ROWS)
    assert (scores["polite"].rows, scores["polite"].share, scores["polite"].higher_is_better) == (
        (1.0, 0.0),
        True,
        True,
    )


def test_a_dict_is_several_metrics(file: Path) -> None:
    scores = custom_scores(*load_metric(f"{file}:sizes"), ROWS)
    assert {name: one.rows for name, one in scores.items()} == {
        "sizes.characters": (10.0, 2.0),
        "sizes.line": (0.4, 0.9),
    }
    assert (scores["sizes.characters"].share, scores["sizes.characters"].higher_is_better) == (False, False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "metric wrong: line 9 gave 'high'; expected a bool, a finite number, or a dict of them"),
        ("broken", "metric broken: line 4: KeyError: 'nope'"),
        ("changing", r"metric changing: line 9 gave \['changing.q2'\], the rows before \['changing.q1'\]"),
    ],
)
def test_what_is_no_number_is_named_with_its_row(file: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        custom_scores(*load_metric(f"{file}:{name}"), ROWS)


def test_references_that_name_nothing(file: Path, tmp_path: Path) -> None:
    (tmp_path / "raising.py").write_text("1 / 0\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    for reference, message in (
        ("polite", "expected FILE.py:FUNCTION"),
        (f"{tmp_path / 'absent.py'}:polite", "there is no file"),
        (f"{file}:absent", "has no function absent; it has broken, changing, numpy_bool, polite, sizes, wrong"),
        (f"{file}:number", "has no function number"),
        (f"{tmp_path / 'broken.py'}:f", "broken.py:1: invalid syntax"),
        (f"{tmp_path / 'raising.py'}:f", r"raising.py cannot be read: ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_metric(reference)


def test_numpys_values_are_values(file: Path) -> None:
    assert custom_scores(*load_metric(f"{file}:numpy_bool"), ROWS)["numpy_bool"].rows == (1.0, 0.0)
