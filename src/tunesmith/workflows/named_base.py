"""A lone adapter without a record: is the base that it is loaded over the one that its configuration names?

PEFT saves the base's name and nothing of its weights. Where that base is on this disk, in a folder or in the hub's cache, the weights
are compared as a record's would be; nothing is fetched for it. Where it is not, that is said. A base that is stored quantized has other
files than the one it was made of, over which its adapters are meant to be used too: that is said, not refused.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.config import ModelConfig
from tunesmith.errors import ModelError
from tunesmith.models.load import HUB_ID, ModelSource, find_model, weight_hash
from tunesmith.registry.records import CONFIG, read_json


def named_base_difference(adapter: Path, source: ModelSource) -> str | None:
    """What is other about a base than about the one that the adapter's configuration names, None where nothing is or nobody knows."""
    named = _named(adapter)
    base = None if named is None or _is_named(named, source) else _local(named, adapter)
    if base is None or _is_quantized(base) != _is_quantized(source):
        return None
    now, trained = weight_hash(source), weight_hash(base)
    if now == trained:
        return None
    return f"{source.name}: its weights (sha256 {now[:12]}) are not those of {named} ({trained[:12]}), which {adapter / CONFIG} names as its base"


def named_base_note(adapter: Path, source: ModelSource) -> str | None:
    """What to say where nothing shows whether the base is the adapter's; None where it is the named one, or was compared with it."""
    named = _named(adapter)
    if named is None:
        return f"{adapter}: nothing says which base it was trained on, so that nobody knows whether {source.name} is the right one"
    if _is_named(named, source):
        return None
    if (base := _local(named, adapter)) is not None:
        if _is_quantized(base) == _is_quantized(source):
            return None
        how = "quantized" if _is_quantized(base) else "not quantized"
        return f"{adapter}: it was trained on {named[:200]}, which is stored {how}: whether {source.name} has the same weights was not checked"
    return (
        f"{adapter}: it was trained on {named[:200]}, which is not on this machine, and nothing was recorded of its weights: whether "
        f"{source.name} has the same ones was not checked"
    )


def _named(adapter: Path) -> str | None:
    name = (read_json(adapter / CONFIG) or {}).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _is_named(named: str, source: ModelSource) -> bool:
    """Whether a base is the very one that is named: the same place, or the same name on the hub."""
    return named == source.name or _folder(named) == source.path.resolve()


def _is_quantized(source: ModelSource) -> bool:
    return (read_json(source.path / "config.json") or {}).get("quantization_config") is not None


def _folder(named: str) -> Path | None:
    """What is at that place on this disk; None where nothing is."""
    try:
        folder = Path(named).expanduser().resolve()
        return folder if folder.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null character
        return None


def _local(named: str, adapter: Path) -> ModelSource | None:
    """The base that is named, if this disk has all of its weights."""
    folder = _folder(named)
    if folder is None or not folder.is_dir():
        folder = _cached(named, adapter) if HUB_ID.fullmatch(named) else None
    if folder is None:
        return None
    try:
        return find_model(ModelConfig(name=str(folder)))
    except ModelError:  # half of it was fetched, or it is no model
        return None


def _cached(name: str, adapter: Path) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    revision = (read_json(adapter / CONFIG) or {}).get("revision")
    try:
        return Path(
            snapshot_download(name, revision=revision if isinstance(revision, str) else None, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
