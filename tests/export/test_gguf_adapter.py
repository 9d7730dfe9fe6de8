"""Adapters as GGUF: merged into a model's file, or as a LoRA file of their own, verified over the base's own weights."""

from __future__ import annotations

import json
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from adapters_of import Kind, make_adapter, plain
from gguf_models import family, keys, read, write
from stub_hub import StubHub
from tiny import chat_rows, make_tiny_model, write_jsonl
from trained import copy_run
from tunesmith.errors import ModelError, RunError, VerificationError
from tunesmith.export.gguf import gguf_adapter_hash, gguf_seal
from tunesmith.export.gguf_checks import Reference, warning_of
from tunesmith.export.gguf_llama_cpp import LlamaCpp, agreement
from tunesmith.files import sha256_file
from tunesmith.workflows import export_gguf as workflow
from tunesmith.workflows.export import export
from tunesmith.workflows.push import push

# -- an adapter --------------------------------------------------------------------------------------------------------


def test_a_run_is_merged_and_exported(gguf_run: Path, models: Any) -> None:
    from safetensors.torch import load_file

    result = export(gguf_run, "gguf:f32", device="cpu")
    (row,) = result["files"]
    assert (row["path"], row["kl"] < 1e-7) == (str(gguf_run / "gguf" / "run-f32.gguf"), True)
    adapter = load_file(gguf_run / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.layers.0.self_attn.v_proj.lora_{part}.weight"] for part in "AB")
    base = load_file(models("llama") / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    expected = base + 32 / 16**0.5 * b @ a
    assert (expected - base).norm() > 0.05 * base.norm()
    torch.testing.assert_close(
        torch.from_numpy(read(Path(row["path"]))["blk.0.attn_v.weight"]), expected, rtol=1e-5, atol=1e-6
    )
    assert sorted(path.name for path in (gguf_run / "gguf").iterdir()) == ["run-f32.Modelfile", "run-f32.gguf"]


def test_an_adapter_of_its_own_computes_over_the_base(gguf_run: Path, tmp_path: Path) -> None:
    result = export(gguf_run, "gguf:f32", tmp_path / "a.gguf", lora=True, device="cpu")
    (row,) = result["files"]
    assert row["kl"] < 1e-5 < 0.05 * result["effect"]  # the base that it was verified over is f16
    assert Path(row["modelfile"]).read_text().splitlines()[2:4] == ["FROM ./llama-f16.gguf", "ADAPTER ./a.gguf"]
    found = keys(tmp_path / "a.gguf")
    assert (found["general.type"], found["adapter.type"], found["adapter.lora.alpha"]) == ("adapter", "lora", 32.0)
    tensors = read(tmp_path / "a.gguf")
    assert len(tensors) == 2 * 7 * 2
    assert tensors["blk.0.attn_q.weight.lora_a"].shape == (16, 64)
    from safetensors.torch import load_file

    b = load_file(gguf_run / "adapter" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    ]
    np.testing.assert_allclose(tensors["blk.0.attn_v.weight.lora_b"], 16**0.5 * b.numpy(), rtol=1e-6)  # α/√r over α/r


def test_a_file_says_what_it_was_written_from(gguf_run: Path, models: Any, tmp_path: Path) -> None:
    """By which `push` sees whether a file belongs to the run's present adapter."""
    from tunesmith.models.load import ModelSource, weight_hash
    from tunesmith.version import __version__

    adapter = sha256_file(gguf_run / "adapter" / "adapter_model.safetensors")
    for lora in (False, True):
        path = tmp_path / f"{lora}.gguf"
        export(gguf_run, "gguf:f16", path, lora=lora, device="cpu")
        found = {key: value for key, value in keys(path).items() if key.startswith("tunesmith.")}
        base = weight_hash(ModelSource("base", models("llama")))
        assert found == {
            "tunesmith.version": __version__,
            "tunesmith.adapter_hash": adapter,
            "tunesmith.base_hash": base,
            "tunesmith.sha256": sha256(
                path.read_bytes().replace(found["tunesmith.sha256"].encode(), b"0" * 64)
            ).hexdigest(),
        }
        assert gguf_seal(path) == (found["tunesmith.sha256"], found["tunesmith.sha256"])
        assert gguf_adapter_hash(path) == adapter
    export(gguf_run / "adapter", "gguf:f16", tmp_path / "alone.gguf", device="cpu")
    assert gguf_adapter_hash(tmp_path / "alone.gguf") == adapter
    export(models("llama"), "gguf:f16", tmp_path / "plain.gguf", device="cpu")
    assert gguf_adapter_hash(tmp_path / "plain.gguf") is None
    for damaged in (b"", b"GGUF", (tmp_path / "plain.gguf").read_bytes()[:5000], b"PK" * 5000):
        (tmp_path / "d.gguf").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"d\.gguf: not a whole GGUF file .*export it again"):
            gguf_adapter_hash(tmp_path / "d.gguf")


def test_what_was_exported_is_pushed_unless_it_changed(gguf_run: Path, hub: StubHub, tmp_path: Path) -> None:
    """By the commands of docs/hub.md. Changed: weights, and one letter of the chat template."""
    run = copy_run(gguf_run, tmp_path / "support")
    for lora, name in ((False, "support-q8_0.gguf"), (True, "support-lora-q8_0.gguf")):
        export(run, "gguf:q8_0", lora=lora, device="cpu")
        file = run / "gguf" / name
        whole = file.read_bytes()
        changed = [whole[:-3000] + b"\xff" + whole[-2999:]]
        changed += [] if lora else [whole.replace(b"<|im_start|>' +", b"<|im_start|>_ +")]
        for content in changed:
            assert content != whole
            file.write_bytes(content)
            with pytest.raises(
                VerificationError, match=rf"{name}: its weights or metadata are damaged, not those that"
            ):
                push(run, f"me/{name}", what=str(file))
            assert hub.requests == []
        file.write_bytes(whole)
        push(run, f"me/{name}", what=str(file))
        assert hub.files(f"me/{name}")[name] == whole
        hub.requests.clear()
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    assert "--what RUN/gguf/NAME-q8_0.gguf" in page


def test_a_full_fine_tuning_says_its_weights(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    from tunesmith import api
    from tunesmith.config import load_config
    from tunesmith.models.load import ModelSource, weight_hash

    base = make_tiny_model(tmp_path / "base", **family("llama"))
    settings = {"method": "full", "model.name": str(base), "model.dtype": "fp32", "model.device": "cpu"}
    settings |= {"data.path": str(write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))), "training.epochs": 1}
    api.train(load_config(values=settings), tmp_path / "run")
    export(tmp_path / "run", "gguf:f16", tmp_path / "full.gguf", device="cpu")
    found = gguf_adapter_hash(tmp_path / "full.gguf")
    assert found == weight_hash(ModelSource("run", tmp_path / "run" / "model"))
    assert found != keys(tmp_path / "full.gguf")["tunesmith.base_hash"] == weight_hash(ModelSource("base", base))


def test_a_type_that_loses_the_training_is_said() -> None:
    """SmolLM2's base lies on the grid of q4_1: in that type most of what an adapter changes is rounded away again."""
    tuned = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    base = tuned + torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    reference = Reference([list(range(40))], tuned, base)
    effect = reference.effect
    assert effect is not None
    said = warning_of("q4_1", 0.9 * effect, reference, base + 0.1 * (tuned - base))
    assert said is not None
    assert said.startswith("q4_1: the file is nearer to the base than to what was trained")
    said = warning_of("q4_0", 0.9 * effect, reference, base + 0.8 * (tuned - base))
    assert said is not None
    assert said.startswith("q4_0: this type's error")
    assert warning_of("f16", 0.1 * effect, reference, base) is None


# -- an adapter over a base that is not the one in its files ----------------------------------------------------------


def started(base: Path, folder: Path, how: str, converted: bool = False) -> Path:
    """An adapter that was trained from a beginning taken out of the base: as it is, or converted to plain LoRA on saving."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules=targets, init_lora_weights=how)  # type: ignore[arg-type]
    adapted = get_peft_model(plain(base), config)
    first = folder.with_name("beginning")
    if converted:
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(first, save_embedding_layers=False)
        adapted.peft_config["default"].init_lora_weights = how  # type: ignore[assignment]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    more = {"path_initial_model_for_weight_conversion": str(first)} if converted else {}
    adapted.save_pretrained(folder, save_embedding_layers=False, **more)
    return folder


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_over_a_changed_base_is_refused_as_a_file_of_its_own(
    how: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT takes its beginning out of the base when it puts it on; llama.cpp would put it on the whole base."""
    folder = started(models("llama"), tmp_path / "adapter", "pissa")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": how}))
    monkeypatch.setattr(workflow, "load", None)  # before any weight is read
    with pytest.raises(
        ModelError,
        match=rf"init_lora_weights is '{how}': .* export the merged model instead .*, or save the .* converted",
    ):
        export(folder, "gguf:f16", tmp_path / "a.gguf", lora=True, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_lora_file_is_verified_over_the_bases_own_weights(
    how: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the refusal not there, what llama.cpp computes over the base as others have it would tell."""
    from tunesmith.export import gguf as writer

    folder = started(models("llama"), tmp_path / "adapter", how)
    monkeypatch.setattr(writer, "has_own_start", lambda config: False)
    with pytest.raises(VerificationError, match=r"base and adapter in llama.cpp do not compute what the source does"):
        export(folder, "gguf:f16", tmp_path / "a.gguf", lora=True, device="cpu")


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_both_ways_out_of_such_an_adapter(how: str, models: Any, tmp_path: Path) -> None:
    """Merged, and converted: llama.cpp over the base's own file computes what PEFT does; the effect is counted from the base itself."""
    folder = started(models("llama"), tmp_path / "adapter", how)
    with torch.no_grad():
        ids = torch.tensor([list(range(300, 340))])
        tuned = PeftModel.from_pretrained(plain(models("llama")), folder).eval()(input_ids=ids).logits[0]
        base = plain(models("llama"))(input_ids=ids).logits[0]
    result = export(folder, "gguf:f32", tmp_path / "merged.gguf", device="cpu")
    with LlamaCpp(tmp_path / "merged.gguf") as opened:
        found = opened.log_probabilities(ids[0].tolist())
    assert agreement([tuned], [found]).kl < 1e-6 < 1e-3 < agreement([base], [found]).kl
    converted = started(models("llama"), tmp_path / "converted", how, converted=True)
    alone = export(converted, "gguf:f32", tmp_path / "a.gguf", lora=True, device="cpu")
    write(models("llama"), tmp_path / "base.gguf", "f32")
    with LlamaCpp(tmp_path / "base.gguf", adapter=tmp_path / "a.gguf") as opened:
        assert agreement([tuned], [opened.log_probabilities(ids[0].tolist())]).kl < 1e-4
    assert alone["effect"] == pytest.approx(result["effect"], rel=1e-2)


@pytest.mark.parametrize("which", ["pissa", "head"])
def test_peft_does_not_warn_of_what_is_compared(which: str, models: Any, tmp_path: Path) -> None:
    """On the command line a warning is a line of a library's source."""
    if which == "pissa":
        folder = started(models("llama"), tmp_path / "adapter", "pissa")
    else:
        base = make_tiny_model(tmp_path / "base", **{**family("llama"), "tie_word_embeddings": True})
        folder = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": ["q_proj", "lm_head"]}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = export(folder, "gguf:f32", tmp_path / "out", device="cpu")
    assert [str(one.message) for one in said if "/peft/" in one.filename] == []
    assert result["files"][0]["kl"] < 1e-6


# -- what is known before any work ------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is an adapter loaded nor merged."""
    monkeypatch.setattr(workflow, "load", None)
    monkeypatch.setattr(workflow, "merge", None)


@pytest.mark.usefixtures("no_work")
def test_an_adapter_on_a_tied_head_says_what_to_do(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", **{**family("llama"), "tie_word_embeddings": True})
    folder = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(ModelError, match=r"lm_head.lora_A.weight changes the head, .* export the merged model instead"):
        export(folder, "gguf:f16", tmp_path / "a.gguf", lora=True, device="cpu")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("lora", [False, True])
def test_a_tokenizer_without_a_name_is_refused_before_the_merge(lora: bool, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")  # bytes alone, cut nowhere
    folder = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": ["q_proj"]}))
    with pytest.raises(ModelError, match=r"no known name in llama.cpp"):
        export(folder, "gguf:f16", tmp_path / "a.gguf", lora=lora, device="cpu")


def test_an_adapter_that_llama_cpp_does_not_load_says_what_to_do(models: Any, tmp_path: Path, gguf_run: Path) -> None:
    """On another family's base some of its matrices have no place, or another shape."""
    export(gguf_run, "gguf:f16", tmp_path / "lora.gguf", lora=True, device="cpu")
    write(models("gemma2"), tmp_path / "base.gguf", "f16")
    with pytest.raises(
        VerificationError,
        match=r"cannot load base.gguf, a GGUF of the base, with lora.gguf on it \(.*\); nothing was kept; export the merged model inst",
    ):
        LlamaCpp(tmp_path / "base.gguf", adapter=tmp_path / "lora.gguf")


def test_a_type_that_is_named_twice_is_written_once(models: Any, tmp_path: Path) -> None:
    result = export(models("llama"), "gguf:f16,F16, f16", tmp_path, device="cpu")
    assert [row["path"] for row in result["files"]] == [str(tmp_path / "llama-f16.gguf")]


@pytest.mark.parametrize("is_link", [False, True])
def test_a_modelfile_that_is_there_stays(
    is_link: bool, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "a.Modelfile"
    mine.symlink_to(tmp_path / "nowhere") if is_link else mine.write_text("FROM mine")
    monkeypatch.setattr(workflow, "find", None)
    with pytest.raises(RunError, match=r"a.Modelfile: already there; remove it, or pass another --out"):
        export(models("llama"), "gguf:f16", tmp_path / "a.gguf", device="cpu")
    assert is_link or mine.read_text() == "FROM mine"
