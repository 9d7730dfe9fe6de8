"""A run that was measured, to vary: a 7B with LoRA on an H100."""

from __future__ import annotations

from tunesmith.measurements import Measurement
from tunesmith.version import __version__

RUN = Measurement(
    time=1.0,
    version=__version__,
    card="H100",
    engine="fused",
    method="lora",
    scheme=None,
    model_type="llama",
    parameters=7 * 10**9,
    host=1.0,
    predicted_peak_gb=10.0,
    measured_peak_gb=None,
    predicted_tokens_per_second=1000.0,
    tokens_per_second=800.0,
    steps=100,
)
