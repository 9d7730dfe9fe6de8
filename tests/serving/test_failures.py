"""What failed leaves nothing behind: no place, no adapter's rest, no row on another's keys, nobody who waits for ever."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_server import eventually
from serving_models import Asked, add, base_forward, one_by_one
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.serving.adapter_bank import BASE, AdapterBank
from tunesmith.serving.adapter_files import read_adapter
from tunesmith.serving.engine import Engine, Stopped
from tunesmith.serving.fixed_batch import MAX_GRAPHS, FixedBatch, Places, _Graph
from tunesmith.serving.generation import Failed, Finished, Generation
from tunesmith.serving.running_batch import RunningBatch

LIMIT = 24
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def engine_of(base: Path, fixed: bool, **settings: Any) -> Engine:
    return Engine(base_forward(base), 4, 16, 4 * 512 if fixed else None, fixed, **settings)


def places_of(base: Path, rows: int, tokens: int, captures: bool = False) -> Places:
    forward = base_forward(base)
    return Places(forward, AdapterBank(forward.base, "cpu"), rows, tokens, captures=captures)


def row(prompt: list[int], length: int) -> Generation:
    return Generation(prompt, None, frozenset(), print, length)


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [NO_MEMORY, ValueError("the sampler cannot")], ids=["memory", "an error"])
def test_prompts_whose_token_cannot_be_chosen_hold_no_place(
    error: Exception, tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were read, and had their places already."""
    engine = engine_of(tiny_model, fixed=True)
    engine.start()
    places = engine._batch.places  # type: ignore[attr-defined]
    choose, armed = engine._choose, [True]

    def fails(*given: Any) -> Any:
        if armed[0]:
            raise error
        return choose(*given)

    monkeypatch.setattr(engine, "_choose", fails)
    for _ in range(2):
        end = Asked(engine, tiny_tokenizer, [65, 66, 67], max_tokens=4).answer()[1]
        assert isinstance(end, Failed)
        assert end.reason == ("memory" if error is NO_MEMORY else "error")
    eventually(lambda: engine.idle)
    assert places.taken == {}
    armed[0] = False
    text, _ = Asked(engine, tiny_tokenizer, [65, 66, 67], max_tokens=LIMIT).answer()
    assert [text] == one_by_one(tiny_model, None, tiny_tokenizer, [[65, 66, 67]], LIMIT)
    engine.stop()


@pytest.mark.parametrize("error", [NO_MEMORY, ValueError("rows do not fit")], ids=["memory", "an error"])
def test_prompts_that_cannot_join_hold_no_place(
    error: Exception, tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_model, fixed=True)
    engine.start()

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(FixedBatch, "join", fails)
    assert isinstance(Asked(engine, tiny_tokenizer, [65, 66, 67], max_tokens=4).answer()[1], Failed)
    eventually(lambda: engine.idle)
    assert engine._batch.places.taken == {}  # type: ignore[attr-defined]
    engine.stop()


class NoNewMemory(TorchDispatchMode):
    """From `after` allocations on there is no memory for tensors of more than a few numbers."""

    def __init__(self, after: int = 0):
        super().__init__()
        self.left = after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor)]
        known = {one.untyped_storage().data_ptr() for one in given}
        if isinstance(found, torch.Tensor) and found.numel() > 64 and found.untyped_storage().data_ptr() not in known:
            self.left -= 1
            if self.left < 0:
                raise NO_MEMORY
        return found


def test_rows_that_cannot_move_for_want_of_memory_stay_as_they_are(tiny_model: Path) -> None:
    batch: FixedBatch[Generation] = FixedBatch(places_of(tiny_model, 4, 4 * 32))
    alone: FixedBatch[Generation] = FixedBatch(places_of(tiny_model, 4, 4 * 32))
    prompts = [[65, 66, 67, 68], [70, 71, 72]]
    with torch.inference_mode():
        for one in (batch, alone):
            one.read([row(prompt, 8) for prompt in prompts], prompts)
        refused = 0
        while True:
            try:
                with NoNewMemory(after=refused):
                    moved = batch.places.make_room(3, 40)
                break
            except torch.OutOfMemoryError:
                refused += 1
            assert (batch.places.places, batch.places.columns) == (4, 32)
            assert torch.equal(batch.places.states, alone.places.states)
            assert batch.places.taken == alone.places.taken
        assert refused > 0
        assert (batch.places.places, batch.places.columns, moved) == (3, 42, {0: 0, 1: 1})
        torch.testing.assert_close(batch.step([80, 81]), alone.step([80, 81]))


def test_what_was_not_finite_does_not_stay_where_others_come_to_lie(tiny_model: Path) -> None:
    """Padding behind a prompt may be infinite; masked it counts all the same where it is multiplied by 0."""
    places = places_of(tiny_model, 4, 4 * 32)
    batch: FixedBatch[Generation] = FixedBatch(places)
    with torch.inference_mode():
        batch.read([row([65, 66, 67], 8), row([70], 8)], [[65, 66, 67], [70]])
        places.states[:, :, 1, :, 1:3] = torch.inf
        beside = batch.beside()
        beside.read([row([1] * 30, 10)], [[1] * 30])
        assert (places.places, places.columns) == (3, 42)
        batch.keep([0])
        beside.clear()
        assert places.states[:, :, batch._at[0]].isfinite().all()
        assert not places.states[:, :, [place for place in range(3) if place != batch._at[0]]].any()
        assert not places._memory[:, :, places.states[0, 0].numel() :].any()


def test_a_little_memory_is_a_few_places(tiny_model: Path, tiny_tokenizer: Any) -> None:
    """Fewer tokens than rows that may be: no column for each, and yet an engine."""
    engine = Engine(base_forward(tiny_model), max_batch=8, cache_tokens=7, fixed=True)
    engine.start()
    assert Asked(engine, tiny_tokenizer, [65, 66], max_tokens=5, ends=frozenset()).answer()[1] == Finished("length", 5)
    end = Asked(engine, tiny_tokenizer, [65, 66], max_tokens=6).answer()[1]
    assert isinstance(end, Failed)
    assert "there is room for 7" in end.message
    engine.stop()


# -- graphs -----------------------------------------------------------------------------------------------------------


def captured(places: Places, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Graphs that are none: a replay does the work that was captured. The keys of all captures."""
    keys: list[tuple[Any, ...]] = []

    def capture(key: tuple[Any, ...], work: Any) -> Any:
        keys.append(key)
        if len(places._graphs) >= MAX_GRAPHS:
            del places._graphs[next(iter(places._graphs))]
        places._graphs[key] = _Graph(SimpleNamespace(replay=lambda: None), torch.zeros(1), places.bank.version)  # type: ignore[arg-type]
        return places._graphs[key]

    monkeypatch.setattr(places, "_capture", capture)
    return keys


def test_the_graph_that_was_used_longest_ago_goes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = places_of(tiny_model, 4, 4 * 32, captures=True)
    keys = captured(places, monkeypatch)

    def run(number: int) -> None:
        places._run(("step", number, False), True, lambda: torch.zeros(1))

    for number in range(MAX_GRAPHS):
        run(number)
        run(number)
    run(0)
    run(MAX_GRAPHS)
    run(MAX_GRAPHS)
    assert len(keys) == MAX_GRAPHS + 1
    run(0)
    assert len(keys) == MAX_GRAPHS + 1, "it was used a moment ago"
    run(1)
    assert keys[-1] == ("step", 1, False)
    assert len(places._graphs) == MAX_GRAPHS


def test_what_is_never_captured_is_not_remembered(tiny_model: Path) -> None:
    """Prompts beyond what graphs read have any width there is: thousands of keys."""
    for captures in (False, True):
        places = places_of(tiny_model, 4, 4 * 32, captures=captures)
        for width in range(50):
            places._run(("prompts", width, False), False, lambda: torch.zeros(1))
        assert not places._ran


# -- adapters ---------------------------------------------------------------------------------------------------------


def logits_of(engine: Engine, rows: list[int]) -> torch.Tensor:
    """The next logits of one prompt for each of several rows."""
    batch: RunningBatch[Any] = RunningBatch(engine.forward, engine.bank)
    with torch.inference_mode():
        wanted = [SimpleNamespace(length=0, adapter=number) for number in rows]
        return engine.forward.logits(batch.read(wanted, [[65, 66, 67]] * len(rows)))


@pytest.mark.parametrize("failing", [5, 8, 9, 10])
def test_memory_that_runs_out_while_an_adapter_leaves_costs_memory_alone(
    failing: int, tiny_model: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes memory to give some back. Mixed batches go on, and the rest goes with the next that leaves."""
    engine = engine_of(tiny_model, fixed=False)
    bank = engine.bank
    weights = [read_adapter(adapters[name], engine.forward.base, "cpu", torch.float32) for name in ("cs", "hr", "cs")]
    first, second, third = (bank.add(one) for one in weights)
    expected = logits_of(engine, [second, BASE, third])
    bytes_of = {
        name: sum(a.numel() + b.numel() for a, b in weights[place].layers.values()) * 4
        for place, name in ((0, "cs"), (1, "hr"))
    }
    joined, calls = torch.cat, itertools.count()

    def runs_out(parts: Any) -> torch.Tensor:
        if next(calls) >= failing:
            raise NO_MEMORY
        return joined(parts)

    monkeypatch.setattr(torch, "cat", runs_out)
    bank.remove(first)
    monkeypatch.undo()
    assert bank.numbers == [second, third]
    assert bank.bytes > bytes_of["cs"] + bytes_of["hr"]
    torch.testing.assert_close(logits_of(engine, [second, BASE, third]), expected)
    bank.remove(third)
    assert bank.bytes == bytes_of["hr"]
    assert not bank._left
    torch.testing.assert_close(logits_of(engine, [second, BASE, second]), expected[[0, 1, 0]])
    bank.remove(second)
    assert bank.bytes == 0


@pytest.mark.parametrize("failing", [9, 10])
def test_memory_that_stays_away_when_an_adapter_did_not_fit_costs_memory_alone(
    failing: int, tiny_model: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what takes the half of it out again finds none."""
    engine = engine_of(tiny_model, fixed=False)
    bank = engine.bank
    cs, hr = (read_adapter(adapters[name], engine.forward.base, "cpu", torch.float32) for name in ("cs", "hr"))
    first = bank.add(cs)
    before, expected = bank.bytes, logits_of(engine, [first, BASE])
    joined, calls = torch.cat, itertools.count()

    def runs_out(parts: Any) -> torch.Tensor:
        if next(calls) >= failing:
            raise NO_MEMORY
        return joined(parts)

    monkeypatch.setattr(torch, "cat", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        bank.add(hr)
    monkeypatch.undo()
    torch.testing.assert_close(logits_of(engine, [first, BASE]), expected)
    second = bank.add(hr)
    torch.testing.assert_close(logits_of(engine, [first, BASE]), expected)
    bank.remove(second)
    assert bank.bytes == before


# -- the engine's thread ----------------------------------------------------------------------------------------------


def test_whoever_waits_for_a_call_that_broke_the_engine_is_told(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = engine_of(tiny_model, fixed=False)
    engine.start()
    with pytest.raises(Stopped):
        engine.between_steps(lambda: 1 / 0).result(30)
    engine.stop()
    assert not engine.healthy


def test_a_call_that_nobody_waits_for_any_more_is_left_out(tiny_model: Path, adapters: dict[str, Path]) -> None:
    """As of a request for an adapter that the server's end cut off."""
    engine = engine_of(tiny_model, fixed=False)
    done: list[int] = []
    calls = [engine.between_steps(lambda: done.append(1)), engine.between_steps(lambda: done.append(2))]
    assert calls[0].cancel()
    engine.start()
    calls[1].result(30)
    assert done == [2]
    assert engine.healthy
    assert add(engine, adapters["cs"]) == 0
    last = engine.between_steps(lambda: engine.between_steps(lambda: done.append(3)).cancel())
    assert last.result(30)
    engine.stop()
    assert done == [2]


def test_rows_that_end_where_there_is_no_memory_for_those_that_stay_do_not_end_the_engine(
    tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_model, fixed=False)
    asked = [Asked(engine, tiny_tokenizer, [65 + n], max_tokens=n, ends=frozenset()) for n in (3, 200)]
    keep = RunningBatch.keep

    def fails(batch: Any, places: Any) -> None:
        if len(places) < len(batch.rows):
            batch.rows = [batch.rows[place] for place in places]
            raise NO_MEMORY
        keep(batch, places)

    monkeypatch.setattr(RunningBatch, "keep", fails)
    engine.start()
    ends = [one.answer()[1] for one in asked]
    assert ends[0] == Finished("length", 3)
    assert isinstance(ends[1], Failed)
    assert ends[1].message.startswith("no memory left for this answer: CUDA out of memory")
    monkeypatch.undo()
    text, _ = Asked(engine, tiny_tokenizer, [65], max_tokens=LIMIT).answer()
    assert [text] == one_by_one(tiny_model, None, tiny_tokenizer, [[65]], LIMIT)
    engine.stop()


def test_the_last_row_leaves_without_memory(tiny_model: Path) -> None:
    """It leaves where memory has run out: what stays is no copy."""
    forward = base_forward(tiny_model)
    batch: RunningBatch[Any] = RunningBatch(forward)
    prompts = [[65] * 40, [66] * 30, [67] * 20]
    with torch.inference_mode():
        batch.read([SimpleNamespace(length=0) for _ in prompts], prompts)
        with NoNewMemory():
            batch.keep([0, 1])
        assert (len(batch.rows), batch.width) == (2, 40)
        assert batch.step([70, 71]).shape[0] == 2
