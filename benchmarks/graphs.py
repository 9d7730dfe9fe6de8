"""What a CUDA graph of a micro-batch costs: the time to capture one, and the driver's memory that each holds.

    python benchmarks/graphs.py OUT.json [SHAPE ...]    (on a GPU; qwen2.5-0.5b and qwen2.5-3b by default)

LoRA of random weights, rank 16, everything kept. One example a micro-batch, of 32 lengths. Of each length the capture with its
first replay, four replays, and three runs launch by launch. Times are seconds with a synchronization at both ends; `memory` is
what the driver has given away beyond what PyTorch reserved, in GB, after each capture. memory/replays.py has the constants that
these numbers are for.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner import Case, clean, load

from tunesmith.types import GB, TokenizedExample
from tunesmith.workflows.bench import SHAPES, Row

LENGTHS = [64 * number for number in range(1, 33)]


def measure(shape: str, hardware: Any) -> dict[str, Any]:
    """Medians over the lengths, and the driver's memory from the first graph to the last."""
    import numpy as np
    import torch

    from tunesmith.data.batches import make_batch
    from tunesmith.models.forward import ModelForward
    from tunesmith.models.fuse import engine_of
    from tunesmith.training import graphs as module
    from tunesmith.training.graphs import GraphedMicroBatches, shape_of
    from tunesmith.training.objectives import SupervisedFineTuning
    from tunesmith.training.optimizers import make_optimizer
    from tunesmith.training.prepare import prepare
    from tunesmith.workflows.bench_step import configuration
    from tunesmith.workflows.run_plan import plan_run

    model = load(Case(shape, "lora", "auto", "fast", 1, LENGTHS[-1]), hardware)
    config = configuration(Row("tunesmith", shape, "lora", (LENGTHS[-1],), memory="fast"), "auto")
    forward = ModelForward(model, hardware.device, "bf16")
    rng = np.random.default_rng(0)

    def example(length: int) -> TokenizedExample:
        ids = rng.integers(3, SHAPES[shape]["vocab_size"], length, dtype=np.int32)
        return TokenizedExample(ids, np.ones(length, dtype=bool))

    plan = plan_run(config, forward, hardware, [example(LENGTHS[-1])]).memory
    prepare(model, plan, torch.bfloat16)
    optimizer = make_optimizer(model, config.optimizer, config.lr)
    optimizer.connect(engine_of(model))
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    module.MAX_GRAPHS, module.PAYS_FROM, module.TOO_MANY = len(LENGTHS), 0.0, 1.0  # type: ignore[attr-defined]
    graphs = GraphedMicroBatches(forward, SupervisedFineTuning(), optimizer, scaler, lambda event: None)
    graphs.set_counts({"nll": 1000})

    def timed(run: Callable[[Any], Any], batch: Any) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        run(batch)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def exactly(length: int) -> int:
        return length

    rows = []
    for length in LENGTHS[-1:] * module.WARM_UPS + LENGTHS:
        batch = make_batch([example(length)], False, 0, hardware.device, exactly)
        captured = timed(graphs.run, batch)
        if graphs.runs <= module.WARM_UPS:
            continue
        replays = [timed(graphs.run, batch) for _ in range(4)]
        assert graphs.known[shape_of(batch)].graph is not None
        free, total = torch.cuda.mem_get_info()
        memory = (total - free - torch.cuda.memory_reserved()) / GB
        launches = [timed(graphs._forward_backward, batch) for _ in range(3)]
        rows.append(
            {
                "length": length,
                "captured": captured,
                "replayed": statistics.median(replays),
                "launched": statistics.median(launches),
                "memory": memory,
            }
        )
    graphs.give_up()
    found = {name: statistics.median(row[name] for row in rows) for name in ("captured", "replayed", "launched")}
    each = (rows[-1]["memory"] - rows[0]["memory"]) / (len(rows) - 1)
    return {"shape": shape, **found, "memory_each": each, "rows": rows}


def main() -> None:
    out, shapes = Path(sys.argv[1]), sys.argv[2:] or ["qwen2.5-0.5b", "qwen2.5-3b"]

    from tunesmith.hardware import probe
    from tunesmith.workflows.bench_step import versions

    hardware = probe("cuda")
    found = []
    for shape in shapes:
        found.append(measure(shape, hardware))
        print({name: value for name, value in found[-1].items() if name != "rows"}, flush=True)
        clean(hardware)
        result = {
            "hardware": hardware.name,
            "versions": versions(Row("tunesmith", shape, "lora", (1,))),
            "shapes": found,
        }
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
