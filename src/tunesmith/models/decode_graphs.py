"""Greedy decoding in fixed places, so that one step is the same launches every time and a CUDA graph can replay them.

A small model keeps the GPU waiting for Python: a step of a 30-layer model with LoRA is about 2,500 launches. What changes from
one step to the next therefore lies in tensors on the device: the token of each row, its position, the column of the cache that
is written next, which columns each row sees, which rows have ended. Keys and values (B, G, L, d) have room for the longest
prompt with its answer from the start; a step reads the columns that are used, rounded up to a few lengths, and there is one
graph for each such length and number of rows. Of each the first step goes launch by launch (kernels are compiled and libraries
choose), the second is captured, the others are replayed. Rows that have ended run along, as what they compute is not read.

Left out: rows do not take the places of others that ended. `StaticDecoder.generate` can instead stop when few are left, which
the caller asks again in one batch later: reading them again costs less than a batch of ended rows that runs along.

Legend: B rows, H heads, G groups of heads that share keys, S new tokens, L columns of the cache, d a head's size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.hardware import torch_dtype
from tunesmith.models.attention import REPEATED
from tunesmith.models.forward import ModelForward
from tunesmith.models.generate import READ_TOKENS
from tunesmith.out_of_memory import is_out_of_memory

ONE_QUERY = "sdpa_one_query"
"""The name under which transformers knows `one_query_sdpa`."""

AHEAD = 16
"""Columns beyond the prompts that the first graph of a batch has at least: answers shorter than that need no second."""

PAYS_FROM = 4
"""Steps that must be left for a capture: it takes about as long as three steps that are launched."""

ASIDE_AFTER, ASIDE_SHARE = 16, 8
"""A batch may stop after so many steps, when no more than one in so many of its rows goes on."""


def rounded_up(length: int) -> int:
    """The columns that a step reads for `length` used ones: multiples of 64, further up two to four sizes an octave."""
    step = max(64, 1 << max(0, (length - 1).bit_length() - 2))
    return -(-length // step) * step


def why_not_static(forward: ModelForward) -> str | None:
    """Why a model cannot decode in fixed places, or None where it can."""
    kind = type(forward.base).__name__
    config = forward.base.config
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        return f"{kind} has layers that keep something else than all keys and values"
    if not getattr(forward.base, "_can_compile_fullgraph", False):
        return f"transformers does not say of {kind} that it runs with a static cache"
    implementation = forward.decoder.config._attn_implementation
    if implementation not in ("sdpa", "eager", REPEATED):
        return f"attention {implementation} takes no mask by columns"
    told = "position_ids" in inspect.signature(forward.decoder.forward).parameters
    if not told or getattr(config, "alibi", False):
        return f"{kind} takes positions from the padding"
    kinds = getattr(getattr(forward.decoder, "rotary_emb", None), "rope_type", "default")
    for rope in kinds.values() if isinstance(kinds, dict) else [kinds]:  # a dictionary by kind of layer (Gemma 3)
        if "dynamic" in rope or rope == "longrope":
            return f"its rotations ({rope}) depend on the longest position, which transformers looks at on the CPU"
    return None


def one_query_sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention function (its signature) on query (B, H, S, d) and key, value (B, G, L, d).

    The H / G heads that share keys become queries of one head. Under a mask transformers would repeat keys and values for
    them: at 784 rows of 128 columns of SmolLM2-135M that is 100 MB copied in each layer and step.
    """
    B, H, S, d = query.shape
    G = key.shape[1]
    if S > 1 or H == G or mask is None or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(B, G, H // G, d),
        key,
        value,
        attn_mask=mask.expand(B, G, H // G, mask.shape[-1]),
        scale=options.get("scaling"),
    )
    return attended.reshape(B, 1, H, value.shape[-1]), None


@contextmanager
def attention(forward: ModelForward, name: str) -> Iterator[None]:
    """The model's attention is what transformers knows under `name`, for a while."""
    config = forward.decoder.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def one_query_attention(forward: ModelForward) -> AbstractContextManager[None]:
    """The model's attention is `one_query_sdpa` for a while, if it was an sdpa; others stay."""
    if forward.decoder.config._attn_implementation == "eager":
        return nullcontext()
    AttentionInterface.register(ONE_QUERY, one_query_sdpa)
    AttentionMaskInterface.register(ONE_QUERY, sdpa_mask)
    return attention(forward, ONE_QUERY)


class FixedLayer(CacheLayerMixin):
    """A layer's keys and values (B, G, L, d) in fixed places; `at` says where `update` writes."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.at = keys, values, at
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the tensors came with the layer."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns, and the first of them."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """What the forward would count positions from; they are given."""
        return 0

    def get_max_length(self) -> int:
        """Columns."""
        return self.keys.shape[2]


class SlotLayer(FixedLayer):
    """One token for each row, written at the column `at` (1,) that all rows share."""

    is_compileable = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token's (B, G, 1, d); returns all columns."""
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Columns that are used, on the device."""
        return self.at[0]


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens without the end token; `ended` unless the batch stopped before the answer did."""

    tokens: list[int]
    ended: bool


class _Places:
    """The tensors of `rows` rows with `columns` columns, shaped as the cache `like` of a prompt that was read."""

    def __init__(self, rows: int, columns: int, new_tokens: int, like: Any, forward: ModelForward):
        device, dtype = forward.device, torch_dtype(forward.dtype)

        def room(states: torch.Tensor) -> torch.Tensor:
            # Attention takes the compute type, whatever type keys have (fp32 weights under autocast make fp32 ones).
            kept = dtype if forward.dtype != "fp32" else states.dtype
            return torch.zeros(rows, states.shape[1], columns, states.shape[3], dtype=kept, device=device)

        self.rows, self.columns, self.new_tokens = rows, columns, new_tokens
        self.layers = [(room(layer.keys), room(layer.values)) for layer in like.layers]
        self.mask = torch.zeros(rows, 1, 1, columns, dtype=dtype, device=device)  # added to the scores: 0 or -inf
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.budgets = torch.zeros(rows, dtype=torch.long, device=device)
        self.ended = torch.ones(rows, dtype=torch.bool, device=device)
        self.answers = torch.zeros(rows, new_tokens, dtype=torch.long, device=device)  # -1 from the end on
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # answer tokens so far
        self.alive = torch.zeros((), dtype=torch.long, device=device)

    def fits(self, rows: int, columns: int, new_tokens: int) -> bool:
        return rows <= self.rows and columns <= self.columns and new_tokens <= self.new_tokens


class _Alive:
    """How many rows go on, known one step late, so that the GPU has a step to do while Python looks."""

    def __init__(self, device: str):
        self.device, self.on_gpu = device, device.startswith("cuda")
        self.copies = [torch.zeros((), dtype=torch.long, pin_memory=self.on_gpu) for _ in range(2)]
        self.events = [torch.cuda.Event() if self.on_gpu else None for _ in range(2)]
        self.steps = 0

    def note(self, alive: torch.Tensor) -> int | None:
        """Take the count after a step; returns that after the step before, None at first."""
        this, before = self.steps % 2, (self.steps + 1) % 2
        self.copies[this].copy_(alive, non_blocking=True)
        if (event := self.events[this]) is not None:
            event.record(torch.cuda.current_stream(self.device))
        self.steps += 1
        if self.steps == 1:
            return None
        if (event := self.events[before]) is not None:
            event.synchronize()
        return int(self.copies[before])


class StaticDecoder:
    """Decodes batches in the same places, as graphs on a GPU. Good while the weights stay as and where they are.

    `warn` is told when a step cannot be captured: then all go launch by launch. Whoever catches an out-of-memory error of
    `generate` must call `drop`; `close` gives the memory back.
    """

    def __init__(
        self, forward: ModelForward, ends: Sequence[int], warn: Callable[[str], None], graphs: bool | None = None
    ):
        self.forward, self.warn = forward, warn
        self.ends = torch.tensor(list(ends), device=forward.device)
        self.captures = forward.device.startswith("cuda") if graphs is None else graphs
        self.launched = self.captured = self.replayed = 0  # steps
        self._places: _Places | None = None
        self._ran: set[tuple[int, int]] = set()
        self._graphs: dict[tuple[int, int], Any] = {}
        self._stream: Any = None
        self._pool: Any = None

    def drop(self) -> None:
        """Let go of the graphs and of the places."""
        if self._graphs:  # a replay may still read and write what is given back
            torch.cuda.synchronize(self.forward.device)
        self._graphs.clear()
        self._ran.clear()
        self._pool = self._places = None

    def close(self) -> None:
        """`drop`, and what graphs had of the GPU's memory is anyone's again."""
        graphed = bool(self.captured)
        self.drop()
        if graphed:
            torch._C._cuda_clearCublasWorkspaces()  # those of the stream of the captures lie in their memory
            torch.cuda.empty_cache()

    def generate(
        self,
        rests: Sequence[Sequence[int]],
        shared: int,
        budgets: Sequence[int],
        read: Callable[[Sequence[Sequence[int]]], tuple[torch.Tensor, Any]],
        aside: bool = False,
        on_ended: Callable[[int], None] = lambda ended: None,
    ) -> list[Answer]:
        """Greedy answers of at most `budgets` tokens to prompts that have `shared` tokens in common before their `rests`.

        `read` runs some of the rests, padded on the left behind the shared tokens, and returns the last hidden states
        (B, hidden) and the cache. With `aside` the batch may stop while a few rows go on. `on_ended` is told how many have
        ended. Call it in inference mode and under the forward's autocast.
        """
        columns = shared + max(map(len, rests))
        self._read(rests, shared, budgets, read, columns)
        places = self.places
        rows = next(size for size in self._sizes(places.rows) if size >= len(rests))
        most, ended, length = max(budgets), 0, 0
        alive = _Alive(self.forward.device)
        found = alive.note(places.alive)
        with one_query_attention(self.forward):
            for step in range(1, most):
                going = len(rests) if found is None else found
                if len(rests) - going > ended:
                    ended = len(rests) - going
                    on_ended(ended)
                if not going or (
                    aside and step > ASIDE_AFTER and most - step >= AHEAD and going * ASIDE_SHARE <= len(rests)
                ):
                    break
                slot = columns + step - 1
                if slot >= length:
                    ahead = min(most - step, AHEAD if not length else 4 * AHEAD)
                    length = min(rounded_up(slot + ahead), places.columns)
                self._advance(rows, length, most - step)
                found = alive.note(places.alive)
        answers = places.answers[: len(rests), : int(places.count)].tolist()
        over = places.ended[: len(rests)].tolist()
        return [
            Answer(row[: row.index(-1)] if -1 in row else row, done) for row, done in zip(answers, over, strict=True)
        ]

    @staticmethod
    def _sizes(rows: int) -> list[int]:
        """The numbers of rows that steps are made for: all, and halves of them, so that few graphs serve."""
        sizes = [rows]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 2))
        return sizes[::-1]

    def _read(
        self,
        rests: Sequence[Sequence[int]],
        shared: int,
        budgets: Sequence[int],
        read: Callable[[Sequence[Sequence[int]]], tuple[torch.Tensor, Any]],
        columns: int,
    ) -> None:
        """Run the prompts and put what came of them in its places: row r ends in column `columns` - 1."""
        first, most = 0, max(budgets)
        tokens = []
        while first < len(rests):
            width = max(map(len, rests[first:]))
            part = rests[first : first + max(1, READ_TOKENS // (shared + width))]
            hidden, cache = read(part)
            tokens.append(self.forward.logits(hidden).argmax(-1))
            if not first:
                self._make_room(len(rests), rounded_up(columns + most), most, cache)
            width = max(map(len, part))
            last = first + len(part)
            for layer, (keys, values) in zip(cache.layers, self.places.layers, strict=True):
                for room, states in ((keys, layer.keys), (values, layer.values)):
                    room[first:last, :, :shared] = states[:, :, :shared]
                    room[first:last, :, columns - width : columns] = states[:, :, shared:]
                layer.keys = layer.values = None  # once more is enough
            first = last
        places, n, device = self.places, len(rests), self.forward.device
        lengths = torch.tensor([len(rest) for rest in rests], device=device)
        column = torch.arange(places.columns, device=device)
        seen = (column < shared) | ((column >= columns - lengths[:, None]) & (column < columns))
        places.mask.fill_(-torch.inf)
        places.mask[:n, 0, 0].masked_fill_(seen, 0.0)
        places.positions.zero_()
        places.positions[:n, 0] = shared + lengths - 1
        places.budgets[:n] = torch.tensor(list(budgets), device=device)
        places.ended.fill_(True)
        places.ended[:n] = False
        places.slot.fill_(columns - 1)
        places.count.zero_()
        places.answers.fill_(-1)
        self._take(n, torch.cat(tokens))

    @property
    def places(self) -> _Places:
        """The places of the batch that is decoded."""
        assert self._places is not None
        return self._places

    def _make_room(self, rows: int, columns: int, new_tokens: int, like: Any) -> None:
        """Empty places for a batch, larger ones where the present ones are too small."""
        before = self._places
        if before is not None and before.fits(rows, columns, new_tokens):
            for keys, values in before.layers:  # a masked NaN of the batch before would still count: 0 x NaN is NaN
                keys.zero_()
                values.zero_()
            return
        if before is not None:
            rows, columns = max(rows, before.rows), max(columns, before.columns)
            new_tokens = max(new_tokens, before.new_tokens)
            del before
            self.drop()
        self._places = _Places(rows, columns, new_tokens, like, self.forward)

    def _take(self, rows: int, tokens: torch.Tensor) -> None:
        """Note the next token (B,) of the first `rows` rows."""
        places = self.places
        ended = places.ended[:rows]
        ended |= (tokens[:, None] == self.ends).any(1)
        places.answers[:rows].index_copy_(1, places.count, tokens.masked_fill(ended, -1)[:, None])
        places.count += 1
        ended |= places.count >= places.budgets[:rows]
        places.tokens[:rows, 0] = tokens
        places.positions[:rows] += 1
        places.slot += 1
        torch.sum(~places.ended, 0, out=places.alive)

    def _step(self, rows: int, length: int) -> None:
        """One token more for the first `rows` rows, attending to the first `length` columns."""
        places = self.places
        places.mask.index_fill_(3, places.slot, 0.0)
        layers = [SlotLayer(k[:rows, :, :length], v[:rows, :, :length], places.slot) for k, v in places.layers]
        output = self.forward.decoder(
            input_ids=places.tokens[:rows],
            attention_mask=places.mask[:rows, :, :, :length],
            position_ids=places.positions[:rows],
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        self._take(rows, self.forward.logits(output.last_hidden_state[:, -1]).argmax(-1))

    def _advance(self, rows: int, length: int, left: int) -> None:
        """A step, as a graph if there is one, or if `left` steps are worth one."""
        shape = rows, length
        if self.captures and shape not in self._graphs and shape in self._ran and left >= PAYS_FROM:
            self._capture(rows, length)
        graph = self._graphs.get(shape)
        if graph is not None:
            self.replayed += 1
            graph.replay()
            return
        self.launched += 1
        self._step(rows, length)
        self._ran.add(shape)

    def _capture(self, rows: int, length: int) -> None:
        """Make a graph of a step; where one cannot be captured, there will be none. Raises torch.OutOfMemoryError."""
        self._stream = self._stream or torch.cuda.Stream(self.forward.device)
        graph = torch.cuda.CUDAGraph()
        failure: str | None = None
        try:
            # Around the graph's own: a capture whose end fails leaves its stream the current one.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
            ):
                self._step(rows, length)
        except RuntimeError as error:
            failure, ran_out = str(error).partition("\n")[0] or type(error).__name__, ran_out_in_capture(error)
        if failure is None:
            self._pool = self._pool or graph.pool()
            self._graphs[rows, length] = graph
            self.captured += 1
            return
        del graph
        if ran_out:
            raise torch.OutOfMemoryError(failure)
        self.captures = False
        self.warn(f"no CUDA graph, answers are generated launch by launch: {failure}")


def ran_out_in_capture(error: BaseException | None) -> bool:
    """Whether memory ran out while a graph was captured: the end of the capture then fails too, and is what is raised."""
    return error is not None and (is_out_of_memory(error) or ran_out_in_capture(error.__context__))
