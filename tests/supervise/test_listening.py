"""A broker that is away or refuses ends no worker, and is tried less and less often."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.store.workers import list_workers
from tests.supervise.bench import Bench
from workers.supervise import celery_app, heartbeat, runner
from workers.supervise.celery_app import worker_app
from workers.supervise.heartbeat import Heartbeat, changed
from workers.supervise.runner import Runner


class Stopping:
    """An event that is set after so many waits, and remembers them."""

    def __init__(self, waits: int) -> None:
        self.pauses: list[float] = []
        self._waits = waits

    def is_set(self) -> bool:
        return len(self.pauses) >= self._waits

    def wait(self, seconds: float) -> None:
        self.pauses.append(seconds)


class Celery:
    """A broker that Celery gives up on, at once or after so many seconds of listening."""

    def __init__(self, clock: list[float], heard: Iterator[float], error: Exception | None) -> None:
        self._clock, self._heard, self._error = clock, heard, error

    def worker_main(self, arguments: list[str]) -> None:
        assert "--without-gossip" in arguments
        self._clock[0] += next(self._heard)
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize("error", [None, ConnectionError("refused"), RuntimeError("Celery's own")])
def test_a_broker_that_refuses_is_tried_less_and_less_often(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    clock, heard = [0.0], iter([0.0] * 7 + [31.0, 0.0, 30.0, 0.0])
    monkeypatch.setattr(celery_app, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(celery_app, "worker_app", lambda *_: Celery(clock, heard, error))
    stopping = Stopping(11)
    context: Any = sqlite_bench.with_stopping(stopping).context  # type: ignore[arg-type]
    with capture_logs() as logs:
        celery_app._listen(context, lambda: None)
    # One that was heard for longer than the longest pause is a broker that came back.
    assert stopping.pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 1.0, 2.0, 4.0, 8.0]
    assert [entry["event"] for entry in logs] == ["broker_not_heard"] * (0 if error is None else 11)


def test_a_message_for_another_device_notifies_nobody(sqlite_bench: Bench) -> None:
    heard: list[None] = []
    task = worker_app(sqlite_bench.context, lambda: heard.append(None)).tasks["workers.work"]
    task("cuda")
    assert heard == []
    task("cpu")
    assert heard == [None]


def test_each_application_of_a_process_notifies_its_own_worker(sqlite_bench: Bench) -> None:
    """A worker makes another one whenever it listens anew."""
    heard: list[str] = []
    apps = [worker_app(sqlite_bench.context, partial(heard.append, name)) for name in ("first", "second")]
    for app in apps:
        app.tasks["workers.work"]("cpu")
    assert heard == ["first", "second"]


def test_after_a_fault_a_runner_waits_longer_and_after_a_success_as_before(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sqlite_bench.context.settings.model_copy(update={"worker_poll_seconds": 2.0})
    one = Runner(replace(sqlite_bench.context, settings=settings))
    monkeypatch.setattr(runner, "random", SimpleNamespace(uniform=lambda low, high: (low + high) / 2))
    faults = [RuntimeError("a driver's own")] * 7
    monkeypatch.setattr(runner, "work_waits", lambda *_: _raise(faults.pop()) if faults else False)
    pauses = [one._pause()]
    for _ in range(8):
        with capture_logs():
            one._pass()
        pauses.append(one._pause())
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 2.0]


def _raise(error: Exception) -> bool:
    raise error


def test_a_clock_that_is_wrong_is_told_once(sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two seconds on; again when it has changed by more than one."""
    assert not changed(3.0, 4.0)
    assert changed(3.0, 4.1)
    assert changed(3.0, 1.9)
    assert changed(None, 0.0)
    skews = [1.9, 2.0, 2.5, 3.1, 3.2, -2.1, 0.0]
    found = iter(skews)
    monkeypatch.setattr(heartbeat, "clock_skew", lambda _: next(found))
    me = Heartbeat(sqlite_bench.context)
    told = []
    for skew in skews:
        with capture_logs() as logs:
            me._beat()
        told += [skew for entry in logs if entry["event"] == "clock_skewed"]
    assert told == [3.1, -2.1]


def test_a_worker_s_row_has_its_skew_in_milliseconds(sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "clock_skew", lambda _: 1.23456)
    Heartbeat(sqlite_bench.context)._beat()
    with sqlite_bench.context.database.reading() as session:
        (state,) = list_workers(session)
    assert state.worker.capacity["clock_skew_seconds"] == 1.235


def test_a_worker_prunes_after_its_first_heartbeat_and_then_each_hour(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    me, clock, pruned = Heartbeat(sqlite_bench.context), [0.0], []
    beats = iter([False, False, False, True])
    monkeypatch.setattr(me, "_beat", lambda: None)
    monkeypatch.setattr(me, "_prune", lambda: pruned.append(clock[0]))
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def wait(seconds: float) -> bool:
        assert seconds == 10.0
        clock[0] += 1801.0
        return next(beats)

    monkeypatch.setattr(me._done, "wait", wait)
    me._keep()
    assert pruned == [1801.0, 5403.0]
