"""Look at data before training on it: `data check`, `data stats`, `data preview` and `data split`.

Each function takes a RunConfig (its `data` section says what to read and how; with `model.name`, that model's tokenizer and
chat template are used, and no weights are read) and returns what the command's `--json` prints.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunesmith.config import PAIR_OBJECTIVES, DataConfig, ObjectiveName, RunConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.checks import check_rows, labels_of
from tunesmith.data.fingerprints import supervised_turns
from tunesmith.data.formats import COVERED, DataFile, inspect_file, read_examples
from tunesmith.data.lengths import (
    candidate_lengths,
    estimate_row,
    histogram,
    length_stats,
    padding,
    recommended_max_seq_length,
    rows_longer_than,
)
from tunesmith.data.pairs import sequences
from tunesmith.data.splits import refuse_existing, split_rows, write_split
from tunesmith.data.tokens import Tokenized, changed_since_kept, tokenize
from tunesmith.errors import ConfigError, DataError
from tunesmith.models.load import find_model, load_tokenizer
from tunesmith.types import Example, Finding, Message, PreferenceExample, Progress, TokenizedExample, no_progress

PACK_BUDGET = 8192
"""Token budget of a pack where `training.micro_batch_tokens` does not set one."""

TEMPLATE_SETTINGS = ("chat_template", "chat_template_kwargs")
"""What only a command with a tokenizer uses."""

EVAL_SETTINGS = ("eval_path", "eval_split")
"""What only `data check` and training use."""

FATES = frozenset({"too_long", "truncated", "dropped", "split", "nothing_supervised", "template"})
"""Findings of tokenizing that say what becomes of a row."""

CONTEXT_TOKENS = 8
"""How many tokens before a piece are decoded with it: alone, it can lose the space that it begins with."""


def check_data(config: RunConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Read and check `data.path` and `data.eval_path`: every problem of both.

    `ok` says that the data is usable: there are no errors, or `data.skip_bad_rows` leaves the rows with errors out and
    some remain. `trainable` says that `tunesmith train` takes it: it is usable, and all its files are for one of the `objectives`.
    `skippable` says that `data.skip_bad_rows` would make it usable. Problems stand in the order of their files and lines,
    those of a whole file first. Raises ConfigError and ModelError; what is wrong with the data is in the result.
    """
    settings = config.data
    _refuse_unused(config)
    chat, limit = _chat_of(config)
    progress("reading the data", 0, 1)
    data = inspect_file(settings, _rows_to_read(settings))
    held_out = inspect_file(settings.held_out(settings.eval_path)) if settings.eval_path else None
    files = [data, held_out] if held_out else [data]
    notes = [note] if chat is not None and (note := chat.settle(sequences(data.examples))) else []
    findings = [finding for file in files for finding in file.findings]
    left: list[int] = []  # rows of each file that can be used
    refused: list[set[tuple[str, int | None]]] = []  # places of those that were read and cannot
    for file in files:
        checked = check_rows(file, settings, held_out if file is data else None, tokenized=chat is not None)
        left.append(len(file.examples) - sum(finding.severity == "error" for finding in checked))
        if chat is not None:
            if settings.cache and Path(file.path).exists() and (changed := changed_since_kept(file.path, file.sha256)):
                checked.append(changed)
            tokens = tokenize(chat, sequences(file.examples), settings, progress=progress, model_limit=limit)
            checked += tokens.findings
            left[-1] = len(tokens.examples)
            if file.examples and not left[-1] and not any(finding.severity == "error" for finding in tokens.findings):
                found = f"no row is left: all are longer than data.max_seq_length {tokens.max_seq_length}"
                checked.append(
                    Finding("no_rows", "error", file.path, None, found, "raise it, or set data.overlong: split")
                )
        findings += checked
        refused.append({(finding.file, finding.line) for finding in checked if finding.severity == "error"})
    progress("reading the data", 1, 1)
    held_files = {held_out.path, *(row.file for row in held_out.examples)} if held_out else set()
    findings.sort(key=lambda finding: (finding.file in held_files, finding.file, finding.line or 0))
    errors = [finding for finding in findings if finding.severity == "error"]
    whole = [error for error in errors if error.line is None and error.check not in COVERED]
    usable = not errors or (not whole and all(left))
    ok = usable if settings.skip_bad_rows else not errors
    objectives = [name for name in _objectives(files[0]) if all(name in _objectives(file) for file in files)]
    return {
        "ok": ok,
        "trainable": ok and bool(objectives),
        "objectives": objectives,
        "skippable": usable and not ok,
        "file": data.path,
        "files": data.files,
        "split": data.split or None,
        "container": data.container,
        "form": data.form,
        "rows": data.rows,
        "bad_rows": data.rows - len(data.examples) + len(refused[0]),
        "skipped_rows": _lines_of(errors) if settings.skip_bad_rows else {},
        "eval_file": held_out.path if held_out else None,
        "eval_rows": held_out.rows if held_out else None,
        "chat_template": chat.name if chat else None,
        "errors": len(errors),
        "warnings": len(findings) - len(errors),
        "notes": notes,
        "problems": [_problem(finding) for finding in findings],
    }


def data_stats(config: RunConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Token lengths of `data.path`: statistics, a histogram, and what limits, padding and packing would cost.

    Without a model they are estimates (`estimated`). Raises DataError for rows with errors, unless
    `data.skip_bad_rows`.
    """
    settings = config.data
    _refuse_unused(config, EVAL_SETTINGS)
    chat, limit = _chat_of(config)
    progress("reading the data", 0, 1)
    data = read_examples(settings, skip_bad_rows=settings.skip_bad_rows, max_rows=_rows_to_read(settings))
    errors = [finding for finding in data.findings if finding.severity == "error"]
    supervised = None
    if chat is not None:
        rows = sequences(data.examples)
        chat.settle(rows)
        uncut = settings.model_copy(update={"max_seq_length": sys.maxsize})
        tokens = tokenize(chat, rows, uncut, progress=progress, model_limit=limit)
        refused = [finding for finding in tokens.findings if finding.severity == "error"]
        if refused and not settings.skip_bad_rows:
            raise DataError([str(finding) for finding in refused])
        errors += refused
        lengths = tokens.examples.lengths.tolist()
        supervised = sum(example.supervised for example in tokens.examples)
    else:
        lengths = [estimate_row(row) for row in data.examples]
    progress("reading the data", 1, 1)
    if not lengths:
        raise DataError(f"{data.path}: no row is left to measure")
    stats = asdict(length_stats(lengths))
    recommended = recommended_max_seq_length(lengths, limit)
    maximum = recommended if settings.max_seq_length == "auto" else settings.max_seq_length
    longer = rows_longer_than(lengths, sorted({*candidate_lengths(stats["max"]), recommended, maximum}))
    training = config.training
    budget = training.micro_batch_tokens or max(PACK_BUDGET, maximum)
    cut = [min(length, maximum) for length in lengths]
    return {
        "file": data.path,
        "container": data.container,
        "form": data.form,
        "rows": len(data.examples),
        "skipped_rows": _lines_of(errors),
        "sequences": stats.pop("rows"),
        "estimated": chat is None,
        "chat_template": chat.name if chat else None,
        "model_limit": limit,
        "max_seq_length": maximum,
        "recommended_max_seq_length": recommended,
        "tokens": stats,
        "supervised_tokens": supervised,
        "histogram": [{"from": low, "to": high, "sequences": count} for low, high, count in histogram(lengths)],
        "longer_than": {str(length): count for length, count in longer.items()},
        "padding": asdict(padding(cut, training.micro_batch, training.batch_size, budget)),
    }


def preview_data(config: RunConfig, num_rows: int = 3, line: int | None = None) -> dict[str, Any]:
    """Rows as the model will see them, cut to `data.max_seq_length`: pieces of text, each with whether it is supervised and
    whether it is a special token. Without a model the pieces are the turns, with their roles.

    The first `num_rows` good rows, or the one on `line`. A row that was cut or left out says so in `problems`. Raises
    DataError where there is no row, or none that can be trained on.
    """
    settings = config.data
    _refuse_unused(config, EVAL_SETTINGS, (*TEMPLATE_SETTINGS, "max_seq_length", "overlong"))
    chat, limit = _chat_of(config)
    data = inspect_file(settings, _rows_to_read(settings))
    errors = [finding for finding in data.findings if finding.severity == "error"]
    rows: list[Example | PreferenceExample] = list(data.examples[:num_rows])
    if line is not None:
        rows = [row for row in data.examples if row.line == line]
        errors = [error for error in errors if error.line == line or not data.rows]
    if not rows:
        nothing = f"{data.path}:{line}: no row begins on this line; the file has {data.rows} rows"
        raise DataError([str(error) for error in errors] or nothing)
    if chat is not None:
        whole = sequences(data.examples)
        chat.settle(whole)
        if settings.max_seq_length == "auto":
            longest = tokenize(chat, whole, settings, model_limit=limit).max_seq_length
            settings = settings.model_copy(update={"max_seq_length": longest})
        settings = settings.model_copy(update={"cache": False})  # of single rows
    examples: list[dict[str, Any]] = []
    refused: list[Finding] = []
    for row in rows:
        sides = ("chosen", "rejected") if isinstance(row, PreferenceExample) else (None,)
        for side, example in zip(sides, sequences([row]), strict=True):
            place = {"line": row.line, "side": side}
            if chat is None:
                examples.append(place | {"problems": []} | _preview_turns(example, settings.train_on))
                continue
            tokens = tokenize(chat, [example], settings)
            refused += [finding for finding in tokens.findings if finding.severity == "error"]
            examples += [place | shown for shown in _preview_tokens(tokens, chat)]
    if refused and not any(example["num_tokens"] for example in examples):
        raise DataError([str(finding) for finding in refused])
    return {
        "file": data.path,
        "container": data.container,
        "form": data.form,
        "rows": data.rows,
        "chat_template": chat.name if chat else None,
        "train_on": settings.train_on,
        "max_seq_length": settings.max_seq_length if chat else None,
        "examples": examples,
    }


def split_data(config: RunConfig, out: Path, shares: Mapping[str, float]) -> dict[str, Any]:
    """Divide `data.path` into OUT/train.jsonl, validation.jsonl and test.jsonl, with `training.seed`.

    `shares` are those of the three files, together 1; a file with share 0 is not written. Raises ConfigError for other
    shares, DataError for rows with errors (unless `data.skip_bad_rows`) or too few rows, RunError if `out` exists.
    """
    if not (all(share >= 0 for share in shares.values()) and abs(sum(shares.values()) - 1) <= 1e-6):  # nor nan
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise ConfigError(
            f"the shares {given} add up to {sum(shares.values()):g}; make them add up to 1, none negative"
        )
    _refuse_unused(config, (*EVAL_SETTINGS, *TEMPLATE_SETTINGS))
    refuse_existing(out)
    settings = config.data
    max_rows = _rows_to_read(settings)
    data = read_examples(settings, skip_bad_rows=settings.skip_bad_rows, max_rows=max_rows)
    wanted = {name: share for name, share in shares.items() if share}
    parts = split_rows(data.examples, wanted, config.training.seed, settings.train_on)
    paths = write_split(out, settings, data, parts, max_rows, settings.train_on)
    labels = labels_of(data.examples)
    return {
        "file": data.path,
        "form": data.form,
        "rows": len(data.examples),
        "skipped_rows": _lines_of(finding for finding in data.findings if finding.severity == "error"),
        "seed": config.training.seed,
        "files": {name: str(path) for name, path in paths.items()},
        "counts": {name: len(positions) for name, positions in parts.items()},
        "labels": {
            name: dict(Counter(labels[position] for position in positions if labels[position] is not None))
            for name, positions in parts.items()
        },
    }


def _rows_to_read(settings: DataConfig) -> int | None:
    """A streamed data set is read as far as `data.max_rows`; of a file that samples rows for training, all are looked at."""
    return settings.max_rows if settings.streaming else None


def _refuse_unused(
    config: RunConfig, unused: Sequence[str] = (), tokenizing: Sequence[str] = TEMPLATE_SETTINGS
) -> None:
    """Raise ConfigError for `data` settings that a command does nothing with: those that only training uses, `unused`, and
    without a model `tokenizing`.
    """
    reasons = {"eval_fraction": "on this command, which holds no rows out; remove it, or use `tunesmith data split`"}
    if not config.data.streaming:
        reasons["max_rows"] = "on this command, which reads every row; remove it"
    if not config.model.name:
        reasons |= dict.fromkeys(tokenizing, "without a model; pass --model, or remove it")
    reasons["general_path"] = "on this command; remove it, or pass the file by itself"
    reasons |= dict.fromkeys(unused, "on this command; remove it")
    unset = DataConfig()
    changed = [name for name in reasons if getattr(config.data, name) != getattr(unset, name)]
    if changed:
        raise ConfigError([f"data.{name} has no effect {reasons[name]}" for name in changed])


def _chat_of(config: RunConfig) -> tuple[ChatFormat | None, int | None]:
    """The model's chat format and the longest sequence that it takes; (None, None) where no model is given."""
    if not config.model.name:
        return None, None
    source = find_model(config.model)
    tokenizer = load_tokenizer(source, config.model)
    chat = ChatFormat(tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
    return chat, source.context_length


def _objectives(file: DataFile) -> tuple[ObjectiveName, ...]:
    """What can be trained on a file's rows, the usual one first."""
    first = file.examples[0] if file.examples else None
    if isinstance(first, PreferenceExample):
        return PAIR_OBJECTIVES
    if first is not None and first.desirable is not None:
        return ("kto",)
    return ("sft", "cpt") if file.form == "text" else ("sft",)


def _lines_of(findings: Iterable[Finding]) -> dict[str, list[int]]:
    """The lines that findings are about, in order, by file."""
    lines: dict[str, list[int]] = {}
    for file, line in sorted({(finding.file, finding.line) for finding in findings if finding.line is not None}):
        lines.setdefault(file, []).append(line)
    return lines


def _problem(finding: Finding) -> dict[str, Any]:
    return {
        "line": finding.line,
        "severity": finding.severity,
        "code": finding.check,
        "message": finding.message,
        "found": finding.found,
        "fix": finding.fix,
        "field": finding.field,
        "file": finding.file,
    }


def _preview_turns(example: Example, train_on: str) -> dict[str, Any]:
    messages = example.messages or (Message("assistant", example.text or ""),)
    supervised = supervised_turns(messages, train_on)
    pieces = [
        {"role": message.role if example.messages else "text", "text": _turn_text(message), "supervised": counts}
        for message, counts in zip(messages, supervised, strict=True)
    ]
    return {"num_tokens": estimate_row(example), "estimated": True, "pieces": pieces}


def _turn_text(message: Message) -> str:
    """What a turn says: its thought, its text and its tool calls."""
    calls = [
        json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False, default=str)
        for call in message.tool_calls
    ]
    return "\n".join(part for part in (message.reasoning, message.content, *calls) if part)


def _preview_tokens(tokenized: Tokenized, chat: ChatFormat) -> list[dict[str, Any]]:
    """The examples that a row became, with what happened to it; one without tokens if it became none."""
    problems = [finding.message for finding in tokenized.findings if finding.check in FATES]
    shown = [_preview_pieces(example, chat) for example in tokenized.examples]
    nothing = {"num_tokens": 0, "estimated": False, "num_supervised": 0, "pieces": [], "tokens": []}
    return [example | {"problems": problems} for example in shown or [nothing]]


def _preview_pieces(example: TokenizedExample, chat: ChatFormat) -> dict[str, Any]:
    ids = example.input_ids.tolist()
    # The first token is no target, whatever its mask says: nothing comes before it.
    mask = [False, *example.loss_mask.tolist()[1:]]
    special = [number in chat.special_ids for number in ids]

    def text_of(numbers: list[int]) -> str:
        return str(chat.tokenizer.decode(numbers, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    pieces = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and (mask[end], special[end]) == (mask[start], special[start]):
            continue
        context = max(0, start - CONTEXT_TOKENS)
        before, through = text_of(ids[context:start]), text_of(ids[context:end])
        text = through[len(before) :] if through.startswith(before) else text_of(ids[start:end])
        pieces.append({"text": text, "supervised": mask[start], "special": special[start]})
        start = end
    tokens = [
        {"id": number, "text": text_of([number]), "supervised": counts, "special": is_special}
        for number, counts, is_special in zip(ids, mask, special, strict=True)
    ]
    return {
        "num_tokens": len(ids),
        "estimated": False,
        "num_supervised": example.supervised,
        "pieces": pieces,
        "tokens": tokens,
    }
