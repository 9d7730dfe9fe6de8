"""Train a run from its configuration, or go on with one: check everything, load, train, save, report.

`start` and `restart` do all that can fail early, in the order of what it costs: settings, rows, the model's small files,
tokens (so far `check`), then the weights.
`TrainingSession.train` trains.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.config import ModelConfig, QuantizationConfig, RunConfig
from tunesmith.data.batches import StepOrder, num_steps
from tunesmith.data.chat import ChatFormat
from tunesmith.data.pairs import PairStore
from tunesmith.errors import ConfigError, MachineError, RunError
from tunesmith.evaluation.tasks import find_training_task, generated_metrics, may_measure
from tunesmith.files import atomic_folder, disk_errors, write_atomic, write_json
from tunesmith.hardware import (
    ComputeDType,
    Hardware,
    memory_in_use_gb,
    probe,
    torch_dtype,
)
from tunesmith.memory.estimate import STATE_BYTES
from tunesmith.models.adapters import (
    add_adapter,
    add_tokens,
    count_parameters,
    find_adapter,
    keep_trainable_in_fp32,
    left_out,
    save_adapter,
    unquantized_experts,
)
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import (
    ModelSource,
    fetch_weights,
    find_model,
    load_model,
    load_tokenizer,
    misread_on_cpu,
    pad_token,
    refuse_quantizing_again,
    weight_hash,
)
from tunesmith.out_of_memory import Halving
from tunesmith.runs import RunFolder, default_run_path
from tunesmith.training.checkpoint import TrainState
from tunesmith.training.guards import stop_on_signal
from tunesmith.training.loop import train_loop
from tunesmith.training.objectives import Objective
from tunesmith.training.optimizers import Optimizer, make_optimizer
from tunesmith.training.preferences import METRICS, objective_of, reference_log_probabilities
from tunesmith.training.prepare import apply_plan, check_forward, check_fused, prepare
from tunesmith.training.trackers import trackers_of, tracking
from tunesmith.types import (
    GB,
    Event,
    EventSink,
    Progress,
    TokenizedExample,
    TrainResult,
    no_progress,
)
from tunesmith.workflows.diagnosis import diagnose
from tunesmith.workflows.dry_step import DryStep, calibrated
from tunesmith.workflows.lineage import refuse_changed, run_metadata
from tunesmith.workflows.load import (
    RECORD_NAME,
    TEMPLATE_NAME,
    adapter_record,
    chat_format,
    refuse_changed_adapter,
    tokenizer_source,
)
from tunesmith.workflows.measure import StepTimes, keep_measured
from tunesmith.workflows.rows import RunData, read_rows, tokenize_rows
from tunesmith.workflows.rules import settings_warnings
from tunesmith.workflows.run_plan import RunPlan, limit_memory, plan_run, refuse_what_cannot_fit
from tunesmith.workflows.setups import training_dtype
from tunesmith.workflows.training_evaluation import TrainingEvaluation, judge_problems, measured_answers

LoadBase = Callable[[ModelSource, ModelConfig, Hardware, ComputeDType, QuantizationConfig | None], Any]
"""Loads a base as `load_model` does. Several runs over one base can share it (workflows/shared_base.py)."""


def no_event(event: Event) -> None:
    """An EventSink that drops everything."""


@dataclass
class TrainingSession:
    """A run that is ready to train: everything was checked and loaded."""

    config: RunConfig
    run: RunFolder
    data: RunData
    source: ModelSource
    tokenizer: Any
    chat: ChatFormat
    hardware: Hardware
    forward: ModelForward
    objective: Objective
    optimizer: Optimizer
    plan: RunPlan
    resumed: bool
    saves_tokenizer: bool = False
    engine_notes: Sequence[str] = ()
    calibration: Sequence[Event] = ()

    def train(self, sink: EventSink = no_event, progress: Progress = no_progress) -> TrainResult:
        """Train to the end, save the result, write metrics.json. Events go to events.jsonl and to `sink`."""
        with (
            locked(self.run.path, "another process is training this run"),
            self.run.event_log() as write,
            tracking(self.config, self.run) as track,
            stop_on_signal() as stop,
        ):
            times = StepTimes()

            def log(event: Event) -> None:
                write(event)
                sink(event)
                times.add(event)
                track(event)

            checkpoints = self.run.checkpoints()
            if self.resumed:
                log({"event": "resume", "step": checkpoints[-1][0] if checkpoints else 0})
            log(self._start_event())
            for file in self.data.facts["files"]:
                log({"event": "decision", "message": "{path}: {container}, form {form}, {rows} rows".format(**file)})
            for note in [*self.data.notes, *self._settings_notes()]:
                log({"event": "warning", "message": note})
            for note in self.engine_notes:
                log({"event": "decision", "message": note})
            for event in self.calibration:
                log(event)
            if self.objective.needs_reference:
                self._refer(log, progress)
            state = train_loop(
                config=self.config,
                run=self.run,
                forward=self.forward,
                objective=self.objective,
                optimizer=self.optimizer,
                examples=self.data.train,
                pad_id=pad_token(self.tokenizer),
                log=log,
                stop=stop,
                evaluate=self._evaluation(log, progress) if self.data.eval or self.data.general else None,
                resume=self.resumed,
                tokens_per_second=self.plan.tokens_per_second,
                least_memory=self._least_memory,
                diagnose=self._diagnose,
            )
            self._save_result()
            metrics = self._metrics(state)
            self.run.write_metrics(metrics)
            keep_measured(self.config, self.plan, state, times, self.calibration, metrics["peak_memory_gb"], log)
            status = "stopped_early" if state.stopped_early else "finished"
            log({"event": "end", "status": status, "step": state.step})
        return TrainResult(str(self.run.path), "stopped_early" if state.stopped_early else "finished", metrics)

    def _settings_notes(self) -> list[str]:
        """What the settings make one expect of this data."""
        examples = self.data.train
        tokens = sum(len(example) for example in examples)
        supervised = sum(example.supervised for example in examples)
        return settings_warnings(self.config, len(examples), tokens, supervised)

    def _refer(self, log: EventSink, progress: Progress) -> None:
        """What the model says of every pair before training: from the run folder, or computed and kept there."""
        stores = {
            name: store
            for name, store in (("train", self.data.train), ("eval", self.data.eval))
            if isinstance(store, PairStore)
        }
        kept = self.run.read_reference() if self.resumed else None
        if kept is None:
            halving = Halving(lambda text: log({"event": "warning", "message": text}))
            began = time.perf_counter()
            kept = {
                name: reference_log_probabilities(
                    self.forward,
                    store,
                    self.config,
                    pad_token(self.tokenizer),
                    progress,
                    f"reference of the {name} pairs",
                    halving,
                )
                for name, store in stores.items()
                if len(store)
            }
            self.run.write_reference(kept)
            pairs, seconds = sum(map(len, stores.values())), time.perf_counter() - began
            log({"event": "decision", "message": f"reference: log-probabilities of {pairs:,} pairs, {seconds:.1f} s"})
        for name, values in kept.items():
            stores[name].reference = values

    def _least_memory(self) -> bool:
        """Compute everything again that can be; whether that is less than before."""
        least = self.plan.least()
        if least is self.plan:
            return False
        self.plan = least
        apply_plan(self.forward, least.memory)
        return True

    def _diagnose(self, happened: str, halvings: int) -> str:
        plan, lengths = self.plan, [len(example) for example in self.data.train]
        return diagnose(
            self.config, plan.shape, plan.memory, plan.budget_gb, self.hardware.name, lengths, happened, halvings
        )

    def _evaluation(self, log: EventSink, progress: Progress) -> TrainingEvaluation:
        return TrainingEvaluation(
            self.config,
            self.run,
            self.data,
            self.forward,
            self.tokenizer,
            self.chat,
            self.objective,
            log,
            progress,
            self.hardware.device,
        )

    def _save_result(self) -> None:
        """`adapter/` for an adapter (with the tokenizer, if it has new tokens), `model/` (with tokenizer, in the compute type) for full fine-tuning."""
        model = self.forward.model
        if self.config.method != "full":
            with atomic_folder(self.run.adapter_path) as folder:
                save_adapter(model, folder)
                if self.saves_tokenizer:
                    self.tokenizer.save_pretrained(folder)
                write_atomic(folder / TEMPLATE_NAME, self.chat.template)
                write_json(folder / RECORD_NAME, adapter_record(self.run, folder))
            return
        dtype = torch_dtype(self.forward.dtype)
        converted: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay tied
        state = {}
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in converted:
                converted[tensor.data_ptr()] = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
            state[name] = converted[tensor.data_ptr()]
        with atomic_folder(self.run.model_path) as folder:
            self.forward.base.save_pretrained(folder, state_dict=state)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))  # says the type it was trained in
            write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
            self.tokenizer.chat_template = self.chat.template
            self.tokenizer.save_pretrained(folder)

    def _start_event(self) -> Event:
        trainable, total = count_parameters(self.forward.model)
        lengths = [len(example) for example in self.data.train]
        order = StepOrder(lengths, self.config.training, self.config.data.packed)
        return {
            "event": "start",
            "steps": num_steps(self.config.training, order.steps_per_epoch),
            "examples": len(self.data.train),
            "method": self.config.method,
            "engine": self.plan.memory.engine,
            "device": self.hardware.name,
            "on_gpu": self.hardware.type == "cuda",
            "dtype": self.forward.dtype,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "memory": self.plan.memory.reason,
            "micro_batch_size": self.config.training.micro_batch_size,
            "micro_batch_tokens": self.config.training.micro_batch_tokens,
            "packing": self.config.data.packed,
            "recompute_layers": self.plan.memory.recompute_layers,
            "predicted_peak_gb": self.plan.memory.predicted_peak_gb,
            "predicted_tokens_per_second": self.plan.tokens_per_second,
            "basis": self.plan.basis,
            "breakdown": dict(self.plan.memory.breakdown),
        }

    def _metrics(self, state: TrainState) -> dict[str, Any]:
        trainable, total = count_parameters(self.forward.model)
        rate = 1 / state.seconds if state.seconds else 0.0
        return {
            "steps": state.step,
            "tokens_per_second": state.tokens * rate,
            "supervised_tokens_per_second": state.supervised_tokens * rate,
            "examples_per_second": state.examples * rate,
            "peak_memory_gb": memory_in_use_gb(self.hardware.device),
            "train_loss": state.loss_sum / state.loss_units if state.loss_units else None,
            "eval_loss": state.eval_loss,
            "best_step": state.best_step or None,
            "supervised_tokens": state.supervised_tokens,
            "wall_seconds": state.wall_seconds,
            "train_seconds": state.seconds,
            "trainable_parameters": trainable,
            "total_parameters": total,
        }


def start(
    config: RunConfig, out: Path | None = None, progress: Progress = no_progress, load_base: LoadBase | None = None
) -> TrainingSession:
    """Check everything about a new run, load it (with `load_base`, else `load_model`), and make its folder.

    Raises UserError or MachineError.
    """
    config = with_absolute_paths(config.resolved())
    path = out or default_run_path(config)
    RunFolder.refuse_existing(path)
    return _build(config, path, None, progress, load_base)


def restart(path: Path, progress: Progress = no_progress, load_base: LoadBase | None = None) -> TrainingSession:
    """Load a run to go on with it from its newest checkpoint. Refused if its data or base has changed since."""
    run = RunFolder.open(path)
    if run.metrics:
        raise RunError(f"{path}: this run is finished ({run.metrics['steps']} steps); there is nothing to resume")
    return _build(run.config, path, run, progress, load_base)


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a run before its model's weights are fetched and read."""

    hardware: Hardware
    dtype: ComputeDType
    source: ModelSource
    tokenizer: Any
    saves_tokenizer: bool
    new_ids: Sequence[int]
    chat: ChatFormat
    data: RunData


def check(config: RunConfig, existing: RunFolder | None = None, progress: Progress = no_progress) -> Checked:
    """All that can be found wrong with a run, or with going on with `existing`, before weights are read.

    Writes into `config` what `model.dtype: auto` means here. Raises UserError or MachineError.
    """
    _check_settings(config)
    trackers_of(config)
    hardware = probe(config.model.device)
    dtype = config.model.dtype = training_dtype(config, hardware)  # what `auto` means here
    progress("reading the data", 0, 1)
    rows = read_rows(config)
    source = find_model(config.model)
    if config.method == "qlora":
        refuse_quantizing_again(source)
    beginning = find_adapter(Path(config.adapter.init_from)) if config.adapter.init_from else None
    if beginning:
        of = Path(config.adapter.init_from)  # type: ignore[arg-type]  # there is a beginning
        refuse_changed_adapter(RunFolder.open(of) if RunFolder.is_run(of) else None, beginning)
    with_tokenizer = tokenizer_source(source, beginning)
    tokenizer = load_tokenizer(with_tokenizer, config.model)
    new_ids = add_tokens(tokenizer, config.adapter.new_tokens)
    chat = chat_format(tokenizer, config, existing)
    data = tokenize_rows(config, chat, rows, progress, source.context_length)
    if config.evaluation.generate:
        _check_task(config, data)
    data.notes.extend(_never_seen(config.adapter.new_tokens, new_ids, data.train))
    refuse_what_cannot_fit(config, source.config, hardware, dtype, data.train)
    saves_tokenizer = bool(new_ids) or with_tokenizer is not source
    return Checked(hardware, dtype, source, tokenizer, saves_tokenizer, new_ids, chat, data)


def _build(
    config: RunConfig, path: Path, existing: RunFolder | None, progress: Progress, load_base: LoadBase | None
) -> TrainingSession:
    known = check(config, existing, progress)
    hardware, dtype, data = known.hardware, known.dtype, known.data
    source = fetch_weights(known.source, config.model)
    config.model.revision = source.revision  # what a branch meant when it began
    base_hash = weight_hash(source)
    if existing:
        refuse_changed(existing, source, base_hash, data.facts)

    progress("loading the model", 0, 1)
    limit_memory(config, hardware)
    torch.manual_seed(config.training.seed)
    model = _load_trainable(config, source, hardware, dtype, known.new_ids, load_base or load_model)
    data.notes.extend(filter(None, [unquantized_experts(model), misread_on_cpu(model), _left_out(config, model)]))
    progress("loading the model", 1, 1)
    forward = ModelForward(model, hardware.device, dtype)
    _check_disk(path, model, config)
    ready = make_ready(config, forward, hardware, data.train, pad_token(known.tokenizer))
    run = existing or RunFolder.create(
        path,
        config,
        run_metadata(config, source, base_hash, known.chat, data, hardware, forward),
        known.chat.raw_template,
    )
    return TrainingSession(
        config=config,
        run=run,
        data=data,
        source=source,
        tokenizer=known.tokenizer,
        chat=known.chat,
        hardware=hardware,
        forward=forward,
        objective=ready.objective,
        optimizer=ready.optimizer,
        plan=ready.plan,
        resumed=existing is not None,
        saves_tokenizer=known.saves_tokenizer,
        engine_notes=ready.engine_notes,
        calibration=ready.calibration,
    )


@dataclass(frozen=True, slots=True)
class Ready:
    """What training needs beside the model: how it uses memory, what steps it, and what was noted on the way."""

    plan: RunPlan
    objective: Objective
    optimizer: Optimizer
    engine_notes: Sequence[str]
    calibration: Sequence[Event]


def make_ready(
    config: RunConfig, forward: ModelForward, hardware: Hardware, examples: Sequence[TokenizedExample], pad_id: int
) -> Ready:
    """Plan memory for a loaded model, prepare it accordingly, make its optimizer, and hold the plan to a dry step.

    Writes the micro-batch and packing into `config` where they were `auto`. Raises MachineError for what cannot fit.
    """
    forward.neftune_alpha = config.training.neftune_alpha
    plan = plan_run(config, forward, hardware, examples)
    check_forward(forward, config.data.packed)
    forward.loss_rows = plan.memory.loss_rows
    notes: list[str] = []
    prepare(forward.model, plan.memory, torch_dtype(forward.dtype), notes.append)
    if plan.memory.engine == "fused":
        check_fused(forward)
    optimizer = make_optimizer(forward.model, config.optimizer, config.lr)
    objective = objective_of(config)
    dry = DryStep(config, forward, objective, optimizer, hardware, examples, pad_id)
    plan, calibration = calibrated(plan, dry)
    return Ready(plan, objective, optimizer, notes, calibration)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """A run must be usable from any folder: paths that exist are written out whole. Hub ids stay as they are."""
    paths = (
        ("model", "name"), ("data", "path"), ("data", "eval_path"), ("data", "general_path"), ("adapter", "init_from"),
    )  # fmt: skip
    for section, key in paths:
        value = getattr(getattr(config, section), key)
        if value and Path(value).expanduser().exists():
            setattr(getattr(config, section), key, str(Path(value).expanduser().absolute()))
    evaluation = config.evaluation
    for key in ("json_schema", "retain_path", "tasks_path", "safety_path"):
        if (value := getattr(evaluation, key)) and Path(value).expanduser().exists():
            setattr(evaluation, key, str(Path(value).expanduser().absolute()))
    if Path(evaluation.judge.rubric).expanduser().is_file():
        evaluation.judge.rubric = str(Path(evaluation.judge.rubric).expanduser().absolute())
    evaluation.metrics = [
        f"{Path(file).expanduser().absolute()}{colon}{name}"
        if Path(file).expanduser().is_file()
        else f"{file}{colon}{name}"
        for file, colon, name in (reference.rpartition(":") for reference in evaluation.metrics)
    ]
    for source in config.data.mix:
        if source.path and Path(source.path).expanduser().exists():
            source.path = str(Path(source.path).expanduser().absolute())
    template = Path(config.data.chat_template)
    if template.is_file():
        config.data.chat_template = str(template.absolute())
    return config


def _check_settings(config: RunConfig) -> None:
    """What the configuration alone says, all problems at once."""
    problems = []
    if not config.model.name:
        problems.append("no model: pass --model, or set model.name")
    if not config.data.path and not config.data.mix:
        problems.append("no training data: pass --data, or set data.path or data.mix")
    problems += [f"data.mix[{number}] has no path" for number, source in enumerate(config.data.mix) if not source.path]
    metric = config.training.early_stopping.metric
    held_out = config.data.eval_path or config.data.eval_fraction
    known = ["eval_loss", *(["perplexity"] if config.objective.name == "cpt" else [])] if held_out else []
    known += [f"eval_{name}" for name in METRICS[config.objective.name]] if held_out else []
    known += ["general_loss", "general_perplexity"] if config.data.general_path else []
    known += measured_answers(config.evaluation)
    problems += judge_problems(config.evaluation)
    if metric is not None and metric not in known:
        hint = "; set evaluation.generate: true for accuracy" if metric in generated_metrics("auto") else ""
        problems.append(f"training.early_stopping.metric is {metric!r}: this run evaluates {', '.join(known)}{hint}")
    if problems:
        raise ConfigError(problems)


def _check_task(config: RunConfig, data: RunData) -> None:
    """The settings of the answers' metrics fit the rows, and early stopping looks at one that they have."""
    task = find_training_task(data.eval_rows, config.evaluation)
    metric = config.training.early_stopping.metric
    if metric in generated_metrics("auto") and not may_measure(task, metric):
        raise ConfigError(
            f"training.early_stopping.metric is {metric!r}: the held-out rows are the task {task.kind} ({task.reason}), which has "
            "no such metric"
        )


def _load_trainable(
    config: RunConfig,
    source: ModelSource,
    hardware: Hardware,
    dtype: ComputeDType,
    new_ids: Sequence[int],
    load_base: LoadBase,
) -> Any:
    """The model with its trainable weights in fp32: an adapter over a frozen base, or the whole model, which may be in bf16."""
    if config.method == "full" and config.optimizer.weights_dtype == "bf16":
        return load_base(source, config.model, hardware, "bf16", None)
    if config.method == "full":
        model = load_base(source, config.model, hardware, "fp32", None)
        keep_trainable_in_fp32(model)
        return model
    quantization = config.quantization if config.method == "qlora" else None
    model = load_base(source, config.model, hardware, dtype, quantization)
    # A hub id stays one; a folder is recorded by its absolute path (for a GGUF file, where its safetensors are).
    base_name = source.name if source.revision else str(source.path.absolute())
    return add_adapter(model, config.adapter, base_name, new_ids, source.path)


def _left_out(config: RunConfig, model: Any) -> str | None:
    """What to say of linear layers that a fresh adapter is not on, though its preset seems to mean them."""
    if config.method == "full" or config.adapter.init_from:
        return None
    return left_out(model.config.model_type, config.adapter.target_modules)


def _never_seen(tokens: Sequence[str], ids: Sequence[int], examples: Sequence[TokenizedExample]) -> list[str]:
    """What to say of new tokens that no example has: nothing teaches their embeddings. Raises ConfigError if none has any."""
    found = (
        {number for example in examples for number in np.intersect1d(example.input_ids, ids).tolist()} if ids else set()
    )
    missing = [repr(token) for token, number in zip(tokens, ids, strict=True) if number not in found]
    if not missing:
        return []
    if not found:
        raise ConfigError(
            f"adapter.new_tokens: no training example holds {', '.join(missing)}, so that nothing would be learnt of them; write them "
            "into the data as they are here, or remove the setting"
        )
    return [f"adapter.new_tokens: no training example holds {', '.join(missing)}; nothing teaches what they mean"]


def _check_disk(path: Path, model: Any, config: RunConfig) -> None:
    """Raise MachineError unless the checkpoints that will stand side by side, and the result, have room."""
    trainable, _ = count_parameters(model)
    weight = 2 if config.optimizer.weights_dtype == "bf16" else 4
    checkpoint = trainable * (weight + STATE_BYTES[config.optimizer.name])
    kept = (config.training.save_total_limit or 1) + 2  # the best one, and the one being written
    needed = (kept * checkpoint + weight * trainable) / GB
    free = shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.exists())).free / GB
    if free < needed:
        raise MachineError(
            f"{path}: the run needs about {needed:.2f} GB for {kept} checkpoints and its result, {free:.2f} GB are free; "
            "free some space, choose another --out, or lower training.save_total_limit"
        )


@contextmanager
def locked(folder: Path, otherwise: str) -> Iterator[None]:
    """Hold a folder: two processes that work in it would write over each other. The system frees it when we die.

    Raises RunError that says `otherwise` where another process holds it.
    """
    with disk_errors(folder):
        lock = (folder / ".lock").open("w")
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: {otherwise}") from None
        file.write(str(os.getpid()))
        file.flush()
        yield
