"""The engine's results table: the `h100` suite of `tunesmith bench` against what it has to reach.

    python benchmarks/engine.py OUT [--row NAME ...] [--no-check] [--models DIR]
    python benchmarks/engine.py --table FILE ...

The first form measures (every row, or those that --row names: a group, a name or a pattern; a group in one call, so that
its ratios hold) and writes OUT/engine.json after each row. The second prints the Markdown table of such files; of a row
that is in several, the last counts. Gradients of our rows are compared with the reference engine's unless --no-check.
Exits with 1 if a row of ours misses its target or has a loss or a gradient that is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.workflows.bench import bench, plan_rows

TARGETS: dict[str, tuple[float, float | None]] = {
    "8b-qlora-4x2048/tunesmith-auto": (16_800, None),
    "8b-lora-4x2048/tunesmith-auto": (17_500, 45.0),
    "8b-qlora-2x2048/tunesmith-min": (11_500, 6.8),
    "8b-qlora-8x2048/tunesmith-min": (12_500, 9.9),
    "8b-qlora-16gb/tunesmith-auto-16gb": (14_000, 16.0),
    "3b-qlora-4x1024/tunesmith-auto": (35_000, None),
    "3b-qlora-4x1024/tunesmith-min": (22_000, 2.96),
    "3b-qlora-8x2048/tunesmith-auto": (36_000, None),
}
"""(tokens/s at least, peak GB at most) of our rows on one H100."""

DOCUMENTS, FIXED_LENGTH, DOCUMENTS_SHARE = "8b-qlora-documents/tunesmith-auto", "8b-qlora-4x2048/tunesmith-auto", 0.95
"""Packed real documents have to reach this share of the fixed-length figure."""


COLUMNS = """\
Made by `make docs` from engine_h100.json (`python benchmarks/engine.py OUT --row NAME`). One process a row; medians of 6
steps after 5; random weights and tokens, every token supervised, rank 16 on all linear layers, 8-bit AdamW.

- spread: the slowest of the 6 steps over the fastest
- first step: seconds, kernels compiled and graphs not yet there
- loss: of the first and the last of 11 steps on one batch
- gradients: the largest difference of an adapter tensor's norm from the reference engine's in fp32; the difference of the
  whole norm in bf16; the mean distance of a tensor from fp32's, ours / the reference engine's (two engines that round
  differently; the noise grows through layers of random weights)"""
"""What `markdown` shows."""


def target(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> tuple[float, float | None] | None:
    """What a row has to reach; None if nothing, or if it depends on a row that is not there."""
    if row["name"] == DOCUMENTS:
        fixed = rows.get(FIXED_LENGTH)
        return (DOCUMENTS_SHARE * fixed["tokens_per_second"], None) if fixed and not fixed["error"] else None
    return TARGETS.get(row["name"])


def misses(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why the row does not reach its target, or None."""
    wanted = target(row, rows)
    if wanted is None:
        return None
    if row["error"]:
        return f"failed: {row['error']}"
    tokens_per_second, peak_gb = wanted
    if row["tokens_per_second"] < tokens_per_second:
        return f"{row['tokens_per_second']:,.0f} of {tokens_per_second:,.0f} tokens/s"
    if peak_gb is not None and row["peak_gb"] > peak_gb:
        return f"{row['peak_gb']:.2f} GB; at most {peak_gb} GB"
    return None


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, grouped by workload, losing rows included; `COLUMNS` explains it."""
    lines = [
        "| workload | | tokens/s | x best peer | spread | peak GB (reserved) | first step s | loss, one batch "
        "| gradients | target |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown = None
    for row in rows.values():
        workload = "" if row["group"] == shown else row["workload"]
        shown = row["group"]
        if row["error"]:
            lines.append(f"| {workload} | {row['label']} | failed: {row['error'][:80].replace('|', '/')} |||||||  |")
            continue
        peers = [
            other["tokens_per_second"]
            for other in rows.values()
            if other["group"] == row["group"]
            and not other["error"]
            and other["runner"] not in ("tunesmith", "reference")
        ]
        ratio = f"{row['tokens_per_second'] / max(peers):.2f}" if peers else ""
        check = row.get("check_result")
        gradients = ""
        if check:
            gradients = (
                f"{check['fp32']['norm_difference']:.2%}, {check['total_norm_difference']:.2%}, "
                f"{check['error']:.1%} / {check['reference_error']:.1%}"
            )
        wanted, missed = target(row, rows), misses(row, rows)
        verdict = "" if wanted is None else f"missed: {missed}" if missed else "reached"
        speed = f"{row['tokens_per_second']:,.0f}"
        reserved = "" if row["reserved_gb"] is None else f" ({row['reserved_gb']:.2f})"
        lines.append(
            f"| {workload} | {row['label']} | {f'**{speed}**' if row['runner'] == 'tunesmith' else speed} | {ratio} "
            f"| {row['spread'] - 1:.1%} | {row['peak_gb']:.2f}{reserved} | {row['first_step_s']:.1f} "
            f"| {row['losses'][0]:.3f} → {row['losses'][-1]:.3f} | {gradients} | {verdict} |"
        )
    return "\n".join(lines)


PEER_COLUMNS = {
    "Unsloth": ("unsloth", "default"),
    "Unsloth, keeps all": ("unsloth", "none"),
    "Unsloth, auto": ("unsloth", "auto"),
    "transformers + PEFT": ("transformers", "default"),
}
"""The columns of `summary`: a peer's runner and checkpointing."""


def summary(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each row of ours: tokens/s (peak GB), and each peer's on the same workload, as Markdown for the README."""
    lines = [
        f"| model, method, tokens a step | `memory.mode` | tunesmith | {' | '.join(PEER_COLUMNS)} |",
        f"|---|---|---|{'---|' * len(PEER_COLUMNS)}",
    ]
    for row in rows.values():
        if row["runner"] != "tunesmith":
            continue
        cells = []
        for runner, checkpointing in PEER_COLUMNS.values():
            peer = next(
                (
                    other
                    for other in rows.values()
                    if (other["group"], other["runner"], other["checkpointing"])
                    == (row["group"], runner, checkpointing)
                ),
                None,
            )
            cells.append("" if peer is None else _figures(peer))
        workload = row["workload"].removesuffix(f", rank {row['rank']}").replace(" tokens", "")
        mode = row["memory"] + ("" if row["limit_gb"] is None else f", {row['limit_gb']:g} GB")
        lines.append(f"| {workload} | {mode} | **{_figures(row)}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(row: Mapping[str, Any]) -> str:
    return "failed" if row["error"] else f"{row['tokens_per_second']:,.0f} ({row['peak_gb']:.1f})"


def read(files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of all files by name, in the suite's order; of a row that is in several, the last."""
    found = {row["name"]: row for file in files for row in json.loads(Path(file).read_text())["rows"]}
    return {row.name: found[row.name] for row in plan_rows(suite="h100") if row.name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--table", nargs="+")
    options = parser.parse_args()
    problems: list[str] = []
    if options.table:
        rows = read(options.table)
    elif options.out is None:
        parser.error("give OUT, or --table FILE ...")
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        done: list[dict[str, Any]] = []

        def save(row: dict[str, Any]) -> None:
            done.append(row)
            facts = {"created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "rows": done}
            (options.out / "engine.json").write_text(json.dumps(facts, indent=1))
            figures = row["error"] or f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_gb']:.2f} GB"
            print(f"{row['name']}: {figures}", file=sys.stderr, flush=True)

        chosen = plan_rows(suite="h100", select=options.row, check=not options.no_check)
        problems = bench(chosen, options.models, save)["problems"]
        rows = {row["name"]: row for row in done}
    print(markdown(rows))
    problems += [f"{name}: {missed}" for name, row in rows.items() if (missed := misses(row, rows))]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
