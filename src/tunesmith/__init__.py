"""tunesmith: fine-tune a language model on the GPU you have, and prove that it got better.

The public API, imported lazily: `import tunesmith` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import chat_model, evaluate, load, merge, resume, train, write_report
    from tunesmith.config import RunConfig, load_config

__version__ = "0.1.0"

_HOMES = {
    "RunConfig": "tunesmith.config",
    "load_config": "tunesmith.config",
    "chat_model": "tunesmith.api",
    "evaluate": "tunesmith.api",
    "load": "tunesmith.api",
    "merge": "tunesmith.api",
    "resume": "tunesmith.api",
    "train": "tunesmith.api",
    "write_report": "tunesmith.api",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
