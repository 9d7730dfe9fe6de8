"""Prove that a merged model computes what base and adapter do; and the merge in memory, for what cannot be streamed (streamed.py).

The merged weights are W + s·B·A rounded to the type that is asked for. Three things are told apart:

1. the merge: the logits of the merged weights in fp32, not rounded, are those of base and adapter apart (`MergeCheck.refuse`);
2. the files: every tensor of the written folder is the merged one rounded (`differs`), and its logits are those of these weights
   (`refuse_other_logits`), so that config.json says the same model;
3. the type: what rounding costs is no fault, but a fact that is told (`Rounding`), and refused where it takes the training away.

Logits are computed in fp32 whatever the weights' type: two bf16 forwards of one model differ by 3% (SmolLM2-135M), rounding the merged
weights to bf16 by 0.5% to 5%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.chat import ChatFormat
from tunesmith.errors import VerificationError
from tunesmith.export.skeleton import PEFT_PARTS
from tunesmith.export.tensors import PART, rounded
from tunesmith.files import atomic_folder
from tunesmith.hardware import ComputeDType, torch_dtype
from tunesmith.models.adapters import expert_paths
from tunesmith.types import Message

PROMPTS = (
    "What is the capital of France?",
    "I lost my card yesterday. What should I do now?",
    "Write a Python function that adds two numbers: def add(a, b):",
    "오늘 날씨가 어때요? 1, 2, 3, 5, 8, 13",
)

SAME = 1e-4
"""Largest ‖a - b‖ / ‖b‖ over the logits of two ways to compute one thing in fp32. SmolLM2-135M's merged and unmerged differ by 2e-6."""

OF_EFFECT = 0.05
"""And, of a merge, the largest share of what the adapter moves: an adapter that is scaled by 1.1 is off by 0.1 of it, however weak it is."""

NOISE = 2e-5
"""Share of the logits that any two ways may differ by; an adapter that moves them by less cannot be told from no adapter."""

SAID, REFUSED = 0.01, 0.25
"""Shares of KL(tuned ‖ base), what training changed, that rounding may undo: above the first it is said, above the second refused. KL is
quadratic in small changes of the logits (and does not see what is added to all of them), so that these are a tenth, and half, of the way
back that training came: beyond half the merged model would be nearer to random weights around the tuned ones than training was to its beginning.
A bf16 merge of SmolLM2-135M after 12 steps loses 0.06."""

QUIET = 1e-9
"""Nats a token: KL(tuned ‖ base) below it is what two ways to compute the same in fp32 may give, and there is no training to lose."""


OTHER_CONFIG = "the merged model's folder computes something else than its weights in the base's own model"

ROWS = 32
"""Tokens whose probabilities are in memory at once."""

SPARED = 0.05
"""Share of the tokens of a mixture of experts that may differ as they will: a router between two experts chooses by the rounding. One of
259 tokens of a tiny Mixtral in bf16 differed by 0.86, its 99th percentile by 0.01, and no difference over all tokens told that from a
wrong merge."""


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """How a model compares with base + adapter on the fixed prompts.

    `difference` is ‖model - tuned‖ / ‖tuned‖ and `effect` ‖tuned - base‖ / ‖tuned‖ over all logits; `kl` the mean
    KL(tuned ‖ model) in nats a token; `top1` the share of positions with the same most likely token. `lost` is KL(tuned ‖ model) / KL(tuned ‖ base).
    `judged` is the difference without the tokens that are spared (None: there are none), and `lost` is without them too.
    """

    difference: float
    effect: float
    kl: float
    top1: float
    tokens: int
    judged: float | None = None
    lost: float = 0.0

    @property
    def apart(self) -> float:
        """The difference that counts."""
        return self.difference if self.judged is None else self.judged

    @property
    def allowed(self) -> float:
        """The largest difference of a model that computes the same in fp32."""
        return min(SAME, max(NOISE, OF_EFFECT * self.effect))

    def passed(self) -> bool:
        """Whether it is the same computation in fp32."""
        return math.isfinite(self.effect) and self.apart <= self.allowed

    def refuse(self) -> None:
        """Raise VerificationError unless `passed`."""
        if not self.passed():
            raise VerificationError(
                f"the merged model does not compute what base + adapter do: logits differ by {self.difference:.3%} "
                f"(allowed: {self.allowed:.3%}; the adapter itself moves them by {self.effect:.2%}), top-1 agreement "
                f"{self.top1:.1%}; nothing was kept"
            )

    def refuse_rounding(self, dtype: ComputeDType) -> str | None:
        """Of a model that is right but for the rounding of its weights: raise VerificationError where that takes the training away; returns what
        to say where it takes some of it.
        """
        costs = f"KL {self.kl:.2e} nats a token from base + adapter, {self.lost:.1%} of what training changed"
        if not self.lost <= REFUSED:
            raise VerificationError(
                f"the merge is right, but its weights in {dtype} lose too much of the training: {costs} (allowed: {REFUSED:.0%}), top-1 "
                f"agreement {self.top1:.1%}; pass --dtype fp32; nothing was kept"
            )
        if self.lost > SAID:
            return f"rounding the merged weights to {dtype} costs {costs}; --dtype fp32 keeps it"
        return None


def refuse_other_logits(found: torch.Tensor, expected: torch.Tensor, spared: float, what: str) -> None:
    """Raise VerificationError unless two ways to compute the logits of the same weights agree."""
    check = compare_logits(found, expected, expected, spared)
    if not check.apart <= SAME:
        raise VerificationError(f"{what}: logits differ by {check.difference:.2%}; nothing was kept")


def differs(written: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether a tensor that was written is another one than `exact`, rounded to its type.

    Computed again on the same device the merge gives the same bits; where it does not (a GPU may add in another order), a value may be one
    rounding away, and hardly any may.
    """
    if written.shape != exact.shape:
        return True
    dtype = written.dtype
    pairs = zip(written.flatten().split(PART), exact.flatten().split(PART), strict=True)
    for part, values in pairs:  # in parts, as they were written: an embedding may be larger than what else is in memory
        expected = values.to(dtype)
        part = part.to(expected.device)
        if torch.equal(part, expected):
            continue
        a, b = part.float(), expected.float()
        step = torch.finfo(dtype).eps
        near = (a - b).abs() <= step * b.abs() + 4 * torch.finfo(torch.float32).eps * b.abs().max()
        if not bool(near.all()) or not bool((a - b).norm() <= max(step / 20, 5e-7) * b.norm()):
            return True
    return False


def refuse_tensor(name: str) -> None:
    """Raise VerificationError for a tensor that `differs`."""
    raise VerificationError(
        f"the merged model was not written as it was computed: {name} has other values in its file than base + adapter give; nothing was kept"
    )


def fixed_prompts(chat: ChatFormat) -> list[list[int]]:
    """The tokens of `PROMPTS`, each asked by a user."""
    return [list(chat.encode_prompt([Message("user", text)])) for text in PROMPTS]


def merge_adapter(
    model: Any,
    chat: ChatFormat,
    out: Path,
    dtype: ComputeDType,
    write_beside: Callable[[Path], None],
    reload: Callable[[Path], Any],
) -> tuple[MergeCheck, str | None]:
    """Merge the adapter of `model` (a PeftModel over a 16- or 32-bit base, in eval mode) and write it to `out`.

    `write_beside` adds what stands beside the weights (tokenizer, template), `reload` loads the written folder back. `model` is consumed: its base holds the merged weights afterwards. Returns the written model's
    check and what to say of it. Raises VerificationError, and leaves nothing at `out`, when the reloaded model does not compute what base + adapter did.
    """
    prompts = fixed_prompts(chat)
    stored = {PEFT_PARTS.sub(".", name): p.dtype for name, p in model.get_base_model().named_parameters()}
    spared = SPARED if expert_paths(model) else 0.0
    model.float()
    tuned = plain_logits(model, prompts)
    with model.disable_adapter():
        base = plain_logits(model, prompts)
    merged = model.merge_and_unload()
    compare_logits(plain_logits(merged, prompts), tuned, base, spared).refuse()
    for name, parameter in merged.named_parameters():
        parameter.data = rounded(name, parameter.data, stored.get(name, torch_dtype(dtype)))
    with atomic_folder(out) as folder:
        merged.save_pretrained(folder)
        write_beside(folder)
        read = reload(folder)
        expected = dict(merged.named_parameters())
        for name, parameter in read.named_parameters():
            if name not in expected or differs(parameter.detach(), expected[name].detach()):
                refuse_tensor(name)
        logits = plain_logits(read.float(), prompts)
        refuse_other_logits(logits, plain_logits(merged.float(), prompts), spared, OTHER_CONFIG)
        check = compare_logits(logits, tuned, base, spared)
        note = check.refuse_rounding(dtype)
    return check, note


def compare_logits(merged: torch.Tensor, tuned: torch.Tensor, base: torch.Tensor, spared: float = 0.0) -> MergeCheck:
    """Compare logits (tokens, vocabulary), all fp32; `spared` is the share of tokens that need not agree."""
    kl_T, trained_T = _kl(tuned, merged), _kl(tuned, base)
    return MergeCheck(
        difference=_distance(merged, tuned),
        effect=_distance(tuned, base, tuned),
        kl=float(kl_T.mean()),
        top1=float((merged.argmax(-1) == tuned.argmax(-1)).float().mean()),
        tokens=len(tuned),
        judged=_difference_of_most(merged, tuned, spared) if spared else None,
        lost=_lost(kl_T, trained_T, spared),
    )


def _lost(kl_T: torch.Tensor, trained_T: torch.Tensor, spared: float) -> float:
    """Σ kl / Σ trained over the tokens but the share `spared` where kl is largest; not a number where any is none."""
    if not bool(kl_T.isfinite().all()):
        return float("nan")
    kept = kl_T.argsort()[: len(kl_T) - int(spared * len(kl_T))]
    kl, trained = float(kl_T[kept].mean()), float(trained_T[kept].mean())
    return max(0.0, kl) / trained if trained > QUIET else 0.0


def _distance(one: torch.Tensor, other: torch.Tensor, by: torch.Tensor | None = None) -> float:
    """‖one - other‖ / ‖by‖ (of `other` where nothing is given), some tokens at a time."""
    parts = [(a - b).norm() for a, b in zip(one.split(ROWS), other.split(ROWS), strict=True)]
    return float(torch.stack(parts).norm() / (other if by is None else by).norm())


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference ‖ other) in nats a token, of logits (tokens, vocabulary) in fp32."""
    return max(0.0, float(_kl(reference, other).mean()))  # of the same logits rounding leaves -1e-9


def _kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ other) in nats of each token."""
    found = []
    for log_p, log_q in zip(reference.split(ROWS), other.split(ROWS), strict=True):  # in parts: a vocabulary is wide
        log_p, log_q = log_p.double().log_softmax(-1), log_q.double().log_softmax(-1)  # fp32's sums are off by 1e-7
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found)


def _difference_of_most(merged: torch.Tensor, tuned: torch.Tensor, spared: float) -> float:
    """‖merged - tuned‖ / ‖tuned‖ without the share `spared` of tokens that differ most; not a number where any is none."""
    differences = (merged - tuned).norm(dim=-1)
    if not bool(differences.isfinite().all()):
        return float("nan")
    kept = differences.argsort()[: len(tuned) - int(spared * len(tuned))]
    return float(differences[kept].norm() / tuned[kept].norm())


def plain_logits(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of all prompts, each run by itself, in fp32 on the CPU."""
    model.eval()
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=next(model.parameters()).device)
            rows.append(model(input_ids=ids).logits[0].float().cpu())
    return torch.cat(rows)
