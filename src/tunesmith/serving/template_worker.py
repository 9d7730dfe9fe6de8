"""The process that one chat template runs in: `python -m tunesmith.serving.template_worker`, started by templates.py.

Lines of JSON come in and go out, behind one that says that it is ready. The kernel keeps both bounds, so that no template can talk its way around them: an alarm that
nobody handles ends the process, and memory beyond the limit on its address space is a MemoryError. That limit is Linux's; elsewhere
the alarm alone bounds what a template can take.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from tunesmith.data.rendering import ChatTemplate, MaskError
from tunesmith.types import Message

READY = b"ready\n"
"""Comes out before any answer, when everything is imported."""

MOST_CHARACTERS = 1 << 23
"""Of a rendered conversation: what is longer fits no model, and would only keep the tokenizer busy."""

TOO_LONG = f"the chat template made more than {MOST_CHARACTERS:,} characters of this conversation"

NO_MEMORY = "the chat template took more memory over this conversation than it may"


def main() -> None:
    """Read what the template is, then answer one conversation a line until the server closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which drains
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no answer
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401  # its import is no template's doing

    answers.write(READY.decode())
    answers.flush()
    facts = json.loads(sys.stdin.readline())
    signal.setitimer(signal.ITIMER_REAL, facts["seconds"])  # a template is compiled, too
    _limit_memory(facts["memory"])
    template = ChatTemplate(
        **{**facts["template"], "name": "", "now": datetime.fromisoformat(facts["template"]["now"])}
    )
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, facts["seconds"])
        found = _answer(template, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(found + "\n")
        answers.flush()


def _answer(template: ChatTemplate, asked: dict[str, Any]) -> str:
    try:
        messages = [Message(role, content) for role, content in asked["messages"]]
        text, spans = template._render(messages, (), asked["add_generation_prompt"], asked["marks"])
        return json.dumps({"text": text, "spans": spans} if len(text) <= MOST_CHARACTERS else {"refused": TOO_LONG})
    except MaskError as error:
        return json.dumps({"refused": str(error)[:1000]})
    except MemoryError:
        return json.dumps({"refused": NO_MEMORY})


def _limit_memory(more: int) -> None:
    """At most so many bytes beyond what Python and its libraries have mapped."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
