"""Safetensors read and written one tensor at a time, and a model's parameters by the names that its files have them under.

Reading maps one file into memory at a time, and anew after each GB, writing holds one tensor: whatever the size of the model and of its files,
memory is bounded by that GB (pages that were read count as the process's) and what is made of one tensor.

Files need not name or cut tensors as the model's classes do (experts one by one, projections fused). transformers says how one becomes
the other (`conversion_mapping`), and turns it back; here that is done for one group of tensors at a time.
"""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ModelError, VerificationError

TYPES: dict[torch.dtype, str] = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of types in a safetensors header."""

MAPPED = 2**30
"""Bytes of a mapped file that are read before it is mapped anew: its pages count as the process's memory until then."""

PART = 2**24
"""Values that are rounded and written at once."""

DTYPES = {name: dtype for dtype, name in TYPES.items()}


class Unstreamable(Exception):  # no error of the user's: the merge is done in memory then
    """Why a model cannot be read tensor by tensor; the message says it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as a file has it, or will have it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The safetensors of a model folder: what they hold, and one tensor at a time. At most one file is mapped."""

    def __init__(self, folder: Path):
        self.files = _files_of(folder)
        self.entries: dict[Path, list[Entry]] = {file: list(_entries(file)) for file in self.files}
        self._file_of = {entry.name: file for file, entries in self.entries.items() for entry in entries}
        self._sizes = {entry.name: entry.size for entries in self.entries.values() for entry in entries}
        self._mapped: tuple[Path, Any] | None = None
        self._touched = 0
        self.share = 1.0
        """Of MAPPED: less than all where others are mapped at the same time."""

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored. It may lie in the mapped file: do not write into it."""
        from safetensors import safe_open

        file = self._file_of[name]
        if self._mapped is None or self._mapped[0] != file or self._touched > self.share * MAPPED:
            self._mapped = None  # unmapped before the next one is mapped
            self._mapped = (file, safe_open(file, "pt"))
            self._touched = 0
        self._touched += self._sizes[name]
        tensor: torch.Tensor = self._mapped[1].get_tensor(name)
        return tensor

    def close(self) -> None:
        """Unmap what is mapped."""
        self._mapped = None


def _files_of(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if elsewhere := [name for name in names if Path(name).name != name]:
            raise ModelError(f"{index}: names a file outside of its folder ({elsewhere[0]}); it is not read")
        return [folder / name for name in sorted(set(names))]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    raise Unstreamable(f"{folder} has neither model.safetensors nor its index")


def _entries(file: Path) -> Iterator[Entry]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    for name, facts in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0]):
        if name == "__metadata__":
            continue
        if facts["dtype"] not in DTYPES:
            raise Unstreamable(f"{file.name} stores {name} as {facts['dtype']}")
        yield Entry(name, tuple(facts["shape"]), DTYPES[facts["dtype"]])


def write_tensors(file: Path, entries: Sequence[Entry], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write a safetensors file of `entries` from `tensors`, which come in the same order, each held only while it is written and rounded to its
    entry's type a part at a time. Raises VerificationError for values that the type cannot hold.

    The format: eight bytes with the header's length, the header as JSON, padded with spaces to eight bytes, the data
    (https://huggingface.co/docs/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": TYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, offset + entry.size],
        }  # fmt: skip
        offset += entry.size
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for entry, (name, tensor) in zip(entries, tensors, strict=True):
            if (name, tuple(tensor.shape)) != (entry.name, entry.shape):
                raise AssertionError(f"{name}: {tuple(tensor.shape)} is not what was announced, {entry}")
            for part in tensor.contiguous().flatten().split(PART):
                opened.write(rounded(name, part, entry.dtype).cpu().view(torch.uint8).numpy().data)


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`. Raises VerificationError, by `name`, for values that fp16 cannot hold."""
    found = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not bool(found.isfinite().all()):
        raise VerificationError(
            f"{name} has values up to {float(tensor.abs().max()):.3g}, and fp16 ends at 65504; pass --dtype bf16 or fp32; "
            "nothing was kept"
        )
    return found


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors in the files that become parameters of the model together. `converter` is transformers'; None: one is the other."""

    sources: tuple[str, ...]
    first: str
    converter: Any = None


class Checkpoint:
    """A model's parameters and persistent buffers by the model's names, out of its files.

    `targets` maps each name of the model to the group that it comes from. Raises Unstreamable where the model lacks a tensor of its
    files' or the other way round; tensors that the model's class ignores (`_keys_to_ignore_on_load_unexpected`) stay unread.
    """

    def __init__(self, folder: Path, model: Any, key_mapping: Mapping[str, str] | None = None):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.tensors = TensorFiles(folder)
        self.model = model
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        transforms = get_model_conversion_mapping(model, dict(key_mapping) if key_mapping else None)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        known: dict[str, Any] = model.state_dict()
        collected: dict[str, list[str]] = {}
        by_pattern: dict[str, tuple[Any, dict[str, str]]] = {}
        for source in sorted(self.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, known)
            if target not in known and source in known:
                target, pattern = source, None
            if target not in known:
                continue  # of a vision tower, or a buffer that older versions wrote
            collected.setdefault(target, []).append(source)
            if pattern is not None:
                converter = next(each for each in converters if pattern in each.source_patterns)
                by_pattern.setdefault(target, (converter, {}))[1][source] = pattern
        prefix = f"{model.base_model_prefix}."
        self._renamed = {
            source: rename_source_key(source, renamings, [])[0].removeprefix(prefix) for source in self.tensors
        }  # what a converter is given, and gives back
        self._patterns = {target: patterns for target, (_, patterns) in by_pattern.items()}
        self.targets: dict[str, Group] = {}
        for target, sources in collected.items():
            if target in by_pattern:
                group = Group(tuple(sources), target, by_pattern[target][0])
                made = list(self._convert(group, dry=True))
            else:
                group, made = Group(tuple(sources), target), [target]
            self.targets.update(dict.fromkeys(made, group))
        self._kept: tuple[Group, dict[str, torch.Tensor]] | None = None

    def read(self, name: str) -> torch.Tensor:
        """A parameter as it is stored. A group that gives several is kept until another one is read."""
        group = self.targets[name]
        if group.converter is None:
            return self.tensors.read(group.sources[0])
        if self._kept is None or self._kept[0] is not group:
            self._kept = None
            self._kept = (group, self._convert(group))
        return self._kept[1][name]

    def close(self) -> None:
        """Let go of what is held in memory."""
        self._kept = None
        self.tensors.close()

    def _convert(self, group: Group, dry: bool = False) -> dict[str, torch.Tensor]:
        """What a group becomes, by the model's names; `dry` on tensors without data."""
        entries = {entry.name: entry for entries in self.tensors.entries.values() for entry in entries} if dry else {}
        converter = copy.deepcopy(group.converter)
        for source in group.sources:
            if dry:
                tensor = torch.empty(entries[source].shape, dtype=entries[source].dtype, device="meta")
            else:
                tensor = self.tensors.read(source)
            converter.add_tensor(group.first, source, self._patterns[group.first][source], lambda held=tensor: held)
        found = converter.convert(group.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def revert(self, group: Group, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the files that a group's parameters were made of, from other values of these."""
        if group.converter is None:
            return {group.sources[0]: values[group.first]}
        reverse = copy.deepcopy(group.converter).reverse_transform()
        # Each parameter belongs to the pattern of which its name is an instance; transformers finds it by renaming.
        first = ""
        for name, tensor in values.items():
            renamed, pattern = reverse.rename_source_key(name)
            if pattern is None:
                raise Unstreamable(f"transformers does not say how {name} is turned back into {group.sources[0]}")
            first = first or renamed
            reverse.add_tensor(renamed, name, pattern, tensor)
        made = reverse.convert(first, model=self.model, config=self.model.config)
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        prefix = f"{self.model.base_model_prefix}."
        plain = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        if set(plain) != {self._renamed[source] for source in group.sources}:
            raise Unstreamable(
                f"transformers turns {group.first} back into {', '.join(sorted(found)[:3])}, other than the files have"
            )
        return {source: plain[self._renamed[source]] for source in group.sources}


def check_whole(checkpoint: Checkpoint, tied: Mapping[str, str]) -> None:
    """Raise Unstreamable unless the files have every parameter of the model, of its shape; of tied ones (`tied`: name -> partner) one will do."""
    missing = [
        name
        for name in checkpoint.shapes
        if name not in checkpoint.targets and tied.get(name, name) not in checkpoint.targets
    ]
    if missing:
        raise Unstreamable(f"{len(missing)} weights are missing from its files ({', '.join(sorted(missing)[:3])})")
    stored = {entry.name: entry.shape for entries in checkpoint.tensors.entries.values() for entry in entries}
    for name, group in checkpoint.targets.items():
        shape, expected = stored[group.sources[0]], tuple(checkpoint.shapes[name])
        if group.converter is None and shape != expected:
            raise Unstreamable(f"{name} is {shape} in the files, and its config.json means {expected}")
