"""Verbatim recall of the training answers (memorization).

A row is extractable if the model, given what comes before its answer in training and decoding greedily, gives the answer's first
min(50, all) tokens exactly (Carlini et al. 2021, arXiv:2012.07805; with the training prefix as the prompt and 50 tokens: Carlini et al.
2023, arXiv:2202.07646). For conversations the prompt is all before the last answer, in the chat format; for plain text it is the
row's first 50 tokens, and the next 50 are the target.

    memorized          share of rows whose target is given exactly
    memorized_tokens   mean over rows of (tokens given exactly before the first other one) / (tokens of the target)

Lower is better for both. Only targets of at least 20 tokens count: short answers and labels are what training is to teach, and they come
out word for word in a model that has memorized nothing. Where no row is long enough the part says so and measures nothing. The base's
values say what a model gives that was never trained on the rows (common phrases, texts that it saw in pre-training).

Nothing is generated. Greedy decoding gives a target exactly if and only if each of its tokens is the model's first choice behind the true
tokens before it, and the first token that is not ends what is given exactly; one forward over prompt and target shows both. Near-verbatim
recall (Ippolito et al. 2022), and what sampling or other prompts could bring out, are not measured: the values are lower bounds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError
from tunesmith.evaluation.answers import SAMPLE_SEED
from tunesmith.evaluation.parts import PartResult
from tunesmith.evaluation.statistics import Measured, mean
from tunesmith.models.likelihood import Likelihood
from tunesmith.types import Example

if TYPE_CHECKING:
    from tunesmith.evaluation.subject import Subject

PROMPT_TOKENS = 50
"""Of plain text, what is given."""

TARGET_TOKENS = 50
"""The longest target."""

FEWEST_TOKENS = 20
"""The shortest target that counts."""

LIMIT = 200
"""Rows that are asked by default: a share is then known to 0.035 or better."""

SHOWN = 5
"""Rows in `details`."""

ENCODED_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Recall:
    """A training row as prompt and target, in tokens."""

    where: str
    prompt: tuple[int, ...]
    target: tuple[int, ...]


class MemorizationPart:
    """The part `memorization`. `rows` are training rows; of those that are long enough a fixed sample of `limit` is asked."""

    name = "memorization"

    def __init__(self, rows: Sequence[Example], limit: int = LIMIT):
        if limit < 1:
            raise ConfigError(f"memorization: limit is {limit}: expected 1 or more rows")
        self.rows, self.limit = rows, limit
        self._chat: ChatFormat | None = None
        self._recalls: list[Recall] = []
        self._looked_at = 0

    def check(self, chat: ChatFormat) -> None:
        """Draw the rows and tokenize them as training did. Raises nothing."""
        self._chat = chat
        order = random.Random(SAMPLE_SEED).sample(range(len(self.rows)), len(self.rows))
        self._recalls, self._looked_at = [], 0
        for start in range(0, len(order), ENCODED_AT_ONCE):
            chunk = [self.rows[index] for index in order[start : start + ENCODED_AT_ONCE]]
            self._recalls += recalls(chat, chunk)
            self._looked_at += len(chunk)
            if len(self._recalls) >= self.limit:
                break
        self._recalls = self._recalls[: self.limit]

    def ask(self, subject: Subject) -> list[Likelihood]:
        """How far the model gives each target."""
        if self._chat is None:
            self.check(subject.chat)
        requests = [(recall.prompt, recall.target) for recall in self._recalls]
        return subject.log_likelihoods(requests, "recall of training answers") if requests else []

    def score(self, tuned: Sequence[Likelihood], base: Sequence[Likelihood] | None) -> PartResult:
        """`memorized` and `memorized_tokens`; nothing where no row is long enough."""
        details: dict[str, Any] = {
            "rows": len(self.rows),
            "asked": len(self._recalls),
            "target_tokens": TARGET_TOKENS,
            "fewest_tokens": FEWEST_TOKENS,
        }
        if not self._recalls:
            details["note"] = (
                f"not measured: none of the {self._looked_at:,} training rows has an answer of {FEWEST_TOKENS} tokens or more "
                f"(plain text: {PROMPT_TOKENS + FEWEST_TOKENS}); shorter answers are learned, not memorized"
            )
            return PartResult({}, None if base is None else {}, {}, details)
        before = measure_recall(base) if base is not None else None
        details["worst"] = self._worst(tuned, base)
        if base is not None:
            details["memorized_by_tuned_alone"] = sum(
                after.greedy and not was.greedy for after, was in zip(tuned, base, strict=True)
            )
        return PartResult(measure_recall(tuned), before, {}, details)

    def _worst(self, tuned: Sequence[Likelihood], base: Sequence[Likelihood] | None) -> list[dict[str, Any]]:
        """The rows of which the tuned model gives most, the longest first; none of which it gives nothing."""
        assert self._chat is not None
        decode = self._chat.tokenizer.decode
        found = []
        order = sorted(range(len(tuned)), key=lambda number: (-tuned[number].greedy_prefix, number))
        for number in order[:SHOWN]:
            recall, given = self._recalls[number], tuned[number].greedy_prefix
            if given:
                found.append(
                    {
                        "row": recall.where,
                        "prompt_end": decode(recall.prompt[-PROMPT_TOKENS:], skip_special_tokens=True),
                        "given": decode(recall.target[:given], skip_special_tokens=True),
                        "tokens": given,
                        "target_tokens": len(recall.target),
                        "baseline_tokens": base[number].greedy_prefix if base is not None else None,
                    }
                )
        return found


def measure_recall(found: Sequence[Likelihood]) -> dict[str, Measured]:
    """`memorized` and `memorized_tokens` of at least one row."""
    return {
        "memorized": mean([float(row.greedy) for row in found], higher_is_better=False),
        "memorized_tokens": mean([row.greedy_prefix / row.tokens for row in found], higher_is_better=False),
    }


def recalls(chat: ChatFormat, rows: Sequence[Example]) -> list[Recall]:
    """Those of `rows` that are long enough, as prompts and targets. A row that the template refuses was not trained on, and is left out."""
    found = []
    encoded, _ = chat.encode_checked(rows, "last")
    plain = {row.where for row in rows if row.text is not None}
    for example in encoded:
        ids, mask = example.input_ids.tolist(), example.loss_mask.tolist()
        end = max(
            (place for place, learned in enumerate(mask, 1) if learned and ids[place - 1] not in chat.special_ids),
            default=0,
        )
        start = end
        while start and mask[start - 1]:
            start -= 1
        if example.where in plain:
            start = PROMPT_TOKENS + (ids[0] in chat.special_ids)  # a beginning-of-sequence token is no text
        if end - start >= FEWEST_TOKENS:
            target = ids[start : min(end, start + TARGET_TOKENS)]
            found.append(Recall(example.where, tuple(ids[:start]), tuple(target)))
    return found
