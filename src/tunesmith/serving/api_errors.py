"""Errors as OpenAI's API words them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that gets no answer. `status` is HTTP's; `code` is what programs look at, `param` the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = None if self.param is None else _writable(self.param)
        return {"error": {"message": _writable(self.message), "type": kind, "param": param, "code": self.code}}


def _writable(text: str) -> str:
    """Half of a surrogate pair, which a client's key may hold, cannot be written as UTF-8: it stands there as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}
"""OpenAI's `type` by status; others are invalid requests, or the server's fault."""


def draining() -> ApiError:
    """The answer to requests after SIGTERM, and where the engine has stopped."""
    return ApiError(
        503, "the server is stopping and takes no requests; ask again soon", "draining", headers={"Retry-After": "5"}
    )
