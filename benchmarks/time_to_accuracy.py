"""Time to accuracy: whole Banking77, SmolLM2-135M-Instruct, LoRA on all linear layers, three epochs.

    python benchmarks/time_to_accuracy.py MODEL OUT --data FOLDER [--engine fused] [--engine reference] [--engine peft]

MODEL is a .gguf file or a folder, FOLDER has train.jsonl (10,003 rows {"text", "label"}) and test.jsonl (3,080). Rank 16,
rate 5e-4 with cosine decay, 32 examples a step, the label's tokens supervised only. `fused` and `reference` are
tunesmith's engines through `tunesmith.train` with packed micro-batches (one a step); `peft` is transformers + PEFT in a
plain loop: bf16 autocast, padded batches of like length. All train on the same tokens and are scored by
`tunesmith.evaluate` on the whole test set. The seconds are those of the training loop, without loading. Prints a Markdown
table; writes OUT/time_to_accuracy.json. Further settings: --set SECTION.KEY=VALUE.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

import tunesmith
from tunesmith.config import RunConfig
from tunesmith.hardware import memory_in_use_gb, probe, torch_dtype
from tunesmith.models.adapters import add_adapter
from tunesmith.models.load import load_model
from tunesmith.runs import RunFolder
from tunesmith.training.optimizers import learning_rate
from tunesmith.types import IGNORE_INDEX, TokenizedExample
from tunesmith.workflows.evaluate import evaluate  # `tunesmith.evaluate` would need matplotlib
from tunesmith.workflows.train import start

EPOCHS, BATCH = 3, 32
ENGINES = ("fused", "reference", "peft")
AT_MOST_SECONDS, AT_LEAST_ACCURACY = 25.0, 0.91
"""What the fused engine has to reach on one H100; transformers + PEFT: 216 s, 0.9136."""


def configuration(model: str, data: Path, engine: str, more: list[str]) -> RunConfig:
    """The run's settings."""
    values = {
        "model.name": model,
        "model.engine": engine,
        "data.path": str(data / "train.jsonl"),
        "data.chat_template": "chatml",  # without the system message that the model's own template adds to every row
        "data.max_seq_length": 512,
        "data.packing": True,
        "optimizer.lr": 5e-4,
        "training.epochs": EPOCHS,
        "training.batch_size": BATCH,
        "training.micro_batch_tokens": 2048,  # holds any 32 of the questions: one shape for all steps
        "training.log_every": 50,
        "evaluation.max_new_tokens": 24,
    }
    return tunesmith.load_config(None, more, values)


def train_ours(config: RunConfig, run: Path) -> dict[str, Any]:
    """Train with one of our engines; returns the figures of the training."""
    seen: dict[str, Any] = {}

    def remember(event: Any) -> None:
        if event["event"] == "start":
            seen.update(event)

    if importlib.util.find_spec("matplotlib"):
        result = tunesmith.train(config, run, sink=remember)
    else:  # the report that `tunesmith.train` ends with needs it
        result = start(config, run).train(remember)
    metrics = result.metrics
    return {
        "engine_used": seen["engine"],
        "steps": metrics["steps"],
        "train_seconds": metrics["train_seconds"],
        "loop_seconds": metrics["wall_seconds"],
        "examples_per_second": metrics["examples_per_second"],
        "tokens_per_second": metrics["tokens_per_second"],
        "peak_memory_gb": metrics["peak_memory_gb"],
        "train_loss": metrics["train_loss"],
    }


def train_peft(config: RunConfig, run: Path) -> dict[str, Any]:
    """transformers + PEFT: the model's own forward and loss under autocast, on padded batches of like length.

    Makes the run folder that `tunesmith.evaluate` reads, with the adapter that was trained here.
    """
    session = start(config.model_copy(deep=True), run)  # tokens, folder and data order of ours; its model is not used
    examples, source, dtype = session.data.train, session.source, session.forward.dtype
    device = session.hardware.device
    del session
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(config.training.seed)
    model = load_model(source, config.model, probe(device), dtype)
    model.config.use_cache = False
    model = add_adapter(model, config.adapter, source.name)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        trainable, lr=config.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == "fp16")
    total = -(-len(examples) // BATCH) * EPOCHS
    total = min(total, config.training.max_steps or total)
    step, losses, began = 0, [], time.perf_counter()
    seen_examples = seen_tokens = 0
    for epoch in range(EPOCHS):
        for batch in batches_of_like_length(examples, config.training.seed + epoch):
            if step == total:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, config.lr, step, total)
            inputs = padded(batch, device)
            with torch.autocast(device.split(":")[0], torch_dtype(dtype), enabled=dtype != "fp32"):
                loss = model(**inputs).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trainable, config.optimizer.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            step += 1
            seen_examples += len(batch)
            seen_tokens += sum(len(example) for example in batch)
    train_loss = float(torch.stack(losses).mean())  # waits for the device
    seconds = time.perf_counter() - began
    model.save_pretrained(str(RunFolder.open(run).adapter_path))
    return {
        "engine_used": "transformers + PEFT",
        "steps": step,
        "train_seconds": seconds,
        "loop_seconds": seconds,
        "examples_per_second": seen_examples / seconds,
        "tokens_per_second": seen_tokens / seconds,
        "peak_memory_gb": memory_in_use_gb(device),
        "train_loss": train_loss,
    }


def batches_of_like_length(examples: list[TokenizedExample], seed: int) -> list[list[TokenizedExample]]:
    """One epoch in batches of BATCH: shuffled, sorted by length within 50 batches, the batches shuffled."""
    rng = random.Random(seed)
    order = list(range(len(examples)))
    rng.shuffle(order)
    window = 50 * BATCH
    order = [
        index
        for first in range(0, len(order), window)
        for index in sorted(order[first : first + window], key=lambda index: len(examples[index]))
    ]
    batches = [[examples[index] for index in order[first : first + BATCH]] for first in range(0, len(order), BATCH)]
    rng.shuffle(batches)
    return batches


def padded(batch: list[TokenizedExample], device: str) -> dict[str, torch.Tensor]:
    """Right-padded inputs of transformers, with labels for the supervised tokens only."""
    width = max(len(example) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for number, example in enumerate(batch):
        tokens = torch.from_numpy(example.input_ids).long()
        ids[number, : len(tokens)] = tokens
        mask[number, : len(tokens)] = 1
        labels[number, : len(tokens)] = torch.where(torch.from_numpy(example.loss_mask), tokens, IGNORE_INDEX)
    return {name: t.to(device) for name, t in {"input_ids": ids, "labels": labels, "attention_mask": mask}.items()}


def measure(engine: str, model: str, data: Path, out: Path, more: list[str], rows: int | None) -> dict[str, Any]:
    """Train with one engine and score it on the test set."""
    config = configuration(model, data, "reference" if engine == "peft" else engine, more)
    run = out / "runs" / f"{engine}-{time.strftime('%H%M%S')}"
    figures = train_peft(config, run) if engine == "peft" else train_ours(config, run)
    began = time.perf_counter()
    changes = {"max_rows": rows} if rows else {}
    result = evaluate(run, data / "test.jsonl", device=config.model.device, changes=changes)
    accuracy, metadata = result["metrics"]["accuracy"], RunFolder.open(run).metadata
    return {
        "engine": engine,
        **figures,
        "accuracy": accuracy["value"],
        "stderr": accuracy["stderr"],
        "test_rows": result["n"],
        "evaluate_seconds": time.perf_counter() - began,
        "settings": {
            part: getattr(config, part).model_dump(mode="json") for part in ("adapter", "optimizer", "training")
        },
        "versions": metadata["packages"],
        "hardware": {name: metadata["hardware"][name] for name in ("name", "memory_gb")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: all")
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--test-rows", type=int, help="score on a sample of the test set, for a trial")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    print("| engine | training s | examples/s | tokens/s | peak GB | mean loss | accuracy |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for engine in options.engine or ENGINES:
        row = measure(engine, options.model, options.data, options.out, options.more, options.test_rows)
        results.append(row)
        (options.out / "time_to_accuracy.json").write_text(json.dumps(results, indent=1))
        print(
            f"| {engine} | {row['train_seconds']:.1f} | {row['examples_per_second']:.0f} | {row['tokens_per_second']:,.0f} "
            f"| {row['peak_memory_gb']:.2f} | {row['train_loss']:.4f} | {row['accuracy']:.4f} ± {row['stderr']:.4f} |",
            flush=True,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for row in results:
        if row["engine"] == "fused":
            reached = row["train_seconds"] <= AT_MOST_SECONDS and row["accuracy"] >= AT_LEAST_ACCURACY
            print(
                f"fused: {'reached' if reached else 'missed'} (at most {AT_MOST_SECONDS:.0f} s at accuracy {AT_LEAST_ACCURACY})"
            )


if __name__ == "__main__":
    main()
