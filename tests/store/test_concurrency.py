import multiprocessing
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import sleep
from typing import TypeVar

import pytest
from sqlalchemy.exc import DBAPIError

from app.store.attempts import AttemptWriter, claim
from app.store.endings import requeue_lost
from app.store.events import EventRepository, events_after
from app.store.idempotency import Idempotency
from app.store.jobs import JobRepository
from app.store.models import Job
from app.store.session import Database, migrate
from app.store.uploads import NewUploadFile, UploadRepository
from app.store.workers import sweep_lease
from bitwright.errors import AttemptSuperseded, Unavailable
from bitwright.events import LogEvent
from bitwright.job_states import DeviceClass, JobStatus
from tests.reports import report
from tests.store.samples import add, get, let_lease_run_out, request, take, try_take

T = TypeVar("T")


def together(count: int, work: Callable[[int], T]) -> list[T]:
    """Results of `work(0)` to `work(count - 1)`, all started at one moment."""
    start = threading.Barrier(count)

    def one(index: int) -> T:
        start.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def claim_all(url: str, worker: str, found: "multiprocessing.Queue[tuple[str, list[tuple[str, int]]]]") -> None:
    """A worker process: claims until nothing is left, ends every other job well and gives the rest back once."""
    database = Database(url)
    held: list[tuple[str, int]] = []
    while True:
        with database.transaction() as session:
            got = claim(session, worker_id=worker, device_class=DeviceClass.CPU, lease_seconds=60)
        if got is None:
            break
        held.append((got.job_id, got.attempt))
        with database.transaction() as session:
            writer = AttemptWriter(session, got.job_id, got.attempt)
            writer.append([LogEvent(event=worker)])
            if got.attempt == 1 and len(held) % 2:
                writer.release()
            else:
                writer.succeed(report(), [])
    database.close()
    found.put((worker, held))


def test_processes_never_hold_one_attempt_twice(database: Database, tenant: str) -> None:
    jobs = [add(database, tenant) for _ in range(24)]
    url = database.engine.url.render_as_string(hide_password=False)
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    workers = [spawn.Process(target=claim_all, args=(url, f"w{n}", found)) for n in range(3)]
    for worker in workers:
        worker.start()
    held = dict(found.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    attempts = Counter(attempt for mine in held.values() for attempt in mine)
    assert set(attempts.values()) == {1}
    assert {job_id for job_id, _ in attempts} == set(jobs)
    with database.reading() as session:
        for job_id in jobs:
            stored = EventRepository(session, tenant).page(job_id, 0, 100)
            assert [event.sequence for event in stored] == list(range(1, len(stored) + 1))
            told = [(e.attempt, e.event.event) for e in stored if isinstance(e.event, LogEvent)]
            rows = JobRepository(session, tenant).attempts(job_id)
            assert told == [(row.number, row.worker_id) for row in rows]
            assert rows[-1].status is JobStatus.SUCCEEDED


def test_threads_claim_each_job_once(database: Database, tenant: str) -> None:
    jobs = {add(database, tenant) for _ in range(12)}
    got = together(16, lambda n: try_take(database, f"w{n}"))
    held = [one.job_id for one in got if one is not None]
    assert sorted(held) == sorted(jobs)


def test_writers_of_one_attempt_leave_no_gap_and_readers_see_none(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    seen: list[int] = []

    def read() -> None:
        while len(seen) < 2 + 8 * 5 * 3:
            with database.reading() as session:
                seen.extend(event.sequence for event in events_after(session, {job_id: len(seen)}, 7))

    def write(writer: int) -> None:
        for turn in range(5):
            events = [LogEvent(event=f"{writer}.{turn}", fields={"i": i}) for i in range(3)]
            with database.transaction() as session:
                AttemptWriter(session, job_id, held.attempt).append(events)

    reader = threading.Thread(target=read)
    reader.start()
    together(8, write)
    reader.join(60)
    assert seen == list(range(1, 2 + 8 * 5 * 3 + 1))
    with database.reading() as session:
        stored = EventRepository(session, tenant).page(job_id, 2, 1000)
    told = [(e.event.event, e.event.fields["i"]) for e in stored if isinstance(e.event, LogEvent)]
    assert [name for name, i in told[::3]] == [name for name, i in told[2::3]]
    assert [i for _, i in told] == [0, 1, 2] * 40


def test_one_of_the_ends_of_an_attempt_wins(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    held = take(database)
    let_lease_run_out(database, job_id)

    def end(index: int) -> str:
        try:
            with database.transaction() as session:
                if index % 2:
                    return "requeued" if requeue_lost(session) else "nothing"
                AttemptWriter(session, job_id, held.attempt).succeed(report(), [])
                return "succeeded"
        except AttemptSuperseded:
            return "superseded"

    ends = Counter(together(8, end))
    assert ends == {"superseded": 4, "requeued": 1, "nothing": 3}
    assert get(database, tenant, job_id).last_event == 3


def test_cancel_and_claim_at_one_moment_agree(database: Database, tenant: str) -> None:
    for _ in range(8):
        job_id = add(database, tenant)

        def act(index: int, job_id: str = job_id) -> object:
            if index:
                return try_take(database)
            with database.transaction() as session:
                return JobRepository(session, tenant).cancel(job_id).status

        cancelled, held = together(2, act)
        job = get(database, tenant, job_id)
        if held is None:
            assert cancelled is job.status is JobStatus.CANCELLED
        else:
            assert cancelled is job.status is JobStatus.RUNNING
            assert job.cancel_requested
            with database.transaction() as session:
                AttemptWriter(session, job_id, 1).cancelled()


def test_one_key_at_one_moment_makes_one_job(database: Database, tenant: str) -> None:
    def post(_: int) -> tuple[str, bool]:
        with database.transaction() as session:
            key = Idempotency.of("k", request())
            job = JobRepository(session, tenant).add(request(), idempotency=key)
            return job.id, job.replayed

    assert_one(together(8, post))


def test_one_key_at_one_moment_makes_one_upload(database: Database, tenant: str) -> None:
    files = [NewUploadFile("text.jsonl", 3, "0" * 64)]

    def post(_: int) -> tuple[str, bool]:
        with database.transaction() as session:
            upload = UploadRepository(session, tenant).create(files, idempotency=Idempotency("k", "f" * 64))
            return upload.id, upload.replayed

    assert_one(together(8, post))


def assert_one(made: list[tuple[str, bool]]) -> None:
    """All got the same thing, and one of them made it."""
    assert len({thing for thing, _ in made}) == 1
    assert sorted(replayed for _, replayed in made) == [False] + [True] * 7


def test_one_sweep_at_a_time(database: Database) -> None:
    def sweep(index: int) -> bool:
        with database.transaction() as session:
            return sweep_lease(session, f"s{index}", 60)

    assert sum(map(bool, together(6, sweep))) == 1


def test_many_may_migrate_at_once(empty_url: str) -> None:
    assert together(4, lambda _: migrate(empty_url)) == [None] * 4


def test_a_new_file_that_another_process_writes_to_is_waited_for(tmp_path: Path) -> None:
    """Until its first connection has turned it to WAL, SQLite refuses the next one without a wait."""
    file = tmp_path / "new.db"
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE theirs (number)")
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(migrate, f"sqlite:///{file}")
        sleep(0.2)
        other.execute("COMMIT")
        assert made.result(20) is None
    other.close()
    with closing(sqlite3.connect(file)) as fresh:
        assert fresh.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_reader_does_not_wait_for_a_writer(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    with database.transaction() as session:
        JobRepository(session, tenant).cancel(job_id)
        done = ThreadPoolExecutor(1).submit(get, database, tenant, job_id)
        assert done.result(10).status is JobStatus.QUEUED
    assert get(database, tenant, job_id).status is JobStatus.CANCELLED


def test_a_reading_session_cannot_write(database: Database, tenant: str) -> None:
    job_id = add(database, tenant)
    with pytest.raises((Unavailable, DBAPIError)) as caught, database.reading() as session:
        JobRepository(session, tenant).cancel(job_id)
    told = f"{caught.value} {caught.value.__cause__}"
    assert re.search("read-?only", told)
    assert get(database, tenant, job_id).status is JobStatus.QUEUED
    assert try_take(database) is not None


def test_a_database_out_of_reach_is_unavailable(tmp_path: object) -> None:
    for url in (f"sqlite:///{tmp_path}/no/such/folder/x.db", "postgresql://nobody@127.0.0.1:1/none"):
        unreachable = Database(url)
        with pytest.raises(Unavailable) as caught, unreachable.transaction() as session:
            session.get(Job, "x")
        assert "127.0.0.1" not in caught.value.detail
        unreachable.close()
