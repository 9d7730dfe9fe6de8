"""Hand the service to vLLM: the same base, adapters, names and chat template, checked as tunesmith's own engine checks them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import ModelConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, MachineError, ModelError
from tunesmith.files import cache_folder, sha256_text, write_atomic
from tunesmith.hardware import probe
from tunesmith.models.adapters import find_adapter
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import TEXT_TOWERS, ModelSource, fetch_weights, find_model, load_tokenizer
from tunesmith.runs import RunFolder
from tunesmith.workflows.load import TEMPLATE_NAME, LoadedModel, chat_format
from tunesmith.workflows.serve import check_host, key_of, name_of, run_of_base
from tunesmith.workflows.serve_adapters import AdapterReader

if TYPE_CHECKING:
    from tunesmith.serving.vllm import VllmCommand


def serve_with_vllm(
    target: str,
    adapters: Mapping[str, str],
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    max_batch: int | None = None,
    api_key_env: str | None = None,
    on_command: Callable[[str], None] = lambda command: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> None:
    """Become `vllm serve` with the same base and adapters.

    `on_note` is told what vLLM will do otherwise. Raises UserError for what cannot be served over this base, and for what vLLM cannot
    serve; MachineError with the command where vLLM is not installed.
    """
    command, notes = vllm_command_of(target, adapters, name, host, port, dtype, max_batch, api_key_env)
    key = key_of(api_key_env)
    for note in notes:
        on_note(note)
    program = shutil.which("vllm")
    if program is None:
        raise MachineError(f"vLLM is not installed here (pip install vllm); the command is: {command}")
    on_command(str(command))
    environment = {**os.environ, **command.environment}
    if key is not None:
        environment["VLLM_API_KEY"] = key
    os.execve(program, list(command.arguments), environment)


def vllm_command_of(
    target: str,
    adapters: Mapping[str, str],
    name: str | None,
    host: str,
    port: int,
    dtype: str,
    max_batch: int | None,
    api_key_env: str | None,
) -> tuple[VllmCommand, list[str]]:
    """vLLM's command, and what to say of it. Raises UserError."""
    from tunesmith.serving.catalog import check_name
    from tunesmith.serving.templates import Templates
    from tunesmith.serving.vllm import refuse_base, vllm_command

    check_host(host)
    key_of(api_key_env)
    called = name or name_of(target)
    for adapter in adapters:
        check_name(adapter, called)
    run = run_of_base(target)
    settings = ModelConfig(name=str(run.model_path) if run else target)
    source = find_model(settings)
    refuse_base(source.name, source.config)
    tokenizer = load_tokenizer(source, settings)
    chat = chat_format(tokenizer, run.config, run) if run else ChatFormat(tokenizer)
    chats: dict[str, ChatFormat] = {}
    unknown: list[str] = []
    if adapters:
        source = fetch_weights(source, settings)
        if source.config.get("model_type") in TEXT_TOWERS:
            raise ModelError(
                f"{source.name}: vLLM serves the whole multimodal model, whose layers have other names than those of its text model "
                "that adapters were trained on: it would load them and answer without them; merge each (`tunesmith merge`)"
            )
        templates = Templates()
        try:
            reader = AdapterReader(_without_weights(source, tokenizer, chat), templates)
            chats = {adapter: reader.read(path).chat for adapter, path in adapters.items()}
            unknown = [note for path in adapters.values() if (note := reader.base_note(path))]
        finally:
            templates.close()
    folders = {adapter: find_adapter(Path(path)).resolve() for adapter, path in adapters.items()}
    own = getattr(tokenizer, "chat_template", None)
    template = _template_of_all(chat, chats)
    file = None if template == own else _file_of(template, folders)
    notes = [*unknown, *(note for path in adapters.values() for note in _unlike_training(path, dtype))]
    if template != chat.template:
        notes.append(
            f"vLLM has one chat template for all models of a server: {called} is asked in that of the adapters too"
        )
    # With adapters it has to be the very weights that were compared, which a hub id might not name tomorrow.
    model = str(source.path) if adapters or target.endswith(".gguf") else settings.name
    return vllm_command(model, called, folders, file, host, port, dtype, max_batch or 256, api_key_env), notes


def _without_weights(source: ModelSource, tokenizer: Any, chat: ChatFormat) -> LoadedModel:
    """The base with names and shapes of its layers alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return LoadedModel(ModelForward(model, "cpu", "fp32"), tokenizer, chat, source, probe("cpu"), "fp32", False)


def _template_of_all(base: ChatFormat, adapters: Mapping[str, ChatFormat]) -> str:
    """The chat template that all adapters were trained with, the base's where there are none. Raises ConfigError where they differ."""
    texts = {name: chat.template for name, chat in adapters.items()}
    if len(set(texts.values())) > 1:
        raise ConfigError(
            f"the chat templates of {' and '.join(texts)} differ, and vLLM has one for all models of a server; start one vLLM for each, "
            "or serve them with tunesmith's own engine"
        )
    return next(iter(texts.values()), base.template)


def _file_of(template: str, adapters: Mapping[str, Path]) -> Path:
    """A file with this text: an adapter's own, or one in the user's cache folder."""
    for folder in adapters.values():
        file = folder / TEMPLATE_NAME
        if file.is_file() and file.read_text(encoding="utf-8") == template:
            return file
    file = cache_folder() / "chat-templates" / f"{sha256_text([template])[:16]}.jinja"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, template)
    return file


def _unlike_training(path: str, dtype: str) -> list[str]:
    """What vLLM serves otherwise than an adapter was trained."""
    if not RunFolder.is_run(path):
        return []
    run = RunFolder.open(path)
    found = []
    if run.config.method == "qlora":
        found.append(
            f"{path}: trained over a base in {run.config.quantization.scheme}, which vLLM does not have: it serves the base in 16 bits"
        )
    trained = run.metadata.get("dtype")
    if dtype != "auto" and trained and dtype != trained:
        found.append(f"{path}: trained in {trained}, served in {dtype}")
    return found
