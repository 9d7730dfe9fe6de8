"""What the loop does between steps: evaluation, checkpoints, early stopping, guards, memory plans, precisions."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import make_tiny_model
from tunesmith.config import OptimizerConfig, RunConfig, load_config
from tunesmith.data.batches import StepOrder
from tunesmith.data.packing import best_fit
from tunesmith.errors import ConfigError, DataError, MachineError, VerificationError
from tunesmith.evaluation.statistics import Scores
from tunesmith.training import loop
from tunesmith.training.guards import MovementCheck
from tunesmith.training.loop import accumulate_gradients
from tunesmith.training.optimizers import learning_rate, make_optimizer
from tunesmith.workflows.train import TrainingSession, start

Session = Callable[..., TrainingSession]
Configure = Callable[..., RunConfig]


def events(session: TrainingSession, kind: str) -> list[dict[str, Any]]:
    return [event for event in session.run.events() if event["event"] == kind]


def test_learning_rate_schedules() -> None:
    config = OptimizerConfig(warmup_ratio=0.1, schedule="cosine")
    rates = [learning_rate(config, 1.0, step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    linear = OptimizerConfig(warmup_ratio=0.0, schedule="linear")
    assert [learning_rate(linear, 2.0, step, 4) for step in range(4)] == pytest.approx([2.0, 1.5, 1.0, 0.5])
    constant = OptimizerConfig(warmup_ratio=0.5, schedule="constant")
    assert [learning_rate(constant, 3.0, step, 4) for step in range(4)] == pytest.approx([1.0, 2.0, 3.0, 3.0])


def test_no_weight_decay_on_norms_and_biases(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    groups = make_optimizer(model, OptimizerConfig(weight_decay=0.3), 1e-3).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in groups[1]["params"]} == {
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(names)


def test_metrics_count_what_was_trained(session: Session) -> None:
    run = session("training.epochs=2")
    metrics = run.train().metrics
    steps = events(run, "step")
    assert len(steps) == 6
    assert sum(step["examples"] for step in steps) == 48
    assert sum(step["tokens"] for step in steps) == 2 * sum(map(len, run.data.train))
    supervised = 2 * sum(example.supervised for example in run.data.train)
    assert sum(step["supervised_tokens"] for step in steps) == metrics["supervised_tokens"] == supervised
    weighted = sum(step["loss"] * step["supervised_tokens"] for step in steps) / supervised
    assert metrics["train_loss"] == pytest.approx(weighted)
    seconds = sum(step["seconds"] for step in steps)
    assert metrics["examples_per_second"] == pytest.approx(48 / seconds)
    assert metrics["supervised_tokens_per_second"] == pytest.approx(supervised / seconds)
    assert steps[-1]["epoch"] == 2.0
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]  # q k v o gate up down
    assert metrics["trainable_parameters"] == 2 * 16 * sum(map(sum, widths))
    embedding, norms = 320 * 32, 5 * 32
    base = 2 * embedding + norms + 2 * sum(a * b for a, b in widths)
    assert metrics["total_parameters"] == base + metrics["trainable_parameters"]
    assert run.run.metrics == metrics


def test_log_every_reports_the_mean_of_its_window(session: Session) -> None:
    each = session("training.epochs=2", "training.save_every=100")
    each.train()
    pairs = session("training.epochs=2", "training.save_every=100", "training.log_every=2")
    pairs.train()
    single, double = events(each, "step"), events(pairs, "step")
    assert [event["step"] for event in double] == [2, 4, 6]
    first = sum(e["loss"] * e["supervised_tokens"] for e in single[:2]) / sum(
        e["supervised_tokens"] for e in single[:2]
    )
    assert double[0]["loss"] == pytest.approx(first, rel=1e-6)
    assert double[0]["examples"] == 16


def test_evaluation_during_training(session: Session) -> None:
    run = session("training.epochs=2", "data.eval_path=HELD", "evaluation.generate=true", "evaluation.max_new_tokens=8")
    metrics = run.train().metrics
    evaluations = events(run, "eval")
    assert [event["step"] for event in evaluations] == [3, 6]
    assert set(evaluations[0]["metrics"]) == {"eval_loss", "accuracy", "exact_match", "macro_f1", "micro_f1"}
    assert evaluations[1]["metrics"]["eval_loss"] < evaluations[0]["metrics"]["eval_loss"]
    assert metrics["eval_loss"] == evaluations[1]["metrics"]["eval_loss"]


def test_eval_loss_does_not_depend_on_its_batches(session: Session) -> None:
    from tunesmith.training.loop import evaluate_loss

    run = session("data.eval_path=HELD")
    values = []
    for overrides in (
        ["training.micro_batch_size=1"],
        ["training.micro_batch_size=8"],
        ["training.micro_batch_size=8", "data.packing=true"],
        ["training.micro_batch_tokens=128", "data.packing=true", "data.max_seq_length=128"],
        ["training.micro_batch_tokens=4096", "data.packing=true"],
    ):
        values.append(evaluate_loss(run.forward, run.objective, run.data.eval, load_config(None, overrides), 0))
    assert max(values) - min(values) < 1e-5
    assert values[0] > 1


def test_early_stopping_keeps_the_best_weights(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([3.0, 1.0, 2.0, 2.5, 0.1])
    monkeypatch.setattr("tunesmith.workflows.training_evaluation.evaluate_loss", lambda *_: next(script))
    run = session(
        "training.epochs=10", "data.eval_path=HELD", "training.eval_every=2", "training.save_every=2",
        "training.early_stopping.metric=eval_loss", "training.early_stopping.patience=2", "training.save_total_limit=1",
    )  # fmt: skip
    result = run.train()
    assert result.status == "stopped_early"
    assert result.metrics["steps"] == 8
    assert result.metrics["best_step"] == 4
    assert [step for step, _ in run.run.checkpoints()] == [4, 8], "the best one is kept beside the newest"
    best = load_file(run.run.checkpoint_path(4) / "adapter" / "adapter_model.safetensors")
    final = load_file(run.run.adapter_path / "adapter_model.safetensors")
    last = load_file(run.run.checkpoint_path(8) / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(best[name], final[name]) for name in best)
    assert not all(torch.equal(last[name], final[name]) for name in best)
    assert run.run.best() == {"step": 4, "metric": "eval_loss", "value": 1.0}
    assert result.metrics["eval_loss"] == 1.0, "the metrics are those of the weights that were kept"


def test_early_stopping_on_a_metric_that_should_rise(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.2, 0.5, 0.5, 0.5])
    monkeypatch.setattr(
        "tunesmith.workflows.training_evaluation.score_answers", lambda *_: {"accuracy": Scores(1, (next(values),))}
    )
    run = session(
        "training.epochs=10", "data.eval_path=HELD", "evaluation.generate=true", "evaluation.max_new_tokens=1",
        "training.early_stopping.metric=accuracy", "training.early_stopping.patience=2",
    )  # fmt: skip
    assert run.config.training.early_stopping.mode == "max"
    assert run.train().metrics["best_step"] == 6
    assert run.run.metrics["steps"] == 12


def test_a_metric_of_another_task_is_refused_before_the_model(configure: Configure, tmp_path: Path) -> None:
    config = configure(
        "data.eval_path=HELD", "evaluation.generate=true", "training.early_stopping.metric=rouge1",
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"metric is 'rouge1': the held-out rows are the task label .* has no such metric"
    ):
        start(config, tmp_path / "run")


def test_an_unknown_metric_is_refused_before_training(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stopping.metric is 'f1': this run evaluates eval_loss"):
        start(configure("data.eval_path=HELD", "training.early_stopping.metric=f1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_save_total_limit(session: Session) -> None:
    run = session("training.epochs=2", "training.save_every=1", "training.save_total_limit=2")
    run.train()
    assert [step for step, _ in run.run.checkpoints()] == [5, 6]


def test_a_tensor_that_never_moves_stops_the_run(session: Session) -> None:
    run = session("training.epochs=1")
    stuck = next(p for name, p in run.forward.model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in name)
    stuck.register_hook(torch.zeros_like)
    with pytest.raises(
        VerificationError, match=r"2 of 28 trainable tensors have not moved at all \(.*layers.1.mlp.up_proj.lora_A"
    ):
        _without_decay(run).train()


def _without_decay(run: TrainingSession) -> TrainingSession:
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.0
    return run


def test_movement_is_exact() -> None:
    layer = torch.nn.Linear(3, 3)
    check = MovementCheck(layer)
    assert check.unmoved() == ["weight", "bias"]
    with torch.no_grad():
        layer.weight[1, 2] += 1e-6
    assert check.unmoved() == ["bias"]


@pytest.mark.parametrize("mode", ["min", "auto", "fast"])
def test_recomputing_changes_no_loss(session: Session, mode: str) -> None:
    plain = session("training.epochs=1", "memory.mode=fast", "training.micro_batch_size=4")
    plain.train()
    limit = ["memory.limit_gb=0.0001"] if mode == "auto" else []
    run = session("training.epochs=1", f"memory.mode={mode}", "training.micro_batch_size=4", *limit)
    assert run.plan.memory.recompute_layers == {"min": 2, "auto": 2, "fast": 0}[mode]
    run.train()
    assert [e["loss"] for e in events(run, "step")] == [e["loss"] for e in events(plain, "step")]
    assert events(run, "start")[0]["recompute_layers"] == run.plan.memory.recompute_layers


@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", "bf16"), ("full", "bf16"), ("qlora", "bf16"), ("qlora", "fp32")]
)
def test_other_precisions_train_with_fp32_weights(session: Session, tmp_path: Path, method: str, dtype: str) -> None:
    model = make_tiny_model(tmp_path / "wide", hidden=64)
    run = session(f"method={method}", f"model.dtype={dtype}", "training.epochs=6", model=model)
    assert {p.dtype for p in run.forward.model.parameters() if p.requires_grad} == {torch.float32}
    if method != "full":
        base = run.forward.base.model.layers[0].mlp.up_proj.base_layer.weight
        expected = torch.uint8 if method == "qlora" else torch.bfloat16
        assert base.dtype == expected
    run.train()
    steps = events(run, "step")
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]


def test_a_run_starts_from_the_same_weights_whatever_came_before(session: Session) -> None:
    first = session("training.epochs=1")
    torch.randn(1000)
    second = session("training.epochs=1")
    first.train()
    second.train()
    assert [e["loss"] for e in events(first, "step")] == [e["loss"] for e in events(second, "step")]
    other = session("training.epochs=1", "training.seed=1")
    other.train()
    assert [e["loss"] for e in events(first, "step")] != [e["loss"] for e in events(other, "step")]


def test_training_goes_on_from_an_adapter(session: Session, configure: Configure, tmp_path: Path) -> None:
    first = session("training.epochs=8", "adapter.r=4")
    first.train()
    second = session("training.epochs=1", f"adapter.init_from={first.run.path}")
    second.train()
    assert events(second, "step")[0]["loss"] < 0.7 * events(first, "step")[0]["loss"]
    assert second.run.metadata["parent"] == str(first.run.path)
    assert second.forward.model.peft_config["default"].r == 4


def test_metadata_traces_the_run(session: Session) -> None:
    from tunesmith.files import sha256_file

    run = session("training.epochs=1")
    metadata = run.run.metadata
    assert metadata["format_version"] == 1
    assert metadata["data"]["sha256"] == sha256_file(Path(run.config.data.path))
    assert metadata["data"]["rows"] == 24
    assert metadata["seed"] == 3407
    assert metadata["packages"]["torch"] == importlib.metadata.version("torch")
    assert metadata["chat_template"]["hash"] == run.chat.hash
    assert len(metadata["model"]["weight_hash"]) == len(metadata["tokenizer"]["hash"]) == 64
    assert metadata["hardware"]["device"] == "cpu"
    assert run.run.config == run.config


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_eval_fraction_holds_rows_out(session: Session, fraction: float) -> None:
    run = session(f"data.eval_fraction={fraction}", "training.epochs=1")
    assert len(run.data.eval) == round(24 * fraction)
    assert len(run.data.train) + len(run.data.eval) == 24
    assert not {e.line for e in run.data.train} & {e.line for e in run.data.eval}


def test_bad_data_is_refused_before_the_model_is_loaded(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    Path(config.data.path).write_text('{"messages": 3}\n', encoding="utf-8")
    monkeypatch.setattr("tunesmith.workflows.train.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match="1: `messages` is a number"):
        start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small_is_refused_before_training(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("tunesmith.workflows.train.shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(
        MachineError, match=r"the run needs about 0.00 GB for 4 checkpoints and its result, 0.00 GB are free"
    ):
        start(configure(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_is_not_finite_stops_the_run(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.workflows.training_evaluation.evaluate_loss", lambda *_: float("nan"))
    run = session("training.epochs=2", "data.eval_path=HELD")
    with pytest.raises(VerificationError, match="eval_loss is nan in the evaluation at step 3"):
        run.train()
    assert run.run.best() is None


def test_fp16_overflows_are_told_and_then_stop_the_run(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """One overflow is a skipped step and a warning; gradients that are never finite are an error, not a silent no-op."""
    run = session("training.epochs=20", "training.save_every=1000")
    run.forward.dtype = "fp16"
    original, calls = loop.accumulate_gradients, {"n": 0}

    def overflow(*arguments: Any) -> torch.Tensor:
        loss = original(*arguments)
        calls["n"] += 1
        if calls["n"] == 2 or calls["n"] > 4:
            next(p for p in run.forward.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(loop, "accumulate_gradients", overflow)
    with pytest.raises(VerificationError, match=r"gradient norm is (nan|inf) at step 28 .*; fp16's range is too small"):
        run.train()
    warnings = [event["message"] for event in events(run, "warning") if "skipped" in event["message"]]
    assert warnings[0] == "step 2 was skipped: gradients overflowed fp16 (loss scale now 32768)"
    assert warnings[1].startswith("step 5 was skipped")
    assert calls["n"] == 28, "15 halvings take the scale from 32768 to 1; then three times three steps are too many"


def test_the_result_of_full_fine_tuning_says_what_it_is(session: Session, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    run = session("method=full", "model.dtype=bf16", "training.epochs=1", "optimizer.lr=1e-3", model=model)
    run.train()
    saved = load_file(run.run.model_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in saved
    assert json.loads((run.run.model_path / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_run_can_be_used_from_any_folder(
    configure: Configure, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.workflows.load import load

    config = configure("training.epochs=1")
    monkeypatch.chdir(tiny_model.parent)
    config.model.name = tiny_model.name
    run = start(config, tmp_path / "run")
    run.train()
    monkeypatch.chdir(tmp_path)
    assert load(str(tmp_path / "run")).adapted
    assert run.run.config.model.name == str(tiny_model)
    assert run.run.config.model.dtype == "fp32"


# -- token budgets ----------------------------------------------------------------------------------------------------

BUDGET = ("data.packing=true", "data.max_seq_length=256", "training.micro_batch_tokens=256")


def test_steps_by_tokens(session: Session) -> None:
    run = session(*BUDGET, "training.batch_tokens=512", "training.batch_size=16", "training.epochs=2")
    lengths = [len(example) for example in run.data.train]
    packs = best_fit(lengths, 256)
    per_epoch = -(-len(packs) // 2)
    assert 4 <= per_epoch < 12
    metrics = run.train().metrics
    steps = events(run, "step")
    assert [step["step"] for step in steps] == list(range(1, 2 * per_epoch + 1))
    assert events(run, "start")[0]["steps"] == metrics["steps"] == 2 * per_epoch
    assert [step["epoch"] for step in steps] == pytest.approx([n / per_epoch for n in range(1, 2 * per_epoch + 1)])
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        assert sum(step["examples"] for step in epoch) == 24
        assert sum(step["tokens"] for step in epoch) == sum(lengths)
        assert sum(step["supervised_tokens"] for step in epoch) == sum(e.supervised for e in run.data.train)
        assert all(step["tokens"] <= 512 for step in epoch)
    assert [event["step"] for event in events(run, "checkpoint")] == [per_epoch, 2 * per_epoch], "once an epoch"


def test_a_token_budget_changes_no_step(session: Session) -> None:
    plain = session("training.epochs=1")
    packed = session(*BUDGET, "training.epochs=1")
    plain.train()
    packed.train()
    for key in ("examples", "tokens", "supervised_tokens", "epoch"):
        assert [e[key] for e in events(packed, "step")] == [e[key] for e in events(plain, "step")]
    losses = [[e["loss"] for e in events(run, "step")] for run in (plain, packed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_each_rank_takes_its_share_and_reports_the_whole_step(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: dict[int, list[list[str]]] = {}
    reported = {}
    for rank in range(2):
        run = session(*BUDGET, "training.epochs=1", "training.batch_size=24", "training.save_every=9")
        share: list[list[str]] = []

        def spy(forward: Any, objective: Any, parts: Any, *rest: Any, share: list[list[str]] = share) -> torch.Tensor:
            share += [[example.where for example in part] for part in parts]
            return accumulate_gradients(forward, objective, parts, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "rank_and_world_size", lambda rank=rank: (rank, 2))
            patch.setattr(loop, "global_counts", lambda counts: counts)
            patch.setattr(loop, "accumulate_gradients", spy)
            run.train()
        shares[rank] = share
        (step,) = events(run, "step")
        reported[rank] = {key: step[key] for key in ("examples", "tokens", "supervised_tokens")}
    order = StepOrder([len(example) for example in run.data.train], run.config.training, packing=True)
    whole = [[run.data.train[index].where for index in part] for part in order.step(0)]
    assert len(whole) > 4
    assert (shares[0], shares[1]) == (whole[::2], whole[1::2])
    supervised = sum(example.supervised for example in run.data.train)
    assert reported[0] == reported[1]
    assert reported[0]["examples"] == 24
    assert reported[0]["supervised_tokens"] == supervised


@pytest.mark.parametrize(
    ("overrides", "slots"),
    [
        ([], lambda lengths: 4 * max(lengths)),
        (["data.packing=true"], lambda lengths: sum(sorted(lengths)[-4:])),
        ([*BUDGET], lambda _: 256),
    ],
)
def test_the_plan_is_for_the_largest_micro_batch(
    session: Session, overrides: list[str], slots: Callable[[list[int]], int]
) -> None:
    run = session(*overrides)
    load = run.plan.choice.candidate.largest
    assert load.tokens == slots([len(example) for example in run.data.train])
    assert 0 < load.supervised <= load.tokens


PACKED = ["data.packing=true"]


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (
            ["data.packing=false", "training.micro_batch_tokens=4096"],
            [
                "--set training.micro_batch_tokens=4096: training.micro_batch_tokens needs packing; set data.packing: "
                "true, or remove it and set training.micro_batch_size"
            ],
        ),
        (
            [*PACKED, "training.batch_tokens=4096"],
            [
                "--set training.batch_tokens=4096: training.batch_tokens needs training.micro_batch_tokens, which divides "
                "it; set that too, or use training.batch_size"
            ],
        ),
        (
            [*PACKED, "training.micro_batch_tokens=4096", "training.batch_tokens=10000"],
            [
                "--set training.batch_tokens=10000: training.batch_tokens 10000 is not a multiple of "
                "training.micro_batch_tokens 4096; set it to 8192 or 12288"
            ],
        ),
        (
            [*PACKED, "training.micro_batch_tokens=4096", "training.batch_tokens=1000"],
            [
                "--set training.batch_tokens=1000: training.batch_tokens 1000 is not a multiple of "
                "training.micro_batch_tokens 4096; set it to 4096"
            ],
        ),
        (
            [*PACKED, "training.micro_batch_tokens=1024"],
            [
                "data.max_seq_length 2048 is more than training.micro_batch_tokens 1024: the longest example would fit "
                "into no micro-batch; set data.max_seq_length to 1024 or less, or raise training.micro_batch_tokens"
            ],
        ),
        (
            [
                *PACKED,
                "training.micro_batch_tokens=4096",
                "training.micro_batch_size=8",
                "training.batch_tokens=8192",
                "training.batch_size=32",
            ],
            [
                "--set training.micro_batch_size=8: training.micro_batch_size has no effect with "
                "training.micro_batch_tokens; remove one of the two",
                "--set training.batch_size=32: training.batch_size has no effect with training.batch_tokens; remove one "
                "of the two",
            ],
        ),
        # What decides is itself wrong: whether the rest has an effect is not known.
        (
            ["data.packing=maybe", "training.micro_batch_tokens=x", "training.batch_tokens=4096"],
            [
                "--set data.packing=maybe: `data.packing` is \"maybe\": input should be a valid boolean or 'auto'",
                '--set training.micro_batch_tokens=x: `training.micro_batch_tokens` is "x": input should be a valid '
                "integer, unable to parse string as an integer",
            ],
        ),
        (
            ["data.packing=maybe", "training.micro_batch_tokens=4096"],
            ["--set data.packing=maybe: `data.packing` is \"maybe\": input should be a valid boolean or 'auto'"],
        ),
    ],
)
def test_token_budgets_that_make_no_sense(overrides: list[str], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert caught.value.problems == problems


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.micro_batch_tokens=4096", "training.batch_size=2"],
        ["training.micro_batch_tokens=2048", "training.batch_tokens=8192"],
        ["training.micro_batch_tokens=1024", "data.max_seq_length=auto"],
    ],
)
def test_token_budgets_survive_being_written_out(overrides: list[str], tmp_path: Path) -> None:
    resolved = load_config(None, [*PACKED, *overrides]).resolved()
    file = tmp_path / "config.yaml"
    file.write_text(resolved.to_yaml(), encoding="utf-8")
    assert load_config(file) == resolved
