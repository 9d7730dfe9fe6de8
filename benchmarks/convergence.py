"""The fused engine's loss curve against the reference engine's: same data order, same seed, 200 steps on real text.

    python benchmarks/convergence.py MODEL OUT --data FILE [--case lora-bf16 ...] [--steps N] [--set SECTION.KEY=VALUE ...]
    python benchmarks/convergence.py --plot OUT

MODEL is a .gguf file or a folder; FILE is plain text or rows (Banking77's train.jsonl, hf_course_en.jsonl). Each case
(lora or qlora, in bf16 or fp16) trains once with each engine through `tunesmith.train`, rank 16, rate 5e-4, constant.
Prints a Markdown table; writes OUT/convergence.json (both curves, versions, hardware) and OUT/convergence.png. With d the
relative difference of the losses of a step, (fused - reference) / reference:

    difference   mean |d| over all steps: below 0.5%
    drift        mean d over the last quarter of the steps minus mean d over the first: below 0.5% either way

Exits with 1 if a case misses either. The second form draws the plot from OUT/convergence.json, for a machine without
matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.runs import RunFolder
from tunesmith.workflows.train import start

CASES = ("lora-bf16", "qlora-bf16", "lora-fp16", "qlora-fp16")
ENGINES = ("reference", "fused")
TOLERANCE = 0.005


def losses(case: str, engine: str, model: str, data: Path, run: Path, steps: int, more: list[str]) -> list[float]:
    """The training loss of every step of one run."""
    method, dtype = case.split("-")
    values = {
        "method": method,
        "model.name": model,
        "model.dtype": dtype,
        "model.engine": engine,
        "data.path": str(data),
        "data.max_seq_length": 512,
        "data.overlong": "split",
        "data.chat_template": "chatml",
        "data.packing": True,
        "optimizer.lr": 5e-4,
        "optimizer.schedule": "constant",
        "training.batch_size": 16,
        "training.micro_batch_size": 16,
        "training.epochs": 1000,
        "training.max_steps": steps,
        "training.save_every": steps,
    }
    curve: list[float] = []

    def remember(event: Any) -> None:
        if event["event"] == "start" and event["engine"] != engine:
            sys.exit(f"{case}: asked for the {engine} engine, got {event['engine']}: {event['memory']}")
        if event["event"] == "step":
            curve.append(event["loss"])

    config = tunesmith.load_config(None, more, values)
    start(config, run).train(remember)
    return curve


def compare(reference: Sequence[float], fused: Sequence[float]) -> dict[str, float]:
    """Difference, drift and what else describes how two curves lie on each other, as fractions of the reference's loss."""
    relative = [(ours - theirs) / theirs for ours, theirs in zip(fused, reference, strict=True)]
    quarter = max(1, len(relative) // 4)
    mean_of_last = sum(reference[-quarter:]) / quarter
    return {
        "difference": mean([abs(d) for d in relative]),
        "signed_difference": mean(relative),
        "largest_difference": max(map(abs, relative)),
        "drift": mean(relative[-quarter:]) - mean(relative[:quarter]),
        "first_loss": reference[0],
        "last_quarter_reference": mean_of_last,
        "last_quarter_fused": sum(fused[-quarter:]) / quarter,
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def lies_on(result: dict[str, Any]) -> bool:
    """Whether the curves are the same within the tolerance; false for a loss that is not a number."""
    return result["difference"] < TOLERANCE and abs(result["drift"]) < TOLERANCE


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Both curves of each case above, their relative difference below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(results), figsize=(4 * len(results), 5), sharex=True, squeeze=False, height_ratios=[2, 1]
    )
    for (above, below), result in zip(axes.T, results, strict=True):
        reference, fused = result["reference"], result["fused"]
        steps = range(1, len(reference) + 1)
        above.plot(steps, reference, color="0.6", linewidth=3, label="reference")
        above.plot(steps, fused, color="tab:red", linewidth=1, label="fused")
        above.set_title(result["case"])
        above.set_ylabel("loss")
        above.legend(frameon=False)
        below.axhline(0, color="0.6", linewidth=1)
        below.plot(steps, [100 * (f - r) / r for r, f in zip(reference, fused, strict=True)], "tab:red", linewidth=1)
        below.set_ylabel("difference, %")
        below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--case", action="append", choices=(*CASES, "lora-fp32", "qlora-fp32"), help="default: four")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--plot", type=Path, metavar="OUT")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads((options.plot / "convergence.json").read_text()), options.plot / "convergence.png")
        return
    if options.model is None or options.out is None or options.data is None:
        parser.error("give MODEL, OUT and --data FILE")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    print("| case | steps | loss, first step | last quarter, reference | fused | mean difference | drift |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in options.case or CASES:
        result: dict[str, Any] = {"case": case, "steps": options.steps}
        for engine in ENGINES:
            run = out / "runs" / f"{case}-{engine}-{time.strftime('%H%M%S')}"
            began = time.perf_counter()
            result[engine] = losses(case, engine, options.model, options.data, run, options.steps, options.more)
            result[f"{engine}_seconds"] = time.perf_counter() - began
            folder = RunFolder.open(run)
            result["versions"] = folder.metadata["packages"]
            result["hardware"] = {name: folder.metadata["hardware"][name] for name in ("name", "memory_gb")}
        result |= compare(result["reference"], result["fused"])
        results.append(result)
        (out / "convergence.json").write_text(json.dumps(results, indent=1))
        print(
            f"| {case} | {options.steps} | {result['first_loss']:.4f} | {result['last_quarter_reference']:.4f} "
            f"| {result['last_quarter_fused']:.4f} | {result['difference']:.3%} | {result['drift']:+.3%} |",
            flush=True,
        )
    if importlib.util.find_spec("matplotlib"):
        plot(results, out / "convergence.png")
    missed = [result["case"] for result in results if not lies_on(result)]
    if missed:
        sys.exit(f"not on the reference engine's curve within {TOLERANCE:.1%}: {', '.join(missed)}")


if __name__ == "__main__":
    main()
