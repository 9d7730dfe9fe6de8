"""Preference objectives on real weights: do held-out pairs tell that the model learned what is preferred?

    python benchmarks/preferences.py MODEL OUT.json --data FILE [--only NAME ...] [--seed N ...] [--set K=V ...]
    python benchmarks/preferences.py --table OUT.json ...

FILE has preference pairs (Anthropic's harmless-base was used: 1,150 pairs); a tenth of them, chosen by the seed, is held out.
Rank 16 on all linear layers. Before training every reward is 0 for dpo and kto, so that a pair is right by chance; for orpo and
simpo the accuracy before training is that of the model's own probabilities. The chosen answers' log-probability before
and after training says whether it collapsed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

from tunesmith.config import RunConfig, load_config

SEEDS = (0, 1, 2)
SETTINGS: dict[str, list[str]] = {
    "dpo": ["objective.name=dpo", "optimizer.lr=2e-4"],
    "dpo, hinge": ["objective.name=dpo", "objective.loss=hinge", "optimizer.lr=2e-4"],
    "dpo, ipo": ["objective.name=dpo", "objective.loss=ipo", "optimizer.lr=2e-4"],
    "dpo, cross-entropy": ["objective.name=dpo", "objective.nll_weight=1", "optimizer.lr=2e-4"],
    "orpo": ["objective.name=orpo", "optimizer.lr=2e-4"],
    "simpo": ["objective.name=simpo", "optimizer.lr=2e-4"],
    "kto": ["objective.name=kto", "optimizer.lr=2e-4"],
}


def configuration(model: str, data: Path, seed: int, changes: list[str]) -> RunConfig:
    """A run's settings."""
    values = {
        "model.name": model,
        "data.path": str(data),
        "data.eval_fraction": 0.1,
        "data.max_seq_length": 1024,
        "data.overlong": "drop",
        "training.epochs": 3,
        "training.batch_size": 16,
        "training.log_every": 10,
        "training.seed": seed,
    }
    return load_config(None, changes, values)


def measure(name: str, config: RunConfig, run: Path) -> dict[str, Any]:
    """Train one setting; its held-out pairs before and after."""
    from tunesmith.models.load import pad_token
    from tunesmith.training.loop import evaluate_loss
    from tunesmith.training.preferences import reference_log_probabilities
    from tunesmith.workflows.train import start

    session = start(config, run)
    pad, held = pad_token(session.tokenizer), session.data.eval
    before: dict[str, float] = {}
    if not session.objective.needs_reference:
        evaluate_loss(session.forward, session.objective, held, config, pad, None, before)
    chosen = reference_log_probabilities(session.forward, held, config, pad)[:, 0]
    if config.objective.name == "kto":
        chosen = chosen[[bool(pair.desirable) for pair in held]]
    began = time.perf_counter()
    result = session.train()
    seconds = time.perf_counter() - began
    (*_, last) = [event["metrics"] for event in session.run.events() if event["event"] == "eval"]
    return {
        "setting": name,
        "seed": config.training.seed,
        "objective": config.objective.model_dump(mode="json"),
        "lr": config.lr,
        "pairs": len(session.data.train),
        "held_out": len(held),
        "engine": session.plan.memory.engine,
        "before": before | {"logps/chosen": float(chosen.mean())},
        "after": last,
        "steps": result.metrics["steps"],
        "seconds": seconds,
        "tokens_per_second": result.metrics["tokens_per_second"],
        "peak_memory_gb": result.metrics["peak_memory_gb"],
        "predicted_peak_gb": session.plan.memory.predicted_peak_gb,
        "versions": session.run.metadata["packages"],
        "hardware": session.run.metadata["hardware"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a setting, means over its seeds. KTO's rows are not pairs: it has a difference of rewards only."""
    lines = [
        "| objective | rate | reward accuracy, held out | least to most | margin | log p of chosen before | after | s | tokens/s | peak GB (predicted) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["setting"] for row in rows):
        of = [row for row in rows if row["setting"] == name]

        def mean(pick: Any, of: list[dict[str, Any]] = of) -> float:
            return statistics.mean(pick(row) for row in of)

        values = [row["after"]["eval_rewards/accuracies"] for row in of if "eval_rewards/accuracies" in row["after"]]
        shown = (
            f"{statistics.mean(values):.3f} ({len(values)}) | {min(values):.3f} to {max(values):.3f}"
            if values
            else "- | -"
        )
        margin = mean(lambda row: row["after"]["eval_rewards/chosen"] - row["after"]["eval_rewards/rejected"])
        lines.append(
            f"| {name} | {of[0]['lr']:g} | {shown} | {margin:.3f} | {mean(lambda row: row['before']['logps/chosen']):.1f} "
            f"| {mean(lambda row: row['after']['eval_logps/chosen']):.1f} | {mean(lambda row: row['seconds']):.0f} "
            f"| {mean(lambda row: row['tokens_per_second']):,.0f} | {of[0]['peak_memory_gb']:.2f} ({of[0]['predicted_peak_gb']:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="MODEL OUT | OUT ...")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", action="append", choices=SETTINGS)
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table([row for path in options.paths for row in json.loads(Path(path).read_text(encoding="utf-8"))]))
        return
    import torch

    model, out = options.paths[0], Path(options.paths[1])
    rows: list[dict[str, Any]] = []
    for seed in options.seed or SEEDS:
        for name in options.only or SETTINGS:
            config = configuration(model, options.data, seed, [*SETTINGS[name], *options.more])
            rows.append(measure(name, config, out.with_suffix(".runs") / f"{name.replace(', ', '-')}-{seed}"))
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(f"{' '.join(options.more)} {table(rows[-1:]).splitlines()[-1]}", flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
