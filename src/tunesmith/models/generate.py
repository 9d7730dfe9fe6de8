"""Batched greedy generation: a KV cache, left padding, longest prompts together, and what all prompts share read once.

Questions of one task mostly begin alike (the system message, few-shot examples). The shared prefix is run once and its
keys and values are repeated for every prompt of a batch; each row is then prefix, padding, rest, with the padding masked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MachineError
from tunesmith.out_of_memory import Halving, OutOfMemory, within_memory

if TYPE_CHECKING:
    import torch

    from tunesmith.models.forward import ModelForward


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end-of-sequence token and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id}
    ids |= set(configured if isinstance(configured, list) else [configured] if configured is not None else [])
    return sorted(ids)


def generate_greedy(
    forward: ModelForward,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
    halving: Halving | None = None,
    on_answers: Callable[[Sequence[int], Sequence[list[int]]], None] = lambda places, answers: None,
) -> list[list[int]]:
    """The greedy answer to each prompt, as token ids without the end token, in the prompts' order.

    After each batch `on_answers` is called with the places of its prompts and their answers, `on_progress` with the number of prompts done. Prompts are sorted by length, so that a
    batch holds little padding, and a row leaves its batch when its answer ends; results depend on neither beyond rounding.
    A batch that runs out of memory is halved, which `halving` remembers. Raises MachineError when one prompt is too much.
    """
    import torch

    ends = set(end_tokens(forward.base, tokenizer))
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shared = shared_prefix(prompts) if _can_share(forward) else 0
    prefix = None
    done = 0

    def read(ids: Sequence[int]) -> Any:
        return _read(forward, torch.tensor([ids]), torch.ones(1, len(ids)), None)[1]

    def generate(chunk: list[int]) -> list[list[int]]:
        return _generate_batch(forward, [prompts[index] for index in chunk], shared, prefix, ends, max_new_tokens)

    def refusal(index: int, reason: str) -> str:
        return (
            f"one prompt of {len(prompts[index]):,} tokens with up to {max_new_tokens:,} new ones ran out of memory: {reason}; "
            "shorten the prompt, leave it out, or lower evaluation.max_new_tokens; in training, evaluation.generate: false "
            "leaves the answers to `tunesmith eval`, where no optimizer needs memory"
        )

    was_training = forward.model.training
    forward.model.eval()
    try:
        with torch.inference_mode(), forward.autocast():
            if shared:
                prefix = within_memory(read, prompts[0][:shared])
                if isinstance(prefix, OutOfMemory):  # no prompt is shorter
                    raise MachineError(refusal(order[0], prefix.reason))
            for chunk, found in (halving or Halving()).run(chunks, generate, "answering {} prompts", refusal):
                for index, answer in zip(chunk, found, strict=True):
                    answers[index] = answer
                on_answers(chunk, found)
                done += len(chunk)
                on_progress(done)
    finally:
        forward.model.train(was_training)
    return answers


def _generate_batch(
    forward: ModelForward,
    prompts: Sequence[Sequence[int]],
    shared: int,
    prefix: Any,
    ends: set[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy answers to one batch. `prefix` is the KV cache of the first `shared` tokens of every prompt, or None."""
    import torch

    rests = [list(prompt[shared:]) for prompt in prompts]
    longest = max(map(len, rests))
    ids = torch.tensor([[0] * (longest - len(rest)) + rest for rest in rests])
    mask = torch.tensor([[1] * shared + [0] * (longest - len(rest)) + [1] * len(rest) for rest in rests])
    cache = copy.deepcopy(prefix)
    if cache is not None:
        cache.batch_repeat_interleave(len(rests))
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    hidden, cache = _read(forward, ids, mask, cache)
    for position in range(max_new_tokens):
        tokens = forward.logits(hidden).argmax(-1).tolist()
        for row, token in zip(alive, tokens, strict=True):
            if token not in ends:
                answers[row].append(token)
        going = [place for place, token in enumerate(tokens) if token not in ends]
        if not going or position == max_new_tokens - 1:
            break
        if len(going) < len(alive):
            alive = [alive[place] for place in going]
            tokens = [tokens[place] for place in going]
            mask = mask[going]
            cache.batch_select_indices(torch.tensor(going, device=forward.device))
        mask = torch.cat([mask, torch.ones(len(alive), 1, dtype=mask.dtype)], dim=1)
        hidden, cache = _read(forward, torch.tensor(tokens)[:, None], mask, cache)
    return answers


def _read(forward: ModelForward, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Run tokens (B, T) behind what `cache` holds; returns the last hidden states (B, hidden) and the longer cache.

    `mask` (B, cached + T) is 1 for tokens and 0 for padding; positions count tokens only.
    """
    from transformers import DynamicCache

    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = forward.decoder(
        input_ids=ids.to(forward.device),
        attention_mask=mask.long().to(forward.device),
        position_ids=positions.long().to(forward.device),
        past_key_values=DynamicCache(config=forward.base.config) if cache is None else cache,
        use_cache=True,
    )
    # Two axes, not (B, 1, hidden): on the CPU the head would copy its weight for every row of a strided 3-D input.
    return output.last_hidden_state[:, -1], output.past_key_values


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with. Less than the shortest prompt: each keeps a token of its own."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in lexicographic order these two differ earliest
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _can_share(forward: ModelForward) -> bool:
    """Padding behind the prefix would count towards a sliding window, and recurrent states cannot skip it."""
    config = forward.base.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    return getattr(config, "sliding_window", None) is None and set(layers) == {"full_attention"}
