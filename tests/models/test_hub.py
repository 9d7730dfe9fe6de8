"""What a model's config.json from the hub costs where there is no hub: one question, one line."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from tunesmith.errors import ModelError
from tunesmith.models import hub
from tunesmith.models.hub import fetch_config, why_unreachable


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network is wanted, and nothing is there: no service listens on the discard port."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("online")
def test_a_hub_that_cannot_be_reached_is_asked_once(capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError) as found:
        fetch_config("someone/mistral-7b")
    assert time.monotonic() - started < 10, "retries would take 24"
    assert str(found.value).startswith(
        "someone/mistral-7b: its config.json cannot be fetched from the hub (the hub cannot be reached: "
    )
    assert "; pass a model folder, or check the network); several known models have such names" in str(found.value)
    assert "\n" not in str(found.value)
    assert capfd.readouterr().err == ""


def test_without_a_network_wanted_nothing_is_asked() -> None:
    with pytest.raises(ModelError, match=r"^someone/zzz: its config\.json cannot be fetched from the hub \("):
        fetch_config("someone/zzz")  # conftest.py sets HF_HUB_OFFLINE


# -- whether the hub answers ------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """A hub that has no such page."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.usefixtures("online")
def test_any_answer_is_an_answer(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "refused" in (why_unreachable() or "")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert why_unreachable() is None


@pytest.mark.usefixtures("online")
def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert why_unreachable() == "timed out"
        assert time.monotonic() - started < 10, "retries would take 24"


def test_a_hub_that_is_not_wanted_is_not_asked() -> None:
    assert "offline mode is enabled" in (why_unreachable() or "")
