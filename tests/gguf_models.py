"""Tiny models with tokenizers of every kind that GGUF export knows, and what is in a GGUF file.

folder = make_tiny_model(tmp_path / "model", **family("gemma2"))
write(folder, tmp_path / "model.gguf", "f16")
assert keys(tmp_path / "model.gguf")["general.architecture"] == "gemma2"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tiny import CHATML, GEMMA3_LAYERS
from tunesmith.export.gguf_types import find_type

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog's owner isn't pleased: they're late.\n\n",
    "def f(x):\n    return x ** 2 + 3.14159  # twice the 2026th    time\n",
    "오늘 날씨가 어때요? 안녕하세요, 오늘은 날씨가 좋아요. Привет, мир! Привет! 你好，世界！你好！\n",  # noqa: RUF001
    "WE'VE SEEN 1,000,000 naïve cafés №½ 🚀🚀 in the HTTPServer and the parseXML of the user.\n",
] * 3

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def byte_level(
    name: str,
    template: str = CHATML,
    end: str = "<|im_end|>",
    marks: tuple[str, ...] = ("<|im_start|>",),
    text: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """A byte-level BPE tokenizer, trained on `TEXT` and `text`, that cuts text as llama.cpp's pre-tokenizer `name` does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from tunesmith.export.gguf_tokenizer import SPLITS

    whole = name in ("llama-bpe", "tekken")
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    if name == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif name == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        pattern = next(pattern for pattern, names in SPLITS.items() if names.get(whole) == name)
        steps = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        [*TEXT, *text], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    bos = more.get("bos_token")
    backend.add_special_tokens([end, *marks, *([bos] if bos else [])])
    backend.add_tokens(["<tool_call>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, clean_up_tokenization_spaces=False, **more
    )
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(
    space: str, template: str, end: str = "</s>", marks: tuple[str, ...] = (), strips: tuple[str, ...] = ()
) -> Any:
    """A SentencePiece BPE tokenizer as transformers converts it: every way to make a piece is a merge, bytes stand for the rest.

    `space`: `legacy` (Llama 2: a space before each text between control tokens), `always`, `first` (Mistral v0.3), `none` (Gemma).
    The tokens `strips` swallow the spaces behind them, as Phi-3's do.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = trainers.BpeTrainer(vocab_size=420, limit_alphabet=150, show_progress=False)
    trained.train_from_iterator(TEXT, alphabet)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    pieces += ["▁▁", "▁▁▁▁"]
    specials = ["<unk>", "<s>", end, *marks]
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: number for number, name in enumerate(names)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if space == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif space == "none":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [AddedToken(name, normalized=False, special=True, rstrip=name in strips) for name in specials]
    backend.add_special_tokens(added)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def llama3() -> Any:
    """Llama 3's kind of tokenizer."""
    marks = ("<|start_header_id|>", "<|end_header_id|>")
    return byte_level("llama-bpe", LLAMA3, "<|eot_id|>", marks, bos_token="<|begin_of_text|>")


ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": 2048,
}


def family(name: str) -> dict[str, Any]:
    """What `make_tiny_model` needs for one kind of model: family, tokenizer, settings."""
    base: dict[str, Any] = {"hidden": 64, "vocab": 800}
    gemma = {"query_pre_attn_scalar": 16, "sliding_window": 24, "tie_word_embeddings": True}
    kinds: dict[str, dict[str, Any]] = {
        "llama": {"tokenizer": byte_level("smollm"), "tie_word_embeddings": True},
        "llama3": {"family": "llama", "tokenizer": llama3(), "rope_parameters": ROPE_LLAMA3},
        "llama-biases": {"family": "llama", "tokenizer": byte_level("gpt-2"), "attention_bias": True, "mlp_bias": True},
        "linear": {
            "family": "llama",
            "tokenizer": byte_level("gpt-2"),
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3},
        },
        "yarn": {
            "family": "qwen2",
            "tokenizer": byte_level("qwen2"),
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            },
        },
        "mistral": {"tokenizer": sentencepiece("legacy", MISTRAL), "sliding_window": None},
        "qwen2": {"tokenizer": byte_level("qwen2")},
        "qwen3": {"tokenizer": byte_level("qwen2"), "head_dim": 32},
        "gemma2": {
            "tokenizer": gemma_tokenizer(),
            **gemma,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "rms_norm_eps": 1e-3,
        },
        "gemma3_text": {
            "tokenizer": gemma_tokenizer(),
            **gemma,
            "layer_types": GEMMA3_LAYERS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "phi3": {
            "tokenizer": phi3_tokenizer(),
            "rope_parameters": LONG,
        },
        "phi4": {
            "family": "phi3",
            "tokenizer": byte_level("gpt-4o", PHI3, "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>")),
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    }
    return {"family": name, **base, **kinds[name]}


def gemma_tokenizer() -> Any:
    """Gemma's kind of tokenizer."""
    return sentencepiece("none", GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>"))


def phi3_tokenizer() -> Any:
    """Phi-3's kind of tokenizer: control tokens swallow the line end that its template writes behind them."""
    strips = ("</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    return sentencepiece("legacy", PHI3, "<|end|>", (*strips[:4], "<|endoftext|>"), strips)


FAMILIES = (
    *("llama", "llama3", "llama-biases", "linear", "yarn", "mistral", "qwen2", "qwen3"),
    *("gemma2", "gemma3_text", "phi3", "phi4"),
)


# -- files, read and written -------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF file, dequantized by the gguf package, rows first."""
    import gguf

    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file."""
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def write(folder: Path, path: Path, kind: str) -> None:
    """Write a model's folder as GGUF, without any verification."""
    from tunesmith.export.gguf import exportable, write_model
    from tunesmith.workflows.load import load

    loaded = load(folder, dtype="fp32", device="cpu")
    made = exportable(loaded.forward.model, loaded.tokenizer, loaded.chat.template, "tiny")
    write_model(path, loaded.forward.model.state_dict(), made, find_type(kind))
