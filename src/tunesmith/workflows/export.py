"""Export a run, an adapter or a model in another format, verified before anything is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.export_gguf import export_gguf


def export(
    target: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    lora: bool = False,
    model: str | Path | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `target` (a run, a PEFT adapter, a model) as `to`: `gguf:q8_0`, or several types, `gguf:q8_0,q4_k_m` (see export_gguf)."""
    kind, _, types = to.partition(":")
    if kind != "gguf" or not types:
        raise ConfigError(f"--to {to}: expected gguf:TYPE, e.g. gguf:q8_0, or several types, gguf:q8_0,q4_k_m")
    return export_gguf(target, types, out, lora=lora, model=model, device=device, progress=progress)
