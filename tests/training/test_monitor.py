"""The monitor: each signal on a run that shows it, and silence on runs that do not.

First synthetic curves, many seeds each; then real runs of a tiny model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import write_jsonl
from tunesmith.config import load_config
from tunesmith.errors import VerificationError
from tunesmith.training.monitor import BLOCKS, Monitor, Signal, _History
from tunesmith.types import StepMetrics
from tunesmith.workflows.train import TrainingSession

Session = Callable[..., TrainingSession]

Curve = Callable[[float], float]
"""The loss without noise at a share of the run, from 0 to 1."""

CONVERGENCE = Path(__file__).parents[2] / "benchmarks" / "results" / "convergence_h100.json"
SMALL = "optimizer.lr=1e-9"


def monitor(*overrides: str, steps: int = 200, **options: Any) -> Monitor:
    return Monitor(load_config(None, overrides), steps, **options)


def checks(signals: list[Signal]) -> list[str]:
    return [signal.check for signal in signals]


# -- synthetic runs --------------------------------------------------------------------------------------------------


def falling(start: float, end: float, speed: float = 5.0) -> Curve:
    """From `start` exponentially towards `end`; 63% of the way after 1 / `speed` of the run."""
    return lambda share: end + (start - end) * math.exp(-speed * share)


def linear(start: float, end: float) -> Curve:
    return lambda share: start + (end - start) * share


def stairs(*levels: float) -> Curve:
    """One level an epoch, as memorising runs have."""
    return lambda share: levels[min(int(share * len(levels)), len(levels) - 1)]


def noisy(curve: Curve, steps: int, noise: float, seed: int, spikes: float = 0.0) -> list[float]:
    """`steps` losses with log-normal noise of relative size `noise`; a share `spikes` of them is three times too high."""
    rng = random.Random(seed)
    losses = [curve(step / steps) * math.exp(rng.gauss(0, noise) - noise**2 / 2) for step in range(steps)]
    return [loss * 3 if rng.random() < spikes else loss for loss in losses]


def entry(step: int, loss: float, epoch: float, **values: float) -> StepMetrics:
    facts = {"lr": 2e-4, "grad_norm": 0.5, "examples": 16, "tokens": 4000, "supervised_tokens": 1000, "seconds": 0.5}
    return StepMetrics(step=step, epoch=epoch, loss=loss, memory_gb=1.0, **(facts | values))  # type: ignore[arg-type]


def watch(
    monitor: Monitor, losses: Sequence[float], *, log_every: int = 1, epochs: float = 3, first_step: int = 0
) -> dict[str, tuple[int, Signal]]:
    """Feed the losses of a whole run (from `first_step` on) to `monitor`; what it said by check, with the step."""
    said = {}
    for end in range(first_step + log_every, len(losses) + 1, log_every):
        mean = sum(losses[end - log_every : end]) / log_every
        for signal in monitor.step(entry(end, mean, epochs * end / len(losses))):
            assert signal.check not in said
            said[signal.check] = (end, signal)
    return said


# -- runs that learn --------------------------------------------------------------------------------------------------

LEARNING = {
    "falling": falling(2.0, 1.2),
    "fast": falling(5.0, 1.0, speed=100),
    "at once": lambda share: 5.0 if share < 0.01 else 1.0,
    "slow": falling(1.5, 1.35, speed=3),
    "steady": linear(1.5, 1.2),
    "stairs": stairs(1.5, 0.9, 0.4),
    "already good": linear(0.06, 0.05),
    "to a low level": falling(2.5, 0.03, speed=30),
    "warm-up": lambda share: 2.0 if share < 0.1 else 1.0 + 0.9 * (1 - share),
}


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05, 0.15])
@pytest.mark.parametrize("curve", LEARNING.values(), ids=LEARNING)
def test_a_run_that_learns_is_left_alone(curve: Curve, noise: float) -> None:
    for seed in range(8):
        for steps, log_every in ((12, 1), (60, 1), (300, 1), (300, 10)):
            watched = monitor(f"training.log_every={log_every}", "optimizer.warmup_ratio=0.1", steps=steps)
            losses = noisy(curve, steps, noise, seed)
            assert watch(watched, losses, log_every=log_every) == {}, (seed, steps, log_every)


@pytest.mark.parametrize("spikes", [0.05, 0.2])
def test_spikes_are_left_alone(spikes: float) -> None:
    for seed in range(20):
        assert watch(monitor(), noisy(falling(2.0, 1.2), 200, 0.05, seed, spikes)) == {}, seed


@pytest.mark.parametrize("fast", [3, 8])
def test_a_format_that_is_learned_in_a_few_steps_is_a_fall(fast: int) -> None:
    for seed in range(40):
        losses = noisy(lambda share: 1.65 if share < fast / 200 else 1.5, 200, 0.03, seed)
        assert watch(monitor(), losses, epochs=1) == {}, seed


@settings(max_examples=80)
@given(
    start=st.floats(0.5, 6),
    kept=st.floats(0.3, 0.85),
    speed=st.floats(1, 50),
    noise=st.floats(0, 0.15),
    steps=st.integers(5, 400),
    log_every=st.sampled_from([1, 3, 10]),
    epochs=st.sampled_from([0.5, 1, 3, 10]),
    small=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_no_falling_curve_is_remarked_on(
    start: float,
    kept: float,
    speed: float,
    noise: float,
    steps: int,
    log_every: int,
    epochs: float,
    small: bool,
    seed: int,
) -> None:
    noise = min(noise, 0.01) if small else noise  # a small rate is suspected on less evidence
    overrides = [f"training.log_every={log_every}", *(["optimizer.lr=1e-5"] if small else [])]
    watched = monitor(*overrides, steps=steps, predicted_tokens_per_second=10_000.0)
    losses = noisy(falling(start, kept * start, speed), steps, noise, seed)
    rng = random.Random(seed)
    for end in range(log_every, steps + 1, log_every):
        mean = sum(losses[end - log_every : end]) / log_every
        found = watched.step(entry(end, mean, epochs * end / steps))
        found += watched.evaluation(end, {"eval_loss": (1 + 1 / end) * (1 + rng.uniform(-0.005, 0.005))})
        assert found == []


def test_the_curves_of_real_runs() -> None:
    """SFT of SmolLM2-135M and others on hf_course_en, 200 steps of 16 rows on an H100, with both engines."""
    for case in json.loads(CONVERGENCE.read_text(encoding="utf-8")):
        for engine in ("reference", "fused"):
            losses = case[engine]
            assert len(losses) == 200
            assert losses[0] > 2.4 > losses[-1]
            assert watch(monitor(), losses, epochs=1) == {}


# -- loss_not_falling -------------------------------------------------------------------------------------------------


def test_a_flat_loss_with_a_small_rate() -> None:
    for seed in range(20):
        said = watch(monitor(SMALL), noisy(linear(1.5, 1.5), 200, 0.03, seed))
        step, _ = said.pop("loss_not_falling")
        assert step >= 10 + 40, "after warm-up and a fifth of the run"
        assert said == {}
    assert watch(monitor(SMALL), [1.5] * 200)["loss_not_falling"] == (
        50,
        Signal(
            "loss_not_falling",
            "the training loss has not measurably fallen: 1.500 at the start and 1.500 now, after 50 steps, against a noise "
            "of 0; optimizer.lr 1e-9 is 200,000 times under the 2e-4 that is usual for lora: set optimizer.lr=2e-4",
        ),
    )


def test_a_flat_loss_with_a_usual_rate_is_doubted_later() -> None:
    flat = noisy(linear(1.5, 1.5), 200, 0.005, seed=0)
    assert watch(monitor(), flat, epochs=1)["loss_not_falling"][0] == 10 + 60
    assert watch(monitor(), flat, epochs=3)["loss_not_falling"][0] == 100, "the last third is of the second epoch"


def test_a_flat_loss_that_is_too_noisy_to_tell() -> None:
    """20% of noise and 60 steps: the loss might have fallen by a twentieth unseen."""
    for seed in range(20):
        assert watch(monitor(SMALL, steps=60), noisy(linear(1.5, 1.5), 60, 0.2, seed)) == {}, seed


@pytest.mark.parametrize("log_every", [5, 10])
def test_a_flat_loss_that_is_logged_now_and_then(log_every: int) -> None:
    losses = noisy(linear(1.5, 1.5), 300, 0.03, seed=1)
    assert "loss_not_falling" in watch(
        monitor(SMALL, f"training.log_every={log_every}", steps=300), losses, log_every=log_every
    )


def test_a_flat_loss_with_spikes() -> None:
    assert "loss_not_falling" in watch(monitor(SMALL), noisy(linear(1.5, 1.5), 200, 0.01, seed=3, spikes=0.1))


def test_a_loss_that_hardly_falls_without_noise_does_not_fall() -> None:
    """One batch again and again: the loss falls at every step, by nothing."""
    assert "loss_not_falling" in watch(monitor(SMALL), [1.5 * (1 - 1e-7 * step) for step in range(200)])
    assert watch(monitor(SMALL), [1.5 * (1 - 1e-3 * step) for step in range(200)]) == {}


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (
            ["optimizer.lr=1e-6"],
            "optimizer.lr 1e-6 is 200 times under the 2e-4 that is usual for lora: set optimizer.lr=2e-4",
        ),
        (
            ["method=full", "optimizer.lr=1e-6"],
            "optimizer.lr 1e-6 is 20 times under the 2e-5 that is usual for full: set optimizer.lr=2e-5",
        ),
        (
            ["adapter.target_modules=qv"],
            "adapter.target_modules=qv trains a part of the layers: set adapter.target_modules=all-linear",
        ),
        (
            ["adapter.target_modules=[q_proj, up_proj]", "optimizer.lr=1e-5"],
            "optimizer.lr 1e-5 is 20 times under the 2e-4 that is usual for lora: set optimizer.lr=2e-4; "
            "adapter.target_modules=q_proj,up_proj trains a part of the layers: set adapter.target_modules=all-linear",
        ),
        (
            ["optimizer.lr=0.1"],
            "optimizer.lr 0.1 is 500 times over the 2e-4 that is usual for lora, and training may jump about: "
            "set optimizer.lr=2e-4",
        ),
        (
            [],
            "optimizer.lr 2e-4 is usual for lora, so it may be too small for this data: try optimizer.lr=1e-3; "
            "or the answers do not follow from the prompts: look at them with `tunesmith data preview`",
        ),
        (
            ["method=full"],
            "optimizer.lr 2e-5 is usual for full, so it may be too small for this data: try optimizer.lr=1e-4; "
            "or the answers do not follow from the prompts: look at them with `tunesmith data preview`",
        ),
    ],
)
def test_why_the_loss_does_not_fall(overrides: list[str], why: str) -> None:
    _, signal = watch(monitor(*overrides), [1.5] * 200)["loss_not_falling"]
    assert signal.message.split("a noise of 0; ")[1] == why


def test_the_targets_of_an_adapter_from_elsewhere_are_its_own() -> None:
    _, signal = watch(monitor("adapter.init_from=there", "optimizer.lr=1e-6"), [1.5] * 200)["loss_not_falling"]
    assert "target_modules" not in signal.message


@pytest.mark.parametrize(
    ("overrides", "losses", "options"),
    [
        (["optimizer.warmup_ratio=0.9"], [1.5] * 200, {}),  # warm-up, and the 20 steps after it
        ([], [1.5] * 20, {"steps": 20}),  # too short
        ([], [0.08] * 200, {}),  # the base can do it
        ([], [1.5] * 200, {"first_step": 11}),  # resumed after warm-up: it may have fallen before
    ],
)
def test_a_flat_loss_that_says_nothing(overrides: list[str], losses: list[float], options: Any) -> None:
    assert watch(monitor(SMALL, *overrides, **options), losses, first_step=options.get("first_step", 0)) == {}


def test_a_run_that_was_resumed_within_warm_up_is_judged() -> None:
    assert "loss_not_falling" in watch(monitor(SMALL, first_step=10), [1.5] * 200, first_step=10)


# -- loss_near_zero ---------------------------------------------------------------------------------------------------


def test_a_run_that_knows_its_data_by_heart() -> None:
    for seed in range(20):
        losses = noisy(falling(2.0, 0.002, speed=20), 200, 0.3, seed)
        assert list(watch(monitor(), losses, epochs=20)) == ["loss_near_zero"]
    losses = [2.0] * 10 + [1.0] * 10 + [0.003] * 100
    step, signal = watch(monitor(steps=120), losses, epochs=12)["loss_near_zero"]
    assert step == 40
    assert signal.message == (
        "the training loss is about zero, under 0.01 in each of the last 20 logged steps (now 0.003), and nothing is held "
        "out to tell (set data.eval_fraction=0.1): the model knows the training data by heart, so there are too few examples "
        "for so many epochs; set training.epochs below 2.1, or add examples"
    )
    tens = watch(monitor("training.log_every=10", steps=300), [2.0] * 30 + [0.003] * 270, epochs=30, log_every=10)
    assert tens["loss_near_zero"][0] == 30 + 100, "ten entries of ten steps"
    assert "loss_near_zero" in watch(monitor(first_step=100), [2.0] * 100 + [0.003] * 100, epochs=20, first_step=100)


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        ([2.0] * 10 + [0.003] * 190, 1.0),  # in the first epoch nothing is known by heart
        ([2.0] * 10 + [0.003] * 190, 10.0),  # what was new was easy too: the last ten of the first epoch
        ([2.0] * 20 + [0.012] * 180, 10.0),
        ([2.0] * 20 + ([0.003] * 18 + [0.03]) * 9, 10.0),  # a hard row in each epoch
    ],
)
def test_an_easy_task_is_not_known_by_heart(losses: list[float], epochs: float) -> None:
    assert watch(monitor(), losses, epochs=epochs) == {}


@pytest.mark.parametrize("noise", [0.5, 1.0, 1.5])
def test_a_classifier_has_many_batches_near_zero(noise: float) -> None:
    for seed in range(20):
        assert watch(monitor(), noisy(falling(2.5, 0.03, speed=30), 200, noise, seed), epochs=10) == {}, seed


def test_held_out_rows_tell_memory_from_an_easy_task() -> None:
    for eval_loss, said in ((0.04, []), (1.5, ["loss_near_zero"])):
        watched = monitor()
        found = [watched.step(entry(step, 2.0, step / 10)) for step in range(1, 21)]
        watched.evaluation(20, {"eval_loss": eval_loss})
        found += [watched.step(entry(step, 0.003, step / 10)) for step in range(21, 60)]
        signals = [signal for signals in found for signal in signals]
        assert checks(signals) == said
    assert "(now 0.003), and on held-out rows it is 1.500: the model" in signals[0].message


def test_held_out_rows_of_another_kind_do_not_make_the_first_epoch_memory() -> None:
    watched = monitor()
    watched.step(entry(1, 2.0, 0.01))
    watched.evaluation(1, {"eval_loss": 2.0})
    assert [signal for step in range(2, 100) for signal in watched.step(entry(step, 0.003, step / 100))] == []


# -- overfitting ------------------------------------------------------------------------------------------------------


def evaluate(watched: Monitor, eval_losses: list[float], train: Curve = linear(1.2, 0.6)) -> list[tuple[int, Signal]]:
    """Ten steps before each evaluation, and three epochs in all."""
    said = []
    for number, eval_loss in enumerate(eval_losses, 1):
        for step in range(10 * number - 9, 10 * number + 1):
            share = step / (10 * len(eval_losses))
            said += [(step, signal) for signal in watched.step(entry(step, train(share), 3 * share))]
        said += [(step, signal) for signal in watched.evaluation(step, {"accuracy": 0.5, "eval_loss": eval_loss})]
    return said


def test_eval_loss_that_rises_while_the_training_loss_falls() -> None:
    ((step, signal),) = evaluate(monitor(), [1.4, 1.2, 1.1, 1.15, 1.2, 1.3])
    assert step == 50
    assert signal == Signal(
        "overfitting",
        "overfitting: eval_loss rose from 1.100 at step 30, its best, to 1.200 at step 50, while the training loss fell from "
        "0.945 to 0.745: too many epochs for this data; set training.epochs=1.5, or let "
        "training.early_stopping.metric=eval_loss stop it and keep the best weights",
    )
    ((_, early),) = evaluate(monitor("training.early_stopping.metric=eval_loss", "data.eval_path=x"), [1.1, 1.15, 1.2])
    assert early.message.endswith(
        "set training.epochs=1; early stopping on eval_loss is on, with a patience of 3 evaluations"
    )


@pytest.mark.parametrize(
    "eval_losses",
    [
        [1.1, 1.2],  # one evaluation above the best
        [1.1, 1.11, 1.2],  # and the one before it within 3%
        [1.1, 1.2, 1.15, 1.12, 1.1],  # it comes back
        [1.1, 1.13, 1.13, 1.13, 1.13],  # within 3%
        [0.05, 0.055, 0.059],  # 18%, but of a classifier's small loss
        [1.1, 1.2, 1.1, 1.15, 1.2, 1.25],  # as it has risen before
        [1.4, 1.3, 1.2, 1.1],
    ],
)
def test_eval_loss_that_does_not_rise_enough(eval_losses: list[float]) -> None:
    assert evaluate(monitor(), eval_losses) == []


def test_a_plateau_with_noise_is_no_overfitting() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        assert evaluate(monitor(), [1.1 * (1 + rng.gauss(0, 0.005)) for _ in range(20)]) == [], seed


def test_both_losses_rising_is_not_overfitting() -> None:
    assert "overfitting" not in checks([s for _, s in evaluate(monitor(), [1.1, 1.3, 1.5, 1.7], linear(1.0, 2.0))])


def test_evaluations_without_a_loss_or_a_step_say_nothing() -> None:
    watched = monitor()
    assert watched.evaluation(0, {"eval_loss": 1.0}) == []
    for step, accuracy in enumerate((0.9, 0.5, 0.1), 1):
        watched.step(entry(step, 1.0 - 0.1 * step, 0.1))
        assert watched.evaluation(step, {"accuracy": accuracy}) == []
    watched.evaluation(3, {"eval_loss": 1.0})
    for _ in range(3):
        assert watched.evaluation(3, {"eval_loss": 2.0}) == []


# -- diverging --------------------------------------------------------------------------------------------------------


def test_a_loss_that_rises_above_its_lowest_level() -> None:
    def curve(share: float) -> float:
        return 2 - 2 * share if share < 0.5 else 3.0

    for noise in (0.0, 0.03, 0.1):
        for seed in range(10):
            step, _ = watch(monitor(), noisy(curve, 200, noise, seed))["diverging"]
            assert 105 <= step <= 115
    _, signal = watch(monitor("optimizer.lr=1e-3"), [2.0] * 50 + [1.0] * 50 + [2.5] * 50)["diverging"]
    assert signal.message == (
        "the training loss rose from 1.000, its lowest, to 2.500 (median of the last 10 logged steps), against a noise of 0: "
        "it diverges, the rate is too high; set optimizer.lr=2e-4 (now 1e-3), or raise optimizer.warmup_ratio (now 0.05)"
    )


def test_a_loss_that_rises_at_once() -> None:
    for noise in (0.0, 0.03, 0.1):
        for seed in range(10):
            said = watch(monitor(), noisy(lambda share: 2.0 if share < 0.02 else 6.0, 200, noise, seed))
            assert list(said) == ["diverging"], "and not that it has not fallen"
    resumed = watch(monitor(first_step=50), [1.0] * 60 + [3.0] * 40, first_step=50)
    assert list(resumed) == ["diverging"]


def test_a_loss_that_jumps_about_above_where_it_began() -> None:
    """Its noise is the divergence's own: nothing is learned at twice the base's loss."""
    jumping = [5.8, 5.8, *[12.0, 33.0, 17.0, 25.0] * 10]
    assert list(watch(monitor(), jumping)) == ["diverging"]
    assert watch(monitor(), [5.8, 5.8, *[7.0, 28.0, 8.0, 20.0] * 10]) == {}, "some are near where it began"
    assert list(watch(monitor(), [5.0, 5.0, *[10.4, 33.0, 17.0, 25.0] * 10])) == ["diverging"]
    assert watch(monitor(), [5.0, 5.0, *[9.6, 33.0, 9.7, 25.0] * 10]) == {}, "twice is the edge"
    fell = [5.0, 1.0, 6.0, 2.0] * 5
    assert watch(monitor(), [*fell, *[4.0, 33.0, 6.0, 25.0] * 10]) == {}, "against the first loss, not the lowest"
    assert watch(monitor(), [0.2, 0.2, *[0.4, 1.7, 0.7, 1.2] * 10]) == {}, "under two nats any row may cost that"


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 50 + [2.8] * 150,  # less than half as high again
        [2.0] * 20 + [0.02] * 80 + [0.08] * 100,  # small either way
        [2.0] * 50 + [1.0] * 50 + [9.0] * 7 + [1.0] * 93,  # a hump shorter than the window
    ],
)
def test_a_loss_that_rises_a_little_or_briefly(losses: list[float]) -> None:
    assert "diverging" not in watch(monitor(), losses)


@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_a_noisy_loss_does_not_diverge(noise: float) -> None:
    for seed in range(5):
        assert "diverging" not in watch(monitor(steps=2000), noisy(linear(1.5, 1.5), 2000, noise, seed))


# -- gradient_zero ----------------------------------------------------------------------------------------------------


def gradients(*norms: float, loss: float = 1.5, config: tuple[str, ...] = ()) -> list[tuple[int, Signal]]:
    watched = monitor(*config)
    return [
        (step, signal)
        for step, norm in enumerate(norms, 1)
        for signal in watched.step(entry(step, loss, 0.1, grad_norm=norm))
    ]


def test_gradients_that_are_exactly_zero() -> None:
    assert gradients(0, 0, 0, 0, 0, 0) == [
        (
            5,
            Signal(
                "gradient_zero",
                "the gradient norm was exactly 0 in the last 3 logged steps, at a loss of 1.500: nothing is being learned; no "
                "trainable weight has a part in the loss, or the model's numbers underflow (model.dtype=auto); check "
                "adapter.target_modules and adapter.init_from",
            ),
        )
    ]
    ((_, full),) = gradients(0, 0, 0, 0, 0, config=("method=full",))
    assert full.message.endswith("underflow (model.dtype=auto)")
    assert gradients(0, 0, 0, 0, 1e-30, 0, 0, 1e-30) == []
    assert gradients(0, 0, 0, 0, 0, 0, loss=0.0) == [], "a loss of zero has no gradient"
    assert checks([s for _, s in gradients(*[0] * 200, config=(SMALL,))]) == ["gradient_zero"], (
        "it says why all else is so"
    )


# -- slow -------------------------------------------------------------------------------------------------------------


def speeds(seconds: list[float], *overrides: str, predicted: float | None = 8000.0, first_step: int = 0) -> list[Any]:
    """Steps of 4,000 tokens each."""
    watched = monitor(*overrides, predicted_tokens_per_second=predicted, first_step=first_step)
    return [
        (step, signal.check, signal.message)
        for step, time in enumerate(seconds, first_step + 1)
        for signal in watched.step(entry(step, 2 - step / 1000, 0.1, seconds=time))
    ]


def test_a_run_that_is_slower_than_planned() -> None:
    assert speeds([2.0] * 30, "training.micro_batch_size=4", "data.packing=false") == [
        (
            15,  # five steps that compile, and a window
            "slow",
            "training runs at 2,000 tokens/s (median of the last 10 logged steps), 25% of the 8,000 that were predicted; "
            "likely causes: another process on the GPU (look with nvidia-smi); a processor that is too slow or busy; "
            "examples too short to fill the card (raise training.micro_batch_size, now 4); "
            "waiting for the card at every step (set training.log_every=10)",
        )
    ]
    ((_, _, message),) = speeds([2.0] * 30, "training.micro_batch_size=4", "data.packing=true")
    assert "now 4); waiting" in message
    budget = ("data.packing=true", "training.micro_batch_tokens=2048", "training.log_every=10")
    ((_, _, message),) = speeds([2.0] * 30, *budget)
    assert message.endswith("a processor that is too slow or busy")
    assert [step for step, _, _ in speeds([2.0] * 30, first_step=100)] == [115]


@pytest.mark.parametrize(
    ("seconds", "predicted"),
    [
        ([0.9] * 50, 8000.0),  # 56%
        ([60.0] * 5 + [0.5] * 50, 8000.0),  # compiles
        ([0.5] * 20 + [30.0] + [0.5] * 20, 8000.0),  # one hiccup
        ([0.5] * 20 + [3.0] * 4 + [0.5] * 20, 8000.0),
        ([9.0] * 50, None),
    ],
)
def test_a_run_that_is_as_fast_as_planned(seconds: list[float], predicted: float | None) -> None:
    assert speeds(seconds, predicted=predicted) == []


def test_an_entry_that_holds_compilation_is_not_timed() -> None:
    watched = monitor("training.log_every=3", predicted_tokens_per_second=8000.0)
    found = [
        signal
        for step in range(3, 60, 3)
        for signal in watched.step(entry(step, 2 - step / 1000, 0.1, seconds=90.0 if step <= 6 else 0.6))
    ]
    assert found == []
    assert len(watched._seconds_per_token) == 5


# -- what is known at the start ---------------------------------------------------------------------------------------

LENGTHS = [40, 100, 180, 200]
BUDGET = ("data.packing=true", "data.max_seq_length=4096", "training.micro_batch_tokens=4096")


def test_a_max_seq_length_that_costs_something() -> None:
    assert monitor(*BUDGET).start(LENGTHS) == [
        Signal(
            "max_seq_length_too_long",
            "the longest of 4 examples has 200 tokens; data.max_seq_length 4096 has no use, and because of it "
            "training.micro_batch_tokens cannot be set below 4096: set data.max_seq_length=256",
        )
    ]


@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [
        (["data.max_seq_length=4096"], LENGTHS),  # a batch is as wide as its longest row: it costs nothing
        (BUDGET, [*LENGTHS, 1024]),  # one example needs it
        (["data.packing=true", "data.max_seq_length=1024", "training.micro_batch_tokens=4096"], LENGTHS),
        (["data.packing=true", "data.max_seq_length=auto", "training.micro_batch_tokens=64"], [10]),
        (["data.packing=true", "data.max_seq_length=64", "training.micro_batch_tokens=64"], [10]),  # nor a shorter 64
    ],
)
def test_a_max_seq_length_that_costs_nothing(overrides: list[str], lengths: list[int]) -> None:
    assert monitor(*overrides).start(lengths) == []


def test_what_the_data_says_is_said_once() -> None:
    watched = monitor(*BUDGET)
    assert len(watched.start(LENGTHS)) == 1
    assert watched.start(LENGTHS) == []


# -- the history ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(50, 1), (5000, 64)])
def test_noise_is_that_of_one_loss_and_not_the_trend(count: int, size: int) -> None:
    found = []
    for seed in range(20):
        rng, history = random.Random(seed), _History()
        for step in range(count):
            history.add(3 - 2 * step / count + rng.gauss(0, 0.1) + (5.0 if step == 7 else 0.0))
        found.append(history.noise())
        assert len(history.blocks) < BLOCKS
        assert history.size == size
    assert sum(found) / len(found) == pytest.approx(0.1, rel=0.15)


def test_the_lowest_level_is_of_whole_windows() -> None:
    history = _History()
    for loss in [3.0] * 10 + [2.0] * 10 + [1.0] * 9:
        history.add(loss)
    assert history.lowest(10) == 2.0
    history.add(1.0)
    assert history.lowest(10) == 1.0
    for _ in range(1000):
        history.add(4.0)
    assert (history.size, history.lowest(10)) == (16, 1.625), "sixteen losses are one block now"


# -- real runs --------------------------------------------------------------------------------------------------------


def replay(run: TrainingSession) -> dict[str, tuple[int, Signal]]:
    """Train, and give the monitor what was logged."""
    with contextlib.suppress(VerificationError):  # with a rate of 1e-9 some fp32 weights do not move at all
        run.train()
    events = run.run.events()
    total = next(event["steps"] for event in events if event["event"] == "start")
    watched = Monitor(run.config, total)
    names = [field.name for field in dataclasses.fields(StepMetrics)]
    said = {}
    for event in events:
        found: list[Signal] = []
        if event["event"] == "step":
            found = watched.step(StepMetrics(**{name: event[name] for name in names if name != "metrics"}))
        elif event["event"] == "eval":
            found = watched.evaluation(event["step"], event["metrics"])
        said |= {signal.check: (event["step"], signal) for signal in found}
    return said


def nonsense(path: Path, rows: int, seed: int) -> Path:
    """Questions and answers of random letters: what can be learned of one row says nothing about another."""
    rng = random.Random(seed)

    def word(length: int) -> str:
        return "".join(rng.choice("abcdefgh") for _ in range(length))

    return write_jsonl(
        path,
        [
            {"messages": [{"role": "user", "content": word(6)}, {"role": "assistant", "content": word(4)}]}
            for _ in range(rows)
        ],
    )


@pytest.mark.parametrize("lr", ["1e-9", "1e-5"])
def test_a_run_with_a_rate_that_is_too_small(session: Session, lr: str) -> None:
    said = replay(session(f"optimizer.lr={lr}", "training.epochs=10", "training.save_every=100"))
    assert list(said) == ["loss_not_falling"]
    assert f"optimizer.lr {lr} is" in said["loss_not_falling"][1].message


def test_a_run_with_a_good_rate(session: Session) -> None:
    said = replay(
        session("training.epochs=15", "training.save_every=100", "data.eval_path=HELD", "training.eval_every=9")
    )
    assert said == {}


def test_a_run_on_four_examples(session: Session, tmp_path: Path) -> None:
    four, held = nonsense(tmp_path / "four.jsonl", 4, 1), nonsense(tmp_path / "others.jsonl", 16, 2)
    overrides = (f"data.path={four}", "method=full", "training.batch_size=4", "training.save_every=100")
    alone = replay(session(*overrides, "training.epochs=60"))
    assert list(alone) == ["loss_near_zero"]
    assert "and nothing is held out to tell" in alone["loss_near_zero"][1].message
    watched = replay(session(*overrides, "training.epochs=60", f"data.eval_path={held}", "training.eval_every=5"))
    assert set(watched) == {"loss_near_zero", "overfitting"}
    assert watched["overfitting"][0] < watched["loss_near_zero"][0]
    short = replay(session(*overrides, "training.epochs=10", f"data.eval_path={held}", "training.eval_every=5"))
    assert short == {}


def test_a_run_with_a_rate_that_is_too_high(session: Session) -> None:
    said = replay(
        session(
            "method=full", "optimizer.lr=1", "optimizer.warmup_ratio=0", "optimizer.schedule=constant", "training.epochs=8",
            "training.save_every=100",
        )
    )  # fmt: skip
    assert list(said) == ["diverging"]
    assert "set optimizer.lr=0.2 (now 1)" in said["diverging"][1].message
