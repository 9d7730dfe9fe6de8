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
from dataclasses import replace
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.rendering import RESERVED, ChatTemplate, MaskError, RenderedText, Span
from tunesmith.errors import ConfigError, DataError
from tunesmith.files import sha256_text
from tunesmith.types import Example, Finding, Message, TokenizedExample

NO_TEMPLATE = "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
"""`chat_template: none`: the texts joined as they are, each answer ended by the end-of-sequence token."""

NAMED_TEMPLATES = ("alpaca", "vicuna", "chatml", "llama2")
"""Templates that ship as data/templates/NAME.jinja."""

TOKENIZE_ROWS = 512

KEPT_CHARACTERS = 10_000_000
"""Tokens of parts of so much text at most are kept, in case the parts come again."""

# A hidden control token: its number between two of Unicode's noncharacters. A renamed one: its text between two others.
HIDDEN = re.compile("\ufdd2([0-9]+)\ufdd3")
RENAMED_START, RENAMED_END = "\ufdd4", "\ufdd5"


class ChatFormat:
    """Renders and tokenizes conversations for one tokenizer and one template.

    `tokenizer` is a transformers fast tokenizer. `setting` is `data.chat_template`: auto, a name, none or a .jinja file;
    `variables` are `data.chat_template_kwargs`. Raises ConfigError for a template that cannot be read or used.
    """

    def __init__(self, tokenizer: Any, setting: str = "auto", variables: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        name, text = _find_template(tokenizer, setting)
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
        written = {str(token) for token in added.values() if str(token) in text} - specials
        self.special_ids = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self._added_ids = self.special_ids | set(added)
        self._special, self._control = _any_of(specials), _any_of(specials | written)
        self._controls = sorted(specials | written)
        self._adds_bos = bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
        if self._adds_bos and name in (*NAMED_TEMPLATES, "none"):
            text = "{{ bos_token }}" + text  # a model's own template writes it itself
        self.rendering = ChatTemplate(name, text, variables or {}, tokenizer.special_tokens_map, sorted(specials))
        # The pattern that cuts texts at added tokens as the tokenizer does, or None; and the tokens of parts seen before.
        self._added = re.compile(f"({_any_of(map(str, added.values())).pattern})") if _cuts_cleanly(tokenizer) else None
        self._parts: dict[str, np.ndarray] = {}
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
        if held:
            text, _ = self._reveal(RenderedText(text, ()), held)
        return self._encode(text, bool(held))

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
            plain: list[tuple[Example, RenderedText]] = []
            renamed: list[tuple[Example, RenderedText]] = []
            order: list[tuple[list[RenderedText], bool]] = []
            for example in examples[start : start + TOKENIZE_ROWS]:
                try:
                    texts, held = self._rendered(example, train_on)
                except DataError as error:
                    findings.append(Finding("template", "error", example.file, example.line, str(error)))
                    continue
                if held:
                    findings.append(
                        Finding(
                            "control_token",
                            "warning",
                            example.file,
                            example.line,
                            f"the text holds {', '.join(repr(token) for token in dict.fromkeys(held))}, "
                            f"control token{'s' * (len(set(held)) > 1)} of this model",
                            "encoded as plain text, never as the token",
                        )
                    )
                    texts = [RenderedText(*self._reveal(text, held)) for text in texts]
                (renamed if held else plain).extend((example, text) for text in texts)
                order.append((texts, bool(held)))
            tokens, others = iter(self._tokenize(plain, False)), iter(self._tokenize(renamed, True))
            for texts, has_held in order:
                encoded += [next(others if has_held else tokens) for _ in texts]
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
        return self.rendering.supervised(messages, tools, train_on), held

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
            if message.reasoning is None and not message.tool_calls:
                hidden.append(message if content is message.content else replace(message, content=content))
                continue
            calls = tuple(
                replace(call, arguments=hide_in(dict(call.arguments), pattern, "tool call's"))
                for call in message.tool_calls
            )
            reasoning = message.reasoning and hide(message.reasoning, pattern, message.role)
            hidden.append(replace(message, content=content, reasoning=reasoning, tool_calls=calls))
        tools = [hide_in(dict(tool), self._control, "tool's") for tool in tools]
        return (hidden, tools, held)

    def _reveal(self, rendered: RenderedText, held: Sequence[str]) -> tuple[str, tuple[Span, ...]]:
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

        return "".join(pieces), tuple((at(begin), at(end)) for begin, end in rendered.spans)

    def _encode(self, text: str, renamed: bool) -> list[int]:
        return list(self._backend(renamed).encode(text, add_special_tokens=False).ids)

    def _backend(self, renamed: bool) -> Any:
        """The Rust tokenizer, as transformers uses it when neither padding nor truncation is asked for."""
        if renamed:
            return self._renamed
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def _renamed(self) -> Any:
        """The same tokenizer with its control tokens under other names: their usual strings are plain text to it."""
        from tokenizers import Tokenizer

        names = {token: f"{RENAMED_START}{token}{RENAMED_END}" for token in self._controls}
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:  # Unigram: a list of (piece, score)
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        state["truncation"] = state["padding"] = state["post_processor"] = None
        return Tokenizer.from_str(json.dumps(state))

    def _tokenize(self, rows: Sequence[tuple[Example, RenderedText]], renamed: bool) -> list[TokenizedExample]:
        """Tokenize texts, each part between two added tokens once: system messages, tools, turns that come again."""
        if not rows:
            return []
        if self._added is None or renamed:
            texts = [rendered.text for _, rendered in rows]
            encodings = self._backend(renamed).encode_batch(texts, add_special_tokens=False)
            return [self._mask(*row, encoding, renamed) for row, encoding in zip(rows, encodings, strict=True)]
        backend = self._backend(False)
        cut = [self._added.split(rendered.text) for _, rendered in rows]
        if self._kept > KEPT_CHARACTERS:
            self._parts.clear()
            self._kept = 0
        new = list(dict.fromkeys(part for parts in cut for part in parts if part not in self._parts))
        for part, encoding in zip(new, backend.encode_batch(new, add_special_tokens=False), strict=True):
            self._parts[part] = np.array(encoding.ids, dtype=np.int32)
            self._kept += len(part)
        return [
            self._join(example, rendered, parts)
            or self._mask(example, rendered, backend.encode(rendered.text, add_special_tokens=False), False)
            for (example, rendered), parts in zip(rows, cut, strict=True)
        ]

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

    def _mask(self, example: Example, rendered: RenderedText, encoding: Any, renamed: bool) -> TokenizedExample:
        """The mask by character positions, where tokens end at every span's bounds and the prompts' tokens are their own."""
        ids = encoding.ids
        mask = np.zeros(len(ids), dtype=bool)
        for begin, end in rendered.spans:
            first = _token_at(encoding, begin, len(rendered.text), len(ids))
            last = _token_at(encoding, end, len(rendered.text), len(ids))
            if first is None or last is None:
                return self._mask_by_piece(example, rendered, renamed)
            # An added token cuts a text into parts that are tokenized apart: only what follows the last one needs a look.
            cut = next((place for place in range(first - 1, -1, -1) if ids[place] in self._added_ids), None)
            if cut != first - 1:
                start = 0 if cut is None else encoding.token_to_chars(cut)[0]
                if self._ids_of(rendered.text[start:begin], renamed) != ids[cut or 0 : first]:
                    return self._mask_by_piece(example, rendered, renamed)
            mask[first:last] = True
        return TokenizedExample(np.array(ids, dtype=np.int32), mask, example.line, example.file)

    def _mask_by_piece(self, example: Example, rendered: RenderedText, renamed: bool) -> TokenizedExample:
        """Tokenize prompt and answer apart, as inference does, where the whole text's tokens differ around their border."""
        ids: list[int] = []
        mask: list[bool] = []
        position = 0
        for begin, end in [*rendered.spans, (len(rendered.text), len(rendered.text))]:
            for piece, supervised in ((rendered.text[position:begin], False), (rendered.text[begin:end], True)):
                tokens = self._ids_of(piece, renamed) if piece else []
                ids += tokens
                mask += [supervised] * len(tokens)
            position = end
        return TokenizedExample(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool), example.line, example.file)


def _token_at(encoding: Any, place: int, length: int, num_tokens: int) -> int | None:
    """The token that starts at character `place` (`num_tokens` at the text's end), or None if none starts there."""
    if place == length:
        return num_tokens
    token = encoding.char_to_token(place)
    return int(token) if token is not None and encoding.token_to_chars(token)[0] == place else None


def _cuts_cleanly(tokenizer: Any) -> bool:
    """Whether added tokens cut a text into parts that are tokenized as if each stood alone."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
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
