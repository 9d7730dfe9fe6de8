"""Export a run, an adapter or a model as GGUF, verified in llama.cpp before anything is kept.

A run's adapter is merged first (workflows.merge, itself verified); with `lora` it becomes a file of its own. The chain from the source to
llama.cpp has no open link: the merged model computes what base + adapter do; the file holds the merged weights; llama.cpp computes
from the file what the source computes with the file's weights; and its template, tokens and ends of an answer are the source's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.export.beside import generation_values
from tunesmith.export.gguf import (
    Exportable,
    exportable,
    origin_of,
    refuse_adapter,
    require_packages,
    write_adapter,
    write_model,
)
from tunesmith.export.gguf_architectures import describe
from tunesmith.export.gguf_checks import (
    Reference,
    compare_specials,
    compare_templates,
    compare_tokens,
    measure,
    measure_lora,
)
from tunesmith.export.gguf_llama_cpp import SPEED_TOKENS, LlamaCpp
from tunesmith.export.gguf_ollama import Match, match, modelfile
from tunesmith.export.gguf_reading import Weights, Written
from tunesmith.export.gguf_tokenizer import model_name, vocabulary
from tunesmith.export.gguf_types import ExportType, find_type
from tunesmith.export.safetensors import compare_logits, fixed_prompts, plain_logits
from tunesmith.export.skeleton import Skeleton, has_own_start
from tunesmith.export.tensors import Unstreamable
from tunesmith.files import disk_errors, work_folder
from tunesmith.models.load import TEXT_TOWERS, weight_hash
from tunesmith.registry.records import CONFIG, read_json
from tunesmith.runs import RunFolder
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.load import Found, find, load
from tunesmith.workflows.merge import merge

MIN_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Source:
    """What is written: the model (the base, of a LoRA GGUF), with its files, and what it computes with the adapter."""

    chat: ChatFormat
    reference: Reference
    made: Exportable
    skeleton: Skeleton
    ends: list[int] = field(default_factory=list)
    """The ids that end an answer (generation_config.json)."""


def export_gguf(
    target: str | Path,
    types: str,
    out: str | Path | None = None,
    *,
    lora: bool = False,
    model: str | Path | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `target` (a run, a PEFT adapter, a model) in one of the types, `q8_0`, or in several, `q8_0,q4_k_m`.

    `out` is the file (one type) or a folder; by default RUN/gguf, or NAME-gguf beside anything else. With `lora` the adapter alone is
    written, and verified over its base. Returns `{target, lora, effect, files[{type, path, bytes, kl, max_kl, type_kl, llama_cpp_kl,
    max_llama_cpp_kl, top1, tokens, tokens_per_second, warning, modelfile}], ollama_template, notes}`: `kl` is KL(source ‖ llama.cpp) in nats a
    token, `type_kl` the part that the file's weights explain, `llama_cpp_kl` from what the source computes with those, and `effect` KL(source ‖
    base), what the adapter changes. Raises ConfigError, ModelError, MachineError (a package is missing), and VerificationError; then nothing is
    left that was not there before.
    """
    kinds = list({kind.name: kind for kind in (find_type(one.strip()) for one in types.split(","))}.values())
    path = Path(target)
    name = _name(path)
    files = _files(path, name, kinds, Path(out) if out else None, lora)
    require_packages()
    with work_folder(files[0].parent / name) as work:
        found = find(target, model, "fp32", device)
        if lora and found.adapter is None:
            raise ModelError(f"{target}: there is no adapter to write; leave --lora out")
        origin = _origin(found)
        if lora:
            source = _adapted_source(found, target, model, device, name, origin, progress)
            rows = [_write_lora(source, found, kinds[0], work / files[0].name, progress)]
        else:
            source = _whole_source(found, target, model, device, name, origin, work, progress)
            rows = [
                _write_merged(source, kind, work / file.name, progress) for kind, file in zip(kinds, files, strict=True)
            ]
        format_ = match(lambda messages: source.chat.render(messages, True), source.chat.tokenizer.bos_token or "")
        for row, file in zip(rows, files, strict=True):
            row["path"], row["modelfile"] = str(file), str(file.with_suffix(".Modelfile"))
            text = _modelfile(file.name, source, format_, found.source.name if lora else None)
            (work / file.name).with_suffix(".Modelfile").write_text(text, encoding="utf-8")
        _put(work, files)
    return {
        "target": str(target),
        "lora": lora,
        "effect": source.reference.effect,
        "files": rows,
        "ollama_template": format_.kind.name if format_ else None,
        "notes": [*source.made.notes, *(row["warning"] for row in rows if row["warning"])],
    }


def _put(work: Path, files: Sequence[Path]) -> None:
    """Move what was written into its place, all or nothing."""
    pairs = [(work / one.name, one) for file in files for one in (file, file.with_suffix(".Modelfile"))]
    done: list[Path] = []
    try:
        with disk_errors(files[0].parent):
            for written, place in pairs:
                with written.open("rb") as opened:
                    os.fsync(opened.fileno())
                written.replace(place)
                done.append(place)
    except BaseException:  # Ctrl-C too: half of a result is none
        for place in done:
            place.unlink(missing_ok=True)
        raise


def _name(path: Path) -> str:
    stem = path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name
    return re.sub(r"[^\w.-]", "-", stem) or "model"


def _files(path: Path, name: str, kinds: Sequence[ExportType], out: Path | None, lora: bool) -> list[Path]:
    """Where each type goes. Raises RunError for a file, or a Modelfile beside it, that is there already."""
    if out is not None and out.suffix == ".gguf":
        if len(kinds) > 1:
            raise ConfigError(f"--out {out} is one file, and {len(kinds)} types were asked for; name a folder")
        files = [out]
    else:
        beside = path.parent / f"{name}-gguf" if path.exists() else Path(f"{name}-gguf")
        folder = out or (path / "gguf" if RunFolder.is_run(path) else beside)
        files = [folder / f"{name}{'-lora' if lora else ''}-{kind.name}.gguf" for kind in kinds]
    if lora and (len(kinds) > 1 or kinds[0].name not in ("f32", "f16", "bf16", "q8_0")):
        raise ConfigError("--lora: an adapter is written in one of f32, f16, bf16 and q8_0")
    for one in (one for file in files for one in (file, file.with_suffix(".Modelfile"))):
        if one.exists() or one.is_symlink():
            raise RunError(f"{one}: already there; remove it, or pass another --out")
    return files


def _origin(found: Found) -> dict[str, str]:
    if found.run is None:
        return origin_of(found.adapter, weight_hash(found.source))
    return origin_of(found.adapter or found.run.model_path, str(found.run.metadata["model"]["weight_hash"]))


def _tuned(
    found: Found,
    target: str | Path,
    model: str | Path | None,
    device: str,
    prompts: list[list[int]],
    progress: Progress,
    skeleton: Skeleton | None = None,
) -> Reference:
    """What base and adapter compute in fp32 (which holds 16-bit weights exactly), and the base alone: `skeleton` of its own files where that is
    given, and for an adapter that PEFT changes the base's weights for when it is put on.
    """
    assert found.adapter is not None
    loaded = load(target, model, "fp32", device, quantized=False, progress=progress)
    adapted = loaded.forward.model
    progress("the source's probabilities", 0, 1)
    logits = plain_logits(adapted, prompts)
    if skeleton is None and has_own_start(read_json(found.adapter / CONFIG) or {}):
        skeleton = _skeleton(found.source.path, found)
    if skeleton is not None:
        base = skeleton.logits(prompts)
    else:
        with adapted.disable_adapter():
            base = plain_logits(adapted, prompts)
    progress("the source's probabilities", 1, 1)
    return Reference(prompts, logits, base)


def _skeleton(folder: Path, found: Found) -> Skeleton:
    """The model in a folder, read from its files, with the tokens that end an answer. Raises ModelError for one that cannot be read so."""
    try:
        skeleton = Skeleton(folder, found.hardware.device)
    except Unstreamable as why:
        raise ModelError(f"{found.source.name} cannot be exported: {why}") from None
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: no model can be made of it: {str(error).splitlines()[0]}"
        ) from None
    ends = generation_values(folder, skeleton.model.config).get("eos_token_id")
    skeleton.model.generation_config.eos_token_id = _ends(ends, folder)
    return skeleton


def _refuse_unwritable(found: Found, name: str) -> None:
    """Raise ModelError for a model or a tokenizer that GGUF cannot hold, before an adapter is merged for it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(found.source.path, local_files_only=True)
    except (ValueError, TypeError, OSError) as error:
        path = found.source.path / "config.json"
        raise ModelError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    describe(config.get_text_config() if config.model_type in TEXT_TOWERS else config)
    vocabulary(found.tokenizer, len(found.tokenizer))
    model_name(name, found.tokenizer)


def _adapted_source(
    found: Found,
    target: str | Path,
    model: str | Path | None,
    device: str,
    name: str,
    origin: dict[str, str],
    progress: Progress,
) -> Source:
    """The base, from its own files: those of the model that the adapter was put on may be changed for it."""
    assert found.adapter is not None
    skeleton = _skeleton(found.source.path, found)
    made = exportable(skeleton.model, found.tokenizer, found.chat.template, name, origin)
    refuse_adapter(found.adapter, made.description)
    reference = _tuned(found, target, model, device, fixed_prompts(found.chat), progress, skeleton)
    return Source(found.chat, reference, made, skeleton)


def _whole_source(
    found: Found,
    target: str | Path,
    model: str | Path | None,
    device: str,
    name: str,
    origin: dict[str, str],
    work: Path,
    progress: Progress,
) -> Source:
    """The model whose weights are written, on the disk. An adapter is merged into its base first, and what came out is compared with what base
    and adapter compute apart: the file would else hold whatever that is.
    """
    prompts, folder, tuned = fixed_prompts(found.chat), found.source.path, None
    if found.adapter is not None:
        _refuse_unwritable(found, name)
        tuned = _tuned(found, target, model, device, prompts, progress)
        # In fp32, so that weights are rounded once, to the file's type: bf16 first moved the logits of a tuned SmolLM2-135M by 5%.
        folder = work / "merged"
        merge(target, folder, model=model, dtype="fp32", device=device, progress=progress)
    skeleton = _skeleton(folder, found)
    made = exportable(skeleton.model, found.tokenizer, found.chat.template, name, origin)
    progress("the source's probabilities", 0, 1)
    logits = skeleton.logits(prompts)
    progress("the source's probabilities", 1, 1)
    if tuned is not None and tuned.base is not None:
        compare_logits(logits, tuned.logits, tuned.base).refuse()
    return Source(
        found.chat, tuned or Reference(prompts, logits), made, skeleton, skeleton.model.generation_config.eos_token_id
    )


def _ends(ends: Any, folder: Path) -> list[int]:
    """The ids that end an answer, of a generation config's `eos_token_id`. Raises ModelError for what is no id."""
    found = [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
    if not all(type(one) is int for one in found):
        names = ("generation_config.json", "config.json")
        path = next(folder / name for name in names if (folder / name).is_file())
        raise ModelError(f"{path}: eos_token_id is {ends!r}: expected a token's id, or a list of them")
    return found


def _write_merged(source: Source, kind: ExportType, file: Path, progress: Progress) -> dict[str, Any]:
    skeleton, made = source.skeleton, source.made
    weights = Weights(skeleton)
    progress(f"writing {kind.name}", 0, 1)
    write_model(file, weights, made, kind)
    progress(f"verifying {kind.name} in llama.cpp", 0, 1)
    written = Written(file, made.description)
    written.compare(weights)
    exact, rounds = written.logits(skeleton, source.reference.prompts)
    with LlamaCpp(file, _context(source)) as opened:
        compare_specials(opened, written, source.chat.tokenizer, source.ends)
        compare_templates(opened, source.chat, made)
        compare_tokens(opened, source.chat, made)
        measured = measure(opened, written, source.reference, exact, rounds, kind.name)
        speed = opened.speed(source.reference.prompts[0])
    progress(f"verifying {kind.name} in llama.cpp", 1, 1)
    return {
        "type": kind.name,
        "bytes": file.stat().st_size,
        "kl": measured.found.kl,
        "max_kl": measured.max_kl,
        "type_kl": measured.type_kl,
        "llama_cpp_kl": measured.own,
        "max_llama_cpp_kl": measured.max_own,
        "top1": measured.found.top1,
        "tokens": measured.found.tokens,
        "tokens_per_second": speed,
        "warning": measured.warning,
    }


def _write_lora(source: Source, found: Found, kind: ExportType, file: Path, progress: Progress) -> dict[str, Any]:
    """The adapter's file, verified over its base in f16, as others will have it: from the base's own files. It is removed again."""
    assert found.adapter is not None
    progress(f"writing the adapter in {kind.name}", 0, 1)
    write_adapter(file, found.adapter, source.made, kind.block)
    base = file.with_name("base.gguf")
    write_model(base, Weights(source.skeleton), source.made, find_type("f16"))
    progress("verifying the adapter in llama.cpp", 0, 1)
    with LlamaCpp(base, _context(source), file) as opened:
        agreed, allowed, warning = measure_lora(opened, source.reference, kind.name)
        speed = opened.speed(source.reference.prompts[0])
    base.unlink()
    progress("verifying the adapter in llama.cpp", 1, 1)
    return {
        "type": kind.name,
        "bytes": file.stat().st_size,
        "kl": agreed.kl,
        "max_kl": allowed,
        "top1": agreed.top1,
        "tokens": agreed.tokens,
        "tokens_per_second": speed,
        "warning": warning,
    }


def _context(source: Source) -> int:
    """For the prompts and the speed. A model whose RoPE changes with the length (LongRoPE) gets no more than its short one, if they fit."""
    needed = max(map(len, source.reference.prompts)) + SPEED_TOKENS + 1
    short = source.made.description.keys.get("rope.scaling.original_context_length", MIN_CONTEXT)
    return max(needed, min(MIN_CONTEXT, int(short)))


def _modelfile(file_name: str, source: Source, found: Match | None, base: str | None) -> str:
    specials = source.made.vocabulary.specials
    ids = [specials[name] for name in ("eos", "eot", "eom") if name in specials]
    return modelfile(file_name, found, list(source.chat.tokenizer.convert_ids_to_tokens(ids)), base)
