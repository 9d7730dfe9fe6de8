"""The report: one self-contained HTML page made from the files of a run folder.

`page.py` renders it, from `facts.py` (status, numbers, events, settings), `evaluations.py` (before and after) and
`plots.py` (curves as inline SVG); `text.py` turns values into words.
"""

from __future__ import annotations

from tunesmith.report.page import write_report

__all__ = ["write_report"]
