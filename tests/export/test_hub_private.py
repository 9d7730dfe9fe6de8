"""That no path of this machine and no key goes up with a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hub_runs import record_texts
from stub_hub import StubHub, stub_hub, write_gguf
from trained import copy_run, tiny_run
from tunesmith.errors import UserError
from tunesmith.export.private import is_absolute, leaf, name_of_adapter, refuse_private, without_paths
from tunesmith.registry.records import adapter_hash
from tunesmith.workflows.push import push

NAME = "me/bins"
KEY = "0123456789abcdef0123"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with stub_hub(monkeypatch) as running:
        yield running


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", "/srv/people/ann")
    return copy_run(tiny_run(tmp_path_factory), tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/home/ann/x", True),
        ("/gone/long/ago", True),
        ("/x/", True),
        ("~/x", True),
        ("~ann/x", True),
        ("file:///x", True),
        ("C:\\x", True),
        ("d:/x", True),
        ("\\\\server\\share", True),
        ("/", False),
        ("/think", False),
        ("~", False),
        ("org/name", False),
        ("</s>", False),
        ("\\\\", False),
        ("https://hub/x", False),
        ("runs/first", False),
    ],
)
def test_what_looks_like_a_path(text: str, path: bool) -> None:
    assert is_absolute(text) is path


def test_paths_are_replaced_wherever_they_are() -> None:
    value = {
        "base_model_name_or_path": "C:\\Users\\ann\\base",
        "deep": [{"cache": "/a/b/c"}, "/think", 5, None],
        "base": {"name": "/a/b", "weight_hash": "0"},
        "chat_template": "/home/{{ x }}/",
    }
    assert without_paths(value, "org/base") == {
        "base_model_name_or_path": "org/base",
        "deep": [{"cache": "c"}, "/think", 5, None],
        "base": {"name": "org/base", "weight_hash": "0"},
        "chat_template": "/home/{{ x }}/",
    }
    assert [name_of_adapter(path) for path in ("/runs/one/adapter", "../../one/adapter", "adapter", "../adapter")] == [
        "one",
        "one",
        "adapter",
        "adapter",
    ]
    assert leaf("https://h/x?key=1") == "x"


@pytest.mark.parametrize(
    "text",
    [
        "made in /home/ann/models",
        "made in /Users/ann/models",
        "made in C:\\Users\\ann\\models",
        'as JSON: "D:\\\\Users\\\\ann\\\\models"',
        "file:///home/ann/models",
        "made in /srv/people/ann/models",
        "made in /data/shared/the-run",
    ],
)
def test_a_path_in_any_text_is_refused_by_the_files_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/ann")
    with pytest.raises(
        UserError, match=r"^notes.txt: a path of this machine stands in it .*nothing was uploaded"
    ) as caught:
        refuse_private(
            [("other.txt", b"/think /root /home"), ("notes.txt", text.encode())], None, ["/data/shared/the-run"]
        )
    assert "ann" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (KEY, "the value of \\$WANDB_API_KEY"),
        (f"x={KEY[::-1]};", "the value of \\$OPENAI_API_KEY"),
        ("hf_" + "a1B2" * 9, "a token of the hub"),
        ("sk-proj-" + "a1B2" * 9, "a key of OpenAI or Anthropic"),
        ("ghp_" + "a1B2" * 9, "a token of GitHub"),
        ("AKIA" + "A1B2" * 4, "a key of AWS"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("only-the-hubs", "the hub's token"),
    ],
)
def test_a_key_in_any_text_is_refused_and_not_shown(text: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY[::-1])
    monkeypatch.setenv("A_TOKEN", "none")  # too short to be one
    with pytest.raises(UserError, match=rf"^notes.txt: {found} stands in it; nothing was uploaded") as caught:
        refuse_private([("a.txt", b"none hf_short sk-learn"), ("notes.txt", text.encode())], "only-the-hubs")
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "tokenizer_config.json",
        "tokenizer.json",
        "vocab.json",
        "adapter_config.json",
        "merges.txt",
    ],
)
def test_every_text_of_the_package_is_searched(run: Path, hub: StubHub, name: str) -> None:
    path = run / "adapter" / name
    content = json.loads(path.read_text()) if name == "adapter_config.json" else {}
    note = {**content, "note": "key: hf_" + "a1B2" * 9}
    path.write_text(json.dumps(note))
    record_texts(run)
    with pytest.raises(UserError, match=rf"^{name}: a token of the hub stands in it; nothing was uploaded"):
        push(run, NAME)
    path.write_text(json.dumps({**note, "note": "made in /srv/people/ann/models"}))
    record_texts(run)
    with pytest.raises(UserError, match=rf"^{name}: a path of this machine stands in it"):
        push(run, NAME)
    assert hub.requests == []


def test_text_within_weights_and_the_card_are_searched(
    run: Path, hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "m-q8_0.gguf", adapter_hash(run / "adapter"), note="made in /home/ann/models")
    with pytest.raises(UserError, match=r"^m-q8_0.gguf: a path of this machine stands in it"):
        push(run, NAME, what=str(file))
    write_gguf(file, adapter_hash(run / "adapter"), note="hf_" + "a1B2" * 9)
    with pytest.raises(UserError, match=r"^m-q8_0.gguf: a token of the hub stands in it"):
        push(run, NAME, what=str(file))
    monkeypatch.setenv("WANDB_API_KEY", "the-job-of-the-run")
    metadata = json.loads((run / "metadata.json").read_text())
    (run / "metadata.json").write_text(json.dumps({**metadata, "objective": "the-job-of-the-run"}))
    with pytest.raises(UserError, match=r"^README.md: the value of \$WANDB_API_KEY stands in it"):
        push(run, NAME)
    (run / "metadata.json").write_text(json.dumps(metadata))
    weights = run / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"from": "/home/ann/models"})
    record = run / "adapter" / "tunesmith.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "adapter_sha256": adapter_hash(run / "adapter")}))
    with pytest.raises(UserError, match=r"^adapter_model.safetensors: a path of this machine stands in it"):
        push(run, NAME)
    assert hub.requests == []


def test_nothing_of_this_machine_is_in_what_was_pushed(run: Path, hub: StubHub) -> None:
    push(run, NAME)
    for name, content in hub.files(NAME).items():
        for part in (str(run), str(run.parent), "/tmp/", "pytest-of", "/srv/people"):
            assert part.encode() not in content, (name, part)
    assert np.array_equal(
        np.frombuffer(hub.files(NAME)["adapter_model.safetensors"], np.uint8),
        np.fromfile(run / "adapter" / "adapter_model.safetensors", np.uint8),
    )
