"""What Prometheus reads at /metrics: counts and times, no text, no addresses."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "lockkit_requests", "Requests by endpoint and HTTP status.", ["endpoint", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "lockkit_request_seconds", "From a request to the end of its answer.", ["endpoint"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "lockkit_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("lockkit_prompt_tokens", "Tokens of prompts that were run.", registry=registry)
        self.generated_tokens = Counter("lockkit_generated_tokens", "Tokens generated.", registry=registry)
        self.batch_size = Histogram(
            "lockkit_batch_size", "Requests in one step.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.running = Gauge("lockkit_running_requests", "Requests that generate now.", registry=registry)
        self.waiting = Gauge("lockkit_waiting_requests", "Requests that wait for a place.", registry=registry)
        self.fused_kernel = Gauge(
            "lockkit_fused_kernel", "1 where chains run in the kernel of `lockkit kernel`.", registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
