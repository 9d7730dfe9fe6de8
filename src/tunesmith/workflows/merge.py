"""Merge adapters into their base, streamed where that is possible, verified by reading back what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tunesmith.errors import ConfigError, MachineError, ModelError, RunError, VerificationError
from tunesmith.export.beside import GENERATION, generation_values, logits_of_whole, refuse_unlike, tokenizer_differences
from tunesmith.export.combine import Combination, combination, load_combined, refuse_uncombined, refuse_unmergeable
from tunesmith.export.quantized import QuantizedWeights
from tunesmith.export.safetensors import (
    OTHER_CONFIG,
    SPARED,
    MergeCheck,
    compare_logits,
    fixed_prompts,
    mean_kl,
    merge_adapter,
    refuse_other_logits,
)
from tunesmith.export.skeleton import Read, Skeleton, refuse_unstreamable, refuse_without_bias
from tunesmith.export.streamed import Written, proven_logits, write_merged
from tunesmith.export.tensors import TensorFiles, Unstreamable
from tunesmith.files import atomic_folder, write_json
from tunesmith.hardware import Hardware, free_memory_gb, torch_dtype
from tunesmith.models.adapters import expert_paths
from tunesmith.models.base_config import computed, config_differences
from tunesmith.models.load import ModelSource, load_model, weight_hash
from tunesmith.registry.records import Merged, adapter_hash, adapter_name, portable_name, write_merged_record
from tunesmith.runs import RunFolder
from tunesmith.types import GB, Progress, no_progress
from tunesmith.workflows.lineage import tokenizer_hash
from tunesmith.workflows.load import Found, find, load_plain, unchecked_base

ONTO = ("16bit", "quantized")

NOTHING = 1e-6
"""Relative change of the logits below which an adapter does nothing: fp32 computes the same twice no better."""

WHOLE_GB, WHOLE_SHARE = 1.0, 0.5
"""A merged model is loaded whole, to compare that too, where it has at most so many GB more than its largest shard (the merge promises to stay
under 2), and at most this share of the host's free memory."""


def merge(
    target: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    onto: str = "16bit",
    method: str | None = None,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write base + adapter as one model folder and prove that it computes the same.

    `target` is a run or a PEFT adapter folder, or several of one base, which `method` makes one of (`export/combine.py`), weighted by `weights` (equal
    ones). `out` defaults to RUN/merged (ADAPTER-merged; with several RUN/merged-METHOD). The adapter goes into the base's files as they are, or for a
    QLoRA run with `onto="quantized"` into the dequantized weights that it was trained over; the result is in `dtype` (the run's compute type by default).

    Returns `{path, dtype, difference, effect, kl, top1, lost, tokens, onto, streamed, notes, files, bytes, loaded_whole}`, and of a QLoRA run `kl_of_trained:
    {16bit, quantized}`: KL of either merge from the quantized base with its adapter. Raises VerificationError, and keeps nothing, on a mismatch.
    """
    targets = [target] if isinstance(target, (str, Path)) else list(target)
    if not targets or not all(map(str, targets)):
        raise ConfigError("nothing to merge: name a run or an adapter")
    if onto not in ONTO:
        raise ConfigError(f"onto is {onto!r}: expected {' or '.join(ONTO)}")
    how = combination(len(targets), method, weights, density)
    for each in targets:
        if RunFolder.is_run(each) and RunFolder.open(each).config.method == "full":
            raise ModelError(f"{each}: a full fine-tuning has no adapter to merge; its model is {Path(each) / 'model'}")
    folder = Path(out) if out else _default_out(Path(targets[0]), how)
    if folder.is_symlink() and not folder.exists():
        raise RunError(
            f"{folder}: a link to {folder.readlink()}, which is not there; remove it, or choose another --out"
        )
    RunFolder.refuse_existing(folder)
    # Merged weights are computed in fp32 and rounded when they are written: a device need not be able to train in the type.
    found = [find(each, model, "fp32" if dtype == "fp16" else dtype, device) for each in targets]
    if dtype == "fp16":
        found = [replace(each, dtype="fp16") for each in found]
    elif dtype == "auto":  # what it was trained in, as its run or the record beside it says
        found = [replace(each, dtype=each.trained_dtype or each.dtype) for each in found]  # type: ignore[arg-type]  # it was checked
    for number, one in enumerate(found):
        if one.adapter is None:
            raise ModelError(f"{targets[number]}: there is no adapter to merge; pass a run or a PEFT adapter folder")
    first = found[0]
    folders = [each.adapter for each in found if each.adapter]
    refuse_unmergeable(folders)
    if how is not None:
        refuse_uncombined(folders)
    notes = _refuse_unlike(found)
    notes += _other_ends(first)
    notes += [note for one in found if (note := unchecked_base(one.run, one.adapter, one.source))]
    if onto == "quantized":
        _refuse_unquantized(found)
    streamed = True
    try:
        refuse_unstreamable([_adapter_config(each) for each in found])
        check, facts = _streamed(found, folder, how, onto, notes, progress)
    except Unstreamable as why:
        if onto == "quantized":
            raise ModelError(
                f"--onto quantized: {first.source.name} cannot be merged tensor by tensor ({why})"
            ) from None
        notes.append(f"merged in memory, not tensor by tensor: {why}")
        progress(notes[-1], 0, 1)
        check, facts = _in_memory(found, folder, how, onto, notes, progress)
        streamed = False
    if check.effect < NOTHING:
        what = "the adapters, combined like this, change" if how else "the adapter changes"
        notes.append(
            f"{what} nothing (logits by {check.effect:.1e}): the merged model computes what the base does"
            + (f"; look at {'--weights and --density' if how.density else '--weights'}" if how else "")
        )
    return {
        "path": str(folder),
        "dtype": first.dtype,
        "difference": check.difference,
        "effect": check.effect,
        "kl": check.kl,
        "top1": check.top1,
        "lost": check.lost,
        "tokens": check.tokens,
        "onto": onto,
        "streamed": streamed,
        "notes": notes,
        **facts,
    }


def _default_out(path: Path, how: Combination | None) -> Path:
    ending = f"merged-{how.method}" if how else "merged"
    path = path if path.name not in ("", "..") else path.resolve()
    return path / ending if RunFolder.is_run(path) else path.with_name(f"{path.name}-{ending}")


def _adapter_config(found: Found) -> dict[str, Any]:
    assert found.adapter is not None
    config: dict[str, Any] = json.loads((found.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def _refuse_unlike(found: Sequence[Found]) -> list[str]:
    """Raise ModelError unless all adapters are for one base and one tokenizer; returns what else differs."""
    first = found[0]
    notes = []
    for other in found[1:]:
        if weight_hash(other.source) != weight_hash(first.source):
            raise ModelError(
                f"{other.adapter} is for the base {other.source.name}, {first.adapter} for {first.source.name}, whose weights differ; "
                "adapters merge over one base"
            )
        if unlike := config_differences(computed(first.source.config), other.source):
            raise ModelError(
                f"{other.adapter} is for {other.source.name}, {first.adapter} for {first.source.name}, which have the same weights and another "
                f"config.json: {', '.join(unlike)}; adapters merge over one base"
            )
        if unlike := tokenizer_differences(first.tokenizer, other.tokenizer):
            raise ModelError(
                f"{other.adapter} was trained with another tokenizer than {first.adapter}: {'; '.join(unlike)}. A merged model has one: merge "
                "adapters that were trained with the same tokens"
            )
        if other.chat.hash != first.chat.hash:
            notes.append(
                f"{other.adapter} was trained with another chat template; the merged model has that of {first.adapter}"
            )
    return notes


def _other_ends(found: Found) -> list[str]:
    """What to say where the base's generation config does not end an answer where training did: the file stays as the base has it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        found.source.path, trust_remote_code=found.settings.trust_remote_code, local_files_only=True
    )
    ends = generation_values(found.source.path, config.get_text_config()).get("eos_token_id")
    known = ends if isinstance(ends, list) else [ends]
    own = found.tokenizer.eos_token_id
    if own in known:
        return []
    return [
        f"{GENERATION} ends an answer at {ends}, as the base's does, and not at the tokenizer's end token {found.tokenizer.eos_token!r} ({own}), where "
        "tunesmith does too; name it to other programs"
    ]


def _refuse_unquantized(found: Sequence[Found]) -> None:
    for one in found:
        if one.quantization is None:
            raise ModelError(
                f"--onto quantized: {one.adapter} was not trained over a quantized base, as far as is known; leave it out"
            )
        if one.loftq:
            raise ModelError(
                "--onto quantized: a LoftQ adapter is saved for the 16-bit weights, as its difference from its beginning; leave it out"
            )
        if one.quantization != found[0].quantization:
            raise ModelError(
                f"--onto quantized: {one.adapter} was trained over a base in {one.quantization.scheme} (double_quant "
                f"{one.quantization.double_quant}), {found[0].adapter} over another one; leave it out"
            )


def _trained_over_one(found: Sequence[Found]) -> bool:
    """Whether all were trained over the same quantized base, and are saved for it. LoftQ's are not."""
    return found[0].quantization is not None and all(
        one.quantization == found[0].quantization and one.trained_dtype == found[0].trained_dtype and not one.loftq
        for one in found
    )


def _streamed(
    found: Sequence[Found], out: Path, how: Combination | None, onto: str, notes: list[str], progress: Progress
) -> tuple[MergeCheck, dict[str, Any]]:
    first = found[0]
    dtype, device = torch_dtype(first.dtype), first.hardware.device
    prompts = fixed_prompts(first.chat)
    progress("reading the base", 0, 1)
    skeleton = Skeleton(first.source.path, device)
    spared = SPARED if expert_paths(skeleton.model) else 0.0
    quantized = _quantized(found, skeleton, onto, notes)
    skeleton.put_on(load_combined(skeleton.model, [each.adapter for each in found if each.adapter], how))
    progress("reading the base", 1, 1)

    read: Read = quantized.read if quantized and onto == "quantized" else skeleton.stored
    changed = quantized.names if quantized and onto == "quantized" else frozenset[str]()
    base = skeleton.logits(prompts, read, adapter=False)
    if not bool(base.isfinite().all()):
        raise Unstreamable("its modules use weights of each other")
    tuned = skeleton.logits(prompts, read)
    facts: dict[str, Any] = {}
    with atomic_folder(out) as folder:
        written = write_merged(skeleton, folder, dtype, read, changed, progress)
        generation = generation_values(first.source.path, skeleton.model.config)
        _write_beside(found, folder, how, onto, generation)
        progress("comparing", 0, 1)
        refuse_unlike(folder, first.tokenizer, first.chat, generation, str(dtype).removeprefix("torch."))
        try:
            back = read_back(folder, device)
            merged = back.logits(prompts)
        except (ModelError, Unstreamable, SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise VerificationError(f"the merged model does not load back: {error}; nothing was kept") from error
        exact = proven_logits(skeleton, back, prompts, read, dtype)
        compare_logits(exact, tuned, base, spared).refuse()
        # The same weights in the base's own model: what else the folder says, its config, is the same too.
        refuse_other_logits(merged, skeleton.logits(prompts, back.stored, adapter=False), spared, OTHER_CONFIG)
        check = compare_logits(merged, tuned, base, spared)
        if costs := check.refuse_rounding(first.dtype):
            notes.append(costs)
        if too_large := _too_large(written, first.hardware):
            notes.append(too_large)
        else:
            back.close()
            skeleton.close()
            _compare_whole(folder, prompts, device, merged, spared)
        facts["loaded_whole"] = not too_large
        if quantized:
            trained = tuned if onto == "quantized" else skeleton.logits(prompts, quantized.read)
            otherwise = back.logits(prompts, _merged(skeleton, quantized, onto, dtype))
            measured = {onto: mean_kl(trained, merged), ONTO[1 - ONTO.index(onto)]: mean_kl(trained, otherwise)}
            facts["kl_of_trained"] = {name: measured[name] for name in ONTO}
        back.close()
        skeleton.close()
    if written.untied:
        notes.append(
            "head and embeddings were one matrix and differ now: both are written, and tie_word_embeddings is false"
        )
    return check, {"files": written.files, "bytes": written.bytes, **facts}


def _quantized(found: Sequence[Found], skeleton: Skeleton, onto: str, notes: list[str]) -> QuantizedWeights | None:
    """The base as training quantized it, where it did so for every adapter and that can be measured here."""
    first = found[0]
    if not _trained_over_one(found) or first.quantization is None:
        if len(found) > 1 and any(one.quantization for one in found):
            notes.append(
                "how far the merge is from a quantized base is not measured: not all were trained over the same one"
            )
        return None
    try:
        # Training quantized from its compute type, which need not be the one that is written now.
        trained: Any = first.trained_dtype or first.dtype
        weights = QuantizedWeights(skeleton, first.quantization, torch_dtype(trained))
    except MachineError as error:
        if onto == "quantized":
            raise
        notes.append(f"how far the merge is from what was trained over the quantized base is not measured: {error}")
        return None
    if said := weights.misread():
        notes.append(said)
    return weights


def _merged(skeleton: Skeleton, quantized: QuantizedWeights, onto: str, dtype: torch.dtype) -> Read:
    """The weights that the other choice of `onto` would give, rounded as they would be written."""
    other = quantized.read if onto == "16bit" else skeleton.stored
    by_adapter = skeleton.changed()

    def read(name: str) -> torch.Tensor:
        return (skeleton.merged(name, other) if name in by_adapter else other(name)).to(dtype)

    return read


def _write_beside(
    found: Sequence[Found], folder: Path, how: Combination | None, onto: str, generation: Mapping[str, Any]
) -> None:
    """What goes into the folder beside weights and config: the values for generation, the tokenizer with the template, and the record of what
    the model was made of.
    """
    first = found[0]
    # The template that it was trained with, which need not be the base's own.
    first.tokenizer.chat_template = first.chat.template
    first.tokenizer.save_pretrained(folder)
    if generation:
        # As the base has them: transformers refuses to save some values that makers published (a temperature without sampling).
        write_json(folder / GENERATION, dict(generation))
    adapters = [each.adapter for each in found if each.adapter]
    write_merged_record(
        folder,
        Merged(
            adapters=tuple(map(adapter_hash, adapters)),
            names=tuple(map(adapter_name, adapters)),
            base=portable_name(first.source.name),
            base_hash=weight_hash(first.source),
            tokenizer_hash=tokenizer_hash(ModelSource(str(folder), folder)),
            template_hash=first.chat.hash,
            dtype=first.dtype,
            onto=onto,
            method=how.method if how else None,
            weights=how.weights if how else None,
            density=how.density if how else None,
        ),
    )


def _too_large(written: Written, hardware: Hardware) -> str | None:
    """Why a model is not loaded whole beside what was read back tensor by tensor: it must not take more memory than the merge may."""
    share = WHOLE_SHARE * free_memory_gb(replace(hardware, device="cpu"))
    allowed = min(share, written.largest / GB + WHOLE_GB)
    if written.bytes / GB <= allowed:
        return None
    return (
        f"read back tensor by tensor, and not loaded whole through transformers: it has {written.bytes / GB:.1f} GB, and {allowed:.1f} GB are "
        "allowed for that"
    )


def _compare_whole(
    folder: Path, prompts: Sequence[Sequence[int]], device: str, merged: torch.Tensor, spared: float
) -> None:
    """Raise VerificationError unless transformers' own loading gives the logits that the tensors gave one by one."""
    try:
        whole = logits_of_whole(folder, prompts, device)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise VerificationError(f"transformers does not load the merged model: {said}; nothing was kept") from error
    refuse_other_logits(
        whole, merged, spared, "loaded by transformers, the merged model computes something else than its tensors"
    )


def read_back(folder: Path, device: torch.device | str) -> Skeleton:
    """The model in a folder that was written."""
    return Skeleton(folder, device)


def _in_memory(
    found: Sequence[Found], out: Path, how: Combination | None, onto: str, notes: list[str], progress: Progress
) -> tuple[MergeCheck, dict[str, Any]]:
    first = found[0]

    def reload(written: Path) -> Any:
        try:
            return load_plain(written, first.dtype, first.hardware)
        except ModelError as error:
            raise VerificationError(f"the merged model does not load back: {error}; nothing was kept") from error

    progress("merging", 0, 1)
    if any(each.quantization for each in found):
        notes.append(
            "how far the merge is from what was trained over the quantized base is not measured: it was merged in memory"
        )
    base: Any = load_model(first.source, first.settings, first.hardware, first.dtype)
    if getattr(base, "is_quantized", False):
        notes.append(
            "its base is stored quantized: the adapter went into the dequantized weights, and the merged model is as large as these"
        )
        base = _dequantized(base, torch_dtype(first.dtype))
    generation = generation_values(first.source.path, base.config)
    base.generation_config = type(base.generation_config)()  # written by `_write_beside`
    adapted = load_combined(base, [each.adapter for each in found if each.adapter], how).eval()

    def write_beside(folder: Path) -> None:
        _write_beside(found, folder, how, onto, generation)
        refuse_unlike(
            folder, first.tokenizer, first.chat, generation, str(torch_dtype(first.dtype)).removeprefix("torch.")
        )

    try:
        check, costs = merge_adapter(adapted, first.chat, out, first.dtype, write_beside, reload)
    except RuntimeError as error:
        refuse_without_bias(error, str(first.adapter))
        raise
    if costs:
        notes.append(costs)
    progress("merging", 1, 1)
    files = sorted(out.glob("*.safetensors"))
    entries = [entry for one in TensorFiles(out).entries.values() for entry in one]
    return check, {"files": len(files), "bytes": sum(entry.size for entry in entries), "loaded_whole": True}


def _dequantized(model: Any, dtype: torch.dtype) -> Any:
    """A model that bitsandbytes loaded as it was stored, with plain weights, to be saved as such."""
    plain = model.dequantize().to(dtype)
    plain._weight_conversions = []
    return plain
