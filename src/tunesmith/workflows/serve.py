"""Serve a base with several adapters: load and check everything, then answer until SIGTERM."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tunesmith.config import ModelConfig, QuantizationConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, MachineError, ModelError
from tunesmith.hardware import compute_dtype, probe, torch_dtype
from tunesmith.models.adapters import base_of_adapter, find_adapter
from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import end_tokens
from tunesmith.models.load import fetch_weights, find_model, load_model, load_tokenizer
from tunesmith.runs import RunFolder
from tunesmith.serving.limits import Limits
from tunesmith.types import Message, Progress, no_progress
from tunesmith.workflows.load import TEMPLATE_NAME, LoadedModel, chat_format, check_training, load, tokenizer_source

PACKAGES = ("uvicorn", "starlette", "prometheus_client")


def serve(
    target: str,
    adapters: Mapping[str, str],
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    api_key_env: str | None = None,
    limits: Limits | None = None,
    progress: Progress = no_progress,
    on_ready: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> None:
    """Answer OpenAI's API at `host`:`port` with the base `target` and `adapters` (name: folder), until SIGTERM or Ctrl-C.

    `on_ready` is told url, model, adapters and notes when requests can come. Raises UserError (2) for a base, an adapter or a setting
    that cannot be served, before the port answers; MachineError (3) for a missing package, a port that is taken, no memory.
    """
    limits = limits or Limits()
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise MachineError(f"serve needs {', '.join(missing)}; install with: pip install 'tunesmith[serve]'")
    from tunesmith.serving.catalog import Catalog, ServedModel, check_name
    from tunesmith.serving.engine import Engine
    from tunesmith.serving.process import bind, is_loopback, run
    from tunesmith.serving.server import Server

    key = _key(api_key_env)
    called = name or name_of(target)
    for adapter in adapters:
        check_name(adapter, called)
    with bind(host, port) as listening:
        loaded = load_base(target, dtype, device, quantization, progress)
        forward = loaded.forward
        ends = frozenset(end_tokens(forward.base, loaded.tokenizer))
        notes: list[str] = []
        engine = Engine(forward, limits.batch, limits.queue)
        reader = AdapterReader(loaded, quantization)
        catalog = Catalog(engine, ServedModel(called, loaded.tokenizer, loaded.chat, ends), reader.read)
        engine.start()
        try:
            for adapter, path in adapters.items():
                progress(f"loading the adapter {adapter}", 0, 1)
                catalog.begin_with(adapter, path)
                notes += reader.notes(path)
            changes = key is not None or is_loopback(host)
            server = Server(catalog, limits, key, changes)
            shown = f"[{host}]" if ":" in host else host
            url = f"http://{shown}:{listening.getsockname()[1]}/v1"
            if not changes:
                notes.append(
                    f"{host} is reached from beyond this machine without an API key: adapters cannot change while it runs"
                )
            on_ready({"url": url, "model": called, "adapters": list(adapters), "notes": notes})
            run(server, listening)
        finally:
            engine.stop()


def load_base(
    target: str,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    progress: Progress = no_progress,
) -> LoadedModel:
    """The base, in 16 or 32 bits or quantized by bitsandbytes (`nf4`, `fp4`, `int8`). Raises ConfigError for an adapter."""
    path = Path(target)
    run = RunFolder.open(path) if RunFolder.is_run(path) else None
    if (run and run.config.method != "full") or (run is None and (path / "adapter_config.json").is_file()):
        base = run.config.model.name if run else base_of_adapter(path)
        raise ConfigError(
            f"{target} is an adapter: serve its base with it, `tunesmith serve {base} --adapter NAME={target}`"
        )
    if quantization is None:
        return load(target, dtype=dtype, device=device, progress=progress)
    schemes = ("nf4", "fp4", "int8")
    if quantization not in schemes:
        raise ConfigError(f"--quantization {quantization}: expected one of {', '.join(schemes)}")
    if dtype not in ("auto", "bf16", "fp16", "fp32"):
        raise ConfigError(f"dtype is {dtype!r}: expected auto, bf16, fp16 or fp32")
    settings = ModelConfig.model_validate(
        {"name": str(run.model_path) if run else target, "dtype": dtype, "device": device}
    )
    hardware = probe(device)
    computes = compute_dtype(settings.dtype, hardware)
    source = find_model(settings)
    tokenizer = load_tokenizer(source, settings)
    chat = chat_format(tokenizer, run.config, run) if run else ChatFormat(tokenizer)
    source = fetch_weights(source, settings)
    progress("loading the model", 0, 1)
    scheme = QuantizationConfig.model_validate({"scheme": quantization})
    model: Any = load_model(source, settings, hardware, computes, scheme)
    model.eval()
    progress("loading the model", 1, 1)
    forward = ModelForward(model, hardware.device, computes)
    return LoadedModel(forward, tokenizer, chat, source, hardware, computes, False, run)


class AdapterReader:
    """Reads adapters for one base: a run, or a PEFT folder, with the chat template that it was trained with."""

    def __init__(self, base: LoadedModel, quantization: str | None = None):
        self.base, self.quantization = base, quantization

    def read(self, path: str) -> Any:
        """A `ReadAdapter`. Raises ModelError, RunError or DataError for one that cannot be served over this base.

        Its base's hash is compared with what its run or its tunesmith.json says, and its template is tried on a question.
        """
        from tunesmith.serving.adapter_files import read_adapter
        from tunesmith.serving.catalog import ReadAdapter

        forward, source = self.base.forward, self.base.source
        place = Path(path)
        run = RunFolder.open(place) if RunFolder.is_run(place) else None
        if run and run.config.method == "full":
            raise ModelError(f"{path}: a full fine-tuning has a model of its own and no adapter; serve it as a base")
        folder = find_adapter(place)
        own = tokenizer_source(source, folder)
        tokenizer = self.base.tokenizer if own is source else load_tokenizer(own, ModelConfig(name=str(folder)))
        rows = forward.base.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ModelError(
                f"{folder}: its tokenizer has {len(tokenizer)} tokens and the base {rows}; merge it and serve it alone"
            )
        template = folder / TEMPLATE_NAME
        if run:
            chat = chat_format(tokenizer, run.config, run)
        elif template.is_file():
            chat = ChatFormat(tokenizer, str(template))
        else:
            chat = self.base.chat if own is source else ChatFormat(tokenizer)
        check_training(run, folder, source, chat, None)
        chat.encode_prompt([Message("user", "a")])
        weights = read_adapter(folder, forward.base, forward.device, torch_dtype(forward.dtype))
        return ReadAdapter(weights, tokenizer, chat, frozenset(end_tokens(forward.base, tokenizer)))

    def notes(self, path: str) -> list[str]:
        """What to say of an adapter that was trained on its base in another precision."""
        if not RunFolder.is_run(path):
            return []
        run = RunFolder.open(path)
        trained = run.config.quantization.scheme if run.config.method == "qlora" else None
        found = []
        if trained != self.quantization:
            found.append(
                f"{path}: trained over a base in {trained or '16 or 32 bits'}, served over one in {self.quantization or '16 or 32 bits'}"
                + (f"; --quantization {trained} serves it as it was trained" if trained else "")
            )
        dtype = run.metadata.get("dtype")
        if dtype and dtype != self.base.dtype:
            found.append(
                f"{path}: trained in {dtype}, served in {self.base.dtype}; --dtype {dtype} serves it as it was trained"
            )
        return found


def name_of(target: str) -> str:
    """What clients call the base: a hub id as it is, a folder or file by its name."""
    path = Path(target)
    if not path.exists():
        return target
    path = path.resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def named_adapters(values: Sequence[str]) -> dict[str, str]:
    """Adapters from NAME=PATH. Raises ConfigError."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--adapter {value}: expected NAME=PATH, for example cs=runs/support")
        if name in found:
            raise ConfigError(f"--adapter {value}: the name {name} is given twice, for {found[name]} too")
        found[name] = path
    return found


def limits_from(values: Sequence[str], batch: int | None = None) -> Limits:
    """Limits from NAME=NUMBER. Raises ConfigError."""
    kinds = {field.name: type(value) for field, value in zip(fields(Limits), asdict(Limits()).values(), strict=True)}
    found: dict[str, Any] = {"batch": batch} if batch is not None else {}
    for value in values:
        name, _, number = value.partition("=")
        if name not in kinds:
            raise ConfigError(f"--limit {value}: expected one of {', '.join(kinds)}")
        kind = float if kinds[name] is float else int
        try:
            found[name] = kind(number)
        except ValueError:
            raise ConfigError(f"--limit {value}: {number!r} is no {'whole ' * (kind is int)}number") from None
        if not found[name] > 0:
            raise ConfigError(f"--limit {value}: expected more than 0")
    return Limits(**found)


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
) -> None:
    """Become `vllm serve` with the same base and adapters. Raises MachineError with the command where vLLM is not installed."""
    from tunesmith.serving.vllm import vllm_command

    key = _key(api_key_env)
    path = Path(target)
    run = RunFolder.open(path) if RunFolder.is_run(path) else None
    model = str(run.model_path) if run and run.config.method == "full" else target
    templates = {}
    for adapter, folder in adapters.items():
        place = Path(folder)
        own = RunFolder(place).template_path if RunFolder.is_run(place) else find_adapter(place) / TEMPLATE_NAME
        if own.is_file():
            templates[adapter] = own
    command = vllm_command(
        model, name or name_of(target), adapters, templates, host, port, dtype, max_batch or 256, api_key_env
    )
    program = shutil.which("vllm")
    if program is None:
        raise MachineError(f"vLLM is not installed here (pip install vllm); the command is: {command}")
    on_command(str(command))
    environment = {**os.environ, **command.environment}
    if key is not None:
        environment["VLLM_API_KEY"] = key
    os.execve(program, list(command.arguments), environment)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"--api-key-env {variable}: the environment has no such variable, or it is empty; set it, or leave the option out"
        )
    return key
