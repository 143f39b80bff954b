"""Prometheus metrics of one worker: ends of attempts, times of stages and blocks, memory of its GPUs."""

from collections.abc import Iterable
from contextlib import suppress

import pynvml
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

BLOCK_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
STAGE_BUCKETS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0)

log = structlog.get_logger(__name__)


class WorkerMetrics:
    """Its own registry; it counts whether or not anybody reads it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._attempts = Counter(
            "bitwright_attempts",
            "Attempts that ended, by how: succeeded, cancelled, queued (given back), lost, or the code of an error.",
            ["method", "outcome"],
            registry=self.registry,
        )
        self._busy = Gauge("bitwright_worker_busy", "1 while an attempt runs.", registry=self.registry)
        self._stages = Histogram(
            "bitwright_stage_seconds",
            "Time of each stage of jobs that succeeded.",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self._blocks = Histogram(
            "bitwright_block_seconds",
            "Time of each block.",
            ["method"],
            buckets=BLOCK_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(GpuMemory())

    def attempt_begins(self) -> None:
        """The worker is busy from now on."""
        self._busy.set(1)

    def attempt_ends(self, method: str, outcome: str) -> None:
        """Count an attempt by how it ended."""
        self._busy.set(0)
        self._attempts.labels(method, outcome).inc()

    def stage(self, stage: str, seconds: float) -> None:
        """Note the time of a stage."""
        self._stages.labels(stage).observe(seconds)

    def block(self, method: str, seconds: float) -> None:
        """Note the time of a block."""
        self._blocks.labels(method).observe(seconds)

    def serve(self, host: str, port: int) -> None:
        """Serve the metrics from a thread. A port that is taken is logged: it is no reason not to work."""
        try:
            start_http_server(port, host, registry=self.registry)
        except OSError as error:
            log.warning("metrics_not_served", host=host, port=port, reason=error.strerror)
        else:
            log.info("metrics_served", host=host, port=port)


class GpuMemory(Collector):
    """Memory of the GPUs of this machine, asked of the driver when metrics are read: no context is opened on any."""

    def describe(self) -> Iterable[Metric]:
        """The metric without values, so that registering asks the driver nothing."""
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        """The metric now; empty where there is no driver."""
        family = self._family()
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            try:
                for index in range(pynvml.nvmlDeviceGetCount()):
                    memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
                    family.add_metric([str(index), "used"], memory.used)
                    family.add_metric([str(index), "total"], memory.total)
            finally:
                pynvml.nvmlShutdown()
        return [family]

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily("bitwright_gpu_memory_bytes", "Memory of the machine's GPUs.", labels=["gpu", "kind"])
