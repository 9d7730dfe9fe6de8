"""Which settings the quickstart should ship: accuracy by learning rate, rows and seed, everything else as shipped.

    python benchmarks/quickstart_settings.py MODEL OUT

Trains with the quickstart's run.yaml and answers all 400 test questions. Prints a Markdown table of the accuracies of
three seeds; writes OUT/quickstart_settings.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tunesmith.config import load_config
from tunesmith.data.formats import read_examples
from tunesmith.evaluation.answers import generate_answers
from tunesmith.evaluation.statistics import mean
from tunesmith.workflows.quickstart import files
from tunesmith.workflows.train import start

SEEDS = (3407, 1, 2)
CASES = [(2e-4, 400), (5e-4, 400), (1e-3, 200), (1e-3, 400), (1e-3, 672)]


def accuracy(model: str, run: Path, lr: float, rows: int, seed: int) -> tuple[float, float]:
    """(accuracy on the 400 test questions, mean training loss) of one run."""
    folder = files()
    values = {
        "model.name": model,
        "data.path": str(folder / "train.jsonl"),
        "data.max_rows": rows,
        "optimizer.lr": lr,
        "training.seed": seed,
        "evaluation.batch_size": 400,
        "training.log_every": 1000,
    }
    config = load_config(folder / "run.yaml", [], values)
    session = start(config, run)
    loss = session.train().metrics["train_loss"]
    questions = read_examples(folder / "test.jsonl").examples
    answers = generate_answers(session.forward, session.tokenizer, session.chat, questions, config.evaluation)
    return mean([float(row.correct) for row in answers]).value, loss


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    results = []
    print(
        "| learning rate | rows | accuracy, seeds "
        + ", ".join(map(str, SEEDS))
        + " | mean training loss |\n|---|---|---|---|"
    )
    for lr, rows in CASES:
        found = [accuracy(model, out / "runs" / f"{lr}-{rows}-{seed}", lr, rows, seed) for seed in SEEDS]
        results.append(
            {"lr": lr, "rows": rows, "seeds": SEEDS, "accuracy": [a for a, _ in found], "loss": [b for _, b in found]}
        )
        (out / "quickstart_settings.json").write_text(json.dumps(results, indent=1))
        shown = ", ".join(f"{a:.3f}" for a, _ in found)
        print(f"| {lr:g} | {rows} | {shown} | {sum(b for _, b in found) / len(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
