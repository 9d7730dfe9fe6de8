"""A GGUF file in llama.cpp: what it renders, which tokens it reads, which probabilities it gives.

llama.cpp comes as the `xllamacpp` wheel (MIT), whose server runs inside this process and answers on 127.0.0.1. Keys and values are kept
in fp32, so that what differs from the source is the file's type and llama.cpp's own arithmetic (activations in f16 with f16 weights,
in blocks of 8 bits with quantized ones).
"""

from __future__ import annotations

import json
import math
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import MachineError, VerificationError
from tunesmith.export.gguf_types import NEEDS_GGUF

CANDIDATES = 512
"""How many of the likeliest tokens llama.cpp is asked for at each position; the others count as one. All of 49,152 take 1.2 s."""

SPEED_TOKENS = 32
"""Tokens generated to measure the speed."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a file's probabilities agree with the source's on the verification's prompts.

    `kl` is the mean KL(source ‖ file) in nats a token, over the `CANDIDATES` likeliest tokens and all others as one (so never more
    than the KL over all tokens, but for what `agreement` says); `top1` the share of positions with the same likeliest token.
    """

    kl: float
    top1: float
    tokens: int


class LlamaCpp:
    """A loaded GGUF file; close it when done. Raises MachineError without the wheel, VerificationError for a file that does not load."""

    def __init__(self, path: Path, context: int = 512, adapter: Path | None = None):
        try:
            import xllamacpp
        except ImportError as error:
            raise MachineError(f"a GGUF file is verified in llama.cpp; {NEEDS_GGUF}") from error
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.fit_params = False
        params.warmup = False
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._key = secrets.token_hex(16)  # others on this machine, and pages in its browser, get no answer
        params.api_keys = [self._key]
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            # The library says no more than that; llama.cpp's own lines go to a log that is off.
            what = f"{path.name}, a GGUF of the base, with {adapter.name} on it" if adapter else path.name
            way_out = "; export the merged model instead (without --lora)" if adapter else ""
            raise VerificationError(f"llama.cpp cannot load {what} ({error}); nothing was kept{way_out}") from error
        # Closing a server whose loop has not begun yet waits forever; once it has answered, the loop runs.
        self._complete([0], n_predict=1)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._server = None

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The chat template over `messages`, with the assistant's turn begun."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def tokenize(self, text: str, control_tokens: bool, add_special: bool = False) -> list[int]:
        """Token ids. `control_tokens`: the strings of control tokens in the text are those tokens, else plain text."""
        asked = {"content": text, "add_special": add_special, "parse_special": control_tokens}
        return [int(number) for number in self._post("/tokenize", asked)["tokens"]]

    def log_probabilities(self, ids: Sequence[int]) -> list[dict[int, float]]:
        """After each of `ids`, the log probabilities of the `CANDIDATES` likeliest next tokens."""
        rows = []
        # The answer is forced to be a letter: of an end token, or half a character, the server shows no probabilities. What it shows
        # are the model's own, before any bias.
        letter = [[self.tokenize("a", control_tokens=False)[-1], 1000.0]]
        settings = {
            "n_predict": 1,
            "n_probs": CANDIDATES,
            "cache_prompt": True,
            "logit_bias": letter,
            "ignore_eos": True,
        }
        for end in range(1, len(ids) + 1):
            answer = self._complete(list(ids[:end]), **settings)
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            rows.append({int(one["id"]): float(one["logprob"]) for one in top})
        return rows

    def ends(self, token: int) -> bool:
        """Whether an answer ends with this token: it is made the likeliest by far, and generation stops or goes on."""
        answer = self._complete([token], n_predict=2, logit_bias=[[token, 10000.0]])
        return answer["choices"][0]["finish_reason"] == "stop"

    def special_tokens(self) -> dict[str, str]:
        """The text of the tokens that begin and end a sequence, by GGUF's names (`bos`, `eos`), as llama.cpp has them."""
        found = self._get("/props")
        return {"bos": str(found["bos_token"]), "eos": str(found["eos_token"])}

    def speed(self, ids: Sequence[int]) -> float:
        """Tokens a second of greedy generation behind `ids`, one answer at a time, on this machine's CPU."""
        self._complete(list(ids), n_predict=1, cache_prompt=True)
        started = time.perf_counter()
        answer = self._complete(list(ids), n_predict=SPEED_TOKENS, cache_prompt=True, ignore_eos=True)
        return float(answer["usage"]["completion_tokens"] / (time.perf_counter() - started))

    def _complete(self, prompt: list[int], **settings: Any) -> dict[str, Any]:
        answer = self._server.handle_completions({"prompt": prompt, "temperature": 0, **settings})
        if "choices" not in answer:
            raise VerificationError(f"llama.cpp gives no answer: {answer.get('error', answer)}")
        return dict(answer)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._ask(path, json.dumps(body).encode())

    def _get(self, path: str) -> dict[str, Any]:
        return self._ask(path, None)

    def _ask(self, path: str, data: bytes | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._server.listening_address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            raise VerificationError(f"llama.cpp refuses {path}: {error.read().decode(errors='replace')}") from error


def agreement(source: Sequence[torch.Tensor], found: Sequence[Sequence[dict[int, float]]]) -> Agreement:
    """Compare logits (positions, vocabulary) of each prompt with llama.cpp's log probabilities at the same positions.

    The server divides by a sum of exponentials that it adds up one after another in fp32, which for V tokens may be too small by a share of
    V · 2⁻²⁴: all its probabilities are too large by that (1.4e-4 in SmolLM2, which seemed 3.5e-5 nats). So the mass of the shown tokens counts as
    right where it is within that share; how the tokens share it is compared exactly.
    """
    total, same, count = 0.0, 0, 0
    for logits, rows in zip(source, found, strict=True):
        for expected, row in zip(logits.double().log_softmax(-1), rows, strict=True):
            ids = torch.tensor(list(row))
            given = torch.tensor(list(row.values()), dtype=torch.float64)
            kept = expected[ids]
            mass, shown = float(kept.exp().sum()), float(given.exp().sum())
            total += float((kept.exp() * ((kept - math.log(mass)) - (given - math.log(shown)))).sum())
            nearest = min(max(mass, shown * (1 - len(expected) * 2**-24)), shown)
            if len(row) < len(expected):
                total += _two_sided(mass, nearest)
            same += int(expected.argmax()) == max(row, key=row.__getitem__)
            count += 1
    return Agreement(total / count, same / count, count)


def _two_sided(p: float, q: float) -> float:
    """KL of two outcomes, of probability p and q; no share counts as less than 1e-12."""
    pairs = [(max(a, 1e-12), max(b, 1e-12)) for a, b in ((p, q), (1 - p, 1 - q))]
    return sum(a * math.log(a / b) for a, b in pairs)
