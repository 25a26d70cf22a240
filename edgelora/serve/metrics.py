"""What /metrics tells, in Prometheus' format.

Label values come from the adapters that there are, never from what a client wrote, and beyond `MAX_LABELS` of them the
rest is counted as "other".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MAX_LABELS = 100
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._labels: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"edgelora_{name}", text, labels, registry=self._registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"edgelora_{name}", text, registry=self._registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"edgelora_{name}", text, ("adapter",), buckets=SECONDS, registry=self._registry)

        self.requests = counter("requests", "Requests that were answered, by what came of them.", "adapter", "outcome")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "adapter")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts that were in the KV cache.", "adapter")
        self.completion_tokens = counter("completion_tokens", "Tokens that were written.", "adapter")
        self.latency = histogram("request_seconds", "From a request to the end of its reply.")
        self.first_token = histogram("first_token_seconds", "From a request to its first token.")
        self.waiting = gauge("requests_waiting", "Requests that wait for a place.")
        self.running = gauge("requests_running", "Replies that are being written.")
        self.up = gauge("engine_up", "Whether the engine's process can answer.")
        self.restarts = gauge("engine_restarts", "How often the engine's process was started again.")
        self.in_memory = gauge("adapters_in_memory", "Adapters whose weights are in memory.")
        self.adapter_bytes = gauge("adapter_bytes", "Of adapter weights in memory.")

    def label(self, adapter: str) -> str:
        """An adapter's name as a label."""
        if adapter not in self._labels and len(self._labels) >= MAX_LABELS:
            return "other"
        self._labels.add(adapter)
        return adapter

    def finished(self, adapter: str, account: Mapping[str, Any], seconds: float) -> None:
        """A reply came to its end."""
        label = self.label(adapter)
        self.requests.labels(label, account["finish_reason"]).inc()
        self.prompt_tokens.labels(label).inc(account["prompt_tokens"])
        self.cached_tokens.labels(label).inc(account["cached_tokens"])
        self.completion_tokens.labels(label).inc(account["completion_tokens"])
        self.latency.labels(label).observe(seconds)
        if account["seconds_to_first_token"]:
            self.first_token.labels(label).observe(account["seconds_to_first_token"])

    def failed(self, adapter: str, outcome: str) -> None:
        self.requests.labels(self.label(adapter), outcome).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
