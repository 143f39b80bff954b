from collections.abc import Callable

import pytest
from sqlalchemy import update

from app.domain.attempt_lines import AttemptEvent
from app.store.artifacts import ArtifactRepository
from app.store.attempts import AttemptWriter, Claim
from app.store.endings import requeue_lost
from app.store.events import EventRepository, StoredEvent, events_after
from app.store.jobs import JobRepository
from app.store.models import Job
from app.store.session import Database
from app.store.status import enter
from bitwright.errors import (
    AttemptKilled,
    AttemptSuperseded,
    BitwrightError,
    CudaError,
    InvalidDataset,
    NumericalFailure,
    OutOfGpuMemory,
    OutOfMemory,
    RequirementMissed,
    TimeLimitExceeded,
)
from bitwright.events import CheckpointEvent, LogEvent, MetricEvent, StatusEvent, WarningEvent
from bitwright.job_states import FINAL_STATUSES, DeviceClass, JobStatus
from tests.reports import report
from tests.store.samples import (
    add,
    artifact,
    block,
    end_back_off,
    get,
    let_lease_run_out,
    progress,
    request,
    take,
    tell,
    try_take,
)

MAX_RETRIES_WITHOUT_PROGRESS = 3
"""After the first attempt: four in all."""
ALLOWED = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("running", "queued"),
    ("failed", "queued"),
    ("cancelled", "queued"),
}
"""Every move from one status to another."""


def fail(database: Database, held: Claim, error: BitwrightError) -> JobStatus:
    with database.transaction() as session:
        return AttemptWriter(session, held.job_id, held.attempt).fail(error)


def events_of(database: Database, tenant: str, job_id: str) -> list[StoredEvent]:
    with database.reading() as session:
        return EventRepository(session, tenant).page(job_id, 0, 1000)


def statuses(database: Database, tenant: str, job_id: str) -> list[str]:
    stored = events_of(database, tenant, job_id)
    return [event.event.status.value for event in stored if isinstance(event.event, StatusEvent)]


def test_a_claim_gives_the_request_and_holds_the_job(database: Database, tenant: str) -> None:
    job_id = add(database, tenant, bits=3, device="cpu")
    held = take(database, "w7", lease=60)
    job = get(database, tenant, job_id)
    assert (held.job_id, held.tenant_id, held.attempt, held.micro_batch_divisor) == (job_id, tenant, 1, 1)
    assert held.request.quantization.bits == 3
    assert held.created_at == job.created_at
    assert (job.status, job.attempt, job.worker_id) == (JobStatus.RUNNING, 1, "w7")
    assert job.started_at is not None
    assert job.lease_expires_at is not None
    assert 55 < (job.lease_expires_at - job.started_at).total_seconds() < 65
    assert try_take(database) is None
    assert statuses(database, tenant, job_id) == ["queued", "running"]


def test_a_worker_takes_only_what_it_can_run(database: Database, tenant: str) -> None:
    cuda, cpu = add(database, tenant, device="cuda"), add(database, tenant, device="cpu")
    either = add(database, tenant)
    assert [take(database).job_id for _ in range(2)] == [cpu, either]
    assert try_take(database) is None
    assert take(database, device=DeviceClass.CUDA).job_id == cuda


def test_order_is_priority_then_the_least_served_tenant_then_age(
    database: Database, tenant: str, stranger: str
) -> None:
    first, second = add(database, tenant), add(database, tenant)
    theirs = add(database, stranger)
    low, high = add(database, stranger, priority=-1), add(database, tenant, priority=1)
    assert [take(database).job_id for _ in range(5)] == [high, theirs, first, second, low]


def test_events_are_numbered_after_the_jobs_latest(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    odd: list[AttemptEvent] = [WarningEvent(code="c", message="m\0"), LogEvent(event="e", fields={"a": None})]
    sent: list[AttemptEvent] = [progress(1), *odd, block(0)]
    with database.transaction() as session:
        writer = AttemptWriter(session, job_id, held.attempt)
        writer.append(sent[:2])
        writer.append([])
        writer.append(sent[2:])
    stored = events_of(database, tenant, job_id)
    assert [event.sequence for event in stored] == [1, 2, 3, 4, 5, 6]
    assert [event.event for event in stored[2:]] == sent
    assert [event.attempt for event in stored] == [0, 1, 1, 1, 1, 1]
    job = get(database, tenant, job_id)
    assert job.last_event == 6
    assert job.progress == progress(1).model_dump(mode="json")
    with database.reading() as session:
        assert [a.blocks_done for a in JobRepository(session, tenant).attempts(job_id)] == [1]
        after = EventRepository(session, tenant).page(job_id, 4, 1)
    assert [event.sequence for event in after] == [5]


def test_events_of_many_jobs_come_after_each_ones_own_number(database: Database, tenant: str) -> None:
    with database.transaction() as session:
        jobs = [JobRepository(session, tenant).add(request()).id for _ in range(250)]
    held = take(database)
    cursors = dict.fromkeys(jobs, 1) | {jobs[-1]: 0, jobs[1]: 99}
    with database.reading() as session:
        found = events_after(session, cursors, 100)
        assert [(event.job_id, event.sequence) for event in found] == [(held.job_id, 2), (jobs[-1], 1)]
        assert len(events_after(session, dict.fromkeys(jobs, 0), 100)) == 100
        assert len(events_after(session, dict.fromkeys(jobs, 0), 1000)) == 251
        assert events_after(session, {}, 10) == []


def test_success_stores_report_artifacts_status_and_event_together(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    with database.transaction() as session:
        files = [artifact("b.txt"), artifact("a.txt", "b" * 64, 2**40)]
        AttemptWriter(session, job_id, held.attempt).succeed(report(), files)
    job = get(database, tenant, job_id)
    assert (job.status, job.worker_id, job.lease_expires_at) == (JobStatus.SUCCEEDED, None, None)
    assert job.finished_at is not None
    assert job.report == report().model_dump(mode="json")
    with database.reading() as session:
        stored = ArtifactRepository(session, tenant).of_job(job_id)
        assert [(a.path, a.size) for a in stored] == [("a.txt", 2**40), ("b.txt", 3)]
        assert ArtifactRepository(session, tenant).get(stored[0].id).sha256 == "b" * 64
        attempt = JobRepository(session, tenant).attempts(job_id)[0]
    assert (attempt.status, attempt.error, attempt.worker_id) == (JobStatus.SUCCEEDED, None, "w1")
    assert statuses(database, tenant, job_id) == ["queued", "running", "succeeded"]


def test_a_failed_transaction_leaves_nothing(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)

    def end_and_fail() -> None:
        with database.transaction() as session:
            writer = AttemptWriter(session, job_id, held.attempt)
            writer.append([block(0)])
            writer.succeed(report(), [artifact()])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        end_and_fail()
    assert statuses(database, tenant, job_id) == ["queued", "running"]
    assert get(database, tenant, job_id).last_event == 2
    with database.reading() as session:
        assert ArtifactRepository(session, tenant).of_job(job_id) == []


def test_a_number_that_is_not_finite_is_refused_by_name(database: Database, tenant: str) -> None:
    add(database, tenant)
    held = take(database)
    for value in (float("nan"), float("inf")):
        with database.transaction() as session, pytest.raises(NumericalFailure, match="value"):
            AttemptWriter(session, held.job_id, held.attempt).append([MetricEvent(name="kl", value=value)])
        with database.transaction() as session, pytest.raises(NumericalFailure, match=r"seconds\.total"):
            AttemptWriter(session, held.job_id, held.attempt).succeed(report(seconds={"total": value}), [])


WRITES: dict[str, Callable[[AttemptWriter], object]] = {
    "renew": lambda writer: writer.renew(60),
    "append": lambda writer: writer.append([block(0)]),
    "succeed": lambda writer: writer.succeed(report(), [artifact()]),
    "fail": lambda writer: writer.fail(CudaError("late")),
    "cancelled": lambda writer: writer.cancelled(),
    "release": lambda writer: writer.release(),
}


@pytest.mark.parametrize("taken_over", [False, True], ids=["lease ran out", "another holds it"])
def test_a_superseded_attempt_writes_nothing(database: Database, tenant: str, taken_over: bool) -> None:
    job_id = add(database, tenant)
    held = take(database, "sleeper")
    let_lease_run_out(database, job_id)
    if taken_over:
        with database.transaction() as session:
            assert requeue_lost(session) == [(job_id, "any")]
        end_back_off(database, job_id)
        assert take(database, "next").attempt == 2
    before = vars(get(database, tenant, job_id)) | {"_sa_instance_state": None}
    events = events_of(database, tenant, job_id)
    for write in WRITES.values():
        with pytest.raises(AttemptSuperseded), database.transaction() as session:
            write(AttemptWriter(session, job_id, held.attempt))
    assert vars(get(database, tenant, job_id)) | {"_sa_instance_state": None} == before
    assert events_of(database, tenant, job_id) == events
    with database.reading() as session:
        assert ArtifactRepository(session, tenant).of_job(job_id) == []


@pytest.mark.parametrize("status", sorted(FINAL_STATUSES))
def test_nothing_is_written_after_the_end(database: Database, tenant: str, status: JobStatus) -> None:
    job_id = add(database, tenant)
    held = take(database)
    with database.transaction() as session:
        writer = AttemptWriter(session, job_id, held.attempt)
        if status is JobStatus.SUCCEEDED:
            writer.succeed(report(), [])
        elif status is JobStatus.FAILED:
            writer.fail(InvalidDataset("x"))
        else:
            writer.cancelled()
    for write in WRITES.values():
        with pytest.raises(AttemptSuperseded), database.transaction() as session:
            write(AttemptWriter(session, job_id, held.attempt))
    assert statuses(database, tenant, job_id) == ["queued", "running", status.value]


@pytest.mark.parametrize("origin", JobStatus)
def test_only_listed_transitions_happen(database: Database, tenant: str, origin: JobStatus) -> None:
    path = {JobStatus.QUEUED: [], JobStatus.RUNNING: [JobStatus.RUNNING]}
    for target in JobStatus:
        job_id = add(database, tenant)
        for step in path.get(origin, [JobStatus.RUNNING, origin]):
            assert move(database, job_id, step)
        assert move(database, job_id, target) is ((origin.value, target.value) in ALLOWED)


def move(database: Database, job_id: str, status: JobStatus) -> bool:
    with database.transaction() as session:
        lease = Job.created_at if status is JobStatus.RUNNING else None
        return enter(session, status, Job.id == job_id, values={"lease_expires_at": lease}) is not None


def test_an_error_of_the_input_fails_the_job_at_once(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    error = InvalidDataset("line 3 is no JSON", field="calibration.dataset", value=b"\0", hint="send JSONL")
    assert fail(database, take(database), error) is JobStatus.FAILED
    job = get(database, tenant, job_id)
    assert job.error is not None
    assert (job.error["code"], job.error["field"]) == ("invalid_dataset", "calibration.dataset")
    last = events_of(database, tenant, job_id)[-1].event
    assert isinstance(last, StatusEvent)
    assert last.error is not None
    assert last.error.hint == "send JSONL"
    assert try_take(database) is None


@pytest.mark.parametrize("error", [OutOfGpuMemory("79 GiB used"), OutOfMemory("rss")])
def test_out_of_memory_is_tried_once_more_with_smaller_batches(
    database: Database, tenant: str, error: BitwrightError
) -> None:
    job_id = add(database, tenant)
    assert fail(database, take(database), error) is JobStatus.QUEUED
    again = take(database)
    assert (again.attempt, again.micro_batch_divisor) == (2, 2)
    tell(database, again, block(0))
    assert fail(database, again, error) is JobStatus.FAILED
    with database.transaction() as session:
        JobRepository(session, tenant).retry(job_id)
    assert take(database).micro_batch_divisor == 1


def test_a_checkpoint_of_training_is_progress_and_the_same_one_again_is_none(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    blocks = [block(index) for index in range(3)]
    for attempt in range(12):
        held = take(database)
        tell(database, held, *(blocks if attempt == 0 else ()))
        checkpoint = CheckpointEvent(step=10 * attempt, total=1000, milestone=3 + attempt)
        tell(database, held, checkpoint)
        assert fail(database, held, AttemptKilled("signal 9")) is JobStatus.QUEUED
        end_back_off(database, job_id)
    for _ in range(MAX_RETRIES_WITHOUT_PROGRESS + 1):
        held = take(database)
        tell(database, held, checkpoint)
        status = fail(database, held, AttemptKilled("signal 9"))
        end_back_off(database, job_id)
    assert status is JobStatus.FAILED


def test_a_time_limit_is_not_tried_again(database: Database, tenant: str) -> None:
    add(database, tenant)
    assert fail(database, take(database), TimeLimitExceeded("1 h")) is JobStatus.FAILED


def test_a_fault_waits_longer_each_time_and_then_fails(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    for number in range(1, MAX_RETRIES_WITHOUT_PROGRESS + 1):
        assert fail(database, take(database), AttemptKilled("signal 9")) is JobStatus.QUEUED
        job = get(database, tenant, job_id)
        assert 0 <= (job.available_at - job.updated_at).total_seconds() - 2**number < 1
        assert try_take(database) is None
        end_back_off(database, job_id)
    assert fail(database, take(database), AttemptKilled("signal 9")) is JobStatus.FAILED
    with database.reading() as session:
        attempts = JobRepository(session, tenant).attempts(job_id)
    assert [a.number for a in attempts] == list(range(1, MAX_RETRIES_WITHOUT_PROGRESS + 2))
    assert [a.error and a.error["code"] for a in attempts] == ["attempt_killed"] * len(attempts)
    assert all(a.finished_at is not None for a in attempts)


def test_attempts_that_finish_a_new_block_do_not_count(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    for index in range(MAX_RETRIES_WITHOUT_PROGRESS + 4):
        held = take(database)
        tell(database, held, block(index))
        assert fail(database, held, AttemptKilled("signal 9")) is JobStatus.QUEUED
        end_back_off(database, job_id)
    assert get(database, tenant, job_id).attempt == MAX_RETRIES_WITHOUT_PROGRESS + 4


def test_blocks_that_were_finished_before_are_no_progress(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    ends = []
    for _ in range(MAX_RETRIES_WITHOUT_PROGRESS + 2):
        held = take(database)
        tell(database, held, block(0), progress(1), block(1))
        ends.append(fail(database, held, AttemptKilled("signal 9")))
        end_back_off(database, job_id)
    assert ends == [JobStatus.QUEUED] * (MAX_RETRIES_WITHOUT_PROGRESS + 1) + [JobStatus.FAILED]


def test_a_retry_by_hand_starts_the_count_again(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    for _ in range(2):
        ends = []
        for _ in range(MAX_RETRIES_WITHOUT_PROGRESS + 1):
            ends.append(fail(database, take(database), CudaError("Xid 31")))
            if ends[-1] is JobStatus.QUEUED:
                end_back_off(database, job_id)
        assert ends[-1] is JobStatus.FAILED
        assert ends[:-1] == [JobStatus.QUEUED] * MAX_RETRIES_WITHOUT_PROGRESS
        with database.transaction() as session:
            job = JobRepository(session, tenant).retry(job_id)
            assert job.error is None


def test_a_released_job_that_a_caller_cancelled_is_cancelled(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    with database.transaction() as session:
        JobRepository(session, tenant).cancel(job_id)
    with database.transaction() as session:
        assert AttemptWriter(session, job_id, held.attempt).release() is JobStatus.CANCELLED
    assert get(database, tenant, job_id).status is JobStatus.CANCELLED
    assert try_take(database) is None


def test_a_request_that_this_version_does_not_understand_stands_in_nobodys_way(database: Database, tenant: str) -> None:
    stale, fine = add(database, tenant), add(database, tenant)
    with database.transaction() as session:
        stored = {**request().model_dump(mode="json"), "from_the_future": True}
        session.execute(update(Job).where(Job.id == stale).values(request=stored))
    assert take(database).job_id == fine
    job = get(database, tenant, stale)
    assert (job.status, job.worker_id) == (JobStatus.FAILED, None)
    assert job.error is not None
    assert job.error["code"] == "invalid_request"


def test_a_released_job_waits_for_nobody_and_is_not_blamed(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    for _ in range(MAX_RETRIES_WITHOUT_PROGRESS + 3):
        held = take(database)
        with database.transaction() as session:
            AttemptWriter(session, job_id, held.attempt).release()
    job = get(database, tenant, job_id)
    assert (job.status, job.fruitless_attempts) == (JobStatus.QUEUED, 0)
    with database.reading() as session:
        assert {a.status for a in JobRepository(session, tenant).attempts(job_id)} == {JobStatus.QUEUED}


def test_lost_workers_jobs_wait_again(database: Database, tenant: str, stranger: str) -> None:
    lost, alive, theirs = add(database, tenant), add(database, tenant), add(database, stranger, device="cpu")
    while try_take(database):
        pass
    for job_id in (lost, theirs):
        let_lease_run_out(database, job_id)
    with database.transaction() as session:
        assert requeue_lost(session) == [(lost, "any"), (theirs, "cpu")]
        assert requeue_lost(session) == []
    assert statuses(database, tenant, lost) == ["queued", "running", "queued"]
    assert get(database, tenant, alive).status is JobStatus.RUNNING
    job = get(database, tenant, lost)
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "w1" in job.error["detail"]


def test_a_lost_job_that_was_to_be_cancelled_is_cancelled(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    take(database)
    with database.transaction() as session:
        JobRepository(session, tenant).cancel(job_id)
    let_lease_run_out(database, job_id)
    with database.transaction() as session:
        requeue_lost(session)
    assert statuses(database, tenant, job_id) == ["queued", "running", "cancelled"]


def test_a_renewed_lease_is_not_lost(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database, lease=5)
    with database.transaction() as session:
        assert AttemptWriter(session, job_id, held.attempt).renew(600) is None
    job = get(database, tenant, job_id)
    assert job.lease_expires_at is not None
    assert (job.lease_expires_at - job.updated_at).total_seconds() > 590
    with database.transaction() as session:
        assert requeue_lost(session) == []


def test_a_missed_requirement_keeps_report_and_artifacts(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    error = RequirementMissed("perplexity ratio 1.3 exceeds 1.1", field="require.max_perplexity_ratio")
    with database.transaction() as session:
        writer = AttemptWriter(session, job_id, held.attempt)
        assert writer.fail(error, report=report(), artifacts=[artifact()]) is JobStatus.FAILED
    assert get(database, tenant, job_id).report is not None
    with database.transaction() as session:
        JobRepository(session, tenant).retry(job_id)
    again = take(database)
    with database.transaction() as session:
        AttemptWriter(session, job_id, again.attempt).succeed(report(), [artifact()])
    with database.reading() as session:
        assert len(ArtifactRepository(session, tenant).of_job(job_id)) == 1


def test_a_writer_sees_what_was_asked_meanwhile_though_its_session_read_the_job_before(
    database: Database, tenant: str
) -> None:
    job_id = add(database, tenant)
    held = take(database)
    with database.transaction() as session:
        job = session.get_one(Job, job_id)
        assert not job.cancel_requested
        cancel = update(Job).where(Job.id == job_id).values(cancel_requested=True)
        session.execute(cancel.execution_options(synchronize_session=False))  # as another process would
        assert AttemptWriter(session, job_id, held.attempt).release() is JobStatus.CANCELLED


def test_a_released_job_that_had_got_further_owes_no_attempt(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).append([CheckpointEvent(step=1, total=9, milestone=1)])
    with database.transaction() as session:
        assert AttemptWriter(session, job_id, held.attempt).release() is JobStatus.QUEUED
    assert get(database, tenant, job_id).fruitless_attempts == 0
