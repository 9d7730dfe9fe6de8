"""Every chat template that TRL ships, over every chat file of the shared data: exactly the answers are supervised.

TRL is a test oracle only: its template files are real models' templates. None brings a tokenizer; a byte-level one that
holds the template's control tokens stands in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tiny import supervised
from tunesmith.data.chat import ChatFormat
from tunesmith.data.formats import read_examples
from tunesmith.types import Example, Message, TokenizedExample, ToolCall

spec = importlib.util.find_spec("trl")
assert spec is not None
assert spec.origin is not None
TEMPLATES = {path.stem: path for path in sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))}

VISION = {"idefics3", "idefics3_training", "llava_next", "llava_next_training", "smolvlm", "smolvlm_training"}
"""They take a list of parts and render nothing for a string."""
NO_SYSTEM = {"gemma", "gemma_training"}
FORCED_THOUGHT = {"deepseek_r1_distill", "deepseekv3"}
"""They ask for a thought and render answers without one, and do not mark where an answer begins."""

BAR = "\uff5c"  # DeepSeek writes its control tokens with a full-width bar
CONTROL = re.compile(rf"<[|{BAR}][^<>|{BAR}\s']+[|{BAR}]?>|<[a-z_]+[|]?>|</[a-z_]+>")

ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": f"<{BAR}end▁of▁sentence{BAR}>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe_training": "<|user|>",
    "glm4moe": "</s>",  # it writes none: the tokenizer's own
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "phi3": "<|end|>",
}
"""What ends an answer, by the longest prefix of the template's name; `<|im_end|>` for all others."""

STARTS = {"gptoss": "<|channel|>final<|message|>", "glm4moe": "\n", "muse_glimmer": " to=user<|message|>"}
"""What the model has to write before the answer's text."""


PROMPT_AFTER_TOOLS = {
    "deepseekv3_training": (f"<{BAR}tool▁outputs▁end{BAR}>",),
    **dict.fromkeys(("diffusion_gemma", "diffusion_gemma_training", "gemma4"), ("<|turn>model\n",)),
}
"""Generation prompts that end with a tool's result, with the turn's header left for the model to write."""


def by_prefix(table: dict[str, str], name: str, default: str) -> str:
    return next((table[key] for key in sorted(table, key=len, reverse=True) if name.startswith(key)), default)


@cache
def tokenizer_for(name: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template = TEMPLATES[name].read_text(encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    controls = sorted(set(CONTROL.findall(template)))
    plain = [token for token in controls if "think" in token or "tool" in token]  # as Qwen's: added, but not special
    backend.add_special_tokens([*(token for token in controls if token not in plain), "<s>", "</s>", "<pad>"])
    backend.add_tokens(plain)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def is_answer(name: str, found: str, text: str, last: bool) -> bool:
    """Whether supervised text is the answer with its end token; some templates trim the answer."""
    end = by_prefix(ENDS, name, "<|im_end|>")
    if name.startswith("phi3") and last:
        found = found.removesuffix("\n</s>")  # written after the last turn only
    start = by_prefix(STARTS, name, "")
    return found in {start + trimmed + end for trimmed in (text, text.strip(), text.rstrip(), text.lstrip("\n"))}


def check(name: str, examples: list[Example]) -> None:
    tokenizer = tokenizer_for(name)
    format = ChatFormat(tokenizer)
    format.settle(examples)
    encoded, findings = format.encode_checked(examples)
    assert [finding for finding in findings if finding.severity == "error"] == []
    by_line: dict[int, list[TokenizedExample]] = {}
    for example in encoded:
        by_line.setdefault(example.line, []).append(example)
    assert sorted(by_line) == [example.line for example in examples]
    for example in examples:
        assert example.messages is not None
        answers = [message.content for message in example.messages if message.role == "assistant"]
        found = [run for part in by_line[example.line] for run in supervised(tokenizer, part)]
        assert len(found) == len(answers), example.where
        ends = [
            len(answers) == len(by_line[example.line]) or place == len(answers) - 1 for place in range(len(answers))
        ]
        for run, answer, last in zip(found, answers, ends, strict=True):
            assert is_answer(name, run, answer, last), (example.where, run, answer)
        first = example.messages.index(next(m for m in example.messages if m.role == "assistant"))
        prompt = format.encode_prompt(example.messages[:first])
        ids = by_line[example.line][0].input_ids.tolist()
        assert ids[: len(prompt)] == prompt, "training begins with what inference asks"


@cache
def chats(folder: Path) -> dict[str, list[Example]]:
    """The chat files: of the long ones an evenly spread part, or with $TUNESMITH_ALL_ROWS every row (`make slow-test`)."""
    files = {}
    for name, rows in (
        ("chat/openassistant_seed_messages.jsonl", 154),
        ("chat/sgd_dev_messages.jsonl", 30),
        ("chat/sgd_train_messages.jsonl", 20),
        ("chat/fastchat_identity_sharegpt.jsonl", 80),
        ("banking77/ten_class_train_chat.jsonl", 40),
        ("banking77/ten_class_test_chat.jsonl", 40),
        ("banking77/train_10shot_chat.jsonl", 40),
    ):
        examples = read_examples(folder / name).examples
        step = 1 if os.environ.get("TUNESMITH_ALL_ROWS") else max(1, len(examples) // rows)
        files[name] = examples[::step]
    return files


TEXT = [name for name in TEMPLATES if name not in VISION | FORCED_THOUGHT]


def test_the_templates_are_those_we_know() -> None:
    assert len(TEMPLATES) == 72
    assert set(TEMPLATES) >= VISION | NO_SYSTEM | FORCED_THOUGHT
    assert len(TEXT) == 64


@pytest.mark.parametrize("name", TEXT)
def test_exactly_the_answers_are_supervised(name: str, shared_data: Path) -> None:
    for file, examples in chats(shared_data).items():
        if name in NO_SYSTEM and "banking77" in file:
            format = ChatFormat(tokenizer_for(name))
            encoded, findings = format.encode_checked(examples)
            assert encoded == []
            assert {finding.found for finding in findings} == {
                "the chat template refuses this conversation: System role not supported"
            }
            continue
        check(name, examples)


ODD = (
    ("Hi", "Hello."),
    (" edges \n", "\n edges too "),
    ("a\n\nb", "c\n\nd"),
    ("What is {{ x }}?", "{% raw %}{{ x }}{% endraw %} & <b>'\"\\</b>"),
    ("assistant\nuser", "user\nassistant"),
    ("왜 그래? 👩‍👩‍👧", "그냥요. e\u0301 é"),
    ("Hello.", "Hi"),
)


@pytest.mark.parametrize("name", TEXT)
def test_odd_conversations(name: str) -> None:
    turns = [Message(role, text) for pair in ODD for role, text in zip(("user", "assistant"), pair, strict=True)]
    examples = [Example(tuple(turns[:size]), None, "f.jsonl", size) for size in range(2, len(turns) + 1, 2)]
    if name not in NO_SYSTEM:
        system = Message("system", "Be brief.")
        examples += [Example((system, *turns[:size]), None, "f.jsonl", 100 + size) for size in (2, 6)]
    check(name, examples)


@pytest.mark.parametrize("name", sorted(VISION | FORCED_THOUGHT))
def test_what_cannot_be_masked_is_refused(name: str) -> None:
    example = Example((Message("user", "How warm?"), Message("assistant", "Quite warm.")), None, "f.jsonl", 1)
    encoded, (finding,) = ChatFormat(tokenizer_for(name)).encode_checked([example])
    assert encoded == []
    assert finding.severity == "error"
    expected = "does not begin with the generation prompt" if name in FORCED_THOUGHT else "chat template"
    assert expected in finding.found


TOOL = {
    "type": "function",
    "function": {
        "name": "find_recipes",
        "description": "Search recipes.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string", "description": "What to cook."}}},
    },
}
CONVERSATION = (
    Message("user", "Soup?"),
    Message("assistant", "", tool_calls=(ToolCall("find_recipes", {"query": "leek soup"}, "call00001"),)),
    Message("tool", '{"found": 3}', name="find_recipes", call_id="call00001"),
    Message("assistant", "Three recipes."),
)


def test_real_tool_calls(shared_data: Path) -> None:
    examples = read_examples(shared_data / "llamafactory" / "glaive_toolcall_en_demo.jsonl").examples[::10]
    assert sum(bool(example.tools) for example in examples) > 10
    for name in ("qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "glm4moe", "lfm2_2_5"):
        tokenizer = tokenizer_for(name)
        format = ChatFormat(tokenizer)
        format.settle(examples)
        encoded, findings = format.encode_checked(examples)
        assert {f.found for f in findings if f.severity == "error"} == set(), name
        refused = {f.line for f in findings if f.severity == "error"}
        for example in examples:
            if example.line in refused:
                continue
            runs = [run for part in encoded if part.line == example.line for run in supervised(tokenizer, part)]
            answers = [message for message in example.messages if message.role == "assistant"]
            assert len(runs) == len(answers), (name, example.where)
            for place, (run, message) in enumerate(zip(runs, answers, strict=True)):
                if not message.tool_calls:
                    assert is_answer(name, run, message.content, place == len(answers) - 1), (name, example.where)
                for call in message.tool_calls:
                    assert call.name in run, (name, example.where)
                    for value in call.arguments.values():
                        shown = "".join(str(value).split()), "".join(json.dumps(value, ensure_ascii=False).split())
                        assert any(text in "".join(run.split()) for text in shown), (name, example.where, run)
                    assert not any(
                        m.content in run for m in example.messages if m.role in ("user", "tool") and m.content
                    )


def test_tool_calls_are_exact_or_refused() -> None:
    exact = set()
    for name in TEXT:
        tokenizer = tokenizer_for(name)
        format = ChatFormat(tokenizer)
        example = Example(CONVERSATION, None, "f.jsonl", 1, tools=(TOOL,))
        format.settle([example])
        encoded, findings = format.encode_checked([example])
        if not encoded:
            assert "chat template" in findings[0].found, name
            continue
        exact.add(name)
        call, answer = (run for part in encoded for run in supervised(tokenizer, part))
        assert "find_recipes" in call, name
        assert "leek soup" in call, name
        assert "Soup?" not in call + answer, name
        assert '"found"' not in call + answer, name
        for start in PROMPT_AFTER_TOOLS.get(name.split("_v")[0], ()):
            answer = answer.removeprefix(start)
        assert is_answer(name, answer, "Three recipes.", last=True), (name, answer)
    assert {"qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "glm4moe", "lfm2_2_5", "gptoss"} <= exact
