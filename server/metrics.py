"""What `/metrics` tells. The broker counts for all front ends, so the totals are the same from each of them.

The broker handles every request of the server, so counting must cost next to nothing: prometheus_client's own counters
look their labels up under a lock, which took 17 µs a request. Here a counter is a number in a dict, and the library
only writes the text.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from embedserve.server.wire import RequestReport

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


class _Counter:
    """Numbers that only grow, by the values of their labels."""

    def __init__(self, name: str, help: str, *labels: str) -> None:  # noqa: A002 - the format's own word
        self._facts = (name, help)
        self._labels = labels
        self._counts: dict[tuple[str, ...], float] = defaultdict(float)

    def add(self, number: float, *labels: str) -> None:
        self._counts[labels] += number

    def collect(self) -> Metric:
        family = CounterMetricFamily(*self._facts, labels=self._labels)
        for labels, count in self._counts.items():
            family.add_metric(labels, count)
        return family


class _Histogram:
    """How many values came into each bucket, by the values of their labels. `bounds` are the buckets' upper ends."""

    def __init__(self, name: str, help: str, bounds: Sequence[float], *labels: str) -> None:  # noqa: A002
        self._facts = (name, help)
        self._labels = labels
        self._bounds = bounds
        self._counts: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * (len(bounds) + 1))
        self._sums: dict[tuple[str, ...], float] = defaultdict(float)

    def observe(self, value: float, *labels: str) -> None:
        self._counts[labels][bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def collect(self) -> Metric:
        family = HistogramMetricFamily(*self._facts, labels=self._labels)
        ends = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for labels, counts in self._counts.items():
            family.add_metric(labels, list(zip(ends, accumulate(counts), strict=True)), self._sums[labels])
        return family


class _Reading:
    """A number that is looked up when it is asked for."""

    def __init__(self, family: type[GaugeMetricFamily | CounterMetricFamily], name: str, help: str) -> None:  # noqa: A002
        self._family = family
        self._facts = (name, help)
        self.value: Callable[[], float] | None = None

    def collect(self) -> Metric:
        return self._family(*self._facts, value=None if self.value is None else self.value())


class Metrics(Collector):
    """The counters, histograms and gauges of one broker. The model's label is empty where none known was named."""

    def __init__(self) -> None:
        self._requests = _Counter("embedserve_requests", "Requests answered.", "model", "status")
        self._errors = _Counter("embedserve_errors", "Requests answered with an error.", "model", "code")
        self._texts = _Counter("embedserve_texts", "Texts embedded.", "model")
        self._tokens = _Counter("embedserve_tokens", "Tokens embedded, specials included.", "model")
        self._repeats = _Counter(
            "embedserve_repeated_texts",
            "Texts that got the answer of an equal one: in their own request, or waiting or running in another.",
            "model",
        )
        self._hits = _Counter("embedserve_cache_hits", "Texts answered from the cache.", "model")
        self._misses = _Counter("embedserve_cache_misses", "Texts looked for in the cache in vain.", "model")
        self._total = _Histogram(
            "embedserve_request_seconds",
            "From the first byte of a request to its answer; successful requests.",
            _SECONDS,
            "model",
        )
        self._stages = _Histogram(
            "embedserve_stage_seconds",
            "Parts of it: tokenize; queue (until the first text runs); run (until the last has run); encode.",
            _SECONDS,
            "model",
            "stage",
        )
        self._batch_texts = _Histogram("embedserve_batch_texts", "Texts in a batch.", _TEXTS, "model")
        self._batch_tokens = _Histogram(
            "embedserve_batch_tokens", "Tokens in a batch, padding aside.", _TOKENS, "model"
        )
        self._batch_seconds = _Histogram("embedserve_batch_seconds", "A batch on the device.", _SECONDS, "model")
        self._computed = _Counter(
            "embedserve_computed_tokens",
            "Tokens computed, padding included: 1 - embedserve_batch_tokens_sum / this is the share of padding.",
            "model",
        )
        self._lost_batches = _Counter(
            "embedserve_lost_batches", "Batches lost with their engine, or failed in it.", "model"
        )
        self._readings = {
            "queue_texts": _Reading(GaugeMetricFamily, "embedserve_queue_texts", "Texts that wait."),
            "queue_tokens": _Reading(GaugeMetricFamily, "embedserve_queue_tokens", "Tokens that wait."),
            "engines": _Reading(GaugeMetricFamily, "embedserve_engines", "Engines that are ready."),
            "cache_bytes": _Reading(GaugeMetricFamily, "embedserve_cache_bytes", "Bytes that the cache holds."),
            "cache_evictions": _Reading(
                CounterMetricFamily, "embedserve_cache_evictions", "Results that the cache dropped to make room."
            ),
        }
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def observe(self, reading: str, value: Callable[[], float]) -> None:
        """Let ``queue_texts``, ``queue_tokens``, ``engines``, ``cache_bytes`` or ``cache_evictions`` be read from
        `value` at every scrape; without that they are left out."""
        self._readings[reading].value = value

    def count_request(self, report: RequestReport) -> None:
        """Count one finished HTTP request."""
        model = report.model
        self._requests.add(1, model, str(report.status))
        if report.status >= 400:
            self._errors.add(1, model, report.code)
            return
        self._texts.add(report.texts, model)
        self._tokens.add(report.tokens, model)
        self._total.observe(report.total, model)
        self._stages.observe(report.tokenize, model, "tokenize")
        self._stages.observe(report.queue, model, "queue")
        self._stages.observe(report.run, model, "run")
        self._stages.observe(report.encode, model, "encode")

    def count_repeats(self, model: str, texts: int) -> None:
        """Count texts that got the answer of an equal one."""
        if texts:
            self._repeats.add(texts, model)

    def count_look_ups(self, model: str, hits: int, misses: int) -> None:
        """Count the texts of one request that were and were not in the cache."""
        self._hits.add(hits, model)
        self._misses.add(misses, model)

    def count_batch(self, model: str, texts: int, tokens: int, computed_tokens: int, seconds: float) -> None:
        """Count one batch that has run. `seconds` is the time on the device."""
        self._batch_texts.observe(texts, model)
        self._batch_tokens.observe(tokens, model)
        self._batch_seconds.observe(seconds, model)
        self._computed.add(computed_tokens, model)

    def count_lost_batch(self, model: str) -> None:
        """Count one batch that gave no vectors."""
        self._lost_batches.add(1, model)

    def collect(self) -> Iterable[Metric]:
        """All that have been counted or can be read, for prometheus_client."""
        for metric in (*vars(self).values(), *self._readings.values()):
            if isinstance(metric, _Counter | _Histogram | _Reading):
                family = metric.collect()
                if family.samples:
                    yield family

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)
