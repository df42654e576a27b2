"""What /metrics shows to Prometheus: the requests, their times, and what the engines hold."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glade.infer.engine import EngineStats

_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class HasStats(Protocol):
    """An engine, as far as this file is concerned."""

    def stats(self) -> EngineStats: ...


class Metrics:
    """The metrics of one server; a registry of their own, so that two servers in a process do not share them."""

    def __init__(self, engines: Mapping[str, HasStats]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("glade_requests", "answered requests", ["path", "status"], registry=self._registry)
        self._disconnects = Counter("glade_disconnects", "clients that left early", ["model"], registry=self._registry)
        self._first = self._histogram("glade_time_to_first_token_seconds", "from request to first token", _SLOW)
        self._between = self._histogram("glade_time_between_tokens_seconds", "from token to token of an answer", _FAST)
        self._whole = self._histogram("glade_request_seconds", "from request to the end of its answer", _SLOW)
        self._registry.register(_Engines(engines))

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help, ["model"], buckets=buckets, registry=self._registry)

    def answered(self, path: str, status: int) -> None:
        known = path if path in _PATHS else "page" if path.startswith("/ui") else "other"
        self._requests.labels(known, status).inc()

    def disconnected(self, model: str) -> None:
        self._disconnects.labels(model).inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def next_token(self, model: str, seconds: float) -> None:
        self._between.labels(model).observe(seconds)

    def finished(self, model: str, seconds: float) -> None:
        self._whole.labels(model).observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)


_GAUGES = {
    "slots": "requests that can run at once",
    "running": "requests being decoded",
    "prefilling": "requests whose prompts are being read",
    "waiting": "requests that wait for a slot",
    "state_bytes": "size of the table of states",
    "cache_bytes": "size of the states kept of prompts already read",
    "cached_prefixes": "prompts and parts of prompts whose states are kept",
}
_COUNTERS = {
    "steps": "steps of the engine",
    "prompt_tokens": "tokens of prompts taken in",
    "cached_tokens": "of these, tokens that did not have to be read",
    "generated_tokens": "tokens drawn",
}


class _Engines(Collector):
    """Reads the engines when asked, so that nothing has to be kept in step."""

    def __init__(self, engines: Mapping[str, HasStats]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        stats = {model: engine.stats() for model, engine in self._engines.items()}
        for names, kind in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for name, help in names.items():
                family = kind(f"glade_engine_{name}", help, labels=["model"])
                for model, values in stats.items():
                    family.add_metric([model], getattr(values, name))
                yield family
