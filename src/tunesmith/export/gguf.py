"""Write a model, or a LoRA adapter, as one GGUF file.

The file's layout is the `gguf` package's (GGUFWriter). Tensors are quantized one after another as they are written, so that beside the
model itself one tensor is in memory. What stands in which key: gguf_architectures, gguf_tokenizer and gguf_types.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.errors import MachineError, ModelError
from tunesmith.export.gguf_architectures import Description, as_stored, describe, tensor_names, tensors, translate
from tunesmith.export.gguf_tokenizer import Vocabulary, model_name, vocabulary
from tunesmith.export.gguf_types import NEEDS_GGUF, ExportType, block_of, block_width, quantize
from tunesmith.export.skeleton import has_own_start
from tunesmith.files import disk_errors, sha256_file
from tunesmith.models.load import ModelSource, weight_hash
from tunesmith.version import __version__

ORIGIN = "tunesmith."
"""Before the file's own keys: `tunesmith.version`, `.adapter_hash`, `.base_hash` and `.sha256`. Readers of GGUF pass over keys that they do not know."""

SEAL = f"{ORIGIN}sha256"
"""Of the file's own SHA-256, in hex, taken with `UNSEALED` in its place: what is verified afterwards are the bytes that it is of."""

UNSEALED = "0" * 64


@dataclass(frozen=True, slots=True)
class Exportable:
    """A model that can be written: its description and vocabulary, made before any weight is touched."""

    description: Description
    vocabulary: Vocabulary
    template: str | None
    name: str
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What llama.cpp does otherwise."""
        return [*self.description.notes, *self.vocabulary.notes]


def exportable(
    model: Any, tokenizer: Any, template: str | None, name: str, origin: Mapping[str, str] | None = None
) -> Exportable:
    """Whether and how `model` can be written; `template` is its chat template, `origin` what `origin_of` gives. Raises ModelError."""
    description = describe(model.config)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tuple(ends) if isinstance(ends, list) else (ends,) if ends is not None else ()
    rows = model.get_input_embeddings().weight.shape[0]
    return Exportable(
        description, vocabulary(tokenizer, rows, ends), template, model_name(name, tokenizer), origin or {}
    )


def origin_of(trained: Path | None, base_hash: str | None) -> dict[str, str]:
    """What a file says of where it comes from: this version, the hash of what was trained (an adapter's folder, or a model's), the base's."""
    found = {"version": __version__}
    if trained is not None:
        found["adapter_hash"] = trained_hash(trained)
    if base_hash is not None:
        found["base_hash"] = base_hash
    return found


def trained_hash(folder: Path) -> str:
    """The hash of what was trained: of an adapter the SHA-256 of its weights' file, as its record has it (`adapter_sha256`); of a model the
    hash of all its weight files (`models.load.weight_hash`).
    """
    adapter = folder / "adapter_model.safetensors"
    return sha256_file(adapter) if adapter.is_file() else weight_hash(ModelSource(str(folder), folder))


def gguf_adapter_hash(path: Path) -> str | None:
    """The `trained_hash` of the adapter, or of the fully fine-tuned model, that a GGUF file was written from.

    None where it does not say: it was written by others, or from a model that nothing was trained on. Raises ModelError for a file that is no
    whole GGUF, MachineError without the `gguf` package.
    """
    field = _fields(path).get(f"{ORIGIN}adapter_hash")
    found = field.contents() if field else None
    return found if isinstance(found, str) else None


def gguf_seal(path: Path) -> tuple[str, str] | None:
    """The SHA-256 that a GGUF file says it had when it was written, and what it is now; None where it does not say. Errors as above."""
    field = _fields(path).get(SEAL)
    place = _place(field) if field else None
    if field is None or place is None:
        return None
    return str(field.contents()), _unsealed_hash(path, place)


def seal(path: Path) -> None:
    """Put the file's SHA-256 into a GGUF file that was written with `UNSEALED` under `SEAL`."""
    place = _place(_fields(path)[SEAL])
    assert place is not None
    digest = _unsealed_hash(path, place)
    with disk_errors(path), path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def _fields(path: Path) -> Mapping[str, Any]:
    """The metadata of a GGUF file, by key."""
    try:
        import gguf
    except ImportError as error:
        raise MachineError(NEEDS_GGUF) from error
    try:
        return gguf.GGUFReader(path).fields
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"{path}: not a whole GGUF file ({error or type(error).__name__}); export it again") from None


def _place(field: Any) -> int | None:
    """Where the characters of a key's value begin in the file; None unless it is a string as long as a hash."""
    if not isinstance(field.contents(), str) or len(field.parts[-1]) != len(UNSEALED):
        return None
    return int(field.offset + sum(part.nbytes for part in field.parts[:-1]))


def _unsealed_hash(path: Path, place: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(place))
        digest.update(UNSEALED.encode())
        file.seek(len(UNSEALED), os.SEEK_CUR)
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def write_model(path: Path, state: Mapping[str, torch.Tensor], made: Exportable, kind: ExportType) -> None:
    """Write the tensors of `state` (transformers' names) in `kind` to `path`. Raises ModelError for a tensor without a place."""
    import gguf

    found = made.description
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[found.architecture]])
    writer.add_type("model")
    writer.add_name(made.name)
    _add_origin(writer, made.origin)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[kind.file_type])
    _add_keys(writer, found)
    _add_vocabulary(writer, made.vocabulary)
    if made.template:
        writer.add_chat_template(made.template)

    def weights() -> Iterator[tuple[str, torch.Tensor, str]]:
        for name, tensor in tensors(state, found):
            shape = tuple(tensor.shape)
            yield name, tensor, block_of(name, shape, kind, found.num_layers, found.queries_per_key, found.tied)
        for name, values in found.tensors.items():
            yield name, torch.from_numpy(values), "F32"

    _write(path, writer, weights)


def write_adapter(path: Path, folder: Path, made: Exportable, block: str = "F16") -> None:
    """Write the PEFT LoRA adapter in `folder` as a LoRA GGUF: W + (α / r) · B · A, A as `W.lora_a`, B as `W.lora_b`.

    llama.cpp divides one α by each pair's rank; where PEFT scales a pair otherwise (rsLoRA, patterns), B is multiplied by the quotient.
    Raises ModelError for an adapter that is more than such pairs.
    """
    import gguf
    from safetensors.torch import load_file

    description = made.description
    refuse_adapter(folder, description)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "adapter_model.safetensors")
    names = tensor_names(description)
    alpha = float(settings["lora_alpha"])
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        a, b = state.pop(key).float(), state.pop(key.replace("lora_A", "lora_B")).float()
        scale = _scale(settings, module, a.shape[0])
        target = translate(f"{module}.weight", names, description)
        b = as_stored(f"{module}.weight", b, description) * (scale * a.shape[0] / alpha)
        pairs[target] = (a, b)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[description.architecture]])
    writer.add_type("adapter")
    writer.add_name(made.name)
    _add_origin(writer, made.origin)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)

    def weights() -> Iterator[tuple[str, torch.Tensor, str]]:
        for target, (a, b) in pairs.items():
            for part, tensor in (("lora_a", a), ("lora_b", b)):
                yield f"{target}.{part}", tensor, block if tensor.shape[-1] % block_width(block) == 0 else "F16"

    _write(path, writer, weights)


def require_packages() -> None:
    """Raise MachineError unless the packages that write and verify GGUF are there."""
    import importlib.util

    if any(importlib.util.find_spec(name) is None for name in ("gguf", "xllamacpp")):
        raise MachineError(NEEDS_GGUF)


def refuse_adapter(folder: Path, description: Description) -> None:
    """Raise ModelError for an adapter in `folder` that is more than LoRA pairs over the base's own weights, which is all that a LoRA GGUF holds.

    PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train over a base that their beginning was taken out of; a GGUF of the base has it in. An adapter of
    these that was converted on saving says nothing of it any more, and is a plain one.
    """
    from safetensors import safe_open

    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    merged = "export the merged model instead (without --lora)"
    _refuse_beyond_lora(settings)
    if has_own_start(settings):
        raise ModelError(
            f"{folder}: init_lora_weights is {settings['init_lora_weights']!r}: the adapter was trained over a base without its own beginning, "
            f"and llama.cpp would put it on the whole base; {merged}, or save the adapter converted to plain LoRA (PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion)"
        )
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        names = set(file.keys())
    pairs = {name.replace("lora_B", "lora_A") for name in names if name.endswith(".lora_B.weight")}
    pairs &= {name for name in names if name.endswith(".lora_A.weight")}
    if alone := names - pairs - {name.replace("lora_A", "lora_B") for name in pairs}:
        raise ModelError(
            f"{folder}: {min(alone)} is not part of a LoRA pair, and a LoRA GGUF holds nothing else; {merged}"
        )
    if description.tied and (heads := [name for name in pairs if name.endswith("lm_head.lora_A.weight")]):
        raise ModelError(
            f"{folder}: {heads[0]} changes the head, which in this base is one matrix with the embeddings: a GGUF of the base has no head of "
            f"its own that llama.cpp could put the adapter on; {merged}"
        )


def _refuse_beyond_lora(settings: dict[str, Any]) -> None:
    wrong = [
        key
        for key in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices")
        if settings.get(key)
    ]
    if settings.get("bias", "none") != "none":
        wrong.append("bias")
    if settings.get("peft_type") != "LORA" or wrong:
        what = f"{', '.join(wrong)} set" if wrong else f"peft_type {settings.get('peft_type')}"
        raise ModelError(f"the adapter has {what}: a LoRA GGUF holds B and A only; export the merged model instead")


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B · A by: α / r, or α / √r (rsLoRA, arXiv 2312.03732); α may be one of `alpha_pattern`."""
    import re

    alpha = next(
        (
            value
            for key, value in (settings.get("alpha_pattern") or {}).items()
            if re.match(rf"(.*\.)?({key})$", module)
        ),
        settings["lora_alpha"],
    )
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def _write(path: Path, writer: Any, weights: Callable[[], Iterator[tuple[str, torch.Tensor, str]]]) -> None:
    """Two passes over `weights`: what stands where, then the values."""
    import gguf

    for name, tensor, block in weights():
        kind = gguf.GGMLQuantizationType[block]
        width, size = gguf.GGML_QUANT_SIZES[kind]
        # The shape is of values; of bytes it would be only with dtype uint8.
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.numel() // width * size, raw_dtype=kind)
    with disk_errors(path):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, block in weights():
            writer.write_tensor_data(quantize(tensor.detach().float().cpu().numpy(), block))
        writer.close()
    seal(path)


def _add_origin(writer: Any, origin: Mapping[str, str]) -> None:
    for key, value in origin.items():
        writer.add_string(f"{ORIGIN}{key}", value)
    writer.add_string(SEAL, UNSEALED)


def _add_keys(writer: Any, found: Description) -> None:
    """The keys of the description; `scaling.type` is a word, counts are unsigned, the rest are floats."""
    import gguf

    prefix = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[found.architecture]]
    for key, value in found.keys.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{prefix}.{key}", value)


def _add_vocabulary(writer: Any, found: Vocabulary) -> None:
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.scores:
        writer.add_token_scores(found.scores)
    for name, number in found.specials.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, flag in found.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
