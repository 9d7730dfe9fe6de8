"""`write_report`: read everything a run folder holds, render it, write `RUN/report.html`.

The page needs no network, no other file and no script: plots are inline SVG, and a content security policy forbids the
rest. A file that is missing or damaged costs its own part of the page only, which then says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, RunError
from tunesmith.files import write_atomic
from tunesmith.report import facts
from tunesmith.report.evaluations import read_evaluations
from tunesmith.report.plots import training_plots
from tunesmith.report.text import duration, moment
from tunesmith.runs import RunFolder
from tunesmith.types import Event
from tunesmith.version import __version__

REPORT_FILE = "report.html"

METHODS = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning"}
OBJECTIVES = {
    "sft": "supervised fine-tuning",
    "cpt": "continued pre-training",
    "dpo": "direct preference optimization (DPO)",
    "orpo": "odds ratio preference optimization (ORPO)",
    "simpo": "simple preference optimization (SimPO)",
    "kto": "Kahneman-Tversky optimization (KTO)",
}

T = TypeVar("T")


def write_report(run: RunFolder) -> Path:
    """Write `RUN/report.html` from what is in the folder now, and return its path.

    The run may be finished, dead, copied from elsewhere or still running; nothing but the page is written. Raises
    RunError or MachineError if the page cannot be written.
    """
    path = run.path / REPORT_FILE
    # Data may hold lone surrogates, which UTF-8 has no bytes for: they become question marks.
    write_atomic(path, render("page.html.jinja", _collect(run)).encode("utf-8", errors="replace"))
    return path


def _collect(run: RunFolder) -> dict[str, Any]:
    """What the template shows."""
    problems: list[str] = []
    events: list[Event] = _read(lambda: _known_events(run), problems) or []
    metrics: dict[str, Any] = _read(lambda: run.metrics, problems) or {}
    metadata: dict[str, Any] = _read(lambda: run.metadata, problems) or {}
    config = _read(lambda: run.config, problems)
    clip, limit_gb = (config.optimizer.max_grad_norm, config.memory.limit_gb) if config else (None, None)
    current, earlier, damaged = read_evaluations(run.path / "evaluations")
    notices, notices_left_out = facts.notices(events)
    start: Event = next(iter(facts.events_of(events, "start")), {})
    now = time.time()
    return {
        "model": _model_name(config, metadata),
        "subtitle": _subtitle(config),
        "status": facts.status(events, metrics, now),
        "started": moment(start.get("time")) or moment(metadata.get("created")) or "",
        "wall_time": facts.wall_seconds(events, metrics),
        "problems": problems + damaged,
        "evaluations": current,
        "earlier": earlier,
        "numbers": facts.key_numbers(events, metrics),
        "plots": training_plots(events, clip, limit_gb),
        "evaluated": facts.evaluation_table(events),
        "samples": facts.samples(events),
        "notices": notices,
        "notices_left_out": notices_left_out,
        "settings": _settings(run, config),
        "plan": list(facts.flattened({key: start[key] for key in start if key not in ("event", "time", "step")})),
        "metadata": list(facts.flattened(metadata)),
        "version": __version__,
        "made": moment(now),
        "folder": run.path.absolute().name,
    }


def _read(read: Callable[[], T], problems: list[str]) -> T | None:
    """What `read` returns, or None and a line in `problems`."""
    try:
        return read()
    except (RunError, ConfigError, OSError) as error:
        problems.append(str(error))
        return None


def _known_events(run: RunFolder) -> list[Event]:
    try:
        return run.events()
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a line that is no JSON, or is no event
        raise RunError(f"{run.events_path} is damaged ({type(error).__name__}: {error}); no step is shown") from error


def _model_name(config: RunConfig | None, metadata: dict[str, Any]) -> str:
    recorded = metadata.get("model")
    name = config.model.name if config else recorded.get("name") if isinstance(recorded, dict) else recorded
    if not isinstance(name, str) or not name:
        return "unnamed model"
    # A hub id has one slash and is worth showing whole; of a path only the last part is.
    is_hub_id = name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith(".gguf")
    return name if is_hub_id else Path(name).name


def _subtitle(config: RunConfig | None) -> str:
    if config is None:
        return ""
    return f"{METHODS[config.method]} · {OBJECTIVES[config.objective.name]}"


def _settings(run: RunFolder, config: RunConfig | None) -> list[facts.SettingLine]:
    """The lines of the configuration; as they stand in the file if they cannot be understood."""
    if config is not None:
        return facts.setting_lines(config)
    try:
        text = run.config_path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [facts.SettingLine(line) for line in text.splitlines()]


def render(template: str, page: dict[str, Any]) -> str:
    """The page that a template of this package makes of the values in `page`."""

    def load(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["drawing"] = Markup  # for the SVG that plots.py made: it holds none of the data's text
    return environment.get_template(template).render(page)
