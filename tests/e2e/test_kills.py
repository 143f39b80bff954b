"""A real job on the real engine, killed: it ends with the codes of an undisturbed run and computes little twice.

They take minutes: `make test-slow` runs them.
"""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.installation import Installation
from tests.e2e.real_job import (
    Chaos,
    blocks_computed,
    order_of,
    run_undisturbed,
    submit,
    tensor_hashes,
    wait_until_quantizing,
)

WORKER_MODULE = "workers"
DATABASE = "sqlite"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_kills_within_one_block(installed: Installation, short_model: Path, tmp_path: Path) -> None:
    """All in the second block, so that the first is adopted three times."""
    job_id = submit(installed, short_model, steps=1800)
    for attempt in (1, 2, 3):
        wait_until_quantizing(installed, job_id, attempt, blocks_done=1)
        order = order_of(installed, job_id)
        os.kill(installed.attempt_pids(job_id)[0], signal.SIGKILL)
        installed.wait_for_status(job_id, "queued")
        assert blocks_computed(installed, job_id) == [0], "a kill came after the second block"
    installed.wait_for_status(job_id, "succeeded", "failed", seconds=200)
    errors = [a.error and a.error["code"] for a in installed.attempts(job_id)]
    assert errors == ["attempt_killed", "attempt_killed", "attempt_killed", None]
    assert blocks_computed(installed, job_id) == [0, 1]
    assert tensor_hashes(installed, job_id) == run_undisturbed(order, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments(installed: Installation, long_model: Path, tmp_path: Path) -> None:
    job_id = submit(installed, long_model, steps=250)
    installed.wait_for_status(job_id, "running")
    wait_until_quantizing(installed, job_id, 1, blocks_done=0)
    order = order_of(installed, job_id)
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
    assert tensor_hashes(installed, job_id) == run_undisturbed(order, tmp_path)
