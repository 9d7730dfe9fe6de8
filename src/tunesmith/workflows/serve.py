"""Serve a base with several adapters: load and check everything, then answer until SIGTERM."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tunesmith.config import ModelConfig, QuantizationConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, MachineError
from tunesmith.hardware import compute_dtype, probe
from tunesmith.models.adapters import base_of_adapter
from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import end_tokens
from tunesmith.models.load import fetch_weights, find_model, load_model, load_tokenizer
from tunesmith.runs import RunFolder
from tunesmith.serving.addresses import is_loopback, named_hosts
from tunesmith.serving.limits import Limits
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.load import LoadedModel, chat_format, load
from tunesmith.workflows.serve_adapters import AdapterReader

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
    allowed_hosts: Sequence[str] = (),
    limits: Limits | None = None,
    progress: Progress = no_progress,
    on_ready: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> None:
    """Answer OpenAI's API at `host`:`port` with the base `target` and `adapters` (name: folder), until SIGTERM or Ctrl-C.

    `on_ready` is told url, model, adapters and notes when requests can come and signals are handled, on a thread of its own. `allowed_hosts` are further names that requests may be for
    (serving/addresses.py). Raises UserError (2) for a base, an adapter or a setting that cannot be served, before the port answers;
    MachineError (3) for a missing package, a port that is taken, no memory.
    """
    limits = limits or Limits()
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise MachineError(f"serve needs {', '.join(missing)}; install with: pip install 'tunesmith[serve]'")
    from tunesmith.serving.catalog import Catalog, ServedModel, check_name
    from tunesmith.serving.engine import Engine
    from tunesmith.serving.process import bind, run
    from tunesmith.serving.server import Server
    from tunesmith.serving.templates import Templates

    check_host(host)
    key = key_of(api_key_env)
    called = name or name_of(target)
    for adapter in adapters:
        check_name(adapter, called)
    with bind(host, port) as listening:
        loaded = load_base(target, dtype, device, quantization, progress)
        forward = loaded.forward
        ends = frozenset(end_tokens(forward.base, loaded.tokenizer))
        notes: list[str] = []
        ready = threading.Event()

        def warn(note: str) -> None:
            notes.append(note)
            if ready.is_set():  # the engine may find only then that it can make no graphs
                progress(f"warning: {note}", 0, 1)

        engine = Engine(forward, limits.batch, limits.queue, warn=warn)
        templates = Templates(limits.template_seconds)
        reader = AdapterReader(loaded, templates, _quantization(quantization), ("--dtype", "--quantization"))
        catalog = Catalog(engine, ServedModel(called, loaded.tokenizer, loaded.chat, ends), reader.read, templates)
        engine.start()
        try:
            for adapter, path in adapters.items():
                progress(f"loading the adapter {adapter}", 0, 1)
                served = catalog.begin_with(adapter, path)
                # The engine's thread selects anew in every step, and sleeps until somebody asks.
                engine.bank.select([served.adapter])
                said = (reader.base_note(path), reader.note(path, served.chat, forward.base, progress))
                notes += [note for note in said if note]
            changes = key is not None or is_loopback(host)
            server = Server(catalog, limits, key, changes, named_hosts(host, key, allowed_hosts))
            shown = f"[{host}]" if ":" in host else host
            url = f"http://{shown}:{listening.getsockname()[1]}/v1"
            if not changes:
                notes.append(
                    f"{host} is reached from beyond this machine without an API key: adapters cannot change while it runs"
                )

            def tell() -> None:
                ready.set()
                on_ready({"url": url, "model": called, "adapters": list(adapters), "notes": list(notes)})

            run(server, listening, tell)
        finally:
            templates.close()
            engine.stop()


def load_base(
    target: str,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    progress: Progress = no_progress,
) -> LoadedModel:
    """The base, in 16 or 32 bits or quantized by bitsandbytes (`nf4`, `fp4`, `int8`). Raises ConfigError for an adapter."""
    run = run_of_base(target)
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
    model: Any = load_model(source, settings, hardware, computes, _quantization(quantization))
    model.eval()
    progress("loading the model", 1, 1)
    forward = ModelForward(model, hardware.device, computes)
    return LoadedModel(forward, tokenizer, chat, source, hardware, computes, False, run)


def _quantization(scheme: str | None) -> QuantizationConfig | None:
    """What `--quantization` stands for."""
    return None if scheme is None else QuantizationConfig.model_validate({"scheme": scheme})


def run_of_base(target: str) -> RunFolder | None:
    """The run whose model a base is: a full fine-tuning; None for any other model. Raises ConfigError for an adapter."""
    path = Path(target)
    run = RunFolder.open(path) if RunFolder.is_run(path) else None
    if (run and run.config.method != "full") or (run is None and (path / "adapter_config.json").is_file()):
        base = run.config.model.name if run else base_of_adapter(path)
        raise ConfigError(
            f"{target} is an adapter: serve its base with it, `tunesmith serve {base} --adapter NAME={target}`"
        )
    return run


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
    return Limits(**found)


def check_host(host: str) -> None:
    """Raise ConfigError for an empty address, which the system takes for every one that this machine has."""
    if not host.strip():
        raise ConfigError(
            "--host is empty, which would listen on every address; leave it out, or name one (0.0.0.0 is all)"
        )


def key_of(variable: str | None) -> str | None:
    """The API key in a variable of the environment. Raises ConfigError."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"--api-key-env {variable}: the environment has no such variable, or it is empty; set it, or leave the option out"
        )
    if key != key.strip():
        raise ConfigError(
            f"--api-key-env {variable}: the key begins or ends with white space (a line break?), which no client can send; remove it"
        )
    if odd := [place for place, letter in enumerate(key, 1) if not "!" <= letter <= "~"]:
        raise ConfigError(
            f"--api-key-env {variable}: character {odd[0]} of the key is white space, a control character or not ASCII, which a header "
            "cannot carry; choose a key of letters, digits and ASCII punctuation"
        )
    return key
