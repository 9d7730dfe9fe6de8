"""Labels on the page: which are taken for which, by name, with the questions; bars; gates; advice of parts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_runs import evaluation, make_run, page_text

from tunesmith.report import write_report
from tunesmith.report.classes import MATRIX_LABELS, read_classes
from tunesmith.report.evaluations import compare


def label(name: str, n: int, right: int, answered: int) -> dict[str, Any]:
    return {
        "label": name,
        "n": n,
        "precision": right / answered if answered else None,
        "recall": right / n,
        "f1": 2 * right / (n + answered),
    }


def pair(expected: str, answered: str, count: int, *lines: int) -> dict[str, Any]:
    rows = [{"line": line, "prompt": f"Where is card {line}?"} for line in lines]
    return {"expected": expected, "answered": answered, "count": count, **({"examples": rows} if rows else {})}


CLASSES: dict[str, Any] = {
    "tuned": {
        "per_class": [
            label("card_arrival", 40, 30, 33),
            label("card_delivery_estimate", 40, 37, 46),
            label("top_up", 20, 20, 20),
        ],
        "confusions": [
            pair("card_arrival", "card_delivery_estimate", 9, 3, 8),
            pair("card_delivery_estimate", "card_arrival", 3, 51),
        ],
        "other": 1,
    },
    "baseline": {
        "per_class": [
            label("card_arrival", 40, 10, 20),
            label("card_delivery_estimate", 40, 0, 0),
            label("top_up", 20, 2, 80),
        ],
        "confusions": [pair("card_arrival", "card_delivery_estimate", 25)],
        "other": 31,
    },
}


def test_labels_that_are_taken_for_others() -> None:
    found = read_classes(CLASSES)
    assert found is not None
    first, second = found.pairs
    assert (first.expected, first.answered, first.count, first.before) == (
        "card_arrival",
        "card_delivery_estimate",
        9,
        25,
    )
    assert first.examples == (("3", "Where is card 3?"), ("8", "Where is card 8?"))
    assert (second.count, second.before) == (3, 0)
    assert found.matrix_names == ("card_arrival", "card_delivery_estimate")
    assert [(row.cells, row.elsewhere) for row in found.matrix] == [
        (((30, 0.75), (9, 0.225)), 1),
        (((3, 0.075), (37, 0.925)), 0),
    ]
    assert [bars.name for bars in found.worst] == ["card_arrival", "card_delivery_estimate", "top_up"]
    assert found.worst[0].tuned == pytest.approx(100 * 60 / 73)
    assert (found.worst[1].base, found.worst[1].base_text) == (0.0, "0.0%")
    assert found.no_label == "1 (base: 31)"


def test_a_matrix_has_few_labels_and_says_what_it_leaves_out() -> None:
    names = [f"label_{index:02}" for index in range(30)]
    tuned = {
        "per_class": [label(name, 10, 9, 10) for name in names],
        "confusions": [pair(name, other, 1) for name, other in pairwise(names)],
        "other": 0,
    }
    found = read_classes({"tuned": tuned, "baseline": None})
    assert found is not None
    assert len(found.matrix) == MATRIX_LABELS
    assert (found.matrix[-1].name, found.matrix[-1].elsewhere) == ("label_11", 1)
    assert (len(found.pairs), found.more_pairs) == (10, 19)
    assert (len(found.worst), len(found.others)) == (10, 20)
    assert (found.has_base, found.no_label, found.pairs[0].before) == (False, "", None)


@pytest.mark.parametrize(
    "raw", [None, {}, {"tuned": None}, {"tuned": {"per_class": [{"label": "a"}]}}, {"tuned": {"per_class": 3}}, []]
)
def test_what_is_no_report_of_labels_is_left_out(raw: Any) -> None:
    assert read_classes(raw) is None


def test_the_page_names_labels_gates_and_what_to_change(tmp_path: Path) -> None:
    gate = {
        "passed": False,
        "conditions": [
            {
                "condition": "accuracy >= baseline + 40pt",
                "metric": "accuracy",
                "sign": ">=",
                "value": 0.725,
                "needed": 0.81,
                "passed": False,
            }
        ],
    }
    parts = {"retain": {"advice": ["lower optimizer.lr"], "mmlu": {"n": 285}}}
    content = evaluation(classes=CLASSES, gate=gate, parts=parts)
    run = make_run(tmp_path / "run", events=3, evaluations={"classify.json": content})
    text = page_text(write_report(run).read_text())
    assert "card_arrival card_delivery_estimate 25 9 3: Where is card 3? 8: Where is card 8?" in text
    assert "Answers that are no label: 1 (base: 31)." in text
    assert "card_arrival 40 33.3% → 82.2%" in text
    assert "accuracy >= baseline + 40pt 0.7250 >= 0.8100 ✗ failed" in text
    assert "retain: lower optimizer.lr" in text
    assert "mmlu.n 285" in text


def test_the_file_says_which_way_is_better() -> None:
    refusals = compare("refusal_safe", (0.02, 0.01), (0.30, 0.02), 100, smaller=True, share=True)
    assert (refusals.verdict, refusals.tuned.value) == ("better", "2.0%")
    score = compare("judge_score", (0.9, 0.01), (0.5, 0.01), 100, smaller=False, share=False)
    assert (score.change, score.tuned.value) == ("+0.400", "0.9000")
