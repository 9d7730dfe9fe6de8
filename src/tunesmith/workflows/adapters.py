"""The registry's commands: list adapters, show all that is known of one, verify that it is what was saved and still fits its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import ModelConfig
from tunesmith.errors import MachineError, ModelError, RunError
from tunesmith.export.safetensors import fixed_prompts, plain_logits
from tunesmith.files import sha256_file
from tunesmith.hardware import ComputeDType
from tunesmith.models import loftq
from tunesmith.models.adapters import load_adapter
from tunesmith.models.forward import autocast
from tunesmith.models.load import find_model, load_model
from tunesmith.registry.fields import check_config, check_metadata
from tunesmith.registry.records import (
    CONFIG,
    RECORD,
    WEIGHTS,
    AdapterRecord,
    evaluations,
    find_adapters,
    lineage,
    read_adapter,
    read_json,
    refuse_code,
    without_weights,
)
from tunesmith.registry.unchanged import config_changes
from tunesmith.runs import RunFolder
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.inference import Effect, Inference, Setting
from tunesmith.workflows.load import Found, differences, find, read_record

DEFAULT_FOLDER = "runs"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was verified. `ok` is None where it could not be: nothing was recorded, or it is not here."""

    name: str
    ok: bool | None
    message: str


def list_adapters(folders: Sequence[str | Path] = ()) -> list[dict[str, Any]]:
    """The records of all adapters under `folders` (default: runs/). Raises RunError for a folder that is not there."""
    places = [Path(folder) for folder in folders] or [Path(DEFAULT_FOLDER)]
    return [record.as_json() for record in find_adapters(places)]


def show_adapter(target: str | Path) -> dict[str, Any]:
    """All that is known of the adapter in a run folder or adapter folder: its record, with `settings` (the run's config), `adapter_config`, `metadata` (data,
    packages, hardware), `recorded` (tunesmith.json), `lineage` and `evaluations` (their metrics). Raises ModelError, RunError.
    """
    place, folder = _place(target)
    record = read_adapter(place)
    run = RunFolder.open(place) if record.run else None
    return {
        **record.as_json(),
        "settings": run.config.model_dump(mode="json") if run else None,
        "metadata": run.metadata if run else None,
        "adapter_config": read_json(folder / CONFIG),
        "recorded": read_json(folder / RECORD),
        "lineage": lineage(record),
        "evaluations": [
            {"file": name} | {key: value.get(key) for key in ("created", "task", "data", "n", "metrics", "gate")}
            for name, value in evaluations(place / "evaluations")
        ]
        if run
        else [],
    }


def verify_adapter(
    target: str | Path,
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Hash, read and load an adapter, and compare it with what was recorded when it was saved.

    Checked are the file's hash, the values of its config, its tensors (finite, every one with a place in the base, of its shape), the hashes of the base's weights (every
    byte of them is read), tokenizer and chat template, the values of the base's config, and that base and adapter compute numbers. `effects` measures inference unlike training on the fixed prompts: mean KL and top-1
    agreement of each other setting with the trained one, which are `dtype` (what `auto` means here by default) and, for QLoRA, the 16-bit base.

    What is measured is remembered: loading in that setting says it at once (workflows/inference.py).

    Returns `{path, ok, unverifiable[what], checks[{name, ok, message}], effects[{dtype, quantization, kl, top1, tokens}]}`; `ok` is False where any check
    failed, and where nothing was recorded to compare with: then `unverifiable` says what is missing. Raises ModelError and RunError where there is no
    adapter to verify, or its files are damaged.
    """
    place, folder = _place(target)
    missing = _unrecorded(place, folder)
    record = read_adapter(place)
    checks = [_check_file(folder), _check_config(place, folder), _check_tensors(folder)]
    effects: list[dict[str, Any]] = []
    name = str(model or record.base or "")
    found = _find(place, model, device, name, checks)
    if found is not None:
        differing = differences(found.run, found.adapter, found.source, found.chat, reread=True)
        checks += [Check("base", False, text) for text in differing]
        if not differing:
            compared = _compared(found, folder)
            said = f"{', '.join(compared)} as recorded" if compared else "nothing was recorded of it"
            checks.append(Check("base", True if compared else None, f"{name}: {said}"))
        loaded, effects = _reload(found, dtype, device, progress)
        checks.append(loaded)
    return {
        "path": str(target),
        "ok": all(check.ok is not False for check in checks) and not missing,
        "unverifiable": missing,
        "checks": [asdict(check) for check in checks],
        "effects": effects,
    }


def _place(target: str | Path) -> tuple[Path, Path]:
    """The run or adapter folder that is meant, and the adapter's own folder. Raises ModelError, RunError."""
    place = Path(target)
    if RunFolder.is_run(place):
        run = RunFolder.open(place)
        if run.config.method == "full":
            raise ModelError(f"{target}: a full fine-tuning has no adapter; its model is {run.model_path}")
        if not run.adapter_path.is_dir():
            raise RunError(f"{target}: this run is not finished (no adapter/); `tunesmith resume {target}` goes on")
        return place, run.adapter_path
    if not (place / CONFIG).is_file():
        raise ModelError(
            f"{target}: neither a run nor an adapter (no {CONFIG}); `tunesmith adapters list FOLDER` finds them"
        )
    return place, place


def _check_file(folder: Path) -> Check:
    if not (folder / WEIGHTS).is_file():
        raise ModelError(without_weights(folder))
    refuse_code(folder)
    now = sha256_file(folder / WEIGHTS)
    recorded = (read_json(folder / RECORD) or {}).get("adapter_sha256")
    if recorded is None:
        return Check("file", None, f"sha256 {now}; none was recorded when it was saved")
    if recorded == now:
        return Check("file", True, f"sha256 {now}, as recorded")
    return Check(
        "file", False, f"{WEIGHTS} has sha256 {now}; {recorded} was recorded when it was saved: it was changed since"
    )


def _check_config(place: Path, folder: Path) -> Check:
    """The values of the adapter's config that decide what it computes."""
    run = RunFolder.open(place).config if RunFolder.is_run(place) else None
    changed = config_changes(folder, read_record(folder), run)
    if changed is None:
        return Check("config", None, f"{CONFIG}: its values were not recorded when it was saved")
    if changed:
        return Check("config", False, f"{CONFIG} was changed since it was saved: {', '.join(changed)}")
    return Check("config", True, f"{CONFIG}: rank, scale, places and kind as recorded")


def _check_tensors(folder: Path) -> Check:
    from safetensors import SafetensorError, safe_open

    wrong, count = [], 0
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dictionary
                tensor = file.get_tensor(name)
                count += 1
                bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
                if bad:
                    wrong.append(f"{name} has {bad} values that are no finite numbers")
    except (SafetensorError, OSError, ValueError) as error:
        return Check("tensors", False, f"{folder / WEIGHTS} cannot be read: {error}")
    if wrong:
        return Check(
            "tensors", False, "; ".join(wrong[:3]) + (f", and {len(wrong) - 3} more tensors" if wrong[3:] else "")
        )
    return Check("tensors", True, f"{count} tensors, all finite")


def _find(place: Path, model: str | Path | None, device: str, name: str, checks: list[Check]) -> Found | None:
    """The base with its tokenizer and template; None, and a check that says why, where it is not here or does not fit."""
    if not name:
        checks.append(Check("base", None, "its config names no base; pass it with --model"))
        return None
    if model is not None or not RunFolder.is_run(place):
        settings = ModelConfig(name=name)
    else:
        settings = RunFolder.open(place).config.model
    try:
        find_model(settings)
    except (ModelError, MachineError) as error:
        checks.append(Check("base", None, f"not reachable, so that nothing was loaded: {error}"))
        return None
    try:
        return find(place, model, "auto", device, forced=lambda *_: None)
    except (ModelError, RunError) as error:
        checks.append(Check("base", False, str(error)))
        return None


def _unrecorded(place: Path, folder: Path) -> list[str]:
    """What is missing where nothing at all was recorded that could be compared. Raises ModelError and RunError for damaged files."""
    check_config(folder / CONFIG, read_json(folder / CONFIG) or {})
    record = read_record(folder)
    if RunFolder.is_run(place):
        run = RunFolder.open(place)
        check_metadata(run.path / "metadata.json", run.metadata)
        return [] if record.get("adapter_sha256") else [f"{folder / RECORD} (nothing says which weights were saved)"]
    if record:  # a record names its base's hash at least
        return []
    return [
        f"{RECORD} (nothing says which weights were saved)", "the hash of its base's weights", "the hashes of the tokenizer and the chat template",
    ]  # fmt: skip


def _compared(found: Found, folder: Path) -> list[str]:
    """Which hashes there were to compare."""
    known = found.run.metadata if found.run else read_json(folder / RECORD) or {}
    names = {"base": "weights", "model": "weights", "tokenizer": "tokenizer", "chat_template": "chat template"}
    compared = list(dict.fromkeys(words for key, words in names.items() if known.get(key)))
    of_base = known.get("model" if found.run else "base") or {}
    return [*compared, "config"] if of_base.get("config") else compared


def _reload(found: Found, dtype: str, device: str, progress: Progress) -> tuple[Check, list[dict[str, Any]]]:
    """Load the adapter on its base as it was trained, and as it would be used otherwise."""
    prompts = fixed_prompts(found.chat)
    trained = Setting(_known(found.trained_dtype) or found.dtype, found.quantization)
    asked = found.dtype if dtype == "auto" else _known(dtype)
    if asked is None:
        raise ModelError(f"dtype is {dtype!r}: expected auto, bf16, fp16 or fp32")
    others = [Setting(asked, trained.quantization)]
    if trained.quantization is not None:
        others.append(Setting(asked))
    if found.trained_dtype is None and dtype == "auto":
        others = []
    try:
        logits, bare = _logits(found, trained, prompts, progress, with_base=True)
    except (ModelError, MachineError) as error:
        return Check("reload", None if isinstance(error, MachineError) else False, str(error)), []
    if not bool(logits.isfinite().all()):
        return Check("reload", False, "base and adapter do not compute finite numbers on the fixed prompts"), []
    effect = float((logits - bare).norm() / logits.norm())
    effects = []
    for setting in others:
        if setting == trained:
            continue
        other, _ = _logits(found, setting, prompts, progress)
        changed = Effect.between(logits, other)
        if (unlike := Inference.unlike_training(found, setting)) is not None:
            unlike.keep(changed)
        scheme = setting.quantization.scheme if setting.quantization else None
        effects.append({"dtype": setting.dtype, "quantization": scheme, **asdict(changed)})
    return Check("reload", True, f"loads on its base; it moves the logits by {effect:.1%}"), effects


def _known(dtype: str | None) -> ComputeDType | None:
    return dtype if dtype in ("bf16", "fp16", "fp32") else None  # type: ignore[return-value]  # one of the three


def _logits(
    found: Found, setting: Setting, prompts: Sequence[Sequence[int]], progress: Progress, with_base: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits on the fixed prompts with the adapter, and without it (the same again where that is not asked for)."""
    progress(f"loading in {setting}", 0, 1)
    assert found.adapter is not None  # `_place` found one
    base: Any = load_model(found.source, found.settings, found.hardware, setting.dtype, setting.quantization)
    adapted = load_adapter(base, found.adapter)
    if found.loftq and setting.quantization is not None:
        loftq.restore(adapted, found.source.path, found.loftq)
    with autocast(found.hardware.device, setting.dtype):
        logits = plain_logits(adapted, prompts)
        if not with_base:
            return logits, logits
        with adapted.disable_adapter():
            return logits, plain_logits(adapted, prompts)


def metric_of(record: dict[str, Any] | AdapterRecord) -> str:
    """The first metric of a record's newest evaluation, for a table: `accuracy 0.93`."""
    metrics = record["metrics"] if isinstance(record, dict) else record.metrics
    for name, measured in metrics.items():
        if isinstance(measured, dict) and isinstance(measured.get("value"), (int, float)):
            return f"{name} {measured['value']:.3g}"
    return ""
