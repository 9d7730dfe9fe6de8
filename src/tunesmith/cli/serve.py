"""`tunesmith serve`: an OpenAI-compatible server."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from tunesmith.cli.options import Device, DTypeName


def serve(
    model: Annotated[str, typer.Argument(help="The base: folder, .gguf file or hub id.", metavar="MODEL")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="A run or PEFT folder (repeat).", metavar="NAME=PATH")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the base.", metavar="NAME")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.", metavar="IP")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any free one.", min=0, max=65535, metavar="N")] = 8000,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="nf4, fp4 or int8.", metavar="NAME")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", help="Variable with the API key.", metavar="NAME")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option("--allowed-host", help="A name that requests may use.", metavar="HOST")
    ] = None,
    max_batch: Annotated[int | None, typer.Option("--max-batch", help="Requests at once.", min=1, metavar="N")] = None,
    limit: Annotated[
        list[str] | None, typer.Option("--limit", help="Other limits (docs/serving.md).", metavar="NAME=N")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="tunesmith or vllm.", metavar="NAME")] = "tunesmith",
    as_json: Annotated[bool, typer.Option("--json", help="When ready, one JSON object on stdout.")] = False,
) -> None:
    """Serve a base and adapters over OpenAI's API."""
    from tunesmith.cli.console import Console
    from tunesmith.errors import ConfigError
    from tunesmith.workflows import serve as workflow
    from tunesmith.workflows.serve_vllm import serve_with_vllm

    adapters = workflow.named_adapters(adapter or [])
    console = Console()
    if engine == "vllm":
        if quantization is not None:
            raise ConfigError("--engine vllm: vLLM 0.33 has no bitsandbytes; leave --quantization out, or the engine")
        ignored = {"--device": device != "auto", "--limit": limit, "--allowed-host": allowed_host, "--json": as_json}
        if given := [option for option, value in ignored.items() if value]:
            raise ConfigError(f"--engine vllm: {', '.join(given)} would be ignored; leave it out")
        serve_with_vllm(
            model,
            adapters,
            name=name,
            host=host,
            port=port,
            dtype=dtype,
            max_batch=max_batch,
            api_key_env=api_key_env,
            on_command=console.announce,
            on_note=lambda note: console.announce(f"warning: {note}"),
        )
        return
    if engine != "tunesmith":
        raise ConfigError(f"--engine {engine}: expected tunesmith or vllm")

    def ready(facts: dict[str, Any]) -> None:
        for note in facts["notes"]:
            console.announce(f"warning: {note}")
        if as_json:
            console.result(facts)
        else:
            names = "".join(f", {name}" for name in facts["adapters"])
            print(f"serving {facts['model']}{names} at {facts['url']}")
        sys.stdout.flush()

    with console:
        workflow.serve(
            model,
            adapters,
            name=name,
            host=host,
            port=port,
            device=device,
            dtype=dtype,
            quantization=quantization,
            api_key_env=api_key_env,
            allowed_hosts=allowed_host or [],
            limits=workflow.limits_from(limit or [], max_batch),
            progress=console.progress,
            on_ready=ready,
        )
