"""The models that clients can name: the base and its adapters, which come, are replaced and go while requests run.

An adapter's matrices leave the engine when the last request that began with it is over. All of this runs on the server's event loop,
reading files aside, so that nothing here needs a lock but the one that orders changes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError
from tunesmith.serving.adapter_bank import BASE
from tunesmith.serving.adapter_files import AdapterWeights
from tunesmith.serving.api_errors import ApiError
from tunesmith.serving.engine import Engine
from tunesmith.serving.templates import Templates

NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """An adapter that was read and checked, with what it takes to talk to it. `notes` are for people."""

    weights: AdapterWeights
    tokenizer: Any
    chat: ChatFormat
    ends: frozenset[int]
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class ServedModel:
    """A name that clients can ask for. `uses` counts the requests that began with it and are not over."""

    name: str
    tokenizer: Any
    chat: ChatFormat
    ends: frozenset[int]
    adapter: int = BASE
    path: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    uses: int = 0
    retired: bool = False
    replaced: bool = False


def check_name(name: str, base: str) -> None:
    """Raise ConfigError for an adapter's name that is no plain name, or that is the base's."""
    if not NAME.fullmatch(name) or not name.strip("."):
        raise ConfigError(
            f"adapter name {name[:100]!r}: expected 1 to 100 letters, digits, dots, dashes and underscores"
        )
    if name == base:
        raise ConfigError(f"adapter name {name!r}: the base has this name; choose another")


class Catalog:
    """`read(path)` reads and checks an adapter's folder, on another thread, and takes hold of its chat in `templates`.

    `on_gone` is told a name behind its last request, when nobody is served under it any more.
    """

    def __init__(self, engine: Engine, base: ServedModel, read: Callable[[str], ReadAdapter], templates: Templates):
        self.engine, self.base = engine, base
        self.on_gone: Callable[[str], None] = lambda name: None
        self.swap_seconds = 0.0
        self._templates = templates
        templates.hold(base.chat)
        self._read = read
        self._adapters: dict[str, ServedModel] = {}
        self._changing = asyncio.Lock()

    @property
    def adapters(self) -> list[ServedModel]:
        """The adapters, in the order in which their names came."""
        return list(self._adapters.values())

    def begin_with(self, name: str, path: str) -> ServedModel:
        """Load an adapter before the server runs, and return it. Raises ConfigError, ModelError or MachineError."""
        check_name(name, self.base.name)
        read = self._read(path)
        with self._held(read):
            number = self.engine.between_steps(lambda: self.engine.bank.add(read.weights)).result()
        model = ServedModel(name, read.tokenizer, read.chat, read.ends, number, path)
        self._adapters[name] = model
        return model

    async def put(self, name: str, path: str) -> tuple[bool, tuple[str, ...]]:
        """Load an adapter, or replace the one of this name: whether there was one, and what is to be said of the new one. Requests that run
        end on what they began with.

        Raises what `begin_with` does. `swap_seconds` is how long the exchange took behind the reading of the files, the step of the
        batch that was under way included.
        """
        check_name(name, self.base.name)
        async with self._changing:
            read = await asyncio.to_thread(self._read, path)
            start = time.perf_counter()
            with self._held(read):
                adding = self.engine.between_steps(lambda: self.engine.bank.add(read.weights))
                number = await asyncio.wrap_future(adding)
            old = self._adapters.get(name)
            self._adapters[name] = ServedModel(name, read.tokenizer, read.chat, read.ends, number, path)
            self.swap_seconds = time.perf_counter() - start
            self._retire(old, replaced=True)
            return old is not None, read.notes

    async def remove(self, name: str) -> None:
        """Take a name away. Raises ApiError 404."""
        async with self._changing:
            old = self._adapters.pop(name, None)
            if old is None:
                raise self.unknown(name)
            self._retire(old)

    def find(self, name: str) -> ServedModel:
        """What a name means. Raises ApiError 404 in OpenAI's form."""
        if name == self.base.name:
            return self.base
        if name not in self._adapters:
            raise self.unknown(name)
        return self._adapters[name]

    def unknown(self, name: str) -> ApiError:
        """The error for a name that is not served."""
        names = ", ".join([self.base.name, *self._adapters])
        return ApiError(
            404, f"The model {name[:100]!r} does not exist; this server has {names}", "model_not_found", "model"
        )

    @contextmanager
    def using(self, name: str) -> Iterator[ServedModel]:
        """Hold a model while a request lasts."""
        model = self.find(name)
        model.uses += 1
        try:
            yield model
        finally:
            model.uses -= 1
            self._let_go(model)

    @contextmanager
    def _held(self, read: ReadAdapter) -> Iterator[None]:
        """Let go of an adapter's chat where what follows fails: the engine has no room for it, or has stopped."""
        taken = False
        try:
            yield
            taken = True
        finally:
            if not taken:
                self._templates.release(read.chat)

    def _retire(self, model: ServedModel | None, replaced: bool = False) -> None:
        if model is not None:
            model.retired, model.replaced = True, replaced
            self._let_go(model)

    def _let_go(self, model: ServedModel) -> None:
        if model.retired and model.uses == 0:
            self._templates.release(model.chat)
            if model.name not in self._adapters:
                self.on_gone(model.name)
            self.engine.between_steps(lambda: self._drop(model))

    def _drop(self, model: ServedModel) -> None:
        """On the engine's thread. A row whose asker has gone may be in the batch until the next step begins: then once more later."""
        if self.engine.wants(model.adapter):
            self.engine.between_steps(lambda: self._drop(model))
            return
        self.engine.bank.remove(model.adapter, model.replaced)
