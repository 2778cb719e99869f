"""What the server tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxcompress._extras import extra
from jaxcompress.serving.engine import Engine
from jaxcompress.serving.request import Ticket

with extra("serve"):
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))
        name = lambda what: f"jaxcompress_{what}"
        self._requests = Counter(
            name("http_requests"), "Requests by path and status", ["path", "status"], registry=self._registry
        )
        self._first = Histogram(
            name("first_token_seconds"), "Until the first token", buckets=SECONDS, registry=self._registry
        )
        self._whole = Histogram(name("answer_seconds"), "Until the end", buckets=SECONDS, registry=self._registry)
        self._waited = Histogram(name("waiting_seconds"), "Until a row", buckets=SECONDS, registry=self._registry)

    def answered(self, path: str, status: int) -> None:
        """Counts an answer of HTTP."""
        self._requests.labels(path, str(status)).inc()

    def ended(self, ticket: Ticket) -> None:
        """Counts the times of a request."""
        times = ticket.times
        for histogram, at in ((self._waited, times.admitted), (self._first, times.first), (self._whole, times.ended)):
            if at is not None:
                histogram.observe(at - times.submitted)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class _OfEngine:
    """Reads the engine's own counts when asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        gauges = {
            "waiting": ("Requests that wait for a row", lambda one: one.waiting),
            "reading": ("Rows whose prompt is being read", lambda one: one.reading),
            "writing": ("Rows whose answer is being written", lambda one: one.writing),
            "rows": ("Rows of the pool", lambda one: one.rows),
            "state_bytes": ("Bytes of all rows", lambda one: one.nbytes),
        }
        counters = {
            "requests": ("Requests that got a row", lambda counts: counts.requests),
            "prompt_tokens": ("Tokens of prompts", lambda counts: counts.prompt_tokens),
            "known_tokens": ("Of them, those in a known prefix", lambda counts: counts.known_tokens),
            "written_tokens": ("Tokens of answers", lambda counts: counts.written_tokens),
            "failures": ("Calls of the device that failed", lambda counts: counts.failures),
        }
        stats = self._engine.stats()
        for name, (told, of) in gauges.items():
            family = GaugeMetricFamily(f"jaxcompress_{name}", told, labels=["pool"])
            for pool, one in stats.items():
                family.add_metric([pool], of(one))
            yield family
        for name, (told, of) in counters.items():
            family = CounterMetricFamily(f"jaxcompress_{name}", told, labels=["pool"])
            for pool, one in stats.items():
                family.add_metric([pool], of(one.counts))
            yield family
        if self._engine.prefixes is not None:
            yield GaugeMetricFamily(
                "jaxcompress_prefix_bytes", "Prefixes in memory", value=self._engine.prefixes.nbytes
            )
