"""Objectives that compare sequences: DPO, ORPO, SimPO, KTO.

Each works on what a sequence's supervised tokens (its answer) sum to,

    log π(y|x) = Σ_t log p(y_t | x, y_<t)

with all sequences of a micro-batch packed end to end: a document sees itself only, so there is no padding and the sums are those of
each sequence alone. The head runs on the answers' rows, in chunks. `log ρ(y|x) = log π(y|x) - log π_ref(y|x)`, where the
reference is the model as it stands when training begins: its log-probabilities are computed once, before the first step,
so that no second model, and in a step no second forward, is needed. Left out: computing the prompt that the two answers
share once, for which attention would have to know trees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from tunesmith.config import ObjectiveName, RunConfig
from tunesmith.models.forward import ModelForward
from tunesmith.out_of_memory import Halving
from tunesmith.training.objectives import (
    Objective,
    Parts,
    StepTools,
    SupervisedFineTuning,
    log_probabilities,
    rows_at,
)
from tunesmith.training.passes import parts_of, without_gradients
from tunesmith.types import Batch, BatchSequences, Progress, Term, TokenizedExample, TokenizedPair, no_progress

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
METRICS: dict[ObjectiveName, tuple[str, ...]] = {
    "sft": (),
    "cpt": (),
    "dpo": PAIR_METRICS,
    "orpo": ("log_odds_ratio", *PAIR_METRICS),
    "simpo": PAIR_METRICS,
    "kto": ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"),
}
"""What each objective measures beside its loss, by TRL's names. `logps` are sums over an answer's tokens with each objective (TRL's of
ORPO and SimPO are means); KTO's margin is that of the means of the two kinds of rows."""


def objective_of(config: RunConfig) -> Objective:
    """The objective that a run minimises. Of plain text every token is supervised: `cpt` is the loss of `sft`."""
    settings, beta = config.objective, config.beta
    if settings.name == "dpo":
        return DirectPreference(beta, settings.loss, settings.label_smoothing, settings.nll_weight)
    if settings.name == "orpo":
        return OddsRatioPreference(beta)
    if settings.name == "simpo":
        return SimplePreference(beta, settings.gamma, settings.label_smoothing)
    if settings.name == "kto":
        return KahnemanTversky(beta, settings.desirable_weight, settings.undesirable_weight)
    return SupervisedFineTuning()


class DirectPreference(Objective):
    """DPO: with d = log ρ(y_w|x) - log ρ(y_l|x), the mean over pairs of

        sigmoid   -(1 - ε) log σ(β d) - ε log σ(-β d)      Rafailov et al. 2023, arXiv:2305.18290; ε: cDPO, Mitchell 2023
        hinge     max(0, 1 - β d)                           Zhao et al. 2023, arXiv:2305.10425 (SLiC)
        ipo       (d' - 1 / (2 β))²                         Azar et al. 2023, arXiv:2310.12036, eq. 17

    where d' has each log ρ divided by its answer's tokens (as the authors' results do, according to TRL). Plus `nll_weight` times the
    cross-entropy of the chosen answers' tokens, the mean over those tokens (Pang et al. 2024, arXiv:2404.19733).
    """

    needs_reference = True
    by_tokens = False

    def __init__(self, beta: float, loss: str = "sigmoid", label_smoothing: float = 0.0, nll_weight: float = 0.0):
        self.beta, self.loss, self.label_smoothing, self.nll_weight = beta, loss, label_smoothing, nll_weight

    def counts(self, examples: Iterable[TokenizedExample]) -> dict[str, int]:
        """Pairs, and the chosen answers' tokens."""
        pairs = [_pair(example) for example in examples]
        return {"pairs": len(pairs), "chosen_tokens": sum(pair.sequence(0).supervised for pair in pairs)}

    def terms(self, forward: ModelForward, batch: Batch) -> list[Term]:
        """The term `dpo`, `nll` if it is asked for, and metrics. Rewards are β log ρ."""
        compared = _compared(batch)
        logps_S = sequence_log_probabilities(forward, batch)
        ratios_S = logps_S - _reference(compared, batch)
        ratios = ratios_S
        if self.loss == "ipo":
            ratios = ratios_S / compared.num_supervised.clamp(min=1)
        margin_P = ratios[0::2] - ratios[1::2]
        if self.loss == "hinge":
            losses_P = torch.relu(1 - self.beta * margin_P)
        elif self.loss == "ipo":
            losses_P = (margin_P - 1 / (2 * self.beta)).square()
        else:
            losses_P = _smoothed(self.beta * margin_P, self.label_smoothing)
        terms = [Term("dpo", losses_P.sum(), batch.num_examples, unit="pairs")]
        if self.nll_weight:
            nll = -logps_S[0::2].sum()
            terms.append(Term("nll", nll, compared.first_supervised, self.nll_weight, unit="chosen_tokens"))
        return [*terms, *_metrics(self.beta * ratios_S, logps_S, batch)]


class OddsRatioPreference(Objective):
    """ORPO (Hong et al. 2024, arXiv:2403.07691): with the mean log-probability of an answer's tokens, p̄ = log π(y|x) / |y|, and
    log odds = p̄ - log(1 - exp p̄),

        mean over the tokens of prompt and chosen answer of their cross-entropy
        - β · mean over pairs of log σ(log odds(y_w|x) - log odds(y_l|x))

    The cross-entropy is that of the whole chosen sequence, as in the authors' code and TRL. There is no reference.
    """

    by_tokens = False

    def __init__(self, beta: float):
        self.beta = beta

    def counts(self, examples: Iterable[TokenizedExample]) -> dict[str, int]:
        """Pairs, and the chosen sequences' tokens but the first of each."""
        pairs = [_pair(example) for example in examples]
        return {"pairs": len(pairs), "chosen_tokens": sum(pair.first - 1 for pair in pairs)}

    def terms(self, forward: ModelForward, batch: Batch) -> list[Term]:
        """The terms `nll` and `orpo`, and metrics. Rewards are β p̄. The head runs once on each row that either needs."""
        compared = _compared(batch)
        rest, own = compared.first_rest, batch.supervised
        labels = torch.cat([batch.input_ids.reshape(-1).index_select(0, rest + 1), batch.supervised_labels])
        logps = log_probabilities(forward, rows_at(forward.hidden(batch), torch.cat([rest, own])), labels)
        rest_M, own_N = logps.split([len(rest), len(own)])
        logps_S = _sums(own_N, compared)
        mean_S = logps_S / compared.num_supervised.clamp(min=1)
        log_odds_S = log_odds(mean_S)
        difference_P = log_odds_S[0::2] - log_odds_S[1::2]
        tokens = len(rest) + compared.first_supervised
        return [
            Term("nll", -rest_M.sum() - logps_S[0::2].sum(), tokens, unit="chosen_tokens"),
            Term("orpo", -F.logsigmoid(difference_P).sum(), batch.num_examples, self.beta, unit="pairs"),
            Term("log_odds_ratio", difference_P.detach().sum(), batch.num_examples, 0.0, unit="pairs"),
            *_metrics(self.beta * mean_S, logps_S, batch),
        ]


def log_odds(mean_S: torch.Tensor) -> torch.Tensor:
    """p̄ - log(1 - exp p̄) of mean log-probabilities; of a certain answer, p̄ = 0, as of the next number below."""
    # 1 - exp p loses all digits where p is nearly 0: expm1 keeps them.
    return mean_S - torch.log(-torch.expm1(mean_S.clamp(max=-torch.finfo(torch.float32).tiny)))


class SimplePreference(Objective):
    """SimPO (Meng et al. 2024, arXiv:2405.14734): with p̄ as in ORPO, the mean over pairs of

        -(1 - ε) log σ(z) - ε log σ(-z),   z = β (p̄(y_w|x) - p̄(y_l|x)) - γ

    There is no reference.
    """

    by_tokens = False

    def __init__(self, beta: float, gamma: float, label_smoothing: float = 0.0):
        self.beta, self.gamma, self.label_smoothing = beta, gamma, label_smoothing

    def counts(self, examples: Iterable[TokenizedExample]) -> dict[str, int]:
        """Pairs."""
        return {"pairs": sum(1 for _ in examples)}

    def terms(self, forward: ModelForward, batch: Batch) -> list[Term]:
        """The term `simpo`, and metrics. Rewards are β p̄."""
        compared = _compared(batch)
        logps_S = sequence_log_probabilities(forward, batch)
        rewards_S = self.beta * logps_S / compared.num_supervised.clamp(min=1)
        losses_P = _smoothed(rewards_S[0::2] - rewards_S[1::2] - self.gamma, self.label_smoothing)
        return [
            Term("simpo", losses_P.sum(), batch.num_examples, unit="pairs"),
            *_metrics(rewards_S, logps_S, batch),
        ]


class KahnemanTversky(Objective):
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306): the mean over rows of

        w_d (1 - σ(β (log ρ(y|x) - z)))     for a desirable answer
        w_u (1 - σ(β (z - log ρ(y|x))))     for an undesirable one

    z estimates how far the model has gone from the reference, KL(π || π_ref), from answers to other prompts:
    max(0, mean of log ρ(y'|x)), over the whole step (in evaluation: all rows), on all ranks. A pair's first sequence is x and y, its second
    x and y'; the second ones run through the model once before the first backward, without gradients or dropout.
    """

    needs_reference = True
    by_tokens = False

    def __init__(self, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0):
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight
        self._kl: torch.Tensor | None = None

    def counts(self, examples: Iterable[TokenizedExample]) -> dict[str, int]:
        """Rows, and how many of them are desirable and undesirable."""
        labels = [example.desirable is not False for example in examples]
        return {"rows": len(labels), "desirable": sum(labels), "undesirable": len(labels) - sum(labels)}

    def begin_step(self, forward: ModelForward, parts: Parts, tools: StepTools) -> Parts:
        """Estimate z; the first sequences."""

        def ratios(batch: Batch) -> torch.Tensor:
            return (sequence_log_probabilities(forward, batch) - _reference(_compared(batch), batch)).sum()

        total = torch.zeros(2, device=forward.device)
        total[1].fill_(sum(map(len, parts)))  # assigning would wait for the device
        for found in tools.passes([[_pair(example).sequence(1) for example in part] for part in parts], ratios):
            total[0] += found
        total = tools.total(total)
        self._kl = (total[0] / total[1]).clamp(min=0)
        return [[_pair(example).sequence(0) for example in part] for part in parts]

    def terms(self, forward: ModelForward, batch: Batch) -> list[Term]:
        """The term `kto`, and metrics. Rewards are β log ρ."""
        compared = _compared(batch)
        assert self._kl is not None, "begin_step has not been called"
        kl = self._kl
        logps_S = sequence_log_probabilities(forward, batch)
        ratios_S = logps_S - _reference(compared, batch)
        good_S = compared.desirable
        sign_S = 2 * good_S - 1
        weight_S = self.desirable_weight * good_S + self.undesirable_weight * (1 - good_S)
        losses_S = weight_S * (1 - torch.sigmoid(self.beta * sign_S * (ratios_S - kl)))
        rewards_S = (self.beta * ratios_S).detach()
        rows, good = batch.num_examples, compared.num_desirable
        kinds = (("chosen", good_S, good, "desirable"), ("rejected", 1 - good_S, rows - good, "undesirable"))
        return [
            Term("kto", losses_S.sum(), rows, unit="rows"),
            Term("kl", kl * rows, rows, 0.0, unit="rows"),
            *(Term(f"rewards/{name}", (rewards_S * of).sum(), count, 0.0, unit) for name, of, count, unit in kinds),
            *(
                Term(f"logps/{name}", (logps_S.detach() * of).sum(), count, 0.0, unit)
                for name, of, count, unit in kinds
            ),
        ]


def sequence_log_probabilities(forward: ModelForward, batch: Batch) -> torch.Tensor:
    """log π of each sequence's supervised tokens, (S,) in fp32, of a batch whose sequences are compared."""
    rows_ND = rows_at(forward.hidden(batch), batch.supervised)
    return _sums(log_probabilities(forward, rows_ND, batch.supervised_labels), _compared(batch))


def reference_log_probabilities(
    forward: ModelForward,
    pairs: Sequence[TokenizedExample],
    config: RunConfig,
    pad_id: int,
    progress: Progress = no_progress,
    stage: str = "reference",
    halving: Halving | None = None,
) -> np.ndarray:
    """log π of both sequences of each pair under the model as it is, (pairs, 2) in fp32; without dropout or gradients.

    Micro-batches that run out of memory are halved, which `halving` tells. Raises MachineError when one pair is too much.
    """
    found = np.zeros((len(pairs), 2), dtype=np.float32)
    examples = list(pairs)
    place = {id(example): index for index, example in enumerate(examples)}
    done = 0
    progress(stage, 0, len(pairs))
    parts = parts_of(examples, config)
    for part, logps_S in without_gradients(
        forward, parts, config, pad_id, halving, partial(sequence_log_probabilities, forward), reference=True
    ):
        found[[place[id(example)] for example in part]] = logps_S.view(-1, 2).float().cpu().numpy()
        done += len(part)
        progress(stage, done, len(pairs))
    return found


def _sums(logps_N: torch.Tensor, compared: BatchSequences) -> torch.Tensor:
    """The log-probabilities of each sequence's supervised tokens, added up: (S,)."""
    sums_S = torch.zeros(len(compared.num_supervised), dtype=logps_N.dtype, device=logps_N.device)
    return sums_S.index_add(0, compared.of_supervised, logps_N)


def _smoothed(margin_P: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-(1 - ε) log σ(margin) - ε log σ(-margin)."""
    losses = -(1 - label_smoothing) * F.logsigmoid(margin_P)
    return losses - label_smoothing * F.logsigmoid(-margin_P) if label_smoothing else losses


def _metrics(rewards_S: torch.Tensor, logps_S: torch.Tensor, batch: Batch) -> list[Term]:
    """Means over pairs: rewards, their difference, how often the chosen one's is larger, and the log-probabilities."""
    rewards_S, logps_S = rewards_S.detach(), logps_S.detach()
    margin_P = rewards_S[0::2] - rewards_S[1::2]
    values = {
        "rewards/chosen": rewards_S[0::2],
        "rewards/rejected": rewards_S[1::2],
        "rewards/margins": margin_P,
        "rewards/accuracies": (margin_P > 0).float(),
        "logps/chosen": logps_S[0::2],
        "logps/rejected": logps_S[1::2],
    }
    return [Term(name, value.sum(), batch.num_examples, 0.0, unit="pairs") for name, value in values.items()]


def _pair(example: TokenizedExample) -> TokenizedPair:
    assert isinstance(example, TokenizedPair), f"{example.where}: not a pair"
    return example


def _compared(batch: Batch) -> BatchSequences:
    assert batch.compared is not None, "a batch of examples that nothing compares"
    return batch.compared


def _reference(compared: BatchSequences, batch: Batch) -> torch.Tensor:
    assert compared.reference is not None, f"{batch.rows[0]}: its log-probabilities before training are not known"
    return compared.reference
