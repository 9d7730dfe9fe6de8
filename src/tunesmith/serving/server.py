"""The HTTP interface: OpenAI's chat and text completions over the engine, adapters that come and go, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.errors import DataError, MachineError, TunesmithError
from tunesmith.serving.addresses import is_for
from tunesmith.serving.answers import Answers, ClientGone
from tunesmith.serving.api_errors import ApiError, draining
from tunesmith.serving.catalog import Catalog, ServedModel, check_name
from tunesmith.serving.engine import Engine, Stopped
from tunesmith.serving.generation import Generation
from tunesmith.serving.limits import Limits
from tunesmith.serving.metrics import CONTENT_TYPE, Metrics
from tunesmith.serving.openai_requests import AdapterRequest, ChatRequest, CompletionRequest, checked
from tunesmith.serving.responses import EventStream, whole
from tunesmith.serving.shapes import Shape
from tunesmith.serving.templates import Line, process_of

DISCARDED = 8
"""A body that is too large is read and thrown away up to so many times the limit: else its sender would not see the answer."""


class Server:
    """The state behind the app. `changes` says whether adapters may come and go through the API; `hosts` are the names that requests
    may be for (addresses.named_hosts), None where any will do."""

    def __init__(
        self,
        catalog: Catalog,
        limits: Limits,
        api_key: str | None = None,
        changes: bool = True,
        hosts: frozenset[str] | None = None,
    ):
        self.catalog, self.limits, self.changes, self.hosts = catalog, limits, changes, hosts
        self.engine: Engine = catalog.engine
        self.metrics = Metrics(catalog)
        catalog.on_gone = self.metrics.forget
        self.draining = False
        self.open = 0
        self._ended = False
        self._arriving: set[asyncio.Timeout] = set()
        self._handled = 0
        self._key = api_key.encode() if api_key else None
        # A tokenizer is not made for several threads at once; the event loop must not wait for long texts. Chats are encoded in
        # their template's own thread (templates.py).
        self._texts = Line("tunesmith-texts")

    @property
    def idle(self) -> bool:
        """Whether no request is here: none in the engine, none whose body arrives, whose prompt is rendered or tokenized, or whose answer
        is not begun."""
        return self._handled == 0 and self.engine.idle

    @contextmanager
    def handling(self) -> Iterator[None]:
        """While a request has no response yet."""
        self._handled += 1
        try:
            yield
        finally:
            self._handled -= 1

    def end(self) -> None:
        """Give up what still runs, and what has not arrived: each gets its error."""
        self._ended = True
        self.engine.close()
        for arriving in self._arriving:
            arriving.reschedule(0.0)

    # -- what a request has to pass -----------------------------------------------------------------------------------

    def authorize(self, request: Request) -> None:
        """Raise ApiError 503 where more requests are open than may be, 403 for a request that is for another host than this server,
        and 401 without the key, where there is one."""
        if self.open > self.limits.connections:
            said = f"{self.limits.connections:,} requests are open already, the most that this server holds; ask again later"
            raise ApiError(503, said, "too_many_connections", headers={"Retry-After": "1"})
        host = request.headers.get("host", "")
        if self.hosts is not None and not is_for(host, self.hosts):
            said = f"Host is {host[:100]!r}, which is no name of this server; --allowed-host {host[:100]} makes it one"
            raise ApiError(403, said, "host_not_allowed")
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
            async with asyncio.timeout(self.limits.arrival_seconds) as arriving:
                self._arriving.add(arriving)
                try:
                    async for part in request.stream():
                        size += len(part)
                        if size <= self.limits.body_bytes:
                            body += part
                        elif size > DISCARDED * self.limits.body_bytes:
                            break
                finally:
                    self._arriving.discard(arriving)
        except TimeoutError:
            if self._ended:
                raise draining() from None
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

    def _length(self, prompt: list[int], asked: int | None, default: int | None, fields: tuple[str, str]) -> int:
        """How long an answer may be. Raises ApiError 400 for prompts and answers beyond the limits; `fields` are their names."""
        limit, context = self.limits.answer_tokens, self._context
        where, length = fields
        if not prompt:
            raise ApiError(400, "the prompt has no tokens", "invalid_value", where)
        most = self.limits.prompt_tokens
        if most is not None and len(prompt) > most:
            said = f"the prompt has {len(prompt):,} tokens, and this server takes at most {most:,}"
            raise ApiError(400, said, "context_length_exceeded", where)
        if asked is not None and asked > limit:
            said = f"{length} is {_short(asked)}: this server writes at most {limit:,}"
            raise ApiError(400, said, "invalid_value", length)
        wanted = asked if asked is not None else default
        if context is None:
            return wanted or limit
        left = context - len(prompt)
        if left < (wanted or 1):
            said = f"the prompt has {len(prompt):,} tokens" + (f" and {length} is {wanted:,}" if wanted else "")
            said += f"; together at most {context:,} fit this model on this machine"
            raise ApiError(400, said, "context_length_exceeded", where)
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
        if len(prompts) > self.limits.queue:
            said = f"{len(prompts)} prompts in one request: this server lets {self.limits.queue} wait at once (queue); send fewer"
            raise ApiError(400, said, "invalid_value", "prompt")
        rows = self.engine.vocabulary
        for prompt in prompts:
            if not isinstance(prompt, str) and (odd := [n for n in prompt if not 0 <= n < rows]):
                said = f"prompt: {_short(odd[0])} is no token of this model (0 to {rows - 1})"
                raise ApiError(400, said, "invalid_value", "prompt")
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
            start = time.monotonic()
            try:
                prompts = await self._encoded(asked, model, encode)
            except DataError as error:
                raise ApiError(400, str(error), "invalid_value", asked.fields[0]) from None
            default = 16 if isinstance(asked, CompletionRequest) else None
            lengths = iter([self._length(prompt, asked.answer_tokens, default, asked.fields) for prompt in prompts])

            def make(on_event: Any) -> Generation:
                return Generation(
                    (),
                    model.tokenizer,
                    model.ends,
                    on_event,
                    next(lengths),
                    model.adapter,
                    asked.sampling,
                    asked.stop,
                    self.limits.answer_seconds,
                    submitted=start,
                )

            answers.ask(request, make, prompts)
            if not asked.stream:
                return await whole(answers, shape)
            try:
                first = await answers.next()  # what goes wrong before it still has a status of its own
            except ClientGone:
                return Response(status_code=499)
            stack.pop_all()
            return EventStream(answers, shape, first, self.limits.answer_seconds + self.limits.reading_seconds)

    async def _encoded(
        self,
        asked: ChatRequest | CompletionRequest,
        model: ServedModel,
        encode: Callable[[ServedModel], list[list[int]]],
    ) -> list[list[int]]:
        """The prompts' tokens, within the limits on waiting requests and on time. Raises ApiError, and DataError."""
        line = self._texts if isinstance(asked, CompletionRequest) else process_of(model.chat).line
        if line.waiting >= self.limits.queue:
            said = f"{line.waiting} requests wait already to be read by {model.name}'s tokenizer; ask again later"
            raise ApiError(429, said, "queue_full", headers={"Retry-After": "1"})
        line.waiting += 1
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                return await asyncio.get_running_loop().run_in_executor(line.thread, encode, model)
        except TimeoutError:
            said = (
                f"no answer after {self.limits.answer_seconds:g} s: {model.name}'s chat template or tokenizer is busy"
            )
            raise ApiError(504, said, "timeout") from None
        finally:
            line.waiting -= 1

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
            check_name(asked.name, self.catalog.base.name)
        except TunesmithError as error:
            raise ApiError(400, str(error), "invalid_adapter", "name") from None
        try:
            replaced, notes = await self.catalog.put(asked.name, asked.path)
        except Stopped:
            raise draining() from None
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
            "notes": list(notes),
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


def _short(number: int) -> str:
    """A number that a client wrote, of up to 4,300 digits."""
    return f"{number:,}" if abs(number) < 10**15 else "a number of more than 15 digits"


def make_app(server: Server) -> ASGIApp:
    """The routes. Every error has OpenAI's form; all but /health want the key, where there is one."""

    def route(method: str, path: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
        async def authorized(request: Request) -> Response:
            with server.handling():
                server.authorize(request)
                return await handler(request)

        return Route(path, authorized, methods=[method])

    async def api_error(request: Request, error: Any) -> Response:
        server.metrics.errors.labels(str(error.status), error.code or "").inc()
        return JSONResponse(error.body, error.status, error.headers)

    async def http_error(request: Request, error: Any) -> Response:
        said = f"{request.method} {request.url.path[:200]}: {error.detail}"
        code = "unknown_url" if error.status_code in (404, 405) else None
        server.metrics.errors.labels(str(error.status_code), code or "").inc()
        return JSONResponse(ApiError(error.status_code, said, code).body, error.status_code, error.headers)

    async def gone(request: Request, error: Any) -> Response:
        return Response(status_code=499)

    async def broken(request: Request, error: Exception) -> Response:  # raised again behind this, for the log
        server.metrics.errors.labels("500", "internal_error").inc()
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
