"""What llama.cpp reads in a GGUF file beside its weights, compared with the source: template, tokens, ends of an answer, probabilities.

Every function raises VerificationError for what differs.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.data.chat import ChatFormat
from tunesmith.errors import DataError, VerificationError
from tunesmith.export.beside import DIFFICULT
from tunesmith.export.gguf import Exportable
from tunesmith.export.gguf_llama_cpp import Agreement, LlamaCpp, agreement
from tunesmith.export.gguf_reading import Written
from tunesmith.export.safetensors import PROMPTS, mean_kl
from tunesmith.types import Message

EXACT = 1e-6
"""Nats a token that llama.cpp may differ by where nothing is rounded: 2e-11 in SmolLM2-135M, 2e-8 in a Gemma, whose GELU is a table of f16."""

ROUNDING = 4.0
"""How many times what rounding the activations costs llama.cpp may differ by. Measured is 0.6 to 1.4 times (docs/gguf.md)."""

LORA_EXACT, LORA_SHARE = 2e-5, 0.02
"""What base and adapter may differ by: for the base's weights and activations, which are rounded to f16 (4e-6 nats in SmolLM2-135M), and of the
adapter's effect for its own."""

VISIBLE = 0.5
"""An error above this share of the adapter's effect is said: the type costs about as much as training changed."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the source computes after each token of the prompts: logits (tokens, vocabulary) with the adapter, and without it."""

    prompts: list[list[int]]
    logits: torch.Tensor
    base: torch.Tensor | None = None

    @property
    def effect(self) -> float | None:
        """Mean KL(source ‖ base) in nats a token: what the adapter changes. None without one."""
        return None if self.base is None else mean_kl(self.logits, self.base)

    def by_prompt(self, logits: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows of logits, split by prompt."""
        return logits.split([len(prompt) for prompt in self.prompts])


def compare_templates(opened: LlamaCpp, chat: ChatFormat, made: Exportable) -> None:
    """llama.cpp renders conversations to the source's strings (it leaves out a BOS that it adds itself)."""
    if not made.template:
        return
    question, answer = Message("user", "Is it?"), Message("assistant", "Yes.")
    for messages in ([question], [question, answer, question], [Message("system", "Be short."), question]):
        try:
            expected = chat.render(messages, True)
        except DataError:
            continue  # a template without system turns
        found = opened.render([{"role": one.role, "content": one.content} for one in messages])
        if found not in (expected, expected.removeprefix(chat.tokenizer.bos_token or "")):
            raise VerificationError(
                f"llama.cpp renders the chat template otherwise: {found!r}, expected {expected!r}; nothing was kept"
            )


def compare_tokens(opened: LlamaCpp, chat: ChatFormat, made: Exportable) -> None:
    """llama.cpp reads the source's token ids: in a difficult text, where control tokens are text too, and in prompts, where they are
    themselves; and puts the same tokens around a text.
    """
    tokenizer, leading = chat.tokenizer, made.vocabulary.leading
    difficult = DIFFICULT if made.vocabulary.marks else _without_marks(DIFFICULT)
    text = difficult + " ".join(str(token) for token in tokenizer.all_special_tokens if token != tokenizer.unk_token)
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    _same(plain, opened.tokenize(leading + text, control_tokens=False), tokenizer, "a difficult text")
    around = opened.tokenize(leading + "word", control_tokens=True, add_special=True)
    _same(tokenizer("word")["input_ids"], around, tokenizer, "a text with the tokens that are put around it")
    for content in (*PROMPTS, difficult):
        prompt = chat.render([Message("user", content)], True)
        expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        _same(expected, opened.tokenize(prompt, control_tokens=True), tokenizer, "a prompt")


def _without_marks(text: str) -> str:
    return "".join(one for one in text if not unicodedata.category(one).startswith("M"))


def _same(expected: list[int], found: list[int], tokenizer: Any, what: str) -> None:
    if expected == found:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    here = tokenizer.decode(expected[max(0, at - 3) : at + 3])
    raise VerificationError(
        f"llama.cpp reads other tokens in {what}: at token {at} (near {here!r}) it has {found[at : at + 4]}, the tokenizer "
        f"{expected[at : at + 4]}; nothing was kept"
    )


def compare_specials(opened: LlamaCpp, written: Written, tokenizer: Any, ends: Sequence[int]) -> None:
    """The file and llama.cpp have the tokenizer's BOS, EOS, padding and unknown tokens, and every id of `ends` ends an answer."""
    names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    for name, own in names.items():
        expected, found = getattr(tokenizer, f"{own}_token_id"), written.key(f"tokenizer.ggml.{name}_token_id")
        if found != expected:
            raise VerificationError(f"the file's {name} token is {found}, the tokenizer's {expected}; nothing was kept")
    for name, text in opened.special_tokens().items():
        own_text = getattr(tokenizer, f"{name}_token")
        if own_text is not None and text != own_text:
            raise VerificationError(
                f"llama.cpp's {name} token is {text!r}, the tokenizer's {own_text!r}; nothing was kept"
            )
    for number in ends:
        if not opened.ends(number):
            raise VerificationError(
                f"{tokenizer.convert_ids_to_tokens(number)!r} ({number}) ends an answer of the source, and llama.cpp goes on behind it; "
                "leave it out of eos_token_id in generation_config.json if it need not; nothing was kept"
            )


@dataclass(frozen=True, slots=True)
class Measured:
    """A file in llama.cpp: against the source, and against what the source computes with the file's weights."""

    found: Agreement
    max_kl: float
    type_kl: float
    own: float
    max_own: float
    warning: str | None


def measure(
    opened: LlamaCpp, written: Written, reference: Reference, exact: torch.Tensor, rounds: torch.Tensor, name: str
) -> Measured:
    """Compare probabilities. `exact` is what the source computes with the file's weights, `rounds` the same with activations rounded.

    llama.cpp may differ from `exact` by `EXACT` + `ROUNDING` · KL(exact ‖ rounds), and from the source by no more than both parts of the way
    explain: √KL adds up as distances do where they are small, so (√type + √own)².
    """
    rows = [opened.log_probabilities(ids) for ids in reference.prompts]
    own = agreement(reference.by_prompt(exact), rows)
    type_kl, max_own = mean_kl(reference.logits, exact), EXACT + ROUNDING * mean_kl(exact, rounds)
    if not own.kl <= max_own:
        raise VerificationError(
            f"{name}: llama.cpp does not compute what the source does with the file's own weights: KL {own.kl:.3g} nats a token (allowed: "
            f"{max_own:.2g}), top-1 agreement {own.top1:.1%} over {own.tokens} tokens; nothing was kept"
        )
    found = agreement(reference.by_prompt(reference.logits), rows)
    max_kl = (math.sqrt(max(type_kl, 0.0)) + math.sqrt(max_own)) ** 2
    if not found.kl <= max_kl:
        raise VerificationError(
            f"{name}: llama.cpp is further from the source than the type explains: KL {found.kl:.3g} nats a token (allowed: {max_kl:.2g}); "
            "nothing was kept"
        )
    return Measured(found, max_kl, type_kl, own.kl, max_own, warning_of(name, found.kl, reference, exact))


def warning_of(name: str, kl: float, reference: Reference, exact: torch.Tensor) -> str | None:
    """What to say of a file whose error, `kl`, is near or above the adapter's effect; `exact` is what the source computes with its weights."""
    effect = reference.effect
    if effect is None or reference.base is None or kl < VISIBLE * effect:
        return None
    if mean_kl(reference.base, exact) < mean_kl(reference.logits, exact):
        return (
            f"{name}: the file is nearer to the base than to what was trained: this type's steps are larger than most changes ({kl:.2g} nats a token "
            f"from what was trained, which is {effect:.2g} from the base); choose a finer type"
        )
    return (
        f"{name}: this type's error ({kl:.2g} nats a token) is {'larger than' if kl > effect else 'near'} what training changed ({effect:.2g}); "
        "a finer type keeps more of it"
    )


def measure_lora(opened: LlamaCpp, reference: Reference, name: str) -> tuple[Agreement, float, str | None]:
    """Compare an adapter over its base in f16 with the source, and whether it can be told from the base. Also gives the bound and a warning."""
    rows = [opened.log_probabilities(ids) for ids in reference.prompts]
    found = agreement(reference.by_prompt(reference.logits), rows)
    effect = reference.effect or 0.0
    allowed = LORA_EXACT + LORA_SHARE * effect
    if not found.kl <= allowed:
        raise VerificationError(
            f"{name}: base and adapter in llama.cpp do not compute what the source does: KL {found.kl:.3g} nats a token (allowed: "
            f"{allowed:.2g}; the adapter itself changes {effect:.2g}); nothing was kept"
        )
    if allowed >= effect:
        return (
            found,
            allowed,
            f"{name}: the adapter changes too little ({effect:.2g} nats a token) to be seen in llama.cpp",
        )
    return found, allowed, None
