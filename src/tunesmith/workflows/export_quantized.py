"""Export a run, an adapter or a model in 4 bits (GPTQ, AWQ), calibrated on its own data, verified before anything is kept.

An adapter is merged into its 16-bit base first (workflows.merge, itself verified). What is compared after writing: every tensor of the files
with the model's, then of a fresh model that transformers loads from the folder the perplexity, KL and top-1 agreement with the source on rows
that were not calibrated on; the tokens of a difficult text; the chat template; the generation config.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import DataConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.formats import read_examples
from tunesmith.errors import ConfigError, DataError, ModelError, VerificationError
from tunesmith.export import agreement
from tunesmith.export.beside import text_differences
from tunesmith.export.calibration import (
    MAX_TOKENS,
    MEASURED_ROWS,
    Ids,
    drawn,
    encode,
    leave_out,
    measurable,
)
from tunesmith.export.compressed import (
    METHODS,
    Method,
    Plan,
    calibrate,
    left_over,
    modifiers,
    plan,
    quiet,
    refuse_awq,
    refuse_device,
    require_packages,
    write,
)
from tunesmith.files import atomic_folder, work_folder, write_json
from tunesmith.models.load import TEXT_TOWERS, weight_hash
from tunesmith.out_of_memory import release_memory
from tunesmith.registry.records import file_hashes
from tunesmith.runs import RunFolder
from tunesmith.types import Progress, no_progress
from tunesmith.version import __version__
from tunesmith.workflows.load import RECORD_NAME, Found, LoadedModel, find, load, load_plain
from tunesmith.workflows.merge import merge
from tunesmith.workflows.rows import question_of, read_rows

CALIBRATION_ROWS = 256

MAX_KL: dict[Method, float] = {"gptq": 0.3, "awq": 0.3}
"""Nats a token: three times what GPTQ costs SmolLM2-135M, where rounding to the nearest costs 0.79 (docs/quantized.md)."""

MAX_PERPLEXITY = 1.4
"""The written model's perplexity, as a multiple of the source's; 1.12 and 1.20 were measured on SmolLM2-135M, which is small for 4 bits."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Token ids to calibrate and to measure on, and where each came from, in words."""

    calibration: list[Ids]
    measured: list[Ids]
    calibrated_on: str
    measured_on: str
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the 16-bit model is that is quantized, and how it is loaded."""

    path: str
    dtype: str
    device: str

    def load(self, progress: Progress) -> LoadedModel:
        """The model, on its device."""
        return load(self.path, None, self.dtype, self.device, progress=progress)


def parse(to: str) -> list[Method]:
    """The methods in `gptq`, `awq` or `gptq,awq`. Raises ConfigError."""
    names = [name.strip() for name in to.split(",")]
    if wrong := [name for name in names if name not in METHODS]:
        raise ConfigError(f"--to {to}: {wrong[0]!r} is no 4-bit method; expected gptq, awq or gptq,awq")
    return [method for method in METHODS if method in names]


def export_quantized(
    target: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    calibration_rows: int | None = None,
    model: str | Path | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `target` (a run, a PEFT adapter, a model) by `gptq`, `awq` or both, `gptq,awq`, each as a folder that transformers and vLLM load.

    `out` is the folder (of several: of their folders); by default RUN/gptq, or NAME-gptq beside anything else. Calibration takes
    `calibration_rows` rows (256) of `data`, by default of the run's training data. Returns `{target, lora, files[{type, path, bytes,
    group_size, kl, max_kl, top1, perplexity, max_perplexity, tokens, tokens_per_second, seconds}], source_perplexity, source_bytes,
    source_tokens_per_second, dtype, device, calibration{rows, tokens, from}, measured{rows, tokens, from}, unquantized, notes}`;
    `unquantized` are the matrices that stay in `dtype`, `seconds` those of quantizing. Raises ConfigError, DataError, ModelError,
    MachineError (a package is missing), and VerificationError, which leaves nothing.
    """
    methods = parse(to)
    count = CALIBRATION_ROWS if calibration_rows is None else calibration_rows
    if count < 1:
        raise ConfigError(f"--calibration-rows {count}: expected 1 or more")
    path = Path(target)
    folders = _folders(path, methods, Path(out) if out else None)
    require_packages()
    found = find(target, model, "auto", device)
    refuse_device(found.hardware)
    if found.adapter is None and "quantization_config" in found.source.config:
        raise ModelError(
            f"{found.source.name}: its weights are quantized already; export the 16-bit model that it was made from"
        )
    rows = _rows(found, str(target), data, count)
    with ExitStack() as kept:
        work = kept.enter_context(work_folder(folders[0]))
        place, record, merging = _source(found, target, model, work, progress)
        loaded = place.load(progress)
        layers = plan(loaded.forward.model, found.source.name)
        if "awq" in methods:
            refuse_awq(layers, found.source.name)
        unquantized = left_over(loaded.forward.model, layers)
        notes = [*rows.notes, *merging, *_notes(layers, rows)]
        expected = agreement.reference(loaded.forward.model, rows.measured, progress)
        speed = agreement.tokens_per_second(loaded.forward.model, rows.measured[0])
        size = sum(p.numel() * p.element_size() for p in loaded.forward.model.parameters())
        del loaded  # quantization uses a model up, and only one is to be in memory
        written = []
        for method, final in zip(methods, folders, strict=True):
            folder = kept.enter_context(atomic_folder(final))
            row = _write(place, found, method, layers, rows, expected, folder, record, notes, progress)
            written.append({"type": method, "path": str(final), **row})
    return {
        "target": str(target),
        "lora": False,
        "files": written,
        "source_perplexity": expected.perplexity,
        "source_bytes": size,
        "source_tokens_per_second": speed,
        "dtype": found.dtype,
        "device": found.hardware.type,
        "calibration": _facts(rows.calibration, rows.calibrated_on),
        "measured": _facts(rows.measured, rows.measured_on),
        "unquantized": unquantized,
        "notes": notes,
    }


def _facts(rows: Sequence[Ids], where: str) -> dict[str, Any]:
    return {"rows": len(rows), "tokens": sum(map(len, rows)), "from": where}


def _folders(path: Path, methods: Sequence[Method], out: Path | None) -> list[Path]:
    """A folder for each method. Raises RunError for one that is there already."""
    if out is None:
        beside = path.parent if path.exists() else Path()
        stem = path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name
        folders = [path / each if RunFolder.is_run(path) else beside / f"{stem}-{each}" for each in methods]
    else:
        folders = [out] if len(methods) == 1 else [out / each for each in methods]
    for folder in folders:
        RunFolder.refuse_existing(folder)
    return folders


def _rows(found: Found, target: str, data: str | Path | None, count: int) -> Rows:
    """Rows of `data`, or of the run's own data, to calibrate on; and its held-out rows, or some that calibration left out."""
    run, notes = found.run, list[str]()
    if run is None and data is None:
        raise ConfigError(
            f"{target}: there is no run whose data it could be calibrated on; pass --data FILE with rows of the kind that the model will see"
        )
    held: list[Any] = []
    train: list[Any] = []
    if run is not None:
        try:
            own = read_rows(run.config)
            train, held = own.train, own.eval
            if own.facts["sha256"] != run.metadata["data"].get("sha256"):
                notes.append("the run's data has changed since it was trained on")
        except DataError as error:
            if data is None:
                raise DataError([*error.problems, "pass --data FILE to calibrate on other rows"]) from error
            notes.append(f"the run's own data cannot be read, nor its held-out rows ({error.problems[0]})")
    calibrated_on = "the run's training data"
    if data is not None:
        settings = run.config.data if run else DataConfig()
        train, calibrated_on = list(read_examples(settings.held_out(str(data))).examples), str(data)
    measured_on = "the run's held-out rows"
    if not held:
        train, held = leave_out(train, calibrated_on)
        measured_on = f"rows of {calibrated_on} that calibration left out"
        if run is not None and data is None:
            notes.append("the run held no rows out: perplexity is that of rows that it was trained on")
    limit = min(MAX_TOKENS, found.source.context_length or MAX_TOKENS)
    calibration = encode(found.chat, [question_of(row) for row in drawn(train, count)], limit)[:count]
    measured = measurable(
        encode(found.chat, [question_of(row) for row in drawn(held, MEASURED_ROWS)], limit), calibration
    )
    if not measured:
        raise DataError(f"{measured_on}: all of them are among the {len(calibration)} rows that are calibrated on")
    return Rows(calibration, measured, calibrated_on, measured_on, notes)


def _source(
    found: Found, target: str | Path, model: str | Path | None, work: Path, progress: Progress
) -> tuple[Place, dict[str, Any], list[str]]:
    """The 16-bit model to quantize, an adapter merged into its base first; what its own record says; and what merging noted."""
    dtype, device = found.dtype, found.hardware.device
    base = {"name": found.source.name, "weight_hash": weight_hash(found.source)}
    if found.adapter is None:
        return Place(str(target), dtype, device), {"tunesmith": __version__, "source": base}, []
    merged = merge(target, work / "merged", model=model, dtype=dtype, device=device, progress=progress)
    record = json.loads((Path(merged["path"]) / RECORD_NAME).read_text(encoding="utf-8"))
    return Place(merged["path"], dtype, device), record, merged["notes"]


def _notes(layers: Plan, rows: Rows) -> list[str]:
    notes = [f"group size {layers.group_size}: {layers.why}"] if layers.why else []
    tokens, width = sum(map(len, rows.calibration)), max(layers.layers.values())
    if tokens < width:
        notes.append(
            f"{tokens} tokens of calibration are fewer than the widest layer's {width} inputs: pass more rows (--calibration-rows, --data)"
        )
    return notes


def _write(
    place: Place,
    found: Found,
    method: Method,
    layers: Plan,
    rows: Rows,
    expected: agreement.Reference,
    folder: Path,
    record: dict[str, Any],
    notes: list[str],
    progress: Progress,
) -> dict[str, Any]:
    """Quantize, write and verify: what the table shows of a method."""
    loaded = place.load(progress)
    started = time.perf_counter()
    quantized: Any = loaded.forward.model
    progress(f"quantizing by {method}", 0, 1)
    with tempfile.TemporaryDirectory() as text:
        if loaded.source.config.get("model_type") in TEXT_TOWERS:
            # llmcompressor copies the config from where the model came from; there it is one with a vision tower.
            quantized.config.save_pretrained(text)
            quantized.config._name_or_path = quantized.name_or_path = text
        said = calibrate(quantized, modifiers(method, layers), rows.calibration, progress)
        write(quantized, layers, folder)
    notes += [f"{method}: {each}" for each in dict.fromkeys(said)]
    generation = quantized.generation_config.to_dict()
    seconds = time.perf_counter() - started
    loaded.tokenizer.chat_template = loaded.chat.template  # what it was trained with
    loaded.tokenizer.save_pretrained(folder)
    _compare_texts(folder, loaded.tokenizer, loaded.chat, generation)
    del quantized, loaded
    release_memory()
    files = file_hashes(folder)  # before the comparison: what is verified is what they are of
    agreed, speed = _reloaded(folder, found, method, expected, progress)
    row = {
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "group_size": layers.group_size,
        "kl": agreed.kl,
        "max_kl": MAX_KL[method],
        "top1": agreed.top1,
        "perplexity": agreed.perplexity,
        "max_perplexity": MAX_PERPLEXITY * expected.perplexity,
        "tokens": agreed.tokens,
        "tokens_per_second": speed,
        "seconds": seconds,
    }
    verified = {key: row[key] for key in ("kl", "top1", "perplexity", "tokens")} | {
        "source_perplexity": expected.perplexity
    }
    calibration = _facts(rows.calibration, rows.calibrated_on)
    how = {
        "method": method,
        "bits": 4,
        "group_size": layers.group_size,
        "calibration": calibration,
        "verified": verified,
    }
    write_json(folder / RECORD_NAME, record | {"quantized": how, "files": files})
    return row


def _reloaded(
    folder: Path, found: Found, method: Method, expected: agreement.Reference, progress: Progress
) -> tuple[agreement.Agreement, float]:
    """How the model in `folder` agrees with the source, and its speed. Raises VerificationError beyond the bounds."""
    try:
        with quiet():
            back = load_plain(folder, found.dtype, found.hardware)
    except ModelError as error:
        raise VerificationError(f"{method}: the written model does not load back: {error}; nothing was kept") from error
    back.eval()
    with quiet(), torch.no_grad():
        back(torch.tensor([[0]], device=back.device))  # weights are unpacked at the first forward
    agreed = agreement.compare(back, expected, progress)
    if not (agreed.kl <= MAX_KL[method] and agreed.perplexity <= MAX_PERPLEXITY * expected.perplexity):
        raise VerificationError(
            f"{method}: on {agreed.tokens} tokens that were not calibrated on, perplexity is {agreed.perplexity:.4g} where the source's is "
            f"{expected.perplexity:.4g} (allowed: {MAX_PERPLEXITY:g} times that), KL {agreed.kl:.3g} nats a token (allowed: "
            f"{MAX_KL[method]:g}), top-1 agreement {agreed.top1:.1%}; nothing was kept; calibrate on more rows of the kind that the model "
            "sees (--calibration-rows, --data), or export it in 8 bits (--to gguf:q8_0)"
        )
    return agreed, agreement.tokens_per_second(back, expected.rows[0])


def _compare_texts(folder: Path, tokenizer: Any, chat: ChatFormat, generation: Mapping[str, Any]) -> None:
    """Raise VerificationError unless tokenizer, chat template and generation config come back as they were."""
    own = {key: value for key, value in generation.items() if key not in ("transformers_version", "_from_model_config")}
    if wrong := text_differences(folder, tokenizer, chat, own):
        raise VerificationError(f"the written model is not what was quantized: {'; '.join(wrong)}; nothing was kept")
