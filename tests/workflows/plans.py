"""Models, settings and plans that the tests of `tunesmith plan` share."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from measured import RUN
from tunesmith.config import Method, RunConfig, load_config
from tunesmith.measurements import record
from tunesmith.workflows.plan import find_target, plan
from tunesmith.workflows.plan_options import Target

QWEN = "qwen2.5-7b"
QWEN_PARAMETERS = 7_615_616_512  # its model card: 7.61B
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
TINY_PARAMETERS = 2 * 100 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
PACKED = ("data.packing=true",)
ARITHMETIC = {"memory": "arithmetic", "speed": "arithmetic", "runs": 0}


def model_folder(path: Path, **changes: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(TINY | changes))
    return path


def config_of(model: str = QWEN, *settings: str) -> RunConfig:
    return load_config(None, settings, {"model.name": model})


def target_of(gpu: str | None, memory: float | None = None, count: int = 1) -> Target:
    found = find_target(gpu, memory, count)
    assert found is not None
    return found


@cache
def planned(
    model: str = QWEN,
    gpu: str | None = "T4",
    memory: float | None = None,
    settings: tuple[str, ...] = (),
    methods: tuple[Method, ...] = (),
    sequence: int | None = None,
) -> dict[str, Any]:
    """A plan by arithmetic alone. Read it only: several tests have the same one."""
    target = replace(target_of(gpu, memory), measured=())
    if methods:  # as cli/plan.py
        settings = (f"method={'qlora' if 'qlora' in methods else methods[0]}", *settings)
    return plan(config_of(model, *settings), target, methods=methods, sequence=sequence)


def lines_of(result: dict[str, Any]) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in result["advice"])


def measured(tokens_per_second: float = 800.0, peak: float | None = 10.2, **other: Any) -> None:
    """Some run of a 7B with LoRA on an H100 was to reach 1,000 tokens/s, and to take 10 GB."""
    run = replace(RUN, tokens_per_second=tokens_per_second, measured_peak_gb=peak)
    record(replace(run, **other))


def now(gpu: str | None = "H100", *settings: str, memory: float | None = None, **options: Any) -> dict[str, Any]:
    """A plan with what was measured until now."""
    return plan(config_of(QWEN, *settings), target_of(gpu, memory), **options)
