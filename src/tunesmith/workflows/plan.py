"""What fits, before anything is downloaded: memory, speed and cost of training a model on a card, by arithmetic.

Needs neither weights nor a GPU nor PyTorch: a model's config.json (a folder's, the hub's, or a known model's), and a card's
data sheet. `train` plans with the same arithmetic.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tunesmith.cards import Card, card_of, find_card
from tunesmith.config import Method, ModelConfig, RunConfig
from tunesmith.errors import ConfigError, MachineError, ModelError
from tunesmith.measurements import read_measured
from tunesmith.memory.shape import ModelShape
from tunesmith.models.catalogue import ALSO_KNOWN_AS, find_model_config, unknown_model, words_of
from tunesmith.models.hub import fetch_config
from tunesmith.models.load import HUB_ID, find_model
from tunesmith.workflows.plan_advice import advice
from tunesmith.workflows.plan_options import (
    FASTER,
    METHOD_NAMES,
    PARALLEL,
    WAYS,
    Data,
    Option,
    Target,
    by_way,
    micro_batch_of,
    plan_option,
    with_settings,
)

__all__ = [
    "METHOD_NAMES",
    "PARALLEL",
    "Data",
    "Option",
    "Target",
    "answer",
    "asked_length",
    "basis",
    "find_shape",
    "find_target",
    "full_name",
    "longest_example",
    "micro_batch_of",
    "plan",
    "plan_option",
    "refuse_unless_fits",
    "rounded",
    "with_settings",
]

SEQUENCE = 2048
"""Tokens of an example where nothing is said of the data."""

SEQUENCES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Lengths that are looked at beside the one that was asked for."""

QWEN2_TRAINED = 32_768
"""Tokens that Qwen2 and Qwen2.5 take in their Instruct and Coder forms, whatever the base model takes."""

RATED_CARD = "H100"
"""The card that speeds were measured on (memory/speed.py)."""


# -- models and cards -------------------------------------------------------------------------------------------------


def find_shape(name: str) -> tuple[str, ModelShape]:
    """A model's name and shape: from a folder's config.json, a known model's, or the hub's. Raises ModelError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve().name, _shape_in(path)
    if path.suffix == ".gguf":
        return path.stem, _shape_in(find_model(ModelConfig(name=name)).path)
    if (known := find_model_config(name)) is not None:
        own = _own_id(name, known[0])
        if own != known[0] and known[1]["model_type"] == "qwen2":
            known[1]["max_position_embeddings"] = min(known[1]["max_position_embeddings"], QWEN2_TRAINED)
        return own.rpartition("/")[2], ModelShape.of(known[1])
    if not HUB_ID.fullmatch(name):
        raise ModelError(unknown_model(name))
    return name.rpartition("/")[2], _shape_in(fetch_config(name))


def full_name(name: str) -> str:
    """A known model's hub id for its short name, also one that shares another's shape; other names as they are."""
    if "/" in name or not name or Path(name).expanduser().exists() or (known := find_model_config(name)) is None:
        return name
    return _own_id(name, known[0])


def _own_id(name: str, known: str) -> str:
    """The id of the model that `name` means, which may only share its shape with `known`.

    A name that leaves out words of the id (`llama-2-7b` of Llama-2-7b-hf), or adds no more than a size, means that model;
    one with other words (`-Instruct`, `-Coder`) means a sibling of the same organisation.
    """
    asked = words_of(name)
    for also in ALSO_KNOWN_AS:
        if words_of(also) == asked:
            return known if _is_size(set(asked) - set(words_of(known))) else also
    if _is_size(set(asked) - set(words_of(known))):
        return known
    form = "-hf" if known.endswith("-hf") and "hf" not in asked else ""  # without it, Meta's own files
    return f"{known.partition('/')[0]}/{name.rstrip('/').rpartition('/')[2]}{form}"


def _is_size(words: set[str]) -> bool:
    return all(word == "b" or word[0].isdecimal() for word in words)


def _shape_in(folder: Path) -> ModelShape:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a model folder (it has no config.json)") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return ModelShape.of(config)


def find_target(gpu: str | None, memory_gb: float | None, count: int = 1) -> Target | None:
    """The cards that `--gpu`, `--memory` and `--num-gpus` mean; without a name or memory, this machine's NVIDIA GPUs, or None.

    `gpu` is a name, several alike (`4xH100`, `H100,H100`), or with `memory_gb` a card with other memory. Raises ConfigError.
    """
    if memory_gb is not None and not 0 < memory_gb < 1e5:
        raise ConfigError(f"--memory is {memory_gb:g}: expected GB above 0")
    if count < 1:
        raise ConfigError(f"--num-gpus is {count}: expected at least 1")
    if gpu is None:
        if memory_gb is not None:
            return Target(f"{memory_gb:g} GB of GPU memory", memory_gb, None, count)
        local = _local_target()
        return local if local is None or count == 1 else replace(local, count=count)
    names = [part.strip() for part in gpu.split(",") if part.strip()]
    cards = [found for name in names for found in _numbered(name)]
    if not cards:
        raise ConfigError("--gpu is empty: name a card, e.g. --gpu T4")
    kinds = list(dict.fromkeys(card.name for card in cards))
    if len(kinds) > 1:
        smallest = min(cards, key=lambda card: card.memory_gb)
        raise ConfigError(
            f"--gpu names unequal cards ({', '.join(kinds)}): each would hold the whole model and wait for the slowest; plan "
            f"for the smaller ones, e.g. --gpu {len(cards)}x{smallest.name.replace(' ', '-')}"
        )
    if count > 1 < len(cards) != count:
        raise ConfigError(f"--gpu names {len(cards)} cards and --num-gpus is {count}: leave --num-gpus out")
    return Target(cards[0].name, memory_gb or cards[0].memory_gb, cards[0], max(count, len(cards)), read_measured())


def _numbered(name: str) -> list[Card]:
    match = re.fullmatch(r"(\d{1,4})\s*[xX*]\s*(.+)", name)
    return [find_card(match[2])] * int(match[1]) if match and int(match[1]) else [find_card(name)]


def _local_target() -> Target | None:
    """This machine's GPUs, as nvidia-smi tells them; PyTorch would take seconds to ask."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = (
            subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.strip().splitlines()
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = []
    for line in lines:
        name, _, megabytes = line.rpartition(",")
        if not megabytes.strip().isdecimal():  # [N/A] where the memory is the host's
            continue
        gb = int(megabytes) / 1024
        found.append((name.strip(), gb, card_of(name.strip(), gb)))
    if not found:
        return None
    name, gb, card = min(found, key=lambda entry: entry[1])
    alike = sum(other == name for other, _, _ in found)
    return Target(card.name if card else name, card.memory_gb if card else gb, card, alike, read_measured())


def plan(
    config: RunConfig,
    target: Target,
    *,
    methods: Sequence[Method] = (),
    data: Data | None = None,
    sequence: int | None = None,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """What `tunesmith plan --json` prints for a model and a card.

    `config` says model, adapter, optimizer, batch and memory mode; `methods` are the only ones looked at, if given. Examples
    are `data`, or of `sequence` tokens. Keys: `model, gpu, memory_gb, options[], recommended, breakdown, basis, advice,
    data`, as docs/planner.md says; `recommended` is null if nothing fits. Raises ConfigError and ModelError.
    """
    name, shape = find_shape(config.model.name)
    length = longest_example(config, shape, sequence, data)
    asked = data or Data.of_length(length, config.training.batch_size)
    found: list[Option] = []

    def look(settings: RunConfig, examples: Data) -> Option:
        found.append(plan_option(settings, shape, target, examples.lengths, examples.supervised))
        return found[-1]

    main = {way: look(by_way(config, way), asked) for way in _ways(config) if not methods or way[0] in methods}
    ways = [way for way in main if methods or way[0] != "full"]
    chosen = _recommended([main[way] for way in ways])
    if chosen is not None:
        way = next(way for way, option in main.items() if option is chosen)
        settings = by_way(config, way)
        for other in SEQUENCES:
            most = min(shape.context_length or other, config.training.micro_batch_tokens or other)
            if other != length and data is None and other <= most:
                look(settings, Data.of_length(other, config.training.batch_size))
        for mode in ("auto", "fast", "min"):
            if mode != config.memory.mode:
                look(with_settings(settings, memory__mode=mode), asked)
        for optimizer in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
            if optimizer != config.optimizer.name:
                look(with_settings(settings, optimizer__name=optimizer), asked)
    trained = _trained_tokens(config, asked.lengths) if asked.real else None
    result: dict[str, Any] = {
        "model": name,
        "parameters": shape.num_parameters,
        "gpu": target.name,
        "num_gpus": target.count,
        "memory_gb": target.memory_gb,
        "options": [_json(option, trained, price_per_hour) for option in found],
        "recommended": None if chosen is None else _json(chosen, trained, price_per_hour),
        "breakdown": None if chosen is None else dict(chosen.breakdown),
        "basis": basis(target, shape, found),
        "data": None if data is None else _facts(data, _trained_tokens(config, data.lengths)),
        "advice": list(advice(config, name, shape, target, asked, ways, main, chosen, found)),
    }
    if chosen is not None:
        result["answer"] = answer(name, target, chosen, config.memory.limit_gb)
    else:
        least = [f"{option.label} needs {option.peak_gb:.1f} GB" for option in main.values()]
        room = _room(target, config.memory.limit_gb)
        where = target.label if room in target.label else f"{target.label} ({room})"
        result["answer"] = f"{name} does not train on {where}: {', '.join(least)}"
    return result


def _recommended(preferred: Sequence[Option]) -> Option | None:
    """The first that fits, unless a later one is FASTER."""
    fitting = [option for option in preferred if option.fits]
    if not fitting:
        return None
    chosen = fitting[0]
    for option in fitting[1:]:
        if (option.tokens_per_second or 0) > FASTER * (chosen.tokens_per_second or float("inf")):
            chosen = option
    return chosen


def _ways(config: RunConfig) -> list[tuple[Method, str]]:
    """The methods to look at: with the scheme that was asked for, without one that the engine that was asked for lacks."""
    scheme = config.quantization.scheme
    if scheme != "nf4":
        return [*WAYS[:2], ("qlora", scheme)]
    return [way for way in WAYS if way[1] != "int8" or config.model.engine != "fused"]


def longest_example(config: RunConfig, shape: ModelShape, sequence: int | None, data: Data | None) -> int:
    """Tokens of the longest example. Raises ConfigError for one beyond the model's context."""
    length = max(data.lengths) if data is not None else asked_length(config, sequence)
    context = shape.context_length
    if data is None and context is not None and length > context:
        if sequence is not None:
            raise ConfigError(f"--max-seq-length is {length:,}, but the model takes at most {context:,} tokens")
        length = context
    budget = config.training.micro_batch_tokens
    if budget is not None and length > budget:
        raise ConfigError(
            f"examples of {length:,} tokens fit into no micro-batch: training.micro_batch_tokens is {budget:,}; raise it, or "
            f"pass --max-seq-length {budget}"
        )
    return length


def asked_length(config: RunConfig, sequence: int | None) -> int:
    """Tokens of an example: `sequence`, else what the configuration says, else SEQUENCE."""
    limit = config.data.max_seq_length
    return sequence or (limit if limit != "auto" else SEQUENCE)


def _json(option: Option, trained: float | None, price: float | None) -> dict[str, Any]:
    values = asdict(option) | {"label": option.label, "micro_batches": option.micro_batches, "basis": option.basis}
    del values["calibration"]  # which `basis` tells
    values["graphs_gb"] = values.pop("pool_gb")
    hours = None
    if trained is not None and option.tokens_per_second:
        hours = trained / option.tokens_per_second / 3600
    return values | {"hours": hours, "cost": None if hours is None or price is None else hours * price}


def _facts(data: Data, trained: float) -> dict[str, float]:
    tokens = sum(data.lengths)
    return {"rows": len(data.lengths), "tokens": tokens, "longest": max(data.lengths), "epochs": trained / tokens}


def _trained_tokens(config: RunConfig, lengths: Sequence[int]) -> float:
    """Tokens of a run on examples of these lengths: its epochs, or `training.max_steps` of its steps."""
    training, tokens = config.training, sum(lengths)
    step = training.batch_tokens or min(training.batch_size, len(lengths)) * tokens / len(lengths)
    return min(training.epochs * tokens, step * (training.max_steps or math.inf))


def basis(target: Target, shape: ModelShape, options: Sequence[Option]) -> dict[str, str]:
    """Where memory and speed of these options come from, in words."""
    memory = "arithmetic on the model's config.json, within 5% of what was measured on an H100"
    if not shape.exact:
        memory = f"arithmetic for a plain decoder: {shape.model_type or 'this'} is not a family that tunesmith knows"
    if any(layer.experts for _, layer in shape.layers) and any(option.method == "qlora" for option in options):
        memory += "; QLoRA leaves the experts in 16 bits, as bitsandbytes quantizes linear layers alone"
    known = {option.label: option.calibration for option in options if option.calibration.runs}
    if peaks := [peak for each in known.values() for peak in each.peaks]:
        low, high = f"{min(peaks):.0%}", f"{max(peaks):.0%}"
        memory += f"; {_runs(len(peaks))} on this card measured {low if low == high else f'{low} to {high}'} of it"
    if target.card is None:
        speed = "unknown: no card was named"
    elif target.card.name == RATED_CARD:
        speed = "arithmetic with shares of the data sheet that were fitted on an H100, within 15% there where the GPU does not wait for Python"
    else:
        speed = "arithmetic with shares of the data sheet that were fitted on an H100"
    if known:
        said = [f"{label} by {_runs(each.runs)} ({each.speed:.2f} of the arithmetic)" for label, each in known.items()]
        rest = "" if {option.label for option in options} == set(known) else f"; the rest {speed}"
        speed = f"calibrated on this card: {', '.join(said)}{rest}"
    if target.count > 1:
        speed += f"; several cards: each holds the whole model and reaches {PARALLEL:.0%}"
    return {"memory": memory, "speed": speed}


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count > 1)}"


def _room(target: Target, limit: float | None) -> str:
    """The card's memory, or `memory.limit_gb` where that is less."""
    if limit is not None and limit < target.budget_gb:
        return f"{limit:.1f} GB by memory.limit_gb"
    return f"{target.memory_gb:.1f} GB"


def answer(name: str, target: Target, option: Option, limit: float | None = None) -> str:
    """The recommendation as one sentence. `limit` is `memory.limit_gb`."""
    speed = "" if option.tokens_per_second is None else f", about {rounded(option.tokens_per_second)} tokens/s"
    recompute = "keep all activations" if option.recompute == "none" else f"recompute {option.recompute}"
    return (
        f"{name} on {target.label}: {option.label}, micro-batch {option.micro_batches}, "
        f"{option.max_seq_length:,} tokens, {recompute}, "
        f"{option.held_gb:.1f} of {_room(target, limit)}{speed}"
    )


def rounded(value: float) -> str:
    """Two digits are what a prediction knows."""
    if value < 100:
        return f"{value:.0f}"
    step = 10 ** (len(str(int(value))) - 2)
    return f"{round(value / step) * step:,}"


def refuse_unless_fits(result: dict[str, Any]) -> None:
    """Raise MachineError if nothing of a plan fits."""
    if result["recommended"] is None:
        raise MachineError("\n".join([result["answer"], *result["advice"]]))
