"""A tokenizer as GGUF's keys: tokens, types, merges or scores, special ids, and which pre-tokenizer llama.cpp is to use.

Byte-level BPE (`tokenizer.ggml.model` gpt2) keeps its merges. How text is cut before merging is code in llama.cpp, chosen by a name
(`tokenizer.ggml.pre`); that name is found by what tokenizer.json says of cutting, and a way of cutting that is not known is refused:
with a wrong name a model reads other tokens than it was trained on, without a word.

SentencePiece BPE (model llama) has scores instead: llama.cpp merges the pair whose result has the highest score, tokenizer.json's merges
are in that order, so that a token's score is minus the rank of the first merge that makes it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from tunesmith.errors import ModelError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD = r"[^\r\n\p{L}\p{N}]?"
REST_WITH_SLASH = REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)

SPLITS = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST: {True: "llama-bpe", False: "smaug-bpe"},
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST: {False: "qwen2"},
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": {
        False: "qwen35"
    },
    f"{LEAD}{UPPER}*{LOWER}+|{LEAD}{UPPER}+{LOWER}*" + r"|\p{N}" + REST_WITH_SLASH: {True: "tekken"},
    f"{LEAD}{UPPER}*{LOWER}+{CONTRACTIONS}?|{LEAD}{UPPER}+{LOWER}*{CONTRACTIONS}?" + r"|\p{N}{1,3}" + REST_WITH_SLASH: {
        False: "gpt-4o"
    },
}
"""The pattern of a Split before ByteLevel, and whether whole words skip the merges (`ignore_merges`), to llama.cpp's name (src/llama-vocab.cpp
has the same patterns beside the names)."""

WITHOUT_MARKS = ("tekken", "gpt-4o")
"""Names whose pattern joins combining marks to letters, and whose code in llama.cpp, which knows no classes of upper and lower letters, does not
(src/llama-vocab.cpp). With the vocabulary of Mistral Nemo Hindi is read in other tokens; nothing else differed in 340,000 (docs/gguf.md)."""

PREFIXES = {"always": True, "never": False, "first": False}
"""Metaspace's prepend_scheme to `add_space_prefix`: llama.cpp puts the space after every control token, as `always` does. With `first`
chat prompts, which begin with a control token, get none."""


STRIPS = ("phi-3", "phi3")
"""Where general.name holds one of these, llama.cpp drops spaces and line ends behind every control token but `NEVER_STRIP`: Phi-3's rule,
which GGUF has no key for (src/llama-vocab.cpp)."""

NEVER_STRIP = {"<unk>", "<s>", "<|endoftext|>"}


@dataclass(slots=True)
class Vocabulary:
    """What the file says of the tokenizer; `scores` or `merges` is empty."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    specials: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    marks: bool = True
    """Whether llama.cpp reads combining marks (Unicode's category M) as the tokenizer does."""

    leading: str = ""
    """What llama.cpp has to be given before plain text that begins without a control token, to read what the tokenizer reads."""


def vocabulary(tokenizer: Any, rows: int, ends: tuple[int, ...] = ()) -> Vocabulary:
    """The vocabulary of a fast tokenizer, filled up to the `rows` of the embeddings with unused tokens.

    `ends` are the ids that end an answer (generation_config.json). Raises ModelError for a tokenizer that GGUF cannot hold.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"the tokenizer is {model['type']}: GGUF export knows BPE (byte-level, or SentencePiece with byte tokens)"
        )
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embeddings {rows}: resize the embeddings first"
        )
    ranks = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback")) and "ByteLevel" not in _shape(state)
    found = Vocabulary("llama" if sentencepiece else "gpt2", "default", *_tokens(tokenizer, state, rows, sentencepiece))
    if sentencepiece:
        found.scores = _scores(found.tokens, ranks)
        found.flags["add_space_prefix"] = _space_prefix(state, found)
    else:
        found.pre = pre_tokenizer(state)
        found.merges = [" ".join(pair) for pair in ranks]
        if found.pre in WITHOUT_MARKS:
            found.marks = False
            found.notes.append(
                "llama.cpp cuts text at combining marks, the tokenizer does not: Hindi and other scripts with vowel signs, and some emoji, are other "
                "tokens"
            )
        if not found.merges:
            raise ModelError("the tokenizer has no merges (it is bytes only), which llama.cpp cannot read")
        if normalizers := [step["type"] for step in _steps(state.get("normalizer"), "normalizers")]:
            if normalizers != ["NFC"]:
                raise ModelError(f"the tokenizer normalizes text ({', '.join(normalizers)}): llama.cpp does not")
            found.notes.append(
                "the tokenizer composes characters first (NFC), llama.cpp does not: decomposed accents are other tokens"
            )
    found.specials = _specials(tokenizer, ends)
    plain = tokenizer("a")["input_ids"]
    found.flags["add_bos_token"] = plain[:1] == [tokenizer.bos_token_id]
    found.flags["add_eos_token"] = plain[-1:] == [tokenizer.eos_token_id]
    return found


def model_name(name: str, tokenizer: Any) -> str:
    """`general.name`, with `phi-3` in it just where the tokenizer's control tokens swallow the spaces behind them.

    Raises ModelError for tokens that swallow otherwise.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    strips = {text for text, token in added.items() if token.rstrip}
    if any(token.lstrip or token.single_word for token in added.values()):
        raise ModelError(
            "an added token swallows spaces before it, or matches whole words only: llama.cpp has no such tokens"
        )
    if not strips:
        return re.sub(r"(phi)-?3", r"\1_3", name, flags=re.IGNORECASE)
    if strips != {text for text, token in added.items() if token.special} - NEVER_STRIP or not {
        "</s>",
        *NEVER_STRIP,
    } <= set(added):
        raise ModelError(
            f"the tokens {', '.join(sorted(strips)[:3])} swallow the spaces behind them: llama.cpp does that for Phi-3's only"
        )
    return name if any(mark in name.lower() for mark in STRIPS) else f"phi-3 {name}"


def pre_tokenizer(state: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer (tokenizer.json, parsed) cuts text. Raises ModelError for an unknown way."""
    whole = bool(state["model"].get("ignore_merges"))
    outer, shape = state.get("pre_tokenizer"), _shape(state)
    steps = _steps(outer, "pretokenizers")
    if shape[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space") and model_is_plain(state["model"]):
        by_regex = bool(steps[-1].get("use_regex", True))
        if shape == ["ByteLevel"] and by_regex and not whole:
            return "gpt-2"
        if shape == ["Digits", "ByteLevel"] and by_regex and steps[0].get("individual_digits") and not whole:
            return "smollm"
        if shape == ["Split", "ByteLevel"] and not by_regex and (name := _by_pattern(steps[0], whole)):
            return name
    raise ModelError(
        f"the tokenizer cuts text in a way that has no known name in llama.cpp (pre_tokenizer {json.dumps(outer, ensure_ascii=False)}"
        f"{', ignore_merges' if whole else ''}); a file with a wrong name would read other tokens, so none is written"
    )


def _steps(outer: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer that may be a sequence, or nothing."""
    return [] if outer is None else list(outer.get(inner, [outer]))


def _shape(state: dict[str, Any]) -> list[str]:
    return [step["type"] for step in _steps(state.get("pre_tokenizer"), "pretokenizers")]


def model_is_plain(model: dict[str, Any]) -> bool:
    """Whether a BPE model has none of the settings that llama.cpp does not know."""
    return not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))


def _by_pattern(step: dict[str, Any], whole: bool) -> str | None:
    pattern = step["pattern"].get("Regex")
    if step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    return SPLITS.get(pattern, {}).get(whole)


def _tokens(tokenizer: Any, state: dict[str, Any], rows: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Every id's text and `gguf.TokenType`. Added tokens are control tokens where the tokenizer calls them special."""
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for text, number in state["model"]["vocab"].items():
        tokens[number] = text
        byte = sentencepiece and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        types[number] = int(TokenType.BYTE if byte else TokenType.NORMAL)
    for number, added in tokenizer.added_tokens_decoder.items():
        # A token of the user's own is matched in text as it is written; SentencePiece's mark stands for a space.
        tokens[number] = added.content if added.special else added.content.replace("▁", " ")
        types[number] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    if sentencepiece and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    if len(set(tokens)) < rows:
        raise ModelError("two tokens have the same text, which GGUF cannot hold")
    return tokens, types


def _scores(tokens: list[str], ranks: list[list[str]]) -> list[float]:
    """Minus the rank of the first merge that makes a token; below all of them for tokens that no merge makes."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(ranks):
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(ranks))) for token in tokens]


def _space_prefix(state: dict[str, Any], found: Vocabulary) -> bool:
    """Whether a space is put before the text. Raises ModelError for another normalizer or pre-tokenizer than SentencePiece's."""
    normalizer, pre = state.get("normalizer"), state.get("pre_tokenizer")
    steps = _steps(normalizer, "normalizers")
    if [step["type"] for step in steps] == ["Prepend", "Replace"] and pre is None:
        return True
    if [step["type"] for step in steps] == ["Replace"] and (pre is None or pre["type"] == "Split"):
        return False
    if not steps and pre is not None and pre["type"] == "Metaspace":
        if pre["prepend_scheme"] == "first":
            found.leading = " "
            found.notes.append(
                "plain text that begins without a control token is read without the space that the tokenizer puts first"
            )
        elif pre["prepend_scheme"] == "always":
            found.notes.append(
                "a text that begins with a space is read with one more: llama.cpp puts its space before that one too"
            )
        return PREFIXES[pre["prepend_scheme"]]
    raise ModelError(
        f"the tokenizer normalizes text in a way that llama.cpp does not: normalizer {normalizer}, pre_tokenizer {pre}"
    )


def _specials(tokenizer: Any, ends: tuple[int, ...]) -> dict[str, int]:
    """Ids by GGUF's names; `eot` and `eom` (of a turn, of a message) are other ids that end an answer. GGUF has no place for more."""
    others = [number for number in dict.fromkeys(ends) if number != tokenizer.eos_token_id]
    named = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        **dict(zip(("eot", "eom"), others, strict=False)),
    }
    return {name: int(number) for name, number in named.items() if number is not None}
