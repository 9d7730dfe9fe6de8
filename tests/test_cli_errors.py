"""Bad input and a bad machine: one clear line for each problem, the right exit code, no traceback, nothing lost.

Every test goes through the command line. `untouched` watches the folder it is given: whatever was there before the
command must be there afterwards, byte for byte, and nothing else.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from command_line import Result, tunesmith
from tiny import chat_rows, make_tiny_model, write_jsonl
from tunesmith.runs import RunFolder

FAST = ("--set", "training.max_steps=2", "--set", "model.dtype=fp32", "--set", "training.batch_size=4")
PROGRESS = re.compile(
    r"(reading the data|loading the model|merging) \.\.\.|answers: \d.*|(lora|qlora|full) on .*|training: \d.*"
    r"|going on from step \d+|\S+: JSON Lines, form \w+, \d+ rows"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "bins.jsonl", chat_rows(12))


@pytest.fixture(scope="module")
def finished(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Do not write into it."""
    run = tmp_path_factory.mktemp("errors") / "run"
    assert tunesmith("train", "--model", tiny_model, "--data", data, "--out", run, *FAST).code == 0
    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


def refused(result: Result, code: int, *problems: str) -> None:
    """The command failed with exactly these lines (without the `tunesmith: ` in front)."""
    assert "Traceback" not in result.err
    assert result.problems == [f"tunesmith: {problem}" for problem in problems]
    others = [line for line in result.err.splitlines() if not line.startswith("tunesmith: ")]
    assert [line for line in others if line and not PROGRESS.fullmatch(line)] == []
    assert (result.code, result.out) == (code, "")


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        (None, [" no such file"]),
        ("", [" the file is empty; expected one JSON object a line"]),
        ("\n \n", [" the file is empty; expected one JSON object a line"]),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n\n{"prompt": 1, "completion": "b"}\n',
            [
                "2: not valid JSON: expecting property name enclosed in double quotes at column 16; the row looks cut off",
                "4: `prompt` is a number; expected a string",
            ],
        ),
        (
            '{"question": "a"}\n',
            [
                "1: `question` has no answer beside it, so there is nothing to learn (keys found: `question`); if a "
                "column holds the answer, name it with data.columns, e.g. {answer: reply}"
            ],
        ),
        (
            '{"prompt": "ab", "chosen": "c", "rejected": "d"}\n',
            [
                " the rows are of form preference; objective sft needs answers, not preferences; set objective.name: dpo to "
                "train on preferences, or pass a file of answers, or name the column that holds them (data.format: prompt, data.columns: {completion: chosen})"
            ],
        ),
    ],
)
def test_data_that_cannot_be_trained_on(
    tiny_model: Path, tmp_path: Path, content: str | None, problems: list[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with untouched(tmp_path):
        result = tunesmith("train", "--model", tiny_model, "--data", path, "--out", tmp_path / "run")
    refused(result, 2, *(f"{path}:{problem}" for problem in problems))


def test_data_that_is_a_folder_without_data(tiny_model: Path, tmp_path: Path) -> None:
    result = tunesmith("train", "--model", tiny_model, "--data", tmp_path, "--out", tmp_path / "run")
    refused(
        result,
        2,
        f"{tmp_path}: no data files in this folder; expected .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .txt",
    )


def test_rows_that_are_too_long(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    result = tunesmith(
        "train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", "--set", "data.max_seq_length=40"
    )
    assert result.code == 2
    assert len(result.problems) == 12
    first = re.escape(f"tunesmith: {data}:1: ")
    advice = r"\d+ tokens, data\.max_seq_length is 40; raise it, or set data\.overlong to truncate, split or drop"
    assert re.fullmatch(first + advice, result.problems[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
            '{"role": "user", "content": "c"}]}',
            "1: the conversation does not end with the assistant: no expected answer",
        ),
    ],
)
def test_rows_without_a_question(finished: Path, tmp_path: Path, row: str, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    with untouched(finished):
        refused(tunesmith("eval", finished, "--data", path), 2, f"{path}:{problem}")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_all_wrong_settings_come_at_once(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("optimizer:\n  learning_rate: 1\nadapter:\n  r: many\nzork: 2\n")
    with untouched(tmp_path):
        result = tunesmith("train", settings, "--model", tiny_model, "--data", data, "--set", "data.packing=maybe")
    assert result.code == 2
    assert sorted(result.problems) == [
        "tunesmith: --set data.packing=maybe: `data.packing` is \"maybe\": input should be a valid boolean or 'auto'",
        f"tunesmith: {settings}:2: unknown key `optimizer.learning_rate`; did you mean `optimizer.lr`?",
        f'tunesmith: {settings}:4: `adapter.r` is "many": input should be a valid integer, unable to parse string '
        "as an integer",
        f"tunesmith: {settings}:5: unknown key `zork`",
    ]


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (
            [],
            [
                "no model: pass --model, or set model.name",
                "no training data: pass --data, or set data.path or data.mix",
            ],
        ),
        (["--set", "adapter.r"], ["--set adapter.r: expected section.key=value, e.g. --set adapter.r=8"]),
        (["--method", "zork"], ["`method` is \"zork\": input should be 'lora', 'qlora' or 'full'"]),
        (["/absent.yaml"], ["/absent.yaml: no such file"]),
        (
            ["--method", "full", "--set", "adapter.r=8"],
            ["--set adapter.r=8: adapter.r has no effect with method: full; remove it, or set method: lora"],
        ),
    ],
)
def test_settings_that_say_nothing_or_nonsense(arguments: list[str], problems: list[str]) -> None:
    refused(tunesmith("train", *arguments), 2, *problems)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        (
            "adapter.target_modules=[zork]",
            "adapter.target_modules: zork matches no linear layer of this model; "
            "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (
            "data.chat_template=zork",
            "data.chat_template is 'zork': expected auto, alpaca, vicuna, chatml, llama2, none, or an existing .jinja file",
        ),
        (
            "model.dtype=fp16",
            "model.dtype is fp16, but fp16 training on the CPU is not supported; use bf16, fp32 or auto",
        ),
        ("model.device=gpu", "model.device is 'gpu': expected auto, cpu, cuda, cuda:N or mps"),
        ("adapter.init_from=/absent", "/absent: not an adapter (no adapter_config.json there)"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_machine(
    tiny_model: Path, data: Path, tmp_path: Path, setting: str, problem: str
) -> None:
    device = [] if "device" in setting else ["--set", "model.device=cpu"]
    result = tunesmith(
        "train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", "--set", setting, *device
    )
    refused(result, 2, problem)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["zork"], "No such command 'zork'. (see --help)"),
        (["train", "--zork"], "No such option: --zork (see --help)"),
        (["eval", "run"], "nothing to evaluate: pass --data FILE, --retain, or --tasks NAME,NAME"),
        (["merge"], "Missing argument 'RUN'. (see --help)"),
        (["doctor", "zork"], "Got unexpected extra argument(s) (zork) (see --help)"),
        (
            ["eval", "run", "--data", "x", "--rows", "0"],
            "Invalid value for '--rows': Input should be greater than or equal to 1 (see --help)",
        ),
        (
            ["chat", "run", "--temperature", "hot"],
            "Invalid value for '--temperature': Input should be a valid number, unable to parse string as a number (see --help)",
        ),
    ],
)
def test_wrong_arguments(arguments: list[str], problem: str) -> None:
    refused(tunesmith(*arguments), 2, problem)


def test_options_that_only_look_right(finished: Path, data: Path, tiny_model: Path) -> None:
    for arguments, problem in (
        (["--dtype", "float8"], "dtype is 'float8': expected auto, bf16, fp16 or fp32"),
        (["--device", "gpu"], "model.device is 'gpu': expected auto, cpu, cuda, cuda:N or mps"),
    ):
        refused(tunesmith("eval", finished, "--data", data, *arguments), 2, problem)
        refused(tunesmith("chat", finished, "--prompt", "hi", *arguments), 2, problem)
        refused(tunesmith("merge", finished, *arguments), 2, problem)
    result = tunesmith("eval", tiny_model, "--data", data, "--baseline", "--device", "cpu")
    refused(result, 2, f"{tiny_model} is itself a base model: there is no other to compare with; leave --baseline out")


# -- models and runs --------------------------------------------------------------------------------------------------


def without_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return f"{folder}: no weights in this folder; expected *.safetensors beside config.json"


def pickled(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return (
        f"{folder}: its weights are pickled (pytorch_model.bin), which can run code when loaded; "
        "only safetensors are read: convert them first"
    )


def cut(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return f"{folder} cannot be loaded: Error while deserializing header: incomplete metadata, file not fully covered"


def foreign(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "zork", "auto_map": {"AutoConfig": "a.B"}}))
    return (
        f"{folder}: this model runs its own Python code; read it, then allow it with --set model.trust_remote_code=true"
    )


@pytest.mark.parametrize("damage", [without_weights, pickled, cut, foreign])
def test_models_that_cannot_be_used(
    tiny_model: Path, data: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    problem = damage(model)
    with untouched(tmp_path):
        refused(tunesmith("train", "--model", model, "--data", data, "--out", tmp_path / "run"), 2, problem)
        refused(tunesmith("chat", model, "--prompt", "hi"), 2, problem)
        refused(tunesmith("eval", model, "--data", data), 2, problem)


def test_names_that_are_nothing(data: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    problem = f"{absent}: no such model folder or .gguf file (a hub id looks like org/model)"
    for arguments in (["chat", absent, "--prompt", "hi"], ["eval", absent, "--data", data], ["merge", absent]):
        refused(tunesmith(*arguments), 2, problem)
    for command in ("report", "resume"):
        refused(tunesmith(command, absent), 2, f"{absent}: not a run folder (it has no config.yaml)")
    refused(
        tunesmith("eval", "no-such-org/no-such-model", "--data", data),
        2,
        "no-such-org/no-such-model: no such folder here, and the hub cannot be reached; check the name or the network",
    )


def test_a_base_with_other_weights(finished: Path, data: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    with untouched(finished):
        result = tunesmith("eval", finished, "--data", data, "--model", other)
    assert (result.code, len(result.problems)) == (2, 1)
    assert f"are not those that {finished} was trained on" in result.problems[0]


def test_a_prompt_that_cannot_be_asked(tiny_model: Path) -> None:
    refused(
        tunesmith("chat", tiny_model, "--prompt", "a\ufdd0"),
        2,
        "the user text holds a Unicode noncharacter (U+FDD0 to U+FDD9); remove it",
    )


def test_a_run_that_is_finished_damaged_or_newer(finished: Path, tmp_path: Path) -> None:
    with untouched(finished):
        refused(
            tunesmith("resume", finished), 2, f"{finished}: this run is finished (2 steps); there is nothing to resume"
        )
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    problem = f"{run}: this run is not finished (no adapter/); `tunesmith resume {run}` goes on"
    refused(tunesmith("merge", run), 2, problem)
    refused(tunesmith("chat", run, "--prompt", "hi"), 2, problem)
    (run / "metadata.json").write_text("{")
    refused(
        tunesmith("chat", run, "--prompt", "hi"),
        2,
        f"{run / 'metadata.json'}: cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)); the run folder is damaged",
    )
    (run / "metadata.json").write_text('{"format_version": 99}')
    refused(
        tunesmith("chat", run, "--prompt", "hi"),
        2,
        f"{run}: run format 99 is newer than this tunesmith reads (1); upgrade",
    )


# -- where to write ---------------------------------------------------------------------------------------------------


def test_an_existing_run_is_not_touched(tiny_model: Path, data: Path, finished: Path) -> None:
    with untouched(finished.parent):
        refused(
            tunesmith("train", "--model", tiny_model, "--data", data, "--out", finished, *FAST),
            2,
            f"{finished} exists already; choose another --out, or continue it with `tunesmith resume {finished}`",
        )
        refused(
            tunesmith("merge", finished, "--out", finished / "adapter"),
            2,
            f"{finished / 'adapter'} exists already; choose another --out",
        )


@pytest.mark.parametrize("below", ["run", "deep/down/run"])
def test_a_place_below_a_regular_file(tiny_model: Path, data: Path, finished: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    problem = f"{out}: cannot be written (Not a directory); choose another folder"
    with untouched(tmp_path):
        refused(tunesmith("train", "--model", tiny_model, "--data", data, "--out", out, *FAST), 2, problem)
        refused(tunesmith("merge", finished, "--out", out), 2, problem)


def test_a_report_that_cannot_be_written(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    result = tunesmith("report", run)
    assert (result.code, len(result.problems)) == (2, 1)
    assert result.problems[0].startswith(f"tunesmith: {run / 'report.html'}: cannot be written (")


# -- what the machine cannot ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "arguments", "problem"),
    [
        (
            "bitsandbytes",
            ["--method", "qlora"],
            "method qlora needs bitsandbytes; install it with: pip install 'tunesmith[quantization]'",
        ),
        (
            "bitsandbytes",
            ["--set", "optimizer.name=adamw_8bit"],
            "optimizer.name adamw_8bit needs bitsandbytes; install it with: pip install 'tunesmith[quantization]'",
        ),
        ("peft", [], "the package peft is not installed; `tunesmith doctor` lists what is needed"),
    ],
)
def test_a_missing_package(
    tiny_model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    arguments: list[str],
    problem: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = tunesmith("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", *arguments)
    refused(result, 3, problem)
    assert list(tmp_path.iterdir()) == []


FULL = (
    r": no space left on the disk \(\d+ MB free\); free some space and try again; nothing that was saved before is lost"
)


def out_of_space(result: Result, path: str) -> None:
    """It ended with the line for a full disk at `path`; a temporary name stands without its random end."""
    assert "Traceback" not in result.err
    assert (result.code, result.out, len(result.problems)) == (3, "", 1)
    problem = re.sub(r"(/\.tmp-[^/]+)-[0-9a-f]{8}/", r"\1/", result.problems[0])
    assert re.fullmatch(re.escape(f"tunesmith: {path}") + FULL, problem), problem


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("writer", ["save_weights", "save_file", "write_json"])
def test_a_disk_that_fills_up_in_a_checkpoint(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """The second checkpoint fails; the first one is whole, and the run goes on from it once there is space."""
    from tunesmith.training import checkpoint

    run = tmp_path / "run"
    real = getattr(checkpoint, writer)

    def once_full(*arguments: Any, **more: Any) -> Any:
        return real(*arguments, **more) if not (run / "checkpoints" / "step-000001").exists() else no_space()

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, writer, once_full)
        command = ("train", "--model", tiny_model, "--data", data, "--out", run, *FAST)
        result = tunesmith(*command, "--set", "training.save_every=1")
    out_of_space(result, str(run / "checkpoints" / "step-000002"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert not (run / "metrics.json").exists()
    with untouched(run):
        refused(
            tunesmith("chat", run, "--prompt", "hi"),
            2,
            f"{run}: this run is not finished (no adapter/); `tunesmith resume {run}` goes on",
        )
    assert tunesmith("resume", run).code == 0
    steps = [event["step"] for event in RunFolder.open(run).events() if event["event"] == "step"]
    assert steps == [1, 2]


def test_a_disk_that_fills_up_in_the_event_log(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith import runs

    run = tmp_path / "run"
    real = runs._append

    def full_at_step_two(file: Any, event: dict[str, Any]) -> None:
        if event.get("step") == 2:
            file.write('{"event": "st')  # what still fitted
            file.flush()
            no_space()
        real(file, event)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "_append", full_at_step_two)
        command = ("train", "--model", tiny_model, "--data", data, "--out", run, *FAST)
        result = tunesmith(*command, "--set", "training.save_every=1")
    out_of_space(result, str(run / "events.jsonl"))
    assert (run / "events.jsonl").read_text().endswith('{"event": "st')
    events = RunFolder.open(run).events()  # the cut line is ignored
    assert [event["step"] for event in events if event["event"] == "step"] == [1]
    assert tunesmith("resume", run).code == 0
    events = RunFolder.open(run).events()  # and removed by the next writer
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]


@pytest.mark.parametrize("what", ["metadata.json", "adapter", "metrics.json", "report.html"])
def test_a_disk_that_fills_up_at_the_beginning_or_the_end(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from tunesmith import files
    from tunesmith.workflows import train

    run = tmp_path / "run"
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(f".tmp-{what}-"):
            no_space()
        fsync(descriptor)

    with monkeypatch.context() as patched:
        if what == "adapter":
            patched.setattr(train, "save_adapter", no_space)
        else:
            patched.setattr(files.os, "fsync", full)
        result = tunesmith("train", "--model", tiny_model, "--data", data, "--out", run, *FAST)
    place = tmp_path / ".tmp-run" if what == "metadata.json" else run
    out_of_space(result, str(place / what))
    if what == "metadata.json":
        assert list(tmp_path.iterdir()) == []  # nothing was begun
    else:
        assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000002"]
        assert not (run / what).exists()
        assert not list(run.glob(".tmp-*"))


def test_a_disk_that_fills_up_while_merging(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.export import streamed

    monkeypatch.setattr(streamed, "write_tensors", no_space)
    with untouched(finished):
        result = tunesmith("merge", finished, "--out", tmp_path / "merged")
    out_of_space(result, str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_evaluating(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith import files

    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "evaluations").mkdir(exist_ok=True)
    monkeypatch.setattr(files.os, "fsync", no_space)
    with untouched(run / "adapter"):
        result = tunesmith("eval", run, "--data", data, "--rows", "1", "--max-new-tokens", "1")
    out_of_space(result, str(run / "evaluations" / "bins.json"))


def test_a_disk_that_is_really_full(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """One megabyte of tmpfs: checkpoints are kept until no more fits."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        run = disk / "run"
        settings = (
            "training.save_every=1",
            "training.save_total_limit=null",
            "training.epochs=20",
            "training.batch_size=4",
        )
        options = [part for setting in settings for part in ("--set", setting)]
        result = tunesmith("train", "--model", tiny_model, "--data", data, "--out", run, *options)
        assert (result.code, len(result.problems)) == (3, 1)
        kept = RunFolder.open(run).checkpoints()
        assert kept
        failed = run / "checkpoints" / f"step-{kept[-1][0] + 1:06d}"
        out_of_space(result, str(failed))
        assert all((path / "state.json").is_file() for _, path in kept)
        assert not list(run.rglob(".tmp-*"))

        (disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(disk).free - 8192))
        result = tunesmith("train", "--model", tiny_model, "--data", data, "--out", disk / "other", *FAST)
        assert (result.code, len(result.problems)) == (3, 1)
        assert re.fullmatch(
            re.escape(f"tunesmith: {disk / 'other'}: the run needs about ")
            + r"\d+\.\d\d GB for 4 checkpoints and its result, \d+\.\d\d GB are free; "
            "free some space, choose another --out, or lower training.save_total_limit",
            result.problems[0],
        )
        assert not (disk / "other").exists()
        assert [path for _, path in RunFolder.open(run).checkpoints()] == [path for _, path in kept]

        (disk / "ballast").unlink()
        for _, path in kept[:-1]:
            shutil.rmtree(path)
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("save_total_limit: null", "save_total_limit: 1"))
        result = tunesmith("resume", run, "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["steps"] == 60
    finally:
        subprocess.run(["umount", disk], check=True)


def out_of_memory_at_once(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from tunesmith.workflows import train

    def none_left(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(train, "make_optimizer", none_left)


def test_memory_that_runs_out(tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_at_once(monkeypatch, MemoryError())
    result = tunesmith("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", *FAST)
    refused(
        result,
        3,
        "not enough memory; use a smaller batch size or a smaller model; "
        "when training, lower training.micro_batch_size (or micro_batch_tokens), or set memory.mode=min",
    )


def test_a_gpu_that_runs_out_of_memory(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    out_of_memory_at_once(monkeypatch, torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    result = tunesmith("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", *FAST)
    refused(
        result,
        3,
        "the GPU ran out of memory; use a smaller batch size or a smaller model; when training, lower "
        "training.micro_batch_size (or micro_batch_tokens) or data.max_seq_length, set memory.mode=min, or use "
        "method: qlora",
    )


def test_steps_that_always_run_out_of_memory(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.training import loop

    def none_left(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(loop, "micro_batches", none_left)
    result = tunesmith("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", *FAST)
    assert result.code == 3
    lines = [line.removeprefix("tunesmith: ") for line in result.err.splitlines() if line.startswith("tunesmith: ")]
    assert lines[0].startswith("step 1 ran out of memory with one example a micro-batch: no memory left (")
    assert [line[:3] for line in lines[1:]] == ["1. ", "2. ", "3. ", "4. ", "5. "]


def test_a_prompt_that_runs_out_of_memory_alone(finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.models import generate

    def none_left(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(generate, "_generate_batch", none_left)
    with untouched(finished):
        result = tunesmith("eval", finished, "--data", data, "--rows", 4, "--max-new-tokens", 3)
    assert (result.code, result.out) == (3, "")
    (problem,) = result.problems
    assert re.fullmatch(
        r"tunesmith: one prompt of \d+ tokens with up to 3 new ones ran out of memory: no memory left; shorten the .*",
        problem,
    )
    for count in (4, 2):
        assert (
            f"\nanswering {count} prompts at once ran out of memory and is done again; from now on half as "
            in result.err
        )


def test_a_result_with_nan_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    from tunesmith.cli.console import Console

    Console().result({"loss": math.nan, "values": [math.inf, 0.5]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"loss": None, "values": [None, 0.5]}


def test_a_folder_where_none_can_be_made(tiny_model: Path, data: Path) -> None:
    result = tunesmith("train", "--model", tiny_model, "--data", data, "--out", "/proc/x", *FAST)
    refused(result, 2, "/proc/x: cannot be written (No such file or directory); choose another folder")


def test_our_own_bugs_are_not_hidden(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is known is turned into a line. Anything else keeps its traceback."""
    from tunesmith import api

    monkeypatch.setattr(api, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tunesmith("chat", tiny_model, "--prompt", "hi")


def test_a_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("tunesmith"), "resume", tmp_path / "absent"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"tunesmith: {tmp_path / 'absent'}: not a run folder (it has no config.yaml)\n"


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_130(tiny_model: Path) -> None:
    # A shell starts background jobs with SIGINT ignored, and Python leaves it so.
    program = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tunesmith.cli import main\nmain()"
    )
    command = [sys.executable, "-c", program, "chat", str(tiny_model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.read(5) == "you> "
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1:] == ["tunesmith: interrupted"]
    assert "Traceback" not in err
