"""SIGTERM ends nothing that was accepted before it, wherever that is: its body on the way, its prompt before the tokenizer, in the batch."""

from __future__ import annotations

import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import QUESTION, LiveServer, chat_request, error_of, eventually, raw

from tunesmith.serving import process
from tunesmith.serving.limits import Limits
from tunesmith.serving.templates import process_of

ASKED = {"/v1/completions": {"prompt": "abc"}, "/v1/chat/completions": {"messages": QUESTION}}


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch) -> list[process.DrainingServer]:
    """The servers that come to run: `handle_exit` is what a signal calls."""
    found: list[process.DrainingServer] = []

    class Kept(process.DrainingServer):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            found.append(self)
            self.ticks = 0

        async def on_tick(self, counter: int) -> bool:
            self.ticks += 1
            return await super().on_tick(counter)

    monkeypatch.setattr(process, "DrainingServer", Kept)
    return found


@pytest.mark.parametrize("path", ASKED)
def test_a_request_whose_prompt_is_not_read_yet_is_answered(
    path: str, tiny_model: Path, draining: list[process.DrainingServer]
) -> None:
    with LiveServer(tiny_model, {}, Limits(answer_tokens=100, drain_seconds=600)) as live:
        gate = threading.Event()
        line = live.server._texts if path == "/v1/completions" else process_of(live.catalog.base.chat).line
        line.thread.submit(gate.wait, 60)  # another's text
        with ThreadPoolExecutor(1) as pool:
            body = {"model": "base", "max_tokens": 3, "temperature": 0, **ASKED[path]}
            asking = pool.submit(live.post, path, json=body)
            eventually(lambda: line.waiting == 1)
            assert live.engine.idle
            draining[0].handle_exit(signal.SIGTERM, None)
            eventually(lambda: httpx.get(live.url + "/health").json() == {"status": "draining"})
            late = live.post(path, json=body)
            assert (late.status_code, error_of(late)["code"]) == (503, "draining")
            after_ticks(draining[0])
            assert live.engine.healthy
            gate.set()
            assert asking.result(60).status_code == 200
            assert asking.result().json()["usage"]["completion_tokens"] in (1, 2, 3)
        live._thread.join(60)
        assert not live._thread.is_alive()


def test_a_request_whose_body_arrives_is_answered(tiny_model: Path, draining: list[process.DrainingServer]) -> None:
    with LiveServer(tiny_model, {}, Limits(answer_tokens=100, drain_seconds=600, arrival_seconds=300)) as live:
        request = chat_request(live, max_tokens=3)
        with raw(live, request[:-5]) as connection:
            connection.settimeout(60)
            eventually(lambda: not live.server.idle)
            draining[0].handle_exit(signal.SIGTERM, None)
            after_ticks(draining[0])
            connection.sendall(request[-5:])
            assert b" 200 " in _all_of(connection).splitlines()[0]


def test_what_is_not_read_when_the_time_is_up_is_told_so(
    tiny_model: Path, draining: list[process.DrainingServer]
) -> None:
    with LiveServer(tiny_model, {}, Limits(answer_tokens=100, drain_seconds=0.2)) as live:
        gate = threading.Event()
        live.server._texts.thread.submit(gate.wait, 60)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(live.post, "/v1/completions", json={"model": "base", "prompt": "abc"})
            eventually(lambda: live.server._texts.waiting == 1)
            draining[0].handle_exit(signal.SIGTERM, None)
            eventually(lambda: not live.engine.healthy)
            gate.set()
            response = asking.result(60)
        assert (response.status_code, error_of(response)["code"]) == (503, "draining")


def after_ticks(server: Any) -> None:
    """Wait for several looks at whether there is anything left, each of which might end the server."""
    before = server.ticks
    eventually(lambda: server.ticks > before + 4)


def _all_of(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(4096):
        found += part
    return found
