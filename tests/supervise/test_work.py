"""The one task: it asks the database for work until there is none."""

from pathlib import Path

import pytest
from sqlalchemy import update

from app.store.attempts import work_waits
from app.store.clock import seconds_from_now
from app.store.models import Job
from app.store.session import Database
from bitwright.errors import Unavailable
from bitwright.job_states import JobStatus
from tests.supervise.bench import Bench, make_context
from workers.supervise.celery_app import worker_app
from workers.supervise.work import work


def test_one_message_is_enough_for_all_jobs(bench: Bench) -> None:
    jobs = [bench.submit("file:a.json:{}") for _ in range(3)]
    assert work(bench.context, "cpu") == 3
    assert {bench.job(job_id).status for job_id in jobs} == {JobStatus.SUCCEEDED}
    assert work(bench.context, "cpu") == 0


def test_a_message_for_another_device_is_dropped(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("", device="cuda")
    assert work(sqlite_bench.context, "cuda") == 0
    assert work(sqlite_bench.context, "cpu") == 0
    assert sqlite_bench.job(job_id).status is JobStatus.QUEUED


def test_what_a_lost_worker_held_is_taken_back_before_the_next_claim(bench: Bench) -> None:
    job_id = bench.submit("file:a.json:{}")
    bench.claim()
    with bench.context.database.transaction() as session:
        assert not work_waits(session, bench.context.device)
        session.execute(update(Job).values(lease_expires_at=seconds_from_now(-1)))
    with bench.context.database.reading() as session:
        assert work_waits(session, bench.context.device)
    assert work(bench.context, "cpu") == 0, "its back-off has not passed"
    assert bench.job(job_id).status is JobStatus.QUEUED
    with bench.context.database.transaction() as session:
        session.execute(update(Job).values(available_at=seconds_from_now(-1)))
    assert work(bench.context, "cpu") == 1
    assert bench.job(job_id).status is JobStatus.SUCCEEDED


def test_a_stopping_worker_takes_no_job(sqlite_bench: Bench) -> None:
    sqlite_bench.submit("")
    sqlite_bench.context.stopping.set()
    assert work(sqlite_bench.context, "cpu") == 0


def test_a_database_that_is_away_ends_the_task_quietly(tmp_path: Path) -> None:
    """No server listens there, so claiming meets a real connection error."""
    database = Database("postgresql+psycopg://x@127.0.0.1:1/x?connect_timeout=1")
    context = make_context(tmp_path, database)
    with pytest.raises(Unavailable), database.transaction() as session:
        session.connection()
    assert work(context, "cpu") == 0
    database.close()


def test_celery_keeps_and_trusts_nothing(sqlite_bench: Bench) -> None:
    conf = worker_app(sqlite_bench.context, lambda: None).conf
    assert conf.accept_content == ["json"]
    assert conf.task_serializer == "json"
    assert conf.result_backend is None
    assert conf.task_ignore_result
    assert not conf.task_acks_late
    assert not conf.task_always_eager
    assert (conf.worker_prefetch_multiplier, conf.worker_concurrency, conf.worker_disable_prefetch) == (1, 1, True)
    assert [queue.name for queue in conf.task_queues] == ["work.cpu"]
    assert conf.broker_transport_options["socket_timeout"]
    assert not conf.worker_enable_remote_control, "who can write to the broker may notify, and no more"
