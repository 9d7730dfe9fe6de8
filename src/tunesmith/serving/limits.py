"""What one client, or all of them together, may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the server; what is over one is refused with an error that names it.

    Bytes of a request's body; tokens of a prompt (None: what the model was made for) and of an answer; requests that wait beside those
    in the batch; rows of the batch; seconds for an answer, waiting included, for a request to arrive, for a chat template to render one
    conversation, for a client to take what was written to it, and for running requests to end after SIGTERM; open requests of all
    clients.
    """

    body_bytes: int = 2 << 20
    prompt_tokens: int | None = None
    answer_tokens: int = 4096
    queue: int = 256
    batch: int = 32
    answer_seconds: float = 300.0
    arrival_seconds: float = 20.0
    template_seconds: float = 5.0
    reading_seconds: float = 30.0
    drain_seconds: float = 60.0
    connections: int = 1024
