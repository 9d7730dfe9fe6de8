"""`tunesmith serve` as a process: it says where it is, drains on SIGTERM, and refuses what cannot be served before it listens."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
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
from transformers import AutoTokenizer

from command_line import Result, tunesmith
from tiny import chat_rows, make_tiny_model, make_tokenizer, write_jsonl
from trained import tiny_base, tiny_run
from tunesmith import api
from tunesmith.config import load_config
from tunesmith.data.chat import ChatFormat
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
        foreign = httpx.get(facts["url"] + "/models", headers={"host": "evil.example"})
        assert foreign.status_code == 403, "a server without a key is asked by its own names"

        def ask(tokens: int, **settings: Any) -> Any:
            return client.completions.create(model="small", prompt="abc", temperature=0, max_tokens=tokens, **settings)

        begins = ask(200).choices[0].text.rstrip("\ufffd")  # half a character, where it was cut
        assert begins
        stream = iter(ask(1500, stream=True))  # longer than all that is asked meanwhile
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
    """And beside it further names are the command line's."""
    named = ("--api-key-env", "SERVE_KEY", "--allowed-host", "box.lan")
    with serving(base, *named, SERVE_KEY="s3cret") as (process, facts):
        assert "s3cret" not in json.dumps(facts)
        assert "s3cret" not in Path(f"/proc/{process.pid}/cmdline").read_text()
        assert httpx.get(facts["url"] + "/models").status_code == 401
        assert openai.OpenAI(base_url=facts["url"], api_key="s3cret").models.list().data[0].id == facts["model"]
        found = {
            host: httpx.get(
                facts["url"] + "/models", headers={"host": host, "authorization": "Bearer s3cret"}
            ).status_code
            for host in ("localhost", "box.lan", "evil.example")
        }
    assert found == {"localhost": 200, "box.lan": 200, "evil.example": 403}


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
        (["--limit", "queue=0"], "the limit queue is 0: expected 1 or more"),
        (
            ["--limit", "template_seconds=inf"],
            "the limit template_seconds is inf: expected more than 0 and at most 31,536,000",
        ),
        (["--limit", "answer_seconds=nan"], "the limit answer_seconds is nan: expected more than 0"),
        (["--limit", "drain_seconds=-1"], "the limit drain_seconds is -1.0: expected more than 0"),
        (["--limit", "template_seconds=1e300"], "the limit template_seconds is 1e+300: expected more than 0"),
        (["--adapter", f"cs={'x' * 5000}"], "cannot be read: File name too long"),
        (["--host", ""], "--host is empty, which would listen on every address"),
        (["--host", " ", "--engine", "vllm"], "--host is empty, which would listen on every address"),
        (["--engine", "tgi"], "--engine tgi: expected tunesmith or vllm"),
        (["--engine", "vllm", "--limit", "queue=2"], "--limit would be ignored"),
        (["--quantization", "int3"], "expected one of nf4, fp4, int8"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: list[str], said: str, base: Path) -> None:
    result = tunesmith("serve", base, "--port", "0", *arguments)
    assert result.code == 2
    assert said in result.problems[0]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("hunter2\n", "the key begins or ends with white space (a line break?)"),
        (" hunter2", "the key begins or ends with white space (a line break?)"),
        ("hunter2é", "character 8 of the key is white space, a control character or not ASCII"),
        ("hunter2\udcff", "character 8 of the key is white space, a control character or not ASCII"),
        ("hun\nter2", "character 4 of the key is white space, a control character or not ASCII"),
    ],
)
@pytest.mark.parametrize("engine", ["tunesmith", "vllm"])
def test_a_key_that_no_header_carries_is_refused_unseen(
    key: str, said: str, engine: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_KEY", key)
    result = tunesmith("serve", base, "--port", "0", "--api-key-env", "SERVE_KEY", "--engine", engine)
    assert result.code == 2
    assert said in result.problems[0]
    assert "hun" not in result.err + result.out


READY = """
import os, signal, sys, urllib.request
import tunesmith

def ready(facts):
    if sys.argv[2] == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        print(urllib.request.urlopen(facts["url"] + "/models", timeout=100).status, flush=True)
        os.kill(os.getpid(), signal.SIGINT)

tunesmith.serve(sys.argv[1], {}, port=0, dtype="fp32", on_ready=ready)
print("drained")
"""


@pytest.mark.parametrize(("does", "out"), [("ask", "200\ndrained\n"), ("stop", "drained\n")])
def test_who_is_told_that_the_server_is_ready_may_ask_and_stop_it_at_once(does: str, out: str, base: Path) -> None:
    command = [sys.executable, "-c", READY, str(base), does]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stdout) == (0, out), ended.stderr


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


def vllm(base: Path, *options: str | Path, **adapters: Path) -> Result:
    """`tunesmith serve --engine vllm` where there is no vLLM: it says what it would run."""
    named = [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
    return tunesmith("serve", base, *named, "--engine", "vllm", *options)


def command_of(result: Result) -> str:
    assert result.code == 3, result.err
    said = result.problems[0]
    begins = "tunesmith: vLLM is not installed here (pip install vllm); the command is: "
    assert said.startswith(begins)
    return said.removeprefix(begins)


def lora(base: Path, folder: Path, template: str | None = None, **settings: Any) -> Path:
    from serving_models import make_adapter

    made = make_adapter(base, folder, seed=1, **settings)
    if template is not None:
        (made / "chat_template.jinja").write_text(template)
    return made


def edited(adapter: Path, to: Path, **values: Any) -> Path:
    """A copy with other settings in its config."""
    shutil.copytree(adapter, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return to


def test_the_vllm_command_is_printed_where_vllm_is_not(run: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("KEY", "s3cret")
    options = ("--port", "9", "--dtype", "bf16", "--max-batch", "64", "--api-key-env", "KEY", "--name", "small")
    result = vllm(base, *options, bins=run)
    assert command_of(result) == (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_API_KEY=$KEY "
        f"vllm serve {base} --served-model-name small --host 127.0.0.1 --port 9 --generation-config vllm --dtype bfloat16 "
        f"--max-num-seqs 64 --enable-lora --max-loras 1 --max-lora-rank 16 --lora-modules bins={run / 'adapter'}"
    )
    assert f"warning: {run}: trained in fp32, served in bf16" in result.err


def test_vllm_is_run_where_it_is(base: Path, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho "$VLLM_API_KEY" "$@"\n')
    program.chmod(0o755)
    command = [sys.executable, "-m", "tunesmith", "serve", str(base), "--engine", "vllm", "--api-key-env", "KEY"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "KEY": "s3cret"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout == (
        f"s3cret serve {base} --served-model-name base-32 --host 127.0.0.1 --port 8000 --generation-config vllm --dtype auto "
        "--max-num-seqs 256\n"
    )
    assert "VLLM_API_KEY=$KEY" in result.stderr
    assert "s3cret" not in result.stderr


def test_what_vllm_would_serve_wrongly_is_refused(run: Path, base: Path, tmp_path: Path) -> None:
    """The same adapters as tunesmith's own engine refuses, and those whose ranks and beginnings vLLM does not take."""
    other = make_tiny_model(tmp_path / "other", seed=8)
    plain = lora(base, tmp_path / "plain")
    wide = lora(base, tmp_path / "wide", r=600)
    for given, name, said in (
        ((other, run), "bins", "are not those that"),
        ((base, plain), "base-32", "the base has this name"),
        ((base, plain), "a/b", "adapter name 'a/b'"),
        ((base, tmp_path / "nowhere"), "x", "not an adapter"),
        ((base, wide), "x", "rank 600, and vLLM holds at most 512"),
        ((base, lora(base, tmp_path / "dora", use_dora=True)), "x", "use_dora is True"),
        ((base, lora(base, tmp_path / "whole", modules_to_save=["lm_head"])), "x", "merge it"),
        (
            (base, edited(plain, tmp_path / "pissa", init_lora_weights="pissa")),
            "x",
            "take the finished run's own adapter",
        ),
        ((base, edited(plain, tmp_path / "start", init_lora_weights="new")), "x", "init_lora_weights is 'new'"),
        ((base, edited(plain, tmp_path / "none", r=None)), "x", "r and lora_alpha must be positive numbers"),
        ((base, edited(plain, tmp_path / "half", rank_pattern={"nothing": 0.5})), "x", "must be whole numbers from 1"),
        ((base, edited(plain, tmp_path / "text", rank_pattern={"nothing": "8"})), "x", "must be whole numbers from 1"),
        ((base, edited(plain, tmp_path / "ranks", r=8)), "x", "adapter_config.json says 8"),
    ):
        result = vllm(given[0], **{name: given[1]})
        assert (result.code, said in result.problems[0]) == (2, True), (said, result.problems)
    result = tunesmith("serve", run, "--engine", "vllm")
    assert (result.code, "is an adapter: serve its base with it" in result.problems[0]) == (2, True)
    stored = Path(shutil.copytree(base, tmp_path / "stored"))
    config = json.loads((stored / "config.json").read_text())
    four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (stored / "config.json").write_text(json.dumps({**config, "quantization_config": four_bits}))
    assert "stored by bitsandbytes, which vLLM 0.33 no longer has" in vllm(stored).problems[0]


def test_vllms_rank_holds_every_adapter(base: Path, tmp_path: Path) -> None:
    small, mixed = lora(base, tmp_path / "small"), lora(base, tmp_path / "mixed", rank_pattern={"q_proj": 40})
    assert "--max-loras 1 --max-lora-rank 8 " in command_of(vllm(base, a=small))
    assert "--max-loras 2 --max-lora-rank 64 " in command_of(vllm(base, a=small, b=mixed))


def test_a_path_with_a_comma_is_json_to_vllm(base: Path, tmp_path: Path) -> None:
    """It takes NAME=PATH only where there is no comma (LoRAParserAction)."""
    folder = lora(base, tmp_path / "a,b")
    words = shlex.split(command_of(vllm(base, x=folder)))
    assert json.loads(words[words.index("--lora-modules") + 1]) == {"name": "x", "path": str(folder)}


def test_vllm_has_one_template_for_all(base: Path, tmp_path: Path) -> None:
    """An adapter without one was trained in the base's. Where all adapters agree the base is asked in theirs, which is said."""
    text = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    one, same = (lora(base, tmp_path / name, template=text) for name in ("one", "same"))
    without, other = lora(base, tmp_path / "without"), lora(base, tmp_path / "other", template=text + "!")
    for adapters in ({"one": one, "other": other}, {"one": one, "without": without}):
        result = vllm(base, **adapters)
        assert result.code == 2
        assert f"the chat templates of {' and '.join(adapters)} differ" in result.problems[0]
    result = vllm(base, one=one, same=same)
    assert command_of(result).endswith(f" --chat-template {one / 'chat_template.jinja'}")
    assert "warning: vLLM has one chat template for all models of a server: base-32 is asked in that" in result.err
    result = vllm(base, without=without)
    assert "--chat-template" not in command_of(result)
    assert "warning" not in result.err


def test_a_base_without_a_template_has_in_vllm_the_one_that_it_has_here(base: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    words = shlex.split(command_of(vllm(plain)))
    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert tokenizer.chat_template is None
    assert Path(words[words.index("--chat-template") + 1]).read_text() == ChatFormat(tokenizer).template


def test_a_runs_template_has_its_variables_in_vllm(base: Path, tmp_path: Path) -> None:
    """The run keeps the template and its variables apart; vLLM is told neither of them but by the file."""
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ mark }}{{ m.content }}<|im_end|>{% endfor %}")
    data = write_jsonl(tmp_path / "train.jsonl", chat_rows(8))
    values = {"model.name": str(base), "data.path": str(data), "data.chat_template": str(template), "training.max_steps": 1,
              "model.dtype": "fp32", "data.chat_template_kwargs": {"mark": "#"}}  # fmt: skip
    api.train(load_config(values=values), tmp_path / "run")
    words = shlex.split(command_of(vllm(base, x=tmp_path / "run")))
    text = Path(words[words.index("--chat-template") + 1]).read_text()
    asked = AutoTokenizer.from_pretrained(base).apply_chat_template(QUESTION, chat_template=text, tokenize=False)
    assert asked == f"#{QUESTION[0]['content']}<|im_end|>"


def test_a_qlora_run_is_said_to_be_served_in_16_bits(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, run = tiny_base(tmp_path_factory, 64), tiny_run(tmp_path_factory, "qlora")
    assert f"warning: {run}: trained over a base in nf4, which vLLM does not have" in vllm(folder, x=run).err
    result = vllm(folder, "--quantization", "nf4", x=run)
    assert (result.code, "vLLM 0.33 has no bitsandbytes" in result.problems[0]) == (2, True)


def test_vllms_adapters_change_at_run_time_only_with_a_key_where_nobody_else_reaches_it(
    run: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "s3cret")
    for host, key, there in (("127.0.0.1", True, True), ("127.0.0.1", False, False), ("0.0.0.0", True, False)):
        said = command_of(vllm(base, "--host", host, *(["--api-key-env", "KEY"] if key else []), bins=run))
        assert f"--host {host}" in said
        assert ("VLLM_ALLOW_RUNTIME_LORA_UPDATING" in said) == there
