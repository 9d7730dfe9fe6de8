"""Continuous batching over one base: a thread that owns the model, and a queue before it.

Requests wait in a bounded queue. Every step reads the prompts of some that wait (if there is room), lets them join the batch, and
decodes one token for every row of it, whichever adapters the rows want (adapter_bank.py). A row leaves when its answer ends, when its
time is up, or when whoever asked has gone; its place is free in the next step. What changes the adapters runs between two steps.
On a GPU rows have fixed places, and steps are CUDA graphs (fixed_batch.py); on the CPU, and for models that cannot, the cache of the
batch grows and is copied (running_batch.py).

Left out: paged keys and values, and sharing the prefix of prompts.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from tunesmith.errors import MachineError, TunesmithError
from tunesmith.models.forward import ModelForward
from tunesmith.out_of_memory import OutOfMemory, release_memory, within_memory
from tunesmith.serving.adapter_bank import AdapterBank, layers_without_rows
from tunesmith.serving.cache_budget import fitting_tokens
from tunesmith.serving.fixed_batch import FixedBatch, Places, why_not_fixed
from tunesmith.serving.generation import Event, Failed, Finished, Generation, Piece
from tunesmith.serving.running_batch import Batch, RunningBatch, longest_row, refuse_recurrent
from tunesmith.serving.sampling import choose

T = TypeVar("T")

READ_TOKENS = 8_192
"""Prompt tokens read between two steps, padding included: the running rows wait for no more. One longer prompt is read alone."""

FORWARD_ERRORS = (TunesmithError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError)
"""What a forward may raise over the rows that it was given."""


class QueueFull(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """The engine takes no requests any more."""


class Engine:
    """Answers requests on a thread of its own, from `start` to `stop`.

    `max_batch` rows at once, `max_queue` more waiting. `cache_tokens` bounds rows x longest row: by default what fits 0.7 of the free
    GPU memory, and on the CPU nothing. `fixed` says whether rows have fixed places: by default on a GPU, where the model can
    (`why_not_fixed`); `warn` is told where it cannot.
    """

    def __init__(
        self,
        forward: ModelForward,
        max_batch: int = 32,
        max_queue: int = 256,
        cache_tokens: int | None = None,
        fixed: bool | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ):
        import torch

        refuse_recurrent(forward.base.config)
        self.forward = forward
        self._threads = torch.get_num_threads()
        self.bank = AdapterBank(forward.base, forward.device, layers_without_rows(forward))
        self.max_batch, self.max_queue = max_batch, max_queue
        self.cache_tokens = tokens = cache_tokens if cache_tokens is not None else fitting_tokens(forward)
        self.context_length = longest_row(forward.base.config)
        self.vocabulary: int = forward.base.get_input_embeddings().num_embeddings
        self.steps = 0
        self._batch: Batch[Generation] = RunningBatch(forward, self.bank, tokens)
        on_gpu = forward.device.startswith("cuda")
        if tokens is not None and (on_gpu if fixed is None else fixed):
            if (reason := why_not_fixed(forward)) is None:
                places = Places(forward, self.bank, max_batch, tokens, self.context_length, on_gpu, warn)
                self._batch = FixedBatch(places)
            else:
                warn(f"steps go launch by launch, without CUDA graphs: {reason}")
        self._waiting: deque[Generation] = deque()
        self._reading: list[Generation] = []  # off the queue, and not yet in the batch
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._main, name="tunesmith-engine", daemon=True)

    # -- what other threads call --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Answer nothing more: what runs and waits fails with `stopped`, behind the step that is under way."""
        with self._changed:
            self._open = False
            self._changed.notify()

    def stop(self) -> None:
        """Close, and wait until the thread has ended."""
        self.close()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue requests, all or none. Raises QueueFull or Stopped."""
        with self._changed:
            if not self._open:
                raise Stopped
            if len(self._waiting) + len(generations) > self.max_queue:
                raise QueueFull
            self._waiting.extend(generations)
            self._changed.notify()

    def cancel(self, generation: Generation) -> None:
        """Whoever asked has gone: its place is freed before the next step. It gets no further event."""
        with self._changed:
            generation.cancelled = True
            self._changed.notify()

    def between_steps(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` on the engine's thread between two steps; it may change the adapters. Its result, or what it raised."""
        future: Future[T] = Future()
        with self._changed:
            if not self._open:
                future.set_exception(Stopped())
                return future
            self._calls.append((call, future))
            self._changed.notify()
        return future

    @property
    def healthy(self) -> bool:
        """Whether the thread is at work."""
        return self._open and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Rows of the batch."""
        return len(self._batch.rows)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no request is here: none runs, none waits, and no prompt is being read."""
        with self._changed:
            return not (self._waiting or self._reading or self._batch.rows)

    def wants(self, adapter: int) -> bool:
        """Whether a row or a waiting request wants this adapter. For calls between two steps."""
        with self._changed:
            return any(generation.adapter == adapter for generation in [*self._batch.rows, *self._waiting])

    # -- the engine's own thread --------------------------------------------------------------------------------------

    def _main(self) -> None:
        import torch

        torch.set_num_threads(self._threads)  # a thread that begins while an adapter is read (adapter_files.py) has one
        try:
            with torch.inference_mode():
                while self._wait():
                    with (
                        self.forward.autocast()
                    ):  # anew each time: it keeps the casts of weights for as long as it lasts
                        self._drop_gone()
                        self._run_calls()
                        self._admit()
                        if self._batch.rows:
                            self._step()
        finally:  # also when the device failed: nobody may wait for ever
            with self._changed:
                self._open = False
                left = list(dict.fromkeys([*self._batch.rows, *self._reading, *self._waiting]))
                calls = list(self._calls)
                self._batch = RunningBatch(
                    self.forward
                )  # what there was may not be touched any more: the device may have failed
                self._reading = []
                self._waiting.clear()
                self._calls.clear()
            for generation in left:
                self._tell(generation, Failed("stopped", "the server stopped before this answer was whole"))
            for _, future in calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(Stopped())
            self.bank.close()

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False when it is over."""
        with self._changed:
            while self._open and not (self._batch.rows or self._waiting or self._calls):
                self._changed.wait()
            return self._open

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):  # what these queue themselves waits for the next step
            call, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():  # nobody waits for it any more
                continue
            try:
                result = within_memory(_attempt, call)
            except BaseException:  # the engine ends with it, and whoever waits for it may not wait for ever
                future.set_exception(Stopped())
                raise
            if isinstance(result, OutOfMemory):
                release_memory()
                future.set_exception(MachineError(f"no memory left for this adapter: {result.reason}"))
            elif result.error is not None:
                future.set_exception(result.error)
            else:
                future.set_result(result.value)

    def _drop_gone(self) -> None:
        """Leave out rows whose asker has gone or whose time is up, and take such requests off the queue."""
        gone = [generation for generation in self._batch.rows if generation.cancelled or generation.late]
        if gone:
            self._keep([place for place, row in enumerate(self._batch.rows) if row not in gone])
        with self._changed:
            out = [generation for generation in self._waiting if generation.cancelled or generation.late]
            for generation in out:
                self._waiting.remove(generation)
        for generation in [*gone, *out]:
            said = (
                f"no whole answer after {generation.seconds:g} s; ask for fewer tokens, or again when less is going on"
            )
            self._tell(generation, Failed("timeout", said))

    def _admit(self) -> None:
        """Read the prompts of requests that have waited longest, as far as there is room, and let them join the batch."""
        with self._changed:
            taken = self._reading
            while self._waiting:
                rows = [*self._batch.rows, *taken, self._waiting[0]]
                reads = [len(row.prompt) for row in rows[len(self._batch.rows) :]]
                fits = self._batch.fits(len(rows), max(row.whole for row in rows))
                if len(rows) > self.max_batch or not (fits or len(rows) == 1):
                    break
                if taken and len(reads) * max(reads) > READ_TOKENS:
                    break
                taken.append(self._waiting.popleft())
        if taken:
            self._read(taken)
            self._reading = []

    def _read(self, taken: Sequence[Generation]) -> None:
        joining = self._batch.beside()

        def read(rows: Sequence[Generation]) -> list[int | None]:
            hidden = joining.read(rows, [row.prompt for row in rows])
            return self._choose(hidden, rows)

        tokens = self._guarded(read, taken)
        if isinstance(tokens, _Broken):
            joining.clear()
            self._fail(taken, tokens)
            return
        if not isinstance(tokens, OutOfMemory):
            going = self._take(taken, tokens)

            def join(_: object) -> None:
                joining.keep(going)
                if joining.rows:
                    self._batch.join(joining)

            failed = self._guarded(join, ())
            if failed is None:
                return
            taken = joining.rows  # others of them had one token to say, and have ended
            if isinstance(failed, _Broken):
                joining.clear()
                self._fail(taken, failed)
                return
            tokens = failed
        joining.clear()  # its rows may have places already
        release_memory()
        for generation in taken:
            self._tell(generation, Failed("memory", f"no memory left to read this prompt: {tokens.reason}; shorten it"))

    def _step(self) -> None:
        """One token for every row. Where memory runs out, the last to join makes room for the others."""

        hidden: Any = self._guarded(lambda rows: self._batch.step([row.last for row in rows]), self._batch.rows)
        if isinstance(hidden, _Broken):
            self._fail_batch(hidden)
            return
        if isinstance(hidden, OutOfMemory):
            self._give_up_last(hidden.reason)
            return
        self.steps += 1
        while True:
            rows = self._batch.rows
            tokens = self._guarded(lambda rows: self._choose(hidden[: len(rows)], rows), rows)
            if isinstance(tokens, _Broken):
                self._fail_batch(tokens)
                return
            if not isinstance(tokens, OutOfMemory):
                self._keep(self._take(rows, tokens))
                return
            self._give_up_last(tokens.reason)

    def _give_up_last(self, reason: str) -> None:
        row = self._batch.rows[-1]
        self._keep(range(len(self._batch.rows) - 1))
        release_memory()
        self._out_of_memory([row], reason)

    def _keep(self, places: Sequence[int]) -> None:
        """Leave out all rows but these. Where there is no memory for that all end, as some layers of the cache have others than the rest."""
        failed = self._guarded(lambda _: self._batch.keep(places), ())
        if failed is None:
            return
        rows = self._batch.rows
        self._batch.clear()
        if isinstance(failed, _Broken):
            self._fail(rows, failed)
            return
        release_memory()
        self._out_of_memory(rows, failed.reason)

    def _out_of_memory(self, rows: Sequence[Generation], reason: str) -> None:
        for row in rows:
            self._tell(row, Failed("memory", f"no memory left for this answer: {reason}; ask again later"))

    def _guarded(
        self, work: Callable[[Sequence[Generation]], T], rows: Sequence[Generation]
    ) -> T | OutOfMemory | _Broken:
        """`work(rows)`, or why there is none. Raises what the device itself died of: the engine ends with it."""
        try:
            return within_memory(work, rows)
        except FORWARD_ERRORS as error:
            broken = _Broken(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")
        if self.forward.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.forward.device)  # raises again where no kernel can run any more
        return broken

    def _fail_batch(self, broken: _Broken) -> None:
        rows = self._batch.rows
        self._batch.clear()  # some layers of its cache may have a token that others have not
        self._fail(rows, broken)

    def _fail(self, rows: Sequence[Generation], broken: _Broken) -> None:
        release_memory()
        for row in rows:
            self._tell(row, Failed("error", f"the model failed on this request: {broken.reason}"))

    def _choose(self, hidden: Any, rows: Sequence[Generation]) -> list[int | None]:
        logits = self.forward.logits(hidden)
        return choose(logits, [row.sampling for row in rows], [row.random for row in rows])

    def _take(self, rows: Sequence[Generation], tokens: Sequence[int | None]) -> list[int]:
        """Give each row its token; the places of rows that go on. A row without a token ends with an error."""
        going = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token is None:
                said = "the model's logits are not finite (NaN or infinity) for this request; check its adapter and the base"
                self._tell(row, Failed("error", said))
                continue
            row.last = token
            row.produced += 1
            ended = token in row.ends
            piece = "" if ended else row.text.push(token)
            ended = ended or row.text.stopped
            last = ended or row.produced == row.max_tokens
            if last:
                piece += row.text.finish()
            if piece or row.produced == 1:
                self._tell(row, Piece(piece, first=row.produced == 1))
            if last:
                self._tell(row, Finished("stop" if ended or row.text.stopped else "length", row.produced))
            else:
                going.append(place)
        return going

    def _tell(self, generation: Generation, event: Event) -> None:
        if not generation.cancelled:
            generation.on_event(event)


@dataclass(frozen=True, slots=True)
class _Broken:
    """What a forward raised."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Outcome:
    value: Any = None
    error: Exception | None = None


def _attempt(call: Callable[[], Any]) -> _Outcome:
    """What a call gave, or the error of ours that it raised; others stop the engine."""
    try:
        return _Outcome(call())
    except TunesmithError as error:
        return _Outcome(error=error)
