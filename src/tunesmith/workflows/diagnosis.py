"""Why a run does not fit, and what would make it fit: five questions, answered with the run's own numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunesmith.config import Method, RunConfig
from tunesmith.data.lengths import length_stats
from tunesmith.memory.estimate import CONTEXT_GB
from tunesmith.memory.shape import ModelShape
from tunesmith.types import MemoryPlan
from tunesmith.workflows.plan_advice import Way, largest_model, leanest, smallest_card
from tunesmith.workflows.plan_options import Data, Target, by_way, least_needed, trains, with_settings

SMALLEST = 512
"""Tokens of the micro-batch that other methods and models are asked about: one short example."""


def diagnose(
    config: RunConfig,
    shape: ModelShape | None,
    plan: MemoryPlan,
    budget_gb: float,
    where: str,
    lengths: Sequence[int],
    happened: str = "",
    halvings: int = 0,
) -> str:
    """What needs the memory, and five lines on what could change. `where` is the device's name.

    `happened` says what was seen; by default the prediction is said. `halvings` is how often micro-batches were halved.
    """
    predicted = plan.predicted_peak_gb
    need = "an unknown amount" if predicted is None else f"{predicted:.1f} GB"
    first = happened or f"this run needs {need}, and {where} has {budget_gb:.1f} GB for it"
    parts = {name.removesuffix("_gb"): gb for name, gb in plan.breakdown.items() if name != "context_gb" and gb > 0.005}
    if parts:
        first += f" ({', '.join(f'{name} {gb:.1f}' for name, gb in parts.items())})"
    lines = [first]
    lines += [
        f"{number}. {line}" for number, line in enumerate(_steps(config, shape, plan, budget_gb, lengths, halvings), 1)
    ]
    return "\n".join(lines)


def _steps(
    config: RunConfig,
    shape: ModelShape | None,
    plan: MemoryPlan,
    budget_gb: float,
    lengths: Sequence[int],
    halvings: int,
) -> Iterator[str]:
    if plan.mode == "fast":
        yield "activations: memory.mode fast keeps them all; set memory.mode: auto, which computes again what does not fit"
    elif plan.recompute_layers < plan.num_layers:
        yield (
            f"activations: {plan.recompute_layers} of {plan.num_layers} layers compute them again; set memory.mode: min for "
            "all of them"
        )
    else:
        yield f"activations: all {plan.num_layers} layers compute them again already"
    yield _optimizer(config, plan)
    stats = length_stats(lengths)
    limit = config.data.max_seq_length
    yield (
        f"sequence length: examples have up to {stats.max:,} tokens, 95% of them at most {stats.p95:,.0f}; "
        f"data.max_seq_length is {limit}"
        + (
            ""
            if stats.max <= 1.2 * stats.p95
            else f": {64 * -(-int(stats.p95) // 64)} with data.overlong: truncate helps"
        )
    )
    size = config.training.micro_batch_size
    tokens = config.training.micro_batch_tokens
    if halvings:
        planned = f"{tokens} tokens" if tokens is not None else f"{size} examples"
        yield f"micro-batch: {planned}, halved {'once' if halvings == 1 else f'{halvings} times'}: one example already"
    elif tokens is not None:
        yield f"micro-batch: {tokens} tokens (training.micro_batch_tokens); the longest example has {stats.max:,}"
    elif size in (1, "auto"):
        yield "micro-batch: one example already, the least there is"
    else:
        yield f"micro-batch: {size} examples; set training.micro_batch_size: 1 (the effective batch stays)"
    yield "model: " + _what_fits(config, shape, budget_gb)


def _optimizer(config: RunConfig, plan: MemoryPlan) -> str:
    name, held = config.optimizer.name, plan.breakdown.get("optimizer_gb", 0.0)
    weights = ""
    if config.method == "full" and config.model.dtype == "bf16" and config.optimizer.weights_dtype == "fp32":
        weights = "; optimizer.weights_dtype: bf16 halves weights and gradients"
    if "8bit" in name:
        return f"optimizer: {name} has its states in 8 bits already ({held:.1f} GB){weights}"
    return (
        f"optimizer: the states of {name} take {held:.1f} GB; optimizer.name: paged_adamw_8bit takes a quarter of that, and "
        f"waits in host memory where the card is full{weights}"
    )


def _what_fits(config: RunConfig, shape: ModelShape | None, budget_gb: float) -> str:
    if shape is None:
        other = "a smaller model" if config.method == "qlora" else "method: qlora, or a smaller model"
        return f"{config.model.name} is not known to the planner; try {other}"
    target = Target("this card", budget_gb + CONTEXT_GB)
    data = Data.of_length(SMALLEST, config.training.batch_size)
    methods: list[Method] = [method for method in ("lora", "qlora") if _leaner(method, config.method)]
    for method in methods:
        settings = least_settings(config, method)
        if trains(settings, shape, target, data):
            return f"method: {method} would need {least_needed(settings, shape, target, data):.1f} GB at least"
    settings = least_settings(config, "qlora")
    least = least_needed(settings, shape, target, data)
    if trains(settings, shape, target, data):  # so the method is qlora: a leaner one was found above
        return f"small enough: method: qlora needs {least:.1f} GB at least, with one example of {SMALLEST} tokens"
    way: Way = ("qlora", config.quantization.scheme)
    limit = config.memory.limit_gb
    capped = limit is not None and limit <= budget_gb
    enough = None if capped else smallest_card(settings, shape, target, data, [way])
    smaller = largest_model(settings, target, data, [way], below=shape.num_parameters)
    hint = f"method: qlora needs {least:.1f} GB at least"
    hint += f"; the smallest card with that is {enough[0].name}" if enough else ""
    hint += "; raise it if the card has more" if capped else ""
    hint += f"; here the largest known model that trains with qlora is {smaller[0]}" if smaller else ""
    what = f"memory.limit_gb {limit:g}" if capped else "this card"
    return f"{shape.num_parameters / 1e9:.1f}B parameters are too many for {what}: {hint}"


def _leaner(method: Method, than: Method) -> bool:
    order: list[Method] = ["full", "lora", "qlora"]
    return order.index(method) > order.index(than)


def least_settings(config: RunConfig, method: Method) -> RunConfig:
    """What `method` needs the least with: one example at a time, everything computed again, 8-bit optimizer states.

    Without `memory.limit_gb`, which the budget holds already and which is no limit of another card.
    """
    settings = by_way(leanest(config), (method, config.quantization.scheme))
    return with_settings(settings, data__packing=False, memory__limit_gb=None, optimizer__name="paged_adamw_8bit")
