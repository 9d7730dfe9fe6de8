"""`tunesmith export` as a user runs it: the table, the JSON, and one line for what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from command_line import tunesmith
from gguf_models import family
from tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("export") / "tiny", **family("llama"))


def test_two_types_in_one_table(model: Path, tmp_path: Path) -> None:
    result = tunesmith("export", model, "--to", "gguf:f16,q8_0", "--out", tmp_path, "--device", "cpu")
    assert (result.code, result.problems) == (0, [])
    rows = [line.split("│")[1:-1] for line in result.out.splitlines() if line.startswith("│")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert list(cells) == ["f16", "q8_0"]
    assert float(cells["f16"][0].split()[0]) > float(cells["q8_0"][0].split()[0])
    assert float(cells["f16"][1]) < float(cells["q8_0"][1]) < float(cells["q8_0"][2]) == 0.03
    assert float(cells["q8_0"][4]) > 1
    names = [f"tiny-{kind}.{end}" for kind in ("f16", "q8_0") for end in ("Modelfile", "gguf")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert f"  ollama create NAME -f {tmp_path / 'tiny-q8_0.Modelfile'}" in result.out


def test_json_has_every_number(model: Path, tmp_path: Path) -> None:
    result = tunesmith(
        "export", model, "--to", "gguf:q4_k_m", "--out", tmp_path / "a.gguf", "--json", "--device", "cpu"
    )
    found = json.loads(result.out)
    (row,) = found["files"]
    assert (found["lora"], found["ollama_template"], found["notes"]) == (False, "chatml", [])
    assert (row["type"], row["path"]) == ("q4_k_m", str(tmp_path / "a.gguf"))
    assert row["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert 0 < row["kl"] < row["max_kl"] == 0.4
    assert 0.5 < row["top1"] <= 1
    assert row["tokens"] > 100


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--to", "gguf:q7"), "tunesmith: gguf:q7: no such type; expected one of f32, f16, bf16, q8_0, "),
        (("--to", "exe"), "tunesmith: --to exe: expected gguf:TYPE, e.g. gguf:q8_0"),
        (("--to", "gguf:f16", "--lora"), "there is no adapter to write; leave --lora out"),
    ],
)
def test_wrong_requests_are_one_line(arguments: tuple[str, ...], problem: str, model: Path) -> None:
    result = tunesmith("export", model, *arguments)
    assert (result.code, len(result.problems)) == (2, 1)
    assert problem in result.problems[0]


def test_without_the_packages_it_says_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    result = tunesmith("export", model, "--to", "gguf:q8_0", "--out", tmp_path / "out")
    assert result.code == 3
    assert "pip install 'tunesmith[gguf]'" in result.problems[0]
    assert not (tmp_path / "out").exists()


def test_a_file_that_fails_verification_exits_1(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.export import gguf_architectures

    monkeypatch.setattr(
        gguf_architectures, "pair_rows", lambda tensor, heads: tensor
    )  # as without the reordering of q and k
    result = tunesmith("export", model, "--to", "gguf:f16", "--out", tmp_path, "--device", "cpu")
    assert result.code == 1
    assert "f16: llama.cpp does not compute what the source does" in result.problems[0]
    assert list(tmp_path.iterdir()) == []
