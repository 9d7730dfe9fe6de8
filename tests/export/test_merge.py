"""Merging: the written model computes what base and adapter do, and one that does not is never left behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trained import copy_run, tiny_base, tiny_run
from tunesmith.config import AdapterConfig, ModelConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ModelError, RunError, VerificationError
from tunesmith.export.safetensors import NOISE, TOLERANCE, MergeCheck, compare_logits, merge_adapter
from tunesmith.export.skeleton import PEFT_PARTS, Skeleton
from tunesmith.export.tensors import Unstreamable
from tunesmith.hardware import ComputeDType, probe
from tunesmith.models.adapters import add_adapter
from tunesmith.models.load import find_model, load_model, load_tokenizer
from tunesmith.runs import RunFolder
from tunesmith.workflows.load import load_plain
from tunesmith.workflows.merge import merge

CPU = probe("cpu")
IDS = torch.arange(40)[None]


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny_run(tmp_path_factory), tmp_path / "run")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """What transformers and PEFT alone compute, in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# -- what is written --------------------------------------------------------------------------------------------------


def test_a_run_merges_into_a_model_that_computes_the_same(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tiny_base(tmp_path_factory)
    result = merge(run)  # a Path does as well as a string
    assert list(result) == [
        "path", "dtype", "difference", "effect", "kl", "top1", "tokens", "onto", "streamed", "notes", "files", "bytes",
    ]  # fmt: skip
    assert (result["onto"], result["streamed"], result["notes"], result["files"]) == ("16bit", True, [], 1)
    size = (run / "merged" / "model.safetensors").stat().st_size
    assert 0 < size - result["bytes"] < 4096
    assert (result["path"], result["dtype"], result["top1"]) == (str(run / "merged"), "fp32", 1.0)
    assert result["difference"] < 1e-5
    assert abs(result["kl"]) < 1e-6
    tuned = logits(base, run / "adapter")
    torch.testing.assert_close(logits(run / "merged"), tuned, rtol=1e-4, atol=1e-4)
    assert (logits(base) - tuned).norm() > 0.5 * tuned.norm()
    assert result["effect"] > 0.5


def test_the_weights_are_w_plus_scale_times_b_times_a(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    merge(str(run))
    before = load_file(tiny_base(tmp_path_factory) / "model.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    after = load_file(run / "merged" / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in after.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        expected = before[name]
        if f"{path}.lora_A.weight" in adapter:
            expected = expected + 32 / 16 * adapter[f"{path}.lora_B.weight"] @ adapter[f"{path}.lora_A.weight"]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_in_bf16_the_weights_are_rounded_once(run: Path) -> None:
    merge(str(run), run / "exact")
    result = merge(run, str(run / "rounded"), model=Path(RunFolder.open(run).config.model.name), dtype="bf16")
    assert (result["dtype"], result["path"]) == ("bf16", str(run / "rounded"))
    assert json.loads((run / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"
    exact = load_file(run / "exact" / "model.safetensors")
    rounded = load_file(run / "rounded" / "model.safetensors")
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16()), name
    assert 0 < result["difference"] < 0.02


def test_the_folder_loads_elsewhere_with_its_tokenizer_and_template(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(str(run))
    base = tiny_base(tmp_path_factory)
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(run / "merged")
    text = "<|im_start|>user\nWhich bin? 어때요<|im_end|>"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token)
    conversation = [{"role": "user", "content": "hi"}]
    assert after.apply_chat_template(conversation, tokenize=False) == before.apply_chat_template(
        conversation, tokenize=False
    )
    model = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model, "peft_config")
    assert model.generation_config.eos_token_id == before.eos_token_id


def test_the_template_it_was_trained_with_goes_along(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import AutoTokenizer

    run = copy_run(tiny_run(tmp_path_factory, "lora", **{"data.chat_template": "alpaca"}), tmp_path / "run")
    merge(str(run))
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered.startswith("### Instruction:\nhi")


def test_a_qlora_adapter_merges_into_the_unquantized_base(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = copy_run(tiny_run(tmp_path_factory, "qlora"), tmp_path / "run")
    result = merge(str(run))
    tuned = logits(tiny_base(tmp_path_factory, 64), run / "adapter")
    torch.testing.assert_close(logits(run / "merged"), tuned, rtol=1e-4, atol=1e-4)
    assert result["difference"] < 1e-5
    config = json.loads((run / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert {t.dtype for t in load_file(run / "merged" / "model.safetensors").values()} == {torch.float32}


def test_an_adapter_folder_merges_beside_itself(run: Path) -> None:
    result = merge(str(run / "adapter"), dtype="fp32")
    assert result["path"] == str(run / "adapter-merged")
    merge(str(run))
    ours, theirs = (load_file(run / name / "model.safetensors") for name in ("adapter-merged", "merged"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_weak_adapter_over_a_deep_bf16_base_is_not_refused(tmp_path: Path) -> None:
    """Two bf16 forwards differ by more than a weak adapter does: the comparison must not be made in bf16."""
    from tiny import make_tiny_model

    base = make_tiny_model(tmp_path / "base", layers=12, initializer_range=0.3)
    config = ModelConfig(name=str(base))
    source = find_model(config)
    tokenizer = load_tokenizer(source, config)
    model = add_adapter(load_model(source, config, CPU, "bf16"), AdapterConfig(), "base")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 3e-3 * torch.randn(parameter.shape, generator=generator)
    check = merge_adapter(
        model,
        ChatFormat(tokenizer),
        tmp_path / "merged",
        "bf16",
        tokenizer.save_pretrained,
        lambda path: load_plain(path, "bf16", CPU),
    )
    assert check.effect < 0.2
    assert check.difference < 0.5 * check.effect


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_not_touched(run: Path) -> None:
    (run / "merged").mkdir()
    (run / "merged" / "mine.txt").write_text("keep")
    with pytest.raises(RunError) as caught:
        merge(str(run))
    assert str(caught.value) == f"{run / 'merged'} exists already; choose another --out"
    assert left(run / "merged") == ["mine.txt"]
    with pytest.raises(RunError, match="adapter exists already; choose another --out"):
        merge(str(run), run / "adapter")


def test_a_full_run_has_nothing_to_merge(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny_run(tmp_path_factory, "full")
    with pytest.raises(ModelError) as caught:
        merge(str(run))
    assert str(caught.value) == (f"{run}: a full fine-tuning has no adapter to merge; its model is {run / 'model'}")


def test_a_model_has_nothing_to_merge(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        merge(str(tiny_model), tmp_path / "out")
    assert str(caught.value) == f"{tiny_model}: there is no adapter to merge; pass a run or a PEFT adapter folder"
    assert left(tmp_path) == []


# -- what is found out ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["streamed", "in memory"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of merging; nothing is streamed in the second."""
    from tunesmith.workflows import merge as workflow

    def refuse(_: Any) -> None:
        raise Unstreamable("the test says so")

    if request.param == "in memory":
        monkeypatch.setattr(workflow, "refuse_unstreamable", refuse)
    way: str = request.param
    return way


def tamper(way: str, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    """Have `damage` done to the written file before it is read back."""
    from tunesmith.workflows import merge as workflow

    name = "read_back" if way == "streamed" else "load_plain"
    own = getattr(workflow, name)

    def tampered(folder: Path, *rest: Any) -> Any:
        damage(folder / "model.safetensors")
        return own(folder, *rest)

    monkeypatch.setattr(workflow, name, tampered)


def test_what_cannot_be_streamed_is_merged_in_memory_and_said(run: Path, way: str) -> None:
    said: list[str] = []
    result = merge(run, progress=lambda stage, *_: said.append(stage))
    if way == "streamed":
        assert (result["streamed"], result["notes"]) == (True, [])
    else:
        note = "merged in memory, not tensor by tensor: the test says so"
        assert (result["streamed"], result["notes"]) == (False, [note])
        assert note in said
    assert result["difference"] < 1e-5
    assert result["effect"] > 0.5


def refusal(run: Path, dtype: str) -> str:
    before = left(run)
    with pytest.raises(VerificationError) as caught:
        merge(str(run), dtype=dtype)
    assert caught.value.exit_code == 1
    assert left(run) == before
    message = str(caught.value)
    assert message.startswith("the merged model does not compute what base + adapter do: logits differ by ")
    assert message.endswith("%; nothing was kept")
    return message


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_that_drops_the_adapter(run: Path, way: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    monkeypatch.setattr(Skeleton, "merged", lambda self, name, read=None: self.stored(name))
    message = refusal(run, dtype)
    assert f"(allowed: {'0.01' if dtype == 'fp32' else '5.00'}%; the adapter itself moves them by " in message


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_of_half_the_layers(run: Path, way: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    def half(self: Any) -> Any:
        for name, parameter in self.named_parameters():
            if "layers.1" in name and "lora_B" in name:
                parameter.data.zero_()
        return self.base_model.merge_and_unload()

    whole = Skeleton.merged
    monkeypatch.setattr(PeftModel, "merge_and_unload", half, raising=False)
    monkeypatch.setattr(
        Skeleton,
        "merged",
        lambda self, name, read=None: self.stored(name) if "layers.1" in name else whole(self, name, read),
    )
    refusal(run, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("damage", ["scaled", "swapped", "not a number"])
def test_a_tensor_that_was_written_wrong(
    run: Path, way: str, dtype: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]

    def change(file: Path) -> None:
        tensors = load_file(file)
        first, second = (tensors[name] for name in names)
        tensors[names[0]] = {"scaled": 1.5 * first, "swapped": second.clone(), "not a number": math.nan * first}[damage]
        save_file(tensors, file, metadata={"format": "pt"})

    tamper(way, monkeypatch, change)
    refusal(run, dtype)


def test_a_folder_that_does_not_load_back(run: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper(way, monkeypatch, lambda file: file.write_bytes(file.read_bytes()[:-100]))
    before = left(run)
    with pytest.raises(
        VerificationError, match=r"^the merged model does not load back: .* deserializing header"
    ) as caught:
        merge(str(run))
    assert caught.value.exit_code == 1
    assert str(caught.value).endswith("; nothing was kept")
    assert left(run) == before


def test_an_adapter_that_does_nothing_may_merge(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(t) if "lora_B" in name else t for name, t in load_file(path).items()}, path)
    result = merge(str(run))
    assert (result["difference"], result["effect"], result["top1"]) == (0.0, 0.0, 1.0)


def test_fp16_that_cannot_hold_a_weight_is_refused(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    (name, *_) = [name for name in tensors if "lora_B" in name]
    tensors[name] *= 1e7
    save_file(tensors, path)
    before = left(run)
    with pytest.raises(
        VerificationError, match=r"has values up to .*, and fp16 ends at 65504; pass --dtype bf16 or fp32"
    ):
        merge(run, dtype="fp16")
    assert left(run) == before


# -- the comparison ---------------------------------------------------------------------------------------------------


def test_the_comparison_to_the_last_digit() -> None:
    tuned = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    merged = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    base = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    check = compare_logits(merged, tuned, base)
    assert check.difference == pytest.approx(math.sqrt(32) / 5)
    assert check.effect == pytest.approx(3 / 5)
    p = 1 / (1 + math.exp(-4))  # tuned puts p on the second token and merged on the first
    assert check.kl == pytest.approx((p * 4 + (1 - p) * -4) / 2)
    assert (check.top1, check.tokens) == (0.5, 2)


def test_a_mixtures_router_may_choose_otherwise_for_a_token_in_twenty() -> None:
    tuned = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    merged, base = 1.001 * tuned, 2 * tuned
    merged[[3, 30]] = -tuned[[3, 30]]
    assert not compare_logits(merged, tuned, base).passed("bf16")
    check = compare_logits(merged, tuned, base, spared=0.05)
    assert check.difference > 0.2
    assert check.judged == pytest.approx(0.001, rel=1e-3)
    assert check.passed("bf16")
    merged[5] = -tuned[5]
    assert not compare_logits(merged, tuned, base, spared=0.05).passed("bf16"), "a third one"
    merged[5], merged[3] = tuned[5], math.nan
    assert not compare_logits(merged, tuned, base, spared=0.05).passed("bf16")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_what_passes(dtype: ComputeDType) -> None:
    def passed(difference: float, effect: float) -> bool:
        return MergeCheck(difference, effect, 0.0, 1.0, 10).passed(dtype)

    allowed, noise = TOLERANCE[dtype], NOISE[dtype]
    assert passed(0.0, 0.0)
    assert passed(allowed, 3 * allowed)
    assert not passed(1.01 * allowed, 100.0)
    assert passed(noise, noise)  # too weak to be told from rounding
    assert not passed(noise, 1.5 * noise)  # visible, but not in the merged model
    assert not passed(math.nan, 1.0)
    assert not passed(0.0, math.nan)


@pytest.mark.parametrize(
    ("wrapped", "own"),
    [
        ("model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.embed_tokens.token_adapter.base_layer.weight", "model.embed_tokens.weight"),
        ("lm_head.original_module.weight", "lm_head.weight"),
        ("model.layers.0.mlp.experts.base_layer.base_layer.down_proj", "model.layers.0.mlp.experts.down_proj"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_the_own_name_of_a_weight_in_pefts_wrappers(wrapped: str, own: str) -> None:
    """By it the merged model's weights get back the types that they were stored in."""
    assert PEFT_PARTS.sub(".", wrapped) == own
