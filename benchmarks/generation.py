"""Greedy answers side by side: tunesmith's ways to decode and transformers' `generate`, same weights, prompts and limit.

    python benchmarks/generation.py MODEL OUT.json --data FOLDER [--adapter FOLDER] [--rows N] [--plain-rows N] [--quick]

MODEL is a .gguf file or a folder (SmolLM2-135M-Instruct was used), FOLDER has train.jsonl and test.jsonl with rows
{"text", "label"} (Banking77). Without --adapter, a LoRA adapter is trained first (--steps): an untrained model does not end
its answers. The adapter stays un-merged in every variant but those called merged, which are transformers' fastest.
transformers at batch 8 answers --plain-rows of the prompts (every n-th; 0: all); ours is timed on those, too.

Seconds are medians with the device idle at both ends, without tokenizing; a first call of each variant with a few of the prompts
is not counted. Beside the speed stand the accuracy, and the share of answers that are those of the first variant (in 16 bits
not all are). `profile` is one more run with a synchronization around each part (reading, steps, captures), and the kernels of
a step. --quick leaves out what only says where the time goes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from banking77 import configuration

from tunesmith.config import RunConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.evaluation.answers import encode_questions
from tunesmith.evaluation.metrics import is_correct
from tunesmith.hardware import probe
from tunesmith.models import decode_graphs
from tunesmith.models.decode_graphs import StaticDecoder
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import unfuse
from tunesmith.models.generate import batch_size_for, end_tokens, generate_greedy
from tunesmith.out_of_memory import Halving
from tunesmith.types import GB, Example
from tunesmith.workflows.load import load
from tunesmith.workflows.rows import read_questions
from tunesmith.workflows.train import start

Prompts = list[list[int]]
Answers = list[list[int]]
COLUMNS = (
    "| variant | prompts | median s | prompts/s | times slowest | accuracy | same answers | mean tokens | peak GB |"
)


class Bench:
    """A model, the questions, and the measurements of both."""

    def __init__(self, forward: ModelForward, tokenizer: Any, chat: ChatFormat, rows: list[Example], new: int):
        self.forward, self.tokenizer, self.rows, self.new = forward, tokenizer, rows, new
        began = time.perf_counter()
        self.prompts: Prompts = encode_questions(chat, rows)
        self.tokenizing = time.perf_counter() - began
        self.results: list[dict[str, Any]] = []
        self.first: dict[int, list[int]] = {}
        self.warnings: list[str] = []

    def ours(self, **options: Any) -> Callable[[Prompts], Answers]:
        options.setdefault("batch_size", "auto")

        def answer(prompts: Prompts) -> Answers:
            halving = Halving(self.warnings.append)
            return generate_greedy(self.forward, self.tokenizer, prompts, self.new, halving=halving, **options)

        return answer

    def theirs(self, model: Any, batch_size: int) -> Callable[[Prompts], Answers]:
        """`model.generate` on left-padded batches in file order, as its users write it."""
        ends = end_tokens(self.forward.base, self.tokenizer)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ends[0]

        def answer(prompts: Prompts) -> Answers:
            answers: Answers = []
            with torch.inference_mode(), self.forward.autocast():
                for first in range(0, len(prompts), batch_size):
                    batch = prompts[first : first + batch_size]
                    width = max(map(len, batch))
                    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in batch])
                    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
                    found = model.generate(
                        input_ids=ids.to(self.forward.device),
                        attention_mask=mask.to(self.forward.device),
                        max_new_tokens=self.new,
                        do_sample=False,
                        eos_token_id=ends,
                        pad_token_id=pad,
                    )
                    for row in found[:, width:].tolist():
                        length = next((place for place, token in enumerate(row) if token in ends), len(row))
                        answers.append(row[:length])
            return answers

        return answer

    def measure(
        self, name: str, answer: Callable[[Prompts], Answers], every: int = 1, repeats: int = 3, base: bool = False
    ) -> None:
        """Time `answer` on every `every`-th prompt, and note what it said."""
        chosen = list(range(0, len(self.prompts), every))
        prompts = [self.prompts[index] for index in chosen]
        self.forward.model.eval()
        with self.forward.model.disable_adapter() if base else nullcontext():
            answer(prompts[: min(32, len(prompts))])
            clear()
            seconds = []
            for _ in range(repeats):
                wait()
                began = time.perf_counter()
                answers = answer(prompts)
                wait()
                seconds.append(time.perf_counter() - began)
        said = dict(zip(chosen, answers, strict=True))
        if not self.first:
            self.first = said
        texts = {index: self.tokenizer.decode(ids, skip_special_tokens=True) for index, ids in said.items()}
        result = {
            "variant": name,
            "prompts": len(prompts),
            "seconds": seconds,
            "median": statistics.median(seconds),
            "accuracy": statistics.mean(is_correct(self.expected(index), text) for index, text in texts.items()),
            "same_answers": None if base else statistics.mean(self.first[index] == said[index] for index in chosen),
            "mean_tokens": statistics.mean(map(len, answers)),
            "longest_answer": max(map(len, answers)),
            "peak_memory_gb": torch.cuda.max_memory_allocated() / GB if torch.cuda.is_available() else None,
        }
        self.results.append(result)
        print(
            f"{name}: {result['median']:.2f} s {[round(value, 2) for value in seconds]}, accuracy {result['accuracy']:.4f}, "
            f"same {result['same_answers']}, mean tokens {result['mean_tokens']:.1f}, longest {result['longest_answer']}",
            flush=True,
        )

    def expected(self, index: int) -> str:
        messages = self.rows[index].messages
        assert messages is not None
        return messages[-1].content

    def profile(self, decoding: str) -> dict[str, Any]:
        """Where the seconds of one run go; each part is waited for, so that their sum is more than a run takes."""
        parts: dict[str, list[float]] = defaultdict(list)
        computed = [0]

        class Timed(StaticDecoder):
            def _read(self, rests: Any, *rest: Any) -> None:
                computed[0] += len(rests)
                self.timed(f"read {len(rests)} prompts", super()._read, rests, *rest)

            def _capture(self, rows: int, length: int) -> None:
                self.timed("capture", super()._capture, rows, length)

            def _advance(self, rows: int, length: int, left: int) -> None:
                computed[0] += rows
                before = self.launched, self.captured
                seconds = self.timed("", super()._advance, rows, length, left)
                if self.captured == before[1]:  # else with the capture in it
                    kind = "launched" if self.launched > before[0] else "graph"
                    parts[f"step {kind} {rows} x {length}"].append(seconds)

            def timed(self, name: str, work: Callable[..., None], *arguments: Any) -> float:
                wait()
                began = time.perf_counter()
                work(*arguments)
                wait()
                seconds = time.perf_counter() - began
                if name:
                    parts[name].append(seconds)
                return seconds

        decode_graphs.StaticDecoder = Timed  # type: ignore[misc]
        try:
            answers = self.ours(decoding=decoding)(self.prompts)
        finally:
            decode_graphs.StaticDecoder = StaticDecoder  # type: ignore[misc]
        tokens = sum(len(answer) + 1 for answer in answers)  # and the end token
        found = {
            name: {"times": len(values), "median_ms": 1e3 * statistics.median(values), "total_s": sum(values)}
            for name, values in parts.items()
        }
        return {"parts": found, "tokens_computed": computed[0], "tokens_of_answers": tokens}

    def kernels(self) -> list[dict[str, Any]]:
        """The kernels of one step that is launched, with the most time first, and their sum."""
        from torch.profiler import ProfilerActivity, profile

        found: list[dict[str, Any]] = []

        class Profiled(StaticDecoder):
            def _advance(self, rows: int, length: int, left: int) -> None:
                if found or (rows, length) not in self._ran:
                    super()._advance(rows, length, left)
                    return
                with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
                    super()._advance(rows, length, left)
                    wait()
                for event in profiled.key_averages():
                    if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total:
                        row = {
                            "kernel": event.key[:110],
                            "calls": event.count,
                            "ms": event.self_device_time_total / 1e3,
                        }
                        found.append(row)

        decode_graphs.StaticDecoder = Profiled  # type: ignore[misc]
        try:
            self.ours(decoding="static")(self.prompts)
        finally:
            decode_graphs.StaticDecoder = StaticDecoder  # type: ignore[misc]
        return sorted(found, key=lambda row: -row["ms"])

    def table(self) -> str:
        """Markdown. Variants of the same prompts are compared: the slowest of them is 1."""
        lines = [COLUMNS, "|---" * COLUMNS.count(" | ") + "|---|"]
        for row in self.results:
            of = [other["median"] for other in self.results if other["prompts"] == row["prompts"]]
            same = "" if row["same_answers"] is None else f"{row['same_answers']:.4f}"
            peak = "" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.1f}"
            lines.append(
                f"| {row['variant']} | {row['prompts']:,} | {row['median']:.2f} | {row['prompts'] / row['median']:,.0f} "
                f"| {max(of) / row['median']:.1f} | {row['accuracy']:.4f} | {same} | {row['mean_tokens']:.1f} | {peak} |"
            )
        return "\n".join(lines)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def subject(options: argparse.Namespace, config: RunConfig) -> tuple[ModelForward, Any, ChatFormat]:
    """The model with an adapter: the one given, or one that is trained now."""
    if options.adapter:
        loaded = load(options.adapter, options.model)
        return loaded.forward, loaded.tokenizer, loaded.chat
    with tempfile.TemporaryDirectory() as folder:
        session = start(config, Path(folder) / "run")
        began = time.perf_counter()
        metrics = session.train().metrics
        print(
            f"trained {metrics['steps']} steps in {time.perf_counter() - began:.1f} s, loss {metrics['train_loss']:.3f}",
            flush=True,
        )
        return session.forward, session.tokenizer, session.chat


def variants(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Measure them all; returns the profile."""
    on_gpu = bench.forward.device.startswith("cuda")
    n, every = len(bench.prompts), 1
    if options.plain_rows:
        every = max(1, n // options.plain_rows)
    best = "graphs" if on_gpu else "static"
    auto = batch_size_for(bench.forward, "auto", max(map(len, bench.prompts)), bench.new, in_parts=True)
    print(f"{n} prompts, auto is batches of {auto}", flush=True)
    bench.measure(f"tunesmith, {best}, batch auto ({auto})", bench.ours(decoding=best))
    profile: dict[str, Any] = {"tokenizing_s": bench.tokenizing, "batch_auto": auto}
    if not options.quick:
        profile[best] = bench.profile(best)
        print(json.dumps(profile, indent=1), flush=True)
        if on_gpu:
            profile["kernels"] = kernels = bench.kernels()
            print(
                f"kernels of a step: {sum(row['ms'] for row in kernels):.2f} ms, {sum(row['calls'] for row in kernels)} calls"
            )
            for row in kernels[:16]:
                print(f"  {row['ms']:7.3f} ms {row['calls']:5d} x {row['kernel']}", flush=True)
        for size in (256, 512, 2048):
            bench.measure(f"tunesmith, {best}, batch {size}", bench.ours(decoding=best, batch_size=size), repeats=1)
        bench.measure(f"tunesmith, {best}, the base", bench.ours(decoding=best), repeats=1, base=True)
        bench.measure("tunesmith, launch by launch", bench.ours(decoding="static"), repeats=1)
    bench.measure("tunesmith, growing cache, batch 512", bench.ours(decoding="growing", batch_size=512), repeats=1)
    if every > 1:
        bench.measure(f"tunesmith, {best}, batch auto", bench.ours(decoding=best), every)
    model = bench.forward.model
    unfuse(model)
    bench.measure("transformers, batch 256", bench.theirs(model, 256), repeats=1)
    bench.measure("transformers, batch 8", bench.theirs(model, 8), every, repeats=1)
    merged = copy.deepcopy(model).merge_and_unload()
    bench.measure("transformers, batch 256, merged", bench.theirs(merged, 256), repeats=1)
    bench.measure("transformers, batch 8, merged", bench.theirs(merged, 8), every, repeats=1)
    return profile


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return found | {"cuda": str(torch.version.cuda)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapter", help="a run or an adapter folder, instead of training")
    parser.add_argument("--steps", type=int, default=313, help="training steps of 32 examples; 313 are an epoch")
    parser.add_argument("--rows", type=int, help="the first N test questions only")
    parser.add_argument("--plain-rows", type=int, default=308, help="prompts for transformers at batch 8; 0: all")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args(arguments)
    changes = ["optimizer.lr=1e-3", f"training.max_steps={options.steps}", *options.more]
    config = configuration(options.model, options.data, 0, changes)
    began = time.perf_counter()
    forward, tokenizer, chat = subject(options, config)
    print(f"model ready after {time.perf_counter() - began:.1f} s", flush=True)
    rows = list(read_questions(str(options.data / "test.jsonl")))[: options.rows]
    bench = Bench(forward, tokenizer, chat, rows, options.max_new_tokens)
    result: dict[str, Any] = {
        "hardware": probe(forward.device.split(":")[0]).name,
        "versions": versions(),
        "dtype": forward.dtype,
        "max_new_tokens": options.max_new_tokens,
        "adapter": options.adapter or f"trained for {options.steps} steps",
    }
    try:
        result["profile"] = variants(bench, options)
    finally:  # what was measured before something failed is worth keeping
        result |= {"variants": bench.results, "warnings": bench.warnings}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for warning in bench.warnings:
            print(f"warning: {warning}")
        print(f"\n{result['hardware']}, {result['versions']}, {forward.dtype}, at most {bench.new} new tokens\n")
        print(bench.table(), flush=True)


if __name__ == "__main__":
    main()
