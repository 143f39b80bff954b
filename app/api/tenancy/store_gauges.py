"""Gauges that the store answers: what waits and for how long, live workers, and what each tenant stores."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.api.metrics import COUNTED_SECONDS
from app.api.submission.kept import Kept
from app.store.session import Database
from app.store.tenancy.quotas import stored_bytes_by_tenant
from app.store.workers import Waiting, count_live, waiting_times

STORED_SECONDS = 60.0
"""To sum what is stored reads an index in full."""


@dataclass(frozen=True)
class Figures:
    """Figures of one look at the store."""

    waiting: dict[str, Waiting] = field(default_factory=dict)
    workers: dict[str, int] = field(default_factory=dict)


class StoreGauges(Collector):
    """Asked of the store when metrics are read, at most once in `COUNTED_SECONDS`.

    by_tenant   whether tenants are named, with what they store
    """

    def __init__(self, database: Database, *, by_tenant: bool) -> None:
        self._database = database
        self._by_tenant = by_tenant
        self._figures = Kept(self._look, COUNTED_SECONDS)
        self._stored = Kept(self._sum, STORED_SECONDS)

    def describe(self) -> Iterable[Metric]:
        """The metrics without values, so that registering asks the store nothing."""
        return self._families(Figures(), {})

    def collect(self) -> Iterable[Metric]:
        """The metrics now."""
        return self._families(self._figures(), self._stored() if self._by_tenant else {})

    def _look(self) -> Figures:
        with self._database.reading() as session:
            return Figures(waiting_times(session), count_live(session))

    def _sum(self) -> dict[str, int]:
        with self._database.reading() as session:
            return stored_bytes_by_tenant(session)

    @staticmethod
    def _families(figures: Figures, stored: dict[str, int]) -> list[GaugeMetricFamily]:
        jobs = GaugeMetricFamily(
            "bitwright_waiting_jobs", "Jobs that a worker of the class could begin now.", labels=["device"]
        )
        oldest = GaugeMetricFamily(
            "bitwright_queue_age_seconds",
            "How long the oldest of those has waited; 0: there is none.",
            labels=["device"],
        )
        for device, waiting in figures.waiting.items():
            jobs.add_metric([device], waiting.jobs)
            oldest.add_metric([device], waiting.oldest_seconds)
        workers = GaugeMetricFamily("bitwright_live_workers", "Workers seen within 90 seconds.", labels=["device"])
        for device, count in figures.workers.items():
            workers.add_metric([device], count)
        bytes_stored = GaugeMetricFamily(
            "bitwright_tenant_stored_bytes", "Artifacts and uploads, by the tenant's id.", labels=["tenant"]
        )
        for tenant, size in sorted(stored.items()):
            bytes_stored.add_metric([tenant], size)
        return [jobs, oldest, workers, bytes_stored]
