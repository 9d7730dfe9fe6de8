"""What one client, or all of them together, may ask of the server."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from tunesmith.errors import ConfigError

MOST_SECONDS = 365 * 24 * 3600.0
"""A year: what timers take everywhere."""


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

    def __post_init__(self) -> None:
        """Raise ConfigError for a limit that is none."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "prompt_tokens":
                continue
            seconds = field.name.endswith("_seconds")
            if not math.isfinite(value) or not 0 < value <= (MOST_SECONDS if seconds else math.inf):
                allowed = f"more than 0 and at most {MOST_SECONDS:,.0f} (a year)" if seconds else "1 or more"
                raise ConfigError(f"the limit {field.name} is {value}: expected {allowed}")
