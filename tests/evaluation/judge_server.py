"""A judge to test with: an OpenAI-compatible endpoint in a thread that answers well, or misbehaves as real ones do.

with JudgeServer(prefer_longer) as server:
    server.modes = ["rate_limit"]   # of the next requests, in order; then `server.mode`
    settings = JudgeSettings(server.url, "stub")
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.evaluation.judge import JudgedRow, judge_rows
from tunesmith.evaluation.judges import JudgeSettings
from tunesmith.evaluation.parts import PartResult

KEY = "sk-the-secret-key"
"""In OPENAI_API_KEY, by the fixture `judge_key`."""

Judging = Callable[[dict[str, str]], Any]
"""The verdict, given the blocks of a request by name: REQUEST, REFERENCE ANSWER, ANSWER A, ANSWER B, ANSWER."""


def prefer_longer(blocks: dict[str, str]) -> str:
    first, second = len(blocks["ANSWER A"]), len(blocks["ANSWER B"])
    return "A" if first > second else "B" if second > first else "tie"


def prefer_first(blocks: dict[str, str]) -> str:
    return "A"


def score_by_words(blocks: dict[str, str]) -> int:
    return min(10, max(1, len(blocks["ANSWER"].split())))


def blocks_of(prompt: str) -> dict[str, str]:
    """The material of a request, as a judge would read it."""
    found = re.findall(r"^(=+) ([A-Z ]+?) \1\n(.*?)\n\1 END OF \2 \1$", prompt, flags=re.DOTALL | re.MULTILINE)
    return {name: text for _, name, text in found}


class JudgeServer:
    """Serves at `url` and remembers each request's body, headers and number of answers given."""

    def __init__(self, judging: Judging):
        self.judging = judging
        self.mode = "good"
        self.modes: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def __enter__(self) -> JudgeServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet a response: with two, the second waits 40 ms for the first one's acknowledgement

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(body)
                    server.keys.append(self.headers["Authorization"])
                    mode = server.modes.pop(0) if server.modes else server.mode
                server.reply(self, mode, body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @property
    def prompts(self) -> list[str]:
        """The first message of each request."""
        return [body["messages"][0]["content"] for body in self.requests]

    def reply(self, handler: BaseHTTPRequestHandler, mode: str, body: dict[str, Any]) -> None:
        prompt = body["messages"][0]["content"]
        key = next(key for key in ("score", "class", "verdict") if f'"{key}"' in prompt)
        verdict = self.judging(blocks_of(prompt))
        right = json.dumps({"reason": "because", key: verdict})
        errors = {"rate_limit": 429, "error": 500, "unauthorized": 401, "not_found": 404, "too_long": 400}
        texts = {
            "fence": f"```json\n{right}\n```",
            "prose": f"Let me see. {right} That is all.",
            "broken": right[:-1],
            "empty": "",
            "third": json.dumps({"reason": "because", key: "C" if key == "verdict" else 11}),
        }
        if mode in errors:
            message = f"{mode} of {handler.headers['Authorization']}"
            headers = {"Retry-After": "1"} if mode == "rate_limit" else {}
            send(handler, errors[mode], json.dumps({"error": {"message": message}}), headers)
        elif mode == "stall":
            self.stopped.wait(60)
            handler.close_connection = True
        elif mode == "drop":
            handler.close_connection = True
        elif mode == "not_json":
            send(handler, 200, "<html>a gateway's page</html>", {})
        else:
            choice = {"message": {"content": texts.get(mode, right)}, "finish_reason": "stop"}
            cuts = {"cut": right[:12], "cut_late": f"{right} But then again"}
            if mode in cuts:
                choice = {"message": {"content": cuts[mode]}, "finish_reason": "length"}
            completion = {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
            if mode == "no_usage":
                del completion["usage"]
            send(handler, 200, json.dumps(completion), {})


def send(handler: BaseHTTPRequestHandler, status: int, body: str, headers: dict[str, str]) -> None:
    data = body.encode()
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def row(line: int, tuned: str, base: str | None) -> JudgedRow:
    return JudgedRow(line, f"question {line}", None, tuned, base)


def differing(n: int) -> list[JudgedRow]:
    """Rows in which the base says more."""
    return [row(line, f"tuned says {line}", f"the base says {line}") for line in range(1, n + 1)]


def judge(server: JudgeServer, rows: Sequence[JudgedRow], folder: Path, **changes: Any) -> PartResult:
    """Have the server judge the rows, one request at a time; verdicts are kept in the folder."""
    settings = JudgeSettings(server.url, "stub", **{"workers": 1, **changes})
    return judge_rows(rows, Endpoint(settings), settings, folder / "judge.jsonl")


def counts(details: Any) -> tuple[int, int, int]:
    return details["wins"], details["ties"], details["losses"]
