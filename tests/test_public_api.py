"""`import tunesmith`: quick, complete, and what its documentation says."""

from __future__ import annotations

import ast
import inspect
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import tunesmith
from trained import copy_run, tiny_base, tiny_run
from tunesmith import errors

NAMES = [
    "Limits",
    "RunConfig",
    "check_data",
    "compare",
    "data_stats",
    "evaluate",
    "export_model",
    "fuse",
    "list_adapters",
    "load",
    "load_config",
    "merge",
    "preview_data",
    "push",
    "quickstart",
    "reply",
    "resume",
    "serve",
    "show_adapter",
    "split_data",
    "sweep",
    "train",
    "unfuse",
    "verify_adapter",
    "write_report",
]


def test_the_public_names() -> None:
    assert [name for name in dir(tunesmith) if not name.startswith("_") and name not in vars(tunesmith)] == NAMES
    for name in NAMES:
        assert getattr(tunesmith, name).__doc__, name
    assert tunesmith.__version__ == "0.1.0"


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(inspect.getsource(tunesmith))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: (node.module, alias.asname)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: (home, name) for name, home in tunesmith._HOMES.items()}
    assert Path(tunesmith.__file__).with_name("py.typed").exists()


def test_the_page_has_every_name() -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)(?:\([^`]*\))?`", "".join(re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE)))
    assert sorted(listed) == NAMES


def test_the_example_of_the_page_runs(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a run to something served; the server is asked once and told to stop."""
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "runs").mkdir()
    copy_run(tiny_run(tmp_path_factory), tmp_path / "runs" / "support")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE", str(tiny_base(tmp_path_factory)))
    asked: list[str] = []

    def stops_at_once(target: str, adapters: dict[str, str], *, on_ready: Callable[..., None], **settings: Any) -> None:
        def ready(facts: dict[str, Any]) -> None:
            on_ready(facts)
            thread.start()

        thread = threading.Thread(target=ask)
        serve(target, adapters, on_ready=ready, **{**settings, "port": port, "device": "cpu"})
        thread.join()

    def ask() -> None:
        question = {"model": "support", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        client = httpx.Client(transport=httpx.HTTPTransport(retries=10), timeout=60)
        asked.append(client.post(url, json=question).json()["choices"][0]["message"]["role"])
        signal.raise_signal(signal.SIGTERM)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = tunesmith.serve
    monkeypatch.setitem(vars(tunesmith), "serve", stops_at_once)
    exec(example, {})  # noqa: S102 - the page's own code
    assert asked == ["assistant"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'tunesmith' has no attribute 'fine_tune'$"):
        tunesmith.fine_tune  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    script = (
        "import sys, tunesmith\n"
        "print(*sorted(name for name in ('torch', 'transformers', 'pydantic', 'yaml', 'rich', 'typer') "
        "if name in sys.modules))\n"
        "tunesmith.load_config\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines() == ["", "False"]


def test_settings_are_keyword_only_where_their_order_says_nothing() -> None:
    for function, positional in {
        tunesmith.train: ["config", "out"],
        tunesmith.resume: ["run"],
        tunesmith.evaluate: ["target", "data"],
        tunesmith.merge: ["target", "out"],
        tunesmith.write_report: ["run"],
        tunesmith.export_model: ["target", "to", "out"],
        tunesmith.push: ["run", "repo"],
        tunesmith.serve: ["target", "adapters"],
    }.items():
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional


def test_every_error_has_the_exit_code_of_its_kind() -> None:
    codes = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TunesmithError)
    }
    assert codes == {
        "TunesmithError": 1,
        "UserError": 2,
        "ConfigError": 2,
        "DataError": 2,
        "ModelError": 2,
        "RunError": 2,
        "MachineError": 3,
        "VerificationError": 1,
        "Interrupted": 130,
    }
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in codes)
    for kind in (errors.ConfigError, errors.DataError):
        assert kind("one").problems == ["one"]
        assert str(kind(["one", "two"])) == "one\ntwo"


def test_the_example_of_the_documentation_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """api.py opens with it."""
    import tunesmith.api
    from tiny import chat_rows, write_jsonl

    assert tunesmith.api.__doc__ is not None
    example = tunesmith.api.__doc__.split("lazily.\n", 1)[1]
    write_jsonl(tmp_path / "test.jsonl", chat_rows(12))
    (tmp_path / "run.yaml").write_text(
        f"model: {{name: {tiny_model}, dtype: fp32}}\n"
        f"data: {{path: {tmp_path / 'test.jsonl'}}}\n"
        "training: {max_steps: 2}\n"
        "evaluation: {max_new_tokens: 2}\n"
    )
    monkeypatch.chdir(tmp_path)
    exec(example, {})  # noqa: S102 - the page's own code
    metrics = ast.literal_eval(capsys.readouterr().out.strip())
    assert list(metrics) == ["accuracy", "exact_match", "macro_f1", "micro_f1"]
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert "\n  r: 8\n" in (tmp_path / "runs" / "first" / "config.yaml").read_text()
