"""Adapters found in folders, and what their files say of them. Nothing is loaded, and nothing outside the folders is read but the parents
that `lineage` follows.

An adapter is a run folder's (`adapter/`), or any folder with PEFT's `adapter_config.json`. Its own files and the run's are written by whoever
made it: what they hold is shown, never run, and no name in them is used to write anything.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.files import sha256_file, write_json
from tunesmith.runs import RunFolder
from tunesmith.version import __version__

CONFIG, WEIGHTS, PICKLED, RECORD = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "tunesmith.json",
)  # fmt: skip
MERGED = "merged"
"""`kind` in the record of a merged model; an adapter's has none."""

NOT_ENTERED = {"checkpoints", "merged", "evaluations", "model"}
"""Folders inside others that hold no adapters of their own; a run's checkpoints are states of its training."""

LARGEST_JSON = 16 * 2**20
"""Bytes. Files that describe an adapter are small; a larger one is not read."""

ANCESTORS = 32
"""How far lineage is followed."""

MB = 2**20


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What is known of one adapter. None, or empty, where its files do not say.

    `status` is `ok`, `unfinished` (a run that has no adapter yet) or `refused` (`problem` says why). `size_mb` is its weights' in MB of 2^20 bytes,
    `metrics` those of its newest evaluation, `parent` what its training went on from, `data` the name of the training file, `settings` those that
    decide most (`short_settings`).
    """

    name: str
    path: str
    status: str
    problem: str | None = None
    run: str | None = None
    kind: str | None = None
    base: str | None = None
    base_hash: str | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    size_mb: float | None = None
    created: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    evaluation: str | None = None
    parent: str | None = None
    data: str | None = None
    data_hash: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def find_adapters(folders: Sequence[Path]) -> list[AdapterRecord]:
    """All adapters under `folders`, each once, by path. Links are not followed. Raises RunError for a folder that is not there."""
    found: dict[Path, AdapterRecord] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"{folder}: no such folder; name one that holds runs or adapters")
        for place in _adapter_places(folder):
            found.setdefault(place.resolve(), read_adapter(place, folder))
    return sorted(found.values(), key=lambda record: record.path)


def _adapter_places(root: Path) -> Iterator[Path]:
    for current, folders, files in os.walk(root):
        place = Path(current)
        if {"config.yaml", "metadata.json"} <= set(files) or CONFIG in files:
            folders.clear()
            yield place
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NOT_ENTERED)


def read_adapter(place: Path, root: Path | None = None) -> AdapterRecord:
    """The record of a run's adapter, or of an adapter's folder; its name is its path from `root`.

    Damage becomes the record's `problem`: one bad folder does not hide the others.
    """
    name = str(place.relative_to(root)) if root and place != root else place.resolve().name
    is_run = RunFolder.is_run(place)
    folder = place / "adapter" if is_run else place
    facts: dict[str, Any] = {"name": name, "path": str(place), "run": str(place) if is_run else None}
    try:
        if is_run:
            facts |= _of_run(RunFolder.open(place))
        elif (record := read_json(folder / RECORD)) is not None:
            facts |= _of_record(record, folder)
        config = read_json(folder / CONFIG)
    except (ConfigError, ModelError, RunError) as error:
        return AdapterRecord(**facts, status="refused", problem=str(error))
    if config is None:
        full = facts.get("kind") == "full"
        return AdapterRecord(**facts, status="ok" if full else "unfinished")
    of_config = _of_config(config)
    facts = of_config | {key: value for key, value in facts.items() if value is not None}
    weights = folder / WEIGHTS
    if not weights.is_file():
        return AdapterRecord(**facts, status="refused", problem=without_weights(folder))
    stat = weights.stat()
    facts["size_mb"] = stat.st_size / MB
    facts.setdefault("created", datetime.fromtimestamp(stat.st_mtime).astimezone().isoformat(timespec="seconds"))
    return AdapterRecord(**facts, status="ok")


def without_weights(folder: Path) -> str:
    """Why an adapter without safetensors is refused."""
    if (folder / PICKLED).is_file():
        return f"{folder}: its weights are pickled ({PICKLED}), which can run code when loaded; have its maker save safetensors"
    return f"{folder}: no {WEIGHTS}"


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. Raises ModelError for what is none, or is too large."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ModelError(
                f"{path}: {path.stat().st_size / MB:.0f} MB of JSON; it is not read (allowed: {LARGEST_JSON // MB} MB)"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value


def _of_run(run: RunFolder) -> dict[str, Any]:
    metadata, config = run.metadata, run.config
    evaluation = _newest(run.path / "evaluations")
    return {
        "base": _text(_dict(metadata.get("model")).get("name")),
        "base_hash": _text(_dict(metadata.get("model")).get("weight_hash")),
        "kind": config.method,
        "created": _text(metadata.get("created")),
        "dtype": _text(metadata.get("dtype")),
        "quantization": config.quantization.scheme if config.method == "qlora" else None,
        "parent": _text(metadata.get("parent")),
        **_of_data(data_facts(_dict(metadata.get("data")))),
        "settings": short_settings(config),
        "metrics": _dict(evaluation[1].get("metrics")) if evaluation else {},
        "evaluation": evaluation[0] if evaluation else None,
    }


def _of_record(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    base = _dict(record.get("base"))
    return {
        "base_hash": _text(base.get("weight_hash")),
        "dtype": _text(record.get("dtype")),
        "quantization": _text(_dict(record.get("quantization")).get("scheme")),
        "parent": _parent(record.get("parent"), folder),
        **_of_data(_dict(record.get("data"))),
        "settings": _dict(record.get("settings")),
    }


def _of_data(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"data": _text(facts.get("name")), "data_hash": _text(facts.get("sha256"))}


def data_facts(known: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's facts about its data, those that travel with the adapter: the file's name, the hashes, the number of rows."""
    name = _text(known.get("path"))
    kept = ("sha256", "eval_sha256", "general_sha256", "tokens_sha256", "rows")
    return {"name": portable_name(name) if name else None} | {key: known[key] for key in kept if key in known}


SHORT = (
    "method", "objective.name", "optimizer.lr", "training.epochs", "training.max_steps", "training.batch_size", "training.seed",
    "data.max_seq_length", "adapter.init_lora_weights",
)  # fmt: skip
"""The settings of a list; `show` has all of a run's."""


def short_settings(config: RunConfig) -> dict[str, Any]:
    """A run's settings that decide most, by dotted key; without those that are not set."""
    found = {}
    for key in SHORT:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None:
            found[key] = value
    return found


def _parent(recorded: Any, folder: Path) -> str | None:
    """Where an adapter's parent is: recorded from the adapter's folder, so that runs that move together still find each other."""
    if not isinstance(recorded, str) or not recorded.startswith((f".{os.sep}", f"..{os.sep}")):
        return _text(recorded)
    return os.path.normpath(folder / recorded)


def recorded_parent(parent: str | None, folder: Path) -> str | None:
    """What stands in the record in `folder` of the adapter that its training went on from; `_parent` reads it."""
    if parent is None:
        return None
    path = os.path.relpath(parent, folder)
    return path if path.startswith("..") else f".{os.sep}{path}"


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    experts = config.get("target_parameters")
    names = [targets] if isinstance(targets, str) else targets if isinstance(targets, list) else []
    names = [*names, *(experts if isinstance(experts, list) else [])]
    return {
        "base": _text(config.get("base_model_name_or_path")),
        "kind": _text(config.get("peft_type")),
        "rank": rank if isinstance(rank, int) else None,
        "alpha": alpha if isinstance(alpha, (int, float)) else None,
        "targets": tuple(sorted(str(name) for name in names)),
    }


def evaluations(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """A run's evaluations by file name, newest first. One that is damaged is left out; `report` and `compare` name it."""
    found = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            if (value := read_json(path)) is not None:
                found.append((path.name, value))
        except ModelError:
            continue
    return sorted(found, key=lambda item: str(item[1].get("created")), reverse=True)


def _newest(folder: Path) -> tuple[str, dict[str, Any]] | None:
    return next(iter(evaluations(folder)), None)


def lineage(record: AdapterRecord) -> list[dict[str, Any]]:
    """What an adapter's training went on from, nearest first: `[{path, name, base, base_hash, created, found}]`.

    Followed through runs and adapters that are on this disk, once each.
    """
    chain: list[dict[str, Any]] = []
    seen = {Path(record.path).resolve()}
    parent = record.parent
    while parent is not None and len(chain) < ANCESTORS:
        place = Path(parent)
        if not RunFolder.is_run(place) and place.name == "adapter" and RunFolder.is_run(place.parent):
            place = place.parent
        known = RunFolder.is_run(place) or (place / CONFIG).is_file()
        if place.resolve() in seen:
            break
        seen.add(place.resolve())
        if not known:
            chain.append({"path": parent, "found": False})
            break
        one = read_adapter(place)
        chain.append(
            {"path": str(place), "found": True}
            | {key: getattr(one, key) for key in ("name", "base", "base_hash", "created", "rank")}
        )
        parent = one.parent
    return chain


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def refuse_code(folder: Path) -> None:
    """Raise ModelError for an adapter whose config has PEFT import a module that it names: `megatron_core`, with `megatron_config`."""
    config = read_json(folder / CONFIG) or {}
    if config.get("megatron_config") is not None:
        raise ModelError(
            f"{folder / CONFIG}: megatron_config has PEFT import the module {config.get('megatron_core')!r}; remove both if the adapter "
            "is none for Megatron"
        )


def adapter_hash(folder: Path) -> str:
    """SHA-256 of an adapter's weights: of `adapter_model.safetensors`. Raises ModelError where there is none."""
    if not (folder / WEIGHTS).is_file():
        raise ModelError(without_weights(folder))
    return sha256_file(folder / WEIGHTS)


def adapter_name(folder: Path) -> str:
    """What to call an adapter by its place: a run's by the run's name."""
    place = folder.resolve()
    return place.parent.name if place.name == "adapter" else place.name


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merged model was made of, as its `tunesmith.json` says.

    `adapters` are the hashes (`adapter_hash`) of those that went into it, in order, with `names` for people; `method`, `weights` and `density` say how
    several became one. `onto` is `16bit` or `quantized`. `tokenizer_hash` is of the files that were written.
    """

    adapters: tuple[str, ...]
    names: tuple[str, ...]
    base: str
    base_hash: str
    tokenizer_hash: str
    template_hash: str
    dtype: str
    onto: str
    method: str | None = None
    weights: tuple[float, ...] | None = None
    density: float | None = None


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model's folder but its record, by name. `tunesmith push` compares what it finds with these."""
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != RECORD}


def write_merged_record(folder: Path, made: Merged) -> None:
    """Write `tunesmith.json` into a merged model's folder, last of its files: it holds the hashes of the others."""
    value = {
        "tunesmith": __version__,
        "kind": MERGED,
        "adapters": [{"name": name, "sha256": own} for name, own in zip(made.names, made.adapters, strict=True)],
        "base": {"name": made.base, "weight_hash": made.base_hash},
        "tokenizer": {"hash": made.tokenizer_hash},
        "chat_template": {"hash": made.template_hash},
        "dtype": made.dtype,
        "onto": made.onto,
        "method": made.method,
        "weights": made.weights,
        "density": made.density,
        "files": file_hashes(folder),
    }
    write_json(folder / RECORD, value)


def merged_from(folder: Path) -> Merged | None:
    """What the model in `folder` was merged from; None where nothing says so. Raises ModelError for a damaged record.

    `adapter_hash(run.adapter_path) in merged.adapters` tells whether a run's merged model is of its present adapter.
    """
    record = read_json(folder / RECORD)
    if record is None or record.get("kind") != MERGED:
        return None
    adapters = [_dict(one) for one in _list(record.get("adapters"))]
    weights, density = record.get("weights"), record.get("density")
    try:
        return Merged(
            adapters=tuple(_sha256(one.get("sha256")) for one in adapters) or _none_named(),
            names=tuple(_text(one.get("name")) or "" for one in adapters),
            base=_text(_dict(record.get("base")).get("name")) or "",
            base_hash=_sha256(_dict(record.get("base")).get("weight_hash")),
            tokenizer_hash=_sha256(_dict(record.get("tokenizer")).get("hash")),
            template_hash=_sha256(_dict(record.get("chat_template")).get("hash")),
            dtype=_text(record.get("dtype")) or "",
            onto=_text(record.get("onto")) or "",
            method=_text(record.get("method")),
            weights=tuple(float(one) for one in weights) if isinstance(weights, list) else None,
            density=float(density) if density is not None else None,
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / RECORD}: damaged ({error}); merge again") from None


def portable_name(name: str) -> str:
    """A model's or adapter's name for a file that travels: a hub id as it is, of a path on this disk the last part."""
    return (
        Path(name).expanduser().absolute().name
        if Path(name).expanduser().exists() or Path(name).is_absolute()
        else name
    )


def _sha256(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"expected a SHA-256 in hex, found {str(value)[:80]!r}")
    return value


def _none_named() -> tuple[str, ...]:
    raise ValueError("it names no adapter")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
