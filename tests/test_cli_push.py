"""`tunesmith push` against a hub on localhost: what it prints, its exit codes, and that the token stays where it was."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import tunesmith
from stub_hub import TOKEN, Repo, StubHub, stub_hub, write_gguf
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


@pytest.mark.parametrize("status", [None, 401, 403, 500])
def test_the_token_is_in_no_file_no_log_and_no_output(
    run: Path, hub: StubHub, tmp_path: Path, status: int | None
) -> None:
    """In a process of its own, which finds the hub and the token as a user gives them, with the library's debug log on."""
    hub.fail = lambda method, path: status if "/preupload/" in path else None
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))} | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_DEBUG": "1",
        "HF_HOME": str(home / "hf"),
        "HOME": str(home),
        "TMPDIR": str(home),
        "TUNESMITH_CACHE": str(home / "cache"),
    }
    # The library's waits between tries (23 s) are not what is tested.
    program = "import time; time.sleep = lambda seconds: None\n" + PROGRAM
    command = [sys.executable, "-c", program, "push", str(run), "--repo", "me/bins"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=home)
    assert result.returncode == {None: 0, 401: 2, 403: 2, 500: 3}[status], result.stderr
    if status is not None:
        assert f"tunesmith: me/bins: the upload failed: the hub answered {status}: " in result.stderr
    assert hub.count("POST", "/preupload/") >= 1
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    for name, content in {
        "stdout": result.stdout.encode(),
        "stderr": result.stderr.encode(),
        **{str(path): path.read_bytes() for path in written},
        **(hub.files("me/bins") if "me/bins" in hub.repos else {}),
    }.items():
        assert TOKEN.encode() not in content, name
        assert TOKEN[5:].encode() not in content, name


def test_the_commands_of_the_page_run(run: Path, hub: StubHub) -> None:
    page = (Path(__file__).parents[1] / "docs" / "hub.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    commands = [line.removeprefix("$ tunesmith ") for line in block.splitlines() if "tunesmith" in line]
    assert tunesmith("merge", run).code == 0
    write_gguf(run / "model-q8_0.gguf", adapter_hash(run / "adapter"))
    for command in commands:
        words = shlex.split(command.replace("RUN", str(run)).replace("ORG/NAME", "me/bins"))
        result = tunesmith(*words)
        assert (result.code, result.problems) == (0, []), command
    assert list(hub.repos) == ["me/bins", "me/bins-merged", "me/bins-gguf"]
    assert "license: apache-2.0" in hub.files("me/bins")["README.md"].decode()
    assert {"model.safetensors", "tokenizer.json", "config.json"} < set(hub.files("me/bins-merged"))
    assert list(hub.files("me/bins-gguf")) == ["model-q8_0.gguf", "README.md"]


def test_a_library_that_logs_says_nothing_of_the_token(
    run: Path, hub: StubHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.fail = lambda method, path: 403 if "/commit/" in path else None
    result = tunesmith("push", run, "--repo", "me/bins")
    assert result.code == 2
    assert TOKEN not in result.out + result.err + caplog.text
