"""Before and after: the verdict on one metric, which evaluation is shown, and how values become text."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import evaluation, make_run, page_text

from tunesmith.report import write_report
from tunesmith.report.evaluations import compare, read_evaluations
from tunesmith.report.text import as_number, count, duration, moment, number, percent


@pytest.mark.parametrize(
    ("metric", "tuned", "base", "n", "change", "verdict", "reason"),
    [
        # √(0.04² + 0.03²) = 0.05: two standard errors are 10 points.
        ("accuracy", (0.61, 0.04), (0.50, 0.03), 100, "+11.0 points", "better", "better (2.2 standard errors)"),
        ("accuracy", (0.41, 0.04), (0.52, 0.03), 100, "-11.0 points", "worse", "worse (2.2 standard errors)"),
        (
            "accuracy",
            (0.59, 0.04),
            (0.50, 0.03),
            100,
            "+9.0 points",
            "unclear",
            "no clear difference (1.8 standard errors)",
        ),
        ("accuracy", (0.50, 0.04), (0.50, 0.03), 100, "+0.0 points", "unclear", "no difference"),
        (
            "accuracy",
            (0.90, None),
            (0.50, 0.03),
            100,
            "+40.0 points",
            "unclear",
            "better, but no error bars were recorded",
        ),
        ("eval_loss", (0.5, 0.01), (0.7, 0.01), 100, "-0.200", "better", "better (14.1 standard errors)"),
        ("perplexity", (9.0, 0.1), (8.0, 0.1), 100, "+1.00", "worse", "worse (7.1 standard errors)"),
        # All wrong, then all right: on 1 row that says little, on 20 it is clear (Laplace: p = 21/22).
        (
            "accuracy",
            (1.0, 0.0),
            (0.0, 0.0),
            1,
            "+100.0 points",
            "unclear",
            "no clear difference (1.5 standard errors)",
        ),
        ("accuracy", (1.0, 0.0), (0.0, 0.0), 20, "+100.0 points", "better", "better (15.2 standard errors)"),
    ],
)
def test_verdict(
    metric: str,
    tuned: tuple[float, float | None],
    base: tuple[float, float | None],
    n: int,
    change: str,
    verdict: str,
    reason: str,
) -> None:
    found = compare(metric, tuned, base, n)
    assert (found.change, found.verdict, found.reason) == (change.replace("-", "\N{MINUS SIGN}"), verdict, reason)


def test_bars_and_whiskers() -> None:
    found = compare("accuracy", (0.98, 0.05), (0.4, 0.1))
    assert found.base is not None
    assert (found.base.value, found.base.error) == ("40.0%", "± 10.0")
    assert (found.base.width, found.base.error_left, found.base.error_width) == pytest.approx((40, 30, 20))
    assert found.tuned.error_left + found.tuned.error_width == pytest.approx(100)  # not beyond 100%
    loss = compare("loss", (1.0, 0.0), (3.0, 1.0))
    assert loss.base is not None
    assert (loss.tuned.width, loss.base.width) == pytest.approx((25, 75))
    assert compare("score", (-1.0, 0.1), (-2.0, 0.1)).tuned.width is None
    assert compare("loss", (1.0, 0.1)).tuned.width is None  # alone it would always be full


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        ({"p": 0.0312, "test": "McNemar", "verdict": "worse"}, "worse", "worse (p = 0.031, McNemar)"),
        ({"p": 0.00001, "test": "McNemar", "verdict": "better"}, "better", "better (p < 0.001, McNemar)"),
        ({"p": 0.4, "test": "paired z", "verdict": "unclear"}, "unclear", "no clear difference (p = 0.400, paired z)"),
    ],
)
def test_the_paired_test_of_the_file_decides(
    tmp_path: Path, found: dict[str, object], verdict: str, reason: str
) -> None:
    """Without it 41% against 87% of 200 rows are 11 standard errors apart."""
    run = make_run(tmp_path / "run", evaluations={"eval.json": evaluation(comparison={"accuracy": found})})
    ((shown,), _, problems) = read_evaluations(run.path / "evaluations")
    accuracy, loss = shown.comparisons
    assert problems == []
    assert (accuracy.metric, accuracy.verdict, accuracy.reason) == ("accuracy", verdict, reason)
    assert loss.reason.endswith("standard errors)")


def test_without_a_baseline_the_page_says_so(tmp_path: Path) -> None:
    rows = [row | {"baseline_answer": None, "baseline_correct": None} for row in evaluation()["examples"]]
    lone = evaluation(baseline=None, examples=rows, rows_in_file=5000)
    run = make_run(tmp_path / "run", evaluations={"test.json": lone})
    text = page_text(write_report(run).read_text(encoding="utf-8"))
    assert "classify: tuned model 200 of 5,000 rows" in text
    assert "72.5% The base model was not measured on this metric." in text
    assert "Wrong (55)" in text
    assert "Right (145)" in text
    assert "Base's answer" not in text


def test_the_newest_of_each_task_leads_and_older_ones_are_a_table(tmp_path: Path) -> None:
    old = evaluation(created="2026-11-19T10:00:00+00:00", metrics={"accuracy": {"value": 0.123, "stderr": 0.02}})
    other = evaluation(task="knowledge", created="2026-11-18T10:00:00+00:00", gate={"passed": False, "conditions": []})
    files = {"a.json": old, "b.json": evaluation(), "c.json": other}
    run = make_run(tmp_path / "run", evaluations=files)
    current, earlier, problems = read_evaluations(run.path / "evaluations")
    assert [item.file for item in current] == ["evaluations/b.json", "evaluations/c.json"]
    assert [item.file for item in earlier] == ["evaluations/a.json"]
    assert problems == []
    assert all(len(group.rows) <= 7 for item in current for group in item.groups)  # 15 rows shared by two
    text = page_text(write_report(run).read_text(encoding="utf-8"))
    assert "gate failed" in text
    assert "2026-11-19 10:00 UTC accuracy 41.0% ± 3.5 12.3% ± 2.0" in text
    assert text.count("12.3%") == 1


def test_rows_that_were_not_scored_have_their_own_group(tmp_path: Path) -> None:
    rows = [{"prompt": {"role": "user"}, "answer": "x", "correct": None}, "no row", {"correct": True}]
    run = make_run(tmp_path / "run", evaluations={"test.json": evaluation(examples=rows)})
    (current,), _, _ = read_evaluations(run.path / "evaluations")
    assert [(group.title, group.total) for group in current.groups] == [("Right", 1), ("Not scored", 1)]
    assert current.groups[1].rows[0].prompt == '{"role": "user"}'


def test_values_as_text() -> None:
    values = (12345.6, 1000, 123.4, 12.34, 0.4123, 0.0005, -2.5e-7, 0, None)
    texts = ["12,346", "1,000", "123", "12.3", "0.412", "5e-4", "-2.5e-7", "0", "not recorded"]
    assert [number(value) for value in values] == texts
    assert [count(value) for value in (4_884_480, 1.24e9, 999, None)] == ["4.88 M", "1.24 B", "999", "not recorded"]
    assert percent(0.725) == "72.5%"
    seconds = (0.5, 42, 192, 7500, 97_200, 3600, None)
    assert [duration(value) for value in seconds] == [
        "0.5 s",
        "42 s",
        "3 min 12 s",
        "2 h 5 min",
        "1 d 3 h",
        "1 h",
        "not recorded",
    ]
    assert moment("2026-11-22T10:14:00+02:00") == "2026-11-22 08:14 UTC"
    assert moment("2026-11-22T10:14:00") == "2026-11-22 10:14"
    assert [moment(0), moment("yesterday"), moment(1e30), moment(None)] == [
        "1970-01-01 00:00 UTC",
        "yesterday",
        None,
        None,
    ]
    assert [as_number(value) for value in (1, 1.5, True, "1", float("nan"), 10**400)] == [
        1.0,
        1.5,
        None,
        None,
        None,
        None,
    ]


def test_one_with_a_base_is_shown_before_a_newer_one_without(tmp_path: Path) -> None:
    """A finished run's weights stay: a later look at the tuned model alone says less."""
    compared, alone = evaluation(), evaluation(baseline=None, created="2026-11-21T10:00:00+00:00")
    run = make_run(tmp_path / "run", evaluations={"classify.json": compared, "classify-2.json": alone})
    current, earlier, _ = read_evaluations(run.path / "evaluations")
    assert [one.file for one in current] == ["evaluations/classify.json"]
    assert [one.file for one in earlier] == ["evaluations/classify-2.json"]


def test_texts_are_sorted_by_how_much_likelier_they_became(tmp_path: Path) -> None:
    rows = [
        {"line": n, "text": f"text {n}", "tokens": 9, "loss": loss, "baseline_loss": 2.0}
        for n, loss in ((1, 1.9), (2, 2.5), (3, 0.5), (4, 2.0))
    ]
    run = make_run(tmp_path / "run", evaluations={"prose.json": evaluation(examples=rows)})
    ((found,), _, _) = read_evaluations(run.path / "evaluations")
    assert [(group.title, [row.line for row in group.rows]) for group in found.groups] == [
        ("Better than the base", ["3", "1"]),
        ("Worse than the base", ["2"]),
        ("As the base", ["4"]),
    ]
    row = found.groups[0].rows[0]
    assert (row.prompt, row.answer, row.base_answer, row.correct) == ("text 3", "loss 0.500", "loss 2.00", None)


def test_free_texts_are_sorted_by_their_overlap(tmp_path: Path) -> None:
    rows = [
        {"line": n, "prompt": "q", "expected": "e", "answer": f"a{n}", "correct": False, "rougeL": value}
        for n, value in ((1, 0.5), (2, 0.1))
    ]
    run = make_run(tmp_path / "run", evaluations={"texts.json": evaluation(examples=rows, baseline=None)})
    ((found,), _, _) = read_evaluations(run.path / "evaluations")
    assert [(group.title, [row.answer for row in group.rows]) for group in found.groups] == [
        ("From the worst", ["rougeL 0.100\na2", "rougeL 0.500\na1"])
    ]
