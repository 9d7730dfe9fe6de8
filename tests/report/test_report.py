"""The page: what it shows of a whole run, and that every missing or damaged file costs only its own part."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import METADATA, METRICS, evaluation, make_run, page_text, step_event

from tunesmith.report import write_report
from tunesmith.report.facts import Status, flattened, key_numbers, notices, setting_lines, status, wall_seconds

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Tags(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def written(*args: Any, **kwargs: Any) -> str:
    """The page of a synthetic run."""
    run = make_run(*args, **kwargs)
    path = write_report(run)
    assert path == run.path / "report.html"
    return path.read_text(encoding="utf-8")


def finished(path: Path, **changes: Any) -> str:
    """The page of a finished, evaluated run of 60 steps."""
    now = time.time()
    events = [
        {"event": "start", "steps": 60, "predicted_peak_gb": 5.125, "time": now - 35},
        {"event": "decision", "message": "kept all activations: they fit", "time": now - 35},
        {"event": "warning", "message": "3 rows are longer than 2048 tokens", "time": now - 34},
        *(step_event(step, 60, now) for step in range(1, 61)),
        {"event": "eval", "step": 30, "metrics": {"eval_loss": 0.812, "accuracy": 0.5}, "time": now},
        {"event": "best", "step": 30, "metric": "eval_loss", "value": 0.812, "time": now},
        {"event": "eval", "step": 60, "metrics": {"eval_loss": 0.934, "accuracy": 0.6}, "time": now},
        {"event": "something new", "step": 60, "payload": {"a": [1]}},
        {"event": "end", "status": "finished", "step": 60, "time": now},
    ]
    settings = {"data": {"path": "train.jsonl"}, "adapter": {"r": 64}, "memory": {"limit_gb": 8}}
    run: dict[str, Any] = {"settings": settings, "events": events, "metrics": METRICS}
    return written(path, **(run | {"evaluations": {"test.json": evaluation()}} | changes))


def test_headline_numbers_and_events_of_a_finished_run(tmp_path: Path) -> None:
    text = page_text(finished(tmp_path / "run"))
    assert text.startswith("org/tiny-model: training report org/tiny-model LoRA · supervised fine-tuning finished")
    for shown in (
        "took 3 min 12 s",
        "200 rows · test.jsonl · 2026-11-20 10:00 UTC",
        "41.0% → 72.5% +31.5 points, better (6.7 standard errors)",
        "41.0% ± 3.5",
        "72.5% ± 3.2",
        "2.345 → 0.5678 \N{MINUS SIGN}1.78, better (34.6 standard errors)",
        "Examples per second 34.6",
        "Tokens per second 12,346",
        "Supervised tokens per second 2,048",
        "Peak memory 5.31 GB",
        "Trained parameters 4.88 M of 139 M (3.5%)",
        "Training loss 0.432",
        "Evaluation loss 0.568",
        "Steps 300",
        "Evaluation loss 0.812 at first, 0.812 at best.",
        "30 ★ best 0.8120 0.5000",
        "decision kept all activations: they fit",
        "warning 3 rows are longer than 2048 tokens",
        "predicted_peak_gb 5.125",
    ):
        assert shown in text
    assert text.index("72.5%") < text.index("Key numbers")
    assert "could be read" not in text


def test_examples_are_grouped_by_what_tuning_changed(tmp_path: Path) -> None:
    page = finished(tmp_path / "run")
    text = page_text(page)
    titles = ["Fixed by tuning (70)", "Broken by tuning (7)", "Wrong both times (48)", "Right both times (75)"]
    positions = [text.index(title) for title in titles]
    assert positions == sorted(positions)
    assert "15 of 70 are shown; the others are in evaluations/test.json." in text
    first = text[positions[0] : positions[1]]
    assert "✗ wrong I think that the customer would like to know where it is. ✓ correct card_arrival" in first
    assert page.count("<details open>") == 1


def test_long_and_empty_answers(tmp_path: Path) -> None:
    rows = evaluation()["examples"][:1]
    rows[0] |= {"prompt": "a" * 1500 + "b" * 1234, "answer": "", "baseline_answer": None}
    text = page_text(finished(tmp_path / "run", evaluations={"test.json": evaluation(examples=rows)}))
    assert "a … (1,234 more characters)" in text
    assert "aab" not in text
    assert "✓ correct (empty)" in text


def test_hostile_text_is_inert_everywhere(tmp_path: Path) -> None:
    rows = [dict.fromkeys(("line", "prompt", "expected", "answer", "baseline_answer"), HOSTILE)]
    rows[0] |= {"correct": False, "baseline_correct": False}
    measured = {HOSTILE: {"value": 0.5, "stderr": 0.1}}
    events = [
        {"event": "start", HOSTILE: HOSTILE},
        {"event": "warning", "message": HOSTILE, "step": HOSTILE},
        step_event(1, 1, time.time()),
        {"event": "eval", "step": HOSTILE, "metrics": {HOSTILE: 1}},
        {"event": "end", "status": HOSTILE},
    ]
    results = evaluation(task=HOSTILE, data=HOSTILE, created=HOSTILE, metrics=measured, baseline=None, examples=rows)
    page = finished(
        tmp_path / "run",
        settings={"model": {"name": HOSTILE}, "data": {"path": HOSTILE}},
        metadata={"created": HOSTILE, HOSTILE: [{HOSTILE: HOSTILE}]},
        events=events,
        evaluations={"test.json": results, "old.json": results | {"created": ""}},
    )
    tags = Tags(page).found
    assert not {tag for tag, _ in tags} & {"script", "img", "iframe", "object", "embed", "form"}
    assert not [attrs for _, attrs in tags if any(key.startswith("on") for key in attrs)]
    assert page.count("&lt;script&gt;document.title=") > 15
    assert "default-src 'none'" in page


def test_text_that_utf8_cannot_hold(tmp_path: Path) -> None:
    rows = evaluation()["examples"][:1]
    rows[0]["prompt"] = "half \ud83d of a pair"
    assert "half ? of a pair" in finished(tmp_path / "run", evaluations={"test.json": evaluation(examples=rows)})


def test_the_page_needs_no_other_file_and_no_network(tmp_path: Path) -> None:
    page = finished(tmp_path / "run")
    assert not re.findall(r"(?:https?|file):", page)
    for tag, attrs in Tags(page).found:
        for name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    tags = Tags(finished(tmp_path / "run")).found
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = {attrs[name] for _, attrs in tags for name in ("aria-labelledby", "aria-describedby") if name in attrs}
    references |= {attrs["href"][1:] for _, attrs in tags if (attrs.get("href") or "").startswith("#")}
    references |= {attrs["clip-path"][5:-1] for _, attrs in tags if "clip-path" in attrs}
    assert len(references) > 20
    assert references <= set(ids)


def test_it_can_be_read_aloud(tmp_path: Path) -> None:
    tags = Tags(finished(tmp_path / "run")).found
    assert ("html", {"lang": "en"}) in tags
    labels = [attrs.get("aria-label") for tag, attrs in tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(labels) == 6
    assert "Line chart: Training loss by step" in labels
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in tags if tag == "th")
    assert sum(tag == "h1" for tag, _ in tags) == 1


def test_settings_that_differ_are_marked_and_stay_valid_yaml(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"adapter": {"r": 64, "target_modules": ["q_proj", "v_proj"]}, "method": "qlora"})
    lines = setting_lines(run.config)
    changed = {line.text.strip(): line.default for line in lines if line.changed}
    assert changed == {
        "method: qlora": '"lora"',
        "name: org/tiny-model": '""',
        "r: 64": "16",
        "target_modules:": '"all-linear"',
        "- q_proj": None,
        "- v_proj": None,
    }
    page = write_report(run).read_text(encoding="utf-8")
    shown = page_text(re.findall(r"<mark>.*?</mark>", page)[2])
    assert shown == "r: 64 # default: 16"
    block = re.sub(r"<[^>]*>", "", re.search(r"<pre[^>]*>\n(.*?)</pre>", page, re.S)[1]).replace("&#34;", '"')
    assert yaml.safe_load(block.replace("&#39;", "'")) == run.config.model_dump(mode="json")


def test_a_default_rate_is_not_marked_but_another_is(tmp_path: Path) -> None:
    full = make_run(tmp_path / "full", {"method": "full"}).config
    assert [line.text for line in setting_lines(full) if line.changed] == ["method: full", "  name: org/tiny-model"]
    lora = make_run(tmp_path / "lora", {"optimizer": {"lr": 2e-5}}).config
    assert [line.default for line in setting_lines(lora) if "lr:" in line.text] == ["0.0002"]


def test_provenance_is_flattened(tmp_path: Path) -> None:
    text = page_text(finished(tmp_path / "run"))
    for pair in (
        f"model.weight_hash {'9f2c' * 16}",
        "packages.torch 2.13.0",
        "hardware.capability 8, 9",
        "parent none",
    ):
        assert pair in text
    assert dict(flattened({"a": {"b": [{"c": True}, {"d": {}}]}, "e": []})) == {
        "a.b.0.c": "true",
        "a.b.1.d": "none",
        "e": "none",
    }
    assert METADATA["seed"] == 3407
    assert "seed 3407" in text


def test_a_running_run_has_numbers_from_its_steps(tmp_path: Path) -> None:
    text = page_text(written(tmp_path / "run", events=20))
    for shown in (
        "running",
        "No evaluation",
        "tunesmith eval run --data FILE --baseline",
        "Examples per second 32.0",
        "Tokens per second 8,192",
        "Supervised tokens per second 2,048",
        "Training loss (last step) ",
        "Evaluation loss not measured",
        "Trained parameters not recorded",
        "Steps 20",
        "Wall time 10 s",
        "No warning and no decision was logged.",
    ):
        assert shown in text
    assert "The plan at the start" not in text


def test_a_run_without_steps_and_one_with_a_single_step(tmp_path: Path) -> None:
    empty = written(tmp_path / "empty", events=[])
    assert "No step was logged, so there is nothing to plot." in page_text(empty)
    assert "not started" in empty
    assert "<svg" not in empty
    one = written(tmp_path / "one", events=1)
    assert one.count("<svg") == 6
    assert "8,367 (step 1)." in page_text(one)


START, STEP = {"event": "start", "time": 1000.0}, {"event": "step", "step": 1, "time": 1010.0}


@pytest.mark.parametrize(
    ("events", "metrics", "label", "note"),
    [
        ([START, STEP, {"event": "end", "status": "finished"}], {}, "finished", ""),
        ([START, STEP, {"event": "end", "status": "stopped_early"}], {}, "stopped early", ""),
        ([START, STEP, {"event": "interrupted", "step": 1}], {}, "interrupted", "`tunesmith resume` continues it"),
        (
            [START, {"event": "interrupted", "step": 1}, {"event": "resume", "step": 1}, STEP],
            {},
            "running",
            "as it was",
        ),
        ([START, {**STEP, "time": 300.0}], {}, "interrupted", "the last event is 13 min 20 s old"),
        ([], {}, "not started", "Nothing was logged yet."),
        ([], {"steps": 3}, "finished", ""),
        ([START, {**STEP, "time": 300.0}], {"steps": 1}, "finished", ""),  # killed before it could log its end
        ([START, {"event": "interrupted", "step": 1}], {"steps": 1}, "finished", ""),
        ([START, STEP, {"event": "end", "status": "stopped_early"}], {"steps": 1}, "stopped early", ""),
    ],
)
def test_status(events: list[dict[str, Any]], metrics: dict[str, Any], label: str, note: str) -> None:
    found = status(events, metrics, now=1100.0)
    assert found.label == label
    assert note in found.note
    assert bool(note) == bool(found.note)


def test_the_pause_before_a_resume_is_no_training_time() -> None:
    times = [("start", 0), ("step", 10), ("resume", 1000), ("step", 1005)]
    assert wall_seconds([{"event": event, "time": time} for event, time in times], {}) == 15
    assert wall_seconds([], {"wall_seconds": 7.5}) == 7.5
    assert status([], {}, 0.0) == Status("not started", "Nothing was logged yet.")


def test_repeated_warnings_are_one_line_and_very_many_are_cut() -> None:
    repeated = [{"event": "warning", "message": "loss rose", "step": step} for step in (3, 5, 9)]
    assert notices(repeated)[0][0].message == "loss rose (3 times, last at 9)"
    many, left_out = notices([{"event": "warning", "message": f"number {n}"} for n in range(130)])
    assert (len(many), left_out) == (100, 30)
    resumed = notices([{"event": "interrupted", "step": 4, "signal": "SIGTERM"}, {"event": "resume", "step": 4}])[0]
    assert [line.message for line in resumed] == [
        "Stopped by SIGTERM; the state was saved.",
        "Continued from the checkpoint of step 4.",
    ]


def test_values_of_the_wrong_type_are_not_numbers() -> None:
    metrics = {"tokens_per_second": "fast", "peak_memory_gb": True, "train_loss": 10**400, "steps": None}
    shown = dict(key_numbers([{"event": "step", "step": "one", "loss": []}], metrics))
    assert shown["Tokens per second"] == shown["Peak memory"] == shown["Training loss (last step)"] == "not recorded"
    assert shown["Steps"] == "0"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("events.jsonl", b"{}\nnonsense\n", "events.jsonl:2: not a JSON event"),
        ("events.jsonl", b"[1]\n", "events.jsonl:1: not a JSON event"),
        ("events.jsonl", b'{"event": "resume"}\n', "events.jsonl is damaged (KeyError"),
        ("metadata.json", b"{", "metadata.json: cannot be read"),
        ("metrics.json", b"[]", "metrics.json: expected a JSON object"),
        ("config.yaml", b"no_such: 1\n", "unknown key `no_such`"),
        ("evaluations/bad.json", b"{", "evaluations/bad.json cannot be read (Expecting property name"),
        ("evaluations/bad.json", b"\xff", "evaluations/bad.json cannot be read ('utf-8' codec"),
        ("evaluations/bad.json", b"[]", "evaluations/bad.json cannot be read (expected a JSON object)"),
        ("evaluations/bad.json", b'{"metrics": {"accuracy": {"value": null}}}', "no `metrics` with a value"),
    ],
)
def test_a_damaged_file_costs_only_its_part(tmp_path: Path, file: str, content: bytes, said: str) -> None:
    run = make_run(tmp_path / "run", events=3, metrics=METRICS, evaluations={"test.json": evaluation()})
    (run.path / file).write_bytes(content)
    text = page_text(write_report(run).read_text(encoding="utf-8"))
    assert "Not everything in this run could be read" in text
    assert said in text
    assert "72.5%" in text
    assert ("Tokens per second 12,346" in text) == (file != "metrics.json")
    assert ("From " in text) == (file != "events.jsonl")
    assert ("weight_hash" in text) == (file != "metadata.json")
    assert ("No metadata was recorded." in text) == (file == "metadata.json")
    assert ("no_such: 1" in text) == (file == "config.yaml")


def test_ten_thousand_steps_stay_small_and_keep_the_spike(tmp_path: Path) -> None:
    now = time.time()
    events = [step_event(step, 10_000, now) for step in range(1, 10_001)]
    events[6788]["loss"] = 9.876
    page = written(tmp_path / "run", events=events, evaluations={"test.json": evaluation()})
    assert len(page) < 600_000
    assert "highest 9.88 (step 6,789)" in page_text(page)
    loss = page[page.index('aria-label="Line chart: Training loss') :]
    drawn = re.search(r'<path d="([^"]*)"[^>]*var\(--plot-raw', loss)[1]
    heights = sorted(float(y) for y in re.findall(r"[ML] \S+ (\S+)", drawn))
    assert heights[0] < 30  # near the top of the plot,
    assert heights[1] > 150  # far above every other step


def test_writing_again_replaces_the_page_and_leaves_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", events=2)
    before = {path.name for path in run.path.iterdir()}
    write_report(run)
    run.write_metrics(METRICS)
    assert "12,346" in write_report(run).read_text(encoding="utf-8")
    assert {path.name for path in run.path.iterdir()} == before | {"report.html", "metrics.json"}


def test_no_global_state_and_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", events=2)
    code = f"""
import json, pathlib, sys, matplotlib
def settings():  # reading `backend` would import pyplot
    return {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
before = settings()
from tunesmith.report import write_report
from tunesmith.runs import RunFolder
write_report(RunFolder(pathlib.Path({str(run.path)!r})))
print(json.dumps([settings() == before, "torch" in sys.modules, "matplotlib.pyplot" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, False, False]
