"""Files of examples: what they are is recognised by content, every row is checked, every problem has its place.

`readers` turns a file into rows, `columns` says which column holds what, `forms` turns a row into an example. Here they
are put together: the first readable row decides the form; a row of another form is a problem, never silently converted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from tunesmith.config import SourceConfig
from tunesmith.data.columns import MESSAGE_KEYS, ROLE_TAGS, Columns, resolve
from tunesmith.data.conversations import Seen
from tunesmith.data.forms import READS, form_of, read_row
from tunesmith.data.problems import FileProblem, Problem, RowProblem, listed, printable
from tunesmith.data.readers import SUFFIXES, Contents, Folder, open_source, survey
from tunesmith.errors import DataError
from tunesmith.files import sha256_text
from tunesmith.types import Example, Finding, PreferenceExample

COVERED = frozenset({"mixed_forms"})
"""Problems of a whole file that are also reported row by row: leaving out those rows mends them."""

LACKS_A_COLUMN = {
    "classification": ("text",),
    "multiple_choice": ("qa",),
    "kto": ("messages", "sharegpt", "prompt", "alpaca", "qa"),
}
"""For a file's form, the forms of rows that lack one of its columns: they are read in the file's form, and it is said
what they lack. The other way round nothing is read: a label that only some rows have must not be lost."""

TABLES = ("Parquet", "Arrow", "hub data set")


@dataclass(frozen=True, slots=True)
class DataFile:
    """What was read from one source.

    `container` is what the file is (JSON Lines, JSON, CSV, TSV, Parquet, Arrow, plain text, hub data set), `form` what
    its rows are (see `forms`; empty if no row could be recognised). `rows` counts all rows seen, good and bad. `ignored`
    has the columns that nothing reads, with the number of rows that have them, and the keys of turns that nothing reads,
    as `messages[].weigth`, with the number of conversations. `sha256` is that of the file (of all files of a folder; of the
    rows of a hub data set). `files` are those of a folder that were read, relative to it, and `split` is theirs.
    """

    path: str
    container: str
    form: str
    examples: list[Example] | list[PreferenceExample]
    rows: int = 0
    findings: list[Finding] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    sha256: str = ""
    files: list[str] = field(default_factory=list)
    split: str = ""


def inspect_file(source: SourceConfig | str | Path, max_rows: int | None = None) -> DataFile:
    """Read a source and check every row: what is good is in `examples`, what is wrong in `findings`.

    Problems of the whole source are findings without a line. `max_rows` stops after that many rows, good or bad.
    Raises nothing for what is in the data, nor for a file that is missing.
    """
    if not isinstance(source, SourceConfig):
        source = SourceConfig(path=str(source))
    reading = _Reading(source, max_rows)
    try:
        reading.columns = resolve(source.columns, source.roles)
        for contents in open_source(source, max_rows):
            reading.read(contents)
        if source.path and Path(source.path).is_dir():
            reading.folder = survey(Path(source.path), source.split)
    except FileProblem as problem:
        reading.add(problem, source.path, None)
    return reading.result()


def read_examples(
    source: SourceConfig | str | Path, *, skip_bad_rows: bool = False, max_rows: int | None = None
) -> DataFile:
    """Read a source that has to be good.

    Raises DataError with every error. With `skip_bad_rows` rows with errors are left out (`findings` says which), and
    only a problem of the whole source, or a source without a good row, is an error.
    """
    found = inspect_file(source, max_rows)
    errors = [finding for finding in found.findings if finding.severity == "error"]
    whole = [finding for finding in errors if finding.line is None and finding.check not in COVERED]
    if errors and (whole or not found.examples or not skip_bad_rows):
        raise DataError([str(finding) for finding in errors])
    return found


def _finding(problem: Problem, file: str, line: int | None = None) -> Finding:
    found, fix = printable(problem.found), printable(problem.fix)
    return Finding(problem.check, "error", file, line, found, fix, problem.field)


class _Reading:
    """The state of reading one source, which may be several files."""

    def __init__(self, source: SourceConfig, max_rows: int | None):
        self.source = source
        self.max_rows = max_rows
        self.columns = Columns()
        self.form: str = "" if source.format == "auto" else source.format
        self.first: dict[str, str] = {}  # form -> where it was first seen
        self.examples: list[Example | PreferenceExample] = []
        self.findings: list[Finding] = []
        self.rows = 0
        self.shapes: Counter[tuple[str, ...]] = Counter()
        self.seen = Seen()
        self.folder: Folder | None = None
        self.containers: dict[str, None] = {}
        self.hashes: list[str] = []

    def add(self, problem: Problem, file: str, line: int | None) -> None:
        self.findings.append(_finding(problem, file, line))

    def read(self, contents: Contents) -> None:
        """Read one file. A problem of the whole file is noted, and others go on."""
        self.containers[contents.container] = None
        digest = hashlib.sha256()
        previous = len(self.findings)
        numbers: list[int] = []  # of the rows with findings
        lines: list[int] = []
        try:
            for number, (line, row) in enumerate(contents.rows, 1):
                if self.rows == self.max_rows:
                    break
                self.rows += 1
                if not contents.sha256:  # rows of the hub come from no file
                    digest.update(json.dumps(row, default=str).encode() + b"\n")
                lines.append(line)
                try:
                    self.examples.append(self.read_row(row, contents, line))
                except RowProblem as problem:
                    self.add(problem, contents.path, line)
                    numbers.append(number)
        except FileProblem as problem:
            self.add(problem, contents.path, None)
        if contents.container == "JSON" and len(set(lines)) < len(lines):
            self.number_rows(previous, numbers, Counter(lines))
        self.hashes.append(contents.sha256 or digest.hexdigest())

    def number_rows(self, previous: int, numbers: list[int], rows_on: Counter[int]) -> None:
        """Put the row's number into the findings (from the index `previous`) of lines that hold several rows."""
        for index, number in enumerate(numbers, previous):
            finding = self.findings[index]
            if rows_on[finding.line or 0] > 1:
                self.findings[index] = replace(finding, found=f"row {number}: {finding.found}")

    def read_row(self, row: dict[str, Any] | RowProblem, contents: Contents, line: int) -> Example | PreferenceExample:
        file = contents.path
        if isinstance(row, RowProblem):
            raise row
        self.shapes[tuple(row)] += 1
        if self.source.format == "auto":
            form = self.form_of(row, contents.container)
            self.form = self.form or form
            here = f"line {line}" if file == self.source.path else f"{file}:{line}"
            if form != self.form and form not in LACKS_A_COLUMN.get(self.form, ()):
                self.first.setdefault(form, here)
                raise RowProblem(
                    "form_mismatch",
                    f"this row is of form `{form}`, but {self.first[self.form]} is `{self.form}`",
                    "keep one form in a file",
                )
            self.first.setdefault(self.form, here)
        return read_row(self.form, row, file, line, self.columns, self.seen)

    def form_of(self, row: dict[str, Any], container: str) -> str:
        """The row's form. A table's row lacks what is null in it, so that the file's form says best what is missing."""
        try:
            return form_of(row, self.columns)
        except RowProblem as problem:
            if problem.check != "unknown_form" or container not in TABLES:
                raise
            if self.form:
                return self.form
            found = f"{problem.found} (a null in a table is a missing key)"
            raise RowProblem(problem.check, found, problem.fix) from None

    def result(self) -> DataFile:
        whole = list(self.useless_columns())
        if whole:  # what every row lacks for this reason is not worth a line for each
            self.findings = [f for f in self.findings if f.check not in ("missing_field", "nothing_to_learn")]
        if len(self.first) > 1:
            forms = ", ".join(f"`{form}` (first on {here})" for form, here in self.first.items())
            fix = "keep one form in a file, or name the one to read with data.format"
            whole.append(Finding("mixed_forms", "error", self.source.path, None, f"several forms: {forms}", fix))
        if not self.rows and not self.findings:
            found = "the file holds no rows"
            whole.append(Finding("no_rows", "error", self.source.path, None, found, "expected rows to train on"))
        whole += [*self.useless_turn_settings(), *self.unused_roles()]
        if self.folder and self.folder.skipped:
            found = f"files of this folder that are not read: {listed(self.folder.skipped)}"
            fix = f"a file is read if its name ends in {', '.join(SUFFIXES)}, also with .gz, and does not begin with _"
            whole.append(Finding("skipped_files", "warning", self.source.path, None, printable(found), fix))
        return DataFile(
            self.source.path,
            ", ".join(filter(None, self.containers)),
            self.form,
            cast("list[Example] | list[PreferenceExample]", self.examples),
            self.rows,
            [*whole, *self.findings],
            dict(self.ignored()),
            self.hashes[0] if len(self.hashes) == 1 else sha256_text(self.hashes),
            self.folder.names if self.folder else [],
            self.folder.split if self.folder else "",
        )

    def useless_columns(self) -> Iterator[Finding]:
        """Columns that `data.columns` names and no row has; if all are there, those that the form does not read."""
        there = {key: None for shape in self.shapes for key in shape}
        missing = {key: column for key, column in self.columns.asked.items() if self.shapes and column not in there}
        for key, column in missing.items():
            found = f"data.columns maps `{key}` to `{column}`, but no row has that column"
            fix = f"columns found: {listed(there, limit=30)}"
            yield _finding(FileProblem("column_not_found", found, fix, key), self.source.path)
        read = READS.get(self.form, ())
        for name in sorted(self.columns.mapped.difference(read)) if read and not missing else ():
            found = f"data.columns names `{name}`, which is not read from rows of form `{self.form}`"
            fix = f"remove it, or set another data.format; this form has {listed(read, limit=30)}"
            yield _finding(FileProblem("column_without_effect", found, fix, name), self.source.path)

    def useless_turn_settings(self) -> Iterator[Finding]:
        """What `data.roles` and `data.columns` say of turns, where no row has any."""
        if self.examples and not self.seen.conversations:
            settings = ["data.roles"] if self.source.roles else []
            settings += [
                f"data.columns.{key}" for key in self.source.columns if key in MESSAGE_KEYS or key in ROLE_TAGS
            ]
            if settings:
                found = f"no effect of {listed(settings)}: no row holds a list of turns (their form is `{self.form}`)"
                yield _finding(FileProblem("setting_without_effect", found, "remove it", "roles"), self.source.path)

    def unused_roles(self) -> Iterator[Finding]:
        """Role names of `data.roles` that no turn has: a misspelt one, or one that this file happens not to have."""
        unused = [role for role in self.source.roles if role not in self.seen.roles]
        if unused and self.seen.roles and self.rows != self.max_rows:
            found = f"data.roles names {listed(unused)}, which no turn has"
            fix = f"role names found: {listed(sorted(self.seen.roles), limit=30)}"
            yield Finding(
                "role_not_found", "warning", self.source.path, None, printable(found), printable(fix), "roles"
            )

    def ignored(self) -> Counter[str]:
        """Columns that nothing reads, with the number of rows that have them."""
        unread: Counter[str] = Counter()
        for shape, count in self.shapes.items():
            row = dict.fromkeys(shape)
            read = {self.columns.find(row, name) for name in READS.get(self.form, ())}
            unread.update({key: count for key in shape if key not in read})
        return unread + self.seen.unread
