"""Prometheus metrics of one process of the API."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.api.submission.kept import Kept

COUNTED_SECONDS = 10.0
"""All jobs are counted at most so often, however often metrics are read: to count them reads an index in full."""
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Its own registry, so that several applications can live in one process."""

    def __init__(self, count_jobs: Callable[[], Mapping[str, int]], count_streams: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "bitwright_http_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "bitwright_http_response_start_seconds",
            "Time from a request to the first byte of its answer.",
            ["method", "route"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.submitted = Counter(
            "bitwright_jobs_submitted", "Jobs queued by this process.", ["method"], registry=self.registry
        )
        self.streams = Gauge("bitwright_event_streams", "Event streams open now.", registry=self.registry)
        self.streams.set_function(count_streams)
        self.registry.register(JobCounts(count_jobs))

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request. `route` is the path's template, never the path: ids would make endless series."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)


class JobCounts(Collector):
    """Jobs by status, read from the store when metrics are read, at most once in `COUNTED_SECONDS`."""

    def __init__(self, count_jobs: Callable[[], Mapping[str, int]]) -> None:
        self._count_jobs = Kept(count_jobs, COUNTED_SECONDS)

    def describe(self) -> Iterable[Metric]:
        """The metric without values, so that registering asks the store nothing."""
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        """The metric now."""
        family = self._family()
        for status, count in self._count_jobs().items():
            family.add_metric([status], count)
        return [family]

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily("bitwright_jobs", "Jobs of all tenants by status.", labels=["status"])
