"""`tunesmith chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import Device, DTypeName, Model, Target

if TYPE_CHECKING:
    from tunesmith.workflows.chat import Conversation, Sampling

COMMANDS = {
    "/new": "forget the conversation",
    "/history": "show it",
    "/base": "the base's answer to the last question, beside the tuned one's",
    "/preset NAME": "factual (greedy), balanced, creative",
    "/set KEY VALUE": "temperature, top_p, repetition_penalty, max_new_tokens; /set alone shows them",
    "/quit": "or Ctrl-D: end",
}


def chat(
    target: Target,
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
    from tunesmith.types import Message
    from tunesmith.workflows.chat import Conversation

    sampling = sampling_of(preset)
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    for key, value in given.items():
        if value is not None:
            sampling = sampling.changed(key, str(value))
    with Console() as console:
        loaded = api.load(target, model, dtype, device, progress=console.progress)
        if system is None and (system := api.trained_system(loaded)):
            console.announce(f"system message, from the training data: {system}")
    conversation = Conversation(loaded, (Message("system", system),) if system else (), sampling)
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
    """Do what a line asks for; what is wrong with it is one line on stderr."""
    from tunesmith.errors import UserError

    try:
        if line.startswith("/"):
            _command(conversation, *line.split(maxsplit=2))
        else:
            _say(conversation, line)
    except UserError as error:
        print(f"tunesmith: {error}", file=sys.stderr)


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
        case "/base":
            _side_by_side(*conversation.base_answer())
        case "/preset":
            conversation.sampling = sampling_of(first)
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


def _side_by_side(tuned: str, base: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from tunesmith.cli.console import Console

    table = Table("tuned", "base", show_lines=False)
    table.add_row(escape(tuned), escape(base))
    Console().table(table)
