"""What `tunesmith advise` knows about the data: rows, repetitions, tokens, labels, and what the answers look like."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config import RunConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.checks import check_rows, labels_of
from tunesmith.data.fingerprints import last_answer, supervised_turns
from tunesmith.data.formats import read_examples
from tunesmith.data.lengths import TOKENS_PER_TURN, estimate_row, estimate_turn
from tunesmith.data.tokens import tokenize
from tunesmith.errors import DataError, ModelError
from tunesmith.models.catalogue import find_model_config, unknown_model
from tunesmith.models.load import HUB_ID, ModelSource, find_model, load_tokenizer
from tunesmith.types import Example, Finding, Progress, no_progress

TEXT_PIECE = 2048
"""Tokens of a piece that plain text is split into, `data.max_seq_length`'s default: a document is as many rows."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What was read from one source of examples.

    `lengths` are tokens a row, uncut; estimates where `estimated`. `distinct_rows` leaves out the exact and near
    repetitions, `conflicts` are prompts that stand earlier with another answer. `labels` counts the rows of each class
    (empty: the answers are no labels). `json_answers`: every last answer is a JSON object, a JSON list or tool calls.
    `model_config` is a model folder's config.json, else a well-known model's shape, else None; `context_length` is None
    without the folder (models of one shape may differ in it).
    """

    path: str
    form: str
    rows: int
    distinct_rows: int
    conflicts: int
    lengths: Sequence[int]
    supervised_tokens: int
    estimated: bool
    plain_text: bool
    labels: Mapping[str, int] = field(default_factory=dict)
    json_answers: bool = False
    context_length: int | None = None
    model_config: Mapping[str, Any] | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @property
    def examples(self) -> int:
        """What the rules of thumb mean by rows: distinct ones; of plain text, pieces of 2,048 tokens."""
        if self.plain_text:
            return sum(math.ceil(length / TEXT_PIECE) for length in self.lengths)
        return self.distinct_rows

    @property
    def counted(self) -> str:
        """`examples` in words: `1 row`, `3,000 distinct rows`, `20 pieces of text`."""
        one = self.examples == 1
        if self.plain_text:
            return f"{self.examples:,} {'piece' if one else 'pieces'} of text"
        distinct = "distinct " if self.distinct_rows < self.rows else ""
        return f"{self.examples:,} {distinct}{'row' if one else 'rows'}"

    @property
    def mean_row_tokens(self) -> float:
        """Tokens of the mean row."""
        return self.total_tokens / self.rows

    @property
    def mean_answer_tokens(self) -> float:
        """Supervised tokens of the mean row."""
        return self.supervised_tokens / self.rows

    @property
    def mean_prompt_tokens(self) -> float:
        """Tokens of the mean row that are not supervised."""
        return self.mean_row_tokens - self.mean_answer_tokens

    def summary(self) -> dict[str, Any]:
        """For --json."""
        return {
            "file": self.path,
            "form": self.form,
            "rows": self.rows,
            "distinct_rows": self.distinct_rows,
            "conflicting_answers": self.conflicts,
            "tokens": self.total_tokens,
            "longest_row_tokens": max(self.lengths),
            "supervised_tokens": self.supervised_tokens,
            "estimated": self.estimated,
            "labels": dict(self.labels),
        }


def is_or_are(count: int) -> str:
    """The verb of `count` things."""
    return "is" if count == 1 else "are"


def read_facts(config: RunConfig, progress: Progress = no_progress) -> DataFacts:
    """Read and check `data.path`; with a model folder, count tokens in its tokenizer and chat template.

    Raises DataError with what `data check` finds wrong (with `data.skip_bad_rows` those rows are left out), and for
    preferences, which tell nothing about prompting or retrieval; ModelError for a model that cannot be there.
    """
    settings = config.data.model_copy(update={"max_seq_length": sys.maxsize, "cache": False})  # no limit is decided yet
    source = _local_model(config)
    chat = None
    if source is not None:
        chat = ChatFormat(load_tokenizer(source, config.model), settings.chat_template, settings.chat_template_kwargs)
    progress("reading the data", 0, 1)
    limit = settings.max_rows if settings.streaming else None
    data = read_examples(settings, skip_bad_rows=settings.skip_bad_rows, max_rows=limit)
    rows = [row for row in data.examples if isinstance(row, Example) and row.desirable is None]
    if len(rows) < len(data.examples):
        raise DataError(
            f"{data.path}: the rows are of form {data.form}: preferences, which tell nothing about prompting or retrieval; "
            "pass a file of answers or of plain text"
        )
    findings = check_rows(data, settings, tokenized=chat is not None)
    if chat is not None:
        chat.settle(rows)
        tokens = tokenize(chat, rows, settings, progress=progress)
        findings += tokens.findings
        lengths = [int(length) for length in tokens.examples.lengths]
        supervised = sum(example.supervised for example in tokens.examples)
    refused = _refused(findings, skip=settings.skip_bad_rows)
    rows = [row for row in rows if (row.file, row.line) not in refused]
    if not rows:
        raise DataError(f"{data.path}: no row is left to look at")
    if chat is None:
        lengths = [estimate_row(row) for row in rows]
        supervised = sum(
            supervised_tokens(row, length, settings.train_on) for row, length in zip(rows, lengths, strict=True)
        )
    progress("reading the data", 1, 1)
    _, known = find_model_config(config.model.name) or ("", {})
    counts = Counter(finding.check for finding in findings)
    return DataFacts(
        path=data.path,
        form=data.form,
        rows=len(rows),
        distinct_rows=max(1, len(rows) - counts["duplicate_row"] - counts["near_duplicate_row"]),
        conflicts=counts["conflicting_answers"],
        lengths=lengths,
        supervised_tokens=supervised,
        estimated=chat is None,
        plain_text=rows[0].messages is None,
        labels=Counter(label for label in labels_of(rows) if label is not None),
        json_answers=all(map(_is_json, rows)),
        context_length=source.context_length if source else None,
        model_config=source.config if source else known or None,
    )


def _local_model(config: RunConfig) -> ModelSource | None:
    """The model if it is a folder. A hub id or a .gguf file would have to be fetched or converted first: None."""
    name = config.model.name
    path = Path(name).expanduser()
    if not path.is_dir() and (HUB_ID.fullmatch(name) or (path.suffix == ".gguf" and path.is_file())):
        return None
    if name and not path.exists() and "/" not in name:
        raise ModelError(unknown_model(name))
    return find_model(config.model)


def _refused(findings: Sequence[Finding], skip: bool) -> set[tuple[str, int | None]]:
    """Places of the rows with errors. Raises DataError unless they are to be skipped."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors and not skip:
        raise DataError([str(error) for error in errors])
    return {(error.file, error.line) for error in errors}


def supervised_tokens(row: Example, length: int, train_on: str) -> int:
    """About how many tokens of a row are supervised: its answers with their end-of-turn tokens; all of a plain text."""
    if row.messages is None:
        return length
    turns = zip(row.messages, supervised_turns(row.messages, train_on), strict=True)
    return round(sum(estimate_turn(message) - TOKENS_PER_TURN + 1 for message, counts in turns if counts))


def _is_json(row: Example) -> bool:
    """Whether the last answer is for a program to read: a JSON object or list, or tool calls."""
    if row.messages is None or (last := last_answer(row.messages)) == len(row.messages):
        return False
    message = row.messages[last]
    if message.tool_calls:
        return True
    if not message.content.lstrip().startswith(("{", "[")):
        return False
    try:
        return isinstance(json.loads(message.content), (dict, list))
    except (ValueError, RecursionError):
        return False
