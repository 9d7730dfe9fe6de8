"""An Ollama Modelfile beside a GGUF file: FROM, ADAPTER, TEMPLATE, SYSTEM and PARAMETER stop.

Ollama (docs/modelfile.md, docs/template.md of its repository) does not run the Jinja template that a GGUF file carries; its own
templates are Go's. None is translated here: a template counts as one of the `KINDS` if it renders conversations to the very strings of
that kind, and the Go template of the kind is written. Otherwise there is no TEMPLATE, and Ollama looks among its own for one whose
Jinja form is near.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.errors import DataError
from tunesmith.types import Message

Render = Callable[[list[Message]], str]
"""A conversation as the prompt that asks for the assistant's next turn. Raises DataError where the template refuses it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A chat format: what stands before and after the content of each role, and what opens the answer.

    `system` is None where the format has no system turn of its own.
    """

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    system: tuple[str, str] | None = None
    start: str = ""

    def render(self, messages: list[Message]) -> str:
        """The prompt, as the Go template renders it."""
        turns = {"user": self.user, "assistant": self.assistant, "system": self.system or ("", "")}
        parts = [turns[one.role][0] + one.content + turns[one.role][1] for one in messages]
        return self.start + "".join(parts) + self.opening

    def go_template(self) -> str:
        """The same in Go's template language over Ollama's `.Messages`."""
        roles = [("system", self.system), ("user", self.user), ("assistant", self.assistant)]
        known = [(role, turn) for role, turn in roles if turn is not None]
        branches = [f'eq .Role "{role}" }}}}{turn[0]}{{{{ .Content }}}}{turn[1]}' for role, turn in known]
        return (
            f"{self.start}{{{{ range .Messages }}}}{{{{ if "
            + "{{ else if ".join(branches)
            + "{{ end }}{{ end }}"
            + self.opening
        )


def _marked(
    name: str, mark: str, end: str, *, gap: str, after: str, model: str = "assistant", system: bool = True
) -> Kind:
    """A format with a marker that names the role (`mark` has %s for it), and an end of turn."""
    before = {role: mark % role + gap for role in ("user", "system", model)}
    turn = {role: (text, end + after) for role, text in before.items()}
    return Kind(name, turn["user"], turn[model], before[model], turn["system"] if system else None)


def _mistral(name: str, before: str, after: str, answer: str) -> Kind:
    return Kind(name, (f"[INST]{before}", f"{after}[/INST]"), (answer, "</s>"), "")


KINDS = (
    _marked("chatml", "<|im_start|>%s", "<|im_end|>", gap="\n", after="\n"),
    _marked("llama3", "<|start_header_id|>%s<|end_header_id|>", "<|eot_id|>", gap="\n\n", after=""),
    _marked("gemma", "<start_of_turn>%s", "<end_of_turn>", gap="\n", after="\n", model="model", system=False),
    _marked("phi3", "<|%s|>", "<|end|>", gap="\n", after="\n"),
    _mistral("mistral", " ", " ", " "),
    _mistral("mistral", " ", "", " "),
    _mistral("mistral", "", "", ""),
)

USER, ANSWER, MORE = Message("user", "Is it?"), Message("assistant", "Yes."), Message("user", "Why?")
SYSTEM = Message("system", "Be short.")


@dataclass(frozen=True, slots=True)
class Match:
    """The kind whose strings a template renders, and the system message that it puts in where there is none."""

    kind: Kind
    default_system: str | None


def match(render: Render, bos: str) -> Match | None:
    """The kind that renders what `render` does, or None. `bos` is left out where a rendering begins with it: Ollama puts it there."""

    def prompt(*messages: Message) -> str | None:
        try:
            return render(list(messages)).removeprefix(bos)
        except DataError:
            return None

    for kind in KINDS:
        alone = prompt(USER)
        default = _default_system(kind, alone)
        given = [Message("system", default)] if default is not None else []
        if alone != kind.render([*given, USER]) or prompt(USER, ANSWER, MORE) != kind.render(
            [*given, USER, ANSWER, MORE]
        ):
            continue
        if kind.system is not None and prompt(SYSTEM, USER) != kind.render([SYSTEM, USER]):
            if default is not None:
                continue
            return Match(replace(kind, system=None), None)
        return Match(kind, default)
    return None


def _default_system(kind: Kind, alone: str | None) -> str | None:
    if alone is None or kind.system is None:
        return None
    start, end = kind.system
    rest = kind.render([USER])
    if not alone.startswith(start) or not alone.endswith(end + rest):
        return None
    return alone[len(start) : len(alone) - len(end + rest)]


def modelfile(file_name: str, found: Match | None, stops: list[str], base: str | None = None) -> str:
    """The Modelfile's text. `stops` are the strings that end an answer. With `base`, the file is an adapter over the model of that name.

    A text that a Modelfile cannot hold (`quoted`) is left out, and a comment says so.
    """
    shown = _on_one_line(Path(file_name).stem)
    lines = [f"# ollama create NAME -f {shown}.Modelfile"]
    if base is None:
        lines += _line("FROM", f"./{file_name}")
    else:
        own = f"{re.sub(r'[^A-Za-z0-9._-]', '-', Path(base).name)}-f16.gguf"
        lines += [
            f"# FROM is the base as GGUF, in f16 or a type of your choice: tunesmith export BASE --to gguf:f16 --out {own}",
            *_line("FROM", f"./{own}"),
            *_line("ADAPTER", f"./{file_name}"),
        ]
    if found is None:
        lines += [
            "# No TEMPLATE: the model's chat template renders other strings than the formats that are known here, and Ollama does not",
            "# run Jinja. It looks for one of its own that is near; compare its prompts (OLLAMA_DEBUG=1) with the model's.",
        ]
    else:
        lines += _line("TEMPLATE", found.kind.go_template())
        if found.kind.system is None:
            lines.append(
                f"# The template has no system turn ({found.kind.name}): put instructions into the first user message."
            )
        if found.default_system is not None:
            lines += _line("SYSTEM", found.default_system)
    for stop in stops:
        lines += _line("PARAMETER stop", stop)
    return "\n".join(lines) + "\n"


def _line(instruction: str, text: str) -> list[str]:
    value = text if re.fullmatch(r"\./[A-Za-z0-9._-]+", text) else quoted(text)
    if value is None:
        return [f"# No {instruction}: its text has three quotes in a row, or characters that Ollama drops."]
    return [f"{instruction} {value}"]


def quoted(text: str) -> str | None:
    """`text` as a value in a Modelfile, or None where Ollama would read another one.

    Ollama (parser/parser.go) knows no escapes. It drops characters that are not printable, and a value that begins with three quotes goes on to the
    first line that ends with three. So three quotes in a row are refused wherever they are, and so is what would be dropped: it might leave three.
    """
    if any(not one.isprintable() and one not in "\n\t" for one in text) or any(
        one.isspace() and one not in " \n\t" for one in text
    ):
        return None
    if '"""' in text:
        return None
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def _on_one_line(text: str) -> str:
    return "".join(one if one.isprintable() else "?" for one in text)
