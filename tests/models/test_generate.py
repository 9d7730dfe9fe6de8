"""Batched greedy generation against transformers' own, one prompt at a time, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from answering import QUESTIONS, SHARED, Subject
from hypothesis import given
from hypothesis import strategies as st

from out_of_memory import ALWAYS, REASON, fail_at
from tiny import make_tiny_model
from tunesmith.config import AdapterConfig
from tunesmith.errors import MachineError
from tunesmith.models import generate
from tunesmith.models.adapters import add_adapter
from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import end_tokens, shared_prefix
from tunesmith.out_of_memory import Halving

WINDOW = 8
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": WINDOW},  # every other layer slides
    "mistral": {"sliding_window": WINDOW},
    "cohere": {"logit_scale": 0.25},
}


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("families")
    # Large weights and an untied head: answers that wander, so that a wrong position or mask changes them.
    varied = {"layers": 3, "initializer_range": 0.3, "tie_word_embeddings": False}
    return {
        name: Subject(make_tiny_model(root / name, family=name, **varied, **settings))
        for name, settings in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def subject(subjects: dict[str, Subject]) -> Subject:
    return subjects["llama"]


# -- equal to transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(subjects: dict[str, Subject], family: str, shared: bool) -> None:
    subject = subjects[family]
    prompts = subject.encode(*(SHARED + question if shared else question for question in QUESTIONS))
    assert all(len(prompt) > WINDOW for prompt in prompts) or not shared
    expected = subject.theirs(prompts)
    assert sum(len(set(answer)) for answer in expected) > 40
    for batch_size in (1, 3, len(prompts), 100):
        assert subject.ours(prompts, batch_size=batch_size) == expected, batch_size


@pytest.mark.parametrize("count", [0, 1])
def test_one_prompt_and_none(subject: Subject, count: int) -> None:
    prompts = subject.encode(*QUESTIONS[:count])
    assert subject.ours(prompts) == subject.theirs(prompts)


def test_equal_prompts_and_prompts_that_begin_another(subject: Subject) -> None:
    prompts = subject.encode("Which bin", "Which bin", "Which bin takes the can?", "Wh")
    for batch_size in (1, 2, 4):
        assert subject.ours(prompts, batch_size=batch_size) == subject.theirs(prompts)


def test_one_token(subject: Subject) -> None:
    prompts = subject.encode(*QUESTIONS)
    answers = subject.ours(prompts, new=1, batch_size=2)
    assert answers == subject.theirs(prompts, new=1)
    assert [len(answer) for answer in answers] == [1] * len(prompts)


def test_rows_that_end_early_leave_their_batch(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = subject.encode(*(SHARED + question for question in QUESTIONS))
    long = subject.theirs(prompts)
    # One answer ends at once, one after a few tokens, one never.
    ends = [long[0][0], next(token for token in long[1][3:] if token not in long[2] and token != long[0][0])]
    assert not set(ends) & set(long[2])
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", ends)
    expected = subject.theirs(prompts)
    assert {len(answer) for answer in expected} >= {0, 24}
    assert len({len(answer) for answer in expected}) >= 3
    widths: list[int] = []
    read = generate._read
    monkeypatch.setattr(
        generate, "_read", lambda forward, ids, *rest: widths.append(len(ids)) or read(forward, ids, *rest)
    )
    for batch_size in (1, 2, len(prompts)):
        widths.clear()
        assert subject.ours(prompts, batch_size=batch_size) == expected
    assert widths[1:] == sorted(widths[1:], reverse=True)  # the first read is the shared prefix
    assert widths[-1] < widths[1]


def test_the_end_token_is_not_part_of_an_answer(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = subject.encode("can?")
    first = subject.ours(prompts)[0][0]
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", first)
    assert subject.ours(prompts) == [[]]


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [257]), (257, [257]), (5, [5, 257]), ([9, 5], [5, 9, 257])]
)
def test_end_tokens_are_the_tokenizers_and_the_models(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, configured: Any, expected: list[int]
) -> None:
    assert subject.tokenizer.eos_token_id == 257
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", configured)
    assert end_tokens(subject.model, subject.tokenizer) == expected


def test_the_adapter_is_on_unless_it_is_disabled(tiny_model: Path) -> None:
    subject = Subject(tiny_model)
    prompts = subject.encode(*QUESTIONS)
    base = subject.ours(prompts)
    adapted = add_adapter(subject.model, AdapterConfig(r=4), "base")
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    subject.model = adapted
    subject.forward = ModelForward(adapted, "cpu", "fp32")
    assert subject.ours(prompts) == subject.theirs(prompts)
    assert subject.ours(prompts) != base
    with adapted.disable_adapter():
        assert subject.ours(prompts) == base


def test_bf16_runs_under_autocast_as_training_does(tiny_model: Path) -> None:
    subject = Subject(tiny_model, "bf16")
    prompts = subject.encode(*QUESTIONS)
    alone = [subject.ours([prompt])[0] for prompt in prompts]
    assert subject.ours(prompts, batch_size=1) == alone
    assert sum(answer[0] == expected[0] for answer, expected in zip(subject.ours(prompts), alone, strict=True)) >= 4


# -- how ------------------------------------------------------------------------------------------------------------


def test_a_shared_prefix_is_read_once(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = subject.encode(*(SHARED + question for question in QUESTIONS))
    sizes: list[tuple[int, int]] = []
    read = generate._read
    monkeypatch.setattr(
        generate, "_read", lambda forward, ids, *rest: sizes.append(tuple(ids.shape)) or read(forward, ids, *rest)
    )
    subject.ours(prompts, new=1, batch_size=2)
    prefix = len(SHARED)  # bytes are tokens, and the questions differ from their first letter or later
    assert sizes[0] == (1, prefix)
    longest_first = sorted((len(prompt) - prefix for prompt in prompts), reverse=True)
    assert sizes[1:] == [(2, longest_first[0]), (2, longest_first[2]), (1, longest_first[4])]


def test_a_sliding_window_shares_no_prefix(subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    read = generate._read
    monkeypatch.setattr(
        generate, "_read", lambda forward, ids, *rest: sizes.append(tuple(ids.shape)) or read(forward, ids, *rest)
    )
    for family in ("mistral", "gemma2"):
        sizes.clear()
        subject = subjects[family]
        prompts = subject.encode(*(SHARED + question for question in QUESTIONS))
        subject.ours(prompts, new=1)
        assert sizes == [(len(prompts), max(map(len, prompts)))]


def test_progress_counts_prompts(subject: Subject) -> None:
    done: list[int] = []
    subject.ours(subject.encode(*QUESTIONS), new=2, batch_size=2, on_progress=done.append)
    assert done == [2, 4, 5]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(subject: Subject, training: bool) -> None:
    subject.model.train(training)
    try:
        subject.ours(subject.encode("can?"), new=2)
        assert subject.model.training is training
    finally:
        subject.model.eval()


# -- out of memory ----------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[Any, str, list[set[int]]]] = {
    "reading": (generate, "_read", [{2}, {3}, {2, 3}, {9}, {2, 7}]),
    "copying the prefix": (generate.copy, "deepcopy", [{1}, {2}, {1, 2}]),
    "logits": (ModelForward, "logits", [{1}, {2}, {1, 2}, {9}, {2, 7}]),
}
"""What fails, and at which of its calls: all where a batch has several prompts."""


@pytest.mark.parametrize(
    ("place", "calls"), [(place, calls) for place, (_, _, cases) in PLACES.items() for calls in cases]
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_batches_that_run_out_of_memory_give_the_same_answers(
    subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch, family: str, place: str, calls: set[int]
) -> None:
    subject = subjects[family]
    prompts = subject.encode(*(SHARED + question for question in QUESTIONS))
    expected = subject.theirs(prompts, new=6)
    warnings: list[str] = []
    fail_at(monkeypatch, *PLACES[place][:2], calls)
    assert subject.ours(prompts, new=6, batch_size=3, halving=Halving(warnings.append)) == expected
    assert len(warnings) == len(calls)


def sizes_read(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[tuple[int, int]]:
    """The shapes that are read, as they come; those of more than `limit` rows run out of memory."""
    shapes: list[tuple[int, int]] = []
    read = generate._read

    def only(forward: Any, ids: torch.Tensor, *rest: Any) -> Any:
        shapes.append((ids.shape[0], ids.shape[1]))
        if len(ids) > limit:
            raise torch.OutOfMemoryError(REASON)
        return read(forward, ids, *rest)

    monkeypatch.setattr(generate, "_read", only)
    return shapes


def test_what_follows_begins_with_the_batch_that_fitted(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = subject.encode(*(SHARED + question for question in QUESTIONS))
    expected = subject.theirs(prompts, new=1)
    shapes = sizes_read(monkeypatch, limit=1)
    warnings: list[str] = []
    done: list[int] = []
    halving = Halving(warnings.append)
    assert subject.ours(prompts, new=1, batch_size=4, on_progress=done.append, halving=halving) == expected
    assert [rows for rows, _ in shapes] == [1, 4, 2, 1, 1, 1, 1, 1]
    assert [width for _, width in shapes].count(len(SHARED)) == 1, "the shared prefix is read once all the same"
    assert done == [1, 2, 3, 4, 5]
    assert warnings == [
        f"answering {count} prompts at once ran out of memory and is done again; from now on half as many: {REASON}"
        for count in (4, 2)
    ]
    shapes.clear()
    assert subject.ours(prompts, new=1, batch_size=4, halving=halving) == expected
    assert [rows for rows, _ in shapes] == [1, 1, 1, 1, 1, 1]
    assert len(warnings) == 2


@pytest.mark.parametrize("shared", [True, False])
def test_a_prompt_that_does_not_fit_alone(subject: Subject, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Nor does the prefix that all prompts share: it is read first."""
    prompts = subject.encode(*(SHARED + question if shared else question for question in QUESTIONS))
    shapes = sizes_read(monkeypatch, limit=0)
    subject.model.train()
    try:
        with pytest.raises(MachineError) as caught:
            subject.ours(prompts, batch_size=2)
        assert subject.model.training
    finally:
        subject.model.eval()
    longest = max(map(len, prompts))
    assert str(caught.value) == (
        f"one prompt of {longest} tokens with up to 24 new ones ran out of memory: {REASON}; shorten the prompt, leave it out, "
        "or lower evaluation.max_new_tokens; in training, evaluation.generate: false leaves the answers to `tunesmith eval`, "
        "where no optimizer needs memory"
    )
    assert caught.value.exit_code == 3
    assert [rows for rows, _ in shapes] == ([1] if shared else [2, 1])


def test_answers_that_outgrow_memory(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt fits, its answer does not: the first of the others is named, as they are done longest first."""
    prompts = subject.encode(*QUESTIONS)
    fail_at(monkeypatch, subject.forward, "logits", ALWAYS[4:])
    with pytest.raises(MachineError, match=f"^one prompt of {max(map(len, prompts))} tokens with up to 24 new ones"):
        subject.ours(prompts, batch_size=1)


@pytest.mark.parametrize("call", [1, 3])
def test_other_errors_are_not_caught(subject: Subject, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    prompts = subject.encode(*(SHARED + question for question in QUESTIONS))
    error = RuntimeError("CUDA error: an illegal memory access")
    seen = fail_at(monkeypatch, generate, "_read", {call}, error)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        subject.ours(prompts)
    assert seen == list(range(1, call + 1))


# -- the shared prefix ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([], 0),
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # each keeps a token of its own
        ([[1, 2], [1, 2, 3]], 1),
        ([[1], [1, 2]], 0),
        ([[5, 2], [1, 2]], 0),
        ([[9, 9, 1], [9, 9, 2, 4], [9, 3, 1]], 1),
    ],
)
def test_shared_prefix(prompts: list[list[int]], expected: int) -> None:
    assert shared_prefix(prompts) == expected


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=5))
def test_the_shared_prefix_is_the_longest(prompts: list[list[int]]) -> None:
    length = shared_prefix(prompts)
    shortest = min(map(len, prompts))
    assert 0 <= length < shortest
    assert len({tuple(prompt[:length]) for prompt in prompts}) == 1
    assert length == shortest - 1 or len({prompt[length] for prompt in prompts}) > 1
