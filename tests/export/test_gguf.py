"""GGUF files: llama.cpp and transformers, each on its own, compute from them what the source computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gguf_models import FAMILIES, family, keys, write
from tiny import make_tiny_model
from tunesmith.export.gguf_architectures import pair_rows
from tunesmith.export.gguf_llama_cpp import LlamaCpp, agreement
from tunesmith.export.gguf_reading import rounded
from tunesmith.export.gguf_types import TYPES, block_of, find_type, quantize
from tunesmith.workflows.export import export

IDS = torch.arange(300, 340)[None]


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
