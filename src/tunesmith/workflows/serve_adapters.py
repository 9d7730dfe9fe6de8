"""Adapters as a server takes them: read, and held against the base that is served."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tunesmith.config import ModelConfig, QuantizationConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ModelError
from tunesmith.hardware import ComputeDType, torch_dtype
from tunesmith.models.adapters import find_adapter
from tunesmith.models.generate import end_tokens
from tunesmith.models.load import load_tokenizer
from tunesmith.registry.records import refuse_code
from tunesmith.runs import RunFolder
from tunesmith.types import Message, Progress, no_progress
from tunesmith.workflows.inference import Effect, Inference, Setting, Unmeasured
from tunesmith.workflows.load import (
    TEMPLATE_NAME,
    LoadedModel,
    chat_format,
    differences,
    loftq_iterations,
    read_record,
    refuse_changed_adapter,
    tokenizer_source,
    trained_quantization,
    unchecked_base,
)

if TYPE_CHECKING:
    from tunesmith.serving.catalog import ReadAdapter
    from tunesmith.serving.templates import Templates


class AdapterReader:
    """Reads adapters for one base: a run, or a PEFT folder, with the chat template that it was trained with.

    Of the base's weights only names and shapes are looked at, so that it may be on PyTorch's meta device. Whoever reads takes hold of
    the adapter's chat in `templates`, and has to release it. `quantization` is how the base is quantized, `options` are those of the command
    that say how it is loaded: notes name them.
    """

    def __init__(
        self,
        base: LoadedModel,
        templates: Templates,
        quantization: QuantizationConfig | None = None,
        options: tuple[str, ...] = ("--dtype",),
    ):
        self.base, self.templates, self.quantization, self.options = base, templates, quantization, options

    def read(self, path: str) -> ReadAdapter:
        """An adapter. Raises ModelError, RunError or DataError for one that cannot be served over this base.

        Its base's hash is compared with what its run or its tunesmith.json says, and its template is tried on a question.
        """
        try:
            return self._read(path)
        except OSError as error:  # a name that is too long, a file that may not be read
            raise ModelError(f"{path[:200]}: cannot be read: {error.strerror or error}") from None

    def _read(self, path: str) -> ReadAdapter:
        from tunesmith.serving.adapter_files import read_adapter
        from tunesmith.serving.catalog import ReadAdapter

        forward, source = self.base.forward, self.base.source
        place = Path(path)
        run = RunFolder.open(place) if RunFolder.is_run(place) else None
        if run and run.config.method == "full":
            raise ModelError(f"{path}: a full fine-tuning has a model of its own and no adapter; serve it as a base")
        folder = find_adapter(place)
        refuse_code(folder)
        own = tokenizer_source(source, folder)
        tokenizer = self.base.tokenizer if own is source else load_tokenizer(own, ModelConfig(name=str(folder)))
        rows = forward.base.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ModelError(
                f"{folder}: its tokenizer has {len(tokenizer)} tokens and the base {rows}; merge it and serve it alone"
            )
        template = folder / TEMPLATE_NAME
        if run:
            chat = chat_format(tokenizer, run.config, run)
        elif template.is_file():
            chat = ChatFormat(tokenizer, str(template))
        else:
            chat = self.base.chat if own is source else ChatFormat(tokenizer)
        refuse_changed_adapter(run, folder)
        if self.quantization is not None and loftq_iterations(run, read_record(folder)):
            raise ModelError(
                f"{path}: LoftQ's adapter is saved for the base's 16-bit weights, and this base is quantized; serve it over one that is not"
            )
        if found := differences(run, folder, source, chat):
            trained_on = _base_of(run, folder) or "that base"
            raise ModelError(
                f"{'; '.join(found)}; an adapter answers over what it was trained on: name {trained_on} in this base's place"
            )
        with ExitStack() as undo:
            self.templates.hold(chat)
            undo.callback(self.templates.release, chat)
            weights = read_adapter(folder, forward.base, forward.device, torch_dtype(forward.dtype))
            chat.encode_prompt([Message("user", "a")])
            said = self.known_note(path, chat)
            undo.pop_all()
        ends = frozenset(end_tokens(forward.base, tokenizer))
        notes = tuple(note for note in (self.base_note(path), said) if note)
        return ReadAdapter(weights, tokenizer, chat, ends, notes)

    def base_note(self, path: str) -> str | None:
        """What to say of an adapter of which nobody knows whether it was trained on this base; None for any other."""
        place = Path(path)
        run = RunFolder.open(place) if RunFolder.is_run(place) else None
        return unchecked_base(run, find_adapter(place), self.base.source)

    def known_note(self, path: str, chat: ChatFormat) -> str | None:
        """What to say of an adapter that is used in another setting than it was trained in, with the effect where it was measured before.

        Nothing is measured: it would take a pass over the base's files on the device that answers. None where nothing differs.
        """
        unlike = self._unlike(path, chat)
        return None if unlike is None else self._noted(path, unlike, unlike.known(), self._how(path, unlike))

    def note(self, path: str, chat: ChatFormat, loaded: Any, progress: Progress = no_progress) -> str | None:
        """`known_note`, measured with `loaded` where it was not before: the base with this adapter at work, while nobody else uses it."""
        unlike = self._unlike(path, chat)
        if unlike is None:
            return None
        effect, why = unlike.known(), ""
        if effect is None:
            progress(f"measuring {unlike.used} against {unlike.trained}, as {path} was trained", 0, 1)
            try:
                effect = unlike.measure(loaded)
            except Unmeasured as reason:
                why = str(reason)
        return self._noted(path, unlike, effect, why)

    def _noted(self, path: str, unlike: Inference, effect: Effect | None, why: str) -> str:
        said = f"{path}: {unlike.said(effect, why)}"
        asked = []
        trained, used = unlike.trained, unlike.used
        if trained.dtype != used.dtype and "--dtype" in self.options:
            asked.append(f"--dtype {trained.dtype}")
        if trained.quantization != used.quantization and not unlike.loftq:
            if "--quantization" not in self.options:
                return said
            if trained.quantization is None:
                asked.append("no --quantization")
            elif trained.quantization == QuantizationConfig(scheme=trained.quantization.scheme):
                asked.append(f"--quantization {trained.quantization.scheme}")
            else:  # its other settings are no options
                return said
        return f"{said}; {' and '.join(asked)} would use it as it was trained" if asked else said

    def _how(self, path: str, unlike: Inference) -> str:
        """How an effect comes to be measured."""
        looked_at = (None, unlike.trained.quantization)  # by `adapters verify`
        if unlike.used.quantization not in looked_at:
            return "with `--adapter` at the start of `serve` it is measured"
        base = self.base
        return f"`tunesmith adapters verify {path} --model {base.source.name} --dtype {base.dtype}` measures it"

    def _unlike(self, path: str, chat: ChatFormat) -> Inference | None:
        """None where the setting is training's, or nothing says which that was."""
        place = Path(path)
        run = RunFolder.open(place) if RunFolder.is_run(place) else None
        folder = find_adapter(place)
        record = run.metadata if run else read_record(folder)
        dtype = record.get("dtype")
        if dtype not in get_args(ComputeDType):
            return None
        trained = Setting(dtype, trained_quantization(run, record))  # type: ignore[arg-type]  # one of them
        used = Setting(self.base.dtype, self.quantization)
        if trained == used:
            return None
        iterations = loftq_iterations(run, record)
        return Inference(folder, self.base.source, chat, self.base.hardware.device, trained, used, iterations)


def _base_of(run: RunFolder | None, folder: Path) -> str | None:
    """The name of the base that a run, or a lone adapter's record, was trained on."""
    known: Any = run.metadata.get("model") if run else read_record(folder).get("base")
    return known.get("name") if isinstance(known, dict) else None
