"""`tunesmith adapters`, and the options of `tunesmith merge`, as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import tunesmith
from trained import copy_run, tiny_run


@pytest.fixture
def runs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs/first; it is the current one."""
    copy_run(tiny_run(tmp_path_factory), tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_list_shows_what_is_there(runs: Path) -> None:
    copy_run(runs / "first", runs / "[bold]evil\x1b[31m")
    result = tunesmith("adapters", "list")
    assert (result.code, result.problems) == (0, [])
    lines = result.out.splitlines()
    assert lines[0].split() == [
        "adapter",
        "base",
        "weights",
        "data",
        "settings",
        "targets",
        "MB",
        "date",
        "metric",
        "trained",
        "on",
        "from",
    ]
    assert "first" in result.out
    assert "[bold]evil\\x1b[31m" in result.out.replace("\n", "")
    assert "\x1b[31m" not in result.out
    found = json.loads(tunesmith("adapters", "list", "--json").out)["adapters"]
    assert [record["name"] for record in found] == ["[bold]evil\x1b[31m", "first"]
    assert json.loads(tunesmith("adapters", "list", runs, "--json").out)["adapters"][1]["rank"] == 16
    shown = " ".join(result.out.split())
    assert found[1]["data_hash"][:8] in result.out
    assert found[1]["settings"]["optimizer.lr"] == 0.01
    for text in ("alpha 32", "lr 0.01", "epochs"):
        assert text in shown.replace(" ", "") or all(word in shown for word in text.split())
    missing = tunesmith("adapters", "list", "absent")
    assert (missing.code, missing.problems) == (
        2, ["tunesmith: absent: no such folder; name one that holds runs or adapters"]
    )  # fmt: skip


def test_show_prints_all_of_it(runs: Path) -> None:
    result = tunesmith("adapters", "show", runs / "first")
    assert (result.code, result.problems) == (0, [])
    for line in ("name          first", "rank          16", "kind          lora"):
        assert line in result.out.splitlines()
    assert '"seed": ' in result.out
    assert json.loads(tunesmith("adapters", "show", runs / "first", "--json").out)["metadata"]["method"] == "lora"


def test_verify_exits_with_one_when_something_differs(runs: Path) -> None:
    result = tunesmith("adapters", "verify", runs / "first", "--dtype", "bf16")
    assert (result.code, result.problems) == (0, [])
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        ["ok", "file"], ["ok", "config"], ["ok", "tensors"], ["ok", "base"], ["ok", "reload"],
    ]  # fmt: skip
    assert lines[5].startswith("in bf16 over a base that is not quantized instead of as trained: KL ")
    with (runs / "first" / "adapter" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x00\x3f")
    result = tunesmith("adapters", "verify", runs / "first")
    assert (result.code, result.problems) == (1, [])
    assert result.out.startswith("DIFFERS  file     adapter_model.safetensors has sha256 ")
    value = tunesmith("adapters", "verify", runs / "first", "--json")
    assert (value.code, json.loads(value.out)["ok"]) == (1, False)


def test_merge_takes_several(runs: Path) -> None:
    copy_run(runs / "first", runs / "second")
    out = runs.parent / "both"
    result = tunesmith(
        "merge", runs / "first", runs / "second", "--method", "linear", "--weights", "0.7,0.3", "--out", out, "--json"
    )
    assert (result.code, result.problems) == (0, [])
    assert json.loads(result.out)["path"] == str(out)
    assert (out / "model.safetensors").is_file()
    wrong = tunesmith("merge", runs / "first", runs / "second", "--method", "linear", "--weights", "a,b")
    assert (wrong.code, wrong.problems) == (
        2, ["tunesmith: --weights is 'a,b': expected numbers with commas between them, e.g. 0.7,0.3"]
    )  # fmt: skip


def test_merge_says_how_far_either_base_is_from_what_was_trained(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = copy_run(tiny_run(tmp_path_factory, "qlora"), tmp_path / "run")
    result = tunesmith("merge", run, "--onto", "quantized")
    assert (result.code, result.problems) == (0, [])
    assert result.out.splitlines()[1].startswith(
        "merged onto the dequantized weights; from the quantized base with its adapter, as trained, KL is "
    )
