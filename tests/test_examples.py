"""The examples run, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import chat_rows, write_jsonl

EXAMPLES = Path(__file__).parents[1] / "examples"


def losses(out: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step \d+ loss ([\d.]+)$", out, re.MULTILINE)]


def test_trls_trainer_gives_the_same_losses_on_fused_layers(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", chat_rows(24, seed=1))
    found = {}
    for name, extra in {"fused": [], "own": ["--no-fuse"]}.items():
        command = [sys.executable, EXAMPLES / "trl_sft.py", "--model", tiny_model, "--data", data, "--steps", "4"]
        result = subprocess.run(
            [*map(str, command), "--out", str(tmp_path / name), *extra],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "hf")},
        )
        assert result.returncode == 0, result.stderr[-2000:]
        assert ("fused engine: 2 of 2 layers (Llama)" in result.stdout) == (name == "fused")
        found[name] = losses(result.stdout)
    assert len(found["own"]) == 4
    assert found["own"][-1] < found["own"][0]
    assert found["fused"] == pytest.approx(found["own"], abs=2e-4)
