"""Small, offline, deterministic stand-ins: a random model folder, a byte-level tokenizer, and rows to train on.

folder = make_tiny_model(tmp_path / "model", family="qwen2")
write_jsonl(tmp_path / "train.jsonl", chat_rows(64, seed=0))
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

IM_START, IM_END, PAD, BOS = "<|im_start|>", "<|im_end|>", "<|pad|>", "<|bos|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(
    *, chat_template: str | None = CHATML, merges: Iterable[tuple[str, str]] = (), adds_bos: bool = False
) -> Any:
    """A byte-level fast tokenizer: ids 0-255 are the bytes, then one token for each of `merges`, then the control tokens.

    `<|im_end|>` ends a sequence. `merges` are pairs in the byte-level alphabet (a space is `Ġ`). With `adds_bos` the
    tokenizer has a `<|bos|>` token and puts it before every text that is tokenized with special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = list(merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([IM_START, IM_END, PAD, *([BOS] if adds_bos else [])])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=IM_END,
        pad_token=PAD,
        **({"bos_token": BOS} if adds_bos else {}),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    family: str = "llama",
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    tokenizer: Any = None,
    **settings: Any,
) -> Path:
    """Save a random causal language model (fp32 safetensors) with its tokenizer in `folder`, and return `folder`.

    `family` is transformers' model type (llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, smollm3, ...);
    `settings` go into its config. Norm weights and biases are perturbed, so that code which ignores one is found out.
    The model has a few more embedding rows than the tokenizer has tokens, as real ones do.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer or make_tokenizer()
    assert vocab >= len(tokenizer)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": hidden // heads,
            "max_position_embeddings": 4096,
            "initializer_range": 0.1,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **settings,
        },
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def supervised(tokenizer: Any, example: Any) -> list[str]:
    """The runs of supervised tokens, decoded."""
    runs: list[list[int]] = [[]]
    for token, mask in zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True):
        if mask:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write `rows` as JSON Lines, and return `path`."""
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Path(path)


BINS = {
    "newspaper": "paper",
    "box": "paper",
    "bottle": "glass",
    "jar": "glass",
    "peel": "compost",
    "leaf": "compost",
    "can": "metal",
    "nail": "metal",
}
"""What `chat_rows` asks about, and the right answers."""

PLACES = ("", " on the table", " that was left in the old kitchen", " I found behind the shed in the garden")


def chat_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` single-turn conversations of unequal length; the answer depends on one word of the question."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        thing = rng.choice(sorted(BINS))
        question = f"Which bin takes the {thing}{rng.choice(PLACES)}?"
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": BINS[thing]}]}
        )
    return rows


def make_tiny_gemma3(folder: Path) -> Path:
    """Save a random multimodal Gemma 3 as its makers do: a vision tower, a projector, and a text tower in `language_model`."""
    import torch
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    text = make_tiny_model(
        folder / "text", family="gemma3_text", hidden=64, sliding_window=16, layer_types=GEMMA3_LAYERS
    )
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    values = json.loads((text / "config.json").read_text())
    config = Gemma3Config(text_config=values, vision_config=vision, mm_tokens_per_image=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config)
    tower = Gemma3ForCausalLM.from_pretrained(text)
    model.model.language_model.load_state_dict(tower.model.state_dict())
    whole = folder / "whole"
    model.save_pretrained(whole)
    make_tokenizer().save_pretrained(whole)
    return whole


GEMMA3_LAYERS = ["sliding_attention", "full_attention"]


def store_as_mxfp4(folder: Path, seed: int = 0) -> Path:
    """Give a gpt-oss model random experts in MXFP4 (blocks of 32 fp4 values, two a byte, with a scale of 2^(s - 127)), as its
    makers store them.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.full(blocks, 122, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
