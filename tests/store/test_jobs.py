import hashlib
import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from app.domain.request.job_request import JobRequest
from app.store.artifacts import ArtifactRepository
from app.store.attempts import AttemptWriter, Wish, work_waits
from app.store.clock import seconds_from_now
from app.store.events import EventRepository
from app.store.idempotency import Idempotency
from app.store.ids import new_id
from app.store.job_pages import JobFilters
from app.store.jobs import JobRepository, count_by_status
from app.store.models import Base, IdempotencyKey, Job
from app.store.session import Database
from app.store.uploads import NewUploadFile, UploadRepository
from app.store.waiting import places
from app.store.workers import waiting
from bitwright.errors import Conflict, IllegalTransition, InvalidRequest, KeyReused, NotFound
from bitwright.events import LogEvent, StatusEvent
from bitwright.job_states import DeviceClass, JobStatus
from tests.reports import report
from tests.store.samples import add, artifact, block, get, request, take, tell, try_take

KEPT = {"tenant", "api_key", "usage_month"}
JOB_TABLES = [table for name, table in Base.metadata.tables.items() if name not in KEPT]

# Fixed: names of tests must be the same in every process that runs them.
JOB_OF_NOBODY, ARTIFACT_OF_NOBODY = "job_" + "0" * 26, "art_" + "0" * 26


def add_with_key(database: Database, tenant: str, key: str, asked: JobRequest) -> tuple[str, bool]:
    with database.transaction() as session:
        job = JobRepository(session, tenant).add(asked, idempotency=Idempotency.of(key, asked))
        return job.id, job.replayed


def test_a_job_starts_queued_with_one_event(database: Database, tenant: str) -> None:
    before = datetime.now(UTC)
    job_id = add(database, tenant, bits=3, priority=7, device="cpu", metadata={"commit": "abc"})
    job = get(database, tenant, job_id)
    assert (job.status, job.method, job.model) == (JobStatus.QUEUED, "rtn", "org/model")
    assert (job.priority, job.device, job.attempt, job.metadata_) == (7, "cpu", 0, {"commit": "abc"})
    assert job.started_at is None
    assert job.finished_at is None
    assert job.created_at.utcoffset() == timedelta(0)
    assert abs(job.created_at - before) < timedelta(seconds=30)
    with database.reading() as session:
        events = EventRepository(session, tenant).page(job_id, 0, 10)
    assert [(e.sequence, e.event) for e in events] == [(1, StatusEvent(status=JobStatus.QUEUED, attempt=0))]


def test_a_request_comes_back_as_it_was_sent_in_order(database: Database, tenant: str) -> None:
    overrides = {f"model.layers.{n}.*": {"bits": bits} for n, bits in [(9, 8), (1, 3), (10, 2), (0, 8)]}
    asked = JobRequest.parse({"model": "a", "quantization": {"method": "rtn", "modules": {"overrides": overrides}}})
    with database.transaction() as session:
        job_id = JobRepository(session, tenant).add(asked).id
    stored = get(database, tenant, job_id).request
    assert JobRequest.model_validate(stored) == asked
    assert json.dumps(stored) == json.dumps(asked.model_dump(mode="json"))


def test_another_tenant_sees_and_changes_nothing(database: Database, tenant: str, stranger: str) -> None:
    job_id = add(database, tenant, metadata={"a": "b"})
    with database.transaction() as session:
        theirs = JobRepository(session, stranger)
        for use in (theirs.get, theirs.cancel, theirs.retry, theirs.delete, theirs.attempts):
            with pytest.raises(NotFound):
                use(job_id)
        with pytest.raises(NotFound):
            EventRepository(session, stranger).page(job_id, 0, 10)
        with pytest.raises(NotFound):
            ArtifactRepository(session, stranger).of_job(job_id)
        assert theirs.page(after=None, limit=10).items == []
        assert theirs.page(after=None, limit=10, filters=JobFilters(labels={"a": "b"})).items == []
    assert get(database, tenant, job_id).status is JobStatus.QUEUED


@pytest.mark.parametrize("job_id", ["", "job_\0", "job_1", "x' OR '1'='1", JOB_OF_NOBODY, ARTIFACT_OF_NOBODY])
def test_an_id_that_no_job_has_is_not_found(database: Database, tenant: str, job_id: str) -> None:
    with database.reading() as session, pytest.raises(NotFound):
        JobRepository(session, tenant).get(job_id)


def test_pages_are_newest_first_and_whole_while_jobs_come_in(database: Database, tenant: str) -> None:
    made = [add(database, tenant) for _ in range(7)]
    seen: list[str] = []
    cursor: str | None = None
    sizes = []
    while True:
        with database.reading() as session:
            page = JobRepository(session, tenant).page(after=cursor, limit=3)
        seen += [job.id for job in page.items]
        sizes.append(len(page.items))
        add(database, tenant)
        if page.next_cursor is None:
            break
        cursor = page.next_cursor
    assert seen == made[::-1]
    assert sizes == [3, 3, 1]


def test_a_last_page_that_is_full_has_no_cursor(database: Database, tenant: str) -> None:
    for _ in range(4):
        add(database, tenant)
    with database.reading() as session:
        first = JobRepository(session, tenant).page(after=None, limit=2)
        last = JobRepository(session, tenant).page(after=first.next_cursor, limit=2)
    assert last.next_cursor is None
    assert len(last.items) == 2


def test_filters(database: Database, tenant: str) -> None:
    plain = add(database, tenant)
    labelled = add(database, tenant, metadata={"team": "a", 'quo"te$.': "x'y"}, method="signround")
    other = add(database, tenant, metadata={"team": "b"}, model="org/other")
    with database.transaction() as session:
        JobRepository(session, tenant).cancel(plain)

    def found(**filters: object) -> set[str]:
        with database.reading() as session:
            wanted = JobFilters(**filters)  # type: ignore[arg-type]
            page = JobRepository(session, tenant).page(after=None, limit=10, filters=wanted)
            return {job.id for job in page.items}

    assert found(status=JobStatus.CANCELLED) == {plain}
    assert found(method="signround") == {labelled}
    assert found(model="org/other") == {other}
    assert found(labels={"team": "a"}) == {labelled}
    assert found(labels={"team": "a", 'quo"te$.': "x'y"}) == {labelled}
    assert found(labels={"team": "a", "commit": "1"}) == set()
    assert found(labels={"team": "A"}) == set()
    assert found(status=JobStatus.QUEUED, labels={"team": "b"}) == {other}
    assert found(model="org/\0") == found(labels={"\0": "a"}) == set()


@pytest.mark.parametrize("cursor", ["", "x", "job_", ARTIFACT_OF_NOBODY, "job_\0"])
def test_a_made_up_cursor_is_refused(database: Database, tenant: str, cursor: str) -> None:
    with database.reading() as session, pytest.raises(InvalidRequest, match="cursor"):
        JobRepository(session, tenant).page(after=cursor, limit=3)


def test_the_same_key_and_request_give_the_same_job(database: Database, tenant: str) -> None:
    full = request().model_dump(mode="json")
    first = add_with_key(database, tenant, "k-1", request())
    again = add_with_key(database, tenant, "k-1", JobRequest.parse(full))
    assert (first[1], again) == (False, (first[0], True))
    with database.reading() as session:
        assert len(JobRepository(session, tenant).page(after=None, limit=10).items) == 1


def test_the_same_key_and_another_request_are_refused(database: Database, tenant: str, stranger: str) -> None:
    add_with_key(database, tenant, "k-1", request())
    with pytest.raises(KeyReused):
        add_with_key(database, tenant, "k-1", request(bits=8))
    assert add_with_key(database, stranger, "k-1", request(bits=8))[1] is False


def test_a_key_expires_after_a_day(database: Database, tenant: str) -> None:
    first, _ = add_with_key(database, tenant, "k-1", request())
    with database.transaction() as session:
        kept = session.get_one(IdempotencyKey, (tenant, "k-1"))
        assert kept.expires_at - kept.created_at == timedelta(hours=24)
        session.execute(update(IdempotencyKey).values(expires_at=seconds_from_now(-1)))
    second, replayed = add_with_key(database, tenant, "k-1", request(bits=8))
    assert second != first
    assert replayed is False
    assert add_with_key(database, tenant, "k-1", request(bits=8)) == (second, True)


def test_a_refused_request_leaves_no_key(database: Database, tenant: str) -> None:
    bad = request(model=new_id("upl"))
    with pytest.raises(InvalidRequest):
        add_with_key(database, tenant, "k-1", bad)
    assert add_with_key(database, tenant, "k-1", request())[1] is False


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\0", "é"])
def test_a_key_is_visible_ascii(key: str) -> None:
    with pytest.raises(InvalidRequest):
        Idempotency.of(key, request())


def test_cancel_ends_a_queued_job_at_once(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    with database.transaction() as session:
        job = JobRepository(session, tenant).cancel(job_id)
    assert job.status is JobStatus.CANCELLED
    assert job.finished_at is not None
    with database.transaction() as session, pytest.raises(IllegalTransition, match="cancelled"):
        JobRepository(session, tenant).cancel(job_id)


def test_cancel_asks_a_running_jobs_worker(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    with database.transaction() as session:
        job = JobRepository(session, tenant).cancel(job_id)
        assert (job.status, job.cancel_requested) == (JobStatus.RUNNING, True)
    with database.transaction() as session:
        assert AttemptWriter(session, job_id, held.attempt).renew(60) is Wish.CANCEL
        AttemptWriter(session, job_id, held.attempt).cancelled()
    job = get(database, tenant, job_id)
    assert job.status is JobStatus.CANCELLED
    assert job.worker_id is None
    with database.reading() as session:
        assert [a.status for a in JobRepository(session, tenant).attempts(job_id)] == [JobStatus.CANCELLED]


def test_a_held_job_waits_until_it_is_resumed(database: Database, tenant: str) -> None:
    job_id, other = add(database, tenant, priority=1), add(database, tenant)
    with database.transaction() as session:
        repository = JobRepository(session, tenant)
        assert [repository.pause(job_id).held for _ in range(2)] == [True, True]
        assert list(places(session)) == [other], "it has no place in the queue"
        assert waiting(session) == {"any": 1}
    assert take(database).job_id == other
    with database.reading() as session:
        assert not work_waits(session, DeviceClass.CPU)
    with database.transaction() as session:
        assert JobRepository(session, tenant).resume(job_id).held is False
    assert take(database).job_id == job_id
    with database.reading() as session:
        events = [stored.event for stored in EventRepository(session, tenant).page(job_id, 0, 10)]
    said = [event.event for event in events if isinstance(event, LogEvent)]
    assert said == ["job_paused", "job_resumed"]


def test_a_running_job_is_given_back_and_held(database: Database, tenant: str, stranger: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    tell(database, held, block(0))
    with database.transaction() as session:
        job = JobRepository(session, tenant).pause(job_id)
        assert (job.status, job.held) == (JobStatus.RUNNING, True)
        writer = AttemptWriter(session, job_id, held.attempt)
        assert writer.renew(60) is Wish.HOLD
        assert writer.release() is JobStatus.QUEUED
    job = get(database, tenant, job_id)
    assert (job.status, job.held, job.blocks_done, job.fruitless_attempts) == (JobStatus.QUEUED, True, 1, 0)
    assert try_take(database) is None
    for ask in (JobRepository.pause, JobRepository.resume):
        with database.transaction() as session, pytest.raises(NotFound):
            ask(JobRepository(session, stranger), job_id)
    with database.transaction() as session:
        job = JobRepository(session, tenant).cancel(job_id)
        assert (job.status, job.held) == (JobStatus.CANCELLED, False), "a retry of it waits for nobody"
        for ask in (JobRepository.pause, JobRepository.resume):
            with pytest.raises(IllegalTransition):
                ask(JobRepository(session, tenant), job_id)


def test_retry_queues_a_cancelled_job_afresh(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    tell(database, held, block(0))
    with database.transaction() as session:
        JobRepository(session, tenant).cancel(job_id)
        AttemptWriter(session, job_id, held.attempt).cancelled()
    with database.transaction() as session:
        job = JobRepository(session, tenant).retry(job_id)
    assert (job.status, job.cancel_requested, job.finished_at) == (JobStatus.QUEUED, False, None)
    assert take(database).attempt == 2


def test_only_ended_jobs_that_did_not_succeed_are_retried(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)

    def retry() -> None:
        with database.transaction() as session, pytest.raises(IllegalTransition):
            JobRepository(session, tenant).retry(job_id)

    retry()
    held = take(database)
    retry()
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).succeed(report(), [])
    retry()


def test_delete_removes_an_ended_job_and_all_that_is_its(database: Database, tenant: str) -> None:
    job_id, key = add_with_key(database, tenant, "k-1", request(metadata={"a": "b"}))[0], "k-1"
    with database.transaction() as session, pytest.raises(Conflict, match="cancel it"):
        JobRepository(session, tenant).delete(job_id)
    held = take(database)
    with database.transaction() as session, pytest.raises(Conflict):
        JobRepository(session, tenant).delete(job_id)
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).succeed(report(), [artifact()])
    with database.transaction() as session:
        JobRepository(session, tenant).delete(job_id)
    with database.reading() as session:
        with pytest.raises(NotFound):
            JobRepository(session, tenant).get(job_id)
        assert count_by_status(session) == dict.fromkeys(JobStatus, 0)
        counts = [len(session.execute(table.select()).all()) for table in JOB_TABLES]
    assert counts == [0] * len(JOB_TABLES)
    assert add_with_key(database, tenant, key, request(bits=8))[1] is False


def test_counts_by_status(database: Database, tenant: str, stranger: str) -> None:
    for owner in (tenant, tenant, stranger):
        add(database, owner)
    take(database)
    with database.reading() as session:
        assert count_by_status(session) == dict.fromkeys(JobStatus, 0) | {JobStatus.QUEUED: 2, JobStatus.RUNNING: 1}


def test_a_retried_job_is_as_one_that_was_never_tried(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    with database.transaction() as session:
        spoiled = {"micro_batch_divisor": 2, "fruitless_attempts": 4, "cancel_requested": True}
        session.execute(update(Job).where(Job.id == job_id).values(spoiled))
    with database.transaction() as session:
        AttemptWriter(session, job_id, held.attempt).cancelled()
    with database.transaction() as session:
        later = {"error": {"code": "cuda_error", "detail": "Xid 31"}, "available_at": seconds_from_now(3600)}
        session.execute(update(Job).where(Job.id == job_id).values(later))
    with database.transaction() as session:
        job = JobRepository(session, tenant).retry(job_id)
        fresh = (job.micro_batch_divisor, job.fruitless_attempts, job.cancel_requested, job.error, job.finished_at)
    assert fresh == (1, 0, False, None, None)
    assert take(database).micro_batch_divisor == 1, "at once, in whole batches"


def test_a_key_that_has_expired_stands_for_nothing(database: Database, tenant: str) -> None:
    asked, other = request(), request(bits=8)
    job_id, _ = add_with_key(database, tenant, "k-1", asked)
    files = [NewUploadFile("a.jsonl", 3, "a" * 64)]
    with database.transaction() as session:
        upload = UploadRepository(session, tenant).create(files, idempotency=Idempotency.of("k-2", asked))

    def standing() -> tuple[str | None, str | None, str | None]:
        with database.reading() as session:
            jobs, uploads = JobRepository(session, tenant), UploadRepository(session, tenant)
            made, replayed = jobs.made_by("k-1"), jobs.find_replayed(Idempotency.of("k-1", asked))
            sent = uploads.find_replayed(Idempotency.of("k-2", asked))
            assert replayed is None or replayed.replayed
            found = [None if each is None else each.id for each in (made, replayed, sent)]
            return found[0], found[1], found[2]

    assert standing() == (job_id, job_id, upload.id)
    with database.reading() as session, pytest.raises(KeyReused):
        JobRepository(session, tenant).find_replayed(Idempotency.of("k-1", other))
    with database.transaction() as session:
        session.execute(update(IdempotencyKey).values(expires_at=seconds_from_now(-1)))
    assert standing() == (None, None, None)
    with database.reading() as session:
        assert JobRepository(session, tenant).find_replayed(Idempotency.of("k-1", other)) is None


def test_a_key_of_another_tenant_stands_for_nothing(database: Database, tenant: str, stranger: str) -> None:
    add_with_key(database, tenant, "k-1", request())
    with database.reading() as session:
        theirs = JobRepository(session, stranger)
        assert theirs.made_by("k-1") is None
        assert theirs.find_replayed(Idempotency.of("k-1", request(bits=8))) is None


def test_a_fingerprint_is_that_of_the_full_request_in_its_order() -> None:
    one, other = ({"a.*": {"bits": 8}, "b.*": {"bits": 4}}, {"b.*": {"bits": 4}, "a.*": {"bits": 8}})
    asked = [
        JobRequest.parse({"model": "a", "quantization": {"method": "rtn", "modules": {"overrides": overrides}}})
        for overrides in (one, other)
    ]
    first, second = (Idempotency.of("k", each).fingerprint for each in asked)
    assert first == hashlib.sha256(asked[0].model_dump_json().encode()).hexdigest()
    assert first != second


@pytest.mark.parametrize(("limit", "items"), [(-1, 1), (0, 1), (1, 1), (2, 2), (5000, 3)])
def test_a_page_has_one_to_a_thousand_jobs(database: Database, tenant: str, limit: int, items: int) -> None:
    for _ in range(3):
        add(database, tenant)
    with database.reading() as session:
        page = JobRepository(session, tenant).page(after=None, limit=limit)
        events = EventRepository(session, tenant).page(page.items[0].id, -1, limit)
    assert len(page.items) == items
    assert [event.sequence for event in events] == [1]


def test_a_job_that_was_asked_for_by_a_recipe_is_found_by_both_names(database: Database, tenant: str) -> None:
    with database.transaction() as session:
        job_id = JobRepository(session, tenant).add(request(), recipe="qlora").id
    with database.reading() as session:
        for name, found in (("qlora", [job_id]), ("rtn", [job_id]), ("gptq", [])):
            page = JobRepository(session, tenant).page(after=None, limit=9, filters=JobFilters(method=name))
            assert [job.id for job in page.items] == found
