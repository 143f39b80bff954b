"""The thread that runs jobs: it asks by itself and when it is notified, and no fault ends it."""

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import event

from app.store.attempts import work_waits
from app.store.session import Database
from bitwright.job_states import JobStatus
from tests.supervise.bench import Bench, alive, make_context, wait_for
from workers.disk.orders import RuntimePlace
from workers.supervise import runner, runtimes
from workers.supervise.runner import Runner
from workers.supervise.runtimes import WarmReader
from workers.supervise.spares.pool import Spares


@pytest.fixture
def runners() -> Iterator[list[Runner]]:
    """Runners that a test has started, ended after it."""
    started: list[Runner] = []
    yield started
    for one in started:
        one.stop()


def start(bench: Bench, runners: list[Runner], poll_seconds: float) -> Runner:
    settings = bench.context.settings.model_copy(update={"worker_poll_seconds": poll_seconds})
    one = Runner(replace(bench.context, settings=settings))
    runners.append(one)
    one.start()
    return one


def done(bench: Bench, job_id: str) -> bool:
    return bench.job(job_id).status is JobStatus.SUCCEEDED


def test_a_job_starts_without_a_message(bench: Bench, runners: list[Runner]) -> None:
    before = bench.submit("file:a.json:{}")
    start(bench, runners, 0.1)
    wait_for(lambda: done(bench, before), what="the job that had waited")
    after = bench.submit("file:a.json:{}")
    wait_for(lambda: done(bench, after), what="the job that came later")


def test_a_message_is_heard_at_once_and_lasts_as_long_as_the_work(sqlite_bench: Bench, runners: list[Runner]) -> None:
    one = start(sqlite_bench, runners, 300)
    one.notify()  # the first pass is over
    job_id = sqlite_bench.submit("file:a.json:{}")
    one.notify()
    assert done(sqlite_bench, job_id)


def test_a_worker_holds_one_job_at_a_time_for_any_number_of_messages(
    sqlite_bench: Bench, runners: list[Runner]
) -> None:
    jobs = [sqlite_bench.submit("file:a.json:{}") for _ in range(3)]
    one = start(sqlite_bench, runners, 0.1)
    calls = [threading.Thread(target=one.notify) for _ in range(4)]
    for thread in calls:
        thread.start()
    for thread in calls:
        thread.join()
    spans = sorted((a.started_at, a.finished_at) for job_id in jobs for a in sqlite_bench.attempts(job_id))
    assert len(spans) == 3
    assert all(ended is not None and ended <= started for (_, ended), (started, _) in pairwise(spans))


def test_stopping_gives_back_what_is_in_hand_and_lets_go_who_waits(sqlite_bench: Bench, runners: list[Runner]) -> None:
    job_id = sqlite_bench.submit("hang")
    one = start(sqlite_bench, runners, 0.1)
    wait_for(lambda: sqlite_bench.job(job_id).status is JobStatus.RUNNING)
    waiting = threading.Thread(target=one.notify)
    waiting.start()
    one.stop()
    waiting.join(5)
    assert not waiting.is_alive()
    assert sqlite_bench.job(job_id).status is JobStatus.QUEUED


def test_an_idle_worker_asks_seldom_and_writes_nothing(sqlite_bench: Bench, runners: list[Runner]) -> None:
    """Bounded load: one small question an interval, in a transaction that takes no lock."""
    asked: list[str] = []
    event.listen(sqlite_bench.context.database.engine, "before_cursor_execute", lambda *a: asked.append(a[2]))
    start(sqlite_bench, runners, 0.2)
    time.sleep(2)
    runners[0].stop()
    questions = [statement for statement in asked if statement.startswith("SELECT")]
    assert 3 <= len(questions) <= 2 / (0.2 * (1 - runner.JITTER)) + 2
    assert not any(statement.startswith(("INSERT", "UPDATE", "DELETE", "BEGIN IMMEDIATE")) for statement in asked)


def test_no_fault_ends_it(sqlite_bench: Bench, runners: list[Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LONGEST_WAIT_SECONDS", 0.1)
    faults, waits = iter([RuntimeError("a driver's own")]), work_waits

    def sometimes(*arguments: object) -> bool:
        if fault := next(faults, None):
            raise fault
        return waits(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "work_waits", sometimes)
    job_id = sqlite_bench.submit("file:a.json:{}")
    start(sqlite_bench, runners, 0.1)
    wait_for(lambda: done(sqlite_bench, job_id))


def test_a_database_that_is_away_is_asked_less_and_less_often(tmp_path: Path) -> None:
    """No server listens there."""
    database = Database("postgresql+psycopg://x@127.0.0.1:1/x?connect_timeout=1")
    one = Runner(make_context(tmp_path, database, worker_poll_seconds=1.0))
    pauses = []
    for _ in range(12):
        one._pass()
        pauses.append(one._pause())
    assert pauses[0] <= 2 * (1 + runner.JITTER)
    assert 60 * (1 - runner.JITTER) <= pauses[-1] <= 60 * (1 + runner.JITTER)
    database.close()


@pytest.mark.parametrize("count", [0, 1])
def test_what_the_next_job_begins_with_is_there_before_it_comes(
    sqlite_bench: Bench, runners: list[Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A spare, and the child that reads results, where a worker has spares."""
    monkeypatch.setattr(runtimes, "HOST", (sys.executable, "-c", "import sys; sys.stdin.read()"))
    context = sqlite_bench.context
    settings = context.settings.model_copy(update={"spares": count})
    spares = Spares(context.attempt_module, context.worker_id, settings, context.capacity)
    reader = WarmReader(tmp_path)
    found = {"transformers": RuntimePlace(version="5")}
    given = replace(context, settings=settings, spares=spares, reader=reader, runtimes=found)
    one = start(replace(sqlite_bench, context=given), runners, 0.1)
    one.notify()
    assert len(spares.waiting) == count
    pids = [spare.pid for spare in spares.waiting]
    if count:
        pids.append(reader.start().handle.pid)
        assert all(map(alive, pids))
    else:
        assert reader._child is None
    one.stop()
    spares.close()
    reader.close()
    wait_for(lambda: not any(map(alive, pids)), 5, what="the end of both")
