"""How measured values are written, in the terminal, on the report's page and on a model card alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_measured(metric: Mapping[str, Any]) -> str:
    """A metric of an evaluation with its standard error: `97.5% ± 0.8`, or `1.234 ± 0.056` of one that is no share."""
    value, error = metric["value"], metric.get("stderr")
    if metric.get("share"):
        return f"{value:.1%}" + (f" ± {100 * error:.1f}" if error is not None else "")
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def as_difference(found: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """What the tuned model differs by in `metric`, and how surely: `+12.5 points, p < 0.001`."""
    value = f"{100 * found['difference']:+.1f} points" if metric.get("share") else f"{found['difference']:+.3g}"
    return value if found.get("p") is None else f"{value}, {as_p(found['p'])}"


def as_p(p: float) -> str:
    """A p-value as one writes it: `p = 0.031`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
