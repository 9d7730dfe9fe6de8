"""`memory: auto` under a cap: does what the plan says fits train without running out of memory, and does it use the cap?

    python benchmarks/caps.py OUT.json [--only REGEX] [--steps N]    (on a GPU: measure)
    python benchmarks/caps.py --table OUT.json                       (anywhere: a table)

The allocator is held to each cap (`memory.limit_gb`). Random weights of the real shapes; 96 examples of 180 to 2,048 tokens,
16 a step, twenty steps unless said, every token supervised; rank 16 on all linear layers and 8-bit AdamW. Each run goes the
way of `tunesmith train` behind loading: plan, prepare, dry step, training loop, and its own micro-batch. `peak` is what PyTorch
allocated in training, `used` that or the dry step's, which has the largest micro-batch that the data can give, as a share of
the cap. Where it is under 85%, the last column says how fast the fastest plan that uses more is predicted to be: if it is slower, the
rest of the cap would gain nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from planner import Case, clean, load, renew

from tunesmith.config import Method, RunConfig, load_config
from tunesmith.types import GB, Event, TokenizedExample
from tunesmith.workflows.bench import SEED, SHAPES, Row
from tunesmith.workflows.setups import choices_of

BATCH, STEPS, EXAMPLES = 16, 20, 96


@dataclass(frozen=True, slots=True)
class Capped:
    """One run: a shape, how it trains, and what the allocator may reserve in GB."""

    shape: str
    method: Method
    cap: float
    engine: Literal["auto", "reference"] = "auto"
    padded: bool = False
    steps: int = STEPS

    @property
    def name(self) -> str:
        """What `--only` looks into."""
        return f"{self.shape} {self.method} {self.cap:g} {self.engine}{' padded' if self.padded else ''}"


RUNS = [
    *(Capped("qwen2.5-3b", "qlora", cap) for cap in (8, 16, 24, 40)),
    Capped("qwen2.5-3b", "qlora", 8, "reference"),
    *(Capped("qwen2.5-3b", "qlora", cap, padded=True) for cap in (8, 16)),
    *(Capped("qwen2.5-3b", "lora", cap) for cap in (8, 16, 24, 40)),
    Capped("qwen2.5-3b", "full", 40),
    *(Capped("llama-3.1-8b", "qlora", cap) for cap in (8, 16, 24, 40)),
    Capped("llama-3.1-8b", "qlora", 24, "reference"),
    Capped("llama-3.1-8b", "qlora", 24, padded=True),
    *(Capped("llama-3.1-8b", "lora", cap) for cap in (24, 40)),
]


def examples_of(run: Capped) -> list[TokenizedExample]:
    """Lengths as chats have them: many short ones, some that fill the longest sequence."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    lengths = np.clip(rng.lognormal(6.4, 0.8, EXAMPLES), 180, 2048).astype(int)
    vocabulary = SHAPES[run.shape]["vocab_size"]
    return [
        TokenizedExample(
            rng.integers(3, vocabulary, length, dtype=np.int32), np.ones(length, dtype=bool), number, "random"
        )
        for number, length in enumerate(lengths, 1)
    ]


def configuration(run: Capped) -> RunConfig:
    """The run as `tunesmith train` would be told."""
    return load_config(
        None,
        [],
        {
            "method": run.method,
            "model.engine": run.engine,
            "model.dtype": "bf16",
            "data.packing": False if run.padded else "auto",
            "adapter.r": 16,
            "adapter.alpha": 32,
            "optimizer.name": "adamw_8bit",
            "training.batch_size": BATCH,
            "training.max_steps": run.steps,
            "training.epochs": run.steps,
            "training.log_every": 1,
            "training.seed": SEED,
            "memory.limit_gb": run.cap,
        },
    ).resolved()


def measure(run: Capped, model: Any, hardware: Any) -> dict[str, Any]:
    """Plan, prepare, dry step and training under the cap; what was predicted and what it took."""
    import torch

    from tunesmith.models.forward import ModelForward
    from tunesmith.runs import RunFolder
    from tunesmith.training.guards import stop_on_signal
    from tunesmith.training.loop import train_loop
    from tunesmith.workflows.run_plan import limit_memory
    from tunesmith.workflows.train import make_ready

    torch.cuda.set_per_process_memory_fraction(1.0)  # of an earlier run that did not end well
    renew(model, hardware)
    config, examples = configuration(run), examples_of(run)
    limit_memory(config, hardware)
    forward = ModelForward(model, hardware.device, "bf16")
    ready = make_ready(config, forward, hardware, examples, 0)
    plan, events = ready.plan, list[Event]()
    torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as folder, stop_on_signal() as stop:
        state = train_loop(
            config=config, run=RunFolder.create(Path(folder) / "run", config, {}), forward=forward, objective=ready.objective,
            optimizer=ready.optimizer, examples=examples, pad_id=0, log=events.append, stop=stop,
            tokens_per_second=plan.choice.tokens_per_second,
        )  # fmt: skip
    steps = [event for event in events if event["event"] == "step"]
    peak, reserved = torch.cuda.max_memory_allocated() / GB, torch.cuda.max_memory_reserved() / GB
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        **asdict(run),
        "engine_used": plan.memory.engine,
        "micro_batch_size": config.training.micro_batch_size,
        "micro_batch_tokens": config.training.micro_batch_tokens,
        "plan": plan.memory.reason,
        "predicted": plan.memory.predicted_peak_gb,
        "calibration": [{key: event[key] for key in ("predicted_gb", "measured_gb")} for event in ready.calibration],
        "peak": peak,
        "reserved": reserved,
        "used": max([peak, *(event["measured_gb"] or 0.0 for event in ready.calibration[-1:])]) / run.cap,
        "out_of_memory": sum(event["event"] == "out_of_memory" for event in events),
        "steps": state.step,
        "tok_s": statistics.median(event["tokens_per_second"] for event in steps[-max(5, run.steps // 2) :]),
        "predicted_tok_s": plan.choice.tokens_per_second,
        "losses": [event["loss"] for event in steps],
        "graphs": plan.choice.graphs,
        "packed": config.data.packed,
        "replayed": plan.choice.candidate.replayed,
        "captured": sum("CUDA graph for" in str(event.get("message", "")) for event in events),
        "pool": plan.memory.pool_gb,
        "fullest": fullest(run, plan, examples),
    }


def fullest(run: Capped, plan: Any, examples: list[TokenizedExample]) -> dict[str, Any] | None:
    """Of the plans within the cap that use at least 85% of it, the fastest by prediction; None if there is none."""
    lengths = [len(example) for example in examples]
    found = choices_of(
        configuration(run), plan.shape, plan.setup, lengths, lengths, run.cap, plan.card, host=plan.host,
        weights_gb=plan.weights_gb, trainable=plan.trainable,
    )  # fmt: skip
    full = [each for each in found if each.fits and each.plan.predicted_peak_gb >= 0.85 * run.cap]
    if not full:
        return None
    chosen = min(full, key=lambda each: each.step_seconds)
    return {"size": chosen.candidate.size, "graphs": chosen.graphs, "tok_s": chosen.tokens_per_second}


def summary(result: dict[str, Any]) -> str:
    """What ran, on what, and how it went."""
    rows = result["rows"]
    retries = sum(row["out_of_memory"] for row in rows)
    low = [row for row in rows if row["used"] < 0.85]
    slower = sum(row["fullest"] is None or row["fullest"]["tok_s"] < row["predicted_tok_s"] for row in low)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{len(rows)} runs of `memory: auto` on one {result['hardware']} ({versions}), the allocator held to the cap, `python "
        f"benchmarks/caps.py OUT.json`: {retries or 'no'} step{'' if retries == 1 else 's'} out of memory. `used` is the larger "
        "of the dry step's peak, which has the largest micro-batch that the data can give, and the run's. "
        f"{len(rows) - len(low)} use at least 85% of the cap; of the other {len(low)}, {slower} would be slower with more."
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each run with its cap, plan, use and speed."""
    lines = [
        "| model | method | engine | cap GB | steps | micro-batch | plan | predicted GB | peak | reserved | used | retries | tokens/s "
        "| predicted | fastest of at least 85% |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = row["micro_batch_tokens"] or row["micro_batch_size"]
        more = row["fullest"]
        other = "" if row["used"] >= 0.85 else "none" if more is None else f"{more['tok_s']:,.0f}"
        lines.append(
            f"| {row['shape']} | {row['method']}{', padded' if row.get('padded') else ''} | {row['engine_used']} | {row['cap']:g} "
            f"| {row['steps']} | {size}{' tokens' if row['micro_batch_tokens'] else ''} | {row['plan'].split(': ', 2)[2]}{', CUDA graphs' if row['graphs'] else ''} | {row['predicted']:.2f} "
            f"| {row['peak']:.2f} | {row['reserved']:.2f} | {row['used']:.0%} | {row['out_of_memory']} "
            f"| {row['tok_s']:,.0f} | {row['predicted_tok_s']:,.0f} | {other} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text(encoding="utf-8"))["rows"]))
        return

    from tunesmith.errors import TunesmithError
    from tunesmith.hardware import probe
    from tunesmith.workflows.bench_step import versions

    hardware = probe("cuda")
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    model, loaded = None, None
    for run in (replace(run, steps=options.steps) for run in RUNS if re.search(options.only, run.name)):
        case = Case(run.shape, run.method, "auto", "auto", 1, 1)
        if loaded != (run.shape, run.method):
            model = None
            clean(hardware)
            model, loaded = load(case, hardware), (run.shape, run.method)
        try:
            rows.append(measure(run, model, hardware))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        except TunesmithError as error:
            failed.append({**asdict(run), "error": str(error)})
            print(f"{run.name}: {error}", flush=True)
        result = {
            "hardware": hardware.name,
            "versions": versions(Row("tunesmith", run.shape, "lora", (1,))),
            "rows": rows,
            "failed": failed,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
