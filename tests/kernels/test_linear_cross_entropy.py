"""The loss that owns the head: against plain PyTorch in fp64, with every option, and what it must not do to get there."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.numerics import assert_close_to_fp64
from tunesmith.kernels import chunks, launch
from tunesmith.kernels import linear_cross_entropy as module
from tunesmith.kernels.chunks import chunk_rows
from tunesmith.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    linear_log_probabilities,
    linear_log_probabilities_ref,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "all": {"scale": 1.7, "softcap": 5.0, "label_smoothing": 0.2, "z_loss": 0.005},
}
LOGIT_OPTIONS = {name: OPTIONS[name] for name in ("plain", "scale", "softcap")}
SIZES = [(1, 1, 5), (1, 3, 2), (7, 5, 33), (5, 6, 130), (3, 4, 8200)]  # 8200: two blocks of a row, three with a softcap
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(math.nan))


@pytest.fixture(params=["kernel", "no Triton"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernel, and what an installation without Triton runs."""
    if request.param == "no Triton":
        monkeypatch.setattr(launch, "has_triton", lambda: False)


@dataclass
class Problem:
    rows: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    labels: torch.Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, rows=self.rows.to(dtype), weight=self.weight.to(dtype), bias=self.bias.to(dtype))


def problem(
    rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """Every third row is ignored."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[2::3] = -100
    made = Problem(
        torch.randn(rows, hidden, generator=g).to(device),
        (2 / math.sqrt(hidden) * torch.randn(vocabulary, hidden, generator=g)).to(device),
        torch.randn(vocabulary, generator=g).to(device),
        labels.to(device),
    )
    return made.to(dtype)


def run(function: Callable[..., torch.Tensor], p: Problem, upstream: Any = 1.0, **options: Any) -> Tensors:
    """The function's value and its gradients with respect to rows, weight and bias, times `upstream`."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (p.rows, p.weight, p.bias)]
    value = function(inputs[0], inputs[1], p.labels, bias_V=inputs[2], **options)
    (value * upstream).sum().backward()
    return {"value": value.detach(), **{n: t.grad for n, t in zip(("rows", "weight", "bias"), inputs, strict=True)}}


def row_losses(p: Problem, **options: Any) -> torch.Tensor:
    one = [
        linear_cross_entropy_ref(p.rows[i : i + 1], p.weight, p.labels[i : i + 1], bias_V=p.bias, **options)
        for i in range(len(p.rows))
    ]
    return torch.stack(one).double()


# -- the reference ----------------------------------------------------------------------------------------------------


def test_the_reference_is_pytorchs_cross_entropy(device: torch.device) -> None:
    p = problem(7, 5, 33, torch.float64, device)
    z = 3.0 * torch.tanh(0.5 * (p.rows @ p.weight.t() + p.bias) / 3.0)
    kept = p.labels != -100
    expected = F.cross_entropy(z[kept], p.labels[kept], reduction="sum", label_smoothing=0.1)
    expected += 0.25 * torch.log(torch.exp(z[kept]).sum(1)).pow(2).sum()
    options = {"bias_V": p.bias, "scale": 0.5, "softcap": 3.0}
    found = linear_cross_entropy_ref(p.rows, p.weight, p.labels, label_smoothing=0.1, z_loss=0.25, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    log_p = torch.log_softmax(z, 1).gather(1, p.labels.clamp(min=0).unsqueeze(1)).squeeze(1) * kept
    torch.testing.assert_close(
        linear_log_probabilities_ref(p.rows, p.weight, p.labels, **options), log_p, rtol=1e-12, atol=0
    )


# -- the formulas, in fp64 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_exact(device: torch.device, options: dict[str, Any], size: int) -> None:
    p = problem(7, 5, 33, torch.float64, device)
    found = run(linear_cross_entropy, p, upstream=-1.3, chunk_rows=size, **options)
    expected = run(linear_cross_entropy_ref, p, upstream=-1.3, **options)
    for name, exact in expected.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("options", LOGIT_OPTIONS.values(), ids=LOGIT_OPTIONS)
def test_log_probabilities_are_exact(device: torch.device, options: dict[str, Any], size: int) -> None:
    p = problem(7, 5, 33, torch.float64, device)
    upstream = torch.linspace(-2, 3, 7, dtype=torch.float64, device=device)
    found = run(linear_log_probabilities, p, upstream, chunk_rows=size, **options)
    expected = run(linear_log_probabilities_ref, p, upstream, **options)
    for name, exact in expected.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_the_slope(device: torch.device, options: dict[str, Any]) -> None:
    """Central differences along random directions; autograd is not asked."""
    p = problem(5, 4, 9, torch.float64, device)
    gradients = run(linear_cross_entropy, p, **options)
    for name in ("rows", "weight", "bias"):
        direction = torch.randn(gradients[name].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        direction = 1e-5 * direction.to(device)

        def at(sign: float, name: str = name, direction: torch.Tensor = direction) -> torch.Tensor:
            moved = replace(p, **{name: getattr(p, name) + sign * direction})
            return linear_cross_entropy(moved.rows, moved.weight, p.labels, bias_V=moved.bias, **options)

        slope = (at(1) - at(-1)) / 2
        torch.testing.assert_close((gradients[name] * direction).sum(), slope, rtol=1e-7, atol=1e-14)


# -- the kernel -------------------------------------------------------------------------------------------------------


def pooled(function: Callable[..., torch.Tensor], problems: list[Problem], upstream: Any, **options: Any) -> Tensors:
    """The results of several problems end to end: of a few values, the largest error may be small by luck."""
    results = [run(function, p, upstream, **options) for p in problems]
    return {name: torch.cat([result[name].flatten() for result in results]) for name in results[0]}


def problems_of(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Problem]:
    rows, _, vocabulary = size
    return [problem(*size, dtype, device, seed) for seed in range(max(1, min(20, 4000 // (rows * vocabulary))))]


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cross_entropy_is_as_accurate_as_pytorch(
    device: torch.device, dtype: torch.dtype, options: dict[str, Any], size: tuple[int, int, int]
) -> None:
    problems = problems_of(size, dtype, device)
    in_fp64 = [p.to(torch.float64) for p in problems]
    exact = pooled(linear_cross_entropy_ref, in_fp64, 3.7, **options)
    plain = pooled(linear_cross_entropy_ref, problems, 3.7, **options)
    found = pooled(linear_cross_entropy, problems, 3.7, chunk_rows=4, **options)
    for name in ("rows", "weight", "bias"):
        assert found[name].dtype == dtype
        assert_close_to_fp64(name, found[name], plain[name], exact[name])
    # Errors of rows cancel in a sum, by luck in either: what is allowed is their sum.
    row_errors = [row_losses(p, **options) - row_losses(q, **options) for p, q in zip(problems, in_fp64, strict=True)]
    rounding = size[0] * torch.finfo(torch.float32).eps * exact["value"].abs().max()
    assert found["value"].dtype == torch.float32
    error = (found["value"].double() - exact["value"]).abs().max()
    assert error <= 2 * torch.cat(row_errors).abs().sum() + rounding


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", LOGIT_OPTIONS.values(), ids=LOGIT_OPTIONS)
def test_log_probabilities_are_as_accurate_as_pytorch(
    device: torch.device, dtype: torch.dtype, options: dict[str, Any], size: tuple[int, int, int]
) -> None:
    problems = problems_of(size, dtype, device)
    upstream = torch.linspace(-2, 3, size[0], device=device)
    in_fp64 = [p.to(torch.float64) for p in problems]
    exact = pooled(linear_log_probabilities_ref, in_fp64, upstream.double(), **options)
    plain = pooled(linear_log_probabilities_ref, problems, upstream, **options)
    found = pooled(linear_log_probabilities, problems, upstream, chunk_rows=4, **options)
    assert found["value"].dtype == torch.float32
    for name in exact:
        assert_close_to_fp64(name, found[name], plain[name], exact[name])


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_vocabulary_of_one(device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Certain: what is left is the z-loss. Errors are held against 1, the largest that a gradient by a logit can be."""
    p = problem(2, 1, 1, dtype, device)
    exact = run(linear_cross_entropy_ref, p.to(torch.float64), **options)
    for name, tensor in run(linear_cross_entropy, p, **options).items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("_path")
def test_large_logits_lose_no_digits(device: torch.device) -> None:
    """A loss of 0.1 next to logits of 4096, whose fp32 rounding is 0.0005: the maximum is taken off first."""
    p = problem(6, 4, 40, torch.float32, device)
    p.bias.fill_(4096.0)
    p.weight.copy_((p.weight * 256).round() / 256)
    p.rows.copy_((p.rows * 8).round() / 8)  # logits are exact in fp32
    exact = run(linear_cross_entropy_ref, p.to(torch.float64))
    found = run(linear_cross_entropy, p)
    assert float(found["value"]) == pytest.approx(float(exact["value"]), rel=1e-6)
    torch.testing.assert_close(found["rows"].double(), exact["rows"], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("softcap", [0.5, 30.0, 1000.0])
def test_softcap_bends_small_and_large_logits(device: torch.device, softcap: float) -> None:
    values = torch.cat([torch.linspace(-1, 1, 61), torch.tensor([-1e4, -200.0, 1e-6, 50.0, 400.0])]).to(device)
    weight, rows = values[:, None], torch.ones(1, 1, device=device)
    for label in (0, 30, 63):
        labels = torch.tensor([label], device=device)
        exact = linear_log_probabilities_ref(rows.double(), weight.double(), labels, softcap=softcap)
        found = linear_log_probabilities(rows, weight, labels, softcap=softcap)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_path")
def test_fp16_keeps_gradients_of_improbable_tokens(device: torch.device) -> None:
    """p = 4e-8 is a third off as an fp16 number, and 1e-8 is 0; the loss scale, 65536, comes after them."""
    weight = torch.full((4, 4), 0.0, dtype=torch.float16, device=device)
    weight[1, 1], weight[2, 2] = 1.0, 1.0
    rows = torch.zeros(1, 4, dtype=torch.float16, device=device)
    p = Problem(rows, weight, torch.zeros(4, dtype=torch.float16, device=device), torch.tensor([0], device=device))
    p.bias[0] = 17.0
    p.bias[2] = -1.5
    found = run(linear_cross_entropy, p, upstream=65536.0)
    probabilities = torch.softmax(p.bias.double(), 0)
    assert float(found["rows"][0, 1]) == pytest.approx(65536 * float(probabilities[1]), rel=5e-3)
    assert float(found["rows"][0, 2]) == pytest.approx(65536 * float(probabilities[2]), rel=2e-2)


# -- rows that do not count -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ignored_rows_are_nothing(device: torch.device, options: dict[str, Any]) -> None:
    p = problem(7, 5, 33, torch.float32, device)
    kept = (p.labels != -100).nonzero().squeeze(1)
    assert len(kept) == 5
    whole = run(linear_cross_entropy, p, **options)
    part = run(linear_cross_entropy, replace(p, rows=p.rows[kept], labels=p.labels[kept]), **options)
    torch.testing.assert_close(whole["value"], part["value"], rtol=1e-6, atol=0)
    torch.testing.assert_close(whole["rows"][kept], part["rows"])
    torch.testing.assert_close(whole["weight"], part["weight"])
    assert not whole["rows"][2::3].any()

    none = run(linear_cross_entropy, replace(p, labels=torch.full_like(p.labels, -100)), **options)
    assert all(not tensor.any() for tensor in none.values())
    other = run(linear_cross_entropy, replace(p, labels=p.labels.where(p.labels != -100, 0)), ignore_index=0, **options)
    kept = (p.labels > 0).nonzero().squeeze(1)
    part = run(linear_cross_entropy, replace(p, rows=p.rows[kept], labels=p.labels[kept]), **options)
    torch.testing.assert_close(other["value"], part["value"], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("_path")
def test_no_rows(device: torch.device) -> None:
    p = problem(0, 5, 33, torch.float32, device)
    found = run(linear_cross_entropy, p)
    assert float(found["value"]) == 0.0
    assert found["rows"].shape == (0, 5)
    assert not found["weight"].any()
    assert run(linear_log_probabilities, p)["value"].shape == (0,)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("label", [-1, 33, 10**12])
def test_a_label_that_does_not_exist_is_nan(device: torch.device, label: int) -> None:
    p = problem(7, 5, 33, torch.float32, device)
    p.labels[3] = label
    found = linear_log_probabilities(p.rows, p.weight, p.labels)
    assert found.isnan().nonzero().flatten().tolist() == [3]
    assert linear_cross_entropy(p.rows, p.weight, p.labels).isnan()


# -- what is computed, and when ---------------------------------------------------------------------------------------


def test_the_second_backward_is_refused(device: torch.device) -> None:
    p = problem(3, 4, 9, torch.float32, device)
    rows = p.rows.requires_grad_()
    loss = linear_cross_entropy(rows, p.weight, p.labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: second backward through the same loss"):
        loss.backward()
    log_p = linear_log_probabilities(rows, p.weight, p.labels).sum()  # computed anew in the backward: allowed
    one, two = (torch.autograd.grad(log_p, rows, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_losses_add_up_before_one_backward(device: torch.device) -> None:
    p = problem(6, 4, 9, torch.float64, device)
    both, parts = (p.rows.clone().requires_grad_() for _ in range(2))
    linear_cross_entropy(both, p.weight, p.labels).backward()
    halves = [linear_cross_entropy(r, p.weight, y) for r, y in zip(parts.split(3), p.labels.split(3), strict=True)]
    (halves[0] + halves[1]).backward()
    torch.testing.assert_close(parts.grad, both.grad)


@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_what_is_trained_has_a_gradient(
    device: torch.device, trained: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two products with the head's gradient at most, and none of them for a tensor that needs none."""
    p = problem(7, 5, 33, torch.float64, device)
    expected = run(linear_cross_entropy_ref, p)
    products: list[bool] = []
    original = module._product
    monkeypatch.setattr(module, "_product", lambda *a, add=False: (products.append(add), original(*a, add=add)))
    inputs = [t.requires_grad_(on) for t, on in zip((p.rows, p.weight, p.bias), trained, strict=True)]
    loss = linear_cross_entropy(inputs[0], inputs[1], p.labels, bias_V=inputs[2], chunk_rows=7)
    torch.testing.assert_close(loss.detach(), expected["value"])
    assert loss.requires_grad == any(trained)
    assert products == [False] * trained[0] + [True] * trained[1]
    if any(trained):
        loss.backward()
    for name, tensor, on in zip(("rows", "weight", "bias"), inputs, trained, strict=True):
        assert (tensor.grad is not None) == on
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected[name])


@pytest.mark.usefixtures("_path")
def test_without_grad_mode_the_loss_is_all(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(7, 5, 33, torch.float32, device)
    rows = p.rows.requires_grad_()
    with_gradient = linear_cross_entropy(rows, p.weight, p.labels)
    log_p = linear_log_probabilities(rows, p.weight, p.labels)
    monkeypatch.setattr(module, "_product", None)
    with torch.no_grad():
        loss = linear_cross_entropy(rows, p.weight, p.labels)
        assert torch.equal(linear_log_probabilities(rows, p.weight, p.labels), log_p)
    torch.testing.assert_close(loss, with_gradient.detach(), rtol=1e-6, atol=0)
    assert not loss.requires_grad


def test_one_chunk_of_logits_exists_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(20, 2, 300, torch.float32, device)
    made: list[tuple[int, ...]] = []
    original = torch.empty

    def spy(shape: Any, **how: Any) -> torch.Tensor:
        tensor = original(shape, **how)
        made.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(torch, "empty", spy)
    monkeypatch.setattr(chunks, "CHUNK_MULTIPLE", 8)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8 * 320 * 4)
    linear_cross_entropy(p.rows.requires_grad_(), p.weight, p.labels).backward()
    assert sorted(made) == [(8, 320), (20,), (20, 2)]


def test_rows_of_a_chunk() -> None:
    assert chunk_rows(8192, 128256) == 2048
    assert chunk_rows(8200, 128256) == 1664  # five even chunks, not four and a rest of 8 rows
    assert chunk_rows(4096, 151936) == 1408
    assert chunk_rows(4096, 128256, bytes_per_value=4) == 1024
    assert chunk_rows(100, 128256) == 100
    assert chunk_rows(0, 128256) == 1
    assert chunk_rows(1000, 10**8) == 128
    for num_rows, vocabulary in itertools.product(range(1, 20000, 611), (32000, 50257, 128256, 262144)):
        size = chunk_rows(num_rows, vocabulary)
        assert size * vocabulary * 2 <= 2**29
        assert size == num_rows or size % 128 == 0
        assert size * math.ceil(num_rows / size) - num_rows < 128 * math.ceil(num_rows / size)


def test_an_odd_vocabulary_has_aligned_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    strides: list[int] = []
    original = module._cross_entropy
    monkeypatch.setattr(
        module, "_cross_entropy", lambda logits, *a, **k: (strides.append(logits.stride(0)), original(logits, *a, **k))
    )
    p = problem(2, 3, 65, torch.float32, device)
    linear_cross_entropy(p.rows, p.weight, p.labels)
    assert strides == [128]


# -- dtypes -----------------------------------------------------------------------------------------------------------


def autocast_dtype(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """bf16. The interpreter cannot, so that on the CPU its path without Triton runs."""
    if device.type == "cpu":
        monkeypatch.setattr(launch, "has_triton", lambda: False)
    return torch.bfloat16


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_decides_the_dtype_of_products(
    device: torch.device, rows_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning: fp32 master weights. Gradients come back in the dtype of what they are for."""
    low = autocast_dtype(device, monkeypatch)
    p = problem(7, 16, 130, torch.float32, device)
    p.rows = p.rows.to(rows_dtype)
    exact = run(linear_cross_entropy_ref, p.to(torch.float64))
    with torch.autocast(device.type, dtype=low):
        found = run(linear_cross_entropy, p, chunk_rows=4)
        plain = run(linear_cross_entropy_ref, p)
        rounded = linear_cross_entropy(p.rows.to(low), p.weight.to(low), p.labels, bias_V=p.bias.to(low), chunk_rows=4)
    assert torch.equal(found["value"], rounded)
    assert found["value"].dtype == torch.float32
    assert found["rows"].dtype == rows_dtype
    assert found["weight"].dtype == found["bias"].dtype == torch.float32
    for name in ("rows", "weight", "bias"):
        assert_close_to_fp64(name, found[name], plain[name], exact[name])
    log_p = {f: run(f, p) for f in (linear_log_probabilities, linear_log_probabilities_ref)}
    exact = run(linear_log_probabilities_ref, p.to(torch.float64))
    for name in exact:
        ours, plain = (log_p[f][name] for f in (linear_log_probabilities, linear_log_probabilities_ref))
        assert_close_to_fp64(name, ours, plain, exact[name])


def test_the_backward_under_autocast_is_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    low = autocast_dtype(device, monkeypatch)
    p = problem(7, 16, 130, torch.float32, device)
    for function in (linear_cross_entropy, linear_log_probabilities):
        rows = p.rows.clone().requires_grad_()
        value = function(rows, p.weight, p.labels).sum()
        with torch.autocast(device.type, dtype=low):
            value.backward()
        assert torch.equal(rows.grad, run(function, replace(p, bias=torch.zeros_like(p.bias)))["rows"])


def test_master_weights_meet_rows_in_16_bits(device: torch.device) -> None:
    """Without autocast: computed in the rows' dtype, and the weight's gradient is added up over chunks in fp32."""
    p = problem(64, 8, 33, torch.float32, device)
    p.rows = p.rows.to(torch.float16)
    exact = run(linear_cross_entropy_ref, p.to(torch.float64))
    plain = run(linear_cross_entropy_ref, p)
    found = run(linear_cross_entropy, p, chunk_rows=4)
    assert found["rows"].dtype == torch.float16
    assert found["weight"].dtype == torch.float32
    for name in ("rows", "weight", "bias"):
        assert_close_to_fp64(name, found[name], plain[name], exact[name])


def test_the_factor_of_the_backward_is_not_rounded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 / count as a bf16 number is up to 0.4% off, for every row alike."""
    low = autocast_dtype(device, monkeypatch)
    p = problem(64, 8, 33, low, device)
    factor = 1 / 700
    assert abs(float(torch.tensor(factor, dtype=low)) / factor - 1) > 1e-3
    once = run(linear_cross_entropy, p)["rows"].double()
    found = run(linear_cross_entropy, p, upstream=factor)["rows"].double()
    ratio = (found * once).sum() / once.square().sum()
    assert float(ratio) == pytest.approx(factor, rel=3e-4)


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rows": torch.zeros(2, 3, 4)},
            r"rows are \(2, 3, 4\) and weight is \(9, 4\); expected \(N, D\) and \(V, D\)",
        ),
        ({"rows": torch.zeros(3, 5)}, r"rows are \(3, 5\) and weight is \(9, 4\)"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels are \(2,\) torch.int64; expected \(3,\) torch.int64"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, r"labels are \(3,\) torch.int32; expected \(3,\) torch.int64"),
        ({"bias_V": torch.zeros(4)}, r"bias is \(4,\); expected \(9,\)"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be positive, or None"),
        ({"chunk_rows": 0}, "chunk_rows is 0; it must be at least 1"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must be from 0 to 1"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = {"rows": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.int64), **change}
    rows, labels = arguments.pop("rows"), arguments.pop("labels")
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(rows, torch.zeros(9, 4), labels, **arguments)
    if "label_smoothing" not in change:
        with pytest.raises(ValueError, match=message):
            linear_log_probabilities(rows, torch.zeros(9, 4), labels, **arguments)


# -- the compiler -----------------------------------------------------------------------------------------------------

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tunesmith.kernels.linear_cross_entropy import _cross_entropy_kernel as kernel

signature = {
    "logits": "*fp16", "labels": "*i64", "losses": "*fp32", "factors": "*fp32", "vocabulary": "i32", "stride": "i32",
    "factor": "fp32", "scale": "fp32", "softcap": "fp32", "smoothing": "fp32", "z_loss": "fp32", "ignore_index": "i32",
}
names = list(signature)
aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*names[:4], "stride")}  # not the vocabulary
for capability, on in ((75, {"GRADIENT"}), (90, {"SOFTCAP"}), (90, {"SOFTCAP", "SMOOTHING", "GRADIENT", "FACTORS"})):
    flags = {name: name in on for name in ("SOFTCAP", "SMOOTHING", "GRADIENT", "FACTORS")}
    constants = {(names.index("ignore_index") + 1 + i,): v for i, v in enumerate([4096, *flags.values()])}
    source = ASTSource(kernel, signature | dict.fromkeys(["BLOCK", *flags], "constexpr"), constants, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]
    wide, narrow = (len(re.findall(r"ld[.]global[.]" + width, code)) for width in ("v4", "b16"))
    assert wide >= 2 and narrow == 1, (on, wide, narrow)  # narrow: the label's logit
print("compiled")
"""


def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """The interpreter takes code that the compiler refuses. An odd vocabulary must not narrow the accesses either."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    found = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout == "compiled\n", found.stderr


# -- on the GPU only --------------------------------------------------------------------------------------------------


@ON_GPU
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_waits_for_the_gpu(device: torch.device, options: dict[str, Any]) -> None:
    p = problem(300, 64, 1000, torch.bfloat16, device)
    logit_options = {name: value for name, value in options.items() if name in ("scale", "softcap")}

    def step() -> None:
        run(linear_cross_entropy, p, chunk_rows=128, **options)
        run(linear_log_probabilities, p, chunk_rows=128, **logit_options)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU
def test_more_than_2_to_the_31_logits(device: torch.device) -> None:
    rows, vocabulary = 16512, 131072
    assert rows * vocabulary > 2**31
    p = problem(rows, 16, vocabulary, torch.bfloat16, device)
    whole = run(linear_cross_entropy, p, chunk_rows=rows)
    parts = run(linear_cross_entropy, p, chunk_rows=1024)
    torch.testing.assert_close(whole["value"], parts["value"], rtol=1e-5, atol=0)
    for name in ("rows", "weight", "bias"):
        error = (whole[name].double() - parts[name].double()).norm() / parts[name].double().norm()
        assert error < 1e-2, f"{name}: {error:.1e}"
