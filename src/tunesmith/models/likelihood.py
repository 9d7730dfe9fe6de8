"""Log-likelihoods of given continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.models.forward import ModelForward
from tunesmith.out_of_memory import Halving

Request = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one continuation: the sum of its tokens' log-probabilities in nats, how many they are, and whether each was the likeliest."""

    total: float
    tokens: int
    greedy: bool


def log_likelihoods(
    forward: ModelForward,
    requests: Sequence[Request],
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
    halving: Halving | None = None,
) -> list[Likelihood]:
    """The likelihood of each continuation behind its context, both token ids, in the requests' order."""
    import torch

    found = []
    was_training = forward.model.training
    forward.model.eval()
    try:
        with torch.inference_mode(), forward.autocast():
            for done, (context, continuation) in enumerate(requests, 1):
                ids = torch.tensor([[*context, *continuation]], device=forward.device)
                hidden = forward.decoder(input_ids=ids, use_cache=False).last_hidden_state
                logits = forward.logits(hidden[0, len(context) - 1 : -1]).log_softmax(-1)
                targets = ids[0, len(context) :]
                total = logits.gather(1, targets[:, None]).sum().item()
                greedy = bool((logits.argmax(-1) == targets).all())
                found.append(Likelihood(total, len(continuation), greedy))
                on_progress(done)
    finally:
        forward.model.train(was_training)
    return found
