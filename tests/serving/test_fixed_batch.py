"""Rows in fixed places: they move, grow and are reused without a trace; graphs replay them; adapters change in place."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_models import Asked, add, base_forward, make_adapter, one_by_one, prompts

from tiny import GEMMA3_LAYERS, make_tiny_model, make_tokenizer
from tunesmith.errors import ModelError
from tunesmith.serving.adapter_bank import BASE, AdapterBank
from tunesmith.serving.adapter_files import read_adapter
from tunesmith.serving.engine import Engine
from tunesmith.serving.fixed_batch import FixedBatch, Places, why_not_fixed
from tunesmith.serving.generation import Failed, Finished, Generation
from tunesmith.serving.running_batch import longest_row

LIMIT = 24
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


def places_of(engine: Engine) -> Places:
    assert isinstance(engine._batch, FixedBatch)
    return engine._batch.places


def held(engine: Engine) -> Any:
    """Hold the engine between two steps until the result's event is set."""
    import threading

    gate = threading.Event()
    engine.between_steps(gate.wait)
    return gate


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_outgrow_their_columns_move_to_longer_places(
    device: str, tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any
) -> None:
    """8 places of 100 columns become 3 of 266 for one long row, beside two that are being answered."""
    engine = Engine(base_forward(tiny_model, device=device), max_batch=8, cache_tokens=800, fixed=True)
    engine.start()
    number = add(engine, adapters["cs"])
    places = places_of(engine)
    assert (places.places, places.columns) == (8, 100)
    short, (long,) = prompts(2, seed=1, least=20, most=30), prompts(1, seed=2, least=180, most=181)
    gate = held(engine)
    running = [Asked(engine, tiny_tokenizer, prompt, number, max_tokens=60) for prompt in short]
    gate.set()
    while engine.running < 2:
        time.sleep(0.001)
    running.append(Asked(engine, tiny_tokenizer, long, max_tokens=60))
    found = [one.answer()[0] for one in running]
    assert (places.places, places.columns) == (4, 200) if len(long) + 60 <= 200 else (3, 266)
    expected = one_by_one(tiny_model, adapters["cs"], tiny_tokenizer, short, 60, device)
    expected += one_by_one(tiny_model, None, tiny_tokenizer, [long], 60, device)
    assert found == expected
    again = Asked(engine, tiny_tokenizer, short[0], number, max_tokens=60).answer()[0]
    assert again == expected[0]
    assert (places.places, places.columns, places.taken) == (8, 100, {})
    engine.stop()


def test_what_can_never_fit_is_refused_and_the_rest_waits(tiny_model: Path, tiny_tokenizer: Any) -> None:
    engine = Engine(base_forward(tiny_model), max_batch=8, cache_tokens=250, fixed=True)
    (prompt,) = prompts(1, seed=3, least=40, most=41)
    gone = Asked(engine, tiny_tokenizer, prompt, max_tokens=211)
    fitting = Asked(engine, tiny_tokenizer, prompt, max_tokens=210)
    engine.start()
    end = gone.answer()[1]
    assert isinstance(end, Failed)
    assert "1 x 251 tokens of keys and values are needed, and there is room for 250" in end.message
    assert [fitting.answer()[0]] == one_by_one(tiny_model, None, tiny_tokenizer, [prompt], 210)
    engine.stop()


@pytest.mark.parametrize("device", DEVICES)
def test_gaps_are_closed_and_places_are_reused(
    device: str, tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any
) -> None:
    """Of eight rows the first six end early: the other two move up, and new ones come behind them."""
    engine = Engine(base_forward(tiny_model, device=device), max_batch=8, cache_tokens=8 * 512, fixed=True)
    engine.start()
    numbers = [BASE, add(engine, adapters["cs"]), add(engine, adapters["hr"])]
    paths = [None, adapters["cs"], adapters["hr"]]
    asked = prompts(11, seed=5)
    lengths = [3, 4, 5, 6, 7, 8, 90, 80, 30, 40, 50]
    gate = held(engine)
    running = [Asked(engine, tiny_tokenizer, asked[row], numbers[row % 3], max_tokens=lengths[row]) for row in range(8)]
    gate.set()
    early = [one.answer()[0] for one in running[:6]]
    while len(places_of(engine).taken) > 2:
        time.sleep(0.001)
    running += [
        Asked(engine, tiny_tokenizer, asked[row], numbers[row % 3], max_tokens=lengths[row]) for row in range(8, 11)
    ]
    found = early + [one.answer()[0] for one in running[6:]]
    for row, text in enumerate(found):
        assert [text] == one_by_one(tiny_model, paths[row % 3], tiny_tokenizer, [asked[row]], lengths[row], device), row
    left = places_of(engine).states[:, :, :, :, 1:]  # a step writes column 0 of places that nobody has
    assert not left.any(), "a row that left has left something behind"
    engine.stop()


def test_moving_rows_keeps_their_states(tiny_model: Path) -> None:
    forward = base_forward(tiny_model)
    batch: FixedBatch[Generation] = FixedBatch(Places(forward, AdapterBank(forward.base, "cpu"), 8, 8 * 64))

    def rows(seed: int, count: int) -> list[Generation]:
        return [Generation(one, None, frozenset(), print, 20) for one in prompts(count, seed, 4, 30)]

    with torch.inference_mode():
        first = rows(1, 5)
        batch.read(first, [row.prompt for row in first])
        kept = batch.places.states[:, :, 4].clone()
        batch.keep([4, 0])
        batch.step([7, 8])
        assert batch._at == [1, 0]
        assert torch.equal(batch.places.states[:, :, 1, :, : first[4].length - 1], kept[:, :, :, : first[4].length - 1])
        assert not batch.places.states[:, :, 2:].any()
        assert set(batch.places.taken) == {0, 1}


def test_a_row_that_is_not_finite_leaves_nothing_to_the_next_in_its_place(
    tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any
) -> None:
    engine = Engine(base_forward(tiny_model), max_batch=4, cache_tokens=4 * 256, fixed=True)
    engine.start()
    weights = read_adapter(adapters["cs"], engine.forward.base, "cpu", torch.float32)
    for a, _ in weights.layers.values():
        a.fill_(3e38)
    broken = engine.between_steps(lambda: engine.bank.add(weights)).result(20)
    short, long = prompts(1, 1, 5, 6)[0], prompts(1, 2, 90, 91)[0]
    gate = held(engine)
    both = [
        Asked(engine, tiny_tokenizer, prompt, broken, max_tokens=4) for prompt in (short, long)
    ]  # padded to the longer
    gate.set()
    assert all(isinstance(one.answer()[1], Failed) for one in both)
    found = [Asked(engine, tiny_tokenizer, short, max_tokens=120) for _ in range(4)]
    expected = one_by_one(tiny_model, None, tiny_tokenizer, [short], 120)
    assert [one.answer() for one in found] == [(expected[0], Finished("length", 120))] * 4
    engine.stop()


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_that_replaces_another_of_its_ranks_takes_its_place(
    device: str, tiny_model: Path, adapters: dict[str, Path], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """The memory stays the same from the second exchange on, graphs stay, and answers are the new adapter's."""
    engine = Engine(base_forward(tiny_model, device=device), max_batch=4, cache_tokens=4 * 512, fixed=True)
    engine.start()
    others = [make_adapter(tiny_model, tmp_path / f"a{seed}", seed) for seed in (11, 12, 13)]
    (prompt,) = prompts(1, seed=6)
    hr, current = add(engine, adapters["hr"]), add(engine, adapters["cs"])
    seen = []
    for path in others:
        running = Asked(engine, tiny_tokenizer, prompt, hr, max_tokens=LIMIT)
        number = add(engine, path)
        engine.between_steps(lambda old=current: engine.bank.remove(old, replaced=True)).result(20)
        current = number
        found = Asked(engine, tiny_tokenizer, prompt, number, max_tokens=LIMIT).answer()[0]
        assert [found] == one_by_one(tiny_model, path, tiny_tokenizer, [prompt], LIMIT, device)
        assert [running.answer()[0]] == one_by_one(tiny_model, adapters["hr"], tiny_tokenizer, [prompt], LIMIT, device)
        seen.append((engine.bank.version, engine.bank.bytes))
    assert seen[0] == seen[1] == seen[2]
    other_ranks = add(engine, make_adapter(tiny_model, tmp_path / "wide", 14, r=8))
    assert engine.bank.version > seen[0][0]
    for number in (current, other_ranks, hr):
        engine.between_steps(lambda number=number: engine.bank.remove(number)).result(20)
    assert (engine.bank.bytes, engine.bank.numbers) == (0, [])
    engine.stop()


def test_adapters_take_their_own_size_alone(tiny_model: Path, adapters: dict[str, Path]) -> None:
    """Nothing keeps the tensors that were read, once they stand below the others'."""
    import gc
    import weakref

    forward = base_forward(tiny_model)
    bank = AdapterBank(forward.base, "cpu")
    for path in (adapters["cs"], adapters["hr"]):
        weights = read_adapter(path, forward.base, "cpu", torch.float32)
        storages = [weakref.ref(part.untyped_storage()) for pair in weights.layers.values() for part in pair]
        bank.add(weights)
        del weights
    gc.collect()
    assert storages
    assert not [one for one in storages if one() is not None]


def test_an_adapter_that_does_not_fit_leaves_nothing(
    tiny_model: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = base_forward(tiny_model)
    bank = AdapterBank(forward.base, "cpu")
    cs, hr = (read_adapter(adapters[name], forward.base, "cpu", torch.float32) for name in ("cs", "hr"))
    bank.add(cs)
    before, columns = bank.bytes, {name: len(layer.a) for name, layer in bank._layers.items()}
    joined, calls = torch.cat, itertools.count()

    def runs_out(parts: Any) -> torch.Tensor:
        if next(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return joined(parts)

    monkeypatch.setattr(torch, "cat", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        bank.add(hr)
    monkeypatch.undo()
    assert (bank.bytes, {name: len(layer.a) for name, layer in bank._layers.items()}) == (before, columns)
    assert bank.numbers == [0]
    assert bank.add(hr) == 2


def test_an_adapter_whose_scaled_weights_overflow_the_type_is_refused(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Its infinity would be NaN in every other row, whose product with it is 0 x infinity."""
    folder = shutil.copytree(adapters["cs"], tmp_path / "large")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 10_000_000}))
    base = base_forward(tiny_model).base
    assert read_adapter(folder, base, "cpu", torch.float32).layers
    with pytest.raises(ModelError, match=r"with its scale, are not finite .* in float16"):
        read_adapter(folder, base, "cpu", torch.float16)


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("gemma3_text", {"sliding_window": 8, "layer_types": GEMMA3_LAYERS}, "something else than all keys and values"),
        ("mistral", {"sliding_window": 8}, "something else than all keys and values"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotations"),
    ],
)
def test_models_that_cannot_have_fixed_places_say_why(
    family: str, settings: dict[str, Any], said: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    base = make_tiny_model(tmp_path / "base", family=family, **settings)
    heard: list[str] = []
    engine = Engine(base_forward(base), max_batch=4, cache_tokens=2000, fixed=True, warn=heard.append)
    assert len(heard) == 1
    assert said in heard[0]
    assert said in str(why_not_fixed(engine.forward))
    assert not isinstance(engine._batch, FixedBatch)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3", "phi3", "mixtral"])
def test_families_answer_as_alone(family: str, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", family=family)
    targets = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    path = make_adapter(base, tmp_path / "adapter", seed=3, target_modules=targets)
    tokenizer, asked = make_tokenizer(), prompts(6, seed=4)
    engine = Engine(base_forward(base), max_batch=4, cache_tokens=4 * 256, fixed=True)
    assert isinstance(engine._batch, FixedBatch)
    engine.start()
    number = add(engine, path)
    running = [
        Asked(engine, tokenizer, prompt, BASE if place % 2 else number, max_tokens=LIMIT)
        for place, prompt in enumerate(asked)
    ]
    found = [one.answer()[0] for one in running]
    engine.stop()
    alone = [one_by_one(base, adapter, tokenizer, asked, LIMIT) for adapter in (path, None)]
    assert found == [alone[place % 2][place] for place in range(len(asked))]


@pytest.mark.parametrize(
    ("family", "settings", "longest"),
    [
        ("llama", {}, 4096),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 4096),
        (
            "phi3",
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4,
                    "original_max_position_embeddings": 64,
                },
            },
            64,
        ),
    ],
)
def test_rows_end_before_rotations_would_depend_on_the_longest_one(
    family: str, settings: dict[str, Any], longest: int, tmp_path: Path
) -> None:
    base = make_tiny_model(tmp_path / "base", family=family, **settings)
    forward = base_forward(base)
    assert longest_row(forward.base.config) == Engine(forward).context_length == longest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_graphs_replay_what_launches_compute(tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any) -> None:
    """The same rows twice, then a third time with an adapter exchanged in between: prompts and steps are replayed."""
    engine = Engine(base_forward(tiny_model, device="cuda"), max_batch=8, cache_tokens=8 * 512)
    engine.start()
    places = places_of(engine)
    assert places.captures
    numbers = {"cs": add(engine, adapters["cs"]), "hr": add(engine, adapters["hr"]), None: BASE}
    asked = prompts(8, seed=9)
    names = [["cs", "hr", None][row % 3] for row in range(8)]
    expected = [
        one_by_one(tiny_model, adapters[name] if name else None, tiny_tokenizer, [prompt], 60, "cuda")[0]
        for name, prompt in zip(names, asked, strict=True)
    ]
    for turn in range(4):
        gate = held(engine)
        running = [
            Asked(engine, tiny_tokenizer, prompt, numbers[name], max_tokens=60)
            for name, prompt in zip(names, asked, strict=True)
        ]
        gate.set()
        assert [one.answer()[0] for one in running] == expected, turn
        old, numbers["cs"] = numbers["cs"], add(engine, adapters["cs"])
        engine.between_steps(lambda old=old: engine.bank.remove(old, replaced=True)).result(20)
    assert places.captures
    assert places.captured >= 4
    assert places.replayed > 100
    assert places.launched < places.replayed
    engine.stop()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_adapters_are_read_while_a_graph_is_captured(tiny_model: Path, adapters: dict[str, Path]) -> None:
    """PyTorch gives 32 streams in turn: a reader that took the next one would sooner or later wait for the one that is captured."""
    forward = base_forward(tiny_model, device="cuda")
    expected = read_adapter(adapters["cs"], forward.base, "cuda", torch.float32).layers
    x, graph = torch.zeros(8, device="cuda"), torch.cuda.CUDAGraph()

    def read() -> list[Any]:
        return [read_adapter(adapters["cs"], forward.base, "cuda", torch.float32).layers for _ in range(40)]

    with (
        ThreadPoolExecutor(1) as beside,
        torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"),
    ):
        y = x + 1
        found = beside.submit(read).result()
    graph.replay()
    assert y.tolist() == [1.0] * 8
    assert all(torch.equal(layers[name][0], a) for layers in found for name, (a, _) in expected.items())
