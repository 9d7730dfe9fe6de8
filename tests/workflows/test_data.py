"""What the `data` commands find out, with and without a model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import PreTrainedTokenizerBase

from tiny import BOS, IM_END, IM_START, chat_rows, make_tiny_model, make_tokenizer, write_jsonl
from tunesmith.config import RunConfig, load_config
from tunesmith.data.formats import read_examples
from tunesmith.data.lengths import estimate_row
from tunesmith.errors import ConfigError, DataError, ModelError, RunError
from tunesmith.workflows.data import check_data, data_stats, preview_data, sequences, split_data

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_rows(rows: list[Any], name: str = "rows.jsonl") -> Path:
        return write_jsonl(tmp_path / name, rows)

    return write_rows


def configured(path: Path, model: Path | None = None, **data: Any) -> RunConfig:
    config = RunConfig()
    config.data = config.data.model_copy(update={"path": str(path), **data})
    config.model.name = str(model or "")
    return config


def ask(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def codes(result: dict[str, Any]) -> list[tuple[str, int | None, str]]:
    return [(problem["code"], problem["line"], problem["severity"]) for problem in result["problems"]]


# check


def test_every_problem_of_both_files_at_once(write: Write) -> None:
    train = write([ask("a?", "one"), {"messages": []}, ask("a?", "one"), ask("b?", "<|eot_id|>")])
    held = write([ask("A?", "one"), ask("c?", 7)], "held.jsonl")
    result = check_data(configured(train, eval_path=str(held)))
    assert (result["ok"], result["rows"], result["bad_rows"], result["eval_rows"]) == (False, 4, 1, 2)
    assert (result["errors"], result["warnings"]) == (2, 3)
    found = [(Path(p["file"]).name, p["line"], p["code"]) for p in result["problems"]]
    assert found[1:] == [
        ("rows.jsonl", 3, "duplicate_row"),
        ("rows.jsonl", 4, "control_token"),
        ("held.jsonl", 1, "leaked_row"),
        ("held.jsonl", 2, "wrong_type"),
    ]
    assert found[0][:2] == ("rows.jsonl", 2)
    assert result["problems"][1]["message"] == (
        "the same as line 1 (1 of 3 rows repeat an earlier one); "
        "remove the repetitions, or keep them if these rows are to count more"
    )


def test_bad_rows_can_be_left_out(write: Write) -> None:
    path = write([ask("a?", "one"), ask("b?", ""), ask("c?", "three"), {"prompt": "d?", "completion": "four"}])
    result = check_data(configured(path, skip_bad_rows=True))
    assert result["ok"]
    assert result["skipped_rows"] == {str(path): [2, 4]}
    assert result["errors"] == 3  # two rows, and that there are two forms
    assert not check_data(configured(path))["ok"]


def test_what_skipping_rows_does_not_mend(write: Write, tmp_path: Path) -> None:
    assert not check_data(configured(write([ask("b?", "")]), skip_bad_rows=True))["ok"]  # no row is left
    result = check_data(configured(tmp_path / "no.jsonl", skip_bad_rows=True))
    assert not result["ok"]
    assert result["problems"][0]["message"] == "no such file"
    held = write([ask("b?", "")], "held.jsonl")
    assert not check_data(configured(write([ask("a?", "b")]), skip_bad_rows=True, eval_path=str(held)))["ok"]


def test_bad_rows_of_a_json_list_on_one_line_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ask("a?", ""), ask("b?", ""), ask("c?", "")]))
    result = check_data(configured(path))
    assert (result["rows"], result["bad_rows"], result["skippable"]) == (3, 3, False)
    path.write_text(json.dumps([ask("a?", ""), ask("b?", ""), ask("c?", "yes")]))
    result = check_data(configured(path))
    assert (result["bad_rows"], result["skippable"]) == (2, True)


def test_what_can_be_skipped_and_what_can_be_trained_on(write: Write, tiny_model: Path) -> None:
    def outcome(config: RunConfig) -> tuple[bool, bool, bool]:
        result = check_data(config)
        return result["ok"], result["trainable"], result["skippable"]

    good = write([ask("a?", "one"), ask("b" * 100, "two")], "good.jsonl")
    assert outcome(configured(good)) == (True, True, False)
    assert outcome(configured(good, tiny_model, max_seq_length=64)) == (False, False, True)
    assert outcome(configured(good, tiny_model, max_seq_length=64, skip_bad_rows=True)) == (True, True, False)
    assert outcome(configured(good, tiny_model, max_seq_length=8)) == (False, False, False)  # no row would be left
    assert outcome(configured(good, tiny_model, max_seq_length=8, skip_bad_rows=True)) == (False, False, False)
    assert outcome(configured(good, eval_path=str(good.with_name("no.jsonl")))) == (False, False, False)
    weightless = write([{"messages": [*ask("a?", "b")["messages"][:1], {"role": "assistant", "content": "b", "train": False}]}], "w.jsonl")  # fmt: skip
    assert outcome(configured(weightless)) == (False, False, False)
    pairs = write([{"prompt": "a?", "chosen": "good", "rejected": "bad"}], "pairs.jsonl")
    assert outcome(configured(pairs)) == (True, True, False)
    assert check_data(configured(pairs))["objectives"] == ["dpo", "orpo", "simpo", "kto"]
    assert outcome(configured(good, eval_path=str(pairs))) == (True, False, False)
    kto = write([{"prompt": "a?", "completion": "good", "label": True}], "kto.jsonl")
    assert outcome(configured(kto)) == (True, True, False)
    assert check_data(configured(pairs, eval_path=str(kto)))["objectives"] == ["kto"]
    assert check_data(configured(good))["objectives"] == ["sft"]


Command = Callable[[RunConfig], Any]
COMMANDS: dict[str, Command] = {
    "check": check_data,
    "stats": data_stats,
    "preview": preview_data,
    "split": lambda config: split_data(config, Path("never-made"), {"train": 1.0}),
}
EVERY_ROW = "on this command, which reads every row; remove it"
NO_MODEL = "without a model; pass --model, or remove it"


@pytest.mark.parametrize(
    ("setting", "value", "reasons"),
    [
        ("max_rows", 5, dict.fromkeys(COMMANDS, EVERY_ROW)),
        (
            "eval_fraction",
            0.1,
            dict.fromkeys(
                COMMANDS, "on this command, which holds no rows out; remove it, or use `tunesmith data split`"
            ),
        ),
        ("eval_path", "x.jsonl", dict.fromkeys(("stats", "preview", "split"), "on this command; remove it")),
        ("chat_template", "alpaca", dict.fromkeys(COMMANDS, NO_MODEL) | {"split": "on this command; remove it"}),
        (
            "chat_template_kwargs",
            {"enable_thinking": False},
            dict.fromkeys(COMMANDS, NO_MODEL) | {"split": "on this command; remove it"},
        ),
        ("max_seq_length", 99, {"preview": NO_MODEL}),
        ("overlong", "drop", {"preview": NO_MODEL}),
    ],
)
def test_settings_that_would_be_ignored(write: Write, setting: str, value: Any, reasons: dict[str, str]) -> None:
    path = write([ask("a?", "b")])
    for name, command in COMMANDS.items():
        if name in reasons:
            with pytest.raises(ConfigError) as raised:
                command(configured(path, **{setting: value}))
            assert str(raised.value) == f"data.{setting} has no effect {reasons[name]}"
        elif name != "split" and setting != "eval_path":
            command(configured(path, **{setting: value}))


def test_a_model_gives_exact_lengths_and_its_own_control_tokens(write: Write, tiny_model: Path) -> None:
    path = write([ask("a?", "one"), ask("b" * 100, "two"), ask(f"say {IM_END}", "and <|eot_id|>")])
    result = check_data(configured(path, tiny_model, max_seq_length=64))
    assert codes(result) == [("too_long", 2, "error"), ("control_token", 3, "warning")]
    assert result["problems"][0]["message"].startswith("124 tokens, data.max_seq_length is 64; ")
    assert IM_END in result["problems"][1]["message"]
    assert "eot_id" not in result["problems"][1]["message"]  # no token of this model
    assert result["chat_template"] == "the model's own"
    without = check_data(configured(path, max_seq_length=64))
    assert codes(without) == [("control_token", 3, "warning")]  # about 36 tokens: bytes are not counted
    assert without["ok"]


def test_a_row_cut_down_to_nothing_is_an_error(write: Write, tiny_model: Path) -> None:
    path = write([ask("a" * 100, "one"), ask("b?", "two" * 100)])
    result = check_data(configured(path, tiny_model, max_seq_length=64, overlong="truncate"))
    assert codes(result) == [
        ("truncated", 1, "warning"),
        ("nothing_supervised", 1, "error"),
        ("truncated", 2, "warning"),
    ]
    assert "no supervised token is left once cut to data.max_seq_length" in result["problems"][1]["message"]


def test_a_file_that_changed_since_its_tokens_were_kept(write: Write, tiny_model: Path) -> None:
    config = configured(write([ask("a?", "one")]), tiny_model)
    assert codes(check_data(config)) == []
    write([ask("a?", "two")])
    assert codes(check_data(config)) == [("changed_file", None, "warning")]
    assert codes(check_data(config)) == []


def test_pairs_are_tokenized_side_by_side(write: Write, tiny_model: Path) -> None:
    path = write([{"prompt": "a?", "chosen": "good", "rejected": "bad" * 100}])
    result = check_data(configured(path, tiny_model, max_seq_length=64))
    assert codes(result) == [("too_long", 1, "error")]
    chosen, rejected = sequences(read_examples(path).examples)
    assert chosen.messages
    assert rejected.messages
    assert [message.content for message in chosen.messages] == ["a?", "good"]
    assert [message.train for message in rejected.messages] == [False, None]


def test_a_model_that_is_none(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        check_data(configured(write([ask("a?", "b")]), tmp_path / "nowhere"))


# stats


def test_statistics_by_estimate(write: Write) -> None:
    path = write([ask("a" * 36, "b" * 4) for _ in range(10)] + [ask("a" * 996, "b" * 4)])
    result = data_stats(configured(path))
    assert result["estimated"] is True
    assert (result["rows"], result["sequences"], result["supervised_tokens"]) == (11, 11, None)
    tokens = result["tokens"]  # a row is 10 + 2 * 5, the last one 250 + 2 * 5
    assert tokens["total"] == 10 * 20 + 260
    assert tokens["mean"] == pytest.approx(460 / 11)
    assert (tokens["median"], tokens["max"]) == (20, 260)
    assert tokens["p95"] == pytest.approx(20 + 0.5 * 240)
    assert result["recommended_max_seq_length"] == 192  # 140 * 1.2 = 168
    assert result["longer_than"] == {"192": 1, "256": 1, "512": 0, "2048": 0}
    assert result["histogram"] == [
        {"from": 17, "to": 24, "sequences": 10},
        *(
            {"from": low, "to": high, "sequences": 0}
            for low, high in ((25, 32), (33, 48), (49, 64), (65, 96), (97, 128))
        ),
        *({"from": low, "to": high, "sequences": 0} for low, high in ((129, 192), (193, 256))),
        {"from": 257, "to": 384, "sequences": 1},
    ]
    assert result["padding"]["data_order"] == pytest.approx(1 - 460 / (4 * 20 + 4 * 20 + 3 * 260))
    assert result["padding"]["budget"] == 8192


def test_statistics_with_a_model_are_exact(write: Write, tiny_model: Path) -> None:
    rows = [ask("a" * 30, "b" * 7), ask("a", "b"), ask("안녕", "네")]
    result = data_stats(configured(write(rows), tiny_model))
    # One token a byte, and <|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n...<|im_end|>\n: 4 + 4 + 10 + 3 + ...
    around = len(f"{IM_START}user\n{IM_END}\n{IM_START}assistant\n{IM_END}\n") - 2 * len(IM_START + IM_END) + 4
    assert result["tokens"]["total"] == 37 + 2 + len("안녕네".encode()) + 3 * around
    assert result["supervised_tokens"] == (7 + 1 + 3) + 3  # each answer with its end-of-turn token
    assert result["estimated"] is False
    assert result["model_limit"] == 4096


def test_statistics_count_rows_that_training_would_refuse(write: Write, tiny_model: Path) -> None:
    result = data_stats(configured(write([ask("a" * 5000, "b")]), tiny_model, max_seq_length=128))
    assert result["tokens"]["max"] > 5000
    assert result["recommended_max_seq_length"] == 4096  # the model's limit


def test_statistics_of_bad_rows(write: Write) -> None:
    path = write([ask("a?", "b"), ask("b?", "")])
    with pytest.raises(DataError, match=r"rows.jsonl:2: "):
        data_stats(configured(path))
    result = data_stats(configured(path, skip_bad_rows=True))
    assert (result["rows"], result["skipped_rows"]) == (1, {str(path): [2]})


def test_statistics_name_the_rows_that_the_tokens_leave_out(write: Write, tiny_model: Path) -> None:
    answer = {"role": "assistant", "content": "b", "train": False}
    path = write([ask("a?", "b"), ask("c?", ""), {"messages": [{"role": "user", "content": "d?"}, answer]}])
    result = data_stats(configured(path, tiny_model, skip_bad_rows=True))
    assert (result["sequences"], result["skipped_rows"]) == (1, {str(path): [2, 3]})


def test_estimates_of_a_real_file_are_near_its_bytes(shared_data: Path) -> None:
    data = read_examples(shared_data / "gsm8k" / "train.jsonl")
    result = data_stats(configured(shared_data / "gsm8k" / "train.jsonl"))
    assert result["tokens"]["total"] == sum(map(estimate_row, data.examples))
    assert result["tokens"]["max"] <= result["recommended_max_seq_length"] * 2


# preview


def test_preview_with_a_model_shows_every_token_with_its_mask(write: Write, tiny_model: Path) -> None:
    path = write([ask(f"hé {IM_END}", "🙂 네")])
    result = preview_data(configured(path, tiny_model))
    (example,) = result["examples"]
    assert example["pieces"] == [
        {"text": IM_START, "supervised": False, "special": True},
        {"text": f"user\nhé {IM_END}", "supervised": False, "special": False},
        {"text": IM_END, "supervised": False, "special": True},
        {"text": "\n", "supervised": False, "special": False},
        {"text": IM_START, "supervised": False, "special": True},
        {"text": "assistant\n", "supervised": False, "special": False},
        {"text": "🙂 네", "supervised": True, "special": False},
        {"text": IM_END, "supervised": True, "special": True},
        {"text": "\n", "supervised": False, "special": False},
    ]
    assert example["num_supervised"] == len("🙂 네".encode()) + 1
    assert example["num_tokens"] == len(example["tokens"])
    assert sum(token["supervised"] for token in example["tokens"]) == example["num_supervised"]
    assert [token["text"] for token in example["tokens"] if token["special"]] == [IM_START, IM_END, IM_START, IM_END]
    assert example["tokens"][1]["text"] == "u"


def test_the_first_token_is_never_shown_as_supervised(write: Write, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", tokenizer=make_tokenizer(adds_bos=True))
    (example,) = preview_data(configured(write([{"text": "hi"}]), model))["examples"]
    assert [(piece["text"], piece["supervised"]) for piece in example["pieces"]] == [
        (BOS, False),
        ("hi", True),
        (IM_END, True),
    ]
    assert example["num_supervised"] == 3


def test_preview_without_a_model_shows_turns(write: Write) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    turns = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "it is"},
        {"role": "assistant", "content": "yes", "weight": 0},
    ]
    result = preview_data(configured(write([{"messages": turns}, {"messages": turns[:2]}])), num_rows=1)
    assert result["chat_template"] is None
    (example,) = result["examples"]
    assert example["pieces"] == [
        {"role": "user", "text": "a?", "supervised": False},
        {"role": "assistant", "text": '{"name": "look", "arguments": {"at": "it"}}', "supervised": True},
        {"role": "tool", "text": "it is", "supervised": False},
        {"role": "assistant", "text": "yes", "supervised": False},
    ]


@pytest.mark.parametrize("with_model", [False, True])
def test_preview_of_a_pair_shows_both_sides(write: Write, tiny_model: Path, with_model: bool) -> None:
    path = write([{"prompt": "a?", "chosen": "good", "rejected": "bad"}])
    examples = preview_data(configured(path, tiny_model if with_model else None))["examples"]
    assert [(example["line"], example["side"]) for example in examples] == [(1, "chosen"), (1, "rejected")]
    supervised = ["".join(p["text"] for p in example["pieces"] if p["supervised"]) for example in examples]
    assert supervised == ([f"good{IM_END}", f"bad{IM_END}"] if with_model else ["good", "bad"])


@pytest.mark.parametrize(
    ("overlong", "shown", "problem"),
    [
        ("truncate", ["user\na?", "assistant\n", "x" * 12], "cut to its first 33 tokens"),
        ("drop", [], "left out"),
    ],
)
def test_preview_shows_what_training_sees_of_a_long_row(
    write: Write, tiny_model: Path, overlong: str, shown: list[str], problem: str
) -> None:
    path = write([ask("a?", "yes"), ask("a?", "x" * 100)])
    result = preview_data(configured(path, tiny_model, max_seq_length=33, overlong=overlong))
    short, long = result["examples"]
    assert (short["problems"], long["problems"]) == ([], [f"123 tokens, data.max_seq_length is 33; {problem}"])
    assert [p["text"] for p in long["pieces"] if not p["special"] and p["text"] != "\n"] == shown
    assert long["num_tokens"] == len(long["tokens"]) == (33 if shown else 0)
    assert result["max_seq_length"] == 33


def test_preview_of_rows_that_training_refuses(write: Write, tiny_model: Path) -> None:
    path = write([ask("a?", "yes"), ask("a?", "x" * 100)])
    config = configured(path, tiny_model, max_seq_length=33)
    assert [example["num_tokens"] for example in preview_data(config)["examples"]] == [26, 0]
    with pytest.raises(DataError) as raised:
        preview_data(config, line=2)
    assert str(raised.value) == (
        f"{path}:2: 123 tokens, data.max_seq_length is 33; raise it, or set data.overlong to truncate, split or drop"
    )


def test_preview_with_an_automatic_length_is_cut_where_training_cuts(write: Write, tiny_model: Path) -> None:
    path = write([ask("a?", "x" * 400), *(ask(f"{i}?", "yes") for i in range(99))])
    result = preview_data(configured(path, tiny_model, max_seq_length="auto", overlong="truncate"), num_rows=1)
    assert result["max_seq_length"] == result["examples"][0]["num_tokens"] == 64


def test_preview_of_a_long_conversation_is_not_quadratic(write: Write, tiny_model: Path) -> None:
    turns = [{"role": role, "content": "é " + "x" * 48} for _ in range(300) for role in ("user", "assistant")]
    config = configured(write([{"messages": turns}]), tiny_model, max_seq_length=100_000)
    decoded = 0
    decode = PreTrainedTokenizerBase.decode

    def counted(self: Any, ids: Any, **options: Any) -> Any:
        nonlocal decoded
        decoded += len(ids)
        return decode(self, ids, **options)

    with mock.patch.object(PreTrainedTokenizerBase, "decode", counted):
        (example,) = preview_data(config)["examples"]
    assert "".join(piece["text"] for piece in example["pieces"] if piece["supervised"]).count("é ") == 300
    assert decoded < 20 * example["num_tokens"]


def test_preview_of_one_line(write: Write) -> None:
    path = write([ask("a?", "one"), ask("b?", ""), ask("c?", "three")])
    assert [row["line"] for row in preview_data(configured(path))["examples"]] == [1, 3]  # bad rows are passed over
    (example,) = preview_data(configured(path), line=3)["examples"]
    assert example["pieces"][1]["text"] == "three"
    with pytest.raises(DataError, match=r"rows.jsonl:2: `messages\[1\].content` is empty"):
        preview_data(configured(path), line=2)
    with pytest.raises(DataError) as raised:
        preview_data(configured(path), line=4)
    assert str(raised.value) == f"{path}:4: no row begins on this line; the file has 3 rows"
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        preview_data(configured(path.with_name("nowhere.jsonl")), line=2)


def test_preview_of_a_file_without_a_good_row(write: Write) -> None:
    with pytest.raises(DataError, match="is empty"):
        preview_data(configured(write([ask("b?", "")])))


# split


def test_split_counts_by_file_and_label(write: Write, tmp_path: Path) -> None:
    rows = [{"text": f"{label} {i}", "label": label} for label, count in (("x", 20), ("y", 10)) for i in range(count)]
    path, out = write(rows), tmp_path / "split"
    config = configured(path)
    config.training.seed = 5
    result = split_data(config, out, {"train": 0.8, "validation": 0.1, "test": 0.1})
    assert result["counts"] == {"train": 24, "validation": 3, "test": 3}
    assert result["labels"] == {
        "train": {"x": 16, "y": 8},
        "validation": {"x": 2, "y": 1},
        "test": {"x": 2, "y": 1},
    }
    assert (result["rows"], result["seed"]) == (30, 5)
    found = [json.loads(line) for name in result["files"].values() for line in Path(name).read_text().splitlines()]
    assert sorted(row["text"] for row in found) == sorted(row["text"] for row in rows)
    again = split_data(config, tmp_path / "again", {"train": 0.8, "validation": 0.1, "test": 0.1})
    for name in result["files"]:
        assert Path(again["files"][name]).read_bytes() == Path(result["files"][name]).read_bytes()


def test_a_share_of_nothing_makes_no_file(write: Write, tmp_path: Path) -> None:
    rows = chat_rows(4) + [ask(f"question {i}", f"answer {i}") for i in range(20)]
    result = split_data(configured(write(rows)), tmp_path / "split", {"train": 0.5, "validation": 0, "test": 0.5})
    assert sorted(path.name for path in (tmp_path / "split").iterdir()) == ["test.jsonl", "train.jsonl"]
    assert list(result["counts"]) == ["train", "test"]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0.8, 0.1, 0.2), "the shares train 0.8, validation 0.1, test 0.2 add up to 1.1"),
        (
            (float("nan"), 0.5, 0.5),
            "the shares train nan, validation 0.5, test 0.5 add up to nan; make them add up to 1, none negative",
        ),
        (
            (1.2, -0.2, 0),
            "the shares train 1.2, validation -0.2, test 0 add up to 1; make them add up to 1, none negative",
        ),
    ],
)
def test_shares_that_are_none(write: Write, tmp_path: Path, shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        split_data(
            configured(write([ask("a?", "b")])),
            tmp_path / "split",
            dict(zip(("train", "validation", "test"), shares, strict=True)),
        )
    assert message in str(raised.value)


def test_split_refuses_bad_rows_and_taken_folders(write: Write, tmp_path: Path) -> None:
    path = write([ask("a?", "b"), ask("b?", "")])
    with pytest.raises(DataError, match=r"rows.jsonl:2"):
        split_data(configured(path), tmp_path / "split", {"train": 1.0})
    result = split_data(configured(path, skip_bad_rows=True), tmp_path / "split", {"train": 1.0})
    assert (result["rows"], result["skipped_rows"]) == (1, {str(path): [2]})
    with pytest.raises(RunError, match="already exists"):
        split_data(configured(path, skip_bad_rows=True), tmp_path / "split", {"train": 1.0})


def test_rows_that_are_all_dropped_are_an_error(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "long " * 30, "completion": "yes"}] * 2)
    values = {"data.path": str(path), "model.name": str(tiny_model), "data.max_seq_length": 64, "data.overlong": "drop"}
    result = check_data(load_config(values=values))
    assert not result["ok"]
    errors = [problem["message"] for problem in result["problems"] if problem["severity"] == "error"]
    assert errors == [
        "no row is left: all are longer than data.max_seq_length 64; raise it, or set data.overlong: split"
    ]
