"""A real job on the real engine, killed: it ends with the codes of an undisturbed run and computes little twice.

The campaign of twenty kills is slow; `make test-slow` runs it.
"""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.installation import Installation
from tests.e2e.real_job import Chaos, blocks_computed, submit, tensor_hashes, wait_until_quantizing

WORKER_MODULE = "workers"
DATABASE = "sqlite"


def undisturbed(installed: Installation, job_id: str, blocks: int) -> dict[str, str]:
    """What a job stores that nobody disturbed; waits for its end."""
    installed.wait_for_status(job_id, "succeeded", "failed", seconds=300)
    assert blocks_computed(installed, job_id) == list(range(blocks))
    assert len(installed.attempts(job_id)) == 1
    return tensor_hashes(installed, job_id)


@pytest.mark.slow
def test_three_kills_within_one_block(installed: Installation, model: Path) -> None:
    """A second worker runs the same request undisturbed, at the same time."""
    installed.start("worker1")
    model_job, job_id = submit(installed, model, steps=120), submit(installed, model, steps=120)
    finished = []
    for attempt in (1, 2, 3):
        wait_until_quantizing(installed, job_id, attempt)
        os.kill(installed.attempt_pids(job_id)[0], signal.SIGKILL)
        installed.wait_for_status(job_id, "queued")
        finished.append(blocks_computed(installed, job_id))
    assert finished[0] == finished[1] == finished[2], "the kills fell into several blocks"
    installed.wait_for_status(job_id, "succeeded", "failed", seconds=300)
    errors = [a.error and a.error["code"] for a in installed.attempts(job_id)]
    assert errors == ["attempt_killed", "attempt_killed", "attempt_killed", None]
    assert blocks_computed(installed, job_id) == list(range(4))
    assert tensor_hashes(installed, job_id) == undisturbed(installed, model_job, 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments(installed: Installation, long_model: Path) -> None:
    expected = undisturbed(installed, submit(installed, long_model, steps=250), 10)
    job_id = submit(installed, long_model, steps=250)
    installed.wait_for_status(job_id, "running")
    chaos = Chaos(installed, job_id, seed=20, longest_pause=4.0)
    for _ in range(20):
        chaos.strike()
    installed.ensure("valkey", "sweep", "api", "worker0")
    job = installed.wait_for_status(job_id, "succeeded", "failed", seconds=400)
    assert job.status.value == "succeeded", job.error
    computed = blocks_computed(installed, job_id)
    assert set(chaos.kills) == {"attempt", "worker0", "api", "valkey"}, chaos.kills
    assert len(computed) <= 10 + len(chaos.kills), Counter(computed)
    assert set(computed) == set(range(10))
    assert tensor_hashes(installed, job_id) == expected
