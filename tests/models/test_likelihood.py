"""Likelihoods of continuations against plain forwards of one whole row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_of import FAMILIES as KNOWN
from models_of import family_model

from out_of_memory import REASON, fail_at
from tunesmith.config import AdapterConfig
from tunesmith.errors import MachineError, ModelError
from tunesmith.hardware import ComputeDType
from tunesmith.models import likelihood
from tunesmith.models.adapters import add_adapter
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import fuse, unfuse
from tunesmith.models.generate import generate_greedy
from tunesmith.models.likelihood import Likelihood, Request, log_likelihoods
from tunesmith.out_of_memory import Halving

FAMILIES: dict[str, dict[str, Any]] = {
    **{family: {} for family in KNOWN},
    "cohere": {"logit_scale": 0.25, "num_key_value_heads": 2},
    "granite": {"logits_scaling": 3.0, "num_key_value_heads": 2},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
}
SHARED = [7, 21, 3, 3, 60, 14, 9]
SHARES = [family for family in FAMILIES if family not in ("mistral", "gemma2", "gemma3_text", "lfm2")]


def requests() -> list[Request]:
    """Two questions with four answers each, one with letters, an answer that begins another, and repeated requests."""
    first, second, third = [*SHARED, 5], [*SHARED, 8, 40, 41, 42, 43], [*SHARED, 5, 17, 18]
    return [
        (first, [11, 12, 13]),
        (second, [50]),
        (first, [11, 12, 13, 14, 15, 16]),
        (first, [30]),
        (second, [51]),
        (third, [90, 4, 4, 1]),
        (second, [52]),
        (first, [11, 12, 66]),
        (third, [90, 4, 5, 2, 8, 9, 33, 1, 2, 3]),
        (second, [53]),
        (first, [11, 12, 13]),
        (third, []),
    ]


def plainly(model: Any, requests: Sequence[Request]) -> list[Likelihood]:
    """By the definition: the model's own logits of each row alone."""
    found = []
    for context, continuation in requests:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
        total, hits = 0.0, []
        for place, token in enumerate(continuation, len(context) - 1):
            total += float(logits[place].double().log_softmax(-1)[token])
            hits.append(int(logits[place].argmax()) == token)
        prefix = next((number for number, hit in enumerate(hits) if not hit), len(hits))
        found.append(Likelihood(total, len(continuation), all(hits), prefix))
    return found


def assert_equal(found: Sequence[Likelihood], expected: Sequence[Likelihood], tolerance: float = 1e-5) -> None:
    for got, want in zip(found, expected, strict=True):
        assert got.total == pytest.approx(want.total, abs=tolerance * max(1, want.tokens))
        assert (got.tokens, got.greedy, got.greedy_prefix) == (want.tokens, want.greedy, want.greedy_prefix)


def forward_of(model: Any, dtype: ComputeDType = "fp32") -> ModelForward:
    return ModelForward(model, "cpu", dtype)


def widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and padded length of what is read, as it comes."""
    sizes: list[tuple[int, int]] = []
    read = likelihood._read

    def note(forward: Any, rows: Any, *rest: Any) -> Any:
        sizes.append((len(rows), max(map(len, rows))))
        return read(forward, rows, *rest)

    monkeypatch.setattr(likelihood, "_read", note)
    return sizes


@pytest.fixture(scope="module")
def llama() -> Any:
    return family_model("llama")


# -- equal to plain forwards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_plain_forwards(family: str) -> None:
    model = family_model(family, **FAMILIES[family])
    expected = plainly(model, requests())
    assert len({round(row.total, 3) for row in expected}) == 11, (
        "likelihoods that differ, so that none can stand for another"
    )
    for batch_size in (1, 2, 5, 100):
        assert_equal(log_likelihoods(forward_of(model), requests(), batch_size), expected)


def test_nothing_in_common_and_nothing_at_all(llama: Any) -> None:
    asked: list[Request] = [([1], [2, 3]), ([4, 5, 6, 7], [8]), ([9, 9], [1, 1, 1, 1])]
    assert_equal(log_likelihoods(forward_of(llama), asked, 2), plainly(llama, asked))
    assert log_likelihoods(forward_of(llama), [], 2) == []
    assert log_likelihoods(forward_of(llama), [([1], [])], 2) == [Likelihood(0.0, 0, True, 0)]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=4), st.lists(st.integers(0, 2), min_size=0, max_size=4)
        ),
        max_size=8,
    ),
    st.integers(1, 5),
)
def test_any_requests(asked: list[Request], batch_size: int) -> None:
    model = family_model("qwen3")
    assert_equal(log_likelihoods(forward_of(model), asked, batch_size), plainly(model, asked))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_fused_engine(family: str) -> None:
    """Its layers read whole rows; with a cache the model's own run."""
    model = family_model(family, attn_implementation="eager")  # transformers' sdpa has no soft cap
    expected = plainly(model, requests())
    fuse(model)
    try:
        assert_equal(log_likelihoods(forward_of(model), requests(), 4), expected)
    finally:
        unfuse(model)


def test_the_adapter_is_on_unless_it_is_disabled() -> None:
    model = family_model("llama")
    base = plainly(model, requests())
    adapted = add_adapter(model, AdapterConfig(r=4), "base")
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    forward = forward_of(adapted)
    tuned = log_likelihoods(forward, requests(), 4)
    assert_equal(tuned, plainly(adapted, requests()))
    assert tuned[0].total != pytest.approx(base[0].total, abs=0.1)
    with adapted.disable_adapter():
        assert_equal(log_likelihoods(forward, requests(), 4), base)


def test_the_sum_over_the_vocabulary_is_one(llama: Any) -> None:
    asked: list[Request] = [(SHARED, [token]) for token in range(97)]
    found = log_likelihoods(forward_of(llama), asked, 8)
    assert sum(torch.tensor([row.total for row in found]).exp()) == pytest.approx(1.0, abs=1e-5)
    assert sum(row.greedy for row in found) == 1


def test_bf16_under_autocast_has_a_log_softmax_in_fp32(llama: Any) -> None:
    expected = plainly(llama, requests())
    found = log_likelihoods(forward_of(llama, "bf16"), requests(), 4)
    assert [row.total for row in found] == pytest.approx([row.total for row in expected], rel=0.05)
    probabilities = [
        row.total for row in log_likelihoods(forward_of(llama, "bf16"), [(SHARED, [t]) for t in range(97)], 8)
    ]
    # In bf16 a log-probability near -5 has steps of 0.03, and the sum would be off by a percent.
    assert sum(torch.tensor(probabilities).exp()) == pytest.approx(1.0, abs=1e-4)


def test_greedy_is_what_greedy_decoding_gives(tiny_model: Path) -> None:
    from tunesmith.config import ModelConfig
    from tunesmith.hardware import probe
    from tunesmith.models.load import find_model, load_model, load_tokenizer

    config = ModelConfig(name=str(tiny_model))
    source = find_model(config)
    model = load_model(source, config, probe("cpu"), "fp32")
    forward = forward_of(model)
    prompt = [72, 101, 108]
    (answer,) = generate_greedy(forward, load_tokenizer(source, config), [prompt], 12, 1)
    assert len(answer) == 12
    (whole,) = log_likelihoods(forward, [(prompt, answer)], 1)
    assert (whole.greedy, whole.greedy_prefix) == (True, 12)
    other = [*answer[:7], (answer[7] + 1) % 256, *answer[8:]]
    (broken,) = log_likelihoods(forward, [(prompt, other)], 1)
    assert (broken.greedy, broken.greedy_prefix) == (False, 7)


# -- no context -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"bos_token_id": 9, "eos_token_id": 8}, 9),
        ({"bos_token_id": None, "eos_token_id": 8}, 8),
        ({"bos_token_id": None, "eos_token_id": [6, 8]}, 6),
        ({"bos_token_id": 0, "eos_token_id": 8}, 0),
    ],
)
def test_an_empty_context_is_the_start_token(settings: dict[str, Any], start: int) -> None:
    model = family_model("llama", **settings)
    asked: list[Request] = [([], [11, 12, 13]), ([5], [2])]
    expected = plainly(model, [([start], [11, 12, 13]), ([5], [2])])
    assert_equal(log_likelihoods(forward_of(model), asked, 4), expected)


def test_an_empty_context_without_a_start_token_is_refused() -> None:
    model = family_model("llama", bos_token_id=None, eos_token_id=None)
    with pytest.raises(ModelError, match="has neither bos_token_id nor eos_token_id to put before it"):
        log_likelihoods(forward_of(model), [([], [1])], 1)


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SHARES)
def test_what_is_common_is_read_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = widths(monkeypatch)
    log_likelihoods(forward_of(family_model(family, **FAMILIES[family])), requests(), 100)
    # The prefix; the three contexts' rests; then the rows behind them. [11, 12, 13] and [11, 12, 66] read the same two
    # tokens, and one token is no row.
    assert sizes == [(1, 7), (3, 5), (4, 9)]


def test_letters_cost_one_row_a_question(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = [([*SHARED, question], [letter]) for question in range(8) for letter in (65, 66, 67, 68)]
    sizes = widths(monkeypatch)
    found = log_likelihoods(forward_of(llama), asked, 4)
    assert sizes == [(1, 7), (4, 1), (4, 1)]
    assert_equal(found, plainly(llama, asked))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "lfm2"])
def test_windows_and_recurrent_layers_read_whole_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = widths(monkeypatch)
    log_likelihoods(forward_of(family_model(family, **FAMILIES[family])), requests(), 100)
    assert sizes == [
        (6, 19)
    ]  # what differs without its last token: [30] is read with no row of its own but the context


def test_longest_first_and_progress(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = [([number] * (1 + number % 5), [1]) for number in range(10)]
    sizes = widths(monkeypatch)
    done: list[int] = []
    log_likelihoods(forward_of(llama), [*asked, ([3], [])], 4, done.append)
    assert sizes == [(4, 5), (4, 3), (2, 1)]
    assert done == [5, 9, 11], "the request without a continuation is done at once"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_few_logits_exist_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family)
    expected = plainly(model, requests())
    monkeypatch.setattr(likelihood, "HEAD_ROWS", 4)
    forward, sizes = forward_of(model), []
    logits = forward.logits
    monkeypatch.setattr(forward, "logits", lambda hidden: sizes.append(hidden.shape) or logits(hidden))
    assert_equal(log_likelihoods(forward, requests(), 100), expected)
    supervised = sum(len(continuation) for _, continuation in requests())
    assert sizes == [(4, 24)] * (supervised // 4) + [(supervised % 4, 24)] * (supervised % 4 > 0)


def test_texts_of_about_one_length_are_read_together(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole texts behind one start token: of 2 to 33 tokens, in no order."""
    asked: list[Request] = [([1], [2 + number * 7 % 5, *[3] * (number * 11 % 32)]) for number in range(32)]
    expected = plainly(llama, asked)
    sizes = widths(monkeypatch)
    assert_equal(log_likelihoods(forward_of(llama), asked, 8), expected)
    assert [size for size in sizes if size[1] > 1] == [(8, 31), (8, 23), (8, 15), (7, 7)]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(training: bool) -> None:
    model = family_model("llama").train(training)
    log_likelihoods(forward_of(model), requests(), 4)
    assert model.training is training


# -- out of memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "calls"),
    [
        *(("llama", calls) for calls in ({2}, {3}, {2, 3}, {2, 5})),  # the first reads the prefix
        *(("gemma2", calls) for calls in ({1}, {1, 2}, {1, 3})),
    ],
)
def test_batches_that_run_out_of_memory_give_the_same(
    family: str, calls: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(family)
    expected = plainly(model, requests())
    warnings: list[str] = []
    fail_at(monkeypatch, likelihood, "_read", calls)
    assert_equal(log_likelihoods(forward_of(model), requests(), 100, halving=Halving(warnings.append)), expected)
    assert len(warnings) == len(calls)
    assert warnings[0] == (
        f"scoring 11 texts at once ran out of memory and is done again; from now on half as many: {REASON}"
    )


@pytest.mark.parametrize("call", [1, 2])
def test_a_text_that_does_not_fit_alone(llama: Any, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, likelihood, "_read", range(call, 100))
    with pytest.raises(MachineError) as caught:
        log_likelihoods(forward_of(llama), requests(), 3)
    assert str(caught.value) == (
        f"one text of 20 tokens, whose last 10 are scored, ran out of memory: {REASON}; shorten it or leave it out"
    )
