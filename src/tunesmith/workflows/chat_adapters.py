"""The adapters of a conversation, of which one is at work, or none.

One run or adapter is PEFT's, whatever it is. Several share one base as in `tunesmith serve`: read and refused as there
(serve_adapters.py), their products added by the same bank (serving/adapter_bank.py), which is exact for one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from tunesmith.config import QuantizationConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError
from tunesmith.models.adapters import base_of_adapter
from tunesmith.runs import RunFolder
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.load import LoadedModel, load, loftq_iterations, read_record
from tunesmith.workflows.serve_adapters import AdapterReader

NONE = "none"
"""What the base without an adapter is called."""


class Adapters(Protocol):
    """`paths` by name; `current` is the name of the one at work, NONE for the base."""

    paths: Mapping[str, str]
    current: str

    def use(self, name: str) -> LoadedModel:
        """Put one to work, with its tokenizer and template. Raises ConfigError for a name that is not here."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What is generated meanwhile is the current one's."""

    @contextmanager
    def off(self) -> Iterator[None]:
        """What is generated meanwhile is the base's."""


class OneAdapter:
    """The adapter that a model was loaded with."""

    def __init__(self, loaded: LoadedModel, path: str):
        self.loaded = loaded
        self.current = Path(path).name
        self.paths: Mapping[str, str] = {self.current: path}

    def use(self, name: str) -> LoadedModel:
        """The same model."""
        _check(name, self.paths)
        self.current = name
        return self.loaded

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The adapter's answers, unless it is off."""
        with nullcontext() if self.current != NONE else self.off():
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base's answers."""
        with self.loaded.forward.model.disable_adapter():
            yield


class SeveralAdapters:
    """Adapters over `base`, by name. Raises what reading them raises: each is checked as a server checks it."""

    def __init__(
        self,
        base: LoadedModel,
        paths: Mapping[str, str],
        quantization: QuantizationConfig | None = None,
        on_note: Callable[[str], None] = lambda note: None,
        progress: Progress = no_progress,
    ):
        from tunesmith.serving.adapter_bank import BASE, AdapterBank
        from tunesmith.serving.catalog import check_name
        from tunesmith.serving.templates import Templates

        self.paths = paths
        self.current = NONE
        self._templates = Templates()
        self._bank = AdapterBank(base.forward.base, base.forward.device)
        self._models = {NONE: _Model(base, BASE)}
        reader = AdapterReader(base, self._templates, quantization)
        try:
            for name, path in paths.items():
                check_name(name, NONE)
                read = reader.read(path)
                number = self._bank.add(read.weights)
                run = RunFolder.open(path) if RunFolder.is_run(path) else None
                loaded = replace(base, tokenizer=read.tokenizer, chat=read.chat, adapted=True, run=run)
                self._models[name] = _Model(loaded, number)
                self._bank.select([number])
                for note in (reader.base_note(path), reader.note(path, read.chat, base.forward.base, progress)):
                    if note:
                        on_note(note)
        except BaseException:  # Ctrl-C too: hooks and processes may not stay
            self.close()
            raise

    def use(self, name: str) -> LoadedModel:
        """The base with the adapter's tokenizer and template, and its run's facts."""
        _check(name, self.paths)
        self.current = name
        return self._models[name].loaded

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The current adapter's answers."""
        self._bank.select([self._models[self.current].number])
        yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base's answers."""
        self._bank.select([self._models[NONE].number])
        yield

    def close(self) -> None:
        """Leave the base as it was, and end the processes of the templates."""
        self._bank.close()
        self._templates.close()


@dataclass(frozen=True, slots=True)
class _Model:
    loaded: LoadedModel
    number: int


def load_with_adapters(
    target: str,
    adapters: Mapping[str, str],
    model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = no_progress,
    on_note: Callable[[str], None] = lambda note: None,
) -> SeveralAdapters:
    """The base that `target` is, or that the run or adapter `target` is on, with `adapters` (name: folder) and that one.

    The one that answers first is the target's, by its folder's name, else the first of `adapters`. Raises UserError as `load` and a
    server's reading do.
    """
    path = Path(target)
    run = RunFolder.open(path) if RunFolder.is_run(path) else None
    tuned = run is not None and run.config.method != "full"
    alone = run is None and (path / "adapter_config.json").is_file()
    quantization = run.config.quantization if run is not None and run.config.method == "qlora" else None
    if (run is not None or alone) and loftq_iterations(run, {} if run else read_record(path)):
        raise ConfigError(
            f"{target}: LoftQ changed the base for this adapter, so that no other can share it; chat with it alone"
        )
    paths = dict(adapters)
    if tuned or alone:
        own = path.resolve().name
        if own in paths:
            raise ConfigError(f"--adapter {own}={paths[own]}: {target} has this name already; choose another")
        paths = {own: target, **paths}
    if alone:
        base = load(model or base_of_adapter(path), None, dtype, device, progress=progress)
    else:
        base = load(target, model, dtype, device, base=tuned, progress=progress)
    if tuned:  # the run's template is its adapter's
        base = replace(base, chat=ChatFormat(base.tokenizer), run=None)
    found = SeveralAdapters(base, paths, quantization, on_note, progress)
    found.use(next(iter(paths)))
    return found


def _check(name: str, paths: Mapping[str, str]) -> None:
    if name not in paths and name != NONE:
        raise ConfigError(f"there is no adapter {name!r}: {', '.join([*paths, NONE])}")
