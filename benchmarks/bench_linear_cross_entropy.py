"""The head with its cross-entropy, forward and backward, at the sizes of Llama-3.1-8B and Qwen2.5-1.5B.

    python benchmarks/bench_linear_cross_entropy.py [--trainable] [--chunk-rows 1024 4096] [--out FILE.json]

One GPU, bf16 (fp16 where the card has no bf16), every row supervised. "eager" and "torch.compile" hold all logits at once;
"Liger" is its fused linear cross-entropy, if installed; "log-probabilities" is what preference losses use, with a third
product in the backward. The head is frozen, or with `--trainable` has a gradient, too. `--chunk-rows` adds rows with other
chunk sizes.

First of all the loss and its gradients are compared with fp64: where the error of ours is more than twice that of eager
PyTorch plus one ulp, nothing is reported. Times are medians of triton.testing.do_bench, which empties the L2 cache.
TFLOP/s count the products that are needed (two, or three with `--trainable`); "of GEMM" is the time of just these, each
done once over all rows, as a share of the time taken. MB is the peak beyond the inputs, gradients included. The last line is the kernel alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.kernels import linear_cross_entropy as module
from tunesmith.kernels.chunks import chunk_rows
from tunesmith.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    linear_log_probabilities,
)

SIZES = [(8192, 4096, 128256), (4096, 2048, 151936)]  # rows, hidden, vocabulary

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def eager(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(rows, weight).float(), labels, reduction="sum")


def log_probabilities(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -linear_log_probabilities(rows, weight, labels).sum()


def contestants(sizes: Iterable[int]) -> dict[str, Loss]:
    found: dict[str, Loss] = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        pass  # the first line says so
    else:
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger"] = lambda rows, weight, labels: liger(weight, rows, labels)
    found["ours"] = linear_cross_entropy
    for size in sizes:
        found[f"ours, {size} rows a chunk"] = lambda *inputs, size=size: linear_cross_entropy(*inputs, chunk_rows=size)
    return found | {"ours, log-probabilities": log_probabilities}


def step(loss: Loss, rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Forward and backward, into fresh gradients."""
    rows.grad = weight.grad = None
    value = loss(rows, weight, labels)
    value.backward()
    return value.detach()


def results(value: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"loss": value.reshape(1), "rows": rows.grad, "weight": weight.grad}
    return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}


def exact_results(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The reference in fp64, 512 rows at a time."""
    rows64, weight64 = (t.detach().double().requires_grad_(t.requires_grad) for t in (rows, weight))
    value = torch.zeros((), dtype=torch.float64, device=rows.device)
    for part in torch.arange(len(rows), device="cpu").split(512):
        chunk = slice(int(part[0]), int(part[-1]) + 1)
        loss = linear_cross_entropy_ref(rows64[chunk], weight64, labels[chunk])
        loss.backward()
        value += loss.detach()
    return results(value, rows64, weight64)


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to its largest exact value."""
    return {
        name: float((found[name] - expected).abs().max() / expected.abs().max()) for name, expected in exact.items()
    }


def check(name: str, found: dict[str, float], plain: dict[str, float], epsilon: dict[str, float]) -> None:
    for what, error in found.items():
        # A sum's error is luck: rows cancel. In fp32 from logits in 16 bits, 1e-5 is a wrong digit in no row.
        allowed = max(1e-5, 2 * plain[what]) if what == "loss" else 2 * plain[what] + epsilon[what]
        if not error <= allowed:  # NaN fails
            raise SystemExit(
                f"{name}: error of {what} is {error:.2e}, allowed {allowed:.2e}: there is no time to report"
            )


def milliseconds(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(function, warmup=100, rep=500, return_mode="median")


def peak_mb(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def products(rows: torch.Tensor, weight: torch.Tensor, trainable: bool) -> float:
    """Milliseconds of the head's products alone, with all logits at once."""
    x, w = rows.detach(), weight.detach()
    logits, dx = x @ w.t(), torch.empty_like(x)
    ms = milliseconds(lambda: torch.mm(x, w.t(), out=logits)) + milliseconds(lambda: torch.mm(logits, w, out=dx))
    if trainable:
        dw = torch.empty_like(w)
        ms += milliseconds(lambda: torch.mm(logits.t(), x, out=dw))
    return ms


def kernel_row(rows: torch.Tensor, labels: torch.Tensor, vocabulary: int) -> dict[str, Any]:
    """The kernel alone, on one chunk: read twice, written once. It works in place: what it reads makes no difference."""
    size = chunk_rows(len(rows), vocabulary)
    logits = torch.randn(size, vocabulary, dtype=rows.dtype, device=rows.device)
    losses = torch.empty(size, device=rows.device)
    options = module._Options(1.0, None, 0.0, 0.0, -100)

    def run() -> None:
        module._cross_entropy(logits, labels[:size], losses, options, gradient=True, factors_C=None, factor=1.0)

    ms = milliseconds(run)
    num_bytes = 3 * logits.numel() * logits.element_size()
    return {"kernel_rows": size, "kernel_ms_all_rows": ms * len(rows) / size, "kernel_gb_s": num_bytes / ms / 1e6}


def copy_gb_s() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def bench(size: tuple[int, int, int], trainable: bool, sizes: Iterable[int], copy: float) -> dict[str, Any]:
    """All rows of one size."""
    num_rows, hidden, vocabulary = size
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    torch.manual_seed(0)
    rows = torch.randn(num_rows, hidden, device="cuda").to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, hidden, device="cuda")).to(dtype).requires_grad_(trainable)
    labels = torch.randint(vocabulary, (num_rows,), device="cuda")

    exact = exact_results(rows, weight, labels)
    epsilon = {name: torch.finfo(dtype).eps for name in exact}
    flops = (6 if trainable else 4) * num_rows * hidden * vocabulary
    gemm_ms = products(rows, weight, trainable)
    print(f"\n{num_rows} rows, hidden {hidden}, vocabulary {vocabulary}, head {'trainable' if trainable else 'frozen'}")
    print(f"  products alone: {gemm_ms:.2f} ms, {flops / gemm_ms / 1e9:.0f} TFLOP/s")
    print(f"  {'':28} {'ms':>8} {'TFLOP/s':>8} {'of GEMM':>8} {'MB':>7} {'error':>8}")
    table: list[dict[str, Any]] = []
    plain: dict[str, float] = {}
    for name, loss in contestants(sizes).items():
        found = errors(results(step(loss, rows, weight, labels), rows, weight), exact)
        plain = plain or found  # eager comes first
        if name.startswith("ours"):
            check(name, found, plain, epsilon)
        rows.grad = weight.grad = None
        peak = peak_mb(lambda loss=loss: step(loss, rows, weight, labels))
        ms = milliseconds(lambda loss=loss: step(loss, rows, weight, labels))
        row = {"name": name, "ms": ms, "tflops": flops / ms / 1e9, "of_gemm": gemm_ms / ms, "peak_mb": peak}
        table.append(row | {"errors": found})
        print(
            f"  {name:28} {ms:8.2f} {row['tflops']:8.0f} {row['of_gemm']:8.0%} {peak:7.0f} {found['rows']:8.1e}",
            flush=True,
        )
        rows.grad = weight.grad = None
    kernel = kernel_row(rows, labels, vocabulary)
    print(
        f"  the kernel alone: {kernel['kernel_ms_all_rows']:.2f} ms for all rows, {kernel['kernel_gb_s']:.0f} GB/s, "
        f"{kernel['kernel_gb_s'] / copy:.0%} of a copy's"
    )
    shape = {"rows": num_rows, "hidden": hidden, "vocabulary": vocabulary, "trainable": trainable, "dtype": str(dtype)}
    return shape | {"gemm_ms": gemm_ms, **kernel, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainable", action="store_true", help="the head's weight has a gradient, too")
    parser.add_argument("--chunk-rows", type=int, nargs="*", default=[], help="further chunk sizes")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    versions = {}
    for package in ("torch", "triton", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    copy = copy_gb_s()
    facts = {"device": torch.cuda.get_device_name(), **versions, "copy_gb_s": round(copy)}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    cases = []
    for size in SIZES:
        cases.append(bench(size, arguments.trainable, arguments.chunk_rows, copy))
        torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text(json.dumps(facts | {"cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
