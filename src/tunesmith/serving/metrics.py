"""What the server counts, in Prometheus' text form."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tunesmith.serving.catalog import Catalog

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server, in a registry of their own. Labels are names that are served, never what a client wrote.

    What is counted by name goes with the name (`forget`): names that come and go would add up for ever.
    """

    def __init__(self, catalog: Catalog):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tunesmith_requests", "Requests by model and outcome.", ["model", "outcome"], registry=self.registry
        )
        self.errors = Counter(
            "tunesmith_error_responses",
            "Error responses by status and code, also to requests that name no model that is served.",
            ["status", "code"],
            registry=self.registry,
        )
        self.tokens = Counter(
            "tunesmith_tokens",
            "Tokens read (prompt) and written (completion).",
            ["model", "kind"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "tunesmith_first_token_seconds", "From a request's arrival to its first token.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.request = Histogram(
            "tunesmith_request_seconds", "From a request's arrival to the end of its answer.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.swaps = Counter(
            "tunesmith_adapter_changes", "Adapters added, replaced, removed.", ["kind"], registry=self.registry
        )
        self.swap = Histogram(
            "tunesmith_adapter_swap_seconds", "From a read adapter to the first step that may use it.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        engine = catalog.engine
        for name, text, value in (
            ("tunesmith_running_requests", "Rows of the batch.", lambda: engine.running),
            ("tunesmith_waiting_requests", "Requests in the queue.", lambda: engine.waiting),
            ("tunesmith_adapters", "Adapters that clients can name.", lambda: len(catalog.adapters)),
            ("tunesmith_adapter_bytes", "Memory of all adapters on the device.", lambda: engine.bank.bytes),
            ("tunesmith_steps", "Steps of the batch so far.", lambda: engine.steps),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def forget(self, model: str) -> None:
        """Leave out what was counted for a model that is not served any more."""
        for counter in (self.requests, self.tokens):
            counter.remove_by_labels({"model": model})

    def text(self) -> bytes:
        """The page that Prometheus scrapes."""
        return generate_latest(self.registry)
