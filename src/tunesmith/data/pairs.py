"""Rows of preferences as what is tokenized, and their tokens as pairs.

| objective | a pair's first sequence | its second sequence |
|---|---|---|
| `dpo`, `orpo`, `simpo` | prompt, chosen answer | prompt, rejected answer |
| `kto` | prompt, answer | the prompt, with the answer to another row's |
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from tunesmith.config import ObjectiveName
from tunesmith.data.tokens import TokenStore
from tunesmith.types import Example, Message, PreferenceExample, TokenizedPair

Row = Example | PreferenceExample


def sequences(rows: Sequence[Row]) -> list[Example]:
    """Rows as what is tokenized: of a preference pair two conversations, chosen first, in which only those turns count."""
    examples: list[Example] = []
    for row in rows:
        if isinstance(row, Example):
            examples.append(row)
            continue
        prompt = tuple(replace(message, train=False) for message in row.prompt)
        examples += [
            Example(prompt + turns, None, row.file, row.line, row.tools) for turns in (row.chosen, row.rejected)
        ]
    return examples


def pair_sequences(rows: Sequence[Row], objective: ObjectiveName, seed: int) -> list[Example]:
    """The two sequences of each pair, one after the other, for a preference objective.

    For `kto` a preference row is two rows, its chosen answer desirable and its rejected one not, and the other answer of each
    row is the next one's in an order that `seed` shuffles. Of one row alone it is its own.
    """
    if objective != "kto":
        return sequences(rows)
    labelled: list[Example] = []
    for row in rows:
        if isinstance(row, Example):
            labelled.append(row)
        else:
            for example, desirable in zip(sequences([row]), (True, False), strict=True):
                labelled.append(replace(example, desirable=desirable))
    order = list(range(len(labelled)))
    random.Random(f"{seed}/kto").shuffle(order)
    other = {index: order[(place + 1) % len(order)] for place, index in enumerate(order)}
    found: list[Example] = []
    for index, row in enumerate(labelled):
        prompt, _ = _divided(row)
        asked = tuple(replace(message, train=False) for message in prompt)
        for answered in (row, labelled[other[index]]):
            found.append(replace(row, messages=asked + _divided(answered)[1]))
    return found


def _divided(row: Example) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """A labelled row's prompt and its answer: the turns behind the last one that is not the assistant's."""
    assert row.messages is not None
    last = max((index for index, message in enumerate(row.messages) if message.role != "assistant"), default=-1)
    return row.messages[: last + 1], row.messages[last + 1 :]


class PairStore(Sequence[TokenizedPair]):
    """The pairs in a store of sequences that come from `pair_sequences`: those of which both are there.

    `lengths` are those of both sequences together. `rows` are indices of pairs. `unrolled` names rows whose answer became several
    examples, which cannot be compared. `reference` (N, 2) holds what
    `TokenizedExample.reference` says, None as long as it is not known.
    """

    def __init__(self, store: TokenStore, examples: Sequence[Example]):
        place = {int(row): index for index, row in enumerate(store.rows)}
        counts = np.bincount(store.rows, minlength=len(examples))
        self.unrolled = [
            examples[int(row)].where for row in np.flatnonzero(counts > 1)
        ]  # rows of several examples each
        self.store = store
        self._examples = examples
        once = counts == 1
        self._firsts = [place[row] for row in range(0, len(examples), 2) if once[row] and once[row + 1]]
        self.lengths = np.array(
            [store.lengths[first] + store.lengths[first + 1] for first in self._firsts], dtype=np.int32
        )
        self.rows = np.array([store.rows[first] // 2 for first in self._firsts], dtype=np.int32)
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._firsts)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = self._firsts[index]
        one, other = self.store[first], self.store[first + 1]
        return TokenizedPair(
            np.concatenate([one.input_ids, other.input_ids]),
            np.concatenate([one.loss_mask, other.loss_mask]),
            one.line,
            one.file,
            self._examples[int(self.store.rows[first])].desirable,
            None if self.reference is None else tuple(self.reference[index].tolist()),
            len(one),
        )

    def digest(self) -> str:
        """SHA-256 of every token id and mask, and of which sequences are pairs."""
        pairs = hashlib.sha256(np.array(self._firsts, dtype="<i8").tobytes()).hexdigest()
        return hashlib.sha256(f"{self.store.digest()} {pairs}".encode()).hexdigest()
