"""Full fine-tuning with either engine: tokens/s, peak memory, and losses on one batch. What `model.engine: auto` rests on.

    python benchmarks/full_fine_tuning.py OUT.json [--model qwen2.5-0.5b] [--batch 8] [--seq 1024]

Weights and AdamW's 8-bit moments as `tunesmith train` keeps them (weights in fp32, products under autocast), random
weights and tokens from one seed, activations kept. Both engines in one process, one after the other; medians of 6 steps
after 5. The engines' losses must agree, or nothing is reported.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch

from tunesmith.hardware import compute_dtype, probe, torch_dtype
from tunesmith.models.adapters import count_parameters
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import engine_of
from tunesmith.training.loop import accumulate_gradients
from tunesmith.training.objectives import SupervisedFineTuning
from tunesmith.training.optimizers import make_optimizer
from tunesmith.training.prepare import prepare
from tunesmith.workflows.bench import Row
from tunesmith.workflows.bench_step import configuration, documents, measure, random_model, versions
from tunesmith.workflows.run_plan import plan_run


def run(row: Row, engine: str) -> dict[str, Any]:
    hardware = probe(row.device)
    dtype = compute_dtype(row.dtype, hardware)
    config = configuration(row, engine)
    config.method = "full"
    config.optimizer.lr = 1e-4
    model = random_model(row, "fp32", hardware.device, quantize=False).train().requires_grad_()
    forward = ModelForward(model, hardware.device, dtype)
    examples = documents(row, row.documents)
    plan = plan_run(config, forward, hardware, examples).memory
    forward.loss_rows = plan.loss_rows
    prepare(model, plan, torch_dtype(dtype))
    optimizer = make_optimizer(model, config.optimizer, config.lr)
    optimizer.connect(engine_of(model))
    scaler = torch.amp.GradScaler(hardware.type, enabled=dtype == "fp16")

    def step() -> torch.Tensor:
        loss = accumulate_gradients(forward, SupervisedFineTuning(), [examples], row.packed, 0, scaler)
        optimizer.step(scaler, config.optimizer.max_grad_norm)
        return loss

    return {
        "engine": plan.engine,
        "plan": plan.reason,
        "dtype": dtype,
        "trainable": count_parameters(model)[0],
        "hardware": hardware.name,
        **measure(step, row, hardware),
        "versions": versions(row),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    row = Row("tunesmith", options.model, "lora", (options.seq,) * options.batch, memory="fast", device=options.device)
    rows = []
    for engine in ("reference", "fused"):
        rows.append(run(row, engine))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    first, second = (row["losses"] for row in rows)
    if any(abs(a - b) > 0.02 * first[0] for a, b in zip(first, second, strict=True)):
        raise SystemExit(f"the engines' losses differ: {first} and {second}")
    options.out.write_text(
        json.dumps({"workload": row.workload.replace("lora", "full"), "rows": rows}, indent=1) + "\n"
    )
    print(f"| {options.model}, {options.batch} x {options.seq} tokens | tokens/s | peak GB | loss |\n|---|---|---|---|")
    for result in rows:
        losses = result["losses"]
        print(
            f"| {result['engine']} | {result['tokens_per_second']:,.0f} | {result['peak_gb']:.2f} "
            f"| {losses[0]:.3f} → {losses[-1]:.3f} |"
        )


if __name__ == "__main__":
    main()
