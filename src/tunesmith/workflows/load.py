"""Load something that answers: a base model, an adapter over its base, or a finished run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tunesmith.config import ModelConfig, QuantizationConfig, RunConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.hardware import ComputeDType, Hardware, compute_dtype, probe
from tunesmith.models import loftq
from tunesmith.models.adapters import base_of_adapter, load_adapter
from tunesmith.models.base_config import config_differences
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import ModelSource, fetch_weights, find_model, load_model, load_tokenizer, weight_hash
from tunesmith.registry.fields import check_config, check_metadata, check_record
from tunesmith.registry.records import (
    CONFIG,
    adapter_hash,
    data_facts,
    portable_name,
    read_json,
    recorded_parent,
    refuse_code,
    short_settings,
)
from tunesmith.registry.unchanged import changes, computed
from tunesmith.runs import RunFolder
from tunesmith.types import Progress, no_progress
from tunesmith.version import __version__
from tunesmith.workflows.inference import Inference, Setting, Unmeasured
from tunesmith.workflows.lineage import tokenizer_hash
from tunesmith.workflows.named_base import named_base_difference, named_base_note

TEMPLATE_NAME = "chat_template.jinja"
"""Beside an adapter: the template that it was trained with. transformers has the same name for it."""

RECORD_NAME = "tunesmith.json"
"""Beside an adapter: what it was trained on and with, as hashes, and the hash of its own file."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to answer. `run` is set when it came from a run; `adapted` says whether an adapter is on it, `unlike_training` in what other setting
    than training's that is used, with the measured effect.
    """

    forward: ModelForward
    tokenizer: Any
    chat: ChatFormat
    source: ModelSource
    hardware: Hardware
    dtype: ComputeDType
    adapted: bool
    run: RunFolder | None = None
    unlike_training: str | None = None


def load(
    target: str | Path,
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantized: bool = True,
    base: bool = False,
    progress: Progress = no_progress,
    check: Callable[[ChatFormat], object] = lambda chat: None,
    force: bool = False,
) -> LoadedModel:
    """Load `target`: a run folder, a PEFT adapter folder, a model folder, a .gguf file or a hub id.

    `model` overrides the base of an adapter. A QLoRA run's base is quantized as in training unless `quantized` is False.
    With `base`, a run's base is loaded as the run had it at its start, with the same settings and chat template; an
    adapter folder's own `chat_template.jinja` applies. `check` sees the chat format before the weights are fetched and
    read, and may raise. An adapter in another type or over another quantization than training's is said, with the effect that was measured now or before
    (workflows/inference.py). Raises ModelError, RunError or MachineError; a base with other weights than the run or the adapter was
    trained on is refused, unless `force`: then `progress` is told, and where nobody knows which base that was.
    """
    found = find(target, model, dtype, device, base, check, progress if force else None)
    if note := unchecked_base(found.run, found.adapter, found.source):
        progress(f"warning: {note}", 0, 1)
    progress("loading the model", 0, 1)
    # A lone adapter's base is as the user names it; what its record says of quantization is said below.
    quantization = found.quantization if quantized and found.run else None
    unlike = Inference.unlike_training(found, Setting(found.dtype, quantization))
    said = None
    if unlike is not None:
        if force and differences(found.run, found.adapter, found.source, found.chat):
            said = unlike.said(None, "the base is another one than training's")
        elif (effect := unlike.known()) is not None:
            said = unlike.said(effect)
        if said:
            progress(said, 0, 1)
    loaded: Any = load_model(found.source, found.settings, found.hardware, found.dtype, quantization)
    if found.adapter:
        loaded = load_adapter(loaded, found.adapter)
        if found.loftq and quantization is not None:
            loftq.restore(loaded, found.source.path, found.loftq)
    loaded.eval()
    progress("loading the model", 1, 1)
    forward = ModelForward(loaded, found.hardware.device, found.dtype)
    if unlike is not None and said is None:
        said = _measured(unlike, loaded, progress)
        progress(said, 0, 1)
    adapted = found.adapter is not None
    return LoadedModel(
        forward, found.tokenizer, found.chat, found.source, found.hardware, found.dtype, adapted, found.run, said
    )


def _measured(unlike: Inference, loaded: Any, progress: Progress) -> str:
    progress(f"measuring {unlike.used} against {unlike.trained}, as trained", 0, 1)
    try:
        effect = unlike.measure(loaded)
    except Unmeasured as why:
        return unlike.said(None, f"{why}; `tunesmith adapters verify` loads both")
    return unlike.said(effect)


@dataclass(frozen=True, slots=True)
class Found:
    """Everything about something that answers but its weights, which are on this disk and are the right ones."""

    run: RunFolder | None
    adapter: Path | None
    source: ModelSource
    settings: ModelConfig
    tokenizer: Any
    chat: ChatFormat
    hardware: Hardware
    dtype: ComputeDType
    quantization: QuantizationConfig | None
    """How the base was quantized when an adapter was trained on it."""

    trained_dtype: str | None
    loftq: int
    """LoftQ's iterations, 0 without it."""


def find(
    target: str | Path,
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    base: bool = False,
    check: Callable[[ChatFormat], object] = lambda chat: None,
    forced: Progress | None = None,
) -> Found:
    """What `load` finds before it reads weights, with the same arguments and errors; `forced` is told what would be refused."""
    path, target, model = Path(target), str(target), str(model) if model else None
    run = RunFolder.open(path) if RunFolder.is_run(path) else None
    if run:
        check_metadata(run.path / "metadata.json", run.metadata)
    config = run.config if run else RunConfig()
    is_adapter = run is None and (path / "adapter_config.json").is_file()
    if model and run is None and not is_adapter:
        raise ModelError(f"{target}: --model names the base of a run or an adapter, and this is neither; leave it out")
    if model and run and config.method == "full" and not base:
        raise ModelError(
            f"{target}: a full fine-tuning has its own model; --model names its base, which only a comparison with the "
            "base (eval --baseline) needs; leave it out"
        )
    name = model or (config.model.name if run else base_of_adapter(path) if is_adapter else target)
    settings = config.model.model_copy(update={"name": name})
    if dtype not in ("auto", "bf16", "fp16", "fp32"):
        raise ConfigError(f"dtype is {dtype!r}: expected auto, bf16, fp16 or fp32")
    if dtype != "auto":
        settings.dtype = dtype  # type: ignore[assignment]  # one of the four
    if device != "auto":
        settings.device = device
    if model:
        settings.revision = None  # it named a commit of the other model
    tuned = run if not base else None
    if tuned and config.method == "full":
        settings = settings.model_copy(update={"name": str(_finished(tuned, tuned.model_path)), "revision": None})
    adapter = (
        _finished(tuned, tuned.adapter_path) if tuned and config.method != "full" else path if is_adapter else None
    )

    if adapter:
        check_config(adapter / CONFIG, read_json(adapter / CONFIG) or {})
        refuse_code(adapter)
        read_record(adapter)
    hardware = probe(settings.device)
    computes = compute_dtype(settings.dtype, hardware)
    source = find_model(settings)
    tokenizer = load_tokenizer(tokenizer_source(source, adapter), settings)
    own_template = path / TEMPLATE_NAME
    if is_adapter and own_template.is_file():
        chat = ChatFormat(tokenizer, str(own_template))
    else:
        chat = chat_format(tokenizer, config, run)
    check(chat)
    source = fetch_weights(source, settings)
    if adapter or (run and base):
        check_training(run, adapter, source, chat, forced)
    record = run.metadata if run else read_record(adapter) if adapter else {}
    quantization = trained_quantization(run, record)
    iterations = loftq_iterations(run, record)
    trained = record.get("dtype") if adapter else None
    return Found(run, adapter, source, settings, tokenizer, chat, hardware, computes, quantization, trained, iterations)


def trained_quantization(run: RunFolder | None, record: Mapping[str, Any]) -> QuantizationConfig | None:
    """How a run, or a lone adapter's record, says that the base was quantized."""
    if run is not None:
        return run.config.quantization if run.config.method == "qlora" else None
    return QuantizationConfig(**found) if isinstance(found := record.get("quantization"), dict) else None


def loftq_iterations(run: RunFolder | None, record: Mapping[str, Any]) -> int:
    """Of a run, or of a lone adapter's record: LoftQ's adapter is saved for the 16-bit weights, and is none for the quantized ones. 0 for others."""
    if run is not None:
        return loftq.iterations_of(run.config.adapter.init_lora_weights)
    return loftq.iterations_of(str((record.get("settings") or {}).get("adapter.init_lora_weights", "default")))


def tokenizer_source(source: ModelSource, adapter: Path | None) -> ModelSource:
    """Where the tokenizer is: with an adapter that has one (it was trained with new tokens, or saved so), else with the base."""
    if adapter is None or not (adapter / "tokenizer_config.json").is_file():
        return source
    return ModelSource(str(adapter), adapter)


def chat_format(tokenizer: Any, config: RunConfig, run: RunFolder | None = None) -> ChatFormat:
    """The chat format of a configuration; of a run the one it is trained with, its own copy, on the day that it began.

    Raises RunError if that copy was changed.
    """
    if run is None or not run.template_path.is_file():
        return ChatFormat(tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
    facts = run.metadata["chat_template"]
    now = datetime.fromisoformat(facts["now"]) if facts.get("now") else None
    kept = run.template_path.read_text(encoding="utf-8")
    chat = ChatFormat(tokenizer, facts["name"], config.data.chat_template_kwargs, now, kept)
    if chat.hash != facts["hash"]:
        raise RunError(f"{run.template_path}: this is not the chat template that the run was trained with; restore it")
    return chat


def load_plain(path: Path, dtype: ComputeDType, hardware: Hardware) -> Any:
    """The model in a folder, as it is. For reading an artifact back."""
    config = ModelConfig(name=str(path))
    return load_model(find_model(config), config, hardware, dtype)


def _finished(run: RunFolder, folder: Path) -> Path:
    if not folder.is_dir():
        raise RunError(
            f"{run.path}: this run is not finished (no {folder.name}/); `tunesmith resume {run.path}` goes on"
        )
    return folder


def adapter_record(run: RunFolder, folder: Path) -> dict[str, Any]:
    """What stands in `RECORD_NAME` beside the adapter that `run` saves in `folder`: what it was trained on and with, and its own hash."""
    known, config = run.metadata, run.config
    own = tokenizer_source(ModelSource("", Path()), folder)
    return {
        "tunesmith": __version__,
        "base": {
            "name": portable_name(known["model"]["name"]),
            "weight_hash": known["model"]["weight_hash"],
            "config": known["model"].get("config"),
        },
        "tokenizer": known["tokenizer"],
        "adapter_tokenizer": {"hash": tokenizer_hash(own)} if own.path == folder else None,
        "chat_template": {"hash": known["chat_template"]["hash"]},
        "data": data_facts(known["data"]),
        "settings": short_settings(config),
        "dtype": known["dtype"],
        "quantization": config.quantization.model_dump() if config.method == "qlora" else None,
        "parent": recorded_parent(known["parent"], run.adapter_path),
        "adapter_sha256": adapter_hash(folder),
        "adapter_config": computed(read_json(folder / CONFIG) or {}),
    }


def read_record(adapter: Path) -> dict[str, Any]:
    """What `adapter_record` wrote beside an adapter; nothing where there is none. Raises ModelError for a damaged one."""
    path = adapter / RECORD_NAME
    record = read_json(path)
    if record is None:
        return {}
    check_record(path, record)
    return record


def differences(
    run: RunFolder | None, adapter: Path | None, source: ModelSource, chat: ChatFormat, reread: bool = False
) -> list[str]:
    """What base, tokenizer and template are other than those that a run, or a lone adapter's record, was trained with.

    What neither says is not compared, but for the weights of the base that a lone adapter's own configuration names (named_base.py). With `reread` the
    bytes of the base are read, and no remembered hash is taken. An adapter's own tokenizer and template count instead of the base's, and are compared with what was saved; a run's own template was
    compared when it was read.
    """
    place: Path | None = run.path if run else adapter
    record = {**run.metadata, "base": run.metadata.get("model", {})} if run else read_record(adapter) if adapter else {}
    own = tokenizer_source(source, adapter)
    beside = read_record(adapter).get("adapter_tokenizer") or {} if adapter and own is not source else {}
    compared = [
        ("its weights", "are not those", "on", record.get("base", {}), "weight_hash", lambda base: weight_hash(base, reread)),
        ("its tokenizer", "is not the one", "with", record.get("tokenizer") or {} if own is source else {}, "hash", tokenizer_hash),
        ("the tokenizer beside the adapter", "is not the one", "with", beside, "hash", lambda _: tokenizer_hash(own)),
        ("the chat template", "is not the one", "with", record.get("chat_template") or {}, "hash", lambda _: chat.hash),
    ]  # fmt: skip
    found = [
        f"{source.name}: {what} (sha256 {now[:12]}) {is_not} that {place} was trained {how} ({trained[:12]})"
        for what, is_not, how, known, key, current in compared
        if (trained := known.get(key)) is not None and trained != (now := current(source))
    ]
    if values := config_differences(record.get("base", {}).get("config"), source):
        found.append(f"{source.name}: its config.json is not the one that {place} was trained on: {', '.join(values)}")
    if adapter and not run and not _recorded_base(adapter) and (other := named_base_difference(adapter, source)):
        found.insert(0, other)
    return found


def unchecked_base(run: RunFolder | None, adapter: Path | None, source: ModelSource) -> str | None:
    """What to say of an adapter whose base nothing shows to be the right one; None where `differences` compared it."""
    return named_base_note(adapter, source) if adapter and not run and not _recorded_base(adapter) else None


def _recorded_base(adapter: Path) -> bool:
    return (read_record(adapter).get("base") or {}).get("weight_hash") is not None


def check_training(
    run: RunFolder | None, adapter: Path | None, source: ModelSource, chat: ChatFormat, forced: Progress | None
) -> None:
    """Raise ModelError for a base, tokenizer or template other than training's, and for an adapter that was changed since; with `forced`, tell
    it instead.
    """
    if adapter:
        refuse_changed_adapter(run, adapter, forced)
    found = differences(run, adapter, source, chat)
    if not found:
        return
    said = "; ".join(found)
    if forced is None:
        raise ModelError(
            f"{said}; pass the right base with --model (`tunesmith eval --force` measures this one all the same)"
        )
    forced(f"{said}; forced", 0, 1)


def refuse_changed_adapter(run: RunFolder | None, adapter: Path, forced: Progress | None = None) -> None:
    """Raise ModelError where the adapter's files are not those that its record says were saved; with `forced`, tell it instead."""
    changed = changes(adapter, read_record(adapter), run.config if run else None)
    if not changed:
        return
    said = "; ".join(changed)
    if forced is None:
        raise ModelError(
            f"{said}; restore it, or train again (`tunesmith adapters verify` compares all that was recorded)"
        )
    forced(f"{said}; forced", 0, 1)
