"""Each thing that an attempt stands on fails once: what is lost, what goes on, and what a caller is told."""

import errno
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select, update
from structlog.testing import capture_logs

from app.domain.attempt_lines import AttemptEvent, ResultLine
from app.store.attempts import AttemptWriter, NewArtifact
from app.store.blobs import Blob
from app.store.clock import now, seconds_from_now
from app.store.models import Job
from bitwright.errors import (
    AttemptSuperseded,
    BitwrightError,
    InternalError,
    StorageError,
    TimeLimitExceeded,
    Unavailable,
)
from bitwright.events import BlockEvent, CheckpointEvent, Event, LogEvent, ProgressEvent, Stage, StatusEvent
from bitwright.job_states import JobStatus
from tests.reports import report
from tests.supervise.bench import Bench, alive, wait_for
from workers.disk.workspace import Workspace
from workers.supervise.attempt import attempt_runner as supervisor
from workers.supervise.attempt import events as eventing
from workers.supervise.attempt import lease as leases
from workers.supervise.attempt.events import EventBuffer, LineReader
from workers.supervise.attempt.lease import JobCancelled, LeaseKeeper, WorkerStopping
from workers.supervise.attempt.outputs import FILES_AT_ONCE, store_outputs
from workers.supervise.child_process import ChildProcess


class Away:
    """A method of `AttemptWriter` that meets so many faults before it does its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, times: int, fault: type[Exception] = Unavailable):
        self.faults, self.calls = times, 0
        really = getattr(AttemptWriter, method)

        def call(writer: AttemptWriter, *arguments: object, **named: object) -> object:
            self.calls += 1
            if self.calls <= self.faults:
                raise fault("the database is not available now; try again")
            return really(writer, *arguments, **named)

        monkeypatch.setattr(AttemptWriter, method, call)


def error_of(bench: Bench, job_id: str) -> dict[str, Any]:
    error = bench.attempts(job_id)[-1].error
    assert error is not None
    return dict(error)


# The lease.


@pytest.mark.parametrize(("lease_seconds", "interval"), [(3, 1.0), (4, 4 / 3), (6, 1.5), (60, 1.5)])
def test_a_lease_is_renewed_thrice_in_its_time_and_soon_enough_for_a_cancel(
    sqlite_bench: Bench, lease_seconds: int, interval: float
) -> None:
    sqlite_bench.submit("")
    claim = sqlite_bench.claim()
    settings = sqlite_bench.context.settings.model_copy(update={"lease_seconds": lease_seconds})
    keeper = LeaseKeeper(replace(sqlite_bench.context, settings=settings), claim)
    assert keeper._interval == pytest.approx(interval)
    assert leases.RENEW_SECONDS == 1.5


def lease_left(bench: Bench, job_id: str) -> float:
    """Seconds, by the database's clock."""
    with bench.context.database.reading() as session:
        until, present = session.execute(select(Job.lease_expires_at, now()).where(Job.id == job_id)).one()
    assert until is not None
    return float((until - present).total_seconds())


def test_a_renewed_lease_lasts_as_long_as_the_setting_says(bench: Bench) -> None:
    job_id = bench.submit("")
    claim = bench.claim()
    assert 5 < lease_left(bench, job_id) <= 6
    settings = bench.context.settings.model_copy(update={"lease_seconds": 90})
    LeaseKeeper(replace(bench.context, settings=settings), claim).renew()
    assert 85 < lease_left(bench, job_id) <= 90


@pytest.mark.parametrize("fault", [Unavailable, RuntimeError, OSError])
def test_a_database_that_is_away_at_a_renewal_ends_nothing(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    """The thread of the lease asks again, whatever kind of error the driver had."""
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.02)
    away = Away(monkeypatch, "renew", 3, fault)
    job_id = sqlite_bench.submit("block,hang")
    claim = sqlite_bench.claim()
    with LeaseKeeper(sqlite_bench.context, claim) as keeper:
        wait_for(lambda: away.calls > 3, what="a renewal after the faults")
        keeper.check()
        sqlite_bench.cancel(job_id)
        wait_for(keeper._cancelled.is_set, what="the cancel, seen at a later renewal")
    with pytest.raises(JobCancelled):
        keeper.check()


def test_a_lease_that_was_lost_is_renewed_no_more(sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.02)
    away = Away(monkeypatch, "renew", 1, AttemptSuperseded)
    sqlite_bench.submit("")
    with LeaseKeeper(sqlite_bench.context, sqlite_bench.claim()) as keeper:
        keeper._thread.join(30)
        assert not keeper._thread.is_alive()
        assert away.calls == 1
        with pytest.raises(AttemptSuperseded, match="lost its lease"):
            keeper.check()


def test_why_an_attempt_ends_early_and_which_reason_goes_first(sqlite_bench: Bench) -> None:
    sqlite_bench.submit("", time_limit_seconds=7)
    keeper = LeaseKeeper(sqlite_bench.context, sqlite_bench.claim())
    keeper.check()
    sqlite_bench.context.stopping.set()
    with pytest.raises(WorkerStopping):
        keeper.check()
    keeper._deadline -= 7.0
    with pytest.raises(TimeLimitExceeded, match="longer than 7 s") as late:
        keeper.check()
    assert (late.value.field, late.value.value) == ("time_limit_seconds", 7)
    keeper._cancelled.set()
    with pytest.raises(JobCancelled):
        keeper.check()
    keeper._lost.set()
    with pytest.raises(AttemptSuperseded):
        keeper.check()


def test_without_a_limit_of_its_own_a_job_has_the_workers(sqlite_bench: Bench) -> None:
    settings = sqlite_bench.context.settings.model_copy(update={"job_time_limit_seconds": 55})
    context = replace(sqlite_bench.context, settings=settings)
    for own, limit in ((None, 55), (99, 99)):
        sqlite_bench.submit("", time_limit_seconds=own)
        assert LeaseKeeper(context, sqlite_bench.claim())._limit == limit


# Events.


def block(index: int) -> BlockEvent:
    return BlockEvent(index=index, total=9, name=f"model.layers.{index}", seconds=0.1)


def progress(done: int) -> ProgressEvent:
    return ProgressEvent(stage=Stage.QUANTIZE, done=done, total=9, unit="blocks")


@pytest.fixture
def stored(sqlite_bench: Bench) -> tuple[EventBuffer, Callable[[], list[Event]]]:
    """A buffer of a running attempt, and what it has written."""
    job_id = sqlite_bench.submit("")
    buffer = EventBuffer(sqlite_bench.context, sqlite_bench.claim())
    return buffer, lambda: [event for event in sqlite_bench.events(job_id) if not isinstance(event, StatusEvent)]


Stored = tuple[EventBuffer, Callable[[], list[Event]]]


def test_a_database_that_is_away_at_an_append_loses_no_event(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, written = stored
    away = Away(monkeypatch, "append", 2)
    events: list[AttemptEvent] = [block(0), LogEvent(event="said"), block(1)]
    for event in (*events, progress(1), progress(2)):
        buffer.add(event)
    for _ in range(2):
        buffer.flush()
        assert written() == []
    buffer.flush()
    assert written() == [*events, progress(2)]
    buffer.flush()
    assert away.calls == 3, "what is written is not written again"
    assert written() == [*events, progress(2)]


def test_a_database_that_stays_away_costs_the_oldest_events(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, written = stored
    assert eventing.MAX_WAITING == buffer._events.maxlen == 10_000
    buffer._events = type(buffer._events)(maxlen=3)
    for index in range(5):
        buffer.add(block(index))
    buffer.flush()
    assert written() == [block(2), block(3), block(4)]


def test_another_holder_of_the_job_is_told_at_an_append(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    Away(monkeypatch, "append", 1, AttemptSuperseded)
    stored[0].add(block(0))
    with pytest.raises(AttemptSuperseded):
        stored[0].flush()


@pytest.mark.parametrize(
    ("event", "at_once"),
    [
        (block(0), True),
        (CheckpointEvent(step=1, total=9, milestone=1), True),
        (LogEvent(event="said"), False),
        (progress(1), False),
    ],
)
def test_what_counts_as_progress_is_written_at_once_and_the_rest_each_second(
    stored: Stored, event: Any, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer, written = stored
    clock = [buffer._due]
    monkeypatch.setattr(eventing, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    buffer.flush()  # one second from here on
    clock[0] += 0.99
    buffer.add(event)
    buffer.flush_if_due()
    assert written() == ([event] if at_once else [])
    clock[0] += 0.02
    buffer.flush_if_due()
    assert written() == [event]


def test_a_block_that_could_not_be_written_waits_a_second_like_the_rest(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is away is not asked five times a second."""
    buffer, _ = stored
    away = Away(monkeypatch, "append", 9)
    clock = [buffer._due]
    monkeypatch.setattr(eventing, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    buffer.add(block(0))
    for _ in range(5):
        buffer.flush_if_due()
        clock[0] += 0.1
    assert away.calls == 1
    clock[0] += 0.6
    buffer.flush_if_due()
    assert away.calls == 2


def test_what_storing_says_is_written_before_the_end(bench: Bench) -> None:
    job_id = bench.submit("block,file:a.json:{},file:b.json:[1]")
    assert bench.run() is JobStatus.SUCCEEDED
    *_, last, end = bench.events(job_id)
    assert last == ProgressEvent(stage=Stage.STORE, done=5, total=5, unit="bytes")
    assert isinstance(end, StatusEvent)
    assert end.status is JobStatus.SUCCEEDED


def test_lines_that_are_none_are_counted_and_the_first_twenty_told() -> None:
    reader = LineReader()
    with capture_logs() as logs:
        assert [reader.read(raw) for raw in (b"", b"  ", b"\n")] == [None] * 3
        assert reader.ignored == 0
        assert [reader.read(b"[%d]" % number) for number in range(25)] == [None] * 25
    assert reader.ignored == 25
    assert [entry["event"] for entry in logs] == ["line_ignored"] * 20
    assert reader.read(b'{"type": "log", "event": "said"}') == LogEvent(event="said")


# The end of a child.


@pytest.mark.parametrize(
    ("end", "status"), [("file:a.json:{}", JobStatus.SUCCEEDED), ("fail:cuda_error", JobStatus.QUEUED)]
)
def test_what_a_child_says_last_is_heard_although_it_has_ended(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch, end: str, status: JobStatus
) -> None:
    """The supervisor was busy, and looks when everything is over: all words are in the pipe still."""

    def come_late(child: ChildProcess, _timeout: float) -> list[bytes]:
        wait_for(child.ended, what="the end of the child")
        return []

    monkeypatch.setattr(ChildProcess, "lines", come_late)
    job_id = sqlite_bench.submit(f"log:said,progress:3,{end}")
    assert sqlite_bench.run() is status
    said = [event for event in sqlite_bench.events(job_id) if isinstance(event, ProgressEvent)]
    assert [event.done for event in said if event.stage == Stage.QUANTIZE] == [3]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("file:a.json:{},result,exit:7", "internal_error"),
        ("file:a.json:{},result,signal:SIGKILL", "attempt_killed"),
        ("failed:cuda_error,fail:corrupt_checkpoint", "cuda_error"),
        ("failed:cuda_error,exit:0", "cuda_error"),
    ],
)
def test_a_child_that_fails_after_its_result_has_failed_and_its_first_cause_is_told(
    sqlite_bench: Bench, script: str, code: str
) -> None:
    job_id = sqlite_bench.submit(script)
    assert sqlite_bench.run() is JobStatus.QUEUED
    assert error_of(sqlite_bench, job_id)["code"] == code
    assert sqlite_bench.artifacts(job_id) == []
    assert sqlite_bench.job(job_id).report is None


def test_a_child_that_ends_well_has_succeeded_whatever_it_said_before(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("file:a.json:{},failed:cuda_error,result,exit:0")
    assert sqlite_bench.run() is JobStatus.SUCCEEDED
    assert [file.path for file in sqlite_bench.artifacts(job_id)] == ["a.json"]


@pytest.mark.parametrize("end", ["file:a.json:{}", "exit:7"])
def test_a_grandchild_that_was_left_behind_is_ended(sqlite_bench: Bench, end: str) -> None:
    job_id = sqlite_bench.submit(f"child,{end}")
    sqlite_bench.run()
    (pid,) = (event.fields["pid"] for event in sqlite_bench.events(job_id) if isinstance(event, LogEvent))
    assert isinstance(pid, int)
    wait_for(lambda: not alive(pid), 5, what="the end of the grandchild")


def test_out_of_memory_is_told_by_the_kernels_count_of_this_child_alone(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for counts, code in (([3, 4], "out_of_memory"), ([4, 4], "attempt_killed")):
        found = iter(counts)
        monkeypatch.setattr(supervisor, "oom_kills", lambda found=found: next(found))
        job_id = sqlite_bench.submit("signal:SIGKILL", priority=1)
        sqlite_bench.run()
        assert error_of(sqlite_bench, job_id)["code"] == code
        sqlite_bench.cancel(job_id)


# Disk and blob store.


class FailingBlobs:
    """A blob store that takes files of some names, and fails with the others."""

    def __init__(self, error: OSError, good: Sequence[str] = ()) -> None:
        self.error, self.good = error, good

    def put(self, path: Path, *, give: bool = False) -> Blob:
        if path.name in self.good:
            return Blob("0" * 64, path.stat().st_size)
        raise self.error


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(errno.ENOSPC, "x"), "disk_full", "the blob store's disk is full"),
        (OSError(errno.EDQUOT, "x"), "disk_full", "the blob store's disk is full"),
        (OSError(errno.EIO, "x"), "storage_error", "the blob store did not take a file"),
        (StorageError("of its own"), "storage_error", "of its own"),
    ],
)
def test_a_blob_store_that_fails_is_told_with_the_file(
    sqlite_bench: Bench, workspace: Workspace, error: OSError, code: str, told: str, good: int
) -> None:
    for name in ("a.json", "b.json"):
        (workspace.output / "native").mkdir(parents=True, exist_ok=True)
        (workspace.output / "native" / name).write_text("{}")
    sqlite_bench.submit("")
    claim = sqlite_bench.claim()
    keeper, buffer = LeaseKeeper(sqlite_bench.context, claim), EventBuffer(sqlite_bench.context, claim)
    result = ResultLine(report=report(), checkpoints={"native": "output/native"})
    with pytest.raises(BitwrightError) as caught:
        store_outputs(FailingBlobs(error, ["a.json"][:good]), workspace, result, keeper, buffer)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.detail) == (code, told)
    if isinstance(error, OSError):
        assert caught.value.value == ("native/a.json", "native/b.json")[good]


def test_what_a_result_may_name_and_how_its_files_are_typed(sqlite_bench: Bench, workspace: Workspace) -> None:
    types = {
        **{"a.json": "application/json", "A.JSON": "application/json", "README.md": "text/markdown"},
        **{"b.txt": "text/plain", "c.jinja": "text/plain", "d.py": "text/x-python"},
        **{"e.safetensors": "application/octet-stream", "f.gguf": "application/octet-stream"},
        **{"tokenizer": "application/octet-stream"},
    }
    folder = workspace.output / "native"
    folder.mkdir(parents=True)
    for name in types:
        (folder / name).write_text(name)
    (folder / "link.json").symlink_to(folder / "a.json")
    (workspace.output / "empty").mkdir()
    sqlite_bench.submit("")
    claim = sqlite_bench.claim()
    keeper, buffer = LeaseKeeper(sqlite_bench.context, claim), EventBuffer(sqlite_bench.context, claim)

    def store(**checkpoints: str) -> list[NewArtifact]:
        result = ResultLine(report=report(), checkpoints=checkpoints)
        return store_outputs(sqlite_bench.context.blobs, workspace, result, keeper, buffer)

    stored = store(native="output/native")
    assert {file.path: file.media_type for file in stored} == types
    assert {file.path: (file.format, file.size, file.sha256) for file in stored} == {
        name: ("native", len(name), hashlib.sha256(name.encode()).hexdigest()) for name in types
    }
    for outside in ("..", "sources", "output/../sources", "/"):
        with pytest.raises(InternalError, match="outside its output"):
            store(native=outside)
    for empty in ("output/empty", "output/nothing"):
        with pytest.raises(InternalError, match="an empty folder"):
            store(native=empty)


DISK = [
    (errno.ENOSPC, "disk_full", JobStatus.FAILED),
    (errno.EDQUOT, "disk_full", JobStatus.FAILED),
    (errno.EIO, "internal_error", JobStatus.QUEUED),
]


@pytest.mark.parametrize(("number", "code", "status"), DISK)
@pytest.mark.parametrize("place", ["order", "outputs"])
def test_a_workers_disk_that_fails_fails_the_attempt(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int, code: str, status: JobStatus, place: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "no")

    if place == "order":
        monkeypatch.setattr(Workspace, "write", refuse)
    else:
        monkeypatch.setattr(supervisor._Attempt, "_listen_for", lambda *_, **__: None)
        monkeypatch.setattr(supervisor, "store_outputs", refuse)
    job_id = sqlite_bench.submit("")
    assert sqlite_bench.run() is status
    assert error_of(sqlite_bench, job_id)["code"] == code


def test_storing_ends_between_two_files_when_the_attempt_must(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, stored = sqlite_bench.context.blobs.put, list[str]()

    def put_and_stop(path: Path, *, give: bool) -> Blob:
        stored.append(path.name)
        sqlite_bench.context.stopping.set()
        time.sleep(0.05)
        return put(path, give=give)

    monkeypatch.setattr(sqlite_bench.context.blobs, "put", put_and_stop)
    job_id = sqlite_bench.submit(",".join(f"file:{n}.json:{{}}" for n in range(30)))
    assert sqlite_bench.run() is JobStatus.QUEUED
    assert 1 <= len(stored) <= 3 * FILES_AT_ONCE, "those that were being stored, and few more"
    assert sqlite_bench.artifacts(job_id) == []
    assert sqlite_bench.attempts(job_id)[0].error is None


# The database at the end.


def test_a_database_that_stays_away_at_the_end_is_left_to_the_sweep(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(monkeypatch, "succeed", 1000), Away(monkeypatch, "fail", 1000)
    assert supervisor.CONCLUDE_SECONDS == 120.0
    monkeypatch.setattr(supervisor, "CONCLUDE_SECONDS", -1.0)
    job_id = sqlite_bench.submit("file:a.json:{}")
    assert sqlite_bench.run() is None
    assert [method.calls for method in away] == [1, 1]
    assert sqlite_bench.job(job_id).status is JobStatus.RUNNING
    assert sqlite_bench.workspace(job_id).exists()


def test_a_job_is_tried_four_times_in_all(sqlite_bench: Bench) -> None:
    job_id = sqlite_bench.submit("")

    def fail() -> JobStatus:
        with sqlite_bench.context.database.transaction() as session:
            session.execute(update(Job).values(available_at=seconds_from_now(-1)))
        claim = sqlite_bench.claim()
        with sqlite_bench.context.database.transaction() as session:
            return AttemptWriter(session, job_id, claim.attempt).fail(StorageError("again"))

    assert [fail() for _ in range(4)] == [JobStatus.QUEUED] * 3 + [JobStatus.FAILED]
