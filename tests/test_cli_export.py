"""`tunesmith export` as a user runs it: the table, the JSON, and one line for what is wrong."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from command_line import tunesmith
from gguf_models import family
from tiny import chat_rows, make_tiny_model, write_jsonl
from trained import copy_run, tiny_base, tiny_run


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
    assert float(cells["f16"][1]) < float(cells["q8_0"][1]) < float(cells["q8_0"][2]) < 0.03
    assert float(cells["q8_0"][4]) > 1
    names = [f"tiny-{kind}.{end}" for kind in ("f16", "q8_0") for end in ("Modelfile", "gguf")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert f"  ollama create NAME -f {tmp_path / 'tiny-q8_0.Modelfile'}" in result.out


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("export-wide") / "tiny", hidden=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("export-data") / "rows.jsonl", chat_rows(60))


def test_two_methods_in_the_same_table(wide: Path, data: Path, tmp_path: Path) -> None:
    result = tunesmith(
        *("export", wide, "--to", "awq,gptq", "--data", data, "--calibration-rows", "12"),
        *("--out", tmp_path, "--device", "cpu"),
    )
    assert (result.code, result.problems) == (0, [])
    rows = [line.split("│")[1:-1] for line in result.out.splitlines() if line.startswith("│")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert list(cells) == ["bf16", "gptq", "awq"]
    size, kl, allowed, top1, perplexity, most, speed = cells["gptq"]
    assert float(size.split()[0]) < float(cells["bf16"][0].split()[0])
    assert 0 < float(kl) < float(allowed) == 0.3
    assert 0.5 < float(top1.rstrip("%")) / 100 <= 1
    assert float(most) == pytest.approx(1.4 * float(cells["bf16"][4]), abs=2e-3)
    assert float(perplexity) < float(most)
    assert float(speed) > 1
    assert f"{tmp_path / 'gptq'}\n{tmp_path / 'awq'}\n" in result.out
    assert (
        "4 bits in groups of 64; in bf16 stay norms, biases and model.embed_tokens.weight, lm_head.weight" in result.out
    )
    assert (
        "note: group size 64: gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj: 64 inputs, no multiple of 128"
        in result.out
    )
    assert "note: awq: 2 mappings were skipped due to incompatible shapes\n" in result.out
    assert "calibrating layers: 2/2" in result.err


def test_the_commands_of_the_page_run(
    wide: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "quantized.md").read_text(encoding="utf-8")
    block = page.split("```console\n")[1].split("```")[0]
    run = tiny_run(tmp_path_factory, "lora", **{"model.name": str(tiny_base(tmp_path_factory, 64))})
    copy_run(run, tmp_path / "runs" / "support")
    monkeypatch.chdir(tmp_path)
    commands = [line.removeprefix("$ tunesmith ") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        named = command.replace("org/model", str(wide)).replace("rows.jsonl", str(data))
        result = tunesmith(*shlex.split(named), "--device", "cpu")
        assert (result.code, result.problems) == (0, []), command
    for folder in ("runs/support/gptq", "exports/gptq", "exports/awq", "model-gptq"):
        assert (tmp_path / folder / "model.safetensors").is_file()


def test_json_of_a_method_alone_on_stdout(wide: Path, data: Path, tmp_path: Path) -> None:
    result = tunesmith(
        "export", wide, "--to", "gptq", "--data", data, "--out", tmp_path / "q", "--json", "--device", "cpu"
    )
    found = json.loads(result.out)
    (row,) = found["files"]
    assert (row["type"], row["path"], row["group_size"]) == ("gptq", str(tmp_path / "q"), 64)
    assert row["bytes"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert row["max_perplexity"] == 1.4 * found["source_perplexity"]
    assert found["calibration"]["from"] == str(data)
    assert found["measured"]["tokens"] == row["tokens"]
    assert found["unquantized"] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_json_has_every_number(model: Path, tmp_path: Path) -> None:
    result = tunesmith(
        "export", model, "--to", "gguf:q4_k_m", "--out", tmp_path / "a.gguf", "--json", "--device", "cpu"
    )
    found = json.loads(result.out)
    (row,) = found["files"]
    assert (found["lora"], found["ollama_template"], found["notes"]) == (False, "chatml", [])
    assert (row["type"], row["path"]) == ("q4_k_m", str(tmp_path / "a.gguf"))
    assert row["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert 0 < row["kl"] < row["max_kl"] < 0.4
    assert 0.5 < row["top1"] <= 1
    assert row["tokens"] > 100


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--to", "gguf:q7"), "tunesmith: gguf:q7: no such type; expected one of f32, f16, bf16, q8_0, "),
        (("--to", "exe"), "tunesmith: --to exe: expected gguf:TYPE, e.g. gguf:q8_0"),
        (("--to", "gguf"), "or gptq, awq, or gptq,awq"),
        (("--to", "gptq:64"), "tunesmith: --to gptq:64: expected gguf:TYPE"),
        (("--to", "gptq", "--lora"), "tunesmith: --lora: --to gptq quantizes whole models"),
        (
            ("--to", "gguf:f16", "--data", "x.jsonl"),
            "tunesmith: --data: only gptq and awq are calibrated; leave it out",
        ),
        (
            ("--to", "gguf:f16", "--data", "x.jsonl", "--calibration-rows", "8"),
            "tunesmith: --data and --calibration-rows: only gptq and awq are calibrated",
        ),
        (("--to", "awq", "--calibration-rows", "0", "--data", "x.jsonl"), "tunesmith: --calibration-rows 0: expected"),
        (("--to", "gptq", "--device", "cpu"), "pass --data FILE with rows of the kind that the model will see"),
        (("--to", "gguf:f16", "--lora"), "there is no adapter to write; leave --lora out"),
    ],
)
def test_wrong_requests_are_one_line(arguments: tuple[str, ...], problem: str, model: Path) -> None:
    result = tunesmith("export", model, *arguments)
    assert (result.code, len(result.problems)) == (2, 1)
    assert problem in result.problems[0]


@pytest.mark.parametrize(
    ("to", "package", "extra"), [("gguf:q8_0", "xllamacpp", "gguf"), ("gptq", "llmcompressor", "gptq")]
)
def test_without_the_packages_it_says_what_to_install(
    to: str, package: str, extra: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = tunesmith("export", model, "--to", to, "--out", tmp_path / "out")
    assert result.code == 3
    assert f"pip install 'tunesmith[{extra}]'" in result.problems[0]
    assert not (tmp_path / "out").exists()


def test_a_file_that_fails_verification_exits_1(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.export import gguf_architectures

    monkeypatch.setattr(
        gguf_architectures, "pair_rows", lambda tensor, heads: tensor
    )  # as without the reordering of q and k
    result = tunesmith("export", model, "--to", "gguf:f16", "--out", tmp_path, "--device", "cpu")
    assert result.code == 1
    assert "the file does not hold the source's weights" in result.problems[0]
    assert list(tmp_path.iterdir()) == []
