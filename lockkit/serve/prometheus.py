"""Metrics for Prometheus, read at /metrics. They contain no text and no addresses."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server, in their own registry. Times are in seconds."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "lockkit_requests", "Requests by endpoint and HTTP status.", ["endpoint", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "lockkit_request_seconds", "From a request to the end of its answer.", ["endpoint"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "lockkit_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("lockkit_prompt_tokens", "Prompt tokens computed.", registry=registry)
        self.generated_tokens = Counter("lockkit_generated_tokens", "Tokens generated.", registry=registry)
        self.batch_size = Histogram(
            "lockkit_batch_size",
            "Requests in one decoding step.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.running = Gauge("lockkit_running_requests", "Requests that are generating.", registry=registry)
        self.waiting = Gauge("lockkit_waiting_requests", "Requests in the queue.", registry=registry)
        self.fused_kernel = Gauge(
            "lockkit_fused_kernel",
            "1 if chains run in the fused operator of `lockkit kernel`, else 0.",
            registry=registry,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
