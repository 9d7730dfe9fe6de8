"""Export a run, an adapter or a model in another format, verified before anything is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.export_gguf import export_gguf
from tunesmith.workflows.export_quantized import export_quantized


def export(
    target: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    lora: bool = False,
    model: str | Path | None = None,
    device: str = "auto",
    data: str | Path | None = None,
    calibration_rows: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write `target` (a run, a PEFT adapter, a model) as `to`: `gguf:q8_0`, or several types, `gguf:q8_0,q4_k_m` (see export_gguf); `gptq`,
    `awq`, or both, `gptq,awq` (see export_quantized, which alone takes `data` and `calibration_rows`).
    """
    kind, _, types = to.partition(":")
    if kind == "gguf" and types:
        given = [("--data", data), ("--calibration-rows", calibration_rows)]
        if useless := [name for name, value in given if value is not None]:
            raise ConfigError(f"{' and '.join(useless)}: only gptq and awq are calibrated; leave it out with --to {to}")
        return export_gguf(target, types, out, lora=lora, model=model, device=device, progress=progress)
    if types or kind.split(",")[0] not in ("gptq", "awq"):
        raise ConfigError(
            f"--to {to}: expected gguf:TYPE, e.g. gguf:q8_0, or several types, gguf:q8_0,q4_k_m; or gptq, awq, or gptq,awq"
        )
    if lora:
        raise ConfigError(f"--lora: --to {to} quantizes whole models, into which the adapter is merged; leave it out")
    return export_quantized(
        target, to, out, data=data, calibration_rows=calibration_rows, model=model, device=device, progress=progress
    )
