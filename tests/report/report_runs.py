"""Synthetic run folders: what a training run leaves behind, without training."""

from __future__ import annotations

import html
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

from tunesmith.config import config_from_dict
from tunesmith.runs import RunFolder

METADATA = {
    "created": "2026-11-20T09:30:00+00:00",
    "seed": 3407,
    "parent": None,
    "model": {"name": "org/tiny-model", "weight_hash": "9f2c" * 16, "architecture": "LlamaForCausalLM"},
    "tokenizer": {"hash": "ab12" * 16, "chat_template_hash": "cd34" * 16},
    "data": {"path": "train.jsonl", "rows": 1200, "hash": "ef56" * 16},
    "packages": {"torch": "2.13.0", "transformers": "5.17.0", "peft": "0.21.2"},
    "hardware": {"device": "cuda:0", "name": "NVIDIA L4", "memory_gb": 22.0, "capability": [8, 9]},
}

METRICS = {
    "steps": 300,
    "tokens_per_second": 12345.6,
    "examples_per_second": 34.56,
    "peak_memory_gb": 5.3125,
    "train_loss": 0.4321,
    "eval_loss": 0.5678,
    "supervised_tokens": 1234567,
    "wall_seconds": 192.4,
    "trainable_parameters": 4_884_480,
    "total_parameters": 139_399_488,
}


def step_event(step: int, total: int, now: float, **changes: Any) -> dict[str, Any]:
    """A step as the training loop logs it, with a loss that falls noisily."""
    draw = random.Random(step)
    progress = step / total
    return {
        "event": "step",
        "step": step,
        "epoch": 3 * progress,
        "loss": 0.4 + 2 * math.exp(-5 * progress) + draw.gauss(0, 0.08),
        "lr": 2e-4 * min(step / (0.05 * total), 0.5 + 0.5 * math.cos(math.pi * progress)),
        "grad_norm": 0.25 + 0.5 * math.exp(-5 * progress) + abs(draw.gauss(0, 0.05)),
        "examples": 16,
        "tokens": 4096,
        "supervised_tokens": 1024,
        "seconds": 0.5,
        "memory_gb": 5.0 + 0.2 * draw.random(),
        "examples_per_second": 32 + draw.gauss(0, 1),
        "tokens_per_second": 8192 + draw.gauss(0, 150),
        "supervised_tokens_per_second": 2048 + draw.gauss(0, 60),
        "time": round(now - 0.5 * (total - step), 3),
        **changes,
    }


def evaluation(**changes: Any) -> dict[str, Any]:
    """An evaluation file: 200 rows, 41.0 % before and 72.5 % after."""
    outcomes = [(True, False)] * 70 + [(False, True)] * 7 + [(False, False)] * 48 + [(True, True)] * 75
    examples = [
        {
            "line": line,
            "prompt": f"Which intent has the message number {line}: my card has not arrived yet?",
            "expected": "card_arrival",
            "answer": "card_arrival" if correct else "card_linking",
            "correct": correct,
            "baseline_answer": "card_arrival" if base else "I think that the customer would like to know where it is.",
            "baseline_correct": base,
        }
        for line, (correct, base) in enumerate(outcomes, 1)
    ]
    return {
        "task": "classify",
        "n": 200,
        "data": "test.jsonl",
        "created": "2026-11-20T10:00:00+00:00",
        "metrics": {"accuracy": {"value": 0.725, "stderr": 0.0316}, "loss": {"value": 0.5678, "stderr": 0.012}},
        "baseline": {"accuracy": {"value": 0.41, "stderr": 0.0348}, "loss": {"value": 2.345, "stderr": 0.05}},
        "gate": None,
        "examples": examples,
        **changes,
    }


def make_run(
    path: Path,
    settings: dict[str, Any] | None = None,
    events: list[dict[str, Any]] | int = 0,
    metrics: dict[str, Any] | None = None,
    evaluations: dict[str, dict[str, Any]] | None = None,
    metadata: dict[str, Any] = METADATA,
) -> RunFolder:
    """A run folder at `path`. `events` as a number: a start and that many steps, the last one now."""
    config = config_from_dict({"model": {"name": "org/tiny-model"}, **(settings or {})}).resolved()
    run = RunFolder.create(path, config, metadata)
    if isinstance(events, int):
        now = float(round(time.time()))
        start = {"event": "start", "time": now - events / 2}
        events = [start, *(step_event(step, events, now) for step in range(1, events + 1))]
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    if metrics is not None:
        run.write_metrics(metrics)
    for file, content in (evaluations or {}).items():
        (path / "evaluations").mkdir(exist_ok=True)
        (path / "evaluations" / file).write_text(json.dumps(content), encoding="utf-8")
    return run


def page_text(page: str) -> str:
    """The page's visible text: no tags, no style sheet, entities resolved, white space joined."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())
