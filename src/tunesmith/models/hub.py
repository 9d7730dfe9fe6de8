"""The hub: whether it can be reached, and a model's config.json where that is all there is to look at. Imports no PyTorch."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.models.catalogue import models_meant

TIMEOUT = 5
"""Seconds that the hub has to answer the first question. Its own library would warn and try six times in 24 seconds for a
file, and wait without end for a list of files."""


def why_unreachable() -> str | None:
    """Why the hub does not answer one question, asked once; None where it answers, whatever it says."""
    import httpx
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT, follow_redirects=False)
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        return str(error)
    return None


def fetch_config(name: str) -> Path:
    """The folder with a hub id's config.json: of the hub's cache, else fetched. Raises ModelError."""
    import httpx
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    file = "config.json"
    try:
        cached = isinstance(huggingface_hub.try_to_load_from_cache(name, file), str)
        why = None if cached or constants.HF_HUB_OFFLINE else why_unreachable()
        if why is None:
            return Path(huggingface_hub.hf_hub_download(name, file)).parent
        reason = f"the hub cannot be reached: {why}; pass a model folder, or check the network"
    except (httpx.TransportError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
    raise ModelError(f"{name}: its {file} cannot be fetched from the hub ({reason}){models_meant(name)}")
