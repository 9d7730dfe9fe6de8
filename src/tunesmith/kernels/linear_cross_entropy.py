"""Cross-entropy that owns the head of a language model: logits exist for one chunk of rows at a time.

For a row x (D) with label y, head weight W (V, D) and bias b (V):

    a = W x + b,   u = scale · a,   z = softcap · tanh(u / softcap)    (z = u without softcap)
    lse = log Σ_v exp z_v,   p = exp(z - lse)
    loss = (1 - ε) (lse - z_y) + ε (lse - mean_v z_v) + ζ lse²

ε is `label_smoothing` (Szegedy et al. 2015, arXiv 1512.00567, as in PyTorch: the uniform part is averaged over the
vocabulary), ζ is `z_loss` (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 5), softcap Gemma 2's (arXiv 2408.00118).

    dloss/dz = p (1 + 2 ζ lse) - (1 - ε) onehot(y) - ε / V
    dloss/da = dloss/dz · (1 - (z / softcap)²) · scale
    dloss/dx = dloss/da W,   dloss/dW = Σ_rows dloss/da ⊗ x,   dloss/db = Σ_rows dloss/da

The loss is the last thing of a step, so its gradient needs nothing of the backward but one factor: `linear_cross_entropy`
computes it in the forward, chunk by chunk (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989). A chunk of logits is one
matrix product into a buffer that all chunks share; the kernel makes it dloss/da in place; a second product makes it dx.
A frozen head costs these two products, 4 N D V operations, and never a third for recomputed logits.

Kernel: one program a row. A first pass over its V logits finds their maximum and the sum of exponentials together
(online softmax: Milakov & Gimelshein 2018, arXiv 1805.02867), a second one writes the gradient. It moves 3 N V values
(two reads, one write; the second pass walks backwards, into what the caches still hold of the first).

`linear_log_probabilities` serves preference losses, where a row's factor is known in the backward only: it computes the
logits twice, the second time in the backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tunesmith.kernels.chunks import chunk_rows, padded
from tunesmith.kernels.launch import use_triton, wide, wide_dtype

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations
    triton = None

FP16_FACTOR = 256.0
"""The gradient of fp16 logits is held times this until the backward: probabilities under 6e-5 lose bits in fp16, and those
under 3e-8 are lost. Loss scaling comes too late for them, it is in the backward's factor. |dloss/da| is about 1 at most."""

MAX_WARPS = 16
"""Warps of a program whose row is long. Two programs of 64 registers a thread fill a multiprocessor's register file."""


# -- references -------------------------------------------------------------------------------------------------------


def linear_cross_entropy_ref(
    rows_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The sum in plain PyTorch with all logits at once. See `linear_cross_entropy`."""
    z = _logits_ref(rows_ND, weight_VD, bias_V, scale, softcap)
    loss = F.cross_entropy(z, labels_N, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + z_loss * z.logsumexp(-1).square().masked_fill(labels_N == ignore_index, 0.0).sum()
    return loss


def linear_log_probabilities_ref(
    rows_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """(N,) in plain PyTorch with all logits at once. See `linear_log_probabilities`."""
    z = _logits_ref(rows_ND, weight_VD, bias_V, scale, softcap)
    return -F.cross_entropy(z, labels_N, ignore_index=ignore_index, reduction="none")


def _logits_ref(
    rows_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """z (N, V), the product in the rows' dtype and the rest in fp32 at least."""
    bias = None if bias_V is None else bias_V.to(rows_ND.dtype)
    u = scale * wide(F.linear(rows_ND, weight_VD.to(rows_ND.dtype), bias))
    return u if softcap is None else softcap * torch.tanh(u / softcap)


# -- one chunk of logits ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Options:
    """What happens between the head's product and the loss."""

    scale: float
    softcap: float | None
    label_smoothing: float
    z_loss: float
    ignore_index: int


if triton is not None:

    @triton.jit
    def _bend(u, softcap):
        """z = softcap · tanh(x), x = u / softcap, and dz/du, in fp32, by e = exp(-2|x|).

        Near 0, 1 - e cancels: there tanh is its Taylor series (at 0.25 the next term is 8e-9 of it). As 1 - tanh², the
        derivative would cancel where tanh is near 1.
        """
        x = u / softcap
        e = tl.exp(-2.0 * tl.abs(x))
        half = 1.0 / (1.0 + e)
        far = 1.0 - 2.0 * e * half
        square = x * x
        near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
        return softcap * tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far)), 4.0 * e * half * half

    @triton.jit
    def _cross_entropy_kernel(
        logits,
        labels,
        losses,
        factors,
        vocabulary,
        stride,
        factor,
        scale,
        softcap,
        smoothing,
        z_loss,
        ignore_index,
        BLOCK: tl.constexpr,
        SOFTCAP: tl.constexpr,
        SMOOTHING: tl.constexpr,
        GRADIENT: tl.constexpr,
        FACTORS: tl.constexpr,
    ):
        row = tl.program_id(0)
        logits += row.to(tl.int64) * stride
        label = tl.load(labels + row)
        num_blocks = tl.cdiv(vocabulary, BLOCK)

        # Masks of loads and stores compare with the stride, a multiple of 64, and so leave the accesses wide.
        if label == ignore_index:
            tl.store(losses + row, 0.0)
            if GRADIENT:
                for block in range(num_blocks):
                    columns = block * BLOCK + tl.arange(0, BLOCK)
                    tl.store(logits + columns, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=columns < stride)
            return

        # Read here: the reductions below keep every warp's stores of the second pass behind it.
        chosen = tl.load(logits + label, mask=(label >= 0) & (label < vocabulary), other=float("nan"))
        chosen = chosen.to(tl.float32) * scale
        if SOFTCAP:
            chosen, _ = _bend(chosen, softcap)

        top = float("-inf")
        exps = tl.zeros((BLOCK,), tl.float32)  # sums of each lane: one reduction a row
        sums = tl.zeros((BLOCK,), tl.float32)
        for block in range(num_blocks):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < stride, other=0.0).to(tl.float32) * scale
            if SOFTCAP:
                z, bend = _bend(z, softcap)
            if SMOOTHING:
                sums += tl.where(columns < vocabulary, z, 0.0)
            z = tl.where(columns < vocabulary, z, float("-inf"))
            new_top = tl.maximum(top, tl.max(z, axis=0))
            exps = exps * tl.exp(top - new_top) + tl.exp(z - new_top)
            top = new_top
        total = tl.sum(exps, axis=0)
        log_total = tl.log(total)
        lse = top + log_total

        # Not lse - chosen: a confident row's loss is far smaller than the rounding of its lse.
        loss = (1.0 - smoothing) * (log_total + (top - chosen)) + z_loss * lse * lse
        if SMOOTHING:
            loss += smoothing * (log_total + (top - tl.sum(sums, axis=0) / vocabulary))
        tl.store(losses + row, loss)

        if GRADIENT:
            if FACTORS:
                factor *= tl.load(factors + row)
            share = 1.0 / total
            pull = 2.0 * z_loss * lse  # apart from p: 1 + pull would round what p - 1 leaves of a confident row
            for block in range(num_blocks):
                columns = (num_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
                z = tl.load(logits + columns, mask=columns < stride, other=0.0).to(tl.float32) * scale
                slope = factor * scale
                if SOFTCAP:
                    z, bend = _bend(z, softcap)
                    slope = slope * bend
                p = tl.exp(z - top) * share
                g = tl.where(columns == label, p - (1.0 - smoothing), p)
                if SMOOTHING:
                    g -= smoothing / vocabulary
                g = (g + p * pull) * slope
                tl.store(logits + columns, g.to(logits.dtype.element_ty), mask=columns < stride)


def _cross_entropy(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    losses_C: torch.Tensor,
    options: _Options,
    *,
    gradient: bool,
    factors_C: torch.Tensor | None,
    factor: float,
) -> None:
    """Write the losses of a chunk and, with `gradient`, turn its logits a into factors · factor · dloss/da in place.

    In memory, rows of logits are padded to a multiple of 64 values (chunks.py); what pads them is overwritten.
    """
    if not use_triton(logits_CV):
        _cross_entropy_plain(
            logits_CV, labels_C, losses_C, options, gradient=gradient, factors_C=factors_C, factor=factor
        )
        return
    stride = logits_CV.stride(0)
    # Smoothing and softcap hold more of each value: with 16 values a thread, 98 registers, one program at a time (sm_90).
    plain = options.softcap is None and not options.label_smoothing
    per_warp = 32 * (16 if plain else 8)
    block = min(MAX_WARPS * per_warp, triton.next_power_of_2(stride))
    _cross_entropy_kernel[(len(logits_CV),)](
        logits_CV,
        labels_C,
        losses_C,
        losses_C if factors_C is None else factors_C,
        logits_CV.shape[1],
        stride,
        factor,
        options.scale,
        options.softcap or 0.0,
        options.label_smoothing,
        options.z_loss,
        options.ignore_index,
        BLOCK=block,
        SOFTCAP=options.softcap is not None,
        SMOOTHING=options.label_smoothing > 0,
        GRADIENT=gradient,
        FACTORS=factors_C is not None,
        num_warps=max(1, block // per_warp),
    )


def _cross_entropy_plain(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    losses_C: torch.Tensor,
    options: _Options,
    *,
    gradient: bool,
    factors_C: torch.Tensor | None,
    factor: float,
) -> None:
    """`_cross_entropy` in plain PyTorch, by the formulas at the top of this file; any floating dtype."""
    smoothing, vocabulary = options.label_smoothing, logits_CV.shape[1]
    kept_C = labels_C != options.ignore_index
    known_C = (labels_C >= 0) & (labels_C < vocabulary)
    labels_C1 = labels_C.where(known_C, 0).unsqueeze(1)

    slope: float | torch.Tensor = factor * options.scale
    z_CV = logits_CV.to(losses_C.dtype) * options.scale
    if options.softcap is not None:
        t_CV = z_CV.div_(options.softcap).tanh_()
        slope = (1 - t_CV.square()).mul_(slope)
        z_CV = t_CV.mul_(options.softcap)
    chosen_C1 = z_CV.gather(1, labels_C1).masked_fill_(~known_C.unsqueeze(1), math.nan)
    top_C1, mean_C1 = z_CV.amax(1, keepdim=True), z_CV.mean(1, keepdim=True)
    g_CV = z_CV.sub_(top_C1).exp_()
    total_C1 = g_CV.sum(1, keepdim=True)
    log_total_C1 = total_C1.log()
    lse_C1 = top_C1 + log_total_C1

    loss_C1 = (1 - smoothing) * (log_total_C1 + (top_C1 - chosen_C1)) + options.z_loss * lse_C1.square()
    if smoothing:
        loss_C1 += smoothing * (log_total_C1 + (top_C1 - mean_C1))
    losses_C.copy_(loss_C1.squeeze(1).masked_fill_(~kept_C, 0.0))

    if gradient:
        g_CV.div_(total_C1)
        pull_CV = g_CV * (2 * options.z_loss * lse_C1) if options.z_loss else 0.0
        g_CV.scatter_add_(1, labels_C1, torch.full_like(top_C1, smoothing - 1))
        g_CV.sub_(smoothing / vocabulary).add_(pull_CV)
        if factors_C is not None:
            g_CV.mul_(factors_C.unsqueeze(1))
        logits_CV.copy_(g_CV.mul_(slope).masked_fill_(~kept_C.unsqueeze(1), 0.0))


# -- all chunks -------------------------------------------------------------------------------------------------------


def _compute_dtype(rows_ND: torch.Tensor) -> torch.dtype:
    """The dtype of the head's products: autocast's where it is on (it leaves fp64 alone), else that of the rows."""
    kind = rows_ND.device.type
    if rows_ND.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return rows_ND.dtype
    return torch.get_autocast_dtype(kind)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b. `out` may be fp32 where a and b are in 16 bits: cuBLAS then rounds nothing to those."""
    if a.dtype == out.dtype:
        if add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif add:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)
    else:
        out.copy_(a @ b)


def _chunked(
    rows_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    options: _Options,
    *,
    size: int,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool] = (False, False, False),
    factors_N: torch.Tensor | None = None,
    factor: float = 1.0,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Each row's loss (N,), and Σ_rows factors · factor · the gradient of its loss for those of rows, weight and bias that
    `needs` names: that of the rows in the rows' dtype, those of weight and bias in fp32 at least.

    The head's product is in `dtype`, `size` rows at a time. Call it without grad mode.
    """
    num_rows, hidden = rows_ND.shape
    vocabulary, device, sum_dtype = len(weight_VD), rows_ND.device, wide_dtype(dtype)
    drows = torch.empty((num_rows, hidden), dtype=rows_ND.dtype, device=device) if needs[0] else None
    dweight = torch.zeros((vocabulary, hidden), dtype=sum_dtype, device=device) if needs[1] else None
    dbias = torch.zeros(vocabulary, dtype=sum_dtype, device=device) if needs[2] else None
    losses_N = torch.empty(num_rows, dtype=sum_dtype, device=device)
    buffer_CV = torch.empty((min(size, num_rows), padded(vocabulary)), dtype=dtype, device=device)[:, :vocabulary]

    with torch.autocast(device.type, enabled=False):
        weight_VD = weight_VD.to(dtype)  # an fp32 master weight is cast once, not once a chunk
        bias_V = None if bias_V is None else bias_V.to(dtype)
        for start in range(0, num_rows, size):
            chunk = slice(start, start + size)
            x_CD = rows_ND[chunk].to(dtype)
            logits_CV = buffer_CV[: len(x_CD)]
            if bias_V is None:
                torch.mm(x_CD, weight_VD.t(), out=logits_CV)
            else:
                torch.addmm(bias_V, x_CD, weight_VD.t(), out=logits_CV)
            _cross_entropy(
                logits_CV,
                labels_N[chunk],
                losses_N[chunk],
                options,
                gradient=any(needs),
                factors_C=None if factors_N is None else factors_N[chunk],
                factor=factor,
            )
            if drows is not None:
                _product(logits_CV, weight_VD, drows[chunk])
            if dweight is not None:
                _product(logits_CV.t(), x_CD, dweight, add=True)
            if dbias is not None:
                dbias += logits_CV.sum(0, dtype=sum_dtype)
    return losses_N, [drows, dweight, dbias]


# -- autograd ---------------------------------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        options: _Options,
        size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.factor = FP16_FACTOR if dtype == torch.float16 else 1.0
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (rows_ND, weight_VD, bias_V)]
        losses_N, ctx.gradients = _chunked(
            rows_ND,
            weight_VD,
            bias_V,
            labels_N,
            options,
            size=size,
            dtype=dtype,
            needs=ctx.needs_input_grad[:3],
            factor=ctx.factor,
        )
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: second backward through the same loss. The first one turned the gradients that the "
                "forward computed into its own result; add up the losses before one backward, or compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # Of shape (1,): as a scalar of no dimension it would be rounded to 16 bits before the product is taken.
        factor_1 = (grad / ctx.factor).reshape(1)
        scaled = [
            None if gradient is None else _scaled(gradient, factor_1, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _scaled(gradient: torch.Tensor, factor_1: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient · factor in `dtype`, rounded once; in place if it is in `dtype` already."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor_1)
    return torch.mul(gradient, factor_1, out=torch.empty_like(gradient, dtype=dtype))


class _LinearLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        options: _Options,
        size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_ND, weight_VD, bias_V, labels_N)
        ctx.options, ctx.size, ctx.dtype = options, size, dtype
        losses_N, _ = _chunked(rows_ND, weight_VD, bias_V, labels_N, options, size=size, dtype=dtype)
        return losses_N.neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
        _, gradients = _chunked(
            rows_ND,
            weight_VD,
            bias_V,
            labels_N,
            ctx.options,
            size=ctx.size,
            dtype=ctx.dtype,
            needs=ctx.needs_input_grad[:3],
            factors_N=grad_N.neg().contiguous(),
        )
        cast = [
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, (rows_ND, weight_VD, bias_V), strict=True)
        ]
        return (*cast, None, None, None, None)


# -- public -----------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    rows_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Σ_rows cross-entropy of softcap(scale · (rows Wᵀ + bias)) against labels: a scalar in fp32 (fp64 for fp64 rows).

    rows (N, D), weight (V, D), labels (N,) int64, bias (V,). A row whose label is `ignore_index` contributes 0; any other
    label outside [0, V) makes the loss NaN (finding it out would wait for the device). `label_smoothing` is PyTorch's,
    `z_loss` adds z_loss · logsumexp² for each row. `chunk_rows` rows are done at a time (default: the function
    `chunk_rows`). The products are in autocast's dtype if it is on, else in the rows'; logits become fp32 right after.

    The forward computes the gradients of those of rows, weight and bias that require one, in memory of their size (weight
    and bias: in fp32), and the backward scales them in place: a second backward raises RuntimeError. Where none is
    required the head's product is all there is. Raises ValueError for arguments that do not fit together.
    """
    options = _Options(scale, softcap, label_smoothing, z_loss, ignore_index)
    size, dtype = _check(rows_ND, weight_VD, labels_N, bias_V, options, chunk_rows)
    if _requires_grad(rows_ND, weight_VD, bias_V):
        loss: torch.Tensor = _LinearCrossEntropy.apply(rows_ND, weight_VD, bias_V, labels_N, options, size, dtype)
        return loss
    with torch.no_grad():
        return _chunked(rows_ND, weight_VD, bias_V, labels_N, options, size=size, dtype=dtype)[0].sum()


def linear_log_probabilities(
    rows_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """log p(label) of each row under softmax(softcap(scale · (rows Wᵀ + bias))): (N,) in fp32 (fp64 for fp64 rows).

    Arguments, dtypes and errors as in `linear_cross_entropy`; 0 for a row whose label is `ignore_index`. For losses whose
    gradient mixes rows (preferences: DPO, ORPO): a row's factor is known in the backward only, which computes the logits
    again, chunk by chunk.
    """
    options = _Options(scale, softcap, 0.0, 0.0, ignore_index)
    size, dtype = _check(rows_ND, weight_VD, labels_N, bias_V, options, chunk_rows)
    if _requires_grad(rows_ND, weight_VD, bias_V):
        found: torch.Tensor = _LinearLogProbabilities.apply(rows_ND, weight_VD, bias_V, labels_N, options, size, dtype)
        return found
    with torch.no_grad():
        return _chunked(rows_ND, weight_VD, bias_V, labels_N, options, size=size, dtype=dtype)[0].neg_()


def _requires_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(
    rows_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    options: _Options,
    size: int | None,
) -> tuple[int, torch.dtype]:
    """Rows of a chunk and the dtype of the head's products. Raises ValueError."""
    if rows_ND.ndim != 2 or weight_VD.ndim != 2 or rows_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"rows are {tuple(rows_ND.shape)} and weight is {tuple(weight_VD.shape)}; expected (N, D) and (V, D)"
        )
    if labels_N.shape != rows_ND.shape[:1] or labels_N.dtype != torch.int64:
        raise ValueError(
            f"labels are {tuple(labels_N.shape)} {labels_N.dtype}; expected ({len(rows_ND)},) torch.int64, one for each row"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias is {tuple(bias_V.shape)}; expected ({len(weight_VD)},), one for each row of the weight")
    if options.softcap is not None and options.softcap <= 0:
        raise ValueError(f"softcap is {options.softcap}; it must be positive, or None for none")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {options.label_smoothing}; it must be from 0 to 1")
    if size is not None and size < 1:
        raise ValueError(f"chunk_rows is {size}; it must be at least 1, or None")
    dtype = _compute_dtype(rows_ND)
    return size or chunk_rows(len(rows_ND), len(weight_VD), dtype.itemsize), dtype
