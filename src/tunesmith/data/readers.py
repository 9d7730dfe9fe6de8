"""From a file to rows: which container it is, recognised by its content, and the rows with their physical lines.

| container | recognised by | a row's line |
|---|---|---|
| JSON Lines | a first line that is a JSON object | its own |
| JSON | a list of objects, an object with the list in `data` or `rows`, or objects one after the other | where it starts |
| CSV, TSV | the name, or a header of known columns; `,` `;` or tab between the cells | where it starts |
| Parquet, Arrow | magic bytes | its number |
| plain text | none of the others | where the sample starts |

Each may be gzipped. The name decides only where the content leaves it open. Text is UTF-8, with or without a byte-order
mark. In a folder every file is read, each as what it is.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import SourceConfig
from tunesmith.data.problems import FileProblem, RowProblem, listed
from tunesmith.data.tables import hub_rows, is_hub_id, table_rows
from tunesmith.data.text_files import CELL_SUFFIXES, JSON_SUFFIXES, Rows, text_container, text_rows
from tunesmith.files import sha256_file

SUFFIXES = (*JSON_SUFFIXES, *CELL_SUFFIXES, ".parquet", ".arrow", ".txt")
"""Names of the files of a folder that hold data."""

ARCHIVES = (".zip", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tar", ".tgz", ".xls", ".xlsx")
"""Names of files that may hold data and cannot be read: a folder with one of them is not read without a word."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in a file's or folder's name that say which split it belongs to, as `datasets` has them."""

NOT_DATA = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|_SUCCESS|(readme|licen[cs]e|notice|citation)(\.\w+)?",
    re.IGNORECASE,
)
"""What `datasets`, Spark, or an author puts beside the data."""

UTF8_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")  # the file's magic bytes, and the mark before a stream's first message

REFUSED = {
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"PK\x03\x04": ("a zip archive", "unpack it first"),
    b"BZh": ("a bzip2 archive", "unpack it first"),
    b"\xfd7zXZ\x00": ("an xz archive", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "unpack it first"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first"),
    b"Rar!": ("a RAR archive", "unpack it first"),
    b"\xd0\xcf\x11\xe0": ("an old Microsoft Office file", "save its rows as CSV"),
    b"%PDF": ("a PDF file", "extract its text first"),
    b"SQLite format 3\x00": ("an SQLite database", "export its rows as CSV or JSON Lines"),
    b"\x93NUMPY": ("a NumPy array", "tunesmith reads texts"),
    b"\x89HDF": ("an HDF5 file", "export its rows as Parquet or JSON Lines"),
    b"\x89PNG": ("an image", "tunesmith reads texts"),
    b"\xff\xd8\xff": ("an image", "tunesmith reads texts"),
    b"ORC": ("an ORC file", "export its rows as Parquet"),
    b"Obj\x01": ("an Avro file", "export its rows as Parquet or JSON Lines"),
    b"FEA1": ("a Feather 1 file", "export its rows as Parquet"),
}
"""Files that are known by their first bytes and not read: what they are, and what to do."""


@dataclass(frozen=True, slots=True)
class Contents:
    """An open file: what it is (empty if it cannot be opened), its rows, and the SHA-256 of its bytes."""

    path: str
    container: str
    rows: Rows
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Folder:
    """What a folder holds: the data files of one split, and files that are not read though nothing says why.

    `names` are those of `files`, relative to the folder, as `skipped` is. `split` is empty where no name has one.
    """

    files: list[Path]
    names: list[str]
    split: str
    skipped: list[str]


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """The rows of a file of a folder that cannot be opened: asking for them raises why, and the next file is read."""

    problem: FileProblem

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
        raise self.problem


def open_source(source: SourceConfig, max_rows: int | None) -> Iterator[Contents]:
    """The file of a source, the files of a folder, or a hub data set.

    Raises FileProblem for what cannot be read, and for a setting that this kind of source does not have.
    """
    if not source.path:
        raise FileProblem("no_such_file", "the path is empty", "name a file, a folder or a hub data set")
    try:
        mode = Path(source.path).stat().st_mode
        is_folder, exists = stat.S_ISDIR(mode), True
        if not (is_folder or stat.S_ISREG(mode)):
            found = "a pipe or device, not a file"
            raise FileProblem("unreadable_file", found, "data is read more than once: save it as a file")
    except (FileNotFoundError, ValueError):  # ValueError: a NUL in the path
        is_folder = exists = False
    except OSError as error:
        raise FileProblem("unreadable_file", f"cannot be read ({error.strerror})") from None
    if not exists and is_hub_id(source.path) and not _is_data_name(source.path):
        _check_sample_by(source.sample_by, "a hub data set")
        yield Contents(source.path, "hub data set", hub_rows(source, max_rows))
        return
    if not exists:
        raise FileProblem("no_such_file", "no such file")
    for name in ("subset", "streaming", *(() if is_folder else ("split",))):
        if getattr(source, name):
            what = "a folder" if is_folder else "a file"
            found = f"data.{name} has no effect on {what}"
            raise FileProblem("setting_without_effect", found, "remove it, or name a hub data set", name)
    if not is_folder:
        yield _open_file(Path(source.path), source.sample_by)
        return
    for path in survey(Path(source.path), source.split).files:
        try:
            contents = _open_file(path, source.sample_by)
        except FileProblem as problem:
            contents = Contents(str(path), "", _Unreadable(problem))
        yield contents


def _is_data_name(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith((*SUFFIXES, *ARCHIVES))


def survey(folder: Path, split: str | None) -> Folder:
    """The data files of a folder that belong to a split: `train` unless told, or the only one.

    Hidden files and what is known to stand beside data are passed over. Raises FileProblem if no file is left, or if
    the names do not say which split each file belongs to.
    """
    splits: dict[str, list[Path]] = {}
    skipped: list[str] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or NOT_DATA.fullmatch(path.name) or any(part.startswith(".") for part in parts):
            continue
        if _is_data_name(path.name) and not any(part.startswith("_") for part in parts):
            splits.setdefault(_split_of(parts), []).append(path)
        else:
            skipped.append(str(path.relative_to(folder)))
    if not splits:
        raise FileProblem("no_data_files", "no data files in this folder", f"expected {', '.join(SUFFIXES)}")
    unnamed = splits.pop("", [])
    if not splits and split in (None, "train"):
        return Folder(unnamed, [str(path.relative_to(folder)) for path in unnamed], "", skipped)
    if not splits:
        splits["train"] = unnamed
    elif unnamed:
        found = f"{listed(path.relative_to(folder) for path in unnamed)}: no split in the name, unlike the other files"
        raise FileProblem("file_without_split", found, f"put {' or '.join(SPLITS)} into it, or move the file elsewhere")
    wanted = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else "")
    if wanted not in splits:
        found = f"no split `{wanted or 'train'}` in this folder"
        raise FileProblem("no_such_split", found, f"data.split can be {listed(sorted(splits))}", "split")
    files = splits[wanted]
    return Folder(files, [str(path.relative_to(folder)) for path in files], wanted, skipped)


def _split_of(parts: tuple[str, ...]) -> str:
    """The split that a file's own name speaks of, else its folders' names; empty if none does."""
    for part in reversed(parts):
        words = set(re.split(r"[-._ 0-9]+", part.lower()))
        for split, names in SPLITS.items():
            if words & set(names):
                return split
    return ""


def _open_file(path: Path, sample_by: str) -> Contents:
    try:
        with path.open("rb") as file:
            container = _table_container(file.read(6))
            if container:
                _check_sample_by(sample_by, container)
                return Contents(str(path), container, table_rows(path, container), sha256_file(path))
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise FileProblem("unreadable_file", f"cannot be read ({error.strerror})") from None
    digest = hashlib.sha256(data).hexdigest()
    suffix = path.suffix.lower()
    if data.startswith(GZIP):
        suffix = Path(path.stem).suffix.lower() if suffix == ".gz" else suffix
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            fix = "copy or pack it again"
            raise FileProblem("damaged_file", f"a damaged gzip file: {error}", fix) from None
        container = _table_container(data[:6])
        if container:
            _check_sample_by(sample_by, container)
            return Contents(str(path), container, table_rows(data, container), digest)
    _refuse_binary(data)
    data = data.removeprefix(UTF8_MARK)
    if not data.strip():
        expected = "one JSON object a line" if suffix in JSON_SUFFIXES else "rows to train on"
        raise FileProblem("empty_file", "the file is empty", f"expected {expected}")
    container = text_container(data, suffix)
    _check_sample_by(sample_by, container)
    if (
        b"\n" not in data
        and b"\r" in data.rstrip()
        and container != "JSON"
        and not (container == "plain text" and sample_by == "document")
    ):
        found = "the lines end in a carriage return alone, as on a classic Mac"
        raise FileProblem("line_ends", found, "save it with line feeds, e.g. tr '\\r' '\\n' < OLD > NEW")
    return Contents(str(path), container, text_rows(data, container, sample_by), digest)


def _check_sample_by(sample_by: str, container: str) -> None:
    if sample_by != "document" and container != "plain text":
        found = f"data.sample_by has no effect on {container}"
        raise FileProblem("setting_without_effect", found, "it is for plain text; remove it", "sample_by")


def _table_container(head: bytes) -> str:
    if head.startswith(PARQUET):
        return "Parquet"
    return "Arrow" if head.startswith(ARROW) else ""


def _refuse_binary(data: bytes) -> None:
    for magic, (what, fix) in REFUSED.items():
        if data.startswith(magic):
            if magic == b"PK\x03\x04" and b"xl/" in data:
                what, fix = "an Excel workbook", "save its sheet as CSV"
            raise FileProblem("unsupported_file", f"this is {what}, not a file of rows", fix)
