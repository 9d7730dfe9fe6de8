"""GGUF files: llama.cpp and transformers, each on its own, compute from them what the source computes."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gguf_models import FAMILIES, family, sentencepiece
from tiny import chat_rows, make_tiny_model, write_jsonl
from tunesmith.errors import ConfigError, MachineError, ModelError, RunError, VerificationError
from tunesmith.export.gguf import gguf_adapter_hash
from tunesmith.export.gguf_architectures import pair_rows
from tunesmith.export.gguf_checks import Reference, warning_of
from tunesmith.export.gguf_llama_cpp import LlamaCpp, agreement
from tunesmith.export.gguf_reading import rounded
from tunesmith.export.gguf_types import TYPES, block_of, find_type, quantize
from tunesmith.files import sha256_file
from tunesmith.workflows import export_gguf as workflow
from tunesmith.workflows.export import export

IDS = torch.arange(300, 340)[None]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model folder of a family, made once."""
    folder = tmp_path_factory.mktemp("gguf-models")

    def make(name: str) -> Path:
        return folder / name if (folder / name).is_dir() else make_tiny_model(folder / name, **family(name))

    return make


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF file, dequantized by the gguf package, rows first."""
    import gguf

    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def blocks(path: Path) -> dict[str, str]:
    import gguf

    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# -- llama.cpp computes the same ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_the_source_does(name: str, models: Any, tmp_path: Path) -> None:
    """In f32 the probabilities agree to rounding; a wrong norm, rotation, window or cap is off by 1e-3 and more. The export itself
    has compared the template's renderings and the tokens.
    """
    result = export(models(name), "gguf:f32,q8_0,q4_k_m", tmp_path / "out", device="cpu")
    by_type = {row["type"]: row for row in result["files"]}
    assert by_type["f32"]["kl"] < 1e-7  # 1e-12 measured; Gemma, whose GELU is a table of f16 in llama.cpp, 2e-8
    assert by_type["f32"]["top1"] == 1.0
    assert by_type["f32"]["llama_cpp_kl"] < 1e-7
    assert 1e-5 < by_type["q8_0"]["kl"] < 1e-3
    assert by_type["q8_0"]["kl"] < by_type["q4_k_m"]["kl"] < 0.03
    kinds = {
        "llama3": "llama3",
        "mistral": "mistral",
        "gemma2": "gemma",
        "gemma3_text": "gemma",
        "phi3": "phi3",
        "phi4": "phi3",
    }
    assert result["ollama_template"] == kinds.get(name, "chatml")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize(("kind", "within"), [("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2)])
def test_transformers_reads_the_same_weights(name: str, kind: str, within: float, models: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32)
    write(models(name), tmp_path / "model.gguf", kind)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    # The weights one by one: transformers does not read every setting (RoPE factors, Qwen3's head size) from a GGUF file.
    theirs = found.state_dict()
    for key, tensor in source.state_dict().items():
        assert (theirs[key] - tensor).norm() <= within * tensor.norm(), key
    if name in ("llama", "mistral", "qwen2"):
        assert (logits(found) - logits(source)).norm() <= 4 * within * logits(source).norm()


def write(folder: Path, path: Path, kind: str) -> None:
    from tunesmith.export.gguf import exportable, write_model
    from tunesmith.workflows.load import load

    loaded = load(folder, dtype="fp32", device="cpu")
    made = exportable(loaded.forward.model, loaded.tokenizer, loaded.chat.template, "tiny")
    write_model(path, loaded.forward.model.state_dict(), made, find_type(kind))


def test_long_rope_beyond_the_first_context(tmp_path: Path) -> None:
    """Phi-3's long factors and its scale of attention. llama.cpp takes them by the context it is given, transformers by the text's length: the
    same for a text beyond the original context, and for one within it in a context that is not larger.
    """
    # transformers takes the config's own value before that in rope_parameters.
    folder = make_tiny_model(tmp_path / "m", **family("phi3"), original_max_position_embeddings=256)
    write(folder, tmp_path / "m.gguf", "f32")
    assert keys(tmp_path / "m.gguf")["phi3.rope.scaling.attn_factor"] == pytest.approx(
        (1 + math.log(4096 / 256) / math.log(256)) ** 0.5
    )
    ids = torch.randint(300, 700, (300,), generator=torch.Generator().manual_seed(0)).tolist()

    def kl(length: int, context: int) -> float:
        from adapters_of import plain

        with torch.no_grad():
            expected = plain(folder)(input_ids=torch.tensor([ids[:length]])).logits[0]
        with LlamaCpp(tmp_path / "m.gguf", context) as opened:
            return agreement([expected], [opened.log_probabilities(ids[:length])]).kl

    assert kl(300, 512) < 1e-7
    assert kl(100, 256) < 1e-7
    assert kl(100, 512) > 1e-4  # the long factors for a short text, which the export says
    # The export itself verifies in no larger context than the original one, where the prompts are short too.
    result = export(folder, "gguf:f32", device="cpu")
    assert result["files"][0]["kl"] < 1e-7
    assert any("by the context that it is given" in note for note in result["notes"])


# -- what is written ---------------------------------------------------------------------------------------------------


def test_keys_of_a_gemma3(models: Any, tmp_path: Path) -> None:
    write(models("gemma3_text"), tmp_path / "g.gguf", "f16")
    found = keys(tmp_path / "g.gguf")
    expected = {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.file_type": 1,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 16,
        "gemma3.attention.sliding_window": 24,
        "gemma3.attention.sliding_window_pattern": 2,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert len(found["tokenizer.ggml.tokens"]) == 800
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD799]"
    types = found["tokenizer.ggml.token_type"]
    tokens = found["tokenizer.ggml.tokens"]
    assert [types[tokens.index(one)] for one in ("<unk>", "<s>", "<0x0A>", "▁the", "[PAD799]")] == [2, 3, 6, 1, 5]


def test_pairs_of_rows_are_what_llama_cpp_rotates() -> None:
    rows = torch.arange(8.0)[:, None]
    assert pair_rows(rows, heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_mixture_of_q4_k_m_is_llama_cpps() -> None:
    """Of 16 layers the first two, the last two, and every third between have more bits in attn_v and ffn_down."""
    kind = find_type("q4_k_m")
    found = [i for i in range(16) if block_of(f"blk.{i}.ffn_down.weight", (256, 512), kind, 16, 4, False) == "Q6_K"]
    assert found == [0, 1, 4, 7, 10, 13, 14, 15]
    of = {
        name: block_of(name, shape, kind, 16, 4, tied)
        for name, shape, tied in [
            ("output.weight", (320, 256), False),
            ("token_embd.weight", (320, 256), False),
            ("blk.3.attn_q.weight", (256, 256), False),
            ("blk.3.attn_qkv.weight", (256, 256), False),
            ("blk.3.attn_norm.weight", (256,), False),
            ("blk.3.attn_k.weight", (256, 576), False),  # no multiple of 256
            ("blk.3.ffn_up.weight", (256, 40), False),  # nor of 32
        ]
    }
    assert list(of.values()) == ["Q6_K", "Q4_K", "Q4_K", "Q5_K", "F32", "Q5_0", "F16"]
    assert block_of("token_embd.weight", (320, 256), kind, 16, 4, tied=True) == "Q6_K"
    assert block_of("token_embd.weight", (320, 576), kind, 16, 4, tied=True) == "Q8_0"


@pytest.mark.parametrize(
    ("block", "within"), [("Q8_0", 0.006), ("Q6_K", 0.02), ("Q5_K", 0.04), ("Q4_K", 0.08), ("Q3_K", 0.17)]
)
def test_blocks_hold_the_values(block: str, within: float) -> None:
    """The gguf package's reading of what llama.cpp's quantizer wrote, against normal values."""
    import gguf

    values = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    found = gguf.quants.dequantize(quantize(values, block), gguf.GGMLQuantizationType[block])
    error = np.linalg.norm(found - values) / np.linalg.norm(values)
    assert within / 3 < error < within


def test_every_type_is_written_and_smaller_than_the_next(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One of the four prompts: asking llama.cpp for probabilities is nearly all of the time, and the other tests ask for all.
    monkeypatch.setattr("tunesmith.export.safetensors.PROMPTS", ("What is the capital of France?",))
    result = export(models("qwen3"), "gguf:" + ",".join(TYPES), tmp_path, device="cpu")
    size = {row["type"]: row["bytes"] for row in result["files"]}
    order = ["q4_0", "q5_0", "q8_0", "f16", "f32"]  # 64 wide: the K types take blocks of 32 here
    assert sorted(order, key=size.__getitem__) == order
    for row in result["files"]:
        assert (
            keys(Path(row["path"]))["general.file_type"]
            == __import__("gguf").LlamaFileType[TYPES[row["type"]].file_type]
        )
        # What is left beside the type's own error is llama.cpp's rounding of activations, in all of them.
        assert row["llama_cpp_kl"] < 2e-3, row["type"]
        assert row["llama_cpp_kl"] <= row["max_llama_cpp_kl"] < 1e-2, row["type"]


@pytest.mark.parametrize("block", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K"])
def test_activations_are_rounded_as_llama_cpp_rounds_them(block: str) -> None:
    """Against ggml's own blocks: q8_0 as the gguf package writes it; q8_K by its definition; the largest value is exact to the scale."""
    import gguf

    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    x[0, :256] = 0.0
    found = rounded(x, block)
    if block in ("F16", "BF16"):
        kind = torch.float16 if block == "F16" else torch.bfloat16
        assert torch.equal(found, x.to(kind).float())
    elif block != "Q4_K":
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        expected = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), q8_0), q8_0)
        assert (found - torch.from_numpy(expected)).abs().max() < 1e-2 * x.abs().max()
        assert float((found == torch.from_numpy(expected)).float().mean()) > 0.99  # halves are rounded otherwise
    else:
        largest = x.view(3, 2, 256).abs().amax(-1, keepdim=True)
        steps = found.view(3, 2, 256) / (largest / 127).clamp(min=1e-9)
        assert (steps - steps.round()).abs().max() < 1e-3
        assert ((found - x).view(3, 2, 256).abs() <= largest / 254 + 1e-6).all()


# -- an adapter --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tunesmith import api
    from tunesmith.config import load_config

    folder = tmp_path_factory.mktemp("gguf-run")
    settings = {
        "model.name": str(models("llama")),
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.path": str(write_jsonl(folder / "rows.jsonl", chat_rows(16))),
        "optimizer.lr": 1e-2,
        "optimizer.max_grad_norm": 10.0,
        "training.batch_size": 8,
        "training.epochs": 2,
        "adapter.rslora": True,
    }
    api.train(load_config(values=settings), folder / "run")
    return folder / "run"


def test_a_run_is_merged_and_exported(run: Path, models: Any) -> None:
    from safetensors.torch import load_file

    result = export(run, "gguf:f32", device="cpu")
    (row,) = result["files"]
    assert (row["path"], row["kl"] < 1e-7) == (str(run / "gguf" / "run-f32.gguf"), True)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.layers.0.self_attn.v_proj.lora_{part}.weight"] for part in "AB")
    base = load_file(models("llama") / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    expected = base + 32 / 16**0.5 * b @ a
    assert (expected - base).norm() > 0.05 * base.norm()
    torch.testing.assert_close(
        torch.from_numpy(read(Path(row["path"]))["blk.0.attn_v.weight"]), expected, rtol=1e-5, atol=1e-6
    )
    assert sorted(path.name for path in (run / "gguf").iterdir()) == ["run-f32.Modelfile", "run-f32.gguf"]


def test_an_adapter_of_its_own_computes_over_the_base(run: Path, tmp_path: Path) -> None:
    result = export(run, "gguf:f32", tmp_path / "a.gguf", lora=True, device="cpu")
    (row,) = result["files"]
    assert row["kl"] < 1e-5 < 0.05 * result["effect"]  # the base that it was verified over is f16
    assert Path(row["modelfile"]).read_text().splitlines()[2:4] == ["FROM ./llama-f16.gguf", "ADAPTER ./a.gguf"]
    found = keys(tmp_path / "a.gguf")
    assert (found["general.type"], found["adapter.type"], found["adapter.lora.alpha"]) == ("adapter", "lora", 32.0)
    tensors = read(tmp_path / "a.gguf")
    assert len(tensors) == 2 * 7 * 2
    assert tensors["blk.0.attn_q.weight.lora_a"].shape == (16, 64)
    from safetensors.torch import load_file

    b = load_file(run / "adapter" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    ]
    np.testing.assert_allclose(tensors["blk.0.attn_v.weight.lora_b"], 16**0.5 * b.numpy(), rtol=1e-6)  # α/√r over α/r


def test_a_file_says_what_it_was_written_from(run: Path, models: Any, tmp_path: Path) -> None:
    """By which `push` sees whether a file belongs to the run's present adapter."""
    from tunesmith.models.load import ModelSource, weight_hash
    from tunesmith.version import __version__

    adapter = sha256_file(run / "adapter" / "adapter_model.safetensors")
    for lora in (False, True):
        path = tmp_path / f"{lora}.gguf"
        export(run, "gguf:f16", path, lora=lora, device="cpu")
        found = {key: value for key, value in keys(path).items() if key.startswith("tunesmith.")}
        base = weight_hash(ModelSource("base", models("llama")))
        assert found == {
            "tunesmith.version": __version__,
            "tunesmith.adapter_hash": adapter,
            "tunesmith.base_hash": base,
        }
        assert gguf_adapter_hash(path) == adapter
    export(run / "adapter", "gguf:f16", tmp_path / "alone.gguf", device="cpu")
    assert gguf_adapter_hash(tmp_path / "alone.gguf") == adapter
    export(models("llama"), "gguf:f16", tmp_path / "plain.gguf", device="cpu")
    assert gguf_adapter_hash(tmp_path / "plain.gguf") is None
    for damaged in (b"", b"GGUF", (tmp_path / "plain.gguf").read_bytes()[:5000], b"PK" * 5000):
        (tmp_path / "d.gguf").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"d\.gguf: not a whole GGUF file .*export it again"):
            gguf_adapter_hash(tmp_path / "d.gguf")


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


# -- refusals ----------------------------------------------------------------------------------------------------------


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Have the export write other weights than the source's: what `change` makes of them."""
    plain = workflow.write_model
    monkeypatch.setattr(workflow, "write_model", lambda path, state, *others: plain(path, change(dict(state)), *others))


def test_a_file_with_other_weights_is_not_kept(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights spoiled behind the source's back: nothing stays, and the error says where."""
    name = "model.layers.1.mlp.down_proj.weight"
    spoil(monkeypatch, lambda state: {**state, name: state[name].flip(0)})
    with pytest.raises(
        VerificationError, match=r"down_proj.weight: the file does not hold the source's weights: .*nothing was kept"
    ):
        export(models("llama"), "gguf:q8_0", tmp_path / "out" / "deeper", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_k_m", "q2_k"])
def test_the_base_without_the_adapter_is_not_kept(
    kind: str, run: Path, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug of others: the base's weights under the adapter's name. As the file's, and as the merged model's."""
    base = state_of(models("llama"))
    with monkeypatch.context() as patch:
        spoil(patch, lambda state: base)
        with pytest.raises(VerificationError, match="the file does not hold the source's weights"):
            export(run, f"gguf:{kind}", tmp_path / "a.gguf", device="cpu")
    monkeypatch.setattr(workflow, "merge", lambda target, out, **_: shutil.copytree(models("llama"), out))
    with pytest.raises(VerificationError, match=r"merged model does not compute what base . adapter do"):
        export(run, f"gguf:{kind}", tmp_path / "a.gguf", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_written_wrong_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.export import gguf as writer

    for wrong in (lambda settings, module, rank: 0.0, lambda settings, module, rank: 2.0):
        with monkeypatch.context() as patch:
            patch.setattr(writer, "_scale", wrong)
            with pytest.raises(
                VerificationError, match=r"base and adapter in llama.cpp do not .* changes .*nothing was"
            ):
                export(run, "gguf:q8_0", tmp_path / "a.gguf", lora=True, device="cpu")
    monkeypatch.setattr(writer, "as_stored", lambda name, tensor, found: tensor)  # rows of q and k in the wrong order
    with pytest.raises(VerificationError, match=r"base and adapter in llama.cpp do not"):
        export(run, "gguf:f16", tmp_path / "a.gguf", lora=True, device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f16", "q2_k"])
def test_rows_that_are_written_in_another_order_than_they_are_read_are_noticed(
    kind: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp computes from the file what the source does with the weights that are read back: other ones than the source's."""
    from tunesmith.export import gguf_architectures

    monkeypatch.setattr(gguf_architectures, "pair_rows", lambda tensor, heads: tensor)
    with pytest.raises(VerificationError, match=r"[qk]_proj.weight: the file does not hold the source's weights"):
        export(models("llama"), f"gguf:{kind}", tmp_path / "a.gguf", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f16", "q4_k_m", "q2_k"])
@pytest.mark.parametrize("fault", ["order", "rotation", "epsilon"])
def test_what_llama_cpp_would_compute_wrong_is_seen_in_every_type(
    kind: str, fault: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of q and k left in transformers' order (and read back so); RoPE with another base; another epsilon in the norms."""
    from tunesmith.export import gguf as writer
    from tunesmith.export import gguf_reading as reading

    if fault == "order":
        for module in (writer, reading):
            monkeypatch.setattr(module, "as_stored", lambda name, tensor, found: tensor, raising=False)
        monkeypatch.setattr(
            writer,
            "tensors",
            lambda state, found: (
                (translated(name, found), tensor) for name, tensor in state.items() if name != "lm_head.weight"
            ),
        )
        monkeypatch.setattr(reading, "as_read", lambda name, tensor, found: tensor)
    else:
        key, factor = ("rope.freq_base", 3.0) if fault == "rotation" else ("attention.layer_norm_rms_epsilon", 1e5)
        plain = writer.describe

        def changed(config: Any) -> Any:
            found = plain(config)
            found.keys[key] *= factor
            return found

        monkeypatch.setattr(writer, "describe", changed)
    with pytest.raises(
        VerificationError, match=rf"{kind}: llama.cpp does not compute .* own weights: KL .*nothing was"
    ):
        export(models("llama"), f"gguf:{kind}", tmp_path / "a.gguf", device="cpu")
    assert list(tmp_path.iterdir()) == []


def translated(name: str, found: Any) -> str:
    from tunesmith.export.gguf_architectures import tensor_names, translate

    return translate(name, tensor_names(found), found)


def test_a_type_whose_error_hides_the_training_is_said(models: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from adapters_of import plain

    adapter = get_peft_model(plain(models("llama")), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.ones_like(parameter))
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = export(tmp_path / "adapter", "gguf:f16,q2_k", tmp_path / "out", device="cpu")
    fine, coarse = result["files"]
    assert fine["kl"] < 0.1 * result["effect"] < result["effect"] < coarse["kl"]
    assert fine["warning"] is None
    said = (
        rf"q2_k: this type's error \(\S+ nats a token\) is larger than what training changed \({result['effect']:.2g}\)"
    )
    assert re.match(said, coarse["warning"])
    assert result["notes"] == [coarse["warning"]]


def test_what_was_there_before_stays_and_nothing_else(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure after the files were written, when the second one is moved into its place: the first goes again too."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    plain = Path.replace

    def full(self: Path, target: Path) -> Path:
        if str(target).endswith("q8_0.Modelfile"):
            raise OSError(28, "No space left on device")
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MachineError, match="no space left on the disk"):
        export(models("llama"), "gguf:f16,q8_0", out, device="cpu")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    monkeypatch.undo()
    with pytest.raises(ModelError, match="there is no adapter to write"):
        export(models("llama"), "gguf:f16", tmp_path / "a" / "b" / "c.gguf", lora=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_cleared_by_the_next(models: Any, tmp_path: Path) -> None:
    import signal
    import subprocess
    import sys
    import time

    code = "import sys; from tunesmith.workflows.export import export; export(sys.argv[1], 'gguf:f16,q8_0,q4_0', sys.argv[2], device='cpu')"
    with subprocess.Popen([sys.executable, "-c", code, str(models("llama")), str(tmp_path)]) as process:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob(".tmp-*/*q8_0.gguf")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("*.gguf")) == []
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    export(models("llama"), "gguf:f16", tmp_path, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-f16.Modelfile", "llama-f16.gguf"]


def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    shape = family("gemma2")
    folder = make_tiny_model(tmp_path / "a", **{**shape, "query_pre_attn_scalar": 32})
    with pytest.raises(ModelError, match=r"query_pre_attn_scalar is 32: llama.cpp scales by 16"):
        export(folder, "gguf:f16", device="cpu")
    folder = make_tiny_model(
        tmp_path / "b", family="smollm3", hidden=64, vocab=800, tokenizer=family("llama")["tokenizer"]
    )
    with pytest.raises(ModelError, match="model_type 'smollm3' cannot be exported"):
        export(folder, "gguf:f16", device="cpu")
    folder = make_tiny_model(tmp_path / "c", **{**family("llama"), "hidden_act": "relu"})
    with pytest.raises(ModelError, match=r"hidden_act is 'relu': llama.cpp computes silu"):
        export(folder, "gguf:f16", device="cpu")


def test_wrong_requests_name_what_is_right(models: Any, tmp_path: Path) -> None:
    folder = models("llama")
    with pytest.raises(ConfigError, match=r"gguf:q9: no such type; expected one of f32, f16"):
        export(folder, "gguf:q9")
    with pytest.raises(ConfigError, match=r"--to onnx: expected gguf:TYPE"):
        export(folder, "onnx")
    with pytest.raises(ConfigError, match="is one file, and 2 types"):
        export(folder, "gguf:f16,q8_0", tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="there is no adapter to write"):
        export(folder, "gguf:f16", tmp_path, lora=True)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(RunError, match="already there"):
        export(folder, "gguf:f16", tmp_path / "b.gguf")


def test_a_window_that_llama_cpp_does_not_have_is_said(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", **{**family("mistral"), "sliding_window": 128})
    result = export(folder, "gguf:f16", device="cpu")
    assert result["notes"] == [
        "the model looks back 128 tokens, llama.cpp at everything: the same up to 128 tokens of context, not beyond"
    ]


def test_a_space_before_the_first_text_only(tmp_path: Path) -> None:
    """Mistral v0.3's way: prompts begin with a control token, so they are exact; of plain text it is said."""
    shape = family("mistral")
    tokenizer = sentencepiece("first", shape["tokenizer"].chat_template)
    result = export(make_tiny_model(tmp_path / "m", **{**shape, "tokenizer": tokenizer}), "gguf:f16", device="cpu")
    assert result["notes"] == [
        "plain text that begins without a control token is read without the space that the tokenizer puts first"
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, text)
            for name in ("config.json", "generation_config.json")
            for text in ("", "null", "[]", "3", '{"a":')
        ),
        ("generation_config.json", '{"eos_token_id": [null]}'),
        ("generation_config.json", '{"eos_token_id": "</s>"}'),
        ("config.json", {"num_key_value_heads": -1}),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": 3}'),
    ],
)
def test_damaged_files_are_named_in_one_line(name: str, content: Any, models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(models("llama"), folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content)
    (folder / name).write_text(content)
    with pytest.raises(ModelError) as found:
        export(folder, "gguf:f16", tmp_path / "out", device="cpu")
    assert name in str(found.value)
    assert "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
