"""`tunesmith chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import Device, DTypeName, Model, Target

if TYPE_CHECKING:
    from tunesmith.workflows.chat import Conversation, Sampling

COMMANDS = {
    "/new": "forget the conversation",
    "/history": "show it",
    "/adapter NAME": "go on with another adapter, none: with the base; alone: which there are",
    "/base": "the base's answer to the last question, beside the one given",
    "/preset NAME": "factual (greedy), balanced, creative",
    "/set KEY VALUE": "temperature, top_p, repetition_penalty, max_new_tokens; /set alone shows them",
    "/quit": "or Ctrl-D: end; Ctrl-C stops an answer, and ends at the prompt",
}


def chat(
    target: Target,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="Another run or PEFT folder (repeat).", metavar="NAME=PATH")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Ask this one question and exit.", metavar="TEXT")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message (default: the training data's).", metavar="TEXT")
    ] = None,
    preset: Annotated[
        str, typer.Option("--preset", help="factual (greedy), balanced or creative.", metavar="NAME")
    ] = "factual",
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest answer.", min=1, metavar="N")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0: greedy; above: sampled.", min=0.0, metavar="T")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: DTypeName = "auto",
) -> None:
    """Talk to a run, an adapter or a model. /help lists the commands."""
    from tunesmith import api
    from tunesmith.cli.console import Console
    from tunesmith.workflows.chat import Conversation
    from tunesmith.workflows.chat_adapters import Adapters, OneAdapter, SeveralAdapters, load_with_adapters
    from tunesmith.workflows.serve import named_adapters

    sampling = sampling_of(preset)
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    for key, value in given.items():
        if value is not None:
            sampling = sampling.changed(key, str(value))
    named = named_adapters(adapter or [])
    adapters: Adapters | None = None
    with Console() as console:

        def warn(note: str) -> None:
            console.announce(f"warning: {note}")

        if named:
            adapters = load_with_adapters(target, named, model, dtype, device, console.progress, warn)
            loaded = adapters.use(adapters.current)
        else:
            loaded = api.load(target, model, dtype, device, progress=console.progress)
            adapters = OneAdapter(loaded, target) if loaded.adapted else None
    conversation = Conversation(loaded, system, sampling, adapters)
    _show_system(conversation, given=system is not None)
    try:
        _talk(conversation, prompt)
    finally:
        if isinstance(adapters, SeveralAdapters):
            adapters.close()


def _talk(conversation: Conversation, prompt: str | None) -> None:
    """Ask the one question, or what is typed until the end."""
    if prompt is not None:
        _say(conversation, prompt)
        return
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        if line:
            _take(conversation, line)


def sampling_of(preset: str) -> Sampling:
    """A preset by name. Raises ConfigError."""
    from tunesmith.errors import ConfigError
    from tunesmith.workflows.chat import PRESETS

    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}: {', '.join(PRESETS)}")
    return PRESETS[preset]


def _take(conversation: Conversation, line: str) -> None:
    """Do what a line asks for; what is wrong with it is one line on stderr. Ctrl-C stops it, and the conversation goes on."""
    from tunesmith.errors import UserError

    try:
        if line.startswith("/"):
            _command(conversation, *line.split(maxsplit=2))
        else:
            _say(conversation, line)
    except UserError as error:
        print(f"tunesmith: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ntunesmith: stopped", file=sys.stderr)


def _show_system(conversation: Conversation, given: bool = False) -> None:
    """A system message that nobody typed is said."""
    from tunesmith.cli.console import Console

    if conversation.opening and not given:
        Console().announce(f"system message, from the training data: {conversation.opening[0].content}")


def _say(conversation: Conversation, text: str) -> None:
    conversation.ask(text, lambda piece: print(piece, end="", flush=True))
    print()


def _command(conversation: Conversation, name: str, first: str = "", second: str = "") -> None:
    from tunesmith.errors import ConfigError

    match name:
        case "/new":
            conversation.begin_anew()
        case "/history":
            for message in [*conversation.opening, *conversation.history]:
                print(f"{message.role}> {message.content}")
        case "/adapter":
            _adapter(conversation, first)
        case "/base":
            _side_by_side(*conversation.base_answer())
        case "/preset":
            longest = conversation.sampling.max_new_tokens  # how long answers may be is no matter of how they are drawn
            conversation.sampling = replace(sampling_of(first), max_new_tokens=longest)
            print(conversation.sampling)
        case "/set":
            if first:
                conversation.sampling = conversation.sampling.changed(first, second)
            print(conversation.sampling)
        case "/help":
            for usage, what in COMMANDS.items():
                print(f"{usage:<16} {what}")
        case _:
            raise ConfigError(f"there is no command {name}: {', '.join(usage.split()[0] for usage in COMMANDS)}, /help")


def _adapter(conversation: Conversation, name: str) -> None:
    """Switch, and say to which; without a name, list them."""
    from tunesmith.errors import ConfigError
    from tunesmith.workflows.chat_adapters import NONE

    if name:
        before = conversation.opening
        conversation.use(name)
        print(f"{name} answers from here on" if name != NONE else "the base answers from here on")
        if conversation.opening != before:
            _show_system(conversation)
        return
    if conversation.adapters is None:
        raise ConfigError("there is no adapter; --adapter NAME=PATH adds some")
    for each, path in [*conversation.adapters.paths.items(), (NONE, "the base")]:
        print(f"{'*' if each == conversation.adapters.current else ' '} {each:<16} {path}")


def _side_by_side(name: str, answer: str, base: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from tunesmith.cli.console import Console

    table = Table(escape(name), "base", show_lines=False)
    table.add_row(escape(answer), escape(base))
    Console().table(table)
