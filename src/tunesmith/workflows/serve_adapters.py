"""Adapters as a server takes them: read, and held against the base that is served."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config import ModelConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ModelError
from tunesmith.hardware import torch_dtype
from tunesmith.models.adapters import find_adapter
from tunesmith.models.generate import end_tokens
from tunesmith.models.load import load_tokenizer
from tunesmith.registry.records import refuse_code
from tunesmith.runs import RunFolder
from tunesmith.types import Message
from tunesmith.workflows.load import TEMPLATE_NAME, LoadedModel, chat_format, check_training, tokenizer_source

if TYPE_CHECKING:
    from tunesmith.serving.catalog import ReadAdapter
    from tunesmith.serving.templates import Templates


class AdapterReader:
    """Reads adapters for one base: a run, or a PEFT folder, with the chat template that it was trained with.

    Of the base's weights only names and shapes are looked at, so that it may be on PyTorch's meta device. Whoever reads takes hold of
    the adapter's chat in `templates`, and has to release it.
    """

    def __init__(self, base: LoadedModel, templates: Templates, quantization: str | None = None):
        self.base, self.templates, self.quantization = base, templates, quantization

    def read(self, path: str) -> ReadAdapter:
        """An adapter. Raises ModelError, RunError or DataError for one that cannot be served over this base.

        Its base's hash is compared with what its run or its tunesmith.json says, and its template is tried on a question.
        """
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
        check_training(run, folder, source, chat, None)
        with ExitStack() as undo:
            self.templates.hold(chat)
            undo.callback(self.templates.release, chat)
            weights = read_adapter(folder, forward.base, forward.device, torch_dtype(forward.dtype))
            chat.encode_prompt([Message("user", "a")])
            undo.pop_all()
        return ReadAdapter(weights, tokenizer, chat, frozenset(end_tokens(forward.base, tokenizer)))

    def notes(self, path: str) -> list[str]:
        """What to say of an adapter that was trained on its base in another precision."""
        if not RunFolder.is_run(path):
            return []
        run = RunFolder.open(path)
        trained = run.config.quantization.scheme if run.config.method == "qlora" else None
        found = []
        if trained != self.quantization:
            found.append(
                f"{path}: trained over a base in {trained or '16 or 32 bits'}, served over one in {self.quantization or '16 or 32 bits'}"
                + (f"; --quantization {trained} serves it as it was trained" if trained else "")
            )
        dtype = run.metadata.get("dtype")
        if dtype and dtype != self.base.dtype:
            found.append(
                f"{path}: trained in {dtype}, served in {self.base.dtype}; --dtype {dtype} serves it as it was trained"
            )
        return found
