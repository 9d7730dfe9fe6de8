"""The soak at length: a server in a process of its own, and 10,000 requests that ask, go away, send rubbish and swap adapters.

    python benchmarks/serving_soak.py OUT.json [--requests 10000] [--clients 16] [--device cpu] [--base FOLDER --adapter NAME=FOLDER ...]

Without --base, the tests' random model of two layers and two random adapters. Every answer is compared with what `generate` says one by
one, in fp32. Reports requests by kind, lost ones, wrong ones, and the server's resident memory behind each tenth; fails if any is lost or
wrong, or if the memory grew by more than 5% from the third tenth to the last, or the GPU's by more than 1%.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serving"))
from serving_models import make_adapter, one_by_one
from soak import Target, soak

from tiny import make_tiny_model
from tunesmith.hardware import probe

BODY_LIMIT = 100_000
TOKENS = 12


def growth_of(memory: list[float]) -> float:
    """From the third tenth to the last, as a share; 0 where nothing was measured."""
    settled = memory[2:] or memory
    return settled[-1] / settled[0] - 1 if settled else 0.0


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description="A long soak of the server.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", action="append", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base = options.base or make_tiny_model(Path(place) / "base")
        adapters = {name: Path(path) for name, _, path in (value.partition("=") for value in options.adapter)}
        if not adapters:
            adapters = {name: make_adapter(base, Path(place) / name, n) for n, name in enumerate(("cs", "hr"), 1)}
        tokenizer = AutoTokenizer.from_pretrained(base)
        questions = [f"{n} {'word ' * (n % 7)}?" for n in range(20)]
        prompts = [tokenizer(question)["input_ids"] for question in questions]
        answers = {
            name: dict(zip(questions, one_by_one(base, path, tokenizer, prompts, TOKENS, options.device), strict=True))
            for name, path in {"base": None, **adapters}.items()
        }
        command = [sys.executable, "-m", "tunesmith", "serve", str(base), "--name", "base", "--port", "0", "--json"]
        command += ["--dtype", "fp32", "--device", options.device, "--limit", f"body_bytes={BODY_LIMIT}"]
        for name, path in adapters.items():
            command += ["--adapter", f"{name}={path}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            said = ""
            for line in server.stdout:
                said += line
                if line.rstrip() == "}":
                    break
            url = json.loads(said)["url"].removesuffix("/v1")
            folders = {name: str(path) for name, path in adapters.items()}
            target = Target(url, answers, folders, TOKENS, server.pid, BODY_LIMIT, options.device.startswith("cuda"))
            start = time.monotonic()
            outcome = asyncio.run(soak(target, options.requests, options.clients))
            seconds = time.monotonic() - start
        finally:
            server.terminate()
            code = server.wait(60)
    growth, gpu_growth = growth_of(outcome.memory), growth_of(outcome.gpu_memory)
    result: dict[str, Any] = {
        "hardware": probe(options.device).describe(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "uvicorn")},
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "kinds": dict(outcome.kinds),
        "lost": outcome.lost,
        "wrong": outcome.wrong,
        "memory_mb": [round(mb, 1) for mb in outcome.memory],
        "memory_growth": round(growth, 4),
        "gpu_memory_mb": [round(mb, 1) for mb in outcome.gpu_memory],
        "gpu_memory_growth": round(gpu_growth, 4),
        "exit_code": code,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    sys.exit(1 if outcome.lost or outcome.wrong or growth > 0.05 or gpu_growth > 0.01 or code else 0)


if __name__ == "__main__":
    main()
