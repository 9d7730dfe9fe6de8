"""Speed and memory of a training step on this machine: ours, our reference engine, and every peer that is installed.

A row is one measurement: a runner, a model shape with random weights, and the documents of one step. Each runs in a
process of its own (workflows/bench_step.py), so that no row inherits another's memory, compiled kernels or patches, and
a row that fails is a row with an error. Everything is alike but the runner: the weights (drawn from one seed), the
batch, rank 16 on all linear layers, bitsandbytes' 8-bit AdamW, gradient clipping, bf16 autocast.

Imports no PyTorch: the process that starts the others must not hold memory of the GPU they measure.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast, get_args

from tunesmith.config import DType
from tunesmith.errors import ConfigError, DataError, MachineError
from tunesmith.models.catalogue import CATALOGUE
from tunesmith.types import Progress, no_progress

Runner = Literal["tunesmith", "reference", "transformers", "liger", "unsloth"]
Method = Literal["lora", "qlora"]
MemoryMode = Literal["auto", "fast", "min"]
Checkpointing = Literal["default", "none", "auto"]

RUNNERS: dict[Runner, str] = {
    "tunesmith": "tunesmith",
    "reference": "reference engine",
    "transformers": "transformers + PEFT",
    "liger": "PEFT + Liger",
    "unsloth": "Unsloth",
}
"""What can be measured, and what the table calls it. `tunesmith` is what `tunesmith train` runs by default."""

PEER_PACKAGES: dict[str, str] = {"transformers": "peft", "liger": "liger_kernel", "unsloth": "unsloth"}
"""The module whose presence says that a peer is installed."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": CATALOGUE["meta-llama/Llama-3.1-8B"],
    "qwen2.5-3b": CATALOGUE["Qwen/Qwen2.5-3B"],
    "qwen2.5-0.5b": CATALOGUE["Qwen/Qwen2.5-0.5B"],
    "qwen3-4b": CATALOGUE["Qwen/Qwen3-4B"],
    "phi-3.5-mini": CATALOGUE["microsoft/Phi-3.5-mini-instruct"],
    "gemma-2-2b": CATALOGUE["google/gemma-2-2b"],
    "smollm2-135m": CATALOGUE["HuggingFaceTB/SmolLM2-135M"],
    "tiny": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
"""Settings of transformers' configuration of each shape. `tiny` is for the CPU."""

RESULT_MARK = "BENCH_RESULT "
"""What precedes a row's JSON on the stdout of its process: peers print banners there."""

SEED = 0
"""Of weights, adapters, tokens and drawn lengths."""

WARM_UP = 5
"""Steps before the timed ones: kernels are compiled, our graphs are captured at the fourth, Unsloth plans at the second."""

ROW_SECONDS = 1200
"""A row that takes longer is given up: a peer that hangs must not hang the table."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",  # it would wait for the network
}
"""What every row's process is told."""

NORM_TOLERANCE = 0.01
"""How far a gradient norm may be from the reference engine's: of an adapter tensor in fp32, of all together in 16 bits."""

ERROR_RATIO = 1.1
"""How far 16-bit gradients may be from those in fp32, in terms of the reference engine's distance."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    `documents` are the lengths of the documents of a step. Packed, they lie end to end in one row; otherwise they are a
    batch, one document a row. `memory` and `limit_gb` are `memory.mode` and `memory.limit_gb` (the cap holds for peers
    too), `engine` is `model.engine` of the runner `tunesmith`. `checkpointing` is a peer's: its own default, `none`, or `auto` (Unsloth un-checkpoints the layers that fit).
    `models` is a folder for the checkpoint that a peer may need to load from.
    """

    runner: Runner
    model: str
    method: Method
    documents: tuple[int, ...]
    packed: bool = False
    memory: MemoryMode = "auto"
    limit_gb: float | None = None
    engine: Literal["auto", "fused"] = "auto"
    checkpointing: Checkpointing = "default"
    group: str = ""
    rank: int = 16
    steps: int = 6
    warmup: int = WARM_UP
    check: bool = False
    device: str = "auto"
    dtype: str = "auto"
    models: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether tunesmith runs it, with either engine."""
        return self.runner in ("tunesmith", "reference")

    @property
    def variant(self) -> str:
        """What tells rows of one runner apart: the memory mode, or a peer's checkpointing; and the cap."""
        kind = self.memory if self.is_ours else self.checkpointing
        return kind if self.limit_gb is None else f"{kind}-{self.limit_gb:g}gb"

    @property
    def name(self) -> str:
        """What `--row` selects: `GROUP/RUNNER-VARIANT`."""
        return f"{self.group}/{self.runner}-{self.variant}".removeprefix("/")

    @property
    def label(self) -> str:
        """What the table calls it."""
        modes = {"tunesmith": f" {self.memory}", "reference": "" if self.memory == "auto" else f" {self.memory}"}
        peer = {"default": "", "none": ", keeps all", "auto": ", auto"}[self.checkpointing]
        cap = "" if self.limit_gb is None else f", {self.limit_gb:g} GB"
        return RUNNERS[self.runner] + modes.get(self.runner, peer) + cap

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return sum(self.documents)

    @property
    def workload(self) -> str:
        """Model, method and documents in words."""
        alike = not self.packed and len(set(self.documents)) == 1
        shape = f"{len(self.documents)} x {self.documents[0]}" if alike else f"{len(self.documents)} documents of"
        return f"{self.model} {self.method}, {shape}{'' if alike else f' {self.tokens:,}'} tokens, rank {self.rank}"

    @property
    def checkpoint(self) -> Path:
        """Where the row's model is, for a peer that loads it from a folder; `done` in it says that it is whole."""
        return Path(self.models) / self.model

    def to_json(self) -> str:
        """The row as the argument of its process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Row:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**values | {"documents": tuple(values["documents"])})


CHAT_DOCUMENTS = (
    *(189, 61, 83, 234, 133, 579, 174, 59, 59, 269, 58, 115, 446, 119, 77, 357, 58, 78, 245, 410, 205, 608, 69),
    *(519, 263, 331, 398, 173, 179, 250, 269, 298, 427, 351, 49),
)
"""Lengths of real conversations that fill 8,192 tokens exactly: `draw_documents`, seed 3, of 1,284 rows of chat sets
(Schema-Guided Dialogue, OpenAssistant's seeds, FastChat's identities), in SmolLM2's tokens. The mean token is in a
document of 339 tokens here, and of 336 in all of them."""


def _group(
    name: str,
    model: str,
    method: Method,
    documents: Sequence[int],
    runners: Sequence[tuple[Runner, str]],
    **settings: Any,
) -> list[Row]:
    """Rows of one workload. Each runner comes with its memory mode or its checkpointing."""
    rows = []
    for runner, variant in runners:
        row = Row(runner, model, method, tuple(documents), group=name, **settings)
        kind: dict[str, Any] = {"memory": variant} if row.is_ours else {"checkpointing": variant}
        rows.append(replace(row, **kind))
    return rows


AUTO: list[tuple[Runner, str]] = [("tunesmith", "auto")]
MIN: list[tuple[Runner, str]] = [("tunesmith", "min")]
OURS: list[tuple[Runner, str]] = [*AUTO, ("tunesmith", "fast"), *MIN, ("reference", "auto")]
UNSLOTH: list[tuple[Runner, str]] = [("unsloth", "default"), ("unsloth", "none"), ("unsloth", "auto")]
PEERS: list[tuple[Runner, str]] = [("transformers", "default"), ("liger", "default"), *UNSLOTH]

SUITES: dict[str, list[Row]] = {
    "h100": [
        *_group("8b-qlora-4x2048", "llama-3.1-8b", "qlora", [2048] * 4, OURS + PEERS),
        *_group("8b-lora-4x2048", "llama-3.1-8b", "lora", [2048] * 4, OURS + PEERS),
        *_group("8b-qlora-2x2048", "llama-3.1-8b", "qlora", [2048] * 2, MIN + UNSLOTH),
        *_group("8b-qlora-8x2048", "llama-3.1-8b", "qlora", [2048] * 8, MIN + UNSLOTH),
        *_group("8b-qlora-16gb", "llama-3.1-8b", "qlora", [2048] * 2, AUTO + UNSLOTH, limit_gb=16),
        *_group("3b-qlora-4x1024", "qwen2.5-3b", "qlora", [1024] * 4, OURS + PEERS),
        *_group("3b-qlora-8x2048", "qwen2.5-3b", "qlora", [2048] * 8, AUTO + UNSLOTH),
        *_group("8b-qlora-documents", "llama-3.1-8b", "qlora", CHAT_DOCUMENTS, AUTO + UNSLOTH, packed=True),
    ],
}
"""Named sets of rows. `h100` is what docs/LOG.md and the README report."""


def plan_rows(
    *,
    suite: str | None = None,
    select: Sequence[str] = (),
    model: str | None = None,
    method: str | None = None,
    batch: int | None = None,
    seq: int | None = None,
    lengths: str | Path | None = None,
    documents: str | None = None,
    memory: Sequence[str] = (),
    only: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    check: bool = False,
    **settings: Any,
) -> list[Row]:
    """The rows to run: those of a suite, or of one workload with every runner that is installed.

    Documents are `batch` of `seq` tokens, or are packed into batch x seq tokens: lengths from a file, one a line, or
    drawn (`lognormal`). `memory` holds modes and caps in GB, e.g. ["auto", "16"]; `select` holds patterns of row names.
    The defaults depend on whether there is a GPU. `check` is for the rows of tunesmith; `settings` are other fields of
    `Row`. Raises ConfigError, DataError.
    """
    _one_of("--dtype", dtype, get_args(DType))
    on_cpu = False
    if device != "auto" or dtype != "auto" or (suite is None and None in (model, method, batch, seq)):
        on_cpu = find_device(device, dtype) != "cuda"
    if suite is None:
        rows = _workload_rows(on_cpu, model, method, batch, seq, lengths, documents, memory, only)
    else:
        given: dict[str, object] = {
            "--model": model,
            "--method": method,
            "--batch": batch,
            "--seq": seq,
            "--lengths": lengths,
        }
        given |= {"--documents": documents, "--memory": memory or None, "--only": only or None}
        ignored = [option for option, value in given.items() if value is not None]
        if ignored:
            raise ConfigError(
                f"{', '.join(ignored)}: the rows of a suite have their own; leave out, or leave out --suite"
            )
        rows = SUITES[_one_of("--suite", suite, SUITES)]
    for pattern in select:
        if not any(_is_selected(row, pattern) for row in rows):
            groups = dict.fromkeys(row.group for row in rows if row.group) or [row.name for row in rows]
            raise ConfigError(f"--row {pattern!r} matches none of {', '.join(groups)}")
    if select:
        rows = [row for row in rows if any(_is_selected(row, pattern) for pattern in select)]
    return [
        replace(row, device=device, dtype=dtype, check=check and row.runner == "tunesmith", **settings) for row in rows
    ]


def _is_selected(row: Row, pattern: str) -> bool:
    """A pattern is a row's name, its group, or a glob of names."""
    return row.group == pattern or fnmatchcase(row.name, pattern)


def _workload_rows(
    on_cpu: bool,
    model: str | None,
    method: str | None,
    batch: int | None,
    seq: int | None,
    lengths: str | Path | None,
    documents: str | None,
    memory: Sequence[str],
    only: Sequence[str],
) -> list[Row]:
    model = _one_of("--model", model or ("tiny" if on_cpu else "qwen2.5-3b"), SHAPES)
    method = _one_of("--method", method or ("lora" if on_cpu else "qlora"), get_args(Method))
    batch, seq = batch or (2 if on_cpu else 4), seq or (64 if on_cpu else 1024)
    longest = SHAPES[model]["max_position_embeddings"]
    if seq > longest:
        raise ConfigError(f"--seq is {seq}, but {model} takes at most {longest} tokens")
    if lengths and documents:
        raise ConfigError("--lengths and --documents both say how long the documents are; give one of the two")
    if lengths:
        chosen = draw_documents(read_lengths(Path(lengths), batch * seq), batch * seq)
    elif documents:
        _one_of("--documents", documents, ["lognormal"])
        chosen = draw_documents(lognormal_lengths(batch * seq), batch * seq)
    else:
        chosen = (seq,) * batch
    runners = [_one_of("--only", name, RUNNERS) for name in only] or [name for name in RUNNERS if is_installed(name)]
    rows = []
    for runner in runners:
        row = Row(runner, model, cast(Method, method), chosen, packed=bool(lengths or documents))
        if row.is_ours:
            modes = memory or (get_args(MemoryMode) if runner == "tunesmith" else ["auto"])
            rows += [_with_memory(row, setting) for setting in modes]
        elif runner == "unsloth":
            rows += [replace(row, checkpointing=kind) for kind in get_args(Checkpointing)]
        else:
            rows.append(row)
    return rows


def _with_memory(row: Row, setting: str) -> Row:
    """The row with a memory mode, or with a cap in GB under `auto`."""
    try:
        limit = float(setting)
    except ValueError:
        return replace(row, memory=_one_of("--memory", setting, get_args(MemoryMode), ", or a cap in GB"))
    if not 0 < limit < math.inf:
        raise ConfigError(f"--memory is {setting}: expected a cap above 0 GB")
    return replace(row, limit_gb=limit)


def _one_of(option: str, value: Any, allowed: Iterable[Any], more: str = "") -> Any:
    if value not in allowed:
        raise ConfigError(f"{option} is {value!r}: expected one of {', '.join(allowed)}{more}")
    return value


def find_device(device: str, dtype: str) -> str:
    """The type of the device that rows will run on (`cpu`, `cuda`, `mps`). Raises ConfigError where it is not there.

    Looked at in another process, which is gone with the GPU memory that looking takes.
    """
    script = (
        "import sys; from tunesmith.hardware import compute_dtype, probe\n"
        "hardware = probe(sys.argv[1]); compute_dtype(sys.argv[2], hardware); print(hardware.type)"
    )
    done = subprocess.run([sys.executable, "-c", script, device, dtype], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    error = _last_error(done.stderr)
    raise ConfigError(error.removeprefix("ConfigError: "))


def is_installed(runner: str) -> bool:
    """Whether the runner's package can be imported. Ours always can."""
    return runner not in PEER_PACKAGES or importlib.util.find_spec(PEER_PACKAGES[runner]) is not None


def read_lengths(path: Path, longest: int) -> list[int]:
    """Document lengths from a text file, one integer a line. Raises DataError with every line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    problems, lengths = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        length = int(line) if line.strip().isdecimal() else 0
        if not 2 <= length <= longest:
            problems.append(
                f"{path}:{number}: {line.strip()[:40]!r}: expected a whole number from 2 to {longest} (batch x seq)"
            )
        lengths.append(length)
    if not lengths:
        problems.append(f"{path}: no lengths; expected one whole number a line")
    if problems:
        raise DataError(problems)
    return lengths


def lognormal_lengths(budget: int) -> list[int]:
    """1,000 lengths with the long tail that chat data has: lognormal, median 300, sigma 0.8, from 16 to the budget."""
    rng = random.Random(SEED)
    return [min(max(16, round(rng.lognormvariate(math.log(300), 0.8))), budget) for _ in range(1000)]


def draw_documents(lengths: Sequence[int], budget: int, seed: int = 0) -> tuple[int, ...]:
    """One micro-batch of at most `budget` tokens: documents in random order, each taken if it still fits.

    Not best-fit: that would put the longest documents together, and a step is to be like the data.
    """
    order = list(lengths)
    random.Random(seed).shuffle(order)
    chosen, left = [], budget
    for length in order:
        if length <= left:
            chosen.append(length)
            left -= length
    return tuple(chosen)


def bench(
    rows: Sequence[Row],
    models: str | Path | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Run the rows one after the other; `on_row` is told each result as it is there.

    Returns {"rows": [...], "problems": [...]}: a row that failed has its `error`; `problems` are our own rows whose
    result cannot be trusted (a loss that does not fall, gradients that are not the reference engine's). Rows of peers
    that are not installed are rows with an error. `models` keeps the checkpoints that peers load from; without it they
    are in a temporary folder. Raises MachineError if every row failed.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as temporary:
        for number, row in enumerate(rows):
            progress("measuring", number, len(rows))
            results.append(_run(replace(row, models=str(models or temporary))))
            on_row(results[-1])
        progress("measuring", len(rows), len(rows))
    if all(result["error"] for result in results):
        raise MachineError(f"no row could be measured: {results[0]['name']}: {results[0]['error']}")
    return {"rows": results, "problems": [problem for result in results for problem in _problems(result)]}


def _run(row: Row) -> dict[str, Any]:
    """One row in its own process, as JSON: the row's fields, then what was measured or the error."""
    described = {"name": row.name, "label": row.label, "workload": row.workload, "tokens": row.tokens}
    fields = json.loads(row.to_json())
    del fields["models"]
    measured: dict[str, Any] = {"error": None}
    if not is_installed(row.runner):
        measured["error"] = f"{PEER_PACKAGES[row.runner]} is not installed"
    elif row.runner == "unsloth" and (failed := _write_checkpoint(row)):
        measured["error"] = f"writing the model that it loads: {failed}"
    else:
        measured = _process(row)
    return described | fields | measured


def _write_checkpoint(row: Row) -> str | None:
    """Write the model that the row loads, unless it is there; returns why that failed, if it did."""
    if (row.checkpoint / "done").exists():
        return None
    error: str | None = _process(row, "--write-checkpoint")["error"]
    return error


def _process(row: Row, *arguments: str) -> dict[str, Any]:
    """What bench_step.py prints; where it fails, the last thing it said."""
    command = [sys.executable, "-m", "tunesmith.workflows.bench_step", row.to_json(), *arguments]
    # Unsloth writes compiled code, into the working folder if it is not told where.
    environment = os.environ | ENVIRONMENT | {"UNSLOTH_COMPILE_LOCATION": str(Path(row.models).absolute() / "compiled")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=ROW_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {ROW_SECONDS} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(RESULT_MARK):
            return {"error": None, **json.loads(line.removeprefix(RESULT_MARK))}
    if done.returncode < 0:
        error = f"killed by {signal.Signals(-done.returncode).name} (SIGKILL: the machine was out of memory)"
    else:
        error = _last_error(done.stderr) or f"exit code {done.returncode}"
    return {"error": error[:300], "stderr": done.stderr.splitlines()[-12:]}


def _last_error(stderr: str) -> str:
    """The last line of a traceback without the exception's module; other libraries may have spoken after it."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return re.sub(r"^[\w.]+\.(?=\w+)", "", (errors or lines or [""])[-1])


def _problems(result: Mapping[str, Any]) -> list[str]:
    """Why a row of ours is no result, if so."""
    if result["error"] or result["runner"] not in ("tunesmith", "reference"):
        return []
    found = []
    first, last = result["losses"][0], result["losses"][-1]
    if not last < first:
        found.append(
            f"{result['name']}: the loss on one repeated batch went from {first:.4f} to {last:.4f}; it must fall"
        )
    if check := result["check_result"]:
        found += [f"{result['name']}: {problem}" for problem in _gradient_problems(check)]
    return found


def _gradient_problems(check: Mapping[str, Any]) -> list[str]:
    """What is wrong with gradients of the fused engine, given bench_check.py's result."""
    found = []
    precise = check["fp32"]
    if not precise["norm_difference"] <= NORM_TOLERANCE:
        found.append(
            f"in fp32 the gradient norm of {precise['norm_tensor']} differs by {precise['norm_difference']:.2%} from the "
            f"reference engine's; {NORM_TOLERANCE:.0%} is allowed"
        )
    if not check["total_norm_difference"] <= NORM_TOLERANCE:
        found.append(
            f"the norm of the whole gradient differs by {check['total_norm_difference']:.2%} from the reference engine's; "
            f"{NORM_TOLERANCE:.0%} is allowed"
        )
    if not check["error"] <= ERROR_RATIO * check["reference_error"] + 1e-4:
        found.append(
            f"gradients are {check['error']:.2%} from those of fp32, the reference engine's {check['reference_error']:.2%}; "
            f"{ERROR_RATIO:g} times that is allowed"
        )
    return found
