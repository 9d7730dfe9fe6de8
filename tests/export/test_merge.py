"""Merging: the written model computes what base and adapter do, and one that does not is never left behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import tunesmith
from trained import copy_run, record_again, tiny_base, tiny_run
from tunesmith.config import AdapterConfig, ModelConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ModelError, RunError, VerificationError
from tunesmith.export.safetensors import (
    NOISE,
    OF_EFFECT,
    REFUSED,
    SAID,
    SAME,
    MergeCheck,
    compare_logits,
    differs,
    merge_adapter,
)
from tunesmith.export.skeleton import PEFT_PARTS, Skeleton
from tunesmith.hardware import probe
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
        "path", "dtype", "difference", "effect", "kl", "top1", "lost", "tokens", "onto", "streamed", "notes", "files", "bytes",
        "loaded_whole",
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


@pytest.mark.parametrize("lone", [False, True], ids=["run", "adapter folder"])
def test_a_loftq_adapter_goes_into_the_16_bit_weights_only(
    lone: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It is saved as its difference from its beginning, for W: over q(W) it misses all that quantization lost."""
    from tunesmith.workflows.load import find

    run = copy_run(tiny_run(tmp_path_factory, "qlora", **{"adapter.init_lora_weights": "loftq"}), tmp_path / "run")
    target = run / "adapter" if lone else run
    assert find(target, device="cpu").loftq == 1
    with pytest.raises(ModelError, match=r"^--onto quantized: a LoftQ adapter is saved for the 16-bit weights"):
        merge(target, tmp_path / "out", onto="quantized")
    result = merge(target, tmp_path / "out", dtype="fp32")
    assert "kl_of_trained" not in result, "what was trained is not what the files say quantized again"
    tuned = logits(tiny_base(tmp_path_factory, 64), run / "adapter")
    torch.testing.assert_close(logits(tmp_path / "out"), tuned, rtol=1e-4, atol=1e-4)


def test_another_user_can_read_what_was_written(run: Path, way: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    merge(run)
    umask = os.umask(0)
    os.umask(umask)
    made = tiny_run(tmp_path_factory)
    files = [*made.rglob("*"), *(run / "merged").rglob("*")]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {"adapter_model.safetensors", "model.safetensors", "optimizer.safetensors"} <= {
        each.name for each in weights
    }
    assert {file: oct(file.stat().st_mode & 0o666) for file in files if file.is_file()} == {
        file: oct(0o666 & ~umask) for file in files if file.is_file()
    }


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
    check, _ = merge_adapter(
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


def refusal(run: Path, dtype: str, begin: str = "the merged model does not compute what base + adapter do: ") -> str:
    before = left(run)
    with pytest.raises(VerificationError) as caught:
        merge(str(run), dtype=dtype)
    assert caught.value.exit_code == 1
    assert left(run) == before
    message = str(caught.value)
    assert message.startswith(begin)
    assert message.endswith("; nothing was kept")
    return message


DTYPES = pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])


@DTYPES
def test_a_merge_that_drops_the_adapter(run: Path, way: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    monkeypatch.setattr(Skeleton, "merged", lambda self, name, read=None: self.stored(name))
    message = refusal(run, dtype)
    assert "% (allowed: 0.010%; the adapter itself moves them by " in message


@DTYPES
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


@DTYPES
@pytest.mark.parametrize("strength", [1.0, 1e-2])
def test_a_merge_at_a_tenth_more_than_the_adapters_scale(
    run: Path, way: str, dtype: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a weak adapter, in a type that rounds to more than the tenth."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: t * (strength if "lora_B" in name else 1) for name, t in load_file(path).items()}, path)
    record_again(run)
    monkeypatch.setattr("tunesmith.workflows.load.differences", lambda *_: [])

    def scaled(model: Any, by: float) -> None:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= by

    whole = Skeleton.merged

    def merged(self: Skeleton, name: str, read: Any = None) -> torch.Tensor:
        scaled(self.adapted, 1.1)
        try:
            return whole(self, name, read)
        finally:
            scaled(self.adapted, 1 / 1.1)

    def in_memory(self: Any) -> Any:
        scaled(self, 1.1)
        return self.base_model.merge_and_unload()

    monkeypatch.setattr(Skeleton, "merged", merged)
    monkeypatch.setattr(PeftModel, "merge_and_unload", in_memory, raising=False)
    refusal(run, dtype)


@DTYPES
@pytest.mark.parametrize("damage", ["scaled", "scaled a little", "swapped", "one value", "not a number", "cut off"])
def test_a_tensor_that_was_written_wrong(
    run: Path, way: str, dtype: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]

    def change(file: Path) -> None:
        tensors = load_file(file)
        first, second = (tensors[name] for name in names)
        one = first.clone()
        one[3, 4] += 0.1
        # Cut off after the type's last digit but one instead of rounded: no value is off by more than two roundings.
        steps = {torch.float32: (torch.int32, -2), torch.float16: (torch.int16, -2), torch.bfloat16: (torch.int16, -2)}
        as_int, mask = steps[first.dtype]
        tensors[names[0]] = {
            "scaled": 1.5 * first,
            "scaled a little": 1.02 * first,
            "swapped": second.clone(),
            "one value": one,
            "not a number": math.nan * first,
            "cut off": (first.view(as_int) & mask).view(first.dtype),
        }[damage]
        save_file(tensors, file, metadata={"format": "pt"})

    tamper(way, monkeypatch, change)
    if damage == "cut off" and dtype == "fp32":
        return  # a GPU's sums may be as far apart
    refusal(run, dtype, f"the merged model was not written as it was computed: {names[0]} has other values in its file")


def test_a_config_that_means_another_model(run: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors are right, and the folder computes something a little else: less than the adapter does."""

    def change(file: Path) -> None:
        path = file.with_name("config.json")
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"rms_norm_eps": 0.003}))

    tamper(way, monkeypatch, change)
    refusal(run, "bf16", "the merged model's folder computes something else than its weights in the base's own model: ")


STRENGTH_SAID, STRENGTH_REFUSED = 0.005, 0.001


def weak_over_bf16(tmp_path: Path, strength: float) -> tuple[Path, Path]:
    """A base in bf16 and an adapter whose changes are near the last digit of that: merged in bf16, some of it is rounded away."""
    from adapters_of import Kind, make_adapter, plain
    from tiny import make_tiny_model

    made = make_tiny_model(tmp_path / "made", hidden=64)
    base = tmp_path / "base"
    plain(made).to(torch.bfloat16).save_pretrained(base)
    for file in made.glob("*token*"):
        (base / file.name).write_bytes(file.read_bytes())
    adapter = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": "all-linear"}))
    path = adapter / "adapter_model.safetensors"
    save_file({name: t * (strength if "lora_B" in name else 1) for name, t in load_file(path).items()}, path)
    return base, adapter


def test_what_rounding_costs_is_told_and_is_no_fault(tmp_path: Path, way: str) -> None:
    base, adapter = weak_over_bf16(tmp_path, STRENGTH_SAID)
    exact = merge(adapter, tmp_path / "exact", model=base, dtype="fp32", device="cpu")
    assert exact["lost"] < 1e-3
    result = merge(adapter, tmp_path / "bf16", model=base, dtype="bf16", device="cpu")
    assert SAID < result["lost"] < REFUSED
    assert result["notes"][-1] == (
        f"rounding the merged weights to bf16 costs KL {result['kl']:.2e} nats a token from base + adapter, "
        f"{result['lost']:.1%} of what training changed; --dtype fp32 keeps it"
    )
    said = tunesmith("merge", adapter, "--model", base, "--dtype", "bf16", "--out", tmp_path / "cli")
    assert f", KL {result['kl']:.2e} ({result['lost']:.1%} of what training changed), top-1 agreement" in said.out


def test_rounding_that_takes_the_training_away_is_refused(tmp_path: Path, way: str) -> None:
    base, adapter = weak_over_bf16(tmp_path, STRENGTH_REFUSED)
    with pytest.raises(
        VerificationError,
        match=r"^the merge is right, but its weights in bf16 lose too much of the training: KL .* nats a token from base \+ "
        r"adapter, .*% of what training changed \(allowed: 25%\), top-1 agreement .*%; pass --dtype fp32; nothing was kept$",
    ):
        merge(adapter, tmp_path / "out", model=base, dtype="bf16", device="cpu")
    assert not (tmp_path / "out").exists()
    assert merge(adapter, tmp_path / "out", model=base, dtype="fp32", device="cpu")["lost"] < 0.01


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
    record_again(run)
    result = merge(str(run))
    assert (result["difference"], result["effect"], result["top1"]) == (0.0, 0.0, 1.0)


def test_fp16_that_cannot_hold_a_weight_is_refused(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    (name, *_) = [name for name in tensors if "lora_B" in name]
    tensors[name] *= 1e7
    save_file(tensors, path)
    record_again(run)
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
    assert compare_logits(merged, tuned, base).apart > 0.2
    check = compare_logits(merged, tuned, base, spared=0.05)
    assert check.difference > 0.2
    assert check.judged == check.apart == pytest.approx(0.001, rel=1e-3)
    assert check.lost < 1e-4 < compare_logits(merged, tuned, base).lost
    merged[5] = -tuned[5]
    assert compare_logits(merged, tuned, base, spared=0.05).apart > 0.1, "a third one"
    merged[5], merged[3] = tuned[5], math.nan
    check = compare_logits(merged, tuned, base, spared=0.05)
    assert math.isnan(check.apart)
    assert math.isnan(check.lost)
    with pytest.raises(VerificationError):
        check.refuse_rounding("bf16")


def test_what_passes() -> None:
    def passed(difference: float, effect: float) -> bool:
        return MergeCheck(difference, effect, 0.0, 1.0, 10).passed()

    assert passed(0.0, 0.0)
    assert passed(SAME, 0.5)
    assert not passed(1.01 * SAME, 100.0)
    assert passed(NOISE, NOISE)  # too weak to be told from no adapter
    assert passed(0.99 * OF_EFFECT * 1e-3, 1e-3)
    assert not passed(1.01 * OF_EFFECT * 1e-3, 1e-3)
    assert not passed(math.nan, 1.0)
    assert not passed(0.0, math.nan)


def test_what_was_written_to_the_last_digit() -> None:
    exact = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    for dtype, as_int in ((torch.float32, torch.int32), (torch.float16, torch.int16), (torch.bfloat16, torch.int16)):
        written = exact.to(dtype, copy=True)
        assert not differs(written, exact)
        written.view(as_int)[7, 3] += 1
        assert not differs(written, exact), "one rounding away, as another order of a sum gives it"
        written.view(as_int)[7, 3] += 3 if dtype != torch.float32 else 400
        assert differs(written, exact)
        everywhere = exact.to(dtype, copy=True)
        everywhere.view(as_int).add_(1)
        assert differs(everywhere, exact) == (dtype != torch.float32), "a GPU's sums in fp32"
        assert differs(exact.to(dtype)[:-1], exact)


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
