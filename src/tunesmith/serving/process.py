"""The server as a process: a socket, uvicorn, and what SIGTERM means.

The first SIGTERM (or Ctrl-C) ends nothing that has begun, if only its body has: new requests get 503, /health too, so that a balancer looks
elsewhere; when the last answer is whole, or after `drain_seconds`, the process ends with 0. The second one ends what runs with an error.
"""

from __future__ import annotations

import asyncio
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tunesmith.errors import MachineError
from tunesmith.serving.limits import Limits
from tunesmith.serving.server import Server, make_app

SPARE_CONNECTIONS = 64
"""Beyond `limits.connections`, to be told so in OpenAI's form, and for /health; uvicorn itself turns away what is over these."""

LAST_WRITES_SECONDS = 5
"""For what is still on its way to clients when the last answer is whole."""


def bind(host: str, port: int) -> socket.socket:
    """A socket of our own before anything is loaded; port 0 is any free one. Raises MachineError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise MachineError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another --port or --host"
        ) from None
    return found


def run(server: Server, listening: socket.socket) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then drain. The engine is stopped at the end."""
    limits = server.limits
    config = uvicorn.Config(
        make_app(server),
        http=_protocol(limits),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections + SPARE_CONNECTIONS,
        timeout_graceful_shutdown=LAST_WRITES_SECONDS,
        lifespan="off",
    )
    try:
        DrainingServer(config, server).run([listening])
    finally:
        server.engine.stop()


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which on a signal stops taking requests before it stops."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self.served = server
        self._drain_until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second time, end with errors; the third, without."""
        if not self.served.draining:
            self.served.draining = True
            self._drain_until = time.monotonic() + self.served.limits.drain_seconds
        elif self._drain_until > 0:
            self._drain_until = 0.0
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s: whether to end. Who still waits for an answer then gets an error."""
        if await super().on_tick(counter):
            return True
        if not self.served.draining or not (self.served.idle or time.monotonic() > self._drain_until):
            return False
        self.served.engine.close()
        return True


def _protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol for connections that have to send a whole request head in time, and to take what is written to them: it has no
    limits for that itself. What is not taken keeps a closed connection open, so that only `abort` ends it."""

    class Timed(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(
                high=0
            )  # pause_writing is told of the first byte that the kernel does not take
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(limits.reading_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            if self._unread is not None:
                self._unread.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(limits.arrival_seconds, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Timed
