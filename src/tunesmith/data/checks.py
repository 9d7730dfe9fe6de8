"""Checks over rows that were read well: what would train, but probably not what was meant.

| check | finds |
|---|---|
| duplicate_row | a row that stands earlier in the file, exactly |
| near_duplicate_row | the same but for case, white space and Unicode composition |
| conflicting_answers | the prompt of an earlier row with another answer |
| leaked_row | a held-out answer that the training file has after the same turns, under whatever system message |
| leaked_prompt | turns before a held-out answer that the training file has with another answer |
| label_imbalance | a label ten times rarer than the most frequent one, or with fewer than five rows |
| ignored_column | a column that nothing reads |
| long_row | a row that is probably longer than `data.max_seq_length` |
| nothing_supervised | a row of whose turns none is trained on (an error) |
| control_token | text that looks like a chat template's control token |
| answer_without_text | a supervised answer without a letter or digit |
| placeholder | `{{name}}` left in what the assistant says or the system message |

All but `nothing_supervised` are warnings. What rows have in common is told by their `fingerprints`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from tunesmith.config import DataConfig
from tunesmith.data.conversations import LETTER_OR_DIGIT
from tunesmith.data.fingerprints import Fingerprint, Row, fingerprint, last_answer, supervised_turns
from tunesmith.data.formats import DataFile
from tunesmith.data.lengths import estimate_row, estimate_turn, recommended_max_seq_length
from tunesmith.types import Example, Finding, Message, PreferenceExample

CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "ChatML": ("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    "GPT": ("<|endoftext|>", "<|startoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    "Llama 2 and Mistral": ("<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[TOOL_CALLS]"),
    "Llama 3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
    ),
    "Gemma": ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),
    "Phi and Zephyr": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "gpt-oss": ("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
    "Cohere": ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "DeepSeek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),  # noqa: RUF001
}
"""What chat templates write around turns, by the family that does."""

CONTROL_TOKEN = re.compile("|".join(re.escape(token) for family in CONTROL_TOKENS.values() for token in family))

IDENTIFIERS = frozenset(
    {
        "id",
        "_id",
        "ids",
        "uid",
        "uuid",
        "idx",
        "index",
        "key",
        "row_id",
        "source",
        "origin",
        "dataset",
        "file",
        "path",
        "url",
        "split",
        "fold",
        "lang",
        "language",
        "license",
        "metadata",
        "meta",
    }
)
"""Columns that say which row this is or where it came from: that nothing reads them is expected, and not reported."""

IMBALANCE = 10
"""How many times the rarest label's rows the most frequent one may have."""
FEW_ROWS = 5
"""A label with fewer rows can hardly be learned, or measured."""
LABEL_CHARS = 64
"""Answers are taken for labels only if none is longer, ..."""
ROWS_PER_LABEL = 5
"""... and if each occurs this often on average."""

PLACEHOLDER = re.compile(r"\{\{\s*[^\W\d][\w.-]*\s*\}\}")
NAMED = 10
"""How many labels a message names."""


def labels_of(rows: Sequence[Row]) -> list[str | None]:
    """Each row's class, None where it has none.

    The rows' own labels (KTO's: `desirable`, `undesirable`); where no row has one, the last answers, if they are short
    (64 characters, one line) and each occurs five times or more on average.
    """
    labels: list[str | None] = []
    for row in rows:
        if isinstance(row, PreferenceExample):
            labels.append(None)
        elif row.desirable is not None:
            labels.append("desirable" if row.desirable else "undesirable")
        else:
            labels.append(row.label)
    if any(label is not None for label in labels):
        return labels
    answers = [_short_answer(row) for row in rows]
    if None in answers or len(set(answers)) * ROWS_PER_LABEL > len(answers):
        return labels
    return answers


def check_rows(
    data: DataFile,
    settings: DataConfig,
    held_out: DataFile | None = None,
    tokenized: bool = False,
) -> list[Finding]:
    """Every finding in the rows of `data`, and which rows of `held_out` (`data.eval_path`) are among them.

    With `tokenized`, what only a tokenizer knows is left to it: lengths, the model's own control tokens, loss masks.
    """
    rows: Sequence[Row] = data.examples
    prints = [fingerprint(row, settings.train_on) for row in rows]
    findings = [
        *_ignored_columns(data),
        *_repeated_rows(rows, prints),
        *_conflicting_answers(rows, prints),
        *_label_imbalance(data.path, rows),
    ]
    for row in rows:
        findings += _check_texts(row, settings.train_on)
    if not tokenized:
        for row in rows:
            findings += _check_control_tokens(row)
            findings += _check_supervision(row, settings.train_on)
        findings += _check_lengths(rows, settings)
    if held_out:
        findings += _leaks(rows, prints, held_out, settings.train_on)
    return findings


def _short_answer(row: Row) -> str | None:
    """The row's last answer if it may be a label: one short line."""
    if isinstance(row, PreferenceExample) or row.messages is None:
        return None
    last = last_answer(row.messages)
    if last == len(row.messages) or row.messages[last].tool_calls:
        return None
    answer = row.messages[last].content.strip()
    return answer if len(answer) <= LABEL_CHARS and "\n" not in answer else None


def _texts(row: Row) -> Iterator[tuple[str, str]]:
    """(whose, what) of every text in a row."""
    if isinstance(row, PreferenceExample):
        messages: tuple[Message, ...] = row.prompt + row.chosen + row.rejected
    elif row.messages is None:
        yield "", row.text or ""
        return
    else:
        messages = row.messages
    for message in messages:
        yield message.role, message.content
        if message.reasoning:
            yield message.role, message.reasoning


def _warning(check: str, row: Row, found: str, fix: str) -> Finding:
    return Finding(check, "warning", row.file, row.line, found, fix)


def _ignored_columns(file: DataFile) -> Iterator[Finding]:
    if not file.examples or any(finding.check == "form_mismatch" for finding in file.findings):
        return  # the rows' own problems say it
    for column, count in file.ignored.items():
        if column.casefold() not in IDENTIFIERS:
            is_key = "[]." in column  # of a conversation's turns
            found = (
                f"nothing reads the {'key' if is_key else 'column'} `{column}` ({count} of {file.rows} rows have it)"
            )
            fix = "correct its name if it is meant for another, else ignore this"
            if not is_key:
                fix = "name what it holds in data.columns if it matters, else ignore this"
            yield Finding("ignored_column", "warning", file.path, None, found, fix, field=column)


def _repeated_rows(rows: Sequence[Row], prints: Sequence[Fingerprint]) -> list[Finding]:
    exact: dict[bytes, int] = {}
    near: dict[bytes, int] = {}
    same: list[tuple[int, int]] = []
    alike: list[tuple[int, int]] = []
    for index, print_ in enumerate(prints):
        first = exact.setdefault(print_.exact, index)
        nearly = near.setdefault(print_.near, index)
        if first != index:
            same.append((index, first))
        elif nearly != index:
            alike.append((index, nearly))
    total = len(rows)
    fix = "remove the repetitions, or keep them if these rows are to count more"
    return [
        *(
            _warning(
                "duplicate_row",
                rows[index],
                f"the same as {_place(rows[first], rows[index])} ({len(same)} of {total} rows repeat an earlier one)",
                fix,
            )
            for index, first in same
        ),
        *(
            _warning(
                "near_duplicate_row",
                rows[index],
                f"the same as {_place(rows[first], rows[index])} but for case, white space or Unicode composition "
                f"({len(alike)} of {total} rows are such)",
                fix,
            )
            for index, first in alike
        ),
    ]


def _conflicting_answers(rows: Sequence[Row], prints: Sequence[Fingerprint]) -> list[Finding]:
    first: dict[bytes, int] = {}
    seen: set[bytes] = set()
    conflicts: list[tuple[int, int]] = []
    for index, print_ in enumerate(prints):
        if print_.question is None or print_.near in seen:
            continue
        seen.add(print_.near)
        earlier = first.setdefault(print_.question, index)
        if prints[earlier].answer != print_.answer:
            conflicts.append((index, earlier))
    return [
        _warning(
            "conflicting_answers",
            rows[index],
            f"the prompt of {_place(rows[earlier], rows[index])} with another answer{_both_answers(rows[earlier], rows[index])} "
            f"({len(conflicts)} of {len(rows)} rows are such)",
            "keep the right one, unless several answers are meant",
        )
        for index, earlier in conflicts
    ]


def _both_answers(earlier: Row, later: Row) -> str:
    """The two answers where they are short enough to stand in a message."""
    answers = [_short_answer(row) for row in (earlier, later)]
    if None in answers or answers[0] == answers[1]:
        return ""
    return f": {answers[0]!r} there, {answers[1]!r} here"


def _label_imbalance(path: str, rows: Sequence[Row]) -> list[Finding]:
    counts = Counter(label for label in labels_of(rows) if label is not None)
    if len(counts) < 2:
        return []
    (most, most_rows), (least, least_rows) = counts.most_common()[0], counts.most_common()[-1]
    few = sorted((count, label) for label, count in counts.items() if count < FEW_ROWS)
    parts = []
    if few:
        names = ", ".join(f"`{label}` {count}" for count, label in few[:NAMED]) + (", ..." if len(few) > NAMED else "")
        parts.append(f"{len(few)} of {len(counts)} labels have fewer than {FEW_ROWS} rows ({names})")
    if most_rows > IMBALANCE * least_rows:
        parts.append(
            f"the most frequent label, `{most}`, has {most_rows} rows, {most_rows / least_rows:.0f} times those of the "
            f"rarest, `{least}`, with {least_rows}"
        )
    if not parts:
        return []
    fix = "collect more of the rare ones, or judge the model label by label"
    return [Finding("label_imbalance", "warning", path, None, "; ".join(parts), fix)]


def _check_control_tokens(row: Row) -> Iterator[Finding]:
    for whose, text in _texts(row):
        if match := CONTROL_TOKEN.search(text):
            token = match.group()
            family = next(name for name, tokens in CONTROL_TOKENS.items() if token in tokens)
            found = f"the {whose + ' ' if whose else ''}text holds {token!r}, a control token of {family}"
            yield _warning("control_token", row, found, "it is encoded as plain text; remove it if it is not meant")
            return


def _check_supervision(row: Row, train_on: str) -> Iterator[Finding]:
    if isinstance(row, Example) and row.messages is not None and not any(supervised_turns(row.messages, train_on)):
        found = "no turn of this row is trained on; there is nothing to learn from it"
        fix = "set `train` or `weight` of an assistant's turn, or remove the row"
        yield Finding("nothing_supervised", "error", row.file, row.line, found, fix)


def _check_texts(row: Row, train_on: str) -> Iterator[Finding]:
    for whose, text in _texts(row):
        if (
            whose in ("assistant", "system")
            and "{{" in text
            and (names := sorted({match.group() for match in PLACEHOLDER.finditer(text)}))
        ):
            found = f"the {whose} text holds {', '.join(map(repr, names[:3]))}: a placeholder that nothing fills in"
            yield _warning("placeholder", row, found, "replace it, e.g. with the assistant's name")
            break
    if isinstance(row, PreferenceExample) or row.messages is None:
        return
    for message, counts in zip(row.messages, supervised_turns(row.messages, train_on), strict=True):
        if (
            counts
            and message.role == "assistant"
            and not message.tool_calls
            and not LETTER_OR_DIGIT.search(message.content)
        ):
            found = f"the answer {message.content.strip()[:20]!r} has no letter or digit"
            yield _warning("answer_without_text", row, found, "write the answer, or remove the row")
            return


def _check_lengths(rows: Sequence[Row], settings: DataConfig) -> Iterator[Finding]:
    lengths = [estimate_row(row) for row in rows]
    limit = settings.max_seq_length
    if limit == "auto":
        limit = recommended_max_seq_length(lengths, None) if lengths else 0
    for row, length in zip(rows, lengths, strict=True):
        if length > limit:
            found = f"about {length:,} tokens (an estimate), data.max_seq_length is {limit}"
            yield _warning("long_row", row, found, _fate(row, limit, settings.overlong))


def _fate(row: Row, limit: int, overlong: str) -> str:
    """What `data.overlong` does with a row that is too long."""
    if overlong == "auto":
        overlong = "split" if isinstance(row, Example) and row.text is not None else "error"
    if overlong == "truncate" and _prompt_estimate(row) >= limit:
        return (
            "cut to that (data.overlong: truncate), nothing of its answer is left, and training refuses it; "
            "shorten its prompt, or set data.overlong: drop"
        )
    return {
        "error": "training refuses it; raise that, shorten the row, or set data.overlong to truncate, drop or split",
        "truncate": "it is cut to that (data.overlong: truncate)",
        "drop": "it is dropped (data.overlong: drop)",
        "split": "it is split into several (data.overlong: split)",
    }[overlong]


def _prompt_estimate(row: Row) -> float:
    """About how many tokens come before the first answer."""
    if isinstance(row, PreferenceExample):
        return sum(map(estimate_turn, row.prompt))
    messages = row.messages or ()
    first = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
    return sum(map(estimate_turn, messages[:first]))


def _place(other: Row, row: Row) -> str:
    """Where another row is, as seen from `row`."""
    return f"line {other.line}" if other.file == row.file else other.where


def repeated_across(files: Sequence[DataFile], train_on: str) -> list[Finding]:
    """Rows of a file that stand in an earlier one of `files`, exactly or nearly: a mix would train on them twice."""
    exact: dict[bytes, Row] = {}
    near: dict[bytes, Row] = {}
    findings: list[Finding] = []
    for file in files:
        rows: Sequence[Row] = file.examples
        prints = [fingerprint(row, train_on) for row in rows]
        same: list[tuple[Row, Row]] = []
        alike: list[tuple[Row, Row]] = []
        for row, print_ in zip(rows, prints, strict=True):
            if print_.exact in exact:
                same.append((row, exact[print_.exact]))
            elif print_.near in near:
                alike.append((row, near[print_.near]))
        for row, print_ in zip(rows, prints, strict=True):
            exact.setdefault(print_.exact, row)
            near.setdefault(print_.near, row)
        total = len(rows)
        fix = "remove it from one of the two files, or keep it if it is to count more"
        for row, other in same:
            found = f"the same as {other.where} ({len(same)} of {total} rows repeat one of another source)"
            findings.append(_warning("duplicate_row", row, found, fix))
        for row, other in alike:
            found = (
                f"the same as {other.where} but for case, white space or Unicode composition "
                f"({len(alike)} of {total} rows are such)"
            )
            findings.append(_warning("near_duplicate_row", row, found, fix))
    return findings


def _leaks(rows: Sequence[Row], prints: Sequence[Fingerprint], held_out: DataFile, train_on: str) -> Iterator[Finding]:
    """The rows of `held_out` that have an answer of `rows`, or a prompt of theirs."""
    answers: dict[bytes, tuple[Row, bool]] = {}  # with whether it is the row's last answer
    prompts: dict[bytes, Row] = {}
    for row, print_ in zip(rows, prints, strict=True):
        for exchange in print_.exchanges:
            ends = exchange is print_.exchanges[-1]
            if exchange.whole not in answers or (ends and not answers[exchange.whole][1]):
                answers[exchange.whole] = (row, ends)
            if exchange.prompt is not None:
                prompts.setdefault(exchange.prompt, row)
    leaked: list[tuple[Row, str]] = []
    asked: list[tuple[Row, str]] = []
    held: Sequence[Row] = held_out.examples
    for row in held:
        exchanges = fingerprint(row, train_on).exchanges
        # The last answer first: it is what the row is about, and what evaluation asks for.
        last = exchanges[-1]
        for exchange in (last, *exchanges[:-1]):
            if exchange.whole in answers:
                trained, ends = answers[exchange.whole]
                what = f"turn {exchange.turn} of this held-out row is also an answer in training"
                if exchange is last:
                    what = f"this held-out row is {'also' if ends else 'how'} a training row{'' if ends else ' begins'}"
                leaked.append((row, f"{what}, {trained.where}"))
                break
        else:
            for exchange in (last, *exchanges[:-1]):
                if exchange.prompt in prompts:
                    whose = "this held-out prompt"
                    if exchange is not last:
                        whose = f"the prompt of turn {exchange.turn} of this held-out row"
                    where = prompts[exchange.prompt].where
                    asked.append((row, f"{whose} is also a training prompt, {where}, with another answer"))
                    break
    fix = "remove it from one of the two files, or its score says nothing about unseen data"
    for check, found in (("leaked_row", leaked), ("leaked_prompt", asked)):
        for row, what in found:
            yield _warning(check, row, f"{what} ({len(found)} of {len(held)} rows are such)", fix)
