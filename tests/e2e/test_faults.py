"""Faults on a whole installation of real processes. The attempts follow a script; `test_kills.py` has real ones."""

import signal
import time
from datetime import datetime
from itertools import pairwise

import pytest
import redis

from tests.e2e.installation import Installation
from tests.supervise.bench import alive, wait_for

WORKER_MODULE = "tests.supervise.scripted_worker"
DATABASE = "postgresql"
GOOD = "block,sleep:0.2,file:a.json:{}"


def test_a_killed_worker_takes_its_attempt_along_and_the_job_goes_on(installed: Installation) -> None:
    """SIGKILL of the worker: within five seconds no process of its attempt is alive, grandchildren included."""
    job_id = installed.submit("once:child,once:hang," + GOOD)
    installed.log_event(job_id, "hanging")
    attempt = installed.attempt_pids()
    assert installed.log_event(job_id, "grandchild")["pid"] in attempt
    installed["worker0"].kill()
    installed.wait_until_idle(*attempt, seconds=5)
    installed["worker0"].start()
    installed.wait_for_status(job_id, "succeeded")
    assert [(a.number, a.error and a.error["code"]) for a in installed.attempts(job_id)] == [
        (1, "worker_lost"),
        (2, None),
    ]


@pytest.mark.slow
def test_a_worker_that_wakes_after_its_lease_writes_nothing(installed: Installation) -> None:
    """SIGSTOP of the worker, not of its attempt: that ends by itself, the job moves on, the sleeper is fenced."""
    installed.start("worker1")
    wait_for(lambda: len(installed.client.workers()) == 2, 40, what="two workers")
    job_id = installed.submit("once:hang," + GOOD)
    installed.log_event(job_id, "hanging")
    holder = next(
        worker for worker in installed.workers if installed.attempts(job_id)[0].worker_id.startswith(worker.name)
    )
    sleeping_attempt = installed.attempt_pids()
    holder.send(signal.SIGSTOP)
    done = installed.wait_for_status(job_id, "succeeded")
    installed.wait_until_idle(*sleeping_attempt, seconds=5)
    events, artifacts = installed.events(job_id), installed.client.artifacts(job_id)
    holder.send(signal.SIGCONT)
    wait_for(lambda: "attempt_superseded" in holder.log.read_text(), what="the sleeper's word")
    assert installed.events(job_id) == events
    assert installed.client.artifacts(job_id) == artifacts
    assert installed.job(job_id).updated_at == done.updated_at
    assert [a.number for a in installed.attempts(job_id)] == [1, 2]
    again = installed.submit(GOOD)  # and it works on
    installed.wait_for_status(again, "succeeded")


@pytest.mark.slow
def test_a_flushed_broker_loses_nothing_and_two_workers_never_hold_one_job(installed: Installation) -> None:
    installed["worker0"].stop()
    jobs = [installed.submit(GOOD) for _ in range(6)]
    broker = redis.Redis(port=installed.broker_port)
    assert broker.llen("work.cpu") <= 1, "a message for each job would say no more"
    broker.flushall()
    broker.close()
    installed.start("worker0", "worker1")
    for job_id in jobs:
        installed.wait_for_status(job_id, "succeeded")
    attempts = [attempt for job_id in jobs for attempt in installed.attempts(job_id)]
    assert len(attempts) == len(jobs)
    assert len({a.worker_id for a in attempts}) == 2
    for worker in {a.worker_id for a in attempts}:
        assert_one_after_another([(a.started_at, a.finished_at) for a in attempts if a.worker_id == worker])


def assert_one_after_another(spans: list[tuple[datetime, datetime | None]]) -> None:
    """A worker holds one job at a time."""
    ordered = sorted(spans)
    for (_, ended), (started, _) in pairwise(ordered):
        assert ended is not None
        assert ended <= started


@pytest.mark.slow
def test_a_killed_broker_delays_and_loses_nothing(installed: Installation) -> None:
    first = installed.submit("block,sleep:2,file:a.json:{}")
    installed.wait_for_status(first, "running")
    installed["valkey"].kill()
    second = installed.submit(GOOD)  # accepted while nobody can be notified
    installed.wait_for_status(first, "succeeded")
    installed.wait_for_status(second, "succeeded")  # the worker asks again after each job
    third = installed.submit(GOOD)
    installed["valkey"].start()
    installed.wait_for_status(third, "succeeded")


@pytest.mark.slow
def test_a_killed_api_is_missed_by_nobody(installed: Installation) -> None:
    """The job goes on without it, and a client that waits sees the end."""
    job_id = installed.submit("block,sleep:2,file:a.json:{}")
    installed.wait_for_status(job_id, "running")
    installed["api"].kill()
    installed.wait_for_status(job_id, "succeeded")
    installed["api"].start()
    assert installed.client.wait(job_id).status.value == "succeeded"
    assert [artifact.path for artifact in installed.client.artifacts(job_id)] == ["a.json"]


def test_cancel_by_http_frees_the_process_in_five_seconds(installed: Installation) -> None:
    job_id = installed.submit("block,hang")
    installed.log_event(job_id, "hanging")
    attempt = installed.attempt_pids()
    assert attempt
    asked = time.monotonic()
    installed.client.cancel(job_id)
    installed.wait_until_idle(*attempt, seconds=5)
    assert time.monotonic() - asked < 5
    installed.wait_for_status(job_id, "cancelled", seconds=5)
    assert installed["worker0"].running()


@pytest.mark.slow
def test_a_worker_that_is_asked_to_end_gives_its_job_back(installed: Installation) -> None:
    job_id = installed.submit("once:hang," + GOOD)
    installed.log_event(job_id, "hanging")
    attempt = installed.attempt_pids()
    assert installed["worker0"].stop() == 0
    assert not any(map(alive, attempt))
    assert installed.job(job_id).status.value == "queued"
    assert installed.job(job_id).fruitless_attempts == 0
    installed["worker0"].start()
    installed.wait_for_status(job_id, "succeeded")


def test_logs_carry_job_and_attempt_from_post_to_the_last_block(installed: Installation) -> None:
    job_id = installed.submit("log:in_the_attempt,fail:corrupt_checkpoint")
    installed.wait_for_status(job_id, "failed")
    said = {name: installed[name].log.read_text() for name in ("api", "worker0")}
    said["attempt"] = (installed.workspace(job_id) / "attempt.log").read_text()
    for name, text in said.items():
        assert job_id in text, name
    for name in ("worker0", "attempt"):
        assert '"attempt": 1' in said[name]
