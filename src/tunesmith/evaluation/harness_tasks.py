"""Find tasks of lm-evaluation-harness by name, load them with their data, and refuse what cannot be asked here."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, DataError, MachineError, TunesmithError

GREEDY = {"do_sample": False, "temperature": 0.0, "num_beams": 1}
"""Generation settings that must be so, where a task names them."""

HONOURED = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "top_p", "top_k"}
"""Generation settings that are followed (the harness has four names for one limit), or say nothing about greedy answers."""

CATALOGUE = (
    "tasks of the harness's own catalogue need the network for their data sets, unless the Hugging Face cache has them"
)
LOCAL = "or write the task as a local file: docs/harness.md"


@dataclass
class LoadedTasks:
    """The harness's tasks, ready to be asked, and the groups that they were chosen by, each by its name."""

    tasks: dict[str, Any]
    groups: dict[str, Any]


def require_harness() -> None:
    """Raise MachineError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise MachineError(
            f"tasks of lm-evaluation-harness need the package {error.name}; install it with: pip install 'tunesmith[harness]'"
        ) from None


def load_tasks(names: Sequence[str], folder: Path | None, limit: int | None, num_fewshot: int | None) -> LoadedTasks:
    """The tasks and groups with these names, from `folder` (may be None) before the harness's catalogue, with their data.

    Raises ConfigError (names, settings, task files), DataError (data files) or MachineError (no network, no package) with a line for each
    task that cannot be asked; of several kinds, the user's comes first.
    """
    problems: list[TunesmithError] = []
    if not names:
        problems.append(
            ConfigError("no task of lm-evaluation-harness is named; name some: --tasks arc_easy,kobest_boolq")
        )
    if limit is not None and limit < 1:
        problems.append(ConfigError(f"the limit of rows is {limit}; give 1 or more, or none for all rows"))
    if num_fewshot is not None and num_fewshot < 0:
        problems.append(ConfigError(f"the number of few-shot examples is {num_fewshot}; give 0 or more"))
    if folder is not None and not folder.is_dir():
        problems.append(ConfigError(f"{folder}: no such folder of task files"))
    if problems:
        raise _together(problems)
    index = _index(names, folder)
    found = LoadedTasks({}, {})
    for name in names:
        try:
            loaded = _load_one(index, name, folder)
        except TunesmithError as error:
            problems.append(error)
            continue
        tasks, groups = loaded["tasks"], loaded.get("groups", {})
        twice = sorted(found.tasks.keys() & tasks.keys())
        if twice:
            problems.append(
                ConfigError(f"--tasks: {name} asks again what another name asks: {', '.join(twice)}; leave one out")
            )
        problems += [problem for task in tasks.values() if (problem := _refusal(task, num_fewshot))]
        found.tasks |= tasks
        found.groups |= groups
    if problems:
        raise _together(problems)
    for task in found.tasks.values():
        if num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", num_fewshot or 0)
    return found


def _together(problems: list[TunesmithError]) -> TunesmithError:
    """One error with every line; of the user's kind (exit code 2) if one of them is."""
    first = min(problems, key=lambda problem: problem.exit_code)
    return type(first)("\n".join(map(str, problems)))


def _index(names: Sequence[str], folder: Path | None) -> Any:
    """The task files in `folder`, with the harness's 14,000 (five seconds) only if a name is not there."""
    from lm_eval.tasks import TaskManager

    skipped = _Skipped()
    log = logging.getLogger("lm_eval.tasks._index")
    level = log.level
    log.addHandler(skipped)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        index = None if folder is None else TaskManager(include_path=str(folder.resolve()), include_defaults=False)
        if index is None or _unknown(index, names):
            index = TaskManager(include_path=None if folder is None else str(folder.resolve()))
    finally:
        log.removeHandler(skipped)
        log.setLevel(level)
        log.propagate = True
    unknown = _unknown(index, names)
    if not unknown:
        return index
    where = "the harness's catalogue" if folder is None else f"{folder} or the harness's catalogue"
    problems = []
    for name in unknown:
        near = difflib.get_close_matches(name, index.all_tasks, n=5)
        hint = f"near it: {', '.join(near)}" if near else "no name is near it"
        problems.append(f"--tasks: no task, group or tag {name!r} in {where} ({len(index.all_tasks):,} names); {hint}")
    if folder is not None:
        problems += [f"{line}: not read as a task file" for line in skipped.below(folder)]
    problems.append(f"{CATALOGUE}; {LOCAL}")
    raise ConfigError(problems)


class _Skipped(logging.Handler):
    """What the harness says, at its lowest level, about files that it could not read."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.files: dict[Path, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("Skip %s") and isinstance(record.args, tuple):
            path, error = record.args
            self.files[Path(str(path))] = _one_line(error)

    def below(self, folder: Path) -> list[str]:
        return [f"{path}: {error}" for path, error in self.files.items() if path.is_relative_to(folder.resolve())]


def _unknown(index: Any, names: Sequence[str]) -> list[str]:
    """Names that are not there, and those of the members of groups that are."""
    settings = [entry.cfg or {} for name in names if (entry := index.task_index.get(name))]
    members = [member for group in settings if isinstance(group.get("task"), list) for member in group["task"]]
    wanted = [*names, *(member for member in members if isinstance(member, str))]
    return [name for name in wanted if name not in index.task_index]


def _load_one(index: Any, name: str, folder: Path | None) -> dict[str, Any]:
    """The tasks and groups below one name, with their data. Raises the error of that name."""
    import datasets
    import httpx
    import huggingface_hub
    import jinja2
    import pyarrow as pa
    import yaml

    path = index.task_index[name].yaml_path
    where = f"task {name}" if path is None else f"task {name} ({path})"
    offline = (ConnectionError, httpx.TransportError, huggingface_hub.errors.LocalEntryNotFoundError)
    try:
        try:
            return dict(index.load([name]))
        except FileNotFoundError as error:
            local = folder is not None and (path is None or Path(path).is_relative_to(folder.resolve()))
            if isinstance(error, offline) or not local or folder is None:
                raise
            # The harness looks for data files from the working directory alone; task files mean their own folder.
            with contextlib.chdir(folder if path is None else Path(path).parent):
                return dict(index.load([name]))
    except offline as error:
        raise MachineError(
            f"{where}: its data set is neither in the Hugging Face cache nor within reach: {_one_line(error)}; connect to the network "
            f"once, {LOCAL}"
        ) from None
    except ModuleNotFoundError as error:
        raise MachineError(f"{where} needs the package {error.name}; install it, or leave the task out") from None
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{where}: {_one_line(error)}; check its dataset_path; gated data sets need `hf auth login`"
        ) from None
    except (
        datasets.exceptions.DatasetsError,
        huggingface_hub.errors.HfHubHTTPError,
        FileNotFoundError,
        pa.ArrowException,
    ) as error:
        raise DataError(
            f"{where}: its data cannot be read: {_one_line(error.__cause__ or error)}; data_files are looked for from the working "
            "directory, then from the task file's folder"
        ) from None
    except (
        jinja2.TemplateError,
        yaml.YAMLError,
        AssertionError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        RuntimeError,  # of `datasets`, which no longer runs the scripts of old data sets
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"{where}: the harness cannot make a task of it: {type(error).__name__}: {_one_line(error)}"
        ) from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300].removesuffix(".")


def _refusal(task: Any, num_fewshot: int | None) -> TunesmithError | None:
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        return ConfigError(f"task {name} runs programs that the model wrote, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        return ConfigError(f"task {name} shows images or plays sound; only tasks of text can be asked; leave it out")
    fixed = task.get_config("num_fewshot")
    if num_fewshot and fixed == 0:
        return ConfigError(
            f"task {name} fixes num_fewshot: 0, so {num_fewshot} would be ignored; leave it out, or ask 0"
        )
    if task.OUTPUT_TYPE != "generate_until":
        return None
    try:
        check_greedy(task.get_config("generation_kwargs") or {}, name)
    except ConfigError as error:
        return error
    return None


def check_greedy(settings: Mapping[str, Any], task: str) -> None:
    """Raise ConfigError if `generation_kwargs` ask for anything but greedy answers, with what to change."""
    ignored = {"temperature"} if settings.get("do_sample") is False else set()  # as the harness does
    wrong = [key for key in sorted(settings.keys() - HONOURED - ignored) if settings[key] != GREEDY.get(key, ...)]
    if wrong:
        found = ", ".join(f"{key}: {settings[key]}" for key in wrong)
        raise ConfigError(
            f"task {task} sets generation_kwargs {found}; answers here are greedy, so that two models can be compared: ask another task, "
            "or a copy of its file without them"
        )


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """The harness without its log, prints, progress bars, processes (for bootstraps) and the download counts that `datasets` reports.

    Yields a context in which stdout and stderr are heard again: for our own progress.
    """
    import datasets

    out, err = sys.stdout, sys.stderr

    @contextlib.contextmanager
    def aloud() -> Iterator[None]:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield

    log = logging.getLogger("lm_eval")
    level, counts, one_process = (
        log.level,
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
        os.environ.get("DISABLE_MULTIPROC"),
    )
    log.setLevel(logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    os.environ["DISABLE_MULTIPROC"] = "1"
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield aloud
    finally:
        log.setLevel(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if one_process is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = one_process


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The harness's seeds (0, 1234, 1234) in the global generators, which some tasks shuffle their choices with: tuned and base see the
    same rows. Afterwards the generators go on as if nothing had been drawn."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
