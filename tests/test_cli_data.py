"""`tunesmith data ...` as people run it: what is printed, what --json holds, and the exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from command_line import Result, tunesmith
from tiny import IM_END, IM_START, write_jsonl
from tunesmith.types import TrainResult


def ask(question: str, answer: Any, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve good rows."""
    return write_jsonl(tmp_path / "rows.jsonl", [ask(f"question {i}?", f"answer {i}") for i in range(12)])


@pytest.fixture
def bad_rows(tmp_path: Path) -> Path:
    """Lines 2 and 4 of 4 have an empty answer, line 3 repeats line 1."""
    return write_jsonl(tmp_path / "bad.jsonl", [ask("a?", "b"), ask("b?", ""), ask("a?", "b"), ask("c?", " ")])


def printed(result: Result) -> dict[str, Any]:
    value = json.loads(result.out)
    assert isinstance(value, dict)
    return value


# check


def test_check_of_a_good_file(rows: Path) -> None:
    result = tunesmith("data", "check", rows)
    assert result.code == 0
    assert result.out == (
        f"{rows}: JSON Lines, form messages, 12 rows\n\n"
        f"no errors, 0 warnings; go on with: tunesmith train --model NAME --data {rows}\n"
    )


def test_check_prints_problems_by_check_and_what_to_do(bad_rows: Path) -> None:
    result = tunesmith("data", "check", bad_rows)
    assert result.code == 2
    lines = result.out.splitlines()
    assert lines[0] == f"{bad_rows}: JSON Lines, form messages, 4 rows"
    assert lines[2].startswith("error: ")
    assert lines[2].endswith(", 2 found")
    assert [line.split(":")[0].strip() for line in lines[3:5]] == ["line 2", "line 4"]
    assert "`messages[1].content` is empty" in lines[3]
    assert "warning: duplicate_row, 1 found" in lines
    assert "  line 3: the same as line 1 (1 of 2 rows repeat an earlier one)" in lines
    assert "  -> remove the repetitions, or keep them if these rows are to count more" in lines
    assert lines[-1] == ("2 errors, 1 warning: mend what is listed above, or leave those rows out with --skip-bad-rows")


def test_check_leaves_bad_rows_out_when_told_to(bad_rows: Path) -> None:
    result = tunesmith("data", "check", bad_rows, "--skip-bad-rows")
    assert result.code == 0
    assert result.out.splitlines()[-2:] == [
        f"rows left out: 2 of {bad_rows} (lines 2, 4); 1 warning",
        f"go on with: tunesmith train --model NAME --data {bad_rows} --skip-bad-rows",
    ]
    assert printed(tunesmith("data", "check", bad_rows, "--skip-bad-rows", "--json"))["skipped_rows"] == {
        str(bad_rows): [2, 4]
    }


def test_check_json(bad_rows: Path) -> None:
    result = tunesmith("data", "check", bad_rows, "--json")
    assert result.code == 2
    value = printed(result)
    assert (value["ok"], value["rows"], value["bad_rows"]) == (False, 4, 2)
    assert (value["container"], value["form"]) == ("JSON Lines", "messages")
    assert [(p["line"], p["severity"]) for p in value["problems"]] == [(2, "error"), (3, "warning"), (4, "error")]
    assert value["problems"][1] == {
        "line": 3,
        "severity": "warning",
        "code": "duplicate_row",
        "message": "the same as line 1 (1 of 2 rows repeat an earlier one); "
        "remove the repetitions, or keep them if these rows are to count more",
        "found": "the same as line 1 (1 of 2 rows repeat an earlier one)",
        "fix": "remove the repetitions, or keep them if these rows are to count more",
        "field": None,
        "file": str(bad_rows),
    }


def test_check_shows_the_first_problems_of_many(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ask("a?", "b"), *[ask("b?", "")] * 30, *[ask("a?", "b")] * 9])
    lines = tunesmith("data", "check", path).out.splitlines()
    assert sum("is empty" in line for line in lines) == 20
    assert "  and 10 more (lines 22-31)" in lines
    assert sum("the same as line 1" in line for line in lines) == 5
    assert "  and 4 more (lines 37-40)" in lines
    assert len(printed(tunesmith("data", "check", path, "--json"))["problems"]) == 39


def test_check_of_nothing(tmp_path: Path) -> None:
    result = tunesmith("data", "check", tmp_path / "no.jsonl")
    assert result.code == 2
    assert "  no such file" in result.out
    assert result.out.endswith("1 error, 0 warnings: mend what is listed above\n")


def test_check_names_the_file_of_held_out_rows(rows: Path, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [ask("other?", "yes"), ask("question 3?", "answer 3")])
    result = tunesmith("data", "check", rows, "--eval-data", held)
    assert result.code == 0
    assert f"held out: {held}, 2 rows" in result.out
    assert f"  {held} line 2: this held-out row is also a training row, {rows}:4" in result.out


def test_check_with_a_model(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ask("a?", "b"), ask(f"say {IM_END}", "c" * 100)])
    result = tunesmith("data", "check", path, "--model", tiny_model, "--max-seq-length", "64")
    assert result.code == 2
    assert "  line 2: 135 tokens, data.max_seq_length is 64" in result.out
    assert "error: too_long, 1 found" in result.out
    assert f"{IM_END!r}, control token of this model" in result.out
    result = tunesmith("data", "check", path, "--model", tiny_model, "--max-seq-length", "auto")
    assert (result.code, "too_long" in result.out) == (0, False)
    assert f"tunesmith train --model {tiny_model} --data {path}" in result.out


def test_the_command_to_go_on_with_reads_the_data_as_the_check_did(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "my rows.jsonl", [{"ask": f"{i} a?", "tell": f"b {i}"} for i in range(3)])
    held = write_jsonl(tmp_path / "held.jsonl", [{"ask": "other?", "tell": "d"}, {"ask": "bad", "tell": 3}])
    options = ("--model", tiny_model, "--eval-data", held, "--format", "qa", "--skip-bad-rows", "--template", "alpaca")
    mapped = ("--column", "question=ask", "--column", "answer=tell", "--max-seq-length", "512")
    result = tunesmith("data", "check", path, *options, *mapped, "--set", "data.train_on=last")
    assert result.code == 0
    command = result.out.splitlines()[-1].removeprefix("go on with: ")
    assert command == (
        f"tunesmith train --model {tiny_model} --data '{path}' --eval-data {held} --set data.format=qa "
        """--set 'data.columns={"question": "ask", "answer": "tell"}' --set data.chat_template=alpaca """
        "--set data.max_seq_length=512 --skip-bad-rows --set data.train_on=last"
    )
    trained = []

    def train(config: Any, *_: Any, **__: Any) -> TrainResult:
        trained.append(config)
        raise KeyboardInterrupt

    with mock.patch("tunesmith.api.train", train):
        assert tunesmith(*shlex.split(command)[1:]).code == 130
    assert trained[0].data.columns == {"question": "ask", "answer": "tell"}
    assert (trained[0].data.max_seq_length, trained[0].data.skip_bad_rows) == (512, True)


def test_preferences_are_sent_to_training_on_preferences(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a?", "chosen": "good", "rejected": "bad"}])
    result = tunesmith("data", "check", path)
    assert result.code == 0
    command = f"tunesmith train --model NAME --data {path} --objective dpo"
    assert result.out.splitlines()[-1] == f"no errors, 0 warnings; go on with: {command}"
    assert printed(tunesmith("data", "check", path, "--json"))["trainable"] is True
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"prompt": "a?", "completion": "good"}])
    result = tunesmith("data", "check", path, "--eval-data", answers)
    assert result.out.splitlines()[-1].endswith(
        "takes rows of both these kinds: the evaluation data is of another form"
    )
    assert printed(tunesmith("data", "check", path, "--eval-data", answers, "--json"))["trainable"] is False


def test_skipping_rows_is_offered_where_it_helps(rows: Path, tmp_path: Path) -> None:
    offer = ", or leave those rows out with --skip-bad-rows"
    one_line = tmp_path / "rows.json"
    one_line.write_text(json.dumps([ask("a?", ""), ask("b?", "")]))
    for arguments in ((one_line,), (rows, "--eval-data", tmp_path / "no.jsonl"), (rows, "--column", "messages=none")):
        result = tunesmith("data", "check", *arguments)
        assert (result.code, offer in result.out) == (2, False), arguments
        assert tunesmith("data", "check", *arguments, "--skip-bad-rows").code == 2
    one_line.write_text(json.dumps([ask("a?", ""), ask("b?", "yes")]))
    assert offer in tunesmith("data", "check", one_line).out
    assert tunesmith("data", "check", one_line, "--skip-bad-rows").code == 0


def test_columns_format_and_other_settings(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"ask": "a?", "tell": "b", "rating": 3}, {"ask": "c?", "tell": "d" * 2000}]
    )
    assert tunesmith("data", "check", path).code == 2
    mapped = ("--format", "prompt", "--column", "prompt=ask", "--column", "completion=tell")
    value = printed(tunesmith("data", "check", path, *mapped, "--set", "data.max_seq_length=128", "--json"))
    assert value["form"] == "prompt"
    assert [(p["code"], p["line"]) for p in value["problems"]] == [("ignored_column", None), ("long_row", 2)]
    assert value["problems"][0]["field"] == "rating"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--column", "ask"), "--column ask: expected FIELD=COLUMN, e.g. --column output=reply"),
        (("--column", "=ask"), "--column =ask: expected FIELD=COLUMN, e.g. --column output=reply"),
        (
            ("--column", "output=a", "--column", "output=b"),
            "--column output=b: `output` was named before (--column output=a)",
        ),
        (("--template", "nowhere"), "data.chat_template has no effect without a model; pass --model, or remove it"),
        (("--set", "data.max_rows=5"), "data.max_rows has no effect on this command, which reads every row; remove it"),
        (("--max-seq-length", "long"), "--max-seq-length long: expected a number of tokens, or auto"),
        (
            ("--set", "data.overlog=drop"),
            "--set data.overlog=drop: unknown key `data.overlog`; did you mean `data.overlong`?",
        ),
    ],
)
def test_wrong_options(rows: Path, arguments: tuple[str, ...], problem: str) -> None:
    result = tunesmith("data", "check", rows, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.problems == [f"tunesmith: {problem}"]


def test_a_template_needs_no_model_until_it_is_used(rows: Path, tiny_model: Path) -> None:
    result = tunesmith("data", "check", rows, "--model", tiny_model, "--template", "nowhere")
    assert result.code == 2
    assert "data.chat_template is 'nowhere'" in result.err
    value = printed(tunesmith("data", "check", rows, "--model", tiny_model, "--template", "alpaca", "--json"))
    assert value["chat_template"] == "alpaca"


def test_what_is_printed_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ask(f"{i}", "\x1b[31myes" if i % 12 else "no") for i in range(240)])
    out = tunesmith("data", "check", path).out
    assert "\x1b" not in out
    assert "\\x1b[31myes" in out
    assert "\x1b" not in tunesmith("data", "preview", path, "--line", "2").out


# stats


def test_stats_without_a_model(rows: Path) -> None:
    result = tunesmith("data", "stats", rows)
    assert result.code == 0
    assert "tokens are estimated from characters; --model NAME counts them exactly" in result.out
    assert "       13 - 16               12 ########################################" in result.out.splitlines()
    assert "│           256 │           0 │  0.0% │".replace(" ", "") in result.out.replace(" ", "")
    assert result.out.endswith("recommended: data.max_seq_length=64, about p95 x 1.2\n")
    # 12 rows of 15 or 16 tokens hardly need padding, and fill little of one pack.
    lines = result.out.splitlines()
    assert "empty slots:   1.1% padded, 4 rows at a time as they stand" in lines
    assert "               1.1% padded, sorted by length within a step of 16 rows" in lines
    assert "              97.8% packed into 8,192 tokens (data.packing, training.micro_batch_tokens)" in lines


def test_stats_with_a_model(rows: Path, tiny_model: Path) -> None:
    result = tunesmith("data", "stats", rows, "--model", tiny_model)
    assert "chat template: the model's own; 22.7% of the tokens are supervised" in result.out
    assert "recommended: data.max_seq_length=64, p95 x 1.2 (the model's limit is 4,096)" in result.out


def test_stats_json(rows: Path) -> None:
    value = printed(tunesmith("data", "stats", rows, "--json"))
    assert value["rows"] == 12
    assert set(value["tokens"]) == {"mean", "median", "p95", "p99", "max", "total"}
    assert value["tokens"]["max"] == 16  # 12 and 9 characters are 5.25 tokens, and 5 for each turn
    assert value["recommended_max_seq_length"] == 64


def test_stats_of_bad_rows(bad_rows: Path) -> None:
    result = tunesmith("data", "stats", bad_rows)
    assert result.code == 2
    assert [problem.split(": ")[1] for problem in result.problems] == [f"{bad_rows}:2", f"{bad_rows}:4"]
    result = tunesmith("data", "stats", bad_rows, "--skip-bad-rows")
    assert result.code == 0
    assert result.out.splitlines()[1] == f"rows left out: 2 of {bad_rows} (lines 2, 4)"
    assert printed(tunesmith("data", "stats", bad_rows, "--skip-bad-rows", "--json"))["skipped_rows"] == {
        str(bad_rows): [2, 4]
    }


# preview


def test_preview_without_colour(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ask("a?\nb?", f"yes {IM_START}")])
    result = tunesmith("data", "preview", path, "--model", tiny_model)
    assert result.code == 0
    assert result.out.splitlines() == [
        f"{path}: JSON Lines, form messages, 1 row",
        "chat template: the model's own",
        "supervised (assistant): ⟦...⟧; a new line: ↵; a special token: «...»",
        "",
        "line 1: 42 tokens, 17 supervised",
        f"«{IM_START}»user↵",
        "a?↵",
        f"b?«{IM_END}»↵",
        f"«{IM_START}»assistant↵",
        f"⟦yes {IM_START}«{IM_END}»⟧↵",
    ]


def test_preview_in_colour(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ask("a?", "yes")])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = tunesmith("data", "preview", path, "--model", tiny_model).out
    assert "\x1b[32myes\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in out
    assert "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    out = tunesmith("data", "preview", path, "--model", tiny_model).out
    assert "⟦yes" in out
    assert "\x1b[32m" not in out


def test_preview_of_a_row_that_is_cut(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ask("a?", "x" * 100)])
    cut = ("--model", tiny_model, "--max-seq-length", "33", "--set", "data.overlong=truncate")
    assert (
        tunesmith("data", "preview", path, *cut).out.splitlines()[-5:]
        == [
            "line 1: 33 tokens, 12 supervised",
            "(123 tokens, data.max_seq_length is 33; cut to its first 33 tokens)",
            f"«{IM_START}»user↵",
            f"a?«{IM_END}»↵",
            f"«{IM_START}»assistant↵",
            "⟦xxxxxxxxxxxx⟧",
        ][-5:]
    )
    result = tunesmith("data", "preview", path, "--max-seq-length", "33")
    assert result.problems == [
        "tunesmith: data.max_seq_length has no effect without a model; pass --model, or remove it"
    ]


def test_preview_without_a_model(rows: Path) -> None:
    lines = tunesmith("data", "preview", rows, "--rows", "1").out.splitlines()
    assert lines[1] == "before the chat template (--model NAME applies it)"
    assert lines[-3:] == ["line 1: about 15 tokens", "[user] question 0?", "[assistant] ⟦answer 0⟧"]
    assert "line 3:" in tunesmith("data", "preview", rows, "--line", "3").out


def test_preview_of_a_pair(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a?", "chosen": "good", "rejected": "bad"}])
    lines = tunesmith("data", "preview", path).out.splitlines()
    assert [line for line in lines if line.startswith("line ")] == [
        "line 1, chosen: about 12 tokens",
        "line 1, rejected: about 12 tokens",
    ]


def test_preview_json(rows: Path, tiny_model: Path) -> None:
    value = printed(tunesmith("data", "preview", rows, "--model", tiny_model, "--rows", "2", "--json"))
    assert [example["line"] for example in value["examples"]] == [1, 2]
    tokens = value["examples"][0]["tokens"]
    assert "".join(token["text"] for token in tokens if token["supervised"]) == f"answer 0{IM_END}"
    assert set(tokens[0]) == {"id", "text", "supervised", "special"}


def test_preview_of_a_line_that_is_none(rows: Path) -> None:
    result = tunesmith("data", "preview", rows, "--line", "13")
    assert (result.code, result.problems) == (
        2,
        [f"tunesmith: {rows}:13: no row begins on this line; the file has 12 rows"],
    )


# split


def test_split(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "split"
    result = tunesmith("data", "split", rows, "--out", out, "--train", "0.5", "--validation", "0.25", "--test", "0.25")
    assert result.code == 0
    assert [line.split() for line in result.out.splitlines() if "all rows" in line] == [
        ["│", "all", "rows", "│", "6", "│", "3", "│", "3", "│"]
    ]
    assert "left out" not in result.out
    assert result.out.splitlines()[-3:] == [str(out / f"{name}.jsonl") for name in ("train", "validation", "test")]
    lines = [line for path in sorted(out.iterdir()) for line in path.read_text().splitlines()]
    assert sorted(lines) == sorted(rows.read_text().splitlines())
    again = tunesmith("data", "split", rows, "--out", out)
    assert (again.code, again.problems) == (
        2,
        [f"tunesmith: {out}: already exists; choose another --out, or remove it"],
    )


def test_split_json_and_seed(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": f"{label}{i}", "label": label} for label in "ab" for i in range(20)]
    )

    def split(name: str, seed: str) -> dict[str, Any]:
        return printed(tunesmith("data", "split", path, "--out", tmp_path / name, "--seed", seed, "--json"))

    value = split("one", "1")
    assert value["counts"] == {"train": 32, "validation": 4, "test": 4}
    assert value["labels"]["test"] == {"a": 2, "b": 2}
    contents = {name: (tmp_path / name / "test.jsonl").read_text() for name in ("one",)}
    split("two", "2")
    split("three", "1")
    assert (tmp_path / "two" / "test.jsonl").read_text() != contents["one"]
    assert (tmp_path / "three" / "test.jsonl").read_text() == contents["one"]


def test_split_says_which_rows_it_left_out(bad_rows: Path, tmp_path: Path) -> None:
    shares = ("--train", "1", "--validation", "0", "--test", "0", "--skip-bad-rows")
    result = tunesmith("data", "split", bad_rows, "--out", tmp_path / "one", *shares)
    assert result.out.splitlines()[0] == f"rows left out: 2 of {bad_rows} (lines 2, 4)"
    value = printed(tunesmith("data", "split", bad_rows, "--out", tmp_path / "two", *shares, "--json"))
    assert value["skipped_rows"] == {str(bad_rows): [2, 4]}


def test_split_with_wrong_shares(rows: Path, tmp_path: Path) -> None:
    result = tunesmith("data", "split", rows, "--out", tmp_path / "split", "--test", "0.5")
    assert result.problems == [
        "tunesmith: the shares train 0.8, validation 0.1, test 0.5 add up to 1.4; make them add up to 1, none negative"
    ]
    assert not (tmp_path / "split").exists()


# output that nobody reads to its end


@pytest.mark.parametrize("command", [("check",), ("preview", "--rows", "400"), ("stats", "--json"), ("stats",)])
def test_output_closed_early_is_no_error(tmp_path: Path, command: tuple[str, ...]) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [ask(f"q {i}?", "x" * 200) for i in range(400)] + [ask("q 1?", "b")] * 9
    )
    name, *options = command
    reader, writer = os.pipe()
    os.close(reader)  # `| head` that is gone already
    words = [sys.executable, "-m", "tunesmith", "data", name, str(path), *options]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


# the malformed files that are accepted with a warning


@pytest.mark.parametrize(
    ("name", "code", "lines", "says"),
    [
        ("s15_duplicated_rows", "duplicate_row", [17, 18, 19, 20, 21], "5 of 22 rows repeat an earlier one"),
        ("s15_duplicated_rows", "near_duplicate_row", [22], "the same as line 10 but for case"),
        ("s16_huge_row", "long_row", [5], "about 257,165 tokens (an estimate)"),
        ("s17_special_token_injection", "control_token", [2, 4, 6], "it is encoded as plain text"),
    ],
)
def test_malformed_files_that_are_warned_of(
    shared_data: Path, name: str, code: str, lines: list[int], says: str
) -> None:
    path = shared_data / "malformed" / f"{name}.jsonl"
    result = tunesmith("data", "check", path, "--json")
    assert result.code == 0
    value = printed(result)
    assert value["ok"]
    problems = [problem for problem in value["problems"] if problem["code"] == code]
    assert [problem["line"] for problem in problems] == lines
    assert {problem["severity"] for problem in problems} == {"warning"}
    assert all(says in problem["message"] for problem in problems)
    assert f"warning: {code}, {len(lines)} found" in tunesmith("data", "check", path).out


@pytest.mark.parametrize(
    ("overlong", "code", "says"),
    [
        ("error", 2, "1017848 tokens, data.max_seq_length is 2048"),
        ("truncate", 2, "no supervised token is left once cut"),  # the prompt alone is too long: not counted as trained
        ("drop", 0, "left out"),
    ],
)
def test_the_huge_row_with_a_model(shared_data: Path, tiny_model: Path, overlong: str, code: int, says: str) -> None:
    path = shared_data / "malformed" / "s16_huge_row.jsonl"
    result = tunesmith("data", "check", path, "--model", tiny_model, "--set", f"data.overlong={overlong}")
    assert result.code == code
    assert "line 5: " in result.out
    assert says in result.out


# the guide


def test_the_commands_of_the_guide_run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", guide, flags=re.DOTALL) for line in block.splitlines()
    ]
    assert {command.split()[2] for command in commands} == {"check", "stats", "preview", "split"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(tiny_model)
    write_jsonl(tmp_path / "train.jsonl", [ask(f"question {i}?", f"answer {i}") for i in range(30)])
    write_jsonl(tmp_path / "held_out.jsonl", [ask("another?", "yes")])
    (tmp_path / "replies.csv").write_text("ask,reply\n" + "".join(f"q{i}?,a{i}\n" for i in range(30)))
    for command in commands:
        name, *arguments = shlex.split(command)
        result = tunesmith(*arguments)
        assert (name, result.code, result.problems) == ("tunesmith", 0, []), command


def test_the_guide_names_every_check() -> None:
    from tunesmith.data import checks, tokens

    guide = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    for module in (checks, tokens):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        names = set(re.findall(r'(?:Finding|_warning)\(\s*"(\w+)"', source))
        assert names
        for name in names:
            assert f"`{name}`" in guide, name


# train


def test_train_takes_skip_bad_rows(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def train(config: Any, *_: Any, **__: Any) -> TrainResult:
        seen.append(config.data.skip_bad_rows)
        raise KeyboardInterrupt

    monkeypatch.setattr("tunesmith.api.train", train)
    for arguments in ((), ("--skip-bad-rows",)):
        assert tunesmith("train", "--model", "m", "--data", rows, *arguments).code == 130
    assert seen == [False, True]
