"""tunesmith: fine-tune a language model on the GPU you have, and prove that it got better.

The public API, imported lazily: `import tunesmith` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tunesmith.version import __version__ as __version__

if TYPE_CHECKING:
    from tunesmith.api import compare as compare
    from tunesmith.api import evaluate as evaluate
    from tunesmith.api import export_model as export_model
    from tunesmith.api import fuse as fuse
    from tunesmith.api import list_adapters as list_adapters
    from tunesmith.api import load as load
    from tunesmith.api import merge as merge
    from tunesmith.api import push as push
    from tunesmith.api import quickstart as quickstart
    from tunesmith.api import reply as reply
    from tunesmith.api import resume as resume
    from tunesmith.api import serve as serve
    from tunesmith.api import show_adapter as show_adapter
    from tunesmith.api import sweep as sweep
    from tunesmith.api import train as train
    from tunesmith.api import unfuse as unfuse
    from tunesmith.api import verify_adapter as verify_adapter
    from tunesmith.api import write_report as write_report
    from tunesmith.config import RunConfig as RunConfig
    from tunesmith.config import load_config as load_config
    from tunesmith.serving.limits import Limits as Limits
    from tunesmith.workflows.data import check_data as check_data
    from tunesmith.workflows.data import data_stats as data_stats
    from tunesmith.workflows.data import preview_data as preview_data
    from tunesmith.workflows.data import split_data as split_data


_HOMES = {
    "RunConfig": "tunesmith.config",
    "load_config": "tunesmith.config",
    "compare": "tunesmith.api",
    "evaluate": "tunesmith.api",
    "export_model": "tunesmith.api",
    "fuse": "tunesmith.api",
    "list_adapters": "tunesmith.api",
    "load": "tunesmith.api",
    "merge": "tunesmith.api",
    "push": "tunesmith.api",
    "quickstart": "tunesmith.api",
    "reply": "tunesmith.api",
    "resume": "tunesmith.api",
    "serve": "tunesmith.api",
    "show_adapter": "tunesmith.api",
    "sweep": "tunesmith.api",
    "train": "tunesmith.api",
    "unfuse": "tunesmith.api",
    "verify_adapter": "tunesmith.api",
    "write_report": "tunesmith.api",
    "Limits": "tunesmith.serving.limits",
    "check_data": "tunesmith.workflows.data",
    "data_stats": "tunesmith.workflows.data",
    "preview_data": "tunesmith.workflows.data",
    "split_data": "tunesmith.workflows.data",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
