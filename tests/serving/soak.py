"""Clients that ask, misbehave and swap adapters all at once, and what came of it. Used by the tests and by benchmarks/serving_soak.py.

Every question's greedy answer is known for the base and each adapter beforehand, one by one. `moving` is a name whose adapter is
replaced all the time: either adapter's answer is right for it, a mixture of both is not.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

ANSWERED = "answered"


@dataclass
class Outcome:
    """What happened: how many requests of each kind, which were lost or wrong, and the memory behind each tenth, in MB: of the
    server's process, and what is taken of the GPU.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    gpu_memory: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """A server to talk to: its url, the right answers by model and question, and folders for the name that moves."""

    url: str
    answers: dict[str, dict[str, str]]
    folders: dict[str, str]
    max_tokens: int
    pid: int | None = None
    body_limit: int = 2 << 20
    on_gpu: bool = False


async def soak(target: Target, requests: int, clients: int = 16, seed: int = 0) -> Outcome:
    """Send `requests` requests from `clients` clients: four in five are questions, the others misbehave or swap."""
    outcome = Outcome()
    places = iter(range(requests))
    limits = httpx.Limits(max_connections=clients * 2)
    async with httpx.AsyncClient(base_url=target.url, timeout=120, limits=limits) as http:
        await http.post("/v1/adapters", json={"name": "moving", "path": next(iter(target.folders.values()))})

        async def client(number: int) -> None:
            rng = random.Random(f"{seed}-{number}")
            for place in places:
                await _one(http, target, rng, outcome, place)
                if target.pid is not None and place % max(1, requests // 10) == requests // 10 - 1:
                    outcome.memory.append(resident_mb(target.pid))
                    if target.on_gpu:
                        outcome.gpu_memory.append(taken_mb())

        await asyncio.gather(*(client(number) for number in range(clients)))
    return outcome


async def _one(http: httpx.AsyncClient, target: Target, rng: random.Random, outcome: Outcome, place: int) -> None:
    model = rng.choice([*target.answers, "moving"])
    question = rng.choice(list(target.answers["base"]))
    ask = {"model": model, "prompt": question, "temperature": 0, "max_tokens": target.max_tokens}
    draw = rng.random()
    if draw < 0.5:
        response = await http.post("/v1/completions", json=ask)
        text = response.json()["choices"][0]["text"] if response.status_code == 200 else None
        _judge(target, outcome, place, model, question, text, f"status {response.status_code}: {response.text[:200]}")
    elif draw < 0.8:
        text, whole = "", False
        async with http.stream("POST", "/v1/completions", json={**ask, "stream": True}) as response:
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    whole = True
                elif line.startswith("data: "):
                    text += json.loads(line[6:])["choices"][0]["text"]
        _judge(target, outcome, place, model, question, text if whole else None, f"a torn stream: {text!r}")
    elif draw < 0.88:
        await _leave_early(http, ask, rng)
        outcome.kinds["disconnected"] += 1
    elif draw < 0.92:
        body = rng.choice(
            [b"{", b"[]", b"\xff", json.dumps({**ask, "top_k": 1}).encode(), b'{"model": 5}', b"[" * 5000]
        )
        response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        _expect(outcome, "bad body", place, response.status_code, 400)
    elif draw < 0.94:
        body = json.dumps({**ask, "prompt": "x" * (target.body_limit + 1)}).encode()
        response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        _expect(outcome, "oversized", place, response.status_code, 413)
    elif draw < 0.96:
        response = await http.post("/v1/completions", json={**ask, "model": "nobody"})
        _expect(outcome, "unknown model", place, response.status_code, 404)
    else:
        path = rng.choice(list(target.folders.values()))
        response = await http.post("/v1/adapters", json={"name": "moving", "path": path})
        _expect(outcome, "swap", place, response.status_code, 200)


async def _leave_early(http: httpx.AsyncClient, ask: dict[str, Any], rng: random.Random) -> None:
    """Go away while the answer is made, or before."""
    asking = asyncio.create_task(http.post("/v1/completions", json={**ask, "stream": rng.random() < 0.5}))
    await asyncio.sleep(rng.random() * 0.05)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


def _expect(outcome: Outcome, kind: str, place: int, found: int, wanted: int) -> None:
    outcome.kinds[kind] += 1
    if found != wanted:
        outcome.wrong.append(f"request {place} ({kind}): status {found}, expected {wanted}")


def _judge(
    target: Target, outcome: Outcome, place: int, model: str, question: str, text: str | None, said: str
) -> None:
    outcome.kinds[ANSWERED] += 1
    if text is None:
        outcome.lost.append(f"request {place} to {model}: {said}")
        return
    right = [target.answers[name][question] for name in ([model] if model != "moving" else target.folders)]
    if text not in right:
        outcome.wrong.append(f"request {place}: {model} said {text!r} to {question!r}")


def taken_mb() -> float:
    """What all processes together have taken of the GPU, in MB (2^20 bytes)."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) / (1 << 20)


def resident_mb(pid: int | str) -> float:
    """The memory of a process in MB (2^20 bytes): its resident pages, as Linux counts them."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:  # noqa: PTH123  # no file of ours
        return int(file.read().split()[1]) * 4096 / (1 << 20)
