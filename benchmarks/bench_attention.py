"""How fast each attention backend is on this GPU, forward and backward, at the head shapes of real models.

    python benchmarks/bench_attention.py [--backends cudnn flash2] [--out attention.json]

q, k and v are views into one buffer, as in a layer. A backend is timed only if its output and all three gradients are
within 1.5 eps of fp32 math, relative and in norm (bf16: 1.2%). Times are medians of triton.testing.do_bench, which clears
the L2 cache in between. TFLOP/s count 4 H d n^2 / 2 a sequence forward, 2.5 times that backward; "share" is the backward's
of a square matrix product on the same card; MB is the peak of forward and backward beyond what was there before. `>` marks
what choose_backend takes. FlexAttention's graph runs backward once: its backward is (both) - (forward).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from tunesmith.kernels.attention import (
    REFUSALS,
    AttentionSpec,
    SequenceLayout,
    attention_backward,
    attention_forward,
    choose_backend,
    refusal,
)

HEADS = {
    # name: (H, G, d, softcap)
    "Llama-3.1-8B 32/8 x 128": (32, 8, 128, None),
    "Qwen2.5-3B 16/2 x 128": (16, 2, 128, None),
    "SmolLM2-135M 9/3 x 64": (9, 3, 64, None),
    "Gemma-2-2B 8/4 x 256, softcap": (8, 4, 256, 50.0),
}


def mixed_lengths(total: int) -> tuple[int, ...]:
    """Lognormal document lengths, median 365, from 16 to 2048, that fill a row."""
    rng = random.Random(3)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(max(int(rng.lognormvariate(5.9, 0.9)), 16), 2048, left))
    return tuple(lengths)


def layouts(device: torch.device) -> dict[str, SequenceLayout]:
    def packed(lengths: tuple[int, ...]) -> SequenceLayout:
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return SequenceLayout.packed(bounds, lengths, sum(lengths))

    mixed = mixed_lengths(8192)
    return {
        "dense 4 x 2048": SequenceLayout.dense(4, 2048),
        "dense 4 x 1024": SequenceLayout.dense(4, 1024),
        "packed 16 x 512": packed((512,) * 16),  # equal lengths: as dense rows
        "packed 8 x (511, 513)": packed((511, 513) * 8),
        f"packed {len(mixed)} mixed": packed(mixed),
    }


def relative_errors(results: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> dict[str, float]:
    names = ("o", "dq", "dk", "dv")
    return {
        name: ((got.float() - want).norm() / want.norm()).item()
        for name, got, want in zip(names, results, exact, strict=True)
    }


def measure(
    backend: str,
    qkv: tuple[torch.Tensor, ...],
    do: torch.Tensor,
    layout: SequenceLayout,
    spec: AttentionSpec,
    exact: tuple[torch.Tensor, ...],
) -> dict[str, Any]:
    """Errors, and times in microseconds if they are small enough."""
    state: dict[str, Any] = {}

    def forward() -> None:
        state["o"], state["saved"] = attention_forward(*qkv, layout, spec, backend)

    def backward() -> None:
        state["gradients"] = attention_backward(do, *qkv, state["o"], state["saved"], layout, spec, backend)

    def both() -> None:
        forward()
        backward()

    both()
    errors = relative_errors((state["o"], *state["gradients"]), exact)
    if not all(error <= 1.5 * torch.finfo(do.dtype).eps for error in errors.values()):  # NaN fails
        return {"errors": errors, "wrong": True}
    state.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    megabytes = (torch.cuda.max_memory_allocated() - before) / 2**20

    def microseconds(function: Any) -> float:
        return 1000 * do_bench(function, warmup=20, rep=100, return_mode="median")

    forward_us = microseconds(forward)
    backward_us = microseconds(both) - forward_us if backend == "flex" else microseconds(backward)
    head_dim, num_heads = do.shape[2], do.shape[1]
    flops = sum(4 * num_heads * head_dim * length**2 / 2 for length in layout.lengths)
    return {
        "errors": errors,
        "forward_us": forward_us,
        "backward_us": backward_us,
        "forward_tflops": flops / forward_us / 1e6,
        "backward_tflops": 2.5 * flops / backward_us / 1e6,
        "peak_mb": megabytes,
    }


def matmul_tflops(data_type: torch.dtype, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=data_type) for _ in range(2))
    return 2 * size**3 / (1e9 * do_bench(lambda: a @ b, warmup=50, rep=200, return_mode="median"))


def run(backends: list[str]) -> dict[str, Any]:
    device = torch.device("cuda")
    data_type = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    ceiling = matmul_tflops(data_type)
    facts = {
        "device": torch.cuda.get_device_name(),
        "dtype": str(data_type).removeprefix("torch."),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "triton": importlib.metadata.version("triton"),
        "flash_attn_4": next(
            (d.version for d in importlib.metadata.distributions() if d.metadata["Name"] == "flash-attn-4"), None
        ),
        "matmul_tflops": ceiling,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "matmul_tflops"))
    print(f"a product of {facts['dtype']} matrices of 8192 x 8192: {ceiling:.0f} TFLOP/s")
    rows = []
    for heads_name, (num_heads, num_kv_heads, head_dim, softcap) in HEADS.items():
        spec = AttentionSpec(scale=1 / math.sqrt(head_dim), softcap=softcap)
        for layout_name, layout in layouts(device).items():
            torch.manual_seed(0)
            total = layout.batch * layout.length
            widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, 48]
            *parts, _ = torch.randn(total, sum(widths), device=device, dtype=data_type).split(widths, 1)
            qkv = tuple(part.unflatten(1, (-1, head_dim)) for part in parts)
            do = torch.randn(total, num_heads, head_dim, device=device, dtype=data_type)
            wide = tuple(t.float() for t in qkv)
            o, saved = attention_forward(*wide, layout, spec, "math")
            exact = (o, *attention_backward(do.float(), *wide, o, saved, layout, spec, "math"))
            chosen = choose_backend(device, data_type, head_dim, layout, spec)
            print(f"\n{heads_name}, {layout_name}")
            print(f"  {'':10} {'fwd us':>9} {'bwd us':>9} {'fwd TF/s':>9} {'bwd TF/s':>9} {'share':>6} {'MB':>7}")
            for backend in backends:
                reason = refusal(backend, device, data_type, head_dim, layout, spec)
                row: dict[str, Any] = {"heads": heads_name, "layout": layout_name, "backend": backend}
                row |= {"refused": reason} if reason else measure(backend, qkv, do, layout, spec, exact)
                rows.append(row | {"chosen": backend == chosen})
                print(f"{'>' if backend == chosen else ' '} {backend:10} {line(row, ceiling)}", flush=True)
    return facts | {"rows": rows}


def line(row: dict[str, Any], ceiling: float) -> str:
    if "refused" in row:
        return row["refused"]
    if "wrong" in row:
        return "not timed, its errors are too large: " + ", ".join(f"{n} {e:.2%}" for n, e in row["errors"].items())
    return (
        f"{row['forward_us']:9.0f} {row['backward_us']:9.0f} {row['forward_tflops']:9.0f} {row['backward_tflops']:9.0f} "
        f"{row['backward_tflops'] / ceiling:6.0%} {row['peak_mb']:7.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kernels = [name for name in REFUSALS if name != "math"]
    parser.add_argument(
        "--backends", nargs="+", choices=list(REFUSALS), default=kernels, help="all but math unless given"
    )
    parser.add_argument("--out", type=Path, help="write the rows as JSON, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU: on the CPU there is one backend")
    results = run(arguments.backends)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
