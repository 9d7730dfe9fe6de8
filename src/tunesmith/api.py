"""The public API: what the command line does, as functions. `import tunesmith` re-exports these names lazily.

import tunesmith

config = tunesmith.load_config("run.yaml", ["adapter.r=8"])
result = tunesmith.train(config, out="runs/first")
print(tunesmith.evaluate(result.run, "test.jsonl", baseline=True)["metrics"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError
from tunesmith.models.fuse import fuse, unfuse
from tunesmith.report import write_report as _write_report
from tunesmith.runs import RunFolder
from tunesmith.types import EventSink, Progress, TrainResult, no_progress
from tunesmith.workflows.adapters import list_adapters, show_adapter, verify_adapter
from tunesmith.workflows.chat import reply, trained_system
from tunesmith.workflows.compare import compare
from tunesmith.workflows.doctor import examine
from tunesmith.workflows.evaluate import evaluate
from tunesmith.workflows.export import export as export_model  # `tunesmith.export` is the package of that name
from tunesmith.workflows.load import LoadedModel, load
from tunesmith.workflows.merge import merge
from tunesmith.workflows.proof import prove
from tunesmith.workflows.push import push
from tunesmith.workflows.quickstart import quickstart
from tunesmith.workflows.serve import serve
from tunesmith.workflows.sweep import sweep
from tunesmith.workflows.train import no_event, restart, start

__all__ = [
    "LoadedModel",
    "compare",
    "evaluate",
    "examine",
    "export_model",
    "fuse",
    "list_adapters",
    "load",
    "merge",
    "push",
    "quickstart",
    "reply",
    "resume",
    "serve",
    "show_adapter",
    "sweep",
    "train",
    "trained_system",
    "unfuse",
    "verify_adapter",
    "write_report",
]


def train(
    config: RunConfig,
    out: str | Path | None = None,
    *,
    poc: int | None = None,
    gates: Sequence[str] = (),
    sink: EventSink = no_event,
    progress: Progress = no_progress,
) -> TrainResult:
    """Train a new run in the folder `out` (default: a new name under runs/).

    With `poc`, first on so many rows in `out`-poc, and on all of them only if `gates` hold there (default: the task's main metric at
    least 5 points above the base's on `data.eval_path`).

    Raises UserError (2) for wrong settings or data, before the model is loaded where possible; MachineError (3);
    VerificationError (1) for training that went wrong; Interrupted (130) after saving on SIGINT or SIGTERM.
    """
    folder = Path(out) if out else None
    if gates and poc is None:
        raise ConfigError("gates are what a proof of concept is held to: pass poc (--poc N), or leave them out")
    if poc is not None:
        folder, _ = prove(config, poc, gates, folder, sink, progress)
    result = start(config, folder, progress).train(sink, progress)
    write_report(result.run)
    return result


def resume(run: str | Path, *, sink: EventSink = no_event, progress: Progress = no_progress) -> TrainResult:
    """Go on with an interrupted or killed run from its newest checkpoint. On the CPU the losses are bit for bit those
    of an uninterrupted run. Raises what `train` raises, and RunError for a run that is finished or whose data changed.
    """
    result = restart(Path(run), progress).train(sink, progress)
    write_report(result.run)
    return result


def write_report(run: str | Path) -> Path:
    """Write RUN/report.html, one self-contained page, from the files in the run folder; returns its path."""
    return _write_report(RunFolder.open(run))
