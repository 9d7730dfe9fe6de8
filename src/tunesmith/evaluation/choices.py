"""Multiple choice by log-likelihood: the model picks the choice that it finds most likely behind the question.

Nothing is generated, so that base models, which do not know when to stop, are measured as fairly as chat models:

    acc       the right choice has the largest log p(choice | prompt)
    acc_norm  the right choice has the largest log p(choice | prompt) / number of its characters: long choices lose nothing

as the lm-evaluation-harness (0.4) defines them; of equal ones the first is picked. Its `acc_norm` counts characters of the choice
without the space before it; its `acc_bytes` counts UTF-8 bytes, which is the same for ASCII.

Plain prompts, for base and tuned models alike (`plain_requests`), `_` a space:

    continuation   prompt  {question}                                                   choices  _{choice}
                   OpenBookQA in GPT-3's zero-shot form (Brown et al. 2020) and the harness's `openbookqa`; COPA's questions end in
                   "because" or "therefore" there already (the harness's `copa` puts two spaces before a choice; here it is one)
    letters        prompt  {question}\\nA._{choice}\\nB._{choice}\\n...\\nAnswer:           choices  _A, _B, ...
                   MMLU (Hendrycks et al. 2021) as the harness's `mmlu` tasks have it in 0.4, zero-shot; without the line that
                   names the subject ("The following are multiple choice questions ... about {subject}.")

Prompt and choice are tokenized as one text and cut where the prompt's own tokens end, as the harness cuts; white space at a
prompt's end goes with the choice. A tokenizer that begins texts with a beginning-of-sequence token does so here.

Chat prompts, for a user's own tasks (`chat_requests`, `answer_requests`): the prompt is what training saw before an answer, the
choice is the assistant's answer with its end-of-turn token, so that a label which begins another one is not half of it:

    continuation   user  {question}                                    assistant  {choice}
    letters        user  {question}\\n\\nA._{choice}\\nB._{choice}...       assistant  A      what a `multiple_choice` row trains on
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.config import SourceConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.columns import resolve
from tunesmith.data.formats import read_examples
from tunesmith.data.forms import LETTERS
from tunesmith.data.readers import open_source
from tunesmith.errors import DataError
from tunesmith.evaluation.statistics import Measured, mean
from tunesmith.models.likelihood import Likelihood, Request
from tunesmith.types import Example, Message

ChoiceForm = Literal["continuation", "letters"]


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with its choices; `answer` is the right one's index. `group` is the set that it is from."""

    question: str
    choices: tuple[str, ...]
    answer: int
    id: str
    group: str = ""

    def texts(self, form: ChoiceForm) -> tuple[str, ...]:
        """What is scored: the choices, or their letters."""
        return self.choices if form == "continuation" else tuple(LETTERS[: len(self.choices)])


@dataclass(frozen=True, slots=True)
class Picked:
    """What a model picks: indices by the largest log-likelihood, and by the largest one a character."""

    by_total: int
    by_length: int


def listing(choices: Sequence[str]) -> str:
    """The choices with their letters, one a line."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def read_choices(path: str, group: str = "") -> list[ChoiceQuestion]:
    """The questions of a file of {question, choices, answer} rows (`answer`: text, letter or index; optional `passage`).

    Raises DataError with every row that is not one.
    """
    source = SourceConfig(path=path, format="multiple_choice")
    examples = read_examples(source).examples  # raises every problem
    column = resolve({}, {}).find
    rows = (row for contents in open_source(source, None) for _, row in contents.rows)
    questions = []
    for example, row in zip(examples, rows, strict=True):
        assert isinstance(example, Example)
        assert example.messages is not None
        assert isinstance(row, dict)
        prompt, letter = example.messages[-2].content, example.messages[-1].content
        listed = row[column(row, "choices") or ""]
        choices = tuple(json.loads(listed) if isinstance(listed, str) else listed)  # a cell of a table holds JSON
        name = str(row.get("id", example.line))
        question = prompt.removesuffix(f"\n\n{listing(choices)}")  # behind its passage, if it has one
        questions.append(ChoiceQuestion(question, choices, LETTERS.index(letter), name, group))
    return questions


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its beginning-of-sequence token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def plain_requests(tokenizer: Any, questions: Iterable[ChoiceQuestion], form: ChoiceForm) -> list[Request]:
    """The requests of each question's choices, one question after the other, without a chat template."""
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    requests: list[Request] = []
    for question in questions:
        prompt = question.question
        if form == "letters":
            prompt = f"{prompt.strip()}\n{listing(question.choices)}\nAnswer:"
        kept = prompt.rstrip()
        context = _encode(tokenizer, kept)
        for text in question.texts(form):
            whole = _encode(tokenizer, f"{kept}{prompt[len(kept) :]} {text}")
            requests.append(([*start, *context], whole[len(context) :]))
    return requests


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_requests(chat: ChatFormat, questions: Iterable[ChoiceQuestion], form: ChoiceForm) -> list[Request]:
    """The requests of each question's choices, one question after the other, in the chat format."""
    requests: list[Request] = []
    for question in questions:
        text = question.question if form == "continuation" else f"{question.question}\n\n{listing(question.choices)}"
        requests += answer_requests(chat, (Message("user", text),), question.texts(form), where=question.id)
    return requests


def answer_requests(
    chat: ChatFormat,
    messages: Sequence[Message],
    answers: Sequence[str],
    tools: Sequence[Mapping[str, Any]] = (),
    where: str = "",
) -> list[Request]:
    """A request for each of `answers` as the assistant's next turn behind `messages`, with the token that ends the turn.

    What is scored is what training supervises of such a turn. Raises DataError, which begins with `where`, for a conversation
    that the template refuses.
    """
    requests: list[Request] = []
    for answer in answers:
        example = Example((*messages, Message("assistant", answer)), None, where, 0, tuple(tools))
        encoded, findings = chat.encode_checked([example], "last")
        if problems := [f"{where}: {finding.message}" for finding in findings if finding.severity == "error"]:
            raise DataError(problems)
        ids, mask = encoded[-1].input_ids.tolist(), encoded[-1].loss_mask.tolist()
        end = len(mask) - mask[::-1].index(True)
        start = end - next((n for n, supervised in enumerate(reversed(mask[:end])) if not supervised), end)
        requests.append((ids[:start], ids[start:end]))
    return requests


def picks(questions: Sequence[ChoiceQuestion], found: Sequence[Likelihood], form: ChoiceForm) -> list[Picked]:
    """What was picked for each question; `found` holds the likelihoods of its choices, one question after the other."""
    picked = []
    start = 0
    for question in questions:
        texts = question.texts(form)
        totals = [likelihood.total for likelihood in found[start : start + len(texts)]]
        by_length = [total / len(text) for total, text in zip(totals, texts, strict=True)]
        picked.append(Picked(_largest(totals), _largest(by_length)))
        start += len(texts)
    assert start == len(found)
    return picked


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def measure_choices(questions: Sequence[ChoiceQuestion], picked: Sequence[Picked]) -> dict[str, Measured]:
    """`acc` and `acc_norm` over the questions. At least one is needed."""
    pairs = list(zip(questions, picked, strict=True))
    return {
        "acc": mean([float(pick.by_total == question.answer) for question, pick in pairs]),
        "acc_norm": mean([float(pick.by_length == question.answer) for question, pick in pairs]),
    }
