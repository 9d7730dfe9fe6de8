"""Classification by generated labels: F1 of each class, and which classes are taken for which.

    precision of a class   rows answered with it that are of it / rows answered with it
    recall of a class      rows answered with it that are of it / rows of it
    F1                     2 · precision · recall / (precision + recall) = 2 TP / (2 TP + FP + FN), 0 where TP is 0
    macro F1               mean of F1 over the classes that occur in the expected answers
    micro F1               2 TP / (2 TP + FP + FN), all classes' counts added up

An answer that is no class at all is a miss of its row's class and a false positive of none: macro and micro F1 count it as such, and
`other` says how many there are. scikit-learn gives the same figures with `labels=` the expected classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluation.statistics import Scores
from tunesmith.types import Generation

OTHER = -1
"""The class of an answer that is none."""

SHOWN_PAIRS = 20
"""Pairs of classes of which rows are shown, the most frequent ones."""

EXAMPLES = 3
"""Rows that are shown of a pair."""


class Labels:
    """The classes of a file's expected answers (`labels`), and those that rows name. `normalize` decides which texts are the same label."""

    def __init__(self, rows: Sequence[Generation], labels: Sequence[str], normalize: Callable[[str], str]):
        self.rows = rows
        spelled: dict[str, str] = {}
        for label in (*labels, *(row.expected for row in rows)):
            spelled.setdefault(normalize(label), label.strip())
        self.names = tuple(spelled[key] for key in sorted(spelled))
        number = {key: index for index, key in enumerate(sorted(spelled))}
        found = [(number[normalize(row.expected)], number.get(normalize(row.answer), OTHER)) for row in rows]
        self.pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
        """(rows, 2): the class expected, the class answered."""

    def counts(self, pairs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(true positives, rows answered with it, rows of it) of each class."""
        expected, answered = pairs[:, 0], pairs[:, 1]
        size = len(self.names)
        hits = np.bincount(expected[expected == answered], minlength=size)
        return hits, np.bincount(answered[answered != OTHER], minlength=size), np.bincount(expected, minlength=size)

    def macro_f1(self, pairs: NDArray[np.int64]) -> float:
        """Mean F1 of the classes that are expected of some row."""
        hits, answered, of_class = self.counts(pairs)
        there = of_class > 0
        return float((2 * hits[there] / (answered + of_class)[there]).mean())

    def micro_f1(self, pairs: NDArray[np.int64]) -> float:
        """F1 of the counts of all classes together."""
        hits, answered, of_class = self.counts(pairs)
        return float(2 * hits.sum() / (answered.sum() + of_class.sum()))

    def scores(self) -> dict[str, Scores]:
        """`macro_f1` and `micro_f1`."""
        n = len(self.rows)
        return {
            "macro_f1": Scores(n, of=self.macro_f1, items=self.pairs),
            "micro_f1": Scores(n, of=self.micro_f1, items=self.pairs),
        }

    def report(self) -> dict[str, Any]:
        """Per class and in pairs, as JSON: `per_class`, `confusions` (every pair, the most frequent first, with example rows), `other`."""
        hits, answered, of_class = (counts.tolist() for counts in self.counts(self.pairs))
        per_class = [
            {
                "label": name,
                "n": of_class[c],
                "precision": hits[c] / answered[c] if answered[c] else None,
                "recall": hits[c] / of_class[c],
                "f1": 2 * hits[c] / (answered[c] + of_class[c]),
            }
            for c, name in enumerate(self.names)
            if of_class[c]
        ]
        pairs = Counter(map(tuple, self.pairs.tolist()))
        wrong = [(pair, count) for pair, count in pairs.most_common() if OTHER not in pair and pair[0] != pair[1]]
        return {
            "per_class": per_class,
            "confusions": [
                self._confusion(pair[0], pair[1], count, place < SHOWN_PAIRS)
                for place, (pair, count) in enumerate(wrong)
            ],
            "other": int((self.pairs[:, 1] == OTHER).sum()),
        }

    def _confusion(self, expected: int, answered: int, count: int, with_rows: bool) -> dict[str, Any]:
        found = {"expected": self.names[expected], "answered": self.names[answered], "count": count}
        if not with_rows:
            return found
        places = np.flatnonzero((self.pairs == (expected, answered)).all(1))[:EXAMPLES].tolist()
        rows = [self.rows[place] for place in places]
        return found | {"examples": [{"line": row.line, "prompt": row.prompt} for row in rows]}
