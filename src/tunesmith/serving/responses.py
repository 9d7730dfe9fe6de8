"""An answer as an HTTP response: whole, or as server-sent events while it is made."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tunesmith.serving.answers import Answers, ClientGone, usage_of
from tunesmith.serving.api_errors import ApiError
from tunesmith.serving.generation import Finished, Piece
from tunesmith.serving.shapes import Shape


async def whole(answers: Answers, shape: Shape) -> Response:
    """Wait for all of it."""
    texts, reasons = [""] * len(answers.generations), [""] * len(answers.generations)
    try:
        while not answers.over:
            place, event = await answers.next()
            if isinstance(event, Piece):
                texts[place] += event.text
            else:
                reasons[place] = event.reason
    except ClientGone:
        return Response(status_code=499)
    return JSONResponse(shape.whole(texts, reasons, usage_of(answers.generations)))


class EventStream(Response):
    """Server-sent events, one a chunk, and `[DONE]`. Frees the places when it is over, or when the client has gone."""

    def __init__(self, answers: Answers, shape: Shape, first: tuple[int, Piece | Finished], seconds: float):
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self.answers, self.shape, self.first, self.seconds = answers, shape, first, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, as ASGI wants it."""
        try:
            async with asyncio.timeout(self.seconds):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._events(send)
        except (ClientGone, TimeoutError, OSError):
            return
        finally:
            self.answers.close()

    async def _events(self, send: Send) -> None:
        async def tell(value: dict[str, Any] | str | None) -> None:
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        opened: set[int] = set()
        place, event = self.first
        while True:
            if place not in opened:
                opened.add(place)
                await tell(self.shape.opening(place))
            if isinstance(event, Finished):
                await tell(self.shape.end(place, event.reason))
            elif event.text:
                await tell(self.shape.piece(place, event.text))
            if self.answers.over:
                break
            try:
                place, event = await self.answers.next()
            except ApiError as error:
                await tell(error.body)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
        if self.shape.include_usage:
            await tell(self.shape.usage(usage_of(self.answers.generations)))
        await tell("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
