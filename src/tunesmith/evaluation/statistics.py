"""Measurements with their errors, and whether two of them differ.

A metric is a mean over rows, or a statistic of all rows together (macro F1, BLEU of a corpus). Its standard error is

    mean of shares (0 or 1)   sqrt(p (1 - p) / n)
    mean of other values      s / sqrt(n), s with n - 1
    a statistic               standard deviation over bootstrap samples of the rows (Efron 1979)

Two models that answered the same rows are compared row by row: what is hard for both cancels out, and the error of the difference is
mostly far below that of two separate measurements. The test is two-sided:

    shares                    McNemar's, exact: of the rows that differ, b better and c worse, p = 2 P(X <= min(b, c)), X ~ B(b + c, 1/2)
                              (McNemar 1947; exact form: Edwards 1948 without the correction, Fagerland 2013)
    other means               mean of the differences over its error, normal, where n >= 30; else a permutation test that flips signs
    statistics                approximate randomization: the share of random swaps of the two models' rows that differ by as much (Noreen
                              1989; Riezler & Maxwell 2005); all swaps where at most 10 rows differ. The bootstrap's share of samples on the
                              other side of 0 (Koehn 2004) calls too many differences clear: 4 rows better of 300, none worse, p = 0.016

What was left out: corrections for several metrics at once. Who gates on many should ask for a smaller p.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SAMPLES = 1000
"""Bootstrap samples and sign flips. The smallest p they can tell is 1 / (SAMPLES + 1)."""

SEED = 0
"""Of every resampling: the same rows give the same error and the same p."""

CLEAR_P = 0.05
"""A difference counts below this p."""

Verdict = Literal["better", "worse", "unclear"]
Statistic = Callable[[Any], float]
"""The value of a statistic over rows: an array whose first axis they are, or a list. Rows may come more than once."""

Rows = Sequence[Any] | NDArray[Any]

FEW = 10
"""Rows that differ, up to which every swap is looked at."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric's value over `n` rows with its standard error (None: unknown). `rows` holds each row's value where it is their
    mean; `higher_is_better` is false for losses and rates of refusing what is safe; `share` says whether it is a fraction of 1,
    to be written in percent."""

    value: float
    stderr: float | None
    n: int
    rows: tuple[float, ...] | None = None
    higher_is_better: bool = True
    share: bool = True

    def as_json(self) -> dict[str, Any]:
        """As evaluations write it, without the rows."""
        found: dict[str, Any] = {"value": self.value, "stderr": self.stderr, "n": self.n}
        return found | {"higher_is_better": self.higher_is_better, "share": self.share}


@dataclass(frozen=True, slots=True)
class Difference:
    """Tuned minus base: the difference, its standard error, and the p of a two-sided test with that name (None: none possible)."""

    value: float
    stderr: float | None
    p: float | None
    test: str
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """As evaluations write it."""
        return {
            "difference": self.value,
            "stderr": self.stderr,
            "p": self.p,
            "test": self.test,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Scores:
    """What one metric made of `n` rows: a value of each (`rows`), whose mean is the metric, or `items` of each and their statistic `of`."""

    n: int
    rows: tuple[float, ...] | None = None
    of: Statistic | None = None
    items: Rows = ()
    higher_is_better: bool = True
    share: bool = True

    @property
    def value(self) -> float:
        """The metric, without its error."""
        if self.rows is not None:
            return math.fsum(self.rows) / self.n
        assert self.of is not None
        return self.of(self.items)

    def measured(self) -> Measured:
        """The metric with its standard error."""
        if self.rows is not None:
            return mean(self.rows, self.higher_is_better, self.share)
        assert self.of is not None
        return replace(statistic(self.of, self.items, self.higher_is_better), share=self.share)

    def minus(self, base: Scores) -> Difference:
        """This metric minus that of the base's answers to the same rows, with a paired test."""
        if self.of is not None:
            return compare_statistic(self.of, self.items, base.items, self.higher_is_better)
        return compare(self.measured(), base.measured())


def mean(rows: Sequence[float], higher_is_better: bool = True, share: bool = True) -> Measured:
    """The mean of one value a row, with its standard error. Raises ValueError without rows."""
    if not rows:
        raise ValueError("a mean needs at least one row")
    n = len(rows)
    value = math.fsum(rows) / n
    if _are_shares(rows):
        error: float | None = math.sqrt(max(0.0, value * (1 - value)) / n)
    else:
        error = _deviation(rows) / math.sqrt(n) if n > 1 else None
    return Measured(value, error, n, tuple(rows), higher_is_better, share)


def statistic(of: Statistic, rows: Rows, higher_is_better: bool = True, samples: int = SAMPLES) -> Measured:
    """A statistic of rows, with the bootstrap's standard error. Raises ValueError without rows."""
    n = len(rows)
    if n < 1:
        raise ValueError("a statistic needs at least one row")
    values = [of(_take(rows, sample)) for sample in _samples(n, samples)] if n > 1 else []
    return Measured(of(rows), _deviation(values) if values else None, n, None, higher_is_better)


def compare(tuned: Measured, base: Measured) -> Difference:
    """Tuned against base, on the same rows where both have them (then paired), else as independent measurements.

    Both are of one metric. Raises ValueError where the numbers of rows differ.
    """
    assert tuned.higher_is_better == base.higher_is_better
    if tuned.n != base.n:
        raise ValueError(f"measured on {tuned.n} and {base.n} rows: only the same rows can be compared")
    value = tuned.value - base.value
    if tuned.rows is None or base.rows is None:
        error = None if tuned.stderr is None or base.stderr is None else math.hypot(tuned.stderr, base.stderr)
        p = None if not error else _two_sided(value / error)
        return _difference(value, error, p, "z", tuned.higher_is_better)
    changes = [after - before for after, before in zip(tuned.rows, base.rows, strict=True)]
    n = len(changes)
    error = _deviation(changes) / math.sqrt(n) if n > 1 else None
    if _are_shares(tuned.rows) and _are_shares(base.rows):
        return _difference(
            value, error, mcnemar(changes.count(1.0), changes.count(-1.0)), "McNemar", tuned.higher_is_better
        )
    if n >= 30:
        p = 1.0 if not any(changes) else _two_sided(value / error) if error else 0.0
        return _difference(value, error, p, "paired z", tuned.higher_is_better)
    return _difference(value, error, _sign_flips(changes), "sign flips", tuned.higher_is_better)


def compare_statistic(
    of: Statistic, tuned: Rows, base: Rows, higher_is_better: bool = True, samples: int = SAMPLES
) -> Difference:
    """A statistic of the tuned model's rows minus that of the base's rows, which are the same questions in the same order.

    The error is the paired bootstrap's, the p that of swapping both models' rows. Raises ValueError where the numbers of rows differ.
    """
    n = len(tuned)
    if n != len(base):
        raise ValueError(f"measured on {n} and {len(base)} rows: only the same rows can be compared")
    value = of(tuned) - of(base)
    found = [of(_take(tuned, sample)) - of(_take(base, sample)) for sample in _samples(n, samples)] if n > 1 else []
    p = _swaps(of, tuned, base, abs(value), samples)
    return _difference(value, _deviation(found) if found else None, p, "randomization", higher_is_better)


def _swaps(of: Statistic, tuned: Rows, base: Rows, seen: float, samples: int) -> float:
    """P(|difference with rows swapped at random| >= seen)."""
    places = [place for place in range(len(tuned)) if not np.array_equal(tuned[place], base[place])]
    least = seen * (1 - 1e-9) - 1e-12

    def beyond(swapped: NDArray[np.bool_]) -> bool:
        mask = np.zeros(len(tuned), dtype=bool)
        mask[places] = swapped
        return abs(of(_mixed(tuned, base, mask)) - of(_mixed(base, tuned, mask))) >= least

    if len(places) <= FEW:
        masks = [np.array([bits >> i & 1 for i in range(len(places))], dtype=bool) for bits in range(2 ** len(places))]
        return sum(map(beyond, masks)) / len(masks)
    generator = np.random.default_rng(SEED)
    count = sum(beyond(generator.random(len(places)) < 0.5) for _ in range(samples))
    return (count + 1) / (samples + 1)


def _take(rows: Rows, sample: NDArray[np.int64]) -> Rows:
    return rows[sample] if isinstance(rows, np.ndarray) else [rows[place] for place in sample]


def _mixed(rows: Rows, others: Rows, mask: NDArray[np.bool_]) -> Rows:
    """`rows` with those of `others` where the mask is set."""
    if isinstance(rows, np.ndarray) and isinstance(others, np.ndarray):
        return np.where(mask.reshape(-1, *[1] * (rows.ndim - 1)), others, rows)
    return [other if swapped else row for row, other, swapped in zip(rows, others, mask, strict=True)]


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p of `better` rows against `worse` ones among those that differ; 1 where none does."""
    total, least = better + worse, min(better, worse)
    if total > 1000:  # the sum's terms have 300 digits there; the normal distribution is as good
        return _two_sided(max(0.0, abs(better - worse) - 1) / math.sqrt(total))
    tail = sum(math.comb(total, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**total)


def _difference(value: float, error: float | None, p: float | None, test: str, higher_is_better: bool) -> Difference:
    clear = p is not None and p < CLEAR_P and value != 0
    verdict: Verdict = "unclear" if not clear else "better" if (value > 0) == higher_is_better else "worse"
    return Difference(value, error, p, test, verdict)


def _are_shares(rows: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in rows)


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation with n - 1."""
    center = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def _two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def _samples(n: int, count: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(SEED)
    return (generator.integers(n, size=n) for _ in range(count))


def _sign_flips(changes: Sequence[float]) -> float:
    """P(|sum with random signs| >= |sum|), all signs where there are few rows, else SAMPLES draws."""
    moving = [change for change in changes if change]
    seen = abs(math.fsum(moving)) * (1 - 1e-12)
    if len(moving) <= 10:
        signs = range(2 ** len(moving))
        sums = [math.fsum(-c if bits >> i & 1 else c for i, c in enumerate(moving)) for bits in signs]
        return sum(abs(total) >= seen for total in sums) / len(sums)
    generator = random.Random(SEED)
    drawn = [math.fsum(c if generator.random() < 0.5 else -c for c in moving) for _ in range(SAMPLES)]
    return (sum(abs(total) >= seen for total in drawn) + 1) / (SAMPLES + 1)
