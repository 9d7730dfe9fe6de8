"""Attention against autograd through an explicit (T, T) mask, in fp64; on a GPU, every backend by the numerics rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.masking_utils import sliding_window_causal_mask_function

from kernels.numerics import assert_close_to_fp64
from tunesmith.kernels import attention_backends
from tunesmith.kernels.attention import (
    REFUSALS,
    AttentionSpec,
    Card,
    SequenceLayout,
    attention_backward,
    attention_forward,
    attention_ref,
    card_of,
    choose_backend,
    describe_backend,
    refusal,
)

FP64 = torch.float64
CPU = torch.device("cpu")
LENGTHS = {"dense": (5, 5), "packed": (1, 4, 1, 7), "packed, equal": (3, 3, 3), "one token": (1,)}
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_layout(lengths: tuple[int, ...], device: torch.device = CPU, packed: bool = True) -> SequenceLayout:
    if not packed:
        return SequenceLayout.dense(len(lengths), lengths[0])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return SequenceLayout.packed(bounds, lengths, sum(lengths))


def widened(layout: SequenceLayout) -> SequenceLayout:
    """The same, with three empty sequences at the end and a maximum that no sequence reaches."""
    assert layout.cu_seqlens is not None
    bounds = torch.cat([layout.cu_seqlens, layout.cu_seqlens[-1:].expand(3)])
    return SequenceLayout(1, layout.length, layout.lengths, layout.max_length + 40, False, bounds)


def make_inputs(
    layout: SequenceLayout, heads: tuple[int, int, int], like: torch.dtype = FP64, device: torch.device = CPU
) -> tuple[QKV, torch.Tensor]:
    """q, k, v as views into one buffer whose last 16 columns are NaN, as the layer has them, and do."""
    num_heads, num_kv_heads, head_dim = heads
    total = layout.batch * layout.length
    widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, 16]
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(total, sum(widths), generator=rng)
    values[:, -16:] = float("nan")
    do = torch.randn(total, num_heads, head_dim, generator=rng).to(device, like)
    q, k, v, _ = values.to(device, like).split(widths, dim=1)
    return (
        q.unflatten(1, (num_heads, head_dim)),
        k.unflatten(1, (num_kv_heads, head_dim)),
        v.unflatten(1, (num_kv_heads, head_dim)),
    ), do


def visible(layout: SequenceLayout, window: int | None, device: torch.device = CPU) -> torch.Tensor:
    """(T, T), by document number: unlike the code under test, which goes sequence by sequence or by block."""
    document = torch.repeat_interleave(torch.tensor(layout.lengths)).to(device)
    position = torch.arange(len(document), device=device)
    behind = position[:, None] - position
    return (document[:, None] == document) & (behind >= 0) & (behind < (window or len(document)))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, spec: AttentionSpec) -> QKV:
    """Attention as models write it, in the dtype of the inputs but for the softmax, with autograd's graph."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~visible(layout, spec.window, q.device), float("-inf"))
    probabilities = scores.softmax(-1, dtype=FP64 if q.dtype == FP64 else torch.float32).to(q.dtype)
    return torch.einsum("hij,jhd->ihd", probabilities, v)


def with_gradients(function: Callable[..., torch.Tensor], inputs: QKV, do: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    o = function(*leaves)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def ours(
    inputs: QKV, do: torch.Tensor, layout: SequenceLayout, spec: AttentionSpec, backend: str | None = None
) -> tuple[torch.Tensor, ...]:
    o, saved = attention_forward(*inputs, layout, spec, backend)
    assert o.is_contiguous()
    assert not o.requires_grad
    return o, *attention_backward(do, *inputs, o, saved, layout, spec, backend)


NAMES = ("o", "dq", "dk", "dv")


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("heads", [(4, 1, 6), (4, 2, 8), (3, 3, 5)], ids=["4 to 1", "2 to 1", "1 to 1"])
@pytest.mark.parametrize("kind", LENGTHS)
def test_reference_equals_autograd_through_an_explicit_mask(
    kind: str, heads: tuple[int, int, int], window: int | None, softcap: float | None
) -> None:
    layout = make_layout(LENGTHS[kind], packed=kind != "dense")
    spec = AttentionSpec(scale=0.7, window=window, softcap=softcap)
    inputs, do = make_inputs(layout, heads)
    expected = with_gradients(lambda *qkv: plain(*qkv, layout, spec), inputs, do)
    for name, got, want in zip(NAMES, ours(inputs, do, layout, spec), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_reference_equals_pytorch_sdpa() -> None:
    layout, spec = SequenceLayout.dense(2, 9), AttentionSpec(scale=1 / math.sqrt(8))
    inputs, do = make_inputs(layout, (4, 2, 8))

    def sdpa(*qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(0, (2, 9)).transpose(1, 2) for t in qkv)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2).flatten(0, 1)

    for got, want in zip(ours(inputs, do, layout, spec), with_gradients(sdpa, inputs, do), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_a_window_means_what_it_means_in_transformers(window: int) -> None:
    layout = SequenceLayout.dense(1, 12)
    (q, k, _), _ = make_inputs(layout, (1, 1, 12))
    o = attention_ref(q, k, torch.eye(12, dtype=FP64)[:, None], layout, AttentionSpec(scale=1.0, window=window))
    index = torch.arange(12)
    in_transformers = sliding_window_causal_mask_function(window)(0, 0, index[:, None], index)
    assert torch.equal(o[:, 0] > 0, in_transformers)  # v is the identity: row i of o is row i of P


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_computes_in_fp32_and_rounds_once(half: torch.dtype, softcap: float | None) -> None:
    layout, spec = make_layout((1, 6, 11)), AttentionSpec(scale=0.5, window=5, softcap=softcap)
    inputs, do = make_inputs(layout, (4, 2, 8), half)
    check_numerics(ours(inputs, do, layout, spec), inputs, do, layout, spec)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = ours(inputs, do, layout, spec)
    for name, got, want in zip(NAMES, under_autocast, ours(inputs, do, layout, spec), strict=True):
        assert torch.equal(got, want), name


def check_numerics(
    results: tuple[torch.Tensor, ...], inputs: QKV, do: torch.Tensor, layout: SequenceLayout, spec: AttentionSpec
) -> None:
    wide = tuple(t.double() for t in inputs)
    exact = with_gradients(lambda *qkv: plain(*qkv, layout, spec), wide, do.double())
    same_dtype = with_gradients(lambda *qkv: plain(*qkv, layout, spec), inputs, do)
    for name, got, rounded, want in zip(NAMES, results, same_dtype, exact, strict=True):
        assert_close_to_fp64(name, got, rounded, want)


def check_isolation(
    layout: SequenceLayout, number: int, run: Callable[[QKV], tuple[torch.Tensor, ...]], qkv: QKV
) -> None:
    """Other values in sequence `number` change its own results and no bit of the others'."""
    bounds = [0, *torch.tensor(layout.lengths).cumsum(0).tolist()]
    inside = slice(bounds[number], bounds[number + 1])
    changed = tuple(t.clone() for t in qkv)
    for t in changed:
        t[inside] = t[inside] * -1.5 + 0.25
    others = torch.ones(bounds[-1], dtype=torch.bool, device=qkv[0].device)
    others[inside] = False
    for name, before, after in zip(NAMES, run(qkv), run(changed), strict=True):
        assert torch.equal(before[others], after[others]), f"{name} of another sequence changed"
        assert not torch.equal(before[inside], after[inside]), f"{name} of the sequence did not change"


@pytest.mark.parametrize("number", range(4))
def test_sequences_do_not_see_each_other(number: int) -> None:
    layout, spec = make_layout((3, 2, 1, 6)), AttentionSpec(scale=0.5)
    qkv, do = make_inputs(layout, (4, 2, 8), torch.float32)
    if layout.lengths[number] > 1:  # the gradients of q and k are zero where there is one key
        check_isolation(layout, number, lambda inputs: ours(inputs, do, layout, spec), qkv)
    else:
        run = lambda inputs: (attention_forward(*inputs, layout, spec)[0],)  # noqa: E731
        bounds = sum(layout.lengths[:number])
        changed = tuple(t.clone() for t in qkv)
        for t in changed:
            t[bounds] += 1
        (before,), (after,) = run(qkv), run(changed)
        assert (before != after).flatten(1).any(1).tolist() == [i == bounds for i in range(len(before))]


def test_what_stands_right_of_a_token_is_harmless() -> None:
    layout, spec = SequenceLayout.dense(2, 6), AttentionSpec(scale=0.5)
    qkv, do = make_inputs(layout, (2, 1, 8), torch.float32)
    padding = torch.tensor([False, False, False, False, True, True] * 2)
    do[padding] = 0
    other = tuple(t.clone() for t in qkv)
    for t in other:
        t[padding] = 100.0
    for name, before, after in zip(NAMES, ours(qkv, do, layout, spec), ours(other, do, layout, spec), strict=True):
        assert torch.equal(before[~padding], after[~padding]), name


def test_layouts() -> None:
    dense = SequenceLayout.dense(3, 7)
    assert (dense.batch, dense.length, dense.lengths, dense.max_length) == (3, 7, (7, 7, 7), 7)
    assert (dense.kind, dense.cu_seqlens) == ("dense", None)
    packed = make_layout((2, 5, 1))
    assert (packed.batch, packed.length, packed.max_length, packed.kind) == (1, 8, 5, "packed")
    equal = make_layout((4, 4))
    assert (equal.batch, equal.length, equal.kind, equal.equal_length) == (1, 8, "dense", True)


def test_layouts_and_specs_that_contradict_themselves_are_refused() -> None:
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^2 lengths sum to 5: expected positive ones that sum to 6$"):
        SequenceLayout.packed(bounds, (2, 3), 6)
    with pytest.raises(ValueError, match=r"^2 lengths sum to 5: expected positive ones that sum to 5$"):
        SequenceLayout.packed(bounds, (5, 0), 5)
    with pytest.raises(ValueError, match=r"^cu_seqlens is torch.int64 of shape \(3,\): expected int32 of shape \(3,\)"):
        SequenceLayout.packed(bounds.long(), (2, 3), 5)
    with pytest.raises(ValueError, match=r"of shape \(3,\): expected int32 of shape \(2,\) for 1 sequences$"):
        SequenceLayout.packed(bounds, (5,), 5)
    with pytest.raises(ValueError, match=r"^layout of 0 rows of 4 tokens: expected at least one of each$"):
        SequenceLayout.dense(0, 4)
    with pytest.raises(ValueError, match=r"^attention window is 0: expected at least 1, or None for none$"):
        AttentionSpec(scale=1.0, window=0)
    with pytest.raises(ValueError, match=r"^attention softcap is -1.0: expected more than 0, or None for none$"):
        AttentionSpec(scale=1.0, softcap=-1.0)


def test_inputs_that_do_not_match_are_refused() -> None:
    layout, spec = SequenceLayout.dense(1, 4), AttentionSpec(scale=1.0)
    (q, k, v), do = make_inputs(layout, (4, 2, 8))
    with pytest.raises(ValueError, match=r"expected \(4, heads, d\) for a layout of 4 tokens, k and v alike$"):
        attention_forward(q[:3], k, v, layout, spec)
    with pytest.raises(ValueError, match=r"^3 query heads of 8 do not divide into 2 of 8$"):
        attention_forward(q[:, :3], k, v, layout, spec)
    with pytest.raises(ValueError, match=r"^q, k, v are torch.float64, torch.float32, torch.float64 .*: mixed$"):
        attention_forward(q, k.float(), v, layout, spec)
    with pytest.raises(ValueError, match=r"^the last strides of q, k, v are 1, 1, 2: expected 1$"):
        attention_forward(q, k, torch.cat([v, v], -1)[..., ::2], layout, spec)
    o, saved = attention_forward(q, k, v, layout, spec)
    with pytest.raises(
        ValueError, match=r"^do is \(4, 2, 8\) torch.float64 and o \(4, 4, 8\): expected q's \(4, 4, 8\)"
    ):
        attention_backward(do[:, :2], q, k, v, o, saved, layout, spec)


def test_a_backend_that_cannot_is_refused() -> None:
    layout, spec = SequenceLayout.dense(1, 4), AttentionSpec(scale=1.0)
    (q, k, v), _ = make_inputs(layout, (4, 2, 8))
    expected = r"^attention backend 'flash2' cannot do this: needs an NVIDIA GPU; math can$"
    with pytest.raises(ValueError, match=expected):
        attention_forward(q, k, v, layout, spec, backend="flash2")
    with pytest.raises(ValueError, match=r"^attention backend 'xformers': expected one of cudnn, flash4, flash2"):
        attention_forward(q, k, v, layout, spec, backend="xformers")


H100 = Card((9, 0), cudnn=91501, flash4=True, triton=True)
H100_PLAIN = Card((9, 0), cudnn=91501, triton=True)
B200 = Card((10, 0), cudnn=91501, flash4=True, triton=True)
A100 = Card((8, 0), cudnn=91501, triton=True)
RTX4090 = Card((8, 9), cudnn=91501, triton=True)
T4 = Card((7, 5), cudnn=91501, triton=True)
PLAIN = AttentionSpec(scale=1.0)
WINDOW = AttentionSpec(scale=1.0, window=512)
SOFTCAP = AttentionSpec(scale=1.0, softcap=50.0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("card", "data_type", "head_dim", "kind", "spec", "expected"),
    [
        (H100, BF16, 128, "dense", PLAIN, "cudnn"),
        (H100, FP16, 64, "dense", PLAIN, "cudnn"),
        (H100, BF16, 128, "packed", PLAIN, "flash4"),
        (H100, BF16, 128, "dense", WINDOW, "flash4"),
        (H100, BF16, 128, "packed", WINDOW, "flash4"),
        (H100, BF16, 128, "dense", SOFTCAP, "flash4"),
        (H100, BF16, 256, "dense", PLAIN, "flash2"),
        (H100, BF16, 256, "packed", PLAIN, "flash2"),
        (H100, BF16, 256, "dense", SOFTCAP, "flex"),
        (H100, FP32, 128, "dense", PLAIN, "efficient"),
        (H100, FP32, 128, "packed", SOFTCAP, "flex"),
        (H100, FP64, 128, "dense", PLAIN, "math"),
        (H100, BF16, 100, "dense", PLAIN, "math"),
        (H100, BF16, 512, "dense", PLAIN, "math"),
        (H100_PLAIN, BF16, 128, "dense", PLAIN, "cudnn"),
        (H100_PLAIN, BF16, 128, "packed", PLAIN, "flash2"),
        (H100_PLAIN, BF16, 128, "packed", SOFTCAP, "flex"),
        (B200, BF16, 128, "packed", PLAIN, "flash4"),
        (Card((9, 0), cudnn=91300, triton=True), BF16, 128, "dense", PLAIN, "flash2"),
        (Card((9, 0), cudnn=91501), BF16, 128, "packed", SOFTCAP, "math"),
        (Card((9, 0), 91501, True, True, deterministic=True), BF16, 128, "dense", PLAIN, "flash4"),
        (Card((9, 0), 91501, False, True, deterministic=True), BF16, 128, "dense", PLAIN, "flash2"),
        (A100, BF16, 128, "dense", PLAIN, "flash2"),
        (A100, BF16, 128, "packed", WINDOW, "flash2"),
        (A100, BF16, 224, "packed", PLAIN, "flash2"),
        (A100, BF16, 8, "dense", SOFTCAP, "math"),
        (RTX4090, BF16, 224, "packed", PLAIN, "efficient"),
        (RTX4090, BF16, 256, "packed", PLAIN, "flash2"),
        (RTX4090, BF16, 128, "packed", SOFTCAP, "flex"),
        (Card((12, 0), triton=True), BF16, 224, "packed", PLAIN, "efficient"),
        (T4, FP16, 128, "dense", PLAIN, "efficient"),
        (T4, FP16, 64, "packed", WINDOW, "efficient"),
        (T4, FP16, 128, "packed", SOFTCAP, "math"),
        (T4, BF16, 128, "packed", PLAIN, "math"),
        (T4, FP32, 128, "packed", PLAIN, "efficient"),
        (Card(), FP32, 64, "packed", PLAIN, "math"),
    ],
)
def test_the_choice_of_a_backend(
    card: Card, data_type: torch.dtype, head_dim: int, kind: str, spec: AttentionSpec, expected: str
) -> None:
    assert choose_backend("cuda", data_type, head_dim, kind, spec, card) == expected


def test_a_layout_tells_more_than_its_kind() -> None:
    def chosen(layout: SequenceLayout, spec: AttentionSpec = PLAIN) -> str:
        return choose_backend("cuda", BF16, 128, layout, spec, H100_PLAIN)

    assert chosen(make_layout((600, 600))) == "cudnn"  # equal lengths: dense
    assert chosen(make_layout((600, 599))) == "flash2"
    assert chosen(SequenceLayout.dense(2, 512), WINDOW) == "cudnn"  # the window has no edge
    assert chosen(SequenceLayout.dense(2, 513), WINDOW) == "flash2"
    assert chosen(SequenceLayout.dense(4, 1)) == "flash2"  # cuDNN knows no single key


def test_the_plan_says_why() -> None:
    assert describe_backend("cuda", BF16, 128, "dense", PLAIN, H100) == "cudnn"
    assert describe_backend("cuda", BF16, 128, "packed", PLAIN, H100_PLAIN) == (
        "flash2 (not cudnn: for sequences of equal length; flash4: flash-attn-4 is not installed)"
    )
    assert describe_backend("cuda", FP16, 256, "dense", SOFTCAP, T4) == (
        "math (not cudnn: for compute capability 9.x to 10.x, this is 7.5; "
        "flash4: for compute capability 9.x to 10.x, this is 7.5; "
        "flash2: for compute capability 8.0 and newer, this is 7.5; efficient: it has no softcap; "
        "flex: for compute capability 8.0 and newer, this is 7.5)"
    )
    assert describe_backend("cpu", FP32, 64, "dense", PLAIN) == "math (no NVIDIA GPU)"


def test_determinism_is_read_at_every_choice(deterministic: None) -> None:
    assert card_of("cpu") == Card(deterministic=True)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("window", [None, 1, 6, 9])
@pytest.mark.parametrize("lengths", [(37,), (1, 8, 3, 16, 2, 9), (16, 16), (4, 12, 8, 1), (21, 3)])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_block_mask_is_that_of_the_whole_mask(lengths: tuple[int, ...], window: int | None, packed: bool) -> None:
    layout = make_layout(lengths, packed=packed)
    got = attention_backends.block_mask(layout, window, CPU, block=8)
    size = layout.max_length if layout.kind == "dense" else layout.length
    whole = visible(SequenceLayout.dense(1, size) if layout.kind == "dense" else layout, window)
    expected = create_block_mask(lambda b, h, q, k: whole[q, k], None, None, size, size, device="cpu", BLOCK_SIZE=8)
    assert got.shape == expected.shape
    for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(got, part), getattr(expected, part)), part
    for part in ("kv", "full_kv", "q", "full_q"):
        counts, indices, wanted = (
            getattr(mask, f"{part}_{what}")[0, 0]
            for mask, what in ((expected, "num_blocks"), (got, "indices"), (expected, "indices"))
        )
        for count, row, wanted_row in zip(counts.tolist(), indices, wanted, strict=True):
            assert row[:count].tolist() == wanted_row[:count].tolist(), part
    if layout.kind == "packed":
        wide = attention_backends.block_mask(widened(layout), window, CPU, block=8)
        assert torch.equal(wide.to_dense(), got.to_dense())
    index = torch.arange(size)
    assert torch.equal(got.mask_mod(0, 0, index[:, None], index[None, :]), whole)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_forward_equals_the_reference() -> None:
    """Uncompiled, as FlexAttention has no backward on the CPU: what its score and mask functions say."""
    layout, spec = make_layout((1, 8, 3, 16)), AttentionSpec(scale=0.5, window=6, softcap=2.0)
    inputs, _ = make_inputs(layout, (4, 2, 16), torch.float32)
    mask = attention_backends.block_mask(layout, spec.window, CPU)
    o = flex_attention(
        *(t[None].transpose(1, 2) for t in inputs),
        score_mod=attention_backends.softcap_mod(2.0),
        block_mask=mask,
        scale=spec.scale,
        enable_gqa=True,
    )
    torch.testing.assert_close(o[0].transpose(0, 1), attention_ref(*inputs, layout, spec), atol=1e-5, rtol=1e-5)


def test_calls_fit_pytorchs_operators() -> None:
    """Without a GPU only as fake tensors. (Of `efficient` the forward: the shape rule of its backward is out of date.)"""
    cuda = torch.device("cuda")
    with FakeTensorMode():
        dense = SequenceLayout.dense(2, 64)
        packed = SequenceLayout.packed(torch.empty(3, dtype=torch.int32, device=cuda), (1, 127), 128)
        cases = [
            ("cudnn", dense, None),
            *((name, row, w) for name in ("flash2", "efficient") for row in (dense, packed) for w in (None, 9)),
        ]
        for name, layout, window in cases:
            spec = AttentionSpec(0.1, window=window)
            *parts, _ = torch.empty(128, 1552, device=cuda, dtype=BF16).split([1024, 256, 256, 16], 1)
            q, k, v = (t.unflatten(1, (-1, 128)) for t in parts)
            o, saved = attention_backends.BACKENDS[name].forward(q, k, v, layout, spec)
            assert (o.shape, o.is_contiguous()) == (q.shape, True), name
            if name != "efficient":
                gradients = attention_backends.BACKENDS[name].backward(o, q, k, v, o, saved, layout, spec)
                assert [t.shape for t in gradients] == [q.shape, k.shape, v.shape], name
                assert all(t.stride(2) == 1 for t in gradients), name


class Flash4StandIn:
    """What flash-attn-4 (4.0.0b36) documents, in plain PyTorch: windows count keys beside the query's own."""

    def attend(self, q, k, v, softmax_scale, softcap, window, cu_seqlens_q, max_seqlen_q):  # type: ignore[no-untyped-def]
        if cu_seqlens_q is None:
            layout = SequenceLayout.dense(*q.shape[:2])
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        else:
            layout = make_layout(tuple(cu_seqlens_q.diff().tolist()))
            assert max_seqlen_q == layout.max_length
        left, right = window
        assert right in (None, 0)
        spec = AttentionSpec(softmax_scale, None if left is None else left + 1, softcap or None)
        return plain(q, k, v, layout, spec)

    def _flash_attn_fwd(
        self, q, k, v, *, softmax_scale, causal, softcap, return_lse, window_size_left=None, window_size_right=None,
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert causal
        assert return_lse
        assert (cu_seqlens_k, max_seqlen_k) == (cu_seqlens_q, max_seqlen_q)
        window = (window_size_left, window_size_right)
        o = self.attend(q, k, v, softmax_scale, softcap, window, cu_seqlens_q, max_seqlen_q)
        return o.view(q.shape), torch.tensor(7.0), None, None, None

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, *, softmax_scale, causal, softcap, deterministic, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert causal
        assert lse == 7
        assert not deterministic
        assert (cu_seqlens_k, max_seqlen_k) == (cu_seqlens_q, max_seqlen_q)
        window = (window_size_left, window_size_right)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            o = self.attend(*leaves, softmax_scale, softcap, window, cu_seqlens_q, max_seqlen_q)
            torch.testing.assert_close(o.view(q.shape), out)
        return torch.autograd.grad(o, leaves, dout.view(o.shape))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_flash4_is_called_as_it_is_documented(
    kind: str, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backends, "flash4_interface", Flash4StandIn)
    layout, flash4 = make_layout(LENGTHS[kind], packed=kind != "dense"), attention_backends.BACKENDS["flash4"]
    spec = AttentionSpec(scale=0.7, window=window, softcap=softcap)
    inputs, do = make_inputs(layout, (4, 2, 8))
    o, saved = flash4.forward(*inputs, layout, spec)
    results = o, *flash4.backward(do, *inputs, o, saved, layout, spec)
    for name, got, want in zip(NAMES, results, ours(inputs, do, layout, spec), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch's and flash-attn-4's kernels")

PROBLEMS = {
    # name: (lengths, packed, (H, G, d), window, softcap)
    "dense": ((256, 256), False, (8, 2, 128), None, None),
    "dense, odd": ((193, 193, 193), False, (4, 4, 64), None, None),
    "dense, window": ((300, 300), False, (4, 1, 128), 100, None),
    "dense, softcap": ((200, 200), False, (4, 2, 64), None, 3.0),
    "dense, d 256": ((150, 150), False, (4, 1, 256), None, None),
    "packed": ((1, 257, 64, 130, 33), True, (8, 2, 128), None, None),
    "packed, d 64": ((31, 2, 300, 129), True, (9, 3, 64), None, None),
    "packed, window": ((1, 257, 64, 130), True, (4, 1, 64), 50, None),
    "packed, softcap": ((1, 257, 64, 130), True, (4, 2, 128), None, 3.0),
    "packed, window, softcap, d 256": ((140, 257, 3), True, (4, 2, 256), 70, 3.0),
    "packed, equal": ((128, 128, 128), True, (4, 1, 128), None, None),
}


KERNELS = [name for name in REFUSALS if name != "math"]
HALF_OF_CARD = BF16 if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else FP16
COMPILED = ("flash4", "flex")  # seconds for every new combination: not every one of them in both types
COMBINATIONS = [
    (backend, problem, data_type)
    for backend in REFUSALS
    for problem in PROBLEMS
    for data_type in (BF16, FP16)
    if backend not in COMPILED
    or (data_type == HALF_OF_CARD and (backend != "flex" or "softcap" in problem or problem in ("dense", "packed")))
]


def gpu_problem(
    name: str, backend: str, data_type: torch.dtype
) -> tuple[QKV, torch.Tensor, SequenceLayout, AttentionSpec]:
    """Skips where the backend cannot, with its reason."""
    lengths, packed, heads, window, softcap = PROBLEMS[name]
    device = torch.device("cuda")
    layout = make_layout(lengths, device, packed)
    spec = AttentionSpec(scale=1.3 / math.sqrt(heads[2]), window=window, softcap=softcap)
    skip_unless_able(backend, data_type, heads[2], layout, spec)
    inputs, do = make_inputs(layout, heads, data_type, device)
    if softcap is not None:  # scores that reach the cap
        inputs[0].mul_(softcap / 2)
    return inputs, do, layout, spec


def skip_unless_able(
    backend: str, data_type: torch.dtype, head_dim: int, layout: SequenceLayout, spec: AttentionSpec
) -> None:
    reason = refusal(backend, "cuda", data_type, head_dim, layout, spec)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@on_cuda
@pytest.mark.parametrize(
    ("backend", "problem", "data_type"), COMBINATIONS, ids=[f"{b}-{p}-{str(t)[6:]}" for b, p, t in COMBINATIONS]
)
def test_every_backend_is_as_exact_as_plain_pytorch(backend: str, problem: str, data_type: torch.dtype) -> None:
    inputs, do, layout, spec = gpu_problem(problem, backend, data_type)
    check_numerics(ours(inputs, do, layout, spec, backend), inputs, do, layout, spec)


@on_cuda
@pytest.mark.parametrize(
    ("backend", "problem"),
    [("flex", "packed, softcap"), *((backend, problem) for backend in ("efficient", "math") for problem in PROBLEMS)],
)
def test_fp32_on_the_gpu_is_fp32(backend: str, problem: str) -> None:
    """Within 64 ulp of the largest value. (TF32 would be off by thousands; kernels round o before do * o, PyTorch not.)"""
    inputs, do, layout, spec = gpu_problem(problem, backend, FP32)
    exact = ours(tuple(t.double() for t in inputs), do.double(), layout, spec, "math")
    for name, got, want in zip(NAMES, ours(inputs, do, layout, spec, backend), exact, strict=True):
        allowed = 64 * torch.finfo(FP32).eps * want.abs().max().item()
        torch.testing.assert_close(
            got.double(), want, atol=allowed, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@on_cuda
@pytest.mark.parametrize("problem", ["packed", "packed, window"])
@pytest.mark.parametrize("backend", KERNELS)
def test_empty_sequences_at_the_end_change_nothing(backend: str, problem: str) -> None:
    inputs, do, layout, spec = gpu_problem(problem, backend, HALF_OF_CARD)
    check_numerics(ours(inputs, do, widened(layout), spec, backend), inputs, do, layout, spec)


@on_cuda
@pytest.mark.parametrize("backend", REFUSALS)
def test_sequences_of_one_token_on_the_gpu(backend: str) -> None:
    """o is v, and dq and dk are zero but for the rounding of dP - rowsum(do * o)."""
    layout, spec = SequenceLayout.dense(5, 1), AttentionSpec(scale=0.125)
    skip_unless_able(backend, FP16, 64, layout, spec)
    inputs, do = make_inputs(layout, (4, 2, 64), FP16, torch.device("cuda"))
    o, dq, dk, dv = ours(inputs, do, layout, spec, backend)
    assert torch.equal(o, inputs[2].repeat_interleave(2, 1))
    torch.testing.assert_close(dv, do.view(5, 2, 2, 64).sum(2), atol=1e-2, rtol=1e-3)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-4


@on_cuda
@pytest.mark.parametrize("problem", ["dense", "packed"])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_strided_output_gradient_gives_the_same(backend: str, problem: str, deterministic: None) -> None:
    """cuDNN's plans are cached without the strides of do: a strided one after a contiguous one must not matter."""
    if backend == "cudnn":
        torch.use_deterministic_algorithms(False)  # it refuses otherwise
    inputs, do, layout, spec = gpu_problem(problem, backend, HALF_OF_CARD)
    o, saved = attention_forward(*inputs, layout, spec, backend)
    wide = torch.full((len(do), 2 * do.shape[1], do.shape[2]), float("nan"), dtype=do.dtype, device=do.device)
    strided = wide[:, : do.shape[1]]
    strided.copy_(do)
    expected = attention_backward(do, *inputs, o, saved, layout, spec, backend)
    if backend == "flex":  # its graph runs backward once
        o, saved = attention_forward(*inputs, layout, spec, backend)
    for name, got, want in zip(
        NAMES[1:], attention_backward(strided, *inputs, o, saved, layout, spec, backend), expected, strict=True
    ):
        if backend == "cudnn":
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(got, want), name


@on_cuda
@pytest.mark.parametrize("problem", ["packed", "packed, window", "packed, softcap"])
@pytest.mark.parametrize("backend", KERNELS)
def test_packed_sequences_do_not_see_each_other_on_the_gpu(backend: str, problem: str, deterministic: None) -> None:
    inputs, do, layout, spec = gpu_problem(problem, backend, HALF_OF_CARD)
    check_isolation(layout, 1, lambda qkv: ours(qkv, do, layout, spec, backend), inputs)


@on_cuda
@pytest.mark.parametrize("problem", ["dense", "packed", "packed, window", "packed, softcap"])
def test_deterministic_mode_gives_the_same_bits(problem: str, deterministic: None) -> None:
    lengths, packed, heads, window, softcap = PROBLEMS[problem]
    layout = make_layout(lengths, torch.device("cuda"), packed)
    spec = AttentionSpec(scale=1 / math.sqrt(heads[2]), window=window, softcap=softcap)
    backend = choose_backend("cuda", HALF_OF_CARD, heads[2], layout, spec)
    if backend == "math":
        pytest.skip("math: cuBLAS is deterministic only with CUBLAS_WORKSPACE_CONFIG set")
    assert backend != "cudnn"
    inputs, do = make_inputs(layout, heads, HALF_OF_CARD, torch.device("cuda"))
    first = ours(inputs, do, layout, spec, backend)
    for _ in range(5):
        for name, got, want in zip(NAMES, ours(inputs, do, layout, spec, backend), first, strict=True):
            assert torch.equal(got, want), name


@on_cuda
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_no_mask_is_made_and_nothing_waits_for_the_gpu(backend: str, packed: bool) -> None:
    device = torch.device("cuda")
    lengths = (500, 524) * 16 if packed else (512,) * 32
    spec = AttentionSpec(scale=0.125)
    inputs, do = make_inputs(make_layout(lengths, device, packed), (2, 1, 64), HALF_OF_CARD, device)
    skip_unless_able(backend, HALF_OF_CARD, 64, make_layout(lengths, device, packed), spec)
    ours(inputs, do, make_layout(lengths, device, packed), spec, backend)  # compiles, and builds plans
    layout = make_layout(lengths, device, packed)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(inputs, do, layout, spec, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    used = torch.cuda.max_memory_allocated() - before
    total = layout.batch * layout.length
    assert used < total * total / 4, f"{used / 2**20:.0f} MiB; a (T, T) mask of bytes is {total**2 / 2**20:.0f} MiB"
