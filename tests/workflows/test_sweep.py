"""Sweeps: the grid, one base for all runs, going on after a crash, failures, and what the table concludes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import chat_rows, make_tiny_model, write_jsonl
from tunesmith.config import load_config
from tunesmith.errors import ConfigError, DataError, Interrupted, MachineError, RunError, VerificationError
from tunesmith.evaluation.subject import Subject
from tunesmith.runs import RunFolder
from tunesmith.workflows import shared_base
from tunesmith.workflows.compare import compare
from tunesmith.workflows.evaluate import evaluate
from tunesmith.workflows.shared_base import SharedBase
from tunesmith.workflows.sweep import sweep
from tunesmith.workflows.sweep_points import grid, parse_axes, point_name
from tunesmith.workflows.train import TrainingSession, start

SETTINGS = {
    "model.dtype": "fp32",
    "optimizer.lr": 1e-2,
    "optimizer.max_grad_norm": 10.0,
    "training.batch_size": 8,
    "training.epochs": 2,
    "training.trackers": [],
    "evaluation.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NF4 blocks hold 64 weights of a row."""
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny", hidden=64)


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    """run.yaml, with held-out rows."""
    write_jsonl(tmp_path / "train.jsonl", chat_rows(16))
    write_jsonl(tmp_path / "eval.jsonl", chat_rows(8, seed=1))
    values = SETTINGS | {
        "model.name": str(base),
        "data.path": str(tmp_path / "train.jsonl"),
        "data.eval_path": str(tmp_path / "eval.jsonl"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(load_config(values=values).to_yaml())
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "test.jsonl", chat_rows(12, seed=2))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The quantization of each base that was read from disk, by training and evaluation alike."""
    from tunesmith.workflows import load, train

    found: list[str] = []
    real = shared_base.load_model

    def counted(source: Any, settings: Any, hardware: Any, dtype: Any, quantization: Any = None) -> Any:
        found.append(f"{dtype}{' quantized' if quantization else ''}")
        return real(source, settings, hardware, dtype, quantization)

    for module in (shared_base, load, train):
        monkeypatch.setattr(module, "load_model", counted)
    return found


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that trained, in order."""
    found: list[str] = []
    real = TrainingSession.train

    def train(self: TrainingSession, *rest: Any) -> Any:
        found.append(self.run.path.name)
        return real(self, *rest)

    monkeypatch.setattr(TrainingSession, "train", train)
    return found


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in RunFolder.open(run).events() if event["event"] == "step"]


def state_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "sweep.json").read_text())
    assert isinstance(found, dict)
    return found


# -- the grid ---------------------------------------------------------------------------------------------------------


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


# -- one base, the same results ---------------------------------------------------------------------------------------


def test_runs_share_one_base_and_are_what_they_are_alone(
    config: Path, tmp_path: Path, loads: list[str], questions: Path
) -> None:
    result = sweep(
        config,
        ["lora.r=2,4", "adapter.dropout=0,0.2"],
        out=tmp_path / "sweep",
        data=questions,
        settings=["training.epochs=1"],
    )
    assert loads == ["fp32"]
    assert result["base_loads"] == 1
    assert [run["name"] for run in result["runs"]] == [
        "r=2_dropout=0", "r=2_dropout=0.2", "r=4_dropout=0", "r=4_dropout=0.2",
    ]  # fmt: skip
    different = set()
    for run in result["runs"]:
        overrides = ["training.epochs=1", *(f"{key}={value}" for key, value in run["values"].items())]
        alone = tmp_path / "alone" / run["name"]
        start(load_config(config, overrides), alone).train()
        assert losses(Path(run["path"])) == losses(alone)
        ours, theirs = (RunFolder.open(path).metrics for path in (run["path"], alone))
        assert ours["eval_loss"] == theirs["eval_loss"]
        asked = evaluate(alone, questions)
        (kept,) = (Path(run["path"]) / "evaluations").glob("*.json")
        evaluation = json.loads(kept.read_text())
        for key in ("metrics", "examples", "settings", "data_sha256", "n", "rows_in_file", "task_kind", "classes"):
            assert evaluation[key] == asked[key], key
        assert (Path(run["path"]) / "report.html").is_file()
        different.add(tuple(losses(alone)))
    assert len(different) == 4


@pytest.mark.parametrize(
    ("values", "engine"),
    [
        ({"adapter.dropout": 0.3}, "reference"),
        ({"model.engine": "fused", "data.packing": True}, "fused"),
        ({"method": "qlora"}, "reference"),
        ({"memory.mode": "min"}, "reference"),
        ({"adapter.dora": True}, "reference"),
    ],
)
def test_a_base_comes_back_bit_for_bit(
    config: Path, tmp_path: Path, values: dict[str, Any], engine: str, loads: list[str]
) -> None:
    shared = SharedBase()
    first = start(load_config(config, values=values), tmp_path / "first", load_base=shared.load)
    model = first.forward.model
    before = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): value.clone()
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if "lora_" not in name and ".layers.0.original" not in name
    }
    first.train()
    assert first.plan.memory.engine == engine
    assert (first.plan.memory.recompute_layers > 0) == (values.get("memory.mode") == "min")
    shared.take_back(model, first.config)
    quantization = first.config.quantization if first.config.method == "qlora" else None
    base = shared.load(first.source, first.config.model, first.hardware, "fp32", quantization)
    assert len(loads) == shared.loads == 1
    assert base is first.forward.base
    after = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    assert any("q_proj" in name for name in before)
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
    for module in base.modules():
        assert "lora" not in type(module).__name__.lower()
        assert "Fused" not in type(module).__name__
        assert not getattr(module, "gradient_checkpointing", False)
        assert not module.training
        assert not module._forward_hooks
    assert not hasattr(base.get_decoder(), "mask_source")
    assert all(p.requires_grad == p.is_floating_point() for p in base.parameters())


def test_what_changes_the_base_is_followed_by_a_fresh_one(config: Path, tmp_path: Path, loads: list[str]) -> None:
    said: list[str] = []
    sweep(
        config,
        ["adapter.init_lora_weights=default,pissa,olora", "adapter.r=2,3"],
        out=tmp_path / "sweep",
        settings=["training.max_steps=2"],
        announce=said.append,
    )
    assert len(loads) == 1 + 3  # both default ones and the first with pissa share, the others have their own
    assert [line for line in said if "loaded again" in line] == [
        "the base is loaded again: in the run before, adapter.init_lora_weights pissa takes its beginning out of the base's weights",
        "the base is loaded again: in the run before, adapter.init_lora_weights pissa takes its beginning out of the base's weights",
        "the base is loaded again: in the run before, adapter.init_lora_weights olora takes its beginning out of the base's weights",
    ]
    for name, override in (("pissa_r=3", "pissa"), ("olora_r=3", "olora")):
        alone = tmp_path / name
        overrides = ["training.max_steps=2", "adapter.r=3", f"adapter.init_lora_weights={override}"]
        start(load_config(config, overrides), alone).train()
        assert losses(tmp_path / "sweep" / "runs" / f"init_lora_weights={name}") == losses(alone)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("method=full,lora", "method full trains the base itself"),
        ("adapter.modules_to_save=[lm_head],[]", "adapter.modules_to_save trains modules of the base"),
        ("adapter.new_tokens=['Which'],[]", "adapter.new_tokens changes the embeddings"),
    ],
)
def test_a_run_after_one_that_trains_the_base_is_what_it_is_alone(
    config: Path, tmp_path: Path, setting: str, why: str, loads: list[str]
) -> None:
    said: list[str] = []
    result = sweep(config, [setting], out=tmp_path / "sweep", settings=["training.max_steps=2"], announce=said.append)
    assert f"the base is loaded again: in the run before, {why}" in said
    assert len(loads) == 2
    start(load_config(config, ["training.max_steps=2"]), tmp_path / "alone").train()
    assert losses(Path(result["runs"][1]["path"])) == losses(tmp_path / "alone")


def test_full_training_can_follow_an_adapter_on_the_same_base(config: Path, tmp_path: Path, loads: list[str]) -> None:
    result = sweep(config, ["method=lora,full"], out=tmp_path / "sweep", settings=["training.max_steps=2"])
    assert len(loads) == 1
    start(load_config(config, ["training.max_steps=2", "method=full"]), tmp_path / "alone").train()
    assert losses(Path(result["runs"][1]["path"])) == losses(tmp_path / "alone")


def test_a_base_that_was_changed_is_not_used_again(config: Path, tmp_path: Path, loads: list[str]) -> None:
    said: list[str] = []
    shared = SharedBase(said.append)
    first = start(load_config(config), tmp_path / "first", load_base=shared.load)
    first.train()
    with torch.no_grad():
        first.forward.base.get_input_embeddings().weight[3, 5] += 1e-6
    shared.take_back(first.forward.model, first.config)
    start(load_config(config), tmp_path / "second", load_base=shared.load)
    assert len(loads) == 2
    assert said == ["the base is loaded again: the run before changed model.embed_tokens.weight"]


# -- going on ---------------------------------------------------------------------------------------------------------


def dying_at(step: int, error: Callable[[], BaseException]) -> Callable[[Any], None]:
    """An EventSink that raises after a step of the second run."""
    starts = 0

    def sink(event: Any) -> None:
        nonlocal starts
        starts += event["event"] == "start"
        if starts == 2 and event["event"] == "step" and event["step"] == step:
            raise error()

    return sink


def test_a_killed_sweep_goes_on_where_it_was(
    config: Path, tmp_path: Path, loads: list[str], sessions: list[str]
) -> None:
    over, out = ["adapter.r=2,3,4"], tmp_path / "sweep"
    settings = ["training.save_every=1"]
    with pytest.raises(KeyboardInterrupt):  # as SIGKILL leaves it: nothing of our own runs afterwards
        sweep(config, over, out=out, settings=settings, sink=dying_at(3, KeyboardInterrupt))
    assert sessions == ["r=2", "r=3"]
    assert [run["status"] for run in state_of(out)["runs"]] == ["finished", "running", "pending"]
    sessions.clear()
    said: list[str] = []
    result = sweep(config, over, out=out, settings=settings, announce=said.append)
    assert sessions == ["r=3", "r=4"]
    assert said[0] == "run 1 of 3, r=2: is finished already"
    assert [run["status"] for run in result["runs"]] == ["finished"] * 3
    resumed = RunFolder.open(out / "runs" / "r=3")
    assert [event["step"] for event in resumed.events() if event["event"] == "resume"] == [2]
    whole = sweep(config, over, out=tmp_path / "whole", settings=settings)
    for run in whole["runs"]:
        assert losses(out / "runs" / run["name"]) == losses(Path(run["path"]))
    assert [run["metric"] for run in result["runs"]] == [run["metric"] for run in whole["runs"]]
    assert len(loads) == 3


def test_a_finished_sweep_trains_and_loads_nothing(
    config: Path, tmp_path: Path, loads: list[str], sessions: list[str], questions: Path
) -> None:
    arguments: dict[str, Any] = {"out": tmp_path / "sweep", "data": questions, "settings": ["training.epochs=1"]}
    first = sweep(config, ["adapter.r=2,3"], **arguments)
    loads.clear()
    sessions.clear()
    second = sweep(config, ["adapter.r=2,3"], **arguments)
    assert (loads, sessions) == ([], [])
    assert {**second, "base_loads": 1} == first
    assert state_of(tmp_path / "sweep") == second


def test_a_run_that_lacks_only_its_evaluation_is_only_evaluated(
    config: Path, tmp_path: Path, sessions: list[str], questions: Path
) -> None:
    arguments: dict[str, Any] = {"out": tmp_path / "sweep", "data": questions, "settings": ["training.epochs=1"]}
    first = sweep(config, ["adapter.r=2,3"], rows=5, **arguments)
    path = Path(first["runs"][1]["path"]) / "evaluations" / "test.json"
    kept = json.loads(path.read_text())
    assert kept["n"] == 5
    path.unlink()
    sessions.clear()
    second = sweep(config, ["adapter.r=2,3"], rows=5, **arguments)
    assert sessions == []
    assert json.loads(path.read_text())["examples"] == kept["examples"]
    assert second["runs"] == first["runs"]


def test_a_signal_saves_the_run_and_says_how_to_go_on(config: Path, tmp_path: Path, sessions: list[str]) -> None:
    import os
    import signal

    starts = 0

    def sink(event: Any) -> None:
        nonlocal starts
        starts += event["event"] == "start"
        if starts == 2 and event["event"] == "step" and event["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "sweep"
    with pytest.raises(Interrupted) as caught:
        sweep(config, ["adapter.r=2,3,4"], out=out, sink=sink)
    assert str(caught.value) == (
        f"r=3 was stopped (run 2 of 3), its state saved in {out / 'runs' / 'r=3'}; the same `tunesmith sweep` command goes on"
    )
    assert [run["status"] for run in state_of(out)["runs"]] == ["finished", "interrupted", "pending"]
    sweep(config, ["adapter.r=2,3,4"], out=out)
    assert sessions == ["r=2", "r=3", "r=3", "r=4"]


def test_a_sweep_with_other_settings_is_refused_with_what_changed(
    config: Path, tmp_path: Path, questions: Path, sessions: list[str]
) -> None:
    out = tmp_path / "sweep"
    sweep(config, ["adapter.r=2,3"], out=out, settings=["training.epochs=1"])
    sessions.clear()
    with pytest.raises(RunError) as caught:
        sweep(config, ["adapter.r=2,4"], out=out, data=questions, rows=3)
    assert str(caught.value).startswith(
        f"{out}: this sweep was begun with other settings: training.epochs was 1.0, is 2.0; "
        "over.adapter.r was [2, 3], is [2, 4]; data was null, is "
    )
    assert str(caught.value).endswith(
        '; metric was "eval_loss", is "accuracy". Give them as they were, or choose another --out'
    )
    assert sessions == []


def test_a_folder_of_something_else_is_refused(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(RunError) as caught:
        sweep(config, ["adapter.r=2,3"], out=out)
    assert str(caught.value) == f"{out} exists already and is no sweep (it has no sweep.json); choose another --out"
    assert [each.name for each in out.iterdir()] == ["thesis.tex"]


# -- what is checked first --------------------------------------------------------------------------------------------


def test_every_run_is_checked_before_the_first(config: Path, tmp_path: Path, loads: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(config, ["adapter.r=0,2", "optimizer.lr=1e-3,7"], out=tmp_path / "sweep")
    assert caught.value.problems == [
        "r=0_lr=1e-3 and 1 more: `adapter.r` is 0: input should be greater than or equal to 1",
        "r=0_lr=7 and 1 more: `optimizer.lr` is 7: input should be less than or equal to 1",
    ]
    with pytest.raises(DataError) as caught_data:
        sweep(
            config,
            ["adapter.r=2,3", f"data.path={tmp_path / 'train.jsonl'},absent.jsonl", "model.name=nowhere/at all"],
            out=tmp_path / "sweep",
        )
    assert [problem.partition(": ")[2] for problem in caught_data.value.problems] == [
        "nowhere/at all: no such model folder or .gguf file (a hub id looks like org/model)",
        "absent.jsonl: no such file",
    ]
    with pytest.raises(ConfigError) as caught:
        sweep(config, ["optimizer.lr=1e-3,0.001"], out=tmp_path / "sweep")
    assert caught.value.problems == ["lr=0.001 is lr=1e-3 once more: leave one of the two values out"]
    assert not (tmp_path / "sweep").exists()
    assert loads == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            {"settings": ["data.eval_path=null"]},
            "nothing measures these runs: pass --data FILE, or set data.eval_path or data.eval_fraction; the training loss, "
            "which says how well a run learnt its rows by heart, is taken with --metric train_loss",
        ),
        (
            {"settings": ["data.eval_path=null"], "metric": "eval_loss"},
            "--metric eval_loss: no run has held-out rows; set data.eval_path or data.eval_fraction",
        ),
        (
            {"metric": "accuracy"},
            "--metric accuracy: only an evaluation measures it; pass --data FILE, or take one of eval_loss, train_loss",
        ),
        ({"rows": 3}, "--rows is how many of --data are asked, and there is no --data; add it, or leave --rows out"),
    ],
)
def test_what_nothing_measures_is_refused(
    config: Path, tmp_path: Path, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "sweep", **arguments)
    assert caught.value.problems == [problem]


def test_questions_and_their_metrics_are_known_before_the_first_run(
    config: Path, tmp_path: Path, loads: list[str], questions: Path
) -> None:
    with pytest.raises(DataError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "sweep", data=tmp_path / "absent.jsonl")
    assert caught.value.problems == [f"{tmp_path / 'absent.jsonl'}: no such file"]
    rows = chat_rows(12)
    rows[4]["messages"][0]["content"] += "\ufdd0"
    odd = write_jsonl(tmp_path / "odd.jsonl", rows)
    with pytest.raises(DataError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "sweep", data=odd)
    assert caught.value.problems == [
        f"{odd}:5: the user text holds a Unicode noncharacter (U+FDD0 to U+FDD9); remove it"
    ]
    with pytest.raises(ConfigError) as caught_metric:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "sweep", data=questions, metric="bleu")
    assert caught_metric.value.problems == [
        f"--metric bleu: {questions} is of the task label, which has accuracy, exact_match, macro_f1, micro_f1; "
        "take one of these or eval_loss, train_loss"
    ]
    assert loads == []


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Errors that runs end in, by their names."""
    errors: dict[str, Exception] = {}
    real = TrainingSession.train

    def train(self: TrainingSession, *rest: Any) -> Any:
        if (error := errors.get(self.run.path.name)) is not None:
            raise error
        return real(self, *rest)

    monkeypatch.setattr(TrainingSession, "train", train)
    return errors


def test_a_failed_run_is_recorded_and_the_others_go_on(
    config: Path, tmp_path: Path, failing: dict[str, Exception], loads: list[str]
) -> None:
    failing["r=3"] = VerificationError("the loss is NaN")
    out = tmp_path / "sweep"
    result = sweep(config, ["adapter.r=2,3,4"], out=out)
    assert [(run["status"], run["error"], run["exit_code"]) for run in result["runs"]] == [
        ("finished", None, None),
        ("failed", "the loss is NaN", 1),
        ("finished", None, None),
    ]
    assert result["runs"][1]["metric"] is None
    assert result["conclusions"][-1] == "run 2 (r=3) failed: the loss is NaN"
    assert len(loads) == 1
    failing.clear()
    again = sweep(config, ["adapter.r=2,3,4"], out=out)  # it would fail again
    assert [run["status"] for run in again["runs"]] == ["finished", "failed", "finished"]


def test_what_the_machine_could_not_is_tried_again(config: Path, tmp_path: Path, failing: dict[str, Exception]) -> None:
    failing["r=2"] = MachineError("the disk is full")
    out = tmp_path / "sweep"
    assert sweep(config, ["adapter.r=2,3"], out=out)["runs"][0]["error"] == "the disk is full"
    failing.clear()
    result = sweep(config, ["adapter.r=2,3"], out=out)
    assert [run["status"] for run in result["runs"]] == ["finished"] * 2
    assert losses(out / "runs" / "r=2")


def test_a_run_that_cannot_begin_is_a_failure_too(config: Path, tmp_path: Path, loads: list[str]) -> None:
    result = sweep(
        config,
        ["adapter.target_modules=[q_projection],[q_proj]"],
        out=tmp_path / "sweep",
        settings=["training.max_steps=2"],
    )
    first, second = result["runs"]
    assert (first["status"], first["exit_code"], second["status"]) == ("failed", 2, "finished")
    assert first["error"].startswith("adapter.target_modules: q_projection matches no linear layer of this model")
    assert len(loads) == 2  # what a run that never began left of its base is not known


# -- conclusions ------------------------------------------------------------------------------------------------------


def judged(
    monkeypatch: pytest.MonkeyPatch, config: Path, out: Path, questions: Path, right: dict[int, int], **arguments: Any
) -> dict[str, Any]:
    """A sweep over ranks whose runs answer so many of the first questions rightly, whatever they learnt."""

    def generate(self: Subject, prompts: Any, *rest: Any) -> list[str]:
        count = right[self.forward.model.peft_config["default"].r]
        return [row["messages"][-1]["content"] if n < count else "glue" for n, row in enumerate(chat_rows(12, seed=2))]

    monkeypatch.setattr(Subject, "generate", generate)
    return sweep(config, ["adapter.r=2,3,4"], out=out, data=questions, settings=["training.max_steps=2"], **arguments)


def test_the_cheapest_run_that_is_not_clearly_worse_is_named(
    config: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = judged(monkeypatch, config, tmp_path / "a", questions, {2: 2, 3: 9, 4: 12})
    assert (result["best"], result["within_error"], result["cheapest"]) == ("r=4", ["r=3"], "r=3")
    against = [run["against_best"] for run in result["runs"]]
    assert against[0]["verdict"] == "worse"
    assert against[0]["p"] == pytest.approx(2 / 2**10)
    assert (against[1]["verdict"], against[1]["p"], against[1]["test"]) == ("unclear", 0.25, "McNemar")
    assert against[2] is None
    seconds = result["runs"][1]["wall_seconds"]
    assert result["conclusions"] == [
        "best: run 3 (r=4), accuracy 100.0% ± 0.0",
        "not clearly worse (p of a test against the best is 0.05 or more): run 2",
        f"the cheapest of these and the best: run 2 (r=3), 6.14 k trained parameters, {seconds:.1f} s",
    ]
    alone = judged(monkeypatch, config, tmp_path / "b", questions, {2: 0, 3: 12, 4: 1})
    assert (alone["best"], alone["within_error"], alone["cheapest"]) == ("r=3", [], None)
    assert alone["conclusions"] == ["best: run 2 (r=3), accuracy 100.0% ± 0.0"]


@pytest.mark.parametrize(("metric", "test"), [("exact_match", "McNemar"), ("macro_f1", "randomization")])
def test_other_metrics_of_answers_are_compared_on_the_same_rows(
    config: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, metric: str, test: str
) -> None:
    result = judged(monkeypatch, config, tmp_path / "a", questions, {2: 1, 3: 11, 4: 12}, metric=metric)
    assert (result["best"], result["within_error"], result["metric"]["share"]) == ("r=4", ["r=3"], True)
    assert result["runs"][0]["against_best"]["test"] == test
    assert result["runs"][0]["against_best"]["verdict"] == "worse"


def test_the_loss_of_texts_is_compared_by_its_errors(config: Path, tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": row["messages"][0]["content"]} for row in chat_rows(20)])
    result = sweep(config, ["optimizer.lr=2e-2,1e-6"], out=tmp_path / "a", data=texts, settings=["data.train_on=all"])
    assert result["metric"] == {"name": "loss", "lower_is_better": True, "source": "evaluation", "share": False}
    first, second = result["runs"]
    assert first["metric"] < second["metric"]
    assert (result["best"], result["within_error"]) == ("lr=2e-2", [])
    assert (second["against_best"]["test"], second["against_best"]["verdict"]) == ("z", "worse")


def test_the_users_own_metric_decides(
    config: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "metrics.py"
    code.write_text("def size(row):\n    return {'letters': len(row['answer'])}\nsize.higher_is_better = False\n")
    settings = [f"evaluation.metrics=[{code}:size]", "training.max_steps=1"]
    arguments: dict[str, Any] = {"data": questions, "settings": settings}

    def generate(self: Subject, prompts: Any, *rest: Any) -> list[str]:
        return ["a" * self.forward.model.peft_config["default"].r] * 12

    monkeypatch.setattr(Subject, "generate", generate)
    result = sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", metric="size.letters", **arguments)
    assert [run["metric"] for run in result["runs"]] == [2.0, 3.0]
    assert (result["best"], result["metric"]["lower_is_better"]) == ("r=2", True)
    wrong = sweep(config, ["adapter.r=2"], out=tmp_path / "b", metric="size.words", **arguments)
    assert wrong["runs"][0]["error"] == (
        "--metric size.words: the evaluation has accuracy, exact_match, macro_f1, micro_f1, size.letters; take one of these"
    )


def test_the_lowest_loss_is_best_and_nothing_is_claimed_of_its_error(config: Path, tmp_path: Path) -> None:
    result = sweep(config, ["optimizer.lr=1e-2,1e-6"], out=tmp_path / "sweep")
    first, second = (run["metric"] for run in result["runs"])
    assert first < second
    assert (result["best"], result["within_error"], result["cheapest"]) == ("lr=1e-2", [], None)
    assert result["conclusions"] == [
        f"best: run 1 (lr=1e-2), eval_loss {first:.3f}",
        "eval_loss has no standard error here: --data FILE measures the runs on rows that can be compared",
    ]
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert result["html"] == str(tmp_path / "sweep" / "sweep.html")
    assert "eval_loss against time" in page
    assert "eval_loss against size" in page
    names = [run["name"] for run in compare([run["path"] for run in result["runs"]])["runs"]]
    assert names == ["lr=1e-2", "lr=1e-6"]


# -- search -----------------------------------------------------------------------------------------------------------


def test_a_search_proposes_within_its_ranges_and_is_the_same_again(config: Path, tmp_path: Path) -> None:
    over = ["optimizer.lr=1e-4..1e-1", "adapter.r=2..8", "adapter.alpha=4,8"]
    short = ["training.max_steps=1"]
    first = sweep(config, over, out=tmp_path / "a", settings=short, trials=4)
    values = [run["values"] for run in first["runs"]]
    assert len({json.dumps(each) for each in values}) == 4
    assert all(1e-4 <= each["optimizer.lr"] <= 1e-1 for each in values)
    assert all(each["adapter.r"] in range(2, 9) and each["adapter.alpha"] in (4, 8) for each in values)
    assert [run["name"][:4] for run in first["runs"]] == ["001_", "002_", "003_", "004_"]
    best = min(first["runs"], key=lambda run: run["metric"])
    assert first["best"] == best["name"]
    second = sweep(config, over, out=tmp_path / "b", settings=short, trials=4)
    assert [run["values"] for run in second["runs"]] == values


def test_a_killed_search_goes_on_with_what_it_would_have_proposed(
    config: Path, tmp_path: Path, sessions: list[str]
) -> None:
    over, out = ["optimizer.lr=1e-4..1e-1"], tmp_path / "a"
    whole = sweep(config, over, out=tmp_path / "whole", trials=3)
    sessions.clear()
    with pytest.raises(KeyboardInterrupt):
        sweep(config, over, out=out, trials=3, sink=dying_at(1, KeyboardInterrupt))
    result = sweep(config, over, out=out, trials=3)
    names = [run["name"] for run in whole["runs"]]
    assert sessions == [names[0], names[1], names[1], names[2]]
    assert [(run["name"], run["metric"]) for run in result["runs"]] == [
        (run["name"], run["metric"]) for run in whole["runs"]
    ]
    more = sweep(config, over, out=out, trials=4)  # a search can be made longer
    assert [run["name"] for run in more["runs"]][:3] == names
    assert len(more["runs"]) == 4


def test_a_search_learns_from_what_it_is_told(tmp_path: Path) -> None:
    from tunesmith.workflows.sweep_search import Search

    axes = parse_axes(["optimizer.lr=1e-5..1e-1"], search=True)
    found: dict[bool, list[float]] = {}
    for lower in (True, False):
        (tmp_path / str(lower)).mkdir()
        search = Search(tmp_path / str(lower), axes, lower)
        for _ in range(40):
            number, values = search.next()
            search.tell(number, values["optimizer.lr"])  # the rate itself is the metric
        found[lower] = [values["optimizer.lr"] for _, values in search.done()][20:]
    assert sorted(found[True])[10] < 1e-4
    assert sorted(found[False])[10] > 1e-2


def test_a_point_that_is_proposed_again_is_not_trained_again(config: Path, tmp_path: Path, sessions: list[str]) -> None:
    result = sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", settings=["training.max_steps=1"], trials=6)
    assert len(sessions) == len(result["runs"]) == 2


def test_a_failed_trial_is_told_as_one(config: Path, tmp_path: Path, failing: dict[str, Exception]) -> None:
    import optuna

    failing["001_r=3"] = failing["001_r=2"] = VerificationError("the loss is NaN")
    sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", settings=["training.max_steps=1"], trials=1)
    from tunesmith.workflows.sweep_search import Search

    (trial,) = Search(tmp_path / "a", parse_axes(["adapter.r=2,3"]), True).study.trials
    assert trial.state == optuna.trial.TrialState.FAIL


def test_a_search_without_optuna_says_what_to_install(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else real(name, *rest)
    )
    with pytest.raises(MachineError) as caught:
        sweep(config, ["adapter.r=2,3"], out=tmp_path / "a", trials=2)
    assert str(caught.value) == "a search (--trials) needs Optuna; install it with: pip install 'tunesmith[search]'"
