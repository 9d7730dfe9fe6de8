"""Settings that make no sense together: each is legal, and one of them would be ignored or cannot be obeyed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.config import DataConfig, RunConfig, Section

CAUSES = {
    "objective.name": ("objective.",),
    "data.eval_path": ("data.format", "data.columns", "data.roles", "data.sample_by"),
    "data.general_path": ("data.format", "data.columns", "data.roles", "data.sample_by"),
    "data.packing": ("training.micro_batch_tokens",),
    "method": ("adapter.", "quantization.", "optimizer.loraplus_lr_ratio", "optimizer.weights_dtype"),
    "model.dtype": ("optimizer.weights_dtype",),
    "training.batch_size": ("training.micro_batch_size",),
    "training.micro_batch_tokens": ("training.batch_tokens",),
    "training.early_stopping.metric": ("training.early_stopping.",),
}
"""Settings that decide whether others (by prefix) have an effect."""


def contradictions(config: RunConfig) -> dict[str, str]:
    """Settings that are each legal but make no sense together, by the key to change: {key: message}."""
    found: dict[str, str] = {}
    unused = {"full": {"adapter": "lora", "quantization": "qlora"}, "lora": {"quantization": "qlora"}, "qlora": {}}
    for section, method in unused[config.method].items():
        for name in _changed(getattr(config, section)):
            key = f"{section}.{name}"
            found[key] = f"{key} has no effect with method: {config.method}; remove it, or set method: {method}"
    if config.method == "full" and config.optimizer.loraplus_lr_ratio != 1:
        found["optimizer.loraplus_lr_ratio"] = (
            "optimizer.loraplus_lr_ratio has no effect with method: full, which has no adapter; remove it, or set method: lora"
        )
    loftq = config.adapter.init_lora_weights.startswith("loftq")
    if loftq and config.method == "lora":
        found["adapter.init_lora_weights"] = (
            f"adapter.init_lora_weights {config.adapter.init_lora_weights} begins with what quantization lost, and method: lora quantizes "
            "nothing; set method: qlora, or remove it"
        )
    elif loftq and config.quantization.scheme == "int8":
        found["adapter.init_lora_weights"] = (
            f"adapter.init_lora_weights {config.adapter.init_lora_weights} is for 4-bit weights; set quantization.scheme: nf4, or "
            "remove it"
        )
    elif loftq and config.adapter.dora:
        found["adapter.dora"] = (
            f"adapter.dora cannot be written as a plain adapter with init_lora_weights {config.adapter.init_lora_weights}; remove one of "
            "the two"
        )
    if config.optimizer.weights_dtype == "bf16":
        if config.method != "full":
            found["optimizer.weights_dtype"] = (
                f"optimizer.weights_dtype bf16 has no effect with method: {config.method}, whose adapter trains in fp32; remove it, "
                "or set method: full"
            )
        elif config.model.dtype in ("fp16", "fp32"):
            found["optimizer.weights_dtype"] = bf16_weights_need_bf16(config.model.dtype)
    if config.method == "qlora" and config.adapter.init_lora_weights != "default" and not loftq:
        found["adapter.init_lora_weights"] = (
            f"adapter.init_lora_weights {config.adapter.init_lora_weights} changes the frozen weights, which method: qlora holds "
            "quantized; set method: lora, or remove it"
        )
    adapter = config.adapter
    if adapter.init_lora_weights != "default" and adapter.rslora and (adapter.rank_pattern or adapter.alpha_pattern):
        found["adapter.rslora"] = (
            "adapter.rslora and patterns cannot be written as a plain adapter with init_lora_weights "
            f"{adapter.init_lora_weights}; remove adapter.rank_pattern and adapter.alpha_pattern, or adapter.rslora"
        )
    for name in ("modules_to_save", "new_tokens"):
        if adapter.init_lora_weights != "default" and getattr(adapter, name):
            found[f"adapter.{name}"] = (
                f"adapter.{name} cannot be written as a plain adapter with init_lora_weights {adapter.init_lora_weights}; remove one "
                "of the two"
            )
    if config.adapter.init_from and config.method != "full":
        for name in _changed(config.adapter):
            if name == "init_from":
                continue
            key = f"adapter.{name}"
            found[key] = f"{key} has no effect with adapter.init_from: the loaded adapter's own applies; remove it"
    if (
        config.method == "qlora"
        and config.quantization.scheme == "int8"
        and "double_quant" in _changed(config.quantization)
    ):
        found["quantization.double_quant"] = (
            "quantization.double_quant has no effect with quantization.scheme: int8; remove it, or set scheme: nf4 or fp4"
        )
    found |= _preferences(config)
    training = config.training
    if training.micro_batch_size != "auto" and training.micro_batch_size > training.batch_size:
        found["training.micro_batch_size"] = (
            f"training.micro_batch_size {training.micro_batch_size} has no effect beyond training.batch_size "
            f"{training.batch_size}; lower it, or raise training.batch_size"
        )
    found |= _token_budgets(config)
    if training.early_stopping.metric is None:
        for name in _changed(training.early_stopping):
            key = f"training.early_stopping.{name}"
            found[key] = f"{key} has no effect without training.early_stopping.metric; remove it, or set the metric"
    if config.data.eval_path and config.data.eval_fraction:
        found["data.eval_fraction"] = "data.eval_fraction has no effect beside data.eval_path; set one of the two"
    if config.data.path and config.data.mix:
        found["data.path"] = "data.path has no effect beside data.mix; set one of the two"
    found |= _beside_mix(config.data)
    if config.data.eval_split and not config.data.eval_path:
        found["data.eval_split"] = "data.eval_split has no effect without data.eval_path; remove it, or set the path"
    if "tracker_project" in _changed(training) and training.trackers in ("auto", [], ["tensorboard"]):
        found["training.tracker_project"] = (
            "training.tracker_project has no effect without wandb, trackio or mlflow in training.trackers (TensorBoard's files lie in "
            "the run folder); remove it, or name one"
        )
    has_eval = bool(config.data.eval_path or config.data.eval_fraction)
    evaluates = has_eval or bool(config.data.general_path)
    for key, is_set in {
        "training.eval_every": config.training.eval_every is not None and not evaluates,
        "training.early_stopping.metric": config.training.early_stopping.metric is not None and not evaluates,
        "evaluation.generate": config.evaluation.generate and not has_eval,
        "evaluation.samples": config.evaluation.samples > 0 and not has_eval,
    }.items():
        if is_set:
            found[key] = f"{key} needs evaluation data; set data.eval_path or data.eval_fraction"
    return found


def bf16_weights_need_bf16(dtype: str) -> str:
    """The message for bf16 weights in a model that computes in another type, which `model.dtype: auto` may turn out to be."""
    return (
        f"optimizer.weights_dtype bf16 needs a model that computes in bf16, and model.dtype is {dtype}; set model.dtype: bf16 where "
        "the device has it, or remove optimizer.weights_dtype"
    )


OBJECTIVES_OF = {
    "beta": ("dpo", "orpo", "simpo", "kto"),
    "loss": ("dpo",),
    "label_smoothing": ("dpo", "simpo"),
    "nll_weight": ("dpo",),
    "gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Which objectives have a setting of the `objective` section."""


def _preferences(config: RunConfig) -> dict[str, str]:
    """Settings of the objective that another one has, and what preferences cannot do, by the key to change."""
    found: dict[str, str] = {}
    objective = config.objective
    for name in _changed(objective):
        names = OBJECTIVES_OF.get(name, (objective.name,))
        if objective.name not in names:
            key = f"objective.{name}"
            found[key] = (
                f"{key} has no effect with objective.name: {objective.name}; remove it, or set the name to {' or '.join(names)}"
            )
    if objective.label_smoothing and objective.name == "dpo" and objective.loss != "sigmoid":
        found["objective.label_smoothing"] = (
            f"objective.label_smoothing has no effect with objective.loss: {objective.loss}; remove it, or set loss: sigmoid"
        )
    if not config.pairs:
        return found
    if config.data.packing is not True:
        found["data.packing"] = (
            f"data.packing: {str(config.data.packing).lower()} cannot be with objective.name: {objective.name}: both sequences of a pair are packed, which "
            "gives the same loss without padding; remove it"
        )
    if config.data.train_on != "assistant":
        found["data.train_on"] = (
            f"data.train_on has no effect with objective.name: {objective.name}, which compares the answers alone; remove it"
        )
    if config.data.overlong == "split":
        found["data.overlong"] = (
            f"data.overlong: split cannot be with objective.name: {objective.name}: an answer's pieces cannot be compared; set "
            "truncate or drop"
        )
    if config.training.batch_tokens is not None:
        found["training.batch_tokens"] = (
            f"training.batch_tokens cannot be with objective.name: {objective.name}, whose steps are counted in rows; set "
            "training.batch_size"
        )
    if config.evaluation.generate:
        found["evaluation.generate"] = (
            f"evaluation.generate cannot be with objective.name: {objective.name}: preferences have no expected answer; remove it"
        )
    return found


def _beside_mix(data: DataConfig) -> dict[str, str]:
    """Settings of one source beside `data.mix`, whose sources have their own, by the key to change."""
    found: dict[str, str] = {}
    for name in _changed(data) if data.mix else ():
        if name not in type(data.mix[0]).model_fields or name == "path":
            continue
        why = "beside data.mix"
        if name in ("format", "columns", "roles", "sample_by"):  # these also say how held-out data is read
            if data.eval_path or data.general_path:
                continue
            why += " without data.eval_path"
        found[f"data.{name}"] = f"data.{name} has no effect {why}; set it in the sources instead"
    return found


def _token_budgets(config: RunConfig) -> dict[str, str]:
    """What is wrong with micro-batches and steps that are measured in tokens, by the key to change."""
    found: dict[str, str] = {}
    training, length = config.training, config.data.max_seq_length
    micro, batch = training.micro_batch_tokens, training.batch_tokens
    if micro is not None:
        if config.data.packing is False:
            found["training.micro_batch_tokens"] = (
                "training.micro_batch_tokens needs packing; set data.packing: true, or remove it and set "
                "training.micro_batch_size"
            )
        most, what = (micro // 2, "half of ") if config.pairs else (micro, "")
        if length != "auto" and length > most:
            found["data.max_seq_length"] = (
                f"data.max_seq_length {length} is more than {what}training.micro_batch_tokens {micro}: the longest "
                f"{'pair' if config.pairs else 'example'} would fit into no micro-batch; set data.max_seq_length to {most} or "
                "less, or raise training.micro_batch_tokens"
            )
        if "micro_batch_size" in _changed(training):
            found["training.micro_batch_size"] = (
                "training.micro_batch_size has no effect with training.micro_batch_tokens; remove one of the two"
            )
    if batch is not None:
        if micro is None:
            found["training.batch_tokens"] = (
                "training.batch_tokens needs training.micro_batch_tokens, which divides it; set that too, or use "
                "training.batch_size"
            )
        elif batch % micro:
            allowed = " or ".join(str(n * micro) for n in (batch // micro, batch // micro + 1) if n)
            found["training.batch_tokens"] = (
                f"training.batch_tokens {batch} is not a multiple of training.micro_batch_tokens {micro}; set it to {allowed}"
            )
        if "batch_size" in _changed(training):
            found["training.batch_size"] = (
                "training.batch_size has no effect with training.batch_tokens; remove one of the two"
            )
    return found


def _changed(section: Section) -> list[str]:
    """Names of the settings that differ from their defaults. A default that is written out changes nothing."""
    unset = type(section)()
    return [name for name in type(section).model_fields if getattr(section, name) != getattr(unset, name)]
