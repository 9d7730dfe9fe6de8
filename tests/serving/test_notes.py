"""An adapter that is served otherwise than it was trained is said so, with what that changes; a base without graphs, with the reason."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer

from tiny import make_tiny_model
from trained import tiny_base, tiny_run
from tunesmith.config import QuantizationConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.serving import engine, process
from tunesmith.workflows.adapters import verify_adapter
from tunesmith.workflows.chat_adapters import load_with_adapters
from tunesmith.workflows.inference import Effect, Inference, Setting, Unmeasured
from tunesmith.workflows.load import find
from tunesmith.workflows.serve import serve

NF4 = QuantizationConfig(scheme="nf4")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory, "lora")


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_base(tmp_path_factory, 64), tiny_run(tmp_path_factory, "qlora")


def notes_of_serve(
    monkeypatch: pytest.MonkeyPatch, target: Path, adapters: dict[str, Path], **options: Any
) -> list[str]:
    """What `serve` says when it is ready; then it ends."""
    found: list[Any] = []
    monkeypatch.setattr(process, "run", lambda server, listening, on_ready: on_ready())
    paths = {name: str(path) for name, path in adapters.items()}
    serve(str(target), paths, port=0, device="cpu", on_ready=lambda facts: found.append(facts["notes"]), **options)
    return list(found[0])


def numbers_in(note: str) -> tuple[float, float]:
    match = re.search(r"KL (\S+) nats a token from what was trained, top-1 agreement (\S+)%", note)
    assert match, note
    return float(match[1]), float(match[2]) / 100


def measured(run: Path, used: Setting) -> Effect:
    """The effect, both sides from files, and not remembered."""
    unlike = Inference.unlike_training(find(run, device="cpu", dtype=used.dtype), used)
    assert unlike is not None
    return unlike.measure()


def no_measurement(*_: Any, **__: Any) -> Any:
    raise AssertionError("something is measured")


def test_serve_measures_at_its_start_and_remembers(
    qlora: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, trained = qlora
    (note,) = notes_of_serve(monkeypatch, base, {"q": trained}, dtype="fp32")
    assert note.startswith(f"{trained}: trained in fp32 over a base in nf4, used here in fp32: KL ")
    assert note.endswith("; --quantization nf4 would use it as it was trained")
    with monkeypatch.context() as other:
        other.setenv("TUNESMITH_CACHE", str(tmp_path / "other"))
        effect = measured(trained, Setting("fp32"))
    kl, top1 = numbers_in(note)
    assert kl == pytest.approx(effect.kl, rel=0.05)
    assert kl > 1e-5
    assert top1 == pytest.approx(effect.top1, abs=0.02)
    monkeypatch.setattr(Inference, "measure", no_measurement)
    assert notes_of_serve(monkeypatch, base, {"q": trained}, dtype="fp32") == [note]
    assert notes_of_serve(monkeypatch, base, {"q": trained}, dtype="fp32", quantization="nf4") == []
    shutil.copytree(trained / "adapter", tmp_path / "alone")
    (alone,) = notes_of_serve(monkeypatch, base, {"q": tmp_path / "alone"}, dtype="fp32")
    assert alone == note.replace(str(trained), str(tmp_path / "alone"))


def test_what_is_measured_is_the_adapter_that_is_meant(
    run: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one before it, and not the base: of several each is at work while it is measured."""
    other = tiny_run(tmp_path_factory, "lora", **{"optimizer.lr": 2e-2})
    base = tiny_base(tmp_path_factory)
    one, two = notes_of_serve(monkeypatch, base, {"one": run, "two": other}, dtype="bf16")
    assert one.endswith("; --dtype fp32 would use it as it was trained")
    for note, path in ((one, run), (two, other)):
        effect = measured(path, Setting("bf16"))
        assert numbers_in(note)[0] == pytest.approx(effect.kl, rel=0.3)
        assert numbers_in(note)[0] < 0.1


def test_what_cannot_be_measured_or_remembered_is_said_all_the_same(
    run: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path_factory)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file" / "below"))
    (note,) = notes_of_serve(monkeypatch, base, {"one": run}, dtype="bf16")
    assert numbers_in(note)[0] > 0, "a cache that cannot be written costs time alone"

    def cannot(*_: Any) -> Any:
        raise Unmeasured("its weights are elsewhere")

    monkeypatch.setattr(Inference, "measure", cannot)
    (note,) = notes_of_serve(monkeypatch, base, {"one": run}, dtype="bf16")
    assert "what that changes is not measured: its weights are elsewhere; --dtype fp32 would" in note


def test_a_record_of_rubbish_is_refused_and_holds_no_template(
    run: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "alone"))
    record = json.loads((folder / "tunesmith.json").read_text())
    with LiveServer(tiny_base(tmp_path_factory), {}) as live:
        for quantization in ({"scheme": "int3"}, {"colour": 1}, {"scheme": []}):
            (folder / "tunesmith.json").write_text(json.dumps({**record, "quantization": quantization}))
            response = live.post("/v1/adapters", json={"name": "bad", "path": str(folder)})
            assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_adapter")
            assert "quantization" in response.json()["error"]["message"]
        assert list(live.templates._users.values()) == [1]


def test_chat_says_it_too(qlora: tuple[Path, Path]) -> None:
    base, trained = qlora
    notes: list[str] = []
    load_with_adapters(str(base), {"q": str(trained)}, dtype="bf16", device="cpu", on_note=notes.append).close()
    (note,) = notes
    assert note.startswith(f"{trained}: trained in fp32 over a base in nf4, used here in bf16: KL ")
    assert note.endswith(" tokens of fixed prompts)"), "chat has no --quantization"
    effect = measured(trained, Setting("bf16"))
    assert numbers_in(note)[0] == pytest.approx(effect.kl, rel=0.3)


def test_an_adapter_that_comes_later_is_said_in_the_answer_and_measured_by_nobody(
    run: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path_factory)
    with LiveServer(base, {}, dtype="bf16") as live:
        with monkeypatch.context() as unmeasured:
            unmeasured.setattr(Inference, "measure", no_measurement)
            facts = live.post("/v1/adapters", json={"name": "late", "path": str(run)}).json()
        how = f"`tunesmith adapters verify {run} --model {base} --dtype bf16` measures it"
        said = f"{run}: trained in fp32, used here in bf16: what that changes is not measured: {how}"
        assert facts["notes"] == [f"{said}; --dtype fp32 would use it as it was trained"]
        verify_adapter(run, base, "bf16", "cpu")
        (note,) = live.post("/v1/adapters", json={"name": "late", "path": str(run)}).json()["notes"]
        assert numbers_in(note)[0] > 0
    with LiveServer(base, {}) as live:
        assert live.post("/v1/adapters", json={"name": "late", "path": str(run)}).json()["notes"] == []


def test_a_run_over_another_base_is_told_which_one_it_wants(run: Path, tmp_path: Path) -> None:
    """`serve` has no --model: its base is what stands first."""
    other = make_tiny_model(tmp_path / "other", seed=8)
    shutil.copytree(run / "adapter", tmp_path / "alone")
    base = str(tmp_path / "other")
    for path in (run, tmp_path / "alone"):
        with pytest.raises(ModelError, match="are not those that") as found:
            load_with_adapters(base, {"bins": str(path)}, dtype="fp32", device="cpu")
        assert "name " in str(found.value)
        assert "base-32 in this base's place" in str(found.value)
        assert "--model" not in str(found.value)
        with LiveServer(other, {}) as live:
            said = live.post("/v1/adapters", json={"name": "bins", "path": str(path)}).json()["error"]["message"]
            assert said == str(found.value)


def test_a_base_that_cannot_have_graphs_says_why_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny_model(tmp_path / "base", family="mistral", sliding_window=8)
    assert notes_of_serve(monkeypatch, base, {}, dtype="fp32") == [], "nobody expects graphs on a CPU"

    class OnGpu(engine.Engine):
        def __init__(self, *arguments: Any, **settings: Any):
            super().__init__(*arguments, cache_tokens=2000, fixed=True, **settings)

    monkeypatch.setattr(engine, "Engine", OnGpu)
    (note,) = notes_of_serve(monkeypatch, base, {}, dtype="fp32")
    assert note.startswith("steps go launch by launch, without CUDA graphs: ")
    assert "something else than all keys and values" in note


def test_a_loftq_adapter_is_served_over_16_bits_alone(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved for the base's own weights; over quantized ones it lacks what quantization lost. A lone folder says so in its record."""
    base = tiny_base(tmp_path_factory, 64)
    run = tiny_run(tmp_path_factory, "qlora", **{"adapter.init_lora_weights": "loftq"})
    shutil.copytree(run / "adapter", tmp_path / "alone")
    for path in (run, tmp_path / "alone"):
        with pytest.raises(ModelError, match="LoftQ's adapter is saved for the base's 16-bit weights"):
            notes_of_serve(monkeypatch, base, {"q": path}, dtype="fp32", quantization="nf4")
        notes = notes_of_serve(monkeypatch, base, {"q": path}, dtype="fp32")
        assert not [note for note in notes if "--quantization nf4" in note]
        with pytest.raises(ConfigError, match="LoftQ changed the base for this adapter"):
            load_with_adapters(str(path), {"other": str(path)}, device="cpu")
