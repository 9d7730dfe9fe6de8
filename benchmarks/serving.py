"""What it costs to serve several adapters over one base: throughput, latency, swaps and memory, in one process without HTTP.

    python benchmarks/serving.py OUT.json [--model NAME] [--device cuda] [--dtype bf16] [--rank 16] [--adapters 3] [--batch 32]
                                 [--prompt 256] [--new 128] [--repeats 3] [--peft]

The model has the shape of NAME (as in `tunesmith bench`) and random weights; the adapters are random files on every linear layer. Each
request reads --prompt tokens and writes --new; no answer ends before. Rows of the table:

base        no row wants an adapter, and none is loaded: what a merged model costs
single      all rows want the same adapter, the others are loaded too
mixed       rows want all adapters and the base in turn
peft        as mixed, by PEFT's `adapter_names` (--peft: one step of the batch, beside ours)

Tokens/s count written ones, medians of --repeats runs of two full batches, behind two that are not counted: CUDA graphs are captured
in the second. A swap is an adapter that takes another's name while a full
batch runs: `read` from the files to the device beside the batch, `exchange` from then to the first step that may use it. One step of the
batch meanwhile takes `step_meanwhile`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import queue
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import make_tokenizer
from tunesmith.hardware import compute_dtype, probe, torch_dtype
from tunesmith.models.forward import ModelForward
from tunesmith.serving.adapter_bank import BASE
from tunesmith.serving.adapter_files import read_adapter
from tunesmith.serving.engine import Engine
from tunesmith.serving.fixed_batch import FixedBatch
from tunesmith.serving.generation import Failed, Finished, Generation
from tunesmith.serving.running_batch import RunningBatch
from tunesmith.types import GB
from tunesmith.workflows.bench_step import random_model

TOKENIZER = make_tokenizer()
HELD = {"mixed_to_single": 0.8, "swap_seconds": 0.1, "adapter_memory": 1.1}
"""The bounds that are held: throughput at least, exchange at most, memory of the adapters over their files' at most."""


def write_adapter(base: torch.nn.Module, folder: Path, rank: int, seed: int) -> Path:
    """A random adapter on every linear layer but the head, in fp32 as training leaves them."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors, names = {}, set()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            names.add(name.rpartition(".")[2])
            for part, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                key = f"base_model.model.{name}.lora_{part}.weight"
                tensors[key] = 0.01 * torch.randn(shape, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(names)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return folder


class Bench:
    """An engine with adapters, and what is asked of it."""

    def __init__(self, forward: ModelForward, options: argparse.Namespace, folders: list[Path]):
        self.forward, self.options, self.folders = forward, options, folders
        self.engine = Engine(forward, options.batch, 10 * options.batch, warn=print)
        self.engine.start()
        self.numbers: list[int] = []
        self.generator = torch.Generator().manual_seed(0)

    def add(self, folder: Path) -> tuple[int, float, float]:
        """Load one; its number, and the seconds of reading and of the exchange."""
        start = time.perf_counter()
        weights = read_adapter(folder, self.forward.base, self.forward.device, torch_dtype(self.forward.dtype))
        wait(self.forward)
        read = time.perf_counter() - start
        start = time.perf_counter()
        number = self.engine.between_steps(lambda: self.engine.bank.add(weights)).result()
        return number, read, time.perf_counter() - start

    def ask(self, adapters: list[int], new: int) -> list[queue.Queue[Any]]:
        """A request for each of these."""
        rows = self.engine.vocabulary
        queues, generations = [], []
        for adapter in adapters:
            prompt = torch.randint(3, rows, (self.options.prompt,), generator=self.generator).tolist()
            queues.append(queue.Queue())
            generations.append(Generation(prompt, TOKENIZER, frozenset(), queues[-1].put, new, adapter))
        self.engine.submit(generations)
        return queues

    def answers(self, queues: list[queue.Queue[Any]]) -> None:
        """Wait for all of them."""
        for one in queues:
            while not isinstance(event := one.get(timeout=600), Finished):
                if isinstance(event, Failed):
                    raise SystemExit(f"a request failed: {event.message}")

    def tokens_per_second(self, adapters: list[int]) -> float:
        """Median over the repeats; two runs before them are not counted."""
        found = []
        for _ in range(2 + self.options.repeats):
            start = time.perf_counter()
            self.answers(self.ask(adapters, self.options.new))
            found.append(len(adapters) * self.options.new / (time.perf_counter() - start))
        return statistics.median(found[2:])

    def milliseconds_per_token(self, adapter: int) -> float:
        """Of one request alone, reading its prompt included: the median of the repeats, behind two runs that are not counted."""
        found = []
        for _ in range(2 + self.options.repeats):
            start = time.perf_counter()
            self.answers(self.ask([adapter], self.options.new))
            found.append(1000 * (time.perf_counter() - start) / self.options.new)
        return statistics.median(found[2:])

    def swaps(self, count: int) -> dict[str, Any]:
        """Replace the first adapter again and again while a full batch runs."""
        queues: list[queue.Queue[Any]] = []
        reads, exchanges, steps = [], [], []
        for place in range(count):
            if not self.engine.running:
                self.answers(queues)  # which says if they failed
                queues = self.ask([self.numbers[-1]] * self.options.batch, 10 * self.options.new)
                while not self.engine.running:
                    time.sleep(0.001)
            start, before = time.perf_counter(), self.engine.steps
            number, read, exchange = self.add(self.folders[place % len(self.folders)])
            old, self.numbers[0] = self.numbers[0], number
            self.engine.between_steps(lambda old=old: self.engine.bank.remove(old, replaced=True)).result()
            reads.append(read)
            exchanges.append(exchange)
            if done := self.engine.steps - before:
                steps.append((time.perf_counter() - start) / done)
        self.engine.stop()
        return {
            "read_median": statistics.median(reads),
            "exchange_median": statistics.median(exchanges),
            "exchange_most": max(exchanges),
            "exchanges": exchanges,
            "step_meanwhile_median": statistics.median(steps),
        }


def wait(forward: ModelForward) -> None:
    if forward.device.startswith("cuda"):
        torch.cuda.synchronize()


def allocated(forward: ModelForward) -> float | None:
    """GB on the GPU; None elsewhere."""
    if not forward.device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() / GB


def step_milliseconds(forward: ModelForward, options: argparse.Namespace, before: Any) -> float:
    """Median of the steps of a full batch; `before` gives the context of each."""
    rows = [SimpleNamespace(length=0, adapter=BASE, whole=0) for _ in range(options.batch)]
    batch: RunningBatch[Any] = RunningBatch(forward)
    found = []
    with torch.inference_mode(), forward.autocast():
        with before():
            batch.read(rows, [list(range(3, 3 + options.prompt))] * options.batch)
        for _ in range(24):
            wait(forward)
            start = time.perf_counter()
            with before():
                batch.step([5] * options.batch)
            wait(forward)
            found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found[4:])


def by_peft(forward: ModelForward, options: argparse.Namespace, folders: list[Path]) -> dict[str, float]:
    """A step of a mixed batch, ours and by PEFT's `adapter_names`, on the same model one after the other."""
    from contextlib import nullcontext

    from peft import PeftModel

    from tunesmith.serving.adapter_bank import AdapterBank

    places = [row % (len(folders) + 1) for row in range(options.batch)]
    bank = AdapterBank(forward.base, forward.device)
    numbers = [
        bank.add(read_adapter(folder, forward.base, forward.device, torch_dtype(forward.dtype))) for folder in folders
    ]

    def select() -> Any:
        bank.select([[*numbers, BASE][place] for place in places])
        return nullcontext()

    ours = step_milliseconds(forward, options, select)
    bank.close()
    names = [f"a{place}" for place in range(len(folders))]
    adapted: Any = PeftModel.from_pretrained(forward.base, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        adapted.load_adapter(folder, name)
    adapted.eval()
    wanted = [[*names, "__base__"][place] for place in places]
    theirs = step_milliseconds(
        forward, options, lambda: adapted.base_model._enable_peft_forward_hooks(adapter_names=wanted)
    )
    adapted.unload()
    return {"ours_ms": ours, "peft_ms": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs to serve several adapters over one base.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen2.5-3b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--peft", action="store_true")
    for name, default in (
        ("rank", 16),
        ("adapters", 3),
        ("batch", 32),
        ("prompt", 256),
        ("new", 128),
        ("repeats", 3),
        ("swaps", 20),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    hardware = probe(options.device)
    dtype = compute_dtype(options.dtype, hardware)
    model = random_model(SimpleNamespace(model=options.model), dtype, hardware.device, False).eval()  # type: ignore[arg-type]
    forward = ModelForward(model, hardware.device, dtype)
    result: dict[str, Any] = {
        "hardware": hardware.describe(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "settings": {key: str(value) for key, value in vars(options).items()},
        "dtype": dtype,
    }
    with tempfile.TemporaryDirectory() as place:
        folders = [write_adapter(model, Path(place) / f"a{n}", options.rank, n) for n in range(options.adapters)]
        file_gb = (folders[0] / "adapter_model.safetensors").stat().st_size / GB
        if options.peft:
            result["step"] = by_peft(forward, options, folders)
        bench = Bench(forward, options, folders)
        two = 2 * options.batch
        speed: dict[str, float] = {}
        latency: dict[str, float] = {}
        result |= {"tokens_per_second": speed, "milliseconds_per_token_alone": latency}

        def measure(name: str, rows: list[int], alone: str | None = None) -> None:
            """Kept at once: a run that is cut short has what it measured until then."""
            speed[name] = bench.tokens_per_second(rows)
            if alone:
                latency[alone] = bench.milliseconds_per_token(rows[0])
            options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(f"{name}: {speed[name]:.0f} tokens/s", file=sys.stderr, flush=True)

        measure("base", [BASE] * two, "base")
        before = allocated(forward)
        for folder in folders:
            bench.numbers.append(bench.add(folder)[0])
            if len(bench.numbers) == 1:
                measure("single, one loaded", bench.numbers * two, "one loaded")
                before = allocated(forward) if before is None else before
        after = allocated(forward)
        adapters_gb = after - before if after is not None and before is not None else bench.engine.bank.bytes / GB
        measure("single", [bench.numbers[0]] * two, "all loaded")
        wanted = [*bench.numbers, BASE]
        measure("mixed", [wanted[row % len(wanted)] for row in range(two)])
        result |= {
            "memory": {
                "base_gb": sum(p.numel() * p.element_size() for p in model.parameters()) / GB,
                "adapter_file_gb": file_gb,
                "adapters_gb": adapters_gb,
            },
            "swap_seconds": bench.swaps(options.swaps),
        }
    if isinstance(bench.engine._batch, FixedBatch):
        places = bench.engine._batch.places
        graphs = {"captured": places.captured, "replayed": places.replayed, "launched": places.launched}
        result |= {"graphs": graphs, "places": [places.places, places.columns]}
    held = {
        "mixed_to_single": speed["mixed"] / speed["single"],
        "swap_seconds": result["swap_seconds"]["exchange_median"],
        "adapter_memory": adapters_gb / (options.adapters * file_gb),
    }
    result["held"] = {
        name: {
            "value": value,
            "bound": HELD[name],
            "passed": value >= HELD[name] if name == "mixed_to_single" else value <= HELD[name],
        }
        for name, value in held.items()
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    sys.exit(0 if all(one["passed"] for one in result["held"].values()) else 1)


if __name__ == "__main__":
    main()
