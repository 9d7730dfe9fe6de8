"""Errors and p-values against scipy's, against arithmetic by hand, and against simulated data where nothing differs."""

from __future__ import annotations

import math
import random
import statistics as plain

import numpy as np
import pytest

from tunesmith.evaluation.statistics import Measured, compare, compare_statistic, mcnemar, mean, statistic


def test_a_share_has_the_binomial_error() -> None:
    found = mean([1.0] * 30 + [0.0] * 10)
    assert (found.value, found.n, found.higher_is_better) == (0.75, 40, True)
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 40))


def test_other_values_have_the_error_of_a_mean() -> None:
    rows = [0.2, 0.9, 0.4, 0.55]
    found = mean(rows)
    assert found.value == pytest.approx(0.5125)
    assert found.stderr == pytest.approx(plain.stdev(rows) / 2)
    assert mean([0.3]).stderr is None


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="a mean needs at least one row"):
        mean([])
    with pytest.raises(ValueError, match="a statistic needs at least one row"):
        statistic(len, [])


def test_the_bootstrap_finds_the_error_of_a_mean() -> None:
    rows = [random.Random(1).gauss(0, 1) for _ in range(200)]
    found = statistic(plain.fmean, rows)
    assert found.value == pytest.approx(plain.fmean(rows))
    assert found.stderr == pytest.approx(mean(rows).stderr, rel=0.1)
    assert statistic(plain.fmean, rows) == found, "the same rows, the same error"
    assert statistic(np.mean, np.array(rows)).stderr == pytest.approx(found.stderr), "lists and arrays alike"


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (10, 0, 2 / 2**10),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (1, 0, 1.0),
    ],
)
def test_mcnemar_is_the_binomial_test_of_the_rows_that_differ(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == pytest.approx(p)


def test_mcnemar_of_many_rows_goes_on_where_the_exact_one_ends() -> None:
    assert mcnemar(530, 471) == pytest.approx(mcnemar(530, 470), abs=0.01)
    assert mcnemar(1_000_000, 0) == 0.0


def test_paired_shares_are_compared_row_by_row() -> None:
    """Nine rows were mended and one was broken among 100 that are right or wrong alike."""
    base = [1.0] * 50 + [0.0] * 50
    tuned = [0.0] + [1.0] * 49 + [1.0] * 9 + [0.0] * 41
    found = compare(mean(tuned), mean(base))
    assert found.value == pytest.approx(0.08)
    assert (found.test, found.verdict) == ("McNemar", "better")
    assert found.p == pytest.approx(mcnemar(9, 1))
    changes = [a - b for a, b in zip(tuned, base, strict=True)]
    assert found.stderr == pytest.approx(plain.stdev(changes) / 10)
    assert compare(mean(base), mean(tuned)).verdict == "worse"
    assert found.stderr < math.hypot(mean(tuned).stderr or 0, mean(base).stderr or 0) / 2, "what both have cancels out"


def test_lower_is_better_turns_the_verdict_only() -> None:
    base, tuned = [1.0] * 20 + [0.0] * 5, [0.0] * 25
    found = compare(mean(tuned, higher_is_better=False), mean(base, higher_is_better=False))
    assert found.value == pytest.approx(-0.8)
    assert found.verdict == "better"


def test_few_rows_are_tested_by_flipping_signs() -> None:
    """All of four differences are above 0: of 16 patterns of signs two are as far from 0."""
    found = compare(mean([0.5, 0.6, 0.7, 0.9]), mean([0.4, 0.4, 0.4, 0.4]))
    assert (found.test, found.p, found.verdict) == ("sign flips", 2 / 16, "unclear")
    clear = compare(mean([0.5 + i / 100 for i in range(20)]), mean([0.4] * 20))
    assert (clear.test, clear.verdict) == ("sign flips", "better")
    assert clear.p is not None
    assert clear.p < 0.01


def test_many_rows_are_tested_by_the_normal_distribution() -> None:
    draw = random.Random(0)
    base = [draw.random() for _ in range(400)]
    tuned = [value + draw.gauss(0.02, 0.1) for value in base]
    found = compare(mean(tuned), mean(base))
    changes = [a - b for a, b in zip(tuned, base, strict=True)]
    z = plain.fmean(changes) / (plain.stdev(changes) / 20)
    assert found.test == "paired z"
    assert found.p == pytest.approx(2 * (1 - plain.NormalDist().cdf(abs(z))))
    assert compare(mean(base), mean(base)).p == 1.0
    assert compare(mean([value + 0.5 for value in base]), mean(base)).verdict == "better"


def test_where_nothing_differs_one_p_in_twenty_is_below_a_twentieth() -> None:
    """Of 400 pairs of models alike, those called clear are 5% within four standard errors, or fewer (exact tests are cautious)."""
    draw = random.Random(3)
    clear = {"McNemar": 0, "paired z": 0}
    for _ in range(400):
        for rows in ([float(draw.random() < 0.6) for _ in range(200)], [draw.gauss(0, 1) for _ in range(200)]):
            half = compare(mean(rows[:100]), mean(rows[100:]))
            clear[half.test] += half.verdict != "unclear"
    bound = 400 * 0.05 + 4 * math.sqrt(400 * 0.05 * 0.95)
    assert 3 < clear["McNemar"] < bound
    assert 3 < clear["paired z"] < bound


def test_statistics_are_compared_on_the_same_rows() -> None:
    base = [float(i % 2) for i in range(100)]
    tuned = [1.0 if i % 10 else value for i, value in enumerate(base)]
    found = compare_statistic(plain.fmean, tuned, base)
    assert found.value == pytest.approx(0.4)
    assert found.stderr == pytest.approx(compare(mean(tuned), mean(base)).stderr, rel=0.1)
    assert (found.test, found.verdict) == ("randomization", "better")
    same = compare_statistic(plain.fmean, base, base)
    assert (same.value, same.p, same.verdict) == (0.0, 1.0, "unclear")
    assert compare_statistic(plain.fmean, base, tuned).verdict == "worse"
    with pytest.raises(ValueError, match="measured on 100 and 99 rows"):
        compare_statistic(plain.fmean, tuned, base[1:])


@pytest.mark.parametrize("better", [1, 4, 5, 8, 10, 14])
def test_a_statistic_that_is_a_mean_has_mcnemars_p(better: int) -> None:
    """Of 300 rows some are better and none is worse. The bootstrap would call 4 of them clear (p = 0.016)."""
    base = np.zeros(300)
    tuned = np.array([1.0] * better + [0.0] * (300 - better))
    p = compare_statistic(np.mean, tuned, base).p
    exact = mcnemar(better, 0)
    assert p == pytest.approx(exact) if better <= 10 else (p or 1) < 0.01


def test_where_nothing_differs_statistics_are_seldom_clear() -> None:
    draw = np.random.default_rng(0)
    clear = 0
    for _ in range(100):
        one, other = draw.normal(size=(2, 16))
        clear += compare_statistic(np.median, one, other, samples=200).verdict != "unclear"
    assert clear < 100 * 0.05 + 4 * math.sqrt(100 * 0.05 * 0.95)


def test_without_rows_two_measurements_are_taken_as_independent() -> None:
    found = compare(Measured(0.9, 0.03, 50), Measured(0.8, 0.04, 50))
    assert (found.test, found.stderr) == ("z", pytest.approx(0.05))
    assert found.p == pytest.approx(2 * (1 - plain.NormalDist().cdf(2.0)))
    assert compare(Measured(0.9, None, 50), Measured(0.8, 0.04, 50)).p is None


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="measured on 3 and 2 rows"):
        compare(mean([1.0, 0.0, 1.0]), mean([1.0, 0.0]))
