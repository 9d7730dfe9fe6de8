"""Log-likelihoods of texts behind contexts: what a model gives each of several answers, without generating any.

    log p(continuation | context) = sum_i log softmax(logits(context, continuation[:i]))[continuation[i]]     in nats

(the `loglikelihood` of Brown et al. 2020 and of the lm-evaluation-harness). Three things are read once instead of often:

    what all contexts begin with   one row; its keys and values are repeated for every batch
    a context                      one row, however many continuations it has; its last position scores the first token of each,
                                   so that choices of one token (letters) cost nothing beyond the context
    a continuation                 a row behind the cache of its context; continuations that differ in their last token alone
                                   share one

Rows are padded on the right: no token sees padding. Only positions that predict a token of a continuation pass through the
head, HEAD_ROWS of them at a time, and their log-softmax is fp32 whatever the compute type.

Padding behind a cache would count towards a sliding window, and recurrent states cannot skip it: such models read each row
whole, context and continuation, without a cache; rows that are equal are still read once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.errors import MachineError, ModelError
from tunesmith.models.generate import batch_size_for, can_share_prefix, shared_prefix
from tunesmith.out_of_memory import Halving, OutOfMemory, within_memory

if TYPE_CHECKING:
    import torch

    from tunesmith.models.forward import ModelForward

HEAD_ROWS = 256
"""Positions whose logits exist at once: 150 MB of fp32 for a vocabulary of 150,000."""

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of what continues it."""

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model gives a continuation of `tokens` tokens behind its context.

    `total` is the sum of their log-probabilities in nats. `greedy`: whether each was the model's first choice, so that
    greedy decoding of `tokens` tokens gives this continuation and no other. `greedy_prefix` is how many of its first
    tokens greedy decoding gives before it goes another way.
    """

    total: float
    tokens: int
    greedy: bool
    greedy_prefix: int


def log_likelihoods(
    forward: ModelForward,
    requests: Sequence[Request],
    batch_size: int | Literal["auto"],
    on_progress: Callable[[int], None] = lambda done: None,
    halving: Halving | None = None,
) -> list[Likelihood]:
    """The likelihood of each continuation behind its context, in the requests' order.

    An empty context is replaced by the model's beginning-of-sequence token, or its end-of-sequence token where it has none:
    nothing else could predict the first token. An empty continuation has the log-probability 0. `batch_size` is how many
    rows are run at once (`auto`: generate.batch_size_for). `on_progress` is called with the number of requests done after each batch. Results depend on how
    requests are batched by rounding alone. A batch that runs out of memory is halved, which `halving` remembers. Raises
    MachineError when one request is too much, ModelError for an empty context of a model without either token.
    """
    import torch

    whole = [(tuple(context) or start_token(forward), tuple(continuation)) for context, continuation in requests]
    found = [Likelihood(0.0, 0, True, 0) for _ in whole]
    asked = [index for index, (_, continuation) in enumerate(whole) if continuation]
    cached = can_share_prefix(forward)
    # Longest first: what does not fit shows at once, and rows of about one length are read together.
    longest: dict[Tokens, int] = {}
    for index in asked:
        context, continuation = whole[index]
        longest[context] = max(longest.get(context, 0), len(context) + len(continuation))
    order = sorted(asked, key=lambda index: (-longest[whole[index][0]], whole[index][0], -len(whole[index][1])))
    size = batch_size_for(forward, batch_size, max(longest.values(), default=1))
    chunks = _chunks(order, whole, size)
    shared = shared_prefix(list({whole[index][0] for index in asked})) if cached else 0
    prefix = None
    done = len(whole) - len(asked)

    def read_prefix(ids: Tokens) -> Any:
        return _read(forward, [ids], torch.ones(1, 0), _new_cache(forward))[1]

    def score(chunk: list[int]) -> list[Likelihood]:
        given = [whole[index] for index in chunk]
        return _score_cached(forward, given, shared, prefix) if cached else _score_whole(forward, given)

    def refusal(index: int, reason: str) -> str:
        context, continuation = whole[index]
        return (
            f"one text of {len(context) + len(continuation):,} tokens, whose last {len(continuation):,} are scored, ran out of "
            f"memory: {reason}; shorten it or leave it out"
        )

    was_training = forward.model.training
    forward.model.eval()
    try:
        # Not inference_mode: the fused engine keeps operands of a forward, and training goes on with them.
        with torch.no_grad(), forward.autocast():
            if shared:
                prefix = within_memory(read_prefix, whole[order[0]][0][:shared])
                if isinstance(prefix, OutOfMemory):  # no request is shorter
                    raise MachineError(refusal(order[0], prefix.reason))
            for chunk, likelihoods in (halving or Halving()).run(chunks, score, "scoring {} texts", refusal):
                for index, likelihood in zip(chunk, likelihoods, strict=True):
                    found[index] = likelihood
                done += len(chunk)
                on_progress(done)
    finally:
        forward.model.train(was_training)
    return found


def start_token(forward: ModelForward) -> Tokens:
    """What stands for an empty context: the model's beginning-of-sequence token, else its (first) end-of-sequence token."""
    config = forward.base.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, list):
            token = next(iter(token), None)
        if token is not None:
            return (int(token),)
    raise ModelError(
        "a text without a context cannot be scored: the model's config has neither bos_token_id nor eos_token_id to put before "
        "it; set one in its config.json, or give the text a context"
    )


def _chunks(order: Sequence[int], requests: Sequence[tuple[Tokens, Tokens]], batch_size: int) -> list[list[int]]:
    """`order` in parts of at most `batch_size` rows. A context's requests stay together unless they alone are more."""
    chunks: list[list[int]] = []
    rows = 0
    for group in _groups(order, lambda index: requests[index][0]):
        parts = _groups(group, lambda index: requests[index][1][:-1])  # each is one row
        if chunks and rows + len(parts) <= batch_size:
            chunks[-1] += group
            rows += len(parts)
            continue
        for start in range(0, len(parts), batch_size):
            taken = parts[start : start + batch_size]
            chunks.append([index for part in taken for index in part])
            rows = len(taken)
    return chunks


def _groups(items: Iterable[int], key: Callable[[int], Tokens]) -> list[list[int]]:
    """Items by their key, in order of each key's first item."""
    groups: dict[Tokens, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _score_cached(
    forward: ModelForward, requests: Sequence[tuple[Tokens, Tokens]], shared: int, prefix: Any
) -> list[Likelihood]:
    """Scores behind a cache. `prefix` holds the first `shared` tokens of every context, or is None."""
    import torch

    contexts = list(dict.fromkeys(context for context, _ in requests))
    cache = copy.deepcopy(prefix) if prefix is not None else _new_cache(forward)
    if prefix is not None:
        cache.batch_repeat_interleave(len(contexts))
    rests = [context[shared:] for context in contexts]
    hidden, cache, mask = _read(forward, rests, torch.ones(len(rests), shared), cache)
    last = hidden[range(len(rests)), [len(rest) - 1 for rest in rests]]
    # The rows of continuations: those with the same context and the same tokens but for the last, which is not read.
    rows = list(dict.fromkeys((context, continuation[:-1]) for context, continuation in requests if continuation[1:]))
    behind = hidden[:0]
    number_of = {context: number for number, context in enumerate(contexts)}
    if rows:
        owners = [number_of[context] for context, _ in rows]
        if owners != list(range(len(contexts))):
            cache.batch_select_indices(torch.tensor(owners, device=forward.device))
            mask = mask[owners]
        behind, _, _ = _read(forward, [read for _, read in rows], mask, cache)
    row_of = {row: number for number, row in enumerate(rows)}
    pieces = []
    for context, continuation in requests:
        pieces.append(last[number_of[context]][None])
        if read := continuation[:-1]:
            pieces.append(behind[row_of[context, read], : len(read)])
    return _likelihoods(forward, torch.cat(pieces), [continuation for _, continuation in requests])


def _score_whole(forward: ModelForward, requests: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
    """Scores of whole rows, without a cache."""
    import torch

    row_of = {row: number for number, row in enumerate(dict.fromkeys(_row(*request) for request in requests))}
    hidden, _, _ = _read(forward, list(row_of), torch.ones(len(row_of), 0), None)
    pieces = [
        hidden[row_of[_row(context, continuation)], len(context) - 1 : len(context) + len(continuation) - 1]
        for context, continuation in requests
    ]
    return _likelihoods(forward, torch.cat(pieces), [continuation for _, continuation in requests])


def _row(context: Tokens, continuation: Tokens) -> Tokens:
    return context + continuation[:-1]


def _likelihoods(forward: ModelForward, hidden: torch.Tensor, continuations: Sequence[Tokens]) -> list[Likelihood]:
    """`hidden` (N, hidden) predicts the N tokens of all continuations, one after the other."""
    import torch

    targets = torch.tensor([token for continuation in continuations for token in continuation], device=hidden.device)
    logs, hits = [], []
    for start in range(0, len(hidden), HEAD_ROWS):
        logits = forward.logits(hidden[start : start + HEAD_ROWS])
        aimed = targets[start : start + HEAD_ROWS]
        logs.append(logits.gather(-1, aimed[:, None])[:, 0] - logits.logsumexp(-1))
        hits.append(logits.argmax(-1) == aimed)
    log, hit = torch.cat(logs).double().cpu(), torch.cat(hits).cpu()
    found, start = [], 0
    for continuation in continuations:
        end = start + len(continuation)
        prefix = int(hit[start:end].long().cumprod(0).sum())
        total = float(log[start:end].sum())
        found.append(Likelihood(total, len(continuation), prefix == len(continuation), prefix))
        start = end
    return found


def _new_cache(forward: ModelForward) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=forward.base.config)


def _read(
    forward: ModelForward, rows: Sequence[Tokens], before: torch.Tensor, cache: Any
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Run rows of tokens, padded on the right to T, behind what `cache` holds (None: no cache is made).

    `before` (B, cached) is the mask of what it holds. Returns the hidden states (B, T, hidden), the longer cache and its mask
    (B, cached + T). Positions count tokens only.
    """
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.cat([before, torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])], dim=1)
    positions = (mask.cumsum(-1) - 1)[:, -longest:]
    output = forward.decoder(
        input_ids=ids.to(forward.device),
        attention_mask=mask.long().to(forward.device),
        position_ids=positions.long().to(forward.device),
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state, cache, mask
