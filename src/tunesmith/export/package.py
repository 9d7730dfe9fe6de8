"""What goes up to the hub: the files of a finished adapter, a model folder, or a GGUF file.

They are a list of names that are known to be needed (`WEIGHTS`, `TEXTS`), taken from one folder, symbolic links refused: no optimizer
state, no pickle, no journal can be among them. Texts are read into memory, rid of this machine's paths and searched for keys before
anything is sent (`export/private.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import MachineError, ModelError, VerificationError
from tunesmith.export.gguf_types import NEEDS_GGUF
from tunesmith.export.private import refuse_private, without_paths
from tunesmith.files import sha256_file

Kind = Literal["adapter", "merged", "quantized", "gguf", "gguf-lora"]
"""`quantized` is a model folder whose config.json has a `quantization_config` (GPTQ, compressed-tensors)."""

_SAFETENSORS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_GGUF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf")

WEIGHTS: dict[Kind, re.Pattern[str]] = {
    "adapter": re.compile(r"adapter_model\.safetensors"),
    "merged": _SAFETENSORS,
    "quantized": _SAFETENSORS,
    "gguf": _GGUF,
    "gguf-lora": _GGUF,
}

INDEX = "model.safetensors.index.json"

TEXTS = frozenset(
    (
        "adapter_config.json",
        "tunesmith.json",
        "config.json",
        "generation_config.json",
        INDEX,
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "chat_template.json",
        "recipe.yaml",
    )
)
"""Files beside the weights that go up; the card is README.md. recipe.yaml is llmcompressor's, of a quantized model."""

WITH_PATHS = frozenset(
    ("adapter_config.json", "tunesmith.json", "config.json", "generation_config.json", "tokenizer_config.json")
)
"""Texts in which libraries note where a model was read from."""

HEAD = 2**24
"""Bytes. A GGUF file's metadata, vocabulary included, are at its beginning; they are searched for paths and keys."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One file as it goes up: from the disk, or (texts) as the bytes that were made of it."""

    name: str
    source: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, source: Path | bytes) -> Upload:
        """With its size and hash as they are now."""
        if isinstance(source, bytes):
            return cls(name, source, len(source), hashlib.sha256(source).hexdigest())
        return cls(name, source, source.stat().st_size, sha256_file(source))

    def git_hash(self) -> str:
        """SHA-1 of git's blob, by which the hub lists files that are not in LFS."""
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Package:
    """What goes up, and which files of the folder do not. `heads` are the parts of weight files that hold text."""

    kind: Kind
    files: list[Upload]
    left_out: list[str] = field(default_factory=list)
    heads: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The files' names, weights first."""
        return [file.name for file in self.files]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)

    def refuse_private(self, card: str, token: str | None, paths: Sequence[str]) -> None:
        """Raise UserError where a text, the card or the text within weights holds a key or a path of this machine."""
        texts = [(file.name, file.source) for file in self.files if isinstance(file.source, bytes)]
        refuse_private([*texts, *self.heads, ("README.md", card.encode())], token, paths)


def package_folder(folder: Path, kind: Kind, base: str) -> Package:
    """The files of an adapter or a model. `base` replaces the folder that the base was read from, in what notes it.

    Raises ModelError for a folder that is incomplete, is a symbolic link or holds one, VerificationError for weights that
    cannot be read whole.
    """
    refuse_links(folder)
    taken: list[Path] = []
    left: list[Path] = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        refuse_links(path)
        if path.is_dir():
            continue
        (taken if WEIGHTS[kind].fullmatch(name) or name in TEXTS else left).append(path)
    _refuse_incomplete(folder, kind, {path.name for path in taken})
    weights = [path for path in taken if path.name not in TEXTS]
    heads = [(path.name, _header(path)) for path in weights]
    files = [Upload.of(path.name, path) for path in weights]
    files += [Upload.of(path.name, _text(path, base)) for path in taken if path.name in TEXTS]
    return Package(kind, files, [str(path.relative_to(folder)) for path in left], heads)


def package_gguf(file: Path, kind: Kind) -> Package:
    """One GGUF file. Raises ModelError, VerificationError."""
    refuse_links(file)
    if not WEIGHTS["gguf"].fullmatch(file.name):
        raise ModelError(f"{file.name!r}: letters, digits, '.', '_' and '-' may stand in a GGUF file's name; rename it")
    if not file.is_file():
        raise ModelError(f"{file}: there is no such file; `tunesmith export RUN --to gguf:q4_k_m` writes one")
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    if head[:4] != b"GGUF":
        raise VerificationError(f"{file}: not a GGUF file (it begins with {head[:4]!r}); export it again")
    return Package(kind, [Upload.of(file.name, file)], heads=[(file.name, head)])


def kind_of_folder(folder: Path) -> Kind:
    """Whether a model folder is quantized. Raises ModelError where its config.json is missing or damaged."""
    path = folder / "config.json"
    refuse_links(path)
    if not path.is_file():
        raise ModelError(f"{folder}: not a model's folder (it has no config.json); nothing was uploaded")
    return "quantized" if _object(path).get("quantization_config") else "merged"


def quantization_of(folder: Path) -> str:
    """What a quantized folder's config calls its method, e.g. `gptq`, `compressed-tensors`."""
    found = _object(folder / "config.json").get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", method):
        raise ModelError(f"{folder / 'config.json'}: quantization_config has no quant_method; export it again")
    return method


def refuse_links(path: Path) -> None:
    """Raise ModelError for a symbolic link, or anything else that is neither file nor folder."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ModelError(
            f"{path}: is a symbolic link or a special file, which may lead outside of the folder; nothing was uploaded; "
            "put the file itself there, or remove it"
        )


def _refuse_incomplete(folder: Path, kind: Kind, names: set[str]) -> None:
    needed = {"adapter_config.json", "adapter_model.safetensors"} if kind == "adapter" else {"config.json"}
    if kind != "adapter":
        shards = _shards(folder / INDEX) if INDEX in names else {"model.safetensors"}
        needed |= shards
        if extra := sorted({name for name in names if WEIGHTS[kind].fullmatch(name)} - shards):
            raise ModelError(
                f"{folder}: {', '.join(extra)} belongs to no {INDEX}, or to another one; nothing was uploaded; make the folder again"
            )
    if missing := sorted(needed - names):
        raise ModelError(f"{folder}: incomplete: {', '.join(missing)} missing; nothing was uploaded; make it again")


def _shards(index: Path) -> set[str]:
    shards = _object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise VerificationError(f"{index}: damaged (weight_map names no files); nothing was uploaded; make it again")
    return set(shards.values())


def _object(path: Path) -> dict[str, Any]:
    return _parsed(path, path.read_bytes())


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{path}: not JSON ({error}); nothing was uploaded") from None
    if not isinstance(value, dict):
        raise VerificationError(f"{path}: damaged (expected a JSON object); nothing was uploaded")
    return value


def _header(path: Path) -> bytes:
    """The metadata of a safetensors file, as text. Its header must be well-formed, and its tensors fill the file to the end.

    The library checks both when it opens one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors, metadata = len(file.keys()), file.metadata()
    except SafetensorError as error:
        raise VerificationError(f"{path}: damaged ({error}); nothing was uploaded") from error
    if not tensors:
        raise VerificationError(f"{path}: holds no tensors; nothing was uploaded")
    return "\n".join(f"{name} {value}" for name, value in (metadata or {}).items()).encode()


def _text(path: Path, base: str) -> bytes:
    """A text file's bytes; without this machine's paths where it is one that libraries write them into."""
    content = path.read_bytes()
    if path.name not in WITH_PATHS:
        return content
    value = _parsed(path, content)
    cleaned = without_paths(value, base)
    return content if cleaned == value else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def gguf_kind(path: Path) -> Kind:
    """Whether a GGUF file is a model or a LoRA adapter, as its `general.type` says. Raises ModelError, MachineError."""
    try:
        import gguf
    except ImportError as error:
        raise MachineError(NEEDS_GGUF) from error
    try:
        field = gguf.GGUFReader(path).fields.get("general.type")
        return "gguf-lora" if field and field.contents() == "adapter" else "gguf"
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"{path}: not a whole GGUF file ({error or type(error).__name__}); export it again") from None
