"""`tunesmith push` against a hub on localhost: what it prints, its exit codes, and that the token stays where it was."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import tunesmith
from stub_hub import DROP, STALL, TOKEN, Repo, StubHub, stub_hub, write_gguf
from trained import copy_run, tiny_run
from tunesmith.registry.records import adapter_hash

PROGRAM = """
import sys
from tunesmith.cli import main
sys.argv = ["tunesmith", *sys.argv[1:]]
main()
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with stub_hub(monkeypatch) as running:
        yield running


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return copy_run(tiny_run(tmp_path_factory), tmp_path / "run")


def test_push_says_where_it_is_and_what_was_left_out(run: Path, hub: StubHub) -> None:
    (run / "adapter" / "optimizer.pt").write_bytes(b"x")
    result = tunesmith("push", run, "--repo", "me/bins")
    assert (result.code, result.problems) == (0, [])
    lines = result.out.splitlines()
    assert lines[0].startswith(f"{hub.url}/me/bins (private, main, commit ")
    assert lines[0].endswith(
        "): 4 files (0.1 MB) and the model card; the hub lists them with the sizes and hashes that were sent"
    )
    assert lines[1:] == [
        "left out: README.md, optimizer.pt",
        "the card has no hub id of the base, which was read from a folder: --base-model ORG/NAME gives it",
    ]
    assert sorted(hub.files("me/bins")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tunesmith.json",
    ]


def test_push_in_json(run: Path, hub: StubHub) -> None:
    options = ["--public", "--revision", "v1", "--license", "mit", "--base-model", "org/base", "--json"]
    result = tunesmith("push", run, "--repo", "me/bins", *options)
    assert (result.code, result.problems) == (0, [])
    value = json.loads(result.out)
    assert {key: value[key] for key in ("repo", "url", "what", "private", "revision", "base_model", "left_out")} == {
        "repo": "me/bins",
        "url": f"{hub.url}/me/bins",
        "what": "adapter",
        "private": False,
        "revision": "v1",
        "base_model": "org/base",
        "left_out": ["README.md"],
    }
    assert hub.repos["me/bins"].private is False
    assert {file["path"]: file["size"] for file in value["files"]} == {
        name: len(content) for name, content in hub.files("me/bins", "v1").items() if name != "README.md"
    }


def test_the_exit_code_says_whose_fault_it_is(run: Path, hub: StubHub, tmp_path: Path) -> None:
    def problem(*options: str) -> tuple[int, str]:
        result = tunesmith("push", run, "--repo", "me/bins", *options)
        (line,) = result.problems
        assert result.out == ""
        return result.code, line

    assert problem("--what", "merged") == (
        2,
        f"tunesmith: {run}/merged: missing; `tunesmith merge {run}` makes it",
    )
    hub.fail = lambda method, path: 503 if "/commit/" in path else None
    code, line = problem()
    assert (code, line) == (
        3,
        "tunesmith: me/bins: the commit failed: the hub answered 503: the hub is out of order; try again later, what was "
        "uploaded is not uploaded again",
    )
    hub.fail = lambda method, path: None
    hub.spoil = lambda path, entry: None if path == "tunesmith.json" else entry
    code, line = problem()
    assert code == 1
    assert line.startswith(
        "tunesmith: me/bins: the hub does not list what was sent: tunesmith.json is missing. Push again"
    )
    hub.repos["me/bins"] = Repo(private=False)
    code, line = problem()
    assert code == 2
    assert "me/bins: exists and is public: anyone could read what is pushed there. Pass --public" in line


def test_the_token_is_no_option(run: Path, hub: StubHub) -> None:
    result = tunesmith("push", run, "--repo", "me/bins", "--token", TOKEN)
    assert result.code == 2
    assert result.problems[0].startswith("tunesmith: No such option: --token ")
    assert hub.requests == []


def environment(hub: StubHub, home: Path) -> dict[str, str]:
    """What a user gives a process of its own, with the library's debug log on."""
    home.mkdir()
    return {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))} | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_DEBUG": "1",
        "HF_HOME": str(home / "hf"),
        "HOME": str(home),
        "TMPDIR": str(home),
        "TUNESMITH_CACHE": str(home / "cache"),
    }


def assert_nowhere(texts: dict[str, bytes]) -> None:
    """The token is in none of the texts, whole, without its first letters, in base64 or in a JSON string."""
    for name, content in texts.items():
        for form in (TOKEN.encode(), TOKEN[5:].encode(), base64.b64encode(TOKEN.encode()).rstrip(b"=")):
            assert form not in content, name


@pytest.mark.parametrize("status", [None, 401, 500])
def test_the_token_is_in_no_file_no_log_and_no_output(
    run: Path, hub: StubHub, tmp_path: Path, status: int | None
) -> None:
    """In a process of its own, which finds the hub and the token as a user gives them."""
    hub.fail = lambda method, path: status if "/preupload/" in path else None
    home = tmp_path / "home"
    # The library's waits between tries (23 s) are not what is tested.
    program = "import time; time.sleep = lambda seconds: None\n" + PROGRAM
    command = [sys.executable, "-c", program, "push", str(run), "--repo", "me/bins", "--json"]
    given = environment(hub, home)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=given, cwd=home)
    assert result.returncode == {None: 0, 401: 2, 500: 3}[status], result.stderr
    if status is not None:
        assert f"tunesmith: me/bins: the upload failed: the hub answered {status}: " in result.stderr
    assert hub.count("POST", "/preupload/") >= 1
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert_nowhere(
        {
            "stdout": result.stdout.encode(),
            "stderr": result.stderr.encode(),
            **{str(path): path.read_bytes() for path in written},
            **(hub.files("me/bins") if "me/bins" in hub.repos else {}),
        }
    )


FAILURES: list[tuple[str, int, int, str]] = [
    ("/api/models/me/bins", 401, 2, "the hub answered 401: the token is not valid"),
    ("/repos/create", 403, 2, "the hub answered 403: the token may not do this"),
    ("/preupload/", 404, 2, "the hub answered 404: there is no such repository or revision"),
    ("/commit/", 409, 2, "the hub answered 409: it conflicts"),
    ("/lfs/", 413, 2, "the hub answered 413: a file is larger than the hub takes"),
    ("/commit/", 413, 2, "the hub answered 413: a file is larger than the hub takes"),
    ("/repos/create", 429, 3, "the hub answered 429: too many requests"),
    ("/commit/", 429, 3, "the hub answered 429: too many requests"),
    ("/lfs/", 500, 3, "the hub answered 500: the hub is out of order"),
    ("/objects/batch", 403, 2, "the hub answered 403: the token may not do this"),
    ("/lfs/", DROP, 3, "the hub did not answer 3 times in a row"),
    ("/commit/", DROP, 3, "the hub did not answer 3 times in a row"),
    ("/lfs-verify", 400, 2, "the hub answered 400: what was sent was refused as malformed"),
]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("place", "status", "code", "said"), FAILURES)
def test_no_failure_shows_the_token(
    run: Path,
    hub: StubHub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    place: str,
    status: int,
    code: int,
    said: str,
    as_json: bool,
) -> None:
    for name in ("", "huggingface_hub", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    hub.headers = {"Retry-After": "3", "Location": f"https://hub.example/?token={TOKEN}"}
    hub.fail = lambda method, path: status if place in path else None
    result = tunesmith("push", run, "--repo", "me/bins", *(["--json"] if as_json else []))
    (line,) = result.problems
    assert result.code == code
    assert said in line
    assert result.out == ""
    files = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert_nowhere({"out": result.out.encode(), "err": result.err.encode(), "log": caplog.text.encode(), **files})


def test_an_object_that_the_hub_refuses_shows_no_token(
    run: Path, hub: StubHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.refuse_objects = True
    result = tunesmith("push", run, "--repo", "me/bins")
    assert result.code == 3
    assert result.problems == [
        "tunesmith: me/bins: the upload failed (ValueError); push again: what was uploaded is not uploaded again"
    ]
    assert_nowhere({"err": result.err.encode(), "log": caplog.text.encode()})
    assert hub.files("me/bins") == {}


@pytest.mark.parametrize("place", ["/lfs/", "/commit/"])
def test_an_interruption_leaves_the_repository_as_it_was(run: Path, hub: StubHub, tmp_path: Path, place: str) -> None:
    hub.repos["me/bins"] = Repo(private=True, branches={"main": {"old.txt": (b"x", False)}})
    reached = threading.Event()

    def stall(method: str, path: str) -> int | None:
        if place not in path:
            return None
        reached.set()
        return STALL

    hub.fail = stall
    home = tmp_path / "home"
    given = environment(hub, home)
    # A shell starts background jobs with SIGINT ignored, and Python leaves it so.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + PROGRAM
    command = [sys.executable, "-c", program, "push", str(run), "--repo", "me/bins"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given, cwd=home
    ) as process:
        try:
            assert reached.wait(240), hub.requests
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=50)  # the hub would be waited for for three minutes
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert hub.files("me/bins") == {"old.txt": b"x"}
    assert_nowhere({"out": out.encode(), "err": err.encode()})


def test_a_hub_that_stops_answering_is_one_line(run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.export.hub_client.SILENCE", 0.5)
    hub.fail = lambda method, path: STALL if "/commit/" in path else None
    result = tunesmith("push", run, "--repo", "me/bins")
    assert (result.code, result.problems) == (
        3,
        [
            "tunesmith: me/bins: the commit failed: the hub did not answer 3 times in a row; push again: what was uploaded is not "
            "uploaded again"
        ],
    )
    assert hub.files("me/bins") == {}


def test_what_was_deleted_is_said(run: Path, hub: StubHub) -> None:
    hub.repos["me/bins"] = Repo(private=True, branches={"main": {"pytorch_model.bin": (b"x", True)}})
    result = tunesmith("push", run, "--repo", "me/bins")
    assert result.code == 2
    assert "me/bins: pytorch_model.bin: other weights, which loaders could take instead of these" in result.problems[0]
    result = tunesmith("push", run, "--repo", "me/bins", "--replace")
    assert (result.code, result.problems) == (0, [])
    assert "deleted there, weights that were not in this push: pytorch_model.bin" in result.out.splitlines()
    assert "pytorch_model.bin" not in hub.files("me/bins")


def test_the_commands_of_the_page_run(run: Path, hub: StubHub) -> None:
    page = (Path(__file__).parents[1] / "docs" / "hub.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    commands = [line.removeprefix("$ tunesmith ") for line in block.splitlines() if "tunesmith" in line]
    assert tunesmith("merge", run).code == 0
    (run / "gguf").mkdir()
    write_gguf(run / "gguf" / "bins-q8_0.gguf", adapter_hash(run / "adapter"))
    for command in commands:
        words = shlex.split(command.replace("RUN", str(run)).replace("ORG/NAME", "me/bins").replace("NAME", "bins"))
        result = tunesmith(*words)
        assert (result.code, result.problems) == (0, []), command
    assert list(hub.repos) == ["me/bins", "me/bins-merged", "me/bins-gguf"]
    assert "license: apache-2.0" in hub.files("me/bins")["README.md"].decode()
    assert {"model.safetensors", "tokenizer.json", "config.json"} < set(hub.files("me/bins-merged"))
    assert list(hub.files("me/bins-gguf")) == ["bins-q8_0.gguf", "README.md"]


def test_a_library_that_logs_says_nothing_of_the_token(
    run: Path, hub: StubHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.fail = lambda method, path: 403 if "/commit/" in path else None
    result = tunesmith("push", run, "--repo", "me/bins")
    assert result.code == 2
    assert TOKEN not in result.out + result.err + caplog.text
