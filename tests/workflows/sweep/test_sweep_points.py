"""What a sweep goes over: the grid, and the name of each point."""

from __future__ import annotations

import pytest

from tunesmith.errors import ConfigError
from tunesmith.workflows.sweep_points import grid, parse_axes, point_name


def test_the_grid_has_the_last_axis_fastest_and_lora_is_adapter() -> None:
    axes = parse_axes(["lora.r=8,16", "optimizer.lr=1e-4,2e-4", "adapter.target_modules=[q_proj, v_proj]"])
    assert [axis.key for axis in axes] == ["adapter.r", "optimizer.lr", "adapter.target_modules"]
    points = grid(axes)
    assert [(point["adapter.r"], point["optimizer.lr"]) for point in points] == [
        (8, "1e-4"),
        (8, "2e-4"),
        (16, "1e-4"),
        (16, "2e-4"),
    ]
    assert points[0]["adapter.target_modules"] == ["q_proj", "v_proj"]
    assert point_name(axes, points[0]) == "r=8_lr=1e-4_target_modules=q_proj+v_proj"


def test_names_stay_apart_and_make_folders() -> None:
    axes = parse_axes(["data.path=/a/x.jsonl,/b/x.jsonl", "data.eval_path=/e"])
    names = [point_name(axes, point) for point in grid(axes)]
    assert len(set(names)) == 2
    assert all("/" not in name for name in names)
    twins = parse_axes(["adapter.alpha=1", "objective.beta=2", "data.split=a", "data.eval_split=b"])
    assert point_name(twins, grid(twins)[0]) == "alpha=1_beta=2_split=a_eval_split=b"
    long = parse_axes([f"adapter.target_modules=[{', '.join(f'projection_{n}' for n in range(9))}]"])
    assert len(point_name(long, grid(long)[0])) == 80 + 1 + 8


def test_values_of_one_short_name_are_told_apart() -> None:
    axes = parse_axes(["optimizer.lr=0.000100001,0.000100002,0.0002", "adapter.target_modules=[a, b],[a+b]"])
    names = [point_name(axes, point) for point in grid(axes)]
    assert len(set(names)) == 6
    assert [name.partition("_")[0] for name in names[::2]] == ["lr=0.000100001", "lr=0.000100002", "lr=0.0002"]
    searched = parse_axes(["optimizer.lr=1e-5..1e-3"], search=True)  # numbered, so that names may be short
    assert point_name(searched, {"optimizer.lr": 0.000123456}) == "lr=0.0001235"


@pytest.mark.parametrize(
    ("over", "problem"),
    [
        ([], "nothing to sweep over: pass --over, e.g. --over adapter.r=8,16,32"),
        (["adapter.r"], "--over adapter.r: expected section.key=value,value,..., e.g. --over adapter.r=8,16,32"),
        (["adapter.r="], "--over adapter.r=: expected section.key=value,value,..., e.g. --over adapter.r=8,16,32"),
        (
            ["lora.r=8", "adapter.r=16"],
            "--over adapter.r=16: adapter.r has an --over of its own already; give all values in one",
        ),
        (
            ["adapter.alpha=8,16"],
            "--over adapter.alpha=8,16: --set gives adapter.alpha one value; leave one of the two out",
        ),
        (["adapter.r=8,8"], "--over adapter.r=8,8: 8 is there twice"),
        (
            ["evaluation.max_rows=5,6"],
            "--over evaluation.max_rows=5,6: evaluation.max_rows is how runs are measured, which must be the same for all; use --set",
        ),
        (["training.trackers=[]"], "--over training.trackers=[]: training.trackers changes no result"),
        (
            ["optimizer.lr=1e-5..1e-3"],
            "--over optimizer.lr=1e-5..1e-3: a range is searched, not tried out whole: pass --trials N, or list values",
        ),
        (
            ["optimizer.lr=1e-3..1e-5"],
            "--over optimizer.lr=1e-3..1e-5: expected a range LOW..HIGH of numbers above 0, the lower first, found 1e-3..1e-5",
        ),
    ],
)
def test_axes_that_make_no_sense(over: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_axes(over, ["lora.alpha=4"])
    assert caught.value.problems == [problem]
