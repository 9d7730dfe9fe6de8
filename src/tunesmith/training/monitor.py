"""Reads a run as an experienced person would, and says in one line what is wrong, why, and what to change.

| check | said when |
|---|---|
| max_seq_length_too_long | a token budget rests on rows that no example comes near |
| gradient_zero | three logged gradient norms were exactly zero |
| diverging | the loss is half as high again as it was, and above its noise |
| loss_not_falling | after warm-up and a share of the run the loss is where it began |
| loss_near_zero | after the first epoch every recent loss is about zero |
| overfitting | eval_loss rises from its best while the training loss falls |
| slow | tokens/s are under half of what was predicted |

A false alarm costs more than a late one: whoever was warned for nothing reads no second warning. So each rule asks for
evidence beyond the noise of the run's own losses, and waits where there is too little of it; a short and noisy run may end
without a word. Losses are taken to be in nats a supervised token (SFT, continued pre-training), and finite: the loop stops on
others. Left out: anything that needs gradients of single tensors or losses of single examples.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tunesmith.config import RunConfig
from tunesmith.types import StepMetrics

SMALL_RATE = 1 / 10
"""A rate below this share of the method's usual one is itself evidence that little is learned."""

JUDGE_AFTER = (0.20, 0.30)
"""Share of the run (never fewer than 20 steps), beyond warm-up, after which a loss that does not fall is said: with a small
rate, and with a usual one, which is doubted later."""

FALL_EXCLUDED = (0.05, 0.01)
"""Fall, as a share of the loss at the start, that two standard errors must rule out: with a small rate, and with a usual one.
A run that falls by 1% is slow, not stuck."""

LOW_START = 0.1
"""Nats a token. A base that starts below it can do the task, and has nowhere to fall to."""

NEAR_ZERO = 0.01
"""Nats a token: each token gets 99% probability. No text is that predictable before it was seen (0.5 to 2 nats is usual), and a
classifier that is right 98 times in 100, with five tokens to an answer, is at 0.02 to 0.05."""

GENERALISES = 0.05
"""Nats a token. Where examples that were never trained on, those of the first epoch or of eval_loss, cost less than this,
a loss of about zero is an easy task, not memory."""

EVAL_RISE = 0.03
"""Rise of eval_loss over its best, as a share of it. The rows are always the same, so it wanders little: rarely 1%."""

EVAL_RISE_NATS = 0.01
"""The least rise in nats a token: a classifier's eval_loss of 0.05 moves by more than 3% with one answer."""

WANDERING = 2.0
"""The least rise, in the largest fall from one evaluation to the next since the best or rise before it: what went away again
by itself may come again."""

DIVERGED = 1.5
"""Loss over its lowest level."""

DIVERGED_NOISE = 5.0
"""The least rise that is divergence, in median absolute deviations of the loss..."""

DIVERGED_NATS = 0.1
"""...and in nats a token: a loss of 0.01 that becomes 0.05 met a hard example."""

LOST = 2.0
"""Loss over the first one that was logged, or over one nat if that was lower, from where on noise is no excuse: the divergence
made it."""

SLOW = 0.5
"""Measured over predicted tokens/s."""

COMPILING = 5
"""The first steps of a process compile kernels and capture graphs: they are not timed."""

TOO_LONG = 4
"""data.max_seq_length over the longest example."""

BLOCKS = 96
"""Means that stand for the whole history of the loss."""

MAD_OF_NORMAL = 0.6745
"""Median absolute deviation of a normal distribution with standard deviation 1."""


@dataclass(frozen=True, slots=True)
class Signal:
    """Something that is wrong with a run. `check` is its stable name; `message` is one line: what was seen, the likely cause,
    and what to change."""

    check: str
    message: str


class Monitor:
    """Watches one run, or the part of it after `first_step` steps that an earlier process took.

    `total_steps` are those of the whole run. `predicted_tokens_per_second` is the plan's figure for tokens without padding;
    with None speed is not judged. Each signal is said once; memory and time a step do not grow with the run.
    """

    def __init__(
        self,
        config: RunConfig,
        total_steps: int,
        *,
        first_step: int = 0,
        predicted_tokens_per_second: float | None = None,
    ):
        training = config.training
        self.config = config
        self.total_steps = total_steps
        self.first_step = first_step
        self.predicted = predicted_tokens_per_second
        self.usual_lr = config.usual_lr
        self.small_rate = config.lr < SMALL_RATE * self.usual_lr
        self.warmup = math.ceil(config.optimizer.warmup_ratio * total_steps)
        share = JUDGE_AFTER[0 if self.small_rate else 1]
        self.judge_fall_at = self.warmup + max(20, math.ceil(share * total_steps))
        interval = min(n for n in (training.log_every, training.eval_every, training.save_every) if n is not None)
        # Logged entries that make a level: ten steps, but five entries at least, for a median to mean something.
        self._window = max(5, math.ceil(10 / interval))
        self._recent: deque[StepMetrics] = deque(maxlen=self._window)
        self._seconds_per_token: deque[float] = deque(maxlen=self._window)
        self._history = _History()
        self._zero_gradients = 0
        self._near_zero_entries = 0  # in a row, up to now
        self._near_zero_since = 0.0  # the epoch of the first of them
        self._first_epoch_loss: float | None = None  # of its last window: every example was seen for the first time
        self._since_evaluation = (0.0, 0)  # sum of the training loss, supervised tokens
        self._evaluations: list[_Evaluation] = []  # the best one, and the last two after it
        self._wandering = 0.0  # the largest rise of eval_loss that went away again, in nats
        self._said: set[str] = set()

    def start(self, lengths: Sequence[int]) -> list[Signal]:
        """What the training data says before the first step; `lengths` are the examples' tokens.

        `data.max_seq_length` alone costs nothing, since a batch is as wide as its longest row. It is too long only where a
        `training.micro_batch_tokens` rests on it, which it keeps from being smaller. Rows that were cut are the data's own
        findings.
        """
        return self._new(("max_seq_length_too_long", self._too_long(lengths)))

    def step(self, metrics: StepMetrics) -> list[Signal]:
        """Take in a logged step, and return what is to be said now."""
        before = self._recent[-1].step if self._recent else self.first_step
        self._recent.append(metrics)
        self._history.add(metrics.loss)
        if before >= self.first_step + COMPILING:
            self._seconds_per_token.append(metrics.seconds / metrics.tokens)
        # Where the loss is zero to the last bit, so is its gradient.
        stuck = metrics.step > 2 and metrics.grad_norm == 0 and metrics.loss > 0
        self._zero_gradients = self._zero_gradients + 1 if stuck else 0
        self._near_zero_entries = self._near_zero_entries + 1 if metrics.loss < NEAR_ZERO else 0
        if self._near_zero_entries == 1:
            self._near_zero_since = metrics.epoch
        loss_sum, supervised = self._since_evaluation
        self._since_evaluation = (
            loss_sum + metrics.loss * metrics.supervised_tokens,
            supervised + metrics.supervised_tokens,
        )
        if metrics.epoch <= 1:
            self._first_epoch_loss = median(entry.loss for entry in self._recent)
        return self._new(
            ("gradient_zero", self._gradient_zero()),
            ("diverging", self._diverging()),
            ("loss_not_falling", self._not_falling()),
            ("loss_near_zero", self._near_zero()),
            ("slow", self._slow()),
        )

    def evaluation(self, step: int, values: Mapping[str, float]) -> list[Signal]:
        """Take in an evaluation after step `step`, and return what is to be said now.

        Without `eval_loss`, or without a step since the last evaluation, it says nothing.
        """
        loss_sum, supervised = self._since_evaluation
        if "eval_loss" not in values or not supervised:
            return []
        self._since_evaluation = (0.0, 0)
        last = _Evaluation(step, self._recent[-1].epoch, values["eval_loss"], loss_sum / supervised)
        if self._evaluations:
            best, before = self._evaluations[0].eval_loss, self._evaluations[-1].eval_loss
            self._wandering = max(self._wandering, before - max(last.eval_loss, best))
        if not self._evaluations or last.eval_loss < self._evaluations[0].eval_loss:
            self._evaluations = [last]
        else:
            self._evaluations = [self._evaluations[0], *self._evaluations[1:][-1:], last]
        return self._new(("overfitting", self._overfitting()))

    def _new(self, *found: tuple[str, str | None]) -> list[Signal]:
        """Those that were found and have not been said."""
        signals = [Signal(check, message) for check, message in found if message and check not in self._said]
        self._said |= {signal.check for signal in signals}
        return signals

    def _too_long(self, lengths: Sequence[int]) -> str | None:
        limit, longest, budget = self.config.data.max_seq_length, max(lengths), self.config.training.micro_batch_tokens
        enough = 64 * math.ceil(longest / 64)
        if limit == "auto" or limit <= TOO_LONG * longest or enough >= limit or budget != limit:
            return None
        return (
            f"the longest of {len(lengths)} examples has {longest} tokens; data.max_seq_length {limit} has no use, and "
            f"because of it training.micro_batch_tokens cannot be set below {budget}: set data.max_seq_length={enough}"
        )

    def _gradient_zero(self) -> str | None:
        if self._zero_gradients < 3:
            return None
        targets = "" if self._targets is None else "; check adapter.target_modules and adapter.init_from"
        return (
            f"the gradient norm was exactly 0 in the last 3 logged steps, at a loss of {_number(self._recent[-1].loss)}: "
            f"nothing is being learned; no trainable weight has a part in the loss, or the model's numbers underflow "
            f"(model.dtype={self.config.model.dtype}){targets}"
        )

    def _diverging(self) -> str | None:
        """Three quarters of the window against the lowest level before, or against the first loss, which is the base's own: a
        run that diverges at once has no low level. A few spikes are no divergence, however high."""
        if len(self._recent) < self._window:
            return None
        losses = sorted(entry.loss for entry in self._recent)
        low, level = losses[self._window // 4], median(losses)
        lowest = min(self._history.first[0], self._history.lowest(self._window))
        noise = MAD_OF_NORMAL * self._history.noise()
        if low <= DIVERGED * lowest or low - lowest <= DIVERGED_NATS:
            return None
        if low - lowest <= DIVERGED_NOISE * noise and low <= LOST * max(self._history.first[0], 1.0):
            return None
        return (
            f"the training loss rose from {_number(lowest)}, its lowest, to {_number(level)} (median of the last {self._window} "
            f"logged steps), against a noise of {_number(noise)}: it diverges, the rate is too high; set "
            f"optimizer.lr={_rate(self.config.lr / 5)} (now {_rate(self.config.lr)}), or raise optimizer.warmup_ratio "
            f"(now {self.config.optimizer.warmup_ratio:g})"
        )

    def _not_falling(self) -> str | None:
        """The last third of the losses against several beginnings.

        A run may have fallen within its first entry (a high rate, or log_every=10), its first ten, or steadily since: a fall
        from any of them, beyond its standard error, is a fall. Against chance the short beginnings ask for more of it. What
        is memorised falls only when it comes again: with a usual rate the last third must lie beyond the first epoch.
        """
        history, now = self._history, self._recent[-1]
        third = len(history.blocks) // 3
        seen_from_start = self.first_step <= self.warmup  # a resumed run may have fallen before
        if not seen_from_start or now.step < self.judge_fall_at or third < 3:
            return None
        epochs = now.epoch * self.total_steps / now.step
        if not self.small_rate and now.epoch < 1.5 <= epochs:
            return None
        if self._said & {"gradient_zero", "diverging"}:  # these say why
            return None
        start, end, noise = median(history.blocks[:third]), median(history.blocks[-third:]), history.noise()

        def error(count: int) -> float:
            """Of the difference between a median of `count` losses and the end; 0.1% of the loss is no fall even without noise."""
            return max(1.25 * noise * math.sqrt(1 / count + 1 / (third * history.size)), 0.001 * start)

        whole = third * history.size
        beginnings = [(1, 3.0), (3, 2.0), (10, 2.0)]
        fell = any(median(history.first[:count]) - end > errors * error(count) for count, errors in beginnings)
        fall, excluded = start - end, FALL_EXCLUDED[0 if self.small_rate else 1] * start
        if start < LOW_START or fell or abs(fall) > error(whole) or fall + 2 * error(whole) > excluded:
            return None
        return (
            f"the training loss has not measurably fallen: {_number(start)} at the start and {_number(end)} now, after "
            f"{now.step} steps, against a noise of {_number(MAD_OF_NORMAL * noise)}; {self._why_not_falling()}"
        )

    def _why_not_falling(self) -> str:
        lr, method, targets = self.config.lr, self.config.method, self._targets
        causes = []
        if self.small_rate:
            causes.append(
                f"optimizer.lr {_rate(lr)} is {self.usual_lr / lr:,.0f} times under the {_rate(self.usual_lr)} that is usual "
                f"for {method}: set optimizer.lr={_rate(self.usual_lr)}"
            )
        elif SMALL_RATE * lr > self.usual_lr:
            causes.append(
                f"optimizer.lr {_rate(lr)} is {lr / self.usual_lr:,.0f} times over the {_rate(self.usual_lr)} that is usual "
                f"for {method}, and training may jump about: set optimizer.lr={_rate(self.usual_lr)}"
            )
        if targets is not None and targets != "all-linear":
            named = targets if isinstance(targets, str) else ",".join(targets)
            causes.append(
                f"adapter.target_modules={named} trains a part of the layers: set adapter.target_modules=all-linear"
            )
        if not causes:
            causes.append(
                f"optimizer.lr {_rate(lr)} is usual for {method}, so it may be too small for this data: try "
                f"optimizer.lr={_rate(5 * lr)}; or the answers do not follow from the prompts: look at them with "
                "`tunesmith data preview`"
            )
        return "; ".join(causes)

    @property
    def _targets(self) -> str | list[str] | None:
        """What `adapter.target_modules` says; None where it says nothing (full fine-tuning, an adapter that brings its own)."""
        adapter = self.config.adapter
        return None if self.config.method == "full" or adapter.init_from else adapter.target_modules

    def _near_zero(self) -> str | None:
        """Twenty losses in a row (two windows), not their median: an easy task has many batches at zero and a few that are not.

        Never in the first epoch, where each loss is that of examples not yet seen, and not where unseen ones are easy too.
        """
        now = self._recent[-1]
        if self._near_zero_entries < 2 * self._window or now.epoch <= 1:
            return None
        unseen = self._evaluations[-1].eval_loss if self._evaluations else self._first_epoch_loss
        if unseen is not None and unseen < GENERALISES:
            return None
        evidence = "nothing is held out to tell (set data.eval_fraction=0.1)"
        if self._evaluations:
            evidence = f"on held-out rows it is {_number(self._evaluations[-1].eval_loss)}"
        return (
            f"the training loss is about zero, under {NEAR_ZERO} in each of the last {2 * self._window} logged steps (now "
            f"{_number(now.loss)}), and {evidence}: the model knows the training data by heart, so there are too few "
            f"examples for so many epochs; set training.epochs below {self._near_zero_since:.2g}, or add examples"
        )

    def _overfitting(self) -> str | None:
        if len(self._evaluations) < 3:
            return None
        best, before, last = self._evaluations
        least = max(EVAL_RISE * best.eval_loss, EVAL_RISE_NATS, WANDERING * self._wandering)
        rises = last.eval_loss > before.eval_loss > best.eval_loss + least
        if not rises or last.train_loss >= best.train_loss:  # both rising is divergence
            return None
        early = self.config.training.early_stopping
        advice = f"set training.epochs={best.epoch:.2g}"
        if early.metric is None:
            advice += ", or let training.early_stopping.metric=eval_loss stop it and keep the best weights"
        else:
            advice += f"; early stopping on {early.metric} is on, with a patience of {early.patience} evaluations"
        return (
            f"overfitting: eval_loss rose from {_number(best.eval_loss)} at step {best.step}, its best, to "
            f"{_number(last.eval_loss)} at step {last.step}, while the training loss fell from {_number(best.train_loss)} to "
            f"{_number(last.train_loss)}: too many epochs for this data; {advice}"
        )

    def _slow(self) -> str | None:
        if self.predicted is None or len(self._seconds_per_token) < self._window:
            return None
        measured = 1 / median(self._seconds_per_token)
        if measured >= SLOW * self.predicted:
            return None
        causes = ["another process on the GPU (look with nvidia-smi)", "a processor that is too slow or busy"]
        if self.config.training.micro_batch_tokens is None:
            size = self.config.training.micro_batch_size
            causes.append(f"examples too short to fill the card (raise training.micro_batch_size, now {size})")
        if self.config.training.log_every == 1:
            causes.append("waiting for the card at every step (set training.log_every=10)")
        return (
            f"training runs at {measured:,.0f} tokens/s (median of the last {self._window} logged steps), "
            f"{measured / self.predicted:.0%} of the {self.predicted:,.0f} that were predicted; likely causes: "
            f"{'; '.join(causes)}"
        )


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """`train_loss` is the mean since the evaluation before."""

    step: int
    epoch: float
    eval_loss: float
    train_loss: float


class _History:
    """All losses of a run in constant memory: the first ten, and at most BLOCKS means of `size` neighbours each.

    When there are BLOCKS of them, each two become one.
    """

    def __init__(self) -> None:
        self.first: list[float] = []
        self.blocks: list[float] = []
        self.size = 1
        self._open: list[float] = []

    def add(self, loss: float) -> None:
        if len(self.first) < 10:
            self.first.append(loss)
        self._open.append(loss)
        if len(self._open) < self.size:
            return
        self.blocks.append(sum(self._open) / self.size)
        self._open = []
        if len(self.blocks) == BLOCKS:
            self.blocks = [(a + b) / 2 for a, b in zip(self.blocks[::2], self.blocks[1::2], strict=True)]
            self.size *= 2

    def lowest(self, window: int) -> float:
        """The lowest level: the least of the medians of neighbouring blocks that hold `window` losses together; infinite before there are so many."""
        width = math.ceil(window / self.size)
        starts = range(0, len(self.blocks) - width + 1, width)
        return min((median(self.blocks[start : start + width]) for start in starts), default=math.inf)

    def noise(self) -> float:
        """Standard deviation of one loss, from second differences: a trend does not count, a few spikes hardly do."""
        blocks = self.blocks
        bends = [abs(a - 2 * b + c) for a, b, c in zip(blocks, blocks[1:], blocks[2:], strict=False)]
        return median(bends) / (MAD_OF_NORMAL * math.sqrt(6)) * math.sqrt(self.size)


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"


def _rate(value: float) -> str:
    """2e-4, 1.5e-5, 0.3: as one writes a learning rate."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{value:.2g}" if value >= 0.01 else f"{mantissa.removesuffix('.0')}e{int(exponent)}"
