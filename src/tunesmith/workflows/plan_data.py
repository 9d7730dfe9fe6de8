"""The examples that `tunesmith plan --data` plans for: their lengths, fitted to `data.max_seq_length` as training fits them.

Left out: rows that a cut leaves without a supervised token, which only their tokens would tell.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.config import RunConfig
from tunesmith.data.lengths import recommended_max_seq_length
from tunesmith.errors import ConfigError, DataError
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.advise_data import DataFacts, read_facts
from tunesmith.workflows.plan import find_shape, full_name
from tunesmith.workflows.plan_options import Data


def read_data(config: RunConfig, sequence: int | None, progress: Progress = no_progress) -> tuple[Data, bool]:
    """The lengths of `data.path`'s rows as `train` would have them, and whether they are estimates.

    `sequence` comes before `data.max_seq_length`. What `auto` comes to is written into `config`, as by training. Raises
    DataError for rows that training would refuse, and ConfigError for rows beyond the model's context.
    """
    context = find_shape(config.model.name)[1].context_length
    if sequence is not None and context is not None and sequence > context:
        raise ConfigError(f"--max-seq-length is {sequence:,}, but the model takes at most {context:,} tokens")
    config.model.name = full_name(config.model.name)
    facts = read_facts(config, progress)
    limit = sequence or config.data.max_seq_length
    if limit == "auto":
        limits = [most for most in (context, config.training.micro_batch_tokens) if most]
        limit = recommended_max_seq_length(facts.lengths, min(limits, default=None))
    config.data.max_seq_length = limit
    lengths = _fitted(config, facts, limit)
    if context is not None and (longest := max(lengths)) > context:
        raise ConfigError(
            f"{facts.path}: rows of up to {longest:,} tokens, but the model takes at most {context:,}; pass "
            f"--max-seq-length {context}"
        )
    share = facts.supervised_tokens / max(1, facts.total_tokens)
    return Data(lengths, [max(1, round(share * length)) for length in lengths], True), facts.estimated


def _fitted(config: RunConfig, facts: DataFacts, limit: int) -> list[int]:
    what = config.data.overlong
    if what == "auto":
        what = "split" if facts.plain_text else "error"
    longer = sum(length > limit for length in facts.lengths)
    if longer and what == "error" and not config.data.skip_bad_rows:
        about = "about " if facts.estimated else ""
        raise DataError(
            f"{facts.path}: {about}{longer:,} of {facts.rows:,} rows are longer than data.max_seq_length {limit:,} (the "
            f"longest has {about}{max(facts.lengths):,} tokens), and training would refuse them; raise it "
            "(--max-seq-length), or set data.overlong to truncate, split or drop"
        )
    lengths = [piece for length in facts.lengths for piece in fitted_pieces(length, limit, what)]
    if not lengths:
        raise DataError(f"{facts.path}: no row is left; all are longer than {limit:,} tokens")
    return lengths


def fitted_pieces(length: int, limit: int, what: str) -> Sequence[int]:
    """The lengths that `data.overlong` makes of one row: `truncate`, `split`, or nothing is left (`drop`, `error`).

    As in data/tokens.py, each piece of a split begins with the last token of the one before.
    """
    if length <= limit:
        return [length]
    if what == "truncate":
        return [limit]
    if what == "split":
        return [min(limit, length - start) for start in range(0, length - 1, limit - 1)]
    return []
