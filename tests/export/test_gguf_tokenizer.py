"""Tokenizers in GGUF: the right pre-tokenizer's name, the same ids in llama.cpp, and refusals of what would be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gguf_models import byte_level, gemma_tokenizer, phi3_tokenizer, sentencepiece
from tiny import CHATML, make_tiny_model, make_tokenizer
from tunesmith.errors import ModelError, VerificationError
from tunesmith.export.beside import DIFFICULT
from tunesmith.export.gguf_llama_cpp import LlamaCpp
from tunesmith.export.gguf_tokenizer import model_name, pre_tokenizer, vocabulary
from tunesmith.workflows import export_gguf as workflow
from tunesmith.workflows.export import export

BYTE_LEVEL = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")


def state(tokenizer: Any) -> dict[str, Any]:
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_tokens_are_the_same_ids_in_llama_cpp(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(name)
    assert pre_tokenizer(state(tokenizer)) == name
    path = exported(tmp_path, tokenizer)
    with LlamaCpp(path) as opened:
        assert opened.tokenize(DIFFICULT, control_tokens=False) == tokenizer(DIFFICULT)["input_ids"]
        text = "<|im_start|>user <tool_call>"
        as_text = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert opened.tokenize(text, control_tokens=False) == as_text
        as_control = opened.tokenize(text, control_tokens=True)
        assert as_control == tokenizer(text)["input_ids"]
        assert len(as_control) < len(as_text)
        assert tokenizer.convert_tokens_to_ids("<tool_call>") in as_text  # a user's own token is one in plain text too


def exported(tmp_path: Path, tokenizer: Any) -> Path:
    folder = make_tiny_model(tmp_path / "m", hidden=32, layers=1, vocab=800, tokenizer=tokenizer)
    return Path(export(folder, "gguf:f16", device="cpu")["files"][0]["path"])


def test_another_name_reads_other_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a wrong name would do, and that the export notices: Qwen2 takes digits one by one, Llama 3 in threes."""
    from tunesmith.export import gguf_tokenizer

    monkeypatch.setattr(gguf_tokenizer, "pre_tokenizer", lambda state: "smollm")
    with pytest.raises(
        VerificationError,
        match=r"llama.cpp reads other tokens in a difficult text: at token \d+ \(near .*nothing was kept",
    ):
        exported(tmp_path, byte_level("llama-bpe"))
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize("space", ["legacy", "always", "none"])
def test_sentencepiece_tokens_are_the_same_ids_in_llama_cpp(space: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece(space, CHATML, marks=("<|im_start|>", "<|im_end|>"))
    with LlamaCpp(exported(tmp_path, tokenizer)) as opened:
        # Metaspace adds no space to one that is there, llama.cpp does: the export says so.
        for text in (
            DIFFICULT,
            *([" two  spaces"] if space != "always" else []),
            "x",
            "\n\n",
            "<|im_start|>user\nhi<|im_end|>",
        ):
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert opened.tokenize(text, control_tokens=True) == expected, text
        assert opened.tokenize("hi", control_tokens=True, add_special=True) == tokenizer("hi")["input_ids"]
        assert tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id


def test_scores_fall_with_the_rank_of_the_merge() -> None:
    tokenizer = gemma_tokenizer()
    found = vocabulary(tokenizer, len(tokenizer))
    merges = state(tokenizer)["model"]["merges"]
    first = "".join(merges[0])
    assert found.scores[found.tokens.index(first)] == 0.0
    assert found.scores[found.tokens.index("<0x0A>")] == -len(merges)
    last = "".join(merges[-1])
    assert 0 > found.scores[found.tokens.index(last)] > -len(merges)


def test_unknown_ways_to_cut_are_refused() -> None:
    with pytest.raises(ModelError, match=r"cuts text in a way that has no known name .*use_regex.*none is written"):
        vocabulary(make_tokenizer(merges=[("a", "b")]), 400)
    changed = state(byte_level("qwen2"))
    changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    with pytest.raises(ModelError, match="no known name"):
        pre_tokenizer(changed)
    whole = state(byte_level("qwen2"))
    whole["model"]["ignore_merges"] = True
    with pytest.raises(ModelError, match=", ignore_merges"):
        pre_tokenizer(whole)


def test_other_normalizers_and_models_are_refused() -> None:
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    lower = byte_level("gpt-2")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match=r"normalizes text \(Lowercase\)"):
        vocabulary(lower, 800)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ModelError, match="the tokenizer is WordLevel"):
        vocabulary(words, 10)
    with pytest.raises(ModelError, match=r"tokens, the model's embeddings 100"):
        vocabulary(byte_level("gpt-2"), 100)


def test_the_name_says_whether_control_tokens_swallow_spaces() -> None:
    """llama.cpp knows by general.name alone; without the right one `<|user|>` and the line end behind it are two tokens."""
    assert model_name("mine", phi3_tokenizer()) == "phi-3 mine"
    assert model_name("Phi-3-mini", phi3_tokenizer()) == "Phi-3-mini"
    assert model_name("my-Phi3-rival", byte_level("gpt-2")) == "my-Phi_3-rival"
    odd = sentencepiece("legacy", CHATML, marks=("<|im_end|>",), strips=("<|im_end|>",))
    with pytest.raises(ModelError, match=r"<\|im_end\|> swallow the spaces behind them"):
        model_name("mine", odd)


def test_a_template_that_llama_cpp_renders_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = workflow.LlamaCpp.render
    monkeypatch.setattr(workflow.LlamaCpp, "render", lambda self, messages: plain(self, messages) + " ")
    with pytest.raises(VerificationError, match=r"llama.cpp renders the chat template otherwise: .*nothing was kept"):
        exported(tmp_path, byte_level("gpt-2"))


def test_the_ends_of_an_answer_are_written() -> None:
    tokenizer = byte_level("gpt-2")
    number = tokenizer.convert_tokens_to_ids("<|im_start|>")
    found = vocabulary(tokenizer, 800, (tokenizer.eos_token_id, number))
    assert found.specials == {"eos": tokenizer.eos_token_id, "eot": number}
    assert found.flags == {"add_bos_token": False, "add_eos_token": False}


def with_ends(tmp_path: Path, count: int) -> tuple[Path, Any, list[int]]:
    """A model whose answers end with any of `count` tokens (generation_config.json)."""
    from transformers import GenerationConfig

    marks = ("<|stop_a|>", "<|stop_b|>", "<|stop_c|>")
    tokenizer = byte_level("gpt-2", marks=marks)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(marks))][:count]
    folder = make_tiny_model(tmp_path / "m", hidden=32, layers=1, vocab=800, tokenizer=tokenizer)
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    return folder, tokenizer, ends


def test_every_end_of_an_answer_ends_it_in_llama_cpp(tmp_path: Path) -> None:
    folder, tokenizer, ends = with_ends(tmp_path, 3)
    result = export(folder, "gguf:f16", device="cpu")
    (row,) = result["files"]
    with LlamaCpp(Path(row["path"])) as opened:
        assert [opened.ends(number) for number in ends] == [True] * 3
        assert not opened.ends(tokenizer.convert_tokens_to_ids("<|stop_c|>"))
        assert not opened.ends(tokenizer("word")["input_ids"][0])
    stops = [line for line in Path(row["modelfile"]).read_text().splitlines() if line.startswith("PARAMETER stop")]
    assert stops == [f'PARAMETER stop "{one}"' for one in ("<|im_end|>", "<|stop_a|>", "<|stop_b|>")]


def test_an_end_that_gguf_has_no_place_for_is_not_lost(tmp_path: Path) -> None:
    folder, _, _ = with_ends(tmp_path, 4)
    with pytest.raises(
        VerificationError, match=r"'<\|stop_c\|>' \(\d+\) ends an answer .* llama.cpp goes on behind it"
    ):
        export(folder, "gguf:f16", device="cpu")
    assert not list(tmp_path.rglob("*gguf*"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("bos", r"the file's bos token is 3, the tokenizer's 1"),
        ("eos", r"the file's eos token is 3, the tokenizer's 2"),
        ("unknown", r"the file's unknown token is 3, the tokenizer's 0"),
        ("padding", r"the file's padding token is 3, the tokenizer's 2"),
        ("add_bos_token", r"other tokens in a text with the tokens that are put around it: at token 0"),
        ("add_eos_token", r"other tokens in a text with the tokens that are put around it: at token \d+"),
    ],
)
def test_special_tokens_that_are_written_wrong_are_noticed(
    key: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.export import gguf as writer

    plain = writer.vocabulary

    def wrong(*arguments: Any) -> Any:
        found = plain(*arguments)
        if key in found.flags:
            found.flags[key] = not found.flags[key]
        else:
            found.specials[key] = 3
        return found

    monkeypatch.setattr(writer, "vocabulary", wrong)
    with pytest.raises(VerificationError, match=message):
        exported(tmp_path, sentencepiece("legacy", CHATML, marks=("<|im_start|>", "<|im_end|>")))


def test_an_end_that_the_tokenizer_puts_behind_every_text_is_kept(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = sentencepiece("legacy", CHATML, marks=("<|im_start|>", "<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with LlamaCpp(exported(tmp_path, tokenizer)) as opened:
        found = opened.tokenize("word", control_tokens=True, add_special=True)
        assert found == tokenizer("word")["input_ids"]
        assert (found[0], found[-1]) == (1, 2)


@pytest.mark.parametrize("name", ["tekken", "gpt-4o"])
def test_where_llama_cpp_cuts_at_combining_marks_it_is_said(name: str, tmp_path: Path) -> None:
    """As with the real vocabulary of Mistral Nemo: Hindi's vowel signs belong to words for the tokenizer, and not in llama.cpp."""
    tokenizer = byte_level(name, text=("नमस्ते दुनिया, नमस्ते हिन्दी। " * 40,))
    folder = make_tiny_model(tmp_path / "m", hidden=32, layers=1, vocab=800, tokenizer=tokenizer)
    result = export(folder, "gguf:f16", device="cpu")
    assert [note for note in result["notes"] if "combining marks" in note]
    with LlamaCpp(Path(result["files"][0]["path"])) as opened:
        assert opened.tokenize("नमस्ते", control_tokens=False) != tokenizer("नमस्ते")["input_ids"]
        assert opened.tokenize("नमन", control_tokens=False) == tokenizer("नमन")["input_ids"]  # no marks
