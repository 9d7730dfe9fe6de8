"""The curves: what downsampling keeps, how smoothing behaves, and what is drawn of unusual runs."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from report_runs import step_event

from tunesmith.report.plots import Plot, _tick, downsample, smoothed, training_plots


def plots(events: list[dict[str, object]], **kwargs: float) -> dict[str, Plot]:
    return {plot.name: plot for plot in training_plots(events, **kwargs)}


def steps(count: int, **changes: object) -> list[dict[str, object]]:
    return [step_event(step, count, 0.0, **changes) for step in range(1, count + 1)]


@pytest.mark.parametrize("length", [1501, 4000, 10_000])
def test_downsampling_keeps_ends_and_extremes(length: int) -> None:
    y = np.sin(np.arange(length) / 50)
    y[777], y[1234], y[40] = 9.0, -9.0, math.nan
    x = np.arange(length) + 1.0
    kept_x, kept_y = downsample(x, y)
    assert len(kept_x) <= 1500
    assert {1.0, 778.0, 1235.0, float(length)} <= set(kept_x)
    assert np.array_equal(kept_y, y[kept_x.astype(int) - 1], equal_nan=True)
    assert (np.diff(kept_x) > 0).all()


def test_downsampling_leaves_short_lines_alone_and_passes_gaps() -> None:
    x = np.arange(1500.0)
    assert downsample(x, x)[1] is x
    gap = np.where((np.arange(6000) > 2000) & (np.arange(6000) < 4000), math.nan, 1.0)
    assert np.isnan(downsample(np.arange(6000.0), gap)[1]).any()


def test_smoothing_keeps_a_constant_follows_without_lag_and_skips_gaps() -> None:
    assert smoothed(np.full(100, 2.5)) == pytest.approx(np.full(100, 2.5))
    line = np.arange(600.0)
    assert smoothed(line)[100:500] == pytest.approx(line[100:500])  # a running mean would lie below
    line[300] = math.nan
    assert smoothed(line)[300] == pytest.approx(300)
    noise = np.random.default_rng(0).normal(size=600)
    assert smoothed(noise).std() < 0.4 * noise.std()


def test_each_plot_and_its_legend() -> None:
    events = [*steps(60), {"event": "eval", "step": 60, "metrics": {"eval_loss": 0.75}}]
    found = plots(events, clip=0.3, limit_gb=8.0)
    assert [plot.title for plot in found.values()] == [
        "Training loss",
        "Learning rate, \N{MULTIPLICATION SIGN} 10⁻⁴",
        "Gradient norm",
        "Tokens per second",
        "Examples per second",
        "Memory, GB",
    ]
    assert found["loss"].legend == (("raw", "each step"), ("line", "smoothed"), ("points", "evaluation"))
    assert found["grad-norm"].legend[-1] == ("limit", "clip threshold 0.3")
    assert found["tokens"].legend[-1] == ("dashed", "supervised tokens")
    assert found["memory"].legend == (("line", "in use"), ("limit", "memory limit 8"))
    assert "highest 1.99e-4 (step 3)" in found["learning-rate"].caption
    for plot in found.values():
        root = ElementTree.fromstring(plot.svg)
        assert root.tag == "svg"
        assert "step" in {text.text for text in root.iter("text")}
        assert "style" not in {element.tag for element in root.iter()}
        assert not set(re.findall(r"(?:fill|stroke): (#\w+)", plot.svg)) - {"#000000", "#ffffff"}


def test_ticks_stay_short() -> None:
    assert [_tick(value) for value in (0.25, 8000.0, 12_500.0, 8.5e6, -1.0)] == [
        "0.25",
        "8,000",
        "12.5k",
        "8.5M",
        "\N{MINUS SIGN}1",
    ]


def test_clipping_is_counted() -> None:
    events = steps(10, grad_norm=0.2)
    events[3]["grad_norm"] = 0.9
    caption = plots(events, clip=0.3)["grad-norm"].caption
    assert "highest 0.900 (step 4). Median 0.200. Clipped to 0.3 in 10.0% of steps." in caption


def test_a_far_limit_is_told_and_not_drawn() -> None:
    memory = plots(steps(5), limit_gb=80.0)["memory"]
    assert "The memory limit, 80, is far above." in memory.caption
    assert memory.legend == ()


def test_an_outlier_gets_a_logarithmic_scale() -> None:
    events = steps(20, grad_norm=0.2)
    assert "Logarithmic" not in plots(events)["grad-norm"].caption
    events[7]["grad_norm"] = 40.0
    plot = plots(events)["grad-norm"]
    assert "highest 40.0 (step 8). Median 0.200. Logarithmic scale." in plot.caption
    assert {"1", "10"} <= {text.text for text in ElementTree.fromstring(plot.svg).iter("text")}


def test_losses_that_were_not_numbers_are_told() -> None:
    events = steps(10)
    events[4]["loss"] = events[6]["loss"] = None
    assert "Not a finite number at 2 steps, first at step 5." in plots(events)["loss"].caption
    nothing = plots(steps(3, loss=None, memory_gb="much"))
    assert nothing["loss"].svg == nothing["memory"].svg == ""
    assert nothing["loss"].caption == "Not a single finite value was recorded."
    assert nothing["tokens"].svg


def test_one_step_is_drawn_as_a_point() -> None:
    plot = plots(steps(1, lr=0.0))["learning-rate"]
    root = ElementTree.fromstring(plot.svg)
    assert [text.text for text in root.iter("text")][:2] == ["1", "step"]  # one tick: there is no step 0.98
    assert any("var(--plot-main" in element.get("style", "") for element in root.iter("use"))
    assert plot.caption == "0 (step 1)."


def test_the_same_run_gives_the_same_drawing() -> None:
    assert plots(steps(40)) == plots(steps(40))


def test_no_steps_no_plots() -> None:
    assert training_plots([{"event": "start"}, {"event": "step", "step": None}]) == []


def test_preferences_have_plots_of_their_own() -> None:
    """Rejected rewards below zero are within the drawing, though the chosen ones are above it."""
    events = [
        step_event(
            step,
            40,
            0.0,
            **{"rewards/chosen": 0.01 * step, "rewards/rejected": -0.02 * step, "rewards/accuracies": step / 40},
        )
        for step in range(1, 21)
    ]
    found = plots([*events, {"event": "eval", "step": 20, "metrics": {"eval_rewards/accuracies": 0.625}}])
    assert [name for name in found if name.startswith("reward")] == ["rewards", "reward-accuracy"]
    assert found["rewards"].legend == (("line", "chosen"), ("dashed", "rejected"))
    assert "\N{MINUS SIGN}0." in found["rewards"].svg
    assert found["reward-accuracy"].caption.endswith("Evaluation pairs: 62.5% at last.")
    assert not [name for name in plots(steps(20)) if name.startswith("reward")]
