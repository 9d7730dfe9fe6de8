"""A model's config.json from the hub, when that is all there is to look at. Imports no PyTorch."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.models.catalogue import models_meant

TIMEOUT = 5
"""Seconds that the hub has to answer the first question. Its own library would try six times in 24 seconds."""


def fetch_config(name: str) -> Path:
    """The folder with a hub id's config.json: of the hub's cache, else fetched. Raises ModelError."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    file = "config.json"
    try:
        cached = isinstance(huggingface_hub.try_to_load_from_cache(name, file), str)
        if not cached and not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, file), timeout=TIMEOUT)  # no retries
        return Path(huggingface_hub.hf_hub_download(name, file)).parent
    except httpx.TransportError as error:
        reason = f"the hub cannot be reached: {error}; pass a model folder, or check the network"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
    raise ModelError(f"{name}: its {file} cannot be fetched from the hub ({reason}){models_meant(name)}")
