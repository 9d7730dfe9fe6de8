"""`tunesmith export`: write GGUF files, verified in llama.cpp, and print size, KL and speed by type."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.options import Device, Json, Model, Target


def export(
    target: Target,
    to: Annotated[str, typer.Option("--to", help="gguf:q8_0; several: gguf:q8_0,q4_k_m.", metavar="FORMAT:TYPE")],
    out: Annotated[
        str | None, typer.Option("--out", help="File, or folder for several (default: RUN/gguf).", metavar="FILE")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="The adapter alone, as a LoRA GGUF.")] = False,
    model: Model = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write GGUF files for llama.cpp and Ollama, verified."""
    from rich.table import Table

    from tunesmith.cli.console import Console
    from tunesmith.workflows.export import export as run_export

    with Console() as console:
        result = run_export(target, to, out, lora=lora, model=model, device=device, progress=console.progress)
    if as_json:
        console.result(result)
        return
    rows = result["files"]
    table = Table(title=f"compared with the source in llama.cpp, on {rows[0]['tokens']} tokens")
    for heading in ("type", "size", "KL", "allowed", "top-1", "tokens/s (CPU)"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for row in rows:
        size, speed = f"{row['bytes'] / 2**20:.1f} MB", f"{row['tokens_per_second']:.1f}"
        table.add_row(row["type"], size, f"{row['kl']:.2e}", f"{row['max_kl']:g}", f"{row['top1']:.1%}", speed)
    console.table(table)
    for row in rows:
        print(row["path"])
        if row["modelfile"]:
            print(f"  ollama create NAME -f {row['modelfile']}")
    if not lora and result["ollama_template"] is None:
        print("note: the Modelfile has no TEMPLATE: no known format renders what the model's chat template does")
    for note in result["notes"]:
        print(f"note: {note}")
