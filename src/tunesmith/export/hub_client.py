"""Questions to the hub: with a limit of time, asked again when it is busy, and without a word of what the server said.

huggingface_hub's HTTP client waits for an answer without end. While `connected` lasts, its requests go through `_Patient`, which
gives each one a limit and stops when an address was asked `UNANSWERED` times in vain: the library's own tries and those of `ask`
would otherwise multiply to half an hour.

A server may echo the token in an error, a header or a warning. So errors are made from the status alone, outside of the handler
(nothing is chained to them), and the loggers of the HTTP libraries are silent meanwhile.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from tunesmith.errors import MachineError, TunesmithError, UserError

T = TypeVar("T")

CONNECT, SILENCE = 10.0, 60.0
"""Seconds to reach the hub, and that it may be silent while it reads or answers (a large commit takes it tens of seconds). A slow
upload is not silent."""

UNANSWERED = 3
"""Times that one address may be asked without an answer: three minutes with the waits between them. By address, because what comes
before it (a commit is preceded by four questions) may still be answered."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each new try of a question that huggingface_hub asks once (it retries uploads by itself)."""

LONGEST_WAIT = 60.0
"""Seconds. A hub that asks to come back later than this (Retry-After) is not waited for."""

AGAIN = (408, 412, 429, 500, 502, 503, 504)

MEANT = {
    400: "what was sent was refused as malformed; check --license, --revision and the name",
    401: "the token is not valid; make a new one (write access) at the hub and set HF_TOKEN, or run `hf auth login`",
    402: "the account has no space or plan for it",
    403: "the token may not do this; it needs write access to that repository or organization",
    404: "there is no such repository or revision, or the token cannot see it",
    409: "it conflicts with what is there; try again",
    412: "somebody else changed the repository meanwhile; try again",
    413: "a file is larger than the hub takes",
    429: "too many requests; try again later",
}


class Unanswered(httpx.HTTPError):
    """An address was asked `UNANSWERED` times in vain. No TransportError, which huggingface_hub would try again."""


class _Patient(httpx.Client):
    """Sends through `inner`, the client that huggingface_hub would have used, with limits of time."""

    def __init__(self, inner: httpx.Client) -> None:
        super().__init__(headers=inner.headers, cookies=inner.cookies, timeout=httpx.Timeout(SILENCE, connect=CONNECT))
        self.inner = inner
        self.failed: Counter[tuple[str, str]] = Counter()

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """One request. Raises Unanswered where its address has been asked too often in vain, HTTPStatusError where the wait would be too long."""
        given = request.extensions.get("timeout") or {}
        limits = {name: given.get(name) or limit for name, limit in self.timeout.as_dict().items()}
        request.extensions = {**request.extensions, "timeout": limits}
        asked = (request.method, request.url.path)  # the query of an upload's address is another each time
        try:
            response = self.inner.send(request, **options)
        except httpx.TransportError as error:
            self.failed[asked] += 1
            if self.failed[asked] >= UNANSWERED:
                raise Unanswered(type(error).__name__) from None
            raise
        del self.failed[asked]
        if retry_after(response) > LONGEST_WAIT:
            raise httpx.HTTPStatusError("asks for too long a wait", request=request, response=response)
        return response

    def close(self) -> None:
        """Of both."""
        self.inner.close()
        super().close()


def retry_after(response: httpx.Response | None) -> float:
    """Seconds that a busy hub asks to wait, from Retry-After or RateLimit (`"api";r=0;t=55`); 0 where it asks for none."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    if response is None or response.status_code not in AGAIN:
        return 0.0
    told = response.headers.get("retry-after", "").strip()
    if told.isascii() and told.isdigit():
        return float(told[:9])
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else 0.0


@contextmanager
def connected() -> Iterator[None]:
    """Meanwhile the hub is asked with limits of time, and the libraries log nothing. Afterwards both are as they were."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    # The library has a setter and no getter; without it a factory that the caller has set (proxies, certificates) would be lost.
    before = _http._GLOBAL_CLIENT_FACTORY
    with _silent_libraries():
        set_client_factory(lambda: _Patient(before()))
        try:
            yield
        finally:
            set_client_factory(before)


def ask(
    repo: str, what: str, call: Callable[[], T], *, allowed: Sequence[int] = (), tries_itself: bool = False
) -> T | Any:
    """What `call` returns; None for a status in `allowed`. Busy and broken servers are asked again after each of `WAITS`.

    What is raised holds nothing that the server said, and no exception that does.
    """
    waits = () if tries_itself else WAITS
    for wait in (*waits, None):
        problem: TunesmithError
        try:
            return call()
        # The hub's and httpx's errors; huggingface_hub's own for uploads (RuntimeError) and for answers that are not what
        # they should be (ValueError, KeyError, TypeError).
        except (httpx.HTTPError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            status = _status(error)
            if status in allowed:
                return None
            later = max(retry_after(getattr(link, "response", None)) for link in _chain(error))
            silent = any(isinstance(link, Unanswered) for link in _chain(error))
            transport = any(isinstance(link, httpx.TransportError) for link in _chain(error))
            again = wait is not None and later <= LONGEST_WAIT and not silent and (status in AGAIN or transport)
            problem = _explained(repo, what, error, status, silent, transport, later)
        if not again:
            break
        time.sleep(max(wait or 0.0, later))
    raise problem


def token_of_hub() -> str:
    """huggingface_hub's own: HF_TOKEN, else what `hf auth login` saved. Raises UserError where there is none."""
    from huggingface_hub import get_token

    token = ask("the token", "reading the token", get_token, tries_itself=True)
    if not token:
        raise UserError("there is no token for the hub; set HF_TOKEN, or run `hf auth login` (write access)")
    return str(token)


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error, or what caused it, came with."""
    found = (getattr(getattr(link, "response", None), "status_code", None) for link in _chain(error))
    return next((status for status in found if status is not None), None)


def _explained(
    repo: str, what: str, error: BaseException, status: int | None, silent: bool, transport: bool, later: float
) -> TunesmithError:
    """Our error, made of the status or the error's type: text of the server is left out, it may hold the token."""
    stays = "push again: what was uploaded is not uploaded again"
    if status is not None and later > LONGEST_WAIT:
        return MachineError(
            f"{repo}: {what} failed: the hub answered {status}, and asks to try again in {later:.0f} seconds"
        )
    if status is not None and (status >= 500 or status in AGAIN):
        meant = MEANT.get(status, "the hub is out of order; try again later, what was uploaded is not uploaded again")
        return MachineError(f"{repo}: {what} failed: the hub answered {status}: {meant}")
    if status is not None:
        return UserError(f"{repo}: {what} failed: the hub answered {status}: {MEANT.get(status, 'it refused')}")
    if silent:
        return MachineError(f"{repo}: {what} failed: the hub did not answer {UNANSWERED} times in a row; {stays}")
    if transport:
        return MachineError(f"{repo}: {what} was interrupted ({type(error).__name__}); {stays}")
    return MachineError(f"{repo}: {what} failed ({type(error).__name__}); {stays}")


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """No log line and no warning of the HTTP libraries: they quote addresses, headers and the server's text."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx", "httpcore", "hf_xet")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
