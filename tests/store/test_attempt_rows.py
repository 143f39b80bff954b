"""Rows of a job and of its attempts, from one attempt to the next: what stays, what is taken back, what is counted."""

from datetime import timedelta

import pytest
from sqlalchemy import update

from app.store.attempts import AttemptWriter, has_ended, work_waits
from app.store.clock import seconds_from_now
from app.store.endings import requeue_lost
from app.store.events import EventRepository
from app.store.jobs import JobRepository
from app.store.models import Job
from app.store.session import Database
from bitwright.errors import CudaError
from bitwright.events import CheckpointEvent, StatusEvent
from bitwright.job_states import DeviceClass, JobStatus
from tests.reports import report
from tests.store.samples import add, block, end_back_off, get, let_lease_run_out, take, tell
from tests.store.test_attempts import fail


def backdate(database: Database, job_id: str, **seconds: float) -> None:
    """Let these times of a job lie so many seconds back."""
    values = {name: seconds_from_now(-ago) for name, ago in seconds.items()}
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(values))


def test_a_job_has_started_when_its_first_attempt_did(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    backdate(database, job_id, created_at=7200)
    held = take(database)
    backdate(database, job_id, started_at=3600)
    started = get(database, tenant, job_id).started_at
    fail(database, held, CudaError("Xid 31"))
    end_back_off(database, job_id)
    take(database, "w2")
    job = get(database, tenant, job_id)
    assert job.started_at == started
    with database.reading() as session:
        first, second = JobRepository(session, tenant).attempts(job_id)
    assert (first.number, second.number) == (1, 2)
    assert job.started_at is not None
    assert first.started_at - job.started_at > timedelta(seconds=3500)
    assert second.started_at >= first.started_at


def test_an_attempt_that_ended_is_not_changed_by_the_next_one(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    first = take(database, "w1")
    tell(database, first, block(0), block(1))
    fail(database, first, CudaError("Xid 31"))
    end_back_off(database, job_id)
    second = take(database, "w2")
    tell(database, second, block(2))
    with database.transaction() as session:
        AttemptWriter(session, job_id, second.attempt).succeed(report(), [])
    with database.reading() as session:
        ended = JobRepository(session, tenant).attempts(job_id)
    assert [(a.worker_id, a.status.value, a.blocks_done) for a in ended] == [
        ("w1", "failed", 2),
        ("w2", "succeeded", 1),
    ]
    assert [a.error and a.error["code"] for a in ended] == ["cuda_error", None]
    assert all(a.finished_at is not None for a in ended)
    job = get(database, tenant, job_id)
    assert (job.blocks_done, job.error, job.worker_id, job.lease_expires_at) == (3, None, None, None)


def test_a_new_attempt_takes_the_last_ones_error_from_the_job(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    fail(database, take(database), CudaError("Xid 31"))
    waiting = get(database, tenant, job_id)
    assert waiting.error is not None
    assert (waiting.finished_at, waiting.worker_id, waiting.lease_expires_at) == (None, None, None)
    end_back_off(database, job_id)
    take(database)
    assert get(database, tenant, job_id).error is None


def test_blocks_done_of_a_job_never_grow_less(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    tell(database, held, block(4))
    tell(database, held, block(1), CheckpointEvent(step=1, total=9, milestone=2))
    assert get(database, tenant, job_id).blocks_done == 5
    tell(database, held, CheckpointEvent(step=2, total=9, milestone=6))
    assert get(database, tenant, job_id).blocks_done == 7
    with database.reading() as session:
        assert [a.blocks_done for a in JobRepository(session, tenant).attempts(job_id)] == [2], "blocks, not milestones"


def test_a_renewed_lease_lasts_so_long_from_now(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database, lease=600)
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).renew(7)
    job = get(database, tenant, job_id)
    assert job.started_at is not None
    assert job.lease_expires_at is not None
    assert 7 <= (job.lease_expires_at - job.started_at).total_seconds() < 60


def test_a_released_job_waits_for_nobody(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    backdate(database, job_id, available_at=-3600)
    with database.transaction() as session:
        assert AttemptWriter(session, job_id, held.attempt).release() is JobStatus.QUEUED
    assert take(database).attempt == 2


def test_a_fault_before_a_release_still_counts(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    for expected in (1, 2):
        fail(database, take(database), CudaError("Xid 31"))
        end_back_off(database, job_id)
        assert get(database, tenant, job_id).fruitless_attempts == expected
    held = take(database)
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).release()
    assert get(database, tenant, job_id).fruitless_attempts == 2


def test_a_block_of_a_later_round_is_progress(database: Database, tenant: str) -> None:
    """On the way to a goal all blocks are made several times: an index alone would look like work of before."""
    job_id = add(database, tenant)
    held = take(database)
    tell(database, held, *(block(index).model_copy(update={"milestone": index}) for index in range(8)))
    assert get(database, tenant, job_id).blocks_done == 8
    fail(database, held, CudaError("Xid 31"))
    end_back_off(database, job_id)
    held = take(database)
    assert get(database, tenant, job_id).fruitless_attempts == 1
    tell(database, held, block(0).model_copy(update={"milestone": 7}))
    assert get(database, tenant, job_id).fruitless_attempts == 1, "told once more"
    tell(database, held, block(0).model_copy(update={"milestone": 8}))
    job = get(database, tenant, job_id)
    assert (job.blocks_done, job.fruitless_attempts) == (9, 0)


@pytest.mark.parametrize("way", ["fail", "cancelled"])
def test_a_cancelled_attempt_has_no_error_on_the_job(database: Database, tenant: str, way: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    with database.transaction() as session:
        JobRepository(session, tenant).cancel(job_id)
    with database.transaction() as session:
        writer = AttemptWriter(session, job_id, held.attempt)
        if way == "fail":
            assert writer.fail(CudaError("late")) is JobStatus.CANCELLED
        else:
            writer.cancelled()
    job = get(database, tenant, job_id)
    assert (job.status.value, job.error, job.worker_id, job.lease_expires_at) == ("cancelled", None, None, None)
    assert job.finished_at is not None
    with database.reading() as session:
        last = EventRepository(session, tenant).page(job_id, 0, 1000)[-1].event
    assert last == StatusEvent(status=JobStatus.CANCELLED, attempt=1)
    with database.reading() as session:
        (attempt,) = JobRepository(session, tenant).attempts(job_id)
    assert (attempt.status.value, attempt.finished_at is not None) == ("cancelled", True)


def test_work_waits_where_a_claim_would_find_it(database: Database, tenant: str) -> None:
    def waits(device: DeviceClass = DeviceClass.CPU) -> bool:
        with database.reading() as session:
            return work_waits(session, device)

    assert waits() is False
    job_id = add(database, tenant, device="cpu")
    assert (waits(), waits(DeviceClass.CUDA)) == (True, False)
    held = take(database)
    assert waits() is False
    let_lease_run_out(database, job_id)
    assert (waits(), waits(DeviceClass.CUDA)) == (True, True), "whoever is idle may sweep"
    with database.transaction() as session:
        requeue_lost(session)
    assert waits() is False, "it waits for its back-off"
    end_back_off(database, job_id)
    assert waits() is True
    with database.reading() as session:
        assert has_ended(session, job_id) is False
        assert has_ended(session, "job_" + "0" * 26) is True
    with database.transaction() as session:
        JobRepository(session, tenant).cancel(job_id)
    with database.reading() as session:
        assert has_ended(session, job_id) is True
    assert (waits(), held.attempt) == (False, 1)
