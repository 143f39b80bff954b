"""Metrics of a worker: what its attempts did, as Prometheus reads it over a real port."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bitwright.job_states import JobStatus
from tests.servers import free_port
from tests.supervise.bench import Bench
from workers.supervise.metrics import WorkerMetrics


def samples(port: int) -> dict[tuple[str, ...], float]:
    """Value of each sample by its name and the values of its labels."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_ends_stages_and_blocks_are_counted(sqlite_bench: Bench) -> None:
    port = free_port()
    sqlite_bench.context.metrics.serve("127.0.0.1", port)
    sqlite_bench.submit("block,block,file:a.bin:x")
    assert sqlite_bench.run() is JobStatus.SUCCEEDED
    sqlite_bench.submit("block,fail:invalid_dataset")
    assert sqlite_bench.run() is JobStatus.FAILED
    told = samples(port)
    assert told["bitwright_attempts_total", "rtn", "succeeded"] == 1
    assert told["bitwright_attempts_total", "rtn", "invalid_dataset"] == 1
    assert told["bitwright_block_seconds_count", "rtn"] == 3
    assert abs(told["bitwright_block_seconds_sum", "rtn"] - 0.3) < 1e-9
    assert told["bitwright_stage_seconds_sum", "total"] == 1.0
    assert told["bitwright_worker_busy",] == 0


def test_a_port_that_is_taken_is_no_reason_not_to_work() -> None:
    port = free_port()
    first = WorkerMetrics()
    first.serve("127.0.0.1", port)
    WorkerMetrics().serve("127.0.0.1", port)
    assert samples(port)["bitwright_worker_busy",] == 0
