"""The client against an endpoint that limits, fails, stalls, hangs up, refuses and repeats secrets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.judge_server import (
    KEY,
    JudgeServer,
    counts,
    differing,
    judge,
    prefer_first,
    row,
)
from tunesmith.errors import ConfigError, MachineError, VerificationError
from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.evaluation.judge import JudgedRow, judge_rows
from tunesmith.evaluation.judges import JudgeSettings

pytestmark = pytest.mark.usefixtures("judge_key")


def test_rate_limits_and_errors_are_repeated_with_backoff(
    longer: JudgeServer, tmp_path: Path, slept: list[float]
) -> None:
    longer.modes = ["rate_limit", "error", "error", "drop"]
    found = judge(longer, [row(1, "longer", "short")], tmp_path).details
    assert (counts(found), len(longer.requests)) == ((1, 0, 0), 6)
    assert (found["cost"]["requests"], found["cost"]["retries"]) == (2, 4)
    assert slept[0] == 1.0  # Retry-After
    for seconds, most in zip(slept[1:], (1.0, 2.0, 4.0), strict=True):
        assert 0.75 * most <= seconds <= most


def test_a_stalled_request_times_out_and_is_repeated(longer: JudgeServer, tmp_path: Path, slept: list[float]) -> None:
    longer.modes = ["stall", "stall"]
    found = judge(longer, [row(1, "longer", "short")], tmp_path, timeout=0.2).details
    assert (counts(found), found["cost"]["retries"], len(slept)) == ((1, 0, 0), 2, 2)


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        ("stall", "no reply within 0.1 s"),
        ("error", "Error code: 500 - error of Bearer [key]"),
        ("rate_limit", "Error code: 429 - rate_limit of Bearer [key]"),
        ("drop", "the connection failed: Server disconnected without sending a response."),
    ],
)
def test_what_fails_for_good_is_reported(
    longer: JudgeServer, tmp_path: Path, slept: list[float], mode: str, problem: str
) -> None:
    longer.modes = [mode] * 3
    found = judge(longer, differing(10), tmp_path, timeout=0.1 if mode == "stall" else 5, max_retries=2).details
    assert [(one["kind"], one["problem"], one["text"]) for one in found["unjudged"]] == [("failed", problem, None)]
    assert (found["judged"], found["cost"]["retries"], len(slept)) == (9, 2, 2)
    longer.requests.clear()
    again = judge(longer, differing(10), tmp_path).details
    assert (again["judged"], again["cost"]["requests"], again["cost"]["from_cache"]) == (10, 1, 19)


@pytest.mark.parametrize("mode", ["too_long", "not_json"])
def test_what_a_repetition_does_not_mend_is_not_repeated(longer: JudgeServer, tmp_path: Path, mode: str) -> None:
    longer.modes = [mode]
    found = judge(longer, differing(10), tmp_path).details
    problems = {
        "too_long": "Error code: 400 - too_long of Bearer [key]",
        "not_json": "the endpoint's answer is no chat completion: \"<html>a gateway's page</html>\"",
    }
    assert [one["problem"] for one in found["unjudged"]] == [problems[mode]]
    assert (len(longer.requests), found["cost"]["retries"]) == (20, 0)


def test_an_address_where_nobody_listens_stops_early(tmp_path: Path, slept: list[float]) -> None:
    with JudgeServer(prefer_first) as server:
        url = server.url
    settings = JudgeSettings(url, "stub", workers=1, max_retries=3)
    with pytest.raises(
        VerificationError, match=r"0 replies could not be read, \d+ requests failed.*Connection refused"
    ):
        judge_rows(differing(100), Endpoint(settings), settings, tmp_path / "judge.jsonl")
    assert 33 <= len(slept) < 300  # of 600


def test_a_refused_key_stops_at_once_and_is_not_told(longer: JudgeServer, tmp_path: Path) -> None:
    longer.mode = "unauthorized"
    with pytest.raises(ConfigError) as caught:
        judge(longer, differing(100), tmp_path)
    assert str(caught.value) == (
        f"the judge at {longer.url} refused (Error code: 401 - unauthorized of Bearer [key]); "
        "check the key in the environment variable OPENAI_API_KEY"
    )
    assert caught.value.__cause__ is None
    assert len(longer.requests) < 50  # of 200
    assert longer.keys[0] == f"Bearer {KEY}"


def test_an_unknown_model_stops_at_once(longer: JudgeServer, tmp_path: Path) -> None:
    longer.mode = "not_found"
    with pytest.raises(
        ConfigError, match=r"check the model's name \(stub\) and the address, which mostly ends with /v1"
    ):
        judge(longer, differing(100), tmp_path)
    assert len(longer.requests) < 50  # of 200


def test_a_missing_key_is_one_error_that_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError) as caught:
        Endpoint(JudgeSettings("https://judge.example/v1", "m", api_key_env="JUDGE_KEY"))
    assert str(caught.value) == (
        "the judge at https://judge.example/v1 needs a key: the environment variable JUDGE_KEY is not set; set it, or "
        "name another variable (api_key_env; none for a server without keys)"
    )
    monkeypatch.setenv("JUDGE_KEY", "sk-1\n")
    with pytest.raises(ConfigError, match="JUDGE_KEY holds a line break") as caught:
        Endpoint(JudgeSettings("https://judge.example/v1", "m", api_key_env="JUDGE_KEY"))
    assert "sk-1" not in str(caught.value)


def test_a_server_without_keys_is_sent_none_of_ours(longer: JudgeServer, tmp_path: Path) -> None:
    judge(longer, [row(1, "longer", "short")], tmp_path, api_key_env=None)
    assert longer.keys == ["Bearer none"] * 2


def test_no_file_and_no_result_holds_the_key(longer: JudgeServer, tmp_path: Path, slept: list[float]) -> None:
    longer.modes = ["error"] * 2 + ["third"] * 2
    result = judge(longer, differing(20), tmp_path, max_retries=1)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "[key]" in written
    assert KEY not in written
    assert KEY not in json.dumps(result.details)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MachineError, match=r"pip install 'tunesmith\[judge\]'"):
        Endpoint(JudgeSettings("https://judge.example/v1", "m"))


INTERRUPTED = """
import signal
import sys
from pathlib import Path
from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.evaluation.judge import JudgedRow, judge_rows
from tunesmith.evaluation.judges import JudgeSettings
settings = JudgeSettings(sys.argv[1], "stub", workers=2)
rows = [JudgedRow(line, f"question {line}", None, f"long {line}", f"{line}") for line in range(20)]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
try:
    judge_rows(rows, Endpoint(settings), settings, Path(sys.argv[2]), lambda stage, done, total: print(done, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupted_run_ends_at_once_and_keeps_what_came(longer: JudgeServer, tmp_path: Path) -> None:
    longer.modes, longer.mode = ["good"] * 6, "stall"
    path = tmp_path / "judge.jsonl"
    arguments = [sys.executable, "-c", INTERRUPTED, longer.url, str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout
        for line in process.stdout:
            if line == "6\n":
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130  # the requests under way stall for 60 s, and would then be repeated
    assert len(path.read_text().splitlines()) == 6
    longer.mode = "good"
    longer.requests.clear()
    settings = JudgeSettings(longer.url, "stub")
    rows = [JudgedRow(line, f"question {line}", None, f"long {line}", f"{line}") for line in range(20)]
    judge_rows(rows, Endpoint(settings), settings, path)
    assert len(longer.requests) == 34
