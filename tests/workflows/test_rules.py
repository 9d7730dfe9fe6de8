"""The rules that warn before every `train`: each with a case that shows it, and one beside it that must not."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config import load_config
from tunesmith.workflows.rules import settings_warnings


def warn(num_rows: int = 3000, tokens: int = 300_000, supervised: int = 100_000, **settings: Any) -> list[str]:
    """Warnings about settings by dotted key, `__` for the dot."""
    values = {key.replace("__", "."): value for key, value in settings.items()}
    return settings_warnings(load_config(None, (), values), num_rows, tokens, supervised)


@pytest.mark.parametrize("num_rows", [500, 1000, 5000, 10_001, 50_000])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_defaults_on_ordinary_data_say_nothing(method: str, num_rows: int) -> None:
    assert warn(num_rows, 100 * num_rows, 30 * num_rows, method=method) == []


def test_the_defaults_of_continued_pre_training_say_nothing() -> None:
    """Its rate is low on purpose; a lower one is not."""
    assert warn(method="lora", objective__name="cpt") == []
    (said,) = warn(method="lora", objective__name="cpt", optimizer__lr=1e-5)
    assert said.startswith("optimizer.lr 1e-05 with method: lora is a rate for full fine-tuning")
    assert len(warn(method="lora", optimizer__lr=2e-5)) == 1


def test_a_high_rank_on_few_rows() -> None:
    assert warn(1000, 200_000, 80_000, adapter__r=64) == [
        "adapter.r 64 on 1,000 rows: far more than 80,000 supervised tokens can fill, and it overfits sooner; set "
        "adapter.r to 8 or 16"
    ]
    assert warn(1000, 200_000, 80_000, adapter__r=32) == []
    assert warn(1001, 200_000, 80_000, adapter__r=64) == []


def test_a_high_rank_on_few_rows_that_are_books() -> None:
    assert warn(1000, 12_000_000, 10_000_000, adapter__r=64) == []
    assert len(warn(1000, 12_000_000, 9_999_999, adapter__r=64)) == 1


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_full_fine_tunings_rate_for_an_adapter(method: str) -> None:
    assert warn(method=method, optimizer__lr=1e-5) == [
        f"optimizer.lr 1e-05 with method: {method} is a rate for full fine-tuning; an adapter wants about ten times that "
        "(LoRA Without Regret); set optimizer.lr to 2e-4"
    ]
    assert len(warn(method=method, optimizer__lr=2e-5)) == 1
    assert warn(method=method, optimizer__lr=5e-5) == []


def test_an_adapters_rate_for_full_fine_tuning() -> None:
    assert warn(method="full", optimizer__lr=2e-4) == [
        "optimizer.lr 0.0002 with method: full is a rate for adapters, and makes a model forget; set optimizer.lr to 2e-05, "
        "or method: lora"
    ]
    assert len(warn(method="full", optimizer__lr=1e-4)) == 1
    assert warn(method="full", optimizer__lr=9e-5) == []
    assert warn(method="full", optimizer__lr=1e-5) == []


def test_a_rate_that_is_too_high_for_any_adapter() -> None:
    assert warn(optimizer__lr=2e-3) == [
        "optimizer.lr 0.002 with method: lora is more than twice the best rates that LoRA Without Regret found, and the loss "
        "may blow up; set optimizer.lr to 2e-4"
    ]
    assert warn(optimizer__lr=1e-3) == []


def test_many_epochs_on_many_rows() -> None:
    assert warn(10_001, training__epochs=4) == [
        "training.epochs 4 on 10,001 rows: more than 3 passes over so many mostly memorise them; set training.epochs to 3 or "
        "less, or training.early_stopping.metric: eval_loss"
    ]
    assert warn(10_000, training__epochs=5) == []
    assert warn(2_001, training__epochs=6)[0].startswith("training.epochs 6 on 2,001 rows: more than 5 passes")
    assert warn(2_000, training__epochs=15) == []


def test_many_epochs_that_stop_by_themselves() -> None:
    stopping = {"training__early_stopping__metric": "eval_loss", "data__eval_fraction": 0.1}
    assert warn(50_000, training__epochs=10, **stopping) == []
    assert len(warn(50_000, training__epochs=10, data__eval_fraction=0.1)) == 1


def test_max_steps_counts_where_it_ends_the_run_first() -> None:
    assert warn(20_000, training__epochs=10, training__max_steps=3750) == []  # x 16 rows: three passes
    assert warn(20_000, training__epochs=10, training__max_steps=5000)[0].startswith("training.epochs 4 on 20,000 rows")


def test_a_large_batch_for_an_adapter() -> None:
    assert warn(training__batch_size=128) == [
        "training.batch_size 128 with method: lora: large batches cost LoRA more than full fine-tuning, whatever the rank "
        "(LoRA Without Regret); set training.batch_size to 16 or 32"
    ]
    assert warn(training__batch_size=64) == []
    assert warn(training__batch_size=128, method="full") == []


def test_a_large_batch_in_tokens() -> None:
    packed = {"data__packing": True, "training__micro_batch_tokens": 8192}  # rows of 100 tokens
    assert warn(training__batch_tokens=16384, **packed) == [
        "training.batch_tokens 16,384 (about 164 rows) with method: lora: large batches cost LoRA more than full "
        "fine-tuning, whatever the rank (LoRA Without Regret); set training.batch_tokens to about 3,200"
    ]
    assert warn(tokens=3_000_000, training__batch_tokens=16384, **packed) == []


@pytest.mark.parametrize("targets", ["attention", "qv", ["q_proj", "v_proj"], ["qkv_proj", "o_proj"]], ids=str)
def test_adapters_on_attention_alone(targets: str | list[str]) -> None:
    shown = targets if isinstance(targets, str) else ", ".join(targets)
    assert warn(adapter__target_modules=targets) == [
        f"adapter.target_modules {shown}: adapters on attention alone learn less than on all layers, even with as many "
        "parameters (LoRA Without Regret); set adapter.target_modules: all-linear"
    ]


@pytest.mark.parametrize("targets", ["all-linear", "mlp", ["q_proj", "down_proj"]], ids=str)
def test_adapters_elsewhere(targets: str | list[str]) -> None:
    assert warn(adapter__target_modules=targets) == []


def test_an_adapter_that_is_trained_further_has_its_own_rank_and_targets_and_may_want_a_low_rate() -> None:
    assert warn(500, adapter__init_from="runs/a", optimizer__lr=1e-5) == []
    assert len(warn(500, adapter__init_from="runs/a", optimizer__lr=5e-3)) == 1


def test_every_rule_that_applies_is_said() -> None:
    warnings = warn(
        900, 90_000, 30_000, adapter__r=128, optimizer__lr=1e-5, training__batch_size=100, adapter__target_modules="qv"
    )
    keys = ["adapter.r", "optimizer.lr", "training.batch_size", "adapter.target_modules"]
    assert [warning.split()[0] for warning in warnings] == keys
