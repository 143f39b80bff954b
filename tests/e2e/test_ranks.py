"""A real job on two ranks of a real worker, which is killed under it, and one that is cancelled."""

from pathlib import Path

import pytest

from tests.e2e.installation import Installation
from tests.e2e.real_job import blocks_computed, submit, wait_until_quantizing

WORKER_MODULE = "workers"
DATABASE = "sqlite"
SETTINGS = {"DEVICES": "2"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_end_with_their_worker_and_at_a_cancel(installed: Installation, short_model: Path) -> None:
    """Two ranks and a guard for each; within five seconds none of them is alive."""
    job_id = submit(installed, short_model, steps=60)
    wait_until_quantizing(installed, job_id, 1, blocks_done=0)
    ranks = installed.attempt_pids(job_id)
    assert len(ranks) == 4
    installed["worker0"].kill()
    installed.wait_until_idle(*ranks, seconds=5)
    installed["worker0"].start()
    installed.wait_for_status(job_id, "succeeded", "failed", seconds=300)
    assert [a.error and a.error["code"] for a in installed.attempts(job_id)] == ["worker_lost", None]
    assert blocks_computed(installed, job_id) == [0, 1]
    report = installed.job(job_id).report
    assert report is not None
    assert report["plan"]["world_size"] == 2
    assert {worker.capacity["devices"] for worker in installed.client.workers()} == {2}

    endless = submit(installed, short_model, steps=20_000)
    wait_until_quantizing(installed, endless, 1, blocks_done=0)
    ranks = installed.attempt_pids(endless)
    assert len(ranks) == 4
    installed.client.cancel(endless)
    installed.wait_until_idle(*ranks, seconds=5)
    installed.wait_for_status(endless, "cancelled", seconds=5)
