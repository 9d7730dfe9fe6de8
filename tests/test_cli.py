"""The command line from end to end: help that is instant, results on stdout, one JSON object with --json."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import Result, tunesmith
from tiny import chat_rows, write_jsonl
from tunesmith.runs import RunFolder
from tunesmith.version import __version__

COMMANDS = (
    "quickstart",
    "train",
    "resume",
    "eval",
    "chat",
    "merge",
    "report",
    "doctor",
    "compare",
    "sweep",
    "advise",
    "plan",
    "bench",
    "serve",
    "export",
    "push",
    "data",
    "adapters",
)
EXECUTABLE = Path(sys.executable).with_name("tunesmith")
FAST = ("--set", "training.max_steps=2", "--set", "model.dtype=fp32", "--set", "optimizer.lr=0.01")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "bins.jsonl", chat_rows(16))


@pytest.fixture(scope="module")
def trained(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run made by the command, and what the command said."""
    run = tmp_path_factory.mktemp("cli") / "run"
    return run, tunesmith("train", "--model", tiny_model, "--data", data, "--out", run, *FAST)


@pytest.fixture(scope="module")
def run(trained: tuple[Path, Result]) -> Path:
    return trained[0]


def one_object(result: Result) -> Any:
    """What --json printed: nothing else may stand on stdout."""
    assert result.code == 0, result.err
    assert result.problems == []
    value, end = json.JSONDecoder().raw_decode(result.out)
    assert result.out[end:] == "\n"
    return value


# -- help -------------------------------------------------------------------------------------------------------------


FIXED_WORK = 'for _ in range(40): compile("def f(x):\\n    return [y * 2 for y in x if y]\\n" * 40, "f", "exec")'
QUIET = 0.058
"""Processor seconds of FIXED_WORK on the quiet machine where `--help` takes 0.25."""


def processor_seconds(*command: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Beside other tests on two cores, wall time says how busy those are."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def best_of_five(*arguments: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Processor seconds, on a processor as fast as the quiet one: shared ones take twice as long at times."""
    times = []
    for _ in range(5):
        seconds, result = processor_seconds(EXECUTABLE, *arguments)
        slowness = processor_seconds(sys.executable, "-c", FIXED_WORK)[0] / QUIET
        times.append(seconds / max(1.0, slowness))
        if times[-1] < 0.3:
            break
    return min(times), result


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]], ids=lambda command: " ".join(command))
def test_help_is_instant(command: list[str]) -> None:
    seconds, result = best_of_five(*command, "--help")
    assert seconds < 0.3
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: tunesmith {' '.join(command)}".rstrip() + " ")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['tunesmith', {!r}, '--help']\n"
        "from tunesmith.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*(name for name in ('torch', 'transformers', 'peft', 'numpy', 'pydantic') if name in sys.modules), file=sys.stderr)"
    )
    for command in ("train", "eval"):
        result = subprocess.run([sys.executable, "-c", script.format(command)], capture_output=True, text=True)
        assert result.stderr == "\n"


def test_help_lists_the_commands() -> None:
    result = tunesmith("--help")
    listed = result.out.split("Commands:\n")[1]
    assert [line.split()[0] for line in listed.splitlines() if line] == list(COMMANDS)
    assert tunesmith("-h").out == result.out


def test_no_arguments_shows_the_help_and_is_an_error() -> None:
    result = tunesmith()
    assert (result.code, result.out, result.err) == (2, tunesmith("--help").out, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_small_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    lines = tunesmith(command, "--help").out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_version() -> None:
    assert tunesmith("--version") == Result(0, f"tunesmith {__version__}\n", "")
    module = subprocess.run([sys.executable, "-m", "tunesmith", "--version"], capture_output=True, text=True)
    assert module.stdout == f"tunesmith {__version__}\n"


# -- train ------------------------------------------------------------------------------------------------------------


def test_train_says_where_the_run_is(trained: tuple[Path, Result]) -> None:
    run, result = trained
    assert (result.code, result.problems) == (0, [])
    lines = [line.split(maxsplit=1) for line in result.out.splitlines() if line]
    assert [line[0] for line in lines] == ["speed", "peak", "training", "run", "report"]
    assert lines[3][1] == f"folder    {run}"
    assert lines[4][1] == f"{run}/report.html"
    folder = RunFolder.open(run)
    assert f"2 steps in {folder.metrics['train_seconds']:.0f} s, loss {folder.metrics['train_loss']:.4f}" in result.out
    assert "lora on " in result.err
    for name in ("adapter", "checkpoints", "config.yaml", "events.jsonl", "metadata.json", "metrics.json"):
        assert (run / name).exists()
    assert (run / "report.html").stat().st_size > 10_000


def test_train_prints_its_metrics_as_json(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    value = one_object(tunesmith("train", "--model", tiny_model, "--data", data, "--out", run, "--json", *FAST))
    assert value == {"run": str(run), "status": "finished", **RunFolder.open(run).metrics}
    assert {
        "steps",
        "tokens_per_second",
        "examples_per_second",
        "peak_memory_gb",
        "train_loss",
        "eval_loss",
        "supervised_tokens",
        "wall_seconds",
        "trainable_parameters",
        "total_parameters",
    } <= set(value)
    assert value["steps"] == 2


def test_options_win_over_the_file(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"method: full\nmodel: {{name: /absent, dtype: fp32}}\ndata: {{path: {data}}}\n"
        "training: {max_steps: 7, batch_size: 4}\nadapter: {}\n"
    )
    value = one_object(
        tunesmith(
            "train",
            settings,
            "--model",
            tiny_model,
            "--method",
            "lora",
            "--eval-data",
            data,
            "--objective",
            "sft",
            "--set",
            "training.max_steps=1",
            "--out",
            tmp_path / "run",
            "--json",
        )
    )
    config = RunFolder.open(tmp_path / "run").config
    assert (config.method, config.model.name, config.model.dtype) == ("lora", str(tiny_model), "fp32")
    assert (config.training.max_steps, config.training.batch_size) == (1, 4)
    assert config.data.eval_path == str(data)
    assert value["eval_loss"] > 0


def test_ctrl_c_saves_and_resume_goes_on(
    tiny_model: Path, data: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.cli.console import Console

    show = Console.event

    def interrupt(self: Console, event: dict[str, Any]) -> None:
        show(self, event)
        if event["event"] == "step":
            os.kill(os.getpid(), signal.SIGINT)

    stopped = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Console, "event", interrupt)
        result = tunesmith(
            "train", "--model", tiny_model, "--data", data, "--out", stopped, *FAST, "--set", "training.batch_size=8"
        )
    assert (result.code, result.out) == (130, "")
    assert result.problems == [
        f"tunesmith: stopped by SIGINT at step 1 of 2; state saved: `tunesmith resume {stopped}` goes on"
    ]
    value = one_object(tunesmith("resume", stopped, "--json"))
    assert (value["run"], value["status"], value["steps"]) == (str(stopped), "finished", 2)
    assert [event["step"] for event in RunFolder.open(stopped).events() if event["event"] == "step"] == [1, 2]
    assert (stopped / "report.html").exists()


# -- eval -------------------------------------------------------------------------------------------------------------


def test_eval_prints_a_table_and_where_the_answers_are(run: Path, data: Path) -> None:
    result = tunesmith("eval", run, "--data", data, "--baseline", "--rows", "3", "--max-new-tokens", "2")
    assert (result.code, result.problems) == (0, [])
    assert "bins: 3 of 16 rows, greedy decoding" in result.out
    header = next(line for line in result.out.splitlines() if "metric" in line)
    assert header.replace("┃", " ").split() == ["metric", "base", "tuned", "difference"]
    written = json.loads(Path(result.out.splitlines()[-1].removeprefix("every answer: ")).read_text())
    assert written["n"] == 3
    found = written["comparison"]["accuracy"]
    assert f"{100 * found['difference']:+.1f} points, p = {found['p']:.3f}: {found['verdict']}" in result.out
    for row in written["examples"][:3]:
        assert f"line {row['line']}: expected {row['expected']!r}, answered " in result.out


def test_eval_prints_one_json_object(run: Path, data: Path) -> None:
    value = one_object(
        tunesmith("eval", run, "--data", data, "--rows", "4", "--set", "evaluation.batch_size=2", "--json")
    )
    assert json.loads(Path(value.pop("path")).read_text()) == value
    assert (value["task"], value["n"], value["baseline"], value["gate"]) == ("bins", 4, None, None)
    assert list(value["metrics"]) == ["accuracy", "exact_match", "macro_f1", "micro_f1"]
    assert set(value["metrics"]["accuracy"]) == {"value", "stderr", "n", "higher_is_better", "share"}
    assert (value["settings"]["batch_size"], value["settings"]["max_rows"]) == (2, 4)


def test_a_task_name_is_shown_as_it_is(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    odd = tmp_path / "[red]bins.jsonl"
    odd.write_bytes(data.read_bytes())
    result = tunesmith("eval", tiny_model, "--data", odd, "--rows", "1", "--max-new-tokens", "1")
    assert "[red]bins: 1 of 16 rows," in result.out


# -- chat -------------------------------------------------------------------------------------------------------------


def test_one_question(run: Path) -> None:
    from tunesmith import api
    from tunesmith.types import Message

    result = tunesmith("chat", run, "--prompt", "Which bin?", "--system", "be brief", "--max-new-tokens", "9")
    expected = api.reply(api.load(str(run)), [Message("system", "be brief"), Message("user", "Which bin?")], 9)
    assert (result.code, result.out, result.problems) == (0, expected + "\n", [])
    other = tunesmith("chat", run, "--prompt", "Which bin?", "--max-new-tokens", "9")
    assert other.out != result.out


def test_a_conversation(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.workflows import chat as conversations

    histories: list[list[str]] = []

    def reply(loaded: Any, history: Any, limit: int, temperature: float, on_text: Any, *rest: Any) -> str:
        histories.append([message.content for message in history])
        on_text(f"answer {len(histories)}")
        return f"answer {len(histories)}"

    lines = iter(["one", "  ", "two", "a \ufdd0 b", "/new", "three", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    real = conversations.reply
    monkeypatch.setattr(
        conversations,
        "reply",
        lambda loaded, history, *rest: (real if "\ufdd0" in history[-1].content else reply)(loaded, history, *rest),
    )
    result = tunesmith("chat", run, "--system", "s")
    assert histories == [["s", "one"], ["s", "one", "answer 1", "two"], ["s", "three"]]
    assert (result.code, result.out) == (0, "answer 1\nanswer 2\nanswer 3\n")
    assert len(result.problems) == 1
    assert result.problems[0].startswith("tunesmith: the user text holds a Unicode noncharacter")
    assert next(lines) == "never"


def test_the_end_of_input_ends_a_conversation(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    result = tunesmith("chat", run)
    assert (result.code, result.out) == (0, "you> \n")


# -- merge, report, doctor --------------------------------------------------------------------------------------------


def test_merge_says_how_close_it_is(run: Path, tmp_path: Path) -> None:
    result = tunesmith("merge", run, "--out", tmp_path / "one")
    assert (result.code, result.problems) == (0, [])
    assert result.out.startswith(f"{tmp_path / 'one'} (fp32), read back and compared with base + adapter on ")
    assert "top-1 agreement 100.0%\n" in result.out
    value = one_object(tunesmith("merge", run / "adapter", "--out", tmp_path / "two", "--dtype", "fp32", "--json"))
    assert (value["path"], value["dtype"], value["top1"]) == (str(tmp_path / "two"), "fp32", 1.0)
    merged, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert merged == again
    chat = tunesmith("chat", tmp_path / "one", "--prompt", "Which bin?", "--max-new-tokens", "9", "--dtype", "fp32")
    assert chat.out == tunesmith("chat", run, "--prompt", "Which bin?", "--max-new-tokens", "9").out


def test_merge_exits_with_one_when_verification_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.export.skeleton import Skeleton

    monkeypatch.setattr(Skeleton, "merged", lambda self, name, read=None: self.stored(name))
    result = tunesmith("merge", run, "--out", tmp_path / "merged")
    assert (result.code, result.out) == (1, "")
    assert len(result.problems) == 1
    assert result.problems[0].startswith("tunesmith: the merged model does not compute what base + adapter do: ")
    assert list(tmp_path.iterdir()) == []


def test_report_writes_the_page(run: Path) -> None:
    page = run / "report.html"
    page.unlink(missing_ok=True)
    assert tunesmith("report", run) == Result(0, f"{page}\n", "")
    first = page.read_text()
    assert first.startswith("<!doctype html>")
    page.unlink()
    assert one_object(tunesmith("report", run, "--json")) == {"path": str(page)}
    assert page.exists()


def test_doctor_shows_the_facts() -> None:
    value = one_object(tunesmith("doctor", "--json"))
    assert value["ok"] is True
    text = tunesmith("doctor")
    assert (text.code, text.err) == (0, "")
    words = [line.split() for line in text.out.splitlines()]
    assert ["ok", "torch", value["packages"]["torch"]] in words
    assert ["ok", "compute", "type", value["dtype"]] in [line[:4] for line in words]


def test_doctor_names_the_extra_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", "cache")  # a long path would make the table wrap
    result = tunesmith("doctor")
    assert result.code == 0
    assert "pip install 'tunesmith[quantization]'" in result.out


def test_where_there_is_no_terminal_a_stage_says_now_and_then_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tunesmith.cli import console

    clock = iter([100.0, 105.0, 112.0, 113.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    shown = console.Console()
    for done in (1, 2, 4, 8):
        shown.progress("asking", done, 8)
    shown.progress("loading", 0, 1)
    shown.progress("loading", 1, 1)
    assert capsys.readouterr() == ("", "asking: 1/8\nasking: 4/8, 16 s left\nasking: 8/8\nloading ...\n")


# -- in a process of its own ------------------------------------------------------------------------------------------


def test_a_pipe_gets_json_and_the_terminal_the_rest(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [EXECUTABLE, "train", "--model", tiny_model, "--data", data, "--out", run, "--json", *FAST]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["run"] == str(run)
    lines = result.stderr.splitlines()
    assert lines[:2] == ["reading the data ...", "loading the model ..."]
    assert lines[2].startswith("lora on ")
    assert lines[3] == f"{data}: JSON Lines, form messages, 16 rows"
    assert all(line.startswith(("training: ", "warning: ")) for line in lines[4:])  # no other library talks
