"""Probing devices, compute types, and memory numbers. GPUs are imitated where there is none."""

from __future__ import annotations

import os
import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.errors import ConfigError
from tunesmith.hardware import (
    Hardware,
    available_cores,
    compute_dtype,
    free_memory_gb,
    memory_in_use_gb,
    probe,
    torch_dtype,
)

CPU = Hardware("cpu", "some CPU", 16.0, bf16=False)
CPU_BF16 = Hardware("cpu", "some CPU", 16.0, bf16=True)
T4 = Hardware("cuda:0", "Tesla T4", 15.0, bf16=False, capability=(7, 5))
H100 = Hardware("cuda:0", "NVIDIA H100", 79.1, bf16=True, capability=(9, 0))
MPS = Hardware("mps", "Apple GPU", 16.0, bf16=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [
        SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30, major=7, minor=5),
        SimpleNamespace(name="NVIDIA A100", total_memory=40 * 2**30, major=8, minor=0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: cards[number])


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_cpu(device: str) -> None:
    hardware = probe(device)
    assert (hardware.device, hardware.type, hardware.capability) == ("cpu", "cpu", None)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert hardware.memory_gb == pages / 2**30
    assert hardware.name


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("auto", Hardware("cuda:0", "Tesla T4", 15.0, False, (7, 5))),
        ("cuda", Hardware("cuda:0", "Tesla T4", 15.0, False, (7, 5))),
        ("cuda:1", Hardware("cuda:1", "NVIDIA A100", 40.0, True, (8, 0))),
    ],
)
def test_gpus(device: str, expected: Hardware) -> None:
    assert probe(device) == expected
    assert expected.type == "cuda"


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError) as caught:
        probe("cuda:2")
    assert str(caught.value) == "model.device is cuda:2, but there are 2 GPUs (from cuda:0)"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", f"model.device is cuda, but PyTorch {torch.__version__} sees no GPU; use cpu or auto"),
        ("cuda:1", f"model.device is cuda:1, but PyTorch {torch.__version__} sees no GPU; use cpu or auto"),
        ("mps", "model.device is mps, but PyTorch sees no Apple GPU; use cpu or auto"),
    ],
)
def test_no_gpu(device: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        probe(device)
    assert str(caught.value) == message


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    "device", ["gpu", "", "0", "cuda:", "cuda:x", "cuda:-1", "cuda:1.0", "cuda:²", "cpu:0", "mps:1", "CUDA", "xpu:0"]
)
def test_an_unknown_device_is_refused_not_guessed(device: str) -> None:
    with pytest.raises(ConfigError) as caught:
        probe(device)
    assert str(caught.value) == f"model.device is {device!r}: expected auto, cpu, cuda, cuda:N or mps"


@pytest.mark.parametrize(
    ("setting", "hardware", "expected"),
    [
        ("auto", H100, "bf16"),
        ("auto", T4, "fp16"),
        ("auto", CPU, "fp32"),
        ("auto", CPU_BF16, "bf16"),
        ("auto", MPS, "fp32"),
        ("bf16", H100, "bf16"),
        ("bf16", CPU, "bf16"),
        ("fp16", H100, "fp16"),
        ("fp16", T4, "fp16"),
        ("fp32", H100, "fp32"),
        ("fp32", CPU_BF16, "fp32"),
    ],
)
def test_compute_dtype(setting: str, hardware: Hardware, expected: str) -> None:
    assert compute_dtype(setting, hardware) == expected


@pytest.mark.parametrize(
    ("setting", "hardware", "message"),
    [
        ("bf16", T4, "model.dtype is bf16, but Tesla T4 (compute capability (7, 5)) has no bf16; use fp16 or auto"),
        ("fp16", CPU, "model.dtype is fp16, but fp16 training on the CPU is not supported; use bf16, fp32 or auto"),
    ],
)
def test_a_type_that_the_device_does_not_have(setting: str, hardware: Hardware, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compute_dtype(setting, hardware)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_torch_dtype(name: str, dtype: torch.dtype) -> None:
    assert torch_dtype(name) is dtype


def test_describe_is_for_metadata() -> None:
    assert H100.describe() == {
        "device": "cuda:0",
        "name": "NVIDIA H100",
        "memory_gb": 79.1,
        "bf16": True,
        "capability": (9, 0),
        "cores": available_cores(),
        "platform": platform.platform(),
    }


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_memory_in_use_is_the_peak_resident_set() -> None:
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])  # touch every page
    peak = memory_in_use_gb("cpu")
    with open("/proc/self/status") as file:  # noqa: PTH123
        status = dict(line.split(":", 1) for line in file)
    resident = int(status["VmHWM"].split()[0]) / 2**20
    assert peak == pytest.approx(resident, rel=0.05)
    del block
    assert memory_in_use_gb("cpu") >= peak, "a peak does not fall"


def test_memory_of_a_gpu_is_asked_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (2**30, 8 * 2**30))
    assert memory_in_use_gb("cuda:1") == 3.0
    assert free_memory_gb(Hardware("cuda:1", "x", 8.0, True, (9, 0))) == 1.0
    assert asked == ["cuda:1", "cuda:1"]


def test_free_memory_of_the_cpu() -> None:
    hardware = probe("cpu")
    assert 0 < free_memory_gb(hardware) <= hardware.memory_gb


def test_cores_are_those_this_process_may_use() -> None:
    assert available_cores() == len(os.sched_getaffinity(0))
