"""Ollama Modelfiles: a template's kind is found by what it renders, and the Go template renders the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gguf_models import MISTRAL, byte_level, gemma_tokenizer, llama3, phi3_tokenizer, sentencepiece
from tiny import CHATML, make_tiny_model
from tunesmith.data.chat import ChatFormat
from tunesmith.export.gguf_ollama import match, modelfile
from tunesmith.types import Message
from tunesmith.workflows.export import export

CONVERSATION = [Message("user", "Is it?"), Message("assistant", "Yes."), Message("user", "Why?")]


def go(template: str, messages: list[Message]) -> str:
    """The little of Go's text/template that Modelfiles use here: range over .Messages, if eq .Role, .Content."""
    begin, rest = template.split("{{ range .Messages }}")
    body, end = rest.rsplit("{{ end }}{{ end }}", 1)
    branches = re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else|\Z)', body, re.DOTALL)
    return begin + "".join(dict(branches)[one.role].replace("{{ .Content }}", one.content) for one in messages) + end


def renderer(tokenizer: Any) -> Callable[[list[Message]], str]:
    chat = ChatFormat(tokenizer, now=datetime(2026, 1, 1))
    return lambda messages: chat.render(messages, True)


@pytest.mark.parametrize(
    ("kind", "tokenizer", "system"),
    [
        ("chatml", lambda: byte_level("gpt-2"), True),
        ("llama3", llama3, True),
        ("gemma", gemma_tokenizer, False),
        ("phi3", phi3_tokenizer, True),
        ("mistral", lambda: sentencepiece("legacy", MISTRAL), False),
    ],
)
def test_the_go_template_renders_what_the_models_own_does(kind: str, tokenizer: Any, system: bool) -> None:
    made = tokenizer()
    render = renderer(made)
    bos = made.bos_token or ""
    found = match(render, bos)
    assert found is not None
    assert (found.kind.name, found.default_system) == (kind, None)
    template = found.kind.go_template()
    conversations = [CONVERSATION[:1], CONVERSATION]
    conversations += [[Message("system", "Be short."), *CONVERSATION]] if system else []
    for messages in conversations:
        assert go(template, messages) == render(messages).removeprefix(bos)
    assert ('eq .Role "system"' in template) is system


def test_a_default_system_message_is_written() -> None:
    """SmolLM2's way: without a system message the template puts one in, Ollama does not."""
    default = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    found = match(renderer(byte_level("gpt-2", default + CHATML)), "")
    assert found is not None
    assert (found.kind.name, found.default_system) == ("chatml", "You are kind.")
    assert 'SYSTEM """You are kind."""\n' in modelfile("a.gguf", found, [])


@pytest.mark.parametrize("template", [CHATML.replace("<|im_end|>\n'", "<|im_end|>'"), "Q: " + CHATML, CHATML + " "])
def test_a_template_that_is_nearly_known_is_not(template: str) -> None:
    assert match(renderer(byte_level("gpt-2", template)), "") is None
    text = modelfile("a.gguf", None, ["<|im_end|>"])
    assert "# No TEMPLATE" in text
    assert "\nTEMPLATE" not in text
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_the_modelfile_beside_a_file(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", vocab=800, tokenizer=llama3(), bos_token_id=None)
    result = export(folder, "gguf:q8_0", tmp_path / "x.gguf", device="cpu")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = "".join(
        f'{{{{ {word} eq .Role "{role}" }}}}{header.format(role)}{{{{ .Content }}}}<|eot_id|>'
        for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
    )
    assert Path(result["files"][0]["modelfile"]).read_text() == (
        "# ollama create NAME -f x.Modelfile\nFROM ./x.gguf\n"
        f'TEMPLATE """{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{header.format("assistant")}"""\n'
        'PARAMETER stop "<|eot_id|>"\n'
    )
