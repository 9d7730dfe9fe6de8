"""Which column of a file holds what: `data.columns` and `data.roles`, in our names, LLaMA-Factory's or Axolotl's.

| here | LLaMA-Factory | Axolotl |
|---|---|---|
| messages | messages | field_messages |
| instruction, input, output | prompt, query, response | field_instruction, field_input, field_output |
| prompt, completion | | field_prompt |
| chosen, rejected | chosen, rejected | field_chosen, field_rejected |
| system, tools, history | the same | field_system, field_tools |
| label (KTO) | kto_tag | |
| text | prompt, alone | field |
| role, content (of a message) | role_tag, content_tag | message_field_role, message_field_content |

LLaMA-Factory's `prompt` is Alpaca's instruction (its `query` the input), so `prompt` means that as soon as `query`,
`response` or `kto_tag` stands beside it. Alone it names the column of plain text, as in LLaMA-Factory's pre-training sets.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.problems import FileProblem, listed
from tunesmith.types import ROLES

FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "tools": ("tools",),
    "system": ("system",),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "history": ("history",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "question": ("question",),
    "answer": ("answer", "response"),
    "choices": ("choices",),
    "passage": ("passage",),
    "text": ("text",),
    "label": ("label",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
"""Our fields, each with the columns it is looked for in when `data.columns` does not say (the first one present)."""

FUNCTION_CALL = "function_call"
"""A role of ShareGPT data: an assistant's turn whose text is a call, as JSON."""

LLAMA_FACTORY = {"query": "input", "response": "output", "kto_tag": "label", "conversations": "messages"}
AXOLOTL = {
    "field": "text",
    "field_messages": "messages",
    "field_tools": "tools",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}
MESSAGE_KEYS = {
    "role_tag": "role",
    "content_tag": "content",
    "message_field_role": "role",
    "message_field_content": "content",
    "message_field_training": "train",
}
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": FUNCTION_CALL,
    "system_tag": "system",
}
MEDIA = ("images", "videos", "audios")

ANSWERS = {"output", "completion", "answer", "choices", "messages", "text", "chosen", "rejected"}
"""Fields that say which form a row has, once `data.columns` names one of them."""

MODIFIERS = {"label", "system", "tools", "history", "input", "passage"}
"""Fields that go with the fields that `data.columns` names, without being named themselves."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where each field is. `columns[f]` are the candidates, in order; `mapped` are the fields that `data.columns` names.

    `role_key`, `content_key` and `train_key` are the keys of one message (None: the form's own); `roles` adds role names
    to those the form knows. `asked` is `data.columns` as it was written (key -> the user's column), without the keys and
    roles of messages. `kto`: LLaMA-Factory's kto_tag was named. `prompt_alone`: nothing but `prompt` was.
    """

    columns: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(FIELDS))
    mapped: frozenset[str] = frozenset()
    role_key: str | None = None
    content_key: str | None = None
    train_key: str = "train"
    roles: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, str] = field(default_factory=dict)
    kto: bool = False
    prompt_alone: bool = False

    def find(self, row: Mapping[str, Any], name: str) -> str | None:
        """The column of `row` that holds the field `name`, or None."""
        for column in self.columns[name]:
            if column in row:
                return column
        return None

    @property
    def decisive(self) -> frozenset[str] | None:
        """The only fields that tell the form, where `data.columns` names enough of them; else None."""
        return self.mapped | MODIFIERS if self.mapped & ANSWERS else None


def resolve(columns: Mapping[str, str], roles: Mapping[str, str]) -> Columns:
    """The columns that `data.columns` and `data.roles` stand for.

    Raises FileProblem for a name that is not known, and for names that contradict each other.
    """
    by_field: dict[str, str] = {}  # field, or `role`, `content`, `train` of a message -> the key of data.columns
    role_names: dict[str, str] = {}
    llama_factory = bool({"query", "response", "kto_tag"} & columns.keys())
    prompt_alone = set(columns) == {"prompt"} and columns["prompt"] != "prompt"
    for key, column in columns.items():
        if key in MEDIA:
            raise FileProblem("media_column", f"data.columns names `{key}`", "only text can be trained on", key)
        if key in ROLE_TAGS:
            _add_role(role_names, column, ROLE_TAGS[key])
            continue
        name = MESSAGE_KEYS.get(key) or LLAMA_FACTORY.get(key) or AXOLOTL.get(key) or key
        if prompt_alone:
            name = "text"
        elif key == "prompt" and llama_factory:
            name = "instruction"
        elif key == "response" and "question" in columns:
            name = "answer"
        if name not in FIELDS and key not in MESSAGE_KEYS:
            raise FileProblem("unknown_column_key", f"data.columns has no field `{key}`", _nearest(key), key)
        other = by_field.setdefault(name, key)
        if columns[other] != column:
            found = f"data.columns names `{name}` twice: `{other}` is `{columns[other]}`, `{key}` is `{column}`"
            raise FileProblem("contradicting_columns", found, "keep one of them", key)
    for theirs, ours in roles.items():
        if ours not in ROLES:
            allowed = f"allowed: {', '.join(ROLES)}"
            raise FileProblem("unknown_role", f"data.roles maps `{theirs}` to `{ours}`", allowed, theirs)
        _add_role(role_names, theirs, ours)
    keys = {name: columns[key] for name, key in by_field.items() if name in MESSAGE_KEYS.values()}
    fields = {name: columns[key] for name, key in by_field.items() if name not in keys}
    _refuse_shared(keys)
    _refuse_shared(fields)
    if prompt_alone:
        fields["prompt"] = fields["text"]
    taken = set(fields.values())
    candidates = {
        name: (fields[name],) if name in fields else tuple(column for column in own if column not in taken)
        for name, own in FIELDS.items()
    }
    return Columns(
        candidates,
        frozenset(fields) - ({"prompt", "text"} if prompt_alone else set()),
        keys.get("role"),
        keys.get("content"),
        keys.get("train", "train"),
        role_names,
        {key: column for key, column in columns.items() if key not in MESSAGE_KEYS and key not in ROLE_TAGS},
        "kto_tag" in columns,
        prompt_alone,
    )


def _add_role(role_names: dict[str, str], theirs: str, ours: str) -> None:
    if role_names.setdefault(theirs, ours) != ours:
        found = f"the role name `{theirs}` is given two meanings: {role_names[theirs]} and {ours}"
        raise FileProblem("contradicting_columns", found, "keep one in data.roles and data.columns", theirs)


def _refuse_shared(fields: Mapping[str, str]) -> None:
    """Refuse one column as two fields: a question trained on as its own answer."""
    for column in fields.values():
        names = [name for name, other in fields.items() if other == column]
        if len(names) > 1:
            found = f"data.columns gives the column `{column}` to {listed(names)}"
            raise FileProblem("contradicting_columns", found, "a column holds one field", names[1])


def _nearest(key: str) -> str:
    known = [*FIELDS, *LLAMA_FACTORY, *AXOLOTL, *MESSAGE_KEYS, *ROLE_TAGS]
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean `{match[0]}`?" if match else f"allowed: {', '.join(FIELDS)}"
