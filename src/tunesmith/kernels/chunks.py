"""How much of something large exists at once: rows of logits, weights in fp32. Imports no PyTorch: the planner asks too."""

from __future__ import annotations

import math

CHUNK_BYTES = 2**29
"""Most bytes of logits that exist at once. Wide enough for the matrix products: 2,048 rows of 128k values in 16 bits."""

CHUNK_MULTIPLE = 128
"""Chunks are multiples of this many rows, the height of a matrix product's tile."""

ROW_MULTIPLE = 64
"""Rows of the logits' buffer are padded to this many values: an odd vocabulary keeps 16-byte loads and stores."""

STEPPED_VALUES = 2**24
"""Values of bf16 weights that the optimizer steps at once (training/rounding.py). One pass over so many in
fp32 is 64 MB, 25 us on an H100: longer than its launch."""

STEPPED_BYTES = 9
"""Of the workspace for each of them: weight and gradient in fp32, and whether it is NaN."""


def chunk_rows(num_rows: int, vocabulary: int, bytes_per_value: int = 2) -> int:
    """Rows of a chunk: as even as multiples of 128 allow, with at most CHUNK_BYTES of logits (or 128 rows) at once.

    `bytes_per_value` is that of the compute dtype. 8,192 rows of 128,256 values in 16 bits are 4 chunks of 2,048 rows.
    """
    fitting = CHUNK_BYTES // (padded(vocabulary) * bytes_per_value) // CHUNK_MULTIPLE * CHUNK_MULTIPLE
    num_chunks = max(1, math.ceil(num_rows / max(CHUNK_MULTIPLE, fitting)))
    even = math.ceil(num_rows / num_chunks)
    return max(1, min(num_rows, math.ceil(even / CHUNK_MULTIPLE) * CHUNK_MULTIPLE))


def padded(vocabulary: int) -> int:
    """Values of a row of the logits' buffer."""
    return math.ceil(vocabulary / ROW_MULTIPLE) * ROW_MULTIPLE
