"""The training loop. Every method and objective goes through `train_loop`; it reads from top to bottom.

One optimizer step: take the step's micro-batches (this rank's share of them), add up the gradient of
Σ_terms weight · sum / count(step), clip, step. Counts come from the whole step before the first backward, so the gradient does
not depend on how the step is split. Nothing waits for the GPU between logging points.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tunesmith.config import RunConfig
from tunesmith.data.batches import StepOrder, deal, few_lengths, micro_batches, split
from tunesmith.errors import ConfigError, Interrupted, VerificationError
from tunesmith.hardware import memory_in_use_gb
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import engine_of
from tunesmith.runs import RunFolder
from tunesmith.training.checkpoint import TrainState, load_checkpoint, load_weights, save_checkpoint
from tunesmith.training.graphs import GraphedMicroBatches, micro_batch_graphs
from tunesmith.training.guards import MovementCheck, StopRequest, refuse_not_finite
from tunesmith.training.objectives import Objective
from tunesmith.training.optimizers import Optimizer, learning_rate
from tunesmith.types import Evaluate, EventSink, StepMetrics, TokenizedExample

CHECK_MOVEMENT_AT = 10
"""Steps after which trainable tensors that have not moved are reported; at the end of the run they are an error."""


def train_loop(
    *,
    config: RunConfig,
    run: RunFolder,
    forward: ModelForward,
    objective: Objective,
    optimizer: Optimizer,
    examples: Sequence[TokenizedExample],
    pad_id: int,
    log: EventSink,
    stop: StopRequest,
    evaluate: Evaluate | None = None,
    resume: bool = False,
) -> TrainState:
    """Train to the end of the configured steps, or until early stopping; returns the final state.

    With `resume` the newest checkpoint is loaded first. Raises Interrupted after saving when `stop` is set, and
    VerificationError when the loss is not finite or a trainable tensor has not moved.
    """
    model, training = forward.model, config.training
    order = StepOrder([len(example) for example in examples], training, config.data.packing)
    total_steps = num_steps(config, order.steps_per_epoch)
    rank, world_size = rank_and_world_size()
    eval_every = training.eval_every or order.steps_per_epoch
    save_every = training.save_every or order.steps_per_epoch
    scaler = torch.amp.GradScaler(forward.device.split(":")[0], enabled=forward.dtype == "fp16")

    state = TrainState()
    if resume and (checkpoints := run.checkpoints()):
        state = load_checkpoint(checkpoints[-1][1], model, optimizer.inner, scaler)
        if state.best_value is not None:  # a kill may have come between the checkpoint and this mark
            run.mark_best(state.best_step, _tracked(config)[0], state.best_value)
    movement = MovementCheck(model, state.unmoved)
    began = time.perf_counter() - state.wall_seconds
    model.train()
    window = Window(forward.device)
    if world_size == 1:  # several ranks sum the gradients of the tensors themselves
        optimizer.connect(engine_of(model))
    graphs = micro_batch_graphs(config, forward, objective, optimizer, scaler, log)

    while state.step < total_steps and not state.stopped_early:
        step = [[examples[index] for index in part] for part in order.step(state.step)]
        lr = learning_rate(config.optimizer, config.lr, state.step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = accumulate_gradients(
            forward, objective, deal(step, rank, world_size), config.data.packing, pad_id, scaler, graphs
        )
        grad_norm = optimizer.step(scaler, config.optimizer.max_grad_norm)

        state.step += 1
        window.add(loss, step)
        last = state.step == total_steps
        eval_due = evaluate is not None and (state.step % eval_every == 0 or last)
        save_due = state.step % save_every == 0 or last

        if state.step % training.log_every == 0 or eval_due or save_due:
            _report(window, state, lr, grad_norm, order.steps_per_epoch, scaler, log)
        if state.step == CHECK_MOVEMENT_AT and (names := movement.unmoved() or optimizer.unreached(model)):
            log({"event": "warning", "step": state.step, "message": f"trainable tensors that have not moved: {names}"})
        if eval_due:
            assert evaluate is not None
            values = evaluate(state.step)
            log({"event": "eval", "step": state.step, "metrics": dict(values)})
            if _is_best(state, values, config):
                save_due = True
                log({"event": "best", "step": state.step, "metric": _tracked(config)[0], "value": state.best_value})
            patience = training.early_stopping.patience
            state.stopped_early = (
                training.early_stopping.metric is not None and state.evaluations_without_improvement >= patience
            )
        stopping = stop.signal  # looked at once, so that what is said below was done: a later signal waits for a step
        if stopping is not None and window.examples:
            _report(window, state, lr, grad_norm, order.steps_per_epoch, scaler, log)
        state.wall_seconds = time.perf_counter() - began
        if save_due or stopping is not None or state.stopped_early:
            state.unmoved = movement.unmoved()
            save_checkpoint(run.checkpoint_path(state.step), model, optimizer.inner, state, scaler)
            if state.best_step == state.step and state.best_value is not None:
                run.mark_best(state.step, _tracked(config)[0], state.best_value)
            run.prune_checkpoints(training.save_total_limit, state.best_step)
            log({"event": "checkpoint", "step": state.step})
        if stopping is not None and not last and not state.stopped_early:
            log({"event": "interrupted", "step": state.step, "signal": stopping})
            raise Interrupted(
                f"stopped by {stopping} at step {state.step} of {total_steps}; state saved: `tunesmith resume {run.path}` goes on"
            )
        if eval_due or save_due:
            window.restart()

    if state.step > 1:  # a LoRA A has no gradient in its first step: B is still zero
        movement.refuse_unmoved(optimizer.unreached(model))
    if training.early_stopping.metric is not None and state.best_step not in (0, state.step):
        load_weights(model, run.checkpoint_path(state.best_step))
        state.eval_loss = state.best_eval_loss
        log(
            {
                "event": "decision",
                "message": f"kept the weights of step {state.best_step}, the best {training.early_stopping.metric}",
            }
        )
    return state


def num_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: ⌈epochs · steps_per_epoch⌉, at most `max_steps`."""
    total = max(1, math.ceil(config.training.epochs * steps_per_epoch - 1e-9))  # 0.07 · 100 is 7.000000000000001
    return min(total, config.training.max_steps or total)


def accumulate_gradients(
    forward: ModelForward,
    objective: Objective,
    parts: Sequence[Sequence[TokenizedExample]],
    packing: bool,
    pad_id: int,
    scaler: torch.amp.GradScaler,
    graphs: GraphedMicroBatches | None = None,
) -> torch.Tensor:
    """Add this rank's part of the gradient of one step's loss to the parameters, micro-batch by micro-batch.

    `parts` are the examples of each micro-batch. Returns this rank's part of the loss, a detached fp32 scalar on the
    device; both parts, summed over the ranks, are those of the whole step. Changes nothing but gradients (and, with
    dropout, the random generator): after `zero_grad` it can be called again with smaller parts. `graphs` replays the
    micro-batches whose shape it knows, as long as that pays.
    """
    counts = global_counts(objective.counts(example for part in parts for example in part))
    loss = torch.zeros((), device=forward.device)
    if graphs is not None and graphs.pay:
        graphs.set_counts(counts)
        for batch in micro_batches(parts, packing, pad_id, forward.device, few_lengths):
            loss += graphs.run(batch)
        return loss
    for batch in micro_batches(parts, packing, pad_id, forward.device):
        with forward.autocast():
            terms = objective.terms(forward, batch)
            part = torch.stack([term.weight * term.sum / counts[term.name] for term in terms]).sum()
        scaler.scale(part).backward()
        loss += part.detach()
    if not parts:  # the gradient of nothing is zero, not absent: the scaler and whatever sums over ranks need tensors
        scaler.scale(loss)
        for parameter in forward.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    return loss


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes that share each step; (0, 1) outside torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def global_counts(counts: dict[str, int]) -> dict[str, int]:
    """A step's counts over all ranks: the one place where they are added up. Single-process: as they are."""
    if rank_and_world_size()[1] > 1:
        names = sorted(counts)
        totals = torch.tensor([counts[name] for name in names])
        torch.distributed.all_reduce(totals)
        return dict(zip(names, totals.tolist(), strict=True))
    return counts


def evaluate_loss(
    forward: ModelForward,
    objective: Objective,
    examples: Sequence[TokenizedExample],
    config: RunConfig,
    pad_id: int,
) -> float:
    """The objective over `examples` without gradients, normalised by all their units together.

    The micro-batches are made as in training. Every rank evaluates all of them.
    """
    counts = objective.counts(examples)
    positions = split([len(example) for example in examples], config.training, config.data.packing)
    parts = [[examples[position] for position in part] for part in positions]
    total = torch.zeros((), device=forward.device)
    was_training = forward.model.training
    forward.model.eval()
    try:
        for batch in micro_batches(parts, config.data.packing, pad_id, forward.device):
            with torch.no_grad(), forward.autocast():
                for term in objective.terms(forward, batch):
                    total += term.weight * term.sum / counts[term.name]
    finally:
        forward.model.train(was_training)
    return float(total)


@dataclass
class Window:
    """What happened since the last log line, on all ranks together. Losses stay on the device until `close`."""

    device: str
    started: float = 0.0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    rows: list[str] = field(default_factory=list)  # `file:line` of the examples, in order
    closed_rows: list[str] = field(default_factory=list)  # of the window that was closed last
    loss_sum: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start the clock again, after time that was not training."""
        self.started = time.perf_counter()

    def add(self, loss: torch.Tensor, step: Sequence[Sequence[TokenizedExample]]) -> None:
        """Count one step in, given as the examples of its micro-batches."""
        examples = [example for part in step for example in part]
        supervised = sum(example.supervised for example in examples)
        self.examples += len(examples)
        self.tokens += sum(len(example) for example in examples)
        self.supervised += supervised
        self.rows += [example.where for example in examples]
        weighted = loss * supervised
        self.loss_sum = weighted if self.loss_sum is None else self.loss_sum + weighted

    def close(self, state: TrainState, lr: float, grad_norm: torch.Tensor, steps_per_epoch: int) -> StepMetrics:
        """Wait for the device, report the window, add it to `state` and begin the next one."""
        assert self.loss_sum is not None
        loss_sum, norm = float(self.loss_sum), float(grad_norm)
        seconds = time.perf_counter() - self.started
        metrics = StepMetrics(
            step=state.step,
            epoch=state.step / steps_per_epoch,
            loss=loss_sum / self.supervised,
            lr=lr,
            grad_norm=norm,
            examples=self.examples,
            tokens=self.tokens,
            supervised_tokens=self.supervised,
            seconds=seconds,
            memory_gb=memory_in_use_gb(self.device),
        )
        state.examples += self.examples
        state.tokens += self.tokens
        state.supervised_tokens += self.supervised
        state.seconds += seconds
        state.loss_sum += loss_sum
        self.examples = self.tokens = self.supervised = 0
        self.closed_rows, self.rows = self.rows, []
        self.loss_sum = None
        self.restart()
        return metrics


def _report(
    window: Window,
    state: TrainState,
    lr: float,
    grad_norm: torch.Tensor,
    steps_per_epoch: int,
    scaler: torch.amp.GradScaler,
    log: EventSink,
) -> None:
    """Log the window as a step event. Raises VerificationError if its loss or gradient is not finite."""
    metrics = window.close(state, lr, grad_norm, steps_per_epoch)
    log(metrics.event())
    if warning := refuse_not_finite(metrics, window.closed_rows, scaler):
        log({"event": "warning", "step": state.step, "message": warning})


def _tracked(config: RunConfig) -> tuple[str, str]:
    """The metric that decides which checkpoint is best, and whether `min` or `max` is."""
    early = config.training.early_stopping
    return early.metric or "eval_loss", early.mode or "min"


def _is_best(state: TrainState, values: Mapping[str, float], config: RunConfig) -> bool:
    """Whether this evaluation is the best so far; keeps the count of evaluations without improvement."""
    metric, mode = _tracked(config)
    if metric not in values:
        raise ConfigError(f"training.early_stopping.metric is {metric!r}; this run evaluates {', '.join(values)}")
    value = values[metric]
    if not math.isfinite(value):
        raise VerificationError(
            f"{metric} is {value} in the evaluation at step {state.step}; the last checkpoint is from before it. "
            "Lower optimizer.lr, or look at the evaluation data"
        )
    state.eval_loss = values.get("eval_loss", state.eval_loss)
    sign = 1.0 if mode == "max" else -1.0
    delta = config.training.early_stopping.min_delta
    if state.best_value is None or sign * (value - state.best_value) > delta:
        state.best_value, state.best_step, state.evaluations_without_improvement = value, state.step, 0
        state.best_eval_loss = state.eval_loss
        return True
    state.evaluations_without_improvement += 1
    return False
