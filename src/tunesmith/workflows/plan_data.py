"""The examples that `tunesmith plan --data` plans for: those that training would train on, by their lengths.

They are read, mixed, and held out as by training. A model folder's own tokenizer counts their tokens, as in training; those
of a hub id are estimated, and then rows that a cut leaves without a supervised token, which only tokens would tell, count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.config import RunConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.fingerprints import supervised_turns
from tunesmith.data.lengths import estimate_row, recommended_max_seq_length
from tunesmith.errors import ConfigError, DataError
from tunesmith.models.load import find_model, load_tokenizer
from tunesmith.types import Example, Progress, no_progress
from tunesmith.workflows.advise_data import supervised_tokens
from tunesmith.workflows.plan import find_shape, full_name
from tunesmith.workflows.plan_options import Data
from tunesmith.workflows.rows import RunRows, read_rows, sequences_of, tokenize_rows


def read_data(config: RunConfig, sequence: int | None, progress: Progress = no_progress) -> tuple[Data, bool]:
    """The lengths of the rows of `data.path` or `data.mix` that `train` would train on, and whether they are estimates.

    `sequence` comes before `data.max_seq_length`. What `auto` comes to is written into `config`, as by training. Raises
    DataError for rows that training would refuse, and ConfigError for rows beyond the model's context.
    """
    context = find_shape(config.model.name)[1].context_length
    if sequence is not None and context is not None and sequence > context:
        raise ConfigError(f"--max-seq-length is {sequence:,}, but the model takes at most {context:,} tokens")
    config.model.name = full_name(config.model.name)
    config.data.max_seq_length = sequence or config.data.max_seq_length
    estimated = not Path(config.model.name).expanduser().is_dir()
    asked = config.model_copy(deep=True)
    asked.data.cache = False  # a plan leaves nothing on disk
    progress("reading the data", 0, 1)
    rows = read_rows(asked)
    progress("reading the data", 1, 1)
    data = _estimated(asked, rows, context) if estimated else _tokenized(asked, rows, context, progress)
    config.data.max_seq_length = asked.data.max_seq_length
    if context is not None and (longest := max(data.lengths)) > context:
        raise ConfigError(
            f"{_place(config)}: rows of up to {longest:,} tokens, but the model takes at most {context:,}; pass "
            f"--max-seq-length {context}"
        )
    return data, estimated


def _tokenized(config: RunConfig, rows: RunRows, context: int | None, progress: Progress) -> Data:
    """The examples in a model folder's own tokens."""
    tokenizer = load_tokenizer(find_model(config.model), config.model)
    chat = ChatFormat(tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
    examples = tokenize_rows(config, chat, rows, progress, context).train
    return Data([len(each) for each in examples], [each.supervised for each in examples], True)


def _estimated(config: RunConfig, rows: RunRows, context: int | None) -> Data:
    """The examples in about as many tokens as they have; each has its share of what is supervised of all."""
    given, held = sequences_of(config, rows.train), sequences_of(config, rows.eval)
    _refuse_unanswered(config, [*given, *held])
    train = [row for row in given if _teaches(config, row)]
    if not train:
        raise DataError(f"{_place(config)}: no row is left to train on")
    lengths = [estimate_row(row) for row in train]
    limit = config.data.max_seq_length
    if limit == "auto":
        budget = config.training.micro_batch_tokens
        limits = [most for most in (context, budget // 2 if budget and config.pairs else budget) if most]
        limit = recommended_max_seq_length(lengths, min(limits, default=None))
    config.data.max_seq_length = limit
    _refuse_overlong(config, [*train, *held], [*lengths, *map(estimate_row, held)], limit)
    fitted = [fitted_pieces(length, limit, _overlong(config, row)) for row, length in zip(train, lengths, strict=True)]
    if config.pairs:  # one example of two sequences, if neither is left out
        fitted = [[*map(sum, zip(*pair, strict=False))] for pair in zip(fitted[0::2], fitted[1::2], strict=True)]
    pieces = [piece for pieces in fitted for piece in pieces]
    if not pieces:
        raise DataError(f"{_place(config)}: no row is left; all are longer than {limit:,} tokens")
    supervised = sum(
        supervised_tokens(row, length, config.data.train_on) for row, length in zip(train, lengths, strict=True)
    )
    share = supervised / sum(lengths)
    return Data(pieces, [max(1, round(share * piece)) for piece in pieces], True)


def _teaches(config: RunConfig, row: Example) -> bool:
    """Whether anything of the row is trained on: a text, or one of its turns."""
    return row.messages is None or any(supervised_turns(row.messages, config.data.train_on))


def _refuse_unanswered(config: RunConfig, rows: Sequence[Example]) -> None:
    """Raise DataError for rows with nothing to learn from, unless `data.skip_bad_rows`."""
    found = [row.where for row in rows if not _teaches(config, row)]
    if found and not config.data.skip_bad_rows:
        raise DataError(
            [
                f"{where}: no turn of this row is trained on, and training would refuse it; set `train` or `weight` of an "
                "assistant's turn, or remove the row"
                for where in found
            ]
        )


def _refuse_overlong(config: RunConfig, rows: Sequence[Example], lengths: Sequence[int], limit: int) -> None:
    """Raise DataError for rows of more than `limit` tokens that nothing shortens, unless `data.skip_bad_rows`."""
    longer = [
        length
        for row, length in zip(rows, lengths, strict=True)
        if length > limit and _overlong(config, row) == "error"
    ]
    if longer and not config.data.skip_bad_rows:
        raise DataError(
            f"{_place(config)}: about {len(longer):,} of {len(rows):,} rows are longer than data.max_seq_length {limit:,} "
            f"(the longest has about {max(longer):,} tokens), and training would refuse them; raise it (--max-seq-length), "
            "or set data.overlong to truncate, split or drop"
        )


def _overlong(config: RunConfig, row: Example) -> str:
    """What is done with a row that is too long, as in data/tokens.py."""
    if config.data.overlong != "auto":
        return config.data.overlong
    return "split" if row.text is not None else "error"


def _place(config: RunConfig) -> str:
    return config.data.path or ", ".join(source.path for source in config.data.mix)


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
