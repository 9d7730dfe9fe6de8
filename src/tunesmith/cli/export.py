"""`tunesmith export`: write GGUF files or 4-bit models, verified, and print size, KL and speed by type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tunesmith.cli.options import Device, Json, Model, Target


def export(
    target: Target,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="gguf:q8_0; several: gguf:q8_0,q4_k_m. gptq; awq; gptq,awq.", metavar="FORMAT[:TYPE]"
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", help="File, or folder (default: RUN/gguf, RUN/gptq, RUN/awq).", metavar="PATH"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="gptq, awq: rows to calibrate on (default: the run's training data).", metavar="FILE"
        ),
    ] = None,
    calibration_rows: Annotated[
        int | None,
        typer.Option("--calibration-rows", help="gptq, awq: how many of them (default: 256).", metavar="N"),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="The adapter alone, as a LoRA GGUF.")] = False,
    model: Model = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write GGUF files for llama.cpp and Ollama, or 4-bit models for transformers and vLLM, verified."""
    from tunesmith.cli.console import Console
    from tunesmith.workflows.export import export as run_export

    with Console() as console:
        result = run_export(
            target,
            to,
            out,
            lora=lora,
            model=model,
            device=device,
            data=data,
            calibration_rows=calibration_rows,
            progress=console.progress,
        )
    if as_json:
        console.result(result)
        return
    _table(console, result)
    for row in result["files"]:
        print(row["path"])
        if row.get("modelfile"):
            print(f"  ollama create NAME -f {row['modelfile']}")
    if "calibration" in result:
        _calibrated(result)
    elif not lora and result["ollama_template"] is None:
        print("note: the Modelfile has no TEMPLATE: no known format renders what the model's chat template does")
    for note in result["notes"]:
        print(f"note: {note}")


def _table(console: Any, result: Mapping[str, Any]) -> None:
    from rich.table import Table

    rows = result["files"]
    by_loss = "source_perplexity" in result
    where = f"in transformers, in {result['dtype']}" if by_loss else "in llama.cpp"
    table = Table(title=f"compared with the source {where}, on {rows[0]['tokens']} tokens")
    speed = f"tokens/s ({'CPU' if result.get('device', 'cpu') == 'cpu' else 'GPU'})"
    for heading in ("type", "size", "KL", "allowed", "top-1", *(["perplexity", "allowed"] if by_loss else []), speed):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    if by_loss:
        size, perplexity = f"{result['source_bytes'] / 2**20:.1f} MB", f"{result['source_perplexity']:.3f}"
        table.add_row(result["dtype"], size, "", "", "", perplexity, "", f"{result['source_tokens_per_second']:.1f}")
    for row in rows:
        loss = [f"{row['perplexity']:.3f}", f"{row['max_perplexity']:.3f}"] if by_loss else []
        size, pace = f"{row['bytes'] / 2**20:.1f} MB", f"{row['tokens_per_second']:.1f}"
        table.add_row(row["type"], size, f"{row['kl']:.2e}", f"{row['max_kl']:.2g}", f"{row['top1']:.1%}", *loss, pace)
    console.table(table)


def _calibrated(result: Mapping[str, Any]) -> None:
    used, measured = result["calibration"], result["measured"]
    print(f"calibrated on {used['rows']} rows ({used['tokens']} tokens) of {used['from']}")
    print(f"measured on {measured['rows']} other rows ({measured['tokens']} tokens): {measured['from']}")
    size = result["files"][0]["group_size"]
    names = ", ".join(result["unquantized"][:4]) + (", ..." if len(result["unquantized"]) > 4 else "")
    print(f"4 bits in groups of {size}; in {result['dtype']} stay norms, biases and {names}")
