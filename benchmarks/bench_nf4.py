"""4-bit dequantization against bitsandbytes, packing of adapters against `torch._foreach_copy_`, dropout against PyTorch's.

    python benchmarks/bench_nf4.py [OUT.json] [--sweep]

On one GPU, at the shapes of Llama-3.1-8B and Qwen2.5-3B, bf16, NF4 with double quantization. Prints a Markdown table: median
ms, GB/s of the bytes that have to move, and their share of what a copy of 1 GiB reaches on the same card. "a layer" is its
seven weights one after the other; "pack" the 448 adapter matrices of 32 layers of rank 16. Nothing is timed before its
result was compared: bit for bit with bitsandbytes, with the casts of PyTorch, and with dropout's reference. `--sweep` tries
sizes of the dequantization's program on the largest weight instead. OUT.json gets the rows, the card and the versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch

from tunesmith.kernels import nf4
from tunesmith.kernels.dropout import dropout, dropout_backward_add, dropout_ref
from tunesmith.kernels.pack import PackEntry, PackTable

MODELS = {  # (N, K) of q, k, v, o, gate, up, down
    "8B": [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)],
    "3B": [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (11008, 2048), (11008, 2048), (2048, 11008)],
}
NUM_LAYERS = 32
RANK = 16
TOKENS = 8192


def measure(function: Callable[[], Any]) -> float:
    """Median milliseconds, the L2 cache emptied before each call."""
    from triton.testing import do_bench

    return do_bench(function, warmup=50, rep=200, return_mode="median")


def copy_ceiling(device: torch.device) -> float:
    """GB/s of a copy of 1 GiB, bytes read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source)) / 1e6


def require(same: bool, what: str) -> None:
    if not same:
        raise SystemExit(f"{what}: results differ, so there is no time to report")


class Weight:
    """One quantized weight and its place in an operand buffer that has room for an adapter's rows below."""

    def __init__(self, shape: tuple[int, int], device: torch.device):
        weight = torch.randn(shape, device=device).mul_(0.02).to(torch.bfloat16)
        self.packed, self.state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        operand = torch.zeros(shape[0] + 4 * RANK, shape[1], dtype=torch.bfloat16, device=device)
        self.rows = operand[: shape[0]]
        self.num_bytes = weight.numel() * (0.5 + 2 + 1 / 64) + self.state.state2.absmax.numel() * 4
        self.write()
        ours, theirs = self.rows.view(torch.int16), self.theirs().view(torch.int16)
        require(torch.equal(ours, theirs), f"dequantization of {shape}")

    def write(self) -> None:
        nf4.dequantize_4bit(self.packed, self.state, self.rows)

    def theirs(self) -> torch.Tensor:
        return bnb.dequantize_4bit(self.packed, self.state)


def bench_nf4(device: torch.device) -> Iterator[dict[str, Any]]:
    for model, shapes in MODELS.items():
        torch.manual_seed(0)
        weights = [Weight(shape, device) for shape in shapes]
        cases = {f"{model} {n} x {k}": [weight] for (n, k), weight in zip(shapes, weights, strict=True)}
        for case, of_case in {**cases, f"{model} a layer": weights}.items():
            num_bytes = sum(w.num_bytes for w in of_case)
            for name, call in (("bitsandbytes", Weight.theirs), ("ours", Weight.write)):
                ms = measure(lambda call=call, of_case=of_case: [call(w) for w in of_case])
                yield {"case": f"nf4 {case}", "who": name, "ms": ms, "bytes": num_bytes}


def bench_pack(device: torch.device) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    entries = []
    for _ in range(NUM_LAYERS):
        for n, k in MODELS["8B"]:
            for shape, scale in (((RANK, k), 1.0), ((n, RANK), 2.0)):
                target = torch.zeros(shape, dtype=torch.bfloat16, device=device)
                entries.append(PackEntry(torch.randn(shape, device=device), target, scale))
    table = PackTable(entries)
    table.run()
    same = all(torch.equal(e.destination, (e.source * e.scale).to(torch.bfloat16)) for e in entries)
    require(same and table.valid(), "packing")
    num_bytes = sum(e.source.numel() for e in entries) * 6
    targets, sources = [e.destination for e in entries], [e.source for e in entries]
    for name, call in (
        ("_foreach_copy_, without scale", lambda: torch._foreach_copy_(targets, sources)),
        ("ours", table.run),
        ("ours, with valid()", lambda: table.valid() and table.run()),
    ):
        yield {"case": f"pack {len(entries)} matrices", "who": name, "ms": measure(call), "bytes": num_bytes}


def bench_dropout(device: torch.device) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, 4096, device=device).to(torch.bfloat16)
    require(torch.equal(dropout(x, 0.1, 1, 2), dropout_ref(x, 0.1, 1, 2)), "dropout")
    case = f"dropout {TOKENS} x 4096"
    theirs = measure(lambda: torch.nn.functional.dropout(x, 0.1))
    yield {"case": case, "who": "PyTorch", "ms": theirs, "bytes": 4 * x.numel()}
    yield {"case": case, "who": "ours", "ms": measure(lambda: dropout(x, 0.1, 1, 2)), "bytes": 4 * x.numel()}
    dx = torch.zeros_like(x)
    backward = measure(lambda: dropout_backward_add(dx, x, 0.1, 1, 2))
    yield {"case": f"{case}, backward", "who": "ours", "ms": backward, "bytes": 6 * x.numel()}


def sweep(device: torch.device) -> Iterator[dict[str, Any]]:
    """Program sizes of the dequantization kernel. Compiles each of them: a minute."""
    shape = MODELS["8B"][4]
    for nf4.TILE, nf4.NUM_WARPS in itertools.product((1024, 2048, 4096, 8192), (1, 2, 4, 8)):
        weight = Weight(shape, device)
        name = f"{nf4.TILE} weights, {nf4.NUM_WARPS} warps"
        yield {
            "case": f"nf4 8B {shape[0]} x {shape[1]}",
            "who": name,
            "ms": measure(weight.write),
            "bytes": weight.num_bytes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_nf4 measures a GPU; PyTorch finds none")
    device = torch.device("cuda")

    ceiling = copy_ceiling(device)
    facts = {
        "device": torch.cuda.get_device_name(device),
        "copy GB/s": round(ceiling),
        **{name: importlib.metadata.version(name) for name in ("torch", "triton", "bitsandbytes")},
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("\n| case | who | ms | GB/s | of a copy |\n|---|---|---|---|---|")
    rows = []
    parts = [sweep] if options.sweep else [bench_nf4, bench_pack, bench_dropout]
    for row in itertools.chain.from_iterable(part(device) for part in parts):
        row["GB/s"] = row.pop("bytes") / row["ms"] / 1e6
        row["of a copy"] = row["GB/s"] / ceiling
        rows.append(row)
        print(
            f"| {row['case']} | {row['who']} | {row['ms']:.4f} | {row['GB/s']:.0f} | {row['of a copy']:.0%} |",
            flush=True,
        )
    if options.out is not None:
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
