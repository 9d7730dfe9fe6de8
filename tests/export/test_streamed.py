"""Merging tensor by tensor: for every kind of adapter the weights that PEFT's own merge gives, in memory that does not grow with the model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters_of import Kind, logits, make_adapter, plain
from tiny import make_tiny_model
from tunesmith.errors import ModelError, VerificationError
from tunesmith.export.skeleton import Skeleton, refuse_unstreamable
from tunesmith.export.streamed import write_merged
from tunesmith.export.tensors import Checkpoint, Entry, TensorFiles, Unstreamable, write_tensors
from tunesmith.models.adapters import load_adapter

SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}


TIED = {"tie_word_embeddings": True}
KINDS = {
    "lora": Kind({"target_modules": "all-linear"}),
    "rslora, patterns": Kind(
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 5},
         "alpha_pattern": {"q_proj": 3}}
    ),
    "dora": Kind({"target_modules": "all-linear", "use_dora": True}),
    "biases": Kind({"target_modules": "all-linear", "bias": "none", "lora_bias": True}, "llama",
                   {"attention_bias": True, "mlp_bias": True}),
    "embeddings and head": Kind({"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "modules to save": Kind({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "embeddings saved, tied": Kind(
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "llama", TIED
    ),
    "token rows": Kind({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 300]}}),
    "token rows, tied": Kind({"target_modules": ["q_proj"], "trainable_token_indices": [3, 300]}, "llama", TIED),
    "new tokens": Kind(
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [320, 321], "lm_head": [320, 321]}},
        rows=2,
    ),
    "new tokens, tied": Kind({"target_modules": ["q_proj"], "trainable_token_indices": [320, 321]}, "llama", TIED, 2),
    "tied": Kind({"target_modules": "all-linear"}, "gemma2", {"head_dim": 16}),
    "gpt-2": Kind({"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, "gpt2"),
    "fused projections": Kind({"target_modules": "all-linear"}, "phi3"),
    "experts": Kind(
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "mixtral", SPARSE,
    ),
    "experts of gpt-oss": Kind(
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, "gpt_oss", {**SPARSE, "sliding_window": 16}
    ),
    "beside experts": Kind({"target_modules": ["q_proj"]}, "qwen3_moe",
                           {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
}  # fmt: skip


def peft_merge(base: Path, adapter: Path) -> Any:
    """What PEFT alone makes of it."""
    return load_adapter(plain(base), adapter).merge_and_unload()


def stream(base: Path, adapter: Path, out: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    skeleton = Skeleton(base)
    skeleton.put_on(load_adapter(skeleton.model, adapter))
    out.mkdir()
    write_merged(skeleton, out, dtype)
    return skeleton


@pytest.fixture(params=KINDS, ids=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    kind = KINDS[request.param]
    base = make_tiny_model(tmp_path / "base", family=kind.family, hidden=64, **kind.settings)
    return base, make_adapter(base, tmp_path / "adapter", kind)


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_pefts_merge(case: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = case
    stream(base, adapter, tmp_path / "out")
    theirs, ours, before = peft_merge(base, adapter), plain(tmp_path / "out"), plain(base)
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert (logits(before)[..., :320] - logits(ours)[..., :320]).norm() > 0.1 * logits(before).norm()


def test_the_streamed_logits_are_those_of_base_and_adapter(case: tuple[Path, Path]) -> None:
    base, adapter = case
    skeleton = Skeleton(base)
    skeleton.put_on(load_adapter(skeleton.model, adapter))
    prompts = [list(range(30)), list(range(7, 20))]
    tuned, bare = skeleton.logits(prompts), skeleton.logits(prompts, adapter=False)
    whole = load_adapter(plain(base), adapter).eval()
    with torch.no_grad():
        for rows, prompt in zip((slice(0, 30), slice(30, 43)), prompts, strict=True):
            torch.testing.assert_close(
                tuned[rows], whole(input_ids=torch.tensor([prompt])).logits[0], rtol=1e-4, atol=1e-4
            )
        expected = plain(base)(input_ids=torch.tensor(prompts[:1])).logits[0]
    torch.testing.assert_close(bare[:30, :320], expected, rtol=1e-4, atol=1e-4)


# -- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from unittest import mock
import torch
from tunesmith.export import tensors
from tunesmith.export.tensors import Unstreamable
from tunesmith.workflows import merge as workflow

def now(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def refuse(_):
    raise Unstreamable("for comparison")

small, large, out, way, mapped = sys.argv[1:]
tensors.MAPPED = int(mapped)
workflow.WHOLE_SHARE = 0.0  # as a model is merged that is too large to be loaded whole
with mock.patch.object(workflow, "refuse_unstreamable", refuse if way == "memory" else workflow.refuse_unstreamable):
    workflow.merge(small, out + "-small", device="cpu", dtype="bf16")  # what it needs once: code, caches
    before = now("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    result = workflow.merge(large, out, device="cpu", dtype="bf16")
assert result["streamed"] == (way != "memory"), result
print(now("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is Linux's to tell"
)
def test_peak_memory_is_that_of_the_largest_shard(tmp_path: Path) -> None:
    mb = 2**20
    kind = Kind({"target_modules": ["q_proj"]})
    small = make_tiny_model(tmp_path / "small", hidden=64)
    made = make_tiny_model(tmp_path / "made", hidden=512, layers=36, initializer_range=0.02)
    large = tmp_path / "large"
    plain(made).to(torch.bfloat16).save_pretrained(large, max_shard_size="12MB")
    for file in made.glob("tokenizer*"):
        (large / file.name).write_bytes(file.read_bytes())
    shards = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert len(shards) > 8
    adapters = [make_adapter(base, base.with_name(f"{base.name}-adapter"), kind) for base in (small, large)]

    places = (tmp_path / f"out-{number}" for number in range(9))

    def growth(way: str, mapped: int = 2**30) -> int:
        command = [
            sys.executable,
            "-c",
            MEASURE,
            *map(str, adapters),
            str(next(places)),
            way,
            str(mapped),
        ]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        return int(found.stdout)

    # 40 MB on two cores: modules without weights twice, the adapter, logits. Whole weights in fp32 are 320 MB.
    allowed = max(shards) + 64 * mb
    assert growth("streamed") < allowed
    assert growth("memory") > 2 * sum(shards) > 4 * allowed
    # In one file: what of it was read is let go of after each 12 MB.
    for file in large.glob("model*"):
        file.unlink()
    plain(made).to(torch.bfloat16).save_pretrained(large)
    assert (large / "model.safetensors").stat().st_size > 2 * allowed
    assert growth("streamed", 12 * mb) < allowed
    assert growth("streamed") > (large / "model.safetensors").stat().st_size


# -- files and names --------------------------------------------------------------------------------------------------


def test_shards_stay_shards_with_an_index(tmp_path: Path) -> None:
    made = make_tiny_model(tmp_path / "made", layers=3)
    base = tmp_path / "base"
    plain(made).save_pretrained(base, max_shard_size="40KB")
    adapter = make_adapter(base, tmp_path / "adapter", KINDS["lora"])
    stream(base, adapter, tmp_path / "out", torch.bfloat16)
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, tmp_path / "out")
    )
    assert after["weight_map"] == before["weight_map"]
    assert len(set(after["weight_map"].values())) > 3
    for file in sorted(set(after["weight_map"].values())):
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert set(opened.keys()) == {name for name, own in after["weight_map"].items() if own == file}
            assert opened.metadata() == {"format": "pt"}
    sizes = [
        t.numel() * 2 for name in set(after["weight_map"].values()) for t in load_file(tmp_path / "out" / name).values()
    ]
    assert after["metadata"]["total_size"] == sum(sizes)
    theirs = peft_merge(base, adapter).state_dict()
    for name, tensor in plain(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, theirs[name].bfloat16().float()), name


def test_a_head_that_is_the_embeddings_no_longer_is_written_beside_them(tmp_path: Path) -> None:
    """PEFT's own merge changes both, and computes something else than base and adapter."""
    base = make_tiny_model(tmp_path / "base", hidden=64, tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", Kind({"target_modules": ["lm_head", "q_proj"]}))
    stream(base, adapter, tmp_path / "out")
    ours = plain(tmp_path / "out")
    assert ours.config.tie_word_embeddings is False
    tuned = logits(load_adapter(plain(base), adapter).eval())
    torch.testing.assert_close(logits(ours), tuned, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.get_input_embeddings().weight, plain(base).get_input_embeddings().weight)
    assert not torch.allclose(logits(peft_merge(base, adapter)), tuned, atol=0.1)


def test_the_text_model_of_a_multimodal_one_is_written_under_its_own_names(tmp_path: Path) -> None:
    from tiny import make_tiny_gemma3
    from tunesmith.config import ModelConfig
    from tunesmith.hardware import probe
    from tunesmith.models.load import find_model, load_model

    base = make_tiny_gemma3(tmp_path)
    config = ModelConfig(name=str(base), attention="eager")

    def tower() -> Any:
        return load_model(find_model(config), config, probe("cpu"), "fp32").eval()

    skeleton = Skeleton(base)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tower(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    skeleton.put_on(load_adapter(skeleton.model, tmp_path / "adapter"))
    (tmp_path / "out").mkdir()
    write_merged(skeleton, tmp_path / "out", torch.float32)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"
    assert not [name for name in written if "vision" in name or "language_model" in name]
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(adapted.eval()), rtol=1e-4, atol=1e-4)


def test_values_past_the_end_of_fp16_are_refused_by_name(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", KINDS["lora"])
    with pytest.raises(VerificationError, match=r"^model.norm.weight has values up to 7e\+04, and fp16 ends at 65504"):
        stream(base, adapter, tmp_path / "out", torch.float16)


def test_an_adapter_with_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", KINDS["lora"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"^model.layers.1.mlp.up_proj.weight: NaNs detected"):
        stream(base, adapter, tmp_path / "out")


def test_what_is_read_past_a_module_is_seen() -> None:
    """Parameters are NaN outside of their own module's turn."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        skeleton = Skeleton(make_tiny_model(Path(place) / "base"))
        assert all(bool(parameter.isnan().all()) for parameter in skeleton.model.parameters())
        assert all(parameter.untyped_storage().nbytes() == 4 for parameter in skeleton.model.parameters())
        assert bool(skeleton.logits([[1, 2, 3]]).isfinite().all())
        assert all(bool(parameter.isnan().all()) for parameter in skeleton.model.parameters())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"peft_type": "IA3"}, "the adapter is IA3, not LORA"),
        (
            {"peft_type": "LORA", "init_lora_weights": "pissa"},
            "the adapter's beginning, pissa, is made from the base's weights",
        ),
        (
            {"peft_type": "LORA", "layer_replication": [[0, 2]]},
            "PEFT does not keep the base's layers as they are for this adapter",
        ),
    ],
)
def test_what_cannot_be_streamed(config: dict[str, Any], why: str) -> None:
    with pytest.raises(Unstreamable) as caught:
        refuse_unstreamable([config])
    assert str(caught.value) == why
    refuse_unstreamable(
        [{"peft_type": "LORA", "init_lora_weights": True}, {"peft_type": "LORA", "init_lora_weights": "gaussian"}]
    )


def test_a_base_that_is_not_whole_is_not_streamed(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    short = tensors | {"lm_head.weight": tensors["lm_head.weight"][:-1].clone()}
    for values, why in (
        (
            {key: value for key, value in tensors.items() if key != name},
            f"1 weights are missing from its files ({name})",
        ),
        (short, "lm_head.weight is (319, 32) in the files, and its config.json means (320, 32)"),
    ):
        save_file(values, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(Unstreamable) as caught:
            Skeleton(base)
        assert str(caught.value) == why


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    shutil.copy(base / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"names a file outside of its folder \(../secret.safetensors\); it is not read$"
    ):
        TensorFiles(base)


def test_tensors_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b.c": torch.arange(7),
        "empty": torch.zeros(0, 2),
        "d": torch.randn(2).bfloat16(),
    }
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_tensors(tmp_path / "model.safetensors", entries, iter(tensors.items()))
    found = load_file(tmp_path / "model.safetensors")
    assert list(TensorFiles(tmp_path)) == list(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_cut_as_their_files_have_them(family: str, tmp_path: Path) -> None:
    """transformers holds all experts of a layer in one parameter; the files have them one by one."""
    base = make_tiny_model(
        tmp_path / "base",
        family=family,
        hidden=64,
        **(SPARSE if family == "mixtral" else KINDS["beside experts"].settings),
    )
    checkpoint = Checkpoint(base, Skeleton(base).model)
    held = plain(base).state_dict()
    name = next(name for name in held if name.endswith("layers.1.mlp.experts.gate_up_proj"))
    group = checkpoint.targets[name]
    assert len(group.sources) == 8
    assert torch.equal(checkpoint.read(name), held[name])
    back = checkpoint.revert(group, {name: 2 * held[name]})
    stored = load_file(base / "model.safetensors")
    assert set(back) == set(group.sources)
    assert all(torch.equal(tensor, 2 * stored[source]) for source, tensor in back.items())
