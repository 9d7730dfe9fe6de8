"""An adapter in another setting than training's: what that changes is measured once, said at each load, and never where nothing differs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import make_tiny_model
from trained import copy_run, tiny_base, tiny_run
from tunesmith.config import QuantizationConfig
from tunesmith.export.safetensors import fixed_prompts, plain_logits
from tunesmith.files import cache_folder
from tunesmith.models.adapters import load_adapter
from tunesmith.models.forward import autocast
from tunesmith.models.load import load_model
from tunesmith.workflows import inference
from tunesmith.workflows.inference import Effect, Inference, Setting, Unmeasured
from tunesmith.workflows.load import Found, find, load

NF4 = QuantizationConfig(scheme="nf4")
BF16 = {"model.dtype": "bf16"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def really(found: Found, setting: Setting) -> torch.Tensor:
    """The fixed prompts' logits of a model that is loaded in a setting."""
    assert found.adapter is not None
    base: Any = load_model(found.source, found.settings, found.hardware, setting.dtype, setting.quantization)
    with autocast("cpu", setting.dtype):
        return plain_logits(load_adapter(base, found.adapter).eval(), fixed_prompts(found.chat))


def said_by(target: Path, **options: Any) -> list[str]:
    said: list[str] = []
    load(target, progress=lambda stage, *_: said.append(stage), **options)
    return [text for text in said if text != "loading the model"]


def no_measurement(*_: Any, **__: Any) -> Any:
    raise AssertionError("something is measured")


CASES = {
    "bf16 run in fp32": ("lora", BF16, Setting("bf16"), Setting("fp32")),
    "qlora run over 16 bits": ("qlora", {}, Setting("fp32", NF4), Setting("fp32")),
    "bf16 qlora run over 16 bits": ("qlora", BF16, Setting("bf16", NF4), Setting("bf16")),
    "lora run over nf4": ("lora", {"model.name": 64}, Setting("fp32"), Setting("fp32", NF4)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loaded", [True, False], ids=["one side loaded", "both from files"])
def test_the_effect_is_that_of_two_loaded_models(
    case: str, loaded: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    method, values, trained, used = CASES[case]
    if "model.name" in values:
        values = {"model.name": str(tiny_base(tmp_path_factory, 64))}
    found = find(tiny_run(tmp_path_factory, method, **values), device="cpu", dtype=used.dtype)
    unlike = Inference.unlike_training(found, used)
    assert unlike is not None
    assert (str(unlike.trained), str(unlike.used)) == (str(trained), str(used))
    expected = Effect.between(really(found, trained), really(found, used))
    model = None
    if loaded:
        assert found.adapter is not None
        base: Any = load_model(found.source, found.settings, found.hardware, used.dtype, used.quantization)
        model = load_adapter(base, found.adapter)
    effect = unlike.measure(model)
    assert effect.tokens == expected.tokens == 259
    # Rounding in bf16 depends on the attention's kernel too.
    assert effect.kl == pytest.approx(expected.kl, rel=0.3 if case == "bf16 run in fp32" else 0.05)
    assert effect.top1 == pytest.approx(expected.top1, abs=0.02)
    assert effect.kl > 1e-6
    assert unlike.known() == effect


def test_a_load_measures_and_the_next_says_it_at_once(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path_factory, "qlora")
    first, second = said_by(run, dtype="fp32", quantized=False)
    assert first == "measuring fp32 against fp32 over a base in nf4, as trained"
    assert second.startswith("trained in fp32 over a base in nf4, used here in fp32: KL ")
    assert second.endswith(" (259 tokens of fixed prompts)")
    assert load(run, dtype="fp32", quantized=False).unlike_training == second
    monkeypatch.setattr(Inference, "measure", no_measurement)
    order: list[str] = []
    load(run, dtype="fp32", quantized=False, progress=lambda stage, *_: order.append(stage))
    assert order == ["loading the model", second, "loading the model"]
    # A lone adapter over the base that it names is the same thing.
    shutil.copytree(run / "adapter", tmp_path / "alone")
    assert said_by(tmp_path / "alone", dtype="fp32") == [second]


def test_another_adapter_or_base_is_another_measurement(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = find(tiny_run(tmp_path_factory), dtype="bf16", device="cpu")
    unlike = Inference.unlike_training(found, Setting("bf16"))
    assert unlike is not None
    unlike.keep(Effect(1.0, 0.5, 10))
    assert unlike.known() == Effect(1.0, 0.5, 10)
    other = find(tiny_run(tmp_path_factory, "lora", **{"training.seed": 1}), dtype="bf16", device="cpu")
    base = replace(found.source, path=make_tiny_model(tmp_path / "other", seed=5))
    for changed in (
        replace(unlike, adapter=other.adapter), replace(unlike, source=base), replace(unlike, used=Setting("fp16")),
        replace(unlike, trained=Setting("fp16")), replace(unlike, used=Setting("bf16", NF4)),
    ):  # fmt: skip
        assert changed.known() is None


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"kl": "a", "top1": 1, "tokens": 2}', '{"kl": [], "top1": 1, "tokens": 2}']
)
def test_a_damaged_memory_is_none(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = find(tiny_run(tmp_path_factory), dtype="bf16", device="cpu")
    unlike = Inference.unlike_training(found, Setting("bf16"))
    assert unlike is not None
    unlike.keep(Effect(1.0, 0.5, 10))
    (file,) = (cache_folder() / "effects").iterdir()
    assert set(json.loads(file.read_text())) == {"kl", "top1", "tokens", "trained", "used"}
    file.write_text(text)
    assert unlike.known() is None


def test_nothing_is_measured_or_hashed_where_nothing_differs(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Inference, "measure", no_measurement)
    monkeypatch.setattr(inference, "adapter_hash", no_measurement)
    assert said_by(tiny_run(tmp_path_factory), dtype="fp32") == []
    assert said_by(tiny_run(tmp_path_factory, "qlora"), dtype="fp32") == []
    assert said_by(tiny_base(tmp_path_factory), dtype="bf16") == []
    assert said_by(tiny_run(tmp_path_factory), dtype="bf16", base=True) == []
    shutil.copytree(tiny_run(tmp_path_factory) / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "tunesmith.json").unlink()
    assert said_by(tmp_path / "adapter", dtype="bf16") == [], "nothing says how it was trained"


def test_another_base_is_not_measured(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    said = said_by(tiny_run(tmp_path_factory), model=other, dtype="bf16", force=True)
    assert said[0].endswith("; forced")
    assert said[1:] == [
        "trained in fp32, used here in bf16: what that changes is not measured: the base is another one than training's"
    ]


def test_what_cannot_be_measured_here_is_said(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    def said(**options: Any) -> str:
        _, last = said_by(tiny_run(tmp_path_factory, "qlora"), dtype="fp32", quantized=False, **options)
        return last.partition("what that changes is not measured: ")[2]

    spec = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else spec(name))
        assert said() == (
            "the quantized base needs bitsandbytes; install it with: pip install 'tunesmith[quantization]'; `tunesmith adapters verify` loads both"
        )
    found = find(tiny_run(tmp_path_factory, "qlora"), dtype="fp32", device="cpu")
    unlike = Inference.unlike_training(found, Setting("fp32"))
    assert unlike is not None
    int8 = Setting("fp32", QuantizationConfig(scheme="int8"))
    with pytest.raises(Unmeasured, match=r"LLM\.int8 rounds activations too"):
        replace(unlike, trained=int8).measure()
    with pytest.raises(Unmeasured, match="LoftQ's quantized base"):
        replace(unlike, loftq=2).measure()
    base = Path(shutil.copytree(found.source.path, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {}}))
    with pytest.raises(Unmeasured, match="it runs code of its own"):
        replace(unlike, source=replace(found.source, path=base)).measure()
    assert unlike.known() is None

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(inference, "Skeleton", full)
    assert said().startswith("no memory is left on cpu for one module of the base beside the model")


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    run = copy_run(tiny_run(tmp_path_factory), tmp_path / "run")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    assert len(said_by(run, dtype="bf16")) == 2
