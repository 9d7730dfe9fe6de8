"""The engine answers as `generate` does one by one, whatever else is in the batch; places are freed; limits hold."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from serving_models import Asked, add, base_forward, make_adapter, one_by_one, prompts

from tiny import GEMMA3_LAYERS, make_tiny_model, make_tokenizer
from tunesmith.errors import ModelError
from tunesmith.models.forward import ModelForward
from tunesmith.serving import running_batch
from tunesmith.serving.adapter_bank import BASE, AdapterBank
from tunesmith.serving.adapter_files import read_adapter
from tunesmith.serving.engine import Engine, QueueFull, Stopped
from tunesmith.serving.fixed_batch import FixedBatch
from tunesmith.serving.generation import Failed, Finished, Generation
from tunesmith.serving.running_batch import RunningBatch
from tunesmith.serving.sampling import GREEDY, Sampling, choose

LIMIT = 24
NEVER = {"ends": frozenset()}


def wait_until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def test_a_mixed_batch_answers_as_each_adapter_alone(
    engine: Engine, numbers: dict[str, int], tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any
) -> None:
    """Base and two adapters, unequal prompts, arriving while others are being answered."""
    asked = prompts(15)
    names = ["cs", "hr", None]
    expected = {
        name: one_by_one(tiny_model, adapters[name] if name else None, tiny_tokenizer, asked, LIMIT) for name in names
    }
    assert all(expected["cs"][i] != expected["hr"][i] != expected[None][i] for i in range(len(asked)))
    rows = [(place, name) for place in range(len(asked)) for name in names]
    random.Random(1).shuffle(rows)
    running = []
    together = 0
    for place, name in rows:
        number = numbers[name] if name else BASE
        running.append(Asked(engine, tiny_tokenizer, asked[place], number, max_tokens=LIMIT))
        together = max(together, engine.running)
        time.sleep(0.004)
    found = [one.answer()[0] for one in running]
    assert found == [expected[name][place] for place, name in rows]
    assert together > 2
    wait_until(lambda: (engine.running, engine.waiting) == (0, 0))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma3_text", {"sliding_window": 8, "layer_types": GEMMA3_LAYERS}),
        ("mistral", {"sliding_window": 8}),
        ("qwen3", {}),
    ],
)
def test_families_with_windows_and_norms_answer_as_alone(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", family=family, **settings)
    path = make_adapter(base, tmp_path / "adapter", seed=3)
    tokenizer, asked = make_tokenizer(), prompts(6, seed=4)
    engine = Engine(base_forward(base), max_batch=4)
    engine.start()
    number = add(engine, path)
    running = []
    for place, prompt in enumerate(asked):
        running.append(Asked(engine, tokenizer, prompt, BASE if place % 2 else number, max_tokens=LIMIT))
        time.sleep(0.01)
    found = [one.answer()[0] for one in running]
    engine.stop()
    alone = [one_by_one(base, adapter, tokenizer, asked, LIMIT) for adapter in (path, None)]
    assert found == [alone[place % 2][place] for place in range(len(asked))]


def test_in_16_bits_a_mixed_batch_is_as_exact_as_peft(tiny_model: Path, adapters: dict[str, Path]) -> None:
    """Error against fp32 at most twice that of PEFT in the same type, each adapter alone."""
    (prompt,) = prompts(1, seed=21)
    paths = [adapters["cs"], None, adapters["hr"]]

    def logits(forward: ModelForward, rows: int = 1, bank: AdapterBank | None = None) -> torch.Tensor:
        batch: RunningBatch[Any] = RunningBatch(forward)
        if bank:
            bank.select([0, BASE, 1])
        with torch.inference_mode(), forward.autocast():
            found = forward.logits(batch.read([SimpleNamespace(length=0) for _ in range(rows)], [prompt] * rows))
            found = torch.stack([found, forward.logits(batch.step([65] * rows))], 1)
        return found.float()

    exact = torch.cat([logits(base_forward(tiny_model, path)) for path in paths])
    by_peft = torch.cat([logits(base_forward(tiny_model, path, "bf16")) for path in paths])
    forward = base_forward(tiny_model, None, "bf16")
    bank = AdapterBank(forward.base, "cpu")
    for path in (adapters["cs"], adapters["hr"]):
        bank.add(read_adapter(path, forward.base, "cpu", torch.bfloat16))
    ours = logits(forward, 3, bank)
    for row in range(3):
        theirs = (by_peft[row] - exact[row]).norm()
        assert 0 < (ours[row] - exact[row]).norm() <= 2 * theirs


def test_an_adapter_that_overflows_leaves_the_others_alone(
    engine: Engine, numbers: dict[str, int], tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any
) -> None:
    weights = read_adapter(adapters["cs"], engine.forward.base, "cpu", torch.float32)
    for a, _ in weights.layers.values():
        a.fill_(3e38)
    broken = engine.between_steps(lambda: engine.bank.add(weights)).result(20)
    (prompt,) = prompts(1, seed=3)
    alone = one_by_one(tiny_model, adapters["hr"], tiny_tokenizer, [prompt], LIMIT)
    running = [Asked(engine, tiny_tokenizer, prompt, n, max_tokens=LIMIT) for n in (broken, numbers["hr"])]
    assert [running[1].answer()[0]] == alone
    end = running[0].answer()[1]
    assert isinstance(end, Failed)
    assert (end.reason, "logits are not finite" in end.message) == ("error", True)


def test_an_adapter_that_left_changes_nothing_and_holds_nothing(
    engine: Engine, numbers: dict[str, int], tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any
) -> None:
    (prompt,) = prompts(1, seed=8)
    before = engine.bank.bytes
    engine.between_steps(lambda: engine.bank.remove(numbers["cs"])).result(20)
    assert engine.bank.bytes == before * 6 // 10  # ranks 4 and 6
    for number, adapter in ((numbers["hr"], adapters["hr"]), (BASE, None)):
        text, _ = Asked(engine, tiny_tokenizer, prompt, number, max_tokens=LIMIT).answer()
        assert [text] == one_by_one(tiny_model, adapter, tiny_tokenizer, [prompt], LIMIT)
    engine.between_steps(lambda: engine.bank.remove(numbers["hr"])).result(20)
    assert engine.bank.bytes == 0
    assert not any(module._forward_hooks for module in engine.forward.base.modules())


def endless(engine: Engine, tokenizer: Any, **settings: Any) -> Asked:
    """A request whose answer has no end token, so that it goes on to its limit."""
    asked = Asked.__new__(Asked)
    import queue

    asked.events = queue.Queue()
    values = {"max_tokens": 2000, **settings}
    asked.generation = Generation([65, 66, 67], tokenizer, frozenset(), asked.events.put, **values)
    engine.submit([asked.generation])
    return asked


def test_a_cancelled_request_frees_its_place(engine: Engine, tiny_tokenizer: Any) -> None:
    running = [endless(engine, tiny_tokenizer) for _ in range(9)]  # one more than fit
    wait_until(lambda: engine.running == 8 and engine.waiting == 1)
    engine.cancel(running[3].generation)
    wait_until(lambda: engine.running == 8 and engine.waiting == 0)
    for one in running:
        engine.cancel(one.generation)
    wait_until(lambda: engine.running == 0)
    while not running[3].events.empty():
        assert not isinstance(running[3].events.get(), Failed)


def test_an_engine_that_starts_while_an_adapter_is_read_computes_with_all_threads(tiny_model: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        engine = Engine(base_forward(tiny_model))
        with ThreadPoolExecutor(1) as reading:
            reading.submit(torch.set_num_threads, 1).result()
            engine.start()
            assert engine.between_steps(torch.get_num_threads).result(20) == 3
        engine.stop()
    finally:
        torch.set_num_threads(before)


def test_a_full_queue_refuses(tiny_model: Path, tiny_tokenizer: Any) -> None:
    engine = Engine(base_forward(tiny_model), max_batch=1, max_queue=2)
    engine.start()
    endless(engine, tiny_tokenizer)
    wait_until(lambda: engine.running == 1)
    for _ in range(2):
        endless(engine, tiny_tokenizer)
    with pytest.raises(QueueFull):
        endless(engine, tiny_tokenizer)
    engine.stop()
    with pytest.raises(Stopped):
        endless(engine, tiny_tokenizer)


def test_time_is_up_for_running_and_waiting_requests(tiny_model: Path, tiny_tokenizer: Any) -> None:
    engine = Engine(base_forward(tiny_model), max_batch=1)
    engine.start()
    asked = [endless(engine, tiny_tokenizer, max_tokens=10**6)]
    wait_until(lambda: asked[0].generation.produced > 20, 60)
    asked.append(endless(engine, tiny_tokenizer, seconds=0.1))
    wait_until(lambda: engine.waiting == 0, 60)  # its time is up in the queue
    asked[0].generation.seconds = 0.2
    texts, ends = zip(*(one.answer() for one in asked), strict=True)
    assert texts[0]
    assert texts[1] == ""
    assert [end.reason for end in ends] == ["timeout", "timeout"]
    assert "no whole answer after 0.2 s" in ends[0].message
    assert (engine.running, engine.waiting) == (0, 0)
    engine.stop()


def test_requests_in_flight_end_when_the_engine_stops_or_breaks(tiny_model: Path, tiny_tokenizer: Any) -> None:
    for breaks in (False, True):
        engine = Engine(base_forward(tiny_model), max_batch=1)
        engine.start()
        asked = [endless(engine, tiny_tokenizer) for _ in range(2)]
        wait_until(lambda engine=engine: engine.running == 1)
        if breaks:
            hook, threading.excepthook = threading.excepthook, lambda _: None
            engine.between_steps(lambda: 1 / 0)
            wait_until(lambda engine=engine: not engine.healthy)
            threading.excepthook = hook
        else:
            engine.stop()
        assert [one.answer()[1].reason for one in asked] == ["stopped", "stopped"]
        assert not engine.healthy


@pytest.mark.parametrize("tokens", ["a prompt", "one token"])
def test_a_forward_that_fails_costs_its_own_rows(
    tokens: str, engine: Engine, tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = engine.forward.decoder.layers[1].mlp
    forward, armed = mlp.forward, [True]

    def fails(x: torch.Tensor) -> torch.Tensor:
        if armed[0] and (x.shape[1] == 1) == (tokens == "one token"):
            armed[0] = False
            raise ModelError("a layer that sees what it does not know")
        return forward(x)

    monkeypatch.setattr(mlp, "forward", fails)
    (prompt, other) = (one * 2 for one in prompts(2, seed=9))
    end = Asked(engine, tiny_tokenizer, prompt, max_tokens=LIMIT).answer()[1]
    assert isinstance(end, Failed)
    assert (end.reason, "ModelError: a layer that sees" in end.message) == ("error", True)
    assert engine.healthy
    text, _ = Asked(engine, tiny_tokenizer, other, max_tokens=LIMIT).answer()
    assert [text] == one_by_one(tiny_model, None, tiny_tokenizer, [other], LIMIT)


def test_requests_whose_prompt_is_being_read_are_told_that_the_engine_broke(
    tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(BaseException):
        pass

    reading, gate = threading.Event(), threading.Event()

    def read(*_: Any) -> None:
        reading.set()
        gate.wait(30)
        raise Broken

    monkeypatch.setattr(RunningBatch, "read", read)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = Engine(base_forward(tiny_model), max_batch=2)
    assert engine.idle
    engine.start()
    asked = endless(engine, tiny_tokenizer)
    assert reading.wait(30)
    assert (engine.running, engine.waiting, engine.idle) == (0, 0, False)
    gate.set()
    assert asked.answer()[1].reason == "stopped"
    assert engine.idle


def test_memory_that_runs_out_costs_the_last_row_alone(
    engine: Engine, tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer fails, when the first has the new token in its cache already."""
    asked = prompts(3, seed=9)
    mlp = engine.forward.decoder.layers[1].mlp
    forward, armed = mlp.forward, [False]

    def fails(x: torch.Tensor) -> torch.Tensor:
        if armed[0] and len(x) >= 3 and x.shape[1] == 1:  # fixed places step in powers of two
            armed[0] = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return forward(x)

    monkeypatch.setattr(mlp, "forward", fails)
    gate = threading.Event()
    held = engine.between_steps(gate.wait)
    running = [Asked(engine, tiny_tokenizer, prompt, max_tokens=LIMIT) for prompt in asked]
    armed[0] = True
    gate.set()
    held.result(10)
    found = [one.answer() for one in running]
    assert [text for text, _ in found[:2]] == one_by_one(tiny_model, None, tiny_tokenizer, asked[:2], LIMIT)
    assert isinstance(found[2][1], Failed)
    assert found[2][1].message.startswith("no memory left for this answer: CUDA out of memory")


@pytest.mark.parametrize("fails_in", ["reading", "joining"])
def test_memory_that_runs_out_for_a_prompt_leaves_the_running_ones_alone(
    fails_in: str, engine: Engine, tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt, other) = prompts(2, seed=14)
    running = Asked(engine, tiny_tokenizer, prompt, max_tokens=1000)
    wait_until(lambda: engine.running == 1)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if fails_in == "reading":
        monkeypatch.setattr(type(engine._batch), "read", mock.Mock(side_effect=error))
    elif isinstance(engine._batch, FixedBatch):
        monkeypatch.setattr(FixedBatch, "join", mock.Mock(side_effect=error))
    else:
        widen, calls = running_batch._widen, itertools.count()

        def fails(states: torch.Tensor, width: int) -> torch.Tensor:
            if next(calls) == 6:  # in the second layer: the first has the new row already
                raise error
            return widen(states, width)

        monkeypatch.setattr(running_batch, "_widen", fails)
    late = [Asked(engine, tiny_tokenizer, other, max_tokens=n) for n in (5, 1)]
    ends = [one.answer()[1] for one in late]
    assert isinstance(ends[0], Failed)
    assert ends[0].message.startswith("no memory left to read this prompt: CUDA out of memory")
    monkeypatch.undo()
    assert [running.answer()[0]] == one_by_one(tiny_model, None, tiny_tokenizer, [prompt], 1000)


def test_the_cache_budget_holds_requests_back(
    tiny_model: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, sizes = RunningBatch.step, set()

    def counted(batch: Any, tokens: Any) -> torch.Tensor:
        sizes.add(len(tokens))
        return step(batch, tokens)

    monkeypatch.setattr(RunningBatch, "step", counted)
    engine = Engine(base_forward(tiny_model), max_batch=8, cache_tokens=250)
    running = [endless(engine, tiny_tokenizer, max_tokens=97) for _ in range(5)]  # 100 tokens each
    engine.start()
    assert all(one.answer()[1] == Finished("length", 97) for one in running)
    assert max(sizes) == 2
    engine.stop()


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_drawn_tokens_follow_the_distribution_and_the_nucleus() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    count = 4000
    for temperature, top_p, expected in (
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.7, [0.625, 0.375, 0, 0]),
        (0.5, 1.0, [0.685, 0.247, 0.062, 0.007]),  # squares, normalized
    ):
        setting = Sampling(temperature, top_p)
        found = choose(logits.repeat(count, 1), [setting] * count, [random.Random(n) for n in range(count)])
        shares = torch.bincount(torch.tensor(found), minlength=4) / count
        assert torch.allclose(shares, torch.tensor(expected), atol=0.03), (temperature, top_p, shares)


def test_a_tiny_temperature_or_nucleus_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [900.0, -900.0, 0.0]])
    for setting in (Sampling(1e-50), Sampling(1e-6), Sampling(2.0, 1e-9), Sampling(1.0, 0.0)):
        assert choose(logits, [setting] * 2, [random.Random(0), random.Random(1)]) == [1, 0]


def test_a_row_without_finite_logits_has_no_token() -> None:
    infinite, nan = float("inf"), float("nan")
    logits = torch.tensor([[1.0, nan, 2.0], [1.0, -infinite, 2.0], [0.0, infinite, 1.0], [-infinite] * 3])
    for setting in (GREEDY, Sampling(1e-3)):
        assert choose(logits, [setting] * 4, [random.Random(0) for _ in range(4)]) == [None, 2, None, None]


def test_a_seed_draws_the_same_in_any_company(engine: Engine, numbers: dict[str, int], tiny_tokenizer: Any) -> None:
    def ask(seed: int) -> Asked:
        return Asked(engine, tiny_tokenizer, [1, 2, 3], numbers["cs"], sampling=Sampling(1.0, 0.95, seed))

    alone = ask(7).answer()
    company = [Asked(engine, tiny_tokenizer, p, sampling=Sampling(1.5)) for p in prompts(4)]
    assert ask(7).answer() == alone
    assert len({ask(seed).answer()[0] for seed in range(6)}) > 3
    for one in company:
        one.answer()


# -- text -------------------------------------------------------------------------------------------------------------


def test_stop_strings_cut_the_answer(engine: Engine, tiny_model: Path, tiny_tokenizer: Any) -> None:
    (prompt,) = prompts(1, seed=11)
    (whole,) = one_by_one(tiny_model, None, tiny_tokenizer, [prompt], 40)
    for stop in (whole[5:8], whole[3], whole[-2:]):
        text, end = Asked(engine, tiny_tokenizer, prompt, max_tokens=40, stop=("not there", stop)).answer()
        assert text == whole[: whole.index(stop)]
        assert end.reason == "stop"
