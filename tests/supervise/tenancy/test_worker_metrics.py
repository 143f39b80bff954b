"""Metrics of a worker: what its attempts did, as Prometheus reads it over a real port."""

from dataclasses import replace
from decimal import Decimal

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.store.attempts import claim
from bitwright.job_states import JobStatus
from tests.servers import free_port
from tests.supervise.bench import Bench
from workers.supervise.attempt.attempt_runner import supervise
from workers.supervise.metrics import WorkerMetrics
from workers.supervise.tenancy import terms_of


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


def test_a_job_costs_its_time_at_the_workers_price(sqlite_bench: Bench) -> None:
    """A price so high that some tenths of a second are money."""
    prices = {"price_per_cpu_hour": Decimal(1_000_000), "price_currency": "EUR"}
    settings = sqlite_bench.context.settings.model_copy(update=prices)
    bench = replace(sqlite_bench, context=replace(sqlite_bench.context, settings=settings))
    job_id = bench.submit("sleep:0.2,file:a.bin:x")
    with bench.context.database.transaction() as session:
        terms = terms_of(settings, bench.context.device, devices=1)
        held = claim(session, worker_id="w", device_class=bench.context.device, lease_seconds=60, terms=terms)
    assert held is not None
    assert supervise(bench.context, held) is JobStatus.SUCCEEDED
    (attempt,) = bench.attempts(job_id)
    assert attempt.finished_at is not None
    seconds = (attempt.finished_at - attempt.started_at).total_seconds()
    cost = (bench.job(job_id).report or {})["cost"]
    assert cost["currency"] == "EUR"
    assert float(cost["amount"]) == pytest.approx(seconds * 1_000_000 / 3600, rel=0.2)


def test_a_port_that_is_taken_is_no_reason_not_to_work() -> None:
    port = free_port()
    first = WorkerMetrics()
    first.serve("127.0.0.1", port)
    WorkerMetrics().serve("127.0.0.1", port)
    assert samples(port)["bitwright_worker_busy",] == 0
