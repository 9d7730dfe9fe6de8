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
from tunesmith.types import Example, Finding, PreferenceExample, TokenizedPair

Row = Example | PreferenceExample

SEVERAL = (
    "the answer has several turns, of which the chat template lets only the last be seen as it was written",
    "an answer in parts cannot be compared: remove the row, or choose another data.chat_template",
)
SAME = (
    "chosen and rejected are the same tokens once cut to data.max_seq_length",
    "there is nothing to prefer: raise data.max_seq_length, or set data.overlong: drop",
)


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


def pair_sequences(rows: Sequence[Row], objective: ObjectiveName) -> list[Example]:
    """What is tokenized for a preference objective: the two sequences of each pair, one after the other; for `kto` one sequence a row.

    For `kto` a preference row is two rows, its chosen answer desirable and its rejected one not. Earlier answers of a conversation
    are part of the prompt.
    """
    if objective != "kto":
        return sequences(rows)
    labelled: list[Example] = []
    for row in rows:
        if isinstance(row, PreferenceExample):
            answers = zip(sequences([row]), (True, False), strict=True)
            labelled += [replace(example, desirable=desirable) for example, desirable in answers]
            continue
        assert row.messages is not None
        last = max((index for index, message in enumerate(row.messages) if message.role != "assistant"), default=-1)
        asked = tuple(replace(message, train=False) for message in row.messages[: last + 1])
        labelled.append(replace(row, messages=asked + row.messages[last + 1 :]))
    return labelled


class PairStore(Sequence[TokenizedPair]):
    """The pairs that tokenized sequences make, put together as they are asked for.

    Preferences: the sequences of `pair_sequences` two by two, where both are there. `kto`: each sequence and, as its second,
    its prompt with the answer of the next one in an order that `seed` shuffles, cut to `limit` tokens; of the next one with another
    prompt, if there is one.

    `lengths` are those of both sequences together; `rows` index the rows that were given to `pair_sequences` (of `kto` its labelled
    rows). `reference` (N, 2) holds what `TokenizedExample.reference` says, None as long as it is not known. `findings` are of rows
    that make no pair: `several_answers`, whose answer became several examples, and `same_answers`, whose sequences are equal once cut.
    """

    def __init__(self, store: TokenStore, examples: Sequence[Example], objective: ObjectiveName, seed: int, limit: int):
        self.store, self._examples, self._limit = store, examples, limit
        self._kto = objective == "kto"
        self.findings: list[Finding] = []
        self.reference: np.ndarray | None = None
        counts = np.bincount(store.rows, minlength=len(examples))
        place = {int(row): index for index, row in enumerate(store.rows)}
        self._starts = [int(np.argmax(tokens.loss_mask)) for tokens in store]
        step = 1 if self._kto else 2
        self._places: list[tuple[int, int]] = []
        for row in range(0, len(examples), step):
            if (counts[row : row + step] > 1).any():
                self._leave_out(examples[row], "several_answers", SEVERAL)
            elif (counts[row : row + step] == 1).all():
                self._places.append((place[row], place[row + step - 1]))
        if self._kto:
            self._places = self._with_others([first for first, _ in self._places], seed)
        else:
            for first, second in self._places:
                if self._same(first, second):
                    self._leave_out(examples[int(store.rows[first])], "same_answers", SAME)
            self._places = [places for places in self._places if not self._same(*places)]
        self.lengths = np.array([sum(self._lengths(*places)) for places in self._places], dtype=np.int32)
        self.rows = np.array([store.rows[first] // step for first, _ in self._places], dtype=np.int32)

    def _leave_out(self, example: Example, check: str, why: tuple[str, str]) -> None:
        self.findings.append(Finding(check, "error", example.file, example.line, *why))

    def _same(self, first: int, second: int) -> bool:
        return np.array_equal(self.store[first].input_ids, self.store[second].input_ids)

    def _with_others(self, firsts: list[int], seed: int) -> list[tuple[int, int]]:
        """Each sequence with the one whose answer its prompt gets."""
        order = list(firsts)
        random.Random(f"{seed}/kto").shuffle(order)
        prompts = {first: self.store[first].input_ids[: self._starts[first]].tobytes() for first in firsts}
        several = len(set(prompts.values())) > 1
        found = {}
        for place, first in enumerate(order):
            after = (order[(place + step) % len(order)] for step in range(1, len(order) + 1))
            found[first] = next(each for each in after if not several or prompts[each] != prompts[first])
        return [(first, found[first]) for first in firsts]

    def _lengths(self, first: int, second: int) -> tuple[int, int]:
        lengths, starts = self.store.lengths, self._starts
        if not self._kto:
            return int(lengths[first]), int(lengths[second])
        return int(lengths[first]), min(self._limit, starts[first] + int(lengths[second]) - starts[second])

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first, second = self._places[index]
        one, other = self.store[first], self.store[second]
        ids, mask = other.input_ids, other.loss_mask
        if self._kto:
            asked, start = self._starts[first], self._starts[second]
            ids = np.concatenate([one.input_ids[:asked], ids[start:]])[: self._limit]
            mask = np.concatenate([one.loss_mask[:asked], mask[start:]])[: self._limit]
        return TokenizedPair(
            np.concatenate([one.input_ids, ids]),
            np.concatenate([one.loss_mask, mask]),
            one.line,
            one.file,
            self._examples[int(self.store.rows[first])].desirable,
            None if self.reference is None else tuple(self.reference[index].tolist()),
            len(one),
        )

    def digest(self) -> str:
        """SHA-256 of every token id and mask, and of which sequences are pairs."""
        pairs = hashlib.sha256(np.array(self._places, dtype="<i8").tobytes()).hexdigest()
        return hashlib.sha256(f"{self.store.digest()} {pairs} {self._limit}".encode()).hexdigest()
