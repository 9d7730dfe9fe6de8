"""Rows of columnar data: Parquet, Arrow (IPC file and stream), and data sets of the hub through `datasets`.

A null in a column is a missing key: a table has every column in every row. Rows are numbered from 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import SourceConfig
from tunesmith.data.problems import FileProblem, listed

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1000

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def table_rows(content: Path | bytes, container: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet or Arrow file, or of its bytes. Raises FileProblem if it is damaged."""
    import pyarrow as pa

    try:
        source = pa.BufferReader(content) if isinstance(content, bytes) else pa.memory_map(str(content))
        yield from _numbered(_parquet(source) if container == "Parquet" else _arrow(source))
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise FileProblem("damaged_file", f"a damaged {container} file: {_one_line(error)}", "write it again") from None


def _parquet(source: Any) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    yield from pq.ParquetFile(source).iter_batches(BATCH_ROWS)


def _arrow(source: Any) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if not is_file:
        yield from pa.ipc.open_stream(source)
        return
    reader = pa.ipc.open_file(source)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _numbered(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged file must not reach memory that is not its own
        names = batch.schema.names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise FileProblem("duplicate_column", f"the column {listed(repeated)} stands there twice", "rename one")
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield number, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Objects without their null members: in a table a null and a missing key are the same."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist could be `org/dataset`."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).parent.is_dir()


def hub_rows(source: SourceConfig, max_rows: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a hub data set (or of a folder that `datasets` can load): its `train` split, or the one asked for.

    With `streaming` nothing is downloaded beyond `max_rows`. Raises FileProblem with one line for whatever `datasets`
    says: no such data set, a gated one, no network, no such split.
    """
    if source.streaming and max_rows is None:
        found = "data.streaming reads a data set as far as data.max_rows, which is not set"
        raise FileProblem("streaming_without_end", found, "set data.max_rows, or data.streaming: false", "streaming")
    import datasets
    import httpx
    import huggingface_hub
    import pyarrow as pa

    unreachable = FileProblem(
        "hub_unreachable", "no such file here, and the hub cannot be reached", "check the path or the network"
    )
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:  # `datasets` would try for 15 s and print each failure
            huggingface_hub.HfApi().dataset_info(source.path, timeout=10)
        except httpx.TransportError:
            raise unreachable from None
        except huggingface_hub.errors.HfHubHTTPError:
            pass  # `datasets` says what it is
    try:
        split = source.split or _default_split(datasets.get_dataset_split_names(source.path, source.subset))
        data = datasets.load_dataset(source.path, source.subset, split=split, streaming=source.streaming)
        tables = data.with_format("arrow").iter(batch_size=min(max_rows or BATCH_ROWS, BATCH_ROWS))
        yield from _numbered(batch for table in tables for batch in table.to_batches())
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            fix = "accept its terms on its page at the hub, then log in with `hf auth login`"
            raise FileProblem("gated_data_set", "a gated data set of the hub", fix) from None
        fix = "check the name; private data sets need `hf auth login`"
        raise FileProblem("no_such_file", "no such file here, and no such data set at the hub", fix) from None
    except (ConnectionError, httpx.HTTPError):
        raise unreachable from None
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, RuntimeError) as error:
        raise FileProblem("hub_data_set", f"`datasets` cannot load it: {_one_line(error)}") from None


def _default_split(names: list[str]) -> str:
    if "train" in names or len(names) == 1:
        return "train" if "train" in names else names[0]
    raise FileProblem("no_train_split", f"no split `train`; splits found: {listed(names)}", "name one with data.split")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].removesuffix(".")
