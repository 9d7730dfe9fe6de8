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
from tunesmith.data.pairs import PairStore, Row, pair_sequences, sequences
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

    `general` are those of `data.general_path`. Preference objectives have preference rows, `kto` labelled ones, too.
    """

    train: list[Row]
    eval: list[Row]
    facts: dict[str, Any]
    notes: list[str]
    general: list[Example] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunData:
    """A run's examples, tokenized, with the facts about them for metadata.json. `max_seq_length` is what `auto` came to.

    `eval_rows` are those of `eval`; of preferences the prompts, with the first turn that was chosen.
    """

    train: TokenStore | PairStore
    eval: TokenStore | PairStore
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
        if config.pairs:
            _refuse_without_preferences(file, config.objective.name)
            continue
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
    eval_rows: list[Row] = [row for file in held for row in file.examples]
    if settings.eval_fraction:
        shares = {"train": 1 - settings.eval_fraction, "eval": settings.eval_fraction}
        parts = split_rows(rows, shares, config.training.seed, settings.train_on)
        if not parts["train"] or not parts["eval"]:
            side = "evaluation" if parts["train"] else "training"
            raise ConfigError(f"data.eval_fraction {settings.eval_fraction} leaves no row of {len(rows)} for {side}")
        eval_rows, rows = [rows[place] for place in parts["eval"]], [rows[place] for place in parts["train"]]
    if config.evaluation.generate or config.evaluation.samples:
        from tunesmith.evaluation.answers import check_questions  # not at the top: `plan --data` needs no PyTorch

        check_questions([question_of(row) for row in eval_rows])
    if config.objective.name == "kto":
        _refuse_one_kind(rows)
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


def question_of(row: Row) -> Example:
    """A row as a question with its answer: of a preference the first turn that was chosen."""
    if isinstance(row, Example):
        return row
    return Example((*row.prompt, row.chosen[0]), None, row.file, row.line, row.tools)


def sequences_of(config: RunConfig, rows: Sequence[Row]) -> list[Example]:
    """The conversations and texts that are tokenized for a run's rows: for a preference objective two for each pair."""
    if config.pairs:
        return pair_sequences(rows, config.objective.name, config.training.seed)
    return sequences(rows)


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
    examples, held_out = sequences_of(config, rows.train), sequences_of(config, rows.eval)
    settled = chat.settle(examples)
    settings.chat_template_kwargs = chat.variables
    budget = config.training.micro_batch_tokens
    limits = [limit for limit in (model_limit, budget // 2 if budget and config.pairs else budget) if limit]
    train = tokenize(chat, examples, settings, progress=progress, model_limit=min(limits, default=None))
    settings.max_seq_length = train.max_seq_length
    held = tokenize(chat, held_out, settings, progress=progress, stage="tokenizing the evaluation data")
    general = tokenize(chat, rows.general, settings, progress=progress, stage="tokenizing the general data")
    found = [*train.findings, *held.findings, *general.findings]
    problems = [str(finding) for finding in found if finding.severity == "error"]
    stores = [
        _paired(tokens.examples, of, problems) if config.pairs else tokens.examples
        for tokens, of in ((train, examples), (held, held_out))
    ]
    if problems and not settings.skip_bad_rows:
        raise DataError(problems)
    parts = (
        ("training", stores[0], rows.train),
        ("evaluation", stores[1], rows.eval),
        ("general", general.examples, rows.general),
    )
    for name, store, given in parts:
        if given and not len(store):
            raise DataError(
                problems or [f"no {name} row is left; all are longer than {settings.max_seq_length} tokens"]
            )
    notes = [*rows.notes, *([settled] if settled else []), *summary(found), *_beyond(train, model_limit)]
    supervised = sum(example.supervised for example in stores[0])
    digests = [store.digest() for store in (*stores, *([general.examples] if rows.general else []))]
    facts = rows.facts | {
        "train_rows": len(stores[0]),
        "eval_rows": len(stores[1]),
        "train_tokens": int(stores[0].lengths.sum()),
        "supervised_tokens": supervised,
        "tokens_sha256": sha256_text(digests),
    }
    if rows.general:
        facts["general_rows"] = len(general.examples)
    kept = sorted({int(row) for row in stores[1].rows})
    if config.objective.name == "kto" and not all(isinstance(row, Example) for row in rows.eval):
        kept = [*range(len(rows.eval))]  # rows of pairs are two each there
    eval_rows = [question_of(rows.eval[index]) for index in kept]
    if config.evaluation.generate or config.evaluation.samples:
        from tunesmith.evaluation.answers import encode_questions

        encode_questions(chat, eval_rows)
    return RunData(stores[0], stores[1], general.examples, eval_rows, facts, notes, train.max_seq_length)


def _paired(store: TokenStore, examples: Sequence[Example], problems: list[str]) -> PairStore:
    """The pairs of a store; adds what cannot be one to `problems`."""
    pairs = PairStore(store, examples)
    problems += [
        f"{where}: the answer has several turns, of which the chat template lets only the last be seen as it was written; an answer "
        "in parts cannot be compared: remove the row, or choose another data.chat_template"
        for where in pairs.unrolled
    ]
    return pairs


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
    train = "set objective.name: {} to train on preferences, or " if purpose.startswith("objective") else ""
    if isinstance(first, PreferenceExample):
        fix = train.format("dpo") + (
            "pass a file of answers, or name the column that holds them (data.format: prompt, data.columns: {completion: "
            "chosen})"
        )
    elif first.desirable is not None:
        fix = train.format("kto") + "pass a file of answers: only the rows whose label is true, without that label"
    else:
        return
    raise DataError(f"{file.path}: the rows are of form {file.form}; {purpose} needs answers, not preferences; {fix}")


def _refuse_without_preferences(file: DataFile, objective: str) -> None:
    """Raise DataError for rows that a preference objective cannot compare."""
    first = file.examples[0]
    if isinstance(first, PreferenceExample) or (objective == "kto" and first.desirable is not None):
        return
    needed = "a `chosen` and a `rejected` answer a row"
    if objective == "kto":
        needed = f"a `label` (true: desirable) beside `prompt` and `completion`, or {needed}"
    sft = (
        ""
        if isinstance(first, Example) and first.desirable is not None
        else "; set objective.name: sft to train on answers"
    )
    raise DataError(f"{file.path}: the rows are of form {file.form}; objective {objective} needs {needed}{sft}")


def _refuse_one_kind(rows: Sequence[Row]) -> None:
    """Raise DataError for labelled rows that are all desirable, or none of them: there would be nothing to tell apart."""
    labels = {row.desirable for row in rows if isinstance(row, Example)}
    if len(labels) == 1 and not any(isinstance(row, PreferenceExample) for row in rows):
        kind = "desirable" if labels.pop() else "undesirable"
        raise DataError(
            f"all {len(rows)} rows are {kind}; objective kto needs rows of both kinds (label: true and false)"
        )


def _refuse_chats(file: DataFile) -> None:
    """Raise DataError for rows that continued pre-training would learn with their turns and control tokens."""
    if file.form != "text":
        raise DataError(
            f"{file.path}: the rows are of form {file.form}; objective cpt trains on plain text; set objective.name: sft, or "
            "pass a text file, or name the column that holds text (data.format: text, data.columns: {text: NAME})"
        )


def _examples(file: DataFile) -> list[Example]:
    return [row for row in file.examples if isinstance(row, Example)]


def _mixed(files: Sequence[DataFile], settings: DataConfig, generator: random.Random) -> tuple[list[Row], list[str]]:
    """The training rows of all sources in the shares of `data.mix`, no row twice; `data.max_rows` of them at most."""
    weights = [source.weight for source in settings.mix] or [1.0]
    shares = [weight / sum(weights) for weight in weights]
    total = min(len(file.examples) / share for file, share in zip(files, shares, strict=True))
    if settings.max_rows is not None:
        total = min(total, settings.max_rows)
    rows: list[Row] = []
    taken = []
    for file, share in zip(files, shares, strict=True):
        examples: list[Row] = [*file.examples]
        count = min(len(examples), max(1, round(total * share)))
        if count < len(examples):
            examples = [examples[place] for place in sorted(generator.sample(range(len(examples)), count))]
        rows += examples
        taken.append(f"{count} of {len(file.examples)} rows of {file.path} ({share:.0%})")
    return rows, [f"mixed: {', '.join(taken)}"] if settings.mix else []


def _shared_system(rows: Sequence[Row]) -> str | None:
    """The system message, if all rows begin with the same one: whoever asks the tuned model has to send it too."""
    turns = [row.prompt if isinstance(row, PreferenceExample) else row.messages for row in rows]
    first = {each[0].content if each and each[0].role == "system" else None for each in turns}
    return first.pop() if len(first) == 1 else None


def _beyond(tokens: Tokenized, model_limit: int | None) -> list[str]:
    longest = int(tokens.examples.lengths.max(initial=0))
    if model_limit is None or longest <= model_limit:
        return []
    return [
        f"the longest example has {longest} tokens; the model was made for {model_limit} (max_position_embeddings): lower "
        "data.max_seq_length"
    ]
