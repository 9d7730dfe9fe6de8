"""What a model card reads of a run's files, checked before it is written: each wrong or missing key is one line that names the file.

Only keys that the card shows are listed; a file may hold more (docs/run-folder.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tunesmith.errors import RunError

SHOWN = 5
"""How many wrong keys of a file a message lists."""


class _Record(BaseModel):
    """No key is converted: a number that was written as text is a damaged record. NaN is no measurement."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Model(_Record):
    name: str
    weight_hash: str
    path: str | None = None
    revision: str | None = None


class _Template(_Record):
    name: str
    hash: str


class _DataFile(_Record):
    path: str
    rows: int | None = None


class _Data(_Record):
    path: str | list[str]
    sha256: str | None = None
    files: list[_DataFile] = []
    train_rows: int | None = None
    train_tokens: int | None = None
    supervised_tokens: int | None = None
    eval_path: str | None = None
    eval_rows: int | None = None
    eval_sha256: str | None = None
    general_path: str | None = None
    general_sha256: str | None = None


class _Hardware(_Record):
    device: str
    name: str
    memory_gb: float


class Metadata(_Record):
    """metadata.json."""

    tunesmith: str
    method: str
    objective: str
    model: _Model
    chat_template: _Template
    data: _Data
    packages: dict[str, str]
    hardware: _Hardware
    dtype: str
    seed: int
    parent: str | None = None


class Metrics(_Record):
    """metrics.json."""

    steps: int
    tokens_per_second: float
    peak_memory_gb: float
    train_loss: float | None
    eval_loss: float | None
    wall_seconds: float
    train_seconds: float
    trainable_parameters: int
    total_parameters: int


class _Metric(_Record):
    value: float | None
    stderr: float | None = None
    share: bool = False


class _Difference(_Record):
    difference: float | None = None
    p: float | None = None
    verdict: str | None = None


class _Condition(_Record):
    condition: str


class _Gate(_Record):
    passed: bool
    conditions: list[_Condition]


class _Evaluated(_Record):
    tuned: str
    forced: bool = False


class Evaluation(_Record):
    """A file in evaluations/."""

    task: str
    n: int
    model: _Evaluated
    metrics: dict[str, _Metric]
    baseline: dict[str, _Metric] | None = None
    comparison: dict[str, _Difference] | None = None
    gate: _Gate | None = None
    data: str | None = None
    data_sha256: str | None = None


class _Verified(_Record):
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    source_perplexity: float | None = None


class QuantizedHow(_Record):
    """What tunesmith.json of a quantized model says of how near it is to the model that it was made of; all may be missing."""

    verified: _Verified = _Verified()


def check_record(kind: type[_Record], path: Path, value: Mapping[str, Any], mend: str) -> None:
    """Raise RunError, in one line, unless `value`, read from `path`, has what a card needs. `mend` says what to do."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(str(part) for part in one['loc'])}: {_said(one['msg'])}, found {_found(one['input'])}"
            if one["type"] != "missing"
            else f"{'.'.join(str(part) for part in one['loc'])}: missing"
            for one in error.errors(include_url=False)
        ]
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise RunError(f"{path}: damaged: {'; '.join(wrong[:SHOWN])}{more}; {mend}") from None


def _said(message: str) -> str:
    return message[:1].lower() + message[1:]


def _found(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:40]}…"
