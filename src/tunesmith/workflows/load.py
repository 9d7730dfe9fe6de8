"""Load something that answers: a base model, an adapter over its base, or a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import ModelSource, fetch_weights, find_model, load_model, load_tokenizer, weight_hash
from tunesmith.runs import RunFolder
from tunesmith.types import Progress, no_progress
from tunesmith.version import __version__

TEMPLATE_NAME = "chat_template.jinja"
"""Beside an adapter: the template that it was trained with. transformers has the same name for it."""

RECORD_NAME = "tunesmith.json"
"""Beside an adapter: the base that it was trained on, with the hash of its weights."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to answer. `run` is set when it came from a run; `adapted` says whether an adapter is on it."""

    forward: ModelForward
    tokenizer: Any
    chat: ChatFormat
    source: ModelSource
    hardware: Hardware
    dtype: ComputeDType
    adapted: bool
    run: RunFolder | None = None


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
    read, and may raise. Raises ModelError, RunError or MachineError; a base with other weights than the run or the adapter was
    trained on is refused, unless `force`: then `progress` is told.
    """
    path, target, model = Path(target), str(target), str(model) if model else None
    run = RunFolder.open(path) if RunFolder.is_run(path) else None
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
        _check_base(run, adapter, source, progress if force else None)
    progress("loading the model", 0, 1)
    quantization: QuantizationConfig | None = config.quantization if config.method == "qlora" and quantized else None
    loaded: Any = load_model(source, settings, hardware, computes, quantization)
    if adapter:
        loaded = load_adapter(loaded, adapter)
        iterations = loftq.iterations_of(config.adapter.init_lora_weights)
        if iterations and quantization is not None:
            loftq.restore(loaded, source.path, iterations)
    loaded.eval()
    progress("loading the model", 1, 1)
    forward = ModelForward(loaded, hardware.device, computes)
    return LoadedModel(forward, tokenizer, chat, source, hardware, computes, adapter is not None, run)


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


def base_record(name: str, weights: str) -> dict[str, Any]:
    """What stands in `RECORD_NAME` beside an adapter."""
    return {"tunesmith": __version__, "base": {"name": name, "weight_hash": weights}}


def _trained_on(run: RunFolder | None, adapter: Path | None) -> str | None:
    """The hash of the base's weights that a run, or a lone adapter's record, has; None where neither says."""
    if run is not None:
        return run.metadata.get("model", {}).get("weight_hash")
    record = adapter / RECORD_NAME if adapter else None
    if record is None or not record.is_file():
        return None
    try:
        found: str = json.loads(record.read_text(encoding="utf-8"))["base"]["weight_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{record}: cannot be read ({error}); restore it, or remove it to load on any base") from None
    return found


def _check_base(run: RunFolder | None, adapter: Path | None, source: ModelSource, forced: Progress | None) -> None:
    trained_on = _trained_on(run, adapter)
    if trained_on is None or trained_on == (found := weight_hash(source)):
        return
    said = (
        f"{source.name}: its weights (sha256 {found[:12]}) are not those that {run.path if run else adapter} was trained on "
        f"({trained_on[:12]})"
    )
    if forced is None:
        raise ModelError(
            f"{said}; pass the right base with --model (`tunesmith eval --force` measures this one all the same)"
        )
    forced(f"{said}; forced", 0, 1)
