"""Settings for one data set and card, each with its reason: method, rank, rate, epochs, length, batch, evaluation.

Evidence: "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025), here LWR. On data of fine-tuning's size LoRA
learns as well as full fine-tuning, if adapters are on all layers, the rate is about ten times full fine-tuning's (it hardly
depends on the rank, with alpha fixed at 32 and the factor alpha / r), batches are modest, and the rank holds the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import yaml

from tunesmith.config import Method, RunConfig, load_config
from tunesmith.data.lengths import recommended_max_seq_length, rows_longer_than
from tunesmith.memory.estimate import CONTEXT_GB
from tunesmith.memory.policy import HEADROOM
from tunesmith.workflows.advise_data import TEXT_PIECE, DataFacts, is_or_are
from tunesmith.workflows.plan_options import FASTER
from tunesmith.workflows.rules import CAPACITY_TOKENS, FEW_ROWS, HIGH_RANK

BITS_PER_TOKEN = 1 / math.log(2)
"""What a supervised token tells the model, at most: a loss of about 1 nat before training (chats have 0.7 to 1.5)."""
BITS_PER_PARAMETER = 2.0
"""What a parameter can hold: Allen-Zhu and Li, "Knowledge Capacity Scaling Laws" (arXiv 2404.05405), as LWR uses it."""
PARAMETERS_PER_RANK = 704_512
"""Adapter parameters of one rank on all linear layers of Llama 3.2 1B: what is assumed where the model's config.json is not
at hand. Larger models hold more, so that the rank is rather too high than too low."""
MAX_RANK = 256
"""Data that needs a higher rank than this is for full fine-tuning: LWR's ranks end at 512."""

ADAPTER = {"adapter.alpha": 32, "adapter.target_modules": "all-linear"}
"""What is recommended of an adapter beside its rank, whatever the data."""

MANY_ROWS = 100_000

EVAL_ROWS = 200
"""From here on a tenth of the rows is enough to measure a loss on, and the rest enough to train on."""
MAX_EVAL_ROWS = 1000
"""More held-out rows make evaluations slower, not the loss much surer."""
EVALUATIONS_AN_EPOCH = 4
"""Early stopping sees overfitting within an epoch only if it looks more than once."""
MIN_STEPS_BETWEEN = 10


@dataclass(frozen=True, slots=True)
class FitResult:
    """What one setting needs on one card: GB are 2^30 bytes; `micro_batch_size` is what the planner takes, 1 if nothing fits.

    It is not among the settings: `train` plans it on the card that is there. `graphs_gb` is what CUDA graphs hold beside the
    peak. Speed is of all `num_gpus` cards together. `basis` says where memory and speed come from.
    """

    peak_gb: float
    memory_gb: float
    fits: bool
    tokens_per_second: float | None
    micro_batch_size: int
    micro_batch_unit: Literal["examples", "tokens"] = "examples"
    graphs_gb: float = 0.0
    num_gpus: int = 1
    basis: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable_gb(self) -> float:
        """What a plan may fill of the card: 90% of what the driver's context leaves."""
        return HEADROOM * (self.memory_gb - CONTEXT_GB)

    @property
    def needs(self) -> str:
        """What it needs of that, in words."""
        return f"{self.peak_gb + self.graphs_gb:.1f} of {self.usable_gb:.1f} usable GB"

    def summary(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"usable_gb": self.usable_gb}


class Fit(Protocol):
    """Predicts memory and speed on the card that was named; None where it cannot (an unknown architecture)."""

    def __call__(
        self, settings: Mapping[str, Any], lengths: Sequence[int], supervised: Sequence[int]
    ) -> FitResult | None:
        """`settings` by dotted key; the examples' tokens, and how many of them are supervised."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting by its dotted key, and why it has this value."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All settings. `fit` is the chosen method's, `tried` those of every method that was looked at.

    `max_seq_length` is what `data.max_seq_length` comes to, also where that is `auto`; `lengths` are the examples' tokens.
    """

    settings: Sequence[Setting]
    max_seq_length: int
    lengths: Sequence[int]
    epochs: float
    fit: FitResult | None
    tried: Mapping[str, FitResult]

    @property
    def values(self) -> dict[str, Any]:
        """The settings by dotted key, as `load_config` takes them."""
        return {setting.key: setting.value for setting in self.settings}

    @property
    def trains(self) -> bool:
        """False where it is predicted not to fit the card."""
        return self.fit is None or self.fit.fits

    def fits(self) -> dict[str, Any] | None:
        """For --json: the chosen method's prediction, with those of the others in `tried`; None without a card."""
        if self.fit is None:
            return None
        tried = {method: result.summary() for method, result in self.tried.items()}
        return {"method": self.values["method"], **self.fit.summary(), "tried": tried}


def choose_settings(facts: DataFacts, config: RunConfig, fit: Fit | None) -> Plan:
    """The settings for this data on the card that `fit` knows (None: no card is known).

    `config` is what the user set: with `data.eval_path` no rows are held out.
    """
    length, lengths, about_length = _length(facts)
    batch = 32 if facts.examples >= 10_000 else 16
    rank, about_rank = rank_for(facts)
    share = facts.supervised_tokens / facts.total_tokens
    supervised = [max(1, round(share * tokens)) for tokens in lengths]
    tried: dict[str, FitResult] = {}

    def ask(method: Method) -> FitResult | None:
        """Plan what would be recommended."""
        asked = {"method": method, **{setting.key: setting.value for setting in about_length}}
        asked |= {"training.batch_size": batch}
        if method != "full":
            asked |= {"adapter.r": rank, **ADAPTER}
        found = fit(asked, lengths, supervised) if fit else None
        if found is not None:
            tried[method] = found
        return found

    method, result, about_method = _method(fit is not None, ask, facts)
    lr, about_lr = _rate(method, facts)
    epochs, about_epochs = _epochs(facts)
    settings = [Setting("method", method, about_method), *about_length]
    held_out, evaluation = _evaluation(facts, config, batch)
    settings += held_out
    if method != "full":
        settings += [
            Setting("adapter.r", rank, about_rank),
            Setting(
                "adapter.alpha",
                ADAPTER["adapter.alpha"],
                "fixed: with alpha / r the best rate hardly depends on r (LWR)",
            ),
            Setting("adapter.target_modules", ADAPTER["adapter.target_modules"], "attention alone learns less (LWR)"),
        ]
    settings += [
        Setting("optimizer.lr", lr, about_lr),
        Setting("training.epochs", epochs, about_epochs),
        Setting("training.batch_size", batch, "modest: large batches cost LoRA more than full fine-tuning (LWR)"),
    ]
    return Plan([*settings, *evaluation], length, lengths, epochs, result, tried)


def rank_for(facts: DataFacts) -> tuple[int, str]:
    """The adapter's rank, a power of two, and why.

    16 (8 under 1,000 rows), or as much as holds the data: the smallest r with 2 bits · r · P >= b · N, for N supervised
    tokens of b = 1 nat = 1.44 bits, and P adapter parameters a rank, the sum of (in + out) over all linear layers (LWR;
    2 bits a parameter: arXiv 2404.05405). At most 256, and 32 for a few rows.
    """
    base = 8 if facts.examples < FEW_ROWS else 16
    needed = _needed_rank(facts)
    few = facts.examples <= FEW_ROWS and facts.supervised_tokens < CAPACITY_TOKENS
    rank = min(max(base, needed), HIGH_RANK // 2 if few else MAX_RANK)
    tokens = f"{_about(facts)}{facts.supervised_tokens:,} supervised tokens"
    if needed > rank:
        return rank, f"the highest that is sensible: to hold {tokens}, it would have to be {needed} (LWR)"
    if rank > base:
        return rank, f"what holds {tokens} (2 bits a parameter, 1.44 a token; LWR)"
    if base == 8:
        return rank, f"under 1,000 rows there is little to learn: {tokens}"
    return rank, f"holds {tokens}; more is of no use (LWR)"


def parameters_per_rank(model: Mapping[str, Any] | None) -> int | None:
    """Adapter parameters of one rank on all linear layers, from config.json: Σ_layers Σ_linear (in + out).

    Of a dense decoder with q, k, v, o, gate, up and down (fused projections share an input: up to a fifth less). None for
    an unknown or a mixture-of-experts model.
    """
    shape = (model or {}).get("text_config") or model or {}
    if any("expert" in key and value for key, value in shape.items()):
        return None
    try:
        hidden, heads, width = shape["hidden_size"], shape["num_attention_heads"], shape["intermediate_size"]
        head = shape.get("head_dim") or hidden // heads
        queries, keys = heads * head, (shape.get("num_key_value_heads") or heads) * head
        return int(shape["num_hidden_layers"] * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + width)))
    except (KeyError, TypeError):
        return None


def _needed_rank(facts: DataFacts) -> int:
    per_rank = parameters_per_rank(facts.model_config) or PARAMETERS_PER_RANK
    needed = facts.supervised_tokens * BITS_PER_TOKEN / (BITS_PER_PARAMETER * per_rank)
    return 1 << math.ceil(math.log2(max(1.0, needed)))


def _method(
    card: bool, ask: Callable[[Method], FitResult | None], facts: DataFacts
) -> tuple[Method, FitResult | None, str]:
    """The method, its fit, and why."""
    if not card:
        return "lora", None, "no card is known (--gpu, --memory): take qlora if 16-bit weights do not fit"
    if (needed := _needed_rank(facts)) > MAX_RANK and (full := ask("full")) is not None and full.fits:
        why = f"an adapter of rank {MAX_RANK} cannot hold the data (rank {needed} would), and full fits: {full.needs}"
        return "full", full, why
    lora = ask("lora")
    if lora is None:
        return "lora", None, "what this model needs on this card cannot be predicted: LoRA is the default"
    if lora.fits:
        qlora = ask("qlora") if lora.tokens_per_second else None
        if qlora is not None and qlora.fits:
            times = (qlora.tokens_per_second or 0.0) / (lora.tokens_per_second or 1.0)
            if times > FASTER:
                why = f"LoRA fits ({lora.needs}), but computes so much again that QLoRA is {times:.2f} times as fast: {qlora.needs}"
                return "qlora", qlora, why
        return "lora", lora, f"learns as well as full on data of this size (LWR), and fits: {lora.needs}"
    qlora = ask("qlora")
    if qlora is None:
        return "lora", lora, f"does not fit: {lora.needs}"
    if qlora.fits:
        return "qlora", qlora, f"LoRA does not fit ({lora.needs}); QLoRA takes {qlora.needs}, some time and quality"
    return "qlora", qlora, f"does not fit: {qlora.needs}"


def _rate(method: Method, facts: DataFacts) -> tuple[float, str]:
    few, many = facts.examples < FEW_ROWS, facts.examples >= MANY_ROWS
    why = "under 1,000 rows overfit sooner" if few else "100,000 rows and more have steps enough" if many else ""
    lower = few or many
    if method == "full":
        return (1e-5 if lower else 2e-5), f"a tenth of LoRA's{': lower, as ' + why if lower else ''}"
    if lower:
        return 1e-4, f"{why}: half the usual 2e-4"
    return 2e-4, "about ten times full fine-tuning's, whatever the rank (LWR)"


def _epochs(facts: DataFacts) -> tuple[int, str]:
    rows = facts.counted
    if facts.examples < 5_000:
        again = "it is" if facts.examples == 1 else "they are"
        return 3, f"{rows} {is_or_are(facts.examples)} few: {again} worth seeing again"
    if facts.examples < 50_000:
        return 2, f"{rows}: a third pass mostly memorises"
    return 1, f"{rows}: more of them tell more than seeing them again"


def _length(facts: DataFacts) -> tuple[int, list[int], list[Setting]]:
    """(tokens of the longest sequence, lengths of the examples that are left, settings)."""
    if facts.plain_text:
        limit = min(TEXT_PIECE, facts.context_length or TEXT_PIECE)
        pieces = [min(limit, length - start) for length in facts.lengths for start in range(0, length, limit)]
        return limit, pieces, [Setting("data.max_seq_length", limit, "plain text is split into pieces of this")]
    limit = recommended_max_seq_length(facts.lengths, facts.context_length)
    about = "the 95th percentile of the rows' tokens x 1.2"
    settings = [Setting("data.max_seq_length", limit, about)]
    if facts.estimated:
        why = f"{about}, counted when the tokenizer is there; about {limit} (an estimate)"
        settings = [Setting("data.max_seq_length", "auto", why)]
    longer = rows_longer_than(facts.lengths, [limit])[limit]
    if longer == len(facts.lengths):  # dropped, nothing would be left
        why = f"every row is longer than the model takes ({limit:,} tokens): take one with a longer context"
        return limit, [limit] * longer, [*settings, Setting("data.overlong", "truncate", why)]
    if longer:
        rows = f"{_about(facts)}{longer:,} of {len(facts.lengths):,} rows {is_or_are(longer)} longer"
        settings.append(Setting("data.overlong", "drop", f"{rows}, and a cut answer teaches to stop anywhere"))
    return limit, [length for length in facts.lengths if length <= limit], settings


def _evaluation(facts: DataFacts, config: RunConfig, batch: int) -> tuple[list[Setting], list[Setting]]:
    """What is held out, and how often it is looked at."""
    rows = facts.distinct_rows
    held_out: list[Setting] = []
    fraction = 0.0
    if config.data.eval_path is None:
        if rows < EVAL_ROWS:
            return [], []
        fraction = round(min(0.1, MAX_EVAL_ROWS / rows), 4)
        why = f"{fraction * rows:,.0f} rows held out: without them nobody sees overfitting"
        held_out = [Setting("data.eval_fraction", fraction, why)]
    steps = math.ceil(facts.examples * (1 - fraction) / batch)
    every = max(MIN_STEPS_BETWEEN, steps // EVALUATIONS_AN_EPOCH)
    return held_out, [
        Setting("training.eval_every", every, f"an epoch has about {steps:,} steps"),
        Setting(
            "training.early_stopping.metric", "eval_loss", "stops when it no longer falls; the best weights are kept"
        ),
    ]


def _about(facts: DataFacts) -> str:
    return "about " if facts.estimated else ""


# -- the file ---------------------------------------------------------------------------------------------------------


def run_config(config: RunConfig, plan: Plan) -> RunConfig:
    """What the user set, and the plan's settings, as one configuration."""
    return with_advice(config, plan.values)


def with_advice(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """What the user set, and settings by dotted key."""
    return load_config(None, (), {**_given(config), **values})


def run_yaml(config: RunConfig, plan: Plan, headline: str) -> str:
    """The same as YAML with each setting's reason as a comment: `load_config` reads an equal configuration back."""
    reasons = {setting.key: setting.reason for setting in plan.settings}
    values = {**_given(config), **plan.values}
    lines = [
        f"# tunesmith advise: {headline}",
        "# LWR is LoRA Without Regret (Schulman et al., Thinking Machines, 2025).",
    ]
    opened: tuple[str, ...] = ()
    for key in sorted(values, key=_place):
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if opened[: depth + 1] != tuple(sections[: depth + 1]):
                lines.append(f"{'  ' * depth}{section}:")
        opened = tuple(sections)
        text = f"{'  ' * len(sections)}{name}: {_scalar(values[key])}"
        lines.append(f"{text:<36}  # {reasons[key]}" if key in reasons else text)
    return "\n".join(lines) + "\n"


def _given(config: RunConfig) -> dict[str, Any]:
    """`model` and `data` settings that were set, by dotted key."""
    set_by_user = config.model_dump(mode="json", exclude_unset=True, include={"model", "data"})
    return {f"{section}.{name}": value for section, part in set_by_user.items() for name, value in part.items()}


def _place(key: str) -> tuple[int, int, str]:
    """Sections in the configuration's order, a section's own settings before its sections."""
    section = key.split(".", maxsplit=1)[0]
    return list(RunConfig.model_fields).index(section), key.count("."), key.rpartition(".")[0]


def _scalar(value: Any) -> str:
    """A value in one line of YAML."""
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True).strip()[1:-1]
