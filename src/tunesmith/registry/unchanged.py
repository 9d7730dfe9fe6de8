"""Whether an adapter's files are those that were saved: the hash of its weights, and the values of its config that change what it computes.

Both stand in `tunesmith.json` beside it. That is no signature: who changes a file can change the record too. It finds what was edited, mixed up or damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.config import RunConfig
from tunesmith.errors import shown
from tunesmith.models.load import file_hash
from tunesmith.registry.records import CONFIG, RECORD, WEIGHTS, read_json

NOT_COMPUTED = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "megatron_core", "runtime_config",
    "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
})  # fmt: skip
"""Of adapter_config.json: paths, versions, and what only a beginning or training reads."""

READ_EACH_TIME = 64 * 2**20
"""Bytes: a larger file of weights is read once (1.5 GB/s), and then known by path, size and time. `verify` reads all of it always."""

SETS = frozenset({"target_modules", "exclude_modules", "modules_to_save", "target_parameters"})
"""Lists whose order means nothing; PEFT writes some of them in another one each time."""


def computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an adapter_config.json that decide what the adapter computes, for its record: rank, scale, patterns, places, kind."""
    return {key: _plain(key, value) for key, value in sorted(config.items()) if key not in NOT_COMPUTED}


def config_changes(folder: Path, record: Mapping[str, Any], run: RunConfig | None = None) -> list[str] | None:
    """Which values of `folder`'s config are other than recorded, as `lora_alpha 999 (recorded: 32)`; None where nothing says what they were.

    A record of an older version has none of them: then a run's own settings count, as far as they stand in the config as they are.
    """
    recorded = record.get("adapter_config")
    if not isinstance(recorded, dict):
        recorded = of_settings(run) if run is not None else None
    if recorded is None:
        return None
    config = read_json(folder / CONFIG) or {}
    return [
        f"{key} {shown(now)} (recorded: {shown(recorded[key])})"
        for key in sorted(recorded)
        if (now := _plain(key, config.get(key))) != _plain(key, recorded[key])
    ]


def of_settings(run: RunConfig) -> dict[str, Any] | None:
    """What a run's settings say of its adapter's config; None where the saved one has other values: it went on from another adapter, or was
    converted (PiSSA, OLoRA and LoftQ: twice the rank).
    """
    adapter = run.adapter
    if adapter.init_from or adapter.init_lora_weights != "default":
        return None
    return {
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
    }


def changes(folder: Path, record: Mapping[str, Any], run: RunConfig | None = None) -> list[str]:
    """What of an adapter was changed since it was saved, a line for each file; nothing where nothing says what it was."""
    found = []
    recorded = record.get("adapter_sha256")
    weights = folder / WEIGHTS
    if recorded is not None and weights.is_file() and recorded != (now := file_hash(weights, _is_small(weights))):
        found.append(
            f"{folder / WEIGHTS}: was changed since it was saved (sha256 {now[:12]}; {RECORD} has {recorded[:12]})"
        )
    if values := config_changes(folder, record, run):
        found.append(f"{folder / CONFIG}: was changed since it was saved: {', '.join(values)}")
    return found


def _is_small(file: Path) -> bool:
    return file.stat().st_size <= READ_EACH_TIME


def _plain(key: str, value: Any) -> Any:
    if key in SETS and isinstance(value, (list, tuple, set)):
        return sorted(map(str, value))
    return value
