"""What comes back from the engine for one HTTP request, on the event loop: events in order, or that the client has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request

from tunesmith.serving.api_errors import ApiError, draining
from tunesmith.serving.catalog import ServedModel
from tunesmith.serving.engine import Engine, QueueFull, Stopped
from tunesmith.serving.generation import Event, Failed, Finished, Generation, Piece
from tunesmith.serving.metrics import Metrics


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Answers:
    """The answers to one request's prompts. `close` frees their places, whatever state they are in."""

    def __init__(self, engine: Engine, metrics: Metrics, model: ServedModel, holding: ExitStack):
        self.engine, self.metrics, self.model = engine, metrics, model
        self.generations: list[Generation] = []
        self._holding = holding
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._open = 0
        self._counted: set[int] = set()
        self._outcome = "refused"
        self._start = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    def ask(
        self, request: Request, make: Callable[[Callable[[Event], None]], Generation], prompts: list[list[int]]
    ) -> None:
        """Queue one generation a prompt. Raises ApiError 429 or 503."""
        loop = asyncio.get_running_loop()

        def tell(place: int) -> Callable[[Event], None]:
            def on_event(event: Event) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

            return on_event

        generations = [make(tell(place)) for place in range(len(prompts))]
        for generation, prompt in zip(generations, prompts, strict=True):
            generation.prompt = prompt
        try:
            self.engine.submit(generations)
        except QueueFull:
            raise ApiError(
                429,
                f"{self.engine.waiting} requests wait already, of {self.engine.max_queue} that may; ask again later",
                "queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except Stopped:
            raise draining() from None
        self.generations, self._outcome = generations, "disconnected"
        self._open = len(generations)
        self._watch = asyncio.create_task(self._until_gone(request))

    async def next(self) -> tuple[int, Piece | Finished]:
        """The next event, and the prompt's place. Raises ClientGone, and ApiError where the engine failed."""
        found = await self._events.get()
        if found is None:
            raise ClientGone
        place, event = found
        if isinstance(event, Failed):
            self._outcome = event.reason
            raise _as_error(event)
        if isinstance(event, Piece) and event.first:
            self.metrics.first_token.observe(time.monotonic() - self._start)
        if isinstance(event, Finished):
            self._open -= 1
            self._count(place, event.tokens)
            if not self._open:
                self._outcome = "answered"
        return place, event

    @property
    def over(self) -> bool:
        """Whether every answer is whole."""
        return self._open == 0

    def close(self) -> None:
        """Cancel what is not over, and let go of the model."""
        if self._watch is not None:
            self._watch.cancel()
        for generation in self.generations:
            self.engine.cancel(generation)
        for place, generation in enumerate(self.generations):
            if (
                place not in self._counted and generation.produced
            ):  # broke off: its prompt was read, and this was written
                self._count(place, generation.produced)
        self.metrics.requests.labels(self.model.name, self._outcome).inc()
        self.metrics.request.observe(time.monotonic() - self._start)
        self._holding.close()

    def _count(self, place: int, tokens: int) -> None:
        self._counted.add(place)
        self.metrics.tokens.labels(self.model.name, "prompt").inc(len(self.generations[place].prompt))
        self.metrics.tokens.labels(self.model.name, "completion").inc(tokens)

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)


def _as_error(failed: Failed) -> ApiError:
    if failed.reason == "timeout":
        return ApiError(504, failed.message, "timeout")
    if failed.reason == "memory":
        return ApiError(503, failed.message, "out_of_memory", headers={"Retry-After": "5"})
    if failed.reason == "error":
        return ApiError(500, failed.message, "model_error")
    return draining()


def usage_of(generations: list[Generation]) -> dict[str, Any]:
    """OpenAI's `usage`."""
    prompt = sum(len(generation.prompt) for generation in generations)
    completion = sum(generation.produced for generation in generations)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
