"""What `/metrics` tells. The broker counts for all front ends, so the totals are the same from each of them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from embedserve.server.wire import RequestReport

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


class Metrics:
    """The counters, histograms and gauges of one broker. The model's label is empty where none known was named."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter("embedserve_requests", "Requests answered.", ["model", "status"], registry=registry)
        self._errors = Counter(
            "embedserve_errors", "Requests answered with an error.", ["model", "code"], registry=registry
        )
        self._texts = Counter("embedserve_texts", "Texts embedded.", ["model"], registry=registry)
        self._tokens = Counter("embedserve_tokens", "Tokens embedded, specials included.", ["model"], registry=registry)
        self._total = Histogram(
            "embedserve_request_seconds",
            "From the first byte of a request to its answer; successful requests.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = Histogram(
            "embedserve_stage_seconds",
            "Parts of it: tokenize; queue (until the first text runs); run (until the last has run); encode.",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch_texts = Histogram(
            "embedserve_batch_texts", "Texts in a batch.", ["model"], buckets=_TEXTS, registry=registry
        )
        self._batch_tokens = Histogram(
            "embedserve_batch_tokens",
            "Tokens in a batch, padding aside.",
            ["model"],
            buckets=_TOKENS,
            registry=registry,
        )
        self._batch_seconds = Histogram(
            "embedserve_batch_seconds", "A batch on the device.", ["model"], buckets=_SECONDS, registry=registry
        )
        self._computed = Counter(
            "embedserve_computed_tokens",
            "Tokens computed, padding included: 1 - embedserve_batch_tokens_sum / this is the share of padding.",
            ["model"],
            registry=registry,
        )
        self._lost_batches = Counter(
            "embedserve_lost_batches", "Batches lost with their engine, or failed in it.", ["model"], registry=registry
        )
        self._queue_texts = Gauge("embedserve_queue_texts", "Texts that wait.", registry=registry)
        self._queue_tokens = Gauge("embedserve_queue_tokens", "Tokens that wait.", registry=registry)
        self._engines = Gauge("embedserve_engines", "Engines that are ready.", registry=registry)

    def observe(self, gauge: str, value: Callable[[], float]) -> None:
        """Let a gauge (``queue_texts``, ``queue_tokens``, ``engines``) be read from `value` at every scrape."""
        {"queue_texts": self._queue_texts, "queue_tokens": self._queue_tokens, "engines": self._engines}[
            gauge
        ].set_function(value)

    def count_request(self, report: RequestReport) -> None:
        """Count one finished HTTP request."""
        model = report.model
        self._requests.labels(model, str(report.status)).inc()
        if report.status >= 400:
            self._errors.labels(model, report.code).inc()
            return
        self._texts.labels(model).inc(report.texts)
        self._tokens.labels(model).inc(report.tokens)
        self._total.labels(model).observe(report.total)
        for stage in ("tokenize", "queue", "run", "encode"):
            self._stages.labels(model, stage).observe(getattr(report, stage))

    def count_batch(self, model: str, texts: int, tokens: int, computed_tokens: int, seconds: float) -> None:
        """Count one batch that has run. `seconds` is the time on the device."""
        self._batch_texts.labels(model).observe(texts)
        self._batch_tokens.labels(model).observe(tokens)
        self._batch_seconds.labels(model).observe(seconds)
        self._computed.labels(model).inc(computed_tokens)

    def count_lost_batch(self, model: str) -> None:
        """Count one batch that gave no vectors."""
        self._lost_batches.labels(model).inc()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)
