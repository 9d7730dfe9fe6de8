"""Divide one file into train, validation and test files: by label, without a row on two sides.

Rows that are the same but for case, white space and Unicode composition, and rows with the same turns before any answer
that is trained on (the same question, two conversations that begin alike), form a group that is never divided. Each label's groups are dealt out largest first, in an order drawn from the seed, each to the file that
is furthest below its share: for groups of one row that is the method of largest remainders. What rounding leaves of one
label (up to one row) is carried to the next, so that rare labels do not all end in the largest file.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data.checks import labels_of
from tunesmith.data.fingerprints import Row, fingerprint
from tunesmith.data.readers import GZIP, UTF8_MARK, open_source
from tunesmith.errors import DataError, RunError
from tunesmith.files import atomic_folder, finite

if TYPE_CHECKING:
    from tunesmith.config import SourceConfig
    from tunesmith.data.formats import DataFile


def split_rows(
    rows: Sequence[Row], shares: Mapping[str, float], seed: int, train_on: str = "assistant"
) -> dict[str, list[int]]:
    """Positions of the rows that each file of `shares` ({name: share}, together 1) gets, in their order.

    Deterministic in (rows, shares, seed, train_on). A file may get no row where there are too few groups.
    """
    labels = labels_of(rows)
    strata: dict[str | None, list[list[int]]] = defaultdict(list)
    for group in groups_of(rows, train_on):
        most_common = Counter(labels[position] for position in group).most_common(1)[0][0]
        strata[most_common].append(group)
    dealt: dict[str, list[int]] = {name: [] for name in shares}
    missing = dict.fromkeys(shares, 0.0)  # rows below its share, by file
    by_size = sorted(strata.items(), key=lambda item: -sum(map(len, item[1])))
    for label, groups in by_size:
        total = sum(map(len, groups))
        for name, share in shares.items():
            missing[name] = share * total + max(-1.0, min(1.0, missing[name]))
        random.Random(f"{seed}/{label}").shuffle(groups)
        for group in sorted(groups, key=len, reverse=True):
            name = max(missing, key=missing.__getitem__)
            dealt[name] += group
            missing[name] -= len(group)
    return {name: sorted(positions) for name, positions in dealt.items()}


def groups_of(rows: Sequence[Row], train_on: str = "assistant") -> list[list[int]]:
    """Positions of the rows that must stay together, group by group, in the order of their first rows.

    `train_on` is `data.train_on`: rows may share an answer that none of them is trained on.
    """
    parent = list(range(len(rows)))

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = parent[parent[position]]
            position = parent[position]
        return position

    first: dict[bytes, int] = {}
    for position, row in enumerate(rows):
        print_ = fingerprint(row, train_on)
        shared = [exchange.prompt or exchange.whole for exchange in print_.exchanges]
        for key in (b"row" + print_.near, *(b"exchange" + digest for digest in shared)):
            one, other = root(first.setdefault(key, position)), root(position)
            parent[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = defaultdict(list)
    for position in range(len(rows)):
        groups[root(position)].append(position)
    return list(groups.values())


def write_split(
    out: Path,
    source: SourceConfig,
    data: DataFile,
    parts: Mapping[str, Sequence[int]],
    max_rows: int | None = None,
    train_on: str = "assistant",
) -> dict[str, Path]:
    """Write OUT/NAME.jsonl for every part; returns their paths. All files appear at once, or none.

    Rows of JSON Lines are copied byte for byte; of other files, their values are written as JSON Lines: dates and times in
    ISO 8601, decimals as text, NaN and infinities as null. Raises RunError where `out` exists, DataError where a part is
    empty, and for columns of bytes.
    """
    refuse_existing(out)
    for name, positions in parts.items():
        if not positions:
            groups = len(groups_of(data.examples, train_on))
            raise DataError(
                f"{data.path}: {name} would get no row ({len(data.examples)} rows in {groups} groups that stay together); "
                "give it a larger share, or leave it out (share 0)"
            )
    lines = _lines_of(data, _json_lines(source, max_rows))
    with atomic_folder(out) as folder:
        for name, positions in parts.items():
            content = b"".join(lines[position] + b"\n" for position in positions)
            (folder / f"{name}.jsonl").write_bytes(content)
    return {name: out / f"{name}.jsonl" for name in parts}


def refuse_existing(out: Path) -> None:
    """Raise RunError unless `out` is free (an empty folder is)."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out}: already exists; choose another --out, or remove it")


def _lines_of(data: DataFile, found: Mapping[str, Sequence[bytes]]) -> list[bytes]:
    """The line of each of the file's good rows. Of several rows on one line the good ones must be all."""
    lines = []
    taken: Counter[str] = Counter()
    expected = Counter(row.where for row in data.examples)
    for row in data.examples:
        here = found[row.where]
        if len(here) != expected[row.where]:
            raise DataError(f"{row.where}: several rows on one line, some with errors; write one row a line")
        lines.append(here[taken[row.where]])
        taken[row.where] += 1
    return lines


def _json_lines(source: SourceConfig, max_rows: int | None) -> dict[str, list[bytes]]:
    """Every row as one line of JSON, by `file:line`; a list of rows may have several on one line."""
    found: dict[str, list[bytes]] = defaultdict(list)
    for contents in open_source(source, max_rows):
        if contents.container == "JSON Lines":
            raw = Path(contents.path).read_bytes()
            raw = gzip.decompress(raw) if raw.startswith(GZIP) else raw
            for number, line in enumerate(raw.removeprefix(UTF8_MARK).split(b"\n"), 1):
                found[f"{contents.path}:{number}"].append(line)
            continue
        for number, row in contents.rows:
            if isinstance(row, dict):
                place = f"{contents.path}:{number}"
                found[place].append(_json_line(row, place))
    return found


def _json_line(row: dict[str, Any], place: str) -> bytes:
    try:
        return json.dumps(finite(row), ensure_ascii=False, default=_json_value).encode()
    except TypeError as error:
        raise DataError(f"{place}: {error}; write the file without such columns first") from None


def _json_value(value: Any) -> str:
    """What stands for a value of a table that JSON does not have."""
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, bytes):
        raise TypeError(f"the row holds bytes ({value[:16]!r}), which JSON Lines cannot hold")
    return str(value)
