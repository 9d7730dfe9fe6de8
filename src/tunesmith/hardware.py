"""The machine: which device runs the model, what it can do, how much memory it has, and how much is in use.

CUDA (NVIDIA) and the CPU are tested. AMD's ROCm appears to PyTorch as CUDA, and Apple's MPS has a code path: both are
untested. torch is imported inside the functions, so that the command line starts without it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.errors import ConfigError
from tunesmith.types import GB

if TYPE_CHECKING:
    import torch

ComputeDType = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device as probed. `memory_gb` is its total memory in GB (2^30 bytes), `capability` CUDA's (major, minor)."""

    device: str
    name: str
    memory_gb: float
    bf16: bool
    capability: tuple[int, int] | None = None

    @property
    def type(self) -> str:
        """The device's type as PyTorch names it: `cpu`, `cuda`, `mps`."""
        return self.device.split(":")[0]

    def describe(self) -> dict[str, Any]:
        """For metadata.json."""
        return asdict(self) | {"cores": available_cores(), "platform": platform.platform()}


def probe(device: str = "auto") -> Hardware:
    """The device that `model.device` names; `auto` takes CUDA, then MPS, then the CPU. Raises ConfigError."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if device == "cpu":
        return Hardware("cpu", _cpu_name(), _physical_memory() / GB, _cpu_has_bf16())
    if kind == "cuda" and (device == "cuda" or index.isdecimal()):
        if not torch.cuda.is_available():
            raise ConfigError(f"model.device is {device}, but PyTorch {torch.__version__} sees no GPU; use cpu or auto")
        number = int(index or 0)
        if number >= torch.cuda.device_count():
            raise ConfigError(f"model.device is {device}, but there are {torch.cuda.device_count()} GPUs (from cuda:0)")
        properties = torch.cuda.get_device_properties(number)
        capability = (properties.major, properties.minor)
        return Hardware(
            f"cuda:{number}", properties.name, properties.total_memory / GB, capability >= (8, 0), capability
        )
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("model.device is mps, but PyTorch sees no Apple GPU; use cpu or auto")
        return Hardware("mps", "Apple GPU", _physical_memory() / GB, False)
    raise ConfigError(f"model.device is {device!r}: expected auto, cpu, cuda, cuda:N or mps")


def no_fused_engine(hardware: Hardware) -> str | None:
    """Why the fused engine is not the default on this device, or None where it is."""
    if hardware.type != "cuda":
        return "there is no NVIDIA GPU"
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed"


def compute_dtype(setting: str, hardware: Hardware) -> ComputeDType:
    """The type that `model.dtype` means on this device. Raises ConfigError where the device cannot."""
    if setting == "auto":
        if hardware.bf16:
            return "bf16"
        return "fp16" if hardware.type == "cuda" else "fp32"
    if setting == "bf16" and hardware.type == "cuda" and not hardware.bf16:
        raise ConfigError(
            f"model.dtype is bf16, but {hardware.name} (compute capability {hardware.capability}) has no bf16; "
            "use fp16 or auto"
        )
    if setting == "fp16" and hardware.type == "cpu":
        raise ConfigError("model.dtype is fp16, but fp16 training on the CPU is not supported; use bf16, fp32 or auto")
    return setting  # type: ignore[return-value]  # one of the three: pydantic checked it


def torch_dtype(name: str) -> torch.dtype:
    """`bf16`, `fp16`, `fp32` as a torch dtype."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def memory_in_use_gb(device: str) -> float:
    """Peak memory so far in GB: max_memory_allocated on CUDA, the process's peak resident set on the CPU."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / GB
    if device == "mps":
        return torch.mps.driver_allocated_memory() / GB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GB if sys.platform == "darwin" else peak * 1024 / GB  # kilobytes on Linux, bytes on macOS


def free_memory_gb(hardware: Hardware) -> float:
    """Memory that can still be allocated, other processes' use counted, in GB."""
    import torch

    if hardware.type == "cuda":
        return torch.cuda.mem_get_info(hardware.device)[0] / GB
    if sys.platform == "linux":
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024 / GB
    return hardware.memory_gb


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    if sys.platform == "linux":
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_has_bf16() -> bool:
    """Whether bf16 matrix products are native. Emulated, they are several times slower than fp32."""
    if sys.platform != "linux":
        return False
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
