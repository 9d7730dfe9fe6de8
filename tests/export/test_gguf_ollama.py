"""Ollama Modelfiles: a template's kind is found by what it renders, and the Go template renders the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import pytest

from gguf_models import MISTRAL, byte_level, gemma_tokenizer, llama3, phi3_tokenizer, sentencepiece
from tiny import CHATML, make_tiny_model
from tunesmith.data.chat import ChatFormat
from tunesmith.export.gguf_ollama import KINDS, Match, match, modelfile, quoted
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
    assert 'SYSTEM "You are kind."\n' in modelfile("a.gguf", found, [])


def parse(text: str) -> list[tuple[str, str]]:
    """Instructions and values of a Modelfile, as Ollama's ParseFile reads them (parser/parser.go, commit 00dc3af).

    A value goes on to the end of a line whose value so far, trimmed, is whole: one that begins with a quote, or three, has to end so.
    Characters that are not printable are dropped, but for spaces and line ends inside a value.
    """
    found: list[tuple[str, str]] = []
    state, name, value = "nothing", "", ""
    for one in text + "\n":
        if state == "nothing":
            if one == "#":
                state = "comment"
            elif one not in " \t\r\n":
                assert one in ascii_letters, f"no instruction: {one!r}"
                state, name = "name", one
        elif state == "comment":
            state = "nothing" if one in "\r\n" else state
        elif state in ("name", "parameter"):
            if one in " \t":
                assert state == "parameter" or name.upper() in INSTRUCTIONS, f"no instruction: {name!r}"
                state = "parameter" if name.upper() == "PARAMETER" else "value"
                name, value = name + (" " if state == "parameter" else ""), ""
            else:
                assert one in ascii_letters + digits + "_", f"no instruction: {name + one!r}"
                name += one
        elif one in "\r\n" and (whole := unquoted(value.strip())) is not None:
            found.append((name, whole))
            state = "nothing"
        elif one in " \t\r\n" or one.isprintable():
            value += one
    assert state in ("nothing", "comment"), f"the file ends inside of {name}"
    return found


INSTRUCTIONS = ("FROM", "LICENSE", "TEMPLATE", "SYSTEM", "ADAPTER", "PARAMETER", "MESSAGE")


def unquoted(value: str) -> str | None:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            ends = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if ends else None
    return value


HOSTILE = (
    'say "hi"',
    '"',
    '""',
    '"""',
    'a"""\nFROM /etc/passwd\nSYSTEM """b',
    'a"\nADAPTER ./evil.gguf\n"',
    'a" \nFROM x',
    'a""\u200b"\nFROM x',  # a dropped character between the quotes
    'a""\u00a0"\nFROM x',
    "a\rFROM x",
    "a\x85FROM x",
    "a\u2028FROM x",
    "\nFROM x\n",
    " spaces  ",
    "# no comment",
    'x"""   \n# FROM y',
    "tab\tand\n\nlines",
    '"quoted"\n"again"',
)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_leaves_its_quotes(text: str) -> None:
    """A default system message, a stop string and a file's name may hold anything: they come out as they are, or not at all."""
    found = Match(KINDS[0], text)
    for name in ("model", text):
        read = parse(modelfile(f"{name}.gguf", found, [text, "<|im_end|>"]))
        values = {one for _, one in read}
        assert [instruction for instruction, _ in read if instruction in ("FROM", "ADAPTER", "LICENSE", "MESSAGE")] in (
            ["FROM"],
            [],
        )
        assert values <= {text, f"./{name}.gguf", "<|im_end|>", KINDS[0].go_template()}
        assert ("PARAMETER stop", "<|im_end|>") in read
        kept = quoted(text) is not None
        assert (("SYSTEM", text) in read, ("PARAMETER stop", text) in read) == (kept, kept)
    adapter = parse(modelfile("a.gguf", found, [text], base=f"org/{text}"))
    assert [one for one in adapter if one[0] == "ADAPTER"] == [("ADAPTER", "./a.gguf")]
    assert len([one for one in adapter if one[0] == "FROM"]) == 1


def test_ordinary_texts_are_kept() -> None:
    for text in ('say "hi"', "two\nlines", '"quoted"\n"again"', " spaces  ", "tab\t", "ünï 你好 🚀", '"'):
        assert quoted(text) is not None, text
    for text in ('a"""b', "a\x00", "a\rb"):
        assert quoted(text) is None, text
    text = modelfile("a.gguf", Match(KINDS[0], 'x"""y'), [])
    assert "# No SYSTEM: its text has three quotes in a row" in text


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
