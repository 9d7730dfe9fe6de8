"""The requests of one judging: which verdicts are kept from before, asking for the others, what it cost.

The file of verdicts has a JSON object a line, in the order in which replies came: `key` (SHA-256 of the judge, the chat and
the sampling settings), `model`, `url`, `lines` of the data, `value` and `reason`, the raw `text`, its tokens. Requests that
brought no verdict stand there too, with `value` null and the `problem`, for people: they are not taken for verdicts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, VerificationError
from tunesmith.evaluation.judge_prompts import Chat, Form, Unreadable, correction, read_reply
from tunesmith.evaluation.judges import Failure, Judge, JudgeSettings, Reply
from tunesmith.files import disk_errors, sha256_text, write_atomic
from tunesmith.types import Progress

CHUNK = 128
"""First requests between two rounds of second ones: a judge that never replies in JSON is found out after this many."""

SHOWN = 200
"""Characters of a raw reply in a message. The file of verdicts has all of it."""


@dataclass(slots=True)
class Question:
    """One request, and the verdicts it stands for: (index of the row, 0 or 1). Pairwise: tuned first, base first; score:
    tuned, base. Rows that are alike share one."""

    key: str
    chat: Chat
    stands_for: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said of one request: A, B, tie, or a score."""

    value: str | int
    reason: str


@dataclass(slots=True)
class Cost:
    """What this run asked for. Tokens are those that replies counted; `retries` come on top of `requests`."""

    requests: int = 0
    retries: int = 0
    from_cache: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    replies_without_usage: int = 0

    def add(self, reply: Reply | Failure) -> None:
        """Count a request that was answered, or failed for good."""
        self.requests += 1
        self.retries += reply.retries
        if isinstance(reply, Failure):
            return
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            self.replies_without_usage += 1
        else:
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens

    def summary(self, price: tuple[float, float] | None) -> dict[str, Any]:
        """As JSON. `money` is None without a price, and where a reply did not say its tokens: a sum of some is no cost."""
        money = None
        if price and not self.replies_without_usage:
            money = (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6
        return asdict(self) | {"money": money}

    def text(self, price: tuple[float, float] | None) -> str:
        """The summary in a line."""
        money = self.summary(price)["money"]
        parts = [
            f"{self.requests} requests ({self.retries} repetitions, {self.from_cache} verdicts kept from before)",
            f"{self.prompt_tokens} prompt and {self.completion_tokens} completion tokens",
            *([f"{self.replies_without_usage} replies did not say theirs"] if self.replies_without_usage else []),
            *([f"cost {money:.4g}"] if money is not None else []),
        ]
        return ", ".join(parts)


@dataclass(slots=True)
class Session:
    """One judging: `lines` are those of the rows, `form` is what replies must hold, `names` says what a row's two requests are.
    `verdicts` has what is known, by what it stands for (see Question); `unjudged` what came to nothing, of the rows
    `unjudged_rows`."""

    judge: Judge
    settings: JudgeSettings
    questions: Sequence[Question]
    lines: Sequence[int]
    path: Path | None
    form: Form
    names: tuple[str, str]
    verdicts: dict[tuple[int, int], Verdict] = field(default_factory=dict)
    unjudged: list[dict[str, Any]] = field(default_factory=list)
    unjudged_rows: set[int] = field(default_factory=set)
    cost: Cost = field(default_factory=Cost)

    def run(self, progress: Progress) -> None:
        """Ask for every verdict that is not kept, a chunk at a time, and once more for what could not be read.

        Raises ConfigError before the first request where there are more than `max_requests`; VerificationError as soon as more
        than `max_unjudged` of the rows have no verdict. `progress` is told the number of requests before the first one.
        """
        known = read_cache(self.path, self.form)
        if self.path:  # found out before anything is paid for
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.open("a").close()
        for question in self.questions:
            if question.key in known:
                self._settle(question, known[question.key])
        pending = [question for question in self.questions if question.key not in known]
        total, limit = len(pending), self.settings.max_requests
        self.cost.from_cache = len(self.questions) - total
        if limit is not None and total > limit:
            raise ConfigError(
                f"judging {len(self.lines)} rows needs {total} requests ({self.cost.from_cache} verdicts are kept from "
                f"before), more than max_requests = {limit}; raise it, or judge fewer rows (evaluation.max_rows)"
            )
        spare = total if limit is None else limit - total
        progress("judging", 0, total)
        for start in range(0, total, CHUNK):

            def told(done: int, before: int = start) -> None:
                progress("judging", before + done, total)

            chunk = pending[start : start + CHUNK]
            unread = self._ask([(question, question.chat) for question in chunk], told)
            again, rest = unread[:spare], unread[spare:]
            for question, reply, problem in rest:
                self._give_up(question, f"{problem}; max_requests allowed no second request", reply)
            spare -= len(again)
            self._ask_again(again)

    def report(self) -> dict[str, Any]:
        """Who judged, what has no verdict and why, what it cost, and where verdicts are kept, as JSON."""
        settings = self.settings
        sampling = {"temperature": settings.temperature, "seed": settings.seed}
        return {
            "judge": {"url": settings.url, "model": settings.model, **sampling},
            "unjudged_rows": len(self.unjudged_rows),
            "unjudged": sorted(self.unjudged, key=lambda entry: (entry["line"], entry["of"])),
            "cost": self.cost.summary(settings.price_per_million),
            "file": self.path.name if self.path else None,
        }

    def notes(self) -> list[str]:
        """The same for people, in a line or two."""
        found = []
        if self.unjudged:
            first = min(self.unjudged, key=lambda entry: (entry["line"], entry["of"]))
            found.append(
                f"{len(self.unjudged_rows)} of {len(self.lines)} rows have no verdict, first line {first['line']}: {first['problem']}"
            )
        return [*found, self.cost.text(self.settings.price_per_million)]

    def _ask(
        self, asked: Sequence[tuple[Question, Chat]], told: Callable[[int], None]
    ) -> list[tuple[Question, Reply, str]]:
        """Send the chats and keep the verdicts. Returns the replies that cannot be read, each with its problem."""
        unread = []
        with closing(self.judge.replies([chat for _, chat in asked])) as replies:
            for done, (number, reply) in enumerate(replies, 1):
                problem = self._take(asked[number][0], reply)
                if problem is not None and isinstance(reply, Reply):
                    unread.append((asked[number][0], reply, problem))
                told(done)
        return unread

    def _ask_again(self, unread: Sequence[tuple[Question, Reply, str]]) -> None:
        """Tell the judge what was wrong with its replies. What cannot be read now has no verdict."""
        chats = [correction(question.chat, reply.text, problem, self.form) for question, reply, problem in unread]
        with closing(self.judge.replies(chats)) as replies:
            for number, reply in replies:
                question = unread[number][0]
                problem = self._take(question, reply)
                if problem is not None and isinstance(reply, Reply):
                    self._give_up(question, problem, reply)

    def _take(self, question: Question, reply: Reply | Failure) -> str | None:
        """Count a reply and keep its verdict, or give the question up where the request failed. Returns why a reply cannot be
        read."""
        self.cost.add(reply)
        if isinstance(reply, Failure):
            self._give_up(question, reply.message, None)
            return None
        limit = self.settings.max_completion_tokens
        cut = "it was cut at " + ("the endpoint's limit" if limit is None else f"{limit} tokens")
        try:
            verdict = Verdict(*read_reply(reply.text, self.form))
        except Unreadable as error:
            return f"{error} ({cut})" if reply.cut else str(error)
        if reply.cut:  # a verdict weighed on the way, or one of several: the rest is not known
            return cut
        self._record(question, reply, value=verdict.value, reason=verdict.reason)
        self._settle(question, verdict)
        return None

    def _settle(self, question: Question, verdict: Verdict) -> None:
        for place in question.stands_for:
            self.verdicts[place] = verdict

    def _give_up(self, question: Question, problem: str, reply: Reply | None) -> None:
        """Count a request as without a verdict, and stop where there are too many."""
        kind = "failed" if reply is None else "unparsable"
        text = None if reply is None else reply.text
        self._record(question, reply, value=None, kind=kind, problem=problem)
        for row, place in question.stands_for:
            entry = {"line": self.lines[row], "of": self.names[place], "kind": kind, "problem": problem, "text": text}
            self.unjudged.append(entry)
            self.unjudged_rows.add(row)
        if len(self.unjudged_rows) > self.settings.max_unjudged * len(self.lines):
            raise VerificationError(self._too_many())

    def _too_many(self) -> str:
        unparsable = sum(entry["kind"] == "unparsable" for entry in self.unjudged)
        last = self.unjudged[-1]
        kept = (
            f"The verdicts that came are kept in {self.path}, and a repeated run asks for the others only. "
            if self.path
            else ""
        )
        said = "" if last["text"] is None else f"; the reply was: {last['text'][:SHOWN]!r}"
        return (
            f"the judge {self.settings.model} gave no verdict on {len(self.unjudged_rows)} of {len(self.lines)} rows, more "
            f"than the {self.settings.max_unjudged:.0%} of max_unjudged: {unparsable} replies could not be read, "
            f"{len(self.unjudged) - unparsable} requests failed. Line {last['line']}: {last['problem']}{said}. There is no "
            f"rate. {kept}Take a judge that replies in JSON, or mend the endpoint"
        )

    def _record(self, question: Question, reply: Reply | None, **outcome: Any) -> None:
        lines = sorted({self.lines[row] for row, _ in question.stands_for})
        judge = {"model": self.settings.model, "url": self.settings.url}
        entry: dict[str, Any] = {"key": question.key, **judge, "lines": lines, **outcome}
        if reply is not None:
            entry["text"] = reply.text
            entry |= {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        if self.path is None:
            return
        # Opened for each line: a reply takes a second, opening a file 20 microseconds.
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def request_key(chat: Chat, settings: JudgeSettings) -> str:
    """SHA-256 of all that decides what a judge replies."""
    asked = [settings.model, settings.url, chat, settings.temperature, settings.seed, settings.max_completion_tokens]
    return sha256_text([json.dumps(asked)])


def read_cache(path: Path | None, form: Form) -> dict[str, Verdict]:
    """Verdicts by key. A last line that was cut off is removed; a line that holds no verdict of this form is passed over."""
    if path is None or not path.exists():
        return {}
    with disk_errors(path):
        data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_atomic(path, whole)
    found = {}
    for line in whole.splitlines():
        try:
            entry = json.loads(line)
            verdict = Verdict(*read_reply(entry["text"], form))
            if verdict.value == entry["value"]:  # null: the reply was cut behind what reads like a verdict
                found[entry["key"]] = verdict
        except (ValueError, KeyError, TypeError):
            continue  # of another form, without a reply, or damaged: it is asked for again
    return found
