"""The sweep's rounds: lost jobs, idle workers, rows past their retention."""

import threading
from dataclasses import replace

import pytest
from sqlalchemy import update

from app.store.clock import seconds_from_now
from app.store.models import Job
from app.store.workers import register
from bitwright.errors import Unavailable
from bitwright.job_states import DeviceClass, JobStatus
from tests.supervise.bench import Bench, wait_for
from workers import sweep as sweep_module
from workers.sweep import Sweep, messages_due, run

CPU, CUDA = DeviceClass.CPU, DeviceClass.CUDA


@pytest.fixture
def notified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices notified, in place of messages; `test_queue.py` has the real ones."""
    heard: list[str] = []

    def hear(device: str, alive: frozenset[DeviceClass], *, times: int) -> None:
        assert DeviceClass(device) in alive
        heard.extend([device] * times)

    monkeypatch.setattr(sweep_module, "notify_workers", hear)
    return heard


def make_sweep(bench: Bench, holder: str = "one", **settings: object) -> Sweep:
    context = bench.context
    return Sweep(context.settings.model_copy(update=settings), context.database, context.blobs, holder)


@pytest.mark.parametrize(
    ("jobs", "idle", "expected"),
    [
        ({}, [CPU], {CPU: 0}),
        ({"any": 5}, [], {}),
        ({"any": 1}, [CPU, CPU, CUDA], {CPU: 1, CUDA: 1}),
        ({"any": 5}, [CPU, CPU], {CPU: 2}),
        ({"cuda": 5}, [CPU, CPU], {CPU: 0}),
        ({"cuda": 1, "cpu": 1, "any": 1}, [CPU, CPU, CPU], {CPU: 2}),
    ],
)
def test_at_most_one_message_per_idle_worker(
    jobs: dict[str, int], idle: list[DeviceClass], expected: dict[DeviceClass, int]
) -> None:
    assert messages_due(jobs, idle) == expected


def test_a_lost_job_is_taken_back_and_an_idle_worker_is_notified(bench: Bench, notified: list[str]) -> None:
    job_id = bench.submit("")
    bench.claim()
    sweep = make_sweep(bench)
    sweep.round()
    assert bench.job(job_id).status is JobStatus.RUNNING
    with bench.context.database.transaction() as session:
        register(session, "idle-worker", CPU)
        session.execute(update(Job).values(lease_expires_at=seconds_from_now(-1)))
    sweep.round()
    assert bench.job(job_id).status is JobStatus.QUEUED
    assert notified == [], "its back-off has not passed"
    with bench.context.database.transaction() as session:
        session.execute(update(Job).values(available_at=seconds_from_now(-1)))
    sweep.round()
    assert notified == ["cpu"]


def test_of_many_sweeps_one_works_until_it_falls_silent(bench: Bench, notified: list[str]) -> None:
    first, second = (make_sweep(bench, holder, sweep_interval_seconds=0.4) for holder in ("first", "second"))
    assert first.round()
    assert not second.round()
    assert first.round()
    wait_for(second.round, 5, what="the second sweep's turn")
    assert not first.round()


def test_no_error_of_a_round_ends_the_sweep(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = iter([Unavailable("away"), OSError("disk"), RuntimeError("a bucket's own fault")])
    stopping = threading.Event()

    def fail(_: Sweep) -> bool:
        fault = next(faults, None)
        if fault is None:
            stopping.set()
            return True
        raise fault

    monkeypatch.setattr(Sweep, "round", fail)
    run(make_sweep(bench), 0.01, stopping)
    assert next(faults, None) is None


def test_retention(bench: Bench) -> None:
    """A final job goes when its time has passed, and only where there is a limit."""
    kept, old = (bench.submit("file:a.json:{}") for _ in range(2))
    assert [bench.run(), bench.run()] == [JobStatus.SUCCEEDED] * 2
    with bench.context.database.transaction() as session:
        session.execute(update(Job).where(Job.id == old).values(finished_at=seconds_from_now(-3 * 86_400)))
    make_sweep(bench).throw_away()
    assert bench.job(old).status is JobStatus.SUCCEEDED, "without a limit, jobs are kept"
    make_sweep(bench, job_retention_days=2).throw_away()
    assert bench.job(kept).status is JobStatus.SUCCEEDED
    with pytest.raises(Exception, match="there is no job"):
        bench.job(old)


def test_a_bench_of_another_device_is_not_notified(bench: Bench, notified: list[str]) -> None:
    bench.submit("", device="cuda")
    with bench.context.database.transaction() as session:
        register(session, "idle-worker", CPU)
    make_sweep(replace(bench)).round()
    assert notified == []
