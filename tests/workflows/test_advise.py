"""advise: the decision for each kind of answer and data, the settings for each size and card, the file, the costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny import write_jsonl
from tunesmith.config import load_config
from tunesmith.errors import ConfigError, DataError, ModelError
from tunesmith.workflows.advise import QUESTIONS, Question, advise, complete, decide, parse_answers, remarks
from tunesmith.workflows.advise_costs import Prices, cost_model
from tunesmith.workflows.advise_data import DataFacts, read_facts
from tunesmith.workflows.advise_settings import (
    FitResult,
    choose_settings,
    parameters_per_rank,
    rank_for,
    run_config,
    run_yaml,
)
from tunesmith.workflows.rules import settings_warnings

HUB = "someone/some-model"
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def facts(rows: int = 3000, tokens: int = 100, **given: Any) -> DataFacts:
    """Rows of one length, 30% of it supervised."""
    return DataFacts(
        **{
            "path": "rows.jsonl",
            "form": "messages",
            "rows": rows,
            "distinct_rows": rows,
            "conflicts": 0,
            "lengths": [tokens] * rows,
            "supervised_tokens": 3 * rows * tokens // 10,
            "estimated": False,
            "plain_text": False,
            **given,
        }
    )


def answers(**given: str) -> dict[str, str]:
    return {question.key: "unknown" for question in QUESTIONS} | given


def config_of(path: str | Path = "rows.jsonl", model: str | Path = HUB, **settings: Any) -> Any:
    return load_config(None, (), {"data.path": str(path), "model.name": str(model), **settings})


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# -- the decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "given", "decision", "first"),
    [
        (
            facts(499),
            {"goal": "style"},
            "few_shot",
            "499 rows: under about 500, training seldom beats a good prompt with 5",
        ),
        (facts(500), {"goal": "style"}, "fine_tune", "500 rows: enough to learn from"),
        (facts(900, distinct_rows=499), {"goal": "style"}, "few_shot", "499 distinct rows: under about 500"),
        (
            facts(499, 801),
            {"goal": "style"},
            "prompt",
            "499 rows: under about 500, training seldom beats a good prompt",
        ),
        (facts(499, 800), {"goal": "style"}, "few_shot", "499 rows"),
        (facts(499, 300, context_length=2048), {"goal": "skill"}, "prompt", "499 rows"),
        (facts(), {"goal": "format"}, "fine_tune", "3,000 rows: enough"),
        (facts(), {"goal": "classification", "knowledge_changes": "never"}, "fine_tune", "3,000 rows: enough"),
        (facts(), {}, "fine_tune", "3,000 rows: enough"),
        (facts(), {"goal": "facts"}, "retrieval", "looking facts up beats training on them (arXiv 2312.05934)"),
        (facts(), {"goal": "facts", "knowledge_changes": "daily"}, "retrieval", "the facts change (daily)"),
        (facts(), {"goal": "facts", "knowledge_changes": "never"}, "retrieval", "looking facts up"),
        (facts(), {"knowledge_changes": "weekly"}, "retrieval", "the knowledge changes (weekly)"),
        (
            facts(),
            {"goal": "style", "knowledge_changes": "monthly"},
            "retrieval_and_fine_tune",
            "the knowledge changes (monthly)",
        ),
        (facts(400), {"goal": "style", "knowledge_changes": "monthly"}, "retrieval", "the knowledge changes (monthly)"),
        (facts(), {"goal": "facts", "output_format": "strict"}, "retrieval_and_fine_tune", "looking facts up"),
        (facts(400), {"goal": "facts", "output_format": "strict"}, "retrieval", "looking facts up"),
        (
            facts(),
            {"goal": "facts", "knowledge_changes": "never", "latency": "tight"},
            "fine_tune",
            "the facts never change, and there is no time to look them up",
        ),
        (facts(), {"goal": "facts", "knowledge_changes": "daily", "latency": "tight"}, "retrieval", "the facts change"),
        (
            facts(400),
            {"goal": "facts", "knowledge_changes": "never", "latency": "tight"},
            "retrieval",
            "looking facts up",
        ),
        (facts(50, 20_000, plain_text=True), {"goal": "facts"}, "retrieval_and_fine_tune", "looking facts up"),
        (facts(50, 19_000, plain_text=True), {"goal": "facts"}, "retrieval", "looking facts up"),
        (
            facts(50, 20_480, plain_text=True),
            {"goal": "style"},
            "fine_tune",
            "500 pieces of text: enough to learn from",
        ),
        (facts(49, 20_480, plain_text=True), {"goal": "style"}, "prompt", "490 pieces of text: under about 500"),
    ],
)
def test_decisions(data: DataFacts, given: dict[str, str], decision: str, first: str) -> None:
    found, reasons = decide(data, answers(**given))
    assert found == decision
    assert reasons[0].startswith(first)


def test_reasons_are_one_line_each() -> None:
    for goal in ("facts", "style", "format", "classification", "skill", "several", "unknown"):
        for changes in ("never", "daily", "unknown"):
            for rows in (100, 3000):
                _, reasons = decide(facts(rows), answers(goal=goal, knowledge_changes=changes))
                assert reasons
                assert all(reason and "\n" not in reason and len(reason) < 150 for reason in reasons)


def test_examples_that_are_too_long_for_the_prompt_say_how_long() -> None:
    _, reasons = decide(facts(400, 1000), answers(goal="style"))
    assert reasons[1] == "5 examples would add about 5,000 tokens to every request (sensible: 4,000)"
    labels = {f"label_{i}": 5 for i in range(77)}
    _, reasons = decide(facts(385, 100, labels=labels), answers(goal="classification"))
    assert reasons[1] == "77 examples would add about 7,700 tokens to every request (sensible: 4,000)"


@pytest.mark.parametrize(
    ("given", "decision", "start"),
    [
        ({"metric": "no"}, "fine_tune", "without a metric nobody sees"),
        ({}, "fine_tune", "without a metric nobody sees"),
        (
            {"metric": "yes", "tasks": "several_unrelated"},
            "fine_tune",
            "the tasks are unrelated: look at each on its own",
        ),
        ({"metric": "yes", "tasks": "several_related"}, "fine_tune", "related tasks help each other"),
        ({"metric": "yes", "latency": "tight"}, "fine_tune", "latency is tight: a tuned model needs no long prompt"),
        (
            {"metric": "yes", "latency": "tight"},
            "few_shot",
            "latency is tight: put what is the same in every prompt first",
        ),
        ({"metric": "yes", "output_format": "strict"}, "fine_tune", "a strict format: let a grammar constrain"),
        ({"metric": "yes", "privacy": "strict"}, "fine_tune", "the data may not leave"),
    ],
)
def test_what_other_answers_mean(given: dict[str, str], decision: Any, start: str) -> None:
    (remark,) = remarks(facts(), answers(**given), decision)
    assert remark.startswith(start)


def test_one_of_something_is_said_as_one() -> None:
    found = remarks(facts(conflicts=1, distinct_rows=2999, labels={"a": 2, "b": 9}), answers(), "fine_tune")
    assert found[-3:] == [
        "1 of 3,000 rows repeats another: it counts once here",
        "1 row gives a prompt of an earlier row another answer: settle which is right",
        "1 of 2 labels has fewer than 5 rows: too few to learn, or to measure",
    ]
    one = facts(1)
    assert decide(one, answers(goal="style"))[1][0].startswith("1 row: under about 500")
    assert decide(one, answers(goal="style", knowledge_changes="daily"))[1][1].startswith(
        "1 row is too few to train on"
    )
    reasons = {setting.key: setting.reason for setting in choose_settings(one, config_of(), None).settings}
    assert reasons["training.epochs"] == "1 row is few: it is worth seeing again"


def test_nothing_is_remarked_where_nothing_is_wrong() -> None:
    good = answers(metric="yes", latency="no", output_format="free", privacy="no", tasks="one")
    assert remarks(facts(), good, "fine_tune") == []


def test_faults_of_the_data_are_remarked() -> None:
    faulty = facts(100, distinct_rows=90, conflicts=3, labels={"a": 95, "b": 4, "c": 1})
    assert remarks(faulty, answers(metric="yes"), "fine_tune") == [
        "10 of 100 rows repeat others: they count once here",
        "3 rows give a prompt of an earlier row another answer: settle which is right",
        "2 of 3 labels have fewer than 5 rows: too few to learn, or to measure",
    ]
    assert len(remarks(faulty, answers(metric="yes"), "few_shot")) == 2


# -- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_parsed() -> None:
    assert parse_answers(["goal=style", "metric=unknown"]) == {"goal": "style", "metric": "unknown"}


def test_wrong_answers_say_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as error:
        parse_answers(["goal=tone", "colour=red"])
    assert error.value.problems == [
        "--answers goal=tone: expected one of facts, style, format, classification, skill, several, unknown",
        "--answers colour=red: no such question; there are goal, knowledge_changes, metric, latency, output_format, privacy, "
        "tasks",
    ]
    with pytest.raises(ConfigError) as error:
        parse_answers(["goal", "metric=yes", "metric=no"])
    assert error.value.problems == [
        "--answers goal: expected key=value, e.g. --answers goal=style",
        "--answers metric=no: `metric` was answered before (metric=yes)",
    ]


def test_what_is_not_answered_is_assumed_from_the_data() -> None:
    labelled = facts(labels={"a": 1500, "b": 1500})
    known, assumed = complete({"metric": "yes", "tasks": "unknown"}, labelled, None)
    assert known == answers(goal="classification", metric="yes")
    assert "metric" not in assumed
    assert assumed == {key: value for key, value in known.items() if key != "metric"}
    assert complete({}, facts(json_answers=True), None)[1]["output_format"] == "strict"
    assert complete({}, facts(json_answers=True), None)[1]["goal"] == "format"
    assert complete({}, facts(plain_text=True), None)[1]["goal"] == "facts"
    assert complete({}, facts(labels={"the only": 3000}), None)[1]["goal"] == "unknown"


def test_only_what_is_not_answered_is_asked() -> None:
    asked: list[tuple[str, str]] = []

    def ask(question: Question, suggested: str) -> str:
        asked.append((question.key, suggested))
        return "yes" if question.key == "metric" else suggested

    known, assumed = complete({"goal": "skill", "tasks": "one"}, facts(json_answers=True), ask)
    assert asked == [
        ("knowledge_changes", "unknown"),
        ("metric", "unknown"),
        ("latency", "unknown"),
        ("output_format", "strict"),
        ("privacy", "unknown"),
    ]
    assert known == answers(goal="skill", metric="yes", output_format="strict", tasks="one")
    assert assumed == dict.fromkeys(("knowledge_changes", "latency", "privacy"), "unknown")


# -- the data ---------------------------------------------------------------------------------------------------------


def test_facts_of_a_file(tmp_path: Path) -> None:
    rows = [chat("a" * 40, "b" * 80), chat("a" * 40, "b" * 80), chat("A" * 40, "b" * 80), chat("a" * 40, "c" * 80)]
    found = read_facts(config_of(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert (found.rows, found.distinct_rows, found.conflicts, found.examples) == (4, 2, 1, 2)
    assert list(found.lengths) == [40] * 4  # two turns of 5 tokens around 40 / 4 and 80 / 4
    assert found.supervised_tokens == 4 * 21  # the answer and its end
    assert (found.mean_row_tokens, found.mean_answer_tokens, found.mean_prompt_tokens) == (40, 21, 19)
    assert (found.estimated, found.plain_text, found.json_answers, found.labels) == (True, False, False, {})
    assert (found.context_length, found.model_config) == (None, None)


def test_facts_in_a_models_own_tokens(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("abcd", "efg"), chat("hi", "k")])
    found = read_facts(config_of(path, tiny_model))
    # A token a byte: <|im_start|>user\nabcd<|im_end|>\n<|im_start|>assistant\nefg<|im_end|>\n; the answer and its end count.
    assert list(found.lengths) == [1 + 5 + 4 + 1 + 1 + 1 + 10 + 3 + 1 + 1, 1 + 5 + 2 + 1 + 1 + 1 + 10 + 1 + 1 + 1]
    assert found.supervised_tokens == 4 + 2
    assert (found.estimated, found.context_length) == (False, 4096)
    assert found.model_config is not None
    assert found.model_config["hidden_size"] == 32


def test_a_well_known_models_shape_needs_no_download(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    found = read_facts(config_of(path, "Qwen/Qwen2.5-7B-Instruct"))
    assert found.model_config is not None
    assert found.model_config["hidden_size"] == 3584
    assert found.context_length is None


def test_labels_json_and_plain_text_are_recognised(tmp_path: Path) -> None:
    labels = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(10)]
    assert read_facts(config_of(write_jsonl(tmp_path / "a.jsonl", labels))).labels == {"a": 5, "b": 5}
    answered = [chat(str(i), json.dumps({"n": i})) for i in range(3)]
    assert read_facts(config_of(write_jsonl(tmp_path / "b.jsonl", answered))).json_answers
    answered.append(chat("x", "{n: 1}"))
    assert not read_facts(config_of(write_jsonl(tmp_path / "c.jsonl", answered))).json_answers
    texts = read_facts(config_of(write_jsonl(tmp_path / "d.jsonl", [{"text": "a" * 20_000}])))
    assert (texts.plain_text, list(texts.lengths), texts.examples) == (True, [5001], 3)
    assert texts.supervised_tokens == 5001


def test_a_file_with_errors_says_what_data_check_says(tmp_path: Path) -> None:
    from tunesmith.workflows.data import check_data

    path = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b"), chat("c", ""), chat("d", "e")])
    config = config_of(path)
    problems = [problem for problem in check_data(config_of(path, ""))["problems"] if problem["severity"] == "error"]
    with pytest.raises(DataError) as error:
        read_facts(config)
    assert error.value.problems == [f"{path}:2: {problems[0]['message']}"]
    assert read_facts(config_of(path, **{"data.skip_bad_rows": True})).rows == 2


def test_rows_without_a_supervised_turn_are_errors_too(tmp_path: Path, tiny_model: Path) -> None:
    rows = [chat("a", "b"), chat("c", "d")]
    rows[1]["messages"][1]["train"] = False
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for model in (HUB, tiny_model):
        with pytest.raises(DataError, match=r"rows\.jsonl:2: .*nothing to learn"):
            read_facts(config_of(path, model))
        found = read_facts(config_of(path, model, **{"data.skip_bad_rows": True}))
        assert (found.rows, len(found.lengths)) == (1, 1)


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("kto", {"prompt": "a", "completion": "b", "label": True}),
    ],
)
def test_preferences_are_refused(tmp_path: Path, form: str, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"rows are of form {form}: .*; pass a file of answers or of plain text$"):
        read_facts(config_of(write_jsonl(tmp_path / "rows.jsonl", [row])))


def test_long_rows_are_measured_whole(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("abcd", "e" * 5000)])
    assert list(read_facts(config_of(path, tiny_model)).lengths) == [25 + 5000]


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        read_facts(config_of(write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")]), "./nowhere"))


# -- settings ---------------------------------------------------------------------------------------------------------


def fits(**peaks: float) -> Any:
    """A card of 24 GB, on which each method has this peak; what is not named cannot be predicted."""

    def fit(settings: Mapping[str, Any], lengths: Sequence[int], supervised: Sequence[int]) -> FitResult | None:
        peak = peaks.get(settings["method"])
        return None if peak is None else FitResult(peak, 24.0, peak <= 20.835, 5000.0, 8)  # 90% of 24 - 0.85

    return fit


def settings(data: DataFacts, fit: Any = None, **given: Any) -> dict[str, Any]:
    """The settings, which no rule may object to."""
    config = config_of(**given)
    plan = choose_settings(data, config, fit)
    chosen = run_config(config, plan)
    assert settings_warnings(chosen, data.rows, data.total_tokens, data.supervised_tokens) == []
    return plan.values


@pytest.mark.parametrize(
    ("rows", "rank", "lr", "epochs", "batch"),
    [
        (100, 8, 1e-4, 3, 16),
        (999, 8, 1e-4, 3, 16),
        (1000, 16, 2e-4, 3, 16),
        (4999, 16, 2e-4, 3, 16),
        (5000, 16, 2e-4, 2, 16),
        (10_000, 16, 2e-4, 2, 32),
        (50_000, 16, 2e-4, 1, 32),
        (99_999, 16, 2e-4, 1, 32),
        (100_000, 16, 1e-4, 1, 32),
    ],
)
def test_settings_follow_the_rows(rows: int, rank: int, lr: float, epochs: int, batch: int) -> None:
    chosen = settings(facts(rows))
    keys = ("method", "adapter.r", "adapter.alpha", "adapter.target_modules")
    assert tuple(chosen[key] for key in keys) == ("lora", rank, 32, "all-linear")
    keys = ("optimizer.lr", "training.epochs", "training.batch_size")
    assert tuple(chosen[key] for key in keys) == (lr, epochs, batch)


def test_parameters_of_a_rank() -> None:
    # Llama 3.1 8B: PEFT counts 41,943,040 parameters for rank 16 on all linear layers.
    assert parameters_per_rank(LLAMA_8B) == 41_943_040 / 16
    assert parameters_per_rank({"text_config": LLAMA_8B}) == 41_943_040 / 16
    assert parameters_per_rank(LLAMA_8B | {"num_local_experts": 8}) is None
    assert parameters_per_rank({"hidden_size": 64}) is None
    assert parameters_per_rank(None) is None


def test_the_rank_holds_the_data() -> None:
    per_rank = 41_943_040 / 16
    holds = int(16 * per_rank * 2 * math.log(2))  # 2 bits a parameter, 1 nat a token: 58 million tokens at rank 16
    assert rank_for(facts(supervised_tokens=holds, model_config=LLAMA_8B))[0] == 16
    assert rank_for(facts(supervised_tokens=holds + 10, model_config=LLAMA_8B)) == (
        32,
        f"what holds {holds + 10:,} supervised tokens (2 bits a parameter, 1.44 a token; LWR)",
    )
    assert rank_for(facts(supervised_tokens=4 * holds, model_config=LLAMA_8B))[0] == 64
    assert rank_for(facts(supervised_tokens=40 * holds, model_config=LLAMA_8B)) == (
        256,
        f"the highest that is sensible: to hold {40 * holds:,} supervised tokens, it would have to be 1024 (LWR)",
    )


def test_the_rank_without_a_known_model_is_a_small_ones() -> None:
    holds = int(16 * 704_512 * 2 * math.log(2))
    assert [rank_for(facts(supervised_tokens=tokens))[0] for tokens in (holds, holds + 10)] == [16, 32]


def test_the_rank_of_few_rows_stays_low_unless_they_are_books() -> None:
    assert rank_for(facts(900, supervised_tokens=9_999_999, model_config=LLAMA_8B | {"num_hidden_layers": 1}))[0] == 32
    assert (
        rank_for(facts(900, supervised_tokens=10_000_000, model_config=LLAMA_8B | {"num_hidden_layers": 1}))[0] == 128
    )


@pytest.mark.parametrize(
    ("peaks", "method", "reason"),
    [
        ({"lora": 20.0}, "lora", "learns as well as full on data of this size (LWR), and fits: 20.0 of 20.8 usable GB"),
        ({"lora": 20.8, "qlora": 9.0}, "lora", "learns as well as full"),
        (
            {"lora": 21.0, "qlora": 9.0},
            "qlora",
            "LoRA does not fit (21.0 of 20.8 usable GB); QLoRA takes 9.0 of 20.8 usable GB",
        ),
        ({"lora": 90.0, "qlora": 40.0}, "qlora", "does not fit: 40.0 of 20.8 usable GB"),
        ({"lora": 90.0}, "lora", "does not fit: 90.0 of 20.8 usable GB"),
        ({}, "lora", "what this model needs on this card cannot be predicted"),
        ({"lora": 5.0, "full": 6.0}, "lora", "learns as well as full"),
    ],
)
def test_the_method_is_what_fits(peaks: dict[str, float], method: str, reason: str) -> None:
    plan = choose_settings(facts(), config_of(), fits(**peaks))
    assert plan.settings[0].value == method
    assert plan.settings[0].reason.startswith(reason)


def test_full_fine_tuning_only_for_what_no_adapter_holds() -> None:
    much = facts(120_000, supervised_tokens=2_000_000_000, model_config=LLAMA_8B)
    chosen = settings(much, fits(lora=10.0, full=20.0))
    assert (chosen["method"], chosen["optimizer.lr"]) == ("full", 1e-5)
    assert not any(key.startswith("adapter.") for key in chosen)
    assert settings(much, fits(lora=10.0, full=30.0))["method"] == "lora"
    assert settings(much, fits(lora=10.0))["adapter.r"] == 256


@pytest.mark.parametrize(("speed", "method"), [(5400.0, "lora"), (5600.0, "qlora")])
def test_qlora_where_lora_fits_but_is_a_good_deal_slower(speed: float, method: str) -> None:
    """As `tunesmith plan` recommends it: from 1.1 times LoRA's 5,000 tokens/s on."""

    def fit(settings: Mapping[str, Any], lengths: Sequence[int], supervised: Sequence[int]) -> FitResult:
        lora = settings["method"] == "lora"
        return FitResult(20.0 if lora else 12.0, 24.0, True, 5000.0 if lora else speed, 8)

    plan = choose_settings(facts(3000, 100), config_of(), fit)
    assert plan.values["method"] == method
    assert plan.fit is plan.tried[method]
    if method == "qlora":
        reason = next(setting.reason for setting in plan.settings if setting.key == "method")
        assert reason.startswith("LoRA fits (20.0 of ")
        assert "QLoRA is 1.12 times as fast: 12.0 of " in reason


def test_what_the_card_is_asked() -> None:
    asked: list[Sequence[Any]] = []

    def fit(settings: Mapping[str, Any], lengths: Sequence[int], supervised: Sequence[int]) -> FitResult:
        asked.append((dict(settings), set(lengths), set(supervised)))
        return FitResult(30.0, 24.0, settings["method"] == "qlora", 5000.0, 64, graphs_gb=0.5)

    plan = choose_settings(facts(12_000, 100), config_of(), fit)
    common = {"data.max_seq_length": 128, "training.batch_size": 32}
    adapter = {"adapter.r": 16, "adapter.alpha": 32, "adapter.target_modules": "all-linear"}
    assert asked == [({"method": method, **common, **adapter}, {100}, {30}) for method in ("lora", "qlora")]
    asked.clear()
    choose_settings(facts(12_000, 100, supervised_tokens=2_000_000_000), config_of(), fit)
    assert asked[0][0] == {"method": "full", **common}
    assert "training.micro_batch_size" not in plan.values  # train plans it
    said = {
        "peak_gb": 30.0,
        "memory_gb": 24.0,
        "fits": True,
        "tokens_per_second": 5000.0,
        "micro_batch_size": 64,
        "micro_batch_unit": "examples",
        "graphs_gb": 0.5,
        "num_gpus": 1,
        "basis": {},
        "usable_gb": pytest.approx(0.9 * (24 - 0.85)),
    }
    assert plan.fits() == {"method": "qlora", **said, "tried": {"lora": said | {"fits": False}, "qlora": said}}
    assert plan.fit is not None
    assert plan.fit.needs == "30.5 of 20.8 usable GB"  # with the graphs


def test_without_a_card_the_plan_says_so() -> None:
    plan = choose_settings(facts(), config_of(), None)
    assert plan.fits() is None
    assert plan.settings[0].reason == "no card is known (--gpu, --memory): take qlora if 16-bit weights do not fit"


def test_the_length_follows_the_data() -> None:
    lengths = [100] * 960 + [1000] * 40  # the 95th percentile is 100: x 1.2, up to a multiple of 64
    uneven = facts(1000, lengths=lengths)
    plan = choose_settings(uneven, config_of(), None)
    assert (plan.values["data.max_seq_length"], plan.values["data.overlong"]) == (128, "drop")
    reason = next(setting.reason for setting in plan.settings if setting.key == "data.overlong")
    assert reason == "40 of 1,000 rows are longer, and a cut answer teaches to stop anywhere"
    assert "data.overlong" not in settings(facts(1000, 100))
    plan = choose_settings(facts(1000, 100, estimated=True), config_of(), None)
    assert (plan.values["data.max_seq_length"], plan.max_seq_length) == ("auto", 128)
    short = choose_settings(facts(1000, 100, context_length=96), config_of(), None)
    assert (short.values["data.max_seq_length"], short.values["data.overlong"]) == (96, "truncate")
    assert list(short.lengths) == [96] * 1000
    assert short.settings[2].reason.startswith("every row is longer than the model takes (96 tokens)")


def test_plain_text_is_split() -> None:
    chosen = settings(facts(3, 20_000, plain_text=True, supervised_tokens=60_000))
    assert chosen["data.max_seq_length"] == 2048
    assert "data.overlong" not in chosen
    chosen = settings(facts(3, 20_000, plain_text=True, supervised_tokens=60_000, context_length=1024))
    assert chosen["data.max_seq_length"] == 1024


@pytest.mark.parametrize(
    ("rows", "fraction", "every"), [(200, 0.1, 10), (3000, 0.1, 42), (20_000, 0.05, 148), (200_000, 0.005, 1554)]
)
def test_evaluation_where_there_are_rows_for_it(rows: int, fraction: float, every: int) -> None:
    chosen = settings(facts(rows))
    assert chosen["data.eval_fraction"] == fraction
    assert chosen["training.eval_every"] == every  # four times an epoch of rows x (1 - fraction) / batch steps
    assert chosen["training.early_stopping.metric"] == "eval_loss"


def test_no_evaluation_of_too_few_rows_and_none_held_out_beside_a_file() -> None:
    for key in ("data.eval_fraction", "training.eval_every", "training.early_stopping.metric"):
        assert key not in settings(facts(199))
    chosen = settings(facts(199), **{"data.eval_path": "held_out.jsonl"})
    assert "data.eval_fraction" not in chosen
    assert chosen["training.eval_every"] == 10


@pytest.mark.parametrize("rows", [1, 10, 300, 700, 1000, 3000, 12_000])
@pytest.mark.parametrize("tokens", [20, 3000])
@pytest.mark.parametrize("plain_text", [True, False])
@pytest.mark.parametrize("layers", [1, 32])
def test_no_rule_objects_to_the_settings(rows: int, tokens: int, plain_text: bool, layers: int) -> None:
    shape = LLAMA_8B | {"num_hidden_layers": layers}
    for fit in (None, fits(lora=5.0), fits(lora=5.0, full=6.0)):
        settings(facts(rows, tokens, plain_text=plain_text, model_config=shape), fit)  # asserts it


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_loads_to_the_same_settings(tmp_path: Path) -> None:
    config = config_of(
        "my rows #1: all.jsonl",
        **{
            "data.columns": {"instruction": "q: x", "output": "the answer of an agent"},
            "data.train_on": "last",
            "model.dtype": "bf16",
        },
    )
    uneven = facts(3000, lengths=[20 + 7 * (index % 100) for index in range(3000)])
    plan = choose_settings(uneven, config, fits(lora=20.0))
    text = run_yaml(config, plan, "Fine-tune.")
    (tmp_path / "run.yaml").write_text(text)
    loaded = load_config(tmp_path / "run.yaml")
    assert loaded == run_config(config, plan)
    assert loaded.data.columns == {"instruction": "q: x", "output": "the answer of an agent"}
    assert "  columns: {instruction: 'q: x', output: the answer of an agent}" in text.splitlines()
    assert (loaded.data.packing, loaded.adapter.r, loaded.lr) == ("auto", 16, 2e-4)


def test_the_file_gives_a_reason_for_every_setting() -> None:
    config = config_of()
    plan = choose_settings(facts(600), config, None)
    lines = run_yaml(config, plan, "Fine-tune.").splitlines()
    assert lines[0] == "# tunesmith advise: Fine-tune."
    assert lines[2].startswith("method: lora ")
    assert lines[3:5] == ["model:", f"  name: {HUB}"]
    by_name = {line.partition(":")[0].strip(): line for line in lines[2:]}
    for setting in plan.settings:
        assert by_name[setting.key.rpartition(".")[2]].endswith(f"  # {setting.reason}")
    assert [line for line in lines if line.startswith("training:")] == ["training:"]
    assert lines[-2:] == [
        "  early_stopping:",
        "    metric: eval_loss                 # stops when it no longer falls; the best weights are kept",
    ]


def test_full_and_qlora_files_load(tmp_path: Path) -> None:
    much = facts(120_000, supervised_tokens=2_000_000_000, model_config=LLAMA_8B)
    for name, data, fit in (("full", much, fits(full=20.0)), ("qlora", facts(), fits(lora=30.0, qlora=9.0))):
        plan = choose_settings(data, config_of(), fit)
        (tmp_path / name).write_text(run_yaml(config_of(), plan, "Fine-tune."))
        loaded = load_config(tmp_path / name)
        assert loaded.method == name
        assert loaded == run_config(config_of(), plan)


# -- costs ------------------------------------------------------------------------------------------------------------

HOSTED = Prices(requests_per_day=1000, per_million_input_tokens=2.0, per_million_output_tokens=10.0)


def costs(prices: Prices, fit: Any = None, **given: Any) -> Any:
    data = facts(3000, 100, **given)  # 70 tokens of question, 30 of answer
    return cost_model(data, choose_settings(data, config_of(), fit), prices)


def ways(result: Any, part: str) -> dict[str, Any]:
    return {way["way"]: way[part] for way in result["ways"]}


def test_no_costs_without_prices() -> None:
    assert costs(Prices()) is None


def test_hours_of_a_run_and_of_the_search() -> None:
    run = costs(Prices(per_hour=2.0), fits(lora=20.0))["run"]
    assert run == {
        "tokens": 270_000,  # a tenth is held out
        "epochs": 3,
        "tokens_per_second": 5000.0,
        "num_gpus": 1,
        "hours": 0.045,
        "cost": 0.09,
        "search_hours": pytest.approx([0.225, 0.45]),
        "search_cost": pytest.approx([0.45, 0.9]),
        "unknown": None,
    }


@pytest.mark.parametrize(("held_out", "share"), [(None, 0.9), ("held_out.jsonl", 1.0)])
def test_rows_that_are_dropped_or_held_out_cost_nothing(held_out: str | None, share: float) -> None:
    data = facts(1000, lengths=[100] * 960 + [1000] * 40)
    plan = choose_settings(data, config_of(**{"data.eval_path": held_out}), fits(lora=20.0))
    assert plan.values["data.overlong"] == "drop"
    found = cost_model(data, plan, Prices(per_hour=1.0))
    assert found is not None
    assert found["run"]["tokens"] == share * 960 * 100


def test_the_price_is_of_one_card_of_several() -> None:
    four = costs(Prices(per_hour=2.0), lambda *_: FitResult(20.0, 24.0, True, 5000.0, 8, num_gpus=4))["run"]
    assert (four["num_gpus"], four["hours"], four["cost"]) == (4, 0.045, 4 * 0.09)


def test_a_run_that_does_not_fit_has_no_costs() -> None:
    result = costs(Prices(2.0, 0.5, 1000, 2.0, 10.0), fits(lora=90.0, qlora=40.0))
    run = result["run"]
    assert (run["unknown"], run["hours"], run["cost"]) == ("it does not train on this card", None, None)
    assert ways(result, "first_year")["fine_tune"] is None
    assert ways(result, "serving")["fine_tune"] < 8760 * 2.0  # not on a card that it does not train on
    assert costs(Prices(per_hour=2.0))["run"]["unknown"] == "no card is known that the speed could be predicted for"


def test_serving_by_the_token() -> None:
    result = costs(HOSTED)
    assert ways(result, "input_tokens") == {
        "prompt": 70 + 300,
        "few_shot": 70 + 300 + 5 * 100,
        "retrieval": 70 + 300 + 2000,
        "fine_tune": 70,
        "retrieval_and_fine_tune": 70 + 2000,
    }
    serving = ways(result, "serving")
    assert serving["prompt"] == pytest.approx(365 * 1000 * (370 * 2 + 30 * 10) / 1e6)
    assert serving["fine_tune"] == pytest.approx(365 * 1000 * (70 * 2 + 30 * 10) / 1e6)
    assert ways(result, "training") == {
        "prompt": [0, 0],
        "few_shot": [0, 0],
        "retrieval": [0, 0],
        "fine_tune": None,
        "retrieval_and_fine_tune": None,
    }
    assert ways(result, "first_year")["fine_tune"] is None
    assert ways(result, "first_year")["prompt"] == [serving["prompt"]] * 2


def test_few_shot_shows_one_example_of_each_label() -> None:
    labels = {f"label_{i}": 100 for i in range(30)}
    assert ways(costs(HOSTED, labels=labels), "input_tokens")["few_shot"] == 70 + 300 + 30 * 100


def test_a_year_with_all_prices() -> None:
    prices = Prices(2.0, 0.5, 1000, 2.0, 10.0)
    result = costs(prices, fits(lora=20.0))
    assert ways(result, "labelling") == {
        "prompt": 0,
        "few_shot": 2.5,
        "retrieval": 0,
        "fine_tune": 1500,
        "retrieval_and_fine_tune": 1500,
    }
    serving = ways(result, "serving")
    assert serving["fine_tune"] == 8760 * 2.0  # a card that is always on
    assert serving["few_shot"] == pytest.approx(365 * 1000 * (870 * 2 + 30 * 10) / 1e6)  # a hosted model
    first_year = ways(result, "first_year")
    assert first_year["fine_tune"] == pytest.approx([0.45 + 1500 + 17520, 0.9 + 1500 + 17520])
    assert first_year["few_shot"] == pytest.approx([2.5 + serving["few_shot"]] * 2)


def test_with_the_cards_price_alone_all_ways_are_served_on_it() -> None:
    assert set(ways(costs(Prices(per_hour=1.5)), "serving").values()) == {8760 * 1.5}


def test_with_the_price_of_labels_alone_the_rest_is_unknown() -> None:
    result = costs(Prices(labelling_per_example=0.5))
    assert ways(result, "labelling")["fine_tune"] == 1500
    assert set(ways(result, "first_year").values()) == {None}


@pytest.mark.parametrize(
    ("prices", "problem"),
    [
        (Prices(per_million_input_tokens=1.0, requests_per_day=5), "only one is given; a request costs both"),
        (Prices(requests_per_day=5), "--requests-per-day has no effect without prices of tokens; add"),
        (Prices(per_hour=1.0, requests_per_day=5), "--requests-per-day has no effect without prices of tokens; add"),
        (
            Prices(per_million_input_tokens=1.0, per_million_output_tokens=0.0),
            "prices of tokens have no effect without a number of requests; add --requests-per-day N",
        ),
    ],
)
def test_prices_that_do_nothing_are_refused(prices: Prices, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        prices.check()
    (found,) = error.value.problems
    assert problem in found
    HOSTED.check()
    Prices(per_hour=1.0).check()


# -- all of it --------------------------------------------------------------------------------------------------------


def test_advice_has_the_keys_that_others_rely_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"question {i}", f"answer {i}") for i in range(20)])
    out = tmp_path / "run.yaml"
    result = advise(config_of(path), {"goal": "style"}, out=out, prices=Prices(per_hour=1.0))
    assert list(result) == [
        *("decision", "headline", "instead", "reasons", "alternatives", "answers", "assumed", "data", "settings"),
        *("settings_reasons", "run_yaml", "fits", "costs"),
    ]
    assert (result["decision"], result["run_yaml"], result["fits"]) == ("few_shot", str(out), None)
    assert result["headline"] == "Don't fine-tune yet: put examples into the prompt first."
    assert [other["way"] for other in result["alternatives"]] == ["prompt", "fine_tune"]
    assert out.read_text().startswith("# tunesmith advise: Don't fine-tune yet: ")
    assert load_config(out) == load_config(None, (), {"data.path": str(path), "model.name": HUB, **result["settings"]})
    assert result["settings"].keys() == result["settings_reasons"].keys()
    json.dumps(result, allow_nan=False)


def test_a_goal_that_was_read_off_the_data_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(600)])
    result = advise(config_of(path), {})
    line = "goal=classification was read off the data: the answers are 2 labels (else --answers goal=...)"
    assert line in result["reasons"]
    assert line not in advise(config_of(path), {"goal": "classification"})["reasons"]
    assert result["reasons"][0] == "600 rows: enough to learn from"


def test_answers_and_prices_are_checked_before_the_data_is_read() -> None:
    with pytest.raises(ConfigError, match="--answers goal=tone: expected one of facts, "):
        advise(config_of("absent.jsonl"), {"goal": "tone"})
    with pytest.raises(ConfigError, match="--requests-per-day has no effect"):
        advise(config_of("absent.jsonl"), {}, prices=Prices(requests_per_day=5))
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        advise(config_of("absent.jsonl"), {})


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    out = tmp_path / "run.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"run\.yaml: exists already, and is not overwritten; choose another --out"):
        advise(config_of(path), {}, out=out)
    assert out.read_text() == "mine"


def test_settings_that_are_decided_here_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    with pytest.raises(ConfigError) as error:
        advise(config_of(path, **{"method": "lora", "adapter.r": 4, "data.overlong": "drop", "data.max_rows": 5}), {})
    assert [problem.partition(" ")[0] for problem in error.value.problems] == [
        "method",
        "adapter",
        "data.overlong",
        "data.max_rows",
    ]
    assert error.value.problems[1] == (
        "adapter is what advise decides; remove it, and change it in the run.yaml afterwards (allowed here: model.*, and "
        "data.* but max_seq_length, overlong, eval_fraction, mix)"
    )


@pytest.mark.parametrize(
    ("name", "goal", "decision", "few"),
    [
        ("banking77/train.jsonl", "classification", "fine_tune", False),
        ("banking77/train_10shot_chat.jsonl", "classification", "fine_tune", True),
        ("instruct/self_instruct_seed.jsonl", "unknown", "few_shot", True),
        ("llamafactory/identity.jsonl", "unknown", "few_shot", True),
        ("instruct/dolly_hhrlhf_1k.jsonl", "unknown", "fine_tune", False),
        ("gsm8k/train.jsonl", "unknown", "fine_tune", False),
        ("chat/sgd_train_messages.jsonl", "unknown", "few_shot", True),
        ("domain_text/hf_course_en.jsonl", "facts", "retrieval", True),
    ],
)
def test_real_data(shared_data: Path, tmp_path: Path, name: str, goal: str, decision: str, few: bool) -> None:
    result = advise(config_of(shared_data / name), {}, out=tmp_path / "run.yaml")
    assert (result["assumed"]["goal"], result["decision"]) == (goal, decision)
    assert result["settings"]["adapter.r"] == (8 if few else 16)
    config = load_config(tmp_path / "run.yaml")
    data = result["data"]
    assert settings_warnings(config, data["rows"], data["tokens"], data["supervised_tokens"]) == []


def test_banking77_has_its_77_labels(shared_data: Path) -> None:
    found = read_facts(config_of(shared_data / "banking77/train.jsonl"))
    assert (found.rows, len(found.labels), sum(found.labels.values())) == (10_003, 77, 10_003)
    assert found.distinct_rows == 9999
