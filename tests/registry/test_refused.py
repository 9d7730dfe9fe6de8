"""An adapter on another base, tokenizer or template than it was trained with: each command refuses, and says what differs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from command_line import tunesmith
from tiny import chat_rows, make_tokenizer, write_jsonl
from trained import copy_run, tiny_base, tiny_run

COMMANDS = {
    "eval": lambda target, base, folder: ("eval", target, "--data", folder / "data.jsonl", "--model", base),
    "chat": lambda target, base, folder: ("chat", target, "--prompt", "Which bin?", "--model", base),
    "merge": lambda target, base, folder: ("merge", target, "--out", folder / "out", "--model", base),
    "verify": lambda target, base, folder: ("adapters", "verify", target, "--model", base),
}


def other_weights(target: Path, base: Path) -> str:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return f"{base}: its weights (sha256 "


def other_tokenizer(target: Path, base: Path) -> str:
    make_tokenizer(merges=[("b", "i")]).save_pretrained(base)
    return f"{base}: its tokenizer (sha256 "


def other_template(target: Path, base: Path) -> str:
    """Of a run its own copy; of an adapter the one beside it."""
    path = target / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "helper"))
    if (target / "config.yaml").is_file():
        return f"{path}: this is not the chat template that the run was trained with; restore it"
    return f"{base}: the chat template (sha256 "


def bases_template(target: Path, base: Path) -> str:
    """Of an adapter that has none beside it."""
    (target / "chat_template.jinja").unlink()
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(template.replace("assistant", "helper"))
    return f"{base}: the chat template (sha256 "


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", [None, other_weights, other_tokenizer, other_template, bases_template])
@pytest.mark.parametrize("part", ["run", "adapter"])
def test_what_differs_is_refused(
    part: str,
    change: Callable[[Path, Path], str] | None,
    command: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base = Path(shutil.copytree(tiny_base(tmp_path_factory), tmp_path / "base"))
    run = copy_run(tiny_run(tmp_path_factory), tmp_path / "run")
    target = run if part == "run" else run.rename(tmp_path / "moved") / "adapter"
    if change is bases_template and part == "run":
        pytest.skip("a run always has its own")
    write_jsonl(tmp_path / "data.jsonl", chat_rows(2))
    said = change(target, base) if change else ""
    result = tunesmith(*COMMANDS[command](target, base, tmp_path))
    if change is None:
        assert (result.code, result.problems) == (0, []), result.err
        return
    if command == "verify":
        assert (result.code, result.problems) == (1, []), result.err
        assert f"DIFFERS  base     {said}" in result.out
        return
    assert (result.code, len(result.problems)) == (2, 1), result.err
    assert result.problems[0].startswith(f"tunesmith: {said}")
    assert not (tmp_path / "out").exists()
