"""Merge a run's adapter, or any PEFT adapter, into its 16-bit base, verified by reading it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, VerificationError
from tunesmith.export.safetensors import merge_adapter
from tunesmith.runs import RunFolder
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.load import load, load_plain


def merge(
    target: str | Path,
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write base + adapter as one model folder and prove that it computes the same.

    `out` defaults to RUN/merged (or ADAPTER-merged). The base is loaded in `dtype` (the run's compute type by default),
    never quantized. Returns `{path, dtype, difference, effect, kl, top1, tokens}`. Raises VerificationError on a mismatch.
    """
    path = Path(target)
    is_run = RunFolder.is_run(path)
    if is_run and RunFolder.open(path).config.method == "full":
        raise ModelError(f"{target}: a full fine-tuning has no adapter to merge; its model is {path / 'model'}")
    folder = Path(out) if out else (path / "merged" if is_run else path.with_name(f"{path.name}-merged"))
    RunFolder.refuse_existing(folder)
    loaded = load(target, model, dtype, device, quantized=False, progress=progress)
    if not loaded.adapted:
        raise ModelError(f"{target}: there is no adapter to merge; pass a run or a PEFT adapter folder")

    def read_back(written: Path) -> Any:
        try:
            return load_plain(written, loaded.dtype, loaded.hardware)
        except ModelError as error:
            raise VerificationError(f"the merged model does not load back: {error}; nothing was kept") from error

    progress("merging", 0, 1)
    check = merge_adapter(
        loaded.forward.model,
        loaded.tokenizer,
        loaded.chat,
        folder,
        loaded.dtype,
        read_back,
    )
    progress("merging", 1, 1)
    return {
        "path": str(folder),
        "dtype": loaded.dtype,
        "difference": check.difference,
        "effect": check.effect,
        "kl": check.kl,
        "top1": check.top1,
        "tokens": check.tokens,
    }
