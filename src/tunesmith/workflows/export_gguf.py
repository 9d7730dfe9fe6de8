"""Export a run, an adapter or a model as GGUF, verified in llama.cpp before anything is kept.

A run's adapter is merged first (workflows.merge, itself verified); with `lora` it becomes a file of its own. What is compared: the chat
template's renderings, the tokens of a difficult text and of the prompts, and the probabilities on the prompts, llama.cpp's against
those of the source in fp32.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, DataError, ModelError, RunError, VerificationError
from tunesmith.export.gguf import Exportable, exportable, origin_of, require_packages, write_adapter, write_model
from tunesmith.export.gguf_llama_cpp import SPEED_TOKENS, Agreement, LlamaCpp, agreement
from tunesmith.export.gguf_ollama import match, modelfile
from tunesmith.export.gguf_types import ExportType, find_type
from tunesmith.export.safetensors import PROMPTS
from tunesmith.files import disk_errors
from tunesmith.models.load import weight_hash
from tunesmith.runs import RunFolder
from tunesmith.types import Message, Progress, no_progress
from tunesmith.workflows.load import LoadedModel, find, load
from tunesmith.workflows.merge import merge

DIFFICULT = (
    "I'll, we'VE and they're — “naïve” café №½; 3.14159 + 1,000,000 = 2026年11月27日?\n\n\n"
    "\tdef f(x):\r\n        return x**2  # twice\t\t\n"
    "오늘 날씨가 어때요? 你好，世界！ Привет, мир! שלום नमस्ते ไทย\n"  # noqa: RUF001
    "🚀👩‍👩‍👧‍👦🏳️‍🌈 x\u00a0y\u200bz   end  "
)
"""Contractions in both cases, numbers, runs of spaces and line ends, scripts with and without spaces, joined emoji."""

MIN_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Reference:
    """What the source computes: the prompts' token ids, and its logits after each token, in fp32."""

    prompts: list[list[int]]
    logits: list[torch.Tensor]


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
    written, and verified over its base. Returns `{target, lora, files[{type, path, bytes, kl, max_kl, top1, tokens, tokens_per_second,
    modelfile}], ollama_template, notes}`. Raises ConfigError, ModelError, MachineError (a package is missing), and
    VerificationError, which leaves nothing.
    """
    kinds = [find_type(one.strip()) for one in types.split(",")]
    path = Path(target)
    name = _name(path)
    files = _files(path, name, kinds, Path(out) if out else None, lora)
    require_packages()
    folder = files[0].parent
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-export-", dir=folder) as temporary:
        work = Path(temporary)
        loaded = _source(target, model, device, work, lora, progress)
        origin = _origin(target, model)
        made = exportable(_whole(loaded), loaded.tokenizer, loaded.chat.template, name, origin)
        reference = _reference(loaded, progress)
        if lora:
            adapter = loaded.run.adapter_path if loaded.run else path
            rows = [_write_lora(loaded, adapter, made, reference, kinds[0], work / files[0].name, progress)]
        else:
            state = loaded.forward.model.state_dict()
            rows = [
                _write_merged(loaded, made, reference, kind, state, work / file.name, progress)
                for kind, file in zip(kinds, files, strict=True)
            ]
        found = None
        if not lora:
            found = match(lambda messages: loaded.chat.render(messages, True), loaded.tokenizer.bos_token or "")
        for row, file in zip(rows, files, strict=True):
            row["path"], row["modelfile"] = str(file), None
            (work / file.name).replace(file)
            if not lora:
                beside = file.with_suffix(".Modelfile")
                beside.write_text(modelfile(file.name, found, _stops(loaded, made)), encoding="utf-8")
                row["modelfile"] = str(beside)
    return {
        "target": str(target),
        "lora": lora,
        "files": rows,
        "ollama_template": found.kind.name if found else None,
        "notes": made.notes,
    }


def _name(path: Path) -> str:
    stem = path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name
    return re.sub(r"[^\w.-]", "-", stem) or "model"


def _files(path: Path, name: str, kinds: Sequence[ExportType], out: Path | None, lora: bool) -> list[Path]:
    """Where each type goes. Raises RunError for a file that is there already."""
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
    for file in files:
        if file.exists():
            raise RunError(f"{file}: already there; remove it, or pass another --out")
    return files


def _source(
    target: str | Path, model: str | Path | None, device: str, work: Path, lora: bool, progress: Progress
) -> LoadedModel:
    """The model to write, in fp32 (which holds 16-bit weights exactly). An adapter is merged into its base first, unless `lora`."""
    path = Path(target)
    method = RunFolder.open(path).config.method if RunFolder.is_run(path) else None
    adapted = (method is not None and method != "full") or (path / "adapter_config.json").is_file()
    if lora and not adapted:
        raise ModelError(f"{target}: there is no adapter to write; leave --lora out")
    if adapted and not lora:
        merged = merge(target, work / "merged", model=model, device=device, progress=progress)
        return load(merged["path"], dtype="fp32", device=device, progress=progress)
    return load(target, model, "fp32", device, quantized=False, progress=progress)


def _origin(target: str | Path, model: str | Path | None) -> dict[str, str]:
    path = Path(target)
    if RunFolder.is_run(path):
        run = RunFolder.open(path)
        trained = run.model_path if run.config.method == "full" else run.adapter_path
        return origin_of(trained, run.metadata["model"]["weight_hash"])
    adapter = path if (path / "adapter_config.json").is_file() else None
    return origin_of(adapter, weight_hash(find(target, model).source))


def _whole(loaded: LoadedModel) -> Any:
    """The transformers model, below an adapter where there is one."""
    return loaded.forward.model.get_base_model() if loaded.adapted else loaded.forward.model


def _reference(loaded: LoadedModel, progress: Progress) -> Reference:
    prompts = [loaded.chat.encode_prompt([Message("user", text)]) for text in PROMPTS]
    rows = []
    for number, ids in enumerate(prompts):
        progress("the source's probabilities", number, len(prompts))
        with torch.no_grad():
            rows.append(
                loaded.forward.model(input_ids=torch.tensor([ids], device=loaded.hardware.device)).logits[0].cpu()
            )
    progress("the source's probabilities", len(prompts), len(prompts))
    return Reference(prompts, rows)


def _write_merged(
    loaded: LoadedModel,
    made: Exportable,
    reference: Reference,
    kind: ExportType,
    state: dict[str, torch.Tensor],
    file: Path,
    progress: Progress,
) -> dict[str, Any]:
    progress(f"writing {kind.name}", 0, 1)
    write_model(file, state, made, kind)
    progress(f"verifying {kind.name} in llama.cpp", 0, 1)
    with LlamaCpp(file, _context(reference)) as opened:
        compare_templates(opened, loaded.chat, made)
        compare_tokens(opened, loaded, made)
        return _measured(opened, reference, kind, file)


def _write_lora(
    loaded: LoadedModel,
    adapter: Path,
    made: Exportable,
    reference: Reference,
    kind: ExportType,
    file: Path,
    progress: Progress,
) -> dict[str, Any]:
    """The adapter's file, verified over its base in f16, which is removed again."""
    progress(f"writing the adapter in {kind.name}", 0, 1)
    write_adapter(file, adapter, made, kind.block)
    base = file.with_name("base.gguf")
    write_model(base, loaded.forward.model.unload().state_dict(), made, find_type("f16"))
    progress("verifying the adapter in llama.cpp", 0, 1)
    with LlamaCpp(base, _context(reference), file) as opened:
        return _measured(opened, reference, kind, file)


def _context(reference: Reference) -> int:
    return max(MIN_CONTEXT, max(map(len, reference.prompts)) + SPEED_TOKENS + 1)


def _measured(opened: LlamaCpp, reference: Reference, kind: ExportType, file: Path) -> dict[str, Any]:
    """The table's row. Raises VerificationError where the file's probabilities are further from the source's than its type explains."""
    found: Agreement = agreement(reference.logits, [opened.log_probabilities(ids) for ids in reference.prompts])
    if not found.kl <= kind.max_kl:
        raise VerificationError(
            f"{kind.name}: llama.cpp does not compute what the source does: KL {found.kl:.3g} nats a token (allowed: {kind.max_kl:g}), "
            f"top-1 agreement {found.top1:.1%} over {found.tokens} tokens; nothing was kept"
        )
    return {
        "type": kind.name,
        "bytes": file.stat().st_size,
        "kl": found.kl,
        "max_kl": kind.max_kl,
        "top1": found.top1,
        "tokens": found.tokens,
        "tokens_per_second": opened.speed(reference.prompts[0]),
    }


def compare_templates(opened: LlamaCpp, chat: ChatFormat, made: Exportable) -> None:
    """Raise VerificationError unless llama.cpp renders conversations to the source's strings (it leaves out a BOS that it adds itself)."""
    if not made.template:
        return
    question, answer = Message("user", "Is it?"), Message("assistant", "Yes.")
    for messages in ([question], [question, answer, question], [Message("system", "Be short."), question]):
        try:
            expected = chat.render(messages, True)
        except DataError:
            continue  # a template without system turns
        found = opened.render([{"role": one.role, "content": one.content} for one in messages])
        if found not in (expected, expected.removeprefix(chat.tokenizer.bos_token or "")):
            raise VerificationError(
                f"llama.cpp renders the chat template otherwise: {found!r}, expected {expected!r}; nothing was kept"
            )


def compare_tokens(opened: LlamaCpp, loaded: LoadedModel, made: Exportable) -> None:
    """Raise VerificationError unless llama.cpp reads the source's token ids: in a difficult text, where control tokens are text
    too, and in prompts, where they are themselves.
    """
    tokenizer = loaded.tokenizer
    text = DIFFICULT + " ".join(str(token) for token in tokenizer.all_special_tokens if token != tokenizer.unk_token)
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    _same(plain, opened.tokenize(made.vocabulary.leading + text, control_tokens=False), tokenizer, "a difficult text")
    for content in (*PROMPTS, DIFFICULT):
        messages = [Message("user", content)]
        expected = tokenizer(loaded.chat.render(messages, True), add_special_tokens=False)["input_ids"]
        found = opened.tokenize(loaded.chat.render(messages, True), control_tokens=True)
        _same(expected, found, tokenizer, "a prompt")


def _same(expected: list[int], found: list[int], tokenizer: Any, what: str) -> None:
    if expected == found:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    here = tokenizer.decode(expected[max(0, at - 3) : at + 3])
    raise VerificationError(
        f"llama.cpp reads other tokens in {what}: at token {at} (near {here!r}) it has {found[at : at + 4]}, the tokenizer "
        f"{expected[at : at + 4]}; nothing was kept"
    )


def _stops(loaded: LoadedModel, made: Exportable) -> list[str]:
    ids = [made.vocabulary.specials[name] for name in ("eos", "eot") if name in made.vocabulary.specials]
    return list(loaded.tokenizer.convert_ids_to_tokens(ids))
