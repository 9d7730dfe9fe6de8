"""`tunesmith merge`: adapters into their base, as one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tunesmith.cli.options import Device, DTypeName, Json, Model


def merge(
    targets: Annotated[
        list[str], typer.Argument(help="A run or a PEFT adapter folder; several become one.", metavar="RUN")
    ],
    out: Annotated[
        str | None, typer.Option("--out", help="Folder to write (default: RUN/merged).", metavar="DIR")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    onto: Annotated[
        str,
        typer.Option("--onto", help="16bit, or quantized: the weights a QLoRA run was trained over.", metavar="BASE"),
    ] = "16bit",
    method: Annotated[
        str | None,
        typer.Option("--method", help="Of several: linear, ties, dare_linear, dare_ties, svd.", metavar="NAME"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Of several, e.g. 0.7,0.3 (default: equal).", metavar="W,W")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="Share of values that TIES and DARE keep, e.g. 0.5.", metavar="SHARE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write base + adapter as one model, verified."""
    from pathlib import Path

    from tunesmith import api
    from tunesmith.cli.console import Console

    with Console() as console:
        result = api.merge(
            targets[0] if len(targets) == 1 else targets,
            Path(out) if out else None,
            model=model,
            dtype=dtype,
            device=device,
            onto=onto,
            method=method,
            weights=_numbers(weights),
            density=density,
            progress=console.progress,
        )
    if as_json:
        console.result(result)
        return
    print(
        f"{result['path']} ({result['dtype']}), read back and compared with base + adapter on {result['tokens']} tokens: "
        f"logits differ by {result['difference']:.3%} (the adapter moves them by {result['effect']:.1%}), "
        f"KL {result['kl']:.2e} ({result['lost']:.1%} of what training changed), top-1 agreement {result['top1']:.1%}"
    )
    if "kl_of_trained" in result:
        print(_of_trained(result))
    print(
        f"the folder was read {_how_read(result)}; tokenizer, chat template and generation config are those of training"
    )
    for note in result["notes"]:
        console.event({"event": "warning", "message": note})


def _how_read(result: Mapping[str, Any]) -> str:
    if not result["streamed"]:
        return "by transformers"
    return "tensor by tensor, and by transformers" if result["loaded_whole"] else "tensor by tensor"


def _of_trained(result: Mapping[str, Any]) -> str:
    """Which base the adapter went into, and how far either choice is from what was trained."""
    kl = result["kl_of_trained"]
    chosen = {"16bit": "the 16-bit weights", "quantized": "the dequantized weights"}[result["onto"]]
    return (
        f"merged onto {chosen}; from the quantized base with its adapter, as trained, KL is {kl['16bit']:.2e} onto 16 bits and "
        f"{kl['quantized']:.2e} onto the dequantized weights"
    )


def _numbers(text: str | None) -> list[float] | None:
    from tunesmith.errors import ConfigError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights is {text!r}: expected numbers with commas between them, e.g. 0.7,0.3") from None
