"""The configuration: defaults, YAML, overrides, and every problem at once with its place."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunesmith.config import RunConfig, config_from_dict, json_schema, load_config
from tunesmith.errors import ConfigError


def problems_of(path: Path | None, *overrides: str, **values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, values)
    assert caught.value.exit_code == 2
    return caught.value.problems


@pytest.fixture
def run_yaml(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


# -- defaults ---------------------------------------------------------------------------------------------------------

PUBLISHED_DEFAULTS = {
    "method": "lora",
    "adapter.r": 16,
    "adapter.alpha": 32,
    "adapter.dropout": 0,
    "adapter.target_modules": "all-linear",
    "adapter.rslora": False,
    "quantization.scheme": "nf4",
    "quantization.double_quant": True,
    "optimizer.name": "adamw",
    "optimizer.betas": (0.9, 0.999),
    "optimizer.schedule": "cosine",
    "optimizer.warmup_ratio": 0.05,
    "optimizer.max_grad_norm": 0.3,
    "optimizer.weight_decay": 0.01,
    "training.epochs": 3,
    "training.batch_size": 16,
    "training.seed": 3407,
    "data.max_seq_length": 2048,
    "data.overlong": "auto",
    "data.train_on": "assistant",
    "data.packing": "auto",
    "model.engine": "auto",
    "model.trust_remote_code": False,
    "memory.mode": "auto",
    "objective.name": "sft",
}


@pytest.mark.parametrize(("key", "expected"), PUBLISHED_DEFAULTS.items(), ids=PUBLISHED_DEFAULTS)
def test_default(key: str, expected: Any) -> None:
    value: Any = load_config()
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected


@pytest.mark.parametrize(("method", "lr"), [("lora", 2e-4), ("qlora", 2e-4), ("full", 2e-5)])
def test_the_default_rate_depends_on_the_method_and_resolved_writes_it_out(method: str, lr: float) -> None:
    config = load_config(overrides=[f"method={method}"])
    assert config.optimizer.lr is None
    assert config.lr == lr
    assert config.resolved().optimizer.lr == lr
    assert config.optimizer.lr is None, "resolved() must not change its object"


def test_a_rate_that_is_set_stays() -> None:
    config = load_config(overrides=["method=full", "optimizer.lr=1e-5"])
    assert config.lr == config.resolved().optimizer.lr == 1e-5


def test_an_objectives_defaults_give_way_to_what_is_set(run_yaml: Any) -> None:
    plain, cpt = load_config(), load_config(overrides=["objective.name=cpt"])
    assert (cpt.lr, cpt.resolved().optimizer.lr, cpt.usual_lr) == (2e-5, 2e-5, 2e-5)
    assert (cpt.training.epochs, cpt.optimizer.warmup_ratio, cpt.data.packing) == (1, 0.1, True)
    assert (plain.training.epochs, plain.optimizer.warmup_ratio, plain.data.packing) == (3, 0.05, "auto")
    assert cpt.training.batch_size == plain.training.batch_size
    path = run_yaml("objective: {name: cpt}\ntraining: {epochs: 2}\ndata:\n")
    chosen = load_config(path, ["optimizer.lr=1e-4", "data.packing=false"])
    assert (chosen.training.epochs, chosen.lr, chosen.data.packing, chosen.optimizer.warmup_ratio) == (
        2,
        1e-4,
        False,
        0.1,
    )
    assert config_from_dict(yaml.safe_load(chosen.to_yaml())) == chosen
    with pytest.raises(
        ConfigError, match=r"`objective.name` is \"ctp\": input should be 'sft', 'cpt', 'dpo', 'orpo', 'simpo' or 'kto'"
    ):
        load_config(overrides=["objective.name=ctp"])
    with pytest.raises(ConfigError, match=r"`training` is 3: expected a section"):
        load_config(overrides=["objective.name=cpt", "training=3"])


@pytest.mark.parametrize(
    ("metric", "mode"), [("eval_loss", "min"), ("perplexity", "min"), ("accuracy", "max"), ("lossless", "max")]
)
def test_resolved_early_stopping_mode_follows_the_metric(metric: str, mode: str) -> None:
    config = load_config(overrides=["data.eval_fraction=0.1", f"training.early_stopping.metric={metric}"])
    assert config.training.early_stopping.mode is None
    assert config.resolved().training.early_stopping.mode == mode


@pytest.mark.parametrize(("batch", "micro"), [(2, 2), (4, 4), (16, 4)])
def test_the_default_micro_batch_is_no_larger_than_the_batch(batch: int, micro: int) -> None:
    config = load_config(overrides=[f"training.batch_size={batch}"])
    assert config.training.micro_batch_size == "auto"
    assert config.training.micro_batch == micro
    assert config.resolved().training.micro_batch_size == "auto", "the plan decides, not the defaults"


# -- YAML and back ----------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20)
POSITIVE = st.floats(min_value=1e-12, max_value=1e12)
FRACTION = st.floats(min_value=0, max_value=1, exclude_max=True)


@st.composite
def valid_configs(draw: Any) -> RunConfig:
    method = draw(st.sampled_from(["lora", "qlora", "full"]))
    raw: dict[str, Any] = {
        "method": method,
        "model": {
            "name": draw(TEXT),
            "revision": draw(st.none() | TEXT),
            "dtype": draw(st.sampled_from(["auto", "bf16", "fp16", "fp32"])),
        },
        "data": {
            "path": draw(TEXT),
            "eval_fraction": draw(FRACTION),
            "max_rows": draw(st.none() | st.integers(1, 10**9)),
            "packing": draw(st.booleans()),
        },
        "optimizer": {
            "lr": draw(st.none() | st.floats(min_value=1e-12, max_value=1)),
            "betas": draw(st.tuples(FRACTION, FRACTION)),
            "eps": draw(POSITIVE),
            "schedule": draw(st.sampled_from(["cosine", "linear", "constant"])),
        },
        "training": {
            "epochs": draw(POSITIVE),
            "batch_size": draw(st.integers(1, 9)),
            "seed": draw(st.integers(0, 2**32 - 1)),
            "save_total_limit": draw(st.none() | st.integers(1, 99)),
        },
        "memory": {"limit_gb": draw(st.none() | POSITIVE)},
    }
    if raw["data"]["eval_fraction"]:
        raw["training"]["early_stopping"] = {"metric": draw(st.none() | TEXT), "patience": 3}
        if raw["training"]["early_stopping"]["metric"] is not None:
            raw["training"]["early_stopping"]["patience"] = draw(st.integers(1, 9))
    if method != "full":
        raw["adapter"] = draw(
            st.fixed_dictionaries({"init_from": st.none() | TEXT})
            | st.fixed_dictionaries({"alpha": POSITIVE, "target_modules": TEXT | st.lists(TEXT, max_size=3)})
        )
    return config_from_dict(raw)


SCHEMA = jsonschema.Draft202012Validator(json.loads(json_schema()))


@settings(max_examples=40)
@given(valid_configs())
def test_a_config_and_its_resolved_form_survive_yaml(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig
) -> None:
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    for version in (config, config.resolved()):
        path.write_text(version.to_yaml(), encoding="utf-8")
        assert load_config(path) == version
        SCHEMA.validate(version.model_dump(mode="json"))
    assert config.resolved().resolved() == config.resolved()


def test_an_empty_file_gives_the_defaults(run_yaml: Any) -> None:
    assert load_config(run_yaml("")) == load_config(run_yaml("# nothing\n")) == RunConfig()


def test_a_yaml_file_as_people_write_it(run_yaml: Any) -> None:
    path = run_yaml(
        "method: qlora\nmodel: {name: org/model}\nadapter:\n  r: 8\n  target_modules: [q_proj, v_proj]\n"
        "optimizer:\n  lr: 2e-4\n  betas: [0.9, 0.95]\ntraining: {epochs: 1, max_steps: null}\n"
    )
    config = load_config(path)
    assert (config.method, config.model.name, config.adapter.r) == ("qlora", "org/model", 8)
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.optimizer.lr == 2e-4
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.training.epochs, config.training.max_steps) == (1, None)


def test_anchors_and_merge_keys_are_ordinary_yaml(run_yaml: Any) -> None:
    config = load_config(run_yaml("data: {path: &p a.jsonl, eval_path: *p}\n"))
    assert config.data.path == config.data.eval_path == "a.jsonl"


# -- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("optimizer.lr=2e-4", lambda c: c.optimizer.lr, 2e-4),
        ("optimizer.lr=null", lambda c: c.optimizer.lr, None),
        ("optimizer.lr=", lambda c: c.optimizer.lr, None),
        ("optimizer.betas=[0.8, 0.9]", lambda c: c.optimizer.betas, (0.8, 0.9)),
        ("adapter.target_modules=[q_proj, v_proj]", lambda c: c.adapter.target_modules, ["q_proj", "v_proj"]),
        ("adapter.target_modules=attention", lambda c: c.adapter.target_modules, "attention"),
        ("adapter.r= 8 ", lambda c: c.adapter.r, 8),
        ("adapter={r: 8, alpha: 8}", lambda c: (c.adapter.r, c.adapter.alpha), (8, 8)),
        ("data.packing=false", lambda c: c.data.packing, False),
        ("data.packing=true", lambda c: c.data.packing, True),
        ("data.path=a=b.jsonl", lambda c: c.data.path, "a=b.jsonl"),
        ("data.path=C: [odd", lambda c: c.data.path, "C: [odd"),
        ("data.path='2020-13-45'", lambda c: c.data.path, "2020-13-45"),
        ("data.path=2020-13-45", lambda c: c.data.path, "2020-13-45"),
        ("data.path=&x [*x]", lambda c: c.data.path, "&x [*x]"),
        ("training.early_stopping.patience=3", lambda c: c.training.early_stopping.patience, 3),
        ("training.save_total_limit=null", lambda c: c.training.save_total_limit, None),
    ],
)
def test_override(override: str, read: Any, expected: Any) -> None:
    assert read(load_config(overrides=[override])) == expected


def test_nested_early_stopping_override() -> None:
    config = load_config(overrides=["training.early_stopping.metric=accuracy", "data.eval_fraction=0.1"])
    assert config.training.early_stopping.metric == "accuracy"


def test_overrides_beat_values_beat_the_file_and_the_last_one_wins(run_yaml: Any) -> None:
    path = run_yaml("adapter: {r: 4, alpha: 4}\ntraining: {seed: 1}\n")
    config = load_config(path, ["adapter.r=64", "adapter.r=128"], {"adapter.r": 8, "adapter.alpha": 8})
    assert (config.adapter.r, config.adapter.alpha, config.training.seed) == (128, 8, 1)


@pytest.mark.parametrize("override", ["adapter.r", "=8", "adapter.=8", ".r=8", ""])
def test_malformed_override(override: str) -> None:
    assert problems_of(None, override) == [f"--set {override}: expected section.key=value, e.g. --set adapter.r=8"]


def test_override_below_a_value(run_yaml: Any) -> None:
    assert problems_of(run_yaml("method: lora\n"), "method.x=1") == [
        "--set method.x=1: `method` is a value, not a section"
    ]
    assert problems_of(None, "adapter.r.x=1") == [
        '--set adapter.r.x=1: `adapter.r` is {"x": 1}: input should be a valid integer'
    ]


def test_a_wrong_value_is_blamed_on_whoever_set_it_last(run_yaml: Any) -> None:
    path = run_yaml("adapter:\n  r: 8\n")
    assert problems_of(path, "adapter.r=x") == [
        '--set adapter.r=x: `adapter.r` is "x": input should be a valid integer, unable to parse string as an integer'
    ]
    assert problems_of(path, **{"adapter.r": 0}) == ["`adapter.r` is 0: input should be greater than or equal to 1"]


# -- unknown keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("adapter.rnak=8", None),
        ("adapter.alhpa=8", "adapter.alpha"),
        ("trainig={}", "training"),
        ("training.epoch=1", "training.epochs"),
        ("adapter.max_seq_length=9", "data.max_seq_length"),
        ("early_stopping.patience=2", "training.early_stopping"),
        ("learning_rate=1e-4", "optimizer.lr"),
        ("training.learning_rate=1e-4", "optimizer.lr"),
        ("lr=1e-4", "optimizer.lr"),
        ("lora_alpha=16", "adapter.alpha"),
        ("adapter.lora_r=16", "adapter.r"),
        ("adapter.rank=16", "adapter.r"),
        ("lora_dropout=0.1", "adapter.dropout"),
        ("num_train_epochs=1", "training.epochs"),
        ("per_device_train_batch_size=1", "training.micro_batch_size"),
        ("gradient_accumulation_steps=4", "training.batch_size (examples in one optimizer step)"),
        ("load_in_4bit=true", "method: qlora"),
        ("cutoff_len=512", "data.max_seq_length"),
        ("base_model=x", "model.name"),
        ("gradient_checkpointing=true", "memory.mode"),
        ("zzzzqqqq=1", None),
    ],
)
def test_unknown_key_names_the_nearest_known_one(override: str, hint: str | None) -> None:
    key = override.partition("=")[0]
    key = "early_stopping" if key.startswith("early") else key
    assert problems_of(None, override) == [
        f"--set {override}: unknown key `{key}`" + (f"; did you mean `{hint}`?" if hint else "")
    ]


def test_an_unknown_key_with_control_characters_stays_on_one_line(run_yaml: Any) -> None:
    (problem,) = problems_of(run_yaml('model: {"a\\nb": 1}\n'))
    assert problem.endswith(":1: unknown key `model.a\\nb`")


# -- all problems at once ---------------------------------------------------------------------------------------------


def test_every_problem_comes_at_once_with_its_line(run_yaml: Any) -> None:
    path = run_yaml(
        "method: lora\n"
        "model:\n"
        "  nmae: x\n"
        "adapter:\n"
        "  r: 0\n"
        "  dropout: 1.5\n"
        "quantization:\n"
        "  scheme: int8\n"
        "training:\n"
        "  seed: -1\n"
        "  early_stopping:\n"
        "    patience: none\n"
        "evaluation: {generate: true}\n"
    )
    assert problems_of(path, "adapter.alhpa=1", "nonsense", **{"optimizer.lr": 7}) == [
        "--set nonsense: expected section.key=value, e.g. --set adapter.r=8",
        f"{path}:3: unknown key `model.nmae`; did you mean `model.name`?",
        f"{path}:5: `adapter.r` is 0: input should be greater than or equal to 1",
        f"{path}:6: `adapter.dropout` is 1.5: input should be less than 1",
        "--set adapter.alhpa=1: unknown key `adapter.alhpa`; did you mean `adapter.alpha`?",
        "`optimizer.lr` is 7: input should be less than or equal to 1",
        f"{path}:10: `training.seed` is -1: input should be greater than or equal to 0",
        f'{path}:12: `training.early_stopping.patience` is "none": input should be a valid integer, '
        "unable to parse string as an integer",
        f"{path}:8: quantization.scheme has no effect with method: lora; remove it, or set method: qlora",
        f"{path}:13: evaluation.generate needs evaluation data; set data.eval_path or data.eval_fraction",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "adapter: {r: x}",
            '`adapter.r` is "x": input should be a valid integer, unable to parse string as an integer',
        ),
        ("adapter: {alpha: .inf}", "`adapter.alpha` is Infinity: input should be a finite number"),
        ("adapter: {alpha: .nan}", "`adapter.alpha` is NaN: input should be a finite number"),
        ("training: {epochs: 1e400}", '`training.epochs` is "1e400": input should be a finite number'),
        ("adapter: {target_modules: 5}", "`adapter.target_modules` is 5: input should be a valid string"),
        ("method: dpo", "`method` is \"dpo\": input should be 'lora', 'qlora' or 'full'"),
        ("training:", "`training` is null: expected a section of `key: value` lines"),
        ("training: 3", "`training` is 3: expected a section of `key: value` lines"),
        ("data: {path: 2020-01-01}", '`data.path` is "2020-01-01": input should be a valid string'),
        ("model: {name: [1]}", "`model.name` is [1]: input should be a valid string"),
        ("training: {seed: 4294967296}", "`training.seed` is 4294967296: input should be less than 4294967296"),
        ("on: 1", None),
    ],
)
def test_wrong_value(run_yaml: Any, text: str, problem: str | None) -> None:
    path = run_yaml(text + "\n")
    expected = f"{path}:1: {problem}" if problem else f"{path}: unknown key `True`"
    assert problems_of(path) == [expected]


def test_a_long_value_is_shortened_in_the_message(run_yaml: Any) -> None:
    (problem,) = problems_of(run_yaml(f"adapter: {{r: {'x' * 500}}}\n"))
    assert f'is "{"x" * 56}...: input should be' in problem


# -- contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["method=full", "adapter.r=8", "adapter.rslora=true"],
            [
                "--set adapter.r=8: adapter.r has no effect with method: full; remove it, or set method: lora",
                "--set adapter.rslora=true: adapter.rslora has no effect with method: full; remove it, or set method: lora",
            ],
        ),
        (
            ["method=full", "quantization.scheme=fp4"],
            [
                "--set quantization.scheme=fp4: quantization.scheme has no effect with method: full; remove it, or set "
                "method: qlora"
            ],
        ),
        (
            ["data.eval_path=e.jsonl", "data.eval_fraction=0.1"],
            [
                "--set data.eval_fraction=0.1: data.eval_fraction has no effect beside data.eval_path; set one of the two"
            ],
        ),
        (
            ["training.eval_every=5", "training.early_stopping.metric=accuracy"],
            [
                "--set training.eval_every=5: training.eval_every needs evaluation data; set data.eval_path or "
                "data.eval_fraction",
                "--set training.early_stopping.metric=accuracy: training.early_stopping.metric needs evaluation data; "
                "set data.eval_path or data.eval_fraction",
            ],
        ),
        (
            ["data.mix=[{path: a.jsonl}]", "data.format=qa", "data.columns={answer: a}", "data.split=train"],
            [
                "--set data.split=train: data.split has no effect beside data.mix; set it in the sources instead",
                "--set data.format=qa: data.format has no effect beside data.mix without data.eval_path; set it in the "
                "sources instead",
                "--set data.columns={answer: a}: data.columns has no effect beside data.mix without data.eval_path; set it "
                "in the sources instead",
            ],
        ),
        (
            ["data.mix=[{path: a.jsonl}]", "data.roles={bot: assistant}", "data.sample_by=line", "data.eval_path=3"],
            ["--set data.eval_path=3: `data.eval_path` is 3: input should be a valid string"],
        ),
        # `adapter.r` is wrong, but that hides nothing about `adapter.rslora`, whose name begins with it.
        (
            ["method=full", "adapter.r=0", "adapter.rslora=true"],
            [
                "--set adapter.r=0: `adapter.r` is 0: input should be greater than or equal to 1",
                "--set adapter.rslora=true: adapter.rslora has no effect with method: full; remove it, or set method: lora",
            ],
        ),
        (
            [
                "adapter.init_from=a",
                "adapter.r=8",
                "adapter.alpha=8",
                "adapter.dropout=0.1",
                "adapter.rslora=true",
                "adapter.target_modules=qv",
            ],
            [
                f"--set adapter.{setting}: adapter.{setting.partition('=')[0]} has no effect with adapter.init_from: "
                "the loaded adapter's own applies; remove it"
                for setting in ("r=8", "alpha=8", "dropout=0.1", "target_modules=qv", "rslora=true")
            ],
        ),
        (
            ["method=qlora", "quantization.scheme=int8", "quantization.double_quant=false"],
            [
                "--set quantization.double_quant=false: quantization.double_quant has no effect with "
                "quantization.scheme: int8; remove it, or set scheme: nf4 or fp4"
            ],
        ),
        (
            ["data.eval_fraction=0.1", "training.early_stopping={mode: min, patience: 5, min_delta: 0.1}"],
            [
                "--set training.early_stopping={mode: min, patience: 5, min_delta: 0.1}: "
                f"training.early_stopping.{name} has no effect without training.early_stopping.metric; remove it, or set "
                "the metric"
                for name in ("mode", "patience", "min_delta")
            ],
        ),
        (
            ["training.early_stopping.metric=loss"],
            [
                "--set training.early_stopping.metric=loss: training.early_stopping.metric needs evaluation data; set "
                "data.eval_path or data.eval_fraction"
            ],
        ),
        (
            ["training.micro_batch_size=8", "training.batch_size=6"],
            [
                "--set training.micro_batch_size=8: training.micro_batch_size 8 has no effect beyond "
                "training.batch_size 6; lower it, or raise training.batch_size"
            ],
        ),
        # What decides whether it has an effect is itself wrong: not known.
        (
            [
                "training.batch_size=x",
                "training.micro_batch_size=32",
                "training.early_stopping={metric: 3, patience: 5}",
            ],
            [
                '--set training.batch_size=x: `training.batch_size` is "x": input should be a valid integer, unable to '
                "parse string as an integer",
                "--set training.early_stopping={metric: 3, patience: 5}: `training.early_stopping.metric` is 3: input "
                "should be a valid string",
            ],
        ),
        # The compute type is a typo: whether weights can be in bf16 is not known.
        (
            ["method=full", "model.dtype=fp8", "optimizer.weights_dtype=bf16"],
            ["--set model.dtype=fp8: `model.dtype` is \"fp8\": input should be 'auto', 'bf16', 'fp16' or 'fp32'"],
        ),
        # The method is a typo: whether quantization has an effect is not known.
        (
            ["method=qlroa", "quantization.scheme=fp4"],
            ["--set method=qlroa: `method` is \"qlroa\": input should be 'lora', 'qlora' or 'full'"],
        ),
    ],
)
def test_contradiction(overrides: list[str], expected: list[str]) -> None:
    assert problems_of(None, *overrides) == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=full", "adapter.r=16"],  # the default, written out, as in a resolved file
        ["method=qlora", "quantization.scheme=fp4"],
        ["method=full", "optimizer.weights_dtype=bf16"],
        ["method=full", "optimizer.weights_dtype=bf16", "model.dtype=bf16"],
        ["model.dtype=fp16", "optimizer.weights_dtype=fp32"],  # the default, written out
        ["data.eval_fraction=0.1", "training.eval_every=5", "evaluation.generate=true"],
        ["adapter.init_from=a", "adapter.r=16"],
        ["method=qlora", "quantization.scheme=int8"],
        ["training.early_stopping.patience=3"],
        ["training.micro_batch_size=8", "training.batch_size=8"],
        ["data.mix=[{path: a.jsonl}]", "data.eval_path=e.jsonl", "data.format=qa", "data.sample_by=line"],
        ["data.mix=[{path: a.jsonl}]", "data.format=auto"],
        ["training.batch_size=2"],  # the micro-batch is the default, which follows
    ],
)
def test_no_contradiction(overrides: list[str]) -> None:
    load_config(overrides=overrides)


# -- files that are not a configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1\n", "{path}:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("method: lora\n\tmodel: x\n", "{path}:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: 1\n--- 2\n", "{path}:2: not valid YAML: but found another document"),
        ("? [a]\n: 1\n", "{path}:1: not valid YAML: found unhashable key"),
        ("x: 1\na: 2020-13-45\n", "{path}:2: not valid YAML: '2020-13-45' is no valid timestamp; put it in quotes if it is text"),
        ("a: !!bool maybe\n", "{path}:1: not valid YAML: 'maybe' is no valid bool; put it in quotes if it is text"),
        ("a: !!timestamp x\n", "{path}:1: not valid YAML: 'x' is no valid timestamp; put it in quotes if it is text"),
        ("a: !!int ''\n", "{path}:1: not valid YAML: '' is no valid int; put it in quotes if it is text"),
        (
            "a: !!python/object/apply:os.getcwd []\n",
            "{path}:1: not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.getcwd'",
        ),
        ("&a {model: *a}\n", "{path}: nested too deeply, or an alias inside its own anchor"),
        ("model: &a [*a]\n", "{path}: nested too deeply, or an alias inside its own anchor"),
        ("a: " + "[" * 1200, "{path}: nested too deeply, or an alias inside its own anchor"),
        ("- a\n- b\n", "{path}: expected `key: value` lines, found list"),
        ("just words\n", "{path}: expected `key: value` lines, found str"),
        (
            b"model: {name: caf\xe9}\n",
            "{path}: cannot be read ('utf-8' codec can't decode byte 0xe9 in position 17: invalid continuation byte)",
        ),
        (
            b"a: \x00\n",
            "{path}: not valid YAML: unacceptable character #x0000: special characters are not allowed in "
            '"<unicode string>", position 3',
        ),
    ],
)  # fmt: skip
def test_unreadable_file(run_yaml: Any, content: str | bytes, expected: str) -> None:
    path = run_yaml(content)
    assert problems_of(path) == [expected.format(path=path)]


def test_duplicate_keys_are_all_named(run_yaml: Any) -> None:
    path = run_yaml("method: lora\nadapter:\n  r: 8\n  alpha: 8\n  r: 16\nmethod: full\n")
    assert problems_of(path) == [
        f"{path}:5: `adapter.r` is set twice (first on line 3)",
        f"{path}:6: `method` is set twice (first on line 1)",
    ]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "no.yaml") == [f"{tmp_path}/no.yaml: no such file"]
    assert problems_of(tmp_path) == [f"{tmp_path}: is a folder; a YAML file was expected"]
    (tmp_path / "file").write_text("x")
    assert problems_of(tmp_path / "file" / "run.yaml") == [
        f"{tmp_path}/file/run.yaml: cannot be read ([Errno 20] Not a directory: '{tmp_path}/file/run.yaml')"
    ]


# -- the schema -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "'modle' was unexpected"),
        ({"adapter": {"rnak": 8}}, "'rnak' was unexpected"),
        ({"adapter": {"r": 0}}, "0 is less than the minimum of 1"),
        ({"method": "dpo"}, "'dpo' is not one of ['lora', 'qlora', 'full']"),
    ],
)
def test_the_json_schema_refuses_what_load_config_refuses(change: dict[str, Any], message: str) -> None:
    schema = json.loads(json_schema())
    resolved = yaml.safe_load(RunConfig().resolved().to_yaml())
    jsonschema.validate(resolved, schema)
    with pytest.raises(jsonschema.ValidationError, match=message.replace("[", r"\[").replace("]", r"\]")):
        jsonschema.validate({**resolved, **change}, schema)
    with pytest.raises(ConfigError):
        config_from_dict(change)


def test_the_row_limit_says_that_the_loss_uses_every_row() -> None:
    described = json.loads(json_schema())["$defs"]["EvaluationConfig"]["properties"]["max_rows"]["description"]
    assert described.endswith("`eval_loss` uses every row.")


def test_every_key_of_the_schema_is_described() -> None:
    schema = json.loads(json_schema())
    undescribed = [
        f"{section}.{key}"
        for section, body in schema["$defs"].items()
        for key, value in body["properties"].items()
        if "description" not in value and "$ref" not in value
    ]
    assert undescribed == []


# -- fuzz -------------------------------------------------------------------------------------------------------------


def _keys(schema: dict[str, Any]) -> list[str]:
    return sorted({key for body in [schema, *schema["$defs"].values()] for key in body["properties"]})


KEYS = (
    st.sampled_from(_keys(json.loads(json_schema())))
    | st.text(max_size=5)
    | st.none()
    | st.booleans()
    | st.integers()
    | st.dates()
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=3)
    | st.sampled_from(["lora", "full", "2e-4", "all-linear", 0.5, 8])
)
TREES = st.recursive(LEAVES, lambda c: st.lists(c, max_size=3) | st.dictionaries(KEYS, c, max_size=5), max_leaves=20)


def load_or_problems(path: Path | None, *overrides: str) -> RunConfig | list[str]:
    """Whatever comes out, if it is a configuration or a ConfigError."""
    try:
        return load_config(path, overrides)
    except ConfigError as error:
        return error.problems


def only_config_error(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    result = load_or_problems(path)
    if isinstance(result, RunConfig):
        path.write_text(result.resolved().to_yaml(), encoding="utf-8")
        assert load_config(path) == result.resolved()
        assert all(math.isfinite(value) for value in (result.adapter.alpha, result.training.epochs, result.lr))
    else:
        assert result
        for problem in result:
            assert problem.startswith(str(path))
            assert "\n" not in problem


@settings(max_examples=150)
@given(st.dictionaries(KEYS, TREES, max_size=5))
@example({"adapter": [{None: 1}]})
def test_any_yaml_structure_gives_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, tree: Any
) -> None:
    only_config_error(tmp_path_factory.getbasetemp() / "fuzz.yaml", yaml.safe_dump(tree, allow_unicode=True))


PIECES = ["model", "adapter", "r", ": ", ":", "\n", "\n  ", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "!!int ", "!!set ",
          "!!bool ", "!!binary ", "!!timestamp ", "<<", "? ", "|", ">", "'", '"', "\\ud800", "#", "%", "@", "`", "---", "...",
          "2020-13-45", "0x", "0b_", "1e400", ".inf", ".nan", "null", "yes", "~", "8", "\t", "\x85", "\ufeff"]  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_text_gives_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    only_config_error(tmp_path_factory.getbasetemp() / "fuzz.yaml", text)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.sampled_from(["adapter.r", "model", "a.b", "data.path"]),
)
def test_any_override_gives_a_config_or_a_config_error(text: str, key: str) -> None:
    result = load_or_problems(None, f"{key}={text}")
    if not isinstance(result, RunConfig):
        assert result
        assert all(problem.startswith(f"--set {key}={text}: ") for problem in result)


# -- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["tunesmith", "tunesmith.config", "tunesmith.runs", "tunesmith.data.formats"])
def test_importing_the_light_parts_loads_no_heavy_package(module: str) -> None:
    code = (
        f"import sys, {module}; tunesmith = sys.modules['tunesmith']; tunesmith.RunConfig(); tunesmith.load_config()\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'accelerate', 'numpy', 'bitsandbytes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_attribute_of_the_package() -> None:
    import tunesmith

    with pytest.raises(AttributeError, match="module 'tunesmith' has no attribute 'trian'"):
        _ = tunesmith.trian
