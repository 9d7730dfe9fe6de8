"""`tunesmith serve` as a process: it says where it is, drains on SIGTERM, and refuses what cannot be served before it listens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from command_line import tunesmith
from tiny import make_tiny_model, make_tokenizer
from trained import tiny_base, tiny_run
from tunesmith.serving.limits import Limits

QUESTION: list[Any] = [{"role": "user", "content": "Which bin takes the can?"}]


@contextmanager
def serving(*arguments: str | Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server in a process of its own, and what it said when it was ready."""
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "serve",
        *map(str, arguments),
        "--port",
        "0",
        "--json",
        "--dtype",
        "fp32",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.rstrip() == "}":
                break
        assert lines, process.stderr.read() if process.stderr else ""
        yield process, json.loads("".join(lines))
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory, "lora")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory)


@pytest.fixture(scope="module")
def adapter(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from serving_models import make_adapter

    return make_adapter(endless, tmp_path_factory.mktemp("cs") / "cs", seed=1)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose greedy answers never end: its end token's logit is always 0, and some other one is above it."""
    from safetensors.torch import load_file, save_file

    folder = make_tiny_model(tmp_path_factory.mktemp("endless") / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][make_tokenizer().eos_token_id] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_sigterm_drains(endless: Path, adapter: Path) -> None:
    """What runs ends whole; who comes later is told so; then the process ends with 0."""
    slow = ("--limit", "drain_seconds=600", "--limit", "answer_seconds=600")
    with serving(endless, "--adapter", f"cs={adapter}", "--name", "small", *slow) as (process, facts):
        assert (facts["model"], facts["adapters"], facts["notes"]) == ("small", ["cs"], [])
        client = openai.OpenAI(base_url=facts["url"], api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["small", "cs"]

        def ask(tokens: int, **settings: Any) -> Any:
            return client.completions.create(model="small", prompt="abc", temperature=0, max_tokens=tokens, **settings)

        begins = ask(200).choices[0].text.rstrip("\ufffd")  # half a character, where it was cut
        assert begins
        stream = iter(ask(4000, stream=True))  # longer than all that is asked meanwhile
        text = next(stream).choices[0].text
        process.send_signal(signal.SIGTERM)
        root = facts["url"].removesuffix("/v1")
        deadline = time.monotonic() + 20
        while (health := httpx.get(f"{root}/health")).status_code == 200:
            assert time.monotonic() < deadline
        assert health.json() == {"status": "draining"}
        with pytest.raises(openai.InternalServerError) as refused:
            ask(5)
        assert (refused.value.status_code, refused.value.code) == (503, "draining")
        rest = [chunk.choices[0] for chunk in stream]
        assert (text + "".join(choice.text for choice in rest)).startswith(begins)
        assert rest[-1].finish_reason == "length"
        assert process.wait(20) == 0


@pytest.mark.parametrize(("drain_seconds", "signals"), [("0.5", 1), ("60", 2)])
def test_draining_has_an_end(drain_seconds: str, signals: int, endless: Path) -> None:
    """By the limit, or by a second signal."""
    limits = ("--limit", "answer_tokens=4000", "--limit", f"drain_seconds={drain_seconds}")
    with serving(endless, "--name", "base", *limits) as (process, facts):
        client = openai.OpenAI(base_url=facts["url"], api_key="none", max_retries=0)
        cut: list[str] = []

        def ask() -> None:
            try:
                client.completions.create(model="base", prompt="abc", temperature=0, max_tokens=4000)
            except openai.APIError as error:
                cut.append(str(error.code))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        root = facts["url"].removesuffix("/v1")
        while "tunesmith_running_requests 8.0" not in httpx.get(f"{root}/metrics").text:
            assert all(thread.is_alive() for thread in threads)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if signals == 2:  # two that come at once are one
            while httpx.get(f"{root}/health").status_code == 200:
                assert time.monotonic() - start < 20
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - start < 30
        for thread in threads:
            thread.join(10)
        assert cut == ["draining"] * 8


def test_the_help_fits_a_small_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = tunesmith("serve", "--help").out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_the_page_names_every_limit_with_its_default() -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page, re.MULTILINE)
    assert {name for name, _ in rows} == {field.name for field in fields(Limits)}
    for name, text in rows:
        default = getattr(Limits(), name)
        wanted = "what the model was made for" if default is None else f"{default:,.0f}"
        assert text.startswith(wanted), f"{name} is {wanted}"


def test_the_key_comes_from_the_environment_and_shows_nowhere(base: Path) -> None:
    with serving(base, "--api-key-env", "SERVE_KEY", SERVE_KEY="s3cret") as (process, facts):
        assert "s3cret" not in json.dumps(facts)
        assert "s3cret" not in Path(f"/proc/{process.pid}/cmdline").read_text()
        assert httpx.get(facts["url"] + "/models").status_code == 401
        assert openai.OpenAI(base_url=facts["url"], api_key="s3cret").models.list().data[0].id == facts["model"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "cs"], "--adapter cs: expected NAME=PATH"),
        (["--adapter", "cs=x", "--adapter", "cs=y"], "the name cs is given twice"),
        (["--adapter", "a/b=x"], "adapter name 'a/b': expected 1 to 100 letters"),
        (["--adapter", "base-32=x"], "the base has this name"),
        (["--adapter", "cs=nowhere"], "nowhere: not an adapter"),
        (["--api-key-env", "NO_SUCH_KEY"], "the environment has no such variable"),
        (["--limit", "colour=3"], "--limit colour=3: expected one of body_bytes,"),
        (["--limit", "queue=many"], "'many' is no whole number"),
        (["--limit", "queue=0"], "expected more than 0"),
        (["--engine", "tgi"], "--engine tgi: expected tunesmith or vllm"),
        (["--engine", "vllm", "--quantization", "nf4"], "--quantization would be ignored"),
        (["--quantization", "int3"], "expected one of nf4, fp4, int8"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: list[str], said: str, base: Path) -> None:
    result = tunesmith("serve", base, "--port", "0", *arguments)
    assert result.code == 2
    assert said in result.problems[0]


def test_an_adapter_is_no_base(run: Path) -> None:
    for target in (run, run / "adapter"):
        result = tunesmith("serve", target)
        assert result.code == 2
        assert "is an adapter: serve its base with it, `tunesmith serve " in result.problems[0]
        assert f"--adapter NAME={target}`" in result.problems[0]


def test_a_run_on_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=8)
    result = tunesmith("serve", other, "--adapter", f"bins={run}", "--port", "0")
    assert result.code == 2
    assert "are not those that" in result.problems[0]


def test_a_port_that_is_taken_is_known_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = tunesmith("serve", tmp_path / "nothing here", "--port", str(port))
    assert result.code == 3
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in result.problems[0]


# -- vLLM -------------------------------------------------------------------------------------------------------------


def test_the_vllm_command_is_printed_where_vllm_is_not(run: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("KEY", "s3cret")
    options = ("--port", "9", "--dtype", "bf16", "--max-batch", "64", "--api-key-env", "KEY", "--name", "small")
    result = tunesmith("serve", base, "--adapter", f"bins={run}", "--engine", "vllm", *options)
    assert result.code == 3
    assert result.problems[0] == (
        "tunesmith: vLLM is not installed here (pip install vllm); the command is: "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_API_KEY=$KEY "
        f"vllm serve {base} --served-model-name small --host 127.0.0.1 --port 9 --dtype bfloat16 --max-num-seqs 64 "
        f"--enable-lora --max-loras 1 --max-lora-rank 16 --lora-modules bins={run / 'adapter'} "
        f"--chat-template {run / 'chat_template.jinja'}"
    )


def test_vllm_is_run_where_it_is(base: Path, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho "$VLLM_API_KEY" "$@"\n')
    program.chmod(0o755)
    command = [sys.executable, "-m", "tunesmith", "serve", str(base), "--engine", "vllm", "--api-key-env", "KEY"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "KEY": "s3cret"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout == (
        f"s3cret serve {base} --served-model-name base-32 --host 127.0.0.1 --port 8000 --dtype auto --max-num-seqs 256\n"
    )
    assert "VLLM_API_KEY=$KEY" in result.stderr
    assert "s3cret" not in result.stderr


def test_vllm_has_one_template_and_ranks_up_to_512(base: Path, run: Path, tmp_path: Path) -> None:
    for name, rank, text in (("one", 40, "a"), ("two", 600, "b")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {"q_proj": rank}}))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        (folder / "chat_template.jinja").write_text(text)
    one, two = (("--adapter", f"{name}={tmp_path / name}") for name in ("one", "two"))
    result = tunesmith("serve", base, *one, *two, "--engine", "vllm")
    assert (result.code, "templates of one and two differ" in result.problems[0]) == (2, True)
    result = tunesmith("serve", base, *two, "--engine", "vllm")
    assert "rank 600, and vLLM holds at most 512" in result.problems[0]
    if result := tunesmith("serve", base, *one, "--engine", "vllm"):
        assert "--max-lora-rank 64" in result.problems[0]


def test_vllms_adapters_change_at_run_time_only_where_nobody_else_reaches_it(run: Path, base: Path) -> None:
    for host, there in (("127.0.0.1", True), ("0.0.0.0", False)):
        options = ("--adapter", f"bins={run}", "--engine", "vllm", "--host", host)
        said = tunesmith("serve", base, *options).problems[0]
        assert f"--host {host}" in said
        assert ("VLLM_ALLOW_RUNTIME_LORA_UPDATING" in said) == there
