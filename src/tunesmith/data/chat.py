"""Chats as tokens: one tokenizer, one template, and which tokens the loss covers.

Text of the data is never read as control tokens: where a row's texts hold the strings of such tokens (`<|im_end|>`), they
are hidden from the template behind placeholders and encoded as the plain text that they are, so that a row can neither
end nor forge a turn. Two kinds count: the tokenizer's special tokens anywhere, and its other added tokens that the
template writes (`<tool_call>`, `<think>`) in any text but the assistant's own, which may well have to write them.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tunesmith.data.rendering import ChatTemplate, MaskError
from tunesmith.data.shapes import RESERVED, RenderedText
from tunesmith.errors import ConfigError, DataError
from tunesmith.files import sha256_text
from tunesmith.types import Example, Finding, Message, TokenizedExample, ToolCall

NO_TEMPLATE = "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
"""`chat_template: none`: the texts joined as they are, each answer ended by the end-of-sequence token."""

NAMED_TEMPLATES = ("alpaca", "vicuna", "chatml", "llama2")
"""Templates that ship as data/templates/NAME.jinja."""

TOKENIZE_ROWS = 512

KEPT_CHARACTERS = 10_000_000
"""Tokens of parts of so much text at most are kept, in case the parts come again."""

MARKUP = re.compile(r"<\S*>|\[\S*\]")
"""What an added token that is not special looks like if it is markup of the template's (`<think>`, `[TOOL_CALLS]`)."""

CONTROLS_FROM_TEXT = "the tokenizer makes control tokens of this text, however it is written; change the text"

# A hidden control token: its number between two of Unicode's noncharacters. A renamed one: its text between two others.
HIDDEN = re.compile("\ufdd2([0-9]+)\ufdd3")
RENAMED_START, RENAMED_END = "\ufdd4", "\ufdd5"


class ChatFormat:
    """Renders and tokenizes conversations for one tokenizer and one template.

    `tokenizer` is a transformers fast tokenizer. `setting` is `data.chat_template`: auto, a name, none or a .jinja file;
    `variables` are `data.chat_template_kwargs`, `now` is the time that a template sees which prints the date. `kept` is the
    text that a run has kept of the template that `setting` names. Raises ConfigError for a template that cannot be read or
    used.
    """

    def __init__(
        self,
        tokenizer: Any,
        setting: str = "auto",
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        kept: str | None = None,
    ):
        self.tokenizer = tokenizer
        name, text = (setting, kept) if kept is not None else _find_template(tokenizer, setting)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token; set `eos_token` in its tokenizer_config.json"
            )
        if not tokenizer.is_fast:
            raise ConfigError(
                "the tokenizer is a slow one (no offsets, so no exact loss mask); save it as tokenizer.json"
            )
        added = tokenizer.added_tokens_decoder
        specials = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        written = {str(token) for token in added.values() if MARKUP.fullmatch(str(token)) and str(token) in text}
        self.special_ids = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self._added_ids = self.special_ids | set(added)
        self._special, self._control = _any_of(specials), _any_of(specials | written)
        self._controls = sorted(specials | written)
        control_ids = tokenizer.convert_tokens_to_ids(self._controls)
        self._is_control = np.zeros(max(control_ids) + 1, dtype=bool)
        self._is_control[control_ids] = True
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id < len(self._is_control):
            self._is_control[tokenizer.unk_token_id] = False  # it stands for what the vocabulary does not hold
        self._adds_bos = bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
        if self._adds_bos and kept is None and name in (*NAMED_TEMPLATES, "none"):
            text = "{{ bos_token }}" + text  # a model's own template writes it itself
        self.rendering = ChatTemplate(
            name, text, variables or {}, tokenizer.special_tokens_map, sorted(specials), now or datetime.now()
        )
        state = _tokenizer_state(tokenizer)
        self._plain = Tokenizer.from_str(json.dumps(state))
        # The pattern that cuts texts at added tokens as the tokenizer does, or None; and the tokens of parts seen before.
        self._added = re.compile(f"({_any_of(map(str, added.values())).pattern})") if _cuts_cleanly(state) else None
        self._parts: dict[str, np.ndarray] = {}
        self._odd_parts: set[str] = set()  # those that make control tokens of plain text
        self._kept = 0
        self._ids_of = lru_cache(maxsize=4096)(self._encode)

    @property
    def name(self) -> str:
        """Where the template is from: a name, a file, or `the model's own`."""
        return self.rendering.name

    @property
    def template(self) -> str:
        """The template's text, with `data.chat_template_kwargs` as defaults: what is saved beside a model."""
        return self.rendering.text_to_save

    @property
    def raw_template(self) -> str:
        """The template's text without its variables: what a run keeps beside its settings."""
        return self.rendering.text

    @property
    def now(self) -> datetime | None:
        """The time that the template sees, if it prints the date."""
        return self.rendering.now if self.rendering.prints_date else None

    @property
    def variables(self) -> dict[str, Any]:
        """The template's variables."""
        return self.rendering.variables

    @property
    def hash(self) -> str:
        """SHA-256 of the template's text and variables."""
        return sha256_text([self.template])

    def settle(self, examples: Iterable[Example]) -> str | None:
        """Turn a thinking template's thoughts off if no row holds one; returns a note that says so.

        Such a template asks for a thought by default. Rows without thoughts would teach the model to write an empty one
        before each answer (Qwen3), or cannot be masked at all (Nemotron). With `enable_thinking: false` the prompt holds
        the empty thought, and the answer alone is supervised. What `data.chat_template_kwargs` says comes first.
        """
        if "enable_thinking" not in self.rendering.text or "enable_thinking" in self.variables:
            return None
        question, answer = Message("user", "a"), Message("assistant", "b")
        off = self.rendering.with_variables(self.variables | {"enable_thinking": False})
        if _thoughtless(self.rendering, question, answer) or not _thoughtless(off, question, answer):
            return None
        for example in examples:
            for message in example.messages or ():
                if message.reasoning is not None or (message.role == "assistant" and "</think>" in message.content):
                    return None
        self.rendering = off
        return (
            f"no row holds a thought: the chat template ({self.name}) is used with enable_thinking: false; whoever asks "
            "the tuned model has to set it too (the run's own commands do)"
        )

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the model sees it. Raises DataError if the template refuses it."""
        return self.rendering.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids that ask for the assistant's next turn: the same prefix that training saw before an answer."""
        hidden, tools, held = self._hide(messages, tools)
        text = self.rendering.prompt(hidden, tools)
        ids = self._encode(text, False) if not held else []
        if held or self._makes_controls(np.array(ids, dtype=np.int32), text):
            revealed = self._reveal(RenderedText(text, ()), held).text
            ids = self._encode(revealed, True)
            if self._makes_controls(np.array(ids, dtype=np.int32), text):
                raise MaskError(CONTROLS_FROM_TEXT)
        return ids

    def encode(self, examples: Sequence[Example], train_on: str = "assistant") -> list[TokenizedExample]:
        """As `encode_checked`, but raises DataError with one line for each example that cannot be encoded."""
        encoded, findings = self.encode_checked(examples, train_on)
        if problems := [str(finding) for finding in findings if finding.severity == "error"]:
            raise DataError(problems)
        return encoded

    def encode_checked(
        self, examples: Sequence[Example], train_on: str = "assistant"
    ) -> tuple[list[TokenizedExample], list[Finding]]:
        """Tokenize examples, with the mask of supervised tokens; and what is wrong with those that could not be.

        `train_on`: `assistant` (the answers with their end-of-turn token), `last` or `all`. Plain text is supervised
        whole and ends with the end-of-sequence token. One example becomes several where the template rewrites earlier
        turns. Findings: `template` (an error: refused by the template, or no exact mask), `control_token` (a warning).
        """
        encoded: list[TokenizedExample] = []
        findings: list[Finding] = []
        for start in range(0, len(examples), TOKENIZE_ROWS):
            rendered: list[_Row] = []
            for example in examples[start : start + TOKENIZE_ROWS]:
                try:
                    texts, held = self._rendered(example, train_on)
                except DataError as error:
                    findings.append(Finding("template", "error", example.file, example.line, str(error)))
                    continue
                if held:
                    findings.append(_control_finding(example, held))
                rendered.append(_Row(example, texts, held))
            plain = [row for row in rendered if not row.held]
            tokens = {id(row): found for row, found in zip(plain, self._tokenize(plain), strict=True)}
            for row in rendered:
                found = tokens.get(id(row)) or self._tokenize_hidden(row)
                if found is None:
                    findings.append(
                        Finding("template", "error", row.example.file, row.example.line, CONTROLS_FROM_TEXT)
                    )
                encoded += found or []
        return encoded, findings

    def _rendered(self, example: Example, train_on: str) -> tuple[list[RenderedText], list[str]]:
        """The example's texts with what is supervised, control tokens in its own texts hidden: those, in order."""
        if example.text is not None:
            (message,), _, held = self._hide([Message("assistant", example.text)])
            bos = self.tokenizer.bos_token if self._adds_bos else ""
            text = f"{bos}{message.content}{self.tokenizer.eos_token}"
            return [RenderedText(text, ((0, len(text)),))], held
        assert example.messages is not None
        messages, tools, held = self._hide(example.messages, example.tools)
        texts = self.rendering.supervised(messages, tools, train_on)
        if self.name == "none":  # nothing stands between two texts
            ends = sum(message.role == "assistant" for message in messages) + self._adds_bos
            if len(self._control.findall(texts[-1].text)) != ends:
                raise MaskError("two texts together spell a control token; choose another data.chat_template")
        return texts, held

    def _hide(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[Sequence[Message], Sequence[Mapping[str, Any]], list[str]]:
        """Messages and tools with placeholders for the control tokens in them, and those tokens by placeholder number."""
        held: list[str] = []

        def placeholder(match: re.Match[str]) -> str:
            held.append(match.group())
            return f"\ufdd2{len(held) - 1}\ufdd3"

        def hide(text: str, pattern: re.Pattern[str], where: str) -> str:
            if RESERVED.search(text):
                raise MaskError(f"the {where} text holds a Unicode noncharacter (U+FDD0 to U+FDD9); remove it")
            return pattern.sub(placeholder, text)

        def hide_in(value: Any, pattern: re.Pattern[str], where: str) -> Any:
            return json.loads(hide(json.dumps(value, ensure_ascii=False), pattern, where))

        hidden = []
        for message in messages:
            pattern = self._special if message.role == "assistant" else self._control
            content = hide(message.content, pattern, message.role)
            if message.reasoning or message.tool_calls or message.name or message.call_id:
                message = replace(
                    message,
                    content=content,
                    reasoning=message.reasoning and hide(message.reasoning, pattern, message.role),
                    tool_calls=tuple(
                        ToolCall(
                            hide(call.name, self._control, "tool call's"),
                            hide_in(dict(call.arguments), pattern, "tool call's"),
                            call.id and hide(call.id, self._control, "tool call's"),
                        )
                        for call in message.tool_calls
                    ),
                    name=message.name and hide(message.name, self._control, message.role),
                    call_id=message.call_id and hide(message.call_id, self._control, message.role),
                )
            elif content is not message.content:
                message = replace(message, content=content)
            hidden.append(message)
        tools = [hide_in(dict(tool), self._control, "tool's") for tool in tools]
        return (hidden, tools, held)

    def _reveal(self, rendered: RenderedText, held: Sequence[str]) -> RenderedText:
        """The text for `_renamed`: real control tokens by their new names, hidden ones as the plain text they are."""
        pieces: list[str] = []
        moved: list[tuple[int, int]] = []  # (position in the hidden text, how far what follows has moved)
        position = shift = 0
        pattern = re.compile(f"{HIDDEN.pattern}|(?:{self._control.pattern})")
        for match in pattern.finditer(rendered.text):
            number = match.group(1)
            new = held[int(number)] if number is not None else f"{RENAMED_START}{match.group()}{RENAMED_END}"
            pieces += [rendered.text[position : match.start()], new]
            position = match.end()
            shift += len(new) - len(match.group())
            moved.append((position, shift))
        pieces.append(rendered.text[position:])

        def at(place: int) -> int:
            return place + next((shift for start, shift in reversed(moved) if start <= place), 0)

        return RenderedText("".join(pieces), tuple((at(begin), at(end)) for begin, end in rendered.spans))

    def _encode(self, text: str, renamed: bool) -> list[int]:
        return list((self._renamed if renamed else self._plain).encode(text, add_special_tokens=False).ids)

    @cached_property
    def _renamed(self) -> Tokenizer:
        """The same tokenizer with its control tokens under other names: their usual strings are plain text to it."""
        state = _tokenizer_state(self.tokenizer)
        model = state["model"]
        merged = {piece for merge in model.get("merges") or [] for piece in (*merge, "".join(merge))}
        names = {t: f"{RENAMED_START}{t}{RENAMED_END}" for t in self._controls if t not in merged}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:  # Unigram: a list of (piece, score)
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return Tokenizer.from_str(json.dumps(state))

    def _makes_controls(self, ids: np.ndarray, text: str) -> bool:
        """Whether tokens hold more control tokens than the text that was rendered writes: plain text became some."""
        found = int(self._is_control[ids[ids < len(self._is_control)]].sum())
        return found > len(self._control.findall(text))

    def _tokenize_hidden(self, row: _Row) -> list[TokenizedExample] | None:
        """Tokenize a row that holds control tokens as text; None if the tokenizer makes control tokens of it even so."""
        found = []
        for rendered in row.texts:
            revealed = self._reveal(rendered, row.held)
            encoding = self._renamed.encode(revealed.text, add_special_tokens=False)
            if self._makes_controls(np.array(encoding.ids, dtype=np.int32), rendered.text):
                return None
            found += self._mask(row.example, revealed, encoding, True)
        return found

    def _tokenize(self, rows: Sequence[_Row]) -> list[list[TokenizedExample] | None]:
        """Tokenize rows, each part between two added tokens once: system messages, tools, turns that come again.

        None for a row of whose plain text the tokenizer makes a control token (a normalizer's doing).
        """
        cut = [[self._cut(rendered.text) for rendered in row.texts] for row in rows]
        if self._kept > KEPT_CHARACTERS:
            self._parts.clear()
            self._odd_parts.clear()
            self._kept = 0
        new = list(dict.fromkeys(p for texts in cut for parts in texts for p in parts if p not in self._parts))
        for part, encoding in zip(new, self._plain.encode_batch(new, add_special_tokens=False), strict=True):
            self._parts[part] = np.array(encoding.ids, dtype=np.int32)
            self._kept += len(part)
            if self._makes_controls(self._parts[part], part):
                self._odd_parts.add(part)
        found: list[list[TokenizedExample] | None] = []
        for row, texts in zip(rows, cut, strict=True):
            examples: list[TokenizedExample] = []
            made = any(part in self._odd_parts for parts in texts for part in parts)
            for rendered, parts in zip(row.texts, texts, strict=True):
                joined = self._join(row.example, rendered, parts) if self._added else None
                if joined is None:
                    encoding = self._plain.encode(rendered.text, add_special_tokens=False)
                    examples += self._mask(row.example, rendered, encoding, False)
                else:
                    examples.append(joined)
            found.append(None if made else examples)
        return found

    def _cut(self, text: str) -> list[str]:
        return self._added.split(text) if self._added else [text]

    def _join(self, example: Example, rendered: RenderedText, parts: Sequence[str]) -> TokenizedExample | None:
        """The tokens of a text's parts, one after the other; None where a span's bounds are not seen to be exact."""
        arrays = [self._parts[part] for part in parts]
        chars = list(itertools.accumulate(map(len, parts), initial=0))
        tokens = list(itertools.accumulate(map(len, arrays), initial=0))
        mask = np.zeros(tokens[-1], dtype=bool)
        for begin, end in rendered.spans:
            place, last = bisect.bisect_right(chars, begin) - 1, bisect.bisect_left(chars, end)
            if chars[last] != end:
                return None
            first = tokens[place]
            if (
                chars[place] < begin
            ):  # in a part that begins with the turn's header: its tokens must be the header's own
                header = self._ids_of(parts[place][: begin - chars[place]], False)
                if arrays[place][: len(header)].tolist() != header or self.tokenizer.unk_token_id in header:
                    return None
                first += len(header)
            mask[first : tokens[last]] = True
        return TokenizedExample(np.concatenate(arrays), mask, example.line, example.file)

    def _mask(self, example: Example, rendered: RenderedText, encoding: Any, renamed: bool) -> list[TokenizedExample]:
        """The mask by character positions, where tokens end at every span's bounds and the prompts' tokens are their own."""
        ids = encoding.ids
        mask = np.zeros(len(ids), dtype=bool)
        for begin, end in rendered.spans:
            first = self._token_at(encoding, begin, rendered.text, ids)
            last = self._token_at(encoding, end, rendered.text, ids)
            if first is None or last is None:
                return self._apart(example, rendered, renamed)
            # An added token cuts a text into parts that are tokenized apart: only what follows the last one needs a look.
            cut = next((place for place in range(first - 1, -1, -1) if ids[place] in self._added_ids), None)
            start = 0 if cut is None else encoding.token_to_chars(cut)[0]
            if self._ids_of(rendered.text[start:begin], renamed) != ids[cut or 0 : first]:
                return self._apart(example, rendered, renamed)
            mask[first:last] = True
        return [TokenizedExample(np.array(ids, dtype=np.int32), mask, example.line, example.file)]

    def _token_at(self, encoding: Any, place: int, text: str, ids: Sequence[int]) -> int | None:
        """The token that starts at character `place` (their number at the text's end), or None if none starts there.

        An added token may have taken the white space behind it: what ends before that ends with the token.
        """
        if place == len(text):
            return len(ids)
        token = encoding.char_to_token(place)
        if token is None:
            return None
        start, end = encoding.token_to_chars(token)
        if start == place:
            return int(token)
        return int(token) + 1 if ids[token] in self._added_ids and text[place:end].isspace() else None

    def _apart(self, example: Example, rendered: RenderedText, renamed: bool) -> list[TokenizedExample]:
        """Prompt and answer tokenized apart, as inference does, where the whole text's tokens differ around their border.

        One example for each answer: before a later one, inference tokenizes the conversation anew.
        """
        found = []
        for begin, end in rendered.spans:
            prompt = self._encode(rendered.text[:begin], renamed) if begin else []
            answer = self._encode(rendered.text[begin:end], renamed)
            mask = np.zeros(len(prompt) + len(answer), dtype=bool)
            mask[len(prompt) :] = True
            ids = np.array(prompt + answer, dtype=np.int32)
            found.append(TokenizedExample(ids, mask, example.line, example.file))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """An example as texts, and the control tokens that were hidden in it."""

    example: Example
    texts: list[RenderedText]
    held: list[str]


def _control_finding(example: Example, held: Sequence[str]) -> Finding:
    tokens = list(dict.fromkeys(held))
    found = f"the text holds {', '.join(map(repr, tokens))}, control token{'s' * (len(tokens) > 1)} of this model"
    fix = "encoded as plain text, never as the token"
    return Finding("control_token", "warning", example.file, example.line, found, fix)


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as JSON, without what comes after its model: no post-processor moves an offset."""
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return state | {"truncation": None, "padding": None, "post_processor": None}


def _cuts_cleanly(state: Mapping[str, Any]) -> bool:
    """Whether added tokens cut a text into parts that are tokenized as if each stood alone."""
    normalizer = state["normalizer"] or {"type": "Sequence", "normalizers": []}
    plain = normalizer == {"type": "Sequence", "normalizers": []}
    takes_space = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in state["added_tokens"])
    after_normalizing = any(token["normalized"] for token in state["added_tokens"])
    looks_at_position = '"prepend_scheme": "first"' in json.dumps(state["pre_tokenizer"])
    return (
        bool(state["added_tokens"]) and not takes_space and not looks_at_position and (plain or not after_normalizing)
    )


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def _thoughtless(template: ChatTemplate, question: Message, answer: Message) -> bool:
    """Whether an answer is supervised without a thought that the template adds."""
    try:
        (rendered,) = template.supervised([question, answer])
    except DataError:
        return False
    ((begin, end),) = rendered.spans
    return "<think>" not in rendered.text[begin:end] and "</think>" not in rendered.text[begin:end]


def _find_template(tokenizer: Any, setting: str) -> tuple[str, str]:
    if setting == "auto":
        if tokenizer.chat_template:
            return "the model's own", _text_of(tokenizer.chat_template)
        setting = "alpaca"
    if setting in NAMED_TEMPLATES:
        file = resources.files("tunesmith.data").joinpath(f"templates/{setting}.jinja")
        return setting, file.read_text(encoding="utf-8")
    if setting == "none":
        return "none", NO_TEMPLATE
    path = Path(setting)
    if not path.is_file():
        names = ", ".join(("auto", *NAMED_TEMPLATES, "none"))
        raise ConfigError(f"data.chat_template is {setting!r}: expected {names}, or an existing .jinja file")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template {path}: cannot be read ({error})") from None


def _text_of(template: Any) -> str:
    """Some tokenizers hold several named templates; `default` is the one for chats."""
    if not isinstance(template, dict):
        return str(template)
    if "default" not in template:
        names = ", ".join(sorted(template))
        raise ConfigError(f"the tokenizer's chat templates are {names}, none is `default`; set data.chat_template")
    return str(template["default"])
