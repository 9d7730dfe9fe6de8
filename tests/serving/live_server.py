"""A server in a thread, on a free port, with the tiny base.

with LiveServer(tiny_model, adapters, Limits(queue=2)) as live:
    live.client().chat.completions.create(model="cs", ...)
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from tunesmith.models.generate import end_tokens
from tunesmith.serving.catalog import Catalog, ServedModel
from tunesmith.serving.engine import Engine
from tunesmith.serving.limits import Limits
from tunesmith.serving.process import bind, run
from tunesmith.serving.server import Server
from tunesmith.serving.templates import Templates
from tunesmith.workflows.serve import AdapterReader, load_base

QUESTION: list[Any] = [{"role": "user", "content": "Which bin takes the can?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


class LiveServer:
    """`key` is the API key, `never_ends` leaves out the base's end tokens: its answers go on to their limit."""

    def __init__(
        self,
        base: Path,
        adapters: dict[str, Path],
        limits: Limits | None = None,
        key: str | None = None,
        never_ends: bool = False,
        changes: bool = True,
        hosts: frozenset[str] | None = None,
        dtype: str = "fp32",
    ):
        loaded = load_base(str(base), dtype, "cpu")
        limits = limits or Limits(answer_tokens=1000)
        self.engine = Engine(loaded.forward, limits.batch, limits.queue)
        ends = frozenset() if never_ends else frozenset(end_tokens(loaded.forward.base, loaded.tokenizer))
        model = ServedModel("base", loaded.tokenizer, loaded.chat, ends)
        self.templates = Templates(limits.template_seconds)
        self.catalog = Catalog(self.engine, model, AdapterReader(loaded, self.templates).read, self.templates)
        self.engine.start()
        for name, path in adapters.items():
            self.catalog.begin_with(name, str(path))
        self.server = Server(self.catalog, limits, key, changes, hosts)
        self.socket = bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = key
        self._thread = threading.Thread(target=run, args=(self.server, self.socket), daemon=True)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        eventually(lambda: _answers(self.url))
        return self

    def __exit__(self, *_: object) -> None:
        self.server.draining = True  # nothing waits for what still runs
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.socket.close()
        self.templates.close()

    def client(self, **settings: Any) -> OpenAI:
        """The official client, which tries nothing twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, **settings)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        """A request of one's own making."""
        return httpx.post(self.url + path, timeout=30, **arguments)


def raw(live: LiveServer, data: bytes) -> socket.socket:
    """A connection on which so much was sent."""
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    connection.sendall(data)
    return connection


def chat_request(live: LiveServer, **values: Any) -> bytes:
    body = json.dumps({"model": "base", "messages": QUESTION, "temperature": 0, **values}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's form, and nothing else."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def eventually(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
