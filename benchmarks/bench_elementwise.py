"""RMS norm, residual sum, q/k/v epilogue and SwiGLU against eager PyTorch, torch.compile and Liger: ms, GB/s, memory.

    python benchmarks/bench_elementwise.py [OUT.json] [--tokens 8192]

On one GPU in bf16 at the layer of Llama-3.1-8B (D 4096, 32/8 heads of 128, F 14336) with rank 16 on every projection, sequences of
2,048. Prints a Markdown table: median ms with the L2 cache emptied before each call, GB/s of the bytes that have to move
(each operand once, whoever moves more), their share of what a copy of 1 GiB reaches on the same card, and the peak of
memory beyond the operands. Nothing is timed before its result was compared with fp64: at most twice the error of the
reference in bf16, plus one ulp. "eager" is the reference of each kernel, "compile" is torch.compile of it; Liger's rows
(where it is installed) do the same work with `addmm_` for the low-rank term, but leave q, k and v in tensors of their own,
and its RMS norm has no residual, so `add_` follows. OUT.json gets the rows, the card and the versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.kernels.glu import glu, glu_backward, glu_backward_ref, glu_ref
from tunesmith.kernels.qkv import (
    qkv_epilogue,
    qkv_epilogue_backward,
    qkv_epilogue_backward_ref,
    qkv_epilogue_ref,
)
from tunesmith.kernels.residual import add_low_rank, add_low_rank_ref
from tunesmith.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_backward_ref, rms_norm_ref

DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
D, F, H, G, HEAD_DIM, SLOT, LENGTH = 4096, 14336, 32, 8, 128, 16, 2048
EPS = 1e-5


@dataclass
class Case:
    """One piece of work: how many values have to move, and who does it."""

    name: str
    values: int
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE)


def wide(*values: Any) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, torch.Tensor) else x for x in values)


def require_close(what: str, ours: Any, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """The rule of tests/kernels: at most twice the reference's error, plus one ulp of the largest value."""
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + torch.finfo(ours.dtype).eps * exact.abs().max().item()
    if not error <= allowed:
        raise SystemExit(f"{what}: error {error:.3g} where {allowed:.3g} is allowed, so there is no time to report")


def liger() -> Any:
    """Liger's functions, or None where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import functional

    return functional


def rms_norm_cases(T: int) -> Iterator[Case]:
    x, dy, residual, weight = normal(T, D), normal(T, D), normal(T, D), normal(D)
    out, normed = torch.empty_like(x), torch.empty_like(x)
    y, rstd = rms_norm(x, weight, EPS)
    exact, exact_rstd = rms_norm_ref(*wide(x, weight), EPS)
    require_close("rms_norm", y, rms_norm_ref(x, weight, EPS)[0], exact)
    case = Case(f"rms_norm {T} x {D}", 2 * T * D)
    compiled = torch.compile(rms_norm_ref)
    case.calls["eager"] = lambda: rms_norm_ref(x, weight, EPS)
    case.calls["F.rms_norm"] = lambda: torch.nn.functional.rms_norm(x, (D,), weight, EPS)
    case.calls["compile"] = lambda: compiled(x, weight, EPS)
    functional = liger()
    if functional is not None:
        case.calls["Liger"] = lambda: functional.liger_rms_norm(x, weight, EPS)
    case.calls["ours"] = lambda: rms_norm(x, weight, EPS)
    yield case

    dx, dweight = rms_norm_backward(
        dy, x, rstd, weight, residual_TD=residual, out=out, normed_out=normed, weight_grad=True
    )
    plain = rms_norm_backward_ref(dy, x, rstd, weight, 0.0, residual)
    exact = rms_norm_backward_ref(*wide(dy, x), exact_rstd, weight.double(), 0.0, residual.double())
    for name, parts in {"dx": (dx, 0), "y again": (normed, 1), "dweight": (dweight, 2)}.items():
        require_close(f"rms_norm_backward: {name}", parts[0], plain[parts[1]], exact[parts[1]])
    case = Case("rms_norm_backward + residual", 4 * T * D)
    backward = torch.compile(lambda *operands: rms_norm_backward_ref(*operands)[0])
    case.calls["eager"] = lambda: rms_norm_backward_ref(dy, x, rstd, weight, 0.0, residual)[0]
    case.calls["compile"] = lambda: backward(dy, x, rstd, weight, 0.0, residual)
    if functional is not None:
        leaf = x.clone().requires_grad_()
        theirs = functional.liger_rms_norm(leaf, weight, EPS, in_place=False)
        case.calls["Liger + add_"] = lambda: torch.autograd.grad(theirs, leaf, dy, retain_graph=True)[0].add_(residual)
    case.calls["ours"] = lambda: rms_norm_backward(dy, x, rstd, weight, residual_TD=residual, out=out)
    yield case
    yield Case(
        "rms_norm_backward + residual + y again",
        5 * T * D,
        {"ours": lambda: rms_norm_backward(dy, x, rstd, weight, residual_TD=residual, out=out, normed_out=normed)},
    )
    yield Case(
        "rms_norm_backward + weight gradient",
        3 * T * D,
        {"ours": lambda: rms_norm_backward(dy, x, rstd, weight, out=out, weight_grad=True)},
    )


def residual_cases(T: int) -> Iterator[Case]:
    base, buffer, b = normal(T, D), normal(T, D + SLOT), normal(D, SLOT, scale=0.1)
    y, s, out = buffer[:, :D], buffer[:, D:], torch.empty_like(base)
    exact = add_low_rank_ref(*wide(base, y, s, b))
    require_close("add_low_rank", add_low_rank(base, y, s, b), add_low_rank_ref(base, y, s, b), exact)
    compiled = torch.compile(add_low_rank_ref)
    yield Case(
        f"add_low_rank {T} x {D}",
        3 * T * D + T * SLOT,
        {
            "eager": lambda: add_low_rank_ref(base, y, s, b),
            "addmm + add": lambda: torch.addmm(y, s, b.T).add_(base),
            "compile": lambda: compiled(base, y, s, b),
            "ours": lambda: add_low_rank(base, y, s, b, out=out),
        },
    )
    yield Case(
        "base + y",
        3 * T * D,
        {
            "torch.add": lambda: torch.add(base, y, out=out),
            "ours": lambda: add_low_rank(base, y, None, None, out=out),
        },
    )


def qkv_cases(T: int, norm: bool) -> Iterator[Case]:
    N, heads = (H + 2 * G) * HEAD_DIM, [H * HEAD_DIM, G * HEAD_DIM, G * HEAD_DIM]
    suffix = " with qk-norm" if norm else ""
    buf, b = normal(T, N + 3 * SLOT), normal(N, SLOT, scale=0.1)
    angles = torch.rand(LENGTH, HEAD_DIM // 2, device=DEVICE).repeat(1, 2) * 6
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    shape, options = (H, G, HEAD_DIM), {"slot": SLOT, "num_slots": 3}
    norms = {"q_norm_d": normal(HEAD_DIM), "k_norm_d": normal(HEAD_DIM), "eps": EPS} if norm else {}
    plain_options, exact_options = options | norms, options | dict(zip(norms, wide(*norms.values()), strict=True))
    # cuDNN's gradients: (B, H, L, d), seen as (B, L, H, d).
    grads = [normal(T // LENGTH, n, LENGTH, HEAD_DIM).transpose(1, 2) for n in (H, G, G)]
    out, target = torch.empty_like(buf), torch.empty_like(buf[:, :N])
    tables = (b, cos, sin, *shape)

    def forward(function: Callable[..., Any], **more: Any) -> Any:
        return function(buf, *tables, **plain_options, **more)

    def backward(function: Callable[..., Any], *more: Any, **others: Any) -> Any:
        return function(*grads, *more, *tables, **plain_options, raw_TNR=buf if norm else None, **others)

    exact = qkv_epilogue_ref(buf.double(), *wide(*tables), **exact_options)
    ours, plain = forward(qkv_epilogue, out=target), forward(qkv_epilogue_ref)
    for name, *parts in zip("qkv", *(x.split(heads, 1) for x in (ours, plain, exact)), strict=True):
        require_close(f"qkv_epilogue{suffix}: {name}", *parts)
    raw = buf.double() if norm else None
    exact = qkv_epilogue_backward_ref(*wide(*grads, *tables), **exact_options, raw_TNR=raw)[0]
    backward(qkv_epilogue_backward, out)
    plain = backward(qkv_epilogue_backward_ref)[0]
    for name, *parts in zip("qkv", *(x.split(heads, 1) for x in (out[:, :N], plain, exact)), strict=True):
        require_close(f"qkv_epilogue_backward{suffix}: d{name}", *parts)
    del exact, plain, ours, raw

    compiled, compiled_backward = torch.compile(qkv_epilogue_ref), torch.compile(qkv_epilogue_backward_ref)
    case = Case(f"qkv_epilogue{suffix} {T} x {N}", 2 * T * N + 3 * T * SLOT)
    case.calls["eager"] = lambda: forward(qkv_epilogue_ref)
    case.calls["compile"] = lambda: forward(compiled)
    functional = None if norm else liger()
    if functional is not None:
        parts = [x.contiguous() for x in buf[:, :N].split(heads, 1)]
        slots, factors = buf[:, N:].split(SLOT, 1), b.split(heads)
        positions = cos[None], sin[None]

        def addmm_and_liger() -> None:
            for y, s, factor in zip(parts, slots, factors, strict=True):
                y.addmm_(s, factor.T)
            q, k = (y.view(-1, LENGTH, n, HEAD_DIM).transpose(1, 2) for y, n in zip(parts[:2], (H, G), strict=True))
            functional.liger_rope(q, k, *positions)

        case.calls["addmm_ + Liger RoPE"] = addmm_and_liger
    if norm:
        case.calls["ours"] = lambda: forward(qkv_epilogue, out=target)
    else:
        case.calls["ours, in place"] = lambda: forward(qkv_epilogue)
        case.calls["ours, in place, nothing to add"] = lambda: qkv_epilogue(buf, None, *tables[1:], **options)
    yield case

    case = Case(f"qkv_epilogue_backward{suffix}", 2 * T * N + (T * (N - G * HEAD_DIM + 2 * SLOT) if norm else 0))
    case.calls["eager"] = lambda: backward(qkv_epilogue_backward_ref)
    case.calls["compile"] = lambda: backward(compiled_backward)
    if functional is not None:
        leaves = [torch.zeros_like(g.transpose(1, 2)).requires_grad_() for g in grads[:2]]
        rotated = functional.liger_rope(*(x * 1 for x in leaves), *positions)

        def liger_and_copy() -> None:
            dq_dk = torch.autograd.grad(rotated, leaves, [g.transpose(1, 2) for g in grads[:2]], retain_graph=True)
            torch.cat([g.reshape(T, -1) for g in (*(x.transpose(1, 2) for x in dq_dk), grads[2])], 1)

        case.calls["Liger RoPE + cat"] = liger_and_copy
    case.calls["ours"] = lambda: backward(qkv_epilogue_backward, out)
    if norm:
        case.calls["ours, with the weights' gradients"] = lambda: backward(qkv_epilogue_backward, out, norm_grads=True)
    yield case


def glu_cases(T: int) -> Iterator[Case]:
    """SwiGLU with the low-rank terms of gate, up and down; the backward also makes dS, dB and dA of down."""
    buf, b = normal(T, 2 * F + 2 * SLOT), normal(2 * F, SLOT, scale=0.02)
    a_down, ds_down, dact = normal(SLOT, F, scale=0.02), normal(T, SLOT), normal(T, F)
    few, shape = slice(0, 1024), (F, SLOT, 2, "silu")  # rows that are compared with fp64
    part = buf[few].clone()
    exact, plain = glu_ref(part.double(), b.double(), *shape), glu_ref(part, b, *shape)
    require_close("glu", glu(part, b, *shape), plain, exact)
    down = (a_down, ds_down[few])
    buffers = part.clone(), part.clone(), part.double()
    found = glu_backward(dact[few], buffers[0], b, *shape, *down)
    plain_grads = glu_backward_ref(dact[few], buffers[1], b, *shape, *down)
    exact_grads = glu_backward_ref(*wide(dact[few], buffers[2], b), *shape, *wide(*down))
    require_close("glu_backward: [dgate dup dS]", *buffers)
    for name, *parts in zip(("dB", "dA"), found, plain_grads, exact_grads, strict=True):
        require_close(f"glu_backward: {name}", *parts)

    compiled, compiled_backward = torch.compile(glu_ref), torch.compile(glu_backward_ref)
    case = Case(f"glu {T} x {F}", 3 * T * F + 2 * T * SLOT)
    case.calls["eager"] = lambda: glu_ref(buf, b, *shape)
    case.calls["compile"] = lambda: compiled(buf, b, *shape)
    functional = liger()
    if functional is not None:
        gate, up = (x.contiguous() for x in buf[:, : 2 * F].split(F, 1))
        slots, factors = buf[:, 2 * F :].split(SLOT, 1), b.split(F)

        def addmm_and_liger() -> None:
            for y, s, factor in zip((gate, up), slots, factors, strict=True):
                y.addmm_(s, factor.T)
            functional.liger_swiglu(gate, up)

        case.calls["addmm_ + Liger SwiGLU"] = addmm_and_liger
    case.calls["ours"] = lambda: glu(buf, b, *shape)
    yield case

    case = Case("glu_backward with dS, dB and dA", 5 * T * F)
    case.calls["eager"] = lambda: glu_backward_ref(dact, buf, b, *shape, a_down, ds_down)
    case.calls["compile"] = lambda: compiled_backward(dact, buf, b, *shape, a_down, ds_down)
    case.calls["ours"] = lambda: glu_backward(dact, buf, b, *shape, a_down, ds_down)
    yield case


def measure(function: Callable[[], Any]) -> tuple[float, float]:
    """(median ms, peak MiB beyond what was allocated before)."""
    from triton.testing import do_bench

    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    peak = torch.cuda.max_memory_allocated() - before
    return do_bench(function, warmup=50, rep=200, return_mode="median"), peak / 2**20


def copy_ceiling() -> float:
    """GB/s of a copy of 1 GiB, bytes read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source))[0] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=8192, help=f"a multiple of {LENGTH}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_elementwise measures a GPU; PyTorch finds none")
    torch.manual_seed(0)
    T, ceiling = options.tokens, copy_ceiling()
    names = ["torch", "triton"] + (["liger_kernel"] if liger() is not None else [])
    facts = {
        "device": torch.cuda.get_device_name(DEVICE),
        "copy GB/s": round(ceiling),
        **{name: importlib.metadata.version(name) for name in names},
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("\n| case | who | ms | GB/s | of a copy | MiB |\n|---|---|---|---|---|---|")
    rows = []
    cases = (rms_norm_cases(T), residual_cases(T), qkv_cases(T, norm=False), qkv_cases(T, norm=True), glu_cases(T))
    for case in itertools.chain.from_iterable(cases):
        for who, call in case.calls.items():
            ms, mib = measure(call)
            speed = case.values * DTYPE.itemsize / ms / 1e6
            rows.append(
                {"case": case.name, "who": who, "ms": ms, "GB/s": speed, "of a copy": speed / ceiling, "MiB": mib}
            )
            print(f"| {case.name} | {who} | {ms:.4f} | {speed:.0f} | {speed / ceiling:.0%} | {mib:.0f} |", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
