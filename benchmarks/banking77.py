"""Methods side by side on real weights: whole Banking77 (77 intents), several seeds, the official test split.

    python benchmarks/banking77.py MODEL OUT.json --data FOLDER [--only REGEX] [--seed N ...] [--validate] [--set K=V ...]
    python benchmarks/banking77.py --table OUT.json ...

MODEL is a folder or a .gguf file (SmolLM2-135M-Instruct was used), FOLDER has train.jsonl (10,003 rows {"text", "label"})
and test.jsonl (3,080). 32 examples a step, cosine decay, only the label's tokens supervised; each method trains at its own
rate (SETTINGS), found with --validate: that trains without a tenth of the training rows and scores on it, so that the
test split decides nothing. Accuracy is that of greedy answers, which have to be the label exactly; seconds are those of the
training loop, without loading. One process writes one OUT; --table takes the rows of all files together.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

from time_to_accuracy import BATCH

from tunesmith.config import RunConfig, load_config

SEEDS = (0, 1, 2)
LORA_RATE = "optimizer.lr=1e-3"
SETTINGS: dict[str, list[str]] = {
    "full": ["method=full", "optimizer.lr=1e-4", "training.epochs=4"],
    "LoRA": [LORA_RATE],
    "rsLoRA": [LORA_RATE, "adapter.rslora=true"],
    "DoRA": [LORA_RATE, "adapter.dora=true"],
    "QLoRA": [LORA_RATE, "method=qlora"],
    "LoRA, rank 8": [LORA_RATE, "adapter.r=8", "adapter.alpha=16"],
    "LoRA, rank 32": [LORA_RATE, "adapter.r=32", "adapter.alpha=64"],
}
"""What each row sets beside `configuration`. The factor of BA is 2, in rsLoRA alpha / sqrt(r) = 8."""


def configuration(model: str, data: Path, seed: int, changes: list[str]) -> RunConfig:
    """A run's settings."""
    values = {
        "model.name": model,
        "data.path": str(data / "train.jsonl"),
        "data.chat_template": "chatml",  # without the system message that the model's own template adds to every row
        "data.max_seq_length": 512,
        "data.packing": True,
        "adapter.r": 16,
        "adapter.alpha": 32,
        "training.epochs": 8,
        "training.batch_size": BATCH,
        "training.micro_batch_tokens": 2048,  # holds any 32 of the questions: one shape for all steps
        "training.log_every": 50,
        "training.seed": seed,
        "evaluation.max_new_tokens": 24,
    }
    return load_config(None, changes, values)


def hold_out(data: Path, out: Path) -> Path:
    """A folder with nine tenths of the training rows, and each tenth row as its test.jsonl."""
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    folder = out.with_suffix(".validation")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(line for n, line in enumerate(lines) if n % 10), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(lines[::10]), encoding="utf-8")
    return folder


def measure(name: str, config: RunConfig, data: Path, run: Path) -> dict[str, Any]:
    """Train one setting, and score it with the model that comes out of the training."""
    from tunesmith.data.formats import read_examples
    from tunesmith.evaluation.answers import generate_answers
    from tunesmith.evaluation.statistics import mean
    from tunesmith.files import sha256_file
    from tunesmith.workflows.train import start

    session = start(config, run)
    metrics = session.train().metrics
    began = time.perf_counter()
    rows = read_examples(data / "test.jsonl").examples
    answers = generate_answers(session.forward, session.tokenizer, session.chat, rows, config.evaluation)
    accuracy = mean([float(row.correct) for row in answers])
    weights = session.run.path / ("model" if config.method == "full" else "adapter")
    metadata = session.run.metadata
    return {
        "setting": name,
        "seed": config.training.seed,
        "changes": {
            part: getattr(config, part).model_dump(mode="json") for part in ("adapter", "optimizer", "training")
        },
        "engine": session.plan.memory.engine,
        "accuracy": accuracy.value,
        "stderr": accuracy.stderr,
        "test_rows": len(answers),
        "test_sha256": sha256_file(data / "test.jsonl"),
        "steps": metrics["steps"],
        "train_seconds": metrics["train_seconds"],
        "answer_seconds": time.perf_counter() - began,
        "examples_per_second": metrics["examples_per_second"],
        "peak_memory_gb": metrics["peak_memory_gb"],
        "train_loss": metrics["train_loss"],
        "trainable_parameters": metrics["trainable_parameters"],
        "megabytes": sum(path.stat().st_size for path in weights.glob("*.safetensors")) / 1e6,
        "versions": metadata["packages"],
        "hardware": metadata["hardware"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a setting. Accuracy is the seeds' mean (least to most), the rest the first seed's, which ran alone."""
    lines = [
        "| method | engine | accuracy, mean of seeds | least to most | training s | examples/s | peak GB | trained parameters | size MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["setting"] for row in rows):
        of = sorted((row for row in rows if row["setting"] == name), key=lambda row: row["seed"])
        first, values = of[0], [row["accuracy"] for row in of]
        lines.append(
            f"| {name} | {first['engine']} | {statistics.mean(values):.4f} ({len(values)}) | {min(values):.4f} to {max(values):.4f} "
            f"| {first['train_seconds']:.1f} | {first['examples_per_second']:,.0f} | {first['peak_memory_gb']:.2f} "
            f"| {first['trainable_parameters']:,} | {first['megabytes']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="MODEL OUT | OUT ...")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="", help="settings to run: a regular expression for the whole name")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table([row for path in options.paths for row in json.loads(Path(path).read_text(encoding="utf-8"))]))
        return
    import torch

    model, out = options.paths[0], Path(options.paths[1])
    data = hold_out(options.data, out) if options.validate else options.data
    rows: list[dict[str, Any]] = []
    for seed in options.seed or SEEDS:
        for name, changes in SETTINGS.items():
            if options.only and not re.fullmatch(options.only, name):
                continue
            config = configuration(model, data, seed, [*changes, *options.more])
            row = measure(
                name, config, data, out.with_suffix(".runs") / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}-{seed}"
            )
            rows.append(row)
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(
                f"{' '.join([name, *options.more])} seed {seed}: accuracy {row['accuracy']:.4f}, loss {row['train_loss']:.4f}, "
                f"{row['train_seconds']:.1f} s, answers {row['answer_seconds']:.1f} s, {row['peak_memory_gb']:.2f} GB",
                flush=True,
            )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
