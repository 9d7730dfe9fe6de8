"""The HTTP interface: OpenAI's chat and text completions over the engine, adapters that come and go, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.errors import DataError, MachineError, TunesmithError
from tunesmith.serving.answers import Answers, ClientGone, usage_of
from tunesmith.serving.api_errors import ApiError, draining
from tunesmith.serving.catalog import Catalog, ServedModel
from tunesmith.serving.engine import Engine
from tunesmith.serving.generation import Finished, Generation, Piece
from tunesmith.serving.limits import Limits
from tunesmith.serving.metrics import CONTENT_TYPE, Metrics
from tunesmith.serving.openai_requests import AdapterRequest, ChatRequest, CompletionRequest, checked
from tunesmith.serving.shapes import Shape

WRITE_SECONDS = 30.0
"""What a client that reads slowly has beyond the time of its answer, which does not wait for it."""

DISCARDED = 8
"""A body that is too large is read and thrown away up to so many times the limit: else its sender would not see the answer."""


class Server:
    """The state behind the app. `changes` says whether adapters may come and go through the API."""

    def __init__(self, catalog: Catalog, limits: Limits, api_key: str | None = None, changes: bool = True):
        self.catalog, self.limits, self.changes = catalog, limits, changes
        self.engine: Engine = catalog.engine
        self.metrics = Metrics(catalog)
        self.draining = False
        self.open = 0
        self._key = api_key.encode() if api_key else None
        # Templates and tokenizers are not made for several threads at once; the event loop must not wait for long prompts.
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="tunesmith-prompts")

    @property
    def idle(self) -> bool:
        """Whether no request is in the engine."""
        return self.engine.idle

    # -- what a request has to pass -----------------------------------------------------------------------------------

    def authorize(self, request: Request) -> None:
        """Raise ApiError 503 where more requests are open than may be, and 401 without the key, where there is one."""
        if self.open > self.limits.connections:
            said = f"{self.limits.connections:,} requests are open already, the most that this server holds; ask again later"
            raise ApiError(503, said, "too_many_connections", headers={"Retry-After": "1"})
        if self._key is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")  # which is how its bytes were read
        if not hmac.compare_digest(given, b"Bearer " + self._key):
            said = "Incorrect API key: expected the header `Authorization: Bearer KEY` with this server's key"
            raise ApiError(401, said, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def body_of(self, request: Request) -> Any:
        """The JSON of a request, within the limits on its size and its time."""
        if self.draining or not self.engine.healthy:
            raise draining()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page in a browser cannot send it to another host unasked
            raise ApiError(415, f"content-type is {kind[:100]!r}: expected application/json", "unsupported_media_type")
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.arrival_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= self.limits.body_bytes:
                        body += part
                    elif size > DISCARDED * self.limits.body_bytes:
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.limits.arrival_seconds:g} s", "timeout"
            ) from None
        if size > self.limits.body_bytes:
            raise ApiError(
                413, f"the body is over {self.limits.body_bytes:,} bytes, the most that is read", "body_too_large"
            )
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
            raise ApiError(400, f"the body is not valid JSON: {said}", "invalid_json") from None

    def _length(self, prompt: list[int], asked: int | None, default: int | None) -> int:
        """How long an answer may be. Raises ApiError 400 for prompts and answers beyond the limits."""
        limit, context = self.limits.answer_tokens, self._context
        if not prompt:
            raise ApiError(400, "the prompt has no tokens", "invalid_value", "prompt")
        most = self.limits.prompt_tokens
        if most is not None and len(prompt) > most:
            said = f"the prompt has {len(prompt):,} tokens, and this server takes at most {most:,}"
            raise ApiError(400, said, "context_length_exceeded", "messages")
        if asked is not None and asked > limit:
            said = f"max_tokens is {asked:,}: this server writes at most {limit:,}"
            raise ApiError(400, said, "invalid_value", "max_tokens")
        wanted = asked if asked is not None else default
        if context is None:
            return wanted or limit
        left = context - len(prompt)
        if left < (wanted or 1):
            said = f"the prompt has {len(prompt):,} tokens" + (f" and max_tokens is {wanted:,}" if wanted else "")
            said += f"; together at most {context:,} fit this model on this machine"
            raise ApiError(400, said, "context_length_exceeded", "messages")
        return wanted or min(limit, left)

    @property
    def _context(self) -> int | None:
        bounds = [n for n in (self.engine.context_length, self.engine.cache_tokens) if n is not None]
        return min(bounds, default=None)

    # -- completions --------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = checked(ChatRequest, await self.body_of(request))
        messages = [message.message() for message in asked.messages]
        shape = Shape("chat", asked.model, asked.include_usage)

        def encode(model: ServedModel) -> list[list[int]]:
            return [model.chat.encode_prompt(messages)]

        return await self._answer(request, asked, shape, encode)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions. A text is tokenized as it is, control tokens in it included."""
        asked = checked(CompletionRequest, await self.body_of(request))
        prompts = asked.prompts
        rows = self.engine.vocabulary
        for prompt in prompts:
            if not isinstance(prompt, str) and (odd := [n for n in prompt if not 0 <= n < rows]):
                raise ApiError(
                    400, f"prompt: {odd[0]} is no token of this model (0 to {rows - 1})", "invalid_value", "prompt"
                )
        shape = Shape("completion", asked.model, asked.include_usage)

        def encode(model: ServedModel) -> list[list[int]]:
            return [list(model.tokenizer(p, verbose=False)["input_ids"]) if isinstance(p, str) else p for p in prompts]

        return await self._answer(request, asked, shape, encode)

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        shape: Shape,
        encode: Callable[[ServedModel], list[list[int]]],
    ) -> Response:
        with ExitStack() as stack:
            model = stack.enter_context(self.catalog.using(asked.model))
            answers = Answers(self.engine, self.metrics, model, stack.pop_all())
            stack.callback(answers.close)
            loop = asyncio.get_running_loop()
            try:
                prompts = await loop.run_in_executor(self._prompts, encode, model)
            except DataError as error:
                raise ApiError(400, str(error), "invalid_value", "messages") from None
            default = 16 if isinstance(asked, CompletionRequest) else None
            lengths = iter([self._length(prompt, asked.answer_tokens, default) for prompt in prompts])
            if self.draining:
                raise draining()

            def make(on_event: Any) -> Generation:
                return Generation(
                    (),
                    model.tokenizer,
                    model.ends,
                    on_event,
                    next(lengths),
                    model.adapter,
                    asked.sampling,
                    asked.stop_strings,
                    self.limits.answer_seconds,
                )

            answers.ask(request, make, prompts)
            if not asked.stream:
                return await _whole(answers, shape)
            try:
                first = await answers.next()  # what goes wrong before it still has a status of its own
            except ClientGone:
                return Response(status_code=499)
            stack.pop_all()
            return EventStream(answers, shape, first, self.limits.answer_seconds + WRITE_SECONDS)

    # -- models and adapters ------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        cards = [self._card(model) for model in [self.catalog.base, *self.catalog.adapters]]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return JSONResponse(self._card(self.catalog.find(request.path_params["name"])))

    def _card(self, model: ServedModel) -> dict[str, Any]:
        card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "tunesmith"}
        return card if model is self.catalog.base else {**card, "parent": self.catalog.base.name}

    async def adapters(self, request: Request) -> Response:
        """GET /v1/adapters."""
        return JSONResponse({"adapters": [{"name": model.name, "path": model.path} for model in self.catalog.adapters]})

    async def put_adapter(self, request: Request) -> Response:
        """POST /v1/adapters {name, path}: add an adapter, or replace the one of this name."""
        asked = checked(AdapterRequest, await self.body_of(request))
        self._may_change()
        try:
            replaced = await self.catalog.put(asked.name, asked.path)
        except MachineError as error:
            raise ApiError(503, str(error), "out_of_memory", "path") from None
        except TunesmithError as error:
            raise ApiError(400, str(error), "invalid_adapter", "path") from None
        self.metrics.swaps.labels("replaced" if replaced else "added").inc()
        self.metrics.swap.observe(self.catalog.swap_seconds)
        facts = {
            "name": asked.name,
            "path": asked.path,
            "replaced": replaced,
            "swap_seconds": self.catalog.swap_seconds,
        }
        return JSONResponse(facts, 200 if replaced else 201)

    async def delete_adapter(self, request: Request) -> Response:
        """DELETE /v1/adapters/NAME."""
        self._may_change()
        name = request.path_params["name"]
        await self.catalog.remove(name)
        self.metrics.swaps.labels("removed").inc()
        return JSONResponse({"name": name, "deleted": True})

    def _may_change(self) -> None:
        if not self.changes:
            said = "this server listens beyond this machine without an API key: adapters change only with --api-key-env"
            raise ApiError(403, said, "adapter_changes_off")

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while requests are taken, else 503."""
        state = "draining" if self.draining else "ok" if self.engine.healthy else "stopped"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def scrape(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)


async def _whole(answers: Answers, shape: Shape) -> Response:
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


def make_app(server: Server) -> ASGIApp:
    """The routes. Every error has OpenAI's form; all but /health want the key, where there is one."""

    def route(method: str, path: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
        async def authorized(request: Request) -> Response:
            server.authorize(request)
            return await handler(request)

        return Route(path, authorized, methods=[method])

    async def api_error(request: Request, error: Any) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    async def http_error(request: Request, error: Any) -> Response:
        said = f"{request.method} {request.url.path[:200]}: {error.detail}"
        code = "unknown_url" if error.status_code in (404, 405) else None
        return JSONResponse(ApiError(error.status_code, said, code).body, error.status_code, error.headers)

    async def gone(request: Request, error: Any) -> Response:
        return Response(status_code=499)

    async def broken(request: Request, error: Exception) -> Response:  # raised again behind this, for the log
        return JSONResponse(
            ApiError(500, "the server failed on this request; its log says why", "internal_error").body, 500
        )

    app = Starlette(
        routes=[
            route("POST", "/v1/chat/completions", server.chat),
            route("POST", "/v1/completions", server.completions),
            route("GET", "/v1/models", server.models),
            route("GET", "/v1/models/{name:path}", server.model),
            route("GET", "/v1/adapters", server.adapters),
            route("POST", "/v1/adapters", server.put_adapter),
            route("DELETE", "/v1/adapters/{name:path}", server.delete_adapter),
            route("GET", "/metrics", server.scrape),
            Route("/health", server.health, methods=["GET"]),
        ],
        exception_handlers={ApiError: api_error, HTTPException: http_error, ClientDisconnect: gone, Exception: broken},
    )

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        server.open += 1
        try:
            await app(scope, receive, send)
        finally:
            server.open -= 1

    return counted
