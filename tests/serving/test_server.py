"""The server through OpenAI's own client: answers, streams, errors, adapters that come and go."""

from __future__ import annotations

import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import GREEDY, QUESTION, LiveServer, chat_request, error_of, eventually, raw
from serving_models import one_by_one

from tunesmith.data.chat import ChatFormat
from tunesmith.serving.catalog import ServedModel
from tunesmith.serving.limits import Limits
from tunesmith.types import Message

# -- answers ----------------------------------------------------------------------------------------------------------


def test_each_model_answers_as_generate_does(
    live: LiveServer, tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any
) -> None:
    prompt = ChatFormat(tiny_tokenizer).encode_prompt([Message("user", QUESTION[0]["content"])])
    said = set()
    for name, adapter in ((None, None), *adapters.items()):
        (expected,) = one_by_one(tiny_model, adapter, tiny_tokenizer, [prompt], 24)
        answer = live.client().chat.completions.create(model=name or "base", messages=QUESTION, **GREEDY)
        assert answer.choices[0].message.content == expected
        assert answer.model == (name or "base")
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens
        assert answer.choices[0].finish_reason == ("length" if answer.usage.completion_tokens == 24 else "stop")
        said.add(expected)
    assert len(said) == 3


@pytest.mark.parametrize("settings", [GREEDY, {"temperature": 1.3, "seed": 5, "top_p": 0.9, "max_tokens": 40}])
def test_chunks_join_to_the_answer_that_is_not_streamed(live: LiveServer, settings: dict[str, Any]) -> None:
    client = live.client()
    whole = client.chat.completions.create(model="cs", messages=QUESTION, **settings)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="cs", messages=QUESTION, **settings, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        whole.choices[0].finish_reason
    ]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {c.usage for c in chunks[:-1]} == {None}
    plain = list(client.chat.completions.create(model="cs", messages=QUESTION, stream=True, **settings))
    assert len(plain) == len(chunks) - 1


def test_a_stream_ends_as_openais_do(live: LiveServer) -> None:
    response = live.post("/v1/chat/completions", json={"model": "hr", "messages": QUESTION, "stream": True, **GREEDY})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])


def test_text_completions_of_several_prompts_and_of_tokens(
    live: LiveServer, tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any
) -> None:
    texts = ["Once", "The bin for the old newspaper is", "x"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    expected = one_by_one(tiny_model, adapters["hr"], tiny_tokenizer, ids, 16)  # OpenAI's default length
    client = live.client()
    for prompt in (texts, ids):
        answer = client.completions.create(model="hr", prompt=prompt, temperature=0)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    streamed = ["", "", ""]
    for chunk in client.completions.create(model="hr", prompt=texts, temperature=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected
    assert client.completions.create(model="hr", prompt=ids[1], temperature=0).choices[0].text == expected[1]


def test_stop_strings_over_http(live: LiveServer) -> None:
    def ask(**settings: Any) -> Any:
        return (
            live.client()
            .completions.create(model="cs", prompt="abc", temperature=0, max_tokens=30, **settings)
            .choices[0]
        )

    whole = ask().text
    found = ask(stop=[whole[6:8], "nowhere"])
    assert (found.text, found.finish_reason) == (whole[: whole.index(whole[6:8])], "stop")


def test_parts_and_what_clients_send_back_are_read(live: LiveServer) -> None:
    parts = [{"type": "text", "text": "Which bin "}, {"type": "text", "text": "takes the can?"}]
    client = live.client()
    one, other = (
        client.chat.completions.create(model="cs", messages=[{"role": "user", "content": content}], **GREEDY)
        for content in (parts, QUESTION[0]["content"])
    )
    assert one.choices[0].message.content == other.choices[0].message.content
    history = [*QUESTION, one.choices[0].message.model_dump(), {"role": "user", "content": "why?"}]
    longer = client.chat.completions.create(model="cs", messages=history, n=1, logprobs=False, user="me", **GREEDY)
    assert longer.usage.prompt_tokens > one.usage.total_tokens


def test_models_are_listed_without_their_paths(live: LiveServer) -> None:
    assert [model.id for model in live.client().models.list()] == ["base", "cs", "hr"]
    assert live.client().models.retrieve("cs").model_dump()["parent"] == "base"
    assert "/tmp" not in httpx.get(live.url + "/v1/models").text


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_served_is_404(live: LiveServer) -> None:
    for name in ("nobody", "../cs", "", "x" * 5000):
        with pytest.raises(openai.NotFoundError) as found:
            live.client().chat.completions.create(model=name, messages=QUESTION)
        assert found.value.code == "model_not_found"
        assert "this server has base, cs, hr" in found.value.message
        assert len(found.value.message) < 300


@pytest.mark.parametrize(
    ("values", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.role",
            "'system', 'developer', 'user' or 'assistant'",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages.0.tool_calls", "not permitted"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "messages.0.content"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": float("nan")}, "temperature", "finite number"),
        ({"top_p": -1}, "top_p", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1001}, "max_tokens", "this server writes at most 1,000"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"stop": ["a"] * 5}, "stop", "expected at most 4 strings"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"n": 2}, "n", "not supported by this server: leave it out; it may be 1"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"top_k": 5}, "top_k", "Unknown parameter: 'top_k'."),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "messages.0.content"),
        ({"\ud800": 1}, "\\ud800", "Unknown parameter"),
        ({"messages": [{"role": "user", "content": "x", "\udfff": 1}]}, "messages.0", "valid string"),
        ({"messages": [{"role": "user", "content": "\ufdd2" + "0\ufdd3"}]}, "messages", "Unicode noncharacter"),
    ],
)
def test_requests_that_cannot_be_answered_say_which_field(
    values: dict[str, Any], param: str | None, said: str, live: LiveServer
) -> None:
    body = json.dumps({"model": "cs", "messages": QUESTION, **values})
    response = live.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert said in error["message"]
    if param:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([0, 320], "320 is no token of this model (0 to 319)"),
        ([-1], "-1 is no token"),
        ("", "no tokens"),
        ([], "0 prompts"),
    ],
)
def test_prompts_that_would_break_the_model_are_refused(prompt: Any, said: str, live: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError, match=said.replace("(", r"\(").replace(")", r"\)")):
        live.client().completions.create(model="cs", prompt=prompt)


def test_a_prompt_beyond_the_context_is_refused(live: LiveServer) -> None:
    for prompt, length in (("x" * 4096, 1), ("x" * 4000, 200)):
        with pytest.raises(openai.BadRequestError) as found:
            live.client().completions.create(model="cs", prompt=prompt, max_tokens=length)
        assert (found.value.code, found.value.param) == ("context_length_exceeded", "prompt")
        assert "at most 4,096" in found.value.message
        messages: Any = [{"role": "user", "content": prompt}]
        with pytest.raises(openai.BadRequestError) as found:
            live.client().chat.completions.create(model="cs", messages=messages, max_completion_tokens=length)
        assert (found.value.code, found.value.param) == ("context_length_exceeded", "messages")
        assert length == 1 or f"max_completion_tokens is {length}" in found.value.message


def test_the_limit_on_a_prompt_names_the_field_of_its_request(tiny_model: Path) -> None:
    with LiveServer(tiny_model, {}, Limits(prompt_tokens=20)) as live:
        for path, values, param in (
            ("/v1/completions", {"prompt": "x" * 21}, "prompt"),
            ("/v1/chat/completions", {"messages": QUESTION}, "messages"),
        ):
            error = error_of(live.post(path, json={"model": "base", **values}))
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
            assert "this server takes at most 20" in error["message"]


NO_PROMPT = "expected a text, a list of texts, a list of token ids, or a list of such lists"


@pytest.mark.parametrize(
    ("values", "param", "said"),
    [
        ({"prompt": 5}, "prompt", NO_PROMPT),
        ({"prompt": [1, "a"]}, "prompt", NO_PROMPT),
        ({"prompt": [True]}, "prompt", NO_PROMPT),
        ({"prompt": [[1.5]]}, "prompt", NO_PROMPT),
        ({"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        ({"prompt": ["a", "\ud800"]}, "prompt", "half of a surrogate pair"),
        ({"prompt": []}, "prompt", "0 prompts"),
        ({"prompt": ["a"] * 17}, "prompt", "17 prompts"),
        ({"prompt": [10**4000]}, "prompt", "a number of more than 15 digits is no token"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**4000}, "max_tokens", "a number of more than 15 digits"),
        ({"temperature": 10**4000}, "temperature", "valid number"),
        ({"stop": [1]}, "stop", "expected at most 4 strings"),
        ({"stop": ["\ud800"]}, "stop", "half of a surrogate pair"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "not permitted"),
        ({"messages": QUESTION}, "messages", "Unknown parameter"),
        ({"best_of": 3}, "best_of", "not supported"),
    ],
)
def test_text_completions_that_cannot_be_answered_say_which_field(
    values: dict[str, Any], param: str, said: str, live: LiveServer
) -> None:
    content = json.dumps({"model": "cs", "prompt": "abc", **values})
    response = live.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert said in error["message"]
    assert len(error["message"]) < 300


def test_what_nobody_expected_is_500_in_openais_form(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: ServedModel) -> dict[str, Any]:
        raise ZeroDivisionError("a secret of the server's")

    monkeypatch.setattr(live.server, "_card", breaks)
    response = httpx.get(live.url + "/v1/models")
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in response.text


def test_urls_that_are_none(live: LiveServer) -> None:
    assert error_of(live.post("/v1/embeddings", json={}))["code"] == "unknown_url"
    response = httpx.get(live.url + "/v1/chat/completions")
    assert (response.status_code, error_of(response)["code"]) == (405, "unknown_url")


# -- load, and clients that go --------------------------------------------------------------------------------------


def two_running(endless: LiveServer, **values: Any) -> list[socket.socket]:
    """One after the other: the queue has one place, and both might want it at once."""
    connections = []
    for running in (1, 2):
        connections.append(raw(endless, chat_request(endless, max_tokens=3000, **values)))
        eventually(lambda running=running: endless.engine.running == running)
    return connections


def test_a_client_that_goes_away_frees_its_place(endless: LiveServer) -> None:
    for stream in (True, False):
        before = endless.engine.steps
        connections = two_running(endless, stream=stream)
        waiting = raw(endless, chat_request(endless, stream=stream, max_tokens=3000))
        eventually(lambda: endless.engine.waiting == 1)
        for connection in (*connections, waiting):
            connection.close()
        eventually(lambda: endless.server.idle)
        assert endless.engine.steps - before < 2500, "the answers were not written to their ends"
    assert endless.catalog.base.uses == 0


def test_a_client_of_openais_that_stops_reading_frees_its_place(endless: LiveServer) -> None:
    stream = endless.client().chat.completions.create(model="base", messages=QUESTION, stream=True, max_tokens=3000)
    next(iter(stream))
    assert not endless.server.idle
    before = endless.engine.steps
    stream.close()
    eventually(lambda: endless.server.idle)
    assert endless.engine.steps - before < 2500, "the answer was not written to its end"


def test_a_full_queue_is_429_and_says_when_to_come_back(endless: LiveServer) -> None:
    connections = two_running(endless)
    connections.append(raw(endless, chat_request(endless, max_tokens=3000)))
    eventually(lambda: endless.engine.waiting == 1)
    with pytest.raises(openai.RateLimitError) as found:
        endless.client().chat.completions.create(model="base", messages=QUESTION)
    assert found.value.code == "queue_full"
    assert found.value.response.headers["retry-after"] == "1"
    for connection in connections:
        connection.close()
    eventually(lambda: endless.server.idle)
    assert endless.client().chat.completions.create(model="base", messages=QUESTION, max_tokens=2).choices


def test_more_open_requests_than_may_be_are_503(tiny_model: Path) -> None:
    with LiveServer(tiny_model, {}, Limits(answer_tokens=3000, connections=2), never_ends=True) as live:
        connections = [raw(live, chat_request(live, max_tokens=3000)) for _ in range(2)]
        eventually(lambda: live.engine.running == 2)
        with pytest.raises(openai.InternalServerError) as found:
            live.client().models.list()
        assert (found.value.status_code, found.value.code) == (503, "too_many_connections")
        assert httpx.get(live.url + "/health").status_code == 200
        for connection in connections:
            connection.close()
        eventually(lambda: live.server.open == 0)
        assert live.client().models.list().data


def test_time_that_is_up_is_an_error_and_frees_the_place(tiny_model: Path) -> None:
    """Its time ends here by decree: a busy machine may take seconds to read a prompt."""
    with LiveServer(tiny_model, {}, Limits(answer_tokens=10**6, answer_seconds=600), never_ends=True) as live:
        live.engine.context_length = None  # no answer is whole before its time is up

        def time_is_up() -> None:
            eventually(lambda: live.engine.running == 1, 120)
            (row,) = live.engine._batch.rows
            assert row.seconds == 600
            row.seconds = 1e-9

        client = live.client()
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(time_is_up)
            with pytest.raises(openai.APIStatusError) as found:
                client.chat.completions.create(model="base", messages=QUESTION, max_tokens=10**6)
            ending.result()
        assert (found.value.status_code, found.value.code) == (504, "timeout")
        assert "no whole answer after 1e-09 s" in found.value.message
        stream = client.chat.completions.create(model="base", messages=QUESTION, max_tokens=10**6, stream=True)
        assert next(stream).choices
        time_is_up()
        with pytest.raises(openai.APIError, match=r"no whole answer after 1e-09 s"):
            list(stream)
        eventually(lambda: live.server.idle)


def test_metrics_count_what_happened(tiny_model: Path, adapters: dict[str, Path]) -> None:
    with LiveServer(tiny_model, adapters) as live:
        client = live.client()
        usage = [client.completions.create(model="cs", prompt="abc", temperature=0, max_tokens=n).usage for n in (3, 7)]
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="hr", prompt="x" * 5000)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="secret-name", prompt="abc")
        text = httpx.get(live.url + "/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    written = sum(one.completion_tokens for one in usage)
    assert float(lines['tunesmith_tokens_total{kind="completion",model="cs"}']) == written
    assert float(lines['tunesmith_tokens_total{kind="prompt",model="cs"}']) == 6
    assert float(lines['tunesmith_requests_total{model="cs",outcome="answered"}']) == 2
    assert float(lines['tunesmith_requests_total{model="hr",outcome="refused"}']) == 1
    assert float(lines["tunesmith_request_seconds_count"]) == 3
    assert float(lines["tunesmith_first_token_seconds_count"]) == 2
    assert float(lines["tunesmith_adapters"]) == 2
    assert "secret-name" not in text


def test_names_that_come_and_go_leave_no_counters(tiny_model: Path, adapters: dict[str, Path]) -> None:
    with LiveServer(tiny_model, adapters, Limits(answer_tokens=3000), never_ends=True) as live:

        def labels() -> set[str]:
            return set(re.findall(r'model="([^"]*)"', httpx.get(live.url + "/metrics").text))

        client = live.client()
        for place in range(3):
            name = f"new-{place}"
            live.post("/v1/adapters", json={"name": name, "path": str(adapters["cs"])})
            client.completions.create(model=name, prompt="abc", max_tokens=2)
            live.post("/v1/adapters", json={"name": name, "path": str(adapters["hr"])})
            assert name in labels(), "a replaced one goes on counting"
            httpx.delete(f"{live.url}/v1/adapters/{name}")
        client.completions.create(model="cs", prompt="abc", max_tokens=2)
        assert labels() == {"cs"}
        stream = client.completions.create(model="hr", prompt="abc", max_tokens=1000, stream=True)
        next(iter(stream))
        httpx.delete(f"{live.url}/v1/adapters/hr")
        list(stream)  # which is counted when it ends
        eventually(lambda: labels() == {"cs"})
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="secret-name", prompt="abc")
        assert labels() == {"cs"}


def test_an_engine_that_broke_is_not_healthy(tiny_model: Path) -> None:
    with LiveServer(tiny_model, {}) as live:
        hook, threading.excepthook = threading.excepthook, lambda _: None
        live.engine.between_steps(lambda: 1 / 0)
        eventually(lambda: not live.engine.healthy)
        threading.excepthook = hook
        assert httpx.get(live.url + "/health").json() == {"status": "stopped"}
        with pytest.raises(openai.InternalServerError) as found:
            live.client().chat.completions.create(model="base", messages=QUESTION)
        assert found.value.status_code == 503
