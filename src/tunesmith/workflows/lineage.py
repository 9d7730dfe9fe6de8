"""What makes a run traceable, for its metadata.json, and whether a resumed run still sees the same base and data."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

from tunesmith.config import RunConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import RunError
from tunesmith.files import sha256_file, sha256_text
from tunesmith.hardware import Hardware
from tunesmith.models.adapters import count_parameters
from tunesmith.models.base_config import computed, config_differences
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import ModelSource
from tunesmith.runs import RunFolder
from tunesmith.version import __version__
from tunesmith.workflows.rows import RunData

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "triton")


def refuse_changed(run: RunFolder, source: ModelSource, base_hash: str, facts: dict[str, Any]) -> None:
    """A resumed run must see the same base and the same data, or its losses would not be what they would have been."""
    metadata = run.metadata
    if metadata["model"]["weight_hash"] != base_hash:
        raise RunError(f"{run.path}: the base model's weights have changed since this run started; it cannot go on")
    if changed := config_differences(metadata["model"].get("config"), source):
        raise RunError(
            f"{run.path}: {source.path / 'config.json'} computes something else than when this run started: {', '.join(changed)}; restore it"
        )
    for key, path in (("sha256", "path"), ("eval_sha256", "eval_path"), ("general_sha256", "general_path")):
        if metadata["data"].get(key) != facts.get(key):
            name = facts.get(path)
            raise RunError(f"{run.path}: {name} has changed since this run started; start a new run")
    if metadata["data"].get("tokens_sha256") != facts["tokens_sha256"]:
        raise RunError(
            f"{run.path}: the same rows give other tokens than when this run started: the tokenizer has changed, or how "
            "this version of tunesmith makes tokens; start a new run"
        )


def run_metadata(
    config: RunConfig,
    source: ModelSource,
    base_hash: str,
    chat: ChatFormat,
    data: RunData,
    hardware: Hardware,
    forward: ModelForward,
) -> dict[str, Any]:
    """What a new run's metadata.json holds (docs/run-folder.md)."""
    trainable, total = count_parameters(forward.model)
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "tunesmith": __version__,
        "method": config.method,
        "objective": config.objective.name,
        "model": {
            "name": source.name,
            "path": str(source.path.absolute()),
            "revision": source.revision,
            "weight_hash": base_hash,
            "config": computed(source.config),
            "architecture": type(forward.base).__name__,
            "model_type": source.config.get("model_type"),
        },
        "tokenizer": {"hash": tokenizer_hash(source)},
        "chat_template": {
            "name": chat.name,
            "hash": chat.hash,
            "variables": chat.variables,
            "now": chat.now.isoformat() if chat.now else None,
        },
        "data": data.facts,
        "packages": _versions(),
        "hardware": hardware.describe(),
        "dtype": forward.dtype,
        "seed": config.training.seed,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "parent": config.adapter.init_from,
    }


def tokenizer_hash(source: ModelSource) -> str:
    """SHA-256 over the files of a model's tokenizer, by name."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
    return sha256_text(f"{name} {sha256_file(source.path / name)}" for name in names if (source.path / name).is_file())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
