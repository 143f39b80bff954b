"""Jobs start though the broker is full, flushed or dead, no sweep runs, or a clock is wrong: seconds late, no more.

Real processes, and no sweep in any test but one: what the sweep would repair must not be needed.
"""

import sys
import time
from collections.abc import Iterator

import pytest
import redis

from app.store.workers import forget_workers
from bitwright import Client
from tests.e2e.installation import Installation
from tests.supervise.bench import wait_for

WORKER_MODULE = "tests.supervise.scripted_worker"
DATABASE = "postgresql"
POLL_SECONDS = 0.5
SETTINGS = {"WORKER_POLL_SECONDS": str(POLL_SECONDS)}
GOOD = "block,file:a.json:{}"
SOON = 15.0
"""Seconds in which a small job must have ended, on a busy machine; without a poll it would wait for ever."""


@pytest.fixture
def idle(shared: Installation) -> Iterator[Installation]:
    """Broker, API and one idle worker; no sweep."""
    shared.ensure("valkey", "api", "worker0")
    wait_for(lambda: len(shared.client.workers()) == 1, 60, what="one worker")
    yield shared
    shared.tell()


@pytest.fixture
def broker(idle: Installation) -> Iterator[redis.Redis]:
    """The installation's broker, as its operator sees it."""
    client = redis.Redis(port=idle.broker_port)
    yield client
    client.close()


def ready(client: Client) -> dict[str, str]:
    answer: dict[str, str] = client._transport.send("GET", "/readyz").json()
    return answer


def starts_soon(installed: Installation, **fields: object) -> None:
    """A job is taken by POST and done in seconds."""
    began = time.monotonic()
    job_id = installed.submit(GOOD, **fields)
    assert time.monotonic() - began < 5, "the answer waited for the broker"
    installed.wait_for_status(job_id, "succeeded", seconds=SOON)


@pytest.mark.slow
def test_nothing_grows_while_nobody_reads(idle: Installation, broker: redis.Redis) -> None:
    """`any` notifies no class without a worker, and a class's queue holds one message at the most."""
    broker.flushall()
    busy = idle.submit("hang")
    idle.wait_for_status(busy, "running")
    jobs = [idle.submit(GOOD, device=device) for device in ("any", "cuda", "cpu") * 3]
    assert broker.exists("work.cuda") == 0
    assert broker.llen("work.cpu") <= 1
    for job_id in [busy, *jobs]:
        idle.client.cancel(job_id)


@pytest.mark.slow
def test_a_full_broker(idle: Installation, broker: redis.Redis) -> None:
    broker.config_set("maxmemory-policy", "noeviction")
    broker.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            broker.set("anything", 1)
        starts_soon(idle)
        wait_for(lambda: ready(idle.client) == {"status": "degraded", "broker": "refuses"}, 10, what="the truth")
    finally:
        broker.config_set("maxmemory", 0)
    wait_for(lambda: ready(idle.client) == {"status": "ok", "broker": "ok"}, 10, what="a broker that is well")


def test_a_flushed_broker(idle: Installation, broker: redis.Redis) -> None:
    """Queues, bindings and messages in hand are gone; the next job starts, and the one after it is notified."""
    broker.flushall()
    starts_soon(idle)
    broker.flushall()
    starts_soon(idle)


def test_a_dead_broker_and_no_sweep(idle: Installation) -> None:
    idle["valkey"].kill()
    starts_soon(idle)
    wait_for(lambda: ready(idle.client) == {"status": "degraded", "broker": "unreachable"}, 10, what="the truth")
    idle["valkey"].start()
    wait_for(lambda: ready(idle.client)["status"] == "ok", 20, what="the broker")
    starts_soon(idle)


@pytest.mark.slow
def test_a_worker_whose_clock_is_ahead_hears_and_tells(idle: Installation) -> None:
    """Three minutes: longer than any message used to be valid. Polls are put off, so that it must be a message."""
    idle["worker0"].stop()
    command = [sys.executable, "-m", "tests.supervise.skewed_worker", "180"]
    idle.add("worker2", command, WORKER_POLL_SECONDS="60")
    idle.start("worker2")
    try:
        wait_for(lambda: len(idle.client.workers()) == 1, 60, what="the skewed worker")
        (worker,) = idle.client.workers()
        assert worker.clock_skew_seconds == pytest.approx(180, abs=1)
        assert "clock_skew_seconds" not in worker.capacity
        wait_for(lambda: '"event": "clock_skewed"' in idle["worker2"].log.read_text(), 10, what="a word in its log")
        starts_soon(idle)
        starts_soon(idle)
    finally:
        idle["worker2"].stop()
        del idle.processes["worker2"]


@pytest.mark.slow
def test_a_worker_ends_in_order_at_any_moment_of_its_start(idle: Installation) -> None:
    """It says that it lives before it listens: whoever believes that may end it then."""
    for _ in range(3):
        idle["worker0"].stop()
        idle.start("worker0")
        wait_for(lambda: len(idle.client.workers()) == 1, 60, what="the worker's word")
        assert idle["worker0"].stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("state", ["full", "dead"])
def test_a_worker_that_starts_with_such_a_broker(idle: Installation, broker: redis.Redis, state: str) -> None:
    """It takes jobs at once, hears messages when the broker is well again, and ends in order in between."""
    idle["worker0"].stop()
    if state == "full":
        broker.config_set("maxmemory", 1)
    else:
        idle["valkey"].kill()
    idle.start("worker0")
    wait_for(lambda: len(idle.client.workers()) == 1, 60, what="the worker")
    starts_soon(idle)
    assert idle["worker0"].stop() == 0, "it ends in order though it waits for a broker"
    idle.start("worker0")
    wait_for(lambda: len(idle.client.workers()) == 1, 60, what="the worker again")
    if state == "full":
        broker.config_set("maxmemory", 0)
    else:
        idle["valkey"].start()
    starts_soon(idle)
    wait_for(lambda: "work.cpu" in heard(idle), 60, what="listening")


def fill(broker: redis.Redis, message: bytes) -> None:
    """Add messages to a queue that nobody reads until the broker takes no more."""
    for _ in range(20_000):
        try:
            broker.lpush("work.cuda", message)
        except redis.exceptions.OutOfMemoryError:
            return
    raise AssertionError("the broker took everything")


def heard(installed: Installation) -> set[str]:
    """Queues that some worker listens to."""
    client = redis.Redis(port=installed.broker_port, decode_responses=True)
    try:
        return {str(key).removeprefix("_kombu.binding.") for key in client.keys("_kombu.binding.work.*")}
    finally:
        client.close()


@pytest.mark.slow
def test_what_a_killed_worker_held_is_taken_back_without_a_sweep(idle: Installation) -> None:
    job_id = idle.submit("once:hang," + GOOD)
    idle.log_event(job_id, "hanging")
    idle.start("worker1")
    wait_for(lambda: len(idle.client.workers()) == 2, 60, what="a second worker")
    idle["worker0"].kill()
    try:
        idle.wait_for_status(job_id, "succeeded", seconds=40)
    finally:
        idle["worker1"].stop()
        with idle.database.transaction() as session:
            forget_workers(session, unseen_seconds=-1)  # else the killed one is taken for alive for a while
    errors = [attempt.error and attempt.error["code"] for attempt in idle.attempts(job_id)]
    assert errors == ["worker_lost", None]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_broker_that_an_earlier_release_filled_is_emptied(idle: Installation, broker: redis.Redis) -> None:
    """Messages for a class that has no worker fill the memory; jobs start meanwhile, and a sweep throws them away."""
    message = b"x" * 1000
    limit = broker.info("memory")["used_memory"] + (4 << 20)
    broker.config_set("maxmemory", limit)
    try:
        fill(broker, message)
        starts_soon(idle)
        fill(broker, message)  # again: memory of connections that closed meanwhile is free
        assert ready(idle.client)["broker"] == "refuses"
        idle.start("sweep")
        wait_for(lambda: broker.exists("work.cuda") == 0, 30, what="an empty queue")
        wait_for(lambda: ready(idle.client)["status"] == "ok", 10, what="the broker")
    finally:
        broker.config_set("maxmemory", 0)
        idle["sweep"].stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_many_submissions_leave_the_broker_as_it_was(idle: Installation, broker: redis.Redis) -> None:
    """Jobs that no worker can take cost the broker nothing: a message was about a kilobyte."""
    broker.flushall()
    starts_soon(idle)
    before = broker.info("memory")["used_memory_dataset"]
    jobs = [idle.submit(GOOD, device="cuda", priority=-100) for _ in range(300)]
    assert broker.exists("work.cuda") == 0
    assert broker.info("memory")["used_memory_dataset"] < before + 100_000
    for job_id in jobs:
        idle.client.cancel(job_id)
