"""Some hundred requests of every kind at once: none lost, none answered by the wrong adapter, and nothing left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, eventually
from serving_models import one_by_one
from soak import ANSWERED, Target, soak

from tunesmith.serving.limits import Limits

TOKENS = 12


def target_of(live: LiveServer, base: Path, adapters: dict[str, Path], tokenizer: Any, body_limit: int) -> Target:
    questions = [f"{n} {'word ' * (n % 7)}?" for n in range(20)]
    prompts = [tokenizer(question)["input_ids"] for question in questions]
    answers = {
        name: dict(zip(questions, one_by_one(base, path, tokenizer, prompts, TOKENS), strict=True))
        for name, path in {"base": None, **adapters}.items()
    }
    folders = {name: str(path) for name, path in adapters.items()}
    return Target(live.url, answers, folders, TOKENS, body_limit=body_limit)


def test_a_soak(tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any) -> None:
    limits = Limits(answer_tokens=1000, batch=8, body_bytes=50_000)
    with LiveServer(tiny_model, adapters, limits) as live:
        target = target_of(live, tiny_model, adapters, tiny_tokenizer, limits.body_bytes)
        assert all(len({target.answers[name][q] for name in target.answers}) == 3 for q in target.answers["base"])
        outcome = asyncio.run(soak(target, 400))
        assert (outcome.lost, outcome.wrong) == ([], [])
        assert outcome.kinds[ANSWERED] > 250
        assert min(outcome.kinds[kind] for kind in ("disconnected", "bad body", "oversized", "swap")) >= 1
        eventually(lambda: live.server.idle and len(live.engine.bank.numbers) == 3)
        assert live.engine.healthy
        assert [model.uses for model in (live.catalog.base, *live.catalog.adapters)] == [0] * 4
        assert live.engine.bank._layers.keys() == live.engine.bank._handles.keys()


@pytest.mark.slow
def test_memory_is_flat(tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any) -> None:
    """What 1,000 requests leave behind, counted in tensors and threads of this process."""
    import gc
    import threading

    import torch

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    with LiveServer(tiny_model, adapters, Limits(answer_tokens=1000, batch=8, body_bytes=50_000)) as live:
        target = target_of(live, tiny_model, adapters, tiny_tokenizer, 50_000)
        counts = []
        for seed in (1, 2, 3):  # the first fills pools and caches
            asyncio.run(soak(target, 500, seed=seed))
            eventually(lambda: live.server.idle and len(live.engine.bank.numbers) == 3)
            counts.append((tensors(), threading.active_count()))
    assert counts[2][0] - counts[1][0] <= 20  # a swap that left its adapter behind would leave 28, a request hundreds
    assert counts[2][1] - counts[1][1] <= 8
