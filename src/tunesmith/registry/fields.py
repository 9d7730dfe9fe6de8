"""Which fields the JSON beside an adapter has, of which types. A file that others wrote, or that was damaged, is refused by its name and field
before anything trips over it.

Fields that are not named here are whatever they are; PEFT says what it makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tunesmith.config import QuantizationConfig
from tunesmith.errors import ModelError, RunError, shown

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DType = Literal["bf16", "fp16", "fp32"]
Names = list[str] | None


def _moment(value: object) -> object:
    if value is not None:
        datetime.fromisoformat(value)  # type: ignore[arg-type]  # a TypeError is the answer
    return value


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Base(_Fields):
    name: str | None = None
    weight_hash: Sha256
    config: dict[str, Any] | None = None


class _Hashed(_Fields):
    hash: Sha256


class Record(_Fields):
    """tunesmith.json beside an adapter."""

    base: _Base
    tokenizer: _Hashed | None = None
    chat_template: _Hashed | None = None
    adapter_tokenizer: _Hashed | None = None
    data: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    dtype: DType | None = None
    quantization: dict[str, Any] | None = None
    parent: str | None = None
    adapter_sha256: Sha256 | None = None
    adapter_config: dict[str, Any] | None = None


class _Template(_Hashed):
    name: str
    variables: dict[str, Any] | None = None
    now: Annotated[str | None, BeforeValidator(_moment)] = None


class Metadata(_Fields):
    """A run's metadata.json, as far as loading, merging and the registry read it."""

    model: _Base
    tokenizer: _Hashed
    chat_template: _Template
    data: dict[str, Any]
    dtype: DType
    created: str | None = None
    parent: str | None = None


class PeftFields(_Fields):
    """adapter_config.json: PEFT's own, of LoRA those that decide where it goes and what it does."""

    peft_type: str
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: Names = None
    modules_to_save: Names = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: bool | str | None = True
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    inference_mode: bool = False
    ensure_weight_tying: bool = False
    bias: str = "none"
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = None
    alora_invocation_tokens: list[int] | None = None
    layer_replication: list[Any] | None = None
    loftq_config: dict[str, Any] | None = None
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None


def check_record(path: Path, value: Mapping[str, Any]) -> None:
    """Raise ModelError, of one line, unless `value` is what `path`, a tunesmith.json beside an adapter, has to hold."""
    if wrong := _wrong(Record, value) or _wrong_quantization(value.get("quantization")):
        raise ModelError(f"{path}: damaged: {wrong}; restore it, or remove it to load on any base")


def check_config(path: Path, value: Mapping[str, Any]) -> None:
    """Raise ModelError, of one line, for an adapter_config.json that PEFT cannot read."""
    if wrong := _wrong(PeftFields, value):
        raise ModelError(f"{path}: {wrong}; it is no adapter's config as PEFT saves one, or is damaged")


def check_metadata(path: Path, value: Mapping[str, Any]) -> None:
    """Raise RunError, of one line, for a run's metadata.json that lacks what a run writes."""
    if wrong := _wrong(Metadata, value):
        raise RunError(f"{path}: damaged: {wrong}; restore it")


def _wrong(kind: type[BaseModel], value: Mapping[str, Any]) -> str | None:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        return _line(error)
    except TypeError as error:  # of a value that is no text, where one is parsed
        return str(error)
    return None


def _wrong_quantization(value: Mapping[str, Any] | None) -> str | None:
    try:
        QuantizationConfig.model_validate(value or {})
    except ValidationError as error:
        return f"quantization.{_line(error)}"
    return None


def _line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "dict[", "function-")))
    if first["type"] == "missing":
        return f"{place} is missing"
    said = first["msg"][:1].lower() + first["msg"][1:]
    return f"{place} is {shown(first['input'])}: {said}"
