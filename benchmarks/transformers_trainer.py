"""`tunesmith.fuse` inside transformers' own Trainer (TRL's SFTTrainer is one): seconds a step with and without it.

    python benchmarks/transformers_trainer.py OUT.json [--model qwen2.5-3b] [--batch 4] [--seq 1024]

PEFT's LoRA with rank 16 on all linear layers of a bf16 base, activations kept, AdamW of PyTorch, random weights and tokens from one seed.
The Trainer is the same but for the one line `fuse(model)`. Medians of 10 steps after 5; nothing is reported unless the
losses agree.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import tunesmith
from tunesmith.hardware import probe
from tunesmith.types import GB
from tunesmith.workflows.bench import Row
from tunesmith.workflows.bench_step import documents, random_model, versions

STEPS, WARM_UP = 15, 5


class Clock(TrainerCallback):
    """Seconds of each step, the device idle before and after."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _wait()
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self.began)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(row: Row, fused: bool) -> dict[str, Any]:
    hardware = probe(row.device)
    dtype = "bf16" if hardware.type == "cuda" else "fp32"
    torch.manual_seed(0)
    base = random_model(row, dtype, hardware.device, quantize=False)
    model = get_peft_model(
        base, LoraConfig(r=row.rank, lora_alpha=2 * row.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    if fused:
        tunesmith.fuse(model)
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in (torch.from_numpy(example.input_ids).long() for example in documents(row, row.documents))
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=len(row.documents),
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                bf16=dtype == "bf16",
                use_cpu=hardware.type == "cpu",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            callbacks=[clock],
        )
        if hardware.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = statistics.median(clock.seconds[WARM_UP:])
    return {
        "fused": fused,
        "seconds": seconds,
        "tokens_per_second": row.tokens / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / GB if hardware.type == "cuda" else None,
        "losses": losses,
        "hardware": hardware.name,
        "versions": versions(row),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen2.5-3b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    row = Row("transformers", options.model, "lora", (options.seq,) * options.batch, device=options.device)
    rows = []
    for fused in (False, True):
        rows.append(run(row, fused))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    first, second = (row["losses"] for row in rows)
    if len(first) != STEPS or any(abs(a - b) > 0.02 * first[0] for a, b in zip(first, second, strict=True)):
        raise SystemExit(f"the losses differ: {first} and {second}")
    options.out.write_text(json.dumps({"workload": row.workload, "rows": rows}, indent=1) + "\n")
    print(f"| {row.workload} | tokens/s | peak GB | loss |\n|---|---|---|---|")
    for result in rows:
        peak = "" if result["peak_gb"] is None else f"{result['peak_gb']:.2f}"
        name = "Trainer, fused model" if result["fused"] else "Trainer"
        losses = result["losses"]
        print(f"| {name} | {result['tokens_per_second']:,.0f} | {peak} | {losses[0]:.3f} → {losses[-1]:.3f} |")


if __name__ == "__main__":
    main()
