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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.cards import CARDS, Card, card_of, find_card
from tunesmith.config import Method, ModelConfig, RunConfig
from tunesmith.errors import ConfigError, MachineError, ModelError
from tunesmith.hardware import ComputeDType
from tunesmith.measurements import ARITHMETIC, Calibration, Measurement, calibration, read_measured
from tunesmith.memory.choose import Choice, best
from tunesmith.memory.estimate import CONTEXT_GB, Setup
from tunesmith.memory.policy import HEADROOM, Mode
from tunesmith.memory.shape import ModelShape
from tunesmith.models.catalogue import CATALOGUE, find_model_config, nearest_models
from tunesmith.models.load import HUB_ID, find_model
from tunesmith.workflows.diagnosis import largest_that_fits, least_gb, smallest_card
from tunesmith.workflows.setups import choices_of, engine_on_gpu, setup_of

SEQUENCE = 2048
"""Tokens of an example where nothing is said of the data."""

SEQUENCES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Lengths that are looked at beside the one that was asked for."""

PARALLEL = 0.95
"""What each card of several reaches of one alone: the ranks wait for each other's gradients."""

RATED_CARD = "H100"
"""The card that speeds were measured on (memory/speed.py)."""


METHOD_NAMES: dict[str, str] = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
"""How people write the methods."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is planned for: `count` cards alike, or so many GB of memory with a card that is not known.

    `measured` is what runs measured, on this card and others.
    """

    name: str
    memory_gb: float
    card: Card | None = None
    count: int = 1
    measured: tuple[Measurement, ...] = ()

    @property
    def budget_gb(self) -> float:
        """What PyTorch may take of one card."""
        return self.memory_gb - CONTEXT_GB

    @property
    def label(self) -> str:
        """How a sentence calls it: `a T4`, `4 H100`."""
        if self.count > 1:
            return f"{self.count} {self.name}"
        article = "an" if self.name[0] in "AHLR" else "a"  # as the letters are said
        return f"{article} {self.name}" if self.card else self.name


@dataclass(frozen=True, slots=True)
class Option:
    """One way to train: the setting, and what it needs and gives. `recompute` is in words; speed is of all cards together.

    `calibration` is in the speed already.
    """

    method: Method
    scheme: str | None
    optimizer: str
    memory_mode: Mode
    micro_batch_size: int
    micro_batch_unit: Literal["examples", "tokens"]
    gradient_accumulation_steps: int
    max_seq_length: int
    recompute: str
    recompute_layers: int
    peak_gb: float
    fits: bool
    tokens_per_second: float | None
    adapter_parameters: int | None
    breakdown: Mapping[str, float]
    calibration: Calibration = ARITHMETIC

    @property
    def basis(self) -> dict[str, Any]:
        """Whether `memory` and `speed` are arithmetic or calibrated on this card, and by how many `runs`."""
        return self.calibration.basis(self.tokens_per_second)

    @property
    def label(self) -> str:
        """How people call the method."""
        return METHOD_NAMES[self.method] + (f" ({self.scheme})" if self.scheme not in (None, "nf4") else "")

    @property
    def micro_batches(self) -> str:
        """Micro-batches of a step: `2 x 8`, or `4,096 tokens x 8`."""
        size = f"{self.micro_batch_size:,} tokens" if self.micro_batch_unit == "tokens" else str(self.micro_batch_size)
        return f"{size} x {self.gradient_accumulation_steps}"


# -- models and cards -------------------------------------------------------------------------------------------------


def find_shape(name: str) -> tuple[str, ModelShape]:
    """A model's name and shape: from a folder's config.json, a known model's, or the hub's. Raises ModelError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve().name, _shape_in(path)
    if path.suffix == ".gguf":
        return path.stem, _shape_in(find_model(ModelConfig(name=name)).path)
    if (known := find_model_config(name)) is not None:
        return known[0].rpartition("/")[2], ModelShape.of(known[1])
    near = nearest_models(name)
    hint = f"; known models like it: {', '.join(near)}" if near else ""
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such model folder and no known model (a hub id looks like org/model){hint}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{name}: its config.json cannot be fetched from the hub ({reason[:200]}){hint}") from error
    return name.rpartition("/")[2], _shape_in(config.parent)


def full_name(name: str) -> str:
    """A known model's hub id for its short name; other names as they are."""
    if "/" in name or not name or Path(name).expanduser().exists() or (known := find_model_config(name)) is None:
        return name
    return known[0]


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


# -- options ----------------------------------------------------------------------------------------------------------


def plan_option(
    config: RunConfig, shape: ModelShape, target: Target, lengths: Sequence[int], supervised: Sequence[int]
) -> Option:
    """The best micro-batch and memory policy of one setting on one card, as `train` would choose them."""
    setup = _setup(config, shape)
    training = config.training
    share = config
    if target.count > 1:
        share = config.model_copy(deep=True)
        share.training.batch_size = -(-training.batch_size // target.count)
        if training.batch_tokens is not None:
            share.training.batch_tokens = max(
                training.micro_batch_tokens or 0, -(-training.batch_tokens // target.count)
            )
    known = calibration(target.measured, target.card, setup.engine, config.method, setup.scheme, shape.num_parameters)
    found = choices_of(share, shape, setup, lengths, supervised, target.budget_gb, target.card, host=known.host)
    return _option(config, shape, setup, target, max(lengths), best(found, config.memory.mode), known)


def _setup(config: RunConfig, shape: ModelShape) -> Setup:
    """Compute in 16 bits, unless fp32 is asked for, with the engine that `train` takes on an NVIDIA GPU."""
    dtype: ComputeDType = "fp32" if config.model.dtype == "fp32" else "bf16"
    return setup_of(config, engine_on_gpu(config, shape), dtype)


def _option(
    config: RunConfig,
    shape: ModelShape,
    setup: Setup,
    target: Target,
    sequence: int,
    choice: Choice,
    known: Calibration,
) -> Option:
    plan, candidate = choice.plan, choice.candidate
    speed = choice.tokens_per_second
    if speed is not None:
        speed *= known.speed * (PARALLEL * target.count if target.count > 1 else 1)
    count = plan.recompute_layers
    words = "none" if not count else f"{count} of {plan.num_layers} layers"
    if any(policy.offload_input for policy in plan.policies):
        words = f"all {plan.num_layers} layers, inputs in host memory"
    return Option(
        method=config.method,
        scheme=setup.scheme,
        optimizer=config.optimizer.name,
        memory_mode=plan.mode,
        micro_batch_size=candidate.size,
        micro_batch_unit=candidate.unit,
        gradient_accumulation_steps=candidate.count,
        max_seq_length=sequence,
        recompute=words,
        recompute_layers=count,
        peak_gb=plan.predicted_peak_gb or 0.0,
        fits=choice.fits,
        tokens_per_second=speed,
        adapter_parameters=None if config.method == "full" else shape.adapter_values(setup.r, setup.targets),
        breakdown=plan.breakdown,
        calibration=known,
    )


def with_settings(config: RunConfig, **changes: Any) -> RunConfig:
    """A copy with other settings, by dotted keys written with `__`. A method that is not QLoRA drops the scheme."""
    values = config.model_dump()
    for key, value in changes.items():
        *path, last = key.split("__")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return RunConfig.model_validate(values)


def micro_batch_of(option: Option) -> dict[str, int]:
    """The micro-batch of an option, as `with_settings` takes it."""
    return {
        f"training__micro_batch_{'tokens' if option.micro_batch_unit == 'tokens' else 'size'}": option.micro_batch_size
    }


WAYS: tuple[tuple[Method, str], ...] = (("full", "nf4"), ("lora", "nf4"), ("qlora", "nf4"), ("qlora", "int8"))
"""Methods, with the scheme of their quantization. Of those that fit the first one is recommended: quantization costs time and
a little of the result, and is there for what does not fit otherwise. Full fine-tuning is for those who ask for it."""

FASTER = 1.1
"""A leaner method is recommended all the same if it is this many times as fast."""


@dataclass(frozen=True, slots=True)
class Data:
    """The examples that are planned for: their tokens, and how many of them are supervised."""

    lengths: Sequence[int]
    supervised: Sequence[int]
    real: bool

    @classmethod
    def of_length(cls, length: int, rows: int) -> Data:
        """Examples of one length, every token supervised: the most memory that such data can need."""
        return cls([length] * rows, [length] * rows, False)


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

    ways = [way for way in _ways(config) if not methods or way[0] in methods]
    main = {way: look(_of(config, way), asked) for way in ways}
    chosen = _recommended([main[way] for way in ways if methods or way[0] != "full"])
    if chosen is not None:
        way = next(way for way, option in main.items() if option is chosen)
        settings = _of(config, way)
        for other in SEQUENCES:
            most = min(shape.context_length or other, config.training.micro_batch_tokens or other)
            if other != length and data is None and other <= most:
                look(settings, Data.of_length(other, config.training.batch_size))
        for mode in ("fast", "min"):
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
        "data": None if data is None else _facts(data),
        "advice": list(_advice(config, name, shape, target, main, chosen, length)),
    }
    if chosen is not None:
        result["answer"] = answer(name, target, chosen)
    else:
        least = [f"{option.label} needs {option.peak_gb:.1f} GB" for option in main.values()]
        result["answer"] = f"{name} does not train on {target.label} ({target.memory_gb:.1f} GB): {', '.join(least)}"
    return result


def _recommended(preferred: Sequence[Option]) -> Option | None:
    """The first that fits, unless a later one is a good deal faster: what has to compute much again is slow."""
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


def _of(config: RunConfig, way: tuple[Method, str]) -> RunConfig:
    method, scheme = way
    scheme = config.quantization.scheme if method != "qlora" else scheme
    return with_settings(config, method=method, quantization__scheme=scheme)


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
    hours = None
    if trained is not None and option.tokens_per_second:
        hours = trained / option.tokens_per_second / 3600
    return values | {"hours": hours, "cost": None if hours is None or price is None else hours * price}


def _facts(data: Data) -> dict[str, int]:
    return {"rows": len(data.lengths), "tokens": sum(data.lengths), "longest": max(data.lengths)}


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
    known = {option.label: option.calibration for option in options if option.calibration.runs}
    if peaks := [peak for each in known.values() for peak in each.peaks]:
        low, high = f"{min(peaks):.0%}", f"{max(peaks):.0%}"
        memory += f"; {_runs(len(peaks))} on this card measured {low if low == high else f'{low} to {high}'} of it"
    if target.card is None:
        speed = "unknown: no card was named"
    elif target.card.name == RATED_CARD:
        speed = "arithmetic with shares of the data sheet that were fitted on an H100, within 15% of what was measured there"
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


def answer(name: str, target: Target, option: Option) -> str:
    """The recommendation as one sentence."""
    speed = "" if option.tokens_per_second is None else f", about {rounded(option.tokens_per_second)} tokens/s"
    recompute = "keep all activations" if option.recompute == "none" else f"recompute {option.recompute}"
    return (
        f"{name} on {target.label}: {option.label}, micro-batch {option.micro_batches}, "
        f"{option.max_seq_length:,} tokens, {recompute}, "
        f"{option.peak_gb:.1f} of {target.memory_gb:.1f} GB{speed}"
    )


def rounded(value: float) -> str:
    """Two digits are what a prediction knows."""
    if value < 100:
        return f"{value:.0f}"
    step = 10 ** (len(str(int(value))) - 2)
    return f"{round(value / step) * step:,}"


def _advice(
    config: RunConfig,
    name: str,
    shape: ModelShape,
    target: Target,
    main: dict[tuple[Method, str], Option],
    chosen: Option | None,
    length: int,
) -> Iterator[str]:
    """What to change to go longer, larger or faster, one line each."""
    if chosen is None:
        least = least_gb(shape, "qlora", config)
        if longest := _longest(_of(config, ("qlora", config.quantization.scheme)), shape, target):
            yield f"method: QLoRA trains here, up to {longest:,} tokens with micro-batch 1 (memory.mode: min)"
            return
        if enough := smallest_card(least):
            yield f"card: QLoRA of {name} needs {least:.1f} GB at least: {enough.name} ({enough.memory_gb:.0f} GB) or more"
        smaller = largest_that_fits(target.budget_gb, config, below=shape.num_parameters)
        if smaller:
            yield f"model: the largest known one that trains here is {smaller} (QLoRA)"
        return
    way = next(way for way, option in main.items() if option is chosen)
    if longest := _longest(_of(config, way), shape, target):
        context = shape.context_length
        if longest > length:
            limit = " (the model's limit)" if longest == context else ""
            yield f"longer: up to {longest:,} tokens{limit} with micro-batch 1 (memory.mode: min)"
        elif way[0] == "lora" and (further := _longest(_of(config, ("qlora", "nf4")), shape, target) or 0) > longest:
            yield f"longer: up to {further:,} tokens with method: qlora"
    larger = largest_that_fits(target.budget_gb, config, below=10**15)
    if larger and ModelShape.of(CATALOGUE[larger]).num_parameters > shape.num_parameters:
        yield f"larger: up to {larger} trains here with QLoRA"
    yield from _faster(config, shape, target, way, chosen, length)


def _faster(
    config: RunConfig, shape: ModelShape, target: Target, way: tuple[Method, str], chosen: Option, length: int
) -> Iterator[str]:
    if target.card is None or chosen.tokens_per_second is None:
        return
    examples = Data.of_length(length, config.training.batch_size)
    if chosen.recompute_layers:
        wide = replace(target, memory_gb=1e4)
        kept = plan_option(
            with_settings(_of(config, way), **micro_batch_of(chosen)),
            shape, wide, examples.lengths, examples.supervised,
        )  # fmt: skip
        needed = kept.peak_gb / HEADROOM + CONTEXT_GB
        if (kept.tokens_per_second or 0) > 1.05 * chosen.tokens_per_second:
            yield (
                f"faster: a card with {needed:.0f} GB would keep all activations, "
                f"{(kept.tokens_per_second or 0) / chosen.tokens_per_second:.2f} times as fast; shorter examples keep more too"
            )
        return
    better = [card for card in CARDS if card.flops > target.card.flops and card.memory_gb >= target.memory_gb]
    if better:
        card = min(better, key=lambda card: card.flops)
        packing = "" if config.data.packing else ", or data.packing: true"
        yield f"faster: everything is kept already; a faster card ({card.name}), or several{packing}"


def _longest(config: RunConfig, shape: ModelShape, target: Target) -> int | None:
    """The longest example, in steps of 512 tokens, that trains with micro-batch 1 and everything computed again."""
    settings = with_settings(
        config, memory__mode="min", training__micro_batch_size=1, training__micro_batch_tokens=None
    )
    limit = shape.context_length or 131_072
    low, high = 0, max(1, limit // 512)

    def fits(length: int) -> bool:
        examples = Data.of_length(length, config.training.batch_size)
        return plan_option(settings, shape, target, examples.lengths, examples.supervised).fits

    if fits(limit):
        return limit
    while low < high:  # the largest number of steps that fits
        middle = (low + high + 1) // 2
        if fits(512 * middle):
            low = middle
        else:
            high = middle - 1
    return 512 * low or None


def refuse_unless_fits(result: dict[str, Any]) -> None:
    """Raise MachineError if nothing of a plan fits."""
    if result["recommended"] is None:
        raise MachineError("\n".join([result["answer"], *result["advice"]]))
