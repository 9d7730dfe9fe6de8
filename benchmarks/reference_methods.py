"""The reference engine's methods side by side on real weights and real data: quality, speed, memory.

    python benchmarks/reference_methods.py MODEL OUT [NAME ...]

MODEL is a folder or a .gguf file (SmolLM2-135M-Instruct was used). Each setting trains one epoch on the quickstart's
1,340 Banking77 questions (batch 16) and answers its 400 test questions greedily. Prints a Markdown table; writes
OUT/reference_methods.json with versions and hardware beside each row.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import load_config
from tunesmith.data.formats import read_examples
from tunesmith.evaluation.answers import generate_answers
from tunesmith.evaluation.statistics import mean
from tunesmith.workflows.quickstart import files
from tunesmith.workflows.train import start

SETTINGS: dict[str, list[str]] = {
    "lora bf16": [],
    "lora bf16 padded": ["data.packing=false"],
    "lora bf16 token budget": ["training.micro_batch_size=4", "training.micro_batch_tokens=2048"],
    "lora bf16 by tokens": [
        "training.micro_batch_size=4",
        "training.micro_batch_tokens=1024",
        "training.batch_tokens=1024",
        "data.max_seq_length=1024",
    ],
    "lora bf16 min": ["memory.mode=min"],
    "lora fp16": ["model.dtype=fp16"],
    "lora fp32": ["model.dtype=fp32"],
    "qlora nf4": ["method=qlora"],
    "qlora paged min": ["method=qlora", "optimizer.name=paged_adamw_8bit", "memory.mode=min"],
    "qlora int8": ["method=qlora", "quantization.scheme=int8"],
    "full": ["method=full", "optimizer.lr=1e-4"],
    "full paged 32-bit": ["method=full", "optimizer.lr=1e-4", "optimizer.name=paged_adamw_32bit"],
}


def measure(name: str, model: str, out: Path) -> dict[str, Any]:
    """Train and evaluate one setting; returns its row."""
    folder = files()
    values = {
        "model.name": model,
        "data.path": str(folder / "train.jsonl"),
        "training.epochs": 1,
        "data.packing": True,
        "training.micro_batch_size": 16,
        "optimizer.lr": 1e-3,
        "evaluation.max_new_tokens": 12,
        "evaluation.batch_size": 400,
    }
    config = load_config(None, SETTINGS[name], values)
    session = start(config, out / name.replace(" ", "-"))
    metrics = session.train().metrics
    rows = read_examples(folder / "test.jsonl").examples
    began = time.perf_counter()
    answers = generate_answers(session.forward, session.tokenizer, session.chat, rows, config.evaluation)
    seconds = time.perf_counter() - began
    accuracy = mean([float(row.correct) for row in answers])
    return {
        "setting": name,
        "accuracy": accuracy.value,
        "stderr": accuracy.stderr,
        "train_seconds": metrics["train_seconds"],
        "examples_per_second": metrics["examples_per_second"],
        "tokens_per_second": metrics["tokens_per_second"],
        "peak_memory_gb": metrics["peak_memory_gb"],
        "predicted_peak_gb": session.plan.predicted_peak_gb,
        "train_loss": metrics["train_loss"],
        "eval_seconds": seconds,
        "metadata": session.run.metadata,
    }


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    results = []
    print("| setting | accuracy | loss | train s | examples/s | tokens/s | peak GB (predicted) | 400 answers s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in sys.argv[3:] or SETTINGS:
        row = measure(name, model, out / "runs")
        results.append(row)
        (out / "reference_methods.json").write_text(json.dumps(results, indent=1))
        print(
            f"| {name} | {row['accuracy']:.3f} ± {row['stderr']:.3f} | {row['train_loss']:.3f} | {row['train_seconds']:.1f} "
            f"| {row['examples_per_second']:.0f} | {row['tokens_per_second']:.0f} "
            f"| {row['peak_memory_gb']:.2f} ({row['predicted_peak_gb']:.2f}) | {row['eval_seconds']:.1f} |",
            flush=True,
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
