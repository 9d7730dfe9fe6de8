"""Rules of thumb that warn before every `train`: settings that are legal, and for this much data probably a mistake.

Most follow "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025): the best rate of an adapter is about ten times
that of full fine-tuning and hardly depends on the rank; adapters belong on all linear layers; large batches cost LoRA more
than full fine-tuning; the rank has to hold what the data says, and no more than that is of use.
"""

from __future__ import annotations

from tunesmith.config import RunConfig

FEW_ROWS = 1000
"""Up to here a high rank and a high rate fit the rows' noise before they learn more."""
HIGH_RANK = 64
CAPACITY_TOKENS = 10_000_000
"""Rank 16 on all layers of a 1B model (11M parameters) holds about 15M supervised tokens (advise_settings.rank_for): with
fewer than this, a rank of 64 is never needed to hold them."""

FULL_LR = 2e-5
"""Full fine-tuning's rate. An adapter at it hardly moves: it wants ten times that."""
LORA_LR = 1e-4
"""The low end of an adapter's rates. At it, full fine-tuning tends to forget what the base knew."""
HIGHEST_LR = 1e-3
"""Twice the best rate that LoRA Without Regret found for a 1B Llama (about 5e-4; larger models want less)."""

MAX_LORA_BATCH = 64
"""Examples in a step. LoRA Without Regret sees LoRA fall behind full fine-tuning as the batch grows, at every rank."""

EPOCH_LIMITS = ((10_000, 3.0), (2_000, 5.0))
"""(rows, epochs): with more rows than this, more epochs than that mostly memorise, and cost the most. What is usual: 3 epochs
on Stanford Alpaca's 52,000 rows, 15 on the 1,000 of LIMA (arXiv 2305.11206); hence no limit for a small set."""

ATTENTION_MODULES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"})
"""What attention's projections are called in the families."""


def settings_warnings(config: RunConfig, num_rows: int, total_tokens: int, supervised_tokens: int) -> list[str]:
    """What looks wrong about `config` for its data: one line each, with the keys, the reason and what to set instead.

    `num_rows` training rows (as tokenized: the pieces of a split text count) of `total_tokens` tokens in all, of which
    `supervised_tokens` are trained on. Empty where nothing is to be said; the defaults on ordinary data are such a case.
    """
    rules = (
        _rank(config, num_rows, supervised_tokens),
        _rate(config),
        _epochs(config, num_rows, total_tokens),
        _batch(config, num_rows, total_tokens),
        _targets(config),
    )
    return [warning for warning in rules if warning]


def _rank(config: RunConfig, num_rows: int, supervised_tokens: int) -> str | None:
    r = config.adapter.r
    if not _fresh_adapter(config) or r < HIGH_RANK or num_rows > FEW_ROWS or supervised_tokens >= CAPACITY_TOKENS:
        return None
    return (
        f"adapter.r {r} on {num_rows:,} rows: far more than {supervised_tokens:,} supervised tokens can fill, and it "
        "overfits sooner; set adapter.r to 8 or 16"
    )


def _rate(config: RunConfig) -> str | None:
    lr = config.lr
    if config.pairs:
        return None  # far lower rates, a hundred times apart between papers
    if config.method == "full":
        if lr < LORA_LR:
            return None
        return (
            f"optimizer.lr {lr:g} with method: full is a rate for adapters, and makes a model forget; set optimizer.lr to "
            f"{FULL_LR:g}, or method: lora"
        )
    if lr > HIGHEST_LR:
        return (
            f"optimizer.lr {lr:g} with method: {config.method} is more than twice the best rates that LoRA Without "
            "Regret found, and the loss may blow up; set optimizer.lr to 2e-4"
        )
    if lr <= FULL_LR and lr < config.usual_lr and _fresh_adapter(config):
        return (
            f"optimizer.lr {lr:g} with method: {config.method} is a rate for full fine-tuning; an adapter wants about ten "
            "times that (LoRA Without Regret); set optimizer.lr to 2e-4"
        )
    return None


def _epochs(config: RunConfig, num_rows: int, total_tokens: int) -> str | None:
    training = config.training
    if training.early_stopping.metric is not None:
        return None  # it stops by itself
    epochs = training.epochs
    if training.max_steps is not None:
        epochs = min(epochs, training.max_steps * _rows_in_step(config, num_rows, total_tokens) / num_rows)
    for rows, limit in EPOCH_LIMITS:
        if num_rows > rows and epochs > limit:
            return (
                f"training.epochs {epochs:.3g} on {num_rows:,} rows: more than {limit:g} passes over so many mostly "
                f"memorise them; set training.epochs to {limit:g} or less, or training.early_stopping.metric: eval_loss"
            )
    return None


def _batch(config: RunConfig, num_rows: int, total_tokens: int) -> str | None:
    rows = _rows_in_step(config, num_rows, total_tokens)
    if config.method == "full" or rows <= MAX_LORA_BATCH:
        return None
    training = config.training
    key = f"training.batch_size {training.batch_size}"
    fix = "set training.batch_size to 16 or 32"
    if training.batch_tokens is not None:
        key = f"training.batch_tokens {training.batch_tokens:,} (about {rows:.0f} rows)"
        fix = f"set training.batch_tokens to about {32 * total_tokens / num_rows:,.0f}"
    return (
        f"{key} with method: {config.method}: large batches cost LoRA more than full fine-tuning, whatever the rank "
        f"(LoRA Without Regret); {fix}"
    )


def _targets(config: RunConfig) -> str | None:
    targets = config.adapter.target_modules
    names = [targets] if isinstance(targets, str) else targets
    only_attention = targets in ("attention", "qv") or (bool(names) and ATTENTION_MODULES.issuperset(names))
    if not _fresh_adapter(config) or not only_attention:
        return None
    return (
        f"adapter.target_modules {', '.join(names)}: adapters on attention alone learn less than on all layers, even with "
        "as many parameters (LoRA Without Regret); set adapter.target_modules: all-linear"
    )


def _fresh_adapter(config: RunConfig) -> bool:
    """Whether this run makes its adapter: one that is trained further has its own rank and targets, and may want a low rate."""
    return config.method != "full" and config.adapter.init_from is None


def _rows_in_step(config: RunConfig, num_rows: int, total_tokens: int) -> float:
    """Rows in one optimizer step; with `training.batch_tokens` about as many as fill it."""
    training = config.training
    if training.batch_tokens is None:
        return training.batch_size
    return training.batch_tokens * num_rows / total_tokens
