"""Options that several commands share, each with one help text."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
Model = Annotated[str | None, typer.Option("--model", help="Base model: folder, .gguf file or hub id.", metavar="NAME")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any other setting.", metavar="SECTION.KEY=VALUE")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", metavar="NAME")]
DTypeName = Annotated[str, typer.Option("--dtype", help="auto, bf16, fp16, fp32.", metavar="TYPE")]
Target = Annotated[str, typer.Argument(help="A run, an adapter folder, or a model.", metavar="RUN|MODEL")]
