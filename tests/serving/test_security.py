"""What clients, pages in a browser, adapters and chat templates may try, and that nobody else notices."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import QUESTION, LiveServer, chat_request, error_of, eventually, raw

from command_line import tunesmith
from tunesmith.serving.addresses import named_hosts
from tunesmith.serving.api_errors import ApiError
from tunesmith.serving.limits import Limits
from tunesmith.serving.openai_requests import ChatRequest, CompletionRequest, checked

# -- names, folders and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../up", "a/b", "a b", "", ".", "..", "x" * 101, "a\n", "é", "base", "%2e%2e"])
def test_names_that_are_no_names_are_refused(name: str, live: LiveServer, adapters: dict[str, Path]) -> None:
    response = live.post("/v1/adapters", json={"name": name, "path": str(adapters["cs"])})
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_adapter")
    assert error_of(response)["param"] == "name"
    assert "adapter name" in error_of(response)["message"]


def test_names_in_urls_are_names_and_no_paths(live: LiveServer) -> None:
    for path in ("/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/models/cs%00"):
        assert httpx.get(live.url + path).status_code == 404
        assert httpx.delete(live.url + path.replace("models", "adapters")).status_code == 404
    assert [model.id for model in live.client().models.list()] == ["base", "cs", "hr"]


def test_folders_that_are_no_adapters_are_refused(
    live: LiveServer, tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    def refusal(path: Any) -> str:
        response = live.post("/v1/adapters", json={"name": "bad", "path": str(path)})
        assert response.status_code == 400, response.text
        return str(error_of(response)["message"])

    def copy(name: str) -> Path:
        return Path(shutil.copytree(adapters["cs"], tmp_path / name))

    assert "not an adapter" in refusal("/etc")
    assert "not an adapter" in refusal("nowhere\0")
    assert "not an adapter" in refusal("../../../../etc/passwd")
    assert "File name too long" in refusal("x" * 5000)
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    pickled = copy("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "pickled adapters are not read" in refusal(pickled)
    imported = copy("imported")
    config = json.loads((imported / "adapter_config.json").read_text())
    megatron = {"megatron_config": {"a": 1}, "megatron_core": "os"}
    (imported / "adapter_config.json").write_text(json.dumps({**config, **megatron}))
    assert "has PEFT import the module 'os'" in refusal(imported)
    coded = copy("coded")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, coded)
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (coded / "tokenizer_config.json").write_text(json.dumps(code))
    (coded / "code.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\nclass Mine: pass\n")
    assert "its tokenizer cannot be loaded" in refusal(coded)
    assert not (tmp_path / "made").exists()
    torn = copy("torn")
    (torn / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    assert "cannot be read" in refusal(torn)
    other = copy("other")
    (other / "tunesmith.json").write_text(json.dumps({"base": {"name": "x", "weight_hash": "0" * 64}}))
    assert "are not those that" in refusal(other)
    strange = copy("strange")
    config = json.loads((strange / "adapter_config.json").read_text())
    (strange / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert "only LORA adapters" in refusal(strange)
    for text in ("[]", "{", "[" * 100_000, json.dumps({**config, "r": "x"}), " " * (1 << 20) + "{}"):
        (strange / "adapter_config.json").write_text(text)
        assert "adapter_config.json" in refusal(strange)
    assert [model.id for model in live.client().models.list()] == ["base", "cs", "hr"]


def test_a_base_with_pickled_weights_or_code_of_its_own_is_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    pickled = Path(shutil.copytree(tiny_model, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    coded = Path(shutil.copytree(tiny_model, tmp_path / "coded"))
    config = json.loads((coded / "config.json").read_text())
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}
    (coded / "config.json").write_text(json.dumps({**config, **code}))
    (coded / "code.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\nclass Mine: pass\n")
    for folder, said in ((pickled, "its weights are pickled"), (coded, "runs its own Python code")):
        result = tunesmith("serve", folder, "--port", "0")
        assert (result.code, said in result.problems[0]) == (2, True)
    assert not (tmp_path / "made").exists()


# -- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 9000 + b"]" * 9000, 400, "invalid_json"),
        (b'{"model": ' + b"9" * 6000 + b"}", 400, "invalid_json"),
        (b"[1]", 400, "invalid_type"),
        (b'{"model": "cs", "messages": ' + b" " * 30_000 + b"[]}", 413, "body_too_large"),
        (b'"' + b"x" * 2_000_000 + b'"', 413, "body_too_large"),
    ],
)
def test_bodies_that_are_no_request(body: bytes, status: int, code: str, live: LiveServer) -> None:
    for content in (body, iter([body[:50], body[50:]])):  # with its length, and in chunks
        headers = {"content-type": "application/json"}
        response = live.post("/v1/chat/completions", content=content, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (status, code)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [0] * 400_000},
        {"messages": [{}] * 400_000},
        {"messages": [{"role": "user", "content": [0] * 400_000}]},
        {"stop": [0] * 400_000},
        {"prompt": [[0.5]] * 200_000},
        {f"key{n}": 1 for n in range(100_000)},
    ],
)
def test_a_body_full_of_errors_costs_no_more_than_one(values: dict[str, Any]) -> None:
    """It is checked where everybody's requests are read: gathering all its errors took seconds."""
    kind = CompletionRequest if "prompt" in values else ChatRequest
    start = time.process_time()
    with pytest.raises(ApiError):
        checked(
            kind, {"model": "cs", "messages": QUESTION, **values} if kind is ChatRequest else {"model": "cs", **values}
        )
    assert time.process_time() - start < 0.5


# -- slow clients -----------------------------------------------------------------------------------------------------


def test_a_client_that_sends_slowly_is_cut_off(endless: LiveServer) -> None:
    request = chat_request(endless, max_tokens=2)
    start = time.monotonic()
    connections = [raw(endless, sent) for sent in (b"", b"POST /v1/chat", request[:-5])]
    for connection in connections:
        found = connection.recv(1000)
        assert time.monotonic() - start < 15  # arrival_seconds is 1; without it nothing comes within the socket's 20 s
        assert found == b"" or b" 408 " in found.splitlines()[0]
    whole = raw(endless, request)
    assert b" 200 " in whole.recv(1000).splitlines()[0]


def test_a_client_that_reads_slowly_holds_no_place(endless: LiveServer) -> None:
    """The answer is made at the engine's pace, and waits for its reader outside the batch."""
    before = endless.engine.steps
    connection = raw(endless, chat_request(endless, stream=True, max_tokens=200))
    eventually(lambda: endless.engine.steps - before >= 199)
    eventually(lambda: endless.server.idle)
    text = b""
    while not text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        text += connection.recv(4096)
    assert b'"finish_reason": "length"' in text


def test_a_client_that_does_not_read_is_cut_off(tiny_model: Path) -> None:
    """Its answer is whole long before: what is not taken would keep the connection open for ever."""
    limits = Limits(answer_tokens=3000, reading_seconds=1)
    live = LiveServer(tiny_model, {}, limits, never_ends=True)
    live.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with live, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", live.port))
        connection.sendall(chat_request(live, stream=True, max_tokens=3000))
        eventually(lambda: live.server.open == 1)
        eventually(lambda: live.server.open == 0, 60)
        text = b""
        while part := connection.recv(4096):
            text += part
        assert b"[DONE]" not in text


# -- who may ask ------------------------------------------------------------------------------------------------------


def test_the_key_is_wanted_everywhere_but_at_health(tiny_model: Path, adapters: dict[str, Path]) -> None:
    with LiveServer(tiny_model, adapters, key="sécret") as live:
        assert httpx.get(live.url + "/health").status_code == 200
        for path in ("/v1/models", "/v1/models/cs", "/v1/adapters", "/metrics"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sécret".encode()}):
                response = httpx.get(live.url + path, headers=headers)
                assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/adapters"):
            assert live.post(path, json={}).status_code == 401
        assert httpx.delete(live.url + "/v1/adapters/cs").status_code == 401
        good = {"authorization": "Bearer sécret".encode()}
        assert httpx.get(live.url + "/v1/models", headers=good).status_code == 200
        wrong = live.client().with_options(api_key="nothing")
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            wrong.models.list()


def test_adapters_do_not_change_on_an_open_address_without_a_key(tiny_model: Path, adapters: dict[str, Path]) -> None:
    with LiveServer(tiny_model, adapters, changes=False) as live:
        responses = [
            live.post("/v1/adapters", json={"name": "x", "path": str(adapters["cs"])}),
            httpx.delete(live.url + "/v1/adapters/cs"),
        ]
        assert [(r.status_code, error_of(r)["code"]) for r in responses] == [(403, "adapter_changes_off")] * 2
        assert [model.id for model in live.client().models.list()] == ["base", "cs", "hr"]


@pytest.mark.parametrize(
    ("host", "key", "allowed", "names"),
    [
        ("127.0.0.1", None, (), {"127.0.0.1"}),
        ("::1", None, (), {"::1"}),
        ("127.0.0.1", None, ("Box.lan.",), {"127.0.0.1", "box.lan"}),
        ("0.0.0.0", None, ("box.lan",), {"0.0.0.0", "box.lan"}),
        ("127.0.0.1", "key", ("box.lan",), {"127.0.0.1", "box.lan"}),
        ("127.0.0.1", "key", (), None),
        ("0.0.0.0", None, (), None),
    ],
)
def test_which_names_requests_may_be_for(host: str, key: str | None, allowed: tuple[str, ...], names: Any) -> None:
    assert named_hosts(host, key, allowed) == names


def test_a_page_whose_name_is_made_to_mean_this_machine_is_refused(tiny_model: Path, adapters: dict[str, Path]) -> None:
    """DNS rebinding: the browser sends the page's own name as Host, whatever address that has by now."""
    with LiveServer(tiny_model, adapters, hosts=named_hosts("127.0.0.1", None, ["box.lan"])) as live:
        own = (
            f"127.0.0.1:{live.port}",
            f"localhost:{live.port}",
            "LOCALHOST",
            "[::1]:80",
            "127.0.0.2",
            "box.lan:1",
            "box.lan.",
        )
        for host in own:
            assert httpx.get(live.url + "/v1/models", headers={"host": host}).status_code == 200, host
        others = ("evil.example", f"evil.example:{live.port}", "127.0.0.1.evil.example", "localhost.evil.example:80",
                  "", "10.0.0.1", "evil.example@127.0.0.1", "::1.evil", "box.lan.evil.example")  # fmt: skip
        for host in others:
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/adapters")):
                response = httpx.request(method, live.url + path, headers={"host": host}, json={})
                error = error_of(response)
                assert (response.status_code, error["code"]) == (403, "host_not_allowed"), host
                assert error["type"] == "permission_error"
            assert httpx.get(live.url + "/health", headers={"host": host}).status_code == 200
        without = raw(live, b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert b" 403 " in without.recv(1000).splitlines()[0]


def test_what_a_page_may_send_unasked_is_not_read(live: LiveServer, adapters: dict[str, Path]) -> None:
    """Browsers send other origins these types without asking first; what they ask first gets no leave."""
    ask = json.dumps({"model": "cs", "messages": QUESTION})
    load = json.dumps({"name": "new", "path": str(adapters["cs"])})
    for path, body in (("/v1/chat/completions", ask), ("/v1/completions", ask), ("/v1/adapters", load)):
        for kind in ("text/plain", "text/plain; x=application/json", "application/x-www-form-urlencoded",
                     "multipart/form-data; boundary=x", "application/jsonx", ""):  # fmt: skip
            response = live.post(path, content=body, headers={"content-type": kind} if kind else {})
            assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type"), kind
        origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        response = httpx.options(live.url + path, headers=origin)
        assert response.status_code == 405
        assert not [name for name in response.headers if name.startswith("access-control-")]
    assert [model.id for model in live.client().models.list()] == ["base", "cs", "hr"]
