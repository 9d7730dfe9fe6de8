"""How long `tunesmith data check` takes on 100,000 rows of about 55 tokens, without a model: reading, then all checks.

    python benchmarks/data_check.py [--rows 100000]

Prints seconds and peak memory of this process. The rows are conversations of words drawn at random, about 250 bytes of
JSON each; one in a hundred repeats an earlier one, so that the checks have something to say.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path

from tunesmith.config import DataConfig
from tunesmith.data.checks import check_rows
from tunesmith.data.formats import inspect_file
from tunesmith.data.lengths import estimate_row

LIMIT_SECONDS, LIMIT_GB = 20.0, 1.0


def write_rows(path: Path, num_rows: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    lines: list[str] = []
    for number in range(num_rows):
        if number % 100 == 99:
            lines.append(lines[rng.randrange(len(lines))])
            continue
        question, answer = " ".join(rng.choices(words, k=12)), " ".join(rng.choices(words, k=16))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    num_rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, num_rows)
        start = time.perf_counter()
        data = inspect_file(path)
        read = time.perf_counter()
        findings = check_rows(data, DataConfig(path=str(path)))
        checked = time.perf_counter()
        size = path.stat().st_size
    tokens = sum(map(estimate_row, data.examples)) / len(data.examples)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    print(
        f"{data.rows:,} rows, {size / data.rows:.0f} bytes and about {tokens:.0f} tokens each; {os.cpu_count()} cores\n"
        f"read    {read - start:6.1f} s\n"
        f"check   {checked - read:6.1f} s, {len(findings):,} findings\n"
        f"total   {checked - start:6.1f} s (at most {LIMIT_SECONDS:g} s)\n"
        f"memory  {peak_gb:6.2f} GB (at most {LIMIT_GB:g} GB)"
    )


if __name__ == "__main__":
    main()
