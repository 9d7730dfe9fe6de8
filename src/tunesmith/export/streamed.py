"""Merge an adapter into its base tensor by tensor: files are read, changed and written one tensor at a time.

    W' = round(W + s·B·A), in fp32, and whatever else PEFT's own `merge` makes of a module (DoRA, new tokens, experts, GPT-2's Conv1D)

The written shards are the base's: the same tensors under the same names in each, but for a text model taken out of a multimodal one.
Host memory: a GB of pages of the mapped file, and what is made of one tensor in fp32 (four to six times its 16-bit size).

A head that shares its matrix with the embeddings stays so where both come out the same, else it is written beside them and the
config says `tie_word_embeddings: false`. PEFT's own merge changes both there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.export.safetensors import differs, refuse_tensor
from tunesmith.export.skeleton import Read, Skeleton
from tunesmith.export.tensors import Entry, Group, Unstreamable, write_tensors
from tunesmith.files import write_json
from tunesmith.types import Progress, no_progress


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: files, their bytes in all and of the largest, and whether the head was untied from the embeddings."""

    files: int
    bytes: int
    largest: int
    untied: bool


def write_merged(
    skeleton: Skeleton,
    folder: Path,
    dtype: torch.dtype,
    read: Read | None = None,
    changed: frozenset[str] = frozenset(),
    progress: Progress = no_progress,
) -> Written:
    """Write the model of `skeleton` with its adapter merged in as safetensors in `dtype`, with its config.

    `read` gives the base's parameters, the stored ones by default, and `changed` names those that it changes. Raises VerificationError for values that
    the type cannot hold, Unstreamable for what cannot be turned back into the files' tensors.
    """
    merger = _Merger(skeleton, dtype, read or skeleton.stored, changed | skeleton.changed())
    plan = merger.plan()
    count = sum(len(entries) for entries in plan.values())
    done = 0
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(plan.values(), 1):
        name = "model.safetensors" if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"

        def tensors(entries: list[Entry] = entries) -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal done
            for entry in entries:
                yield entry.name, merger.tensor(entry)
                done += 1
                progress("merging", done, count)

        write_tensors(folder / name, entries, tensors())
        weight_map |= {entry.name: name for entry in entries}
    size = sum(entry.size for entries in plan.values() for entry in entries)
    if len(plan) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
    skeleton.close()
    _write_configs(skeleton, folder, dtype, merger.untied)
    largest = max(sum(entry.size for entry in entries) for entries in plan.values())
    return Written(len(plan), size, largest, merger.untied)


def proven_logits(
    skeleton: Skeleton, back: Skeleton, prompts: Sequence[Sequence[int]], read: Read, dtype: torch.dtype
) -> torch.Tensor:
    """Logits (tokens, vocabulary) of the merged weights in fp32, not rounded, in the base's own model.

    On the way each parameter is rounded and compared with what the written folder, `back`, has: raises VerificationError for another one.
    """
    by_adapter = skeleton.changed()
    for each in (skeleton, back):
        each.checkpoint.tensors.share = 0.5  # both are mapped at once

    def merged(name: str) -> torch.Tensor:
        exact = skeleton.merged(name, read) if name in by_adapter else read(name)
        written = back.stored(name)
        rows = len(exact)
        if written.ndim == exact.ndim and len(written) > rows and name not in by_adapter:
            written, grown = written[:rows], written[rows:]
            if bool(grown.any()):
                refuse_tensor(name)
        if written.dtype != skeleton.kept_in(name, dtype) or differs(written, exact):
            refuse_tensor(name)
        return exact

    try:
        return skeleton.logits(prompts, merged, adapter=False)
    finally:
        for each in (skeleton, back):
            each.checkpoint.tensors.share = 1.0


class _Merger:
    def __init__(self, skeleton: Skeleton, dtype: torch.dtype, read: Read, changed: frozenset[str] | set[str]):
        self.skeleton = skeleton
        self.dtype = dtype
        self.read = read
        self.changed = set(changed)
        self.by_adapter = skeleton.changed()
        self.untied = False
        self.names: dict[Group, list[str]] = {}
        for name, group in skeleton.checkpoint.targets.items():
            self.names.setdefault(group, []).append(name)
        self.group_of = {source: group for group in self.names for source in group.sources}
        self.extra: set[str] = set()
        self._reverted: dict[str, torch.Tensor] = {}

    def plan(self) -> dict[Path, list[Entry]]:
        """What each file will hold, in order. Tensors of one group stand together, so that they are made once."""
        plan = {}
        for file, entries in self.skeleton.checkpoint.tensors.entries.items():
            order: dict[Group, list[Entry]] = {}
            for entry in entries:
                if (group := self.group_of.get(entry.name)) is not None:
                    order.setdefault(group, []).append(self._announced(entry, group))
            if order:
                plan[file] = [entry for entries in order.values() for entry in entries]
        for pair in {tuple(sorted(pair)) for pair in self.skeleton.tied.items()}:
            if self.changed.isdisjoint(pair) or torch.equal(*map(self._merged, pair)):
                continue
            self.untied = True
            for name in pair:
                if name not in self.skeleton.checkpoint.targets:
                    self.extra.add(name)
                    plan[file].append(Entry(name, tuple(self.skeleton.shape(name)), self._dtype(name)))
        return plan

    def _announced(self, entry: Entry, group: Group) -> Entry:
        if group.converter is not None:
            if self.skeleton.renamed:
                raise Unstreamable("its tensors have other names and are cut otherwise in its files")
            dtype = self._dtype(group.first) if entry.dtype.is_floating_point else entry.dtype
            return Entry(entry.name, entry.shape, dtype)
        name = group.first
        shape = tuple(self.skeleton.shape(name)) if name in self.skeleton.places else entry.shape
        dtype = self._dtype(name) if entry.dtype.is_floating_point else entry.dtype
        return Entry(name if self.skeleton.renamed else entry.name, shape, dtype)

    def _dtype(self, name: str) -> torch.dtype:
        return self.skeleton.kept_in(name, self.dtype)

    def _merged(self, name: str) -> torch.Tensor:
        if name in self.by_adapter:
            return self.skeleton.merged(name, self.read)
        return self.read(name).to(self.skeleton.device, torch.float32)

    def tensor(self, entry: Entry) -> torch.Tensor:
        """What stands in the file under an entry's name."""
        if entry.name in self.extra:
            return self._merged(entry.name)
        if entry.name in self._reverted:
            return self._reverted.pop(entry.name)
        group = self.skeleton.checkpoint.targets[entry.name] if self.skeleton.renamed else self.group_of[entry.name]
        names = self.names[group]
        if self.changed.isdisjoint(names):
            stored = self.skeleton.checkpoint.tensors.read(group.sources[0] if group.converter is None else entry.name)
            return self._grown(stored, entry)
        if group.converter is None:
            return self._merged(names[0])
        values = {name: self._merged(name).to(entry.dtype) for name in names}
        self._reverted = self.skeleton.checkpoint.revert(group, values)
        return self._reverted.pop(entry.name)

    def _grown(self, stored: torch.Tensor, entry: Entry) -> torch.Tensor:
        """`stored`, with rows of zeros where embeddings grew beside those that the adapter holds."""
        if stored.shape == entry.shape:
            return stored
        grown = torch.zeros(entry.shape, dtype=stored.dtype)
        grown[: len(stored)] = stored
        return grown


def _write_configs(skeleton: Skeleton, folder: Path, dtype: torch.dtype, untied: bool) -> None:
    """config.json; what stands beside the weights of any merge is written by workflows/merge.py."""
    model = skeleton.model
    config = model.config
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if untied:
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
