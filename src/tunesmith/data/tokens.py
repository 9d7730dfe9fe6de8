"""From examples to tokens: in parallel, kept on disk by content, and fitted to `data.max_seq_length`.

Examples are tokenized in shards of a few thousand. A shard is kept under the hash of all that its tokens depend on: the
rows' texts, the tokenizer, the template with its variables, what is supervised, and this package's version. So a changed
file, an appended one or an interrupted run costs only the shards that are new, and tokens of other settings are never
found. A shard is a digest followed by its payload; one that does not agree with its digest is made anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from tunesmith.config import DataConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.lengths import recommended_max_seq_length
from tunesmith.errors import MachineError, RunError
from tunesmith.files import cache_folder, write_atomic
from tunesmith.types import Example, Finding, Message, Progress, TokenizedExample, no_progress
from tunesmith.version import __version__

SHARD_ROWS = 2000

ROWS_A_PROCESS = 4000
"""A process that tokenizes is worth its start (about 0.1 s) from this many rows on."""

TOKENS_VERSION = 1
"""Raised with every change to what tokens or masks come out: shards of another version are never found."""

UNUSED_DAYS = 30
"""Shards that no run has used for so long are removed."""


class TokenStore(Sequence[TokenizedExample]):
    """Tokenized examples in flat arrays: 5 bytes a token. `store[i]` is a view, `rows[i]` the index of its Example."""

    def __init__(
        self, ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray, rows: np.ndarray, examples: Sequence[Example]
    ):
        self.lengths = lengths  # (N,) int32
        self.rows = rows  # (N,) int32
        self._ids, self._mask = ids, mask  # (T,) int32 and bool, all examples end to end
        self._bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._places = [(example.file, example.line) for example in examples]

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        piece = slice(self._bounds[index], self._bounds[index + 1])
        file, line = self._places[self.rows[index]]
        return TokenizedExample(self._ids[piece], self._mask[piece], line, file)

    def digest(self) -> str:
        """SHA-256 of every token id and mask: what the data, the tokenizer and the template together come to."""
        digest = hashlib.sha256()
        for array in (self.lengths.astype("<i4"), self._ids.astype("<i4"), np.packbits(self._mask)):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Examples as tokens. `findings` has errors for the rows that are not among them, and warnings."""

    examples: TokenStore
    findings: list[Finding]
    max_seq_length: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """The tokens of consecutive examples. `findings` are (index in the shard, check, severity, found, fix)."""

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    findings: list[tuple[int, str, str, str, str]]
    added_ends: bool

    def to_bytes(self) -> bytes:
        from safetensors.numpy import save

        arrays = {"ids": self.ids, "mask": np.packbits(self.mask), "lengths": self.lengths, "rows": self.rows}
        payload = save(arrays, {"findings": json.dumps(self.findings), "added_ends": str(int(self.added_ends))})
        return hashlib.sha256(payload).digest() + payload

    @classmethod
    def from_bytes(cls, data: bytes) -> _Shard | None:
        """None for data that is damaged."""
        from safetensors.numpy import load

        digest, payload = data[:32], data[32:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        arrays = load(payload)
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])["__metadata__"]
        mask = np.unpackbits(arrays["mask"], count=len(arrays["ids"])).astype(bool)
        findings = [tuple(finding) for finding in json.loads(header["findings"])]
        return cls(arrays["ids"], mask, arrays["lengths"], arrays["rows"], findings, header["added_ends"] == "1")


def tokenize(
    chat: ChatFormat,
    examples: Sequence[Example],
    data: DataConfig,
    *,
    progress: Progress = no_progress,
    model_limit: int | None = None,
    stage: str = "tokenizing",
) -> Tokenized:
    """Tokenize examples and apply `data.overlong` to those of more than `data.max_seq_length` tokens.

    `model_limit` is the longest sequence that the model knows; `max_seq_length: auto` never goes beyond it. Uses
    `data.train_on`, `num_proc` and `cache`. Findings of errors: `template` (refused, or no exact mask), `too_long`,
    `nothing_supervised`. Warnings: `control_token`, `truncated`, `dropped`, `split`, `unrolled`, `no_end_token`.
    """
    shards = list(_shards(chat, examples, data, progress, stage))
    findings = [
        Finding(check, severity, examples[start + index].file, examples[start + index].line, found, fix)  # type: ignore[arg-type]
        for start, shard in zip(range(0, len(examples), SHARD_ROWS), shards, strict=True)
        for index, check, severity, found, fix in shard.findings
    ]
    store = TokenStore(
        np.concatenate([shard.ids for shard in shards]) if shards else np.zeros(0, np.int32),
        np.concatenate([shard.mask for shard in shards]) if shards else np.zeros(0, bool),
        np.concatenate([shard.lengths for shard in shards]) if shards else np.zeros(0, np.int32),
        np.concatenate([shard.rows + number * SHARD_ROWS for number, shard in enumerate(shards)]).astype(np.int32)
        if shards
        else np.zeros(0, np.int32),
        examples,
    )
    if any(shard.added_ends for shard in shards):
        findings.append(
            Finding(
                "no_end_token",
                "warning",
                examples[0].file,
                None,
                f"the chat template ({chat.name}) writes no end token after an answer",
                f"{chat.tokenizer.eos_token!r} is added to each and trained, so that the model learns to stop",
            )
        )
    if (unrolled := len(store) - len(np.unique(store.rows))) > 0:
        rows = len(np.unique(store.rows))
        findings.append(
            Finding(
                "unrolled",
                "warning",
                examples[0].file,
                None,
                f"no single text shows every answer of these conversations as the model has to write it ({_why(chat, shards)})",
                f"{rows} conversations became {rows + unrolled} examples, each cut after the answer that it teaches",
            )
        )
    limit = data.max_seq_length
    if limit == "auto":
        limit = recommended_max_seq_length(store.lengths.tolist(), model_limit) if len(store) else 2048
    fitted, more = _fit(store, examples, limit, data.overlong)
    return Tokenized(fitted, findings + more, limit)


def _why(chat: ChatFormat, shards: Sequence[_Shard]) -> str:
    if any(shard.added_ends for shard in shards):
        return f"the chat template, {chat.name}, writes no end token"
    return f"the chat template, {chat.name}, rewrites earlier turns, or a token runs over the border of an answer"


def _fit(store: TokenStore, examples: Sequence[Example], limit: int, overlong: str) -> tuple[TokenStore, list[Finding]]:
    """Apply `data.overlong`, and leave out what is left without a supervised token."""
    findings: list[Finding] = []
    kept: list[tuple[np.ndarray, np.ndarray, int]] = []
    changed = False
    for index, length in enumerate(store.lengths.tolist()):
        row = int(store.rows[index])
        example, tokens = examples[row], store[index]
        pieces = [(tokens.input_ids, tokens.loss_mask)]
        cut = False
        if length > limit:
            what = overlong if overlong != "auto" else "split" if example.text is not None else "error"
            pieces, cut, changed = _pieces(tokens, limit, what), True, True
            findings.append(_overlong_finding(example, length, limit, what, len(pieces)))
        supervised = [(ids, mask) for ids, mask in pieces if mask[1:].any()]
        if pieces and not supervised:
            changed = True
            why = " once cut to data.max_seq_length" if cut else ""
            findings.append(
                Finding(
                    "nothing_supervised",
                    "error",
                    example.file,
                    example.line,
                    f"no supervised token is left{why}",
                    "there is nothing to learn from this row"
                    + ("; raise data.max_seq_length, or set data.overlong: drop" if cut else ""),
                )
            )
        kept += [(ids, mask, row) for ids, mask in supervised]
    if not changed:
        return store, findings
    fitted = TokenStore(
        np.concatenate([ids for ids, _, _ in kept]) if kept else np.zeros(0, np.int32),
        np.concatenate([mask for _, mask, _ in kept]) if kept else np.zeros(0, bool),
        np.array([len(ids) for ids, _, _ in kept], dtype=np.int32),
        np.array([row for _, _, row in kept], dtype=np.int32),
        examples,
    )
    return fitted, findings


def _pieces(tokens: TokenizedExample, limit: int, what: str) -> list[tuple[np.ndarray, np.ndarray]]:
    ids, mask = tokens.input_ids, tokens.loss_mask
    if what == "truncate":
        return [(ids[:limit], mask[:limit])]
    if what == "split":  # each piece begins with the last token of the one before: every token is predicted once
        return [
            (ids[start : start + limit], mask[start : start + limit]) for start in range(0, len(ids) - 1, limit - 1)
        ]
    return []


def _overlong_finding(example: Example, length: int, limit: int, what: str, num_pieces: int) -> Finding:
    found = f"{length} tokens, data.max_seq_length is {limit}"
    fixes = {
        "error": ("too_long", "raise it, or set data.overlong to truncate, split or drop"),
        "truncate": ("truncated", f"cut to its first {limit} tokens"),
        "drop": ("dropped", "left out"),
        "split": ("split", f"split into {num_pieces} examples"),
    }
    check, fix = fixes[what]
    return Finding(check, "error" if what == "error" else "warning", example.file, example.line, found, fix)


def _shards(
    chat: ChatFormat, examples: Sequence[Example], data: DataConfig, progress: Progress, stage: str
) -> Iterator[_Shard]:
    """Every shard in order: from the cache, or made here or in other processes."""
    starts = range(0, len(examples), SHARD_ROWS)
    cache = _Cache(chat, data.train_on) if data.cache else None
    keys = [cache.key(examples[start : start + SHARD_ROWS]) for start in starts] if cache else []
    found = {start: shard for start, key in zip(starts, keys, strict=False) if cache and (shard := cache.read(key))}
    missing = [start for start in starts if start not in found]
    if len(starts) <= 1:
        progress = no_progress  # done in a moment
    done = sum(min(SHARD_ROWS, len(examples) - start) for start in found)
    if missing:
        progress(stage, done, len(examples))
    made = _made(chat, examples, missing, data)
    for number, start in enumerate(starts):
        shard = found.get(start)
        if shard is None:
            shard = next(made)
            done += min(SHARD_ROWS, len(examples) - start)
            progress(stage, done, len(examples))
            if cache:
                cache.write(keys[number], shard)
        yield shard
    if cache:
        cache.remove_unused()


def _made(chat: ChatFormat, examples: Sequence[Example], starts: Sequence[int], data: DataConfig) -> Iterator[_Shard]:
    """Tokenize the shards that begin at `starts`, in order."""
    rows = len(starts) * SHARD_ROWS
    processes = min(data.num_proc or min(os.cpu_count() or 1, rows // ROWS_A_PROCESS), len(starts))
    if processes <= 1 or sys.platform != "linux":  # elsewhere a process would have to import and load everything anew
        for start in starts:
            yield _tokenize_shard(chat, examples[start : start + SHARD_ROWS], data.train_on)
        return
    context = multiprocessing.get_context("fork")  # the tokenizer and the rows are there at once, not copied
    with ProcessPoolExecutor(processes, context, _begin_process, (chat, examples, data.train_on)) as pool:
        yield from pool.map(_tokenize_in_process, starts)


_in_process: tuple[ChatFormat, Sequence[Example], str]


def _begin_process(chat: ChatFormat, examples: Sequence[Example], train_on: str) -> None:
    global _in_process  # what a pool's process was given
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive a fork
    _in_process = (chat, examples, train_on)


def _tokenize_in_process(start: int) -> _Shard:
    chat, examples, train_on = _in_process
    return _tokenize_shard(chat, examples[start : start + SHARD_ROWS], train_on)


def _tokenize_shard(chat: ChatFormat, examples: Sequence[Example], train_on: str) -> _Shard:
    chat.rendering.added_ends = False
    # Numbered here, so that a shard does not depend on where its rows stood.
    numbered = [replace(example, file="", line=index) for index, example in enumerate(examples)]
    encoded, findings = chat.encode_checked(numbered, train_on)
    return _Shard(
        np.concatenate([tokens.input_ids for tokens in encoded]) if encoded else np.zeros(0, np.int32),
        np.concatenate([tokens.loss_mask for tokens in encoded]) if encoded else np.zeros(0, bool),
        np.array([len(tokens) for tokens in encoded], dtype=np.int32),
        np.array([tokens.line for tokens in encoded], dtype=np.int32),
        [(finding.line or 0, finding.check, finding.severity, finding.found, finding.fix) for finding in findings],
        chat.rendering.added_ends,
    )


class _Cache:
    """Shards on disk, for one tokenizer, template and choice of what is supervised."""

    def __init__(self, chat: ChatFormat, train_on: str):
        tokenizer = chat.tokenizer
        date = chat.render([Message("user", "a")], True) if chat.now else ""  # as the template prints it
        libraries = [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")]
        parts = (
            f"{__version__} {TOKENS_VERSION} {libraries}",
            tokenizer.backend_tokenizer.to_str(),
            json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
            chat.template,
            train_on,
            date,
        )
        self._settings = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        self.folder = cache_folder() / "tokens"

    def key(self, examples: Iterable[Example]) -> str:
        """The hash of everything that these examples' tokens depend on."""
        digest = hashlib.sha256(self._settings.encode())
        for example in examples:
            content = repr((example.messages, example.text, example.tools))
            digest.update(content.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def read(self, key: str) -> _Shard | None:
        """The shard, or None if it is not there, or damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return _Shard.from_bytes(data)

    def write(self, key: str, shard: _Shard) -> None:
        """Keep a shard; a cache that cannot be written is gone without."""
        with suppress(MachineError, RunError, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(key), shard.to_bytes())

    def remove_unused(self) -> None:
        """Remove the shards that were not used for UNUSED_DAYS."""
        with suppress(OSError):
            for path in self.folder.glob("*.tokens"):
                if time.time() - path.stat().st_mtime > UNUSED_DAYS * 86400:
                    path.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.tokens"


def changed_since_kept(path: str, sha256: str) -> Finding | None:
    """A warning if the file had another content when its tokens were kept last; remembers the content it has now."""
    file = cache_folder() / "tokens" / f"{hashlib.sha256(str(Path(path).absolute()).encode()).hexdigest()}.file"
    try:
        before = file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        before = sha256
    with suppress(MachineError, RunError, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, sha256)
    if before == sha256:
        return None
    return Finding(
        "changed_file",
        "warning",
        path,
        None,
        "the file has changed since its tokens were kept",
        "new rows are tokenized anew",
    )
