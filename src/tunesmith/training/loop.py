"""The training loop. Every method and objective goes through `train_loop`; it reads from top to bottom.

One optimizer step: take the step's micro-batches (this rank's share of them), add up the gradient of
Σ_terms weight · sum / count(step), clip, step. Counts come from the whole step before the first backward, so the gradient does
not depend on how the step is split, and a step that runs out of memory is done again in smaller parts (recovery.py). Steps
that are not finite, or spikes, are not taken (skips.py). Nothing waits for the GPU between logging points.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from tunesmith.config import RunConfig
from tunesmith.data.batches import StepOrder, deal, micro_batches, num_steps
from tunesmith.data.widening import few_lengths
from tunesmith.errors import ConfigError, Interrupted, VerificationError
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import engine_of
from tunesmith.models.row_dropout import step_seed
from tunesmith.out_of_memory import Halving
from tunesmith.runs import RunFolder
from tunesmith.training.checkpoint import TrainState, load_checkpoint, load_weights, save_checkpoint
from tunesmith.training.graphs import GraphedMicroBatches, micro_batch_graphs
from tunesmith.training.guards import MovementCheck, StopRequest
from tunesmith.training.monitor import Monitor, Signal
from tunesmith.training.objectives import Metrics, Objective, Parts, StepTools, means
from tunesmith.training.optimizers import Optimizer, learning_rate
from tunesmith.training.passes import evaluating, parts_of, without_gradients
from tunesmith.training.recovery import MemoryRecovery, allocate_states
from tunesmith.training.skips import MAX_ROLLBACKS, ROLLBACK_FACTOR, Skips, StepJudge
from tunesmith.training.window import Window
from tunesmith.types import Batch, Evaluate, EventSink, Term, TokenizedExample

CHECK_MOVEMENT_AT = 10
"""Steps after which trainable tensors that have not moved are reported; at the end of the run they are an error."""

JUDGE_SCORE = "judge_score"
"""The metric that comes from another machine."""


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
    tokens_per_second: float | None = None,
    least_memory: Callable[[], bool] = lambda: False,
    diagnose: Callable[[str, int], str] = lambda happened, halvings: happened,
) -> TrainState:
    """Train to the end of the configured steps, or until early stopping; returns the final state.

    With `resume` the newest checkpoint is loaded first. `tokens_per_second` is what was predicted; `least_memory` and
    `diagnose` are recovery.py's, for a step that runs out of memory. Raises Interrupted after saving when `stop` is set,
    VerificationError when steps go wrong again and again or a trainable tensor has not moved, and MachineError when memory
    does not suffice whatever is given up.
    """
    model, training = forward.model, config.training
    order = StepOrder([len(example) for example in examples], training, config.data.packed)
    total_steps = num_steps(config.training, order.steps_per_epoch)
    rank, world_size = rank_and_world_size()
    eval_every = training.eval_every or order.steps_per_epoch
    save_every = training.save_every or order.steps_per_epoch
    scaler = torch.amp.GradScaler(forward.device.split(":")[0], enabled=forward.dtype == "fp16")

    state = TrainState()
    allocate_states(optimizer, diagnose)
    if resume and (checkpoints := run.checkpoints()):
        state = load_checkpoint(checkpoints[-1][1], model, optimizer.inner, scaler)
        if state.best_value is not None:  # a kill may have come between the checkpoint and this mark
            run.mark_best(state.best_step, _tracked(config)[0], state.best_value)
    movement = MovementCheck(model, state.unmoved)
    began = time.perf_counter() - state.wall_seconds
    model.train()
    window = Window(forward.device, objective.by_tokens)
    if world_size == 1:  # several ranks sum the gradients of the tensors themselves
        optimizer.connect(engine_of(model))
    graphs = micro_batch_graphs(config, forward, objective, optimizer, scaler, log)
    judge = StepJudge(forward.device, config.optimizer.max_grad_norm, config.optimizer.skip_spikes, state.norms)
    memory = MemoryRecovery(
        state, config.data.packed, world_size, optimizer, scaler, graphs, log, least_memory, diagnose
    )
    skips = Skips()
    metrics: Metrics = {}  # of the step's last attempt
    monitor = Monitor(config, total_steps, first_step=state.step, predicted_tokens_per_second=tokens_per_second)
    say(monitor.start(order.lengths), state.step, log)

    while state.step < total_steps and not state.stopped_early:
        step = [[examples[index] for index in part] for part in order.step(state.step)]
        lr = state.lr_scale * learning_rate(config.optimizer, config.lr, state.step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        forward.dropout_seed = step_seed(training.seed, state.step)

        def attempt(parts: Parts) -> tuple[torch.Tensor, ...]:
            metrics.clear()
            loss = accumulate_gradients(
                forward, objective, deal(parts, rank, world_size), config.data.packed, pad_id, scaler, graphs, metrics
            )
            bad: list[torch.Tensor] = []

            def verdict(grad_norm: torch.Tensor) -> torch.Tensor:
                bad.append(judge.bad(loss if world_size == 1 else grad_norm, grad_norm))
                return bad[0]

            grad_norm = optimizer.step(
                scaler, config.optimizer.max_grad_norm, verdict, rounding_seed=step_seed(training.seed, state.step)
            )
            return loss, grad_norm, bad[0]

        loss, grad_norm, bad = memory.run(step, attempt)

        state.step += 1
        window.add(state.step, step, loss, grad_norm, bad, metrics)
        last = state.step == total_steps
        eval_due = evaluate is not None and (state.step % eval_every == 0 or last)
        save_due = state.step % save_every == 0 or last

        if state.step % training.log_every == 0 or eval_due or save_due:
            _report(window, state, lr, order.steps_per_epoch, scaler, skips, monitor, log)
            if skips.repeated and roll_back(run, model, optimizer, scaler, state, skips, lr, log):
                window.restart()
                continue
        if state.step == CHECK_MOVEMENT_AT and (names := movement.unmoved() or optimizer.unreached(model)):
            log({"event": "warning", "step": state.step, "message": f"trainable tensors that have not moved: {names}"})
        if eval_due:
            assert evaluate is not None
            values = evaluate(state.step, memory.drop_graphs)
            log({"event": "eval", "step": state.step, "metrics": dict(values)})
            say(monitor.evaluation(state.step, values), state.step, log)
            if _is_best(state, values, config):
                save_due = True
                log({"event": "best", "step": state.step, "metric": _tracked(config)[0], "value": state.best_value})
            patience = training.early_stopping.patience
            state.stopped_early = (
                training.early_stopping.metric is not None and state.evaluations_without_improvement >= patience
            )
        stopping = stop.signal  # looked at once, so that what is said below was done: a later signal waits for a step
        if stopping is not None and window.steps:
            _report(window, state, lr, order.steps_per_epoch, scaler, skips, monitor, log)
        state.wall_seconds = time.perf_counter() - began
        if save_due or stopping is not None or state.stopped_early:
            state.unmoved, state.norms = movement.unmoved(), judge.recent()
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


def accumulate_gradients(
    forward: ModelForward,
    objective: Objective,
    parts: Sequence[Sequence[TokenizedExample]],
    packing: bool,
    pad_id: int,
    scaler: torch.amp.GradScaler,
    graphs: GraphedMicroBatches | None = None,
    metrics: Metrics | None = None,
) -> torch.Tensor:
    """Add this rank's part of the gradient of one step's loss to the parameters, micro-batch by micro-batch.

    `parts` are the examples of each micro-batch. Returns this rank's part of the loss, a detached fp32 scalar on the
    device; both parts, summed over the ranks, are those of the whole step. Changes nothing but gradients: after
    `zero_grad` it can be called again with smaller parts. With `forward.dropout_seed` dropout is the same then, too;
    without, it draws from the random generator. `graphs` replays the micro-batches whose shape it knows, as long as that
    pays. The step's metrics, terms of weight 0, are added to `metrics`.
    Gradients are added up in the type of their weights. In bf16 each addition rounds the sum, by up to 2^-8 of it: alike
    gradients of 2, 16, 64, 256 micro-batches come out with an error of 0.2%, 0.5%, 1%, 4% of their norm
    (tests/training/test_rounding.py); sums in fp32 would take 4 bytes a parameter, as much as weights and gradients.
    """
    counts = global_counts(objective.counts(example for part in parts for example in part))
    parts = objective.begin_step(forward, parts, step_tools(forward, packing, pad_id))
    loss = torch.zeros((), device=forward.device)
    if graphs is not None and graphs.pay:
        graphs.set_counts(counts)
        for batch in micro_batches(parts, packing, pad_id, forward.device, few_lengths):
            loss += graphs.run(batch)
        return loss
    rows = forward.wants_dropout_rows
    for batch in micro_batches(parts, packing, pad_id, forward.device, dropout_rows=rows):
        with forward.autocast():
            terms = objective.terms(forward, batch)
            part = weighted(terms, counts)
        if metrics is not None:
            add_metrics(metrics, terms)
        scaler.scale(part).backward()
        loss += part.detach()
    if not parts:  # the gradient of nothing is zero, not absent: the scaler and whatever sums over ranks need tensors
        scaler.scale(loss)
        for parameter in forward.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    return loss


def step_tools(forward: ModelForward, packing: bool, pad_id: int) -> StepTools:
    """What an objective makes of a whole step's parts before the first backward; what runs out of memory is the step's matter."""

    def passes(parts: Parts, work: Callable[[Batch], torch.Tensor]) -> Iterator[torch.Tensor]:
        with evaluating(forward):
            for batch in micro_batches(parts, packing, pad_id, forward.device):
                with torch.no_grad(), forward.autocast():
                    found = work(batch)
                yield found

    return StepTools(passes, sum_over_ranks)


def weighted(terms: Sequence[Term], counts: Mapping[str, int]) -> torch.Tensor:
    """A micro-batch's part of the loss: Σ weight · sum / count over the terms that have a weight."""
    return torch.stack([term.weight * term.sum / counts[term.counted] for term in terms if term.weight]).sum()


def add_metrics(metrics: Metrics, terms: Sequence[Term]) -> None:
    """Add a micro-batch's part of each metric: the sum and the count of the terms of weight 0."""
    for term in terms:
        if not term.weight:
            total, count = metrics.get(term.name, (0.0, 0))
            metrics[term.name] = total + term.sum.detach(), count + term.count


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


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks. Single-process: the tensor."""
    if rank_and_world_size()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def evaluate_loss(
    forward: ModelForward,
    objective: Objective,
    examples: Sequence[TokenizedExample],
    config: RunConfig,
    pad_id: int,
    halving: Halving | None = None,
    metrics: dict[str, float] | None = None,
) -> float:
    """The objective over `examples` without gradients, normalised by all their units together.

    The micro-batches are made as in training; those that run out of memory are halved, and `halving` remembers it for the
    next evaluation. Every rank evaluates all of them. The objective's metrics are put into `metrics`. Raises MachineError
    when one example alone is too much.
    """
    halving = halving or Halving()
    counts = objective.counts(examples)

    def passes(parts: Parts, work: Callable[[Batch], torch.Tensor]) -> Iterator[torch.Tensor]:
        for _, found in without_gradients(forward, parts, config, pad_id, halving, work):
            yield found

    parts = objective.begin_step(forward, parts_of(examples, config), StepTools(passes, sum_over_ranks))
    total = torch.zeros((), device=forward.device)
    found: Metrics = {}

    def terms_of(batch: Batch) -> tuple[torch.Tensor, list[Term]]:
        terms = objective.terms(forward, batch)
        return weighted(terms, counts), terms

    for _, (loss, terms) in without_gradients(forward, parts, config, pad_id, halving, terms_of):
        total += loss
        add_metrics(found, terms)
    if metrics is not None:
        metrics |= means({name: (float(value), count) for name, (value, count) in found.items()})
    return float(total)


def _report(
    window: Window,
    state: TrainState,
    lr: float,
    steps_per_epoch: int,
    scaler: torch.amp.GradScaler,
    skips: Skips,
    monitor: Monitor,
    log: EventSink,
) -> None:
    """Log the window as a step event, the steps that were skipped in it, and what the monitor sees."""
    metrics, skipped = window.close(state, lr, steps_per_epoch)
    log(metrics.event())
    for found in skipped:
        if scaler.is_enabled() and math.isfinite(found.loss) and scaler.get_scale() >= 1:
            scale = f"gradients overflowed fp16 (loss scale now {scaler.get_scale():g})"
            log({"event": "warning", "step": found.step, "message": f"step {found.step} was skipped: {scale}"})
            continue  # the scaler finds its scale
        skips.add(found)
        log(
            {
                "event": "skipped",
                "step": found.step,
                "loss": found.loss,
                "grad_norm": found.grad_norm,
                "rows": list(dict.fromkeys(found.rows)),
                "message": found.message,
            }
        )
    if not skipped:
        say(monitor.step(metrics), state.step, log)


def say(signals: Iterable[Signal], step: int, log: EventSink) -> None:
    """Log what the monitor has to say."""
    for signal in signals:
        log({"event": "warning", "check": signal.check, "step": step, "message": signal.message})


def roll_back(
    run: RunFolder,
    model: torch.nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    skips: Skips,
    lr: float,
    log: EventSink,
) -> bool:
    """Go back to the newest checkpoint with half the rate; without one, go on from here with it. Returns whether it went.

    Every checkpoint is good: a step that is not finite changes nothing. Raises VerificationError the third time.
    """
    if state.rollbacks >= MAX_ROLLBACKS:
        skips.refuse(lr, scaler.is_enabled())
    rollbacks, lr_scale, skipped = state.rollbacks + 1, state.lr_scale * ROLLBACK_FACTOR, state.skipped
    halvings, least_memory = state.halvings, state.least_memory
    step = state.step
    if checkpoints := run.checkpoints():
        saved = load_checkpoint(checkpoints[-1][1], model, optimizer.inner, scaler)
        vars(state).update(vars(saved))
    state.rollbacks, state.lr_scale, state.skipped = rollbacks, lr_scale, skipped
    state.halvings, state.least_memory = halvings, least_memory
    skips.went_back()
    where = (
        f"back to the checkpoint of step {state.step}" if checkpoints else "there is no checkpoint yet to go back to"
    )
    message = f"steps were skipped again and again up to step {step}: {where}; the rate is {lr_scale:g} of what it was"
    log({"event": "rollback", "step": state.step, "from_step": step, "lr_scale": lr_scale, "message": message})
    return bool(checkpoints)


def _tracked(config: RunConfig) -> tuple[str, str]:
    """The metric that decides which checkpoint is best, and whether `min` or `max` is."""
    early = config.training.early_stopping
    return early.metric or "eval_loss", early.mode or "min"


def _may_fail(metric: str, config: RunConfig) -> bool:
    """Whether an evaluation may lack it: the judge's score, and what a function of the user gives (`FUNCTION`, `FUNCTION.NAME`)."""
    functions = [reference.rpartition(":")[2] for reference in config.evaluation.metrics]
    return metric == JUDGE_SCORE or metric.partition(".")[0] in functions


def _is_best(state: TrainState, values: Mapping[str, float], config: RunConfig) -> bool:
    """Whether this evaluation is the best so far; keeps the count of evaluations without improvement.

    Where the judge or the user's own metric failed nothing is known: the evaluation is not the best, and spends no patience.
    """
    metric, mode = _tracked(config)
    if metric not in values and config.training.early_stopping.metric is None:
        return False  # general text alone is evaluated
    if metric not in values and _may_fail(metric, config):
        state.eval_loss = values.get("eval_loss", state.eval_loss)
        return False
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
