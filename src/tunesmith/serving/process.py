"""The server as a process: a socket, uvicorn, and what SIGTERM means.

The first SIGTERM (or Ctrl-C) ends nothing that has begun, if only its body has: new requests get 503, /health too, so that a balancer looks
elsewhere; when the last answer is whole, or after `drain_seconds`, the process ends with 0. The second one ends what runs with an error.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tunesmith.errors import MachineError
from tunesmith.serving.api_errors import ApiError
from tunesmith.serving.limits import Limits
from tunesmith.serving.server import Server, make_app

SPARE_CONNECTIONS = 64
"""Beyond `limits.connections`, which are open requests, to be told so in OpenAI's form, and for /health. Of more, those go that ask for nothing."""

OTHER_FILES = 256
"""That a server may have open beside its connections: the model's, its libraries', the templates' pipes."""

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


def run(server: Server, listening: socket.socket, on_ready: Callable[[], None] = lambda: None) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then drain. The engine is stopped at the end.

    `on_ready` is called on a thread of its own when the port answers and signals are handled.
    """
    limits = server.limits
    config = uvicorn.Config(
        make_app(server),
        http=_protocol(server, _most_connections(limits)),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_WRITES_SECONDS,
        lifespan="off",
    )
    try:
        DrainingServer(config, server, on_ready).run([listening])
    finally:
        server.engine.stop()


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which on a signal stops taking requests before it stops."""

    def __init__(self, config: uvicorn.Config, server: Server, on_ready: Callable[[], None] = lambda: None):
        super().__init__(config)
        self.served, self.on_ready = server, on_ready
        self._drain_until = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        await asyncio.to_thread(self.on_ready)  # whoever is told may ask at once

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
        self.served.end()
        return True


def _most_connections(limits: Limits) -> int:
    """How many connections may be open. The process's limit on open files is raised to them, as far as it may be."""
    wanted = limits.connections + SPARE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + OTHER_FILES:
        raised = wanted + OTHER_FILES if hard == resource.RLIM_INFINITY else min(wanted + OTHER_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        wanted = min(wanted, max(raised - OTHER_FILES, raised // 2))
    return wanted


def _protocol(server: Server, most: int) -> type[H11Protocol]:
    """uvicorn's protocol for connections that have to send a whole request head in time, and to take what is written to them: it has no
    limits for that itself. What is not taken keeps a closed connection open, so that only `abort` ends it.

    Of more than `most` connections the one that has asked for nothing the longest goes, or the new one where all wait for answers: uvicorn's
    own limit counts connections as if they were requests, so that idle ones would lock everybody out. What is no HTTP gets its error in
    OpenAI's form.
    """
    limits = server.limits
    idle: dict[H11Protocol, None] = {}  # in the order in which they became so

    class Timed(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(
                high=0
            )  # pause_writing is told of the first byte that the kernel does not take
            self._watch()
            if len(self.connections) > most:
                del idle[self]
                oldest = next(iter(idle), self)
                idle[self] = None
                oldest.transport.abort()
                idle.pop(oldest)

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

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._note_idle()

        def send_400_response(self, msg: str) -> None:
            if self.cycle is not None:  # its body went wrong: nobody waits for its answer
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.abort()
                return
            error = ApiError(400, "what was sent is not a valid HTTP request", "invalid_http")
            server.metrics.errors.labels("400", "invalid_http").inc()
            body = json.dumps(error.body).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            idle.pop(self, None)
            self._stop_timer()
            if self._unread is not None:
                self._unread.cancel()
            super().connection_lost(exc)

        def _note_idle(self) -> bool:
            if self.cycle is not None and not self.cycle.response_complete:
                idle.pop(self, None)
                return False
            idle.setdefault(self)
            return True

        def _watch(self) -> None:
            if not self._note_idle():
                self._stop_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(limits.arrival_seconds, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Timed
