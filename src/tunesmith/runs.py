"""The run folder: everything a run decided or saw is a file in it (docs/run-folder.md lists them).

Files and checkpoints are written atomically (files.py). `events.jsonl` is appended to; a last line that was cut off by
a kill is ignored by readers and removed by the next writer.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tunesmith.config import RunConfig, load_config
from tunesmith.errors import RunError
from tunesmith.files import atomic_folder, check_writable, disk_errors, finite, remove_folder, write_atomic, write_json
from tunesmith.types import Event

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 1
"""Of the run folder. Readers refuse a newer one."""

CHECKPOINT_PATTERN = re.compile(r"step-(\d{6,})")
BEST_FILE = "best.json"
REFERENCE = "reference.safetensors"


class RunFolder:
    """A run on disk. `create` makes a new one, `open` an existing one."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, metadata: dict[str, Any], chat_template: str | None = None
    ) -> RunFolder:
        """Make the folder with its config, metadata and chat template. Raises RunError if something is there already."""
        cls.refuse_existing(path)
        with atomic_folder(path) as folder:
            (folder / "checkpoints").mkdir()
            run = cls(folder)
            write_atomic(run.config_path, config.to_yaml())
            run.write_metadata(metadata)
            if chat_template is not None:
                write_atomic(run.template_path, chat_template)
        return cls(path)

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """Raise RunError if `path` holds anything, or cannot be written. Leaves nothing behind."""
        if path.name in ("", ".."):
            raise RunError(f"{path}: a run needs a folder of its own; choose another --out, e.g. runs/first")
        with disk_errors(path):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                hint = f", or continue it with `tunesmith resume {path}`" if RunFolder.is_run(path) else ""
                raise RunError(f"{path} exists already; choose another --out{hint}")
            check_writable(path)

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """An existing run. Raises RunError if there is none, or if a newer tunesmith wrote it."""
        run = cls(Path(path))
        if not run.config_path.is_file():
            raise RunError(f"{path}: not a run folder (it has no config.yaml)")
        version = run.metadata.get("format_version", 0)
        if not isinstance(version, int):
            raise RunError(
                f"{run.path / 'metadata.json'}: format_version is {version!r}: expected a whole number; the run folder is damaged"
            )
        if version > FORMAT_VERSION:
            raise RunError(
                f"{path}: run format {version} is newer than this tunesmith reads ({FORMAT_VERSION}); upgrade"
            )
        return run

    @staticmethod
    def is_run(path: Path | str) -> bool:
        """Whether `path` is a run folder."""
        return (Path(path) / "config.yaml").is_file() and (Path(path) / "metadata.json").is_file()

    @property
    def template_path(self) -> Path:
        """The chat template that the run is trained with, whatever becomes of the file or model that it came from."""
        return self.path / "chat_template.jinja"

    @property
    def config_path(self) -> Path:
        """The fully resolved configuration."""
        return self.path / "config.yaml"

    @property
    def adapter_path(self) -> Path:
        """The trained adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def model_path(self) -> Path:
        """The trained model of a full fine-tuning."""
        return self.path / "model"

    @property
    def events_path(self) -> Path:
        """One JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def config(self) -> RunConfig:
        """The configuration as the run resolved it."""
        return load_config(self.config_path)

    @property
    def metadata(self) -> dict[str, Any]:
        """Base model and data hashes, versions, hardware, seed, lineage."""
        return self.read_json("metadata.json")

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds; empty while the run is not finished."""
        return self.read_json("metrics.json") if (self.path / "metrics.json").exists() else {}

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Write metadata.json with the folder's format version."""
        write_json(self.path / "metadata.json", {"format_version": FORMAT_VERSION, **metadata})

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json: the run is finished."""
        write_json(self.path / "metrics.json", metrics)

    def write_reference(self, values: Mapping[str, np.ndarray]) -> None:
        """Keep what the model said of each pair before training, (pairs, 2) in fp32, by the name of the data."""
        from safetensors.numpy import save

        write_atomic(self.path / REFERENCE, save(dict(values)))

    def read_reference(self) -> dict[str, np.ndarray] | None:
        """What `write_reference` kept; None if it has not. Raises RunError if it is damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = self.path / REFERENCE
        if not path.exists():
            return None
        try:
            return load(path.read_bytes())
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(f"{path}: cannot be read ({error}); delete it: it is made again from the base") from error

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of the folder. Raises RunError if it is missing or damaged."""
        path = self.path / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{path}: missing; the run folder is damaged") from None
        except (ValueError, OSError, RecursionError) as error:
            raise RunError(f"{path}: cannot be read ({error}); the run folder is damaged") from None
        if not isinstance(value, dict):
            raise RunError(f"{path}: expected a JSON object; the run folder is damaged")
        return value

    # -- events ---------------------------------------------------------------------------------------------------

    def events(self) -> list[Event]:
        """All events in order, as one uninterrupted run would have logged them.

        After a resume from step s, or a return to it, the steps beyond s that were logged before are left out: they are
        done again. What was said of steps that were skipped stays. A last line that was cut off is ignored.
        """
        if not self.events_path.exists():
            return []
        events: list[Event] = []
        for number, line in enumerate(self.events_path.read_bytes().split(b"\n")[:-1], 1):
            try:
                event = json.loads(line)
                if not isinstance(event, dict):
                    raise ValueError("expected a JSON object")
            except (ValueError, RecursionError):
                raise RunError(f"{self.events_path}:{number}: not a JSON event; the run folder is damaged") from None
            if event.get("event") in ("resume", "rollback"):
                start = event["step"]
                events = [kept for kept in events if not _undone(kept, start)]
            events.append(event)
        return events

    @contextmanager
    def event_log(self) -> Iterator[Callable[[Event], None]]:
        """A function that appends events to events.jsonl, each flushed as a whole line."""
        with disk_errors(self.events_path):
            if self.events_path.exists():
                _drop_cut_line(self.events_path)
            file = self.events_path.open("a", encoding="utf-8")

        def log(event: Event) -> None:
            with disk_errors(self.events_path):
                _append(file, {**event, "time": round(time.time(), 3)})

        try:
            yield log
        finally:
            with disk_errors(self.events_path):  # closing tries once more to write what did not fit
                file.close()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def checkpoints_path(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint_path(self, step: int) -> Path:
        """The checkpoint after `step` optimizer steps."""
        return self.checkpoints_path / f"step-{step:06d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Complete checkpoints as (step, folder), oldest first."""
        found = []
        if self.checkpoints_path.is_dir():
            for path in self.checkpoints_path.iterdir():
                match = CHECKPOINT_PATTERN.fullmatch(path.name)
                if match:
                    found.append((int(match.group(1)), path))
        return sorted(found)

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Record which checkpoint is the best one."""
        write_json(self.checkpoints_path / BEST_FILE, {"step": step, "metric": metric, "value": value})

    def best(self) -> dict[str, Any] | None:
        """The best checkpoint's `{step, metric, value}`, if one was marked."""
        return self.read_json(f"checkpoints/{BEST_FILE}") if (self.checkpoints_path / BEST_FILE).exists() else None

    def prune_checkpoints(self, keep: int | None, best_step: int = 0) -> None:
        """Remove all but the newest `keep` checkpoints and the best one, and what a killed process left half written."""
        for leftover in self.checkpoints_path.glob(".tmp-*"):
            if leftover.is_dir():
                remove_folder(leftover)
        if keep is None:
            return
        checkpoints = self.checkpoints()
        for step, path in checkpoints[: max(0, len(checkpoints) - keep)]:
            if step != best_step:
                remove_folder(path)


def default_run_path(config: RunConfig, root: Path = Path("runs")) -> Path:
    """`runs/<model>-<method>-<date>-<time>`: a new name for a run."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.model.name).name) or "model"
    return root / f"{model}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"


def _undone(event: Event, start: int) -> bool:
    """Whether going on from step `start` makes the event one of another past."""
    return event.get("step") is not None and event["step"] > start and event.get("event") != "skipped"


def _append(file: IO[str], event: Event) -> None:
    file.write(json.dumps(finite(event), ensure_ascii=False) + "\n")
    file.flush()


def _drop_cut_line(path: Path) -> None:
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        with path.open("r+b") as file:
            file.truncate(end)
