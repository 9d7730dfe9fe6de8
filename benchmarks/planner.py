"""The planner's predictions against a card: peak memory and tokens/s of whole steps, and of the moments that make the peak.

    python benchmarks/planner.py OUT.json [--cases fitted|fresh|blind|bf16_weights] [--only TEXT]     (on a GPU: measure)
    python benchmarks/planner.py --table OUT.json                                        (anywhere: the table of docs/planner.md)

The shares in memory/speed.py were fitted to `fitted`, and again with `fresh`; nothing was fitted to `blind`, which says what a
prediction is worth.

Random weights and tokens, every token supervised, rank 16 (unless said) on all linear layers. Of each setting: what is
allocated with the optimizer's states there, after the forward of the decoder's layers, the head's peak, the backward's peak,
the peak of a whole step; then the median of four steps after four. One model a shape and method, its settings one after
another in one process. Predictions are made with calibration off, from the shape alone.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.cards import find_card
from tunesmith.config import Method
from tunesmith.memory.choose import Candidate, step_seconds
from tunesmith.memory.estimate import Estimate, Load, Setup
from tunesmith.memory.policy import plan_memory
from tunesmith.memory.shape import ModelShape
from tunesmith.types import GB
from tunesmith.workflows.bench import SHAPES, Row


@dataclass(frozen=True, slots=True)
class Case:
    """One setting. `mode` is `memory.mode`: everything kept (`fast`), given up (`min`), or what fits `limit` GB (`auto`);
    `micro` micro-batches a step; `weights` is `optimizer.weights_dtype`.
    """

    shape: str
    method: Method
    engine: Literal["auto", "reference"]
    mode: Literal["fast", "min", "auto"]
    batch: int
    seq: int
    optimizer: str = "adamw_8bit"
    packed: bool = False
    rank: int = 16
    micro: int = 1
    limit: float | None = None
    weights: Literal["fp32", "bf16"] = "fp32"

    @property
    def name(self) -> str:
        """What `--only` looks into."""
        return f"{self.shape} {self.method} {self.engine} {self.mode} {self.batch}x{self.seq} {self.optimizer}"


def _cases(shape: str, method: Method, *settings: tuple[Any, ...]) -> Iterator[Case]:
    for engine, mode, batch, seq, *more in settings:
        yield Case(shape, method, engine, mode, batch, seq, **(more[0] if more else {}))


FULL_STATES = {"optimizer": "adamw"}
FITTED: list[Case] = [
    *_cases(
        "qwen2.5-3b", "qlora", ("auto", "fast", 4, 1024), ("auto", "min", 4, 1024), ("reference", "fast", 4, 1024),
        ("reference", "min", 4, 1024), ("auto", "min", 1, 8192), ("auto", "fast", 8, 512, {"packed": True}),
        ("auto", "fast", 1, 2048), ("reference", "fast", 1, 1024), ("auto", "fast", 1, 512), ("auto", "min", 2, 8192),
        ("auto", "fast", 1, 128),
    ),
    *_cases(
        "llama-3.1-8b", "qlora", ("auto", "fast", 2, 2048), ("auto", "min", 2, 2048), ("reference", "fast", 1, 2048),
        ("reference", "min", 2, 2048), ("auto", "fast", 4, 512), ("auto", "min", 1, 8192), ("auto", "fast", 1, 8192),
        ("reference", "min", 4, 2048), ("auto", "min", 8, 2048), ("auto", "fast", 1, 1024), ("auto", "fast", 1, 256),
    ),
    *_cases(
        "qwen2.5-3b", "full", ("auto", "fast", 2, 1024, FULL_STATES), ("reference", "min", 2, 1024),
        ("auto", "fast", 4, 1024, {"micro": 2}),
    ),
    *_cases(
        "qwen2.5-0.5b", "lora", ("auto", "fast", 8, 512), ("reference", "fast", 8, 512), ("reference", "min", 8, 512),
        ("auto", "min", 4, 2048),
    ),
    *_cases(
        "qwen2.5-0.5b", "full", ("auto", "fast", 8, 1024, FULL_STATES), ("reference", "fast", 8, 1024, FULL_STATES),
        ("reference", "min", 4, 2048, FULL_STATES), ("auto", "min", 4, 2048), ("auto", "fast", 2, 512, {"micro": 4}),
    ),
    *_cases("qwen2.5-0.5b", "qlora", ("auto", "fast", 4, 1024), ("reference", "fast", 2, 2048)),
    *_cases("llama-3.1-8b", "lora", ("auto", "fast", 4, 2048), ("reference", "fast", 2, 2048), ("auto", "fast", 2, 2048)),
    *_cases(
        "qwen2.5-3b", "lora", ("auto", "fast", 1, 8192), ("reference", "min", 4, 2048), ("reference", "fast", 2, 1024),
        ("auto", "min", 4, 2048, FULL_STATES), ("auto", "fast", 4, 1024, {"rank": 64, **FULL_STATES}),
    ),
    *_cases("smollm2-135m", "lora", ("auto", "fast", 16, 128), ("reference", "fast", 16, 128), ("auto", "fast", 4, 2048)),
    *_cases("smollm2-135m", "full", ("auto", "fast", 16, 128, FULL_STATES), ("reference", "fast", 8, 1024, FULL_STATES)),
]  # fmt: skip

PAGED = {"optimizer": "paged_adamw_8bit"}
FRESH: list[Case] = [
    *_cases(
        "qwen2.5-3b", "qlora", ("auto", "auto", 8, 1024, {"limit": 16}), ("auto", "auto", 4, 2048, {"limit": 8}),
        ("reference", "auto", 4, 1024, {"limit": 12}), ("auto", "fast", 2, 4096), ("auto", "min", 8, 512, PAGED),
    ),
    *_cases(
        "llama-3.1-8b", "qlora", ("auto", "auto", 4, 2048, {"limit": 24}), ("auto", "auto", 2, 4096, {"limit": 16}),
        ("reference", "auto", 2, 2048, {"limit": 24}), ("auto", "fast", 2, 512), ("auto", "min", 4, 1024),
        ("auto", "fast", 3, 1024, {"packed": True}),
    ),
    *_cases(
        "llama-3.1-8b", "lora", ("auto", "auto", 4, 2048, {"limit": 32}), ("auto", "min", 2, 4096),
        ("reference", "min", 2, 2048), ("auto", "fast", 1, 512),
    ),
    *_cases("qwen2.5-3b", "lora", ("auto", "auto", 8, 2048, {"limit": 24}), ("reference", "min", 1, 8192)),
    *_cases("qwen2.5-3b", "full", ("auto", "auto", 4, 1024, {"limit": 40}), ("auto", "min", 2, 2048)),
    *_cases(
        "qwen2.5-0.5b", "lora", ("auto", "fast", 1, 8192), ("auto", "auto", 8, 1024, {"limit": 4}), ("reference", "min", 2, 4096),
    ),
    *_cases(
        "qwen2.5-0.5b", "full", ("auto", "auto", 8, 1024, {"limit": 10, **FULL_STATES}), ("reference", "fast", 4, 512, PAGED),
        ("auto", "fast", 2, 2048, PAGED),
    ),
    *_cases("qwen3-4b", "qlora", ("auto", "fast", 2, 2048), ("auto", "min", 4, 2048), ("reference", "min", 2, 2048)),
    *_cases("phi-3.5-mini", "lora", ("auto", "fast", 2, 2048), ("reference", "min", 2, 2048)),
    *_cases("gemma-2-2b", "qlora", ("auto", "fast", 2, 2048), ("auto", "min", 4, 1024), ("reference", "min", 2, 1024)),
]  # fmt: skip

BLIND: list[Case] = [
    *_cases(
        "qwen2.5-3b", "qlora", ("auto", "fast", 2, 1024), ("auto", "auto", 16, 512, {"limit": 12}), ("auto", "min", 2, 4096),
        ("reference", "fast", 2, 512), ("reference", "min", 8, 1024),
    ),
    *_cases(
        "llama-3.1-8b", "qlora", ("auto", "auto", 8, 1024, {"limit": 40}), ("auto", "fast", 1, 4096), ("auto", "min", 1, 2048),
        ("reference", "auto", 4, 1024, {"limit": 20}), ("auto", "fast", 6, 512, {"packed": True}),
    ),
    *_cases(
        "llama-3.1-8b", "lora", ("auto", "fast", 2, 1024), ("auto", "auto", 1, 8192, {"limit": 24}), ("reference", "fast", 1, 1024),
    ),
    *_cases(
        "qwen2.5-3b", "lora", ("auto", "fast", 4, 512), ("reference", "auto", 2, 4096, {"limit": 24}), ("auto", "min", 1, 4096),
    ),
    *_cases("qwen2.5-3b", "full", ("auto", "fast", 1, 2048), ("reference", "min", 4, 512)),
    *_cases("qwen2.5-0.5b", "lora", ("auto", "fast", 4, 4096), ("reference", "fast", 4, 1024), ("auto", "min", 16, 512)),
    *_cases("qwen2.5-0.5b", "full", ("auto", "fast", 4, 1024), ("reference", "min", 2, 1024, FULL_STATES)),
]  # fmt: skip

BF16 = {"weights": "bf16"}
BF16_WEIGHTS: list[Case] = [
    *_cases(
        "llama-3.1-8b", "full", ("auto", "min", 4, 2048, BF16), ("auto", "auto", 4, 2048, {"micro": 4, **BF16}),
        ("auto", "fast", 2, 2048, BF16), ("auto", "min", 4, 2048, {"micro": 2, **BF16}), ("reference", "min", 2, 2048, BF16),
    ),
    *_cases(
        "qwen2.5-3b", "full", ("auto", "fast", 2, 1024, BF16), ("reference", "min", 2, 1024, BF16),
        ("auto", "fast", 4, 1024, {"micro": 2, **BF16}), ("auto", "fast", 2, 1024, {**FULL_STATES, **BF16}),
        ("auto", "min", 2, 2048, {**PAGED, **BF16}),
    ),
    *_cases("qwen2.5-0.5b", "full", ("auto", "fast", 8, 1024, BF16), ("reference", "fast", 4, 512, BF16)),
]  # fmt: skip
SETS = {"fitted": FITTED, "fresh": FRESH, "blind": BLIND, "bf16_weights": BF16_WEIGHTS}


# -- prediction -------------------------------------------------------------------------------------------------------


def predict(row: dict[str, Any], card: str = "H100") -> tuple[float, float]:
    """Peak GB and tokens/s of a measured row's setting, from its shape alone."""
    shape = ModelShape.of(SHAPES[row["shape"]])
    full, tokens = row["method"] == "full", row["batch"] * row["seq"]
    setup = Setup(
        method=row["method"],
        engine=row["engine_used"],
        r=0 if full else row["rank"],
        optimizer=row["optimizer"],
        scheme="nf4" if row["method"] == "qlora" else None,
        weights_dtype=row.get("weights", "fp32"),
    )
    load = Load(tokens, tokens, row["seq"], row["micro"] > 1)
    plan = plan_memory(Estimate(shape, setup, load), row["mode"], row.get("limit"), graphs=row.get("graphs", False))
    candidate = Candidate(row["batch"], row["micro"], load, load, row["micro"] * load.tokens)
    seconds = step_seconds(shape, setup, candidate, plan, find_card(card), row["graphed"], row.get("host", 1.0))
    assert plan.predicted_peak_gb is not None
    return plan.predicted_peak_gb, tokens * row["micro"] / seconds


def summary(result: dict[str, Any]) -> str:
    """What was measured, on what, and how far off the predictions are."""
    pairs = [(predict(row), row) for row in result["rows"]]
    peaks = [peak / row["peak_step"] - 1 for (peak, _), row in pairs]
    speeds = [speed / row["tok_s"] - 1 for (_, speed), row in pairs]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    cases = "" if result.get("cases", "fitted") == "fitted" else f" --cases {result['cases']}"
    fitted = (
        "nothing was fitted to these rows"
        if cases.endswith(("blind", "bf16_weights"))
        else "the shares of the data sheet were fitted to these rows, and others"
    )
    return (
        f"{len(pairs)} settings on one {result['hardware']} ({versions}), `python benchmarks/planner.py OUT.json{cases}`: peaks are "
        f"predicted within {min(peaks):+.1%} and {max(peaks):+.1%}, tokens/s within {min(speeds):+.0%} and {max(speeds):+.0%}, "
        f"{sum(abs(speed) <= 0.15 for speed in speeds)} of them within 15% ({fitted}). {result.get('note', '')} Random weights and tokens, every token supervised, rank 16 on "
        "all linear layers and 8-bit AdamW unless said."
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each setting with measured and predicted peak and speed."""
    lines = [
        "| model | method | engine | activations | batch x tokens | peak GB | predicted | | tokens/s | predicted | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak, speed = predict(row)
        more = [] if row["rank"] == 16 else [f"rank {row['rank']}"]
        more += [row["optimizer"]] if row["optimizer"] != "adamw_8bit" else []
        more += ["bf16 weights"] if row.get("weights") == "bf16" else []
        size = f"{row['batch']} x {row['seq']}" + (f" x {row['micro']}" if row["micro"] > 1 else "")
        lines.append(
            f"| {row['shape']} | {', '.join([row['method'], *more])} | {row['engine_used']} "
            f"| {_activations(row)} | {size}{' packed' if row['packed'] else ''} "
            f"| {row['peak_step']:.2f} | {peak:.2f} | {peak / row['peak_step'] - 1:+.1%} "
            f"| {row['tok_s']:,.0f} | {speed:,.0f} | {speed / row['tok_s'] - 1:+.0%} |"
        )
    return "\n".join(lines)


def _activations(row: dict[str, Any]) -> str:
    return {"fast": "kept", "min": "given up"}.get(
        row["mode"], "what fits the card" if row.get("limit") is None else f"what fits {row['limit']:g} GB"
    )


# -- measurement ------------------------------------------------------------------------------------------------------


def measure(case: Case, model: Any, hardware: Any) -> dict[str, Any]:
    """The moments of a step in GB of allocated memory, and its speed."""
    import torch

    from tunesmith.data.batches import make_batch
    from tunesmith.models.forward import ModelForward
    from tunesmith.models.fuse import engine_of
    from tunesmith.training.graphs import micro_batch_graphs
    from tunesmith.training.loop import accumulate_gradients
    from tunesmith.training.objectives import SupervisedFineTuning, cross_entropy_sum
    from tunesmith.training.optimizers import make_optimizer
    from tunesmith.training.prepare import prepare
    from tunesmith.workflows.bench_step import configuration, documents
    from tunesmith.workflows.host import host_factor
    from tunesmith.workflows.run_plan import plan_run

    renew(model, hardware)
    row = _row(case)
    config = configuration(row, case.engine)
    config.optimizer.name, config.method, config.memory.limit_gb = case.optimizer, case.method, case.limit
    config.optimizer.weights_dtype = case.weights
    forward = ModelForward(model, hardware.device, "bf16")
    examples = documents(row, row.documents)
    host_factor.cache_clear()  # a shared processor's speed changes within minutes
    run_plan = plan_run(config, forward, hardware, examples)
    plan = run_plan.memory
    forward.loss_rows = plan.loss_rows
    prepare(model, plan, torch.bfloat16)
    optimizer = make_optimizer(model, config.optimizer, config.lr)
    optimizer.connect(engine_of(model))
    scaler, objective = torch.amp.GradScaler("cuda", enabled=False), SupervisedFineTuning()
    parts, steps = [examples] * case.micro, itertools.count()

    def step(graphs: Any = None) -> None:
        accumulate_gradients(forward, objective, parts, case.packed, 0, scaler, graphs)
        optimizer.step(scaler, config.optimizer.max_grad_norm, rounding_seed=next(steps))

    def peak() -> float:  # managed memory counts as if it lay on the GPU
        torch.cuda.synchronize()
        found = (torch.cuda.max_memory_allocated() + optimizer.paged_bytes) / GB
        torch.cuda.reset_peak_memory_stats()
        return found

    found: dict[str, Any] = {**asdict(case), "engine_used": plan.engine, "hw": hardware.name, "plan": plan.reason}
    found |= {"graphs": run_plan.choice.graphs, "host": run_plan.host}
    step()
    step()
    peak()
    step()
    found["peak_step"] = peak()
    batch = make_batch(examples, case.packed, 0, hardware.device)
    found["static"] = torch.cuda.memory_allocated() / GB
    with forward.autocast():
        hidden = forward.hidden(batch)
        found["stored_body"], found["peak_body"] = torch.cuda.memory_allocated() / GB, peak()
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.supervised)
        loss = cross_entropy_sum(forward, rows, batch.supervised_labels) / batch.num_supervised
        del hidden, rows
        found["peak_head"] = peak()
    loss.backward()
    found["peak_backward"] = peak()
    optimizer.reset()
    del batch, loss
    clean(hardware)
    graphs = micro_batch_graphs(config, forward, objective, optimizer, scaler, lambda event: None)
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(graphs)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found["tok_s"] = row.tokens * case.micro / statistics.median(seconds[4:])
    found["graphed"] = bool(graphs and any(known.graph for known in graphs.known.values()))
    found["reserved"] = torch.cuda.max_memory_reserved() / GB
    free, total = torch.cuda.mem_get_info()
    found["context"] = (total - free) / GB - torch.cuda.memory_reserved() / GB
    return found


def renew(model: Any, hardware: Any) -> None:
    """Undo what an earlier case made of the model."""
    from tunesmith.models.fuse import engine_of, unfuse

    if engine_of(model) is not None:
        unfuse(model)
    for parameter in model.parameters():
        parameter.grad = None
    clean(hardware)


def clean(hardware: Any) -> None:
    """Give back what nobody holds."""
    import torch

    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of the streams that graphs were captured on
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(hardware.device)


def _row(case: Case) -> Row:
    method = "lora" if case.method == "full" else case.method
    return Row(
        "tunesmith", case.shape, method, (case.seq,) * case.batch, memory=case.mode, packed=case.packed, rank=case.rank
    )


def load(case: Case, hardware: Any) -> Any:
    """The model of a case, with its adapter."""
    import torch

    from tunesmith.models.adapters import add_adapter
    from tunesmith.workflows.bench_step import configuration, random_model

    row = _row(case)
    torch.manual_seed(0)
    if case.method == "full":
        return random_model(row, case.weights, hardware.device, quantize=False).train().requires_grad_()
    base = random_model(row, "bf16", hardware.device, case.method == "qlora")
    return add_adapter(base, configuration(row, "reference").adapter, case.shape).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", choices=tuple(SETS), default="fitted")
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text(encoding="utf-8"))["rows"]))
        return

    from tunesmith.hardware import probe
    from tunesmith.workflows.bench_step import versions

    hardware = probe("cuda")
    rows: list[dict[str, Any]] = []
    model, loaded = None, None
    for case in (case for case in SETS[options.cases] if options.only in case.name):
        key = (case.shape, case.method, case.rank, case.weights)
        if key != loaded:
            model = None
            clean(hardware)
            model, loaded = load(case, hardware), key
        rows.append(measure(case, model, hardware))
        peak, speed = predict(rows[-1])
        print(
            f"{case.name}: {rows[-1]['peak_step']:.2f} ({peak:.2f}) GB, {rows[-1]['tok_s']:,.0f} ({speed:,.0f}) tokens/s"
        )
        result = {"hardware": hardware.name, "cases": options.cases, "versions": versions(_row(case)), "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
