"""Prove that a merged model computes what base and adapter do; and the merge in memory, for what cannot be streamed (streamed.py).

The merged weights are W + s·B·A rounded to the base's type. Before anything is called done, the written folder is loaded
back and its logits on fixed prompts are compared with those of base and adapter apart. Logits are computed in fp32
whatever the weights' type: two bf16 forwards of one model differ by 3% (SmolLM2-135M), rounding its weights by 0.5%.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.chat import ChatFormat
from tunesmith.errors import VerificationError
from tunesmith.export.skeleton import PEFT_PARTS
from tunesmith.files import atomic_folder
from tunesmith.hardware import ComputeDType, torch_dtype
from tunesmith.models.adapters import expert_paths
from tunesmith.types import Message

"""What PEFT puts into the name of a base weight, for experts once for each parameter that it adapts."""

PROMPTS = (
    "What is the capital of France?",
    "I lost my card yesterday. What should I do now?",
    "Write a Python function that adds two numbers: def add(a, b):",
    "오늘 날씨가 어때요? 1, 2, 3, 5, 8, 13",
)

TOLERANCE: dict[ComputeDType, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Largest ‖merged - tuned‖ / ‖tuned‖ over the logits: about ten times what rounding the weights once costs."""

NOISE: dict[ComputeDType, float] = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
"""An adapter that moves the logits by more than this must be visible in the merged model."""


SPARED = 0.05
"""Share of the tokens of a mixture of experts that may differ as they will: a router between two experts chooses by the rounding. One of
259 tokens of a tiny Mixtral in bf16 differed by 0.86, its 99th percentile by 0.01, and no difference over all tokens told that from a
wrong merge."""


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """How the merged model compares with base + adapter on the fixed prompts.

    `difference` is ‖merged - tuned‖ / ‖tuned‖ and `effect` ‖tuned - base‖ / ‖tuned‖ over all logits; `kl` the mean
    KL(tuned ‖ merged) in nats a token; `top1` the share of positions with the same most likely token. `judged` is the difference without
    the tokens that are spared (None: there are none).
    """

    difference: float
    effect: float
    kl: float
    top1: float
    tokens: int
    judged: float | None = None

    def passed(self, dtype: ComputeDType) -> bool:
        """Within rounding of base + adapter, and, where the adapter does anything, nearer to it than to the base."""
        difference = self.difference if self.judged is None else self.judged
        visible = self.effect <= NOISE[dtype] or difference < 0.5 * self.effect
        return difference <= TOLERANCE[dtype] and visible

    def refuse(self, dtype: ComputeDType) -> None:
        """Raise VerificationError unless `passed`."""
        if not self.passed(dtype):
            raise VerificationError(
                f"the merged model does not compute what base + adapter do: logits differ by {self.difference:.2%} "
                f"(allowed: {TOLERANCE[dtype]:.2%}; the adapter itself moves them by {self.effect:.2%}), top-1 agreement "
                f"{self.top1:.1%}; nothing was kept"
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
) -> MergeCheck:
    """Merge the adapter of `model` (a PeftModel over a 16- or 32-bit base, in eval mode) and write it to `out`.

    `write_beside` adds what stands beside the weights (tokenizer, template), `reload` loads the written folder back. `model` is consumed: its base holds the merged weights afterwards. Raises
    VerificationError, and leaves nothing at `out`, when the reloaded model does not compute what base + adapter did.
    """
    prompts = fixed_prompts(chat)
    stored = {PEFT_PARTS.sub(".", name): p.dtype for name, p in model.get_base_model().named_parameters()}
    spared = SPARED if expert_paths(model) else 0.0
    model.float()
    tuned = plain_logits(model, prompts)
    with model.disable_adapter():
        base = plain_logits(model, prompts)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(stored.get(name, torch_dtype(dtype)))
    with atomic_folder(out) as folder:
        merged.save_pretrained(folder)
        write_beside(folder)
        check = compare_logits(plain_logits(reload(folder).float(), prompts), tuned, base, spared)
        check.refuse(dtype)
    return check


def compare_logits(merged: torch.Tensor, tuned: torch.Tensor, base: torch.Tensor, spared: float = 0.0) -> MergeCheck:
    """Compare logits (tokens, vocabulary), all fp32; `spared` is the share of tokens that need not agree."""
    return MergeCheck(
        difference=float((merged - tuned).norm() / tuned.norm()),
        effect=float((tuned - base).norm() / tuned.norm()),
        kl=mean_kl(tuned, merged),
        top1=float((merged.argmax(-1) == tuned.argmax(-1)).float().mean()),
        tokens=len(tuned),
        judged=_difference_of_most(merged, tuned, spared) if spared else None,
    )


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference ‖ other) in nats a token, of logits (tokens, vocabulary) in fp32."""
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


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
