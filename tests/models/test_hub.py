"""What a model's config.json from the hub costs where there is no hub: one question, one line."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub
import pytest

from tunesmith.errors import ModelError
from tunesmith.models.hub import fetch_config


def test_a_hub_that_cannot_be_reached_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda name, file: f"http://127.0.0.1:9/{name}/{file}")
    started = time.monotonic()
    with pytest.raises(ModelError) as found:
        fetch_config("someone/mistral-7b")
    assert time.monotonic() - started < 5
    assert str(found.value).startswith(
        "someone/mistral-7b: its config.json cannot be fetched from the hub (the hub cannot be reached: "
    )
    assert "; pass a model folder, or check the network); several known models have such names" in str(found.value)
    assert "\n" not in str(found.value)
    assert "Retrying" not in capfd.readouterr().err


def test_without_a_network_wanted_nothing_is_asked() -> None:
    with pytest.raises(ModelError, match=r"^someone/zzz: its config\.json cannot be fetched from the hub \("):
        fetch_config("someone/zzz")  # conftest.py sets HF_HUB_OFFLINE
