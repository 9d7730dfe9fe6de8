"""A run's rows: read, checked, mixed and held out; then its tokens."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config import DataConfig, RunConfig, SourceConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.checks import check_rows, repeated_across
from tunesmith.data.formats import DataFile, read_examples
from tunesmith.data.splits import split_rows
from tunesmith.data.tokens import Tokenized, TokenStore, changed_since_kept, tokenize
from tunesmith.errors import ConfigError, DataError
from tunesmith.files import sha256_text
from tunesmith.types import Example, Finding, PreferenceExample, Progress, no_progress

LISTED_LINES = 10
"""How many lines a note names; of rows that are left out, all."""


@dataclass(frozen=True, slots=True)
class RunRows:
    """The rows that a run trains and evaluates on, as read, with the facts about their files and what was noticed.

    `general` are those of `data.general_path`.
    """

    train: list[Example]
    eval: list[Example]
    facts: dict[str, Any]
    notes: list[str]
    general: list[Example] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunData:
    """A run's examples, tokenized, with the facts about them for metadata.json. `max_seq_length` is what `auto` came to."""

    train: TokenStore
    eval: TokenStore
    general: TokenStore
    eval_rows: list[Example]
    facts: dict[str, Any]
    notes: list[str]
    max_seq_length: int


def read_rows(config: RunConfig) -> RunRows:
    """Read and check the training and evaluation data. Raises DataError with all problems of all files."""
    settings = config.data
    sources: list[SourceConfig] = [*settings.mix] or [settings]
    held_out = [settings.held_out(path) for path in (settings.eval_path, settings.general_path) if path]
    files, held = _read(sources, held_out, settings)
    general = [held.pop()] if settings.general_path else []
    for file in [*files, *held]:
        _refuse_wrong_kind(file, f"objective {config.objective.name}")
        if config.objective.name == "cpt":
            _refuse_chats(file)
    for file in general:
        _refuse_wrong_kind(file, "data.general_path")
    findings = [finding for file in [*files, *held, *general] for finding in file.findings]
    for file in files:
        findings += check_rows(file, settings, held[0] if held else None, tokenized=True)
    if len(files) > 1:
        findings += repeated_across(files, settings.train_on)
    for file in [*held, *general]:
        findings += check_rows(file, settings, tokenized=True)
    for file in files:
        if settings.cache and Path(file.path).exists() and (changed := changed_since_kept(file.path, file.sha256)):
            findings.append(changed)
    generator = random.Random(config.training.seed)
    rows, notes = _mixed(files, settings, generator)
    notes = [*summary(findings), *notes]
    eval_rows = [row for file in held for row in _examples(file)]
    if settings.eval_fraction:
        shares = {"train": 1 - settings.eval_fraction, "eval": settings.eval_fraction}
        parts = split_rows(rows, shares, config.training.seed, settings.train_on)
        if not parts["train"] or not parts["eval"]:
            side = "evaluation" if parts["train"] else "training"
            raise ConfigError(f"data.eval_fraction {settings.eval_fraction} leaves no row of {len(rows)} for {side}")
        eval_rows, rows = [rows[place] for place in parts["eval"]], [rows[place] for place in parts["train"]]
    if config.evaluation.generate:
        from tunesmith.evaluation.answers import check_questions  # not at the top: `plan --data` needs no PyTorch

        check_questions(eval_rows)
    facts = {
        "path": settings.path or [file.path for file in files],
        "sha256": files[0].sha256 if len(files) == 1 else sha256_text(file.sha256 for file in files),
        "form": ", ".join(dict.fromkeys(file.form for file in files)),
        "rows": sum(len(file.examples) for file in files),
        "files": [
            {"path": file.path, "container": file.container, "form": file.form, "rows": len(file.examples)}
            for file in [*files, *held, *general]
        ],
        "system": _shared_system(rows),
    }
    if settings.eval_path:
        facts |= {"eval_path": settings.eval_path, "eval_sha256": held[0].sha256}
    for file in general:
        facts |= {"general_path": settings.general_path, "general_sha256": file.sha256}
    return RunRows(rows, eval_rows, facts, notes, [row for file in general for row in _examples(file)])


def read_questions(path: str | Path, settings: DataConfig | None = None) -> list[Example]:
    """The rows of a file to evaluate on, its columns mapped as in `settings`. Raises DataError with every problem."""
    file = read_examples((settings or DataConfig()).held_out(str(path)))
    _refuse_wrong_kind(file, "evaluation")
    return _examples(file)


def tokenize_rows(
    config: RunConfig,
    chat: ChatFormat,
    rows: RunRows,
    progress: Progress = no_progress,
    model_limit: int | None = None,
) -> RunData:
    """Tokenize a run's rows. Raises DataError with all rows that cannot be trained on, unless `data.skip_bad_rows`.

    Writes what `auto` came to into `config.data`: the longest sequence, and the chat template's variables.
    """
    settings = config.data
    settled = chat.settle(rows.train)
    settings.chat_template_kwargs = chat.variables
    limits = [limit for limit in (model_limit, config.training.micro_batch_tokens) if limit]
    train = tokenize(chat, rows.train, settings, progress=progress, model_limit=min(limits, default=None))
    settings.max_seq_length = train.max_seq_length
    held = tokenize(chat, rows.eval, settings, progress=progress, stage="tokenizing the evaluation data")
    general = tokenize(chat, rows.general, settings, progress=progress, stage="tokenizing the general data")
    found = [*train.findings, *held.findings, *general.findings]
    problems = [str(finding) for finding in found if finding.severity == "error"]
    if problems and not settings.skip_bad_rows:
        raise DataError(problems)
    parts = (("training", train, rows.train), ("evaluation", held, rows.eval), ("general", general, rows.general))
    for name, tokens, given in parts:
        if given and not len(tokens.examples):
            raise DataError(
                problems or [f"no {name} row is left; all are longer than {settings.max_seq_length} tokens"]
            )
    notes = [*rows.notes, *([settled] if settled else []), *summary(found), *_beyond(train, model_limit)]
    supervised = sum(example.supervised for example in train.examples)
    digests = [tokens.examples.digest() for tokens in (train, held, *([general] if rows.general else []))]
    facts = rows.facts | {
        "train_rows": len(train.examples),
        "eval_rows": len(held.examples),
        "train_tokens": int(train.examples.lengths.sum()),
        "supervised_tokens": supervised,
        "tokens_sha256": sha256_text(digests),
    }
    if rows.general:
        facts["general_rows"] = len(general.examples)
    kept = sorted({int(row) for row in held.examples.rows})
    eval_rows = [rows.eval[row] for row in kept]
    if config.evaluation.generate:
        from tunesmith.evaluation.answers import encode_questions

        encode_questions(chat, eval_rows)
    return RunData(train.examples, held.examples, general.examples, eval_rows, facts, notes, train.max_seq_length)


def summary(findings: Sequence[Finding]) -> list[str]:
    """One line for each check and file: the findings themselves where they are few, else their lines and the first one."""
    groups: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.check, finding.file].append(finding)
    lines = []
    for (severity, check, file), group in groups.items():
        first = group[0]
        left_out = ", left out" if severity == "error" else ""
        if len(group) == 1:
            lines.append(f"{first}{left_out}")
            continue
        places = sorted({finding.line for finding in group if finding.line is not None})
        listed = places if left_out else places[:LISTED_LINES]
        shown = ", ".join(map(str, listed)) + (", ..." if len(listed) < len(places) else "")
        lines.append(
            f"{file}: {len(group)} rows with {check.replace('_', ' ')}{left_out} (lines {shown}); "
            f"line {first.line}: {first.message}"
        )
    return lines


def _read(
    sources: Sequence[SourceConfig], held: Sequence[SourceConfig], settings: DataConfig
) -> tuple[list[DataFile], list[DataFile]]:
    files: list[DataFile] = []
    problems: list[str] = []
    for source in [*sources, *held]:
        try:
            limit = settings.max_rows if source.streaming else None
            files.append(read_examples(source, skip_bad_rows=settings.skip_bad_rows, max_rows=limit))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return files[: len(sources)], files[len(sources) :]


def _refuse_wrong_kind(file: DataFile, purpose: str) -> None:
    first = file.examples[0]
    if isinstance(first, PreferenceExample):
        fix = (
            "pass a file of answers, or name the column that holds them (data.format: prompt, data.columns: {completion: "
            "chosen})"
        )
    elif first.desirable is not None:
        fix = "pass a file of answers: only the rows whose label is true, without that label"
    else:
        return
    raise DataError(f"{file.path}: the rows are of form {file.form}; {purpose} needs answers, not preferences; {fix}")


def _refuse_chats(file: DataFile) -> None:
    """Raise DataError for rows that continued pre-training would learn with their turns and control tokens."""
    if file.form != "text":
        raise DataError(
            f"{file.path}: the rows are of form {file.form}; objective cpt trains on plain text; set objective.name: sft, or "
            "pass a text file, or name the column that holds text (data.format: text, data.columns: {text: NAME})"
        )


def _examples(file: DataFile) -> list[Example]:
    return [row for row in file.examples if isinstance(row, Example)]


def _mixed(
    files: Sequence[DataFile], settings: DataConfig, generator: random.Random
) -> tuple[list[Example], list[str]]:
    """The training rows of all sources in the shares of `data.mix`, no row twice; `data.max_rows` of them at most."""
    weights = [source.weight for source in settings.mix] or [1.0]
    shares = [weight / sum(weights) for weight in weights]
    total = min(len(file.examples) / share for file, share in zip(files, shares, strict=True))
    if settings.max_rows is not None:
        total = min(total, settings.max_rows)
    rows: list[Example] = []
    taken = []
    for file, share in zip(files, shares, strict=True):
        examples = _examples(file)
        count = min(len(examples), max(1, round(total * share)))
        if count < len(examples):
            examples = [examples[place] for place in sorted(generator.sample(range(len(examples)), count))]
        rows += examples
        taken.append(f"{count} of {len(file.examples)} rows of {file.path} ({share:.0%})")
    return rows, [f"mixed: {', '.join(taken)}"] if settings.mix else []


def _shared_system(rows: list[Example]) -> str | None:
    """The system message, if all rows begin with the same one: whoever asks the tuned model has to send it too."""
    first = {row.messages[0].content if row.messages and row.messages[0].role == "system" else None for row in rows}
    return first.pop() if len(first) == 1 else None


def _beyond(tokens: Tokenized, model_limit: int | None) -> list[str]:
    longest = int(tokens.examples.lengths.max(initial=0))
    if model_limit is None or longest <= model_limit:
        return []
    return [
        f"the longest example has {longest} tokens; the model was made for {model_limit} (max_position_embeddings): lower "
        "data.max_seq_length"
    ]
