"""The frozen types that several parts share. Imports no torch: tensors appear in annotations only.

Shapes in comments: B rows, T tokens a row, N supervised tokens, D documents in a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tunesmith.kernels.attention import SequenceLayout

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

IGNORE_INDEX = -100
"""The label of a position that is not supervised (PyTorch's cross-entropy convention)."""

GB = 2**30
"""A GB is 2^30 bytes everywhere in tunesmith."""

Event = dict[str, Any]
"""One line of `events.jsonl`. Every event has an `event` key: `step`, `eval`, `checkpoint`, `warning`, `start`, `end`, ..."""

EventSink = Callable[[Event], None]
"""Anything that takes events: the run folder, a progress bar, a tracker."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a function that an assistant's turn asks for. `arguments` is an object (OpenAI's JSON string, parsed)."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `reasoning` is an assistant's thought apart from its answer. `name` and `call_id` say whose result a tool's turn is.
    `train` decides for this turn whether it is supervised; None leaves that to `data.train_on`.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None
    train: bool | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data file: a conversation, or plain text. Exactly one of `messages` and `text` is set.

    `file` and `line` (physical, from 1; the row's number in files without lines) say where it came from. `tools` are
    function descriptions in OpenAI's form. `label` is the class of a classification row. `desirable` is KTO's label. `choices` are the
    answers that a multiple-choice question allows, as the assistant would give them.
    """

    messages: tuple[Message, ...] | None
    text: str | None
    file: str
    line: int
    tools: tuple[Mapping[str, Any], ...] = ()
    label: str | None = None
    desirable: bool | None = None
    choices: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The example's place as `file:line`."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt with a better and a worse continuation, each one or more turns that begin with the assistant's."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    file: str
    line: int
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def where(self) -> str:
        """The example's place as `file:line`."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. An `error` stops a run; a `warning` is said and the run goes on.

    `check` is the check's stable name (`invalid_json`, `duplicate_row`, ...), `line` is physical, from 1 (None: the whole
    file), `field` the key it is about, `found` what is there, `fix` what is allowed or what to change.
    """

    check: str
    severity: Literal["error", "warning"]
    file: str
    line: int | None
    found: str
    fix: str = ""
    field: str | None = None

    @property
    def message(self) -> str:
        """What was found and what to change, without the place."""
        return f"{self.found}; {self.fix}" if self.fix else self.found

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.message}"


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedExample:
    """Token ids of one example (T,) int32 and, for each, whether it is a target of the loss (T,) bool.

    `file` and `line` are those of its row. A long row may give several (`data.overlong: split`). `desirable` is KTO's
    label. `reference` has the log-probability, in nats, of each of its sequences' targets under the model as it was before
    training; None until that is known, or if no objective asks for it.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    line: int = 0
    file: str = ""
    desirable: bool | None = None
    reference: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """How many tokens are targets. The first token never is: nothing predicts it."""
        return int(self.loss_mask[1:].sum())

    @property
    def where(self) -> str:
        """The row's place as `file:line`."""
        return f"{self.file}:{self.line}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each of its sequences."""
        return (len(self.input_ids),)

    def tail(self, tokens: int) -> TokenizedExample:
        """Its last `tokens` tokens, as an example of that size to measure with."""
        return replace(self, input_ids=self.input_ids[-tokens:], loss_mask=self.loss_mask[-tokens:])


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPair(TokenizedExample):
    """Two sequences that an objective compares, end to end: the first has `first` tokens.

    Preferences: prompt and chosen answer, prompt and rejected one. KTO: prompt and answer, prompt and another's answer.
    """

    first: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each of the two sequences."""
        return self.first, len(self.input_ids) - self.first

    def sequence(self, number: int) -> TokenizedExample:
        """The first (0) or the second sequence (1) by itself, with its own reference."""
        piece = slice(0, self.first) if number == 0 else slice(self.first, None)
        reference = None if self.reference is None else (self.reference[number],)
        return TokenizedExample(
            self.input_ids[piece], self.loss_mask[piece], self.line, self.file, self.desirable, reference
        )

    def tail(self, tokens: int) -> TokenizedPair:
        """Its last `tokens` tokens, at least two, as a pair of that size to measure with, which needs no reference."""
        cut = replace(
            self, input_ids=self.input_ids[-tokens:], loss_mask=self.loss_mask[-tokens:], reference=(0.0, 0.0)
        )
        return replace(cut, first=max(1, self.first - (len(self) - len(cut))))


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch on its device.

    Packed (`data.packing: true`): one row that holds D documents end to end, no padding, `attention_mask` None;
    positions restart at each document and `cu_seqlens` gives their bounds. Padded: B rows,
    right-padded, with an `attention_mask`.
    """

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, already shifted: labels[b, t] is the token that follows t, or IGNORE_INDEX
    position_ids: torch.Tensor  # (B, T) int64
    cu_seqlens: (
        torch.Tensor
    )  # (D + 1,) int32, cumulative document lengths, on the CPU; for padded rows without the padding
    supervised: (
        torch.Tensor
    )  # (N,) int64, positions in labels.view(-1) that are not IGNORE_INDEX, in order (widened: then 0)
    attention_mask: torch.Tensor | None  # (B, T) int64, 1 for a token and 0 for padding; None when packed
    num_examples: int
    num_tokens: int  # without padding
    num_supervised: int
    supervised_labels: torch.Tensor  # (N,) int64, the labels of those positions
    layout: SequenceLayout  # how the tokens are divided into sequences, for kernels that look at no mask
    rows: tuple[str, ...] = ()  # `file:line` of the examples, in order
    dropout_rows: torch.Tensor | None = None  # (B * T,) int64, each slot's row in dropout masks; None: nothing asked
    document_lengths: torch.Tensor | None = (
        None  # (B * T,) int64, tokens of each slot's document, 0 for padding; as those
    )
    compared: BatchSequences | None = None  # for objectives that look at whole sequences


@dataclass(frozen=True, slots=True)
class BatchSequences:
    """The S sequences of a batch: its examples one after the other, of a pair the first and then the second."""

    of_supervised: torch.Tensor  # (N,) int64, the sequence that each supervised position is in, from 0
    num_supervised: torch.Tensor  # (S,) fp32, supervised positions of each sequence
    first_supervised: int  # supervised positions of all the pairs' first sequences
    reference: torch.Tensor | None  # (S,) fp32, log-probabilities before training; None if they are not known
    desirable: torch.Tensor  # (examples,) fp32: 1 for a row that is desirable, or was not labelled
    num_desirable: int  # of those
    first_rest: torch.Tensor  # (M,) int64, positions of first sequences that predict a token which is not supervised


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of an objective: a sum over `count` units (supervised tokens, pairs, ...) with its weight.

    The loss of a step is Σ_terms weight · (Σ_micro-batches sum) / (Σ_micro-batches, ranks count). A term of weight 0 is a
    metric: it is averaged in the same way and reported. `unit` is what is counted, where that is not the name's own.
    """

    name: str
    sum: torch.Tensor  # scalar, with its graph
    count: int
    weight: float = 1.0
    unit: str | None = None

    @property
    def counted(self) -> str:
        """The name of its count."""
        return self.unit or self.name


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one optimizer step reports. Times in seconds, memory in GB (2^30 bytes). `metrics` are the objective's own."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    examples: int
    tokens: int
    supervised_tokens: int
    seconds: float
    memory_gb: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def event(self) -> Event:
        """The step as a line of `events.jsonl`."""
        rate = 1.0 / self.seconds if self.seconds > 0 else 0.0
        return {
            "event": "step",
            **{name: value for name, value in asdict(self).items() if name != "metrics"},
            **self.metrics,
            "examples_per_second": self.examples * rate,
            "tokens_per_second": self.tokens * rate,
            "supervised_tokens_per_second": self.supervised_tokens * rate,
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """One evaluated row: what was asked, what was expected, what came out."""

    prompt: str
    expected: str
    answer: str
    correct: bool
    line: int


LayerTensor = Literal["qkv", "attention", "attention_output", "middle", "gate_up", "mlp_output"]
"""What a fused layer can keep of its forward: the projections that attention reads, attention's result, the hidden state
between attention and MLP, gate and up. `*_output` exist where a family norms a branch's output (Gemma)."""

LAYER_TENSORS: tuple[LayerTensor, ...] = ("qkv", "attention", "attention_output", "middle", "gate_up", "mlp_output")


@dataclass(frozen=True, slots=True)
class LayerPolicy:
    """What one fused layer keeps for its backward; what is not kept is computed again there, from the layer's input.

    With `offload_input` the input waits in host memory. `mlp_rows` is how many tokens pass through the MLP at a time where
    `gate_up` is not kept (None: all of them). A policy changes memory and time, never the gradient.
    """

    keep: frozenset[LayerTensor] = frozenset(LAYER_TENSORS)
    offload_input: bool = False
    mlp_rows: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What `prepare` does to the model before the optimizer is made.

    `recompute_layers` decoder layers (the first ones) compute activations again: all of them under the reference engine's
    checkpointing, those that `policies` say, one for each layer, in the fused engine. `reason` says why, for the log.
    `predicted_peak_gb` is arithmetic, not a measurement; None where nothing was predicted. `loss_rows` are the supervised
    rows whose logits exist at once (None: as many as are fast). `breakdown` is the predicted peak by kind, as
    memory/estimate.py's Breakdown has it. `pool_gb` is what CUDA graphs take of the driver's memory beside the peak.
    """

    mode: Literal["auto", "min", "fast"]
    recompute_layers: int
    num_layers: int
    budget_gb: float | None
    predicted_peak_gb: float | None
    reason: str
    engine: Literal["reference", "fused"] = "reference"
    policies: tuple[LayerPolicy, ...] = ()
    loss_rows: int | None = None
    breakdown: Mapping[str, float] = field(default_factory=dict)
    pool_gb: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended. `metrics` is what `metrics.json` holds."""

    run: str
    status: Literal["finished", "stopped_early"]
    metrics: Mapping[str, Any] = field(default_factory=dict)


Evaluate = Callable[[int, Callable[[], bool]], Mapping[str, float]]
"""Evaluation during training: given the step, returns metric values by name. The API passes it into the loop. Where memory does
not suffice it may call its second argument, which lets go of what training holds and says whether there was anything."""

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) as work goes on, e.g. ("generating answers", 32, 400)."""


def no_progress(stage: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""
