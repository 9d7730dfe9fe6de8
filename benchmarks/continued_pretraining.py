"""Continued pre-training on real weights: what the domain's text gains, and what general text loses, with a mix and without.

    python benchmarks/continued_pretraining.py MODEL OUT.json --domain FILE --general FILE [--set K=V ...]

The domain's documents (the Hugging Face course, 89 chapters, was used) are trained on but for a tenth, held out; general text
(300 kB of Wikipedia) is halved by its lines: one half is mixed in, a tenth of the rows, the other is evaluated beside.
LoRA, rank 16 on all linear layers, and full fine-tuning, `objective.name: cpt`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tunesmith.config import load_config

SETTINGS: dict[str, list[str]] = {
    "LoRA": ["optimizer.lr=2e-4", "training.epochs=3"],
    "full": ["method=full", "optimizer.lr=2e-5", "training.epochs=3"],
}


PIECE = 4000
"""Characters of a row: documents are cut, so that a share of rows is about a share of text."""


def pieces(text: str) -> list[str]:
    """A document in rows of about PIECE characters, cut at spaces."""
    found, start = [], 0
    while start < len(text):
        end = text.rfind(" ", start + PIECE // 2, start + PIECE) if len(text) - start > PIECE else len(text)
        end = end if end > start else start + PIECE
        found.append(text[start:end])
        start = end
    return [piece for piece in found if piece.strip()]


def write(documents: list[str], path: Path) -> Path:
    """Documents as rows of plain text."""
    rows = [json.dumps({"text": piece}, ensure_ascii=False) + "\n" for text in documents for piece in pieces(text)]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--domain", type=Path, required=True)
    parser.add_argument("--general", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()

    from tunesmith.models.load import pad_token
    from tunesmith.training.loop import evaluate_loss
    from tunesmith.training.objectives import SupervisedFineTuning
    from tunesmith.workflows.train import start
    from tunesmith.workflows.training_evaluation import perplexity

    folder = options.out.with_suffix(".data")
    folder.mkdir(parents=True, exist_ok=True)
    general = [line for line in options.general.read_text(encoding="utf-8").splitlines() if line.strip()]
    documents = [json.loads(line)["text"] for line in options.domain.read_text(encoding="utf-8").splitlines()]
    mixed, evaluated = (write(general[half::2], folder / f"general-{half}.jsonl") for half in (0, 1))
    domain = write([text for number, text in enumerate(documents) if number % 10], folder / "domain.jsonl")
    held = write(documents[::10], folder / "held.jsonl")
    rows: list[dict[str, Any]] = []
    print("| method | mix | domain perplexity before | after | general before | after | change | s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, changes in SETTINGS.items():
        for with_mix in (False, True):
            values: dict[str, Any] = {
                "model.name": options.model,
                "objective.name": "cpt",
                "data.eval_path": str(held),
                "data.general_path": str(evaluated),
                "data.max_seq_length": 1024,
                "training.batch_size": 8,
                "training.log_every": 10,
            }
            if with_mix:
                values["data.mix"] = [{"path": str(domain), "weight": 9}, {"path": str(mixed), "weight": 1}]
            else:
                values["data.path"] = str(domain)
            config = load_config(None, [*changes, *options.more], values)
            session = start(config, options.out.with_suffix(".runs") / f"{name}-{'mix' if with_mix else 'alone'}")
            pad = pad_token(session.tokenizer)
            before = [
                perplexity(evaluate_loss(session.forward, SupervisedFineTuning(), examples, session.config, pad))
                for examples in (session.data.eval, session.data.general)
            ]
            metrics = session.train().metrics
            (*_, last) = [event["metrics"] for event in session.run.events() if event["event"] == "eval"]
            row = {
                "method": name,
                "mix": with_mix,
                "before": before,
                "after": [last["perplexity"], last["general_perplexity"]],
                "train_tokens": session.data.facts["train_tokens"],
                "steps": metrics["steps"],
                "seconds": metrics["train_seconds"],
                "config": session.config.model_dump(mode="json", exclude={"model", "data"}),
                "versions": session.run.metadata["packages"],
                "hardware": session.run.metadata["hardware"],
            }
            rows.append(row)
            options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            change = row["after"][1] / before[1] - 1
            print(
                f"| {name} | {'1/10 general' if with_mix else 'none'} | {before[0]:.2f} | {row['after'][0]:.2f} | {before[1]:.2f} "
                f"| {row['after'][1]:.2f} | {change:+.1%} | {row['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
