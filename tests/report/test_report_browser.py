"""The page in a real browser: it lays out without overflow, runs nothing of the data, and follows the colour scheme."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from matplotlib.image import imread
from report_runs import METRICS, evaluation, make_run, step_event

from tunesmith.report import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the browser `chromium` on PATH")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=2000",
]

# Opens everything, then measures: the page's width, and the plots' text against the card and against its size.
PROBE = """<script>
addEventListener('load', () => {
  document.querySelectorAll('details').forEach(item => item.open = true);
  const texts = [...document.querySelectorAll('svg text')].map(item => {
    const box = item.getBoundingClientRect(), card = item.closest('figure').getBoundingClientRect();
    return {inside: box.left >= card.left && box.right <= card.right && box.bottom <= card.bottom, height: box.height};
  });
  parent.postMessage({
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    texts: texts.length,
    outside: texts.filter(item => !item.inside).length,
    smallest: Math.min(...texts.map(item => item.height)),
    plots: document.querySelectorAll('svg[role=img]').length,
    title: document.title,
  }, '*');
});
</script>"""

# A headless window is at least 500 px wide, a frame in it can be narrower.
FRAMES = """<!doctype html><pre id="found"></pre><script>
addEventListener('message', event => { found.textContent += JSON.stringify(event.data) + '\\n'; });
</script>
<iframe src="probe.html" style="width: 1280px; height: 900px; border: 0"></iframe>
<iframe src="probe.html" style="width: 400px; height: 900px; border: 0"></iframe>"""

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></textarea></style>"


def chromium(tmp_path: Path, page: Path, *flags: str) -> str:
    """Load `page` and return what the browser prints."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(CHROMIUM), *FLAGS, profile, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A page with everything in it: hostile data, long words, many metrics."""
    now = time.time()
    rows = evaluation()["examples"]
    rows[0] |= {"prompt": HOSTILE, "answer": "long" * 300, "expected": HOSTILE, "baseline_answer": "x\n" * 300}
    named = {f"metric_with_a_long_name_{n}": 0.5 for n in range(12)}
    events = [
        {"event": "start", "time": now, "hash": "0123456789abcdef" * 8},
        *(step_event(step, 60, now, tokens_per_second=8_765_432.1) for step in range(1, 61)),
        {"event": "eval", "step": 60, "metrics": {"eval_loss": 0.9, **named}},
        {"event": "warning", "message": HOSTILE + "w" * 300},
        {"event": "end", "status": "finished", "step": 60, "time": now},
    ]
    files = {
        "new.json": evaluation(examples=rows, task=HOSTILE),
        "old.json": evaluation(examples=rows, task=HOSTILE, created="2026-01-01", data="a/" + "long" * 40),
        "older.json": evaluation(examples=rows, task=HOSTILE, created="2025-01-01"),
    }
    settings = {"model": {"name": "organisation/model-" + "x" * 90}, "data": {"path": "/data/" + "y" * 200}}
    return write_report(make_run(tmp_path / "run", settings, events, METRICS, files))


def test_layout_at_desktop_and_phone_width(tmp_path: Path, report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)[0]
    (tmp_path / "probe.html").write_text(page.replace(policy, "").replace("</body>", PROBE + "</body>"))
    (tmp_path / "frames.html").write_text(FRAMES)
    dom = chromium(tmp_path, tmp_path / "frames.html", "--dump-dom", "--window-size=1800,1000")
    lines = re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1].split("\n")[:-1]
    found = {seen["width"]: seen for seen in map(json.loads, lines)}
    assert set(found) == {1280, 400}
    for seen in found.values():
        assert seen["overflow"] == 0
        assert seen["plots"] == 6
        assert seen["texts"] > 40
        assert seen["outside"] == 0
        assert seen["smallest"] >= 11
        # The policy is off in this copy: it is the escaping that keeps the data from running.
        assert seen["title"].startswith("organisation/model-")


def test_dom_of_the_page_itself(tmp_path: Path, report: Path) -> None:
    dom = chromium(tmp_path, report, "--dump-dom")
    assert dom.count("<svg") == 6
    assert re.search(r"<title>(.*?)</title>", dom)[1].startswith("organisation/model-")
    assert "<script" not in dom
    assert "<footer>" in dom


def test_light_and_dark(tmp_path: Path, report: Path) -> None:
    background = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        flags = (f"--blink-settings=preferredColorScheme={number}", "--window-size=1280,2400", f"--screenshot={shot}")
        chromium(tmp_path, report, *flags)
        pixels = imread(shot)[..., :3]
        assert pixels.shape == (2400, 1280, 3)
        background[scheme] = pixels[5, 5].mean()
        plot = pixels[1500:2300, 100:1180].mean(axis=2)
        assert plot.max() - plot.min() > 0.6  # curves and text stand out in both
    assert background["dark"] < 0.15
    assert background["light"] > 0.9
