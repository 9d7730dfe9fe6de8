"""`adapters show` and `verify`: everything of one adapter, and what is found when something was changed. Loading refuses the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_of import Kind, make_adapter
from command_line import tunesmith
from tiny import make_tiny_model, make_tokenizer
from trained import copy_run, tiny_base, tiny_run
from tunesmith.errors import ModelError
from tunesmith.runs import RunFolder
from tunesmith.workflows.adapters import show_adapter, verify_adapter
from tunesmith.workflows.load import load


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny_run(tmp_path_factory), tmp_path / "run")


@pytest.fixture
def base(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the base that a test may change."""
    shutil.copytree(tiny_base(tmp_path_factory), tmp_path / "base")
    return tmp_path / "base"


def outcomes(result: dict[str, Any]) -> dict[str, bool | None]:
    return {check["name"]: check["ok"] for check in result["checks"]}


def message(result: dict[str, Any], name: str) -> str:
    return " | ".join(check["message"] for check in result["checks"] if check["name"] == name)


@pytest.mark.parametrize("part", ["run", "adapter"])
def test_what_was_saved_is_found_whole(run: Path, part: str) -> None:
    result = verify_adapter(run if part == "run" else run / "adapter", dtype="fp32")
    assert outcomes(result) == {"file": True, "config": True, "tensors": True, "base": True, "reload": True}
    assert (result["ok"], result["unverifiable"], result["effects"]) == (True, [], [])
    assert message(result, "tensors") == "28 tensors, all finite"
    assert message(result, "base").endswith("weights, tokenizer, chat template, config as recorded")


def change_tensor(run: Path, value: float) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_changed_file_is_seen_by_its_hash(run: Path) -> None:
    change_tensor(run, 0.125)
    result = verify_adapter(run, dtype="fp32")
    assert outcomes(result) == {"file": False, "config": True, "tensors": True, "base": True, "reload": True}
    assert not result["ok"]
    assert "was recorded when it was saved: it was changed since" in message(result, "file")


def test_a_value_that_is_no_number_is_named(run: Path) -> None:
    change_tensor(run, float("inf"))
    result = verify_adapter(run, dtype="fp32")
    assert (outcomes(result)["tensors"], outcomes(result)["reload"]) == (False, False)
    assert "lora_A.weight has 1 values that are no finite numbers" in message(result, "tensors")


def test_a_cut_file_and_a_missing_tensor(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(iter(tensors))]
    save_file(tensors, path, metadata={"format": "pt"})
    result = verify_adapter(run, dtype="fp32")
    assert outcomes(result)["reload"] is False
    assert "1 tensors of the adapter are missing from its file" in message(result, "reload")
    path.write_bytes(path.read_bytes()[:-10])
    result = verify_adapter(run, dtype="fp32")
    assert (outcomes(result)["tensors"], outcomes(result)["reload"]) == (False, False)


def refused(target: Path, base: Path, *parts: str) -> None:
    """`verify` and `load` say the same; each of `parts` stands in it."""
    result = verify_adapter(target, base, dtype="fp32")
    assert not result["ok"]
    said = message(result, "base")
    with pytest.raises(ModelError) as caught:
        load(target, base, "fp32")
    for part in parts:
        assert part in said
        assert part in str(caught.value)
    notes: list[str] = []
    load(target, base, "fp32", progress=lambda stage, *_: notes.append(stage), force=True)
    assert any(note.endswith("; forced") for note in notes)


@pytest.mark.parametrize("part", ["run", "adapter"])
def test_another_base_is_refused(run: Path, base: Path, part: str) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    target = run if part == "run" else run / "adapter"
    refused(target, base, f"{base}: its weights (sha256 ", f") are not those that {target} was trained on (")


@pytest.mark.parametrize("part", ["run", "adapter"])
def test_another_tokenizer_is_refused(run: Path, base: Path, part: str) -> None:
    make_tokenizer(merges=[("b", "i")]).save_pretrained(base)
    target = run if part == "run" else run / "adapter"
    refused(target, base, f"{base}: its tokenizer (sha256 ", f") is not the one that {target} was trained with (")


def test_another_template_is_refused(run: Path, base: Path) -> None:
    """The one beside a lone adapter, or the base's where there is none."""
    template = run / "adapter" / "chat_template.jinja"
    own = template.read_text()
    template.write_text(own.replace("assistant", "helper"))
    refused(run / "adapter", base, f"{base}: the chat template (sha256 ", "is not the one that")
    template.unlink()
    assert verify_adapter(run / "adapter", base, dtype="fp32")["ok"]
    (base / "chat_template.jinja").write_text(own.replace("assistant", "helper"))
    refused(run / "adapter", base, "the chat template (sha256 ")


def test_a_runs_changed_template_differs(run: Path) -> None:
    (run / "chat_template.jinja").write_text("{{ messages }}")
    result = verify_adapter(run, dtype="fp32")
    assert outcomes(result)["base"] is False
    assert "this is not the chat template that the run was trained with" in message(result, "base")


def test_another_tokenizer_beside_the_adapter_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = copy_run(tiny_run(tmp_path_factory, "lora", **{"adapter.new_tokens": ["bin"]}), tmp_path / "run")
    base = tiny_base(tmp_path_factory)
    assert verify_adapter(run, dtype="fp32")["ok"]
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["nib"])
    tokenizer.save_pretrained(run / "adapter")
    for target in (run, run / "adapter"):
        refused(
            target,
            base,
            "the tokenizer beside the adapter (sha256 ",
            f") is not the one that {target} was trained with (",
        )


def test_several_differences_are_all_named(run: Path, base: Path) -> None:
    make_tokenizer(merges=[("b", "i")]).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    refused(run, base, "its weights (sha256 ", "its tokenizer (sha256 ")


def test_a_base_that_is_gone_is_unknown_not_wrong(run: Path) -> None:
    adapter = run / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    record = json.loads((adapter / "tunesmith.json").read_text())
    record["base"]["name"] = "/gone/base"
    (adapter / "tunesmith.json").write_text(json.dumps(record))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    result = verify_adapter(adapter)
    assert outcomes(result) == {"file": True, "config": True, "tensors": True, "base": None}
    assert (result["ok"], result["effects"]) == (True, [])
    assert "not reachable, so that nothing was loaded: /gone/base: no such model folder" in message(result, "base")


def test_an_adapter_from_elsewhere(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "plain", Kind({"target_modules": ["q_proj"]}))
    result = verify_adapter(adapter)
    assert outcomes(result) == {"file": None, "config": None, "tensors": True, "base": None, "reload": True}
    assert message(result, "base") == f"{base}: nothing was recorded of it"
    assert not result["ok"], "nothing is known that it could be compared with"
    assert len(result["unverifiable"]) == 3
    said = tunesmith("adapters", "verify", adapter)
    assert (said.code, said.problems) == (1, [])
    assert said.out.splitlines()[0] == (
        "unverifiable: tunesmith.json (nothing says which weights were saved), the hash of its base's weights, the hashes of the tokenizer and "
        "the chat template missing; that it loads is all that can be said"
    )
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="its weights are pickled"):
        verify_adapter(adapter)
    with pytest.raises(ModelError, match=r"neither a run nor an adapter \(no adapter_config.json\)"):
        verify_adapter(tmp_path)


# -- inference unlike training ----------------------------------------------------------------------------------------


def test_another_type_is_measured_and_remembered(run: Path) -> None:
    result = verify_adapter(run, dtype="bf16")
    (effect,) = result["effects"]
    assert (effect["dtype"], effect["quantization"], effect["tokens"]) == ("bf16", None, 259)
    assert 1e-7 < effect["kl"] < 0.05
    assert effect["top1"] > 0.8
    said: list[str] = []
    load(run, dtype="bf16", progress=lambda stage, *_: said.append(stage))
    assert said == [
        "loading the model",
        f"trained in fp32, used here in bf16: KL {effect['kl']:.2e} nats a token from what was trained, top-1 agreement {effect['top1']:.1%} "
        "(259 tokens of fixed prompts)",
        "loading the model",
    ]


def test_the_16_bit_base_of_a_qlora_run_is_measured(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = copy_run(tiny_run(tmp_path_factory, "qlora"), tmp_path / "run")
    result = verify_adapter(run, dtype="fp32")
    (effect,) = result["effects"]
    assert (effect["dtype"], effect["quantization"]) == ("fp32", None)
    tuned = load(run, dtype="fp32").forward.model
    whole = load(run, dtype="fp32", quantized=False).forward.model
    from tunesmith.data.chat import ChatFormat
    from tunesmith.export.safetensors import fixed_prompts, mean_kl, plain_logits

    prompts = fixed_prompts(ChatFormat(load(run).tokenizer))
    assert effect["kl"] == pytest.approx(mean_kl(plain_logits(tuned, prompts), plain_logits(whole, prompts)), rel=1e-4)
    assert effect["kl"] > 1e-4


# -- show -------------------------------------------------------------------------------------------------------------


def test_show_holds_everything(run: Path) -> None:
    found = show_adapter(run)
    metadata = RunFolder.open(run).metadata
    assert found["metadata"] == metadata
    assert found["settings"]["adapter"]["r"] == found["adapter_config"]["r"] == found["rank"] == 16
    assert found["metadata"]["data"]["sha256"] == metadata["data"]["sha256"]
    assert found["recorded"]["base"]["weight_hash"] == found["base_hash"] == metadata["model"]["weight_hash"]
    assert (found["lineage"], found["evaluations"]) == ([], [])
    alone = show_adapter(run / "adapter")
    assert (alone["settings"], alone["metadata"], alone["base_hash"]) == (None, None, found["base_hash"])


def test_what_is_read_is_not_written(run: Path) -> None:
    """Names that lead elsewhere stay names."""
    record = json.loads((run / "adapter" / "tunesmith.json").read_text())
    (run / "adapter" / "tunesmith.json").write_text(json.dumps(record | {"parent": "../../../outside"}))
    before = sorted(path for path in run.parent.rglob("*"))
    found = show_adapter(run / "adapter")
    assert found["lineage"] == [{"path": str(run.parent.parent / "outside"), "found": False}]
    assert sorted(path for path in run.parent.rglob("*")) == before
    assert torch.is_tensor(next(iter(load_file(run / "adapter" / "adapter_model.safetensors").values())))
