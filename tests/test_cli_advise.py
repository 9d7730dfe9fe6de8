"""`tunesmith advise` as people run it: what is printed and asked, what --json holds, and the exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import Result, tunesmith
from tiny import chat_rows, write_jsonl
from tunesmith.cli.advise import money, print_advice
from tunesmith.config import load_config

HUB = "someone/some-model"
ALL = {
    "goal": "style",
    "knowledge_changes": "never",
    "metric": "yes",
    "latency": "no",
    "output_format": "free",
    "privacy": "no",
    "tasks": "one",
}


@pytest.fixture
def few(tmp_path: Path) -> Path:
    rows = [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(40)]
    return write_jsonl(tmp_path / "few.jsonl", rows)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    rows = [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(2000)]
    return write_jsonl(tmp_path / "many.jsonl", rows)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())


class Terminal(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


def advise(data: Path, *more: str | Path, **answers: str) -> Result:
    given = [word for key, value in answers.items() for word in ("--answers", f"{key}={value}")]
    return tunesmith("advise", "--data", data, "--model", HUB, *given, *more)


def printed(result: Result) -> dict[str, Any]:
    assert (result.code, result.problems) == (0, [])
    value = json.loads(result.out)
    assert isinstance(value, dict)
    return value


def test_dont_fine_tune_is_the_first_line(few: Path) -> None:
    result = advise(few, **ALL)
    assert result.code == 0
    assert result.out.splitlines()[:6] == [
        "Don't fine-tune yet: put examples into the prompt first.",
        "  - 40 rows: under about 500, training seldom beats a good prompt with 5 examples in it",
        "",
        "other ways:",
        "  - prompt: if instructions alone are good enough: each request is shorter",
        "  - fine-tuning: with 500 examples and more, or once the longer prompts cost more than training",
    ]
    assert "settings for 40 rows, about 630 tokens, if you fine-tune all the same:" in result.out
    assert "assumed" not in result.err


def test_fine_tune_and_how(many: Path) -> None:
    lines = advise(many, **ALL).out.splitlines()
    assert lines[0] == "Fine-tune."
    assert "settings for 2,000 rows, about 32,990 tokens:" in lines
    shown = {line.split()[0]: line.split()[1] for line in lines if line.startswith("  ") and "." in line.split()[0]}
    assert shown["adapter.r"] == "16"
    assert shown["optimizer.lr"] == "0.0002"
    assert shown["training.early_stopping.metric"] == "eval_loss"
    assert lines[-1] == "--out RUN.yaml writes them to a file that `tunesmith train` takes"


def test_json_is_one_object_with_the_settings_as_train_takes_them(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.yaml"
    value = printed(advise(many, "--out", out, "--json", **ALL))
    assert (value["decision"], value["assumed"], value["run_yaml"]) == ("fine_tune", {}, str(out))
    given = {"data.path": str(many), "model.name": HUB}
    assert load_config(out) == load_config(None, (), {**given, **value["settings"]})
    assert value["costs"] is None


def test_the_file_is_written_and_named(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.yaml"
    result = advise(few, "--out", out, **ALL)
    assert result.out.splitlines()[-1] == f"written to {out}; train with: tunesmith train {out}"
    again = advise(few, "--out", out, **ALL)
    assert again.code == 2
    assert again.problems == [
        f"tunesmith: {out}: exists already, and is not overwritten; choose another --out, or remove it"
    ]


def test_without_a_terminal_it_assumes_and_says_what(many: Path) -> None:
    result = advise(many, goal="style", metric="yes")
    assert result.err.splitlines()[-1] == (
        "not answered, so assumed: knowledge_changes=unknown, latency=unknown, output_format=unknown, privacy=unknown, "
        "tasks=unknown (--answers KEY=VALUE)"
    )
    value = printed(advise(many, "--json", goal="style", metric="yes"))
    assert value["assumed"] == dict.fromkeys(
        ("knowledge_changes", "latency", "output_format", "privacy", "tasks"), "unknown"
    )


def test_in_a_terminal_it_asks_what_was_not_answered(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("tone\nfacts\ndaily\n\n\n\n"))
    value = printed(advise(many, "--json", latency="no", tasks="one"))
    assert value["decision"] == "retrieval"
    assert value["answers"] == {
        "goal": "facts",
        "knowledge_changes": "daily",
        "metric": "unknown",
        "latency": "no",
        "output_format": "unknown",
        "privacy": "unknown",
        "tasks": "one",
    }
    assert list(value["assumed"]) == ["metric", "output_format", "privacy"]


def test_questions_show_what_is_allowed_and_what_the_data_suggests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = write_jsonl(
        tmp_path / "labelled.jsonl", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(600)]
    )
    monkeypatch.setattr(sys, "stdin", Terminal("tone\n\n" + 6 * "\n"))
    result = advise(labelled)
    question = (
        "What should get better? (facts, style, format, classification, skill, several, unknown) [classification]: "
    )
    assert result.err.count(question) == 2
    assert "expected one of facts, style, format, classification, skill, several, unknown\n" in result.err
    assert "Must answers come fast? (no, tight, unknown) [unknown]: " in result.err
    assert "not answered, so assumed: knowledge_changes=unknown" in result.err
    assert result.out.startswith("Fine-tune.\n")


def test_the_end_of_input_ends_the_questions(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("style\n"))
    result = advise(many)
    assert (result.code, result.out, result.problems) == (130, "", ["tunesmith: interrupted"])


def test_wrong_answers_are_refused(few: Path) -> None:
    result = advise(few, goal="tone", speed="fast")
    assert (result.code, result.out) == (2, "")
    assert result.problems == [
        "tunesmith: --answers goal=tone: expected one of facts, style, format, classification, skill, several, unknown",
        "tunesmith: --answers speed=fast: no such question; there are goal, knowledge_changes, metric, latency, "
        "output_format, privacy, tasks",
    ]


def test_data_with_errors_is_refused_as_data_check_does(tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}])
    result = advise(bad)
    assert (result.code, result.out) == (2, "")
    (problem,) = result.problems
    assert problem.startswith(f"tunesmith: {bad}:2: ")
    assert problem.removeprefix(f"tunesmith: {bad}:2: ") in tunesmith("data", "check", bad).out.replace("\n  -> ", "; ")


def test_columns_are_mapped_as_for_train(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"ask": f"q {i}", "reply": f"a {i}"} for i in range(30)])
    mapping = "data.columns={prompt: ask, completion: reply}"
    out = tmp_path / "run.yaml"
    assert advise(path, "--set", mapping, "--out", out).code == 0
    assert load_config(out).data.columns == {"prompt": "ask", "completion": "reply"}


def test_settings_that_it_decides_are_refused(few: Path) -> None:
    result = advise(few, "--set", "adapter.r=4")
    assert result.code == 2
    assert result.problems[0].startswith("tunesmith: adapter is what advise decides; remove it")


def test_a_model_folder_counts_its_own_tokens(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "bins.jsonl", chat_rows(600))
    value = printed(tunesmith("advise", "--data", rows, "--model", tiny_model, "--json", "--answers", "metric=yes"))
    assert value["data"]["estimated"] is False
    assert isinstance(value["settings"]["data.max_seq_length"], int)
    assert value["answers"]["goal"] == "classification"


def known(data: Path, model: str, *more: str | Path) -> Result:
    given = [word for key, value in ALL.items() for word in ("--answers", f"{key}={value}")]
    return tunesmith("advise", "--data", data, "--model", model, *given, *more)


@pytest.mark.parametrize(
    ("model", "written"),
    [
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Qwen2.5-Coder-7B", "Qwen/Qwen2.5-Coder-7B"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
    ],
)
def test_the_model_that_is_written_is_the_one_asked_for(many: Path, tmp_path: Path, model: str, written: str) -> None:
    out = tmp_path / "run.yaml"
    assert known(many, model, "--gpu", "L4", "--out", out).code == 0
    assert load_config(out).model.name == written


def test_a_card_that_does_not_train_the_model_is_the_first_line(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.yaml"
    result = known(many, "Llama-3.1-70B", "--gpu", "T4", "--price-per-hour", "1", "--out", out)
    lines = result.out.splitlines()
    assert result.code == 0
    peak = json.loads(known(many, "Llama-3.1-70B", "--gpu", "T4", "--json").out)["fits"]["peak_gb"]
    assert 36 < peak < 44
    first = f"Fine-tune; but Llama-3.1-70B does not train on a T4: QLoRA takes {peak:.1f} of 12.4 usable GB."
    assert lines[0] == first
    start = lines.index("what would train:")
    assert lines[start + 1 : start + 3] == [
        "  - a larger card: QLoRA of Llama-3.1-70B fits from RTX A6000 on (47.4 GB)",
        "  - a smaller model: Qwen/Qwen2.5-14B is the largest known one that trains here with QLoRA",
    ]
    assert f"written to {out}, which does not train on this card: see above what would" in lines
    assert "train with" not in result.out
    assert out.read_text().splitlines()[0] == f"# tunesmith advise: {first}"
    assert "hours of one run: unknown: it does not train on this card" in lines
    # What it names does train.
    other = json.loads(known(many, "Llama-3.1-70B", "--gpu", "RTX-A6000", "--json").out)
    assert (other["fits"]["fits"], other["instead"]) == (True, [])
    assert json.loads(known(many, "Qwen2.5-14B", "--gpu", "T4", "--json").out)["fits"]["fits"]


def test_shorter_examples_that_fit_are_named(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "long.jsonl", [{"prompt": f"{i}?", "completion": "x" * 400_000} for i in range(20)])
    value = json.loads(known(rows, "Llama-3.1-8B", "--gpu", "T4", "--json").out)
    assert value["instead"][0] == "shorter examples: QLoRA trains here with up to 75,264 tokens (data.max_seq_length)"
    assert value["headline"].startswith("Don't fine-tune: write better instructions first; but Llama-3.1-8B does not")


def test_figures_say_where_they_come_from(many: Path) -> None:
    result = known(many, "qwen2.5-7b", "--gpu", "L4")
    assert "memory: arithmetic on the model's config.json, within 5% of what was measured on an H100\n" in result.out
    assert "\nspeed: arithmetic with shares of the data sheet that were fitted on an H100\n" in result.out
    basis = json.loads(known(many, "qwen2.5-7b", "--gpu", "L4", "--json").out)["fits"]["basis"]
    assert basis["memory"].startswith("arithmetic")
    assert "speed:" not in known(many, "qwen2.5-7b", "--memory", "24").out


def test_prices_are_of_each_card_as_in_a_plan(many: Path) -> None:
    one, four = (
        json.loads(known(many, "qwen2.5-7b", "--gpu", gpu, "--price-per-hour", "100", "--json").out)["costs"]["run"]
        for gpu in ("H100", "4xH100")
    )
    assert one["cost"] == pytest.approx(100 * one["hours"])
    assert four["cost"] == pytest.approx(4 * 100 * four["hours"])


def test_rows_of_many_lengths_are_planned_packed(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}?", "completion": "word " * (5 + (i % 2) * (i % 400))} for i in range(2000)]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    value = json.loads(known(path, "qwen2.5-0.5b", "--gpu", "H100", "--json").out)
    assert "data.packing" not in value["settings"], "train decides it as the plan does"
    assert value["fits"]["micro_batch_unit"] == "tokens"


def test_a_model_that_is_not_known_is_told_in_the_plans_words(many: Path) -> None:
    for model in ("nope", "Mistral-7B"):
        told = known(many, model)
        assert told.code == 2
        assert told.problems == tunesmith("plan", "--model", model, "--gpu", "T4").problems
    assert told.problems[0].endswith("mistralai/Mistral-7B-v0.3")


def test_one_row_is_one(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "question?", "completion": "answer"}])
    assert "settings for 1 row, about " in advise(rows, **ALL).out


def test_lines_break_at_words_within_their_column(
    many: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value = json.loads(known(many, "qwen2.5-7b", "--gpu", "L4", "--json").out)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_advice(value)
    printed_lines = capsys.readouterr().out.splitlines()
    assert max(map(len, printed_lines)) <= 80
    peak = value["fits"]["peak_gb"] + value["fits"]["graphs_gb"]
    start = next(i for i, line in enumerate(printed_lines) if line.startswith("  method "))
    assert printed_lines[start : start + 2] == [
        "  method                           lora       learns as well as full on data of",
        f"                                              this size (LWR), and fits: {peak:.1f} of",
    ]


PRICES = ("--price-per-hour", "2", "--labelling-cost-per-example", "0.5", "--requests-per-day", "1000")
TOKENS = ("--price-per-million-input-tokens", "2", "--price-per-million-output-tokens", "10")


def test_costs_show_each_way_with_what_went_in(many: Path) -> None:
    result = advise(many, *PRICES, *TOKENS, **ALL)
    lines = result.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == "costs of a year")
    names = ["prompt", "few-shot", "retrieval", "fine-tuning", "retrieval and fine-tuning"]
    assert [line[:26].strip() for line in lines[start + 2 : start + 7]] == names
    tuned = lines[start + 5].split()
    assert tuned[1:] == ["13", "+", "4", "1,000", "-", "17,520", "-"]
    assert lines[start + 7] == "hours of one run: unknown: no card is known that the speed could be predicted for"
    assert "labelling: examples x labelling cost per example" in result.out
    value = printed(advise(many, "--json", *PRICES, *TOKENS, **ALL))
    assert value["costs"]["prices"]["per_hour"] == 2
    assert [way["labelling"] for way in value["costs"]["ways"]] == [0, 2.5, 0, 1000, 1000]


def test_prices_that_do_nothing_are_refused(few: Path) -> None:
    result = advise(few, *TOKENS)
    assert result.code == 2
    assert result.problems == [
        "tunesmith: prices of tokens have no effect without a number of requests; add --requests-per-day N"
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (12.345, "12.35"),
        (17520.0, "17,520"),
        ([0.5, 1.0], "0.50 to 1.00"),
        ([7, 7], "7.00"),
    ],
)
def test_amounts(value: Any, shown: str) -> None:
    assert money(value) == shown


def test_neither_help_nor_advice_without_a_model_folder_imports_anything_heavy(few: Path) -> None:
    script = (
        "import sys; sys.argv = ['tunesmith', 'advise', *sys.argv[1:]]\n"
        "from tunesmith.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit_: print(exit_.code, file=sys.stderr)\n"
        "print(*(name for name in {!r} if name in sys.modules), file=sys.stderr)"
    )
    heavy = ("torch", "transformers", "peft")
    command = [sys.executable, "-c", script.format((*heavy, "numpy")), "--help"]
    assert subprocess.run(command, capture_output=True, text=True).stderr.splitlines() == ["0", ""]
    command = [sys.executable, "-c", script.format(heavy), "--data", str(few), "--model", HUB]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.stderr.splitlines()[-2:] == ["0", ""]


def test_help_fits_a_small_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = tunesmith("advise", "--help").out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
