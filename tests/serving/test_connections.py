"""Connections that ask for nothing lock nobody out, and what is no HTTP gets an error of OpenAI's form too."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from live_server import QUESTION, LiveServer, chat_request, error_of, eventually, raw
from test_drain import draining  # noqa: F401  # a fixture

from tunesmith.serving import process
from tunesmith.serving.limits import Limits


def answer_of(connection: socket.socket) -> httpx.Response:
    """What comes on a connection until the server closes it."""
    connection.settimeout(60)
    found = b""
    while part := connection.recv(4096):
        found += part
    head, _, body = found.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)  # type: ignore[arg-type]


def has_ended(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(4096) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_idle_connections_lock_nobody_out(tiny_model: Path) -> None:
    """Of more than may be open the one that was idle the longest goes; one that waits for its answer stays."""
    limits = Limits(answer_tokens=3000, connections=4, arrival_seconds=300)
    most = 4 + process.SPARE_CONNECTIONS
    with LiveServer(tiny_model, {}, limits, never_ends=True) as live, ExitStack() as stack:
        busy = stack.enter_context(raw(live, chat_request(live, max_tokens=2000)))
        eventually(lambda: live.engine.running == 1)
        idle = [stack.enter_context(raw(live, b"")) for _ in range(2 * most)]
        assert httpx.get(live.url + "/health").status_code == 200
        asked = live.post(
            "/v1/chat/completions", json={"model": "base", "messages": QUESTION, "max_tokens": 2, "temperature": 0}
        )
        assert asked.status_code == 200
        assert has_ended(idle[0], 60)
        assert not has_ended(idle[-1], 0.2)
        busy.settimeout(120)
        assert b" 200 " in busy.recv(4096).splitlines()[0]


def test_a_connection_that_was_answered_is_idle_again(tiny_model: Path) -> None:
    limits = Limits(answer_tokens=10, connections=1, arrival_seconds=300)
    with LiveServer(tiny_model, {}, limits) as live, ExitStack() as stack:
        first = stack.enter_context(raw(live, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"))
        answer = b""
        while not answer.endswith(b"}"):  # head and body may come apart
            answer += (part := first.recv(4096))
            assert part
        assert b" 200 " in answer
        for _ in range(1 + process.SPARE_CONNECTIONS):
            stack.enter_context(raw(live, b""))
        assert has_ended(first, 3)  # before uvicorn ends what it keeps alive, 5 s


@pytest.mark.parametrize(
    "sent",
    [
        b"rubbish\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 70_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_an_error_of_openais_form(sent: bytes, live: LiveServer) -> None:
    with raw(live, sent) as connection:
        response = answer_of(connection)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_http")
    assert response.headers["content-type"] == "application/json"
    counted = 'tunesmith_error_responses_total{code="invalid_http",status="400"}'
    assert counted in httpx.get(live.url + "/metrics").text
    eventually(lambda: live.server.idle)


def test_half_a_body_when_the_server_ends_is_503(
    tiny_model: Path,
    draining: list[process.DrainingServer],  # noqa: F811
) -> None:
    """Drained in vain, or told twice: it is not uvicorn's 500, which comes with text."""
    limits = Limits(answer_tokens=100, drain_seconds=600, arrival_seconds=300)
    with LiveServer(tiny_model, {}, limits) as live, raw(live, chat_request(live, max_tokens=3)[:-5]) as connection:
        eventually(lambda: not live.server.idle)
        for _ in range(2):
            draining[0].handle_exit(signal.SIGTERM, None)
        response = answer_of(connection)
        assert (response.status_code, error_of(response)["code"]) == (503, "draining")


def test_errors_are_counted_whether_or_not_they_name_a_model(tiny_model: Path) -> None:
    with LiveServer(tiny_model, {}) as live:
        asked = {"model": "secret-name", "messages": QUESTION}
        for content in (b"{", json.dumps(asked).encode(), json.dumps(asked).encode()):
            live.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        httpx.get(live.url + "/secret-path")
        text = httpx.get(live.url + "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("tunesmith_error_responses_total")]
    assert sorted(lines) == [
        'tunesmith_error_responses_total{code="invalid_json",status="400"} 1.0',
        'tunesmith_error_responses_total{code="model_not_found",status="404"} 2.0',
        'tunesmith_error_responses_total{code="unknown_url",status="404"} 1.0',
    ]
    assert "secret" not in text


def test_tokens_of_an_answer_that_broke_off_are_counted(tiny_model: Path) -> None:
    with LiveServer(tiny_model, {}, Limits(answer_tokens=3000), never_ends=True) as live:
        stream = live.client().completions.create(model="base", prompt="abc", max_tokens=2000, stream=True)
        next(iter(stream))
        stream.close()
        eventually(lambda: live.server.idle and live.server.open == 0)
        lines = dict(line.rsplit(" ", 1) for line in httpx.get(live.url + "/metrics").text.splitlines())
    assert float(lines['tunesmith_tokens_total{kind="prompt",model="base"}']) == 3
    assert 1 <= float(lines['tunesmith_tokens_total{kind="completion",model="base"}']) < 2000
    assert float(lines['tunesmith_requests_total{model="base",outcome="disconnected"}']) == 1


def test_prompts_that_can_never_wait_together_are_400(tiny_model: Path) -> None:
    with LiveServer(tiny_model, {}, Limits(queue=2)) as live:
        response = live.post("/v1/completions", json={"model": "base", "prompt": ["a", "b", "c"]})
        assert (response.status_code, error_of(response)["param"]) == (400, "prompt")
        assert "3 prompts in one request: this server lets 2 wait at once (queue)" in error_of(response)["message"]
        asked = {"model": "base", "prompt": ["a", "b"], "max_tokens": 2}
        assert live.post("/v1/completions", json=asked).status_code == 200
