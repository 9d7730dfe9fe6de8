"""Decoding in fixed places: equal to transformers' own, whatever the batches, lengths and graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from answering import QUESTIONS, SHARED, Subject
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from out_of_memory import REASON, fail_at
from tiny import make_tiny_model
from tunesmith.config import AdapterConfig
from tunesmith.errors import MachineError
from tunesmith.models import decode_graphs, generate
from tunesmith.models.adapters import add_adapter
from tunesmith.models.decode_graphs import StaticDecoder, one_query_sdpa, rounded_up, why_not_static
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import fuse
from tunesmith.models.generate import batch_size_for, cache_bytes_per_token
from tunesmith.out_of_memory import Halving

VARIED = {"layers": 3, "initializer_range": 0.3, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "cohere": {"logit_scale": 0.25},
    "qwen3": {},
    "phi3": {},
    "granite": {},
    "smollm3": {},  # layers without rotation among others
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 256},  # learned positions, no grouped keys
    "mixtral": {},  # experts
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("families")
    return {
        name: Subject(make_tiny_model(root / name, family=name, **VARIED, **settings))
        for name, settings in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def subject(subjects: dict[str, Subject]) -> Subject:
    return subjects["llama"]


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[StaticDecoder]:
    """The decoders that are made."""
    made: list[StaticDecoder] = []

    class Noted(StaticDecoder):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(decode_graphs, "StaticDecoder", Noted)
    return made


def questions(subject: Subject, shared: bool = True) -> list[list[int]]:
    return subject.encode(*(SHARED + question if shared else question for question in QUESTIONS))


def unequal_ends(subject: Subject, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]) -> list[list[int]]:
    """Make one answer end at once, one after some tokens, one never; returns what is expected then."""
    long = subject.theirs(prompts)
    ends = [long[0][0], next(token for token in long[1][3:] if token not in long[2] and token != long[0][0])]
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", ends)
    expected = subject.theirs(prompts)
    assert {len(answer) for answer in expected} >= {0, 24}
    assert len({len(answer) for answer in expected}) >= 3
    return expected


# -- equal to transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(subjects: dict[str, Subject], family: str, shared: bool) -> None:
    subject = subjects[family]
    prompts = questions(subject, shared)
    expected = subject.theirs(prompts)
    assert sum(len(set(answer)) for answer in expected) > 40
    for batch_size in (1, 3, len(prompts), 100):
        assert subject.ours(prompts, batch_size=batch_size, decoding="static") == expected, batch_size


@pytest.mark.parametrize("new", [1, 2, 24])
def test_answers_that_end_at_different_tokens(subject: Subject, monkeypatch: pytest.MonkeyPatch, new: int) -> None:
    prompts = questions(subject)
    unequal_ends(subject, monkeypatch, prompts)
    expected = subject.theirs(prompts, new)
    for batch_size in (1, 2, len(prompts)):
        assert subject.ours(prompts, new, batch_size, decoding="static") == expected


def test_a_batch_stops_when_all_have_ended(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, decoders: list[StaticDecoder]
) -> None:
    """The count is known a step late, so one step is for nothing."""
    prompts = subject.encode("can?")
    long = subject.theirs(prompts, 200)[0]
    place = next(place for place in range(3, 200) if long[place] not in long[:place])
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", long[place])
    assert subject.ours(prompts, 200, decoding="static") == [long[:place]]
    assert decoders[0].launched == place + 1


def test_columns_that_are_read_grow_with_the_answers(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "rounded_up", lambda length: -(-length // 8) * 8)
    monkeypatch.setattr(decode_graphs, "AHEAD", 2)
    lengths: list[int] = []
    step = StaticDecoder._step
    monkeypatch.setattr(
        StaticDecoder, "_step", lambda self, rows, length: lengths.append(length) or step(self, rows, length)
    )
    prompts = questions(subject)
    assert subject.ours(prompts, batch_size=5, decoding="static") == subject.theirs(prompts)
    assert len(set(lengths)) > 2
    assert lengths == sorted(lengths)
    used = max(map(len, prompts)) + 24 - 1
    assert used <= lengths[-1] < used + 8 + 8


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 64), (64, 64), (65, 128), (129, 192), (256, 256), (257, 384), (513, 768), (1000, 1024), (1025, 1536)],
)
def test_columns_come_in_few_lengths(length: int, expected: int) -> None:
    assert rounded_up(length) == expected


@pytest.mark.parametrize("tokens", [1, 60, 120])
def test_prompts_are_read_in_parts(subject: Subject, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Each part has a padding of its own."""
    monkeypatch.setattr(decode_graphs, "READ_TOKENS", tokens)
    shapes: list[tuple[int, int]] = []
    read = generate._read
    monkeypatch.setattr(
        generate, "_read", lambda forward, ids, *rest: shapes.append(tuple(ids.shape)) or read(forward, ids, *rest)
    )
    for shared in (True, False):
        prompts = questions(subject, shared)
        shapes.clear()
        assert subject.ours(prompts, batch_size=5, decoding="static") == subject.theirs(prompts)
        parts = shapes[1:] if shared else shapes  # the prefix is read alone
        assert sum(rows for rows, _ in parts) == len(prompts)
        whole = len(SHARED) if shared else 0
        assert all(rows == 1 or rows * (whole + width) <= tokens for rows, width in parts)
        assert len(parts) > 1


def test_batches_have_one_number_of_rows(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven prompts in batches of at most four: four and three, the three with a row that is not looked at."""
    rows: list[int] = []
    step = StaticDecoder._step
    monkeypatch.setattr(
        StaticDecoder, "_step", lambda self, count, length: rows.append(count) or step(self, count, length)
    )
    prompts = [*questions(subject), *questions(subject, shared=False)[:2]]
    assert subject.ours(prompts, batch_size=6, decoding="static") == subject.theirs(prompts)
    assert set(rows) == {4}


def test_a_few_that_go_on_are_asked_again_together(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, decoders: list[StaticDecoder]
) -> None:
    monkeypatch.setattr(decode_graphs, "ASIDE_AFTER", 4)
    monkeypatch.setattr(decode_graphs, "ASIDE_SHARE", 2)
    prompts = questions(subject)
    expected = unequal_ends(subject, monkeypatch, prompts)
    given: list[tuple[list[int], bool]] = []
    own = StaticDecoder.generate

    def spy(self: StaticDecoder, rests: Any, shared: int, budgets: Any, *rest: Any) -> Any:
        found = own(self, rests, shared, budgets, *rest)
        given.append((list(budgets), any(not answer.ended for answer in found)))
        return found

    monkeypatch.setattr(decode_graphs.StaticDecoder, "generate", spy)
    done: list[int] = []
    said: dict[int, list[int]] = {}

    def keep(places: Any, answers: Any) -> None:
        assert not set(places) & said.keys()
        said.update(zip(places, answers, strict=True))

    options = {"on_progress": done.append, "on_answers": keep}
    assert subject.ours(prompts, batch_size=2, decoding="static", **options) == expected
    assert [said[place] for place in range(len(prompts))] == expected, "each when it is whole"
    assert [budgets for budgets, _ in given[:3]] == [[24, 24], [24, 24], [24]]
    assert any(aside for _, aside in given[:3])
    assert len(given) > 3
    assert all(budget < 24 - 4 for budgets, _ in given[3:] for budget in budgets), "what was said is kept"
    assert done == sorted(done)
    assert done[-1] == len(prompts)


def test_what_a_batch_left_behind_is_not_seen(subjects: dict[str, Subject]) -> None:
    """Not-a-numbers would spoil even columns that are masked; a row without a prompt has a position, too."""
    subject = subjects["gpt2"]
    prompts = questions(subject, shared=False)
    expected = subject.theirs(prompts)
    decoder = StaticDecoder(subject.forward, [257], lambda text: None, graphs=False)

    def answers(count: int) -> list[list[int]]:
        found = decoder.generate(
            prompts[:count], 0, [24] * count, lambda part: generate._read_prompts(subject.forward, part, 0, None)[:2]
        )
        return [answer.tokens for answer in found]

    with torch.inference_mode():
        assert answers(5) == expected
        places = decoder.places
        for keys, values in places.layers:
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
        places.positions.fill_(10**6)
        assert answers(4) == expected[:4]
        assert decoder.places is places
        assert decoder._ran == {(5, 128)}


def test_progress_counts_answers_as_they_end(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = questions(subject)
    unequal_ends(subject, monkeypatch, prompts)
    done: list[int] = []
    subject.ours(prompts, batch_size=5, on_progress=done.append, decoding="static")
    assert done == sorted(done)
    assert done[0] == 1, "the one that ends at once"
    assert done[-1] == 5


def test_the_adapter_is_on_unless_it_is_disabled(tiny_model: Path) -> None:
    subject = Subject(tiny_model)
    prompts = questions(subject)
    base = subject.theirs(prompts)
    adapted = add_adapter(subject.model, AdapterConfig(r=4), "base")
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    subject.model, subject.forward = adapted, ModelForward(adapted, "cpu", "fp32")
    expected = subject.theirs(prompts)
    assert expected != base
    fuse(adapted, report=lambda text: None)
    for fused in (True, False):
        assert subject.ours(prompts, decoding="static") == expected, fused
        with adapted.disable_adapter():
            assert subject.ours(prompts, decoding="static") == base, fused


def test_in_16_bits_keys_are_kept_as_attention_takes_them(tiny_model: Path, decoders: list[StaticDecoder]) -> None:
    """Weights in fp32 under autocast, as in full fine-tuning, make keys in fp32."""
    subject = Subject(tiny_model)
    subject.forward = ModelForward(subject.model, "cpu", "bf16")
    prompts = questions(subject)
    kinds: set[torch.dtype] = set()
    own = StaticDecoder._step

    def spy(self: StaticDecoder, rows: int, length: int) -> None:
        kinds.update(room.dtype for layer in self.places.layers for room in layer)
        own(self, rows, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StaticDecoder, "_step", spy)
        found = subject.ours(prompts, 8, decoding="static")
    assert kinds == {torch.bfloat16}
    growing = subject.ours(prompts, 8, decoding="growing")
    assert sum(one[:2] == other[:2] for one, other in zip(found, growing, strict=True)) >= 4


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_one_query_attends_as_transformers_does(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    rows, heads, columns = 3, 6, 40

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = random(rows, heads, 1, 8), random(rows, groups, columns, 8), random(rows, groups, columns, 4)
    mask = torch.zeros(rows, 1, 1, columns, dtype=torch.float64)
    mask[0, ..., :7] = mask[1, ..., 30:] = mask[2, ..., ::3] = -torch.inf
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, weights = one_query_sdpa(module, query, key, value, mask, dropout=0.0, scaling=0.3)
    assert weights is None
    assert found.shape == (rows, 1, heads, 4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_keys_are_not_repeated_for_the_heads_that_share_them(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.sdpa_attention as module

    columns: list[int] = []
    own = module.repeat_kv
    monkeypatch.setattr(module, "repeat_kv", lambda keys, n: columns.append(keys.shape[2]) or own(keys, n))
    prompts = questions(subject, shared=False)
    expected = subject.theirs(prompts)
    columns.clear()
    assert subject.ours(prompts, batch_size=5, decoding="static") == expected
    assert set(columns) == {max(map(len, prompts))}, "only where the prompts were read"


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_attention_is_left_as_it_was(subject: Subject, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    seen: list[str] = []
    config = subject.forward.decoder.config
    own = StaticDecoder._step

    def step(self: StaticDecoder, rows: int, length: int) -> None:
        seen.append(config._attn_implementation)
        own(self, rows, length)
        if fails:
            raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(StaticDecoder, "_step", step)
    if fails:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            subject.ours(questions(subject), decoding="static")
    else:
        subject.ours(questions(subject), decoding="static")
    assert set(seen) == {decode_graphs.ONE_QUERY}
    assert config._attn_implementation == "sdpa"


# -- where there are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("mistral", {"sliding_window": 8}, "has layers that keep something else than all keys and values"),
        ("gemma2", {"sliding_window": 8}, "has layers that keep something else than all keys and values"),
        ("bloom", {}, "takes positions from the padding"),
        ("mpt", {}, "does not say of MptForCausalLM that it runs with a static cache"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            r"its rotations \(dynamic\) depend on the longest position",
        ),
    ],
)
def test_which_models_cannot(tmp_path: Path, family: str, settings: dict[str, Any], expected: str) -> None:
    subject = Subject(make_tiny_model(tmp_path, family=family, **settings))
    reason = why_not_static(subject.forward)
    with pytest.raises(ValueError, match=f"^decoding='static', but .*{expected}.*; use 'auto' or 'growing'$"):
        subject.ours(questions(subject), decoding="static")
    assert reason is not None
    subject.forward.device = "cuda:0"
    assert generate._static_decoder(subject.forward, [257], "auto", lambda text: None) is None


def test_other_attention_cannot(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_static(subject.forward) is None
    monkeypatch.setattr(subject.forward.decoder.config, "_attn_implementation", "flash_attention_2")
    assert why_not_static(subject.forward) == "attention flash_attention_2 takes no mask by columns"


def test_the_cpu_decodes_with_a_growing_cache(subject: Subject, decoders: list[StaticDecoder]) -> None:
    prompts = questions(subject)
    assert subject.ours(prompts) == subject.ours(prompts, decoding="static")
    assert len(decoders) == 1


class Card:
    """What PyTorch says of a GPU's memory, in bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float, free: float, reserved: float, share: float = 1.0):
        answers = {
            "mem_get_info": (int(free), int(total)),
            "memory_reserved": int(reserved),
            "memory_allocated": int(reserved / 2),
            "get_per_process_memory_fraction": share,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)


@pytest.mark.parametrize("in_parts", [True, False])
def test_a_batch_takes_half_of_the_free_memory(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, in_parts: bool
) -> None:
    """Two tokens of the cache: 3 layers x keys and values x 2 groups x 8 x 4 bytes; logits of 320 in 2 and 4 bytes."""
    forward = ModelForward(subject.model, "cuda:0", "fp32")
    assert cache_bytes_per_token(subject.model.config) == 3 * 2 * 2 * 8 * 2
    row = 2 * 192 * (2 * 100 + 28) + 6 * 320
    token = 2 * 2 * (16 * 32 + 6 * 64)

    def found(**card: float) -> int:
        Card(monkeypatch, **card)
        return batch_size_for(forward, "auto", 100, 28, in_parts)

    for batch in (1, 2, 64, 512):
        read = 32_768 * token if in_parts else batch * 100 * token  # at once
        exact = 2 * (read + batch * row)
        assert found(total=1e12, free=exact, reserved=0) == batch
        assert found(total=1e12, free=exact - 9, reserved=0) == max(1, batch // 2)
        assert found(total=1e12, free=exact - 5e6, reserved=1e7) == batch, "half of what PyTorch holds is free, too"
        assert found(total=4 * exact, free=1e12, reserved=0, share=0.25) == batch, "the run's cap"
    assert found(total=1e12, free=1e12, reserved=0) == 1024
    assert found(total=1e12, free=0, reserved=0) == 1
    assert batch_size_for(forward, 7, 100) == 7
    forward.device = "cpu"
    assert batch_size_for(forward, "auto", 100) == 16


# -- with a stand-in for CUDA's graphs --------------------------------------------------------------------------------


class StandIn:
    """A graph that takes the captured step again."""

    captured: StandIn | None = None
    captures = 0  # that went well
    fails: BaseException | None = None
    fails_at: range = range(0)

    def replay(self) -> None:
        StandIn.step(self.decoder, *self.shape)  # type: ignore[attr-defined]

    def pool(self) -> str:
        return "pool"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    StandIn.step = own = StaticDecoder._step  # type: ignore[attr-defined]

    @contextmanager
    def capture(graph: StandIn, pool: Any, stream: Any) -> Iterator[None]:
        StandIn.captures += 1
        if StandIn.captures in StandIn.fails_at and StandIn.fails is not None:
            raise StandIn.fails
        StandIn.captured = graph
        yield
        StandIn.captured = None

    def step(self: StaticDecoder, rows: int, length: int) -> None:
        if StandIn.captured is None:
            own(self, rows, length)
            return
        StandIn.captured.decoder, StandIn.captured.shape = self, (rows, length)  # type: ignore[attr-defined]

    monkeypatch.setattr(StaticDecoder, "_step", step)
    for name, value in {"CUDAGraph": StandIn, "graph": capture, "Stream": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    yield StandIn
    StandIn.captured, StandIn.captures, StandIn.fails, StandIn.fails_at = None, 0, None, range(0)


def test_the_first_step_is_launched_the_second_captured_the_others_replayed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn], decoders: list[StaticDecoder]
) -> None:
    monkeypatch.setattr(decode_graphs, "rounded_up", lambda length: -(-length // 256) * 256)
    prompts = [*questions(subject), *questions(subject, shared=False)[:2]]
    assert subject.ours(prompts, batch_size=4, decoding="graphs") == subject.theirs(prompts)
    (decoder,) = decoders
    assert decoder.launched == decoder.captured == 1, "both batches are of one shape"
    assert decoder.replayed == 2 * 23 - 1
    assert (decoder._graphs, decoder._places, decoder._pool) == ({}, None, None), "nothing outlives the call"


@pytest.mark.parametrize(("new", "captures"), [(5, 0), (6, 1)])
def test_a_few_steps_are_worth_no_graph(
    subject: Subject, stand_in: type[StandIn], decoders: list[StaticDecoder], new: int, captures: int
) -> None:
    prompts = questions(subject)
    assert subject.ours(prompts, new, decoding="graphs") == subject.theirs(prompts, new)
    assert decoders[0].captured == captures


def test_what_cannot_be_captured_goes_launch_by_launch(
    subject: Subject, stand_in: type[StandIn], decoders: list[StaticDecoder]
) -> None:
    stand_in.fails = RuntimeError("operation not permitted when stream is capturing\nmore")
    stand_in.fails_at = range(1, 100)
    prompts = questions(subject)
    warnings: list[str] = []
    halving = Halving(warnings.append)
    assert subject.ours(prompts, batch_size=2, halving=halving, decoding="graphs") == subject.theirs(prompts)
    assert warnings == [
        "no CUDA graph, answers are generated launch by launch: operation not permitted when stream is capturing"
    ]
    assert StandIn.captures == 1, "it is tried once"
    assert decoders[0].replayed == 0
    assert halving.times == 0


def test_a_capture_that_runs_out_of_memory_halves_the_batch(
    subject: Subject, stand_in: type[StandIn], decoders: list[StaticDecoder]
) -> None:
    """CUDA reports the end of the capture then, after what ran out."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError(REASON)
    stand_in.fails, stand_in.fails_at = error, range(1, 2)
    prompts = questions(subject)
    warnings: list[str] = []
    assert subject.ours(prompts, batch_size=5, halving=Halving(warnings.append), decoding="graphs") == subject.theirs(
        prompts
    )
    assert warnings == [
        "answering 5 prompts at once ran out of memory and is done again; from now on half as many: "
        "CUDA error: operation failed due to a previous error during capture"
    ]
    assert StandIn.captures > 1
    assert decoders[0].replayed > 20


PLACES: dict[str, tuple[Any, str, list[set[int]]]] = {
    "reading": (generate, "_read", [{2}, {3}, {2, 3}]),
    "making room": (decode_graphs, "_Places", [{1}, {1, 2}]),
    "stepping": (StaticDecoder, "_step", [{1}, {2}, {9}, {1, 2}]),
    "logits": (ModelForward, "logits", [{1}, {2}, {2, 7}]),
}


@pytest.mark.parametrize(
    ("place", "calls"), [(place, calls) for place, (_, _, cases) in PLACES.items() for calls in cases]
)
def test_batches_that_run_out_of_memory_give_the_same_answers(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, place: str, calls: set[int]
) -> None:
    prompts = questions(subject)
    expected = subject.theirs(prompts, new=6)
    warnings: list[str] = []
    fail_at(monkeypatch, *PLACES[place][:2], calls)
    found = subject.ours(prompts, new=6, batch_size=3, halving=Halving(warnings.append), decoding="static")
    assert found == expected
    assert len(warnings) == len(calls)


def test_memory_is_let_go_of_before_a_smaller_batch_is_tried(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, decoders: list[StaticDecoder]
) -> None:
    fail_at(monkeypatch, StaticDecoder, "_step", {2})
    held: list[Any] = []
    halving = Halving(lambda text: held.append(decoders[0]._places))
    subject.ours(questions(subject), new=6, batch_size=3, halving=halving, decoding="static")
    assert held == [None]


def test_a_prompt_that_does_not_fit_alone(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = questions(subject)
    fail_at(monkeypatch, StaticDecoder, "_step", range(1, 1000))
    with pytest.raises(MachineError, match=f"^one prompt of {max(map(len, prompts))} tokens with up to 24 new ones"):
        subject.ours(prompts, batch_size=2, decoding="static")


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def on_gpu(folder: Path, dtype: Any = "fp32") -> Subject:
    subject = Subject(folder, dtype)
    subject.model.to("cuda")
    subject.forward = ModelForward(subject.model, "cuda:0", dtype)
    return subject


@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_answer_as_the_cpu_does(
    subjects: dict[str, Subject], tmp_path: Path, family: str, decoders: list[StaticDecoder]
) -> None:
    """fp32, token for token; experts that are counted on the CPU may go launch by launch, which is said."""
    cpu = subjects[family]
    gpu = on_gpu(make_tiny_model(tmp_path, family=family, **VARIED, **FAMILIES[family]))
    warnings: list[str] = []
    for shared in (True, False):
        prompts = questions(cpu, shared)
        expected = cpu.theirs(prompts)
        for batch_size in (1, 3, 100):
            found = gpu.ours(prompts, batch_size=batch_size, halving=Halving(warnings.append))
            assert found == expected, (shared, batch_size)
    assert all(decoder.captured or warnings for decoder in decoders)
    if family != "mixtral":
        assert warnings == []
        assert all(decoder.replayed > decoder.launched for decoder in decoders)


@needs_gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("fused", [True, False])
def test_graphs_see_the_weights_of_their_call(
    tmp_path: Path, dtype: Any, fused: bool, decoders: list[StaticDecoder]
) -> None:
    """An adapter that changes between calls, in place and in new tensors, on and off, as in training; equal to no graph."""
    gpu = on_gpu(make_tiny_model(tmp_path, **VARIED), dtype)
    adapted = add_adapter(gpu.model, AdapterConfig(r=4), "base")
    gpu.model, gpu.forward = adapted, ModelForward(adapted, "cuda:0", dtype)
    if fused:
        fuse(adapted, report=lambda text: None)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    prompts = questions(gpu)
    generator = torch.Generator().manual_seed(5)
    seen = []
    for change in range(4):
        for parameter in trainable:
            value = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter)
            if change % 2:
                parameter.data = value
            else:
                parameter.data.copy_(value)
        adapted.train()
        found = gpu.ours(prompts, 40)
        assert adapted.training
        assert found == gpu.ours(prompts, 40, decoding="static"), change
        seen.append(found)
        with adapted.disable_adapter():
            base = gpu.ours(prompts, 40)
            assert base == gpu.ours(prompts, 40, decoding="static"), change
            seen.append(base)
    assert [seen[1]] * 4 == seen[1::2]
    assert len({str(answers) for answers in seen}) == 5
    assert all(decoder.replayed > 30 for decoder in decoders if decoder.captures)


@needs_gpu
def test_nothing_of_the_graphs_keeps_memory(tmp_path: Path) -> None:
    gpu = on_gpu(make_tiny_model(tmp_path, **VARIED))
    prompts = questions(gpu)
    gpu.ours(prompts)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    gpu.ours(prompts * 50, 100)
    assert torch.cuda.memory_allocated() <= before[1]
    assert torch.cuda.memory_reserved() <= before[0]


@needs_gpu
def test_a_step_that_looks_at_the_gpu_goes_launch_by_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoders: list[StaticDecoder]
) -> None:
    gpu = on_gpu(make_tiny_model(tmp_path, **VARIED))
    prompts = questions(gpu)
    expected = gpu.ours(prompts)
    own = ModelForward.logits

    def looks(self: ModelForward, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.sum().item() < 1e9
        return own(self, hidden)

    monkeypatch.setattr(ModelForward, "logits", looks)
    warnings: list[str] = []
    assert gpu.ours(prompts, halving=Halving(warnings.append)) == expected
    assert len(warnings) == 1
    assert warnings[0].startswith("no CUDA graph, answers are generated launch by launch: ")
    assert decoders[-1].replayed == 0
    monkeypatch.undo()
    assert gpu.ours(prompts) == expected, "a failed capture leaves nothing behind"


@needs_gpu
def test_memory_that_runs_out_in_a_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = on_gpu(make_tiny_model(tmp_path, **VARIED))
    prompts = questions(gpu)
    expected = gpu.ours(prompts)
    own = ModelForward.logits

    def greedy(self: ModelForward, hidden: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing() and len(hidden) > 3:
            torch.empty(1 << 46, dtype=torch.uint8, device="cuda")
        return own(self, hidden)

    monkeypatch.setattr(ModelForward, "logits", greedy)
    warnings: list[str] = []
    assert gpu.ours(prompts, halving=Halving(warnings.append)) == expected
    assert len(warnings) == 1
    assert warnings[0].startswith("answering 5 prompts at once ran out of memory and is done again")
