"""Batched greedy generation: a KV cache, left padding, longest prompts together, and what all prompts share read once.

Questions of one task mostly begin alike (the system message, few-shot examples). The shared prefix is run once and its
keys and values are repeated for every prompt of a batch; each row is then prefix, padding, rest, with the padding masked.

There are two ways to decode. On a GPU, where launching takes most of the time, a model with plain attention decodes in fixed
places, as CUDA graphs (models/decode_graphs.py). Elsewhere the cache grows with the answers, and a row leaves its batch when
its answer ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.errors import MachineError
from tunesmith.out_of_memory import Halving, OutOfMemory, within_memory

if TYPE_CHECKING:
    import torch

    from tunesmith.models.decode_graphs import StaticDecoder
    from tunesmith.models.forward import ModelForward

Decoding = Literal["auto", "growing", "static", "graphs"]
"""How to decode: with a cache that grows, in fixed places launch by launch or as CUDA graphs, or as fits the device."""

CPU_BATCH, MAX_BATCH = 16, 1024
"""Prompts at once by default: on the CPU, and at most on a GPU, which has enough to do with them."""

READ_TOKENS = 32_768
"""Prompt tokens that decoding in fixed places reads at once, padding included: a GPU does not wait for Python with so many."""

SHARE_OF_FREE_MEMORY = 0.5
"""What a batch may take by default of the memory that is free: the rest is for what is not reckoned with."""


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end-of-sequence token and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id}
    ids |= set(configured if isinstance(configured, list) else [configured] if configured is not None else [])
    return sorted(ids)


def cache_bytes_per_token(config: Any) -> int:
    """Bytes of keys and values in 16 bits, of one token in all layers: 2 x layers x key heads x head size x 2."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(4 * text.num_hidden_layers * groups * head_size)


def batch_size_for(
    forward: ModelForward,
    asked: int | Literal["auto"],
    longest: int,
    max_new_tokens: int = 0,
    in_parts: bool = False,
) -> int:
    """`evaluation.batch_size` as a number. `auto` is 16 on the CPU; on a GPU as many texts as half of the free memory holds.

    A power of two, at most 1,024, for texts of at most `longest` tokens. A text takes its keys and values with room for its
    answer, those of the text once more while it is read, and one row of logits (in 16 and 32 bits). Reading takes some 16
    hidden and 6 MLP vectors a token in 16 bits: of all texts of a batch, or with `in_parts` of 32,768 tokens at a time.
    """
    import torch

    if asked != "auto":
        return asked
    if not forward.device.startswith("cuda"):
        return CPU_BATCH
    config = forward.base.config.get_text_config()
    reserved = torch.cuda.memory_reserved(forward.device)
    free, total = torch.cuda.mem_get_info(forward.device)
    share = torch.cuda.get_per_process_memory_fraction(forward.device)  # less than all under memory.limit_gb
    free = min(free, int(total * share) - reserved)
    free += reserved - torch.cuda.memory_allocated(forward.device)
    width = 1 if forward.dtype != "fp32" else 2
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    token = 2 * (16 * config.hidden_size + 6 * inner) * width
    row = cache_bytes_per_token(config) * (2 * longest + max_new_tokens) * width + 6 * config.vocab_size
    if not in_parts:
        row += longest * token
    fitting = int((SHARE_OF_FREE_MEMORY * free - (READ_TOKENS * token if in_parts else 0)) // row)
    return min(MAX_BATCH, 1 << max(0, fitting.bit_length() - 1)) if fitting > 0 else 1


def generate_greedy(
    forward: ModelForward,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int | Literal["auto"] = "auto",
    on_progress: Callable[[int], None] = lambda done: None,
    halving: Halving | None = None,
    on_answers: Callable[[Sequence[int], Sequence[list[int]]], None] = lambda places, answers: None,
    decoding: Decoding = "auto",
) -> list[list[int]]:
    """The greedy answer to each prompt, as token ids without the end token, in the prompts' order.

    After each batch `on_answers` is called with the places of the prompts that are done and their answers, and `on_progress`
    with the number of prompts done, which it is also told in between. Prompts are sorted by length, so that a
    batch holds little padding; results do not depend on batches beyond rounding. A batch that runs out of memory is halved,
    which `halving` remembers; its `warn` is also told where a CUDA graph was wanted and could not be captured. Nothing of the
    graphs outlives the call. Raises MachineError when one prompt is too much.
    """
    import torch

    if not prompts:
        return []
    halving = halving or Halving()
    ends = end_tokens(forward.base, tokenizer)
    decoder = _static_decoder(forward, ends, decoding, halving.warn)
    size = batch_size_for(forward, batch_size, max(map(len, prompts)), max_new_tokens, in_parts=decoder is not None)
    answers: list[list[int]] = [[] for _ in prompts]
    shared = shared_prefix(prompts) if can_share_prefix(forward) else 0
    prefix = None
    done = 0

    def read(ids: Sequence[int]) -> Any:
        return _read(forward, torch.tensor([ids]), torch.ones(1, len(ids)), None)[1]

    def generate(chunk: list[int]) -> list[tuple[list[int], bool]]:
        rests = [[*prompts[index][shared:], *answers[index]] for index in chunk]
        if decoder is None:
            return [
                (answer, True) for answer in _generate_batch(forward, rests, shared, prefix, set(ends), max_new_tokens)
            ]
        budgets = [max_new_tokens - len(answers[index]) for index in chunk]
        try:
            found = decoder.generate(
                rests,
                shared,
                budgets,
                lambda part: _read_prompts(forward, part, shared, prefix)[:2],
                len(chunks) > 1,
                lambda ended: on_progress(done + ended),
            )
        except (RuntimeError, MemoryError):
            decoder.drop()
            raise
        return [(answer.tokens, answer.ended) for answer in found]

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
                    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
                    raise MachineError(refusal(longest, prefix.reason))
            waiting = list(range(len(prompts)))
            while waiting:
                waiting.sort(key=lambda index: -len(prompts[index]) - len(answers[index]))
                chunks = _chunks(waiting, size, even=decoder is not None)
                waiting = []  # those whose batch stopped before them: asked again together, with what they have of an answer
                for chunk, batch in halving.run(chunks, generate, "answering {} prompts", refusal):
                    over: list[int] = []
                    for index, (answer, ended) in zip(chunk, batch, strict=True):
                        answers[index] += answer
                        (over if ended else waiting).append(index)
                    on_answers(over, [answers[index] for index in over])
                    done += len(over)
                    on_progress(done)
    finally:
        forward.model.train(was_training)
        if decoder is not None:
            decoder.close()
    return answers


def _chunks(order: list[int], size: int, even: bool) -> list[list[int]]:
    """Parts of at most `size`; with `even` all of the same size or one less, as a graph has one number of rows."""
    if even:
        size = -(-len(order) // -(-len(order) // size))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _static_decoder(
    forward: ModelForward, ends: list[int], decoding: Decoding, warn: Callable[[str], None]
) -> StaticDecoder | None:
    """The decoder in fixed places, or None for a cache that grows. Raises ValueError where one was asked for that cannot be."""
    if decoding == "growing" or (decoding == "auto" and not forward.device.startswith("cuda")):
        return None
    from tunesmith.models.decode_graphs import StaticDecoder, why_not_static

    reason = why_not_static(forward)
    if reason is None:
        return StaticDecoder(forward, ends, warn, graphs=decoding != "static")
    if decoding != "auto":
        raise ValueError(f"decoding={decoding!r}, but {reason}; use 'auto' or 'growing'")
    return None


def _read_prompts(
    forward: ModelForward, rests: Sequence[Sequence[int]], shared: int, prefix: Any
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Run `rests`, padded on the left, behind the `shared` tokens that `prefix` is the cache of (or None).

    Returns the last hidden states (B, hidden), the cache and its mask.
    """
    import torch

    longest = max(map(len, rests))
    ids = torch.tensor([[0] * (longest - len(rest)) + list(rest) for rest in rests])
    mask = torch.tensor([[1] * shared + [0] * (longest - len(rest)) + [1] * len(rest) for rest in rests])
    cache = copy.deepcopy(prefix)
    if cache is not None:
        cache.batch_repeat_interleave(len(rests))
    hidden, cache = _read(forward, ids, mask, cache)
    return hidden, cache, mask


def _generate_batch(
    forward: ModelForward,
    rests: Sequence[Sequence[int]],
    shared: int,
    prefix: Any,
    ends: set[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy answers to one batch. `prefix` is the KV cache of the `shared` tokens before each of the `rests`, or None."""
    import torch

    answers: list[list[int]] = [[] for _ in rests]
    alive = list(range(len(rests)))
    hidden, cache, mask = _read_prompts(forward, rests, shared, prefix)
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


def can_share_prefix(forward: ModelForward) -> bool:
    """Padding behind the prefix would count towards a sliding window, and recurrent states cannot skip it."""
    config = forward.base.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    return getattr(config, "sliding_window", None) is None and set(layers) == {"full_attention"}
