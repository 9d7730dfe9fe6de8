"""Chats as tokens: the template, and which tokens the loss covers.

The loss mask comes from rendering, not from searching for marker strings: for the assistant's turn i, the conversation
before it is rendered with the generation prompt (what the model is given at inference) and the conversation up to it
without; what the second adds to the first is what the model has to write. Its trailing white space after the end-of-turn
token is left out. A template that does not render this way (it rewrites earlier turns, or its generation prompt is not
a prefix of its answers) cannot be masked exactly, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, DataError
from tunesmith.files import sha256_text
from tunesmith.types import Example, Message, TokenizedExample

NO_TEMPLATE = "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
"""`chat_template: none`: the texts joined as they are, each answer ended by the end-of-sequence token."""

TOKENIZE_ROWS = 512


class ChatFormat:
    """Renders and tokenizes conversations for one tokenizer and one template.

    `tokenizer` is a transformers fast tokenizer. `setting` is `data.chat_template`: auto, alpaca, none or a .jinja file.
    Raises ConfigError for a template that cannot be read or used.
    """

    def __init__(self, tokenizer: Any, setting: str = "auto"):
        self.tokenizer = tokenizer
        self.name, self.template = _find_template(tokenizer, setting)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token; set `eos_token` in its tokenizer_config.json"
            )
        if not tokenizer.is_fast:
            raise ConfigError(
                "the tokenizer is a slow one (no offsets, so no exact loss mask); save it as tokenizer.json"
            )
        added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        specials = {*added.values(), *tokenizer.all_special_tokens}
        self.special_ids = {*added, *tokenizer.all_special_ids}
        self._control = re.compile("|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)))
        self._adds_bos = bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
        if self._adds_bos and self.name in ("alpaca", "none"):
            self.template = "{{ bos_token }}" + self.template  # a model's own template writes it itself

    @property
    def hash(self) -> str:
        """SHA-256 of the template's text."""
        return sha256_text([self.template])

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the model sees it. Raises DataError if the template refuses it, ConfigError if it is broken."""
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": message.role, "content": message.content} for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=self.template,
                )
            )
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template ({self.name}) is not valid Jinja: {error.message} (line {error.lineno})"
            ) from None
        except (jinja2.exceptions.TemplateError, TypeError) as error:  # TypeError: an operator on the wrong type
            raise DataError(f"the chat template refuses this conversation: {error}") from None

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that ask for the assistant's next turn: the same prefix that training saw before an answer."""
        self._refuse_control_tokens(messages)
        return list(self.tokenizer(self.render(messages, True), add_special_tokens=False)["input_ids"])

    def encode(self, examples: Sequence[Example], train_on: str = "assistant") -> list[TokenizedExample]:
        """Tokenize examples, with the mask of supervised tokens.

        `train_on`: `assistant` (the answers with their end-of-turn token) or `all`. Plain text is supervised whole and
        ends with the end-of-sequence token. Raises DataError with one line for each example that cannot be encoded.
        """
        problems: list[str] = []
        encoded: list[TokenizedExample] = []
        for start in range(0, len(examples), TOKENIZE_ROWS):
            chunk = examples[start : start + TOKENIZE_ROWS]
            rendered: list[tuple[Example, str, list[tuple[int, int]]]] = []
            for example in chunk:
                try:
                    rendered.append((example, *self._render_spans(example, train_on)))
                except DataError as error:
                    problems.append(f"{example.where}: {error}")
            if not rendered:
                continue
            tokens = self.tokenizer(
                [text for _, text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True
            )
            prompts = [text[:begin] for _, text, spans in rendered for begin, _ in spans if begin]
            prompt_ids = iter(self.tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else [])
            for index, (example, text, spans) in enumerate(rendered):
                ids, offsets = tokens["input_ids"][index], tokens["offset_mapping"][index]
                asked = [next(prompt_ids) for begin, _ in spans if begin]
                encoded.append(self._mask(example, text, spans, ids, offsets, asked))
        if problems:
            raise DataError(problems)
        return encoded

    def _render_spans(self, example: Example, train_on: str) -> tuple[str, list[tuple[int, int]]]:
        """The example's text and the character ranges that are supervised."""
        if example.text is not None:
            self._refuse_control_tokens([Message("user", example.text)])
            bos = self.tokenizer.bos_token if self._adds_bos else ""
            text = f"{bos}{example.text}{self.tokenizer.eos_token}"
            return text, [(0, len(text))]
        assert example.messages is not None
        self._refuse_control_tokens(example.messages)
        full = self.render(example.messages)
        if train_on == "all":
            return full, [(0, len(full))]
        spans = []
        for index, message in enumerate(example.messages):
            if message.role != "assistant":
                continue
            prompt = self.render(example.messages[:index], True)
            through = full if index == len(example.messages) - 1 else self.render(example.messages[: index + 1])
            if not through.startswith(prompt):
                raise DataError(
                    f"the chat template cannot be masked exactly: turn {index + 1} does not begin with the generation "
                    f"prompt (ends in {prompt[-30:]!r}); choose another data.chat_template, or data.train_on: all"
                )
            if not full.startswith(through):
                raise DataError(
                    f"the chat template cannot be masked exactly: it rewrites turn {index + 1} when later turns follow; "
                    "choose another data.chat_template, or data.train_on: all"
                )
            answer = through[len(prompt) :].rstrip()
            if "".join(message.content.split()) not in "".join(answer.split()):
                raise DataError(
                    f"the chat template leaves out the text of turn {index + 1} (it renders {answer[:30]!r}); "
                    "choose another data.chat_template"
                )
            spans.append((len(prompt), len(prompt) + len(answer)))
        return full, spans

    def _mask(
        self,
        example: Example,
        text: str,
        spans: Iterable[tuple[int, int]],
        ids: list[int],
        offsets: list[tuple[int, int]],
        prompts: Sequence[list[int]],
    ) -> TokenizedExample:
        """The mask by character offsets; `prompts` are the ids of the text before each span, tokenized alone."""
        spans = list(spans)
        if any(ids[: len(prompt)] != prompt for prompt in prompts) or any(
            start < begin < end or start < stop < end for begin, stop in spans for start, end in offsets
        ):
            return self._mask_by_piece(example, text, spans)
        mask = tuple(
            any(begin <= start and end <= stop and start < end for begin, stop in spans) for start, end in offsets
        )
        return TokenizedExample(tuple(ids), mask, example.line)

    def _mask_by_piece(self, example: Example, text: str, spans: Iterable[tuple[int, int]]) -> TokenizedExample:
        """Tokenize prompt and answer apart, as inference does, where the whole text's tokens differ around their border."""
        ids: list[int] = []
        mask: list[bool] = []
        position = 0
        for begin, end in [*spans, (len(text), len(text))]:
            for piece, supervised in ((text[position:begin], False), (text[begin:end], True)):
                tokens = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                ids += tokens
                mask += [supervised] * len(tokens)
            position = end
        return TokenizedExample(tuple(ids), tuple(mask), example.line)

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if match := self._control.search(message.content):
                raise DataError(
                    f"the {message.role} text holds {match.group()!r}, a control token of this model: it would end or "
                    "forge a turn; remove it, or write it differently"
                )


def tokenize(
    chat: ChatFormat,
    examples: Sequence[Example],
    max_seq_length: int,
    overlong: str = "error",
    train_on: str = "assistant",
) -> tuple[list[TokenizedExample], list[str]]:
    """Tokenize, and apply `data.overlong` to examples of more than `max_seq_length` tokens.

    Returns the examples and one note for each thing that was done to them, or is amiss (answers that the chat template
    does not end with a special token: the model would not learn to stop). Raises DataError for rows that are too long
    (`overlong: error`), and for rows that are left without a supervised token.
    """
    tokenized = chat.encode(examples, train_on)
    where = {example.line: example.where for example in examples}
    kept: list[TokenizedExample] = []
    problems: list[str] = []
    long: list[TokenizedExample] = []
    endless: list[TokenizedExample] = []
    specials = chat.special_ids
    for example in tokenized:
        cut = len(example) > max_seq_length
        if cut:
            long.append(example)
            if overlong == "error":
                problems.append(
                    f"{where[example.line]}: {len(example)} tokens, data.max_seq_length is {max_seq_length}; "
                    "raise it, or set data.overlong to truncate or drop"
                )
                continue
            if overlong == "drop":
                continue
            example = TokenizedExample(
                example.input_ids[:max_seq_length], example.loss_mask[:max_seq_length], example.line
            )
        if example.supervised == 0:
            why = " once cut to data.max_seq_length" if cut else ""
            problems.append(
                f"{where[example.line]}: no supervised token is left{why}; there is nothing to learn from this row"
            )
            continue
        kept.append(example)
        if train_on == "assistant" and not cut and _last_supervised(example) not in specials:
            endless.append(example)
    if problems:
        raise DataError(problems)
    notes = []
    if long:
        verb = "cut to" if overlong == "truncate" else "dropped: longer than"
        lines = ", ".join(str(example.line) for example in long[:10]) + (", ..." if len(long) > 10 else "")
        notes.append(f"{len(long)} of {len(tokenized)} rows {verb} {max_seq_length} tokens (lines {lines})")
    if endless:
        last = chat.tokenizer.decode([_last_supervised(endless[0])])
        notes.append(
            f"{len(endless)} of {len(tokenized)} rows have answers without an end token (line {endless[0].line}: the last "
            f"supervised token is {last!r}): the model does not learn to stop; the chat template ({chat.name}) writes "
            "none, choose another data.chat_template"
        )
    if not kept:
        raise DataError(f"no rows are left: all {len(tokenized)} are longer than data.max_seq_length {max_seq_length}")
    return kept, notes


def _last_supervised(example: TokenizedExample) -> int:
    return next(
        token for token, mask in zip(reversed(example.input_ids), reversed(example.loss_mask), strict=True) if mask
    )


def _find_template(tokenizer: Any, setting: str) -> tuple[str, str]:
    if setting == "auto":
        if tokenizer.chat_template:
            return "the model's own", _text_of(tokenizer.chat_template)
        setting = "alpaca"
    if setting == "alpaca":
        return "alpaca", resources.files("tunesmith.data").joinpath("templates/alpaca.jinja").read_text(
            encoding="utf-8"
        )
    if setting == "none":
        return "none", NO_TEMPLATE
    path = Path(setting)
    if not path.is_file():
        raise ConfigError(f"data.chat_template is {setting!r}: expected auto, alpaca, none, or an existing .jinja file")
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
