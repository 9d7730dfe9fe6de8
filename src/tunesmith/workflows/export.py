"""Export a run, an adapter or a model in another format, verified before anything is kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.export_gguf import export_gguf
from tunesmith.workflows.export_quantized import export_quantized

CHECKED = (
    r"\w+ changes the base weights of the model",  # the merge is compared with what base and adapter compute; a LoRA GGUF is refused
    r"Model (has|with) `tie_word_embeddings=True` and",  # the merge writes head and embeddings apart
)
"""How PEFT's warnings begin that are about what an export compares or refuses in any case."""


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
        with _without_checked_warnings():
            return export_gguf(target, types, out, lora=lora, model=model, device=device, progress=progress)
    if types or kind.split(",")[0] not in ("gptq", "awq"):
        raise ConfigError(
            f"--to {to}: expected gguf:TYPE, e.g. gguf:q8_0, or several types, gguf:q8_0,q4_k_m; or gptq, awq, or gptq,awq"
        )
    if lora:
        raise ConfigError(f"--lora: --to {to} quantizes whole models, into which the adapter is merged; leave it out")
    with _without_checked_warnings():
        return export_quantized(
            target, to, out, data=data, calibration_rows=calibration_rows, model=model, device=device, progress=progress
        )


@contextmanager
def _without_checked_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in CHECKED:
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield
