"""Runs trained on the tiny model, once a process for each method, for tests that need a finished one.

run = tiny_run(tmp_path_factory, "qlora")   # do not write into it: copy_run(run, tmp_path / "run")
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny import chat_rows, make_tiny_model, write_jsonl

ROWS = 16


def tiny_base(factory: pytest.TempPathFactory, hidden: int = 32) -> Path:
    """The folder of the random base. NF4 blocks hold 64 weights of a row, so QLoRA needs `hidden=64`."""
    folder = factory.getbasetemp() / "trained" / f"base-{hidden}"
    return folder if folder.is_dir() else make_tiny_model(folder, hidden=hidden)


def tiny_data(factory: pytest.TempPathFactory) -> Path:
    """The file that the runs were trained on: `ROWS` questions of unequal length."""
    folder = factory.getbasetemp() / "trained"
    folder.mkdir(exist_ok=True)
    return write_jsonl(folder / "bins.jsonl", chat_rows(ROWS))


def tiny_run(factory: pytest.TempPathFactory, method: str = "lora", **values: Any) -> Path:
    """A finished run of four steps in fp32, at a rate that moves the logits a lot. `values` are settings by dotted key."""
    from tunesmith import api
    from tunesmith.config import load_config

    name = "-".join([method, *(f"{key}={value}" for key, value in values.items())])
    folder = factory.getbasetemp() / "trained" / name.replace("/", "_")
    if not (folder / "metrics.json").is_file():
        settings = {
            "method": method,
            "model.name": str(tiny_base(factory, 64 if method == "qlora" else 32)),
            "model.dtype": "fp32",
            "data.path": str(tiny_data(factory)),
            "optimizer.lr": 1e-2,
            "optimizer.max_grad_norm": 10.0,
            "training.batch_size": 8,
            "training.epochs": 2,
            "evaluation.max_new_tokens": 8,
            **values,
        }
        api.train(load_config(values=settings), folder)
    return folder


def copy_run(run: Path, to: Path) -> Path:
    """A run folder that a test may write into."""
    shutil.copytree(run, to)
    return to


def record_again(run: Path) -> None:
    """Write the hash of a run's adapter into its record, after a test changed the adapter: another one is refused."""
    from tunesmith.files import sha256_file

    record = run / "adapter" / "tunesmith.json"
    own = sha256_file(run / "adapter" / "adapter_model.safetensors")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"adapter_sha256": own}))
