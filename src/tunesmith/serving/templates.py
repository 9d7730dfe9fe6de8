"""Chat templates in processes of their own, because they are programs that came with a model or an adapter.

transformers' sandbox keeps a template away from Python's insides, not from loops in loops or strings that double; a thread that runs
one cannot be stopped, and its memory is the server's. So each distinct template has a process (template_worker.py) with an alarm and a
limit on its memory, which is started again after it died, and a thread that waits for it: a template that hangs holds up nobody but
who asked for a model of that template, each of them for `seconds` at most.

About 64 MB and 0.9 s to start for each distinct template; adapters with the same one share it.
"""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from tunesmith.data.chat import ChatFormat
from tunesmith.data.rendering import ChatTemplate, MaskError
from tunesmith.data.shapes import Span
from tunesmith.serving.template_worker import READY
from tunesmith.types import Message

WORKER = (sys.executable, "-m", "tunesmith.serving.template_worker")

START_SECONDS = 60.0
"""For a process to import what it needs: 0.9 s on an idle machine."""

MEMORY_BYTES = 512 << 20
"""What a template may take beyond Python and its libraries; a conversation of 2 MB takes some tens of MB."""


class Line:
    """A thread that does one thing after the other. `waiting` counts who wants something of it, for those who limit that."""

    def __init__(self, name: str):
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.waiting = 0


class Templates:
    """The processes of all templates that are in use. `seconds` is what one conversation may take."""

    def __init__(self, seconds: float = 5.0):
        self.seconds = seconds
        self._lock = threading.Lock()
        self._processes: dict[str, TemplateProcess] = {}
        self._users: dict[str, int] = {}

    def hold(self, chat: ChatFormat) -> None:
        """Have this chat's template rendered in a process, which it shares with others of the same template, until `release`."""
        bounded = chat.rendering
        key = bounded.process.key if isinstance(bounded, BoundedTemplate) else _key(bounded)
        with self._lock:
            if not isinstance(bounded, BoundedTemplate):
                process = self._processes.get(key) or TemplateProcess(key, self.seconds)
                self._processes[key] = process
                chat.rendering = BoundedTemplate(bounded, process)
            self._users[key] = self._users.get(key, 0) + 1

    def release(self, chat: ChatFormat) -> None:
        """Give back what one `hold` took; the process ends with the last."""
        key = process_of(chat).key
        with self._lock:
            self._users[key] -= 1
            if self._users[key]:
                return
            del self._users[key]
            process = self._processes.pop(key)
        process.close()

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            processes = list(self._processes.values())
            self._processes, self._users = {}, {}
        for process in processes:
            process.close()


class BoundedTemplate(ChatTemplate):
    """A chat template that renders in `process`. Raises MaskError, as any, also where time or memory ended it."""

    def __init__(self, plain: ChatTemplate, process: TemplateProcess):
        super().__init__(
            plain.name, plain.text, plain.variables, plain.special_tokens, _control_tokens(plain), plain.now
        )
        self.process = process

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        assert not tools, "this server's chats have none"
        return self.process.render(messages, add_generation_prompt, marks)


class TemplateProcess:
    """One template's process, and the line of those who wait for it."""

    def __init__(self, key: str, seconds: float):
        self.key, self.seconds = key, seconds
        self.line = Line("tunesmith-template")
        self._first = json.dumps({"template": json.loads(key), "seconds": seconds, "memory": MEMORY_BYTES})
        self._lock = threading.Lock()
        self._closed = False
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._ready = False
        return subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _begin(self) -> None:
        """Tell a new process its template. Raises MaskError where it is not at work after START_SECONDS; the next that asks starts another."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(START_SECONDS):
                self._process.kill()
                _end(self._process)
                raise MaskError(
                    f"the chat template's process did not start within {START_SECONDS:g} s: this machine is too busy"
                )
        self._ready = self._process.stdout.readline() == READY  # else it has died, which its answer's absence shows
        _tell(self._process, self._first)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, marks: bool) -> tuple[str, list[Span]]:
        """The text, and where the assistant's marks are. Blocks for `seconds` at most, and START_SECONDS where the process is new."""
        asked = {
            "messages": [(message.role, message.content) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "marks": marks,
        }
        with self._lock:
            if self._closed:
                raise MaskError("the model of this chat template was removed")
            if self._process.poll() is not None:
                self._process = self._start()
            if not self._ready:
                self._begin()
            _tell(self._process, json.dumps(asked))
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            died = None if line.endswith(b"\n") else _end(self._process)
        if died == -signal.SIGALRM:
            raise MaskError(f"the chat template took more than {self.seconds:g} s over this conversation")
        if died is not None:
            raise MaskError(f"the chat template ended the process that it runs in (exit status {died})")
        found = json.loads(line)
        if "refused" in found:
            raise MaskError(found["refused"])
        return found["text"], [(start, end) for start, end in found["spans"]]

    def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
        self._process.kill()  # a thread that waits for its answer sees the end of the pipe
        self.line.thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            _end(self._process)


def process_of(chat: ChatFormat) -> TemplateProcess:
    """Where the template of a chat that is held (`Templates.hold`) runs."""
    assert isinstance(chat.rendering, BoundedTemplate)
    return chat.rendering.process


def _tell(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended, which its answer's absence shows
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process that has closed its answers, or was killed; its exit status."""
    status = process.wait()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.close()
    with suppress(BrokenPipeError):
        process.stdin.close()
    return status


def _key(template: ChatTemplate) -> str:
    """What makes a template render as it does, as JSON: not where it is from. The time counts where it is printed."""
    facts = {
        "text": template.text,
        "variables": template.variables,
        "special_tokens": template.special_tokens,
        "control_tokens": _control_tokens(template),
        "now": template.now.isoformat() if template.prints_date else "2000-01-01",
    }
    return json.dumps(facts, sort_keys=True, default=str)


def _control_tokens(template: ChatTemplate) -> list[str]:
    return list(template._ends)
