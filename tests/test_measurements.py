"""measured.jsonl: what is written is read back, by two processes too; what does not compare is left out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from measured import RUN as SEVEN_B
from tunesmith import measurements
from tunesmith.cards import card_of, find_card
from tunesmith.measurements import (
    ARITHMETIC,
    NEWEST_LINES,
    Calibration,
    Measurement,
    calibration,
    measured_path,
    read_measured,
    record,
)

RUN = replace(
    SEVEN_B, parameters=8 * 10**9, host=1.5, predicted_peak_gb=20.0, measured_peak_gb=19.0, tokens_per_second=900.0
)
H100 = find_card("H100")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "new" / "cache"))
    return tmp_path / "new" / "cache"


def calibrated(*runs: Measurement, **other: Any) -> Calibration:
    wanted = {"card": H100, "engine": "fused", "method": "lora", "scheme": None, "parameters": RUN.parameters} | other
    return calibration(runs, **wanted)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_read_back(cache: Path) -> None:
    assert read_measured() == ()
    second = replace(RUN, time=2.0, measured_peak_gb=None, scheme="nf4")
    record(RUN)
    record(second)
    assert read_measured() == (RUN, second)
    assert measured_path() == cache / "measured.jsonl"
    assert [json.loads(line) for line in measured_path().read_text().splitlines()] == [asdict(RUN), asdict(second)]


def test_two_processes_write_whole_lines() -> None:
    code = (
        "import sys\nfrom dataclasses import replace\nfrom tunesmith.measurements import Measurement, record\n"
        f"run = {RUN!r}\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "for number in range(200):\n    record(replace(run, time=number, model_type=sys.argv[1] * 300))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:  # both are ready: they write at the same time
        process.communicate("go\n")
        assert process.returncode == 0
    found = read_measured()
    for name in "ab":
        assert [run.time for run in found if run.model_type == name * 300] == list(range(200))
    assert len(found) == 400


@pytest.mark.parametrize(
    "line",
    [
        b'{"time": 1.0, "ver',
        b"",
        b"[1, 2]",
        b"7",
        b"\xff\xfe{}",
        json.dumps(asdict(RUN) | {"new_key": 1}).encode(),
        json.dumps({key: value for key, value in asdict(RUN).items() if key != "steps"}).encode(),
        json.dumps(asdict(RUN) | {"tokens_per_second": "900"}).encode(),
        json.dumps(asdict(RUN) | {"tokens_per_second": None}).encode(),
        json.dumps(asdict(RUN) | {"predicted_tokens_per_second": 0.0}).encode(),
        json.dumps(asdict(RUN) | {"tokens_per_second": float("nan")}).encode(),
        json.dumps(asdict(RUN) | {"measured_peak_gb": float("inf")}).encode(),
        json.dumps(asdict(RUN) | {"version": "0.0.9"}).encode(),  # another version's arithmetic
    ],
)
def test_a_line_that_says_nothing_is_ignored(line: bytes) -> None:
    record(RUN)
    with measured_path().open("ab") as file:
        file.write(line + b"\n")
    record(replace(RUN, time=2.0))
    assert [run.time for run in read_measured()] == [1.0, 2.0]


def test_only_the_newest_lines_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(NEWEST_LINES + 7):
        record(replace(RUN, time=float(number)))
    assert [run.time for run in read_measured()] == [float(number) for number in range(7, NEWEST_LINES + 7)]
    # And no more than so many bytes, wherever a line begins.
    line = len(measured_path().read_bytes().splitlines()[-1]) + 1
    monkeypatch.setattr(measurements, "LINE_BYTES", 77)
    assert 50 < len(read_measured()) == 77 * NEWEST_LINES // line < 200


def test_a_file_that_cannot_be_written_or_read(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where a folder should be")
    with pytest.raises(FileExistsError):
        record(RUN)
    assert read_measured() == ()
    cache.unlink()
    (cache / "measured.jsonl").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        record(RUN)
    assert read_measured() == ()


def test_a_full_disk_is_an_error(file_size_limit: Any) -> None:
    record(RUN)
    size = measured_path().stat().st_size
    with file_size_limit(size + 10), pytest.raises(OSError, match="No space left on device"):
        record(RUN)
    assert read_measured() == (RUN,)  # what was cut off is ignored


# -- what they say ----------------------------------------------------------------------------------------------------


def test_a_device_and_what_a_user_calls_it_are_one_card() -> None:
    card = card_of("NVIDIA H100 80GB HBM3", 79.18)
    assert card is not None
    run = replace(RUN, card=card.name)
    assert calibrated(run, card=find_card("h100 sxm")) == Calibration(1, 0.9, 1.5, (0.95,))
    assert calibrated(run, card=find_card("H100 PCIe")) == ARITHMETIC
    assert calibrated(run, card=None) == ARITHMETIC


def test_the_median_of_the_newest_runs() -> None:
    speeds = [10.0, 10.0, 10.0, 800.0, 1200.0, 700.0, 900.0, 2000.0]
    peaks = [1.0, 1.0, 1.0, 19.0, None, 20.4, None, 20.0]
    runs = [
        replace(RUN, tokens_per_second=speed, measured_peak_gb=peak, host=1 + number / 8)
        for number, (speed, peak) in enumerate(zip(speeds, peaks, strict=True))
    ]
    assert calibrated(*runs) == Calibration(5, 0.9, 1.625, (0.95, 1.02, 1.0))
    assert calibrated(*runs[-2:]) == Calibration(2, 1.45, 1.8125, (1.0,))
    assert calibrated() == Calibration(0, 1.0, 1.0, ())


@pytest.mark.parametrize(
    ("other", "runs"),
    [
        ({"card": "A100 80GB"}, 1),
        ({"engine": "reference"}, 1),
        ({"method": "full"}, 1),
        ({"method": "qlora", "scheme": "nf4"}, 1),
        ({"scheme": "int8"}, 1),
        ({"parameters": 2_000_000_000}, 2),
        ({"parameters": 1_999_999_999}, 1),
        ({"parameters": 32_000_000_000}, 2),
        ({"parameters": 32_000_000_001}, 1),
        ({"model_type": "qwen2"}, 2),
        ({"time": 0.5}, 2),
    ],
)
def test_only_comparable_runs_count(other: dict[str, Any], runs: int) -> None:
    assert calibrated(RUN, replace(RUN, **other)).runs == runs


def test_the_words_of_a_basis() -> None:
    assert ARITHMETIC.basis(5.0) == {"memory": "arithmetic", "speed": "arithmetic", "runs": 0}
    assert ARITHMETIC.basis(None) == {"memory": "arithmetic", "speed": None, "runs": 0}
    assert Calibration(2, 0.5).basis(5.0) == {"memory": "arithmetic", "speed": "calibrated", "runs": 2}


def test_it_needs_no_pytorch() -> None:
    code = "import sys, tunesmith.measurements; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
